//! The checker of traces finds what is wrong with one, and nothing else: real traces are mutated.
#![cfg(not(loom))]

mod common;

use std::sync::Arc;
use std::time::Duration;

use charioteer::gang::{Alternative, Member, WHOLE};
use charioteer::machine::{Description, DeviceId, HOST, Kind, Machine, Observed, Stream, Time};
use charioteer::native::{Runtime, Spawn, Task, current};
use charioteer::trace::{
    self, Checked, DeviceEvent, DeviceRecord, Event, Rule, TraceFile, Violation,
};
use common::{take_trace, trace_path};

const MEMORY: u64 = 1 << 20;

fn on(gpus: &[u16], share: u32, memory: u64) -> Vec<Alternative> {
    let members = gpus.iter().map(|gpu| Member::Device(DeviceId::gpu(*gpu)));
    vec![Alternative {
        members: members.collect(),
        share,
        memory,
    }]
}

/// Keeps every stream of the running task busy for a second of virtual time.
fn busy(machine: &Arc<Machine>) {
    for (device, stream) in current().unwrap().streams() {
        let gpu = machine.as_virtual().unwrap().gpu(device);
        gpu.busy(stream, Duration::from_secs(1)).unwrap();
    }
}

fn spawn(
    spawn: &Spawn,
    machine: &Arc<Machine>,
    name: &str,
    set: Vec<Alternative>,
    after: &[&Task<()>],
) -> Task<()> {
    let machine = Arc::clone(machine);
    let task = spawn
        .task()
        .name(name)
        .on(set)
        .after_all(after.iter().copied());
    task.spawn(move || busy(&machine)).unwrap()
}

/// The trace of one thread in virtual time: all bodies return before anything is complete.
///
/// | task | on | after | its streams |
/// |---|---|---|---|
/// | a | gpu(0) | | 0 of gpu(0) |
/// | b | gpu(1) | | 0 of gpu(1) |
/// | pair | both | a, b | theirs, each waits for the other |
/// | stranger | gpu(0) | | 1 of gpu(0), waits for pair's share |
/// | heir | gpu(1) | a, pair | 0 of gpu(1), behind a by pair already |
/// | host | cores | heir | |
/// | outer, inner | gpu(0), gpu(0) | | outer waits for inner |
/// | left, right | gpu(1), half each | | |
fn program() -> TraceFile {
    let description = Description::uniform(4, 2, MEMORY, Time::Virtual).unwrap();
    let machine = Machine::virtual_machine(description);
    let path = trace_path();
    let runtime = Runtime::builder()
        .workers(0)
        .machine(Arc::clone(&machine))
        .trace(&path)
        .open()
        .unwrap();
    let handle = runtime.handle();
    let plain = |name: &str, set: Vec<Alternative>, after: &[&Task<()>]| {
        spawn(&handle, &machine, name, set, after)
    };
    let a = plain("a", on(&[0], WHOLE, 0), &[]);
    let b = plain("b", on(&[1], WHOLE, 0), &[]);
    let pair = plain("pair", on(&[0, 1], WHOLE, 0), &[&a, &b]);
    plain("stranger", on(&[0], WHOLE, 0), &[]);
    let heir = plain("heir", on(&[1], WHOLE, 0), &[&a, &pair]);
    let host = runtime.task().name("host").after(&heir);
    host.spawn(|| ()).unwrap().result().unwrap();
    let outer = {
        let (machine, handle) = (Arc::clone(&machine), runtime.handle());
        let task = runtime.task().name("outer").on(on(&[0], WHOLE, MEMORY / 2));
        task.spawn(move || {
            busy(&machine);
            let inner = on(&[0], WHOLE, MEMORY / 2);
            let inner = spawn(&handle, &machine, "inner", inner, &[]);
            inner.result().unwrap();
            busy(&machine);
        })
    };
    outer.unwrap().result().unwrap();
    plain("left", on(&[1], WHOLE / 2, 0), &[]);
    plain("right", on(&[1], WHOLE / 2, 0), &[]);
    runtime.close().unwrap();
    take_trace(&path)
}

