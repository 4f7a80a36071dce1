//! An idle runtime leaves the processor alone: a test that needs a process of its own.
#![cfg(not(loom))]

mod common;

use std::time::Duration;

use charioteer::native::Runtime;
use common::within;

#[test]
fn an_idle_runtime_uses_no_processor() {
    within(20, || {
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
    });

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
