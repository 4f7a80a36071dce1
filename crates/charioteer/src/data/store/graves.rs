//! Storages that were dropped, whose copies on devices are still to be freed.

use std::any::Any;

use crate::sync::Mutex;

/// The storages that were dropped since the store looked last: their numbers, and what keeps their
/// buffers.
pub(super) struct Graves {
    pub(super) dropped: Mutex<Vec<(u64, Box<dyn Any + Send + Sync>)>>,
}