fn check(file: &TraceFile) -> Checked {
    trace::check(file).unwrap()
}

fn id(file: &TraceFile, name: &str) -> u64 {
    let found = file.names.iter().find(|(_, other)| *other == name);
    *found.unwrap_or_else(|| panic!("no task {name}")).0
}

/// The one place of an event of a task.
fn find(file: &TraceFile, task: &str, what: impl Fn(&DeviceEvent) -> bool) -> usize {
    let task = id(file, task);
    let is_it = |record: &DeviceRecord| record.task == task && what(&record.event);
    file.devices.iter().position(is_it).expect("it is there")
}

fn stream_of(file: &TraceFile, task: &str, gpu: u16) -> Stream {
    let task = id(file, task);
    let lent = file.devices.iter().find_map(|record| match record.event {
        DeviceEvent::Lent(stream) if record.task == task && stream.device == DeviceId::gpu(gpu) => {
            Some(stream)
        }
        _ => None,
    });
    lent.expect("it was lent one")
}

/// What waits of a stream are there, between two events of a task on it.
fn waits(file: &TraceFile, task: &str, gpu: u16) -> Vec<usize> {
    let wanted = stream_of(file, task, gpu);
    let lent = find(file, task, |event| matches!(event, DeviceEvent::Lent(_)));
    let begun = find(file, task, |event| *event == DeviceEvent::Begun);
    (lent..begun)
        .filter(|at| {
            let event = file.devices[*at].event;
            matches!(event, DeviceEvent::Observed(Observed::Waits { stream, .. }) if stream == wanted)
        })
        .collect()
}

/// That a mutation breaks a rule, by what these two tasks do.
#[track_caller]
fn finds(file: &TraceFile, rule: Rule, task: &str, other: Option<&str>, words: &str) -> Violation {
    let checked = check(file);
    let found = checked.violations.iter().find(|violation| {
        violation.rule == rule
            && violation.task == id(file, task)
            && violation.other == other.map(|other| id(file, other))
            && violation.text.contains(words)
    });
    let found = found.unwrap_or_else(|| panic!("{:#?}", checked.violations));
    assert!(found.text.contains(task), "{found}");
    found.clone()
}

#[track_caller]
fn finds_nothing(file: &TraceFile) {
    let checked = check(file);
    assert!(checked.violations.is_empty(), "{:#?}", checked.violations);
}

#[test]
fn a_real_trace_keeps_every_promise() {
    let file = program();
    let checked = check(&file);
    finds_nothing(&file);
    assert_eq!(checked.tasks, 10);
    assert_eq!(checked.grants, 9);
    assert_eq!(checked.pairs, 5);
}

#[test]
fn a_trace_without_evidence_is_refused() {
    let file = TraceFile {
        version: 1,
        ..program()
    };
    let refused = trace::check(&file).unwrap_err().to_string();
    assert!(refused.contains("version 1"), "{refused}");
}

#[test]
fn a_wait_that_nothing_else_covers_is_missed() {
    let whole = program();
    for (gpu, missing) in [(0, "b"), (1, "a")] {
        let mut file = whole.clone();
        let [at] = waits(&file, "pair", gpu)[..] else {
            panic!("one wait for the other's stream");
        };
        file.devices.remove(at);
        let found = finds(&file, Rule::Order, "pair", Some(missing), "no wait");
        let stream = format!("stream 0 of gpu({gpu})");
        assert!(found.text.contains(&stream), "{found}");
    }
    let mut file = whole.clone();
    let [at] = waits(&file, "stranger", 0)[..] else {
        panic!("one wait for the share");
    };
    file.devices.remove(at);
    finds(
        &file,
        Rule::Capacity,
        "stranger",
        Some("pair"),
        "65536/65536 of the compute of gpu(0)",
    );
}

