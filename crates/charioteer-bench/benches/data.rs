//! What accesses to data cost: to find whom one comes after, by how many are live, and to prove from a
//! trace that they were ordered.
//!
//! # Look-ups
//!
//! A task is held, and so many others wait for it, each with a part of one datum that it writes: so many
//! accesses are live. Timed is the spawn of tasks that read one of these parts each, in random order, and
//! so come after one writer: the whole spawn, of which the look-up is a part. As many are spawned at once among
//! few live accesses as among many, since the first ones cost more. *Tiles* are those of one
//! grid; *boxes* have random places and sizes, and a datum that grows with their number. The readers of
//! boxes are those away from the edges, so that they come after equally many: how many is said.
//!
//! # Order
//!
//! The proof of a trace of a million tasks with two reads and one write each, of the tiles of an array, which
//! is read before: of tasks on cores, and of tasks on four virtual GPUs, of which it is also proved that the
//! data were there. One iteration is one task.
//!
//! # Plans
//!
//! Tasks on a device read one of 4,096 tiles and update another, both at random. Timed is what the store
//! does for each, from its plan to its launch, without what the device itself does: all tiles *are there*, and
//! nobody waits for anything; the same where each is *announced* before; and where the device is *full*
//! of tiles, so that it is known who would go first.

use std::collections::{HashMap, HashSet};
use std::hint::black_box;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use charioteer::data::store::{Storage, Store, Touch, Want};
use charioteer::gang::{Alternative, Member, WHOLE};
use charioteer::machine::{Description, DeviceId, Kind, Machine, Time};
use charioteer::native::{Datum, Part, Runtime};
use charioteer::region::{Region, Span};
use charioteer::trace;
use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Readers that are spawned while the writers wait. Those who set out after a hundred thousand writers find
/// nothing of what spawning takes in the processor's caches, and the first thousand are slower for that.
const READERS: u64 = 10_000;

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// What is written, and which of that may be read.
struct Parts {
    written: Vec<Part>,
    read: Vec<usize>,
}

fn tiles(live: u64) -> Parts {
    let grid = Datum::new("A", &[live * 8]).grid(&[8]);
    let written: Vec<Part> = (0..live).map(|tile| grid.tile(&[tile])).collect();
    let read = (0..written.len()).collect();
    Parts { written, read }
}

/// On a square, one box on each field of 16 by 16, of 1 to 24 elements an axis.
fn boxes(live: u64) -> Parts {
    let side = live.isqrt() + 1;
    let extent = side * 16;
    let datum = Datum::new("A", &[extent, extent]);
    let mut random = Random(88_172_645_463_325_252);
    let written: Vec<Part> = (0..live)
        .map(|number| {
            let mut span = |field: u64| {
                let start = field * 16 + random.below(16);
                Span::range(start, (start + 1 + random.below(24)).min(extent))
            };
            datum.part(Region::new([span(number / side), span(number % side)]))
        })
        .collect();
    // A box reaches the two fields behind its own. The last row of fields is not full.
    let inner = |at: u64, end: u64| at >= 2 && at + 2 < end;
    let read = (0..live)
        .filter(|number| inner(number / side, live / side) && inner(number % side, side))
        .map(|number| usize::try_from(number).expect("an index"))
        .collect();
    let parts = Parts { written, read };
    println!(
        "look-up/boxes/{live}: {:.2} predecessors a reader",
        predecessors(&parts)
    );
    parts
}

/// How many tasks a reader comes after, on average.
fn predecessors(parts: &Parts) -> f64 {
    let cells = |part: &Part| {
        let [rows, columns] = part.region().spans() else {
            unreachable!("boxes have two axes")
        };
        let (rows, columns) = (rows.start()..rows.end(), columns.start()..columns.end());
        rows.flat_map(move |row| columns.clone().map(move |column| (row, column)))
    };
    let mut last = HashMap::new();
    for (number, part) in parts.written.iter().enumerate() {
        last.extend(cells(part).map(|cell| (cell, number)));
    }
    let writers = |&number: &usize| {
        let of: HashSet<usize> = cells(&parts.written[number])
            .map(|cell| last[&cell])
            .collect();
        of.len()
    };
    let sum: usize = parts.read.iter().map(writers).sum();
    sum as f64 / parts.read.len() as f64
}

fn time(parts: &Parts, rounds: u64) -> Duration {
    let mut elapsed = Duration::ZERO;
    let mut random = Random(7);
    let readers: Vec<&Part> = (0..READERS)
        .map(|_| {
            parts.read[usize::try_from(random.below(parts.read.len() as u64)).expect("an index")]
        })
        .map(|number| &parts.written[number])
        .collect();
    let whole = rounds.div_ceil(READERS);
    for _ in 0..whole {
        let runtime = Runtime::new(1).expect("the system gives threads");
        let (open, gate) = mpsc::channel::<()>();
        let held = runtime.spawn(move || {
            let _ = gate.recv();
        });
        for part in &parts.written {
            let task = runtime.task().after(&held).writes(part);
            task.spawn_detached(|| {}).expect("it has no cycle");
        }
        let start = Instant::now();
        for part in &readers {
            let task = runtime.task().reads(black_box(part));
            task.spawn_detached(|| {}).expect("it has no cycle");
        }
        elapsed += start.elapsed();
        open.send(()).expect("it waits");
        runtime.close().expect("no body fails");
    }
    elapsed.mul_f64(rounds as f64 / (whole * READERS) as f64)
}

