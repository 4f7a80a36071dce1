//! What the tests share: a time limit that aborts, and the checker of traces.

#![allow(dead_code, reason = "each test binary uses a part")]

pub mod parts;

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use charioteer::trace::{self, Checked, Event, TraceFile};

/// Runs a test that may hang. After so many seconds the threads of the process are listed, and it is
/// aborted.
pub fn within<R>(seconds: u64, test: impl FnOnce() -> R) -> R {
    within_on("", seconds, test)
}

/// As [`within`], and says what the test ran on.
pub fn within_on<R>(input: impl std::fmt::Debug, seconds: u64, test: impl FnOnce() -> R) -> R {
    let input = format!("{input:#?}");
    let (done, expired) = mpsc::channel::<()>();
    let name = std::thread::current()
        .name()
        .unwrap_or("unnamed")
        .to_owned();
    let watchdog = std::thread::Builder::new()
        .name("watchdog".into())
        .spawn(move || {
            let limit = Duration::from_secs(seconds);
            if expired.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                // Not by a macro: what those print in a test is kept until it ends.
                let mut out = std::io::stderr().lock();
                let _ = writeln!(
                    out,
                    "{name}: not done after {seconds} s, on {input}; the threads are"
                );
                list_threads(&mut out);
                std::process::abort();
            }
        })
        .expect("the watchdog starts");
    let result = test();
    drop(done);
    watchdog.join().expect("the watchdog ends");
    result
}

/// Name, state and kernel function of each thread, where the system tells.
fn list_threads(out: &mut impl Write) {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else {
        return;
    };
    for thread in threads.flatten() {
        let read = |what: &str| {
            std::fs::read_to_string(thread.path().join(what)).unwrap_or_else(|_| "?".into())
        };
        let stat = read("stat");
        let state = stat.rsplit(") ").next().and_then(|rest| rest.get(..1));
        let _ = writeln!(
            out,
            "  {:>8} {:<16} {} in {}",
            thread.file_name().to_string_lossy(),
            read("comm").trim(),
            state.unwrap_or("?"),
            read("wchan").trim(),
        );
    }
}

/// How many threads the process has, where the system tells.
pub fn threads() -> Option<usize> {
    // A listing of /proc/self/task skips living threads when others end beside it.
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let number = status
        .lines()
        .find_map(|line| line.strip_prefix("Threads:"))?;
    number.trim().parse().ok()
}

/// A path for a trace that no other test has.
pub fn trace_path() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    std::env::temp_dir().join(format!(
        "charioteer-{}-{}.trace",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    ))
}

/// Reads the trace of a runtime that is closed, and removes the file.
pub fn take_trace(path: &std::path::Path) -> TraceFile {
    let file = trace::read(path).expect("the trace is complete");
    std::fs::remove_file(path).expect("it was just read");
    file
}

/// That a trace keeps every promise.
pub fn prove(file: &TraceFile) -> Checked {
    let checked = trace::check(file).expect("it has evidence");
    let violations: Vec<String> = checked.violations.iter().map(ToString::to_string).collect();
    assert!(violations.is_empty(), "{violations:#?}");
    checked
}

/// Proves of a complete trace that the events of every task are in a legal order, that a task with
/// predecessors did not start before they were done, and that no thread ran two bodies at once
/// unless one lay on top of the other. Gives the number of tasks.
pub fn check_trace(trace: &TraceFile) -> usize {
    #[derive(Clone, Copy, PartialEq, Debug)]
    enum State {
        New,
        Spawned,
        Ready,
        Running(u32),
        Suspended,
        Ended,
        Over,
    }
    assert!(trace.records.is_sorted_by_key(|record| record.time));
    let mut states: HashMap<u64, State> = HashMap::new();
    let mut predecessors: HashMap<u64, Vec<u64>> = HashMap::new();
    let mut stacks: HashMap<u32, Vec<u64>> = HashMap::new();
    for record in &trace.records {
        let task = record.task;
        let state = states.get(&task).copied().unwrap_or(State::New);
        let next = match (state, record.event) {
            (State::New, Event::Spawn) => State::Spawned,
            (State::Spawned, Event::Edge) => {
                predecessors.entry(task).or_default().push(record.other);
                State::Spawned
            }
            (State::Spawned | State::Suspended, Event::Ready) => State::Ready,
            (State::Ready, Event::Start) => {
                for predecessor in predecessors.get(&task).into_iter().flatten() {
                    assert_eq!(
                        states.get(predecessor),
                        Some(&State::Over),
                        "task {task} started before {predecessor}, which it depends on, was done"
                    );
                }
                stacks.entry(record.thread).or_default().push(task);
                State::Running(record.thread)
            }
            (State::Running(thread), Event::Suspend) => {
                let top = stacks.get_mut(&thread).and_then(Vec::pop);
                assert_eq!(top, Some(task), "only the body on top of a stack runs");
                State::Suspended
            }
            (State::Running(thread), Event::End) => {
                let top = stacks.get_mut(&thread).and_then(Vec::pop);
                assert_eq!(top, Some(task), "only the body on top of a stack runs");
                State::Ended
            }
            // A body that went elsewhere ends there.
            (State::Suspended, Event::End) => State::Ended,
            (State::Ready, Event::Carry) => State::Ended,
            (State::Ended, Event::Retry) => State::Spawned,
            (State::Ended, Event::Done | Event::Failed) => State::Over,
            // Skipped, cancelled, or never spawned.
            (State::New | State::Spawned | State::Ready, Event::Failed) => State::Over,
            (state, event) => panic!("task {task}: {} while {state:?}", event.name()),
        };
        states.insert(task, next);
    }
    for (task, state) in &states {
        assert_eq!(*state, State::Over, "task {task} has no end");
        assert!(trace.names.contains_key(task), "task {task} has no name");
    }
    states.len()
}
