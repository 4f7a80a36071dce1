//! Proves from a trace that who read data had it, and counts what was moved for that.
//!
//! # What is proved
//!
//! * **Coherence** (invariant 6). Who reads on a device, or on the host, finds there the last version of
//!   each element, and is behind what brought it there. A copy takes that version from where it is, behind
//!   what put it there. Who writes to an instance, a task or a copy, is behind the copies from it and to it.
//! * **Transfers.** A version is copied to a memory where it is not; so at most once, unless it was dropped
//!   there in between.
//!
//! # How
//!
//! The copies and drops of the trace and the tasks that began are replayed in the order of their times, with
//! nothing of what the store believes. For each array there are disjoint *pieces*. A piece has the task that
//! wrote it last, and the *places* that have that version: an instance each (a device and a box of the
//! array), with what put it there, the writer or a copy. A task writes when it begins: nobody copies what it
//! writes before that. What was there before is kept aside until the task is known to have been launched,
//! since it may still be copied to make room. That this order of conflicting accesses is the right one is proved by [`check_order`](super::check_order); what is before
//! what is known from the [evidence](super::evidence) here as there.
//!
//! Which instance a task uses follows from its accesses: the box of each, where boxes of one member of its
//! set overlap the box around them; on the host there is one, the array.
//!
//! What a failed task was to write is undefined, and nobody may read it, so that nothing is claimed of it
//! until it is written again. An array with accesses in no order has no last version: of that, bytes are
//! counted and nothing is proved. A device that is lost has nothing from then on.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use smallvec::SmallVec;

use super::check::{NoEvidence, Rule, Violation};
use super::evidence::{Clock, Position, has};
use super::file::TraceFile;
use super::lives::{Life, Lives, Part};
use super::record::{AccessRecord, DeviceEvent, Event, MoveRecord};
use crate::data::{Mode, Spread};
use crate::machine::{DeviceId, HOST, Observed};
use crate::region::tree::{Bounds, Tree, longest};
use crate::region::{Region, Span};

/// What became of a replay of copies.
#[derive(Clone, Debug, Default)]
pub struct Moves {
    /// Copies from one memory to another.
    pub copies: usize,
    /// Their bytes.
    pub bytes: u64,
    /// The bytes of copies within the memory of a device.
    pub local: u64,
    /// Instances that were dropped.
    pub dropped: usize,
    /// Reads of pieces that were looked at.
    pub reads: usize,
    /// What was broken, in the order of the trace.
    pub violations: Vec<Violation>,
}

/// An instance: whose memory it is in, and the box of the array that it has.
#[derive(Clone, Debug, PartialEq)]
struct Place {
    device: DeviceId,
    instance: Rc<Region>,
}

/// What put a version at a place.
#[derive(Clone, Copy, Debug)]
enum Since {
    /// Nothing: it was there.
    Ever,
    /// Its writer.
    Writer,
    /// A copy, by its place in the trace.
    Copy(usize),
}

struct Piece {
    region: Region,
    /// The task that wrote it last; 0 if none did.
    writer: u64,
    /// Whether it is defined.
    sound: bool,
    holders: SmallVec<[(Place, Since); 2]>,
}

/// A copy from or to an instance, that its next writer is to be behind.
struct Use {
    place: Place,
    region: Region,
    copy: usize,
    end: Position,
}

struct Array {
    axes: SmallVec<[usize; 3]>,
    whole: Rc<Region>,
    pieces: Tree<Piece>,
    /// What was there before somebody began to write, with when that was launched at the latest.
    former: Tree<(Piece, u64)>,
    uses: Tree<Use>,
    /// Whether there are accesses in no order.
    loose: bool,
}

/// A copy with what it is behind.
struct Carried {
    end: Position,
    clock: Option<Clock>,
    runs: bool,
}

/// What a member of a task's set does with an array.
pub(super) struct Want<'a> {
    pub(super) access: &'a AccessRecord,
    /// What it has of the region.
    pub(super) region: Region,
    /// The box of its instance.
    pub(super) instance: Rc<Region>,
}

