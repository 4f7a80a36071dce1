//! Machines and their devices as Python sees them: streams and events, and of virtual devices memory and
//! operations written in Python. What computes on those of a driver are other libraries, which get its
//! streams.
//!
//! # Operations
//!
//! An operation is a callable without arguments. [`PyStream::enqueue`] puts it on the stream, and the
//! thread that stands for the device calls it in stream order, attached through the gateway. What it
//! raises fails the events behind it: the device knows the message, and [`CAUSES`] has the exception
//! itself for as long as the device remembers the message, so that whoever meets the failure gets it
//! as `__cause__`.
//!
//! # Memory
//!
//! [`Memory`] names bytes of a device and owns nothing, so that an operation which is still pending
//! keeps no memory that its owner gave up: the release comes behind it on the stream. [`Allocation`]
//! owns: when it is collected, its memory is given back on the stream that it was allocated on, behind
//! all streams on which it was used.
//!
//! NumPy reads and writes a `Memory` through the buffer protocol. Only an operation of a device that
//! may access it gets a buffer; everybody else gets the device's refusal. A buffer keeps its bytes, so
//! one that outlives its operation is no danger to the process; but it is a mistake, since what it
//! reads is ordered after nothing, and fails the operation that it came from.
//!
//! # Errors
//!
//! [`raise`] makes the named exceptions of what devices answer.

use std::cell::RefCell;
use std::ffi::c_int;
use std::os::raw::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use charioteer::data::store::Adopted;
use charioteer::machine::virtual_gpu::{DeviceBytes, VirtualGpu};
use charioteer::machine::{
    Description, Device, DeviceError, DeviceId, DevicePointer, Event, Gpu, HOST, Host, Link, Links,
    Machine, Observers, Stream, Time,
};
use charioteer_cuda::CudaGpu;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyDict};

use crate::gateway::{self, PyRef, Site};
use crate::interp::report;
use crate::runtime;
use crate::support::{error, support};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// ---- errors -------------------------------------------------------------------------------------

/// The exceptions behind the messages of failed operations.
static CAUSES: Mutex<Vec<(Weak<str>, PyRef)>> = Mutex::new(Vec::new());

/// What the exception of an operation is to the device.
fn failed(py: Python<'_>, device: DeviceId, raised: PyErr) -> DeviceError {
    let raised = raised.into_value(py);
    // Frames in tracebacks have views of device memory in their variables.
    let message = support(py)
        .operation_failed
        .bind(py)
        .call1((raised.bind(py),))
        .and_then(|message| message.extract::<String>())
        .unwrap_or_else(|_| "it raised an exception that cannot be shown".to_owned());
    let message: Arc<str> = message.into();
    let mut causes = std::mem::take(&mut *lock(&CAUSES));
    let (mut known, forgotten): (Vec<_>, Vec<_>) = causes
        .drain(..)
        .partition(|(message, _)| message.strong_count() != 0);
    drop(forgotten);
    known.push((Arc::downgrade(&message), PyRef::new(raised.into_any())));
    // Another thread may have put some there meanwhile.
    lock(&CAUSES).append(&mut known);
    DeviceError::Operation(device, message)
}

fn cause(py: Python<'_>, message: &Arc<str>) -> Option<Py<PyAny>> {
    let causes = lock(&CAUSES);
    let found = causes
        .iter()
        .find(|(known, _)| std::ptr::addr_eq(known.as_ptr(), Arc::as_ptr(message)))?;
    // A new reference calls nothing, so the lock may be held.
    Some(found.1.clone_ref(py))
}

/// The exception for what a device answers.
pub fn raise(py: Python<'_>, said: &DeviceError) -> PyErr {
    match said {
        DeviceError::Lost(device, why) => {
            error(py, "DeviceLostError", (device.to_string(), &**why))
        }
        DeviceError::OutOfMemory {
            device,
            wanted,
            free,
        } => error(
            py,
            "OutOfDeviceMemoryError",
            (device.to_string(), *wanted, *free),
        ),
        DeviceError::Operation(_, message) => {
            let raised = error(py, "DeviceError", (said.to_string(),));
            if let Some(cause) = cause(py, message) {
                raised.set_cause(py, Some(PyErr::from_value(cause.into_bound(py))));
            }
            raised
        }
        DeviceError::NoAccess(HOST, _) => error(
            py,
            "DeviceError",
            (format!(
                "{said}: only operations on its streams have; .get() copies it"
            ),),
        ),
        DeviceError::NoAccess(..) => error(
            py,
            "DeviceError",
            (format!("{said}: enable_peer gives it, where a link is"),),
        ),
        DeviceError::BadAddress(..) => error(py, "DeviceError", (said.to_string(),)),
    }
}

/// A buffer is refused with a `BufferError`, which says why.
fn refuse(said: &DeviceError) -> PyErr {
    PyBufferError::new_err(format!(
        "{said}; views of device memory are for operations on its streams, and end with them"
    ))
}

// ---- operations ---------------------------------------------------------------------------------

thread_local! {
    /// What runs on this thread: its device, and how many buffers it has.
    static OPERATION: RefCell<Option<Running>> = const { RefCell::new(None) };
}

#[derive(Clone)]
struct Running {
    gpu: Arc<VirtualGpu>,
    buffers: Arc<AtomicUsize>,
}

/// How many operations run.
static RUNNING: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

