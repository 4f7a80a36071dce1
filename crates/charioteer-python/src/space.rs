//! `TaskSpace` and `TaskList`.
//!
//! A space makes the handle of an index on first touch and keeps it. The map is [`Attached`], and no
//! section calls Python: a handle is made first and put in afterwards, and the one
//! of two threads that comes second throws its own away.
//!
//! Without a GIL the map is in parts, each with a lock and with a copy of the name for the labels of
//! its tasks: threads that spawn into one space at once seldom meet at one lock or one count.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use charioteer::engine::Handle;
use charioteer::task::Until;
use pyo3::exceptions::{PyIndexError, PyTypeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyList, PyRange, PySlice, PyTuple, PyType};

use crate::attached::Attached;
use crate::interp::{Core, Label, Task};
use crate::task::{PyTask, awaiting_values, deadline, tasks_in, values, wait_for};

/// An index; most have one dimension to three.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Index {
    One(i64),
    Two(i64, i64),
    Three(i64, i64, i64),
    Many(Box<[i64]>),
}

impl Index {
    fn of(numbers: &[i64]) -> Self {
        match numbers {
            [one] => Self::One(*one),
            [one, two] => Self::Two(*one, *two),
            [one, two, three] => Self::Three(*one, *two, *three),
            many => Self::Many(many.into()),
        }
    }

    /// The index without the place in its block, and that place: neighbours in the last dimension
    /// share a block, so that programs that walk along it stay in the processor's cache.
    #[inline]
    fn block(&self) -> (Self, usize) {
        let split = |last: i64| {
            let place = usize::try_from(last.rem_euclid(BLOCK)).expect("smaller than a block");
            (last.div_euclid(BLOCK), place)
        };
        match self {
            Self::One(last) => {
                let (block, place) = split(*last);
                (Self::One(block), place)
            }
            Self::Two(one, last) => {
                let (block, place) = split(*last);
                (Self::Two(*one, block), place)
            }
            Self::Three(one, two, last) => {
                let (block, place) = split(*last);
                (Self::Three(*one, *two, block), place)
            }
            Self::Many(many) => {
                let mut many = many.clone();
                let last = many
                    .last_mut()
                    .expect("an index has at least one dimension");
                let (block, place) = split(*last);
                *last = block;
                (Self::Many(many), place)
            }
        }
    }

    /// The inverse of [`Index::block`].
    fn in_block(&self, place: usize) -> Self {
        let place = i64::try_from(place).expect("smaller than a block");
        match self {
            Self::One(block) => Self::One(block * BLOCK + place),
            Self::Two(one, block) => Self::Two(*one, block * BLOCK + place),
            Self::Three(one, two, block) => Self::Three(*one, *two, block * BLOCK + place),
            Self::Many(many) => {
                let mut many = many.clone();
                let last = many
                    .last_mut()
                    .expect("an index has at least one dimension");
                *last = *last * BLOCK + place;
                Self::Many(many)
            }
        }
    }

    pub fn to_vec(&self) -> Vec<i64> {
        match self {
            Self::One(one) => vec![*one],
            Self::Two(one, two) => vec![*one, *two],
            Self::Three(one, two, three) => vec![*one, *two, *three],
            Self::Many(many) => many.to_vec(),
        }
    }
}

/// Indices are small numbers that the program chose itself; a strong hash would only cost.
#[derive(Default, Clone, Copy)]
struct Fold(u64);

impl std::hash::Hasher for Fold {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0.rotate_left(5) ^ number).wrapping_mul(0x517C_C1B7_2722_0A95);
        self.0 ^= self.0 >> 32;
    }
    fn write_i64(&mut self, number: i64) {
        self.write_u64(number.cast_unsigned());
    }
    fn write_isize(&mut self, number: isize) {
        self.write_u64(number.cast_unsigned() as u64);
    }
    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }
}

type BuildFold = std::hash::BuildHasherDefault<Fold>;

/// How many neighbours share a block.
const BLOCK: i64 = 16;

type Block = [Option<Py<PyTask>>; BLOCK as usize];

/// The handles of a space.
#[derive(Default)]
struct Table {
    blocks: HashMap<Index, Box<Block>, BuildFold>,
    count: usize,
}

impl Table {
    #[inline]
    fn get(&self, index: &Index) -> Option<&Py<PyTask>> {
        let (block, place) = index.block();
        self.blocks.get(&block)?[place].as_ref()
    }

