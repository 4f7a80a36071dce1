//! The open runtime, as the package's `Runtime` drives it.
//!
//! One is open in a process at a time. Every spawn looks it up, so each thread keeps it in a
//! thread-local slot beside the generation of the look-up; opening, closing and forking raise the
//! generation. Spawns share the thread's reference and count that, and not those to the engine, where
//! threads that spawn at once would meet. A forked child has no worker: the engine of its parent is
//! refused there.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use charioteer::Grant;
use charioteer::engine::{Config, Engine as CoreEngine, Place};
use charioteer::machine::cpus::{Pinning, Pins};
use charioteer::machine::{DeviceId, HOST, Machine, Stream};
use charioteer::mapping::model::Models;
use charioteer::mapping::policy::Mapper;
use charioteer::sync::assert_unlocked;
use charioteer::task::TaskRef;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyDict, PyModule, PyString, PyTuple};
use smallvec::SmallVec;

use crate::data::Region;
use crate::devices::{self, OpenMachine, PyEvent, PyStream};
use crate::gateway::{self, PyRef, Site};
use crate::gil::Gil;
use crate::interp::{Core, Interp, Task};
use crate::libraries;
use crate::local::Wanted;
use crate::support::{error, support};
use crate::task::PyTask;

static ACTIVE: Mutex<Option<Arc<Core>>> = Mutex::new(None);
static GENERATION: AtomicU64 = AtomicU64::new(1);
/// The process that the runtime was opened in.
static OPENED_IN: AtomicU32 = AtomicU32::new(0);
static FACTORY: Mutex<Option<PyRef>> = Mutex::new(None);

/// The open runtime, as a thread remembers it.
pub struct Active {
    pub engine: Arc<Core>,
}

thread_local! {
    static MINE: RefCell<(u64, Option<Rc<Active>>)> = const { RefCell::new((0, None)) };
}

fn is_forked() -> bool {
    let opened = OPENED_IN.load(Ordering::Relaxed);
    opened != 0 && opened != std::process::id()
}

/// Raises nothing, says: there is no runtime.
pub fn none(py: Python<'_>) -> PyErr {
    let why = if is_forked() {
        "the runtime belongs to the process that this one was forked from: open one here"
    } else {
        "no runtime is open: spawn inside `with charioteer.Runtime():`"
    };
    error(py, "NoRuntimeError", (why,))
}

/// The open runtime. `NoRuntimeError` if there is none.
#[inline]
pub fn active(py: Python<'_>) -> PyResult<Rc<Active>> {
    let generation = GENERATION.load(Ordering::Acquire);
    let mine = MINE.with(|mine| {
        let mine = mine.borrow();
        (mine.0 == generation).then(|| mine.1.clone()).flatten()
    });
    match mine {
        Some(active) => Ok(active),
        None => look_up(py),
    }
}

fn look_up(py: Python<'_>) -> PyResult<Rc<Active>> {
    assert_unlocked();
    let mut asked = false;
    loop {
        let generation = GENERATION.load(Ordering::Acquire);
        let found = if is_forked() {
            None
        } else {
            ACTIVE
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone()
        };
        if let Some(engine) = found {
            let active = Rc::new(Active { engine });
            let old = MINE.with(|mine| mine.replace((generation, Some(Rc::clone(&active)))));
            drop(old);
            return Ok(active);
        }
        let factory = FACTORY
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(|factory| factory.clone_ref(py));
        match factory {
            Some(factory) if !asked => {
                asked = true;
                factory.call0(py)?;
            }
            _ => return Err(none(py)),
        }
    }
}

/// Refuses the engine of a parent process.
pub fn check_fork(py: Python<'_>, _engine: &Core) -> PyResult<()> {
    if is_forked() { Err(none(py)) } else { Ok(()) }
}

/// Why a task that is not done never will be.
pub fn left_behind(py: Python<'_>, task: &Task) -> PyErr {
    if is_forked() {
        return none(py);
    }
    error(
        py,
        "NoRuntimeError",
        (format!(
            "{} was not done when its runtime was left",
            task.label()
        ),),
    )
}

fn set_active(engine: Option<Arc<Core>>) {
    let old = {
        let mut active = ACTIVE.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *active, engine)
    };
    GENERATION.fetch_add(1, Ordering::AcqRel);
    drop(old);
}