/// Calls an operation on the thread that stands for the device.
fn run(gpu: &Arc<VirtualGpu>, call: PyRef) -> Result<(), DeviceError> {
    let device = gpu.info().id;
    *lock(&RUNNING.0) += 1;
    let result = gateway::try_attach(Site::Device, |py| {
        let running = Running {
            gpu: Arc::clone(gpu),
            buffers: Arc::default(),
        };
        let buffers = Arc::clone(&running.buffers);
        // An operation that waits in virtual time runs others meanwhile.
        let outer = OPERATION.replace(Some(running));
        let result = call.bind(py).call0().map(drop);
        drop(call);
        OPERATION.set(outer);
        match result {
            Err(raised) => Err(failed(py, device, raised)),
            Ok(()) if buffers.load(Ordering::Acquire) != 0 => Err(DeviceError::Operation(
                device,
                "it kept a view of device memory, which is ordered after nothing".into(),
            )),
            Ok(()) => Ok(()),
        }
    });
    *lock(&RUNNING.0) -= 1;
    RUNNING.1.notify_all();
    result.unwrap_or_else(|| {
        Err(DeviceError::Operation(
            device,
            "the interpreter has ended".into(),
        ))
    })
}

/// Waits until no operation runs, or for `limit` seconds: an interpreter that ends under one would
/// take the process down.
#[pyfunction]
pub fn finish_operations(py: Python<'_>, limit: f64) {
    let end = Instant::now() + Duration::from_secs_f64(limit);
    gateway::detach(py, Site::Wait, || {
        let mut running = lock(&RUNNING.0);
        while *running != 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            (running, _) = RUNNING
                .1
                .wait_timeout(running, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    });
}

// ---- the machine --------------------------------------------------------------------------------

/// A machine whose devices exist: what `charioteer.Machine.open` gives.
#[pyclass(name = "OpenMachine", module = "charioteer._core", frozen, weakref)]
pub struct OpenMachine {
    machine: Mutex<Option<Arc<Machine>>>,
    /// Those of the CUDA driver.
    cuda: Vec<Arc<CudaGpu>>,
}

type Speed = (f64, f64);

fn link((bandwidth, latency): Speed) -> PyResult<Link> {
    Ok(Link {
        bandwidth,
        latency: seconds(latency)?,
    })
}

fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| PyValueError::new_err(format!("{value} is no number of seconds")))
}

impl OpenMachine {
    /// The machine.
    pub fn get(&self, py: Python<'_>) -> PyResult<Arc<Machine>> {
        let machine = lock(&self.machine).clone();
        machine.ok_or_else(|| error(py, "DeviceError", ("the machine is closed",)))
    }

    /// Its devices, if they are the CUDA driver's.
    pub fn driven(&self) -> Box<[Arc<CudaGpu>]> {
        self.cuda.iter().map(Arc::clone).collect()
    }

    /// The virtual device with that number. `DeviceError` if it is none.
    fn gpu(&self, py: Python<'_>, index: usize) -> PyResult<Arc<VirtualGpu>> {
        let (machine, id) = self.device(py, index)?;
        match machine.as_virtual() {
            Some(devices) => Ok(Arc::clone(devices.gpu(id))),
            None => Err(error(
                py,
                "DeviceError",
                (format!("{id} is no virtual device"),),
            )),
        }
    }

    /// The device with that number.
    fn device(&self, py: Python<'_>, index: usize) -> PyResult<(Arc<Machine>, DeviceId)> {
        let machine = self.get(py)?;
        match u16::try_from(index) {
            Ok(number) if index < machine.gpus() => Ok((machine, DeviceId::gpu(number))),
            _ => Err(PyValueError::new_err(format!(
                "the machine has no gpu({index}): it has {} GPUs",
                machine.gpus()
            ))),
        }
    }
}

#[pymethods]
impl OpenMachine {
    #[new]
    #[pyo3(signature = (cores, memory, gpus, *, host, peer, local, pairs, virtual_time, cuda=false))]
    #[expect(clippy::too_many_arguments, reason = "by keyword, from one place")]
    fn open(
        py: Python<'_>,
        cores: usize,
        memory: Option<u64>,
        gpus: Vec<(u64, String)>,
        host: Speed,
        peer: Option<Speed>,
        local: Speed,
        pairs: Vec<(u16, u16, Speed)>,
        virtual_time: bool,
        cuda: bool,
    ) -> PyResult<Self> {
        let pairs = pairs
            .into_iter()
            .map(|(from, to, speed)| Ok((DeviceId(from), DeviceId(to), link(speed)?)))
            .collect::<PyResult<_>>()?;
        let description = Description::new(
            Host { cores, memory },
            gpus.into_iter()
                .map(|(memory, name)| Gpu { name, memory })
                .collect(),
            Links {
                host: link(host)?,
                peer: peer.map(link).transpose()?,
                local: link(local)?,
                pairs,
            },
            if virtual_time {
                Time::Virtual
            } else {
                Time::Real
            },
        )
        .map_err(|wrong| PyValueError::new_err(wrong.to_string()))?;
        if !cuda {
            return Ok(Self {
                machine: Mutex::new(Some(Machine::virtual_machine(description))),
                cuda: Vec::new(),
            });
        }
        let observers = Arc::new(Observers::default());
        let memory: Vec<u64> = description.gpus().iter().map(|gpu| gpu.memory).collect();
        let gpus = charioteer_cuda::open(&memory, &observers)
            .map_err(|why| error(py, "MachineError", (why,)))?;
        let devices = gpus
            .iter()
            .map(|gpu| Arc::clone(gpu) as Arc<dyn Device>)
            .collect();
        Ok(Self {
            machine: Mutex::new(Some(Machine::with_devices(description, devices, observers))),
            cuda: gpus,
        })
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(
        &self,
        _kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) {
        self.close();
    }

    /// Ends the devices: what is pending on them is dropped, and events that are not complete fail.
    fn close(&self) {
        let machine = lock(&self.machine).take();
        if let Some(machine) = machine {
            // Arrays keep it for longer.
            machine.close();
        }
    }

    /// How many GPUs it has.
    #[getter]
    fn gpus(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.get(py)?.gpus())
    }

