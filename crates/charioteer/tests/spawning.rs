//! Spawning: values, names, dependencies, cycles, names that are never spawned.
#![cfg(not(loom))]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use charioteer::native::{Runtime, SpawnError, Task, TaskError, TaskSpace};
use common::within;

fn cycle_of(result: Result<(), SpawnError>) -> Vec<String> {
    match result {
        Err(SpawnError::Cycle(names)) => names,
        other => panic!("expected a cycle, got {other:?}"),
    }
}

#[test]
fn a_task_gives_its_value_to_every_handle() {
    within(20, || {
        for workers in [0, 1, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let task = runtime.spawn(|| String::from("value"));
            let other = task.clone();
            assert_eq!(task.result().unwrap(), "value");
            assert_eq!(other.result().unwrap(), "value");
            assert!(other.is_done());
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_task_starts_after_all_that_it_depends_on() {
    within(20, || {
        for workers in [0, 1, 2, 4] {
            let runtime = Runtime::new(workers).unwrap();
            let log = Arc::new(Mutex::new(Vec::new()));
            let mut tasks: Vec<Task<()>> = Vec::new();
            for i in 0..200_usize {
                let log = Arc::clone(&log);
                let mut task = runtime.task();
                for back in [1, 2, 7] {
                    if i >= back {
                        task = task.after(&tasks[i - back]);
                    }
                }
                tasks.push(task.spawn(move || log.lock().unwrap().push(i)).unwrap());
            }
            runtime.close().unwrap();
            assert_eq!(*log.lock().unwrap(), (0..200).collect::<Vec<_>>());
        }
    });
}

#[test]
fn the_same_dependency_may_be_named_twice() {
    within(20, || {
        let runtime = Runtime::new(2).unwrap();
        let space = TaskSpace::<u32, 1>::new("T");
        let second = runtime
            .task()
            .after(&space.at([0]))
            .after(&space.at([0]))
            .spawn({
                let first = space.at([0]);
                move || first.result().unwrap() + 1
            })
            .unwrap();
        runtime.task().spawn_at(&space.at([0]), || 1).unwrap();
        assert_eq!(*second.result().unwrap(), 2);
        runtime.close().unwrap();
    });
}

#[test]
fn a_name_is_spawned_once() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let space = TaskSpace::<u32, 2>::new("T");
        runtime.task().spawn_at(&space.at([1, 2]), || 1).unwrap();
        let again = runtime.task().spawn_at(&space.at([1, 2]), || 2);
        assert_eq!(again, Err(SpawnError::Duplicate));
        assert_eq!(*space.at([1, 2]).result().unwrap(), 1);
        let again = runtime.task().spawn_at(&space.at([1, 2]), || 3);
        assert_eq!(again, Err(SpawnError::Duplicate));
        runtime.close().unwrap();
        assert_eq!(*space.at([1, 2]).result().unwrap(), 1);
    });
}

#[test]
fn a_task_may_depend_on_one_that_is_spawned_later() {
    within(20, || {
        for workers in [0, 1, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let space = TaskSpace::<i64, 1>::new("T");
            for i in (1..50).rev() {
                let before = space.at([i - 1]);
                runtime
                    .task()
                    .after(&before.clone())
                    .spawn_at(&space.at([i]), move || before.result().unwrap() + 1)
                    .unwrap();
            }
            assert!(!space.at([49]).is_done());
            runtime.task().spawn_at(&space.at([0]), || 0).unwrap();
            assert_eq!(*space.at([49]).result().unwrap(), 49);
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_task_cannot_depend_on_itself() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let space = TaskSpace::<(), 1>::new("T");
        let task = space.at([0]);
        let names = cycle_of(runtime.task().after(&task).spawn_at(&task, || ()));
        assert_eq!(names, ["T[0]", "T[0]"]);
        // Nothing is left behind: the name can be spawned.
        runtime.task().spawn_at(&task, || ()).unwrap();
        task.result().unwrap();
        runtime.close().unwrap();
    });
}

#[test]
fn a_cycle_of_two_is_refused_at_the_later_spawn() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let space = TaskSpace::<u32, 1>::new("T");
        let (a, b) = (space.at([0]), space.at([1]));
        runtime.task().after(&b).spawn_at(&a, || 1).unwrap();
        let names = cycle_of(runtime.task().after(&a).spawn_at(&b, || 2));
        assert_eq!(names.first(), names.last());
        assert_eq!(names.len(), 3);
        assert!(!a.is_done());
        runtime.task().spawn_at(&b, || 3).unwrap();
        assert_eq!((*a.result().unwrap(), *b.result().unwrap()), (1, 3));
        runtime.close().unwrap();
    });
}

