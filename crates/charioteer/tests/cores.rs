//! Order of priorities, sets and parts of cores, and the limit of pending tasks.
#![cfg(not(loom))]

mod common;

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use charioteer::machine::cpus::{Pinning, usable};
use charioteer::native::{Runtime, Task, TaskSpace, current};
use common::within;

/// Keeps the only worker busy while `spawn` spawns, then lets everything run.
fn while_busy<R>(runtime: &Runtime, spawn: impl FnOnce() -> R) -> R {
    let (busy, go) = (Arc::new(Barrier::new(2)), Arc::new(Barrier::new(2)));
    runtime.spawn_detached({
        let (busy, go) = (Arc::clone(&busy), Arc::clone(&go));
        move || {
            busy.wait();
            go.wait();
        }
    });
    busy.wait();
    let result = spawn();
    go.wait();
    result
}

#[test]
fn a_larger_priority_is_sooner_and_equals_keep_their_order() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let priorities = [0, 3, -1, 7, 0, 3, -5, 7, 0, -1];
        while_busy(&runtime, || {
            for (i, priority) in priorities.into_iter().enumerate() {
                let log = Arc::clone(&log);
                runtime
                    .task()
                    .priority(priority)
                    .spawn(move || log.lock().unwrap().push(i))
                    .unwrap();
            }
        });
        runtime.close().unwrap();
        let mut expected: Vec<usize> = (0..priorities.len()).collect();
        expected.sort_by_key(|&i| (-priorities[i], i));
        assert_eq!(*log.lock().unwrap(), expected);
    });
}

/// What of each core is taken, in 1/1000.
struct Ledger(Vec<AtomicI64>);

impl Ledger {
    fn new(cores: usize) -> Arc<Self> {
        Arc::new(Self((0..cores).map(|_| AtomicI64::new(0)).collect()))
    }

    fn take(&self, cores: &[u16], part: i64) {
        for core in cores {
            let before = self.0[usize::from(*core)].fetch_add(part, Ordering::SeqCst);
            assert!(before + part <= 1000, "core {core} holds too much");
        }
    }

    fn give(&self, cores: &[u16], part: i64) {
        for core in cores {
            self.0[usize::from(*core)].fetch_sub(part, Ordering::SeqCst);
        }
    }
}

#[test]
fn whole_cores_are_held_by_one_task_at_a_time() {
    within(60, || {
        let runtime = Runtime::new(4).unwrap();
        let ledger = Ledger::new(4);
        let done = Arc::new(AtomicUsize::new(0));
        for i in 0..400_u16 {
            let cores = i % 4 + 1;
            let (ledger, done) = (Arc::clone(&ledger), Arc::clone(&done));
            runtime
                .task()
                .cores(cores)
                .priority(i32::from(i % 3))
                .spawn(move || {
                    let held = current().unwrap().cores().to_vec();
                    assert_eq!(held.len(), usize::from(cores));
                    ledger.take(&held, 1000);
                    std::thread::yield_now();
                    ledger.give(&held, 1000);
                    done.fetch_add(1, Ordering::Relaxed);
                })
                .unwrap();
        }
        runtime.close().unwrap();
        assert_eq!(done.load(Ordering::Relaxed), 400);
    });
}

#[test]
fn parts_of_cores_add_up_to_no_more_than_the_cores() {
    within(60, || {
        let runtime = Runtime::new(2).unwrap();
        let (now, most) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicI64::new(0)));
        for i in 0..300 {
            let share = [0.25, 0.5, 0.75, 1.0][i % 4];
            let part = [250, 500, 750, 1000][i % 4];
            let (now, most) = (Arc::clone(&now), Arc::clone(&most));
            runtime
                .task()
                .share(share)
                .spawn(move || {
                    let before = now.fetch_add(part, Ordering::SeqCst);
                    most.fetch_max(before + part, Ordering::SeqCst);
                    std::thread::yield_now();
                    now.fetch_sub(part, Ordering::SeqCst);
                })
                .unwrap();
        }
        runtime.close().unwrap();
        assert!(most.load(Ordering::SeqCst) <= 2000);
    });
}

