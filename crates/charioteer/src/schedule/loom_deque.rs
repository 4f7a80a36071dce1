//! What models take for `crossbeam_deque`, whose atomics loom does not see: a queue under a lock.
//!
//! It promises no more than the original. Whether it is empty is told by a length beside the lock, as
//! the original tells it by two indices: a look that takes no lock, and so orders nothing. Else the
//! lock itself would keep a wake-up from being lost, whatever the fences. A batch has one task, which
//! the original may give too.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::sync::{AtomicUsize, Mutex, Ordering};

pub(crate) enum Steal<T> {
    Success(T),
    Empty,
    #[expect(dead_code, reason = "a lock is never taken in vain")]
    Retry,
}

struct Shared<T> {
    length: AtomicUsize,
    queue: Mutex<VecDeque<T>>,
}

pub(crate) struct Worker<T>(Arc<Shared<T>>);
pub(super) type Stealer<T> = Worker<T>;
pub(crate) type Injector<T> = Worker<T>;

impl<T> Worker<T> {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Shared {
            length: AtomicUsize::new(0),
            queue: Mutex::new(VecDeque::new()),
        }))
    }

    pub(super) fn new_fifo() -> Self {
        Self::new()
    }

    pub(super) fn stealer(&self) -> Stealer<T> {
        Self(Arc::clone(&self.0))
    }

    pub(crate) fn push(&self, task: T) {
        let mut queue = self.0.queue.lock();
        queue.push_back(task);
        self.0.length.store(queue.len(), Ordering::Release);
    }

    pub(super) fn pop(&self) -> Option<T> {
        if self.is_empty() {
            return None;
        }
        let mut queue = self.0.queue.lock();
        let task = queue.pop_front();
        self.0.length.store(queue.len(), Ordering::Release);
        task
    }

    pub(super) fn steal_batch_and_pop(&self, _to: &Self) -> Steal<T> {
        self.pop().map_or(Steal::Empty, Steal::Success)
    }

    pub(crate) fn steal(&self) -> Steal<T> {
        self.pop().map_or(Steal::Empty, Steal::Success)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.length.load(Ordering::Acquire) == 0
    }
}