/// What opens a runtime for a spawn that finds none, or `None`.
#[pyfunction]
#[pyo3(signature = (factory))]
pub fn set_default_runtime_factory(factory: Option<Bound<'_, PyAny>>) {
    let factory = factory.map(PyRef::from);
    let old = std::mem::replace(
        &mut *FACTORY.lock().unwrap_or_else(PoisonError::into_inner),
        factory,
    );
    drop(old);
}

/// What Python gets where a runtime cannot be opened.
fn unopened(py: Python<'_>, error: &std::io::Error, trace: Option<std::path::PathBuf>) -> PyErr {
    match error.raw_os_error() {
        // With three arguments Python picks the subclass, and shows the file.
        Some(number) => PyOSError::new_err((number, error.to_string(), trace)),
        None if error.kind() == std::io::ErrorKind::InvalidInput => {
            self::error(py, "MachineError", (error.to_string(),))
        }
        None => PyOSError::new_err(error.to_string()),
    }
}

/// An open runtime: what the package's `Runtime` holds.
#[pyclass(name = "Engine", module = "charioteer._core", frozen)]
pub struct PyEngine {
    engine: Arc<Core>,
    process: u32,
}

#[pymethods]
impl PyEngine {
    /// Opens a runtime. `RuntimeActiveError` if one is open.
    #[new]
    #[pyo3(signature = (
        workers, max_pending=None, trace=None, on_failure=None, gil=None, machine=None, runahead=64,
        policy=None, seed=0, models=None, overtaking=128, pin=None, check=None
    ))]
    #[expect(clippy::too_many_arguments, reason = "from one place")]
    fn open(
        py: Python<'_>,
        workers: usize,
        max_pending: Option<usize>,
        trace: Option<std::path::PathBuf>,
        on_failure: Option<Bound<'_, PyAny>>,
        gil: Option<usize>,
        machine: Option<&Bound<'_, OpenMachine>>,
        runahead: u32,
        policy: Option<Bound<'_, PyAny>>,
        seed: u64,
        models: Option<&str>,
        overtaking: u64,
        pin: Option<(PyBackedStr, Vec<Vec<u32>>)>,
        check: Option<bool>,
    ) -> PyResult<Self> {
        let (mapper, policy) = match policy {
            None => (Mapper::EarliestFinish, None),
            Some(said) => match said.cast::<PyString>() {
                Ok(name) => {
                    let name = name.to_string_lossy();
                    let mapper = Mapper::named(&name, seed).ok_or_else(|| {
                        PyValueError::new_err(format!("there is no policy {name:?}"))
                    })?;
                    (mapper, None)
                }
                Err(_) => (Mapper::User, Some(PyRef::from(said))),
            },
        };
        let known = match models {
            Some(document) => read_models(py, document)?,
            None => Models::new(),
        };
        let gpus = machine.map_or_else(Box::default, |machine| machine.get().driven());
        let machine = machine.map(|machine| machine.get().get(py)).transpose()?;
        let process = std::process::id();
        let taken = !is_forked()
            && ACTIVE
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .is_some();
        if taken {
            return Err(error(
                py,
                "RuntimeActiveError",
                ("a runtime is open already: one at a time in a process",),
            ));
        }
        let pins = pin
            .map(|(how, nodes)| {
                let pinning = match &*how {
                    "compact" => Ok(Pinning::Compact),
                    "spread" => Ok(Pinning::Spread),
                    _ => Err(PyValueError::new_err(format!(
                        "there is no pinning {how:?}"
                    ))),
                }?;
                Pins::new(&nodes, pinning, workers).map_err(|error| unopened(py, &error, None))
            })
            .transpose()?;
        let lock = Gil::new(workers, gateway::has_gil(py)?, gil.is_none());
        let engine = CoreEngine::open(
            Interp::new(
                on_failure.map(PyRef::from),
                lock,
                policy,
                !matches!(mapper, Mapper::EarliestFinish),
                check.unwrap_or(cfg!(feature = "validate")),
                gpus,
            ),
            Config {
                workers,
                max_pending,
                trace: trace.clone(),
                machine,
                limits: charioteer::gang::Limits {
                    overtaking,
                    runahead,
                },
                mapper,
                models: Arc::new(known),
                pins,
            },
        )
        .map_err(|error| unopened(py, &error, trace))?;
        engine.domain().gil.observe(&engine);
        if let Some(width) = gil {
            engine.set_width(width);
        }
        // Another thread may have opened one meanwhile: starting threads let go of the interpreter.
        let lost = {
            let mut active = ACTIVE.lock().unwrap_or_else(PoisonError::into_inner);
            if active.is_some() && !is_forked() {
                true
            } else {
                *active = Some(Arc::clone(&engine));
                OPENED_IN.store(process, Ordering::Relaxed);
                false
            }
        };
        if lost {
            engine.close();
            return Err(error(
                py,
                "RuntimeActiveError",
                ("a runtime is open already: one at a time in a process",),
            ));
        }
        GENERATION.fetch_add(1, Ordering::AcqRel);
        Ok(Self { engine, process })
    }

    /// The number of workers.
    #[getter]
    fn workers(&self) -> usize {
        self.engine.workers()
    }

    /// The number of cores that tasks may use.
    #[getter]
    fn cores(&self) -> usize {
        self.engine.cores()
    }

    /// Whether it belongs to a process that this one was forked from.
    #[getter]
    fn forked(&self) -> bool {
        self.process != std::process::id()
    }

    /// Waits until every task is done, or for `limit` seconds; whether they are. What Python's signal
    /// handlers raise ends the wait.
    #[pyo3(signature = (limit=None))]
    fn drain(&self, py: Python<'_>, limit: Option<f64>) -> PyResult<bool> {
        let end = crate::task::deadline(limit)?;
        let main = gateway::handles_signals();
        let mut interrupted = || {
            end.is_some_and(|end| std::time::Instant::now() >= end)
                || (main && gateway::check_signals())
        };
        let engine = &self.engine;
        let done = if engine.workers() == 0 {
            // Bodies run right here, attached.
            engine.close_when_quiet(&mut interrupted)
        } else {
            gateway::detach(py, Site::Wait, || engine.close_when_quiet(&mut interrupted))
        };
        match gateway::take_interrupt() {
            Some(interrupt) if !done => Err(interrupt),
            _ => Ok(done),
        }
    }

    /// Cancels pending tasks, and asks running ones to end, from now on.
    fn cancel_all(&self) {
        self.engine.cancel_all();
    }

    /// Ends the threads; gives the tasks whose failures nobody received. Every task is done.
    fn close(&self, py: Python<'_>) -> PyResult<Vec<Py<PyTask>>> {
        set_active(None);
        let gil = &self.engine.domain().gil;
        // It ends while the workers do.
        let own = !self.forked();
        if own {
            gil.abandon();
        }
        let failures = self.engine.close();
        if own {
            gil.close(py);
        }
        forget_mine();
        failures
            .into_iter()
            .map(|task| PyTask::object(py, task))
            .collect()
    }

    /// Leaves the threads behind: bodies do not end, and the user insisted.
    fn abandon(&self) {
        set_active(None);
        if !self.forked() {
            self.engine.domain().gil.abandon();
        }
        self.engine.abandon();
        forget_mine();
    }

    /// What is known of run times, as a document that another runtime can be opened with.
    fn export_models(&self) -> String {
        self.engine.models().export()
    }

    /// What is known of run times.
    fn models(&self) -> Vec<Model> {
        models(self.engine.models())
    }

    /// What the runtime did so far: tasks spawned and finished, threads, visits of the gateway.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counts = self.engine.counts();
        let stats = PyDict::new(py);
        stats.set_item("spawned", counts.spawned)?;
        stats.set_item("finished", counts.finished)?;
        stats.set_item("pending", counts.spawned.wrapping_sub(counts.finished))?;
        stats.set_item("threads", counts.threads)?;
        let sessions = PyDict::new(py);
        let width = self.engine.width();
        sessions.set_item("inside", self.engine.sessions())?;
        sessions.set_item("width", (width != usize::MAX).then_some(width))?;
        sessions.set_item("changes", self.engine.domain().gil.changes())?;
        stats.set_item("sessions", sessions)?;
        let sites = PyDict::new(py);
        for (name, counted) in gateway::visits() {
            let site = PyDict::new(py);
            site.set_item("visits", counted.visits)?;
            site.set_item("waits", counted.waits)?;
            site.set_item("waited", counted.waited.as_secs_f64())?;
            site.set_item("inside", counted.inside.as_secs_f64())?;
            sites.set_item(name, site)?;
        }
        stats.set_item("gateway", sites)?;
        Ok(stats)
    }
}