    /// Puts a handle in, unless there is one; gives the one that is there then.
    fn insert(&mut self, index: &Index, task: Py<PyTask>) -> (&Py<PyTask>, Option<Py<PyTask>>) {
        let (block, place) = index.block();
        let slot = &mut self.blocks.entry(block).or_default()[place];
        let mut unused = Some(task);
        if slot.is_none() {
            *slot = unused.take();
            self.count += 1;
        }
        (slot.as_ref().expect("filled above"), unused)
    }

    fn values(&self) -> impl Iterator<Item = &Py<PyTask>> {
        self.blocks
            .values()
            .flat_map(|block| block.iter().flatten())
    }

    fn iter(&self) -> impl Iterator<Item = (Index, &Py<PyTask>)> {
        self.blocks.iter().flat_map(|(index, block)| {
            block
                .iter()
                .enumerate()
                .filter_map(move |(place, task)| Some((index.in_block(place), task.as_ref()?)))
        })
    }

    /// Takes out the handles that `is_chosen` names.
    fn take(&mut self, is_chosen: impl Fn(&Py<PyTask>) -> bool) -> Vec<Py<PyTask>> {
        let mut taken = Vec::new();
        self.blocks.retain(|_, block| {
            for slot in block.iter_mut() {
                taken.extend(slot.take_if(|task| is_chosen(task)));
            }
            block.iter().any(Option::is_some)
        });
        self.count -= taken.len();
        taken
    }
}

/// How many parts a space has.
const PARTS: usize = if cfg!(Py_GIL_DISABLED) { 16 } else { 1 };

/// The handles of some of the blocks, and the name as their labels have it.
#[cfg_attr(Py_GIL_DISABLED, repr(align(128)))]
struct Part {
    /// A thin pointer, since every handle has one.
    name: Arc<Box<str>>,
    tasks: Attached<Table>,
}

/// An index of tasks in any number of dimensions.
#[pyclass(module = "charioteer", frozen, weakref)]
pub struct TaskSpace {
    start: Option<Vec<i64>>,
    shape: Option<Vec<i64>>,
    /// Of the first index that was touched; zero before.
    dimensions: AtomicUsize,
    parts: Box<[Part; PARTS]>,
}

/// What an index selects in one dimension.
enum Selector {
    At(i64),
    /// A slice; an end that is missing is `None`.
    Slice(Option<i64>, Option<i64>, i64),
    /// These, in this order.
    Each(Vec<i64>),
}

impl TaskSpace {
    fn name(&self) -> &str {
        &self.parts[0].name
    }

    /// The part that has an index.
    #[inline]
    fn part(&self, index: &Index) -> &Part {
        if PARTS == 1 {
            return &self.parts[0];
        }
        // The map uses bits from both ends.
        let hash = BuildFold::default().hash_one(index.block().0) >> 32;
        &self.parts[usize::try_from(hash).unwrap_or(0) % self.parts.len()]
    }

    fn count(&self, py: Python<'_>) -> usize {
        self.parts
            .iter()
            .map(|part| part.tasks.lock(py).count)
            .sum()
    }

    fn lower(&self, dimension: usize) -> i64 {
        self.start
            .as_ref()
            .and_then(|start| start.get(dimension).copied())
            .unwrap_or(0)
    }

    fn upper(&self, dimension: usize) -> Option<i64> {
        let size = *self.shape.as_ref()?.get(dimension)?;
        Some(self.lower(dimension) + size)
    }

    /// The handle at an index that lies in the bounds.
    fn handle(&self, py: Python<'_>, numbers: &[i64]) -> PyResult<Py<PyTask>> {
        let index = Index::of(numbers);
        let dimensions = match self.dimensions.load(Ordering::Relaxed) {
            0 => match self.dimensions.compare_exchange(
                0,
                numbers.len(),
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => numbers.len(),
                Err(dimensions) => dimensions,
            },
            dimensions => dimensions,
        };
        if dimensions != numbers.len() {
            return Err(PyIndexError::new_err(format!(
                "{} has {dimensions} dimensions, the index {}",
                self.name(),
                numbers.len()
            )));
        }
        let part = self.part(&index);
        if let Some(task) = part.tasks.lock(py).get(&index) {
            return Ok(task.clone_ref(py));
        }
        let label = Label::Index(Arc::clone(&part.name), index.clone());
        let mine = PyTask::of(Handle::unspawned(label))
            .into_object(py)?
            .unbind();
        let mut tasks = part.tasks.lock(py);
        let (kept, unused) = tasks.insert(&index, mine);
        let kept = kept.clone_ref(py);
        drop(tasks);
        drop(unused);
        Ok(kept)
    }

