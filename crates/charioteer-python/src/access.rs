//! Accesses: what a call reads and writes, from the modes of its function's parameters and from options.
//!
//! The modes of a function are read once a code object ([`crate::callable`]) into a [`Signature`]; a call
//! whose function has none pays one check. [`bind`] walks the arguments of a call: a region at a parameter
//! with a mode becomes an access, which is registered with the core, and its NumPy view takes its place
//! among the arguments, read-only for accesses that only read. So the body finds arrays, and nothing is
//! left to do when it runs.
//!
//! Cores share one memory: a set of cores gets the array itself, as one core does.

use std::sync::Arc;

use charioteer::data;
pub use charioteer::data::Mode;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple};
use smallvec::SmallVec;

use crate::callable;
use crate::data::{Region, Token};
use crate::gateway::PyRef;
use crate::interp::{Held, Interp};
use crate::reduce::{BodyData, OPERATIONS};
use crate::support::{error, support};

/// An access of a task that is being spawned: a region or a token, and what is done with it.
pub struct Claim<'py> {
    thing: Bound<'py, PyAny>,
    mode: Mode,
    ordered: bool,
}

impl Claim<'_> {
    /// Whether the body gets a partial of it when it runs.
    pub fn reduces(&self) -> bool {
        matches!(self.mode, Mode::Reduce(_))
    }
}

pub type Claims<'py> = SmallVec<[Claim<'py>; 4]>;

/// As the core wants them.
pub fn accesses<'a>(claims: &'a [Claim<'_>]) -> SmallVec<[data::Access<'a, Interp>; 4]> {
    claims
        .iter()
        .map(|claim| data::Access {
            part: part(&claim.thing).expect("only regions and tokens are claimed"),
            mode: claim.mode,
            ordered: claim.ordered,
            spread: data::Spread::Whole,
        })
        .collect()
}

/// Whether this is a region, or a list that begins with one.
fn is_data(thing: &Bound<'_, PyAny>) -> bool {
    let one = |thing: &Bound<'_, PyAny>| {
        thing.is_exact_instance_of::<Unordered>() || part(thing).is_some()
    };
    if let Ok(list) = thing.cast::<PyList>() {
        return list.iter().any(|thing| one(&thing));
    }
    if let Ok(tuple) = thing.cast::<PyTuple>() {
        return tuple.iter().any(|thing| one(&thing));
    }
    one(thing)
}

/// The part that a region or a token is; `None` of anything else.
#[inline]
fn part<'a>(thing: &'a Bound<'_, PyAny>) -> Option<&'a data::Part<Interp>> {
    if let Ok(region) = thing.cast::<Region>() {
        return Some(region.get().part());
    }
    thing.cast::<Token>().ok().map(|token| token.get().part())
}

/// The mode of a word in `charioteer/_modes.py`; an empty one is none. Reductions are numbered by
/// [`OPERATIONS`].
fn parse(word: &str) -> Option<Mode> {
    Some(match word {
        "In" => Mode::In,
        "Out" => Mode::Out,
        "InOut" => Mode::InOut,
        "Commute" => Mode::Commute,
        _ => {
            let operation = OPERATIONS.iter().position(|name| *name == word)?;
            Mode::Reduce(u32::try_from(operation).expect("few operations"))
        }
    })
}

/// What users call it.
fn name_of(mode: Mode) -> String {
    match mode {
        Mode::Reduce(operation) => format!("ch.{}", OPERATIONS[operation as usize]),
        _ => format!("ch.{}", mode.name()),
    }
}

/// The modes of a function's parameters.
pub struct Signature {
    function: &'static str,
    /// Names and modes of the positional parameters; those of C have no names.
    positional: Vec<(Option<PyRef>, Option<Mode>)>,
    /// The mode of `*parts`.
    parts: Option<Mode>,
    /// Names and modes of the parameters by keyword alone.
    keywords: Vec<(Option<PyRef>, Option<Mode>)>,
    /// The annotations that this was read from: another function with the same code may have others.
    annotations: Vec<PyRef>,
    /// Whether arrays that are not managed are taken too, as native functions do.
    takes_arrays: bool,
    overwritten: Option<(&'static str, &'static str)>,
    /// So many positional arguments leave no default of a parameter with a mode to be looked at.
    moded: usize,
}

type Modes = (
    Vec<(Py<PyAny>, String)>,
    String,
    Vec<(Py<PyAny>, String)>,
    Vec<Py<PyAny>>,
);

