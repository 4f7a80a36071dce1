//! The book of one device: what is at rest, what is in flight, and its streams.

use std::collections::VecDeque;

use smallvec::SmallVec;

use super::request::{Capacity, Coming, WHOLE};
use crate::hash::QuickMap;
use crate::machine::{DeviceId, Event, Stream};
use crate::task::state::validate;

/// How many tasks run ahead however long they take, and which run times are enough beside that, in
/// nanoseconds: what the host needs to launch the next ones is far less. More would only decide too early,
/// before it is known who becomes ready meanwhile.
const TASKS_AHEAD: u32 = 4;
const AHEAD: u64 = 2_000_000;

/// Compute and memory of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Amount {
    /// In 1/[`WHOLE`].
    pub(super) share: u32,
    /// In bytes.
    pub(super) memory: u64,
}

impl Amount {
    fn add(&mut self, other: Self) {
        self.share += other.share;
        self.memory += other.memory;
    }

    /// Holds may be for more than there is.
    pub(super) fn hold(&mut self, other: Self) {
        self.share = self.share.saturating_add(other.share);
        self.memory = self.memory.saturating_add(other.memory);
    }

    /// Takes as much as there is of what is wanted, which becomes less.
    fn lend(&mut self, wanted: &mut Self) -> bool {
        let share = self.share.min(wanted.share);
        let memory = self.memory.min(wanted.memory);
        self.share -= share;
        wanted.share -= share;
        self.memory -= memory;
        wanted.memory -= memory;
        share > 0 || memory > 0
    }

    fn covers(self, wanted: Self) -> bool {
        self.share >= wanted.share && self.memory >= wanted.memory
    }

    fn without(self, held: Self) -> Self {
        Self {
            share: self.share.saturating_sub(held.share),
            memory: self.memory.saturating_sub(held.memory),
        }
    }

    pub(super) fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

/// What a task weighs on a device from its grant until it is complete there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    /// Whether it has a share; those without are counted apart.
    pub(super) shares: bool,
    /// Its estimated run time, or 0.
    pub(super) nanoseconds: u64,
}

/// A place on a device's timeline: when it is reached, as estimated, in nanoseconds of a clock that all
/// devices share, and how many tasks the device was granted up to there.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Due {
    pub(super) nanoseconds: u64,
    pub(super) tasks: u64,
}

/// What was given back behind an event and nobody has taken over yet.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Flight {
    stream: usize,
    position: u64,
    amount: Amount,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Track {
    number: u32,
    lent: bool,
    /// The last position that a body left.
    last: u64,
    /// The last position that is known to be complete.
    done: u64,
    /// Whether `Book::resting` names it.
    listed: bool,
    /// Work on it failed: what is put on it fails too.
    failed: bool,
    /// The launched tasks that are not complete, in order of their positions, and their places.
    launched: VecDeque<(u64, Load, Due)>,
}

impl Track {
    fn rests(&self) -> bool {
        !self.lent && !self.failed && self.last <= self.done
    }
}

/// What a grant took of a device.
#[derive(Debug)]
pub(super) struct Taken {
    /// The stream's index, unless a new one is to be made.
    pub(super) stream: Option<usize>,
    pub(super) waits: SmallVec<[Event; 2]>,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Book {
    pub(super) id: DeviceId,
    pub(super) lost: bool,
    /// See [`Capacity::fails_whole`].
    fails_whole: bool,
    /// All its memory, and what of it paused bodies keep.
    memory: u64,
    kept: u64,
    /// What nobody has and no launched task uses any more.
    rest: Amount,
    /// The sum of `flights`.
    flying: Amount,
    /// Oldest first.
    flights: VecDeque<Flight>,
    /// Tasks with a share that were granted and are not complete, but for paused ones.
    unfinished: u32,
    /// The same for tasks without a share.
    aside: u32,
    /// The estimated run times of both.
    pub(super) ahead: u64,
    /// When all that was granted is complete, as estimated.
    end: u64,
    /// When the host's link to it is free, as estimated.
    inbound: u64,
    /// Up to where tasks are complete.
    pub(super) past: Due,
    /// The last grant, by number.
    pub(super) tail: u64,
    tracks: Vec<Track>,
    /// Their places by the streams' numbers.
    places: QuickMap<u32, usize>,
    /// Streams that rest, or did when they were put here.
    resting: Vec<usize>,
}

impl Book {
    pub(super) fn new(capacity: &Capacity) -> Self {
        Self {
            id: capacity.id,
            lost: false,
            fails_whole: capacity.fails_whole,
            memory: capacity.memory,
            kept: 0,
            rest: Amount {
                share: WHOLE,
                memory: capacity.memory,
            },
            flying: Amount::default(),
            flights: VecDeque::new(),
            unfinished: 0,
            aside: 0,
            ahead: 0,
            end: 0,
            inbound: 0,
            past: Due::default(),
            tail: 0,
            tracks: Vec::new(),
            places: QuickMap::default(),
            resting: Vec::new(),
        }
    }