#[test]
fn a_wait_that_something_else_covers_is_not_missed() {
    let whole = program();
    // For a, which pair waited for, whose stream the heir has.
    let for_a = |at: &usize| match whole.devices[*at].event {
        DeviceEvent::Observed(Observed::Waits { event, .. }) => event.position == 1,
        _ => false,
    };
    let covered: Vec<usize> = waits(&whole, "heir", 1).into_iter().filter(for_a).collect();
    assert!(!covered.is_empty(), "the heir waits for a, too");
    for at in covered {
        let mut file = whole.clone();
        file.devices.remove(at);
        finds_nothing(&file);
    }
}

#[test]
fn a_wait_for_too_little_is_found() {
    let mut file = program();
    let [at] = waits(&file, "stranger", 0)[..] else {
        panic!("one wait for the share");
    };
    let DeviceEvent::Observed(Observed::Waits { event, .. }) = &mut file.devices[at].event else {
        panic!("it is a wait");
    };
    event.position -= 1;
    finds(&file, Rule::Capacity, "stranger", Some("pair"), "compute");
}

#[test]
fn what_the_host_did_not_see_is_missed() {
    let mut file = program();
    let stream = stream_of(&file, "heir", 1);
    let start = id(&file, "host");
    let start = file
        .records
        .iter()
        .find(|record| record.task == start && record.event == Event::Start)
        .unwrap()
        .time;
    let seen = |record: &DeviceRecord| match record.event {
        DeviceEvent::Observed(Observed::Seen(event) | Observed::Synchronised(event)) => {
            event.stream == stream && record.time < start
        }
        _ => false,
    };
    assert!(file.devices.iter().any(seen));
    file.devices.retain(|record| !seen(record));
    finds(&file, Rule::Order, "host", Some("heir"), "on the host");
}

#[test]
fn a_part_that_is_not_given_back_once_is_found() {
    let whole = program();
    let returned = |event: &DeviceEvent| matches!(event, DeviceEvent::Returned { .. });
    let at = find(&whole, "stranger", returned);
    let mut file = whole.clone();
    file.devices.remove(at);
    finds(
        &file,
        Rule::Capacity,
        "stranger",
        None,
        "never gives gpu(0) back",
    );
    finds(
        &file,
        Rule::Capacity,
        "outer",
        Some("stranger"),
        "has not given its part back",
    );

    let mut file = whole.clone();
    let record = file.devices[at];
    file.devices.insert(at, record);
    finds(&file, Rule::Set, "stranger", None, "without a grant");
    let at = find(&whole, "pair", returned);
    let mut file = whole.clone();
    let record = file.devices[at];
    file.devices.insert(at, record);
    finds(&file, Rule::Capacity, "pair", None, "back twice");

    // A share that is kept through a wait is missing for whoever took it over.
    let at = find(&whole, "outer", |event| {
        matches!(event, DeviceEvent::Paused { .. })
    });
    let mut file = whole;
    file.devices.remove(at);
    finds(&file, Rule::Capacity, "inner", Some("outer"), "compute");
    finds(&file, Rule::Capacity, "outer", None, "that it has");
}

#[test]
fn a_set_that_is_split_is_found() {
    let whole = program();
    let granted = |event: &DeviceEvent| matches!(event, DeviceEvent::Granted { member: 1, .. });
    let at = find(&whole, "pair", granted);
    let mut file = whole.clone();
    file.devices[at].time += 1;
    finds(&file, Rule::Set, "pair", None, "granted gpu(1) apart");
    let mut file = whole.clone();
    file.devices.remove(at);
    finds(&file, Rule::Set, "pair", None, "1 of the 2 devices");
    let mut file = whole.clone();
    let DeviceEvent::Granted { device, .. } = &mut file.devices[at].event else {
        panic!("it is a grant");
    };
    *device = DeviceId::gpu(0);
    finds(&file, Rule::Set, "pair", None, "gpu(0) twice");
    let returned = |event: &DeviceEvent| matches!(event, DeviceEvent::Returned { member: 1, .. });
    let at = find(&whole, "pair", returned);
    let mut file = whole;
    file.devices[at].time += 1;
    finds(&file, Rule::Set, "pair", None, "back apart");
}

