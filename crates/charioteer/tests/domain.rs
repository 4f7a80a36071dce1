//! What a binding to an interpreter counts on: how bodies that suspend, sleep or go elsewhere are
//! resumed, and who hears of failures. The bodies here do as their script says.
#![cfg(not(loom))]

mod common;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use charioteer::data::{Access, Datum, Group, Mode, Part};
use charioteer::engine::{Config, Counts, Engine, Handle, Registry, Running, WaitError};
use charioteer::gang::{Alternative, Member, WHOLE};
use charioteer::machine::{Description, Kind, Machine, Time};
use charioteer::mapping::policy::{Call, Mapper};
use charioteer::mapping::{Choice, Choices, Mapping, On};
use charioteer::region::{Region, Span};
use charioteer::task::{
    Domain, Failure, Need, Options, Outcome, Phase, Step, Task, TaskRef, Trouble, Until,
};
use common::within;

static ENGINES: Registry<Scripted> = Registry::new();

#[derive(Default)]
struct Scripted {
    /// How many threads the system gives; no limit if zero.
    threads: usize,
    started: AtomicUsize,
    unread: Option<Arc<Mutex<Vec<u32>>>>,
    warnings: Arc<AtomicUsize>,
    asked: Arc<AtomicUsize>,
    patience: Option<Duration>,
    interrupt: Arc<AtomicBool>,
    /// What maps calls, of an engine that asks the user.
    policy: Option<Arc<UserPolicy>>,
    /// How many calls it was asked for at once, at most.
    batch: Arc<AtomicUsize>,
    /// Of reductions that are not combined, by their numbers.
    partials: Arc<Mutex<HashMap<u64, u32>>>,
    /// What they are combined into: by operation 1 the sum, by others the product.
    total: Arc<AtomicU32>,
}

type UserPolicy = dyn Fn(&Call) -> Result<usize, u32> + Send + Sync;

struct Label(u32);

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

type Body = Box<dyn FnMut(&Running<'_, Scripted>) -> Step<Scripted> + Send>;
type Callback = Box<dyn FnOnce() + Send>;

impl Domain for Scripted {
    type Body = Body;
    type Value = u32;
    type Error = u32;
    type Callback = Callback;
    type Label = Label;

    fn engines() -> &'static Registry<Self> {
        &ENGINES
    }

    fn nothing() -> u32 {
        0
    }

    fn loss() -> Label {
        Label(9001)
    }

    fn combine(&self, group: &Arc<Group<Self>>) -> (Label, Body) {
        let (partials, total) = (Arc::clone(&self.partials), Arc::clone(&self.total));
        let (id, operation) = (group.id(), group.operation());
        let body = move |running: &Running<'_, Self>| {
            assert_eq!(running.groups().len(), 1);
            let partial = partials.lock().unwrap().remove(&id);
            let partial = partial.expect("a member has begun it");
            let before = total.load(Ordering::SeqCst);
            let after = match operation {
                1 => before + partial,
                _ => before * partial,
            };
            total.store(after, Ordering::SeqCst);
            value(after)
        };
        (Label(9000), Box::new(body))
    }

    fn run(&self, running: &Running<'_, Self>, body: &mut Body) -> Step<Self> {
        body(running)
    }

    fn choose(&self, calls: &[Call]) -> Vec<Result<usize, u32>> {
        self.batch.fetch_max(calls.len(), Ordering::SeqCst);
        let policy = self.policy.iter();
        policy
            .flat_map(|policy| calls.iter().map(|call| policy(call)))
            .collect()
    }

    fn session(&self, run: &mut dyn FnMut()) {
        run();
    }

    fn blocking(&self, wait: &mut dyn FnMut()) {
        wait();
    }

    fn start_thread(&self, name: String, main: Box<dyn FnOnce() + Send>) -> std::io::Result<()> {
        let before = self.started.fetch_add(1, Ordering::SeqCst);
        if self.threads != 0 && before >= self.threads {
            return Err(std::io::Error::other("enough"));
        }
        std::thread::Builder::new().name(name).spawn(main)?;
        Ok(())
    }

    fn call_back(callback: Callback, _task: Option<&TaskRef<Self>>) {
        callback();
    }

    fn asked(&self, _task: &TaskRef<Self>) {
        self.asked.fetch_add(1, Ordering::SeqCst);
    }

    fn warn(&self, _message: &str) {
        self.warnings.fetch_add(1, Ordering::SeqCst);
    }

    fn report_unread(&self, task: &TaskRef<Self>) {
        let unread = self.unread.as_ref().expect("asked for");
        unread.lock().unwrap().push(task.label().0);
    }

    fn wants_unread(&self) -> bool {
        self.unread.is_some()
    }

    fn patience(&self) -> Option<Duration> {
        self.patience
    }

    fn interrupted(&self) -> bool {
        self.interrupt.load(Ordering::SeqCst)
    }
}

