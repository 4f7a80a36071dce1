//! What an empty task costs in the core, without Python.
//!
//! # How it is measured
//!
//! One iteration is one task, so that the times which Criterion prints are times per task. The
//! tasks come in batches of a million at most, as in the harness of Taskflow, the core's peer: a
//! batch is timed from the first spawn until the last task has its outcome, in a runtime that stays
//! open for the whole case, so that the memory of earlier batches is there to be used again.
//! Dropping what a batch kept (handles, a task space) is not in the time. Samples are equally long,
//! so each is one run of the case and their range means something.
//!
//! Who waits for detached tasks looks at the runtime's counts about every tenth of a millisecond
//! and sleeps in between: one part in a thousand of a batch, and hardly any processor time.
//!
//! The allocator is mimalloc. Threads free here what others allocated, a million times a second: an
//! allocator that makes them meet at a lock would be what is measured.

use std::hint::black_box;
use std::sync::{Arc, LazyLock};
use std::thread::sleep;
use std::time::{Duration, Instant};

use charioteer::native::{Datum, Part, Runtime, Task, TaskSpace};
use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group,
    criterion_main,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Tasks that are spawned before anybody waits for them.
const BATCH: u64 = 1_000_000;

/// How long the runtime rests before a round trip, so that its workers are asleep.
const REST: Duration = Duration::from_millis(2);

/// Times `batch` over as many batches as `tasks` need.
fn in_batches(tasks: u64, mut batch: impl FnMut(u64) -> Duration) -> Duration {
    let mut elapsed = Duration::ZERO;
    let mut left = tasks;
    while left > 0 {
        let next = left.min(BATCH);
        elapsed += batch(next);
        left -= next;
    }
    elapsed
}

/// Waits until `finished` tasks of the runtime have their outcome.
fn wait_until_finished(runtime: &Runtime, finished: u64) {
    while runtime.counts().finished < finished {
        sleep(Duration::from_micros(50));
    }
}

fn spawned_inside(runtime: &Runtime, tasks: u64) -> Duration {
    let finished = runtime.counts().finished + tasks + 1;
    let spawn = runtime.handle();
    let start = Instant::now();
    runtime.spawn_detached(move || {
        for _ in 0..tasks {
            spawn.spawn_detached(|| {});
        }
    });
    wait_until_finished(runtime, finished);
    start.elapsed()
}

fn spawned_outside(runtime: &Runtime, tasks: u64) -> Duration {
    let finished = runtime.counts().finished + tasks;
    let start = Instant::now();
    for _ in 0..tasks {
        runtime.spawn_detached(|| {});
    }
    wait_until_finished(runtime, finished);
    start.elapsed()
}

/// A square grid, each task after its upper and its left neighbour; tasks beyond the square form a
/// last, shorter row.
fn with_two_dependencies(runtime: &Runtime, tasks: u64) -> Duration {
    let tasks = usize::try_from(tasks).expect("a batch is not that large");
    let side = tasks.isqrt();
    let finished = runtime.counts().finished + tasks as u64;
    let mut grid: Vec<Task<()>> = Vec::with_capacity(tasks);
    let start = Instant::now();
    for here in 0..tasks {
        let mut task = runtime.task();
        if here >= side {
            task = task.after(&grid[here - side]);
        }
        if here % side != 0 {
            task = task.after(&grid[here - 1]);
        }
        grid.push(task.spawn(|| {}).expect("the grid has no cycle"));
    }
    wait_until_finished(runtime, finished);
    start.elapsed()
}

fn chained_in_a_space(runtime: &Runtime, tasks: u64) -> Duration {
    let tasks = i64::try_from(tasks).expect("a batch is not that large");
    let space = TaskSpace::<(), 1>::new("chain");
    let start = Instant::now();
    for index in 0..tasks {
        let mut task = runtime.task();
        if index > 0 {
            task = task.after(&space.at([index - 1]));
        }
        task.spawn_at(&space.at([index]), || {})
            .expect("each name is spawned once");
    }
    space
        .at([tasks - 1])
        .result()
        .expect("the bodies do not fail");
    start.elapsed()
}

