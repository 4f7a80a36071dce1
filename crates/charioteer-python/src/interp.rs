//! Python as a domain of the runtime: what a body is and how it is called, resumed and reported.
//!
//! A body is called in the `contextvars` context of its spawn. If the call gives a coroutine, the
//! task goes on with it: each step runs on a worker until the coroutine awaits a task
//! ([`crate::task::Awaiting`]), which costs no thread, or touches the event loop for the first time;
//! then it moves to the loop's thread for good (see `charioteer/_loop.py`).
//!
//! A native body ([`crate::native`]) has no context, and its value and its failure are plain data,
//! so that nothing of it needs the interpreter until somebody receives them.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use charioteer::data::Group;
use charioteer::engine::{Engine, Registry, Running};
use charioteer::machine::{DeviceId, Event};
use charioteer::mapping::policy::Call;
use charioteer::task::{Domain, Failure, Outcome, Step, TaskRef, Trouble, Until};
use charioteer_cuda::CudaGpu;
use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::access::Slot;
use crate::attached::Attached;
use crate::devices;
use crate::gateway::{self, Hidden, PyRef, Site};
use crate::gil::Gil;
use crate::launches;
use crate::libraries;
use crate::native;
use crate::reduce::{BodyData, Partials, Reduction};
use crate::support::{error, support};
use crate::task::{Awaiting, PyTask};
use crate::variants::Several;

pub type Task = TaskRef<Interp>;
pub type Core = Engine<Interp>;

static ENGINES: Registry<Interp> = Registry::new();

/// The domain of Python.
pub struct Interp {
    on_failure: Option<PyRef>,
    pub gil: Gil,
    /// What tasks keep on a device from one to the next.
    pub stores: Attached<HashMap<DeviceId, PyRef>>,
    /// Events that tasks recorded under a name, the last of each.
    pub events: std::sync::Mutex<HashMap<String, Event>>,
    /// Whether the policy is to know of every task on devices, and of every choice of cores.
    pub maps_all: bool,
    /// The machine's devices, if a driver has them, which other libraries of the process use too.
    pub gpus: Box<[Arc<CudaGpu>]>,
    /// The user's policy.
    policy: Option<PyRef>,
    /// Partial results of reductions that are under way.
    pub partials: Partials,
    /// Whether bodies that write what they read are looked for.
    pub checks: bool,
}

impl Interp {
    pub fn new(
        on_failure: Option<PyRef>,
        gil: Gil,
        policy: Option<PyRef>,
        maps_all: bool,
        checks: bool,
        gpus: Box<[Arc<CudaGpu>]>,
    ) -> Self {
        Self {
            partials: Partials::default(),
            checks,
            policy,
            maps_all,
            gpus,
            on_failure,
            gil,
            stores: Attached::new(HashMap::new()),
            events: std::sync::Mutex::default(),
        }
    }
}

/// The arguments of a body.
pub enum Arguments {
    None,
    One(PyRef),
    /// A tuple.
    Many(PyRef),
    /// A tuple and a dictionary; boxed, since arguments are part of each task.
    Named(Box<(PyRef, PyRef)>),
}

impl Arguments {
    /// The same objects.
    pub fn clone_ref(&self, py: Python<'_>) -> Self {
        let same = |object: &PyRef| PyRef::new(object.clone_ref(py));
        match self {
            Self::None => Self::None,
            Self::One(argument) => Self::One(same(argument)),
            Self::Many(arguments) => Self::Many(same(arguments)),
            Self::Named(both) => Self::Named(Box::new((same(&both.0), same(&both.1)))),
        }
    }
}

/// A variable of a module and its value when the body was spawned.
pub struct Watched {
    pub name: PyRef,
    pub value: PyRef,
}

/// What a task runs.
pub enum Body {
    Python(PythonBody),
    Native(native::Call),
    /// Boxed, since a body is part of each task.
    Kernel(Box<launches::Call>),
    /// The variants that may serve it.
    Several(Box<Several>),
    /// The end of a reduction.
    Combine(Reduction),
}

impl Body {
    /// A native body whose arguments were all there when it was spawned is not attached.
    #[inline]
    pub fn needs_session(&self) -> bool {
        match self {
            Self::Python(_) => true,
            Self::Native(call) => call.needs_session(),
            Self::Kernel(call) => call.needs_session(),
            Self::Several(several) => several.needs_session(),
            Self::Combine(_) => true,
        }
    }

