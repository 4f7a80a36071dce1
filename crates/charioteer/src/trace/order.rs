//! Proves from a trace that conflicting accesses to data were ordered.
//!
//! # What is proved
//!
//! Of every two accesses to one datum that overlap, of which one writes at least, the one that was
//! registered first was over before the other began (invariant 3). Accesses that commute may come in any
//! order, and exclude each other all the same. Those that reduce with one operation have no order, nor have
//! unordered ones with any.
//!
//! *Claims* are the accesses with their numbers. *Evidence* is when bodies began and ended, as their threads
//! logged it, and what the device layer logged at its calls; [`lives`](super::lives) says when an access
//! begins and ends, and what is before what. The edges of the graph are no evidence. A task that never began,
//! or of which nothing ran, did nothing, and is left out.
//!
//! # How
//!
//! The accesses of a datum are taken in their order, with an index of those that may still be compared. A
//! write takes the place of what it contains: it was found to have begun after that had ended, so who comes
//! after it comes after that. Reads of equal regions are one entry, with their last ends, one a stream and
//! one on the host; so are tasks that reduce, and those that commute, which also keep their beginnings: in
//! the order of these each is compared with its two neighbours alone. So each access is compared with few
//! others.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use super::check::{NoEvidence, Rule, Violation};
use super::evidence::End;
use super::file::TraceFile;
use super::lives::{Life, Lives};
use super::record::AccessRecord;
use crate::data::Mode;
use crate::region::Region;
use crate::region::tree::{Axes, Bounds, Tree};

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

/// The last ends of those who share an entry.
#[derive(Default)]
struct Ends<'a> {
    host: Option<(u64, &'a AccessRecord)>,
    streams: SmallVec<[(End, &'a AccessRecord); 1]>,
}

impl<'a> Ends<'a> {
    fn add(&mut self, access: &'a AccessRecord, life: &Life) {
        if let Some(stay) = life.host
            && self.host.is_none_or(|(end, _)| stay.end >= end)
        {
            self.host = Some((stay.end, access));
        }
        for part in &life.parts {
            let end = part.end();
            let (track, position) = end.at;
            let mut streams = self.streams.iter_mut();
            match streams.find(|(other, _)| other.at.0 == track) {
                Some((other, _)) if other.at.1 > position => {}
                Some(other) => *other = (end, access),
                None => self.streams.push((end, access)),
            }
        }
    }
}

/// Accesses that may still be compared.
struct Entry<'a> {
    region: &'a Region,
    mode: Mode,
    ends: Ends<'a>,
    /// By their beginnings, of those that commute.
    line: BTreeMap<(u64, u64), &'a AccessRecord>,
}

struct Checker<'a> {
    trace: &'a TraceFile,
    lives: &'a Lives,
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
    Ok(prove(trace, &Lives::new(trace)))
}

/// The same, of a trace of version 3 or later with its lives.
pub(super) fn prove(trace: &TraceFile, lives: &Lives) -> Ordered {
    let mut checker = Checker {
        trace,
        lives,
        found: Ordered::default(),
    };
    for accesses in trace.accesses.chunk_by(|a, b| a.datum == b.datum) {
        checker.datum(accesses);
    }
    checker.found
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
        let axes = Axes::longest(&extents);
        let mut reads: Tree<Entry<'a>> = Tree::new();
        let mut writes: Tree<Entry<'a>> = Tree::new();
        let ordered = accesses.iter().filter(|access| access.number != 0);
        let ordered: Vec<&AccessRecord> = ordered.collect();
        // Those of one task stand together, since they were registered at once.
        for of_task in ordered.chunk_by(|a, b| a.task == b.task) {
            let Some(life) = self.lives.of(of_task[0].task) else {
                continue;
            };
            self.found.accesses += of_task.len();
            for access in of_task {
                let bounds = Bounds::of(&access.region, &axes);
                let mut compare = |entry: &Entry<'a>, exact: bool| {
                    if exact || entry.region.overlaps(&access.region) {
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
    fn compare(&mut self, entry: &Entry<'a>, access: &'a AccessRecord, life: &Life) {
        if conflict(entry.mode, access.mode) {
            self.found.pairs += 1;
            self.is_after(&entry.ends, access, life);
        } else if access.mode == Mode::Commute && entry.mode == Mode::Commute {
            let own = (life.begin(), access.task);
            let (before, after) = (
                entry.line.range(..own).next_back(),
                entry.line.range(own..).next(),
            );
            for (&(begin, task), &other) in before.into_iter().chain(after) {
                if task == access.task {
                    continue;
                }
                let others = self.lives.of(task).expect("it has an entry");
                let mut ends = Ends::default();
                self.found.pairs += 1;
                if (begin, task) < own {
                    ends.add(other, others);
                    self.is_after(&ends, access, life);
                } else {
                    ends.add(access, life);
                    self.is_after(&ends, other, others);
                }
            }
        }
    }

    /// That an access comes after all these ends, or a violation.
    fn is_after(&mut self, ends: &Ends<'a>, access: &'a AccessRecord, life: &Life) {
        let evidence = &self.lives.evidence;
        let mut late: SmallVec<[(&AccessRecord, String); 1]> = SmallVec::new();
        if let Some((end, other)) = ends.host
            && !life.is_after(end)
        {
            late.push((other, "it had ended on the host".into()));
        }
        for &(end, other) in &ends.streams {
            let known = late.iter().any(|(known, _)| known.task == other.task);
            if !known && !life.is_behind(end, evidence) {
                let (track, position) = end.at;
                let stream = evidence.stream(track);
                let what = format!(
                    "its work was over, which ends at position {position} of stream {} of {}: no order of \
                     a stream, no wait, and the host had not seen it complete",
                    stream.number, stream.device
                );
                late.push((other, what));
            }
        }
        for (other, what) in late {
            self.report(other, access, &what);
        }
    }

    fn report(&mut self, first: &AccessRecord, second: &AccessRecord, late: &str) {
        let name = |task: u64| match self.trace.names.get(&task) {
            Some(name) => format!("{name} ({task})"),
            None => format!("task {task}"),
        };
        let label = self.trace.labels.get(&first.datum);
        let label = label.map_or("a datum", String::as_str);
        let both = first.region.intersection(&second.region);
        let (one, other) = (name(first.task), name(second.task));
        let how = if first.mode == Mode::Commute && second.mode == Mode::Commute {
            format!("nothing kept them apart: {other} began before {late}")
        } else {
            format!(
                "{other} began before {late}; {one} comes before it: an edge from {one} to {other} \
                 is missing"
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
    axes: &Axes,
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
fn enter<'a>(tree: &mut Tree<Entry<'a>>, bounds: Bounds, access: &'a AccessRecord, life: &Life) {
    let add = |entry: &mut Entry<'a>| {
        if access.mode == Mode::Commute {
            entry.line.insert((life.begin(), access.task), access);
        }
        entry.ends.add(access, life);
    };
    let mut joined = false;
    if !matches!(access.mode, Mode::Out | Mode::InOut) {
        tree.visit_mut(&bounds, &mut |entry| {
            if !joined && entry.mode == access.mode && *entry.region == access.region {
                joined = true;
                add(entry);
            }
        });
    }
    if !joined {
        let mut entry = Entry {
            region: &access.region,
            mode: access.mode,
            ends: Ends::default(),
            line: BTreeMap::new(),
        };
        add(&mut entry);
        tree.insert(bounds, entry);
    }
}
