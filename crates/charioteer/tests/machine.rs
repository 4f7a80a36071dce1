//! The virtual machine: order, memory, links, faults and the clock.
#![cfg(not(loom))]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use charioteer::machine::Traffic;
use charioteer::machine::virtual_gpu::VirtualGpu;
use charioteer::machine::{
    Description, Device, DeviceError, DeviceId, DevicePointer, Enqueued, Event, Gpu, HOST, Host,
    Link, Links, Machine, Observed, Observer, Operation, Stream, Time,
};
use common::within;

const LIMIT: u64 = 60;
const MEMORY: u64 = 1 << 20;

/// A machine whose links take 1 ns a byte to and from the host, 1/4 ns between accelerators, 1/8 ns
/// within one, and 1 µs, 500 ns and nothing beyond.
fn machine(gpus: usize, time: Time) -> Arc<Machine> {
    let link = |bandwidth, nanoseconds| Link {
        bandwidth,
        latency: Duration::from_nanos(nanoseconds),
    };
    let links = Links {
        host: link(1e9, 1000),
        peer: Some(link(4e9, 500)),
        local: link(8e9, 0),
        pairs: Vec::new(),
    };
    let host = Host {
        cores: 2,
        memory: None,
    };
    let gpu = Gpu {
        name: "virtual".into(),
        memory: MEMORY,
    };
    Machine::virtual_machine(Description::new(host, vec![gpu; gpus], links, time).unwrap())
}

fn gpu(machine: &Machine, index: u16) -> &Arc<VirtualGpu> {
    machine.as_virtual().unwrap().gpu(DeviceId::gpu(index))
}

fn operation(work: impl FnOnce() + Send + 'static) -> Operation {
    Box::new(|| {
        work();
        Ok(())
    })
}

fn failing(device: DeviceId) -> (Operation, DeviceError) {
    let error = DeviceError::Operation(device, "on purpose".into());
    let operation = {
        let error = error.clone();
        Box::new(|| Err(error))
    };
    (operation, error)
}

/// Fills memory of a device, by an operation of it.
fn fill(gpu: &Arc<VirtualGpu>, stream: Stream, at: DevicePointer, bytes: u64, value: u8) {
    let device = Arc::clone(gpu);
    let fill = move || {
        let memory = device.bytes(at, bytes)?;
        // SAFETY: as many bytes are valid, and nothing else on the machine uses them now.
        unsafe { memory.as_ptr().write_bytes(value, memory.len()) };
        Ok(())
    };
    gpu.enqueue(stream, Box::new(fill)).unwrap();
}

fn host(of: &mut [u8]) -> DevicePointer {
    DevicePointer {
        device: HOST,
        address: of.as_mut_ptr() as u64,
    }
}

/// What memory of a device holds, after what is on the stream.
fn read(gpu: &VirtualGpu, stream: Stream, at: DevicePointer, bytes: usize) -> Vec<u8> {
    let mut result = vec![0; bytes];
    // SAFETY: the host waits for the copy.
    unsafe { gpu.copy(at, host(&mut result), bytes as u64, stream) }.unwrap();
    sync(gpu, stream).unwrap();
    result
}

fn sync(gpu: &VirtualGpu, stream: Stream) -> Result<(), DeviceError> {
    gpu.synchronize(gpu.record(stream)?)
}

/// What the completion of an event is called with.
fn outcome(gpu: &VirtualGpu, event: Event) -> Receiver<Result<(), DeviceError>> {
    let (told, result) = mpsc::channel();
    gpu.when_complete(event, Box::new(move |result| told.send(result).unwrap()));
    result
}

/// An operation that does not end before the sender is used or dropped.
fn gate() -> (Operation, mpsc::Sender<()>) {
    let (open, closed) = mpsc::channel();
    let wait = move || {
        let _ = closed.recv();
    };
    (operation(wait), open)
}

#[test]
fn a_machine_says_what_it_is() {
    let host = Machine::host_only(3);
    assert_eq!((host.gpus(), host.description().host().cores), (0, 3));
    assert!(host.as_virtual().is_none());
    assert!(host.has(HOST) && !host.has(DeviceId::gpu(0)));

    let machine = machine(2, Time::Real);
    assert_eq!(machine.gpus(), 2);
    assert!(machine.has(DeviceId::gpu(1)) && !machine.has(DeviceId::gpu(2)));
    let info = machine.device(DeviceId::gpu(1)).info();
    assert_eq!((info.id, info.memory), (DeviceId::gpu(1), MEMORY));
    assert_eq!(machine.device(info.id).free_memory(), MEMORY);
}

#[test]
fn an_event_of_an_idle_stream_is_complete() {
    let machine = machine(1, Time::Real);
    let gpu = gpu(&machine, 0);
    let stream = gpu.create_stream().unwrap();
    let event = gpu.record(stream).unwrap();
    assert_eq!(gpu.is_complete(event), Ok(true));
    assert_eq!(gpu.record(stream), Ok(event));
    gpu.synchronize(event).unwrap();
    let thread = std::thread::current().id();
    let (told, result) = mpsc::channel();
    let call = move |result| told.send((result, std::thread::current().id())).unwrap();
    gpu.when_complete(event, Box::new(call));
    assert_eq!(result.try_recv(), Ok((Ok(()), thread)));
    assert_eq!(gpu.counters().host_synchronisations, 0);
}

