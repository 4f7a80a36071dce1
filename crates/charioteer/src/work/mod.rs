//! The threads that run tasks.
//!
//! # Protocol
//!
//! A worker parks until [`Places`] assign it something. With an ordinary place it opens one session
//! of its domain (attaches to the interpreter), if the gate has room, and runs ready tasks in it until
//! there are none, the gate is crowded or somebody is owed its place; tasks that need no session it
//! runs between sessions. With an unusual grant it runs the one task that the grant is for.
//! Then it gives the grant back and parks. Between the last task and parking it looks at the queues
//! for a few microseconds, detached: handing a task to a thread that is awake costs a fraction of a
//! wake-up. It yields between two looks, since who would give it a task, or waits for the one that it
//! has run, may have been put on the same core.
//!
//! A thread that runs no tasks and waits for one looks in the same way before it blocks, as long as
//! blocking would take, if that task is about to run or runs. If it is one on devices, whose end takes more
//! wake-ups than that, the thread looks for as long as it waited the last time, if that was short. Both look without any right or duty:
//! they only read, and who has looked in vain parks or blocks by the protocol of [`Places`] or of the
//! latch, as if it had not looked. So no wake-up can be lost by that.
//!
//! What the tasks that need no session put off handing to devices, so that a driver gets it together, goes
//! there when there are no more of them (see `machine::deferred`).
//!
//! Workers that are not pinned keep [`Apart`] while they compute: each looks where it is before a task,
//! except in sessions that exclude each other.
//!
//! A thread has at most one [`Worker`], found through a thread-local pointer, so that what is called
//! from a body (a spawn, a wait) finds the queue and the grant of its thread. A body that waits for
//! a task without a time limit runs it on the spot if it is ready, and nothing else, so that no wait
//! takes longer than what it waits for (no contagious delay); else it gives its grant up and blocks.
//!
//! A body below another one on a stack goes on when that one is done: it waits for it, without a
//! latch. That costs nothing while nothing blocks. Before a body blocks, every pair on its stack gets
//! the latch that it did without, so that the search for cycles sees those waits like all others.
//!
//! In a runtime without workers the thread that spawns is the worker, for as long as something is
//! ready. What another thread makes ready (it wakes a future, or cancels) is run by the threads that
//! wait for tasks, which are nudged for it, or by the next spawn.
//!
//! A body that waits there has others run on top of it, and goes on when these are over. If one of them
//! waits for what comes after the body below, that is a cycle of the stack, which the graph has not. Where
//! a body of the user's waits that cannot be helped. The runtime's own, the end of a reduction, waits for
//! copies alone, of what tasks wrote that are done: these need the devices, and nobody's body. So it
//! [holds](hold) its thread and runs nothing, like a body that computes.
//!
//! [`Places`]: crate::schedule::places::Places
//! [`Apart`]: crate::machine::cpus::Apart

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::{Answer, Engine, Running, WaitError, is_on_devices};
use crate::machine::cpus::NOWHERE;
use crate::machine::{at_once, deferring};
use crate::schedule::map::DISTURBED;
use crate::schedule::places::{Assignment, Grant};
use crate::schedule::queues::{Lane, Own};
use crate::sync::{Ordering, assert_unlocked, perturb, yield_now};
use crate::task::state::{BLOCKED, CANCEL, WOKEN};
use crate::task::{
    Content, Domain, End, Latch, Link, Need, Phase, Step, Task, TaskRef, Until, Waker,
};
use crate::trace::Event;

/// How deep waits may run what they wait for on their own stack.
const DEPTH: u32 = 32;

/// How often a worker looks at the queues again before it parks; a few microseconds in all. A model
/// gains nothing by a second look.
const LOOKS: u32 = if cfg!(loom) { 1 } else { 20 };

/// How long a thread that runs no tasks looks whether the one that it waits for has ended, before it
/// blocks: what blocking and being woken takes.
const LOOK_FOR: Duration = Duration::from_micros(if cfg!(loom) { 0 } else { 30 });

