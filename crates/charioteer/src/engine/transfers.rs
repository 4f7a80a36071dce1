//! Managed data where tasks need them: on devices, at home, and moved for their own sake.
//!
//! # On devices
//!
//! A task that may get devices keeps its accesses ([`Uses`]) from the spawn on. What they take on each
//! device, as if nothing were there, is added to the memory that the task asks the ledger for; the sets of
//! devices with that are made once for equal footprints, so that tasks share them and the ledger finds
//! them. So what is pinned and what bodies allocate never exceed a device, and the
//! [store](crate::data::store) can always make room.
//!
//! When the task has its grant it is *planned*: the store finds or makes instances on each device, pins them,
//! enqueues the copies that they need, and tells the task's streams what to wait for. The task has them
//! ([`Holding`]) until its loan goes back: *launched*, if its body began, with the events that it left;
//! *abandoned* if not. The store hears before the ledger, which gives the memory on. A body that waits
//! keeps them, as it keeps its memory. Another attempt is planned anew. What cannot be had is
//! the task's outcome: its body does not run.
//!
//! # At home
//!
//! A task on cores, or an access of the host, that is about to be ready asks the store for what it needs,
//! if it keeps uses at all and one of its arrays was ever elsewhere. Copies that are not complete it
//! comes after as after predecessors: they are in its count, so that it is not past before, whatever becomes
//! of it. One with a choice is ready by then, and *held* like one that ran ahead; a set with cores is held
//! after its grant. Nobody waits on a thread. A copy that fails is the task's failure.
//!
//! Who reads at home never runs ahead of work on devices, so its data are written by then.
//!
//! # For their own sake
//!
//! To prefetch and to evict are tasks without a body that read what they move, so that they have their place
//! in the order. The ledger does not know of them: what they bring takes only room that nobody has
//! reserved, and may be dropped.
//!
//! # The end
//!
//! When nothing is unfinished any more all data come home, before the runtime is closed. What cannot come,
//! since it was lost, is marked as what a failed task was to write. An array that brought memory of a device
//! along is at home there, and is closed: from then on that is its owner's.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use super::{Engine, Handle, Moving, Settled, SpawnError};
use crate::data;
use crate::data::store::{Held, Loss, Store, Touch, View, Want};
use crate::data::{Access, Datum, Holding, Mode, Move, Part, Uses, Views, check_spread};
use crate::machine::{DeviceError, DeviceId, Event, HOST};
use crate::schedule::gang::{self, Alternative, Capacity, Coming, Grant, Member, Reason, Transfer};
use crate::schedule::map::Sets;
use crate::sync::{AtomicU64, AtomicUsize, Ordering, fence};
use crate::task::state::{AHEAD, HOST as BODYLESS, ORDERED, TOLD, USES};
use crate::task::{
    Content, Domain, Ending, Failure, Landed, Need, Options, Outcome, Phase, Task, TaskRef,
};
use crate::trace::Event as TraceEvent;

type Footprints = SmallVec<[u64; 2]>;
type Events = SmallVec<[Event; 2]>;

/// What an engine has for data on devices.
pub(super) struct Transfers {
    pub(super) store: Arc<Store>,
    /// How many tasks were spawned that may move data; with none of them all are at home.
    spawned: AtomicU64,
    /// Copies on their way home for good.
    homing: AtomicUsize,
}

impl Transfers {
    pub(super) fn new(store: Store) -> Self {
        Self {
            store: Arc::new(store),
            spawned: AtomicU64::new(0),
            homing: AtomicUsize::new(0),
        }
    }

    /// A device is lost.
    pub(super) fn lose(&self, device: DeviceId) {
        if self.spawned.load(Ordering::SeqCst) != 0 {
            self.store.lose(device);
        }
    }
}

/// Sets of devices with room for data, as made last by a thread.
struct Room {
    engine: u32,
    base: Arc<[Alternative]>,
    footprints: Footprints,
    sets: Arc<Sets>,
}

/// How many a thread remembers.
const ROOMS: usize = 8;

crate::sync::thread_local! {
    static RECENT: RefCell<(Vec<Room>, usize)> = const { RefCell::new((Vec::new(), 0)) };
}

impl<D: Domain> Engine<D> {
    fn store(&self) -> &Arc<Store> {
        &self.devices().transfers.store
    }