#[test]
fn a_stream_that_is_lent_twice_is_found() {
    let mut file = program();
    let stream = stream_of(&file, "outer", 0);
    let at = find(&file, "inner", |event| {
        matches!(event, DeviceEvent::Lent(_))
    });
    assert_ne!(file.devices[at].event, DeviceEvent::Lent(stream));
    file.devices[at].event = DeviceEvent::Lent(stream);
    finds(&file, Rule::Lending, "inner", Some("outer"), "while outer");
}

#[test]
fn more_than_a_device_has_is_found() {
    let whole = program();
    for (task, other, is_compute) in [("right", "left", true), ("inner", "outer", false)] {
        let at = find(&whole, task, |event| {
            matches!(event, DeviceEvent::Granted { .. })
        });
        let mut file = whole.clone();
        let DeviceEvent::Granted { share, memory, .. } = &mut file.devices[at].event else {
            panic!("it is a grant");
        };
        if is_compute {
            *share += 1;
        } else {
            *memory += 1;
        }
        let words = if is_compute { "compute" } else { "memory" };
        finds(&file, Rule::Capacity, task, Some(other), words);
    }
    let mut file = whole;
    for record in &mut file.devices {
        if let DeviceEvent::Capacity { memory, .. } = &mut record.event {
            *memory = MEMORY / 4;
        }
    }
    finds(&file, Rule::Capacity, "outer", None, "more than there is");
}

#[test]
fn a_task_that_does_not_end_once_is_found() {
    let whole = program();
    for name in ["a", "host", "pair"] {
        let task = id(&whole, name);
        let done = |record: &trace::Record| record.task == task && record.event == Event::Done;
        let at = whole.records.iter().position(done).unwrap();
        let mut file = whole.clone();
        file.records.remove(at);
        finds(&file, Rule::End, name, None, "has no end");
        let mut file = whole.clone();
        let record = file.records[at];
        file.records.insert(at, record);
        finds(&file, Rule::End, name, None, "ended twice");
        let start = |record: &trace::Record| record.task == task && record.event == Event::Start;
        let start = whole.records.iter().position(start).unwrap();
        let mut file = whole.clone();
        file.records.remove(start);
        finds(&file, Rule::End, name, None, "end while it is Ready");
    }
}

#[test]
fn a_body_that_begins_before_another_has_returned_is_found() {
    let whole = program();
    let (a, pair) = (id(&whole, "a"), id(&whole, "pair"));
    let mut file = whole.clone();
    let begun = find(&file, "pair", |event| *event == DeviceEvent::Begun);
    let late = file.devices[begun].time + 1;
    for record in &mut file.records {
        if record.task == a && matches!(record.event, Event::End | Event::Done) {
            record.time = record.time.max(late);
        }
    }
    file.records.sort_by_key(|record| record.time);
    let found = finds(&file, Rule::Order, "pair", Some("a"), "has ended");
    assert_eq!((found.task, found.other), (pair, Some(a)));
}

#[test]
fn records_that_prove_nothing_are_not_missed() {
    let mut file = program();
    file.devices.retain(|record| {
        !matches!(
            record.event,
            DeviceEvent::Observed(
                Observed::Recorded(_) | Observed::Created(_) | Observed::Completed(_)
            )
        )
    });
    finds_nothing(&file);
    // What a task that enqueues nothing was not told to wait for is no matter, but for its share.
    let mut file = program();
    let pair = id(&file, "pair");
    file.devices.retain(|record| {
        let by_pair = record.task == pair;
        !(by_pair && matches!(record.event, DeviceEvent::Observed(Observed::Enqueued(..))))
    });
    let at = waits(&file, "pair", 0)[0];
    file.devices.remove(at);
    finds_nothing(&file);
}