/// For how long a wait for a task on devices it looks the next time, and how much longer than that wait was.
const SHORT: Duration = Duration::from_micros(if cfg!(loom) { 0 } else { 250 });
const LONGER: Duration = Duration::from_micros(50);

/// How long it lets the worker that ended the task leave its session.
const LEAVE: Duration = Duration::from_micros(if cfg!(loom) { 0 } else { 5 });

/// How many tasks of one lane a thread runs before it looks at the other.
const TURN: u32 = 32;

/// The body of a task waits, so that its time says nothing.
pub(crate) fn disturb<D: Domain>(task: &Task<D>) {
    if let Some(mapping) = task.mapping() {
        mapping.note(DISTURBED);
    }
}

/// Passes the time between two looks. What is looked for may come from a thread that the system put
/// on the same core; it gets that core.
fn pause() {
    for _ in 0..8 {
        std::hint::spin_loop();
    }
    if !cfg!(loom) {
        yield_now();
    }
}

crate::sync::thread_local! {
    /// The engine (its number) and the worker of this thread.
    static CURRENT: Cell<(u32, *const ())> = const { Cell::new((0, std::ptr::null())) };
    /// How long this thread, which ran no task, waited for one on devices the last time.
    static WAITED: Cell<Duration> = const { Cell::new(Duration::MAX) };
}

/// A body on the stack of a thread, and the one on top of it that it waits for.
struct Frame<D: Domain> {
    below: *const TaskRef<D>,
    above: *const TaskRef<D>,
    /// What stands for the wait in the graph, once something on the stack has blocked.
    latch: Option<Arc<Latch<D>>>,
}

/// A thread of an engine, while it runs tasks.
pub(crate) struct Worker<D: Domain> {
    pub(crate) engine: Arc<Engine<D>>,
    /// Its number among the threads; threads of others, which run tasks while they wait, have none.
    slot: Option<usize>,
    pub(crate) own: Own<D>,
    grant: RefCell<Grant>,
    /// Whether it counts among the sessions of its engine.
    inside: Cell<bool>,
    /// The processor that it computes on, where workers are kept apart.
    seat: Cell<u32>,
    running: Cell<*const TaskRef<D>>,
    depth: Cell<u32>,
    frames: RefCell<Vec<Frame<D>>>,
    /// What bodies on this stack, in a runtime without workers, asked for again after a wait.
    returning: RefCell<Vec<Arc<Answer<D>>>>,
}

impl<D: Domain> Worker<D> {
    /// The main function of thread `slot`.
    pub(crate) fn main(engine: Arc<Engine<D>>, slot: usize) {
        let own = engine.queues.own(slot);
        let worker = Self {
            engine,
            slot: Some(slot),
            own,
            grant: RefCell::default(),
            inside: Cell::new(false),
            seat: Cell::new(NOWHERE),
            running: Cell::new(std::ptr::null()),
            depth: Cell::new(0),
            frames: RefCell::default(),
            returning: RefCell::default(),
        };
        let abort = AbortOnUnwind;
        if let Some(apart) = &worker.engine.apart {
            apart.start(slot);
        }
        worker.enter(|| {
            loop {
                match worker.engine.places.assignment(slot) {
                    Assignment::Exit => {
                        worker.engine.places.close().ring();
                        break;
                    }
                    Assignment::Search(grant) => {
                        worker.hold(grant);
                        worker.search(slot);
                    }
                    Assignment::Run(task, grant) => {
                        worker.hold(grant);
                        if task.needs_session() {
                            worker.engine.sessions.return_to();
                            worker.in_session(|| worker.claim_and_run(&task));
                            worker.engine.sessions.leave();
                        } else {
                            worker.claim_and_run(&task);
                        }
                        drop(task);
                        worker.retire(slot, false);
                    }
                }
            }
        });
        std::mem::forget(abort);
    }

