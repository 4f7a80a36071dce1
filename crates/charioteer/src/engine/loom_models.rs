//! Models of what a task goes through, and of the engine's end.

use std::sync::Arc;

use loom::thread;

use super::devices::landed;
use super::{Config, Engine, OPEN, publish, settle_orphan};
use crate::data::{Access, Datum, Mode};
use crate::loom_domain::{Body, Model, explore, explore_at_most};
use crate::machine::{Description, DeviceId, Event, Machine, Stream, Time};
use crate::schedule::gang::{Alternative, Member, WHOLE};
use crate::sync::{AtomicUsize, Condvar, Mutex, Ordering};
use crate::task::state::ORDERED;
use crate::task::{Content, Failure, Link, Need, Options, Outcome, Phase, Task, TaskRef, Until};

/// Opens an engine. It has to be closed at the end of the model: what is left in the registry would
/// be found by the model's next run, where loom knows nothing of it.
fn open(workers: usize) -> Arc<Engine<Model>> {
    open_on(workers, None)
}

fn open_on(workers: usize, machine: Option<Arc<Machine>>) -> Arc<Engine<Model>> {
    let config = Config {
        workers,
        machine,
        ..Config::default()
    };
    let engine = Engine::open(Model, config).expect("loom refuses no thread");
    // loom lets a SeqCst load overlook a SeqCst store in favour of a first value, as if they had no
    // common order.
    engine.gate.store(OPEN, Ordering::SeqCst);
    engine.closing.store(false, Ordering::SeqCst);
    engine.shards[0].spawned.store(0, Ordering::SeqCst);
    engine.shards[0].finished.store(0, Ordering::SeqCst);
    engine
}

fn count() -> Arc<AtomicUsize> {
    Arc::new(AtomicUsize::new(0))
}

/// A task that is ready and belongs to no engine.
fn ready() -> TaskRef<Model> {
    let body: Body = Box::new(|| Ok(()));
    Arc::new(Task::new(
        "task",
        Phase::Ready,
        Content::Body(body),
        None,
        0,
    ))
}

/// What a worker does with a ready task, if it wins it.
fn complete(task: &TaskRef<Model>) -> bool {
    let won = task.state.advance(Phase::Ready, Phase::Running).is_ok();
    if won {
        settle_orphan(task, Outcome::Value(()));
    }
    won
}

/// Links that are registered while their task completes are handled once each, by the completer or
/// by who registers them, who both see the outcome then.
#[test]
fn a_late_link_is_handled_once() {
    explore(|| {
        let task = ready();
        let calls = count();
        let register = |task: TaskRef<Model>, calls: Arc<AtomicUsize>| {
            move || {
                let handled: Box<dyn FnOnce() + Send> = {
                    let task = Arc::clone(&task);
                    Box::new(move || {
                        assert!(matches!(task.outcome(), Some(Outcome::Value(()))));
                        calls.fetch_add(1, Ordering::Relaxed);
                    })
                };
                let link = Link::Callback(Box::new(handled));
                if let Err(Link::Callback(handled)) = task.link(link) {
                    handled();
                }
            }
        };
        let threads = [
            thread::spawn(register(Arc::clone(&task), Arc::clone(&calls))),
            thread::spawn(register(Arc::clone(&task), Arc::clone(&calls))),
        ];
        assert!(complete(&task));
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(calls.load(Ordering::Relaxed), 2);
    });
}

/// A task that a worker and a canceller want has one outcome, and the canceller's answer says which.
/// The worker's body does not listen.
#[test]
fn a_task_completes_or_is_cancelled() {
    explore(|| {
        let task = ready();
        let canceller = {
            let task = Arc::clone(&task);
            thread::spawn(move || Engine::cancel(&task))
        };
        let completed = complete(&task);
        let cancelled = canceller.join().unwrap();
        assert_ne!(completed, cancelled);
        assert_eq!(task.is_cancelled(), cancelled);
        assert!(task.is_done());
    });
}

