//! Managed data on virtual devices, rule by rule: order and run-ahead, where tasks go, memory, what comes
//! home, sets, what is moved for its own sake, and losses.
#![cfg(not(loom))]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use charioteer::gang::{Alternative, Member, WHOLE};
use charioteer::machine::{
    Description, DeviceError, DeviceId, Enqueued, HOST, Kind, Machine, Observed, Observer, Time,
};
use charioteer::mapping::policy::Mapper;
use charioteer::mapping::{Choice, On};
use charioteer::native::{
    Access, AccessTrouble, Builder, Datum, HostError, Mode, Runtime, SpawnError, Task, TaskError,
    View, current,
};
use charioteer::region::{Region, Span};
use charioteer::task::Need;
use common::within;

const GPU: Member = Member::Any(Kind::Gpu);
const MEMORY: u64 = 1 << 30;

fn machine(gpus: usize, memory: u64, time: Time) -> Arc<Machine> {
    Machine::virtual_machine(Description::uniform(4, gpus, memory, time).unwrap())
}

fn builder(machine: &Arc<Machine>, workers: usize) -> Builder {
    Runtime::builder()
        .workers(workers)
        .machine(Arc::clone(machine))
}

fn set(members: &[Member]) -> Vec<Alternative> {
    vec![Alternative {
        members: members.into(),
        share: WHOLE,
        memory: 0,
    }]
}

fn this(gpu: u16) -> Vec<Alternative> {
    set(&[Member::Device(DeviceId::gpu(gpu))])
}

/// An array of the program's own, of one axis.
struct Array {
    datum: Arc<Datum>,
    elements: Arc<[AtomicU64]>,
}

impl Array {
    fn new(label: &str, count: u64) -> Self {
        let elements: Arc<[AtomicU64]> = (0..count).map(AtomicU64::new).collect();
        let keep = Box::new(Arc::clone(&elements));
        let datum = Datum::stored(label, &[count], 8, elements.as_ptr() as usize, keep);
        Self { datum, elements }
    }

    fn values(&self) -> Vec<u64> {
        let load = |it: &AtomicU64| it.load(Ordering::Relaxed);
        self.elements.iter().map(load).collect()
    }
}

/// Enqueues `work` on the elements of an access, on each device of the running task: those that a member has
/// in a compact row.
fn enqueue(
    machine: &Arc<Machine>,
    access: usize,
    counts: &[usize],
    work: impl Fn(&mut [u64]) -> Result<(), DeviceError> + Send + Sync + 'static,
) {
    let here = current().unwrap();
    let work = Arc::new(work);
    for ((member, (device, stream)), count) in here.streams().into_iter().enumerate().zip(counts) {
        let view = here.views()[member][access].clone().unwrap();
        let gpu = Arc::clone(machine.as_virtual().unwrap().gpu(device));
        let (inner, work, count) = (Arc::clone(&gpu), Arc::clone(&work), *count);
        let operation = Box::new(move || {
            assert_eq!(view.strides[..], [8]);
            let bytes = inner.bytes(view.pointer, count as u64 * 8)?;
            // SAFETY: the bytes are there, aligned, and the runtime keeps others from them.
            let row = unsafe { std::slice::from_raw_parts_mut(bytes.as_ptr().cast(), count) };
            work(row)
        });
        let _ = gpu.enqueue(stream, operation);
    }
}

/// A body that enqueues `work` on its first access, of which its device has so many elements.
fn on_row(
    machine: &Arc<Machine>,
    count: usize,
    work: impl Fn(&mut [u64]) + Send + Sync + 'static,
) -> impl FnOnce() + Send + 'static {
    let machine = Arc::clone(machine);
    move || {
        enqueue(&machine, 0, &[count], move |row| {
            work(row);
            Ok(())
        });
    }
}

fn copies(machine: &Machine) -> Vec<(u16, u16, u64)> {
    let gpus = machine.as_virtual().unwrap().gpus().iter();
    let traffic = gpus.flat_map(|gpu| gpu.counters().traffic);
    traffic
        .filter(|it| it.copies != 0)
        .map(|it| (it.from.0, it.to.0, it.copies))
        .collect()
}

/// Lets operations wait until they are told to go on.
fn gate() -> (mpsc::Sender<()>, Arc<Mutex<mpsc::Receiver<()>>>) {
    let (open, wait) = mpsc::channel();
    (open, Arc::new(Mutex::new(wait)))
}

