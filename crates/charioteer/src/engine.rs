//! The engine: one open runtime of a [`Domain`], and everything that is done with its tasks.
//!
//! It joins the rooms: `graph` links a spawned task to its predecessors, `schedule` keeps what
//! is ready and who may run it, `work` runs it, and [`Engine::finish`] gives what became ready back
//! to the schedule. A completion never calls upward while anything is locked: it publishes the
//! outcome, takes the links, and works through them with a list of its own, so that a chain of a
//! million failures needs no stack.
//!
//! # Ending
//!
//! `spawned` and `finished` only grow, each in shards so that threads do not contend. The engine is
//! quiet when the sums are equal, *finished* read first: what was finished then had been spawned
//! then, so equality means that nothing was unfinished at the moment between the two reads. Closing
//! waits for that. If nothing can move before it is reached (every thread is parked or waits for
//! tasks, nothing is ready, no body is elsewhere), what is missing are tasks that were never
//! spawned: they fail as [`Failure::Unspawned`], which their dependents and waiters hear, and the
//! engine ends (invariant 10).
//!
//! **Who tells the closer.** A worker that ends the last task has nothing to do afterwards, and says
//! so; it does not say so at each task, which would be a system call and a wake-up that finds the
//! next task unfinished. A thread that runs no tasks tells at each task that it settles.
//!
//! **Spawn against close.** The gate is open, closing or closed. A spawner counts its task and then
//! looks at the gate; a closer that saw equal sums sets it to *closing* and then looks at the sums
//! again. So either the closer sees the count, or the spawner sees the gate and moves it from
//! *closing* back to *open*, and the closer's move from *closing* to *closed* fails. A task that was
//! counted in is never refused while the gate may open again, so what its body spawns is not either.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
use smallvec::SmallVec;

use crate::data::{Access, AccessTrouble, Group};
use crate::graph;
use crate::machine::cpus::{Apart, Pins};
use crate::machine::{DeviceId, Machine, Stream, Time};
use crate::schedule::gang::{Limits, MOST_DEVICES};
use crate::schedule::gate::Gate;
use crate::schedule::map::BEGUN;
use crate::schedule::map::model::Models;
use crate::schedule::map::policy::Mapper;
use crate::schedule::places::{Grant, Places, Todo};
use crate::schedule::queues::{Lane, Queues};
use crate::schedule::timer::Timer;
use crate::sync::{
    AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Condvar, Mutex, Order, Ordering,
    assert_unlocked, fence, yield_now,
};
use crate::task::state::{
    BLOCKED, CANCEL, CANCELLED, DELIVERED, DIRTY, FAILED, HOST, JOINS, LAUNCHED, LINKED,
    LOOSE_WAIT, OUTSIDE, POISONED, REPORTED, SLEEPING, Snapshot, TIMED_OUT, TOLD, USES, WOKEN,
};
use crate::task::{
    Awaits, Content, Domain, Ending, Failure, Landed, Latch, Link, List, Need, Options, Outcome,
    Phase, Task, TaskRef, Trouble, Until, Waker,
};
use crate::trace::{Event, Trace};
use crate::work::{self, Worker};

use accesses::Registered;
pub use accesses::{HostAccess, HostError};
use devices::Devices;
pub use devices::Place;
pub(crate) use devices::{Answer, is_on_devices};
use mapping::Maps;

mod accesses;
mod devices;
mod gathering;
#[cfg(all(test, loom))]
mod loom_models;
mod mapping;
mod transfers;
mod witness;

/// Threads beyond the workers that stand in for bodies that wait.
const SPARE_THREADS: usize = 62;

/// Parts of the counts of tasks; a model has one, to be small.
const SHARDS: usize = if cfg!(loom) { 1 } else { 16 };

/// The gate's positions.
const OPEN: u32 = 0;
const CLOSING: u32 = 1;
const CLOSED: u32 = 2;

/// The engines of a domain that are open.
pub struct Registry<D: Domain> {
    // Of the standard library, which has them for a `static`.
    engines: RwLock<Vec<Arc<Engine<D>>>>,
    /// Tasks that are not spawned and that threads, event loops or callbacks wait for, which belong
    /// to no engine. They fail when the last engine closes.
    awaited: std::sync::Mutex<Missing<D>>,
    order: Order,
}

impl<D: Domain> Registry<D> {
    /// An empty one, for a `static`.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            engines: RwLock::new(Vec::new()),
            awaited: std::sync::Mutex::new(Missing::new()),
            order: Order::new(),
        }
    }

    fn read<R>(&self, f: impl FnOnce(&[Arc<Engine<D>>]) -> R) -> R {
        let engines = self.engines.read().unwrap_or_else(PoisonError::into_inner);
        self.order.point();
        let result = f(&engines);
        self.order.point();
        result
    }

    fn write<R>(&self, f: impl FnOnce(&mut Vec<Arc<Engine<D>>>) -> R) -> R {
        let mut engines = self.engines.write().unwrap_or_else(PoisonError::into_inner);
        self.order.point();
        let result = f(&mut engines);
        self.order.point();
        result
    }

    fn with_awaited<R>(&self, f: impl FnOnce(&mut Missing<D>) -> R) -> R {
        let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
        self.order.point();
        let result = f(&mut awaited);
        self.order.point();
        result
    }

    fn await_spawn(&self, task: &TaskRef<D>) {
        let gone = self.with_awaited(|awaited| awaited.add(task));
        drop(gone);
    }

    /// The engine with that number, while it is open.
    pub fn get(&self, id: u32) -> Option<Arc<Engine<D>>> {
        self.read(|engines| engines.iter().find(|engine| engine.id == id).cloned())
    }

    /// Every open engine.
    pub fn all(&self) -> Vec<Arc<Engine<D>>> {
        self.read(<[_]>::to_vec)
    }

    fn add(&self, engine: Arc<Engine<D>>) {
        self.write(|engines| engines.push(engine));
    }

    /// Takes an engine out. With the last one ends the hope of those who wait for what is not
    /// spawned: they are told. At the end of the runtime it is no failure, since no task of it
    /// depended on them.
    fn remove(&self, id: u32) {
        let (gone, last) = self.write(|engines| {
            let at = engines.iter().position(|engine| engine.id == id);
            (at.map(|at| engines.swap_remove(at)), engines.is_empty())
        });
        if gone.is_some() && last {
            let awaited = self.with_awaited(Missing::take);
            let (missing, names) = claim_missing(&awaited);
            for task in &missing {
                settle_orphan(
                    task,
                    Outcome::Failed(Failure::Unspawned(Arc::clone(&names))),
                );
            }
        }
        drop(gone);
    }
}

/// Tasks that somebody waits for and that were not spawned when that began.
struct Missing<D: Domain> {
    list: Vec<Weak<Task<D>>>,
    /// How long the list is at the next sweep.
    limit: usize,
}

impl<D: Domain> Missing<D> {
    /// A list that is shorter is not worth a sweep.
    const FEW: usize = 64;

    const fn new() -> Self {
        Self {
            list: Vec::new(),
            limit: Self::FEW,
        }
    }

    /// Adds a task, and gives what is to be dropped once no lock is held.
    #[must_use]
    fn add(&mut self, task: &TaskRef<D>) -> Vec<TaskRef<D>> {
        let many_for_one = self
            .list
            .last()
            .is_some_and(|last| last.as_ptr() == Arc::as_ptr(task));
        if many_for_one {
            return Vec::new();
        }
        self.list.push(Arc::downgrade(task));
        let mut seen = Vec::new();
        if self.list.len() > self.limit {
            // Most were spawned meanwhile: the list stays as long as what is missing.
            self.list.retain(|weak| {
                weak.upgrade().is_some_and(|task| {
                    let missing = is_missing(&task);
                    seen.push(task);
                    missing
                })
            });
            self.limit = Self::FEW.max(2 * self.list.len());
        }
        seen
    }

    fn take(&mut self) -> Vec<Weak<Task<D>>> {
        std::mem::take(&mut self.list)
    }
}

/// Whether a task is not spawned yet: there is a handle alone, or a spawner that has claimed it and
/// may have to give it back.
fn is_missing<D: Domain>(task: &Task<D>) -> bool {
    let state = task.state.load();
    match state.phase() {
        Phase::Unspawned => true,
        Phase::Running => state.has(DIRTY),
        _ => false,
    }
}

/// Claims those of `known` that are still not spawned, to fail them, and gives all their names.
fn claim_missing<D: Domain>(known: &[Weak<Task<D>>]) -> (Vec<TaskRef<D>>, Arc<[String]>) {
    let missing: Vec<TaskRef<D>> = known
        .iter()
        .filter_map(Weak::upgrade)
        .filter(|task| task.state.advance(Phase::Unspawned, Phase::Running).is_ok())
        .collect();
    let mut names: Vec<String> = missing.iter().map(|task| task.label.to_string()).collect();
    names.sort();
    (missing, names.into())
}

impl<D: Domain> Default for Registry<D> {
    fn default() -> Self {
        Self::new()
    }
}

/// What an engine is opened with.
#[derive(Debug, Default)]
pub struct Config {
    /// Cores to use; zero runs every body on the thread that spawns it.
    pub workers: usize,
    /// How many tasks may be unfinished before a thread that spawns, outside of tasks, has to wait.
    pub max_pending: Option<usize>,
    /// Where to write the trace.
    pub trace: Option<std::path::PathBuf>,
    /// The devices beside the cores, if there are any.
    pub machine: Option<Arc<Machine>>,
    /// What bounds the freedom of their schedule.
    pub limits: Limits,
    /// Who maps the tasks that have a choice.
    pub mapper: Mapper,
    /// What is known of run times, and will be.
    pub models: Arc<Models>,
    /// Where workers are kept, if they are pinned.
    pub pins: Option<Pins>,
}

