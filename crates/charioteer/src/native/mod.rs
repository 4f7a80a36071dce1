//! The Rust API: closures and futures as tasks, typed handles, task spaces.
//!
//! ```
//! use charioteer::native::{Runtime, TaskSpace};
//!
//! let runtime = Runtime::new(2)?;
//! let grid = TaskSpace::<u64, 2>::new("grid");
//! for i in 0..4_i64 {
//!     for j in 0..4_i64 {
//!         let mut task = runtime.task();
//!         let above = (i > 0).then(|| grid.at([i - 1, j]));
//!         let left = (j > 0).then(|| grid.at([i, j - 1]));
//!         for dependency in [&above, &left].into_iter().flatten() {
//!             task = task.after(dependency);
//!         }
//!         task.spawn_at(&grid.at([i, j]), move || {
//!             let of = |task: Option<_>| task.map_or(1, |task: charioteer::native::Task<u64>| {
//!                 *task.result().expect("it is done")
//!             });
//!             if i == 0 && j == 0 { 1 } else { of(above) + of(left) }
//!         })?;
//!     }
//! }
//! assert!(grid.at([3, 3]).result().is_ok());
//! runtime.close()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Tasks that say what they read and write are ordered by that; the data are the program's own.
//!
//! ```
//! use std::sync::Arc;
//! use std::sync::atomic::{AtomicU64, Ordering};
//!
//! use charioteer::native::{Datum, Runtime};
//!
//! let runtime = Runtime::new(2)?;
//! let cells: Arc<Vec<AtomicU64>> = Arc::new((0..8).map(AtomicU64::new).collect());
//! let datum = Datum::new("cells", &[8]);
//! let tiles = datum.grid(&[1]);
//! // Running sums: each task reads what the one before it wrote.
//! for i in 1..8 {
//!     let cells = Arc::clone(&cells);
//!     let (before, here) = (tiles.tile(&[i - 1]), tiles.tile(&[i]));
//!     runtime.task().reads(&before).updates(&here).spawn_detached(move || {
//!         let i = i as usize;
//!         cells[i].fetch_add(cells[i - 1].load(Ordering::Relaxed), Ordering::Relaxed);
//!     })?;
//! }
//! let last = tiles.tile(&[7]);
//! let total = runtime.task().reads(&last).spawn(move || cells[7].load(Ordering::Relaxed))?;
//! assert_eq!(total.result()?, &28);
//! runtime.close()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Data that have bytes of their own go where they are needed. A body on a device finds them there, and enqueues
//! its work; what it wrote comes home when the host wants it, or the runtime closes.
//!
//! ```
//! use std::sync::Arc;
//! use std::sync::atomic::{AtomicU64, Ordering};
//!
//! use charioteer::gang::{Alternative, Member, WHOLE};
//! use charioteer::machine::{Description, Kind, Machine, Time};
//! use charioteer::native::{Datum, Runtime, current};
//!
//! let machine = Machine::virtual_machine(Description::uniform(2, 1, 1 << 20, Time::Real)?);
//! let runtime = Runtime::builder().workers(2).machine(Arc::clone(&machine)).open()?;
//! let cells: Arc<[AtomicU64]> = (0..8).map(AtomicU64::new).collect();
//! let keep = Box::new(Arc::clone(&cells));
//! let datum = Datum::stored("cells", &[8], 8, cells.as_ptr() as usize, keep);
//! let whole = datum.whole();
//! let gpu = Alternative { members: [Member::Any(Kind::Gpu)].into(), share: WHOLE, memory: 0 };
//! for _ in 0..3 {
//!     let machine = Arc::clone(&machine);
//!     runtime.task().on([gpu.clone()]).updates(&whole).spawn_detached(move || {
//!         let here = current().expect("a task runs");
//!         let view = here.view(0).expect("it has bytes").clone();
//!         let (device, stream) = here.streams()[0];
//!         let gpu = Arc::clone(machine.as_virtual().expect("it is").gpu(device));
//!         let inner = Arc::clone(&gpu);
//!         let double = Box::new(move || {
//!             let bytes = inner.bytes(view.pointer, 64)?;
//!             // SAFETY: eight elements in a row, which nobody else has now.
//!             let row = unsafe { std::slice::from_raw_parts_mut(bytes.as_ptr().cast::<u64>(), 8) };
//!             row.iter_mut().for_each(|it| *it *= 2);
//!             Ok(())
//!         });
//!         gpu.enqueue(stream, double).expect("the device is there");
//!     })?;
//! }
//! runtime.close()?;
//! assert_eq!(cells[7].load(Ordering::Relaxed), 56);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A body fails by returning an error (from [`Spawner::try_spawn`]) or by a panic; both are an
//! outcome of its task, travel to dependents as [`TaskError::Dependency`], and are given by
//! [`Runtime::close`] if nobody received them.

