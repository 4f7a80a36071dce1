//! One rule at a time.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::machine::{Enqueued, Observed, Observer};

const ONE: DeviceId = DeviceId::gpu(0);
const TWO: DeviceId = DeviceId::gpu(1);

/// A store over a machine, with an array of 64 bytes whose bytes are their indices.
struct Bench {
    machine: Arc<Machine>,
    store: Store,
    array: Arc<Storage>,
    told: Arc<Mutex<Vec<Moved>>>,
    streams: Vec<Stream>,
}

impl Bench {
    fn new(gpus: usize, memory: u64, peers: bool) -> Self {
        let machine = machine(gpus, memory, peers);
        let store = Store::new(Arc::clone(&machine));
        let devices = (0..gpus as u16).map(DeviceId::gpu);
        Self {
            told: watch(&store),
            streams: devices
                .map(|it| machine.device(it).create_stream().unwrap())
                .collect(),
            array: array(&[64], 1, (0..64).collect()),
            machine,
            store,
        }
    }

    fn stream(&self, device: DeviceId) -> Stream {
        self.streams[usize::from(device.index())]
    }

    fn plan(&self, device: DeviceId, region: &Region, touch: Touch) -> Result<Held, DeviceError> {
        let wants = [want(&self.array, region, touch)];
        self.store.ensure(0, self.stream(device), &wants, 0)
    }

    /// A task on another stream than others, and in no order with them.
    fn peek(&self, device: DeviceId, region: &Region) -> Held {
        let stream = self.machine.device(device).create_stream().unwrap();
        let wants = [want(&self.array, region, Touch::Peek)];
        self.store.ensure(0, stream, &wants, 0).unwrap()
    }

    fn launch(&self, held: Held) -> Event {
        let stream = self.stream(held.device());
        let event = self.machine.device(stream.device).record(stream).unwrap();
        self.store.launched([(held, Some(event))]);
        event
    }

    /// A task that sets all bytes of a region, which is a box.
    fn set(&self, device: DeviceId, region: &Region, value: u8) -> Event {
        let held = self.plan(device, region, Touch::Write).unwrap();
        let (stream, view) = (self.stream(device), held.views()[0].clone());
        operate(
            &self.machine,
            stream,
            &view,
            region.elements(),
            move |bytes| bytes.fill(value),
        );
        self.launch(held)
    }

    /// A task that reads.
    fn read(&self, device: DeviceId, region: &Region) -> Event {
        let held = self.plan(device, region, Touch::Read).unwrap();
        self.launch(held)
    }

    fn home(&self, region: &Region, touch: Touch) -> Result<SmallVec<[Event; 2]>, DeviceError> {
        self.store.ensure_host(&[want(&self.array, region, touch)])
    }

    /// What was told since it was last asked: from, to, bytes.
    fn told(&self) -> Vec<(DeviceId, DeviceId, u64)> {
        let told = std::mem::take(&mut *self.told.lock().unwrap());
        told.iter().map(|it| (it.from, it.to, it.bytes)).collect()
    }
}

#[test]
fn what_was_never_on_a_device_is_at_home() {
    let bench = Bench::new(1, 64, true);
    assert!(!bench.array.is_scattered());
    assert!(bench.home(&range(0, 64), Touch::Update).unwrap().is_empty());
    let first = range(0, 10);
    let wants = [want(&bench.array, &first, Touch::Read)];
    assert_eq!(bench.store.missing(&wants, HOST).time, Duration::ZERO);
    assert_eq!(
        bench.store.missing(&wants, ONE),
        Missing {
            time: Duration::from_nanos(10_010),
            from_host: Duration::from_nanos(10_010),
            links: Duration::from_nanos(10_010),
        }
    );
    let written = [want(&bench.array, &first, Touch::Write)];
    assert_eq!(bench.store.missing(&written, ONE).time, Duration::ZERO);
    bench.read(ONE, &first);
    assert!(bench.array.is_scattered());
    assert_eq!(bench.store.missing(&wants, ONE).time, Duration::ZERO);
}

