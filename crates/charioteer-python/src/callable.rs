//! What the runtime knows of a callable before it spawns it: its name, what it captures, and whether
//! it may be spawned at all.
//!
//! A function's captured variables are bound by value: the spawned body is a copy of the function
//! with cells of its own. A cell that is still empty stays shared, so that a function may call
//! itself. Code that assigns a captured variable is refused. Module variables cannot be bound; those
//! whose values look like data are remembered, and the body warns if one was rebound before it ran.
//!
//! All this depends on the code alone, so it is analysed once a code object and kept in a cache of
//! the spawning thread (a shared one would contend without a GIL).

use std::cell::{OnceCell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use charioteer::hash::QuickMap;
use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyModule, PyString, PyTuple, PyType};

use crate::access::Signature;
use crate::blas::BlasRoutine;
use crate::gateway::{Hidden, PyRef};
use crate::interp::Watched;
use crate::launches::{KernelLaunch, Launch};
use crate::native::{Callee, NativeFunction};
use crate::support::{error, support};

/// What a code object tells.
struct Facts {
    /// Keeps the code alive, so that its address stays its own.
    _code: PyRef,
    name: &'static str,
    /// The captured variable that it assigns.
    assigned: Option<String>,
    /// The module variables that it reads and does not assign.
    globals: Vec<PyRef>,
    /// The positional parameters, without `*args`.
    parameters: usize,
    /// The keyword-only parameters, without `**kwargs`.
    keywords: usize,
    /// The modes of its parameters, as the first function with this code said them.
    modes: OnceCell<Option<Arc<Signature>>>,
}

impl Facts {
    /// The modes of a function with this code. Code is the same wherever a `def` is run again, and its
    /// annotations are what they were the first time, but for a program that computes them: one that
    /// said modes once is looked at again, and read again if they changed.
    #[inline]
    fn modes(&self, function: &Bound<'_, PyAny>) -> PyResult<Option<Arc<Signature>>> {
        let known = match self.modes.get() {
            Some(known) => known,
            None => {
                let read = Signature::read(function, self.name)?.map(Arc::new);
                self.modes.get_or_init(|| read)
            }
        };
        match known {
            None => Ok(None),
            Some(known) if known.is_of(function) => Ok(Some(Arc::clone(known))),
            Some(_) => Ok(Signature::read(function, self.name)?.map(Arc::new)),
        }
    }
}

/// How many code objects a thread remembers.
const REMEMBERED: usize = 1024;

thread_local! {
    static FACTS: RefCell<QuickMap<usize, Rc<Facts>>> = RefCell::default();
}

/// One copy of each name for ever: programs have few.
pub fn intern(name: &str) -> &'static str {
    static NAMES: Mutex<Option<HashSet<&'static str>>> = Mutex::new(None);
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    let names = names.get_or_insert_with(HashSet::new);
    if let Some(name) = names.get(name) {
        return name;
    }
    let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
    names.insert(name);
    name
}

type Analysis = (String, Option<String>, Vec<Py<PyAny>>, usize, usize);

fn facts(py: Python<'_>, code: *mut ffi::PyObject) -> PyResult<Rc<Facts>> {
    let key = code as usize;
    if let Some(facts) = FACTS.with(|facts| facts.borrow().get(&key).cloned()) {
        return Ok(facts);
    }
    // SAFETY: attached; the caller's function keeps its code alive.
    let code = unsafe { Bound::from_borrowed_ptr(py, code) };
    let (name, assigned, globals, parameters, keywords): Analysis =
        support(py).analyse.bind(py).call1((&code,))?.extract()?;
    let facts = Rc::new(Facts {
        _code: code.into(),
        name: intern(&name),
        assigned,
        globals: globals.into_iter().map(PyRef::new).collect(),
        parameters,
        keywords,
        modes: OnceCell::new(),
    });
    let forgotten = FACTS.with(|all| {
        let mut all = all.borrow_mut();
        let forgotten = (all.len() >= REMEMBERED).then(|| std::mem::take(&mut *all));
        all.insert(key, Rc::clone(&facts));
        forgotten
    });
    drop(forgotten);
    Ok(facts)
}

/// A callable that is about to be spawned.
pub struct Prepared {
    pub callable: Callable,
    pub name: &'static str,
    /// The modes of the parameters, and how many of these are bound already; `None` without modes.
    pub modes: Modes,
}

/// The modes of a callable's parameters, and how many positional ones are bound already.
pub type Modes = Option<(Arc<Signature>, usize)>;