mod domain;
mod space;

use std::any::Any;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as PollContext, Poll};
use std::time::{Duration, Instant};

use crate::data;
pub use crate::data::store::View;
pub use crate::data::{Access, AccessTrouble, Mode, Spread, Views};
use crate::engine::{self, Config, Engine, Handle};
pub use crate::engine::{Counts, Place, SpawnError, WaitError};
use crate::machine::cpus::{self, Pinning, Pins};
use crate::machine::{DeviceError, DeviceId, Machine, Stream};
use crate::mapping::model::Models;
use crate::mapping::policy::Mapper;
use crate::mapping::{Choice, Choices, Mapping};
use crate::schedule::gang::{Alternative, Limits};
use crate::task::{Failure, Need, Options, Outcome, TaskRef, Until, WHOLE_CORE};
pub use domain::Cause;
use domain::{Body, Callback, Label, Native, Wait};
use smallvec::SmallVec;
pub use space::TaskSpace;

/// What tasks order their accesses by: it stands for an array of the program's own, or for anything that
/// only some tasks may use at once. One that is [stored](data::Datum::stored) goes to devices with its tasks.
/// See [`crate::data`].
pub type Datum = data::Datum<Native>;
/// A part of a [`Datum`].
pub type Part = data::Part<Native>;
/// A division of a [`Datum`] into tiles.
pub type Grid = data::Grid<Native>;
/// An access of the host; it ends when it is dropped.
pub type HostAccess = engine::HostAccess<Native>;
/// Why the host may not access data.
pub type HostError = engine::HostError<Native>;

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the runtime is closed"),
            Self::Duplicate => f.write_str("a task of this name was spawned before"),
            Self::Cycle(names) => write!(f, "a cycle of dependencies: {}", names.join(" -> ")),
            Self::Cores(wanted, present) => {
                write!(
                    f,
                    "the task needs {wanted} cores, the runtime has {present}"
                )
            }
            Self::Devices(reasons) => {
                write!(
                    f,
                    "no set of devices can serve the task: {}",
                    reasons.join("; ")
                )
            }
            Self::Access(trouble) => trouble.fmt(f),
            Self::Memory {
                device,
                wanted,
                there,
            } => write!(
                f,
                "the task takes {wanted} bytes of the memory of a {device}, which has {there}"
            ),
        }
    }
}

impl std::error::Error for SpawnError {}

impl fmt::Display for WaitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cycle(names) => {
                write!(f, "the wait would never end: {}", names.join(" -> "))
            }
            Self::Threads(names) => write!(
                f,
                "no thread is left to run what is awaited: {}",
                names.join(" -> ")
            ),
        }
    }
}

impl std::error::Error for WaitError {}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Access(trouble) => trouble.fmt(f),
            Self::Wait(error) => error.fmt(f),
            Self::Failed(task) => {
                write!(
                    f,
                    "what is read is undefined: {} failed: {}",
                    task.label(),
                    error_of(task)
                )
            }
            Self::Late => f.write_str("it was not its turn in time"),
            Self::Closed => f.write_str("the runtime is closed"),
        }
    }
}

impl fmt::Debug for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for HostError {}

/// Why a task has no value.
#[derive(Clone, Debug)]
pub enum TaskError {
    /// Its body returned an error or panicked.
    Failed(Cause),
    /// A predecessor, whose name this is, failed with that.
    Dependency(String, Box<TaskError>),
    /// It was cancelled.
    Cancelled,
    /// An attempt took longer than this.
    TimedOut(Duration),
    /// What it enqueued on a device failed, or the device did.
    Device(DeviceError),
    /// The answer of the user's policy was none: what it was.
    Mapping(Arc<str>),
    /// It was never spawned; the names of all such tasks.
    Unspawned(Arc<[String]>),
    /// Waiting for it was refused.
    Wait(WaitError),
}