    /// A new stream of the GPU with that number.
    fn stream<'py>(&self, py: Python<'py>, gpu: usize) -> PyResult<Bound<'py, PyAny>> {
        let (machine, id) = self.device(py, gpu)?;
        let new = gateway::detach(py, Site::Wait, || machine.device(id).create_stream());
        stream(py, &machine, new.map_err(|said| raise(py, &said))?)
    }

    /// Bytes of the GPU that are not allocated.
    fn free_memory(&self, py: Python<'_>, gpu: usize) -> PyResult<u64> {
        let (machine, id) = self.device(py, gpu)?;
        Ok(machine.device(id).free_memory())
    }

    /// Calls back, on a thread of its own, when a GPU of the CUDA driver is lost before the machine is closed.
    fn when_lost(&self, py: Python<'_>, gpu: usize, call: Bound<'_, PyAny>) -> PyResult<()> {
        let (_, id) = self.device(py, gpu)?;
        let Some(gpu) = self.cuda.get(gpu) else {
            return Err(error(
                py,
                "DeviceError",
                (format!("{id} is a virtual device"),),
            ));
        };
        let call: PyRef = call.into();
        gpu.when_lost(Box::new(move || {
            gateway::try_attach(Site::Device, |py| report(py, call.bind(py).call0()));
        }));
        Ok(())
    }

    /// Lets the operations and copies of one GPU reach the memory of another.
    fn enable_peer(&self, py: Python<'_>, gpu: usize, peer: usize) -> PyResult<()> {
        let (machine, id) = self.device(py, gpu)?;
        let (_, peer) = self.device(py, peer)?;
        machine
            .device(id)
            .enable_peer(peer)
            .map_err(|said| raise(py, &said))
    }

    /// Measures the way from one memory to another, where one of the two is that of a GPU of the CUDA
    /// driver: bytes a second and the seconds that an empty copy takes. `None` stands for the host.
    fn measure(
        &self,
        py: Python<'_>,
        source: Option<usize>,
        target: Option<usize>,
        size: u64,
    ) -> PyResult<Speed> {
        let (own, inwards) = match (source, target) {
            (_, Some(target)) => (target, true),
            (Some(source), None) => (source, false),
            (None, None) => return Err(PyValueError::new_err("the host is no device")),
        };
        let other = match if inwards { source } else { target } {
            Some(index) => self.device(py, index)?.1,
            None => HOST,
        };
        let (_, id) = self.device(py, own)?;
        let Some(gpu) = self.cuda.get(own) else {
            return Err(error(
                py,
                "DeviceError",
                (format!("the links of {id} are as described"),),
            ));
        };
        let measured = gateway::detach(py, Site::Wait, || gpu.measure(other, inwards, size));
        let (bandwidth, latency) = measured.map_err(|said| raise(py, &said))?;
        Ok((bandwidth, latency.as_secs_f64()))
    }

    /// What the GPU has seen since the machine was opened.
    fn counters<'py>(&self, py: Python<'py>, gpu: usize) -> PyResult<Bound<'py, PyDict>> {
        if let Some(gpu) = self.cuda.get(gpu) {
            return cuda_counters(py, gpu);
        }
        let counters = self.gpu(py, gpu)?.counters();
        let traffic = PyDict::new(py);
        for link in counters.traffic {
            traffic.set_item(
                (link.from.to_string(), link.to.to_string()),
                (link.copies, link.bytes),
            )?;
        }
        let dict = PyDict::new(py);
        dict.set_item("streams", counters.streams)?;
        dict.set_item("operations", counters.operations)?;
        dict.set_item("traffic", traffic)?;
        dict.set_item("stream_waits", counters.stream_waits)?;
        dict.set_item("host_synchronisations", counters.host_synchronisations)?;
        Ok(dict)
    }

    /// Injects a fault: of the copies enqueued on the GPU from now on, the `nth` fails.
    fn fail_copy(&self, py: Python<'_>, gpu: usize, nth: u64) -> PyResult<()> {
        if nth == 0 {
            return Err(PyValueError::new_err("the first copy is number 1"));
        }
        self.gpu(py, gpu)?.fail_copy(nth);
        Ok(())
    }

    /// Injects a fault: the GPU is lost, now or when it has run so many more operations and copies.
    #[pyo3(signature = (gpu, why="injected", *, after=None))]
    fn lose(&self, py: Python<'_>, gpu: usize, why: &str, after: Option<u64>) -> PyResult<()> {
        let gpu = self.gpu(py, gpu)?;
        match after {
            None => gpu.lose(why),
            Some(operations) => gpu.lose_after(operations, why),
        }
        Ok(())
    }

    /// Injects a fault: the next event recorded on the GPU completes so many seconds later.
    fn delay_event(&self, py: Python<'_>, gpu: usize, delay: f64) -> PyResult<()> {
        self.gpu(py, gpu)?.delay_event(seconds(delay)?);
        Ok(())
    }

    /// Its clock.
    #[getter]
    fn clock(slf: Py<Self>) -> Clock {
        Clock { machine: slf }
    }
}

