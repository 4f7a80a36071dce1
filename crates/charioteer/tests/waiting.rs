//! Waits of bodies: nested, inline, with limits, in cycles; spare threads; futures.
#![cfg(not(loom))]

mod common;

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use charioteer::native::{Runtime, Spawn, Task, TaskError, TaskSpace, WaitError, wait_all};
use common::within;

fn fib(spawn: &Spawn, n: u32) -> u64 {
    if n < 2 {
        return u64::from(n);
    }
    let child = |n| {
        let inner = spawn.clone();
        spawn.spawn(move || fib(&inner, n))
    };
    let (a, b) = (child(n - 1), child(n - 2));
    a.result().unwrap() + b.result().unwrap()
}

#[test]
fn a_blocking_fibonacci_needs_few_threads() {
    within(120, || {
        for workers in [1, 2, 0] {
            let runtime = Runtime::new(workers).unwrap();
            let spawn = runtime.handle();
            let task = runtime.spawn(move || fib(&spawn, 20));
            assert_eq!(*task.result().unwrap(), 6765);
            assert!(runtime.counts().threads <= 64);
            if workers == 1 {
                assert_eq!(runtime.counts().threads, 1, "all of it fits one stack");
            }
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_waiting_body_gives_its_core_to_others() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let spawn = runtime.handle();
        let space = Arc::new(TaskSpace::<u32, 1>::new("T"));
        let task = runtime.spawn({
            let space = Arc::clone(&space);
            move || {
                // It cannot run here: it is not spawned yet. Somebody else spawns it, on the core
                // that this wait frees.
                let wanted = space.at([0]);
                spawn.spawn_detached({
                    let (spawn, space) = (spawn.clone(), Arc::clone(&space));
                    move || spawn.task().spawn_at(&space.at([0]), || 5).unwrap()
                });
                *wanted.result().unwrap()
            }
        });
        assert_eq!(*task.result().unwrap(), 5);
        assert_eq!(runtime.counts().threads, 2);
        runtime.close().unwrap();
    });
}

#[test]
fn a_wait_with_a_limit_keeps_it() {
    within(20, || {
        // Two: the child keeps a core until the parent has gone on.
        for workers in [2, 3] {
            let runtime = Runtime::new(workers).unwrap();
            let spawn = runtime.handle();
            let go = Arc::new(AtomicBool::new(false));
            let task = runtime.spawn({
                let go = Arc::clone(&go);
                move || {
                    let child = spawn.spawn({
                        let go = Arc::clone(&go);
                        move || {
                            while !go.load(Ordering::Acquire) {
                                std::thread::yield_now();
                            }
                        }
                    });
                    // Ready, but run on this stack it would take longer than the limit.
                    let done = child.wait(Some(Duration::from_millis(20))).unwrap();
                    go.store(true, Ordering::Release);
                    child.result().unwrap();
                    done
                }
            });
            assert!(!*task.result().unwrap());
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_wait_outside_of_tasks_may_have_a_limit() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let space = TaskSpace::<u32, 1>::new("T");
        let task = space.at([0]);
        let start = Instant::now();
        assert!(!task.wait(Some(Duration::from_millis(20))).unwrap());
        assert!(start.elapsed() >= Duration::from_millis(20));
        assert!(!wait_all([&task], Some(Duration::ZERO)).unwrap());
        runtime.task().spawn_at(&task, || 1).unwrap();
        assert!(task.wait(None).unwrap());
        assert!(task.wait(Some(Duration::ZERO)).unwrap());
        runtime.close().unwrap();
    });
}

fn cycle<T: std::fmt::Debug>(result: Result<T, TaskError>) -> Vec<String> {
    match result {
        Err(TaskError::Wait(WaitError::Cycle(names))) => {
            assert_eq!(names.first(), names.last());
            names
        }
        other => panic!("expected a cycle, got {other:?}"),
    }
}

#[test]
fn a_body_cannot_wait_for_itself() {
    within(20, || {
        for workers in [0, 1, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let space = TaskSpace::<Vec<String>, 1>::new("T");
            let me = space.at([0]);
            runtime
                .task()
                .spawn_at(&space.at([0]), move || cycle(me.result()))
                .unwrap();
            assert_eq!(space.at([0]).result().unwrap().len(), 2);
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_body_cannot_wait_for_what_depends_on_it() {
    within(20, || {
        for workers in [0, 1, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let space = TaskSpace::<Vec<String>, 1>::new("T");
            for i in 1..5 {
                runtime
                    .task()
                    .after(&space.at([i - 1]))
                    .spawn_at(&space.at([i]), Vec::new)
                    .unwrap();
            }
            let last = space.at([4]);
            runtime
                .task()
                .spawn_at(&space.at([0]), move || cycle(last.result()))
                .unwrap();
            assert_eq!(space.at([0]).result().unwrap().len(), 6);
            assert!(space.at([4]).result().is_ok());
            runtime.close().unwrap();
        }
    });
}

/// The child runs on the stack of its parent, which waits for it: that wait has no latch of its own.
#[test]
fn a_child_cannot_wait_for_the_parent_that_waits_for_it() {
    within(20, || {
        for workers in [0, 1, 2] {
            for deep in [1, 2, 5] {
                let runtime = Runtime::new(workers).unwrap();
                let space = TaskSpace::<Vec<String>, 1>::new("T");
                // Where another worker took a child, the wait that closes the cycle may be any of
                // them; then the others end.
                fn told(task: &Task<Vec<String>>) -> Vec<String> {
                    task.result()
                        .map_or_else(|error| cycle::<()>(Err(error)), Clone::clone)
                }
                fn descend(spawn: Spawn, top: Task<Vec<String>>, left: u32) -> Vec<String> {
                    if left == 0 {
                        return told(&top);
                    }
                    let inner = spawn.clone();
                    told(&spawn.spawn(move || descend(inner, top, left - 1)))
                }
                let (spawn, top) = (runtime.handle(), space.at([0]));
                runtime
                    .task()
                    .spawn_at(&space.at([0]), move || descend(spawn, top, deep))
                    .unwrap();
                let names = space.at([0]).result().unwrap().clone();
                assert_eq!(names.len(), deep as usize + 2, "{names:?}");
                runtime.close().unwrap();
            }
        }
    });
}

#[test]
fn of_two_bodies_that_wait_for_each_other_one_is_told() {
    within(60, || {
        let runtime = Runtime::new(2).unwrap();
        for _ in 0..500 {
            let space = Arc::new(TaskSpace::<bool, 1>::new("T"));
            let barrier = Arc::new(Barrier::new(2));
            for me in 0..2_i64 {
                let (other, barrier) = (space.at([1 - me]), Arc::clone(&barrier));
                runtime
                    .task()
                    .spawn_at(&space.at([me]), move || {
                        barrier.wait();
                        match other.result() {
                            Ok(_) => false,
                            Err(error) => !cycle::<()>(Err(error)).is_empty(),
                        }
                    })
                    .unwrap();
            }
            let told = [0, 1].map(|i| *space.at([i]).result().unwrap());
            assert!(told[0] || told[1]);
        }
        runtime.close().unwrap();
    });
}

/// A wait, a spawn that depends on the waiting task, and the spawn that closes the cycle, all at the
/// same time: nobody waits for ever.
#[test]
fn a_cycle_through_a_wait_and_two_spawns_is_found_by_one_of_them() {
    within(120, || {
        let runtime = Runtime::new(3).unwrap();
        for round in 0..1500 {
            let space = Arc::new(TaskSpace::<(), 1>::new("T"));
            let barrier = Arc::new(Barrier::new(3));
            // W waits for T[1]; T[0] depends on W; T[1] depends on T[0].
            let waiter = Arc::new(TaskSpace::<bool, 1>::new("W"));
            runtime
                .task()
                .spawn_at(&waiter.at([0]), {
                    let (barrier, wanted) = (Arc::clone(&barrier), space.at([1]));
                    move || {
                        barrier.wait();
                        wanted.result().is_ok()
                    }
                })
                .unwrap();
            let refused = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    barrier.wait();
                    let task = runtime.task().after(&waiter.at([0]));
                    if task.spawn_at(&space.at([0]), || ()).is_err() {
                        refused.fetch_add(1, Ordering::Relaxed);
                        runtime.task().spawn_at(&space.at([0]), || ()).unwrap();
                    }
                });
                scope.spawn(|| {
                    barrier.wait();
                    let task = runtime.task().after(&space.at([0]));
                    if task.spawn_at(&space.at([1]), || ()).is_err() {
                        refused.fetch_add(1, Ordering::Relaxed);
                        runtime.task().spawn_at(&space.at([1]), || ()).unwrap();
                    }
                });
            });
            let waited = *waiter.at([0]).result().unwrap();
            let refused = refused.into_inner();
            assert!(waited == (refused != 0), "round {round}: {refused} refused");
            space.at([1]).result().unwrap();
        }
        runtime.close().unwrap();
    });
}

#[test]
fn beyond_the_limit_of_threads_a_wait_is_refused_with_its_names() {
    within(60, || {
        let runtime = Runtime::new(1).unwrap();
        fn descend(spawn: Spawn, level: u32) -> u32 {
            let inner = spawn.clone();
            let child = spawn
                .task()
                .name(format!("level {level}"))
                .spawn(move || descend(inner, level + 1))
                .unwrap();
            // A limit keeps the child off this stack, so each level holds a thread.
            match child.wait(Some(Duration::from_secs(50))) {
                Ok(true) => *child.result().unwrap(),
                Ok(false) => panic!("too slow"),
                Err(WaitError::Threads(names)) => {
                    assert_eq!(names.len(), 2);
                    assert_eq!(names[1], format!("level {level}"));
                    assert!(child.cancel());
                    level
                }
                Err(other) => panic!("{other}"),
            }
        }
        let spawn = runtime.handle();
        let task = runtime.spawn(move || descend(spawn, 0));
        assert_eq!(*task.result().unwrap(), 62);
        assert_eq!(runtime.counts().threads, 63);
        runtime.close().unwrap();
    });
}

/// A chain of bodies each of which waits for the one before, all at once.
#[test]
fn waits_on_many_stacks_all_end() {
    within(60, || {
        for workers in [1, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let space = Arc::new(TaskSpace::<u64, 1>::new("T"));
            for i in (1..40).rev() {
                let before = space.at([i - 1]);
                runtime
                    .task()
                    .spawn_at(&space.at([i]), move || before.result().unwrap() + 1)
                    .unwrap();
            }
            runtime.task().spawn_at(&space.at([0]), || 0).unwrap();
            assert_eq!(*space.at([39]).result().unwrap(), 39);
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_callback_may_wait() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let spawn = runtime.handle();
        let seen = Arc::new(OnceLock::new());
        let gate = Arc::new(Barrier::new(2));
        let task = runtime.spawn({
            let gate = Arc::clone(&gate);
            move || {
                gate.wait();
            }
        });
        task.on_done({
            let seen = Arc::clone(&seen);
            move || {
                // On the only worker, after the body: what it waits for runs elsewhere.
                let child = spawn.spawn(|| 7);
                let done = child.wait(Some(Duration::from_secs(10))).unwrap();
                seen.set(done.then(|| *child.result().unwrap())).unwrap();
            }
        });
        gate.wait();
        runtime.close().unwrap();
        assert_eq!(seen.get(), Some(&Some(7)));
    });
}

#[test]
fn futures_await_tasks() {
    within(20, || {
        for workers in [0, 1, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let spawn = runtime.handle();
            let stages: Vec<_> = (0..50_u64)
                .map(|i| {
                    let spawn = spawn.clone();
                    runtime.spawn_future(async move {
                        let a = spawn.spawn(move || i).await.unwrap();
                        let b = spawn.spawn_future(async move { i * i });
                        a.result().unwrap() + b.await.unwrap().result().unwrap()
                    })
                })
                .collect();
            for (i, stage) in (0..50).zip(&stages) {
                assert_eq!(*stage.result().unwrap(), i + i * i);
            }
            runtime.close().unwrap();
        }
    });
}

#[test]
fn futures_that_await_each_other_are_told() {
    within(60, || {
        for workers in [0, 1, 2] {
            let runtime = Runtime::new(workers).unwrap();
            for _ in 0..50 {
                let spaces: Vec<_> = (0..3).map(|_| OnceLock::<Task<bool>>::new()).collect();
                let tasks: Arc<Vec<OnceLock<Task<bool>>>> = Arc::new(spaces);
                let open = TaskSpace::<(), 1>::new("gate");
                for i in 0..3 {
                    let (inner, gate) = (Arc::clone(&tasks), open.at([0]));
                    let task = runtime.spawn_future(async move {
                        gate.await.unwrap();
                        let next = inner[(i + 1) % 3].get().unwrap().clone();
                        match next.await {
                            Ok(_) => false,
                            Err(error) => !cycle::<()>(Err(error)).is_empty(),
                        }
                    });
                    tasks[i].set(task).unwrap();
                }
                runtime.task().spawn_at(&open.at([0]), || ()).unwrap();
                let told = (0..3)
                    .filter(|&i| *tasks[i].get().unwrap().result().unwrap())
                    .count();
                assert_eq!(told, 1);
            }
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_future_may_await_tasks_and_others_at_once() {
    within(60, || {
        for workers in [1, 2] {
            let runtime = Runtime::new(workers).unwrap();
            for i in 0..300 {
                let space = TaskSpace::<u32, 1>::new("T");
                let (sender, receiver) = std::sync::mpsc::channel::<Waker>();
                let mut task: Pin<Box<_>> = Box::pin(space.at([0]).into_future());
                let mut ticks = Ticks { left: 1, sender };
                let both = runtime.spawn_future(async move {
                    let (mut a, mut b) = (None, None);
                    std::future::poll_fn(|cx| {
                        if a.is_none()
                            && let Poll::Ready(task) = task.as_mut().poll(cx)
                        {
                            a = Some(*task.unwrap().result().unwrap());
                        }
                        if b.is_none()
                            && let Poll::Ready(ticks) = Pin::new(&mut ticks).poll(cx)
                        {
                            b = Some(ticks);
                        }
                        match (a, b) {
                            (Some(a), Some(b)) => Poll::Ready(a + b),
                            _ => Poll::Pending,
                        }
                    })
                    .await
                });
                let wake = || receiver.recv().unwrap().wake();
                let spawn = || runtime.task().spawn_at(&space.at([0]), || 1).unwrap();
                if i % 2 == 0 {
                    wake();
                    spawn();
                } else {
                    spawn();
                    wake();
                }
                assert_eq!(*both.result().unwrap(), 10);
            }
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_future_sees_the_failure_of_what_it_awaits() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let failing = runtime
            .task()
            .name("failing")
            .spawn(|| -> u32 { panic!("no") });
        let failing = failing.unwrap();
        let task = runtime.spawn_future(async move { failing.await.err().map(|e| e.to_string()) });
        assert_eq!(
            task.result().unwrap().as_deref(),
            Some("the task failed: panic: no")
        );
        runtime.close().unwrap();
    });
}

/// A future that another thread wakes, often before it has gone to sleep.
struct Ticks {
    left: u32,
    sender: std::sync::mpsc::Sender<Waker>,
}

impl Future for Ticks {
    type Output = u32;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<u32> {
        if self.left == 0 {
            return Poll::Ready(9);
        }
        self.left -= 1;
        self.sender.send(cx.waker().clone()).unwrap();
        Poll::Pending
    }
}

#[test]
fn a_wake_up_from_outside_is_never_lost() {
    within(60, || {
        for workers in [0, 1, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let (sender, receiver) = std::sync::mpsc::channel::<Waker>();
            let waking = std::thread::spawn(move || {
                for waker in receiver {
                    waker.wake_by_ref();
                    waker.wake();
                }
            });
            let tasks: Vec<_> = (0..20)
                .map(|_| {
                    runtime.spawn_future(Ticks {
                        left: 500,
                        sender: sender.clone(),
                    })
                })
                .collect();
            drop(sender);
            for task in &tasks {
                assert_eq!(*task.result().unwrap(), 9);
            }
            drop(tasks);
            runtime.close().unwrap();
            waking.join().unwrap();
        }
    });
}

#[test]
fn bodies_that_wait_run_what_they_wait_for_and_nothing_else() {
    within(20, || {
        let runtime = Runtime::new(1).unwrap();
        let spawn = runtime.handle();
        let log = Arc::new(Mutex::new(Vec::new()));
        let task = runtime.spawn({
            let log = Arc::clone(&log);
            move || {
                let say = |what: &'static str| {
                    let log = Arc::clone(&log);
                    move || log.lock().unwrap().push(what)
                };
                spawn.spawn_detached(say("other"));
                spawn.spawn(say("awaited")).result().unwrap();
                log.lock().unwrap().push("parent");
            }
        });
        task.result().unwrap();
        runtime.close().unwrap();
        assert_eq!(*log.lock().unwrap(), ["awaited", "parent", "other"]);
    });
}
