//! Spawning: `task`, `spawn`, `spawn_many`, and what they return.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use charioteer::engine::{Handle, SpawnError};
use charioteer::task::Options;
use pyo3::exceptions::{PyRuntimeError, PyTypeError};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple, PyType};

use crate::access::{self, Bindings, Claim, Claims, Shards};
use crate::callable::{self, Callable, Modes, Prepared};
use crate::gateway::{self, Hidden, PyRef};
use crate::interp::{Arguments, Body, Core, Held, Interp, Label, PythonBody, Task};
use crate::launches;
use crate::local::{Deferral, Library};
use crate::native;
use crate::options::{Keywords, Target, keywords};
use crate::placement::Placement;
use crate::runtime;
use crate::space::{TaskList, TaskSpace};
use crate::support::{error, support};
use crate::task::PyTask;
use crate::variants::{Bodies, Cost, Given, Recipe, Several, VariantTable};

/// What the spawner's `contextvars` are now.
#[inline]
fn context(py: Python<'_>) -> PyResult<Hidden> {
    // SAFETY: attached; a new reference or null with an exception.
    let context = unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyContext_CopyCurrent()) }?;
    Ok(Hidden::new(context))
}

/// Whether this stands for results: a handle, or several. The three classes have no subclasses.
fn is_handle(thing: &Bound<'_, PyAny>) -> bool {
    thing.is_exact_instance_of::<PyTask>()
        || thing.is_exact_instance_of::<TaskList>()
        || thing.is_exact_instance_of::<TaskSpace>()
}

/// Whether an argument is a handle or holds one, one level deep.
fn has_handles(argument: &Bound<'_, PyAny>) -> bool {
    if is_handle(argument) {
        return true;
    }
    if let Ok(list) = argument.cast_exact::<PyList>() {
        list.iter().any(|thing| is_handle(&thing))
    } else if let Ok(tuple) = argument.cast_exact::<PyTuple>() {
        tuple.iter_borrowed().any(|thing| is_handle(&thing))
    } else if let Ok(dict) = argument.cast_exact::<PyDict>() {
        let found = Cell::new(false);
        // The closure refuses nothing.
        let _ = dict.locked_for_each(|_, thing| {
            found.set(found.get() || is_handle(&thing));
            Ok(())
        });
        found.get()
    } else {
        false
    }
}

/// Notes a handle as a dependency, and gives what it stands for from now on: the tasks of a space
/// are those that were touched so far.
fn hold_one<'py>(
    thing: Bound<'py, PyAny>,
    dependencies: &mut Vec<Task>,
) -> PyResult<Bound<'py, PyAny>> {
    if let Ok(task) = thing.cast::<PyTask>() {
        dependencies.push(task.get().task().clone());
    } else if let Ok(list) = thing.cast::<TaskList>() {
        list.get().tasks(dependencies);
    } else if let Ok(space) = thing.cast::<TaskSpace>() {
        let list = Bound::new(thing.py(), space.get().list(thing.py()))?;
        list.get().tasks(dependencies);
        return Ok(list.into_any());
    }
    Ok(thing)
}

/// Notes the handles of an argument as dependencies, and gives what the body is to keep instead of
/// it; `None` if there is no handle.
fn hold<'py>(
    argument: &Bound<'py, PyAny>,
    dependencies: &mut Vec<Task>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    if !has_handles(argument) {
        return Ok(None);
    }
    let py = argument.py();
    // The caller's list or dictionary may change before the body runs: its handles are those of now.
    let held = if let Ok(list) = argument.cast_exact::<PyList>() {
        let things = list
            .iter()
            .map(|thing| hold_one(thing, dependencies))
            .collect::<PyResult<Vec<_>>>()?;
        PyList::new(py, things)?.into_any()
    } else if let Ok(tuple) = argument.cast_exact::<PyTuple>() {
        let things = tuple
            .iter()
            .map(|thing| hold_one(thing, dependencies))
            .collect::<PyResult<Vec<_>>>()?;
        PyTuple::new(py, things)?.into_any()
    } else if let Ok(dict) = argument.cast_exact::<PyDict>() {
        let copy = PyDict::new(py);
        for (key, thing) in dict.copy()? {
            copy.set_item(key, hold_one(thing, dependencies)?)?;
        }
        copy.into_any()
    } else {
        return hold_one(argument.clone(), dependencies).map(Some);
    };
    Ok(Some(Bound::new(py, Held(held.into()))?.into_any()))
}

