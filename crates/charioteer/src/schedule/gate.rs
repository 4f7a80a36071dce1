//! How many threads may be in a session of the domain at once.
//!
//! A session is what bodies need around them: for Python, being attached to the interpreter. Where
//! sessions exclude each other in part (the GIL), more of them than make progress cost hand-overs
//! and give nothing, so the domain sets a *width* and may change it at any time. Threads that have
//! no room take tasks that need no session, or park.
//!
//! **No wake-up is lost.** A producer pushes a task that needs a session, passes a SeqCst fence, and
//! reads whether there is room. A thread that leaves first takes itself off the count, passes a
//! SeqCst fence, and then looks at the queues, as does who makes the gate wider. Of two fences one
//! is first: either the producer sees the room and wakes somebody, or the other one sees the task.

use crossbeam_utils::CachePadded;

use crate::sync::{AtomicUsize, Ordering, fence};

pub(crate) struct Gate {
    inside: CachePadded<AtomicUsize>,
    width: AtomicUsize,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self {
            inside: CachePadded::new(AtomicUsize::new(0)),
            width: AtomicUsize::new(usize::MAX),
        }
    }

    /// Whether another thread may enter.
    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        self.inside.load(Ordering::Relaxed) < self.width.load(Ordering::Relaxed)
    }

    /// Whether a thread inside is to leave.
    #[inline]
    pub(crate) fn is_crowded(&self) -> bool {
        self.inside.load(Ordering::Relaxed) > self.width.load(Ordering::Relaxed)
    }

    /// Enters, if there is room.
    #[inline]
    pub(crate) fn enter(&self) -> bool {
        let width = self.width.load(Ordering::Relaxed);
        self.inside
            .fetch_update(Ordering::SeqCst, Ordering::Relaxed, |inside| {
                (inside < width).then_some(inside + 1)
            })
            .is_ok()
    }

    /// Enters whether there is room or not: a body that was inside before goes on.
    #[inline]
    pub(crate) fn return_to(&self) {
        self.inside.fetch_add(1, Ordering::SeqCst);
    }

    /// Leaves; the caller looks at the queues afterwards.
    #[inline]
    pub(crate) fn leave(&self) {
        self.inside.fetch_sub(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// How many are inside.
    pub(crate) fn inside(&self) -> usize {
        self.inside.load(Ordering::Relaxed)
    }

    pub(crate) fn width(&self) -> usize {
        self.width.load(Ordering::Relaxed)
    }

    /// Lets `width` threads in from now on, at least one; the caller looks at the queues afterwards.
    pub(crate) fn set_width(&self, width: usize) {
        self.width.store(width.max(1), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }
}
