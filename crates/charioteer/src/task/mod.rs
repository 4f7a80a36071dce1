//! Tasks: identity, state machine, outcome, links and failure.
//!
//! # Protocol
//!
//! A [`Task`] is one allocation shared by everybody who knows of it: the handles of its user, the
//! queue, its predecessors (who will release it) and whoever waits for it. Its life is the walk of
//! one word through the phases of `state`:
//!
//! ```text
//!             spawn                  last predecessor          claim
//! Unspawned ---------> Waiting ---------------------> Ready ----------> Running ----> Done
//!     |                   |                            ^  |               |  ^
//!     |                   |                            |  |               |  |
//!     |                   |                            +--|--- retry -----+  |
//!     |                   |                            +--|-- Suspended <-+  |
//!     +-------------------+-------------------------------+------------------+
//!                        claim, to cancel, skip or fail it
//! ```
//!
//! * **Who owns what.** `content` is the body until `Done` and the outcome after it. It is written
//!   by the spawner before `Waiting` is published, by the one thread that won the move to `Running`,
//!   and by nobody after `Done`. Everybody may read it after having seen `Done`. Cancelling or
//!   skipping a task wins the move to `Running` as well, so there is one road to `Done` and it has
//!   one owner (invariant 1). `options` are written by the spawner and never again.
//! * **Counting.** `pending` counts unfinished predecessors, plus one while the task is being
//!   constructed, so that predecessors that finish meanwhile cannot start it early. Whoever takes it
//!   to zero makes the task ready, or skips it if a predecessor failed.
//! * **Links.** Who wants to hear of the end of a task registers a [`Link`] under the lock `links`,
//!   then sets `LINKED`; if the word shows `Done` at that moment the registrar takes its link back
//!   and acts at once. Whoever completes publishes `Done` first and then, if it saw `LINKED`, takes
//!   the links under the lock. In each order of the two exactly one of them handles the link.
//! * **Suspension.** A body that suspends until tasks are done leaves in its task which latch it
//!   awaits, under the same lock. Whoever resumes it takes that out together with the move to
//!   `Ready`, so a latch of an earlier suspension resumes nobody. A latch that was not the one to
//!   resume its body is taken off the tasks that it watched, so no edge of a wait outlives the wait.
//! * **Requests.** A running body is asked to end by a flag: `CANCEL`, by somebody, or `TIMED_OUT`,
//!   by the clock of its attempt. It hears once (`DELIVERED`). A retry after `TIMED_OUT` clears that
//!   flag alone, and only while `CANCEL` is not set.
//! * **Failure** travels along links from a task to its dependents as *poison*: the root task whose
//!   body failed. A poisoned task is skipped when its last predecessor is done, so that it never
//!   outruns a predecessor that still runs.
//!
//! * **Flight.** A task on devices ends in two steps. When its body returns it is *launched*: what it
//!   enqueued has events, and dependents that may run ahead start behind those at once. When the events
//!   and all predecessors are complete it is done. Between the two it is still `Running`, with the flag
//!   `LAUNCHED`; its `Flight`, under the lock of the links, keeps the outcome until then, and knows
//!   the dependents that ran ahead, which are told of the end as others are.
//!
//! * **Order.** A task that accesses data may have dependents that come after it in order only
//!   ([`Link::After`]). It may be cancelled before its turn, and is done while tasks that it came after
//!   still run. So it is *past*, and its dependents of either kind hear of it, when it is done *and*
//!   `pending` is zero. Who ends it publishes `Done` and then reads `pending`; if that is not zero the
//!   links stay. Whoever takes `pending` to zero then reads the word, and hands the links on if it is
//!   done. Between what each writes and what it reads is a SeqCst fence, so one of the two hands them
//!   on; and both take them under the lock, so only one does.
//!
//! * **Order of those who run ahead.** A task that was let go when predecessors were launched has a count
//!   of zero while these are in flight. So long it has the flag `BEHIND`, and is not past either. The flag
//!   goes with `incomplete`, under the lock: it is set before the predecessor is taken off `pending`, and
//!   cleared by the last one that is done. So who reads `pending` as zero, and the word after that, sees the
//!   flag if it is to be there. A launched task is done no sooner than all that it ran ahead of, of
//!   either kind of link; one that ended without having been launched leaves its links, and whoever clears
//!   the flag hands them on, as above. So a task is past only when all tasks before it are done, which is
//!   what lets its record take the place of theirs.
//!
//! This folder knows nobody but `machine`: what a body is, what a value is and how to call back into the user's
//! world is the [`Domain`]'s business.