#[test]
fn pieces_of_one_source_come_in_one_copy() {
    let bench = Bench::new(2, 64, true);
    // Eight pieces, all at home.
    for at in 0..8 {
        bench.read(ONE, &range(8 * at, 8 * at + 8));
    }
    assert_eq!(bench.told().len(), 8);
    // A peer has all of it nearer by, but in eight instances; written ones are there alone.
    bench.set(ONE, &range(16, 24), 1);
    bench.read(TWO, &range(0, 64));
    let peers = bench.told().iter().filter(|it| it.0 == ONE).count();
    assert_eq!(peers, 8);
    finish(&bench.machine);
    let apart = Bench::new(2, 64, true);
    for at in (0..64).step_by(8) {
        apart.read(ONE, &range(at, at + 8));
    }
    apart.store.lose(ONE);
    apart.told();
    apart.read(TWO, &range(0, 64));
    assert_eq!(apart.told(), [(HOST, TWO, 64)]);
}

#[test]
fn a_copy_comes_from_the_nearest_and_from_home_where_there_is_no_link() {
    for peers in [true, false] {
        let bench = Bench::new(2, 64, peers);
        let all = range(0, 64);
        bench.set(ONE, &all, 7);
        assert_eq!(bench.told(), []);
        bench.read(TWO, &all);
        let way: &[_] = if peers {
            &[(ONE, TWO, 64)]
        } else {
            &[(ONE, HOST, 64), (HOST, TWO, 64)]
        };
        assert_eq!(bench.told(), way);
        // It is on its way, and not copied again.
        bench.read(TWO, &all);
        assert_eq!(bench.told(), []);
        let events = bench.home(&all, Touch::Read).unwrap();
        assert_eq!(events.len(), 1);
        assert_eq!(bench.told().len(), usize::from(peers));
        finish(&bench.machine);
        assert_eq!(bytes(&bench.array), [7; 64]);
    }
}

#[test]
fn room_is_made_of_what_nobody_has_pinned() {
    let bench = Bench::new(1, 64, true);
    let held = bench.plan(ONE, &range(0, 32), Touch::Read).unwrap();
    let refused = bench.plan(ONE, &range(30, 63), Touch::Read);
    let full = DeviceError::OutOfMemory {
        device: ONE,
        wanted: 33,
        free: 32,
    };
    assert_eq!(refused.err(), Some(full));
    // What a body was promised is pinned like the rest.
    let other = range(32, 48);
    let wants = [want(&bench.array, &other, Touch::Read)];
    let second = bench
        .store
        .ensure(0, bench.stream(ONE), &wants, 16)
        .unwrap();
    assert!(bench.plan(ONE, &range(60, 61), Touch::Read).is_err());
    bench.store.abandon(second);
    bench.launch(held);
    bench.read(ONE, &range(0, 64));
    assert_eq!(bench.store.counters()[0].evictions, 2);
    assert_eq!(bench.store.counters()[0].resident, 64);
    assert_eq!(bench.store.counters()[0].written_back, 0);
}

#[test]
fn what_is_wanted_later_goes_first() {
    let bench = Bench::new(1, 30, true);
    let part = |at: u64| range(10 * at, 10 * at + 10);
    let announce = |number, at| {
        let region = part(at);
        let wants = [want(&bench.array, &region, Touch::Read)];
        bench.store.announce(number, &wants);
    };
    announce(11, 0);
    announce(13, 1);
    announce(12, 2);
    for at in [0, 1, 2] {
        bench.set(ONE, &part(at), 1);
    }
    bench.told();
    bench.set(ONE, &part(3), 2);
    assert_eq!(bench.told(), [(ONE, HOST, 10), (ONE, HOST, 0)]);
    let gone = |at| {
        let region = part(at);
        let wants = [want(&bench.array, &region, Touch::Read)];
        !bench.store.missing(&wants, ONE).time.is_zero()
    };
    assert_eq!([0, 1, 2, 3].map(gone), [false, true, false, false]);
    // Of what nobody is known to want the last one used is not the first to go, but goes before.
    bench.set(ONE, &part(4), 3);
    assert_eq!([0, 1, 2, 3].map(gone), [false, true, false, true]);
    // Somebody gave up.
    let region = part(0);
    bench
        .store
        .retract(11, &[want(&bench.array, &region, Touch::Read)]);
    bench.read(ONE, &part(4));
    bench.set(ONE, &part(5), 4);
    assert_eq!([0, 2, 4, 5].map(gone), [true, false, false, false]);
    assert_eq!(bench.store.counters()[0].written_back, 30);
}