#[test]
fn parts_that_fit_run_side_by_side() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        // All four have to run at once for any of them to end.
        let together = Arc::new(Barrier::new(4));
        for _ in 0..4 {
            let together = Arc::clone(&together);
            runtime
                .task()
                .share(0.25)
                .spawn(move || {
                    together.wait();
                })
                .unwrap();
        }
        runtime.close().unwrap();
    });
}

#[test]
fn a_task_that_needs_nothing_runs_beside_all_others() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let together = Arc::new(Barrier::new(6));
        for i in 0..6 {
            let together = Arc::clone(&together);
            let share = if i == 0 { 1.0 } else { 0.0 };
            runtime
                .task()
                .share(share)
                .spawn(move || {
                    together.wait();
                })
                .unwrap();
        }
        runtime.close().unwrap();
    });
}

/// A stream of ordinary tasks that never ends by itself does not keep a wide task waiting.
#[test]
fn a_wide_task_is_not_starved() {
    within(60, || {
        let runtime = Runtime::new(2).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        fn stream(spawn: charioteer::native::Spawn, stop: Arc<AtomicBool>) {
            if !stop.load(Ordering::Relaxed) {
                let next = spawn.clone();
                spawn.spawn_detached(move || stream(next, stop));
            }
        }
        for _ in 0..4 {
            let (spawn, stop) = (runtime.handle(), Arc::clone(&stop));
            runtime.spawn_detached(move || stream(spawn, stop));
        }
        for _ in 0..20 {
            let wide = runtime.task().cores(2).spawn(|| ()).unwrap();
            wide.result().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        runtime.close().unwrap();
    });
}

/// And a stream of wide tasks does not keep an ordinary one waiting.
#[test]
fn an_ordinary_task_is_not_starved() {
    within(60, || {
        let runtime = Runtime::new(2).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        fn stream(spawn: charioteer::native::Spawn, stop: Arc<AtomicBool>) {
            if !stop.load(Ordering::Relaxed) {
                let next = spawn.clone();
                spawn
                    .task()
                    .cores(2)
                    .spawn(move || stream(next, stop))
                    .unwrap();
            }
        }
        for _ in 0..3 {
            let (spawn, stop) = (runtime.handle(), Arc::clone(&stop));
            runtime.spawn_detached(move || stream(spawn, stop));
        }
        for _ in 0..20 {
            runtime.spawn(|| ()).result().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        runtime.close().unwrap();
    });
}

/// Wide tasks that are cancelled while they wait for cores take nobody's cores away.
#[test]
fn a_cancelled_wide_task_keeps_no_core() {
    within(20, || {
        let runtime = Runtime::new(2).unwrap();
        let (busy, go) = (Arc::new(Barrier::new(2)), Arc::new(Barrier::new(2)));
        runtime.spawn_detached({
            let (busy, go) = (Arc::clone(&busy), Arc::clone(&go));
            move || {
                busy.wait();
                go.wait();
            }
        });
        busy.wait();
        let wide = runtime.task().cores(2).spawn(|| ()).unwrap();
        assert!(wide.cancel());
        // The other core is free; something unusual to make the runtime look at its list.
        runtime
            .task()
            .share(0.5)
            .spawn(|| ())
            .unwrap()
            .result()
            .unwrap();
        runtime.spawn(|| ()).result().unwrap();
        go.wait();
        runtime.close().unwrap();
    });
}

#[test]
fn wide_and_partial_bodies_may_wait() {
    within(60, || {
        let runtime = Runtime::new(2).unwrap();
        let sum = Arc::new(AtomicUsize::new(0));
        for i in 0..60 {
            let (spawn, sum) = (runtime.handle(), Arc::clone(&sum));
            let task = runtime.task();
            let task = match i % 3 {
                0 => task.cores(2),
                1 => task.share(0.5),
                _ => task,
            };
            task.spawn(move || {
                let children: Vec<_> = (0..3)
                    .map(|j| {
                        let task = spawn.task();
                        let task = match j {
                            0 => task.cores(2),
                            1 => task.share(0.75),
                            _ => task,
                        };
                        task.spawn(|| 1).unwrap()
                    })
                    .collect();
                let mine: usize = children.iter().map(|child| *child.result().unwrap()).sum();
                sum.fetch_add(mine, Ordering::Relaxed);
            })
            .unwrap();
        }
        runtime.close().unwrap();
        assert_eq!(sum.load(Ordering::Relaxed), 180);
    });
}

#[test]
fn a_spawner_waits_while_too_many_tasks_are_unfinished() {
    within(60, || {
        for limit in [1, 2, 8] {
            let runtime = Runtime::builder()
                .workers(2)
                .max_pending(limit)
                .open()
                .unwrap();
            for _ in 0..500 {
                runtime.spawn_detached(std::thread::yield_now);
                let counts = runtime.counts();
                let unfinished = counts.spawned - counts.finished;
                assert!(unfinished <= limit as u64, "{unfinished} are unfinished");
            }
            runtime.close().unwrap();
        }
    });
}

#[test]
fn bodies_spawn_beyond_the_limit() {
    within(20, || {
        let runtime = Runtime::builder().workers(1).max_pending(2).open().unwrap();
        let spawn = runtime.handle();
        let task = runtime.spawn(move || {
            let children: Vec<_> = (0..100_u32).map(|i| spawn.spawn(move || i)).collect();
            children
                .iter()
                .map(|child| *child.result().unwrap())
                .sum::<u32>()
        });
        assert_eq!(*task.result().unwrap(), 4950);
        runtime.close().unwrap();
    });
}

/// What is unfinished waits for a task that the spawner has still to spawn.
#[test]
fn the_limit_does_not_stop_a_spawner_that_all_wait_for() {
    within(20, || {
        let runtime = Runtime::builder().workers(2).max_pending(5).open().unwrap();
        let space = TaskSpace::<i64, 1>::new("T");
        for i in (1..100).rev() {
            let before = space.at([i - 1]);
            runtime
                .task()
                .after(&before.clone())
                .spawn_at(&space.at([i]), move || before.result().unwrap() + 1)
                .unwrap();
        }
        runtime.task().spawn_at(&space.at([0]), || 0).unwrap();
        assert_eq!(*space.at([99]).result().unwrap(), 99);
        runtime.close().unwrap();
    });
}

/// After a set of cores ordinary tasks may pass the next unusual one, but not keep it from a core
/// that is free, however long they run.
#[test]
fn a_long_task_keeps_nobody_from_a_free_core() {
    within(20, || {
        let runtime = Runtime::new(2).unwrap();
        let (busy, go) = (Arc::new(Barrier::new(3)), Arc::new(Barrier::new(3)));
        for _ in 0..2 {
            let (busy, go) = (Arc::clone(&busy), Arc::clone(&go));
            runtime.spawn_detached(move || {
                busy.wait();
                go.wait();
            });
        }
        busy.wait();
        let wide = runtime.task().cores(2).spawn(|| ()).unwrap();
        let meet = Arc::new(Barrier::new(2));
        let long = runtime.spawn({
            let meet = Arc::clone(&meet);
            move || {
                meet.wait();
            }
        });
        let part = runtime
            .task()
            .share(0.5)
            .spawn(move || {
                meet.wait();
            })
            .unwrap();
        go.wait();
        wide.result().unwrap();
        long.result().unwrap();
        part.result().unwrap();
        runtime.close().unwrap();
    });
}

#[test]
fn pinned_workers_are_where_their_cores_are() {
    within(20, || {
        let all = usable().unwrap();
        let workers = all.len().min(2);
        for pinning in [Pinning::Compact, Pinning::Spread] {
            let builder = Runtime::builder().workers(workers).pin(pinning);
            let runtime = builder.open().unwrap();
            let held = |task: Task<Vec<u32>>| task.result().unwrap().len();
            let place = || usable().unwrap();
            assert_eq!(held(runtime.spawn(place)), 1);
            let wide = u16::try_from(workers).unwrap();
            assert_eq!(
                held(runtime.task().cores(wide).spawn(place).unwrap()),
                workers
            );
            assert_eq!(
                held(runtime.task().share(0.0).spawn(place).unwrap()),
                all.len()
            );
            runtime.close().unwrap();
            assert_eq!(usable().unwrap(), all);
        }
    });
}
