//! The virtual GPU: a device of the machine's interface in host memory.
//!
//! # What it is
//!
//! Streams in order, side by side, events, memory of its own, links that take their time: what the
//! runtime relies on is there and is kept, so that what is wrong on a GPU goes wrong here.
//!
//! * An *operation* ([`VirtualGpu::enqueue`]) is a closure that runs in stream order on a thread that
//!   stands for the device. [`VirtualGpu::busy`] occupies a stream for a time, as a kernel would.
//! * Memory has addresses that mean nothing to the host. The bytes are there for operations of the
//!   device, and of those that have peer access ([`VirtualGpu::bytes`]); all others must copy. They
//!   hold a pattern until they are written.
//! * A copy takes what its link takes, and the bytes move when that time is up. A link carries one
//!   copy at a time in each direction, in the order in which the streams get to them.
//! * Faults are injected: a copy fails, a device is lost, an event is late.
//!
//! In [virtual time](super::Time::Virtual) the same happens on a clock that moves when it is told to
//! ([`Clock::advance`]): an operation takes no time, a pause what it says, a copy what its link takes.
//! What is due first happens first, and of equals what was enqueued first, so that a program that
//! enqueues the same sees the same. A `synchronize` moves the clock as far as it has to.
//!
//! # Failure
//!
//! An operation that returns an error, or panics, and a copy that fails, fail the position that they
//! are at, and *the stream is done for*: all behind it is dropped without being run, and each of its
//! events from there on tells the first error. So an event says the same whenever it is asked. What
//! others rely on behind a failure takes place all the same: memory is given back, and waits are waited
//! for, so that an event, failed or not, is complete no sooner than what its stream was told to wait
//! for. Other streams go on, but for those that wait for a failed event. Whoever
//! saw a stream fail takes a new one.
//!
//! A device that is lost ends all its streams at once, waits and all, except that what is running
//! then ends first, since it may be using memory that somebody waits to have back. An event that was
//! complete before stays so.
//!
//! # How it works
//!
//! A position is the number of entries enqueued on its stream so far. `timeline` has two counters
//! for each stream, of what is enqueued and of what is done, which are read without a lock: to record
//! an event, to ask for it or to wait for a complete one is a load or two, and allocates nothing.
//!
//! `state` has all else, for all devices, under one lock of the machine. The head of a stream is one
//! of four things: it waits for an event, and is then among those whom that event's stream tells when
//! it gets there, whatever its device; or it is due at some time, and is then in the one heap of what
//! is due; or it is being run, with no lock held; or there is none. A completion goes from stream to
//! stream under the one lock, so that a wait across devices holds one lock and not two, and cannot
//! miss the completion that it waits for: to look and to be put on the list is one section, to
//! complete and to read the list another.
//!
//! That lock is a leaf. Completions, operations, observers and destructors run after it is unlocked,
//! from the outbox that was filled under it.
//!
//! `crew` drives the state: threads in real time, whoever advances the clock in virtual time. Each
//! entry starts at the time when the one before it ended *by the clock of the device*, not when a
//! thread woke up late to notice, so that delays of the host do not add up along a stream.

mod crew;
mod memory;
mod state;
mod timeline;

#[cfg(all(test, loom))]
mod loom_models;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use self::crew::{Core, nanoseconds};
use self::memory::Buffer;
use self::state::{LATE, LOST, Shared, Stamp, Work, unknown};
use self::timeline::{Timeline, Timelines};
use super::description::Description;
use super::device::{
    Completion, Device, DeviceError, DeviceId, DeviceInfo, DevicePointer, Event, Foreign, HOST,
    Mark, Operation, Stream, Traffic,
};
use super::observer::{Enqueued, Observed, Observers};
use super::strided::Strided;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// What a device has seen since the machine was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Streams created.
    pub streams: u64,
    /// Operations enqueued, pauses ([`VirtualGpu::busy`]) among them.
    pub operations: u64,
    /// Copies enqueued on this device, by link, in order of (from, to).
    pub traffic: Vec<Traffic>,
    /// Waits of its streams for events of another stream.
    pub stream_waits: u64,
    /// Calls of `synchronize` that had to block.
    pub host_synchronisations: u64,
}

/// Memory of a device, as the device sees it.
///
/// It is there for as long as this is, whatever becomes of the allocation. As on any device, nothing
/// but the order of streams keeps others from writing to it.
pub struct DeviceBytes {
    buffer: Arc<Buffer>,
    offset: u64,
    bytes: u64,
}

impl DeviceBytes {
    /// Its first byte; [`len`](Self::len) are valid.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.buffer.at(self.offset)
    }

    /// How many bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes as usize // it is in the memory of this process
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

/// Work of somebody else.
struct Visitor {
    core: Arc<Core>,
    device: DeviceId,
    behind: Option<Event>,
}

