//! The processors of the host, and threads that are started from pinned ones.

use std::path::PathBuf;

use charioteer::machine::cpus;
use pyo3::prelude::*;

/// The NUMA nodes with some of these processors, each with its processors and bytes, from a folder such
/// as `/sys/devices/system`; nothing, unless they have all of them.
#[pyfunction]
pub fn host_nodes(system: PathBuf, usable: Vec<u32>) -> Vec<(Vec<u32>, u64)> {
    cpus::nodes(&system, &usable)
        .into_iter()
        .map(|node| (node.cpus, node.memory))
        .collect()
}

/// Calls what starts a thread, with the calling thread pinned to nothing meanwhile.
#[pyfunction]
pub fn unpinned<'py>(start: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    cpus::unpinned(|| start.call0())
}
