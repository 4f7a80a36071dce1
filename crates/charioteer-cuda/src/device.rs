//! [`CudaGpu`]: the machine's interface on the driver.
//!
//! # Devices, contexts, streams
//!
//! Devices are those that the driver numbers, in its order, so that `CUDA_VISIBLE_DEVICES` and numbers
//! mean what they mean to every other library of the process. A device's primary context is made when
//! its first stream is, since it takes the driver a while and memory of the device: a program that runs
//! on cores alone does not pay for GPUs that are there. Access to a peer is given when both contexts
//! are there.
//!
//! A machine's streams are its own while it is open, and go back to the context's pool when it is
//! closed, if nothing is in flight on them.
//!
//! # Loss
//!
//! An error of a kernel is the context's: the driver answers every call with it from then on, in all
//! libraries, until the process ends. So whoever meets one marks the device lost. That must not call
//! back from a call that may not, so the completions that come of it are called by the thread that
//! slept for one, or by one that is made for that.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use charioteer::machine::{
    Completion, Device, DeviceError, DeviceId, DeviceInfo, DevicePointer, Enqueued, Event, Foreign,
    HOST, Mark, Observed, Observers, Stream, Strided, Traffic, together,
};
use cudarc::driver::sys::CUresult;

use crate::batch::{self, Batches, Launch};
use crate::driver::{
    self, Answer, CUstream, Context, Fault, Found, Handle, Purpose, Recorded, Side, is_pinned,
};
use crate::foreign::Visitor;
use crate::pool;
use crate::staging::{PIECE, Staging};
use crate::timeline::{Lane, Reached, Timeline, Told};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the process has of the driver's, for as long as it lives.
#[derive(Default)]
pub(crate) struct Process {
    contexts: BTreeMap<u16, &'static Context>,
    /// Who is to reach whose memory.
    wishes: BTreeSet<(u16, u16)>,
}

static PROCESS: Mutex<Process> = Mutex::new(Process {
    contexts: BTreeMap::new(),
    wishes: BTreeSet::new(),
});

impl Process {
    /// The context of a device, if it was made.
    pub(crate) fn known(ordinal: u16) -> Option<&'static Context> {
        lock(&PROCESS).contexts.get(&ordinal).copied()
    }

    /// The context of a device, which is made if it is not there.
    pub(crate) fn context(ordinal: u16) -> Answer<&'static Context> {
        let mut process = lock(&PROCESS);
        if let Some(context) = process.contexts.get(&ordinal) {
            return Ok(context);
        }
        let context: &'static Context = Box::leak(Box::new(Context::retain(ordinal)?));
        process.contexts.insert(ordinal, context);
        let wishes = process.wishes.clone();
        for (from, to) in wishes {
            if from == ordinal || to == ordinal {
                process.grant(from, to);
            }
        }
        Ok(context)
    }

    /// Gives access if both contexts are there. The driver may refuse it, for it gives it to few at
    /// once: then whoever tries to reach the peer hears that there is none.
    fn grant(&mut self, from: u16, to: u16) {
        if let (Some(own), Some(peer)) = (self.contexts.get(&from), self.contexts.get(&to))
            && own.reach(peer, from).is_err()
        {
            self.wishes.remove(&(from, to));
        }
    }

    /// What runs on one device is to reach the memory of the other.
    pub(crate) fn wish(from: u16, to: u16) {
        let mut process = lock(&PROCESS);
        if process.wishes.insert((from, to)) {
            process.grant(from, to);
        }
    }

    fn may_reach(from: u16, to: u16) -> bool {
        lock(&PROCESS).wishes.contains(&(from, to))
    }
}

/// What a device has seen since the machine was opened. What other libraries enqueue or wait for is
/// not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Streams taken.
    pub streams: u64,
    /// Copies enqueued on this device, by link, in order of (from, to).
    pub traffic: Vec<Traffic>,
    /// Waits of its streams for events of another stream that were not complete.
    pub stream_waits: u64,
    /// Calls of `synchronize` that had to block.
    pub host_synchronisations: u64,
    /// Graphs that were launched instead of kernels one by one.
    pub graphs: u64,
    /// How often a thread slept until an event was complete, to tell of it.
    pub notifications: u64,
    /// Bytes of its pool that libraries have now, see [`pool`].
    pub library_memory: u64,
}

/// The devices of one machine.
pub(crate) struct Fleet {
    gpus: Vec<Gpu>,
    observers: Arc<Observers>,
}