#[test]
fn a_stream_is_in_order_and_streams_are_side_by_side() {
    within(LIMIT, || {
        let machine = machine(1, Time::Real);
        let gpu = gpu(&machine, 0);
        let streams = [(); 3].map(|()| gpu.create_stream().unwrap());
        let meet = Arc::new(Barrier::new(streams.len()));
        let log = Arc::new(Mutex::new(vec![Vec::new(); streams.len()]));
        for step in 0..50 {
            for (index, stream) in streams.into_iter().enumerate() {
                let (meet, log) = (Arc::clone(&meet), Arc::clone(&log));
                let work = operation(move || {
                    meet.wait(); // all of them are here at once, or this never ends
                    log.lock().unwrap()[index].push(step);
                });
                gpu.enqueue(stream, work).unwrap();
            }
        }
        let events = streams.map(|stream| gpu.record(stream).unwrap());
        for told in events.map(|event| outcome(gpu, event)) {
            told.recv().unwrap().unwrap();
        }
        assert!(
            events
                .iter()
                .all(|&event| gpu.is_complete(event) == Ok(true))
        );
        assert_eq!(*log.lock().unwrap(), vec![Vec::from_iter(0..50); 3]);
    });
}

#[test]
fn a_stream_waits_for_one_of_another_device() {
    within(LIMIT, || {
        let machine = machine(2, Time::Real);
        let (first, second) = (gpu(&machine, 0), gpu(&machine, 1));
        let (a, b) = (
            first.create_stream().unwrap(),
            second.create_stream().unwrap(),
        );
        let (work, open) = gate();
        let count = Arc::new(AtomicUsize::new(0));
        first.enqueue(a, work).unwrap();
        let add = |expected| {
            let count = Arc::clone(&count);
            operation(move || assert_eq!(count.fetch_add(1, Ordering::Relaxed), expected))
        };
        first.enqueue(a, add(0)).unwrap();
        second.wait(b, first.record(a).unwrap()).unwrap();
        second.enqueue(b, add(1)).unwrap();
        first.wait(a, second.record(b).unwrap()).unwrap();
        first.enqueue(a, add(2)).unwrap();
        let last = first.record(a).unwrap();
        assert_eq!(second.is_complete(second.record(b).unwrap()), Ok(false));
        assert_eq!(first.is_complete(last), Ok(false));
        drop(open);
        second.synchronize(last).unwrap(); // any device knows any event
        assert_eq!(count.load(Ordering::Relaxed), 3);
        assert_eq!(first.counters().stream_waits, 1);
        assert_eq!(second.counters().stream_waits, 1);
        assert_eq!(first.counters().operations, 3);
    });
}

#[test]
fn many_threads_use_the_devices_at_once() {
    const THREADS: u16 = 4;
    const ROUNDS: usize = 300;
    within(LIMIT, || {
        let machine = machine(2, Time::Real);
        let called = Arc::new(AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for index in 0..THREADS {
                let (machine, called) = (&machine, Arc::clone(&called));
                scope.spawn(move || {
                    let (a, b) = (gpu(machine, index % 2), gpu(machine, (index + 1) % 2));
                    let [s, t] = [a, b].map(|gpu| gpu.create_stream().unwrap());
                    let ran = Arc::new(AtomicUsize::new(0));
                    for round in 0..ROUNDS {
                        let next = |expected| {
                            let ran = Arc::clone(&ran);
                            operation(move || {
                                assert_eq!(ran.fetch_add(1, Ordering::Relaxed), expected);
                            })
                        };
                        a.enqueue(s, next(2 * round)).unwrap();
                        b.wait(t, a.record(s).unwrap()).unwrap();
                        b.enqueue(t, next(2 * round + 1)).unwrap();
                        let event = b.record(t).unwrap();
                        a.wait(s, event).unwrap();
                        let called = Arc::clone(&called);
                        let call = move |result: Result<(), DeviceError>| {
                            result.unwrap();
                            called.fetch_add(1, Ordering::Relaxed);
                        };
                        a.when_complete(event, Box::new(call));
                        if round % 7 == 0 {
                            a.synchronize(event).unwrap();
                            assert_eq!(ran.load(Ordering::Relaxed), 2 * round + 2);
                        }
                    }
                    sync(a, s).unwrap();
                });
            }
        });
        // A completion is called soon after its event is complete, not before that is seen.
        while called.load(Ordering::Relaxed) < usize::from(THREADS) * ROUNDS {
            std::thread::yield_now();
        }
    });
}

#[test]
fn what_was_never_recorded_or_is_of_another_device_is_refused() {
    let machine = machine(2, Time::Real);
    let (first, second) = (gpu(&machine, 0), gpu(&machine, 1));
    let stream = first.create_stream().unwrap();
    let later = Event {
        stream,
        position: 1,
    };
    let none = Event {
        stream: Stream {
            number: 70_000,
            ..stream
        },
        position: 0,
    };
    for event in [later, none] {
        assert!(matches!(
            first.is_complete(event),
            Err(DeviceError::Operation(..))
        ));
        assert!(matches!(
            first.synchronize(event),
            Err(DeviceError::Operation(..))
        ));
        assert!(matches!(
            first.wait(stream, event),
            Err(DeviceError::Operation(..))
        ));
        assert!(outcome(first, event).try_recv().unwrap().is_err());
    }
    assert!(first.record(none.stream).is_err());
    assert!(first.busy(none.stream, Duration::ZERO).is_err());
    let other = DeviceError::NoAccess(DeviceId::gpu(1), DeviceId::gpu(0));
    assert_eq!(second.record(stream), Err(other.clone()));
    assert_eq!(second.busy(stream, Duration::ZERO), Err(other.clone()));
    assert_eq!(second.allocate(1, stream), Err(other));
}