    /// Runs what is ready on the calling thread, which is no worker, until there is nothing.
    pub(crate) fn drain(engine: &Arc<Engine<D>>) {
        let worker = Self {
            engine: Arc::clone(engine),
            slot: None,
            own: engine.queues.own(usize::MAX),
            grant: RefCell::new(Grant {
                cores: vec![0],
                part: None,
            }),
            inside: Cell::new(false),
            seat: Cell::new(NOWHERE),
            running: Cell::new(std::ptr::null()),
            depth: Cell::new(0),
            frames: RefCell::default(),
            returning: RefCell::default(),
        };
        let abort = AbortOnUnwind;
        engine.places.visit();
        worker.enter(|| {
            engine.domain.session(&mut || {
                while let Some(task) = engine.queues.pop_any(&worker.own) {
                    worker.claim_and_run(&task);
                }
            });
        });
        engine.places.leave();
        engine.went_quiet();
        std::mem::forget(abort);
    }

    fn enter(&self, run: impl FnOnce()) {
        struct Restore((u32, *const ()));
        impl Drop for Restore {
            fn drop(&mut self) {
                CURRENT.with(|current| current.set(self.0));
            }
        }
        let _restore = Restore(CURRENT.with(Cell::get));
        CURRENT.with(|current| current.set((self.engine.id, std::ptr::from_ref(self).cast())));
        run();
    }

    /// Calls `f` with the worker that this thread is for `engine`, if it is one.
    #[inline]
    pub(crate) fn with<R>(engine: u32, f: impl FnOnce(Option<&Self>) -> R) -> R {
        let (id, worker) = CURRENT.with(Cell::get);
        if id != engine || worker.is_null() {
            return f(None);
        }
        // SAFETY: `enter` set the pointer to a worker that lives on this thread's stack until it
        // takes the pointer back; engines' numbers are unique in the process, so a matching number
        // means that the worker is one of this domain.
        f(Some(unsafe { &*worker.cast::<Self>() }))
    }

    /// This worker holds these cores from now on, and keeps to them if workers are pinned.
    fn hold(&self, grant: Grant) {
        if let Some(pins) = &self.engine.pins {
            match grant.part {
                Some((core, _)) => pins.hold(&[core]),
                None => pins.hold(&grant.cores),
            }
        }
        self.grant.replace(grant);
    }

    /// The cores that this thread holds.
    pub(crate) fn grant(&self) -> Grant {
        self.grant.borrow().clone()
    }

    /// The task whose body runs on this thread.
    pub(crate) fn running(&self) -> Option<&TaskRef<D>> {
        // SAFETY: set by `run` to a reference that outlives the call of the body, and taken back
        // before it ends; the thread is inside that call when anybody asks.
        unsafe { self.running.get().as_ref() }
    }

    /// Takes ready tasks with an ordinary place until there are none.
    fn search(&self, slot: usize) {
        let mut searching = true;
        let mut yielded = false;
        while !yielded && self.look() {
            yielded = self.take_outside(&mut searching) || self.take_inside(&mut searching);
            if !yielded && !searching {
                // Whoever makes something ready now need wake nobody: this thread is awake, and looks.
                searching = true;
                self.engine.places.seek();
            }
            // Now, and not only when it has looked for more.
            self.engine.went_quiet();
        }
        self.stand_up();
        self.retire(slot, searching);
    }

    /// Keeps apart from the other workers, to compute.
    #[inline]
    fn sit_down(&self) {
        if let Some(apart) = &self.engine.apart {
            apart.sit(&self.seat);
        }
    }

    /// Its processor is no longer its own.
    fn stand_up(&self) {
        if let Some(apart) = &self.engine.apart {
            apart.stand_up(&self.seat);
        }
    }

    /// Runs some of the tasks that need no session. True if the place is to be given up.
    fn take_outside(&self, searching: &mut bool) -> bool {
        let queues = &self.engine.queues;
        deferring(|| {
            for _ in 0..TURN {
                let Some(task) = queues.pop(&self.own, Lane::Outside) else {
                    return false;
                };
                self.sit_down();
                if self.take(task, searching) {
                    return true;
                }
            }
            false
        })
    }