type Runtime = Arc<Engine<Scripted>>;

fn open(domain: Scripted, workers: usize) -> Runtime {
    let config = Config {
        workers,
        ..Config::default()
    };
    Engine::open(domain, config).unwrap()
}

fn spawn(
    runtime: &Runtime,
    label: u32,
    dependencies: &[TaskRef<Scripted>],
    body: impl FnMut(&Running<'_, Scripted>) -> Step<Scripted> + Send + 'static,
) -> TaskRef<Scripted> {
    runtime
        .spawn(Label(label), Box::new(body), None, dependencies, &[])
        .unwrap()
}

fn value(value: u32) -> Step<Scripted> {
    Step::Done(Ok(value))
}

fn unspawned(label: u32) -> TaskRef<Scripted> {
    Arc::new(Task::unspawned(Label(label)))
}

fn spawn_as(runtime: &Runtime, task: &TaskRef<Scripted>, result: u32) {
    runtime
        .spawn_as(task, Box::new(move |_| value(result)), None, &[], &[])
        .unwrap();
}

fn wait(runtime: &Runtime, task: &TaskRef<Scripted>) -> Result<u32, &'static str> {
    assert!(
        runtime
            .wait(std::slice::from_ref(task), Until::All, None)
            .unwrap()
    );
    match task.outcome().unwrap() {
        Outcome::Value(value) => Ok(*value),
        Outcome::Failed(Failure::Raised(_)) => Err("raised"),
        Outcome::Failed(Failure::Dependency(_)) => Err("dependency"),
        Outcome::Failed(Failure::Cancelled) => Err("cancelled"),
        Outcome::Failed(Failure::TimedOut(_)) => Err("timed out"),
        Outcome::Failed(Failure::Device(_)) => Err("device"),
        Outcome::Failed(Failure::Mapping(_)) => Err("mapping"),
        Outcome::Failed(Failure::Unspawned(_)) => Err("unspawned"),
    }
}

fn until(mut holds: impl FnMut() -> bool) {
    while !holds() {
        std::thread::yield_now();
    }
}

fn close(runtime: &Runtime) -> Vec<u32> {
    assert!(runtime.close_when_quiet(&mut || false));
    runtime.close().iter().map(|task| task.label().0).collect()
}

#[test]
fn an_awaiting_body_is_resumed_when_its_tasks_are_done() {
    within(20, || {
        for workers in [0, 1, 2] {
            let runtime = open(Scripted::default(), workers);
            let targets: Vec<_> = (0..3).map(unspawned).collect();
            let awaited = targets.clone();
            let mut runs = 0;
            let task = spawn(&runtime, 9, &[], move |_| {
                runs += 1;
                match runs {
                    1 => Step::Await(awaited.clone(), Until::All),
                    2 => {
                        assert!(awaited.iter().all(|task| task.is_done()));
                        value(runs)
                    }
                    _ => unreachable!(),
                }
            });
            until(|| task.phase() == Phase::Suspended);
            for target in &targets {
                spawn_as(&runtime, target, 0);
            }
            assert_eq!(wait(&runtime, &task), Ok(2));
            assert!(close(&runtime).is_empty());
        }
    });
}

#[test]
fn awaiting_nothing_or_what_is_done_goes_on_at_once() {
    within(20, || {
        let runtime = open(Scripted::default(), 1);
        let done = spawn(&runtime, 0, &[], |_| value(0));
        wait(&runtime, &done).unwrap();
        let mut runs = 0;
        let task = spawn(&runtime, 9, &[], move |_| {
            runs += 1;
            match runs {
                1 => Step::Await(Vec::new(), Until::All),
                2 => Step::Await(vec![Arc::clone(&done)], Until::All),
                3 => Step::Await(vec![Arc::clone(&done), unspawned(1)], Until::Any),
                _ => value(runs),
            }
        });
        assert_eq!(wait(&runtime, &task), Ok(4));
        close(&runtime);
    });
}

