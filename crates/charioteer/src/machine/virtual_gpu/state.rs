//! What is enqueued on the streams of a machine, and when it is due: all under one lock.
//!
//! Nothing here takes time, calls anybody or knows a thread. What is to be done with no lock held is
//! left in the [`Outbox`].

use std::any::Any;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;

use super::Traffic;
use super::crew::Crew;
use super::memory::{AddressSpace, Buffer};
use super::timeline::{Timeline, Timelines};
use crate::machine::description::Description;
use crate::machine::device::{
    Completion, DeviceError, DeviceId, DeviceInfo, DevicePointer, Event, HOST, Operation, Stream,
};
use crate::machine::observer::Observed;
use crate::machine::strided::Strided;
use crate::sync::{AtomicU32, AtomicU64, Condvar, Mutex, Ordering};

/// The device is lost.
pub(super) const LOST: u32 = 1;
/// The next event recorded on the device is late.
pub(super) const LATE: u32 = 2;

/// What anybody may read of a device without the lock.
pub(super) struct Shared {
    pub(super) info: DeviceInfo,
    pub(super) timelines: Timelines,
    /// [`LOST`] and [`LATE`]: whatever makes the short ways long.
    pub(super) status: AtomicU32,
    pub(super) stream_waits: AtomicU64,
    pub(super) host_synchronisations: AtomicU64,
}

/// One end of a copy.
pub(super) enum Side {
    /// Memory of this process.
    Host(u64),
    /// Memory of a device, and how far from the buffer's beginning.
    Device(DevicePointer, Arc<Buffer>, u64),
}

impl Side {
    fn device(&self) -> DeviceId {
        match self {
            Self::Host(_) => HOST,
            Self::Device(pointer, ..) => pointer.device,
        }
    }

    fn pointer(&self) -> *mut u8 {
        match self {
            Self::Host(address) => std::ptr::with_exposed_provenance_mut(*address as usize),
            Self::Device(_, buffer, offset) => buffer.at(*offset),
        }
    }
}

/// A copy that both ends and the way between them allowed.
pub(super) struct Transfer {
    pub(super) from: Side,
    pub(super) to: Side,
    pub(super) shape: Strided,
    /// It has the link.
    started: bool,
    /// A fault that was injected.
    fails: bool,
}

impl Transfer {
    /// Moves the bytes.
    ///
    /// # Safety
    /// Host memory at either end is valid.
    pub(super) unsafe fn run(&self) {
        let (source, target) = (self.from.pointer(), self.to.pointer());
        self.shape.each(&mut |from, to| {
            let source = source.wrapping_add(from as usize);
            let target = target.wrapping_add(to as usize);
            // SAFETY: the bytes of devices are kept by the two ends, which were checked to be within
            // them; those of the host are valid by the caller's word. What runs on another stream
            // without an order may write the same bytes meanwhile: that is the program's error, here
            // as on any device, and shows as garbage.
            unsafe { std::ptr::copy(source, target, self.shape.run as usize) };
        });
    }

    /// The two ends, and how many bytes of each are reached.
    fn sides(&self) -> [(&Side, u64); 2] {
        [
            (&self.from, self.shape.from_reach()),
            (&self.to, self.shape.to_reach()),
        ]
    }
}

/// What a stream does in its order.
pub(super) enum Work {
    Operation(Operation),
    /// Nothing, for so many nanoseconds.
    Busy(u64),
    Copy(Transfer),
    Wait {
        event: Event,
        /// Whether the failure of the event is one of the stream.
        inherits: bool,
    },
    /// Gives the allocation at the address back.
    Free(u64),
    /// Notes the time.
    Mark(Arc<Stamp>),
    /// It is being run.
    Taken,
}

/// When a stream got to a mark, once it has.
pub(super) struct Stamp(AtomicU64);

impl Stamp {
    /// No time.
    const NEVER: u64 = u64::MAX;

    pub(super) fn new() -> Self {
        Self(AtomicU64::new(Self::NEVER))
    }

    /// Nanoseconds by the clock of the machine. Who knows that the stream is beyond the mark sees it.
    pub(super) fn time(&self) -> Option<u64> {
        let time = self.0.load(Ordering::Relaxed);
        (time != Self::NEVER).then_some(time)
    }
}