fn cuda_counters<'py>(py: Python<'py>, gpu: &CudaGpu) -> PyResult<Bound<'py, PyDict>> {
    let counters = gpu.counters();
    let traffic = PyDict::new(py);
    for link in counters.traffic {
        traffic.set_item(
            (link.from.to_string(), link.to.to_string()),
            (link.copies, link.bytes),
        )?;
    }
    let dict = PyDict::new(py);
    dict.set_item("streams", counters.streams)?;
    dict.set_item("traffic", traffic)?;
    dict.set_item("stream_waits", counters.stream_waits)?;
    dict.set_item("host_synchronisations", counters.host_synchronisations)?;
    dict.set_item("graphs", counters.graphs)?;
    dict.set_item("notifications", counters.notifications)?;
    dict.set_item("library_memory", counters.library_memory)?;
    Ok(dict)
}

type FoundDevice = (String, u64, (u32, u32), f64, Vec<u16>);

/// The devices of the CUDA driver: name, bytes, compute capability, bytes a second within its memory,
/// and the numbers of those whose memory it can reach. `MachineError` if there is a driver and it
/// cannot be used.
#[pyfunction]
pub fn cuda_devices(py: Python<'_>) -> PyResult<Vec<FoundDevice>> {
    let found = gateway::detach(py, Site::Wait, charioteer_cuda::found);
    let found = found.map_err(|why| error(py, "MachineError", (why,)))?;
    let each = found.iter().cloned();
    Ok(each
        .map(|gpu| {
            (
                gpu.name,
                gpu.memory,
                gpu.capability,
                gpu.bandwidth,
                gpu.peers,
            )
        })
        .collect())
}

/// The clock of a machine.
#[pyclass(module = "charioteer._core", frozen)]
pub struct Clock {
    machine: Py<OpenMachine>,
}

#[pymethods]
impl Clock {
    /// Nanoseconds since the machine was opened.
    #[getter]
    fn now(&self, py: Python<'_>) -> PyResult<u64> {
        let machine = self.machine.get().get(py)?;
        Ok(machine.as_virtual().map_or(0, |found| found.clock().now()))
    }

    /// In virtual time, does the next thing that is due on the machine; `False` if there is nothing,
    /// and always in real time, which goes by on its own.
    fn advance(&self, py: Python<'_>) -> PyResult<bool> {
        let machine = self.machine.get().get(py)?;
        Ok(gateway::detach(py, Site::Wait, || {
            machine
                .as_virtual()
                .is_some_and(|found| found.clock().advance())
        }))
    }
}

// ---- DLPack -------------------------------------------------------------------------------------

/// What a consumer of DLPack reads: the tensor, and how it is given back.
#[repr(C)]
struct ManagedTensor {
    data: *mut c_void,
    device_type: i32,
    device: i32,
    dimensions: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    offset: u64,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
}

/// A tensor and the numbers that it points to.
struct Exported {
    tensor: ManagedTensor,
    _shape: Box<[i64]>,
    _strides: Box<[i64]>,
}

/// # Safety
/// Called once, with the tensor of an [`Exported`] that was made by `Box::into_raw`.
unsafe extern "C" fn delete_tensor(tensor: *mut ManagedTensor) {
    // SAFETY: the context is the box, and nobody uses it any more.
    drop(unsafe { Box::from_raw((*tensor).context.cast::<Exported>()) });
}

/// # Safety
/// The interpreter calls this, with a capsule of [`dlpack`].
unsafe extern "C" fn delete_capsule(capsule: *mut ffi::PyObject) {
    // SAFETY: attached, since an object is being collected. A consumer that took the tensor over renamed
    // the capsule; if nobody did, it is ours to delete.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, TENSOR.as_ptr()) != 0 {
            let tensor = ffi::PyCapsule_GetPointer(capsule, TENSOR.as_ptr());
            delete_tensor(tensor.cast());
        }
    }
}

const TENSOR: &std::ffi::CStr = c"dltensor";
const DLPACK_CUDA: i32 = 2;

/// Memory of a GPU of the CUDA driver as a capsule by DLPack: where, on which GPU, the code of the type and
/// its bits, extents, and strides in elements. It owns nothing.
#[pyfunction]
pub fn dlpack(
    py: Python<'_>,
    address: usize,
    device: i32,
    kind: (u8, u8),
    shape: Vec<i64>,
    strides: Vec<i64>,
) -> PyResult<Bound<'_, PyAny>> {
    let (code, bits) = kind;
    let dimensions = i32::try_from(shape.len())
        .map_err(|_| PyValueError::new_err("an array of too many dimensions"))?;
    if strides.len() != shape.len() {
        return Err(PyValueError::new_err("a stride for each extent"));
    }
    let (mut shape, mut strides) = (shape.into_boxed_slice(), strides.into_boxed_slice());
    let tensor = ManagedTensor {
        data: address as *mut c_void,
        device_type: DLPACK_CUDA,
        device,
        dimensions,
        code,
        bits,
        lanes: 1,
        shape: shape.as_mut_ptr(),
        strides: strides.as_mut_ptr(),
        offset: 0,
        context: std::ptr::null_mut(),
        deleter: Some(delete_tensor),
    };
    let exported = Box::into_raw(Box::new(Exported {
        tensor,
        _shape: shape,
        _strides: strides,
    }));
    // SAFETY: attached; the box was just made, and the capsule deletes it unless a consumer does. A new
    // reference, or null with an exception.
    unsafe {
        (*exported).tensor.context = exported.cast();
        let tensor = &raw mut (*exported).tensor;
        let capsule = ffi::PyCapsule_New(tensor.cast(), TENSOR.as_ptr(), Some(delete_capsule));
        if capsule.is_null() {
            delete_tensor(tensor);
        }
        Bound::from_owned_ptr_or_err(py, capsule)
    }
}

