//! Copies of arrays on devices: where they are, how they come there, and when they go.
//!
//! A [`Storage`] is the bytes of an array: a buffer of the host, and what devices have of it. The
//! [`Store`] of an engine knows where the last version of each element is, brings it to where a task
//! wants it, and makes room. It knows regions and the machine, and nothing of tasks but the streams and
//! events that it is told.
//!
//! # Instances
//!
//! An *instance* is memory of a device for a box of an array, in C order. Each want of a task has an
//! instance that is the box around its region; wants of one task whose boxes overlap share one with the
//! box around both. A larger instance that happens to have the elements does not serve: what a task
//! pins is what its own wants say ([`Store::footprint`]), so that whoever admits tasks by their
//! footprints knows that there is room for each. Overlapping instances on one device are kept in
//! agreement by copies within its memory, like those on different ones. The host's buffer is an
//! instance that is always there.
//!
//! # Protocol
//!
//! **A task's way.** [`announce`](Store::announce) at its spawn. [`ensure`](Store::ensure) when it is
//! planned, on each of its devices: its streams are known, and all it comes after is launched. It finds or
//! makes the instances, pins them, enqueues the copies that are needed, and has the task's stream wait for
//! them. [`launched`](Store::launched) when its work is enqueued: what it wrote is valid in its
//! instances alone from then on, behind its event; nothing is pinned any more.
//!
//! **Order.** Who calls sees to it that conflicting tasks are ordered, as they are without any data on
//! devices: planned one after the launch of the other, their streams one behind the other. The store orders
//! what it adds: copies among each other and with tasks, and whoever gets memory behind whoever had it.
//! Events of tasks are followed: whether their failure is somebody's own is decided by who
//! orders tasks. Events of copies are waited for: a task whose copy failed fails. Whom nothing orders with
//! those who write ([`Touch::Peek`]) gets whatever is there: nothing is brought for it to where somebody else
//! is to write or read before, and what it takes from the host's buffer, where somebody may be writing, is
//! forgotten.
//!
//! **On the host** a task runs when its predecessors are complete.
//! [`ensure_host`](Store::ensure_host) gives the events for which it has to wait beyond that. A storage that was
//! never on a device costs a load.
//! What a core of a set writes is the host's from then on, so what the set's devices read is
//! [guarded](Store::guard) before.
//!
//! **Failures.** A copy that failed leaves no holder behind; the source is still there. What was on a
//! lost device alone is lost, and whoever reads it hears so by name. What a task leaves that failed is
//! whatever is there: that nobody reads it is the business of who knows about tasks.
//!
//! **Waiting, locks.** Nothing here waits for a device. All that is known is under one lock; devices are
//! called under it, which only enqueue. Observers, and what keeps a buffer of the host, are called and
//! dropped without it (invariant 8). A storage that goes leaves its number to the store, which frees its
//! instances when it is next called.
//!
//! | file | what it has |
//! |---|---|
//! | `storage` | the array on the host |
//! | `wants` | the instances that a task needs |
//! | `directory` | who has which elements |
//! | `instance` | memory of a device |
//! | `copies` | from where and on which streams elements come |
//! | `room` | memory, and who goes |
//! | `future` | who will want what |
//! | `graves` | storages that were dropped |
//! | `events`, `slab` | what all use |

mod copies;
mod directory;
mod events;
mod future;
mod graves;
mod instance;
mod room;
mod slab;
mod storage;
#[cfg(all(test, not(loom)))]
mod tests;
mod wants;

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use self::copies::Lanes;
use self::directory::{Directory, Holder, Lost};
use self::events::{Events, is_done};
use self::graves::{Graves, Mourned};
use self::instance::{HOME, Instance, Keeper};
use self::room::Room;
use self::slab::Slab;
use self::wants::group;
use crate::hash::QuickMap;
use crate::machine::{DeviceError, DeviceId, DevicePointer, Event, HOST, Machine, Stream};
use crate::region::Region;
use crate::sync::{Guard, Mutex, OnceLock, Ordering};

pub use storage::{Adopted, Storage};

/// What a task does with the elements of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// It reads.
    Read,
    /// It reads, and nothing orders it with those who write.
    Peek,
    /// It writes every element, and reads none.
    Write,
    /// It reads and writes.
    Update,
}

impl Touch {
    /// Whether it needs what is there.
    #[must_use]
    pub const fn reads(self) -> bool {
        !matches!(self, Self::Write)
    }

    /// Whether it changes elements.
    #[must_use]
    pub const fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Update)
    }
}

/// What a task wants of an array on one device.
#[derive(Clone, Copy, Debug)]
pub struct Want<'a> {
    /// Of which array.
    pub storage: &'a Arc<Storage>,
    /// Which elements; it may be empty.
    pub region: &'a Region,
    /// What it does with them.
    pub touch: Touch,
}

/// Where the elements of a want are: the one at the index `i` is `sum((i - origin) * strides)` bytes
/// behind the pointer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Where the element at `origin` is. An empty want has the address 0.
    pub pointer: DevicePointer,
    /// Bytes from one index of the array to the next, along each of its axes.
    pub strides: SmallVec<[u64; 4]>,
    /// An index of the array, no larger than those of the want along any axis.
    pub origin: SmallVec<[u64; 4]>,
}

/// Instances on one device that stay where they are for a task, from its plan to its launch. It is given
/// back by [`Store::launched`] or [`Store::abandon`].
#[must_use = "what is held stays pinned until it is given back"]
pub struct Held(Box<Hold>);

struct Hold {
    device: DeviceId,
    /// On which the task will run.
    stream: Option<Stream>,
    memory: u64,
    views: SmallVec<[Arc<View>; 3]>,
    wants: SmallVec<[Pinned; 3]>,
    /// The instances, each once.
    pins: SmallVec<[u32; 4]>,
    /// What it reads stays what it is as well, though it may not be the last version any more.
    guarded: bool,
}

impl Hold {
    /// Whether nobody else may change what the want has.
    fn keeps(&self, want: &Pinned) -> bool {
        want.touch.writes() || (self.guarded && want.touch == Touch::Read)
    }
}

