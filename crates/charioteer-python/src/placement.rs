//! Placements, as they were said and as one runtime serves them.
//!
//! Reading a placement is Python's business (`charioteer/devices.py`, `charioteer/_placement.py`), and
//! costs more than a spawn. So what an object said is kept by its identity, where that cannot change,
//! and what it comes to in a runtime is kept beside it: a spawn that says `placement=gpu`, or calls a
//! task function that did, pays a look-up and a comparison.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use charioteer::engine::Engine;
use charioteer::gang::{Alternative, Member};
use charioteer::machine::{DeviceId, Kind};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use smallvec::SmallVec;

use crate::attached::Attached;
use crate::gateway::PyRef;
use crate::interp::{Core, Interp};
use crate::support::support;

/// What a task said for those alternatives that say nothing themselves.
#[derive(Clone, Copy, PartialEq, Default)]
pub struct Needs {
    pub memory: Option<u64>,
    pub share: Option<f64>,
}

/// The alternatives that a runtime can serve.
#[derive(Clone)]
pub enum Sets {
    /// So many cores.
    Cores(SmallVec<[u16; 2]>),
    /// Devices with streams.
    Devices(Arc<[Alternative]>),
}

/// A placement in normal form, and what it came to last.
pub struct Placement {
    normal: PyRef,
    resolved: Attached<Option<(u32, Needs, Sets)>>,
}

/// How many placements a thread remembers.
const REMEMBERED: usize = 256;

thread_local! {
    static KNOWN: RefCell<HashMap<usize, (PyRef, Arc<Placement>)>> = RefCell::default();
}

impl Placement {
    /// Reads a placement. `PlacementError` or `TypeError` if it is none.
    pub fn read(placement: &Bound<'_, PyAny>) -> PyResult<Arc<Self>> {
        let py = placement.py();
        // A list may have other elements the next time, and a tuple may hold one.
        let changes = placement.is_instance_of::<PyList>() || placement.is_instance_of::<PyTuple>();
        let key = placement.as_ptr() as usize;
        if !changes
            && let Some(known) =
                KNOWN.with_borrow(|known| known.get(&key).map(|(_, known)| Arc::clone(known)))
        {
            return Ok(known);
        }
        let normal = support(py).normal_placement.bind(py).call1((placement,))?;
        let read = Arc::new(Self {
            normal: normal.into(),
            resolved: Attached::new(None),
        });
        if !changes {
            let forgotten = KNOWN.with_borrow_mut(|known| {
                let forgotten = (known.len() >= REMEMBERED).then(|| std::mem::take(known));
                known.insert(key, (placement.clone().into(), Arc::clone(&read)));
                forgotten
            });
            drop(forgotten);
        }
        Ok(read)
    }

    /// What the runtime can serve of it. `PlacementError` if that is nothing.
    pub fn resolve(&self, py: Python<'_>, engine: &Core, needs: Needs) -> PyResult<Sets> {
        let known = {
            let resolved = self.resolved.lock(py);
            resolved
                .as_ref()
                .filter(|(id, said, _)| *id == Engine::<Interp>::id(engine) && *said == needs)
                .map(|(_, _, sets)| sets.clone())
        };
        if let Some(sets) = known {
            return Ok(sets);
        }
        let gpus = engine.machine().map_or(0, |machine| machine.gpus());
        let (cores, devices): (Vec<u16>, Vec<DeviceSet>) = support(py)
            .resolve_placement
            .bind(py)
            .call1((
                self.normal.bind(py),
                engine.cores(),
                gpus,
                needs.memory,
                needs.share,
            ))?
            .extract()?;
        let sets = if devices.is_empty() {
            Sets::Cores(cores.into())
        } else {
            Sets::Devices(devices.into_iter().map(alternative).collect())
        };
        let resolved = (engine.id(), needs, sets.clone());
        let old = self.resolved.lock(py).replace(resolved);
        drop(old);
        Ok(sets)
    }
}

/// What `charioteer/_placement.py` calls by this name.
type DeviceSet = (Vec<i32>, u32, u64);

fn alternative((devices, share, memory): DeviceSet) -> Alternative {
    Alternative {
        members: devices
            .into_iter()
            .map(|device| match u16::try_from(device) {
                Ok(index) => Member::Device(DeviceId::gpu(index)),
                Err(_) => Member::Any(Kind::Gpu),
            })
            .collect(),
        share,
        memory,
    }
}
