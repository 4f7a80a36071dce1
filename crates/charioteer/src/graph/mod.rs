//! The graph: how a spawn links a task to its predecessors, and how a cycle is found before it can
//! hang anybody.
//!
//! # Protocol
//!
//! Predecessors are fixed at the spawn, so a cycle can close in two ways only: a task is spawned
//! whose handle somebody depends on already, or a body waits. Both put their edges into the graph,
//! search it, and take them back if they closed a cycle.
//!
//! * **Forward edges** are stored anyway: a task's links name its dependents, and the latches of
//!   those that wait for it. A search forward from a task is therefore complete.
//! * **Backward edges** are stored for *dirty* tasks alone: those that had an unspawned or dirty
//!   predecessor when they were spawned. A clean task has nothing unspawned behind it, and never
//!   will have, so no later spawn can close a cycle through it; a search backward may stop there as
//!   long as no body waits for an unspawned or dirty task (`waits`, counted by the engine).
//! * A spawn that can close a cycle searches from both ends in turn, so that its cost is that of
//!   the smaller side: a chain that is spawned in reverse is linear.
//!
//! **No cycle is missed.** Of the edges of a cycle one is the last to stand. Whoever puts it there
//! searches afterwards, and then all others stand:
//!
//! * A spawn links itself to its predecessors while it still owns its task, and then publishes
//!   `Waiting` by a compare-and-swap that refuses if the handle has links of its own. If it succeeds,
//!   nothing led on from the task yet: its edges are not the last of any cycle, and who links the
//!   handle later sees them. If it refuses, the spawn searches before it publishes.
//! * A wait registers its latch and then searches, unless nothing that it waits for has a way on: a
//!   task that is ready or runs depends on nobody, and if its body waits later, that wait stands
//!   later. A task whose spawner is still at work is told by its dirt, see below.
//! * `waits` counts waits for dirty tasks from before their latch is registered. A spawn that reads
//!   zero, under the graph lock, searches before the wait that it did not count does.
//!
//! A named task is dirty from its claim until it is published, so that who depends on it or waits for
//! it meanwhile takes it for one that can have anything behind it. Searches and what they lead to are
//! done under the graph lock: of two that would find the same cycle one gives way.
//!
//! References that a search drops could be the last ones, and free a user's value; they are handed
//! out and dropped after the lock (invariant 8).

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use crate::sync::Ordering;
use crate::task::state::{DIRTY, ORDERED};
use crate::task::{Domain, Link, Phase, Task, TaskRef};

/// What a search found, and the references that are to be dropped once no lock is held.
pub(crate) struct Search<D: Domain> {
    /// The names along the cycle, its first also at its end.
    pub(crate) cycle: Option<Vec<String>>,
    visited: Vec<TaskRef<D>>,
}

/// Those who would hear of the end of `task`.
fn successors<D: Domain>(task: &Task<D>) -> Vec<TaskRef<D>> {
    let links = task.links.lock();
    let rare = links.rare.as_ref();
    let gate = rare.and_then(|rare| rare.data.as_ref()?.gate.as_ref());
    let gate = gate.map(|(gate, _)| Arc::clone(gate));
    links
        .list
        .iter()
        .filter_map(|link| match link {
            Link::Dependent(next) | Link::After(next) => Some(Arc::clone(next)),
            Link::Latch(latch) => latch.waiter().cloned(),
            Link::Ahead(_) | Link::Behind(_) | Link::Callback(_) => None,
        })
        .chain(gate)
        .collect()
}

/// The predecessors of a dirty task.
fn predecessors<D: Domain>(task: &Task<D>) -> Vec<TaskRef<D>> {
    let links = task.links.lock();
    links
        .rare
        .as_ref()
        .map_or_else(Vec::new, |rare| rare.predecessors.clone())
}

/// One end of the search: breadth first, with the way back to where it began.
struct Front<D: Domain> {
    found: HashMap<*const Task<D>, Option<usize>>,
    order: Vec<TaskRef<D>>,
    queue: VecDeque<usize>,
}

impl<D: Domain> Front<D> {
    fn new(from: impl IntoIterator<Item = TaskRef<D>>) -> Self {
        let mut front = Self {
            found: HashMap::new(),
            order: Vec::new(),
            queue: VecDeque::new(),
        };
        for task in from {
            front.add(task, None);
        }
        front
    }

    fn add(&mut self, task: TaskRef<D>, via: Option<usize>) {
        if let std::collections::hash_map::Entry::Vacant(entry) =
            self.found.entry(Arc::as_ptr(&task))
        {
            entry.insert(via);
            self.queue.push_back(self.order.len());
            self.order.push(task);
        }
    }

    /// Looks at one more task and says which it was.
    fn step(&mut self, neighbours: impl Fn(&Task<D>) -> Vec<TaskRef<D>>) -> Option<TaskRef<D>> {
        let at = self.queue.pop_front()?;
        let task = Arc::clone(&self.order[at]);
        for next in neighbours(&task) {
            self.add(next, Some(at));
        }
        Some(task)
    }

    /// The names from where the search began to `task`.
    fn path(&self, task: &TaskRef<D>) -> Vec<String> {
        let mut names = vec![task.label().to_string()];
        let mut via = self.found.get(&Arc::as_ptr(task)).copied().flatten();
        while let Some(at) = via {
            let task = &self.order[at];
            names.push(task.label().to_string());
            via = self.found.get(&Arc::as_ptr(task)).copied().flatten();
        }
        names.reverse();
        names
    }
}

/// Looks for a way from `task` along its links to one of `targets`, which `task` would depend on or
/// wait for. `backward_decides`: a search backward from the targets that ends is proof enough.
pub(crate) fn search<D: Domain>(
    task: &TaskRef<D>,
    targets: &[TaskRef<D>],
    backward_decides: bool,
) -> Search<D> {
    let wanted: HashSet<*const Task<D>> = targets.iter().map(Arc::as_ptr).collect();
    let start = Arc::as_ptr(task);
    let mut forward = Front::new([Arc::clone(task)]);
    let mut backward = Front::new(targets.iter().cloned());
    let cycle = loop {
        let Some(seen) = forward.step(successors) else {
            break None;
        };
        if wanted.contains(&Arc::as_ptr(&seen)) {
            let mut names = forward.path(&seen);
            names.push(task.label().to_string());
            break Some(names);
        }
        if backward_decides {
            let Some(seen) = backward.step(predecessors) else {
                break None;
            };
            if Arc::as_ptr(&seen) == start {
                let mut names = backward.path(&seen);
                names.insert(0, task.label().to_string());
                names.reverse();
                break Some(names);
            }
        }
    };
    let mut visited = forward.order;
    visited.append(&mut backward.order);
    Search { cycle, visited }
}

impl<D: Domain> Search<D> {
    /// Gives the cycle, and drops the rest; call it with no lock held.
    pub(crate) fn into_cycle(self) -> Option<Vec<String>> {
        drop(self.visited);
        self.cycle
    }
}

/// Whether a spawn on this predecessor could close a cycle, now or later.
#[inline]
pub(crate) fn is_loose<D: Domain>(task: &Task<D>) -> bool {
    let state = task.state.load();
    match state.phase() {
        Phase::Unspawned => true,
        // Ended before its turn: what it stands behind is still to come.
        Phase::Done => {
            state.has(DIRTY) && state.has(ORDERED) && task.pending.load(Ordering::Acquire) != 0
        }
        _ => state.has(DIRTY),
    }
}
