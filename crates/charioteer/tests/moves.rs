//! The replay of copies finds what is wrong with a trace, and nothing else: traces made by hand, and real ones.
#![cfg(not(loom))]

mod common;

use charioteer::data::Spread;
use charioteer::gang::WHOLE;
use charioteer::machine::{DeviceId, Enqueued, Event as Position, HOST, Observed, Stream};
use charioteer::native::Mode;
use charioteer::region::{Region, Span};
use charioteer::trace::{
    self, AccessRecord, DeviceEvent, DeviceRecord, Event, Layout, MoveRecord, Moves, Optimum,
    Record, Rule, TraceFile,
};

const ARRAY: u64 = 900;
const ITEM: u64 = 8;
const TILE: u64 = 10;
const TILES: u64 = 6;

/// Writes a trace line by line. The array has six tiles of ten elements.
struct Author {
    file: TraceFile,
    time: u64,
    positions: std::collections::HashMap<Stream, u64>,
    numbers: u64,
}

fn gpu(index: u16) -> DeviceId {
    DeviceId::gpu(index)
}

fn stream(device: DeviceId, number: u32) -> Stream {
    Stream { device, number }
}

fn tile(index: u64) -> Region {
    Region::new([Span::range(index * TILE, (index + 1) * TILE)])
}

fn whole() -> Region {
    Region::whole(&[TILES * TILE])
}

impl Author {
    fn new(memory: u64) -> Self {
        let mut file = TraceFile {
            version: 4,
            ..TraceFile::default()
        };
        let layout = Layout {
            item: ITEM,
            shape: vec![TILES * TILE],
        };
        file.layouts.insert(ARRAY, layout);
        file.labels.insert(ARRAY, "A".into());
        let mut author = Self {
            file,
            time: 0,
            positions: std::collections::HashMap::new(),
            numbers: 0,
        };
        for index in 0..2 {
            author.device(
                0,
                DeviceEvent::Capacity {
                    device: gpu(index),
                    share: WHOLE,
                    memory,
                },
            );
        }
        author
    }

