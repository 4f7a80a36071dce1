//! Which bodies a call may run, and what is known of it beforehand: its size and what it costs.
//!
//! A task function has a [`VariantTable`], shared by all that `.options()` and binding made of it, so
//! that a variant that is registered later serves them too. Which of its bodies serves what, Python says
//! (`charioteer/_variants.py`). A call gets a [`Recipe`] before its arguments are looked at. Where that
//! leaves something to choose, size and costs are found out, and all bodies that may be chosen are made
//! ready: captured variables are bound, and arguments of native bodies converted. When the task is
//! mapped, [`Several`] runs the one that was chosen.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use charioteer::engine::Running;
use charioteer::mapping::Mapping;
use charioteer::task::{Need, Options, Step};
use pyo3::exceptions::PyValueError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{
    PyBool, PyByteArray, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple,
};
use smallvec::SmallVec;

use crate::access::{self, Shards};
use crate::attached::Attached;
use crate::callable::{self, Callable, Modes, Prepared};
use crate::data::Region;
use crate::gateway::PyRef;
use crate::interp::{Body, Interp, trouble};
use crate::local::{Deferral, Library};
use crate::options::Keywords;
use crate::placement::{BASE, Key, OPEN, Plan, Plans, Way, body_of};
use crate::runtime;
use crate::support::{error, support};

/// What was said of a call: a number, or a callable of the call's arguments that gives one.
pub enum Said<T> {
    Fixed(T),
    Call(PyRef),
}

impl<T: Copy> Clone for Said<T> {
    fn clone(&self) -> Self {
        match self {
            Self::Fixed(value) => Self::Fixed(*value),
            Self::Call(callable) => {
                // SAFETY: keywords are only read and combined in calls from Python.
                let py = unsafe { Python::assume_attached() };
                Self::Call(PyRef::new(callable.clone_ref(py)))
            }
        }
    }
}

impl<T> Said<T> {
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self {
            Self::Fixed(_) => Ok(()),
            Self::Call(callable) => visit.call(callable.get()),
        }
    }
}

/// The run time of a call.
pub type Cost = Said<Duration>;
/// What run times are told apart by.
pub type Size = Said<u64>;

impl Cost {
    /// `TypeError` or `ValueError` if it is neither a time nor a callable.
    pub fn read(said: &Bound<'_, PyAny>) -> PyResult<Self> {
        if said.is_callable() {
            return Ok(Self::Call(said.clone().into()));
        }
        seconds(said).map(Self::Fixed)
    }
}

impl Size {
    /// `TypeError` or `ValueError` if it is neither a number nor a callable.
    pub fn read(said: &Bound<'_, PyAny>) -> PyResult<Self> {
        if said.is_callable() {
            return Ok(Self::Call(said.clone().into()));
        }
        number(said).map(Self::Fixed)
    }
}

fn seconds(said: &Bound<'_, PyAny>) -> PyResult<Duration> {
    if let Ok(seconds) = said.cast_exact::<PyFloat>()
        && let Ok(time) = Duration::try_from_secs_f64(seconds.value())
    {
        return Ok(time);
    }
    let read = support(said.py()).read_cost.bind(said.py());
    let seconds: f64 = read.call1((said,))?.extract()?;
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| PyValueError::new_err(format!("cost is too long a time: {seconds} s")))
}

fn number(said: &Bound<'_, PyAny>) -> PyResult<u64> {
    let whole = !said.is_instance_of::<PyBool>() && said.is_instance_of::<PyInt>();
    if whole && let Ok(size) = said.extract() {
        return Ok(size);
    }
    let read = support(said.py()).read_size.bind(said.py());
    read.call1((said,))?.extract()
}

/// The variants of a task function.
#[pyclass(module = "charioteer._core", frozen)]
pub struct VariantTable {
    /// Whether the function has any, or no base body.
    special: AtomicBool,
    state: Attached<State>,
}

/// What is known of a variant.
struct Registered {
    body: PyRef,
    cost: Option<Cost>,
    shards: Arc<Shards>,
    library: Option<Library>,
}