/// Function, choice, size, calls, how many of them were timed, how many explored, and the estimate in
/// seconds.
type Model = (String, String, u64, u64, u64, u32, Option<f64>);

fn models(models: &Models) -> Vec<Model> {
    let known = models.known().into_iter();
    known
        .map(|known| {
            (
                known.function.to_string(),
                known.choice.to_string(),
                known.size,
                known.calls,
                known.timed,
                known.explored,
                known.estimate.map(|time| time.as_secs_f64()),
            )
        })
        .collect()
}

fn read_models(py: Python<'_>, document: &str) -> PyResult<Models> {
    let known = Models::new();
    known
        .import(document)
        .map_err(|why| error(py, "ModelError", (why.to_string(),)))?;
    Ok(known)
}

/// What a document of models tells. `ModelError` if it is none.
#[pyfunction]
pub fn known_models(py: Python<'_>, document: &str) -> PyResult<Vec<Model>> {
    read_models(py, document).map(|known| models(&known))
}

fn forget_mine() {
    let old = MINE.with(|mine| mine.replace((0, None)));
    drop(old);
}

/// In the child of a fork: whatever a thread remembers is the parent's.
#[pyfunction]
pub fn after_fork() {
    GENERATION.fetch_add(1, Ordering::AcqRel);
}

