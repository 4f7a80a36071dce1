//! Random programs of accesses against a sequential oracle, and against the proof from their traces.
//!
//! A program is a list of tasks with accesses to parts of two arrays, tiles, boxes and strides, in all
//! modes. Bodies read and write elements for real: what one writes is a digest of what it read. The oracle
//! does the same in the order of the list, with an element's value or whose failure left it undefined.
//! Tasks fail, are cancelled while others run, or have children on data of their own; in between the host
//! reads. Then the trace proves the order, and does not when one of its pairs is moved together.
#![cfg(not(loom))]

mod common;

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use charioteer::native::{
    Access, AccessTrouble, Datum, HostError, Mode, Part, Runtime, SpawnError, Task, TaskError,
};
use charioteer::region::{Region, Span};
use charioteer::trace::{self, Event, Rule, TraceFile};
use proptest::prelude::*;

use common::parts::{ELEMENTS, Gridded, SHAPE, Use, exclude_each_other, place};
use common::{check_trace, prove, take_trace, trace_path, within_on};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Twist {
    None,
    Fails,
    Cancelled,
    Spawns,
    /// The host reads, instead of a task.
    Host,
}

#[derive(Clone, Debug)]
struct Plan {
    workers: usize,
    tasks: Vec<(Vec<Use>, Twist)>,
}

fn plan() -> impl Strategy<Value = Plan> {
    // Where tasks commute none fails: whom a failure in a group concerns is told elsewhere.
    (prop::bool::ANY, 1..5_u32, 0..4_usize).prop_flat_map(|(commutes, kinds, workers)| {
        let mode = if commutes {
            prop_oneof![
                1 => Just(Mode::In),
                1 => Just(Mode::Out),
                1 => Just(Mode::InOut),
                2 => Just(Mode::Commute)
            ]
            .boxed()
        } else {
            prop_oneof![2 => Just(Mode::In), 2 => Just(Mode::Out), 1 => Just(Mode::InOut)].boxed()
        };
        let access = (0..2_usize, place(kinds), mode, prop::bool::weighted(0.97)).prop_map(
            |(array, at, mode, ordered)| Use {
                array,
                at,
                mode,
                // What is unordered races: it reads, and nobody looks at what.
                ordered: ordered || mode != Mode::In,
            },
        );
        let weight = u32::from(!commutes);
        let twist = prop_oneof![
            12 => Just(Twist::None),
            weight => Just(Twist::Fails),
            weight => Just(Twist::Cancelled),
            1 => Just(Twist::Spawns),
            1 => Just(Twist::Host),
        ];
        let task = (prop::collection::vec(access, 1..4), twist);
        prop::collection::vec(task, 1..50).prop_map(move |tasks| Plan { workers, tasks })
    })
}

fn elements(region: &Region) -> Vec<usize> {
    let numbers = |span: &Span| {
        let span = *span;
        (0..span.count()).map(move |number| span.start() + number * span.step())
    };
    let [rows, columns] = region.spans() else {
        panic!("two axes")
    };
    numbers(rows)
        .flat_map(|row| numbers(columns).map(move |column| row * SHAPE[1] + column))
        .map(|index| usize::try_from(index).unwrap())
        .collect()
}

fn digest(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// What an element is, as the oracle sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Element {
    Value(u64),
    /// The number of the task whose failure it was.
    Undefined(usize),
}

type Store = Arc<[Vec<AtomicU64>; 2]>;

/// What a task does, and which elements each access has.
fn act(
    number: usize,
    accesses: &[(Mode, usize, Vec<usize>)],
    load: impl Fn(usize, usize) -> u64,
    mut store: impl FnMut(usize, usize, u64),
) {
    let mut read = Vec::new();
    for (mode, array, elements) in accesses {
        if matches!(mode, Mode::In | Mode::InOut) {
            read.extend(elements.iter().map(|&element| load(*array, element)));
        }
    }
    let read = digest(read);
    for (mode, array, elements) in accesses {
        for &element in elements {
            match mode {
                Mode::Out | Mode::InOut => store(*array, element, digest((number, element, read))),
                Mode::Commute => {
                    let sum = load(*array, element).wrapping_add(digest((number, element)));
                    store(*array, element, sum);
                }
                _ => {}
            }
        }
    }
}

