//! Tasks on virtual devices: order by streams, sets, waiting, failures, virtual time.
#![cfg(not(loom))]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use charioteer::gang::{Alternative, Member, WHOLE};
use charioteer::machine::{Description, DeviceError, DeviceId, Kind, Machine, Time};
use charioteer::mapping::policy::Mapper;
use charioteer::mapping::{Choice, Choices, On};
use charioteer::native::{
    Builder, Place, Runtime, SpawnError, Task, TaskError, TaskSpace, current,
};
use charioteer::task::Need;
use common::{prove, take_trace, trace_path, within, within_on};
use proptest::prelude::*;

const MEMORY: u64 = 1 << 30;

fn machine(gpus: usize, time: Time) -> Arc<Machine> {
    Machine::virtual_machine(Description::uniform(4, gpus, MEMORY, time).unwrap())
}

fn open(machine: &Arc<Machine>, workers: usize) -> Runtime {
    builder(machine, workers).open().unwrap()
}

fn builder(machine: &Arc<Machine>, workers: usize) -> Builder {
    Runtime::builder()
        .workers(workers)
        .machine(Arc::clone(machine))
}

fn set(count: usize, share: u32, memory: u64) -> Vec<Alternative> {
    vec![Alternative {
        members: vec![Member::Any(Kind::Gpu); count].into(),
        share,
        memory,
    }]
}

fn any() -> Vec<Alternative> {
    set(1, WHOLE, 0)
}

fn this(gpu: u16) -> Vec<Alternative> {
    vec![Alternative {
        members: vec![Member::Device(DeviceId::gpu(gpu))].into(),
        share: WHOLE,
        memory: 0,
    }]
}

/// Enqueues `work` on every stream of the running task.
fn enqueue(machine: &Arc<Machine>, work: impl Fn(DeviceId) + Send + Sync + 'static) {
    let work = Arc::new(work);
    for (device, stream) in current().unwrap().streams() {
        let work = Arc::clone(&work);
        let gpu = machine.as_virtual().unwrap().gpu(device);
        gpu.enqueue(
            stream,
            Box::new(move || {
                work(device);
                Ok(())
            }),
        )
        .unwrap();
    }
}

/// Keeps every stream of the running task busy for so long.
fn busy(machine: &Arc<Machine>, time: Duration) {
    for (device, stream) in current().unwrap().streams() {
        let gpu = machine.as_virtual().unwrap().gpu(device);
        gpu.busy(stream, time).unwrap();
    }
}

type Log = Arc<Mutex<Vec<usize>>>;

fn chain(runtime: &Runtime, machine: &Arc<Machine>, length: usize, log: &Log) -> TaskSpace<(), 1> {
    let space = TaskSpace::<(), 1>::new("chain");
    for i in 0..length {
        let at = i64::try_from(i).unwrap();
        let mut task = runtime.task().on(any());
        if i > 0 {
            task = task.after(&space.at([at - 1]));
        }
        let (machine, log) = (Arc::clone(machine), Arc::clone(log));
        task.spawn_at(&space.at([at]), move || {
            let log = Arc::clone(&log);
            enqueue(&machine, move |_| log.lock().unwrap().push(i));
        })
        .unwrap();
    }
    space
}

#[test]
fn a_chain_is_ordered_by_one_stream_and_the_host_never_waits() {
    within(60, || {
        for gpus in [1, 4] {
            let machine = machine(gpus, Time::Real);
            let log = Log::default();
            let runtime = open(&machine, 2);
            chain(&runtime, &machine, 500, &log);
            runtime.close().unwrap();
            assert_eq!(*log.lock().unwrap(), (0..500).collect::<Vec<_>>());
            let counters: Vec<_> = machine
                .as_virtual()
                .unwrap()
                .gpus()
                .iter()
                .map(|gpu| gpu.counters())
                .collect();
            let sum = |of: fn(&_) -> u64| counters.iter().map(of).sum::<u64>();
            assert_eq!(
                sum(|counters: &charioteer::machine::virtual_gpu::Counters| counters.operations),
                500
            );
            if gpus == 1 {
                // Elsewhere it may go on where another device is free.
                assert_eq!(sum(|counters| counters.streams), 1);
                assert_eq!(sum(|counters| counters.stream_waits), 0);
            }
            assert_eq!(sum(|counters| counters.host_synchronisations), 0);
        }
    });
}