    /// Runs the tasks that need a session in one, if there is room. True if the place is to be given
    /// up.
    fn take_inside(&self, searching: &mut bool) -> bool {
        let Engine {
            queues, sessions, ..
        } = &*self.engine;
        if !queues.has_work_in(Lane::Inside) || !sessions.enter() {
            return false;
        }
        let excluded = self.engine.domain.sessions_exclude();
        if excluded {
            self.stand_up();
        }
        let mut yielded = false;
        self.in_session(|| {
            let mut turns = 0;
            while let Some(task) = queues.pop(&self.own, Lane::Inside) {
                if !excluded {
                    self.sit_down();
                }
                yielded = self.take(task, searching);
                turns += 1;
                let others = (turns >= TURN && queues.has_work_in(Lane::Outside))
                    || queues.has_urgent(Lane::Outside);
                if yielded || others || sessions.is_crowded() {
                    break;
                }
            }
        });
        sessions.leave();
        yielded
    }

    fn in_session(&self, mut run: impl FnMut()) {
        self.inside.set(true);
        self.engine.domain.session(&mut run);
        self.inside.set(false);
    }

    /// Runs a task from the queues. True if the place is to be given up.
    #[inline]
    fn take(&self, task: TaskRef<D>, searching: &mut bool) -> bool {
        let engine = &self.engine;
        if *searching {
            *searching = false;
            engine.places.found();
            // Pass the wake-up on: where one task was, more may be.
            engine.wake();
        }
        if engine.places.is_owed() {
            let todo = engine.places.starts(!engine.queues.has_work());
            engine.carry_out(todo);
        }
        self.claim_and_run(&task);
        drop(task);
        engine.places.is_owed() && engine.places.boundary()
    }

    /// Whether there is a task to take, now or within a few microseconds.
    fn look(&self) -> bool {
        for _ in 0..LOOKS {
            if self.engine.is_runnable() {
                return true;
            }
            pause();
        }
        false
    }

    fn retire(&self, slot: usize, searching: bool) {
        let engine = &self.engine;
        let grant = self.grant.take();
        let idle = !engine.queues.has_work();
        let todo = engine.places.retire(slot, grant, searching, idle);
        engine.carry_out(todo);
        // The sleeper's half of the wake-up protocol, see `schedule::places`.
        engine.wake();
        engine.went_quiet();
    }

    /// Wins a ready task, unless somebody else did or it was cancelled, and runs it.
    #[inline]
    fn claim_and_run(&self, task: &TaskRef<D>) {
        if task.state.advance(Phase::Ready, Phase::Running).is_ok() {
            if self.engine.is_cancelling() && self.engine.skip_cancelled(task) {
                return;
            }
            if is_on_devices(task) {
                self.engine.log_cores(task, &self.grant.borrow());
                if !self.engine.take_off(task) {
                    return;
                }
            }
            self.run(task);
        } else if is_on_devices(task) {
            // Cancelled after its devices were granted, or before.
            self.engine.return_loan(task);
        }
    }

