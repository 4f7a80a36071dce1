//! Traces: the events of every task are in a legal order, whatever happens to it.
#![cfg(not(loom))]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use charioteer::native::{Runtime, TaskSpace, current};
use charioteer::trace::{self, Event};
use common::{check_trace, trace_path, within};

#[test]
fn the_trace_of_everything_is_legal() {
    within(60, || {
        for workers in [0, 1, 2, 4] {
            let path = trace_path();
            let runtime = Runtime::builder()
                .workers(workers)
                .trace(&path)
                .open()
                .unwrap();
            let space = Arc::new(TaskSpace::<u64, 2>::new("grid"));
            for i in (0..12_i64).rev() {
                for j in (0..12_i64).rev() {
                    let mut task = runtime.task().priority(i32::try_from(i - j).unwrap());
                    if i > 0 {
                        task = task.after(&space.at([i - 1, j]));
                    }
                    if j > 0 {
                        task = task.after(&space.at([i, j - 1]));
                    }
                    if (i + j) % 5 == 0 {
                        task = task.share(0.5);
                    }
                    let spawn = runtime.handle();
                    task.spawn_at(&space.at([i, j]), move || {
                        let child = spawn.spawn(|| 1);
                        let other = spawn.spawn_future(async { 2 });
                        child.result().unwrap() + other.result().unwrap()
                    })
                    .unwrap();
                }
            }
            let attempts = AtomicUsize::new(0);
            let repeated = runtime
                .task()
                .name("repeated")
                .try_spawn(3, move || {
                    if attempts.fetch_add(1, Ordering::Relaxed) < 2 {
                        Err(std::fmt::Error)
                    } else {
                        Ok(())
                    }
                })
                .unwrap();
            let slow = runtime
                .task()
                .timeout(Duration::from_millis(5))
                .spawn(|| {
                    while !current().unwrap().cancel_requested() {
                        std::thread::yield_now();
                    }
                })
                .unwrap();
            let failed = runtime.spawn(|| panic!("on purpose"));
            let skipped = runtime.task().after(&failed).spawn(|| ()).unwrap();
            let spawn = runtime.handle();
            let future = runtime.spawn_future(async move {
                let inner = spawn.spawn(|| 3).await.unwrap();
                *inner.result().unwrap()
            });
            let missing = TaskSpace::<(), 1>::new("missing");
            let orphan = runtime.task().after(&missing.at([0])).spawn(|| ()).unwrap();
            let cancelled = runtime.task().after(&missing.at([0])).spawn(|| ()).unwrap();
            cancelled.cancel();
            for _ in 0..20 {
                let task = runtime.spawn(|| ());
                task.cancel();
            }
            space.at([11, 11]).result().unwrap();
            repeated.result().unwrap();
            assert!(slow.result().is_err());
            assert!(skipped.result().is_err());
            assert_eq!(*future.result().unwrap(), 3);
            drop(runtime);
            assert!(orphan.result().is_err());

            let file = trace::read(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            let tasks = check_trace(&file);
            assert_eq!(tasks, 144 * 3 + 1 + 1 + 2 + 2 + 3 + 20);
            let count = |event| file.records.iter().filter(|r| r.event == event).count();
            assert_eq!(count(Event::Retry), 2);
            assert_eq!(count(Event::Edge), 2 * 12 * 11 + 3);
            let names: Vec<_> = file.names.values().map(String::as_str).collect();
            for name in ["grid[3, 4]", "repeated", "missing[0]", "task"] {
                assert!(names.contains(&name), "{name}");
            }
        }
    });
}

/// Cancelling meets tasks in every phase.
#[test]
fn the_trace_of_races_is_legal() {
    within(60, || {
        let path = trace_path();
        let runtime = Runtime::builder().workers(2).trace(&path).open().unwrap();
        let mut tasks = Vec::new();
        for i in 0..2000_usize {
            let mut task = runtime.task();
            if i > 3 {
                task = task.after(&tasks[i - 3]);
            }
            let attempts = AtomicUsize::new(0);
            tasks.push(
                task.try_spawn(1, move || {
                    if i % 2 == 0 && attempts.fetch_add(1, Ordering::Relaxed) == 0 {
                        Err(std::fmt::Error)
                    } else {
                        Ok(())
                    }
                })
                .unwrap(),
            );
            if i % 50 == 0 {
                tasks[i - i % 3].cancel();
            }
            if i % 100 == 0 {
                // Not the whole rest of the chain is to be skipped.
                for task in &tasks {
                    let _ = task.result();
                }
                tasks.clear();
                tasks.extend((0..=i).map(|_| {
                    runtime
                        .task()
                        .try_spawn(0, || Ok::<_, std::fmt::Error>(()))
                        .unwrap()
                }));
            }
        }
        drop(tasks);
        drop(runtime);
        let file = trace::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        check_trace(&file);
    });
}
