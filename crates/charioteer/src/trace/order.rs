//! Proves from a trace that conflicting accesses to data were ordered.
//!
//! # What is proved
//!
//! Of every two accesses to one datum that overlap, of which one writes at least, the one that was
//! registered first had ended before the other began (invariant 3). Accesses that commute may come in any
//! order, and exclude each other all the same. Those that reduce with one operation have no order, nor have
//! unordered ones with any.
//!
//! *Claims* are the accesses with their numbers. *Evidence* is when bodies began and ended, as their threads
//! logged it: an access lasts from the first beginning of its task's body to the last end of it. The edges of
//! the graph are no evidence. A task that never began did nothing, and is left out.
//!
//! # How
//!
//! The accesses of a datum are taken in their order, with an index of those that may still be compared. A
//! write takes the place of what it contains: it was found to have begun after that had ended, so who comes
//! after it comes after that. Reads of equal regions are one entry, with the last end of them; so are tasks
//! that reduce, and those that commute, which also keep their times, to be compared with their neighbours in
//! time alone. So each access is compared with few others.

use std::collections::{BTreeMap, HashMap};

use super::check::{NoEvidence, Rule, Violation};
use super::file::TraceFile;
use super::record::{AccessRecord, Event};
use crate::data::Mode;
use crate::region::Region;
use crate::region::tree::{Bounds, Tree, longest};

/// What became of a check of accesses.
#[derive(Clone, Debug, Default)]
pub struct Ordered {
    /// Accesses of tasks that ran, and that take part in the order.
    pub accesses: usize,
    /// Pairs of them that were compared.
    pub pairs: usize,
    /// Those that were not ordered, by datum, in the order of the later access.
    pub violations: Vec<Violation>,
}

/// When a body began and when it ended.
#[derive(Clone, Copy)]
struct Life {
    begin: u64,
    end: u64,
}

/// Accesses that may still be compared.
struct Entry<'a> {
    region: &'a Region,
    /// That with the last end of those that the entry is for.
    last: &'a AccessRecord,
    end: u64,
    /// By their beginnings, of those that commute: their ends.
    times: BTreeMap<u64, (u64, &'a AccessRecord)>,
}

struct Checker<'a> {
    trace: &'a TraceFile,
    lives: HashMap<u64, Life>,
    found: Ordered,
}

/// Checks the accesses of a trace; see the module for what that proves.
///
/// # Errors
/// [`NoEvidence`] of a trace before version 3.
pub fn check_order(trace: &TraceFile) -> Result<Ordered, NoEvidence> {
    if trace.version < 3 {
        return Err(NoEvidence {
            version: trace.version,
            needs: 3,
        });
    }
    let mut checker = Checker {
        trace,
        lives: lives(trace),
        found: Ordered::default(),
    };
    for accesses in trace.accesses.chunk_by(|a, b| a.datum == b.datum) {
        checker.datum(accesses);
    }
    Ok(checker.found)
}

/// When the bodies of a trace began and ended; one that has no end runs for ever.
fn lives(trace: &TraceFile) -> HashMap<u64, Life> {
    let mut lives: HashMap<u64, Life> = HashMap::new();
    for record in &trace.records {
        match record.event {
            Event::Start => {
                let life = lives.entry(record.task).or_insert(Life {
                    begin: record.time,
                    end: u64::MAX,
                });
                // Another attempt, or it goes on.
                life.end = u64::MAX;
            }
            Event::End => {
                if let Some(life) = lives.get_mut(&record.task) {
                    life.end = record.time;
                }
            }
            _ => {}
        }
    }
    lives
}

/// Whether two accesses that overlap have to be ordered; those that commute exclude each other besides.
fn conflict(first: Mode, second: Mode) -> bool {
    match (first, second) {
        (Mode::In, Mode::In) | (Mode::Commute, Mode::Commute) => false,
        (Mode::Reduce(first), Mode::Reduce(second)) => first != second,
        _ => true,
    }
}

