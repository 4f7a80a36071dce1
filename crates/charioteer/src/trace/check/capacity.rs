//! Whether grants ever exceed a device, at any moment of its timeline.
//!
//! A *use* of a device's compute or memory lasts from where its body begins on its stream until the
//! event behind which it was given back. Two uses may happen at the same moment unless the end of one is
//! before the beginning of the other, by the evidence. The most that a device may see at one moment
//! is the heaviest set of uses of which that holds for no two. By Dilworth's theorem that is no more
//! than the device has exactly if what the device has can be handed on: each use takes what it needs
//! from those whose end is before its beginning, or from what nobody used so far, and each piece goes
//! from hand to hand.
//!
//! So it is enough to find who takes what from whom. Uses are taken in the order in which their bodies
//! begin. Each first takes what came before it on its own stream, then what it waits for, oldest first,
//! as the ledger does, then what the host had seen complete before its body began. That can be taken by
//! everybody who comes later, so it is spared. Hardly ever nothing is left for a use though there
//! could be, since others took what it needs and could have taken something else. Then a path of such
//! exchanges is looked for, which makes the answer exact. A trace in which many uses find nothing is wrong
//! whatever an exact answer to the rest were, and paths are no longer looked for.
//!
//! A use whose body never began, or whose work did not run since its device was lost, is none. Neither is one
//! that ends before it begins: a wait for what is complete takes no position, so that the end of a body that
//! enqueued nothing behind it is not behind what the body waited for. To let such a use hand on what it took
//! would put those on both sides of it in an order that nothing made.

use std::collections::{HashMap, VecDeque};

use smallvec::SmallVec;

use crate::trace::evidence::{Clock, Evidence, Position, Track};

/// How many uses of a device may exceed it before it is no longer asked exactly by how much.
const THOROUGH: usize = 64;

/// How much of what.
#[derive(Clone, Copy, Debug)]
pub(super) enum Needs {
    /// Part of the device's compute.
    Share(u32),
    /// Bytes of its memory.
    Memory(u64),
}

impl Needs {
    fn amount(self) -> u64 {
        match self {
            Self::Share(share) => share.into(),
            Self::Memory(bytes) => bytes,
        }
    }

    pub(super) fn describe(self, book: &Book) -> String {
        match self {
            Self::Share(share) => format!("{share}/{} of the compute", book.share),
            Self::Memory(bytes) => format!("{bytes} of {} bytes of the memory", book.memory),
        }
    }
}

/// A use of a device, from where the body begins until it is given back.
#[derive(Debug)]
pub(super) struct Use {
    pub(super) task: u64,
    pub(super) needs: Needs,
    /// By the number of the record: when its body began, when the host saw its end complete.
    pub(super) begun: Option<u64>,
    pub(super) seen: Option<u64>,
    /// Its stream, and what that was behind when the body began.
    pub(super) track: Option<Track>,
    pub(super) clock: Option<Clock>,
    /// The first position there that is behind that.
    pub(super) first: u64,
    /// Whether anything that its body enqueued ran.
    pub(super) worked: bool,
    /// The event behind which it was given back.
    pub(super) end: Option<Position>,
}

impl Use {
    pub(super) fn new(task: u64, needs: Needs) -> Self {
        Self {
            task,
            needs,
            begun: None,
            seen: None,
            track: None,
            clock: None,
            first: 0,
            worked: false,
            end: None,
        }
    }

    fn is_none(&self, evidence: &Evidence) -> bool {
        let is_before = |end: Position| Some(end.0) == self.track && end.1 < self.first;
        let is_lost = |track| evidence.is_lost(track);
        self.end.is_some_and(is_before) || (!self.worked && self.track.is_none_or(is_lost))
    }
}

#[derive(Debug, Clone, Copy)]
enum Entry {
    Take(usize),
    Give(usize),
}

/// What a device has, and its uses as their bodies begin and as they are given back.
#[derive(Debug)]
pub(super) struct Book {
    share: u64,
    memory: u64,
    entries: Vec<Entry>,
}

/// A use that takes more than there is for it.
pub(super) struct Excess {
    pub(super) using: usize,
    /// Who has what is missing.
    pub(super) other: Option<usize>,
}

