//! Random programs against an independent checker.
//!
//! The checker knows what was asked for, and sees grants, waits and events. From those alone it
//! works out which use of a device comes before which: a stream is in order, a wait orders what
//! follows behind the event and all that the event was behind, and what is complete lies before
//! whatever is granted later. Uses of which neither comes before the other may happen at the same
//! moment.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::machine::{DeviceId, Event, Kind, Stream};
use crate::schedule::gang::{
    Alternative, Capacity, Coming, Gang, Grant, GrantId, Limits, Member, Request, Step, Transfer,
    WHOLE, check,
};

const MEMORY: u64 = 8;

#[derive(Clone, Debug)]
enum Action {
    Submit {
        request: usize,
        priority: i32,
        follows: bool,
        /// All was given that could be, and nobody else asks before somebody looks for what is next.
        last: bool,
        /// Run times in milliseconds, where they are known.
        times: [Option<u64>; 3],
    },
    Next,
    Launch(usize),
    Pause(usize),
    Resume(usize),
    Complete(usize),
    Cancel(usize),
    Lose(u16),
}

#[derive(Clone, Debug)]
struct Program {
    devices: u16,
    fails_whole: bool,
    limits: Limits,
    requests: Vec<Vec<Alternative>>,
    actions: Vec<Action>,
}

fn alternative(devices: u16) -> impl Strategy<Value = Alternative> {
    let named = Just((0..devices).collect::<Vec<_>>())
        .prop_shuffle()
        .prop_map(|order| order.into_iter().map(DeviceId::gpu).map(Member::Device));
    let members = (named, 0..=devices.min(2), 0..=devices).prop_map(move |(order, named, any)| {
        let any = any.min(devices - named).max(u16::from(named == 0));
        let mut members: Vec<_> = order.take(named.into()).collect();
        members.extend((0..any).map(|_| Member::Any(Kind::Gpu)));
        members.into_boxed_slice()
    });
    let share = prop_oneof![
        4 => Just(WHOLE), 2 => Just(WHOLE / 2), 1 => Just(WHOLE / 3), 1 => Just(0),
    ];
    let memory = prop_oneof![4 => Just(0), 2 => Just(2), 1 => Just(3), 1 => Just(MEMORY)];
    (members, share, memory).prop_map(|(members, share, memory)| Alternative {
        members,
        share,
        memory,
    })
}

/// Where bodies `wait` much more of the memory is kept.
fn action(wait: bool) -> impl Strategy<Value = Action> {
    let which = any::<usize>;
    let (pauses, resumes) = if wait { (8, 1) } else { (2, 2) };
    prop_oneof![
        8 => (which(), prop_oneof![4 => Just(0), 1 => -1..=1], any::<[bool; 2]>(), times())
            .prop_map(|(request, priority, [follows, last], times)| {
                Action::Submit { request, priority, follows, last, times }
            }),
        8 => Just(Action::Next),
        6 => which().prop_map(Action::Launch),
        pauses => which().prop_map(Action::Pause),
        resumes => which().prop_map(Action::Resume),
        5 => which().prop_map(Action::Complete),
        1 => which().prop_map(Action::Cancel),
    ]
}

/// Half of them know no times, the others some or all.
fn times() -> impl Strategy<Value = [Option<u64>; 3]> {
    let some = prop_oneof![3 => (0..100_u64).prop_map(Some), 1 => Just(None)];
    prop_oneof![Just([None; 3]), [some.clone(), some.clone(), some]]
}

fn program() -> impl Strategy<Value = Program> {
    let devices = prop_oneof![1..=3_u16, 1..=16_u16];
    (devices, any::<bool>()).prop_flat_map(|(devices, wait)| {
        let overtaking = prop_oneof![0..4_u64, 0..40_u64];
        let limits = (overtaking, 0..5_u32).prop_map(|(overtaking, runahead)| Limits {
            overtaking,
            runahead,
        });
        let request = prop::collection::vec(alternative(devices), 1..3);
        let actions = prop::collection::vec(
            prop_oneof![
                120 => action(wait),
                1 => (0..devices).prop_map(Action::Lose),
            ],
            1..300,
        );
        (
            Just(devices),
            any::<bool>(),
            limits,
            prop::collection::vec(request, 1..5),
            actions,
        )
            .prop_map(
                |(devices, fails_whole, limits, requests, actions)| Program {
                    devices,
                    fails_whole,
                    limits,
                    requests,
                    actions,
                },
            )
    })
}

