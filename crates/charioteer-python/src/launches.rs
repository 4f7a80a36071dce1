//! Kernels of GPUs as bodies.
//!
//! # Protocol
//!
//! A [`Code`] is a kernel and what it takes: what `ch.kernel` makes. With the shape of a launch it is a
//! [`Launch`], which is what the task function `k[grid, block]` has for `.fn`. What the code is on each
//! GPU of a runtime's machine is found out where the first task is spawned there, attached: Python
//! (`charioteer/_kernels.py`) gives an image for the GPU's compute capability, compiled if need be, or a
//! handle of another library's. So what is wrong with the code is the spawner's error.
//!
//! Arguments are converted where the task is spawned, too: to the words that the driver is to copy, each
//! of which is a value or the address of an array's data on a GPU. The body is then plain data, and
//! [`Call::run`] enqueues the kernel on the task's stream, on a thread that is not attached. What the
//! addresses point into is kept with the body, which the task keeps until its work is complete. Only
//! where handles stand among the arguments the body runs attached, to convert what they gave.
//!
//! An array is one parameter, its address. With `strided` it is the address, the extents and the strides
//! (bytes), each a parameter of 64 bits, and for a kernel of Numba what Numba's arrays are:
//! null, null, the number of elements, their size, the address, extents, strides.
//!
//! A region of a managed array is where the core has it by then: its address, and the strides, are put among
//! the words when the kernel is launched, on a copy of them, since another attempt may find it elsewhere.
//!
//! Errors of a launch are [`Failure`]s: exceptions are made of them where somebody receives them.

use std::ffi::CString;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::time::Instant;

use charioteer::data::store::View;
use charioteer::engine::{Engine, Running};
use charioteer::gang::Member;
use charioteer::machine::{Device, DeviceError, DeviceId, Kind as DeviceKind, Stream};
use charioteer::mapping::On;
use charioteer::sync::assert_unlocked;
use charioteer::task::{Need, Options, Step, Trouble};
use charioteer_cuda::{CudaGpu, Dimensions, Kernel};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyInt, PyString, PyTuple};
use smallvec::SmallVec;

use crate::access::{Mode, Signature, Slot};
use crate::attached::Attached;
use crate::callable::intern;
use crate::data::{Axes, Axis, place};
use crate::devices::raise;
use crate::gateway::{self, PyRef, Site};
use crate::interp::{Arguments, Core, Interp, Raised, Value, substitute, trouble};
use crate::libraries;
use crate::native::{DtypeHead, Plain, Scalar, convert, name_of_scalar, not_a};
use crate::options::{Keywords, keywords};
use crate::placement::body_of;
use crate::runtime;
use crate::spawn::TaskFunction;
use crate::support::{error, support};

/// What a parameter of a call is.
#[derive(Clone, Copy)]
enum Kind {
    Value(Scalar),
    Array {
        mode: Mode,
        dtype: Option<Scalar>,
        /// How many axes it has to have.
        axes: Option<usize>,
    },
}

/// What an array is to a kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    Pointer,
    Strided,
    Numba,
}

/// A kernel and what is known of it.
pub struct Code {
    name: &'static str,
    kernel: Kernel,
    /// Says what it is on a GPU.
    provide: PyRef,
    parameters: Box<[Kind]>,
    layout: Layout,
    /// The engine whose GPUs all have it, which was the last one to need it.
    ready: AtomicU32,
    /// The sizes of the kernel's own parameters, where the driver tells them.
    sizes: OnceLock<Box<[usize]>>,
    /// What it does with its arrays; none if it takes none.
    modes: Option<Arc<Signature>>,
}

/// A kernel and the shape of its launch.
pub struct Launch {
    code: Arc<Code>,
    dimensions: Dimensions,
}

/// Why a kernel was not launched.
pub struct Failure {
    kernel: &'static str,
    why: DeviceError,
}

impl Failure {
    /// The exception for it.
    pub fn error(&self, py: Python<'_>) -> PyErr {
        match &self.why {
            DeviceError::Operation(_, why) => error(py, "KernelError", (self.kernel, &**why)),
            why => raise(py, why),
        }
    }
}