    fn now(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    fn device(&mut self, task: u64, event: DeviceEvent) {
        let time = self.now();
        self.file.devices.push(DeviceRecord {
            time,
            task,
            thread: 0,
            event,
        });
    }

    fn task(&mut self, task: u64, event: Event) {
        let time = self.now();
        self.file.records.push(Record {
            time,
            task,
            other: 0,
            thread: 0,
            event,
        });
    }

    fn spawn(&mut self, task: u64, accesses: &[(Mode, Region)]) {
        self.task(task, Event::Spawn);
        for (mode, region) in accesses {
            self.numbers += 1;
            let time = self.now();
            self.file.accesses.push(AccessRecord {
                time,
                task,
                datum: ARRAY,
                number: self.numbers,
                thread: 0,
                mode: *mode,
                region: region.clone(),
                spread: Spread::Whole,
            });
        }
    }

    /// A whole task on the host.
    fn on_host(&mut self, task: u64, accesses: &[(Mode, Region)]) {
        self.spawn(task, accesses);
        for event in [Event::Start, Event::End, Event::Done] {
            self.task(task, event);
        }
    }

    fn enqueue(&mut self, stream: Stream, kind: Enqueued) -> Position {
        let position = self.positions.entry(stream).or_default();
        *position += 1;
        let event = Position {
            stream,
            position: *position,
        };
        self.device(0, DeviceEvent::Observed(Observed::Enqueued(event, kind)));
        event
    }

    fn waits(&mut self, stream: Stream, event: Position) {
        let from = self.positions.entry(stream).or_default();
        *from += 1;
        let waits = Observed::Waits {
            stream,
            from: *from,
            event,
        };
        self.device(0, DeviceEvent::Observed(waits));
    }

    fn seen(&mut self, event: Position) {
        self.device(0, DeviceEvent::Observed(Observed::Seen(event)));
    }

    /// A task on a stream of its device, behind these events. Gives the event behind it.
    fn on(
        &mut self,
        task: u64,
        stream: Stream,
        accesses: &[(Mode, Region)],
        behind: &[Position],
    ) -> Position {
        self.spawn(task, accesses);
        self.device(
            task,
            DeviceEvent::Granted {
                device: stream.device,
                member: 0,
                members: 1,
                place: 0,
                share: WHOLE,
                memory: 0,
            },
        );
        self.device(task, DeviceEvent::Lent(stream));
        for event in behind {
            self.waits(stream, *event);
        }
        self.device(task, DeviceEvent::Begun);
        self.task(task, Event::Start);
        let event = self.enqueue(stream, Enqueued::Operation);
        self.task(task, Event::End);
        let behind = Some(event);
        self.device(task, DeviceEvent::Returned { member: 0, behind });
        self.task(task, Event::Done);
        event
    }

    /// A copy of a tile on the copy stream of two devices, behind these events.
    fn copy(&mut self, index: u64, from: DeviceId, to: DeviceId, behind: &[Position]) -> Position {
        let device = if to == HOST { from } else { to };
        let stream = stream(device, 100 + u32::from(from.0));
        for event in behind {
            self.waits(stream, *event);
        }
        let event = self.enqueue(stream, Enqueued::Copy);
        self.moved(index, from, to, Some(event));
        event
    }

    fn moved(&mut self, index: u64, from: DeviceId, to: DeviceId, event: Option<Position>) {
        let instance = |device| if device == HOST { whole() } else { tile(index) };
        let time = self.now();
        self.file.moves.push(MoveRecord {
            time,
            thread: 0,
            datum: ARRAY,
            region: tile(index),
            from,
            to,
            source: instance(from),
            target: instance(to),
            bytes: if event.is_some() { TILE * ITEM } else { 0 },
            event,
        });
    }
}

fn replay(file: &TraceFile) -> Moves {
    trace::check_moves(file).unwrap()
}

fn order(file: &TraceFile) -> usize {
    trace::check_order(file).unwrap().violations.len()
}

/// That something is found, of this rule, in these words.
#[track_caller]
fn finds(file: &TraceFile, rule: Rule, words: &[&str]) {
    let violations = replay(file).violations;
    let found = violations.iter().any(|violation| {
        violation.rule == rule && words.iter().all(|words| violation.text.contains(words))
    });
    assert!(found, "{words:?} in {violations:#?}");
}

/// A tile is written on one device, read on the other and on the host, and written there again.
///
/// | task | where | does |
/// |---|---|---|
/// | 1 | stream 0 of gpu(0) | updates tile 0, which came from the host |
/// | 2 | stream 0 of gpu(1) | reads it, which came from gpu(0) |
/// | 3 | the host | reads it, which came home from gpu(1) |
/// | 4 | stream 1 of gpu(0) | updates it |
fn story() -> TraceFile {
    let mut author = Author::new(1 << 20);
    let update = [(Mode::InOut, tile(0))];
    let read = [(Mode::In, tile(0))];
    let there = author.copy(0, HOST, gpu(0), &[]);
    let first = author.on(1, stream(gpu(0), 0), &update, &[there]);
    let over = author.copy(0, gpu(0), gpu(1), &[first]);
    let second = author.on(2, stream(gpu(1), 0), &read, &[over]);
    let home = author.copy(0, gpu(1), HOST, &[over]);
    author.seen(home);
    author.on_host(3, &read);
    author.on(4, stream(gpu(0), 1), &update, &[second]);
    author.file
}

#[test]
fn a_story_that_is_right_is_right() {
    let file = story();
    let moves = replay(&file);
    assert!(moves.violations.is_empty(), "{:#?}", moves.violations);
    assert_eq!((moves.copies, moves.bytes, moves.reads), (3, 240, 4));
    assert_eq!(order(&file), 0);
    let refused = TraceFile { version: 3, ..file };
    let refused = trace::check_moves(&refused).unwrap_err().to_string();
    assert!(refused.contains("copies of data"), "{refused}");
}

#[test]
fn each_wait_and_each_copy_of_the_story_matters() {
    let whole = story();
    let evidence = |record: &DeviceRecord| {
        matches!(
            record.event,
            DeviceEvent::Observed(Observed::Waits { .. } | Observed::Seen(_))
        )
    };
    for at in (0..whole.devices.len()).filter(|&at| evidence(&whole.devices[at])) {
        let mut file = whole.clone();
        let gone = file.devices.remove(at);
        let found = replay(&file).violations.len() + order(&file);
        assert!(found > 0, "{gone:?}");
    }
    for at in 0..whole.moves.len() {
        let mut file = whole.clone();
        let gone = file.moves.remove(at);
        assert!(!replay(&file).violations.is_empty(), "{gone:?}");
    }
    let mut file = whole.clone();
    file.moves.swap_remove(1);
    finds(
        &file,
        Rule::Coherence,
        &["reads A", "on gpu(1)", "task 1 wrote is on gpu(0)"],
    );
}

#[test]
fn what_is_there_is_not_copied_again() {
    let mut author = Author::new(1 << 20);
    let there = author.copy(0, HOST, gpu(0), &[]);
    author.copy(0, HOST, gpu(0), &[there]);
    finds(
        &author.file,
        Rule::Transfer,
        &["from host to gpu(0), where it is"],
    );
    // After it was dropped it may be.
    let mut author = Author::new(1 << 20);
    author.copy(0, HOST, gpu(0), &[]);
    author.moved(0, gpu(0), gpu(0), None);
    author.copy(0, HOST, gpu(0), &[]);
    let moves = replay(&author.file);
    assert!(moves.violations.is_empty(), "{:#?}", moves.violations);
    assert_eq!((moves.copies, moves.dropped), (2, 1));
}

#[test]
fn what_was_dropped_is_not_there() {
    let mut author = Author::new(1 << 20);
    let written = author.on(1, stream(gpu(0), 0), &[(Mode::Out, tile(2))], &[]);
    author.moved(2, gpu(0), gpu(0), None);
    author.copy(2, gpu(0), HOST, &[written]);
    finds(&author.file, Rule::Coherence, &["task 1 wrote is nowhere"]);
}

#[test]
fn a_writer_is_behind_the_copies_of_what_it_writes_over() {
    for told in [true, false] {
        let mut author = Author::new(1 << 20);
        let written = author.on(1, stream(gpu(0), 0), &[(Mode::Out, tile(0))], &[]);
        let home = author.copy(0, gpu(0), HOST, &[written]);
        let behind: &[Position] = if told { &[home] } else { &[written] };
        author.on(2, stream(gpu(0), 1), &[(Mode::Out, tile(0))], behind);
        let violations = replay(&author.file).violations;
        assert_eq!(violations.is_empty(), told, "{violations:#?}");
        if !told {
            finds(
                &author.file,
                Rule::Coherence,
                &["task 2 writes to A", "to host"],
            );
        }
    }
}

#[test]
fn an_old_version_does_not_do() {
    let mut author = Author::new(1 << 20);
    let there = author.copy(0, HOST, gpu(1), &[]);
    let written = author.on(1, stream(gpu(0), 0), &[(Mode::Out, tile(0))], &[]);
    author.on(
        2,
        stream(gpu(1), 0),
        &[(Mode::In, tile(0))],
        &[there, written],
    );
    finds(
        &author.file,
        Rule::Coherence,
        &["task 2 reads", "wrote is on gpu(0)"],
    );
}

#[test]
fn a_cycle_of_tiles_costs_the_best_what_belady_says() {
    // Four tiles in turns, and room for three: of four in each turn the best misses two at most.
    let mut author = Author::new(3 * TILE * ITEM);
    let mut task = 0;
    for _ in 0..5 {
        for index in 0..4 {
            task += 1;
            author.on(task, stream(gpu(0), 0), &[(Mode::In, tile(index))], &[]);
        }
    }
    // First all four; then one miss every second use that follows, as the rule goes.
    let best = trace::optimum(&author.file).unwrap();
    let mut there: Vec<u64> = Vec::new();
    let uses: Vec<u64> = (0..20).map(|at| at % 4).collect();
    let mut misses = 0;
    for (at, index) in uses.iter().enumerate() {
        if there.contains(index) {
            continue;
        }
        misses += 1;
        if there.len() == 3 {
            let next = |index: &u64| uses[at..].iter().position(|use_| use_ == index);
            let last = there
                .iter()
                .copied()
                .max_by_key(|index| next(index).unwrap_or(99));
            there.retain(|index| Some(*index) != last);
        }
        there.push(*index);
    }
    let loaded = misses * TILE * ITEM;
    assert_eq!(
        best,
        Optimum {
            bytes: loaded,
            loaded,
            written_back: 0
        }
    );
    // What is written goes home once, when it has to go or at the end.
    let mut author = Author::new(2 * TILE * ITEM);
    for task in 0..4 {
        author.on(task + 1, stream(gpu(0), 0), &[(Mode::Out, tile(task))], &[]);
    }
    let best = trace::optimum(&author.file).unwrap();
    assert_eq!((best.loaded, best.written_back, best.bytes), (0, 160, 320));
}

/// Real traces: random programs on devices, and the same verdict in the slowest way.
mod real {
    use std::collections::{HashMap, HashSet};
    use std::sync::Arc;
    use std::time::Duration;