/// Spawns bodies, of which one will run, with everything that is known of them.
#[allow(clippy::too_many_arguments)]
fn launch(
    py: Python<'_>,
    engine: &std::sync::Arc<Core>,
    bodies: Bodies,
    arguments: Arguments,
    handles: bool,
    options: Option<Box<Options>>,
    dependencies: &[Task],
    said: &Keywords,
    recipe: &Recipe,
    claims: &[Claim<'_>],
) -> PyResult<Option<Handle<Interp>>> {
    let target = said.target.as_ref();
    let deferred = recipe.deferral().is_some() && !claims.is_empty();
    let substitute = handles || deferred || claims.iter().any(Claim::reduces);
    let wide = Keywords::may_be_wide(options.as_deref());
    let retried = options.as_ref().is_some_and(|options| options.retries > 0);
    if retried && said.idempotent != Some(true) {
        refuse_retries(py, claims)?;
    }
    let declared = said.data.as_deref();
    let data = |body: usize| {
        if claims.is_empty() {
            return Ok(None);
        }
        let checks = engine.domain().checks;
        let deferral = recipe.deferral().map(|deferral| Deferral {
            library: recipe.library(body),
            ..deferral.clone()
        });
        access::body_data(py, declared, claims, deferral.as_ref(), checks, retried)
    };
    // A body in C is for cores, and gets its arrays here and now as ever. A kernel gets addresses by itself
    // when it is launched.
    let of_its_own = |prepared: &Prepared, body: usize, arguments: &Arguments| {
        match prepared.callable {
            Callable::Kernel(_) => return Ok(Some(arguments.clone_ref(py))),
            Callable::Native(_) if deferred => {}
            _ => return Ok(None),
        }
        if recipe.on_devices(body) {
            let why = format!(
                "{} is a C function, which takes memory of the host: place it on cpu, and register a \
                 variant for devices",
                prepared.name
            );
            return Err(error(py, "AccessError", (why,)));
        }
        access::on_host(py, arguments).map(Some)
    };
    let mut name = bodies.name();
    // `at`: which one it is of several, whose name is that of the first.
    let mut body_of = |prepared: Prepared, at: Option<usize>, arguments: Arguments| {
        let number = at.unwrap_or(0);
        let (arguments, substitute) = match of_its_own(&prepared, number, &arguments)? {
            Some(others) => (others, handles),
            None => (arguments, substitute),
        };
        Ok::<_, PyErr>(match prepared.callable {
            Callable::Python(callable, watched) => Body::Python(PythonBody {
                wide,
                data: data(number)?,
                callable,
                arguments,
                substitute,
                context: context(py)?,
                watched,
                coroutine: None,
            }),
            Callable::Native(callee) => {
                let own = at.is_none() && std::ptr::eq(callee.name(), name);
                let call = native::Call::new(py, callee, arguments, substitute, wide)?;
                if own {
                    name = call.name();
                }
                Body::Native(call)
            }
            Callable::Kernel(launch) => {
                let place = (options.as_deref(), at);
                let call = launches::Call::new(py, engine, launch, arguments, substitute, place)?;
                Body::Kernel(Box::new(call))
            }
        })
    };
    let body = match bodies {
        Bodies::One(prepared) => body_of(prepared, None, arguments)?,
        Bodies::Several(candidates) => {
            let each = candidates.bodies.into_iter().enumerate();
            let bodies = each
                .map(|(at, prepared)| body_of(prepared, Some(at), arguments.clone_ref(py)))
                .collect::<PyResult<_>>()?;
            Body::Several(Box::new(Several {
                bodies,
                plan: candidates.plan,
                matcher: candidates.matcher,
                running: None,
            }))
        }
    };
    let accesses = access::accesses(claims);
    let result = match target {
        None => {
            let label = Label::Function(name);
            engine
                .spawn_handle(label, body, options, dependencies, &accesses)
                .map(Some)
        }
        Some(Target::Name(name)) => {
            let label = Label::Name(name.clone());
            engine
                .spawn_handle(label, body, options, dependencies, &accesses)
                .map(Some)
        }
        Some(Target::Handle(handle)) => {
            let task = Target::task(handle);
            engine
                .spawn_as(task, body, options, dependencies, &accesses)
                .map(|()| None)
        }
    };
    if let Some(interrupt) = gateway::take_interrupt() {
        // The spawner waited for room, and a signal's handler raised.
        return Err(interrupt);
    }
    engine.domain().gil.spawned(py, engine);
    result.map_err(|why| spawn_error(py, why, target))
}

/// How many groups of tasks are open; while there is none, nobody asks for the spawner's.
static GROUPS: AtomicUsize = AtomicUsize::new(0);

/// Counts groups that are entered and left.
#[pyfunction]
pub fn count_groups(entered: bool) {
    if entered {
        GROUPS.fetch_add(1, Ordering::Relaxed);
    } else {
        GROUPS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The object of a task that was spawned just now, which belongs to the spawner's group.
#[inline]
pub fn handle_of<'py>(
    py: Python<'py>,
    spawned: Option<Handle<Interp>>,
    target: Option<&Target>,
) -> PyResult<Bound<'py, PyAny>> {
    let object = match (spawned, target) {
        (Some(handle), _) => PyTask::of(handle).into_object(py)?.into_any(),
        (None, Some(Target::Handle(handle))) => handle.bind(py).clone(),
        (None, _) => unreachable!("what was not a handle before is one now"),
    };
    if GROUPS.load(Ordering::Relaxed) != 0 {
        support(py).join_group.bind(py).call1((&object,))?;
    }
    Ok(object)
}

pub fn spawn_error(py: Python<'_>, why: SpawnError, target: Option<&Target>) -> PyErr {
    match why {
        SpawnError::Closed => runtime::none(py),
        SpawnError::Duplicate => {
            let name = match target {
                Some(Target::Handle(handle)) => Target::task(handle).label().to_string(),
                _ => String::new(),
            };
            error(py, "DuplicateTaskError", (name,))
        }
        SpawnError::Cycle(cycle) => error(py, "CycleError", (cycle,)),
        SpawnError::Access(why) => error(py, "AccessError", (why.to_string(),)),
        SpawnError::Devices(reasons) => error(py, "PlacementError", (reasons.join("; "),)),
        SpawnError::Memory {
            device,
            wanted,
            there,
        } => error(py, "OutOfDeviceMemoryError", (device, wanted, there)),
        SpawnError::Cores(wanted, present) => error(
            py,
            "PlacementError",
            (format!("cpu * {wanted}: the runtime has {present} cores"),),
        ),
    }
}

/// `AccessError` if a second attempt would find what the first one wrote, and nobody said that it may.
fn refuse_retries(py: Python<'_>, claims: &[Claim<'_>]) -> PyResult<()> {
    let Some(claim) = claims.iter().find(|claim| claim.updates()) else {
        return Ok(());
    };
    let why = format!(
        "{} is read and written, so that a second attempt would begin with what the first one left: with \
         idempotent=True a task that can do so is retried",
        claim.text()
    );
    Err(error(py, "AccessError", (why,)))
}

