//! The driver's functions that are used, with what they answer as errors.
//!
//! The library is looked for once a process, by [`found`]; without it nothing else here is called. A
//! call works with the context that is current on its thread, which is the thread's own business:
//! whoever makes one for the runtime's sake does so within [`Context::enter`], and leaves the thread as
//! it was. Contexts are the primary ones, which all libraries of the process share, and stay until the
//! process ends: somebody's memory may live there.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::ptr;
use std::sync::atomic::AtomicU64;
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use charioteer::machine::{Axis, Strided};
use cudarc::driver::sys::{self, CUresult};

pub(crate) use sys::{CUdeviceptr, CUevent, CUfunction, CUkernel, CUmemoryPool, CUstream};

/// What the driver answered instead of success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault(pub(crate) CUresult);

pub(crate) type Answer<T> = Result<T, Fault>;

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |ask: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
            let mut text = ptr::null();
            // SAFETY: a place for the pointer; what it is set to lives as long as the library.
            unsafe {
                if ask(self.0, &raw mut text) != CUresult::CUDA_SUCCESS || text.is_null() {
                    return None;
                }
                CStr::from_ptr(text).to_str().ok()
            }
        };
        match (text(sys::cuGetErrorString), text(sys::cuGetErrorName)) {
            (Some(what), Some(name)) => write!(f, "{what} ({name})"),
            _ => write!(f, "CUDA error {}", self.0 as u32),
        }
    }
}

#[inline]
pub(crate) fn check(result: CUresult) -> Answer<()> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        fault => Err(Fault(fault)),
    }
}

/// Whether it is done: a device that is not is no fault.
#[inline]
fn poll(result: CUresult) -> Answer<bool> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(true),
        CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        fault => Err(Fault(fault)),
    }
}

/// Whether what a question found to be done is waited for as well (`CHARIOTEER_CONFIRM=1`). That changes
/// nothing but for a tool that takes the host for ordered behind what it waited for alone, and reports
/// what it asked for as a race. The same tool does not take the kernels of a graph for ordered behind what was
/// on its stream before, so that they are launched one by one then.
pub(crate) fn confirms() -> bool {
    static CONFIRMS: LazyLock<bool> =
        LazyLock::new(|| std::env::var_os("CHARIOTEER_CONFIRM").is_some_and(|value| value == "1"));
    *CONFIRMS
}

/// A device as the driver numbers those that `CUDA_VISIBLE_DEVICES` leaves.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// What its maker calls it.
    pub name: String,
    /// Its memory in bytes.
    pub memory: u64,
    /// Its compute capability: major and minor.
    pub capability: (u32, u32),
    /// The bandwidth of its own memory in bytes a second, from its clock and width.
    pub bandwidth: f64,
    /// Whose memory it can reach.
    pub peers: Vec<u16>,
}

/// The devices of the process; none where there is no driver.
///
/// # Errors
/// Why the driver is there and cannot be used.
pub fn found() -> Result<&'static [Found], String> {
    static FOUND: OnceLock<Result<Vec<Found>, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        // SAFETY: the library is the driver's, which runs nothing of note when it is loaded.
        if !unsafe { sys::is_culib_present() } {
            return Ok(Vec::new());
        }
        match look() {
            Ok(found) => Ok(found),
            // No device, or a library without its driver: a machine that has none.
            Err(Fault(
                CUresult::CUDA_ERROR_NO_DEVICE
                | CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
                | CUresult::CUDA_ERROR_STUB_LIBRARY,
            )) => Ok(Vec::new()),
            Err(fault) => Err(format!("the CUDA driver cannot be used: {fault}")),
        }
    });
    found.as_deref().map_err(Clone::clone)
}

fn look() -> Answer<Vec<Found>> {
    let mut count = 0;
    // SAFETY: the library is there.
    unsafe {
        check(sys::cuInit(0))?;
        check(sys::cuDeviceGetCount(&raw mut count))?;
    }
    (0..count).map(|ordinal| look_at(ordinal, count)).collect()
}

