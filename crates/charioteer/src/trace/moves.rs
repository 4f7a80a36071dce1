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
//! set overlap the box around them; on the host there is one, the array, and so there is where an array brought
//! memory of a device along, which the trace says.
//!
//! What a failed task was to write is undefined, and nobody may read it, so that nothing is claimed of it
//! until it is written again. An array with accesses in no order has no last version: of that, bytes are
//! counted and nothing is proved. A device that is lost has nothing from then on.
//!
//! Tasks and copies mostly use the same boxes again and again, so that what is known of a box is changed
//! where it is, and only what cuts through others is taken out of the trees and put back.

use std::collections::HashSet;
use std::rc::Rc;

use smallvec::SmallVec;

use super::check::{NoEvidence, Rule, Violation};
use super::evidence::{Clock, End};
use super::file::TraceFile;
use super::lives::{Life, Lives, Part};
use super::numbers::ByNumber;
use super::record::{AccessRecord, DeviceEvent, Event, MoveRecord};
use crate::data::{Mode, Spread};
use crate::machine::{DeviceId, HOST, Observed};
use crate::region::tree::{Axes, Bounds, Tree};
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
#[derive(Clone)]
struct Use {
    place: Place,
    copy: usize,
    end: End,
}

/// The copies of one region that are in use; maybe none, if somebody wrote just that.
struct Uses {
    region: Region,
    list: SmallVec<[Use; 2]>,
}

struct Array {
    axes: Axes,
    whole: Rc<Region>,
    pieces: Pieces,
    /// What was there before somebody began to write, with when that was launched at the latest.
    former: Tree<(Piece, u64)>,
    uses: Tree<Uses>,
    /// On which device it brought memory along.
    adopted: Option<DeviceId>,
    /// Whether there are accesses in no order.
    loose: bool,
}

/// A copy with what it is behind.
struct Carried {
    end: End,
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
enum Step<'a> {
    Move(usize),
    /// A task begins, with the parts of one attempt from one place on, or on the host: with its accesses.
    Begin(&'a [&'a AccessRecord]),
    Lose(DeviceId),
}

/// The arrays that were ever used elsewhere than on the host.
pub(super) struct Scattered<'a> {
    data: HashSet<u64>,
    /// The accesses to them by task, and those of a task by array.
    accesses: Vec<&'a AccessRecord>,
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
    let scattered = Scattered::new(trace, &lives);
    Ok(replay(trace, &lives, &scattered))
}

/// The same, of a trace of version 4 with its lives.
pub(super) fn replay(trace: &TraceFile, lives: &Lives, scattered: &Scattered<'_>) -> Moves {
    let mut replay = Replay::new(trace, lives, scattered);
    for (time, step) in steps(trace, lives, scattered) {
        match step {
            Step::Move(at) => replay.moves(at),
            Step::Begin(accesses) => replay.begins(accesses, time),
            Step::Lose(device) => replay.loses(device),
        }
    }
    replay.found
}

impl<'a> Scattered<'a> {
    pub(super) fn new(trace: &'a TraceFile, lives: &Lives) -> Self {
        let mut data: HashSet<u64> = trace.moves.iter().map(|record| record.datum).collect();
        let on_devices = |task| lives.of(task).is_some_and(|life| !life.parts.is_empty());
        if lives.any_parts() {
            let accesses = trace.accesses.iter();
            let used = accesses.filter(|access| on_devices(access.task));
            data.extend(used.map(|access| access.datum));
        }
        data.retain(|datum| trace.layouts.contains_key(datum));
        let accesses = trace.accesses.iter();
        let mut accesses: Vec<&AccessRecord> = accesses
            .filter(|access| data.contains(&access.datum))
            .collect();
        accesses.sort_by_key(|access| access.task);
        Self { data, accesses }
    }

    /// The accesses of each task.
    pub(super) fn tasks(&self) -> impl Iterator<Item = &[&'a AccessRecord]> {
        self.accesses.chunk_by(|a, b| a.task == b.task)
    }
}