/// The positional arguments of a call.
#[derive(Clone, Copy)]
enum Positional<'a, 'py> {
    /// As the caller gave them.
    Tuple(&'a Bound<'py, PyTuple>),
    /// One by one.
    Each(&'a [Bound<'py, PyAny>]),
}

impl<'a, 'py> Positional<'a, 'py> {
    fn as_slice(self) -> &'a [Bound<'py, PyAny>] {
        match self {
            Self::Tuple(tuple) => tuple.as_slice(),
            Self::Each(each) => each,
        }
    }

    fn to_tuple(self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        match self {
            Self::Tuple(tuple) => Ok(tuple.clone()),
            Self::Each(each) => PyTuple::new(py, each),
        }
    }
}

/// Spawns `function(*positional, **keyword)`.
#[allow(clippy::too_many_arguments)]
fn spawn_call(
    py: Python<'_>,
    said: &Keywords,
    function: &Bound<'_, PyAny>,
    options: Option<Box<Options>>,
    recipe: &Recipe,
    mut bodies: Bodies,
    positional: Option<&Bound<'_, PyTuple>>,
    keyword: Option<&Bound<'_, PyDict>>,
) -> PyResult<Option<Handle<Interp>>> {
    let modes = bodies.take_modes(function)?;
    let positional = positional.map(Positional::Tuple);
    spawn_with(
        py, said, function, options, recipe, bodies, &modes, positional, keyword,
    )
}

/// The same, of a function with these modes.
#[allow(clippy::too_many_arguments)]
fn spawn_with<'py>(
    py: Python<'py>,
    said: &Keywords,
    function: &Bound<'py, PyAny>,
    options: Option<Box<Options>>,
    recipe: &Recipe,
    bodies: Bodies,
    modes: &Modes,
    positional: Option<Positional<'_, 'py>>,
    keyword: Option<&Bound<'py, PyDict>>,
) -> PyResult<Option<Handle<Interp>>> {
    let active = runtime::active(py)?;
    let engine = &active.engine;
    let keyword = keyword.filter(|keyword| !keyword.is_empty());
    let positional = positional.filter(|positional| !positional.as_slice().is_empty());
    let mut claims = Claims::new();
    if let Some(data) = &said.data {
        access::declared(py, data, &mut claims);
    }
    if positional.is_none() && keyword.is_none() && modes.is_none() {
        return launch(
            py,
            engine,
            bodies,
            Arguments::None,
            false,
            options,
            &said.dependencies,
            said,
            recipe,
            &claims,
        );
    }
    let mut found = Vec::new();
    let Bindings {
        mut positional,
        keyword,
        others,
    } = match modes {
        None => Bindings {
            positional: positional.map(|it| it.to_tuple(py)).transpose()?,
            keyword: keyword.map(|keyword| keyword.copy()).transpose()?,
            others: true,
        },
        Some((modes, bound)) => access::bind(
            py,
            (modes, *bound),
            function,
            positional.map(Positional::as_slice),
            keyword,
            recipe.deferral(),
            &mut claims,
        )?,
    };
    let mut handles = false;
    if others
        && let Some(given) = &positional
        && given.iter_borrowed().any(|argument| has_handles(&argument))
    {
        handles = true;
        let mut kept = Vec::with_capacity(given.len());
        for argument in given {
            kept.push(hold(&argument, &mut found)?.unwrap_or(argument));
        }
        positional = Some(PyTuple::new(py, kept)?);
    }
    if let Some(keyword) = &keyword {
        let mut held = Vec::new();
        for (name, argument) in keyword {
            if let Some(kept) = hold(&argument, &mut found)? {
                held.push((name, kept));
            }
        }
        handles |= !held.is_empty();
        for (name, kept) in held {
            keyword.set_item(name, kept)?;
        }
    }
    let all;
    let dependencies: &[Task] = if found.is_empty() {
        &said.dependencies
    } else {
        found.extend(said.dependencies.iter().cloned());
        all = found;
        &all
    };
    let arguments = match (positional, keyword) {
        // Without a GIL an argument that threads share is touched as little as can be: it stays in its
        // tuple.
        (Some(positional), None) if positional.len() == 1 && cfg!(not(Py_GIL_DISABLED)) => {
            Arguments::One(positional.get_item(0)?.into())
        }
        (positional, keyword) => {
            let positional = positional.unwrap_or_else(|| PyTuple::empty(py)).into();
            match keyword {
                None => Arguments::Many(positional),
                Some(keyword) => Arguments::Named(Box::new((positional, keyword.into()))),
            }
        }
    };
    launch(
        py,
        engine,
        bodies,
        arguments,
        handles,
        options,
        dependencies,
        said,
        recipe,
        &claims,
    )
}