/// Why a task was not spawned. Nothing of it is left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SpawnError {
    /// The engine is closed.
    Closed,
    /// The name was spawned before.
    Duplicate,
    /// The dependencies would form a cycle: the names along it, the first also at the end.
    Cycle(Vec<String>),
    /// More cores than there are: wanted, present.
    Cores(usize, usize),
    /// No set of devices could ever serve it: a reason for each alternative.
    Devices(Vec<String>),
    /// Its accesses are refused.
    Access(AccessTrouble),
    /// What it accesses, with the memory that it declares, takes more than any device has on which it may
    /// run.
    Memory {
        /// The device that lacks least, or its kind.
        device: String,
        /// Bytes that the task takes there.
        wanted: u64,
        /// Bytes that it has, or the largest of its kind.
        there: u64,
    },
}

/// Why a body may not wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WaitError {
    /// The wait could never end: the names along the cycle, the first also at the end.
    Cycle(Vec<String>),
    /// No thread is left to run what is awaited: who waits, and for what.
    Threads(Vec<String>),
}

/// A task while its body runs.
pub struct Running<'a, D: Domain> {
    /// Its engine.
    pub engine: &'a Arc<Engine<D>>,
    /// The task.
    pub task: &'a TaskRef<D>,
    worker: &'a Worker<D>,
}

impl<'a, D: Domain> Running<'a, D> {
    pub(crate) fn new(
        engine: &'a Arc<Engine<D>>,
        task: &'a TaskRef<D>,
        worker: &'a Worker<D>,
    ) -> Self {
        Self {
            engine,
            task,
            worker,
        }
    }

    /// Which of its choices it is, by the index in their list; none if it has no choices.
    pub fn choice(&self) -> Option<usize> {
        self.task.mapping()?.choice()
    }

    /// The reductions that it is a member of, or that it combines.
    pub fn groups(&self) -> Vec<Arc<Group<D>>> {
        self.task.groups()
    }

    /// The cores that it holds.
    pub fn grant(&self) -> Grant {
        self.worker.grant()
    }

    /// The devices that it holds, each with its stream, in the set's order.
    #[inline]
    pub fn lent(&self) -> SmallVec<[(DeviceId, Stream); 2]> {
        if is_on_devices(self.task) {
            self.engine.lent_to(self.task)
        } else {
            SmallVec::new()
        }
    }
}

struct Shard {
    spawned: AtomicU64,
    finished: AtomicU64,
}

/// How much an engine did so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Tasks spawned.
    pub spawned: u64,
    /// Tasks with an outcome.
    pub finished: u64,
    /// Threads started.
    pub threads: usize,
}

/// See the module.
pub struct Engine<D: Domain> {
    pub(crate) id: u32,
    pub(crate) domain: D,
    pub(crate) workers: usize,
    cores: usize,
    /// The cores that the process may use.
    present: usize,
    pub(crate) queues: Queues<D>,
    pub(crate) places: Places<D>,
    /// Where workers are kept, if they are pinned.
    pub(crate) pins: Option<Arc<Pins>>,
    /// Processors of workers that are not pinned. Models know no processors.
    pub(crate) apart: Option<Apart>,
    pub(crate) sessions: Gate,
    timer: Arc<Timer<D>>,
    shards: Box<[CachePadded<Shard>]>,
    max_pending: Option<usize>,
    /// Spawners that wait for room.
    crowd: AtomicUsize,
    /// Pending tasks are cancelled when their turn comes, running ones are asked to end.
    cancelling: AtomicBool,
    closing: AtomicBool,
    gate: AtomicU32,
    quiet: Mutex<()>,
    changed: Condvar,
    failures: Mutex<HashMap<u64, TaskRef<D>>>,
    /// Tasks that tasks of this engine depend on or wait for and that are not spawned.
    missing: Mutex<Missing<D>>,
    graph: Mutex<()>,
    /// Reductions that nobody has ended yet, as far as they are there.
    open: Mutex<Vec<Weak<Group<D>>>>,
    /// Threads that wait for tasks, and run what others make ready, without workers.
    pub(crate) helpers: Mutex<Vec<Arc<Latch<D>>>>,
    /// Bodies that wait for unspawned or dirty tasks.
    pub(crate) loose_waits: AtomicUsize,
    /// Bodies that go on elsewhere, and threads of others that are about to move a task.
    /// Threads of workers and of devices change it for each task on devices, so that nothing lies beside it.
    elsewhere: CachePadded<AtomicUsize>,
    /// Threads that were started and have not ended.
    alive: AtomicUsize,
    /// Whether threads that ended may go, and what they wait at for that; see [`Engine::close`].
    seen_off: AtomicBool,
    parting: Condvar,
    trace: Option<Arc<Trace>>,
    pub(crate) devices: Option<Devices<D>>,
    maps: Maps<D>,
}

static ENGINES: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);

