//! The tasks that wait, by shape, and in which order they are considered.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use super::request::{Alternative, Capacity, Coming, Plan, Request, Transfer};
use crate::machine::Event;
use crate::task::state::validate;

/// How many requests that nobody waits with are remembered, at least.
const REMEMBERED: usize = 64;

/// How many tasks a sweep comprises at most. Longer ones would save next to nothing.
const SWEEP: usize = 256;

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Waiting<T> {
    pub(super) token: T,
    pub(super) prefer: SmallVec<[Event; 1]>,
    estimates: SmallVec<[Option<Duration>; 1]>,
    pub(super) transfers: Box<[Transfer]>,
    /// The one device that has its data soonest, if there is one, by its index.
    pub(super) home: Option<usize>,
    ticket: u64,
}

/// The one device to which a task's data come soonest.
fn home(transfers: &[Transfer]) -> Option<usize> {
    let time = |index: &usize| transfers[*index].of(1).time;
    let best = (0..transfers.len()).min_by_key(time)?;
    let others = (0..transfers.len()).filter(|index| *index != best);
    (time(&best) < others.map(|index| time(&index)).min()?).then_some(best)
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX >> 16)
}

impl<T> Waiting<T> {
    /// How long it takes at least in nanoseconds, as far as that is known.
    pub(super) fn least(&self) -> u64 {
        let known = self.estimates.iter().flatten().copied();
        known.map(nanoseconds).min().unwrap_or(0)
    }

    /// Whether its time is reckoned with: it has data, or run times that are known.
    pub(super) fn is_reckoned(&self) -> bool {
        !self.transfers.is_empty() || !self.estimates.is_empty()
    }

    /// How long its data take to come to one of so many devices.
    pub(super) fn transfer(&self, index: usize, devices: usize) -> Coming {
        let transfer = self.transfers.get(index);
        transfer.map_or_else(Coming::default, |transfer| transfer.of(devices as u64))
    }

    /// How long an alternative takes in nanoseconds, if that is known.
    pub(super) fn known(&self, alternative: usize) -> Option<u64> {
        let estimate = self.estimates.get(alternative).copied().flatten();
        estimate.map(nanoseconds)
    }
}

/// The waiting tasks of one shape and one priority.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Lane<T> {
    /// Never empty, unless it is the shape's only lane.
    tasks: VecDeque<Waiting<T>>,
    /// By how many device-times the oldest has been overtaken: the sum of `younger`.
    overtaken: u64,
    /// Grants that overtook tasks here: those with a ticket below the first number, by the second.
    younger: BinaryHeap<Reverse<(u64, u64)>>,
    /// How many grants there had been when the oldest, by its ticket, first waited although an
    /// alternative fitted.
    declined: Option<(u64, u64)>,
}

impl<T> Lane<T> {
    fn new() -> Self {
        Self {
            tasks: VecDeque::new(),
            overtaken: 0,
            younger: BinaryHeap::new(),
            declined: None,
        }
    }

    /// The ticket of its oldest task; beyond all if it is empty.
    fn oldest(&self) -> u64 {
        self.tasks.front().map_or(u64::MAX, |task| task.ticket)
    }

    /// Forgets what did not overtake the oldest.
    fn settle(&mut self) {
        let oldest = self.oldest();
        while let Some(&Reverse((below, devices))) = self.younger.peek() {
            if below > oldest {
                break;
            }
            self.overtaken -= devices;
            self.younger.pop();
        }
    }
}

/// What tasks of one shape have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    alternatives: Arc<[Alternative]>,
    home: Option<usize>,
}

/// The waiting tasks with equal alternatives, and with their data on one device if they have any.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Shape<T> {
    key: Key,
    /// Those alternatives that can be served, with their indices, in order.
    pub(super) plans: SmallVec<[(usize, Plan); 2]>,
    /// The devices that it may use.
    footprint: u64,
    /// The least number of devices of any alternative that can be served before a paused body goes on.
    width: u64,
    /// The least part of the machine that it takes. Sweeps go up and down by this.
    pub(super) size: u64,
    lanes: BTreeMap<Reverse<i32>, Lane<T>>,
    /// Its index in `Queue::live`.
    live: Option<usize>,
    /// Whether it cannot be served before a paused body goes on.
    stuck: bool,
}

impl<T> Shape<T> {
    fn new(devices: &[Capacity], lost: u64, key: Key) -> Self {
        let mut shape = Self {
            key,
            plans: SmallVec::new(),
            footprint: 0,
            width: 0,
            size: 0,
            lanes: BTreeMap::new(),
            live: None,
            stuck: false,
        };
        shape.plan(devices, lost);
        shape.set_stuck(|_| false);
        shape
    }