impl Signature {
    /// Reads the annotations of a Python function; `None` if no parameter has a mode. `AccessError` if
    /// they cannot be read.
    pub fn read(function: &Bound<'_, PyAny>, name: &'static str) -> PyResult<Option<Self>> {
        let py = function.py();
        let found: Option<Modes> = support(py)
            .read_modes
            .bind(py)
            .call1((function,))?
            .extract()?;
        Ok(found.map(|(positional, parts, keywords, annotations)| {
            let modes = |all: Vec<(Py<PyAny>, String)>| {
                all.into_iter()
                    .map(|(name, word)| (Some(PyRef::new(name)), parse(&word)))
                    .collect()
            };
            let positional: Vec<(Option<PyRef>, Option<Mode>)> = modes(positional);
            let keywords: Vec<(Option<PyRef>, Option<Mode>)> = modes(keywords);
            let last = positional.iter().rposition(|(_, mode)| mode.is_some());
            Self {
                function: name,
                moded: if keywords.iter().any(|(_, mode)| mode.is_some()) {
                    usize::MAX
                } else {
                    last.map_or(0, |last| last + 1)
                },
                positional,
                parts: parse(&parts),
                keywords,
                annotations: annotations.into_iter().map(PyRef::new).collect(),
                takes_arrays: false,
                overwritten: None,
            }
        }))
    }

    /// Of a native function, whose parameters have no names; `None` if it takes no arrays.
    pub fn native(
        function: &'static str,
        parameters: impl Iterator<Item = Option<Mode>>,
    ) -> Option<Arc<Self>> {
        let positional: Vec<_> = parameters.map(|mode| (None, mode)).collect();
        positional.iter().any(|(_, mode)| mode.is_some()).then(|| {
            Arc::new(Self {
                function,
                positional,
                parts: None,
                keywords: Vec::new(),
                annotations: Vec::new(),
                takes_arrays: true,
                overwritten: None,
                moded: 0,
            })
        })
    }

    /// The same of a native function that it declares: it takes arrays that are not managed too, and the
    /// parameter that is named first in `overwritten` is written without a look at what was there if the
    /// other one is zero, as it is unless said.
    pub fn of_native(self, overwritten: Option<(&'static str, &'static str)>) -> Self {
        Self {
            takes_arrays: true,
            overwritten,
            ..self
        }
    }

    /// Whether it was read from the annotations that this function has.
    pub fn is_of(&self, function: &Bound<'_, PyAny>) -> bool {
        let py = function.py();
        // SAFETY: attached; a Python function, alive; a borrowed reference, or null, with an exception
        // from 3.14 on if an annotation cannot be evaluated here.
        let annotations = unsafe {
            let annotations = ffi::PyFunction_GetAnnotations(function.as_ptr());
            if annotations.is_null() {
                ffi::PyErr_Clear();
            }
            Bound::from_borrowed_ptr_or_opt(py, annotations)
        };
        let Some(annotations) = annotations else {
            return true;
        };
        let Ok(annotations) = annotations.cast::<PyDict>() else {
            return true;
        };
        annotations.len() == self.annotations.len()
            && annotations
                .iter()
                .zip(&self.annotations)
                .all(|((_, now), then)| now.is(then.bind(py)))
    }

    /// `AccessError` if a `functools.partial` binds one of the parameters with a mode.
    pub fn refuse_bound(
        &self,
        bound: usize,
        arguments: &Bound<'_, PyTuple>,
        keywords: &Bound<'_, PyDict>,
    ) -> PyResult<()> {
        let py = arguments.py();
        let refuse = |name: String| {
            Err(error(
                py,
                "AccessError",
                (format!(
                    "{}: a functools.partial binds the parameter {name}, whose mode says that it is \
                     accessed: give the region at the call",
                    self.function
                ),),
            ))
        };
        for place in bound..bound + arguments.len() {
            if self.at(place).is_some() {
                return refuse(self.name_at(py, place));
            }
        }
        for name in keywords.keys() {
            if self.of(&name)?.is_some() {
                return refuse(name.to_string());
            }
        }
        Ok(())
    }

    fn at(&self, place: usize) -> Option<Mode> {
        match self.positional.get(place) {
            Some((_, mode)) => *mode,
            None => self.parts,
        }
    }

    fn of(&self, name: &Bound<'_, PyAny>) -> PyResult<Option<Mode>> {
        for (known, mode) in self.positional.iter().chain(&self.keywords) {
            let Some(known) = known else { continue };
            if known.bind(name.py()).is(name) || known.bind(name.py()).eq(name)? {
                return Ok(*mode);
            }
        }
        Ok(None)
    }