impl<D: Domain> Engine<D> {
    /// Opens an engine: its threads are started and parked.
    ///
    /// # Errors
    /// If the system refuses a thread or the trace file; [`io::ErrorKind::InvalidInput`] for workers on
    /// a machine whose time is virtual.
    pub fn open(domain: D, config: Config) -> io::Result<Arc<Self>> {
        let is_virtual = |machine: &Arc<Machine>| machine.description().time() == Time::Virtual;
        if config.workers != 0 && config.machine.as_ref().is_some_and(is_virtual) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "virtual time passes while nothing else runs: it takes a runtime with workers=0",
            ));
        }
        if let Some(machine) = &config.machine
            && machine.gpus() > MOST_DEVICES
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "the machine has {} GPUs, and a runtime can use {MOST_DEVICES} at most",
                    machine.gpus()
                ),
            ));
        }
        let present = std::thread::available_parallelism().map_or(1, usize::from);
        let cores = if config.workers == 0 {
            present
        } else {
            config.workers
        };
        let threads = config.workers + SPARE_THREADS;
        let id = ENGINES.fetch_add(1, Ordering::Relaxed);
        let trace = config.trace.map(|path| Trace::create(&path)).transpose()?;
        let trace = trace.map(Arc::new);
        let engine = Arc::new(Self {
            id,
            domain,
            workers: config.workers,
            cores,
            present,
            queues: Queues::new(threads),
            places: Places::new(
                config.workers,
                threads,
                config.pins.as_ref().map(Pins::nodes),
            ),
            apart: if cfg!(loom) || config.pins.is_some() {
                None
            } else {
                Apart::new(config.workers)
            },
            pins: config.pins.map(Arc::new),
            sessions: Gate::new(),
            timer: Timer::new(),
            shards: (0..SHARDS)
                .map(|_| {
                    CachePadded::new(Shard {
                        spawned: AtomicU64::new(0),
                        finished: AtomicU64::new(0),
                    })
                })
                .collect(),
            max_pending: config.max_pending,
            crowd: AtomicUsize::new(0),
            cancelling: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            gate: AtomicU32::new(OPEN),
            quiet: Mutex::new(()),
            changed: Condvar::new(),
            failures: Mutex::new(HashMap::new()),
            missing: Mutex::new(Missing::new()),
            graph: Mutex::new(()),
            open: Mutex::new(Vec::new()),
            helpers: Mutex::new(Vec::new()),
            loose_waits: AtomicUsize::new(0),
            elsewhere: CachePadded::new(AtomicUsize::new(0)),
            alive: AtomicUsize::new(0),
            seen_off: AtomicBool::new(false),
            parting: Condvar::new(),
            devices: config
                .machine
                .filter(|machine| machine.gpus() != 0)
                .map(|machine| {
                    let traced = trace.as_ref().map(|trace| (trace, id));
                    Devices::new(machine, config.limits, config.workers, traced)
                }),
            maps: Maps::new(config.mapper, config.models),
            trace,
        });
        D::engines().add(Arc::clone(&engine));
        let mut slots = engine.places.open().into_iter();
        while let Some(slot) = slots.next() {
            if let Err(error) = engine.start_thread(slot) {
                for missing in std::iter::once(slot).chain(slots) {
                    engine.places.failed_to_start(missing);
                }
                engine.close();
                return Err(error);
            }
        }
        if let (Mapper::User, 1..) = (&engine.maps.mapper, engine.workers)
            && let Err(error) = engine.start_policy()
        {
            engine.close();
            return Err(error);
        }
        Ok(engine)
    }

    /// Its number, unique in the process.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The domain that it was opened with.
    pub fn domain(&self) -> &D {
        &self.domain
    }

    /// The cores that tasks may use.
    pub fn cores(&self) -> usize {
        self.cores
    }

    /// The workers that it was opened with; zero runs bodies where they are spawned.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// What it did so far.
    pub fn counts(&self) -> Counts {
        let finished = self.sum(|shard| &shard.finished);
        Counts {
            spawned: self.sum(|shard| &shard.spawned),
            finished,
            threads: self.places.threads(),
        }
    }

    fn sum(&self, counter: impl Fn(&Shard) -> &AtomicU64) -> u64 {
        self.shards
            .iter()
            .map(|shard| counter(shard).load(Ordering::SeqCst))
            .fold(0, u64::wrapping_add)
    }

    #[inline]
    fn shard(&self) -> &Shard {
        &self.shards[crate::trace::thread_number() % SHARDS]
    }

    /// The time for an event that is about to take effect; zero if nothing is traced.
    #[inline]
    fn now(&self) -> u64 {
        self.trace.as_ref().map_or(0, |trace| trace.now())
    }

    #[inline]
    pub(crate) fn record(&self, event: Event, task: &Task<D>) {
        if let Some(trace) = &self.trace {
            trace.record(event, task.id, 0);
        }
    }

    #[inline]
    fn record_at(&self, time: u64, event: Event, task: &Task<D>) {
        if let Some(trace) = &self.trace {
            trace.record_at(time, event, task.id, 0);
        }
    }

    fn record_spawn(&self, time: u64, task: &Task<D>, dependencies: &[TaskRef<D>]) {
        if let Some(trace) = &self.trace {
            trace.record_at(time, Event::Spawn, task.id, 0);
            trace.name(task.id, &task.label.to_string());
            for dependency in dependencies {
                trace.record_at(time, Event::Edge, task.id, dependency.id);
            }
        }
    }

    /// Edges that follow from accesses.
    fn record_edges(&self, time: u64, task: &Task<D>, predecessors: &[u64]) {
        if let Some(trace) = &self.trace {
            for &predecessor in predecessors {
                trace.record_at(time, Event::Edge, task.id, predecessor);
            }
        }
    }

    fn start_thread(self: &Arc<Self>, slot: usize) -> io::Result<()> {
        assert_unlocked();
        let engine = Arc::clone(self);
        self.alive.fetch_add(1, Ordering::SeqCst);
        let result = self.domain.start_thread(
            format!("charioteer-{slot}"),
            Box::new(move || {
                Worker::main(Arc::clone(&engine), slot);
                engine.thread_ended();
                engine.part();
            }),
        );
        if result.is_err() {
            self.thread_ended();
        }
        result
    }

    /// Starts the thread that asks the user's policy.
    fn start_policy(self: &Arc<Self>) -> io::Result<()> {
        let engine = Arc::clone(self);
        self.alive.fetch_add(1, Ordering::SeqCst);
        let result = self.domain.start_thread(
            "charioteer-policy".to_owned(),
            Box::new(move || {
                engine.run_policy();
                engine.thread_ended();
                engine.part();
            }),
        );
        if result.is_err() {
            self.thread_ended();
        }
        result
    }

    fn thread_ended(&self) {
        self.alive.fetch_sub(1, Ordering::SeqCst);
        drop(self.quiet.lock());
        self.changed.notify_all();
    }

    /// Waits until who closes is back from its wait for this thread and all others.
    fn part(&self) {
        let mut quiet = self.quiet.lock();
        while !self.seen_off.load(Ordering::SeqCst) {
            quiet = self.parting.wait(quiet);
        }
        drop(quiet);
        self.parting.notify_one();
    }

    /// Wakes and starts the threads that were given something. False if the system refused one: what
    /// it was given waits until another thread comes free.
    pub(crate) fn carry_out(self: &Arc<Self>, todo: Todo<D>) -> bool {
        let mut started = true;
        let mut todo = todo;
        for task in std::mem::take(&mut todo.gone) {
            if is_on_devices(&task) {
                // Cancelled after its devices were granted.
                self.return_loan(&task);
            }
        }
        for slot in todo.ring() {
            if let Err(error) = self.start_thread(slot) {
                started = false;
                self.places.failed_to_start(slot);
                self.domain
                    .warn(&format!("the system refuses a thread: {error}"));
            }
        }
        started
    }

    /// Wakes a thread for what was pushed, if none is on its way.
    #[inline]
    pub(crate) fn wake(self: &Arc<Self>) {
        if self.places.wants_waking() && self.is_runnable() {
            let todo = self.places.wake();
            self.carry_out(todo);
        }
    }

    /// Whether there is a task that another thread could take now.
    #[inline]
    pub(crate) fn is_runnable(&self) -> bool {
        self.queues.has_work_in(Lane::Outside)
            || (self.sessions.has_room() && self.queues.has_work_in(Lane::Inside))
    }

    /// Whether workers are about to start on tasks that need a session: such are ready, and there is
    /// a worker for one more.
    pub fn is_starting(&self) -> bool {
        self.places.has_takers()
            && self.sessions.has_room()
            && self.queues.has_work_in(Lane::Inside)
    }

    /// Whether the machine has a core that no task uses.
    pub(crate) fn has_idle_core(&self) -> bool {
        self.present + self.places.free() > self.workers
    }

    /// Lets at most `width` workers be in sessions of the domain from now on, but for bodies that
    /// come back from a wait and tasks on sets or parts of cores. Every worker, unless said; at
    /// least one. Workers that are too many leave between two tasks.
    pub fn set_width(self: &Arc<Self>, width: usize) {
        self.sessions.set_width(width);
        self.wake();
    }

    /// What was [set](Engine::set_width); `usize::MAX` before.
    pub fn width(&self) -> usize {
        self.sessions.width()
    }

    /// How many workers are in sessions of the domain.
    pub fn sessions(&self) -> usize {
        self.sessions.inside()
    }

    /// Calls `f` with the running task of this thread and its grant.
    pub fn current(&self) -> Option<(TaskRef<D>, Grant)> {
        Worker::with(self.id, |worker: Option<&Worker<D>>| {
            let worker = worker?;
            Some((Arc::clone(worker.running()?), worker.grant()))
        })
    }

    /// Whether this thread runs tasks of the engine: it is in a body, or in a callback of a task.
    pub fn is_worker(&self) -> bool {
        Worker::with(self.id, |worker: Option<&Worker<D>>| worker.is_some())
    }

    // ---- spawning ---------------------------------------------------------------------------

    /// Spawns a task under no name.
    ///
    /// # Errors
    /// [`SpawnError`]; the body is dropped.
    #[inline]
    pub fn spawn(
        self: &Arc<Self>,
        label: D::Label,
        body: D::Body,
        options: Option<Box<Options>>,
        dependencies: &[TaskRef<D>],
        accesses: &[Access<'_, D>],
    ) -> Result<TaskRef<D>, SpawnError> {
        let task = self.create(label, body, options, dependencies, accesses, 0)?;
        self.launch(Arc::clone(&task), dependencies, accesses)?;
        Ok(task)
    }

    /// As [`Engine::spawn`], and the handle is there before the task can fail and find nobody to
    /// tell.
    ///
    /// # Errors
    /// [`SpawnError`]; the body is dropped.
    #[inline]
    pub fn spawn_handle(
        self: &Arc<Self>,
        label: D::Label,
        body: D::Body,
        options: Option<Box<Options>>,
        dependencies: &[TaskRef<D>],
        accesses: &[Access<'_, D>],
    ) -> Result<Handle<D>, SpawnError> {
        let task = self.create(label, body, options, dependencies, accesses, 1)?;
        self.launch(Arc::clone(&task), dependencies, accesses)?;
        Ok(Handle(task))
    }

    /// As [`Engine::spawn`], for a task that nobody asks for: the cheapest way.
    ///
    /// # Errors
    /// [`SpawnError`]; the body is dropped.
    #[inline]
    pub fn spawn_detached(
        self: &Arc<Self>,
        label: D::Label,
        body: D::Body,
        options: Option<Box<Options>>,
        dependencies: &[TaskRef<D>],
        accesses: &[Access<'_, D>],
    ) -> Result<(), SpawnError> {
        let task = self.create(label, body, options, dependencies, accesses, 0)?;
        self.launch(task, dependencies, accesses)
    }

    #[inline]
    fn create(
        self: &Arc<Self>,
        label: D::Label,
        body: D::Body,
        mut options: Option<Box<Options>>,
        dependencies: &[TaskRef<D>],
        accesses: &[Access<'_, D>],
        handles: u32,
    ) -> Result<TaskRef<D>, SpawnError> {
        self.check(options.as_deref())?;
        let uses = if accesses.is_empty() {
            None
        } else {
            self.check_accesses(accesses, options.as_deref_mut())?
        };
        self.make_room();
        self.admit()?;
        let phase = if dependencies.is_empty() && accesses.is_empty() {
            Phase::Ready
        } else {
            Phase::Waiting
        };
        let mut flags = self.flags(&body, options.as_deref(), uses.is_some());
        if !accesses.is_empty() {
            flags |= accesses::flags_of(accesses);
        }
        let task = Task::allocate(label, phase, Content::Body(body), options, handles);
        if let Some(uses) = uses {
            self.keep_uses(&task, uses);
        }
        task.state.begin_with(flags);
        task.engine.store(self.id, Ordering::Relaxed);
        Ok(task)
    }

    /// The flags of a task with this body and these options; `uses`: it keeps its accesses.
    #[inline]
    fn flags(&self, body: &D::Body, options: Option<&Options>, uses: bool) -> u32 {
        let outside = if self.domain.needs_session(body) {
            0
        } else {
            OUTSIDE
        };
        let uses = if uses { USES } else { 0 };
        outside | uses | options.map_or(0, |options| self.ahead(options))
    }

    /// Lets a task go that nobody else knows yet. So nothing leads on from it, and it cannot close
    /// a cycle.
    #[inline]
    fn launch(
        self: &Arc<Self>,
        task: TaskRef<D>,
        dependencies: &[TaskRef<D>],
        accesses: &[Access<'_, D>],
    ) -> Result<(), SpawnError> {
        if !accesses.is_empty() {
            return self.launch_ordered(task, dependencies, accesses);
        }
        let time = self.now();
        self.record_spawn(time, &task, dependencies);
        if dependencies.is_empty() {
            self.make_ready(task, time);
        } else {
            if dependencies.iter().any(|task| graph::is_loose(task)) {
                task.state.set(DIRTY);
                task.links.lock().rare().predecessors = dependencies.to_vec();
            }
            let done = self.connect(&task, dependencies);
            let launched = self.catch_up(&task, dependencies, &[]);
            self.release(&task, done + launched + 1);
        }
        self.drain_if_alone();
        Ok(())
    }

    /// Spawns the task of a handle that exists already.
    ///
    /// # Errors
    /// [`SpawnError`]; the body is dropped, and the handle is as it was.
    pub fn spawn_as(
        self: &Arc<Self>,
        task: &TaskRef<D>,
        body: D::Body,
        mut options: Option<Box<Options>>,
        dependencies: &[TaskRef<D>],
        accesses: &[Access<'_, D>],
    ) -> Result<(), SpawnError> {
        self.check(options.as_deref())?;
        let uses = if accesses.is_empty() {
            None
        } else {
            self.check_accesses(accesses, options.as_deref_mut())?
        };
        self.make_room();
        // From here on this thread owns the task, until it is published or given back.
        let claim = task
            .state
            .advance_when(Phase::Unspawned, Phase::Running, |_| true, DIRTY, 0);
        if claim.is_err() {
            return Err(match task.outcome() {
                Some(Outcome::Failed(Failure::Unspawned(_))) => SpawnError::Closed,
                _ => SpawnError::Duplicate,
            });
        }
        if let Err(error) = self.admit() {
            Self::give_back(task);
            return Err(error);
        }
        // Loose: a predecessor is not spawned, or has such behind it.
        let loose = dependencies.iter().any(|task| graph::is_loose(task));
        if loose {
            task.links.lock().rare().predecessors = dependencies.to_vec();
        }
        task.engine.store(self.id, Ordering::Relaxed);
        let flags = self.flags(&body, options.as_deref(), uses.is_some());
        if let Some(uses) = uses {
            self.keep_uses(task, uses);
        }
        task.content.with_mut(|content| {
            // SAFETY: this thread owns the task.
            unsafe { *content = Content::Body(body) };
        });
        task.options.with_mut(|place| {
            // SAFETY: as above.
            unsafe { *place = options };
        });
        let time = self.now();
        let connected = self.connect(task, dependencies);
        let published = if accesses.is_empty() {
            let clean = if loose { 0 } else { DIRTY };
            let published = self.publish_claimed(task, dependencies, flags, clean);
            published.map(|(before, _)| (before, Registered::default()))
        } else {
            self.publish_ordered(task, dependencies, accesses, flags, loose)
        };
        let (before, registered) = match published {
            Ok(published) => published,
            Err(refused) => return Err(self.take_back(task, dependencies, connected, refused)),
        };
        self.record_spawn(time, task, dependencies);
        self.record_edges(time, task, &registered.edges);
        if before.has(CANCEL) {
            // Somebody asked while the spawn was under way.
            Self::cancel(task);
        }
        let launched = self.catch_up(task, dependencies, &registered.before);
        self.release(task, connected + registered.done + launched + 1);
        self.drain_if_alone();
        Ok(())
    }

    /// Publishes a claimed task, whose edges stand already, with these flags. If its handle was linked
    /// before it was spawned, only unless they close a cycle. Called under locks of data, perhaps: what it
    /// gives is to be dropped without.
    fn publish_claimed(
        &self,
        task: &TaskRef<D>,
        predecessors: &[TaskRef<D>],
        flags: u32,
        clean: u32,
    ) -> Result<(Snapshot, Option<graph::Search<D>>), Refused<D>> {
        let published = task.state.advance_when(
            Phase::Running,
            Phase::Waiting,
            |state| predecessors.is_empty() || !state.has(LINKED),
            flags,
            clean,
        );
        if let Ok(before) = published {
            return Ok((before, None));
        }
        let guard = self.graph.lock();
        let backward_decides = self.loose_waits.load(Ordering::SeqCst) == 0;
        let found = graph::search(task, predecessors, backward_decides);
        if found.cycle.is_some() {
            // Under the lock, so that no other search finds the same cycle.
            let unlinked = unlink(task, predecessors);
            return Err(Refused::Cycle(found, unlinked));
        }
        let before = task.state.leave_running(Phase::Waiting, clean | flags);
        drop(guard);
        Ok((before, Some(found)))
    }

    /// Takes back a spawn that is refused, and says why it is.
    fn take_back(
        &self,
        task: &TaskRef<D>,
        dependencies: &[TaskRef<D>],
        connected: u32,
        refused: Refused<D>,
    ) -> SpawnError {
        let (error, gone) = match refused {
            Refused::Cycle(found, unlinked) => {
                let cycle = found.into_cycle().unwrap_or_default();
                (SpawnError::Cycle(cycle), unlinked)
            }
            Refused::Error(error) => (error, unlink(task, dependencies)),
        };
        // Predecessors that were done just now, and whose completers are on their way here, stay in
        // the count: they release the handle as they would have released the task.
        task.pending.fetch_sub(connected + gone, Ordering::AcqRel);
        let body = task.content.with_mut(|content| {
            // SAFETY: this thread owns the task.
            std::mem::replace(unsafe { &mut *content }, Content::Nothing)
        });
        let options = task.options.with_mut(|place| {
            // SAFETY: as above.
            unsafe { &mut *place }.take()
        });
        task.cleanse();
        task.engine.store(0, Ordering::Relaxed);
        Self::give_back(task);
        self.count_out();
        drop((body, options));
        error
    }

    /// Gives a claimed handle back that is not spawned after all.
    fn give_back(task: &TaskRef<D>) {
        let before = task.state.leave_running(Phase::Unspawned, DIRTY);
        if before.has(CANCEL) {
            Self::cancel(task);
        }
    }

    fn check(&self, options: Option<&Options>) -> Result<(), SpawnError> {
        if let Some(Options {
            need: Need::Cores(cores),
            ..
        }) = options
            && usize::from(*cores) > self.cores
        {
            return Err(SpawnError::Cores(usize::from(*cores), self.cores));
        }
        if let Some(options) = options
            && options.need == Need::Mapped
        {
            return self.check_mapping(options.mapping.as_deref());
        }
        match options.and_then(|options| options.devices.as_ref()) {
            Some(sets) => self.check_spawn(sets),
            None => Ok(()),
        }
    }

    /// Counts a task in, or refuses it.
    #[inline]
    fn admit(&self) -> Result<(), SpawnError> {
        self.shard().spawned.fetch_add(1, Ordering::SeqCst);
        if self.gate.load(Ordering::SeqCst) != OPEN && self.is_shut() {
            self.count_out();
            return Err(SpawnError::Closed);
        }
        // Who spawns for ever must not keep the runtime open: once it closes, only bodies and
        // callbacks of tasks may, also those bodies that go on elsewhere.
        if self.closing.load(Ordering::Relaxed)
            && self.elsewhere.load(Ordering::SeqCst) == 0
            && self.workers != 0
            && !self.is_worker()
        {
            self.count_out();
            return Err(SpawnError::Closed);
        }
        Ok(())
    }

    /// Whether the gate is closed; opens it if it was closing.
    #[cold]
    fn is_shut(&self) -> bool {
        self.gate
            .compare_exchange(CLOSING, OPEN, Ordering::SeqCst, Ordering::SeqCst)
            == Err(CLOSED)
    }

    /// Makes a spawner that is no worker wait while too many tasks are unfinished.
    #[inline]
    fn make_room(self: &Arc<Self>) {
        if let Some(limit) = self.max_pending
            && self.workers != 0
            && !self.is_worker()
        {
            self.wait_for_room(limit);
        }
    }

    fn wait_for_room(self: &Arc<Self>, limit: usize) {
        let limit = limit as u64;
        // What is unfinished may wait for a task that this spawner has still to spawn: it goes on if
        // nothing moves.
        if self.unfinished() < limit || self.is_stuck() {
            return;
        }
        self.crowd.fetch_add(1, Ordering::SeqCst);
        let enough = self.enough_room();
        let patience = self.domain.patience();
        let mut waiting = true;
        while waiting {
            self.domain.blocking(&mut || {
                let mut quiet = self.quiet.lock();
                let end = patience.map(|patience| Instant::now() + patience);
                waiting = self.unfinished() > enough && !self.is_stuck();
                while waiting && end.is_none_or(|end| Instant::now() < end) {
                    quiet = match patience {
                        Some(patience) => self.changed.wait_for(quiet, patience),
                        None => self.changed.wait(quiet),
                    };
                    waiting = self.unfinished() > enough && !self.is_stuck();
                }
            });
            if waiting && patience.is_some() && self.domain.interrupted() {
                break; // the domain knows why, and raises it when the spawn returns
            }
        }
        self.crowd.fetch_sub(1, Ordering::SeqCst);
    }

    /// How many unfinished tasks let a spawner that had to wait go on: so few that it can spawn some
    /// before it waits again.
    fn enough_room(&self) -> u64 {
        self.max_pending.map_or(u64::MAX, |limit| {
            let last = limit.saturating_sub(1) as u64;
            last - last / 4
        })
    }

    fn unfinished(&self) -> u64 {
        let finished = self.sum(|shard| &shard.finished);
        fence(Ordering::SeqCst);
        self.sum(|shard| &shard.spawned).wrapping_sub(finished)
    }

    /// Registers `task` with its predecessors and says how many were done.
    fn connect(&self, task: &TaskRef<D>, dependencies: &[TaskRef<D>]) -> u32 {
        let count = u32::try_from(dependencies.len()).expect("fewer than 2^32 predecessors");
        task.expect(count);
        let mut done = 0;
        for dependency in dependencies {
            if !dependency.is_done()
                && self
                    .listen(dependency, Link::Dependent(Arc::clone(task)))
                    .is_ok()
            {
                continue;
            }
            done += 1;
            if self.maps.follows()
                && let Some(mapping) = task.mapping()
            {
                mapping.near(mapping::places_of(dependency));
            }
            if dependency.is_failed() {
                task.poison(dependency.root());
            }
        }
        done
    }

    /// Registers `link` of a task of this engine with `task`, or gives it back if that is done.
    fn listen(&self, task: &TaskRef<D>, link: Link<D>) -> Result<(), Link<D>> {
        task.link(link)?;
        if is_missing(task) {
            let gone = self.missing.lock().add(task);
            drop(gone);
        }
        Ok(())
    }

    /// As [`Engine::listen`], for somebody who is no task.
    fn listen_outside(task: &TaskRef<D>, link: Link<D>) -> Result<(), Link<D>> {
        task.link(link)?;
        if is_missing(task) {
            D::engines().await_spawn(task);
        }
        Ok(())
    }

    /// Takes `count` off what `task` waits for, and does what is to be done if nothing is left.
    #[inline]
    fn release(self: &Arc<Self>, task: &TaskRef<D>, count: u32) {
        if task.release(count) {
            self.released_last(Arc::clone(task));
        }
    }

    /// As [`Engine::released`], with all that comes of it.
    fn released_last(self: &Arc<Self>, task: TaskRef<D>) {
        let mut worklist = Vec::new();
        self.released(task, &mut worklist);
        self.work_off(worklist);
    }

    /// A task whose predecessors are done: ready, or skipped if one of them failed.
    fn released(self: &Arc<Self>, task: TaskRef<D>, worklist: &mut Vec<Settled<D>>) {
        let state = task.state.load();
        if state.has(DIRTY | POISONED) {
            let gone = {
                let mut links = task.links.lock();
                links
                    .rare
                    .as_mut()
                    .map(|rare| std::mem::take(&mut rare.predecessors))
            };
            task.state.clear(DIRTY);
            drop(gone);
            if let Some(root) = task.poisoned() {
                if task.state.advance(Phase::Waiting, Phase::Running).is_ok() {
                    // Where all are cancelled, so is this one, whatever became of the others.
                    let failure = if self.is_cancelling() {
                        Failure::Cancelled
                    } else {
                        Failure::Dependency(root)
                    };
                    if state.has(HOST) {
                        self.refuse_host(&task, &failure, worklist);
                    }
                    worklist.push(Settled {
                        ending: Ending::Given(Outcome::Failed(failure)),
                        task,
                    });
                } else {
                    self.turn_has_come(&task, worklist);
                }
                return;
            }
        }
        if state.has(JOINS | HOST | USES) && !self.may_begin(&task, worklist) {
            return;
        }
        let time = self.now();
        match task.state.advance(Phase::Waiting, Phase::Ready) {
            Ok(_) => self.make_ready(task, time),
            Err(_) => self.turn_has_come(&task, worklist),
        }
    }

    /// Puts a task whose phase is `Ready`, since `time`, where a worker finds it.
    #[inline]
    fn make_ready(self: &Arc<Self>, task: TaskRef<D>, time: u64) {
        self.record_at(time, Event::Ready, &task);
        let (need, priority) = task
            .options()
            .map_or((Need::Core, 0), |options| (options.need, options.priority));
        match need {
            Need::Devices => self.ask_for_devices(task, None),
            Need::Mapped => self.map(task),
            need => self.queue(task, need, priority),
        }
    }

    /// Puts a task that needs cores where a worker finds it.
    #[inline]
    fn queue(self: &Arc<Self>, task: TaskRef<D>, need: Need, priority: i32) {
        if need == Need::Core || self.workers == 0 {
            self.enqueue(task, priority);
        } else {
            let idle = !self.queues.has_work();
            let todo = self.places.push_unusual(task, need, priority, idle);
            self.carry_out(todo);
        }
    }

    /// Puts a task that needs no more than a worker into the queues.
    #[inline]
    fn enqueue(self: &Arc<Self>, task: TaskRef<D>, priority: i32) {
        let lane = Lane::of(&task);
        Worker::with(self.id, |worker: Option<&Worker<D>>| {
            let own = worker.map(|worker| &worker.own);
            self.queues.push(task, lane, priority, own);
        });
        self.wake_for(lane);
    }

    /// The same for one whose turn is behind all that are there, whichever thread they come from.
    fn enqueue_in_order(self: &Arc<Self>, task: TaskRef<D>, priority: i32) {
        let lane = Lane::of(&task);
        self.queues.push(task, lane, priority, None);
        self.wake_for(lane);
    }

    /// Wakes a thread for what was put into a lane, if one is to be.
    #[inline]
    fn wake_for(self: &Arc<Self>, lane: Lane) {
        if self.places.wants_waking() && (lane == Lane::Outside || self.sessions.has_room()) {
            let todo = self.places.wake();
            self.carry_out(todo);
        }
    }

    /// Without workers, the thread that made something ready runs it.
    #[inline]
    fn drain_if_alone(self: &Arc<Self>) {
        if self.workers == 0 && Worker::with(self.id, |worker: Option<&Worker<D>>| worker.is_none())
        {
            Worker::drain(self);
        }
    }

    /// Without workers, finds a thread that runs what this one, which will not, made ready.
    fn summon(self: &Arc<Self>) {
        if self.workers == 0
            && Worker::with(self.id, |worker: Option<&Worker<D>>| worker.is_none())
            && self.queues.has_work()
        {
            let helpers = self.helpers.lock().clone();
            for latch in helpers {
                latch.nudge();
            }
            self.went_quiet();
        }
    }

    // ---- running ----------------------------------------------------------------------------

    /// Starts the clock of an attempt.
    pub(crate) fn begin_attempt(&self, task: &TaskRef<D>, limit: Duration) {
        let attempt = {
            let mut links = task.links.lock();
            let rare = links.rare();
            if rare.attempt % 2 == 1 {
                return; // resumed in the middle of it
            }
            rare.attempt += 1;
            rare.attempt
        };
        if let Err(error) = self.timer.arm(task, attempt, limit, expire) {
            self.domain.warn(&format!(
                "the time limit of {} is not watched, the system refuses a thread: {error}",
                task.label
            ));
        }
    }

    /// The body of `task`, which this thread owns, ended.
    pub(crate) fn end_attempt(
        self: &Arc<Self>,
        task: &TaskRef<D>,
        result: Result<D::Value, Trouble<D>>,
    ) {
        self.record(Event::End, task);
        let options = task.options();
        let mut timed_out = None;
        if let Some(limit) = options.and_then(|options| options.timeout) {
            // From here on the clock of this attempt says nothing any more.
            task.links.lock().rare().attempt += 1;
            timed_out = task.timed_out().then_some(limit);
        }
        let outcome = match (timed_out, result) {
            (Some(limit), _) => Outcome::Failed(Failure::TimedOut(limit)),
            (None, Ok(value)) => Outcome::Value(value),
            (None, Err(Trouble::Cancelled)) => Outcome::Failed(Failure::Cancelled),
            (None, Err(Trouble::Raised(error))) => Outcome::Failed(Failure::Raised(error)),
        };
        if let Some(options) = options
            && matches!(
                outcome,
                Outcome::Failed(Failure::Raised(_) | Failure::TimedOut(_))
            )
            && self.repeat(task, options.retries)
        {
            return;
        }
        if is_on_devices(task) {
            self.launch_off(task, outcome);
        } else {
            self.settle(task, outcome);
        }
    }

    /// Gives a failed attempt another try, if one is left and nobody asked the task to end.
    fn repeat(self: &Arc<Self>, task: &TaskRef<D>, retries: u32) -> bool {
        if retries == 0 || self.is_cancelling() {
            return false;
        }
        {
            let mut links = task.links.lock();
            let rare = links.rare();
            if rare.repeated == retries {
                return false;
            }
            rare.repeated += 1;
        }
        if is_on_devices(task) {
            self.put_off(task);
        }
        if let Some(mapping) = task.mapping() {
            mapping.take(BEGUN);
        }
        let time = self.now();
        let repeated = task.state.advance_when(
            Phase::Running,
            Phase::Ready,
            |state| !state.has(CANCEL),
            0,
            TIMED_OUT | DELIVERED,
        );
        if repeated.is_err() {
            return false;
        }
        self.record_at(time, Event::Retry, task);
        self.make_ready(Arc::clone(task), time);
        true
    }

    /// Ends a task whose body went on [elsewhere](crate::task::Step::Elsewhere).
    pub fn finish(self: &Arc<Self>, task: &TaskRef<D>, result: Result<D::Value, Trouble<D>>) {
        self.end_attempt(task, result);
        self.summon();
        self.elsewhere.fetch_sub(1, Ordering::SeqCst);
        self.went_quiet();
    }

    /// Counts the body that this thread runs as one that goes on elsewhere; its domain calls it
    /// before it lets go of the body.
    pub fn leave(&self) {
        self.elsewhere.fetch_add(1, Ordering::SeqCst);
        Worker::with(self.id, |worker: Option<&Worker<D>>| {
            if let Some(task) = worker.and_then(Worker::running) {
                work::disturb(task);
                self.record(Event::Suspend, task);
            }
        });
    }

    /// Suspends the running task of this thread until `tasks` are done; false if it was asked to
    /// end, which the body is to hear first.
    pub(crate) fn suspend(
        self: &Arc<Self>,
        task: &TaskRef<D>,
        tasks: Vec<TaskRef<D>>,
        until: Until,
    ) -> bool {
        let tasks: Arc<[TaskRef<D>]> = tasks.into();
        let latch = Latch::new(tasks.len(), until, Waker::Task(Arc::clone(task)));
        let loose = self.count_loose(&tasks) != 0;
        task.links.lock().rare().awaits = Some(Awaits {
            latch: Arc::clone(&latch),
            tasks: Arc::clone(&tasks),
        });
        let time = self.now();
        let suspended = task.state.advance_when(
            Phase::Running,
            Phase::Suspended,
            |state| !state.is_asked(),
            if loose { LOOSE_WAIT } else { 0 },
            0,
        );
        if suspended.is_err() {
            let awaits = task.links.lock().rare().awaits.take();
            drop(awaits);
            self.loose_waits
                .fetch_sub(usize::from(loose), Ordering::SeqCst);
            return false;
        }
        self.record_at(time, Event::Suspend, task);
        if let Err(WaitError::Cycle(cycle)) = self.watch(&latch, &tasks, Some(task)) {
            self.resume(task, Why::Cycle(&latch, cycle));
        }
        true
    }

    /// Suspends the running task of this thread until it is woken; false if it was meanwhile, or
    /// was asked to end.
    pub(crate) fn sleep(&self, task: &TaskRef<D>) -> bool {
        self.elsewhere.fetch_add(1, Ordering::SeqCst);
        let time = self.now();
        let slept = task.state.advance_when(
            Phase::Running,
            Phase::Suspended,
            |state| !state.has(WOKEN) && !state.is_asked(),
            SLEEPING,
            0,
        );
        if slept.is_err() {
            self.elsewhere.fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        self.record_at(time, Event::Suspend, task);
        true
    }

    /// Wakes a body that [sleeps](crate::task::Step::Sleep), or will.
    pub fn awaken(task: &TaskRef<D>) {
        task.state.set(WOKEN);
        if let Some(engine) = Self::of(task) {
            engine.resume(task, Why::Woken);
        }
    }

    /// Lets a suspended body go on, if `why` is a reason to.
    fn resume(self: &Arc<Self>, task: &TaskRef<D>, why: Why<'_, D>) {
        let time = self.now();
        let resumed = {
            let mut links = task.links.lock();
            let awaited = links.rare.as_ref().and_then(|rare| rare.awaits.as_ref());
            let admits = |state: Snapshot| match &why {
                Why::Opened(latch) | Why::Cycle(latch, _) => {
                    awaited.is_some_and(|awaits| Arc::ptr_eq(&awaits.latch, latch))
                }
                Why::Asked => state.is_asked(),
                Why::Woken => state.has(SLEEPING),
            };
            task.state
                .advance_when(
                    Phase::Suspended,
                    Phase::Ready,
                    admits,
                    0,
                    SLEEPING | LOOSE_WAIT,
                )
                .ok()
                .map(|before| {
                    let rare = links.rare.as_deref_mut();
                    let awaits = rare.and_then(|rare| rare.awaits.take());
                    if let Why::Cycle(_, cycle) = why {
                        links.rare().cycle = Some(cycle);
                    }
                    (before, awaits)
                })
        };
        let Some((before, awaits)) = resumed else {
            return;
        };
        if let Some(awaits) = awaits {
            if awaits.latch.give_up() || !awaits.latch.needs_all() {
                work::abandon(&awaits.latch, &awaits.tasks);
            }
            drop(awaits);
        }
        if before.has(LOOSE_WAIT) {
            self.loose_waits.fetch_sub(1, Ordering::SeqCst);
        }
        self.make_ready(Arc::clone(task), time);
        self.summon();
        if before.has(SLEEPING) {
            // After the push, so that the body is always either elsewhere or ready.
            self.elsewhere.fetch_sub(1, Ordering::SeqCst);
        }
    }

    // ---- waiting ----------------------------------------------------------------------------

    /// Counts one wait in if it is for an unspawned or dirty task.
    pub(crate) fn count_loose(&self, tasks: &[TaskRef<D>]) -> usize {
        let loose = usize::from(tasks.iter().any(|task| graph::is_loose(task)));
        if loose != 0 {
            self.loose_waits.fetch_add(loose, Ordering::SeqCst);
        }
        loose
    }

    /// Registers `latch` with `tasks`. `waiting` is the task whose body waits, if one does: then a
    /// wait that could never end is refused.
    pub(crate) fn watch(
        self: &Arc<Self>,
        latch: &Arc<Latch<D>>,
        tasks: &[TaskRef<D>],
        waiting: Option<&TaskRef<D>>,
    ) -> Result<(), WaitError> {
        for task in tasks {
            let link = Link::Latch(Arc::clone(latch));
            let listens = match waiting {
                Some(_) => self.listen(task, link),
                None => Self::listen_outside(task, link),
            };
            if listens.is_err() {
                Self::arrive(Some(self), latch, task.is_failed());
            }
        }
        // Only what waits itself can close a cycle; it says so before it looks at us, and we have
        // registered before we look at it.
        if let Some(waiting) = waiting
            && latch.waiter().is_some()
            && !latch.is_open()
            && tasks.iter().any(|task| may_wait(task))
        {
            let found = {
                let _guard = self.graph.lock();
                let found = graph::search(waiting, tasks, false);
                if found.cycle.is_some() {
                    // Under the lock, so that no other search finds the same cycle.
                    work::abandon(latch, tasks);
                }
                found
            };
            if let Some(cycle) = found.into_cycle() {
                return Err(WaitError::Cycle(cycle));
            }
        }
        if let Some(waiting) = waiting
            && latch.waits_for_any()
            && !latch.is_open()
            && let Some(cycle) = self.find_no_way_out(waiting, tasks)
        {
            work::abandon(latch, tasks);
            return Err(WaitError::Cycle(cycle));
        }
        if latch.registered() {
            Self::opened(Some(self), latch);
        }
        Ok(())
    }

    /// A body waits for any of `tasks`: a cycle through the first, if there is one through each.
    fn find_no_way_out(&self, waiting: &TaskRef<D>, tasks: &[TaskRef<D>]) -> Option<Vec<String>> {
        if !tasks.iter().all(|task| may_wait(task)) {
            return None;
        }
        let mut first = None;
        for task in tasks {
            let found = {
                let _guard = self.graph.lock();
                graph::search(waiting, std::slice::from_ref(task), false)
            };
            let cycle = found.into_cycle()?;
            first.get_or_insert(cycle);
        }
        first
    }

    /// A task that `latch` watches is done. `near` is the engine that most likely is the waiter's.
    fn arrive(near: Option<&Arc<Self>>, latch: &Arc<Latch<D>>, failed: bool) {
        let uncount =
            |task: &TaskRef<D>| Self::at(near, task, |engine| engine.places.uncount_blocked());
        if latch.arrive(failed, uncount) {
            Self::opened(near, latch);
        }
    }

    /// Acts on a latch that opened just now.
    fn opened(near: Option<&Arc<Self>>, latch: &Arc<Latch<D>>) {
        match latch.waker() {
            Waker::Thread(_) => {}
            Waker::Task(task) => Self::at(near, task, |engine| {
                engine.resume(task, Why::Opened(latch));
            }),
            Waker::Call(callback) => {
                let callback = callback.take();
                if let Some(callback) = callback {
                    assert_unlocked();
                    gathering::apart::<D>(|| D::call_back(callback, None));
                }
            }
        }
    }

    /// Calls `f` with the engine of `task`, if it is open.
    #[inline]
    fn at(near: Option<&Arc<Self>>, task: &Task<D>, f: impl FnOnce(&Arc<Self>)) {
        let id = task.engine.load(Ordering::Relaxed);
        match near {
            Some(engine) if engine.id == id => f(engine),
            _ => {
                if let Some(engine) = Self::of(task) {
                    f(&engine);
                }
            }
        }
    }

    /// Blocks the calling thread, whether it runs a body or not, until `tasks` are done or the time
    /// has come; says whether they are.
    ///
    /// # Errors
    /// [`WaitError`], for the wait of a body.
    pub fn wait(
        self: &Arc<Self>,
        tasks: &[TaskRef<D>],
        until: Until,
        deadline: Option<Instant>,
    ) -> Result<bool, WaitError> {
        assert_unlocked();
        if work::is_over(tasks, until) {
            return Ok(true);
        }
        Self::deliver();
        Worker::with(self.id, |worker| match worker {
            Some(worker) => worker.wait(tasks, until, deadline),
            None => {
                if self.workers == 0 {
                    Worker::drain(self);
                }
                Ok(
                    work::is_over(tasks, until)
                        || work::block_outside(self, tasks, until, deadline),
                )
            }
        })
    }

    /// Calls back when `tasks` are done; at once, if they are. Nothing if the returned latch is
    /// [abandoned](Engine::forget) before.
    pub fn call_when(
        self: &Arc<Self>,
        tasks: &[TaskRef<D>],
        until: Until,
        callback: D::Callback,
    ) -> Arc<Latch<D>> {
        let latch = Latch::new(tasks.len(), until, Waker::call(callback));
        self.watch(&latch, tasks, None)
            .expect("only the wait of a body can close a cycle");
        latch
    }

    /// Takes a latch off the tasks that it watches.
    pub fn forget(latch: &Arc<Latch<D>>, tasks: &[TaskRef<D>]) {
        work::abandon(latch, tasks);
        if let Waker::Call(callback) = latch.waker() {
            let callback = callback.take();
            drop(callback);
        }
    }

    /// Registers a call for when `task` is done; gives it back if it is.
    ///
    /// # Errors
    /// The callback, of a task that is done.
    pub fn add_callback(task: &TaskRef<D>, callback: D::Callback) -> Result<(), D::Callback> {
        let link = Link::Callback(Box::new(callback));
        Self::listen_outside(task, link).map_err(|link| match link {
            Link::Callback(callback) => *callback,
            _ => unreachable!("the link that was given comes back"),
        })
    }

    // ---- ending tasks -----------------------------------------------------------------------

    /// Cancels a pending task, true; or asks a running one, false. True also for one that was
    /// cancelled before, or is being cancelled by another thread, which may not be done yet.
    pub fn cancel(task: &TaskRef<D>) -> bool {
        loop {
            let state = task.state.load();
            match state.phase() {
                Phase::Done => return state.has(CANCELLED),
                Phase::Unspawned => {
                    // Whoever depends on it may be of any engine.
                    let engines = D::engines().all();
                    let _moving: Vec<_> =
                        engines.iter().map(|engine| Moving::new(engine)).collect();
                    if claim_to_cancel(task, Phase::Unspawned) {
                        settle_orphan(task, Outcome::Failed(Failure::Cancelled));
                        return true;
                    }
                }
                phase @ (Phase::Waiting | Phase::Ready) => {
                    let engine = Self::of(task);
                    let _moving = engine.as_ref().map(Moving::new);
                    if claim_to_cancel(task, phase) {
                        let outcome = Outcome::Failed(Failure::Cancelled);
                        match &engine {
                            Some(engine) => engine.settle(task, outcome),
                            None => settle_orphan(task, outcome),
                        }
                        return true;
                    }
                }
                Phase::Running | Phase::Suspended => {
                    let before = task.state.set(CANCEL);
                    match before.phase() {
                        // No body runs: another canceller has claimed the task, or its spawner has,
                        // who sees the request and cancels it before it can become ready.
                        Phase::Running if before.has(CANCELLED | DIRTY) => return true,
                        Phase::Suspended | Phase::Running => {
                            Self::ask(task, before);
                            return false;
                        }
                        Phase::Done => return before.has(CANCELLED),
                        // It came back meanwhile: it is pending, and cancelled as such.
                        Phase::Unspawned | Phase::Waiting | Phase::Ready => {}
                    }
                }
            }
        }
    }

    /// Tells the body of `task`, whose flag was just set in the word `before`, that it is to end.
    fn ask(task: &TaskRef<D>, before: Snapshot) {
        let Some(engine) = Self::of(task) else {
            return;
        };
        let _moving = Moving::new(&engine);
        if before.phase() == Phase::Suspended {
            engine.resume(task, Why::Asked);
        } else {
            engine.domain.asked(task);
        }
    }

    /// Cancels every pending task and asks every running one, now and from now on: tasks that wait
    /// or are suspended hear of it when their turn comes, which nothing delays any more.
    pub fn cancel_all(self: &Arc<Self>) {
        self.cancelling.store(true, Ordering::SeqCst);
        self.went_quiet();
    }

    /// Whether [`Engine::cancel_all`] was called.
    #[inline]
    pub fn is_cancelling(&self) -> bool {
        self.cancelling.load(Ordering::Relaxed)
    }

    /// Whether the body of a running task was asked to end, alone or with all others.
    pub fn cancel_requested(&self, task: &Task<D>) -> bool {
        task.cancel_requested() || self.is_cancelling()
    }

    /// Whether the body that runs on this thread is to hear of a request to end at its next wait.
    pub fn is_asked(&self) -> bool {
        Worker::with(self.id, |worker: Option<&Worker<D>>| {
            let Some(task) = worker.and_then(Worker::running) else {
                return false;
            };
            let state = task.state.load();
            state.is_asked() || (self.is_cancelling() && !state.has(DELIVERED))
        })
    }

    /// A task that this thread won the right to run, while all are cancelled: cancels it, unless
    /// its body has begun; then it is asked.
    pub(crate) fn skip_cancelled(self: &Arc<Self>, task: &TaskRef<D>) -> bool {
        let begun = task.content.with(|content| {
            // SAFETY: this thread owns the running task.
            match unsafe { &*content } {
                Content::Body(body) => self.domain.has_begun(body),
                Content::Nothing | Content::Outcome(_) => false,
            }
        });
        if begun {
            task.state.set(CANCEL);
            return false;
        }
        self.settle(task, Outcome::Failed(Failure::Cancelled));
        true
    }

    /// Whether `task` was spawned here.
    #[inline]
    pub(crate) fn owns(&self, task: &Task<D>) -> bool {
        task.engine.load(Ordering::Relaxed) == self.id
    }

    /// The engine of a spawned task, while it is open.
    pub fn of(task: &Task<D>) -> Option<Arc<Self>> {
        match task.engine.load(Ordering::Relaxed) {
            0 => None,
            id => D::engines().get(id),
        }
    }

    /// Gives a task that this thread owns its outcome, and everything that follows from it.
    fn settle(self: &Arc<Self>, task: &TaskRef<D>, outcome: Outcome<D>) {
        let _gathering = self.gather();
        let mut worklist = Vec::new();
        self.settle_one(task, Ending::Given(outcome), &mut worklist);
        self.work_off(worklist);
    }

    /// As [`work_off`](Self::work_off), of one task or none.
    fn work_off_first(self: &Arc<Self>, settled: Option<Settled<D>>) {
        if let Some(Settled { task, ending }) = settled {
            let _gathering = self.gather();
            let mut worklist = Vec::new();
            settle_anywhere(Some(self), &task, ending, &mut worklist);
            self.work_off(worklist);
        }
    }

    fn work_off(self: &Arc<Self>, mut worklist: Vec<Settled<D>>) {
        while let Some(Settled { task, ending }) = worklist.pop() {
            settle_anywhere(Some(self), &task, ending, &mut worklist);
        }
    }

    fn settle_one(
        self: &Arc<Self>,
        task: &TaskRef<D>,
        ending: Ending<D>,
        worklist: &mut Vec<Settled<D>>,
    ) {
        let (event, is_root) = task.foresee(&ending, |outcome| match outcome {
            Outcome::Value(_) => (Event::Done, false),
            Outcome::Failed(failure) => {
                let is_root = matches!(
                    failure,
                    Failure::Raised(_)
                        | Failure::TimedOut(_)
                        | Failure::Device(_)
                        | Failure::Mapping(_)
                        | Failure::Unspawned(_)
                );
                (Event::Failed, is_root)
            }
        });
        if is_root && !self.domain.wants_unread() {
            self.keep_failure(task);
        }
        self.account(task, event == Event::Done);
        let time = self.now();
        let before = publish(task, ending, worklist, Some(self));
        self.record_at(time, event, task);
        if is_on_devices(task) || before.has(LAUNCHED) {
            self.arrived(task, before);
        }
        if is_root && self.domain.wants_unread() && !task.has_handles() {
            self.report(task);
        }
        if self.owns(task) {
            self.count_out();
        }
    }

    #[inline]
    fn count_out(&self) {
        self.shard().finished.fetch_add(1, Ordering::SeqCst);
        // A worker tells those who close when it has nothing to do, see `went_quiet`.
        if (self.closing.load(Ordering::SeqCst) && !self.is_worker())
            || (self.crowd.load(Ordering::SeqCst) != 0 && self.unfinished() <= self.enough_room())
        {
            self.notify();
        }
    }

    /// Wakes those who wait for the engine to be quiet, or for room.
    #[cold]
    fn notify(&self) {
        // The lock orders this with a waiter between its look and its wait.
        drop(self.quiet.lock());
        self.changed.notify_all();
    }

    fn keep_failure(&self, task: &TaskRef<D>) {
        self.failures.lock().insert(task.id, Arc::clone(task));
    }

    /// Notes that somebody received the failure of `task`, or of its dependent: the runtime's exit
    /// has not to raise it any more, and keeps it no longer.
    pub fn tell(task: &TaskRef<D>) {
        if let Some(root) = task.tell()
            && let Some(engine) = Self::of(root)
        {
            let kept = engine.failures.lock().remove(&root.id);
            drop(kept);
        }
    }

    /// Reports a failure that nobody can receive any more, once.
    fn report(&self, task: &TaskRef<D>) {
        let state = task.state.load();
        if state.has(TOLD) || task.state.set(REPORTED).has(REPORTED) {
            return;
        }
        assert_unlocked();
        gathering::apart::<D>(|| self.domain.report_unread(task));
    }

    // ---- closing ----------------------------------------------------------------------------

    /// Some thread has nothing to do: nobody may be left who has, which those who close and those
    /// who wait for room look at.
    pub(crate) fn went_quiet(self: &Arc<Self>) {
        self.relieve();
        if self.closing.load(Ordering::SeqCst) || self.crowd.load(Ordering::SeqCst) != 0 {
            self.notify();
        }
    }

    /// Waits until every task has its outcome. Tasks that others wait for and that were never
    /// spawned fail, once nothing else can move. False if `interrupted` said so in between; it is
    /// asked about every 50 ms, with no lock held.
    ///
    /// # Panics
    /// In a body or a callback on a thread of this engine, which would wait for itself.
    pub fn close_when_quiet(self: &Arc<Self>, interrupted: &mut dyn FnMut() -> bool) -> bool {
        assert_unlocked();
        assert!(
            !self.is_worker(),
            "a runtime cannot be closed by one of its own tasks"
        );
        self.closing.store(true, Ordering::SeqCst);
        loop {
            self.drain_if_alone();
            if self.unfinished() == 0 && !self.combine_open() && self.is_all_home() && self.shut() {
                return true;
            }
            if self.advance_time() {
                continue;
            }
            if self.is_stuck() && !self.fail_missing() {
                // Nothing is ready, nobody runs, nothing is missing, and still tasks are
                // unfinished: a spawner is about to move them.
                yield_now();
            }
            let mut wait = || {
                let mut quiet = self.quiet.lock();
                if (self.unfinished() != 0 && !self.is_stuck_hint()) || self.is_coming_home() {
                    quiet = self.changed.wait_for(quiet, Duration::from_millis(50));
                }
                drop(quiet);
            };
            if self.workers == 0 {
                // Bodies ran here, so this thread has the domain's surroundings, which threads of
                // devices and event loops may need to get on.
                self.domain.blocking(&mut wait);
            } else {
                wait();
            }
            if interrupted() {
                return false;
            }
        }
    }

    /// Closes the gate if nothing is unfinished; false if somebody spawned meanwhile.
    fn shut(&self) -> bool {
        let swap = |from, to| {
            self.gate
                .compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst)
        };
        if swap(OPEN, CLOSING) == Err(CLOSED) {
            return true;
        }
        if self.unfinished() == 0 {
            return matches!(swap(CLOSING, CLOSED), Ok(_) | Err(CLOSED));
        }
        let _opened_by_a_spawner = swap(CLOSING, OPEN);
        false
    }

    /// Whether tasks are unfinished and nothing can move. What moves is looked at between two looks
    /// at the threads; see [`Places`] for why that is enough.
    fn is_stuck(&self) -> bool {
        let stirs = self.places.stirs();
        self.places.is_still()
            && self.elsewhere.load(Ordering::SeqCst) == 0
            && !self.queues.has_work()
            && self.places.is_still()
            && self.places.stirs() == stirs
            && self.unfinished() != 0
    }

    fn is_stuck_hint(&self) -> bool {
        self.is_stuck() && self.has_missing()
    }

    fn has_missing(&self) -> bool {
        self.missing
            .lock()
            .list
            .iter()
            .any(|task| task.strong_count() != 0)
    }

    /// Fails the tasks that were never spawned and that tasks wait for; false if there is none.
    fn fail_missing(self: &Arc<Self>) -> bool {
        let known = self.missing.lock().take();
        let (missing, names) = claim_missing(&known);
        for task in &missing {
            if let Some(trace) = &self.trace {
                trace.name(task.id, &task.label.to_string());
            }
            let failure = if self.is_cancelling() {
                Failure::Cancelled
            } else {
                Failure::Unspawned(Arc::clone(&names))
            };
            self.settle(task, Outcome::Failed(failure));
        }
        // Those that a spawner has claimed may come back.
        let claimed: Vec<_> = known
            .into_iter()
            .filter_map(|weak| weak.upgrade())
            .filter(|task| is_missing(task))
            .collect();
        for task in &claimed {
            let gone = self.missing.lock().add(task);
            drop(gone);
        }
        !missing.is_empty()
    }

    /// Ends the threads and gives the root failures that nobody received. Every task has its
    /// outcome ([`Engine::close_when_quiet`]).
    ///
    /// What the end of a thread costs its domain (each has to be attached to the interpreter once
    /// more, one after the other) this does not wait for: threads that ended part when this one is
    /// back, so that they are not in its way.
    pub fn close(self: &Arc<Self>) -> Vec<TaskRef<D>> {
        assert_unlocked();
        self.closing.store(true, Ordering::SeqCst);
        self.gate.store(CLOSED, Ordering::SeqCst);
        self.domain.blocking(&mut || {
            self.timer.close();
            self.maps.close();
            self.places.close().ring();
            let mut quiet = self.quiet.lock();
            while self.alive.load(Ordering::SeqCst) != 0 {
                quiet = self.changed.wait(quiet);
            }
        });
        {
            let _quiet = self.quiet.lock();
            self.seen_off.store(true, Ordering::SeqCst);
        }
        self.parting.notify_one();
        let failures = std::mem::take(&mut *self.failures.lock());
        let mut failures: Vec<TaskRef<D>> = failures.into_values().collect();
        failures.sort_by_key(|task| task.id);
        D::engines().remove(self.id);
        self.dismiss_witness();
        if let Some(trace) = &self.trace
            && let Err(error) = trace.close()
        {
            self.domain
                .warn(&format!("the trace is incomplete: {error}"));
        }
        failures
            .into_iter()
            .filter(|task| !task.state.load().has(TOLD) && !task.state.set(REPORTED).has(REPORTED))
            .collect()
    }

    /// Leaves threads whose bodies do not end behind: the process is about to end, or the user
    /// insisted. The engine takes no more tasks.
    pub fn abandon(self: &Arc<Self>) {
        self.gate.store(CLOSED, Ordering::SeqCst);
        D::engines().remove(self.id);
        self.dismiss_witness();
    }
}

/// Why a claimed task was not published.
enum Refused<D: Domain> {
    /// Its edges close a cycle; they were taken back. By how much the count of its predecessors is too
    /// large.
    Cycle(graph::Search<D>, u32),
    /// Something else; the edges to its dependencies stand.
    Error(SpawnError),
}

/// Takes back the edges from `predecessors` to a task that is not published, and says how many there
/// were.
fn unlink<D: Domain>(task: &TaskRef<D>, predecessors: &[TaskRef<D>]) -> u32 {
    let unlinked = predecessors
        .iter()
        .map(|other| other.unlink_dependent(task));
    unlinked.sum()
}

/// Why a suspended body goes on.
enum Why<'a, D: Domain> {
    /// The latch opened.
    Opened(&'a Arc<Latch<D>>),
    /// The wait behind the latch would never end: the names along the cycle.
    Cycle(&'a Arc<Latch<D>>, Vec<String>),
    /// It was asked to end.
    Asked,
    /// It was woken.
    Woken,
}

/// Counts a thread of somebody else while it is about to move a task: nobody else may know that
/// anything moves.
struct Moving<'a, D: Domain>(&'a Arc<Engine<D>>);

impl<'a, D: Domain> Moving<'a, D> {
    fn new(engine: &'a Arc<Engine<D>>) -> Self {
        engine.elsewhere.fetch_add(1, Ordering::SeqCst);
        Self(engine)
    }
}

impl<D: Domain> Drop for Moving<'_, D> {
    fn drop(&mut self) {
        self.0.summon();
        self.0.elsewhere.fetch_sub(1, Ordering::SeqCst);
        self.0.went_quiet();
    }
}

/// A task and the outcome that it is about to get from the thread that owns it.
struct Settled<D: Domain> {
    task: TaskRef<D>,
    ending: Ending<D>,
}

/// Whether a task may itself wait for others, or have predecessors.
fn may_wait<D: Domain>(task: &Task<D>) -> bool {
    let state = task.state.load();
    match state.phase() {
        Phase::Unspawned | Phase::Waiting | Phase::Suspended => true,
        // Dirt: its spawner has it, and may have put some of its edges into the graph already.
        Phase::Running => state.has(BLOCKED | DIRTY),
        Phase::Ready | Phase::Done => false,
    }
}

/// The time of an attempt is over.
fn expire<D: Domain>(task: &TaskRef<D>, attempt: u32) {
    let asked = {
        let mut links = task.links.lock();
        (links.rare().attempt == attempt).then(|| task.state.set(TIMED_OUT))
    };
    if let Some(before) = asked {
        Engine::ask(task, before);
    }
}

/// Claims a pending task to cancel it, in a way that tells another canceller what it is claimed for.
fn claim_to_cancel<D: Domain>(task: &Task<D>, from: Phase) -> bool {
    task.state
        .advance_when(from, Phase::Running, |_| true, CANCELLED, 0)
        .is_ok()
}

/// Publishes the outcome of a task that this thread owns and works through who waits for it. Gives the word
/// before.
fn publish<D: Domain>(
    task: &TaskRef<D>,
    ending: Ending<D>,
    worklist: &mut Vec<Settled<D>>,
    engine: Option<&Arc<Engine<D>>>,
) -> Snapshot {
    assert_unlocked();
    let places = match engine {
        Some(engine) if engine.maps.follows() => mapping::places_of(task),
        _ => 0,
    };
    let mut failed = false;
    let before = task.conclude(ending, |outcome| {
        failed = matches!(outcome, Outcome::Failed(_));
        match outcome {
            Outcome::Value(_) => 0,
            // Who claimed it to cancel it has said so already.
            Outcome::Failed(Failure::Cancelled) if !task.is_cancelled() => FAILED | CANCELLED,
            Outcome::Failed(_) => FAILED,
        }
    });
    let links = task.take_links(before, failed);
    hand_on(task, links, failed, places, worklist, engine);
    before
}

/// Works through those who wait for a task that is done.
fn hand_on<D: Domain>(
    task: &TaskRef<D>,
    links: List<D>,
    failed: bool,
    places: u64,
    worklist: &mut Vec<Settled<D>>,
    engine: Option<&Arc<Engine<D>>>,
) {
    let release = |next: TaskRef<D>, worklist: &mut Vec<Settled<D>>| {
        if next.release(1) {
            let engine_of_next = next.engine.load(Ordering::Relaxed);
            match engine.filter(|engine| engine.id == engine_of_next) {
                Some(engine) => engine.released(next, worklist),
                None => {
                    if let Some(engine) = Engine::of(&next) {
                        engine.released(next, worklist);
                        engine.summon();
                    }
                }
            }
        }
    };
    let land = |next: TaskRef<D>, worklist: &mut Vec<Settled<D>>| {
        let landed = next.land(None);
        match landed {
            Landed::Nothing => return,
            Landed::Done => return worklist.push(devices::settled(&next)),
            Landed::Free | Landed::Past => {}
        }
        let engine_of_next = next.engine.load(Ordering::Relaxed);
        match engine.filter(|engine| engine.id == engine_of_next) {
            Some(engine) => engine.go_on(next, landed, worklist),
            None => {
                if let Some(engine) = Engine::of(&next) {
                    engine.go_on(next, landed, worklist);
                    engine.summon();
                }
            }
        }
    };
    links.for_each(|link| match link {
        Link::After(next) => release(next, worklist),
        Link::Dependent(next) => {
            if failed {
                next.poison(task.root());
            }
            if places != 0
                && let Some(mapping) = next.mapping()
            {
                mapping.near(places);
            }
            release(next, worklist);
        }
        Link::Ahead(next) => {
            if failed {
                next.poison(task.root());
            }
            land(next, worklist);
        }
        Link::Behind(next) => land(next, worklist),
        Link::Latch(latch) => {
            Engine::arrive(engine, &latch, failed);
        }
        Link::Callback(callback) => {
            assert_unlocked();
            gathering::apart::<D>(|| D::call_back(*callback, Some(task)));
        }
    });
}

/// As [`Engine::settle`], of a task that belongs to no open engine.
fn settle_orphan<D: Domain>(task: &TaskRef<D>, outcome: Outcome<D>) {
    let mut worklist = Vec::new();
    publish(task, Ending::Given(outcome), &mut worklist, None);
    while let Some(Settled { task, ending }) = worklist.pop() {
        settle_anywhere(None, &task, ending, &mut worklist);
    }
}

fn settle_anywhere<D: Domain>(
    near: Option<&Arc<Engine<D>>>,
    task: &TaskRef<D>,
    ending: Ending<D>,
    worklist: &mut Vec<Settled<D>>,
) {
    let id = task.engine.load(Ordering::Relaxed);
    match near {
        Some(engine) if engine.id == id => engine.settle_one(task, ending, worklist),
        _ => match Engine::of(task) {
            Some(engine) => {
                engine.settle_one(task, ending, worklist);
                engine.summon();
            }
            None => {
                publish(task, ending, worklist, None);
            }
        },
    }
}

/// A handle that a user holds. While there is one, a failure can still be received.
pub struct Handle<D: Domain>(TaskRef<D>);

impl<D: Domain> Handle<D> {
    /// A handle of `task`.
    #[must_use]
    pub fn new(task: TaskRef<D>) -> Self {
        task.add_handle();
        Self(task)
    }

    /// A handle of a task that is known by name before it is spawned.
    #[must_use]
    pub fn unspawned(label: D::Label) -> Self {
        let content = Content::Nothing;
        Self(Arc::new(Task::new(
            label,
            Phase::Unspawned,
            content,
            None,
            1,
        )))
    }

    /// The task.
    #[inline]
    #[must_use]
    pub fn task(&self) -> &TaskRef<D> {
        &self.0
    }
}

impl<D: Domain> Clone for Handle<D> {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.0))
    }
}

impl<D: Domain> Drop for Handle<D> {
    fn drop(&mut self) {
        if self.0.remove_handle() {
            let state = self.0.state.load();
            if state.has(FAILED)
                && !state.has(TOLD | CANCELLED)
                && !matches!(
                    self.0.outcome(),
                    Some(Outcome::Failed(Failure::Dependency(_)))
                )
                && let Some(engine) = Engine::of(&self.0)
                && engine.domain.wants_unread()
            {
                engine.report(&self.0);
            }
        }
    }
}
