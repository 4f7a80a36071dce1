//! What the runtime needs of a device; see the module for the rules.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// A kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// The host: its cores over its one memory.
    Cpu,
    /// An accelerator with streams and memory of its own.
    Gpu,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
        })
    }
}

/// A device of one machine that has memory of its own: the host is number 0, accelerators follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(pub u16);

/// The host.
pub const HOST: DeviceId = DeviceId(0);

impl DeviceId {
    /// The accelerator with that index among accelerators.
    #[must_use]
    pub const fn gpu(index: u16) -> Self {
        Self(index + 1)
    }

    /// Its kind.
    #[must_use]
    pub const fn kind(self) -> Kind {
        if self.0 == 0 { Kind::Cpu } else { Kind::Gpu }
    }

    /// Its index among the devices of its kind.
    #[must_use]
    pub const fn index(self) -> u16 {
        if self.0 == 0 { 0 } else { self.0 - 1 }
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind() {
            Kind::Cpu => f.write_str("host"),
            Kind::Gpu => write!(f, "gpu({})", self.index()),
        }
    }
}

/// A stream of a device; the number is the implementation's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Stream {
    /// Its device.
    pub device: DeviceId,
    /// Its number on that device.
    pub number: u32,
}

/// A position on the timeline of a stream: complete when the work up to it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Event {
    /// Its stream.
    pub stream: Stream,
    /// The position; of two on one stream the larger one is later.
    pub position: u64,
}

/// A mark for a time on a stream of a device; what is in it is the implementation's.
#[derive(Clone)]
pub struct Mark(pub Arc<dyn Any + Send + Sync>);

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mark").finish_non_exhaustive()
    }
}

/// Work on a device that is not enqueued through this interface: that of another library, say. It tells what
/// comes after it on which device; what is in it is the implementation's.
#[derive(Clone)]
pub struct Foreign(pub Arc<dyn Any + Send + Sync>);

impl fmt::Debug for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Foreign").finish_non_exhaustive()
    }
}

/// Memory of a device, by the address in that device's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DevicePointer {
    /// The device whose memory it is.
    pub device: DeviceId,
    /// The address there.
    pub address: u64,
}

impl DevicePointer {
    /// The address `bytes` further on.
    #[must_use]
    pub fn offset(self, bytes: u64) -> Self {
        Self {
            address: self.address + bytes,
            ..self
        }
    }
}

/// What is known of a device without touching it.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    /// Which one it is.
    pub id: DeviceId,
    /// What its maker calls it.
    pub name: String,
    /// Its memory in bytes.
    pub memory: u64,
}

/// Why a device refused or failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceError {
    /// The device failed for good: why. Everything that was on it is gone.
    Lost(DeviceId, Arc<str>),
    /// It has no room: bytes wanted, bytes free.
    OutOfMemory {
        /// Where.
        device: DeviceId,
        /// Bytes asked for.
        wanted: u64,
        /// Bytes free, in pieces perhaps.
        free: u64,
    },
    /// One device cannot reach the memory of the other: peer access is not enabled, or there is no
    /// link.
    NoAccess(DeviceId, DeviceId),
    /// The memory does not belong to an allocation, or the range leaves it.
    BadAddress(DevicePointer, u64),
    /// What was enqueued failed: the message. The device lives on.
    Operation(DeviceId, Arc<str>),
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(device, why) => write!(f, "{device} is lost: {why}"),
            Self::OutOfMemory {
                device,
                wanted,
                free,
            } => write!(
                f,
                "{device} has no room for {wanted} bytes: {free} are free"
            ),
            Self::NoAccess(from, to) => write!(f, "{from} has no access to the memory of {to}"),
            Self::BadAddress(pointer, bytes) => write!(
                f,
                "{bytes} bytes at {:#x} of {} are not within one allocation",
                pointer.address, pointer.device
            ),
            Self::Operation(device, why) => write!(f, "an operation on {device} failed: {why}"),
        }
    }
}

impl std::error::Error for DeviceError {}

/// Called once when an event is complete, or failed, by a thread of the device's choice, with no
/// lock held.
pub type Completion = Box<dyn FnOnce(Result<(), DeviceError>) + Send>;

/// Work of the host's making that runs in stream order, on a thread that stands for the device: how a
/// virtual device computes. It may take time. What it returns as an error fails the events behind it.
pub type Operation = Box<dyn FnOnce() -> Result<(), DeviceError> + Send>;

/// A device with streams. See the module for what holds for all of it.
pub trait Device: Send + Sync {
    /// What it is.
    fn info(&self) -> &DeviceInfo;

    /// A new stream.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    fn create_stream(&self) -> Result<Stream, DeviceError>;

    /// The position behind everything that is enqueued on the stream now. A stream on which nothing
    /// was enqueued since its last event gives that event again.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    fn record(&self, stream: Stream) -> Result<Event, DeviceError>;

    /// Marks the time at which all that is enqueued on the stream now is done; if it is done already, the
    /// time of this call. It costs more than an event.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    fn mark(&self, stream: Stream) -> Result<Mark, DeviceError>;