impl<'a> Checker<'a> {
    fn datum(&mut self, accesses: &'a [AccessRecord]) {
        let axes = accesses
            .first()
            .map_or(0, |access| access.region.spans().len());
        let mut extents = vec![0; axes];
        for access in accesses {
            for (extent, span) in extents.iter_mut().zip(access.region.spans()) {
                *extent = span.end().max(*extent);
            }
        }
        let axes = longest(&extents);
        let mut reads: Tree<Entry<'a>> = Tree::new();
        let mut writes: Tree<Entry<'a>> = Tree::new();
        let ordered = accesses.iter().filter(|access| access.number != 0);
        let ordered: Vec<&AccessRecord> = ordered.collect();
        // Those of one task stand together, since they were registered at once.
        for of_task in ordered.chunk_by(|a, b| a.task == b.task) {
            let Some(&life) = self.lives.get(&of_task[0].task) else {
                continue;
            };
            self.found.accesses += of_task.len();
            for access in of_task {
                let bounds = Bounds::of(&access.region, &axes);
                let mut compare = |entry: &Entry<'a>| {
                    if entry.region.overlaps(&access.region) {
                        self.compare(entry, access, life);
                    }
                };
                writes.visit(&bounds, &mut compare);
                if access.mode.writes() {
                    reads.visit(&bounds, &mut compare);
                }
            }
            for access in of_task {
                take_place(&mut reads, &mut writes, &axes, access);
            }
            for access in of_task {
                let tree = if access.mode.writes() {
                    &mut writes
                } else {
                    &mut reads
                };
                enter(tree, Bounds::of(&access.region, &axes), access, life);
            }
        }
    }

    /// Compares an access with those of an entry that it overlaps, which were registered before.
    fn compare(&mut self, entry: &Entry<'a>, access: &'a AccessRecord, life: Life) {
        let other = entry.last;
        if conflict(other.mode, access.mode) {
            self.found.pairs += 1;
            if life.begin < entry.end {
                self.report(other, access, entry.end - life.begin);
            }
        } else if access.mode == Mode::Commute && other.mode == Mode::Commute {
            let before = entry.times.range(..=life.begin).next_back();
            let after = entry.times.range(life.begin + 1..).next();
            for (&begin, &(end, other)) in before.into_iter().chain(after) {
                self.found.pairs += 1;
                let common = life.end.min(end).saturating_sub(life.begin.max(begin));
                if common != 0 {
                    self.report(other, access, common);
                }
            }
        }
    }

    fn report(&mut self, first: &AccessRecord, second: &AccessRecord, time: u64) {
        let name = |task: u64| match self.trace.names.get(&task) {
            Some(name) => format!("{name} ({task})"),
            None => format!("task {task}"),
        };
        let label = self.trace.labels.get(&first.datum);
        let label = label.map_or("a datum", String::as_str);
        let both = first.region.intersection(&second.region);
        let (one, other) = (name(first.task), name(second.task));
        let how = if first.mode == Mode::Commute && second.mode == Mode::Commute {
            format!("they ran side by side for {time} ns, and nothing kept them apart")
        } else {
            format!(
                "{other} began {time} ns before {one}, which comes before it, had ended: an edge from \
                 {one} to {other} is missing"
            )
        };
        self.found.violations.push(Violation {
            rule: Rule::Access,
            task: second.task,
            other: Some(first.task),
            text: format!(
                "{one} has {} {label}{}, {other} has {} {label}{}, which have {both} in common; {how}",
                first.mode.name(),
                first.region,
                second.mode.name(),
                second.region,
            ),
        });
    }
}

/// Takes out what a write contains.
fn take_place<'a>(
    reads: &mut Tree<Entry<'a>>,
    writes: &mut Tree<Entry<'a>>,
    axes: &[usize],
    access: &AccessRecord,
) {
    if matches!(access.mode, Mode::Out | Mode::InOut) {
        let bounds = Bounds::of(&access.region, axes);
        let contained = &mut |entry: &Entry<'a>| access.region.contains(entry.region);
        let mut gone = Vec::new();
        reads.extract(Some(&bounds), contained, &mut gone);
        writes.extract(Some(&bounds), contained, &mut gone);
    }
}

/// Adds an access to the entry of its like, or as a new one.
fn enter<'a>(tree: &mut Tree<Entry<'a>>, bounds: Bounds, access: &'a AccessRecord, life: Life) {
    let mut joined = false;
    if !matches!(access.mode, Mode::Out | Mode::InOut) {
        tree.visit_mut(&bounds, &mut |entry| {
            if joined || entry.last.mode != access.mode || *entry.region != access.region {
                return;
            }
            joined = true;
            if access.mode == Mode::Commute {
                entry.times.insert(life.begin, (life.end, access));
            }
            if life.end >= entry.end {
                (entry.end, entry.last) = (life.end, access);
            }
        });
    }
    if !joined {
        let mut times = BTreeMap::new();
        if access.mode == Mode::Commute {
            times.insert(life.begin, (life.end, access));
        }
        let entry = Entry {
            region: &access.region,
            last: access,
            end: life.end,
            times,
        };
        tree.insert(bounds, entry);
    }
}