    /// Runs or resumes a task that this thread owns.
    fn run(&self, task: &TaskRef<D>) {
        let engine = &self.engine;
        engine.record(Event::Start, task);
        if let Some(limit) = task.options().and_then(|options| options.timeout) {
            engine.begin_attempt(task, limit);
        }
        let clock = engine.start_clock(task);
        loop {
            perturb();
            assert_unlocked();
            if task.state.load().has(WOKEN) {
                task.state.clear(WOKEN);
            }
            let outer = self.running.replace(task);
            let step = {
                let running = Running::new(engine, task, self);
                task.content.with_mut(|content| {
                    // SAFETY: this thread owns the running task, and others look at the content
                    // only after `Done`.
                    match unsafe { &mut *content } {
                        Content::Body(body) => {
                            if engine.domain.only_enqueues(body) {
                                engine.domain.run(&running, body)
                            } else {
                                at_once(|| engine.domain.run(&running, body))
                            }
                        }
                        Content::Nothing | Content::Outcome(_) => {
                            unreachable!("a running task has its body")
                        }
                    }
                })
            };
            self.running.set(outer);
            match step {
                Step::Done(result) => {
                    if let Some(start) = clock {
                        Engine::stop_clock(task, start);
                    }
                    engine.end_attempt(task, result);
                    return;
                }
                Step::Elsewhere => return,
                Step::Sleep => {
                    disturb(task);
                    self.pass_on_request(task);
                    engine.pause(task);
                    if engine.sleep(task) || engine.requeue(task) {
                        return;
                    }
                    // Woken, or asked to end, meanwhile.
                }
                Step::Await(targets, until) => {
                    disturb(task);
                    self.pass_on_request(task);
                    engine.pause(task);
                    if engine.suspend(task, targets, until) || engine.requeue(task) {
                        return;
                    }
                    // Asked to end meanwhile: the body is to hear of it.
                }
            }
        }
    }

    /// A body that is about to suspend while all tasks are being cancelled hears of it first.
    fn pass_on_request(&self, task: &TaskRef<D>) {
        if self.engine.is_cancelling() {
            task.state.set(CANCEL);
        }
    }

    /// Runs `task` here and now if it is ready and this thread may.
    fn run_inline(&self, task: &TaskRef<D>) {
        if self.depth.get() >= DEPTH || task.phase() != Phase::Ready || !self.engine.owns(task) {
            return;
        }
        // Who has devices lends its share before anybody runs for it.
        if self.running().is_some_and(|waiting| is_on_devices(waiting)) {
            return;
        }
        let ordinary = task.needs() == Need::Core;
        if !ordinary || !(self.slot.is_none() || self.grant.borrow().is_ordinary()) {
            return;
        }
        self.depth.set(self.depth.get() + 1);
        self.nest(task);
        self.depth.set(self.depth.get() - 1);
    }

    /// Runs a ready task on top of the body that waits, if one does.
    fn nest(&self, task: &TaskRef<D>) {
        let below = self.running.get();
        if below.is_null() {
            return self.claim_and_run(task);
        }
        self.frames.borrow_mut().push(Frame {
            below,
            above: std::ptr::from_ref(task),
            latch: None,
        });
        self.claim_and_run(task);
        let frame = self.frames.borrow_mut().pop();
        if let Some(Frame {
            latch: Some(latch), ..
        }) = frame
        {
            if latch.give_up() {
                abandon(&latch, std::slice::from_ref(task));
            }
            if let Some(below) = self.running() {
                below.state.clear(BLOCKED);
            }
        }
    }

    /// Puts the waits on this stack into the graph.
    fn show_frames(&self) {
        for frame in self.frames.borrow_mut().iter_mut() {
            if frame.latch.is_some() {
                continue;
            }
            // SAFETY: both point to references that outlive the calls on this stack to which the
            // frame belongs, and the frame is taken off before they return.
            let (below, above) = unsafe { (&*frame.below, &*frame.above) };
            below.state.set(BLOCKED);
            let latch = Latch::new(1, Until::All, Waker::Thread(Some(Arc::clone(below))));
            // A task that is done by now is waited for no more.
            if above.link(Link::Latch(Arc::clone(&latch))).is_ok() {
                frame.latch = Some(latch);
            } else {
                below.state.clear(BLOCKED);
            }
        }
    }

    /// The wait of a body, or of anybody in a runtime without workers.
    pub(crate) fn wait(
        &self,
        tasks: &[TaskRef<D>],
        until: Until,
        deadline: Option<Instant>,
    ) -> Result<bool, WaitError> {
        let engine = &self.engine;
        if let Some(waiting) = self.running() {
            disturb(waiting);
        }
        if until == Until::All && deadline.is_none() {
            for task in tasks {
                self.run_inline(task);
            }
        }
        if is_over(tasks, until) {
            return Ok(true);
        }
        if engine.workers == 0 {
            self.wait_alone(tasks, until, deadline)
        } else {
            self.block(tasks, until, deadline)
        }
    }