    /// Whether it is a coroutine in the middle.
    pub fn has_begun(&self) -> bool {
        match self {
            Self::Python(body) => body.coroutine.is_some(),
            Self::Native(_) | Self::Kernel(_) | Self::Combine(_) => false,
            Self::Several(several) => several.has_begun(),
        }
    }
}

/// A call of a Python callable.
pub struct PythonBody {
    pub callable: Hidden,
    pub arguments: Arguments,
    /// The arguments hold handles, which are replaced by results.
    pub substitute: bool,
    pub context: Hidden,
    /// The globals of the function and those of its variables that a rebinding would change.
    pub watched: Option<Arc<(PyRef, Vec<Watched>)>>,
    pub coroutine: Option<PyRef>,
    /// It may get several cores, and threaded libraries are to use them.
    pub wide: bool,
    /// What few bodies have to do with data beside their arguments.
    pub data: Option<Box<BodyData>>,
}

/// What a body gave.
pub enum Value {
    Object(PyRef),
    /// What a native body gave; each who receives it gets an object of its own.
    Plain(native::Plain),
}

impl Value {
    /// The value as whoever receives it sees it.
    #[inline]
    pub fn object(&self, py: Python<'_>) -> Py<PyAny> {
        match self {
            Self::Object(object) => object.clone_ref(py),
            Self::Plain(plain) => plain.object(py),
        }
    }

    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self {
            Self::Object(object) => visit.call(object.get()),
            Self::Plain(_) => Ok(()),
        }
    }
}

/// What a body failed with.
pub enum Raised {
    /// An exception, and the traceback that it had then: raising it again, for each who receives
    /// it, would make that longer and keep the receivers' frames alive.
    Exception(PyRef, Option<PyRef>),
    /// A native body's failure; each who receives it gets an exception of its own.
    Native(native::Failure),
    /// A kernel that was not launched; likewise.
    Launch(launches::Failure),
}

impl From<Bound<'_, PyAny>> for Value {
    fn from(object: Bound<'_, PyAny>) -> Self {
        Self::Object(object.into())
    }
}

impl Raised {
    fn new(py: Python<'_>, error: PyErr) -> Self {
        let traceback = error.traceback(py).map(PyRef::from);
        Self::Exception(PyRef::new(error.into_value(py).into_any()), traceback)
    }

    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Self::Exception(exception, traceback) = self {
            visit.call(exception.get())?;
            if let Some(traceback) = traceback {
                visit.call(traceback.get())?;
            }
        }
        Ok(())
    }

    fn receive(&self, py: Python<'_>) -> PyErr {
        let (exception, traceback) = match self {
            Self::Exception(exception, traceback) => (exception.bind(py), traceback),
            Self::Native(failure) => return failure.error(py),
            Self::Launch(failure) => return failure.error(py),
        };
        // SAFETY: attached; an exception, and a traceback or nothing.
        unsafe {
            let traceback = traceback.as_ref().map_or(ffi::Py_None(), PyRef::as_ptr);
            if ffi::PyException_SetTraceback(exception.as_ptr(), traceback) != 0 {
                PyErr::fetch(py).write_unraisable(py, None);
            }
        }
        PyErr::from_value(exception.clone())
    }
}

/// A call that is made when a task is done.
pub struct Callback {
    pub function: PyRef,
    pub argument: Option<PyRef>,
}

/// What people call a task.
pub enum Label {
    /// The name of its function; see `callable::intern`.
    Function(&'static str),
    /// The name that it was given.
    Name(Box<str>),
    /// Its place in a space.
    Index(std::sync::Arc<Box<str>>, crate::space::Index),
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Function(name) => f.write_str(name),
            Self::Name(name) => f.write_str(name),
            Self::Index(space, index) => {
                write!(f, "{space}[")?;
                for (at, number) in index.to_vec().iter().enumerate() {
                    if at > 0 {
                        f.write_str(", ")?;
                    }
                    number.fmt(f)?;
                }
                f.write_str("]")
            }
        }
    }
}

thread_local! {
    /// The context of the coroutine that this thread steps, until it touches the event loop;
    /// borrowed from the body.
    static NATIVE_STEP: Cell<*mut ffi::PyObject> = const { Cell::new(ptr::null_mut()) };
    /// The limits of thread pools that this thread has seen.
    static LIMITS_SEEN: Cell<usize> = const { Cell::new(0) };
}

