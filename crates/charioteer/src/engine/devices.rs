//! Tasks on devices: from ready over reserved, dispatched and launched to complete.
//!
//! # The turn
//!
//! The [ledger](crate::schedule::gang) of devices has one owner at a time and no thread of its own.
//! Whatever concerns it (a task that is ready, a body that ended, an event that is complete) goes into
//! a mailbox, and then its sender tries to take the *turn*: the ledger's lock, which nobody ever waits
//! for. Who has it empties the mailbox, takes the grants that are possible now, lets go, and dispatches
//! them with no lock held. A sender that finds the turn free keeps its letters, and reads them after those in
//! the mailbox.
//!
//! **No letter is left.** A sender puts its letter in, passes a SeqCst fence, and tries the lock. Who
//! has the turn lets go of the lock, passes a SeqCst fence, and looks into the mailbox again. Of two
//! fences one is first: either the owner sees the letter, or the sender finds the lock free.
//!
//! # A task's way
//!
//! *Ready*: its predecessors are launched or done. Its request goes to the ledger with the events of
//! those that are launched only. *Dispatched*: it has a [`Grant`] of devices and streams on loan, its data are
//! planned (see [`transfers`](super::transfers)), and it stands
//! in the queue that all threads share, in the order of the grants; the body is a worker's business, and takes
//! no core's compute but the worker's. One whose set has several cores asks [`Places`] for these now, when
//! it has its devices, and never the other way round. Before the body runs, its streams are told to wait for what is in flight: the predecessors'
//! events and those behind which its part of a device is free. *Launched*: the body returned. Events
//! are recorded on its streams, the loan goes back behind them, and dependents that may run ahead are let
//! go, with these events to wait for. *Done*: every event is complete, and every predecessor that it ran
//! ahead of is done.
//!
//! A task whose body failed lets nobody run ahead. One with retries neither, since another attempt may
//! follow. A predecessor whose work failed after its launch poisons those that ran ahead of it: each
//! counts it among what is `incomplete`, so that none of them is done before it knows.
//!
//! Who only comes after another one in order runs ahead of it in the same way, and is not poisoned. Its streams
//! *follow* the events, and it is not offered that one's stream, since a stream that fails would fail its
//! work too. It is counted among what is incomplete as well: a task is done no sooner than
//! all that it ran ahead of, and past no sooner if it ended before (see `task`), so that order is transitive.
//!
//! Whoever takes a loan out of its task gives it back: the thread that ends the body, or cancels the task
//! after it was dispatched, or finds in the queue that somebody did. What a body never used is given
//! back behind whatever it was granted behind: its streams are told to wait for that all the same.
//!
//! A body that waits gives the compute share back and keeps devices, streams and memory; when the wait is
//! over it asks for the share again, before all who only begin. Its cores it gives up before the share, and
//! gets them back after it.
//!
//! *Without workers* a body that waits for its share runs others on its stack meanwhile. If one of these
//! waits in turn, the one below cannot go on before that wait is over, whether it has its share or not. So
//! it has none meanwhile: a wait withdraws what the bodies below it asked for, and lends again what they were
//! given. Only the uppermost body of a stack has a share, and each share that waits are for can be granted
//! (overcommitting it would break invariant 5).
//!
//! **Sets with cores.** Their bodies read on the host, so a task that may get one never runs ahead: it is
//! ready when its predecessors are done. Those that depend on it may run ahead of its work on devices; what
//! it did on the host is before its launch.
//!
//! [`Places`]: crate::schedule::places::Places

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use crossbeam_utils::CachePadded;
use smallvec::SmallVec;

use super::gathering::{give_back, keep, take_kept};
use super::mapping::bit;
use super::transfers::Transfers;
use super::witness::{Owners, Witness};
use super::{Engine, Settled, SpawnError};
use crate::data::Holding;
use crate::data::store::Store;
use crate::machine::{Device, DeviceError, DeviceId, Event, HOST, Kind, Machine, Stream};
use crate::schedule::gang::{
    self, Alternative, Capacity, Gang, Grant, GrantId, Limits, Member, Reason, Request, Step,
    Transfer,
};
use crate::schedule::map::DISTURBED;
use crate::schedule::places;
use crate::schedule::queues::{Injector, Steal};
use crate::sync::{
    AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Guard, Mutex, Ordering, fence, yield_now,
};
use crate::task::state::{AHEAD, CANCELLED, LAUNCHED, LINKED, Snapshot};
use crate::task::{
    Domain, Ending, Failure, Flight, Landed, Latch, Need, Options, Outcome, Phase, Task, TaskRef,
    Until, Waker,
};
use crate::trace::{DeviceEvent, Event as TraceEvent, Trace};

crate::sync::thread_local! {
    /// The sets that this thread spawned with last, which an engine (its number) can serve. Those who
    /// spawn many tasks mostly share them.
    static CHECKED: RefCell<Option<(u32, Arc<[Alternative]>)>> = const { RefCell::new(None) };
}

/// How many letters are read before anything is granted: those of one completion, as a rule.
const LETTERS: usize = 1024;

/// How many grants are made before they are sent.
const BATCH: usize = 64;

type Events = SmallVec<[Event; 2]>;

/// What a task has of the devices, and of the data there.
type Loan = (Grant, Option<Box<Holding>>);

/// Events that a request prefers the streams of.
type Behind = SmallVec<[Event; 1]>;

/// Who goes on when a body that waited has its share again.
enum Resumer<D: Domain> {
    /// An asynchronous body.
    Task(TaskRef<D>),
    /// A thread whose body waited.
    Thread(Arc<Answer<D>>),
}

/// How a thread hears that a body of its has its share again.
pub(crate) struct Answer<D: Domain> {
    latch: Arc<Latch<D>>,
    share: Mutex<Share>,
}

/// The share that a body which waited asked for again.
enum Share {
    /// It is to come.
    Asked,
    /// It is there.
    Has(Grant),
    /// If it comes, it is to be given back.
    Withdrawn,
    /// It came, and was given back.
    Lent,
}

impl<D: Domain> Answer<D> {
    fn new() -> Self {
        let latch = Latch::new(1, Until::All, Waker::Thread(None));
        let open = latch.registered();
        debug_assert!(!open, "nobody knows the latch yet");
        Self {
            latch,
            share: Mutex::new(Share::Asked),
        }
    }

    fn take(&self) -> Option<Grant> {
        match std::mem::replace(&mut *self.share.lock(), Share::Lent) {
            Share::Has(grant) => Some(grant),
            Share::Asked | Share::Withdrawn | Share::Lent => None,
        }
    }

    /// Takes a share that came, or gives it back if the body cannot use it now.
    fn accept(&self, grant: Grant) -> Option<Grant> {
        let mut share = self.share.lock();
        if let Share::Asked = *share {
            *share = Share::Has(grant);
            None
        } else {
            Some(grant)
        }
    }
}

/// Of the members of a set, by their places in it; there are no more than [`gang::MOST_DEVICES`].
type Bits = u64;

/// Which members' events were over when they were recorded, and which of those had failed.
#[derive(Clone, Copy, Default)]
struct Over {
    complete: Bits,
    failed: Bits,
}

