//! Copies of arrays on devices: where they are, how they come there, and when they go.

mod graves;
mod storage;

use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use crate::machine::{DeviceError, DeviceId, DevicePointer, Event, Machine, Stream};
use crate::region::Region;

pub use storage::Storage;

/// What a task does with the elements of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// It reads.
    Read,
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
        !matches!(self, Self::Read)
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
#[derive(Debug)]
pub struct Held {
    device: DeviceId,
    views: SmallVec<[View; 4]>,
}

impl Held {
    /// On which device.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// Where each want is, in the order in which they were given.
    #[must_use]
    pub fn views(&self) -> &[View] {
        &self.views
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
    /// How many bytes go over the link; 0 if they are dropped.
    pub bytes: u64,
    /// Complete when they are there. None: the instance is dropped, and its memory given back.
    pub event: Option<Event>,
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
    #[allow(dead_code, reason = "not yet there")]
    machine: Arc<Machine>,
}

impl Store {
    /// Everything is on the host.
    #[must_use]
    pub fn new(machine: Arc<Machine>) -> Self {
        Self { machine }
    }

    /// Tells `observer` of each copy and each instance that is dropped from now on, with no lock held, on
    /// the thread that enqueued it, before the call returns. One observer, set once.
    pub fn observe(&self, _observer: Box<dyn Fn(&Moved) + Send + Sync>) {
        todo!()
    }

    /// How many bytes the instances of a task take on one device, if none of them is there.
    #[must_use]
    pub fn footprint(&self, _wants: &[Want<'_>]) -> u64 {
        todo!()
    }

    /// How long it takes to bring what is not there, each link alone.
    #[must_use]
    pub fn missing(&self, _wants: &[Want<'_>], _device: DeviceId) -> Duration {
        todo!()
    }

    /// A task that will want this was spawned, as number so many.
    pub fn announce(&self, _number: u64, _wants: &[Want<'_>]) {
        todo!()
    }

    /// The task is planned, or given up. What was announced is given again.
    pub fn retract(&self, _number: u64, _wants: &[Want<'_>]) {
        todo!()
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
        _number: u64,
        _stream: Stream,
        _wants: &[Want<'_>],
        _memory: u64,
    ) -> Result<Held, DeviceError> {
        todo!()
    }

    /// A task has enqueued its work, on all devices of its set: with the event behind it on each, or
    /// none if it enqueued nothing. What it wrote is valid there alone, behind the event; equal regions
    /// that several of its members wrote are equal copies. Also for a task that failed once its body had
    /// begun: what it was to write is then whatever is there.
    pub fn launched(&self, _members: impl IntoIterator<Item = (Held, Option<Event>)>) {
        todo!()
    }

    /// A task's body never began.
    pub fn abandon(&self, _held: Held) {
        todo!()
    }

    /// Brings home what a task of the host wants, whose predecessors are complete. It may begin when the
    /// events are; what it writes is the host's from now on.
    ///
    /// # Errors
    /// [`DeviceError::Lost`] if it reads what was on a lost device alone.
    pub fn ensure_host(&self, _wants: &[Want<'_>]) -> Result<SmallVec<[Event; 2]>, DeviceError> {
        todo!()
    }

    /// Brings elements to a device, where they stay until their room is needed. They are there when the
    /// events are complete.
    ///
    /// # Errors
    /// As [`ensure`](Self::ensure).
    pub fn prefetch(
        &self,
        _storage: &Arc<Storage>,
        _region: &Region,
        _device: DeviceId,
    ) -> Result<SmallVec<[Event; 2]>, DeviceError> {
        todo!()
    }

    /// Drops the instances with elements of the region on the device that nobody has pinned. Gives the
    /// events of what is copied home for that.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub fn evict(
        &self,
        _storage: &Arc<Storage>,
        _region: &Region,
        _device: DeviceId,
    ) -> Result<SmallVec<[Event; 2]>, DeviceError> {
        todo!()
    }

    /// A device was lost: what was there alone is gone.
    pub fn lose(&self, _device: DeviceId) {
        todo!()
    }

    /// Copies home what is elsewhere alone, and drops all instances. When the events are complete, or
    /// failed, the host has all that could be had, and nothing of it is in use any more.
    #[must_use]
    pub fn come_home(&self) -> Vec<Event> {
        todo!()
    }

    /// Of each device, in the order of their numbers.
    #[must_use]
    pub fn counters(&self) -> Vec<Counters> {
        todo!()
    }
}