#[test]
fn a_chain_over_one_region_runs_ahead_on_one_stream() {
    within(60, || {
        for gpus in [1, 3] {
            let machine = machine(gpus, MEMORY, Time::Real);
            let runtime = builder(&machine, 2).open().unwrap();
            let array = Array::new("A", 16);
            let part = array.datum.whole();
            let (open, wait) = gate();
            let bodies = Arc::new(AtomicUsize::new(0));
            let streams = Arc::new(Mutex::new(Vec::new()));
            for link in 0..60 {
                let (machine, wait) = (Arc::clone(&machine), Arc::clone(&wait));
                let (bodies, streams) = (Arc::clone(&bodies), Arc::clone(&streams));
                let task = runtime.task().on(set(&[GPU])).updates(&part);
                task.spawn_detached(move || {
                    streams.lock().unwrap().extend(current().unwrap().streams());
                    enqueue(&machine, 0, &[16], move |row| {
                        if link == 0 {
                            wait.lock().unwrap().recv().unwrap();
                        }
                        row.iter_mut()
                            .for_each(|it| *it = it.wrapping_mul(3) + link);
                        Ok(())
                    });
                    bodies.fetch_add(1, Ordering::SeqCst);
                })
                .unwrap();
            }
            // Nothing is complete on the device, and every body has run.
            while bodies.load(Ordering::SeqCst) < 60 {
                std::thread::yield_now();
            }
            open.send(()).unwrap();
            runtime.close().unwrap();
            let mut streams = streams.lock().unwrap().clone();
            streams.dedup();
            assert_eq!(streams.len(), 1, "with {gpus} devices");
            let device = streams[0].0.0;
            assert_eq!(copies(&machine), [(0, device, 1), (device, 0, 1)]);
            let expected = |start| (0..60).fold(start, |it: u64, link| it.wrapping_mul(3) + link);
            assert!(array.values().into_iter().eq((0..16).map(expected)));
        }
    });
}

#[test]
fn a_writer_runs_ahead_of_readers_and_does_not_fail_with_them() {
    within(60, || {
        let machine = machine(2, MEMORY, Time::Real);
        let runtime = builder(&machine, 2).open().unwrap();
        let array = Array::new("A", 4);
        let part = array.datum.whole();
        let (open, wait) = gate();
        let reader = {
            let machine = Arc::clone(&machine);
            let task = runtime.task().on(this(0)).reads(&part);
            task.spawn(move || {
                let wait = Arc::clone(&wait);
                enqueue(&machine, 0, &[4], move |_| {
                    wait.lock().unwrap().recv().unwrap();
                    Err(DeviceError::Operation(DeviceId::gpu(0), "planned".into()))
                });
            })
            .unwrap()
        };
        let begun = Arc::new(AtomicBool::new(false));
        let writer = {
            let (machine, begun) = (Arc::clone(&machine), Arc::clone(&begun));
            let task = runtime.task().on(set(&[GPU])).writes(&part);
            task.spawn(move || {
                enqueue(&machine, 0, &[4], |row| {
                    row.fill(7);
                    Ok(())
                });
                begun.store(true, Ordering::SeqCst);
            })
            .unwrap()
        };
        while !begun.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        assert!(!writer.is_done(), "what it wrote is behind the reader");
        open.send(()).unwrap();
        assert!(matches!(reader.result(), Err(TaskError::Device(_))));
        writer.result().unwrap();
        runtime.close().unwrap();
        assert_eq!(array.values(), [7; 4]);
    });
}

/// A task that ran ahead of a reader and was cancelled does not let those behind it overtake the reader.
#[test]
fn order_is_kept_through_tasks_that_were_cancelled_ahead_of_work_in_flight() {
    within(60, || {
        let machine = machine(2, MEMORY, Time::Real);
        let runtime = builder(&machine, 2).open().unwrap();
        let array = Array::new("A", 4);
        let part = array.datum.whole();
        let (free, occupied) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        // A body that has the other device.
        let occupant = runtime.task().on(this(1)).spawn(move || {
            tell.send(()).unwrap();
            occupied.recv().unwrap();
        });
        told.recv().unwrap();
        let (open, wait) = gate();
        let done = Arc::new(AtomicBool::new(false));
        let launched = Arc::new(AtomicBool::new(false));
        {
            let (machine, done, launched) = (
                Arc::clone(&machine),
                Arc::clone(&done),
                Arc::clone(&launched),
            );
            let task = runtime.task().on(this(0)).reads(&part);
            task.spawn_detached(move || {
                enqueue(&machine, 0, &[4], move |_| {
                    wait.lock().unwrap().recv().unwrap();
                    done.store(true, Ordering::SeqCst);
                    Ok(())
                });
                launched.store(true, Ordering::SeqCst);
            })
            .unwrap();
        }
        while !launched.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        // Launched for certain: the one worker that is left did something else since.
        runtime.task().spawn(|| ()).unwrap().result().unwrap();
        let ahead = runtime
            .task()
            .on(this(1))
            .writes(&part)
            .spawn(|| ())
            .unwrap();
        assert!(ahead.cancel());
        assert!(ahead.is_done());
        let behind = {
            let done = Arc::clone(&done);
            let task = runtime.task().writes(&part);
            task.spawn(move || assert!(done.load(Ordering::SeqCst)))
                .unwrap()
        };
        // If it could run it would have by now.
        runtime.task().spawn(|| ()).unwrap().result().unwrap();
        assert!(!behind.is_done());
        open.send(()).unwrap();
        behind.result().unwrap();
        free.send(()).unwrap();
        occupant.unwrap().result().unwrap();
        runtime.close().unwrap();
    });
}