    use charioteer::gang::{Alternative, Member};
    use charioteer::machine::{Description, Kind, Links, Machine, Time};
    use charioteer::native::{Access, Datum, Part, Runtime, Task, current};
    use proptest::prelude::*;

    use super::*;
    use crate::common::{prove, take_trace, trace_path, within_on};

    const ELEMENTS: u64 = 24;
    const SIZE: usize = 40;

    #[derive(Clone, Debug)]
    enum On {
        Host,
        /// Cores and devices.
        Any,
        Gpu(u16),
        /// Two devices, which divide what they write.
        Pair,
        /// A core and a device, which do.
        Mixed,
        Prefetch(u16),
        Evict(u16),
        /// The host itself.
        Outside,
    }

    #[derive(Clone, Debug)]
    struct Plan {
        on: On,
        uses: Vec<(Span, Mode)>,
        work: u64,
        fails: bool,
    }

    #[derive(Clone, Debug)]
    struct Program {
        gpus: u16,
        workers: usize,
        runahead: u32,
        /// Elements for which a device has room.
        room: u64,
        peers: bool,
        plans: Vec<Plan>,
    }

    fn span() -> impl Strategy<Value = Span> {
        prop_oneof![
            6 => (0..ELEMENTS / 4).prop_map(|tile| Span::range(tile * 4, tile * 4 + 4)),
            2 => (0..ELEMENTS - 6, 2..7_u64).prop_map(|(from, count)| Span::range(from, from + count)),
            1 => (0..4_u64, 2..5_u64).prop_map(|(from, count)| Span::new(from, 3, count)),
        ]
    }

