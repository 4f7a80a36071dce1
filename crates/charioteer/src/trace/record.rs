//! What a trace has of tasks and of devices.

use crate::data::{Mode, Spread};
use crate::machine::{DeviceId, Enqueued, Event as Position, Observed, Stream};
use crate::region::Region;

/// What may happen to a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Event {
    /// It was spawned.
    Spawn = 1,
    /// It was spawned with a predecessor, named by `other`.
    Edge = 2,
    /// Its predecessors are done.
    Ready = 3,
    /// A thread runs or resumes its body.
    Start = 4,
    /// The body gave its thread up.
    Suspend = 5,
    /// The body ended.
    End = 6,
    /// The attempt failed, another one follows.
    Retry = 7,
    /// It has its outcome: a value.
    Done = 8,
    /// It has its outcome: none, by a failure, by cancellation or because a predecessor failed.
    Failed = 9,
    /// It has no body, and moved data, or began to.
    Carry = 10,
}

impl Event {
    pub(super) fn of(number: u32) -> Option<Self> {
        [
            Self::Spawn,
            Self::Edge,
            Self::Ready,
            Self::Start,
            Self::Suspend,
            Self::End,
            Self::Retry,
            Self::Done,
            Self::Failed,
            Self::Carry,
        ]
        .into_iter()
        .find(|event| *event as u32 == number)
    }

    /// Its name in lower case.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Spawn => "spawn",
            Self::Edge => "edge",
            Self::Ready => "ready",
            Self::Start => "start",
            Self::Suspend => "suspend",
            Self::End => "end",
            Self::Retry => "retry",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Carry => "carry",
        }
    }
}

/// One event of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Nanoseconds since the start of the trace.
    pub time: u64,
    /// The task.
    pub task: u64,
    /// The other task of an edge, else zero.
    pub other: u64,
    /// The thread, by a number that is unique in the process.
    pub thread: u32,
    /// What happened.
    pub event: Event,
}

/// What may happen on a device, to a task's part of one, or what one has.
///
/// What the device layer sees is logged at the call. A call that enqueues is logged after it took
/// effect, as are completions that somebody sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The device has this much: parts of its compute and bytes of memory.
    Capacity {
        /// The device.
        device: DeviceId,
        /// Its whole compute, in the unit of shares.
        share: u32,
        /// Bytes.
        memory: u64,
    },
    /// The task was granted a part of a device; the members of its set are granted at one moment. A core
    /// is a member on the host, behind all devices; which one it is, is said when the body has it.
    Granted {
        /// The device.
        device: DeviceId,
        /// Which member of the set it is, from zero: devices first.
        member: u16,
        /// How many the set has.
        members: u16,
        /// Its place among all of them, in the order of the set; before version 4 it is 0.
        place: u16,
        /// Part of the device's compute.
        share: u32,
        /// Bytes of its memory.
        memory: u64,
    },
    /// The stream is the task's own until its grant is given back. A stream of the host is a core, with
    /// its number, of a task with cores and devices: its own until the body ends, is suspended or
    /// [leaves](Self::Left).
    Lent(Stream),
    /// The body is about to wait, on its thread, and has its cores no more.
    Left,
    /// The streams of the task were told what they have to wait for: its body begins or goes on.
    Begun,
    /// A body that waits gave its share of that member back, behind the event.
    Paused {
        /// Which member of the set.
        member: u16,
        /// Behind what; nothing if the device is lost.
        behind: Option<Position>,
    },
    /// The share of every member is the body's again.
    Resumed,
    /// No body uses that member any more: it was given back, behind the event.
    Returned {
        /// Which member of the set.
        member: u16,
        /// Behind what; nothing if the device is lost, or nobody made a stream.
        behind: Option<Position>,
    },
    /// The device layer saw it.
    Observed(Observed),
}

/// One event of a device in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRecord {
    /// Nanoseconds since the start of the trace.
    pub time: u64,
    /// The task that it concerns; of what the device layer saw, the one whose body the thread runs;
    /// zero if there is none.
    pub task: u64,
    /// The thread, by a number that is unique in the process.
    pub thread: u32,
    /// What happened.
    pub event: DeviceEvent,
}