fn run(plan: &Plan) -> TraceFile {
    let path = trace_path();
    let runtime = Runtime::builder()
        .workers(plan.workers)
        .trace(&path)
        .open()
        .unwrap();
    let data = ["A", "B"].map(|label| Gridded::new(Datum::new(label, &SHAPE)));
    let cells = || (0..ELEMENTS).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
    let storage: Store = Arc::new([cells(), cells()]);
    // Of each task: what it was spawned with, and whether it was cancelled.
    let mut spawned: Vec<Option<(Task<()>, bool)>> = Vec::new();
    // What the host saw, before which task.
    let mut seen = Vec::new();
    for (number, (uses, twist)) in plan.tasks.iter().enumerate() {
        let parts: Vec<Part> = uses
            .iter()
            .map(|one| data[one.array].part(&one.at))
            .collect();
        if *twist == Twist::Host {
            let part = &parts[0];
            let all = elements(part.region());
            let looked = match runtime.host(&[Access::new(part, Mode::In)]) {
                Ok(access) => {
                    let load =
                        |&element: &usize| storage[uses[0].array][element].load(Ordering::Relaxed);
                    let values: Vec<u64> = all.iter().map(load).collect();
                    access.leave();
                    Some(values)
                }
                Err(HostError::Failed(_)) => None,
                Err(error) => panic!("{error}"),
            };
            seen.push((number, uses[0].array, all, looked));
            spawned.push(None);
            continue;
        }
        let mut task = runtime.task().name(format!("{number}"));
        let mut accesses = Vec::new();
        for (one, part) in uses.iter().zip(&parts) {
            let ordered = one.ordered;
            task = task.accesses(Access {
                ordered,
                ..Access::new(part, one.mode)
            });
            if ordered {
                accesses.push((one.mode, one.array, elements(part.region())));
            }
        }
        let listed = accesses.iter();
        let excluded = exclude_each_other(listed.map(|(mode, array, at)| (*mode, *array, &at[..])));
        let (twist, spawn, store) = (*twist, runtime.handle(), Arc::clone(&storage));
        let body = move || {
            if twist == Twist::Spawns {
                // Children on data of its own, which nobody else knows.
                let own = Datum::token("own").whole();
                for _ in 0..3 {
                    spawn.task().updates(&own).spawn_detached(|| ()).unwrap();
                }
                let child = spawn.task().reads(&own).spawn(|| ()).unwrap();
                child.result().unwrap();
            }
            let load = |array: usize, element: usize| store[array][element].load(Ordering::Relaxed);
            let write = |array: usize, element: usize, value: u64| {
                store[array][element].store(value, Ordering::Relaxed);
            };
            act(number, &accesses, load, write);
            if twist == Twist::Fails {
                return Err(std::io::Error::other("planned"));
            }
            Ok(())
        };
        let mut body = Some(body);
        let task = task.try_spawn(0, move || (body.take().expect("it runs once"))());
        match task {
            Ok(task) => {
                assert!(!excluded, "task {number} was to be refused");
                let cancelled = twist == Twist::Cancelled && task.cancel();
                spawned.push(Some((task, cancelled)));
            }
            Err(SpawnError::Access(AccessTrouble::SelfConflict { .. })) => {
                assert!(excluded, "task {number} was refused");
                spawned.push(None);
            }
            Err(error) => panic!("{error}"),
        }
    }
    // The oracle.
    let mut oracle = [[Element::Value(0); ELEMENTS]; 2];
    let mut seen = seen.into_iter().peekable();
    for (number, (uses, twist)) in plan.tasks.iter().enumerate() {
        if let Some((_, array, all, looked)) = seen.next_if(|(at, ..)| *at == number) {
            let values: Vec<Element> = all.iter().map(|&element| oracle[array][element]).collect();
            let defined = values
                .iter()
                .all(|value| matches!(value, Element::Value(_)));
            assert_eq!(looked.is_some(), defined, "the host, before task {number}");
            if let Some(looked) = looked {
                let looked: Vec<Element> = looked.into_iter().map(Element::Value).collect();
                assert_eq!(looked, values, "the host, before task {number}");
            }
            continue;
        }
        let Some((task, cancelled)) = &spawned[number] else {
            continue;
        };
        let accesses: Vec<(Mode, usize, Vec<usize>)> = uses
            .iter()
            .filter(|one| one.ordered)
            .map(|one| {
                let part = data[one.array].part(&one.at);
                (one.mode, one.array, elements(part.region()))
            })
            .collect();
        let reads = accesses.iter().filter(|(mode, ..)| *mode != Mode::Out);
        let roots: BTreeSet<usize> = reads
            .flat_map(|(_, array, elements)| elements.iter().map(|&at| oracle[*array][at]))
            .filter_map(|element| match element {
                Element::Undefined(root) => Some(root),
                Element::Value(_) => None,
            })
            .collect();
        let root = match task.result() {
            Ok(()) => None,
            Err(TaskError::Cancelled) => {
                assert!(*cancelled, "task {number} was cancelled by nobody");
                Some(number)
            }
            Err(TaskError::Failed(_)) => {
                assert!(*twist == Twist::Fails && roots.is_empty());
                Some(number)
            }
            Err(TaskError::Dependency(name, _)) => {
                let root = name.parse().unwrap();
                assert!(
                    roots.contains(&root),
                    "task {number} failed for {root}, not one of {roots:?}"
                );
                Some(root)
            }
            Err(error) => panic!("{error}"),
        };
        if !cancelled {
            let fails = *twist == Twist::Fails || !roots.is_empty();
            assert_eq!(root.is_some(), fails, "task {number}");
        }
        if let Some(root) = root {
            for (mode, array, elements) in &accesses {
                for &element in elements.iter().filter(|_| mode.writes()) {
                    oracle[*array][element] = Element::Undefined(root);
                }
            }
        } else {
            let before = oracle;
            let load = |array: usize, element: usize| match before[array][element] {
                Element::Value(value) => value,
                Element::Undefined(_) => unreachable!("it would have failed"),
            };
            act(number, &accesses, load, |array, element, value| {
                oracle[array][element] = Element::Value(value);
            });
        }
    }
    drop(spawned);
    let _failures = runtime.close();
    for (array, elements) in oracle.iter().enumerate() {
        for (element, value) in elements.iter().enumerate() {
            if let Element::Value(value) = value {
                let stored = storage[array][element].load(Ordering::Relaxed);
                assert_eq!(stored, *value, "element {element} of array {array}");
            }
        }
    }
    take_trace(&path)
}