/// Counts changes of the limits that each thread has to follow; see `charioteer/_pools.py`.
static LIMITS: AtomicUsize = AtomicUsize::new(0);
/// How many modules there were when the limits were looked at last.
static MODULES: AtomicUsize = AtomicUsize::new(0);

/// Whether the thread is in a step of a coroutine that awaits tasks by itself.
pub fn in_native_step() -> bool {
    !NATIVE_STEP.get().is_null()
}

/// Called by the event loop when it is touched: gives the context of the coroutine whose step
/// touches it for the first time.
#[pyfunction]
pub fn leave_native_step(py: Python<'_>) -> Option<Py<PyAny>> {
    let context = NATIVE_STEP.replace(ptr::null_mut());
    // SAFETY: attached; the body that owns the context is being stepped by this thread.
    unsafe { Bound::from_borrowed_ptr_or_opt(py, context) }.map(Bound::unbind)
}

/// Called when the limits of thread pools changed: every worker applies them before its next body.
#[pyfunction]
pub fn limits_changed(modules: usize) {
    MODULES.store(modules, Ordering::Relaxed);
    LIMITS.fetch_add(1, Ordering::Release);
}

impl Interp {
    /// Holds BLAS and OpenMP on this thread to what tasks may use.
    #[inline]
    pub fn follow_limits(py: Python<'_>) {
        // SAFETY: attached; the result is borrowed and alive as long as the interpreter.
        let modules = unsafe { ffi::PyDict_Size(ffi::PyImport_GetModuleDict()) };
        let modules = usize::try_from(modules).unwrap_or(0);
        if modules != MODULES.load(Ordering::Relaxed) {
            MODULES.store(modules, Ordering::Relaxed);
            report(py, support(py).refresh_limits.bind(py).call0());
        }
        let limits = LIMITS.load(Ordering::Acquire);
        if LIMITS_SEEN.get() != limits {
            LIMITS_SEEN.set(limits);
            report(py, support(py).limit_thread.bind(py).call0());
        }
    }

    fn call(
        py: Python<'_>,
        running: &Running<'_, Self>,
        body: &mut PythonBody,
    ) -> PyResult<Py<PyAny>> {
        if body.watched.is_some() {
            warn_rebound(py, running.task, body)?;
        }
        if let Some(data) = &mut body.data {
            data.begin(py, running)?;
        }
        if body.substitute {
            let data = &mut body.data;
            let (arguments, keywords) = substitute(py, &body.arguments, &mut |slot| {
                let data = data
                    .as_mut()
                    .expect("who has slots has something to do with data");
                data.array(py, running, slot)
            })?;
            return body
                .callable
                .bind(py)
                .call(arguments, keywords.as_ref())
                .map(Bound::unbind);
        }
        let callable = body.callable.as_ptr();
        // SAFETY: attached; the pointers are owned by the body, which outlives the call; each call
        // gives a new reference or null with an exception set.
        unsafe {
            let result = match &body.arguments {
                Arguments::None => ffi::PyObject_CallNoArgs(callable),
                Arguments::One(argument) => ffi::PyObject_CallOneArg(callable, argument.as_ptr()),
                Arguments::Many(arguments) => {
                    ffi::PyObject_Call(callable, arguments.as_ptr(), ptr::null_mut())
                }
                Arguments::Named(both) => {
                    ffi::PyObject_Call(callable, both.0.as_ptr(), both.1.as_ptr())
                }
            };
            Bound::from_owned_ptr_or_err(py, result).map(Bound::unbind)
        }
    }

    fn done(
        py: Python<'_>,
        running: &Running<'_, Self>,
        result: PyResult<Py<PyAny>>,
    ) -> Step<Self> {
        Step::Done(match result {
            Ok(value) => Ok(Value::Object(PyRef::new(value))),
            Err(error) => Err(trouble(py, running.engine, running.task, error)),
        })
    }

