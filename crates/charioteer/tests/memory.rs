//! What is done is not kept: resident memory stays flat. A test that needs a process of its own.
#![cfg(not(loom))]

mod common;

use std::time::Duration;

use charioteer::machine::{Description, Device, Machine, Time};
use charioteer::native::{Runtime, TaskSpace};
use common::within;

/// Resident memory in KiB, where the system tells.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Repeats `work`, and asserts that the later half of the repetitions took no more memory.
fn stays_flat(what: &str, mut work: impl FnMut()) {
    let mut repeat = || (0..4).for_each(|_| work());
    repeat();
    let Some(before) = resident() else { return };
    repeat();
    let after = resident().unwrap();
    assert!(
        after < before + 6 * 1024,
        "{what}: {before} KiB resident, then {after} KiB"
    );
}

#[test]
fn memory_stays_flat() {
    within(300, || {
        // The bound keeps the memory of what is pending at once the same each time.
        let runtime = Runtime::builder()
            .workers(2)
            .max_pending(5_000)
            .open()
            .unwrap();
        let quiet = || {
            while runtime.counts().spawned != runtime.counts().finished {
                std::thread::yield_now();
            }
        };
        stays_flat("anonymous tasks", || {
            for _ in 0..200_000 {
                runtime.spawn_detached(|| ());
            }
            quiet();
        });
        stays_flat("tasks with long limits", || {
            for _ in 0..50_000 {
                let task = runtime.task().timeout(Duration::from_secs(3600));
                task.spawn(|| ()).unwrap();
            }
            quiet();
        });
        stays_flat("rotating spaces, spawned in reverse", || {
            for _ in 0..10 {
                let space = TaskSpace::<(), 1>::new("T");
                for i in (0..4000).rev() {
                    let task = runtime.task().after(&space.at([i]));
                    task.spawn_at(&space.at([i + 1]), || ()).unwrap();
                }
                runtime.task().spawn_at(&space.at([0]), || ()).unwrap();
                quiet();
            }
        });
        stays_flat("cancelled tasks", || {
            let space = TaskSpace::<(), 1>::new("T");
            for _ in 0..4_000 {
                let task = runtime.task().after(&space.at([0])).spawn(|| ()).unwrap();
                assert!(task.cancel());
            }
            runtime.task().spawn_at(&space.at([0]), || ()).unwrap();
            quiet();
        });
        stays_flat("waits that were given up", || {
            let space = TaskSpace::<(), 1>::new("T");
            for _ in 0..2000 {
                let never = space.at([0]);
                assert!(!never.wait(Some(Duration::ZERO)).unwrap());
            }
            runtime.task().spawn_at(&space.at([0]), || ()).unwrap();
            quiet();
        });
        runtime.close().unwrap();

        let machine = Description::uniform(1, 1, 1 << 30, Time::Real).unwrap();
        let machine = Machine::virtual_machine(machine);
        let gpu = &machine.as_virtual().unwrap().gpus()[0];
        let [first, second] = [(); 2].map(|()| gpu.create_stream().unwrap());
        stays_flat("work of a virtual device", || {
            for _ in 0..100 {
                for _ in 0..100 {
                    let memory = gpu.allocate(4096, first).unwrap();
                    gpu.enqueue(first, Box::new(|| Ok(()))).unwrap();
                    let event = gpu.record(first).unwrap();
                    gpu.wait(second, event).unwrap();
                    gpu.when_complete(event, Box::new(|result| result.unwrap()));
                    gpu.free(memory, first).unwrap();
                }
                gpu.synchronize(gpu.record(second).unwrap()).unwrap();
            }
        });
    });
}
