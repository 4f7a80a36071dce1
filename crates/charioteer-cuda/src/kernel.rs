//! Kernels: code of devices, and how it is launched on a stream of the runtime's.
//!
//! A [`Kernel`] is one function on all the devices of the process. What it is there, [`Code`], is said
//! for each device before the first launch, by whoever knows: an image, which is loaded without a
//! context, or a handle that another library owns. The function of a device's context is looked up by
//! the first launch there, which is when the driver loads the code onto the device.
//!
//! Errors of a launch that concern nothing but the launch leave the device as it is; all others are what
//! work before it did, and the device's end.

use std::ffi::CStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use charioteer::machine::{DeviceError, Stream, defer, may_defer};
use cudarc::driver::sys::CUresult;

use crate::batch::{Launch, pointers};
use crate::device::CudaGpu;
use crate::driver::{self, Answer, CUfunction, CUkernel, Fault, Handle, Library};

/// Shared memory that a launch may ask for unless the function's limit is raised.
const PLAIN_SHARED: u32 = 48 << 10;

/// How many shapes of launches are known of a function.
const SHAPES: usize = 16;

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dimensions {
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y and z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
}

/// What a kernel is on a device.
#[derive(Clone)]
enum Code {
    /// Of no context; its image stays loaded as long as this.
    Kernel(Handle<CUkernel>, Option<Arc<Library>>),
    /// Of the device's context.
    Function(Handle<CUfunction>),
}

/// The function of a device's context.
struct Function {
    handle: Handle<CUfunction>,
    /// Dynamic shared memory that a launch may ask for.
    shared: AtomicU32,
    /// Shapes with which it was launched, so that the driver takes them; the first few.
    shapes: boxcar::Vec<Dimensions>,
}

/// A function that devices run. See the module.
pub struct Kernel {
    code: Box<[OnceLock<Code>]>,
    functions: Box<[OnceLock<Function>]>,
}

impl Kernel {
    /// Of no device yet.
    #[must_use]
    pub fn new() -> Self {
        let count = driver::found().map_or(0, <[_]>::len);
        Self {
            code: (0..count).map(|_| OnceLock::new()).collect(),
            functions: (0..count).map(|_| OnceLock::new()).collect(),
        }
    }

    /// Whether it is known what the kernel is on a device.
    #[must_use]
    pub fn is_on(&self, gpu: &CudaGpu) -> bool {
        self.code[gpu.ordinal()].get().is_some()
    }

    /// It is the function `entry` of an image (a cubin, PTX that ends with a zero, a fat binary) on those
    /// devices.
    ///
    /// # Errors
    /// What the driver says of the image, or that there is no such function in it.
    pub fn load(&self, gpus: &[&CudaGpu], image: &[u8], entry: &CStr) -> Result<(), String> {
        let library = Library::load(image).map_err(|fault| fault.to_string())?;
        let kernel = library.kernel(entry).map_err(|fault| match fault {
            Fault(CUresult::CUDA_ERROR_NOT_FOUND) => {
                format!("the code has no kernel {}", entry.to_string_lossy())
            }
            fault => fault.to_string(),
        })?;
        let code = Code::Kernel(kernel, Some(Arc::new(library)));
        for gpu in gpus {
            let _ = self.code[gpu.ordinal()].set(code.clone());
        }
        Ok(())
    }

    /// It is a kernel (`CUkernel`) of another library, on any device.
    ///
    /// # Safety
    /// The handle is one, and stays valid as long as this.
    pub unsafe fn adopt_kernel(&self, gpu: &CudaGpu, handle: usize) {
        let kernel = Handle(handle as CUkernel);
        let _ = self.code[gpu.ordinal()].set(Code::Kernel(kernel, None));
    }

    /// It is a function (`CUfunction`) of the device's primary context.
    ///
    /// # Safety
    /// As [`adopt_kernel`](Self::adopt_kernel).
    pub unsafe fn adopt_function(&self, gpu: &CudaGpu, handle: usize) {
        let function = Handle(handle as CUfunction);
        let _ = self.code[gpu.ordinal()].set(Code::Function(function));
    }

    /// The size of each parameter in bytes, if the driver tells that (from CUDA 12.4 on).
    #[must_use]
    pub fn parameters(&self, gpu: &CudaGpu) -> Option<Vec<usize>> {
        match self.code[gpu.ordinal()].get()? {
            Code::Kernel(kernel, _) => driver::kernel_parameters(*kernel),
            Code::Function(function) => driver::function_parameters(*function),
        }
    }