/// What is to be called.
pub enum Callable {
    /// A Python callable, and the module variables to look at before it is called.
    Python(Hidden, Option<Arc<(PyRef, Vec<Watched>)>>),
    Native(Callee),
    Kernel(Arc<Launch>),
}

impl Prepared {
    /// The same for another task, without the modes. Without a GIL a function that captures is copied, cells
    /// and all: the counts of its references and theirs would be what all workers contend for. The
    /// interpreter does not count those of functions that capture nothing.
    pub fn again(&self, py: Python<'_>) -> PyResult<Self> {
        let callable = match &self.callable {
            Callable::Native(callee) => Callable::Native(callee.clone()),
            Callable::Kernel(launch) => Callable::Kernel(Arc::clone(launch)),
            Callable::Python(callable, watched) => {
                let mut callable = callable.bind(py).clone();
                if cfg!(Py_GIL_DISABLED) && is_function(&callable) {
                    callable = bind_captured(&callable)?;
                }
                Callable::Python(Hidden::new(callable), watched.clone())
            }
        };
        Ok(Self {
            callable,
            name: self.name,
            modes: None,
        })
    }

    /// The same with another object in the place of the Python callable.
    fn wrap<'py>(self, f: impl FnOnce(Hidden) -> PyResult<Bound<'py, PyAny>>) -> PyResult<Self> {
        let callable = match self.callable {
            Callable::Python(callable, watched) => {
                Callable::Python(Hidden::new(f(callable)?), watched)
            }
            native @ (Callable::Native(_) | Callable::Kernel(_)) => native,
        };
        Ok(Self { callable, ..self })
    }
}

pub fn is_function(object: &Bound<'_, PyAny>) -> bool {
    // SAFETY: attached, the object is alive.
    unsafe { ffi::PyFunction_Check(object.as_ptr()) != 0 }
}

/// Binds what `callable` captures. `TypeError` if it is not callable, `CaptureError` if it assigns
/// a captured variable.
#[inline]
pub fn prepare(callable: &Bound<'_, PyAny>) -> PyResult<Prepared> {
    if is_function(callable) {
        prepare_function(callable)
    } else {
        prepare_other(callable)
    }
}

/// Takes a callable as it is, late binding and all: for other people's executors.
pub fn prepare_raw(callable: &Bound<'_, PyAny>) -> PyResult<Prepared> {
    let native = if let Ok(function) = callable.cast::<NativeFunction>() {
        Some(Callee::Function(Arc::clone(function.get().function())))
    } else if let Ok(routine) = callable.cast::<BlasRoutine>() {
        Some(Callee::Routine(Arc::clone(routine.get().routine())))
    } else {
        None
    };
    if let Some(callee) = native {
        return Ok(Prepared {
            name: callee.name(),
            modes: callee.modes().map(|modes| (modes, 0)),
            callable: Callable::Native(callee),
        });
    }
    if let Ok(launch) = callable.cast::<KernelLaunch>() {
        let launch = launch.get().launch();
        return Ok(Prepared {
            name: launch.name(),
            modes: launch.modes().map(|modes| (modes, 0)),
            callable: Callable::Kernel(Arc::clone(launch)),
        });
    }
    Ok(Prepared {
        name: name_of(callable)?,
        callable: Callable::Python(Hidden::new(callable.clone()), None),
        modes: modes_of_object(callable)?,
    })
}

