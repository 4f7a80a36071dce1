//! What a task asks of devices, and whether a machine can ever give it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use crate::machine::{DeviceId, Event, Kind};

/// A device's whole compute, in the units of [`Alternative::share`].
pub const WHOLE: u32 = 65_536;

/// The most devices of one machine: sets of them are bits of a word.
pub const MOST_DEVICES: usize = 64;

/// What a device has to give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// The device.
    pub id: DeviceId,
    /// Its memory in bytes.
    pub memory: u64,
    /// Whether a failure of work on it is the whole device's end, so that who is behind it on its
    /// stream loses nothing by that.
    pub fails_whole: bool,
}

/// One member of a device set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Member {
    /// This device.
    Device(DeviceId),
    /// Any device of that kind that is no other member of the set. One of [`Kind::Cpu`] is a core of the
    /// host, which the ledger knows nothing of.
    Any(Kind),
}

impl Member {
    /// Whether it is a core of the host.
    #[must_use]
    pub const fn is_core(&self) -> bool {
        matches!(self, Self::Any(Kind::Cpu))
    }
}

/// A device set, and what a task takes on each device of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Alternative {
    /// The set, in the order in which the body sees it.
    pub members: Box<[Member]>,
    /// The part of each device's compute, in 1/[`WHOLE`]. 0 takes nothing and waits for nothing. Cores
    /// are taken whole.
    pub share: u32,
    /// Bytes of memory on each device.
    pub memory: u64,
}

impl Alternative {
    /// How many cores of the host are in the set.
    #[must_use]
    pub fn cores(&self) -> usize {
        self.members.iter().filter(|it| it.is_core()).count()
    }
}

/// What a task asks for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Sets in free choice: the one that is estimated to finish first, of equals the first. Tasks
    /// with equal alternatives wait in one queue; those that share the `Arc` find it faster.
    pub alternatives: Arc<[Alternative]>,
    /// The estimated run time of each alternative, in their order. Where it is unknown or the list
    /// is shorter it counts as none, so that what was never tried is tried.
    pub estimates: SmallVec<[Option<Duration>; 1]>,
    /// A larger one is sooner.
    pub priority: i32,
    /// The events of predecessors that were launched. A stream that lies at one of them is lent to
    /// this task, if it is free. The ledger does not repeat them among
    /// [`Lent::waits`](super::Lent::waits): whoever ran the predecessors knows them all, and which
    /// streams must wait for which.
    pub prefer: SmallVec<[Event; 1]>,
    /// How long it takes to bring the task's data to each device, in the order of the ledger's; empty of a
    /// task without data.
    pub transfers: Box<[Transfer]>,
}

/// How long it takes to bring data to a device, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coming {
    /// All of them; what comes over different links comes side by side.
    pub time: u64,
    /// Those of them that the host has.
    pub from_host: u64,
    /// How long links are busy with them, in sum.
    pub links: u64,
}

/// How long it takes to bring a task's data to a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfer {
    /// What each member of a set has as a whole.
    pub whole: Coming,
    /// What is divided among the members.
    pub split: Coming,
}

impl Transfer {
    /// For one of so many members.
    #[must_use]
    pub fn of(self, members: u64) -> Coming {
        let part = |whole: u64, split: u64| whole.saturating_add(split / members.max(1));
        Coming {
            time: part(self.whole.time, self.split.time),
            from_host: part(self.whole.from_host, self.split.from_host),
            links: part(self.whole.links, self.split.links),
        }
    }
}

/// Why no machine of these devices can ever serve an alternative.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The set has no device; one of cores alone is not the ledger's.
    Empty,
    /// There is no such device, or it is lost.
    NoDevice(DeviceId),
    /// The set names the device twice.
    Twice(DeviceId),
    /// More devices of a kind than there are, besides those that are named: wanted, left.
    TooMany(Kind, usize, usize),
    /// More of a device's compute than all of it: in 1/[`WHOLE`].
    Share(u32),
    /// More memory than any device has that could be this member: bytes wanted, bytes there at
    /// most.
    Memory(Member, u64, u64),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "there is no device in the set"),
            Self::NoDevice(device) => write!(f, "there is no {device}"),
            Self::Twice(device) => write!(f, "{device} is in the set twice"),
            Self::TooMany(kind, wanted, left) => {
                write!(f, "{wanted} of kind {kind} wanted, {left} there")
            }
            Self::Share(share) => write!(
                f,
                "a share of {} is more than a whole device",
                f64::from(*share) / f64::from(WHOLE)
            ),
            Self::Memory(Member::Device(device), wanted, there) => {
                write!(f, "{wanted} bytes wanted, {device} has {there}")
            }
            Self::Memory(Member::Any(kind), wanted, there) => {
                write!(f, "{wanted} bytes wanted, no {kind} has more than {there}")
            }
        }
    }
}

