//! Who drives the streams of a machine.
//!
//! # In real time
//!
//! Threads that stand for the devices. At most one of them at a time is the *keeper*: it alone looks
//! at what is due, and sleeps until the first of that. The others run operations and copies, call
//! back, or park. A keeper that finds something to run gives the office up before it lets go of the
//! lock: to a parked thread, or to a new one, if anything else is due now or later. A thread that has
//! run something takes the office if it is free, else it parks.
//!
//! *No wake-up is lost*, since all that decides is under the machine's one lock. Whoever changes what
//! is due calls [`Crew::summon`] before unlocking. With no keeper it appoints one, who is awake or
//! has yet to be born and looks under the lock before it sleeps. With a keeper that is awake it does
//! nothing, for the same reason. With a keeper asleep it wakes it if something is due before it would
//! wake. An appointment is counted (`appointed`) under the lock and taken by exactly one of those who
//! were parked, so that neither a spurious wake-up nor a thread that parks late takes another's.
//!
//! *There are enough threads*: a new one is started only when something is due, and everyone else is
//! running something, or calling back. So there are at most as many as there are streams with work,
//! those who call back, and one. They are kept until the machine goes. Then each ends when it next
//! looks; nobody joins them, since the last reference may go anywhere, also on one of them.
//!
//! If the system refuses a thread, those that there are go on, with less at a time. If there are none
//! the devices are lost, for that reason.
//!
//! # In virtual time
//!
//! No thread at all: [`Core::advance`] takes the next thing that is due, and moves the clock to where
//! it is. One thread at a time does so, and the others wait for it; the operation that it runs may
//! itself wait for another stream, and then advances the clock from within.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use super::state::{Outbox, Run, Shared, Signal, State, Watcher, unknown};
use super::timeline::Timeline;
#[cfg(not(loom))]
use crate::machine::cpus::unpinned;
use crate::machine::description::{Description, Time};
use crate::machine::device::{Completion, DeviceError, DeviceId, Event, Kind, Operation, Stream};
use crate::machine::observer::{Observed, Observers};
use crate::machine::together::together;
use crate::sync::{AtomicU64, Condvar, Guard, Mutex, Ordering, assert_unlocked, thread_local};

#[derive(Clone, Copy)]
enum Keeper {
    /// Nobody is.
    None,
    /// It will look at what is due before it sleeps.
    Awake,
    /// It sleeps until then.
    Asleep(u64),
}

/// What is to be done so that what is due is looked at.
enum Summons {
    Nothing,
    WakeKeeper,
    WakeParked,
    Start,
}

/// The threads, under the machine's lock.
pub(super) struct Crew {
    keeper: Keeper,
    threads: usize,
    parked: usize,
    /// Parked threads that are to take the office: one at most.
    appointed: usize,
    closed: bool,
    /// In virtual time, the thread that is advancing.
    advancing: Option<ThreadId>,
}

impl Crew {
    pub(super) fn new() -> Self {
        Self {
            keeper: Keeper::None,
            threads: 0,
            parked: 0,
            appointed: 0,
            closed: false,
            advancing: None,
        }
    }

    /// Sees to it that somebody looks at what is due at `next`.
    fn summon(&mut self, next: Option<u64>) -> Summons {
        let Some(next) = next else {
            return Summons::Nothing;
        };
        match self.keeper {
            _ if self.closed => Summons::Nothing,
            Keeper::Awake => Summons::Nothing,
            Keeper::Asleep(until) if until <= next => Summons::Nothing,
            Keeper::Asleep(_) => {
                self.keeper = Keeper::Awake;
                Summons::WakeKeeper
            }
            Keeper::None if self.parked > 0 => {
                self.keeper = Keeper::Awake;
                self.parked -= 1;
                self.appointed += 1;
                Summons::WakeParked
            }
            Keeper::None => {
                self.keeper = Keeper::Awake;
                self.threads += 1;
                Summons::Start
            }
        }
    }
}