mod flight;
mod latch;
mod link;
#[cfg(all(test, loom))]
mod loom_models;
pub(crate) mod state;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use flight::{Ending, Flight, Landed};
pub(crate) use latch::End;
pub use latch::{Latch, Until, Waker};
pub use link::Link;
pub(crate) use link::List;
pub use state::Phase;

use crate::data::{Attached, Group, Part};
use crate::machine::DeviceError;
use crate::schedule::gang::Alternative;
use crate::schedule::map::Mapping;
use crate::schedule::map::policy::Call;
use crate::sync::{AtomicU32, Cell, Mutex, Ordering, fence};
use state::{DIRTY, LINKED, Snapshot, State};

/// What the runtime needs to know about the world that its tasks come from: plain Rust closures
/// ([`crate::native`]) or an interpreter.
pub trait Domain: Send + Sync + Sized + 'static {
    /// What runs.
    type Body: Send;
    /// What a body gives.
    type Value: Send + Sync;
    /// What a body fails with.
    type Error: Send + Sync;
    /// What is called once when a task is done.
    type Callback: Send;
    /// What people call the task.
    type Label: Send + Sync + fmt::Display;

    /// The engines of this domain that are open.
    fn engines() -> &'static crate::engine::Registry<Self>;

    /// Whether a body is to be run in a session; one that is not may be run in one all the same.
    fn needs_session(&self, _body: &Self::Body) -> bool {
        true
    }

    /// Whether a body only enqueues something on its stream, so that what is [deferred](crate::machine)
    /// may stay so while it runs.
    fn only_enqueues(&self, _body: &Self::Body) -> bool {
        false
    }

    /// Runs or resumes a body on the current thread.
    ///
    /// # Errors
    /// Nothing is returned as `Err`: a failure is a [`Step::Done`] with an error.
    fn run(&self, running: &crate::engine::Running<'_, Self>, body: &mut Self::Body) -> Step<Self>;

    /// Whether a body was suspended in the middle: it is to be resumed, to hear that it is
    /// cancelled, and not to be dropped.
    fn has_begun(&self, _body: &Self::Body) -> bool {
        false
    }

    /// Calls `run` with the domain's surroundings in place (attached to the interpreter); a worker
    /// runs as many tasks in it as it finds. See [`Engine::set_width`](crate::engine::Engine::set_width).
    fn session(&self, run: &mut dyn FnMut());

    /// Calls `wait`, which blocks the thread, with the surroundings given up meanwhile.
    fn blocking(&self, wait: &mut dyn FnMut());

    /// Whether a thread in a session keeps others from theirs and from coming back from
    /// [`Domain::blocking`].
    fn sessions_exclude(&self) -> bool {
        false
    }

    /// How long a thread that runs no body may block before it asks [`Domain::interrupted`].
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// Whether the wait of this thread is to end early, because a signal came, say.
    fn interrupted(&self) -> bool {
        false
    }

    /// Starts a thread of the runtime.
    ///
    /// # Errors
    /// If the system refuses another thread.
    fn start_thread(&self, name: String, main: Box<dyn FnOnce() + Send>) -> std::io::Result<()>;

    /// Calls a callback: of `task`, which is done, or of a latch that opened.
    fn call_back(callback: Self::Callback, task: Option<&TaskRef<Self>>);

    /// The running `task` was asked to cancel; a body that goes on elsewhere is to be told. The
    /// attempt that was asked may have ended meanwhile: look at
    /// [`Engine::cancel_requested`](crate::engine::Engine::cancel_requested) before telling.
    fn asked(&self, _task: &TaskRef<Self>) {}

    /// Something went wrong that concerns no task.
    fn warn(&self, message: &str) {
        eprintln!("charioteer: {message}");
    }

    /// Tells the user of a failure that nobody can receive any more.
    fn report_unread(&self, task: &TaskRef<Self>);

    /// Maps calls by the user's policy, of an engine that is opened with
    /// [`Mapper::User`](crate::mapping::policy::Mapper::User): for each call, in order, the index of a
    /// candidate, or how the policy failed, which fails the task. An index that is none, or a missing
    /// answer, fails the task as [`Failure::Mapping`].
    ///
    /// Called in a [session](Domain::session), with no lock held, on a thread of the engine's own; in a
    /// runtime without workers on the one that made the task ready. The policy may not wait for tasks.
    fn choose(&self, calls: &[Call]) -> Vec<Result<usize, Self::Error>> {
        let _ = calls;
        Vec::new()
    }

    /// Whether [`Domain::report_unread`] is wanted at all.
    fn wants_unread(&self) -> bool {
        false
    }

    /// The task that combines a reduction, in front of the access that ends it: it comes after all
    /// members, and may read and write what they reduce into. Called with no lock held, by the thread
    /// that spawns or waits, or closes the runtime. Of a reduction that another thread ended meanwhile the
    /// body is dropped.
    fn combine(&self, group: &Arc<Group<Self>>) -> (Self::Label, Self::Body) {
        unreachable!("a domain with reductions combines {}", group.part())
    }

    /// The value of a task without a body: an access of the host.
    fn nothing() -> Self::Value;

    /// What the task is called that stands for elements that were lost.
    fn loss() -> Self::Label;
}