enum Letter<D: Domain> {
    /// And what it asks for.
    Ask(TaskRef<D>, Request),
    /// Behind these events, of which those are over, well or not.
    Launched(GrantId, SmallVec<[Option<Event>; 2]>, Over),
    Paused(GrantId, SmallVec<[Option<Event>; 2]>, Over),
    Resumed(GrantId, Resumer<D>),
    /// The event is complete, or failed.
    Landed(Event),
    /// The stream is of no use any more.
    Failed(Stream),
    /// One that waited may wait no more.
    Withdrawn,
    /// Nothing else moves in the engine.
    Stuck,
    Lost(DeviceId),
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            overtaking: 128,
            runahead: 64,
        }
    }
}

/// The devices of an engine.
pub(crate) struct Devices<D: Domain> {
    machine: Arc<Machine>,
    pub(super) capacities: Box<[Capacity]>,
    runahead: u32,
    pub(super) transfers: Transfers,
    /// How many bodies that wait keep memory, as of the last turn.
    keeping: AtomicUsize,
    /// What each device has before it, as of the last turn, if somebody wants to know.
    gauges: Box<[Gauge]>,
    /// The estimated device-nanoseconds of those who wait.
    backlog: AtomicU64,
    gauged: AtomicBool,
    /// Of a runtime that is traced.
    pub(super) witness: Option<Witness>,
    book: CachePadded<Mutex<Book<D>>>,
    mail: Injector<Letter<D>>,
}

/// What a device has before it.
#[derive(Default)]
struct Gauge {
    /// In nanoseconds, of what was granted and is not complete.
    ahead: AtomicU64,
    /// How many tasks that is.
    granted: AtomicU32,
    /// Tasks that a policy sent here and that were not granted.
    waiting: AtomicU32,
    /// Their estimated nanoseconds.
    promised: AtomicU64,
}

struct Book<D: Domain> {
    ledger: Gang<TaskRef<D>>,
    resuming: HashMap<GrantId, Resumer<D>>,
    owners: Owners,
}

/// What came of a turn, to be carried out with no lock held.
struct Outbox<D: Domain> {
    granted: SmallVec<[(TaskRef<D>, Grant); 4]>,
    resumed: SmallVec<[(Resumer<D>, Grant); 4]>,
    /// To be dropped: they were cancelled while they waited.
    unwanted: SmallVec<[TaskRef<D>; 4]>,
    /// Whose devices are lost.
    stranded: Vec<TaskRef<D>>,
    /// Who can get no memory, since those who have it wait for what cannot get any.
    starved: Option<TaskRef<D>>,
}

impl<D: Domain> Default for Outbox<D> {
    fn default() -> Self {
        Self {
            granted: SmallVec::new(),
            resumed: SmallVec::new(),
            unwanted: SmallVec::new(),
            stranded: Vec::new(),
            starved: None,
        }
    }
}

impl<D: Domain> Devices<D> {
    pub(crate) fn new(
        machine: Arc<Machine>,
        limits: Limits,
        workers: usize,
        traced: Option<(&Arc<Trace>, u32)>,
    ) -> Self {
        let capacities: Box<[Capacity]> = (0..machine.gpus())
            .map(|index| {
                let index = u16::try_from(index).expect("numbers of devices have 16 bits");
                let info = machine.device(DeviceId::gpu(index)).info();
                Capacity {
                    id: info.id,
                    memory: info.memory,
                    // By the rules of CUDA a kernel that fails takes its context along.
                    fails_whole: machine.as_virtual().is_none(),
                }
            })
            .collect();
        enable_peers(&machine, &capacities);
        let witness = traced.map(|(trace, engine)| {
            Witness::new::<D>(trace, &machine, &capacities, workers, engine)
        });
        let store = Store::new(Arc::clone(&machine));
        if let Some((trace, _)) = traced {
            let trace = Arc::clone(trace);
            store.observe(Box::new(move |moved| trace.record_move(moved)));
        }
        Self {
            runahead: limits.runahead,
            transfers: Transfers::new(store),
            keeping: AtomicUsize::new(0),
            gauges: capacities.iter().map(|_| Gauge::default()).collect(),
            backlog: AtomicU64::new(0),
            gauged: AtomicBool::new(false),
            witness,
            book: CachePadded::new(Mutex::new(Book {
                ledger: Gang::new(&capacities, limits),
                resuming: HashMap::new(),
                owners: Owners::default(),
            })),
            capacities,
            mail: Injector::new(),
            machine,
        }
    }

    pub(super) fn device(&self, id: DeviceId) -> &dyn Device {
        self.machine.device(id).as_ref()
    }

    /// The device of a set that has one and leaves nothing open.
    pub(super) fn only(&self, members: &[Member]) -> Option<DeviceId> {
        match *members {
            [Member::Device(device)] => Some(device),
            [Member::Any(Kind::Gpu)] if self.capacities.len() == 1 => Some(self.capacities[0].id),
            _ => None,
        }
    }

    pub(super) fn runahead(&self) -> u32 {
        self.runahead
    }

    /// Whether an event is complete, and did not fail.
    pub(super) fn is_complete_well(&self, event: Event) -> bool {
        let device = self.device(event.stream.device);
        matches!(device.is_complete(event), Ok(true))
    }

    /// Whether an event is complete; one that failed is.
    pub(super) fn is_complete(&self, event: Event) -> bool {
        self.device(event.stream.device)
            .is_complete(event)
            .unwrap_or(true)
    }

    /// Reads the mail, and after it letters of the owner's, and takes what can be granted now. True if there
    /// may be more.
    fn rule(
        &self,
        book: &mut Book<D>,
        own: &mut impl Iterator<Item = Letter<D>>,
        outbox: &mut Outbox<D>,
    ) -> bool {
        let (ledger, owners) = (&mut book.ledger, &mut book.owners);
        let witness = self.witness.as_ref();
        let mut stuck = false;
        // The task that asked in the last letter.
        let mut last = None;
        let mut is_read = false;
        for _ in 0..LETTERS {
            let letter = if is_read {
                own.next()
            } else {
                match self.mail.steal() {
                    Steal::Success(letter) => Some(letter),
                    Steal::Retry => continue,
                    Steal::Empty => {
                        is_read = true;
                        own.next()
                    }
                }
            };
            let Some(letter) = letter else { break };
            if let Some((task, request)) = last.take()
                && let Err(task) = ledger.submit(task, request)
            {
                outbox.stranded.push(task);
            }
            match letter {
                Letter::Ask(task, request) => last = Some((task, request)),
                Letter::Launched(id, events, over) => {
                    if let Some(witness) = witness {
                        owners.returned(witness, id, &events);
                    }
                    ledger.launched(id, &events);
                    sweep(ledger, &events, over);
                }
                Letter::Paused(id, events, over) => {
                    if let Some(witness) = witness {
                        owners.paused(witness, id, &events);
                    }
                    ledger.paused(id, &events);
                    sweep(ledger, &events, over);
                }
                Letter::Resumed(id, resumer) => {
                    book.resuming.insert(id, resumer);
                    ledger.resumed(id);
                }
                Letter::Landed(event) => ledger.completed(event),
                Letter::Failed(stream) => ledger.failed(stream),
                Letter::Withdrawn => ledger.withdrawn(),
                Letter::Stuck => stuck = true,
                Letter::Lost(device) => outbox.stranded.extend(ledger.fail_device(device)),
            }
        }
        // If more than are read at once came before them.
        own.for_each(|letter| self.mail.push(letter));
        let wanted = |task: &TaskRef<D>| task.phase() == Phase::Ready;
        let mut step = match last {
            Some((task, request)) if wanted(&task) => {
                ledger.submit_last(task, request).unwrap_or_else(|task| {
                    outbox.stranded.push(task);
                    None
                })
            }
            Some((task, _)) => Some(Step::Unwanted(task)),
            None => None,
        };
        for _ in 0..BATCH {
            match step.take().or_else(|| ledger.next(wanted)) {
                Some(Step::Start(task, grant)) => {
                    if let Some(witness) = witness {
                        let options = task.options().expect("a task on devices has options");
                        let alternative = &sets_of(options)[grant.alternative];
                        owners.granted(witness, task.id, &grant, alternative);
                    }
                    outbox.granted.push((task, grant));
                }
                Some(Step::Resume(grant)) => {
                    if let Some(witness) = witness {
                        owners.resumed(witness, grant.id);
                    }
                    let resumer = book.resuming.remove(&grant.id);
                    outbox
                        .resumed
                        .push((resumer.expect("who resumes said so before"), grant));
                }
                Some(Step::Unwanted(task)) => outbox.unwanted.push(task),
                None => {
                    if stuck && ledger.is_stuck() {
                        // Somebody waits for what has links.
                        outbox.starved = ledger.give_up(|task| task.state.load().has(LINKED));
                    }
                    self.keeping.store(ledger.keeping(), Ordering::SeqCst);
                    self.gauge(ledger);
                    return !self.mail.is_empty();
                }
            }
        }
        true
    }

