//! What the best eviction would have moved, for the schedule and the memory of a trace.
//!
//! Belady's rule: when a device has no room, drop what is used there again last. That takes the future, which a
//! trace has: who used which data on which device, in the order in which bodies began. It is replayed with one
//! body on each device at a time, and with all of the device's memory but for what the body allocates.
//!
//! Data is brought when it is needed, once, and a copy that was made stays until its room is needed or
//! somebody writes elsewhere. What the host has not is copied home when it is dropped, unless it is
//! written over before it is read again, when the host reads it, and at the end. Of two that are used again
//! equally late, the one goes first that needs no copy.
//!
//! Data is known by the boxes that tasks use, so that the figure is exact where boxes are equal or disjoint,
//! as tiles of one grid are. Who writes a part of another box makes all of that old.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::BuildHasherDefault;
use std::rc::Rc;

use smallvec::SmallVec;

use super::check::NoEvidence;
use super::file::TraceFile;
use super::lives::Lives;
use super::moves::{Scattered, wants};
use super::numbers::{ByNumber, Near};
use super::record::{AccessRecord, DeviceEvent};
use crate::data::Mode;
use crate::machine::{DeviceId, HOST};
use crate::region::Region;
use crate::region::tree::{Axes, Bounds, Tree};

/// What the best eviction moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Optimum {
    /// Bytes between memories, all in all.
    pub bytes: u64,
    /// Of these, bytes to devices.
    pub loaded: u64,
    /// Bytes that were copied home to make room.
    pub written_back: u64,
}

/// A box of an array, by its place in the list of all.
type Thing = usize;

/// A use of a box by a task on one device or on the host.
#[derive(Clone, Copy)]
struct Touch {
    thing: Thing,
    /// Bytes that are read.
    reads: u64,
    writes: bool,
}

struct Step {
    device: DeviceId,
    /// Bytes that the body allocates.
    body: u64,
    touches: SmallVec<[Touch; 4]>,
}

struct Known {
    bytes: u64,
    /// Others of its array that overlap it.
    overlaps: Vec<Thing>,
    /// Whether the host has it as it is, and which devices do.
    at_home: bool,
    holders: SmallVec<[DeviceId; 2]>,
    /// The steps that use it, which are still to come: where, and whether they read.
    uses: VecDeque<(usize, DeviceId, bool)>,
}

#[derive(Default)]
struct Memory {
    room: u64,
    used: u64,
    /// Who is there, with the key under which it is in line.
    there: HashMap<Thing, (u64, bool)>,
    /// Who goes first is last: by the next use, and of equals who needs no copy.
    line: BTreeSet<(u64, bool, Thing)>,
}

/// Works it out; see the module.
///
/// # Errors
/// [`NoEvidence`] of a trace before version 4.
pub fn optimum(trace: &TraceFile) -> Result<Optimum, NoEvidence> {
    if trace.version < 4 {
        return Err(NoEvidence {
            version: trace.version,
            needs: 4,
        });
    }
    let lives = Lives::new(trace);
    let scattered = Scattered::new(trace, &lives);
    Ok(best(trace, &lives, &scattered))
}

