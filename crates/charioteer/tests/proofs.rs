//! What devices did is proved from traces: of random programs, whatever goes wrong in them.
//!
//! A program has tasks on sets of devices, on cores and on both together, with shares and memory, that pause, spawn and
//! wait for children, fail by themselves or by their work, are repeated, or are cancelled; devices are
//! lost and events late. Nothing is asserted of it but that it ends; that it kept its promises is the
//! checker's word.
#![cfg(not(loom))]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use charioteer::gang::{Alternative, Member, WHOLE};
use charioteer::machine::{
    Description, DeviceError, DeviceId, Enqueued, Event as Position, HOST, Kind, Machine, Observed,
    Stream, Time,
};
use charioteer::native::{Runtime, Spawn, Task, current};
use charioteer::trace::{self, DeviceEvent, DeviceRecord, Event, Rule, TraceFile};
use common::{prove, take_trace, trace_path};
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
    /// So many cores beside devices, behind the first of these.
    cores: usize,
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
    let cores = prop_oneof![4 => Just(0_usize), 1 => 1..4_usize];
    let memory = prop_oneof![4 => Just(0), 2 => Just(MEMORY / 4), 1 => Just(MEMORY / 3 + 1)];
    let after = proptest::collection::vec(1..12_usize, 0..3);
    let work = (0..3_usize, 0..80_u64);
    (on, cores, share, memory, after, work, twist()).prop_map(
        |(on, cores, share, memory, after, work, twist)| Plan {
            on: on.map_or_else(Err, Ok),
            cores,
            share,
            memory,
            after,
            work,
            twist,
        },
    )
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

