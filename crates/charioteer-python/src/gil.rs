//! The GIL: how many workers compete for it, and when a spawner stands back.
//!
//! # Workers
//!
//! Bodies that release the GIL most of the time run side by side, and then there can hardly be too
//! many workers. Bodies that hold it run one at a time, whatever their number, and each worker more
//! only adds hand-overs. The core lets no more workers into sessions than a width says
//! (`Engine::set_width`), and [`Width`] finds the width from the processor time that the workers in
//! sessions use up. This module measures it: a thread, the *observer*, reads the processor clock of
//! each worker's thread every [`TICK`]. It attaches to the interpreter only where a wider gate needs
//! another worker thread to be started.
//!
//! Beside a spawner who stands back (see below) workers wait for the GIL whatever their number, and what
//! is measured says nothing of how it will be when all is spawned. So for some [looks](BESIDE) it does not
//! count; a spawner who goes on for longer is part of the work.
//!
//! The observer starts with the first session beside another one, and sleeps again when no session
//! was seen for a while, with the gate wide open. So a runtime that is idle or runs one task after
//! another has none (invariant 7), and a burst of tasks begins with all workers.
//!
//! # Spawners
//!
//! A thread that spawns without pause is attached all the time, whatever the number of workers. A
//! body that releases the GIL for a moment gets it back only after CPython's switch interval of 5
//! ms, each time. So a spawner *stands back* where others wait: it detaches.
//!
//! *At the beginning*, after a while without spawns, the first tasks are ready and nobody runs them, since
//! workers wake up one after the other and each has to be attached to take its first. So the spawner
//! stands back until all who may have begun, or the tasks are gone, or a [time](START) is over.
//!
//! *From then on* it looks at the workers, once in a [while](LOOK). Whether one waits its processor clock
//! tells: the spawner reads the clocks of those in sessions, and again after the next spawns, and one that
//! is in the same body and used less than a [part](HUNGRY) of that time up waits for something. Then the
//! spawner stands back for a time that is long enough for others to wake: a shorter one would restart
//! their 5 ms, and the spawner would be back before them. If it was the GIL, they use some of that time;
//! one that uses none sleeps, and is asked again only after a [number](ASLEEP) of looks. As long as it does
//! not help, the spawner looks after longer times and stands back for longer, in the same proportion, so
//! that it keeps most of its rate in any case. Tasks that finish say nothing of that: with many workers
//! there are always others that run what is spawned, and a body in the middle starves beside them. With
//! one worker, whom nobody observes, they are what there is: the spawner stands back if none finished
//! since it looked last.
//!
//! Without a GIL none of this is done.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use charioteer::Width;
use charioteer::machine::cpus::unpinned;
use pyo3::prelude::*;

use crate::gateway::{self, Site};
use crate::interp::Core;

/// The time between two looks of the observer.
const TICK: Duration = Duration::from_millis(2);
/// How many looks without a session let the observer sleep.
const QUIET: u32 = 10;
/// How many looks without a task that finished open the gate: bodies may wait for one that has no
/// room, in ways that use processor time.
const STUCK: u32 = 50;
/// For how many looks a spawner that stands back makes what is measured say nothing.
const BESIDE: u32 = 8;
/// How many spawns pass between two looks of a spawner at the clock.
const SPAWNS: u32 = 32;
/// What passes between two looks of a spawner at the workers, at first and at most.
const LOOK: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(2));
/// How long a spawner stands back at most for workers to begin.
const START: Duration = Duration::from_millis(2);
/// How long it looks meanwhile before it sleeps between two looks, and how long it sleeps then. Short
/// tasks are gone before.
const POLL: (Duration, Duration) = (Duration::from_micros(100), Duration::from_micros(50));
/// The part of that for which it stands back.
const BACK: f64 = 0.5;
/// A thread that used less than this part of the time up waits for something.
const HUNGRY: f64 = 0.25;
/// Less than this part of the time that it was given shows that it was not the GIL.
const FED: f64 = 0.02;
/// How many looks pass over a body that sleeps.
const ASLEEP: u32 = 16;