struct Gpu {
    info: DeviceInfo,
    ordinal: u16,
    capability: (u32, u32),
    /// Whose memory it can reach.
    peers: Vec<u16>,
    context: OnceLock<&'static Context>,
    /// Of its streams, by their numbers: every task looks for some.
    timelines: boxcar::Vec<Arc<Timeline<CudaLane>>>,
    /// Of a machine that is closed: it has no streams any more.
    closed: AtomicBool,
    /// Why it is lost.
    lost: OnceLock<Arc<str>>,
    /// The bytes of each allocation, by address.
    allocations: Mutex<HashMap<u64, u64>>,
    staging: Staging,
    /// Who is to be told when it is lost.
    mourners: Mutex<Vec<Mourner>>,
    traffic: Mutex<BTreeMap<(DeviceId, DeviceId), (u64, u64)>>,
    streams: AtomicU64,
    stream_waits: AtomicU64,
    host_synchronisations: AtomicU64,
}

/// A stream of the driver's.
pub(crate) struct CudaLane {
    pub(crate) context: &'static Context,
    pub(crate) stream: Handle<CUstream>,
    batches: Mutex<Batches>,
    fleet: Weak<Fleet>,
    index: usize,
    number: u32,
}

/// How many completions are told of before what follows from them goes on: nobody is to wait for many.
const TOGETHER: usize = 16;

impl Lane for CudaLane {
    type Event = Recorded;
    type Fault = Fault;
    type Call = Completion;
    type Launch = Launch;
    const MOST: usize = batch::MOST;

    #[inline]
    fn is_idle(&self) -> Answer<bool> {
        self.context.is_idle(self.stream)
    }

    #[inline]
    fn record(&self, sleeps: bool) -> Answer<Recorded> {
        self.context.record(self.stream, Purpose::of(sleeps))
    }

    #[inline]
    fn event(&self, sleeps: bool) -> Answer<Recorded> {
        let _entered = self.context.enter()?;
        self.context.event(Purpose::of(sleeps))
    }

    fn submit(&self, launches: &[batch::Entry]) -> Answer<()> {
        let mut batches = lock(&self.batches);
        // SAFETY: the duty of whoever put them off.
        unsafe { batches.submit(self.context, self.stream, launches) }
    }

    #[inline]
    fn may_sleep(&self, event: &Recorded) -> bool {
        event.may_sleep()
    }

    #[inline]
    fn is_done(&self, event: &Recorded) -> Answer<bool> {
        event.is_done()
    }

    fn block(&self, event: &Recorded) -> Answer<()> {
        event.block()
    }

    fn tell(&self, told: Vec<Told<Completion>>) {
        let fleet = self.fleet.upgrade();
        let gpu = fleet.as_ref().map(|fleet| &fleet.gpus[self.index]);
        let device = DeviceId::gpu(u16::try_from(self.index).expect("as many as the machine's"));
        let stream = Stream {
            device,
            number: self.number,
        };
        let tell = |told: Told<Completion>| {
            if let Some(fleet) = &fleet {
                let position = told.position;
                fleet
                    .observers
                    .tell(Observed::Seen(Event { stream, position }));
            }
            (told.call)(if told.done {
                Ok(())
            } else {
                Err(lost_event(device, gpu))
            });
        };
        if told.len() == 1 {
            return told.into_iter().for_each(tell);
        }
        let mut told = told.into_iter();
        while told.len() != 0 {
            together(|| told.by_ref().take(TOGETHER).for_each(tell));
        }
    }

    fn failed(&self, fault: Fault) {
        if let Some(fleet) = self.fleet.upgrade() {
            fleet.gpus[self.index].lose(&fault.to_string().into());
        }
    }

    fn refused(&self, fault: Fault) {
        if let Some(fleet) = self.fleet.upgrade() {
            lose_apart(&fleet, self.index, &fault.to_string().into());
        }
    }
}

impl Gpu {
    /// All that is not complete fails, and whoever waits for it is told by this thread.
    fn lose(&self, why: &Arc<str>) {
        let _ = self.lost.set(Arc::clone(why));
        for (_, timeline) in &self.timelines {
            timeline.fail();
        }
        let mourners = std::mem::take(&mut *lock(&self.mourners));
        if !mourners.is_empty() {
            mourn(move || mourners.into_iter().for_each(|call| call()));
        }
    }
}

/// The same by another thread, if the device is not lost yet: the caller may hold locks, and must not be called
/// back.
fn lose_apart(fleet: &Arc<Fleet>, index: usize, why: &Arc<str>) {
    if fleet.gpus[index].lost.set(Arc::clone(why)).is_ok() {
        let (fleet, why) = (Arc::clone(fleet), Arc::clone(why));
        mourn(move || fleet.gpus[index].lose(&why));
    }
}

