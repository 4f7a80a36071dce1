//! Placements, as they were said and as one runtime serves them.
//!
//! Reading a placement, and finding which body serves what, is Python's business
//! (`charioteer/devices.py`, `charioteer/_placement.py`, `charioteer/_variants.py`), and costs more than
//! a spawn. So what an object said is kept by its identity, where that cannot change, and what it comes
//! to for a function in a runtime is a [`Plan`], which is kept too: a spawn that says `placement=gpu`, or
//! calls a task function that did, pays a look-up and a comparison.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use charioteer::engine::Engine;
use charioteer::gang::{Alternative, Member};
use charioteer::machine::{DeviceId, Kind};
use charioteer::mapping::{Choice, Choices, On};
use charioteer::task::{Need, WHOLE_CORE};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use smallvec::SmallVec;

use crate::attached::Attached;
use crate::gateway::PyRef;
use crate::interp::{Core, Interp};
use crate::local::Gathers;
use crate::support::support;

/// What a task said for those alternatives that say nothing themselves.
#[derive(Clone, Copy, PartialEq, Default)]
pub struct Needs {
    pub memory: Option<u64>,
    pub share: Option<f64>,
}

/// A placement in normal form, and what it came to.
pub struct Placement {
    pub normal: PyRef,
    plans: Attached<Plans>,
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
            plans: Attached::new(Plans::default()),
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

    /// What it comes to for a function without variants. `PlacementError` if the runtime can serve
    /// nothing of it. `name` gives the function's name in the models of run times; it is asked only if
    /// there is something to choose.
    pub fn plan(
        self: &Arc<Self>,
        py: Python<'_>,
        engine: &Core,
        needs: Needs,
        name: impl Fn() -> PyResult<&'static str>,
    ) -> PyResult<Arc<Plan>> {
        let mut key = Key {
            engine: Engine::<Interp>::id(engine),
            needs,
            placement: None,
            rest: 0,
        };
        if let Some(plan) = self.plans.lock(py).get(&key) {
            return Ok(plan);
        }
        let name = name()?;
        // Names are kept for ever, so that the address is the name's own.
        let several = Key {
            rest: name.as_ptr() as usize,
            ..key.clone()
        };
        if let Some(plan) = self.plans.lock(py).get(&several) {
            return Ok(plan);
        }
        let plan = Plan::resolve(py, engine, Some(self), needs, None, true, name)?;
        if matches!(plan.way, Way::Mapped(_)) {
            key = several;
        }
        let forgotten = self.plans.lock(py).put(key, Arc::clone(&plan));
        drop(forgotten);
        Ok(plan)
    }
}

/// How a task runs, as far as the machine and the function decide it.
pub struct Plan {
    pub way: Way,
    /// The bodies that may serve it, each the number of a variant or [`BASE`].
    /// [`Choice::variant`] is an index here, with [`OPEN`] if another body serves some devices.
    pub bodies: Box<[i32]>,
    /// How many variants the function had when the plan was made.
    pub variants: usize,
    /// How many members the largest set with a device has; 0 if there are cores alone.
    pub width: usize,
    /// Of a way that is mapped for the sake of data: the set of devices of a call that has none, and for
    /// which there is nothing to estimate unless its run time is declared.
    pub without_data: Option<Arc<[Alternative]>>,
    /// Of a way to devices without a choice: whether the body is for a set.
    gathers: bool,
    /// Which bodies are for sets of several members, by their places in `bodies`.
    pub wide: SmallVec<[usize; 2]>,
}

impl Plan {
    /// Whether bodies get tuples of arrays.
    pub fn gathers(&self) -> Gathers {
        match &self.way {
            Way::Mapped(choices) => Gathers::Chosen(Arc::clone(choices)),
            _ => Gathers::Always(self.gathers),
        }
    }

    /// Which bodies may run on devices, by their places in `bodies`.
    pub fn on_devices(&self, body: usize) -> bool {
        match &self.way {
            Way::Cores(..) => false,
            Way::Devices(_) => true,
            Way::Mapped(choices) => choices.list().iter().any(|choice| {
                body_of(choice.variant) == body && matches!(choice.on, On::Devices(_))
            }),
        }
    }
}

/// Where it runs.
pub enum Way {
    /// On cores; of several numbers of them the first one that is free.
    Cores(Need, Option<Arc<[u16]>>),
    /// On this set of devices.
    Devices(Arc<[Alternative]>),
    /// There is something to choose when it is ready.
    Mapped(Arc<Choices>),
}

/// Stands for the base body, where a number stands for a variant.
pub const BASE: i32 = -1;
/// The flag of a choice that another body serves if it gets certain devices.
pub const OPEN: u32 = 1 << 31;
/// The flag of a choice whose body is for a set, and gets tuples of arrays.
pub const SET: u32 = 1 << 30;

/// Which of a plan's bodies serves a choice, by the number of that.
pub fn body_of(variant: u32) -> usize {
    (variant & !(OPEN | SET)) as usize
}

/// What `charioteer/_placement.py` calls by this name.
type Resolved = (Vec<i32>, u32, u64, i32, bool, String, bool);