    fn step_coroutine(
        py: Python<'_>,
        running: &Running<'_, Self>,
        body: &mut PythonBody,
    ) -> Result<Step<Self>, (Py<PyAny>, StepEnd)> {
        let coroutine = body
            .coroutine
            .as_ref()
            .expect("only a body with a coroutine is stepped")
            .clone_ref(py);
        let throw = if running.task.take_cancel_request() {
            support(py)
                .cancelled_class
                .bind(py)
                .call0()
                .and_then(|class| class.call0())
                .map(Some)
        } else if let Some(cycle) = running.task.take_cycle() {
            Ok(Some(
                error(py, "CycleError", (cycle,))
                    .into_value(py)
                    .into_bound(py)
                    .into_any(),
            ))
        } else {
            Ok(None)
        };
        let throw = match throw {
            Ok(throw) => throw,
            Err(error) => return Ok(Self::done(py, running, Err(error))),
        };
        let former = match support(py).loop_.bind(py).call1(("loop_enter",)) {
            Ok(former) => former,
            Err(error) => return Ok(Self::done(py, running, Err(error))),
        };
        NATIVE_STEP.set(body.context.as_ptr());
        let end = step(py, coroutine.bind(py), throw);
        let native = !NATIVE_STEP.replace(ptr::null_mut()).is_null();
        report(py, support(py).loop_.bind(py).call1(("loop_leave", former)));
        if native {
            return Ok(match end {
                StepEnd::Returned(value) => {
                    body.coroutine = None;
                    Self::done(py, running, Ok(value))
                }
                StepEnd::Raised(error) => {
                    body.coroutine = None;
                    Self::done(py, running, Err(error))
                }
                StepEnd::Yielded(yielded) => match yielded.cast_bound::<Awaiting>(py) {
                    Ok(awaiting) => {
                        let (tasks, until) = awaiting.get().targets();
                        Step::Await(tasks, until)
                    }
                    Err(_) if yielded.is_none(py) => Step::Await(Vec::new(), Until::All),
                    Err(_) => {
                        let what = format!(
                            "{} awaits {}, which needs an event loop other than the runtime's",
                            running.task.label(),
                            yielded.bind(py).get_type().name().map_or_else(
                                |_| "something".to_owned(),
                                |name| name.to_string_lossy().into_owned()
                            ),
                        );
                        body.coroutine = None;
                        report(py, coroutine.bind(py).call_method0("close"));
                        Self::done(py, running, Err(PyTypeError::new_err(what)))
                    }
                },
            });
        }
        Err((coroutine, end))
    }

    #[inline]
    fn run_python(running: &Running<'_, Self>, body: &mut PythonBody) -> Step<Self> {
        // SAFETY: workers run bodies in `session`, other threads call us from Python.
        let py = unsafe { Python::assume_attached() };
        Self::follow_limits(py);
        running.engine.domain().gil.began();
        let entered = match libraries::enter(py, running) {
            Ok(entered) => entered,
            Err(error) => return Self::done(py, running, Err(error)),
        };
        let mut step = Self::run_entered(py, running, body);
        if let Some(entered) = entered {
            if let Step::Done(Ok(_)) = &step
                && let Err(error) = entered.warn(py, running.engine, running.task)
            {
                step = Self::done(py, running, Err(error));
            }
            entered.leave(py);
        }
        step
    }

    #[inline]
    fn run_entered(
        py: Python<'_>,
        running: &Running<'_, Self>,
        body: &mut PythonBody,
    ) -> Step<Self> {
        let cores = if body.wide {
            running.grant().cores.len()
        } else {
            1
        };
        if cores > 1 {
            report(py, support(py).limit_enter.bind(py).call1((cores,)));
        }
        // A body that runs on the stack of one that waits must not take over what that one handles.
        let _handled = Handled::set_aside();
        let context = body.context.as_ptr();
        // SAFETY: attached; the body owns its context, which nobody else enters.
        if unsafe { ffi::PyContext_Enter(context) } != 0 {
            return Self::done(py, running, Err(PyErr::fetch(py)));
        }
        let mut first = None;
        if body.coroutine.is_none() {
            match Self::call(py, running, body) {
                // SAFETY: attached, the object is alive.
                Ok(value) if unsafe { ffi::PyCoro_CheckExact(value.as_ptr()) } != 0 => {
                    body.coroutine = Some(PyRef::new(value));
                }
                result => first = Some(Self::done(py, running, result)),
            }
        }
        let mut step = match first {
            Some(step) => Ok(step),
            None => Self::step_coroutine(py, running, body),
        };
        if let (Some(data), Ok(Step::Done(Ok(_)))) = (&mut body.data, &step)
            && let Err(error) = data.end(py, running)
        {
            step = Ok(Self::done(py, running, Err(error)));
        }
        if let Some(data) = &mut body.data
            && !matches!(step, Ok(Step::Await(..)))
        {
            report(py, data.over(py));
        }
        // SAFETY: attached; entered above.
        if unsafe { ffi::PyContext_Exit(context) } != 0 {
            PyErr::fetch(py).write_unraisable(py, None);
        }
        if cores > 1 {
            report(py, support(py).limit_exit.bind(py).call1((cores,)));
        }
        match step {
            Ok(step) => step,
            Err((coroutine, end)) => {
                // The step touched the loop: this thread holds it until one of these calls.
                let support = support(py);
                match end {
                    StepEnd::Yielded(yielded) => {
                        if let Some(data) = &mut body.data {
                            data.moves(py, running);
                        }
                        running.engine.leave();
                        let task = PyTask::object(py, running.task.clone());
                        body.coroutine = None;
                        report(
                            py,
                            task.and_then(|task| {
                                support.loop_.bind(py).call1((
                                    "loop_hand_over",
                                    coroutine,
                                    yielded,
                                    task,
                                    body.context.bind(py),
                                ))
                            }),
                        );
                        Step::Elsewhere
                    }
                    StepEnd::Returned(value) => {
                        report(py, support.loop_.bind(py).call1(("loop_end_step",)));
                        let ended = match &mut body.data {
                            Some(data) => data.end(py, running),
                            None => Ok(()),
                        };
                        Self::done(py, running, ended.map(|()| value))
                    }
                    StepEnd::Raised(error) => {
                        report(py, support.loop_.bind(py).call1(("loop_end_step",)));
                        Self::done(py, running, Err(error))
                    }
                }
            }
        }
    }
}