impl Book {
    pub(super) fn new(share: u64, memory: u64) -> Self {
        Self {
            share,
            memory,
            entries: Vec::new(),
        }
    }

    pub(super) fn take(&mut self, using: usize) {
        self.entries.push(Entry::Take(using));
    }

    pub(super) fn give(&mut self, using: usize) {
        self.entries.push(Entry::Give(using));
    }

    /// The uses that exceed the device.
    pub(super) fn settle(&self, uses: &[Use], evidence: &Evidence) -> Vec<Excess> {
        let mut excess = Vec::new();
        let is_share = |using: usize| matches!(uses[using].needs, Needs::Share(_));
        for (capacity, shares) in [(self.share, true), (self.memory, false)] {
            let mut pool = Pool::new(uses, evidence, capacity);
            for &entry in &self.entries {
                let (Entry::Take(using) | Entry::Give(using)) = entry;
                if is_share(using) != shares || uses[using].is_none(evidence) {
                    continue;
                }
                match entry {
                    Entry::Take(using) => excess.extend(pool.take(using)),
                    Entry::Give(using) => pool.give(using),
                }
            }
        }
        excess
    }
}

/// What a use took, and from whom; from nobody, if it was of what everybody could take.
struct Take {
    using: usize,
    parts: SmallVec<[(Option<usize>, u64); 2]>,
}

/// What was given back and nobody took over so far.
struct Piece {
    from: usize,
    left: u64,
}

/// Whether the host had seen the end of one use when the body of the other began.
fn is_seen(one: &Use, other: &Use) -> bool {
    one.seen.is_some() && one.seen <= other.begun
}

struct Pool<'a> {
    uses: &'a [Use],
    evidence: &'a Evidence,
    /// What can be taken by everybody.
    rest: u64,
    /// The others, in the order in which they were given back.
    pieces: VecDeque<Piece>,
    /// Who has how much.
    held: VecDeque<(usize, u64)>,
    takes: Vec<Take>,
    /// How many takes there were when a use was given back.
    given: HashMap<usize, usize>,
    /// How often a take exceeded what there was for it.
    excesses: usize,
}

impl<'a> Pool<'a> {
    fn new(uses: &'a [Use], evidence: &'a Evidence, capacity: u64) -> Self {
        Self {
            uses,
            evidence,
            rest: capacity,
            pieces: VecDeque::new(),
            held: VecDeque::new(),
            takes: Vec::new(),
            given: HashMap::new(),
            excesses: 0,
        }
    }

    fn end(&self, using: usize) -> Position {
        self.uses[using]
            .end
            .expect("pieces were given back behind an event")
    }

    /// Whether the end of one use is before the beginning of the other.
    fn is_before(&self, one: usize, other: usize) -> bool {
        let (end, other) = (self.end(one), &self.uses[other]);
        Some(end.0) == other.track
            || self.evidence.has(other.clock, end)
            || self.uses[one]
                .seen
                .is_some_and(|seen| Some(seen) <= other.begun)
    }

    fn take(&mut self, using: usize) -> Option<Excess> {
        let taker = &self.uses[using];
        let needs = taker.needs.amount();
        if needs == 0 {
            return None;
        }
        // Who begins later begins after what is before this.
        let (uses, rest) = (self.uses, &mut self.rest);
        self.pieces.retain(|piece| {
            let rests = is_seen(&uses[piece.from], taker);
            if rests {
                *rest += piece.left;
            }
            !rests
        });
        let mut take = Take {
            using,
            parts: SmallVec::new(),
        };
        let mut wanted = needs;
        for own in [true, false] {
            for at in 0..self.pieces.len() {
                let Piece { from, left } = self.pieces[at];
                let end = self.end(from);
                let may = if own {
                    Some(end.0) == taker.track
                } else {
                    self.evidence.has(taker.clock, end)
                };
                let part = left.min(wanted);
                if may && part > 0 {
                    self.pieces[at].left -= part;
                    wanted -= part;
                    take.parts.push((Some(from), part));
                }
            }
        }
        let part = self.rest.min(wanted);
        if part > 0 {
            self.rest -= part;
            wanted -= part;
            take.parts.push((None, part));
        }
        while wanted > 0 && self.excesses < THOROUGH {
            let Some((from, part)) = self.exchange(using, wanted) else {
                break;
            };
            wanted -= part;
            take.parts.push((from, part));
        }
        self.pieces.retain(|piece| piece.left > 0);
        self.held.push_back((using, needs - wanted));
        self.takes.push(take);
        if wanted == 0 {
            return None;
        }
        self.excesses += 1;
        let in_flight = self.pieces.front().map(|piece| piece.from);
        let holds = |&&(other, amount): &&(usize, u64)| other != using && amount > 0;
        let held = self.held.iter().find(holds).map(|&(other, _)| other);
        Some(Excess {
            using,
            other: in_flight.or(held),
        })
    }