/// The request to cancel resumes the body, once. Then neither a second request nor the task of the
/// first wait, nor a wake-up, ends the next wait before its time.
#[test]
fn only_its_own_wait_or_the_first_request_resumes_a_body() {
    within(20, || {
        for workers in [1, 2] {
            let runtime = open(Scripted::default(), workers);
            let (first, second) = (unspawned(1), unspawned(2));
            let runs = Arc::new(AtomicUsize::new(0));
            let task = spawn(&runtime, 9, &[], {
                let (first, second) = (Arc::clone(&first), Arc::clone(&second));
                let runs = Arc::clone(&runs);
                move |running| match runs.fetch_add(1, Ordering::SeqCst) {
                    0 => Step::Await(vec![Arc::clone(&first)], Until::All),
                    1 => {
                        assert!(running.task.take_cancel_request());
                        assert!(!running.task.take_cancel_request());
                        assert!(!first.is_done());
                        Step::Await(vec![Arc::clone(&second)], Until::All)
                    }
                    2 => {
                        assert!(second.is_done(), "the second wait is over");
                        value(7)
                    }
                    _ => unreachable!(),
                }
            });
            let suspended = |times| {
                until(|| runs.load(Ordering::SeqCst) == times && task.phase() == Phase::Suspended);
            };
            suspended(1);
            assert!(!Engine::cancel(&task));
            suspended(2);
            assert!(!Engine::cancel(&task));
            Engine::awaken(&task);
            spawn_as(&runtime, &first, 0);
            wait(&runtime, &first).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(runs.load(Ordering::SeqCst), 2);
            assert_eq!(task.phase(), Phase::Suspended);
            spawn_as(&runtime, &second, 0);
            assert_eq!(wait(&runtime, &task), Ok(7));
            close(&runtime);
        }
    });
}

#[test]
fn a_wait_for_any_leaves_no_link_behind() {
    within(20, || {
        let runtime = open(Scripted::default(), 1);
        let slow = unspawned(1);
        let body = spawn(&runtime, 9, &[], {
            let slow = Arc::clone(&slow);
            let mut runs = 0;
            move |running| {
                runs += 1;
                if runs > 100 {
                    return value(0);
                }
                let quick = spawn(running.engine, 0, &[], |_| value(0));
                Step::Await(vec![Arc::clone(&slow), quick], Until::Any)
            }
        });
        assert_eq!(wait(&runtime, &body), Ok(0));
        // Each latch of a wait keeps its body: if one were left, so would be the body's task.
        let weak = Arc::downgrade(&body);
        drop(body);
        until(|| weak.strong_count() == 0);
        spawn_as(&runtime, &slow, 0);
        close(&runtime);
    });
}

#[test]
fn a_cycle_through_suspended_bodies_is_told_to_the_one_that_closes_it() {
    within(60, || {
        let runtime = open(Scripted::default(), 2);
        for _ in 0..200 {
            let tasks: Arc<Vec<_>> = Arc::new((0..3).map(unspawned).collect());
            for i in 0..3 {
                let all = Arc::clone(&tasks);
                let mut runs = 0;
                let body = move |running: &Running<'_, Scripted>| {
                    runs += 1;
                    if runs == 1 {
                        return Step::Await(vec![Arc::clone(&all[(i + 1) % 3])], Until::All);
                    }
                    let cycle = running.task.take_cycle();
                    if let Some(names) = &cycle {
                        assert_eq!(names.len(), 4);
                    } else {
                        assert!(all[(i + 1) % 3].is_done());
                    }
                    value(u32::from(cycle.is_some()))
                };
                runtime
                    .spawn_as(&tasks[i], Box::new(body), None, &[], &[])
                    .unwrap();
            }
            let told: u32 = tasks.iter().map(|task| wait(&runtime, task).unwrap()).sum();
            assert_eq!(told, 1);
        }
        close(&runtime);
    });
}

/// Sleeping bodies are woken from many threads at once and go to sleep again at once. The engine
/// does not lose count of them, or it would never close.
#[test]
fn sleepers_are_counted() {
    within(60, || {
        for workers in [1, 2] {
            let runtime = open(Scripted::default(), workers);
            let left = Arc::new(AtomicUsize::new(3000));
            let tasks: Vec<_> = (0..3)
                .map(|label| {
                    let left = Arc::clone(&left);
                    spawn(&runtime, label, &[], move |_| {
                        let all = left.load(Ordering::SeqCst);
                        if all == 0 {
                            return value(0);
                        }
                        left.store(all - 1, Ordering::SeqCst);
                        Step::Sleep
                    })
                })
                .collect();
            // One that waits in a body may run them inline.
            let waiter = spawn(&runtime, 7, &[], {
                let tasks = tasks.clone();
                move |running| {
                    running.engine.wait(&tasks, Until::All, None).unwrap();
                    value(0)
                }
            });
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        while !tasks.iter().all(|task| task.is_done()) {
                            for task in &tasks {
                                Engine::awaken(task);
                            }
                        }
                    });
                }
            });
            wait(&runtime, &waiter).unwrap();
            // What is never spawned is only told once nothing else can move: the counts are right.
            let dependent = spawn(&runtime, 8, &[unspawned(5)], |_| value(0));
            assert_eq!(close(&runtime), [5]);
            assert!(dependent.is_failed());
        }
    });
}

