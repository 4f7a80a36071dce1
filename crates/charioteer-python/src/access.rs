//! Accesses: what a call reads and writes, from the modes of its function's parameters and from options.
//!
//! The modes of a function are read once a code object ([`crate::callable`]) into a [`Signature`]; a call
//! whose function has none pays one check. [`bind`] walks the arguments of a call: a region at a parameter
//! with a mode becomes an access, which is registered with the core.
//!
//! What takes its place among the arguments depends on where the task may run. On cores alone that is its
//! NumPy view, read-only for accesses that only read: the body finds arrays, and nothing is left to do
//! when it runs. Where a device may be chosen it is a [`Slot`], for which the body gets an array of the
//! device that it runs on when it begins ([`crate::local`]). A reduction is a slot everywhere.
//!
//! Cores share one memory: a set of cores gets the array itself, as one core does. Of a set with devices
//! each member has the whole region, or what [`Shards`] say.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use charioteer::data;
pub use charioteer::data::Mode;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple};
use smallvec::SmallVec;

use crate::callable;
use crate::data::{Region, Token};
use crate::gateway::PyRef;
use crate::interp::{Arguments, Held, Interp};
use crate::local::{Deferral, Spread};
use crate::reduce::{BodyData, OPERATIONS};
use crate::support::{error, support};

/// An access of a task that is being spawned: a region or a token, and what is done with it.
pub struct Claim<'py> {
    thing: Bound<'py, PyAny>,
    mode: Mode,
    ordered: bool,
    spread: Spread,
}

impl Claim<'_> {
    /// Whether the body gets a partial of it when it runs.
    pub fn reduces(&self) -> bool {
        matches!(self.mode, Mode::Reduce(_))
    }

    /// Whether a second attempt would find what the first one wrote.
    pub fn updates(&self) -> bool {
        matches!(self.mode, Mode::InOut | Mode::Commute)
    }

    /// What people call it.
    pub fn text(&self) -> String {
        match self.thing.cast::<Region>() {
            Ok(region) => region.get().text(),
            Err(_) => part(&self.thing).map_or_else(String::new, |part| part.to_string()),
        }
    }
}

/// What each member of a set has of the regions: parameters by name, each with an axis, or none where it
/// promises equal copies.
pub struct Shards(Box<[(Box<str>, Option<u8>)]>);

impl Shards {
    /// Reads `shards=`. `AccessError` or `TypeError` if nothing can be split so.
    pub fn read(said: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = said.py();
        let read = support(py).read_shards.bind(py).call1((said,))?;
        Self::of(&read)
    }

    /// Of what `charioteer/_variants.py` reads them into.
    pub fn of(read: &Bound<'_, PyAny>) -> PyResult<Self> {
        let read: Vec<(String, i32)> = read.extract()?;
        Ok(Self(
            read.into_iter()
                .map(|(name, axis)| (name.into(), u8::try_from(axis).ok()))
                .collect(),
        ))
    }

    /// As `charioteer/_variants.py` has them.
    pub fn as_tuple<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let each = self.0.iter();
        let each = each.map(|(name, axis)| (&**name, axis.map_or(-1, i32::from)));
        PyTuple::new(py, each.collect::<Vec<_>>())
    }

    /// Nothing of none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether they say the same.
    pub fn same(&self, other: &Self) -> bool {
        self.0.len() == other.0.len() && self.0.iter().all(|one| other.0.contains(one))
    }

    fn of_parameter(&self, name: &str) -> Option<Option<u8>> {
        let known = self.0.iter().find(|(known, _)| **known == *name);
        known.map(|(_, axis)| *axis)
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
            spread: claim.spread,
        })
        .collect()
}