    /// The keywords of a call, and the defaults of parameters with modes for which it gives nothing;
    /// `None` if there are none such. A default that is no region stays where it is: the body may well
    /// take `None`.
    fn filled<'py>(
        &self,
        py: Python<'py>,
        function: &Bound<'py, PyAny>,
        offset: usize,
        positional: Option<&Bound<'py, PyTuple>>,
        keyword: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        let given = offset + positional.map_or(0, |given| given.len());
        if given >= self.moded {
            return Ok(None);
        }
        let (positional, by_name) = callable::defaults_of(function)?;
        let mut filled = None;
        let mut fill = |name: &Bound<'py, PyAny>, default: Bound<'py, PyAny>| -> PyResult<()> {
            if !is_data(&default)
                || keyword.is_some_and(|given| given.contains(name).unwrap_or(false))
            {
                return Ok(());
            }
            let filled = match &mut filled {
                Some(filled) => filled,
                None => filled.insert(match keyword {
                    Some(given) => given.copy()?,
                    None => PyDict::new(py),
                }),
            };
            filled.set_item(name, default)
        };
        if let Some(defaults) = positional {
            let first = self.positional.len() - defaults.len().min(self.positional.len());
            for (at, (name, mode)) in self.positional.iter().enumerate().skip(first.max(given)) {
                if let (Some(name), Some(_)) = (name, mode) {
                    fill(name.bind(py), defaults.get_item(at - first)?)?;
                }
            }
        }
        if let Some(defaults) = by_name {
            for (name, mode) in &self.keywords {
                if let (Some(name), Some(_)) = (name, mode)
                    && let Some(default) = defaults.get_item(name.bind(py))?
                {
                    fill(name.bind(py), default)?;
                }
            }
        }
        Ok(filled)
    }

    /// The parameter that a call with these keywords writes without a look at what was there, whatever
    /// its mode.
    fn overwritten(&self, keyword: Option<&Bound<'_, PyDict>>) -> PyResult<Option<&'static str>> {
        let Some((name, factor)) = self.overwritten else {
            return Ok(None);
        };
        let factor = match keyword {
            Some(given) => given.get_item(factor)?,
            None => None,
        };
        let zero = factor.is_none_or(|factor| factor.eq(0).unwrap_or(false));
        Ok(zero.then_some(name))
    }

    /// The name of a positional parameter; none of `*parts`, and of those of C.
    fn named<'a, 'py>(&'a self, py: Python<'py>, place: usize) -> Option<&'a Bound<'py, PyAny>> {
        let (name, _) = self.positional.get(place)?;
        name.as_ref().map(|name| name.bind(py))
    }

    /// What messages call a positional parameter.
    fn name_at(&self, py: Python<'_>, place: usize) -> String {
        match self.named(py, place) {
            Some(name) => name.to_string(),
            None if place < self.positional.len() => format!("{}", place + 1),
            None => format!("{} of *parts", place + 1 - self.positional.len()),
        }
    }
}

/// Data that a task accesses and that is no parameter of its body.
pub struct Declared {
    mode: Mode,
    thing: PyRef,
    ordered: bool,
}

impl Clone for Declared {
    fn clone(&self) -> Self {
        // SAFETY: options are only read and combined in calls from Python.
        let py = unsafe { Python::assume_attached() };
        Self {
            mode: self.mode,
            thing: PyRef::new(self.thing.clone_ref(py)),
            ordered: self.ordered,
        }
    }
}

/// Stands among the arguments for the array that a body reduces into, which it gets when it runs.
#[pyclass(frozen)]
pub struct Partial {
    region: Py<Region>,
    operation: u32,
}

impl Partial {
    pub fn region(&self) -> &Py<Region> {
        &self.region
    }

    pub fn operation(&self) -> u32 {
        self.operation
    }
}

/// A region that one call does not order.
#[pyclass(module = "charioteer", frozen)]
pub struct Unordered(PyRef);

#[pymethods]
impl Unordered {
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!("unordered({})", self.0.bind(py).repr()?))
    }
}

/// Takes an access of one call out of the order: the task may run beside whoever else uses the region.
/// `AccessError` for what is no region.
#[pyfunction]
#[pyo3(signature = (region, /))]
pub fn unordered(region: Bound<'_, PyAny>) -> PyResult<Unordered> {
    if part(&region).is_some() {
        return Ok(Unordered(region.into()));
    }
    let what = region.get_type().name()?.to_string();
    Err(error(
        region.py(),
        "AccessError",
        (format!(
            "unordered() takes a region of a managed array, not {what}"
        ),),
    ))
}

