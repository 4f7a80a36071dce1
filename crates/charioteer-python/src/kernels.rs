//! Bodies of a known duration, for the study of the GIL and of the smallest tasks.
//!
//! What a kernel does is spin until a monotonic clock has moved on, so that its duration is elapsed
//! time and does not depend on the processor. The clock of a part starts when the part does: the
//! time that a thread waits to be attached again belongs to no part, and that is what the study
//! measures.
//!
//! [`work`] alternates an attached part and a detached one. Where nothing is to be done detached it
//! stays attached, and where nothing is to be done attached it detaches once. [`charioteer_spin`]
//! is the same spin for callers that know nothing of Python, such as native bodies. [`spin_threads`]
//! has threads of the system do nothing else: what they reach is the machine's limit for native bodies.
//! [`spin_graph`] has
//! neither bodies nor spawns in Python: what a program in Rust would do, from an installed package.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use charioteer::native::{Runtime, Task};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::gateway::{self, Site};

/// Seconds longer than this would be a mistake, and a spinning thread hears no signal.
const LONGEST: f64 = 60.0;

fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// Spins for so many seconds, without Python. Nothing at all for what is no duration.
#[unsafe(no_mangle)]
pub extern "C" fn charioteer_spin(seconds: f64) {
    spin(Duration::try_from_secs_f64(seconds).unwrap_or_default());
}

/// The address of `charioteer_spin`, a C function that takes a double and returns nothing.
#[pyfunction]
pub fn spin_address() -> usize {
    charioteer_spin as extern "C" fn(f64) as usize
}

/// The seconds that so many threads take to spin for `seconds` so many times, each as soon as it is
/// through with the last; they are started before the clock is.
#[pyfunction]
pub fn spin_threads(py: Python<'_>, seconds: f64, spins: usize, threads: usize) -> f64 {
    gateway::detach(py, Site::Kernel, || {
        let next = AtomicUsize::new(0);
        let gate = Barrier::new(threads + 1);
        let mut start = None;
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    gate.wait();
                    gate.wait();
                    while next.fetch_add(1, Ordering::Relaxed) < spins {
                        charioteer_spin(seconds);
                    }
                });
            }
            gate.wait();
            start = Some(Instant::now());
            gate.wait();
        });
        start.map_or(0.0, |start| start.elapsed().as_secs_f64())
    })
}

/// Spins for `seconds`, the part `held` of it attached, in `slices` turns: attached, then detached.
#[pyfunction]
#[pyo3(signature = (seconds, held = 0.0, slices = 1))]
pub fn work(py: Python<'_>, seconds: f64, held: f64, slices: u32) -> PyResult<()> {
    if !(0.0..=LONGEST).contains(&seconds) {
        return Err(PyValueError::new_err(format!(
            "seconds is from 0 to {LONGEST}, not {seconds}"
        )));
    }
    if !(0.0..=1.0).contains(&held) {
        return Err(PyValueError::new_err(format!(
            "held is a share from 0 to 1, not {held}"
        )));
    }
    if slices == 0 {
        return Err(PyValueError::new_err("slices is at least 1, not 0"));
    }
    let turns = if held == 0.0 { 1 } else { slices };
    let turn = seconds / f64::from(turns);
    let attached = Duration::from_secs_f64(turn * held);
    let detached = Duration::from_secs_f64(turn * (1.0 - held));
    for _ in 0..turns {
        if attached > Duration::ZERO {
            // Even to look at the clock would hold others up.
            spin(attached);
        }
        if held < 1.0 {
            gateway::detach(py, Site::Kernel, || spin(detached));
        }
    }
    Ok(())
}

/// Runs a graph of tasks that spin for `seconds` each on a runtime of so many workers, opened for it,
/// without Python. Task `i` comes after the tasks `before[i]`, all of them earlier.
///
/// Gives the seconds from the first spawn until the runtime is closed, as the other runs of a graph
/// are timed. The calling thread spawns.
#[pyfunction]
pub fn spin_graph(
    py: Python<'_>,
    before: Vec<Vec<usize>>,
    seconds: f64,
    workers: usize,
) -> PyResult<f64> {
    if !(0.0..=LONGEST).contains(&seconds) {
        return Err(PyValueError::new_err(format!(
            "seconds is from 0 to {LONGEST}, not {seconds}"
        )));
    }
    if workers == 0 {
        return Err(PyValueError::new_err("workers is at least 1, not 0"));
    }
    for (here, needs) in before.iter().enumerate() {
        if let Some(at) = needs.iter().find(|at| **at >= here) {
            return Err(PyValueError::new_err(format!(
                "task {here} comes after {at}, which is not before it"
            )));
        }
    }
    let time = Duration::from_secs_f64(seconds);
    gateway::detach(py, Site::Kernel, || spawn_graph(&before, time, workers))
        .map_err(PyRuntimeError::new_err)
}

fn spawn_graph(before: &[Vec<usize>], time: Duration, workers: usize) -> Result<f64, String> {
    let runtime = Runtime::new(workers).map_err(|error| error.to_string())?;
    let mut tasks: Vec<Task<()>> = Vec::with_capacity(before.len());
    let start = Instant::now();
    for needs in before {
        let mut task = runtime.task();
        for at in needs {
            task = task.after(&tasks[*at]);
        }
        let spawned = task.spawn(move || spin(time));
        tasks.push(spawned.map_err(|error| error.to_string())?);
    }
    runtime
        .close()
        .map_err(|_| "a body that spins failed".to_owned())?;
    Ok(start.elapsed().as_secs_f64())
}