#[test]
fn a_copy_that_failed_is_not_there() {
    let bench = Bench::new(1, 64, true);
    let all = range(0, 64);
    gpu(&bench.machine, ONE).fail_copy(1);
    let event = bench.read(ONE, &all);
    finish(&bench.machine);
    // Who waited for it failed; who comes next has it copied again, on another stream.
    let failed = bench.machine.device(ONE).is_complete(event);
    assert!(
        matches!(failed, Err(DeviceError::Operation(ONE, _))),
        "{failed:?}"
    );
    let stream = bench.machine.device(ONE).create_stream().unwrap();
    let wants = [want(&bench.array, &all, Touch::Read)];
    let held = bench.store.ensure(1, stream, &wants, 0).unwrap();
    let event = bench.machine.device(ONE).record(stream).unwrap();
    bench.store.launched([(held, Some(event))]);
    finish(&bench.machine);
    assert_eq!(bench.machine.device(ONE).is_complete(event), Ok(true));
    assert_eq!(bench.told(), [(HOST, ONE, 64), (HOST, ONE, 64)]);
}

#[test]
fn what_failed_on_its_way_home_is_lost_if_its_source_is_gone() {
    let bench = Bench::new(1, 64, true);
    bench.set(ONE, &range(0, 32), 9);
    finish(&bench.machine);
    gpu(&bench.machine, ONE).fail_copy(1);
    // Still there: the next one takes it from there.
    let events = bench.home(&range(0, 32), Touch::Read).unwrap();
    finish(&bench.machine);
    assert!(bench.machine.device(ONE).is_complete(events[0]).is_err());
    let events = bench.home(&range(0, 32), Touch::Read).unwrap();
    finish(&bench.machine);
    assert_eq!(bench.machine.device(ONE).is_complete(events[0]), Ok(true));
    assert_eq!(bytes(&bench.array)[..32], [9; 32]);
    bench.set(ONE, &range(0, 32), 8);
    gpu(&bench.machine, ONE).fail_copy(1);
    drop(bench.store.evict(&bench.array, &range(0, 1), ONE).unwrap());
    finish(&bench.machine);
    let lost = bench.home(&range(10, 40), Touch::Read).unwrap_err();
    assert!(lost.to_string().contains("A[10:32]"), "{lost}");
    // It is there again once it is written; the rest never was gone.
    assert!(bench.home(&range(40, 64), Touch::Update).is_ok());
    assert!(bench.home(&range(0, 32), Touch::Write).is_ok());
    assert!(bench.home(&range(10, 40), Touch::Read).is_ok());
}

/// Who hears that data are lost with a device gives that device up.
#[test]
fn a_copy_that_fails_takes_no_device_with_it() {
    let bench = Bench::new(2, 64, true);
    bench.set(ONE, &range(0, 32), 9);
    bench.set(ONE, &range(32, 64), 7);
    finish(&bench.machine);
    gpu(&bench.machine, ONE).fail_copy(1);
    drop(bench.store.evict(&bench.array, &range(0, 1), ONE).unwrap());
    finish(&bench.machine);
    for _ in 0..2 {
        let lost = bench.plan(TWO, &range(0, 64), Touch::Read).unwrap_err();
        assert!(matches!(lost, DeviceError::Operation(ONE, _)), "{lost}");
        assert!(lost.to_string().contains("A[0:32]"), "{lost}");
    }
    // What else the device has is there still, and it takes more.
    let resident = |device: DeviceId| {
        let counters = bench.store.counters();
        counters[usize::from(device.index())].resident
    };
    assert_eq!(resident(ONE), 32);
    bench.read(TWO, &range(32, 64));
    bench.set(ONE, &range(0, 32), 5);
    bench.read(TWO, &range(0, 32));
    drop(bench.store.come_home());
    finish(&bench.machine);
    assert_eq!(bytes(&bench.array), [[5; 32], [7; 32]].concat());
    assert_eq!([ONE, TWO].map(resident), [0, 0]);
}