#[derive(Default)]
struct State {
    /// What says which body serves what: an object of `charioteer/_variants.py`.
    matcher: Option<PyRef>,
    /// The variants, in the order of their numbers.
    registered: Vec<Registered>,
    /// What the function is called in the models of run times.
    name: Option<&'static str>,
    plans: Plans,
}

impl VariantTable {
    /// Of a function that has a base body alone.
    pub fn new() -> Self {
        Self {
            special: AtomicBool::new(false),
            state: Attached::new(State::default()),
        }
    }

    /// Of a function without a base body.
    pub fn without_base(function: &Bound<'_, PyAny>) -> PyResult<Self> {
        let table = Self::new();
        table.matcher(function, false)?;
        table.special.store(true, Ordering::Release);
        Ok(table)
    }

    fn matcher<'py>(
        &self,
        function: &Bound<'py, PyAny>,
        base: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = function.py();
        let made = support(py).variants.bind(py).call1((function, base))?;
        let kept: PyRef = made.clone().into();
        // Another thread may have been first.
        let (first, spare) = {
            let mut state = self.state.lock(py);
            match &state.matcher {
                Some(first) => (Some(first.as_ptr()), Some(kept)),
                None => (state.matcher.replace(kept).map(|_| unreachable!()), None),
            }
        };
        drop(spare);
        // SAFETY: attached; the matcher is kept as long as the table.
        Ok(first.map_or(made, |first| unsafe { Bound::from_borrowed_ptr(py, first) }))
    }

    fn name(&self, function: &Bound<'_, PyAny>) -> PyResult<&'static str> {
        let py = function.py();
        if let Some(name) = self.state.lock(py).name {
            return Ok(name);
        }
        let name = callable::model_name(function)?;
        self.state.lock(py).name = Some(name);
        Ok(name)
    }

    /// Registers a body; see `charioteer/_variants.py` for what it raises.
    pub fn register(
        &self,
        function: &Bound<'_, PyAny>,
        body: &Bound<'_, PyAny>,
        placement: &Bound<'_, PyAny>,
        cost: Option<&Bound<'_, PyAny>>,
        shards: Option<&Bound<'_, PyAny>>,
        library: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let py = body.py();
        let matcher = self.matcher(function, true)?;
        let all = matcher.call_method1("add", (body, placement, cost, shards, library))?;
        let mut all = all
            .try_iter()?
            .map(|variant| {
                let variant = variant?;
                let cost = variant.getattr("cost")?;
                let cost = (!cost.is_none()).then(|| Cost::read(&cost)).transpose()?;
                let library = variant.getattr("library")?;
                let library = (!library.is_none()).then(|| Library::read(&library));
                Ok(Registered {
                    body: variant.getattr("body")?.into(),
                    cost,
                    shards: Arc::new(Shards::of(&variant.getattr("shards")?)?),
                    library: library.transpose()?,
                })
            })
            .collect::<PyResult<Vec<_>>>()?;
        let forgotten = {
            let mut state = self.state.lock(py);
            // Another thread may have registered more, and come first.
            if state.registered.len() < all.len() {
                std::mem::swap(&mut state.registered, &mut all);
            }
            std::mem::take(&mut state.plans)
        };
        drop((all, forgotten));
        self.special.store(true, Ordering::Release);
        Ok(())
    }

    fn is_special(&self) -> bool {
        self.special.load(Ordering::Acquire)
    }
}

#[pymethods]
impl VariantTable {
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Some(state) = self.state.try_lock() {
            if let Some(matcher) = &state.matcher {
                visit.call(matcher.get())?;
            }
            for variant in &state.registered {
                visit.call(variant.body.get())?;
                if let Some(cost) = &variant.cost {
                    cost.traverse(&visit)?;
                }
            }
        }
        Ok(())
    }

    #[allow(clippy::unused_self)]
    fn __clear__(&self) {
        // The matcher's own dictionary is cleared by the collector.
    }
}

/// How the calls of a function with these keywords run: all that does not depend on their arguments.
#[derive(Default)]
pub struct Recipe {
    options: Option<Box<Options>>,
    plan: Option<Arc<Plan>>,
    /// What is known of tasks that may run on devices.
    deferral: Option<Deferral>,
    /// Whose arrays each of the plan's bodies gets.
    libraries: SmallVec<[Option<Library>; 2]>,
}