    /// The handle at an index of few numbers alone in a space without a shape, the ordinary case;
    /// `None` of any other index.
    #[inline]
    fn ordinary(&self, py: Python<'_>, index: &Bound<'_, PyAny>) -> PyResult<Option<Py<PyTask>>> {
        if self.shape.is_some() {
            return Ok(None);
        }
        let mut numbers = [0; 3];
        let dimensions = if index.is_exact_instance_of::<PyInt>() {
            numbers[0] = index.extract()?;
            1
        } else if let Ok(tuple) = index.cast_exact::<PyTuple>()
            && (1..=numbers.len()).contains(&tuple.len())
        {
            for (number, part) in numbers.iter_mut().zip(tuple.iter_borrowed()) {
                match part.extract() {
                    Ok(found) => *number = found,
                    Err(_) => return Ok(None),
                }
            }
            tuple.len()
        } else {
            return Ok(None);
        };
        let numbers = &numbers[..dimensions];
        let fits = |start: &Vec<i64>| start.len() == dimensions;
        let below = |(dimension, number): (usize, &i64)| *number < self.lower(dimension);
        if !self.start.as_ref().is_none_or(fits) || numbers.iter().enumerate().any(below) {
            return Ok(None);
        }
        self.handle(py, numbers).map(Some)
    }

    /// The handles that a list of numbers alone selects in a space without bounds; `None` of any other index.
    fn listed(
        &self,
        py: Python<'_>,
        index: &Bound<'_, PyAny>,
    ) -> PyResult<Option<Vec<Py<PyTask>>>> {
        let Ok(list) = index.cast_exact::<PyList>() else {
            return Ok(None);
        };
        let whole = |number: &Bound<'_, PyAny>| number.is_exact_instance_of::<PyInt>();
        if self.shape.is_some() || self.start.is_some() || !list.iter().all(|it| whole(&it)) {
            return Ok(None);
        }
        let mut handles = Vec::with_capacity(list.len());
        for number in list.iter() {
            let number: i64 = number.extract()?;
            if number >= 0 {
                handles.push(self.handle(py, &[number])?);
            }
        }
        Ok(Some(handles))
    }