/// For each stream the position up to which something is ordered behind it.
type Clock = HashMap<Stream, u64>;

fn merge(clock: &mut Clock, other: &Clock) {
    for (&stream, &position) in other {
        let known = clock.entry(stream).or_default();
        *known = position.max(*known);
    }
}

/// Something of a device that a task had from one point of a stream to another.
struct Use {
    share: u32,
    memory: u64,
    behind: Clock,
    end: Option<Event>,
}

impl Use {
    fn is_before(&self, other: &Self) -> bool {
        self.end
            .is_some_and(|end| other.behind.get(&end.stream).copied().unwrap_or(0) >= end.position)
    }

    fn excludes(&self, other: &Self) -> bool {
        self.is_before(other) || other.is_before(self)
    }
}

/// The most that uses may have at one moment, of those that may happen together with all of `with`.
fn most(uses: &[&Use], weight: &dyn Fn(&Use) -> u64) -> u64 {
    let Some((first, rest)) = uses.split_first() else {
        return 0;
    };
    let beside: Vec<&Use> = rest
        .iter()
        .copied()
        .filter(|other| !first.excludes(other))
        .collect();
    let with = weight(first) + most(&beside, weight);
    if beside.len() == rest.len() {
        return with;
    }
    with.max(most(rest, weight))
}

struct Body {
    request: usize,
    alternative: usize,
    paused: bool,
    returning: bool,
    /// For each device its stream, and the indices of the uses of compute and memory.
    parts: Vec<(DeviceId, Stream, usize, usize)>,
}

struct Checker {
    program: Program,
    capacities: Vec<Capacity>,
    lost: BTreeSet<DeviceId>,
    gang: Gang<usize>,
    requests: Vec<std::sync::Arc<[Alternative]>>,
    /// Waiting tasks by age: request, priority, by how much they were overtaken.
    waiting: BTreeMap<usize, (usize, i32, u64)>,
    cancelled: BTreeSet<usize>,
    submitted: usize,
    bodies: BTreeMap<u32, (GrantId, Body)>,
    uses: HashMap<DeviceId, Vec<Use>>,
    streams: BTreeMap<Stream, u64>,
    clocks: HashMap<Stream, Clock>,
    at: HashMap<Event, Clock>,
    done: Clock,
    /// Events of launched tasks that are not complete, and whether those have a share.
    launched: Vec<(Event, bool)>,
    recent: Vec<Event>,
    grants: u32,
    /// How many tasks started without queuing.
    alone: u32,
}

impl Checker {
    fn new(program: Program) -> Self {
        let capacities: Vec<_> = (0..program.devices)
            .map(|index| Capacity {
                id: DeviceId::gpu(index),
                memory: MEMORY,
                fails_whole: program.fails_whole,
            })
            .collect();
        Self {
            gang: Gang::new(&capacities, program.limits),
            requests: program
                .requests
                .iter()
                .map(|sets| sets.as_slice().into())
                .collect(),
            capacities,
            lost: BTreeSet::new(),
            waiting: BTreeMap::new(),
            cancelled: BTreeSet::new(),
            submitted: 0,
            bodies: BTreeMap::new(),
            uses: HashMap::new(),
            streams: BTreeMap::new(),
            clocks: HashMap::new(),
            at: HashMap::new(),
            done: Clock::new(),
            launched: Vec::new(),
            recent: Vec::new(),
            grants: 0,
            alone: 0,
            program,
        }
    }

    fn left(&self) -> Vec<Capacity> {
        let left = |device: &&Capacity| !self.lost.contains(&device.id);
        self.capacities.iter().filter(left).cloned().collect()
    }