impl Recipe {
    /// `PlacementError` if nothing of it can ever be served.
    pub fn new(
        py: Python<'_>,
        said: &Keywords,
        function: &Bound<'_, PyAny>,
        table: Option<&VariantTable>,
    ) -> PyResult<Self> {
        let special = table.filter(|table| table.is_special());
        if special.is_none() && said.is_plain() {
            return Ok(Self {
                options: None,
                plan: None,
                deferral: None,
                libraries: SmallVec::new(),
            });
        }
        let plan = Self::plan(py, said, function, table, special)?;
        let mut options = Options {
            priority: said.priority.unwrap_or(0),
            retries: said.retries.unwrap_or(0),
            timeout: said.timeout,
            ..Options::DEFAULT
        };
        if let Some(plan) = &plan {
            match &plan.way {
                Way::Cores(need, counts) => {
                    options.need = *need;
                    options.alternatives.clone_from(counts);
                }
                Way::Devices(sets) => {
                    options.need = Need::Devices;
                    options.devices = Some(Arc::clone(sets));
                }
                Way::Mapped(_) => options.need = Need::Mapped,
            }
        }
        let (deferral, libraries) = match plan.as_ref().filter(|plan| plan.width > 0) {
            None => (None, SmallVec::new()),
            Some(plan) => {
                let deferral = Deferral {
                    width: plan.width,
                    shards: Self::shards(py, said, function, table, plan)?,
                    gathers: plan.gathers(),
                    library: said.library,
                };
                let library = |body: &i32| {
                    let state = table?.state.lock(py);
                    state.registered.get(usize::try_from(*body).ok()?)?.library
                };
                let each = plan.bodies.iter();
                let each = each.map(|body| library(body).or(said.library));
                (Some(deferral), each.collect())
            }
        };
        Ok(Self {
            options: (options != Options::DEFAULT).then(|| Box::new(options)),
            plan,
            deferral,
            libraries,
        })
    }

    /// What each member of a set has of the regions. `AccessError` if bodies that may serve do not agree.
    fn shards(
        py: Python<'_>,
        said: &Keywords,
        function: &Bound<'_, PyAny>,
        table: Option<&VariantTable>,
        plan: &Plan,
    ) -> PyResult<Option<Arc<Shards>>> {
        if said.restricted_shards {
            return Ok(said.shards.clone());
        }
        let mut found: Option<Option<Arc<Shards>>> = None;
        for at in &plan.wide {
            let own = match usize::try_from(plan.bodies[*at]) {
                Err(_) => said.shards.clone(),
                Ok(number) => {
                    let state = table.expect("who has variants has a table").state.lock(py);
                    let shards = &state.registered[number].shards;
                    (!shards.is_empty()).then(|| Arc::clone(shards))
                }
            };
            let agrees = match (&found, &own) {
                (None, _) | (Some(None), None) => true,
                (Some(Some(known)), Some(own)) => known.same(own),
                _ => false,
            };
            if !agrees {
                let why = format!(
                    "{}: bodies that may serve this call split its regions in different ways: say the \
                     placement, or shards=, at the call",
                    callable::name(function)?
                );
                return Err(error(py, "AccessError", (why,)));
            }
            found = Some(own);
        }
        Ok(found.flatten())
    }

    /// What is known of a task that may run on devices; `None` of all others.
    #[inline]
    pub fn deferral(&self) -> Option<&Deferral> {
        self.deferral.as_ref()
    }

    /// Whose arrays a body gets, by its place among those that may serve.
    pub fn library(&self, body: usize) -> Option<Library> {
        self.libraries.get(body).copied().flatten()
    }

    /// Whether a body, by its place among those that may serve, may run on devices.
    pub fn on_devices(&self, body: usize) -> bool {
        self.plan.as_ref().is_some_and(|plan| plan.on_devices(body))
    }

