//! Which device work is before which, by what the device layer logged alone.
//!
//! Work of a stream has a position. Work at one position is before work at another if
//!
//! * it is earlier on the same stream, or
//! * the stream of the later one was told to wait, at or before that position, for an event at or
//!   behind the earlier one, or for one that is behind it in this way, or
//! * the host saw it complete before the later one was enqueued.
//!
//! An event is a position too: all up to it. When it is complete, so is all that is before it, since
//! a stream waits for what it was told to wait for, also behind a failure. A device that is lost is the
//! exception: behind the position where a stream was *abandoned* nothing waited, and nothing ran.
//!
//! Records are taken in the order of their times. What the host has seen is one position a stream, up to
//! which all is complete, and which it was at each moment is kept. Besides that, each stream has a *clock*
//! for each wait: of other streams the positions that work from there on is behind. What the host has seen
//! already is left out of clocks, so that they are as long as there are streams with work in flight. A clock
//! without it is as good, since whoever asks later has seen that too. The positions of all clocks lie one
//! behind the other in one list, and a clock is its part of that.

use std::collections::HashMap;

use smallvec::SmallVec;

use super::numbers::ByNumber;
use super::record::stream_word;
use crate::machine::{Event, Observed, Stream};
use crate::trace::record::{DeviceEvent, DeviceRecord};

/// The number of a stream, in the order in which the trace first names them.
pub(super) type Track = u32;

/// A position on a stream.
pub(super) type Position = (Track, u64);

/// Where work ends on a stream, and from which moment on the host had seen that it is complete.
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    pub(super) at: Position,
    seen: Option<u64>,
}

impl End {
    /// Whether the host had seen by then that all up to it is complete.
    #[inline]
    pub(super) fn is_seen(&self, moment: u64) -> bool {
        self.seen.is_some_and(|seen| seen <= moment)
    }
}

/// Positions that something is behind, by stream: which ones of the list of all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    begin: u32,
    len: u32,
}

#[derive(Debug)]
struct Line {
    stream: Stream,
    /// Up to where the host saw that all is complete, from which moment on; both only grow.
    seen: Vec<(u64, u64)>,
    /// The last position that was told of.
    last: u64,
    /// The first position that failed. What is behind it did not run.
    failed: u64,
    /// The last position that ran or waited before the device was lost.
    abandoned: u64,
    /// From which position on work is behind what, by position; each has all before it.
    waits: Vec<(u64, Clock)>,
}

/// What is known up to some record.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    numbers: ByNumber<Track>,
    lines: Vec<Line>,
    positions: Vec<Position>,
}

impl Evidence {
    /// Where streams ended early, of the whole trace: that decides what ran at all.
    pub(super) fn new(records: &[DeviceRecord]) -> Self {
        let mut evidence = Self::default();
        let mut abandoned: HashMap<Track, u64> = HashMap::new();
        for record in records {
            match record.event {
                DeviceEvent::Observed(Observed::Failed(event)) => {
                    let line = evidence.track(event.stream) as usize;
                    let line = &mut evidence.lines[line];
                    line.failed = line.failed.min(event.position);
                }
                DeviceEvent::Observed(Observed::Abandoned(event)) => {
                    let track = evidence.track(event.stream);
                    // What ran when the device was lost is told of twice, when it is and afterwards.
                    let last = abandoned.entry(track).or_default();
                    *last = event.position.max(*last);
                }
                _ => {}
            }
        }
        for (track, position) in abandoned {
            evidence.lines[track as usize].abandoned = position;
        }
        evidence
    }

    /// The number of a stream.
    pub(super) fn track(&mut self, stream: Stream) -> Track {
        *self.numbers.entry(stream_word(stream)).or_insert_with(|| {
            self.lines.push(Line {
                stream,
                seen: Vec::new(),
                last: 0,
                failed: u64::MAX,
                abandoned: u64::MAX,
                waits: Vec::new(),
            });
            Track::try_from(self.lines.len() - 1).expect("fewer than 2^32 streams")
        })
    }

    /// The number of a stream, if the trace names it.
    pub(super) fn known(&self, stream: Stream) -> Option<Track> {
        self.numbers.get(&stream_word(stream)).copied()
    }

    pub(super) fn stream(&self, track: Track) -> Stream {
        self.lines[track as usize].stream
    }

    /// Whether the work at a position runs, or is dropped behind a failure.
    pub(super) fn runs(&self, (track, position): Position) -> bool {
        let line = &self.lines[track as usize];
        position <= line.failed.min(line.abandoned)
    }

    /// Whether the stream was abandoned with its device.
    pub(super) fn is_lost(&self, track: Track) -> bool {
        self.lines[track as usize].abandoned != u64::MAX
    }

    /// The last position of a stream that can have run or waited.
    pub(super) fn limit(&self, track: Track) -> u64 {
        let line = &self.lines[track as usize];
        line.failed.min(line.abandoned)
    }

