//! What devices did is proved from traces: of random programs, whatever goes wrong in them.
//!
//! A program has tasks on sets of devices and on cores, with shares and memory, that pause, spawn and
//! wait for children, fail by themselves or by their work, are repeated, or are cancelled; devices are
//! lost and events late. Nothing is asserted of it but that it ends; that it kept its promises is the
//! checker's word.
#![cfg(not(loom))]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use charioteer::gang::{Alternative, Member, WHOLE};
use charioteer::machine::{Description, DeviceError, DeviceId, Kind, Machine, Time};
use charioteer::native::{Runtime, Spawn, Task, current};
use common::{prove, trace_path};
use proptest::prelude::*;

const MEMORY: u64 = 1 << 20;

#[derive(Clone, Debug)]
enum Twist {
    None,
    /// The body fails, this often.
    Raises(usize),
    /// Its work does.
    WorkFails,
    /// It is cancelled as soon as it is spawned.
    Cancelled,
    /// It waits for a child on a device.
    Waits,
    /// The same, and gives its thread up.
    Awaits,
    /// Its first device is lost after that many more operations.
    Loses(u64),
    /// The next event of its first device is late.
    Late,
}

#[derive(Clone, Debug)]
struct Plan {
    /// A device by its number, or so many of any; none is a task on cores.
    on: Result<usize, usize>,
    share: u32,
    memory: u64,
    after: Vec<usize>,
    /// How many pieces of work, of how many microseconds.
    work: (usize, u64),
    twist: Twist,
}

fn twist() -> impl Strategy<Value = Twist> {
    prop_oneof![
        30 => Just(Twist::None),
        2 => (1..3_usize).prop_map(Twist::Raises),
        1 => Just(Twist::WorkFails),
        4 => Just(Twist::Cancelled),
        3 => Just(Twist::Waits),
        2 => Just(Twist::Awaits),
        1 => (0..4_u64).prop_map(Twist::Loses),
        1 => Just(Twist::Late),
    ]
}

fn plan(gpus: usize) -> impl Strategy<Value = Plan> {
    let on = prop_oneof![
        2 => (0..gpus).prop_map(Err),
        6 => (1..=gpus.min(4)).prop_map(Ok),
        1 => (1..=gpus).prop_map(Ok),
        1 => Just(Ok(0)),
    ];
    let share = prop_oneof![
        4 => Just(WHOLE), 3 => Just(WHOLE / 2), 2 => Just(WHOLE / 3), 1 => Just(0),
    ];
    let memory = prop_oneof![4 => Just(0), 2 => Just(MEMORY / 4), 1 => Just(MEMORY / 3 + 1)];
    let after = proptest::collection::vec(1..12_usize, 0..3);
    let work = (0..3_usize, 0..80_u64);
    (on, share, memory, after, work, twist()).prop_map(|(on, share, memory, after, work, twist)| {
        Plan {
            on: on.map_or_else(Err, Ok),
            share,
            memory,
            after,
            work,
            twist,
        }
    })
}

#[derive(Clone, Debug)]
struct Program {
    gpus: usize,
    workers: usize,
    runahead: u32,
    time: Time,
    plans: Vec<Plan>,
}

fn program() -> impl Strategy<Value = Program> {
    let workers = prop_oneof![Just(0_usize), Just(1), Just(4)];
    let runahead = prop_oneof![Just(0_u32), Just(1), Just(64)];
    (
        prop_oneof![1..=4_usize, 1..=16_usize],
        workers,
        runahead,
        prop::bool::weighted(0.2),
    )
        .prop_flat_map(|(gpus, workers, runahead, is_virtual)| {
            proptest::collection::vec(plan(gpus), 1..80).prop_map(move |plans| Program {
                gpus,
                workers: if is_virtual { 0 } else { workers },
                runahead,
                time: if is_virtual {
                    Time::Virtual
                } else {
                    Time::Real
                },
                plans,
            })
        })
}

fn set(members: Vec<Member>, share: u32, memory: u64) -> Vec<Alternative> {
    vec![Alternative {
        members: members.into(),
        share,
        memory,
    }]
}