    fn plan(
        py: Python<'_>,
        said: &Keywords,
        function: &Bound<'_, PyAny>,
        table: Option<&VariantTable>,
        special: Option<&VariantTable>,
    ) -> PyResult<Option<Arc<Plan>>> {
        let active = runtime::active(py)?;
        let engine = &active.engine;
        let name = || match table {
            Some(table) => table.name(function),
            None => callable::model_name(function),
        };
        let Some(table) = special else {
            return match &said.placement {
                Some(placement) => placement.plan(py, engine, said.needs, name).map(Some),
                None if said.needs == crate::placement::Needs::default() => Ok(None),
                None => Plan::resolve(py, engine, None, said.needs, None, true, "").map(Some),
            };
        };
        let key = Key {
            engine: charioteer::engine::Engine::<Interp>::id(engine),
            needs: said.needs,
            placement: said.placement.clone(),
            rest: usize::from(said.restricted),
        };
        let (known, registered) = {
            let state = table.state.lock(py);
            (state.plans.get(&key), state.registered.len())
        };
        if known.is_some() {
            return Ok(known);
        }
        let matcher = {
            let state = table.state.lock(py);
            state.matcher.as_ref().map(PyRef::as_ptr)
        };
        let matcher = matcher.expect("a function with variants has a matcher");
        // SAFETY: attached; it is kept as long as the table.
        let matcher = PyRef::from(unsafe { Bound::from_borrowed_ptr(py, matcher) });
        let plan = Plan::resolve(
            py,
            engine,
            said.placement.as_ref(),
            said.needs,
            Some((&matcher, registered)),
            said.restricted,
            table.name(function)?,
        )?;
        let forgotten = {
            let mut state = table.state.lock(py);
            // A variant that was registered meanwhile is for the next call.
            if state.registered.len() == registered {
                state.plans.put(key, Arc::clone(&plan))
            } else {
                Vec::new()
            }
        };
        drop(forgotten);
        Ok(Some(plan))
    }

    /// The options of the only call.
    pub fn options(
        &mut self,
        py: Python<'_>,
        said: &Keywords,
        function: &Bound<'_, PyAny>,
        table: Option<&VariantTable>,
        arguments: &Given<'_, '_>,
    ) -> PyResult<Option<Box<Options>>> {
        let options = self.options.take();
        self.complete(options, py, said, function, table, arguments)
    }

    /// Adds to the options what depends on a call's arguments.
    fn complete(
        &self,
        mut options: Option<Box<Options>>,
        py: Python<'_>,
        said: &Keywords,
        function: &Bound<'_, PyAny>,
        table: Option<&VariantTable>,
        arguments: &Given<'_, '_>,
    ) -> PyResult<Option<Box<Options>>> {
        if let (Some(options), Some(plan)) = (&mut options, &self.plan)
            && let Way::Mapped(choices) = &plan.way
        {
            // A run time that is known beforehand is reckoned with; nobody is asked for one here.
            let is_told = || {
                let cost = declared(py, said, table, plan.bodies[0]);
                matches!(cost, Some(Said::Fixed(_)))
            };
            if let (Some(set), None) = (&plan.without_data, &said.data)
                && !arguments.have_data()
                && !is_told()
            {
                options.need = Need::Devices;
                options.devices = Some(Arc::clone(set));
                return Ok(Some(std::mem::take(options)));
            }
            let size = match &said.size {
                None => arguments.footprint()?,
                Some(Said::Fixed(size)) => *size,
                Some(Said::Call(callable)) => {
                    number(&arguments.call(function, callable.bind(py), "size")?)
                        .map_err(|error| noted(py, error, "size", function))?
                }
            };
            let mut mapping = Mapping::new(Arc::clone(choices), size);
            let costs = self.costs(py, said, function, table, plan, arguments)?;
            if costs.iter().any(Option::is_some) {
                let each = choices.list().iter();
                let each = each.map(|choice| costs[body_of(choice.variant)]);
                mapping = mapping.with_costs(each.collect());
            }
            options.mapping = Some(Box::new(mapping));
        }
        Ok(options)
    }