fn name_of(callable: &Bound<'_, PyAny>) -> PyResult<&'static str> {
    let py = callable.py();
    if !callable.is_callable() {
        return Err(PyTypeError::new_err(format!(
            "a body is to be callable or a coroutine, not {}",
            callable.get_type().name()?
        )));
    }
    let name = callable.getattr_opt(pyo3::intern!(py, "__name__"))?;
    let name = match &name {
        Some(name) => name
            .cast::<PyString>()
            .map(|name| name.to_string_lossy())
            .ok(),
        None => None,
    };
    Ok(match name {
        Some(name) => intern(&name),
        None => intern(&callable.get_type().name()?.to_string_lossy()),
    })
}

/// The modes of an object that is called: those of its class's `__call__`.
fn modes_of_object(callable: &Bound<'_, PyAny>) -> PyResult<Modes> {
    let class = callable.get_type();
    // SAFETY: attached; a class, alive. What a program defines is on the heap, and nothing else has
    // annotations.
    let flags = unsafe { ffi::PyType_GetFlags(class.as_type_ptr()) };
    if flags & ffi::Py_TPFLAGS_HEAPTYPE == 0 {
        return Ok(None);
    }
    match class.getattr_opt(pyo3::intern!(callable.py(), "__call__"))? {
        Some(call) if is_function(&call) => modes_of_function(&call, 1),
        _ => Ok(None),
    }
}

fn modes_of_function(function: &Bound<'_, PyAny>, bound: usize) -> PyResult<Modes> {
    let py = function.py();
    // SAFETY: attached; a Python function, alive; a borrowed reference.
    let code = unsafe { ffi::PyFunction_GetCode(function.as_ptr()) };
    let modes = facts(py, code)?.modes(function)?;
    Ok(modes.map(|modes| (modes, bound)))
}

/// The modes of a callable's parameters, without making it ready.
pub fn modes(callable: &Bound<'_, PyAny>) -> PyResult<Modes> {
    let py = callable.py();
    if is_function(callable) {
        return modes_of_function(callable, 0);
    }
    if let Ok(function) = callable.cast::<NativeFunction>() {
        let callee = Callee::Function(Arc::clone(function.get().function()));
        return Ok(callee.modes().map(|modes| (modes, 0)));
    }
    if let Ok(routine) = callable.cast::<BlasRoutine>() {
        let callee = Callee::Routine(Arc::clone(routine.get().routine()));
        return Ok(callee.modes().map(|modes| (modes, 0)));
    }
    if let Ok(launch) = callable.cast::<KernelLaunch>() {
        return Ok(launch.get().launch().modes().map(|modes| (modes, 0)));
    }
    if callable.get_type().is(support(py).method.bind(py)) {
        let function = callable.getattr("__func__")?;
        return if is_function(&function) {
            modes_of_function(&function, 1)
        } else {
            Ok(None)
        };
    }
    if callable.get_type().is(support(py).partial.bind(py)) {
        return modes_of_partial(callable, modes(&callable.getattr("func")?)?);
    }
    modes_of_object(callable)
}

/// Those of a `functools.partial` of a function with these. `AccessError` if it binds a parameter with a
/// mode, which would be an access that no call says.
fn modes_of_partial(partial: &Bound<'_, PyAny>, modes: Modes) -> PyResult<Modes> {
    let Some((modes, bound)) = modes else {
        return Ok(None);
    };
    let arguments = partial.getattr("args")?.cast_into::<PyTuple>()?;
    let keywords = partial.getattr("keywords")?.cast_into::<PyDict>()?;
    modes.refuse_bound(bound, &arguments, &keywords)?;
    Ok(Some((modes, bound + arguments.len())))
}

/// What people call it.
pub fn name(callable: &Bound<'_, PyAny>) -> PyResult<&'static str> {
    if let Ok(function) = callable.cast::<NativeFunction>() {
        return Ok(Callee::Function(Arc::clone(function.get().function())).name());
    }
    if let Ok(routine) = callable.cast::<BlasRoutine>() {
        return Ok(Callee::Routine(Arc::clone(routine.get().routine())).name());
    }
    if callable
        .get_type()
        .is(support(callable.py()).partial.bind(callable.py()))
    {
        return name(&callable.getattr("func")?);
    }
    name_of(callable)
}

/// What it is called in the models of run times: by its module and where it stands in that, so that the
/// same function has the same name in the next run.
pub fn model_name(callable: &Bound<'_, PyAny>) -> PyResult<&'static str> {
    let py = callable.py();
    if callable.get_type().is(support(py).partial.bind(py)) {
        return model_name(&callable.getattr("func")?);
    }
    let text = |name: &Bound<'_, PyString>| -> PyResult<Option<String>> {
        let found = callable.getattr_opt(name)?;
        Ok(found.and_then(|found| found.extract().ok()))
    };
    let qualified = match text(pyo3::intern!(py, "__qualname__"))? {
        Some(qualified) => qualified,
        None => name(callable)?.to_owned(),
    };
    Ok(match text(pyo3::intern!(py, "__module__"))? {
        Some(module) => intern(&format!("{module}.{qualified}")),
        None => intern(&qualified),
    })
}

/// The object of a bound method.
pub fn receiver<'py>(callable: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
    let method = support(callable.py()).method.bind(callable.py());
    if !callable.get_type().is(method) {
        return Ok(None);
    }
    callable.getattr("__self__").map(Some)
}

/// The body bound to the object that `function` is bound to, if it is a method.
pub fn bind_like<'py>(
    function: &Bound<'py, PyAny>,
    body: Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    match receiver(function)? {
        None => Ok(body),
        Some(receiver) => {
            let py = function.py();
            support(py).method.bind(py).call1((body, receiver))
        }
    }
}

