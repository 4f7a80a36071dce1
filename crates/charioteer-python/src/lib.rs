//! The module `charioteer._core`: the runtime's face towards Python, and no policy.
//!
//! | file | what it holds |
//! |---|---|
//! | `gateway` | where the interpreter is entered and left, and references of detached threads |
//! | `interp` | Python as a domain of the runtime: bodies, calls, coroutines, failures |
//! | `launches` | kernels of GPUs as bodies: what they take, how they are launched |
//! | `native` | C functions as bodies: what they take, how they are called, what they fail with |
//! | `blas` | BLAS and LAPACK: how arrays become the arguments of their routines |
//! | `callable` | what a callable captures, and whether it may be spawned |
//! | `data` | managed arrays: regions, tiles, tokens, and access by the host |
//! | `access` | what a call reads and writes: modes of parameters, and arguments that are regions |
//! | `reduce` | partial results of reductions |
//! | `options` | keywords of tasks |
//! | `placement` | where tasks may run, as it was said and as a runtime serves it |
//! | `spawn` | `task`, `spawn`, `spawn_many`, task functions |
//! | `task` | `Task`, waiting and awaiting |
//! | `space` | `TaskSpace`, `TaskList` |
//! | `runtime` | the open runtime and the running task |
//! | `kernels` | bodies of a known duration, for benchmarks |
//! | `devices` | machines and their devices: streams, events; memory and operations of virtual ones |
//! | `cpus` | processors of the host, and threads that are started from pinned ones |
//! | `libraries` | what CuPy and PyTorch take for current while a body runs |
//! | `pool` | the memory pool of a device for CuPy and PyTorch |
//! | `support` | what is used from the Python side of the package |

use pyo3::prelude::*;

mod access;
mod attached;
mod blas;
mod callable;
mod cpus;
mod data;
mod devices;
#[cfg(clippy)]
mod forbidden;
mod gateway;
mod gil;
mod interp;
mod kernels;
mod launches;
mod libraries;
mod local;
mod native;
mod options;
mod placement;
mod pool;
mod reduce;
mod runtime;
mod space;
mod spawn;
mod support;
mod task;
mod variants;

// What it gives again would look like a race: ThreadSanitizer knows the system's allocator alone.
#[cfg(not(tsan))]
#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The runtime's face towards Python.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::access::unordered;
    #[pymodule_export]
    use super::blas::{BlasRoutine, lapack_adapters};
    #[pymodule_export]
    use super::cpus::{host_nodes, unpinned};
    #[pymodule_export]
    use super::data::{Array, HostAccess, Region, Tiles, Token};
    #[pymodule_export]
    use super::devices::{
        Allocation, Clock, CudaStream, ForeignMemory, Memory, OpenMachine, PyEvent, PyStream,
        Tensor, cuda_device_of, cuda_devices, cuda_meeting, dlpack, finish_operations,
    };
    #[pymodule_export]
    use super::interp::{leave_native_step, limits_changed};
    #[pymodule_export]
    use super::kernels::{spin_address, spin_graph, spin_threads, work};
    #[pymodule_export]
    use super::launches::{KernelLaunch, PyKernel, launch_loop};
    #[pymodule_export]
    use super::native::NativeFunction;
    #[pymodule_export]
    use super::pool::{PoolMemory, share_pool, share_pool_with_torch};
    #[pymodule_export]
    use super::runtime::{
        Context, PyEngine, after_fork, check_order, check_trace, current_context, held_devices,
        is_open, is_worker, known_models, read_trace, set_default_runtime_factory, task_stream,
    };
    #[pymodule_export]
    use super::space::{TaskList, TaskSpace, View};
    #[pymodule_export]
    use super::spawn::{
        Spawner, TaskDecorator, TaskFunction, count_groups, finish_elsewhere, spawn, spawn_many,
        submit, task,
    };
    #[pymodule_export]
    use super::support::connect;
    #[pymodule_export]
    use super::task::{
        Awaiting, PyTask, Subscription, awaiting, block, cancel_requested, is_failed,
    };
}
