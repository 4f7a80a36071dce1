//! Mapping in the engine: from ready to the way of a kind, and the times of bodies.
//!
//! A task with a choice is mapped by the thread that makes it ready. By the earliest finish time, and by
//! a policy of this crate, that happens at once. The user's policy is asked by a thread of its own: the
//! task is *parked*, and counts as something that moves; the thread takes all that are parked, asks for
//! them with no lock held, and sends each on its way. Without workers the thread that makes a task ready
//! asks for it alone.
//!
//! What is mapped to devices goes to the ledger, with all its sets or with the one that was chosen. If
//! that one cannot be served any more, since devices are lost or bodies that wait keep their memory, the
//! task goes back to all its sets, and then to its choices on cores, before it fails.
//!
//! What is mapped to cores and ran ahead of predecessors whose work on devices is not complete is *held*:
//! the last of these sends it on when it is done, or poisons it.
//!
//! # What the finish time is made of
//!
//! When a set of devices is free: the estimated run times of what was granted there and is not complete,
//! and an even part of what waits. When cores are free: the same of mapped tasks alone, since run times
//! of others are not known. Neither knows how far the running tasks are, so both are upper bounds. Then the
//! time that it takes to bring the task's data there, to a device or home, over the links that there are;
//! among devices the ledger counts that in the same way.
//!
//! A function with one choice is timed like others and tries nothing: so the ledger knows how long its calls
//! take, where there are several devices for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::{Engine, Settled, SpawnError};
use crate::machine::{DeviceError, DeviceId, Kind, Mark, Stream, Time};
use crate::schedule::gang::{Alternative, Grant, Member, Transfer};
use crate::schedule::map::model::Models;
use crate::schedule::map::policy::{Call, Candidate, Mapper};
use crate::schedule::map::{
    BEGUN, COUNTED, Choice, Choices, DISTURBED, Decision, EXPLORES, Mapping, Marks, On, TIMED,
};
use crate::sync::{AtomicU32, AtomicU64, Condvar, Mutex, Ordering, assert_unlocked};
use crate::task::state::{AHEAD, USES};
use crate::task::{Domain, Ending, Failure, Need, Outcome, Phase, Task, TaskRef};

/// How many parked tasks the user's policy is asked for at once.
const BATCH: usize = 256;

/// What an engine has for mapping.
pub(crate) struct Maps<D: Domain> {
    pub(super) mapper: Mapper,
    models: Arc<Models>,
    /// Of the mapped tasks that are on their way over cores: their estimated core-nanoseconds, and how
    /// many they are.
    time: AtomicU64,
    tasks: AtomicU32,
    parked: Mutex<Parked<D>>,
    bell: Condvar,
}

struct Parked<D: Domain> {
    tasks: Vec<TaskRef<D>>,
    closed: bool,
}

impl<D: Domain> Maps<D> {
    pub(super) fn new(mapper: Mapper, models: Arc<Models>) -> Self {
        Self {
            mapper,
            models,
            time: AtomicU64::new(0),
            tasks: AtomicU32::new(0),
            parked: Mutex::new(Parked {
                tasks: Vec::new(),
                closed: false,
            }),
            bell: Condvar::new(),
        }
    }

    /// Whether it matters where predecessors ran.
    #[inline]
    pub(super) fn follows(&self) -> bool {
        !matches!(self.mapper, Mapper::EarliestFinish)
    }

    /// Tells the thread that asks the user's policy to end.
    pub(super) fn close(&self) {
        if !matches!(self.mapper, Mapper::User) {
            return;
        }
        self.parked.lock().closed = true;
        self.bell.notify_all();
    }
}

/// What it takes to bring a task's data to the host, and to each device: nanoseconds.
#[derive(Default)]
struct Transfers {
    home: u64,
    devices: Box<[Transfer]>,
}