    fn selectors(&self, index: &Bound<'_, PyAny>) -> PyResult<Vec<Selector>> {
        let one = |index: &Bound<'_, PyAny>| -> PyResult<Selector> {
            if let Ok(slice) = index.cast::<PySlice>() {
                let part = |name: &str| -> PyResult<Option<i64>> {
                    let part = slice.getattr(name)?;
                    if part.is_none() {
                        return Ok(None);
                    }
                    number(&part).map(Some)
                };
                let step = part("step")?.unwrap_or(1);
                if step < 1 {
                    return Err(PyValueError::new_err("the step of a slice is positive"));
                }
                return Ok(Selector::Slice(part("start")?, part("stop")?, step));
            }
            if is_several(index) {
                let each = index.try_iter()?.map(|one| number(&one?));
                return Ok(Selector::Each(each.collect::<PyResult<_>>()?));
            }
            number(index).map(Selector::At)
        };
        let selectors = if let Ok(tuple) = index.cast::<PyTuple>() {
            tuple
                .iter()
                .map(|index| one(&index))
                .collect::<PyResult<Vec<_>>>()?
        } else {
            vec![one(index)?]
        };
        if selectors.is_empty() {
            return Err(PyIndexError::new_err("an index has at least one dimension"));
        }
        let several = |selector: &&Selector| matches!(selector, Selector::Each(_));
        if selectors.iter().filter(several).count() > 1 {
            // NumPy would take the pairs, and slices all combinations.
            return Err(PyIndexError::new_err(
                "an index has one list at most: it is not clear which combinations of two are meant",
            ));
        }
        let known = match (&self.shape, &self.start) {
            (Some(bounds), _) | (None, Some(bounds)) => Some(bounds.len()),
            (None, None) => {
                Some(self.dimensions.load(Ordering::Relaxed)).filter(|known| *known != 0)
            }
        };
        if let Some(dimensions) = known {
            let all =
                selectors.len() == 1 && matches!(selectors[0], Selector::Slice(None, None, 1));
            if selectors.len() != dimensions && !all {
                return Err(PyIndexError::new_err(format!(
                    "{} has {dimensions} dimensions, the index {}",
                    self.name(),
                    selectors.len()
                )));
            }
        }
        Ok(selectors)
    }

    /// The numbers that a selector names, all of them; `None` if it is open.
    fn named(&self, dimension: usize, selector: &Selector) -> PyResult<Option<Vec<i64>>> {
        let lower = self.lower(dimension);
        let upper = self.upper(dimension);
        let inside = |at: i64| {
            if upper.is_some_and(|upper| at >= upper) {
                return Err(PyIndexError::new_err(format!(
                    "{}: index {at} in dimension {dimension} lies beyond the shape",
                    self.name()
                )));
            }
            Ok(at >= lower)
        };
        match *selector {
            Selector::At(at) => Ok(Some(if inside(at)? { vec![at] } else { Vec::new() })),
            Selector::Each(ref each) => {
                let mut kept = Vec::with_capacity(each.len());
                for &at in each {
                    if inside(at)? {
                        kept.push(at);
                    }
                }
                Ok(Some(kept))
            }
            Selector::Slice(start, stop, step) => {
                let Some(stop) = stop.or(upper) else {
                    return Ok(None);
                };
                if start.is_none() && upper.is_none() && self.start.is_none() && stop <= lower {
                    return Ok(Some(Vec::new()));
                }
                let stop = upper.map_or(stop, |upper| stop.min(upper));
                let start = start.unwrap_or(lower).max(lower);
                let step = usize::try_from(step).unwrap_or(usize::MAX);
                Ok(Some((start..stop).step_by(step).collect()))
            }
        }
    }

    /// The handles that an index selects: dense where all its slices are bounded, else those
    /// touched so far.
    fn select(&self, py: Python<'_>, index: &Bound<'_, PyAny>) -> PyResult<Vec<Py<PyTask>>> {
        let selectors = self.selectors(index)?;
        let named = selectors
            .iter()
            .enumerate()
            .map(|(dimension, selector)| self.named(dimension, selector))
            .collect::<PyResult<Vec<_>>>()?;
        let whole = selectors
            .iter()
            .all(|selector| matches!(selector, Selector::Slice(None, None, 1)));
        if whole || named.iter().any(Option::is_none) {
            return Ok(self.touched(py, Some(&selectors)));
        }
        let named: Vec<Vec<i64>> = named.into_iter().flatten().collect();
        let mut handles = Vec::new();
        let mut index = vec![0; named.len()];
        if named.iter().any(Vec::is_empty) {
            return Ok(handles);
        }
        loop {
            let numbers: Vec<i64> = index
                .iter()
                .zip(&named)
                .map(|(at, numbers)| numbers[*at])
                .collect();
            handles.push(self.handle(py, &numbers)?);
            // The last dimension is the fastest.
            let mut dimension = named.len();
            loop {
                if dimension == 0 {
                    return Ok(handles);
                }
                dimension -= 1;
                index[dimension] += 1;
                if index[dimension] < named[dimension].len() {
                    break;
                }
                index[dimension] = 0;
            }
        }
    }

    /// The handles touched so far that the selectors match, ordered by index.
    fn touched(&self, py: Python<'_>, selectors: Option<&[Selector]>) -> Vec<Py<PyTask>> {
        let mut found: Vec<(Vec<i64>, Py<PyTask>)> = Vec::new();
        for part in self.parts.iter() {
            let tasks = part.tasks.lock(py);
            found.extend(
                tasks
                    .iter()
                    .map(|(index, task)| (index.to_vec(), task.clone_ref(py))),
            );
        }
        if let Some(selectors) = selectors {
            let all = selectors
                .iter()
                .all(|selector| matches!(selector, Selector::Slice(None, None, 1)));
            if !all {
                found.retain(|(index, _)| {
                    index.len() == selectors.len()
                        && index.iter().zip(selectors).enumerate().all(
                            |(dimension, (number, selector))| match *selector {
                                Selector::At(at) => *number == at,
                                Selector::Each(ref each) => each.contains(number),
                                Selector::Slice(start, stop, step) => {
                                    let start = start.unwrap_or_else(|| self.lower(dimension));
                                    *number >= start
                                        && stop.is_none_or(|stop| *number < stop)
                                        && (*number - start) % step == 0
                                }
                            },
                        )
                });
            }
        }
        found.sort_by(|one, other| one.0.cmp(&other.0));
        found.into_iter().map(|(_, task)| task).collect()
    }

    /// The tasks touched so far.
    pub fn touched_tasks(&self, py: Python<'_>, into: &mut impl Extend<Task>) {
        for part in self.parts.iter() {
            let tasks = part.tasks.lock(py);
            into.extend(tasks.values().map(|task| Arc::clone(task.get().task())));
        }
    }

    pub fn list(&self, py: Python<'_>) -> TaskList {
        TaskList::of_objects(self.touched(py, None))
    }
}