/// One access of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessRecord {
    /// Nanoseconds since the start of the trace.
    pub time: u64,
    /// The task.
    pub task: u64,
    /// The datum.
    pub datum: u64,
    /// Its place in the order of the datum's accesses; 0 if it takes part in none.
    pub number: u64,
    /// The thread, by a number that is unique in the process.
    pub thread: u32,
    /// What the task does.
    pub mode: Mode,
    /// With which indices.
    pub region: Region,
    /// What each member of a set has of them.
    pub spread: Spread,
}

/// A copy of elements of an array from one memory to another, or an instance that was dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoveRecord {
    /// Nanoseconds since the start of the trace: when it was enqueued or dropped, under the lock of
    /// whoever did it.
    pub time: u64,
    /// The thread, by a number that is unique in the process.
    pub thread: u32,
    /// The datum.
    pub datum: u64,
    /// Which elements.
    pub region: Region,
    /// Whose memory they are in.
    pub from: DeviceId,
    /// Whose memory they go to.
    pub to: DeviceId,
    /// The box of the instance that they are in: on the host, all of the array.
    pub source: Region,
    /// The box of the instance that they go to.
    pub target: Region,
    /// How many bytes go over the link.
    pub bytes: u64,
    /// Complete when they are there. None: the instance that they are in is dropped.
    pub event: Option<Position>,
}

/// How the elements of an array lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of an element.
    pub item: u64,
    /// Elements along each axis.
    pub shape: Vec<u64>,
}

/// A spread as a number.
pub(super) fn spread_word(spread: Spread) -> u32 {
    match spread {
        Spread::Whole => 0,
        Spread::Replicated => 1,
        Spread::Shard(axis) => 2 + u32::from(axis),
    }
}

pub(super) fn spread_of(word: u32) -> Option<Spread> {
    Some(match word {
        0 => Spread::Whole,
        1 => Spread::Replicated,
        axis => Spread::Shard(u8::try_from(axis - 2).ok()?),
    })
}

/// A mode as two numbers.
pub(super) fn mode_words(mode: Mode) -> [u32; 2] {
    match mode {
        Mode::In => [1, 0],
        Mode::Out => [2, 0],
        Mode::InOut => [3, 0],
        Mode::Commute => [4, 0],
        Mode::Reduce(operation) => [5, operation],
    }
}

pub(super) fn mode_of(words: [u32; 2]) -> Option<Mode> {
    match words {
        [1, 0] => Some(Mode::In),
        [2, 0] => Some(Mode::Out),
        [3, 0] => Some(Mode::InOut),
        [4, 0] => Some(Mode::Commute),
        [5, operation] => Some(Mode::Reduce(operation)),
        _ => None,
    }
}

pub(super) const NO_POSITION: u64 = u64::MAX;

pub(super) fn stream_word(stream: Stream) -> u64 {
    u64::from(stream.device.0) << 32 | u64::from(stream.number)
}

pub(super) fn stream_of(word: u64) -> Option<Stream> {
    Some(Stream {
        device: DeviceId(u16::try_from(word >> 32).ok()?),
        number: word as u32, // the lower half
    })
}

fn behind_words(behind: Option<Position>) -> [u64; 2] {
    behind.map_or([0, NO_POSITION], |event| {
        [stream_word(event.stream), event.position]
    })
}