#[test]
fn a_body_may_end_elsewhere() {
    within(20, || {
        for workers in [0, 1] {
            end_elsewhere(workers);
        }
    });

    fn end_elsewhere(workers: usize) {
        let runtime = open(Scripted::default(), workers);
        let elsewhere = Arc::new(Mutex::new(None));
        let attempts = Arc::new(AtomicUsize::new(0));
        let options = Options {
            retries: 1,
            ..Options::DEFAULT
        };
        let body = {
            let (elsewhere, attempts) = (Arc::clone(&elsewhere), Arc::clone(&attempts));
            move |running: &Running<'_, Scripted>| {
                attempts.fetch_add(1, Ordering::SeqCst);
                running.engine.leave();
                *elsewhere.lock().unwrap() = Some(Arc::clone(running.task));
                Step::Elsewhere
            }
        };
        let task = runtime
            .spawn(Label(1), Box::new(body), Some(Box::new(options)), &[], &[])
            .unwrap();
        // Its worker is free meanwhile.
        until(|| elsewhere.lock().unwrap().is_some());
        let other = spawn(&runtime, 2, &[], |_| value(2));
        assert_eq!(wait(&runtime, &other), Ok(2));
        assert!(!task.is_done());
        let end = |result| {
            let task = elsewhere.lock().unwrap().take().unwrap();
            runtime.finish(&task, result);
        };
        end(Err(Trouble::Raised(1)));
        if workers == 0 {
            // The next spawn runs what was made ready.
            spawn(&runtime, 3, &[], |_| value(3));
        }
        until(|| elsewhere.lock().unwrap().is_some());
        assert!(!Engine::cancel(&task));
        assert_eq!(runtime.domain().asked.load(Ordering::SeqCst), 1);
        end(Ok(5));
        assert_eq!(wait(&runtime, &task), Ok(5));
        assert_eq!(attempts.load(Ordering::SeqCst), 2);
        close(&runtime);
    }
}

/// Without workers, who waits runs what is made ready elsewhere.
#[test]
fn without_workers_those_who_wait_run_what_others_make_ready() {
    within(20, || {
        for in_a_body in [false, true] {
            let runtime = open(Scripted::default(), 0);
            let gone = Arc::new(Mutex::new(None));
            let task = spawn(&runtime, 1, &[], {
                let gone = Arc::clone(&gone);
                move |running| {
                    running.engine.leave();
                    *gone.lock().unwrap() = Some(Arc::clone(running.task));
                    Step::Elsewhere
                }
            });
            let dependent = spawn(&runtime, 2, &[task], |_| value(2));
            let mut slept = false;
            let sleeper = spawn(&runtime, 3, &[], move |_| {
                if std::mem::replace(&mut slept, true) {
                    value(3)
                } else {
                    Step::Sleep
                }
            });
            let both = [Arc::clone(&dependent), Arc::clone(&sleeper)];
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(20));
                    let task = gone.lock().unwrap().take().unwrap();
                    runtime.finish(&task, Ok(1));
                    std::thread::sleep(Duration::from_millis(20));
                    Engine::awaken(&sleeper);
                });
                if in_a_body {
                    let waiter = spawn(&runtime, 4, &[], move |running| {
                        running.engine.wait(&both, Until::All, None).unwrap();
                        value(4)
                    });
                    assert_eq!(wait(&runtime, &waiter), Ok(4));
                } else {
                    runtime.wait(&both, Until::All, None).unwrap();
                }
            });
            assert_eq!(wait(&runtime, &dependent), Ok(2));
            close(&runtime);
        }
    });
}

#[test]
fn closing_waits_for_bodies_that_are_elsewhere() {
    within(20, || {
        let runtime = open(Scripted::default(), 1);
        let missing = unspawned(3);
        let gone = Arc::new(Mutex::new(None));
        let task = spawn(&runtime, 1, &[], {
            let gone = Arc::clone(&gone);
            move |running| {
                running.engine.leave();
                *gone.lock().unwrap() = Some(Arc::clone(running.task));
                Step::Elsewhere
            }
        });
        let dependent = spawn(&runtime, 2, &[Arc::clone(&missing)], |_| value(2));
        until(|| gone.lock().unwrap().is_some());
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| close(&runtime));
            std::thread::sleep(Duration::from_millis(120));
            assert!(!closing.is_finished());
            assert!(!missing.is_done(), "it may still be spawned");
            spawn_as(&runtime, &missing, 0);
            let task = gone.lock().unwrap().take().unwrap();
            runtime.finish(&task, Ok(1));
            assert!(closing.join().unwrap().is_empty());
        });
        assert!(!task.is_failed() && !dependent.is_failed());
    });
}