/// Whether a part of an index names several numbers one by one.
fn is_several(index: &Bound<'_, PyAny>) -> bool {
    index.is_instance_of::<PyList>() || index.is_instance_of::<PyRange>()
}

fn number(index: &Bound<'_, PyAny>) -> PyResult<i64> {
    let wrong = || -> PyErr {
        let name = index.get_type().name().map_or_else(
            |_| "an object".to_owned(),
            |name| name.to_string_lossy().into_owned(),
        );
        PyTypeError::new_err(format!(
            "an index is made of integers, slices, lists and ranges, not {name}"
        ))
    };
    if index.is_exact_instance_of::<PyInt>() {
        return index.extract();
    }
    let Some(method) = index.getattr_opt("__index__")? else {
        return Err(wrong());
    };
    method.call0()?.extract()
}

fn bounds(given: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Vec<i64>>> {
    let Some(given) = given else { return Ok(None) };
    if let Ok(tuple) = given.cast::<PyTuple>() {
        return tuple
            .iter()
            .map(|one| number(&one))
            .collect::<PyResult<_>>()
            .map(Some);
    }
    if let Ok(list) = given.cast::<PyList>() {
        return list
            .iter()
            .map(|one| number(&one))
            .collect::<PyResult<_>>()
            .map(Some);
    }
    Ok(Some(vec![number(given)?]))
}

#[pymethods]
impl TaskSpace {
    #[new]
    #[pyo3(signature = (name=None, *, shape=None, start=None))]
    fn new(
        name: Option<&str>,
        shape: Option<&Bound<'_, PyAny>>,
        start: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let shape = bounds(shape)?;
        let start = bounds(start)?;
        if let Some(shape) = &shape {
            if shape.iter().any(|size| *size < 0) {
                return Err(PyValueError::new_err("a shape has no negative size"));
            }
            if start
                .as_ref()
                .is_some_and(|start| start.len() != shape.len())
            {
                return Err(PyValueError::new_err(
                    "shape and start have the same number of dimensions",
                ));
            }
        }
        let name = name.unwrap_or("T");
        Ok(Self {
            start,
            shape,
            dimensions: AtomicUsize::new(0),
            parts: Box::new(std::array::from_fn(|_| Part {
                name: Arc::new(name.into()),
                tasks: Attached::new(Table::default()),
            })),
        })
    }

    /// The name, for people.
    #[getter(name)]
    fn get_name(&self) -> &str {
        self.name()
    }

    fn __getitem__<'py>(
        &self,
        py: Python<'py>,
        index: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if let Some(task) = self.ordinary(py, index)? {
            return Ok(task.into_bound(py).into_any());
        }
        if let Some(handles) = self.listed(py, index)? {
            return Ok(Bound::new(py, TaskList::of_objects(handles))?.into_any());
        }
        let is_list =
            |part: &Bound<'_, PyAny>| part.is_instance_of::<PySlice>() || is_several(part);
        let single = match index.cast::<PyTuple>() {
            Ok(tuple) => !tuple.iter().any(|part| is_list(&part)),
            Err(_) => !is_list(index),
        };
        let mut handles = self.select(py, index)?;
        if single && handles.len() == 1 {
            return Ok(handles.remove(0).into_bound(py).into_any());
        }
        Ok(Bound::new(py, TaskList::of_objects(handles))?.into_any())
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        self.count(py)
    }

    #[allow(clippy::unused_self)]
    fn __bool__(&self) -> bool {
        true
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let list = PyList::new(py, self.touched(py, None))?;
        Ok(list.try_iter()?.into_any())
    }

    fn __contains__(&self, thing: &Bound<'_, PyAny>) -> bool {
        let Ok(task) = thing.cast::<PyTask>() else {
            return false;
        };
        let task = task.get().task();
        self.parts.iter().any(|part| {
            let tasks = part.tasks.lock(thing.py());
            tasks
                .values()
                .any(|other| Arc::ptr_eq(other.get().task(), task))
        })
    }

    /// Indexing that takes only the handles touched so far: `T.view[2:5]`.
    #[getter]
    fn view(slf: Bound<'_, Self>) -> View {
        View(slf.unbind())
    }

    /// The tasks touched so far.
    fn tasks(&self, py: Python<'_>) -> TaskList {
        self.list(py)
    }

    /// Forgets the finished handles of `selection`, or of all.
    #[pyo3(signature = (selection=None))]
    fn clear(&self, py: Python<'_>, selection: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let mut chosen = Vec::new();
        if let Some(selection) = selection {
            tasks_in(selection, &mut chosen)?;
        } else {
            self.touched_tasks(py, &mut chosen);
        }
        let chosen: std::collections::HashSet<usize> = chosen
            .iter()
            .filter(|task| task.is_done())
            .map(|task| Arc::as_ptr(task) as usize)
            .collect();
        for part in self.parts.iter() {
            let gone = part
                .tasks
                .lock(py)
                .take(|task| chosen.contains(&(Arc::as_ptr(task.get().task()) as usize)));
            drop(gone);
        }
        Ok(())
    }

    /// The results of the tasks touched so far, in the order of their indices.
    #[pyo3(signature = (timeout=None))]
    fn result(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Py<PyAny>> {
        self.list(py).result(py, timeout)
    }

    /// Cancels the tasks touched so far; whether all are cancelled.
    fn cancel(&self, py: Python<'_>) -> bool {
        self.list(py).cancel()
    }

    fn __await__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.list(py).__await__(py)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("<TaskSpace {} with {} tasks>", self.name(), self.count(py))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Only a thread that is stopped in the middle of a look-up could have it: then the collector
        // comes again.
        for part in self.parts.iter() {
            if let Some(tasks) = part.tasks.try_lock() {
                for task in tasks.values() {
                    visit.call(task)?;
                }
            }
        }
        Ok(())
    }

    fn __clear__(&self, py: Python<'_>) {
        for part in self.parts.iter() {
            let gone = std::mem::take(&mut *part.tasks.lock(py));
            drop(gone);
        }
    }
}