    /// The device is gone, and with it all that anybody had of it.
    pub(super) fn lose(&mut self) {
        self.lost = true;
        self.flights.clear();
        self.tracks.clear();
        self.places.clear();
        self.resting.clear();
    }

    /// What is before the end of the work up to the event, as estimated; none if it is known to be complete.
    /// `now` is the clock's time.
    pub(super) fn due(&self, event: Event, now: u64) -> Option<(u64, u32)> {
        let track = &self.tracks[self.track(event.stream)?];
        if track.done >= event.position {
            return None;
        }
        let mut launched = track.launched.iter();
        let due = launched.find(|launched| launched.0 >= event.position);
        let Some((_, _, due)) = due else {
            return Some((self.ahead, self.unfinished()));
        };
        let tasks = due.tasks.saturating_sub(self.past.tasks);
        Some((
            due.nanoseconds.saturating_sub(now),
            u32::try_from(tasks).unwrap_or(u32::MAX),
        ))
    }

    pub(super) fn unfinished(&self) -> u32 {
        self.unfinished + self.aside
    }

    /// Whether all that was granted is complete, or of bodies that are paused, and nothing of what those gave
    /// back is still in flight.
    pub(super) fn is_at_rest(&self) -> bool {
        self.unfinished() == 0 && self.flights.is_empty()
    }

    /// Whether a task could start here, if `held` were somebody else's.
    pub(super) fn fits(&self, wanted: Amount, held: Amount, runahead: u32) -> bool {
        if self.lost || (wanted.share == 0 && self.aside >= runahead.max(1)) {
            return false;
        }
        self.fits_at_rest(wanted, held)
            || (self.may_follow(wanted, runahead) && self.both().without(held).covers(wanted))
    }

    /// Whether a task with a share may start here at all: some of it is at rest, or in flight and may be taken.
    pub(super) fn is_open(&self, runahead: u32) -> bool {
        let flies = self.flying.share > 0 && runahead > self.unfinished;
        !self.lost && (self.rest.share > 0 || flies)
    }

    /// Whether it needs nothing of what is in flight.
    pub(super) fn fits_at_rest(&self, wanted: Amount, held: Amount) -> bool {
        self.rest.without(held).covers(wanted)
    }

    /// Whether a task may take what is in flight.
    fn may_follow(&self, wanted: Amount, runahead: u32) -> bool {
        if wanted.share == 0 {
            return runahead > self.aside;
        }
        if runahead <= self.unfinished {
            return false;
        }
        // Asked for each device at each grant: to divide is the exception.
        if self.unfinished < TASKS_AHEAD || self.ahead < AHEAD {
            return true;
        }
        let side_by_side = WHOLE / wanted.share;
        self.unfinished / side_by_side < TASKS_AHEAD || self.ahead / u64::from(side_by_side) < AHEAD
    }

    /// The same for a body that wants its share back: it was counted when it started.
    pub(super) fn fits_again(&self, wanted: Amount, held: Amount, runahead: u32) -> bool {
        self.lost
            || self.fits_at_rest(wanted, held)
            || (runahead > 0 && self.both().without(held).covers(wanted))
    }

    /// Whether a task could start here when those who have a part of it now give it back.
    pub(super) fn could_fit(&self, wanted: Amount) -> bool {
        !self.lost && self.has_room(wanted.memory)
    }

    /// Whether a task could ever start here while paused bodies keep their memory.
    pub(super) fn has_room(&self, memory: u64) -> bool {
        self.memory - self.kept >= memory
    }

    /// A body that has so much memory is paused: it keeps that, and is not counted.
    pub(super) fn pause(&mut self, memory: u64, load: Load) {
        self.kept += memory;
        self.discount(load);
    }

    /// A body that was paused goes on.
    pub(super) fn resume(&mut self, memory: u64, load: Load) {
        self.kept -= memory;
        self.count(load, 0);
    }

    fn both(&self) -> Amount {
        let mut both = self.rest;
        both.add(self.flying);
        both
    }

    fn track(&self, stream: Stream) -> Option<usize> {
        self.places.get(&stream.number).copied()
    }

    fn event(&self, track: usize, position: u64) -> Event {
        Event {
            stream: self.stream(track),
            position,
        }
    }