/// A tensor by DLPack that was taken over: what it says, and its end.
#[pyclass(module = "charioteer._core", frozen)]
pub struct Tensor {
    tensor: *mut ManagedTensor,
}

// SAFETY: it is read, which any thread may do, and deleted once, by a thread that is attached, as whoever
// made it may expect.
unsafe impl Send for Tensor {}
// SAFETY: as above.
unsafe impl Sync for Tensor {}

const TAKEN: &std::ffi::CStr = c"used_dltensor";

#[pymethods]
impl Tensor {
    /// Takes the tensor of a capsule over. `BufferError` if there is none.
    #[new]
    fn new(capsule: &Bound<'_, PyAny>) -> PyResult<Self> {
        // SAFETY: attached; the capsule is alive. By its name it has a tensor that nobody took over, which
        // the new name says that somebody did.
        unsafe {
            if ffi::PyCapsule_IsValid(capsule.as_ptr(), TENSOR.as_ptr()) == 0 {
                return Err(PyBufferError::new_err(
                    "no capsule of DLPack's, or a used one",
                ));
            }
            let tensor = ffi::PyCapsule_GetPointer(capsule.as_ptr(), TENSOR.as_ptr());
            if ffi::PyCapsule_SetName(capsule.as_ptr(), TAKEN.as_ptr()) != 0 {
                return Err(PyErr::fetch(capsule.py()));
            }
            Ok(Self {
                tensor: tensor.cast(),
            })
        }
    }

    /// Where the first element is, the number of the GPU, code, bits and lanes of the type, extents, and
    /// strides in elements; none in C order. `BufferError` of what is not on a GPU of CUDA.
    #[allow(clippy::type_complexity, reason = "what a tensor says")]
    fn describe(&self) -> PyResult<(usize, i32, (u8, u8, u16), Vec<i64>, Option<Vec<i64>>)> {
        // SAFETY: the tensor is there until it is deleted, and its numbers with it, as many as dimensions.
        let (tensor, shape, strides) = unsafe {
            let tensor = &*self.tensor;
            let dimensions = usize::try_from(tensor.dimensions).unwrap_or(0);
            let numbers = |first: *const i64| {
                (!first.is_null() && dimensions > 0)
                    .then(|| std::slice::from_raw_parts(first, dimensions).to_vec())
            };
            (tensor, numbers(tensor.shape), numbers(tensor.strides))
        };
        if tensor.device_type != DLPACK_CUDA {
            return Err(PyBufferError::new_err("the tensor is not on a GPU"));
        }
        Ok((
            tensor.data as usize + tensor.offset as usize,
            tensor.device,
            (tensor.code, tensor.bits, tensor.lanes),
            shape.unwrap_or_default(),
            strides,
        ))
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        // SAFETY: nobody else deletes what was taken over; an object is collected by an attached thread.
        unsafe {
            if let Some(delete) = (*self.tensor).deleter {
                delete(self.tensor);
            }
        }
    }
}

// ---- memory of others ---------------------------------------------------------------------------

/// Memory of a device that somebody else owns, for an array that is to take it over: where it is, what its
/// owner has enqueued, and what keeps it.
#[pyclass(module = "charioteer._core", frozen)]
pub struct ForeignMemory {
    adopted: Adopted,
    keep: PyRef,
}

impl ForeignMemory {
    pub fn adopted(&self) -> &Adopted {
        &self.adopted
    }

    pub fn keep(&self, py: Python<'_>) -> PyRef {
        PyRef::new(self.keep.clone_ref(py))
    }
}

#[pymethods]
impl ForeignMemory {
    /// Memory of a GPU of the CUDA driver's that is used on a stream, by its handle, or by nobody any more.
    /// `DeviceError` if the driver has no such stream there.
    #[staticmethod]
    fn cuda(
        py: Python<'_>,
        address: u64,
        device: u16,
        stream: Option<usize>,
        keep: Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let behind = gateway::detach(py, Site::Wait, || charioteer_cuda::foreign(device, stream));
        let behind = behind.map_err(|why| error(py, "DeviceError", (why,)))?;
        let pointer = DevicePointer {
            device: DeviceId::gpu(device),
            address,
        };
        Ok(Self {
            adopted: Adopted { pointer, behind },
            keep: keep.into(),
        })
    }

    /// Memory of a virtual GPU, from `offset` on, that is used on a stream of that GPU.
    #[staticmethod]
    fn of_virtual(
        py: Python<'_>,
        memory: &Memory,
        offset: u64,
        stream: &PyStream,
        keep: Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        if !memory.gpu.same_machine(&stream.gpu) || memory.pointer.device != stream.stream.device {
            return Err(PyValueError::new_err("the stream is another GPU's"));
        }
        let event = stream.gpu.record(stream.stream);
        let event = event.map_err(|said| raise(py, &said))?;
        let adopted = Adopted {
            pointer: memory.pointer.offset(offset),
            behind: memory.gpu.foreign(Some(event)),
        };
        let keep = keep.into();
        Ok(Self { adopted, keep })
    }

    /// The number of the GPU.
    #[getter]
    fn device(&self) -> u16 {
        self.adopted.pointer.device.index()
    }

    /// Whether it is memory that the open runtime has for managed arrays.
    #[getter]
    fn is_managed(&self, py: Python<'_>) -> PyResult<bool> {
        if !runtime::is_open() {
            return Ok(false);
        }
        let engine = Arc::clone(&runtime::active(py)?.engine);
        Ok((engine.data()).is_some_and(|store| store.has(self.adopted.pointer)))
    }
}

