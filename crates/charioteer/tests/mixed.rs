//! Sets of cores and devices together: what they hold, what orders them, and that nobody starves.
#![cfg(not(loom))]

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use charioteer::gang::{Alternative, Member, WHOLE};
use charioteer::machine::{Description, DeviceId, Kind, Machine, Time};
use charioteer::mapping::policy::Mapper;
use charioteer::mapping::{Choice, On};
use charioteer::native::{Place, Runtime, SpawnError, Task, current};
use common::{prove, take_trace, trace_path, within};

const CORE: Member = Member::Any(Kind::Cpu);
const GPU: Member = Member::Any(Kind::Gpu);

fn machine(gpus: usize, time: Time) -> Arc<Machine> {
    Machine::virtual_machine(Description::uniform(4, gpus, 1 << 30, time).unwrap())
}

fn open(machine: &Arc<Machine>, workers: usize) -> Runtime {
    let builder = Runtime::builder().workers(workers);
    builder.machine(Arc::clone(machine)).open().unwrap()
}

fn set(members: &[Member], share: u32) -> Vec<Alternative> {
    vec![Alternative {
        members: members.into(),
        share,
        memory: 0,
    }]
}

/// Keeps every stream of the running task busy for so long.
fn busy(machine: &Machine, time: Duration) {
    for (device, stream) in current().unwrap().streams() {
        let gpu = machine.as_virtual().unwrap().gpu(device);
        gpu.busy(stream, time).unwrap();
    }
}

/// Occupies every worker until the flag is set.
fn occupy(runtime: &Runtime, workers: u16) -> (Task<()>, Arc<AtomicBool>) {
    let (begun, free) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let (tells, waits) = (Arc::clone(&begun), Arc::clone(&free));
    let task = runtime.task().cores(workers).spawn(move || {
        tells.store(true, Ordering::SeqCst);
        while !waits.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    });
    while !begun.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    (task.unwrap(), free)
}

#[test]
fn a_body_holds_what_its_set_says_in_the_order_of_the_set() {
    within(60, || {
        for workers in [0, 3] {
            let machine = machine(3, Time::Real);
            let runtime = open(&machine, workers);
            let named = Member::Device(DeviceId::gpu(1));
            let task = runtime.task().on(set(&[CORE, named, CORE, GPU], WHOLE));
            let held = task.spawn(|| current().unwrap().places().to_vec()).unwrap();
            let held = held.result().unwrap().clone();
            let [
                Place::Core(first),
                Place::Device(one, _),
                Place::Core(second),
                Place::Device(other, _),
            ] = held[..]
            else {
                panic!("{held:?}");
            };
            assert!(first != second, "{held:?}");
            assert!(one == DeviceId::gpu(1) && other != one, "{held:?}");
            runtime.close().unwrap();
        }
    });
}

#[test]
fn what_no_runtime_can_serve_is_refused() {
    let machine = machine(2, Time::Real);
    let runtime = open(&machine, 2);
    let refusal =
        |alternatives: Vec<Alternative>| match runtime.task().on(alternatives).spawn(|| ()) {
            Err(SpawnError::Devices(reasons)) => reasons.concat(),
            other => panic!("{other:?}"),
        };
    assert!(
        refusal(set(&[CORE, CORE, CORE, GPU], WHOLE)).contains("3 of kind cpu wanted, 2 there")
    );
    assert!(refusal(set(&[CORE, GPU, GPU, GPU], WHOLE)).contains("3 of kind gpu wanted, 2 there"));
    assert!(refusal(set(&[CORE], WHOLE)).contains("no device"));
    let both = [set(&[GPU], WHOLE), set(&[CORE, CORE, CORE, GPU], WHOLE)].concat();
    assert!(
        refusal(both).contains("3 of kind cpu wanted"),
        "one alternative is too many"
    );
    runtime.close().unwrap();
}

