//! Tasks that access managed data: registration, lines, reductions, and the accesses of the host.
//!
//! # Registration
//!
//! What `data` promises, whoever finds a record finds all edges that lead to its task, decides the order
//! of steps. The edges from named dependencies come first, without any lock. Then the data are locked
//! ([`Session`]), the predecessors are looked up and linked, a task with a name is published (which may
//! find a cycle, and then nothing was entered), the records are entered, and the data are unlocked. So
//! nothing leads on from a task by its accesses before all its own edges stand, and the edge that closes a
//! cycle is always put by a spawn that searches, or by a wait, as `graph` says.
//!
//! Tasks with accesses keep their count of predecessors until it is zero: it tells whether they are
//! [past](crate::task::Task::past). One that turns out to have none, and may begin without a
//! further look, is ready before its records are entered, as long as nobody else knows it. Those
//! that may run ahead of work on devices remember whom they came after until they are registered,
//! and catch up with those who were launched before that.
//!
//! # Accesses of the host
//!
//! An access of the host is a task without a body. When its predecessors are done it is *running*, and
//! belongs to its [`HostAccess`], whose end is its end. Its turn is told by a second task, its *gate*,
//! which is done at that moment; who waits for the access waits for the gate, like for any other task.
//! Who gives up before leaves the access where it stands, and it ends by itself when its turn comes: those
//! behind it come after those before it all the same.

use std::sync::Arc;
use std::time::Instant;

use smallvec::SmallVec;

use super::{Engine, Refused, Settled, SpawnError, WaitError, graph, hand_on};
use crate::data::{
    self, Access, AccessTrouble, Found, Group, Mode, Move, Refusal, Session, Turn, Uses,
};
use crate::sync::{Ordering, assert_unlocked, fence};
use crate::task::state::{AHEAD, DIRTY, HOST, JOINS, ORDERED, Snapshot, USES};
use crate::task::{
    Content, Domain, Ending, Failure, Link, Options, Outcome, Phase, Task, TaskRef, Until,
};
use crate::trace::Event;
use crate::work::{self, Worker};

/// What came of a registration.
pub(super) struct Registered<D: Domain> {
    /// How many of the predecessors were past.
    pub(super) done: u32,
    /// Their numbers, if somebody wants to know.
    pub(super) edges: Vec<u64>,
    /// They themselves, of a task that may run ahead of them.
    pub(super) before: Vec<TaskRef<D>>,
}

impl<D: Domain> Default for Registered<D> {
    fn default() -> Self {
        Self {
            done: 0,
            edges: Vec::new(),
            before: Vec::new(),
        }
    }
}

/// Accesses, and their numbers in the order of their data.
type Numbers<'a, D> = SmallVec<[(&'a Access<'a, D>, u64); 4]>;

/// Which way a task may go that is registered.
#[derive(Clone, Copy)]
struct Way {
    /// It may run ahead of work on devices.
    ahead: bool,
    /// It may take data to devices.
    goes: bool,
}

impl Way {
    const HOME: Self = Self::of(false, false);

    const fn of(ahead: bool, goes: bool) -> Self {
        Self { ahead, goes }
    }
}

/// Why an access of the host did not come about.
pub enum HostError<D: Domain> {
    /// The accesses are refused.
    Access(AccessTrouble),
    /// The wait is refused: it would never end, or no thread is left.
    Wait(WaitError),
    /// What is read is undefined: the task where the failure began.
    Failed(TaskRef<D>),
    /// The time was over, or the domain interrupted the wait, before it was its turn.
    Late,
    /// The runtime is closed.
    Closed,
}

/// An access of the host. It ends when this is dropped.
pub struct HostAccess<D: Domain> {
    engine: Arc<Engine<D>>,
    task: TaskRef<D>,
}

impl<D: Domain> HostAccess<D> {
    /// Ends it.
    pub fn leave(self) {
        drop(self);
    }
}

impl<D: Domain> Drop for HostAccess<D> {
    fn drop(&mut self) {
        self.engine.end_host(&self.task);
        self.engine.summon();
        self.engine.drain_if_alone();
        self.engine.elsewhere.fetch_sub(1, Ordering::SeqCst);
        self.engine.went_quiet();
    }
}