impl Transfers {
    /// For all of these devices, the members of one set.
    fn to(&self, devices: &[DeviceId], members: usize) -> u64 {
        let to = |id: &DeviceId| self.devices.get(usize::from(id.index()));
        let times = devices.iter().filter_map(to);
        times
            .map(|it| it.of(members as u64).time)
            .max()
            .unwrap_or(0)
    }
}

pub(super) fn bit(device: DeviceId) -> u64 {
    1 << device.index()
}

fn duration(nanoseconds: u64) -> Duration {
    Duration::from_nanos(nanoseconds)
}

/// The devices on which a task ran, as bits.
pub(super) fn places_of<D: Domain>(task: &Task<D>) -> u64 {
    if let Some(mapping) = task.mapping() {
        return match mapping.decision() {
            Decision::Choice(choice) if mapping.choices().need(choice) == Need::Devices => {
                mapping.places()
            }
            _ => 0,
        };
    }
    if task.needs() != Need::Devices {
        return 0;
    }
    let links = task.links.lock();
    let flight = links.rare.as_ref().and_then(|rare| rare.flight.as_ref());
    flight.map_or(0, |flight| flight.places)
}

impl<D: Domain> Engine<D> {
    /// The choices of a function for this engine. Those that the machine can never serve keep their place
    /// and are never chosen.
    ///
    /// # Errors
    /// [`SpawnError::Devices`] if that leaves none: a reason for each.
    pub fn choices(&self, function: &str, list: Vec<Choice>) -> Result<Arc<Choices>, SpawnError> {
        let refusal = |choice: &Choice| match &choice.on {
            On::Cores(Need::Cores(cores)) if usize::from(*cores) > self.cores => {
                Some(format!("{cores} cores wanted, {} there", self.cores))
            }
            On::Cores(Need::Devices | Need::Mapped) => Some("these are no cores".to_owned()),
            On::Cores(_) => None,
            On::Devices(set) => match self.check_devices(std::slice::from_ref(set)) {
                Err(SpawnError::Devices(reasons)) => Some(reasons.concat()),
                _ => None,
            },
        };
        let reasons: Vec<Option<String>> = list.iter().map(refusal).collect();
        if reasons.iter().all(Option::is_some) {
            return Err(SpawnError::Devices(reasons.into_iter().flatten().collect()));
        }
        self.gauge_devices();
        let function = self.maps.models.function(function);
        Ok(Arc::new(Choices::new(self.id, function, list, |index| {
            reasons[index].is_none()
        })))
    }

    /// Which of its choices the running task of this thread is, by the index in their list.
    pub fn choice(&self) -> Option<usize> {
        let (task, _) = self.current()?;
        task.mapping()?.choice()
    }

    /// What is known of run times.
    pub fn models(&self) -> &Arc<Models> {
        &self.maps.models
    }

    /// Who maps the tasks that have a choice.
    pub fn mapper(&self) -> &Mapper {
        &self.maps.mapper
    }

    /// That the options of a task with choices say what it needs, in this engine.
    pub(super) fn check_mapping(&self, mapping: Option<&Mapping>) -> Result<(), SpawnError> {
        match mapping {
            Some(mapping) if mapping.choices().engine == self.id => Ok(()),
            Some(_) => Err(SpawnError::Devices(vec![
                "the choices were made for another runtime".to_owned(),
            ])),
            None => Err(SpawnError::Devices(vec!["there are no choices".to_owned()])),
        }
    }

    // ---- choosing ---------------------------------------------------------------------------

    /// Sends a task on its way that is ready and has a choice.
    pub(super) fn map(self: &Arc<Self>, task: TaskRef<D>) {
        let mapping = task.mapping().expect("a task that is mapped has choices");
        match mapping.decision() {
            Decision::Open => {}
            // It comes back.
            Decision::Choice(choice) if mapping.choices().need(choice) != Need::Devices => {
                return self.go_to_cores(task, choice);
            }
            Decision::Choice(_) | Decision::Devices | Decision::Held(_) => {
                return self.ask_for_devices(task, None);
            }
        }
        match &self.maps.mapper {
            Mapper::EarliestFinish => {
                let decision = self.by_finish_time(&task, mapping);
                self.send_to(task, decision);
            }
            Mapper::Policy(policy) => {
                let call = self.call(&task);
                let index = policy.choose(&call);
                self.follow(task, &call, index);
            }
            Mapper::User if self.workers == 0 => self.ask_user(&[task]),
            Mapper::User => self.park(task),
        }
    }

