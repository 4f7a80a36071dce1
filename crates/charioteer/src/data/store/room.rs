//! Memory of devices: who is there, and who goes.
//!
//! What is pinned, and what bodies were promised, never exceeds a device: that is the business of whoever
//! admits tasks, by their footprints. So room for one more can always be made of what nobody has pinned.
//!
//! *Who goes*: first what nothing is valid in; then what nobody is known to want, the one that was used
//! least recently; then what is wanted farthest in the future. Of the few that are wanted farthest the
//! one goes that was used least recently: the very last one is often in use by the task before, and
//! whoever takes its memory would have to wait for that. Instances are in this order once a device was
//! ever full, and not before.
//!
//! *How it goes*: pieces that nobody else holds are copied home. The memory passes to a new instance of
//! the same size, which inherits what it has to be behind, or is given back on a stream of its own that is
//! behind the same. Nobody waits on the host.

use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::Instant;

use smallvec::SmallVec;

use super::directory::Numbers;
use super::events::{Events, is_pending};
use super::instance::{HOME, Instance, Rank};
use super::slab::Slab;
use super::storage::strides;
use super::{Moved, State, View};
use crate::machine::{DeviceError, DeviceId, DevicePointer, HOST, Machine, Stream};
use crate::region::Span;

pub(super) struct Room {
    pub(super) device: DeviceId,
    pub(super) capacity: u64,
    /// Bytes of the instances that are there.
    pub(super) resident: u64,
    pub(super) peak: u64,
    /// Of those, bytes that are pinned.
    pinned: u64,
    /// Bytes that bodies were promised.
    pub(super) promised: u64,
    pub(super) evictions: u64,
    pub(super) written_back: u64,
    /// Whether it was ever full.
    pressed: bool,
    /// Who may go, the first one on top. An entry counts if it is what its instance says of itself: others
    /// are left behind by what happened since.
    ranks: BinaryHeap<(Rank, u32)>,
    /// Memory is taken and given back here.
    stream: Option<Stream>,
    /// Here what owners of adopted memory have enqueued is waited for.
    pub(super) visitors: Option<Stream>,
    pub(super) lost: bool,
}

impl Room {
    pub(super) fn new(machine: &Machine, device: DeviceId) -> Self {
        Self {
            device,
            capacity: machine.device(device).info().memory,
            resident: 0,
            peak: 0,
            pinned: 0,
            promised: 0,
            evictions: 0,
            written_back: 0,
            pressed: false,
            ranks: BinaryHeap::new(),
            stream: None,
            visitors: None,
            lost: false,
        }
    }
}

/// Whether an entry of the ranks is what its instance says.
fn counts(instances: &Slab<Instance>, (rank, at): &(Rank, u32)) -> bool {
    instances.get(*at).is_some_and(|it| it.rank == Some(*rank))
}

/// Memory that an instance left behind.
pub(super) struct Block {
    pointer: DevicePointer,
    bytes: u64,
    behind: Events,
}

impl State {
    pub(super) fn room(&mut self, device: DeviceId) -> &mut Room {
        &mut self.rooms[usize::from(device.index())]
    }

    /// Puts an instance where it belongs among those that may go.
    #[inline]
    pub(super) fn rerank(&mut self, at: u32) {
        if self.pressed {
            self.rank(at);
        }
    }

    fn rank(&mut self, at: u32) {
        let instance = &mut self.instances[at];
        let room = &mut self.rooms[usize::from(instance.device.index())];
        if !room.pressed {
            return;
        }
        let may_go = instance.pins == 0 && instance.dead.is_none() && !instance.adopted;
        let rank = may_go.then(|| {
            let next = if instance.valid == 0 {
                Rank::EMPTY
            } else {
                let directory = &self.directories[instance.directory];
                directory.next_use(instance.frame).unwrap_or(Rank::UNKNOWN)
            };
            let age = u64::MAX - instance.tick;
            Rank { next, age }
        });
        if rank == instance.rank {
            return;
        }
        instance.rank = rank;
        if let Some(rank) = rank {
            room.ranks.push((rank, at));
            if room.ranks.len() > 64 && room.ranks.len() > 4 * self.instances.len() {
                let mut ranks = std::mem::take(&mut room.ranks).into_vec();
                ranks.retain(|entry| counts(&self.instances, entry));
                ranks.sort_unstable();
                ranks.dedup();
                room.ranks = ranks.into();
            }
        }
    }

    /// Who goes next, of those that nobody has pinned.
    fn victim(&mut self, device: DeviceId) -> Option<u32> {
        let room = &mut self.rooms[usize::from(device.index())];
        let mut few: SmallVec<[(Rank, u32); 4]> = SmallVec::new();
        while let Some(entry) = room.ranks.pop() {
            if !counts(&self.instances, &entry) || few.contains(&entry) {
                continue;
            }
            few.push(entry);
            let most = 1 + (room.ranks.len() / 32).min(3);
            if entry.0.next >= Rank::UNKNOWN || few.len() >= most {
                break;
            }
        }
        // What nobody wants is no choice: it is the first one or behind those that somebody wants.
        let first = *few.first()?;
        let chosen = if first.0.next >= Rank::UNKNOWN {
            first
        } else {
            let candidates = few.iter().copied();
            candidates.max_by_key(|(rank, _)| rank.age)?
        };
        room.ranks.extend(few);
        Some(chosen.1)
    }

