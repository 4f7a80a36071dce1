//! The pool of a device's context, for libraries that allocate by themselves.
//!
//! # Why
//!
//! The runtime allocates from a pool of the driver's, one a context, in stream order. A library with a cache
//! of its own keeps what it once had, and nobody else gets it. One that allocates here gives back what it
//! frees, and whoever comes next has it: another library, or the runtime for managed data.
//!
//! # Order
//!
//! Memory is given back on the stream that it was allocated on, as the caches of libraries do: the driver
//! gives it to that stream at once, and to another one behind what was enqueued there before. Who used it on
//! other streams has seen that work complete (results and arguments of tasks live until then), or is known
//! here:
//!
//! - Streams of one *set* are lent to one body, and what is on one of them may use what was allocated on
//!   another: [`together`] says so. A cache that gives memory to the same stream alone is safe there, since
//!   streams of a set end together; the driver gives it to any stream.
//! - Streams that a library told of ([`used_on`], PyTorch's `record_stream`).
//!
//! Such memory is given back on a stream of the context that is for this alone, the *reclaimer*, which waits
//! for all of these streams; so none of them waits for another. A set is remembered until one of its streams is
//! lent again: until then its streams are ordered behind each other, and an array may be collected late.
//!
//! # Lives
//!
//! Contexts, their pools and the runtime's streams live as long as the process, so memory may outlive the
//! machine that it was allocated under, and is given back in the same way. Streams of others may be destroyed
//! by then: the context is synchronised instead.

use std::collections::HashMap;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::CUresult;
use smallvec::SmallVec;

use crate::device::Process;
use crate::driver::{Answer, CUstream, Context, Fault, Handle, Purpose, found};

/// A stream: the driver's number of its device, and its handle.
pub type StreamOf = (u16, usize);

/// Why there is no memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is not as much.
    Short {
        /// Bytes that nobody has.
        free: u64,
    },
    /// The driver's words.
    Fault(String),
}

type Streams = SmallVec<[StreamOf; 2]>;

/// Which streams may use memory that was allocated on others.
#[derive(Default)]
struct Users {
    /// The other streams of the set that a stream was lent to last.
    sets: Option<HashMap<usize, Streams>>,
    /// By address: streams of its own device.
    told: Option<HashMap<u64, SmallVec<[usize; 2]>>>,
}

impl Users {
    fn together(&mut self, streams: &[StreamOf]) {
        let sets = self.sets.get_or_insert_default();
        for stream in streams {
            let others = streams.iter().copied().filter(|other| other != stream);
            sets.insert(stream.1, others.collect());
        }
    }

    fn alone(&mut self, stream: usize) {
        if let Some(sets) = &mut self.sets {
            sets.remove(&stream);
        }
    }

    fn used_on(&mut self, address: u64, stream: usize) {
        let told = self.told.get_or_insert_default();
        let streams = told.entry(address).or_default();
        if !streams.contains(&stream) {
            streams.push(stream);
        }
    }

    /// Those besides the one that it was allocated on; whom was told of is forgotten.
    fn take(&mut self, address: u64, own: StreamOf) -> Streams {
        let mut others = Streams::new();
        let told = self.told.as_mut().and_then(|told| told.remove(&address));
        let told = told.into_iter().flatten().map(|stream| (own.0, stream));
        let set = self.sets.as_ref().and_then(|sets| sets.get(&own.1));
        for other in told.chain(set.into_iter().flatten().copied()) {
            if other != own && !others.contains(&other) {
                others.push(other);
            }
        }
        others
    }

    fn count(&self) -> usize {
        self.sets.as_ref().map_or(0, HashMap::len) + self.told.as_ref().map_or(0, HashMap::len)
    }
}

static USERS: Mutex<Users> = Mutex::new(Users {
    sets: None,
    told: None,
});
/// How many entries there are: mostly none, and nobody needs the lock.
static KNOWN: AtomicUsize = AtomicUsize::new(0);
static SHARED: AtomicBool = AtomicBool::new(false);

fn users() -> MutexGuard<'static, Users> {
    USERS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn change<T>(change: impl FnOnce(&mut Users) -> T) -> T {
    let mut users = users();
    let result = change(&mut users);
    KNOWN.store(users.count(), Ordering::Release);
    result
}

fn handle(stream: usize) -> Handle<CUstream> {
    Handle(ptr::with_exposed_provenance_mut(stream))
}

/// Libraries are about to allocate here: from now on sets are told of. What one device has in its pool its
/// peers can reach, as they can what a library allocates by itself.
///
/// # Errors
/// Why the driver cannot be used.
pub fn share() -> Result<usize, String> {
    let found = found()?;
    for (own, gpu) in (0..).zip(found) {
        for peer in &gpu.peers {
            Process::wish(own, *peer);
        }
    }
    SHARED.store(true, Ordering::Release);
    Ok(found.len())
}