    /// The wait in a runtime without workers. No body on this stack has a share of devices meanwhile.
    fn wait_alone(
        &self,
        tasks: &[TaskRef<D>],
        until: Until,
        deadline: Option<Instant>,
    ) -> Result<bool, WaitError> {
        let engine = &self.engine;
        let waiting = self.running();
        if let Some(waiting) = waiting {
            engine.pause(waiting);
        }
        let mut withdrawn = self.returning.borrow().clone();
        withdrawn.retain(|answer| engine.withdraw(answer));
        // Nobody else runs what the awaited tasks need.
        while !is_over(tasks, until)
            && let Some(task) = engine.queues.pop_any(&self.own)
        {
            self.nest(&task);
        }
        let result = if is_over(tasks, until) {
            Ok(true)
        } else {
            self.block(tasks, until, deadline)
        };
        if let Some(waiting) = waiting {
            engine.regain(waiting, |answer, latch| {
                self.returning.borrow_mut().push(Arc::clone(answer));
                self.help_until(latch, None);
                self.returning.borrow_mut().pop();
            });
        }
        withdrawn
            .iter()
            .for_each(|answer| Engine::claim_again(answer));
        result
    }

    /// Blocks on a latch in a runtime without workers, and runs meanwhile what becomes ready.
    fn help_until(&self, latch: &Arc<Latch<D>>, deadline: Option<Instant>) {
        let engine = &self.engine;
        let help = || {
            // Not stuck meanwhile, though its wait goes on.
            engine.places.visit();
            while !latch.is_open()
                && let Some(task) = engine.queues.pop_any(&self.own)
            {
                self.nest(&task);
            }
            engine.places.leave();
        };
        block_alone(engine, latch, deadline, help);
    }

    /// Blocks, as the body that runs on this thread if one does.
    fn block(
        &self,
        tasks: &[TaskRef<D>],
        until: Until,
        deadline: Option<Instant>,
    ) -> Result<bool, WaitError> {
        let engine = &self.engine;
        let waiting = self.running();
        if let Some(waiting) = waiting {
            waiting.state.set(BLOCKED);
        }
        let waiter = waiting.filter(|_| deadline.is_none()).cloned();
        let for_ever = waiter.is_some();
        let loose = if for_ever {
            self.show_frames();
            engine.count_loose(tasks)
        } else {
            0
        };
        let latch = Latch::new(tasks.len(), until, Waker::Thread(waiter));
        let mut result = engine.watch(&latch, tasks, waiting);
        if result.is_ok() && !latch.is_open() {
            result = self
                .give_place_up(&latch, for_ever, deadline)
                .map_err(|()| {
                    let chain = waiting.into_iter().chain(tasks);
                    WaitError::Threads(chain.map(|task| task.label().to_string()).collect())
                });
        }
        let opened = !latch.give_up();
        if !opened && latch.is_counted() {
            engine.places.uncount_blocked();
        }
        if !opened || until != Until::All {
            abandon(&latch, tasks);
        }
        engine.loose_waits.fetch_sub(loose, Ordering::SeqCst);
        if let Some(waiting) = waiting {
            waiting.state.clear(BLOCKED);
        }
        result.map(|()| opened)
    }