    fn plan(gpus: u16, commutes: bool) -> impl Strategy<Value = Plan> {
        let on = prop_oneof![
            8 => (0..gpus).prop_map(On::Gpu),
            2 => Just(On::Any),
            2 => Just(On::Host),
            2 => Just(if gpus > 1 { On::Pair } else { On::Any }),
            1 => Just(On::Mixed),
            1 => Just(On::Outside),
            1 => (0..gpus).prop_map(On::Prefetch),
            1 => (0..gpus).prop_map(On::Evict),
        ];
        let mode = if commutes {
            prop_oneof![Just(Mode::In), Just(Mode::InOut), Just(Mode::Commute)].boxed()
        } else {
            prop_oneof![3 => Just(Mode::In), 2 => Just(Mode::InOut), 2 => Just(Mode::Out)].boxed()
        };
        let uses = prop::collection::vec((span(), mode), 1..3);
        let fails = prop::bool::weighted(if commutes { 0.0 } else { 0.04 });
        (on, uses, 0..40_u64, fails).prop_map(|(on, uses, work, fails)| Plan {
            on,
            uses,
            work,
            fails,
        })
    }

    fn program(most: usize) -> impl Strategy<Value = Program> {
        let workers = prop_oneof![Just(0_usize), Just(1), Just(3)];
        let runahead = prop_oneof![1 => Just(0_u32), 3 => Just(64)];
        let room = prop_oneof![Just(ELEMENTS * 4), Just(2 * ELEMENTS), Just(ELEMENTS)];
        (
            1..=3_u16,
            workers,
            runahead,
            room,
            prop::bool::ANY,
            prop::bool::weighted(0.2),
        )
            .prop_flat_map(move |(gpus, workers, runahead, room, peers, commutes)| {
                prop::collection::vec(plan(gpus, commutes), 1..most).prop_map(move |plans| {
                    Program {
                        gpus,
                        workers,
                        runahead,
                        room,
                        peers,
                        plans,
                    }
                })
            })
    }

    fn alternatives(on: &On) -> Vec<Alternative> {
        let any = Member::Any(Kind::Gpu);
        let members = match on {
            On::Gpu(index) => vec![Member::Device(gpu(*index))],
            On::Pair => vec![any, any],
            On::Mixed => vec![Member::Any(Kind::Cpu), any],
            _ => vec![any],
        };
        vec![Alternative {
            members: members.into(),
            share: WHOLE,
            memory: 0,
        }]
    }