    fn plan(&mut self, devices: &[Capacity], lost: u64) {
        self.plans = self
            .key
            .alternatives
            .iter()
            .enumerate()
            .filter_map(|(index, alternative)| {
                let plan = Plan::new(devices, lost, alternative).ok()?;
                Some((index, plan))
            })
            .collect();
        let plans = self.plans.iter().map(|(_, plan)| plan);
        self.footprint = plans.clone().fold(0, |all, plan| all | plan.devices());
        self.size = plans.map(Plan::size).min().unwrap_or(0);
    }

    pub(super) fn is_stuck(&self) -> bool {
        self.stuck
    }

    fn set_stuck(&mut self, is_stuck: impl Fn(&Plan) -> bool) {
        let plans = self.plans.iter().map(|(_, plan)| plan);
        let width = plans.filter(|plan| !is_stuck(plan)).map(Plan::width).min();
        self.stuck = width.is_none();
        self.width = width.unwrap_or(0);
    }

    /// Whether it may take nothing, so that it delays nobody.
    pub(super) fn takes_nothing(&self) -> bool {
        self.plans.iter().any(|(_, plan)| plan.takes_nothing())
    }

    /// Whether none of its alternatives can start on these devices and no others; those without a share can
    /// anywhere.
    pub(super) fn is_shut_out(&self, open: u64) -> bool {
        let can = |plan: &Plan| plan.share == 0 || plan.members.iter().all(|bits| bits & open != 0);
        !self.plans.iter().any(|(_, plan)| can(plan))
    }

    fn top(&self) -> Option<(i32, &Lane<T>)> {
        let (&Reverse(priority), lane) = self.lanes.first_key_value()?;
        Some((priority, lane))
    }

    /// The device-nanoseconds that a task takes at least, as estimated.
    fn work(&self, estimates: &[Option<Duration>]) -> u64 {
        let plans = self.plans.iter().filter_map(|(index, plan)| {
            let time = estimates.get(*index).copied().flatten()?;
            Some(nanoseconds(time).saturating_mul(plan.width()))
        });
        plans.min().unwrap_or(0)
    }

    /// How many grants there had been when its first task first waited although an alternative fitted.
    pub(super) fn declined(&self) -> Option<u64> {
        let lane = self.top()?.1;
        let (ticket, grants) = lane.declined?;
        (ticket == lane.oldest()).then_some(grants)
    }

    /// The first of its tasks.
    pub(super) fn head(&self) -> Option<&Waiting<T>> {
        self.top()?.1.tasks.front()
    }

    /// Where its first task stands among all: less is sooner.
    fn rank(&self) -> Rank {
        let (priority, lane) = self.top().expect("somebody waits");
        let head = lane.tasks.front().expect("somebody waits");
        (Reverse(priority), head.ticket)
    }
}

/// Larger priorities first, then age.
type Rank = (Reverse<i32>, u64);

/// One way through the shapes of one priority; see the module.
#[derive(Clone, Copy, Debug)]
struct Sweep {
    priority: i32,
    up: bool,
    /// Where it is.
    size: u64,
    /// It comprises the tasks with lower tickets.
    horizon: u64,
}