struct Entry {
    work: Work,
    /// When it was enqueued, by the clock and among all.
    at: u64,
    sequence: u64,
}

/// Where the first entry of a stream stands.
#[derive(Clone, Copy, Default, PartialEq)]
enum Head {
    /// There is none, or nobody looked at it.
    #[default]
    Idle,
    /// It waits for an event.
    Waiting,
    /// It is among what is due some time.
    Due,
    /// It is being run with no lock held.
    Running,
}

/// Who is told that an event is complete.
pub(super) enum Watcher {
    Call(Completion),
    /// A thread that blocks.
    Thread(Arc<Signal>),
    /// A stream whose head waits.
    Stream(Stream),
}

/// What a thread that waits for an event blocks on.
pub(super) struct Signal {
    done: Mutex<bool>,
    changed: Condvar,
}

impl Signal {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            done: Mutex::new(false),
            changed: Condvar::new(),
        })
    }

    pub(super) fn wait(&self) {
        let mut done = self.done.lock();
        while !*done {
            done = self.changed.wait(done);
        }
    }

    pub(super) fn set(&self) {
        *self.done.lock() = true;
        self.changed.notify_one();
    }
}

#[derive(Default)]
struct StreamState {
    /// The first one is at the position behind what is done.
    queue: VecDeque<Entry>,
    head: Head,
    /// When what is done was done.
    ready: u64,
    /// By position, equal ones as they came.
    watchers: VecDeque<(u64, Watcher)>,
    /// What failed first. It is told by every event from there on.
    error: Option<DeviceError>,
}

struct DeviceState {
    streams: Vec<StreamState>,
    memory: AddressSpace,
    /// Whose memory it may reach.
    peers: Vec<DeviceId>,
    lost: Option<Arc<str>>,
    operations: u64,
    traffic: BTreeMap<(DeviceId, DeviceId), (u64, u64)>,
    /// How many copies from now on those are that fail, in order: each less those before it.
    failing_copies: Vec<u64>,
    /// After how many operations and copies it is lost, and why.
    loss: Option<(u64, Arc<str>)>,
    /// How much later the next event is.
    delay: u64,
}

/// The head of a stream is due: in order of time, then as they were enqueued.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Due {
    at: u64,
    sequence: u64,
    stream: Stream,
}

/// What takes a thread that holds no lock.
pub(super) enum Run {
    Operation(Stream, Operation),
    Copy(Stream, Transfer),
}

/// What is done once no lock is held.
#[derive(Default)]
pub(super) struct Outbox {
    /// For the observers.
    pub(super) observed: Vec<Observed>,
    pub(super) signals: Vec<Arc<Signal>>,
    pub(super) calls: Vec<(Event, Completion, Result<(), DeviceError>)>,
    /// Dropped: what will never run, and may be the user's.
    pub(super) drops: Vec<Box<dyn Any + Send>>,
    /// Dropped: memory, and copies that will never run.
    pub(super) memory: Vec<Box<dyn Any + Send>>,
}

impl Outbox {
    pub(super) fn is_empty(&self) -> bool {
        self.observed.is_empty()
            && self.signals.is_empty()
            && self.calls.is_empty()
            && self.drops.is_empty()
            && self.memory.is_empty()
    }
}

pub(super) struct State {
    description: Description,
    shared: Arc<[Shared]>,
    devices: Vec<DeviceState>,
    due: BinaryHeap<Reverse<Due>>,
    /// When each link, in one direction, is done with the copies that it was given.
    links: HashMap<(DeviceId, DeviceId), u64>,
    sequence: u64,
    /// Streams to look at, before the lock is let go.
    unsettled: VecDeque<Stream>,
    /// Whether anybody observes.
    pub(super) observed: bool,
    pub(super) out: Outbox,
    /// Who drives it.
    pub(super) crew: Crew,
}

/// That an event was never recorded.
pub(super) fn unknown(event: Event) -> DeviceError {
    DeviceError::Operation(
        event.stream.device,
        format!(
            "position {} of stream {} was never recorded",
            event.position, event.stream.number
        )
        .into(),
    )
}

