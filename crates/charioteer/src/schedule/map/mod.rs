//! Mapping: on which of its alternatives a task runs.
//!
//! # What there is to choose
//!
//! A task may have several *choices* ([`Choice`]): a body of its domain (a *variant*) and where that
//! runs, on a number of cores or on a set of devices. The choices of a function are made once
//! ([`Choices`], by [`Engine::choices`](crate::engine::Engine::choices), which leaves out what the
//! machine can never serve), and each task has a [`Mapping`] of them with the *size* of its call.
//!
//! # When it is chosen
//!
//! A task is mapped when it is ready, by a [policy](policy). That says at least its kind, on cores or on
//! devices, since these have schedulers of their own (places of cores, the
//! [ledger](super::gang)). By the policy of earliest finish times the set of devices is chosen late, by
//! the ledger at the grant, which then knows what is free; another policy says which devices. Either way
//! the task then waits, is granted and runs like a task that had no choice. A task that comes back, for a
//! retry or after a wait, is not mapped anew.
//!
//! [`Mapping`] has the decision in one word. It is *open*, then perhaps *held* (mapped to cores, while
//! predecessors that it ran ahead of are incomplete), then *cores* with a choice, or *devices*, and with
//! the grant *devices* with a choice. Whoever makes the task ready writes it, then whoever dispatches it;
//! all others only read.
//!
//! # Times
//!
//! Estimates come from [`model`]. A call is timed on the device, by marks on its streams, or on the
//! host around its body. A time counts if the body gave a value and did not wait in between.
//!
//! Rooms: `model` (what is known of run times), `policy` (who chooses, and by what). They know words of
//! `machine` and of the ledger.

pub mod model;
pub mod policy;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use self::model::{Advice, Function};
use super::gang::{Alternative, Member, WHOLE};
use crate::machine::{DeviceId, Mark};
use crate::sync::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use crate::task::{Need, WHOLE_CORE};

/// Where a choice runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum On {
    /// On the host: a core, several cores or a part of one; never [`Need::Devices`] or
    /// [`Need::Mapped`].
    Cores(Need),
    /// On a set of devices, perhaps with cores in it.
    Devices(Alternative),
}

/// One way to run a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Which body: a number that means something to the domain alone.
    pub variant: u32,
    /// What the body is called in the models, if the function has several for the same kind and number
    /// of devices; empty else.
    pub label: String,
    /// Where it runs.
    pub on: On,
    /// Its run time as declared, which serves until one was measured.
    pub cost: Option<Duration>,
}

impl Choice {
    /// Its name in the models, which says kinds and numbers but not which devices: `cpu`, `cpu*4`,
    /// `gpu*2`, `blocked@gpu`.
    #[must_use]
    pub fn signature(&self) -> String {
        let part = |part: u32, whole: u32| match part {
            _ if part == whole => String::new(),
            _ => format!("/{:.4}", f64::from(part) / f64::from(whole)),
        };
        let set = match &self.on {
            On::Cores(Need::Cores(cores)) if *cores != 1 => format!("cpu*{cores}"),
            On::Cores(Need::Share(share)) => format!("cpu{}", part(*share, WHOLE_CORE)),
            On::Cores(_) => "cpu".to_owned(),
            On::Devices(set) => {
                let mut kinds: Vec<(String, usize)> = Vec::new();
                for member in &set.members {
                    let kind = match member {
                        Member::Device(device) => device.kind(),
                        Member::Any(kind) => *kind,
                    };
                    let kind = kind.to_string();
                    match kinds.iter_mut().find(|(known, _)| *known == kind) {
                        Some((_, count)) => *count += 1,
                        None => kinds.push((kind, 1)),
                    }
                }
                let kinds: Vec<String> = kinds
                    .into_iter()
                    .map(|(kind, count)| match count {
                        1 => kind,
                        _ => format!("{kind}*{count}"),
                    })
                    .collect();
                kinds.join("+") + &part(set.share, WHOLE)
            }
        };
        match self.label.as_str() {
            "" => set,
            label => format!("{label}@{set}"),
        }
    }
}

/// Sets of devices, together and each alone.
#[derive(Debug)]
pub(crate) struct Sets {
    pub(crate) all: Arc<[Alternative]>,
    alone: Box<[Arc<[Alternative]>]>,
}

impl Sets {
    pub(crate) fn new(all: Arc<[Alternative]>) -> Self {
        let alone = all.iter().map(|set| Arc::from([set.clone()])).collect();
        Self { all, alone }
    }
}