/// A GPU in host memory. See the module.
pub struct VirtualGpu {
    core: Arc<Core>,
    id: DeviceId,
}

impl VirtualGpu {
    fn shared(&self) -> &Shared {
        &self.core.shared[usize::from(self.id.index())]
    }

    fn is(&self, status: u32) -> bool {
        self.shared().status.load(Ordering::Relaxed) & status != 0
    }

    fn lost(&self) -> DeviceError {
        let lost = self.core.read(|state| state.lost(self.id));
        lost.expect("its status says that it is lost")
    }

    /// That the stream is one of this device, which is there.
    fn check(&self, stream: Stream) -> Result<(), DeviceError> {
        if stream.device != self.id {
            return Err(DeviceError::NoAccess(self.id, stream.device));
        }
        if self.is(LOST) {
            return Err(self.lost());
        }
        Ok(())
    }

    /// Runs the operation in stream order, on a thread that stands for the device; in virtual time on
    /// the one that moves the clock. It may wait for events of other streams, never for those behind
    /// itself.
    ///
    /// # Errors
    /// [`DeviceError::Lost`]; [`DeviceError::NoAccess`] if the stream is another device's.
    pub fn enqueue(&self, stream: Stream, operation: Operation) -> Result<(), DeviceError> {
        self.put(stream, Work::Operation(operation))
    }

    /// Occupies the stream for so long, in its order.
    ///
    /// # Errors
    /// As [`enqueue`](Self::enqueue).
    pub fn busy(&self, stream: Stream, duration: Duration) -> Result<(), DeviceError> {
        self.put(stream, Work::Busy(nanoseconds(duration)))
    }

    fn put_wait(&self, stream: Stream, event: Event, inherits: bool) -> Result<(), DeviceError> {
        self.check(stream)?;
        // What is behind the event on its own stream comes after it in any case. Of what is complete
        // only a failure matters, which then has its place on the stream.
        let passed = match self.core.query(event) {
            Err(error) if !self.core.recorded(event) => return Err(error),
            complete => complete == Ok(true) || (!inherits && complete != Ok(false)),
        };
        if event.stream == stream {
            return Ok(());
        }
        self.shared().stream_waits.fetch_add(1, Ordering::Relaxed);
        let from = if passed {
            // The stream is told nothing: it is the host that saw it.
            self.core.observers.tell(Observed::Seen(event));
            self.core.timeline(stream).map_or(0, Timeline::tail) + 1
        } else {
            let wait = Work::Wait { event, inherits };
            let enqueue = |state: &mut state::State, now| state.enqueue(stream, wait, now);
            self.core.change(enqueue)?.position
        };
        self.core.observers.tell(Observed::Waits {
            stream,
            from,
            event,
        });
        Ok(())
    }

    fn put(&self, stream: Stream, work: Work) -> Result<(), DeviceError> {
        self.check(stream)?;
        let kind = match work {
            Work::Busy(_) => Enqueued::Busy,
            _ => Enqueued::Operation,
        };
        let enqueue = |state: &mut state::State, now| state.enqueue(stream, work, now);
        let event = self.core.change(enqueue)?;
        self.core.observers.tell(Observed::Enqueued(event, kind));
        Ok(())
    }

    /// The bytes behind an address, for an operation of this device that is running on this thread.
    ///
    /// # Errors
    /// [`DeviceError::NoAccess`] for any other code, which is the host's ([`HOST`]), and for memory
    /// of a device to which peer access is not enabled; [`DeviceError::BadAddress`];
    /// [`DeviceError::Lost`].
    pub fn bytes(&self, pointer: DevicePointer, bytes: u64) -> Result<DeviceBytes, DeviceError> {
        if !self.core.computes(self.id) {
            return Err(DeviceError::NoAccess(HOST, pointer.device));
        }
        let find = |state: &state::State| state.find(self.id, pointer, bytes, true);
        let (buffer, offset) = self.core.read(find)?;
        Ok(DeviceBytes {
            buffer,
            offset,
            bytes,
        })
    }