#[test]
fn successors_run_ahead_of_work_in_flight_and_are_done_after_it() {
    within(60, || {
        let machine = machine(1, Time::Real);
        let runtime = open(&machine, 1);
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let (bodies, log) = (Arc::new(AtomicUsize::new(0)), Log::default());
        let mut last: Option<Task<()>> = None;
        let wait = Arc::new(wait);
        for i in 0..8 {
            let (machine, bodies, log, wait) = (
                Arc::clone(&machine),
                Arc::clone(&bodies),
                Arc::clone(&log),
                Arc::clone(&wait),
            );
            let mut task = runtime.task().on(any());
            if let Some(last) = &last {
                task = task.after(last);
            }
            last = Some(
                task.spawn(move || {
                    bodies.fetch_add(1, Ordering::SeqCst);
                    let (log, wait) = (Arc::clone(&log), Arc::clone(&wait));
                    enqueue(&machine, move |_| {
                        if i == 0 {
                            wait.lock().unwrap().recv().unwrap();
                        }
                        log.lock().unwrap().push(i);
                    });
                })
                .unwrap(),
            );
        }
        while bodies.load(Ordering::SeqCst) < 8 {
            std::thread::yield_now();
        }
        let last = last.unwrap();
        assert!(!last.is_done(), "nothing is complete on the device");
        assert!(log.lock().unwrap().is_empty());
        go.send(()).unwrap();
        last.result().unwrap();
        assert_eq!(*log.lock().unwrap(), (0..8).collect::<Vec<_>>());
        runtime.close().unwrap();
    });
}

#[test]
fn without_run_ahead_a_body_starts_when_its_predecessor_is_complete() {
    within(60, || {
        let machine = machine(2, Time::Real);
        let runtime = builder(&machine, 2).runahead(0).open().unwrap();
        let done = Arc::new(AtomicUsize::new(0));
        let mut last: Option<Task<()>> = None;
        for i in 0..50 {
            let (machine, done) = (Arc::clone(&machine), Arc::clone(&done));
            let mut task = runtime.task().on(any());
            if let Some(last) = &last {
                task = task.after(last);
            }
            last = Some(
                task.spawn(move || {
                    assert_eq!(done.load(Ordering::SeqCst), i);
                    let done = Arc::clone(&done);
                    enqueue(&machine, move |_| {
                        done.fetch_add(1, Ordering::SeqCst);
                    });
                })
                .unwrap(),
            );
        }
        last.unwrap().result().unwrap();
        runtime.close().unwrap();
    });
}

#[test]
fn a_host_task_starts_when_the_device_work_before_it_is_complete() {
    within(60, || {
        let machine = machine(1, Time::Real);
        let runtime = open(&machine, 2);
        for _ in 0..50 {
            let done = Arc::new(AtomicUsize::new(0));
            let task = {
                let (machine, done) = (Arc::clone(&machine), Arc::clone(&done));
                let body = move || {
                    busy(&machine, Duration::from_micros(200));
                    let done = Arc::clone(&done);
                    enqueue(&machine, move |_| done.store(1, Ordering::SeqCst));
                };
                runtime.task().on(any()).spawn(body).unwrap()
            };
            let after = runtime.task().after(&task);
            let seen = after.spawn(move || done.load(Ordering::SeqCst)).unwrap();
            assert_eq!(*seen.result().unwrap(), 1);
        }
        runtime.close().unwrap();
    });
}

#[test]
fn a_set_has_all_its_devices_in_order() {
    within(60, || {
        let machine = machine(4, Time::Real);
        let runtime = open(&machine, 2);
        let named = vec![Alternative {
            members: vec![
                Member::Device(DeviceId::gpu(3)),
                Member::Any(Kind::Gpu),
                Member::Device(DeviceId::gpu(1)),
            ]
            .into(),
            share: WHOLE,
            memory: 0,
        }];
        let devices = || -> Vec<u16> {
            let streams = current().unwrap().streams();
            streams.iter().map(|(device, _)| device.index()).collect()
        };
        let got = runtime.task().on(named).spawn(devices).unwrap();
        let got = got.result().unwrap();
        assert_eq!((got[0], got[2], got.len()), (3, 1, 3));
        assert!(got[1] == 0 || got[1] == 2);
        let all = runtime.task().on(set(4, WHOLE, 0)).spawn(devices).unwrap();
        let mut all = (*all.result().unwrap()).clone();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3]);
        runtime.close().unwrap();
    });
}