/// The ways to run a function in one runtime.
pub struct Choices {
    pub(crate) engine: u32,
    function: Arc<Function>,
    list: Box<[Choice]>,
    /// The series of each in the models.
    series: Box<[usize]>,
    /// Those on cores that can be served, in order.
    cores: SmallVec<[usize; 2]>,
    /// Those on devices that can be served, in order, and their sets.
    devices: SmallVec<[usize; 4]>,
    sets: Sets,
    /// How many calls a policy that goes round has seen.
    pub(crate) turns: AtomicUsize,
}

impl Choices {
    /// `serves`: whether the machine can serve the choice with that index; one at least.
    pub(crate) fn new(
        engine: u32,
        function: Arc<Function>,
        list: Vec<Choice>,
        serves: impl Fn(usize) -> bool,
    ) -> Self {
        let (mut cores, mut devices) = (SmallVec::new(), SmallVec::new());
        let mut sets = Vec::new();
        for (index, choice) in list.iter().enumerate() {
            match &choice.on {
                _ if !serves(index) => {}
                On::Cores(_) => cores.push(index),
                On::Devices(set) => {
                    devices.push(index);
                    sets.push(set.clone());
                }
            }
        }
        let series = |choice: &Choice| function.series(&choice.signature());
        Self {
            engine,
            series: list.iter().map(series).collect(),
            list: list.into(),
            function,
            cores,
            devices,
            sets: Sets::new(sets.into()),
            turns: AtomicUsize::new(0),
        }
    }

    /// The function's name.
    #[must_use]
    pub fn function(&self) -> &Arc<str> {
        self.function.name()
    }

    /// All of them, as they were given.
    #[must_use]
    pub fn list(&self) -> &[Choice] {
        &self.list
    }

    /// Whether a body may get several cores.
    #[must_use]
    pub fn may_be_wide(&self) -> bool {
        let wide = |index: &usize| match &self.list[*index].on {
            On::Cores(need) => matches!(need, Need::Cores(_)),
            On::Devices(set) => set.cores() > 1,
        };
        self.cores.iter().chain(&self.devices).any(wide)
    }

    pub(crate) fn cores(&self) -> &[usize] {
        &self.cores
    }

    pub(crate) fn devices(&self) -> &[usize] {
        &self.devices
    }

    /// The sets of devices, in the order of [`devices`](Self::devices).
    pub(crate) fn sets(&self) -> &Arc<[Alternative]> {
        &self.sets.all
    }

    /// The place of a choice among those on devices.
    fn place(&self, choice: usize) -> usize {
        let place = self.devices.iter().position(|&it| it == choice);
        place.expect("it is on devices, and can be served")
    }

    /// What a choice on cores needs.
    pub(crate) fn need(&self, choice: usize) -> Need {
        match self.list[choice].on {
            On::Cores(need) => need,
            On::Devices(_) => Need::Devices,
        }
    }

    fn advise(&self, size: u64, costs: Option<&[Option<Duration>]>, explores: bool) -> Advice {
        let served = self.cores.iter().chain(&self.devices);
        let known = served.map(|&index| {
            let cost = costs.and_then(|costs| costs[index]);
            let cost = cost.or(self.list[index].cost);
            let cost = cost.map(|cost| u64::try_from(cost.as_nanos()).unwrap_or(u64::MAX >> 16));
            (self.series[index], cost)
        });
        self.function.advise(size, known, explores)
    }
}

impl fmt::Debug for Choices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Choices")
            .field("function", self.function())
            .field("list", &self.list)
            .finish_non_exhaustive()
    }
}

/// What was decided about a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Nothing.
    Open,
    /// It is this choice, on cores, once the predecessors that it ran ahead of are complete.
    Held(usize),
    /// It runs on devices, on which set is the ledger's to say.
    Devices,
    /// It is this choice.
    Choice(usize),
}

const OPEN: u32 = 0;
const DEVICES: u32 = 1;
/// The first choice.
const FIRST: u32 = 2;
const HELD: u32 = 1 << 31;

/// The call explores a choice.
pub(crate) const EXPLORES: u32 = 1;
/// The call is timed.
pub(crate) const TIMED: u32 = 2;
/// Its body waited, so that its time says nothing.
pub(crate) const DISTURBED: u32 = 4;
/// It counts among what devices or cores have before them.
pub(crate) const COUNTED: u32 = 8;
/// Its body has begun.
pub(crate) const BEGUN: u32 = 16;

/// No time was measured.
const NONE: u64 = u64::MAX;

/// The marks around a body's work on its streams, in the order of its devices.
pub(crate) struct Marks {
    pub(crate) start: SmallVec<[(DeviceId, Mark); 2]>,
    pub(crate) end: SmallVec<[(DeviceId, Mark); 2]>,
}