/// The same, of a trace of version 4 with its lives.
pub(super) fn best(trace: &TraceFile, lives: &Lives, scattered: &Scattered<'_>) -> Optimum {
    let mut schedule = Schedule::default();
    let mut granted: ByNumber<SmallVec<[(DeviceId, u64); 1]>> = ByNumber::default();
    let mut memories: HashMap<DeviceId, Memory> = HashMap::new();
    for record in &trace.devices {
        match record.event {
            DeviceEvent::Granted { device, memory, .. } => {
                let members = granted.entry(record.task).or_default();
                match members.iter_mut().find(|member| member.0 == device) {
                    Some(member) => member.1 = memory,
                    None => members.push((device, memory)),
                }
            }
            DeviceEvent::Capacity { device, memory, .. } if device != HOST => {
                let room = Memory {
                    room: memory,
                    ..Memory::default()
                };
                memories.insert(device, room);
            }
            _ => {}
        }
    }
    let mut begins: Vec<(u64, u64, &[&AccessRecord])> = Vec::new();
    for accesses in scattered.tasks() {
        let task = accesses[0].task;
        if let Some(life) = lives.of(task) {
            begins.push((life.begin(), task, accesses));
        }
    }
    begins.sort_unstable_by_key(|&(begin, task, _)| (begin, task));
    for (_, task, accesses) in begins {
        let life = lives.of(task).expect("it began");
        let last = life.parts.iter().map(|part| part.begun).max();
        for part in life.parts.iter().filter(|part| Some(part.begun) == last) {
            let mut members = granted.get(&task).into_iter().flatten();
            let memory = members.find(|member| member.0 == part.device);
            let memory = memory.map_or(0, |member| member.1);
            let set = (part.member, part.members);
            schedule.add(trace, part.device, set, memory, accesses);
        }
        if life.host.is_some() {
            let members = life.parts.first().map_or(1, |part| part.members);
            let cores = if life.parts.is_empty() {
                &[0][..]
            } else {
                &life.cores
            };
            for &member in cores {
                schedule.add(trace, HOST, (member, members), 0, accesses);
            }
        }
    }
    schedule.run(memories)
}

#[derive(Default)]
struct Schedule {
    steps: Vec<Step>,
    things: Vec<Known>,
    numbers: ByNumber<HashMap<Region, Thing, BuildHasherDefault<Near>>>,
    trees: HashMap<u64, Tree<(Region, Thing)>>,
}

impl Schedule {
    fn thing(&mut self, trace: &TraceFile, datum: u64, instance: &Region) -> Thing {
        let numbers = self.numbers.entry(datum).or_default();
        if let Some(&known) = numbers.get(instance) {
            return known;
        }
        let thing = self.things.len();
        numbers.insert(instance.clone(), thing);
        let layout = &trace.layouts[&datum];
        let bounds = Bounds::of(instance, &Axes::longest(&layout.shape));
        let tree = self.trees.entry(datum).or_insert_with(Tree::new);
        let mut overlaps = Vec::new();
        tree.visit(&bounds, &mut |(other, known), exact| {
            if exact || other.overlaps(instance) {
                overlaps.push(*known);
            }
        });
        for &other in &overlaps {
            self.things[other].overlaps.push(thing);
        }
        tree.insert(bounds, (instance.clone(), thing));
        self.things.push(Known {
            bytes: instance.elements() * layout.item,
            overlaps,
            at_home: true,
            holders: SmallVec::new(),
            uses: VecDeque::new(),
        });
        thing
    }

    fn add(
        &mut self,
        trace: &TraceFile,
        device: DeviceId,
        (member, members): (u16, u16),
        memory: u64,
        accesses: &[&AccessRecord],
    ) {
        let mut touches: SmallVec<[Touch; 4]> = SmallVec::new();
        for of_array in accesses.chunk_by(|a, b| a.datum == b.datum) {
            let datum = of_array[0].datum;
            let item = trace.layouts[&datum].item;
            for want in wants(of_array, member, members, None) {
                let thing = self.thing(trace, datum, &Rc::clone(&want.instance));
                let reads = match want.access.mode {
                    Mode::Out => 0,
                    _ => want.region.elements() * item,
                };
                let writes = want.access.mode.writes();
                match touches.iter_mut().find(|touch| touch.thing == thing) {
                    Some(touch) => {
                        touch.reads = (touch.reads + reads).min(self.things[thing].bytes);
                        touch.writes |= writes;
                    }
                    None => touches.push(Touch {
                        thing,
                        reads,
                        writes,
                    }),
                }
            }
        }
        let footprint: u64 = touches
            .iter()
            .map(|touch| self.things[touch.thing].bytes)
            .sum();
        let step = self.steps.len();
        for touch in &touches {
            let uses = &mut self.things[touch.thing].uses;
            uses.push_back((step, device, touch.reads != 0));
        }
        self.steps.push(Step {
            device,
            body: memory.saturating_sub(footprint),
            touches,
        });
    }

