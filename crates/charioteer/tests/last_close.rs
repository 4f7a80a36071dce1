//! Those who wait, outside of tasks, for what is never spawned hear of it when the last runtime of
//! the process closes: a test that needs a process of its own.
#![cfg(not(loom))]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use charioteer::native::{Runtime, TaskError, TaskSpace};
use common::within;

#[test]
fn who_waits_for_what_was_never_spawned_is_told_by_the_last_close() {
    within(20, || {
        let (runtime, other) = (Runtime::new(1).unwrap(), Runtime::new(1).unwrap());
        let space = TaskSpace::<(), 1>::new("T");
        let called = Arc::new(AtomicUsize::new(0));
        space.at([1]).on_done({
            let called = Arc::clone(&called);
            move || {
                called.fetch_add(1, Ordering::Relaxed);
            }
        });
        let waiter = std::thread::spawn({
            let task = space.at([0]);
            move || task.result().map(|&()| ())
        });
        // Long enough for the waiter to block.
        std::thread::sleep(Duration::from_millis(100));
        runtime.close().unwrap();
        assert!(!waiter.is_finished());
        assert_eq!(called.load(Ordering::Relaxed), 0);
        // No task depended on them, so this is no failure of a runtime.
        other.close().unwrap();
        assert!(matches!(
            waiter.join().unwrap(),
            Err(TaskError::Unspawned(_))
        ));
        assert_eq!(called.load(Ordering::Relaxed), 1);
    });
}