impl Code {
    /// Finds out what the kernel is on the GPUs of an engine. `KernelError` for code that cannot be
    /// compiled or loaded, `TypeError` if the kernel takes something else than was said.
    fn make_ready(&self, py: Python<'_>, engine: &Core) -> PyResult<()> {
        let number = Engine::<Interp>::id(engine);
        if self.ready.load(Ordering::Acquire) == number {
            return Ok(());
        }
        let gpus = &engine.domain().gpus;
        for gpu in gpus {
            if self.kernel.is_on(gpu) {
                continue;
            }
            let (major, minor) = gpu.capability();
            let (kind, code, entry): (String, Bound<'_, PyAny>, String) = self
                .provide
                .bind(py)
                .call1((major, minor, gpu.ordinal()))?
                .extract()?;
            match kind.as_str() {
                "image" => {
                    let image = code.cast::<PyBytes>()?;
                    let alike: Vec<&CudaGpu> = gpus
                        .iter()
                        .filter(|other| other.capability() == gpu.capability())
                        .map(|other| &**other)
                        .collect();
                    self.load(py, &alike, image.as_bytes(), entry)?;
                }
                // SAFETY: handles of the library whose object `provide` keeps, which says what they are.
                "kernel" => unsafe { self.kernel.adopt_kernel(gpu, code.extract()?) },
                // SAFETY: as above.
                _ => unsafe { self.kernel.adopt_function(gpu, code.extract()?) },
            }
            self.check(py, gpu)?;
        }
        self.ready.store(number, Ordering::Release);
        Ok(())
    }

    fn load(&self, py: Python<'_>, gpus: &[&CudaGpu], image: &[u8], entry: String) -> PyResult<()> {
        let entry = CString::new(entry)
            .map_err(|_| PyValueError::new_err("the name of a kernel has no zeros in it"))?;
        // PTX ends with one; to other images it is no harm.
        let image: Vec<u8> = image.iter().copied().chain([0]).collect();
        gateway::detach(py, Site::Native, || self.kernel.load(gpus, &image, &entry))
            .map_err(|why| error(py, "KernelError", (self.name, why)))
    }

    /// That the kernel takes as many parameters as it gets, and of these sizes, as far as that is known.
    fn check(&self, py: Python<'_>, gpu: &CudaGpu) -> PyResult<()> {
        let Some(sizes) = gateway::detach(py, Site::Native, || self.kernel.parameters(gpu)) else {
            return Ok(());
        };
        if self.layout == Layout::Pointer {
            self.check_count(self.parameters.len(), sizes.len())?;
            for (number, (kind, size)) in self.parameters.iter().zip(&sizes).enumerate() {
                let (what, bytes) = match kind {
                    Kind::Value(scalar) => (name_of_scalar(*scalar), scalar.bytes()),
                    Kind::Array { .. } => ("a pointer".to_owned(), 8),
                };
                if bytes != *size {
                    return Err(PyTypeError::new_err(format!(
                        "{}: parameter {} is {what} by params, and the kernel takes {size} bytes there",
                        self.name,
                        number + 1
                    )));
                }
            }
        }
        let _ = self.sizes.set(sizes.into());
        Ok(())
    }

    fn check_count(&self, given: usize, takes: usize) -> PyResult<()> {
        if given == takes {
            return Ok(());
        }
        Err(PyTypeError::new_err(format!(
            "{}: the kernel has {takes} parameters, and params comes to {given}",
            self.name
        )))
    }

    /// An error that says which argument it is about.
    fn wrong(&self, py: Python<'_>, number: usize, error: &PyErr) -> PyErr {
        let text = format!(
            "{}: argument {}: {}",
            self.name,
            number + 1,
            error.value(py)
        );
        if error.is_instance_of::<PyTypeError>(py) {
            PyTypeError::new_err(text)
        } else {
            PyValueError::new_err(text)
        }
    }
}

/// The arguments of a launch.
struct Packed {
    words: SmallVec<[u64; 8]>,
    /// Where the value of each of the kernel's parameters begins.
    starts: SmallVec<[u16; 8]>,
    /// What is known at the launch alone.
    late: SmallVec<[Late; 2]>,
    /// Keeps what addresses among them point into.
    _kept: Option<PyRef>,
}

/// A region among the arguments.
struct Late {
    /// Its place among the accesses of the task.
    access: usize,
    axes: Axes,
    /// The size of an element.
    item: i64,
    /// Where the words for its address and for its strides are; without these it has to be contiguous.
    address: usize,
    strides: Option<usize>,
}

impl Packed {
    fn push(&mut self, word: u64) {
        let at = u16::try_from(self.words.len()).expect("kernels take fewer bytes than 2^16");
        self.starts.push(at);
        self.words.push(word);
    }
}

impl Launch {
    pub fn name(&self) -> &'static str {
        self.code.name
    }

    /// What it does with its arrays.
    pub fn modes(&self) -> Option<Arc<Signature>> {
        self.code.modes.clone()
    }

    /// That a call needs no arguments, as an inline task has none.
    pub fn check_inline(&self) -> PyResult<()> {
        if self.code.parameters.is_empty() {
            return Ok(());
        }
        Err(PyTypeError::new_err(format!(
            "{name} takes {} arguments, and a kernel has no defaults to stand for them: call \
             {name}[grid, block].options(...)(...) instead of spawning it inline",
            self.code.parameters.len(),
            name = self.code.name
        )))
    }