#[test]
fn independent_tasks_spread_though_their_data_are_in_one_place() {
    within(60, || {
        let machine = machine(2, MEMORY, Time::Virtual);
        let runtime = builder(&machine, 0).open().unwrap();
        let array = Array::new("A", 80);
        let tiles = array.datum.grid(&[8]);
        let all = array.datum.whole();
        let begin = runtime.task().on(this(0)).updates(&all);
        begin
            .spawn(on_row(&machine, 80, |_| ()))
            .unwrap()
            .result()
            .unwrap();
        let on = Arc::new(Mutex::new([0; 2]));
        for tile in 0..10 {
            let (machine, on) = (Arc::clone(&machine), Arc::clone(&on));
            let tile = tiles.tile(&[tile]);
            let task = runtime.task().on(set(&[GPU])).updates(&tile);
            task.spawn_detached(move || {
                let (device, stream) = current().unwrap().streams()[0];
                on.lock().unwrap()[usize::from(device.index())] += 1;
                let gpu = machine.as_virtual().unwrap().gpu(device);
                gpu.busy(stream, Duration::from_millis(10)).unwrap();
            })
            .unwrap();
        }
        runtime.close().unwrap();
        assert_eq!(*on.lock().unwrap(), [6, 4]);
    });
}

#[test]
fn what_can_never_fit_is_refused_with_the_bytes() {
    within(20, || {
        let machine = machine(2, 1_000, Time::Real);
        let runtime = builder(&machine, 1).open().unwrap();
        let array = Array::new("A", 100);
        let all = array.datum.whole();
        let part = array.datum.part(Region::new([Span::range(0, 100)]));
        for memory in [0, 500] {
            let mut sets = set(&[GPU]);
            sets[0].memory = memory;
            let refused = runtime
                .task()
                .on(sets)
                .reads(&all)
                .reads(&part)
                .spawn(|| ());
            let Err(SpawnError::Memory {
                device,
                wanted,
                there,
            }) = refused.map(|_| ())
            else {
                assert_eq!(memory, 0, "800 bytes fit, and 1,300 do not");
                continue;
            };
            assert_eq!((&*device, wanted, there), ("gpu", 1_300, 1_000));
        }
        // Each has half of it.
        let mut halves = set(&[GPU, GPU]);
        halves[0].memory = 500;
        let access = Access::new(&all, Mode::InOut).sharded(0);
        runtime
            .task()
            .on(halves)
            .accesses(access)
            .spawn(|| ())
            .unwrap()
            .result()
            .unwrap();
        runtime.close().unwrap();
    });
}

