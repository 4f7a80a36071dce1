//! The ready tasks that need one core.
//!
//! Each thread has a queue of its own for what it spawns and makes ready; others steal from it. A
//! shared queue takes what other threads spawn, and tasks on devices, whose order is that of their
//! grants. All are first in, first out. Tasks with a priority
//! stand in two heaps beside them: those above zero are looked at first, those below zero last. The
//! lengths of the heaps are kept in atomics, so that programs without priorities pay two loads.
//!
//! All this is there twice, for two [`Lane`]s: a thread takes from the lane that it is ready for. The
//! second one costs a load until its first task comes.

use std::cmp;
use std::collections::BinaryHeap;

#[cfg(not(loom))]
pub(crate) use crossbeam_deque::{Injector, Steal};
#[cfg(not(loom))]
use crossbeam_deque::{Stealer, Worker};
use crossbeam_utils::CachePadded;

#[cfg(loom)]
pub(crate) use super::loom_deque::{Injector, Steal};
#[cfg(loom)]
use super::loom_deque::{Stealer, Worker};

use crate::sync::{AtomicBool, AtomicUsize, Mutex, OnceLock, Ordering};
use crate::task::{Domain, Task, TaskRef};

/// How many tasks a thread takes from its own queue before it looks at the shared one.
const TURNS: u32 = 61;

struct Ranked<D: Domain> {
    priority: i32,
    ticket: u64,
    task: TaskRef<D>,
}

impl<D: Domain> PartialEq for Ranked<D> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == cmp::Ordering::Equal
    }
}
impl<D: Domain> Eq for Ranked<D> {}
impl<D: Domain> PartialOrd for Ranked<D> {
    fn partial_cmp(&self, other: &Self) -> Option<cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<D: Domain> Ord for Ranked<D> {
    fn cmp(&self, other: &Self) -> cmp::Ordering {
        // Of equals, the one that became ready first.
        (self.priority, other.ticket).cmp(&(other.priority, self.ticket))
    }
}

struct Heap<D: Domain> {
    length: CachePadded<AtomicUsize>,
    tasks: Mutex<(u64, BinaryHeap<Ranked<D>>)>,
}

impl<D: Domain> Heap<D> {
    fn new() -> Self {
        Self {
            length: CachePadded::new(AtomicUsize::new(0)),
            tasks: Mutex::new((0, BinaryHeap::new())),
        }
    }

    fn push(&self, task: TaskRef<D>, priority: i32) {
        let mut tasks = self.tasks.lock();
        let (ticket, heap) = &mut *tasks;
        *ticket += 1;
        heap.push(Ranked {
            priority,
            ticket: *ticket,
            task,
        });
        self.length.store(heap.len(), Ordering::Release);
    }

    #[inline]
    fn pop(&self) -> Option<TaskRef<D>> {
        if self.length.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut tasks = self.tasks.lock();
        let top = tasks.1.pop();
        self.length.store(tasks.1.len(), Ordering::Release);
        drop(tasks);
        top.map(|ranked| ranked.task)
    }
}

/// What a task needs around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// A session of its domain.
    Inside,
    /// None: whoever runs it has better left its session.
    Outside,
}

impl Lane {
    #[inline]
    pub(crate) fn of<D: Domain>(task: &Task<D>) -> Self {
        if task.needs_session() {
            Self::Inside
        } else {
            Self::Outside
        }
    }
}

/// A thread's own end of the queues.
pub(crate) struct Own<D: Domain> {
    queues: [Worker<TaskRef<D>>; 2],
    turn: std::cell::Cell<u32>,
    victim: std::cell::Cell<usize>,
}

/// The queues of one lane.
struct Queue<D: Domain> {
    shared: Injector<TaskRef<D>>,
    urgent: Heap<D>,
    lazy: Heap<D>,
    stealers: Box<[OnceLock<Stealer<TaskRef<D>>>]>,
}

impl<D: Domain> Queue<D> {
    fn new(threads: usize) -> Self {
        Self {
            shared: Injector::new(),
            urgent: Heap::new(),
            lazy: Heap::new(),
            stealers: (0..threads).map(|_| OnceLock::new()).collect(),
        }
    }
}

pub(crate) struct Queues<D: Domain> {
    lanes: [Queue<D>; 2],
    /// Whether a task was ever outside.
    outside: AtomicBool,
    /// How many of the stealers there may be.
    started: AtomicUsize,
}

impl<D: Domain> Queues<D> {
    pub(crate) fn new(threads: usize) -> Self {
        Self {
            lanes: [Queue::new(threads), Queue::new(threads)],
            outside: AtomicBool::new(false),
            started: AtomicUsize::new(0),
        }
    }