type Mourner = Box<dyn FnOnce() + Send>;

/// Calls on a thread of its own, since whoever finds a device lost may hold locks.
fn mourn(call: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new()
        .name("charioteer-cuda".into())
        .spawn(call)
        .expect("the system refuses a thread to tell of a lost device");
}

/// Why an event of a device is lost; `None` for a machine that nobody has any more.
fn lost_event(id: DeviceId, gpu: Option<&Gpu>) -> DeviceError {
    match gpu.map(|gpu| gpu.lost.get()) {
        Some(Some(why)) => DeviceError::Lost(id, Arc::clone(why)),
        Some(None) => DeviceError::Operation(id, "nobody recorded the event".into()),
        None => DeviceError::Lost(id, "the machine is closed".into()),
    }
}

/// What a pointer is to the driver; host memory is pinned.
fn side(pointer: DevicePointer) -> Side {
    Side {
        address: pointer.address,
        is_host: pointer.device == HOST,
    }
}

/// Copies the runs of a box within the host's memory.
///
/// # Safety
/// They are valid at both addresses, and do not overlap.
unsafe fn move_runs(shape: &Strided, from: usize, to: usize) {
    let run = shape.run as usize;
    shape.each(&mut |source, target| {
        let source = ptr::with_exposed_provenance::<u8>(from + source as usize);
        let target = ptr::with_exposed_provenance_mut::<u8>(to + target as usize);
        // SAFETY: as the caller says.
        unsafe { ptr::copy_nonoverlapping(source, target, run) };
    });
}

/// Whether an error concerns what was asked for alone, and leaves the device as it is.
fn is_harmless(fault: Fault) -> bool {
    // Of a stream that somebody captures.
    (900..=908).contains(&(fault.0 as u32))
}

/// A GPU of the CUDA driver. See the module.
pub struct CudaGpu {
    fleet: Arc<Fleet>,
    index: usize,
}

impl CudaGpu {
    fn gpu(&self) -> &Gpu {
        &self.fleet.gpus[self.index]
    }

    pub(crate) fn id(&self) -> DeviceId {
        self.gpu().info.id
    }

    /// Its number with the driver.
    #[must_use]
    pub fn ordinal(&self) -> usize {
        self.gpu().ordinal.into()
    }

    /// Its compute capability: major and minor.
    #[must_use]
    pub fn capability(&self) -> (u32, u32) {
        self.gpu().capability
    }

    fn lost(&self, why: &Arc<str>) -> DeviceError {
        DeviceError::Lost(self.id(), Arc::clone(why))
    }

    /// What the driver's answer means: an error that is no answer to what was asked is the device's end.
    pub(crate) fn answer<T>(&self, answer: Answer<T>) -> Result<T, DeviceError> {
        answer.map_err(|fault| {
            if is_harmless(fault) {
                return DeviceError::Operation(self.id(), fault.to_string().into());
            }
            let why: Arc<str> = fault.to_string().into();
            lose_apart(&self.fleet, self.index, &why);
            self.lost(self.gpu().lost.get().unwrap_or(&why))
        })
    }

    fn check(&self) -> Result<(), DeviceError> {
        match self.gpu().lost.get() {
            Some(why) => Err(self.lost(why)),
            None => Ok(()),
        }
    }