/// A copy of a copy is ready behind both. If the first one failed the second one runs all the same, into
/// memory that has nothing then.
#[test]
fn a_copy_of_what_failed_is_over_before_its_target_is_used_again() {
    let bench = Bench::new(2, 1 << 20, true);
    // The way from one device to the other is taken for a while.
    let large = array(&[500_000], 1, vec![0; 500_000]);
    let all = range(0, 500_000);
    let stream = bench.stream(ONE);
    let wants = [want(&large, &all, Touch::Write)];
    let held = bench.store.ensure(0, stream, &wants, 0).unwrap();
    bench.store.launched([(held, None)]);
    let stream = bench.machine.device(TWO).create_stream().unwrap();
    let wants = [want(&large, &all, Touch::Read)];
    let held = bench.store.ensure(0, stream, &wants, 0).unwrap();
    bench.store.launched([(held, None)]);

    let part = range(0, 64);
    gpu(&bench.machine, ONE).fail_copy(1);
    let first = bench.plan(ONE, &part, Touch::Read).unwrap();
    let second = bench.plan(TWO, &part, Touch::Read).unwrap();
    bench.store.abandon(second);
    let failed = bench.launch(first);
    let copies = [(ONE, TWO, 500_000), (HOST, ONE, 64), (ONE, TWO, 64)];
    assert_eq!(bench.told(), copies);
    while bench.machine.device(ONE).is_complete(failed) == Ok(false) {
        assert!(bench.machine.as_virtual().unwrap().clock().advance());
    }
    // The second copy is under way. Another task adds one to what is there, on a stream that waited for nothing.
    let stream = bench.machine.device(TWO).create_stream().unwrap();
    let wants = [want(&bench.array, &part, Touch::Update)];
    let held = bench.store.ensure(1, stream, &wants, 0).unwrap();
    let view = held.views()[0].clone();
    operate(&bench.machine, stream, &view, 64, |bytes| {
        bytes.iter_mut().for_each(|byte| *byte += 1);
    });
    let event = bench.machine.device(TWO).record(stream).unwrap();
    bench.store.launched([(held, Some(event))]);
    drop(bench.store.come_home());
    finish(&bench.machine);
    assert_eq!(bytes(&bench.array), (1..65).collect::<Vec<u8>>());
}

/// Loses a device when a copy is enqueued, before anything else is.
struct Unplug(Arc<VirtualGpu>, AtomicBool);

impl Observer for Unplug {
    fn observe(&self, observed: Observed) {
        let is_copy = matches!(observed, Observed::Enqueued(_, Enqueued::Copy));
        if is_copy && !self.1.swap(true, Ordering::Relaxed) {
            // As by another thread.
            std::thread::scope(|scope| {
                scope.spawn(|| self.0.lose("a test"));
            });
        }
    }
}

#[test]
fn a_device_may_be_lost_in_the_middle_of_a_copy_from_it() {
    let bench = Bench::new(2, 64, true);
    let part = range(0, 32);
    bench.read(ONE, &part);
    finish(&bench.machine);
    // It is to be written there by another member of the set.
    let writer = bench.plan(ONE, &part, Touch::Update).unwrap();
    let lost = Arc::clone(gpu(&bench.machine, ONE));
    let unplug: Arc<dyn Observer> = Arc::new(Unplug(lost, AtomicBool::new(false)));
    bench.machine.add_observer(Arc::clone(&unplug));
    // It comes from home instead.
    let reader = bench.plan(TWO, &part, Touch::Read).unwrap();
    bench.machine.remove_observer(&unplug);
    bench.store.abandon(writer);
    let event = bench.launch(reader);
    finish(&bench.machine);
    assert_eq!(bench.machine.device(TWO).is_complete(event), Ok(true));
    assert_eq!(bench.told()[1..], [(HOST, TWO, 32)]);
    bench.set(TWO, &part, 6);
    drop(bench.store.evict(&bench.array, &part, TWO).unwrap());
    finish(&bench.machine);
    assert_eq!(bytes(&bench.array)[..32], [6; 32]);
}