impl State {
    pub(super) fn new(description: &Description, shared: Arc<[Shared]>) -> Self {
        let devices = shared
            .iter()
            .map(|device| DeviceState {
                streams: Vec::new(),
                memory: AddressSpace::new(device.info.id, device.info.memory),
                peers: Vec::new(),
                lost: None,
                operations: 0,
                traffic: BTreeMap::new(),
                failing_copies: Vec::new(),
                loss: None,
                delay: 0,
            })
            .collect();
        Self {
            description: description.clone(),
            shared,
            devices,
            due: BinaryHeap::new(),
            links: HashMap::new(),
            sequence: 0,
            unsettled: VecDeque::new(),
            observed: false,
            out: Outbox::default(),
            crew: Crew::new(),
        }
    }

    fn device(&mut self, device: DeviceId) -> &mut DeviceState {
        &mut self.devices[usize::from(device.index())]
    }

    fn stream(&mut self, stream: Stream) -> &mut StreamState {
        &mut self.device(stream.device).streams[stream.number as usize]
    }

    fn timeline(&self, stream: Stream) -> &Timeline {
        self.shared[usize::from(stream.device.index())]
            .timelines
            .get(stream.number)
            .expect("the stream was created")
    }

    /// That the device is there, and the stream.
    fn check(&self, stream: Stream) -> Result<(), DeviceError> {
        let device = &self.devices[usize::from(stream.device.index())];
        if let Some(why) = &device.lost {
            return Err(DeviceError::Lost(stream.device, Arc::clone(why)));
        }
        if stream.number as usize >= device.streams.len() {
            return Err(unknown(Event {
                stream,
                position: 0,
            }));
        }
        Ok(())
    }

    /// That the device is lost, if it is.
    pub(super) fn lost(&self, device: DeviceId) -> Option<DeviceError> {
        let why = self.devices[usize::from(device.index())].lost.as_ref()?;
        Some(DeviceError::Lost(device, Arc::clone(why)))
    }

    /// How an event ended, if it did.
    pub(super) fn outcome(&self, event: Event) -> Option<Result<(), DeviceError>> {
        let timeline = self.timeline(event.stream);
        (timeline.done() >= event.position).then(|| self.result(event))
    }

    /// What an event says that is complete.
    fn result(&self, event: Event) -> Result<(), DeviceError> {
        if !self.timeline(event.stream).failed(event.position) {
            return Ok(());
        }
        let stream = event.stream;
        let device = &self.devices[usize::from(stream.device.index())];
        let error = device.streams[stream.number as usize].error.clone();
        Err(error.expect("what failed has an error"))
    }

    // What the host asks for. Each of these leaves the streams settled.

    pub(super) fn create_stream(&mut self, device: DeviceId) -> Result<Stream, DeviceError> {
        if let Some(lost) = self.lost(device) {
            return Err(lost);
        }
        let streams = &mut self.device(device).streams;
        let number = u32::try_from(streams.len()).expect("a stream takes memory");
        streams.push(StreamState::default());
        self.shared[usize::from(device.index())]
            .timelines
            .create(number);
        Ok(Stream { device, number })
    }

    /// Puts work behind all that is on the stream.
    pub(super) fn enqueue(
        &mut self,
        stream: Stream,
        work: Work,
        now: u64,
    ) -> Result<Event, DeviceError> {
        self.check(stream)?;
        if matches!(work, Work::Operation(_) | Work::Busy(_)) {
            self.device(stream.device).operations += 1;
        }
        let event = self.push(stream, work, now);
        self.settle();
        Ok(event)
    }

    fn push(&mut self, stream: Stream, work: Work, now: u64) -> Event {
        let position = self.timeline(stream).push();
        self.sequence += 1;
        let entry = Entry {
            work,
            at: now,
            sequence: self.sequence,
        };
        self.stream(stream).queue.push_back(entry);
        self.unsettled.push_back(stream);
        Event { stream, position }
    }