    /// Blocks on `latch`, with the grant of this thread given up. `Err` if no thread is left that
    /// could run anything meanwhile.
    fn give_place_up(
        &self,
        latch: &Arc<Latch<D>>,
        for_ever: bool,
        deadline: Option<Instant>,
    ) -> Result<(), ()> {
        let engine = &self.engine;
        let count = || {
            if for_ever && latch.count() {
                engine.places.count_blocked();
            }
        };
        if self.slot.is_none() {
            count();
            engine.went_quiet();
            self.help_until(latch, deadline);
            return Ok(());
        }
        let grant = self.grant.borrow().clone();
        let waiting = self.running();
        if let Some(waiting) = waiting {
            // Before somebody else has them.
            engine.log_cores_left(waiting);
        }
        let Ok(todo) = engine.places.block(&grant, engine.queues.has_work()) else {
            if let Some(waiting) = waiting {
                engine.log_cores(waiting, &grant);
            }
            return Err(());
        };
        let replaced = engine.carry_out(todo);
        let mut granted = Grant::default();
        let inside = self.inside.get();
        engine.domain.blocking(&mut || {
            if replaced {
                self.stand_up();
                // Its session is another's, as long as it waits.
                if inside {
                    engine.sessions.leave();
                }
                engine.wake();
                if let Some(waiting) = waiting {
                    engine.pause(waiting);
                }
                count();
                engine.went_quiet();
                latch.block(deadline, || false);
                if let Some(waiting) = waiting {
                    // Before it asks for its place: who has the share may need one to end.
                    engine.regain(waiting, |_, latch| {
                        latch.block(None, || false);
                    });
                }
            }
            granted = engine.places.unblock(&grant);
            if let Some(waiting) = waiting {
                engine.log_cores(waiting, &granted);
            }
            if replaced && inside {
                engine.sessions.return_to();
            }
        });
        self.hold(granted);
        if replaced { Ok(()) } else { Err(()) }
    }
}

/// Tasks would never have an outcome, and those who wait for them wait for ever, if a thread that
/// runs them unwound. Bodies and callbacks are the domain's to catch; what comes here is a destructor
/// of a user's value that panicked, or a bug.
struct AbortOnUnwind;

impl Drop for AbortOnUnwind {
    fn drop(&mut self) {
        // Not by a macro: what those print in a test goes with the process.
        let _ = std::io::Write::write_all(
            &mut std::io::stderr(),
            b"charioteer: a panic outside of a body cannot be survived\n",
        );
        std::process::abort();
    }
}

/// The number of the engine whose tasks this thread runs, if it does.
#[cfg(not(loom))] // for `native`, which models do without
pub(crate) fn engine_here() -> Option<u32> {
    let (id, worker) = CURRENT.with(Cell::get);
    (!worker.is_null()).then_some(id)
}

/// Whether a wait for `tasks` is over.
pub(crate) fn is_over<D: Domain>(tasks: &[TaskRef<D>], until: Until) -> bool {
    match until {
        Until::All => tasks.iter().all(|task| task.is_done()),
        Until::Any => tasks.is_empty() || tasks.iter().any(|task| task.is_done()),
        Until::FirstFailure => {
            tasks.iter().any(|task| task.is_done() && task.is_failed())
                || tasks.iter().all(|task| task.is_done())
        }
    }
}

/// Takes a latch off the tasks that it watches.
pub(crate) fn abandon<D: Domain>(latch: &Arc<Latch<D>>, tasks: &[TaskRef<D>]) {
    for task in tasks {
        if !task.is_done() {
            task.unlink(latch);
        }
    }
}

/// The wait of a thread that runs no body.
pub(crate) fn block_outside<D: Domain>(
    engine: &Arc<Engine<D>>,
    tasks: &[TaskRef<D>],
    until: Until,
    deadline: Option<Instant>,
) -> bool {
    let latch = Latch::new(tasks.len(), until, Waker::Thread(None));
    engine
        .watch(&latch, tasks, None)
        .expect("only the wait of a body can close a cycle");
    if !latch.is_open() {
        if engine.workers == 0 {
            block_alone(engine, &latch, deadline, || Worker::drain(engine));
        } else {
            let start = Instant::now();
            block_patiently(
                engine,
                &latch,
                deadline,
                || look_for(engine, &latch, tasks, start, deadline),
                || false,
            );
            if let [task] = tasks
                && is_on_devices(task)
            {
                WAITED.with(|waited| waited.set(start.elapsed()));
            }
        }
    }
    let opened = !latch.give_up();
    if !opened || until != Until::All {
        abandon(&latch, tasks);
    }
    opened
}