/// What is brought home has a box, which is forgotten with the device.
#[test]
fn what_comes_home_comes_from_elsewhere_if_its_device_is_lost() {
    let bench = Bench::new(2, 64, true);
    bench.set(TWO, &range(0, 64), 3);
    bench.read(TWO, &range(0, 64));
    let held = bench.plan(ONE, &range(0, 32), Touch::Read).unwrap();
    bench.store.abandon(held);
    drop(bench.home(&range(0, 16), Touch::Read).unwrap());
    finish(&bench.machine);
    gpu(&bench.machine, ONE).lose("a test");
    drop(bench.home(&range(0, 32), Touch::Read).unwrap());
    assert_eq!(bench.store.counters()[0].resident, 0, "it was asked first");
    finish(&bench.machine);
    assert_eq!(bytes(&bench.array)[..32], [3; 32]);
    bench.read(TWO, &range(0, 32));
}

#[test]
fn what_is_read_out_of_order_is_there_for_nobody_else() {
    let bench = Bench::new(2, 64, true);
    let (part, half) = (range(0, 32), range(0, 16));
    bench.read(ONE, &half);
    bench.set(TWO, &range(32, 64), 7);
    finish(&bench.machine);
    // A task of the host is about to write, and somebody reads meanwhile.
    assert!(bench.home(&part, Touch::Write).unwrap().is_empty());
    let held = bench.plan(ONE, &range(0, 64), Touch::Peek).unwrap();
    bench.launch(held);
    finish(&bench.machine);
    drop(bench.told());
    let first = std::ptr::with_exposed_provenance_mut::<u8>(bench.array.address() as usize);
    // SAFETY: the bytes live as long as the array, and what is enqueued is done.
    unsafe { std::slice::from_raw_parts_mut(first, 32) }.fill(6);
    // What comes after both has what was written. What devices have is there as ever.
    let held = bench.plan(ONE, &range(0, 64), Touch::Update).unwrap();
    let (stream, view) = (bench.stream(ONE), held.views()[0].clone());
    operate(&bench.machine, stream, &view, 64, |bytes| {
        bytes.iter_mut().for_each(|byte| *byte += 1);
    });
    bench.launch(held);
    assert_eq!(bench.told(), [(HOST, ONE, 32)]);
    drop(bench.store.come_home());
    finish(&bench.machine);
    assert_eq!(bytes(&bench.array), [[7; 32], [8; 32]].concat());
}

#[test]
fn who_reads_out_of_order_overwrites_nothing() {
    let bench = Bench::new(1, 128, true);
    let (all, half) = (range(0, 64), range(0, 32));
    // Somebody is about to write where nothing is yet, and has begun when the other one comes.
    let held = bench.plan(ONE, &all, Touch::Write).unwrap();
    let (stream, view) = (bench.stream(ONE), held.views()[0].clone());
    operate(&bench.machine, stream, &view, 64, |bytes| bytes.fill(9));
    let peeks = bench.peek(ONE, &all);
    assert_eq!(bench.told(), []);
    bench.launch(peeks);
    bench.launch(held);
    // From another box of the same elements nothing is kept.
    let other = bench.peek(ONE, &half);
    assert_eq!(bench.told(), [(ONE, ONE, 32)]);
    bench.launch(other);
    drop(bench.store.come_home());
    finish(&bench.machine);
    assert_eq!(bytes(&bench.array), [9; 64]);
}

#[test]
fn who_reads_all_out_of_order_and_writes_a_part_has_the_rest() {
    let bench = Bench::new(2, 128, true);
    let all = range(0, 64);
    let relaxes = |part: &Region, stream| {
        // Their boxes overlap: one instance has both.
        let wants = [
            want(&bench.array, &all, Touch::Peek),
            want(&bench.array, part, Touch::Write),
        ];
        bench.store.ensure(0, stream, &wants, 0).unwrap()
    };
    bench.set(ONE, &all, 7);
    drop(bench.told());
    let first = relaxes(&range(0, 16), bench.stream(ONE));
    assert_eq!(bench.told(), []);
    let event = bench.set(TWO, &range(32, 48), 5);
    // Of what the other one is not to write, the last version is brought.
    let stream = bench.machine.device(ONE).create_stream().unwrap();
    let second = relaxes(&range(16, 32), stream);
    assert_eq!(bench.told(), [(TWO, ONE, 16)]);
    for held in [first, second] {
        bench.store.launched([(held, Some(event))]);
    }
    finish(&bench.machine);
}