    /// The devices that a request may use.
    fn footprint(&self, request: usize) -> BTreeSet<DeviceId> {
        let left = self.left();
        let mut footprint = BTreeSet::new();
        for set in &self.program.requests[request] {
            if check(&left, std::slice::from_ref(set)).is_err() {
                continue;
            }
            for member in &set.members {
                match *member {
                    Member::Device(id) => {
                        footprint.insert(id);
                    }
                    Member::Any(_) => footprint.extend(left.iter().map(|device| device.id)),
                }
            }
        }
        footprint
    }

    fn is_done(&self, event: Event) -> bool {
        self.done.get(&event.stream).copied().unwrap_or(0) >= event.position
    }

    /// Whether a request needs memory that paused bodies keep.
    fn is_stuck(&self, request: usize) -> bool {
        let mut left = self.left();
        for (_, body) in self.bodies.values().filter(|(_, body)| body.paused) {
            for device in &mut left {
                if body.parts.iter().any(|part| part.0 == device.id) {
                    device.memory -= self.set(body).memory;
                }
            }
        }
        check(&left, &self.requests[request]).is_err()
    }

    fn act(&mut self, action: &Action) {
        match *action {
            Action::Submit {
                request,
                priority,
                follows,
                last,
                times,
            } => {
                while last && self.next() {}
                let request = request % self.requests.len();
                let prefer = self.recent.iter().rev().take(usize::from(follows) * 2);
                let asked = Request {
                    alternatives: self.requests[request].clone(),
                    estimates: (times.iter())
                        .map(|time| time.map(Duration::from_millis))
                        .collect(),
                    priority,
                    prefer: prefer.copied().collect(),
                    // Of some the data are here or there.
                    transfers: (0..self.left().len() as u64 * u64::from(follows))
                        .map(|index| Transfer {
                            whole: Coming {
                                time: (index * 7 + request as u64) % 3 * 1_000_000,
                                from_host: index % 3 * 500_000,
                                links: (index * 7 + request as u64) % 3 * 1_500_000,
                            },
                            split: Coming {
                                time: index % 2 * 1_000_000,
                                from_host: 0,
                                links: index % 2 * 1_000_000,
                            },
                        })
                        .collect(),
                };
                let can = check(&self.left(), &self.requests[request]).is_ok();
                let task = self.submitted;
                self.submitted += 1;
                if can {
                    self.waiting.insert(task, (request, priority, 0));
                }
                if last {
                    return self.submit_last(task, asked, can);
                }
                assert_eq!(
                    self.gang.submit(task, asked),
                    if can { Ok(()) } else { Err(task) }
                );
            }
            Action::Next => {
                self.next();
            }
            Action::Launch(index) => {
                if let Some(id) = self.pick(index, |body| !body.paused) {
                    self.launch(id);
                }
            }
            Action::Pause(index) => {
                if let Some(id) = self.pick(index, |body| !body.paused) {
                    self.pause(id);
                }
            }
            Action::Resume(index) => {
                if let Some(id) = self.pick(index, |body| body.paused && !body.returning) {
                    let (id, body) = self.bodies.get_mut(&id).unwrap();
                    body.returning = true;
                    self.gang.resumed(*id);
                }
            }
            Action::Complete(index) => self.complete(index),
            Action::Cancel(index) => {
                let waiting = self.waiting.keys().nth(index % self.waiting.len().max(1));
                self.cancelled.extend(waiting);
            }
            Action::Lose(index) => self.lose(DeviceId::gpu(index)),
        }
    }

    fn pick(&self, index: usize, which: impl Fn(&Body) -> bool) -> Option<u32> {
        let bodies = self.bodies.iter().filter(|(_, (_, body))| which(body));
        let ids: Vec<u32> = bodies.map(|(&id, _)| id).collect();
        (!ids.is_empty()).then(|| ids[index % ids.len()])
    }