/// The handle of a stream of a GPU of the CUDA driver's on which a producer by DLPack is to have its work
/// waited for. `DeviceError` if there is no such GPU.
#[pyfunction]
pub fn cuda_meeting(py: Python<'_>, device: u16) -> PyResult<usize> {
    let handle = gateway::detach(py, Site::Wait, || charioteer_cuda::meeting(device));
    handle.map_err(|why| error(py, "DeviceError", (why,)))
}

/// The number of the GPU of the CUDA driver's whose memory is at an address; none if the driver does not know.
#[pyfunction]
pub fn cuda_device_of(py: Python<'_>, address: u64) -> Option<u16> {
    gateway::detach(py, Site::Wait, || {
        charioteer_cuda::found().ok()?.first()?;
        charioteer_cuda::ordinal_of(address)
    })
}

// ---- streams and events -------------------------------------------------------------------------

/// A stream of a virtual GPU.
#[pyclass(name = "Stream", module = "charioteer._core", frozen)]
pub struct PyStream {
    gpu: Arc<VirtualGpu>,
    stream: Stream,
}

#[pymethods]
impl PyStream {
    /// The number of its GPU.
    #[getter]
    fn device(&self) -> u16 {
        self.stream.device.index()
    }

    /// Its number among the streams of the GPU.
    #[getter]
    fn number(&self) -> u32 {
        self.stream.number
    }

    /// Calls the operation, without arguments, in stream order.
    fn enqueue(&self, py: Python<'_>, operation: Bound<'_, PyAny>) -> PyResult<()> {
        if !operation.is_callable() {
            return Err(PyTypeError::new_err("an operation is a callable"));
        }
        let call = PyRef::from(operation);
        let gpu = Arc::clone(&self.gpu);
        self.gpu
            .enqueue(self.stream, Box::new(move || run(&gpu, call)))
            .map_err(|said| raise(py, &said))
    }

    /// Occupies the stream for so many seconds, in its order.
    fn busy(&self, py: Python<'_>, duration: f64) -> PyResult<()> {
        self.gpu
            .busy(self.stream, seconds(duration)?)
            .map_err(|said| raise(py, &said))
    }

    /// The event behind everything that is enqueued on the stream now.
    fn record(&self, py: Python<'_>) -> PyResult<PyEvent> {
        let event = self
            .gpu
            .record(self.stream)
            .map_err(|said| raise(py, &said))?;
        Ok(PyEvent {
            of: Of::Virtual(Arc::clone(&self.gpu)),
            event,
        })
    }

    /// What is enqueued from now on starts after the event.
    fn wait(&self, py: Python<'_>, event: &PyEvent) -> PyResult<()> {
        match &event.of {
            Of::Virtual(gpu) if self.gpu.same_machine(gpu) => {}
            _ => return Err(foreign_event()),
        }
        self.gpu
            .wait(self.stream, event.event)
            .map_err(|said| raise(py, &said))
    }

    /// Waits until everything that is enqueued now is done.
    fn synchronize(&self, py: Python<'_>) -> PyResult<()> {
        self.record(py)?.synchronize(py)
    }

    /// Memory of the GPU for what is enqueued on the stream from now on.
    fn allocate(&self, py: Python<'_>, size: u64) -> PyResult<Allocation> {
        let pointer = self
            .gpu
            .allocate(size, self.stream)
            .map_err(|said| raise(py, &said))?;
        let gpu = Arc::clone(&self.gpu);
        let memory = Py::new(py, Memory { gpu, pointer, size })?;
        Ok(Allocation {
            memory,
            gpu: Arc::clone(&self.gpu),
            stream: self.stream,
            pointer,
            others: Mutex::default(),
        })
    }

    /// Whether operations on the stream may access the memory.
    fn reaches(&self, memory: &Memory) -> bool {
        self.gpu.same_machine(&memory.gpu)
            && (self.stream.device == memory.pointer.device
                || self.gpu.has_peer(memory.pointer.device))
    }

    /// Copies bytes between device memories, in stream order and over the link.
    fn copy(
        &self,
        py: Python<'_>,
        source: &Memory,
        source_offset: u64,
        target: &Memory,
        target_offset: u64,
        size: u64,
    ) -> PyResult<()> {
        self.on_machine(source)?;
        self.on_machine(target)?;
        let from = source.pointer.offset(source_offset);
        let to = target.pointer.offset(target_offset);
        // SAFETY: neither side is the host's memory.
        unsafe { self.gpu.copy(from, to, size, self.stream) }.map_err(|said| raise(py, &said))
    }

    /// Copies the bytes of a contiguous buffer to the device, in stream order and over the link. The
    /// buffer may change as soon as this returns.
    fn upload(
        &self,
        py: Python<'_>,
        source: &Bound<'_, PyAny>,
        target: &Memory,
        offset: u64,
    ) -> PyResult<()> {
        self.on_machine(target)?;
        let bytes = PyBuffer::<u8>::get(source)?.to_vec(py)?;
        let from = DevicePointer {
            device: HOST,
            address: bytes.as_ptr() as u64,
        };
        let to = target.pointer.offset(offset);
        let size = bytes.len() as u64;
        // SAFETY: nobody else knows the bytes, which live until the event behind the copy.
        unsafe { self.gpu.copy(from, to, size, self.stream) }.map_err(|said| raise(py, &said))?;
        match self.gpu.record(self.stream) {
            Ok(event) => {
                self.gpu
                    .when_complete(event, Box::new(move |_| drop(bytes)));
                Ok(())
            }
            Err(said) => {
                // Lost in between: a copy that is under way may read the bytes yet.
                std::mem::forget(bytes);
                Err(raise(py, &said))
            }
        }
    }

