//! Who is told what the device layer sees, as the calls are made.
//!
//! An [`Observer`] hears of a call before the call returns, on the thread that made it, and of a
//! completion from whoever sees it. So what a thread does after it saw something is told after that.
//! What is told is what a trace keeps as evidence of the order of device work.
//!
//! Nobody observes: one load. Whoever stops to observe is told nothing any more from then on.

use std::sync::{Arc, PoisonError, RwLock};

use super::device::{Event, Stream};
use crate::sync::{AtomicBool, Order, Ordering};

/// What kind of work was enqueued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Enqueued {
    /// An operation or a kernel.
    Operation = 1,
    /// A pause.
    Busy = 2,
    /// A copy.
    Copy = 3,
    /// A release of memory, by whoever owned it: it need not be the body that has the stream.
    Free = 4,
    /// A mark, which notes the time.
    Mark = 5,
}

/// What the device layer sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observed {
    /// A stream was created.
    Created(Stream),
    /// Work was enqueued: the event that it completes.
    Enqueued(Event, Enqueued),
    /// An event was recorded.
    Recorded(Event),
    /// What is enqueued on the stream starts after the event, from the position `from` on.
    Waits {
        /// The stream that waits.
        stream: Stream,
        /// Its first position that is behind the event.
        from: u64,
        /// What it waits for.
        event: Event,
    },
    /// The host was blocked until the event was complete.
    Synchronised(Event),
    /// The host learnt that the event is complete: `is_complete` said yes, a `synchronize` or a call
    /// that makes a stream wait found it so, or a completion is about to be called.
    Seen(Event),
    /// The stream got as far as the event. Others may have seen that before it is told, and what
    /// was enqueued may be complete before that is told.
    Completed(Event),
    /// Work of the stream failed at this position: what is enqueued behind it is not run. Waits
    /// behind it are waited for all the same.
    Failed(Event),
    /// The stream's device is lost: what is enqueued behind this position neither runs nor waits.
    Abandoned(Event),
}

/// Told what the device layer sees by whichever thread saw it. The devices hold no lock then; who
/// called them may.
pub trait Observer: Send + Sync {
    /// Called once for each thing seen; it calls neither a device nor anybody else.
    fn observe(&self, observed: Observed);
}

/// The observers of a machine.
pub struct Observers {
    any: AtomicBool,
    list: RwLock<Vec<Arc<dyn Observer>>>,
    order: Order,
}

impl Default for Observers {
    fn default() -> Self {
        Self {
            any: AtomicBool::new(false),
            list: RwLock::new(Vec::new()),
            order: Order::new(),
        }
    }
}

impl Observers {
    /// Whether there is one.
    #[inline]
    pub(super) fn are_there(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// Tells all of them. For devices, which hold no lock then.
    #[inline]
    pub fn tell(&self, observed: Observed) {
        if self.are_there() {
            self.tell_all(observed);
        }
    }

    #[cold]
    fn tell_all(&self, observed: Observed) {
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        self.order.point();
        for observer in &*list {
            observer.observe(observed);
        }
        self.order.point();
    }

    pub(super) fn add(&self, observer: Arc<dyn Observer>) {
        self.change(|list| list.push(observer));
    }

    /// Nobody is in a call of it when this is back.
    pub(super) fn remove(&self, observer: &Arc<dyn Observer>) {
        let is_it = |other: &Arc<dyn Observer>| {
            std::ptr::addr_eq(&raw const **other, &raw const **observer)
        };
        self.change(|list| list.retain(|other| !is_it(other)));
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<dyn Observer>>)) {
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        self.order.point();
        change(&mut list);
        self.any.store(!list.is_empty(), Ordering::Relaxed);
        self.order.point();
    }
}