    /// Whether the other one is a device of the same machine.
    #[must_use]
    pub fn same_machine(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.core, &other.core)
    }

    /// The work on this device up to an event, or none, for whoever takes over memory of it that was allocated
    /// here.
    #[must_use]
    pub fn foreign(&self, behind: Option<Event>) -> Foreign {
        Foreign(Arc::new(Visitor {
            core: Arc::clone(&self.core),
            device: self.id,
            behind,
        }))
    }

    fn visitor<'a>(&self, foreign: &'a Foreign) -> Option<&'a Visitor> {
        let visitor = foreign.0.downcast_ref::<Visitor>()?;
        let is_here = visitor.device == self.id && Arc::ptr_eq(&visitor.core, &self.core);
        is_here.then_some(visitor)
    }

    /// Whether it may reach the memory of the other: see [`enable_peer`](Device::enable_peer).
    #[must_use]
    pub fn has_peer(&self, peer: DeviceId) -> bool {
        self.core.read(|state| state.has_peer(self.id, peer))
    }

    /// What it has seen so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let (streams, operations, traffic) = self.core.read(|state| state.counters(self.id));
        let shared = self.shared();
        Counters {
            streams,
            operations,
            traffic,
            stream_waits: shared.stream_waits.load(Ordering::Relaxed),
            host_synchronisations: shared.host_synchronisations.load(Ordering::Relaxed),
        }
    }

    /// Injects a fault: of the copies enqueued on this device from now on, the `nth` (the first is 1)
    /// fails when its time is up.
    ///
    /// # Panics
    /// If `nth` is 0.
    pub fn fail_copy(&self, nth: u64) {
        assert!(nth > 0, "the first copy is number 1");
        self.core.change(|state, _| state.fail_copy(self.id, nth));
    }

    /// Injects a fault: the device is lost, now. Completions of its events are called by this thread.
    pub fn lose(&self, why: &str) {
        self.core
            .change(|state, _| state.lose(self.id, &why.into()));
    }

    /// Injects a fault: the device is lost when it has run that many more operations and copies and
    /// the next is due.
    pub fn lose_after(&self, operations: u64, why: &str) {
        self.core
            .change(|state, _| state.lose_after(self.id, operations, why.into()));
    }

    /// Injects a fault: the next event recorded on the device completes so much later.
    pub fn delay_event(&self, delay: Duration) {
        self.core
            .change(|state, _| state.delay_event(self.id, nanoseconds(delay)));
    }
}

impl Device for VirtualGpu {
    fn info(&self) -> &DeviceInfo {
        &self.shared().info
    }

    fn create_stream(&self) -> Result<Stream, DeviceError> {
        let stream = self.core.change(|state, _| state.create_stream(self.id))?;
        self.core.observers.tell(Observed::Created(stream));
        Ok(stream)
    }

    #[inline]
    fn record(&self, stream: Stream) -> Result<Event, DeviceError> {
        self.check(stream)?;
        let event = if self.is(LATE) {
            let record = |state: &mut state::State, now| state.record_late(stream, now);
            self.core.change(record)?
        } else {
            let none = Event {
                stream,
                position: 0,
            };
            let timeline = self.core.timeline(stream).ok_or_else(|| unknown(none))?;
            Event {
                stream,
                position: timeline.tail(),
            }
        };
        self.core.observers.tell(Observed::Recorded(event));
        Ok(event)
    }

    fn mark(&self, stream: Stream) -> Result<Mark, DeviceError> {
        self.check(stream)?;
        let stamp = Arc::new(Stamp::new());
        let work = Work::Mark(Arc::clone(&stamp));
        let enqueue = |state: &mut state::State, now| state.enqueue(stream, work, now);
        let event = self.core.change(enqueue)?;
        let observed = Observed::Enqueued(event, Enqueued::Mark);
        self.core.observers.tell(observed);
        Ok(Mark(stamp))
    }

