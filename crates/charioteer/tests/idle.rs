//! An idle runtime, and an idle machine, leave the processor alone: a test that needs a process of its
//! own.
#![cfg(not(loom))]

mod common;

use std::time::Duration;

use charioteer::machine::{Description, Device, Machine, Time};
use charioteer::native::Runtime;
use common::within;

#[test]
fn an_idle_runtime_and_its_machine_use_no_processor() {
    within(20, || {
        let machine = Description::uniform(1, 3, 1, Time::Real).unwrap();
        let machine = Machine::virtual_machine(machine);
        for gpu in machine.as_virtual().unwrap().gpus() {
            let device = machine.device(gpu.info().id);
            let stream = device.create_stream().unwrap();
            gpu.enqueue(stream, Box::new(|| Ok(()))).unwrap();
            device.synchronize(device.record(stream).unwrap()).unwrap();
            gpu.busy(stream, Duration::from_secs(3600)).unwrap();
        }
        let runtime = Runtime::new(4).unwrap();
        runtime.spawn(|| ()).result().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let before = processor_time();
        std::thread::sleep(Duration::from_millis(500));
        let after = processor_time();
        if let (Some(before), Some(after)) = (before, after) {
            assert!(after - before <= 2, "{} ticks", after - before);
        }
        runtime.close().unwrap();
        // The machine's threads go with it.
        assert_ne!(threads_of_devices(), Some(0));
        drop(machine);
        while threads_of_devices().is_some_and(|threads| threads > 0) {
            std::thread::yield_now();
        }
    });

    fn threads_of_devices() -> Option<usize> {
        let names = std::fs::read_dir("/proc/self/task").ok()?.flatten();
        let names = names.flat_map(|thread| std::fs::read_to_string(thread.path().join("comm")));
        Some(
            names
                .filter(|name| name.starts_with("charioteer-gpu"))
                .count(),
        )
    }

    /// Ticks of processor time that the runtime's threads used.
    fn processor_time() -> Option<u64> {
        let mut ticks = 0;
        for thread in std::fs::read_dir("/proc/self/task").ok()?.flatten() {
            let stat = std::fs::read_to_string(thread.path().join("stat")).ok()?;
            let (head, rest) = stat.rsplit_once(") ")?;
            if head.contains("(charioteer-") {
                let fields: Vec<_> = rest.split(' ').collect();
                ticks += fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?;
            }
        }
        Some(ticks)
    }
}