    /// One that need not queue gets what it would get if it did.
    fn submit_last(&mut self, task: usize, asked: Request, can: bool) {
        let mut queued = self.gang.clone();
        assert_eq!(queued.submit(task, asked.clone()).is_ok(), can);
        match self.gang.submit_last(task, asked) {
            Err(refused) => assert_eq!((refused, can), (task, false)),
            Ok(None) => assert!(can),
            Ok(Some(step)) => {
                let next = queued.next(|_| true);
                assert_eq!(format!("{next:?}"), format!("{:?}", Some(&step)));
                let Step::Start(task, grant) = step else {
                    panic!("who asks starts")
                };
                self.alone += 1;
                self.start(task, &grant);
            }
        }
    }

    /// Whether anything is to be done.
    fn next(&mut self) -> bool {
        let cancelled = &self.cancelled;
        let step = self.gang.next(|task| !cancelled.contains(task));
        assert_eq!(
            self.gang.waiting(),
            self.waiting.len() - usize::from(!matches!(step, None | Some(Step::Resume(_)))),
            "every task that waits is counted"
        );
        match step {
            None => {
                let mut bodies = self.bodies.values();
                if self.at.keys().all(|&event| self.is_done(event))
                    && bodies.all(|(_, body)| body.paused && !body.returning)
                {
                    let stuck = |&(request, _, _): &_| self.is_stuck(request);
                    assert!(
                        self.waiting.values().all(stuck),
                        "an idle machine takes what it can"
                    );
                }
                return false;
            }
            Some(Step::Unwanted(task)) => {
                assert!(self.cancelled.contains(&task));
                assert!(self.waiting.remove(&task).is_some(), "it ends once");
            }
            Some(Step::Start(task, grant)) => self.start(task, &grant),
            Some(Step::Resume(grant)) => self.resume(&grant),
        }
        true
    }

    fn start(&mut self, task: usize, grant: &Grant) {
        assert!(
            !self.cancelled.contains(&task),
            "a cancelled task does not start"
        );
        let (request, priority, _) = self.waiting.remove(&task).expect("it starts once");
        let set = self.program.requests[request][grant.alternative].clone();
        // All of the set, as it was asked for.
        assert_eq!(grant.lent.len(), set.members.len(), "invariant 4");
        let devices: BTreeSet<_> = grant.lent.iter().map(|lent| lent.device).collect();
        assert_eq!(
            devices.len(),
            set.members.len(),
            "a device is in a set once"
        );
        assert!(
            devices.is_disjoint(&self.lost),
            "a device that is lost is not granted"
        );
        for (lent, member) in grant.lent.iter().zip(&set.members) {
            if let Member::Device(id) = *member {
                assert_eq!(lent.device, id);
            }
        }
        if set.share > 0 || set.memory > 0 {
            let footprints: Vec<_> = (0..self.requests.len())
                .map(|request| self.footprint(request))
                .collect();
            let stuck: Vec<_> = (0..self.requests.len())
                .map(|request| self.is_stuck(request))
                .collect();
            for (&other, (request, its, overtaken)) in &mut self.waiting {
                if !stuck[*request] && (-*its, other) < (-priority, task) {
                    *overtaken += devices.intersection(&footprints[*request]).count() as u64;
                    assert!(
                        *overtaken <= self.program.limits.overtaking,
                        "the bound holds"
                    );
                }
            }
        }
        let mut parts = Vec::new();
        for lent in &grant.lent {
            let ahead = self.unfinished(lent.device, set.share > 0);
            if ahead >= self.program.limits.runahead as usize {
                assert!(lent.waits.is_empty(), "nothing runs ahead beyond the bound");
            }
            if set.share == 0 && set.memory == 0 {
                assert!(
                    lent.waits.is_empty(),
                    "what takes nothing waits for nothing"
                );
            }
            let stream = lent.stream.unwrap_or_else(|| self.create(lent.device));
            let lending = self.bodies.values().flat_map(|(_, body)| &body.parts);
            assert!(
                lending.clone().all(|part| part.1 != stream),
                "a stream is lent once"
            );
            let behind = self.wait(stream, &lent.waits);
            let compute = self.take(lent.device, set.share, 0, behind.clone());
            let memory = self.take(lent.device, 0, set.memory, behind);
            parts.push((lent.device, stream, compute, memory));
        }
        let body = Body {
            request,
            alternative: grant.alternative,
            paused: false,
            returning: false,
            parts,
        };
        self.bodies.insert(self.grants, (grant.id, body));
        self.grants += 1;
        self.check_capacity();
    }