#[test]
fn memory_is_filled_with_a_pattern_and_ends() {
    within(LIMIT, || {
        let machine = machine(2, Time::Real);
        let gpu = gpu(&machine, 0);
        let stream = gpu.create_stream().unwrap();
        let half = gpu.allocate(MEMORY / 2, stream).unwrap();
        let full = |wanted, free| DeviceError::OutOfMemory {
            device: DeviceId::gpu(0),
            wanted,
            free,
        };
        assert_eq!(
            gpu.allocate(MEMORY / 2 + 1, stream),
            Err(full(MEMORY / 2 + 1, MEMORY / 2))
        );
        assert_eq!(
            gpu.allocate(u64::MAX, stream),
            Err(full(u64::MAX, MEMORY / 2))
        );
        let rest = gpu.allocate(MEMORY / 2, stream).unwrap();
        assert_eq!(gpu.free_memory(), 0);
        assert_eq!(gpu.allocate(1, stream), Err(full(1, 0)));
        let nothing = gpu.allocate(0, stream).unwrap();

        let unwritten = read(gpu, stream, half.offset(8), 8);
        assert!(f64::from_le_bytes(unwritten[..8].try_into().unwrap()).is_nan());
        assert!(f32::from_le_bytes(unwritten[..4].try_into().unwrap()).is_nan());
        fill(gpu, stream, rest, 100, 7);
        assert_eq!(read(gpu, stream, rest.offset(99), 2)[..1], [7]);

        // Every way to leave an allocation.
        let mut to = [0; 16];
        let size = MEMORY / 2;
        for (at, bytes) in [
            (half.offset(size), 1),
            (half.offset(size - 1), 2),
            (half.offset(1), size),
            (nothing, 1),
            (rest.offset(size + 1), 0),
            (
                DevicePointer {
                    address: half.address - 1,
                    ..half
                },
                1,
            ),
            (DevicePointer { address: 0, ..half }, 1),
            (
                DevicePointer {
                    device: half.device,
                    ..host(&mut to)
                },
                1,
            ),
            (half, u64::MAX),
        ] {
            // SAFETY: it is refused.
            let copied = unsafe { gpu.copy(at, host(&mut to), bytes, stream) };
            let bad = DeviceError::BadAddress(at, bytes);
            assert!(
                copied == Err(bad) || copied == Err(DeviceError::BadAddress(host(&mut to), bytes)),
                "{copied:?}"
            );
        }
        // A device's address is none of the host's, nor another device's.
        for wrong in [HOST, DeviceId::gpu(1)] {
            let to = DevicePointer {
                device: wrong,
                ..rest
            };
            // SAFETY: it is refused.
            let copied = unsafe { gpu.copy(half, to, 1, stream) };
            assert!(matches!(
                copied,
                Err(DeviceError::BadAddress(..) | DeviceError::NoAccess(..))
            ));
        }

        gpu.free(half, stream).unwrap();
        assert_eq!(gpu.free_memory(), MEMORY / 2);
        for bad in [half, half.offset(1), rest.offset(256)] {
            assert_eq!(gpu.free(bad, stream), Err(DeviceError::BadAddress(bad, 0)));
        }
        // SAFETY: it is refused.
        let copied = unsafe { gpu.copy(half, rest, 1, stream) };
        assert_eq!(copied, Err(DeviceError::BadAddress(half, 1)));
        let again = gpu.allocate(MEMORY / 2, stream).unwrap();
        assert_ne!(again, half);
        sync(gpu, stream).unwrap();
    });
}

#[test]
fn memory_is_the_devices_own() {
    within(LIMIT, || {
        let machine = machine(3, Time::Real);
        let [a, b, c] = [0, 1, 2].map(|index| Arc::clone(gpu(&machine, index)));
        let [on_a, on_b, on_c] = [&a, &b, &c].map(|gpu| gpu.create_stream().unwrap());
        let id = DeviceId::gpu;
        let of_a = a.allocate(64, on_a).unwrap();
        let of_b = b.allocate(64, on_b).unwrap();

        // The host, in a program's thread or in an operation of another device.
        let host_access = |device| Some(DeviceError::NoAccess(HOST, device));
        assert_eq!(a.bytes(of_a, 1).err(), host_access(id(0)));
        let access = |run: &Arc<VirtualGpu>, stream, by: &Arc<VirtualGpu>, at| {
            let (told, result) = mpsc::channel();
            let by = Arc::clone(by);
            let work = operation(move || told.send(by.bytes(at, 64).err()).unwrap());
            run.enqueue(stream, work).unwrap();
            result.recv().unwrap()
        };
        assert_eq!(access(&a, on_a, &a, of_a), None);
        assert_eq!(access(&b, on_b, &a, of_a), host_access(id(0)));
        assert_eq!(
            access(&b, on_b, &b, of_a),
            Some(DeviceError::NoAccess(id(1), id(0)))
        );
        // SAFETY: it is refused.
        let copied = unsafe { b.copy(of_a, of_b, 64, on_b) };
        assert_eq!(copied, Err(DeviceError::NoAccess(id(1), id(0))));
        // SAFETY: it is refused.
        let copied = unsafe { c.copy(of_a, of_b, 64, on_c) };
        assert!(matches!(copied, Err(DeviceError::NoAccess(..))));

        b.enable_peer(id(0)).unwrap();
        b.enable_peer(id(0)).unwrap();
        for peer in [HOST, id(1), id(3)] {
            assert_eq!(b.enable_peer(peer), Err(DeviceError::NoAccess(id(1), peer)));
        }
        assert_eq!(access(&b, on_b, &b, of_a), None);
        assert!(access(&a, on_a, &a, of_b).is_some(), "access is one way");
        fill(&a, on_a, of_a, 64, 9);
        b.wait(on_b, a.record(on_a).unwrap()).unwrap();
        // SAFETY: both ends are memory of devices.
        unsafe { b.copy(of_a, of_b, 64, on_b) }.unwrap();
        assert_eq!(read(&b, on_b, of_b, 64), [9; 64]);
        let traffic = |from, to| Traffic {
            from,
            to,
            copies: 1,
            bytes: 64,
        };
        let expected = [traffic(id(0), id(1)), traffic(id(1), HOST)];
        assert_eq!(b.counters().traffic, expected);
    });
}