/// One moment of the replay.
#[derive(Clone, Copy)]
enum Step {
    Move(usize),
    /// A task begins, with the parts of one attempt from one place on, or on the host.
    Begin(u64),
    Lose(DeviceId),
}

/// Replays the copies of a trace; see the module for what that proves.
///
/// # Errors
/// [`NoEvidence`] of a trace before version 4.
pub fn check_moves(trace: &TraceFile) -> Result<Moves, NoEvidence> {
    if trace.version < 4 {
        return Err(NoEvidence {
            version: trace.version,
            needs: 4,
        });
    }
    let lives = Lives::new(trace);
    Ok(replay(trace, &lives))
}

/// The same, of a trace of version 4 with its lives.
pub(super) fn replay(trace: &TraceFile, lives: &Lives) -> Moves {
    let scattered = scattered(trace, lives);
    let mut replay = Replay::new(trace, lives, &scattered);
    for (time, step) in steps(trace, lives, &scattered) {
        match step {
            Step::Move(at) => replay.moves(at),
            Step::Begin(task) => replay.begins(task, time),
            Step::Lose(device) => replay.loses(device),
        }
    }
    replay.found
}

/// The arrays that were ever used elsewhere than on the host.
pub(super) fn scattered(trace: &TraceFile, lives: &Lives) -> HashSet<u64> {
    let mut scattered: HashSet<u64> = trace.moves.iter().map(|record| record.datum).collect();
    let on_devices = |task| lives.of(task).is_some_and(|life| !life.parts.is_empty());
    if lives.any_parts() {
        let accesses = trace.accesses.iter();
        let used = accesses.filter(|access| on_devices(access.task));
        scattered.extend(used.map(|access| access.datum));
    }
    scattered.retain(|datum| trace.layouts.contains_key(datum));
    scattered
}

/// All that is replayed, in the order of its times.
fn steps(trace: &TraceFile, lives: &Lives, scattered: &HashSet<u64>) -> Vec<(u64, Step)> {
    let mut steps: Vec<(u64, Step)> = Vec::new();
    for (at, record) in trace.moves.iter().enumerate() {
        steps.push((record.time, Step::Move(at)));
    }
    let mut seen = HashSet::new();
    for access in &trace.accesses {
        if !scattered.contains(&access.datum) || !seen.insert(access.task) {
            continue;
        }
        let Some(life) = lives.of(access.task) else {
            continue;
        };
        let mut attempts: SmallVec<[u64; 2]> = life.parts.iter().map(|part| part.begun).collect();
        attempts.dedup();
        if let (Some(stay), []) = (life.host, &attempts[..]) {
            attempts.push(stay.begin);
        }
        let begins = attempts.into_iter();
        steps.extend(begins.map(|time| (time, Step::Begin(access.task))));
    }
    let mut lost = HashSet::new();
    for record in &trace.devices {
        if let DeviceEvent::Observed(Observed::Abandoned(event)) = record.event
            && lost.insert(event.stream.device)
        {
            steps.push((record.time, Step::Lose(event.stream.device)));
        }
    }
    steps.sort_by_key(|(time, _)| *time);
    steps
}

/// Each index between the first and the last.
pub(super) fn hull(region: &Region) -> Region {
    Region::new(
        region
            .spans()
            .iter()
            .map(|span| Span::range(span.start(), span.end())),
    )
}

/// What one member of so many has of a region.
fn share(access: &AccessRecord, member: u16, members: u16) -> Region {
    let Spread::Shard(axis) = access.spread else {
        return access.region.clone();
    };
    let axis = usize::from(axis);
    let (count, members, member) = (
        access.region.spans()[axis].count(),
        u64::from(members),
        u64::from(member),
    );
    // As equal as can be, the first ones one longer.
    let (least, longer) = (count / members, count % members);
    let begin = |member: u64| member * least + member.min(longer);
    access
        .region
        .select(axis, Span::range(begin(member), begin(member + 1)))
}