    /// The options of one of several calls, with these arguments, which need no tuple if nothing depends on
    /// them.
    pub fn options_of_each(
        &self,
        py: Python<'_>,
        said: &Keywords,
        function: &Bound<'_, PyAny>,
        table: Option<&VariantTable>,
        arguments: &[Bound<'_, PyAny>],
    ) -> PyResult<Option<Box<Options>>> {
        let mapped = |plan: &Arc<Plan>| matches!(plan.way, Way::Mapped(_));
        if !self.plan.as_ref().is_some_and(mapped) {
            return Ok(self.options.clone());
        }
        let positional = PyTuple::new(py, arguments)?;
        let given = Given {
            positional: Some(&positional),
            keyword: None,
        };
        self.complete(self.options.clone(), py, said, function, table, &given)
    }

    /// Whether another body than the base may run.
    pub fn has_variants(&self) -> bool {
        self.plan
            .as_ref()
            .is_some_and(|plan| *plan.bodies != [BASE])
    }

    /// What each of the plan's bodies costs, where that is known.
    fn costs(
        &self,
        py: Python<'_>,
        said: &Keywords,
        function: &Bound<'_, PyAny>,
        table: Option<&VariantTable>,
        plan: &Plan,
        arguments: &Given<'_, '_>,
    ) -> PyResult<SmallVec<[Option<Duration>; 4]>> {
        plan.bodies
            .iter()
            .map(|&body| match declared(py, said, table, body) {
                None => Ok(None),
                Some(Said::Fixed(cost)) => Ok(Some(cost)),
                Some(Said::Call(callable)) => {
                    seconds(&arguments.call(function, callable.bind(py), "cost")?)
                        .map(Some)
                        .map_err(|error| noted(py, error, "cost", function))
                }
            })
            .collect()
    }

    /// The bodies that may run, made ready.
    pub fn prepare(
        &self,
        function: &Bound<'_, PyAny>,
        table: Option<&VariantTable>,
    ) -> PyResult<Bodies> {
        let py = function.py();
        let Some(plan) = self.plan.as_ref().filter(|_| self.has_variants()) else {
            return callable::prepare(function).map(Bodies::One);
        };
        let table = table.expect("who has variants has a table of them");
        let mut bodies: SmallVec<[Prepared; 2]> = SmallVec::new();
        for body in &plan.bodies {
            let Ok(number) = usize::try_from(*body) else {
                bodies.push(callable::prepare(function)?);
                continue;
            };
            let body = {
                let state = table.state.lock(py);
                state.registered[number].body.as_ptr()
            };
            // SAFETY: attached; what is registered is kept as long as the table.
            let body = unsafe { Bound::from_borrowed_ptr(py, body) };
            bodies.push(callable::prepare(&callable::bind_like(function, body)?)?);
        }
        let (name, modes) = (callable::name(function)?, callable::modes(function)?);
        for body in &mut bodies {
            body.name = name;
            // Those of the function, whichever body runs.
            body.modes.clone_from(&modes);
        }
        if bodies.len() == 1 {
            return Ok(Bodies::One(bodies.pop().expect("there is one")));
        }
        let Way::Mapped(choices) = &plan.way else {
            unreachable!("what leaves nothing to choose has one body");
        };
        let open = choices
            .list()
            .iter()
            .any(|choice| choice.variant & OPEN != 0);
        let matcher = if open {
            let state = table.state.lock(py);
            state.matcher.as_ref().map(PyRef::as_ptr)
        } else {
            None
        };
        Ok(Bodies::Several(Candidates {
            bodies,
            plan: Arc::clone(plan),
            // SAFETY: as above.
            matcher: matcher.map(|matcher| unsafe { Bound::from_borrowed_ptr(py, matcher) }.into()),
        }))
    }
}

/// What was declared of the run time of a body.
fn declared(
    py: Python<'_>,
    said: &Keywords,
    table: Option<&VariantTable>,
    body: i32,
) -> Option<Cost> {
    if said.restricted_cost || body == BASE {
        return said.cost.clone();
    }
    let own = table.and_then(|table| {
        let state = table.state.lock(py);
        let number = usize::try_from(body).ok()?;
        state.registered.get(number)?.cost.clone()
    });
    own.or_else(|| said.cost.clone())
}

/// An exception of what a user said, with a note of where it came from.
fn noted(py: Python<'_>, error: PyErr, what: &str, function: &Bound<'_, PyAny>) -> PyErr {
    let name = callable::name(function).unwrap_or("a task");
    let note = format!("In {what}= of {name}.");
    // What refuses notes is raised without one.
    let _ = error.value(py).call_method1("add_note", (note,));
    error
}

/// The arguments of a call, as they were given.
pub struct Given<'a, 'py> {
    pub positional: Option<&'a Bound<'py, PyTuple>>,
    pub keyword: Option<&'a Bound<'py, PyDict>>,
}

impl<'py> Given<'_, 'py> {
    /// Calls what was said of a call with its arguments; those of a method begin with its object.
    fn call(
        &self,
        function: &Bound<'py, PyAny>,
        callable: &Bound<'py, PyAny>,
        what: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = callable.py();
        let positional = self
            .positional
            .cloned()
            .unwrap_or_else(|| PyTuple::empty(py));
        let positional = match callable::receiver(function)? {
            None => positional,
            Some(receiver) => {
                let all = std::iter::once(receiver).chain(positional.iter());
                PyTuple::new(py, all.collect::<Vec<_>>())?
            }
        };
        callable
            .call(positional, self.keyword)
            .map_err(|error| noted(py, error, what, function))
    }

