//! Large graphs: nothing is quadratic, nothing needs the stack, nothing is kept.
#![cfg(not(loom))]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use charioteer::native::{Runtime, SpawnError, Task, TaskSpace};
use common::within;

/// Spawns a chain from its end to its beginning; gives how long that took.
fn reversed_chain(length: i64) -> Duration {
    let runtime = Runtime::new(1).unwrap();
    let space = TaskSpace::<i64, 1>::new("T");
    let start = Instant::now();
    for i in (1..length).rev() {
        let before = space.at([i - 1]);
        runtime
            .task()
            .after(&before.clone())
            .spawn_at(&space.at([i]), move || before.result().unwrap() + 1)
            .unwrap();
    }
    runtime.task().spawn_at(&space.at([0]), || 0).unwrap();
    let last = space.at([length - 1]);
    assert_eq!(*last.result().unwrap(), length - 1);
    let time = start.elapsed();
    runtime.close().unwrap();
    time
}

#[test]
fn a_chain_that_is_spawned_in_reverse_is_linear() {
    within(120, || {
        // Ten times as much, not a hundred; the least of three, for the machine is shared.
        let least = |length| (0..3).map(|_| reversed_chain(length)).min().unwrap();
        let (short, long) = (least(10_000), least(100_000));
        assert!(long < 40 * short, "{short:?} for a tenth, {long:?} for all");
    });
}

#[test]
fn a_fan_in_of_a_hundred_thousand() {
    within(120, || {
        for workers in [1, 2] {
            let runtime = Runtime::new(workers).unwrap();
            let tasks: Vec<Task<u64>> = (0..100_000).map(|i| runtime.spawn(move || i)).collect();
            let all = tasks.clone();
            let sum = runtime
                .task()
                .after_all(&tasks)
                .spawn(move || all.iter().map(|task| task.result().unwrap()).sum::<u64>())
                .unwrap();
            assert_eq!(*sum.result().unwrap(), 4_999_950_000);
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_fan_out_of_a_hundred_thousand_to_one_that_is_spawned_last() {
    within(120, || {
        let runtime = Runtime::new(2).unwrap();
        let space = TaskSpace::<u64, 1>::new("T");
        let first = space.at([0]);
        let tasks: Vec<_> = (0..100_000_u64)
            .map(|i| {
                let before = first.clone();
                runtime
                    .task()
                    .after(&first)
                    .spawn(move || before.result().unwrap() + i)
                    .unwrap()
            })
            .collect();
        runtime.task().spawn_at(&first, || 1).unwrap();
        assert_eq!(*tasks[99_999].result().unwrap(), 100_000);
        runtime.close().unwrap();
    });
}

#[test]
fn a_lattice_of_a_thousand_by_a_thousand() {
    within(300, || {
        let runtime = Runtime::new(2).unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        let side = 1000;
        let mut above: Vec<Task<()>> = Vec::new();
        for _ in 0..side {
            let mut row: Vec<Task<()>> = Vec::with_capacity(side);
            for j in 0..side {
                let mut task = runtime.task();
                if let Some(above) = above.get(j) {
                    task = task.after(above);
                }
                if let Some(left) = row.last() {
                    task = task.after(left);
                }
                let count = Arc::clone(&count);
                let body = move || {
                    count.fetch_add(1, Ordering::Relaxed);
                };
                row.push(task.spawn(body).unwrap());
            }
            above = row;
        }
        above[side - 1].result().unwrap();
        assert_eq!(count.load(Ordering::Relaxed), side * side);
        runtime.close().unwrap();
    });
}

#[test]
fn a_million_handles_dropped_unread() {
    within(120, || {
        let runtime = Runtime::new(2).unwrap();
        let payload = Arc::new(());
        for _ in 0..1_000_000 {
            let mine = Arc::clone(&payload);
            drop(runtime.spawn(move || mine));
        }
        runtime.close().unwrap();
        assert_eq!(Arc::strong_count(&payload), 1);
    });
}

/// A cycle is found from its smaller side, however much hangs on the other.
#[test]
fn a_small_cycle_in_a_large_graph_is_found_at_once() {
    within(120, || {
        let runtime = Runtime::new(1).unwrap();
        let space = TaskSpace::<(), 1>::new("T");
        let (a, b) = (space.at([-1]), space.at([-2]));
        runtime.task().after(&b).spawn_at(&a, || ()).unwrap();
        for i in 0..100_000 {
            let mut task = runtime.task().after(&a);
            if i > 0 {
                task = task.after(&space.at([i - 1]));
            }
            task.spawn_at(&space.at([i]), || ()).unwrap();
        }
        let start = Instant::now();
        let refused = runtime.task().after(&a).spawn_at(&b, || ());
        assert!(matches!(refused, Err(SpawnError::Cycle(names)) if names.len() == 3));
        assert!(start.elapsed() < Duration::from_secs(2));
        runtime.task().spawn_at(&b, || ()).unwrap();
        runtime.close().unwrap();
    });
}