/// Spawns an inline task: the defaults of the function are its arguments.
fn spawn_inline(
    py: Python<'_>,
    said: &Keywords,
    function: &Bound<'_, PyAny>,
    table: Option<&VariantTable>,
) -> PyResult<Option<Handle<Interp>>> {
    if is_coroutine(function) {
        return spawn_coroutine(py, said, function);
    }
    let mut recipe = Recipe::new(py, said, function, table)?;
    let bodies = recipe.prepare(function, table)?;
    bodies.check_inline()?;
    let (positional, keyword) = callable::defaults(function)?;
    let given = Given {
        positional: positional.as_ref(),
        keyword: keyword.as_ref(),
    };
    let options = recipe.options(py, said, function, table, &given)?;
    let substitute = positional
        .iter()
        .flat_map(|positional| positional.iter())
        .chain(
            keyword
                .iter()
                .flat_map(|keyword| keyword.iter())
                .map(|(_, argument)| argument),
        )
        .any(|argument| has_handles(&argument));
    let finds = match &bodies {
        Bodies::One(prepared) => prepared.modes.is_none() && !recipe.has_variants(),
        Bodies::Several(_) => false,
    };
    if finds && !substitute {
        // The function finds its defaults by itself.
        return spawn_call(py, said, function, options, &recipe, bodies, None, None);
    }
    spawn_call(
        py,
        said,
        function,
        options,
        &recipe,
        bodies,
        positional.as_ref(),
        keyword.as_ref(),
    )
}

fn is_coroutine(object: &Bound<'_, PyAny>) -> bool {
    // SAFETY: attached, the object is alive.
    unsafe { ffi::PyCoro_CheckExact(object.as_ptr()) != 0 }
}

/// Spawns a coroutine object, which can be run once.
fn spawn_coroutine(
    py: Python<'_>,
    said: &Keywords,
    coroutine: &Bound<'_, PyAny>,
) -> PyResult<Option<Handle<Interp>>> {
    if said.retries.is_some_and(|retries| retries > 0) {
        // Nobody can have meant it for anything else, and dropped unawaited it would warn.
        coroutine.call_method0("close")?;
        return Err(PyTypeError::new_err(
            "a coroutine object runs once and cannot be retried: spawn its function",
        ));
    }
    let name = coroutine.getattr("__name__")?.extract::<String>()?;
    let give = Bound::new(py, Give(coroutine.clone().into()))?;
    let prepared = Prepared {
        callable: Callable::Python(Hidden::new(give.into_any()), None),
        name: callable::intern(&name),
        modes: None,
    };
    let mut recipe = Recipe::new(py, said, coroutine, None)?;
    let given = Given {
        positional: None,
        keyword: None,
    };
    let options = recipe.options(py, said, coroutine, None, &given)?;
    support(py).claim_coroutine.bind(py).call1((coroutine,))?;
    let spawned = spawn_call(
        py,
        said,
        coroutine,
        options,
        &recipe,
        Bodies::One(prepared),
        None,
        None,
    );
    if spawned.is_err() {
        support(py)
            .disclaim_coroutine
            .bind(py)
            .call1((coroutine,))?;
    }
    spawned
}

/// Gives the coroutine object that it was made with.
#[pyclass(frozen)]
struct Give(PyRef);

#[pymethods]
impl Give {
    fn __call__(&self, py: Python<'_>) -> Py<PyAny> {
        self.0.clone_ref(py)
    }
}

/// Spawns an inline task, of a task function too.
fn spawn_any<'py>(
    py: Python<'py>,
    said: &Keywords,
    function: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let over;
    let (function, said, table) = match function.cast::<TaskFunction>() {
        Ok(function) => {
            let function = function.get();
            over = said.clone().over(&function.said);
            (function.function.bind(py), &over, Some(function.table(py)))
        }
        Err(_) => (function, said, None),
    };
    let task = spawn_inline(py, said, function, table)?;
    handle_of(py, task, said.target.as_ref())
}

/// What `spawn(...)` with options gives: called with a function, it spawns it.
#[pyclass(module = "charioteer._core", frozen)]
pub struct Spawner(Keywords);

#[pymethods]
impl Spawner {
    #[pyo3(signature = (function, /))]
    fn __call__<'py>(
        &self,
        py: Python<'py>,
        function: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        spawn_any(py, &self.0, function)
    }
}