#[test]
fn the_body_begins_when_its_predecessors_are_complete_and_its_successors_run_ahead() {
    within(60, || {
        let machine = machine(2, Time::Real);
        let runtime = open(&machine, 2);
        for _ in 0..20 {
            let inner = Arc::clone(&machine);
            let one = Member::Device(DeviceId::gpu(0));
            let before = runtime.task().on(set(&[one], WHOLE));
            let before = before
                .spawn(move || busy(&inner, Duration::from_millis(2)))
                .unwrap();
            let (inner, awaited) = (Arc::clone(&machine), before.clone());
            let mixed = runtime.task().on(set(&[CORE, GPU], WHOLE)).after(&before);
            let gate = Arc::new(AtomicBool::new(false));
            let opened = Arc::clone(&gate);
            let mixed = mixed
                .spawn(move || {
                    for (device, stream) in current().unwrap().streams() {
                        let gpu = inner.as_virtual().unwrap().gpu(device);
                        let opened = Arc::clone(&opened);
                        let wait = move || {
                            while !opened.load(Ordering::SeqCst) {
                                std::thread::yield_now();
                            }
                            Ok(())
                        };
                        gpu.enqueue(stream, Box::new(wait)).unwrap();
                    }
                    awaited.is_done()
                })
                .unwrap();
            // Its work ends only when this has begun: who would wait for it would hang.
            let (ahead, opens) = (mixed.clone(), Arc::clone(&gate));
            let after = runtime.task().on(set(&[GPU], WHOLE)).after(&mixed);
            let after = after.spawn(move || {
                let is_ahead = !ahead.is_done();
                opens.store(true, Ordering::SeqCst);
                is_ahead
            });
            assert!(*after.unwrap().result().unwrap(), "it ran ahead");
            assert!(
                *mixed.result().unwrap(),
                "it began before its predecessor was done"
            );
        }
        runtime.close().unwrap();
    });
}