/// Few tasks that crowd on few devices, none of which is lost.
fn small() -> impl Strategy<Value = Program> {
    let plan = |gpus| {
        plan(gpus).prop_map(|mut plan| {
            if let Twist::Loses(_) = plan.twist {
                plan.twist = Twist::None;
            }
            plan
        })
    };
    (1..=2_usize, prop::bool::ANY).prop_flat_map(move |(gpus, is_virtual)| {
        proptest::collection::vec(plan(gpus), 1..10).prop_map(move |plans| Program {
            gpus,
            workers: if is_virtual { 0 } else { 1 },
            runahead: 64,
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

/// Spawns a plan in a runtime with so many cores.
fn spawn(
    runtime: &Spawn,
    cores: usize,
    machine: &Arc<Machine>,
    plan: &Plan,
    after: &[Task<()>],
) -> Task<()> {
    let mut task = runtime.task();
    let mut members = match plan.on {
        Ok(count) => vec![Member::Any(Kind::Gpu); count],
        Err(index) => vec![Member::Device(DeviceId::gpu(u16::try_from(index).unwrap()))],
    };
    if !members.is_empty() {
        let cores = plan.cores.min(cores);
        members.splice(1..1, vec![Member::Any(Kind::Cpu); cores]);
        task = task.on(set(members, plan.share, plan.memory));
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
                cores: 0,
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

/// Runs a program and gives its trace.
fn run(program: &Program) -> TraceFile {
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
        let after: Vec<Task<()>> = plan
            .after
            .iter()
            .filter_map(|back| tasks.get(tasks.len().checked_sub(*back)?).cloned())
            .collect();
        let task = spawn(&handle, program.workers.max(1), &machine, plan, &after);
        if let Twist::Cancelled = plan.twist {
            task.cancel();
        }
        tasks.push(task);
    }
    for task in &tasks {
        let _ = task.result();
    }
    let _ = runtime.close();
    take_trace(&path)
}

/// The checker's verdict in the slowest way: what is reached from a position over streams, waits and
/// what the host has seen, and the heaviest set of uses of which none is before another.
mod oracle {
    use std::collections::{BTreeSet, HashMap};

    use super::*;

    type Reach = HashMap<Stream, u64>;

    struct Use {
        amounts: [u64; 2],
        behind: Reach,
        /// Its stream, and the first position there that is behind all that.
        first: Position,
        end: Option<Position>,
        ended: usize,
        begun: usize,
    }

    impl Use {
        fn is_before(&self, other: &Self) -> bool {
            // Nothing is before the first position of a stream.
            let covers = |end: Position| {
                end.position == 0 || other.behind.get(&end.stream) >= Some(&end.position)
            };
            self.ended < other.begun && self.end.is_some_and(covers)
        }

        /// Whether it ends before it begins: then it is at no moment.
        fn is_none(&self) -> bool {
            let is_before = |end: Position| {
                end.stream == self.first.stream && end.position < self.first.position
            };
            self.end.is_some_and(is_before)
        }
    }

    /// The pairs of tasks whose work is in no order, and the devices that are exceeded.
    pub fn verdict(trace: &TraceFile) -> (BTreeSet<(u64, u64)>, BTreeSet<DeviceId>) {
        let mut fails: Reach = HashMap::new();
        for record in &trace.devices {
            if let DeviceEvent::Observed(Observed::Failed(event)) = record.event {
                fails.insert(event.stream, event.position);
            }
        }
        let observed = |index: usize| match trace.devices[index].event {
            DeviceEvent::Observed(observed) => Some(observed),
            _ => None,
        };
        // All that is before a position, with what was logged before some record.
        let reach = |from: Position, seen_before: usize, waits_before: usize| {
            let mut reach: Reach = HashMap::from([(from.stream, from.position)]);
            for index in 0..seen_before {
                if let Some(Observed::Seen(event) | Observed::Synchronised(event)) = observed(index)
                {
                    let known = reach.entry(event.stream).or_default();
                    *known = event.position.max(*known);
                }
            }
            loop {
                let mut more = false;
                for index in 0..waits_before {
                    if let Some(Observed::Waits {
                        stream,
                        from,
                        event,
                    }) = observed(index)
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
        };
        let predecessors = |task: u64| {
            let edges = trace.records.iter();
            edges.filter(move |record| record.event == Event::Edge && record.task == task)
        };
        // What each task enqueued that ran, while the stream was its own; the first of each time.
        let mut lent: HashMap<Stream, (u64, Option<usize>)> = HashMap::new();
        let mut ends: HashMap<u64, Reach> = HashMap::new();
        let mut firsts: Vec<(u64, Position, usize)> = Vec::new();
        let mut known: HashMap<(u64, u16), (DeviceId, u32, u64)> = HashMap::new();
        let mut streams: HashMap<(u64, DeviceId), Stream> = HashMap::new();
        let mut with_cores: BTreeSet<u64> = BTreeSet::new();
        let mut open: HashMap<(u64, DeviceId, usize), usize> = HashMap::new();
        let mut uses: HashMap<DeviceId, Vec<Use>> = HashMap::new();
        for (index, record) in trace.devices.iter().enumerate() {
            let task = record.task;
            match record.event {
                // Cores have no timeline.
                DeviceEvent::Granted { device: HOST, .. } => {
                    with_cores.insert(task);
                }
                DeviceEvent::Lent(Stream { device: HOST, .. }) => {}
                DeviceEvent::Granted {
                    device,
                    member,
                    share,
                    memory,
                    ..
                } => {
                    known.insert((task, member), (device, share, memory));
                }
                DeviceEvent::Lent(stream) => {
                    lent.insert(stream, (task, None));
                    streams.insert((task, stream.device), stream);
                }
                DeviceEvent::Begun => {
                    for (&(_, device), &stream) in
                        streams.iter().filter(|((owner, _), _)| *owner == task)
                    {
                        let owner = lent.get_mut(&stream).unwrap();
                        if owner.1.is_none() {
                            *owner = (task, Some(index));
                        }
                        let position = u64::MAX;
                        let behind = reach(Position { stream, position }, index, index);
                        let firsts = (0..index).filter_map(|index| match observed(index) {
                            Some(Observed::Waits {
                                stream: of, from, ..
                            }) => (of == stream).then_some(from),
                            _ => None,
                        });
                        let position = firsts.max().unwrap_or(0);
                        let first = Position { stream, position };
                        let (_, share, memory) = *known
                            .iter()
                            .find(|((owner, _), had)| *owner == task && had.0 == device)
                            .unwrap()
                            .1;
                        for (kind, amounts) in
                            [[share.into(), 0], [0, memory]].into_iter().enumerate()
                        {
                            open.entry((task, device, kind)).or_insert_with(|| {
                                let all = uses.entry(device).or_default();
                                all.push(Use {
                                    amounts,
                                    behind: behind.clone(),
                                    first,
                                    end: None,
                                    ended: usize::MAX,
                                    begun: index,
                                });
                                all.len() - 1
                            });
                        }
                    }
                }
                DeviceEvent::Paused { member, behind }
                | DeviceEvent::Returned { member, behind } => {
                    let device = known[&(task, member)].0;
                    let returns = matches!(record.event, DeviceEvent::Returned { .. });
                    for kind in 0..=usize::from(returns) {
                        if let Some(at) = open.remove(&(task, device, kind)) {
                            let using = &mut uses.get_mut(&device).unwrap()[at];
                            using.end = behind;
                            using.ended = index;
                        }
                    }
                    if returns {
                        known.remove(&(task, member));
                        if let Some(stream) = streams.remove(&(task, device)) {
                            lent.remove(&stream);
                        }
                    }
                }
                DeviceEvent::Observed(Observed::Enqueued(event, kind))
                    if kind != Enqueued::Free =>
                {
                    let runs = fails
                        .get(&event.stream)
                        .is_none_or(|&at| event.position <= at);
                    if let Some((owner, Some(begun))) = lent.get(&event.stream)
                        && runs
                        && (task == 0 || task == *owner)
                    {
                        let end = ends.entry(*owner).or_default();
                        if end.insert(event.stream, event.position).is_none() {
                            firsts.push((*owner, event, *begun));
                        }
                    }
                }
                _ => {}
            }
        }
        let mut unordered = BTreeSet::new();
        let mut look = |task: u64, reach: &Reach| {
            for edge in predecessors(task) {
                for (stream, end) in ends.get(&edge.other).into_iter().flatten() {
                    if reach.get(stream).is_none_or(|position| position < end) {
                        unordered.insert((task, edge.other));
                    }
                }
            }
        };
        for &(task, first, begun) in &firsts {
            // The position itself is its own.
            look(task, &reach(first, begun, trace.devices.len()));
        }
        let on_devices = |task: u64| {
            let begins = |record: &DeviceRecord| record.event == DeviceEvent::Begun;
            trace
                .devices
                .iter()
                .any(|record| record.task == task && begins(record))
        };
        for record in &trace.records {
            let on_host = with_cores.contains(&record.task) || !on_devices(record.task);
            if record.event == Event::Start && on_host {
                let before = trace
                    .devices
                    .partition_point(|other| other.time <= record.time);
                let nowhere = Stream {
                    device: DeviceId::gpu(u16::MAX - 1),
                    number: 0,
                };
                let from = Position {
                    stream: nowhere,
                    position: 0,
                };
                look(record.task, &reach(from, before, before));
            }
        }
        let exceeded = uses.iter().filter(|(_, uses)| {
            let uses: Vec<&Use> = uses.iter().filter(|one| !one.is_none()).collect();
            most(&uses, 0) > u64::from(WHOLE) || most(&uses, 1) > MEMORY
        });
        (unordered, exceeded.map(|(&device, _)| device).collect())
    }

    fn most(uses: &[&Use], kind: usize) -> u64 {
        let Some((first, rest)) = uses.split_first() else {
            return 0;
        };
        if first.amounts[kind] == 0 {
            return most(rest, kind);
        }
        let beside: Vec<&Use> = rest
            .iter()
            .copied()
            .filter(|other| !first.is_before(other) && !other.is_before(first))
            .collect();
        let with = first.amounts[kind] + most(&beside, kind);
        if beside.len() == rest.len() {
            return with;
        }
        with.max(most(rest, kind))
    }
}

/// Takes each wait, and each completion that the host saw, out of a trace, and holds the checker's
/// verdict against the oracle's. Says how many of these mattered, and how many did not.
fn mutate(whole: &TraceFile) -> (usize, usize) {
    let (mut matter, mut do_not) = (0, 0);
    for at in 0..whole.devices.len() {
        let observed = whole.devices[at].event;
        let is_evidence = matches!(
            observed,
            DeviceEvent::Observed(
                Observed::Waits { .. } | Observed::Seen(_) | Observed::Synchronised(_)
            )
        );
        if !is_evidence {
            continue;
        }
        let mut file = whole.clone();
        file.devices.remove(at);
        let (unordered, exceeded) = oracle::verdict(&file);
        let checked = trace::check(&file).unwrap();
        let mut pairs = BTreeSet::new();
        let mut devices = BTreeSet::new();
        for violation in &checked.violations {
            match violation.rule {
                Rule::Order => {
                    pairs.insert((violation.task, violation.other.unwrap()));
                }
                Rule::Capacity => {
                    let (_, device) = violation.text.split_once("gpu(").unwrap();
                    let index = device.split_once(')').unwrap().0.parse().unwrap();
                    devices.insert(DeviceId::gpu(index));
                }
                _ => panic!("{violation}"),
            }
        }
        assert_eq!(
            pairs, unordered,
            "without {observed:?}: {:#?}",
            checked.violations
        );
        assert_eq!(
            devices, exceeded,
            "without {observed:?}: {:#?}",
            checked.violations
        );
        if pairs.is_empty() && devices.is_empty() {
            do_not += 1;
        } else {
            matter += 1;
        }
    }
    (matter, do_not)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(debug_assertions) { 128 } else { 1024 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_programs_keep_every_promise(program in program()) {
        common::within_on(&program, 20, || {
            let checked = prove(&run(&program));
            assert!(checked.tasks >= program.plans.len());
        });
    }
}

#[test]
fn evidence_that_is_taken_away_is_missed_exactly_if_it_mattered() {
    let config = ProptestConfig {
        cases: if cfg!(debug_assertions) { 128 } else { 1024 },
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let (matter, do_not) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let result = runner.run(&small(), |program| {
        common::within_on(&program, 20, || {
            let file = run(&program);
            prove(&file);
            let (more, others) = mutate(&file);
            matter.fetch_add(more, Ordering::Relaxed);
            do_not.fetch_add(others, Ordering::Relaxed);
        });
        Ok(())
    });
    result.unwrap();
    let (matter, do_not) = (matter.into_inner(), do_not.into_inner());
    assert!(
        matter > 50 && do_not > 50,
        "{matter} that mattered, {do_not} that did not"
    );
}

/// The third task runs ahead of the second and waits for a child, while the work of the second fails: then all
/// tasks have ended, and what the third left on its devices is pending still.
#[test]
fn a_traced_runtime_closes_though_nobody_waits_for_what_is_pending() {
    let plan = |on, after: &[usize], work, twist| Plan {
        on,
        cores: 0,
        share: 0,
        memory: 0,
        after: after.to_vec(),
        work,
        twist,
    };
    let program = Program {
        gpus: 2,
        workers: 0,
        runahead: 64,
        time: Time::Virtual,
        plans: vec![
            plan(Ok(2), &[], (2, 31), Twist::None),
            Plan {
                cores: 1,
                share: WHOLE,
                memory: MEMORY / 4,
                ..plan(Err(1), &[1], (2, 58), Twist::WorkFails)
            },
            plan(Ok(2), &[1], (1, 75), Twist::Awaits),
            Plan {
                share: WHOLE,
                memory: MEMORY / 4,
                ..plan(Ok(1), &[2], (0, 69), Twist::None)
            },
        ],
    };
    common::within(20, || prove(&run(&program)));
}