    /// Notes what devices have before them.
    fn gauge(&self, ledger: &Gang<TaskRef<D>>) {
        if !self.gauged.load(Ordering::Relaxed) {
            return;
        }
        for (index, gauge) in self.gauges.iter().enumerate() {
            let (ahead, granted) = ledger.ahead(index);
            gauge.ahead.store(ahead, Ordering::Relaxed);
            gauge.granted.store(granted, Ordering::Relaxed);
        }
        self.backlog.store(ledger.backlog(), Ordering::Relaxed);
    }
}

/// Tells the ledger of those events that were over when they were recorded. Somebody else tells it of the
/// others. A stream that failed is out before it rests: nobody may get it in between.
fn sweep<T>(ledger: &mut Gang<T>, events: &[Option<Event>], over: Over) {
    for (place, event) in events.iter().enumerate() {
        let Some(event) = event else { continue };
        if over.failed >> place & 1 != 0 {
            ledger.failed(event.stream);
        }
        if (over.complete | over.failed) >> place & 1 != 0 {
            ledger.completed(*event);
        }
    }
}

/// Lets devices reach each other's memory wherever there is a link, as bodies over several devices
/// expect.
fn enable_peers(machine: &Machine, devices: &[Capacity]) {
    for own in devices {
        for peer in devices.iter().filter(|peer| peer.id != own.id) {
            // Without a link, or on a device that is lost, whoever tries to reach it hears of it.
            let _ = machine.device(own.id).enable_peer(peer.id);
        }
    }
}

/// What a running task holds a place of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A core, by its number.
    Core(u16),
    /// A device, and the stream on it that is the task's own.
    Device(DeviceId, Stream),
}

/// The set that a task was granted, by the number in its grant, and its place among all sets that the task
/// may be granted.
pub(super) fn granted_set<D: Domain>(task: &Task<D>, alternative: usize) -> (&Alternative, usize) {
    let options = task.options().expect("a task on devices has options");
    // Of a task that is mapped by now the set is known, and that number is of when it was not.
    let mapping = options.mapping.as_deref();
    match mapping.and_then(|mapping| Some((mapping.set()?, mapping.place()?))) {
        Some(granted) => granted,
        None => (&sets_of(options)[alternative], alternative),
    }
}

fn set_of<D: Domain>(task: &Task<D>, alternative: usize) -> &Alternative {
    granted_set(task, alternative).0
}

/// The sets of devices that a task on devices says.
fn sets_of(options: &Options) -> &Arc<[Alternative]> {
    let mapped = options.mapping.as_ref().map(|mapping| mapping.sets());
    let sets = mapped.or(options.devices.as_ref());
    sets.expect("a task on devices says on which")
}

/// The first device that a set names.
fn named_in(set: &Alternative) -> Option<DeviceId> {
    set.members.iter().find_map(|member| match member {
        gang::Member::Device(device) => Some(*device),
        gang::Member::Any(_) => None,
    })
}

/// Whether a task runs on devices with streams. One that is not mapped does not, yet.
#[inline]
pub(crate) fn is_on_devices<D: Domain>(task: &Task<D>) -> bool {
    task.needs() == Need::Devices
}

impl<D: Domain> Engine<D> {
    /// The devices of a task's own kind of need.
    pub(super) fn devices(&self) -> &Devices<D> {
        self.devices
            .as_ref()
            .expect("a task on devices is refused where there are none")
    }

    /// The machine that the engine runs on, if it has more than a host.
    pub fn machine(&self) -> Option<&Arc<Machine>> {
        self.devices.as_ref().map(|devices| &devices.machine)
    }

    /// What the task that runs on this thread, with this grant of cores, holds in the set's order; nothing
    /// of devices that are lost.
    pub fn held_by(&self, task: &Task<D>, grant: &places::Grant) -> SmallVec<[Place; 2]> {
        let mut cores = grant.cores.iter().copied();
        if !is_on_devices(task) {
            let cores = cores.chain(grant.part.map(|(core, _)| core));
            return cores.map(Place::Core).collect();
        }
        let links = task.links.lock();
        let flight = links.rare.as_ref().and_then(|rare| rare.flight.as_ref());
        let Some(loan) = flight.and_then(|flight| flight.loan.as_ref()) else {
            return SmallVec::new();
        };
        let mut devices = loan.lent.iter();
        let members = set_of(task, loan.alternative).members.iter();
        // Without workers all cores are one thread's, and cores are told apart by their numbers alone.
        let mut numbers = 0..;
        let place = |member: &gang::Member| {
            if member.is_core() {
                let number = numbers.next().expect("there is always another number");
                return Some(Place::Core(cores.next().unwrap_or(number)));
            }
            let lent = devices.next()?;
            Some(Place::Device(lent.device, lent.stream?))
        };
        members.filter_map(place).collect()
    }

    /// The devices of the task that runs on this thread, each with its stream, in the set's order.
    pub fn lent(&self) -> SmallVec<[(DeviceId, Stream); 2]> {
        match self.current() {
            Some((task, _)) => self.lent_to(&task),
            None => SmallVec::new(),
        }
    }

    pub(super) fn lent_to(&self, task: &Task<D>) -> SmallVec<[(DeviceId, Stream); 2]> {
        let links = task.links.lock();
        let grant = links
            .rare
            .as_ref()
            .and_then(|rare| rare.flight.as_ref()?.loan.as_ref());
        grant.map_or_else(SmallVec::new, |grant| {
            grant
                .lent
                .iter()
                .filter_map(|lent| Some((lent.device, lent.stream?)))
                .collect()
        })
    }

    /// The flag of a new task with these options.
    pub(super) fn ahead(&self, options: &Options) -> u32 {
        match &self.devices {
            Some(devices) if devices.runahead != 0 => {
                // The body of a set with cores reads on the host.
                let sets = match (&options.mapping, &options.devices) {
                    (Some(mapping), _) => mapping.choices().sets(),
                    (None, Some(sets)) => sets,
                    (None, None) => return 0,
                };
                if !sets.is_empty() && sets.iter().all(|set| set.cores() == 0) {
                    AHEAD
                } else {
                    0
                }
            }
            _ => 0,
        }
    }

