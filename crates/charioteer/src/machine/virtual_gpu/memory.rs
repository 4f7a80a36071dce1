//! The address space of a virtual device.
//!
//! An allocation has addresses that are no pointers of this process: the top bit is set, and they are
//! never used again, so that an access through a pointer of another space, or to memory that was
//! given back, is told from a right one for ever. The bytes lie in host memory and are shared by the
//! allocation and by whatever is at work on them, so that they outlive a release that comes too
//! early.
//!
//! Memory is given back in stream order. An allocation may count on a release that is enqueued and
//! not yet done: its stream waits for it then. So the host that runs ahead never waits for room, and
//! at no moment of the device's timeline is more in use than the device has.

use std::alloc::Layout;
use std::collections::{BTreeMap, VecDeque};
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::machine::device::{DeviceError, DeviceId, DevicePointer, Event};

/// Allocations begin at multiples of this, and there is at least as much between any two.
const ALIGNMENT: u64 = 256;

/// What memory holds before it is written: not a number in single and in double precision, and
/// conspicuous as an integer.
const POISON: u64 = 0x7ffa_dead_7ffa_dead;

/// Bytes of a device, in host memory.
pub(super) struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a buffer is an address and a size. The bytes are touched through raw pointers alone, by what
// runs as work of a device; that this is in order is what streams and events are for.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// New, poisoned bytes; `None` if the host has no room.
    pub(super) fn new(bytes: u64) -> Option<Self> {
        let words = usize::try_from(bytes.div_ceil(8)).ok()?.max(1);
        let layout = Layout::array::<u64>(words).ok()?;
        let layout = layout.align_to(ALIGNMENT as usize).ok()?;
        // SAFETY: the size is not zero.
        let start = NonNull::new(unsafe { std::alloc::alloc(layout) })?;
        let first = start.cast::<MaybeUninit<u64>>();
        // SAFETY: so many words are there, aligned and ours, and need no value before.
        let all = unsafe { std::slice::from_raw_parts_mut(first.as_ptr(), words) };
        all.fill(MaybeUninit::new(POISON));
        Some(Self { start, layout })
    }

    /// The byte so far from the beginning, which is within the buffer or its end.
    pub(super) fn at(&self, offset: u64) -> *mut u8 {
        debug_assert!(offset <= self.layout.size() as u64);
        self.start.as_ptr().wrapping_add(offset as usize)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout, and who knew the address shared the buffer.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

struct Allocation {
    bytes: u64,
    /// None until the host's memory is there.
    buffer: Option<Arc<Buffer>>,
    /// The release is enqueued.
    freed: bool,
}

/// The memory of one device, under the machine's lock.
pub(super) struct AddressSpace {
    device: DeviceId,
    capacity: u64,
    /// Bytes of allocations whose release is not enqueued.
    used: u64,
    next: u64,
    allocations: BTreeMap<u64, Allocation>,
    /// Releases that are enqueued and not done, and that no allocation counts on, oldest first; the
    /// event of each, and its bytes.
    unsettled: VecDeque<(Event, u64)>,
    /// The sum of their bytes.
    unsettled_bytes: u64,
}

impl AddressSpace {
    pub(super) fn new(device: DeviceId, capacity: u64) -> Self {
        Self {
            device,
            capacity,
            used: 0,
            next: 1 << 63 | u64::from(device.0) << 40,
            allocations: BTreeMap::new(),
            unsettled: VecDeque::new(),
            unsettled_bytes: 0,
        }
    }

    pub(super) fn free_bytes(&self) -> u64 {
        self.capacity - self.used
    }

    /// Why an allocation has no room.
    pub(super) fn full(&self, wanted: u64) -> DeviceError {
        DeviceError::OutOfMemory {
            device: self.device,
            wanted,
            free: self.free_bytes(),
        }
    }

    /// Takes room for an allocation. Gives its address, and the releases that have to be done before
    /// it is used.
    pub(super) fn reserve(&mut self, bytes: u64) -> Result<(u64, Vec<Event>), DeviceError> {
        if bytes > self.free_bytes() {
            return Err(self.full(bytes));
        }
        self.used += bytes;
        let mut waits = Vec::new();
        while self.unsettled_bytes > self.free_bytes() {
            let (event, bytes) = self
                .unsettled
                .pop_front()
                .expect("the sum is that of what is there");
            self.unsettled_bytes -= bytes;
            waits.push(event);
        }
        let address = self.next;
        self.next += bytes.next_multiple_of(ALIGNMENT) + ALIGNMENT;
        let allocation = Allocation {
            bytes,
            buffer: None,
            freed: false,
        };
        self.allocations.insert(address, allocation);
        Ok((address, waits))
    }

    /// Puts bytes behind an allocation, or gives the room back where the host had none.
    pub(super) fn provide(
        &mut self,
        address: u64,
        buffer: Option<Buffer>,
    ) -> Result<(), DeviceError> {
        let Some(buffer) = buffer else {
            let bytes = self.allocations.remove(&address).map_or(0, |it| it.bytes);
            self.used -= bytes;
            return Err(self.full(bytes));
        };
        if let Some(allocation) = self.allocations.get_mut(&address) {
            allocation.buffer = Some(Arc::new(buffer));
        }
        Ok(())
    }

    /// The release of an allocation is enqueued: nothing that is enqueued later may use it. Gives its
    /// size; `None` if it is no allocation's beginning.
    pub(super) fn retire(&mut self, address: u64) -> Option<u64> {
        let allocation = self.allocations.get_mut(&address)?;
        if allocation.freed || allocation.buffer.is_none() {
            return None;
        }
        allocation.freed = true;
        self.used -= allocation.bytes;
        Some(allocation.bytes)
    }

    /// A release takes place at the event.
    pub(super) fn expect_release(&mut self, event: Event, bytes: u64) {
        self.unsettled.push_back((event, bytes));
        self.unsettled_bytes += bytes;
    }

    /// The release is done. Gives the bytes, to be dropped with no lock held.
    pub(super) fn release(&mut self, address: u64, event: Option<Event>) -> Option<Arc<Buffer>> {
        let settled = |&(expected, _): &(Event, u64)| Some(expected) == event;
        if let Some(index) = self.unsettled.iter().position(settled) {
            let (_, bytes) = self.unsettled.remove(index).expect("it was just found");
            self.unsettled_bytes -= bytes;
        }
        self.allocations.remove(&address)?.buffer
    }

    /// The bytes behind an address and how far from their beginning it is. `late` says whether it may
    /// be used although the release is enqueued, by what was enqueued before that.
    pub(super) fn find(
        &self,
        address: u64,
        bytes: u64,
        late: bool,
    ) -> Result<(&Arc<Buffer>, u64), DeviceError> {
        let found = self.allocations.range(..=address).next_back();
        found
            .and_then(|(start, allocation)| {
                let offset = address - start;
                let end = offset.checked_add(bytes)?;
                if end > allocation.bytes || (allocation.freed && !late) {
                    return None;
                }
                Some((allocation.buffer.as_ref()?, offset))
            })
            .ok_or(DeviceError::BadAddress(
                DevicePointer {
                    device: self.device,
                    address,
                },
                bytes,
            ))
    }

    /// Forgets everything: the device is lost.
    pub(super) fn clear(&mut self) -> impl Iterator<Item = Arc<Buffer>> + use<> {
        self.unsettled.clear();
        self.unsettled_bytes = 0;
        self.used = 0;
        std::mem::take(&mut self.allocations)
            .into_values()
            .filter_map(|allocation| allocation.buffer)
    }
}