#[test]
fn memory_goes_back_in_stream_order() {
    within(LIMIT, || {
        let machine = machine(1, Time::Virtual);
        let clock = machine.as_virtual().unwrap().clock();
        let gpu = gpu(&machine, 0);
        let [first, second] = [(); 2].map(|()| gpu.create_stream().unwrap());
        let old = gpu.allocate(MEMORY, first).unwrap();
        gpu.busy(first, Duration::from_nanos(1000)).unwrap();
        fill(gpu, first, old, 8, 1);
        gpu.free(old, first).unwrap();
        gpu.busy(first, Duration::from_nanos(1000)).unwrap();
        // There is room, in stream order: the second stream waits until the first one is there.
        assert_eq!(gpu.free_memory(), MEMORY);
        let new = gpu.allocate(MEMORY, second).unwrap();
        fill(gpu, second, new, 8, 2);
        sync(gpu, second).unwrap();
        assert_eq!(clock.now(), 1000);
        sync(gpu, first).unwrap();
        assert_eq!(clock.now(), 2000);
        // What gives memory back behind a failure gives it back.
        let (work, error) = failing(DeviceId::gpu(0));
        gpu.busy(first, Duration::from_nanos(1000)).unwrap();
        gpu.enqueue(first, work).unwrap();
        gpu.free(new, first).unwrap();
        let again = gpu.allocate(MEMORY, second).unwrap();
        fill(gpu, second, again, 8, 3);
        sync(gpu, second).unwrap();
        assert_eq!(clock.now(), 3000);
        assert_eq!(sync(gpu, first), Err(error));
    });
}

#[test]
fn an_operation_that_comes_too_late_finds_no_memory() {
    within(LIMIT, || {
        let machine = machine(1, Time::Virtual);
        let gpu = gpu(&machine, 0);
        let [first, second] = [(); 2].map(|()| gpu.create_stream().unwrap());
        let (a, b) = (
            gpu.allocate(8, first).unwrap(),
            gpu.allocate(8, first).unwrap(),
        );
        gpu.busy(second, Duration::from_nanos(10)).unwrap();
        fill(gpu, second, a, 8, 1);
        gpu.free(a, first).unwrap();
        let bad = DeviceError::BadAddress(a, 8);
        assert_eq!(sync(gpu, second), Err(bad));
        // SAFETY: both ends are memory of devices.
        unsafe { gpu.copy(b, b, 8, first) }.unwrap();
        gpu.free(b, gpu.create_stream().unwrap()).unwrap();
        assert_eq!(sync(gpu, first), Err(DeviceError::BadAddress(b, 8)));
    });
}

#[test]
fn a_link_carries_one_copy_at_a_time_in_each_direction() {
    within(LIMIT, || {
        let machine = machine(2, Time::Virtual);
        let clock = machine.as_virtual().unwrap().clock();
        let (a, b) = (gpu(&machine, 0), gpu(&machine, 1));
        a.enable_peer(DeviceId::gpu(1)).unwrap();
        let streams = [(); 4].map(|()| a.create_stream().unwrap());
        let on_b = b.create_stream().unwrap();
        let of_a = a.allocate(4000, streams[0]).unwrap();
        let of_b = b.allocate(4000, on_b).unwrap();
        let mut memory = [vec![1; 4000], vec![2; 4000], vec![0; 4000]];
        let [one, two, back] = memory.each_mut().map(|bytes| host(bytes));
        let copy = |from, to, bytes, stream| {
            // SAFETY: the vectors outlive the test's waits.
            unsafe { a.copy(from, to, bytes, stream) }.unwrap();
        };
        copy(one, of_a, 2000, streams[0]); // 3 µs
        copy(two, of_a.offset(2000), 2000, streams[1]); // as long, behind it
        copy(of_b, of_a, 1, streams[2]); // another link
        copy(of_a, back, 1000, streams[3]); // another direction
        let done = streams.map(|stream| {
            let event = a.record(stream).unwrap();
            a.synchronize(event).unwrap();
            clock.now()
        });
        assert_eq!(done, [3000, 6000, 6000, 6000]);
        let begin = clock.now();
        copy(one, of_a, 2000, streams[0]);
        copy(two, of_a.offset(2000), 2000, streams[1]);
        copy(of_b, of_a, 4000, streams[2]);
        copy(of_a, back, 1000, streams[3]);
        let done = [2, 3, 0, 1].map(|index| {
            sync(a, streams[index]).unwrap();
            clock.now() - begin
        });
        assert_eq!(done, [1500, 2000, 3000, 6000]);
        copy(of_a, of_a.offset(2000), 800, streams[0]);
        sync(a, streams[0]).unwrap();
        assert_eq!(clock.now() - begin, 6100);
        let result = read(a, streams[0], of_a, 4000);
        // The first copy of the last three came after that from the other device was done.
        assert!(result[..2800].iter().all(|&byte| byte == 1));
        assert!(result[2800..].iter().all(|&byte| byte == 2));
        assert!(!clock.advance());
    });
}