    /// That the sets of a task that is spawned can be served; see [`check_devices`](Self::check_devices).
    pub(super) fn check_spawn(&self, sets: &Arc<[Alternative]>) -> Result<(), SpawnError> {
        let is_known = |known: &Option<(u32, Arc<[Alternative]>)>| {
            let same = |(engine, known): &(u32, _)| *engine == self.id && Arc::ptr_eq(known, sets);
            known.as_ref().is_some_and(same)
        };
        // A thread that ends may still spawn.
        let known = CHECKED.try_with(|known| is_known(&known.borrow()));
        if known.unwrap_or(false) {
            return Ok(());
        }
        self.check_devices(sets)?;
        let news = Some((self.id, Arc::clone(sets)));
        let _ = CHECKED.try_with(|known| known.replace(news));
        Ok(())
    }

    pub(super) fn check_devices(&self, alternatives: &[Alternative]) -> Result<(), SpawnError> {
        let capacities = match &self.devices {
            Some(devices) => &devices.capacities[..],
            None => &[],
        };
        // Of cores the ledger knows nothing, so it may be offered no set that has too many.
        let wanted = alternatives.iter().map(Alternative::cores).max();
        if let Some(wanted) = wanted.filter(|wanted| *wanted > self.cores) {
            let reason = Reason::TooMany(Kind::Cpu, wanted, self.cores);
            return Err(SpawnError::Devices(vec![reason.to_string()]));
        }
        gang::check(capacities, alternatives).map_err(|reasons| {
            SpawnError::Devices(reasons.iter().map(ToString::to_string).collect())
        })
    }

    fn post(self: &Arc<Self>, letter: Letter<D>) {
        if !self.is_gathered() {
            return self.send_letters(std::iter::once(letter));
        }
        let letter = match letter {
            Letter::Ask(..) => match keep(letter) {
                None => return,
                Some(letter) => letter,
            },
            letter => letter,
        };
        self.devices().mail.push(letter);
    }

    /// Reads letters of this thread, or has them read.
    fn send_letters(self: &Arc<Self>, letters: impl Iterator<Item = Letter<D>>) {
        let devices = self.devices();
        if let Some(book) = devices.book.try_lock() {
            self.take_turns(book, letters);
        } else {
            letters.for_each(|letter| devices.mail.push(letter));
            fence(Ordering::SeqCst);
            self.take_turn();
        }
    }

    /// After letters of this thread that it kept, or put in without a try for the turn.
    pub(super) fn read_mail(self: &Arc<Self>) {
        let mut kept = take_kept();
        fence(Ordering::SeqCst);
        self.send_letters(kept.0.drain(..));
        give_back(kept);
        self.relieve_outside();
    }

    /// See the module's protocol.
    fn take_turn(self: &Arc<Self>) {
        if let Some(book) = self.devices().book.try_lock() {
            self.take_turns(book, std::iter::empty());
        }
    }

    /// As long as there are letters and nobody else has the turn. `own`: letters of the owner's, which need
    /// not go through the mailbox.
    fn take_turns(
        self: &Arc<Self>,
        book: Guard<'_, Book<D>>,
        mut own: impl Iterator<Item = Letter<D>>,
    ) {
        let devices = self.devices();
        let mut outbox = Outbox::default();
        let mut turn = Some(book);
        while let Some(mut book) = turn {
            let more = devices.rule(&mut book, &mut own, &mut outbox);
            drop(book);
            self.send(&mut outbox);
            fence(Ordering::SeqCst);
            turn = if more || !devices.mail.is_empty() {
                devices.book.try_lock()
            } else {
                None
            };
        }
    }

    fn send(self: &Arc<Self>, outbox: &mut Outbox<D>) {
        for (task, grant) in outbox.granted.drain(..) {
            self.dispatch(task, grant);
        }
        for (resumer, grant) in outbox.resumed.drain(..) {
            match resumer {
                Resumer::Task(task) => self.dispatch(task, grant),
                Resumer::Thread(answer) => {
                    if let Some(grant) = answer.accept(grant) {
                        self.lend_again(&answer, &grant);
                    }
                    Self::arrive(Some(self), &answer.latch, false);
                }
            }
        }
        for task in outbox.stranded.drain(..) {
            let error = self.stranded(&task);
            self.send_elsewhere(task, error);
        }
        outbox.unwanted.clear();
        if let Some(task) = outbox.starved.take() {
            let error = self.starved(&task);
            self.send_elsewhere(task, error);
            self.relieve();
        }
    }

    /// Why a task gets no memory: those who have it wait for tasks that can get none.
    fn starved(&self, task: &Task<D>) -> DeviceError {
        let options = task.options().expect("a task on devices has options");
        let set = sets_of(options)
            .first()
            .expect("a request has an alternative");
        let device = named_in(set).unwrap_or(self.devices().capacities[0].id);
        DeviceError::OutOfMemory {
            device,
            wanted: set.memory,
            free: 0,
        }
    }

    /// If nothing moves, and bodies that wait keep memory that others need first, fails one of those.
    /// What is not spawned yet may still help, so that is left to the runtime's end.
    pub(super) fn relieve(self: &Arc<Self>) {
        let keeping = |devices: &Devices<D>| devices.keeping.load(Ordering::SeqCst) != 0;
        if self.devices.as_ref().is_some_and(keeping) && self.is_stuck() && !self.has_missing() {
            self.post(Letter::Stuck);
            // Others may have left their letters to this turn, and summoned before it granted them.
            self.summon();
        }
    }

    /// Why no device is left for a task.
    fn stranded(&self, task: &Task<D>) -> DeviceError {
        let options = task.options().expect("a task on devices has options");
        let named = sets_of(options).iter().find_map(named_in);
        let device = named.unwrap_or(self.devices().capacities[0].id);
        DeviceError::Lost(
            device,
            Arc::from("no set of devices that the task may use is left"),
        )
    }

    /// Asks for the devices of a task that is ready: for those sets, or for all that it says.
    pub(super) fn ask_for_devices(
        self: &Arc<Self>,
        task: TaskRef<D>,
        sets: Option<Arc<[Alternative]>>,
    ) {
        let (loan, behind) = {
            let links = task.links.lock();
            // Most have none yet: its memory is of the thread that dispatches the task.
            match links.rare.as_ref().and_then(|rare| rare.flight.as_ref()) {
                Some(flight) => (
                    flight.loan.as_ref().map(|loan| loan.id),
                    Behind::from_slice(&flight.behind),
                ),
                None => (None, Behind::new()),
            }
        };
        self.post(match loan {
            // It waited, and has its devices.
            Some(id) => Letter::Resumed(id, Resumer::Task(task)),
            None => {
                let request = self.request(&task, behind, sets);
                Letter::Ask(task, request)
            }
        });
        if !self.is_gathered() {
            self.relieve_outside();
        }
    }

    /// A thread that is no worker has asked for devices.
    fn relieve_outside(self: &Arc<Self>) {
        if !self.is_worker() {
            self.relieve();
        }
    }