#[test]
fn a_failure_is_reported_when_its_last_handle_goes_unread() {
    within(60, || {
        for workers in [0, 1, 2] {
            let unread = Arc::new(Mutex::new(Vec::new()));
            let runtime = open(
                Scripted {
                    unread: Some(Arc::clone(&unread)),
                    ..Scripted::default()
                },
                workers,
            );
            let failing = |label| {
                let body: Body = Box::new(|_| Step::Done(Err(Trouble::Raised(1))));
                runtime
                    .spawn_handle(Label(label), body, None, &[], &[])
                    .unwrap()
            };
            // Held while it fails: reported when the last handle is dropped, and only then.
            for label in 0..200 {
                let handle = failing(label);
                let other = handle.clone();
                assert_eq!(wait(&runtime, handle.task()), Err("raised"));
                drop(handle);
                assert!(!unread.lock().unwrap().contains(&label));
                drop(other);
                // By this thread, or by the worker, if that is late.
                until(|| unread.lock().unwrap().contains(&label));
            }
            // Read: never reported.
            let read = failing(1000);
            wait(&runtime, read.task()).unwrap_err();
            Engine::tell(read.task());
            drop(read);
            // Dropped at any time: reported once.
            unread.lock().unwrap().clear();
            for label in 2000..4000 {
                drop(failing(label));
            }
            assert!(close(&runtime).is_empty(), "all went the other way");
            let reported = unread.lock().unwrap();
            let distinct: HashSet<_> = reported.iter().copied().collect();
            assert_eq!(distinct, (2000..4000).collect());
            assert_eq!(reported.len(), 2000);
        }
    });
}

#[test]
fn roots_are_given_at_the_end_unless_they_were_told() {
    within(20, || {
        let runtime = open(Scripted::default(), 1);
        let fail = |label, dependencies: &[_]| {
            spawn(&runtime, label, dependencies, |_| {
                Step::Done(Err(Trouble::Raised(1)))
            })
        };
        let (a, _b) = (fail(1, &[]), fail(2, &[]));
        let dependent = spawn(&runtime, 3, std::slice::from_ref(&a), |_| value(0));
        assert_eq!(wait(&runtime, &dependent), Err("dependency"));
        // Receiving the failure of a dependent is receiving the root's.
        Engine::tell(&dependent);
        assert_eq!(close(&runtime), [2]);
    });
}

/// The system gives one thread. A body that waits for what only another thread could run is told
/// so, and nothing is lost.
#[test]
fn a_thread_that_the_system_refuses_loses_no_task() {
    within(20, || {
        let warnings = Arc::new(AtomicUsize::new(0));
        let runtime = open(
            Scripted {
                threads: 1,
                warnings: Arc::clone(&warnings),
                ..Scripted::default()
            },
            1,
        );
        let task = spawn(&runtime, 1, &[], |running| {
            let child = spawn(running.engine, 2, &[], |_| value(2));
            let deadline = Instant::now() + Duration::from_secs(10);
            let refused = running.engine.wait(&[child], Until::All, Some(deadline));
            assert!(matches!(refused, Err(WaitError::Threads(_))));
            value(1)
        });
        assert_eq!(wait(&runtime, &task), Ok(1));
        assert!(warnings.load(Ordering::SeqCst) > 0);
        close(&runtime);
        let Counts {
            spawned, finished, ..
        } = runtime.counts();
        assert_eq!((spawned, finished), (2, 2));
    });
}

#[test]
fn an_engine_that_gets_no_thread_does_not_open() {
    within(20, || {
        let domain = Scripted {
            threads: 1,
            ..Scripted::default()
        };
        let config = Config {
            workers: 2,
            ..Config::default()
        };
        assert!(Engine::open(domain, config).is_err());
    });
}

#[test]
fn all_tasks_are_cancelled_at_once() {
    within(20, || {
        for workers in [1, 2] {
            let runtime = open(Scripted::default(), workers);
            let (running, go) = (Arc::new(Barrier::new(2)), Arc::new(AtomicBool::new(false)));
            let busy = spawn(&runtime, 0, &[], {
                let (running, go) = (Arc::clone(&running), Arc::clone(&go));
                move |me| {
                    running.wait();
                    until(|| go.load(Ordering::SeqCst));
                    assert!(me.engine.cancel_requested(me.task));
                    Step::Done(Err(Trouble::Cancelled))
                }
            });
            running.wait();
            let mut tasks = vec![busy];
            for label in 1..50 {
                let before = [Arc::clone(tasks.last().unwrap())];
                let dependencies = if label % 3 == 0 { &before[..] } else { &[] };
                tasks.push(spawn(&runtime, label, dependencies, |_| value(0)));
            }
            tasks.push(spawn(&runtime, 99, &[unspawned(98)], |_| value(0)));
            runtime.cancel_all();
            go.store(true, Ordering::SeqCst);
            assert!(close(&runtime).is_empty());
            // Two workers may have run some before.
            for task in &tasks {
                assert!(task.is_done());
            }
            if workers == 1 {
                assert!(tasks.iter().all(|task| task.is_failed()));
            }
        }
    });
}