impl fmt::Display for TaskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(cause) => write!(f, "the task failed: {cause}"),
            Self::Dependency(name, error) => write!(f, "its dependency {name} failed: {error}"),
            Self::Cancelled => f.write_str("the task was cancelled"),
            Self::TimedOut(limit) => write!(f, "the task took longer than {limit:?}"),
            Self::Device(error) => error.fmt(f),
            Self::Mapping(why) => f.write_str(why),
            Self::Unspawned(names) => write!(f, "never spawned: {}", names.join(", ")),
            Self::Wait(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for TaskError {}

/// What [`Runtime::close`] gives when tasks failed and nobody received it.
#[derive(Debug)]
pub struct Unreceived(
    /// The name and the failure of each such task.
    pub Vec<(String, TaskError)>,
);

impl fmt::Display for Unreceived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tasks failed and nobody received it", self.0.len())?;
        for (name, error) in &self.0 {
            write!(f, "\n  {name}: {error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Unreceived {}

/// What a runtime is opened with.
#[derive(Debug, Clone, Default)]
pub struct Builder {
    workers: Option<usize>,
    max_pending: Option<usize>,
    trace: Option<PathBuf>,
    machine: Option<Arc<Machine>>,
    limits: Limits,
    mapper: Mapper,
    models: Arc<Models>,
    pin: Option<Pinning>,
}

impl Builder {
    /// Gives tasks the devices of a machine, for [`Spawner::on`].
    #[must_use]
    pub fn machine(mut self, machine: Arc<Machine>) -> Self {
        self.machine = Some(machine);
        self
    }

    /// How many tasks may be launched and not complete on a device, 64 unless said; with zero a task
    /// starts only when those it depends on are complete.
    #[must_use]
    pub fn runahead(mut self, tasks: u32) -> Self {
        self.limits.runahead = tasks;
        self
    }

    /// By how many device-times younger tasks may overtake one that waits for devices, 128 unless said.
    #[must_use]
    pub fn overtaking(mut self, device_times: u64) -> Self {
        self.limits.overtaking = device_times;
        self
    }

    /// Who maps the tasks that have a [choice](Spawner::choices), the earliest finish time unless said.
    /// [`Mapper::User`] fails each such task: there is nobody to ask.
    #[must_use]
    pub fn mapper(mut self, mapper: Mapper) -> Self {
        self.mapper = mapper;
        self
    }

    /// What is known of run times, and is to learn from this runtime.
    #[must_use]
    pub fn models(mut self, models: Arc<Models>) -> Self {
        self.models = models;
        self
    }

    /// Keeps workers on processors, instead of where the system puts them: see [`cpus`].
    #[must_use]
    pub fn pin(mut self, pinning: Pinning) -> Self {
        self.pin = Some(pinning);
        self
    }

    /// Cores to use; zero runs every body on the thread that spawns it, in a deterministic order.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = Some(workers);
        self
    }

    /// Makes threads that spawn wait, outside of tasks, while so many tasks are unfinished.
    #[must_use]
    pub fn max_pending(mut self, tasks: usize) -> Self {
        self.max_pending = Some(tasks);
        self
    }

    /// Writes a [trace](crate::trace).
    #[must_use]
    pub fn trace(mut self, path: impl Into<PathBuf>) -> Self {
        self.trace = Some(path.into());
        self
    }

    /// Opens the runtime.
    ///
    /// # Errors
    /// If the system refuses a thread or the trace file.
    pub fn open(self) -> std::io::Result<Runtime> {
        let workers = self
            .workers
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let pins = self.pin.map(|pinning| pins(pinning, workers)).transpose()?;
        let engine = Engine::open(
            Native,
            Config {
                workers,
                max_pending: self.max_pending,
                trace: self.trace,
                machine: self.machine,
                limits: self.limits,
                mapper: self.mapper,
                models: self.models,
                pins,
            },
        )?;
        Ok(Runtime {
            spawn: Spawn(engine),
            closed: false,
        })
    }
}

/// Processors for so many workers, on the nodes of this machine.
fn pins(pinning: Pinning, workers: usize) -> std::io::Result<Pins> {
    let usable = cpus::usable()?;
    let mut nodes: Vec<Vec<u32>> = cpus::nodes(cpus::SYSTEM.as_ref(), &usable)
        .into_iter()
        .map(|node| node.cpus)
        .collect();
    if nodes.is_empty() {
        nodes.push(usable);
    }
    Pins::new(&nodes, pinning, workers)
}

/// An open runtime. Dropping it waits for its tasks and forgets failures; [`Runtime::close`] gives
/// them.
pub struct Runtime {
    spawn: Spawn,
    closed: bool,
}

impl Runtime {
    /// Opens a runtime with so many workers.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn new(workers: usize) -> std::io::Result<Self> {
        Self::builder().workers(workers).open()
    }

    /// A builder; unless told otherwise the runtime uses every core that the process may.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Spawns a closure. It may be called from any thread, tasks included.
    pub fn spawn<T, F>(&self, body: F) -> Task<T>
    where
        T: Send + Sync + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        self.spawn.spawn(body)
    }

    /// Spawns a closure whose result nobody asks for: cheaper than a [`Task`].
    pub fn spawn_detached(&self, body: impl FnOnce() + Send + 'static) {
        self.spawn.spawn_detached(body);
    }

    /// Spawns a future.
    pub fn spawn_future<T, F>(&self, future: F) -> Task<T>
    where
        T: Send + Sync + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        self.spawn.spawn_future(future)
    }

    /// A task with options.
    pub fn task(&self) -> Spawner<'_> {
        self.spawn.task()
    }

    /// What tasks capture to spawn from inside.
    #[must_use]
    pub fn handle(&self) -> Spawn {
        self.spawn.clone()
    }

    /// Waits until this thread may access data, in the order of this call among the spawns, until what it
    /// gives is dropped. Those that come after it wait for that.
    ///
    /// # Errors
    /// [`HostError`].
    ///
    /// # Panics
    /// If a mode commutes or reduces.
    pub fn host(&self, accesses: &[Access<'_, Native>]) -> Result<HostAccess, HostError> {
        let label = || Label::Name("host".into());
        self.spawn.0.host_access(label, accesses, None)
    }

    /// Brings a part to a device, in the order of this call among the spawns, where it stays until its room is
    /// needed; or to the host. The task is done when it is there.
    ///
    /// # Errors
    /// [`SpawnError`]; [`SpawnError::Devices`] if there is no such device.
    pub fn prefetch(&self, part: &Part, device: DeviceId) -> Result<Task<()>, SpawnError> {
        let label = Label::Name("prefetch".into());
        self.spawn.0.prefetch(label, part, device).map(Task::of)
    }

    /// Drops what a device has of a part, in the order of this call among the spawns; what is there alone is
    /// copied home first. The task is done when that is.
    ///
    /// # Errors
    /// As [`prefetch`](Self::prefetch).
    pub fn evict(&self, part: &Part, device: DeviceId) -> Result<Task<()>, SpawnError> {
        let label = Label::Name("evict".into());
        self.spawn.0.evict(label, part, device).map(Task::of)
    }

    /// What devices have of data; nothing without devices.
    #[must_use]
    pub fn data_counters(&self) -> Vec<data::store::Counters> {
        let store = self.spawn.0.data();
        store.map_or_else(Vec::new, |store| store.counters())
    }

    /// The choices of a function, for [`Spawner::choices`].
    ///
    /// # Errors
    /// [`SpawnError::Devices`] if the machine can never serve any.
    pub fn choices(&self, function: &str, list: Vec<Choice>) -> Result<Arc<Choices>, SpawnError> {
        self.spawn.0.choices(function, list)
    }

    /// What is known of run times.
    #[must_use]
    pub fn models(&self) -> &Arc<Models> {
        self.spawn.0.models()
    }

    /// What it did so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.spawn.0.counts()
    }

    /// Waits for every task and ends the threads.
    ///
    /// # Errors
    /// The failures that nobody received.
    pub fn close(mut self) -> Result<(), Unreceived> {
        let failures = self.shut();
        if failures.is_empty() {
            return Ok(());
        }
        Err(Unreceived(
            failures
                .iter()
                .map(|task| (task.label().to_string(), error_of(task)))
                .collect(),
        ))
    }

    fn shut(&mut self) -> Vec<TaskRef<Native>> {
        if std::mem::replace(&mut self.closed, true) {
            return Vec::new();
        }
        self.spawn.0.close_when_quiet(&mut || false);
        self.spawn.0.close()
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        self.shut();
    }
}

