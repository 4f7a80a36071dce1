//! Who chooses among the candidates of a call.
//!
//! A [`Call`] that is ready has [`Candidate`]s: its choices, those on devices once for each set of
//! devices that is worth a look, which are the devices of its predecessors, those with the least before
//! them, and all others in turns. A [`Policy`] says which one it is.
//!
//! [`Mapper::EarliestFinish`] is no [`Policy`]: it leaves the set of devices to the ledger, which knows
//! at the grant what is free. [`Mapper::User`] asks the domain, see
//! [`Domain::choose`](crate::task::Domain::choose).

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use crate::machine::DeviceId;
use crate::sync::{AtomicU64, Ordering};

/// A call that is to be mapped.
#[derive(Clone, Debug)]
pub struct Call {
    /// The function's name.
    pub function: Arc<str>,
    /// The task's number in traces.
    pub task: u64,
    /// The size of the call.
    pub size: u64,
    /// The task's priority.
    pub priority: i32,
    /// How many calls of these choices were mapped before.
    pub turn: usize,
    /// The devices on which its predecessors ran.
    pub near: SmallVec<[DeviceId; 2]>,
    /// Never empty. Of equals the first is meant to be taken.
    pub candidates: Vec<Candidate>,
}

/// One way to run a call now.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The choice, by its index in [`Choices::list`](super::Choices::list).
    pub choice: usize,
    /// The devices, in the order of the set; none of a choice on cores alone.
    pub devices: SmallVec<[DeviceId; 2]>,
    /// The cores; none of a choice on devices alone.
    pub cores: u16,
    /// The estimated run time.
    pub estimate: Option<Duration>,
    /// When the cores or devices are free, as far as the run times of what they have before them are
    /// known.
    pub wait: Duration,
    /// How many tasks they have before them: on the device that has the most.
    pub load: u32,
    /// How many of the devices are among [`Call::near`].
    pub local: u32,
    /// How long it takes to bring the data that the call accesses to the devices, or home; nothing if they
    /// are there, or it accesses none.
    pub transfer: Duration,
}

/// Chooses among candidates.
pub trait Policy: Send + Sync {
    /// What it is called.
    fn name(&self) -> &'static str;

    /// The index of a candidate. It is called with no lock held, by threads at once, and calls nobody.
    fn choose(&self, call: &Call) -> usize;
}

/// Who maps the tasks of a runtime.
#[derive(Clone, Default)]
pub enum Mapper {
    /// The least estimated finish time: when the cores or devices are free, and the run time there. What
    /// has no estimate is tried a few times.
    #[default]
    EarliestFinish,
    /// A policy.
    Policy(Arc<dyn Policy>),
    /// The domain's user, see [`Domain::choose`](crate::task::Domain::choose).
    User,
}

impl fmt::Debug for Mapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EarliestFinish => "eft",
            Self::Policy(policy) => policy.name(),
            Self::User => "user",
        })
    }
}

impl Mapper {
    /// The policies of this crate by name: `eft`, `locality`, `load`, `random` (by `seed`) and
    /// `round-robin`.
    #[must_use]
    pub fn named(name: &str, seed: u64) -> Option<Self> {
        let policy: Arc<dyn Policy> = match name {
            "eft" => return Some(Self::EarliestFinish),
            "locality" => Arc::new(Locality),
            "load" => Arc::new(Load),
            "random" => Arc::new(Random::new(seed)),
            "round-robin" => Arc::new(RoundRobin),
            _ => return None,
        };
        Some(Self::Policy(policy))
    }
}

/// The first candidate with the least key.
fn least<K: Ord>(call: &Call, key: impl Fn(&Candidate) -> K) -> usize {
    let candidates = call.candidates.iter().enumerate();
    let least = candidates.min_by_key(|(_, candidate)| key(candidate));
    least.map_or(0, |(index, _)| index)
}

/// Where its data are, then where its predecessors ran, and there where the least is before it.
#[derive(Debug)]
pub struct Locality;

impl Policy for Locality {
    fn name(&self) -> &'static str {
        "locality"
    }

    fn choose(&self, call: &Call) -> usize {
        // By how many devices its set and those of its predecessors differ.
        let near = u32::try_from(call.near.len()).unwrap_or(u32::MAX);
        least(call, |candidate| {
            let count = u32::try_from(candidate.devices.len()).unwrap_or(u32::MAX);
            let differ = match near {
                0 => 0,
                _ => (near - candidate.local) + (count - candidate.local),
            };
            (candidate.transfer, differ, candidate.load)
        })
    }
}

/// Where the fewest tasks are before it.
#[derive(Debug)]
pub struct Load;

impl Policy for Load {
    fn name(&self) -> &'static str {
        "load"
    }

    fn choose(&self, call: &Call) -> usize {
        least(call, |candidate| candidate.load)
    }
}

/// Anywhere, by a seed: calls in the same order are mapped in the same way.
#[derive(Debug)]
pub struct Random(AtomicU64);

impl Random {
    /// With that seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }
}

impl Policy for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn choose(&self, call: &Call) -> usize {
        // SplitMix64.
        const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
        let mut word = self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^= word >> 31;
        let count = call.candidates.len() as u64;
        (word % count) as usize // less than the count
    }
}

/// One candidate after the other.
#[derive(Debug)]
pub struct RoundRobin;

impl Policy for RoundRobin {
    fn name(&self) -> &'static str {
        "round-robin"
    }

    fn choose(&self, call: &Call) -> usize {
        call.turn % call.candidates.len()
    }
}