/// The choices of one task, and what became of them.
pub struct Mapping {
    choices: Arc<Choices>,
    size: u64,
    /// What was declared of this call, choice by choice, before what was declared of the function.
    costs: Option<Box<[Option<Duration>]>>,
    /// The sets of devices with room for the task's data, if that takes any; else they are those of the
    /// choices.
    room: Option<Arc<Sets>>,
    decision: AtomicU32,
    notes: AtomicU32,
    /// The devices of its predecessors until it is dispatched, then its own, as bits by index.
    places: AtomicU64,
    /// Its run time in nanoseconds, as estimated when it was mapped; of one on cores times these.
    estimate: AtomicU64,
    /// As measured on cores.
    time: AtomicU64,
}

impl Mapping {
    /// Nothing is decided. `size` is a footprint of the call: the bytes of its arguments, say, or what
    /// the user calls its size; calls of equal size take equally long.
    #[must_use]
    pub fn new(choices: Arc<Choices>, size: u64) -> Self {
        Self {
            choices,
            size,
            costs: None,
            room: None,
            decision: AtomicU32::new(OPEN),
            notes: AtomicU32::new(0),
            places: AtomicU64::new(0),
            estimate: AtomicU64::new(0),
            time: AtomicU64::new(NONE),
        }
    }

    /// With the declared run time of this call for each of [`Choices::list`], in order; where there is
    /// none, [`Choice::cost`] serves.
    ///
    /// # Panics
    /// With another number of them.
    #[must_use]
    pub fn with_costs(mut self, costs: Box<[Option<Duration>]>) -> Self {
        assert_eq!(costs.len(), self.choices.list().len(), "a cost a choice");
        self.costs = Some(costs);
        self
    }

    /// What is known of those that can be served: those on cores, then those on devices. Whether one is
    /// to be tried, if asked for.
    pub(crate) fn advise(&self, explores: bool) -> Advice {
        self.choices
            .advise(self.size, self.costs.as_deref(), explores)
    }

    /// The choices.
    #[must_use]
    pub fn choices(&self) -> &Arc<Choices> {
        &self.choices
    }

    /// The size of the call.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The choice that runs, by its index in [`Choices::list`]; none before that is decided.
    #[must_use]
    pub fn choice(&self) -> Option<usize> {
        match self.decision() {
            Decision::Choice(choice) => Some(choice),
            Decision::Open | Decision::Held(_) | Decision::Devices => None,
        }
    }

    pub(crate) fn decision(&self) -> Decision {
        // Written before the task is handed on, and read by those whom it was handed to, or by others
        // who may see it early or late.
        match self.decision.load(Ordering::Relaxed) {
            OPEN => Decision::Open,
            DEVICES => Decision::Devices,
            held if held & HELD != 0 => Decision::Held((held - HELD - FIRST) as usize),
            choice => Decision::Choice((choice - FIRST) as usize),
        }
    }

    pub(crate) fn decide(&self, decision: Decision) {
        let number =
            |choice: usize| FIRST + u32::try_from(choice).expect("fewer than 2^31 choices");
        let word = match decision {
            Decision::Open => OPEN,
            Decision::Devices => DEVICES,
            Decision::Held(choice) => HELD | number(choice),
            Decision::Choice(choice) => number(choice),
        };
        self.decision.store(word, Ordering::Relaxed);
    }

    /// What the task needs, as far as that is decided.
    pub(crate) fn need(&self) -> Need {
        match self.decision() {
            Decision::Open | Decision::Held(_) => Need::Mapped,
            Decision::Devices => Need::Devices,
            Decision::Choice(choice) => self.choices.need(choice),
        }
    }

    /// Its sets of devices have this room from now on.
    pub(crate) fn make_room(&mut self, sets: Arc<Sets>) {
        self.room = Some(sets);
    }

    fn all_sets(&self) -> &Sets {
        self.room.as_deref().unwrap_or(&self.choices.sets)
    }

    /// The place among its sets of devices of the one that it was mapped to; none while that is open, or
    /// if it is one on cores.
    pub(crate) fn place(&self) -> Option<usize> {
        let choice = self.choice()?;
        (self.choices.need(choice) == Need::Devices).then(|| self.choices.place(choice))
    }

    /// The set of devices that it was mapped to.
    pub(crate) fn set(&self) -> Option<&Alternative> {
        Some(&self.all_sets().all[self.place()?])
    }

    /// The set of devices of a choice.
    pub(crate) fn set_of(&self, choice: usize) -> &Alternative {
        &self.all_sets().all[self.choices.place(choice)]
    }