#[test]
fn a_long_cycle_is_refused_with_its_names() {
    within(60, || {
        let runtime = Runtime::new(2).unwrap();
        let space = TaskSpace::<(), 1>::new("T");
        let n = 20_000;
        for i in 1..n {
            runtime
                .task()
                .after(&space.at([i - 1]))
                .spawn_at(&space.at([i]), || ())
                .unwrap();
        }
        let closing = runtime.task().after(&space.at([n - 1]));
        let names = cycle_of(closing.spawn_at(&space.at([0]), || ()));
        assert_eq!(names.len(), usize::try_from(n).unwrap() + 1);
        assert_eq!(names.first(), names.last());
        runtime.task().spawn_at(&space.at([0]), || ()).unwrap();
        space.at([n - 1]).result().unwrap();
        runtime.close().unwrap();
    });
}

#[test]
fn what_was_never_spawned_fails_at_the_end_and_names_itself() {
    within(20, || {
        for workers in [0, 1, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let space = TaskSpace::<u32, 1>::new("T");
            let ran = Arc::new(AtomicUsize::new(0));
            let dependent = runtime
                .task()
                .name("dependent")
                .after(&space.at([3]))
                .after(&space.at([5]))
                .spawn({
                    let ran = Arc::clone(&ran);
                    move || ran.fetch_add(1, Ordering::Relaxed)
                })
                .unwrap();
            let failures = runtime.close().unwrap_err().0;
            assert_eq!(ran.load(Ordering::Relaxed), 0);
            let names: Vec<_> = failures.iter().map(|(name, _)| name.as_str()).collect();
            assert!(names.contains(&"T[3]") && names.contains(&"T[5]"));
            match dependent.result() {
                Err(TaskError::Dependency(_, error)) => match *error {
                    TaskError::Unspawned(names) => assert_eq!(*names, ["T[3]", "T[5]"]),
                    other => panic!("{other:?}"),
                },
                other => panic!("{other:?}"),
            }
        }
    });
}

#[test]
fn a_refused_spawn_is_still_missed_at_the_end() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let space = TaskSpace::<(), 1>::new("T");
        let (a, b) = (space.at([0]), space.at([1]));
        runtime.task().after(&b).spawn_at(&a, || ()).unwrap();
        cycle_of(runtime.task().after(&a).spawn_at(&b, || ()));
        assert!(runtime.close().is_err());
        assert!(matches!(b.result(), Err(TaskError::Unspawned(_))));
        assert!(matches!(a.result(), Err(TaskError::Dependency(..))));
    });
}

#[test]
fn a_spawn_after_the_end_is_refused() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let spawn = runtime.handle();
        let space = TaskSpace::<(), 1>::new("T");
        runtime.close().unwrap();
        let anonymous = spawn.task().spawn(|| ());
        assert!(matches!(anonymous, Err(SpawnError::Closed)));
        let named = spawn.task().spawn_at(&space.at([0]), || ());
        assert_eq!(named, Err(SpawnError::Closed));
        // The name is as it was.
        let runtime = Runtime::new(1).unwrap();
        runtime.task().spawn_at(&space.at([0]), || ()).unwrap();
        runtime.close().unwrap();
        assert!(space.at([0]).result().is_ok());
    });
}