    fn unfinished(&self, device: DeviceId, shares: bool) -> usize {
        let launched = self.launched.iter();
        let launched =
            launched.filter(|(event, its)| event.stream.device == device && *its == shares);
        let running = self.bodies.values().filter(|(_, body)| {
            !body.paused
                && (self.set(body).share > 0) == shares
                && body.parts.iter().any(|part| part.0 == device)
        });
        launched.count() + running.count()
    }

    fn set(&self, body: &Body) -> &Alternative {
        &self.program.requests[body.request][body.alternative]
    }

    fn create(&mut self, device: DeviceId) -> Stream {
        let number = self
            .streams
            .keys()
            .filter(|stream| stream.device == device)
            .count();
        let number = u32::try_from(number).unwrap();
        let stream = Stream { device, number };
        self.streams.insert(stream, 0);
        stream
    }

    /// Lets a stream wait; what is enqueued then lies behind what is returned.
    fn wait(&mut self, stream: Stream, waits: &[Event]) -> Clock {
        let mut behind = self.clocks.remove(&stream).unwrap_or_default();
        behind.insert(stream, self.streams[&stream]);
        for event in waits {
            assert_ne!(event.stream, stream, "stream order needs no event");
            behind.insert(
                event.stream,
                event
                    .position
                    .max(behind.get(&event.stream).copied().unwrap_or(0)),
            );
            merge(&mut behind, &self.at[event]);
        }
        self.clocks.insert(stream, behind.clone());
        merge(&mut behind, &self.done);
        behind
    }

    fn take(&mut self, device: DeviceId, share: u32, memory: u64, behind: Clock) -> usize {
        let uses = self.uses.entry(device).or_default();
        uses.push(Use {
            share,
            memory,
            behind,
            end: None,
        });
        uses.len() - 1
    }

    /// Invariant 5: nothing that may happen together exceeds a device.
    fn check_capacity(&self) {
        for (device, uses) in &self.uses {
            if self.lost.contains(device) {
                continue;
            }
            let open = || {
                uses.iter()
                    .filter(|one| !one.end.is_some_and(|end| self.is_done(end)))
            };
            let compute: Vec<&Use> = open().filter(|one| one.share > 0).collect();
            assert!(
                most(&compute, &|one| u64::from(one.share)) <= u64::from(WHOLE),
                "invariant 5"
            );
            let memory: Vec<&Use> = open().filter(|one| one.memory > 0).collect();
            assert!(most(&memory, &|one| one.memory) <= MEMORY, "invariant 5");
        }
    }

    fn record(&mut self, stream: Stream) -> Event {
        let position = self.streams.get_mut(&stream).unwrap();
        *position += 1;
        let event = Event {
            stream,
            position: *position,
        };
        let clock = self.clocks.entry(stream).or_default().clone();
        self.at.insert(event, clock);
        event
    }

    fn events(&mut self, id: u32) -> Vec<Option<Event>> {
        let streams: Vec<_> = self.bodies[&id].1.parts.iter().map(|part| part.1).collect();
        let record =
            |stream: Stream| (!self.lost.contains(&stream.device)).then(|| self.record(stream));
        streams.into_iter().map(record).collect()
    }

    fn launch(&mut self, id: u32) {
        let events = self.events(id);
        let (id, body) = self.bodies.remove(&id).unwrap();
        let shares = self.set(&body).share > 0;
        for (&(device, _, compute, memory), &event) in body.parts.iter().zip(&events) {
            let Some(event) = event else { continue };
            let uses = self.uses.get_mut(&device).unwrap();
            uses[compute].end = Some(event);
            uses[memory].end = Some(event);
            self.launched.push((event, shares));
            self.recent.push(event);
        }
        self.gang.launched(id, &events);
    }