    /// The choice on cores, or that it is one on devices, by the earliest finish time; or the one that is
    /// to be tried.
    fn by_finish_time(&self, task: &Task<D>, mapping: &Mapping) -> Decision {
        let choices = mapping.choices();
        let (cores, devices) = (choices.cores(), choices.devices());
        let advice = mapping.advise(true);
        if let ([only], []) | ([], [only]) = (cores, devices) {
            mapping.set_estimate(advice.estimates[0].unwrap_or(0));
            return Decision::Choice(*only);
        }
        let at = |place: usize| match place.checked_sub(cores.len()) {
            None => cores[place],
            Some(place) => devices[place],
        };
        if let Some(place) = advice.explore {
            mapping.note(EXPLORES);
            mapping.set_estimate(advice.estimates[place].unwrap_or(0));
            return Decision::Choice(at(place));
        }
        if cores.is_empty() {
            return Decision::Devices;
        }
        // What has no estimate is being tried by others.
        let known = advice.estimates.iter().any(Option::is_some);
        let data = self.transfers(task);
        let best = (0..advice.estimates.len())
            .filter(|&place| !known || advice.estimates[place].is_some())
            .min_by_key(|&place| {
                let choice = at(place);
                let estimate = advice.estimates[place].unwrap_or(0);
                (
                    estimate.saturating_add(self.wait_for(choices, choice, &data)),
                    choice,
                )
            });
        let best = best.expect("there are several");
        mapping.set_estimate(advice.estimates[best].unwrap_or(0));
        if best < cores.len() {
            Decision::Choice(at(best))
        } else {
            Decision::Devices
        }
    }

    /// What it takes to bring the data of a task to where it may run.
    fn transfers(&self, task: &Task<D>) -> Transfers {
        if !task.state.load().has(USES) {
            return Transfers::default();
        }
        Transfers {
            home: self.transfer_home(task),
            devices: self.transfers_of(task),
        }
    }

    /// When the cores or devices of a choice are free and have a task's data, as far as is known, in
    /// nanoseconds from now.
    fn wait_for(&self, choices: &Choices, choice: usize, data: &Transfers) -> u64 {
        match &choices.list()[choice].on {
            On::Cores(_) => self.wait_for_cores().saturating_add(data.home),
            On::Devices(set) => {
                let cores = if set.cores() == 0 {
                    0
                } else {
                    self.wait_for_cores().saturating_add(data.home)
                };
                self.wait_for_devices(set, &data.devices).max(cores)
            }
        }
    }

    fn wait_for_cores(&self) -> u64 {
        let workers = u64::try_from(self.workers.max(1)).unwrap_or(1);
        self.maps.time.load(Ordering::Relaxed) / workers
    }

    fn send_to(self: &Arc<Self>, task: TaskRef<D>, decision: Decision) {
        let mapping = task.mapping().expect("it is being mapped");
        match decision {
            Decision::Choice(choice) if mapping.choices().need(choice) != Need::Devices => {
                self.send_to_cores(task, choice);
            }
            _ => {
                mapping.decide(decision);
                self.ask_for_devices(task, None);
            }
        }
    }

