//! Models of what a task goes through, and of the engine's end.

use std::sync::Arc;

use loom::thread;

use super::{Engine, settle_orphan};
use crate::loom_domain::{Body, Model, explore, open};
use crate::sync::{AtomicUsize, Ordering};
use crate::task::{Content, Link, Outcome, Phase, Task, TaskRef};

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
    explore(3, || {
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
                if let Err(Link::Callback(handled)) = task.link(Link::Callback(handled)) {
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
    explore(3, || {
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
        explore(3, move || {
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
    explore(3, || {
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
    explore(3, || {
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
        let spawned = engine.spawn_as(&task, body, None, &[]);
        let cancelled = canceller.join().unwrap();
        assert!(spawned.is_ok() || cancelled);
        assert!(task.is_done());
        assert_eq!(task.is_cancelled(), cancelled);
        assert_eq!(ran.load(Ordering::Relaxed), usize::from(!cancelled));
        assert!(engine.close_when_quiet(&mut || false));
        engine.close();
    });
}
