//! Managed arrays: `Array`, `Region`, grids of tiles, tokens.
//!
//! # What a handle is
//!
//! An `Array` owns a NumPy buffer in C order; the core knows it as a [`Datum`], which orders what
//! tasks do with it. A [`Region`] is a part of it by basic indexing, and an `Array` is the region of
//! all elements, so that whatever a region can do an array can. A region says two things: which
//! elements these are, to the core, as an index set ([`index::Region`]); and how they are seen, to a
//! body, as a NumPy view: axes dropped, added, or run backwards. Both follow from its [`Axis`]es, one
//! for each axis of the array in order, with added axes between them.
//!
//! # Views
//!
//! A region makes its NumPy views when they are first wanted, and keeps them: one that may be written
//! and a read-only twin, for accesses that only read. Making one calls NumPy, so it is made first and
//! kept afterwards; of two threads the one that comes second throws its own away. All views share the
//! buffer, which lives as long as any of them.
//!
//! On a device the elements are elsewhere, and at another address as often as the core moves them. What was
//! made of a region there is kept too, by where it was (see [`crate::local`]).
//!
//! A [`Tiles`] grid makes the region of a tile on first touch and keeps it, so that `A[i, j]` in a loop
//! is a look-up, and so is the view that a body gets.
//!
//! Nothing here is part of a cycle of references: a grid knows its regions, a region its array, and an
//! array none of them.

use std::sync::Arc;

use charioteer::data::store::View;
use charioteer::data::{self, Datum, Grid, Part};
use charioteer::engine::HostError;
use charioteer::machine::{DeviceId, HOST};
use charioteer::region as index;
use pyo3::exceptions::{PyIndexError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyEllipsis, PyInt, PyList, PySlice, PyTuple};
use smallvec::SmallVec;

use crate::attached::Attached;
use crate::devices::ForeignMemory;
use crate::gateway::{self, PyRef};
use crate::interp::{Core, Interp, Label, Task, exception_of};
use crate::local::{Layout, Library, Wanted};
use crate::native::{ArrayHead, C_CONTIGUOUS, WRITEABLE};
use crate::runtime;
use crate::spawn::{handle_of, spawn_error};
use crate::support::{error, support};
use crate::task::wait_error;

/// Where the first element is of what is seen along these axes of a view, and the strides, in bytes, of the
/// axes that are seen.
pub fn place(axes: &[Axis], view: &View) -> (u64, SmallVec<[i64; 4]>) {
    let mut strides = SmallVec::new();
    let (mut first, mut real) = (0_i64, 0);
    for axis in axes {
        let (start, step) = match *axis {
            Axis::New => {
                strides.push(0);
                continue;
            }
            Axis::At(at) => (at, None),
            Axis::Along { start, step, .. } => (start, Some(step)),
        };
        let stride = view.strides[real].cast_signed();
        first += (start as i64 - view.origin[real].cast_signed()) * stride;
        real += 1;
        strides.extend(step.map(|step| stride * step as i64));
    }
    (view.pointer.address.wrapping_add_signed(first), strides)
}

/// How an axis of the array is seen.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Axis {
    /// At one index: the axis is dropped.
    At(isize),
    /// From `start` on, `count` times by `step`, which may be negative.
    Along {
        start: isize,
        step: isize,
        count: usize,
    },
    /// An axis of one element that the array does not have.
    New,
}

pub type Axes = SmallVec<[Axis; 4]>;

/// A part of a region: some indices of one axis, by the place of that among the axes of the region, the
/// dropped ones and the new ones too.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    axis: usize,
    start: usize,
    count: usize,
}

/// An array of a device that a region made, and what it was made of.
struct Seen {
    engine: u32,
    device: DeviceId,
    address: u64,
    strides: SmallVec<[u64; 4]>,
    origin: SmallVec<[u64; 4]>,
    piece: Option<Piece>,
    writes: bool,
    library: Option<Library>,
    array: PyRef,
}

/// How many of them a region keeps: it is on few devices at a time.
const SEEN: usize = 8;

/// A part of a managed array: a handle, which says where data is and computes nothing.
///
/// Regions are made by indexing an array, a region or a grid of tiles.
#[pyclass(module = "charioteer", frozen, subclass)]
pub struct Region {
    /// Which elements these are, to the core.
    part: Part<Interp>,
    /// The array of NumPy's that has all data of the array: in C order, and writable.
    buffer: PyRef,
    /// How a body sees them: what becomes of each axis of the array, in order, and axes between.
    axes: Axes,
    /// The bytes of an element.
    item: usize,
    /// The array's object; `None` of the array itself, whose parts are all there is.
    array: Option<PyRef>,
    writable: PyOnceLock<PyRef>,
    readonly: PyOnceLock<PyRef>,
    /// Arrays of devices, those that were used last at the end.
    seen: Attached<Vec<Seen>>,
}

/// A managed array. Its bodies are NumPy arrays on the device that they run on; this is their handle.
#[pyclass(module = "charioteer", frozen, extends = Region)]
pub struct Array;

/// What an index selects of one axis of a view.
enum Selector {
    At(isize),
    Range {
        start: isize,
        step: isize,
        count: usize,
    },
    New,
}

impl Axis {
    /// What a body sees of it: nothing of an axis that is dropped.
    pub fn extent(&self) -> Option<usize> {
        match self {
            Self::At(_) => None,
            Self::Along { count, .. } => Some(*count),
            Self::New => Some(1),
        }
    }

    /// The part that a selector makes of it.
    fn select(&self, selector: &Selector) -> Self {
        match (self, selector) {
            (_, Selector::New) => Self::New,
            (Self::Along { start, step, .. }, Selector::At(at)) => Self::At(start + step * at),
            (
                Self::Along { start, step, .. },
                Selector::Range {
                    start: from,
                    step: by,
                    count,
                },
            ) => Self::Along {
                start: start + step * from,
                step: step * by,
                count: *count,
            },
            _ => unreachable!("only axes that are seen are selected from"),
        }
    }

