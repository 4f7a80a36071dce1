//! Work and memory of other libraries on a device, which the runtime comes after and takes over.
//!
//! Whoever gives memory away says on which stream it is still used: by `__cuda_array_interface__` the
//! stream's handle, on which an event is recorded here; by DLPack the consumer names a stream, which the
//! producer then has wait. For that each device has one, the *meeting*: it is never given back, since
//! nobody knows when what waits there is over.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use charioteer::machine::Foreign;

use crate::device::Process;
use crate::driver::{self, CUstream, Handle, Purpose, Recorded};

/// What was enqueued on a device when it was asked.
pub(crate) struct Visitor {
    pub(crate) ordinal: u16,
    pub(crate) behind: Option<Arc<Recorded>>,
}

/// The handles of the meetings.
static MEETINGS: Mutex<BTreeMap<u16, usize>> = Mutex::new(BTreeMap::new());

/// What is on a stream of a device, by the driver's handle, or nothing. The handles of the default streams
/// are 1 and 2.
///
/// # Errors
/// Why the driver refuses: it is no stream of the device, say.
pub fn foreign(ordinal: u16, stream: Option<usize>) -> Result<Foreign, String> {
    let record = |stream: usize| {
        let context = Process::context(ordinal)?;
        context.record(Handle(stream as CUstream), Purpose::Order)
    };
    let behind = stream.map(record).transpose();
    let behind = behind.map_err(|fault| fault.to_string())?;
    Ok(Foreign(Arc::new(Visitor {
        ordinal,
        behind: behind.map(Arc::new),
    })))
}

/// The handle of the stream of a device on which producers are to have their work waited for.
///
/// # Errors
/// Why the driver refuses.
pub fn meeting(ordinal: u16) -> Result<usize, String> {
    let mut meetings = MEETINGS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handle) = meetings.get(&ordinal) {
        return Ok(*handle);
    }
    let stream = Process::context(ordinal).and_then(driver::Context::stream);
    let handle = stream.map_err(|fault| fault.to_string())?.0 as usize;
    meetings.insert(ordinal, handle);
    Ok(handle)
}

/// The number of the device whose memory is at an address, if the driver knows the address.
pub fn ordinal_of(address: u64) -> Option<u16> {
    // Any context will do; whoever has memory of a device has one.
    let context = Process::context(0).ok()?;
    driver::ordinal_of(context, address)
}