    /// Runs a program and gives its trace.
    fn run(program: &Program) -> TraceFile {
        let mut description = Description::uniform(
            2,
            usize::from(program.gpus),
            program.room * ITEM,
            Time::Real,
        )
        .unwrap();
        if !program.peers {
            let links = Links {
                peer: None,
                ..Links::default()
            };
            let (host, gpus) = (description.host().clone(), description.gpus().to_vec());
            description = Description::new(host, gpus, links, Time::Real).unwrap();
        }
        let machine = Machine::virtual_machine(description);
        let path = trace_path();
        let runtime = Runtime::builder()
            .workers(program.workers)
            .machine(Arc::clone(&machine))
            .runahead(program.runahead)
            .trace(&path)
            .open()
            .unwrap();
        let buffer = vec![0_u64; usize::try_from(ELEMENTS).unwrap()];
        let address = buffer.as_ptr() as usize;
        let datum: Arc<Datum> = Datum::stored("A", &[ELEMENTS], 8, address, Box::new(buffer));
        let mut tasks: Vec<Task<()>> = Vec::new();
        for (number, plan) in program.plans.iter().enumerate() {
            let parts: Vec<Part> = plan
                .uses
                .iter()
                .map(|(span, _)| datum.part(Region::new([*span])))
                .collect();
            match plan.on {
                On::Prefetch(index) => {
                    tasks.extend(runtime.prefetch(&parts[0], gpu(index)));
                    continue;
                }
                On::Evict(index) => {
                    tasks.extend(runtime.evict(&parts[0], gpu(index)));
                    continue;
                }
                On::Outside => {
                    drop(runtime.host(&[Access::new(&parts[0], Mode::InOut)]));
                    continue;
                }
                _ => {}
            }
            let mut task = runtime.task().name(format!("t{number}"));
            let splits = matches!(plan.on, On::Pair | On::Mixed);
            for ((_, mode), part) in plan.uses.iter().zip(&parts) {
                let access = Access::new(part, *mode);
                task = task.accesses(match mode {
                    Mode::In => access,
                    _ if splits => access.sharded(0),
                    _ => access,
                });
            }
            task = match plan.on {
                On::Host => task,
                _ => task.on(alternatives(&plan.on)),
            };
            let (machine, work, fails) = (Arc::clone(&machine), plan.work, plan.fails);
            let body = move || {
                for (device, stream) in current().unwrap().streams() {
                    let gpu = machine.as_virtual().unwrap().gpu(device);
                    let _ = gpu.busy(stream, Duration::from_micros(work));
                }
                if fails {
                    return Err(std::io::Error::other("on purpose"));
                }
                Ok(())
            };
            // Some are refused: they conflict with themselves, or never fit.
            let mut body = Some(body);
            tasks.extend(task.try_spawn(0, move || (body.take().expect("it runs once"))()));
        }
        for task in &tasks {
            let _ = task.result();
        }
        let _ = runtime.close();
        take_trace(&path)
    }

    /// The verdict in the slowest way, on a trace without failures: each pair of accesses, each element, and
    /// what is reached over streams, waits and what the host has seen.
    mod oracle {
        use super::*;

        type Reach = HashMap<Stream, u64>;

        /// A task on a stream, in its one attempt.
        struct Part {
            device: DeviceId,
            place: u16,
            members: u16,
            begun: u64,
            returned: u64,
            reach: Reach,
            end: Position,
        }

        #[derive(Default)]
        struct Life {
            host: Option<(u64, u64, Reach)>,
            cores: Vec<u16>,
            parts: Vec<Part>,
        }

        fn observed(file: &TraceFile) -> impl Iterator<Item = (u64, Observed)> {
            file.devices.iter().filter_map(|record| match record.event {
                DeviceEvent::Observed(observed) => Some((record.time, observed)),
                _ => None,
            })
        }

        /// All that is before a position of a stream, if there is one, and a moment of the host.
        fn reach(file: &TraceFile, from: Option<(Stream, u64)>, moment: u64) -> Reach {
            let mut reach: Reach = from.into_iter().collect();
            for (time, what) in observed(file) {
                if let Observed::Seen(event) | Observed::Synchronised(event) = what
                    && time <= moment
                {
                    let known = reach.entry(event.stream).or_default();
                    *known = event.position.max(*known);
                }
            }
            loop {
                let mut more = false;
                for (_, what) in observed(file) {
                    if let Observed::Waits {
                        stream,
                        from,
                        event,
                    } = what
                        && reach.get(&stream).is_some_and(|&position| position >= from)
                    {
                        let known = reach.entry(event.stream).or_default();
                        more |= *known < event.position;
                        *known = event.position.max(*known);
                    }
                }
                if !more {
                    return reach;
                }
            }
        }

        fn covers(reach: &Reach, end: Position) -> bool {
            end.position == 0 || reach.get(&end.stream) >= Some(&end.position)
        }

