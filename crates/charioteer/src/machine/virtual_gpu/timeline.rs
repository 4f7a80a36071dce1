//! What anybody may read of a stream without a lock: how far it is enqueued, and how far it got.

use std::sync::OnceLock;

use crossbeam_utils::CachePadded;

use crate::sync::{AtomicU64, Ordering};

/// No position: nothing failed.
const NEVER: u64 = u64::MAX;

/// The counters of one stream. They are written under the machine's lock only.
pub(super) struct Timeline {
    tail: AtomicU64,
    done: AtomicU64,
    /// The first position that failed; those behind it failed too.
    failed: AtomicU64,
}

impl Timeline {
    fn new() -> Self {
        Self {
            tail: AtomicU64::new(0),
            done: AtomicU64::new(0),
            failed: AtomicU64::new(NEVER),
        }
    }

    /// The position of what was enqueued last. A caller that enqueued, or was told that another
    /// thread did, sees that; nobody is promised more, so the load needs no order of its own.
    #[inline]
    pub(super) fn tail(&self) -> u64 {
        self.tail.load(Ordering::Relaxed)
    }

    /// The position up to which all is done. What was done before is seen by who reads this.
    #[inline]
    pub(super) fn done(&self) -> u64 {
        self.done.load(Ordering::Acquire)
    }

    /// Whether a position that is done has failed.
    #[inline]
    pub(super) fn failed(&self, position: u64) -> bool {
        // Written before the `done` that made the position known as done.
        position >= self.failed.load(Ordering::Relaxed)
    }

    /// Under the lock: one more was enqueued. Gives its position.
    pub(super) fn push(&self) -> u64 {
        let position = self.tail() + 1;
        self.tail.store(position, Ordering::Relaxed);
        position
    }

    /// Under the lock: all up to the position is done.
    pub(super) fn reach(&self, position: u64) {
        self.done.store(position, Ordering::Release);
    }

    /// Under the lock, before they are done: the position failed, and those behind it.
    pub(super) fn fail(&self, position: u64) {
        self.failed.store(position, Ordering::Relaxed);
    }
}

/// How many timelines the first chunk has; each further one has twice as many as the one before.
const FIRST: usize = 8;

/// As many chunks as 32 bits can number streams in.
const CHUNKS: usize = 30;

/// The timelines of a device by the number of the stream. They stay where they are, so that the table
/// grows under its readers.
pub(super) struct Timelines {
    chunks: [OnceLock<Box<[CachePadded<Timeline>]>>; CHUNKS],
}

impl Timelines {
    pub(super) fn new() -> Self {
        Self {
            chunks: [const { OnceLock::new() }; CHUNKS],
        }
    }

    /// The chunk of a stream and its place there.
    #[inline]
    fn place(number: u32) -> (usize, usize) {
        let number = number as usize + FIRST;
        let chunk = (number / FIRST).ilog2() as usize;
        (chunk, number - (FIRST << chunk))
    }

    /// The timeline of a stream; one that was not created yet may have one already.
    #[inline]
    pub(super) fn get(&self, number: u32) -> Option<&Timeline> {
        let (chunk, place) = Self::place(number);
        Some(&self.chunks.get(chunk)?.get()?[place])
    }

    /// Under the lock: makes sure that the stream has one.
    pub(super) fn create(&self, number: u32) {
        let (chunk, _) = Self::place(number);
        self.chunks[chunk].get_or_init(|| {
            (0..FIRST << chunk)
                .map(|_| CachePadded::new(Timeline::new()))
                .collect()
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn streams_have_places_of_their_own() {
        let mut next = (0, 0);
        for number in 0..1000 {
            let place = Timelines::place(number);
            assert_eq!(place, next);
            next = if place.1 + 1 == FIRST << place.0 {
                (place.0 + 1, 0)
            } else {
                (place.0, place.1 + 1)
            };
        }
        assert!(Timelines::place(u32::MAX).0 < CHUNKS);
    }

    #[test]
    fn a_stream_that_was_not_created_has_no_timeline_of_a_later_chunk() {
        let timelines = Timelines::new();
        assert!(timelines.get(0).is_none());
        timelines.create(0);
        assert!(timelines.get(0).is_some());
        assert!(timelines.get(8).is_none());
        assert!(timelines.get(u32::MAX).is_none());
    }
}
