//! Accesses to managed data: order, failure, refusal, and the host.
#![cfg(not(loom))]

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use charioteer::native::{
    Access, AccessTrouble, Datum, HostError, Mode, Part, Runtime, SpawnError, Task, TaskError,
    TaskSpace, WaitError,
};
use charioteer::region::{Region, Span};

use common::within;

fn span(start: u64, end: u64) -> Region {
    Region::new([Span::range(start, end)])
}

/// A body that is held until its gate opens.
fn held() -> (mpsc::Sender<()>, impl FnOnce() + Send + 'static) {
    let (open, gate) = mpsc::channel();
    let gate = Mutex::new(gate);
    (open, move || {
        let _ = gate.lock().unwrap().recv();
    })
}

#[derive(Debug)]
struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("broken")
    }
}

impl std::error::Error for Broken {}

fn fails(runtime: &Runtime, part: &Part, mode: Mode) -> Task<()> {
    runtime
        .task()
        .name("failing")
        .accesses(Access::new(part, mode))
        .try_spawn(0, || Err::<(), Broken>(Broken))
        .unwrap()
}

#[test]
fn readers_run_after_the_writer_and_the_next_writer_after_them() {
    within(60, || {
        for workers in [0, 1, 3] {
            let runtime = Runtime::new(workers).unwrap();
            let datum = Datum::new("A", &[100]);
            let log = Arc::new(Mutex::new(Vec::new()));
            let note = |what: &'static str| {
                let log = Arc::clone(&log);
                move || log.lock().unwrap().push(what)
            };
            let whole = datum.whole();
            for _ in 0..50 {
                runtime
                    .task()
                    .writes(&whole)
                    .spawn_detached(note("w"))
                    .unwrap();
                runtime
                    .task()
                    .reads(&whole)
                    .spawn_detached(note("r"))
                    .unwrap();
                runtime
                    .task()
                    .reads(&whole)
                    .spawn_detached(note("r"))
                    .unwrap();
                runtime
                    .task()
                    .updates(&whole)
                    .spawn_detached(note("u"))
                    .unwrap();
            }
            runtime.close().unwrap();
            let log = log.lock().unwrap();
            assert_eq!(*log, ["w", "r", "r", "u"].repeat(50));
        }
    });
}

#[test]
fn parts_that_do_not_overlap_have_no_order() {
    within(60, || {
        let runtime = Runtime::new(1).unwrap();
        let datum = Datum::new("A", &[100]);
        let (open, wait) = held();
        let even = datum.part(Region::new([Span::new(0, 2, 50)]));
        let odd = datum.part(Region::new([Span::new(1, 2, 50)]));
        let second = runtime.task().writes(&even).spawn(wait).unwrap();
        // With one worker it could not run if it had to wait.
        let runtime_two = Runtime::new(2).unwrap();
        let first = runtime_two.task().updates(&odd).spawn(|| 7).unwrap();
        assert_eq!(first.result().unwrap(), &7);
        let both = runtime_two
            .task()
            .reads(&datum.whole())
            .spawn(|| 8)
            .unwrap();
        assert!(!both.wait(Some(Duration::from_millis(20))).unwrap());
        open.send(()).unwrap();
        assert_eq!(both.result().unwrap(), &8);
        assert!(second.is_done());
        runtime_two.close().unwrap();
        runtime.close().unwrap();
    });
}