/// Runs a function as a task at once; the name that it decorates is the task.
#[pyfunction]
#[pyo3(signature = (
    target=None, /, *, name=None, dependencies=None, priority=None, placement=None, share=None,
    memory=None, cost=None, size=None, timeout=None, retries=None,
    input=None, output=None, inout=None, commute=None, shards=None,
    array_library=None, idempotent=None
))]
#[allow(clippy::too_many_arguments)]
pub fn spawn<'py>(
    py: Python<'py>,
    target: Option<&Bound<'py, PyAny>>,
    name: Option<&Bound<'py, PyAny>>,
    dependencies: Option<&Bound<'py, PyAny>>,
    priority: Option<&Bound<'py, PyAny>>,
    placement: Option<&Bound<'py, PyAny>>,
    share: Option<&Bound<'py, PyAny>>,
    memory: Option<&Bound<'py, PyAny>>,
    cost: Option<&Bound<'py, PyAny>>,
    size: Option<&Bound<'py, PyAny>>,
    timeout: Option<&Bound<'py, PyAny>>,
    retries: Option<&Bound<'py, PyAny>>,
    input: Option<&Bound<'py, PyAny>>,
    output: Option<&Bound<'py, PyAny>>,
    inout: Option<&Bound<'py, PyAny>>,
    commute: Option<&Bound<'py, PyAny>>,
    shards: Option<&Bound<'py, PyAny>>,
    array_library: Option<&Bound<'py, PyAny>>,
    idempotent: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let said = keywords(
        name,
        dependencies,
        priority,
        placement,
        share,
        memory,
        cost,
        size,
        timeout,
        retries,
        [input, output, inout, commute],
        [shards, array_library, idempotent],
    )?;
    let Some(first) = target else {
        return Ok(Bound::new(py, Spawner(said))?.into_any());
    };
    if callable::is_function(first) {
        return spawn_any(py, &said, first);
    }
    if first.is_instance_of::<PyTask>() || first.is_instance_of::<pyo3::types::PyString>() {
        if said.target.is_some() {
            return Err(PyTypeError::new_err("the task has two names"));
        }
        let said = Keywords {
            target: Some(crate::options::target(first)?),
            ..said
        };
        return Ok(Bound::new(py, Spawner(said))?.into_any());
    }
    if let Ok(list) = first.cast::<TaskList>()
        && list.get().is_empty()
    {
        return Err(PyTypeError::new_err(
            "no task has this name: its index lies below the lower bound of its space",
        ));
    }
    spawn_any(py, &said, first)
}

/// A function whose calls are tasks.
#[pyclass(module = "charioteer", frozen, dict, weakref)]
pub struct TaskFunction {
    function: PyRef,
    said: Keywords,
    /// Shared by all that `.options()` and binding make of it.
    variants: PyRef,
}

impl TaskFunction {
    fn table<'a>(&'a self, py: Python<'a>) -> &'a VariantTable {
        let table = self.variants.bind(py);
        // SAFETY: only this module fills the field, with objects of this class, and what is borrowed
        // lives as long as the object, which this one keeps.
        unsafe { table.cast_unchecked::<VariantTable>() }.get()
    }

    /// The same with another function or other keywords.
    fn like(&self, py: Python<'_>, function: Py<PyAny>, said: Keywords) -> Self {
        Self {
            function: PyRef::new(function),
            said,
            variants: PyRef::new(self.variants.clone_ref(py)),
        }
    }

    /// Spawns a call.
    fn spawn(
        &self,
        py: Python<'_>,
        positional: &Bound<'_, PyTuple>,
        keyword: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Option<Handle<Interp>>> {
        let function = self.function.bind(py);
        let table = Some(self.table(py));
        let mut recipe = Recipe::new(py, &self.said, function, table)?;
        let bodies = recipe.prepare(function, table)?;
        let given = Given {
            positional: Some(positional),
            keyword,
        };
        let options = recipe.options(py, &self.said, function, table, &given)?;
        spawn_call(
            py,
            &self.said,
            function,
            options,
            &recipe,
            bodies,
            Some(positional),
            keyword,
        )
    }
}

#[pymethods]
impl TaskFunction {
    #[pyo3(signature = (*arguments, **keywords))]
    fn __call__<'py>(
        &self,
        py: Python<'py>,
        arguments: &Bound<'py, PyTuple>,
        keywords: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let task = self.spawn(py, arguments, keywords)?;
        handle_of(py, task, self.said.target.as_ref())
    }

    /// The undecorated function.
    #[getter(r#fn)]
    fn undecorated(&self, py: Python<'_>) -> Py<PyAny> {
        self.function.clone_ref(py)
    }

    #[getter]
    fn __wrapped__(&self, py: Python<'_>) -> Py<PyAny> {
        self.function.clone_ref(py)
    }