#[test]
fn in_real_time_a_copy_takes_its_time() {
    within(LIMIT, || {
        let machine = machine(1, Time::Real);
        let clock = machine.as_virtual().unwrap().clock();
        let gpu = gpu(&machine, 0);
        let [first, second] = [(); 2].map(|()| gpu.create_stream().unwrap());
        let at = gpu.allocate(MEMORY, first).unwrap();
        let mut memory = vec![3; MEMORY as usize];
        let begin = clock.now();
        for stream in [first, second, first, second] {
            // SAFETY: the vector outlives the waits below.
            unsafe { gpu.copy(host(&mut memory), at, MEMORY, stream) }.unwrap();
        }
        gpu.busy(first, Duration::from_millis(1)).unwrap();
        sync(gpu, first).unwrap();
        sync(gpu, second).unwrap();
        assert!(clock.now() - begin >= 4 * (MEMORY + 1000));
        assert_eq!(read(gpu, first, at, 100), [3; 100]);
        assert!(!clock.advance());
    });
}

#[test]
fn a_failure_goes_down_its_stream_and_to_those_who_wait() {
    for time in [Time::Real, Time::Virtual] {
        within(LIMIT, || {
            let machine = machine(2, time);
            let (a, b) = (gpu(&machine, 0), gpu(&machine, 1));
            let [on_a, other] = [(); 2].map(|()| a.create_stream().unwrap());
            let [on_b, late] = [(); 2].map(|()| b.create_stream().unwrap());
            let runs = Arc::new(AtomicUsize::new(0));
            let add = || {
                let runs = Arc::clone(&runs);
                operation(move || {
                    runs.fetch_add(1, Ordering::Relaxed);
                })
            };
            a.busy(on_a, Duration::from_micros(10)).unwrap();
            let before = a.record(on_a).unwrap();
            let (work, error) = failing(DeviceId::gpu(0));
            a.enqueue(on_a, work).unwrap();
            let at = a.record(on_a).unwrap();
            a.enqueue(on_a, add()).unwrap();
            let behind = a.record(on_a).unwrap();
            b.wait(on_b, before).unwrap();
            b.enqueue(on_b, add()).unwrap();
            let well = b.record(on_b).unwrap();
            b.wait(on_b, at).unwrap();
            b.enqueue(on_b, add()).unwrap();
            let ill = b.record(on_b).unwrap();
            a.enqueue(other, add()).unwrap();
            let apart = a.record(other).unwrap();

            let told = [before, at, behind, well, ill, apart].map(|event| outcome(a, event));
            assert_eq!(a.synchronize(behind), Err(error.clone()));
            assert_eq!(b.synchronize(ill), Err(error.clone()));
            a.synchronize(apart).unwrap();
            let failed = Err(error.clone());
            let expected = [
                Ok(()),
                failed.clone(),
                failed.clone(),
                Ok(()),
                failed,
                Ok(()),
            ];
            assert_eq!(told.map(|it| it.recv().unwrap()), expected);
            assert_eq!(a.is_complete(before), Ok(true));
            assert_eq!(a.is_complete(at), Err(error.clone()));
            // Later too, and where the failure is known before the wait.
            assert_eq!(sync(a, on_a), Err(error.clone()));
            b.wait(late, before).unwrap();
            assert_eq!(sync(b, late), Ok(()));
            b.wait(late, behind).unwrap();
            assert_eq!(sync(b, late), Err(error));
            assert_eq!(runs.load(Ordering::Relaxed), 2);
        });
    }
}

#[test]
fn a_panic_fails_its_operation() {
    within(LIMIT, || {
        let machine = machine(1, Time::Real);
        let gpu = gpu(&machine, 0);
        let [first, second] = [(); 2].map(|()| gpu.create_stream().unwrap());
        gpu.enqueue(first, operation(|| panic!("out of {}", "luck")))
            .unwrap();
        gpu.enqueue(second, operation(|| ())).unwrap();
        let error = DeviceError::Operation(DeviceId::gpu(0), "out of luck".into());
        assert_eq!(sync(gpu, first), Err(error));
        assert_eq!(sync(gpu, second), Ok(()));
        // A completion that panics keeps none from being called.
        let (work, open) = gate();
        gpu.enqueue(second, work).unwrap();
        let event = gpu.record(second).unwrap();
        gpu.when_complete(event, Box::new(|_| panic!("on purpose")));
        let told = outcome(gpu, event);
        drop(open);
        assert_eq!(told.recv(), Ok(Ok(())));
    });
}

#[test]
fn the_nth_copy_fails() {
    within(LIMIT, || {
        let machine = machine(1, Time::Virtual);
        let gpu = gpu(&machine, 0);
        let stream = gpu.create_stream().unwrap();
        let at = gpu.allocate(8, stream).unwrap();
        gpu.fail_copy(2);
        gpu.fail_copy(4);
        let copies: Vec<bool> = (0..5)
            .map(|_| {
                let stream = gpu.create_stream().unwrap();
                // SAFETY: both ends are memory of devices.
                unsafe { gpu.copy(at, at.offset(4), 4, stream) }.unwrap();
                sync(gpu, stream).is_ok()
            })
            .collect();
        assert_eq!(copies, [true, false, true, false, true]);
    });
}

#[test]
fn an_event_is_late() {
    within(LIMIT, || {
        let machine = machine(1, Time::Virtual);
        let clock = machine.as_virtual().unwrap().clock();
        let gpu = gpu(&machine, 0);
        let stream = gpu.create_stream().unwrap();
        gpu.busy(stream, Duration::from_nanos(10)).unwrap();
        gpu.delay_event(Duration::from_nanos(5));
        let event = gpu.record(stream).unwrap();
        assert_eq!(gpu.record(stream), Ok(event));
        gpu.synchronize(event).unwrap();
        assert_eq!(clock.now(), 15);
        assert_eq!(gpu.record(stream), Ok(event));
    });
}

