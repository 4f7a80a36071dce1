//! The domain of loom's models: bodies are closures, threads are loom's.
//!
//! All threads of a model run on the one thread of its test. So a thread-local of the standard
//! library is shared by them, and by no model that runs at the same time: it holds what is a static
//! elsewhere.

use std::io;

use crate::engine::{Registry, Running};
use crate::task::{Domain, Step, TaskRef, Trouble};

pub(crate) struct Model;

pub(crate) type Body = Box<dyn FnMut() -> Result<(), &'static str> + Send>;

impl Domain for Model {
    type Body = Body;
    type Value = ();
    type Error = &'static str;
    type Callback = Box<dyn FnOnce() + Send>;
    type Label = &'static str;

    fn engines() -> &'static Registry<Self> {
        std::thread_local! {
            static ENGINES: &'static Registry<Model> = Box::leak(Box::default());
        }
        ENGINES.with(|engines| *engines)
    }

    fn run(&self, _running: &Running<'_, Self>, body: &mut Body) -> Step<Self> {
        Step::Done(body().map_err(Trouble::Raised))
    }

    fn session(&self, run: &mut dyn FnMut()) {
        run();
    }

    fn blocking(&self, wait: &mut dyn FnMut()) {
        wait();
    }

    fn start_thread(&self, _name: String, main: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        loom::thread::spawn(main);
        Ok(())
    }

    fn call_back(callback: Self::Callback, _task: Option<&TaskRef<Self>>) {
        callback();
    }

    fn report_unread(&self, _task: &TaskRef<Self>) {
        unreachable!("models do not ask for it");
    }

    fn nothing() {}

    fn loss() -> &'static str {
        "loss"
    }
}

/// Explores `model`, with as many preemptions as the environment says, or three.
pub(crate) fn explore(model: impl Fn() + Send + Sync + 'static) {
    explore_at_most(usize::MAX, model);
}

/// As [`explore`], of a model too large for more than `most` preemptions.
pub(crate) fn explore_at_most(most: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 20_000;
    builder.preemption_bound = Some(builder.preemption_bound.unwrap_or(3).min(most));
    builder.check(model);
}
