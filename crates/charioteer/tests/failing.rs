//! Failures, cancellation, time limits and retries.
#![cfg(not(loom))]

mod common;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use charioteer::native::{Cause, Runtime, Task, TaskError, TaskSpace, current};
use common::within;

#[derive(Debug)]
struct Broken(usize);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broken {}", self.0)
    }
}

impl std::error::Error for Broken {}

/// The name of the root and its failure.
fn root<T: Send + Sync + fmt::Debug + 'static>(task: &Task<T>) -> (String, TaskError) {
    match task.result() {
        Err(TaskError::Dependency(name, error)) => (name, *error),
        other => panic!("expected the failure of a dependency, got {other:?}"),
    }
}

/// A task that runs until it is told, and is running when this returns.
struct Held {
    task: Task<()>,
    go: Arc<AtomicBool>,
}

impl Held {
    fn new(runtime: &Runtime) -> Self {
        let (go, running) = (Arc::new(AtomicBool::new(false)), Arc::new(Barrier::new(2)));
        let task = runtime.spawn({
            let (go, running) = (Arc::clone(&go), Arc::clone(&running));
            move || {
                running.wait();
                while !go.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
            }
        });
        running.wait();
        Self { task, go }
    }

    fn release(&self) {
        self.go.store(true, Ordering::Release);
    }
}

#[test]
fn an_error_and_a_panic_are_outcomes() {
    within(20, || {
        for workers in [0, 1] {
            let runtime = Runtime::new(workers).unwrap();
            let error = runtime
                .task()
                .try_spawn(0, || Err::<(), _>(Broken(7)))
                .unwrap();
            match error.result() {
                Err(TaskError::Failed(Cause::Error(error))) => {
                    assert_eq!(error.to_string(), "broken 7");
                }
                other => panic!("{other:?}"),
            }
            let panic = runtime.spawn(|| -> u32 { panic!("oh {}", 3) });
            match panic.result() {
                Err(TaskError::Failed(Cause::Panic(message))) => assert_eq!(&*message, "oh 3"),
                other => panic!("{other:?}"),
            }
            // Both were received.
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_failure_travels_to_dependents_with_its_root() {
    within(20, || {
        let runtime = Runtime::new(2).unwrap();
        let ran = Arc::new(AtomicUsize::new(0));
        let first = runtime
            .task()
            .name("first")
            .try_spawn(0, || Err::<u32, _>(Broken(1)))
            .unwrap();
        let mut last = first.clone();
        for _ in 0..10 {
            let ran = Arc::clone(&ran);
            last = runtime
                .task()
                .after(&last)
                .spawn(move || {
                    ran.fetch_add(1, Ordering::Relaxed);
                    0
                })
                .unwrap();
        }
        let (name, error) = root(&last);
        assert_eq!(name, "first");
        assert!(matches!(error, TaskError::Failed(Cause::Error(_))));
        assert_eq!(ran.load(Ordering::Relaxed), 0);
        // Who received the failure of a dependent received the root's.
        runtime.close().unwrap();
    });
}

#[test]
fn each_root_that_nobody_received_is_given_once_at_the_end() {
    within(20, || {
        let runtime = Runtime::new(2).unwrap();
        let told = runtime
            .task()
            .name("told")
            .try_spawn(0, || Err::<(), _>(Broken(0)))
            .unwrap();
        assert!(told.result().is_err());
        for i in 1..=200 {
            let failed = runtime
                .task()
                .name(format!("root {i}"))
                .try_spawn(0, move || Err::<(), _>(Broken(i)))
                .unwrap();
            drop(runtime.task().after(&failed).spawn(|| ()).unwrap());
        }
        let cancelled = runtime
            .task()
            .after(&TaskSpace::<(), 1>::new("T").at([0]))
            .spawn(|| ())
            .unwrap();
        assert!(cancelled.cancel());
        let failures = runtime.close().unwrap_err().0;
        let mut names: Vec<_> = failures.into_iter().map(|(name, _)| name).collect();
        names.retain(|name| name != "T[0]");
        names.sort();
        let mut expected: Vec<_> = (1..=200).map(|i| format!("root {i}")).collect();
        expected.sort();
        assert_eq!(names, expected);
    });
}

#[test]
fn a_skipped_task_does_not_outrun_a_predecessor_that_runs() {
    within(20, || {
        let runtime = Runtime::new(2).unwrap();
        let held = Held::new(&runtime);
        let failed = runtime
            .task()
            .try_spawn(0, || Err::<(), _>(Broken(1)))
            .unwrap();
        let dependent = runtime
            .task()
            .after(&failed)
            .after(&held.task)
            .spawn(|| ())
            .unwrap();
        assert!(failed.result().is_err());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!dependent.is_done());
        held.release();
        assert!(matches!(dependent.result(), Err(TaskError::Dependency(..))));
        runtime.close().unwrap();
    });
}

#[test]
fn a_dependent_of_a_failed_task_fails_at_its_spawn() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let failed = runtime
            .task()
            .name("failed")
            .try_spawn(0, || Err::<(), _>(Broken(1)))
            .unwrap();
        assert!(failed.result().is_err());
        let dependent = runtime.task().after(&failed).spawn(|| ()).unwrap();
        assert!(dependent.is_done());
        assert_eq!(root(&dependent).0, "failed");
        runtime.close().unwrap();
    });
}

