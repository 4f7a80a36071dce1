//! The cost of a spawn inside a task, by how many are pending.
use charioteer::native::Runtime;
use std::time::Instant;
#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;
fn main() {
    let rt = Runtime::new(1).unwrap();
    for n in [100u32, 1000, 10_000, 100_000, 1_000_000] {
        for _ in 0..3 {
            let reps = 2_000_000 / n;
            let t = Instant::now();
            for _ in 0..reps {
                let h = rt.handle();
                let before = rt.counts().finished;
                rt.spawn(move || {
                    for _ in 0..n {
                        h.spawn_detached(|| {});
                    }
                })
                .result()
                .unwrap();
                while rt.counts().finished < before + u64::from(n) {
                    std::thread::yield_now();
                }
            }
            println!(
                "{n} pending: {:.0} ns a task",
                t.elapsed().as_nanos() as f64 / f64::from(n * reps)
            );
        }
    }
}