    /// Makes the own end of thread `slot`.
    pub(crate) fn own(&self, slot: usize) -> Own<D> {
        let queues = [Worker::new_fifo(), Worker::new_fifo()];
        for (lane, queue) in self.lanes.iter().zip(&queues) {
            if let Some(place) = lane.stealers.get(slot) {
                // A slot is given out once, so nobody has set it before.
                let _ = place.set(queue.stealer());
                self.started.fetch_max(slot + 1, Ordering::SeqCst);
            }
        }
        Own {
            queues,
            turn: std::cell::Cell::new(0),
            victim: std::cell::Cell::new(slot),
        }
    }

    /// Adds a ready task; `own` is the calling thread's end, if it has one.
    #[inline]
    pub(crate) fn push(&self, task: TaskRef<D>, lane: Lane, priority: i32, own: Option<&Own<D>>) {
        if lane == Lane::Outside && !self.outside.load(Ordering::Relaxed) {
            self.outside.store(true, Ordering::SeqCst);
        }
        let queue = &self.lanes[lane as usize];
        match priority.cmp(&0) {
            cmp::Ordering::Greater => queue.urgent.push(task, priority),
            cmp::Ordering::Less => queue.lazy.push(task, priority),
            cmp::Ordering::Equal => match own {
                Some(own) => own.queues[lane as usize].push(task),
                None => queue.shared.push(task),
            },
        }
    }

    /// Takes the next task of either lane, inside first.
    pub(crate) fn pop_any(&self, own: &Own<D>) -> Option<TaskRef<D>> {
        self.pop(own, Lane::Inside)
            .or_else(|| self.pop(own, Lane::Outside))
    }

    /// Takes the next task.
    #[inline]
    pub(crate) fn pop(&self, own: &Own<D>, lane: Lane) -> Option<TaskRef<D>> {
        if lane == Lane::Outside && !self.outside.load(Ordering::Acquire) {
            return None;
        }
        let queue = &self.lanes[lane as usize];
        let mine = &own.queues[lane as usize];
        if let Some(task) = queue.urgent.pop() {
            return Some(task);
        }
        let turn = own.turn.get().wrapping_add(1);
        own.turn.set(turn);
        if !turn.is_multiple_of(TURNS)
            && let Some(task) = mine.pop()
        {
            return Some(task);
        }
        Self::pop_shared(queue, mine)
            .or_else(|| mine.pop())
            .or_else(|| self.steal(queue, mine, &own.victim))
            .or_else(|| queue.lazy.pop())
    }

    fn pop_shared(queue: &Queue<D>, mine: &Worker<TaskRef<D>>) -> Option<TaskRef<D>> {
        loop {
            match queue.shared.steal_batch_and_pop(mine) {
                Steal::Success(task) => return Some(task),
                Steal::Empty => return None,
                Steal::Retry => std::hint::spin_loop(),
            }
        }
    }

    fn steal(
        &self,
        queue: &Queue<D>,
        mine: &Worker<TaskRef<D>>,
        last: &std::cell::Cell<usize>,
    ) -> Option<TaskRef<D>> {
        let count = self.started.load(Ordering::Acquire);
        if count == 0 {
            return None;
        }
        let first = last.get() % count;
        loop {
            let mut again = false;
            for step in 1..=count {
                let victim = (first + step) % count;
                let Some(stealer) = queue.stealers[victim].get() else {
                    continue;
                };
                match stealer.steal_batch_and_pop(mine) {
                    Steal::Success(task) => {
                        last.set(victim);
                        return Some(task);
                    }
                    Steal::Empty => {}
                    Steal::Retry => again = true,
                }
            }
            if !again {
                return None;
            }
            std::hint::spin_loop();
        }
    }

    /// Whether there may be a task of either lane.
    pub(crate) fn has_work(&self) -> bool {
        self.has_work_in(Lane::Inside) || self.has_work_in(Lane::Outside)
    }

    /// Whether there may be a task.
    pub(crate) fn has_work_in(&self, lane: Lane) -> bool {
        if lane == Lane::Outside && !self.outside.load(Ordering::Acquire) {
            return false;
        }
        let queue = &self.lanes[lane as usize];
        !queue.shared.is_empty()
            || queue.urgent.length.load(Ordering::Acquire) != 0
            || queue.lazy.length.load(Ordering::Acquire) != 0
            || queue.stealers[..self.started.load(Ordering::Acquire)]
                .iter()
                .any(|stealer| stealer.get().is_some_and(|stealer| !stealer.is_empty()))
    }

    /// Whether there may be a task that is to be started before all others of its lane.
    pub(crate) fn has_urgent(&self, lane: Lane) -> bool {
        self.lanes[lane as usize]
            .urgent
            .length
            .load(Ordering::Acquire)
            != 0
    }
}