    /// Copies bytes to the host behind all that is on the stream, over the link, and waits for them.
    fn download<'py>(
        &self,
        py: Python<'py>,
        source: &Memory,
        offset: u64,
        size: usize,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        self.on_machine(source)?;
        let bytes = PyByteArray::new_with(py, size, |_| Ok(()))?;
        let to = DevicePointer {
            device: HOST,
            address: bytes.data() as u64,
        };
        let from = source.pointer.offset(offset);
        // SAFETY: nobody else knows the bytes before this returns, and it returns behind the copy.
        unsafe { self.gpu.copy(from, to, size as u64, self.stream) }
            .map_err(|said| raise(py, &said))?;
        match self.gpu.record(self.stream) {
            Ok(event) => {
                let gpu = &self.gpu;
                gateway::detach(py, Site::Wait, || gpu.synchronize(event))
                    .map_err(|said| raise(py, &said))?;
                Ok(bytes)
            }
            Err(said) => {
                // Lost in between: a copy that is under way may write the bytes yet.
                std::mem::forget(bytes);
                Err(raise(py, &said))
            }
        }
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.stream == other.stream && self.gpu.same_machine(&other.gpu)
    }

    fn __hash__(&self) -> u64 {
        u64::from(self.stream.device.0) << 32 | u64::from(self.stream.number)
    }

    fn __repr__(&self) -> String {
        format!("<stream {} of {}>", self.stream.number, self.stream.device)
    }
}

impl PyStream {
    /// The stream of a device of the runtime's machine, if that is virtual.
    pub fn of(machine: &Machine, stream: Stream) -> Option<Self> {
        let devices = machine.as_virtual()?;
        Some(Self {
            gpu: Arc::clone(devices.gpu(stream.device)),
            stream,
        })
    }

    fn on_machine(&self, memory: &Memory) -> PyResult<()> {
        if self.gpu.same_machine(&memory.gpu) {
            return Ok(());
        }
        Err(PyValueError::new_err(
            "a stream works with memory of its own machine",
        ))
    }
}

fn foreign_event() -> PyErr {
    PyValueError::new_err("a stream waits for events of its own machine")
}

/// The stream of a device of the machine, as what it is.
pub fn stream<'py>(
    py: Python<'py>,
    machine: &Arc<Machine>,
    stream: Stream,
) -> PyResult<Bound<'py, PyAny>> {
    if let Some(stream) = PyStream::of(machine, stream) {
        return Ok(Bound::new(py, stream)?.into_any());
    }
    let handle = machine.device(stream.device).handle(stream);
    let Some(handle) = handle else {
        return Err(error(
            py,
            "DeviceLostError",
            (stream.device.to_string(), "it has no such stream"),
        ));
    };
    let stream = CudaStream {
        machine: Arc::clone(machine),
        stream,
        handle,
    };
    Ok(Bound::new(py, stream)?.into_any())
}

/// A stream of a CUDA device, for libraries that compute there.
#[pyclass(module = "charioteer._core", frozen)]
pub struct CudaStream {
    machine: Arc<Machine>,
    stream: Stream,
    handle: usize,
}

#[pymethods]
impl CudaStream {
    /// The number of its GPU.
    #[getter]
    fn device(&self) -> u16 {
        self.stream.device.index()
    }

    /// Its number among the streams of the GPU.
    #[getter]
    fn number(&self) -> u32 {
        self.stream.number
    }

    /// The driver's handle, a `cudaStream_t`.
    #[getter]
    fn handle(&self) -> usize {
        self.handle
    }

    /// The CUDA stream protocol: its version and the handle.
    fn __cuda_stream__(&self) -> (u32, usize) {
        (0, self.handle)
    }

    /// The same for CuPy, which is imported.
    #[getter]
    fn cupy<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        support(py)
            .cuda
            .bind(py)
            .call1(("cupy_stream", self.handle))
    }

    /// The same for PyTorch, which is imported.
    #[getter]
    fn torch<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let device = self.stream.device.index();
        support(py)
            .cuda
            .bind(py)
            .call1(("torch_stream", self.handle, device))
    }

    /// The same for Numba, which is imported, and has no current stream: `kernel[grid, block, this]`.
    #[getter]
    fn numba<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        support(py)
            .cuda
            .bind(py)
            .call1(("numba_stream", self.handle))
    }

    /// The event behind everything that is enqueued on the stream now.
    fn record(&self, py: Python<'_>) -> PyResult<PyEvent> {
        let event = self.machine.device(self.stream.device).record(self.stream);
        Ok(PyEvent {
            of: Of::Driver(Arc::clone(&self.machine)),
            event: event.map_err(|said| raise(py, &said))?,
        })
    }

    /// What is enqueued from now on starts after the event.
    fn wait(&self, py: Python<'_>, event: &PyEvent) -> PyResult<()> {
        match &event.of {
            Of::Driver(machine) if Arc::ptr_eq(machine, &self.machine) => {}
            _ => return Err(foreign_event()),
        }
        self.machine
            .device(self.stream.device)
            .wait(self.stream, event.event)
            .map_err(|said| raise(py, &said))
    }

    /// Waits until everything that is enqueued now is done.
    fn synchronize(&self, py: Python<'_>) -> PyResult<()> {
        self.record(py)?.synchronize(py)
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.handle == other.handle
    }

    fn __hash__(&self) -> usize {
        self.handle
    }

    fn __repr__(&self) -> String {
        format!("<stream {} of {}>", self.stream.number, self.stream.device)
    }
}

/// Whose an event is.
enum Of {
    Virtual(Arc<VirtualGpu>),
    Driver(Arc<Machine>),
}

/// A position on a stream's timeline.
#[pyclass(name = "Event", module = "charioteer._core", frozen)]
pub struct PyEvent {
    of: Of,
    event: Event,
}