    pub(super) fn stream(&self, track: usize) -> Stream {
        Stream {
            device: self.id,
            number: self.tracks[track].number,
        }
    }

    /// The stream on which a predecessor's event lies, if it can be taken over: nobody has it, and
    /// nobody else's work came behind the event.
    pub(super) fn takeover(&self, event: Event) -> Option<usize> {
        let index = self.track(event.stream)?;
        let track = &self.tracks[index];
        (track.rests() || (!track.lent && !track.failed && track.last <= event.position))
            .then_some(index)
    }

    /// When the device is free, in nanoseconds from `now`: its timeline may have gaps, in which it waits for
    /// data, and who runs may take longer than estimated.
    pub(super) fn free(&self, now: u64) -> u64 {
        self.end.saturating_sub(now).max(self.ahead)
    }

    /// When the data of a task are there that can be copied from then on, in nanoseconds from `now`: over the
    /// host's link those of the tasks that were granted before come first.
    pub(super) fn arrival(&self, now: u64, ready: u64, data: Coming) -> u64 {
        let there = ready.saturating_add(data.time);
        if data.from_host == 0 {
            return there;
        }
        let first = self.inbound.saturating_sub(now);
        there.max(first.max(ready).saturating_add(data.from_host))
    }

    /// Counts the data of a task that was granted, which can be copied from that time on.
    pub(super) fn expect(&mut self, ready: u64, data: Coming) {
        if data.from_host > 0 {
            self.inbound = self.inbound.max(ready).saturating_add(data.from_host);
        }
    }

    /// Counts a task that was granted and does not begin before that time, and says where it ends.
    pub(super) fn count(&mut self, load: Load, begin: u64) -> Due {
        self.end = self.end.max(begin) + load.nanoseconds;
        self.ahead += load.nanoseconds;
        if load.shares {
            self.unfinished += 1;
        } else {
            self.aside += 1;
        }
        Due {
            nanoseconds: self.end,
            tasks: self.past.tasks + u64::from(self.unfinished()),
        }
    }

    fn discount(&mut self, load: Load) {
        self.past.tasks += 1;
        self.ahead -= load.nanoseconds;
        if load.shares {
            self.unfinished -= 1;
        } else {
            self.aside -= 1;
        }
    }

    /// Takes what fits, and a stream: that of a preferred event if there is one, else one that rests.
    /// That of a task whose share it takes over, for which it waits anyway, only where a failure is the
    /// whole device's: elsewhere a stream whose work fails fails all that is behind it there, and the two
    /// have nothing to do with each other.
    pub(super) fn take(&mut self, wanted: Amount, prefer: &[Event], runahead: u32) -> Taken {
        let may_follow = self.may_follow(wanted, runahead);
        let preferred = prefer
            .iter()
            .rev()
            .filter(|event| event.stream.device == self.id)
            .find_map(|&event| self.takeover(event))
            .filter(|&track| may_follow || self.tracks[track].rests());
        let flights = self.take_amount(wanted, preferred);
        let followed = || {
            let last = flights.iter().rev().filter(|_| self.fails_whole);
            last.map(|&(track, position)| self.event(track, position))
                .find_map(|event| self.takeover(event))
        };
        let stream = preferred.or_else(followed);
        let stream = stream.or_else(|| self.take_resting());
        if let Some(track) = stream {
            validate(
                !self.tracks[track].lent,
                "a stream is lent to one body at a time",
            );
            self.tracks[track].lent = true;
        }
        Taken {
            stream,
            waits: self.waits(&flights, stream),
        }
    }

    /// Takes what fits for a body that has that stream already.
    pub(super) fn take_again(
        &mut self,
        wanted: Amount,
        stream: Option<usize>,
    ) -> SmallVec<[Event; 2]> {
        let flights = self.take_amount(wanted, stream);
        self.waits(&flights, stream)
    }

    /// Takes what is in flight on the stream that the task uses, where it costs no wait; then what
    /// is at rest; then what is in flight elsewhere, oldest first. Tells behind what the last part
    /// is.
    fn take_amount(
        &mut self,
        mut wanted: Amount,
        stream: Option<usize>,
    ) -> SmallVec<[(usize, u64); 4]> {
        let mut behind = SmallVec::new();
        let before = wanted;
        if stream.is_some() && !self.flights.is_empty() {
            for flight in &mut self.flights {
                if Some(flight.stream) == stream {
                    flight.amount.lend(&mut wanted);
                }
            }
        }
        let own = wanted;
        self.rest.lend(&mut wanted);
        let after_rest = wanted;
        if !wanted.is_nothing() {
            for flight in &mut self.flights {
                if flight.amount.lend(&mut wanted) {
                    behind.push((flight.stream, flight.position));
                }
            }
        }
        self.flying.share -= (before.share - own.share) + (after_rest.share - wanted.share);
        self.flying.memory -= (before.memory - own.memory) + (after_rest.memory - wanted.memory);
        validate(wanted.is_nothing(), "grants do not exceed a device");
        self.flights.retain(|flight| !flight.amount.is_nothing());
        behind
    }