/// Indexing of a space that makes no handles.
#[pyclass(module = "charioteer._core", frozen)]
pub struct View(Py<TaskSpace>);

#[pymethods]
impl View {
    fn __getitem__(&self, py: Python<'_>, index: &Bound<'_, PyAny>) -> PyResult<TaskList> {
        let space = self.0.get();
        let selectors = space.selectors(index)?;
        Ok(TaskList::of_objects(space.touched(py, Some(&selectors))))
    }
}

enum Items {
    Objects(Vec<Py<PyTask>>),
    Handles(Vec<PyTask>),
}

/// A sequence of tasks.
#[pyclass(module = "charioteer", frozen, weakref, sequence)]
pub struct TaskList(Items);

impl TaskList {
    pub fn of_objects(tasks: Vec<Py<PyTask>>) -> Self {
        Self(Items::Objects(tasks))
    }

    pub fn of_handles(tasks: Vec<PyTask>) -> Self {
        Self(Items::Handles(tasks))
    }

    pub fn is_empty(&self) -> bool {
        self.__len__() == 0
    }

    /// The tasks.
    pub fn tasks(&self, into: &mut impl Extend<Task>) {
        match &self.0 {
            Items::Objects(tasks) => {
                into.extend(tasks.iter().map(|task| Arc::clone(task.get().task())));
            }
            Items::Handles(tasks) => {
                into.extend(tasks.iter().map(|task| Arc::clone(task.task())));
            }
        }
    }

    fn all(&self) -> Vec<Task> {
        let mut tasks = Vec::with_capacity(self.__len__());
        self.tasks(&mut tasks);
        tasks
    }

