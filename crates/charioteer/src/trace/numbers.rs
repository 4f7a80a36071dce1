//! Numbers of tasks and threads.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// How many task numbers a thread takes at a time.
const BLOCK: u64 = 1024;

static NEXT: AtomicU64 = AtomicU64::new(1);
static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static LEFT: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    static THREAD: Cell<usize> = const { Cell::new(usize::MAX) };
}

#[inline]
pub(crate) fn next_id() -> u64 {
    LEFT.with(|left| {
        let (mut next, mut end) = left.get();
        if next == end {
            next = NEXT.fetch_add(BLOCK, Ordering::Relaxed);
            end = next + BLOCK;
        }
        left.set((next + 1, end));
        next
    })
}

#[inline]
pub(crate) fn thread_number() -> usize {
    THREAD.with(|thread| {
        let mut number = thread.get();
        if number == usize::MAX {
            number = THREADS.fetch_add(1, Ordering::Relaxed);
            thread.set(number);
        }
        number
    })
}