fn look_up(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("look-up");
    // A sample is a few times all readers: what is not timed takes ten times as long.
    group
        .sample_size(10)
        .sampling_mode(SamplingMode::Flat)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_millis(200))
        .throughput(Throughput::Elements(1));
    for (name, make) in [("tiles", tiles as fn(u64) -> Parts), ("boxes", boxes)] {
        for live in [100, 100_000] {
            let mut parts = None;
            group.bench_function(BenchmarkId::new(name, live), |bencher| {
                let parts: &Parts = parts.get_or_insert_with(|| make(live));
                bencher.iter_custom(|rounds| time(parts, rounds));
            });
        }
    }
    group.finish();
}

/// Tasks of the trace.
const TASKS: u64 = 1_000_000;

/// The trace of tasks on cores, or on that many devices.
fn trace_of(gpus: usize) -> PathBuf {
    let name = format!("charioteer-order-{gpus}-{}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let builder = Runtime::builder().workers(1).trace(&path);
    let runtime = if gpus == 0 {
        builder.open()
    } else {
        let description = Description::uniform(1, gpus, 1 << 20, Time::Real);
        let description = description.expect("it is a machine");
        builder
            .machine(Machine::virtual_machine(description))
            .open()
    };
    let runtime = runtime.expect("the system gives threads");
    let elements = vec![0_u64; 64 * 64];
    let address = elements.as_ptr() as usize;
    let grid = Datum::stored("A", &[64, 64], 8, address, Box::new(elements)).grid(&[1, 1]);
    let alternative = Alternative {
        members: vec![Member::Any(Kind::Gpu)].into(),
        share: WHOLE,
        memory: 0,
    };
    let set: Arc<[Alternative]> = Arc::from([alternative]);
    let mut random = Random(7);
    for _ in 0..TASKS {
        let mut tile = || grid.tile(&[random.below(64), random.below(64)]);
        let (first, second, third) = (tile(), tile(), tile());
        let same = |part: &Part| part.region() == third.region();
        if same(&first) || same(&second) {
            continue;
        }
        let task = runtime.task().reads(&first).reads(&second).updates(&third);
        let task = if gpus == 0 {
            task
        } else {
            task.on(Arc::clone(&set))
        };
        task.spawn_detached(|| {}).expect("it has no cycle");
    }
    runtime.close().expect("no body fails");
    path
}

fn order(criterion: &mut Criterion) {
    for (name, gpus) in [("cores", 0), ("devices", 4)] {
        prove(criterion, name, gpus);
    }
}

fn prove(criterion: &mut Criterion, name: &str, gpus: usize) {
    let mut group = criterion.benchmark_group("order");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(5))
        .throughput(Throughput::Elements(1));
    let mut path = None;
    group.bench_function(name, |bencher| {
        let path: &PathBuf = path.get_or_insert_with(|| trace_of(gpus));
        bencher.iter_custom(|rounds| {
            let whole = rounds.div_ceil(TASKS);
            let mut elapsed = Duration::ZERO;
            for _ in 0..whole {
                let start = Instant::now();
                let file = trace::read(path).expect("the trace is complete");
                let checked = trace::check_data(&file).expect("it has accesses");
                elapsed += start.elapsed();
                let (moves, _) = checked.moves.expect("the version has copies");
                assert!(checked.order.violations.is_empty() && moves.violations.is_empty());
            }
            elapsed.mul_f64(rounds as f64 / (whole * TASKS) as f64)
        });
    });
    group.finish();
    if let Some(path) = path {
        std::fs::remove_file(path).expect("it was read");
    }
}

/// Tiles of an array along each axis, and elements of a tile along each.
const TILES: u64 = 64;
const TILE: u64 = 4;

fn plan(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .throughput(Throughput::Elements(1));
    for (name, announced, full) in [
        ("there", false, false),
        ("announced", true, false),
        ("full", true, true),
    ] {
        let side = TILES * TILE;
        let bytes = side * side * 8;
        let buffer = vec![0_u8; usize::try_from(bytes).expect("it is small")];
        let address = buffer.as_ptr() as u64;
        let storage = Storage::new(1, "A", &[side, side], 8, address, Box::new(buffer));
        let regions: Vec<Region> = (0..TILES * TILES)
            .map(|tile| {
                let span = |at: u64| Span::range(at * TILE, (at + 1) * TILE);
                Region::new([span(tile / TILES), span(tile % TILES)])
            })
            .collect();
        // Where it is full the last tile drove another one away.
        let memory = if full { bytes - TILE * TILE * 8 } else { bytes };
        let description = Description::uniform(1, 1, memory, Time::Virtual);
        let machine = Machine::virtual_machine(description.expect("it is a machine"));
        let store = Store::new(machine.clone());
        let device = DeviceId::gpu(0);
        let stream = machine.device(device).create_stream().expect("it is there");
        let event = machine.device(device).record(stream).expect("it is there");
        let want = |region, touch| Want {
            storage: &storage,
            region,
            touch,
        };
        for region in &regions {
            let wants = [want(region, Touch::Update)];
            let held = store.ensure(0, stream, &wants, 0).expect("there is room");
            store.launched([(held, Some(event))]);
        }
        while machine.as_virtual().expect("it is").clock().advance() {}
        // Without the one that was driven away.
        let regions = &regions[if full { 1.. } else { 0.. }];
        let missing = |region| store.missing(&[want(region, Touch::Read)], device);
        let regions: Vec<&Region> = regions
            .iter()
            .filter(|region| missing(region).time.is_zero())
            .collect();
        let mut random = Random(88_172_645_463_325_252);
        let mut number = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                number += 1;
                let mut tile = || regions[random.below(regions.len() as u64) as usize];
                let wants = [want(tile(), Touch::Read), want(tile(), Touch::Update)];
                if announced {
                    store.announce(number, &wants);
                }
                let held = store
                    .ensure(number, stream, black_box(&wants), 0)
                    .expect("it is there");
                store.launched([(held, Some(event))]);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, look_up, order, plan);
criterion_main!(benches);