    /// Whether one of the arguments is managed, or one of what it lists.
    fn have_data(&self) -> bool {
        let positional = self.positional.iter().flat_map(|it| it.iter());
        let keyword = self.keyword.iter().flat_map(|it| it.values());
        positional.chain(keyword).any(|it| access::is_data(&it))
    }

    /// The bytes of the arrays among the arguments, also one level deep. Handles count for nothing,
    /// whether their results are there or not.
    fn footprint(&self) -> PyResult<u64> {
        let mut bytes = 0_u64;
        let mut add = |argument: &Bound<'_, PyAny>| -> PyResult<()> {
            bytes = bytes.saturating_add(nested_bytes(argument)?);
            Ok(())
        };
        if let Some(positional) = self.positional {
            for argument in positional.iter_borrowed() {
                add(&argument)?;
            }
        }
        if let Some(keyword) = self.keyword {
            for (_, argument) in keyword.iter() {
                add(&argument)?;
            }
        }
        Ok(bytes)
    }
}

fn nested_bytes(argument: &Bound<'_, PyAny>) -> PyResult<u64> {
    let mut bytes = 0_u64;
    if let Ok(list) = argument.cast_exact::<PyList>() {
        for thing in list {
            bytes = bytes.saturating_add(bytes_of(&thing)?);
        }
    } else if let Ok(tuple) = argument.cast_exact::<PyTuple>() {
        for thing in tuple.iter_borrowed() {
            bytes = bytes.saturating_add(bytes_of(&thing)?);
        }
    } else if let Ok(dict) = argument.cast_exact::<PyDict>() {
        for (_, thing) in dict.copy()? {
            bytes = bytes.saturating_add(bytes_of(&thing)?);
        }
    } else {
        bytes = bytes_of(argument)?;
    }
    Ok(bytes)
}

/// The bytes of an array; zero of anything else.
fn bytes_of(thing: &Bound<'_, PyAny>) -> PyResult<u64> {
    if thing.is_exact_instance_of::<PyFloat>()
        || thing.is_exact_instance_of::<PyInt>()
        || thing.is_exact_instance_of::<PyString>()
    {
        return Ok(0);
    }
    if let Ok(region) = thing.cast::<Region>() {
        return Ok(region.get().nbytes() as u64);
    }
    if let Ok(bytes) = thing.cast::<PyBytes>() {
        return Ok(bytes.as_bytes().len() as u64);
    }
    if let Ok(bytes) = thing.cast::<PyByteArray>() {
        return Ok(bytes.len() as u64);
    }
    let bytes = thing.getattr_opt(pyo3::intern!(thing.py(), "nbytes"))?;
    Ok(bytes.and_then(|bytes| bytes.extract().ok()).unwrap_or(0))
}

/// What a call may run.
pub enum Bodies {
    One(Prepared),
    Several(Candidates),
}

impl Bodies {
    /// The same for another task, without the modes, which are those of the first one.
    pub fn again(&self, py: Python<'_>) -> PyResult<Self> {
        Ok(match self {
            Self::One(prepared) => Self::One(prepared.again(py)?),
            Self::Several(candidates) => Self::Several(Candidates {
                bodies: candidates
                    .bodies
                    .iter()
                    .map(|prepared| prepared.again(py))
                    .collect::<PyResult<_>>()?,
                plan: Arc::clone(&candidates.plan),
                matcher: candidates
                    .matcher
                    .as_ref()
                    .map(|matcher| PyRef::new(matcher.clone_ref(py))),
            }),
        })
    }