/// The exception that this thread handles, set aside until this is dropped.
struct Handled(*mut ffi::PyObject);

impl Handled {
    #[inline]
    fn set_aside() -> Self {
        // SAFETY: attached; a new reference or null, and null is nothing to handle.
        unsafe {
            let handled = ffi::PyErr_GetHandledException();
            if !handled.is_null() {
                ffi::PyErr_SetHandledException(ptr::null_mut());
            }
            Self(handled)
        }
    }
}

impl Drop for Handled {
    #[inline]
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: attached as before; the reference is this one's own.
            unsafe {
                ffi::PyErr_SetHandledException(self.0);
                ffi::Py_DECREF(self.0);
            }
        }
    }
}

/// How one step of a coroutine ended.
enum StepEnd {
    Returned(Py<PyAny>),
    Yielded(Py<PyAny>),
    Raised(PyErr),
}

fn step(py: Python<'_>, coroutine: &Bound<'_, PyAny>, throw: Option<Bound<'_, PyAny>>) -> StepEnd {
    if let Some(exception) = throw {
        return match coroutine.call_method1("throw", (exception,)) {
            Ok(yielded) => StepEnd::Yielded(yielded.unbind()),
            Err(error) => {
                if error.is_instance_of::<pyo3::exceptions::PyStopIteration>(py) {
                    match error.value(py).getattr("value") {
                        Ok(value) => StepEnd::Returned(value.unbind()),
                        Err(error) => StepEnd::Raised(error),
                    }
                } else {
                    StepEnd::Raised(error)
                }
            }
        };
    }
    let mut result = ptr::null_mut();
    // SAFETY: attached; `coroutine` is alive; `result` receives a new reference unless the step
    // raised.
    unsafe {
        match ffi::PyIter_Send(coroutine.as_ptr(), ffi::Py_None(), &raw mut result) {
            ffi::PySendResult::PYGEN_RETURN => {
                StepEnd::Returned(Bound::from_owned_ptr(py, result).unbind())
            }
            ffi::PySendResult::PYGEN_NEXT => {
                StepEnd::Yielded(Bound::from_owned_ptr(py, result).unbind())
            }
            ffi::PySendResult::PYGEN_ERROR => StepEnd::Raised(PyErr::fetch(py)),
        }
    }
}

/// An exception of a body, as the runtime sees it: obedience, or a failure.
pub fn trouble(py: Python<'_>, engine: &Core, task: &Task, error: PyErr) -> Trouble<Interp> {
    let cancelled = engine.cancel_requested(task) && is_cancelled_error(py, &error);
    if cancelled {
        Trouble::Cancelled
    } else {
        Trouble::Raised(Raised::new(py, error))
    }
}

fn is_cancelled_error(py: Python<'_>, error: &PyErr) -> bool {
    error.is_instance(py, crate::task::cancelled_error(py).as_any())
        || support(py)
            .cancelled_class
            .bind(py)
            .call0()
            .is_ok_and(|class| !class.is_none() && error.is_instance(py, &class))
}