#[test]
fn what_sets_write_is_divided_or_equal() {
    within(60, || {
        let machine = machine(3, MEMORY, Time::Real);
        let runtime = builder(&machine, 2).open().unwrap();
        let (a, b) = (Array::new("A", 8), Array::new("B", 2));
        let (all, few) = (a.datum.whole(), b.datum.whole());
        let three = || set(&[GPU, GPU, GPU]);
        let spawn = |access| runtime.task().on(three()).accesses(access).spawn(|| ());
        let whole = spawn(Access::new(&all, Mode::Out));
        assert!(matches!(
            whole,
            Err(SpawnError::Access(AccessTrouble::WrittenWhole {
                members: 3,
                ..
            }))
        ));
        let short = spawn(Access::new(&few, Mode::InOut).sharded(0));
        assert!(matches!(
            short,
            Err(SpawnError::Access(AccessTrouble::ShortAxis {
                extent: Some(2),
                ..
            }))
        ));
        let none = spawn(Access::new(&all, Mode::In).sharded(1));
        assert!(matches!(
            none,
            Err(SpawnError::Access(AccessTrouble::ShortAxis {
                extent: None,
                ..
            }))
        ));
        let inner = Arc::clone(&machine);
        let shards = runtime.task().on(three());
        shards
            .accesses(Access::new(&all, Mode::InOut).sharded(0))
            .accesses(Access::new(&few, Mode::Out).replicated())
            .spawn(move || {
                let views = |access: usize| -> Vec<u64> {
                    let here = current().unwrap();
                    let origin = |it: &[Option<Arc<View>>]| it[access].as_ref().unwrap().origin[0];
                    here.views().iter().map(|it| origin(it)).collect()
                };
                assert_eq!(views(0), [0, 3, 6]);
                assert_eq!(views(1), [0, 0, 0]);
                enqueue(&inner, 0, &[3, 3, 2], |row| {
                    let sum = row.iter().sum();
                    row.fill(sum);
                    Ok(())
                });
                enqueue(&inner, 1, &[2, 2, 2], |row| {
                    row.copy_from_slice(&[5, 6]);
                    Ok(())
                });
            })
            .unwrap();
        // Of equal copies one comes home, or goes on.
        let more = runtime.task().on(this(1)).updates(&few);
        more.spawn_detached(on_row(&machine, 2, |row| {
            row.iter_mut().for_each(|it| *it += 1);
        }))
        .unwrap();
        runtime.close().unwrap();
        assert_eq!(a.values(), [3, 3, 3, 12, 12, 12, 13, 13]);
        assert_eq!(b.values(), [6, 7]);
    });
}

#[test]
fn the_host_sees_what_devices_wrote_and_they_what_it_wrote() {
    within(60, || {
        let machine = machine(1, MEMORY, Time::Real);
        let runtime = builder(&machine, 2).open().unwrap();
        let array = Array::new("A", 4);
        let part = array.datum.whole();
        let add = |by: u64| {
            let task = runtime.task().on(set(&[GPU])).updates(&part);
            task.spawn_detached(on_row(&machine, 4, move |row| {
                row.iter_mut().for_each(|it| *it += by);
            }))
            .unwrap();
        };
        add(10);
        let access = runtime.host(&[Access::new(&part, Mode::InOut)]).unwrap();
        assert_eq!(array.values(), [10, 11, 12, 13]);
        array.elements[0].store(100, Ordering::Relaxed);
        access.leave();
        add(1);
        let elements = Arc::clone(&array.elements);
        let task = runtime.task().updates(&part);
        task.spawn_detached(move || {
            assert_eq!(elements[0].load(Ordering::Relaxed), 101);
            elements[1].store(200, Ordering::Relaxed);
        })
        .unwrap();
        add(1);
        runtime.close().unwrap();
        assert_eq!(array.values(), [102, 201, 14, 15]);
    });
}