/// The trace of two workers. `outer` has both cores and gpu(0), and waits for `inner`, which has both
/// cores and gpu(1), and depends on `before`, on gpu(1).
fn program_with_cores() -> TraceFile {
    let description = Description::uniform(2, 2, MEMORY, Time::Real).unwrap();
    let machine = Machine::virtual_machine(description);
    let path = trace_path();
    let runtime = Runtime::builder()
        .workers(2)
        .machine(Arc::clone(&machine))
        .trace(&path)
        .open()
        .unwrap();
    let with_cores = |gpu| {
        let core = Member::Any(Kind::Cpu);
        vec![Alternative {
            members: [core, Member::Device(DeviceId::gpu(gpu)), core].into(),
            share: WHOLE,
            memory: 0,
        }]
    };
    let work = |machine: &Arc<Machine>| {
        let machine = Arc::clone(machine);
        move || {
            for (device, stream) in current().unwrap().streams() {
                let gpu = machine.as_virtual().unwrap().gpu(device);
                gpu.busy(stream, Duration::from_micros(100)).unwrap();
            }
        }
    };
    let (handle, inner) = (runtime.handle(), work(&machine));
    let before = runtime.task().name("before").on(on(&[1], WHOLE, 0));
    let before = before.spawn(work(&machine)).unwrap();
    let task = runtime.task().name("outer").on(with_cores(0));
    let outer = task.spawn(move || {
        let task = handle.task().name("inner").on(with_cores(1)).after(&before);
        task.spawn(inner).unwrap().result().unwrap();
    });
    outer.unwrap().result().unwrap();
    runtime.close().unwrap();
    take_trace(&path)
}

#[test]
fn a_set_that_lacks_a_core_is_found() {
    let whole = program_with_cores();
    finds_nothing(&whole);
    let is_core =
        |event: &DeviceEvent| matches!(event, DeviceEvent::Lent(core) if core.device == HOST);
    let mut file = whole.clone();
    let at = find(&file, "inner", is_core);
    file.devices.remove(at);
    finds(
        &file,
        Rule::Set,
        "inner",
        None,
        "begins with 1 of the 2 cores",
    );
    // The one that it had again after its wait.
    let mut file = whole.clone();
    let outer = id(&file, "outer");
    let at = file
        .devices
        .iter()
        .rposition(|record| record.task == outer && is_core(&record.event));
    file.devices.remove(at.unwrap());
    finds(
        &file,
        Rule::Set,
        "outer",
        None,
        "ends with 1 of the 2 cores",
    );
    let mut file = whole.clone();
    let granted = |event: &DeviceEvent| matches!(event, DeviceEvent::Granted { member: 2, .. });
    let at = find(&file, "inner", granted);
    file.devices[at].time += 1;
    finds(&file, Rule::Set, "inner", None, "a core apart");
    let mut file = whole;
    let at = find(&file, "inner", granted);
    file.devices.remove(at);
    finds(&file, Rule::Set, "inner", None, "2 of the 3 devices");
}

#[test]
fn a_core_that_two_have_or_nobody_has_is_found() {
    let whole = program_with_cores();
    let mut file = whole.clone();
    let at = find(&file, "outer", |event| *event == DeviceEvent::Left);
    file.devices.remove(at);
    finds(&file, Rule::Lending, "inner", Some("outer"), "while outer");
    let mut file = whole;
    let at = find(
        &file,
        "inner",
        |event| matches!(event, DeviceEvent::Lent(core) if core.device == HOST),
    );
    let DeviceEvent::Lent(core) = &mut file.devices[at].event else {
        panic!("it is lent");
    };
    core.number = 2;
    finds(
        &file,
        Rule::Capacity,
        "inner",
        None,
        "core 2, which there is not",
    );
}

#[test]
fn a_body_with_cores_that_begins_before_the_host_saw_the_work_before_it_is_found() {
    let mut file = program_with_cores();
    file.devices
        .retain(|record| !matches!(record.event, DeviceEvent::Observed(Observed::Seen(_))));
    finds(
        &file,
        Rule::Order,
        "inner",
        Some("before"),
        "begins on the host before",
    );
}