static NUMBERS: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// The clock of this worker's thread, and the number of the observer that knows it.
    static CLOCK: RefCell<Option<(u64, Arc<Clock>)>> = const { RefCell::new(None) };
    /// What this thread saw of the workers when it looked last, in the order of the observer's clocks.
    static SEEN: RefCell<(u64, Vec<Seen>)> = const { RefCell::new((0, Vec::new())) };
    static SPAWNER: Cell<Spawner> = const { Cell::new(Spawner { spawns: 0, looked: None, noted: None, finished: 0, pace: LOOK.0 }) };
}

/// The processor clock of a thread.
struct Clock {
    id: libc::clockid_t,
    inside: AtomicBool,
    /// How many bodies the thread has begun; it alone counts.
    bodies: AtomicU64,
}

impl Clock {
    fn of_this_thread() -> Option<Self> {
        let mut id = 0;
        // SAFETY: the calling thread exists, and the place for the clock is valid.
        let error = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut id) };
        (error == 0).then_some(Self {
            id,
            inside: AtomicBool::new(false),
            bodies: AtomicU64::new(0),
        })
    }

    /// The processor time that the thread used up; nothing if it has ended.
    fn now(&self) -> Option<Duration> {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the place for the time is valid; a clock of a thread that has ended is refused.
        let error = unsafe { libc::clock_gettime(self.id, &raw mut time) };
        let seconds = u64::try_from(time.tv_sec).ok()?;
        let nanoseconds = u32::try_from(time.tv_nsec).ok()?;
        (error == 0).then(|| Duration::new(seconds, nanoseconds))
    }
}

/// What a thread that spawns remembers.
#[derive(Clone, Copy)]
struct Spawner {
    spawns: u32,
    looked: Option<Instant>,
    /// When the first of two looks was, if the second is due.
    noted: Option<Instant>,
    finished: u64,
    pace: Duration,
}

/// What a spawner saw of a worker.
#[derive(Clone, Copy, Default)]
struct Seen {
    bodies: u64,
    /// The processor time of its thread, if it is in a body that was seen before.
    used: Option<Duration>,
    /// It is what the spawner stands back for.
    hungry: bool,
    /// Looks that pass over it.
    asleep: u32,
}

/// See the module.
pub struct Gil {
    /// With one worker there is nothing to observe.
    observer: Option<Arc<Observer>>,
    /// There is one.
    on: bool,
    /// Nobody said how many workers may compete for it.
    ours: bool,
}