#[test]
fn who_commutes_on_the_host_finds_what_a_later_one_wrote_on_a_device() {
    within(60, || {
        let machine = machine(1, MEMORY, Time::Real);
        let runtime = builder(&machine, 2).open().unwrap();
        let array = Array::new("A", 8);
        let part = array.datum.whole();
        let (open, wait) = gate();
        let before = runtime
            .task()
            .spawn(move || wait.lock().unwrap().recv().unwrap())
            .unwrap();
        // Nobody was on a device when it was spawned, and somebody is before it all the same.
        let elements = Arc::clone(&array.elements);
        let double = move || {
            for element in &elements[..] {
                element.store(2 * element.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        };
        let commutes = || Access::new(&part, Mode::Commute);
        let host = runtime.task().accesses(commutes()).after(&before);
        let host = host.spawn(double).unwrap();
        let device = runtime.task().on(this(0)).accesses(commutes());
        let add = on_row(&machine, 8, |row| row.iter_mut().for_each(|it| *it += 10));
        device.spawn(add).unwrap().result().unwrap();
        open.send(()).unwrap();
        host.result().unwrap();
        runtime.close().unwrap();
        let expected: Vec<u64> = (0..8).map(|it| 2 * (it + 10)).collect();
        assert_eq!(array.values(), expected);
    });
}

/// Small copies on real time are often over before anybody asks.
#[test]
fn a_copy_that_fails_fails_who_wants_it_however_soon() {
    within(60, || {
        let machine = machine(1, MEMORY, Time::Real);
        let runtime = builder(&machine, 1).open().unwrap();
        let gpu = machine.as_virtual().unwrap().gpu(DeviceId::gpu(0));
        for turn in 0..200_u64 {
            let array = Array::new("A", 4);
            let part = array.datum.whole();
            let fill = |mode| {
                let task = runtime.task().on(set(&[GPU]));
                let task = task.accesses(Access::new(&part, mode));
                task.spawn(on_row(&machine, 4, move |row| row.fill(turn)))
                    .unwrap()
            };
            gpu.fail_copy(1);
            let starved = fill(Mode::InOut);
            assert!(
                matches!(starved.result(), Err(TaskError::Device(_))),
                "turn {turn}: a task has what never came"
            );
            fill(Mode::Out).result().unwrap();
            gpu.fail_copy(1);
            let moved = runtime.prefetch(&part, HOST).unwrap();
            assert!(
                matches!(moved.result(), Err(TaskError::Device(_))),
                "turn {turn}: what never came is prefetched"
            );
            gpu.fail_copy(1);
            let refused = runtime.host(&[Access::new(&part, Mode::In)]);
            let Err(HostError::Failed(why)) = refused else {
                panic!("turn {turn}: the host has what never came");
            };
            drop(why);
            // The device has it still.
            let access = runtime.host(&[Access::new(&part, Mode::In)]).unwrap();
            assert_eq!(array.values(), [turn; 4]);
            access.leave();
        }
        let _failures = runtime.close();
    });
}

/// Who reads what is lost fails, and by no more than that a device goes.
#[test]
fn a_copy_home_that_fails_leaves_the_device_in_use() {
    within(60, || {
        let machine = machine(2, MEMORY, Time::Virtual);
        let runtime = builder(&machine, 0).open().unwrap();
        let (lost, kept) = (Array::new("gone", 4), Array::new("kept", 4));
        for array in [&lost, &kept] {
            let part = array.datum.whole();
            let task = runtime.task().on(this(0)).writes(&part);
            task.spawn_detached(on_row(&machine, 4, |row| row.fill(7)))
                .unwrap();
        }
        let kept_part = kept.datum.whole();
        let part = lost.datum.whole();
        let gpu = machine.as_virtual().unwrap().gpu(DeviceId::gpu(0));
        gpu.fail_copy(1);
        let evicted = runtime.evict(&part, DeviceId::gpu(0)).unwrap();
        let failed = evicted.result().unwrap_err();
        assert!(
            matches!(failed, TaskError::Device(DeviceError::Operation(..))),
            "{failed}"
        );
        for on in [this(1), this(0)] {
            let reads = runtime.task().on(on).reads(&part).spawn(|| ()).unwrap();
            let error = reads.result().unwrap_err();
            let TaskError::Device(DeviceError::Operation(device, why)) = &error else {
                panic!("{error}");
            };
            assert_eq!(*device, DeviceId::gpu(0));
            assert!(why.contains("gone"), "{why}");
        }
        // The device and what else it has are there.
        let task = runtime.task().on(this(0)).updates(&kept_part);
        task.spawn(on_row(&machine, 4, |row| {
            row.iter_mut().for_each(|it| *it += 1);
        }))
        .unwrap()
        .result()
        .unwrap();
        let _failures = runtime.close();
        assert_eq!(kept.values(), [8; 4]);
    });
}

/// When the second copy is enqueued, another thread cancels the task, and the copy takes a while.
struct Interfere {
    machine: Arc<Machine>,
    copies: AtomicUsize,
    task: Task<()>,
}

impl Observer for Interfere {
    fn observe(&self, observed: Observed) {
        if let Observed::Enqueued(event, Enqueued::Copy) = observed
            && self.copies.fetch_add(1, Ordering::SeqCst) == 1
        {
            let gpu = self.machine.as_virtual().unwrap().gpu(event.stream.device);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    gpu.delay_event(Duration::from_millis(20));
                    assert!(self.task.cancel());
                });
            });
        }
    }
}

#[test]
fn who_is_cancelled_while_its_data_are_planned_gives_its_devices_back() {
    within(60, || {
        let machine = machine(2, MEMORY, Time::Real);
        let runtime = builder(&machine, 2).open().unwrap();
        let array = Array::new("A", 4);
        let part = array.datum.whole();
        let (open, wait) = gate();
        let writer = runtime.task().on(this(1)).writes(&part);
        let writer = writer.spawn(on_row(&machine, 4, move |row| {
            wait.lock().unwrap().recv().unwrap();
            row.fill(5);
        }));
        // Its data are copied to its device, and home for its core.
        let both = set(&[Member::Any(Kind::Cpu), Member::Device(DeviceId::gpu(0))]);
        let reader = runtime.task().on(both).reads(&part).spawn(|| ()).unwrap();
        let interfere = Arc::new(Interfere {
            machine: Arc::clone(&machine),
            copies: AtomicUsize::new(0),
            task: reader.clone(),
        });
        let observer: Arc<dyn Observer> = Arc::clone(&interfere) as Arc<dyn Observer>;
        machine.add_observer(Arc::clone(&observer));
        open.send(()).unwrap();
        writer.unwrap().result().unwrap();
        let cancelled = reader.result();
        assert!(
            matches!(cancelled, Err(TaskError::Cancelled)),
            "{cancelled:?}"
        );
        machine.remove_observer(&observer);
        let next = runtime.task().on(this(0)).spawn(|| ()).unwrap();
        next.result().unwrap();
        runtime.close().unwrap();
        assert_eq!(array.values(), [5; 4]);
    });
}

