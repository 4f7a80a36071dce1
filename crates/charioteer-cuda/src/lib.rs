//! Charioteer's devices on the CUDA driver.
//!
//! The driver's library is loaded when somebody asks for devices, so that whatever is built with this
//! runs where there is none: [`found`] then finds none. [`open`] makes the devices of a machine, which
//! implement [`Device`](charioteer::machine::Device).
//!
//! | file | what it has |
//! |---|---|
//! | `driver` | the functions of the driver that are used, and their errors |
//! | `timeline` | positions on a stream, on the driver's events, and who is told when they are done |
//! | `staging` | pinned buffers for copies from and to pageable memory |
//! | `device` | [`CudaGpu`], the device |
//! | `kernel` | [`Kernel`], code of devices, and its launch |

mod device;
mod driver;
mod kernel;
mod staging;
mod timeline;

use std::sync::Arc;

use charioteer::machine::Observers;

pub use device::{Counters, CudaGpu};
pub use driver::{Found, found};
pub use kernel::{Dimensions, Kernel};

/// As many devices as asked for, in the driver's order, who tell `observers` what they see.
///
/// # Errors
/// Why there are not as many.
pub fn open(count: usize, observers: &Arc<Observers>) -> Result<Vec<Arc<CudaGpu>>, String> {
    let found = found()?;
    match found.get(..count) {
        Some(found) => Ok(device::build(found, observers)),
        None => Err(format!(
            "the machine has {count} CUDA devices, and this process sees {}",
            found.len()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_devices_than_there_are_are_refused() {
        let many = found().map_or(0, <[Found]>::len) + 1;
        let refused = open(many, &Arc::default()).unwrap_err();
        assert!(refused.contains("CUDA"), "{refused}");
        assert!(open(0, &Arc::default()).unwrap().is_empty());
    }
}