#[test]
fn a_wait_outside_of_tasks_can_be_interrupted() {
    within(20, || {
        let interrupt = Arc::new(AtomicBool::new(false));
        for workers in [0, 1] {
            interrupt.store(false, Ordering::SeqCst);
            let runtime = open(
                Scripted {
                    patience: Some(Duration::from_millis(5)),
                    interrupt: Arc::clone(&interrupt),
                    ..Scripted::default()
                },
                workers,
            );
            let never = unspawned(1);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(30));
                    interrupt.store(true, Ordering::SeqCst);
                });
                let done = runtime.wait(std::slice::from_ref(&never), Until::All, None);
                assert!(!done.unwrap());
            });
            spawn_as(&runtime, &never, 1);
            assert_eq!(wait(&runtime, &never), Ok(1));
            close(&runtime);
        }
    });
}

#[test]
fn a_callback_of_many_is_called_once_or_taken_back() {
    within(20, || {
        let runtime = open(Scripted::default(), 1);
        for (kind, expected) in [(Until::All, 1), (Until::Any, 1), (Until::FirstFailure, 1)] {
            let tasks: Vec<_> = (0..4).map(unspawned).collect();
            let calls = Arc::new(AtomicUsize::new(0));
            let count = || {
                let calls = Arc::clone(&calls);
                Box::new(move || {
                    calls.fetch_add(1, Ordering::SeqCst);
                })
            };
            let latch = runtime.call_when(&tasks, kind, count());
            let forgotten = runtime.call_when(&tasks, kind, count());
            Engine::forget(&forgotten, &tasks);
            assert_eq!(calls.load(Ordering::SeqCst), 0);
            for task in &tasks {
                spawn_as(&runtime, task, 0);
            }
            until(|| latch.is_open() && calls.load(Ordering::SeqCst) == expected);
            for task in &tasks {
                wait(&runtime, task).unwrap();
            }
            assert_eq!(calls.load(Ordering::SeqCst), expected);
        }
        close(&runtime);
    });
}

#[test]
fn a_handle_counts_from_its_making() {
    within(20, || {
        let runtime = open(Scripted::default(), 1);
        let task = spawn(&runtime, 1, &[], |_| value(3));
        let handle = Handle::new(Arc::clone(&task));
        drop(handle.clone());
        assert_eq!(wait(&runtime, handle.task()), Ok(3));
        close(&runtime);
        assert_eq!(ENGINES.get(runtime.id()).map(|engine| engine.id()), None);
    });
}

// ---- the user's policy --------------------------------------------------------------------------

/// An engine with two devices whose calls a policy of the user maps, and choices: a device, a core.
fn open_with_policy(
    workers: usize,
    policy: impl Fn(&Call) -> Result<usize, u32> + Send + Sync + 'static,
) -> (Runtime, Arc<Choices>) {
    let description = Description::uniform(2, 2, 1 << 20, Time::Real).unwrap();
    let config = Config {
        workers,
        machine: Some(Machine::virtual_machine(description)),
        mapper: Mapper::User,
        ..Config::default()
    };
    let domain = Scripted {
        policy: Some(Arc::new(policy)),
        ..Scripted::default()
    };
    let runtime = Engine::open(domain, config).unwrap();
    let choice = |on| Choice {
        variant: 0,
        label: String::new(),
        on,
        cost: None,
    };
    let device = Alternative {
        members: [Member::Any(Kind::Gpu)].into(),
        share: WHOLE,
        memory: 0,
    };
    let list = vec![choice(On::Devices(device)), choice(On::Cores(Need::Core))];
    let choices = runtime.choices("f", list).unwrap();
    (runtime, choices)
}

/// A task that gives 10 times its choice, and the number of its device.
fn spawn_mapped(
    runtime: &Runtime,
    choices: &Arc<Choices>,
    dependencies: &[TaskRef<Scripted>],
) -> TaskRef<Scripted> {
    let options = Options::mapped(Mapping::new(Arc::clone(choices), 0));
    let body = |running: &Running<'_, Scripted>| {
        let device = running
            .engine
            .lent()
            .first()
            .map_or(0, |(id, _)| id.index());
        assert_eq!(running.engine.choice(), running.choice());
        let choice = u32::try_from(running.choice().unwrap()).unwrap();
        value(10 * choice + u32::from(device))
    };
    runtime
        .spawn(
            Label(0),
            Box::new(body),
            Some(Box::new(options)),
            dependencies,
            &[],
        )
        .unwrap()
}