    /// Asks for all sets of devices of a task that the ledger has just given back.
    pub(super) fn ask_again(&self, task: TaskRef<D>) {
        let behind = Behind::from_slice(&task.links.lock().flight().behind);
        let request = self.request(&task, behind, None);
        // Who has the turn looks at the mail once more.
        self.devices().mail.push(Letter::Ask(task, request));
    }

    /// What a task asks the ledger for: for these sets, or for all that it says.
    fn request(&self, task: &Task<D>, prefer: Behind, sets: Option<Arc<[Alternative]>>) -> Request {
        let options = task.options().expect("a task on devices has options");
        let estimates = options.mapping.as_ref().map(|mapping| mapping.estimates());
        let alternatives = sets.unwrap_or_else(|| Arc::clone(sets_of(options)));
        let is_open = alternatives.len() > 1
            || (alternatives.iter().flat_map(|set| &set.members))
                .any(|member| *member == gang::Member::Any(Kind::Gpu));
        let transfers = if is_open && self.devices().capacities.len() > 1 {
            self.transfers_of(task)
        } else {
            Box::default()
        };
        Request {
            alternatives,
            estimates: estimates.unwrap_or_default(),
            priority: options.priority,
            prefer,
            transfers,
        }
    }

    /// Whether nothing that a task comes after is on its way on devices, but for what it ran ahead of.
    pub(super) fn may_leave_devices(&self, task: &Task<D>) -> bool {
        let (behind, is_ahead) = {
            let mut links = task.links.lock();
            let flight = links.flight();
            (flight.behind.clone(), flight.is_ahead())
        };
        // What is on its way else is of an attempt of its own that failed.
        is_ahead || (behind.iter()).all(|event| self.devices().is_complete(*event))
    }

    // ---- what devices have before them ------------------------------------------------------

    /// Somebody wants to know from now on.
    pub(super) fn gauge_devices(&self) {
        if let Some(devices) = &self.devices {
            devices.gauged.store(true, Ordering::Relaxed);
        }
    }

    /// The devices that have so much memory.
    pub(super) fn devices_with(&self, memory: u64) -> impl Iterator<Item = DeviceId> {
        let all = self.devices.iter().flat_map(|it| it.capacities.iter());
        all.filter(move |it| it.memory >= memory).map(|it| it.id)
    }

    /// A task that a policy sent to these devices waits, or does no more; it is estimated to run for so
    /// many nanoseconds.
    pub(super) fn count_waiting(&self, places: u64, estimate: u64, waits: bool) {
        for (index, gauge) in self.devices().gauges.iter().enumerate() {
            if places >> index & 1 == 0 {
                continue;
            }
            if waits {
                gauge.waiting.fetch_add(1, Ordering::Relaxed);
                gauge.promised.fetch_add(estimate, Ordering::Relaxed);
            } else {
                gauge.waiting.fetch_sub(1, Ordering::Relaxed);
                gauge.promised.fetch_sub(estimate, Ordering::Relaxed);
            }
        }
    }

    /// When these devices are free, in nanoseconds from now, and how many tasks they have before them.
    pub(super) fn load_of(&self, devices: &[DeviceId]) -> (u64, u32) {
        let gauges = devices
            .iter()
            .map(|id| &self.devices().gauges[usize::from(id.index())]);
        gauges.fold((0, 0), |(time, tasks), gauge| {
            let waiting = gauge.waiting.load(Ordering::Relaxed);
            let granted = gauge.granted.load(Ordering::Relaxed);
            let promised = gauge.promised.load(Ordering::Relaxed);
            let ahead = gauge.ahead.load(Ordering::Relaxed);
            (
                time.max(ahead.saturating_add(promised)),
                tasks.max(waiting + granted),
            )
        })
    }

    /// When a set of devices is free and has a task's data, in nanoseconds from now. `transfers`: what that
    /// takes on each device.
    pub(super) fn wait_for_devices(&self, set: &Alternative, transfers: &[Transfer]) -> u64 {
        let devices = self.devices();
        let width = set.members.len() as u64;
        let ahead = |id: DeviceId| {
            let index = usize::from(id.index());
            let transfer = transfers.get(index).map_or(0, |it| it.of(width).time);
            let ahead = devices.gauges[index].ahead.load(Ordering::Relaxed);
            ahead.saturating_add(transfer)
        };
        let named = |id: DeviceId| set.members.contains(&gang::Member::Device(id));
        let all = devices.capacities.iter().map(|capacity| capacity.id);
        let mut others: SmallVec<[u64; 8]> =
            all.clone().filter(|&id| !named(id)).map(ahead).collect();
        others.sort_unstable();
        let any = |member: &&gang::Member| matches!(member, gang::Member::Any(Kind::Gpu));
        let others = others
            .into_iter()
            .take(set.members.iter().filter(any).count());
        let free = all.filter(|&id| named(id)).map(ahead).chain(others).max();
        let count = devices.gauges.len().max(1) as u64;
        free.unwrap_or(0) + devices.backlog.load(Ordering::Relaxed) / count
    }

    // ---- dispatch ---------------------------------------------------------------------------

    fn dispatch(self: &Arc<Self>, task: TaskRef<D>, mut grant: Grant) {
        self.make_streams(&mut grant);
        if grant.lent.iter().any(|lent| lent.stream.is_none())
            && let Some(mapping) = task.mapping()
            && mapping.may_turn_back()
        {
            return self.turn_back(task, &grant);
        }
        let places = grant.lent.iter().fold(0, |all, it| all | bit(it.device));
        self.settle_choice(&task, grant.alternative, places);
        let events = self.plan_data(&task, &grant);
        if let Some(witness) = &self.devices().witness {
            for stream in grant.lent.iter().filter_map(|lent| lent.stream) {
                witness.log(DeviceEvent::Lent(stream), task.id);
            }
        }
        let cores = set_of(&task, grant.alternative).cores();
        {
            let mut links = task.links.lock();
            let flight = links.flight();
            flight.places = places;
            flight.loan = Some(grant);
            flight.paused = false;
        }
        // Who cancelled it since it was granted may have found no loan. Whoever does so from here on gives it
        // back.
        if task.is_done() {
            self.return_loan(&task);
        } else if events.is_empty() {
            self.board_with(task, cores);
        } else {
            self.hold_until(&task, events);
        }
    }

    /// A task that has its devices and its data is queued for a worker, or for its cores.
    pub(super) fn board(self: &Arc<Self>, task: TaskRef<D>) {
        let cores = {
            let links = task.links.lock();
            let flight = links.rare.as_ref().and_then(|rare| rare.flight.as_ref());
            let loan = flight.and_then(|flight| flight.loan.as_ref());
            loan.map_or(0, |loan| set_of(&task, loan.alternative).cores())
        };
        self.board_with(task, cores);
    }

    /// The same of one whose set has so many cores.
    fn board_with(self: &Arc<Self>, task: TaskRef<D>, cores: usize) {
        // One core is what every worker has.
        if cores > 1 && self.workers != 0 {
            let need = Need::Cores(u16::try_from(cores).expect("fewer cores than 65,536"));
            let idle = !self.queues.has_work();
            let todo = self.places.push_holder(task, need, idle);
            self.carry_out(todo);
            return;
        }
        let priority = task.options().map_or(0, |options| options.priority);
        // In the order of the grants: were this thread's own queue first, one device's tasks would run
        // as far ahead as they may while others wait for their first.
        self.enqueue_in_order(task, priority);
    }