fn look_at(ordinal: c_int, count: c_int) -> Answer<Found> {
    let device = device(ordinal)?;
    let mut name = [0; 256];
    let mut memory = 0;
    // SAFETY: places for what is asked, and the length of the one for the name.
    unsafe {
        check(sys::cuDeviceGetName(name.as_mut_ptr(), 256, device))?;
        check(sys::cuDeviceTotalMem_v2(&raw mut memory, device))?;
    }
    // SAFETY: the driver ends the name within its place.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) };
    use sys::CUdevice_attribute_enum as Attribute;
    let ask = |what| -> Answer<u32> {
        let mut value = 0;
        // SAFETY: a place for what is asked.
        check(unsafe { sys::cuDeviceGetAttribute(&raw mut value, what, device) })?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let clock = ask(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
    let width = ask(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
    let mut peers = Vec::new();
    for peer in (0..count).filter(|peer| *peer != ordinal) {
        let mut can = 0;
        // SAFETY: a place for what is asked.
        check(unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, device, self::device(peer)?) })?;
        if can != 0 {
            peers.push(u16::try_from(peer).unwrap_or(u16::MAX));
        }
    }
    Ok(Found {
        peers,
        name: name.to_string_lossy().into_owned(),
        memory: memory as u64,
        capability: (
            ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // Kilohertz at a double data rate, and bits.
        bandwidth: 2e3 * f64::from(clock) * f64::from(width) / 8.0,
    })
}

fn device(ordinal: c_int) -> Answer<sys::CUdevice> {
    let mut device = 0;
    // SAFETY: a place for what is asked.
    check(unsafe { sys::cuDeviceGet(&raw mut device, ordinal) })?;
    Ok(device)
}

/// The primary context of a device, and what is kept of it between two uses.
pub(crate) struct Context {
    context: sys::CUcontext,
    pub(crate) pool: CUmemoryPool,
    /// Bytes of the pool that libraries have.
    pub(crate) lent: AtomicU64,
    /// On which memory is given back that was used on several streams.
    reclaimer: OnceLock<Handle<CUstream>>,
    streams: Mutex<Vec<Handle<CUstream>>>,
    /// By their [`Purpose`].
    events: [Mutex<Vec<Handle<CUevent>>>; 3],
}

/// What an event is for, beside order between streams.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Nothing: it is asked for at most.
    Order,
    /// A thread may sleep for it, which costs whoever records it a microsecond more.
    Sleep,
    /// It has a time.
    Time,
}

impl Purpose {
    /// Of an event for which a thread may sleep, or need not.
    pub(crate) fn of(sleeps: bool) -> Self {
        if sleeps { Self::Sleep } else { Self::Order }
    }
}

/// A handle of the driver's, which any thread may use.
#[derive(Clone, Copy)]
pub(crate) struct Handle<T>(pub(crate) T);

// SAFETY: the driver's handles belong to no thread.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as above; the driver locks what it has to.
unsafe impl<T> Sync for Handle<T> {}

/// The default stream of whatever context is current, as libraries have it unless they say otherwise.
pub(crate) fn legacy_stream() -> Handle<CUstream> {
    // The driver's number for it, `CU_STREAM_LEGACY`.
    Handle(ptr::without_provenance_mut(1))
}

// SAFETY: a context and a pool are handles of the driver's, see `Handle`.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The context that was current on the thread, which is so again when this is dropped.
pub(crate) struct Entered {
    before: sys::CUcontext,
    changed: bool,
}

impl Drop for Entered {
    #[inline]
    fn drop(&mut self) {
        if self.changed {
            // SAFETY: it was current before, and may be none.
            let _ = unsafe { sys::cuCtxSetCurrent(self.before) };
        }
    }
}

impl Context {
    /// The primary context of the device with that number, with a memory pool of the runtime's that
    /// keeps what is given back.
    pub(crate) fn retain(ordinal: u16) -> Answer<Self> {
        let ordinal = c_int::from(ordinal);
        let device = device(ordinal)?;
        let mut context = ptr::null_mut();
        let mut pool = ptr::null_mut();
        // SAFETY: a pool's properties are plain data, and all zeros are those of none.
        let mut properties: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
        properties.allocType = sys::CUmemAllocationType_enum::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location = location(ordinal);
        let mut keep = u64::MAX;
        // SAFETY: places for what is asked, and for what is said.
        unsafe {
            check(sys::cuDevicePrimaryCtxRetain(&raw mut context, device))?;
            check(sys::cuMemPoolCreate(&raw mut pool, &raw const properties))?;
            check(sys::cuMemPoolSetAttribute(
                pool,
                sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                (&raw mut keep).cast(),
            ))?;
        }
        Ok(Self {
            context,
            pool,
            lent: AtomicU64::new(0),
            reclaimer: OnceLock::new(),
            streams: Mutex::default(),
            events: Default::default(),
        })
    }

    /// Makes it current on this thread for good.
    pub(crate) fn make_current(&self) -> Answer<()> {
        // SAFETY: the context is retained for ever.
        check(unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// Makes it current until what is given is dropped.
    #[inline]
    pub(crate) fn enter(&self) -> Answer<Entered> {
        let mut before = ptr::null_mut();
        // SAFETY: a place for what is asked; the context is retained for ever.
        unsafe {
            check(sys::cuCtxGetCurrent(&raw mut before))?;
            let changed = before != self.context;
            if changed {
                check(sys::cuCtxSetCurrent(self.context))?;
            }
            Ok(Entered { before, changed })
        }
    }

    /// A stream that waits for no other of itself: one that was given back, or a new one.
    pub(crate) fn stream(&self) -> Answer<Handle<CUstream>> {
        if let Some(known) = lock(&self.streams).pop() {
            return Ok(known);
        }
        let _entered = self.enter()?;
        let mut stream = ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: a place for the handle.
        check(unsafe { sys::cuStreamCreate(&raw mut stream, flags) })?;
        if confirms() {
            // Such a tool does not take a new stream for behind what the host waited for before.
            // SAFETY: the context is current.
            check(unsafe { sys::cuCtxSynchronize() })?;
        }
        Ok(Handle(stream))
    }

    /// Gives a stream back on which nothing is in flight.
    pub(crate) fn give_back(&self, stream: Handle<CUstream>) {
        lock(&self.streams).push(stream);
    }

    /// The stream on which memory is given back that was used on several.
    pub(crate) fn reclaimer(&self) -> Answer<Handle<CUstream>> {
        if let Some(known) = self.reclaimer.get() {
            return Ok(*known);
        }
        let new = self.stream()?;
        let first = *self.reclaimer.get_or_init(|| new);
        if first.0 != new.0 {
            self.give_back(new);
        }
        Ok(first)
    }

    /// Whether all that is enqueued on the stream is done.
    #[inline]
    pub(crate) fn is_idle(&self, stream: Handle<CUstream>) -> Answer<bool> {
        let _entered = self.enter()?;
        // SAFETY: streams are never destroyed.
        let idle = poll(unsafe { sys::cuStreamQuery(stream.0) })?;
        if idle && confirms() {
            // SAFETY: as before.
            check(unsafe { sys::cuStreamSynchronize(stream.0) })?;
        }
        Ok(idle)
    }

    /// An event behind all that is enqueued on the stream.
    #[inline]
    pub(crate) fn record(
        &'static self,
        stream: Handle<CUstream>,
        purpose: Purpose,
    ) -> Answer<Recorded> {
        let _entered = self.enter()?;
        let event = self.event(purpose)?;
        event.record(stream)?;
        Ok(event)
    }

    /// An event that is to be recorded, in this context, which is current.
    #[inline]
    pub(crate) fn event(&'static self, purpose: Purpose) -> Answer<Recorded> {
        use sys::CUevent_flags_enum as Flags;
        let known = lock(&self.events[purpose as usize]).pop();
        let event = match known {
            Some(event) => event,
            None => {
                let mut event = ptr::null_mut();
                let flags = match purpose {
                    Purpose::Time => Flags::CU_EVENT_DEFAULT as c_uint,
                    Purpose::Order => Flags::CU_EVENT_DISABLE_TIMING as c_uint,
                    Purpose::Sleep => {
                        Flags::CU_EVENT_DISABLE_TIMING as c_uint
                            | Flags::CU_EVENT_BLOCKING_SYNC as c_uint
                    }
                };
                // SAFETY: a place for the handle.
                check(unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
                Handle(event)
            }
        };
        Ok(Recorded {
            context: self,
            event,
            purpose,
        })
    }

    /// What is enqueued on the stream from now on starts after the event, of any device.
    #[inline]
    pub(crate) fn wait(&self, stream: Handle<CUstream>, event: &Recorded) -> Answer<()> {
        let _entered = self.enter()?;
        // SAFETY: streams are never destroyed; the event lives, and the driver keeps what it needs.
        check(unsafe { sys::cuStreamWaitEvent(stream.0, event.event.0, 0) })
    }

    /// Lets what runs in this context reach the memory of the other, and what is in its pool.
    pub(crate) fn reach(&self, other: &Self, own: u16) -> Answer<()> {
        let _entered = self.enter()?;
        // SAFETY: both contexts are retained for ever.
        match unsafe { sys::cuCtxEnablePeerAccess(other.context, 0) } {
            CUresult::CUDA_SUCCESS | CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => {}
            fault => return Err(Fault(fault)),
        }
        let access = sys::CUmemAccessDesc {
            location: location(c_int::from(own)),
            flags: sys::CUmemAccess_flags_enum::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: one description, and the other's pool.
        check(unsafe { sys::cuMemPoolSetAccess(other.pool, &raw const access, 1) })
    }

    pub(crate) fn allocate(&self, bytes: u64, stream: Handle<CUstream>) -> Answer<CUdeviceptr> {
        let _entered = self.enter()?;
        let mut address = 0;
        let bytes =
            usize::try_from(bytes.max(1)).map_err(|_| Fault(CUresult::CUDA_ERROR_OUT_OF_MEMORY))?;
        // SAFETY: a place for the address; the pool is never destroyed.
        check(unsafe {
            sys::cuMemAllocFromPoolAsync(&raw mut address, bytes, self.pool, stream.0)
        })?;
        Ok(address)
    }

    pub(crate) fn free(&self, address: CUdeviceptr, stream: Handle<CUstream>) -> Answer<()> {
        let _entered = self.enter()?;
        // SAFETY: the caller knows that the address is an allocation's, which it gives up.
        check(unsafe { sys::cuMemFreeAsync(address, stream.0) })
    }

    /// Waits until nothing runs in the context, and gives memory back then.
    pub(crate) fn free_when_idle(&self, address: CUdeviceptr) -> Answer<()> {
        let _entered = self.enter()?;
        // SAFETY: as above; of memory of a pool the driver takes it that nothing uses it, which is so.
        unsafe {
            check(sys::cuCtxSynchronize())?;
            check(sys::cuMemFree_v2(address))
        }
    }

    /// Bytes that nobody has: those that the driver has, and those that the pool keeps.
    pub(crate) fn free_memory(&self) -> Answer<u64> {
        use sys::CUmemPool_attribute_enum as Attribute;
        let _entered = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: places for what is asked.
        check(unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        let ask = |what| -> Answer<u64> {
            let mut value = 0_u64;
            // SAFETY: a place for what is asked.
            check(unsafe { sys::cuMemPoolGetAttribute(self.pool, what, (&raw mut value).cast()) })?;
            Ok(value)
        };
        let reserved = ask(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = ask(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok(free as u64 + reserved.saturating_sub(used))
    }

    /// Copies the elements of a box in stream order between addresses of the one address space that all
    /// devices and the host share. The driver copies one or two axes of runs at a time.
    ///
    /// # Safety
    /// Host memory is pinned, and it and the devices' stay valid until the copy is done.
    pub(crate) unsafe fn copy(
        &self,
        from: Side,
        to: Side,
        shape: &Strided,
        stream: Handle<CUstream>,
    ) -> Answer<()> {
        let _entered = self.enter()?;
        // SAFETY: as the caller says.
        unsafe { copy_axes(from, to, shape.run, &shape.axes, stream) }
    }

    /// Calls `call` on a thread of the driver's in stream order; what is enqueued behind it waits. It
    /// calls no function of the driver's.
    pub(crate) fn call(
        &self,
        stream: Handle<CUstream>,
        call: Box<dyn FnOnce() + Send>,
    ) -> Answer<()> {
        unsafe extern "C" fn run(data: *mut c_void) {
            // SAFETY: the box that was given below, once.
            let call = unsafe { Box::from_raw(data.cast::<Box<dyn FnOnce() + Send>>()) };
            call();
        }
        let _entered = self.enter()?;
        let data = Box::into_raw(Box::new(call));
        // SAFETY: the function takes the box that it is given. It does not unwind: what is called
        // copies bytes.
        let result = check(unsafe { sys::cuLaunchHostFunc(stream.0, Some(run), data.cast()) });
        if result.is_err() {
            // SAFETY: nobody else has it.
            drop(unsafe { Box::from_raw(data) });
        }
        result
    }
}

/// One side of a copy: memory of a device, or pinned memory of the host.
#[derive(Clone, Copy)]
pub(crate) struct Side {
    pub(crate) address: u64,
    pub(crate) is_host: bool,
}

impl Side {
    pub(crate) fn offset(self, bytes: u64) -> Self {
        Self {
            address: self.address + bytes,
            ..self
        }
    }

    /// What it is, as an address of the host and as one of a device: the one that does not apply is
    /// ignored.
    fn kind(self) -> (sys::CUmemorytype, *mut c_void, CUdeviceptr) {
        if self.is_host {
            let address = ptr::with_exposed_provenance_mut(self.address as usize);
            (sys::CUmemorytype::CU_MEMORYTYPE_HOST, address, 0)
        } else {
            // Also a peer's.
            let kind = sys::CUmemorytype::CU_MEMORYTYPE_UNIFIED;
            (kind, ptr::null_mut(), self.address)
        }
    }
}

/// The most that the driver takes as the distance of two rows, on any device.
const MAX_PITCH: u64 = (1 << 31) - 1;

/// Copies runs along the axes, with as few calls as there may be.
///
/// # Safety
/// As [`Context::copy`]; its context is current.
unsafe fn copy_axes(
    from: Side,
    to: Side,
    run: u64,
    axes: &[Axis],
    stream: Handle<CUstream>,
) -> Answer<()> {
    let bytes = |bytes: u64| usize::try_from(bytes).expect("addresses are as wide");
    // Rows that do not overlap, and are no farther apart than may be.
    let are_rows = |axis: &Axis| {
        let pitches = [axis.from, axis.to];
        pitches
            .iter()
            .all(|pitch| (run..=MAX_PITCH).contains(pitch))
    };
    match axes {
        [] => {
            // SAFETY: as the caller says.
            check(unsafe { sys::cuMemcpyAsync(to.address, from.address, bytes(run), stream.0) })
        }
        [rows] if are_rows(rows) => {
            let ((source, from_host, from), (target, to_host, to)) = (from.kind(), to.kind());
            let copy = sys::CUDA_MEMCPY2D {
                srcXInBytes: 0,
                srcY: 0,
                srcMemoryType: source,
                srcHost: from_host,
                srcDevice: from,
                srcArray: ptr::null_mut(),
                srcPitch: bytes(rows.from),
                dstXInBytes: 0,
                dstY: 0,
                dstMemoryType: target,
                dstHost: to_host,
                dstDevice: to,
                dstArray: ptr::null_mut(),
                dstPitch: bytes(rows.to),
                WidthInBytes: bytes(run),
                Height: bytes(rows.extent),
            };
            // SAFETY: as the caller says, of all rows.
            check(unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, stream.0) })
        }
        [planes, rows]
            if are_rows(rows)
                && planes.from.is_multiple_of(rows.from)
                && planes.to.is_multiple_of(rows.to)
                && planes.from / rows.from >= rows.extent
                && planes.to / rows.to >= rows.extent =>
        {
            let ((source, from_host, from), (target, to_host, to)) = (from.kind(), to.kind());
            let copy = sys::CUDA_MEMCPY3D {
                srcXInBytes: 0,
                srcY: 0,
                srcZ: 0,
                srcLOD: 0,
                srcMemoryType: source,
                srcHost: from_host,
                srcDevice: from,
                srcArray: ptr::null_mut(),
                reserved0: ptr::null_mut(),
                srcPitch: bytes(rows.from),
                srcHeight: bytes(planes.from / rows.from),
                dstXInBytes: 0,
                dstY: 0,
                dstZ: 0,
                dstLOD: 0,
                dstMemoryType: target,
                dstHost: to_host,
                dstDevice: to,
                dstArray: ptr::null_mut(),
                reserved1: ptr::null_mut(),
                dstPitch: bytes(rows.to),
                dstHeight: bytes(planes.to / rows.to),
                WidthInBytes: bytes(run),
                Height: bytes(rows.extent),
                Depth: bytes(planes.extent),
            };
            // SAFETY: as the caller says, of all rows of all planes.
            check(unsafe { sys::cuMemcpy3DAsync_v2(&raw const copy, stream.0) })
        }
        [outer, inner @ ..] => (0..outer.extent).try_for_each(|at| {
            let (from, to) = (from.offset(at * outer.from), to.offset(at * outer.to));
            // SAFETY: as the caller says.
            unsafe { copy_axes(from, to, run, inner, stream) }
        }),
    }
}

fn location(ordinal: c_int) -> sys::CUmemLocation {
    sys::CUmemLocation {
        type_: sys::CUmemLocationType_enum::CU_MEM_LOCATION_TYPE_DEVICE,
        id: ordinal,
    }
}

/// An event that was recorded, or is to be; dropped, it is recorded again for somebody else.
pub(crate) struct Recorded {
    context: &'static Context,
    event: Handle<CUevent>,
    purpose: Purpose,
}

impl Recorded {
    /// For the driver, as long as this lives.
    pub(crate) fn handle(&self) -> CUevent {
        self.event.0
    }

    /// Puts it behind all that is enqueued on a stream of its context, which is current.
    #[inline]
    pub(crate) fn record(&self, stream: Handle<CUstream>) -> Answer<()> {
        // SAFETY: the event is nobody else's; streams are never destroyed.
        check(unsafe { sys::cuEventRecord(self.event.0, stream.0) })
    }

    #[inline]
    pub(crate) fn is_done(&self) -> Answer<bool> {
        let _entered = self.context.enter()?;
        // SAFETY: the event lives.
        let done = poll(unsafe { sys::cuEventQuery(self.event.0) })?;
        if done && confirms() {
            // SAFETY: the event lives.
            check(unsafe { sys::cuEventSynchronize(self.event.0) })?;
        }
        Ok(done)
    }

    /// Whether a thread that waits for it sleeps.
    #[inline]
    pub(crate) fn may_sleep(&self) -> bool {
        self.purpose == Purpose::Sleep
    }

    /// Waits until it is done.
    pub(crate) fn block(&self) -> Answer<()> {
        let _entered = self.context.enter()?;
        // SAFETY: the event lives.
        check(unsafe { sys::cuEventSynchronize(self.event.0) })
    }

    /// The time from another one to this one; `None` unless both are done.
    pub(crate) fn since(&self, from: &Self) -> Option<Duration> {
        let _entered = self.context.enter().ok()?;
        let mut milliseconds = 0.0;
        // SAFETY: a place for the time; both events live.
        let result =
            unsafe { sys::cuEventElapsedTime(&raw mut milliseconds, from.event.0, self.event.0) };
        check(result).ok()?;
        Duration::try_from_secs_f32(milliseconds / 1e3).ok()
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        lock(&self.context.events[self.purpose as usize]).push(self.event);
    }
}

/// Pinned memory of the host, which the copy engines of all devices reach.
pub(crate) struct Pinned {
    address: *mut c_void,
    bytes: usize,
}

// SAFETY: plain memory.
unsafe impl Send for Pinned {}

impl Pinned {
    pub(crate) fn new(context: &Context, bytes: usize) -> Answer<Self> {
        let _entered = context.enter()?;
        let mut address = ptr::null_mut();
        // SAFETY: a place for the address.
        check(unsafe {
            sys::cuMemHostAlloc(&raw mut address, bytes, sys::CU_MEMHOSTALLOC_PORTABLE)
        })?;
        Ok(Self { address, bytes })
    }

    pub(crate) fn address(&self) -> *mut u8 {
        self.address.cast()
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: it was allocated above, and whoever drops it knows that no copy uses it.
        let _ = unsafe { sys::cuMemFreeHost(self.address) };
    }
}

/// Code of devices that is loaded, and stays so until this is dropped.
pub(crate) struct Library(Handle<sys::CUlibrary>);

impl Library {
    /// Loads an image: a cubin, a fat binary, or PTX that ends with a zero. Needs no context: a device gets
    /// it with the first function that is looked up there.
    pub(crate) fn load(image: &[u8]) -> Answer<Self> {
        let mut library = ptr::null_mut();
        // SAFETY: a place for the handle; the image says itself how long it is, or ends with a zero.
        check(unsafe {
            sys::cuLibraryLoadData(
                &raw mut library,
                image.as_ptr().cast(),
                ptr::null_mut(),
                ptr::null_mut(),
                0,
                ptr::null_mut(),
                ptr::null_mut(),
                0,
            )
        })?;
        Ok(Self(Handle(library)))
    }

    pub(crate) fn kernel(&self, name: &CStr) -> Answer<Handle<CUkernel>> {
        let mut kernel = ptr::null_mut();
        // SAFETY: a place for the handle; the library is loaded.
        check(unsafe { sys::cuLibraryGetKernel(&raw mut kernel, self.0.0, name.as_ptr()) })?;
        Ok(Handle(kernel))
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: whoever launched its kernels keeps it until their work is done. A driver that has ended
        // refuses.
        let _ = unsafe { sys::cuLibraryUnload(self.0.0) };
    }
}

/// The function of a kernel in the context that is current.
pub(crate) fn function_of(kernel: Handle<CUkernel>) -> Answer<Handle<CUfunction>> {
    let mut function = ptr::null_mut();
    // SAFETY: a place for the handle; the kernel's library is loaded.
    check(unsafe { sys::cuKernelGetFunction(&raw mut function, kernel.0) })?;
    Ok(Handle(function))
}

/// Lets launches of a function of the context that is current ask for so much dynamic shared memory.
pub(crate) fn allow_shared(function: Handle<CUfunction>, bytes: u32) -> Answer<()> {
    let what = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    let bytes = c_int::try_from(bytes).map_err(|_| Fault(CUresult::CUDA_ERROR_INVALID_VALUE))?;
    // SAFETY: the function is of the context that is current.
    check(unsafe { sys::cuFuncSetAttribute(function.0, what, bytes) })
}

/// Enqueues a function of the context that is current.
///
/// # Safety
/// The arguments are pointers to values of the types that the function takes, and what these point to is
/// valid until the work is done.
#[inline]
pub(crate) unsafe fn launch(
    function: Handle<CUfunction>,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: Handle<CUstream>,
    arguments: &mut [*mut c_void],
) -> Answer<()> {
    // SAFETY: as the caller says; the driver copies the arguments before it returns.
    check(unsafe {
        sys::cuLaunchKernel(
            function.0,
            grid[0],
            grid[1],
            grid[2],
            block[0],
            block[1],
            block[2],
            shared,
            stream.0,
            arguments.as_mut_ptr(),
            ptr::null_mut(),
        )
    })
}

/// The sizes of a kernel's parameters, if the driver is one that tells them.
pub(crate) fn kernel_parameters(kernel: Handle<CUkernel>) -> Option<Vec<usize>> {
    parameters(c"cuKernelGetParamInfo", kernel.0.cast())
}

/// The sizes of a function's parameters, if the driver is one that tells them.
pub(crate) fn function_parameters(function: Handle<CUfunction>) -> Option<Vec<usize>> {
    parameters(c"cuFuncGetParamInfo", function.0.cast())
}

fn parameters(ask: &CStr, of: *mut c_void) -> Option<Vec<usize>> {
    type Ask = unsafe extern "C" fn(*mut c_void, usize, *mut usize, *mut usize) -> CUresult;
    // SAFETY: both functions have this type; one that the driver lacks is not found.
    let ask = unsafe { sys::culib().get::<Ask>(ask.to_bytes_with_nul()).ok()? };
    let mut sizes = Vec::new();
    loop {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: a handle that is asked for, and places for the answer.
        match unsafe { ask(of, sizes.len(), &raw mut offset, &raw mut size) } {
            CUresult::CUDA_SUCCESS => sizes.push(size),
            // There is no such parameter.
            CUresult::CUDA_ERROR_INVALID_VALUE => return Some(sizes),
            _ => return None,
        }
    }
}

/// Whether all of some host memory is pinned, by whomever.
pub(crate) fn is_pinned(context: &Context, address: u64, bytes: u64) -> bool {
    use sys::CUpointer_attribute_enum as Attribute;
    let Ok(_entered) = context.enter() else {
        return false;
    };
    let is_host = |address: u64| {
        let mut kind: c_uint = 0;
        let what = Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        // SAFETY: a place for what is asked; the driver answers for any address.
        let result = unsafe { sys::cuPointerGetAttribute((&raw mut kind).cast(), what, address) };
        // Memory that the driver does not know is pageable, and answered with an error.
        result == CUresult::CUDA_SUCCESS
            && kind == sys::CUmemorytype_enum::CU_MEMORYTYPE_HOST as c_uint
    };
    if !is_host(address) {
        return false;
    }
    // A page at either end may be pinned for the sake of a neighbour.
    let ask = |what| {
        let mut value: u64 = 0;
        // SAFETY: as above.
        let result = unsafe { sys::cuPointerGetAttribute((&raw mut value).cast(), what, address) };
        (result == CUresult::CUDA_SUCCESS).then_some(value)
    };
    let start = ask(Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR);
    let size = ask(Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE);
    match (start, size) {
        (Some(start), Some(size @ 1..)) => start <= address && address - start + bytes <= size,
        _ => is_host(address + bytes.saturating_sub(1)),
    }
}

/// The number of the device whose memory is at an address.
pub(crate) fn ordinal_of(context: &Context, address: u64) -> Option<u16> {
    use sys::CUpointer_attribute_enum as Attribute;
    let _entered = context.enter().ok()?;
    let mut ordinal: c_int = 0;
    let what = Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
    // SAFETY: a place for what is asked; the driver answers for any address.
    let result = unsafe { sys::cuPointerGetAttribute((&raw mut ordinal).cast(), what, address) };
    check(result).ok()?;
    u16::try_from(ordinal).ok()
}

/// Pins memory of the host that is somebody's, for all contexts.
///
/// # Safety
/// It stays valid until it is [unregistered](unregister).
pub(crate) unsafe fn register(context: &Context, address: u64, bytes: usize) -> Answer<()> {
    let _entered = context.enter()?;
    let first = ptr::with_exposed_provenance_mut(address as usize);
    // SAFETY: as the caller says.
    check(unsafe { sys::cuMemHostRegister_v2(first, bytes, sys::CU_MEMHOSTREGISTER_PORTABLE) })
}

/// Undoes [`register`].
pub(crate) fn unregister(context: &Context, address: u64) -> Answer<()> {
    let _entered = context.enter()?;
    let first = ptr::with_exposed_provenance_mut(address as usize);
    // SAFETY: the driver answers for any address.
    check(unsafe { sys::cuMemHostUnregister(first) })
}
