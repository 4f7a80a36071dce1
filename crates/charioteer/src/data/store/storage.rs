//! What a store knows of an array: where its bytes are on the host, and how they lie there.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Weak};

use smallvec::SmallVec;

use super::graves::Graves;
use crate::region::Region;
use crate::sync::{AtomicBool, Mutex, Ordering};

/// The bytes of an array: a buffer of the host in C order, of which devices may have copies.
pub struct Storage {
    pub(super) id: u64,
    pub(super) label: Box<str>,
    pub(super) item: u64,
    pub(super) address: u64,
    pub(super) whole: Region,
    /// Bytes from one index to the next of each axis, on the host.
    pub(super) strides: SmallVec<[u64; 4]>,
    /// Whether it has ever been anywhere but on the host.
    scattered: AtomicBool,
    /// Keeps the host's buffer.
    keep: Mutex<Keep>,
}

struct Keep {
    buffer: Option<Box<dyn Any + Send + Sync>>,
    /// Of the store that knows of it.
    graves: Weak<Graves>,
}

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
            whole,
            scattered: AtomicBool::new(false),
            keep: Mutex::new(Keep {
                buffer: Some(keep),
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

    /// Whether any of it may be anywhere but on the host. While it is not, nothing else is to be asked.
    #[inline]
    #[must_use]
    pub fn is_scattered(&self) -> bool {
        self.scattered.load(Ordering::Acquire)
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