struct Observer {
    number: u64,
    workers: usize,
    engine: Mutex<Weak<Core>>,
    clocks: Mutex<Vec<Arc<Clock>>>,
    inside: AtomicUsize,
    awake: AtomicBool,
    changes: AtomicU64,
    /// How often a spawner stood back.
    stands: AtomicU64,
    closed: Mutex<bool>,
    bell: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gil {
    /// `on`: there is a GIL. `ours`: nobody said how many of the `workers` may compete for it.
    pub fn new(workers: usize, on: bool, ours: bool) -> Self {
        let observer = (on && ours && workers > 1).then(|| {
            Arc::new(Observer {
                number: NUMBERS.fetch_add(1, Ordering::Relaxed),
                workers,
                engine: Mutex::new(Weak::new()),
                clocks: Mutex::new(Vec::new()),
                inside: AtomicUsize::new(0),
                awake: AtomicBool::new(false),
                changes: AtomicU64::new(0),
                stands: AtomicU64::new(0),
                closed: Mutex::new(false),
                bell: Condvar::new(),
                thread: Mutex::new(None),
            })
        });
        Self { observer, on, ours }
    }

    /// Whether there is one.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// The engine whose workers are observed.
    pub fn observe(&self, engine: &Arc<Core>) {
        if let Some(observer) = &self.observer {
            *lock(&observer.engine) = Arc::downgrade(engine);
        }
    }

    /// How often the width changed.
    pub fn changes(&self) -> u64 {
        self.observer
            .as_ref()
            .map_or(0, |observer| observer.changes.load(Ordering::Relaxed))
    }

    /// Calls `run`, which is a session of this thread.
    #[inline]
    pub fn session(&self, run: impl FnOnce()) {
        let Some(observer) = &self.observer else {
            return run();
        };
        let clock = observer.clock();
        let set = |inside| {
            if let Some(clock) = &clock {
                clock.inside.store(inside, Ordering::Relaxed);
            }
        };
        set(true);
        if observer.inside.fetch_add(1, Ordering::SeqCst) != 0
            && !observer.awake.load(Ordering::SeqCst)
        {
            observer.awaken();
        }
        run();
        observer.inside.fetch_sub(1, Ordering::Relaxed);
        set(false);
    }

    /// A body begins, or goes on, on this thread.
    #[inline]
    pub fn began(&self) {
        if self.observer.is_some() {
            CLOCK.with(|known| {
                if let Some((_, clock)) = &*known.borrow() {
                    let bodies = clock.bodies.load(Ordering::Relaxed);
                    clock.bodies.store(bodies + 1, Ordering::Relaxed);
                }
            });
        }
    }

    /// A task was spawned by this thread, which is attached and may stand back now.
    #[inline]
    pub fn spawned(&self, py: Python<'_>, engine: &Arc<Core>) {
        if !(self.on && self.ours) {
            return;
        }
        let mut spawner = SPAWNER.get();
        spawner.spawns = spawner.spawns.wrapping_add(1);
        if spawner.spawns.is_multiple_of(SPAWNS) {
            spawner.look(py, engine, self.observer.as_deref());
        }
        SPAWNER.set(spawner);
    }

    /// Tells the observer to end.
    pub fn abandon(&self) {
        if let Some(observer) = &self.observer {
            *lock(&observer.closed) = true;
            observer.bell.notify_all();
        }
    }

    /// Ends the observer, unless it has ended since it was told to.
    pub fn close(&self, py: Python<'_>) {
        self.abandon();
        let Some(observer) = &self.observer else {
            return;
        };
        let thread = lock(&observer.thread).take();
        if let Some(thread) = thread {
            let ended = if thread.is_finished() {
                thread.join()
            } else {
                // It may be about to start a thread, for which it attaches.
                gateway::detach(py, Site::Wait, || thread.join())
            };
            if ended.is_err() {
                eprintln!("charioteer: the observer of the GIL panicked");
            }
        }
    }
}

impl Spawner {
    fn look(&mut self, py: Python<'_>, engine: &Arc<Core>, observer: Option<&Observer>) {
        let now = Instant::now();
        let rested = self.looked.map(|looked| now.duration_since(looked));
        if rested.is_some_and(|rested| rested < self.pace) {
            return;
        }
        let stands = || {
            if let Some(observer) = observer {
                observer.stands.fetch_add(1, Ordering::Relaxed);
            }
        };
        if rested.is_none_or(|rested| rested >= 8 * self.pace) {
            // It begins to spawn: others wake up, and each has to be attached to begin.
            if engine.is_starting() {
                stands();
                gateway::detach(py, Site::StandBack, || {
                    while engine.is_starting() && now.elapsed() < START {
                        if now.elapsed() < POLL.0 {
                            std::thread::yield_now();
                        } else {
                            std::thread::sleep(POLL.1);
                        }
                    }
                });
            }
            return self.looked(engine, LOOK.0);
        }
        // Its own session, if it is a body.
        let others = engine.sessions() - usize::from(engine.is_worker()).min(engine.sessions());
        let noted = self.noted.take();
        let hungry = match (others, observer, noted) {
            (0, ..) => false,
            (_, None, _) => engine.counts().finished == self.finished,
            (_, Some(observer), None) => {
                observer.note();
                self.noted = Some(Instant::now());
                return;
            }
            (_, Some(observer), Some(noted)) => observer.hungry(now.duration_since(noted)),
        };
        if !hungry {
            return self.looked(engine, LOOK.0);
        }
        stands();
        let back = self.pace.mul_f64(BACK);
        gateway::detach(py, Site::StandBack, || std::thread::sleep(back));
        let helped = observer.is_some_and(|observer| observer.fed(back));
        let next = if helped {
            LOOK.0
        } else {
            (2 * self.pace).min(LOOK.1)
        };
        self.looked(engine, next);
    }