    fn object(&self, py: Python<'_>, at: usize) -> PyResult<Py<PyTask>> {
        match &self.0 {
            Items::Objects(tasks) => Ok(tasks[at].clone_ref(py)),
            Items::Handles(tasks) => PyTask::object(py, Arc::clone(tasks[at].task())),
        }
    }
}

#[pymethods]
impl TaskList {
    #[new]
    #[pyo3(signature = (tasks, /))]
    fn new(tasks: &Bound<'_, PyAny>) -> PyResult<Self> {
        let mut all = Vec::new();
        tasks_in(tasks, &mut all)?;
        Ok(Self::of_handles(all.into_iter().map(PyTask::new).collect()))
    }

    fn __len__(&self) -> usize {
        match &self.0 {
            Items::Objects(tasks) => tasks.len(),
            Items::Handles(tasks) => tasks.len(),
        }
    }

    fn __getitem__<'py>(
        &self,
        py: Python<'py>,
        index: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let length = self.__len__();
        if let Ok(slice) = index.cast::<PySlice>() {
            let length = isize::try_from(length).expect("a vector's length fits");
            let parts = slice.indices(length)?;
            let mut tasks = Vec::with_capacity(parts.slicelength);
            let mut at = parts.start;
            for _ in 0..parts.slicelength {
                tasks.push(self.object(py, at.cast_unsigned())?);
                at += parts.step;
            }
            return Ok(Bound::new(py, Self::of_objects(tasks))?.into_any());
        }
        let at = number(index)?;
        let from_end = i64::try_from(length).expect("a vector's length fits");
        let at = if at < 0 { at + from_end } else { at };
        match usize::try_from(at) {
            Ok(at) if at < length => Ok(self.object(py, at)?.into_bound(py).into_any()),
            _ => Err(PyIndexError::new_err(
                "the index lies outside of the list of tasks",
            )),
        }
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let tasks = (0..self.__len__())
            .map(|at| self.object(py, at))
            .collect::<PyResult<Vec<_>>>()?;
        Ok(PyList::new(py, tasks)?.try_iter()?.into_any())
    }

    fn __contains__(&self, thing: &Bound<'_, PyAny>) -> bool {
        let Ok(task) = thing.cast::<PyTask>() else {
            return false;
        };
        let task = task.get().task();
        self.all().iter().any(|other| Arc::ptr_eq(other, task))
    }

    /// Waits for all and gives the list of their results; the first failure in order is raised.
    #[pyo3(signature = (timeout=None))]
    pub fn result(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Py<PyAny>> {
        if let Items::Objects(tasks) = &self.0 {
            tasks.iter().for_each(PyTask::show);
        }
        let tasks = self.all();
        if !wait_for(py, &tasks, Until::All, deadline(timeout)?)? {
            let left = tasks.iter().filter(|task| !task.is_done()).count();
            return Err(pyo3::exceptions::PyTimeoutError::new_err(format!(
                "{left} of {} tasks are not done after {} s",
                tasks.len(),
                timeout.unwrap_or(f64::INFINITY)
            )));
        }
        values(py, &tasks)
    }

    /// Whether all are done.
    fn done(&self) -> bool {
        self.all().iter().all(|task| task.is_done())
    }

    /// Cancels every task; whether all are cancelled.
    pub fn cancel(&self) -> bool {
        let mut all = true;
        for task in self.all() {
            all &= Core::cancel(&task);
        }
        all
    }

    pub fn __await__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let awaiting = Bound::new(py, awaiting_values(self.all()))?;
        awaiting.call_method0("__await__")
    }

    #[classmethod]
    #[pyo3(signature = (item, /))]
    fn __class_getitem__(cls: Bound<'_, PyType>, item: Bound<'_, PyAny>) -> Py<PyType> {
        let _ = item;
        cls.unbind()
    }

    fn __repr__(&self) -> String {
        let tasks = self.all();
        let done = tasks.iter().filter(|task| task.is_done()).count();
        format!("<TaskList of {} tasks, {done} done>", tasks.len())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Items::Objects(tasks) = &self.0 {
            for task in tasks {
                visit.call(task)?;
            }
        }
        Ok(())
    }

    #[allow(clippy::unused_self)]
    fn __clear__(&self) {
        // A list does not change; the spaces and dictionaries in a cycle with it are cleared.
    }
}