impl PyEvent {
    /// The event of a device of the runtime's machine.
    pub fn of(machine: &Arc<Machine>, event: Event) -> Self {
        let of = match machine.as_virtual() {
            Some(devices) => Of::Virtual(Arc::clone(devices.gpu(event.stream.device))),
            None => Of::Driver(Arc::clone(machine)),
        };
        Self { of, event }
    }

    fn device(&self) -> &dyn Device {
        match &self.of {
            Of::Virtual(gpu) => gpu.as_ref(),
            Of::Driver(machine) => machine.device(self.event.stream.device).as_ref(),
        }
    }
}

#[pymethods]
impl PyEvent {
    /// Whether everything before it is done.
    fn is_complete(&self, py: Python<'_>) -> PyResult<bool> {
        self.device()
            .is_complete(self.event)
            .map_err(|said| raise(py, &said))
    }

    /// Waits until it is complete.
    fn synchronize(&self, py: Python<'_>) -> PyResult<()> {
        gateway::detach(py, Site::Wait, || self.device().synchronize(self.event))
            .map_err(|said| raise(py, &said))
    }

    fn __repr__(&self) -> String {
        let stream = self.event.stream;
        format!(
            "<event {} on stream {} of {}>",
            self.event.position, stream.number, stream.device
        )
    }
}

// ---- memory -------------------------------------------------------------------------------------

/// Bytes of a device, which it names and does not own. NumPy may view them within an operation.
#[pyclass(module = "charioteer._core", frozen)]
pub struct Memory {
    gpu: Arc<VirtualGpu>,
    pointer: DevicePointer,
    size: u64,
}

impl Memory {
    /// Of a virtual GPU, at an address there.
    pub fn at(gpu: &Arc<VirtualGpu>, address: u64, size: u64) -> Self {
        let device = gpu.info().id;
        Self {
            gpu: Arc::clone(gpu),
            pointer: DevicePointer { device, address },
            size,
        }
    }
}

/// What a buffer keeps.
struct Export {
    bytes: DeviceBytes,
    buffers: Arc<AtomicUsize>,
}

#[pymethods]
impl Memory {
    /// The number of the GPU.
    #[getter]
    fn device(&self) -> u16 {
        self.pointer.device.index()
    }

    /// The address in the GPU's address space.
    #[getter]
    fn address(&self) -> u64 {
        self.pointer.address
    }

    /// How many bytes.
    #[getter]
    fn size(&self) -> u64 {
        self.size
    }

    /// # Safety
    /// The interpreter calls this, with a place for the buffer.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let memory = slf.get();
        let running = OPERATION.with_borrow(Clone::clone);
        let Some(running) = running.filter(|running| running.gpu.same_machine(&memory.gpu)) else {
            return Err(refuse(&DeviceError::NoAccess(HOST, memory.pointer.device)));
        };
        let bytes = running
            .gpu
            .bytes(memory.pointer, memory.size)
            .map_err(|said| refuse(&said))?;
        // SAFETY: the place is valid, as promised; the bytes live until the buffer is released, which
        // drops the export, and as many are valid as are said.
        unsafe {
            let filled = ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                bytes.as_ptr().cast(),
                memory.size as ffi::Py_ssize_t,
                0,
                flags,
            );
            if filled != 0 {
                return Err(PyErr::fetch(slf.py()));
            }
            running.buffers.fetch_add(1, Ordering::AcqRel);
            let buffers = running.buffers;
            (*view).internal = Box::into_raw(Box::new(Export { bytes, buffers })).cast::<c_void>();
        }
        Ok(())
    }

    /// # Safety
    /// The interpreter calls this, once for each buffer that was given.
    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: `__getbuffer__` put the export there, and nobody has taken it since.
        let export = unsafe { Box::from_raw((*view).internal.cast::<Export>()) };
        export.buffers.fetch_sub(1, Ordering::AcqRel);
        drop(export.bytes);
    }

    fn __repr__(&self) -> String {
        format!(
            "<{} bytes at {:#x} of {}>",
            self.size, self.pointer.address, self.pointer.device
        )
    }
}

/// Memory that is given back when this is collected.
#[pyclass(module = "charioteer._core", frozen)]
pub struct Allocation {
    memory: Py<Memory>,
    gpu: Arc<VirtualGpu>,
    /// The stream that it was allocated on.
    stream: Stream,
    pointer: DevicePointer,
    /// Others that use it.
    others: Mutex<Vec<(Arc<VirtualGpu>, Stream)>>,
}

#[pymethods]
impl Allocation {
    /// The bytes.
    #[getter]
    fn memory(&self, py: Python<'_>) -> Py<Memory> {
        self.memory.clone_ref(py)
    }

    /// The stream that it was allocated on.
    #[getter]
    fn stream(&self) -> PyStream {
        PyStream {
            gpu: Arc::clone(&self.gpu),
            stream: self.stream,
        }
    }

    /// Says that what is enqueued on the stream uses it.
    fn used_on(&self, stream: &PyStream) {
        if stream.stream == self.stream {
            return;
        }
        let mut others = lock(&self.others);
        if !others.iter().any(|(_, other)| *other == stream.stream) {
            others.push((Arc::clone(&stream.gpu), stream.stream));
        }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let others = self
            .others
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        for (gpu, stream) in others.drain(..) {
            // A device that is lost uses nothing any more.
            if let Ok(event) = gpu.record(stream) {
                let _ = self.gpu.wait(self.stream, event);
            }
        }
        let _ = self.gpu.free(self.pointer, self.stream);
    }
}