    /// The next look is after `pace`.
    fn looked(&mut self, engine: &Core, pace: Duration) {
        *self = Self {
            spawns: self.spawns,
            looked: Some(Instant::now()),
            noted: None,
            finished: engine.counts().finished,
            pace,
        };
    }
}

impl Observer {
    /// The clock of this thread, which the observer knows from now on.
    fn clock(&self) -> Option<Arc<Clock>> {
        CLOCK.with(|known| {
            let mut known = known.borrow_mut();
            match &*known {
                Some((number, clock)) if *number == self.number => Some(Arc::clone(clock)),
                _ => {
                    let clock = Arc::new(Clock::of_this_thread()?);
                    lock(&self.clocks).push(Arc::clone(&clock));
                    *known = Some((self.number, Arc::clone(&clock)));
                    Some(clock)
                }
            }
        })
    }

    /// Calls `look` with each worker's clock and what this thread saw of it.
    fn each(&self, mut look: impl FnMut(&Clock, &mut Seen)) {
        SEEN.with_borrow_mut(|(number, seen)| {
            if *number != self.number {
                *number = self.number;
                seen.clear();
            }
            let clocks = lock(&self.clocks);
            seen.resize(clocks.len(), Seen::default());
            for (clock, seen) in clocks.iter().zip(seen) {
                look(clock, seen);
            }
        });
    }

    /// Reads the clocks of the workers in sessions, but for this thread's own.
    fn note(&self) {
        let own = CLOCK.with(|known| known.borrow().as_ref().map(|(_, clock)| Arc::as_ptr(clock)));
        self.each(|clock, seen| {
            let bodies = clock.bodies.load(Ordering::Relaxed);
            if bodies != seen.bodies {
                *seen = Seen::default();
            }
            seen.bodies = bodies;
            let is_other = own != Some(std::ptr::from_ref(clock));
            seen.used = (is_other && clock.inside.load(Ordering::Relaxed))
                .then(|| clock.now())
                .flatten();
        });
    }

    /// Whether a worker in a session waited for something since they were read, a time ago, in the
    /// same body or before its first.
    fn hungry(&self, apart: Duration) -> bool {
        let mut any = false;
        self.each(|clock, seen| {
            let same = clock.inside.load(Ordering::Relaxed)
                && clock.bodies.load(Ordering::Relaxed) == seen.bodies;
            let before = seen.used.take().filter(|_| same);
            let Some((before, now)) = before.zip(clock.now()) else {
                return;
            };
            let waits = now.saturating_sub(before) < apart.mul_f64(HUNGRY);
            seen.used = Some(now);
            seen.hungry = waits && seen.asleep == 0;
            seen.asleep = seen.asleep.saturating_sub(1);
            any |= seen.hungry;
        });
        any
    }

    /// Whether one that this thread stood back for used some of that time.
    fn fed(&self, back: Duration) -> bool {
        SEEN.with_borrow_mut(|(_, seen)| {
            let clocks = lock(&self.clocks);
            let mut any = false;
            for (clock, seen) in clocks.iter().zip(seen) {
                if !std::mem::take(&mut seen.hungry) {
                    continue;
                }
                let now = clock.now();
                let used = match (seen.used, now) {
                    (Some(before), Some(now)) => now.saturating_sub(before),
                    _ => Duration::ZERO,
                };
                if used < back.mul_f64(FED) {
                    seen.asleep = ASLEEP;
                } else {
                    any = true;
                }
                seen.used = now;
            }
            any
        })
    }