/// Whether these devices can serve one of the alternatives when nothing else runs.
///
/// # Errors
/// Why not, for each alternative in order.
pub fn check(devices: &[Capacity], alternatives: &[Alternative]) -> Result<(), Box<[Reason]>> {
    let mut reasons = Vec::with_capacity(alternatives.len());
    for alternative in alternatives {
        match Plan::new(devices, 0, alternative) {
            Ok(_) => return Ok(()),
            Err(reason) => reasons.push(reason),
        }
    }
    Err(reasons.into())
}

/// An alternative in terms of one machine's devices, by their index in its list.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// For each member but cores the devices that it may be, as bits. A named one has one bit, which no
    /// other member has; members of one kind have the same bits.
    pub(super) members: SmallVec<[u64; 4]>,
    pub(super) share: u32,
    pub(super) memory: u64,
}

impl Plan {
    /// For those of the devices that are not lost.
    ///
    /// # Errors
    /// Why they can never serve it.
    pub(super) fn new(
        devices: &[Capacity],
        lost: u64,
        alternative: &Alternative,
    ) -> Result<Self, Reason> {
        let Alternative {
            members,
            share,
            memory,
        } = alternative;
        let members = members.iter().copied().filter(|it| !it.is_core());
        let members: SmallVec<[Member; 8]> = members.collect();
        if members.is_empty() {
            return Err(Reason::Empty);
        }
        if *share > WHOLE {
            return Err(Reason::Share(*share));
        }
        let left = || {
            let all = devices.iter().enumerate();
            all.filter(|(index, _)| lost & bit(*index) == 0)
        };
        let find = |id| left().find(|(_, device)| device.id == id);
        let mut named = 0;
        for member in &members {
            let &Member::Device(id) = member else {
                continue;
            };
            let (index, device) = find(id).ok_or(Reason::NoDevice(id))?;
            if named & bit(index) != 0 {
                return Err(Reason::Twice(id));
            }
            if device.memory < *memory {
                return Err(Reason::Memory(*member, *memory, device.memory));
            }
            named |= bit(index);
        }
        // The devices of a kind that are not named, and those of them that have the memory.
        let of_kind = |kind: Kind| {
            let (mut there, mut large, mut most) = (0_u64, 0_u64, 0);
            for (index, device) in left() {
                if device.id.kind() == kind && named & bit(index) == 0 {
                    there |= bit(index);
                    most = most.max(device.memory);
                    if device.memory >= *memory {
                        large |= bit(index);
                    }
                }
            }
            (there, large, most)
        };
        let mut bits = SmallVec::new();
        for member in &members {
            bits.push(match *member {
                Member::Device(id) => bit(find(id).expect("was found above").0),
                Member::Any(kind) => {
                    let wanted = members.iter().filter(|other| *other == member).count();
                    let (there, large, most) = of_kind(kind);
                    if wanted > there.count_ones() as usize {
                        let there = there.count_ones() as usize;
                        return Err(Reason::TooMany(kind, wanted, there));
                    }
                    if wanted > large.count_ones() as usize {
                        return Err(Reason::Memory(*member, *memory, most));
                    }
                    large
                }
            });
        }
        Ok(Self {
            members: bits,
            share: *share,
            memory: *memory,
        })
    }

    /// The devices that it may use.
    pub(super) fn devices(&self) -> u64 {
        self.members.iter().fold(0, |all, bits| all | bits)
    }

    /// Whether the devices with room are enough.
    pub(super) fn fits_in(&self, has_room: impl Fn(usize) -> bool) -> bool {
        let mut left = ones(self.devices())
            .filter(|&index| has_room(index))
            .fold(0, |all, index| all | bit(index));
        self.members.iter().all(|bits| {
            let first = ones(bits & left).next();
            left &= !first.map_or(0, bit);
            first.is_some()
        })
    }

    pub(super) fn width(&self) -> u64 {
        self.members.len() as u64
    }

    /// The part of the machine that it takes, in 1/[`WHOLE`] of a device.
    pub(super) fn size(&self) -> u64 {
        self.width() * u64::from(self.share)
    }

    pub(super) fn takes_nothing(&self) -> bool {
        self.share == 0 && self.memory == 0
    }
}

pub(super) fn bit(index: usize) -> u64 {
    1 << index
}

/// The indices of the bits that are set.
pub(super) fn ones(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let index = bits.trailing_zeros() as usize;
        bits &= bits.checked_sub(1)?;
        Some(index)
    })
}