/// Shows an exception of our own support code, which has no caller to go to.
pub fn report<T>(py: Python<'_>, result: PyResult<T>) {
    if let Err(error) = result {
        error.write_unraisable(py, None);
    }
}

fn warn_rebound(py: Python<'_>, task: &Task, body: &PythonBody) -> PyResult<()> {
    let Some((globals, names)) = body.watched.as_deref() else {
        return Ok(());
    };
    let globals = globals.bind(py).cast::<PyDict>()?;
    for watched in names {
        let now = globals.get_item(watched.name.bind(py))?;
        if !now.is_some_and(|now| now.is(watched.value.bind(py))) {
            let task = task.label().to_string();
            support(py).warn_capture.bind(py).call1((
                task,
                watched.name.bind(py),
                globals,
                body.callable.bind(py),
            ))?;
        }
    }
    Ok(())
}

/// What gives the array of a slot.
pub type Lend<'a, 'py> = &'a mut dyn FnMut(&Slot) -> PyResult<Bound<'py, PyAny>>;

/// The arguments with handles replaced by results, and slots by arrays, also one level deep.
///
/// `slot` gives the array of one.
pub fn substitute<'py>(
    py: Python<'py>,
    arguments: &Arguments,
    slot: Lend<'_, 'py>,
) -> PyResult<(Bound<'py, PyTuple>, Option<Bound<'py, PyDict>>)> {
    match arguments {
        Arguments::None => Ok((PyTuple::empty(py), None)),
        Arguments::One(argument) => {
            let argument = substitute_one(py, argument.bind(py), slot)?;
            Ok((PyTuple::new(py, [argument])?, None))
        }
        Arguments::Many(arguments) => Ok((substitute_each(py, arguments, slot)?, None)),
        Arguments::Named(both) => {
            let positional = substitute_each(py, &both.0, slot)?;
            let new = PyDict::new(py);
            for (name, value) in both.1.bind(py).cast::<PyDict>()?.iter() {
                new.set_item(name, substitute_one(py, &value, slot)?)?;
            }
            Ok((positional, Some(new)))
        }
    }
}

fn substitute_each<'py>(
    py: Python<'py>,
    arguments: &PyRef,
    slot: Lend<'_, 'py>,
) -> PyResult<Bound<'py, PyTuple>> {
    let arguments = arguments
        .bind(py)
        .cast::<PyTuple>()?
        .iter()
        .map(|argument| substitute_one(py, &argument, slot))
        .collect::<PyResult<Vec<_>>>()?;
    PyTuple::new(py, arguments)
}

/// A list, a tuple or a dictionary among the arguments that holds handles, as it was at the spawn.
///
/// What a body gets without handles in it is the caller's own object; this tells the two apart.
#[pyclass(frozen)]
pub struct Held(pub PyRef);

#[pymethods]
impl Held {
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(self.0.get())
    }
}

/// The result of a handle, or the list of those of several; anything else as it is.
fn result_of<'py>(
    py: Python<'py>,
    thing: Bound<'py, PyAny>,
    slot: Lend<'_, 'py>,
) -> PyResult<Bound<'py, PyAny>> {
    if let Ok(task) = thing.cast::<PyTask>() {
        return value_now(py, task.get().task());
    }
    if let Ok(list) = thing.cast::<crate::space::TaskList>() {
        let mut tasks = Vec::new();
        list.get().tasks(&mut tasks);
        let values = tasks
            .iter()
            .map(|task| value_now(py, task))
            .collect::<PyResult<Vec<_>>>()?;
        return Ok(PyList::new(py, values)?.into_any());
    }
    if let Ok(thing) = thing.cast_exact::<Slot>() {
        return slot(thing.get());
    }
    Ok(thing)
}

/// The value of a dependency of a body that runs: it is done, or it is launched and the body runs ahead
/// of its end.
fn value_now<'py>(py: Python<'py>, task: &Task) -> PyResult<Bound<'py, PyAny>> {
    enum Peeked {
        Object(Py<PyAny>),
        Plain(native::Plain),
    }
    // One more reference calls nobody.
    let peeked = task.peek(|value| match value {
        Value::Object(object) => Peeked::Object(object.clone_ref(py)),
        Value::Plain(plain) => Peeked::Plain(*plain),
    });
    match peeked {
        Some(Peeked::Object(object)) => Ok(object.into_bound(py)),
        Some(Peeked::Plain(plain)) => Ok(plain.object(py).into_bound(py)),
        // Its work on a device failed since this one was let go, which then fails for that.
        None => Err(error(
            py,
            "DependencyError",
            (task.label().to_string(), task.label().to_string()),
        )),
    }
}