#[test]
fn a_lost_device_keeps_nobody_waiting() {
    for time in [Time::Real, Time::Virtual] {
        within(LIMIT, || {
            let machine = machine(2, time);
            let (a, b) = (gpu(&machine, 0), gpu(&machine, 1));
            let on_a = [(); 3].map(|()| a.create_stream().unwrap());
            let [on_b, other] = [(); 2].map(|()| b.create_stream().unwrap());
            let lost = DeviceError::Lost(DeviceId::gpu(0), "on fire".into());
            let memory = a.allocate(8, on_a[0]).unwrap();
            a.enqueue(on_a[0], operation(|| ())).unwrap();
            let done = a.record(on_a[0]).unwrap();
            a.synchronize(done).unwrap();
            let hour = Duration::from_secs(3600);
            a.busy(on_a[0], hour).unwrap();
            a.wait(on_a[1], a.record(on_a[0]).unwrap()).unwrap();
            a.enqueue(on_a[1], operation(|| unreachable!("it is lost")))
                .unwrap();
            let events = on_a.map(|stream| a.record(stream).unwrap());
            b.wait(on_b, events[1]).unwrap();
            b.enqueue(on_b, operation(|| unreachable!("it was to wait")))
                .unwrap();
            let victim = b.record(on_b).unwrap();
            let told = [events[0], events[1], events[2], victim].map(|event| outcome(b, event));
            let sleeper = {
                let a = Arc::clone(a);
                std::thread::spawn(move || match time {
                    Time::Real => a.synchronize(events[1]),
                    Time::Virtual => Err(DeviceError::Lost(DeviceId::gpu(0), "on fire".into())),
                })
            };

            a.lose("on fire");
            a.lose("again");
            let failed = || Err(lost.clone());
            assert_eq!(sleeper.join().unwrap(), failed());
            let expected = [failed(), failed(), Ok(()), failed()];
            assert_eq!(told.map(|it| it.recv().unwrap()), expected);
            assert_eq!(a.is_complete(events[0]), Err(lost.clone()));
            assert_eq!(a.is_complete(done), Ok(true), "it was complete before");
            assert_eq!(a.record(on_a[2]), Err(lost.clone()));
            assert_eq!(a.create_stream(), Err(lost.clone()));
            assert_eq!(a.wait(on_a[2], victim), failed());
            assert_eq!(a.enqueue(on_a[2], operation(|| ())), failed());
            assert_eq!(a.busy(on_a[2], hour), failed());
            assert_eq!(a.allocate(1, on_a[2]), Err(lost.clone()));
            assert_eq!(a.free(memory, on_a[2]), failed());
            assert_eq!(a.enable_peer(DeviceId::gpu(1)), failed());
            // SAFETY: it is refused.
            let copied = unsafe { a.copy(memory, memory, 1, on_a[2]) };
            assert_eq!(copied, failed());
            b.enable_peer(DeviceId::gpu(0)).unwrap();
            let of_b = b.allocate(8, other).unwrap();
            // SAFETY: it is refused.
            let copied = unsafe { b.copy(memory, of_b, 1, other) };
            assert_eq!(copied, failed());
            assert_eq!(sync(b, other), Ok(()), "the others go on");
            let clock = machine.as_virtual().unwrap().clock();
            assert!(clock.now() < 3_600_000_000_000);
            assert!(!clock.advance());
        });
    }
}

#[test]
fn what_runs_ends_before_its_event_when_the_device_is_lost() {
    within(LIMIT, || {
        let machine = machine(1, Time::Real);
        let gpu = gpu(&machine, 0);
        let stream = gpu.create_stream().unwrap();
        let (inside, entered) = mpsc::channel();
        let (open, closed) = mpsc::channel::<()>();
        let work = operation(move || {
            inside.send(()).unwrap();
            let _ = closed.recv();
        });
        gpu.enqueue(stream, work).unwrap();
        gpu.enqueue(stream, operation(|| unreachable!("it is lost")))
            .unwrap();
        let event = gpu.record(stream).unwrap();
        entered.recv().unwrap();
        gpu.lose("on fire");
        assert_eq!(gpu.is_complete(event), Ok(false));
        let told = outcome(gpu, event);
        assert!(told.try_recv().is_err());
        drop(open);
        let lost = Err(DeviceError::Lost(DeviceId::gpu(0), "on fire".into()));
        assert_eq!(told.recv().unwrap(), lost);
    });
}

#[test]
fn a_device_is_lost_after_so_many_operations() {
    for time in [Time::Real, Time::Virtual] {
        within(LIMIT, || {
            let machine = machine(1, time);
            let gpu = gpu(&machine, 0);
            let stream = gpu.create_stream().unwrap();
            let at = gpu.allocate(8, stream).unwrap();
            gpu.lose_after(3, "worn out");
            let (first, open) = gate();
            let runs = Arc::new(AtomicUsize::new(0));
            let count = || {
                let runs = Arc::clone(&runs);
                operation(move || {
                    runs.fetch_add(1, Ordering::Relaxed);
                })
            };
            let events = [first, count(), count()].map(|work| {
                gpu.enqueue(stream, work).unwrap();
                // SAFETY: both ends are memory of devices.
                unsafe { gpu.copy(at, at.offset(4), 4, stream) }.unwrap();
                gpu.record(stream).unwrap()
            });
            drop(open);
            let last = events[1];
            let told = outcome(gpu, last);
            let lost = Err(DeviceError::Lost(DeviceId::gpu(0), "worn out".into()));
            assert_eq!(gpu.synchronize(last), lost);
            assert_eq!(told.recv().unwrap(), lost);
            assert_eq!(gpu.synchronize(events[0]), Ok(()));
            assert_eq!(runs.load(Ordering::Relaxed), 1);
        });
    }
}