    /// Finds something for a use that nothing is left for, by letting others take something else: a
    /// path from a piece that is left to one that this use may take, over those who took one and may
    /// take the other. Gives what came free, and from whom it was.
    fn exchange(&mut self, using: usize, wanted: u64) -> Option<(Option<usize>, u64)> {
        // By source: the take that may have it instead of a part, and the source of that part.
        let mut reached: HashMap<usize, Option<(usize, usize)>> = HashMap::new();
        let mut queue: VecDeque<usize> = VecDeque::new();
        for piece in self.pieces.iter().filter(|piece| piece.left > 0) {
            reached.insert(piece.from, None);
            queue.push_back(piece.from);
        }
        while let Some(source) = queue.pop_front() {
            for at in self.given[&source]..self.takes.len() {
                if !self.is_before(source, self.takes[at].using) {
                    continue;
                }
                for place in 0..self.takes[at].parts.len() {
                    let (from, part) = self.takes[at].parts[place];
                    let fits = from.is_none_or(|from| self.is_before(from, using));
                    if fits && part > 0 {
                        return Some(self.pass_on((at, from), source, &reached, wanted));
                    }
                    if let Some(from) = from
                        && part > 0
                        && !reached.contains_key(&from)
                    {
                        reached.insert(from, Some((at, source)));
                        queue.push_back(from);
                    }
                }
            }
        }
        None
    }

    /// Lets a take give up its part from somebody and have `source` instead, which another gives up in
    /// turn, until something is reached that is left.
    fn pass_on(
        &mut self,
        (at, freed): (usize, Option<usize>),
        source: usize,
        reached: &HashMap<usize, Option<(usize, usize)>>,
        wanted: u64,
    ) -> (Option<usize>, u64) {
        let mut steps = vec![(at, freed, source)];
        let mut last = source;
        while let Some((at, next)) = reached[&last] {
            steps.push((at, Some(last), next));
            last = next;
        }
        let piece = self.pieces.iter().position(|piece| piece.from == last);
        let piece = &mut self.pieces[piece.expect("the path begins at what is left")];
        let parts = steps.iter().map(|&(at, from, _)| {
            let parts = self.takes[at].parts.iter();
            let part = parts.filter(|part| part.0 == from).map(|part| part.1).max();
            part.expect("the path goes over a part")
        });
        let amount = parts.min().unwrap_or(0).min(piece.left).min(wanted);
        piece.left -= amount;
        for (at, from, instead) in steps {
            let parts = &mut self.takes[at].parts;
            let part = parts
                .iter_mut()
                .filter(|part| part.0 == from)
                .max_by_key(|part| part.1)
                .expect("the path goes over a part");
            part.1 -= amount;
            parts.retain(|part| part.1 > 0);
            parts.push((Some(instead), amount));
        }
        (freed, amount)
    }

    fn give(&mut self, using: usize) {
        let Some(at) = self.held.iter().position(|&(other, _)| other == using) else {
            return;
        };
        let (_, left) = self.held.remove(at).expect("it is there");
        // Without an event it is gone with its device.
        if left > 0 && self.uses[using].end.is_some() {
            self.pieces.push_back(Piece { from: using, left });
            self.given.insert(using, self.takes.len());
        }
    }
}
