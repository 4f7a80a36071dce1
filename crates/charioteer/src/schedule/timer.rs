//! Time limits of attempts: one thread that sleeps until the next limit, started with the first.
//!
//! An entry names its task weakly and the attempt that it limits; an attempt that ended in time is
//! told by its number. Entries of tasks that are done are swept out whenever the heap has doubled,
//! so that long limits of short tasks do not pile up.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::machine::cpus::unpinned;
use crate::sync::{Condvar, Mutex};
use crate::task::{Domain, Task, TaskRef};

struct Entry<D: Domain> {
    at: Instant,
    task: Weak<Task<D>>,
    attempt: u32,
}

impl<D: Domain> PartialEq for Entry<D> {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}
impl<D: Domain> Eq for Entry<D> {}
impl<D: Domain> PartialOrd for Entry<D> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<D: Domain> Ord for Entry<D> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

/// How many entries are not worth a sweep.
const FEW: usize = 1024;

struct Heap<D: Domain> {
    entries: BinaryHeap<Reverse<Entry<D>>>,
    /// How many entries there are at the next sweep.
    limit: usize,
    thread: Option<std::thread::JoinHandle<()>>,
    closed: bool,
}

pub(crate) struct Timer<D: Domain> {
    heap: Mutex<Heap<D>>,
    changed: Condvar,
}

impl<D: Domain> Timer<D> {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            heap: Mutex::new(Heap {
                entries: BinaryHeap::new(),
                limit: FEW,
                thread: None,
                closed: false,
            }),
            changed: Condvar::new(),
        })
    }

    /// Calls `expire(task, attempt)` after `limit`, unless the task is gone.
    ///
    /// # Errors
    /// If the system refuses the thread that watches: the limit is not kept then.
    pub(crate) fn arm(
        self: &Arc<Self>,
        task: &TaskRef<D>,
        attempt: u32,
        limit: Duration,
        expire: fn(&TaskRef<D>, u32),
    ) -> io::Result<()> {
        let Some(at) = Instant::now().checked_add(limit) else {
            return Ok(()); // longer than the clock can tell
        };
        let mut swept = Vec::new();
        let mut heap = self.heap.lock();
        if heap.entries.len() >= heap.limit {
            for entry in std::mem::take(&mut heap.entries) {
                // The reference may be the last one by now, and is dropped with no lock held.
                if let Some(task) = entry.0.task.upgrade() {
                    if !task.is_done() {
                        heap.entries.push(entry);
                    }
                    swept.push(task);
                }
            }
            heap.limit = FEW.max(2 * heap.entries.len());
        }
        heap.entries.push(Reverse(Entry {
            at,
            task: Arc::downgrade(task),
            attempt,
        }));
        let mut result = Ok(());
        if heap.thread.is_none() && !heap.closed {
            let timer = Arc::clone(self);
            let builder = std::thread::Builder::new().name("charioteer-timer".into());
            match unpinned(|| builder.spawn(move || timer.run(expire))) {
                Ok(thread) => heap.thread = Some(thread),
                Err(error) => result = Err(error),
            }
        }
        drop(heap);
        drop(swept);
        self.changed.notify_one();
        result
    }

    fn run(&self, expire: fn(&TaskRef<D>, u32)) {
        let mut heap = self.heap.lock();
        while !heap.closed {
            let now = Instant::now();
            let Some(Reverse(first)) = heap.entries.peek() else {
                heap = self.changed.wait(heap);
                continue;
            };
            if first.at > now {
                let left = first.at - now;
                heap = self.changed.wait_for(heap, left);
                continue;
            }
            let Reverse(due) = heap.entries.pop().expect("looked above");
            drop(heap);
            if let Some(task) = due.task.upgrade() {
                expire(&task, due.attempt);
            }
            heap = self.heap.lock();
        }
    }

    pub(crate) fn close(&self) {
        let thread = {
            let mut heap = self.heap.lock();
            heap.closed = true;
            heap.thread.take()
        };
        self.changed.notify_one();
        if let Some(thread) = thread {
            // It only ends with a panic if the code above has a bug, which is then worth a panic.
            thread.join().expect("the timer thread panicked");
        }
    }
}