#[test]
fn the_clock_does_what_is_due_first() {
    let machine = machine(2, Time::Virtual);
    let clock = machine.as_virtual().unwrap().clock();
    let (a, b) = (gpu(&machine, 0), gpu(&machine, 1));
    let log = Arc::new(Mutex::new(Vec::new()));
    let write = |what| {
        let log = Arc::clone(&log);
        operation(move || log.lock().unwrap().push(what))
    };
    let [s, t] = [(); 2].map(|()| a.create_stream().unwrap());
    let u = b.create_stream().unwrap();
    b.busy(u, Duration::from_nanos(5)).unwrap();
    b.enqueue(u, write("u at 5")).unwrap();
    a.enqueue(s, write("s at 0")).unwrap();
    a.busy(s, Duration::from_nanos(5)).unwrap();
    a.enqueue(t, write("t at 0")).unwrap();
    a.busy(t, Duration::from_nanos(3)).unwrap();
    a.enqueue(t, write("t at 3")).unwrap();
    a.enqueue(s, write("s at 5")).unwrap();
    a.wait(t, b.record(u).unwrap()).unwrap();
    a.enqueue(t, write("t at 5")).unwrap();
    let end = a.record(t).unwrap();
    let called = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&called);
    a.when_complete(
        end,
        Box::new(move |result| {
            result.unwrap();
            count.fetch_add(1, Ordering::Relaxed);
        }),
    );
    assert!(log.lock().unwrap().is_empty(), "nothing runs by itself");
    let mut times = vec![clock.now()];
    while clock.advance() {
        times.push(clock.now());
    }
    assert_eq!(times, [0, 0, 0, 3, 3, 5, 5, 5, 5, 5]);
    let expected = ["s at 0", "t at 0", "t at 3", "u at 5", "s at 5", "t at 5"];
    assert_eq!(*log.lock().unwrap(), expected);
    assert_eq!(called.load(Ordering::Relaxed), 1);
}

#[test]
fn the_clock_is_shared_by_threads_and_moved_from_within() {
    within(LIMIT, || {
        let machine = machine(4, Time::Virtual);
        std::thread::scope(|scope| {
            for index in 0..4 {
                let machine = &machine;
                scope.spawn(move || {
                    let own = gpu(machine, index);
                    let next = Arc::clone(gpu(machine, (index + 1) % 4));
                    let stream = own.create_stream().unwrap();
                    let of_next = next.create_stream().unwrap();
                    for _ in 0..50 {
                        next.busy(of_next, Duration::from_nanos(7)).unwrap();
                        let event = next.record(of_next).unwrap();
                        let next = Arc::clone(&next);
                        let work = Box::new(move || next.synchronize(event));
                        own.enqueue(stream, work).unwrap();
                        sync(own, stream).unwrap();
                        assert_eq!(own.is_complete(event), Ok(true));
                    }
                });
            }
        });
        assert!(!machine.as_virtual().unwrap().clock().advance());
        // An operation that waits for what is behind it is told, and not left to hang.
        let gpu = gpu(&machine, 0);
        let stream = gpu.create_stream().unwrap();
        let device = Arc::clone(gpu);
        let work = move || {
            device.busy(stream, Duration::from_nanos(1))?;
            device.synchronize(device.record(stream)?)
        };
        gpu.enqueue(stream, Box::new(work)).unwrap();
        assert!(matches!(sync(gpu, stream), Err(DeviceError::Operation(..))));
    });
}

#[test]
fn a_dropped_machine_lets_everybody_go() {
    within(LIMIT, || {
        let machine = machine(1, Time::Real);
        let gpu = Arc::clone(gpu(&machine, 0));
        let [first, second] = [(); 2].map(|()| gpu.create_stream().unwrap());
        let (work, open) = gate();
        let dropped = Arc::new(());
        let held = Arc::clone(&dropped);
        gpu.enqueue(first, work).unwrap();
        gpu.enqueue(first, operation(move || drop(held))).unwrap();
        gpu.busy(second, Duration::from_secs(3600)).unwrap();
        let events = [first, second].map(|stream| gpu.record(stream).unwrap());
        let told = events.map(|event| outcome(&gpu, event));
        drop(machine);
        drop(open);
        for told in told {
            assert!(matches!(told.recv().unwrap(), Err(DeviceError::Lost(..))));
        }
        assert_eq!(Arc::strong_count(&dropped), 1);
        assert!(matches!(gpu.record(first), Err(DeviceError::Lost(..))));
        assert!(matches!(gpu.create_stream(), Err(DeviceError::Lost(..))));
    });
}

#[derive(Default)]
struct Log(Mutex<Vec<Observed>>);

impl Observer for Log {
    fn observe(&self, observed: Observed) {
        self.0.lock().unwrap().push(observed);
    }
}

