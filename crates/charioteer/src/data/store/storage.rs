//! What a store knows of an array: where its bytes are on the host, and how they lie there; and where they
//! are on a device, if they are there from the beginning.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Weak};

use smallvec::SmallVec;

use super::graves::Graves;
use crate::machine::{Device, DeviceId, DevicePointer, Foreign};
use crate::region::Region;
use crate::sync::{AtomicBool, AtomicU32, Mutex, OnceLock, Ordering};

/// The bytes of an array: a buffer of the host in C order, of which devices may have copies.
pub struct Storage {
    pub(super) id: u64,
    pub(super) label: Box<str>,
    pub(super) item: u64,
    pub(super) address: u64,
    pub(super) whole: Region,
    /// Bytes from one index to the next of each axis, on the host.
    pub(super) strides: SmallVec<[u64; 4]>,
    /// Memory of a device that has the elements at first.
    pub(super) adopted: Option<Adopted>,
    /// Whether the host's memory was prepared for copies, or need not be.
    prepared: AtomicBool,
    /// Whether it has ever been anywhere but on the host.
    scattered: AtomicBool,
    /// The datum whose bytes these are.
    owner: OnceLock<Weak<dyn Any + Send + Sync>>,
    /// Where a store had its directory when it was last asked.
    pub(super) hint: AtomicU32,
    life: Mutex<Life>,
}

/// Memory of a device that is somebody else's: it has all elements of an array, in C order, and stays
/// there as long as the array is kept.
#[derive(Clone, Debug)]
pub struct Adopted {
    /// Where it begins.
    pub pointer: DevicePointer,
    /// What its owner has enqueued that uses it.
    pub behind: Foreign,
}

struct Life {
    /// None once it was dropped.
    buffer: Option<Buffer>,
    /// Of the store that knows of it.
    graves: Weak<Graves>,
}

/// What keeps the host's memory, and who prepared it for copies.
pub(super) struct Buffer {
    address: u64,
    registered: Option<Arc<dyn Device>>,
    _keep: Box<dyn Any + Send + Sync>,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(device) = &self.registered {
            device.unregister_host(self.address);
        }
    }
}

/// Arrays of fewer bytes are not worth the call that prepares their memory for copies. Tests have small ones.
const WORTHY: u64 = if cfg!(any(test, feature = "validate")) {
    1 << 6
} else {
    1 << 20
};

impl Storage {
    /// An array of this shape, with elements of `item` bytes, in C order from `address` on. The buffer
    /// stays there while `keep` lives.
    ///
    /// # Panics
    /// If it has more than 2^63 bytes.
    #[must_use]
    pub fn new(
        id: u64,
        label: impl Into<Box<str>>,
        shape: &[u64],
        item: u64,
        address: u64,
        keep: Box<dyn Any + Send + Sync>,
    ) -> Arc<Self> {
        Self::adopting(id, label, shape, item, address, keep, None)
    }

    /// The same, whose elements are in memory of a device at first, and what the host's buffer has is
    /// nothing. `keep` keeps both.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    #[must_use]
    pub fn adopting(
        id: u64,
        label: impl Into<Box<str>>,
        shape: &[u64],
        item: u64,
        address: u64,
        keep: Box<dyn Any + Send + Sync>,
        adopted: Option<Adopted>,
    ) -> Arc<Self> {
        let whole = Region::whole(shape);
        let bytes = whole.elements().checked_mul(item);
        assert!(
            bytes.is_some_and(|bytes| bytes < 1 << 63),
            "an array has fewer than 2^63 bytes"
        );
        Arc::new(Self {
            id,
            label: label.into(),
            item,
            address,
            strides: strides(&whole, item),
            scattered: AtomicBool::new(adopted.is_some() && !whole.is_empty()),
            whole,
            adopted,
            prepared: AtomicBool::new(bytes.is_some_and(|bytes| bytes < WORTHY)),
            owner: OnceLock::new(),
            hint: AtomicU32::new(u32::MAX),
            life: Mutex::new(Life {
                buffer: Some(Buffer {
                    address,
                    registered: None,
                    _keep: keep,
                }),
                graves: Weak::new(),
            }),
        })
    }

    /// Its number, which is that of its datum.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What people call it.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The size of an element in bytes.
    #[must_use]
    pub fn item(&self) -> u64 {
        self.item
    }

    /// Where the host's buffer begins.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The size of the host's buffer in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.whole.elements() * self.item
    }

    /// They are the bytes of this datum.
    pub(crate) fn belong(&self, owner: Weak<dyn Any + Send + Sync>) {
        let known = self.owner.set(owner);
        debug_assert!(known.is_ok(), "bytes are of one datum");
    }

    /// Whose bytes they are, if that is known.
    pub(super) fn owner(&self) -> Option<Weak<dyn Any + Send + Sync>> {
        self.owner.get().cloned()
    }

    /// Whether any of it may be anywhere but on the host. While it is not, nothing else is to be asked.
    #[inline]
    #[must_use]
    pub fn is_scattered(&self) -> bool {
        self.scattered.load(Ordering::Acquire)
    }

    /// Some of it is about to be on a device.
    #[inline]
    pub(super) fn scatter(&self) {
        if !self.scattered.load(Ordering::Relaxed) {
            self.scattered.store(true, Ordering::Release);
        }
    }

    /// Memory of a device that has the elements at first.
    #[must_use]
    pub fn adopted(&self) -> Option<&Adopted> {
        self.adopted.as_ref()
    }

    /// Whether the host's memory is still to be prepared, for elements that go to the device, or to the host.
    /// Where they are in memory of the device's that is the array's own the host has no part in it.
    #[inline]
    pub(super) fn is_unprepared(&self, device: DeviceId) -> bool {
        let own = self.adopted.as_ref().map(|own| own.pointer.device);
        !self.prepared.load(Ordering::Relaxed) && own != Some(device)
    }

    /// Has the host's memory prepared for copies, before the first of them. It may take a while.
    #[cold]
    pub(super) fn prepare(&self, device: &Arc<dyn Device>) {
        let mut life = self.life.lock();
        if self.prepared.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Some(buffer) = &mut life.buffer {
            // SAFETY: the memory is kept for as long as the buffer is, which undoes this first.
            let done = unsafe { device.register_host(self.address, self.bytes()) };
            if done == Ok(true) {
                buffer.registered = Some(Arc::clone(device));
            }
        }
    }

    /// A store knows of it, and is to hear of its end.
    pub(super) fn attach(&self, graves: &Arc<Graves>) {
        self.life.lock().graves = Arc::downgrade(graves);
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        let (buffer, graves) = {
            let mut life = self.life.lock();
            (life.buffer.take(), life.graves.upgrade())
        };
        if let (Some(buffer), Some(graves)) = (buffer, graves) {
            graves.bury(self.id, buffer);
        }
    }
}

/// Bytes from one index to the next, along each axis of a compact buffer that has a box.
pub(super) fn strides(region: &Region, item: u64) -> SmallVec<[u64; 4]> {
    let mut strides = SmallVec::from_elem(0, region.spans().len());
    let mut stride = item;
    for (place, span) in strides.iter_mut().zip(region.spans()).rev() {
        *place = stride;
        stride *= span.count();
    }
    strides
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Storage({}{})", self.label, self.whole)
    }
}