/// The right to spawn in a runtime, for bodies to capture.
#[derive(Clone)]
pub struct Spawn(Arc<Engine<Native>>);

impl Spawn {
    /// As [`Runtime::spawn`].
    ///
    /// # Panics
    /// If the runtime is closed.
    #[inline]
    pub fn spawn<T, F>(&self, body: F) -> Task<T>
    where
        T: Send + Sync + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let handle = self
            .0
            .spawn_handle(Label::None, Body::once(body), None, &[], &[])
            .unwrap_or_else(|error| panic!("{error}"));
        Task::of(handle)
    }

    /// As [`Runtime::spawn_detached`].
    ///
    /// # Panics
    /// If the runtime is closed.
    #[inline]
    pub fn spawn_detached(&self, body: impl FnOnce() + Send + 'static) {
        self.0
            .spawn_detached(Label::None, Body::once(body), None, &[], &[])
            .unwrap_or_else(|error| panic!("{error}"));
    }

    /// As [`Runtime::spawn_future`].
    ///
    /// # Panics
    /// If the runtime is closed.
    pub fn spawn_future<T, F>(&self, future: F) -> Task<T>
    where
        T: Send + Sync + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let handle = self
            .0
            .spawn_handle(Label::None, Body::future(future), None, &[], &[])
            .unwrap_or_else(|error| panic!("{error}"));
        Task::of(handle)
    }

    /// As [`Runtime::task`].
    #[inline]
    pub fn task(&self) -> Spawner<'_> {
        Spawner {
            engine: &self.0,
            label: Label::None,
            options: None,
            dependencies: Vec::new(),
            accesses: SmallVec::new(),
        }
    }
}