    fn run(mut self, mut memories: HashMap<DeviceId, Memory>) -> Optimum {
        let mut moved = Optimum::default();
        for at in 0..self.steps.len() {
            let step = &self.steps[at];
            let (device, body) = (step.device, step.body);
            let touches = step.touches.clone();
            for touch in &touches {
                let uses = &mut self.things[touch.thing].uses;
                while uses.front().is_some_and(|&(step, ..)| step <= at) {
                    uses.pop_front();
                }
            }
            if device == HOST {
                for touch in &touches {
                    self.at_host(*touch, &mut moved);
                }
                continue;
            }
            let Some(memory) = memories.get_mut(&device) else {
                continue;
            };
            // What the body uses is in no line.
            for touch in &touches {
                if let Some(&(next, keeps)) = memory.there.get(&touch.thing) {
                    memory.line.remove(&(next, keeps, touch.thing));
                }
            }
            for touch in &touches {
                if let Entry::Vacant(new) = memory.there.entry(touch.thing) {
                    new.insert((0, false));
                    memory.used += self.things[touch.thing].bytes;
                }
            }
            while memory.used + body > memory.room
                && let Some((_, _, thing)) = memory.line.pop_last()
            {
                memory.there.remove(&thing);
                memory.used -= self.things[thing].bytes;
                self.evict(thing, device, &mut moved);
            }
            for touch in &touches {
                self.load(*touch, device, &mut moved);
            }
            for touch in touches.iter().filter(|touch| touch.writes) {
                self.write(touch.thing, device);
            }
            for touch in &touches {
                let known = &self.things[touch.thing];
                let next = known.uses.iter().find(|(_, other, _)| *other == device);
                // What nobody uses here again goes first.
                let next = next.map_or(u64::MAX, |(step, ..)| *step as u64);
                let free = known.at_home || known.holders.len() > 1;
                let memory = memories.get_mut(&device).expect("it has memory");
                memory.there.insert(touch.thing, (next, free));
                memory.line.insert((next, free, touch.thing));
            }
        }
        for known in &self.things {
            if !known.at_home {
                moved.bytes += known.bytes;
            }
        }
        moved
    }

    /// The host uses it: what it has not comes home.
    fn at_host(&mut self, touch: Touch, moved: &mut Optimum) {
        let others = self.things[touch.thing].overlaps.clone();
        for thing in others.into_iter().chain([touch.thing]) {
            let known = &mut self.things[thing];
            if touch.reads != 0 && !known.at_home && !known.holders.is_empty() {
                moved.bytes += known.bytes;
                known.at_home = true;
            }
            if touch.writes {
                known.holders.clear();
                known.at_home = true;
            }
        }
    }

    fn evict(&mut self, thing: Thing, device: DeviceId, moved: &mut Optimum) {
        let known = &mut self.things[thing];
        let held = known.holders.len();
        known.holders.retain(|other| *other != device);
        let is_last = held == 1 && known.holders.is_empty() && !known.at_home;
        // Nobody has it any more, and somebody wants it as it is: or nobody, so that it is a result.
        let overwritten = known.uses.front().is_some_and(|&(_, _, reads)| !reads);
        if is_last {
            known.at_home = true;
            if !overwritten {
                moved.bytes += known.bytes;
                moved.written_back += known.bytes;
            }
        }
    }

    fn load(&mut self, touch: Touch, device: DeviceId, moved: &mut Optimum) {
        let known = &mut self.things[touch.thing];
        if known.holders.contains(&device) {
            return;
        }
        moved.bytes += touch.reads;
        moved.loaded += touch.reads;
        known.holders.push(device);
    }

    fn write(&mut self, thing: Thing, device: DeviceId) {
        for other in self.things[thing].overlaps.clone() {
            let known = &mut self.things[other];
            known.holders.clear();
            known.at_home = true;
        }
        let known = &mut self.things[thing];
        known.at_home = false;
        known.holders = SmallVec::from_iter([device]);
    }
}