#[test]
fn what_is_prefetched_is_there_and_what_is_evicted_is_not() {
    within(60, || {
        let machine = machine(2, MEMORY, Time::Virtual);
        let runtime = builder(&machine, 0).open().unwrap();
        let array = Array::new("A", 100);
        let part = array.datum.whole();
        let resident = || -> Vec<u64> {
            let counters = runtime.data_counters();
            counters.iter().map(|it| it.resident).collect()
        };
        let gpu = DeviceId::gpu(1);
        runtime.prefetch(&part, gpu).unwrap().result().unwrap();
        assert_eq!(resident(), [0, 800]);
        assert_eq!(copies(&machine), [(0, 2, 1)]);
        let inner = Arc::clone(&machine);
        let task = runtime.task().on(set(&[GPU])).updates(&part);
        task.spawn(move || {
            assert_eq!(current().unwrap().streams()[0].0, gpu, "where its data are");
            enqueue(&inner, 0, &[100], |row| {
                row.fill(3);
                Ok(())
            });
        })
        .unwrap();
        assert_eq!(copies(&machine), [(0, 2, 1)]);
        runtime.evict(&part, gpu).unwrap().result().unwrap();
        assert_eq!(resident(), [0, 0]);
        assert_eq!(copies(&machine), [(0, 2, 1), (2, 0, 1)]);
        assert_eq!(array.values(), [3; 100], "it came home first");
        runtime.prefetch(&part, HOST).unwrap().result().unwrap();
        let nowhere = runtime.prefetch(&part, DeviceId::gpu(2));
        assert!(matches!(nowhere, Err(SpawnError::Devices(_))));
        runtime.close().unwrap();
    });
}

#[test]
fn more_data_than_a_device_has_memory_go_in_turns() {
    within(60, || {
        for workers in [0, 2] {
            let time = if workers == 0 {
                Time::Virtual
            } else {
                Time::Real
            };
            let machine = machine(1, 2_000, time);
            let runtime = builder(&machine, workers).open().unwrap();
            let array = Array::new("A", 1_000);
            let tiles = array.datum.grid(&[100]);
            for round in 0..3 {
                for tile in 0..10 {
                    let tile = tiles.tile(&[tile]);
                    let task = runtime.task().on(set(&[GPU])).updates(&tile);
                    task.spawn_detached(on_row(&machine, 100, move |row| {
                        row.iter_mut().for_each(|it| *it = *it * 2 + round);
                    }))
                    .unwrap();
                }
            }
            let evictions = |runtime: &Runtime| runtime.data_counters()[0].evictions;
            for tile in 0..10 {
                let tile = tiles.tile(&[tile]);
                runtime
                    .host(&[Access::new(&tile, Mode::In)])
                    .unwrap()
                    .leave();
            }
            assert!(evictions(&runtime) >= 20, "two tiles fit");
            runtime.close().unwrap();
            let expected = |start: u64| (0..3).fold(start, |it, round| it * 2 + round);
            assert!(array.values().into_iter().eq((0..1_000).map(expected)));
        }
    });
}

#[test]
fn what_was_on_a_lost_device_alone_is_lost_by_name() {
    within(60, || {
        let machine = machine(2, MEMORY, Time::Real);
        let runtime = builder(&machine, 2).open().unwrap();
        let (lost, kept) = (Array::new("gone", 4), Array::new("kept", 4));
        let (lost_part, kept_part) = (lost.datum.whole(), kept.datum.whole());
        let task = runtime
            .task()
            .on(this(0))
            .writes(&lost_part)
            .reads(&kept_part);
        task.spawn(on_row(&machine, 4, |_| ()))
            .unwrap()
            .result()
            .unwrap();
        machine
            .as_virtual()
            .unwrap()
            .gpu(DeviceId::gpu(0))
            .lose("unplugged");
        // Somebody has to find out.
        let first = runtime.task().on(this(0)).spawn(|| ()).unwrap();
        assert!(first.result().is_err());
        let reads = runtime
            .task()
            .on(set(&[GPU]))
            .reads(&kept_part)
            .spawn(|| ());
        reads.unwrap().result().unwrap();
        for sets in [Some(set(&[GPU])), None] {
            let task = runtime.task().reads(&lost_part);
            let task = match sets {
                Some(sets) => task.on(sets),
                None => task,
            };
            let error = task.spawn(|| ()).unwrap().result().unwrap_err();
            let TaskError::Device(DeviceError::Lost(device, why)) = &error else {
                panic!("{error}");
            };
            assert_eq!(*device, DeviceId::gpu(0));
            assert!(why.contains("gone"), "{why}");
        }
        let access = runtime.host(&[Access::new(&lost_part, Mode::In)]);
        let Err(HostError::Failed(_)) = &access else {
            panic!("it is lost");
        };
        assert!(access.err().unwrap().to_string().contains("gone"));
        // Written anew it is there again.
        let task = runtime.task().on(set(&[GPU])).writes(&lost_part);
        task.spawn_detached(on_row(&machine, 4, |row| row.fill(1)))
            .unwrap();
        runtime.close().unwrap();
        assert_eq!(lost.values(), [1; 4]);
    });
}