    /// Converts the arguments of a call. `TypeError` and `ValueError` name the argument.
    fn pack(&self, py: Python<'_>, arguments: &Arguments) -> PyResult<Packed> {
        let one;
        let (given, kept): (&[Bound<'_, PyAny>], _) = match arguments {
            Arguments::None => (&[], None),
            Arguments::One(argument) => {
                one = [argument.bind(py).clone()];
                (&one, Some(argument))
            }
            Arguments::Many(many) => (many.bind(py).cast::<PyTuple>()?.as_slice(), Some(many)),
            Arguments::Named(_) => {
                return Err(PyTypeError::new_err(format!(
                    "{} takes no keyword arguments: kernels do not name their parameters",
                    self.code.name
                )));
            }
        };
        self.pack_all(py, given, kept)
    }

    fn pack_all(
        &self,
        py: Python<'_>,
        given: &[Bound<'_, PyAny>],
        kept: Option<&PyRef>,
    ) -> PyResult<Packed> {
        let code = &self.code;
        if given.len() != code.parameters.len() {
            return Err(PyTypeError::new_err(format!(
                "{} takes {} arguments, not {}",
                code.name,
                code.parameters.len(),
                given.len()
            )));
        }
        let mut packed = Packed {
            words: SmallVec::new(),
            starts: SmallVec::new(),
            late: SmallVec::new(),
            _kept: None,
        };
        let mut arrays = false;
        for (number, (kind, argument)) in code.parameters.iter().zip(given).enumerate() {
            match *kind {
                Kind::Value(scalar) => {
                    let mut words = [0; 2];
                    convert(scalar, argument, &mut words)
                        .map_err(|error| code.wrong(py, number, &error))?;
                    packed.push(words[0]);
                    packed
                        .words
                        .extend(words[1..scalar.words()].iter().copied());
                }
                Kind::Array { mode, dtype, axes } => {
                    arrays = true;
                    let wants = Wants {
                        writes: mode != Mode::In,
                        dtype,
                        axes,
                        layout: code.layout,
                    };
                    let pack = match argument.cast::<Slot>() {
                        Ok(slot) => pack_region(py, slot.get(), wants, &mut packed),
                        Err(_) => pack_array(argument, wants, &mut packed),
                    };
                    pack.map_err(|error| code.wrong(py, number, &error))?;
                }
            }
        }
        if code.layout != Layout::Pointer
            && let Some(sizes) = code.sizes.get()
        {
            code.check_count(packed.starts.len(), sizes.len())?;
        }
        packed._kept = kept
            .filter(|_| arrays)
            .map(|kept| PyRef::new(kept.clone_ref(py)));
        Ok(packed)
    }

    /// Enqueues it now. Touches no Python API, and may be called by any thread.
    fn enqueue(&self, packed: &Packed, gpu: &CudaGpu, stream: Stream) -> Result<(), Failure> {
        let (kernel, shape) = (&self.code.kernel, &self.dimensions);
        // SAFETY: the arguments are what was said of the kernel, which is the maker's promise; arrays are
        // kept with the words, and the body that has both outlives its work.
        unsafe { gpu.launch(kernel, shape, &packed.words, &packed.starts, stream) }
            .map_err(|why| self.failure(why))
    }

    /// Enqueues it as all that a task does, with these words for those of the arguments.
    fn enqueue_alone(
        &self,
        packed: &Packed,
        words: &[u64],
        gpu: &CudaGpu,
        stream: Stream,
    ) -> Result<(), Failure> {
        let (kernel, shape) = (&self.code.kernel, &self.dimensions);
        // SAFETY: as above.
        unsafe { gpu.launch_deferred(kernel, shape, words, &packed.starts, stream) }
            .map_err(|why| self.failure(why))
    }

    fn failure(&self, why: DeviceError) -> Failure {
        Failure {
            kernel: self.code.name,
            why,
        }
    }
}

/// What an argument for an array has to be.
#[derive(Clone, Copy)]
struct Wants {
    writes: bool,
    dtype: Option<Scalar>,
    axes: Option<usize>,
    layout: Layout,
}

/// An array on a GPU, as its library describes it.
struct Found {
    address: u64,
    /// If it is one of C.
    scalar: Option<Scalar>,
    contiguous: bool,
    readonly: bool,
    /// Extents, and strides in bytes; empty where nobody asked for them.
    shape: SmallVec<[u64; 4]>,
    strides: SmallVec<[i64; 4]>,
}

/// Of a region, all but what is known when it is launched.
fn pack_region(py: Python<'_>, slot: &Slot, wants: Wants, into: &mut Packed) -> PyResult<()> {
    if slot.operation().is_some() {
        return Err(PyTypeError::new_err("kernels do not reduce"));
    }
    let region = slot.region().bind(py).get();
    let dtype = region.dtype(py)?;
    // SAFETY: the dtype of managed arrays is NumPy's.
    let scalar = unsafe { DtypeHead::scalar_of(&dtype) };
    let axes = region.axes();
    let shape: SmallVec<[u64; 4]> = axes
        .iter()
        .filter_map(Axis::extent)
        .map(|extent| extent as u64)
        .collect();
    wants.check(scalar, shape.len())?;
    let mut late = Late {
        access: slot.access(),
        axes,
        item: dtype.getattr(pyo3::intern!(py, "itemsize"))?.extract()?,
        address: into.words.len(),
        strides: None,
    };
    if wants.layout == Layout::Numba {
        let item = late.item.cast_unsigned();
        for word in [0, 0, shape.iter().product(), item] {
            into.push(word);
        }
        late.address = into.words.len();
    }
    into.push(0);
    if wants.layout != Layout::Pointer {
        shape.iter().for_each(|extent| into.push(*extent));
        late.strides = Some(into.words.len());
        shape.iter().for_each(|_| into.push(0));
    }
    into.late.push(late);
    Ok(())
}

impl Wants {
    fn check(&self, scalar: Option<Scalar>, axes: usize) -> PyResult<()> {
        if let Some(dtype) = self.dtype
            && scalar != Some(dtype)
        {
            let has = scalar.map_or_else(|| "another type".to_owned(), name_of_scalar);
            return Err(PyTypeError::new_err(format!(
                "expects an array of {}, not of {has}",
                name_of_scalar(dtype)
            )));
        }
        if let Some(wanted) = self.axes
            && wanted != axes
        {
            return Err(PyTypeError::new_err(format!(
                "expects an array with {wanted} axes, not {axes}"
            )));
        }
        Ok(())
    }
}

impl Late {
    /// Puts the address, and the strides if they are wanted, among the words; false if it is not
    /// contiguous, and has to be.
    fn fill(&self, view: Option<&View>, words: &mut [u64]) -> bool {
        let Some(view) = view else {
            // A region without elements is nowhere.
            return true;
        };
        let (address, strides) = place(&self.axes, view);
        words[self.address] = address;
        if let Some(at) = self.strides {
            for (word, stride) in words[at..].iter_mut().zip(&strides) {
                *word = stride.cast_unsigned();
            }
            return true;
        }
        let shape: SmallVec<[u64; 4]> = self
            .axes
            .iter()
            .filter_map(Axis::extent)
            .map(|extent| extent as u64)
            .collect();
        is_contiguous(&shape, &strides, self.item)
    }
}

/// Whether an array with these strides, in bytes, is in C's order.
fn is_contiguous(shape: &[u64], strides: &[i64], item: i64) -> bool {
    let plain = c_strides(shape, item);
    // Where there is one step, or none, the stride is never used.
    let same = shape
        .iter()
        .zip(strides.iter().zip(&plain))
        .all(|(extent, (stride, plain))| *extent == 1 || stride == plain);
    same || shape.contains(&0)
}

fn pack_array(given: &Bound<'_, PyAny>, wants: Wants, into: &mut Packed) -> PyResult<()> {
    let found = find(given, wants.layout != Layout::Pointer)?;
    wants.check(found.scalar, found.shape.len())?;
    if wants.writes && found.readonly {
        return Err(PyValueError::new_err("the array is read-only"));
    }
    match wants.layout {
        Layout::Pointer => {
            if !found.contiguous {
                return Err(PyValueError::new_err(
                    "the array is not C-contiguous: strided=True passes extents and strides too",
                ));
            }
            into.push(found.address);
            return Ok(());
        }
        Layout::Strided => into.push(found.address),
        Layout::Numba => {
            let item = found.scalar.map_or(0, Scalar::bytes) as u64;
            for word in [0, 0, found.shape.iter().product(), item, found.address] {
                into.push(word);
            }
        }
    }
    for extent in &found.shape {
        into.push(*extent);
    }
    for stride in &found.strides {
        into.push(stride.cast_unsigned());
    }
    Ok(())
}

/// The class of CuPy's arrays, once one was seen; it lives as long as the process.
static CUPY: AtomicPtr<ffi::PyTypeObject> = AtomicPtr::new(std::ptr::null_mut());

/// Where an array is, and what it is like; its shape if somebody wants it.
fn find(given: &Bound<'_, PyAny>, shaped: bool) -> PyResult<Found> {
    let py = given.py();
    let class = given.get_type();
    let is_cupy = class.as_type_ptr() == CUPY.load(Ordering::Relaxed);
    if is_cupy || is_of(&class, "cupy", "ndarray") {
        if !is_cupy {
            // Never given back: the class of a library that stays.
            CUPY.store(class.clone().into_ptr().cast(), Ordering::Relaxed);
        }
        return find_cupy(given, shaped);
    }
    if given.hasattr(pyo3::intern!(py, "data_ptr"))? && given.hasattr("is_cuda")? {
        return find_torch(given, shaped);
    }
    match given.getattr_opt(pyo3::intern!(py, "__cuda_array_interface__"))? {
        Some(described) => find_described(&described, shaped),
        None => Err(not_a("an array on a GPU", given)),
    }
}

fn is_of(class: &Bound<'_, pyo3::types::PyType>, module: &str, name: &str) -> bool {
    let says = |said: PyResult<Bound<'_, PyString>>, wanted| said.is_ok_and(|said| said == wanted);
    says(class.name(), name)
        && class
            .module()
            .is_ok_and(|said| said.to_string_lossy().split('.').next() == Some(module))
}

/// The strides of an array in C's order.
fn c_strides(shape: &[u64], item: i64) -> SmallVec<[i64; 4]> {
    let mut strides: SmallVec<[i64; 4]> = SmallVec::with_capacity(shape.len());
    let mut stride = item;
    for extent in shape.iter().rev() {
        strides.push(stride);
        stride = stride.saturating_mul(i64::try_from(*extent).unwrap_or(i64::MAX));
    }
    strides.reverse();
    strides
}

fn find_cupy(given: &Bound<'_, PyAny>, shaped: bool) -> PyResult<Found> {
    let py = given.py();
    let data = given.getattr(pyo3::intern!(py, "data"))?;
    let dtype = given.getattr(pyo3::intern!(py, "dtype"))?;
    let mut found = Found {
        address: data.getattr(pyo3::intern!(py, "ptr"))?.extract()?,
        // SAFETY: the dtype of CuPy's arrays is NumPy's.
        scalar: unsafe { DtypeHead::scalar_of(&dtype) },
        contiguous: given
            .getattr(pyo3::intern!(py, "_c_contiguous"))?
            .extract()?,
        readonly: false,
        shape: SmallVec::new(),
        strides: SmallVec::new(),
    };
    if shaped {
        found.shape = given.getattr("shape")?.extract::<Vec<u64>>()?.into();
        found.strides = given.getattr("strides")?.extract::<Vec<i64>>()?.into();
    }
    Ok(found)
}

fn find_torch(given: &Bound<'_, PyAny>, shaped: bool) -> PyResult<Found> {
    let py = given.py();
    if !given.getattr(pyo3::intern!(py, "is_cuda"))?.is_truthy()? {
        return Err(PyTypeError::new_err(
            "expects an array on a GPU, and the tensor is in the host's memory",
        ));
    }
    let dtype = given.getattr(pyo3::intern!(py, "dtype"))?;
    let code: String = support(py)
        .kernels
        .bind(py)
        .call1(("torch_code", dtype))?
        .extract()?;
    let mut found = Found {
        address: given
            .call_method0(pyo3::intern!(py, "data_ptr"))?
            .extract()?,
        scalar: Scalar::parse(&code),
        contiguous: given
            .call_method0(pyo3::intern!(py, "is_contiguous"))?
            .is_truthy()?,
        readonly: false,
        shape: SmallVec::new(),
        strides: SmallVec::new(),
    };
    if shaped {
        let item: i64 = given.call_method0("element_size")?.extract()?;
        let strides: Vec<i64> = given.call_method0("stride")?.extract()?;
        found.shape = given.getattr("shape")?.extract::<Vec<u64>>()?.into();
        found.strides = strides.into_iter().map(|stride| stride * item).collect();
    }
    Ok(found)
}

/// Of a `__cuda_array_interface__`.
fn find_described(described: &Bound<'_, PyAny>, shaped: bool) -> PyResult<Found> {
    let (address, readonly): (u64, bool) = described.get_item("data")?.extract()?;
    let kind: String = described.get_item("typestr")?.extract()?;
    let shape: SmallVec<[u64; 4]> = described.get_item("shape")?.extract::<Vec<u64>>()?.into();
    let strides = described.call_method1("get", ("strides",))?;
    let item: i64 = kind
        .get(2..)
        .and_then(|size| size.parse().ok())
        .unwrap_or(1);
    let (contiguous, strides) = if strides.is_none() {
        (true, c_strides(&shape, item))
    } else {
        let strides: SmallVec<[i64; 4]> = strides.extract::<Vec<i64>>()?.into();
        (is_contiguous(&shape, &strides, item), strides)
    };
    let foreign = if cfg!(target_endian = "little") {
        '>'
    } else {
        '<'
    };
    let scalar = match kind.get(1..) {
        Some("b1") => Some(Scalar::Bool),
        Some(code) if !kind.starts_with(foreign) => Scalar::parse(code),
        _ => None,
    };
    let mut found = Found {
        address,
        scalar,
        contiguous,
        readonly,
        shape: SmallVec::new(),
        strides: SmallVec::new(),
    };
    if shaped {
        found.shape = shape;
        found.strides = strides;
    }
    Ok(found)
}

// ---- bodies -------------------------------------------------------------------------------------

/// A launch as the body of a task.
pub struct Call {
    launch: Arc<Launch>,
    state: State,
}

enum State {
    Packed(Packed),
    /// There are handles among the arguments; what they gave is converted anew by each attempt, and kept.
    Held(Arguments, Option<Packed>),
}

impl Call {
    /// Makes the code ready on the GPUs of the engine, and converts the arguments, unless they hold
    /// handles. `options` say where the task may run; of a task that may run several bodies, this is
    /// number `body`. `PlacementError` where kernels cannot run.
    pub fn new(
        py: Python<'_>,
        engine: &Core,
        launch: Arc<Launch>,
        arguments: Arguments,
        substitute: bool,
        (options, body): (Option<&Options>, Option<usize>),
    ) -> PyResult<Self> {
        let refuse = |why: String| Err(error(py, "PlacementError", (why,)));
        let name = launch.code.name;
        if engine.domain().gpus.is_empty() {
            let what = match engine.machine() {
                Some(machine) if machine.gpus() != 0 => "virtual GPUs run no kernels",
                _ => "the machine has no GPU",
            };
            return refuse(format!(
                "{name}: a kernel runs on a GPU of the CUDA driver: {what}"
            ));
        }
        if !has_one_gpu(options, body) {
            return refuse(format!(
                "{name}: a kernel runs on one GPU: say placement=gpu, or a GPU such as gpu(0)"
            ));
        }
        launch.code.make_ready(py, engine)?;
        let state = if substitute {
            if let Arguments::Named(_) = arguments {
                launch.pack(py, &arguments)?;
            }
            State::Held(arguments, None)
        } else {
            State::Packed(launch.pack(py, &arguments)?)
        };
        Ok(Self { launch, state })
    }

    /// Whether it has to run attached.
    pub fn needs_session(&self) -> bool {
        matches!(self.state, State::Held(..))
    }

    /// Runs the body, whether the thread is attached or not.
    pub fn run(&mut self, running: &Running<'_, Interp>) -> Step<Interp> {
        let result = if gateway::is_attached() {
            // SAFETY: just asked.
            let py = unsafe { Python::assume_attached() };
            self.run_attached(py, running)
        } else {
            let State::Packed(packed) = &self.state else {
                unreachable!("it needs a session")
            };
            assert_unlocked();
            self.launch.start(packed, running).map_err(raised)
        };
        Step::Done(result.map(|()| Value::Plain(Plain::None)))
    }

    fn run_attached(
        &mut self,
        py: Python<'_>,
        running: &Running<'_, Interp>,
    ) -> Result<(), Trouble<Interp>> {
        if let State::Held(arguments, given) = &mut self.state {
            let converted = convert_held(py, &self.launch, arguments)
                .map_err(|error| trouble(py, running.engine, running.task, error))?;
            *given = Some(converted);
        }
        let (State::Packed(packed) | State::Held(_, Some(packed))) = &self.state else {
            unreachable!("just converted")
        };
        let launch = &self.launch;
        // The driver blocks where a stream has many launches before it.
        gateway::detach(py, Site::Native, || launch.start(packed, running)).map_err(raised)
    }
}

fn raised(failure: Failure) -> Trouble<Interp> {
    Trouble::Raised(Raised::Launch(failure))
}

fn convert_held(py: Python<'_>, launch: &Launch, arguments: &Arguments) -> PyResult<Packed> {
    let (given, _) = substitute(py, arguments, &mut |_| {
        unreachable!("kernels do not reduce")
    })?;
    let kept = given.clone().into();
    launch.pack_all(py, given.as_slice(), Some(&kept))
}

impl Launch {
    /// Enqueues it on the stream of the task that runs on this thread.
    fn start(&self, packed: &Packed, running: &Running<'_, Interp>) -> Result<(), Failure> {
        match running.lent().as_slice() {
            [(device, stream)] => {
                let gpu = &running.engine.domain().gpus[usize::from(device.index())];
                libraries::occupy(gpu);
                if packed.late.is_empty() {
                    return self.enqueue_alone(packed, &packed.words, gpu, *stream);
                }
                let views = running.engine.views_of(running.task);
                let views = views.as_ref().and_then(|views| views.first());
                let mut words = packed.words.clone();
                for late in &packed.late {
                    let view = views.and_then(|views| views.get(late.access)?.as_deref());
                    if !late.fill(view, &mut words) {
                        let why = "a region is not C-contiguous where it is: strided=True passes its \
                                   extents and strides too";
                        return Err(Failure {
                            kernel: self.code.name,
                            why: DeviceError::Operation(*device, why.into()),
                        });
                    }
                }
                self.enqueue_alone(packed, &words, gpu, *stream)
            }
            _ => Err(Failure {
                kernel: self.code.name,
                why: DeviceError::Lost(DeviceId::gpu(0), "it gives no stream".into()),
            }),
        }
    }
}

/// Whether each set on which a body may run is one GPU.
fn has_one_gpu(options: Option<&Options>, body: Option<usize>) -> bool {
    let Some(options) = options else { return false };
    let alone = |set: &charioteer::gang::Alternative| match &set.members[..] {
        [Member::Device(_)] => true,
        [Member::Any(kind)] => *kind == DeviceKind::Gpu,
        _ => false,
    };
    match (&options.mapping, &options.devices) {
        (Some(mapping), _) => mapping
            .choices()
            .list()
            .iter()
            .filter(|choice| body.is_none_or(|body| body == body_of(choice.variant)))
            .all(|choice| match &choice.on {
                On::Devices(set) => alone(set),
                On::Cores(_) => false,
            }),
        (None, Some(sets)) => options.need == Need::Devices && sets.iter().all(alone),
        (None, None) => false,
    }
}

// ---- what Python has of them --------------------------------------------------------------------

/// A kernel: what `ch.kernel` makes. `k[grid, block]` is a task function.
#[pyclass(name = "Kernel", module = "charioteer", frozen, weakref)]
pub struct PyKernel {
    code: Arc<Code>,
    said: Keywords,
    signature: String,
    /// The shape that was asked for last, and its task function.
    last: Attached<Option<(Dimensions, PyRef)>>,
}

#[pymethods]
impl PyKernel {
    /// `parameters` are kinds (`value`, `in`, `out`, `inout`, `commute`), codes, which are empty where
    /// there is none to say, and numbers of axes; `_kernels.py` writes them.
    #[new]
    #[pyo3(signature = (
        name, provide, parameters, layout, signature, *, dependencies=None, priority=None,
        placement=None, share=None, memory=None, cost=None, size=None, timeout=None, retries=None
    ))]
    #[expect(clippy::too_many_arguments, reason = "from one place")]
    fn new(
        name: &str,
        provide: Bound<'_, PyAny>,
        parameters: Vec<(String, String, Option<usize>)>,
        layout: &str,
        signature: String,
        dependencies: Option<&Bound<'_, PyAny>>,
        priority: Option<&Bound<'_, PyAny>>,
        placement: Option<&Bound<'_, PyAny>>,
        share: Option<&Bound<'_, PyAny>>,
        memory: Option<&Bound<'_, PyAny>>,
        cost: Option<&Bound<'_, PyAny>>,
        size: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
        retries: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let said = keywords(
            None,
            dependencies,
            priority,
            placement,
            share,
            memory,
            cost,
            size,
            timeout,
            retries,
            [None; 4],
            [None; 3],
        )?;
        let kind = |(kind, code, axes): (String, String, Option<usize>)| {
            let scalar = Scalar::parse(&code);
            let mode = match kind.as_str() {
                "value" => {
                    let scalar = scalar.ok_or_else(|| {
                        PyValueError::new_err(format!("no type of C has this code: {code:?}"))
                    })?;
                    return Ok(Kind::Value(scalar));
                }
                "in" => Mode::In,
                "out" => Mode::Out,
                "inout" => Mode::InOut,
                "commute" => Mode::Commute,
                _ => {
                    return Err(PyValueError::new_err(format!(
                        "no kind of parameter: {kind}"
                    )));
                }
            };
            Ok(Kind::Array {
                mode,
                dtype: scalar,
                axes,
            })
        };
        let code = Code {
            name: intern(name),
            kernel: Kernel::new(),
            provide: provide.into(),
            parameters: parameters.into_iter().map(kind).collect::<PyResult<_>>()?,
            layout: match layout {
                "pointer" => Layout::Pointer,
                "strided" => Layout::Strided,
                _ => Layout::Numba,
            },
            ready: AtomicU32::new(u32::MAX),
            sizes: OnceLock::new(),
            modes: None,
        };
        let modes = code.parameters.iter().map(|kind| match kind {
            Kind::Array { mode, .. } => Some(*mode),
            Kind::Value(_) => None,
        });
        let code = Code {
            modes: Signature::native(code.name, modes),
            ..code
        };
        Ok(Self {
            code: Arc::new(code),
            said: said.of_function(),
            signature,
            last: Attached::new(None),
        })
    }

    /// The task function of launches of one shape: `k[grid, block]` or `k[grid, block, shared]`.
    fn __getitem__<'py>(
        &self,
        py: Python<'py>,
        shape: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let dimensions = dimensions(shape)?;
        let known = {
            let last = self.last.lock(py);
            let same = last.as_ref().filter(|(shape, _)| *shape == dimensions);
            // A new reference calls nothing.
            same.map(|(_, made)| made.clone_ref(py))
        };
        if let Some(made) = known {
            return Ok(made.into_bound(py));
        }
        let launch = KernelLaunch(Arc::new(Launch {
            code: Arc::clone(&self.code),
            dimensions,
        }));
        let function = Bound::new(py, launch)?.into_any();
        let made = TaskFunction::plain(function, self.said.clone())?.into_any();
        let old = self
            .last
            .lock(py)
            .replace((dimensions, made.clone().into()));
        drop(old);
        Ok(made)
    }

    #[pyo3(signature = (*_arguments, **_keywords))]
    fn __call__(
        &self,
        _arguments: &Bound<'_, PyTuple>,
        _keywords: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        Err(PyTypeError::new_err(format!(
            "{name}: say grid and block, {name}[grid, block](...)",
            name = self.code.name
        )))
    }

    #[getter]
    fn __name__(&self) -> &'static str {
        self.code.name
    }

    fn __repr__(&self) -> String {
        format!("<kernel {}>", self.signature)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.said.traverse(&visit)?;
        if let Some(last) = self.last.try_lock()
            && let Some((_, made)) = &*last
        {
            visit.call(made.get())?;
        }
        // Where a pending task shares the code, the collector would take the reference for this
        // object's own.
        if Arc::strong_count(&self.code) == 1 {
            visit.call(self.code.provide.get())?;
        }
        Ok(())
    }

    fn __clear__(&self) {
        if let Some(mut last) = self.last.try_lock_mut() {
            let old = last.take();
            drop(last);
            drop(old);
        }
    }
}