impl Plan {
    /// `variants`: the matcher of the function and how many of its variants count, if it has any;
    /// `restricted`: whether the placement is all of the choice. `PlacementError` if nothing can be served.
    pub fn resolve(
        py: Python<'_>,
        engine: &Core,
        placement: Option<&Arc<Placement>>,
        needs: Needs,
        variants: Option<(&PyRef, usize)>,
        restricted: bool,
        name: &str,
    ) -> PyResult<Arc<Self>> {
        let gpus = engine.machine().map_or(0, |machine| machine.gpus());
        let resolved: Vec<Resolved> = support(py)
            .resolve_placement
            .bind(py)
            .call1((
                placement.map(|placement| placement.normal.bind(py)),
                (engine.cores(), gpus),
                needs.memory,
                needs.share,
                variants.map(|(matcher, count)| (matcher.bind(py), count)),
                restricted,
            ))?
            .extract()?;
        let mut bodies: Vec<i32> = Vec::new();
        let choices: Vec<Choice> = resolved
            .into_iter()
            .map(|(places, share, memory, body, open, label, gathers)| {
                let at = bodies.iter().position(|known| *known == body);
                let at = at.unwrap_or_else(|| {
                    bodies.push(body);
                    bodies.len() - 1
                });
                let at = u32::try_from(at).expect("fewer variants than 2^31");
                let flags = if open { OPEN } else { 0 } | if gathers { SET } else { 0 };
                Choice {
                    variant: at | flags,
                    label,
                    on: on(&places, share, memory),
                    cost: None,
                }
            })
            .collect();
        let members = |choice: &Choice| match &choice.on {
            On::Cores(_) => 0,
            On::Devices(set) => set.members.len(),
        };
        let width = choices.iter().map(members).max().unwrap_or(0);
        let gathers = choices[0].variant & SET != 0;
        let mut wide: SmallVec<[usize; 2]> = choices
            .iter()
            .filter(|choice| members(choice) > 1)
            .map(|choice| body_of(choice.variant))
            .collect();
        wide.dedup();
        let only = choices.len() == 1;
        let is_open = |choice: &Choice| match &choice.on {
            On::Cores(_) => false,
            On::Devices(set) => set.members.contains(&Member::Any(Kind::Gpu)),
        };
        let several =
            choices.iter().any(is_open) && engine.machine().is_some_and(|it| it.gpus() > 1);
        let without_data = match &choices[0].on {
            On::Devices(set) if only && !engine.domain().maps_all && bodies.len() == 1 => {
                Some(Arc::from([set.clone()]))
            }
            _ => None,
        };
        let way = match &choices[0].on {
            On::Cores(need) if only => Way::Cores(*need, None),
            // By default the ledger takes the device on which the task is done first, which takes
            // estimates if there are several; another policy says which one it is, and hears of each
            // task where its predecessors ran.
            On::Devices(set) if only && !engine.domain().maps_all && !several => {
                Way::Devices([set.clone()].into())
            }
            _ => {
                match counts(&choices).filter(|_| !engine.domain().maps_all && bodies.len() == 1) {
                    Some(counts) => Way::Cores(Need::Cores(counts[0]), Some(counts)),
                    None => Way::Mapped(
                        engine
                            .choices(name, choices)
                            .map_err(|why| crate::spawn::spawn_error(py, why, None))?,
                    ),
                }
            }
        };
        Ok(Arc::new(Self {
            way,
            bodies: bodies.into(),
            variants: variants.map_or(0, |(_, count)| count),
            width,
            without_data,
            gathers,
            wide,
        }))
    }
}

/// Stands for a core in the sets of `charioteer/_placement.py`.
const CORE: i32 = -2;

fn on(places: &[i32], share: u32, memory: u64) -> On {
    if places.iter().all(|place| *place == CORE) {
        let cores = u16::try_from(places.len()).expect("a runtime has fewer workers than 2^16");
        return On::Cores(match share {
            WHOLE_CORE if cores == 1 => Need::Core,
            WHOLE_CORE => Need::Cores(cores),
            part => Need::Share(part),
        });
    }
    On::Devices(Alternative {
        members: places
            .iter()
            .map(|place| match u16::try_from(*place) {
                Ok(index) => Member::Device(DeviceId::gpu(index)),
                Err(_) if *place == CORE => Member::Any(Kind::Cpu),
                Err(_) => Member::Any(Kind::Gpu),
            })
            .collect(),
        share,
        memory,
    })
}

/// The numbers of cores, if all choices are on whole cores.
fn counts(choices: &[Choice]) -> Option<Arc<[u16]>> {
    let count = |choice: &Choice| match choice.on {
        On::Cores(Need::Core) => Some(1),
        On::Cores(Need::Cores(count)) => Some(count),
        _ => None,
    };
    choices.iter().map(count).collect()
}

/// What a plan depends on.
#[derive(Clone)]
pub struct Key {
    pub engine: u32,
    pub needs: Needs,
    pub placement: Option<Arc<Placement>>,
    /// Whatever else it is, in one word.
    pub rest: usize,
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        let same = match (&self.placement, &other.placement) {
            (Some(mine), Some(others)) => Arc::ptr_eq(mine, others),
            (None, None) => true,
            _ => false,
        };
        same && self.engine == other.engine && self.needs == other.needs && self.rest == other.rest
    }
}

/// The plans that were made last, few.
#[derive(Default)]
pub struct Plans(Vec<(Key, Arc<Plan>)>);

impl Plans {
    /// How many are kept: a function is called with few placements.
    const MOST: usize = 8;

    pub fn get(&self, key: &Key) -> Option<Arc<Plan>> {
        let found = self.0.iter().find(|(known, _)| known == key);
        found.map(|(_, plan)| Arc::clone(plan))
    }

    /// Keeps a plan; what is to be dropped for it, outside of the section.
    #[must_use]
    pub fn put(&mut self, key: Key, plan: Arc<Plan>) -> Vec<(Key, Arc<Plan>)> {
        // Those of runtimes that are closed are of no use any more.
        let mut old: Vec<_> = self
            .0
            .extract_if(.., |(known, _)| known.engine != key.engine || *known == key)
            .collect();
        if self.0.len() >= Self::MOST {
            old.push(self.0.remove(0));
        }
        self.0.push((key, plan));
        old
    }
}