/// In which order shapes are considered.
#[derive(Debug, Default)]
pub(super) struct Order {
    /// The sweep's, of the largest priority that anybody waits with.
    pub(super) sweep: SmallVec<[usize; 8]>,
    /// All others, by rank, and whether they have that priority too.
    pub(super) others: SmallVec<[(usize, bool); 8]>,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Queue<T> {
    shapes: Vec<Shape<T>>,
    vacant: Vec<usize>,
    /// Shapes that somebody waits with.
    live: Vec<usize>,
    by_value: HashMap<Key, usize>,
    /// Shapes by the address of their alternatives.
    recent: [Option<(Key, usize)>; 8],
    /// When to forget shapes that nobody waits with.
    enough: usize,
    tickets: u64,
    waiting: usize,
    /// The sum of what those who wait take.
    work: u64,
    sweep: Option<Sweep>,
}

impl<T> Queue<T> {
    pub(super) fn new() -> Self {
        Self {
            shapes: Vec::new(),
            vacant: Vec::new(),
            live: Vec::new(),
            by_value: HashMap::new(),
            recent: Default::default(),
            enough: REMEMBERED,
            tickets: 0,
            waiting: 0,
            work: 0,
            sweep: None,
        }
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// The device-nanoseconds that those who wait take at least, as estimated.
    pub(super) fn work(&self) -> u64 {
        self.work
    }

    /// The first task of a shape waits although an alternative fits.
    pub(super) fn decline(&mut self, index: usize, grants: u64) {
        let shape = &mut self.shapes[index];
        if shape.declined().is_none()
            && let Some(mut lane) = shape.lanes.first_entry()
        {
            let lane = lane.get_mut();
            lane.declined = Some((lane.oldest(), grants));
        }
    }

    pub(super) fn shape(&self, shape: usize) -> &Shape<T> {
        &self.shapes[shape]
    }

    /// The shapes that somebody waits with.
    pub(super) fn live(&self) -> &[usize] {
        &self.live
    }

    /// What a request asks for as a task that may wait, and the index of its shape.
    ///
    /// # Errors
    /// The token, if no alternative can be served by the devices that are not lost.
    pub(super) fn admit(
        &mut self,
        devices: &[Capacity],
        lost: u64,
        token: T,
        request: Request,
    ) -> Result<(usize, i32, Waiting<T>), T> {
        let key = Key {
            home: home(&request.transfers),
            alternatives: request.alternatives,
        };
        let home = key.home;
        let index = self.find(devices, lost, key);
        if self.shapes[index].plans.is_empty() {
            return Err(token);
        }
        let task = Waiting {
            token,
            prefer: request.prefer,
            estimates: request.estimates,
            transfers: request.transfers,
            home,
            ticket: self.tickets,
        };
        Ok((index, request.priority, task))
    }

    /// Lets a task that was admitted just now wait; gives it, and whether it is the first of its shape and
    /// priority.
    pub(super) fn push(
        &mut self,
        index: usize,
        priority: i32,
        task: Waiting<T>,
    ) -> (&Waiting<T>, bool) {
        let shape = &mut self.shapes[index];
        if shape.live.is_none() {
            shape.live = Some(self.live.len());
            self.live.push(index);
            // It kept one lane, which may be another one's.
            if !shape.lanes.contains_key(&Reverse(priority)) {
                shape.lanes.clear();
            }
        }
        if !task.estimates.is_empty() {
            self.work = self.work.saturating_add(shape.work(&task.estimates));
        }
        let lane = shape
            .lanes
            .entry(Reverse(priority))
            .or_insert_with(Lane::new);
        lane.tasks.push_back(task);
        self.tickets += 1;
        self.waiting += 1;
        let first = lane.tasks.len() == 1;
        (lane.tasks.back().expect("pushed above"), first)
    }

    fn find(&mut self, devices: &[Capacity], lost: u64, key: Key) -> usize {
        let address = Arc::as_ptr(&key.alternatives).cast::<()>() as usize >> 4;
        let slot = (address + key.home.map_or(0, |home| home + 1)) % self.recent.len();
        if let Some((known, index)) = &self.recent[slot]
            && Arc::ptr_eq(&known.alternatives, &key.alternatives)
            && known.home == key.home
        {
            return *index;
        }
        let index = match self.by_value.get(&key) {
            Some(&index) => index,
            None => self.remember(devices, lost, key.clone()),
        };
        self.recent[slot] = Some((key, index));
        index
    }

    fn remember(&mut self, devices: &[Capacity], lost: u64, key: Key) -> usize {
        if self.by_value.len() >= self.enough {
            let (shapes, vacant) = (&self.shapes, &mut self.vacant);
            self.by_value.retain(|_, index| {
                let stays = shapes[*index].live.is_some();
                if !stays {
                    vacant.push(*index);
                }
                stays
            });
            self.recent = Default::default();
            self.enough = REMEMBERED.max(2 * self.by_value.len());
        }
        let shape = Shape::new(devices, lost, key.clone());
        let index = match self.vacant.pop() {
            Some(index) => {
                self.shapes[index] = shape;
                index
            }
            None => {
                self.shapes.push(shape);
                self.shapes.len() - 1
            }
        };
        self.by_value.insert(key, index);
        index
    }

    /// Calls `f` with all who wait.
    pub(super) fn for_each(&self, f: impl FnMut(&Waiting<T>)) {
        let lanes = self.shapes.iter().flat_map(|shape| shape.lanes.values());
        lanes.flat_map(|lane| &lane.tasks).for_each(f);
    }

    /// Takes the first task of a shape out.
    pub(super) fn pop(&mut self, index: usize) -> Waiting<T> {
        let shape = &mut self.shapes[index];
        let mut entry = shape.lanes.first_entry().expect("somebody waits");
        let lane = entry.get_mut();
        let task = lane.tasks.pop_front().expect("somebody waits");
        lane.settle();
        if lane.tasks.is_empty() {
            if shape.lanes.len() > 1 {
                shape.lanes.pop_first();
            } else {
                self.retire(index);
            }
        }
        self.waiting -= 1;
        if !task.estimates.is_empty() {
            let work = self.shapes[index].work(&task.estimates);
            self.work = self.work.saturating_sub(work);
        }
        task
    }

    /// Nobody waits with the shape any more.
    fn retire(&mut self, index: usize) {
        let place = self.shapes[index].live.take().expect("it was live");
        self.live.swap_remove(place);
        if let Some(&moved) = self.live.get(place) {
            self.shapes[moved].live = Some(place);
        }
        if self.live.is_empty() {
            self.sweep = None;
        }
    }

    /// Plans anew without the devices that are lost. Gives the tasks that have no alternative left.
    pub(super) fn replan(&mut self, devices: &[Capacity], lost: u64) -> Vec<T> {
        let mut tokens = Vec::new();
        for index in 0..self.shapes.len() {
            let shape = &mut self.shapes[index];
            shape.plan(devices, lost);
            if shape.plans.is_empty() && shape.live.is_some() {
                for lane in std::mem::take(&mut shape.lanes).into_values() {
                    self.waiting -= lane.tasks.len();
                    tokens.extend(lane.tasks.into_iter().map(|task| task.token));
                }
                self.retire(index);
            }
        }
        // What is left may take other devices.
        self.work = 0;
        for shape in &self.shapes {
            for task in shape.lanes.values().flat_map(|lane| &lane.tasks) {
                self.work = self.work.saturating_add(shape.work(&task.estimates));
            }
        }
        tokens
    }

    /// How many device-times the first task of a shape may take without overtaking anybody by more
    /// than the limit. Nobody is overtaken by who cannot use any device of theirs.
    pub(super) fn budget(&self, index: usize, limit: u64) -> u64 {
        let shape = &self.shapes[index];
        let rank = shape.rank();
        let mut budget = u64::MAX;
        for &other in &self.live {
            let other = &self.shapes[other];
            if other.stuck || other.footprint & shape.footprint == 0 {
                continue;
            }
            for (&priority, lane) in &other.lanes {
                if (priority, lane.oldest()) >= rank {
                    break;
                }
                budget = budget.min(limit - lane.overtaken);
            }
        }
        budget
    }

    /// Books that the first task of a shape gets these devices before all who rank before it.
    pub(super) fn overtake(&mut self, index: usize, devices: u64, limit: u64) {
        let rank = self.shapes[index].rank();
        for &other in &self.live {
            let other = &mut self.shapes[other];
            let lost = u64::from((other.footprint & devices).count_ones());
            if other.stuck || lost == 0 {
                continue;
            }
            for (&priority, lane) in &mut other.lanes {
                if (priority, lane.oldest()) >= rank {
                    break;
                }
                // Of equal priority those that are older, else all that are there.
                let below = if priority == rank.0 {
                    rank.1
                } else {
                    self.tickets
                };
                lane.overtaken += lost;
                lane.younger.push(Reverse((below, lost)));
                validate(
                    lane.overtaken <= limit,
                    "no task is overtaken by more than the limit",
                );
            }
        }
    }

    /// Says which plans cannot be served before a paused body goes on. What such a body waits for may be a
    /// task behind a shape that has no other plan, so that shape does not compete: nothing is held for it,
    /// and who starts meanwhile does not overtake it.
    pub(super) fn set_stuck(&mut self, is_stuck: impl Fn(&Plan) -> bool) {
        for &index in &self.live {
            self.shapes[index].set_stuck(&is_stuck);
        }
    }

    /// In which order to look for a shape whose first task can start. `fits` says whether it could
    /// if nothing were held for anybody.
    pub(super) fn order(&mut self, limit: u64, fits: impl Fn(&Shape<T>) -> bool) -> Order {
        let mut order = Order::default();
        let candidates: SmallVec<[usize; 8]> = self
            .live
            .iter()
            .copied()
            .filter(|&shape| !self.shapes[shape].stuck)
            .collect();
        let priority = |shape: usize| self.shapes[shape].rank().0;
        let Some(top) = candidates.iter().map(|&shape| priority(shape)).min() else {
            return order;
        };
        let (level, others): (SmallVec<[usize; 8]>, SmallVec<[usize; 8]>) = candidates
            .into_iter()
            .partition(|&shape| priority(shape) == top);
        if level.len() == 1 {
            order.sweep = level;
        } else {
            order.sweep = self.swept(top.0, &level, limit);
            if order.sweep.is_empty() && level.iter().any(|&shape| fits(&self.shapes[shape])) {
                self.sweep = Some(self.new_sweep(top.0, &level, limit, &fits));
                order.sweep = self.swept(top.0, &level, limit);
            }
            let rest = level
                .into_iter()
                .filter(|shape| !order.sweep.contains(shape));
            order.others.extend(rest.map(|shape| (shape, true)));
        }
        order
            .others
            .extend(others.into_iter().map(|shape| (shape, false)));
        order
            .others
            .sort_unstable_by_key(|&(shape, _)| self.shapes[shape].rank());
        order
    }

    /// Which shapes the sweep has still to serve, in its order; moves it on to the first.
    fn swept(&mut self, priority: i32, level: &[usize], limit: u64) -> SmallVec<[usize; 8]> {
        let Some(sweep) = self.sweep.filter(|sweep| sweep.priority == priority) else {
            return SmallVec::new();
        };
        let mut swept: SmallVec<[usize; 8]> = level
            .iter()
            .copied()
            .filter(|&index| {
                let shape = &self.shapes[index];
                shape.rank().1 < sweep.horizon
                    && (shape.size == sweep.size || sweep.serves(sweep.size, shape.size))
                    && shape.width <= self.budget(index, limit)
            })
            .collect();
        swept.sort_unstable_by(|&one, &other| {
            let (one, other) = (&self.shapes[one], &self.shapes[other]);
            let sizes = one.size.cmp(&other.size);
            let sizes = if sweep.up { sizes } else { sizes.reverse() };
            sizes.then(one.rank().cmp(&other.rank()))
        });
        if let Some(&first) = swept.first() {
            let size = self.shapes[first].size;
            self.sweep = Some(Sweep { size, ..sweep });
        }
        swept
    }

    fn new_sweep(
        &self,
        priority: i32,
        level: &[usize],
        limit: u64,
        fits: &impl Fn(&Shape<T>) -> bool,
    ) -> Sweep {
        let size = |&&shape: &&usize| self.shapes[shape].size;
        let least = level.iter().min_by_key(size).expect("a level is not empty");
        let most = level.iter().max_by_key(size).expect("a level is not empty");
        let was_up = self.sweep.is_some_and(|sweep| sweep.up);
        let up = !(was_up && fits(&self.shapes[*most]));
        let first = if up { least } else { most };
        let mut sweep = Sweep {
            priority,
            up,
            size: self.shapes[*first].size,
            horizon: 0,
        };
        sweep.horizon = self.horizon(sweep, level, limit);
        sweep
    }

    /// How far a sweep may reach, so that serving all of it in its order keeps the limit.
    fn horizon(&self, sweep: Sweep, level: &[usize], limit: u64) -> u64 {
        struct Front<'a, T> {
            shape: &'a Shape<T>,
            lane: &'a Lane<T>,
            next: usize,
            overtaken: u64,
        }
        let mut fronts: SmallVec<[Front<'_, T>; 8]> = level
            .iter()
            .map(|&shape| {
                let shape = &self.shapes[shape];
                let lane = shape.top().expect("somebody waits").1;
                Front {
                    shape,
                    lane,
                    next: 0,
                    overtaken: lane.overtaken,
                }
            })
            .collect();
        let mut horizon = 0;
        for _ in 0..SWEEP {
            let next = fronts
                .iter_mut()
                .filter_map(|front| {
                    let ticket = front.lane.tasks.get(front.next)?.ticket;
                    Some((ticket, front))
                })
                .min_by_key(|(ticket, _)| *ticket);
            let Some((ticket, front)) = next else {
                break;
            };
            front.next += 1;
            let shape = front.shape;
            for front in &mut fronts {
                if front.lane.oldest() < ticket
                    && sweep.serves(shape.size, front.shape.size)
                    && shape.footprint & front.shape.footprint != 0
                {
                    front.overtaken += shape.width;
                    if front.overtaken > limit {
                        return ticket;
                    }
                }
            }
            horizon = ticket + 1;
        }
        horizon
    }
}

impl Sweep {
    /// Whether it serves the one size before the other.
    fn serves(&self, size: u64, before: u64) -> bool {
        if self.up {
            size < before
        } else {
            size > before
        }
    }
}