    /// Sends a task to cores, or holds it until what it ran ahead of is complete.
    fn send_to_cores(self: &Arc<Self>, task: TaskRef<D>, choice: usize) {
        let mapping = task.mapping().expect("it is being mapped");
        let cores = match mapping.choices().need(choice) {
            Need::Cores(cores) => u64::from(cores),
            _ => 1,
        };
        mapping.set_estimate(mapping.estimate().saturating_mul(cores));
        mapping.note(COUNTED);
        self.maps
            .time
            .fetch_add(mapping.estimate(), Ordering::Relaxed);
        self.maps.tasks.fetch_add(1, Ordering::Relaxed);
        if task.state.load().has(AHEAD) {
            let held = {
                let mut links = task.links.lock();
                let flight = links.flight();
                flight.behind.clear();
                flight.after.clear();
                let held = flight.is_ahead();
                if held {
                    mapping.decide(Decision::Held(choice));
                    flight.held = true;
                }
                held
            };
            if held {
                return;
            }
            if let Some(root) = task.poisoned() {
                return self.fail_ready(&task, Failure::Dependency(root));
            }
        }
        self.go_to_cores(task, choice);
    }

    fn go_to_cores(self: &Arc<Self>, task: TaskRef<D>, choice: usize) {
        let mapping = task.mapping().expect("it is being mapped");
        if task.state.load().has(USES) {
            // Held, if it is, until its data are there.
            mapping.decide(Decision::Held(choice));
            if !self.is_at_home_ready(&task) {
                return;
            }
        }
        let need = mapping.choices().need(choice);
        mapping.decide(Decision::Choice(choice));
        let priority = task.options().map_or(0, |options| options.priority);
        self.queue(task, need, priority);
    }

    /// A held task may go on: to cores, or with the devices that it was granted.
    pub(super) fn let_go(self: &Arc<Self>, task: TaskRef<D>, worklist: &mut Vec<Settled<D>>) {
        match task.poisoned() {
            None => match task.mapping().map(Mapping::decision) {
                Some(Decision::Held(choice)) => self.go_to_cores(task, choice),
                _ => self.board(task),
            },
            Some(root) => {
                if task.state.advance(Phase::Ready, Phase::Running).is_ok() {
                    let ending = Ending::Given(Outcome::Failed(Failure::Dependency(root)));
                    worklist.push(Settled { task, ending });
                }
            }
        }
    }

    /// Fails a task that is ready, unless somebody has it.
    pub(super) fn fail_ready(self: &Arc<Self>, task: &TaskRef<D>, failure: Failure<D>) {
        if task.state.advance(Phase::Ready, Phase::Running).is_ok() {
            self.settle(task, Outcome::Failed(failure));
        }
    }

    /// A task gets no set of devices that it asked for, since they are lost, or since nobody who has
    /// their memory gives it back: another way for it, else the error.
    pub(super) fn send_elsewhere(self: &Arc<Self>, task: TaskRef<D>, error: DeviceError) {
        if task.phase() == Phase::Ready
            && let Some(mapping) = task.mapping()
        {
            if let Decision::Choice(_) = mapping.decision() {
                self.choose_again(&task);
                return self.ask_again(task);
            }
            let cores = mapping.choices().cores();
            if !self.may_leave_devices(&task) {
                return self.fail_ready(&task, Failure::Device(error));
            }
            let known = mapping.advise(false).estimates;
            let best = (0..cores.len()).min_by_key(|&place| known[place].unwrap_or(u64::MAX));
            if let Some(best) = best {
                mapping.set_estimate(known[best].unwrap_or(0));
                let choice = cores[best];
                return self.send_to_cores(task, choice);
            }
        }
        self.fail_ready(&task, Failure::Device(error));
    }

    /// Opens the choice between all sets of devices again.
    pub(super) fn choose_again(&self, task: &Task<D>) {
        if let Some(mapping) = task.mapping() {
            mapping.give_back();
            self.uncount(mapping);
            mapping.decide(Decision::Devices);
        }
    }

    // ---- policies ---------------------------------------------------------------------------

