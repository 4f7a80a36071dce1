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
//! | `batch` | launches that the driver is given together, as graphs |
//! | `staging` | pinned buffers for copies from and to pageable memory |
//! | `device` | [`CudaGpu`], the device |
//! | `pool` | a device's pool, for libraries that allocate by themselves |
//! | `kernel` | [`Kernel`], code of devices, and its launch |
//! | `foreign` | work and memory of other libraries |

mod batch;
mod device;
mod driver;
mod foreign;
mod kernel;
pub mod pool;
mod staging;
mod timeline;

use std::sync::Arc;

use charioteer::machine::Observers;

pub use device::{Counters, CudaGpu};
pub use driver::{Found, found};
pub use foreign::{foreign, meeting, ordinal_of};
pub use kernel::{Dimensions, Kernel};

/// As many devices as there are numbers, in the driver's order, each with no more memory than its number of
/// bytes, who tell `observers` what they see.
///
/// # Errors
/// Why there are not as many.
pub fn open(memory: &[u64], observers: &Arc<Observers>) -> Result<Vec<Arc<CudaGpu>>, String> {
    let (found, count) = (found()?, memory.len());
    match found.get(..count) {
        Some(found) => {
            let mut found = found.to_vec();
            for (gpu, most) in found.iter_mut().zip(memory) {
                gpu.memory = gpu.memory.min(*most);
            }
            Ok(device::build(&found, observers))
        }
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
        let refused = open(&vec![1 << 30; many], &Arc::default()).unwrap_err();
        assert!(refused.contains("CUDA"), "{refused}");
        assert!(open(&[], &Arc::default()).unwrap().is_empty());
    }
}