/// What a call of [`Domain::run`] came to.
pub enum Step<D: Domain> {
    /// The body ended.
    Done(Result<D::Value, Trouble<D>>),
    /// The body gives its thread up until the tasks are done. It is resumed by that, or once by a
    /// request to end.
    Await(Vec<TaskRef<D>>, Until),
    /// The body gives its thread up until [`crate::engine::Engine::awaken`]. It may be resumed for
    /// no reason, as a future may be polled for none.
    Sleep,
    /// The body goes on elsewhere; [`crate::engine::Engine::finish`] ends it.
    Elsewhere,
}

/// How a body failed.
pub enum Trouble<D: Domain> {
    /// With an error of its own.
    Raised(D::Error),
    /// By obeying a request to cancel.
    Cancelled,
}

/// Why a task has no value.
pub enum Failure<D: Domain> {
    /// Its body failed.
    Raised(D::Error),
    /// A predecessor failed: the task where it began.
    Dependency(TaskRef<D>),
    /// It was cancelled.
    Cancelled,
    /// An attempt ran longer than it may.
    TimedOut(Duration),
    /// What its body enqueued on a device failed, or the device did.
    Device(DeviceError),
    /// The user's policy gave an answer that is none: what.
    Mapping(Arc<str>),
    /// It was never spawned, and the runtime closed; the names of all such tasks.
    Unspawned(Arc<[String]>),
}

/// The one outcome of a task.
pub enum Outcome<D: Domain> {
    /// What the body gave.
    Value(D::Value),
    /// Why there is nothing.
    Failed(Failure<D>),
}

/// What a task needs of the machine's cores while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Need {
    /// One core, the ordinary case.
    #[default]
    Core,
    /// So many whole cores at once.
    Cores(u16),
    /// A part of one core, in 1/65,536; zero needs nothing.
    Share(u32),
    /// Devices with streams, as [`Options::devices`] says.
    Devices,
    /// What [`Options::mapping`] comes to when the task is ready.
    Mapped,
}

