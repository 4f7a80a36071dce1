//! What the ledger promises: rule by rule, for a mix of widths, and for random programs.

mod mix;
mod random;
mod rules;

use std::sync::Arc;

use smallvec::SmallVec;

use super::{Alternative, Capacity, Member, Request, WHOLE};
use crate::machine::{DeviceId, Kind};

/// That many accelerators with that much memory.
fn gpus(count: u16, memory: u64) -> Vec<Capacity> {
    let gpu = |index| Capacity {
        id: DeviceId::gpu(index),
        memory,
        fails_whole: false,
    };
    (0..count).map(gpu).collect()
}

/// Any accelerators, whole.
fn any(width: usize) -> Alternative {
    Alternative {
        members: vec![Member::Any(Kind::Gpu); width].into(),
        share: WHOLE,
        memory: 0,
    }
}

fn request(alternatives: &Arc<[Alternative]>) -> Request {
    Request {
        transfers: Box::default(),
        alternatives: Arc::clone(alternatives),
        estimates: SmallVec::new(),
        priority: 0,
        prefer: SmallVec::new(),
    }
}