/// A kernel with the shape of a launch: what `k[grid, block]` has for `.fn`. Called in the body of a task on
/// a GPU, it puts the kernel on the stream of the device that is current there.
#[pyclass(module = "charioteer._core", frozen, weakref)]
pub struct KernelLaunch(Arc<Launch>);

impl KernelLaunch {
    pub fn launch(&self) -> &Arc<Launch> {
        &self.0
    }

    /// Converts the arguments of a call in the body of a task on a GPU, and calls `enqueue` with them, detached.
    fn call<R: Send>(
        &self,
        py: Python<'_>,
        arguments: &Bound<'_, PyTuple>,
        enqueue: impl FnOnce(&Launch, &Packed, &CudaGpu, Stream) -> Result<R, Failure> + Send,
    ) -> PyResult<R> {
        let Some((device, stream)) = libraries::current() else {
            return Err(error(
                py,
                "PlacementError",
                (format!(
                    "{}: .fn is for the body of a task on a GPU of the CUDA driver; \
                     k[grid, block](...) spawns a task",
                    self.0.code.name
                ),),
            ));
        };
        let active = runtime::active(py)?;
        let engine = &active.engine;
        self.0.code.make_ready(py, engine)?;
        let packed = self.0.pack_all(py, arguments.as_slice(), None)?;
        let gpu = &engine.domain().gpus[usize::from(device.index())];
        gateway::detach(py, Site::Native, || enqueue(&self.0, &packed, gpu, stream))
            .map_err(|failure| failure.error(py))
    }
}