/// A task that is being described.
#[must_use = "nothing runs before one of the spawn methods is called"]
pub struct Spawner<'a> {
    engine: &'a Arc<Engine<Native>>,
    label: Label,
    options: Option<Box<Options>>,
    dependencies: Vec<TaskRef<Native>>,
    accesses: SmallVec<[Access<'a, Native>; 4]>,
}

impl<'a> Spawner<'a> {
    /// Its name, for people.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.label = Label::Name(name.into());
        self
    }

    /// It starts after `task` is done.
    pub fn after<T>(mut self, task: &Task<T>) -> Self {
        self.dependencies.push(Arc::clone(task.handle.task()));
        self
    }

    /// It starts after all of `tasks` are done.
    pub fn after_all<'t, T: 't>(mut self, tasks: impl IntoIterator<Item = &'t Task<T>>) -> Self {
        self.dependencies
            .extend(tasks.into_iter().map(|task| Arc::clone(task.handle.task())));
        self
    }

    /// It reads this part: it starts after those that were spawned before and write something of it. If
    /// one of them fails, so does this one.
    #[inline]
    pub fn reads(self, part: &'a Part) -> Self {
        self.accesses(Access::new(part, Mode::In))
    }

    /// It writes all of this part, and reads nothing of it: it starts after those that were spawned before
    /// and read or write something of it.
    #[inline]
    pub fn writes(self, part: &'a Part) -> Self {
        self.accesses(Access::new(part, Mode::Out))
    }

    /// It reads and writes this part.
    #[inline]
    pub fn updates(self, part: &'a Part) -> Self {
        self.accesses(Access::new(part, Mode::InOut))
    }

    /// It reads and writes this part, in any order with others that do so with this method, and never at
    /// one time with one of them.
    #[inline]
    pub fn commutes(self, part: &'a Part) -> Self {
        self.accesses(Access::new(part, Mode::Commute))
    }

    /// It has this access.
    #[inline]
    pub fn accesses(mut self, access: Access<'a, Native>) -> Self {
        self.accesses.push(access);
        self
    }

    /// Larger is sooner; zero unless said.
    pub fn priority(mut self, priority: i32) -> Self {
        self.options().priority = priority;
        self
    }

    /// What one attempt may take. Then it is asked to end, and fails when it does.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.options().timeout = Some(limit);
        self
    }

    /// It needs so many cores at once.
    pub fn cores(mut self, cores: u16) -> Self {
        self.options().need = if cores == 1 {
            Need::Core
        } else {
            Need::Cores(cores)
        };
        self
    }

    /// It runs on devices with streams: on one of these sets, the first of those that are as soon.
    /// [`Current::streams`] has the streams. A set may have cores as well, which the body then holds
    /// whole; such a task begins when what it depends on is complete. It is refused if one of the sets
    /// has more cores than the runtime.
    pub fn on(mut self, alternatives: impl Into<Arc<[Alternative]>>) -> Self {
        self.options().need = Need::Devices;
        self.options().devices = Some(alternatives.into());
        self
    }

    /// It runs on one of these choices, which is chosen when it is ready, for a call of that size.
    /// [`Current::choice`] says which it is. One choice is enough for its run time to be known, which
    /// counts where there are several devices for it.
    pub fn choices(mut self, choices: &Arc<Choices>, size: u64) -> Self {
        let mapping = Mapping::new(Arc::clone(choices), size);
        self.options().need = Need::Mapped;
        self.options().mapping = Some(Box::new(mapping));
        self
    }

    /// It needs this part of one core, between 0 and 1.
    ///
    /// # Panics
    /// If `share` is not between 0 and 1.
    pub fn share(mut self, share: f64) -> Self {
        assert!((0.0..=1.0).contains(&share), "a share is between 0 and 1");
        // The cast is exact enough: the product is between 0 and 65,536.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let part = (share * f64::from(WHOLE_CORE)).ceil() as u32;
        self.options().need = if part == WHOLE_CORE {
            Need::Core
        } else {
            Need::Share(part)
        };
        self
    }

    fn options(&mut self) -> &mut Options {
        self.options.get_or_insert_default()
    }

    fn anonymous<T>(self, body: Body) -> Result<Task<T>, SpawnError> {
        let handle = self.engine.spawn_handle(
            self.label,
            body,
            self.options,
            &self.dependencies,
            &self.accesses,
        )?;
        Ok(Task::of(handle))
    }

    fn named<T>(self, task: &Task<T>, body: Body) -> Result<(), SpawnError> {
        self.engine.spawn_as(
            task.handle.task(),
            body,
            self.options,
            &self.dependencies,
            &self.accesses,
        )
    }

    /// Spawns a closure whose result nobody asks for: cheaper than a [`Task`].
    ///
    /// # Errors
    /// [`SpawnError`].
    #[inline]
    pub fn spawn_detached(self, body: impl FnOnce() + Send + 'static) -> Result<(), SpawnError> {
        self.engine.spawn_detached(
            self.label,
            Body::once(body),
            self.options,
            &self.dependencies,
            &self.accesses,
        )
    }

    /// Spawns a closure.
    ///
    /// # Errors
    /// [`SpawnError`].
    pub fn spawn<T, F>(self, body: F) -> Result<Task<T>, SpawnError>
    where
        T: Send + Sync + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        self.anonymous(Body::once(body))
    }

    /// Spawns a closure whose error is the task's failure, and which is called up to `1 + retries`
    /// times.
    ///
    /// # Errors
    /// [`SpawnError`].
    pub fn try_spawn<T, E, F>(mut self, retries: u32, body: F) -> Result<Task<T>, SpawnError>
    where
        T: Send + Sync + 'static,
        E: std::error::Error + Send + Sync + 'static,
        F: FnMut() -> Result<T, E> + Send + 'static,
    {
        self.options().retries = retries;
        self.anonymous(Body::repeated(body))
    }

    /// Spawns a future.
    ///
    /// # Errors
    /// [`SpawnError`].
    pub fn spawn_future<T, F>(self, future: F) -> Result<Task<T>, SpawnError>
    where
        T: Send + Sync + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        self.anonymous(Body::future(future))
    }

    /// Spawns a closure as the task of a handle that a [`TaskSpace`] gave.
    ///
    /// # Errors
    /// [`SpawnError`].
    pub fn spawn_at<T, F>(self, task: &Task<T>, body: F) -> Result<(), SpawnError>
    where
        T: Send + Sync + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        self.named(task, Body::once(body))
    }

    /// As [`Spawner::try_spawn`], as the task of a handle that a [`TaskSpace`] gave.
    ///
    /// # Errors
    /// [`SpawnError`].
    pub fn try_spawn_at<T, E, F>(
        mut self,
        task: &Task<T>,
        retries: u32,
        body: F,
    ) -> Result<(), SpawnError>
    where
        T: Send + Sync + 'static,
        E: std::error::Error + Send + Sync + 'static,
        F: FnMut() -> Result<T, E> + Send + 'static,
    {
        self.options().retries = retries;
        self.named(task, Body::repeated(body))
    }

    /// Spawns a future as the task of a handle that a [`TaskSpace`] gave.
    ///
    /// # Errors
    /// [`SpawnError`].
    pub fn spawn_future_at<T, F>(self, task: &Task<T>, future: F) -> Result<(), SpawnError>
    where
        T: Send + Sync + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        self.named(task, Body::future(future))
    }
}

