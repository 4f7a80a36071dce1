//! `Task`: the handle, as Python sees it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use charioteer::engine::{Handle, WaitError};
use charioteer::task::{Outcome, Phase, Until};
use pyo3::exceptions::{
    PyRecursionError, PyStopIteration, PyTimeoutError, PyTypeError, PyValueError,
};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyList, PyString, PyType};

use crate::gateway;
use crate::interp::{Callback, Core, Interp, Task, exception_of, in_native_step};
use crate::runtime;
use crate::support::{error, support};

/// The class `charioteer.errors.CancelledError`.
pub fn cancelled_error(py: Python<'_>) -> Bound<'_, PyType> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    CLASS
        .import(py, "charioteer.errors", "CancelledError")
        .expect("the package has its errors")
        .clone()
}

// No free list: objects that come from PyO3's are not tracked by the garbage collector.
/// A handle of a task, with the methods of `concurrent.futures.Future`.
#[pyclass(name = "Task", module = "charioteer", frozen, weakref)]
pub struct PyTask {
    handle: Handle<Interp>,
    /// Without a GIL: whether the collector is to look at the outcome.
    #[cfg(Py_GIL_DISABLED)]
    shown: std::sync::atomic::AtomicBool,
}

impl PyTask {
    #[inline]
    pub fn new(task: Task) -> Self {
        Self::of(Handle::new(task))
    }

    #[inline]
    pub fn of(handle: Handle<Interp>) -> Self {
        Self {
            handle,
            #[cfg(Py_GIL_DISABLED)]
            shown: std::sync::atomic::AtomicBool::new(false),
        }
    }

    #[inline]
    pub fn object(py: Python<'_>, task: Task) -> PyResult<Py<Self>> {
        Self::new(task).into_object(py).map(Bound::unbind)
    }