/// Whether a runtime is open in this process.
#[pyfunction]
pub fn is_open() -> bool {
    !is_forked()
        && ACTIVE
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
}

/// Whether this thread runs tasks: it is in a body, or in a callback of a task.
#[pyfunction]
pub fn is_worker(py: Python<'_>) -> bool {
    active(py).is_ok_and(|active| active.engine.is_worker())
}

/// The running task of this thread.
#[pyclass(module = "charioteer", frozen)]
pub struct Context {
    task: TaskRef<Interp>,
    engine: Option<Arc<Core>>,
    cores: Vec<u16>,
    /// What it holds, in the set's order.
    places: SmallVec<[Place; 2]>,
}

impl Context {
    /// The array of a region that lies in an access of the task's options, on the device that is current.
    fn local_array<'py>(
        &self,
        py: Python<'py>,
        region: &Bound<'py, Region>,
        access: usize,
        writes: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (Some((machine, device, _)), Some(engine)) = (self.current(), &self.engine) else {
            return region.get().host_view(py, None, writes);
        };
        let views = engine.views_of(&self.task);
        let views = views.as_ref().and_then(|views| views.get(self.at()));
        let view = views.and_then(|views| views.get(access)?.as_deref());
        let wanted = Wanted {
            engine: charioteer::engine::Engine::<Interp>::id(engine),
            machine,
            device,
            view,
            piece: None,
            writes,
            library: None,
        };
        region.get().array_on(py, &wanted, None)
    }

    /// Of the running task of this thread.
    fn of(engine: Arc<Core>, task: TaskRef<Interp>, grant: Grant) -> Self {
        let places = engine.held_by(&task, &grant);
        let mut cores = grant.cores;
        cores.extend(grant.part.map(|(core, _)| core));
        Self {
            task,
            engine: Some(engine),
            cores,
            places,
        }
    }

    /// The machine, if the task holds a device with a stream.
    fn machine(&self) -> Option<&Arc<Machine>> {
        let machine = self.engine.as_ref()?.machine()?;
        self.lent().next().map(|_| machine)
    }

    /// The devices with streams.
    fn lent(&self) -> impl Iterator<Item = (DeviceId, Stream)> {
        self.places.iter().filter_map(|place| match *place {
            Place::Core(_) => None,
            Place::Device(device, stream) => Some((device, stream)),
        })
    }

    /// The device that is current, with its stream, if it has one.
    fn current(&self) -> Option<(&Arc<Machine>, DeviceId, Stream)> {
        match *self.places.get(self.at())? {
            Place::Core(_) => None,
            Place::Device(device, stream) => Some((self.machine()?, device, stream)),
        }
    }

    fn without(&self, what: &str) -> PyErr {
        let label = self.task.label();
        PyRuntimeError::new_err(if self.machine().is_some() {
            format!(
                "{label} holds no {what} here: a core is current, each() has its devices in turn"
            )
        } else {
            format!("{label} holds no {what} here")
        })
    }

    /// The place in the set of the device that is current: the first, unless `each` made another so.
    fn at(&self) -> usize {
        CURRENT_DEVICE.with(|current| match current.get() {
            Some((task, at)) if task == self.task.id() => at,
            _ => 0,
        })
    }
}

