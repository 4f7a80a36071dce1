//! Logs what devices see, and what the ledger decides about them, while a runtime is traced.
//!
//! What the device layer sees comes through an observer of the machine, on the thread that made the
//! call, which knows the body that it runs. What the ledger decides is logged by whoever has the
//! turn, before it acts, so that the trace has it in the ledger's order. Untraced, that is a branch.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::Arc;

use crate::machine::{Event, HOST, Machine, Observed, Observer};
use crate::schedule::gang::{Alternative, Capacity, Grant, GrantId, WHOLE};
use crate::task::Domain;
use crate::trace::{DeviceEvent, Trace};
use crate::work::Worker;

/// Logs for one engine.
pub(super) struct Witness {
    trace: Arc<Trace>,
    machine: Arc<Machine>,
    observer: Arc<dyn Observer>,
}

impl Witness {
    /// Observes the machine from now on.
    pub(super) fn new<D: Domain>(
        trace: &Arc<Trace>,
        machine: &Arc<Machine>,
        capacities: &[Capacity],
        workers: usize,
        engine: u32,
    ) -> Self {
        if workers != 0 {
            // Without workers nobody keeps account of cores.
            let cores = u32::try_from(workers).expect("fewer than 65,536 workers");
            let has = DeviceEvent::Capacity {
                device: HOST,
                share: cores * WHOLE,
                memory: 0,
            };
            trace.record_device(has, 0);
        }
        for capacity in capacities {
            let has = DeviceEvent::Capacity {
                device: capacity.id,
                share: WHOLE,
                memory: capacity.memory,
            };
            trace.record_device(has, 0);
        }
        let observer: Arc<dyn Observer> = Arc::new(Listener::<D> {
            trace: Arc::clone(trace),
            engine,
            domain: PhantomData,
        });
        machine.add_observer(Arc::clone(&observer));
        Self {
            trace: Arc::clone(trace),
            machine: Arc::clone(machine),
            observer,
        }
    }

    /// Observes the machine no more.
    pub(super) fn leave(&self) {
        self.machine.remove_observer(&self.observer);
    }

    pub(super) fn log(&self, event: DeviceEvent, task: u64) {
        self.trace.record_device(event, task);
    }
}

struct Listener<D> {
    trace: Arc<Trace>,
    engine: u32,
    domain: PhantomData<fn(D)>,
}

impl<D: Domain> Observer for Listener<D> {
    fn observe(&self, observed: Observed) {
        // How far streams got by themselves proves nothing to a host that did not look.
        if matches!(observed, Observed::Completed(_)) {
            return;
        }
        let task = Worker::with(self.engine, |worker: Option<&Worker<D>>| {
            worker.and_then(Worker::running).map_or(0, |task| task.id)
        });
        self.trace
            .record_device(DeviceEvent::Observed(observed), task);
    }
}

/// Whose the grants of the ledger are; with the ledger, and empty if nothing is traced.
#[derive(Default)]
pub(super) struct Owners(HashMap<GrantId, u64>);

impl Owners {
    pub(super) fn granted(
        &mut self,
        witness: &Witness,
        task: u64,
        grant: &Grant,
        alternative: &Alternative,
    ) {
        self.0.insert(grant.id, task);
        let time = witness.trace.now();
        let members = count(alternative.members.len());
        let cores = std::iter::repeat_n(HOST, alternative.cores());
        let devices = grant.lent.iter().map(|lent| lent.device);
        let places = |cores: bool| {
            let all = (0..).zip(&alternative.members);
            all.filter(move |(_, member)| member.is_core() == cores)
                .map(|(place, _)| place)
        };
        let places = places(false).chain(places(true));
        for ((member, device), place) in (0..).zip(devices.chain(cores)).zip(places) {
            let granted = DeviceEvent::Granted {
                device,
                member,
                members,
                place,
                share: alternative.share,
                memory: alternative.memory,
            };
            witness.trace.record_device_at(time, granted, task);
        }
    }

    pub(super) fn resumed(&self, witness: &Witness, id: GrantId) {
        witness.log(DeviceEvent::Resumed, self.0[&id]);
    }

    pub(super) fn paused(&self, witness: &Witness, id: GrantId, events: &[Option<Event>]) {
        let time = witness.trace.now();
        for (member, &behind) in (0..).zip(events) {
            let paused = DeviceEvent::Paused { member, behind };
            witness.trace.record_device_at(time, paused, self.0[&id]);
        }
    }

    pub(super) fn returned(&mut self, witness: &Witness, id: GrantId, events: &[Option<Event>]) {
        let task = self.0.remove(&id).expect("it was granted");
        let time = witness.trace.now();
        for (member, &behind) in (0..).zip(events) {
            let returned = DeviceEvent::Returned { member, behind };
            witness.trace.record_device_at(time, returned, task);
        }
    }
}

fn count(members: usize) -> u16 {
    u16::try_from(members).expect("a set has few members")
}
