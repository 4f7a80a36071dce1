//! What a task on devices has between its reservation and its end; see the module's protocol.

use std::sync::Arc;

use smallvec::SmallVec;

use super::state::{BEHIND, LAUNCHED, Snapshot, validate};
use super::{Content, Domain, Failure, Link, Outcome, Phase, Task, TaskRef};
use crate::data::Holding;
use crate::machine::{DeviceError, Event};
use crate::schedule::gang::Grant;
use crate::schedule::map::Marks;

/// What a task comes to that its owner is about to end.
pub(crate) enum Ending<D: Domain> {
    /// This.
    Given(Outcome<D>),
    /// What is in its flight, all parts of which have landed.
    Landed,
}

/// Under the lock of the task's links.
pub(crate) struct Flight<D: Domain> {
    /// The devices and streams that the body has, from its dispatch until it ends.
    pub(crate) loan: Option<Grant>,
    /// The body waits, and its share of the loan is another's.
    pub(crate) paused: bool,
    /// What it has of managed data there.
    pub(crate) holding: Option<Box<Holding>>,
    /// The devices of the loan, as bits by index; they stay when it is given back.
    pub(crate) places: u64,
    /// Around the body's work, if it is timed.
    pub(crate) marks: Option<Box<Marks>>,
    /// The task is ready, and goes on, to cores or with its loan, when nothing is incomplete any more.
    pub(crate) held: bool,
    /// Events of predecessors that were launched and not complete when they let this task go: of those
    /// whose failure is its own, and of those that it only comes after.
    pub(crate) behind: SmallVec<[Event; 2]>,
    pub(crate) after: SmallVec<[Event; 2]>,
    /// Where the body's own work ends, for dependents that run ahead.
    events: SmallVec<[Event; 2]>,
    /// Predecessors that this task runs ahead of and that are not done; once it is launched also the
    /// events that are not complete, and the body.
    /// A predecessor may be done before it is counted, so this may be below zero for a moment.
    incomplete: i32,
    /// What the task will come to when nothing is incomplete any more; until it is done, so that
    /// there is no moment when it is neither here nor in the task.
    outcome: Option<Outcome<D>>,
}

/// Tasks that were let go, and whether they inherit a failure.
type LetAhead<D> = Vec<(TaskRef<D>, bool)>;

/// What came of a part that is complete.
pub(crate) enum Landed {
    /// Nothing yet.
    Nothing,
    /// The task was held, and is not any more.
    Free,
    /// The task was launched, and has its outcome.
    Done,
    /// The task had ended before, without having been launched, and this was the last that it came after.
    Past,
}

impl<D: Domain> Flight<D> {
    /// Whether a predecessor that the task ran ahead of is not done, as long as it is not launched.
    pub(crate) fn is_ahead(&self) -> bool {
        self.incomplete > 0
    }
}

impl<D: Domain> Default for Flight<D> {
    fn default() -> Self {
        Self {
            loan: None,
            paused: false,
            holding: None,
            places: 0,
            marks: None,
            held: false,
            behind: SmallVec::new(),
            after: SmallVec::new(),
            events: SmallVec::new(),
            incomplete: 0,
            outcome: None,
        }
    }
}

impl<D: Domain> Task<D> {
    /// The body ended; its work ends with `pending`, which are not complete. `leads`: dependents may
    /// run ahead. The caller counts as one part that is incomplete, until it [lands](Task::land).
    pub(crate) fn launch(&self, outcome: Outcome<D>, pending: &[Event], leads: bool) {
        let parts = i32::try_from(pending.len()).expect("fewer devices than 2^31") + 1;
        let mut links = self.links.lock();
        let flight = links.flight();
        flight.incomplete += parts;
        flight.outcome = Some(outcome);
        if leads {
            flight.events.extend_from_slice(pending);
        }
        self.state.set(LAUNCHED);
    }

    /// Calls `f` with the value of a task that is launched, and may still come to nothing, or that is
    /// done. `f` is called under a lock, and calls nobody.
    pub fn peek<R>(&self, f: impl FnOnce(&D::Value) -> R) -> Option<R> {
        fn value<D: Domain>(outcome: Option<&Outcome<D>>) -> Option<&D::Value> {
            match outcome {
                Some(Outcome::Value(value)) => Some(value),
                _ => None,
            }
        }
        if !self.is_done() {
            let links = self.links.lock();
            let flight = links.rare.as_ref().and_then(|rare| rare.flight.as_ref());
            if let Some(value) = value(flight.and_then(|flight| flight.outcome.as_ref())) {
                return Some(f(value));
            }
        }
        // It is done, or was done in between: its outcome comes there under the lock.
        value(self.outcome()).map(f)
    }