    /// The function with a name and options for the next calls.
    #[pyo3(signature = (
        name=None, *, dependencies=None, priority=None, placement=None, share=None,
        memory=None, cost=None, size=None, timeout=None, retries=None,
        input=None, output=None, inout=None, commute=None, shards=None,
    array_library=None, idempotent=None
    ))]
    #[allow(clippy::too_many_arguments)]
    fn options(
        &self,
        py: Python<'_>,
        name: Option<&Bound<'_, PyAny>>,
        dependencies: Option<&Bound<'_, PyAny>>,
        priority: Option<&Bound<'_, PyAny>>,
        placement: Option<&Bound<'_, PyAny>>,
        share: Option<&Bound<'_, PyAny>>,
        memory: Option<&Bound<'_, PyAny>>,
        cost: Option<&Bound<'_, PyAny>>,
        size: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
        retries: Option<&Bound<'_, PyAny>>,
        input: Option<&Bound<'_, PyAny>>,
        output: Option<&Bound<'_, PyAny>>,
        inout: Option<&Bound<'_, PyAny>>,
        commute: Option<&Bound<'_, PyAny>>,
        shards: Option<&Bound<'_, PyAny>>,
        array_library: Option<&Bound<'_, PyAny>>,
        idempotent: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let said = keywords(
            name,
            dependencies,
            priority,
            placement,
            share,
            memory,
            cost,
            size,
            timeout,
            retries,
            [input, output, inout, commute],
            [shards, array_library, idempotent],
        )?;
        let said = said.over(&self.said);
        Ok(self.like(py, self.function.clone_ref(py), said))
    }

    /// Registers the body below it for device sets.
    #[pyo3(signature = (placement, /, *, cost=None, shards=None, array_library=None))]
    fn variant<'py>(
        slf: Bound<'py, Self>,
        placement: &Bound<'py, PyAny>,
        cost: Option<&Bound<'py, PyAny>>,
        shards: Option<&Bound<'py, PyAny>>,
        array_library: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        if let Some(cost) = cost {
            Cost::read(cost)?;
        }
        if let Some(library) = array_library {
            Library::read(library)?;
        }
        let register = slf.getattr("_register")?;
        let said = (register, placement, cost, shards, array_library);
        support(py).variant_decorator.bind(py).call1(said)
    }

    /// What `variant` does with the body.
    fn _register(
        &self,
        py: Python<'_>,
        body: &Bound<'_, PyAny>,
        placement: &Bound<'_, PyAny>,
        cost: Option<&Bound<'_, PyAny>>,
        shards: Option<&Bound<'_, PyAny>>,
        library: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let function = self.function.bind(py);
        let table = self.table(py);
        table.register(function, body, placement, cost, shards, library)
    }

    /// Spawns one task for each element of `iterables`, taken in step as by `map`.
    #[pyo3(signature = (*iterables))]
    fn map(&self, py: Python<'_>, iterables: &Bound<'_, PyTuple>) -> PyResult<TaskList> {
        if matches!(self.said.target, Some(Target::Handle(_))) {
            return Err(PyTypeError::new_err("many tasks cannot have one handle"));
        }
        let table = Some(self.table(py));
        many(py, self.function.bind(py), &self.said, table, iterables)
    }

    fn __get__<'py>(
        slf: Bound<'py, Self>,
        instance: &Bound<'py, PyAny>,
        owner: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let this = slf.get();
        let function = this.function.bind(py);
        // As Python does with functions: what is a descriptor is bound, what is none stays.
        let bound = match function.getattr_opt("__get__")? {
            Some(get) => get.call1((instance, owner))?,
            None => return Ok(slf.into_any()),
        };
        if bound.is(function) {
            return Ok(slf.into_any());
        }
        let bound = this.like(py, bound.unbind(), this.said.clone());
        Ok(Bound::new(py, bound)?.into_any())
    }

    fn __getattr__<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        match name {
            "__name__" | "__qualname__" | "__annotations__" | "__signature__" | "__defaults__"
            | "__kwdefaults__" | "__type_params__" => self.function.bind(py).getattr(name),
            _ => Err(pyo3::exceptions::PyAttributeError::new_err(format!(
                "a task function has no attribute {name:?}; the function itself is its .fn"
            ))),
        }
    }

    #[classmethod]
    #[pyo3(signature = (item, /))]
    fn __class_getitem__(cls: Bound<'_, PyType>, item: Bound<'_, PyAny>) -> Py<PyType> {
        let _ = item;
        cls.unbind()
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!(
            "<task function {}>",
            self.function.bind(py).repr()?.to_string_lossy()
        ))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // CPython 3.11 makes the dictionary of an instance after it has shown the instance to the
        // collector, and that allocation may collect: then the fields are not written yet, but zero.
        // SAFETY: the field is one pointer, whatever it holds; the read is volatile because the
        // compiler takes a reference for never null.
        let function = unsafe {
            std::ptr::from_ref(&self.function)
                .cast::<*mut ffi::PyObject>()
                .read_volatile()
        };
        if function.is_null() {
            return Ok(());
        }
        visit.call(self.variants.get())?;
        self.said.traverse(&visit)?;
        visit.call(self.function.get())
    }

    #[allow(clippy::unused_self)]
    fn __clear__(&self) {
        // The function's own dictionary and cells are cleared by the collector.
    }
}

impl TaskFunction {
    /// Of a function of ours, which has a base body alone.
    pub fn plain<'py>(function: Bound<'py, PyAny>, said: Keywords) -> PyResult<Bound<'py, Self>> {
        let py = function.py();
        let made = Self {
            function: function.into(),
            said,
            variants: Bound::new(py, VariantTable::new())?.into(),
        };
        Bound::new(py, made)
    }
}

/// What `task(...)` with options gives: called with a function, it makes a task function.
#[pyclass(module = "charioteer._core", frozen)]
pub struct TaskDecorator(Keywords, bool);

#[pymethods]
impl TaskDecorator {
    #[pyo3(signature = (function, /))]
    fn __call__<'py>(&self, function: &Bound<'py, PyAny>) -> PyResult<Bound<'py, TaskFunction>> {
        make_task_function(function, self.0.clone(), self.1)
    }
}

fn make_task_function<'py>(
    function: &Bound<'py, PyAny>,
    said: Keywords,
    base: bool,
) -> PyResult<Bound<'py, TaskFunction>> {
    let py = function.py();
    if let Ok(earlier) = function.cast::<TaskFunction>() {
        if !base {
            return Err(PyTypeError::new_err(
                "base=False is for the function itself: this one is a task function already",
            ));
        }
        let earlier = earlier.get();
        let said = said.over(&earlier.said);
        let made = earlier.like(py, earlier.function.clone_ref(py), said);
        return named(Bound::new(py, made)?, earlier.function.bind(py));
    }
    // A static or class method is no callable of its own before it is bound.
    if !function.is_callable() && function.getattr_opt("__get__")?.is_none() {
        return Err(PyTypeError::new_err(format!(
            "a task function is made from a callable, not from {}",
            function.get_type().name()?
        )));
    }
    if let Some(placement) = &said.placement {
        check_shards(function, placement, said.shards.as_deref())?;
    }
    let table = if base {
        VariantTable::new()
    } else {
        VariantTable::without_base(function)?
    };
    let made = TaskFunction {
        function: function.clone().into(),
        said,
        variants: Bound::new(py, table)?.into(),
    };
    named(Bound::new(py, made)?, function)
}