        fn lives(file: &TraceFile) -> HashMap<u64, Life> {
            let mut lives: HashMap<u64, Life> = HashMap::new();
            let mut last: HashMap<Stream, u64> = HashMap::new();
            let mut lent: HashMap<u64, Vec<Stream>> = HashMap::new();
            let mut granted: HashMap<u64, Vec<(DeviceId, u16, u16)>> = HashMap::new();
            for record in &file.devices {
                match record.event {
                    DeviceEvent::Granted {
                        device,
                        place,
                        members,
                        ..
                    } => {
                        let all = granted.entry(record.task).or_default();
                        all.push((device, place, members));
                    }
                    DeviceEvent::Lent(stream) if stream.device != HOST => {
                        lent.entry(record.task).or_default().push(stream);
                    }
                    DeviceEvent::Begun => {
                        let life = lives.entry(record.task).or_default();
                        let all = &granted[&record.task];
                        let cores = all.iter().filter(|it| it.0 == HOST);
                        life.cores = cores.map(|it| it.1).collect();
                        for stream in &lent[&record.task] {
                            let it = all.iter().find(|it| it.0 == stream.device).unwrap();
                            let before = last.get(stream).copied().unwrap_or(0);
                            let mut reach = reach(file, Some((*stream, before + 1)), record.time);
                            reach.insert(*stream, before.max(reach[stream] - 1));
                            life.parts.push(Part {
                                device: stream.device,
                                place: it.1,
                                members: it.2,
                                begun: record.time,
                                returned: u64::MAX,
                                reach,
                                end: Position {
                                    stream: *stream,
                                    position: u64::MAX,
                                },
                            });
                        }
                    }
                    DeviceEvent::Returned {
                        member,
                        behind: Some(behind),
                    } => {
                        let (device, ..) = granted[&record.task][usize::from(member)];
                        let life = lives.entry(record.task).or_default();
                        let mut parts = life.parts.iter_mut();
                        if let Some(part) = parts.find(|part| part.device == device) {
                            (part.returned, part.end) = (record.time, behind);
                        }
                    }
                    DeviceEvent::Observed(
                        Observed::Enqueued(event, _) | Observed::Recorded(event),
                    ) => {
                        let last = last.entry(event.stream).or_default();
                        *last = event.position.max(*last);
                    }
                    DeviceEvent::Observed(Observed::Waits { stream, from, .. }) => {
                        let last = last.entry(stream).or_default();
                        *last = (from - 1).max(*last);
                    }
                    _ => {}
                }
            }
            for record in &file.records {
                let all = granted.get(&record.task);
                if all.is_some_and(|all| all.iter().all(|it| it.0 != HOST)) {
                    continue;
                }
                let life = lives.entry(record.task).or_default();
                match record.event {
                    Event::Start if life.host.is_none() => {
                        let reach = reach(file, None, record.time);
                        life.host = Some((record.time, u64::MAX, reach));
                    }
                    Event::End => {
                        if let Some(host) = &mut life.host {
                            host.1 = record.time;
                        }
                    }
                    _ => {}
                }
            }
            lives.retain(|_, life| life.host.is_some() || !life.parts.is_empty());
            lives
        }

        fn is_before(one: &Life, other: &Life) -> bool {
            let after = |end: u64| {
                other.host.as_ref().is_none_or(|host| host.0 >= end)
                    && other.parts.iter().all(|part| part.begun >= end)
            };
            let behind = |end: Position| {
                other.host.as_ref().is_none_or(|host| covers(&host.2, end))
                    && other.parts.iter().all(|part| covers(&part.reach, end))
            };
            one.host.as_ref().is_none_or(|host| after(host.1))
                && one.parts.iter().all(|part| behind(part.end))
        }

        /// Whether some pair of accesses is in no order.
        pub fn is_out_of_order(file: &TraceFile) -> bool {
            let lives = lives(file);
            file.accesses.iter().enumerate().any(|(at, later)| {
                file.accesses[..at].iter().any(|earlier| {
                    let (Some(one), Some(other)) =
                        (lives.get(&earlier.task), lives.get(&later.task))
                    else {
                        return false;
                    };
                    if earlier.task == later.task || !earlier.region.overlaps(&later.region) {
                        return false;
                    }
                    match (earlier.mode, later.mode) {
                        (Mode::In, Mode::In) => false,
                        (Mode::Commute, Mode::Commute) => {
                            !is_before(one, other) && !is_before(other, one)
                        }
                        _ => !is_before(one, other),
                    }
                })
            })
        }

        type Place = (DeviceId, Region);

        #[derive(Clone, Copy, PartialEq)]
        enum Since {
            Ever,
            Writer,
            Copy(usize),
        }

        #[derive(Clone, Default)]
        struct Element {
            writer: u64,
            holders: Vec<(Place, Since)>,
            former: Vec<(Vec<Place>, u64)>,
            uses: Vec<(Place, usize)>,
        }

        fn indices(region: &Region) -> impl Iterator<Item = usize> + use<> {
            let span = region.spans()[0];
            let all = (0..span.count()).map(move |at| span.start() + at * span.step());
            all.map(|index| usize::try_from(index).unwrap())
        }

        fn piece(access: &AccessRecord, member: u16, members: u16) -> Region {
            if access.spread == Spread::Whole {
                return access.region.clone();
            }
            // As equal as can be, the first ones one longer.
            let all: Vec<usize> = indices(&access.region).collect();
            let (count, members) = (all.len(), usize::from(members));
            let sizes = (0..members).map(|it| count / members + usize::from(it < count % members));
            let first: usize = sizes.clone().take(usize::from(member)).sum();
            let own = sizes.clone().nth(usize::from(member)).unwrap();
            access
                .region
                .select(0, Span::range(first as u64, (first + own) as u64))
        }