/// Of several that cancel a pending task at once, each is told that it is cancelled; if a worker
/// won it, none is.
#[test]
fn several_cancellers_agree() {
    for contended in [false, true] {
        explore(move || {
            let task = ready();
            let cancellers = [(); 2].map(|()| {
                let task = Arc::clone(&task);
                thread::spawn(move || Engine::cancel(&task))
            });
            let completed = contended && complete(&task);
            for canceller in cancellers {
                assert_eq!(canceller.join().unwrap(), !completed);
            }
            assert_eq!(task.is_cancelled(), !completed);
        });
    }
}

/// As above, of a handle whose task is not spawned.
#[test]
fn several_cancellers_of_a_handle_agree() {
    explore(|| {
        let task = Arc::new(Task::unspawned("task"));
        let canceller = {
            let task = Arc::clone(&task);
            thread::spawn(move || Engine::<Model>::cancel(&task))
        };
        assert!(Engine::cancel(&task));
        assert!(canceller.join().unwrap());
        assert!(task.is_done() && task.is_cancelled());
    });
}

/// A spawner and a canceller want the same handle: either the body runs or the canceller is told
/// that the task is cancelled.
#[test]
fn a_handle_is_spawned_or_cancelled() {
    explore(|| {
        let engine = open(0);
        let task = Arc::new(Task::unspawned("task"));
        let canceller = {
            let task = Arc::clone(&task);
            thread::spawn(move || Engine::cancel(&task))
        };
        let ran = count();
        let body = {
            let ran = Arc::clone(&ran);
            Box::new(move || {
                ran.fetch_add(1, Ordering::Relaxed);
                Ok(())
            })
        };
        let spawned = engine.spawn_as(&task, body, None, &[], &[]);
        let cancelled = canceller.join().unwrap();
        assert!(spawned.is_ok() || cancelled);
        assert!(task.is_done());
        assert_eq!(task.is_cancelled(), cancelled);
        assert_eq!(ran.load(Ordering::Relaxed), usize::from(!cancelled));
        assert!(engine.close_when_quiet(&mut || false));
        engine.close();
    });
}

/// A body that counts its runs.
fn counting(ran: &Arc<AtomicUsize>) -> Body {
    let ran = Arc::clone(ran);
    Box::new(move || {
        ran.fetch_add(1, Ordering::Relaxed);
        Ok(())
    })
}

/// Two predecessors complete while their dependent is spawned: it runs once, or is skipped if one of
/// them failed, and in any case not before both are done.
#[test]
fn predecessors_complete_during_a_spawn() {
    for fails in [false, true] {
        explore(move || {
            let engine = open(0);
            let predecessors = [ready(), ready()];
            let completers = [0, 1].map(|index| {
                let task = Arc::clone(&predecessors[index]);
                thread::spawn(move || {
                    task.state.advance(Phase::Ready, Phase::Running).unwrap();
                    let outcome = if fails && index == 0 {
                        Outcome::Failed(Failure::Raised("on purpose"))
                    } else {
                        Outcome::Value(())
                    };
                    settle_orphan(&task, outcome);
                })
            });
            let ran = count();
            let body: Body = {
                let mut run = counting(&ran);
                let predecessors = predecessors.clone();
                Box::new(move || {
                    assert!(predecessors.iter().all(|task| task.is_done()));
                    run()
                })
            };
            let task = engine.spawn("dependent", body, None, &predecessors, &[]);
            let task = task.unwrap();
            for completer in completers {
                completer.join().unwrap();
            }
            assert!(engine.close_when_quiet(&mut || false));
            assert_eq!(ran.load(Ordering::Relaxed), usize::from(!fails));
            match task.outcome().unwrap() {
                Outcome::Value(()) => assert!(!fails),
                Outcome::Failed(Failure::Dependency(root)) => {
                    assert!(fails && Arc::ptr_eq(root, &predecessors[0]));
                }
                Outcome::Failed(_) => panic!("it failed by itself"),
            }
            engine.close();
        });
    }
}