    /// What a policy is told of a task.
    fn call(&self, task: &Task<D>) -> Call {
        let mapping = task.mapping().expect("it is being mapped");
        let choices = mapping.choices();
        let mut near = mapping.places();
        if task.state.load().has(AHEAD) {
            let mut links = task.links.lock();
            near |= (links.flight().behind.iter()).fold(0, |all, it| all | bit(it.stream.device));
        }
        let near: SmallVec<[DeviceId; 2]> = (0..64)
            .filter(|index| near >> index & 1 != 0)
            .map(DeviceId::gpu)
            .collect();
        let data = self.transfers(task);
        let known = mapping.advise(false).estimates;
        let estimate = |choice: usize| {
            let place = choices.cores().iter().chain(choices.devices());
            let place = place.clone().position(|&it| it == choice)?;
            known[place].map(duration)
        };
        let workers = u32::try_from(self.workers.max(1)).unwrap_or(u32::MAX);
        let load_of_cores = self.maps.tasks.load(Ordering::Relaxed) / workers;
        let mut candidates = Vec::new();
        for (index, choice) in choices.list().iter().enumerate() {
            match &choice.on {
                On::Cores(need) if choices.cores().contains(&index) => {
                    candidates.push(Candidate {
                        choice: index,
                        devices: SmallVec::new(),
                        cores: match need {
                            Need::Cores(cores) => *cores,
                            _ => 1,
                        },
                        estimate: estimate(index),
                        wait: duration(self.wait_for_cores()),
                        load: load_of_cores,
                        local: 0,
                        transfer: duration(data.home),
                    });
                }
                On::Devices(set) if choices.devices().contains(&index) => {
                    let (wait_for_cores, load_of_cores, home) = match set.cores() {
                        0 => (0, 0, 0),
                        _ => (self.wait_for_cores(), load_of_cores, data.home),
                    };
                    for devices in self.sets_for(mapping.set_of(index), &near) {
                        let (wait, load) = self.load_of(&devices);
                        let local = devices.iter().filter(|it| near.contains(it)).count();
                        candidates.push(Candidate {
                            choice: index,
                            cores: u16::try_from(set.cores()).unwrap_or(u16::MAX),
                            estimate: estimate(index),
                            wait: duration(wait.max(wait_for_cores)),
                            load: load.max(load_of_cores),
                            local: u32::try_from(local).unwrap_or(u32::MAX),
                            transfer: duration(data.to(&devices, set.members.len()).max(home)),
                            devices,
                        });
                    }
                }
                On::Cores(_) | On::Devices(_) => {}
            }
        }
        Call {
            function: Arc::clone(choices.function()),
            task: task.id,
            size: mapping.size(),
            priority: task.options().map_or(0, |options| options.priority),
            turn: choices.turns.fetch_add(1, Ordering::Relaxed),
            near,
            candidates,
        }
    }

    /// The sets of devices worth a look for an alternative: in turns, then those that are near.
    fn sets_for(
        &self,
        set: &Alternative,
        near: &[DeviceId],
    ) -> SmallVec<[SmallVec<[DeviceId; 2]>; 8]> {
        let named = |id: DeviceId| set.members.contains(&Member::Device(id));
        let pool: SmallVec<[DeviceId; 8]> = self
            .devices_with(set.memory)
            .filter(|&id| !named(id))
            .collect();
        let any = |it: &&Member| matches!(it, Member::Any(Kind::Gpu));
        let any = set.members.iter().filter(any);
        let width = any.count();
        // Members of one kind are in the order of their devices.
        let fill = |mut others: SmallVec<[DeviceId; 8]>| -> SmallVec<[DeviceId; 2]> {
            others.sort_unstable();
            let mut others = others.into_iter();
            let device = |member: &Member| match member {
                Member::Device(id) => Some(*id),
                Member::Any(Kind::Gpu) => others.next(),
                Member::Any(Kind::Cpu) => None,
            };
            set.members.iter().filter_map(device).collect()
        };
        let mut sets: SmallVec<[SmallVec<[DeviceId; 2]>; 8]> = SmallVec::new();
        if width == 0 {
            sets.push(fill(SmallVec::new()));
            return sets;
        }
        for first in (0..pool.len()).step_by(width) {
            let window = pool.iter().cycle().skip(first).take(width);
            sets.push(fill(window.copied().collect()));
        }
        if !near.is_empty() && width > 1 {
            let is_near = |id: &&DeviceId| near.contains(id);
            let first = pool.iter().filter(is_near);
            let rest = pool.iter().filter(|id| !is_near(id));
            let set = fill(first.chain(rest).take(width).copied().collect());
            if !sets.contains(&set) {
                sets.push(set);
            }
        }
        sets
    }