/// Whether this is a region, or a list that begins with one.
pub fn is_data(thing: &Bound<'_, PyAny>) -> bool {
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

    /// The keywords of a call with so many positional arguments, and the defaults of parameters with
    /// modes for which it gives nothing; `None` if there are none such. A default that is no region
    /// stays where it is: the body may well take `None`.
    fn filled<'py>(
        &self,
        py: Python<'py>,
        function: &Bound<'py, PyAny>,
        given: usize,
        keyword: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
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

    /// `AccessError` if shards name a parameter that takes no regions.
    fn check_names(&self, py: Python<'_>, shards: &Shards) -> PyResult<()> {
        for (wanted, _) in &shards.0 {
            let mut all = self.positional.iter().chain(&self.keywords);
            let known = all.any(|(name, mode)| {
                let name = name.as_ref().map(|name| name.bind(py).to_string());
                mode.is_some() && name.is_some_and(|name| name == **wanted)
            });
            if !known {
                let why = format!("{}: no parameter {wanted} takes a region", self.function);
                return Err(error(py, "AccessError", (why,)));
            }
        }
        Ok(())
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

/// Stands among the arguments for an array that a body gets when it runs.
#[pyclass(frozen)]
pub struct Slot {
    region: Py<Region>,
    mode: Mode,
    /// Where it is among the accesses of the task; of a reduction with a partial, where that is.
    access: usize,
    spread: Spread,
    /// The partial that the task has for itself, with its place in spawn order.
    partial: Option<(u64, Py<Region>)>,
}

impl Slot {
    pub fn region(&self) -> &Py<Region> {
        &self.region
    }

    pub fn mode(&self) -> Mode {
        self.mode
    }

    pub fn access(&self) -> usize {
        self.access
    }

    pub fn spread(&self) -> Spread {
        self.spread
    }

    pub fn partial(&self) -> Option<&(u64, Py<Region>)> {
        self.partial.as_ref()
    }

    /// The number of the operation that it reduces by.
    pub fn operation(&self) -> Option<u32> {
        match self.mode {
            Mode::Reduce(operation) => Some(operation),
            _ => None,
        }
    }

    /// What a body on cores gets, unless it reduces.
    pub fn on_host<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let region = self.region.bind(py).get();
        match self.mode {
            Mode::In => region.readonly_view(py),
            _ => region.view(py),
        }
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
    deferral: Option<&Deferral>,
    checks: bool,
    retried: bool,
) -> PyResult<Option<Box<BodyData>>> {
    let mut any = deferral.is_some() || claims.iter().any(Claim::reduces);
    if !any && !checks && said.is_none() {
        return Ok(None);
    }
    let mut data = BodyData {
        alone: retried,
        deferral: deferral.cloned().map(Box::new),
        ..BodyData::default()
    };
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
        spread: Spread::Whole,
    }));
}

/// The arguments of a call, with views in the place of regions.
pub struct Bindings<'py> {
    pub positional: Option<Bound<'py, PyTuple>>,
    pub keyword: Option<Bound<'py, PyDict>>,
    /// Whether there are others than regions among the positional ones.
    pub others: bool,
}