/// Reads one of the options `input`, `output`, `inout`, `commute`: a region or several.
pub fn declare(mode: Mode, regions: &Bound<'_, PyAny>, into: &mut Vec<Declared>) -> PyResult<()> {
    let mut one = |thing: &Bound<'_, PyAny>| -> PyResult<bool> {
        let (thing, ordered) = match thing.cast::<Unordered>() {
            Ok(unordered) => (unordered.get().0.bind(thing.py()), false),
            Err(_) => (thing, true),
        };
        let known = part(thing).is_some();
        if known {
            into.push(Declared {
                mode,
                thing: thing.clone().into(),
                ordered,
            });
        }
        Ok(known)
    };
    if one(regions)? {
        return Ok(());
    }
    let wrong = |thing: &Bound<'_, PyAny>| -> PyErr {
        let what = thing
            .get_type()
            .name()
            .map_or_else(|_| "an object".to_owned(), |name| name.to_string());
        error(
            thing.py(),
            "AccessError",
            (format!(
                "input, output, inout and commute take regions of managed arrays, not {what}: make one \
                 with ch.asarray"
            ),),
        )
    };
    if regions.is_instance_of::<PyString>() || regions.is_instance_of::<PyDict>() {
        return Err(wrong(regions));
    }
    let Ok(several) = regions.try_iter() else {
        return Err(wrong(regions));
    };
    for region in several {
        let region = region?;
        if !one(&region)? {
            return Err(wrong(&region));
        }
    }
    Ok(())
}

/// What a body has to do with data beside its arguments; `None` of most.
pub fn body_data<'py>(
    py: Python<'py>,
    said: Option<&[Declared]>,
    claims: &[Claim<'py>],
    checks: bool,
    retried: bool,
) -> PyResult<Option<Box<BodyData>>> {
    let mut data = BodyData {
        alone: retried,
        ..BodyData::default()
    };
    let mut any = claims
        .iter()
        .any(|claim| matches!(claim.mode, Mode::Reduce(_)));
    if let Some(said) = said {
        let regions = said
            .iter()
            .map(|declared| (declared.thing.bind(py), declared.mode != Mode::In));
        data.declared = Some(PyList::new(py, regions.collect::<Vec<_>>())?.into());
        any = true;
    }
    if checks {
        for claim in claims
            .iter()
            .filter(|claim| claim.ordered && claim.mode == Mode::In)
        {
            let Ok(region) = claim.thing.cast::<Region>() else {
                continue;
            };
            let region = region.get();
            let writes = claims.iter().any(|other| {
                other.mode != Mode::In
                    && part(&other.thing).is_some_and(|other| other.overlaps(region.part()))
            });
            if !writes {
                data.reads
                    .push((region.text(), region.readonly_view(py)?.into()));
                any = true;
            }
        }
    }
    Ok(any.then(|| Box::new(data)))
}

/// The accesses that options declare.
pub fn declared<'py>(py: Python<'py>, all: &[Declared], into: &mut Claims<'py>) {
    into.extend(all.iter().map(|declared| Claim {
        thing: declared.thing.bind(py).clone(),
        mode: declared.mode,
        ordered: declared.ordered,
    }));
}

/// The arguments of a call, with views in the place of regions.
pub type Bindings<'py> = (Option<Bound<'py, PyTuple>>, Option<Bound<'py, PyDict>>);

/// Makes accesses of the regions at parameters with modes; `offset` is how many positional arguments are
/// bound already. `AccessError` for what is no region there.
pub fn bind<'py>(
    py: Python<'py>,
    (signature, offset): (&Signature, usize),
    function: &Bound<'py, PyAny>,
    positional: Option<&Bound<'py, PyTuple>>,
    keyword: Option<&Bound<'py, PyDict>>,
    into: &mut Claims<'py>,
) -> PyResult<Bindings<'py>> {
    let filled = signature.filled(py, function, offset, positional, keyword)?;
    let keyword = filled.as_ref().or(keyword);
    let overwritten = signature.overwritten(keyword)?;
    let in_call = |mode, name: Option<&Bound<'py, PyAny>>| match (overwritten, name) {
        (Some(written), Some(name)) if name.eq(written)? => Ok::<_, PyErr>(Mode::Out),
        _ => Ok(mode),
    };
    let positional = match positional {
        None => None,
        Some(given) => {
            let mut seen: SmallVec<[Bound<'py, PyAny>; 8]> = SmallVec::new();
            for (place, argument) in given.iter_borrowed().enumerate() {
                let place = offset + place;
                seen.push(match signature.at(place) {
                    None => argument.to_owned(),
                    Some(mode) => {
                        let mode = in_call(mode, signature.named(py, place))?;
                        let name = || signature.name_at(py, place);
                        take(signature, mode, &argument, into, name)?
                    }
                });
            }
            Some(PyTuple::new(py, seen)?)
        }
    };
    let keyword = match keyword {
        None => None,
        Some(given) => {
            let seen = PyDict::new(py);
            for (name, argument) in given.copy()? {
                let argument = match signature.of(&name)? {
                    None => argument,
                    Some(mode) => {
                        let mode = in_call(mode, Some(&name))?;
                        take(signature, mode, &argument, into, || name.to_string())?
                    }
                };
                seen.set_item(name, argument)?;
            }
            Some(seen)
        }
    };
    Ok((positional, keyword))
}

