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

use crate::access::Partial;
use crate::attached::Attached;
use crate::gateway::PyRef;
use crate::interp::Interp;
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
    fn lend<'py>(
        &self,
        py: Python<'py>,
        running: &Running<'_, Interp>,
        partial: &Partial,
        alone: bool,
    ) -> PyResult<Lent> {
        let region = partial.region().bind(py).get();
        let target: PyRef = region.view(py)?.into();
        let groups = running.groups();
        let group = groups.iter().find(|group| {
            group.operation() == partial.operation()
                && Arc::ptr_eq(group.part().datum(), region.part().datum())
                && group.part().region() == region.part().region()
        });
        let Some(group) = group else {
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
            let entry = entries.entry(id).or_insert_with(|| Entry {
                target: PyRef::new(target.clone_ref(py)),
                operation: group.operation(),
                made: 0,
                idle: Vec::new(),
                moved: Vec::new(),
            });
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
        support(py)
            .data
            .bind(py)
            .call1(("combine", name, entry.target.bind(py), partials))?;
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
}

impl BodyData {
    /// An attempt begins.
    pub fn begin(&mut self, py: Python<'_>, running: &Running<'_, Interp>) -> PyResult<()> {
        self.lent.clear();
        self.sums = self
            .reads
            .iter()
            .map(|(_, view)| checksum(view.bind(py)))
            .collect::<PyResult<_>>()?;
        if let Some(declared) = &self.declared {
            support(py)
                .data
                .bind(py)
                .call1(("declare", running.task.id(), declared.bind(py)))?;
        }
        Ok(())
    }

    /// The array that a parameter reduces into.
    pub fn partial<'py>(
        &mut self,
        py: Python<'py>,
        running: &Running<'_, Interp>,
        partial: &Partial,
    ) -> PyResult<Bound<'py, PyAny>> {
        let lent = running
            .engine
            .domain()
            .partials
            .lend(py, running, partial, self.alone)?;
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

    /// The body goes on elsewhere.
    pub fn moves(&mut self, py: Python<'_>, running: &Running<'_, Interp>) {
        let lent = std::mem::take(&mut self.lent);
        running.engine.domain().partials.give_back(py, lent, true);
    }
}