pub(super) fn flags_of<D: Domain>(accesses: &[Access<'_, D>]) -> u32 {
    let joins = |access: &Access<'_, D>| matches!(access.mode, Mode::Commute | Mode::Reduce(_));
    if accesses.iter().any(joins) {
        ORDERED | JOINS
    } else {
        ORDERED
    }
}

impl<D: Domain> Engine<D> {
    /// That the accesses of a task make sense. Gives what is to be kept of them, if the task may run on
    /// devices; its sets have room for that from then on.
    pub(super) fn check_accesses(
        &self,
        accesses: &[Access<'_, D>],
        options: Option<&mut Options>,
    ) -> Result<Option<Uses>, SpawnError> {
        data::check(accesses, self.machine().map(Arc::as_ref)).map_err(SpawnError::Access)?;
        self.prepare(accesses, options)
    }

    /// Lets a task with accesses go that nobody else knows yet, and that has the flags of its accesses.
    pub(super) fn launch_ordered(
        self: &Arc<Self>,
        task: TaskRef<D>,
        dependencies: &[TaskRef<D>],
        accesses: &[Access<'_, D>],
    ) -> Result<(), SpawnError> {
        let time = self.now();
        let mut connected = 0;
        if !dependencies.is_empty() {
            if dependencies.iter().any(|task| graph::is_loose(task)) {
                task.state.set(DIRTY);
                task.links.lock().rare().predecessors = dependencies.to_vec();
            }
            connected = self.connect(&task, dependencies);
        }
        let state = task.state.load();
        let way = Way::of(state.has(AHEAD), state.has(USES));
        let is_plain = dependencies.is_empty() && self.devices.is_none();
        let may_be_ready = is_plain && !state.has(JOINS | HOST | USES);
        let registered = self.register(&task, dependencies, accesses, None, way, |found, _, _| {
            let is_ready = may_be_ready && found.before.is_empty();
            if is_ready {
                task.begin_ready();
            }
            Ok(is_ready)
        });
        let (registered, is_ready) = match registered {
            Ok(registered) => registered,
            Err(Refused::Error(error)) => {
                // Nobody knows it, and predecessors that are on their way find that it is not ready.
                super::unlink(&task, dependencies);
                self.count_out();
                return Err(error);
            }
            Err(Refused::Cycle(..)) => unreachable!("nothing leads on from a task without a name"),
        };
        if self.trace.is_some() {
            self.record_spawn(time, &task, dependencies);
            self.record_edges(time, &task, &registered.edges);
        }
        if is_ready {
            self.make_ready(task, time);
            self.drain_if_alone();
            return Ok(());
        }
        let launched = if way.ahead {
            self.catch_up(&task, dependencies, &registered.before)
        } else {
            0
        };
        if task.release(connected + registered.done + launched + 1) {
            self.released_last(task);
        }
        self.drain_if_alone();
        Ok(())
    }

    /// Publishes a claimed task with accesses. Gives the word before, and what came of the registration.
    pub(super) fn publish_ordered(
        self: &Arc<Self>,
        task: &TaskRef<D>,
        dependencies: &[TaskRef<D>],
        accesses: &[Access<'_, D>],
        flags: u32,
        loose: bool,
    ) -> Result<(Snapshot, Registered<D>), Refused<D>> {
        let flags = flags | flags_of(accesses);
        let way = Way::of(flags & AHEAD != 0, flags & USES != 0);
        let publish = |found: &Found<'_, D>, done: u32, is_loose: bool| {
            // The references are not the last ones: the records have others.
            let mut all = dependencies.to_vec();
            all.extend(found.before.iter().map(|(task, _)| Arc::clone(task)));
            let clean = if loose || is_loose { 0 } else { DIRTY };
            self.publish_claimed(task, &all, flags, clean)
                .map_err(|refused| match refused {
                    Refused::Cycle(search, unlinked) => Refused::Cycle(search, unlinked + done),
                    Refused::Error(error) => Refused::Error(error),
                })
        };
        let (registered, (before, search)) =
            self.register(task, dependencies, accesses, None, way, publish)?;
        drop(search);
        Ok((before, registered))
    }

    /// Registers the accesses of a task, and calls `publish` when its edges stand and its records do not;
    /// under the locks of the data, so that what is to be dropped has to be given back. `combines`: the
    /// reduction that the task ends.
    fn register<R>(
        self: &Arc<Self>,
        task: &TaskRef<D>,
        dependencies: &[TaskRef<D>],
        accesses: &[Access<'_, D>],
        combines: Option<&Group<D>>,
        way: Way,
        publish: impl Fn(&Found<'_, D>, u32, bool) -> Result<R, Refused<D>>,
    ) -> Result<(Registered<D>, R), Refused<D>> {
        let parent = if combines.is_some() {
            None
        } else {
            self.parent()
        };
        loop {
            let mut session = Session::new();
            session.open(accesses);
            let mut found = Found::new();
            let looked = session.look_up(task, parent.as_ref(), combines, &mut found);
            let Err(refusal) = looked else {
                let (registered, loose) = self.link_behind(task, dependencies, &found, way.ahead);
                let published = publish(&found, registered.done, loose)?;
                drop(found);
                // Of those that commute one that is registered later may come first.
                let commutes = || accesses.iter().any(|it| it.mode == Mode::Commute);
                let travels = self.devices.is_some() && (session.travels(way.goes) || commutes());
                let mut numbers = Numbers::new();
                let traced = self.trace.is_some();
                session.enter(task, |access, number| {
                    if traced {
                        numbers.push((access, number));
                    }
                });
                drop(session);
                if travels && !way.goes {
                    self.keep_uses_at_home(task, accesses);
                }
                self.record_accesses(task, accesses, &numbers);
                if task.state.load().has(JOINS) {
                    self.note_open(task, accesses);
                }
                return Ok((registered, published));
            };
            drop(found);
            drop(session);
            match refusal {
                Refusal::Open(group) => self.combine(&group).map_err(Refused::Error)?,
                Refusal::Trouble(trouble) => {
                    return Err(Refused::Error(SpawnError::Access(trouble)));
                }
                Refusal::Combined => return Err(Refused::Error(SpawnError::Duplicate)),
            }
        }
    }

    /// The task whose body runs on this thread, if it has accesses.
    fn parent(&self) -> Option<TaskRef<D>> {
        Worker::with(self.id, |worker: Option<&Worker<D>>| {
            let running = worker?.running()?;
            running
                .state
                .load()
                .has(ORDERED)
                .then(|| Arc::clone(running))
        })
    }

    /// Links a task to those that it comes after; whether one of them is not spawned, or has such behind it.
    /// Called under the locks of the data.
    fn link_behind(
        &self,
        task: &TaskRef<D>,
        dependencies: &[TaskRef<D>],
        found: &Found<'_, D>,
        ahead: bool,
    ) -> (Registered<D>, bool) {
        let count = u32::try_from(found.before.len()).expect("fewer than 2^32 predecessors");
        let mut registered = Registered::default();
        if ahead {
            let before = found.before.iter();
            registered.before = before.map(|&(task, _)| Arc::clone(task)).collect();
        }
        if self.trace.is_some() {
            registered.edges = found.before.iter().map(|(task, _)| task.id).collect();
        }
        let loose = found.before.iter().any(|(task, _)| graph::is_loose(task));
        if loose {
            let all = found
                .before
                .iter()
                .map(|&(task, _)| task)
                .chain(dependencies);
            let all: Vec<TaskRef<D>> = all.cloned().collect();
            task.state.set(DIRTY);
            task.links.lock().rare().predecessors = all;
        }
        task.expect(count);
        for &(other, reads) in &found.before {
            let link = if reads {
                Link::Dependent(Arc::clone(task))
            } else {
                Link::After(Arc::clone(task))
            };
            if other.link_behind(link).is_err() {
                registered.done += 1;
                if reads && other.is_failed() {
                    task.poison(other.root());
                }
            }
        }
        (registered, loose)
    }

    fn record_accesses(
        &self,
        task: &Task<D>,
        accesses: &[Access<'_, D>],
        numbers: &[(&Access<'_, D>, u64)],
    ) {
        if let Some(trace) = &self.trace {
            for access in accesses {
                let known = numbers.iter().find(|(it, _)| std::ptr::eq(*it, access));
                // 0 of one that does not count.
                trace.record_access(task.id, access, known.map_or(0, |(_, number)| *number));
            }
        }
    }

    // ---- lines and reductions -----------------------------------------------------------------

    /// Lets a task go on whose predecessors are done, and that has no body, or commutes or reduces, or
    /// keeps uses of its data. True if it is ready.
    pub(super) fn may_begin(
        self: &Arc<Self>,
        task: &TaskRef<D>,
        worklist: &mut Vec<Settled<D>>,
    ) -> bool {
        if task.is_done() {
            self.turn_has_come(task, worklist);
            return false;
        }
        let state = task.state.load();
        if state.has(JOINS) && !self.enter_line(task) {
            return false;
        }
        if state.has(HOST)
            && let Some(moves) = task.moves()
        {
            self.carry(task, moves, worklist);
            return false;
        }
        if state.has(USES) && !self.is_at_home(task, worklist) {
            return false;
        }
        if state.has(HOST) {
            self.admit_host(task, worklist);
            return false;
        }
        true
    }

    /// Has a task stand in its lines, once. True if nobody stands before it.
    fn enter_line(&self, task: &TaskRef<D>) -> bool {
        let lines = task.take_lines();
        if lines.is_empty() {
            return true;
        }
        // The count is zero, and nobody but this thread changes it. Who cancels the task from here on sees
        // that its turn is still to come, or is seen.
        task.pending.store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let mut passed = 0;
        if task.phase() == Phase::Waiting {
            let accesses: SmallVec<[Access<'_, D>; 2]> = lines
                .iter()
                .map(|part| Access::new(part, Mode::Commute))
                .collect();
            let mut session = Session::new();
            session.open(&accesses);
            let before = session.stand_in_line(task);
            task.expect(u32::try_from(before.len()).expect("fewer than 2^32 predecessors"));
            for other in &before {
                if other.link_behind(Link::After(Arc::clone(task))).is_err() {
                    passed += 1;
                }
            }
            drop(session);
            passed += self.catch_up(task, &before, &[]);
        }
        task.release(passed + 1)
    }

    /// A task that accesses data has nothing before it any more, and was not waiting for that: hands on
    /// what it kept if it had ended.
    pub(super) fn turn_has_come(
        self: &Arc<Self>,
        task: &TaskRef<D>,
        worklist: &mut Vec<Settled<D>>,
    ) {
        if task.state.load().has(ORDERED) {
            let links = task.take_left();
            hand_on(task, links, task.is_failed(), 0, worklist, Some(self));
        }
    }

    /// Spawns the task that combines a reduction, unless somebody else did.
    fn combine(self: &Arc<Self>, group: &Arc<Group<D>>) -> Result<(), SpawnError> {
        self.admit()?;
        self.combine_admitted(group);
        Ok(())
    }

    fn combine_admitted(self: &Arc<Self>, group: &Arc<Group<D>>) {
        let (label, body) = self.domain.combine(group);
        let flags = self.flags(&body, None, false) | ORDERED;
        let task = Arc::new(Task::new(
            label,
            Phase::Waiting,
            Content::Body(body),
            None,
            0,
        ));
        task.state.set(flags);
        task.engine.store(self.id, Ordering::Relaxed);
        task.note_part(group.part(), Some(Arc::clone(group)));
        let time = self.now();
        let access = [Access::new(group.part(), Mode::InOut)];
        let registered =
            self.register(
                &task,
                &[],
                &access,
                Some(group),
                Way::HOME,
                |_, _, _| Ok(()),
            );
        match registered {
            Ok((registered, ())) => {
                self.record_spawn(time, &task, &[]);
                self.record_edges(time, &task, &registered.edges);
                self.release(&task, registered.done + 1);
            }
            Err(_combined_or_closed) => self.count_out(),
        }
    }

    /// Takes note of reductions that a task began.
    fn note_open(&self, task: &TaskRef<D>, accesses: &[Access<'_, D>]) {
        let reduces = |access: &Access<'_, D>| matches!(access.mode, Mode::Reduce(_));
        if !accesses.iter().any(reduces) {
            return;
        }
        let groups = task.groups();
        let mut open = self.open.lock();
        for group in &groups {
            if group.is_news() {
                if open.len() == open.capacity() {
                    open.retain(|group| group.strong_count() != 0);
                    let more = open.len();
                    open.reserve(more);
                }
                open.push(Arc::downgrade(group));
            }
        }
    }

    /// Ends the reductions that nobody ended; true if there was one.
    pub(super) fn combine_open(self: &Arc<Self>) -> bool {
        let open = std::mem::take(&mut *self.open.lock());
        let open: Vec<Arc<Group<D>>> = open.iter().filter_map(std::sync::Weak::upgrade).collect();
        for group in &open {
            self.shard().spawned.fetch_add(1, Ordering::SeqCst);
            self.combine_admitted(group);
        }
        !open.is_empty()
    }

    // ---- accesses of the host -----------------------------------------------------------------

    /// Waits until the host may access data, in the order of this call among the spawns, and gives the
    /// access; others that conflict wait until it ends. In a body this is a wait like any other. `label` is
    /// what people call the access.
    ///
    /// # Errors
    /// [`HostError`].
    ///
    /// # Panics
    /// If a mode commutes or reduces.
    pub fn host_access(
        self: &Arc<Self>,
        label: impl Fn() -> D::Label,
        accesses: &[Access<'_, D>],
        deadline: Option<Instant>,
    ) -> Result<HostAccess<D>, HostError<D>> {
        self.enter_host(label, accesses, |gate| {
            self.wait(std::slice::from_ref(gate), Until::All, deadline)
        })
    }

    /// The same in a body that came after all other tasks which access these parts, so that it waits for
    /// copies alone. In a runtime without workers it runs no other body meanwhile, which might wait for what
    /// comes after this one.
    ///
    /// # Errors
    /// [`HostError`].
    ///
    /// # Panics
    /// If a mode commutes or reduces.
    pub fn host_access_at_last(
        self: &Arc<Self>,
        label: impl Fn() -> D::Label,
        accesses: &[Access<'_, D>],
    ) -> Result<HostAccess<D>, HostError<D>> {
        self.enter_host(label, accesses, |gate| {
            assert_unlocked();
            if self.workers == 0 {
                return Ok(work::hold(self, gate));
            }
            self.wait(std::slice::from_ref(gate), Until::All, None)
        })
    }

    /// Has the host enter, and `wait` for the gate.
    fn enter_host(
        self: &Arc<Self>,
        label: impl Fn() -> D::Label,
        accesses: &[Access<'_, D>],
        wait: impl FnOnce(&TaskRef<D>) -> Result<bool, WaitError>,
    ) -> Result<HostAccess<D>, HostError<D>> {
        assert_eq!(flags_of(accesses), ORDERED, "the host reads and writes");
        data::check(accesses, self.machine().map(Arc::as_ref)).map_err(HostError::Access)?;
        let admit = || self.admit().map_err(|_| HostError::Closed);
        admit()?;
        if let Err(error) = admit() {
            self.count_out();
            return Err(error);
        }
        let new = |flags| {
            let task = Task::new(label(), Phase::Waiting, Content::Nothing, None, 0);
            task.state.set(flags);
            task.engine.store(self.id, Ordering::Relaxed);
            Arc::new(task)
        };
        let (task, gate) = (new(ORDERED | HOST), new(0));
        {
            let mut links = task.links.lock();
            let data = links.data();
            data.gate = Some((Arc::clone(&gate), Arc::new(Turn::new())));
        }
        let time = self.now();
        let registered = self.register(&task, &[], accesses, None, Way::HOME, |_, _, _| Ok(()));
        let registered = match registered {
            Ok((registered, ())) => registered,
            Err(refused) => {
                let gone = task.links.lock().rare.take();
                drop(gone);
                self.count_out();
                self.count_out();
                return Err(match refused {
                    Refused::Error(SpawnError::Access(trouble)) => HostError::Access(trouble),
                    _ => HostError::Closed,
                });
            }
        };
        self.record_spawn(time, &task, &[]);
        self.record_spawn(time, &gate, &[]);
        self.record_edges(time, &task, &registered.edges);
        let turn = task.turn().expect("put there above");
        self.release(&task, registered.done + 1);
        let waited = wait(&gate);
        if turn.swap(Turn::GIVEN_UP) == Turn::COME {
            let access = HostAccess {
                engine: Arc::clone(self),
                task,
            };
            // It came, however the wait ended.
            return Ok(access);
        }
        match waited {
            Err(error) => Err(HostError::Wait(error)),
            Ok(_) => match gate.outcome() {
                Some(Outcome::Failed(Failure::Dependency(root))) => {
                    if Arc::ptr_eq(root, &task) {
                        // Nobody else asks for it.
                        Self::tell(root);
                    }
                    Err(HostError::Failed(Arc::clone(root)))
                }
                Some(_) => Err(HostError::Closed),
                None => Err(HostError::Late),
            },
        }
    }

    /// It is the turn of an access of the host.
    fn admit_host(self: &Arc<Self>, task: &TaskRef<D>, worklist: &mut Vec<Settled<D>>) {
        let time = self.now();
        if task.state.advance(Phase::Waiting, Phase::Running).is_err() {
            return self.turn_has_come(task, worklist);
        }
        self.record_at(time, Event::Ready, task);
        // It begins here, and goes on where the host is.
        self.record(Event::Start, task);
        self.record(Event::Suspend, task);
        let (gate, turn) = task.gate().expect("an access of the host has a gate");
        self.elsewhere.fetch_add(1, Ordering::SeqCst);
        if turn.swap(Turn::COME) == Turn::GIVEN_UP {
            self.record(Event::End, task);
            worklist.push(settled(task, Outcome::Value(D::nothing())));
            self.elsewhere.fetch_sub(1, Ordering::SeqCst);
        }
        self.open_gate(&gate, Outcome::Value(D::nothing()), worklist);
    }

    /// An access of the host comes to nothing.
    pub(super) fn refuse_host(
        &self,
        task: &TaskRef<D>,
        failure: &Failure<D>,
        worklist: &mut Vec<Settled<D>>,
    ) {
        if let Some((gate, _)) = task.gate() {
            let failure = match failure {
                Failure::Dependency(root) => Failure::Dependency(Arc::clone(root)),
                // What it accesses is lost, or cannot be brought home.
                Failure::Device(_) => Failure::Dependency(Arc::clone(task)),
                _ => Failure::Cancelled,
            };
            self.open_gate(&gate, Outcome::Failed(failure), worklist);
        }
    }

    fn open_gate(&self, gate: &TaskRef<D>, outcome: Outcome<D>, worklist: &mut Vec<Settled<D>>) {
        let time = self.now();
        if gate.state.advance(Phase::Waiting, Phase::Running).is_ok() {
            if matches!(outcome, Outcome::Value(_)) {
                self.record_at(time, Event::Ready, gate);
                self.record_at(time, Event::Start, gate);
                self.record_at(time, Event::End, gate);
            }
            worklist.push(settled(gate, outcome));
        }
    }

    /// The host leaves an access that was its own.
    fn end_host(self: &Arc<Self>, task: &TaskRef<D>) {
        self.record(Event::End, task);
        self.settle(task, Outcome::Value(D::nothing()));
    }
}

fn settled<D: Domain>(task: &TaskRef<D>, outcome: Outcome<D>) -> Settled<D> {
    Settled {
        task: Arc::clone(task),
        ending: Ending::Given(outcome),
    }
}

impl<D: Domain> Task<D> {
    /// What a task does that only moves data.
    fn moves(&self) -> Option<Move> {
        let links = self.links.lock();
        links.rare.as_ref()?.data.as_ref()?.moves
    }

    /// The gate of an access of the host.
    fn gate(&self) -> Option<(TaskRef<D>, Arc<Turn>)> {
        let links = self.links.lock();
        links.rare.as_ref()?.data.as_ref()?.gate.clone()
    }

    fn turn(&self) -> Option<Arc<Turn>> {
        self.gate().map(|(_, turn)| turn)
    }
}