/// A handle of a task that gives a `T`. Await it, or block in [`Task::result`].
pub struct Task<T> {
    handle: Handle<Native>,
    value: PhantomData<fn() -> T>,
}

impl<T> Clone for Task<T> {
    fn clone(&self) -> Self {
        Self {
            handle: self.handle.clone(),
            value: PhantomData,
        }
    }
}

impl<T> fmt::Debug for Task<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.handle.task().fmt(f)
    }
}

impl<T> Task<T> {
    fn new(task: TaskRef<Native>) -> Self {
        Self::of(Handle::new(task))
    }

    fn of(handle: Handle<Native>) -> Self {
        Self {
            handle,
            value: PhantomData,
        }
    }

    /// Whether it has its outcome.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.handle.task().is_done()
    }

    /// Cancels it if it is pending, true; else asks its body to end, false.
    pub fn cancel(&self) -> bool {
        Engine::cancel(self.handle.task())
    }

    /// Waits until it is done, or for so long; says whether it is.
    ///
    /// # Errors
    /// [`WaitError`], for a wait inside a task that could never end.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool, WaitError> {
        wait_for(std::slice::from_ref(self.handle.task()), timeout)
    }

    /// Calls `f` when it is done, at once if it is.
    pub fn on_done(&self, f: impl FnOnce() + Send + 'static) {
        if let Err(callback) = Engine::add_callback(self.handle.task(), Callback::new(f)) {
            callback.call();
        }
    }
}