    /// The last event of each stream but the task's own.
    fn waits(&self, flights: &[(usize, u64)], own: Option<usize>) -> SmallVec<[Event; 2]> {
        let mut waits: SmallVec<[Event; 2]> = SmallVec::new();
        for &(track, position) in flights {
            if Some(track) == own {
                continue;
            }
            let event = self.event(track, position);
            match waits.iter_mut().find(|wait| wait.stream == event.stream) {
                Some(wait) => wait.position = wait.position.max(position),
                None => waits.push(event),
            }
        }
        waits
    }

    fn take_resting(&mut self) -> Option<usize> {
        while let Some(index) = self.resting.pop() {
            self.tracks[index].listed = false;
            if self.tracks[index].rests() {
                return Some(index);
            }
        }
        None
    }

    fn list_if_resting(&mut self, index: usize) {
        let track = &mut self.tracks[index];
        if track.rests() && !track.listed {
            track.listed = true;
            self.resting.push(index);
        }
    }

    /// The stream of an event that a body left: the one that was lent to it, or a new one.
    pub(super) fn arrive(&mut self, lent: Option<usize>, event: Event) -> usize {
        if let Some(index) = lent {
            validate(
                self.stream(index) == event.stream,
                "a body's events lie on the streams that were lent to it",
            );
            return index;
        }
        validate(
            self.track(event.stream).is_none() && event.stream.device == self.id,
            "a stream that was made for a body is a new one of its device",
        );
        self.places.insert(event.stream.number, self.tracks.len());
        self.tracks.push(Track {
            number: event.stream.number,
            lent: true,
            last: 0,
            done: 0,
            listed: false,
            failed: false,
            launched: VecDeque::new(),
        });
        self.tracks.len() - 1
    }

    /// Gives back, behind the position if the work up to it is not complete.
    pub(super) fn give_back(&mut self, amount: Amount, behind: Option<(usize, u64)>) {
        match behind {
            Some((stream, position)) if self.tracks[stream].done < position => {
                if !amount.is_nothing() {
                    self.flying.add(amount);
                    self.flights.push_back(Flight {
                        stream,
                        position,
                        amount,
                    });
                }
            }
            _ => self.rest.add(amount),
        }
    }

    /// The body returned: its stream is free, and the task is complete once the position is.
    pub(super) fn launch(&mut self, stream: usize, position: u64, load: Load, due: Due) {
        let track = &mut self.tracks[stream];
        track.lent = false;
        track.last = track.last.max(position);
        if track.done < position {
            track.launched.push_back((position, load, due));
        } else {
            self.past.nanoseconds = self.past.nanoseconds.max(due.nanoseconds);
            self.discount(load);
            self.list_if_resting(stream);
        }
    }

    /// The body returned and left nothing on the stream.
    pub(super) fn abandon(&mut self, stream: Option<usize>, load: Load) {
        self.discount(load);
        if let Some(stream) = stream {
            self.tracks[stream].lent = false;
            self.list_if_resting(stream);
        }
    }

    /// Work on the stream failed: nobody gets it any more.
    pub(super) fn fail(&mut self, stream: Stream) {
        if let Some(index) = self.track(stream) {
            self.tracks[index].failed = true;
        }
    }

    /// The work of a stream is complete up to the position.
    pub(super) fn complete(&mut self, event: Event) {
        let Some(index) = self.track(event.stream) else {
            return;
        };
        let track = &mut self.tracks[index];
        if event.position <= track.done {
            return;
        }
        track.done = event.position;
        while let Some(&(position, load, due)) = self.tracks[index].launched.front() {
            if position > event.position {
                break;
            }
            self.tracks[index].launched.pop_front();
            self.past.nanoseconds = self.past.nanoseconds.max(due.nanoseconds);
            self.discount(load);
        }
        let (rest, flying) = (&mut self.rest, &mut self.flying);
        self.flights.retain(|flight| {
            let flies = flight.stream != index || flight.position > event.position;
            if !flies {
                rest.add(flight.amount);
                flying.share -= flight.amount.share;
                flying.memory -= flight.amount.memory;
            }
            flies
        });
        self.list_if_resting(index);
    }
}
