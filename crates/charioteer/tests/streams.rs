//! Random programs on virtual machines of 1 to 16 devices, against a sequential oracle.
//!
//! A program is a list of steps that one thread enqueues: operations that compute from cells of their
//! device's memory and write one, copies of cells between devices and the host, pauses, and waits.
//! Before a step uses a cell its stream is made to wait for those who wrote or read it, as a runtime
//! would, so that the oracle, which does the steps one after the other, knows what each cell holds at
//! the end. Operations may fail. The oracle knows too whom that reaches.
//!
//! Checked are the cells, what each event tells, that each operation ran once or not at all as the
//! oracle says, and by a log of beginnings and ends that none began before all that streams and waits
//! put before it had ended. In virtual time the log and the clock are the same each time.
#![cfg(not(loom))]

mod common;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use charioteer::machine::{
    Description, Device, DeviceError, DeviceId, DevicePointer, Event, HOST, Machine, Stream, Time,
};
use proptest::prelude::*;

use common::within_on;

/// Cells of eight bytes in each memory, each an allocation of its own on devices.
const CELLS: usize = 3;

#[derive(Clone, Debug)]
enum Step {
    Operate {
        reads: [usize; 2],
        writes: usize,
        fails: bool,
    },
    Copy {
        /// The other memory and whether it is the source.
        other: usize,
        from_other: bool,
        cells: [usize; 2],
    },
    Busy(u64),
    Wait(usize),
    /// Room for a moment.
    Scratch,
}

#[derive(Clone, Debug)]
struct Program {
    devices: usize,
    /// How many streams each has.
    streams: usize,
    /// On which stream, among all, and what.
    steps: Vec<(usize, Step)>,
}

fn step() -> impl Strategy<Value = Step> {
    let cell = || 0..CELLS;
    prop_oneof![
        6 => ([cell(), cell()], cell(), prop::bool::weighted(0.02)).prop_map(
            |(reads, writes, fails)| Step::Operate { reads, writes, fails }
        ),
        4 => (any::<prop::sample::Index>(), any::<bool>(), [cell(), cell()]).prop_map(
            |(other, from_other, cells)| Step::Copy {
                other: other.index(1 << 16),
                from_other,
                cells,
            }
        ),
        1 => (0..20u64).prop_map(Step::Busy),
        2 => (0..1usize << 16).prop_map(Step::Wait),
        1 => Just(Step::Scratch),
    ]
}

fn program() -> impl Strategy<Value = Program> {
    let steps = prop::collection::vec((0..1usize << 16, step()), 1..120);
    (1..=16usize, 1..=3usize, steps).prop_map(|(devices, streams, steps)| Program {
        devices,
        streams,
        steps,
    })
}