/// Moves the body of each task so that it begins before a predecessor by its accesses has ended: each time
/// somebody has to notice.
fn move_together(file: &TraceFile) {
    let life = |task: u64, event: Event| {
        let mut records = file.records.iter();
        records
            .find(|record| record.task == task && record.event == event)
            .map(|record| record.time)
    };
    let mut moved = 0;
    for later in &file.accesses {
        // The latest conflicting one before it that ran.
        let earlier = file.accesses.iter().rev().find(|earlier| {
            earlier.datum == later.datum
                && earlier.number != 0
                && earlier.number < later.number
                && earlier.task != later.task
                && earlier.region.overlaps(&later.region)
                && (earlier.mode.writes() || later.mode.writes())
                && (earlier.mode, later.mode) != (Mode::Commute, Mode::Commute)
                && life(earlier.task, Event::End).is_some()
        });
        let (Some(earlier), Some(begin)) = (earlier, life(later.task, Event::Start)) else {
            continue;
        };
        let end = life(earlier.task, Event::End).unwrap();
        let mut other = file.clone();
        for record in &mut other.records {
            if record.task == later.task {
                record.time = (record.time + end - 1).saturating_sub(begin);
            }
        }
        other.records.sort_by_key(|record| record.time);
        let checked = trace::check_order(&other).unwrap();
        let found = checked.violations.iter().any(|violation| {
            violation.rule == Rule::Access
                && [violation.task, violation.other.unwrap()].contains(&later.task)
        });
        assert!(found, "{} after {}", later.task, earlier.task);
        moved += 1;
        if moved == 12 {
            break;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        max_shrink_iters: 2000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_programs_are_as_if_run_in_order(plan in plan()) {
        within_on(plan.clone(), 60, move || {
            let file = run(&plan);
            check_trace(&file);
            prove(&file);
            let ordered = trace::check_order(&file).unwrap();
            let violations: Vec<_> = ordered.violations.iter().map(ToString::to_string).collect();
            assert!(violations.is_empty(), "{violations:#?}");
            move_together(&file);
        });
    }
}