/// A task that accesses data is cancelled while its predecessor completes and another task comes after
/// it: that one runs once, and after the predecessor.
#[test]
fn nobody_overtakes_a_task_that_is_cancelled_before_its_turn() {
    explore_at_most(2, || {
        let engine = open(0);
        let whole = Datum::new("datum", &[]).whole();
        let first = ready();
        let before = std::slice::from_ref(&first);
        let access = [Access::new(&whole, Mode::InOut)];
        let ran = count();
        let second = engine
            .spawn("second", counting(&ran), None, before, &access)
            .unwrap();
        let canceller = {
            let second = Arc::clone(&second);
            thread::spawn(move || Engine::cancel(&second))
        };
        let completer = {
            let first = Arc::clone(&first);
            thread::spawn(move || {
                first.state.advance(Phase::Ready, Phase::Running).unwrap();
                settle_orphan(&first, Outcome::Value(()));
            })
        };
        let followed = count();
        let body: Body = {
            let mut run = counting(&followed);
            let first = Arc::clone(&first);
            Box::new(move || {
                assert!(first.is_done());
                run()
            })
        };
        let access = [Access::new(&whole, Mode::Out)];
        engine
            .spawn_detached("third", body, None, &[], &access)
            .unwrap();
        let cancelled = canceller.join().unwrap();
        completer.join().unwrap();
        assert!(engine.close_when_quiet(&mut || false));
        assert_eq!(followed.load(Ordering::Relaxed), 1);
        assert_eq!(ran.load(Ordering::Relaxed), usize::from(!cancelled));
        engine.close();
    });
}

/// As above, of a task that was let go when its predecessor was launched, and waits for devices: the
/// one behind it runs once the predecessor is done, though that counts among nobody's predecessors any
/// more.
///
/// It finds a task that is past though it ran ahead of work in flight (`BEHIND`); who hands its links on
/// at the launch already (`Task::take_left`); and who does not at the end (`Landed::Past`).
#[test]
fn nobody_overtakes_a_task_that_is_cancelled_ahead_of_work_in_flight() {
    explore_at_most(2, || {
        let engine = open(0);
        let whole = Datum::new("datum", &[]).whole();
        let first = ready();
        first.state.advance(Phase::Ready, Phase::Running).unwrap();
        let body: Body = Box::new(|| unreachable!("it waits for devices"));
        let content = Content::Body(body);
        let second = Arc::new(Task::new("second", Phase::Waiting, content, None, 0));
        second.state.begin_with(ORDERED);
        second.engine.store(engine.id, Ordering::Relaxed);
        engine.shards[0].spawned.fetch_add(1, Ordering::SeqCst);
        let access = [Access::new(&whole, Mode::InOut)];
        let before = std::slice::from_ref(&first);
        let launched = engine.launch_ordered(Arc::clone(&second), before, &access);
        launched.unwrap();
        let canceller = {
            let second = Arc::clone(&second);
            thread::spawn(move || Engine::cancel(&second))
        };
        let device = {
            let (engine, first) = (Arc::clone(&engine), Arc::clone(&first));
            thread::spawn(move || {
                let device = DeviceId::gpu(0);
                let stream = Stream { device, number: 0 };
                let event = Event {
                    stream,
                    position: 1,
                };
                first.launch(Outcome::Value(()), &[event], true);
                let (events, ahead) = first.let_ahead(|_| true);
                let mut worklist = Vec::new();
                for (next, inherits) in ahead {
                    next.go_behind(&events, inherits);
                    if next.release(1) && next.state.advance(Phase::Waiting, Phase::Ready).is_err()
                    {
                        engine.turn_has_come(&next, &mut worklist);
                    }
                }
                // The event, and the body.
                for _ in 0..2 {
                    worklist.extend(landed(&first, None));
                }
                while let Some(settled) = worklist.pop() {
                    publish(&settled.task, settled.ending, &mut worklist, Some(&engine));
                }
            })
        };
        let followed = count();
        let body: Body = {
            let mut run = counting(&followed);
            let first = Arc::clone(&first);
            Box::new(move || {
                assert!(first.is_done());
                run()
            })
        };
        let access = [Access::new(&whole, Mode::Out)];
        engine
            .spawn_detached("third", body, None, &[], &access)
            .unwrap();
        assert!(canceller.join().unwrap());
        device.join().unwrap();
        assert!(engine.close_when_quiet(&mut || false));
        assert_eq!(followed.load(Ordering::Relaxed), 1);
        engine.close();
    });
}