fn substitute_one<'py>(
    py: Python<'py>,
    argument: &Bound<'py, PyAny>,
    slot: Lend<'_, 'py>,
) -> PyResult<Bound<'py, PyAny>> {
    let Ok(held) = argument.cast::<Held>() else {
        return result_of(py, argument.clone(), slot);
    };
    let held = held.get().0.bind(py);
    if let Ok(dict) = held.cast::<PyDict>() {
        let new = PyDict::new(py);
        for (key, thing) in dict {
            new.set_item(key, result_of(py, thing, slot)?)?;
        }
        return Ok(new.into_any());
    }
    let things = held
        .try_iter()?
        .map(|thing| result_of(py, thing?, slot))
        .collect::<PyResult<Vec<_>>>()?;
    if held.is_instance_of::<PyTuple>() {
        Ok(PyTuple::new(py, things)?.into_any())
    } else {
        Ok(PyList::new(py, things)?.into_any())
    }
}

/// The exception that a failed task's user receives.
pub fn exception_of(py: Python<'_>, task: &Task) -> Option<PyErr> {
    let Some(Outcome::Failed(failure)) = task.outcome() else {
        return None;
    };
    Some(match failure {
        Failure::Raised(raised) => raised.receive(py),
        Failure::Cancelled => error(py, "CancelledError", (task.label().to_string(),)),
        Failure::TimedOut(limit) => error(
            py,
            "TaskTimeoutError",
            (task.label().to_string(), limit.as_secs_f64()),
        ),
        Failure::Device(failure) => devices::raise(py, failure),
        Failure::Mapping(why) => error(py, "PolicyError", (&**why,)),
        Failure::Unspawned(names) => error(py, "UnspawnedDependencyError", (names.to_vec(),)),
        Failure::Dependency(root) => {
            let cause = exception_of(py, root);
            let error = error(
                py,
                "DependencyError",
                (task.label().to_string(), root.label().to_string()),
            );
            error.set_cause(py, cause);
            error
        }
    })
}

impl Domain for Interp {
    type Body = Body;
    type Value = Value;
    type Error = Raised;
    type Callback = Callback;
    type Label = Label;