    /// Its indices, as a set.
    fn span(&self) -> Option<index::Span> {
        let (start, step, count) = match *self {
            Self::New => return None,
            Self::At(at) => (at, 1, 1),
            Self::Along { count: 0, .. } => return Some(index::Span::EMPTY),
            Self::Along { start, step, count } => (
                start.min(start + step * signed(count - 1)),
                step.unsigned_abs(),
                count,
            ),
        };
        let start = start.unsigned_abs();
        Some(index::Span::new(start as u64, step as u64, count as u64))
    }

    /// The index that shows it in a view of the whole array.
    fn index<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match *self {
            Self::At(at) => Ok(at.into_pyobject(py)?.into_any()),
            Self::New => Ok(py.None().into_bound(py)),
            Self::Along { start, step, count } => {
                let stop = start + step * signed(count);
                if stop >= 0 {
                    return Ok(PySlice::new(py, start, stop, step).into_any());
                }
                // Backwards past the first element, which a negative number would not say.
                let none = py.None();
                let slice = py.get_type::<PySlice>();
                slice.call1((start, none, step))
            }
        }
    }
}

/// NumPy's extents are signed, and no larger.
fn signed(count: usize) -> isize {
    isize::try_from(count).expect("an extent of an array")
}

fn access_error(py: Python<'_>, text: impl Into<String>) -> PyErr {
    error(py, "AccessError", (text.into(),))
}

/// An integer that indexes; `None` of anything else, booleans among it.
fn integer(index: &Bound<'_, PyAny>) -> PyResult<Option<isize>> {
    if index.is_exact_instance_of::<PyInt>() {
        return index
            .extract()
            .map(Some)
            .map_err(|_| PyIndexError::new_err("the index is out of range"));
    }
    let class = index.get_type();
    if class.name()?.to_string_lossy().starts_with("bool") || index.len().is_ok() {
        return Ok(None);
    }
    // SAFETY: attached; the object is alive.
    if unsafe { ffi::PyIndex_Check(index.as_ptr()) } == 0 {
        return Ok(None);
    }
    // SAFETY: attached; a new reference, or null with an exception.
    let number =
        unsafe { Bound::from_owned_ptr_or_err(index.py(), ffi::PyNumber_Index(index.as_ptr())) };
    match number {
        Ok(number) => number
            .extract()
            .map(Some)
            .map_err(|_| PyIndexError::new_err("the index is out of range")),
        Err(_) => Ok(None),
    }
}

impl Region {
    /// The extents of what a body sees.
    fn extents(&self) -> SmallVec<[usize; 4]> {
        self.axes.iter().filter_map(Axis::extent).collect()
    }

    fn elements(&self) -> usize {
        self.axes.iter().filter_map(Axis::extent).product()
    }

    pub fn part(&self) -> &Part<Interp> {
        &self.part
    }

    /// Whether every element of the other is one of its own.
    pub fn contains(&self, other: &Self) -> bool {
        Arc::ptr_eq(self.part.datum(), other.part.datum())
            && self.part.region().contains(other.part.region())
    }