/// What a member does with each of the accesses to one array.
pub(super) fn wants<'a>(
    accesses: &[&'a AccessRecord],
    member: u16,
    members: u16,
    on_host: Option<&Rc<Region>>,
) -> SmallVec<[Want<'a>; 4]> {
    let mut wants: SmallVec<[Want<'a>; 4]> = accesses
        .iter()
        .filter(|access| !matches!(access.mode, Mode::Reduce(_)))
        .map(|&access| {
            let region = share(access, member, members);
            let instance = on_host.map_or_else(|| Rc::new(hull(&region)), Rc::clone);
            Want {
                access,
                region,
                instance,
            }
        })
        .filter(|want| !want.region.is_empty())
        .collect();
    // Boxes that overlap are one, which may overlap others.
    let mut more = wants.len() > 1 && on_host.is_none();
    while std::mem::take(&mut more) {
        for one in 0..wants.len() {
            for other in one + 1..wants.len() {
                let (own, its) = (&wants[one].instance, &wants[other].instance);
                if own != its && own.overlaps(its) {
                    let both = Rc::new(own.hull(its));
                    let (own, its) = (Rc::clone(own), Rc::clone(its));
                    for want in &mut wants {
                        if want.instance == own || want.instance == its {
                            want.instance = Rc::clone(&both);
                        }
                    }
                    more = true;
                }
            }
        }
    }
    wants
}

struct Replay<'a> {
    trace: &'a TraceFile,
    lives: &'a Lives,
    arrays: HashMap<u64, Array>,
    /// The accesses of each task to arrays, by array.
    accesses: HashMap<u64, Vec<&'a AccessRecord>>,
    failed: HashSet<u64>,
    copies: Vec<Carried>,
    found: Moves,
}

/// Who reads or writes.
enum Who<'a> {
    Part(&'a Part),
    /// A body on the host, from when on.
    Host(u64),
    Copy(usize),
}

impl<'a> Replay<'a> {
    fn new(trace: &'a TraceFile, lives: &'a Lives, scattered: &HashSet<u64>) -> Self {
        let evidence = &lives.evidence;
        let copies = trace.moves.iter().map(|record| {
            let known = record
                .event
                .and_then(|event| Some((evidence.known(event.stream)?, event.position)));
            // Of a stream that nobody told of nothing is known, and what was dropped is no copy.
            let end = known.unwrap_or((0, 0));
            Carried {
                end,
                clock: known.and_then(|end| evidence.clock(end).cloned()),
                runs: known.is_some_and(|end| evidence.runs(end)),
            }
        });
        let mut accesses: HashMap<u64, Vec<&AccessRecord>> = HashMap::new();
        let mut loose = HashSet::new();
        for access in &trace.accesses {
            if !scattered.contains(&access.datum) {
                continue;
            }
            if access.number == 0 && !access.region.is_empty() {
                loose.insert(access.datum);
            }
            accesses.entry(access.task).or_default().push(access);
        }
        let arrays = scattered.iter().map(|datum| {
            let shape = &trace.layouts[datum].shape;
            (*datum, Array::new(shape, loose.contains(datum)))
        });
        let failed = trace.records.iter();
        let failed = failed.filter(|record| record.event == Event::Failed);
        Self {
            arrays: arrays.collect(),
            accesses,
            failed: failed.map(|record| record.task).collect(),
            copies: copies.collect(),
            found: Moves::default(),
            trace,
            lives,
        }
    }

    fn task(&self, task: u64) -> String {
        match self.trace.names.get(&task) {
            Some(name) => format!("{name} ({task})"),
            None if task == 0 => "the host".into(),
            None => format!("task {task}"),
        }
    }

    fn label(&self, datum: u64) -> &str {
        self.trace
            .labels
            .get(&datum)
            .map_or("a datum", String::as_str)
    }

    fn position(&self, (track, position): Position) -> String {
        let stream = self.lives.evidence.stream(track);
        format!(
            "position {position} of stream {} of {}",
            stream.number, stream.device
        )
    }

    fn violate(&mut self, rule: Rule, task: u64, other: u64, text: String) {
        self.found.violations.push(Violation {
            rule,
            task,
            other: (other != 0).then_some(other),
            text,
        });
    }