#[test]
fn the_users_policy_chooses_devices_and_cores() {
    within(60, || {
        for workers in [0, 1, 3] {
            let (runtime, choices) = open_with_policy(workers, |call| {
                // The candidates are both devices and a core.
                assert_eq!(call.candidates.len(), 3);
                Ok(call.turn % 3)
            });
            let tasks: Vec<_> = (0..300)
                .map(|_| spawn_mapped(&runtime, &choices, &[]))
                .collect();
            let mut seen = [0; 3];
            for task in &tasks {
                let got = wait(&runtime, task).unwrap();
                seen[[0, 1, 10].iter().position(|it| *it == got).unwrap()] += 1;
            }
            assert_eq!(seen, [100, 100, 100], "{workers} workers");
            close(&runtime);
        }
    });
}

#[test]
fn a_policy_that_fails_or_answers_nonsense_fails_its_tasks() {
    within(60, || {
        for workers in [0, 2] {
            let (runtime, choices) = open_with_policy(workers, |call| match call.turn % 4 {
                0 => Ok(2),
                1 => Ok(3),
                2 => Ok(usize::MAX),
                _ => Err(7),
            });
            let mut outcomes = Vec::new();
            for _ in 0..8 {
                let task = spawn_mapped(&runtime, &choices, &[]);
                let dependent = spawn_mapped(&runtime, &choices, std::slice::from_ref(&task));
                outcomes.push(wait(&runtime, &task));
                if wait(&runtime, &task).is_err() {
                    assert_eq!(wait(&runtime, &dependent), Err("dependency"));
                } else {
                    let _ = wait(&runtime, &dependent);
                }
                Engine::tell(&task);
                Engine::tell(&dependent);
            }
            assert!(outcomes.contains(&Ok(10)));
            assert!(outcomes.contains(&Err("mapping")));
            assert!(outcomes.contains(&Err("raised")));
            assert!(outcomes.iter().all(|it| *it != Err("dependency")));
            close(&runtime);
        }
    });
}

#[test]
fn a_policy_that_gives_no_answer_fails_its_tasks() {
    within(60, || {
        for workers in [0, 1] {
            // The domain knows no policy.
            let config = Config {
                workers,
                mapper: Mapper::User,
                ..Config::default()
            };
            let runtime = Engine::open(Scripted::default(), config).unwrap();
            let core = Choice {
                variant: 0,
                label: String::new(),
                on: On::Cores(Need::Core),
                cost: None,
            };
            let choices = runtime.choices("f", vec![core]).unwrap();
            let task = spawn_mapped(&runtime, &choices, &[]);
            assert_eq!(wait(&runtime, &task), Err("mapping"));
            // It is a root, which the end of the runtime gives if nobody hears of it.
            spawn_mapped(&runtime, &choices, &[]);
            assert_eq!(close(&runtime).len(), 2);
        }
    });
}

#[test]
fn tasks_that_wait_for_the_policy_are_asked_for_at_once_and_can_be_cancelled() {
    within(60, || {
        let (asked, go) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
        );
        let (runtime, choices) = {
            let (asked, go) = (Arc::clone(&asked), Arc::clone(&go));
            open_with_policy(1, move |_| {
                asked.store(true, Ordering::SeqCst);
                until(|| go.load(Ordering::SeqCst));
                Ok(2)
            })
        };
        let batch = Arc::clone(&runtime.domain().batch);
        let first = spawn_mapped(&runtime, &choices, &[]);
        until(|| asked.load(Ordering::SeqCst));
        let tasks: Vec<_> = (0..50)
            .map(|_| spawn_mapped(&runtime, &choices, &[]))
            .collect();
        // The policy takes its time, and ordinary tasks run meanwhile.
        let plain = spawn(&runtime, 0, &[], |_| value(3));
        assert_eq!(wait(&runtime, &plain), Ok(3));
        assert!(tasks.iter().skip(25).all(Engine::cancel));
        go.store(true, Ordering::SeqCst);
        assert_eq!(wait(&runtime, &first), Ok(10));
        for (index, task) in tasks.iter().enumerate() {
            let expected = if index < 25 { Ok(10) } else { Err("cancelled") };
            assert_eq!(wait(&runtime, task), expected);
        }
        assert_eq!(batch.load(Ordering::SeqCst), 50);
        close(&runtime);
    });
}