/// After so many launches [`launch_loop`] asks how far the GPU is, so that events are used again.
const ASKED: usize = 64;

/// The seconds that it takes to launch a kernel `count` times from a loop in Rust, an event behind each launch:
/// what the driver takes of tasks that are kernels, without a runtime. For the body of a task on a GPU.
#[pyfunction]
#[pyo3(signature = (launch, count, *arguments))]
pub fn launch_loop(
    py: Python<'_>,
    launch: &Bound<'_, KernelLaunch>,
    count: usize,
    arguments: &Bound<'_, PyTuple>,
) -> PyResult<f64> {
    launch
        .get()
        .call(py, arguments, |launch, packed, gpu, stream| {
            let failure = |why| launch.failure(why);
            let start = Instant::now();
            for number in 1..=count {
                launch.enqueue(packed, gpu, stream)?;
                let event = gpu.record(stream).map_err(failure)?;
                if number.is_multiple_of(ASKED) {
                    gpu.is_complete(event).map_err(failure)?;
                }
            }
            Ok(start.elapsed().as_secs_f64())
        })
}

#[pymethods]
impl KernelLaunch {
    #[pyo3(signature = (*arguments))]
    fn __call__(&self, py: Python<'_>, arguments: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.call(py, arguments, Launch::enqueue)
    }