        /// The box of the instance that has an index, on a device, for one of these regions.
        fn instance(regions: &[Region], index: usize) -> Region {
            let mut boxes: Vec<(u64, u64)> = Vec::new();
            for region in regions {
                let span = region.spans()[0];
                let mut own = (span.start(), span.end());
                while let Some(at) = boxes.iter().position(|it| it.0 < own.1 && own.0 < it.1) {
                    let other = boxes.swap_remove(at);
                    own = (own.0.min(other.0), own.1.max(other.1));
                }
                boxes.push(own);
            }
            let index = index as u64;
            let own = boxes
                .iter()
                .find(|it| it.0 <= index && index < it.1)
                .unwrap();
            Region::new([Span::range(own.0, own.1)])
        }

        /// Whether some element is not where it is read or copied, is moved twice, or overwritten too
        /// early.
        pub fn is_astray(file: &TraceFile) -> bool {
            let whole = Region::whole(&[ELEMENTS]);
            let home = (HOST, whole.clone());
            let fresh = Element {
                holders: vec![(home.clone(), Since::Ever)],
                ..Element::default()
            };
            let mut array = vec![fresh; usize::try_from(ELEMENTS).unwrap()];
            let lives = lives(file);
            let reaches: Vec<Reach> = file
                .moves
                .iter()
                .map(|record| match record.event {
                    None => Reach::new(),
                    Some(event) => {
                        let from = Some((event.stream, event.position));
                        let mut reach = reach(file, from, record.time);
                        *reach.get_mut(&event.stream).unwrap() -= 1;
                        reach
                    }
                })
                .collect();
            let mut steps: Vec<(u64, Result<usize, u64>)> = (0..file.moves.len())
                .map(|at| (file.moves[at].time, Ok(at)))
                .collect();
            let tasks: HashSet<u64> = file.accesses.iter().map(|access| access.task).collect();
            for task in tasks {
                let Some(life) = lives.get(&task) else {
                    continue;
                };
                let begun = life.parts.first().map(|part| part.begun);
                let begin = begun.unwrap_or_else(|| life.host.as_ref().unwrap().0);
                steps.push((begin, Err(task)));
            }
            steps.sort_by_key(|step| step.0);
            let end_of = |copy: usize| file.moves[copy].event.unwrap();
            for (time, step) in steps {
                match step {
                    Ok(at) => {
                        let record = &file.moves[at];
                        let source = (record.from, record.source.clone());
                        let target = (record.to, record.target.clone());
                        if record.event.is_none() {
                            for element in &mut array {
                                element.holders.retain(|it| it.0 != source);
                                element.uses.retain(|it| it.0 != source);
                                for former in &mut element.former {
                                    former.0.retain(|it| *it != source);
                                }
                            }
                            continue;
                        }
                        let reach = &reaches[at];
                        for index in indices(&record.region) {
                            let element = &mut array[index];
                            let clash = |it: &&(Place, usize)| {
                                it.0 == target && !covers(reach, end_of(it.1))
                            };
                            if element.uses.iter().any(|it| clash(&it)) {
                                return true;
                            }
                            element.uses.retain(|it| it.0 != target);
                            element.uses.push((source.clone(), at));
                            element.uses.push((target.clone(), at));
                            let since = element.holders.iter().find(|it| it.0 == source);
                            match since.map(|it| it.1) {
                                None => {
                                    let has = |it: &&mut (Vec<Place>, u64)| {
                                        it.1 >= time && it.0.contains(&source)
                                    };
                                    let Some(former) = element.former.iter_mut().find(has) else {
                                        return true;
                                    };
                                    former.0.push(target.clone());
                                    continue;
                                }
                                Some(Since::Ever) => {}
                                Some(Since::Copy(copy)) => {
                                    if !covers(reach, end_of(copy)) {
                                        return true;
                                    }
                                }
                                Some(Since::Writer) => {
                                    let life = &lives[&element.writer];
                                    let host = life.host.as_ref();
                                    if record.from == HOST && host.is_some_and(|it| it.1 > time) {
                                        return true;
                                    }
                                    let parts = life.parts.iter();
                                    let mut parts = parts.filter(|it| it.device == record.from);
                                    if record.from != HOST && parts.any(|it| !covers(reach, it.end))
                                    {
                                        return true;
                                    }
                                }
                            }
                            let there = element.holders.iter().any(|it| it.0.0 == record.to);
                            if there && record.from != record.to {
                                return true;
                            }
                            element.holders.retain(|it| it.0 != target);
                            element.holders.push((target.clone(), Since::Copy(at)));
                        }
                    }
                    Err(task) => {
                        let life = &lives[&task];
                        let accesses = || file.accesses.iter().filter(|it| it.task == task);
                        let mut members: Vec<(DeviceId, u16, u16, &Reach)> = Vec::new();
                        for part in &life.parts {
                            members.push((part.device, part.place, part.members, &part.reach));
                        }
                        if let Some((_, _, reach)) = &life.host {
                            let of = life.parts.first().map_or(1, |part| part.members);
                            let cores = if of == 1 { &[0][..] } else { &life.cores };
                            members.extend(cores.iter().map(|place| (HOST, *place, of, reach)));
                        }
                        let mut written: Vec<(usize, Place)> = Vec::new();
                        for &(device, place, of, reach) in &members {
                            let regions: Vec<Region> =
                                accesses().map(|it| piece(it, place, of)).collect();
                            for (access, region) in accesses().zip(&regions) {
                                for index in indices(region) {
                                    let instance = match device {
                                        HOST => whole.clone(),
                                        _ => instance(&regions, index),
                                    };
                                    let own = (device, instance);
                                    let element = &mut array[index];
                                    if access.mode != Mode::Out {
                                        let it = element.holders.iter().find(|it| it.0 == own);
                                        match it.map(|it| it.1) {
                                            None => return true,
                                            Some(Since::Copy(copy))
                                                if !covers(reach, end_of(copy)) =>
                                            {
                                                return true;
                                            }
                                            _ => {}
                                        }
                                    }
                                    if access.mode.writes() {
                                        let clash = |it: &(Place, usize)| {
                                            it.0 == own && !covers(reach, end_of(it.1))
                                        };
                                        if element.uses.iter().any(clash) {
                                            return true;
                                        }
                                        element.uses.retain(|it| it.0 != own);
                                        written.push((index, own));
                                    }
                                }
                            }
                        }
                        let launched = life.parts.iter().map(|part| part.returned).max();
                        let mut seen = HashSet::new();
                        for (index, own) in written {
                            let element = &mut array[index];
                            if seen.insert(index) {
                                let old = std::mem::take(&mut element.holders);
                                let old = old.into_iter().map(|it| it.0).collect();
                                element.former =
                                    launched.map(|time| (old, time)).into_iter().collect();
                                element.writer = task;
                            }
                            element.holders.push((own, Since::Writer));
                        }
                    }
                }
            }
            false
        }
    }