impl<T: Send + Sync + 'static> Task<T> {
    /// Waits for the result.
    ///
    /// # Errors
    /// Why there is none.
    pub fn result(&self) -> Result<&T, TaskError> {
        self.wait(None).map_err(TaskError::Wait)?;
        self.outcome()
    }

    fn outcome(&self) -> Result<&T, TaskError> {
        let task = self.handle.task();
        match task.outcome() {
            Some(Outcome::Value(value)) => {
                let value: &(dyn Any + Send + Sync) = &**value;
                Ok(value
                    .downcast_ref()
                    .expect("a handle has the type of its body"))
            }
            _ => {
                Engine::tell(task);
                Err(error_of(task))
            }
        }
    }
}

impl<T: Send + Sync + 'static> IntoFuture for Task<T> {
    type Output = Result<Task<T>, TaskError>;
    type IntoFuture = Done<T>;

    fn into_future(self) -> Done<T> {
        Done { task: self }
    }
}

/// Awaits a [`Task`]; gives it back when it has a value.
pub struct Done<T> {
    task: Task<T>,
}

impl<T: Send + Sync + 'static> Future for Done<T> {
    type Output = Result<Task<T>, TaskError>;

    fn poll(self: Pin<&mut Self>, cx: &mut PollContext<'_>) -> Poll<Self::Output> {
        let task = self.task.handle.task();
        if !task.is_done() {
            match domain::note_wait(task, cx.waker()) {
                Wait::Noted => return Poll::Pending,
                Wait::Cycle(names) => {
                    return Poll::Ready(Err(TaskError::Wait(WaitError::Cycle(names))));
                }
                Wait::Foreign => {
                    let waker = cx.waker().clone();
                    let callback = Callback::new(move || waker.wake());
                    if Engine::add_callback(task, callback).is_ok() {
                        return Poll::Pending;
                    }
                }
            }
        }
        Poll::Ready(self.task.outcome().map(|_| self.task.clone()))
    }
}