    /// Sends a task where the candidate is.
    fn follow(self: &Arc<Self>, task: TaskRef<D>, call: &Call, index: usize) {
        let Some(candidate) = call.candidates.get(index) else {
            let why = format!(
                "the policy chose candidate {index} for {}, which has {}",
                task.label,
                call.candidates.len()
            );
            return self.fail_ready(&task, Failure::Mapping(why.into()));
        };
        let mapping = task.mapping().expect("it is being mapped");
        let estimate = candidate.estimate.unwrap_or_default().as_nanos();
        mapping.set_estimate(u64::try_from(estimate).unwrap_or(u64::MAX >> 16));
        let choice = candidate.choice;
        if let On::Devices(set) = &mapping.choices().list()[choice].on {
            let mut devices = candidate.devices.iter().copied().map(Member::Device);
            let members = set.members.iter().map(|member| match member {
                core if core.is_core() => *core,
                _ => devices.next().expect("a candidate has all its devices"),
            });
            let chosen = Alternative {
                members: members.collect(),
                share: set.share,
                memory: mapping.set_of(choice).memory,
            };
            mapping.set_places(candidate.devices.iter().fold(0, |all, it| all | bit(*it)));
            mapping.note(COUNTED);
            self.count_waiting(mapping.places(), mapping.estimate(), true);
            mapping.decide(Decision::Choice(choice));
            self.ask_for_devices(task, Some(Arc::from([chosen])));
        } else {
            self.send_to_cores(task, choice);
        }
    }

    /// Lets a task wait for the user's policy.
    fn park(self: &Arc<Self>, task: TaskRef<D>) {
        self.elsewhere.fetch_add(1, Ordering::SeqCst);
        self.maps.parked.lock().tasks.push(task);
        self.maps.bell.notify_one();
    }

    /// Asks the user's policy for what is parked, until the engine closes.
    pub(super) fn run_policy(self: &Arc<Self>) {
        let maps = &self.maps;
        loop {
            let batch: Vec<TaskRef<D>> = {
                let mut parked = maps.parked.lock();
                while parked.tasks.is_empty() {
                    if parked.closed {
                        return;
                    }
                    parked = maps.bell.wait(parked);
                }
                let count = parked.tasks.len().min(BATCH);
                parked.tasks.drain(..count).collect()
            };
            let count = batch.len();
            self.ask_user(&batch);
            drop(batch);
            // They were counted when they were parked, and are elsewhere counted now.
            self.elsewhere.fetch_sub(count, Ordering::SeqCst);
            self.went_quiet();
        }
    }

    /// Asks the user's policy, and sends the tasks on.
    fn ask_user(self: &Arc<Self>, tasks: &[TaskRef<D>]) {
        assert_unlocked();
        let calls: Vec<Call> = tasks.iter().map(|task| self.call(task)).collect();
        let mut answers = Vec::new();
        let domain = &self.domain;
        domain.session(&mut || answers = domain.choose(&calls));
        let mut answers = answers.into_iter();
        for (task, call) in tasks.iter().zip(&calls) {
            match answers.next() {
                Some(Ok(index)) => self.follow(Arc::clone(task), call, index),
                Some(Err(error)) => self.fail_ready(task, Failure::Raised(error)),
                None => {
                    let why = format!("the policy gave no answer for {}", task.label);
                    self.fail_ready(task, Failure::Mapping(why.into()));
                }
            }
        }
    }

    // ---- dispatch and times -----------------------------------------------------------------

