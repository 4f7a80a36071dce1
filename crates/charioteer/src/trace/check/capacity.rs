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
//! So it is enough to find who takes what from whom. Uses are taken in the order in which the ledger
//! granted them. Each first takes what came before it on its own stream, then what it waits for, oldest
//! first, then what the host had seen complete before its body began. What the host has seen can
//! be taken by everybody who comes later, so that is what is spared. The ledger takes what is on the own
//! stream, then what is complete, then the oldest that is in flight, and the order in which things are
//! given back is logged as the ledger sees it. So whatever the ledger could hand on, this finds too.
//!
//! A use whose body never began, or whose work did not run since its device was lost, is none.

use std::collections::VecDeque;

use super::evidence::{Clock, Evidence, Position, Track, has};

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

/// A use of a device, from a grant until it is given back.
#[derive(Debug)]
pub(super) struct Use {
    pub(super) task: u64,
    pub(super) needs: Needs,
    /// By the number of the record: when it was granted, when its body began, when the host saw its
    /// end complete.
    granted: usize,
    pub(super) begun: Option<usize>,
    pub(super) seen: Option<usize>,
    /// Its stream, and what that was behind when the body began.
    pub(super) track: Option<Track>,
    pub(super) clock: Option<Clock>,
    /// Whether anything that its body enqueued ran.
    pub(super) worked: bool,
    /// The event behind which it was given back.
    pub(super) end: Option<Position>,
}

impl Use {
    pub(super) fn new(task: u64, needs: Needs, granted: usize) -> Self {
        Self {
            task,
            needs,
            granted,
            begun: None,
            seen: None,
            track: None,
            clock: None,
            worked: false,
            end: None,
        }
    }

    fn is_none(&self, evidence: &Evidence) -> bool {
        let lost = self.track.is_some_and(|track| evidence.is_lost(track));
        self.begun.is_none() || (lost && !self.worked)
    }
}

#[derive(Debug, Clone, Copy)]
enum Entry {
    Take(usize),
    Give(usize),
}

/// What a device has, and its uses in the ledger's order.
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

/// What was given back and nobody took over so far.
struct Piece {
    from: usize,
    left: u64,
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
            let mut pool = Pool {
                uses,
                rest: capacity,
                pieces: VecDeque::new(),
                held: VecDeque::new(),
            };
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

struct Pool<'a> {
    uses: &'a [Use],
    /// What can be taken by everybody.
    rest: u64,
    /// The others, in the order in which they were given back.
    pieces: VecDeque<Piece>,
    /// Who has how much.
    held: VecDeque<(usize, u64)>,
}

impl Pool<'_> {
    fn take(&mut self, using: usize) -> Option<Excess> {
        let uses = self.uses;
        let taker = &uses[using];
        let needs = taker.needs.amount();
        let mut wanted = needs;
        let seen_by =
            |piece: &Piece, record: usize| uses[piece.from].seen.is_some_and(|seen| seen <= record);
        // Nobody who is granted later begins before this.
        let rest = &mut self.rest;
        self.pieces.retain(|piece| {
            let rests = seen_by(piece, taker.granted);
            if rests {
                *rest += piece.left;
            }
            !rests
        });
        let begun = taker.begun.expect("a use without a body is none");
        let end = |piece: &Piece| {
            uses[piece.from]
                .end
                .expect("it was given back behind an event")
        };
        let own = |piece: &Piece| Some(end(piece).0) == taker.track;
        let waited_for = |piece: &Piece| has(taker.clock.as_ref(), end(piece));
        let seen = |piece: &Piece| seen_by(piece, begun);
        for may in [&own as &dyn Fn(&Piece) -> bool, &waited_for, &seen] {
            for piece in self.pieces.iter_mut().filter(|piece| may(piece)) {
                let part = piece.left.min(wanted);
                piece.left -= part;
                wanted -= part;
            }
        }
        let part = self.rest.min(wanted);
        self.rest -= part;
        wanted -= part;
        self.pieces.retain(|piece| piece.left > 0);
        if needs > 0 {
            self.held.push_back((using, needs - wanted));
        }
        if wanted == 0 {
            return None;
        }
        let in_flight = self.pieces.front().map(|piece| piece.from);
        let holds = |&&(other, amount): &&(usize, u64)| other != using && amount > 0;
        let held = self.held.iter().find(holds).map(|&(other, _)| other);
        Some(Excess {
            using,
            other: in_flight.or(held),
        })
    }

    fn give(&mut self, using: usize) {
        let Some(at) = self.held.iter().position(|&(other, _)| other == using) else {
            return;
        };
        let (_, left) = self.held.remove(at).expect("it is there");
        // Without an event it is gone with its device.
        if left > 0 && self.uses[using].end.is_some() {
            self.pieces.push_back(Piece { from: using, left });
        }
    }
}