#[test]
fn a_body_that_waits_while_its_device_is_lost_comes_to_nothing() {
    within(60, || {
        for workers in [0, 2] {
            let machine = machine(1, MEMORY, Time::Real);
            let runtime = builder(&machine, workers).open().unwrap();
            let array = Array::new("A", 4);
            let part = array.datum.whole();
            let (inner, spawn) = (Arc::clone(&machine), runtime.handle());
            let body = move || {
                let (lost, again) = (Arc::clone(&inner), spawn.clone());
                let child = spawn.task().spawn(move || {
                    let gpus = lost.as_virtual().unwrap();
                    gpus.gpu(DeviceId::gpu(0)).lose("unplugged");
                    // The runtime finds out while the body waits.
                    let other = again.task().on(this(0)).spawn(|| ()).unwrap();
                    assert!(other.result().is_err());
                });
                child.unwrap().result().unwrap();
                // What refuses this is not asked.
                on_row(&inner, 4, |row| row.fill(7))();
            };
            let task = runtime.task().on(this(0)).writes(&part).spawn(body);
            let error = task.unwrap().result().err();
            let is_lost = matches!(error, Some(TaskError::Device(DeviceError::Lost(..))));
            assert!(is_lost, "{error:?}");
            let access = runtime.host(&[Access::new(&part, Mode::In)]).err();
            assert!(matches!(access, Some(HostError::Failed(_))), "{access:?}");
            let _failures = runtime.close();
        }
    });
}

#[test]
fn what_was_lost_stays_so_when_the_runtime_is_closed() {
    within(60, || {
        for device_goes in [true, false] {
            let machine = machine(1, MEMORY, Time::Virtual);
            let runtime = builder(&machine, 0).open().unwrap();
            let array = Array::new("A", 8);
            let part = |start, end| array.datum.part(Region::new([Span::range(start, end)]));
            let (whole, lost, kept) = (array.datum.whole(), part(0, 4), part(4, 8));
            let task = runtime.task().on(this(0)).writes(&lost).reads(&kept);
            let task = task.spawn(on_row(&machine, 4, |row| row.fill(9)));
            task.unwrap().result().unwrap();
            let gpu = machine.as_virtual().unwrap().gpu(DeviceId::gpu(0));
            if device_goes {
                gpu.lose("unplugged");
            } else {
                gpu.fail_copy(1);
            }
            runtime.close().unwrap();
            // Also for those who know of no devices.
            let runtime = Runtime::builder().workers(1).open().unwrap();
            let refused = runtime.host(&[Access::new(&whole, Mode::In)]).err();
            let refused = refused.expect("what is there is out of date");
            assert!(matches!(refused, HostError::Failed(_)), "{refused}");
            assert!(refused.to_string().contains("A[0:4]"), "{refused}");
            let access = runtime.host(&[Access::new(&kept, Mode::In)]).unwrap();
            assert_eq!(array.values()[4..], [4, 5, 6, 7]);
            access.leave();
            let anew = runtime.task().writes(&lost).spawn(|| ()).unwrap();
            anew.result().unwrap();
            let access = runtime.host(&[Access::new(&whole, Mode::In)]).unwrap();
            access.leave();
            runtime.close().unwrap();
        }
    });
}