/// Two tasks that commute on two data, named in opposite orders, become ready at once, and one is
/// cancelled perhaps: nobody waits for ever in a line.
#[test]
fn lines_end() {
    for cancels in [false, true] {
        explore_at_most(2, move || {
            let engine = open(0);
            let (one, other) = (
                Datum::new("one", &[]).whole(),
                Datum::new("other", &[]).whole(),
            );
            let predecessors = [ready(), ready()];
            let ran = count();
            let mut tasks = Vec::new();
            for (index, parts) in [[&one, &other], [&other, &one]].into_iter().enumerate() {
                let accesses = parts.map(|part| Access::new(part, Mode::Commute));
                let before = std::slice::from_ref(&predecessors[index]);
                let task = engine.spawn("task", counting(&ran), None, before, &accesses);
                tasks.push(task.unwrap());
            }
            let completers = predecessors.map(|task| {
                thread::spawn(move || {
                    task.state.advance(Phase::Ready, Phase::Running).unwrap();
                    settle_orphan(&task, Outcome::Value(()));
                })
            });
            let cancelled = cancels && Engine::cancel(&tasks[0]);
            for completer in completers {
                completer.join().unwrap();
            }
            assert!(engine.close_when_quiet(&mut || false));
            assert_eq!(ran.load(Ordering::Relaxed), 2 - usize::from(cancelled));
            engine.close();
        });
    }
}

/// A spawner against a closer: what was counted in has run when the engine is quiet, what was refused
/// never runs and is not counted, and the closing ends.
#[test]
fn a_spawn_meets_a_close() {
    explore(|| {
        let engine = open(0);
        let ran = count();
        let spawner = {
            let engine = Arc::clone(&engine);
            let body = counting(&ran);
            thread::spawn(move || engine.spawn_detached("task", body, None, &[], &[]))
        };
        assert!(engine.close_when_quiet(&mut || false));
        let ran_before = ran.load(Ordering::Relaxed);
        let counts = engine.counts();
        let spawned = spawner.join().unwrap();
        assert_eq!(ran_before, usize::from(spawned.is_ok()));
        assert_eq!(ran.load(Ordering::Relaxed), ran_before);
        assert!(counts.finished >= ran_before as u64);
        let counts = engine.counts();
        assert_eq!(counts.spawned, counts.finished);
        engine.close();
    });
}

/// A worker that retires against a thread that spawns: the task runs, for the spawner waits for it;
/// and an engine that closes tells its worker, which ends.
#[test]
fn a_spawn_meets_a_worker_that_parks() {
    explore(|| {
        let engine = open(1);
        let ran = count();
        for _ in 0..2 {
            engine
                .spawn_detached("task", counting(&ran), None, &[], &[])
                .unwrap();
        }
        assert!(engine.close_when_quiet(&mut || false));
        assert_eq!(ran.load(Ordering::Relaxed), 2);
        engine.close();
    });
}