    /// Takes away one piece of evidence after the other, and each copy: the replay says what the oracle says.
    fn take_away(file: &TraceFile) {
        let matters = |at: &usize| {
            matches!(
                file.devices[*at].event,
                DeviceEvent::Observed(Observed::Waits { .. } | Observed::Seen(_))
            )
        };
        let agree = |file: &TraceFile, what: &dyn std::fmt::Debug| {
            let order = trace::check_order(file).unwrap().violations;
            let moves = replay(file).violations;
            let wrong = !order.is_empty();
            assert_eq!(wrong, oracle::is_out_of_order(file), "{what:?}: {order:#?}");
            // Where tasks are in no order, nobody can say who wrote last.
            if !wrong {
                let astray = oracle::is_astray(file);
                assert_eq!(!moves.is_empty(), astray, "{what:?}: {moves:#?}");
            }
        };
        agree(file, &"whole");
        for at in (0..file.devices.len()).filter(matters) {
            let mut other = file.clone();
            let gone = other.devices.remove(at);
            agree(&other, &gone);
        }
        for at in 0..file.moves.len() {
            let mut other = file.clone();
            let gone = other.moves.remove(at);
            agree(&other, &gone);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 400, ..ProptestConfig::default() })]

        #[test]
        fn random_programs_have_their_data_where_they_run(program in program(SIZE)) {
            within_on(program.clone(), 30, move || {
                let file = run(&program);
                prove(&file);
                let checked = trace::check_data(&file).unwrap();
                let (moves, _) = checked.moves.unwrap();
                let mut violations = checked.order.violations;
                violations.extend(moves.violations);
                let violations: Vec<_> = violations.iter().map(ToString::to_string).collect();
                assert!(violations.is_empty(), "{violations:#?}");
            });
        }

        #[test]
        fn what_is_taken_away_is_missed_if_it_matters(mut program in program(9)) {
            program.plans.iter_mut().for_each(|plan| plan.fails = false);
            within_on(program.clone(), 60, move || take_away(&run(&program)));
        }
    }
}