#[test]
fn more_cores_than_there_are_is_refused() {
    within(20, || {
        let runtime = Runtime::new(2).unwrap();
        let refused = runtime.task().cores(3).spawn(|| ());
        assert!(matches!(refused, Err(SpawnError::Cores(3, 2))));
        assert_eq!(runtime.counts().spawned, 0);
        runtime.close().unwrap();
    });
}

#[test]
fn without_workers_bodies_run_here_and_in_order() {
    within(20, || {
        let run = || {
            let runtime = Runtime::new(0).unwrap();
            let here = std::thread::current().id();
            let log = Arc::new(Mutex::new(Vec::new()));
            let space = TaskSpace::<(), 1>::new("T");
            for i in (0..20_i64).rev() {
                let log = Arc::clone(&log);
                let spawn = runtime.handle();
                let mut task = runtime.task().priority(i32::try_from(i % 3).unwrap());
                if i > 0 {
                    task = task.after(&space.at([i / 2]));
                }
                let body = move || {
                    assert_eq!(std::thread::current().id(), here);
                    log.lock().unwrap().push(i);
                    let inner = Arc::clone(&log);
                    spawn
                        .spawn(move || inner.lock().unwrap().push(100 + i))
                        .result()
                        .unwrap();
                };
                // All depend on the one that is spawned last.
                assert!(space.touched().iter().all(|task| !task.is_done()));
                let task = if i == 0 { runtime.task() } else { task };
                task.spawn_at(&space.at([i]), body).unwrap();
            }
            assert!(space.at([19]).is_done());
            runtime.close().unwrap();
            Arc::try_unwrap(log).unwrap().into_inner().unwrap()
        };
        let first = run();
        assert_eq!(first.len(), 40);
        for _ in 0..5 {
            assert_eq!(run(), first);
        }
    });
}

#[test]
fn spawners_in_many_threads_lose_nothing() {
    within(60, || {
        for workers in [0, 1, 3] {
            let runtime = Runtime::new(workers).unwrap();
            let count = Arc::new(AtomicUsize::new(0));
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    let spawn = runtime.handle();
                    let count = &count;
                    scope.spawn(move || {
                        for _ in 0..2000 {
                            let count = Arc::clone(count);
                            spawn.spawn_detached(move || {
                                count.fetch_add(1, Ordering::Relaxed);
                            });
                        }
                    });
                }
            });
            runtime.close().unwrap();
            assert_eq!(count.load(Ordering::Relaxed), 8000);
        }
    });
}

/// Two threads spawn names that depend on each other: never both, and at least one.
#[test]
fn of_two_spawns_that_close_a_cycle_one_is_refused() {
    within(120, || {
        let runtime = Runtime::new(2).unwrap();
        for round in 0..3000 {
            let space = Arc::new(TaskSpace::<(), 1>::new("T"));
            let barrier = Arc::new(std::sync::Barrier::new(2));
            let spawned: Vec<bool> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..2_i64)
                    .map(|me| {
                        let (space, barrier) = (Arc::clone(&space), Arc::clone(&barrier));
                        let spawn = runtime.handle();
                        scope.spawn(move || {
                            barrier.wait();
                            spawn
                                .task()
                                .after(&space.at([1 - me]))
                                .spawn_at(&space.at([me]), || ())
                                .inspect_err(|e| {
                                    if !matches!(e, SpawnError::Cycle(_)) {
                                        eprintln!("{e:?} {:?}", space.at([me]))
                                    }
                                })
                                .is_ok()
                        })
                    })
                    .collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap())
                    .collect()
            });
            assert_ne!(spawned, [true, true], "round {round}");
            for (me, spawned) in spawned.into_iter().enumerate() {
                let me = i64::try_from(me).unwrap();
                if !spawned {
                    runtime
                        .task()
                        .spawn_at(&space.at([me]), || ())
                        .unwrap_or_else(|e| {
                            panic!("{e:?} {:?} {spawned:?} {round}", space.at([me]))
                        });
                }
            }
            space.at([0]).result().unwrap();
            space.at([1]).result().unwrap();
        }
        runtime.close().unwrap();
    });
}