    /// Makes the object, with an outcome that is out of the garbage collector's sight: a handle can
    /// only be part of a cycle through its outcome, and programs have many handles. With a GIL the
    /// object is too; without one it counts among those that are alive, see [`gateway::Hidden`], and a
    /// look at it does not go on to the task. See [`PyTask::show`].
    #[inline]
    pub fn into_object(self, py: Python<'_>) -> PyResult<Bound<'_, Self>> {
        let object = Bound::new(py, self)?;
        if gateway::HIDES {
            // SAFETY: attached; a new object of a class that the collector knows.
            unsafe { ffi::PyObject_GC_UnTrack(object.as_ptr().cast()) };
        }
        Ok(object)
    }

    /// Brings a handle's outcome into the collector's sight: somebody asks for it, and its frames and
    /// containers may hold the handle from now on.
    #[cfg(not(Py_GIL_DISABLED))]
    #[inline]
    pub fn show(object: &Py<Self>) {
        let object = object.as_ptr();
        // SAFETY: callers are attached; a live object of this class.
        unsafe {
            if ffi::PyObject_GC_IsTracked(object) == 0 {
                ffi::PyObject_GC_Track(object.cast());
            }
        }
    }

    /// Brings a handle's outcome into the collector's sight: somebody asks for it, and its frames and
    /// containers may hold the handle from now on.
    #[cfg(Py_GIL_DISABLED)]
    #[inline]
    pub fn show(object: &Py<Self>) {
        use std::sync::atomic::Ordering;

        // The collector stops the attached threads, which orders this.
        let shown = &object.get().shown;
        if !shown.load(Ordering::Relaxed) {
            shown.store(true, Ordering::Relaxed);
        }
    }

    #[inline]
    pub fn task(&self) -> &Task {
        self.handle.task()
    }
}

/// A time limit in seconds as a moment; `None` waits for ever.
pub fn deadline(timeout: Option<f64>) -> PyResult<Option<Instant>> {
    let Some(timeout) = timeout else {
        return Ok(None);
    };
    if timeout.is_nan() {
        return Err(PyValueError::new_err("a timeout is a number of seconds"));
    }
    let timeout = Duration::try_from_secs_f64(timeout.max(0.0));
    Ok(timeout
        .ok()
        .and_then(|timeout| Instant::now().checked_add(timeout)))
}

/// Waits for tasks; whether the wait is over, not merely its time.
pub fn wait_for(
    py: Python<'_>,
    tasks: &[Task],
    until: Until,
    deadline: Option<Instant>,
) -> PyResult<bool> {
    let mut engine = None;
    for task in tasks {
        if !task.is_done() {
            match Core::of(task) {
                Some(found) => {
                    runtime::check_fork(py, &found)?;
                    engine = Some(found);
                }
                None if task.phase() != Phase::Unspawned => {
                    return Err(runtime::left_behind(py, task));
                }
                None => {}
            }
        }
    }
    let engine = match engine {
        Some(engine) => engine,
        None if tasks.iter().all(|task| task.is_done()) => return Ok(true),
        None => Arc::clone(&runtime::active(py)?.engine),
    };
    match engine.wait(tasks, until, deadline) {
        Ok(done) => {
            if let Some(interrupt) = gateway::take_interrupt() {
                return Err(interrupt);
            }
            Ok(done)
        }
        Err(refused) => Err(wait_error(py, refused)),
    }
}

/// What a wait that is refused raises.
pub fn wait_error(py: Python<'_>, refused: WaitError) -> PyErr {
    match refused {
        WaitError::Cycle(cycle) => error(py, "CycleError", (cycle,)),
        WaitError::Threads(chain) => error(py, "WorkerLimitError", (chain,)),
    }
}

/// The value of a task that is done, or the exception that stands for it.
pub fn value_of(py: Python<'_>, task: &Task) -> PyResult<Py<PyAny>> {
    gateway::drop_deferred(py);
    match task.outcome() {
        Some(Outcome::Value(value)) => Ok(value.object(py)),
        _ => {
            Core::tell(task);
            Err(exception_of(py, task).expect("a task that is done and has no value failed"))
        }
    }
}

#[pymethods]
impl PyTask {
    /// Waits for the task and gives its result.
    #[pyo3(signature = (timeout=None))]
    fn result(slf: &Bound<'_, Self>, timeout: Option<f64>) -> PyResult<Py<PyAny>> {
        Self::show(slf.as_unbound());
        let this = slf.get();
        this.wait(slf.py(), timeout)?;
        value_of(slf.py(), this.task())
    }

    /// Waits for the task and gives its exception, `None` if it has a result.
    #[pyo3(signature = (timeout=None))]
    fn exception(slf: &Bound<'_, Self>, timeout: Option<f64>) -> PyResult<Option<Py<PyAny>>> {
        Self::show(slf.as_unbound());
        let py = slf.py();
        slf.get().wait(py, timeout)?;
        let task = slf.get().task();
        Core::tell(task);
        if task.is_cancelled() {
            return Err(exception_of(py, task).expect("a cancelled task has an exception"));
        }
        Ok(exception_of(py, task).map(|error| error.into_value(py).into_any()))
    }

    /// Whether the task has its outcome.
    fn done(&self) -> bool {
        self.task().is_done()
    }

    /// Whether the body has begun and not ended.
    fn running(&self) -> bool {
        matches!(self.task().phase(), Phase::Running | Phase::Suspended)
    }

    /// Cancels a pending task, or asks a running one to end; says whether it is cancelled.
    fn cancel(&self) -> bool {
        Core::cancel(self.task())
    }

    /// Whether the task was cancelled.
    fn cancelled(&self) -> bool {
        self.task().is_cancelled()
    }

    /// Calls `function(task)` when the task is done, at once if it is.
    fn add_done_callback(slf: Bound<'_, Self>, function: Bound<'_, PyAny>) -> PyResult<()> {
        if !function.is_callable() {
            return Err(PyTypeError::new_err(format!(
                "a callback is to be callable, not {}",
                function.get_type().name()?
            )));
        }
        Self::show(slf.as_unbound());
        let task = slf.get().task().clone();
        let callback = Callback {
            function: function.into(),
            argument: Some(slf.into()),
        };
        if let Err(callback) = Core::add_callback(&task, callback) {
            call_back(callback, &task);
        }
        Ok(())
    }