/// `AccessError` if a function is for a set of devices and writes what each of them has whole.
fn check_shards(
    function: &Bound<'_, PyAny>,
    placement: &Placement,
    shards: Option<&Shards>,
) -> PyResult<()> {
    let py = function.py();
    let shards = match shards {
        Some(shards) => shards.as_tuple(py)?,
        None => PyTuple::empty(py),
    };
    let check = support(py).check_shards.bind(py);
    check.call1((function, placement.normal.bind(py), shards))?;
    Ok(())
}

/// Gives a task function what its class has as well, and would hide the function's.
fn named<'py>(
    made: Bound<'py, TaskFunction>,
    function: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, TaskFunction>> {
    for name in ["__doc__", "__module__"] {
        if let Some(value) = function.getattr_opt(name)? {
            made.setattr(name, value)?;
        }
    }
    Ok(made)
}

/// Makes a task function: calling it spawns.
#[pyfunction]
#[pyo3(signature = (
    function=None, /, *, name=None, dependencies=None, priority=None, placement=None, share=None,
    memory=None, cost=None, size=None, timeout=None, retries=None,
    input=None, output=None, inout=None, commute=None, shards=None,
    array_library=None, idempotent=None, base=true
))]
#[allow(clippy::too_many_arguments)]
pub fn task<'py>(
    py: Python<'py>,
    function: Option<&Bound<'py, PyAny>>,
    name: Option<&Bound<'py, PyAny>>,
    dependencies: Option<&Bound<'py, PyAny>>,
    priority: Option<&Bound<'py, PyAny>>,
    placement: Option<&Bound<'py, PyAny>>,
    share: Option<&Bound<'py, PyAny>>,
    memory: Option<&Bound<'py, PyAny>>,
    cost: Option<&Bound<'py, PyAny>>,
    size: Option<&Bound<'py, PyAny>>,
    timeout: Option<&Bound<'py, PyAny>>,
    retries: Option<&Bound<'py, PyAny>>,
    input: Option<&Bound<'py, PyAny>>,
    output: Option<&Bound<'py, PyAny>>,
    inout: Option<&Bound<'py, PyAny>>,
    commute: Option<&Bound<'py, PyAny>>,
    shards: Option<&Bound<'py, PyAny>>,
    array_library: Option<&Bound<'py, PyAny>>,
    idempotent: Option<&Bound<'py, PyAny>>,
    base: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let said = keywords(
        name,
        dependencies,
        priority,
        placement,
        share,
        memory,
        cost,
        size,
        timeout,
        retries,
        [input, output, inout, commute],
        [shards, array_library, idempotent],
    )?;
    if matches!(said.target, Some(Target::Handle(_))) {
        return Err(PyTypeError::new_err(
            "a task function can be called more than once: give the handle to .options()",
        ));
    }
    if !base && said.placement.is_some() {
        return Err(PyTypeError::new_err(
            "placement says where the base body runs, and base=False says that there is none: give it \
             to .options()",
        ));
    }
    let said = said.of_function();
    match function {
        None => Ok(Bound::new(py, TaskDecorator(said, base))?.into_any()),
        Some(function) => Ok(make_task_function(function, said, base)?.into_any()),
    }
}

/// Spawns one task an element.
fn many(
    py: Python<'_>,
    function: &Bound<'_, PyAny>,
    said: &Keywords,
    table: Option<&VariantTable>,
    iterables: &Bound<'_, PyTuple>,
) -> PyResult<TaskList> {
    let handles = many_handles(py, function, said, table, iterables)?;
    if GROUPS.load(Ordering::Relaxed) == 0 {
        return Ok(TaskList::of_handles(
            handles.into_iter().map(PyTask::of).collect(),
        ));
    }
    let objects = handles
        .into_iter()
        .map(|handle| {
            let object = Py::new(py, PyTask::of(handle))?;
            support(py).join_group.bind(py).call1((&object,))?;
            Ok(object)
        })
        .collect::<PyResult<Vec<_>>>()?;
    Ok(TaskList::of_objects(objects))
}