/// Two bodies that wait for each other, unknown to the engine: whoever is woken for the first task
/// passes the wake-up on, so that the second worker runs the other one.
#[test]
fn a_wake_up_is_passed_on() {
    explore_at_most(2, || {
        let engine = open(2);
        let met = Arc::new((Mutex::new(0), Condvar::new()));
        for _ in 0..2 {
            let met = Arc::clone(&met);
            let body = Box::new(move || {
                let mut bodies = met.0.lock();
                *bodies += 1;
                while *bodies != 2 {
                    bodies = met.1.wait(bodies);
                }
                met.1.notify_all();
                Ok(())
            });
            engine.spawn_detached("task", body, None, &[], &[]).unwrap();
        }
        assert!(engine.close_when_quiet(&mut || false));
        engine.close();
    });
}

/// Two workers of which one at a time may be inside: whoever leaves finds what the other, who had no
/// room, left behind.
#[test]
fn a_full_gate_loses_no_task() {
    explore_at_most(1, || {
        let engine = open(2);
        engine.set_width(1);
        let ran = count();
        for _ in 0..2 {
            engine
                .spawn_detached("task", Box::new(counting(&ran)), None, &[], &[])
                .unwrap();
        }
        assert!(engine.close_when_quiet(&mut || false));
        engine.close();
        assert_eq!(ran.load(Ordering::Relaxed), 2);
    });
}

/// A body waits, on the only worker, for a task that another thread completes, while the engine
/// closes: another thread has its place meanwhile, its wait ends, it gets a place again, and the
/// engine closes after it.
#[test]
fn a_body_waits_in_an_engine_that_closes() {
    explore_at_most(1, || {
        let engine = open(1);
        let awaited = ready();
        let ran = count();
        let body: Body = {
            let mut run = counting(&ran);
            let engine = Arc::clone(&engine);
            let awaited = Arc::clone(&awaited);
            Box::new(move || {
                let tasks = std::slice::from_ref(&awaited);
                assert_eq!(engine.wait(tasks, Until::All, None), Ok(true));
                run()
            })
        };
        engine.spawn_detached("task", body, None, &[], &[]).unwrap();
        engine
            .spawn_detached("other", counting(&ran), None, &[], &[])
            .unwrap();
        let completer = thread::spawn(move || assert!(complete(&awaited)));
        assert!(engine.close_when_quiet(&mut || false));
        assert_eq!(ran.load(Ordering::Relaxed), 2);
        completer.join().unwrap();
        engine.close();
    });
}

// ---- tasks on devices ---------------------------------------------------------------------------

/// A machine with one accelerator.
fn machine() -> Arc<Machine> {
    Machine::virtual_machine(Description::uniform(1, 1, 1, Time::Real).unwrap())
}

/// The options of a task that takes the whole accelerator.
fn on_device() -> Option<Box<Options>> {
    let whole = Alternative {
        members: Box::new([Member::Device(DeviceId::gpu(0))]),
        share: WHOLE,
        memory: 0,
    };
    Some(Box::new(Options {
        need: Need::Devices,
        devices: Some(Arc::new([whole])),
        ..Options::DEFAULT
    }))
}

/// Two parts of a launched task land while somebody who was let go looks at its value: it is in the
/// flight or in the task at every moment, and one of the two that land ends the task.
#[test]
fn a_launched_task_shows_its_value_until_it_is_done_and_then() {
    explore(|| {
        let task = ready();
        task.state.advance(Phase::Ready, Phase::Running).unwrap();
        let stream = Stream {
            device: DeviceId::gpu(0),
            number: 0,
        };
        let event = Event {
            stream,
            position: 1,
        };
        task.launch(Outcome::Value(()), &[event], true);
        let land = |task: &TaskRef<Model>| {
            let settled = landed(task, None);
            let last = settled.is_some();
            if let Some(settled) = settled {
                publish(&settled.task, settled.ending, &mut Vec::new(), None);
            }
            last
        };
        let device = {
            let task = Arc::clone(&task);
            thread::spawn(move || land(&task))
        };
        let reader = {
            let task = Arc::clone(&task);
            thread::spawn(move || assert!(task.peek(|()| ()).is_some()))
        };
        let by_body = land(&task);
        reader.join().unwrap();
        assert_ne!(by_body, device.join().unwrap());
        assert!(task.is_done() && task.peek(|()| ()).is_some());
    });
}