    /// The event behind all that is on the stream, with the delay that was injected.
    pub(super) fn record_late(&mut self, stream: Stream, now: u64) -> Result<Event, DeviceError> {
        self.check(stream)?;
        let delay = std::mem::take(&mut self.device(stream.device).delay);
        self.shared[usize::from(stream.device.index())]
            .status
            .fetch_and(!LATE, Ordering::Relaxed);
        if delay > 0 {
            self.push(stream, Work::Busy(delay), now);
            self.settle();
        }
        Ok(Event {
            stream,
            position: self.timeline(stream).tail(),
        })
    }

    /// Takes room; the host's memory behind it is provided with no lock held.
    pub(super) fn reserve(
        &mut self,
        bytes: u64,
        stream: Stream,
        now: u64,
    ) -> Result<u64, DeviceError> {
        self.check(stream)?;
        let (address, releases) = self.device(stream.device).memory.reserve(bytes)?;
        for event in releases {
            // The release takes place whether or not what comes before it failed.
            let inherits = false;
            if event.stream != stream {
                self.push(stream, Work::Wait { event, inherits }, now);
            }
        }
        self.settle();
        Ok(address)
    }

    pub(super) fn provide(
        &mut self,
        device: DeviceId,
        address: u64,
        buffer: Option<Buffer>,
    ) -> Result<(), DeviceError> {
        if let Some(lost) = self.lost(device) {
            self.out.memory.extend(buffer.map(|it| Box::new(it) as _));
            return Err(lost);
        }
        self.device(device).memory.provide(address, buffer)
    }

    pub(super) fn free(
        &mut self,
        pointer: DevicePointer,
        stream: Stream,
        now: u64,
    ) -> Result<Option<Event>, DeviceError> {
        self.check(stream)?;
        let memory = &mut self.device(stream.device).memory;
        let bytes = memory
            .retire(pointer.address)
            .ok_or(DeviceError::BadAddress(pointer, 0))?;
        let timeline = self.timeline(stream);
        if timeline.done() == timeline.tail() {
            self.release(stream.device, pointer.address, None);
            return Ok(None);
        }
        let event = self.push(stream, Work::Free(pointer.address), now);
        self.device(stream.device)
            .memory
            .expect_release(event, bytes);
        self.settle();
        Ok(Some(event))
    }

    pub(super) fn free_memory(&self, device: DeviceId) -> u64 {
        self.devices[usize::from(device.index())]
            .memory
            .free_bytes()
    }

    /// A copy that both ends and the way between them allow.
    pub(super) fn copy(
        &mut self,
        from: DevicePointer,
        to: DevicePointer,
        shape: Strided,
        stream: Stream,
        now: u64,
    ) -> Result<Event, DeviceError> {
        self.check(stream)?;
        let own = stream.device;
        if from.device != own && to.device != own {
            return Err(DeviceError::NoAccess(own, from.device));
        }
        let from = self.side(own, from, shape.from_reach())?;
        let to = self.side(own, to, shape.to_reach())?;
        let link = (from.device(), to.device());
        if self.description.link(link.0, link.1).is_none() {
            let other = if link.0 == own { link.1 } else { link.0 };
            return Err(DeviceError::NoAccess(own, other));
        }
        let device = self.device(own);
        let (copies, sum) = device.traffic.entry(link).or_default();
        *copies += 1;
        *sum += shape.bytes();
        let before = device.failing_copies.len();
        device.failing_copies.retain_mut(|nth| {
            *nth -= 1;
            *nth > 0
        });
        let copy = Transfer {
            from,
            to,
            shape,
            started: false,
            fails: device.failing_copies.len() < before,
        };
        let event = self.push(stream, Work::Copy(copy), now);
        self.settle();
        Ok(event)
    }

    fn side(&self, own: DeviceId, at: DevicePointer, bytes: u64) -> Result<Side, DeviceError> {
        if at.device == HOST {
            // What has the top bit is an address of a device.
            let end = at.address.checked_add(bytes);
            if end.is_none_or(|end| end >> 63 != 0) || (at.address == 0 && bytes > 0) {
                return Err(DeviceError::BadAddress(at, bytes));
            }
            return Ok(Side::Host(at.address));
        }
        let (buffer, offset) = self.find(own, at, bytes, false)?;
        Ok(Side::Device(at, buffer, offset))
    }