#[test]
fn what_a_guarded_task_reads_stays_what_it_was() {
    let bench = Bench::new(1, 128, true);
    let (all, half) = (range(0, 64), range(0, 32));
    bench.set(ONE, &all, 7);
    let mut held = bench.plan(ONE, &all, Touch::Read).unwrap();
    bench.store.guard(&mut held);
    // The host has a part of it for a member of its set; who peeks does not bring that.
    let behind = bench.home(&half, Touch::Update).unwrap();
    finish(&bench.machine);
    assert_eq!(behind.len(), 1);
    drop(bench.told());
    let peeks = bench.peek(ONE, &all);
    assert_eq!(bench.told(), []);
    bench.launch(peeks);
    bench.launch(held);
    // Once it is launched they come as ever.
    let held = bench.plan(ONE, &all, Touch::Read).unwrap();
    assert_eq!(bench.told(), [(HOST, ONE, 32)]);
    bench.launch(held);
}

#[test]
fn what_was_written_and_then_lost_is_nowhere() {
    let bench = Bench::new(2, 64, true);
    let parts = [range(0, 16), range(16, 32), range(32, 48)];
    let held: Vec<Held> = parts
        .iter()
        .map(|part| bench.plan(ONE, part, Touch::Update).unwrap())
        .collect();
    // The last one wrote nothing, as far as anybody knows.
    let stream = bench.stream(ONE);
    let event = bench.machine.device(ONE).record(stream).unwrap();
    let replica = bench.plan(TWO, &parts[1], Touch::Write).unwrap();
    finish(&bench.machine);
    gpu(&bench.machine, ONE).lose("a test");
    bench.store.lose(ONE);
    let [first, second, third] = <[Held; 3]>::try_from(held).unwrap();
    bench.store.launched([(first, Some(event))]);
    bench
        .store
        .launched([(replica, None), (second, Some(event))]);
    bench.store.launched([(third, None)]);
    let lost = bench.home(&parts[0], Touch::Read).unwrap_err();
    assert!(matches!(lost, DeviceError::Lost(ONE, _)), "{lost}");
    for part in &parts[1..] {
        drop(bench.home(part, Touch::Read).unwrap());
    }
    assert!(bench.home(&parts[0], Touch::Write).unwrap().is_empty());
    assert!(bench.home(&range(0, 64), Touch::Read).is_ok());
}

#[test]
fn a_lost_device_takes_what_it_had_alone() {
    let bench = Bench::new(2, 128, true);
    bench.set(ONE, &range(0, 16), 1);
    bench.set(ONE, &range(16, 32), 2);
    bench.read(TWO, &range(0, 16));
    finish(&bench.machine);
    let pinned = bench.plan(ONE, &range(0, 16), Touch::Update).unwrap();
    gpu(&bench.machine, ONE).lose("a test");
    // Nobody told the store, which finds out.
    let lost = bench.plan(TWO, &range(0, 64), Touch::Read).unwrap_err();
    assert!(matches!(lost, DeviceError::Lost(ONE, _)), "{lost}");
    assert!(lost.to_string().contains("A[16:32]"), "{lost}");
    bench.store.lose(ONE);
    assert!(bench.plan(ONE, &range(40, 41), Touch::Read).is_err());
    bench.store.launched([(pinned, None)]);
    bench.read(TWO, &range(0, 16));
    bench.set(TWO, &range(16, 32), 3);
    bench.read(TWO, &range(0, 64));
    let events = bench.store.come_home();
    finish(&bench.machine);
    for event in events {
        assert_eq!(bench.machine.device(TWO).is_complete(event), Ok(true));
    }
    let mut expected: Vec<u8> = (0..64).collect();
    expected[..16].fill(1);
    expected[16..32].fill(3);
    assert_eq!(bytes(&bench.array), expected);
    assert_eq!(bench.store.counters()[0].resident, 0);
}