    /// Spawns the task that brings it to a device, or takes it from there.
    fn moved<'py>(
        slf: &Bound<'py, Self>,
        device: &Bound<'py, PyAny>,
        there: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let number: Option<u16> = support(py)
            .data
            .bind(py)
            .call1(("gpu_number", device))?
            .extract()?;
        let device = number.map_or(HOST, DeviceId::gpu);
        let this = slf.get();
        let engine = Arc::clone(&runtime::active(py)?.engine);
        let spawned = if there {
            let label = format!("prefetch {} to {device}", this.text());
            engine.prefetch(Label::Name(label.into()), &this.part, device)
        } else {
            let label = format!("evict {} from {device}", this.text());
            engine.evict(Label::Name(label.into()), &this.part, device)
        };
        let handle = spawned.map_err(|why| spawn_error(py, why, None))?;
        handle_of(py, Some(handle), None)
    }

    /// On which device the array brought memory along.
    fn brought(&self) -> Option<DeviceId> {
        let adopted = self.part.datum().storage()?.adopted()?;
        Some(adopted.pointer.device)
    }

    /// Waits until the memory of a device that the array brought along has the last version, if it did: of the
    /// region, or of all of it once nobody uses it any more.
    fn bring_back(&self, py: Python<'_>, ends: bool) -> PyResult<()> {
        let Some(device) = self.brought().filter(|_| runtime::is_open()) else {
            return Ok(());
        };
        let engine = Arc::clone(&runtime::active(py)?.engine);
        let label = Label::Name(format!("bring {} back to {device}", self.text()).into());
        let handle = if ends {
            engine.return_memory(label, self.part.datum())
        } else {
            engine.prefetch(label, &self.part, device)
        };
        let handle = handle.map_err(|why| spawn_error(py, why, None))?;
        let waited = handle_of(py, Some(handle), None)?.call_method0(pyo3::intern!(py, "result"));
        match waited {
            // Whoever accesses the region is told of what is undefined.
            Err(error) if is_dependency_error(py, &error) => Ok(()),
            waited => waited.map(drop),
        }
    }

    /// The region of the same array that is seen through these axes.
    fn with_axes(slf: &Bound<'_, Self>, axes: Axes) -> Self {
        let py = slf.py();
        let this = slf.get();
        let spans = axes.iter().filter_map(Axis::span);
        Self {
            part: this.part.datum().part(index::Region::new(spans)),
            buffer: PyRef::new(this.buffer.clone_ref(py)),
            axes,
            item: this.item,
            array: Some(match &this.array {
                Some(array) => PyRef::new(array.clone_ref(py)),
                None => slf.clone().into(),
            }),
            writable: PyOnceLock::new(),
            readonly: PyOnceLock::new(),
            seen: Attached::new(Vec::new()),
        }
    }

    /// The view that may be written.
    pub fn view<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        if let Some(view) = self.writable.get(py) {
            return Ok(view.bind(py).clone());
        }
        let view = self.view_of(py, &self.axes)?;
        Ok(keep(py, &self.writable, view))
    }

    /// A view of the buffer.
    fn view_of<'py>(&self, py: Python<'py>, axes: &[Axis]) -> PyResult<Bound<'py, PyAny>> {
        let mut index = axes
            .iter()
            .map(|part| part.index(py))
            .collect::<PyResult<Vec<_>>>()?;
        // With every axis dropped NumPy would give a number, and not a view of it.
        index.push(PyEllipsis::get(py).to_owned().into_any());
        self.buffer.bind(py).get_item(PyTuple::new(py, index)?)
    }

    /// The view of the host's buffer that a member of a set gets which is a core.
    pub fn host_view<'py>(
        &self,
        py: Python<'py>,
        piece: Option<Piece>,
        writes: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let view = match piece {
            None if writes => return self.view(py),
            None => return self.readonly_view(py),
            Some(piece) => self.view_of(py, &self.axes_of(Some(piece)))?,
        };
        if !writes {
            view.call_method("setflags", (false,), None)?;
        }
        Ok(view)
    }

    /// How it sees the axes of its array.
    pub fn axes(&self) -> Axes {
        self.axes.clone()
    }

    fn axes_of(&self, piece: Option<Piece>) -> Axes {
        let mut axes = self.axes.clone();
        if let Some(Piece { axis, start, count }) = piece {
            axes[axis] = axes[axis].select(&Selector::Range {
                start: signed(start),
                step: 1,
                count,
            });
        }
        axes
    }

    /// The axis of the array that a body sees as its axis of that number, for the region to be split along;
    /// why that cannot be.
    pub fn split_axis(&self, seen: usize) -> Result<u8, String> {
        let mut visible = self.axes.iter().enumerate();
        let mut visible = visible.by_ref().filter(|(_, axis)| axis.extent().is_some());
        let Some((at, axis)) = visible.nth(seen) else {
            let count = self.extents().len();
            return Err(format!("it has no axis {seen}, but {count}"));
        };
        match axis {
            Axis::New => Err(format!("axis {seen} was added by an index")),
            Axis::Along { step, .. } if *step < 0 => Err(format!("axis {seen} runs backwards")),
            _ => {
                let before = self.axes[..at].iter();
                let before = before.filter(|axis| !matches!(axis, Axis::New)).count();
                u8::try_from(before).map_err(|_| format!("axis {seen} is one of too many"))
            }
        }
    }

    /// What a member of a set has of it, split along an axis of the array as `numpy.array_split` does.
    pub fn piece(&self, axis: u8, at: usize, members: usize) -> Piece {
        let mut real = self.axes.iter().enumerate();
        let mut real = real.by_ref().filter(|(_, axis)| !matches!(axis, Axis::New));
        let (axis, along) = real.nth(usize::from(axis)).expect("an axis that it has");
        let extent = along.extent().unwrap_or(1);
        let (least, larger) = (extent / members, extent % members);
        Piece {
            axis,
            start: at * least + at.min(larger),
            count: least + usize::from(at < larger),
        }
    }

    /// The array of a device, or of a part of the region there. One that a body is lent is made anew.
    pub fn array_on<'py>(
        &self,
        py: Python<'py>,
        wanted: &Wanted<'_>,
        loan: Option<&PyRef>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let is = |seen: &Seen| match wanted.view {
            None => false,
            Some(view) => {
                seen.engine == wanted.engine
                    && seen.device == wanted.device
                    && seen.address == view.pointer.address
                    && seen.piece == wanted.piece
                    && seen.writes == wanted.writes
                    && seen.library == wanted.library
                    && seen.strides == view.strides
                    && seen.origin == view.origin
            }
        };
        if loan.is_none() {
            let mut seen = self.seen.lock(py);
            let count = seen.len();
            if let Some(at) = seen.iter().rposition(is) {
                seen[at..count].rotate_left(1);
                // One more reference calls nobody, so the section may hold on.
                return Ok(seen[count - 1].array.clone_ref(py).into_bound(py));
            }
        }
        let layout = self.layout(wanted);
        let array = wanted.make(py, &layout, &self.dtype(py)?, loan)?;
        if let (Some(view), None) = (wanted.view, loan) {
            let new = Seen {
                engine: wanted.engine,
                device: wanted.device,
                address: view.pointer.address,
                strides: view.strides.clone(),
                origin: view.origin.clone(),
                piece: wanted.piece,
                writes: wanted.writes,
                library: wanted.library,
                array: array.clone().into(),
            };
            let old = {
                let mut seen = self.seen.lock(py);
                // Those of runtimes that are closed are of no use any more.
                let mut old: Vec<Seen> = seen
                    .extract_if(.., |seen| seen.engine != wanted.engine)
                    .collect();
                if seen.len() >= SEEN {
                    old.push(seen.remove(0));
                }
                seen.push(new);
                old
            };
            drop(old);
        }
        Ok(array)
    }

    /// Where a device has the elements.
    fn layout(&self, wanted: &Wanted<'_>) -> Layout {
        let item = self.item;
        let axes = self.axes_of(wanted.piece);
        let shape: SmallVec<[usize; 4]> = axes.iter().filter_map(Axis::extent).collect();
        let Some(view) = wanted
            .view
            .filter(|_| shape.iter().all(|extent| *extent > 0))
        else {
            return Layout {
                strides: SmallVec::from_elem(signed(item), shape.len()),
                shape,
                address: 0,
                size: 0,
                offset: 0,
            };
        };
        let mut strides: SmallVec<[isize; 4]> = SmallVec::new();
        let (mut first, mut lowest, mut reach) = (0_i64, 0_i64, 0_i64);
        let mut real = 0;
        for axis in &axes {
            let (start, step, count) = match *axis {
                Axis::New => {
                    strides.push(0);
                    continue;
                }
                Axis::At(at) => (at, 0, 1),
                Axis::Along { start, step, count } => (start, step, count),
            };
            let stride = view.strides[real].cast_signed();
            first += (start as i64 - view.origin[real].cast_signed()) * stride;
            real += 1;
            if let Axis::Along { .. } = axis {
                let stride = stride * step as i64;
                strides.push(stride as isize);
                let length = stride * (signed(count) as i64 - 1);
                lowest += length.min(0);
                reach += length.abs();
            }
        }
        Layout {
            shape,
            strides,
            address: view.pointer.address.wrapping_add_signed(first + lowest),
            size: reach.unsigned_abs() + item as u64,
            offset: lowest.unsigned_abs(),
        }
    }

    /// The read-only view.
    pub fn readonly_view<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        if let Some(view) = self.readonly.get(py) {
            return Ok(view.bind(py).clone());
        }
        let view = self.view(py)?.call_method0(pyo3::intern!(py, "view"))?;
        let flags = view.getattr(pyo3::intern!(py, "flags"))?;
        flags.setattr(pyo3::intern!(py, "writeable"), false)?;
        Ok(keep(py, &self.readonly, view))
    }

    /// What an index selects, axis by axis. `IndexError` beyond an axis, `AccessError` for what is no
    /// basic indexing.
    fn selectors(&self, index: &Bound<'_, PyAny>) -> PyResult<SmallVec<[Selector; 4]>> {
        let py = index.py();
        let extents = self.extents();
        let one;
        let given = if let Ok(tuple) = index.cast::<PyTuple>() {
            tuple
        } else {
            one = PyTuple::new(py, [index])?;
            &one
        };
        let is_ellipsis = |index: &Bound<'_, PyAny>| index.is(PyEllipsis::get(py));
        let taken = given
            .iter()
            .filter(|index| !index.is_none() && !is_ellipsis(index))
            .count();
        if taken > extents.len() {
            return Err(PyIndexError::new_err(format!(
                "{}: {taken} indices for {} dimensions",
                self.text(),
                extents.len()
            )));
        }
        let mut left = extents.len() - taken;
        let mut selectors = SmallVec::new();
        let mut axis = 0;
        let whole = |extent: usize| Selector::Range {
            start: 0,
            step: 1,
            count: extent,
        };
        let mut ellipses = 0;
        for index in given {
            if is_ellipsis(&index) {
                ellipses += 1;
                if ellipses > 1 {
                    return Err(PyIndexError::new_err("an index has one ellipsis at most"));
                }
                for _ in 0..std::mem::take(&mut left) {
                    selectors.push(whole(extents[axis]));
                    axis += 1;
                }
                continue;
            }
            if index.is_none() {
                selectors.push(Selector::New);
                continue;
            }
            let extent = extents[axis];
            if let Ok(slice) = index.cast::<PySlice>() {
                let found = slice.indices(signed(extent))?;
                selectors.push(Selector::Range {
                    start: if found.slicelength == 0 {
                        0
                    } else {
                        found.start
                    },
                    step: if found.slicelength == 0 {
                        1
                    } else {
                        found.step
                    },
                    count: found.slicelength,
                });
            } else if let Some(at) = integer(&index)? {
                selectors.push(Selector::At(within(at, extent).ok_or_else(|| {
                    PyIndexError::new_err(format!(
                        "{}: index {at} is out of bounds for axis {axis} with size {extent}",
                        self.text()
                    ))
                })?));
            } else {
                return Err(access_error(
                    py,
                    format!(
                        "{}: a region is chosen by integers, slices, ... and None, not by {}",
                        self.text(),
                        index.get_type().name()?
                    ),
                ));
            }
            axis += 1;
        }
        for extent in &extents[axis..] {
            selectors.push(whole(*extent));
        }
        Ok(selectors)
    }

    /// The region that selectors choose, one for each axis that is seen. `AccessError` if that leaves
    /// nothing of an added axis, which the array has no indices for.
    fn select(slf: &Bound<'_, Self>, selectors: &[Selector]) -> PyResult<Self> {
        let this = slf.get();
        let mut axes = Axes::new();
        let mut next = this.axes.iter();
        for selector in selectors {
            if matches!(selector, Selector::New) {
                axes.push(Axis::New);
                continue;
            }
            // What is dropped stays where it is, since the parts are in the order of the array's axes.
            let mut seen = next.next().expect("a selector for each axis that is seen");
            while let Axis::At(_) = seen {
                axes.push(*seen);
                seen = next.next().expect("as above");
            }
            match (seen, selector) {
                (Axis::New, Selector::At(_)) => {}
                (Axis::New, Selector::Range { count: 0, .. }) => {
                    return Err(access_error(
                        slf.py(),
                        "an axis that an index added cannot be made empty",
                    ));
                }
                (Axis::New, _) => axes.push(Axis::New),
                _ => axes.push(seen.select(selector)),
            }
        }
        axes.extend(next.copied());
        Ok(Self::with_axes(slf, axes))
    }

    /// What people call it: the array's label, and the indices.
    pub fn text(&self) -> String {
        match self.array {
            None => self.part.datum().label().to_owned(),
            Some(_) => self.part.to_string(),
        }
    }
}