    /// Memory of a device that `own` may reach.
    pub(super) fn find(
        &self,
        own: DeviceId,
        at: DevicePointer,
        bytes: u64,
        late: bool,
    ) -> Result<(Arc<Buffer>, u64), DeviceError> {
        let reaches = &self.devices[usize::from(own.index())].peers;
        if at.device != own && !reaches.contains(&at.device) {
            return Err(DeviceError::NoAccess(own, at.device));
        }
        for device in [own, at.device] {
            if let Some(lost) = self.lost(device) {
                return Err(lost);
            }
        }
        let memory = &self.devices[usize::from(at.device.index())].memory;
        let (buffer, offset) = memory.find(at.address, bytes, late)?;
        Ok((Arc::clone(buffer), offset))
    }

    pub(super) fn has_peer(&self, own: DeviceId, peer: DeviceId) -> bool {
        self.devices[usize::from(own.index())].peers.contains(&peer)
    }

    pub(super) fn enable_peer(&mut self, own: DeviceId, peer: DeviceId) -> Result<(), DeviceError> {
        if let Some(lost) = self.lost(own) {
            return Err(lost);
        }
        let links = &self.description;
        let linked = links.link(own, peer).or(links.link(peer, own)).is_some();
        if peer == HOST || peer == own || !linked {
            return Err(DeviceError::NoAccess(own, peer));
        }
        let peers = &mut self.device(own).peers;
        if !peers.contains(&peer) {
            peers.push(peer);
        }
        Ok(())
    }

    /// Tells the watcher when the event is complete; gives it back if it is already.
    pub(super) fn watch(&mut self, event: Event, watcher: Watcher) -> Result<(), Watcher> {
        if self.timeline(event.stream).done() >= event.position {
            return Err(watcher);
        }
        let watchers = &mut self.stream(event.stream).watchers;
        let behind = watchers.partition_point(|&(position, _)| position <= event.position);
        watchers.insert(behind, (event.position, watcher));
        Ok(())
    }

    pub(super) fn counters(&self, device: DeviceId) -> (u64, u64, Vec<Traffic>) {
        let device = &self.devices[usize::from(device.index())];
        let traffic = device
            .traffic
            .iter()
            .map(|(&(from, to), &(copies, bytes))| Traffic {
                from,
                to,
                copies,
                bytes,
            })
            .collect();
        (device.streams.len() as u64, device.operations, traffic)
    }

    // Faults.

    pub(super) fn fail_copy(&mut self, device: DeviceId, nth: u64) {
        self.device(device).failing_copies.push(nth);
    }

    pub(super) fn lose_after(&mut self, device: DeviceId, operations: u64, why: Arc<str>) {
        self.device(device).loss = Some((operations, why));
    }

    pub(super) fn delay_event(&mut self, device: DeviceId, delay: u64) {
        self.device(device).delay = delay;
        self.shared[usize::from(device.index())]
            .status
            .fetch_or(LATE, Ordering::Relaxed);
    }

    /// The device is lost: every event of it that is not complete fails, as soon as what is running
    /// on its stream ends.
    pub(super) fn lose(&mut self, id: DeviceId, why: &Arc<str>) {
        let device = self.device(id);
        if device.lost.is_some() {
            return;
        }
        device.lost = Some(Arc::clone(why));
        let buffers: Vec<_> = device.memory.clear().collect();
        self.out.memory.push(Box::new(buffers));
        self.shared[usize::from(id.index())]
            .status
            .fetch_or(LOST, Ordering::Relaxed);
        let streams = self.device(id).streams.len();
        for number in (0..).take(streams) {
            self.abandon(Stream { device: id, number });
        }
        self.settle();
    }

    pub(super) fn lose_all(&mut self, why: &Arc<str>) {
        for index in (0..).take(self.devices.len()) {
            self.lose(DeviceId::gpu(index), why);
        }
    }

    // How things go on.

    /// When the next thing is due.
    pub(super) fn next(&mut self) -> Option<u64> {
        while let Some(&Reverse(due)) = self.due.peek() {
            if self.lost(due.stream.device).is_none() {
                return Some(due.at);
            }
            self.due.pop();
        }
        None
    }

