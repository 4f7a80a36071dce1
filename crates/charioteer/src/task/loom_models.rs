//! Models of the latch.

use std::sync::Arc;

use loom::thread;

use super::{End, Latch, Task, Until, Waker};
use crate::loom_domain::{Model, explore};
use crate::sync::{AtomicUsize, Ordering};

fn arrive(latch: &Arc<Latch<Model>>) -> thread::JoinHandle<bool> {
    let latch = Arc::clone(latch);
    thread::spawn(move || latch.arrive(false, |_| unreachable!("nobody is counted")))
}

/// Two arrivals against a thread that registers and blocks: it is woken, and one of the three opens
/// the latch.
#[test]
fn a_latch_opens_once_and_wakes() {
    explore(|| {
        let latch = Latch::new(2, Until::All, Waker::Thread(None));
        let arrivals = [arrive(&latch), arrive(&latch)];
        let mut opened = usize::from(latch.registered());
        assert_eq!(latch.block(None, || false), End::Open);
        for arrival in arrivals {
            opened += usize::from(arrival.join().unwrap());
        }
        assert_eq!(opened, 1);
    });
}

/// Arrivals, any of which is enough, against a waiter that gives up: one of the three ends the wait.
#[test]
fn a_latch_opens_or_is_given_up() {
    explore(|| {
        let latch = Latch::new(2, Until::Any, Waker::Thread(None));
        let arrivals = [arrive(&latch), arrive(&latch)];
        let mut ended = usize::from(latch.registered());
        let given_up = latch.give_up();
        for arrival in arrivals {
            ended += usize::from(arrival.join().unwrap());
        }
        assert_eq!(ended + usize::from(given_up), 1);
        assert_eq!(latch.is_open(), !given_up);
    });
}

/// A waiter that counts itself, and blocks or gives up, against an arrival: who counted is taken off
/// once, and before it can see that the latch is open.
#[test]
fn who_is_counted_is_uncounted() {
    for blocks in [true, false] {
        explore(move || {
            let waiter = Arc::new(Task::<Model>::unspawned("waiter"));
            let latch = Latch::new(1, Until::All, Waker::Thread(Some(waiter)));
            let uncounted = Arc::new(AtomicUsize::new(0));
            let arrival = {
                let latch = Arc::clone(&latch);
                let uncounted = Arc::clone(&uncounted);
                thread::spawn(move || {
                    latch.arrive(false, |_| {
                        uncounted.fetch_add(1, Ordering::Relaxed);
                    })
                })
            };
            let opened = latch.registered();
            let counted = latch.count();
            if blocks {
                assert_eq!(latch.block(None, || false), End::Open);
                assert_eq!(uncounted.load(Ordering::Relaxed), usize::from(counted));
            }
            assert_eq!(latch.is_counted(), counted);
            let given_up = latch.give_up();
            if given_up && counted {
                uncounted.fetch_add(1, Ordering::Relaxed);
            }
            let opened = usize::from(opened) + usize::from(arrival.join().unwrap());
            assert_eq!(opened + usize::from(given_up), 1);
            assert_eq!(uncounted.load(Ordering::Relaxed), usize::from(counted));
        });
    }
}