/// Looks, before the thread blocks on `latch`, whether the one task that it waits for ends in a
/// moment: as long as that is about to run or runs, and there is a core that nobody else would use
/// (invariant 7).
///
/// Where sessions exclude each other, who sees the latch open wants what the worker that opened it
/// still has, and would block after all. So it lets that worker leave first, if there is no more to
/// do for it.
fn look_for<D: Domain>(
    engine: &Engine<D>,
    latch: &Latch<D>,
    tasks: &[TaskRef<D>],
    start: Instant,
    deadline: Option<Instant>,
) {
    let [task] = tasks else { return };
    let waited = WAITED.with(Cell::get);
    let end = if is_on_devices(task) && waited <= SHORT {
        start + LOOK_FOR.max(waited + LONGER)
    } else {
        start + LOOK_FOR
    };
    let end = deadline.map_or(end, |deadline| deadline.min(end));
    while !latch.is_open() {
        // Done: whoever ended it is about to open the latch.
        let soon = matches!(task.phase(), Phase::Ready | Phase::Running | Phase::Done);
        if !soon || !engine.has_idle_core() || Instant::now() >= end {
            return;
        }
        pause();
    }
    if engine.domain.sessions_exclude() {
        let end = Instant::now() + LEAVE;
        while engine.sessions.inside() != 0
            && !engine.queues.has_work_in(Lane::Inside)
            && Instant::now() < end
        {
            pause();
        }
    }
}

/// Blocks on a latch in a runtime without workers, and runs with `help` what other threads made
/// ready meanwhile.
fn block_alone<D: Domain>(
    engine: &Arc<Engine<D>>,
    latch: &Arc<Latch<D>>,
    deadline: Option<Instant>,
    help: impl Fn(),
) {
    // Known before it looks at the queues: a thread that pushes afterwards nudges it.
    engine.helpers.lock().push(Arc::clone(latch));
    // What this thread made ready since it last looked is in a queue of its own.
    help();
    while !latch.is_open() && engine.advance_time() {
        help();
    }
    let has_work = || engine.queues.has_work();
    while block_patiently(engine, latch, deadline, || (), has_work) == End::ElseToDo {
        help();
    }
    engine
        .helpers
        .lock()
        .retain(|other| !Arc::ptr_eq(other, latch));
}

/// The wait of a body for a task that needs nothing but work of devices which is enqueued already, in a
/// runtime without workers. It runs no other body, and whoever looks what may move finds a body that runs.
pub(crate) fn hold<D: Domain>(engine: &Arc<Engine<D>>, task: &TaskRef<D>) -> bool {
    let latch = Latch::new(1, Until::All, Waker::Thread(None));
    let tasks = std::slice::from_ref(task);
    engine
        .watch(&latch, tasks, None)
        .expect("only the wait of a body can close a cycle");
    while !latch.is_open() && engine.advance_time() {}
    block_patiently(engine, &latch, None, || (), || false);
    let opened = !latch.give_up();
    if !opened {
        abandon(&latch, tasks);
    }
    opened
}

/// Blocks on a latch, after `first`, and lets the domain end the wait in between.
fn block_patiently<D: Domain>(
    engine: &Engine<D>,
    latch: &Latch<D>,
    deadline: Option<Instant>,
    first: impl Fn(),
    else_to_do: impl Fn() -> bool,
) -> End {
    let mut end = End::Late;
    let Some(patience) = engine.domain.patience() else {
        engine.domain.blocking(&mut || {
            first();
            end = latch.block(deadline, &else_to_do);
        });
        return end;
    };
    let mut looked = false;
    loop {
        let slice = Instant::now() + patience;
        let last = deadline.is_some_and(|deadline| deadline <= slice);
        let until = deadline.map_or(slice, |deadline| deadline.min(slice));
        engine.domain.blocking(&mut || {
            if !std::mem::replace(&mut looked, true) {
                first();
            }
            end = latch.block(Some(until), &else_to_do);
        });
        if end != End::Late || last || engine.domain.interrupted() {
            return end;
        }
    }
}