    /// Takes the next thing that is due. What takes a thread is given out, and ended by
    /// [`finish`](Self::finish); all else is done with that.
    pub(super) fn start(&mut self) -> Option<Run> {
        self.next()?;
        let Reverse(due) = self.due.pop()?;
        let taken = self.take(due);
        self.settle();
        taken
    }

    fn take(&mut self, due: Due) -> Option<Run> {
        let stream = due.stream;
        let front = self.stream(stream).queue.front_mut();
        let work = &mut front.expect("what is due is there").work;
        if let Work::Copy(copy) = work
            && !copy.started
        {
            copy.started = true;
            let (from, to) = (copy.from.device(), copy.to.device());
            let bytes = copy.shape.bytes();
            let link = self.description.link(from, to).expect("it was checked");
            let time = u64::try_from(link.time(bytes).as_nanos()).unwrap_or(u64::MAX);
            let until = self.links.entry((from, to)).or_default();
            *until = due.at.max(*until).saturating_add(time);
            let at = *until;
            self.due.push(Reverse(Due { at, ..due }));
            return None;
        }
        if matches!(work, Work::Busy(_)) {
            self.end(stream, Ok(()), due.at);
            return None;
        }
        let work = std::mem::replace(work, Work::Taken);
        if let Some((left, why)) = &mut self.device(stream.device).loss {
            if *left == 0 {
                let why = Arc::clone(why);
                self.out.drops.push(Box::new(work));
                self.lose(stream.device, &why);
                return None;
            }
            *left -= 1;
        }
        self.stream(stream).head = Head::Running;
        match work {
            Work::Operation(operation) => Some(Run::Operation(stream, operation)),
            Work::Copy(copy) => {
                if let Err(error) = self.check_copy(stream.device, &copy) {
                    self.out.memory.push(Box::new(copy));
                    self.end(stream, Err(error), due.at);
                    return None;
                }
                Some(Run::Copy(stream, copy))
            }
            Work::Busy(_) | Work::Wait { .. } | Work::Free(_) | Work::Mark(_) | Work::Taken => {
                unreachable!("it takes no thread")
            }
        }
    }

    /// That both ends of a copy are still there when its time is up.
    fn check_copy(&self, own: DeviceId, copy: &Transfer) -> Result<(), DeviceError> {
        for (side, bytes) in copy.sides() {
            if let Side::Device(pointer, ..) = side {
                self.find(own, *pointer, bytes, true)?;
            }
        }
        if copy.fails {
            return Err(DeviceError::Operation(
                own,
                "a copy failed, by an injected fault".into(),
            ));
        }
        Ok(())
    }

    /// What was given out for the stream has ended.
    pub(super) fn finish(&mut self, stream: Stream, result: Result<(), DeviceError>, now: u64) {
        self.end(stream, result, now);
        self.settle();
    }

    /// The head of a stream is done.
    fn end(&mut self, stream: Stream, result: Result<(), DeviceError>, at: u64) {
        self.stream(stream).head = Head::Idle;
        if self.lost(stream.device).is_some() {
            self.abandon(stream);
            return;
        }
        if let Err(error) = result {
            self.fail(stream, error);
        }
        self.step(stream, at);
        self.unsettled.push_back(stream);
    }

    /// What is first on the stream fails, and all behind it.
    fn fail(&mut self, stream: Stream, error: DeviceError) {
        let state = self.stream(stream);
        if state.error.is_none() {
            state.error = Some(error);
            let timeline = self.timeline(stream);
            let position = timeline.done() + 1;
            timeline.fail(position);
            if self.observed {
                let failed = Observed::Failed(Event { stream, position });
                self.out.observed.push(failed);
            }
        }
    }

    /// Ends a stream of a lost device. Where something runs, that ends first: it may be using memory
    /// of whoever waits for it.
    fn abandon(&mut self, stream: Stream) {
        let lost = self.lost(stream.device).expect("the device is lost");
        self.fail(stream, lost);
        let state = self.stream(stream);
        let keep = usize::from(state.head == Head::Running);
        let rest: Vec<Entry> = state.queue.drain(keep..).collect();
        let at = state.ready;
        self.out.drops.push(Box::new(rest));
        if self.observed {
            let position = self.timeline(stream).done() + keep as u64;
            let last = Observed::Abandoned(Event { stream, position });
            self.out.observed.push(last);
        }
        if keep == 0 {
            self.stream(stream).head = Head::Idle;
            let timeline = self.timeline(stream);
            let tail = timeline.tail();
            if timeline.done() < tail {
                self.reach(stream, tail, at);
            }
        }
    }

