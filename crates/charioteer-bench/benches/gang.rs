//! What the ledger of devices costs a task: submitted, granted, launched and complete, together.
//!
//! One iteration is one task. `device` has nobody waiting before it, on machines of 1 and 16
//! devices. `set` takes all of 8. `backlog` always has 100,000 tasks waiting, over 1, 2, 4 or 8 of
//! 8 devices.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use charioteer::gang::{Alternative, Capacity, Gang, Grant, Limits, Member, Request, Step, WHOLE};
use charioteer::machine::{DeviceId, Event, Kind, Stream};
use criterion::{Criterion, criterion_group, criterion_main};
use smallvec::SmallVec;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BACKLOG: u64 = 100_000;

fn gang(devices: u16) -> Gang<u64> {
    let capacity = |index| Capacity {
        id: DeviceId::gpu(index),
        memory: 0,
        fails_whole: false,
    };
    let devices: Vec<_> = (0..devices).map(capacity).collect();
    let limits = Limits {
        overtaking: 128,
        runahead: 64,
    };
    Gang::new(&devices, limits)
}

fn any(width: usize) -> Arc<[Alternative]> {
    let alternative = Alternative {
        members: vec![Member::Any(Kind::Gpu); width].into(),
        share: WHOLE,
        memory: 0,
    };
    [alternative].into()
}

fn submit(gang: &mut Gang<u64>, shape: &Arc<[Alternative]>) {
    let request = Request {
        alternatives: Arc::clone(shape),
        estimates: SmallVec::new(),
        priority: 0,
        prefer: SmallVec::new(),
        transfers: Box::default(),
    };
    gang.submit(0, request).expect("the devices are enough");
}

/// Launches a task; its events are complete in that order.
fn launch(gang: &mut Gang<u64>, grant: &Grant, launched: &mut VecDeque<Event>, position: u64) {
    let events: SmallVec<[Option<Event>; 8]> = grant
        .lent
        .iter()
        .map(|lent| {
            let stream = lent.stream.unwrap_or(Stream {
                device: lent.device,
                number: u32::try_from(position).expect("few streams are made"),
            });
            Some(Event { stream, position })
        })
        .collect();
    gang.launched(grant.id, &events);
    launched.extend(events.into_iter().flatten());
}

/// One task after the other over `width` of `devices`.
fn passing(criterion: &mut Criterion, name: &str, devices: u16, width: usize) {
    let (mut gang, shape) = (gang(devices), any(width));
    let (mut position, mut launched) = (0, VecDeque::new());
    criterion.bench_function(&format!("gang/{name}/{devices}"), |bencher| {
        bencher.iter(|| {
            submit(&mut gang, &shape);
            let Some(Step::Start(token, grant)) = gang.next(|_| true) else {
                unreachable!("the devices are free");
            };
            black_box(token);
            position += 1;
            launch(&mut gang, &grant, &mut launched, position);
            while let Some(event) = launched.pop_front() {
                gang.completed(event);
            }
        });
    });
}

fn backlog(criterion: &mut Criterion) {
    let shapes = [1, 2, 4, 8].map(any);
    let mut gang = gang(8);
    let (mut position, mut launched) = (0, VecDeque::new());
    // Any order that repeats late.
    let mut state = 1_u64;
    let mut shape = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        &shapes[(state >> 62) as usize]
    };
    for _ in 0..BACKLOG {
        submit(&mut gang, shape());
    }
    criterion.bench_function("gang/backlog", |bencher| {
        bencher.iter(|| {
            submit(&mut gang, shape());
            let grant = loop {
                match gang.next(|_| true) {
                    Some(Step::Start(_, grant)) => break grant,
                    Some(_) => unreachable!("every task is wanted"),
                    None => {
                        let event = launched.pop_front().expect("something runs");
                        gang.completed(event);
                    }
                }
            };
            position += 1;
            launch(&mut gang, &grant, &mut launched, position);
        });
    });
}

fn all(criterion: &mut Criterion) {
    for (name, devices, width) in [("device", 1, 1), ("device", 16, 1), ("set", 8, 8)] {
        passing(criterion, name, devices, width);
    }
    backlog(criterion);
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3));
    targets = all
}
criterion_main!(benches);