/// The parts of one core that [`Need::Share`] counts in.
pub const WHOLE_CORE: u32 = 65_536;

/// How one task is to be run.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Larger is sooner.
    pub priority: i32,
    /// How often a failed attempt is repeated.
    pub retries: u32,
    /// What one attempt may take.
    pub timeout: Option<Duration>,
    /// What it needs of the cores.
    pub need: Need,
    /// Numbers of whole cores, any of which will do instead of `need`; of those that are free the
    /// first one is taken.
    pub alternatives: Option<Arc<[u16]>>,
    /// The sets of devices any of which will do, of a task whose need is [`Need::Devices`].
    pub devices: Option<Arc<[Alternative]>>,
    /// The choices of a task whose need is [`Need::Mapped`], which says nothing else of what it needs.
    pub mapping: Option<Box<Mapping>>,
}

impl Options {
    /// The options of a task for which nothing was said.
    pub const DEFAULT: Self = Self {
        priority: 0,
        retries: 0,
        timeout: None,
        need: Need::Core,
        alternatives: None,
        devices: None,
        mapping: None,
    };

    /// Those of a task that is mapped when it is ready.
    #[must_use]
    pub fn mapped(mapping: Mapping) -> Self {
        Self {
            need: Need::Mapped,
            mapping: Some(Box::new(mapping)),
            ..Self::DEFAULT
        }
    }