#[test]
fn callbacks_are_called_once_whatever_the_outcome() {
    within(20, || {
        let runtime = Runtime::new(2).unwrap();
        let called = Arc::new(AtomicUsize::new(0));
        let count = |called: &Arc<AtomicUsize>| {
            let called = Arc::clone(called);
            move || {
                called.fetch_add(1, Ordering::Relaxed);
            }
        };
        let held = Held::new(&runtime);
        let value = runtime.task().after(&held.task).spawn(|| 1).unwrap();
        let failing = runtime
            .task()
            .after(&held.task)
            .try_spawn(0, || Err::<(), _>(Broken(1)))
            .unwrap();
        let skipped = runtime.task().after(&failing).spawn(|| ()).unwrap();
        let cancelled = runtime.task().after(&held.task).spawn(|| ()).unwrap();
        value.on_done(|| panic!("a callback that panics harms nobody"));
        value.on_done(count(&called));
        failing.on_done(count(&called));
        skipped.on_done(count(&called));
        cancelled.on_done(count(&called));
        assert!(cancelled.cancel());
        assert_eq!(called.load(Ordering::Relaxed), 1);
        held.release();
        assert!(skipped.result().is_err());
        value.result().unwrap();
        while called.load(Ordering::Relaxed) != 4 {
            std::thread::yield_now();
        }
        value.on_done(count(&called));
        assert_eq!(called.load(Ordering::Relaxed), 5);
        runtime.close().unwrap();
        assert_eq!(called.load(Ordering::Relaxed), 5);
    });
}

#[test]
fn a_pending_task_is_cancelled_at_once() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let held = Held::new(&runtime);
        let ready = runtime.spawn(|| ());
        let waiting = runtime.task().after(&ready).name("w").spawn(|| ()).unwrap();
        let dependent = runtime.task().after(&waiting).spawn(|| ()).unwrap();
        assert!(waiting.cancel());
        assert!(waiting.cancel(), "and stays cancelled");
        assert!(matches!(waiting.result(), Err(TaskError::Cancelled)));
        let (name, error) = root(&dependent);
        assert_eq!(name, "w");
        assert!(matches!(error, TaskError::Cancelled));
        assert!(ready.cancel());
        held.release();
        runtime.close().unwrap();
        assert!(!held.task.cancel(), "a done task is not cancelled");
    });
}

#[test]
fn an_unspawned_task_is_cancelled_and_not_spawned_any_more() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let space = TaskSpace::<(), 1>::new("T");
        let dependent = runtime.task().after(&space.at([0])).spawn(|| ()).unwrap();
        assert!(space.at([0]).cancel());
        assert!(matches!(root(&dependent).1, TaskError::Cancelled));
        assert!(runtime.task().spawn_at(&space.at([0]), || ()).is_err());
        runtime.close().unwrap();
    });
}

#[test]
fn a_running_body_is_asked_and_its_outcome_is_its_own() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let running = Arc::new(Barrier::new(2));
        let task = runtime.spawn({
            let running = Arc::clone(&running);
            move || {
                running.wait();
                while !current().unwrap().cancel_requested() {
                    std::thread::yield_now();
                }
                "heard"
            }
        });
        running.wait();
        assert!(!task.cancel());
        assert_eq!(*task.result().unwrap(), "heard");
        assert!(!task.cancel());
        runtime.close().unwrap();
    });
}