/// Of a task that was cancelled while it was planned.
#[test]
fn what_is_held_at_the_end_comes_home_too() {
    let bench = Bench::new(2, 64, true);
    bench.set(ONE, &range(0, 32), 9);
    bench.set(ONE, &range(32, 64), 8);
    bench.read(TWO, &range(32, 64));
    let held = [
        bench.plan(ONE, &range(0, 32), Touch::Update).unwrap(),
        bench.plan(ONE, &range(32, 64), Touch::Read).unwrap(),
    ];
    for _ in 0..2 {
        drop(bench.store.come_home());
        finish(&bench.machine);
        assert_eq!(bytes(&bench.array), [[9; 32], [8; 32]].concat());
    }
    for held in held {
        bench.store.abandon(held);
    }
    assert_eq!(bench.store.counters()[0].resident, 64);
    assert!(bench.store.come_home().is_empty());
    assert_eq!(bench.store.counters()[0].resident, 0);
}

#[test]
fn what_a_lost_device_had_is_not_waited_for_at_the_end() {
    let bench = Bench::new(2, 64, true);
    for at in [0, 16, 32] {
        bench.set(ONE, &range(at, at + 16), 1);
    }
    bench.set(TWO, &range(48, 64), 2);
    gpu(&bench.machine, ONE).lose("a test");
    let events = bench.store.come_home();
    finish(&bench.machine);
    for event in events {
        assert_eq!(bench.machine.device(TWO).is_complete(event), Ok(true));
    }
    assert_eq!(bytes(&bench.array)[48..], [2; 16]);
    let lost = bench.home(&range(0, 64), Touch::Read).unwrap_err();
    assert!(matches!(lost, DeviceError::Lost(ONE, _)), "{lost}");
}

/// What keeps a buffer, and tells when it goes.
struct Keep(
    Arc<AtomicBool>,
    #[allow(dead_code, reason = "it is kept")] Vec<u8>,
);