/// All that is replayed, in the order of its times.
fn steps<'a>(
    trace: &TraceFile,
    lives: &Lives,
    scattered: &'a Scattered<'_>,
) -> Vec<(u64, Step<'a>)> {
    let mut steps: Vec<(u64, Step<'_>)> = Vec::new();
    for (at, record) in trace.moves.iter().enumerate() {
        steps.push((record.time, Step::Move(at)));
    }
    for accesses in scattered.tasks() {
        let Some(life) = lives.of(accesses[0].task) else {
            continue;
        };
        let mut attempts: SmallVec<[u64; 2]> = life.parts.iter().map(|part| part.begun).collect();
        attempts.dedup();
        if let (Some(stay), []) = (life.host, &attempts[..]) {
            attempts.push(stay.begin);
        }
        let begins = attempts.into_iter();
        steps.extend(begins.map(|time| (time, Step::Begin(accesses))));
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

/// Whether it says that an array is in memory of a device which it brought along: that comes before all
/// that is done with the array, and nothing is copied.
fn is_adoption(record: &MoveRecord) -> bool {
    record.event.is_some() && record.bytes == 0
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

/// What a member does with each of the accesses to one array. `fixed`: the box of the one instance that serves
/// all of them, on the host and where memory was adopted.
pub(super) fn wants<'a>(
    accesses: &[&'a AccessRecord],
    member: u16,
    members: u16,
    fixed: Option<&Rc<Region>>,
) -> SmallVec<[Want<'a>; 4]> {
    let mut wants: SmallVec<[Want<'a>; 4]> = accesses
        .iter()
        .filter(|access| !matches!(access.mode, Mode::Reduce(_)))
        .map(|&access| {
            let region = share(access, member, members);
            let instance = fixed.map_or_else(|| Rc::new(hull(&region)), Rc::clone);
            Want {
                access,
                region,
                instance,
            }
        })
        .filter(|want| !want.region.is_empty())
        .collect();
    // Boxes that overlap are one, which may overlap others.
    let mut more = wants.len() > 1 && fixed.is_none();
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
    arrays: ByNumber<Array>,
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
    fn new(trace: &'a TraceFile, lives: &'a Lives, scattered: &Scattered<'_>) -> Self {
        let evidence = &lives.evidence;
        let copies = trace.moves.iter().map(|record| {
            let known = record
                .event
                .and_then(|event| Some((evidence.known(event.stream)?, event.position)));
            // Of a stream that nobody told of nothing is known, and what was dropped is no copy.
            let end = known.unwrap_or((0, 0));
            Carried {
                end: evidence.end(end),
                clock: known.and_then(|end| evidence.clock(end)),
                runs: known.is_some_and(|end| evidence.runs(end)),
            }
        });
        let accesses = scattered.accesses.iter();
        let loose: HashSet<u64> = accesses
            .filter(|access| access.number == 0 && !access.region.is_empty())
            .map(|access| access.datum)
            .collect();
        let arrays = scattered.data.iter().map(|datum| {
            let shape = &trace.layouts[datum].shape;
            (*datum, Array::new(shape, loose.contains(datum)))
        });
        let failed = trace.records.iter();
        let failed = failed.filter(|record| record.event == Event::Failed);
        Self {
            arrays: arrays.collect(),
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

    fn position(&self, end: End) -> String {
        let (track, position) = end.at;
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
    fn is_behind(&self, who: &Who<'_>, end: End) -> bool {
        let evidence = &self.lives.evidence;
        match *who {
            Who::Part(part) => part.is_behind(end, evidence),
            Who::Host(begin) => end.is_seen(begin),
            Who::Copy(at) => {
                let copy = &self.copies[at];
                let ((track, position), (own, last)) = (end.at, copy.end.at);
                (track == own && position < last)
                    || end.is_seen(self.trace.moves[at].time)
                    || evidence.has(copy.clock, end.at)
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
        if is_adoption(record) {
            // It is no copy.
        } else if record.event.is_none() {
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
        if is_adoption(record) {
            array.adopts(&target, at);
        } else if record.event.is_none() {
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
        let Array {
            axes,
            pieces,
            former,
            ..
        } = array;
        pieces.update(axes, &record.region, &mut |piece| {
            let here = |(place, _): &(Place, Since)| *place == source;
            if piece.sound
                && !piece.holders.iter().any(here)
                && copy_former((former, axes), piece, (&source, &target), record.time, at)
            {
                return;
            }
            if piece.sound {
                self.takes_last(&who, record, piece, &source);
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
        });
        for place in [source, target] {
            let copy = at;
            array.note_use(&record.region, Use { place, copy, end });
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
        for (part, one) in array.take_uses(place, region) {
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
                part,
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
            array.pieces.0.visit_mut(&Bounds::ALL, &mut |piece| {
                piece.holders.retain(|(place, _)| place.device != device);
            });
        }
    }

    // ---- tasks ------------------------------------------------------------------------------

    fn begins(&mut self, accesses: &[&'a AccessRecord], time: u64) {
        let (lives, task) = (self.lives, accesses[0].task);
        let life = lives.of(task).expect("it began");
        for of_array in accesses.chunk_by(|a, b| a.datum == b.datum) {
            let datum = of_array[0].datum;
            let mut array = self.arrays.remove(&datum).expect("it has a layout");
            if !array.loose {
                self.begins_with(task, time, life, of_array, &mut array);
            }
            self.arrays.insert(datum, array);
        }
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
                let own = (array.adopted == Some(part.device)).then_some(&array.whole);
                let wants = wants(accesses, part.member, part.members, own);
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
            array.write(piece, launched);
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
        array.pieces.0.visit(&bounds, &mut |piece, exact| {
            // What an attempt before it left is anybody's guess.
            let other = piece.sound && piece.writer != task;
            if !other || !(exact || piece.region.overlaps(&want.region)) {
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

/// Disjoint pieces of an array.
struct Pieces(Tree<Piece>);

impl Pieces {
    fn put(&mut self, axes: &Axes, piece: Piece) {
        self.0.insert(Bounds::of(&piece.region, axes), piece);
    }

    /// Calls `f` with the piece that has just this region, if there is one.
    fn exact(&mut self, axes: &Axes, region: &Region, f: &mut impl FnMut(&mut Piece)) -> bool {
        let mut found = false;
        self.0.visit_mut(&Bounds::of(region, axes), &mut |piece| {
            if piece.region == *region {
                found = true;
                f(piece);
            }
        });
        found
    }

    /// Takes out the pieces within a region; what others have of it is cut off.
    fn cut(&mut self, axes: &Axes, region: &Region) -> Vec<Piece> {
        let bounds = Bounds::of(region, axes);
        let mut taken = Vec::new();
        let overlaps = &mut |piece: &Piece| piece.region.overlaps(region);
        self.0.extract(Some(&bounds), overlaps, &mut taken);
        for piece in &mut taken {
            if region.contains(&piece.region) {
                continue;
            }
            for rest in piece.region.difference(region) {
                let rest = Piece {
                    region: rest,
                    holders: piece.holders.clone(),
                    ..*piece
                };
                self.put(axes, rest);
            }
            piece.region = piece.region.intersection(region);
        }
        taken
    }

    /// Changes the pieces within a region; what others have of it becomes pieces.
    fn update(&mut self, axes: &Axes, region: &Region, f: &mut impl FnMut(&mut Piece)) {
        if !self.exact(axes, region, f) {
            for mut piece in self.cut(axes, region) {
                f(&mut piece);
                self.put(axes, piece);
            }
        }
    }

    /// Puts a piece in the place of all that is there; gives that.
    fn replace(&mut self, axes: &Axes, new: Piece) -> SmallVec<[Piece; 1]> {
        let mut old = SmallVec::new();
        let region = new.region.clone();
        let mut new = Some(new);
        self.exact(axes, &region, &mut |piece| {
            old.extend(new.take().map(|new| std::mem::replace(piece, new)));
        });
        if let Some(new) = new {
            old.extend(self.cut(axes, &region));
            self.put(axes, new);
        }
        old
    }
}

/// Copies what was there before somebody wrote who may not be launched at that time; false if all of it
/// is not there.
fn copy_former(
    (former, axes): (&mut Tree<(Piece, u64)>, &Axes),
    last: &Piece,
    (source, target): (&Place, &Place),
    time: u64,
    copy: usize,
) -> bool {
    let region = &last.region;
    let bounds = Bounds::of(region, axes);
    let mut found = 0;
    let matches = |(piece, launched): &(Piece, u64)| {
        let has = |(place, _): &(Place, Since)| place == source;
        *launched >= time && piece.holders.iter().any(has) && piece.region.overlaps(region)
    };
    former.visit(&bounds, &mut |one, _| {
        if matches(one) {
            found += one.0.region.intersection(region).elements();
        }
    });
    if found != region.elements() {
        return false;
    }
    former.visit_mut(&bounds, &mut |one| {
        if matches(one) {
            one.0.holders.push((target.clone(), Since::Copy(copy)));
        }
    });
    true
}

impl Array {
    fn new(shape: &[u64], loose: bool) -> Self {
        let axes = Axes::longest(shape);
        let whole = Rc::new(Region::whole(shape));
        let mut pieces = Pieces(Tree::new());
        if !whole.is_empty() {
            let place = Place {
                device: HOST,
                instance: Rc::clone(&whole),
            };
            let all = Piece {
                region: Region::clone(&whole),
                writer: 0,
                sound: true,
                holders: SmallVec::from_iter([(place, Since::Ever)]),
            };
            pieces.put(&axes, all);
        }
        Self {
            axes,
            whole,
            pieces,
            former: Tree::new(),
            uses: Tree::new(),
            adopted: None,
            loose,
        }
    }

    /// It is in memory of a device, behind an event, and never was on the host.
    fn adopts(&mut self, place: &Place, at: usize) {
        self.adopted = Some(place.device);
        self.pieces.0.visit_mut(&Bounds::ALL, &mut |piece| {
            piece.holders = SmallVec::from_iter([(place.clone(), Since::Copy(at))]);
        });
    }

    /// Puts what somebody writes in the place of what is there. That is kept aside, unless it is that of an
    /// attempt before, if it is known when the writer had been launched at the latest.
    fn write(&mut self, new: Piece, launched: Option<u64>) {
        let (region, writer) = (new.region.clone(), new.writer);
        let mut old = self.pieces.replace(&self.axes, new);
        old.retain(|piece| piece.writer != writer);
        let Some(launched) = launched else {
            return self.forget_former(&region);
        };
        if let [piece] = &mut old[..]
            && piece.region == region
        {
            let mut found = false;
            let bounds = Bounds::of(&region, &self.axes);
            self.former.visit_mut(&bounds, &mut |(former, until)| {
                if former.region == region {
                    found = true;
                    std::mem::swap(former, piece);
                    *until = launched;
                }
            });
            if found {
                return;
            }
        }
        self.forget_former(&region);
        for piece in old {
            self.keep_former(piece, launched);
        }
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

    fn drop_instance(&mut self, place: &Place) {
        let bounds = Bounds::of(&place.instance, &self.axes);
        self.pieces.0.visit_mut(&bounds, &mut |piece| {
            piece.holders.retain(|(other, _)| other != place);
        });
        self.former.visit_mut(&bounds, &mut |(piece, _)| {
            piece.holders.retain(|(other, _)| other != place);
        });
        self.uses.visit_mut(&bounds, &mut |uses| {
            uses.list.retain(|one| one.place != *place);
        });
    }

    /// Takes note of a copy, instead of an earlier one like it on its stream.
    fn note_use(&mut self, region: &Region, new: Use) {
        let bounds = Bounds::of(region, &self.axes);
        let mut new = Some(new);
        self.uses.visit_mut(&bounds, &mut |uses| {
            if uses.region == *region
                && let Some(new) = new.take()
            {
                let like = |old: &&mut Use| old.end.at.0 == new.end.at.0 && old.place == new.place;
                match uses.list.iter_mut().find(like) {
                    Some(old) => *old = new,
                    None => uses.list.push(new),
                }
            }
        });
        if let Some(new) = new {
            let uses = Uses {
                region: region.clone(),
                list: SmallVec::from_iter([new]),
            };
            self.uses.insert(bounds, uses);
        }
    }

    /// The copies that are in use where somebody writes, without those that no part is left of.
    fn take_uses(&mut self, place: &Place, region: &Region) -> SmallVec<[(Region, Use); 2]> {
        let bounds = Bounds::of(region, &self.axes);
        let mut taken: SmallVec<[(Region, Use); 2]> = SmallVec::new();
        let mut emptied = false;
        self.uses.visit_mut(&bounds, &mut |uses| {
            if uses.region.overlaps(region) {
                uses.list.retain(|one| {
                    let goes = one.place == *place;
                    if goes {
                        taken.push((uses.region.clone(), one.clone()));
                    }
                    !goes
                });
                emptied |= uses.list.is_empty() && uses.region != *region;
            }
        });
        if emptied {
            let empty = &mut |uses: &Uses| uses.list.is_empty() && uses.region != *region;
            self.uses.extract(Some(&bounds), empty, &mut Vec::new());
        }
        for (part, one) in taken.iter().filter(|(part, _)| part != region) {
            for rest in part.difference(region) {
                self.note_use(&rest, one.clone());
            }
        }
        taken
    }
}