    /// The function of the context that is current, which is the device's.
    fn function(&self, ordinal: usize) -> Answer<&Function> {
        let place = &self.functions[ordinal];
        if let Some(known) = place.get() {
            return Ok(known);
        }
        let code = self.code[ordinal].get();
        let handle = match code.expect("whoever launches knows the code") {
            Code::Kernel(kernel, _) => driver::function_of(*kernel)?,
            Code::Function(function) => *function,
        };
        Ok(place.get_or_init(|| Function {
            handle,
            shared: AtomicU32::new(PLAIN_SHARED),
            shapes: boxcar::Vec::new(),
        }))
    }
}

impl Default for Kernel {
    fn default() -> Self {
        Self::new()
    }
}

impl Function {
    fn has_taken(&self, dimensions: &Dimensions) -> bool {
        self.shapes.iter().any(|(_, it)| it == dimensions)
    }

    /// The driver took a launch of this shape.
    fn took(&self, dimensions: &Dimensions) {
        if self.shapes.count() < SHAPES && !self.has_taken(dimensions) {
            self.shapes.push(*dimensions);
        }
    }

    /// Raises the limit of dynamic shared memory where a launch needs more.
    fn allow(&self, shared: u32) -> Answer<()> {
        if shared > self.shared.load(Ordering::Relaxed) {
            driver::allow_shared(self.handle, shared)?;
            self.shared.fetch_max(shared, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Whether an error of a launch says something of the launch alone.
fn concerns_launch(fault: Fault) -> bool {
    use CUresult as Result;
    matches!(
        fault.0,
        Result::CUDA_ERROR_INVALID_VALUE
            | Result::CUDA_ERROR_OUT_OF_MEMORY
            | Result::CUDA_ERROR_INVALID_IMAGE
            | Result::CUDA_ERROR_NO_BINARY_FOR_GPU
            | Result::CUDA_ERROR_INVALID_PTX
            | Result::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | Result::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
            | Result::CUDA_ERROR_INVALID_SOURCE
            | Result::CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND
            | Result::CUDA_ERROR_INVALID_HANDLE
            | Result::CUDA_ERROR_NOT_FOUND
            | Result::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
            | Result::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
            | Result::CUDA_ERROR_NOT_PERMITTED
            | Result::CUDA_ERROR_NOT_SUPPORTED
    )
}

impl CudaGpu {
    /// Enqueues a kernel, whose code on this device is known. The values of its parameters are in `words`,
    /// where each begins in `starts`, and are copied before this returns.
    ///
    /// # Safety
    /// The arguments are those that the kernel takes, and what they point to stays valid until the work
    /// is done.
    ///
    /// # Errors
    /// [`DeviceError::Operation`] for what the driver says of this launch; [`DeviceError::Lost`].
    pub unsafe fn launch(
        &self,
        kernel: &Kernel,
        dimensions: &Dimensions,
        words: &[u64],
        starts: &[u16],
        stream: Stream,
    ) -> Result<(), DeviceError> {
        let timeline = self.own(stream)?;
        let lane = &timeline.lane;
        let launch = || {
            let _entered = lane.context.enter()?;
            let function = kernel.function(self.ordinal())?;
            function.allow(dimensions.shared)?;
            let mut arguments = pointers(words, starts);
            // SAFETY: as the caller says.
            unsafe {
                driver::launch(
                    function.handle,
                    dimensions.grid,
                    dimensions.block,
                    dimensions.shared,
                    lane.stream,
                    &mut arguments,
                )
            }?;
            function.took(dimensions);
            Ok(())
        };
        let answer = launch();
        if answer.is_ok() {
            timeline.enqueued();
        }
        match answer {
            Err(fault) if concerns_launch(fault) => {
                Err(DeviceError::Operation(self.id(), fault.to_string().into()))
            }
            answer => self.answer(answer),
        }
    }

    /// The same for whoever enqueues nothing else, and records an event next: if this thread may
    /// [defer](charioteer::machine::defer), the launch is put off, unless it could be refused (one of this
    /// shape was made before) or the code is another library's.
    ///
    /// # Safety
    /// As of [`launch`](Self::launch).
    ///
    /// # Errors
    /// As of [`launch`](Self::launch).
    pub unsafe fn launch_deferred(
        &self,
        kernel: &Kernel,
        dimensions: &Dimensions,
        words: &[u64],
        starts: &[u16],
        stream: Stream,
    ) -> Result<(), DeviceError> {
        if may_defer()
            && let Some(function) = kernel.functions[self.ordinal()].get()
            && let Some(Code::Kernel(_, Some(code))) = kernel.code[self.ordinal()].get()
            && function.has_taken(dimensions)
        {
            let timeline = self.own_behind(stream)?;
            let launch = Launch {
                function: function.handle,
                code: Arc::clone(code),
                dimensions: *dimensions,
                words: words.into(),
                starts: starts.into(),
            };
            if timeline.defer(launch).is_ok() {
                defer(timeline);
                return Ok(());
            }
        }
        // SAFETY: as the caller says.
        unsafe { self.launch(kernel, dimensions, words, starts, stream) }
    }
}