    /// The sets of devices that it may use, as far as that is decided.
    pub(crate) fn sets(&self) -> &Arc<[Alternative]> {
        match self.decision() {
            Decision::Choice(choice) if self.choices.need(choice) == Need::Devices => {
                &self.all_sets().alone[self.choices.place(choice)]
            }
            _ => &self.all_sets().all,
        }
    }

    /// The estimated run times of these sets, in order.
    pub(crate) fn estimates(&self) -> SmallVec<[Option<Duration>; 1]> {
        if let Decision::Choice(_) = self.decision() {
            // Of one that is being tried nothing is known.
            let estimate = Some(self.estimate()).filter(|&estimate| estimate != 0);
            return SmallVec::from_slice(&[estimate.map(Duration::from_nanos)]);
        }
        let known = self.advise(false).estimates;
        let known = &known[self.choices.cores.len()..];
        // What is not known where others are is being tried by other calls.
        let worst = known.iter().flatten().max().copied();
        let known = known
            .iter()
            .map(|time| time.or(worst).map(Duration::from_nanos));
        known.collect()
    }

    pub(crate) fn note(&self, notes: u32) {
        self.notes.fetch_or(notes, Ordering::Relaxed);
    }

    pub(crate) fn has(&self, note: u32) -> bool {
        self.notes.load(Ordering::Relaxed) & note != 0
    }

    /// Takes a note back; whether it was there.
    pub(crate) fn take(&self, note: u32) -> bool {
        self.notes.fetch_and(!note, Ordering::Relaxed) & note != 0
    }

    pub(crate) fn places(&self) -> u64 {
        self.places.load(Ordering::Relaxed)
    }

    pub(crate) fn set_places(&self, places: u64) {
        self.places.store(places, Ordering::Relaxed);
    }

    /// A predecessor ran there.
    pub(crate) fn near(&self, places: u64) {
        self.places.fetch_or(places, Ordering::Relaxed);
    }

    pub(crate) fn estimate(&self) -> u64 {
        self.estimate.load(Ordering::Relaxed)
    }

    pub(crate) fn set_estimate(&self, nanoseconds: u64) {
        self.estimate.store(nanoseconds, Ordering::Relaxed);
    }

    pub(crate) fn time(&self) -> Option<u64> {
        let time = self.time.load(Ordering::Relaxed);
        (time != NONE).then_some(time)
    }

    pub(crate) fn set_time(&self, nanoseconds: u64) {
        self.time.store(nanoseconds, Ordering::Relaxed);
    }

    /// The body of the decided choice is about to run, or to go on: whether it is to be timed.
    pub(crate) fn starts(&self) -> bool {
        if self.notes.fetch_or(BEGUN, Ordering::Relaxed) & BEGUN != 0 {
            self.note(DISTURBED);
            return false;
        }
        let Decision::Choice(choice) = self.decision() else {
            return false;
        };
        let (function, series) = (&self.choices.function, self.choices.series[choice]);
        let timed = function.begin(series, self.size) || self.has(EXPLORES);
        self.take(DISTURBED | TIMED);
        self.set_time(NONE);
        if timed {
            self.note(TIMED);
        }
        timed
    }

    /// Whether the task may still go another way: its body has not begun.
    pub(crate) fn may_turn_back(&self) -> bool {
        !self.has(BEGUN)
    }

    /// It took so long.
    pub(crate) fn record(&self, nanoseconds: u64) {
        if let Decision::Choice(choice) = self.decision() {
            self.take(EXPLORES);
            let (function, series) = (&self.choices.function, self.choices.series[choice]);
            function.record(series, self.size, nanoseconds);
        }
    }

    /// The task is over, or goes another way. What it was to try and did not is tried by another one.
    pub(crate) fn give_back(&self) {
        if let Decision::Choice(choice) | Decision::Held(choice) = self.decision()
            && self.take(EXPLORES)
        {
            let (function, series) = (&self.choices.function, self.choices.series[choice]);
            function.give_back(series, self.size);
        }
    }
}

/// Of a task that is to be spawned: nothing is decided.
impl Clone for Mapping {
    fn clone(&self) -> Self {
        Self {
            costs: self.costs.clone(),
            ..Self::new(Arc::clone(&self.choices), self.size)
        }
    }
}

impl PartialEq for Mapping {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.choices, &other.choices)
            && self.size == other.size
            && self.costs == other.costs
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("choices", &self.choices)
            .field("size", &self.size)
            .field("decision", &self.decision())
            .finish_non_exhaustive()
    }
}