    /// Whether somebody comes after a position on a stream.
    fn is_behind(&self, who: &Who<'_>, end: Position) -> bool {
        let evidence = &self.lives.evidence;
        match *who {
            Who::Part(part) => part.is_behind(end, evidence),
            Who::Host(begin) => evidence.seen(end).is_some_and(|seen| seen <= begin),
            Who::Copy(at) => {
                let copy = &self.copies[at];
                (end.0 == copy.end.0 && end.1 < copy.end.1)
                    || has(copy.clock.as_ref(), end)
                    || evidence
                        .seen(end)
                        .is_some_and(|seen| seen <= self.trace.moves[at].time)
            }
        }
    }

    /// What somebody who uses a place is not behind, of what put a version there; none if all is well.
    fn missing(
        &self,
        who: &Who<'_>,
        device: DeviceId,
        writer: u64,
        since: Since,
    ) -> Option<String> {
        let end = match (since, who) {
            (Since::Ever, _) => return None,
            (Since::Copy(at), _) => {
                let end = self.copies[at].end;
                let from = self.trace.moves[at].from;
                let end = (!self.is_behind(who, end)).then_some(end)?;
                return Some(format!(
                    "the copy from {from}, which ends at {}",
                    self.position(end)
                ));
            }
            // The order of tasks is proved elsewhere.
            (Since::Writer, Who::Part(_) | Who::Host(_)) => return None,
            (Since::Writer, Who::Copy(at)) => {
                let life = self.lives.of(writer)?;
                if device == HOST {
                    let end = life.host?.end;
                    return (end > self.trace.moves[*at].time)
                        .then(|| format!("the end of {} on the host", self.task(writer)));
                }
                let ends = life.parts.iter().filter(|part| part.device == device);
                ends.map(Part::end).find(|end| !self.is_behind(who, *end))?
            }
        };
        Some(format!(
            "the work of {}, which ends at {}",
            self.task(writer),
            self.position(end)
        ))
    }

    // ---- copies and drops -------------------------------------------------------------------

    fn moves(&mut self, at: usize) {
        let record = &self.trace.moves[at];
        let (source, target) = (
            Place {
                device: record.from,
                instance: Rc::new(record.source.clone()),
            },
            Place {
                device: record.to,
                instance: Rc::new(record.target.clone()),
            },
        );
        if record.event.is_none() {
            self.found.dropped += 1;
        } else if record.from == record.to {
            self.found.local += record.bytes;
        } else {
            self.found.copies += 1;
            self.found.bytes += record.bytes;
        }
        let Some(mut array) = self.arrays.remove(&record.datum) else {
            return;
        };
        if record.event.is_none() {
            array.drop_instance(&source);
        } else if self.copies[at].runs && !array.loose {
            self.copy(at, record, &mut array, source, target);
        }
        self.arrays.insert(record.datum, array);
    }

    fn copy(
        &mut self,
        at: usize,
        record: &MoveRecord,
        array: &mut Array,
        source: Place,
        target: Place,
    ) {
        let end = self.copies[at].end;
        let who = Who::Copy(at);
        self.writes_to(&who, array, &target, &record.region, 0, record.datum);
        for mut piece in array.cut(&record.region) {
            let here = |(place, _): &(Place, Since)| *place == source;
            if piece.sound
                && !piece.holders.iter().any(here)
                && array.copy_former(&piece.region, &source, &target, record.time, at)
            {
                array.put(piece);
                continue;
            }
            if piece.sound {
                self.takes_last(&who, record, &piece, &source);
                let there = |(place, _): &(Place, Since)| place.device == record.to;
                if record.from != record.to && piece.holders.iter().any(there) {
                    let text = format!(
                        "{}{}, of {}, is copied from {} to {}, where it is",
                        self.label(record.datum),
                        piece.region,
                        self.task(piece.writer),
                        record.from,
                        record.to,
                    );
                    self.violate(Rule::Transfer, piece.writer, 0, text);
                }
            }
            piece.holders.retain(|(place, _)| *place != target);
            piece.holders.push((target.clone(), Since::Copy(at)));
            array.put(piece);
        }
        for place in [source, target] {
            array.note_use(Use {
                place,
                region: record.region.clone(),
                copy: at,
                end,
            });
        }
    }

