//! Pinned buffers between pageable memory of the host and a device.
//!
//! The copy engines reach pinned memory alone. Of a copy from or to other memory the driver makes
//! several, with waits on the calling thread, and nothing here may wait for a device. So bytes go
//! through buffers of ours: on the way to a device they are copied into one before the call returns, if
//! all is done that the stream was told to wait for, and else by a host function in stream order, since
//! they may be on their way to the host still; on the way back, from one, by a host function.
//!
//! A buffer is in use until a position of a stream. Whoever needs one takes one whose position is done;
//! nobody is told of that, and if there is none a new one is made.

use std::sync::{Arc, Mutex, PoisonError};

use crate::device::CudaLane;
use crate::driver::{Answer, Context, Pinned};
use crate::timeline::Timeline;

/// The most bytes that go through one buffer; more of them go in pieces.
pub(crate) const PIECE: usize = 16 << 20;
/// The least size of a buffer; each is a power of two.
const LEAST: usize = 64 << 10;

#[derive(Default)]
pub(crate) struct Staging {
    buffers: Mutex<Vec<Buffer>>,
}

struct Buffer {
    memory: Pinned,
    until: Option<(Arc<Timeline<CudaLane>>, u64)>,
}

impl Staging {
    /// A buffer with so many bytes, at most [`PIECE`], that nobody uses.
    pub(crate) fn take(&self, context: &Context, bytes: usize) -> Answer<Pinned> {
        let size = bytes.next_power_of_two().max(LEAST);
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let free = buffers.iter().position(|buffer| {
            let until = buffer.until.as_ref();
            buffer.memory.len() == size
                && until.is_none_or(|(timeline, position)| {
                    // On a device that is lost nothing is copied any more.
                    !matches!(timeline.is_done(*position), Ok(Some(false)))
                })
        });
        match free {
            Some(at) => Ok(buffers.swap_remove(at).memory),
            None => Pinned::new(context, size),
        }
    }

    /// Gives it back, in use until the position is done.
    pub(crate) fn put(&self, memory: Pinned, timeline: &Arc<Timeline<CudaLane>>, position: u64) {
        let until = Some((Arc::clone(timeline), position));
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.push(Buffer { memory, until });
    }

    /// Frees those that nobody uses any more, and leaves the others to the driver.
    pub(crate) fn close(&self) {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        for buffer in buffers.drain(..) {
            let done = (buffer.until.as_ref())
                .is_none_or(|(timeline, position)| timeline.is_known_done(*position));
            if !done {
                // A copy may be under way.
                std::mem::forget(buffer.memory);
            }
        }
    }
}