    /// What the task is called.
    #[inline]
    pub fn name(&self) -> &'static str {
        match self {
            Self::One(prepared) => prepared.name,
            Self::Several(candidates) => candidates.bodies[0].name,
        }
    }

    /// Takes the modes of the parameters: those of the function itself, whichever body runs.
    #[inline]
    pub fn take_modes(&mut self, function: &Bound<'_, PyAny>) -> PyResult<Modes> {
        match self {
            Self::One(prepared) => Ok(prepared.modes.take()),
            Self::Several(_) => callable::modes(function),
        }
    }

    /// `TypeError` for a native body that takes arguments: it has no defaults.
    pub fn check_inline(&self) -> PyResult<()> {
        let all = match self {
            Self::One(prepared) => std::slice::from_ref(prepared),
            Self::Several(candidates) => &candidates.bodies,
        };
        for prepared in all {
            match &prepared.callable {
                Callable::Native(callee) => callee.check_inline()?,
                Callable::Kernel(launch) => launch.check_inline()?,
                Callable::Python(..) => {}
            }
        }
        Ok(())
    }
}

/// The bodies of a plan.
pub struct Candidates {
    /// In the order of the plan's.
    pub bodies: SmallVec<[Prepared; 2]>,
    pub plan: Arc<Plan>,
    /// What chooses where that depends on the devices.
    pub matcher: Option<PyRef>,
}

/// Bodies of which one runs: the one of the choice that the task was mapped to.
pub struct Several {
    pub bodies: SmallVec<[Body; 2]>,
    pub plan: Arc<Plan>,
    pub matcher: Option<PyRef>,
    /// The one that runs, once it has begun.
    pub running: Option<usize>,
}

impl Several {
    pub fn needs_session(&self) -> bool {
        self.matcher.is_some() || self.bodies.iter().any(Body::needs_session)
    }

    pub fn has_begun(&self) -> bool {
        self.running.is_some_and(|at| self.bodies[at].has_begun())
    }

    /// The body to run or to resume.
    pub fn body(&mut self, running: &Running<'_, Interp>) -> Result<&mut Body, Step<Interp>> {
        if !self.has_begun() {
            match self.choose(running) {
                Ok((at, gathers)) => {
                    self.running = Some(at);
                    if let Body::Python(body) = &mut self.bodies[at]
                        && let Some(data) = &mut body.data
                    {
                        data.gathers = gathers;
                    }
                }
                Err(error) => {
                    // SAFETY: only Python chooses with an error, and it was attached for that.
                    let py = unsafe { Python::assume_attached() };
                    return Err(Step::Done(Err(trouble(
                        py,
                        running.engine,
                        running.task,
                        error,
                    ))));
                }
            }
        }
        let at = self.running.expect("just chosen");
        Ok(&mut self.bodies[at])
    }

    /// The body that serves, and whether it is for a set, if that depended on the devices.
    fn choose(&self, running: &Running<'_, Interp>) -> PyResult<(usize, Option<bool>)> {
        let Way::Mapped(choices) = &self.plan.way else {
            unreachable!("several bodies have several choices");
        };
        let choice = running.choice().expect("a task that runs was mapped");
        let variant = choices.list()[choice].variant;
        let at = body_of(variant);
        let Some(matcher) = self.matcher.as_ref().filter(|_| variant & OPEN != 0) else {
            return Ok((at, None));
        };
        // SAFETY: a body with a matcher runs in a session.
        let py = unsafe { Python::assume_attached() };
        let held = runtime::held(running.engine);
        let (number, gathers): (i32, Option<bool>) = matcher
            .bind(py)
            .call_method1("serving_held", (held, self.plan.variants))?
            .extract()?;
        let at = self.plan.bodies.iter().position(|body| *body == number);
        let at = at.expect("a plan has a choice for each body that may serve");
        Ok((at, gathers))
    }
}