thread_local! {
    /// The device that the running task made current, by its place in the set.
    pub static CURRENT_DEVICE: Cell<Option<(u64, usize)>> = const { Cell::new(None) };
}

#[pymethods]
impl Context {
    /// The task's handle.
    #[getter]
    fn task(&self, py: Python<'_>) -> PyResult<Py<PyTask>> {
        PyTask::object(py, self.task.clone())
    }

    /// The numbers of the cores that the task holds.
    #[getter]
    fn cores(&self) -> Vec<u16> {
        self.cores.clone()
    }

    /// The devices that the task holds here, in the set's order: none with a share of nothing, and none
    /// for the rest of a coroutine that moved to the event loop.
    #[getter]
    fn devices<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let places: Vec<(bool, u16)> = self
            .places
            .iter()
            .map(|place| match *place {
                Place::Core(core) => (true, core),
                Place::Device(device, _) => (false, device.index()),
            })
            .collect();
        let devices = support(py).devices.bind(py).call1((places,))?;
        Ok(devices.cast_into()?)
    }

    /// The device that is current: the first of the set, or the one that `each` is at. `RuntimeError`
    /// if the task holds none here.
    #[getter]
    fn device<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let devices = self.devices(py)?;
        if devices.is_empty() {
            return Err(self.without("device"));
        }
        devices.get_item(self.at())
    }

    /// The stream on each device that has one, in the set's order: cores have none.
    #[getter]
    fn streams<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let Some(machine) = self.machine() else {
            return Ok(PyTuple::empty(py));
        };
        let streams = self
            .lent()
            .map(|(_, stream)| devices::stream(py, machine, stream))
            .collect::<PyResult<Vec<_>>>()?;
        PyTuple::new(py, streams)
    }

    /// The stream on the device that is current. `RuntimeError` if the task holds none here, or that is
    /// a core.
    #[getter]
    fn stream<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let (machine, _, stream) = self.current().ok_or_else(|| self.without("stream"))?;
        devices::stream(py, machine, stream)
    }

    /// Makes the device at that place of the set current; the place that was so before.
    fn make_current(&self, py: Python<'_>, at: usize) -> PyResult<usize> {
        if at != 0 && at >= self.places.len() {
            return Err(pyo3::exceptions::PyIndexError::new_err(format!(
                "{} holds {} devices",
                self.task.label(),
                self.places.len()
            )));
        }
        let before = self.at();
        CURRENT_DEVICE.set(Some((self.task.id(), at)));
        if let Some((machine, device, _)) = self.current()
            && machine.as_virtual().is_none()
        {
            libraries::switch(py, machine, device)?;
        }
        Ok(before)
    }

    /// Each device of the set in turn, while it is current.
    fn each<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        support(slf.py()).each.bind(slf.py()).call1((slf,))
    }

    /// The module that computes on the device that is current: NumPy, or one with its interface.
    #[getter]
    fn xp<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyModule>> {
        let Some((machine, _, _)) = self.current() else {
            return py.import("numpy");
        };
        if machine.as_virtual().is_some() {
            return py.import("charioteer.virtual");
        }
        let module = py.import("cupy")?;
        // It may have come just now, with a current stream that is not the task's.
        libraries::refresh(py, machine)?;
        Ok(module)
    }

    /// Whose arrays the body gets for regions on the device that is current: `"numpy"`, `"virtual"`,
    /// `"cupy"`, `"torch"` or `"none"`.
    #[getter]
    fn array_library<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match self.current() {
            None => Ok(PyString::new(py, "numpy").into_any()),
            Some((machine, ..)) if machine.as_virtual().is_some() => {
                Ok(PyString::new(py, "virtual").into_any())
            }
            Some(_) => {
                let data = support(py).data.bind(py);
                data.call1(("array_library", self.task.id()))
            }
        }
    }

    /// Lets the streams of the set wait for each other, on the devices: what is enqueued on any of
    /// them afterwards starts after all that was enqueued before.
    fn barrier(&self, py: Python<'_>) -> PyResult<()> {
        let Some(machine) = self.machine() else {
            return Ok(());
        };
        let raise = |error| devices::raise(py, &error);
        let events = self
            .lent()
            .map(|(device, stream)| machine.device(device).record(stream).map_err(raise))
            .collect::<PyResult<SmallVec<[_; 2]>>>()?;
        for (device, stream) in self.lent() {
            for event in events.iter().filter(|event| event.stream != stream) {
                machine.device(device).wait(stream, *event).map_err(raise)?;
            }
        }
        Ok(())
    }

    /// Collective operations among the GPUs that the task holds, in the set's order. `RuntimeError` if it
    /// holds none, `CommunicatorError` if there is no NCCL.
    #[getter]
    fn communicator<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let context = slf.get();
        let Some(machine) = context.machine() else {
            return Err(context.without("GPU"));
        };
        let is_virtual = machine.as_virtual().is_some();
        let communicator = support(py).communicator.bind(py);
        communicator.call1((slf, is_virtual))
    }

    /// The array of a region that lies in one which the task's options declare (`input=`, `output=`,
    /// `inout=`, `commute=`), on the device that is current: read-only unless one of those that are written
    /// has it. `AccessError` if none does.
    fn local<'py>(
        &self,
        py: Python<'py>,
        region: &Bound<'py, Region>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let declared = support(py)
            .data
            .bind(py)
            .call1(("declared", self.task.id()))?;
        let mut readable = None;
        for (access, each) in declared.try_iter()?.enumerate() {
            let (known, writes): (Bound<'py, PyAny>, bool) = each?.extract()?;
            let Ok(known) = known.cast::<Region>() else {
                continue;
            };
            if known.get().contains(region.get()) {
                if writes {
                    return self.local_array(py, region, access, true);
                }
                readable = readable.or(Some(access));
            }
        }
        if let Some(access) = readable {
            return self.local_array(py, region, access, false);
        }
        let why = format!(
            "{} has no access to {}: declare it, with input=, output=, inout= or commute=",
            self.task.label(),
            region.get().text()
        );
        Err(error(py, "AccessError", (why,)))
    }

    /// Records an event behind what is on the current stream, under a name by which later tasks of the
    /// runtime can wait for it.
    fn record(&self, py: Python<'_>, name: String) -> PyResult<PyEvent> {
        let (machine, device, stream) = self.current().ok_or_else(|| self.without("stream"))?;
        let event = machine
            .device(device)
            .record(stream)
            .map_err(|error| devices::raise(py, &error))?;
        if let Some(engine) = &self.engine {
            let mut events = engine.domain().events.lock();
            let events = events
                .as_mut()
                .unwrap_or_else(|poisoned| poisoned.get_mut());
            events.insert(name, event);
        }
        Ok(PyEvent::of(machine, event))
    }

    /// Lets the current stream wait for the event that was recorded last under the name. `KeyError` if
    /// none was.
    fn wait(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        let (machine, device, stream) = self.current().ok_or_else(|| self.without("stream"))?;
        let event = self.engine.as_ref().and_then(|engine| {
            let events = engine.domain().events.lock();
            events
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .get(name)
                .copied()
        });
        let Some(event) = event else {
            return Err(pyo3::exceptions::PyKeyError::new_err(format!(
                "no task recorded an event {name:?}"
            )));
        };
        machine
            .device(device)
            .wait(stream, event)
            .map_err(|error| devices::raise(py, &error))
    }

    /// A dictionary of the device that is current, for what tasks keep from one to the next as long as
    /// the runtime is open: handles, work space, compiled kernels.
    #[getter]
    fn store(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let Some(engine) = &self.engine else {
            return Err(self.without("device"));
        };
        let device = self.current().map_or(HOST, |(_, device, _)| device);
        let stores = &engine.domain().stores;
        let known = stores.lock(py).get(&device).map(PyRef::as_ptr);
        if let Some(known) = known {
            // SAFETY: attached; the store is kept as long as the runtime, which the running task holds
            // open.
            return Ok(unsafe { Bound::from_borrowed_ptr(py, known) }.unbind());
        }
        let new = PyDict::new(py).into_any();
        let kept: PyRef = new.clone().into();
        // Another thread may have been first.
        let (kept, spare) = {
            let mut stores = stores.lock(py);
            match stores.entry(device) {
                std::collections::hash_map::Entry::Occupied(first) => {
                    (first.get().as_ptr(), Some(kept))
                }
                std::collections::hash_map::Entry::Vacant(place) => {
                    (place.insert(kept).as_ptr(), None)
                }
            }
        };
        drop(spare);
        // SAFETY: as above.
        Ok(unsafe { Bound::from_borrowed_ptr(py, kept) }.unbind())
    }

    /// Whether the task was asked to end.
    #[getter]
    fn cancel_requested(&self) -> bool {
        self.task.cancel_requested()
            || Core::of(&self.task).is_some_and(|engine| engine.is_cancelling())
    }

    /// Raises `CancelledError` if the task was asked to end.
    fn check_cancelled(&self, py: Python<'_>) -> PyResult<()> {
        if self.cancel_requested() {
            return Err(error(
                py,
                "CancelledError",
                (self.task.label().to_string(),),
            ));
        }
        Ok(())
    }
}