    /// What a task needs, as far as it is decided: [`Need::Mapped`] of one that is to be mapped.
    #[inline]
    #[must_use]
    pub fn needs(&self) -> Need {
        match (self.need, &self.mapping) {
            (Need::Mapped, Some(mapping)) => mapping.need(),
            (need, _) => need,
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What a task is made of: the body before it is done, the outcome after.
pub(crate) enum Content<D: Domain> {
    Nothing,
    Body(D::Body),
    Outcome(Outcome<D>),
}

/// What is registered with a task, under its lock.
#[repr(C)]
pub(crate) struct Links<D: Domain> {
    pub(crate) list: List<D>,
    pub(crate) rare: Option<Box<Rare<D>>>,
}

/// What few tasks have, under the lock of the links.
pub(crate) struct Rare<D: Domain> {
    /// The root of a predecessor's failure.
    pub(crate) poison: Option<TaskRef<D>>,
    /// The predecessors, kept only where a later spawn could close a cycle through them.
    pub(crate) predecessors: Vec<TaskRef<D>>,
    /// What the suspended body awaits.
    pub(crate) awaits: Option<Awaits<D>>,
    /// The cycle that a wait of this suspended task would have closed.
    pub(crate) cycle: Option<Vec<String>>,
    /// The number of the current attempt, odd while it runs, of a task with a time limit.
    pub(crate) attempt: u32,
    /// How many attempts failed and were repeated.
    pub(crate) repeated: u32,
    /// Of a task on devices; boxed, since tasks on cores with predecessors have all of this too.
    pub(crate) flight: Option<Box<Flight<D>>>,
    /// Of some tasks that access data.
    pub(crate) data: Option<Box<Attached<D>>>,
}

/// What a suspended body awaits.
pub(crate) struct Awaits<D: Domain> {
    pub(crate) latch: Arc<Latch<D>>,
    pub(crate) tasks: Arc<[TaskRef<D>]>,
}

impl<D: Domain> Default for Rare<D> {
    fn default() -> Self {
        Self {
            poison: None,
            predecessors: Vec::new(),
            awaits: None,
            cycle: None,
            attempt: 0,
            repeated: 0,
            flight: None,
            data: None,
        }
    }
}

impl<D: Domain> Links<D> {
    pub(crate) fn rare(&mut self) -> &mut Rare<D> {
        self.rare.get_or_insert_default()
    }

    pub(crate) fn data(&mut self) -> &mut Attached<D> {
        self.rare().data.get_or_insert_default()
    }

    pub(crate) fn flight(&mut self) -> &mut Flight<D> {
        self.rare().flight.get_or_insert_default()
    }

    /// Takes what a task that is done needs no more.
    fn take_rare(&mut self) -> Option<Box<Rare<D>>> {
        let mut rare = self.rare.take();
        let flight = rare.as_mut().and_then(|rare| rare.flight.as_mut());
        if let Some(flight) = flight
            && let Some(loan) = flight.loan.take()
        {
            // Of a task that was cancelled: it is to be given back.
            let holding = flight.holding.take();
            let flight = self.flight();
            (flight.loan, flight.holding) = (Some(loan), holding);
        }
        rare
    }
}

/// A task; see the module's protocol. What those need who come after it is at its start, in one cache line
/// with the counts of its references: they meet it long after it was spawned. In the next one is what its
/// worker changes, and behind that what stays as the spawner made it.
#[repr(C)]
pub struct Task<D: Domain> {
    pub(crate) state: State,
    /// Unfinished predecessors, plus one during construction.
    pub(crate) pending: AtomicU32,
    pub(crate) links: Mutex<Links<D>>,
    /// Written by the spawner with the content, by the running thread at a retry.
    pub(crate) options: Cell<Option<Box<Options>>>,
    /// See "who owns what" in the module's protocol.
    pub(crate) content: Cell<Content<D>>,
    /// The engine it was spawned in, zero before.
    pub(crate) engine: AtomicU32,
    /// Handles that users hold.
    handles: AtomicU32,
    /// Its number in traces.
    pub(crate) id: u64,
    pub(crate) label: D::Label,
}

/// How far a task with accesses is out of the way of those that come after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Past {
    /// It, or something that it came after, is not done.
    Not,
    /// It has a value.
    Well,
    /// It has none: what it was to write is undefined.
    Failed,
}

/// Shared ownership of a task.
pub type TaskRef<D> = Arc<Task<D>>;

// SAFETY: `content` and `options` are the only parts that are not `Sync` by themselves. The
// module's protocol gives them one writer at a time, each hand-over synchronised by an acquiring
// read of the word that the writer released; after `Done` they are only read, and values, errors and
// labels are `Sync` by the bounds of `Domain`. Bodies are only touched by their owner and are `Send`.
unsafe impl<D: Domain> Sync for Task<D> {}
// SAFETY: everything in it is `Send` by the bounds of `Domain`.
unsafe impl<D: Domain> Send for Task<D> {}

impl<D: Domain> Task<D> {
    /// A task that is known by name before it is spawned.
    #[must_use]
    pub fn unspawned(label: D::Label) -> Self {
        Self::new(label, Phase::Unspawned, Content::Nothing, None, 0)
    }

    /// A task that is spawned under no name; nobody else knows it yet.
    #[inline]
    pub(crate) fn new(
        label: D::Label,
        phase: Phase,
        content: Content<D>,
        options: Option<Box<Options>>,
        handles: u32,
    ) -> Self {
        Self {
            state: State::new(phase),
            pending: AtomicU32::new(1),
            handles: AtomicU32::new(handles),
            engine: AtomicU32::new(0),
            id: crate::trace::next_id(),
            label,
            links: Mutex::new(Links {
                list: List::Empty,
                rare: None,
            }),
            content: Cell::new(content),
            options: Cell::new(options),
        }
    }

    /// As [`new`](Self::new), made where it stays: to move it there would cost each task.
    #[inline]
    pub(crate) fn allocate(
        label: D::Label,
        phase: Phase,
        content: Content<D>,
        options: Option<Box<Options>>,
        handles: u32,
    ) -> TaskRef<D> {
        let place = Arc::<Self>::new_uninit();
        let task = Arc::as_ptr(&place).cast_mut().cast::<Self>();
        // SAFETY: the place is for such a task, nobody else has a reference to it, and all of it is written.
        unsafe {
            task.write(Self::new(label, phase, content, options, handles));
            place.assume_init()
        }
    }

    /// What people call it.
    pub fn label(&self) -> &D::Label {
        &self.label
    }

    /// Its number in traces, unique in the process.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Where it is on its way, at this moment.
    pub fn phase(&self) -> Phase {
        self.state.load().phase()
    }

    /// Whether it has its outcome.
    #[inline]
    pub fn is_done(&self) -> bool {
        self.state.load().is_done()
    }

    /// Whether it was cancelled. Its outcome may be about to come.
    pub fn is_cancelled(&self) -> bool {
        self.state.load().has(state::CANCELLED)
    }

    /// Whether it is done and has no value.
    pub fn is_failed(&self) -> bool {
        self.state.load().has(state::FAILED)
    }

    /// Whether its body was asked to end.
    #[inline]
    pub fn cancel_requested(&self) -> bool {
        self.state.load().has(state::ASKED)
    }

    /// Whether a request came from the time limit of the attempt.
    pub fn timed_out(&self) -> bool {
        self.state.load().has(state::TIMED_OUT)
    }

    /// Whether a request to end is new to the body; it is delivered by this call.
    pub fn take_cancel_request(&self) -> bool {
        self.state.load().is_asked() && !self.state.set(state::DELIVERED).has(state::DELIVERED)
    }

    /// Whether the body was woken since it began to run.
    #[cfg(not(loom))] // for `native`, which models do without
    pub(crate) fn was_woken(&self) -> bool {
        self.state.load().has(state::WOKEN)
    }

    /// Whether its body needs a session of the domain.
    #[inline]
    pub(crate) fn needs_session(&self) -> bool {
        !self.state.load().has(state::OUTSIDE)
    }

    /// The outcome, if there is one.
    #[inline]
    pub fn outcome(&self) -> Option<&Outcome<D>> {
        if !self.is_done() {
            return None;
        }
        self.content.with(|content| {
            // SAFETY: `Done` was read with acquire; nobody writes the content after it, so a
            // shared borrow for as long as the task lives is sound.
            match unsafe { &*content } {
                Content::Outcome(outcome) => Some(outcome),
                Content::Nothing | Content::Body(_) => unreachable!("a done task has its outcome"),
            }
        })
    }

    /// The options of a spawned task; none if all are the default.
    #[inline]
    pub(crate) fn options(&self) -> Option<&Options> {
        // SAFETY: written by the spawner, which owned the task, and never after it was published;
        // callers own the task or have seen that it was published.
        self.options.with(|options| unsafe { &*options }.as_deref())
    }

    /// What it needs, as far as that is decided.
    #[inline]
    pub(crate) fn needs(&self) -> Need {
        self.options().map_or(Need::Core, Options::needs)
    }

    /// Its choices, if it has any.
    #[inline]
    pub(crate) fn mapping(&self) -> Option<&Mapping> {
        self.options()?.mapping.as_deref()
    }

    /// The task where this one's failure began: itself, or a predecessor.
    pub fn root(self: &Arc<Self>) -> &TaskRef<D> {
        match self.outcome() {
            Some(Outcome::Failed(Failure::Dependency(root))) => root,
            _ => self,
        }
    }

    /// Notes that somebody received the failure of this task, or of its dependent; gives the task
    /// where it began if that is news.
    pub(crate) fn tell(self: &Arc<Self>) -> Option<&TaskRef<D>> {
        let root = self.root();
        let state = root.state.load();
        (state.has(state::FAILED)
            && !state.has(state::TOLD)
            && !root.state.set(state::TOLD).has(state::TOLD))
        .then_some(root)
    }

    /// Registers `link`, or gives it back if the task is done already.
    #[inline]
    pub(crate) fn link(&self, link: Link<D>) -> Result<(), Link<D>> {
        if self.state.load().is_done() {
            return Err(link);
        }
        let mut links = self.links.lock();
        links.list.push(link);
        // A completer that sees the flag takes the lock after it published `Done`. So where the flag
        // is set already, it either is still to come, and finds the push, or was here before, and
        // its `Done` is visible. Else the flag is set by a read-modify-write, which sees `Done` or
        // is seen by the completer.
        let mut state = self.state.load();
        if !state.has(LINKED) {
            state = self.state.set(LINKED);
        }
        if state.is_done() {
            return Err(links.list.pop().expect("pushed above, under the same lock"));
        }
        Ok(())
    }

    /// As [`Task::link`], of a dependent that comes after this task's accesses, which was not
    /// [past](Task::past) just now: the link is given back if it is meanwhile.
    #[inline]
    pub(crate) fn link_behind(&self, link: Link<D>) -> Result<(), Link<D>> {
        let mut links = self.links.lock();
        links.list.push(link);
        let mut state = self.state.load();
        if !state.has(LINKED) {
            state = self.state.set(LINKED);
        }
        if state.is_done() && self.has_had_its_turn() {
            return Err(links.list.pop().expect("pushed above, under the same lock"));
        }
        Ok(())
    }

    /// Whether all that this task came after is done. Under the lock of the links, so that it is either
    /// true, or whoever makes it so comes later.
    fn has_had_its_turn(&self) -> bool {
        fence(Ordering::SeqCst);
        self.pending.load(Ordering::Acquire) == 0 && !self.state.load().has(state::BEHIND)
    }

    /// Whether this task, which accesses data, and all that it came after are done.
    #[inline]
    pub(crate) fn past(&self) -> Past {
        if !self.state.load().is_done() || self.pending.load(Ordering::Acquire) != 0 {
            return Past::Not;
        }
        // After the count: see the module's protocol.
        let state = self.state.load();
        if state.has(state::BEHIND) {
            Past::Not
        } else if state.has(state::FAILED) {
            Past::Failed
        } else {
            Past::Well
        }
    }

    /// Takes the links that a task left when it ended before its turn, which has come now.
    pub(crate) fn take_left(&self) -> List<D> {
        fence(Ordering::SeqCst);
        if !self.is_done() {
            return List::Empty;
        }
        let (list, rare) = {
            let mut links = self.links.lock();
            if !self.has_had_its_turn() {
                return List::Empty;
            }
            (std::mem::take(&mut links.list), links.take_rare())
        };
        drop(rare);
        list
    }

    /// Notes a reduction that the task is a member of, or else a part that it is to stand in line for.
    pub(crate) fn note_part(&self, part: &Part<D>, group: Option<Arc<Group<D>>>) {
        let mut links = self.links.lock();
        match group {
            Some(group) => links.data().groups.push(group),
            None => links.data().lines.push(part.clone()),
        }
    }

    /// Takes the parts that the task is to stand in line for.
    pub(crate) fn take_lines(&self) -> Vec<Part<D>> {
        let mut links = self.links.lock();
        std::mem::take(&mut links.data().lines)
    }

    /// The reductions that the task is a member of, or combines.
    pub(crate) fn groups(&self) -> Vec<Arc<Group<D>>> {
        let links = self.links.lock();
        let rare = links.rare.as_ref();
        rare.and_then(|rare| rare.data.as_ref())
            .map_or_else(Vec::new, |data| data.groups.clone())
    }

    /// Takes back the links to `latch`, whose waiter gave up.
    pub(crate) fn unlink(&self, latch: &Arc<Latch<D>>) {
        let gone = self
            .links
            .lock()
            .list
            .extract(|link| matches!(link, Link::Latch(other) if Arc::ptr_eq(other, latch)));
        drop(gone);
    }

    /// Takes back the links to a dependent, and says how many there were.
    pub(crate) fn unlink_dependent(&self, dependent: &TaskRef<D>) -> u32 {
        let gone = self.links.lock().list.extract(|link| {
            matches!(link, Link::Dependent(other) | Link::After(other) if Arc::ptr_eq(other, dependent))
        });
        u32::try_from(gone.len()).expect("no more than were registered")
    }

    /// Takes what is registered, after `Done` was published; `failed`: without a value.
    #[inline]
    pub(crate) fn take_links(&self, before: Snapshot, failed: bool) -> List<D> {
        if !before.has(LINKED | DIRTY | state::POISONED | state::LAUNCHED | state::USES) {
            return List::Empty;
        }
        let (list, rare) = {
            let mut links = self.links.lock();
            if failed && before.has(state::ORDERED) && !self.has_had_its_turn() {
                // Ended before its turn: those that come after it wait for that.
                let others = |link: &Link<D>| !matches!(link, Link::Dependent(_) | Link::After(_));
                return List::Many(links.list.extract(others));
            }
            (std::mem::take(&mut links.list), links.take_rare())
        };
        drop(rare);
        list
    }

    /// Takes note that a predecessor failed.
    pub(crate) fn poison(&self, root: &TaskRef<D>) {
        let mut links = self.links.lock();
        links.rare().poison.get_or_insert_with(|| Arc::clone(root));
        self.state.set(state::POISONED);
    }

    /// Takes away what a spawn that is refused left.
    pub(crate) fn cleanse(&self) {
        let rare = {
            let mut links = self.links.lock();
            self.state.clear(state::POISONED);
            links.rare.take()
        };
        drop(rare);
    }

    /// The root of a predecessor's failure.
    pub(crate) fn poisoned(&self) -> Option<TaskRef<D>> {
        // Who counted on the predecessor's end comes after the flag.
        if !self.state.load().has(state::POISONED) {
            return None;
        }
        self.links
            .lock()
            .rare
            .as_mut()
            .and_then(|rare| rare.poison.take())
    }

    /// Counts predecessors in, of a task that this thread constructs.
    #[inline]
    pub(crate) fn expect(&self, predecessors: u32) {
        // Nobody changes a count that stands for the construction alone: who does is a predecessor,
        // and counted. Others may be there after a spawn that was refused, see `publish_linked`.
        if self.pending.load(Ordering::Relaxed) == 1 {
            self.pending.store(1 + predecessors, Ordering::Relaxed);
        } else {
            self.pending.fetch_add(predecessors, Ordering::Relaxed);
        }
    }

    /// Makes a task ready that has no predecessors and that nobody else knows yet.
    #[inline]
    pub(crate) fn begin_ready(&self) {
        self.pending.store(0, Ordering::Relaxed);
        self.state.begin_ready();
    }

    /// One predecessor is done; true for the one that makes the count zero.
    #[inline]
    pub(crate) fn release(&self, predecessors: u32) -> bool {
        let before = self.pending.fetch_sub(predecessors, Ordering::AcqRel);
        debug_assert!(before >= predecessors, "a task was released too often");
        before == predecessors
    }

    pub(crate) fn add_handle(&self) {
        self.handles.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes a handle away; true for the last one.
    pub(crate) fn remove_handle(&self) -> bool {
        // SeqCst: the completer publishes `Done` and then reads the count, the last handle takes
        // itself off the count and then reads the word; one of the two must see the other.
        self.handles.fetch_sub(1, Ordering::SeqCst) == 1
    }

    pub(crate) fn has_handles(&self) -> bool {
        self.handles.load(Ordering::SeqCst) != 0
    }

    /// Takes the cycle that a wait of this task would have closed.
    pub fn take_cycle(&self) -> Option<Vec<String>> {
        self.links
            .lock()
            .rare
            .as_mut()
            .and_then(|rare| rare.cycle.take())
    }
}

impl<D: Domain> fmt::Debug for Task<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Task({} {:?})", self.label, self.phase())
    }
}