/// The value that an operation writes.
fn mix(step: usize, [a, b]: [u64; 2]) -> u64 {
    (a ^ b.rotate_left(17) ^ step as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mark {
    Begin(usize),
    End(usize),
}

/// What a run of a program shows.
#[derive(Debug, PartialEq)]
struct Seen {
    cells: Vec<[u64; CELLS]>,
    /// Whether the event behind each step failed.
    failed: Vec<bool>,
    log: Vec<Mark>,
    now: u64,
}

/// Who used a cell last.
#[derive(Clone, Default)]
struct Uses {
    writer: Option<Event>,
    readers: Vec<Event>,
}

/// What the oracle knows of a stream, and hence of its events.
#[derive(Clone, Default)]
struct Front {
    failed: bool,
    /// Operations that are before whatever comes next, unless others between are.
    operations: BTreeSet<usize>,
}

struct Bench {
    machine: Arc<Machine>,
    streams: Vec<Stream>,
    /// By memory: the host's first.
    cells: Vec<[DevicePointer; CELLS]>,
    host: Box<[u64; CELLS]>,
    uses: Vec<[Uses; CELLS]>,
    /// The oracle's cells.
    values: Vec<[u64; CELLS]>,
    fronts: Vec<Front>,
    /// The front of each event that was recorded.
    events: Vec<(Event, Front)>,
    /// Which operation is before which.
    edges: Vec<(usize, usize)>,
}

impl Bench {
    fn new(program: &Program, time: Time) -> Self {
        let description = Description::uniform(2, program.devices, 1 << 16, time).unwrap();
        let machine = Machine::virtual_machine(description);
        let gpus = machine.as_virtual().unwrap().gpus();
        let mut streams = Vec::new();
        let mut host = Box::new([0; CELLS]);
        let cell = |index: usize, host: &mut [u64; CELLS]| DevicePointer {
            device: HOST,
            address: (&raw mut host[index]) as u64,
        };
        let mut cells = vec![std::array::from_fn(|index| cell(index, &mut host))];
        for gpu in gpus {
            for peer in gpus.iter().filter(|peer| peer.info().id != gpu.info().id) {
                gpu.enable_peer(peer.info().id).unwrap();
            }
            streams.extend((0..program.streams).map(|_| gpu.create_stream().unwrap()));
            let stream = *streams.last().unwrap();
            cells.push([(); CELLS].map(|()| gpu.allocate(8, stream).unwrap()));
        }
        // Memory that nobody wrote holds a pattern.
        let poison = u64::from_le_bytes([0xad, 0xde, 0xfa, 0x7f, 0xad, 0xde, 0xfa, 0x7f]);
        let mut values = vec![[poison; CELLS]; cells.len()];
        values[0] = [0; CELLS];
        Self {
            fronts: vec![Front::default(); streams.len()],
            uses: vec![<[Uses; CELLS]>::default(); cells.len()],
            values,
            machine,
            streams,
            cells,
            host,
            events: Vec::new(),
            edges: Vec::new(),
        }
    }

    fn device(&self, stream: usize) -> &Arc<dyn Device> {
        self.machine.device(self.streams[stream].device)
    }

    fn record(&mut self, stream: usize) -> Event {
        let event = self.device(stream).record(self.streams[stream]).unwrap();
        let known = self.events.iter().any(|(other, _)| *other == event);
        if !known {
            self.events.push((event, self.fronts[stream].clone()));
        }
        event
    }

    fn wait(&mut self, stream: usize, event: Event) {
        self.device(stream)
            .wait(self.streams[stream], event)
            .unwrap();
        let known = self.events.iter().rfind(|(other, _)| *other == event);
        let front = known.unwrap().1.clone();
        self.fronts[stream].failed |= front.failed;
        self.fronts[stream].operations.extend(front.operations);
    }

    /// Makes the stream wait for all whose use of a cell is in the way.
    fn order(&mut self, stream: usize, (memory, cell): (usize, usize), writes: bool) {
        let uses = self.uses[memory][cell].clone();
        let readers = if writes { uses.readers } else { Vec::new() };
        for event in uses.writer.into_iter().chain(readers) {
            self.wait(stream, event);
        }
    }

    fn used(&mut self, event: Event, (memory, cell): (usize, usize), writes: bool) {
        let uses = &mut self.uses[memory][cell];
        if writes {
            *uses = Uses {
                writer: Some(event),
                readers: Vec::new(),
            };
        } else {
            uses.readers.push(event);
        }
    }

    fn operate(
        &mut self,
        number: usize,
        stream: usize,
        (reads, writes, fails): ([usize; 2], usize, bool),
        log: &Arc<Mutex<Vec<Mark>>>,
    ) {
        let id = self.streams[stream].device;
        let memory = usize::from(id.0);
        for cell in reads {
            self.order(stream, (memory, cell), false);
        }
        self.order(stream, (memory, writes), true);

        let front = &mut self.fronts[stream];
        let runs = !front.failed;
        if runs {
            let before = std::mem::replace(&mut front.operations, BTreeSet::from([number]));
            self.edges.extend(before.into_iter().map(|it| (it, number)));
        }
        front.failed |= fails;
        if runs && !fails {
            let values = &mut self.values[memory];
            values[writes] = mix(number, reads.map(|cell| values[cell]));
        }

        let gpu = Arc::clone(self.machine.as_virtual().unwrap().gpu(id));
        let cells = self.cells[memory];
        let device = Arc::clone(&gpu);
        let log = Arc::clone(log);
        let work = move || {
            log.lock().unwrap().push(Mark::Begin(number));
            let result = (|| {
                if fails {
                    return Err(DeviceError::Operation(id, "on purpose".into()));
                }
                let cell = |index: usize| {
                    let bytes = device.bytes(cells[index], 8)?;
                    Ok(bytes.as_ptr().cast::<u64>())
                };
                let [a, b] = reads.map(cell);
                // SAFETY: eight bytes are valid there, aligned, and by the waits above nobody else
                // writes them, or in the last case uses them.
                let value = unsafe { mix(number, [a?.read(), b?.read()]) };
                std::thread::yield_now();
                // SAFETY: as above.
                unsafe { cell(writes)?.write(value) };
                Ok(())
            })();
            log.lock().unwrap().push(Mark::End(number));
            result
        };
        gpu.enqueue(self.streams[stream], Box::new(work)).unwrap();
        let event = self.record(stream);
        for cell in reads {
            self.used(event, (memory, cell), false);
        }
        self.used(event, (memory, writes), true);
    }

    fn copy(&mut self, stream: usize, from: (usize, usize), to: (usize, usize)) {
        self.order(stream, from, false);
        self.order(stream, to, true);
        let (source, target) = (self.cells[from.0][from.1], self.cells[to.0][to.1]);
        let device = self.device(stream);
        // SAFETY: the host's cells live as long as the bench, whose end waits; by the waits above
        // nobody else uses them.
        unsafe { device.copy(source, target, 8, self.streams[stream]) }.unwrap();
        if !self.fronts[stream].failed {
            self.values[to.0][to.1] = self.values[from.0][from.1];
        }
        let event = self.record(stream);
        self.used(event, from, false);
        self.used(event, to, true);
    }

    fn run(&mut self, program: &Program) -> Seen {
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut after = Vec::new();
        let (told, results) = mpsc::channel();
        for (number, (stream, step)) in program.steps.iter().enumerate() {
            let stream = stream % self.streams.len();
            let memory = usize::from(self.streams[stream].device.0);
            match *step {
                Step::Operate {
                    reads,
                    writes,
                    fails,
                } => self.operate(number, stream, (reads, writes, fails), &log),
                Step::Copy {
                    other,
                    from_other,
                    cells: [from, to],
                } => {
                    let other = other % self.cells.len();
                    if from_other {
                        self.copy(stream, (other, from), (memory, to));
                    } else {
                        self.copy(stream, (memory, from), (other, to));
                    }
                }
                Step::Busy(micros) => {
                    let gpu = &self.machine.as_virtual().unwrap().gpus()[memory - 1];
                    let time = Duration::from_micros(micros);
                    gpu.busy(self.streams[stream], time).unwrap();
                }
                Step::Wait(other) => {
                    let event = self.record(other % self.streams.len());
                    self.wait(stream, event);
                }
                Step::Scratch => {
                    // More than half of all there is: it has to come back each time.
                    let device = self.device(stream);
                    let on = self.streams[stream];
                    let room = device.allocate(40_000, on).unwrap();
                    device.free(room, on).unwrap();
                }
            }
            let event = self.record(stream);
            let told = told.clone();
            let call = Box::new(move |result| told.send((number, result)).unwrap());
            self.device(stream).when_complete(event, call);
            after.push((event, self.fronts[stream].failed));
        }
        drop(told);
        let clock = self.machine.as_virtual().unwrap().clock();
        while clock.advance() {}
        let mut failed = vec![None; after.len()];
        for (number, result) in results {
            assert_eq!(failed[number].replace(result.is_err()), None, "called once");
        }
        let failed: Vec<bool> = failed.into_iter().map(|it| it.expect("called")).collect();
        for (number, &(event, fails)) in after.iter().enumerate() {
            assert_eq!(failed[number], fails, "step {number}");
            let device = self.machine.device(event.stream.device);
            assert_eq!(device.synchronize(event).is_err(), fails);
            assert_eq!(device.is_complete(event).is_err(), fails);
        }
        let now = clock.now();
        let log = std::mem::take(&mut *log.lock().unwrap());
        self.check_order(&log, program);
        Seen {
            cells: self.read(),
            failed,
            log,
            now,
        }
    }

    fn check_order(&self, log: &[Mark], program: &Program) {
        let place = |mark| log.iter().position(|it| *it == mark);
        for &(before, after) in &self.edges {
            let (end, begin) = (place(Mark::End(before)), place(Mark::Begin(after)));
            let in_order = end.zip(begin).is_some_and(|(end, begin)| end < begin);
            assert!(in_order, "{before} is not before {after}");
        }
        let ran = |number: usize| log.contains(&Mark::Begin(number));
        let skipped = (0..program.steps.len()).filter(|&number| {
            matches!(program.steps[number].1, Step::Operate { .. }) && !ran(number)
        });
        let mut operations = log.len() / 2;
        for number in skipped {
            let edge = self.edges.iter().any(|&(a, b)| a == number || b == number);
            assert!(!edge, "{number} was to run");
            operations += 1;
        }
        let all = program.steps.iter();
        let all = all.filter(|(_, step)| matches!(step, Step::Operate { .. }));
        assert_eq!(operations, all.count(), "each ran once or not at all");
    }

    /// All cells, copied to the host over streams that did not fail.
    fn read(&self) -> Vec<[u64; CELLS]> {
        let mut cells = vec![*self.host];
        for index in 0..self.cells.len() - 1 {
            let id = DeviceId::gpu(u16::try_from(index).unwrap());
            let device = self.machine.device(id);
            let stream = device.create_stream().unwrap();
            let mut values = [0u64; CELLS];
            for (value, from) in values.iter_mut().zip(self.cells[index + 1]) {
                let to = DevicePointer {
                    device: HOST,
                    address: (&raw mut *value) as u64,
                };
                // SAFETY: it is waited for below.
                unsafe { device.copy(from, to, 8, stream) }.unwrap();
            }
            device.synchronize(device.record(stream).unwrap()).unwrap();
            cells.push(values);
        }
        cells
    }
}

fn run(program: &Program, time: Time) -> Seen {
    let mut bench = Bench::new(program, time);
    let seen = bench.run(program);
    assert_eq!(seen.cells, bench.values);
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_machine_does_what_its_oracle_does(program in program()) {
        within_on(&program, 60, || {
            let real = run(&program, Time::Real);
            let in_virtual_time = run(&program, Time::Virtual);
            assert_eq!(real.cells, in_virtual_time.cells);
            assert_eq!(real.failed, in_virtual_time.failed);
            assert_eq!(in_virtual_time, run(&program, Time::Virtual));
        });
    }
}