    fn context(&self) -> Result<&'static Context, DeviceError> {
        let gpu = self.gpu();
        if let Some(context) = gpu.context.get() {
            return Ok(context);
        }
        let context = self.answer(Process::context(gpu.ordinal))?;
        Ok(gpu.context.get_or_init(|| context))
    }

    /// The timeline of a stream of any device of the machine.
    #[inline]
    fn timeline(&self, stream: Stream) -> Result<&Arc<Timeline<CudaLane>>, DeviceError> {
        let index = usize::from(stream.device.index());
        let gpu = self
            .fleet
            .gpus
            .get(index)
            .ok_or(DeviceError::NoAccess(self.id(), stream.device))?;
        let found = gpu.timelines.get(stream.number as usize);
        let found = found.filter(|_| !gpu.closed.load(Ordering::Acquire));
        found.ok_or_else(|| {
            let why = gpu.lost.get().cloned();
            DeviceError::Lost(
                gpu.info.id,
                why.unwrap_or_else(|| "it has no such stream".into()),
            )
        })
    }

    /// The timeline of a stream of this device, which is there, to enqueue something: with nothing put off.
    #[inline]
    pub(crate) fn own(&self, stream: Stream) -> Result<&Arc<Timeline<CudaLane>>, DeviceError> {
        let timeline = self.own_behind(stream)?;
        self.answer(timeline.submit())?;
        Ok(timeline)
    }

    /// The same behind what is put off.
    #[inline]
    pub(crate) fn own_behind(
        &self,
        stream: Stream,
    ) -> Result<&Arc<Timeline<CudaLane>>, DeviceError> {
        if stream.device != self.id() {
            return Err(DeviceError::NoAccess(self.id(), stream.device));
        }
        self.check()?;
        self.timeline(stream)
    }

    fn sibling(&self, id: DeviceId) -> Self {
        Self {
            fleet: Arc::clone(&self.fleet),
            index: usize::from(id.index()),
        }
    }

    fn put_wait(&self, stream: Stream, event: Event, inherits: bool) -> Result<(), DeviceError> {
        let timeline = self.own_behind(stream)?;
        if event.stream == stream {
            return Ok(());
        }
        let other = match self.timeline(event.stream) {
            Ok(other) => other,
            Err(_) if !inherits => return Ok(()),
            Err(error) => return Err(error),
        };
        let observers = &self.fleet.observers;
        let reached = other.look(event.position).unwrap_or_else(|fault| {
            // What the event is behind could not be enqueued: the other device's end.
            let _ = self.sibling(event.stream.device).answer::<()>(Err(fault));
            Reached::Lost
        });
        let from = match reached {
            Reached::Done => {
                // The stream is told nothing: it is the host that saw it.
                observers.tell(Observed::Seen(event));
                timeline.tail() + 1
            }
            Reached::Pending(recorded) => {
                let lane = &timeline.lane;
                self.answer(timeline.submit())?;
                self.answer(lane.context.wait(lane.stream, &recorded))?;
                timeline.awaits(&recorded);
                self.gpu().stream_waits.fetch_add(1, Ordering::Relaxed);
                timeline.skip()
            }
            Reached::Lost if inherits => {
                return Err(self.sibling(event.stream.device).lost_event());
            }
            Reached::Lost => timeline.tail() + 1,
        };
        observers.tell(Observed::Waits {
            stream,
            from,
            event,
        });
        Ok(())
    }

    /// Why an event is lost.
    fn lost_event(&self) -> DeviceError {
        lost_event(self.id(), Some(self.gpu()))
    }

    /// The event that is recorded behind what was just enqueued.
    fn recorded(
        &self,
        timeline: &Timeline<CudaLane>,
        stream: Stream,
    ) -> Result<Event, DeviceError> {
        let (position, _) = self.answer(timeline.record())?;
        Ok(Event { stream, position })
    }

    fn check_reach(&self, pointer: DevicePointer) -> Result<(), DeviceError> {
        let id = self.id();
        let ordinal = |id: DeviceId| {
            self.fleet
                .gpus
                .get(usize::from(id.index()))
                .map(|it| it.ordinal)
        };
        if pointer.device == HOST || pointer.device == id {
            return Ok(());
        }
        match ordinal(pointer.device) {
            Some(peer) if Process::may_reach(self.gpu().ordinal, peer) => Ok(()),
            _ => Err(DeviceError::NoAccess(id, pointer.device)),
        }
    }

    fn count_copy(&self, from: DeviceId, to: DeviceId, bytes: u64) {
        let mut traffic = lock(&self.gpu().traffic);
        let (copies, moved) = traffic.entry((from, to)).or_default();
        *copies += 1;
        *moved += bytes;
    }

    /// What a copy's error means.
    fn copied(
        &self,
        answer: Answer<()>,
        pointer: DevicePointer,
        bytes: u64,
    ) -> Result<(), DeviceError> {
        match answer {
            Err(Fault(CUresult::CUDA_ERROR_INVALID_VALUE)) => {
                Err(DeviceError::BadAddress(pointer, bytes))
            }
            answer => self.answer(answer),
        }
    }

    /// Copies a box between pageable memory of the host and the device, piece by piece.
    ///
    /// # Safety
    /// As [`Device::copy_strided`].
    unsafe fn copy_staged(
        &self,
        timeline: &Arc<Timeline<CudaLane>>,
        from: DevicePointer,
        to: DevicePointer,
        shape: &Strided,
    ) -> Result<(), DeviceError> {
        shape.parts(PIECE as u64, &mut |part, from_offset, to_offset| {
            let (from, to) = (from.offset(from_offset), to.offset(to_offset));
            // SAFETY: as the caller says, of a part.
            unsafe { self.copy_part(timeline, from, to, part) }
        })
    }

    /// Copies what goes through one buffer.
    ///
    /// # Safety
    /// As [`Device::copy_strided`].
    unsafe fn copy_part(
        &self,
        timeline: &Arc<Timeline<CudaLane>>,
        from: DevicePointer,
        to: DevicePointer,
        part: &Strided,
    ) -> Result<(), DeviceError> {
        let CudaLane {
            context, stream, ..
        } = timeline.lane;
        let staging = &self.gpu().staging;
        let bytes = part.bytes();
        let buffer = self.answer(staging.take(context, bytes as usize))?;
        let staged = buffer.address() as usize;
        let middle = Side {
            address: staged as u64,
            is_host: true,
        };
        let (load, unload) = (part.packed_to(), part.packed_from());
        let copied = if from.device == HOST {
            let source = from.address as usize;
            // SAFETY: the caller's memory is valid until the copy is done; the buffer is as large and
            // nobody else's until then, by `put`.
            let take_in = move || unsafe { move_runs(&load, source, staged) };
            let taken = if self.answer(timeline.is_caught_up())? {
                take_in();
                Ok(())
            } else {
                self.answer(context.call(stream, Box::new(take_in)))
            };
            taken.and_then(|()| {
                // SAFETY: the buffer is in use until the copy is done, by `put`.
                let answer = unsafe { context.copy(middle, side(to), &unload, stream) };
                self.copied(answer, to, bytes)
            })
        } else {
            // SAFETY: as above.
            let answer = unsafe { context.copy(side(from), middle, &load, stream) };
            let target = to.address as usize;
            self.copied(answer, from, bytes).and_then(|()| {
                // SAFETY: the caller's memory is valid until this was called, in stream order
                // behind the copy into the buffer, which is in use until then.
                let take_out = move || unsafe { move_runs(&unload, staged, target) };
                self.answer(context.call(stream, Box::new(take_out)))
            })
        };
        let recorded = self.answer(timeline.record());
        match recorded {
            Ok((position, _)) => staging.put(buffer, timeline, position),
            // A copy may be under way.
            Err(_) => std::mem::forget(buffer),
        }
        copied?;
        recorded?;
        Ok(())
    }

    /// What it has seen.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let gpu = self.gpu();
        let traffic = lock(&gpu.traffic);
        let traffic = traffic
            .iter()
            .map(|(&(from, to), &(copies, bytes))| Traffic {
                from,
                to,
                copies,
                bytes,
            });
        Counters {
            streams: gpu.streams.load(Ordering::Relaxed),
            traffic: traffic.collect(),
            stream_waits: gpu.stream_waits.load(Ordering::Relaxed),
            host_synchronisations: gpu.host_synchronisations.load(Ordering::Relaxed),
            graphs: (gpu.timelines.iter())
                .map(|(_, it)| lock(&it.lane.batches).graphs())
                .sum(),
            notifications: (gpu.timelines.iter())
                .map(|(_, it)| it.notifications())
                .sum(),
            library_memory: pool::lent(gpu.ordinal),
        }
    }

    /// Has somebody called, by another thread, when the device is lost; now, if it is. Whoever closes the
    /// machine first is not called.
    pub fn when_lost(&self, call: Box<dyn FnOnce() + Send>) {
        let gpu = self.gpu();
        let mut mourners = lock(&gpu.mourners);
        // Whoever loses it says so, and then looks who is to be told.
        if gpu.lost.get().is_none() {
            mourners.push(call);
        } else if !gpu.closed.load(Ordering::Acquire) {
            drop(mourners);
            mourn(call);
        }
    }

    /// Whether nothing is left on the legacy default stream, which is no task's. Streams of others that
    /// synchronise with it may count.
    ///
    /// # Errors
    /// [`DeviceError::Lost`]; [`DeviceError::Operation`] while such a stream is captured.
    pub fn default_stream_is_idle(&self) -> Result<bool, DeviceError> {
        self.check()?;
        let context = self.context()?;
        self.answer(context.is_idle(driver::legacy_stream()))
    }

    /// Whether both are of one machine.
    #[must_use]
    pub fn same_machine(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.fleet, &other.fleet)
    }

    /// Copies `bytes` from or to the memory of another device, or the host's if it is [`HOST`], and
    /// says how many went over a second, and what an empty copy takes: the best of a few. It waits, on
    /// a stream of its own.
    ///
    /// # Errors
    /// [`DeviceError::NoAccess`] without access to the peer; [`DeviceError::OutOfMemory`];
    /// [`DeviceError::Lost`].
    pub fn measure(
        &self,
        other: DeviceId,
        inwards: bool,
        bytes: u64,
    ) -> Result<(f64, Duration), DeviceError> {
        const TRIES: usize = 4;
        let stream = self.create_stream()?;
        let context = self.context()?;
        let own = self.allocate(bytes, stream)?;
        let mut pinned = None;
        let peer = if other == HOST {
            let size = usize::try_from(bytes).expect("host memory has fewer bytes");
            let buffer = pinned.insert(self.answer(driver::Pinned::new(context, size))?);
            DevicePointer {
                device: HOST,
                address: buffer.address() as u64,
            }
        } else {
            let sibling = self.sibling(other);
            let there = sibling.create_stream()?;
            let memory = sibling.allocate(bytes, there)?;
            self.wait(stream, sibling.record(there)?)?;
            memory
        };
        let (from, to) = if inwards { (peer, own) } else { (own, peer) };
        let time = |bytes| -> Result<Duration, DeviceError> {
            let start = self.mark(stream)?;
            // SAFETY: the memory lives until the end of this function, which waits for the copy.
            unsafe { self.copy(from, to, bytes, stream) }?;
            let end = self.mark(stream)?;
            self.synchronize(self.record(stream)?)?;
            Ok(self.elapsed(&start, &end).unwrap_or(Duration::MAX))
        };
        let best = |bytes| {
            let times: Result<Vec<_>, _> = (0..TRIES).map(|_| time(bytes)).collect();
            Ok::<_, DeviceError>(times?.into_iter().min().unwrap_or(Duration::MAX))
        };
        let result = best(4).and_then(|latency| {
            let whole = best(bytes)?.saturating_sub(latency);
            #[allow(clippy::cast_precision_loss, reason = "far below what a clock tells")]
            Ok((bytes as f64 / whole.as_secs_f64().max(1e-9), latency))
        });
        self.free(own, stream)?;
        if other != HOST {
            let sibling = self.sibling(other);
            let there = sibling.create_stream()?;
            sibling.wait(there, self.record(stream)?)?;
            sibling.free(peer, there)?;
        }
        drop(pinned);
        result
    }
}