    /// A `concurrent.futures.Future` that follows the task.
    fn future<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        support(slf.py()).future.bind(slf.py()).call1((slf,))
    }

    /// The name, for people.
    #[getter]
    fn name(&self) -> String {
        self.task().label().to_string()
    }

    /// A number that is unique in the process, as in traces.
    #[getter]
    fn id(&self) -> u64 {
        self.task().id()
    }

    fn __await__<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        Self::show(slf.as_unbound());
        let awaiting = Awaiting {
            tasks: vec![slf.get().task().clone()],
            until: Until::All,
            give: Give::Value,
        };
        if in_native_step() {
            return Ok(Bound::new(py, awaiting)?.into_any());
        }
        support(py).loop_.bind(py).call1(("loop_await", awaiting))
    }

    fn __hash__(&self) -> usize {
        Arc::as_ptr(self.task()) as usize >> 4
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other
            .cast::<Self>()
            .is_ok_and(|other| Arc::ptr_eq(self.task(), other.get().task()))
    }

    fn __repr__(&self) -> String {
        let task = self.task();
        let state = if task.is_cancelled() {
            "cancelled"
        } else if task.is_failed() {
            "failed"
        } else {
            match task.phase() {
                Phase::Unspawned => "not spawned",
                Phase::Waiting => "waiting",
                Phase::Ready => "ready",
                Phase::Running => "running",
                Phase::Suspended => "suspended",
                Phase::Done => "done",
            }
        };
        format!("<Task {} {state}>", task.label())
    }

    #[classmethod]
    #[pyo3(signature = (item, /))]
    fn __class_getitem__(cls: Bound<'_, PyType>, item: Bound<'_, PyAny>) -> Py<PyType> {
        let _ = item;
        cls.unbind()
    }

    #[allow(clippy::unused_self)]
    fn __bool__(&self) -> bool {
        true
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        #[cfg(Py_GIL_DISABLED)]
        if !self.shown.load(std::sync::atomic::Ordering::Relaxed) {
            return Ok(());
        }
        // With no other owner this object is what keeps the outcome alive, and nobody changes it;
        // else the outcome belongs to somebody whom the collector does not see. A weak reference
        // could become an owner on a detached thread between two visits of one collection, which
        // would take what is alive for garbage.
        let task = self.task();
        if Arc::strong_count(task) == 1 && Arc::weak_count(task) == 0 {
            match task.outcome() {
                Some(Outcome::Value(value)) => value.traverse(&visit)?,
                Some(Outcome::Failed(charioteer::task::Failure::Raised(raised))) => {
                    raised.traverse(&visit)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    #[allow(clippy::unused_self)]
    fn __clear__(&self) {
        // Outcomes do not change; the containers in a cycle with this object are cleared instead.
    }
}

impl PyTask {
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<()> {
        let task = self.task();
        let deadline = deadline(timeout)?;
        if task.is_done() {
            return Ok(());
        }
        let tasks = std::slice::from_ref(task);
        if wait_for(py, tasks, Until::All, deadline)? {
            return Ok(());
        }
        Err(PyTimeoutError::new_err(format!(
            "{} is not done after {} s",
            task.label(),
            timeout.unwrap_or(f64::INFINITY)
        )))
    }
}

/// Calls a callback of a task that was done already.
fn call_back(callback: Callback, task: &Task) {
    <Interp as charioteer::task::Domain>::call_back(callback, Some(task));
}

/// What awaiting gives.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Give {
    /// The value of the one task.
    Value,
    /// The values of all, in order.
    Values,
    /// Nothing.
    Nothing,
}

/// The iterator that awaits tasks: it gives itself until they are done.
// Without the GIL a free list is a lock that all who await would meet at.
#[cfg_attr(
    not(Py_GIL_DISABLED),
    pyclass(module = "charioteer._core", frozen, freelist = 64)
)]
#[cfg_attr(Py_GIL_DISABLED, pyclass(module = "charioteer._core", frozen))]
pub struct Awaiting {
    tasks: Vec<Task>,
    until: Until,
    give: Give,
}