    /// Takes the links to those of the `chosen` dependents that may run ahead of this task, and gives
    /// the events that they are behind from now on, and whether a failure of this task is theirs. None if
    /// the task is not launched, or lets nobody.
    pub(crate) fn let_ahead(
        self: &Arc<Self>,
        chosen: impl Fn(&TaskRef<D>) -> bool,
    ) -> (SmallVec<[Event; 2]>, LetAhead<D>) {
        let mut links = self.links.lock();
        let flight = links.rare.as_ref().and_then(|rare| rare.flight.as_ref());
        let events = match flight {
            Some(flight) if !flight.events.is_empty() => flight.events.clone(),
            _ => return (SmallVec::new(), Vec::new()),
        };
        let mut ahead = Vec::new();
        for link in links.list.iter_mut() {
            let (next, inherits) = match link {
                Link::Dependent(next) => (next, true),
                Link::After(next) => (next, false),
                _ => continue,
            };
            if chosen(next) {
                let next = Arc::clone(next);
                ahead.push((Arc::clone(&next), inherits));
                *link = if inherits {
                    Link::Ahead(next)
                } else {
                    Link::Behind(next)
                };
            }
        }
        (events, ahead)
    }

    /// This task runs ahead of a predecessor that was launched, behind these events; `inherits`: a
    /// failure of that one is its own. Called before the predecessor is taken off the count.
    pub(crate) fn go_behind(&self, events: &[Event], inherits: bool) {
        let mut links = self.links.lock();
        let flight = links.flight();
        if inherits {
            flight.behind.extend_from_slice(events);
        } else {
            flight.after.extend_from_slice(events);
        }
        self.count_incomplete(flight, 1);
    }

    /// So many more parts are incomplete, of a task that is not launched. Under the lock of the links.
    pub(crate) fn count_incomplete(&self, flight: &mut Flight<D>, parts: i32) {
        flight.incomplete += parts;
        if flight.incomplete > 0 {
            self.state.set(BEHIND);
        }
    }

    /// One part that was incomplete is complete, or failed: what comes of that. Who is told that the task
    /// is [done](Landed::Done) owns it, and is to [conclude](Task::conclude) it.
    pub(crate) fn land(&self, failure: Option<DeviceError>) -> Landed {
        let mut links = self.links.lock();
        let flight = links.flight();
        let gone = match (failure, &mut flight.outcome) {
            (Some(error), Some(outcome @ Outcome::Value(_))) => {
                let failed = Outcome::Failed(Failure::Device(error));
                Some(std::mem::replace(outcome, failed))
            }
            _ => None,
        };
        flight.incomplete -= 1;
        let ended = flight.incomplete == 0 && self.state.clear(BEHIND).is_done();
        let landed = if flight.incomplete != 0 {
            Landed::Nothing
        } else if ended {
            Landed::Past
        } else if std::mem::take(&mut flight.held) {
            Landed::Free
        } else if flight.outcome.is_some() {
            Landed::Done
        } else {
            Landed::Nothing
        };
        drop(links);
        // A value that came to nothing is dropped with no lock held (invariant 8).
        drop(gone);
        landed
    }

    /// Makes the outcome of a task that has landed another one.
    pub(crate) fn divert(&self, outcome: Outcome<D>) {
        let before = self.links.lock().flight().outcome.replace(outcome);
        drop(before);
    }

    /// Calls `f` with what a task comes to that this thread owns. `f` is called under a lock, and calls
    /// nobody.
    pub(crate) fn foresee<R>(&self, ending: &Ending<D>, f: impl FnOnce(&Outcome<D>) -> R) -> R {
        match ending {
            Ending::Given(outcome) => f(outcome),
            Ending::Landed => {
                let mut links = self.links.lock();
                f(links.flight().outcome.as_ref().expect("it has landed"))
            }
        }
    }

    /// Publishes the outcome of a task that this thread owns, with the flags that go with it; gives
    /// the word before.
    pub(crate) fn conclude(
        &self,
        ending: Ending<D>,
        flags: impl FnOnce(&Outcome<D>) -> u32,
    ) -> Snapshot {
        let replace = |next| {
            self.content.with_mut(|content| {
                // SAFETY: this thread owns the task; nobody else looks before `Done`.
                std::mem::replace(unsafe { &mut *content }, next)
            })
        };
        // Freed before anybody can know that the task is done: a finished task keeps neither body nor
        // arguments, and who sees it done may count on that.
        let body = replace(Content::Nothing);
        validate(
            !matches!(body, Content::Outcome(_)),
            "a task has one outcome (invariant 1)",
        );
        drop(body);
        let publish = |outcome: Outcome<D>| {
            let flags = flags(&outcome);
            replace(Content::Outcome(outcome));
            self.state.leave_running(Phase::Done, flags)
        };
        match ending {
            Ending::Given(outcome) => publish(outcome),
            Ending::Landed => {
                let mut links = self.links.lock();
                let outcome = links.flight().outcome.take();
                publish(outcome.expect("it has landed"))
            }
        }
    }
}