impl Drop for Keep {
    fn drop(&mut self) {
        crate::sync::assert_unlocked();
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn a_storage_that_goes_frees_its_instances_and_then_its_buffer() {
    let bench = Bench::new(1, 64, true);
    let gone = Arc::new(AtomicBool::new(false));
    let buffer = vec![5_u8; 64];
    let address = buffer.as_ptr().expose_provenance() as u64;
    let keep = Box::new(Keep(Arc::clone(&gone), buffer));
    let storage = Storage::new(crate::trace::next_id(), "B", &[64], 1, address, keep);
    let all = range(0, 64);
    let wants = [want(&storage, &all, Touch::Read)];
    let held = bench.store.ensure(0, bench.stream(ONE), &wants, 0).unwrap();
    bench.launch(held);
    drop(storage);
    // A copy from the buffer is under way.
    bench.store.announce(1, &[]);
    assert!(!gone.load(Ordering::Acquire));
    assert_eq!(bench.store.counters()[0].resident, 0);
    bench.read(ONE, &all);
    assert!(!gone.load(Ordering::Acquire));
    finish(&bench.machine);
    bench.read(ONE, &all);
    assert!(gone.load(Ordering::Acquire));
    // One that no store ever saw.
    let gone = Arc::new(AtomicBool::new(false));
    let keep = Box::new(Keep(Arc::clone(&gone), Vec::new()));
    drop(Storage::new(crate::trace::next_id(), "C", &[0], 1, 0, keep));
    assert!(gone.load(Ordering::Acquire));
}

#[test]
fn members_of_a_set_leave_equal_copies() {
    let bench = Bench::new(2, 64, true);
    let all = range(0, 64);
    let held = [ONE, TWO].map(|device| {
        let held = bench.plan(device, &all, Touch::Write).unwrap();
        let view = held.views()[0].clone();
        operate(&bench.machine, bench.stream(device), &view, 64, |bytes| {
            bytes.fill(4)
        });
        let stream = bench.stream(device);
        (
            held,
            Some(bench.machine.device(device).record(stream).unwrap()),
        )
    });
    bench.store.launched(held);
    bench.read(ONE, &all);
    bench.read(TWO, &all);
    assert_eq!(bench.told(), []);
    // One of two is dropped without a copy, the other one is not.
    assert_eq!(bench.store.evict(&bench.array, &all, ONE).unwrap().len(), 0);
    assert_eq!(bench.store.evict(&bench.array, &all, TWO).unwrap().len(), 1);
    finish(&bench.machine);
    assert_eq!(bytes(&bench.array), [4; 64]);
}

#[test]
fn elements_between_are_left_alone() {
    let bench = Bench::new(1, 256, true);
    let (even, odd) = (
        Region::new([Span::new(0, 2, 32)]),
        Region::new([Span::new(1, 2, 32)]),
    );
    let paint = |region: &Region, value: u8| {
        let held = bench.plan(ONE, region, Touch::Write).unwrap();
        let view = held.views()[0].clone();
        let (origin, count) = (view.origin[0], region.elements());
        let start = region.spans()[0].start() - origin;
        let stream = bench.stream(ONE);
        operate(
            &bench.machine,
            stream,
            &view,
            start + 2 * count - 1,
            move |bytes| {
                for at in 0..count {
                    bytes[(start + 2 * at) as usize] = value;
                }
            },
        );
        bench.launch(held);
    };
    paint(&even, 200);
    paint(&odd, 100);
    // Each has its own instance, and each copy moves its own elements.
    bench.home(&range(0, 10), Touch::Read).unwrap();
    assert_eq!(bench.told(), [(ONE, HOST, 5), (ONE, HOST, 5)]);
    let events = bench.store.come_home();
    assert!(!events.is_empty());
    finish(&bench.machine);
    let expected: Vec<u8> = (0..64)
        .map(|at| if at % 2 == 0 { 200 } else { 100 })
        .collect();
    assert_eq!(bytes(&bench.array), expected);
}

#[test]
fn arrays_without_axes_or_elements_are_arrays() {
    let bench = Bench::new(1, 64, true);
    let (point, nothing) = (array(&[], 8, vec![1; 8]), array(&[0, 3], 4, Vec::new()));
    let (one, none) = (Region::whole(&[]), Region::whole(&[0, 3]));
    let wants = [
        want(&point, &one, Touch::Update),
        want(&nothing, &none, Touch::Update),
    ];
    assert_eq!(bench.store.footprint(&wants, None), 8);
    assert!(!bench.store.missing(&wants, ONE).time.is_zero());
    let stream = bench.stream(ONE);
    let held = bench.store.ensure(0, stream, &wants, 0).unwrap();
    let [view, empty] = held.views() else {
        panic!("a view for each want")
    };
    assert_eq!((empty.pointer.address, empty.strides.len()), (0, 2));
    operate(&bench.machine, stream, view, 8, |bytes| bytes[0] += 1);
    bench.launch(held);
    let events = bench
        .store
        .ensure_host(&[want(&point, &one, Touch::Read)])
        .unwrap();
    assert_eq!(events.len(), 1);
    finish(&bench.machine);
    assert_eq!(bytes(&point), [2, 1, 1, 1, 1, 1, 1, 1]);
}

#[test]
fn a_writer_of_the_host_waits_for_copies_that_read_there() {
    let bench = Bench::new(1, 64, true);
    let part = range(0, 32);
    // A task that was planned and came to nothing: its copy is under way.
    let held = bench.plan(ONE, &part, Touch::Read).unwrap();
    bench.store.abandon(held);
    assert!(bench.home(&range(0, 64), Touch::Read).unwrap().is_empty());
    assert!(bench.home(&range(32, 64), Touch::Write).unwrap().is_empty());
    let events = bench.home(&part, Touch::Update).unwrap();
    assert_eq!(events.len(), 1);
    finish(&bench.machine);
    assert_eq!(bench.machine.device(ONE).is_complete(events[0]), Ok(true));
    assert!(bench.home(&part, Touch::Update).unwrap().is_empty());
}
