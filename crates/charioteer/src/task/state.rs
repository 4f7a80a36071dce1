//! One task's state: a phase and its flags in one atomic word.
//!
//! ```text
//! bit   0..=2   phase       Unspawned, Waiting, Ready, Running, Suspended, Done
//! bit   3       LINKED      somebody registered a link; whoever completes the task takes the links
//! bit   4       CANCEL      somebody asked the running body to end
//! bit   5       TIMED_OUT   the current attempt ran longer than it may, which asks its body to end
//! bit   6       FAILED      done, without a value
//! bit   7       CANCELLED   done, because it was cancelled; or claimed by somebody who cancels it
//! bit   8       TOLD        somebody received the failure
//! bit   9       BLOCKED     the running body waits for other tasks
//! bit  10       DIRTY       an unspawned task was among the predecessors, or behind them; or a
//!                           spawner has claimed the handle and not linked it yet
//! bit  11       DELIVERED   the request to end reached the body
//! bit  12       REPORTED    the failure was handed to `on_failure` or to the runtime's exit
//! bit  13       LOOSE_WAIT  the suspended body waits for an unspawned or dirty task
//! bit  14       POISONED    a predecessor failed
//! bit  15       WOKEN       the body was woken since it began to run
//! bit  16       SLEEPING    the suspended body is woken by a call, not by tasks
//! bit  17       OUTSIDE     the body needs no session of its domain
//! bit  18       LAUNCHED    the body ended, and its work on devices may be in flight
//! bit  19       AHEAD       may start behind work in flight, which its streams wait for
//! bit  20       ORDERED     has accesses to data: others may come after it in order only
//! bit  21       JOINS       of these are some that commute or reduce
//! bit  22       HOST        has no body: the host is told when it is ready, or the runtime moves data then
//! bit  23       BEHIND      ran ahead of a task that is not done
//! bit  24       USES        keeps what it uses of managed data
//! ```
//!
//! The legal moves are those of [`Phase::may_become`]. A move to `Running` is a compare-and-swap, so
//! that exactly one thread wins it; the winner owns the body and the outcome until it moves the
//! phase on. A spawner owns its task as `Running` too, until it publishes `Waiting`. Flags that
//! belong to a phase (`SLEEPING`, `LOOSE_WAIT`) are set and cleared by the very operation that
//! enters or leaves it, since another thread may own the task right after. Validating builds assert
//! each move.

use crate::sync::{AtomicU32, Ordering, perturb};

/// Where a task is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Phase {
    /// A handle exists, its task has not been spawned.
    Unspawned = 0,
    /// Spawned; predecessors are unfinished.
    Waiting = 1,
    /// Nothing is in its way but the queue.
    Ready = 2,
    /// Its body runs, or one thread is about to decide its outcome.
    Running = 3,
    /// Its body gave its thread up until what it awaits is there.
    Suspended = 4,
    /// It has its outcome.
    Done = 5,
}

impl Phase {
    const fn of(word: u32) -> Self {
        match word & PHASE {
            0 => Self::Unspawned,
            1 => Self::Waiting,
            2 => Self::Ready,
            3 => Self::Running,
            4 => Self::Suspended,
            _ => Self::Done,
        }
    }

    /// Whether the protocol has a move from this phase to `next`.
    #[must_use]
    pub const fn may_become(self, next: Self) -> bool {
        use Phase::{Done, Ready, Running, Suspended, Unspawned, Waiting};
        matches!(
            (self, next),
            (Unspawned | Waiting, Running)
                | (Waiting | Suspended, Ready)
                | (Ready, Running)
                | (Running, Unspawned | Waiting | Suspended | Ready | Done)
        )
    }
}

const PHASE: u32 = 0b111;

/// The flags that ask a body to end.
pub(crate) const ASKED: u32 = CANCEL | TIMED_OUT;
pub(crate) const LINKED: u32 = 1 << 3;
pub(crate) const CANCEL: u32 = 1 << 4;
pub(crate) const TIMED_OUT: u32 = 1 << 5;
pub(crate) const FAILED: u32 = 1 << 6;
pub(crate) const CANCELLED: u32 = 1 << 7;
pub(crate) const TOLD: u32 = 1 << 8;
pub(crate) const BLOCKED: u32 = 1 << 9;
pub(crate) const DIRTY: u32 = 1 << 10;
pub(crate) const DELIVERED: u32 = 1 << 11;
pub(crate) const REPORTED: u32 = 1 << 12;
pub(crate) const LOOSE_WAIT: u32 = 1 << 13;
pub(crate) const POISONED: u32 = 1 << 14;
pub(crate) const WOKEN: u32 = 1 << 15;
pub(crate) const SLEEPING: u32 = 1 << 16;
pub(crate) const OUTSIDE: u32 = 1 << 17;
pub(crate) const LAUNCHED: u32 = 1 << 18;
pub(crate) const AHEAD: u32 = 1 << 19;
pub(crate) const ORDERED: u32 = 1 << 20;
pub(crate) const JOINS: u32 = 1 << 21;
pub(crate) const HOST: u32 = 1 << 22;
pub(crate) const BEHIND: u32 = 1 << 23;
pub(crate) const USES: u32 = 1 << 24;