#[test]
fn a_runtime_closes_while_its_policy_thinks() {
    within(60, || {
        for workers in [0, 2] {
            let (runtime, choices) = open_with_policy(workers, |call| {
                std::thread::sleep(Duration::from_millis(2));
                Ok(call.turn % 3)
            });
            let mut last = spawn_mapped(&runtime, &choices, &[]);
            for _ in 0..20 {
                last = spawn_mapped(&runtime, &choices, &[last]);
            }
            close(&runtime);
            assert!(matches!(last.outcome(), Some(Outcome::Value(_))));
        }
    });
}

/// A task that reduces `number` into a part.
fn reduce(
    runtime: &Runtime,
    part: &Part<Scripted>,
    operation: u32,
    number: u32,
    also: impl Fn() + Send + 'static,
) -> TaskRef<Scripted> {
    let partials = Arc::clone(&runtime.domain().partials);
    let wanted = part.region().clone();
    let body = move |running: &Running<'_, Scripted>| {
        let groups = running.groups();
        let group = groups.iter().find(|group| *group.part().region() == wanted);
        let group = group.expect("it is a member");
        assert_eq!(group.operation(), operation);
        let mut partials = partials.lock().unwrap();
        if operation == 1 {
            *partials.entry(group.id()).or_insert(0) += number;
        } else {
            *partials.entry(group.id()).or_insert(1) *= number;
        }
        drop(partials);
        also();
        value(number)
    };
    let access = [Access::new(part, Mode::Reduce(operation))];
    runtime
        .spawn(Label(number), Box::new(body), None, &[], &access)
        .unwrap()
}

#[test]
fn a_reduction_is_combined_before_the_next_access() {
    within(60, || {
        for workers in [0, 1, 3] {
            let runtime = open(Scripted::default(), workers);
            let datum = Datum::new("sum", &[8]);
            let whole = datum.whole();
            let total = Arc::clone(&runtime.domain().total);
            let read = |part: &Part<Scripted>| {
                let total = Arc::clone(&total);
                let body = move |_: &Running<'_, Scripted>| value(total.load(Ordering::SeqCst));
                let access = [Access::new(part, Mode::In)];
                runtime
                    .spawn(Label(1), Box::new(body), None, &[], &access)
                    .unwrap()
            };
            let result = |task: &TaskRef<Scripted>| {
                runtime
                    .wait(std::slice::from_ref(task), Until::All, None)
                    .unwrap();
                match task.outcome() {
                    Some(Outcome::Value(value)) => Some(*value),
                    _ => None,
                }
            };
            for number in 1..=100 {
                reduce(&runtime, &whole, 1, number, || ());
            }
            let all = read(&whole);
            assert_eq!(result(&all), Some(5050));
            // Nothing is open: the next one is another.
            for number in 1..=4 {
                reduce(&runtime, &whole, 1, number, || ());
            }
            // Another operation ends it, and so does another part of the datum.
            for _ in 0..2 {
                reduce(&runtime, &whole, 2, 2, || ());
            }
            let part = datum.part(Region::new([Span::range(0, 4)]));
            reduce(&runtime, &part, 1, 7, || ());
            assert_eq!(result(&read(&whole)), Some((5050 + 10) * 4 + 7));
            // What nobody reads is combined when the runtime closes.
            reduce(&runtime, &whole, 1, 3, || ());
            runtime.close_when_quiet(&mut || false);
            assert_eq!(total.load(Ordering::SeqCst), (5050 + 10) * 4 + 10);
            assert!(runtime.close().is_empty());
        }
    });
}

#[test]
fn members_of_a_reduction_run_side_by_side_and_fail_who_comes_after_it() {
    within(60, || {
        let runtime = open(Scripted::default(), 2);
        let whole = Datum::new("sum", &[8]).whole();
        let barrier = Arc::new(Barrier::new(2));
        for number in [1, 2] {
            let barrier = Arc::clone(&barrier);
            // One alone would wait for ever.
            reduce(&runtime, &whole, 1, number, move || {
                barrier.wait();
            });
        }
        let access = [Access::new(&whole, Mode::Reduce(1))];
        let fail = |_: &Running<'_, Scripted>| Step::Done(Err(Trouble::Raised(77)));
        let failing = runtime
            .spawn(Label(5), Box::new(fail), None, &[], &access)
            .unwrap();
        let reads = [Access::new(&whole, Mode::In)];
        let reader = runtime
            .spawn(Label(6), Box::new(|_| value(0)), None, &[], &reads)
            .unwrap();
        runtime
            .wait(std::slice::from_ref(&reader), Until::All, None)
            .unwrap();
        match reader.outcome() {
            Some(Outcome::Failed(Failure::Dependency(root))) => {
                assert!(Arc::ptr_eq(root, &failing));
            }
            _ => panic!("the reader has no value to read"),
        }
        runtime.close_when_quiet(&mut || false);
        assert_eq!(runtime.close().len(), 1);
    });
}
