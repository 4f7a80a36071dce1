//! Positions on streams that somebody has to be behind: at most one a stream, since the later one
//! stands for both.

use smallvec::SmallVec;

use crate::machine::{Event, Machine};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Events(SmallVec<[Event; 2]>);

impl Events {
    pub(super) fn new() -> Self {
        Self(SmallVec::new())
    }

    pub(super) fn of(event: Option<Event>) -> Self {
        Self(event.into_iter().collect())
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Event> {
        self.0.iter().copied()
    }

    #[inline]
    pub(super) fn add(&mut self, event: Event) {
        match self.0.iter_mut().find(|known| known.stream == event.stream) {
            Some(known) => known.position = known.position.max(event.position),
            None => self.0.push(event),
        }
    }

    pub(super) fn join(&mut self, others: &Self) {
        others.iter().for_each(|event| self.add(event));
    }

    pub(super) fn retain(&mut self, mut keep: impl FnMut(Event) -> bool) {
        self.0.retain(|event| keep(*event));
    }

    /// Forgets those that are complete or failed: whoever comes is behind them.
    pub(super) fn prune(&mut self, machine: &Machine) {
        self.retain(|event| is_pending(machine, event));
    }

    /// Those that are not complete. One that failed is among them: whoever wants what is behind it hears of
    /// that when they wait.
    pub(super) fn unmet(mut self, machine: &Machine) -> SmallVec<[Event; 2]> {
        self.retain(|event| !is_done(machine, event));
        self.0
    }
}

/// Whether the event is complete, and did not fail.
pub(super) fn is_done(machine: &Machine, event: Event) -> bool {
    let device = machine.device(event.stream.device);
    device.is_complete(event) == Ok(true)
}

/// Whether the event is neither complete nor failed.
pub(super) fn is_pending(machine: &Machine, event: Event) -> bool {
    let device = machine.device(event.stream.device);
    device.is_complete(event) == Ok(false)
}