#[test]
fn a_body_may_cancel_its_own_task() {
    within(20, || {
        for workers in [0, 1] {
            let runtime = Runtime::new(workers).unwrap();
            let space = TaskSpace::<bool, 1>::new("T");
            let me = space.at([0]);
            runtime
                .task()
                .spawn_at(&space.at([0]), move || me.cancel())
                .unwrap();
            assert!(!*space.at([0]).result().unwrap());
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_suspended_future_is_cancelled() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let polled = Arc::new(Barrier::new(2));
        let task = runtime.spawn_future({
            let polled = Arc::clone(&polled);
            let mut first = true;
            std::future::poll_fn(move |_| {
                if std::mem::take(&mut first) {
                    polled.wait();
                }
                std::task::Poll::<()>::Pending
            })
        });
        polled.wait();
        assert!(!task.cancel());
        assert!(matches!(task.result(), Err(TaskError::Cancelled)));
        runtime.close().unwrap();
    });
}

/// Cancelling races with running: whoever wins, there is one outcome and it is the one that was
/// promised.
#[test]
fn cancelling_races_with_running() {
    within(60, || {
        let runtime = Runtime::new(2).unwrap();
        for _ in 0..3000 {
            let ran = Arc::new(AtomicBool::new(false));
            let calls = Arc::new(AtomicUsize::new(0));
            let task = runtime.spawn({
                let ran = Arc::clone(&ran);
                move || ran.store(true, Ordering::Relaxed)
            });
            task.on_done({
                let calls = Arc::clone(&calls);
                move || {
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            });
            let dependent = runtime.task().after(&task).spawn(|| ()).unwrap();
            let cancelled = task.cancel();
            assert_eq!(task.result().is_err(), cancelled);
            assert_eq!(dependent.result().is_err(), cancelled);
            assert_ne!(ran.load(Ordering::Relaxed), cancelled);
            while calls.load(Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
            assert_eq!(calls.load(Ordering::Relaxed), 1);
        }
        runtime.close().unwrap();
    });
}

/// A cancel that meets a spawner is not lost: the task is cancelled, or its body was asked.
#[test]
fn cancelling_races_with_a_named_spawn() {
    within(60, || {
        let runtime = Runtime::new(1).unwrap();
        for _ in 0..3000 {
            let space = TaskSpace::<bool, 1>::new("T");
            let gate = runtime.spawn(|| ());
            let task = space.at([0]);
            let barrier = Barrier::new(2);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    barrier.wait();
                    task.cancel();
                });
                barrier.wait();
                // Refused if the handle was cancelled before.
                let _ = runtime.task().after(&gate).spawn_at(&task, || {
                    let start = Instant::now();
                    while start.elapsed() < Duration::from_secs(5) {
                        if current().unwrap().cancel_requested() {
                            return true;
                        }
                        std::thread::yield_now();
                    }
                    false
                });
            });
            assert!(matches!(
                task.result(),
                Err(TaskError::Cancelled) | Ok(true)
            ));
        }
        runtime.close().unwrap();
    });
}