/// Two threads post to the ledger at once: whoever finds the turn taken leaves its letter to who has
/// it, and both tasks run.
#[test]
fn no_letter_is_left_in_the_mailbox() {
    explore_at_most(2, || {
        let engine = open_on(0, Some(machine()));
        let ran = count();
        let other = {
            let engine = Arc::clone(&engine);
            let body = counting(&ran);
            thread::spawn(move || engine.spawn_detached("other", body, on_device(), &[], &[]))
        };
        let spawned = engine.spawn_detached("one", counting(&ran), on_device(), &[], &[]);
        spawned.unwrap();
        other.join().unwrap().unwrap();
        assert!(engine.close_when_quiet(&mut || false));
        assert_eq!(ran.load(Ordering::Relaxed), 2);
        engine.close();
    });
}

/// A task that is asked for, granted, dispatched or running is cancelled: whoever takes the loan out of
/// it gives it back, so that the next one gets the device.
#[test]
fn a_loan_is_given_back_whoever_ends_the_task() {
    explore_at_most(2, || {
        let engine = open_on(0, Some(machine()));
        let task = Arc::new(Task::unspawned("task"));
        let canceller = {
            let task = Arc::clone(&task);
            thread::spawn(move || Engine::cancel(&task))
        };
        let ran = count();
        let _ = engine.spawn_as(&task, counting(&ran), on_device(), &[], &[]);
        canceller.join().unwrap();
        assert!(task.is_done());
        assert_eq!(task.is_cancelled(), ran.load(Ordering::Relaxed) == 0);
        let next = engine.spawn("next", counting(&ran), on_device(), &[], &[]);
        assert!(engine.close_when_quiet(&mut || false));
        assert!(!next.unwrap().is_failed());
        engine.close();
    });
}

/// A dependent is spawned while its predecessor runs, is launched, and its work ends: it is let go once,
/// by the launch, by its own spawner or by the end, finds its predecessor's value, and is done after it.
///
/// It finds a dependent that does not count what it ran ahead of (`Task::go_behind`), and so is done first;
/// and a link that stays among those to be released at the end when its dependent was let go ahead
/// (`Task::let_ahead`).
#[test]
fn a_dependent_runs_ahead_or_behind() {
    explore_at_most(1, || {
        let machine = machine();
        let engine = open_on(0, Some(Arc::clone(&machine)));
        let first: Body = {
            let engine = Arc::clone(&engine);
            Box::new(move || {
                let gpu = machine.as_virtual().unwrap().gpu(DeviceId::gpu(0));
                for (_, stream) in engine.lent() {
                    gpu.enqueue(stream, Box::new(|| Ok(()))).unwrap();
                }
                Ok(())
            })
        };
        let task = Arc::new(Task::unspawned("first"));
        let ran = count();
        let second: Body = {
            let mut run = counting(&ran);
            let first = Arc::clone(&task);
            Box::new(move || {
                assert!(first.peek(|()| ()).is_some());
                run()
            })
        };
        let spawner = {
            let (engine, first) = (Arc::clone(&engine), Arc::clone(&task));
            thread::spawn(move || {
                let before = std::slice::from_ref(&first);
                engine
                    .spawn("second", second, on_device(), before, &[])
                    .unwrap()
            })
        };
        engine
            .spawn_as(&task, first, on_device(), &[], &[])
            .unwrap();
        let (first, second) = (task, spawner.join().unwrap());
        let tasks = std::slice::from_ref(&second);
        assert_eq!(engine.wait(tasks, Until::All, None), Ok(true));
        assert!(first.is_done() && !second.is_failed());
        assert!(engine.close_when_quiet(&mut || false));
        assert_eq!(ran.load(Ordering::Relaxed), 1);
        engine.close();
    });
}