    /// The first entry of a stream is done: it goes.
    fn step(&mut self, stream: Stream, at: u64) {
        let position = self.timeline(stream).done() + 1;
        let entry = self.stream(stream).queue.pop_front();
        match entry.expect("what is done was there").work {
            Work::Taken | Work::Busy(_) | Work::Wait { .. } => {}
            // Before the position is published as done.
            Work::Mark(stamp) => stamp.0.store(at, Ordering::Relaxed),
            Work::Free(address) => {
                self.release(stream.device, address, Some(Event { stream, position }));
            }
            // It was not run.
            Work::Operation(operation) => self.out.drops.push(Box::new(operation)),
            Work::Copy(copy) => self.out.memory.push(Box::new(copy)),
        }
        self.reach(stream, position, at);
    }

    fn release(&mut self, device: DeviceId, address: u64, event: Option<Event>) {
        if let Some(buffer) = self.device(device).memory.release(address, event) {
            self.out.memory.push(Box::new(buffer));
        }
    }

    /// All of the stream up to a position is done.
    fn reach(&mut self, stream: Stream, position: u64, at: u64) {
        self.timeline(stream).reach(position);
        let state = self.stream(stream);
        state.ready = state.ready.max(at);
        while let Some(&(watched, _)) = self.stream(stream).watchers.front()
            && watched <= position
        {
            let (position, watcher) = self
                .stream(stream)
                .watchers
                .pop_front()
                .expect("it was just seen");
            let event = Event { stream, position };
            match watcher {
                Watcher::Call(call) => {
                    let result = self.result(event);
                    self.out.calls.push((event, call, result));
                }
                Watcher::Thread(signal) => self.out.signals.push(signal),
                Watcher::Stream(waiter) => {
                    let state = self.stream(waiter);
                    if state.head == Head::Waiting {
                        state.head = Head::Idle;
                        state.ready = state.ready.max(at);
                        self.unsettled.push_back(waiter);
                    }
                }
            }
        }
        if self.observed {
            let reached = Observed::Completed(Event { stream, position });
            self.out.observed.push(reached);
        }
    }

    /// Looks at the heads of all streams where something changed, until nothing does.
    fn settle(&mut self) {
        while let Some(stream) = self.unsettled.pop_front() {
            while self.look(stream) {}
        }
    }

    /// Looks at the head of a stream. Whether it is done with, so that the next one is to be looked
    /// at.
    fn look(&mut self, stream: Stream) -> bool {
        let state = self.stream(stream);
        let ready = state.ready;
        let (Head::Idle, Some(front)) = (state.head, state.queue.front()) else {
            return false;
        };
        let begin = ready.max(front.at);
        let at = match front.work {
            Work::Wait { event, inherits } => {
                match self.outcome(event) {
                    None => {
                        let watcher = Watcher::Stream(stream);
                        let watched = self.watch(event, watcher).is_ok();
                        debug_assert!(watched, "it is not complete");
                        self.stream(stream).head = Head::Waiting;
                        return false;
                    }
                    Some(Err(error)) if inherits => self.fail(stream, error),
                    Some(_) => {}
                }
                self.step(stream, ready);
                return true;
            }
            // Behind a failure nothing is run, but memory is given back.
            _ if state.error.is_some() => {
                self.step(stream, ready);
                return true;
            }
            Work::Free(_) => {
                self.step(stream, ready);
                return true;
            }
            Work::Mark(_) => {
                self.step(stream, begin);
                return true;
            }
            Work::Operation(_) | Work::Copy(_) => begin,
            Work::Busy(duration) => begin.saturating_add(duration),
            Work::Taken => unreachable!("it is running"),
        };
        let due = Due {
            at,
            sequence: front.sequence,
            stream,
        };
        self.stream(stream).head = Head::Due;
        self.due.push(Reverse(due));
        false
    }
}