fn prepare_other(callable: &Bound<'_, PyAny>) -> PyResult<Prepared> {
    let py = callable.py();
    if callable.get_type().is(support(py).method.bind(py)) {
        let function = callable.getattr("__func__")?;
        if !is_function(&function) {
            return prepare_raw(callable);
        }
        let mut prepared = prepare_function(&function)?;
        if let Some((_, bound)) = &mut prepared.modes {
            *bound += 1;
        }
        let instance = callable.getattr("__self__")?;
        return prepared.wrap(|function| {
            support(py)
                .method
                .bind(py)
                .call1((function.bind(py), instance))
        });
    }
    if callable.get_type().is(support(py).partial.bind(py)) {
        let function = callable.getattr("func")?;
        let mut prepared = prepare(&function)?;
        prepared.modes = modes_of_partial(callable, prepared.modes)?;
        let arguments = callable.getattr("args")?.cast_into::<PyTuple>()?;
        let keywords = callable.getattr("keywords")?.cast_into::<PyDict>()?;
        if !matches!(prepared.callable, Callable::Python(..)) {
            // Nothing of it is to be bound, and the object calls the native function by itself.
            return Ok(Prepared {
                callable: Callable::Python(Hidden::new(callable.clone()), None),
                name: prepared.name,
                modes: prepared.modes,
            });
        }
        return prepared.wrap(|function| {
            let mut all = vec![function.bind(py).clone()];
            all.extend(arguments.iter());
            support(py)
                .partial
                .bind(py)
                .call(PyTuple::new(py, all)?, Some(&keywords))
        });
    }
    prepare_raw(callable)
}

fn prepare_function(function: &Bound<'_, PyAny>) -> PyResult<Prepared> {
    let py = function.py();
    let raw = function.as_ptr();
    // SAFETY: attached; `function` is a Python function and alive; borrowed references.
    let (code, globals) = unsafe {
        (
            ffi::PyFunction_GetCode(raw),
            ffi::PyFunction_GetGlobals(raw),
        )
    };
    let facts = facts(py, code)?;
    if let Some(assigned) = &facts.assigned {
        return Err(error(py, "CaptureError", (facts.name, assigned.as_str())));
    }
    let watched = if facts.globals.is_empty() {
        None
    } else {
        watch(py, &facts.globals, globals)
    };
    Ok(Prepared {
        callable: Callable::Python(Hidden::new(bind_captured(function)?), watched),
        name: facts.name,
        modes: facts.modes(function)?.map(|modes| (modes, 0)),
    })
}

/// The function, or a copy of it with cells of its own if it has any.
fn bind_captured<'py>(function: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = function.py();
    let raw = function.as_ptr();
    // SAFETY: attached; the caller's is a Python function and alive; borrowed references.
    unsafe {
        let closure = ffi::PyFunction_GetClosure(raw);
        if closure.is_null() {
            return Ok(function.clone());
        }
        let code = ffi::PyFunction_GetCode(raw);
        let globals = ffi::PyFunction_GetGlobals(raw);
        with_own_cells(py, raw, code, closure, globals)
    }
}

/// Remembers the module variables whose values look like data.
fn watch(
    py: Python<'_>,
    names: &[PyRef],
    globals: *mut ffi::PyObject,
) -> Option<Arc<(PyRef, Vec<Watched>)>> {
    let mut watched = Vec::new();
    for name in names {
        let mut value = std::ptr::null_mut();
        // SAFETY: attached; a dict and a string, both alive; the result is a reference of our own,
        // since another thread may rebind the variable at any time.
        let value = unsafe {
            ffi::compat::PyDict_GetItemRef(globals, name.as_ptr(), &raw mut value);
            Bound::from_owned_ptr_or_opt(py, value)
        };
        let Some(value) = value else { continue };
        if is_function(&value)
            || value.is_instance_of::<PyModule>()
            || value.is_instance_of::<PyType>()
            || value.is_instance_of::<crate::spawn::TaskFunction>()
        {
            continue;
        }
        watched.push(Watched {
            name: PyRef::new(name.clone_ref(py)),
            value: value.into(),
        });
    }
    if watched.is_empty() {
        return None;
    }
    // SAFETY: attached, alive.
    let globals = unsafe { Bound::from_borrowed_ptr(py, globals) };
    Some(Arc::new((globals.into(), watched)))
}

