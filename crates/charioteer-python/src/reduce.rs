//! Reductions: the partial results of bodies that add up, and what bodies have to do with data beside
//! their arguments.
//!
//! # Reductions
//!
//! Tasks that reduce into one region, one after the other in spawn order, are a group of the core's. A
//! body gets a *partial*: an array of the region's shape that starts at the identity of the operation. It
//! takes one that no other body of the group has at the moment, or a new one, and gives it back when it
//! ends; so there are as many as bodies ran side by side at most. The task that ends the group combines
//! them into the region, with the value that was there, in the order in which they were made.
//!
//! A body that fails does not give its partial back, since it may have added a part. Without a retry the
//! group fails with it. A task with retries gets a partial of its own for each attempt, so that what a
//! failed attempt did is gone with it. A coroutine that moved to the event loop keeps its partial to the
//! end, which nobody here hears of: its partial is counted and given to nobody else.
//!
//! Where the task may run on devices its partial is its own (see [`crate::local`]), a managed array: when
//! the body begins the group notes it, and the task that ends the group waits for those on the host, as for
//! any array. They come after the others, in the order in which their tasks were spawned, wherever those
//! ran. Those tasks are done, and nobody else knows their partials: so what it waits for are copies, and
//! without workers it runs no other body on top of itself, which might wait for what comes after the
//! reduction.
//!
//! # Checking
//!
//! A runtime that checks looks at what a body may read and not write before and after: a read-only view
//! has a base that is none.

use std::collections::HashMap;
use std::sync::Arc;

use charioteer::data::Group;
use charioteer::engine::Running;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::access::Slot;
use crate::attached::Attached;
use crate::data::{HostEntry, Region};
use crate::gateway::PyRef;
use crate::interp::Interp;
use crate::local::{Deferral, Placed};
use crate::native::checksum;
use crate::support::{error, support};

/// The operations, by their numbers in the core; `charioteer/_data.py` has them in the same order.
pub const OPERATIONS: [&str; 4] = ["Sum", "Prod", "Min", "Max"];

/// What a reduction came to so far.
struct Entry {
    /// The view that it is combined into.
    target: PyRef,
    operation: u32,
    made: usize,
    /// Partials that nobody has, with their numbers.
    idle: Vec<(usize, PyRef)>,
    /// Those of coroutines that moved.
    moved: Vec<(usize, PyRef)>,
    /// Those of tasks that might run on devices, by their place in spawn order: whole regions, or rows
    /// of as many.
    own: Vec<(u64, Py<Region>)>,
}

impl Entry {
    fn new(target: PyRef, operation: u32) -> Self {
        Self {
            target,
            operation,
            made: 0,
            idle: Vec::new(),
            moved: Vec::new(),
            own: Vec::new(),
        }
    }
}

/// The reductions of a runtime, by the number of their group.
pub struct Partials(Attached<HashMap<u64, Entry>>);

impl Default for Partials {
    fn default() -> Self {
        Self(Attached::new(HashMap::new()))
    }
}

/// A partial that a body has.
pub struct Lent {
    group: u64,
    number: usize,
    array: PyRef,
}

impl Partials {
    /// The partial of a running body for one of its parameters.
    fn lend(
        &self,
        py: Python<'_>,
        running: &Running<'_, Interp>,
        slot: &Slot,
        alone: bool,
    ) -> PyResult<Lent> {
        let target: PyRef = slot.region().bind(py).get().view(py)?.into();
        let Some(group) = group_of(py, running, slot) else {
            // Of no elements nothing is reduced.
            return Ok(Lent {
                group: 0,
                number: 0,
                array: target,
            });
        };
        let id = group.id();
        let array = {
            let mut entries = self.0.lock(py);
            let entry = entries
                .entry(id)
                .or_insert_with(|| Entry::new(PyRef::new(target.clone_ref(py)), group.operation()));
            let idle = if alone { None } else { entry.idle.pop() };
            idle.ok_or_else(|| {
                entry.made += 1;
                entry.made
            })
        };
        match array {
            Ok((number, array)) => Ok(Lent {
                group: id,
                number,
                array,
            }),
            Err(number) => {
                let name = OPERATIONS[group.operation() as usize];
                let made = support(py)
                    .data
                    .bind(py)
                    .call1(("partial", name, target.bind(py)))?;
                Ok(Lent {
                    group: id,
                    number,
                    array: made.into(),
                })
            }
        }
    }

    /// Notes the partial that a task has for itself.
    fn note(&self, py: Python<'_>, running: &Running<'_, Interp>, slot: &Slot) -> PyResult<()> {
        let Some(group) = group_of(py, running, slot) else {
            return Ok(());
        };
        let (number, own) = slot.partial().expect("it has one of its own");
        let target: PyRef = slot.region().bind(py).get().view(py)?.into();
        let mut spare = Some(target);
        {
            let mut entries = self.0.lock(py);
            let entry = entries
                .entry(group.id())
                .or_insert_with(|| Entry::new(spare.take().expect("once"), group.operation()));
            // A second attempt has the same one.
            if entry.own.iter().all(|(known, _)| known != number) {
                entry.own.push((*number, own.clone_ref(py)));
            }
        }
        drop(spare);
        Ok(())
    }

    fn give_back(&self, py: Python<'_>, lent: Vec<Lent>, moved: bool) {
        for Lent {
            group,
            number,
            array,
        } in lent
        {
            let left = {
                let mut entries = self.0.lock(py);
                match entries.get_mut(&group) {
                    Some(entry) if moved => {
                        entry.moved.push((number, array));
                        None
                    }
                    Some(entry) => {
                        entry.idle.push((number, array));
                        None
                    }
                    None => Some(array),
                }
            };
            drop(left);
        }
    }
}