    fn pause(&mut self, id: u32) {
        let events = self.events(id);
        let (id, body) = self.bodies.get_mut(&id).unwrap();
        body.paused = true;
        for (&(device, _, compute, _), &event) in body.parts.iter().zip(&events) {
            if event.is_some() {
                self.uses.get_mut(&device).unwrap()[compute].end = event;
            }
        }
        self.gang.paused(*id, &events);
    }

    fn resume(&mut self, grant: &Grant) {
        let found = self.bodies.iter().find(|(_, (id, _))| *id == grant.id);
        let (&id, (_, body)) = found.expect("a body that returns");
        assert!(body.returning);
        let share = self.set(body).share;
        let streams: Vec<_> = body.parts.iter().map(|part| part.1).collect();
        for (index, (lent, stream)) in grant.lent.iter().zip(streams).enumerate() {
            if self.lost.contains(&lent.device) {
                continue;
            }
            assert_eq!(lent.stream, Some(stream), "it keeps its streams");
            let behind = self.wait(stream, &lent.waits);
            let compute = self.take(lent.device, share, 0, behind);
            self.bodies.get_mut(&id).unwrap().1.parts[index].2 = compute;
        }
        let body = &mut self.bodies.get_mut(&id).unwrap().1;
        (body.paused, body.returning) = (false, false);
        self.check_capacity();
    }

    /// Completes what a stream has, up to one of its events whose dependencies are complete.
    fn complete(&mut self, index: usize) {
        let ready = |event: &Event| {
            self.at[event].iter().all(|(stream, position)| {
                *stream == event.stream || self.done.get(stream).copied().unwrap_or(0) >= *position
            })
        };
        let mut events: Vec<Event> = self
            .at
            .keys()
            .copied()
            .filter(|event| !self.is_done(*event) && ready(event))
            .collect();
        events.sort_unstable_by_key(|event| (event.stream, event.position));
        if events.is_empty() {
            return;
        }
        let event = events[index % events.len()];
        self.done.insert(event.stream, event.position);
        self.launched
            .retain(|(other, _)| other.stream != event.stream || other.position > event.position);
        self.gang.completed(event);
    }

    fn lose(&mut self, device: DeviceId) {
        self.lost.insert(device);
        self.launched
            .retain(|(event, _)| event.stream.device != device);
        // Whatever is on it completes as failed.
        for (&stream, &position) in &self.streams {
            if stream.device == device {
                self.done.insert(stream, position);
            }
        }
        let left = self.left();
        let mut failed = self.gang.fail_device(device);
        failed.sort_unstable();
        let hopeless = |request: usize| check(&left, &self.requests[request]).is_err();
        let expected: Vec<usize> = self
            .waiting
            .iter()
            .filter(|(_, (request, _, _))| hopeless(*request))
            .map(|(&task, _)| task)
            .collect();
        assert_eq!(failed, expected, "those that no device is left for");
        self.waiting.retain(|task, _| !expected.contains(task));
    }

    /// Lets everything end.
    fn end(&mut self) {
        // Each round launches a task or completes an event of one.
        let rounds = 20 * (self.submitted + self.at.len()) + 1;
        for _ in 0..rounds {
            while self.next() {}
            while let Some(id) = self.pick(0, |body| body.paused && !body.returning) {
                self.act(&Action::Resume(0));
                assert!(self.bodies[&id].1.returning);
            }
            if let Some(id) = self.pick(0, |body| !body.paused) {
                self.launch(id);
            } else if self.launched.is_empty() && self.bodies.is_empty() {
                break;
            } else {
                self.complete(0);
            }
        }
        assert!(
            self.waiting.is_empty() && self.bodies.is_empty(),
            "everything ends"
        );
    }
}

#[test]
fn random_programs_keep_the_ledgers_promises() {
    let alone = Cell::new(0);
    let mut runner = TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let run = |program: Program| {
        let mut checker = Checker::new(program.clone());
        for action in &program.actions {
            checker.act(action);
        }
        checker.end();
        alone.set(alone.get() + checker.alone);
        Ok(())
    };
    runner.run(&program(), run).unwrap();
    assert!(alone.get() > 100, "tasks that need not queue: {alone:?}");
}