/// The position that an index names, counted from the end if it is negative.
fn within(at: isize, extent: usize) -> Option<isize> {
    let extent = signed(extent);
    let at = if at < 0 { at + extent } else { at };
    (0..extent).contains(&at).then_some(at)
}

/// Keeps an object that was made just now, unless another thread was first; gives the one that is kept.
fn keep<'py>(
    py: Python<'py>,
    slot: &PyOnceLock<PyRef>,
    made: Bound<'py, PyAny>,
) -> Bound<'py, PyAny> {
    let mine = PyRef::from(made.clone());
    match slot.set(py, mine) {
        Ok(()) => made,
        Err(_) => slot.get(py).expect("just refused").bind(py).clone(),
    }
}

/// What refuses to compute with a handle.
fn computes(region: &Bound<'_, Region>) -> PyErr {
    PyTypeError::new_err(format!(
        "{} is a handle of data that tasks order: compute in a task that takes it as ch.In, ch.Out or \
         ch.InOut, or on its copy, .numpy()",
        region.get().text()
    ))
}

#[pymethods]
impl Region {
    /// The extents of what a body sees.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.extents())
    }

    /// The number of dimensions that a body sees.
    #[getter]
    fn ndim(&self) -> usize {
        self.extents().len()
    }

    /// The number of elements.
    #[getter]
    fn size(&self) -> usize {
        self.elements()
    }

    /// The type of the elements, NumPy's.
    #[getter]
    pub fn dtype<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.buffer.bind(py).getattr(pyo3::intern!(py, "dtype"))
    }

    /// The bytes of the elements.
    #[getter]
    pub fn nbytes(&self) -> usize {
        self.item * self.elements()
    }

    /// The array that this is a part of; an array is its own.
    #[getter]
    fn base<'py>(slf: &Bound<'py, Self>) -> Bound<'py, PyAny> {
        match &slf.get().array {
            Some(array) => array.bind(slf.py()).clone(),
            None => slf.clone().into_any(),
        }
    }

    fn __len__(&self) -> PyResult<usize> {
        self.extents()
            .first()
            .copied()
            .ok_or_else(|| PyTypeError::new_err(format!("{} has no dimensions", self.text())))
    }

    fn __getitem__<'py>(
        slf: &Bound<'py, Self>,
        index: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, Self>> {
        let selectors = slf.get().selectors(index)?;
        Bound::new(slf.py(), Self::select(slf, &selectors)?)
    }

    /// A task that writes all of the region that the index chooses.
    fn __setitem__(
        slf: &Bound<'_, Self>,
        index: &Bound<'_, PyAny>,
        value: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let target = Self::__getitem__(slf, index)?;
        support(slf.py())
            .data
            .bind(slf.py())
            .call1(("assign", target, value))?;
        Ok(())
    }

    /// The regions along the first axis.
    fn __iter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let length = slf.get().__len__()?;
        let regions = (0..length)
            .map(|at| {
                let extents = &slf.get().extents()[1..];
                let mut selectors: SmallVec<[Selector; 4]> = SmallVec::new();
                selectors.push(Selector::At(signed(at)));
                selectors.extend(extents.iter().map(|extent| Selector::Range {
                    start: 0,
                    step: 1,
                    count: *extent,
                }));
                Bound::new(slf.py(), Self::select(slf, &selectors)?)
            })
            .collect::<PyResult<Vec<_>>>()?;
        Ok(PyList::new(slf.py(), regions)?.try_iter()?.into_any())
    }

    /// A private copy, as an array of NumPy's. It waits for the tasks that write the region, and has its
    /// place in spawn order. `DependencyError` if one of those failed.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let access = HostEntry::enter(py, slf.get(), data::Mode::In)?;
        let order = PyDict::new(py);
        order.set_item("order", "C")?;
        let copy = slf
            .get()
            .readonly_view(py)?
            .call_method("copy", (), Some(&order));
        drop(access);
        copy
    }

    /// As `numpy`, for NumPy. `ValueError` with `copy=False`: what it gives is always a copy.
    #[pyo3(signature = (dtype=None, *, copy=None))]
    fn __array__<'py>(
        slf: &Bound<'py, Self>,
        dtype: Option<&Bound<'py, PyAny>>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if copy == Some(false) {
            return Err(PyValueError::new_err(format!(
                "{} gives a private copy: with .host() it is looked at without one",
                slf.get().text()
            )));
        }
        let copy = Self::numpy(slf)?;
        match dtype {
            Some(dtype) => {
                let options = PyDict::new(slf.py());
                options.set_item("copy", false)?;
                copy.call_method("astype", (dtype,), Some(&options))
            }
            None => Ok(copy),
        }
    }

    /// As `numpy`, for whoever takes arrays by DLPack.
    #[pyo3(signature = (**options))]
    fn __dlpack__<'py>(
        slf: &Bound<'py, Self>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        Self::numpy(slf)?.call_method("__dlpack__", (), options)
    }

    /// The host's memory.
    #[allow(clippy::unused_self)]
    fn __dlpack_device__(&self) -> (u32, u32) {
        (1, 0)
    }

    /// An access of the host, as the block of a `with`: the elements without a copy, read-only for `"r"`.
    /// Tasks that are spawned before it and conflict are waited for, those that are spawned after it
    /// begins wait until it ends. `ValueError` for another mode.
    #[pyo3(signature = (mode="r"))]
    fn host(slf: Bound<'_, Self>, mode: &str) -> PyResult<HostAccess> {
        let writes = match mode {
            "r" => false,
            "rw" => true,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "the host reads, \"r\", or reads and writes, \"rw\": not {mode:?}"
                )));
            }
        };
        Ok(HostAccess {
            region: slf.unbind(),
            writes,
            entered: Attached::new(Vec::new()),
        })
    }

    /// Spawns the task that writes a value to every element.
    fn fill<'py>(slf: &Bound<'py, Self>, value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        support(slf.py())
            .data
            .bind(slf.py())
            .call1(("assign", slf, value))
    }

    /// Spawns a task that brings the region to a device, in its place in the order, so that it is there
    /// before a task needs it; to the host for `cpu`. It stays until its room is needed. `PlacementError` if
    /// there is no such device, `TypeError` for what is no device.
    fn prefetch<'py>(
        slf: &Bound<'py, Self>,
        device: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        Self::moved(slf, device, true)
    }

    /// Spawns a task that gives up what a device has of the region, in its place in the order; what is there
    /// alone comes to the host first. Nothing happens to what is not there. Raises what `prefetch` does.
    fn evict<'py>(
        slf: &Bound<'py, Self>,
        device: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        Self::moved(slf, device, false)
    }

    /// A grid of regions of this shape, from the first element on; the last ones are smaller where the
    /// extents leave a rest. `ValueError` for a shape of other dimensions, or with an extent below 1.
    fn tiles<'py>(slf: &Bound<'py, Self>, shape: &Bound<'py, PyAny>) -> PyResult<Tiles> {
        Tiles::new(slf, shape)
    }

    /// `n` regions that are as equal as can be along `axis`, none of them empty. `ValueError` if it has
    /// fewer than `n` indices, or there is no such axis.
    #[pyo3(signature = (n, *, axis=0))]
    fn shards<'py>(slf: &Bound<'py, Self>, n: isize, axis: isize) -> PyResult<Bound<'py, PyTuple>> {
        let extents = slf.get().extents();
        let wrong = |why: String| {
            PyValueError::new_err(format!("{} cannot be sharded: {why}", slf.get().text()))
        };
        let along = within(axis, extents.len())
            .ok_or_else(|| wrong(format!("no axis {axis} of {}", extents.len())))?
            .unsigned_abs();
        let extent = extents[along];
        if n < 1 || n.unsigned_abs() > extent {
            return Err(wrong(format!(
                "{n} shards of the {extent} indices of axis {along}"
            )));
        }
        let (least, larger) = (extent / n.unsigned_abs(), extent % n.unsigned_abs());
        let mut start = 0;
        let mut shards = Vec::new();
        for shard in 0..n.unsigned_abs() {
            let count = least + usize::from(shard < larger);
            let selectors: SmallVec<[Selector; 4]> = extents
                .iter()
                .enumerate()
                .map(|(axis, extent)| Selector::Range {
                    start: if axis == along { signed(start) } else { 0 },
                    step: 1,
                    count: if axis == along { count } else { *extent },
                })
                .collect();
            shards.push(Bound::new(slf.py(), Self::select(slf, &selectors)?)?);
            start += count;
        }
        PyTuple::new(slf.py(), shards)
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let this = slf.get();
        Ok(format!(
            "<{} {} {} {}>",
            slf.get_type().name()?,
            this.text(),
            this.shape(slf.py())?.repr()?,
            this.dtype(slf.py())?
        ))
    }

    fn __richcmp__<'py>(
        slf: &Bound<'py, Self>,
        other: &Bound<'py, PyAny>,
        operator: pyo3::basic::CompareOp,
    ) -> PyResult<Py<PyAny>> {
        use pyo3::basic::CompareOp;
        let py = slf.py();
        let equal = matches!(operator, CompareOp::Eq);
        if !equal && !matches!(operator, CompareOp::Ne) {
            return Err(computes(slf));
        }
        if let Ok(other) = other.cast::<Self>() {
            let (this, other) = (slf.get(), other.get());
            let same =
                Arc::ptr_eq(this.part.datum(), other.part.datum()) && this.axes == other.axes;
            return Ok((same == equal)
                .into_pyobject(py)?
                .to_owned()
                .into_any()
                .unbind());
        }
        if other.is_instance_of::<PyInt>()
            || other.is_instance_of::<pyo3::types::PyFloat>()
            || other.hasattr("__array__")?
        {
            return Err(computes(slf));
        }
        Ok(py.NotImplemented())
    }

    fn __hash__(&self) -> u64 {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        self.part.datum().id().hash(&mut hasher);
        self.axes.hash(&mut hasher);
        hasher.finish()
    }

    fn __bool__(slf: &Bound<'_, Self>) -> PyResult<bool> {
        Err(computes(slf))
    }

    /// NumPy asks first, and refuses for the same reason.
    #[classattr]
    fn __array_ufunc__() -> Option<bool> {
        None
    }

    fn __add__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __radd__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __sub__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __rsub__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __mul__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __rmul__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __truediv__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __rtruediv__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __floordiv__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __rfloordiv__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __mod__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __rmod__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __pow__(
        slf: &Bound<'_, Self>,
        _other: &Bound<'_, PyAny>,
        _modulo: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __rpow__(
        slf: &Bound<'_, Self>,
        _other: &Bound<'_, PyAny>,
        _modulo: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __matmul__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __rmatmul__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __lshift__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __rlshift__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __rshift__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __rrshift__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __and__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __rand__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __or__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __ror__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __xor__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __rxor__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __divmod__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __rdivmod__(slf: &Bound<'_, Self>, _other: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __neg__(slf: &Bound<'_, Self>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __pos__(slf: &Bound<'_, Self>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __abs__(slf: &Bound<'_, Self>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __invert__(slf: &Bound<'_, Self>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __int__(slf: &Bound<'_, Self>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __float__(slf: &Bound<'_, Self>) -> PyResult<()> {
        Err(computes(slf))
    }

    fn __complex__(slf: &Bound<'_, Self>) -> PyResult<()> {
        Err(computes(slf))
    }
}

#[pymethods]
impl Array {
    /// Of an array of NumPy's in C order, which it keeps and writes to; `charioteer/_data.py` says what
    /// is refused. With memory of a device the elements are there, in C order, and nothing is in the buffer.
    #[new]
    #[pyo3(signature = (buffer, name, memory=None))]
    fn new(
        buffer: &Bound<'_, PyAny>,
        name: &str,
        memory: Option<&Bound<'_, ForeignMemory>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let Some(head) = ArrayHead::of(buffer)? else {
            return Err(PyTypeError::new_err(
                "the buffer is to be an array of NumPy's",
            ));
        };
        if !head.has(C_CONTIGUOUS) || !head.has(WRITEABLE) || head.has_objects() {
            return Err(PyValueError::new_err(
                "the buffer is to be in C order, writable, and without objects",
            ));
        }
        let shape: SmallVec<[usize; 4]> = head
            .shape()
            .iter()
            .map(|extent| extent.unsigned_abs())
            .collect();
        let axes: Axes = shape
            .iter()
            .map(|count| Axis::Along {
                start: 0,
                step: 1,
                count: *count,
            })
            .collect();
        let item = buffer.getattr("itemsize")?.extract()?;
        let kept = memory.map(|memory| memory.get().keep(buffer.py()));
        let keep = Box::new((PyRef::from(buffer.clone()), kept));
        let adopted = memory.map(|memory| memory.get().adopted().clone());
        let extents: SmallVec<[u64; 4]> = shape.iter().map(|extent| *extent as u64).collect();
        let region = Region {
            part: Datum::adopting(name, &extents, item, head.address(), keep, adopted).whole(),
            buffer: buffer.clone().into(),
            axes,
            item,
            array: None,
            writable: PyOnceLock::new(),
            readonly: PyOnceLock::new(),
            seen: Attached::new(Vec::new()),
        };
        Ok(PyClassInitializer::from(region).add_subclass(Self))
    }

    /// Ends the array: waits for the tasks that use it, and refuses it from then on. A buffer that was
    /// taken over is its owner's again, memory of a device too.
    fn release(slf: &Bound<'_, Self>) -> PyResult<()> {
        let py = slf.py();
        let region = slf.as_super().get();
        if region.brought().is_some() {
            if runtime::is_open() && !region.part.datum().is_closed() {
                region.bring_back(py, true)?;
            }
            region.part.datum().close();
            return Ok(());
        }
        let access = match HostEntry::enter(py, region, data::Mode::InOut) {
            Ok(access) => access,
            // What it has is undefined, and is let go all the same.
            Err(error) if is_dependency_error(py, &error) => {
                HostEntry::enter(py, region, data::Mode::Out)?
            }
            Err(error) => return Err(error),
        };
        region.part.datum().close();
        drop(access);
        Ok(())
    }
}

/// An access of the host that is under way; none is needed while no runtime is open, since every task of
/// one that was left is done.
pub struct HostEntry {
    /// Ends with this.
    _access: Option<charioteer::engine::HostAccess<Interp>>,
}

impl HostEntry {
    pub fn enter(py: Python<'_>, region: &Region, mode: data::Mode) -> PyResult<Self> {
        Self::enter_all(py, &[region], mode, false)
    }

    /// Of the partials of a reduction at its end, at once, so that they come home side by side. There is a
    /// first one.
    pub fn at_last(py: Python<'_>, partials: &[&Region]) -> PyResult<Self> {
        Self::enter_all(py, partials, data::Mode::In, true)
    }

    fn enter_all(
        py: Python<'_>,
        regions: &[&Region],
        mode: data::Mode,
        at_last: bool,
    ) -> PyResult<Self> {
        let accesses = regions
            .iter()
            .map(|region| data::Access::new(&region.part, mode))
            .collect::<Vec<_>>();
        for datum in regions.iter().map(|region| region.part.datum()) {
            if datum.is_closed() {
                let closed = data::AccessTrouble::Closed(datum.label().to_owned());
                return Err(access_error(py, closed.to_string()));
            }
        }
        let region = regions[0];
        if !runtime::is_open() {
            if let Some((region, device)) = regions
                .iter()
                .find_map(|region| Some((region, region.brought()?)))
            {
                let text = region.text();
                return Err(access_error(
                    py,
                    format!(
                        "{text} is in memory of {device}, and is brought to the host while a runtime \
                         is open: without one it is where it was taken from"
                    ),
                ));
            }
            return match data::undefined(&accesses) {
                None => Ok(Self { _access: None }),
                Some(root) => Err(undefined(py, region, &root)),
            };
        }
        let engine = Arc::clone(&runtime::active(py)?.engine);
        let label = || Label::Name(format!("host access to {}", region.text()).into());
        let entered = if at_last {
            engine.host_access_at_last(label, &accesses)
        } else {
            engine.host_access(label, &accesses, None)
        };
        match entered {
            Ok(access) => Ok(Self {
                _access: Some(access),
            }),
            Err(HostError::Access(trouble)) => Err(access_error(py, trouble.to_string())),
            Err(HostError::Wait(error)) => Err(wait_error(py, error)),
            Err(HostError::Failed(root)) => Err(undefined(py, region, &root)),
            Err(HostError::Late) => Err(gateway::take_interrupt()
                .unwrap_or_else(|| PyRuntimeError::new_err("the wait was interrupted"))),
            Err(HostError::Closed) => Err(runtime::none(py)),
        }
    }
}

fn is_dependency_error(py: Python<'_>, error: &PyErr) -> bool {
    let class = py
        .import("charioteer.errors")
        .and_then(|errors| errors.getattr("DependencyError"));
    class.is_ok_and(|class| error.is_instance(py, &class))
}

/// What reading a region raises that a failed task was to write.
fn undefined(py: Python<'_>, region: &Region, root: &Task) -> PyErr {
    let cause = exception_of(py, root);
    Core::tell(root);
    let error = error(
        py,
        "DependencyError",
        (region.text(), root.label().to_string()),
    );
    error.set_cause(py, cause);
    error
}

/// The block of a `with` in which the host uses a region.
#[pyclass(module = "charioteer", frozen)]
pub struct HostAccess {
    region: Py<Region>,
    writes: bool,
    entered: Attached<Vec<HostEntry>>,
}

#[pymethods]
impl HostAccess {
    fn __enter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let region = self.region.get();
        let (mode, view) = if self.writes {
            (data::Mode::InOut, region.view(py)?)
        } else {
            (data::Mode::In, region.readonly_view(py)?)
        };
        region.bring_back(py, false)?;
        let entry = HostEntry::enter(py, region, mode)?;
        self.entered.lock(py).push(entry);
        Ok(view)
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        let entry = self.entered.lock(py).pop();
        drop(entry);
    }
}

/// A region as tiles of one shape, indexed by tile; `.base` is what it tiles.
#[pyclass(module = "charioteer", frozen)]
pub struct Tiles {
    base: Py<Region>,
    /// The partition of the array that the core knows; none of tiles of a part of it.
    grid: Option<Grid<Interp>>,
    tile: SmallVec<[usize; 4]>,
    shape: SmallVec<[usize; 4]>,
    slots: Box<[PyOnceLock<Py<Region>>]>,
}

impl Tiles {
    fn new(base: &Bound<'_, Region>, shape: &Bound<'_, PyAny>) -> PyResult<Self> {
        let this = base.get();
        let extents = this.extents();
        let wrong =
            |why: &str| PyValueError::new_err(format!("{} has no such tiles: {why}", this.text()));
        let tile: SmallVec<[isize; 4]> = match integer(shape)? {
            Some(one) => SmallVec::from_elem(one, 1),
            None => shape
                .try_iter()?
                .map(|extent| {
                    let extent = extent?;
                    integer(&extent)?.ok_or_else(|| {
                        PyTypeError::new_err(format!(
                            "the shape of a tile has integers, not {}",
                            extent.get_type()
                        ))
                    })
                })
                .collect::<PyResult<_>>()?,
        };
        if tile.len() != extents.len() {
            return Err(wrong(&format!(
                "the tile has {} dimensions, the region {}",
                tile.len(),
                extents.len()
            )));
        }
        if tile.iter().any(|extent| *extent < 1) {
            return Err(wrong("a tile has an extent of 1 or more"));
        }
        let tile: SmallVec<[usize; 4]> = tile.iter().map(|extent| extent.unsigned_abs()).collect();
        let shape: SmallVec<[usize; 4]> = extents
            .iter()
            .zip(&tile)
            .map(|(extent, tile)| extent.div_ceil(*tile))
            .collect();
        let grid = match this.array {
            None => {
                let tile: SmallVec<[u64; 4]> = tile.iter().map(|extent| *extent as u64).collect();
                Some(this.part.datum().grid(&tile))
            }
            Some(_) => None,
        };
        let count = shape.iter().product();
        Ok(Self {
            base: base.clone().unbind(),
            grid,
            tile,
            shape,
            slots: (0..count).map(|_| PyOnceLock::new()).collect(),
        })
    }

    /// The place of a tile among all, in C order.
    fn place(&self, index: &[usize]) -> usize {
        index
            .iter()
            .zip(&self.shape)
            .fold(0, |place, (at, extent)| place * extent + at)
    }

    fn get<'py>(&self, py: Python<'py>, index: &[usize]) -> PyResult<Bound<'py, Region>> {
        let slot = &self.slots[self.place(index)];
        if let Some(region) = slot.get(py) {
            return Ok(region.bind(py).clone());
        }
        let base = self.base.bind(py);
        let extents = base.get().extents();
        let selectors: SmallVec<[Selector; 4]> = (0..extents.len())
            .map(|axis| {
                let start = index[axis] * self.tile[axis];
                Selector::Range {
                    start: signed(start),
                    step: 1,
                    count: self.tile[axis].min(extents[axis] - start),
                }
            })
            .collect();
        let mut region = Region::select(base, &selectors)?;
        if let Some(grid) = &self.grid {
            let index: SmallVec<[u64; 4]> = index.iter().map(|at| *at as u64).collect();
            region.part = grid.tile(&index);
        }
        let made = Bound::new(py, region)?;
        match slot.set(py, made.clone().unbind()) {
            Ok(()) => Ok(made),
            Err(_) => Ok(slot.get(py).expect("just refused").bind(py).clone()),
        }
    }

    /// The tiles that an index names along one axis, and whether it names one.
    fn along(&self, axis: usize, index: &Bound<'_, PyAny>) -> PyResult<(Vec<usize>, bool)> {
        let extent = self.shape[axis];
        if let Ok(slice) = index.cast::<PySlice>() {
            let found = slice.indices(signed(extent))?;
            let tiles = (0..signed(found.slicelength))
                .map(|at| (found.start + at * found.step).unsigned_abs());
            return Ok((tiles.collect(), false));
        }
        let Some(at) = integer(index)? else {
            return Err(PyTypeError::new_err(format!(
                "a tile is named by integers, several by slices, not by {}",
                index.get_type().name()?
            )));
        };
        match within(at, extent) {
            Some(at) => Ok((vec![at.unsigned_abs()], true)),
            None => Err(PyIndexError::new_err(format!(
                "tile {at} is out of bounds for axis {axis} with {extent} tiles"
            ))),
        }
    }
}

