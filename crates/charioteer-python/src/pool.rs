//! The runtime's memory pool for CuPy and PyTorch.
//!
//! CuPy asks a Python function for memory and gets a [`PoolMemory`], which gives it back when it is
//! collected. PyTorch loads two functions by their names from this module as a shared object, and calls
//! them without the GIL: [`charioteer_cuda_allocate`] and [`charioteer_cuda_free`]; a third one,
//! [`charioteer_cuda_record_stream`], by its address. It takes no word for failure: a null pointer would be a
//! tensor's memory. So an exception of its own is thrown, by its function `aoti_torch_check`, whose
//! interface is stable; no frame between that and PyTorch has anything to clean up.
//!
//! What is ordered how stands in [`charioteer_cuda::pool`].

use std::ffi::{c_char, c_int, c_void};
use std::io::Write;
use std::mem;
use std::ptr;
use std::sync::OnceLock;

use charioteer::machine::{DeviceError, DeviceId};
use charioteer_cuda::pool::{self, Refusal};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::devices::raise;
use crate::gateway::PyRef;
use crate::support::error;

/// PyTorch's: throws an exception with a message if the condition does not hold.
type TorchCheck =
    unsafe extern "C-unwind" fn(bool, *const c_char, *const c_char, u32, *const c_char);

static TORCH_CHECK: OnceLock<TorchCheck> = OnceLock::new();

/// Libraries are about to allocate from the pools of the devices. `DeviceError` if there is none of a driver.
#[pyfunction]
pub fn share_pool(py: Python<'_>) -> PyResult<()> {
    match pool::share() {
        Ok(0) => Err(error(
            py,
            "DeviceError",
            ("there is no GPU of the CUDA driver, and no pool",),
        )),
        Ok(_) => Ok(()),
        Err(why) => Err(error(py, "DeviceError", (why,))),
    }
}

/// The address of PyTorch's `aoti_torch_check`; gives that of `charioteer_cuda_record_stream`.
#[pyfunction]
pub fn share_pool_with_torch(check: usize) -> PyResult<usize> {
    if check == 0 {
        return Err(PyValueError::new_err("the function has no address"));
    }
    // SAFETY: the caller says that it is this function, in a library that stays.
    let check =
        unsafe { mem::transmute::<*const c_void, TorchCheck>(ptr::with_exposed_provenance(check)) };
    TORCH_CHECK.get_or_init(|| check);
    Ok(charioteer_cuda_record_stream as *const () as usize)
}

/// Memory of a device's pool, which is given back when this is collected.
#[pyclass(module = "charioteer._core", frozen)]
pub struct PoolMemory {
    address: u64,
    size: u64,
    device: u16,
    stream: usize,
    /// The stream as an object, which the handle does not outlive.
    _owner: PyRef,
}

#[pymethods]
impl PoolMemory {
    /// For what is enqueued on the stream from now on: its handle, and the object that owns that.
    /// `OutOfDeviceMemoryError` if there is not as much.
    #[new]
    fn allocate(
        py: Python<'_>,
        device: u16,
        size: u64,
        stream: usize,
        owner: Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let address = pool::allocate(device, size, stream).map_err(|refusal| {
            let id = DeviceId::gpu(device);
            match refusal {
                Refusal::Short { free } => raise(
                    py,
                    &DeviceError::OutOfMemory {
                        device: id,
                        wanted: size,
                        free,
                    },
                ),
                Refusal::Fault(why) => error(py, "DeviceError", (format!("{id}: {why}"),)),
            }
        })?;
        Ok(Self {
            address,
            size,
            device,
            stream,
            _owner: owner.into(),
        })
    }

    /// Where it is.
    #[getter]
    fn address(&self) -> u64 {
        self.address
    }

    /// How many bytes.
    #[getter]
    fn size(&self) -> u64 {
        self.size
    }
}

impl Drop for PoolMemory {
    fn drop(&mut self) {
        // SAFETY: nobody has it any more, and who did ordered its work as the library asks for.
        unsafe { pool::free(self.device, self.address, self.size, self.stream) };
    }
}

/// A message in place, so that nothing has to be freed when an exception passes.
struct Message {
    bytes: [u8; 256],
}

impl Message {
    fn new(said: &std::fmt::Arguments<'_>) -> Self {
        let mut bytes = [0; 256];
        // What does not fit is left out, and the last byte stays zero.
        let mut room = &mut bytes[..255];
        let _ = room.write_fmt(*said);
        Self { bytes }
    }
}

/// Says why there is no memory.
fn shortage(device: c_int, bytes: u64, refusal: Refusal) -> Message {
    let id = DeviceId::gpu(u16::try_from(device).unwrap_or(u16::MAX));
    match refusal {
        Refusal::Short { free } => Message::new(&format_args!(
            "OutOfDeviceMemoryError: {}",
            DeviceError::OutOfMemory {
                device: id,
                wanted: bytes,
                free
            }
        )),
        Refusal::Fault(why) => Message::new(&format_args!("{id}: {why}")),
    }
}

/// PyTorch asks for memory. Throws PyTorch's exception if there is none.
///
/// # Safety
/// PyTorch calls it, with a stream of the device, and was made known here.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn charioteer_cuda_allocate(
    size: isize,
    device: c_int,
    stream: *mut c_void,
) -> *mut c_void {
    let bytes = u64::try_from(size).unwrap_or(0);
    if bytes == 0 {
        return ptr::null_mut();
    }
    let ordinal = u16::try_from(device).unwrap_or(u16::MAX);
    let refusal = match pool::allocate(ordinal, bytes, stream.expose_provenance()) {
        Ok(address) => return ptr::with_exposed_provenance_mut(address as usize),
        Err(refusal) => refusal,
    };
    let message = shortage(device, bytes, refusal);
    if let Some(check) = TORCH_CHECK.get() {
        // SAFETY: strings that end with a zero, which it copies; what it throws leaves nothing undone here.
        unsafe {
            check(
                false,
                c"charioteer_cuda_allocate".as_ptr(),
                c"charioteer".as_ptr(),
                0,
                message.bytes.as_ptr().cast(),
            );
        }
    }
    // For whoever loads this by its name and told nobody: what drivers answer.
    ptr::null_mut()
}

/// PyTorch gives memory back.
///
/// # Safety
/// PyTorch calls it, with what it got and said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn charioteer_cuda_free(
    memory: *mut c_void,
    size: isize,
    device: c_int,
    stream: *mut c_void,
) {
    let address = memory.expose_provenance() as u64;
    if address == 0 {
        return;
    }
    let (ordinal, bytes) = (
        u16::try_from(device).unwrap_or(u16::MAX),
        size.max(0) as u64,
    );
    // SAFETY: no tensor has it any more; what PyTorch enqueued elsewhere it told of, if the program said so.
    unsafe { pool::free(ordinal, address, bytes, stream.expose_provenance()) };
}

/// PyTorch tells of a stream that uses the memory too.
///
/// # Safety
/// PyTorch calls it, with a stream of the memory's device.
unsafe extern "C" fn charioteer_cuda_record_stream(memory: *mut c_void, stream: *mut c_void) {
    let address = memory.expose_provenance() as u64;
    if address != 0 {
        pool::used_on(address, stream.expose_provenance());
    }
}