    /// The time from one mark of this device to another. None unless the streams got to both.
    fn elapsed(&self, from: &Mark, to: &Mark) -> Option<Duration>;

    /// What is enqueued on the stream from now on starts after the event, which may be of another
    /// device of the machine. Waiting for a failed event fails what is enqueued afterwards.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError>;

    /// As [`wait`](Device::wait), and a failure of the event is none of the stream's: for work that
    /// only may not overlap.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    fn follow(&self, stream: Stream, event: Event) -> Result<(), DeviceError>;

    /// Whether foreign work is on this device of this machine.
    fn knows(&self, foreign: &Foreign) -> bool;

    /// What is enqueued on the stream from now on starts after foreign work on this device, whatever becomes
    /// of that.
    ///
    /// # Errors
    /// [`DeviceError::Lost`]; [`DeviceError::NoAccess`] if it is not on this device.
    fn follow_foreign(&self, stream: Stream, foreign: &Foreign) -> Result<(), DeviceError>;

    /// Whether the event is complete. Never blocks.
    ///
    /// # Errors
    /// What failed the event.
    fn is_complete(&self, event: Event) -> Result<bool, DeviceError>;

    /// Blocks the thread until the event is complete.
    ///
    /// # Errors
    /// What failed the event.
    fn synchronize(&self, event: Event) -> Result<(), DeviceError>;

    /// Calls back once the event is complete: at once on this thread if it is already, else later on
    /// a thread of the device's.
    fn when_complete(&self, event: Event, call: Completion);

    /// Memory that what is enqueued on the stream from now on may use.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], [`DeviceError::Lost`].
    fn allocate(&self, bytes: u64, stream: Stream) -> Result<DevicePointer, DeviceError>;

    /// Gives memory back once what is enqueued on the stream now is done.
    ///
    /// # Errors
    /// [`DeviceError::BadAddress`] if it is no allocation's beginning.
    fn free(&self, pointer: DevicePointer, stream: Stream) -> Result<(), DeviceError>;

    /// Bytes that are not allocated.
    fn free_memory(&self) -> u64;

    /// Copies bytes in stream order. One of the two sides is this device's memory; the other is this
    /// device's, the host's (then its address is a pointer of this process, which stays valid until the
    /// copy is done) or a peer's to which access is enabled.
    ///
    /// # Safety
    /// Host memory named by `from` or `to` stays valid, and is not accessed in a conflicting way,
    /// until the copy is complete.
    ///
    /// # Errors
    /// [`DeviceError::BadAddress`], [`DeviceError::NoAccess`], [`DeviceError::Lost`].
    unsafe fn copy(
        &self,
        from: DevicePointer,
        to: DevicePointer,
        bytes: u64,
        stream: Stream,
    ) -> Result<(), DeviceError>;

    /// Copies the elements of a box, of `item` bytes each, in stream order: `extents` of them along each
    /// axis, so many bytes apart. It is one copy of so many bytes as the elements have. For the rest as
    /// [`copy`](Self::copy).
    ///
    /// # Safety
    /// As [`copy`](Self::copy), for the bytes of the elements.
    ///
    /// # Errors
    /// As [`copy`](Self::copy).
    ///
    /// # Panics
    /// If there are not as many strides as extents.
    #[allow(clippy::too_many_arguments, reason = "two sides, a shape and a stream")]
    unsafe fn copy_strided(
        &self,
        from: DevicePointer,
        from_strides: &[u64],
        to: DevicePointer,
        to_strides: &[u64],
        extents: &[u64],
        item: u64,
        stream: Stream,
    ) -> Result<(), DeviceError>;

    /// Prepares memory of the host for fast copies from and to all devices, until it is
    /// [unregistered](Self::unregister_host). It may take a while. Whether it did: memory that cannot be
    /// prepared, or is already, is copied all the same.
    ///
    /// # Safety
    /// The memory stays valid until then.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    unsafe fn register_host(&self, address: u64, bytes: u64) -> Result<bool, DeviceError>;

    /// Undoes [`register_host`](Self::register_host), when no copy uses the memory any more.
    fn unregister_host(&self, address: u64);

    /// Lets this device reach the memory of another.
    ///
    /// # Errors
    /// [`DeviceError::NoAccess`] if nothing links them.
    fn enable_peer(&self, peer: DeviceId) -> Result<(), DeviceError>;

    /// What the driver calls the stream, for libraries that are to use it; `None` where no driver is.
    fn handle(&self, stream: Stream) -> Option<usize>;

    /// Makes the device current on this thread for all libraries that use its driver, until another
    /// one is. Nothing where no driver is.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    fn make_current(&self) -> Result<(), DeviceError>;

    /// Ends the device for all who know it: what is not complete completes as lost, and its
    /// completions are called before this returns. With a driver, what is enqueued runs on.
    fn close(&self);
}

/// What went over one link in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// Whose memory was read.
    pub from: DeviceId,
    /// Whose memory was written.
    pub to: DeviceId,
    /// Copies enqueued.
    pub copies: u64,
    /// Their bytes.
    pub bytes: u64,
}