    /// A task with a choice was granted a device that turns out to be lost: gives the grant back, and lets
    /// it choose again.
    #[cold]
    fn turn_back(self: &Arc<Self>, task: TaskRef<D>, grant: &Grant) {
        let mut events: SmallVec<[Option<Event>; 2]> = SmallVec::new();
        for lent in &grant.lent {
            let Some(stream) = lent.stream else {
                self.post(Letter::Lost(lent.device));
                events.push(None);
                continue;
            };
            // What it took over is not free before its events.
            let device = self.devices().device(lent.device);
            let ordered = lent
                .waits
                .iter()
                .try_for_each(|wait| device.follow(stream, *wait));
            events.push(ordered.and_then(|()| device.record(stream)).ok());
        }
        let pending = events.clone();
        self.post(Letter::Launched(grant.id, events, Over::default()));
        for event in pending.into_iter().flatten() {
            self.tell_when_complete(event);
        }
        self.choose_again(&task);
        self.ask_for_devices(task, None);
    }

    /// Makes the streams that a grant lacks. On a device that is lost there are none, and the body does
    /// not run.
    fn make_streams(&self, grant: &mut Grant) {
        for lent in &mut grant.lent {
            if lent.stream.is_none() {
                lent.stream = self.devices().device(lent.device).create_stream().ok();
            }
        }
    }

    /// The body of a task with a loan is about to run on this thread, which owns it: tells its streams
    /// what they have to wait for. False if it does not run, and the task has its outcome: a predecessor
    /// that it ran ahead of failed, or a device did.
    pub(crate) fn take_off(self: &Arc<Self>, task: &TaskRef<D>) -> bool {
        if let Some(root) = task.poisoned() {
            self.settle(task, Outcome::Failed(Failure::Dependency(root)));
            return false;
        }
        let ordered = match self.trouble_with_data(task) {
            Some(trouble) => Err(trouble),
            None => self.order_streams(task),
        };
        match ordered {
            Ok(()) => {
                self.begin_with_data(task);
                self.log_begun(task);
                self.mark_start(task);
                true
            }
            Err(error) => {
                self.note_loss(&error);
                self.settle(task, Outcome::Failed(Failure::Device(error)));
                false
            }
        }
    }

    /// Tells the streams of a task what they have to wait for.
    fn order_streams(&self, task: &TaskRef<D>) -> Result<(), DeviceError> {
        let (lent, behind) = {
            let mut links = task.links.lock();
            let flight = links.flight();
            let Some(loan) = &mut flight.loan else {
                return Ok(());
            };
            if let [lent] = &mut loan.lent[..]
                && let Some(stream) = lent.stream
            {
                let events = flight.behind.iter().chain(&flight.after);
                if (events.chain(&lent.waits)).all(|event| event.stream == stream) {
                    // The order is there by itself, as in a chain.
                    flight.behind.clear();
                    flight.after.clear();
                    lent.waits.clear();
                    return Ok(());
                }
            }
            let waits = |lent: &gang::Lent| lent.stream.is_none() || !lent.waits.is_empty();
            if flight.behind.is_empty() && flight.after.is_empty() && !loan.lent.iter().any(waits) {
                return Ok(());
            }
            let lent: SmallVec<[_; 2]> = loan
                .lent
                .iter_mut()
                .map(|lent| (lent.device, lent.stream, std::mem::take(&mut lent.waits)))
                .collect();
            let mut behind = std::mem::take(&mut flight.behind);
            behind.append(&mut flight.after);
            (lent, behind)
        };
        // One that is lost keeps none of the others from being told, since what is given back there
        // is behind what they were told.
        let mut result = Ok(());
        for (device, stream, waits) in lent {
            let Some(stream) = stream else {
                result = Err(no_stream(device));
                continue;
            };
            let device = self.devices().device(device);
            let told = waits
                .into_iter()
                .chain(behind.iter().copied())
                // On the same stream the order is there by itself.
                .filter(|event| event.stream != stream)
                // Who depends on what fails learns of it from the graph.
                .try_for_each(|event| device.follow(stream, event));
            result = result.and(told);
        }
        result
    }

    /// The streams of a task are in order: its body begins or goes on.
    fn log_begun(&self, task: &Task<D>) {
        if let Some(witness) = &self.devices().witness {
            witness.log(DeviceEvent::Begun, task.id);
        }
    }

    /// The body of a task has these cores now, or again.
    pub(crate) fn log_cores(&self, task: &Task<D>, cores: &places::Grant) {
        if let Some(witness) = self.witness_of_cores(task) {
            for &core in &cores.cores {
                let core = Stream {
                    device: HOST,
                    number: core.into(),
                };
                witness.log(DeviceEvent::Lent(core), task.id);
            }
        }
    }

    /// The body of a task is about to wait and to give its cores up.
    pub(crate) fn log_cores_left(&self, task: &Task<D>) {
        if let Some(witness) = self.witness_of_cores(task) {
            witness.log(DeviceEvent::Left, task.id);
        }
    }

    /// What logs which cores a task has: of one with cores and devices, if that is traced.
    fn witness_of_cores(&self, task: &Task<D>) -> Option<&Witness> {
        let witness = self.devices.as_ref()?.witness.as_ref()?;
        if self.workers == 0 || !is_on_devices(task) {
            return None;
        }
        let links = task.links.lock();
        let loan = links.rare.as_ref()?.flight.as_ref()?.loan.as_ref()?;
        let has_cores = set_of(task, loan.alternative).cores() != 0;
        has_cores.then_some(witness)
    }

    /// Where the work of a task on its streams ends now, device by device; none on one that is lost.
    fn record_events(&self, grant: &Grant) -> (SmallVec<[Option<Event>; 2]>, Option<DeviceError>) {
        let mut failure = None;
        let events = grant
            .lent
            .iter()
            .map(|lent| {
                let device = self.devices().device(lent.device);
                // Lost while the body waited: what it enqueued since, if it did, is nowhere.
                let Some(stream) = lent.stream else {
                    failure = Some(no_stream(lent.device));
                    return None;
                };
                // Of a body that never began: what it was granted may be in flight elsewhere, and is
                // given on behind that.
                let waits = lent.waits.iter();
                let event = waits
                    .filter(|event| event.stream != stream)
                    .try_for_each(|event| device.follow(stream, *event))
                    .and_then(|()| device.record(stream));
                event.map_err(|error| failure = Some(error)).ok()
            })
            .collect();
        (events, failure)
    }

    /// Takes what a task has of the devices, and of the data there.
    fn take_loan(task: &Task<D>, may: impl FnOnce(&Flight<D>) -> bool) -> Option<Loan> {
        let mut links = task.links.lock();
        let flight = links.rare.as_mut()?.flight.as_mut()?;
        if may(flight) {
            Some((flight.loan.take()?, flight.holding.take()))
        } else {
            None
        }
    }

    /// The same of one whose body ended for good, and whether all that it ran ahead of is done, and well.
    fn take_last_loan(task: &Task<D>) -> (Option<Loan>, bool) {
        let mut links = task.links.lock();
        let rare = links.rare.as_mut();
        let known = rare.and_then(|rare| Some((rare.poison.is_none(), rare.flight.as_mut()?)));
        let Some((well, flight)) = known else {
            return (None, false);
        };
        let loan = flight.loan.take();
        let loan = loan.map(|loan| (loan, flight.holding.take()));
        (loan, well && !flight.is_ahead())
    }