#[test]
fn what_can_never_be_served_is_refused_with_its_reasons() {
    within(20, || {
        let machine = machine(2, Time::Real);
        let runtime = open(&machine, 1);
        for (placement, reason) in [
            (set(3, WHOLE, 0), "3 of kind gpu wanted, 2 there"),
            (this(2), "there is no gpu(2)"),
            (set(1, WHOLE, MEMORY + 1), "no gpu has more than"),
            ([this(0), this(0)].concat()[..1].to_vec(), ""),
        ] {
            match runtime.task().on(placement).spawn(|| ()) {
                Err(SpawnError::Devices(reasons)) => {
                    assert!(
                        !reason.is_empty() && reasons[0].contains(reason),
                        "{reasons:?}"
                    );
                }
                Err(error) => panic!("{error}"),
                Ok(task) => {
                    assert!(reason.is_empty());
                    task.result().unwrap();
                }
            }
        }
        runtime.close().unwrap();
        let runtime = Runtime::new(1).unwrap();
        let refused = runtime.task().on(any()).spawn(|| ());
        assert!(matches!(refused, Err(SpawnError::Devices(_))));
        runtime.close().unwrap();
    });
}

#[test]
fn a_body_that_waits_lets_another_use_its_device() {
    within(60, || {
        for workers in [0, 1, 3] {
            let machine = machine(1, Time::Real);
            let runtime = open(&machine, workers);
            let spawn = runtime.handle();
            let inner = Arc::clone(&machine);
            let outer = runtime
                .task()
                .on(any())
                .spawn(move || {
                    busy(&inner, Duration::from_micros(50));
                    let machine = Arc::clone(&inner);
                    let child = spawn.task().on(any()).spawn(move || {
                        busy(&machine, Duration::from_micros(50));
                        7
                    });
                    let value = *child.unwrap().result().unwrap();
                    assert_eq!(current().unwrap().streams().len(), 1);
                    value + 1
                })
                .unwrap();
            assert_eq!(*outer.result().unwrap(), 8, "{workers} workers");
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_future_that_awaits_lets_another_use_its_device() {
    within(60, || {
        let machine = machine(1, Time::Real);
        let runtime = open(&machine, 2);
        let spawn = runtime.handle();
        let inner = Arc::clone(&machine);
        let outer = runtime
            .task()
            .on(any())
            .spawn_future(async move {
                let mut sum = 0;
                for i in 0..20 {
                    busy(&inner, Duration::from_micros(20));
                    let child = spawn.task().on(any()).spawn(move || i).unwrap();
                    sum += *child.await.unwrap().result().unwrap();
                    assert_eq!(current().unwrap().streams().len(), 1);
                }
                sum
            })
            .unwrap();
        assert_eq!(*outer.result().unwrap(), 190);
        runtime.close().unwrap();
    });
}

#[test]
fn work_that_fails_after_its_launch_fails_those_that_ran_ahead() {
    within(60, || {
        let machine = machine(1, Time::Real);
        let runtime = open(&machine, 1);
        let inner = Arc::clone(&machine);
        let first = runtime
            .task()
            .on(any())
            .spawn(move || {
                for (device, stream) in current().unwrap().streams() {
                    let gpu = inner.as_virtual().unwrap().gpu(device);
                    gpu.busy(stream, Duration::from_millis(5)).unwrap();
                    gpu.enqueue(
                        stream,
                        Box::new(move || Err(DeviceError::Operation(device, "bad kernel".into()))),
                    )
                    .unwrap();
                }
            })
            .unwrap();
        let second = runtime.task().on(any()).after(&first).spawn(|| ()).unwrap();
        let third = runtime.task().after(&second).spawn(|| ()).unwrap();
        let other = runtime.task().on(any()).spawn(|| 3).unwrap();
        assert!(matches!(first.result(), Err(TaskError::Device(_))));
        for task in [&second, &third] {
            match task.result() {
                Err(TaskError::Dependency(_, root)) => {
                    assert!(matches!(*root, TaskError::Device(_)));
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(*other.result().unwrap(), 3);
        runtime.close().unwrap();
    });
}

#[test]
fn a_lost_device_fails_what_needs_it_and_leaves_the_rest() {
    within(60, || {
        let machine = machine(2, Time::Real);
        let runtime = open(&machine, 2);
        let mut on_first = Vec::new();
        let mut on_any = Vec::new();
        for i in 0..40 {
            let inner = Arc::clone(&machine);
            // A body may begin before its runtime hears of the loss; then its task fails all the same.
            let work = move || {
                for (device, stream) in current().unwrap().streams() {
                    let gpu = inner.as_virtual().unwrap().gpu(device);
                    let _ = gpu.busy(stream, Duration::from_micros(100));
                }
            };
            on_first.push(runtime.task().on(this(0)).spawn(work.clone()).unwrap());
            let second = runtime.task().on(this(1)).spawn(work).unwrap();
            on_any.push(second);
            if i == 20 {
                machine.as_virtual().unwrap().gpus()[0].lose("pulled out");
            }
        }
        for task in &on_any {
            task.result().unwrap();
        }
        let lost = on_first
            .iter()
            .filter(|task| matches!(task.result(), Err(TaskError::Device(DeviceError::Lost(..)))));
        assert!(lost.count() >= 19, "those after the loss fail");
        // Free choice goes where a device is left.
        for _ in 0..10 {
            let task = runtime
                .task()
                .on(any())
                .spawn(|| current().unwrap().streams()[0].0);
            assert_eq!(*task.unwrap().result().unwrap(), DeviceId::gpu(1));
        }
        runtime.close().unwrap();
    });
}

#[test]
fn cancelled_tasks_give_their_devices_back() {
    within(60, || {
        let machine = machine(1, Time::Real);
        let runtime = open(&machine, 1);
        for _ in 0..50 {
            let mut tasks: Vec<Task<()>> = Vec::new();
            for i in 0..10 {
                let inner = Arc::clone(&machine);
                let mut task = runtime.task().on(any());
                if i % 3 == 1 {
                    task = task.after(tasks.last().unwrap());
                }
                tasks.push(
                    task.spawn(move || busy(&inner, Duration::from_micros(5)))
                        .unwrap(),
                );
            }
            for task in tasks.iter().skip(1).step_by(2) {
                task.cancel();
            }
            for task in &tasks {
                let _ = task.result();
            }
        }
        let free = runtime.task().on(any()).spawn(|| ()).unwrap();
        free.result().unwrap();
        runtime.close().unwrap();
    });
}

#[test]
fn who_waited_behind_a_task_that_is_cancelled_waits_no_more() {
    within(60, || {
        let machine = machine(2, Time::Real);
        let runtime = builder(&machine, 2).overtaking(0).open().unwrap();
        let (open, gate) = std::sync::mpsc::channel::<()>();
        let (tell, begun) = std::sync::mpsc::channel::<()>();
        let long = runtime.task().on(this(0)).spawn(move || {
            tell.send(()).unwrap();
            gate.recv().unwrap();
        });
        begun.recv().unwrap();
        // It waits for the first device, and the second is held for it.
        let wide = runtime.task().on(set(2, WHOLE, 0)).spawn(|| ()).unwrap();
        let narrow = runtime.task().on(any()).spawn(|| ()).unwrap();
        assert!(!narrow.is_done());
        assert!(wide.cancel());
        narrow.result().unwrap();
        open.send(()).unwrap();
        long.unwrap().result().unwrap();
        runtime.close().unwrap();
    });
}

#[test]
fn retries_follow_what_the_failed_attempt_enqueued() {
    within(60, || {
        let machine = machine(1, Time::Real);
        let runtime = open(&machine, 2);
        let log = Log::default();
        let attempts = Arc::new(AtomicUsize::new(0));
        let (inner, seen, count) = (
            Arc::clone(&machine),
            Arc::clone(&log),
            Arc::clone(&attempts),
        );
        let task = runtime
            .task()
            .on(any())
            .try_spawn(3, move || {
                let attempt = count.fetch_add(1, Ordering::SeqCst);
                let log = Arc::clone(&seen);
                busy(&inner, Duration::from_micros(100));
                enqueue(&inner, move |_| log.lock().unwrap().push(attempt));
                if attempt < 2 {
                    Err(std::io::Error::other("again"))
                } else {
                    Ok(attempt)
                }
            })
            .unwrap();
        assert_eq!(*task.result().unwrap(), 2);
        assert_eq!(*log.lock().unwrap(), [0, 1, 2]);
        runtime.close().unwrap();
    });
}

#[test]
fn a_task_that_can_get_no_memory_while_its_waiter_keeps_it_is_told() {
    within(60, || {
        for workers in [0, 1, 3] {
            let machine = machine(1, Time::Real);
            let runtime = open(&machine, workers);
            let spawn = runtime.handle();
            let outer = runtime.task().on(set(1, WHOLE, MEMORY / 2 + 1));
            let outer = outer.spawn(move || {
                let child = spawn.task().on(set(1, WHOLE, MEMORY / 2 + 1)).spawn(|| ());
                match child.unwrap().result() {
                    Err(TaskError::Device(error)) => error,
                    other => panic!("{other:?}"),
                }
            });
            let error = outer.unwrap().result().unwrap().clone();
            assert!(
                matches!(error, DeviceError::OutOfMemory { wanted, .. } if wanted == MEMORY / 2 + 1),
                "{error}, {workers} workers"
            );
            // One that fits beside what is kept is served.
            let spawn = runtime.handle();
            let outer = runtime.task().on(set(1, WHOLE, MEMORY / 2)).spawn(move || {
                let child = spawn.task().on(set(1, WHOLE, MEMORY / 2)).spawn(|| 5);
                *child.unwrap().result().unwrap()
            });
            assert_eq!(*outer.unwrap().result().unwrap(), 5);
            runtime.close().unwrap();
        }
    });
}

#[test]
fn virtual_time_is_deterministic_and_takes_none() {
    within(60, || {
        let run = || {
            let machine = machine(2, Time::Virtual);
            let runtime = open(&machine, 0);
            let log = Log::default();
            let mut tasks = Vec::new();
            for i in 0..20_usize {
                let (inner, log) = (Arc::clone(&machine), Arc::clone(&log));
                let width = 1 + i % 2;
                let task = runtime.task().on(set(width, WHOLE, 0)).spawn(move || {
                    busy(&inner, Duration::from_secs(1 + i as u64 % 3));
                    let log = Arc::clone(&log);
                    enqueue(&inner, move |_| log.lock().unwrap().push(i));
                });
                tasks.push(task.unwrap());
            }
            for task in &tasks {
                task.result().unwrap();
            }
            runtime.close().unwrap();
            let log = log.lock().unwrap().clone();
            (log, machine.as_virtual().unwrap().clock().now())
        };
        let (log, time) = run();
        assert_eq!(log.len(), 30);
        // 10 narrow and 10 wide ones of 1, 2, 3 seconds on two devices: the work is 60 s of device time.
        assert!(time >= 30_000_000_000, "{time}");
        assert_eq!(run(), (log, time));
        let refused = builder(&machine(1, Time::Virtual), 1).open();
        assert!(refused.is_err_and(|error| error.kind() == std::io::ErrorKind::InvalidInput));
    });
}

/// What is done in rank order by tasks that become ready together, beside one that waits already, on two
/// devices that one set gives back at the same moment.
#[test]
fn what_a_completion_gives_back_goes_by_rank_to_those_that_it_makes_ready_and_to_others() {
    within(60, || {
        let machine = machine(2, Time::Virtual);
        let runtime = builder(&machine, 0).runahead(0).open().unwrap();
        let log = Log::default();
        let spawn = |priority: i32, sets: Vec<Alternative>, after: Option<&Task<()>>| {
            let (machine, log) = (Arc::clone(&machine), Arc::clone(&log));
            let mut task = runtime.task().on(sets).priority(priority);
            if let Some(after) = after {
                task = task.after(after);
            }
            let number = usize::try_from(priority).unwrap();
            let body = move || {
                log.lock().unwrap().push(number);
                busy(&machine, Duration::from_secs(1));
            };
            task.spawn(body).unwrap()
        };
        let first = spawn(9, set(2, WHOLE, 0), None);
        // Wants what the first one has.
        spawn(2, any(), None);
        for priority in [1, 4, 3, 5] {
            spawn(priority, any(), Some(&first));
        }
        runtime.close().unwrap();
        assert_eq!(*log.lock().unwrap(), [9, 5, 4, 3, 2, 1]);
    });
}

/// One completion on a core makes tasks ready for a device that is free.
#[test]
fn of_those_that_become_ready_together_the_first_in_rank_gets_a_device_that_is_free() {
    within(60, || {
        for workers in [0, 2] {
            let machine = machine(
                1,
                if workers == 0 {
                    Time::Virtual
                } else {
                    Time::Real
                },
            );
            let runtime = builder(&machine, workers).runahead(0).open().unwrap();
            let log = Log::default();
            let space = TaskSpace::<(), 1>::new("first");
            let first = space.at([0]);
            for priority in [1, 3, 2_usize] {
                let log = Arc::clone(&log);
                let rank = i32::try_from(priority).unwrap();
                let task = runtime.task().on(any()).priority(rank).after(&first);
                let body = move || log.lock().unwrap().push(priority);
                task.spawn(body).unwrap();
            }
            runtime.task().spawn_at(&first, || ()).unwrap();
            runtime.close().unwrap();
            assert_eq!(*log.lock().unwrap(), [3, 2, 1], "{workers} workers");
        }
    });
}

/// A random task: on how many devices, with what share and memory, after which others, how it ends.
#[derive(Clone, Debug)]
struct Plan {
    width: usize,
    /// How many cores its set has too.
    cores: usize,
    share: u32,
    memory: u64,
    after: Vec<usize>,
    work: u64,
    fails: bool,
    host: bool,
    /// It may also run on one device, or on a core, as times say or costs that are made up.
    chooses: Option<[Option<u64>; 3]>,
}

/// Nothing, so that times are measured, or a cost in microseconds.
fn cost() -> impl Strategy<Value = Option<u64>> {
    prop_oneof![Just(None), (0..50_u64).prop_map(Some)]
}

/// The choices of a plan that has some: its own set, one device, a core.
fn choices(runtime: &Runtime, plan: &Plan, costs: &[Option<u64>; 3]) -> Arc<Choices> {
    let own = On::Devices(own_set(plan)[0].clone());
    let one = On::Devices(set(1, plan.share, plan.memory)[0].clone());
    let list = [own, one, On::Cores(Need::Core)]
        .into_iter()
        .zip(costs)
        .map(|(on, cost)| Choice {
            variant: 0,
            label: String::new(),
            on,
            cost: cost.map(Duration::from_micros),
        });
    runtime.choices("random", list.collect()).unwrap()
}

/// The set of a plan, with cores among the devices.
fn own_set(plan: &Plan) -> Vec<Alternative> {
    let mut members = vec![Member::Any(Kind::Gpu); plan.width];
    members.splice(1..1, vec![Member::Any(Kind::Cpu); plan.cores]);
    vec![Alternative {
        members: members.into(),
        share: plan.share,
        memory: plan.memory,
    }]
}

fn plans(gpus: usize) -> impl Strategy<Value = Vec<Plan>> {
    let one = (
        (1..=gpus, prop_oneof![4 => Just(0_usize), 1 => 1..3_usize]),
        prop_oneof![Just(WHOLE), Just(WHOLE / 2), Just(WHOLE / 3), Just(0)],
        prop_oneof![Just(0), Just(MEMORY / 3), Just(MEMORY)],
        proptest::collection::vec(0..60_usize, 0..3),
        0..30_u64,
        proptest::bool::weighted(0.05),
        proptest::bool::weighted(0.2),
        proptest::option::weighted(0.4, [cost(), cost(), cost()]),
    );
    let one = one.prop_map(
        |((width, cores), share, memory, after, work, fails, host, chooses)| Plan {
            width,
            cores,
            share,
            memory,
            after,
            work,
            fails,
            host,
            chooses,
        },
    );
    proptest::collection::vec(one, 1..60)
}

/// Runs random programs and holds what the operations saw against the plan: every operation comes
/// after those of all predecessors, on whatever device, and shares never exceed a device.
fn check(gpus: usize, workers: usize, runahead: u32, policy: &str, plans: &[Plan]) {
    let machine = machine(gpus, Time::Real);
    let path = trace_path();
    let runtime = builder(&machine, workers)
        .runahead(runahead)
        .mapper(Mapper::named(policy, 1).unwrap())
        .trace(&path)
        .open()
        .unwrap();
    let finished: Arc<Vec<AtomicUsize>> =
        Arc::new(plans.iter().map(|_| AtomicUsize::new(0)).collect());
    // On how many devices, or one core, it ran.
    let places: Arc<Vec<AtomicUsize>> =
        Arc::new(plans.iter().map(|_| AtomicUsize::new(0)).collect());
    let taken: Arc<Vec<AtomicUsize>> = Arc::new((0..gpus).map(|_| AtomicUsize::new(0)).collect());
    let wrong = Log::default();
    let mut tasks: Vec<Task<()>> = Vec::new();
    for (index, plan) in plans.iter().enumerate() {
        let mut plan = plan.clone();
        plan.cores = plan.cores.min(workers.max(1));
        let after: Vec<usize> = plan
            .after
            .iter()
            .copied()
            .filter(|at| *at < index)
            .collect();
        let mut task = runtime.task();
        if let Some(costs) = &plan.chooses {
            task = task.choices(&choices(&runtime, &plan, costs), plan.work);
        } else if !plan.host {
            task = task.on(own_set(&plan));
        }
        for at in &after {
            task = task.after(&tasks[*at]);
        }
        let (machine, places, finished, taken, wrong) = (
            Arc::clone(&machine),
            Arc::clone(&places),
            Arc::clone(&finished),
            Arc::clone(&taken),
            Arc::clone(&wrong),
        );
        let body = move || {
            let width = match current().unwrap().choice() {
                None if plan.host => 0,
                None | Some(0) => plan.width,
                Some(1) => 1,
                Some(_) => 0,
            };
            assert_eq!(current().unwrap().streams().len(), width);
            places[index].store(width.max(1), Ordering::SeqCst);
            let look = {
                let (places, finished) = (Arc::clone(&places), Arc::clone(&finished));
                let (wrong, after) = (Arc::clone(&wrong), after.clone());
                move || {
                    for at in &after {
                        let count = places[*at].load(Ordering::SeqCst);
                        if count == 0 || finished[*at].load(Ordering::SeqCst) != count {
                            wrong.lock().unwrap().push(index);
                        }
                    }
                }
            };
            let places = current().unwrap().places().to_vec();
            let cores = places.iter().filter(|it| matches!(it, Place::Core(_)));
            let is_own = !plan.host && matches!(current().unwrap().choice(), None | Some(0));
            if is_own {
                assert_eq!(cores.count(), plan.cores);
            }
            if is_own && plan.cores > 0 {
                // It reads on the host.
                look();
            }
            if width == 0 {
                look();
                finished[index].fetch_add(1, Ordering::SeqCst);
            } else {
                let share = plan.share as usize;
                let before = {
                    let (taken, wrong) = (Arc::clone(&taken), Arc::clone(&wrong));
                    move |device: DeviceId| {
                        look();
                        let at = usize::from(device.index());
                        let now = taken[at].fetch_add(share, Ordering::SeqCst) + share;
                        if now > WHOLE as usize {
                            wrong.lock().unwrap().push(index);
                        }
                    }
                };
                enqueue(&machine, before);
                busy(&machine, Duration::from_micros(plan.work));
                let (taken, finished) = (Arc::clone(&taken), Arc::clone(&finished));
                enqueue(&machine, move |device| {
                    taken[usize::from(device.index())].fetch_sub(share, Ordering::SeqCst);
                    finished[index].fetch_add(1, Ordering::SeqCst);
                });
            }
            if plan.fails {
                return Err(std::io::Error::other("planned"));
            }
            Ok(())
        };
        tasks.push(task.try_spawn(0, body).unwrap());
    }
    let mut doomed = vec![false; plans.len()];
    for (index, plan) in plans.iter().enumerate() {
        let poisoned = plan.after.iter().any(|at| *at < index && doomed[*at]);
        doomed[index] = plan.fails || poisoned;
        match tasks[index].result() {
            Ok(_) => assert!(!doomed[index], "{index} ran"),
            Err(TaskError::Dependency(..)) => assert!(poisoned),
            Err(TaskError::Failed(_)) => assert!(plan.fails && !poisoned),
            Err(error) => panic!("{error}"),
        }
    }
    runtime.close().unwrap();
    assert!(
        wrong.lock().unwrap().is_empty(),
        "{:?}",
        wrong.lock().unwrap()
    );
    assert!(taken.iter().all(|taken| taken.load(Ordering::SeqCst) == 0));
    let checked = prove(&take_trace(&path));
    assert_eq!(checked.tasks, plans.len());
    let may_have_devices = |plan: &&Plan| !plan.host || plan.chooses.is_some();
    assert!(checked.grants <= plans.iter().filter(may_have_devices).count());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(debug_assertions) { 64 } else { 256 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_programs_keep_every_order_and_every_share(
        (gpus, plans) in (1..=6_usize).prop_flat_map(|gpus| (Just(gpus), plans(gpus))),
        workers in 0..4_usize,
        runahead in prop_oneof![Just(0_u32), Just(1), Just(64)],
        policy in prop_oneof![
            4 => Just("eft"), 1 => Just("locality"), 1 => Just("load"), 1 => Just("random"),
            1 => Just("round-robin"),
        ],
    ) {
        common::within_on((gpus, workers, runahead, policy, &plans), 60, || {
            check(gpus, workers, runahead, policy, &plans);
        });
    }
}

#[test]
fn a_body_that_waits_for_a_task_on_cores_lends_its_share_to_what_that_needs() {
    within(20, || {
        for workers in [0, 1, 2] {
            let machine = machine(1, Time::Real);
            let runtime = open(&machine, workers);
            let spawn = runtime.handle();
            let outer = runtime.task().on(any()).spawn(move || {
                let handle = spawn.clone();
                // Ready when it is waited for, and it waits for the device itself.
                let inner = spawn.spawn(move || {
                    let last = handle.task().on(any()).spawn(|| 3).unwrap();
                    *last.result().unwrap()
                });
                *inner.result().unwrap()
            });
            assert_eq!(*outer.unwrap().result().unwrap(), 3);
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_body_has_no_share_while_one_above_it_waits() {
    for (gpus, time) in [(1, Time::Real), (1, Time::Virtual), (2, Time::Real)] {
        within_on(time, 20, || {
            let machine = machine(gpus, time);
            let path = trace_path();
            let runtime = builder(&machine, 0).trace(&path).open().unwrap();
            let spawn = runtime.handle();
            let all = move || set(gpus, WHOLE, 0);
            let order = Log::default();
            let seen = Arc::clone(&order);
            let outer = runtime.task().on(all()).spawn(move || {
                // It has the devices when this body asks for them again after its wait for `awaited`.
                spawn.task().on(all()).spawn(|| ()).unwrap();
                let awaited = spawn.spawn(|| ());
                // Runs meanwhile on top of this body, and waits for the devices too.
                let (inner, log) = (spawn.clone(), Arc::clone(&seen));
                spawn.spawn_detached(move || {
                    for i in 0..3 {
                        let last = inner.task().on(all()).spawn(move || i).unwrap();
                        log.lock().unwrap().push(*last.result().unwrap());
                    }
                });
                awaited.result().unwrap();
                seen.lock().unwrap().push(3);
                current().unwrap().streams().len()
            });
            assert_eq!(*outer.unwrap().result().unwrap(), gpus);
            runtime.close().unwrap();
            assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3]);
            prove(&take_trace(&path));
        });
    }
}