    /// The last position of the stream that was told of so far.
    pub(super) fn last(&self, track: Track) -> u64 {
        self.lines[track as usize].last
    }

    /// Takes a record in. Moments are the caller's: they only grow.
    pub(super) fn learn(&mut self, observed: Observed, moment: u64) {
        match observed {
            Observed::Waits {
                stream,
                from,
                event,
            } => self.wait(stream, from, event),
            Observed::Synchronised(event) | Observed::Seen(event) => self.see(event, moment),
            Observed::Enqueued(event, _) | Observed::Recorded(event) => {
                let track = self.track(event.stream);
                let last = &mut self.lines[track as usize].last;
                *last = event.position.max(*last);
            }
            Observed::Created(_)
            | Observed::Completed(_)
            | Observed::Failed(_)
            | Observed::Abandoned(_) => {}
        }
    }

    fn wait(&mut self, stream: Stream, from: u64, event: Event) {
        let (track, other) = (self.track(stream), self.track(event.stream));
        let last = &mut self.lines[track as usize].last;
        // A wait for what is complete takes no position: `from` is that of what comes next.
        *last = (*last).max(from.saturating_sub(1));
        if from > self.lines[track as usize].abandoned || track == other {
            return;
        }
        let event = (other, event.position);
        let new = self.clock(event);
        let waits = &self.lines[track as usize].waits;
        // Threads that free memory make streams wait too, so that two may be told out of order.
        let at = until(waits, from);
        let before = at.checked_sub(1).map(|before| waits[before].1);
        let clock = self.merged(before, new, event, track);
        for later in at..self.lines[track as usize].waits.len() {
            let (_, clock) = self.lines[track as usize].waits[later];
            let merged = self.merged(Some(clock), new, event, track);
            self.lines[track as usize].waits[later].1 = merged;
        }
        self.lines[track as usize].waits.insert(at, (from, clock));
    }

    /// The later of two clocks and an event for each stream, without what the host has seen, and without
    /// `own`.
    fn merged(
        &mut self,
        one: Option<Clock>,
        other: Option<Clock>,
        event: Position,
        own: Track,
    ) -> Clock {
        let clocks = [one, other].into_iter().flatten();
        let positions = clocks.flat_map(|clock| self.positions(clock)).copied();
        let mut all: SmallVec<[Position; 32]> = positions
            .chain([event])
            .filter(|&position| position.0 != own && !self.is_seen(position))
            .collect();
        all.sort_unstable();
        // Of one stream the last is the largest.
        all.reverse();
        all.dedup_by_key(|position| position.0);
        all.reverse();
        let narrow = |number| u32::try_from(number).expect("fewer than 2^32 positions");
        let clock = Clock {
            begin: narrow(self.positions.len()),
            len: narrow(all.len()),
        };
        self.positions.extend_from_slice(&all);
        clock
    }

    fn positions(&self, clock: Clock) -> &[Position] {
        &self.positions[clock.begin as usize..][..clock.len as usize]
    }

    /// The end at a position, when all is known.
    pub(super) fn end(&self, at: Position) -> End {
        let seen = self.seen(at);
        End { at, seen }
    }

    /// What work at this position is behind on other streams, besides what the host has seen.
    pub(super) fn clock(&self, (track, position): Position) -> Option<Clock> {
        let waits = &self.lines[track as usize].waits;
        let at = until(waits, position);
        at.checked_sub(1).map(|at| waits[at].1)
    }

    /// What work is behind that is enqueued on the stream from now on.
    pub(super) fn now(&self, track: Track) -> Option<Clock> {
        let (_, clock) = self.lines[track as usize].waits.last()?;
        Some(*clock)
    }

    /// From which position on work is behind all that.
    pub(super) fn first(&self, track: Track) -> u64 {
        let last = self.lines[track as usize].waits.last();
        last.map_or(0, |&(from, _)| from)
    }

    /// Whether a clock has the position.
    pub(super) fn has(&self, clock: Option<Clock>, (track, position): Position) -> bool {
        let Some(clock) = clock else { return false };
        let positions = self.positions(clock);
        positions
            .binary_search_by_key(&track, |entry| entry.0)
            .is_ok_and(|at| positions[at].1 >= position)
    }

    fn see(&mut self, event: Event, moment: u64) {
        let end = (self.track(event.stream), event.position);
        if self.is_seen(end) {
            return;
        }
        self.raise(end, moment);
        if let Some(Clock { begin, len }) = self.clock(end) {
            for at in begin..begin + len {
                self.raise(self.positions[at as usize], moment);
            }
        }
    }

    fn raise(&mut self, (track, position): Position, moment: u64) {
        if !self.is_seen((track, position)) {
            self.lines[track as usize].seen.push((position, moment));
        }
    }