    /// The device is full for the first time: from now on it is known who goes first.
    #[cold]
    fn press(&mut self, device: DeviceId) {
        self.pressed = true;
        self.room(device).pressed = true;
        let all: Vec<u32> = self.instances.iter().map(|(at, _)| at).collect();
        for at in all {
            self.rank(at);
        }
    }

    #[inline]
    pub(super) fn pin(&mut self, at: u32) {
        let instance = &mut self.instances[at];
        instance.pins += 1;
        if instance.pins == 1 {
            let (device, bytes) = (instance.device, instance.bytes);
            self.room(device).pinned += bytes;
            self.rerank(at);
        }
    }

    #[inline]
    pub(super) fn unpin(&mut self, at: u32) {
        self.tick += 1;
        let instance = &mut self.instances[at];
        instance.pins -= 1;
        instance.tick = self.tick;
        if instance.pins == 0 {
            if instance.dead.is_some() {
                self.instances.remove(at);
                return;
            }
            let (device, bytes) = (instance.device, instance.bytes);
            self.room(device).pinned -= bytes;
            self.rerank(at);
        }
    }

    /// Drops what may go until there is room for so many bytes. Memory of the sizes that are wanted is
    /// kept for them.
    pub(super) fn make_room(
        &mut self,
        machine: &Machine,
        device: DeviceId,
        need: u64,
        sizes: &mut SmallVec<[u64; 4]>,
        spare: &mut SmallVec<[Block; 4]>,
    ) -> Result<(), DeviceError> {
        let room = self.room(device);
        let taken = room.pinned.saturating_add(room.promised);
        if taken.saturating_add(need) > room.capacity {
            return Err(DeviceError::OutOfMemory {
                device,
                wanted: need,
                free: room.capacity.saturating_sub(taken),
            });
        }
        loop {
            let room = self.room(device);
            if room.resident + room.promised + need <= room.capacity {
                return Ok(());
            }
            let block = self
                .evict_one(machine, device)?
                .expect("what is not pinned may go");
            match sizes.iter().position(|size| *size == block.bytes) {
                Some(size) => {
                    sizes.swap_remove(size);
                    spare.push(block);
                }
                None => self.give_back(machine, block),
            }
        }
    }

    /// Drops whoever goes first, if anybody may.
    fn evict_one(
        &mut self,
        machine: &Machine,
        device: DeviceId,
    ) -> Result<Option<Block>, DeviceError> {
        if !self.room(device).pressed {
            self.press(device);
        }
        let Some(at) = self.victim(device) else {
            return Ok(None);
        };
        let (block, written) = self.evict(machine, at)?;
        let room = self.room(device);
        room.evictions += 1;
        room.written_back += written;
        Ok(Some(block))
    }

    /// Copies home what an instance has alone. Gives the pieces that it held, and how many bytes are copied.
    pub(super) fn send_home(
        &mut self,
        machine: &Machine,
        at: u32,
    ) -> Result<(Numbers, u64), DeviceError> {
        let directory = self.instances[at].directory;
        let region = self.frame_of(directory, at).clone();
        let mut held = self.directories[directory].overlapping(&region);
        held.retain(|number| {
            let holder = self.directories[directory].pieces[*number].holder(at);
            holder.is_some()
        });
        for number in &held {
            self.settle(machine, directory, *number);
        }
        let pieces = &self.directories[directory].pieces;
        let is_alone = |number: &u32| matches!(&*pieces[*number].holders, [own] if own.at == at);
        let alone: Numbers = held.iter().copied().filter(is_alone).collect();
        if alone.is_empty() {
            return Ok((held, 0));
        }
        self.carry(machine, directory, at, HOME, &alone, &region)?;
        let known = &self.directories[directory];
        let bytes = alone
            .iter()
            .map(|it| known.bytes(&known.pieces[*it].region));
        let bytes = bytes.sum();
        Ok((held, bytes))
    }

