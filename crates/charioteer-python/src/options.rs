//! The options of a task, from keywords.

use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use charioteer::task::{Need, Options};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyString};

use crate::access::{self, Declared, Mode, Shards};
use crate::gateway::PyRef;
use crate::interp::Task;
use crate::local::Library;
use crate::placement::{Needs, Placement};
use crate::support::support;
use crate::task::{PyTask, tasks_in};
use crate::variants::{Cost, Size};

/// What a task is called, or which handle it is to be.
pub enum Target {
    Name(Box<str>),
    Handle(PyRef),
}

impl Clone for Target {
    fn clone(&self) -> Self {
        match self {
            Self::Name(name) => Self::Name(name.clone()),
            Self::Handle(handle) => {
                // SAFETY: options are only read and combined in calls from Python.
                let py = unsafe { Python::assume_attached() };
                Self::Handle(PyRef::new(handle.clone_ref(py)))
            }
        }
    }
}

impl Target {
    /// The task of a handle.
    pub fn task(handle: &PyRef) -> &Task {
        let object: &Py<PyAny> = handle.get();
        // SAFETY: only `target` makes handles, from objects of this class, and a `Py` is a
        // transparent pointer whatever its class; what is borrowed lives as long as the object.
        unsafe { &*std::ptr::from_ref(object).cast::<Py<PyTask>>() }
            .get()
            .task()
    }
}

/// Everything that keywords can say; what was not said is `None`.
#[derive(Clone, Default)]
pub struct Keywords {
    pub target: Option<Target>,
    pub dependencies: SmallVec<[Task; 2]>,
    pub priority: Option<i32>,
    pub placement: Option<Arc<Placement>>,
    /// The placement is all of the choice: it was said for calls, not for a function.
    pub restricted: bool,
    pub needs: Needs,
    pub cost: Option<Cost>,
    /// The cost is that of every body: it was said for calls, not for a function.
    pub restricted_cost: bool,
    pub size: Option<Size>,
    pub timeout: Option<Duration>,
    pub retries: Option<u32>,
    /// Accesses to data that is no parameter.
    pub data: Option<Arc<[Declared]>>,
    /// What each device of a set has of the regions.
    pub shards: Option<Arc<Shards>>,
    /// The shards are those of every body: they were said for calls, not for a function.
    pub restricted_shards: bool,
    /// Whose arrays the body gets on devices of a driver.
    pub library: Option<Library>,
    /// A second attempt may find what the first one wrote.
    pub idempotent: Option<bool>,
}

impl Keywords {
    /// These, and where they say nothing, `earlier`.
    pub fn over(self, earlier: &Self) -> Self {
        let mut dependencies = earlier.dependencies.clone();
        dependencies.extend(self.dependencies);
        Self {
            target: self.target.or_else(|| earlier.target.clone()),
            dependencies,
            priority: self.priority.or(earlier.priority),
            restricted: if self.placement.is_some() {
                self.restricted
            } else {
                earlier.restricted
            },
            placement: self.placement.or_else(|| earlier.placement.clone()),
            needs: Needs {
                memory: self.needs.memory.or(earlier.needs.memory),
                share: self.needs.share.or(earlier.needs.share),
            },
            restricted_cost: if self.cost.is_some() {
                self.restricted_cost
            } else {
                earlier.restricted_cost
            },
            cost: self.cost.or_else(|| earlier.cost.clone()),
            size: self.size.or_else(|| earlier.size.clone()),
            timeout: self.timeout.or(earlier.timeout),
            retries: self.retries.or(earlier.retries),
            data: match (&earlier.data, self.data) {
                (Some(earlier), Some(later)) => {
                    Some(earlier.iter().chain(&*later).cloned().collect())
                }
                (earlier, later) => later.or_else(|| earlier.clone()),
            },
            restricted_shards: if self.shards.is_some() {
                self.restricted_shards
            } else {
                earlier.restricted_shards
            },
            shards: self.shards.or_else(|| earlier.shards.clone()),
            library: self.library.or(earlier.library),
            idempotent: self.idempotent.or(earlier.idempotent),
        }
    }

    /// Whether nothing was said of how the task is to be run.
    pub fn is_plain(&self) -> bool {
        self.priority.is_none()
            && self.placement.is_none()
            && self.needs == Needs::default()
            && self.timeout.is_none()
            && self.retries.is_none()
    }

    /// The same as the keywords of a function, whose variants add to its placement and cost.
    pub fn of_function(self) -> Self {
        Self {
            restricted: false,
            restricted_cost: false,
            restricted_shards: false,
            ..self
        }
    }

