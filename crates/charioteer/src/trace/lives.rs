//! When tasks accessed their data: from where to where, on the host and on streams.
//!
//! A body on cores accesses data from its first beginning to its last end, as its thread logged it. A
//! body on devices does by what is on its streams: from the first position after it [began] until the event
//! behind which it gave each of them back, and what its thread does meanwhile is no access. One with cores
//! and devices does both. Of what was enqueued on a stream, only what ran counts: neither what came behind a
//! failure nor what was on a device when that was lost.
//!
//! One life is before another if each of its ends is before each beginning of the other: of two on the host
//! by their times; an end on a stream before a beginning there by the [evidence], which is the order of the
//! stream, its waits, or that the host had seen the end complete before the body began; and an end on the
//! host before a beginning on a stream, if that body began later.
//!
//! [began]: super::DeviceEvent::Begun
//! [evidence]: super::evidence

use smallvec::SmallVec;

use super::evidence::{Clock, End, Evidence, Track};
use super::file::TraceFile;
use super::numbers::ByNumber;
use super::record::{DeviceEvent, Event};
use crate::machine::{DeviceId, HOST, Stream};

/// A task's time on the host: from when to when; one that has no end runs for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stay {
    pub(super) begin: u64,
    pub(super) end: u64,
}

/// A task's part of a stream, in one attempt.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) device: DeviceId,
    /// Which member of the set that is, of how many.
    pub(super) member: u16,
    pub(super) members: u16,
    pub(super) track: Track,
    /// When the body began, and when its device had been given back.
    pub(super) begun: u64,
    pub(super) returned: u64,
    /// What was on the stream then: the last position that is not of the body.
    before: u64,
    /// What it is behind on other streams.
    clock: Option<Clock>,
    /// The last position that is; one that was never given back has none.
    end: u64,
    /// The same, when all is known.
    over: Option<End>,
}

impl Part {
    pub(super) fn end(&self) -> End {
        self.over.expect("all is known")
    }

    /// Whether what ended at a position is before it.
    pub(super) fn is_behind(&self, end: End, evidence: &Evidence) -> bool {
        let (track, position) = end.at;
        (track == self.track && position <= self.before)
            || end.is_seen(self.begun)
            || evidence.has(self.clock, end.at)
    }
}

/// What a task did where.
#[derive(Clone, Debug, Default)]
pub(super) struct Life {
    pub(super) host: Option<Stay>,
    pub(super) parts: SmallVec<[Part; 1]>,
    /// The places in its set that are cores, beside the devices of others.
    pub(super) cores: SmallVec<[u16; 2]>,
}

impl Life {
    /// When its body began, the first time.
    pub(super) fn begin(&self) -> u64 {
        let parts = self.parts.iter().map(|part| part.begun);
        let host = self.host.map(|stay| stay.begin);
        parts.chain(host).min().unwrap_or(0)
    }

    /// Whether all of it comes after a moment on the host.
    pub(super) fn is_after(&self, moment: u64) -> bool {
        self.host.is_none_or(|stay| stay.begin >= moment)
            && self.parts.iter().all(|part| part.begun >= moment)
    }

    /// Whether all of it comes after a position on a stream.
    pub(super) fn is_behind(&self, end: End, evidence: &Evidence) -> bool {
        self.host.is_none_or(|stay| end.is_seen(stay.begin))
            && self.parts.iter().all(|part| part.is_behind(end, evidence))
    }
}

/// The lives of the tasks of a trace that began, and the evidence of all of it.
pub(super) struct Lives {
    pub(super) evidence: Evidence,
    of: ByNumber<Life>,
}

/// What is known of a task while the events of devices are read.
#[derive(Default)]
struct Open {
    streams: SmallVec<[Stream; 2]>,
    /// The devices of its grant, with their places in the set, and those of the cores.
    list: SmallVec<[(DeviceId, u16); 2]>,
    cores: SmallVec<[u16; 2]>,
    members: u16,
    begun: bool,
    /// Whether there was any grant of it, in any attempt, and one of cores.
    granted: bool,
    on_host: bool,
}