    /// That a copy takes the last version of a piece from where it is.
    fn takes_last(&mut self, who: &Who<'_>, record: &MoveRecord, piece: &Piece, source: &Place) {
        let what = || {
            format!(
                "the copy of {}{} from {} to {}",
                self.label(record.datum),
                piece.region,
                record.from,
                record.to
            )
        };
        let writer = piece.writer;
        let text = match piece.holders.iter().find(|(place, _)| place == source) {
            None => format!(
                "{} takes what is there, and what {} wrote is {}",
                what(),
                self.task(writer),
                places(piece)
            ),
            Some(&(_, since)) => {
                let Some(missing) = self.missing(who, record.from, writer, since) else {
                    return;
                };
                format!("nothing puts {} behind {missing}", what())
            }
        };
        self.violate(Rule::Coherence, writer, 0, text);
    }

    /// That who writes to a place is behind all copies from there and to there.
    fn writes_to(
        &mut self,
        who: &Who<'_>,
        array: &mut Array,
        place: &Place,
        region: &Region,
        task: u64,
        datum: u64,
    ) {
        for one in array.take_uses(place, region) {
            if self.is_behind(who, one.end) {
                continue;
            }
            let record = &self.trace.moves[one.copy];
            let writer = match who {
                Who::Copy(at) => {
                    format!("the copy of {region} from {}", self.trace.moves[*at].from)
                }
                _ => self.task(task),
            };
            let text = format!(
                "{writer} writes to {}{} on {}, and nothing puts that behind the copy from {} to {}, \
                 which ends at {}",
                self.label(datum),
                one.region,
                place.device,
                record.from,
                record.to,
                self.position(one.end),
            );
            self.violate(Rule::Coherence, task, 0, text);
        }
    }

    fn loses(&mut self, device: DeviceId) {
        for array in self.arrays.values_mut() {
            array.pieces.visit_mut(&Bounds::ALL, &mut |piece| {
                piece.holders.retain(|(place, _)| place.device != device);
            });
        }
    }

    // ---- tasks ------------------------------------------------------------------------------

    fn begins(&mut self, task: u64, time: u64) {
        let lives = self.lives;
        let life = lives.of(task).expect("it began");
        let accesses = std::mem::take(self.accesses.get_mut(&task).expect("it has accesses"));
        for of_array in accesses.chunk_by(|a, b| a.datum == b.datum) {
            let datum = of_array[0].datum;
            let mut array = self.arrays.remove(&datum).expect("it has a layout");
            if !array.loose {
                self.begins_with(task, time, life, of_array, &mut array);
            }
            self.arrays.insert(datum, array);
        }
        self.accesses.insert(task, accesses);
    }