/// A reading of the word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot(u32);

impl Snapshot {
    #[inline]
    pub(crate) fn phase(self) -> Phase {
        Phase::of(self.0)
    }
    #[inline]
    pub(crate) fn has(self, flag: u32) -> bool {
        self.0 & flag != 0
    }
    #[inline]
    pub(crate) fn is_done(self) -> bool {
        self.phase() == Phase::Done
    }
    /// Whether the body is to hear of a request to end.
    #[inline]
    pub(crate) fn is_asked(self) -> bool {
        self.has(ASKED) && !self.has(DELIVERED)
    }
}

#[derive(Debug)]
pub(crate) struct State(AtomicU32);

impl State {
    pub(crate) fn new(phase: Phase) -> Self {
        Self(AtomicU32::new(phase as u32))
    }

    /// Sets flags of a task that nobody else knows yet.
    #[inline]
    pub(crate) fn begin_with(&self, flags: u32) {
        debug_assert_eq!(flags & PHASE, 0);
        let word = self.0.load(Ordering::Relaxed);
        self.0.store(word | flags, Ordering::Relaxed);
    }

    /// Moves a waiting task that nobody else knows yet to `Ready`.
    #[inline]
    pub(crate) fn begin_ready(&self) {
        let word = self.0.load(Ordering::Relaxed);
        validate(
            Phase::of(word) == Phase::Waiting,
            "a task is ready once it was spawned",
        );
        self.0
            .store((word & !PHASE) | Phase::Ready as u32, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn load(&self) -> Snapshot {
        Snapshot(self.0.load(Ordering::Acquire))
    }

    /// Sets flags and gives what the word was before.
    #[inline]
    pub(crate) fn set(&self, flags: u32) -> Snapshot {
        debug_assert_eq!(flags & PHASE, 0);
        // SeqCst: a failure is read against the count of handles, see `Task::remove_handle`.
        Snapshot(self.0.fetch_or(flags, Ordering::SeqCst))
    }

    #[inline]
    pub(crate) fn clear(&self, flags: u32) -> Snapshot {
        debug_assert_eq!(flags & PHASE, 0);
        Snapshot(self.0.fetch_and(!flags, Ordering::SeqCst))
    }

    /// Moves from `from` to `to` and keeps the flags; `Err` has the word that stood in the way.
    #[inline]
    pub(crate) fn advance(&self, from: Phase, to: Phase) -> Result<Snapshot, Snapshot> {
        self.advance_when(from, to, |_| true, 0, 0)
    }

    /// As [`State::advance`], if `admits` the word; sets and clears flags on the way.
    #[inline]
    pub(crate) fn advance_when(
        &self,
        from: Phase,
        to: Phase,
        admits: impl Fn(Snapshot) -> bool,
        set: u32,
        clear: u32,
    ) -> Result<Snapshot, Snapshot> {
        validate(
            from.may_become(to),
            "a move that the protocol does not have",
        );
        perturb();
        let mut word = self.0.load(Ordering::Acquire);
        loop {
            if Phase::of(word) != from || !admits(Snapshot(word)) {
                return Err(Snapshot(word));
            }
            let next = (word & !(PHASE | clear)) | to as u32 | set;
            match self
                .0
                .compare_exchange_weak(word, next, Ordering::SeqCst, Ordering::Acquire)
            {
                Ok(_) => return Ok(Snapshot(word)),
                Err(now) => word = now,
            }
        }
    }

    /// Moves a task that this thread owns as `Running` on to `to` and flips `flags`. Gives the word
    /// before.
    ///
    /// One xor moves the phase and keeps every flag that others set meanwhile, which a plain store
    /// would lose.
    #[inline]
    pub(crate) fn leave_running(&self, to: Phase, flags: u32) -> Snapshot {
        perturb();
        debug_assert!(Phase::Running.may_become(to));
        // SeqCst: see `Task::remove_handle`.
        let before = Snapshot(
            self.0
                .fetch_xor(Phase::Running as u32 ^ to as u32 ^ flags, Ordering::SeqCst),
        );
        validate(
            before.phase() == Phase::Running,
            "only its owner moves a running task",
        );
        before
    }
}

/// Asserts a rule of the protocol in validating builds.
#[inline]
#[track_caller]
pub(crate) fn validate(holds: bool, rule: &str) {
    if cfg!(any(debug_assertions, feature = "validate")) {
        assert!(holds, "the state validator: {rule}");
    }
}