    #[getter]
    fn __name__(&self) -> &'static str {
        self.0.code.name
    }

    #[getter]
    fn __qualname__(&self) -> &'static str {
        self.0.code.name
    }

    fn __repr__(&self) -> String {
        let Dimensions {
            grid,
            block,
            shared,
        } = self.0.dimensions;
        format!(
            "<kernel {}[{grid:?}, {block:?}, {shared}]>",
            self.0.code.name
        )
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if Arc::strong_count(&self.0) == 1 && Arc::strong_count(&self.0.code) == 1 {
            visit.call(self.0.code.provide.get())?;
        }
        Ok(())
    }

    #[allow(clippy::unused_self)]
    fn __clear__(&self) {
        // The code never changes; the containers in a cycle with it are cleared instead.
    }
}

/// The most blocks along each axis, and the most threads of a block.
const MOST_BLOCKS: [u32; 3] = [i32::MAX as u32, 65_535, 65_535];
const MOST_THREADS: [u32; 3] = [1024, 1024, 64];

/// Reads `grid, block` or `grid, block, shared`.
fn dimensions(shape: &Bound<'_, PyAny>) -> PyResult<Dimensions> {
    let parts = shape.cast::<PyTuple>().ok().map(|parts| parts.as_slice());
    let (grid, block, shared) = match parts {
        Some([grid, block]) => (grid, block, 0),
        Some([grid, block, shared]) => (grid, block, count(shared, "shared memory", 0, u32::MAX)?),
        _ => {
            return Err(PyTypeError::new_err(
                "a launch is k[grid, block] or k[grid, block, shared]",
            ));
        }
    };
    let dimensions = Dimensions {
        grid: extent(grid, "grid", MOST_BLOCKS)?,
        block: extent(block, "block", MOST_THREADS)?,
        shared,
    };
    let threads: u32 = dimensions.block.iter().product();
    if threads > 1024 {
        return Err(PyValueError::new_err(format!(
            "a block has at most 1024 threads, not {threads}"
        )));
    }
    Ok(dimensions)
}