/// Whether libraries allocate here.
#[inline]
#[must_use]
pub fn is_shared() -> bool {
    SHARED.load(Ordering::Acquire)
}

/// These streams are lent to one body.
pub fn together(streams: &[StreamOf]) {
    change(|users| users.together(streams));
}

/// This stream is lent to a body that has no other.
#[inline]
pub fn alone(stream: usize) {
    if KNOWN.load(Ordering::Acquire) != 0 {
        change(|users| users.alone(stream));
    }
}

/// What is on that stream of its device uses the memory.
pub fn used_on(address: u64, stream: usize) {
    change(|users| users.used_on(address, stream));
}

/// Memory of the device for what is enqueued on the stream from now on.
///
/// # Errors
/// [`Refusal`].
pub fn allocate(ordinal: u16, bytes: u64, stream: usize) -> Result<u64, Refusal> {
    let devices = found().map_err(Refusal::Fault)?.len();
    if usize::from(ordinal) >= devices {
        return Err(Refusal::Fault(format!("there are {devices} devices")));
    }
    let context = Process::context(ordinal).map_err(refused)?;
    match context.allocate(bytes, handle(stream)) {
        Ok(address) => {
            context.lent.fetch_add(bytes, Ordering::Relaxed);
            Ok(address)
        }
        Err(Fault(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Err(Refusal::Short {
            free: context.free_memory().unwrap_or(0),
        }),
        Err(fault) => Err(refused(fault)),
    }
}

fn refused(fault: Fault) -> Refusal {
    Refusal::Fault(fault.to_string())
}

/// Gives back what [`allocate`] gave, with the same numbers. Of a device that is lost, and of a driver that has
/// ended, nothing is left to be given back.
///
/// # Safety
/// Nothing uses the memory but what is enqueued on that stream, on those of its set, and on those that were
/// told of; and nothing is enqueued that will.
pub unsafe fn free(ordinal: u16, address: u64, bytes: u64, stream: usize) {
    let Ok(context) = Process::context(ordinal) else {
        return;
    };
    let others = match KNOWN.load(Ordering::Acquire) {
        0 => Streams::new(),
        _ => change(|users| users.take(address, (ordinal, stream))),
    };
    context.lent.fetch_sub(bytes, Ordering::Relaxed);
    let freed = if others.is_empty() {
        context.free(address, handle(stream))
    } else {
        reclaim(context, address, (ordinal, stream), &others)
    };
    if let Err(Fault(
        CUresult::CUDA_ERROR_INVALID_HANDLE | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED,
    )) = freed
    {
        // Of a stream that is gone. Nobody is told of what else may go wrong.
        let _ = context.free_when_idle(address);
    }
}

fn reclaim(
    context: &'static Context,
    address: u64,
    own: StreamOf,
    others: &[StreamOf],
) -> Answer<()> {
    let reclaimer = context.reclaimer()?;
    for (ordinal, stream) in std::iter::once(&own).chain(others) {
        let event = Process::context(*ordinal)?.record(handle(*stream), Purpose::Order)?;
        context.wait(reclaimer, &event)?;
    }
    context.free(address, reclaimer)
}

/// Bytes of the device that libraries have.
#[must_use]
pub fn lent(ordinal: u16) -> u64 {
    Process::known(ordinal).map_or(0, |context| context.lent.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_awaited_on_the_other_streams_of_its_set_and_on_those_that_were_told_of() {
        let mut users = Users::default();
        assert!(users.take(64, (0, 10)).is_empty());
        users.together(&[(0, 10), (1, 20), (2, 30)]);
        assert_eq!(users.take(64, (0, 10)).as_slice(), [(1, 20), (2, 30)]);
        // Still: memory is freed piece by piece.
        assert_eq!(users.take(96, (1, 20)).as_slice(), [(0, 10), (2, 30)]);
        for stream in [11, 11, 10] {
            users.used_on(64, stream);
        }
        let others = users.take(64, (0, 10));
        assert_eq!(others.as_slice(), [(0, 11), (1, 20), (2, 30)]);
        // The address may be somebody else's by then.
        assert!(users.take(64, (0, 40)).is_empty());
    }

    #[test]
    fn a_set_is_remembered_until_its_streams_are_lent_again() {
        let mut users = Users::default();
        users.together(&[(0, 10), (1, 20)]);
        users.alone(10);
        assert!(users.take(64, (0, 10)).is_empty());
        assert_eq!(users.take(64, (1, 20)).as_slice(), [(0, 10)]);
        users.together(&[(1, 20), (2, 30)]);
        assert_eq!(users.take(64, (1, 20)).as_slice(), [(2, 30)]);
        assert_eq!(users.count(), 2);
    }
}
