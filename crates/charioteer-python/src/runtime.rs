//! The open runtime, as the package's `Runtime` drives it.
//!
//! One is open in a process at a time. Every spawn looks it up, so each thread keeps it in a
//! thread-local slot beside the generation of the look-up; opening, closing and forking raise the
//! generation. Spawns share the thread's reference and count that, and not those to the engine, where
//! threads that spawn at once would meet. A forked child has no worker: the engine of its parent is
//! refused there.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use charioteer::engine::{Config, Engine as CoreEngine};
use charioteer::sync::assert_unlocked;
use charioteer::task::TaskRef;
use pyo3::exceptions::{PyOSError, PyRuntimeError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::gateway::{self, PyRef, Site};
use crate::gil::Gil;
use crate::interp::{Core, Interp, Task};
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
    #[pyo3(signature = (workers, max_pending=None, trace=None, on_failure=None, gil=None))]
    fn open(
        py: Python<'_>,
        workers: usize,
        max_pending: Option<usize>,
        trace: Option<std::path::PathBuf>,
        on_failure: Option<Bound<'_, PyAny>>,
        gil: Option<usize>,
    ) -> PyResult<Self> {
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
        let lock = Gil::new(workers, gateway::has_gil(py)?, gil.is_none());
        let engine = CoreEngine::open(
            Interp::new(on_failure.map(PyRef::from), lock),
            Config {
                workers,
                max_pending,
                trace: trace.clone(),
            },
        )
        .map_err(|error| match error.raw_os_error() {
            // With three arguments Python picks the subclass, and shows the file.
            Some(number) => PyOSError::new_err((number, error.to_string(), trace)),
            None => PyOSError::new_err(error.to_string()),
        })?;
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
    cores: Vec<u16>,
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

    /// The devices that the task holds here: none with a share of nothing, and none for the rest
    /// of a coroutine that moved to the event loop.
    #[getter]
    fn devices<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let devices = support(py).devices.bind(py).call1((self.cores.clone(),))?;
        Ok(devices.cast_into()?)
    }

    /// The first of the devices. `RuntimeError` if the task holds none here.
    #[getter]
    fn device<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let devices = self.devices(py)?;
        if devices.is_empty() {
            return Err(PyRuntimeError::new_err(format!(
                "{} holds no device here",
                self.task.label()
            )));
        }
        devices.get_item(0)
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

/// The context of the running task. `NoRuntimeError` outside of tasks.
#[pyfunction]
pub fn current_context(py: Python<'_>) -> PyResult<Context> {
    let here = match active(py) {
        Ok(active) => active.engine.current(),
        Err(_) => None,
    };
    if let Some((task, grant)) = here {
        let mut cores = grant.cores;
        cores.extend(grant.part.map(|(core, _)| core));
        return Ok(Context { task, cores });
    }
    // A coroutine that moved to the event loop's thread.
    let elsewhere = support(py).loaded.bind(py).call1(("current_elsewhere",))?;
    if let Ok(task) = elsewhere.cast::<PyTask>() {
        return Ok(Context {
            task: task.get().task().clone(),
            cores: Vec::new(),
        });
    }
    Err(error(
        py,
        "NoRuntimeError",
        ("no task runs here: current() is for the bodies of tasks",),
    ))
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
    let file = charioteer::trace::read(&path).map_err(|error| {
        if error.kind() == std::io::ErrorKind::InvalidData {
            pyo3::exceptions::PyValueError::new_err(error.to_string())
        } else {
            PyErr::from(error)
        }
    })?;
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