    fn engines() -> &'static Registry<Self> {
        &ENGINES
    }

    fn nothing() -> Value {
        Value::Plain(native::Plain::None)
    }

    fn loss() -> Label {
        Label::Function("loss")
    }

    fn combine(&self, group: &Arc<Group<Self>>) -> (Label, Body) {
        (
            Label::Function("combine"),
            Body::Combine(Reduction::of(group)),
        )
    }

    #[inline]
    fn run(&self, running: &Running<'_, Self>, body: &mut Body) -> Step<Self> {
        match body {
            Body::Python(body) => Self::run_python(running, body),
            Body::Native(call) => call.run(running),
            Body::Kernel(call) => call.run(running),
            Body::Combine(reduction) => {
                // SAFETY: a body that needs a session is run in one.
                let py = unsafe { Python::assume_attached() };
                let combined = reduction.combine(py, self);
                Self::done(py, running, combined.map(|()| py.None()))
            }
            Body::Several(several) => match several.body(running) {
                Ok(body) => self.run(running, body),
                Err(step) => step,
            },
        }
    }

    #[inline]
    fn only_enqueues(&self, body: &Body) -> bool {
        matches!(body, Body::Kernel(_))
    }

    #[inline]
    fn needs_session(&self, body: &Body) -> bool {
        body.needs_session()
    }

    fn has_begun(&self, body: &Body) -> bool {
        body.has_begun()
    }

    #[inline]
    fn session(&self, run: &mut dyn FnMut()) {
        self.gil
            .session(|| gateway::attach(Site::Worker, |_| run()));
    }

    fn blocking(&self, wait: &mut dyn FnMut()) {
        // SAFETY: only threads that are attached wait: bodies, and who called us from Python.
        let py = unsafe { Python::assume_attached() };
        gateway::detach(py, Site::Wait, wait);
    }

    fn sessions_exclude(&self) -> bool {
        self.gil.is_on()
    }

    fn patience(&self) -> Option<Duration> {
        gateway::handles_signals().then_some(Duration::from_millis(100))
    }

    fn interrupted(&self) -> bool {
        gateway::check_signals()
    }

    fn start_thread(&self, name: String, main: Box<dyn FnOnce() + Send>) -> std::io::Result<()> {
        gateway::attach(Site::ThreadStart, |py| {
            let kernel_name = std::ffi::CString::new(name.as_str()).unwrap_or_default();
            let main: Box<dyn FnOnce() + Send> = Box::new(move || {
                // SAFETY: the calling thread and a string that ends; names that are too long are
                // refused, which is no harm. Python names its threads itself only from 3.14 on.
                unsafe { libc::pthread_setname_np(libc::pthread_self(), kernel_name.as_ptr()) };
                libraries::is_ours();
                main();
            });
            let main = Py::new(py, ThreadMain(std::sync::Mutex::new(Some(main))))?;
            support(py).start_thread.bind(py).call1((name, main))?;
            Ok(())
        })
        .map_err(|error: PyErr| std::io::Error::other(error.to_string()))
    }

    fn call_back(callback: Callback, _task: Option<&TaskRef<Self>>) {
        gateway::attach(Site::Callback, |py| {
            let function = callback.function.bind(py);
            let result = match &callback.argument {
                Some(argument) => function.call1((argument.bind(py),)),
                None => function.call0(),
            };
            if let Err(error) = result {
                report(
                    py,
                    support(py)
                        .log_callback
                        .bind(py)
                        .call1((function, error.into_value(py))),
                );
            }
            drop(callback);
        });
    }

    fn asked(&self, task: &TaskRef<Self>) {
        gateway::attach(Site::Callback, |py| {
            report(
                py,
                support(py)
                    .loaded
                    .bind(py)
                    .call1(("loop_cancel", task.id())),
            );
        });
    }

    fn warn(&self, message: &str) {
        gateway::attach(Site::Warn, |py| {
            report(py, support(py).warn.bind(py).call1((message,)));
        });
    }

    fn report_unread(&self, task: &TaskRef<Self>) {
        gateway::attach(Site::Report, |py| {
            let Some(on_failure) = &self.on_failure else {
                return;
            };
            let result = PyTask::object(py, task.clone())
                .and_then(|task| on_failure.bind(py).call1((task,)));
            if let Err(error) = result {
                report(
                    py,
                    support(py)
                        .log_callback
                        .bind(py)
                        .call1((on_failure.bind(py), error.into_value(py))),
                );
            }
        });
    }

    fn wants_unread(&self) -> bool {
        self.on_failure.is_some()
    }

    fn choose(&self, calls: &[Call]) -> Vec<Result<usize, Raised>> {
        // SAFETY: the engine asks in a session.
        let py = unsafe { Python::assume_attached() };
        calls
            .iter()
            .map(|call| {
                self.ask_policy(py, call)
                    .map_err(|error| Raised::new(py, error))
            })
            .collect()
    }
}

impl Interp {
    /// What the user's policy says of a call.
    fn ask_policy(&self, py: Python<'_>, call: &Call) -> PyResult<usize> {
        let policy = self.policy.as_ref().expect("only a user's policy is asked");
        let seconds = |time: Duration| time.as_secs_f64();
        let candidates = call.candidates.iter().map(|candidate| {
            let devices = candidate.devices.iter().map(|device| device.index());
            (
                PyTuple::new(py, devices.collect::<Vec<_>>()),
                candidate.cores,
                candidate.estimate.map(seconds),
                seconds(candidate.wait),
                candidate.load,
                candidate.local,
            )
        });
        let candidates = candidates
            .map(|(devices, cores, estimate, wait, load, local)| {
                (devices?, cores, estimate, wait, load, local).into_pyobject(py)
            })
            .collect::<PyResult<Vec<_>>>()?;
        support(py)
            .score
            .bind(py)
            .call1((
                policy.bind(py),
                &*call.function,
                call.size,
                call.priority,
                call.turn,
                candidates,
            ))?
            .extract()
    }
}

/// The main function of a thread, as an object that Python can call.
#[pyclass(frozen)]
struct ThreadMain(std::sync::Mutex<Option<Box<dyn FnOnce() + Send>>>);

#[pymethods]
impl ThreadMain {
    fn __call__(&self, py: Python<'_>) {
        let main = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take();
        if let Some(main) = main {
            gateway::detach(py, Site::Main, main);
        }
    }
}