thread_local! {
    /// The machine and the device for which this thread runs an operation.
    static COMPUTES: Cell<Option<(usize, DeviceId)>> = const { Cell::new(None) };
}

/// What the devices of a virtual machine share.
pub(super) struct Core {
    pub(super) shared: Arc<[Shared]>,
    state: Mutex<State>,
    /// The keeper sleeps on this, and in virtual time those who wait for another's advance.
    keeper: Condvar,
    parked: Condvar,
    time: Time,
    start: Instant,
    /// Virtual time: when things are. Written under the lock.
    clock: AtomicU64,
    pub(super) observers: Observers,
}

impl Core {
    pub(super) fn new(description: &Description, shared: Arc<[Shared]>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State::new(description, Arc::clone(&shared))),
            shared,
            keeper: Condvar::new(),
            parked: Condvar::new(),
            time: description.time(),
            start: Instant::now(),
            clock: AtomicU64::new(0),
            observers: Observers::default(),
        })
    }

    /// Nanoseconds since the machine was made.
    pub(super) fn now(&self) -> u64 {
        match self.time {
            Time::Real => nanoseconds(self.start.elapsed()),
            Time::Virtual => self.clock.load(Ordering::Relaxed),
        }
    }

    /// Whether this thread is running an operation of the device.
    pub(super) fn computes(&self, device: DeviceId) -> bool {
        COMPUTES.with(Cell::get) == Some((std::ptr::from_ref(self).addr(), device))
    }

    /// The timeline of a stream, if it is one.
    #[inline]
    pub(super) fn timeline(&self, stream: Stream) -> Option<&Timeline> {
        if stream.device.kind() != Kind::Gpu {
            return None;
        }
        let device = self.shared.get(usize::from(stream.device.index()))?;
        device.timelines.get(stream.number)
    }

    /// Whether the event is complete, without a lock unless it failed.
    #[inline]
    pub(super) fn query(&self, event: Event) -> Result<bool, DeviceError> {
        let timeline = self.timeline(event.stream).ok_or_else(|| unknown(event))?;
        if timeline.done() < event.position {
            if timeline.tail() < event.position {
                return Err(unknown(event));
            }
            return Ok(false);
        }
        if timeline.failed(event.position) {
            let outcome = self.state.lock().outcome(event);
            return outcome.expect("it is complete").map(|()| true);
        }
        Ok(true)
    }

    /// Whether there is such an event.
    pub(super) fn recorded(&self, event: Event) -> bool {
        let timeline = self.timeline(event.stream);
        timeline.is_some_and(|timeline| timeline.tail() >= event.position)
    }

    /// Changes the state; what follows from that is done after it is unlocked.
    pub(super) fn change<R>(self: &Arc<Self>, change: impl FnOnce(&mut State, u64) -> R) -> R {
        let mut state = self.state.lock();
        // By the clock under the lock, what is enqueued later is not enqueued earlier.
        let now = self.now();
        state.observed = self.observers.are_there();
        let result = change(&mut state, now);
        self.leave(state);
        result
    }

    /// Reads the state.
    pub(super) fn read<R>(&self, read: impl FnOnce(&State) -> R) -> R {
        read(&self.state.lock())
    }

    /// Unlocks, and does what was left for then.
    fn leave(self: &Arc<Self>, mut state: Guard<'_, State>) {
        let out = if state.out.is_empty() {
            None
        } else {
            Some(std::mem::take(&mut state.out))
        };
        let summons = self.summon(&mut state);
        drop(state);
        self.obey(summons);
        if let Some(out) = out {
            self.deliver(out);
        }
    }

    fn summon(&self, state: &mut State) -> Summons {
        match self.time {
            Time::Virtual => Summons::Nothing,
            Time::Real => {
                let next = state.next();
                state.crew.summon(next)
            }
        }
    }

    fn obey(self: &Arc<Self>, summons: Summons) {
        match summons {
            Summons::Nothing => {}
            Summons::WakeKeeper => self.keeper.notify_one(),
            Summons::WakeParked => self.parked.notify_one(),
            Summons::Start => {
                let core = Arc::clone(self);
                if let Err(error) = spawn(move || core.run()) {
                    self.refused(&error);
                }
            }
        }
    }

    /// The thread that was to be the keeper was not born.
    fn refused(self: &Arc<Self>, error: &std::io::Error) {
        let mut state = self.state.lock();
        state.crew.threads -= 1;
        state.crew.keeper = Keeper::None;
        if state.crew.threads == 0 {
            state.lose_all(&format!("the system refuses a thread: {error}").into());
        }
        // Who runs something takes the office when it is done. Who parked meanwhile is asked.
        if state.crew.parked > 0 || state.crew.threads == 0 {
            self.leave(state);
        }
    }

    /// Does what waited for the lock to be free. What only enqueues calls nobody back and drops nothing of
    /// the user's, so that it may be done under a lock of the caller's.
    fn deliver(&self, out: Outbox) {
        if !out.calls.is_empty() || !out.drops.is_empty() {
            assert_unlocked();
        }
        for observed in out.observed {
            self.observers.tell(observed);
        }
        for signal in out.signals {
            signal.set();
        }
        if !out.calls.is_empty() {
            together(|| {
                for (event, call, result) in out.calls {
                    self.call(event, call, result);
                }
            });
        }
        drop((out.drops, out.memory));
    }

    /// Calls back. A panic there has been reported by the hook, and must not keep others from being
    /// called.
    fn call(&self, event: Event, call: Completion, result: Result<(), DeviceError>) {
        self.observers.tell(Observed::Seen(event));
        let _ = catch_unwind(AssertUnwindSafe(|| call(result)));
    }

    /// A thread that stands for the devices. It is born as the keeper.
    fn run(self: Arc<Self>) {
        let mut state = self.state.lock();
        while !state.crew.closed {
            let now = self.now();
            let Some(next) = state.next() else {
                state.crew.keeper = Keeper::None;
                let Some(again) = self.park(state) else {
                    return;
                };
                state = again;
                continue;
            };
            if next > now {
                state.crew.keeper = Keeper::Asleep(next);
                let time = Duration::from_nanos(next - now);
                state = self.keeper.wait_for(state, time);
                state.crew.keeper = Keeper::Awake;
                continue;
            }
            let run = state.start();
            if run.is_none() && state.out.is_empty() {
                continue;
            }
            state.crew.keeper = Keeper::None;
            self.leave(state);
            state = match run {
                None => self.state.lock(),
                Some(run) => {
                    let (stream, result) = self.execute(run);
                    let mut state = self.state.lock();
                    state.finish(stream, result, self.now());
                    if state.out.is_empty() {
                        state
                    } else {
                        self.leave(state);
                        self.state.lock()
                    }
                }
            };
            if let Keeper::None = state.crew.keeper {
                state.crew.keeper = Keeper::Awake;
            } else {
                let Some(again) = self.park(state) else {
                    return;
                };
                state = again;
            }
        }
    }

    /// Sleeps until this thread is to be the keeper; `None` once the machine is gone.
    fn park<'a>(&'a self, mut state: Guard<'a, State>) -> Option<Guard<'a, State>> {
        state.crew.parked += 1;
        while state.crew.appointed == 0 {
            if state.crew.closed {
                return None;
            }
            state = self.parked.wait(state);
        }
        state.crew.appointed -= 1;
        Some(state)
    }

    fn execute(&self, run: Run) -> (Stream, Result<(), DeviceError>) {
        assert_unlocked();
        match run {
            Run::Copy(stream, copy) => {
                // SAFETY: host memory stays valid until the copy is complete, by the word of who called
                // `Device::copy`, and it is not complete before `finish`.
                unsafe { copy.run() };
                (stream, Ok(()))
            }
            Run::Operation(stream, operation) => (stream, self.compute(stream.device, operation)),
        }
    }

    fn compute(&self, device: DeviceId, operation: Operation) -> Result<(), DeviceError> {
        let now = Some((std::ptr::from_ref(self).addr(), device));
        let before = COMPUTES.with(|computes| computes.replace(now));
        let result = catch_unwind(AssertUnwindSafe(operation));
        COMPUTES.with(|computes| computes.set(before));
        result.unwrap_or_else(|payload| {
            let message = payload
                .downcast_ref::<&str>()
                .copied()
                .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
                .unwrap_or("it panicked");
            Err(DeviceError::Operation(device, message.into()))
        })
    }

    /// In virtual time, takes the next thing that is due. Whether there was one.
    pub(super) fn advance(self: &Arc<Self>) -> bool {
        if self.time == Time::Real {
            return false;
        }
        let this = std::thread::current().id();
        let mut state = self.state.lock();
        let nested = loop {
            match state.crew.advancing {
                None => break false,
                Some(thread) if thread == this => break true,
                Some(_) => state = self.keeper.wait(state),
            }
        };
        let Some(next) = state.next() else {
            return false;
        };
        self.clock.store(self.now().max(next), Ordering::Relaxed);
        if let Some(run) = state.start() {
            state.crew.advancing = Some(this);
            drop(state);
            let (stream, result) = self.execute(run);
            state = self.state.lock();
            if !nested {
                state.crew.advancing = None;
                self.keeper.notify_all();
            }
            state.finish(stream, result, self.now());
        }
        self.leave(state);
        true
    }

    /// In virtual time, whether anything is due at this moment.
    pub(super) fn is_due(&self) -> bool {
        self.time == Time::Virtual && self.state.lock().next().is_some_and(|at| at <= self.now())
    }

    /// Blocks until the event is complete, and counts that if it takes blocking; says whether it did.
    pub(super) fn synchronize(
        self: &Arc<Self>,
        event: Event,
        blocked: &AtomicU64,
    ) -> (Result<(), DeviceError>, bool) {
        let complete = self.query(event);
        if complete != Ok(false) {
            return (complete.map(drop), false);
        }
        blocked.fetch_add(1, Ordering::Relaxed);
        (self.block(event), true)
    }

    fn block(self: &Arc<Self>, event: Event) -> Result<(), DeviceError> {
        if self.time == Time::Virtual {
            while !self.query(event)? {
                // Nothing may be due because another thread has just done it.
                if !self.advance() && !self.query(event)? {
                    return Err(DeviceError::Operation(
                        event.stream.device,
                        "an operation waits for what comes after it".into(),
                    ));
                }
            }
            return Ok(());
        }
        let signal = Signal::new();
        let watcher = Watcher::Thread(Arc::clone(&signal));
        if self.change(|state, _| state.watch(event, watcher)).is_ok() {
            signal.wait();
        }
        self.query(event).map(drop)
    }

    pub(super) fn when_complete(self: &Arc<Self>, event: Event, call: Completion) {
        let call = match self.query(event) {
            Ok(false) => match self.change(|state, _| state.watch(event, Watcher::Call(call))) {
                Ok(()) => return,
                Err(Watcher::Call(call)) => call,
                Err(_) => unreachable!("the watcher comes back"),
            },
            _ => call,
        };
        self.observers.tell(Observed::Seen(event));
        call(self.query(event).map(drop));
    }

    /// The machine is gone: its devices are lost, and the threads end.
    pub(super) fn close(self: &Arc<Self>) {
        self.change(|state, _| {
            state.crew.closed = true;
            state.lose_all(&"the machine is gone".into());
        });
        self.keeper.notify_all();
        self.parked.notify_all();
    }
}

/// Nanoseconds that a clock can tell.
pub(super) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(not(loom))]
fn spawn(main: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let builder = std::thread::Builder::new().name("charioteer-gpu".into());
    unpinned(|| builder.spawn(main)).map(drop)
}

#[cfg(loom)]
#[allow(clippy::unnecessary_wraps, reason = "the system may refuse")]
fn spawn(main: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    loom::thread::spawn(main);
    Ok(())
}