/// A want that is held, and has bytes.
struct Pinned {
    /// Keeps it alive.
    storage: Arc<Storage>,
    /// None if it is the box of the frame.
    region: Option<Box<Region>>,
    touch: Touch,
    directory: u32,
    frame: u32,
    at: u32,
    /// What holds it is adopted memory, whose box is another one.
    adopted: bool,
}

impl Held {
    /// On which device.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.0.device
    }

    /// Where each want is, in the order in which they were given.
    #[must_use]
    pub fn views(&self) -> &[Arc<View>] {
        &self.0.views
    }

    /// The same, for good.
    pub(crate) fn take_views(&mut self) -> SmallVec<[Arc<View>; 3]> {
        std::mem::take(&mut self.0.views)
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wants = self.0.wants.iter();
        let wants = wants.map(|it| (it.touch, &it.storage.label));
        f.debug_struct("Held")
            .field("device", &self.0.device)
            .field("wants", &wants.collect::<Vec<_>>())
            .field("memory", &self.0.memory)
            .finish_non_exhaustive()
    }
}

/// A copy that was enqueued, or an instance that was dropped.
#[derive(Clone, Debug)]
pub struct Moved {
    /// The number of the array.
    pub storage: u64,
    /// Which elements.
    pub region: Region,
    /// Where they were.
    pub from: DeviceId,
    /// Where they go; the host's number also where they are dropped.
    pub to: DeviceId,
    /// The box of the instance that they are copied from, or of the one that is dropped. The host's is
    /// the whole array.
    pub source: Region,
    /// The box of the instance that they are copied to; of one that is dropped, its own.
    pub target: Region,
    /// How many bytes go over the link; 0 if they are dropped, or the memory there was brought along by the
    /// array and the host never had them.
    pub bytes: u64,
    /// Complete when they are there. None: the instance is dropped, and its memory given back.
    pub event: Option<Event>,
    /// When it was enqueued.
    pub at: Instant,
}

/// How long it takes to bring data to where they are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// All of them. What comes over different links comes side by side.
    pub time: Duration,
    /// Those that the host has.
    pub from_host: Duration,
    /// How long links are busy with it, in sum.
    pub links: Duration,
}

/// Elements that nobody has any more.
pub(crate) struct Loss {
    /// The datum whose they are.
    pub(crate) owner: Weak<dyn Any + Send + Sync>,
    pub(crate) region: Region,
    pub(crate) why: DeviceError,
}

/// What a store has on a device, and did there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// The device.
    pub device: DeviceId,
    /// Bytes of the instances that are there.
    pub resident: u64,
    /// The most that there were at once.
    pub peak: u64,
    /// Instances that were dropped so that others have room.
    pub evictions: u64,
    /// Bytes that were copied home for that.
    pub written_back: u64,
}

/// Where the arrays of an engine are. See the module.
pub struct Store {
    machine: Arc<Machine>,
    state: Mutex<State>,
    graves: Arc<Graves>,
    observer: OnceLock<Observer>,
}

type Observer = Box<dyn Fn(&Moved) + Send + Sync>;

struct State {
    directories: Slab<Directory>,
    /// The number of each array's directory.
    names: QuickMap<u64, u32>,
    instances: Slab<Instance>,
    /// Of each accelerator.
    rooms: Vec<Room>,
    lanes: Lanes,
    /// It was found just now that nothing can be copied over some link.
    barred: bool,
    /// Whether any device was ever full.
    pressed: bool,
    /// Counts uses of instances.
    tick: u64,
    mourned: Vec<Mourned>,
    observed: bool,
    /// For the observer.
    told: Vec<Moved>,
}

impl Store {
    /// Everything is on the host.
    #[must_use]
    pub fn new(machine: Arc<Machine>) -> Self {
        let gpus = machine.gpus();
        let rooms = (0..gpus).map(|index| {
            let index = u16::try_from(index).expect("devices have short numbers");
            Room::new(&machine, DeviceId::gpu(index))
        });
        Self {
            state: Mutex::new(State {
                directories: Slab::new(),
                names: QuickMap::default(),
                instances: Slab::new(),
                rooms: rooms.collect(),
                lanes: Lanes::new(gpus),
                barred: false,
                pressed: false,
                tick: 0,
                mourned: Vec::new(),
                observed: false,
                told: Vec::new(),
            }),
            machine,
            graves: Arc::new(Graves::new()),
            observer: OnceLock::new(),
        }
    }

    /// Tells `observer` of each copy and each instance that is dropped from now on, with no lock held, on
    /// the thread that enqueued it, before the call returns.
    ///
    /// # Panics
    /// If there is one already.
    pub fn observe(&self, observer: Box<dyn Fn(&Moved) + Send + Sync>) {
        assert!(
            self.observer.set(observer).is_ok(),
            "a store has one observer"
        );
        self.state.lock().observed = true;
    }

    /// Does something under the lock, and what is to be done without it afterwards.
    #[inline]
    fn change<R>(&self, call: impl FnOnce(&mut State, &Machine) -> R) -> R {
        let mut state: Guard<'_, State> = self.state.lock();
        let free = self.mourn(&mut state);
        let result = call(&mut state, &self.machine);
        if free.is_empty() && state.told.is_empty() {
            return result;
        }
        let told = std::mem::take(&mut state.told);
        drop(state);
        drop(free);
        if let Some(observer) = self.observer.get() {
            told.iter().for_each(observer);
        }
        result
    }

    /// How many bytes the instances of a task take on one device, if none of them is there: on this one, or
    /// on any. Memory that arrays brought along is none of the store's.
    #[must_use]
    pub fn footprint(&self, wants: &[Want<'_>], device: Option<DeviceId>) -> u64 {
        let groups = group(wants).groups;
        let is_taken = |group: &&wants::Group<'_>| {
            let adopted = group.storage.adopted.as_ref();
            device.is_none() || adopted.map(|own| own.pointer.device) != device
        };
        let bytes = groups.iter().filter(is_taken).map(wants::Group::bytes);
        bytes.fold(0, u64::saturating_add)
    }