#[test]
fn a_body_that_waits_lends_its_cores_and_its_devices() {
    within(60, || {
        for workers in [0, 2] {
            let machine = machine(2, Time::Real);
            let runtime = open(&machine, workers);
            let all = [CORE, CORE, GPU, GPU];
            let spawn = runtime.handle();
            let outer = runtime.task().on(set(&all, WHOLE)).spawn(move || {
                let mut sum = 0;
                for i in 0..10 {
                    let child = spawn.task().on(set(&all, WHOLE)).spawn(move || i).unwrap();
                    sum += *child.result().unwrap();
                    assert_eq!(current().unwrap().places().len(), 4);
                }
                sum
            });
            assert_eq!(*outer.unwrap().result().unwrap(), 45);
            let spawn = runtime.handle();
            let outer = runtime
                .task()
                .on(set(&all, WHOLE))
                .spawn_future(async move {
                    let child = spawn.task().on(set(&all, WHOLE)).spawn(|| 7).unwrap();
                    let seven = *child.await.unwrap().result().unwrap();
                    assert_eq!(current().unwrap().places().len(), 4);
                    seven
                });
            assert_eq!(*outer.unwrap().result().unwrap(), 7);
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_task_that_is_cancelled_while_it_waits_for_cores_gives_its_devices_back() {
    within(60, || {
        let machine = machine(1, Time::Real);
        let runtime = open(&machine, 2);
        for _ in 0..20 {
            let (running, free) = occupy(&runtime, 2);
            let mixed = runtime.task().on(set(&[CORE, CORE, GPU], WHOLE));
            let mixed = mixed.spawn(|| ()).unwrap();
            assert!(mixed.cancel());
            free.store(true, Ordering::SeqCst);
            running.result().unwrap();
            let next = runtime.task().on(set(&[GPU], WHOLE)).spawn(|| ()).unwrap();
            next.result().unwrap();
        }
        runtime.close().unwrap();
    });
}

#[test]
fn who_holds_devices_takes_turns_with_all_others_that_need_cores() {
    within(60, || {
        let machine = machine(1, Time::Real);
        let runtime = open(&machine, 2);
        let (running, free) = occupy(&runtime, 2);
        let order: Arc<Mutex<Vec<&str>>> = Arc::default();
        let mut tasks = Vec::new();
        let mut spawn = |name: &'static str, alternatives: Option<Vec<Alternative>>, cores: u16| {
            let order = Arc::clone(&order);
            let mut task = runtime.task().cores(cores);
            if let Some(alternatives) = alternatives {
                task = task.on(alternatives);
            }
            let body = move || order.lock().unwrap().push(name);
            tasks.push(task.spawn(body).unwrap());
        };
        // They take none of the device's compute, so all hold it and wait for cores.
        for _ in 0..20 {
            spawn("mixed", Some(set(&[CORE, CORE, GPU], 0)), 1);
        }
        for _ in 0..20 {
            spawn("wide", None, 2);
        }
        for _ in 0..40 {
            spawn("narrow", None, 1);
        }
        free.store(true, Ordering::SeqCst);
        running.result().unwrap();
        runtime.close().unwrap();
        let order = order.lock().unwrap();
        let places = |name: &str| -> Vec<usize> {
            (0..order.len()).filter(|at| order[*at] == name).collect()
        };
        let (mixed, wide, narrow) = (places("mixed"), places("wide"), places("narrow"));
        assert_eq!((mixed.len(), wide.len(), narrow.len()), (20, 20, 40));
        let all_cores = order.iter().filter(|name| **name != "narrow");
        let all_cores: Vec<_> = all_cores.collect();
        assert!(
            all_cores.windows(2).all(|pair| pair[0] != pair[1]),
            "{order:?}"
        );
        // Between two of them come as many narrow ones as there are cores, and those that began before.
        let (mixed, wide) = (&mixed[..8], &wide[..8]);
        for pair in mixed.windows(2).chain(wide.windows(2)) {
            assert!(pair[1] - pair[0] <= 2 * (1 + 2 * 2), "{order:?}");
        }
        assert!(narrow[0] <= 3 && narrow[15] <= 2 * 15 + 3, "{order:?}");
    });
}

#[test]
fn floods_of_wide_and_narrow_sets_end_and_keep_every_promise() {
    within(60, || {
        let machine = machine(4, Time::Real);
        let path = trace_path();
        let builder = Runtime::builder().workers(4).machine(Arc::clone(&machine));
        let runtime = builder.trace(&path).open().unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        let sets: [&[Member]; 7] = [
            &[GPU],
            &[CORE, GPU],
            &[GPU, CORE, CORE],
            &[CORE, CORE, CORE, CORE, GPU, GPU],
            &[CORE, GPU, GPU, GPU, GPU],
            &[GPU, GPU],
            &[CORE, CORE, CORE, GPU, GPU, GPU],
        ];
        for i in 0..600_usize {
            let count = Arc::clone(&count);
            let (spawn, inner) = (runtime.handle(), Arc::clone(&machine));
            let members = sets[i % sets.len()];
            let share = [WHOLE, WHOLE / 2, WHOLE / 3][i % 3];
            let body = move || {
                busy(&inner, Duration::from_micros(20));
                if i % 30 == 0 {
                    let child = spawn.task().on(set(&[CORE, CORE, GPU], WHOLE));
                    child.spawn(|| ()).unwrap().result().unwrap();
                }
                count.fetch_add(1, Ordering::Relaxed);
            };
            let task = match i % 9 {
                7 => runtime.task().cores(3),
                8 => runtime.task(),
                _ => runtime.task().on(set(members, share)),
            };
            task.spawn(body).unwrap();
        }
        runtime.close().unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 600);
        let checked = prove(&take_trace(&path));
        assert!(checked.grants > 400);
    });
}

#[test]
fn a_set_with_cores_is_chosen_among_others() {
    within(60, || {
        let choice = |on: On, cost: u64| Choice {
            variant: 0,
            label: String::new(),
            on,
            cost: Some(Duration::from_micros(cost)),
        };
        let on = |members: &[Member]| On::Devices(set(members, WHOLE)[0].clone());
        for (policy, costs) in [
            ("eft", [9, 1, 9]),
            ("eft", [1, 9, 9]),
            ("round-robin", [9; 3]),
        ] {
            let machine = machine(2, Time::Real);
            let builder = Runtime::builder().workers(2).machine(Arc::clone(&machine));
            let mapper = Mapper::named(policy, 0).unwrap();
            let runtime = builder.mapper(mapper).open().unwrap();
            let sets = [
                on(&[GPU]),
                on(&[CORE, GPU, CORE, GPU]),
                on(&[CORE, CORE, CORE, GPU]),
            ];
            let list = sets
                .into_iter()
                .zip(costs)
                // So much that it does not count how long it takes here.
                .map(|(on, cost)| choice(on, cost * 100_000));
            let choices = runtime.choices("f", list.collect()).unwrap();
            let mut chosen = [0; 3];
            for _ in 0..8 {
                let task = runtime.task().choices(&choices, 1).spawn(|| {
                    let here = current().unwrap();
                    let is_core = |place: &Place| matches!(place, Place::Core(_));
                    let cores: Vec<bool> = here.places().iter().map(is_core).collect();
                    (here.choice().unwrap(), cores)
                });
                let (choice, cores) = task.unwrap().result().unwrap().clone();
                chosen[choice] += 1;
                let expected: &[bool] = [&[false][..], &[true, false, true, false]][choice];
                assert_eq!(cores, expected);
            }
            match (policy, costs[0]) {
                ("eft", 9) => assert_eq!(chosen, [0, 8, 0]),
                ("eft", _) => assert_eq!(chosen, [8, 0, 0]),
                _ => assert!(chosen[0] > 0 && chosen[1] > 0, "{chosen:?}"),
            }
            runtime.close().unwrap();
        }
    });
}