impl Lives {
    pub(super) fn new(trace: &TraceFile) -> Self {
        let mut lives = Self {
            evidence: Evidence::new(&trace.devices),
            of: ByNumber::default(),
        };
        let open = lives.read_devices(trace);
        lives.read_host(trace, &open);
        let evidence = &lives.evidence;
        lives.of.retain(|_, life| {
            life.parts.retain(|part| {
                let limit = evidence.limit(part.track);
                part.end = part.end.min(limit);
                part.over = Some(evidence.end((part.track, part.end)));
                part.before < limit
            });
            life.host.is_some() || !life.parts.is_empty()
        });
        lives
    }

    /// Whether any task did anything on a device.
    pub(super) fn any_parts(&self) -> bool {
        self.of.values().any(|life| !life.parts.is_empty())
    }

    /// The life of a task, if it did anything.
    pub(super) fn of(&self, task: u64) -> Option<&Life> {
        self.of.get(&task)
    }

    /// The parts of tasks. Gives what is known of those with devices.
    fn read_devices(&mut self, trace: &TraceFile) -> ByNumber<Open> {
        let mut open: ByNumber<Open> = ByNumber::default();
        for record in &trace.devices {
            let task = record.task;
            match record.event {
                DeviceEvent::Granted {
                    device,
                    member,
                    members,
                    place,
                    ..
                } => {
                    let open = open.entry(task).or_default();
                    if member == 0 {
                        *open = Open {
                            members,
                            on_host: open.on_host,
                            ..Open::default()
                        };
                    }
                    open.granted = true;
                    open.on_host |= device == HOST;
                    if device != HOST {
                        open.list.push((device, place));
                    } else {
                        open.cores.push(place);
                    }
                }
                DeviceEvent::Lent(stream) if stream.device != HOST => {
                    open.entry(task).or_default().streams.push(stream);
                }
                DeviceEvent::Begun => {
                    // It may go on after a wait.
                    let Some(open) = open.get_mut(&task).filter(|open| !open.begun) else {
                        continue;
                    };
                    open.begun = true;
                    let life = self.of.entry(task).or_default();
                    life.cores.clone_from(&open.cores);
                    for stream in &open.streams {
                        let track = self.evidence.track(*stream);
                        let before = self.evidence.last(track);
                        // As of now: a wait that is told later is a later one, whatever its position.
                        // A body that enqueues nothing, or what nobody was told of, takes none.
                        let clock = self.evidence.clock((track, before + 1));
                        let member = open.list.iter().find(|it| it.0 == stream.device);
                        life.parts.push(Part {
                            device: stream.device,
                            member: member.map_or(0, |it| it.1),
                            members: open.members,
                            track,
                            begun: record.time,
                            returned: u64::MAX,
                            before,
                            clock,
                            end: u64::MAX,
                            over: None,
                        });
                    }
                }
                DeviceEvent::Returned { member, behind } => {
                    let device = open
                        .get(&task)
                        .and_then(|open| open.list.get(usize::from(member)));
                    let (Some(&(device, _)), Some(life)) = (device, self.of.get_mut(&task)) else {
                        continue;
                    };
                    let part = life.parts.iter_mut().rev();
                    if let Some(part) = { part }.find(|part| part.device == device) {
                        part.returned = record.time;
                        // Without an event the device is lost, and what ran there is known.
                        part.end = behind.map_or(part.end, |event| event.position);
                    }
                }
                DeviceEvent::Observed(observed) => self.evidence.learn(observed, record.time),
                DeviceEvent::Capacity { .. }
                | DeviceEvent::Lent(_)
                | DeviceEvent::Left
                | DeviceEvent::Paused { .. }
                | DeviceEvent::Resumed => {}
            }
        }
        open
    }

    /// The bodies on cores.
    fn read_host(&mut self, trace: &TraceFile, open: &ByNumber<Open>) {
        for record in &trace.records {
            let on_host = || {
                let open = open.get(&record.task);
                open.is_none_or(|open| open.on_host || !open.granted)
            };
            match record.event {
                Event::Start if on_host() => {
                    let life = self.of.entry(record.task).or_default();
                    let stay = life.host.get_or_insert(Stay {
                        begin: record.time,
                        end: u64::MAX,
                    });
                    // Another attempt, or it goes on.
                    stay.end = u64::MAX;
                }
                Event::End => {
                    let life = self.of.get_mut(&record.task);
                    if let Some(stay) = life.and_then(|life| life.host.as_mut()) {
                        stay.end = record.time;
                    }
                }
                _ => {}
            }
        }
    }
}