/// Makes accesses of the regions at parameters with modes; `offset` is how many positional arguments are
/// bound already; `deferral` is there where a device may be chosen. `AccessError` for what is no region
/// there, and for what cannot be split as it is to be.
pub fn bind<'py>(
    py: Python<'py>,
    (signature, offset): (&Signature, usize),
    function: &Bound<'py, PyAny>,
    positional: Option<&[Bound<'py, PyAny>]>,
    keyword: Option<&Bound<'py, PyDict>>,
    deferral: Option<&Deferral>,
    into: &mut Claims<'py>,
) -> PyResult<Bindings<'py>> {
    if let Some(shards) = deferral.and_then(|deferral| deferral.shards.as_ref()) {
        signature.check_names(py, shards)?;
    }
    let given = offset + positional.map_or(0, <[_]>::len);
    let filled = signature.filled(py, function, given, keyword)?;
    let keyword = filled.as_ref().or(keyword);
    let overwritten = signature.overwritten(keyword)?;
    let in_call = |mode, name: Option<&Bound<'py, PyAny>>| match (overwritten, name) {
        (Some(written), Some(name)) if name.eq(written)? => Ok::<_, PyErr>(Mode::Out),
        _ => Ok(mode),
    };
    let mut others = false;
    let positional = match positional {
        None => None,
        Some(given) => {
            let mut seen: SmallVec<[Bound<'py, PyAny>; 8]> = SmallVec::new();
            for (place, argument) in given.iter().enumerate() {
                let place = offset + place;
                seen.push(match signature.at(place) {
                    None => {
                        others = true;
                        argument.clone()
                    }
                    Some(mode) => {
                        let mode = in_call(mode, signature.named(py, place))?;
                        let name = || signature.name_at(py, place);
                        others |= signature.takes_arrays;
                        take(signature, mode, argument, deferral, into, name)?
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
                        let said = || name.to_string();
                        take(signature, mode, &argument, deferral, into, said)?
                    }
                };
                seen.set_item(name, argument)?;
            }
            Some(seen)
        }
    };
    Ok(Bindings {
        positional,
        keyword,
        others,
    })
}

/// What a body gets for an argument with a mode.
fn take<'py>(
    signature: &Signature,
    mode: Mode,
    argument: &Bound<'py, PyAny>,
    deferral: Option<&Deferral>,
    into: &mut Claims<'py>,
    name: impl Fn() -> String,
) -> PyResult<Bound<'py, PyAny>> {
    let split = match deferral {
        // One device has all of it.
        Some(deferral) if deferral.width > 1 => {
            let shards = deferral.shards.as_ref();
            Some((
                shards.and_then(|shards| shards.of_parameter(&name())),
                &name as Name<'_>,
            ))
        }
        _ => None,
    };
    let take_one = |argument: &Bound<'py, PyAny>, into: &mut Claims<'py>| {
        take_one(mode, argument, deferral, split, into)
    };
    if let Some(view) = take_one(argument, into)? {
        return Ok(view);
    }
    if signature.takes_arrays {
        return Ok(argument.clone());
    }
    let several = |things: Vec<Bound<'py, PyAny>>, into: &mut Claims<'py>| {
        things
            .into_iter()
            .map(|thing| match take_one(&thing, into)? {
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
        return if deferral.is_some() || matches!(mode, Mode::Reduce(_)) {
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

/// What a parameter is called.
type Name<'a> = &'a dyn Fn() -> String;

/// What each member of a set gets of a region. `AccessError` if it cannot be split so, or all of it would
/// be written on each.
fn spread_of(
    py: Python<'_>,
    region: &Region,
    mode: Mode,
    split: Option<(Option<Option<u8>>, Name<'_>)>,
) -> PyResult<Spread> {
    let Some((said, name)) = split else {
        return Ok(Spread::Whole);
    };
    let refuse = |why: String| Err(error(py, "AccessError", (why,)));
    match said {
        None if matches!(mode, Mode::In | Mode::Reduce(_)) => Ok(Spread::Whole),
        None => refuse(format!(
            "{} is written on a set of devices, and each has all of it: split it, shards={{{:?}: 0}}, or \
             promise equal copies, shards={{{1:?}: \"replicated\"}}",
            region.text(),
            name()
        )),
        Some(_) if matches!(mode, Mode::Reduce(_)) => refuse(format!(
            "{}: what is reduced into is not split: each device of a set has a partial of its own",
            name()
        )),
        Some(None) => Ok(Spread::Replicated),
        Some(Some(axis)) => match region.split_axis(usize::from(axis)) {
            Ok(axis) => Ok(Spread::Shard(axis)),
            Err(why) => refuse(format!("{} cannot be split: {why}", region.text())),
        },
    }
}

/// What a body gets for one region; `None` for what is no region.
fn take_one<'py>(
    mode: Mode,
    argument: &Bound<'py, PyAny>,
    deferral: Option<&Deferral>,
    split: Option<(Option<Option<u8>>, Name<'_>)>,
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
    let mut spread = Spread::Whole;
    let view = if let Ok(region) = thing.cast::<Region>() {
        spread = spread_of(py, region.get(), mode, split)?;
        let access = into.len();
        let slot = || Slot {
            region: region.clone().unbind(),
            mode,
            access,
            spread,
            partial: None,
        };
        match mode {
            Mode::Reduce(operation) => {
                let mut slot = slot();
                let name = OPERATIONS[operation as usize];
                let data = support(py).data.bind(py);
                data.call1(("reducible", name, region))?;
                if let Some(deferral) = deferral {
                    let own = data.call1(("device_partial", region, deferral.width))?;
                    let spread = if deferral.width > 1 {
                        Spread::Shard(0)
                    } else {
                        Spread::Whole
                    };
                    let number = SPAWNED_PARTIALS.fetch_add(1, Ordering::Relaxed);
                    slot.partial = Some((number, own.cast::<Region>()?.clone().unbind()));
                    slot.access = into.len();
                    slot.spread = spread;
                    into.push(Claim {
                        thing: own,
                        mode: Mode::Out,
                        ordered: true,
                        spread,
                    });
                }
                Bound::new(py, slot)?.into_any()
            }
            _ if deferral.is_some() => Bound::new(py, slot())?.into_any(),
            Mode::In => region.get().readonly_view(py)?,
            Mode::Out | Mode::InOut | Mode::Commute => region.get().view(py)?,
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
        spread: if matches!(mode, Mode::Reduce(_)) {
            Spread::Whole
        } else {
            spread
        },
    });
    Ok(Some(view))
}

/// Orders the partials of tasks that may run on devices.
static SPAWNED_PARTIALS: AtomicU64 = AtomicU64::new(0);

/// The arguments with NumPy views in the place of slots, for bodies that run on cores alone.
pub fn on_host(py: Python<'_>, arguments: &Arguments) -> PyResult<Arguments> {
    fn one<'py>(argument: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        match argument.cast_exact::<Slot>() {
            Ok(slot) => slot.get().on_host(argument.py()),
            Err(_) => Ok(argument.clone()),
        }
    }
    let each = |given: &PyRef| -> PyResult<PyRef> {
        let given = given.bind(py).cast::<PyTuple>()?.iter();
        let given = given
            .map(|argument| one(&argument))
            .collect::<PyResult<Vec<_>>>()?;
        Ok(PyTuple::new(py, given)?.into())
    };
    Ok(match arguments {
        Arguments::None => Arguments::None,
        Arguments::One(argument) => Arguments::One(one(argument.bind(py))?.into()),
        Arguments::Many(given) => Arguments::Many(each(given)?),
        Arguments::Named(both) => {
            let named = PyDict::new(py);
            for (name, argument) in both.1.bind(py).cast::<PyDict>()? {
                named.set_item(name, one(&argument)?)?;
            }
            Arguments::Named(Box::new((each(&both.0)?, named.into())))
        }
    })
}
