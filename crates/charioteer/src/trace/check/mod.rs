//! Proves from a trace that a runtime kept its promises about devices.
//!
//! # Claims and evidence
//!
//! *Evidence* is what the device layer logged at its calls: what was enqueued at which position of
//! which stream, which streams were told to wait for what, and what the host saw complete. From
//! that alone [`evidence`](super::evidence) works out what is before what. The *claims* come from what the runtime
//! believes: the edges of the graph say what must be ordered, the ledger's grants say who has what.
//! They are never evidence that anything was ordered.
//!
//! # What is proved
//!
//! * **Ends.** The events of each task are in a legal order, and each ends exactly once (invariant 1).
//! * **Order** (invariant 2). When a body begins, that of each of its dependencies has returned. What
//!   it enqueues on a stream that it was lent is behind all that its dependencies enqueued on
//!   theirs; a body without streams, or with cores beside them, begins when the host has seen all that
//!   complete. What did not run,
//!   since it came behind a failure, need not be ordered.
//! * **Sets** (invariant 4). All members of a set are granted at one moment, before the body begins,
//!   on different devices, and given back at one moment. A body with cores and devices begins and ends
//!   with as many different cores as its set has.
//! * **Lending.** A stream is lent to one running body at a time, and so is a core, among the bodies
//!   that have cores and devices.
//! * **Capacity** (invariant 5). No moment of a device's timeline sees more of its compute or its memory
//!   in use than it has, and each grant is given back once; see `capacity`.
//!
//! A task is known by its number; the text of a violation has its name too. A trace may know nothing of
//! a dependency, one of an earlier runtime; then nothing is claimed of it.
//!
//! The cost is that of sorting the trace, and for each wait the number of streams with work in flight.

mod capacity;
mod claims;

use std::fmt;

use super::file::TraceFile;
use claims::Claims;

/// What a violation is one of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Tasks end once, after legal events.
    End,
    /// Device work is ordered after that of dependencies.
    Order,
    /// Sets are granted and given back as one.
    Set,
    /// A stream, or a core, is lent to one body at a time.
    Lending,
    /// Grants do not exceed a device.
    Capacity,
    /// Conflicting accesses to data are ordered; see [`check_order`](super::check_order).
    Access,
    /// Who reads has the last version where it runs; see [`check_moves`](super::check_moves).
    Coherence,
    /// Nothing is copied to where it is.
    Transfer,
}

impl Rule {
    /// Its name in lower case.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::End => "end",
            Self::Order => "order",
            Self::Set => "set",
            Self::Lending => "lending",
            Self::Capacity => "capacity",
            Self::Access => "access",
            Self::Coherence => "coherence",
            Self::Transfer => "transfer",
        }
    }
}

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which one.
    pub rule: Rule,
    /// The task that should not have done what it did; of a copy, the one that wrote what it copies, or 0.
    pub task: u64,
    /// The other task that it concerns, if there is one.
    pub other: Option<u64>,
    /// Who did what, and what is missing.
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule.name(), self.text)
    }
}

/// What became of a check.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// Tasks that the trace has.
    pub tasks: usize,
    /// Grants of devices, a set being one.
    pub grants: usize,
    /// Pairs of a body and a dependency of which the order was proved, or is violated.
    pub pairs: usize,
    /// What was broken, in the order of the trace.
    pub violations: Vec<Violation>,
}

/// Why a trace cannot be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoEvidence {
    /// The version of its format.
    pub version: u32,
    /// The first one that has it.
    pub needs: u32,
}

impl fmt::Display for NoEvidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "a trace of version {} has no {}, so nothing can be proved from it; \
             versions from {} on have",
            self.version,
            match self.needs {
                2 => "events of devices",
                3 => "accesses",
                _ => "copies of data",
            },
            self.needs,
        )
    }
}

impl std::error::Error for NoEvidence {}

/// Checks a trace; see the module for what that proves.
///
/// # Errors
/// [`NoEvidence`] of a trace of version 1.
pub fn check(trace: &TraceFile) -> Result<Checked, NoEvidence> {
    if trace.version < 2 {
        return Err(NoEvidence {
            version: trace.version,
            needs: 2,
        });
    }
    let mut claims = Claims::new(trace);
    let (mut tasks, mut devices) = (trace.records.iter(), trace.devices.iter());
    let (mut task, mut device) = (tasks.next(), devices.next());
    // Of equal times those of devices come first: a task begins after what it was granted and saw.
    loop {
        match (task, device) {
            (Some(record), next) if next.is_none_or(|next| record.time < next.time) => {
                claims.task(record);
                task = tasks.next();
            }
            (_, Some(record)) => {
                claims.device(record);
                device = devices.next();
            }
            (_, None) => break,
        }
    }
    Ok(claims.finish())
}
