//! Closures and futures as the bodies of tasks.
//!
//! A future that awaits tasks and nothing else suspends until they are done, as the runtime sees it:
//! so it takes part in the search for cycles, and hears of tasks that are never spawned. Whether it
//! awaits anything else shows in its waker: somebody kept a clone of it. Then it sleeps until it is
//! woken, by its tasks as well.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::task::{Context, Poll, Wake, Waker};

use crate::engine::{Engine, Registry, Running};
use crate::task::{Domain, Step, TaskRef, Trouble, Until};

static ENGINES: Registry<Native> = Registry::new();

/// The engine whose task this thread runs.
pub(super) fn engine_here() -> Option<Arc<Engine<Native>>> {
    ENGINES.get(crate::work::engine_here()?)
}

/// An engine that can wait for `tasks`: that of the body that waits, whose place is given up
/// meanwhile; else theirs; else, for tasks that are not spawned yet, any.
pub(super) fn engine_for(tasks: &[TaskRef<Native>]) -> Option<Arc<Engine<Native>>> {
    engine_here()
        .or_else(|| tasks.iter().find_map(|task| Engine::of(task)))
        .or_else(|| ENGINES.all().into_iter().next())
}

type Value = Box<dyn Any + Send + Sync>;

/// Why a body failed.
#[derive(Clone, Debug)]
pub enum Cause {
    /// It returned this error.
    Error(Arc<dyn std::error::Error + Send + Sync>),
    /// It panicked with this message.
    Panic(Arc<str>),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Error(error) => error.fmt(f),
            Self::Panic(message) => write!(f, "panic: {message}"),
        }
    }
}

/// The domain of plain Rust.
pub struct Native;

type Once = Box<dyn FnOnce() -> Result<Value, Cause> + Send>;
type Call = Box<dyn FnMut() -> Result<Value, Cause> + Send>;
type Pending = Pin<Box<dyn Future<Output = Result<Value, Cause>> + Send>>;

pub enum Body {
    /// Taken out when it runs.
    Once(Option<Once>),
    Call(Call),
    /// And the tasks that it awaits.
    Future(Pending, Vec<TaskRef<Native>>),
}

impl Body {
    #[inline]
    pub(super) fn once<T: Send + Sync + 'static>(
        body: impl FnOnce() -> T + Send + 'static,
    ) -> Self {
        Self::Once(Some(Box::new(|| Ok(Box::new(body())))))
    }

    pub(super) fn repeated<T, E>(mut body: impl FnMut() -> Result<T, E> + Send + 'static) -> Self
    where
        T: Send + Sync + 'static,
        E: std::error::Error + Send + Sync + 'static,
    {
        Self::Call(Box::new(move || match body() {
            Ok(value) => Ok(Box::new(value)),
            Err(error) => Err(Cause::Error(Arc::new(error))),
        }))
    }

    pub(super) fn future<T: Send + Sync + 'static>(
        future: impl Future<Output = T> + Send + 'static,
    ) -> Self {
        let future = async move {
            let value: Value = Box::new(future.await);
            Ok(value)
        };
        Self::Future(Box::pin(future), Vec::new())
    }
}

pub enum Label {
    None,
    Name(Arc<str>),
    Index(Arc<str>, Box<[i64]>),
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("task"),
            Self::Name(name) => f.write_str(name),
            Self::Index(space, index) => {
                write!(f, "{space}[")?;
                for (at, number) in index.iter().enumerate() {
                    if at > 0 {
                        f.write_str(", ")?;
                    }
                    number.fmt(f)?;
                }
                f.write_str("]")
            }
        }
    }
}

pub struct Callback(Box<dyn FnOnce() + Send>);

impl Callback {
    pub(super) fn new(f: impl FnOnce() + Send + 'static) -> Self {
        Self(Box::new(f))
    }

    pub(super) fn call(self) {
        if catch_unwind(AssertUnwindSafe(self.0)).is_err() {
            eprintln!("charioteer: a callback panicked");
        }
    }
}

/// What the future that this thread polls awaits, and the cycle that its last wait would have closed.
struct Polled {
    waker: Waker,
    awaited: Vec<TaskRef<Native>>,
    cycle: Option<Vec<String>>,
}

thread_local! {
    static POLLED: RefCell<Option<Polled>> = const { RefCell::new(None) };
}

/// What becomes of the wait of a future for a task that is not done.
pub(super) enum Wait {
    /// The body awaits it.
    Noted,
    /// It would never end: the names along the cycle.
    Cycle(Vec<String>),
    /// It is no body's own: it is to be woken by a callback.
    Foreign,
}