impl Device for CudaGpu {
    fn info(&self) -> &DeviceInfo {
        &self.gpu().info
    }

    fn create_stream(&self) -> Result<Stream, DeviceError> {
        self.check()?;
        let context = self.context()?;
        let stream = self.answer(context.stream())?;
        let gpu = self.gpu();
        let numbered = |number| u32::try_from(number).expect("fewer streams than 2^32");
        let number = numbered(gpu.timelines.push_with(|number| {
            Timeline::new(CudaLane {
                context,
                stream,
                batches: Mutex::default(),
                fleet: Arc::downgrade(&self.fleet),
                index: self.index,
                number: numbered(number),
            })
        }));
        gpu.streams.fetch_add(1, Ordering::Relaxed);
        let stream = Stream {
            device: self.id(),
            number,
        };
        self.fleet.observers.tell(Observed::Created(stream));
        Ok(stream)
    }

    #[inline]
    fn record(&self, stream: Stream) -> Result<Event, DeviceError> {
        let timeline = self.own_behind(stream)?;
        let event = self.recorded(timeline, stream)?;
        self.fleet.observers.tell(Observed::Recorded(event));
        Ok(event)
    }

    fn mark(&self, stream: Stream) -> Result<Mark, DeviceError> {
        let timeline = self.own(stream)?;
        let lane = &timeline.lane;
        let recorded = self.answer(lane.context.record(lane.stream, Purpose::Time))?;
        let event = Event {
            stream,
            position: timeline.skip(),
        };
        let observed = Observed::Enqueued(event, Enqueued::Mark);
        self.fleet.observers.tell(observed);
        Ok(Mark(Arc::new(recorded)))
    }