/// What a body gets for an argument with a mode.
fn take<'py>(
    signature: &Signature,
    mode: Mode,
    argument: &Bound<'py, PyAny>,
    into: &mut Claims<'py>,
    name: impl Fn() -> String,
) -> PyResult<Bound<'py, PyAny>> {
    if let Some(view) = take_one(mode, argument, into)? {
        return Ok(view);
    }
    if signature.takes_arrays {
        return Ok(argument.clone());
    }
    let several = |things: Vec<Bound<'py, PyAny>>, into: &mut Claims<'py>| {
        things
            .into_iter()
            .map(|thing| match take_one(mode, &thing, into)? {
                Some(view) => Ok(view),
                None => Err(wrong(signature, mode, &thing, &name())),
            })
            .collect::<PyResult<Vec<_>>>()
    };
    let py = argument.py();
    let views = if let Ok(list) = argument.cast::<PyList>() {
        let views = several(list.iter().collect(), into)?;
        Some(PyList::new(py, views)?.into_any())
    } else if let Ok(tuple) = argument.cast::<PyTuple>() {
        let views = several(tuple.iter().collect(), into)?;
        Some(PyTuple::new(py, views)?.into_any())
    } else {
        None
    };
    if let Some(views) = views {
        return if matches!(mode, Mode::Reduce(_)) {
            // What is in there is known when the body runs.
            Ok(Bound::new(py, Held(views.into()))?.into_any())
        } else {
            Ok(views)
        };
    }
    Err(wrong(signature, mode, argument, &name()))
}

fn wrong(signature: &Signature, mode: Mode, given: &Bound<'_, PyAny>, name: &str) -> PyErr {
    let what = given
        .get_type()
        .name()
        .map_or_else(|_| "an object".to_owned(), |name| name.to_string());
    let cure = match what.as_str() {
        "ndarray" => "; make it managed: ch.asarray",
        "Task" => "; what a task gives is not known yet: let it write to a region",
        "Tiles" => "; index the grid by tile, or take all of it, .base",
        _ => "",
    };
    error(
        given.py(),
        "AccessError",
        (format!(
            "{}: parameter {name} ({}) takes a region of a managed array or a list of regions, not \
             {what}{cure}",
            signature.function,
            name_of(mode)
        ),),
    )
}

/// What a body gets for one region; `None` for what is no region.
fn take_one<'py>(
    mode: Mode,
    argument: &Bound<'py, PyAny>,
    into: &mut Claims<'py>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = argument.py();
    let (thing, ordered) = match argument.cast_exact::<Unordered>() {
        Ok(unordered) => (unordered.get().0.bind(py), false),
        Err(_) => (argument, true),
    };
    if !ordered && matches!(mode, Mode::Reduce(_)) {
        return Err(error(
            py,
            "AccessError",
            ("a reduction has its place in the order: unordered() is for other modes",),
        ));
    }
    let view = if let Ok(region) = thing.cast::<Region>() {
        match mode {
            Mode::In => region.get().readonly_view(py)?,
            Mode::Out | Mode::InOut | Mode::Commute => region.get().view(py)?,
            Mode::Reduce(operation) => {
                let name = OPERATIONS[operation as usize];
                support(py)
                    .data
                    .bind(py)
                    .call1(("reducible", name, region))?;
                let region = region.clone().unbind();
                Bound::new(py, Partial { region, operation })?.into_any()
            }
        }
    } else if thing.is_exact_instance_of::<Token>() && !matches!(mode, Mode::Reduce(_)) {
        py.None().into_bound(py)
    } else {
        return Ok(None);
    };
    into.push(Claim {
        thing: thing.clone(),
        mode,
        ordered,
    });
    Ok(Some(view))
}