fn wait_for(tasks: &[TaskRef<Native>], timeout: Option<Duration>) -> Result<bool, WaitError> {
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    match domain::engine_for(tasks) {
        Some(engine) => engine.wait(tasks, Until::All, deadline),
        None => Ok(tasks.iter().all(|task| task.is_done())),
    }
}

/// Waits for all of `tasks`, or for so long; says whether all are done.
///
/// # Errors
/// [`WaitError`], for a wait inside a task that could never end.
pub fn wait_all<'a, T: 'a>(
    tasks: impl IntoIterator<Item = &'a Task<T>>,
    timeout: Option<Duration>,
) -> Result<bool, WaitError> {
    let tasks: Vec<_> = tasks
        .into_iter()
        .map(|task| Arc::clone(task.handle.task()))
        .collect();
    wait_for(&tasks, timeout)
}

fn error_of(task: &TaskRef<Native>) -> TaskError {
    match task.outcome() {
        Some(Outcome::Failed(Failure::Raised(cause))) => TaskError::Failed(cause.clone()),
        Some(Outcome::Failed(Failure::Dependency(root))) => {
            TaskError::Dependency(root.label().to_string(), Box::new(error_of(root)))
        }
        Some(Outcome::Failed(Failure::TimedOut(limit))) => TaskError::TimedOut(*limit),
        Some(Outcome::Failed(Failure::Device(error))) => TaskError::Device(error.clone()),
        Some(Outcome::Failed(Failure::Mapping(why))) => TaskError::Mapping(Arc::clone(why)),
        Some(Outcome::Failed(Failure::Unspawned(names))) => TaskError::Unspawned(Arc::clone(names)),
        Some(Outcome::Failed(Failure::Cancelled) | Outcome::Value(_)) | None => {
            TaskError::Cancelled
        }
    }
}

/// The running task of this thread.
pub struct Current {
    task: TaskRef<Native>,
    grant: crate::Grant,
    places: Vec<Place>,
    views: Option<Views>,
}

impl Current {
    /// Whether it was asked to end.
    #[must_use]
    pub fn cancel_requested(&self) -> bool {
        self.task.cancel_requested()
    }

    /// The numbers of the cores that it holds.
    #[must_use]
    pub fn cores(&self) -> &[u16] {
        &self.grant.cores
    }

    /// The devices that it has, in the order of its set, and the stream on each, which is its own until
    /// its body returns.
    #[must_use]
    pub fn streams(&self) -> Vec<(DeviceId, Stream)> {
        let stream = |place: &Place| match *place {
            Place::Core(_) => None,
            Place::Device(device, stream) => Some((device, stream)),
        };
        self.places.iter().filter_map(stream).collect()
    }

    /// What it holds, cores and devices, in the order of its set.
    #[must_use]
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// Where the elements are that it accesses: for each of its [places](Self::places), each of its accesses in
    /// the order in which they were given. None of what is on the host, for a core, and of what has no
    /// elements of its own, see [`Datum::stored`]. Empty if it has no devices, or no such data.
    ///
    /// What is there is the work's that the body puts on its streams: it comes after all that the runtime
    /// copied there, and others see what it writes behind it.
    #[must_use]
    pub fn views(&self) -> &[Box<[Option<Arc<View>>]>] {
        self.views.as_deref().unwrap_or_default()
    }

    /// Where the elements of one access are, by its number, of a task that has one device.
    #[must_use]
    pub fn view(&self, access: usize) -> Option<&View> {
        match self.views() {
            [only] => only.get(access)?.as_deref(),
            _ => None,
        }
    }

    /// Which of its [choices](Spawner::choices) it is, by the index in their list, if it has any.
    #[must_use]
    pub fn choice(&self) -> Option<usize> {
        self.task.mapping()?.choice()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        self.task.label().to_string()
    }
}

/// The running task of this thread, if it runs one.
#[must_use]
pub fn current() -> Option<Current> {
    let engine = domain::engine_here()?;
    let (task, grant) = engine.current()?;
    let places = engine.held_by(&task, &grant).to_vec();
    let views = engine.views_of(&task);
    Some(Current {
        views,
        task,
        grant,
        places,
    })
}