    /// Whether the host has seen by now that all up to the position is complete.
    pub(super) fn is_seen(&self, (track, position): Position) -> bool {
        let seen = self.lines[track as usize].seen.last();
        position <= seen.map_or(0, |&(seen, _)| seen)
    }

    /// The moment from which on the host had seen that all up to the position is complete; none if it has
    /// not by now.
    pub(super) fn seen(&self, (track, position): Position) -> Option<u64> {
        if position == 0 {
            return Some(0);
        }
        let seen = &self.lines[track as usize].seen;
        let at = seen.partition_point(|&(seen, _)| seen < position);
        seen.get(at).map(|&(_, moment)| moment)
    }
}

/// How many of the waits are at or before a position. Mostly it is that of late ones, so they are looked at
/// from the end on.
fn until(waits: &[(u64, Clock)], position: u64) -> usize {
    let mut reach = 1;
    while reach <= waits.len() && waits[waits.len() - reach].0 > position {
        reach *= 2;
    }
    let begin = waits.len().saturating_sub(reach);
    let end = waits.len() - reach / 2;
    begin + waits[begin..end].partition_point(|&(from, _)| from <= position)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::DeviceId;

    fn stream(number: u32) -> Stream {
        Stream {
            device: DeviceId::gpu(0),
            number,
        }
    }

    fn event(number: u32, position: u64) -> Event {
        Event {
            stream: stream(number),
            position,
        }
    }

    fn waits(number: u32, from: u64, event: Event) -> Observed {
        Observed::Waits {
            stream: stream(number),
            from,
            event,
        }
    }

    /// Whether work at a position of one stream is behind a position of another.
    fn behind(evidence: &mut Evidence, later: Event, earlier: Event) -> bool {
        let later = (evidence.track(later.stream), later.position);
        let earlier = (evidence.track(earlier.stream), earlier.position);
        evidence.is_seen(earlier) || evidence.has(evidence.clock(later), earlier)
    }

    #[test]
    fn waits_carry_what_is_behind_their_events_from_their_position_on() {
        let mut evidence = Evidence::default();
        evidence.learn(waits(1, 4, event(0, 7)), 1);
        evidence.learn(waits(2, 2, event(1, 3)), 1);
        evidence.learn(waits(2, 5, event(1, 4)), 1);
        assert!(!behind(&mut evidence, event(1, 3), event(0, 1)));
        assert!(behind(&mut evidence, event(1, 4), event(0, 7)));
        assert!(!behind(&mut evidence, event(1, 4), event(0, 8)));
        assert!(behind(&mut evidence, event(2, 2), event(1, 3)));
        assert!(!behind(&mut evidence, event(2, 4), event(0, 7)));
        assert!(behind(&mut evidence, event(2, 5), event(0, 7)));
    }

    #[test]
    fn waits_that_are_told_out_of_order_count_from_their_own_position_on() {
        let mut evidence = Evidence::default();
        evidence.learn(waits(1, 6, event(2, 1)), 1);
        evidence.learn(waits(1, 4, event(0, 1)), 1);
        assert!(behind(&mut evidence, event(1, 5), event(0, 1)));
        assert!(!behind(&mut evidence, event(1, 5), event(2, 1)));
        assert!(behind(&mut evidence, event(1, 6), event(0, 1)));
        assert!(behind(&mut evidence, event(1, 6), event(2, 1)));
    }

    #[test]
    fn what_the_host_sees_shows_all_before_it() {
        let mut evidence = Evidence::default();
        evidence.learn(waits(1, 1, event(0, 5)), 1);
        let track = evidence.track(stream(0));
        evidence.learn(Observed::Seen(event(0, 3)), 4);
        evidence.learn(Observed::Seen(event(1, 2)), 7);
        assert!(behind(&mut evidence, event(9, 1), event(0, 5)));
        assert!(!behind(&mut evidence, event(9, 1), event(0, 6)));
        let seen = |position| evidence.seen((track, position));
        assert_eq!([0, 2, 3, 4, 5].map(seen), [0, 4, 4, 7, 7].map(Some));
        assert_eq!(seen(6), None);
    }

    #[test]
    fn an_abandoned_stream_waits_for_nothing() {
        let records = [6, 5].map(|position| DeviceRecord {
            time: 9,
            task: 0,
            thread: 0,
            event: DeviceEvent::Observed(Observed::Abandoned(event(1, position))),
        });
        let mut evidence = Evidence::new(&records);
        evidence.learn(waits(1, 6, event(0, 1)), 1);
        evidence.learn(waits(1, 7, event(2, 1)), 1);
        assert!(behind(&mut evidence, event(1, 9), event(0, 1)));
        assert!(!behind(&mut evidence, event(1, 9), event(2, 1)));
        let track = evidence.track(stream(1));
        assert!(evidence.runs((track, 6)) && !evidence.runs((track, 7)));
    }
}