    /// Gives a loan back with what is held of data, if the body does not only pause, behind what was put on
    /// its streams; tells where that ends and is not complete.
    fn hand_in(
        self: &Arc<Self>,
        grant: &Grant,
        holding: Option<Box<Holding>>,
        pause: bool,
    ) -> (Events, Option<DeviceError>) {
        let (events, mut failure) = self.record_events(grant);
        // Before the ledger gives the memory to somebody else.
        self.let_go_of_data(holding, &events);
        let mut pending = Events::new();
        let mut over = Over::default();
        for (place, event) in events.iter().enumerate() {
            let Some(event) = *event else { continue };
            match self
                .devices()
                .device(event.stream.device)
                .is_complete(event)
            {
                Ok(true) => over.complete |= 1 << place,
                Ok(false) => pending.push(event),
                Err(error) => {
                    over.failed |= 1 << place;
                    failure = Some(error);
                }
            }
        }
        if !pause {
            self.end_together(grant, &pending);
        }
        self.post(if pause {
            Letter::Paused(grant.id, events, over)
        } else {
            Letter::Launched(grant.id, events, over)
        });
        if let Some(error) = &failure {
            self.note_loss(error);
        }
        (pending, failure)
    }

    /// What libraries allocated for a body on a device's stream goes back to their pools for that stream
    /// when the body drops it, though another stream of the set may use it still. So whoever has the stream
    /// next comes after all of the set. Virtual devices' memory knows who uses it.
    fn end_together(&self, grant: &Grant, pending: &[Event]) {
        if grant.lent.len() < 2 || self.devices().machine.as_virtual().is_some() {
            return;
        }
        for stream in grant.lent.iter().filter_map(|lent| lent.stream) {
            let others = pending.iter().filter(|event| event.stream != stream);
            for event in others {
                // A device that is lost gives its streams to nobody.
                let _ = self.devices().device(stream.device).follow(stream, *event);
            }
        }
    }

    /// Gives back what a task has of the devices: no body uses it any more. False if it has nothing.
    #[cold]
    pub(crate) fn return_loan(self: &Arc<Self>, task: &Task<D>) -> bool {
        // What paused is about to have its share again, and comes back here then.
        let loan = Self::take_loan(task, |flight| !flight.paused);
        let has = loan.is_some();
        if let Some((grant, holding)) = loan {
            self.hand_back(&grant, holding, false);
        }
        has
    }

    /// As [`hand_in`](Self::hand_in), where nobody but the ledger waits for what is not complete.
    fn hand_back(
        self: &Arc<Self>,
        grant: &Grant,
        holding: Option<Box<Holding>>,
        pause: bool,
    ) -> Events {
        let (pending, _) = self.hand_in(grant, holding, pause);
        for event in &pending {
            self.tell_when_complete(*event);
        }
        pending
    }

    /// The attempt of a task on devices ended, and another one follows: after all that this one put on
    /// its streams.
    pub(super) fn put_off(self: &Arc<Self>, task: &TaskRef<D>) {
        if let Some((grant, holding)) = Self::take_loan(task, |_| true) {
            let pending = self.hand_back(&grant, holding, false);
            task.links.lock().flight().behind = pending;
        }
    }

    /// Tells the ledger when an event is complete; until then something moves, though perhaps no task is
    /// launched that would say so.
    fn tell_when_complete(self: &Arc<Self>, event: Event) {
        self.elsewhere.fetch_add(1, Ordering::SeqCst);
        let engine = Arc::clone(self);
        self.devices().device(event.stream.device).when_complete(
            event,
            Box::new(move |result| {
                engine.told(|| {
                    if let Err(error) = &result {
                        engine.note_failure(event, error);
                    }
                    engine.post(Letter::Landed(event));
                    engine.elsewhere.fetch_sub(1, Ordering::SeqCst);
                });
            }),
        );
    }

    /// Lets a task that was just published run ahead of those of its predecessors, named ones and those
    /// by accesses, that were launched before it was linked to them; says how many links that were.
    #[inline]
    pub(super) fn catch_up(
        &self,
        task: &TaskRef<D>,
        dependencies: &[TaskRef<D>],
        before: &[TaskRef<D>],
    ) -> u32 {
        if self.devices.is_none() || !task.state.load().has(AHEAD) {
            return 0;
        }
        let mut count = 0;
        for dependency in dependencies.iter().chain(before) {
            if dependency.state.load().has(LAUNCHED) && self.owns(dependency) {
                let (events, links) = dependency.let_ahead(|next| Arc::ptr_eq(next, task));
                for (next, inherits) in &links {
                    next.go_behind(&events, *inherits);
                }
                count += u32::try_from(links.len()).expect("fewer than 2^32 predecessors");
            }
        }
        count
    }