#[test]
fn an_attempt_that_takes_too_long_is_asked_and_fails() {
    within(20, || {
        for workers in [0, 1] {
            let runtime = Runtime::new(workers).unwrap();
            let limit = Duration::from_millis(30);
            let start = Instant::now();
            let task = runtime
                .task()
                .timeout(limit)
                .spawn(|| {
                    while !current().unwrap().cancel_requested() {
                        std::thread::yield_now();
                    }
                })
                .unwrap();
            match task.result() {
                Err(TaskError::TimedOut(told)) => assert_eq!(told, limit),
                other => panic!("{other:?}"),
            }
            assert!(start.elapsed() >= limit);
            // In time: the limit of a task that is done means nothing.
            let task = runtime.task().timeout(limit).spawn(|| 5).unwrap();
            assert_eq!(*task.result().unwrap(), 5);
            std::thread::sleep(2 * limit);
            assert_eq!(*task.result().unwrap(), 5);
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_suspended_body_hears_of_its_time_limit() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let task = runtime
            .task()
            .timeout(Duration::from_millis(20))
            .spawn_future(std::future::pending::<()>())
            .unwrap();
        assert!(matches!(task.result(), Err(TaskError::TimedOut(_))));
        runtime.close().unwrap();
    });
}

#[test]
fn a_failed_attempt_is_repeated_as_often_as_said() {
    within(20, || {
        for (workers, retries) in [(0, 0), (1, 0), (1, 3), (2, 5)] {
            let runtime = Runtime::new(workers).unwrap();
            let attempts = Arc::new(AtomicUsize::new(0));
            let attempt = |success_at: usize| {
                let attempts = Arc::clone(&attempts);
                move || {
                    let now = attempts.fetch_add(1, Ordering::Relaxed) + 1;
                    if now == success_at {
                        Ok(now)
                    } else {
                        Err(Broken(now))
                    }
                }
            };
            let all = usize::try_from(retries).unwrap() + 1;
            let never = runtime
                .task()
                .try_spawn(retries, attempt(usize::MAX))
                .unwrap();
            match never.result() {
                Err(TaskError::Failed(Cause::Error(error))) => {
                    assert_eq!(error.to_string(), format!("broken {all}"));
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(attempts.swap(0, Ordering::Relaxed), all);
            let last = runtime.task().try_spawn(retries, attempt(all)).unwrap();
            assert_eq!(*last.result().unwrap(), all);
            assert_eq!(attempts.load(Ordering::Relaxed), all);
            runtime.close().unwrap();
        }
    });
}

#[test]
fn each_attempt_has_the_whole_time_limit() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let attempts = Arc::new(AtomicUsize::new(0));
        let task = runtime
            .task()
            .timeout(Duration::from_millis(20))
            .try_spawn(2, {
                let attempts = Arc::clone(&attempts);
                move || {
                    if attempts.fetch_add(1, Ordering::Relaxed) == 2 {
                        return Ok::<_, Broken>("third");
                    }
                    while !current().unwrap().cancel_requested() {
                        std::thread::yield_now();
                    }
                    Ok("too late")
                }
            })
            .unwrap();
        assert_eq!(*task.result().unwrap(), "third");
        assert_eq!(attempts.load(Ordering::Relaxed), 3);
        runtime.close().unwrap();
    });
}

/// Attempts end at about the moment when their time is over. Whatever wins, the outcome is a value
/// or the time limit: nobody cancelled anything.
#[test]
fn a_time_limit_races_with_the_end_of_its_attempt() {
    within(60, || {
        let runtime = Runtime::new(2).unwrap();
        let limit = Duration::from_micros(200);
        let tasks: Vec<_> = (0..1500)
            .map(|_| {
                runtime
                    .task()
                    .timeout(limit)
                    .try_spawn(3, move || {
                        let start = Instant::now();
                        while start.elapsed() < limit {
                            std::hint::spin_loop();
                        }
                        Ok::<_, Broken>(())
                    })
                    .unwrap()
            })
            .collect();
        for task in &tasks {
            assert!(matches!(
                task.result(),
                Ok(()) | Err(TaskError::TimedOut(_))
            ));
        }
        runtime.close().unwrap();
    });
}

#[test]
fn a_cancelled_task_is_not_repeated() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let running = Arc::new(Barrier::new(2));
        let attempts = Arc::new(AtomicUsize::new(0));
        for timeout in [Duration::from_secs(60), Duration::from_millis(50)] {
            attempts.store(0, Ordering::Relaxed);
            let task = runtime
                .task()
                .timeout(timeout)
                .try_spawn(9, {
                    let (running, attempts) = (Arc::clone(&running), Arc::clone(&attempts));
                    move || {
                        attempts.fetch_add(1, Ordering::Relaxed);
                        running.wait();
                        running.wait();
                        Err::<(), _>(Broken(1))
                    }
                })
                .unwrap();
            running.wait();
            assert!(!task.cancel());
            if timeout < Duration::from_secs(1) {
                // The clock's request comes on top of the user's and does not stand for it.
                std::thread::sleep(2 * timeout);
            }
            running.wait();
            assert!(task.result().is_err());
            assert_eq!(attempts.load(Ordering::Relaxed), 1);
        }
        runtime.close().unwrap();
    });
}

#[test]
fn a_failure_at_the_root_of_a_long_chain_needs_no_stack() {
    within(60, || {
        let runtime = Runtime::new(1).unwrap();
        let held = Held::new(&runtime);
        let mut last = runtime
            .task()
            .after(&held.task)
            .try_spawn(0, || Err::<(), _>(Broken(1)))
            .unwrap();
        for _ in 0..100_000 {
            last = runtime.task().after(&last).spawn(|| ()).unwrap();
        }
        held.release();
        assert!(matches!(root(&last).1, TaskError::Failed(_)));
        runtime.close().unwrap();
    });
}