fn many_handles(
    py: Python<'_>,
    function: &Bound<'_, PyAny>,
    said: &Keywords,
    table: Option<&VariantTable>,
    iterables: &Bound<'_, PyTuple>,
) -> PyResult<Vec<Handle<Interp>>> {
    let mut handles = Vec::new();
    if iterables.is_empty() {
        return Err(PyTypeError::new_err("map needs at least one iterable"));
    }
    let recipe = Recipe::new(py, said, function, table)?;
    // What the function captures is bound once, by this call, whatever the iterables do meanwhile.
    let mut bound = recipe.prepare(function, table)?;
    let modes = bound.take_modes(function)?;
    let iterators = iterables
        .iter()
        .map(|iterable| iterable.try_iter())
        .collect::<PyResult<Vec<_>>>()?;
    let mut arguments = Vec::with_capacity(iterators.len());
    'elements: loop {
        arguments.clear();
        for iterator in &iterators {
            match iterator.clone().next() {
                Some(argument) => arguments.push(argument?),
                None => break 'elements,
            }
        }
        let options = recipe.options_of_each(py, said, function, table, &arguments)?;
        let bodies = bound.again(py)?;
        if said.data.is_none()
            && modes.is_none()
            && let [item] = &arguments[..]
        {
            // One element, no keywords: no tuple is needed.
            let active = runtime::active(py)?;
            let mut found = Vec::new();
            let held = hold(item, &mut found)?;
            let substitute = held.is_some();
            let item = held.unwrap_or_else(|| item.clone());
            found.extend(said.dependencies.iter().cloned());
            handles.extend(launch(
                py,
                &active.engine,
                bodies,
                Arguments::One(item.into()),
                substitute,
                options,
                &found,
                said,
                &recipe,
                &[],
            )?);
            continue;
        }
        let given = Some(Positional::Each(&arguments));
        let task = spawn_with(
            py, said, function, options, &recipe, bodies, &modes, given, None,
        )?;
        handles.extend(task);
    }
    Ok(handles)
}

/// Spawns `function(item)` for each item.
#[pyfunction]
#[pyo3(signature = (
    function, iterable, /, *, name=None, dependencies=None, priority=None, placement=None,
    share=None, memory=None, cost=None, size=None, timeout=None, retries=None,
    input=None, output=None, inout=None, commute=None, shards=None,
    array_library=None, idempotent=None
))]
#[allow(clippy::too_many_arguments)]
pub fn spawn_many(
    py: Python<'_>,
    function: &Bound<'_, PyAny>,
    iterable: &Bound<'_, PyAny>,
    name: Option<&Bound<'_, PyAny>>,
    dependencies: Option<&Bound<'_, PyAny>>,
    priority: Option<&Bound<'_, PyAny>>,
    placement: Option<&Bound<'_, PyAny>>,
    share: Option<&Bound<'_, PyAny>>,
    memory: Option<&Bound<'_, PyAny>>,
    cost: Option<&Bound<'_, PyAny>>,
    size: Option<&Bound<'_, PyAny>>,
    timeout: Option<&Bound<'_, PyAny>>,
    retries: Option<&Bound<'_, PyAny>>,
    input: Option<&Bound<'_, PyAny>>,
    output: Option<&Bound<'_, PyAny>>,
    inout: Option<&Bound<'_, PyAny>>,
    commute: Option<&Bound<'_, PyAny>>,
    shards: Option<&Bound<'_, PyAny>>,
    array_library: Option<&Bound<'_, PyAny>>,
    idempotent: Option<&Bound<'_, PyAny>>,
) -> PyResult<TaskList> {
    let said = keywords(
        name,
        dependencies,
        priority,
        placement,
        share,
        memory,
        cost,
        size,
        timeout,
        retries,
        [input, output, inout, commute],
        [shards, array_library, idempotent],
    )?;
    if matches!(said.target, Some(Target::Handle(_))) {
        return Err(PyTypeError::new_err("many tasks cannot have one handle"));
    }
    let iterables = PyTuple::new(py, [iterable])?;
    if let Ok(function) = function.cast::<TaskFunction>() {
        let function = function.get();
        let said = said.over(&function.said);
        let table = Some(function.table(py));
        return many(py, function.function.bind(py), &said, table, &iterables);
    }
    many(py, function, &said, None, &iterables)
}

/// Spawns `function(*arguments, **keywords)`; `raw` takes the function as it is, captured variables
/// and all.
#[pyfunction]
#[pyo3(signature = (function, arguments, keywords=None, raw=false))]
pub fn submit<'py>(
    py: Python<'py>,
    function: &Bound<'py, PyAny>,
    arguments: &Bound<'py, PyTuple>,
    keywords: Option<&Bound<'py, PyDict>>,
    raw: bool,
) -> PyResult<Bound<'py, PyAny>> {
    if let Ok(function) = function.cast::<TaskFunction>() {
        let function = function.get();
        let task = function.spawn(py, arguments, keywords)?;
        return handle_of(py, task, function.said.target.as_ref());
    }
    if is_coroutine(function) {
        let task = spawn_coroutine(py, &Keywords::default(), function)?;
        return handle_of(py, task, None);
    }
    let prepared = if raw {
        callable::prepare_raw(function)?
    } else {
        callable::prepare(function)?
    };
    let task = spawn_call(
        py,
        &Keywords::default(),
        function,
        None,
        &Recipe::default(),
        Bodies::One(prepared),
        Some(arguments),
        keywords,
    )?;
    handle_of(py, task, None)
}

/// Ends a task whose coroutine moved to the event loop's thread.
#[pyfunction]
#[pyo3(signature = (task, value, exception=None))]
pub fn finish_elsewhere(
    py: Python<'_>,
    task: &Bound<'_, PyTask>,
    value: Bound<'_, PyAny>,
    exception: Option<Bound<'_, PyAny>>,
) -> PyResult<()> {
    let task = task.get().task();
    let engine =
        Core::of(task).ok_or_else(|| PyRuntimeError::new_err("the runtime of the task is gone"))?;
    let result = match exception {
        None => Ok(value.into()),
        Some(exception) => Err(crate::interp::trouble(
            py,
            &engine,
            task,
            PyErr::from_value(exception),
        )),
    };
    engine.finish(task, result);
    Ok(())
}