#[test]
fn an_observer_is_told_what_the_devices_see() {
    let machine = machine(1, Time::Virtual);
    let log = Arc::new(Log::default());
    let observer: Arc<dyn Observer> = Arc::clone(&log) as _;
    let gpu = gpu(&machine, 0);
    let s = gpu.create_stream().unwrap();
    machine.add_observer(Arc::clone(&observer));
    let t = gpu.create_stream().unwrap();
    gpu.busy(s, Duration::from_nanos(1)).unwrap();
    let event = gpu.record(s).unwrap();
    gpu.wait(t, event).unwrap();
    assert_eq!(gpu.is_complete(event), Ok(false));
    gpu.enqueue(t, operation(|| ())).unwrap();
    let last = gpu.record(t).unwrap();
    gpu.synchronize(last).unwrap();
    gpu.follow(t, event).unwrap();
    gpu.synchronize(last).unwrap();
    machine.remove_observer(&observer);
    gpu.busy(s, Duration::from_nanos(1)).unwrap();
    let waited = Event {
        position: 1,
        ..last
    };
    let expected = [
        Observed::Created(t),
        Observed::Enqueued(event, Enqueued::Busy),
        Observed::Recorded(event),
        Observed::Waits {
            stream: t,
            from: 1,
            event,
        },
        Observed::Enqueued(last, Enqueued::Operation),
        Observed::Recorded(last),
        Observed::Completed(event),
        Observed::Completed(waited),
        Observed::Completed(last),
        Observed::Synchronised(last),
        Observed::Seen(event),
        Observed::Waits {
            stream: t,
            from: 3,
            event,
        },
        Observed::Seen(last),
    ];
    assert_eq!(*log.0.lock().unwrap(), expected);
}

#[test]
fn marks_measure_what_lies_between_them() {
    within(LIMIT, || {
        let machine = machine(2, Time::Virtual);
        let (first, second) = (gpu(&machine, 0), gpu(&machine, 1));
        let (stream, other) = (
            first.create_stream().unwrap(),
            second.create_stream().unwrap(),
        );
        let milliseconds = Duration::from_millis;
        second.busy(other, milliseconds(7)).unwrap();
        let before = second.record(other).unwrap();
        // Behind the wait, so that it is not counted.
        first.wait(stream, before).unwrap();
        let start = first.mark(stream).unwrap();
        first.busy(stream, milliseconds(5)).unwrap();
        let end = first.mark(stream).unwrap();
        first.busy(stream, milliseconds(1)).unwrap();
        assert_eq!(first.elapsed(&start, &end), None, "the stream is not there");
        sync(first, stream).unwrap();
        assert_eq!(first.elapsed(&start, &end), Some(milliseconds(5)));
        // On a stream that rests it is now, not when its last work ended.
        second.busy(other, milliseconds(30)).unwrap();
        sync(second, other).unwrap();
        let start = first.mark(stream).unwrap();
        first.busy(stream, milliseconds(2)).unwrap();
        let end = first.mark(stream).unwrap();
        sync(first, stream).unwrap();
        assert_eq!(first.elapsed(&start, &end), Some(milliseconds(2)));
        // Of a device that is lost they say nothing.
        let start = first.mark(stream).unwrap();
        first.busy(stream, milliseconds(2)).unwrap();
        let end = first.mark(stream).unwrap();
        first.lose("pulled out");
        assert_eq!(first.elapsed(&start, &end), None);
        assert!(first.mark(stream).is_err());
    });
}

#[test]
fn in_real_time_marks_measure_as_well() {
    within(LIMIT, || {
        let machine = machine(1, Time::Real);
        let gpu = gpu(&machine, 0);
        let stream = gpu.create_stream().unwrap();
        let start = gpu.mark(stream).unwrap();
        let time = Duration::from_millis(3);
        gpu.busy(stream, time).unwrap();
        let end = gpu.mark(stream).unwrap();
        sync(gpu, stream).unwrap();
        let elapsed = gpu.elapsed(&start, &end).unwrap();
        assert!(elapsed >= time, "{elapsed:?}");
    });
}

#[test]
fn an_observer_is_told_from_where_on_a_stream_does_nothing() {
    let machine = machine(2, Time::Virtual);
    let log = Arc::new(Log::default());
    machine.add_observer(Arc::clone(&log) as _);
    let at = |stream, position| Event { stream, position };
    let [first, second] = [0, 1].map(|index| gpu(&machine, index));
    let [s, t] = [first, second].map(|gpu| gpu.create_stream().unwrap());
    first.busy(s, Duration::from_nanos(5)).unwrap();
    let failing: Operation =
        Box::new(|| Err(DeviceError::Operation(DeviceId::gpu(1), "no".into())));
    second.enqueue(t, failing).unwrap();
    // Behind a failure a wait is waited for all the same.
    second.wait(t, at(s, 1)).unwrap();
    machine.as_virtual().unwrap().clock().advance();
    assert!(second.is_complete(at(t, 1)).is_err());
    assert_eq!(second.is_complete(at(t, 2)), Ok(false));
    first.lose("on purpose");
    assert!(second.is_complete(at(t, 2)).is_err());
    let told = log.0.lock().unwrap();
    let ends =
        |observed: &&Observed| matches!(observed, Observed::Failed(_) | Observed::Abandoned(_));
    let ends: Vec<_> = told.iter().filter(ends).copied().collect();
    assert_eq!(
        ends,
        [
            Observed::Failed(at(t, 1)),
            Observed::Failed(at(s, 1)),
            Observed::Abandoned(at(s, 0)),
        ]
    );
}

#[test]
fn a_synchronisation_counts_if_it_has_to_block() {
    let machine = machine(1, Time::Virtual);
    let gpu = gpu(&machine, 0);
    let stream = gpu.create_stream().unwrap();
    gpu.busy(stream, Duration::from_nanos(1)).unwrap();
    let event = gpu.record(stream).unwrap();
    for _ in 0..2 {
        gpu.synchronize(event).unwrap();
        assert_eq!(gpu.counters().host_synchronisations, 1);
    }
}