impl DeviceRecord {
    /// Its kind, and what comes with it.
    pub(super) fn encode(&self) -> (u32, [u64; 4]) {
        let two = |event: Position| [stream_word(event.stream), event.position, 0, 0];
        match self.event {
            DeviceEvent::Capacity {
                device,
                share,
                memory,
            } => (1, [device.0.into(), share.into(), memory, 0]),
            DeviceEvent::Granted {
                device,
                member,
                members,
                place,
                share,
                memory,
            } => {
                let set = u64::from(members) << 32 | u64::from(place) << 16 | u64::from(member);
                (2, [device.0.into(), set, share.into(), memory])
            }
            DeviceEvent::Lent(stream) => (3, [stream_word(stream), 0, 0, 0]),
            DeviceEvent::Begun => (4, [0; 4]),
            DeviceEvent::Paused { member, behind } => {
                let [stream, position] = behind_words(behind);
                (5, [member.into(), stream, position, 0])
            }
            DeviceEvent::Resumed => (6, [0; 4]),
            DeviceEvent::Left => (8, [0; 4]),
            DeviceEvent::Returned { member, behind } => {
                let [stream, position] = behind_words(behind);
                (7, [member.into(), stream, position, 0])
            }
            DeviceEvent::Observed(observed) => match observed {
                Observed::Created(stream) => (16, [stream_word(stream), 0, 0, 0]),
                Observed::Enqueued(event, kind) => {
                    let [stream, position, ..] = two(event);
                    (17, [stream, position, kind as u64, 0])
                }
                Observed::Recorded(event) => (18, two(event)),
                Observed::Waits {
                    stream,
                    from,
                    event,
                } => {
                    let [other, position, ..] = two(event);
                    (19, [stream_word(stream), from, other, position])
                }
                Observed::Synchronised(event) => (20, two(event)),
                Observed::Seen(event) => (21, two(event)),
                Observed::Completed(event) => (22, two(event)),
                Observed::Failed(event) => (23, two(event)),
                Observed::Abandoned(event) => (24, two(event)),
            },
        }
    }

    /// The event of that kind, if there is one.
    pub(super) fn decode(kind: u32, words: [u64; 4]) -> Option<DeviceEvent> {
        let [a, b, c, d] = words;
        let device = |word| Some(DeviceId(u16::try_from(word).ok()?));
        let event = |stream, position| {
            Some(Position {
                stream: stream_of(stream)?,
                position,
            })
        };
        let behind = || -> Option<Option<Position>> {
            if c == NO_POSITION {
                return Some(None);
            }
            Some(Some(event(b, c)?))
        };
        Some(match kind {
            1 => DeviceEvent::Capacity {
                device: device(a)?,
                share: u32::try_from(b).ok()?,
                memory: c,
            },
            2 => DeviceEvent::Granted {
                device: device(a)?,
                member: b as u16,        // the lowest 16 bits
                place: (b >> 16) as u16, // those above
                members: u16::try_from(b >> 32).ok()?,
                share: u32::try_from(c).ok()?,
                memory: d,
            },
            3 => DeviceEvent::Lent(stream_of(a)?),
            4 => DeviceEvent::Begun,
            5 => DeviceEvent::Paused {
                member: u16::try_from(a).ok()?,
                behind: behind()?,
            },
            6 => DeviceEvent::Resumed,
            8 => DeviceEvent::Left,
            7 => DeviceEvent::Returned {
                member: u16::try_from(a).ok()?,
                behind: behind()?,
            },
            _ => DeviceEvent::Observed(match kind {
                16 => Observed::Created(stream_of(a)?),
                17 => Observed::Enqueued(event(a, b)?, kind_of_work(c)?),
                18 => Observed::Recorded(event(a, b)?),
                19 => Observed::Waits {
                    stream: stream_of(a)?,
                    from: b,
                    event: event(c, d)?,
                },
                20 => Observed::Synchronised(event(a, b)?),
                21 => Observed::Seen(event(a, b)?),
                22 => Observed::Completed(event(a, b)?),
                23 => Observed::Failed(event(a, b)?),
                24 => Observed::Abandoned(event(a, b)?),
                _ => return None,
            }),
        })
    }
}

fn kind_of_work(number: u64) -> Option<Enqueued> {
    [
        Enqueued::Operation,
        Enqueued::Busy,
        Enqueued::Copy,
        Enqueued::Free,
        Enqueued::Mark,
    ]
    .into_iter()
    .find(|kind| *kind as u64 == number)
}