    #[cold]
    fn awaken(self: &Arc<Self>) {
        let closed = lock(&self.closed);
        if *closed || self.awake.swap(true, Ordering::SeqCst) {
            return;
        }
        let mut thread = lock(&self.thread);
        if thread.is_none() {
            let observer = Arc::clone(self);
            // Without the thread the width stays as it is, and all tasks run as well.
            let builder = std::thread::Builder::new().name("charioteer-gil".to_owned());
            *thread = unpinned(|| builder.spawn(move || observer.main())).ok();
        }
        drop(thread);
        drop(closed);
        self.bell.notify_all();
    }

    fn main(&self) {
        let mut closed = lock(&self.closed);
        while !*closed {
            if self.awake.load(Ordering::Relaxed) {
                closed = self.watch(closed);
            } else {
                closed = self
                    .bell
                    .wait(closed)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Finds the width, until nothing is left to observe.
    fn watch<'a>(&'a self, mut closed: MutexGuard<'a, bool>) -> MutexGuard<'a, bool> {
        let mut width = Width::new(self.workers);
        let mut clocks: Vec<(Arc<Clock>, Option<Duration>)> = Vec::new();
        let mut quiet = 0;
        let mut stuck = (0, 0);
        let mut before = (Instant::now(), 0);
        let mut beside = (self.stands.load(Ordering::Relaxed), false, 0);
        while quiet < QUIET {
            (closed, _) = self
                .bell
                .wait_timeout(closed, TICK)
                .unwrap_or_else(PoisonError::into_inner);
            if *closed {
                return closed;
            }
            drop(closed);
            let Some(engine) = lock(&self.engine).upgrade() else {
                return lock(&self.closed);
            };
            let now = Instant::now();
            let used = self.used(&mut clocks);
            let rate = used.as_secs_f64() / now.duration_since(before.0).as_secs_f64();
            let inside = engine.sessions();
            let between = (before.1.min(inside), before.1.max(inside));
            let finished = engine.counts().finished;
            stuck = if finished == stuck.1 {
                (stuck.0 + 1, finished)
            } else {
                (0, finished)
            };
            let stands = self.stands.load(Ordering::Relaxed);
            let (is_beside, was_beside) = (stands != beside.0, beside.1);
            beside = (stands, is_beside, if is_beside { beside.2 + 1 } else { 0 });
            let former = width.width();
            let wanted = if stuck.0 == STUCK {
                stuck.0 = 0;
                width = Width::new(self.workers);
                width.width()
            } else if is_beside != was_beside || (1..BESIDE).contains(&beside.2) {
                width.disturbed()
            } else {
                width.measured(rate, between)
            };
            if wanted != former {
                self.changes.fetch_add(1, Ordering::Relaxed);
                engine.set_width(wanted);
            }
            before = (now, inside);
            quiet = if inside == 0 { quiet + 1 } else { 0 };
            closed = lock(&self.closed);
        }
        self.awake.store(false, Ordering::SeqCst);
        if self.inside.load(Ordering::SeqCst) > 1 {
            // Somebody came while it looked away, and took it for awake.
            self.awake.store(true, Ordering::SeqCst);
        }
        drop(closed);
        if let Some(engine) = lock(&self.engine).upgrade() {
            engine.set_width(self.workers);
        }
        lock(&self.closed)
    }

    /// The processor time that threads in sessions used up since the last call.
    fn used(&self, clocks: &mut Vec<(Arc<Clock>, Option<Duration>)>) -> Duration {
        let known = lock(&self.clocks);
        for clock in &known[clocks.len()..] {
            clocks.push((Arc::clone(clock), None));
        }
        drop(known);
        let mut used = Duration::ZERO;
        for (clock, before) in clocks {
            let now = clock
                .inside
                .load(Ordering::Relaxed)
                .then(|| clock.now())
                .flatten();
            if let (Some(before), Some(now)) = (*before, now) {
                used += now.saturating_sub(before);
            }
            *before = now;
        }
        used
    }
}