/// The group that a running body reduces into by a slot; none of a region without elements.
fn group_of(
    py: Python<'_>,
    running: &Running<'_, Interp>,
    slot: &Slot,
) -> Option<Arc<Group<Interp>>> {
    let part = slot.region().bind(py).get().part();
    running.groups().into_iter().find(|group| {
        Some(group.operation()) == slot.operation()
            && Arc::ptr_eq(group.part().datum(), part.datum())
            && group.part().region() == part.region()
    })
}

/// The end of a reduction, as the body of a task.
pub struct Reduction(u64);

impl Reduction {
    pub fn of(group: &Arc<Group<Interp>>) -> Self {
        Self(group.id())
    }

    /// Combines the partials into the region.
    pub fn combine(&self, py: Python<'_>, interp: &Interp) -> PyResult<()> {
        let entry = interp.partials.0.lock(py).remove(&self.0);
        let Some(entry) = entry else {
            return Ok(());
        };
        let mut partials = entry.idle;
        partials.extend(entry.moved);
        partials.sort_by_key(|(number, _)| *number);
        let partials = PyList::new(py, partials.iter().map(|(_, array)| array.bind(py)))?;
        let name = OPERATIONS[entry.operation as usize];
        let target = entry.target.bind(py);
        let data = support(py).data.bind(py);
        data.call1(("combine", name, target, partials))?;
        let mut own = entry.own;
        own.sort_by_key(|(number, _)| *number);
        if own.is_empty() {
            return Ok(());
        }
        let partials: Vec<&Region> = own.iter().map(|(_, own)| own.bind(py).get()).collect();
        let access = HostEntry::at_last(py, &partials)?;
        for partial in &partials {
            let rows = partial.readonly_view(py)?;
            data.call1(("combine_rows", name, target, rows))?;
        }
        drop(access);
        for partial in partials {
            partial.part().datum().close();
        }
        Ok(())
    }
}

/// What a body has to do with data beside its arguments.
#[derive(Default)]
pub struct BodyData {
    /// What its options declare, for `ctx.local`: a list of regions and whether they may be written.
    pub declared: Option<PyRef>,
    /// Each attempt is to have partials of its own, since another one may follow.
    pub alone: bool,
    /// The partials that it has.
    pub lent: Vec<Lent>,
    /// What it reads and does not write, in checking mode: what people call it, and a view.
    pub reads: Vec<(String, PyRef)>,
    /// What was in those when the attempt began.
    pub sums: Vec<u64>,
    /// What is known of a task that may run on devices.
    pub deferral: Option<Box<Deferral>>,
    /// Whether the body is for a set, if it was chosen when its devices were known.
    pub gathers: Option<bool>,
    /// Where the attempt runs, if it may run on devices.
    pub placed: Option<Box<Placed>>,
}

impl BodyData {
    /// An attempt begins.
    pub fn begin(&mut self, py: Python<'_>, running: &Running<'_, Interp>) -> PyResult<()> {
        self.lent.clear();
        self.sums.clear();
        if let Some(deferral) = &self.deferral {
            if let Some(library) = deferral.library {
                let noted = ("declare_library", running.task.id(), library.name());
                support(py).data.bind(py).call1(noted)?;
            }
            let placed = Placed::of(py, running, deferral, self.gathers)?;
            self.placed = Some(Box::new(placed));
        }
        let on_devices = self.placed.as_ref().is_some_and(|one| one.is_on_devices());
        if !on_devices {
            // Arrays of devices are read-only by themselves, where their library knows that.
            self.sums = self
                .reads
                .iter()
                .map(|(_, view)| checksum(view.bind(py)))
                .collect::<PyResult<_>>()?;
        }
        if let Some(declared) = &self.declared {
            support(py)
                .data
                .bind(py)
                .call1(("declare", running.task.id(), declared.bind(py)))?;
        }
        Ok(())
    }

    /// The array that the body gets for a slot.
    pub fn array<'py>(
        &mut self,
        py: Python<'py>,
        running: &Running<'_, Interp>,
        slot: &Slot,
    ) -> PyResult<Bound<'py, PyAny>> {
        let partials = &running.engine.domain().partials;
        if let Some(placed) = &self.placed {
            if slot.partial().is_some() {
                partials.note(py, running, slot)?;
            }
            return placed.fill(py, running, slot);
        }
        let lent = partials.lend(py, running, slot, self.alone)?;
        let array = lent.array.bind(py).clone();
        self.lent.push(lent);
        Ok(array)
    }

    /// The attempt ended with a value. `AccessError` if it wrote what it only reads.
    pub fn end(&mut self, py: Python<'_>, running: &Running<'_, Interp>) -> PyResult<()> {
        for ((name, view), before) in self.reads.iter().zip(&self.sums) {
            if checksum(view.bind(py))? != *before {
                let text = format!(
                    "{} wrote to {name}, which it declares that it only reads",
                    running.task.label()
                );
                return Err(error(py, "AccessError", (text,)));
            }
        }
        let lent = std::mem::take(&mut self.lent);
        running.engine.domain().partials.give_back(py, lent, false);
        Ok(())
    }

    /// The attempt ended, whichever way.
    pub fn over(&mut self, py: Python<'_>) -> PyResult<()> {
        match self.placed.take() {
            Some(placed) => placed.end(py),
            None => Ok(()),
        }
    }

    /// The body goes on elsewhere.
    pub fn moves(&mut self, py: Python<'_>, running: &Running<'_, Interp>) {
        let lent = std::mem::take(&mut self.lent);
        running.engine.domain().partials.give_back(py, lent, true);
    }
}