    fn begins_with(
        &mut self,
        task: u64,
        time: u64,
        life: &Life,
        accesses: &[&'a AccessRecord],
        array: &mut Array,
    ) {
        let parts = life.parts.iter().filter(|part| part.begun == time);
        let mut members: SmallVec<[_; 2]> = parts
            .map(|part| {
                let wants = wants(accesses, part.member, part.members, None);
                (part.device, Who::Part(part), wants)
            })
            .collect();
        if let Some(stay) = life.host {
            // Alone, or with devices.
            let of = life.parts.first().map_or(1, |part| part.members);
            let cores = if life.parts.is_empty() {
                &[0][..]
            } else {
                &life.cores
            };
            for &member in cores {
                let wants = wants(accesses, member, of, Some(&array.whole));
                members.push((HOST, Who::Host(stay.begin), wants));
            }
        }
        let failed = self.failed.contains(&task);
        if !failed {
            for (device, who, wants) in &members {
                for want in wants.iter().filter(|want| want.access.mode != Mode::Out) {
                    self.reads(task, *device, who, want, array);
                }
            }
        }
        let mut written: Vec<Piece> = Vec::new();
        for (device, who, wants) in &members {
            for want in wants.iter().filter(|want| want.access.mode.writes()) {
                let place = Place {
                    device: *device,
                    instance: Rc::clone(&want.instance),
                };
                let datum = want.access.datum;
                self.writes_to(who, array, &place, &want.region, task, datum);
                let mut pieces = written.iter_mut();
                if let Some(piece) = pieces.find(|piece| piece.region == want.region) {
                    piece.holders.push((place, Since::Writer));
                    continue;
                }
                written.push(Piece {
                    region: want.region.clone(),
                    writer: task,
                    sound: !failed,
                    holders: SmallVec::from_iter([(place, Since::Writer)]),
                });
            }
        }
        let parts = life.parts.iter().filter(|part| part.begun == time);
        let launched = parts.map(|part| part.returned).max();
        for piece in written {
            array.forget_former(&piece.region);
            for old in array.cut(&piece.region) {
                if let Some(launched) = launched.filter(|_| old.writer != task) {
                    array.keep_former(old, launched);
                }
            }
            array.put(piece);
        }
    }

    /// That a task finds the last version of what it reads.
    fn reads(
        &mut self,
        task: u64,
        device: DeviceId,
        who: &Who<'_>,
        want: &Want<'_>,
        array: &Array,
    ) {
        let mut broken: Vec<(u64, String)> = Vec::new();
        let mut reads = 0;
        let bounds = Bounds::of(&want.region, &array.axes);
        array.pieces.visit(&bounds, &mut |piece| {
            // What an attempt before it left is anybody's guess.
            if !piece.sound || piece.writer == task || !piece.region.overlaps(&want.region) {
                return;
            }
            reads += 1;
            let is_it = |(place, _): &&(Place, Since)| {
                place.device == device && place.instance == want.instance
            };
            let both = || piece.region.intersection(&want.region);
            let label = || self.label(want.access.datum);
            match piece.holders.iter().find(is_it) {
                None => {
                    let text = format!(
                        "{} reads {}{} on {device} in the instance {}, and what {} wrote is {}",
                        self.task(task),
                        label(),
                        both(),
                        want.instance,
                        self.task(piece.writer),
                        places(piece)
                    );
                    broken.push((piece.writer, text));
                }
                Some(&(_, since)) => {
                    if let Some(missing) = self.missing(who, device, piece.writer, since) {
                        let text = format!(
                            "{} reads {}{} on {device}, and nothing puts that behind {missing}",
                            self.task(task),
                            label(),
                            both(),
                        );
                        broken.push((piece.writer, text));
                    }
                }
            }
        });
        self.found.reads += reads;
        for (writer, text) in broken {
            self.violate(Rule::Coherence, task, writer, text);
        }
    }
}

/// Where a piece is, in words.
fn places(piece: &Piece) -> String {
    let mut places: Vec<String> = Vec::new();
    for (place, _) in &piece.holders {
        let device = place.device;
        places.push(match device {
            HOST => "on the host".into(),
            _ => format!("on {device} in {}", place.instance),
        });
    }
    if places.is_empty() {
        "nowhere".into()
    } else {
        places.join(", ")
    }
}

impl Array {
    fn new(shape: &[u64], loose: bool) -> Self {
        let whole = Region::whole(shape);
        let mut array = Self {
            axes: longest(shape),
            pieces: Tree::new(),
            former: Tree::new(),
            uses: Tree::new(),
            whole: Rc::new(whole.clone()),
            loose,
        };
        if !whole.is_empty() {
            let place = Place {
                device: HOST,
                instance: Rc::clone(&array.whole),
            };
            array.put(Piece {
                region: whole,
                writer: 0,
                sound: true,
                holders: SmallVec::from_iter([(place, Since::Ever)]),
            });
        }
        array
    }

    fn put(&mut self, piece: Piece) {
        let bounds = Bounds::of(&piece.region, &self.axes);
        self.pieces.insert(bounds, piece);
    }