    /// Shows the callables in them to the collector.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Some(cost) = &self.cost {
            cost.traverse(visit)?;
        }
        if let Some(size) = &self.size {
            size.traverse(visit)?;
        }
        Ok(())
    }

    /// Whether the body may get several cores.
    pub fn may_be_wide(options: Option<&Options>) -> bool {
        options.is_some_and(|options| match &options.mapping {
            Some(mapping) => mapping.choices().may_be_wide(),
            None => match &options.devices {
                Some(sets) => sets.iter().any(|set| set.cores() > 1),
                None => matches!(options.need, Need::Cores(_)),
            },
        })
    }
}

/// Reads the keywords that `task`, `spawn`, `options` and their like share.
#[allow(clippy::too_many_arguments)]
pub fn keywords(
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
    data: [Option<&Bound<'_, PyAny>>; 4],
    [shards, library, idempotent]: [Option<&Bound<'_, PyAny>>; 3],
) -> PyResult<Keywords> {
    let mut keywords = Keywords::default();
    if data.iter().any(Option::is_some) {
        let modes = [Mode::In, Mode::Out, Mode::InOut, Mode::Commute];
        let mut declared = Vec::new();
        for (mode, regions) in modes.into_iter().zip(data) {
            if let Some(regions) = regions {
                access::declare(mode, regions, &mut declared)?;
            }
        }
        keywords.data = Some(declared.into());
    }
    if let Some(name) = name {
        keywords.target = Some(target(name)?);
    }
    if let Some(dependencies) = dependencies {
        tasks_in(dependencies, &mut keywords.dependencies)?;
    }
    if let Some(priority) = priority {
        keywords.priority = Some(
            integer(priority, "priority")?
                .try_into()
                .map_err(|_| PyValueError::new_err("priority is a number of 32 bits"))?,
        );
    }
    if let Some(placement) = placement {
        keywords.placement = Some(Placement::read(placement)?);
        keywords.restricted = true;
    }
    if let Some(cost) = cost {
        keywords.cost = Some(Cost::read(cost)?);
        keywords.restricted_cost = true;
    }
    if let Some(size) = size {
        keywords.size = Some(Size::read(size)?);
    }
    if let Some(share) = share {
        let share: f64 = share
            .extract()
            .map_err(|_| not_a("share", "a number", share))?;
        if !(0.0..=1.0).contains(&share) {
            return Err(PyValueError::new_err(format!(
                "share is a part of a core, between 0 and 1, not {share}"
            )));
        }
        keywords.needs.share = Some(share);
    }
    if let Some(memory) = memory {
        let read = support(memory.py()).read_memory.bind(memory.py());
        keywords.needs.memory = Some(read.call1((memory,))?.extract()?);
    }
    if let Some(timeout) = timeout {
        let seconds: f64 = timeout
            .extract()
            .map_err(|_| not_a("timeout", "a number of seconds", timeout))?;
        if seconds.is_nan() || seconds <= 0.0 {
            return Err(PyValueError::new_err(format!(
                "timeout is a positive number of seconds, not {seconds}"
            )));
        }
        keywords.timeout = Duration::try_from_secs_f64(seconds).ok();
    }
    if let Some(shards) = shards {
        keywords.shards = Some(Arc::new(Shards::read(shards)?));
        keywords.restricted_shards = true;
    }
    if let Some(library) = library {
        keywords.library = Some(Library::read(library)?);
    }
    if let Some(idempotent) = idempotent {
        let said = idempotent.cast::<PyBool>();
        let said = said.map_err(|_| not_a("idempotent", "True or False", idempotent))?;
        keywords.idempotent = Some(said.is_true());
    }
    if let Some(retries) = retries {
        keywords.retries = Some(
            integer(retries, "retries")?
                .try_into()
                .map_err(|_| PyValueError::new_err("retries is a number that is not negative"))?,
        );
    }
    Ok(keywords)
}

fn not_a(what: &str, wanted: &str, given: &Bound<'_, PyAny>) -> PyErr {
    let name = given.get_type().name().map_or_else(
        |_| "an object".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    );
    PyTypeError::new_err(format!("{what} is {wanted}, not {name}"))
}

fn integer(value: &Bound<'_, PyAny>, what: &str) -> PyResult<i64> {
    if value.is_instance_of::<PyBool>() {
        return Err(not_a(what, "an integer", value));
    }
    if value.is_instance_of::<pyo3::types::PyInt>() {
        return value
            .extract()
            .map_err(|_| PyValueError::new_err(format!("{what} is out of range")));
    }
    value
        .extract()
        .map_err(|_| not_a(what, "an integer", value))
}

/// A name, or a handle that is to become the task.
pub fn target(name: &Bound<'_, PyAny>) -> PyResult<Target> {
    if let Ok(task) = name.cast::<PyTask>() {
        return Ok(Target::Handle(task.clone().into()));
    }
    if let Ok(name) = name.cast::<PyString>() {
        return Ok(Target::Name(name.to_string_lossy().into()));
    }
    Err(not_a(
        "a task's name",
        "a string or a handle such as T[i]",
        name,
    ))
}