    fn elapsed(&self, from: &Mark, to: &Mark) -> Option<Duration> {
        let time = |mark: &Mark| mark.0.downcast_ref::<Stamp>()?.time();
        Some(Duration::from_nanos(time(to)?.saturating_sub(time(from)?)))
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError> {
        self.put_wait(stream, event, true)
    }

    fn follow(&self, stream: Stream, event: Event) -> Result<(), DeviceError> {
        self.put_wait(stream, event, false)
    }

    fn knows(&self, foreign: &Foreign) -> bool {
        self.visitor(foreign).is_some()
    }

    fn follow_foreign(&self, stream: Stream, foreign: &Foreign) -> Result<(), DeviceError> {
        self.check(stream)?;
        let Some(visitor) = self.visitor(foreign) else {
            return Err(DeviceError::NoAccess(self.id, self.id));
        };
        let behind = visitor.behind;
        behind.map_or(Ok(()), |event| self.put_wait(stream, event, false))
    }

    #[inline]
    fn is_complete(&self, event: Event) -> Result<bool, DeviceError> {
        let complete = self.core.query(event);
        if complete != Ok(false) {
            self.core.observers.tell(Observed::Seen(event));
        }
        complete
    }

    fn synchronize(&self, event: Event) -> Result<(), DeviceError> {
        let blocked = &self.shared().host_synchronisations;
        let (result, has_blocked) = self.core.synchronize(event, blocked);
        self.core.observers.tell(if has_blocked {
            Observed::Synchronised(event)
        } else {
            Observed::Seen(event)
        });
        result
    }

    fn when_complete(&self, event: Event, call: Completion) {
        self.core.when_complete(event, call);
    }

    fn allocate(&self, bytes: u64, stream: Stream) -> Result<DevicePointer, DeviceError> {
        self.check(stream)?;
        let reserve = |state: &mut state::State, now| state.reserve(bytes, stream, now);
        let address = self.core.change(reserve)?;
        let buffer = Buffer::new(bytes);
        self.core
            .change(|state, _| state.provide(self.id, address, buffer))?;
        Ok(DevicePointer {
            device: self.id,
            address,
        })
    }

    fn free(&self, pointer: DevicePointer, stream: Stream) -> Result<(), DeviceError> {
        self.check(stream)?;
        if pointer.device != self.id {
            return Err(DeviceError::NoAccess(self.id, pointer.device));
        }
        let free = |state: &mut state::State, now| state.free(pointer, stream, now);
        if let Some(event) = self.core.change(free)? {
            let freed = Observed::Enqueued(event, Enqueued::Free);
            self.core.observers.tell(freed);
        }
        Ok(())
    }

    fn free_memory(&self) -> u64 {
        self.core.read(|state| state.free_memory(self.id))
    }

    // SAFETY: the caller's duties are the trait's: the addresses of host memory are used when the copy
    // is due, by `Transfer::run`, and those of devices are looked up in their address spaces.
    unsafe fn copy(
        &self,
        from: DevicePointer,
        to: DevicePointer,
        bytes: u64,
        stream: Stream,
    ) -> Result<(), DeviceError> {
        // SAFETY: as the caller says.
        unsafe { self.copy_strided(from, &[], to, &[], &[], bytes, stream) }
    }

    // SAFETY: as for `copy`.
    unsafe fn copy_strided(
        &self,
        from: DevicePointer,
        from_strides: &[u64],
        to: DevicePointer,
        to_strides: &[u64],
        extents: &[u64],
        item: u64,
        stream: Stream,
    ) -> Result<(), DeviceError> {
        self.check(stream)?;
        let shape = Strided::new(from_strides, to_strides, extents, item)
            .ok_or(DeviceError::BadAddress(from, u64::MAX))?;
        let copy = |state: &mut state::State, now| state.copy(from, to, shape, stream, now);
        let event = self.core.change(copy)?;
        let copied = Observed::Enqueued(event, Enqueued::Copy);
        self.core.observers.tell(copied);
        Ok(())
    }

    // SAFETY: nothing is done with the memory.
    unsafe fn register_host(&self, _address: u64, _bytes: u64) -> Result<bool, DeviceError> {
        if self.is(LOST) {
            return Err(self.lost());
        }
        Ok(false)
    }

    fn unregister_host(&self, _address: u64) {}

    fn enable_peer(&self, peer: DeviceId) -> Result<(), DeviceError> {
        self.core
            .change(|state, _| state.enable_peer(self.id, peer))
    }

    fn handle(&self, _stream: Stream) -> Option<usize> {
        None
    }

    fn make_current(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Its machine's devices have one end.
    fn close(&self) {
        self.core.close();
    }
}

impl fmt::Debug for VirtualGpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VirtualGpu").field(self.info()).finish()
    }
}

/// The clock of a virtual machine.
pub struct Clock {
    core: Arc<Core>,
}

impl Clock {
    /// Nanoseconds since the machine was made.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.core.now()
    }

    /// In virtual time, does the next thing that is due on the machine, on this thread, and calls the
    /// completions that it causes; of things due at the same time what was enqueued first. `false` if
    /// nothing is due until something is enqueued, and always in real time, which goes by on its own.
    pub fn advance(&self) -> bool {
        self.core.advance()
    }

    /// In virtual time, whether anything is due at this moment.
    pub(crate) fn is_due(&self) -> bool {
        self.core.is_due()
    }

    pub(super) fn observers(&self) -> &Observers {
        &self.core.observers
    }

    pub(super) fn close(&self) {
        self.core.close();
    }
}

/// The devices of a machine and its clock.
pub(super) fn build(description: &Description) -> (Vec<Arc<VirtualGpu>>, Clock) {
    let shared = description
        .gpus()
        .iter()
        .zip(0..)
        .map(|(gpu, index)| Shared {
            info: DeviceInfo {
                id: DeviceId::gpu(index),
                name: gpu.name.clone(),
                memory: gpu.memory,
            },
            timelines: Timelines::new(),
            status: AtomicU32::new(0),
            stream_waits: AtomicU64::new(0),
            host_synchronisations: AtomicU64::new(0),
        })
        .collect();
    let core = Core::new(description, shared);
    let gpus = core
        .shared
        .iter()
        .map(|device| {
            Arc::new(VirtualGpu {
                core: Arc::clone(&core),
                id: device.info.id,
            })
        })
        .collect();
    (gpus, Clock { core })
}