    /// Takes out the pieces within a region; what others have of it is cut off.
    fn cut(&mut self, region: &Region) -> Vec<Piece> {
        let bounds = Bounds::of(region, &self.axes);
        let mut taken = Vec::new();
        let overlaps = &mut |piece: &Piece| piece.region.overlaps(region);
        self.pieces.extract(Some(&bounds), overlaps, &mut taken);
        for piece in &mut taken {
            if region.contains(&piece.region) {
                continue;
            }
            for rest in piece.region.difference(region) {
                self.put(Piece {
                    region: rest,
                    holders: piece.holders.clone(),
                    ..*piece
                });
            }
            piece.region = piece.region.intersection(region);
        }
        taken
    }

    /// Forgets what was there before the version that is written over now.
    fn forget_former(&mut self, region: &Region) {
        let bounds = Bounds::of(region, &self.axes);
        let mut taken = Vec::new();
        let overlaps = &mut |(piece, _): &(Piece, u64)| piece.region.overlaps(region);
        self.former.extract(Some(&bounds), overlaps, &mut taken);
        for (piece, launched) in taken {
            for rest in piece.region.difference(region) {
                let rest = Piece {
                    region: rest,
                    holders: piece.holders.clone(),
                    ..piece
                };
                self.keep_former(rest, launched);
            }
        }
    }

    fn keep_former(&mut self, piece: Piece, launched: u64) {
        let bounds = Bounds::of(&piece.region, &self.axes);
        self.former.insert(bounds, (piece, launched));
    }

    /// Copies what was there before somebody wrote who may not be launched at that time; false if all of it
    /// is not there.
    fn copy_former(
        &mut self,
        region: &Region,
        source: &Place,
        target: &Place,
        time: u64,
        copy: usize,
    ) -> bool {
        let bounds = Bounds::of(region, &self.axes);
        let mut found = 0;
        let matches = |(piece, launched): &(Piece, u64)| {
            let has = |(place, _): &(Place, Since)| place == source;
            *launched >= time && piece.holders.iter().any(has) && piece.region.overlaps(region)
        };
        self.former.visit(&bounds, &mut |one| {
            if matches(one) {
                found += one.0.region.intersection(region).elements();
            }
        });
        if found != region.elements() {
            return false;
        }
        self.former.visit_mut(&bounds, &mut |one| {
            if matches(one) {
                one.0.holders.push((target.clone(), Since::Copy(copy)));
            }
        });
        true
    }

    fn drop_instance(&mut self, place: &Place) {
        let bounds = Bounds::of(&place.instance, &self.axes);
        self.pieces.visit_mut(&bounds, &mut |piece| {
            piece.holders.retain(|(other, _)| other != place);
        });
        self.former.visit_mut(&bounds, &mut |(piece, _)| {
            piece.holders.retain(|(other, _)| other != place);
        });
        let of_it = &mut |one: &Use| one.place == *place;
        self.uses.extract(Some(&bounds), of_it, &mut Vec::new());
    }

    /// Takes note of a copy, instead of an earlier one like it on its stream.
    fn note_use(&mut self, new: Use) {
        let bounds = Bounds::of(&new.region, &self.axes);
        let like = &mut |old: &Use| {
            old.end.0 == new.end.0 && old.place == new.place && old.region == new.region
        };
        self.uses.extract(Some(&bounds), like, &mut Vec::new());
        self.uses.insert(bounds, new);
    }

    /// The copies that are in use where somebody writes, without those that no part is left of.
    fn take_uses(&mut self, place: &Place, region: &Region) -> Vec<Use> {
        let bounds = Bounds::of(region, &self.axes);
        let mut taken = Vec::new();
        let meets = &mut |one: &Use| one.place == *place && one.region.overlaps(region);
        self.uses.extract(Some(&bounds), meets, &mut taken);
        for one in &taken {
            for rest in one.region.difference(region) {
                let bounds = Bounds::of(&rest, &self.axes);
                let rest = Use {
                    place: one.place.clone(),
                    region: rest,
                    ..*one
                };
                self.uses.insert(bounds, rest);
            }
        }
        taken
    }
}