/// Puts the plan's work on the streams of the running task; `Err` where a device refuses.
fn work(machine: &Machine, plan: &Plan) -> Result<(), DeviceError> {
    let devices = machine.as_virtual().unwrap();
    for (at, (device, stream)) in current().unwrap().streams().iter().enumerate() {
        let gpu = devices.gpu(*device);
        match plan.twist {
            Twist::Loses(after) if at == 0 => gpu.lose_after(after, "on purpose"),
            Twist::Late if at == 0 => gpu.delay_event(Duration::from_micros(50)),
            _ => {}
        }
        for _ in 0..plan.work.0 {
            gpu.busy(*stream, Duration::from_micros(plan.work.1))?;
        }
        if let Twist::WorkFails = plan.twist {
            let device = *device;
            let fails = move || Err(DeviceError::Operation(device, "on purpose".into()));
            gpu.enqueue(*stream, Box::new(fails))?;
        }
    }
    Ok(())
}

fn spawn(runtime: &Spawn, machine: &Arc<Machine>, plan: &Plan, after: &[Task<()>]) -> Task<()> {
    let mut task = runtime.task();
    match plan.on {
        Ok(0) => {}
        Ok(count) => {
            let members = vec![Member::Any(Kind::Gpu); count];
            task = task.on(set(members, plan.share, plan.memory));
        }
        Err(index) => {
            let device = DeviceId::gpu(u16::try_from(index).unwrap());
            task = task.on(set(vec![Member::Device(device)], plan.share, plan.memory));
        }
    }
    for before in after {
        task = task.after(before);
    }
    let (machine, plan, handle) = (Arc::clone(machine), plan.clone(), runtime.clone());
    let child = {
        let machine = Arc::clone(&machine);
        move || {
            let inner = Arc::clone(&machine);
            let plan = Plan {
                on: Ok(1),
                share: WHOLE,
                memory: 0,
                after: Vec::new(),
                work: (1, 5),
                twist: Twist::None,
            };
            let child = set(vec![Member::Any(Kind::Gpu)], plan.share, plan.memory);
            handle
                .task()
                .on(child)
                .spawn(move || drop(work(&inner, &plan)))
        }
    };
    let attempts = AtomicUsize::new(0);
    match plan.twist {
        Twist::Awaits => task.spawn_future(async move {
            let _ = work(&machine, &plan);
            if let Ok(child) = child() {
                let _ = child.await;
            }
            let _ = work(&machine, &plan);
        }),
        Twist::Raises(times) => task.try_spawn(1, move || {
            let _ = work(&machine, &plan);
            if attempts.fetch_add(1, Ordering::Relaxed) < times {
                return Err(std::io::Error::other("on purpose"));
            }
            Ok(())
        }),
        _ => task.spawn(move || {
            let _ = work(&machine, &plan);
            if let Twist::Waits = plan.twist {
                if let Ok(child) = child() {
                    let _ = child.result();
                }
                let _ = work(&machine, &plan);
            }
        }),
    }
    .unwrap()
}

fn run(program: &Program) {
    let description = Description::uniform(4, program.gpus, MEMORY, program.time).unwrap();
    let machine = Machine::virtual_machine(description);
    let path = trace_path();
    let runtime = Runtime::builder()
        .workers(program.workers)
        .machine(Arc::clone(&machine))
        .runahead(program.runahead)
        .trace(&path)
        .open()
        .unwrap();
    let handle = runtime.handle();
    let mut tasks: Vec<Task<()>> = Vec::new();
    for plan in &program.plans {
        let mut plan = plan.clone();
        if program.workers == 0 && matches!(plan.twist, Twist::Waits) {
            // One thread has one stack: a body may get its share back below one that waits for it.
            plan.twist = Twist::Awaits;
        }
        let after: Vec<Task<()>> = plan
            .after
            .iter()
            .filter_map(|back| tasks.get(tasks.len().checked_sub(*back)?).cloned())
            .collect();
        let task = spawn(&handle, &machine, &plan, &after);
        if let Twist::Cancelled = plan.twist {
            task.cancel();
        }
        tasks.push(task);
    }
    for task in &tasks {
        let _ = task.result();
    }
    let _ = runtime.close();
    let checked = prove(&path);
    assert!(checked.tasks >= program.plans.len());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(debug_assertions) { 128 } else { 1024 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_programs_keep_every_promise(program in program()) {
        common::within_on(&program, 20, || run(&program));
    }
}