    /// The body of a task on devices ended for good, and `outcome` is what the task comes to unless
    /// its work on the devices fails.
    pub(super) fn launch_off(self: &Arc<Self>, task: &TaskRef<D>, mut outcome: Outcome<D>) {
        let _gathering = self.gather();
        // Before anybody can hear of the launch: nobody may take the engine for quiet meanwhile.
        self.elsewhere.fetch_add(1, Ordering::SeqCst);
        let (loan, follows) = Self::take_last_loan(task);
        let (pending, failure) = match loan {
            Some((grant, holding)) => {
                self.mark_end(task, &grant);
                self.hand_in(&grant, holding, false)
            }
            // It was to be repeated, and was cancelled: its work is as far as it was then.
            None => (std::mem::take(&mut task.links.lock().flight().behind), None),
        };
        if let (Some(error), Outcome::Value(_)) = (failure, &outcome) {
            outcome = Outcome::Failed(Failure::Device(error));
        }
        if pending.is_empty() && follows {
            // It is done at once, and nobody need run ahead of it.
            self.settle(task, outcome);
            self.elsewhere.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        let leads = !pending.is_empty()
            && matches!(outcome, Outcome::Value(_))
            && task.options().is_none_or(|options| options.retries == 0);
        task.launch(outcome, &pending, leads);
        self.lead(task, &pending, leads);
        // The body itself.
        self.work_off_first(landed(task, None));
    }

    /// A task was launched, and its work ends with these events: lets dependents run ahead, if `leads`.
    pub(super) fn lead(self: &Arc<Self>, task: &TaskRef<D>, pending: &[Event], leads: bool) {
        if leads {
            let (_, ahead) = task.let_ahead(|next| next.state.load().has(AHEAD) && self.owns(next));
            for (next, inherits) in ahead {
                next.go_behind(pending, inherits);
                self.release(&next, 1);
            }
        }
        for &event in pending {
            self.when_complete(task, event);
        }
    }

    fn when_complete(self: &Arc<Self>, task: &TaskRef<D>, event: Event) {
        let engine = Arc::clone(self);
        let task = Arc::clone(task);
        self.devices().device(event.stream.device).when_complete(
            event,
            Box::new(move |result| {
                engine.told(|| {
                    let failure = result.err();
                    if let Some(error) = &failure {
                        engine.note_failure(event, error);
                    }
                    engine.post(Letter::Landed(event));
                    engine.work_off_first(landed(&task, failure));
                });
            }),
        );
    }

    /// The last part of a task is complete that was not, though it is not launched.
    pub(super) fn go_on(
        self: &Arc<Self>,
        task: TaskRef<D>,
        landed: Landed,
        worklist: &mut Vec<Settled<D>>,
    ) {
        match landed {
            Landed::Free => self.let_go(task, worklist),
            Landed::Past => self.turn_has_come(&task, worklist),
            Landed::Nothing | Landed::Done => {}
        }
    }

    pub(super) fn note_loss(self: &Arc<Self>, error: &DeviceError) {
        if let DeviceError::Lost(device, _) = error {
            self.devices().transfers.lose(*device);
            self.post(Letter::Lost(*device));
        }
    }

    /// Work before the event failed.
    fn note_failure(self: &Arc<Self>, event: Event, error: &DeviceError) {
        self.note_loss(error);
        self.post(Letter::Failed(event.stream));
    }

    /// A task that was launched, or is one on devices, has its outcome, and that was its word before: gives
    /// back what it has left.
    pub(super) fn arrived(self: &Arc<Self>, task: &Task<D>, before: Snapshot) {
        let had = self.return_loan(task);
        if before.has(LAUNCHED) {
            self.elsewhere.fetch_sub(1, Ordering::SeqCst);
        } else if !had && before.has(CANCELLED) {
            // It waited for devices, perhaps, and others behind it.
            self.post(Letter::Withdrawn);
        }
    }

    /// Logs nothing any more of what devices see, once all that happened so far is logged.
    pub(super) fn dismiss_witness(self: &Arc<Self>) {
        let Some(devices) = &self.devices else { return };
        if let Some(witness) = &devices.witness {
            // Who told of the last completion may have the turn still. And nobody waits for what a body left
            // when it began to wait, if its task failed meanwhile: in virtual time that happens when somebody
            // lets it.
            while self.elsewhere.load(Ordering::SeqCst) != 0 && self.unfinished() == 0 {
                if !self.advance_time() {
                    self.domain.blocking(&mut yield_now);
                }
            }
            witness.leave();
        }
    }

    // ---- waiting ----------------------------------------------------------------------------

    /// The body of `task` is about to wait: gives its share of the devices back.
    pub(crate) fn pause(self: &Arc<Self>, task: &Task<D>) {
        if !is_on_devices(task) {
            return;
        }
        if let Some(mapping) = task.mapping() {
            mapping.note(DISTURBED);
        }
        let grant = {
            let mut links = task.links.lock();
            let flight = links.flight();
            flight.paused = flight.loan.is_some();
            flight.loan.clone()
        };
        if let Some(grant) = grant {
            self.hand_back(&grant, None, true);
        }
    }

    /// A body that cannot use the share that it asked for, and was given, lends it again.
    fn lend_again(self: &Arc<Self>, answer: &Answer<D>, grant: &Grant) {
        self.hand_back(grant, None, true);
        // After the letter: who sees this asks for it anew.
        *answer.share.lock() = Share::Lent;
    }

    /// A body above one that asked for its share again, on the same stack, is about to wait: the one
    /// below cannot use its share, and lends it. Whether it did so only now.
    pub(crate) fn withdraw(self: &Arc<Self>, answer: &Answer<D>) -> bool {
        let grant = {
            let mut share = answer.share.lock();
            match std::mem::replace(&mut *share, Share::Withdrawn) {
                Share::Asked => return true,
                Share::Has(grant) => grant,
                before @ (Share::Withdrawn | Share::Lent) => {
                    *share = before;
                    return false;
                }
            }
        };
        self.lend_again(answer, &grant);
        true
    }

    /// The wait above it is over. If the share came meanwhile, it is asked for when the body below is
    /// the uppermost again.
    pub(crate) fn claim_again(answer: &Answer<D>) {
        let mut share = answer.share.lock();
        if let Share::Withdrawn = *share {
            *share = Share::Asked;
        }
    }

    /// Blocks, with `block`, until the body of `task`, which [paused](Engine::pause) on this thread, has
    /// its share again. If a device failed meanwhile, the body hears of it when it uses the device.
    pub(crate) fn regain(
        self: &Arc<Self>,
        task: &TaskRef<D>,
        block: impl Fn(&Arc<Answer<D>>, &Arc<Latch<D>>),
    ) {
        if !is_on_devices(task) {
            return;
        }
        let id = {
            let links = task.links.lock();
            let rare = links.rare.as_ref();
            rare.and_then(|rare| Some(rare.flight.as_ref()?.loan.as_ref()?.id))
        };
        let Some(id) = id else { return };
        let grant = loop {
            let answer = Arc::new(Answer::new());
            self.post(Letter::Resumed(id, Resumer::Thread(Arc::clone(&answer))));
            while !answer.latch.is_open() {
                block(&answer, &answer.latch);
            }
            answer.latch.give_up();
            if let Some(grant) = answer.take() {
                break grant;
            }
        };
        {
            let mut links = task.links.lock();
            let flight = links.flight();
            flight.loan = Some(grant);
            flight.paused = false;
        }
        if let Err(error) = self.order_streams(task) {
            self.note_loss(&error);
        }
        self.log_begun(task);
    }

    /// A body that was to be suspended is not: one that [paused](Engine::pause) goes on when it has its
    /// share again, true; any other at once.
    pub(crate) fn requeue(self: &Arc<Self>, task: &TaskRef<D>) -> bool {
        if !is_on_devices(task) {
            return false;
        }
        self.record(TraceEvent::Suspend, task);
        self.record(TraceEvent::Ready, task);
        let requeued = task.state.advance(Phase::Running, Phase::Ready).is_ok();
        debug_assert!(requeued, "this thread owns the task");
        self.ask_for_devices(Arc::clone(task), None);
        true
    }

    // ---- virtual time -----------------------------------------------------------------------

    /// Lets the next thing happen on a machine whose time is virtual, and all else that happens at that
    /// moment: the ledger hears of it together, since of what is free at the same time nothing is free
    /// first. False if nothing is left to happen, or time passes by itself.
    pub(crate) fn advance_time(self: &Arc<Self>) -> bool {
        let machine = self.devices.as_ref().map(|devices| &devices.machine);
        let Some(clock) = machine.and_then(|machine| Some(machine.as_virtual()?.clock())) else {
            return false;
        };
        let _gathering = self.gather();
        if !clock.advance() {
            return false;
        }
        while clock.is_due() && clock.advance() {}
        true
    }
}

/// That a device is lost, as it gives no stream.
pub(super) fn no_stream(device: DeviceId) -> DeviceError {
    DeviceError::Lost(device, Arc::from("it gives no stream"))
}

/// One of the parts of a launched task that were incomplete is complete, or failed. What the task comes
/// to, if that was the last one.
pub(super) fn landed<D: Domain>(
    task: &TaskRef<D>,
    failure: Option<DeviceError>,
) -> Option<Settled<D>> {
    match task.land(failure) {
        Landed::Done => Some(settled(task)),
        Landed::Nothing => None,
        Landed::Free | Landed::Past => unreachable!("a launched task is neither held nor over"),
    }
}

/// A task whose work is complete, and what it comes to.
pub(super) fn settled<D: Domain>(task: &TaskRef<D>) -> Settled<D> {
    if let Some(root) = task.poisoned() {
        task.divert(Outcome::Failed(Failure::Dependency(root)));
    }
    Settled {
        task: Arc::clone(task),
        ending: Ending::Landed,
    }
}