    /// How long it takes to bring what is not there.
    #[must_use]
    pub fn missing(&self, wants: &[Want<'_>], device: DeviceId) -> Missing {
        let mut sources: SmallVec<[(DeviceId, u64); 4]> = SmallVec::new();
        let mut add = |from, bytes| match sources.iter_mut().find(|it| it.0 == from) {
            Some((_, sum)) => *sum += bytes,
            None => sources.push((from, bytes)),
        };
        let wants::Groups { groups, of } = group(wants);
        let state = self.state.lock();
        for (want, group) in wants.iter().zip(of) {
            if let Some(group) = group
                && want.touch.reads()
            {
                let hull = &groups[group as usize].hull;
                state.missing(&self.machine, want, hull, device, &mut add);
            }
        }
        drop(state);
        let description = self.machine.description();
        let time = |(from, bytes)| match description.transfer_time(from, device, bytes) {
            Some(time) => time,
            None => [(from, HOST), (HOST, device)]
                .iter()
                .filter_map(|(from, to)| description.transfer_time(*from, *to, bytes))
                .sum(),
        };
        let mut missing = Missing::default();
        for source in sources {
            let took = time(source);
            missing.time = missing.time.max(took);
            missing.links += took;
            if source.0 == HOST {
                missing.from_host += took;
            }
        }
        missing
    }

    /// A task that will want this was spawned, as number so many.
    pub fn announce(&self, number: u64, wants: &[Want<'_>]) {
        let groups = group(wants).groups;
        self.change(|state, machine| {
            for group in &groups {
                let directory = state.directory(machine, group.storage, &self.graves);
                let frame = state.directories[directory].frame(&group.hull);
                state.want(number, directory, frame);
            }
        });
    }

    /// The task is planned, or given up. What was announced is given again.
    pub fn retract(&self, number: u64, wants: &[Want<'_>]) {
        let groups = group(wants).groups;
        self.change(|state, _| {
            for group in &groups {
                let Some(directory) = state.known(group.storage) else {
                    continue;
                };
                let Some(frame) = state.directories[directory].find(&group.hull) else {
                    continue;
                };
                state.unwant(number, directory, frame);
                state.directories[directory].tidy(frame);
            }
        });
    }

    /// Finds or makes instances for a task that is about to run on the stream, and pins them; enqueues
    /// the copies that they need, and has the stream wait for all that they wait for. It retracts what was
    /// announced for `number` with the same regions. `memory`: what the body will allocate, for
    /// which there is room from then on until it is launched.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if there is no room beside what is pinned; [`DeviceError::Lost`];
    /// what else a device refuses. Then nothing is pinned.
    pub fn ensure(
        &self,
        number: u64,
        stream: Stream,
        wants: &[Want<'_>],
        memory: u64,
    ) -> Result<Held, DeviceError> {
        self.with_held(stream.device, wants, memory, |state, machine, mut held| {
            let ready = state.ready(machine, stream, &mut held);
            for want in &held.wants {
                state.unwant(number, want.directory, want.frame);
            }
            match ready {
                Ok(()) => Ok(Held(held)),
                Err(error) => {
                    state.release(&mut held);
                    Err(error)
                }
            }
        })
    }

    /// Holds what is wanted on a device, and calls `call` with it. Where elements are about to come from the
    /// host's memory of an array for the first time, that is prepared for copies before, with no lock held,
    /// since it may take a while. What is on devices alone takes no such time; if it goes home for want of
    /// room, that is a copy from or to memory like any other's, and a slow one.
    #[inline]
    fn with_held<R>(
        &self,
        device: DeviceId,
        wants: &[Want<'_>],
        memory: u64,
        mut call: impl FnMut(&mut State, &Machine, Box<Hold>) -> Result<R, DeviceError>,
    ) -> Result<R, DeviceError> {
        loop {
            let outcome = self.change(|state, machine| {
                let mut held = state.hold(machine, device, wants, memory, &self.graves)?;
                if let Some(storage) = state.unprepared(machine, &held) {
                    state.release(&mut held);
                    return Ok(Err(storage));
                }
                call(state, machine, held).map(Ok)
            })?;
            match outcome {
                Ok(result) => return Ok(result),
                Err(storage) => storage.prepare(self.machine.device(device)),
            }
        }
    }

    /// A task has enqueued its work, on all devices of its set: with the event behind it on each, or
    /// none if it enqueued nothing. What it wrote is valid there alone, behind the event; equal regions
    /// that several of its members wrote are equal copies. Also for a task that failed once its body had
    /// begun: what it was to write is then whatever is there.
    pub fn launched(&self, members: impl IntoIterator<Item = (Held, Option<Event>)>) {
        let mut members: SmallVec<[_; 2]> = members.into_iter().collect();
        // Their storages go when no lock is held.
        self.change(|state, machine| {
            let mut written: SmallVec<[(u32, u32); 4]> = SmallVec::new();
            for (held, event) in &mut members {
                let before = written.len();
                for want in &held.0.wants {
                    state.used(machine, want, *event, before, &mut written);
                }
                state.release(&mut held.0);
            }
        });
    }

    /// Other members of the set write on the host, from now on, what this one reads: until it is launched it
    /// finds what was there before.
    pub fn guard(&self, held: &mut Held) {
        let Held(held) = held;
        let Some(stream) = held.stream else { return };
        self.change(|state, _| {
            held.guarded = true;
            for want in held.wants.iter().filter(|it| it.touch == Touch::Read) {
                state.keep(stream, want);
            }
        });
    }

    /// A task's body never began.
    pub fn abandon(&self, mut held: Held) {
        self.change(|state, _| state.release(&mut held.0));
    }

    /// Brings home what a task of the host wants, whose predecessors are complete. It may begin when the
    /// events are; what it writes is the host's from now on.
    ///
    /// # Errors
    /// [`DeviceError::Lost`] if it reads what nobody has any more.
    pub fn ensure_host(&self, wants: &[Want<'_>]) -> Result<SmallVec<[Event; 2]>, DeviceError> {
        if !wants.iter().any(|want| want.storage.is_scattered()) {
            return Ok(SmallVec::new());
        }
        for want in wants {
            let storage = want.storage;
            if want.touch.reads() && storage.is_scattered() && storage.is_unprepared(HOST) {
                let own = storage.adopted.as_ref();
                let device = own.map_or(DeviceId::gpu(0), |own| own.pointer.device);
                storage.prepare(self.machine.device(device));
            }
        }
        self.change(|state, machine| {
            let mut behind = Events::new();
            let wants = wants.iter().filter(|want| !want.region.is_empty());
            for want in wants.clone().filter(|want| want.storage.adopted.is_some()) {
                state.directory(machine, want.storage, &self.graves);
            }
            for want in wants.clone().filter(|want| want.touch.reads()) {
                state.fetch_home(machine, want, &mut behind)?;
            }
            for want in wants.filter(|want| want.touch.writes()) {
                state.write_home(machine, want, &mut behind);
            }
            Ok(behind.unmet(machine))
        })
    }

    /// Brings elements to a device, where they stay until their room is needed, or to the host. They are
    /// there when the events are complete.
    ///
    /// # Errors
    /// As [`ensure`](Self::ensure).
    pub fn prefetch(
        &self,
        storage: &Arc<Storage>,
        region: &Region,
        device: DeviceId,
    ) -> Result<SmallVec<[Event; 2]>, DeviceError> {
        let touch = Touch::Read;
        let wants = [Want {
            storage,
            region,
            touch,
        }];
        if device == HOST {
            return self.ensure_host(&wants);
        }
        self.with_held(device, &wants, 0, |state, machine, mut held| {
            let mut behind = Events::new();
            let brought = held.wants.iter().try_for_each(|want| {
                let frame = Some(want.frame);
                state.bring(machine, want.directory, frame, region, want.at, &mut behind)
            });
            state.release(&mut held);
            brought?;
            Ok(behind.unmet(machine))
        })
    }

    /// Drops the instances with elements of the region on the device that nobody has pinned. Gives the
    /// events of what is copied home for that.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub fn evict(
        &self,
        storage: &Arc<Storage>,
        region: &Region,
        device: DeviceId,
    ) -> Result<SmallVec<[Event; 2]>, DeviceError> {
        self.change(|state, machine| {
            let Some(directory) = state.known(storage) else {
                return Ok(SmallVec::new());
            };
            let mut homeward = Events::new();
            for frame in state.directories[directory].frames_at(region) {
                let frames = &state.directories[directory].frames;
                let Some(at) = frames[frame].instance(device) else {
                    continue;
                };
                let instance = &state.instances[at];
                if instance.pins == 0 && !instance.adopted {
                    state.drop_instance(machine, at, &mut homeward)?;
                }
            }
            Ok(homeward.unmet(machine))
        })
    }

    /// Brings the last version of an array to the memory of a device that it brought along. Its owner may use
    /// that when the events are complete. What nobody has any more stays there as it is.
    pub fn return_memory(&self, storage: &Arc<Storage>) -> SmallVec<[Event; 2]> {
        self.change(|state, machine| {
            let mut behind = Events::new();
            if let Some(directory) = state.known(storage) {
                state.return_to_owner(machine, directory, &mut behind);
            }
            behind.unmet(machine)
        })
    }

    /// A device was lost: what was there alone is gone.
    pub fn lose(&self, device: DeviceId) {
        self.change(|state, _| state.lose(device));
    }

    /// Copies home what is elsewhere alone, and drops all instances but those that are held by tasks that
    /// come to nothing. When the events are complete, or failed, the host has all that could be had, and
    /// nothing of it is in use any more.
    #[must_use]
    pub fn come_home(&self) -> Vec<Event> {
        self.change(|state, machine| {
            let mut events = Events::new();
            state.give_all_back(machine);
            let all = state.instances.iter().map(|(at, it)| (it.pins, at));
            let mut all: Vec<(u32, u32)> = all.collect();
            // What is held has to come home if whoever else has it is dropped.
            all.sort_unstable();
            for (_, at) in all {
                // Its device may have been found lost meanwhile.
                let instance = state.instances.get(at);
                let Some(instance) = instance.filter(|it| it.dead.is_none() && !it.adopted) else {
                    continue;
                };
                let device = instance.device;
                let came = match instance.pins {
                    0 => state.drop_instance(machine, at, &mut events),
                    _ => state.send_home(machine, at).map(drop),
                };
                // What cannot be had is lost with its device.
                if let Err(DeviceError::Lost(..)) = came {
                    state.lose(device);
                }
            }
            for (_, directory) in state.directories.iter() {
                for (_, piece) in directory.pieces.iter() {
                    events.join(&piece.home);
                    events.join(&piece.own);
                    piece
                        .holders
                        .iter()
                        .for_each(|holder| events.join(&holder.ready));
                }
            }
            for mourned in &state.mourned {
                events.join(&mourned.until);
            }
            for room in 0..state.rooms.len() {
                if let Some(event) = state.last_return(machine, room) {
                    events.add(event);
                }
            }
            events.iter().collect()
        })
    }

    /// What nobody has any more when all came home: whose it was, and why it is lost. From then on the store
    /// takes whatever the host has there for it: who knows of tasks sees to it that nobody reads it.
    pub(crate) fn take_losses(&self) -> Vec<Loss> {
        self.change(|state, machine| {
            let mut losses = Vec::new();
            let all: Vec<u32> = state.directories.iter().map(|(number, _)| number).collect();
            for number in all {
                let pieces = state.directories[number].pieces.iter();
                let pieces: Vec<u32> = pieces.map(|(piece, _)| piece).collect();
                for piece in pieces {
                    state.settle(machine, number, piece);
                    let known = &state.directories[number];
                    if !known.pieces[piece].holders.is_empty() {
                        continue;
                    }
                    if let Some(owner) = &known.owner {
                        losses.push(Loss {
                            owner: Weak::clone(owner),
                            region: known.pieces[piece].region.clone(),
                            why: state.lost(number, piece),
                        });
                    }
                    let piece = &mut state.directories[number].pieces[piece];
                    piece.lost = None;
                    piece.holders.push(Holder {
                        at: HOME,
                        ready: Events::new(),
                    });
                }
            }
            losses
        })
    }

    /// Whose are the arrays that brought memory of a device along.
    pub(crate) fn adopting(&self) -> Vec<Weak<dyn Any + Send + Sync>> {
        let state = self.state.lock();
        let all = state.directories.iter().filter(|it| it.1.adopts);
        all.filter_map(|it| it.1.owner.clone()).collect()
    }

    /// Whether there is an instance at this place.
    #[must_use]
    pub fn has(&self, pointer: DevicePointer) -> bool {
        let state = self.state.lock();
        let mut instances = state.instances.iter();
        instances.any(|(_, it)| {
            let first = it.view.pointer;
            let directory = &state.directories[it.directory];
            let bytes = directory.bytes(&directory.frames[it.frame].region);
            it.dead.is_none()
                && first.device == pointer.device
                && (first.address..first.address + bytes).contains(&pointer.address)
        })
    }

    /// Of each device, in the order of their numbers.
    #[must_use]
    pub fn counters(&self) -> Vec<Counters> {
        let state = self.state.lock();
        let counters = state.rooms.iter().map(|room| Counters {
            device: room.device,
            resident: room.resident,
            peak: room.peak,
            evictions: room.evictions,
            written_back: room.written_back,
        });
        counters.collect()
    }
}

impl State {
    /// The number of an array's directory, if it has one.
    #[inline]
    fn known(&self, storage: &Storage) -> Option<u32> {
        let hint = storage.hint.load(Ordering::Relaxed);
        if let Some(directory) = self.directories.get(hint)
            && directory.storage == storage.id
        {
            return Some(hint);
        }
        let number = self.names.get(&storage.id).copied()?;
        storage.hint.store(number, Ordering::Relaxed);
        Some(number)
    }

    /// The number of an array's directory.
    #[inline]
    fn directory(&mut self, machine: &Machine, storage: &Storage, graves: &Arc<Graves>) -> u32 {
        self.known(storage).unwrap_or_else(|| {
            storage.attach(graves);
            let number = self.directories.insert(Directory::new(storage));
            self.names.insert(storage.id, number);
            storage.hint.store(number, Ordering::Relaxed);
            if let Some(adopted) = &storage.adopted {
                self.adopt(machine, number, adopted);
            }
            number
        })
    }

    /// All elements of an array are in memory of a device that it brought along.
    #[cold]
    fn adopt(&mut self, machine: &Machine, directory: u32, adopted: &Adopted) {
        let device = adopted.pointer.device;
        let known = &mut self.directories[directory];
        let Some((piece, _)) = known.pieces.iter().next() else {
            return;
        };
        let whole = known.whole.clone();
        let frame = known.frame(&whole);
        let view = Arc::new(View {
            pointer: adopted.pointer,
            strides: known.strides.clone(),
            origin: SmallVec::from_elem(0, whole.spans().len()),
        });
        known.pieces[piece].holders.clear();
        let behind = match self.await_owner(machine, adopted) {
            Ok(event) => event,
            // No call on the device is answered in another way from now on.
            Err(_) => {
                self.directories[directory].pieces[piece].lost = Some(Lost::Device(device));
                return;
            }
        };
        let at = self.instances.insert(Instance {
            device,
            directory,
            frame,
            view,
            bytes: 0,
            adopted: true,
            pins: 0,
            keepers: SmallVec::new(),
            valid: 1,
            born: Events::new(),
            uses: Events::new(),
            tick: self.tick,
            rank: None,
            dead: None,
        });
        let known = &mut self.directories[directory];
        known.own = Some(at);
        known.frames[frame].instances.push((device, at));
        known.pieces[piece].holders.push(Holder {
            at,
            ready: Events::of(Some(behind)),
        });
        if self.observed {
            self.told.push(Moved {
                storage: self.directories[directory].storage,
                region: whole.clone(),
                from: HOST,
                to: device,
                source: whole.clone(),
                target: whole,
                bytes: 0,
                event: Some(behind),
                at: Instant::now(),
            });
        }
    }

    /// What is enqueued behind the event comes after all that the owner of adopted memory had enqueued.
    fn await_owner(&mut self, machine: &Machine, adopted: &Adopted) -> Result<Event, DeviceError> {
        let device = adopted.pointer.device;
        let stream = match self.room(device).visitors {
            Some(stream) => stream,
            None => {
                let stream = self.lanes.create(machine, device)?;
                *self.room(device).visitors.insert(stream)
            }
        };
        let device = machine.device(device);
        device.follow_foreign(stream, &adopted.behind)?;
        device.record(stream)
    }

    fn missing(
        &self,
        machine: &Machine,
        want: &Want<'_>,
        hull: &Region,
        device: DeviceId,
        add: &mut impl FnMut(DeviceId, u64),
    ) {
        let Some(number) = self.known(want.storage) else {
            let adopted = want.storage.adopted.as_ref();
            let from = adopted.map_or(HOST, |own| own.pointer.device);
            if device != from {
                add(from, want.region.elements() * want.storage.item);
            }
            return;
        };
        let directory = &self.directories[number];
        let frame = directory.find(hull);
        let own = directory
            .own
            .filter(|at| self.instances[*at].device == device);
        let there = match frame {
            _ if device == HOST => Some(HOME),
            _ if own.is_some() => own,
            Some(frame) => directory.frames[frame].instance(device),
            None => None,
        };
        for piece in directory.overlapping(want.region) {
            let piece = &directory.pieces[piece];
            if there.is_some_and(|at| piece.holder(at).is_some()) {
                continue;
            }
            let bytes = directory.bytes(&piece.region.intersection(want.region));
            let holders = piece.holders.iter().map(|holder| self.device_of(holder.at));
            let near = holders
                .filter_map(|from| Some((self.lanes.time(machine, from, device, bytes)?, from)))
                .min();
            match (near, piece.holders.first()) {
                (Some((_, from)), _) => add(from, bytes),
                (None, Some(holder)) => add(self.device_of(holder.at), bytes),
                (None, None) => {}
            }
        }
    }

    /// Finds or makes the instances, and pins them.
    fn hold(
        &mut self,
        machine: &Machine,
        device: DeviceId,
        wants: &[Want<'_>],
        memory: u64,
        graves: &Arc<Graves>,
    ) -> Result<Box<Hold>, DeviceError> {
        let wants::Groups { groups, of } = group(wants);
        let mut held = Box::new(Hold {
            device,
            stream: None,
            memory: 0,
            views: SmallVec::new(),
            wants: SmallVec::new(),
            pins: SmallVec::new(),
            guarded: false,
        });
        let mut places: SmallVec<[(u32, u32, Option<u32>); 4]> = SmallVec::new();
        let mut need = memory;
        let mut sizes: SmallVec<[u64; 4]> = SmallVec::new();
        for group in &groups {
            group.storage.scatter();
            let directory = self.directory(machine, group.storage, graves);
            let frame = self.directories[directory].frame(&group.hull);
            let known = &self.directories[directory];
            let own = known.own.filter(|at| self.instances[*at].device == device);
            let at = own.or_else(|| known.frames[frame].instance(device));
            match at {
                Some(at) => {
                    self.pin(at);
                    held.pins.push(at);
                }
                None => {
                    sizes.push(group.bytes());
                    need = need.saturating_add(group.bytes());
                }
            }
            places.push((directory, frame, at));
        }
        if need > 0
            && let Err(error) =
                self.take(machine, device, need, memory, sizes, &mut places, &mut held)
        {
            self.release(&mut held);
            for (directory, frame, _) in places {
                self.directories[directory].tidy(frame);
            }
            return Err(error);
        }
        for (want, group) in wants.iter().zip(of) {
            let Some(group) = group else {
                let axes = want.region.spans().len();
                held.views.push(Arc::new(View {
                    pointer: DevicePointer { device, address: 0 },
                    strides: want.storage.strides.clone(),
                    origin: SmallVec::from_elem(0, axes),
                }));
                continue;
            };
            let (directory, frame, at) = places[group as usize];
            let at = at.expect("it was made");
            let instance = &self.instances[at];
            let adopted = instance.adopted;
            if adopted {
                self.directories[directory].frames[frame].pins += 1;
            }
            held.views.push(Arc::clone(&instance.view));
            held.wants.push(Pinned {
                storage: Arc::clone(want.storage),
                region: (adopted || *groups[group as usize].hull != *want.region)
                    .then(|| Box::new(want.region.clone())),
                touch: want.touch,
                directory,
                frame,
                at,
                adopted,
            });
        }
        Ok(held)
    }

    /// Makes room for instances that are not there and for a body, and makes them.
    #[cold]
    #[allow(clippy::too_many_arguments, reason = "a part of `hold`")]
    fn take(
        &mut self,
        machine: &Machine,
        device: DeviceId,
        need: u64,
        memory: u64,
        mut sizes: SmallVec<[u64; 4]>,
        places: &mut [(u32, u32, Option<u32>)],
        held: &mut Hold,
    ) -> Result<(), DeviceError> {
        let mut spare = SmallVec::new();
        let mut result = self.make_room(machine, device, need, &mut sizes, &mut spare);
        if result.is_ok() {
            self.room(device).promised += memory;
            held.memory = memory;
            for (directory, frame, place) in places {
                if place.is_none() {
                    match self.make(machine, *directory, *frame, device, &mut spare) {
                        Ok(at) => {
                            *place = Some(at);
                            held.pins.push(at);
                        }
                        Err(error) => {
                            result = Err(error);
                            break;
                        }
                    }
                }
            }
        }
        for block in spare {
            self.give_back(machine, block);
        }
        result
    }

    fn region_of<'a>(&'a self, want: &'a Pinned) -> &'a Region {
        let frames = &self.directories[want.directory].frames;
        want.region
            .as_deref()
            .unwrap_or_else(|| &frames[want.frame].region)
    }

    /// Whether what a want needs is there, and no copy is under way that it had to wait for.
    #[inline]
    fn is_ready(&self, want: &Pinned) -> bool {
        let directory = &self.directories[want.directory];
        let Some((_, piece)) = directory.exact(want.frame, want.region.as_deref()) else {
            return false;
        };
        let has_copies = |events: &Events| self.lanes.copies(events).next().is_some();
        let instance = &self.instances[want.at];
        let uses = instance.uses_of(piece);
        let is_there = match piece.holder(want.at) {
            Some(holder) => !has_copies(&holder.ready),
            None => !want.touch.reads(),
        };
        is_there && instance.born.is_empty() && !(want.touch.writes() && has_copies(uses))
    }

    /// An array of which something that is held comes from the host's memory, where that is not prepared yet.
    #[inline]
    fn unprepared(&mut self, machine: &Machine, held: &Hold) -> Option<Arc<Storage>> {
        let device = held.device;
        let want = held.wants.iter().find(|want| {
            want.touch.reads()
                && want.storage.is_unprepared(device)
                && !self.is_ready(want)
                && self.comes_from_home(machine, want)
        })?;
        Some(Arc::clone(&want.storage))
    }

    #[cold]
    fn comes_from_home(&mut self, machine: &Machine, want: &Pinned) -> bool {
        let (known, device) = (want.directory, self.device_of(want.at));
        let region = self.region_of(want).clone();
        let directory = &mut self.directories[known];
        let numbers = directory.cover(&region, Some(want.frame), &mut self.instances);
        numbers.iter().any(|&number| {
            let piece = &self.directories[known].pieces[number];
            piece.holder(want.at).is_none()
                && self
                    .source(machine, known, number, device)
                    .is_none_or(|from| from == HOME)
        })
    }

    /// Brings what is read, and has the stream wait for what it has to.
    fn ready(
        &mut self,
        machine: &Machine,
        stream: Stream,
        held: &mut Hold,
    ) -> Result<(), DeviceError> {
        held.stream = Some(stream);
        for want in held.wants.iter().filter(|want| want.touch.writes()) {
            self.keep(stream, want);
        }
        let (mut copies, mut users) = (Events::new(), Events::new());
        for want in &held.wants {
            if self.is_ready(want) {
                continue;
            }
            let Pinned { directory, at, .. } = *want;
            let frame = Some(want.frame);
            let region = self.region_of(want).clone();
            if want.touch == Touch::Peek {
                for part in self.unkept(&region, at, stream) {
                    let frame = frame.filter(|_| part == region);
                    self.bring(machine, directory, frame, &part, at, &mut copies)?;
                }
                self.doubt(directory, frame, &region, at);
            } else if want.touch.reads() {
                self.bring(machine, directory, frame, &region, at, &mut copies)?;
            }
            let instance = &mut self.instances[at];
            let adopted = instance.adopted;
            if !instance.born.is_empty() {
                instance.born.prune(machine);
                users.join(&instance.born);
            }
            if want.touch.writes() {
                // Copies from it, and copies to it of what was there.
                let mut add =
                    |events: &Events| self.lanes.copies(events).for_each(|it| users.add(it));
                add(&instance.uses);
                let directory = &mut self.directories[directory];
                let numbers = directory.cover(&region, frame, &mut self.instances);
                for number in numbers {
                    let piece = &directory.pieces[number];
                    if adopted {
                        add(&piece.own);
                    }
                    if let Some(holder) = piece.holder(at) {
                        add(&holder.ready);
                    }
                }
            }
        }
        if copies.is_empty() && users.is_empty() {
            return Ok(());
        }
        self.put_behind(machine, stream, &copies, &users)
    }

    /// Nobody else changes what the want has before it is launched.
    #[inline]
    fn keep(&mut self, stream: Stream, want: &Pinned) {
        let region = want.region.clone();
        self.instances[want.at]
            .keepers
            .push(Keeper { stream, region });
    }

    /// The parts of a region of an instance that nobody keeps but who has this stream, and is behind all that
    /// is brought for it.
    fn unkept(&self, region: &Region, at: u32, stream: Stream) -> Vec<Region> {
        let mut parts = vec![region.clone()];
        let keepers = self.instances[at].keepers.iter();
        for keeper in keepers.filter(|it| it.stream != stream) {
            let Some(kept) = &keeper.region else {
                return Vec::new();
            };
            let cut = parts.iter().flat_map(|part| part.difference(kept));
            parts = cut.collect();
        }
        parts
    }

    /// What was brought from home by somebody whom nothing orders with those who write there is good for nobody
    /// else: a task of the host may be writing it. The host has it alone then.
    #[cold]
    fn doubt(&mut self, directory: u32, frame: Option<u32>, region: &Region, at: u32) {
        let known = &mut self.directories[directory];
        for number in known.cover(region, frame, &mut self.instances) {
            let piece = &mut known.pieces[number];
            let holders = &mut piece.holders;
            if holders.iter().all(|it| it.at == at || it.at == HOME)
                && holders.iter().any(|it| it.at == HOME)
                && let Some(place) = holders.iter().position(|it| it.at == at)
            {
                let holder = holders.remove(place);
                let instance = &mut self.instances[at];
                instance.uses_of_mut(piece).join(&holder.ready);
                instance.valid -= 1;
            }
        }
    }

    /// A task that held this has enqueued its work. `written`: what members of its set wrote, those of
    /// other members first, `others` of them.
    #[inline]
    fn used(
        &mut self,
        machine: &Machine,
        want: &Pinned,
        event: Option<Event>,
        others: usize,
        written: &mut SmallVec<[(u32, u32); 4]>,
    ) {
        let Pinned { directory, at, .. } = *want;
        let instance = &mut self.instances[at];
        if let Some(frame) = &instance.dead {
            if want.touch.writes() && event.is_some_and(|it| is_done(machine, it)) {
                let region = want.region.as_ref().unwrap_or(frame).clone();
                let device = instance.device;
                self.wrote_in_vain(directory, &region, device, &written[..others]);
            }
            return;
        }
        if !want.touch.writes() {
            let Some(event) = event else { return };
            let add = |uses: &mut Events| {
                uses.add(event);
                if uses.len() >= 8 && uses.len().is_power_of_two() {
                    uses.prune(machine);
                }
            };
            if !instance.adopted {
                return add(&mut instance.uses);
            }
            let region = self.region_of(want).clone();
            let known = &mut self.directories[directory];
            for number in known.cover(&region, Some(want.frame), &mut self.instances) {
                add(&mut known.pieces[number].own);
            }
            return;
        }
        let known = &mut self.directories[directory];
        let exact = known.exact(want.frame, want.region.as_deref());
        let exact = exact.map(|(piece, _)| piece);
        let frames = &known.frames;
        let region = want.region.as_deref();
        let region = region.unwrap_or_else(|| &frames[want.frame].region);
        let equal = known.written_alike(directory, region, &written[..others]);
        let holder = Holder {
            at,
            ready: Events::of(event),
        };
        match (equal, exact) {
            // Another member wrote the same.
            (Some(piece), _) => {
                known.pieces[piece].holders.push(holder);
                self.instances[at].valid += 1;
            }
            // It was there alone before.
            (None, Some(piece)) if matches!(&*known.pieces[piece].holders, [own] if own.at == at) =>
            {
                let known = &mut known.pieces[piece];
                let before = std::mem::replace(&mut known.holders[0], holder);
                let instance = &mut self.instances[at];
                instance.uses_of_mut(known).join(&before.ready);
                written.push((directory, piece));
            }
            _ => {
                let region = self.region_of(want).clone();
                self.write(directory, Some(want.frame), &region, holder, written);
            }
        }
    }

    /// What a task wrote was lost with the device before the task was launched. It is none of those that fail
    /// by that, so that what others have is out of date. But for the other members that wrote the same.
    #[cold]
    fn wrote_in_vain(
        &mut self,
        directory: u32,
        region: &Region,
        device: DeviceId,
        others: &[(u32, u32)],
    ) {
        let known = &self.directories[directory];
        if known.written_alike(directory, region, others).is_none() {
            let piece = self.claim(directory, None, region);
            self.directories[directory].pieces[piece].lost = Some(Lost::Device(device));
        }
    }

    /// A region is valid with this holder alone.
    fn write(
        &mut self,
        directory: u32,
        frame: Option<u32>,
        region: &Region,
        holder: Holder,
        written: &mut SmallVec<[(u32, u32); 4]>,
    ) {
        let piece = self.claim(directory, frame, region);
        if holder.at != HOME {
            self.instances[holder.at].valid += 1;
        }
        self.directories[directory].pieces[piece]
            .holders
            .push(holder);
        written.push((directory, piece));
    }

    /// Makes one piece of a region, which nobody has.
    fn claim(&mut self, directory: u32, frame: Option<u32>, region: &Region) -> u32 {
        let mut emptied: SmallVec<[u32; 4]> = SmallVec::new();
        let known = &mut self.directories[directory];
        let piece = known.claim(region, frame, &mut self.instances, |instances, holder| {
            let instance = &mut instances[holder.at];
            instance.valid -= 1;
            if !instance.adopted {
                instance.uses.join(&holder.ready);
            }
            if instance.valid == 0 {
                emptied.push(holder.at);
            }
        });
        if self.pressed {
            emptied.into_iter().for_each(|at| self.rerank(at));
        }
        piece
    }

    /// Gives back what is held.
    #[inline]
    fn release(&mut self, held: &mut Hold) {
        if let Some(stream) = held.stream {
            for want in held.wants.iter().filter(|want| held.keeps(want)) {
                let keepers = &mut self.instances[want.at].keepers;
                let region = want.region.as_deref();
                let is_own = |it: &Keeper| it.stream == stream && it.region.as_deref() == region;
                let place = keepers.iter().position(is_own);
                keepers.swap_remove(place.expect("it was entered"));
            }
        }
        for want in held.wants.iter().filter(|want| want.adopted) {
            let directory = &mut self.directories[want.directory];
            directory.frames[want.frame].pins -= 1;
            directory.tidy(want.frame);
        }
        for at in held.pins.drain(..) {
            self.unpin(at);
        }
        self.room(held.device).promised -= std::mem::take(&mut held.memory);
    }

    /// Brings home what a task of the host reads.
    fn fetch_home(
        &mut self,
        machine: &Machine,
        want: &Want<'_>,
        behind: &mut Events,
    ) -> Result<(), DeviceError> {
        let Some(directory) = self.known(want.storage) else {
            return Ok(());
        };
        let frame = self.directories[directory].find(want.region);
        self.bring(machine, directory, frame, want.region, HOME, behind)
    }

    /// What a task of the host writes is there alone, when nothing uses the host's buffer any more.
    fn write_home(&mut self, machine: &Machine, want: &Want<'_>, behind: &mut Events) {
        let Some(directory) = self.known(want.storage) else {
            return;
        };
        let frame = self.directories[directory].find(want.region);
        let holder = Holder {
            at: HOME,
            ready: Events::new(),
        };
        let mut written = SmallVec::new();
        self.write(directory, frame, want.region, holder, &mut written);
        let (_, piece) = written[0];
        let piece = &mut self.directories[directory].pieces[piece];
        // They stay on the list: it may be that nobody waits for them after all.
        piece.home.prune(machine);
        behind.join(&piece.home);
    }

    /// Brings the last version of an array to the memory that it brought along, as far as anybody has it.
    /// Nothing happens if that is not there any more.
    fn return_to_owner(&mut self, machine: &Machine, directory: u32, behind: &mut Events) {
        let Some(own) = self.directories[directory].own else {
            return;
        };
        let pieces: Vec<u32> = self.directories[directory]
            .pieces
            .iter()
            .map(|it| it.0)
            .collect();
        for piece in pieces {
            // To bring one may have made one of several.
            let known = &self.directories[directory];
            let Some(known) = known.pieces.get(piece).filter(|it| !it.holders.is_empty()) else {
                continue;
            };
            let region = known.region.clone();
            let brought = self.bring(machine, directory, None, &region, own, behind);
            // What else cannot be had stays there as it is.
            if let Err(DeviceError::Lost(device, _)) = brought {
                self.lose(device);
                if self.directories[directory].own.is_none() {
                    return;
                }
            }
        }
    }

    /// All arrays that brought memory along are there again. What cannot be had is lost.
    fn give_all_back(&mut self, machine: &Machine) {
        let adopting = self.directories.iter().filter(|it| it.1.own.is_some());
        let adopting: Vec<u32> = adopting.map(|it| it.0).collect();
        for directory in adopting {
            self.return_to_owner(machine, directory, &mut Events::new());
        }
    }

    /// Drops an instance that nobody has pinned, and gives its memory back.
    fn drop_instance(
        &mut self,
        machine: &Machine,
        at: u32,
        homeward: &mut Events,
    ) -> Result<(), DeviceError> {
        let directory = self.instances[at].directory;
        let region = self.frame_of(directory, at).clone();
        let (block, written) = self.evict(machine, at)?;
        self.give_back(machine, block);
        if written > 0 {
            for number in self.directories[directory].overlapping(&region) {
                if let Some(holder) = self.directories[directory].pieces[number].holder(HOME) {
                    homeward.join(&holder.ready);
                }
            }
        }
        Ok(())
    }

    /// A device was lost.
    fn lose(&mut self, device: DeviceId) {
        self.lanes.lose(device);
        self.empty(device);
        let mut gone: Vec<u32> = Vec::new();
        for (at, instance) in self.instances.iter_mut() {
            if instance.device == device && instance.dead.is_none() {
                let frame = &self.directories[instance.directory].frames[instance.frame];
                instance.dead = Some(Box::new(frame.region.clone()));
                instance.rank = None;
                gone.push(at);
            }
        }
        for (_, directory) in self.directories.iter_mut() {
            for (_, piece) in directory.pieces.iter_mut() {
                let before = piece.holders.len();
                let here = |at: u32| at != HOME && self.instances[at].device == device;
                piece.holders.retain(|holder| !here(holder.at));
                if piece.holders.is_empty() && before > 0 {
                    piece.lost = Some(Lost::Device(device));
                }
            }
        }
        for at in gone {
            let Instance {
                directory, frame, ..
            } = self.instances[at];
            let known = &mut self.directories[directory];
            known.own = known.own.filter(|own| *own != at);
            known.frames[frame]
                .instances
                .retain(|(_, other)| *other != at);
            known.tidy(frame);
            if self.instances[at].pins == 0 {
                self.instances.remove(at);
            }
        }
    }
}

impl Drop for Store {
    /// What may be in use by copies is left to them: whoever closed the machine did not wait for
    /// [`come_home`](Store::come_home).
    fn drop(&mut self) {
        let mut state = self.state.lock();
        let free = self.mourn(&mut state);
        let left = std::mem::take(&mut state.mourned);
        drop(state);
        drop(free);
        for mourned in left {
            std::mem::forget(mourned);
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}