#[test]
fn a_choice_between_cores_and_devices_counts_what_is_to_be_moved() {
    within(60, || {
        let machine = machine(1, MEMORY, Time::Virtual);
        let runtime = builder(&machine, 0).open().unwrap();
        // 8 MiB: longer on any link than what either takes.
        let array = Array::new("A", 1 << 20);
        let part = array.datum.whole();
        let cost = |micros| Some(Duration::from_micros(micros));
        let choice = |on, cost| Choice {
            variant: 0,
            label: String::new(),
            on,
            cost,
        };
        let list = vec![
            choice(On::Cores(Need::Core), cost(30)),
            choice(On::Devices(set(&[GPU]).remove(0)), cost(10)),
        ];
        let choices = runtime.choices("f", list).unwrap();
        let runs = || {
            let task = runtime.task().choices(&choices, 1).updates(&part);
            let task = task.spawn(|| current().unwrap().choice().unwrap()).unwrap();
            *task.result().unwrap()
        };
        assert_eq!(runs(), 0, "to bring it there takes longer");
        runtime.prefetch(&part, DeviceId::gpu(0)).unwrap();
        let task = runtime.task().on(set(&[GPU])).updates(&part);
        task.spawn(|| ()).unwrap().result().unwrap();
        assert_eq!(runs(), 1, "to bring it home does");
        runtime.close().unwrap();
    });
}

#[test]
fn an_array_that_stays_at_home_is_not_asked_for() {
    within(20, || {
        let machine = machine(1, MEMORY, Time::Real);
        let runtime = builder(&machine, 1).open().unwrap();
        let (home, away) = (Array::new("home", 4), Array::new("away", 4));
        let (home_part, away_part) = (home.datum.whole(), away.datum.whole());
        let task = runtime.task().on(set(&[GPU])).reads(&away_part);
        task.spawn(|| ()).unwrap().result().unwrap();
        let task = runtime.task().updates(&home_part).spawn(|| ());
        task.unwrap().result().unwrap();
        assert!(!home.datum.storage().unwrap().is_scattered());
        assert!(away.datum.storage().unwrap().is_scattered());
        runtime.close().unwrap();
    });
}

#[test]
fn by_locality_a_call_goes_where_its_data_are() {
    within(60, || {
        let machine = machine(3, MEMORY, Time::Virtual);
        let mapper = Mapper::named("locality", 0).unwrap();
        let runtime = builder(&machine, 0).mapper(mapper).open().unwrap();
        let array = Array::new("A", 1 << 16);
        let part = array.datum.whole();
        let choice = Choice {
            variant: 0,
            label: String::new(),
            on: On::Devices(set(&[GPU]).remove(0)),
            cost: None,
        };
        let choices = runtime.choices("f", vec![choice]).unwrap();
        let gpu = DeviceId::gpu(2);
        runtime.prefetch(&part, gpu).unwrap().result().unwrap();
        for _ in 0..3 {
            let task = runtime.task().choices(&choices, 1).updates(&part);
            let task = task.spawn(|| current().unwrap().streams()[0].0).unwrap();
            assert_eq!(*task.result().unwrap(), gpu);
        }
        runtime.close().unwrap();
        assert_eq!(copies(&machine), [(0, 3, 1), (3, 0, 1)]);
    });
}

#[test]
fn a_body_that_waits_for_a_set_that_needs_its_device_is_not_taken_for_stuck() {
    within(60, || {
        for (runahead, workers) in [(64, 0), (0, 0), (0, 2), (64, 2)] {
            for _ in 0..20 {
                let machine = machine(2, MEMORY, Time::Real);
                let builder = builder(&machine, workers).runahead(runahead);
                let runtime = builder.open().unwrap();
                let arrays = ["A", "B", "C"].map(|label| Array::new(label, 4));
                let [a, b, c] = [0, 1, 2].map(|at| arrays[at].datum.whole());
                let first = runtime.task().on(set(&[GPU])).updates(&c);
                let first = first.spawn(on_row(&machine, 4, |row| row.fill(1)));
                let inner = Arc::clone(&machine);
                let both = runtime.task().on(set(&[GPU, GPU]));
                let both = both.accesses(Access::new(&a, Mode::InOut).sharded(0));
                let both = both.spawn(move || {
                    enqueue(&inner, 0, &[2, 2], |row| {
                        row.fill(2);
                        Ok(())
                    });
                });
                let (spawn, part, inner) = (runtime.handle(), a.clone(), Arc::clone(&machine));
                let body = move || {
                    on_row(&inner, 4, |row| row.fill(3))();
                    let child = spawn.task().updates(&part).spawn(|| ()).unwrap();
                    child.result().unwrap();
                };
                let waits = runtime.task().on(set(&[GPU])).updates(&b).spawn(body);
                waits.unwrap().result().unwrap();
                both.unwrap().result().unwrap();
                first.unwrap().result().unwrap();
                runtime.close().unwrap();
                assert_eq!(arrays[0].values(), [2; 4]);
            }
        }
    });
}