/// Notes that the future which this thread polls awaits `task`, if `waker` is that of a body.
pub(super) fn note_wait(task: &TaskRef<Native>, waker: &Waker) -> Wait {
    POLLED.with_borrow_mut(|polled| match polled {
        Some(polled) if polled.waker.will_wake(waker) => match polled.cycle.take() {
            Some(cycle) => Wait::Cycle(cycle),
            None => {
                polled.awaited.push(Arc::clone(task));
                Wait::Noted
            }
        },
        _ => Wait::Foreign,
    })
}

/// Polls the future of a body.
fn poll(
    task: &TaskRef<Native>,
    future: &mut Pending,
    awaited: &mut Vec<TaskRef<Native>>,
) -> Result<Poll<Result<Value, Cause>>, Box<dyn Any + Send>> {
    let source = Arc::new(TaskWaker(Arc::clone(task)));
    let waker = Waker::from(Arc::clone(&source));
    awaited.retain(|task| !task.is_done());
    // A body may block in its poll, and run another one on its stack.
    let outer = POLLED.replace(Some(Polled {
        waker: waker.clone(),
        awaited: std::mem::take(awaited),
        cycle: task.take_cycle(),
    }));
    let result = catch_unwind(AssertUnwindSafe(|| {
        future.as_mut().poll(&mut Context::from_waker(&waker))
    }));
    if let Some(polled) = POLLED.replace(outer) {
        // A future may leave one that it polled before alone for a while, so what is noted stays.
        *awaited = polled.awaited;
        awaited.sort_unstable_by_key(Arc::as_ptr);
        awaited.dedup_by_key(|task| Arc::as_ptr(task));
    }
    let kept = Arc::strong_count(&source) > 2;
    // Who woke the body and dropped its clone before the count was read did both before this.
    fence(Ordering::Acquire);
    if matches!(result, Ok(Poll::Pending)) && (kept || task.was_woken()) {
        for task in awaited.drain(..) {
            let waker = waker.clone();
            if let Err(callback) = Engine::add_callback(&task, Callback::new(|| waker.wake())) {
                callback.call();
            }
        }
    }
    result
}

struct TaskWaker(TaskRef<Native>);

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        Engine::awaken(&self.0);
    }
}

fn panicked(payload: &(dyn Any + Send)) -> Cause {
    let message = payload
        .downcast_ref::<&str>()
        .map(|message| (*message).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "of an unknown type".to_owned());
    Cause::Panic(message.into())
}

impl Domain for Native {
    type Body = Body;
    type Value = Value;
    type Error = Cause;
    type Callback = Callback;
    type Label = Label;

    fn engines() -> &'static Registry<Self> {
        &ENGINES
    }

    #[inline]
    fn run(&self, running: &Running<'_, Self>, body: &mut Body) -> Step<Self> {
        let done = |result: Result<Result<Value, Cause>, Box<dyn Any + Send>>| {
            Step::Done(match result {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(cause)) => Err(Trouble::Raised(cause)),
                Err(payload) => Err(Trouble::Raised(panicked(&*payload))),
            })
        };
        match body {
            Body::Once(once) => {
                let once = once.take().expect("a body without retries runs once");
                done(catch_unwind(AssertUnwindSafe(once)))
            }
            Body::Call(call) => done(catch_unwind(AssertUnwindSafe(call))),
            Body::Future(future, awaited) => {
                if running.task.take_cancel_request() {
                    return Step::Done(Err(Trouble::Cancelled));
                }
                match poll(running.task, future, awaited) {
                    Ok(Poll::Pending) if awaited.is_empty() => Step::Sleep,
                    Ok(Poll::Pending) => {
                        let until = if awaited.len() == 1 {
                            Until::All
                        } else {
                            Until::Any
                        };
                        Step::Await(awaited.clone(), until)
                    }
                    Ok(Poll::Ready(result)) => done(Ok(result)),
                    Err(payload) => done(Err(payload)),
                }
            }
        }
    }

    #[inline]
    fn session(&self, run: &mut dyn FnMut()) {
        run();
    }

    fn blocking(&self, wait: &mut dyn FnMut()) {
        wait();
    }

    fn start_thread(&self, name: String, main: Box<dyn FnOnce() + Send>) -> std::io::Result<()> {
        std::thread::Builder::new().name(name).spawn(main)?;
        Ok(())
    }

    fn call_back(callback: Callback, _task: Option<&TaskRef<Self>>) {
        callback.call();
    }

    fn report_unread(&self, _task: &TaskRef<Self>) {}

    fn nothing() -> Value {
        Box::new(())
    }

    fn loss() -> Label {
        Label::Name("loss".into())
    }
}