    fn elapsed(&self, from: &Mark, to: &Mark) -> Option<Duration> {
        let to = to.0.downcast_ref::<Recorded>()?;
        to.since(from.0.downcast_ref::<Recorded>()?)
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError> {
        self.put_wait(stream, event, true)
    }

    fn follow(&self, stream: Stream, event: Event) -> Result<(), DeviceError> {
        self.put_wait(stream, event, false)
    }

    fn knows(&self, foreign: &Foreign) -> bool {
        let visitor = foreign.0.downcast_ref::<Visitor>();
        visitor.is_some_and(|it| it.ordinal == self.gpu().ordinal)
    }

    fn follow_foreign(&self, stream: Stream, foreign: &Foreign) -> Result<(), DeviceError> {
        let timeline = self.own(stream)?;
        let visitor = foreign.0.downcast_ref::<Visitor>();
        let Some(visitor) = visitor.filter(|it| it.ordinal == self.gpu().ordinal) else {
            return Err(DeviceError::NoAccess(self.id(), self.id()));
        };
        if let Some(behind) = &visitor.behind {
            let lane = &timeline.lane;
            self.answer(lane.context.wait(lane.stream, behind))?;
            timeline.awaits(behind);
            self.gpu().stream_waits.fetch_add(1, Ordering::Relaxed);
            let event = Event {
                stream,
                position: timeline.skip(),
            };
            let enqueued = Observed::Enqueued(event, Enqueued::Operation);
            self.fleet.observers.tell(enqueued);
        }
        Ok(())
    }

    #[inline]
    fn is_complete(&self, event: Event) -> Result<bool, DeviceError> {
        let timeline = self.timeline(event.stream)?;
        let complete = match self.answer(timeline.is_done(event.position))? {
            Some(complete) => Ok(complete),
            None => Err(self.sibling(event.stream.device).lost_event()),
        };
        if complete != Ok(false) {
            self.fleet.observers.tell(Observed::Seen(event));
        }
        complete
    }

    fn synchronize(&self, event: Event) -> Result<(), DeviceError> {
        let timeline = self.timeline(event.stream)?;
        let lost = || Err(self.sibling(event.stream.device).lost_event());
        let own = self.sibling(event.stream.device);
        let observed = match own.answer(timeline.look(event.position))? {
            Reached::Done => Observed::Seen(event),
            Reached::Lost => return lost(),
            Reached::Pending(recorded) => {
                let gpu = self.gpu();
                gpu.host_synchronisations.fetch_add(1, Ordering::Relaxed);
                if !self.answer(timeline.block(event.position, &recorded))? {
                    return lost();
                }
                Observed::Synchronised(event)
            }
        };
        self.fleet.observers.tell(observed);
        Ok(())
    }

    fn when_complete(&self, event: Event, call: Completion) {
        let timeline = match self.timeline(event.stream) {
            Ok(timeline) => timeline,
            Err(error) => return call(Err(error)),
        };
        timeline.watch(event.position, call);
    }

    fn allocate(&self, bytes: u64, stream: Stream) -> Result<DevicePointer, DeviceError> {
        let timeline = self.own(stream)?;
        let CudaLane {
            context, stream, ..
        } = timeline.lane;
        let address = match context.allocate(bytes, stream) {
            Err(Fault(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                return Err(DeviceError::OutOfMemory {
                    device: self.id(),
                    wanted: bytes,
                    free: self.free_memory(),
                });
            }
            answer => self.answer(answer)?,
        };
        lock(&self.gpu().allocations).insert(address, bytes);
        Ok(DevicePointer {
            device: self.id(),
            address,
        })
    }

    fn free(&self, pointer: DevicePointer, stream: Stream) -> Result<(), DeviceError> {
        let timeline = self.own(stream)?;
        if pointer.device != self.id() {
            return Err(DeviceError::NoAccess(self.id(), pointer.device));
        }
        if lock(&self.gpu().allocations)
            .remove(&pointer.address)
            .is_none()
        {
            return Err(DeviceError::BadAddress(pointer, 0));
        }
        let lane = &timeline.lane;
        self.answer(lane.context.free(pointer.address, lane.stream))?;
        let event = Event {
            stream,
            position: timeline.skip(),
        };
        let freed = Observed::Enqueued(event, Enqueued::Free);
        self.fleet.observers.tell(freed);
        Ok(())
    }

    fn free_memory(&self) -> u64 {
        let known = self.gpu().context.get();
        // Without a context nobody here has any of it.
        known.map_or(self.info().memory, |context| {
            context.free_memory().unwrap_or(0)
        })
    }

    // SAFETY: the caller's duties are the trait's.
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

    // SAFETY: the caller's duties are the trait's, and are passed on to the driver, or to the host
    // function behind the copy.
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
        let timeline = self.own(stream)?;
        self.check_reach(from)?;
        self.check_reach(to)?;
        if from.device == HOST && to.device == HOST {
            return Err(DeviceError::NoAccess(self.id(), HOST));
        }
        let device = if from.device == HOST { to } else { from };
        let shape = Strided::new(from_strides, to_strides, extents, item)
            .ok_or(DeviceError::BadAddress(device, u64::MAX))?;
        let bytes = shape.bytes();
        if bytes == 0 {
            return Ok(());
        }
        let lane = &timeline.lane;
        let sides = [(from, shape.from_reach()), (to, shape.to_reach())];
        let mut sides = sides.iter().filter(|(side, _)| side.device == HOST);
        if sides.all(|(side, reach)| is_pinned(lane.context, side.address, *reach)) {
            // SAFETY: as the caller says; host memory is pinned.
            let answer = unsafe { lane.context.copy(side(from), side(to), &shape, lane.stream) };
            self.copied(answer, device, bytes)?;
        } else {
            // SAFETY: as the caller says.
            unsafe { self.copy_staged(timeline, from, to, &shape) }?;
        }
        if to.device == HOST {
            self.answer(timeline.awaits_itself())?;
        }
        self.count_copy(from.device, to.device, bytes);
        let event = Event {
            stream,
            position: timeline.skip(),
        };
        let copied = Observed::Enqueued(event, Enqueued::Copy);
        self.fleet.observers.tell(copied);
        Ok(())
    }

    // SAFETY: the caller's duty is the trait's, and the driver's.
    unsafe fn register_host(&self, address: u64, bytes: u64) -> Result<bool, DeviceError> {
        self.check()?;
        let context = self.context()?;
        let Ok(size) = usize::try_from(bytes) else {
            return Ok(false);
        };
        // SAFETY: as the caller says.
        let registered = unsafe { driver::register(context, address, size) };
        // It may be registered already, read only, or more than there may be. If it is the device that
        // failed, the next call says so.
        Ok(registered.is_ok())
    }

    fn unregister_host(&self, address: u64) {
        if let Some(context) = self.gpu().context.get() {
            // Whoever registered it knows that it was.
            let _ = driver::unregister(context, address);
        }
    }

    fn enable_peer(&self, peer: DeviceId) -> Result<(), DeviceError> {
        let refused = DeviceError::NoAccess(self.id(), peer);
        let Some(other) = self.fleet.gpus.get(usize::from(peer.index())) else {
            return Err(refused);
        };
        let own = self.gpu();
        if peer == HOST || !own.peers.contains(&other.ordinal) {
            return Err(refused);
        }
        Process::wish(own.ordinal, other.ordinal);
        Ok(())
    }

    fn handle(&self, stream: Stream) -> Option<usize> {
        let timeline = self.own(stream).ok()?;
        Some(timeline.lane.stream.0 as usize)
    }

    #[inline]
    fn make_current(&self) -> Result<(), DeviceError> {
        self.check()?;
        let context = self.context()?;
        self.answer(context.make_current())
    }

    fn close(&self) {
        let gpu = self.gpu();
        let whole = gpu.lost.set("the machine is closed".into()).is_ok();
        if gpu.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        for (_, timeline) in &gpu.timelines {
            let CudaLane {
                context, stream, ..
            } = timeline.lane;
            // Before it is told that what is not done is lost.
            let idle = whole && matches!(timeline.rests(), Ok(true));
            timeline.fail();
            timeline.close();
            if idle {
                context.give_back(stream);
            }
        }
        gpu.staging.close();
        // What they have may be somebody's who wants a lock.
        let mourners = std::mem::take(&mut *lock(&gpu.mourners));
        drop(mourners);
    }
}

impl fmt::Debug for CudaGpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CudaGpu").field(self.info()).finish()
    }
}

/// The devices of a machine: the first ones that the driver has.
pub(crate) fn build(found: &[Found], observers: &Arc<Observers>) -> Vec<Arc<CudaGpu>> {
    let gpus = found.iter().zip(0..).map(|(found, ordinal)| Gpu {
        info: DeviceInfo {
            id: DeviceId::gpu(ordinal),
            name: found.name.clone(),
            memory: found.memory,
        },
        ordinal,
        capability: found.capability,
        peers: found.peers.clone(),
        context: OnceLock::new(),
        timelines: boxcar::Vec::new(),
        closed: AtomicBool::new(false),
        lost: OnceLock::new(),
        allocations: Mutex::default(),
        staging: Staging::default(),
        mourners: Mutex::default(),
        traffic: Mutex::default(),
        streams: AtomicU64::new(0),
        stream_waits: AtomicU64::new(0),
        host_synchronisations: AtomicU64::new(0),
    });
    let fleet = Arc::new(Fleet {
        gpus: gpus.collect(),
        observers: Arc::clone(observers),
    });
    (0..fleet.gpus.len())
        .map(|index| {
            Arc::new(CudaGpu {
                fleet: Arc::clone(&fleet),
                index,
            })
        })
        .collect()
}