/// Each task reads what the one before it wrote, and writes.
fn chained_by_data(runtime: &Runtime, tasks: u64) -> Duration {
    let (first, second) = (Datum::new("A", &[1]).whole(), Datum::new("B", &[1]).whole());
    let writes = [second.clone(), first.clone()];
    by_data(runtime, tasks, &[first, second].into(), &writes.into())
}

/// Tiles of an array, each of which one task at a time uses.
const TILES: u64 = 1 << 16;

/// The tiles of two arrays, made once: that takes longer than to run short batches of tasks on them.
static ARRAYS: LazyLock<[Arc<[Part]>; 2]> = LazyLock::new(|| {
    ["A", "B"].map(|label| {
        let grid = Datum::new(label, &[TILES]).grid(&[1]);
        (0..TILES).map(|tile| grid.tile(&[tile])).collect()
    })
});

/// Each task reads a tile that nobody writes, and writes one that no other task uses meanwhile.
fn independent_with_data(runtime: &Runtime, tasks: u64) -> Duration {
    let [reads, writes] = &*ARRAYS;
    let mut elapsed = Duration::ZERO;
    let mut left = tasks;
    while left > 0 {
        let next = left.min(TILES);
        elapsed += by_data(runtime, next, reads, writes);
        left -= next;
    }
    elapsed
}

/// Spawns tasks inside a task, each with one read and one write, of these parts in turn.
fn by_data(runtime: &Runtime, tasks: u64, reads: &Arc<[Part]>, writes: &Arc<[Part]>) -> Duration {
    let finished = runtime.counts().finished + tasks + 1;
    let spawn = runtime.handle();
    let (reads, writes) = (Arc::clone(reads), Arc::clone(writes));
    let start = Instant::now();
    runtime.spawn_detached(move || {
        let parts = reads.iter().zip(&*writes).cycle();
        for ((reads, writes), _) in parts.zip(0..tasks) {
            let task = spawn.task().reads(reads).writes(writes);
            task.spawn_detached(|| {})
                .expect("its parent has no accesses");
        }
    });
    wait_until_finished(runtime, finished);
    start.elapsed()
}

/// From the first spawn until the runtime, opened for the batch, is closed: how the Python
/// benchmarks are timed. Its threads start with empty heaps, so that the memory of all tasks that
/// are pending at once is new to the process each time.
fn until_closed(workers: usize, tasks: u64) -> Duration {
    let runtime = Runtime::new(workers).expect("the system gives threads");
    let start = Instant::now();
    for _ in 0..tasks {
        runtime.spawn_detached(|| {});
    }
    runtime.close().expect("no body fails");
    start.elapsed()
}

fn round_trip(runtime: &Runtime) -> Duration {
    sleep(REST);
    let start = Instant::now();
    let task = runtime.spawn(|| black_box(1));
    let result = task.result().copied();
    let elapsed = start.elapsed();
    assert_eq!(result.expect("the body does not fail"), 1);
    elapsed
}

/// One case, with one worker and with two.
fn case(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    mut run: impl FnMut(&Runtime, u64) -> Duration,
) {
    for workers in [1, 2] {
        let runtime = Runtime::new(workers).expect("the system gives threads");
        group.bench_function(BenchmarkId::new(name, workers), |bencher| {
            bencher.iter_custom(|tasks| run(&runtime, tasks));
        });
        runtime.close().expect("no body fails");
    }
}

fn core(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("core");
    group
        .sampling_mode(SamplingMode::Flat)
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4))
        .throughput(Throughput::Elements(1));
    for (name, batch) in [
        ("inside", spawned_inside as fn(&Runtime, u64) -> Duration),
        ("outside", spawned_outside),
        ("dependent", with_two_dependencies),
        ("space", chained_in_a_space),
        ("data-chain", chained_by_data),
        ("data", independent_with_data),
    ] {
        case(&mut group, name, |runtime, tasks| {
            in_batches(tasks, |tasks| batch(runtime, tasks))
        });
    }
    for workers in [1, 2] {
        group.bench_function(BenchmarkId::new("closed", workers), |bencher| {
            bencher.iter_custom(|tasks| in_batches(tasks, |tasks| until_closed(workers, tasks)));
        });
    }
    case(&mut group, "round-trip", |runtime, tasks| {
        (0..tasks).map(|_| round_trip(runtime)).sum()
    });
    group.finish();
}

criterion_group!(benches, core);
criterion_main!(benches);