#[pymethods]
impl Tiles {
    /// What it tiles.
    #[getter]
    fn base<'py>(&self, py: Python<'py>) -> Bound<'py, Region> {
        self.base.bind(py).clone()
    }

    /// The numbers of tiles along the axes.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// The shape of a tile; those at the end may be smaller.
    #[getter]
    fn tile<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.tile)
    }

    fn __len__(&self) -> usize {
        self.slots.len()
    }

    /// One tile for integers, the list of several, in C order, where there is a slice.
    fn __getitem__<'py>(
        &self,
        py: Python<'py>,
        index: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        // The ordinary case: integers alone, within the bounds.
        if let Ok(tuple) = index.cast_exact::<PyTuple>()
            && tuple.len() == self.shape.len()
        {
            let mut place: SmallVec<[usize; 4]> = SmallVec::new();
            for (at, extent) in tuple.iter_borrowed().zip(&self.shape) {
                if !at.is_exact_instance_of::<PyInt>() {
                    break;
                }
                match at.extract::<usize>() {
                    Ok(at) if at < *extent => place.push(at),
                    _ => break,
                }
            }
            if place.len() == self.shape.len() {
                return Ok(self.get(py, &place)?.into_any());
            }
        }
        let one;
        let given = if let Ok(tuple) = index.cast::<PyTuple>() {
            tuple
        } else {
            one = PyTuple::new(py, [index])?;
            &one
        };
        if given.len() != self.shape.len() {
            return Err(PyIndexError::new_err(format!(
                "{} indices for a grid of {} dimensions",
                given.len(),
                self.shape.len()
            )));
        }
        let axes = given
            .iter()
            .enumerate()
            .map(|(axis, index)| self.along(axis, &index))
            .collect::<PyResult<Vec<_>>>()?;
        let mut tiles: Vec<SmallVec<[usize; 4]>> = vec![SmallVec::new()];
        for (along, _) in &axes {
            let longer = |index: &SmallVec<[usize; 4]>| {
                let index = index.clone();
                along.iter().map(move |at| {
                    let mut longer = index.clone();
                    longer.push(*at);
                    longer
                })
            };
            tiles = tiles.iter().flat_map(longer).collect();
        }
        if axes.iter().all(|(_, one)| *one) {
            return Ok(self.get(py, &tiles[0])?.into_any());
        }
        let tiles = tiles
            .iter()
            .map(|index| self.get(py, index))
            .collect::<PyResult<Vec<_>>>()?;
        Ok(PyList::new(py, tiles)?.into_any())
    }

    /// All tiles, in C order.
    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let all = vec![PySlice::full(py); self.shape.len()];
        let tiles = if all.is_empty() {
            PyList::new(py, [self.get(py, &[])?])?.into_any()
        } else {
            self.__getitem__(py, &PyTuple::new(py, all)?.into_any())?
        };
        Ok(tiles.try_iter()?.into_any())
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!(
            "<Tiles of {}: {} of {}>",
            self.base.get().text(),
            self.shape(py)?.repr()?,
            self.tile(py)?.repr()?
        ))
    }
}

/// A region without data: what a task says it writes and another that it reads, so that they are ordered.
#[pyclass(module = "charioteer", frozen)]
pub struct Token {
    part: Part<Interp>,
}

impl Token {
    pub fn part(&self) -> &Part<Interp> {
        &self.part
    }
}

#[pymethods]
impl Token {
    #[new]
    #[pyo3(signature = (name))]
    fn new(name: &str) -> Self {
        Self {
            part: Datum::token(name).whole(),
        }
    }

    fn __repr__(&self) -> String {
        format!("<Token {}>", self.part.datum().label())
    }
}