impl Awaiting {
    pub fn targets(&self) -> (Vec<Task>, Until) {
        (self.tasks.clone(), self.until)
    }

    fn is_over(&self) -> bool {
        match self.until {
            Until::All => self.tasks.iter().all(|task| task.is_done()),
            Until::Any => self.tasks.is_empty() || self.tasks.iter().any(|task| task.is_done()),
            Until::FirstFailure => {
                self.tasks.iter().any(|task| task.is_failed())
                    || self.tasks.iter().all(|task| task.is_done())
            }
        }
    }
}

#[pymethods]
impl Awaiting {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __await__<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        if in_native_step() {
            return Ok(slf.into_any());
        }
        support(py).loop_.bind(py).call1(("loop_await", slf))
    }

    fn __next__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        let this = slf.get();
        let py = slf.py();
        // A request to end is heard at the next await, also at one that has nothing to wait for.
        if !this.is_over() || runtime::active(py).is_ok_and(|active| active.engine.is_asked()) {
            return Ok(slf.clone());
        }
        let value = this.value(py)?;
        Err(PyStopIteration::new_err((value,)))
    }

    /// Whether what it awaits is there.
    fn done(&self) -> bool {
        self.is_over()
    }

    /// What awaiting gives, once it is over.
    fn value(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self.give {
            Give::Value => value_of(py, &self.tasks[0]),
            Give::Values => values(py, &self.tasks),
            Give::Nothing => Ok(py.None()),
        }
    }

    /// Calls `function()` when it is over, at once if it is; gives what to `forget` with.
    fn call(&self, py: Python<'_>, function: Bound<'_, PyAny>) -> PyResult<Subscription> {
        let callback = Callback {
            function: function.into(),
            argument: None,
        };
        let engine = match self.tasks.iter().find_map(|task| Core::of(task)) {
            Some(engine) => engine,
            None => match runtime::active(py) {
                Ok(active) => Arc::clone(&active.engine),
                Err(error) => {
                    if self.is_over() {
                        if let Some(task) = self.tasks.first() {
                            call_back(callback, task);
                        }
                        return Ok(Subscription {
                            latch: None,
                            tasks: Vec::new(),
                        });
                    }
                    return Err(error);
                }
            },
        };
        let latch = engine.call_when(&self.tasks, self.until, callback);
        Ok(Subscription {
            latch: Some(latch),
            tasks: self.tasks.clone(),
        })
    }

    /// Asks the tasks that are not done to end.
    fn cancel(&self) {
        for task in &self.tasks {
            if !task.is_done() {
                Core::cancel(task);
            }
        }
    }
}

/// The values of tasks that are done; the first failure, in order, if one has none.
pub fn values(py: Python<'_>, tasks: &[Task]) -> PyResult<Py<PyAny>> {
    // With a failure among them not all need to be done.
    if let Some(failed) = tasks.iter().find(|task| task.is_failed()) {
        return value_of(py, failed);
    }
    let values = tasks
        .iter()
        .map(|task| value_of(py, task))
        .collect::<PyResult<Vec<_>>>()?;
    Ok(pyo3::types::PyList::new(py, values)?.into_any().unbind())
}

/// A call that waits for tasks.
#[pyclass(module = "charioteer._core", frozen)]
pub struct Subscription {
    latch: Option<Arc<charioteer::task::Latch<Interp>>>,
    tasks: Vec<Task>,
}

#[pymethods]
impl Subscription {
    /// Takes the call back, if it has not been made.
    fn forget(&self) {
        if let Some(latch) = &self.latch {
            Core::forget(latch, &self.tasks);
        }
    }
}

/// The tasks that `things` name: a task, a list or space of tasks, or an iterable of those.
pub fn tasks_in(things: &Bound<'_, PyAny>, into: &mut impl Extend<Task>) -> PyResult<()> {
    tasks_within(things, into, 0)
}

/// How deep iterables of tasks may nest: one that holds itself has no end.
const DEEPEST: u32 = 100;

