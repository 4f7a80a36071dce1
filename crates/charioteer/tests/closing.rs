//! The end of a runtime: what it waits for, what races with it, what it leaves.
#![cfg(not(loom))]

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use charioteer::native::{Runtime, Spawn, SpawnError, TaskError, TaskSpace};
use common::within;

#[test]
fn closing_waits_for_everything() {
    within(20, || {
        for workers in [0, 1, 3] {
            let runtime = Runtime::new(workers).unwrap();
            let count = Arc::new(AtomicUsize::new(0));
            fn grow(spawn: &Spawn, count: &Arc<AtomicUsize>, depth: u32) {
                count.fetch_add(1, Ordering::Relaxed);
                if depth > 0 {
                    for _ in 0..2 {
                        let (inner, count) = (spawn.clone(), Arc::clone(count));
                        spawn.spawn_detached(move || grow(&inner, &count, depth - 1));
                    }
                }
            }
            let (spawn, counted) = (runtime.handle(), Arc::clone(&count));
            runtime.spawn_detached(move || grow(&spawn, &counted, 10));
            runtime.close().unwrap();
            assert_eq!(count.load(Ordering::Relaxed), 2047);
        }
    });
}

#[test]
fn dropping_a_runtime_waits_as_well() {
    within(20, || {
        let done = Arc::new(AtomicBool::new(false));
        let runtime = Runtime::new(1).unwrap();
        let task = runtime.spawn({
            let done = Arc::clone(&done);
            move || {
                std::thread::sleep(Duration::from_millis(20));
                done.store(true, Ordering::Relaxed);
            }
        });
        drop(runtime);
        assert!(done.load(Ordering::Relaxed));
        assert!(task.result().is_ok(), "a result outlives its runtime");
    });
}

#[test]
fn a_runtime_that_did_nothing_closes_at_once() {
    within(60, || {
        let start = Instant::now();
        for _ in 0..200 {
            Runtime::new(2).unwrap().close().unwrap();
        }
        let each = start.elapsed() / 200;
        assert!(each < Duration::from_millis(20), "{each:?}");
    });
}

#[test]
fn bodies_are_freed_when_they_are_done_and_nothing_is_kept() {
    within(20, || {
        let runtime = Runtime::new(2).unwrap();
        let payload = Arc::new(0);
        let mut freed: Vec<Weak<i32>> = Vec::new();
        let mut tasks = Vec::new();
        let space = TaskSpace::<i32, 1>::new("T");
        for i in 0..100_i64 {
            let mine = Arc::new(0);
            freed.push(Arc::downgrade(&mine));
            let shared = Arc::clone(&payload);
            let task = runtime.task().after(&space.at([i / 10]));
            tasks.push(task.spawn(move || *mine + *shared).unwrap());
            if i % 7 == 0 {
                tasks[usize::try_from(i).unwrap()].cancel();
            }
        }
        for i in 0..10 {
            let shared = Arc::clone(&payload);
            runtime
                .task()
                .spawn_at(&space.at([i]), move || *shared)
                .unwrap();
        }
        for (task, freed) in tasks.iter().zip(&freed) {
            let _ = task.result();
            assert_eq!(freed.strong_count(), 0);
        }
        runtime.close().unwrap();
        assert_eq!(Arc::strong_count(&payload), 1);
    });
}

/// Values, handles and spaces go away with their last owner, also where tasks waited for each other.
#[test]
fn no_cycle_of_references_is_left() {
    within(20, || {
        for workers in [0, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let marker = Arc::new(());
            let space = Arc::new(TaskSpace::<Arc<()>, 1>::new("T"));
            for i in (0..50_i64).rev() {
                let (marker, inner) = (Arc::clone(&marker), Arc::downgrade(&space));
                let mut task = runtime.task();
                if i > 0 {
                    task = task.after(&space.at([i - 1]));
                }
                task.spawn_at(&space.at([i]), move || {
                    drop(inner.upgrade());
                    marker
                })
                .unwrap();
            }
            // One that is cancelled with dirty predecessors, one that is refused for a cycle.
            let cancelled = runtime
                .task()
                .after(&space.at([99]))
                .spawn_at(&space.at([98]), {
                    let marker = Arc::clone(&marker);
                    move || marker
                });
            cancelled.unwrap();
            let refused = runtime
                .task()
                .after(&space.at([98]))
                .spawn_at(&space.at([99]), {
                    let marker = Arc::clone(&marker);
                    move || marker
                });
            assert!(refused.is_err());
            assert!(space.at([98]).cancel());
            runtime.close().unwrap();
            drop(space);
            assert_eq!(Arc::strong_count(&marker), 1);
        }
    });
}