#[test]
fn a_failure_travels_to_readers_and_not_to_writers() {
    within(60, || {
        for workers in [0, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let datum = Datum::new("A", &[10]);
            let whole = datum.whole();
            let root = fails(&runtime, &whole, Mode::Out);
            let reader = runtime.task().reads(&whole).spawn(|| ()).unwrap();
            let update = runtime.task().updates(&whole).spawn(|| ()).unwrap();
            let write = runtime.task().writes(&whole).spawn(|| 1).unwrap();
            let after = runtime.task().reads(&whole).spawn(|| 2).unwrap();
            assert!(matches!(root.result(), Err(TaskError::Failed(_))));
            for task in [&reader, &update] {
                match task.result() {
                    Err(TaskError::Dependency(name, _)) => assert_eq!(name, "failing"),
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(write.result().unwrap(), &1);
            assert_eq!(after.result().unwrap(), &2);
            runtime.close().unwrap();
        }
    });
}

#[test]
fn what_a_failed_task_would_have_written_stays_undefined_until_all_of_it_is_written() {
    within(60, || {
        for workers in [0, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let datum = Datum::new("A", &[30]);
            let part = |start, end| datum.part(span(start, end));
            let reads = |start, end| {
                let part = part(start, end);
                runtime
                    .task()
                    .reads(&part)
                    .spawn(|| ())
                    .unwrap()
                    .result()
                    .is_ok()
            };
            let root = fails(&runtime, &part(0, 30), Mode::Out);
            assert!(root.result().is_err());
            assert!(!reads(4, 5));
            let write = |start, end| {
                let part = part(start, end);
                runtime
                    .task()
                    .writes(&part)
                    .spawn(|| ())
                    .unwrap()
                    .result()
                    .unwrap();
            };
            write(0, 10);
            assert!(reads(0, 10));
            assert!(!reads(0, 11));
            write(15, 30);
            assert!(reads(15, 30));
            assert!(!reads(14, 16));
            // A task that updates reads: it fails, and what it would have written is undefined.
            let update = runtime.task().updates(&part(5, 12)).spawn(|| ()).unwrap();
            assert!(update.result().is_err());
            assert!(!reads(5, 6));
            assert!(reads(0, 5));
            write(5, 15);
            assert!(reads(0, 30));
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_failed_reader_concerns_nobody() {
    within(60, || {
        let runtime = Runtime::new(2).unwrap();
        let whole = Datum::token("t").whole();
        assert!(fails(&runtime, &whole, Mode::In).result().is_err());
        let (open, wait) = held();
        let slow = runtime.task().reads(&whole).spawn(wait).unwrap();
        let failed = fails(&runtime, &whole, Mode::In);
        let write = runtime.task().writes(&whole).spawn(|| 1).unwrap();
        assert!(failed.result().is_err());
        assert!(!write.is_done());
        open.send(()).unwrap();
        assert_eq!(write.result().unwrap(), &1);
        assert!(slow.is_done());
        runtime.close().unwrap();
    });
}

/// A task that is cancelled before its turn is done at once; who comes after it still comes after those
/// before it.
#[test]
fn a_task_cancelled_before_its_turn_lets_nobody_overtake() {
    within(60, || {
        for (mode, next) in [
            (Mode::In, Mode::Out),
            (Mode::InOut, Mode::Out),
            (Mode::Out, Mode::Out),
            (Mode::InOut, Mode::In),
        ] {
            let runtime = Runtime::new(3).unwrap();
            let whole = Datum::new("A", &[5]).whole();
            let (open, wait) = held();
            let ended = Arc::new(AtomicBool::new(false));
            let first = runtime
                .task()
                .writes(&whole)
                .spawn({
                    let ended = Arc::clone(&ended);
                    move || {
                        wait();
                        ended.store(true, Ordering::SeqCst);
                    }
                })
                .unwrap();
            let spawn = |mode| {
                let ended = Arc::clone(&ended);
                let access = Access::new(&whole, mode);
                runtime
                    .task()
                    .accesses(access)
                    .spawn(move || assert!(ended.load(Ordering::SeqCst)))
                    .unwrap()
            };
            let cancelled = spawn(mode);
            let before = spawn(next);
            assert!(cancelled.cancel());
            assert!(cancelled.is_done());
            let after = spawn(next);
            assert!(!before.wait(Some(Duration::from_millis(20))).unwrap());
            assert!(!after.wait(Some(Duration::from_millis(1))).unwrap());
            open.send(()).unwrap();
            for task in [&before, &after] {
                assert_eq!(task.result().is_ok(), next == Mode::Out || !mode.writes());
            }
            assert!(first.is_done());
            drop(runtime);
        }
    });
}

#[test]
fn accesses_of_one_task_may_not_exclude_each_other() {
    let runtime = Runtime::new(1).unwrap();
    let datum = Datum::new("A", &[10]);
    let (low, high) = (datum.part(span(0, 6)), datum.part(span(5, 10)));
    let refused = runtime.task().writes(&low).updates(&high).spawn(|| ());
    match refused {
        Err(SpawnError::Access(AccessTrouble::SelfConflict { first, second })) => {
            assert_eq!(
                (first.as_str(), second.as_str()),
                ("Out A[0:6]", "InOut A[5:10]")
            );
        }
        other => panic!("{other:?}"),
    }
    assert!(
        runtime
            .task()
            .commutes(&low)
            .reads(&high)
            .spawn(|| ())
            .is_err()
    );
    assert!(
        runtime
            .task()
            .commutes(&low)
            .commutes(&high)
            .spawn(|| ())
            .is_err()
    );
    let fine = runtime
        .task()
        .reads(&low)
        .reads(&low)
        .writes(&high)
        .spawn(|| 3)
        .unwrap();
    assert_eq!(fine.result().unwrap(), &3);
    datum.close();
    match runtime.task().reads(&low).spawn(|| ()) {
        Err(SpawnError::Access(AccessTrouble::Closed(label))) => assert_eq!(label, "A"),
        other => panic!("{other:?}"),
    }
    runtime.close().unwrap();
}

#[test]
fn a_body_may_not_spawn_what_would_wait_for_itself() {
    within(60, || {
        for workers in [0, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let datum = Datum::new("A", &[10]);
            let grid = datum.grid(&[5]);
            let (own, other) = (grid.tile(&[0]), grid.tile(&[1]));
            let part = datum.part(span(4, 6));
            let spawn = runtime.handle();
            let (whole, parts) = (datum.whole(), (own.clone(), other.clone(), part.clone()));
            let (open, wait) = held();
            let (spawned, begun) = mpsc::channel();
            let begun = Mutex::new(begun);
            if workers == 0 {
                open.send(()).unwrap();
            }
            let parent = runtime
                .task()
                .name("parent")
                .updates(&own)
                .spawn(move || {
                    wait();
                    if workers != 0 {
                        begun.lock().unwrap().recv().unwrap();
                    }
                    let (own, other, part) = parts;
                    for part in [&own, &part, &whole] {
                        match spawn.task().reads(part).spawn(|| ()) {
                            Err(SpawnError::Access(AccessTrouble::ParentConflict {
                                task,
                                access,
                            })) => {
                                assert_eq!(task, "parent");
                                assert!(access.starts_with("In A["), "{access}");
                            }
                            other => panic!("{part:?}: {other:?}"),
                        }
                    }
                    let fine = spawn.task().writes(&other).spawn(|| 1).unwrap();
                    *fine.result().unwrap()
                })
                .unwrap();
            if workers != 0 {
                // The record of the parent is another's by the time that it spawns.
                runtime.task().writes(&own).spawn_detached(|| ()).unwrap();
                open.send(()).unwrap();
                spawned.send(()).unwrap();
            }
            assert_eq!(parent.result().unwrap(), &1);
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_name_that_contradicts_the_order_of_accesses_closes_a_cycle_and_leaves_nothing_behind() {
    within(60, || {
        let runtime = Runtime::new(2).unwrap();
        let datum = Datum::new("A", &[10]);
        let whole = datum.whole();
        let space = TaskSpace::<u32, 1>::new("T");
        let early = runtime
            .task()
            .name("early")
            .after(&space.at([0]))
            .writes(&whole)
            .spawn(|| 1)
            .unwrap();
        match runtime.task().reads(&whole).spawn_at(&space.at([0]), || 2) {
            Err(SpawnError::Cycle(names)) => {
                assert_eq!(names, ["T[0]", "early", "T[0]"]);
            }
            other => panic!("{other:?}"),
        }
        runtime.task().spawn_at(&space.at([0]), || 3).unwrap();
        assert_eq!(early.result().unwrap(), &1);
        let next = runtime.task().writes(&whole).spawn(|| 4).unwrap();
        assert_eq!(next.result().unwrap(), &4);

        // The same through one that is loose, and comes after by data alone.
        let (open, wait) = held();
        let slow = runtime.task().writes(&whole).spawn(wait).unwrap();
        let loose = runtime
            .task()
            .name("loose")
            .after(&space.at([1]))
            .updates(&whole)
            .spawn(|| 0)
            .unwrap();
        let reader = runtime
            .task()
            .name("reader")
            .reads(&whole)
            .spawn(|| 0)
            .unwrap();
        let refused = runtime.task().after(&reader).spawn_at(&space.at([1]), || 1);
        match refused {
            Err(SpawnError::Cycle(names)) => {
                assert_eq!(names, ["T[1]", "loose", "reader", "T[1]"]);
            }
            other => panic!("{other:?}"),
        }
        // Also when the one between is cancelled.
        assert!(loose.cancel());
        let last = runtime
            .task()
            .name("last")
            .writes(&whole)
            .spawn(|| 5)
            .unwrap();
        let refused = runtime.task().after(&last).spawn_at(&space.at([1]), || 1);
        assert!(matches!(refused, Err(SpawnError::Cycle(_))), "{refused:?}");
        runtime.task().spawn_at(&space.at([1]), || 1).unwrap();
        open.send(()).unwrap();
        assert_eq!(last.result().unwrap(), &5);
        assert!(slow.is_done() && reader.result().is_err());
        runtime.close().unwrap();
    });
}

#[test]
fn a_wait_for_what_comes_after_oneself_never_ends() {
    within(60, || {
        let runtime = Runtime::new(2).unwrap();
        let whole = Datum::token("t").whole();
        let (send, receive) = mpsc::channel::<Task<()>>();
        let receive = Mutex::new(receive);
        let first = runtime
            .task()
            .writes(&whole)
            .spawn(move || {
                let next = receive.lock().unwrap().recv().unwrap();
                matches!(next.wait(None), Err(WaitError::Cycle(_)))
            })
            .unwrap();
        let next = runtime.task().reads(&whole).spawn(|| ()).unwrap();
        send.send(next).unwrap();
        assert!(first.result().unwrap());
        runtime.close().unwrap();
    });
}

#[test]
fn unordered_and_empty_accesses_wait_for_nobody() {
    within(60, || {
        let runtime = Runtime::new(2).unwrap();
        let datum = Datum::new("A", &[10]);
        let (open, wait) = held();
        let whole = datum.whole();
        let slow = runtime.task().writes(&whole).spawn(wait).unwrap();
        let access = Access {
            ordered: false,
            ..Access::new(&whole, Mode::Out)
        };
        let free = runtime.task().accesses(access).spawn(|| 1).unwrap();
        assert_eq!(free.result().unwrap(), &1);
        let empty = datum.part(span(0, 0));
        let none = runtime.task().writes(&empty).spawn(|| 2).unwrap();
        assert_eq!(none.result().unwrap(), &2);
        open.send(()).unwrap();
        slow.result().unwrap();
        runtime.close().unwrap();
    });
}

#[test]
fn commuting_tasks_exclude_each_other_in_any_order() {
    within(60, || {
        for workers in [0, 1, 3] {
            let runtime = Runtime::new(workers).unwrap();
            let datum = Datum::new("A", &[40]);
            // Each overlaps the next one, as philosophers do.
            let parts: Vec<Part> = (0..8)
                .map(|at| datum.part(span(at * 5, (at * 5 + 7).min(40))))
                .collect();
            let other = Datum::token("t").whole();
            let busy: Arc<Vec<AtomicUsize>> =
                Arc::new((0..41).map(|_| AtomicUsize::new(0)).collect());
            let mut tasks = Vec::new();
            for round in 0..200_u64 {
                let part = &parts[usize::try_from(round * 7 % 8).unwrap()];
                let span = part.region().spans()[0];
                let mut task = runtime.task().commutes(part);
                let token = round % 3 == 0;
                if token {
                    task = task.commutes(&other);
                }
                let busy = Arc::clone(&busy);
                let body = move || {
                    let mine = (span.start()..span.end()).chain(token.then_some(40));
                    let mine: Vec<_> = mine.map(|at| &busy[usize::try_from(at).unwrap()]).collect();
                    for place in &mine {
                        assert_eq!(place.fetch_add(1, Ordering::SeqCst), 0, "not alone");
                    }
                    std::thread::yield_now();
                    for place in &mine {
                        place.fetch_sub(1, Ordering::SeqCst);
                    }
                };
                tasks.push(task.spawn(body).unwrap());
            }
            let all = runtime.task().reads(&datum.whole()).spawn(|| ()).unwrap();
            all.result().unwrap();
            assert!(tasks.iter().all(Task::is_done));
            for task in &tasks {
                task.result().unwrap();
            }
            runtime.close().unwrap();
        }
    });
}

#[test]
fn who_commutes_and_is_ready_does_not_wait_for_one_that_is_not() {
    within(60, || {
        let runtime = Runtime::new(2).unwrap();
        let whole = Datum::token("t").whole();
        let (open, wait) = held();
        let slow = runtime.spawn(wait);
        let late = runtime
            .task()
            .after(&slow)
            .commutes(&whole)
            .spawn(|| 1)
            .unwrap();
        let early = runtime.task().commutes(&whole).spawn(|| 2).unwrap();
        let reader = runtime.task().reads(&whole).spawn(|| 3).unwrap();
        assert_eq!(early.result().unwrap(), &2);
        assert!(!late.is_done() && !reader.is_done());
        open.send(()).unwrap();
        assert_eq!(reader.result().unwrap(), &3);
        assert!(late.is_done());
        runtime.close().unwrap();
    });
}

#[test]
fn the_host_has_its_place_in_the_order() {
    within(60, || {
        for workers in [0, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let whole = Datum::new("A", &[10]).whole();
            let log = Arc::new(Mutex::new(Vec::new()));
            let note = |what: u32| {
                let log = Arc::clone(&log);
                move || log.lock().unwrap().push(what)
            };
            runtime
                .task()
                .writes(&whole)
                .spawn_detached(note(1))
                .unwrap();
            let access = runtime.host(&[Access::new(&whole, Mode::InOut)]).unwrap();
            let next = runtime.task().reads(&whole).spawn(note(3)).unwrap();
            log.lock().unwrap().push(2);
            assert!(!next.is_done());
            access.leave();
            next.result().unwrap();
            assert_eq!(*log.lock().unwrap(), [1, 2, 3]);

            // Two readers at once.
            let first = runtime.host(&[Access::new(&whole, Mode::In)]).unwrap();
            let second = runtime.host(&[Access::new(&whole, Mode::In)]).unwrap();
            let reader = runtime.task().reads(&whole).spawn(|| 4).unwrap();
            assert_eq!(reader.result().unwrap(), &4);
            drop((first, second));

            fails(&runtime, &whole, Mode::Out).wait(None).unwrap();
            match runtime.host(&[Access::new(&whole, Mode::In)]) {
                Err(HostError::Failed(root)) => assert_eq!(root.label().to_string(), "failing"),
                other => panic!("{:?}", other.err()),
            }
            drop(runtime.host(&[Access::new(&whole, Mode::Out)]).unwrap());
            drop(runtime.host(&[Access::new(&whole, Mode::In)]).unwrap());
            drop(runtime);
        }
    });
}

#[test]
fn an_access_of_the_host_in_a_body_is_a_wait() {
    within(60, || {
        for workers in [0, 1] {
            let runtime = Arc::new(Runtime::new(workers).unwrap());
            let (own, other) = (Datum::token("own").whole(), Datum::token("other").whole());
            let inner = Arc::clone(&runtime);
            let parts = (own.clone(), other.clone());
            let task = runtime
                .task()
                .updates(&own)
                .spawn(move || {
                    let (own, other) = parts;
                    inner.task().writes(&other).spawn_detached(|| ()).unwrap();
                    drop(inner.host(&[Access::new(&other, Mode::In)]).unwrap());
                    let refused = inner.host(&[Access::new(&own, Mode::In)]);
                    matches!(
                        refused.err(),
                        Some(HostError::Access(AccessTrouble::ParentConflict { .. }))
                    )
                })
                .unwrap();
            assert!(*task.result().unwrap());
            // The body has let go of it, or is about to.
            drop(task);
        }
    });
}

#[test]
fn memory_does_not_grow_with_the_number_of_tasks() {
    within(120, || {
        let runtime = Runtime::new(1).unwrap();
        let datum = Datum::new("A", &[64, 64]);
        let grid = datum.grid(&[8, 8]);
        let alive = Arc::new(());
        let mut most = 0;
        for round in 0..20_000_u64 {
            let tile = grid.tile(&[round % 8, round / 8 % 8]);
            let shared = Arc::clone(&alive);
            // What a task gives is kept as long as its record is.
            let task = if round % 3 == 0 {
                runtime.task().updates(&tile).spawn(move || shared)
            } else {
                runtime.task().reads(&tile).spawn(move || shared)
            };
            if round % 100 == 99 {
                task.unwrap().result().unwrap();
                most = most.max(Arc::strong_count(&alive));
            }
        }
        // Records of 64 tiles, and what came between two sweeps.
        assert!(most < 3000, "{most} tasks are kept");
        runtime.close().unwrap();
    });
}