/// What the running task of this thread holds; nothing if none runs.
pub fn held(engine: &Core) -> (usize, Vec<u16>, usize, usize) {
    let mut cores = 0;
    let mut gpus = Vec::new();
    let held = engine
        .current()
        .map(|(task, grant)| engine.held_by(&task, &grant));
    for place in held.into_iter().flatten() {
        match place {
            Place::Core(_) => cores += 1,
            Place::Device(id, _) => gpus.push(id.index()),
        }
    }
    let present = engine.machine().map_or(0, |machine| machine.gpus());
    (cores, gpus, engine.cores(), present)
}

/// The devices of the running task as sets count them: how many cores, and the numbers of its GPUs; and
/// how many of each the runtime has. `None` outside of tasks.
#[pyfunction]
#[allow(clippy::type_complexity)]
pub fn held_devices<'py>(
    py: Python<'py>,
) -> PyResult<Option<(usize, Bound<'py, PyTuple>, usize, usize)>> {
    // Opens no runtime: a thread that runs a task looked one up, or does so now.
    if !is_open() {
        return Ok(None);
    }
    let active = active(py)?;
    let engine = &active.engine;
    if engine.current().is_none() {
        return Ok(None);
    }
    let (cores, gpus, all, present) = held(engine);
    Ok(Some((cores, PyTuple::new(py, gpus)?, all, present)))
}

