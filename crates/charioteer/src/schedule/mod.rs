//! The schedule: which ready task is next ([`queues`]), and who may run it on which cores
//! ([`places`]).
//!
//! Tasks that need one core, the ordinary case, never meet a lock: they go into a worker's own
//! queue or the shared one, and a worker that holds a core takes them. All that is unusual (sets of
//! cores, parts of cores, bodies that come back from a wait) goes through [`places`], whose state is
//! one small structure under one lock, touched when threads park, wake or wait, not per task.
//! Where bodies need a session of their domain, such as being attached to an interpreter, the
//! [`gate`] says how many threads may be in one. Tasks that need devices wait in the ledger of
//! [`gang`]. Tasks that have a choice between these ways go through [`map`] first.

pub mod gang;
pub(crate) mod gate;
#[cfg(loom)]
mod loom_deque;
pub mod map;
pub(crate) mod places;
pub(crate) mod queues;
pub(crate) mod timer;
pub(crate) mod width;