/// Threads spawn, and their tasks spawn, while another thread closes. A spawn is refused or its task
/// runs; a task that was let in may always spawn.
#[test]
fn spawning_races_with_closing() {
    within(120, || {
        for round in 0..300 {
            let runtime = Runtime::new(1 + round % 2).unwrap();
            let spawn = runtime.handle();
            let (accepted, ran) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
            let nested_refused = Arc::new(AtomicUsize::new(0));
            let spawners = 2;
            std::thread::scope(|scope| {
                for _ in 0..spawners {
                    scope.spawn(|| {
                        loop {
                            let task = spawn.task().spawn({
                                let (inner, ran) = (spawn.clone(), Arc::clone(&ran));
                                let nested_refused = Arc::clone(&nested_refused);
                                move || {
                                    ran.fetch_add(1, Ordering::Relaxed);
                                    let child = inner.task().spawn({
                                        let ran = Arc::clone(&ran);
                                        move || ran.fetch_add(1, Ordering::Relaxed)
                                    });
                                    if child.is_err() {
                                        nested_refused.fetch_add(1, Ordering::Relaxed);
                                    }
                                }
                            });
                            match task {
                                // One at a time, so that there are moments without any.
                                Ok(task) => task.result().unwrap(),
                                Err(SpawnError::Closed) => break,
                                Err(other) => panic!("{other}"),
                            };
                            accepted.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_micros(50));
                    runtime.close().unwrap();
                });
            });
            assert_eq!(nested_refused.load(Ordering::Relaxed), 0);
            assert_eq!(
                ran.load(Ordering::Relaxed),
                2 * accepted.load(Ordering::Relaxed)
            );
        }
    });
}

/// A body whose wait is just over is about to spawn what others depend on, while all other threads
/// have gone idle: it is not taken for one that is stuck.
#[test]
fn a_body_whose_wait_is_over_is_not_stuck() {
    within(120, || {
        for round in 0..1000 {
            let runtime = Runtime::new(1 + round % 2).unwrap();
            let spawn = runtime.handle();
            let space = Arc::new(TaskSpace::<u32, 1>::new("T"));
            let dependent = runtime.task().after(&space.at([1])).spawn(|| 1).unwrap();
            runtime.spawn_detached({
                let space = Arc::clone(&space);
                move || {
                    let helper = spawn.spawn(|| ());
                    // A limit keeps the helper off this stack.
                    helper.wait(Some(Duration::from_secs(60))).unwrap();
                    let wanted = space.at([0]);
                    spawn.spawn_detached({
                        let (spawn, space) = (spawn.clone(), Arc::clone(&space));
                        move || spawn.task().spawn_at(&space.at([0]), || 1).unwrap()
                    });
                    wanted.result().unwrap();
                    spawn.task().spawn_at(&space.at([1]), || 2).unwrap();
                }
            });
            runtime.close().unwrap();
            assert_eq!(*dependent.result().unwrap(), 1);
        }
    });
}

#[test]
fn a_body_that_waits_for_what_is_never_spawned_is_told() {
    within(20, || {
        for workers in [1, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let space = TaskSpace::<u32, 1>::new("T");
            let told = Arc::new(Mutex::new(None));
            runtime.spawn_detached({
                let (wanted, told) = (space.at([4]), Arc::clone(&told));
                move || *told.lock().unwrap() = Some(wanted.result().map(|_| ()).unwrap_err())
            });
            let awaiting = runtime.spawn_future({
                let wanted = space.at([5]);
                async move { wanted.await.map(|_| ()).unwrap_err() }
            });
            // Both received it.
            runtime.close().unwrap();
            assert!(matches!(
                told.lock().unwrap().take(),
                Some(TaskError::Unspawned(_))
            ));
            assert!(matches!(awaiting.result(), Ok(TaskError::Unspawned(_))));
        }
    });
}

#[test]
fn a_runtime_is_not_closed_by_its_own_task() {
    within(20, || {
        let runtime = Arc::new(Mutex::new(Some(Runtime::new(1).unwrap())));
        let spawn = runtime.lock().unwrap().as_ref().unwrap().handle();
        let task = spawn.spawn({
            let runtime = Arc::clone(&runtime);
            move || {
                let mine = runtime.lock().unwrap().take().unwrap();
                let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    drop(mine.close());
                }));
                refused.is_err()
            }
        });
        assert!(*task.result().unwrap());
    });
}

#[test]
fn runtimes_live_side_by_side_and_wait_for_each_other() {
    within(20, || {
        let (a, b) = (Runtime::new(1).unwrap(), Runtime::new(1).unwrap());
        let far = b.spawn(|| {
            std::thread::sleep(Duration::from_millis(10));
            20
        });
        let dependent = a.task().after(&far).spawn(|| 1).unwrap();
        let spawn = a.handle();
        let sum = a.spawn(move || {
            let near = spawn.spawn(|| 2);
            far.result().unwrap() + near.result().unwrap()
        });
        assert_eq!(*sum.result().unwrap(), 22);
        assert_eq!(*dependent.result().unwrap(), 1);
        a.close().unwrap();
        b.close().unwrap();
    });
}