/// The context of the running task. `NoRuntimeError` outside of tasks.
#[pyfunction]
pub fn current_context(py: Python<'_>) -> PyResult<Context> {
    let here = match active(py) {
        Ok(active) => {
            let engine = Arc::clone(&active.engine);
            engine.current().map(|(task, grant)| (engine, task, grant))
        }
        Err(_) => None,
    };
    if let Some((engine, task, grant)) = here {
        return Ok(Context::of(engine, task, grant));
    }
    // A coroutine that moved to the event loop's thread.
    let elsewhere = support(py).loaded.bind(py).call1(("current_elsewhere",))?;
    if let Ok(task) = elsewhere.cast::<PyTask>() {
        return Ok(Context {
            task: task.get().task().clone(),
            engine: None,
            cores: Vec::new(),
            places: SmallVec::new(),
        });
    }
    Err(error(
        py,
        "NoRuntimeError",
        ("no task runs here: current() is for the bodies of tasks",),
    ))
}

/// The running task, if it holds virtual devices with streams, and the stream of the one that is current:
/// none if that is a core.
#[pyfunction]
pub fn task_stream(py: Python<'_>) -> PyResult<Option<(u64, Option<PyStream>)>> {
    let Ok(active) = active(py) else {
        return Ok(None);
    };
    let engine = Arc::clone(&active.engine);
    let Some((task, grant)) = engine.current() else {
        return Ok(None);
    };
    let context = Context::of(engine, task, grant);
    if context
        .machine()
        .is_none_or(|machine| machine.as_virtual().is_none())
    {
        return Ok(None);
    }
    let stream = context
        .current()
        .and_then(|(machine, _, stream)| PyStream::of(machine, stream));
    Ok(Some((context.task.id(), stream)))
}

