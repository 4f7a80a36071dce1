//! What a thread has put off handing to its devices, so that a driver gets several things at once.
//!
//! A driver takes microseconds for a launch, and little more for several that it is given together. So a
//! thread that runs one task after the other which only enqueue may *defer*: a device keeps what it is asked
//! to enqueue, in order, and enqueues it when the thread *submits*, or sooner, if what is kept is as much as
//! it likes to enqueue at once or somebody needs to know what is behind it.
//!
//! **Nothing stays behind.** A thread defers only within [`deferring`], which submits at its end. What may
//! wait for anything, or is not the runtime's, runs there [`at_once`]: a body that does more than to enqueue, and
//! what is the user's. Then nothing is put off any more, and nothing will be, in whichever runtime. What the
//! runtime does itself for the tasks in between, a copy that it makes ready, say, what is put off waits for.

use std::cell::{Cell, RefCell};
use std::ptr;
use std::sync::Arc;

/// What keeps what was deferred: a stream.
pub trait Deferred: Send + Sync {
    /// Enqueues what it keeps, whoever deferred it.
    fn submit(&self);
}

crate::sync::thread_local! {
    /// Whether this thread may defer, and whether it has.
    static STATE: Cell<(bool, bool)> = const { Cell::new((false, false)) };
    /// Who keeps what it has deferred.
    static KEEPERS: RefCell<Vec<Arc<dyn Deferred>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `run`, within which this thread may defer, and submits.
pub fn deferring<R>(run: impl FnOnce() -> R) -> R {
    struct End(bool);
    impl Drop for End {
        fn drop(&mut self) {
            STATE.with(|state| state.set((self.0, state.get().1)));
            submit();
        }
    }
    let _end = End(STATE.with(|state| state.replace((true, state.get().1)).0));
    run()
}

/// Calls `run` with nothing put off by this thread, which may not defer meanwhile.
#[inline]
pub fn at_once<R>(run: impl FnOnce() -> R) -> R {
    struct Restore;
    impl Drop for Restore {
        fn drop(&mut self) {
            STATE.with(|state| state.set((true, state.get().1)));
        }
    }
    submit();
    let _restore = may_defer().then(|| {
        STATE.with(|state| state.set((false, state.get().1)));
        Restore
    });
    run()
}

/// Whether this thread may defer.
#[must_use]
pub fn may_defer() -> bool {
    STATE.with(Cell::get).0
}

/// This thread, which may, has deferred something that is kept there.
pub fn defer<T: Deferred + 'static>(keeper: &Arc<T>) {
    STATE.with(|state| state.set((state.get().0, true)));
    KEEPERS.with(|keepers| {
        let mut keepers = keepers.borrow_mut();
        let address = Arc::as_ptr(keeper);
        if !keepers
            .iter()
            .any(|it| ptr::addr_eq(Arc::as_ptr(it), address))
        {
            keepers.push(Arc::clone(keeper) as Arc<dyn Deferred>);
        }
    });
}

/// Has all enqueued that this thread has deferred.
#[inline]
pub fn submit() {
    if STATE.with(Cell::get).1 {
        submit_all();
    }
}

#[cold]
fn submit_all() {
    while let Some(keeper) = KEEPERS.with(|keepers| keepers.borrow_mut().pop()) {
        keeper.submit();
    }
    STATE.with(|state| state.set((state.get().0, false)));
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Keeper(Mutex<(u32, u32)>);

    impl Keeper {
        fn ask(self: &Arc<Self>) {
            let mut counts = self.0.lock().unwrap();
            if may_defer() {
                defer(self);
                counts.0 += 1;
            } else {
                counts.1 += 1;
            }
        }

        fn counts(&self) -> (u32, u32) {
            *self.0.lock().unwrap()
        }
    }

    impl Deferred for Keeper {
        fn submit(&self) {
            let mut counts = self.0.lock().unwrap();
            counts.1 += std::mem::take(&mut counts.0);
        }
    }

    #[test]
    fn what_is_deferred_is_submitted_when_asked_for_and_at_the_end() {
        let keepers: [Arc<Keeper>; 2] = std::array::from_fn(|_| Arc::default());
        keepers[0].ask();
        assert_eq!(keepers[0].counts(), (0, 1), "it may not defer");
        deferring(|| {
            for _ in 0..3 {
                keepers.iter().for_each(Keeper::ask);
            }
            assert_eq!(keepers[0].counts(), (3, 1));
            submit();
            assert_eq!(keepers.each_ref().map(|it| it.counts()), [(0, 4), (0, 3)]);
            submit();
            keepers[1].ask();
            assert_eq!(keepers[1].counts(), (1, 3));
            // Who defers within, submits.
            deferring(|| keepers[0].ask());
            assert_eq!(keepers.each_ref().map(|it| it.counts()), [(0, 5), (0, 4)]);
            keepers[1].ask();
            assert_eq!(keepers[1].counts(), (1, 4), "the thread may still");
            at_once(|| {
                assert_eq!(keepers[1].counts(), (0, 5));
                keepers[1].ask();
                assert_eq!(keepers[1].counts(), (0, 6), "it may not here");
            });
            keepers[1].ask();
            assert_eq!(keepers[1].counts(), (1, 6));
        });
        assert_eq!(keepers[1].counts(), (0, 7));
        assert!(!may_defer());
    }

    #[test]
    fn a_body_that_panics_leaves_nothing_behind() {
        let keeper = Arc::new(Keeper::default());
        let panics = std::panic::catch_unwind(|| {
            deferring(|| {
                keeper.ask();
                panic!("as the test wants it");
            })
        });
        assert!(panics.is_err());
        assert_eq!(keeper.counts(), (0, 1));
        assert!(!may_defer());
    }
}