    /// Drops an instance that nobody has pinned. What nobody else holds is copied home: how many bytes.
    pub(super) fn evict(
        &mut self,
        machine: &Machine,
        at: u32,
    ) -> Result<(Block, u64), DeviceError> {
        let (held, written) = self.send_home(machine, at)?;
        let directory = self.instances[at].directory;
        let region = self.frame_of(directory, at).clone();
        let mut behind = Events::new();
        for number in held {
            let holders = &mut self.directories[directory].pieces[number].holders;
            if let Some(place) = holders.iter().position(|holder| holder.at == at) {
                behind.join(&holders.remove(place).ready);
            }
        }
        if self.observed {
            self.told.push(Moved {
                storage: self.directories[directory].storage,
                region: region.clone(),
                from: self.instances[at].device,
                to: HOST,
                bytes: 0,
                source: region.clone(),
                target: region,
                event: None,
                at: Instant::now(),
            });
        }
        let mut block = self.remove(at);
        behind.join(&block.behind);
        behind.prune(machine);
        block.behind = behind;
        Ok((block, written))
    }

    /// Takes an instance out that no piece knows of any more.
    pub(super) fn remove(&mut self, at: u32) -> Block {
        let instance = self.instances.remove(at);
        debug_assert_eq!(instance.pins, 0);
        let directory = &mut self.directories[instance.directory];
        let frame = &mut directory.frames[instance.frame];
        frame.instances.retain(|(_, other)| *other != at);
        directory.tidy(instance.frame);
        self.room(instance.device).resident -= instance.bytes;
        Block {
            pointer: instance.pointer(),
            bytes: instance.bytes,
            behind: instance.users(),
        }
    }

    fn stream(&mut self, machine: &Machine, device: DeviceId) -> Result<Stream, DeviceError> {
        if let Some(stream) = self.room(device).stream {
            return Ok(stream);
        }
        let stream = self.lanes.create(machine, device)?;
        self.room(device).stream = Some(stream);
        Ok(stream)
    }

    /// Gives memory back, in the order of streams.
    pub(super) fn give_back(&mut self, machine: &Machine, block: Block) {
        let give = |state: &mut Self| -> Result<(), DeviceError> {
            let device = block.pointer.device;
            let stream = state.stream(machine, device)?;
            let device = machine.device(device);
            for event in block.behind.iter() {
                if event.stream != stream && is_pending(machine, event) {
                    device.follow(stream, event)?;
                }
            }
            device.free(block.pointer, stream)
        };
        // What a lost device had is gone.
        let _ = give(self);
    }

    /// A new instance for the box of a frame, pinned once. There is room for it, if nobody else took it.
    pub(super) fn make(
        &mut self,
        machine: &Machine,
        directory: u32,
        frame: u32,
        device: DeviceId,
        spare: &mut SmallVec<[Block; 4]>,
    ) -> Result<u32, DeviceError> {
        let known = &self.directories[directory];
        let region = known.frames[frame].region.clone();
        let (item, bytes) = (known.item, known.bytes(&region));
        let block = match spare.iter().position(|block| block.bytes == bytes) {
            Some(at) => spare.swap_remove(at),
            None => self.allocate(machine, device, bytes)?,
        };
        let view = Arc::new(View {
            pointer: block.pointer,
            strides: strides(&region, item),
            origin: region.spans().iter().map(Span::start).collect(),
        });
        let at = self.instances.insert(Instance {
            device,
            directory,
            frame,
            view,
            bytes,
            adopted: false,
            pins: 0,
            keepers: SmallVec::new(),
            valid: 0,
            born: block.behind,
            uses: Events::new(),
            tick: self.tick,
            rank: None,
            dead: None,
        });
        let frame = &mut self.directories[directory].frames[frame];
        frame.instances.push((device, at));
        let room = self.room(device);
        room.resident += bytes;
        room.peak = room.peak.max(room.resident);
        self.pin(at);
        Ok(at)
    }

    fn allocate(
        &mut self,
        machine: &Machine,
        device: DeviceId,
        bytes: u64,
    ) -> Result<Block, DeviceError> {
        let stream = self.stream(machine, device)?;
        let known = machine.device(device);
        let pointer = loop {
            match known.allocate(bytes, stream) {
                // Somebody else has some of it: other libraries, say.
                Err(full @ DeviceError::OutOfMemory { .. }) => {
                    match self.evict_one(machine, device)? {
                        Some(block) if block.bytes == bytes => return Ok(block),
                        Some(block) => self.give_back(machine, block),
                        None => return Err(full),
                    }
                }
                allocated => break allocated?,
            }
        };
        let event = known.record(stream)?;
        Ok(Block {
            pointer,
            bytes,
            behind: Events::of(is_pending(machine, event).then_some(event)),
        })
    }

    /// The last of what is enqueued for memory on the device.
    pub(super) fn last_return(
        &self,
        machine: &Machine,
        room: usize,
    ) -> Option<crate::machine::Event> {
        let room = &self.rooms[room];
        let event = machine.device(room.device).record(room.stream?).ok()?;
        is_pending(machine, event).then_some(event)
    }

    /// All that is there is gone. Instances that are pinned go when they are given back.
    pub(super) fn empty(&mut self, device: DeviceId) {
        let room = self.room(device);
        room.lost = true;
        (room.resident, room.pinned) = (0, 0);
        room.ranks.clear();
        (room.stream, room.visitors) = (None, None);
    }
}