/// Why a trace file could not be read.
fn unreadable(error: std::io::Error, path: std::path::PathBuf) -> PyErr {
    if error.kind() == std::io::ErrorKind::InvalidData {
        return pyo3::exceptions::PyValueError::new_err(error.to_string());
    }
    match error.raw_os_error() {
        Some(number) => PyOSError::new_err((number, error.to_string(), path)),
        None => PyErr::from(error),
    }
}

/// What was broken: `(rule, task, other or None, text)`.
type Broken = Vec<(&'static str, u64, Option<u64>, String)>;

fn broken(violations: Vec<charioteer::trace::Violation>) -> Broken {
    violations
        .into_iter()
        .map(|broken| (broken.rule.name(), broken.task, broken.other, broken.text))
        .collect()
}

/// Reads a trace file and proves something from it, detached. `ValueError` for a file that is no trace or
/// of a version that proves nothing, `OSError` if it cannot be read.
fn prove<R>(
    py: Python<'_>,
    path: std::path::PathBuf,
    check: impl FnOnce(&charioteer::trace::TraceFile) -> Result<R, charioteer::trace::NoEvidence>,
) -> PyResult<R> {
    let checked = gateway::detach(py, Site::Wait, || {
        let file = charioteer::trace::read(&path)?;
        let refuse = |refused| std::io::Error::new(std::io::ErrorKind::InvalidData, refused);
        check(&file).map_err(refuse)
    });
    checked.map_err(|error| unreadable(error, path))
}

/// Checks a trace file: how many tasks, grants and ordered pairs it has, and what was broken as `(rule,
/// task, other or None, text)`. `ValueError` for a file that is no trace or of a version that proves
/// nothing, `OSError` if it cannot be read.
#[pyfunction]
pub fn check_trace(
    py: Python<'_>,
    path: std::path::PathBuf,
) -> PyResult<(usize, usize, usize, Broken)> {
    let checked = prove(py, path, charioteer::trace::check)?;
    let broken = broken(checked.violations);
    Ok((checked.tasks, checked.grants, checked.pairs, broken))
}

/// What was copied: copies, their bytes, bytes copied within devices, instances dropped, reads looked at,
/// bytes that the best eviction moves.
type Moved = (usize, u64, u64, usize, usize, u64);

/// Checks what a trace file says of data: how many accesses it has, how many pairs were compared, what was
/// copied (none where the version does not say), and what was broken; raises what `check_trace` does.
#[pyfunction]
pub fn check_order(
    py: Python<'_>,
    path: std::path::PathBuf,
) -> PyResult<(usize, usize, Option<Moved>, Broken)> {
    let checked = prove(py, path, charioteer::trace::check_data)?;
    let order = checked.order;
    let mut violations = order.violations;
    let moved = checked.moves.map(|(moves, best)| {
        violations.extend(moves.violations);
        let dropped = moves.dropped;
        (
            moves.copies,
            moves.bytes,
            moves.local,
            dropped,
            moves.reads,
            best.bytes,
        )
    });
    Ok((order.accesses, order.pairs, moved, broken(violations)))
}

/// The events of a trace file: `(wall, [(time, thread, event, task, other)], {task: name})`, times
/// in nanoseconds. `ValueError` for a file that is no trace, `OSError` if it cannot be read.
#[pyfunction]
#[allow(clippy::type_complexity)]
pub fn read_trace(
    path: std::path::PathBuf,
) -> PyResult<(
    u64,
    Vec<(u64, u32, &'static str, u64, u64)>,
    std::collections::HashMap<u64, String>,
)> {
    let file = charioteer::trace::read(&path).map_err(|error| unreadable(error, path))?;
    let records = file
        .records
        .iter()
        .map(|record| {
            (
                record.time,
                record.thread,
                record.event.name(),
                record.task,
                record.other,
            )
        })
        .collect();
    Ok((file.wall, records, file.names))
}
