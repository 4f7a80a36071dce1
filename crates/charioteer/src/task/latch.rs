//! A latch opens when the tasks that it watches are done: how threads, suspended bodies and event
//! loops wait.
//!
//! It counts the tasks that are missing, plus one while the waiter registers, so that it cannot open
//! before registration is complete. The one arrival that opens it (the last, or the first that
//! satisfies [`Until`]) wakes the waiter, once.
//!
//! A body that blocks here for ever is *counted* among those that cannot move by themselves, from
//! just before it blocks until its wait is over: the arrival that ends it takes it off the count,
//! and only then opens the latch. So there is no moment at which the body could go on and is counted,
//! and a closing engine never takes it for one that is stuck.

use std::sync::Arc;
use std::time::Instant;

use super::{Domain, TaskRef};
use crate::sync::{AtomicU32, AtomicUsize, Condvar, Mutex, Ordering};

/// What a wait waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Every task is done.
    All,
    /// One task is done.
    Any,
    /// One task failed, or every task is done.
    FirstFailure,
}

/// Who is woken when a latch opens.
pub enum Waker<D: Domain> {
    /// A thread that blocks in `Latch::block`; the task whose body it runs, if there is one and the
    /// wait has no time limit.
    Thread(Option<TaskRef<D>>),
    /// A suspended task.
    Task(TaskRef<D>),
    /// A call.
    Call(Call<D::Callback>),
}

/// A call that is made once, or taken back.
pub struct Call<C>(Mutex<Option<C>>);

impl<C> Call<C> {
    pub(crate) fn take(&self) -> Option<C> {
        self.0.lock().take()
    }
}

impl<D: Domain> Waker<D> {
    /// A waker that calls.
    pub fn call(callback: D::Callback) -> Self {
        Self::Call(Call(Mutex::new(Some(callback))))
    }
}

/// The wait is over, or was given up: no later arrival has anything to do.
const OVER: u32 = 1;
/// The waiter may see that.
const OPEN: u32 = 2;
const COUNTED: u32 = 4;

/// See the module.
pub struct Latch<D: Domain> {
    missing: AtomicUsize,
    until: Until,
    state: AtomicU32,
    waker: Waker<D>,
    gate: Mutex<()>,
    opened: Condvar,
}

impl<D: Domain> Latch<D> {
    /// A latch for `tasks` tasks, closed until its registration is complete (`Latch::registered`).
    pub fn new(tasks: usize, until: Until, waker: Waker<D>) -> Arc<Self> {
        Arc::new(Self {
            missing: AtomicUsize::new(tasks + 1),
            until,
            state: AtomicU32::new(0),
            waker,
            gate: Mutex::new(()),
            opened: Condvar::new(),
        })
    }

    /// One task is done. True if this opened the latch, and the caller is to act on the waker.
    /// `uncount` takes the waiting task off the count.
    #[must_use]
    pub(crate) fn arrive(&self, failed: bool, uncount: impl FnOnce(&TaskRef<D>)) -> bool {
        let last = self.missing.fetch_sub(1, Ordering::AcqRel) == 1;
        let enough = match self.until {
            Until::All => false,
            Until::Any => true,
            Until::FirstFailure => failed,
        };
        (last || enough) && self.fire(uncount)
    }

    /// Registration is complete. True as in [`Latch::arrive`].
    #[must_use]
    pub(crate) fn registered(&self) -> bool {
        self.missing.fetch_sub(1, Ordering::AcqRel) == 1 && self.fire(|_| ())
    }

    fn fire(&self, uncount: impl FnOnce(&TaskRef<D>)) -> bool {
        let before = self.state.fetch_or(OVER, Ordering::AcqRel);
        if before & OVER != 0 {
            return false;
        }
        if before & COUNTED != 0
            && let Waker::Thread(Some(task)) = &self.waker
        {
            uncount(task);
        }
        self.state.fetch_or(OPEN, Ordering::AcqRel);
        if matches!(self.waker, Waker::Thread(_)) {
            // The lock orders this with a thread between its look at the state and its wait.
            drop(self.gate.lock());
            self.opened.notify_all();
        }
        true
    }

    /// Ends the wait for a waiter that waits no more, so that no arrival does. True if none did; then
    /// a waiter that is counted takes itself off.
    pub(crate) fn give_up(&self) -> bool {
        self.state.fetch_or(OVER, Ordering::AcqRel) & OVER == 0
    }

    /// Counts the waiter; false if the latch is open.
    pub(crate) fn count(&self) -> bool {
        self.state
            .compare_exchange(0, COUNTED, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Whether the waiter was counted.
    pub(crate) fn is_counted(&self) -> bool {
        self.state.load(Ordering::Acquire) & COUNTED != 0
    }

    /// Whether it opened.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.state.load(Ordering::Acquire) & OPEN != 0
    }

    /// Whether every one of the tasks that it watches has to be done.
    pub(crate) fn needs_all(&self) -> bool {
        self.until == Until::All
    }

    pub(crate) fn waker(&self) -> &Waker<D> {
        &self.waker
    }

    /// The task whose body waits here and cannot go on without each task that the latch watches.
    pub(crate) fn waiter(&self) -> Option<&TaskRef<D>> {
        if self.until == Until::Any {
            return None;
        }
        match &self.waker {
            Waker::Thread(task) => task.as_ref(),
            Waker::Task(task) => Some(task),
            Waker::Call(_) => None,
        }
    }

    /// Whether a body waits here, without a time limit, for any of the tasks.
    pub(crate) fn waits_for_any(&self) -> bool {
        self.until == Until::Any && matches!(self.waker, Waker::Thread(Some(_)) | Waker::Task(_))
    }

    /// Blocks the calling thread until the latch is open, there is something else to do, or the time
    /// has come. What else there is to do is looked at again when the thread is [nudged](Self::nudge).
    pub(crate) fn block(&self, deadline: Option<Instant>, else_to_do: impl Fn() -> bool) -> End {
        let mut gate = self.gate.lock();
        loop {
            if self.is_open() {
                return End::Open;
            }
            if else_to_do() {
                return End::ElseToDo;
            }
            gate = match deadline {
                None => self.opened.wait(gate),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return End::Late;
                    }
                    self.opened.wait_for(gate, left)
                }
            };
        }
    }

    /// Makes the thread that blocks here look whether there is something else to do.
    pub(crate) fn nudge(&self) {
        drop(self.gate.lock());
        self.opened.notify_all();
    }
}

/// How it ended that a thread blocked on a latch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Open,
    ElseToDo,
    Late,
}