fn tasks_within(
    things: &Bound<'_, PyAny>,
    into: &mut impl Extend<Task>,
    depth: u32,
) -> PyResult<()> {
    if depth > DEEPEST {
        return Err(PyRecursionError::new_err(
            "iterables of tasks are nested too deep: does one hold itself?",
        ));
    }
    if let Ok(task) = things.cast::<PyTask>() {
        into.extend([task.get().task().clone()]);
        return Ok(());
    }
    if let Ok(list) = things.cast_exact::<PyList>() {
        for thing in list.iter() {
            tasks_within(&thing, into, depth + 1)?;
        }
        return Ok(());
    }
    if let Ok(list) = things.cast::<crate::space::TaskList>() {
        list.get().tasks(into);
        return Ok(());
    }
    if let Ok(space) = things.cast::<crate::space::TaskSpace>() {
        space.get().touched_tasks(things.py(), into);
        return Ok(());
    }
    let wrong = |what: &Bound<'_, PyAny>| -> PyErr {
        let name = what.get_type().name().map_or_else(
            |_| "an object".to_owned(),
            |name| name.to_string_lossy().into_owned(),
        );
        PyTypeError::new_err(format!(
            "a dependency is a Task, a TaskList, a TaskSpace or an iterable of those, not {name}"
        ))
    };
    if things.is_instance_of::<PyString>() || things.is_instance_of::<PyDict>() {
        return Err(wrong(things));
    }
    let Ok(iterator) = things.try_iter() else {
        return Err(wrong(things));
    };
    for thing in iterator {
        let thing = thing?;
        if thing.is_instance_of::<PyString>() {
            return Err(wrong(&thing));
        }
        tasks_within(&thing, into, depth + 1)?;
    }
    Ok(())
}

fn until_named(until: &str) -> PyResult<Until> {
    match until {
        "ALL_COMPLETED" => Ok(Until::All),
        "FIRST_COMPLETED" => Ok(Until::Any),
        "FIRST_EXCEPTION" => Ok(Until::FirstFailure),
        _ => Err(PyValueError::new_err(format!(
            "return_when is ALL_COMPLETED, FIRST_COMPLETED or FIRST_EXCEPTION, not {until:?}"
        ))),
    }
}

/// Blocks until `tasks` are done as `until` says, or for `timeout` seconds; whether they are.
#[pyfunction]
#[pyo3(signature = (tasks, until, timeout=None))]
pub fn block(
    py: Python<'_>,
    tasks: &Bound<'_, PyAny>,
    until: &str,
    timeout: Option<f64>,
) -> PyResult<bool> {
    let mut all = Vec::new();
    tasks_in(tasks, &mut all)?;
    wait_for(py, &all, until_named(until)?, deadline(timeout)?)
}

/// What to await for the values of `tasks`, or for nothing but their end.
#[pyfunction]
#[pyo3(signature = (tasks, until, values=true))]
pub fn awaiting(tasks: &Bound<'_, PyAny>, until: &str, values: bool) -> PyResult<Awaiting> {
    let mut all = Vec::new();
    tasks_in(tasks, &mut all)?;
    Ok(Awaiting {
        tasks: all,
        until: until_named(until)?,
        give: if values { Give::Values } else { Give::Nothing },
    })
}

/// Makes what an `await` of all of `tasks` gives, for lists of tasks.
pub fn awaiting_values(tasks: Vec<Task>) -> Awaiting {
    Awaiting {
        tasks,
        until: Until::FirstFailure,
        give: Give::Values,
    }
}

/// Whether a task is done and has no result; unlike `exception` it receives nothing.
#[pyfunction]
pub fn is_failed(task: &Bound<'_, PyTask>) -> bool {
    task.get().task().is_failed()
}

/// Whether a task was asked to end.
#[pyfunction]
pub fn cancel_requested(task: &Bound<'_, PyTask>) -> bool {
    let task = task.get().task();
    task.cancel_requested() || Core::of(task).is_some_and(|engine| engine.is_cancelling())
}