    /// Where the arrays of this engine are, if it has devices.
    pub fn data(&self) -> Option<&Arc<Store>> {
        self.devices
            .as_ref()
            .map(|devices| &devices.transfers.store)
    }

    // ---- the spawn --------------------------------------------------------------------------

    /// What a task that is about to be spawned keeps of its accesses, if it may run on devices: adds to its
    /// sets what that takes there.
    pub(super) fn prepare(
        &self,
        accesses: &[Access<'_, D>],
        options: Option<&mut Options>,
    ) -> Result<Option<Uses>, SpawnError> {
        let (Some(devices), Some(options)) = (&self.devices, options) else {
            return Ok(None);
        };
        let base = match (options.need, &options.devices, &options.mapping) {
            (Need::Devices, Some(sets), _) => sets,
            (Need::Mapped, _, Some(mapping)) => mapping.choices().sets(),
            _ => return Ok(None),
        };
        for set in base.iter() {
            for access in accesses {
                check_spread(access, set.members.len()).map_err(SpawnError::Access)?;
            }
        }
        if base.is_empty() {
            return Ok(None);
        }
        let Some(mut uses) = Uses::of(accesses) else {
            return Ok(None);
        };
        let mut footprints = Footprints::new();
        let adopts = uses.adopts();
        for (index, set) in base.iter().enumerate() {
            let width = set.members.len();
            // Nothing is taken for what a device that is known has of another's.
            let device = adopts.then(|| devices.only(&set.members)).flatten();
            let is_alike = |it: &Alternative| {
                it.members.len() == width && (!adopts || devices.only(&it.members) == device)
            };
            let alike = base[..index].iter().position(is_alike);
            footprints.push(match alike {
                Some(alike) => footprints[alike],
                None => uses.footprint(&devices.transfers.store, width, device),
            });
        }
        let may_do_without =
            (options.mapping.as_ref()).is_some_and(|mapping| !mapping.choices().cores().is_empty());
        let sets = self.with_room(base, &footprints, may_do_without)?;
        uses.set_footprints(footprints);
        match &mut options.mapping {
            Some(mapping) if options.need == Need::Mapped => mapping.make_room(sets),
            _ => options.devices = Some(Arc::clone(&sets.all)),
        }
        Ok(Some(uses))
    }

    /// These sets with so much more memory each. Refused if none of them can ever be served, unless there
    /// are cores as well.
    fn with_room(
        &self,
        base: &Arc<[Alternative]>,
        footprints: &Footprints,
        may_do_without: bool,
    ) -> Result<Arc<Sets>, SpawnError> {
        let is_it = |room: &&Room| {
            room.engine == self.id
                && Arc::ptr_eq(&room.base, base)
                && room.footprints == *footprints
        };
        // A thread that ends may still spawn.
        let known = RECENT.try_with(|recent| {
            let recent = recent.borrow();
            let room = recent.0.iter().find(is_it)?;
            Some(Arc::clone(&room.sets))
        });
        if let Ok(Some(sets)) = known {
            return Ok(sets);
        }
        let more = base.iter().zip(footprints);
        let all: Arc<[Alternative]> = more
            .map(|(set, footprint)| Alternative {
                memory: set.memory.saturating_add(*footprint),
                ..set.clone()
            })
            .collect();
        if !may_do_without {
            self.check_room(&all)?;
        }
        let sets = Arc::new(Sets::new(all));
        let room = Room {
            engine: self.id,
            base: Arc::clone(base),
            footprints: footprints.clone(),
            sets: Arc::clone(&sets),
        };
        let _ = RECENT.try_with(|recent| {
            let (rooms, next) = &mut *recent.borrow_mut();
            if rooms.len() < ROOMS {
                rooms.push(room);
            } else {
                rooms[*next] = room;
                *next = (*next + 1) % ROOMS;
            }
        });
        Ok(sets)
    }

    fn check_room(&self, sets: &[Alternative]) -> Result<(), SpawnError> {
        let Err(reasons) = gang::check(&self.devices().capacities, sets) else {
            return Ok(());
        };
        let memory = reasons.iter().filter_map(|reason| match *reason {
            Reason::Memory(member, wanted, there) => Some((member, wanted, there)),
            _ => None,
        });
        Err(
            match memory.min_by_key(|(_, wanted, there)| wanted - there) {
                Some((member, wanted, there)) => SpawnError::Memory {
                    device: match member {
                        Member::Device(device) => device.to_string(),
                        Member::Any(kind) => kind.to_string(),
                    },
                    wanted,
                    there,
                },
                None => SpawnError::Devices(reasons.iter().map(ToString::to_string).collect()),
            },
        )
    }

    /// A task that is about to be registered keeps these, and the store hears of it.
    pub(super) fn keep_uses(&self, task: &Task<D>, mut uses: Uses) {
        let transfers = &self.devices().transfers;
        let number = transfers.spawned.fetch_add(1, Ordering::SeqCst);
        uses.announce(&transfers.store, number);
        task.links.lock().data().uses = Some(Arc::new(uses));
    }

    /// A task that will not run on devices was registered behind others that may.
    pub(super) fn keep_uses_at_home(&self, task: &Task<D>, accesses: &[Access<'_, D>]) {
        if let Some(uses) = Uses::of(accesses) {
            if uses.adopts() {
                // What it writes is to come back.
                (self.devices().transfers.spawned).fetch_add(1, Ordering::SeqCst);
            }
            task.links.lock().data().uses = Some(Arc::new(uses));
            task.state.set(USES);
        }
    }

    // ---- at home ----------------------------------------------------------------------------

    /// Whether a task whose predecessors are done may be ready as far as its data go; if not, it is told when
    /// it may, or has failed.
    pub(super) fn is_at_home(
        self: &Arc<Self>,
        task: &TaskRef<D>,
        worklist: &mut Vec<Settled<D>>,
    ) -> bool {
        let need = task.options().map_or(Need::Core, |options| options.need);
        if matches!(need, Need::Devices | Need::Mapped) {
            return true;
        }
        let events = match self.bring_home(task) {
            Ok(events) if events.is_empty() => return true,
            Ok(events) => events,
            Err(error) => {
                self.fail_waiting(task, error, worklist);
                return false;
            }
        };
        // The count is zero, and nobody but this thread changes it. Who cancels the task from here on sees
        // that its turn is still to come, or is seen.
        let count = u32::try_from(events.len()).expect("few devices");
        task.pending.store(1 + count, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        for event in events {
            let task = Arc::clone(task);
            self.when_home(event, move |engine, failure| {
                if let Some(error) = failure {
                    task.note_trouble(error);
                }
                engine.release(&task, 1);
            });
        }
        // They may all be there by now, and one may have failed.
        task.release(1) && self.is_at_home(task, worklist)
    }

    /// As [`is_at_home`](Self::is_at_home), of a task that is ready, and is sent on to cores when it may
    /// go on: it is held until then.
    pub(super) fn is_at_home_ready(self: &Arc<Self>, task: &TaskRef<D>) -> bool {
        match self.bring_home(task) {
            Ok(events) if events.is_empty() => true,
            Ok(events) => {
                self.hold_until(task, events);
                false
            }
            Err(error) => {
                self.fail_ready(task, Failure::Device(error));
                false
            }
        }
    }

    /// Has what a task on cores uses copied home; gives what is not complete. Once a task.
    fn bring_home(&self, task: &Task<D>) -> Result<Events, DeviceError> {
        let (uses, trouble) = task.take_uses();
        if let Some(trouble) = trouble {
            return Err(trouble);
        }
        let Some(uses) = uses else {
            return Ok(Events::new());
        };
        uses.retract();
        if !uses.is_scattered() {
            return Ok(Events::new());
        }
        let mut events = uses.with_all(|wants| self.store().ensure_host(wants))?;
        events.retain(|event| !self.devices().is_complete_well(*event));
        Ok(events)
    }

    /// Calls `f` when an event is complete, and with why it failed; until then somebody moves.
    fn when_home(
        self: &Arc<Self>,
        event: Event,
        f: impl FnOnce(&Arc<Self>, Option<DeviceError>) + Send + 'static,
    ) {
        self.elsewhere.fetch_add(1, Ordering::SeqCst);
        let engine = Arc::clone(self);
        self.devices().device(event.stream.device).when_complete(
            event,
            Box::new(move |result| {
                let _moving = Moving::new(&engine);
                let failure = result.err();
                if let Some(error) = &failure {
                    engine.note_loss(error);
                }
                f(&engine, failure);
                engine.elsewhere.fetch_sub(1, Ordering::SeqCst);
            }),
        );
    }

    /// A task that is ready goes on when these events are complete.
    pub(super) fn hold_until(self: &Arc<Self>, task: &TaskRef<D>, events: Events) {
        {
            let mut links = task.links.lock();
            let flight = links.flight();
            flight.held = true;
            let parts = i32::try_from(events.len()).expect("few devices") + 1;
            task.count_incomplete(flight, parts);
        }
        for event in events {
            let task = Arc::clone(task);
            self.when_home(event, move |engine, failure| {
                if let Some(error) = failure {
                    task.note_trouble(error);
                }
                engine.part_is_there(task);
            });
        }
        self.part_is_there(Arc::clone(task));
    }

    fn part_is_there(self: &Arc<Self>, task: TaskRef<D>) {
        let mut worklist = Vec::new();
        let landed = task.land(None);
        debug_assert!(!matches!(landed, Landed::Done), "it is not launched");
        self.go_on(task, landed, &mut worklist);
        self.work_off(worklist);
    }

    /// Fails a task that is not ready and cannot have its data.
    fn fail_waiting(
        self: &Arc<Self>,
        task: &TaskRef<D>,
        error: DeviceError,
        worklist: &mut Vec<Settled<D>>,
    ) {
        if task.state.advance(Phase::Waiting, Phase::Running).is_err() {
            return self.turn_has_come(task, worklist);
        }
        let failure = Failure::Device(error);
        if task.state.load().has(BODYLESS) {
            self.refuse_host(task, &failure, worklist);
        }
        worklist.push(Settled {
            task: Arc::clone(task),
            ending: Ending::Given(Outcome::Failed(failure)),
        });
    }

    // ---- on devices -------------------------------------------------------------------------

    /// Plans the data of a task that was granted these devices. Gives the events of what has to come home
    /// first, for the cores of its set. If something cannot be had its body will not run.
    pub(super) fn plan_data(self: &Arc<Self>, task: &TaskRef<D>, grant: &Grant) -> Events {
        if !task.state.load().has(USES) || task.phase() != Phase::Ready {
            return Events::new();
        }
        let uses = {
            let links = task.links.lock();
            let rare = links.rare.as_ref();
            // One that waited has them.
            let has = rare.and_then(|rare| rare.flight.as_ref()?.holding.as_ref());
            let uses = rare.and_then(|rare| rare.data.as_ref()?.uses.clone());
            uses.filter(|_| has.is_none())
        };
        let Some(uses) = uses else {
            return Events::new();
        };
        match self.hold_data(task, grant, &uses) {
            Ok((holding, events)) => {
                task.links.lock().flight().holding = Some(Box::new(holding));
                events
            }
            Err(error) => {
                self.note_loss(&error);
                task.note_trouble(error);
                Events::new()
            }
        }
    }

    fn hold_data(
        &self,
        task: &Task<D>,
        grant: &Grant,
        uses: &Uses,
    ) -> Result<(Holding, Events), DeviceError> {
        let store = self.store();
        let (set, index) = super::devices::granted_set(task, grant.alternative);
        let members = set.members.len();
        let memory = set.memory - uses.footprint_of(index);
        let mut held: SmallVec<[Held; 2]> = SmallVec::new();
        let mut views = Vec::with_capacity(members);
        let mut devices = grant.lent.iter();
        for (member, kind) in set.members.iter().enumerate() {
            let mut own: Box<[Option<Arc<View>>]> = vec![None; uses.accesses()].into();
            if kind.is_core() {
                views.push(own);
                continue;
            }
            let lent = devices.next().expect("a grant has all devices of its set");
            let got = match lent.stream {
                Some(stream) => uses.with_wants(member, members, |wants| {
                    store.ensure(uses.number(), stream, wants, memory)
                }),
                None => Err(super::devices::no_stream(lent.device)),
            };
            match got {
                Ok(mut one) => {
                    for (place, view) in uses.places().zip(one.take_views()) {
                        own[place] = Some(view);
                    }
                    views.push(own);
                    held.push(one);
                }
                Err(error) => {
                    held.into_iter().for_each(|one| store.abandon(one));
                    return Err(error);
                }
            }
        }
        if members > 1 {
            // Pieces were announced as a whole.
            uses.retract();
        } else {
            uses.settle();
        }
        let mut events = Events::new();
        if uses.writes() && set.members.iter().any(|kind| kind.is_core()) {
            // What cores write is the host's before they begin.
            held.iter_mut().for_each(|one| store.guard(one));
        }
        for (member, kind) in set.members.iter().enumerate() {
            if !kind.is_core() {
                continue;
            }
            match uses.with_wants(member, members, |wants| store.ensure_host(wants)) {
                Ok(home) => events.extend(home),
                Err(error) => {
                    held.into_iter().for_each(|one| store.abandon(one));
                    return Err(error);
                }
            }
        }
        events.retain(|event| !self.devices().is_complete_well(*event));
        let holding = Holding {
            held,
            views: views.into(),
            begun: false,
        };
        Ok((holding, events))
    }

    /// Why the data of a task cannot be had, whose body is about to begin or to go on.
    pub(super) fn trouble_with_data(&self, task: &Task<D>) -> Option<DeviceError> {
        if !task.state.load().has(USES) {
            return None;
        }
        task.links.lock().data().trouble.take()
    }

    /// The body of a task is about to begin, or to go on: from here on what it holds may be written.
    pub(super) fn begin_with_data(&self, task: &Task<D>) {
        if task.state.load().has(USES)
            && let Some(holding) = &mut task.links.lock().flight().holding
        {
            holding.begun = true;
        }
    }

    /// The loan of a task goes back, behind these events: so does what it held.
    pub(super) fn let_go_of_data(&self, holding: Option<Box<Holding>>, events: &[Option<Event>]) {
        let Some(holding) = holding else { return };
        let store = self.store();
        if holding.begun {
            store.launched(holding.held.into_iter().zip(events.iter().copied()));
        } else {
            holding.held.into_iter().for_each(|one| store.abandon(one));
        }
    }

    /// Where what a running task accesses is: for each member of its set, in order, and each of its accesses,
    /// as they were given at the spawn. None of what has no bytes, or is on the host: for cores, and for
    /// reductions. Nothing at all of a task that has no devices, or no data there.
    pub fn views_of(&self, task: &Task<D>) -> Option<Views> {
        let links = task.links.lock();
        let flight = links.rare.as_ref()?.flight.as_ref()?;
        Some(Arc::clone(&flight.holding.as_ref()?.views))
    }

    /// How long it takes to bring what a task uses to each device; nothing of a task without data.
    pub(super) fn transfers_of(&self, task: &Task<D>) -> Box<[Transfer]> {
        let Some(uses) = task.uses() else {
            return Box::default();
        };
        let store = self.store();
        let coming = |wants: &[Want<'_>], device| {
            if wants.is_empty() {
                return Coming::default();
            }
            let missing = store.missing(wants, device);
            Coming {
                time: nanoseconds(missing.time),
                from_host: nanoseconds(missing.from_host),
                links: nanoseconds(missing.links),
            }
        };
        let capacities = self.devices().capacities.iter();
        uses.with_parts(|whole, split| {
            let transfer = |capacity: &Capacity| Transfer {
                whole: coming(whole, capacity.id),
                split: coming(split, capacity.id),
            };
            capacities.map(transfer).collect()
        })
    }

    /// How long it takes to bring what a task uses home, in nanoseconds.
    pub(super) fn transfer_home(&self, task: &Task<D>) -> u64 {
        let uses = task.uses().filter(|uses| uses.is_scattered());
        uses.map_or(0, |uses| {
            let missing = uses.with_all(|wants| self.store().missing(wants, HOST));
            nanoseconds(missing.time)
        })
    }

    // ---- for their own sake -----------------------------------------------------------------

    /// Spawns a task that brings a part to a device, in its place in the order, where it stays until
    /// its room is needed; to the host if that is the device. It is done when the part is there.
    ///
    /// # Errors
    /// [`SpawnError`]; [`SpawnError::Devices`] if there is no such device.
    pub fn prefetch(
        self: &Arc<Self>,
        label: D::Label,
        part: &Part<D>,
        device: DeviceId,
    ) -> Result<Handle<D>, SpawnError> {
        self.spawn_move(
            label,
            Access::new(part, Mode::In),
            Move::Prefetch(device),
            device,
        )
    }

    /// Spawns a task that drops what a device has of a part, in its place in the order; what is there alone
    /// comes home first. It is done when that is complete.
    ///
    /// # Errors
    /// [`SpawnError`]; [`SpawnError::Devices`] if there is no such device.
    pub fn evict(
        self: &Arc<Self>,
        label: D::Label,
        part: &Part<D>,
        device: DeviceId,
    ) -> Result<Handle<D>, SpawnError> {
        self.spawn_move(
            label,
            Access::new(part, Mode::In),
            Move::Evict(device),
            device,
        )
    }

    /// Spawns a task that comes after all that use an array and brings its last version to the memory of a
    /// device that it [brought along](crate::data::Datum::adopting), as far as there is one: what a
    /// failed task was to write is whatever is there. When it is done that memory is its owner's again, until
    /// somebody else uses the array.
    ///
    /// # Errors
    /// [`SpawnError`].
    pub fn return_memory(
        self: &Arc<Self>,
        label: D::Label,
        datum: &Arc<Datum<D>>,
    ) -> Result<Handle<D>, SpawnError> {
        let whole = datum.whole();
        self.spawn_move(label, Access::new(&whole, Mode::Out), Move::Return, HOST)
    }

    fn spawn_move(
        self: &Arc<Self>,
        label: D::Label,
        access: Access<'_, D>,
        moves: Move,
        device: DeviceId,
    ) -> Result<Handle<D>, SpawnError> {
        let is_there = match self.machine() {
            Some(machine) => machine.has(device),
            None => device == HOST,
        };
        if !is_there {
            return Err(SpawnError::Devices(vec![format!("there is no {device}")]));
        }
        let access = [access];
        data::check(&access, self.machine().map(Arc::as_ref)).map_err(SpawnError::Access)?;
        self.make_room();
        self.admit()?;
        let mut flags = ORDERED | BODYLESS;
        let task = Arc::new(Task::new(label, Phase::Waiting, Content::Nothing, None, 1));
        let handle = Handle(Arc::clone(&task));
        {
            let mut links = task.links.lock();
            let data = links.data();
            data.moves = Some(moves);
            if let Some(devices) = &self.devices {
                devices.transfers.spawned.fetch_add(1, Ordering::SeqCst);
                data.uses = Uses::of(&access).map(Arc::new);
                if data.uses.is_some() {
                    flags |= USES;
                }
            }
        }
        if self.devices.as_ref().is_some_and(|it| it.runahead() != 0) {
            flags |= AHEAD;
        }
        task.state.set(flags);
        task.engine.store(self.id, Ordering::Relaxed);
        self.launch_ordered(task, &[], &access)?;
        Ok(handle)
    }

    /// It is the turn of a task that only moves data: its predecessors are launched or done.
    pub(super) fn carry(
        self: &Arc<Self>,
        task: &TaskRef<D>,
        moves: Move,
        worklist: &mut Vec<Settled<D>>,
    ) {
        let time = self.now();
        if task.state.advance(Phase::Waiting, Phase::Running).is_err() {
            return self.turn_has_come(task, worklist);
        }
        self.record_at(time, TraceEvent::Ready, task);
        self.record(TraceEvent::Carry, task);
        let moved = match task.take_uses() {
            (_, Some(trouble)) => Err(trouble),
            (Some(uses), None) => uses.with_all(|wants| self.move_data(wants, moves)),
            (None, None) => Ok(Events::new()),
        };
        let (events, outcome) = match moved {
            Ok(events) => (events, Outcome::Value(D::nothing())),
            Err(error) => {
                self.note_loss(&error);
                (Events::new(), Outcome::Failed(Failure::Device(error)))
            }
        };
        self.elsewhere.fetch_add(1, Ordering::SeqCst);
        let pending: Events = events
            .into_iter()
            .filter(|event| !self.devices().is_complete_well(*event))
            .collect();
        let leads = !pending.is_empty();
        task.launch(outcome, &pending, leads);
        self.lead(task, &pending, leads);
        if let Some(settled) = super::devices::landed(task, None) {
            worklist.push(settled);
        }
    }

    fn move_data(&self, wants: &[Want<'_>], moves: Move) -> Result<Events, DeviceError> {
        let store = self.store();
        let mut events = Events::new();
        for want in wants {
            match moves {
                Move::Prefetch(HOST) => {
                    let want = Want {
                        touch: Touch::Read,
                        ..*want
                    };
                    events.extend(store.ensure_host(&[want])?);
                }
                Move::Prefetch(device) => {
                    events.extend(store.prefetch(want.storage, want.region, device)?);
                }
                Move::Return => events.extend(store.return_memory(want.storage)),
                Move::Evict(HOST) | Move::Lose => {}
                Move::Evict(device) => {
                    events.extend(store.evict(want.storage, want.region, device)?);
                }
            }
        }
        Ok(events)
    }

    // ---- the end ----------------------------------------------------------------------------

    /// Has all data come home; whether they are there. If not, who closes is told when they may be.
    pub(super) fn is_all_home(self: &Arc<Self>) -> bool {
        let Some(devices) = &self.devices else {
            return true;
        };
        let transfers = &devices.transfers;
        if transfers.homing.load(Ordering::SeqCst) != 0 {
            return false;
        }
        if transfers.spawned.load(Ordering::SeqCst) == 0 {
            return true;
        }
        let mut events = transfers.store.come_home();
        events.retain(|event| !devices.is_complete(*event));
        if events.is_empty() {
            if self.mark_losses() {
                return false;
            }
            self.close_adopted();
            return true;
        }
        // Not before all are counted.
        transfers.homing.store(events.len() + 1, Ordering::SeqCst);
        for event in events {
            self.when_home(event, |engine, _| engine.came_home());
        }
        self.came_home();
        false
    }

    /// What is lost is marked by a task that was to write it and failed: who reads it after the end, or by
    /// another runtime, hears of that. Whether there was any.
    fn mark_losses(self: &Arc<Self>) -> bool {
        let losses = self.store().take_losses();
        let mut any = false;
        for Loss { owner, region, why } in losses {
            let datum = owner.upgrade().map(Arc::downcast::<Datum<D>>);
            let Some(Ok(datum)) = datum else { continue };
            any = true;
            let part = datum.part(region);
            self.shard().spawned.fetch_add(1, Ordering::SeqCst);
            let content = Content::Nothing;
            let task = Arc::new(Task::new(D::loss(), Phase::Waiting, content, None, 0));
            {
                let mut links = task.links.lock();
                let data = links.data();
                data.moves = Some(Move::Lose);
                data.trouble = Some(why);
            }
            // Nobody who does not read it has to know.
            task.state.set(ORDERED | BODYLESS | TOLD);
            task.engine.store(self.id, Ordering::Relaxed);
            // Of a datum that is closed nobody reads anything.
            let _ = self.launch_ordered(task, &[], &[Access::new(&part, Mode::Out)]);
        }
        any
    }

    /// Memory that arrays brought along is their owners' again, who may do with it what they like: so these arrays
    /// end with their runtime.
    fn close_adopted(&self) {
        for owner in self.store().adopting() {
            if let Some(Ok(datum)) = owner.upgrade().map(Arc::downcast::<Datum<D>>) {
                datum.close();
            }
        }
    }

    fn came_home(&self) {
        let transfers = &self.devices().transfers;
        if transfers.homing.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.notify();
        }
    }

    /// Whether copies are on their way home for good.
    pub(super) fn is_coming_home(&self) -> bool {
        (self.devices.as_ref()).is_some_and(|it| it.transfers.homing.load(Ordering::SeqCst) != 0)
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX >> 16)
}

impl<D: Domain> Task<D> {
    /// What the task keeps of its accesses.
    fn uses(&self) -> Option<Arc<Uses>> {
        if !self.state.load().has(USES) {
            return None;
        }
        let links = self.links.lock();
        links.rare.as_ref()?.data.as_ref()?.uses.clone()
    }

    /// Takes what the task keeps of its accesses, or why it cannot have it.
    fn take_uses(&self) -> (Option<Arc<Uses>>, Option<DeviceError>) {
        let mut links = self.links.lock();
        self.state.clear(USES);
        let data = links.data();
        (data.uses.take(), data.trouble.take())
    }

    /// Notes why the task cannot have its data.
    fn note_trouble(&self, error: DeviceError) {
        let mut links = self.links.lock();
        links.data().trouble.get_or_insert(error);
        self.state.set(USES);
    }
}
