//! Completions that one thread tells of one after the other.
//!
//! A device that learns that many events are complete calls back for each of them. What their receivers do
//! once for all of these, they leave here with the first: it is dropped behind the last.

use std::any::Any;
use std::cell::RefCell;

crate::sync::thread_local! {
    /// What is to be dropped when all are told, while this thread tells.
    static KEPT: RefCell<Option<Vec<Box<dyn Any>>>> = const { RefCell::new(None) };
}

/// Calls `tell`, which calls back for several completions. Within another call it is a part of that one.
pub fn together(tell: impl FnOnce()) {
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            // Whatever it does when it is dropped is behind all that was told.
            let kept = KEPT.with(RefCell::take);
            drop(kept);
        }
    }
    let is_first = KEPT.with(|kept| {
        let mut kept = kept.borrow_mut();
        let is_first = kept.is_none();
        kept.get_or_insert_default();
        is_first
    });
    let _end = is_first.then(|| End);
    tell();
}

/// Keeps what `make` makes until all completions are told that this thread tells together. False, and
/// nothing is made, if it tells of one alone.
pub fn keep_until_told(make: impl FnOnce() -> Box<dyn Any>) -> bool {
    if KEPT.with(|kept| kept.borrow().is_none()) {
        return false;
    }
    let made = make();
    KEPT.with(|kept| kept.borrow_mut().get_or_insert_default().push(made));
    true
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::rc::Rc;

    use super::*;

    #[test]
    fn what_is_kept_is_dropped_behind_the_last() {
        struct Kept(Rc<RefCell<Vec<&'static str>>>);
        impl Drop for Kept {
            fn drop(&mut self) {
                self.0.borrow_mut().push("dropped");
                let alone = !keep_until_told(|| unreachable!("all is told"));
                assert!(alone);
            }
        }
        let seen = Rc::new(RefCell::new(Vec::new()));
        assert!(!keep_until_told(|| unreachable!("nothing is told")));
        together(|| {
            for call in ["first", "second"] {
                seen.borrow_mut().push(call);
                if call == "first" {
                    // What is told within is told together with the rest.
                    together(|| assert!(keep_until_told(|| Box::new(Kept(Rc::clone(&seen))))));
                }
            }
        });
        assert_eq!(*seen.borrow(), ["first", "second", "dropped"]);
        assert!(!keep_until_told(|| unreachable!("nothing is told")));
    }
}
