//! A quick look at the costs of the core.
use charioteer::native::{Runtime, Task, TaskSpace};
use std::time::Instant;
#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;
fn main() {
    let n = 1_000_000u32;
    for workers in [1, 2] {
        for _ in 0..3 {
            let rt = Runtime::new(workers).unwrap();
            let t = Instant::now();
            for _ in 0..n {
                rt.spawn_detached(|| {});
            }
            rt.close().unwrap();
            let outside = t.elapsed().as_nanos() as f64 / f64::from(n);
            let rt = Runtime::new(workers).unwrap();
            let h = rt.handle();
            let t = Instant::now();
            rt.spawn_detached(move || {
                for _ in 0..n {
                    h.spawn_detached(|| {});
                }
            });
            rt.close().unwrap();
            let inside = t.elapsed().as_nanos() as f64 / f64::from(n);
            let rt = Runtime::new(workers).unwrap();
            let t = Instant::now();
            let mut all: Vec<Task<()>> = Vec::with_capacity(n as usize);
            for i in 0..n as usize {
                let mut s = rt.task();
                if i >= 2 {
                    s = s.after(&all[i - 1]).after(&all[i - 2]);
                }
                all.push(s.spawn(|| {}).unwrap());
            }
            rt.close().unwrap();
            let deps = t.elapsed().as_nanos() as f64 / f64::from(n);
            println!(
                "{workers} workers: outside {outside:.0} ns, inside {inside:.0} ns, two deps {deps:.0} ns"
            );
        }
    }
    let _ = TaskSpace::<(), 1>::new("x");
}