/// A number, or up to three.
fn extent(said: &Bound<'_, PyAny>, what: &str, most: [u32; 3]) -> PyResult<[u32; 3]> {
    let mut all = [1; 3];
    if said.is_instance_of::<PyInt>() {
        all[0] = count(said, what, 1, most[0])?;
        return Ok(all);
    }
    let wrong = || PyTypeError::new_err(format!("{what} is a number or one to three of them"));
    if said.is_instance_of::<PyString>() {
        return Err(wrong());
    }
    let mut given = 0;
    match said.try_iter() {
        Ok(several) => {
            for one in several {
                let place = all.get_mut(given).ok_or_else(wrong)?;
                *place = count(&one?, what, 1, most[given])?;
                given += 1;
            }
        }
        // What stands for an integer, such as one of NumPy's.
        Err(_) => {
            all[0] = count(said, what, 1, most[0])?;
            given = 1;
        }
    }
    if given == 0 { Err(wrong()) } else { Ok(all) }
}

fn count(said: &Bound<'_, PyAny>, what: &str, least: u32, most: u32) -> PyResult<u32> {
    let mut words = [0];
    convert(Scalar::Signed(8), said, &mut words)
        .map_err(|_| PyTypeError::new_err(format!("{what} is a number or one to three of them")))?;
    match u32::try_from(words[0].cast_signed()) {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(PyValueError::new_err(format!(
            "{what}: a number from {least} to {most}, not {}",
            words[0].cast_signed()
        ))),
    }
}