    /// A task has its devices: says which choice that is.
    pub(super) fn settle_choice(&self, task: &Task<D>, alternative: usize, places: u64) {
        let Some(mapping) = task.mapping() else {
            return;
        };
        self.uncount(mapping);
        if mapping.decision() == Decision::Devices {
            let choice = mapping.choices().devices()[alternative];
            mapping.decide(Decision::Choice(choice));
        }
        mapping.set_places(places);
    }

    fn uncount(&self, mapping: &Mapping) {
        if !mapping.take(COUNTED) {
            return;
        }
        if mapping.need() == Need::Devices {
            self.count_waiting(mapping.places(), mapping.estimate(), false);
        } else {
            self.maps
                .time
                .fetch_sub(mapping.estimate(), Ordering::Relaxed);
            self.maps.tasks.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The body of a task is about to run on cores: when it began, if that is to be timed.
    #[inline]
    pub(crate) fn start_clock(&self, task: &Task<D>) -> Option<Instant> {
        let mapping = task.mapping()?;
        if mapping.need() == Need::Devices || !mapping.starts() {
            return None;
        }
        // Where time is virtual, a body on cores takes none.
        let real = self
            .machine()
            .is_none_or(|machine| machine.description().time() == Time::Real);
        real.then(Instant::now)
    }

    /// It ended.
    pub(crate) fn stop_clock(task: &Task<D>, start: Instant) {
        if let Some(mapping) = task.mapping() {
            let time = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX >> 1);
            mapping.set_time(time);
        }
    }

    /// The body of a task with devices is about to run: marks where its work begins, if that is to be
    /// timed.
    pub(super) fn mark_start(&self, task: &Task<D>) {
        let Some(mapping) = task.mapping() else {
            return;
        };
        if !mapping.starts() {
            return;
        }
        let lent = self.lent_to(task);
        let marks = lent.iter().map(|&(id, stream)| self.mark(id, Some(stream)));
        let start: Option<SmallVec<[_; 2]>> = marks.collect();
        if let Some(start) = start {
            let end = SmallVec::new();
            task.links.lock().flight().marks = Some(Box::new(Marks { start, end }));
        }
    }

    fn mark(&self, device: DeviceId, stream: Option<Stream>) -> Option<(DeviceId, Mark)> {
        let mark = self.devices().device(device).mark(stream?);
        Some((device, mark.ok()?))
    }

    /// The body ended: marks where its work ends.
    pub(super) fn mark_end(&self, task: &Task<D>, grant: &Grant) {
        let timed = |mapping: &Mapping| mapping.has(TIMED) && !mapping.has(DISTURBED);
        if !task.mapping().is_some_and(timed) {
            return;
        }
        let lent = grant.lent.iter();
        let marks = lent.map(|lent| self.mark(lent.device, lent.stream));
        let end: Option<SmallVec<[_; 2]>> = marks.collect();
        let mut links = task.links.lock();
        if let (Some(marks), Some(end)) = (&mut links.flight().marks, end) {
            marks.end = end;
        }
    }

    /// How long the work of a task took on the device where it took longest; none if it was not marked.
    fn marked_time(&self, task: &Task<D>) -> Option<u64> {
        let marks = task.links.lock().flight().marks.take()?;
        let mut longest = None;
        for ((id, start), (_, end)) in marks.start.iter().zip(&marks.end) {
            let time = self.devices().device(*id).elapsed(start, end)?;
            longest = longest.max(Some(
                u64::try_from(time.as_nanos()).unwrap_or(u64::MAX >> 1),
            ));
        }
        longest
    }

    /// A task is about to have its outcome: what that says of run times.
    pub(super) fn account(&self, task: &Task<D>, has_value: bool) {
        let Some(mapping) = task.mapping() else {
            return;
        };
        let on_devices = mapping.need() == Need::Devices;
        self.uncount(mapping);
        if has_value && mapping.has(TIMED) && !mapping.has(DISTURBED) {
            let time = if on_devices {
                self.marked_time(task)
            } else {
                mapping.time()
            };
            if let Some(time) = time {
                mapping.record(time);
            }
        }
        if !mapping.has(BEGUN) {
            mapping.give_back();
        }
    }
}