/// A copy of a function whose cells are its own.
///
/// # Safety
/// `function` is a Python function with that code, closure and globals, and alive.
unsafe fn with_own_cells<'py>(
    py: Python<'py>,
    function: *mut ffi::PyObject,
    code: *mut ffi::PyObject,
    closure: *mut ffi::PyObject,
    globals: *mut ffi::PyObject,
) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: attached; every call below gives a new reference or null with an exception, except
    // where a comment says that it is borrowed or stolen.
    unsafe {
        let count = ffi::PyTuple_Size(closure);
        let cells = Bound::from_owned_ptr_or_err(py, ffi::PyTuple_New(count))?;
        for at in 0..count {
            let cell = ffi::PyTuple_GetItem(closure, at); // borrowed
            let value = ffi::PyCell_Get(cell);
            let own = if value.is_null() {
                ffi::Py_INCREF(cell);
                cell
            } else {
                let own = ffi::PyCell_New(value);
                ffi::Py_DECREF(value);
                own
            };
            if own.is_null() {
                return Err(PyErr::fetch(py));
            }
            ffi::PyTuple_SetItem(cells.as_ptr(), at, own); // stolen
        }
        let copy = Bound::from_owned_ptr_or_err(py, ffi::PyFunction_New(code, globals))?;
        if ffi::PyFunction_SetClosure(copy.as_ptr(), cells.as_ptr()) != 0 {
            return Err(PyErr::fetch(py));
        }
        let defaults = ffi::PyFunction_GetDefaults(function); // borrowed
        if !defaults.is_null() && ffi::PyFunction_SetDefaults(copy.as_ptr(), defaults) != 0 {
            return Err(PyErr::fetch(py));
        }
        let defaults = ffi::PyFunction_GetKwDefaults(function); // borrowed
        if !defaults.is_null() && ffi::PyFunction_SetKwDefaults(copy.as_ptr(), defaults) != 0 {
            return Err(PyErr::fetch(py));
        }
        Ok(copy)
    }
}

/// Positional defaults, and those by keyword.
type Defaults<'py> = (Option<Bound<'py, PyTuple>>, Option<Bound<'py, PyDict>>);

/// The defaults of a function or a method, positional ones and those by keyword; none of anything else.
pub fn defaults_of<'py>(function: &Bound<'py, PyAny>) -> PyResult<Defaults<'py>> {
    let py = function.py();
    let inner;
    let function = if function.get_type().is(support(py).method.bind(py)) {
        inner = function.getattr("__func__")?;
        &inner
    } else {
        function
    };
    if !is_function(function) {
        return Ok((None, None));
    }
    let raw = function.as_ptr();
    // SAFETY: attached; a Python function, alive; borrowed references.
    let (positional, keyword) = unsafe {
        (
            Bound::from_borrowed_ptr_or_opt(py, ffi::PyFunction_GetDefaults(raw)),
            Bound::from_borrowed_ptr_or_opt(py, ffi::PyFunction_GetKwDefaults(raw)),
        )
    };
    let positional = positional
        .map(|defaults| defaults.cast_into::<PyTuple>())
        .transpose()?;
    let keyword = keyword
        .map(|defaults| defaults.cast_into::<PyDict>())
        .transpose()?;
    Ok((positional, keyword))
}

/// The defaults of a function, which are the arguments of an inline task: positional ones, then
/// those by keyword. `TypeError` if a parameter has none.
pub fn defaults<'py>(function: &Bound<'py, PyAny>) -> PyResult<Defaults<'py>> {
    if !is_function(function) {
        return Ok((None, None));
    }
    let py = function.py();
    let raw = function.as_ptr();
    // SAFETY: attached; a Python function, alive; borrowed references.
    let (code, positional, keyword) = unsafe {
        (
            ffi::PyFunction_GetCode(raw),
            Bound::from_borrowed_ptr_or_opt(py, ffi::PyFunction_GetDefaults(raw)),
            Bound::from_borrowed_ptr_or_opt(py, ffi::PyFunction_GetKwDefaults(raw)),
        )
    };
    let facts = facts(py, code)?;
    let positional = positional
        .map(|defaults| defaults.cast_into::<PyTuple>())
        .transpose()?;
    let keyword = keyword
        .map(|defaults| defaults.cast_into::<PyDict>())
        .transpose()?;
    let given = positional.as_ref().map_or(0, |defaults| defaults.len());
    let named = keyword.as_ref().map_or(0, |defaults| defaults.len());
    if given < facts.parameters || named < facts.keywords {
        return Err(PyTypeError::new_err(format!(
            "{}: the defaults of an inline task are its arguments, and {} of its parameters have \
             none",
            facts.name,
            (facts.parameters + facts.keywords).saturating_sub(given + named)
        )));
    }
    Ok((positional, keyword))
}
