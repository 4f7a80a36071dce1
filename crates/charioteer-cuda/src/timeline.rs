//! A stream's timeline on a driver's events, and who is told when it gets somewhere.
//!
//! # Positions
//!
//! What other libraries enqueue on a stream nobody tells us. So a position is not a count of entries
//! but of *records*: [`Timeline::record`] asks the stream whether it is idle. If it is, all up to its
//! last position is done, and that is the answer: an empty body costs one question, no event and no
//! notification. If not, the driver records one of its events, and the next position stands for it. Of
//! a stream, positions are done in order, so the one counter `done` answers for all that were before
//! it, without a lock and without the driver. The question costs half of what a launch does, and an event
//! a twentieth; so on a stream that was busy time and again most records go without it.
//!
//! # Who is told
//!
//! A position that somebody waits for ([`Timeline::watch`]) costs a notification. The timeline has a
//! thread for that, which starts with its first watch and sleeps in the driver until the first
//! watched event is complete, or on a condition while nothing is watched. When it wakes it tells of
//! all that is done by then, so that a chain of short tasks costs far fewer wake-ups than it has
//! tasks. As workers do, it looks for some microseconds before it sleeps, if no other such thread of the
//! process looks: to wake it costs whoever watches a system call, and the driver takes longer to wake a
//! thread than a short kernel takes. Where many positions are watched, or come fast, or others are recorded
//! meanwhile, it does neither: to ask the driver holds up whoever launches beside it, so it lets a few pass,
//! and then finds by bisection how far the stream got. Who waits for one among many hears of it so much later.
//!
//! An event for which a thread may sleep costs its recorder half of what a launch does. So only the first
//! few that are pending on a stream are such, and none while many in a row were told of without a sleep. For
//! others a thread sleeps a while, looks, and sleeps a small part of what it has waited, a millisecond at most:
//! it looks some twenty times as the time doubles, and is late by a few per cent.
//!
//! There is one a stream, and not one a device, because the driver lets a thread sleep for one
//! event only: with one thread, a short task beside a long one would be reported late, or the thread
//! would have to look around again and again. Host functions on the streams would need no threads of
//! ours; but they hold their stream up, run one after the other, and wake somebody as late as an
//! event does (54 µs against 52 for a kernel of 10 µs, launch included; see the design's decisions).
//!
//! # Launches that are put off
//!
//! Who may [defer](charioteer::machine::defer) leaves a launch here ([`Timeline::defer`]) instead of enqueueing
//! it, and a record behind it has a position and an event as any other, but the event is *open*: it is
//! recorded when all that is put off is enqueued together. That is so when it is as much as goes together, when
//! whoever put it off submits, and before anything else is enqueued on the stream, by whomever. Of an open
//! event the driver would say that it is done. So none leaves this module: who asks how far the stream
//! got is told that it is not there, and who wants the event to wait for has all enqueued first. The thread
//! that tells waits for open events as if nothing were watched, and is woken when they are recorded. If they
//! cannot be, they are lost, and the device too. In a graph an event is recorded beside the next kernel, and
//! may be so after later ones: so none of them is given to somebody else before all of the graph is done.
//!
//! Where launches that are put off go alone time and again, since somebody waits for each, on another
//! stream, say, most are not put off: it would take the lock for as long as a launch takes, and others wait
//! for that.
//!
//! # Who reads ahead
//!
//! What copies memory of the host before its turn on the stream, by the thread that enqueues it, has to know
//! that nobody is to write there before: [`Timeline::is_caught_up`] says whether all is done that the stream
//! was told to wait for. It is asked on few streams, so that others note nothing: from the first question
//! on the events that it waits for are kept, and one behind all that was before.
//!
//! # Skipped waits
//!
//! A stream is told to wait for what is not done, and for nothing else. What the host saw to be done, by an
//! event or since the stream was idle, is done for whatever it enqueues later, on any stream of any device:
//! the driver's answer is as good as an event for which the host slept. That holds of everything that was
//! enqueued before the event, or before the question whether the stream is idle; what is enqueued later on
//! the same stream has a later position, also where a record gave the last one again. So to free or to
//! reuse memory behind positions that are done needs no wait. A tool that knows of order only what streams
//! were told, as compute-sanitizer does for races in stream order, cannot see that, and reports such memory.
//!
//! # Loss
//!
//! [`Timeline::fail`] ends it: what is not done is lost, and who watches is told so. What was done
//! before stays so. A question that the driver answers with an error says so to its caller, who fails
//! all timelines of the device.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use charioteer::machine::Deferred;
use smallvec::SmallVec;

/// What a timeline needs of a stream. A question about an event that is complete may cost more than
/// one about an event that is not.
pub(crate) trait Lane: Send + Sync + Sized + 'static {
    type Event: Send + Sync + 'static;
    type Fault;
    /// What is called once of who waits for a position.
    type Call: Send + 'static;
    /// What may be put off.
    type Launch: Send + 'static;
    /// How many go together.
    const MOST: usize;

    /// Whether all that is enqueued is done.
    fn is_idle(&self) -> Result<bool, Self::Fault>;
    /// An event behind all that is enqueued; one for which a thread may sleep is dearer.
    fn record(&self, sleeps: bool) -> Result<Self::Event, Self::Fault>;
    /// Such an event that is not recorded yet.
    fn event(&self, sleeps: bool) -> Result<Self::Event, Self::Fault>;
    /// Enqueues what was put off, in order, each with its event behind it.
    fn submit(&self, launches: &[PutOff<Self>]) -> Result<(), Self::Fault>;
    fn may_sleep(&self, event: &Self::Event) -> bool;
    fn is_done(&self, event: &Self::Event) -> Result<bool, Self::Fault>;
    /// Sleeps until an event is done for which one may.
    fn block(&self, event: &Self::Event) -> Result<(), Self::Fault>;
    /// Tells who waited, in order and with no lock held.
    fn tell(&self, told: Vec<Told<Self::Call>>);
    /// A thread that tells of completions met an error: everybody is to hear of it.
    fn failed(&self, fault: Self::Fault);
    /// The same of another thread, which nobody may call back.
    fn refused(&self, fault: Self::Fault);
}

/// What was put off, and the event behind it.
pub(crate) type PutOff<L> = (<L as Lane>::Launch, Option<Arc<<L as Lane>::Event>>);

/// Who waited for a position, and whether it is done: else it is lost.
pub(crate) struct Told<C> {
    pub(crate) position: u64,
    pub(crate) done: bool,
    pub(crate) call: C,
}

/// For how long a thread that tells looks before it sleeps.
const LOOK: Duration = Duration::from_micros(40);
/// How often it asks the driver meanwhile.
const EVERY: Duration = Duration::from_micros(3);

/// Where so many are watched, or were told of in a while so long as one looks, the thread that tells lets
/// some pass for so long before it asks the driver.
const MANY: u64 = 8;
const FAST: usize = 4;
const LET_PASS: Duration = Duration::from_micros(20);

/// So many pending positions of a stream have events for which a thread may sleep, unless so many before them
/// needed no sleep.
const FEW: usize = 2;
const QUICK: u32 = 32;
/// After so many records that found the stream busy it is asked at each so manieth alone.
const BUSY: u32 = 4;
const AGAIN: u32 = 16;
/// After so many launches that were put off and went alone nevertheless the next few are not put off.
const ALONE: u32 = 4;
/// A thread that may not sleep for its event sleeps this part of what it has waited before it looks again,
/// and so long at most.
const PART: u32 = 32;
const NAP: Duration = Duration::from_millis(1);

/// How fast a stream gets on, as the thread that tells sees it.
struct Pace {
    since: Instant,
    told: usize,
}

impl Pace {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            told: 0,
        }
    }

    fn count(&mut self, told: usize) {
        if self.since.elapsed() > 2 * LOOK {
            *self = Self::new();
        }
        self.told += told;
    }

    fn is_fast(&self) -> bool {
        self.told >= FAST && self.since.elapsed() < 4 * LOOK
    }
}

/// Whether a thread looks.
static LOOKING: AtomicBool = AtomicBool::new(false);

/// Looks until something is so, or for a while, or not at all if another thread does; whether it is so.
fn look(mut is_so: impl FnMut() -> bool) -> bool {
    if LOOKING.swap(true, Ordering::Acquire) {
        return false;
    }
    let (start, mut asked) = (Instant::now(), Duration::ZERO);
    let so = loop {
        let time = start.elapsed();
        if time >= asked {
            if is_so() {
                break true;
            }
            asked = time + EVERY;
        }
        if time > LOOK {
            break false;
        }
        std::thread::yield_now();
    };
    LOOKING.store(false, Ordering::Release);
    so
}

pub(crate) struct Timeline<L: Lane> {
    pub(crate) lane: L,
    /// The last position that was given.
    tail: AtomicU64,
    /// All up to here is done.
    done: AtomicU64,
    /// The position that was recorded last, if nobody has asked for it since: then it is not done.
    fresh: AtomicU64,
    /// Something was enqueued that is not done yet, as its enqueuer knows.
    busy: AtomicBool,
    /// Whether launches are put off.
    puts_off: AtomicBool,
    /// How many calls wait in the queue.
    watched: AtomicU64,
    /// How many were told since a thread had to sleep for one.
    quick: AtomicU32,
    /// Whether somebody asks if it is caught up, and what it waits for then.
    heeds: AtomicBool,
    awaited: Mutex<Vec<Arc<L::Event>>>,
    queue: Mutex<Queue<L>>,
    changed: Condvar,
    /// How often the thread that tells slept until an event was complete.
    notifications: AtomicU64,
}

struct Queue<L: Lane> {
    /// Those whose events were not done when somebody looked last, and those that somebody watches
    /// and was not told of.
    entries: VecDeque<Entry<L>>,
    /// What is to be enqueued, and the position before it.
    put_off: Vec<PutOff<L>>,
    enqueued: u64,
    /// How often in a row a launch was put off and went alone, and then how many were not put off.
    alone: u32,
    /// Events of positions that are done, and the position with which all is done that went with each.
    retired: VecDeque<(u64, Arc<L::Event>)>,
    /// How many records in a row have not found the stream idle.
    busy: u32,
    /// Whether the thread that tells has been started, and whether it is to be woken.
    told: bool,
    asleep: bool,
    /// What is not done is lost.
    lost: bool,
    closed: bool,
}

struct Entry<L: Lane> {
    position: u64,
    event: Arc<L::Event>,
    /// The position with which all is done that went together with it, if it was put off.
    together: Option<u64>,
    calls: SmallVec<[L::Call; 1]>,
}

impl<L: Lane> Queue<L> {
    /// Whether the event of a position is to be recorded still.
    fn is_open(&self, position: u64) -> bool {
        !self.put_off.is_empty() && position > self.enqueued
    }

    /// An entry is done and goes.
    fn retire(&mut self, entry: &Entry<L>) {
        if let Some(together) = entry.together {
            self.retired.push_back((together, Arc::clone(&entry.event)));
        }
    }

    /// All up to the position is done.
    fn release(&mut self, position: u64) {
        while self.retired.front().is_some_and(|it| it.0 <= position) {
            self.retired.pop_front();
        }
    }

    /// The first position that somebody watches, if its event is recorded.
    fn first_watched(&self) -> Option<(u64, Arc<L::Event>)> {
        let first = self.entries.iter().find(|it| it.is_watched())?;
        (!self.is_open(first.position)).then(|| (first.position, Arc::clone(&first.event)))
    }
}

impl<L: Lane> Entry<L> {
    fn is_watched(&self) -> bool {
        !self.calls.is_empty()
    }

    fn told(self, done: bool) -> impl Iterator<Item = Told<L::Call>> {
        let position = self.position;
        self.calls.into_iter().map(move |call| Told {
            position,
            done,
            call,
        })
    }
}

/// What is known of a position.
pub(crate) enum Reached<E> {
    Done,
    /// Not yet, when somebody looked last; the event is at it or behind it.
    Pending(Arc<E>),
    Lost,
}

impl<L: Lane> Timeline<L> {
    pub(crate) fn new(lane: L) -> Arc<Self> {
        Arc::new(Self {
            lane,
            tail: AtomicU64::new(0),
            done: AtomicU64::new(0),
            fresh: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            puts_off: AtomicBool::new(false),
            watched: AtomicU64::new(0),
            quick: AtomicU32::new(0),
            heeds: AtomicBool::new(false),
            awaited: Mutex::default(),
            queue: Mutex::new(Queue {
                entries: VecDeque::new(),
                put_off: Vec::new(),
                enqueued: 0,
                alone: 0,
                retired: VecDeque::new(),
                busy: 0,
                told: false,
                asleep: false,
                lost: false,
                closed: false,
            }),
            changed: Condvar::new(),
            notifications: AtomicU64::new(0),
        })
    }

    pub(crate) fn notifications(&self) -> u64 {
        self.notifications.load(Ordering::Relaxed)
    }

    /// The last position that was given.
    pub(crate) fn tail(&self) -> u64 {
        self.tail.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Queue<L>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Under the lock: all up to the position is done. What nobody watches is forgotten.
    fn reach(&self, queue: &mut Queue<L>, position: u64) {
        if position > self.done.load(Ordering::Relaxed) {
            // Who reads it sees what the device wrote, as the driver promised whoever asked it.
            self.done.store(position, Ordering::Release);
        }
        while let Some(first) = queue.entries.front()
            && first.position <= position
            && first.calls.is_empty()
        {
            let first = queue.entries.pop_front().expect("it was just there");
            queue.retire(&first);
        }
        queue.release(self.done.load(Ordering::Relaxed));
    }

    /// Something was enqueued just now, so that the next record need not ask whether the stream is idle.
    pub(crate) fn enqueued(&self) {
        self.busy.store(true, Ordering::Relaxed);
    }

    /// Puts a launch off; it comes back if that cannot be. What follows is a record.
    pub(crate) fn defer(&self, launch: L::Launch) -> Result<(), L::Launch> {
        let mut queue = self.lock();
        if queue.lost || queue.put_off.len() >= L::MOST {
            return Err(launch);
        }
        if queue.put_off.is_empty() {
            if queue.alone >= ALONE {
                queue.alone += 1;
                if queue.alone < ALONE + AGAIN {
                    return Err(launch);
                }
                // Twice: this one may be the last of some.
                queue.alone = ALONE - 2;
            }
            queue.enqueued = self.tail.load(Ordering::Relaxed);
            self.puts_off.store(true, Ordering::Release);
        }
        queue.put_off.push((launch, None));
        Ok(())
    }

    /// Enqueues what is put off. For whoever enqueues something else, too.
    #[inline]
    pub(crate) fn submit(&self) -> Result<(), L::Fault> {
        if self.puts_off.load(Ordering::Acquire) {
            self.submit_locked(&mut self.lock())
        } else {
            Ok(())
        }
    }

    fn submit_locked(&self, queue: &mut Queue<L>) -> Result<(), L::Fault> {
        if queue.put_off.is_empty() {
            return Ok(());
        }
        queue.alone = if queue.put_off.len() == 1 {
            queue.alone + 1
        } else {
            0
        };
        if !queue.lost {
            if let Err(fault) = self.lane.submit(&queue.put_off) {
                queue.lost = true;
                return Err(fault);
            }
            // What comes next on the stream begins when all of these are done.
            let next = self.tail.load(Ordering::Relaxed) + 1;
            let (enqueued, entries) = (queue.enqueued, queue.entries.iter_mut().rev());
            for entry in entries.take_while(|entry| entry.position > enqueued) {
                entry.together = Some(next);
            }
            if queue.asleep && queue.entries.iter().any(Entry::is_watched) {
                queue.asleep = false;
                self.changed.notify_one();
            }
        }
        queue.put_off.clear();
        self.puts_off.store(false, Ordering::Release);
        Ok(())
    }

    /// The position behind all that is enqueued or put off, and whether it is done.
    pub(crate) fn record(&self) -> Result<(u64, bool), L::Fault> {
        let mut queue = self.lock();
        let tail = self.tail.load(Ordering::Relaxed);
        let sleeps = queue.entries.len() < FEW && self.quick.load(Ordering::Relaxed) < QUICK;
        let count = queue.put_off.len();
        if let Some((_, behind)) = queue.put_off.last_mut() {
            if behind.is_some() {
                return Ok((tail, false));
            }
            let event = Arc::new(self.lane.event(sleeps)?);
            *behind = Some(Arc::clone(&event));
            let position = self.give(&mut queue, event);
            if count >= L::MOST {
                self.submit_locked(&mut queue)?;
            }
            return Ok((position, false));
        }
        let is_busy = self.busy.swap(false, Ordering::Relaxed)
            || (queue.busy >= BUSY && !queue.busy.is_multiple_of(AGAIN));
        if !is_busy && self.lane.is_idle()? {
            queue.busy = 0;
            self.reach(&mut queue, tail);
            queue.retired.clear();
            return Ok((tail, true));
        }
        queue.busy = queue.busy.wrapping_add(1);
        let event = Arc::new(self.lane.record(sleeps)?);
        Ok((self.give(&mut queue, event), false))
    }

    /// The next position, for an event.
    fn give(&self, queue: &mut Queue<L>, event: Arc<L::Event>) -> u64 {
        let position = self.tail.load(Ordering::Relaxed) + 1;
        self.tail.store(position, Ordering::Relaxed);
        self.fresh.store(position, Ordering::Relaxed);
        queue.entries.push_back(Entry {
            position,
            event,
            together: None,
            calls: SmallVec::new(),
        });
        position
    }

    /// A position of its own for something that was enqueued and that no event is behind.
    pub(crate) fn skip(&self) -> u64 {
        let queue = self.lock();
        debug_assert!(queue.put_off.is_empty(), "whoever enqueues submits before");
        let position = self.tail.load(Ordering::Relaxed) + 1;
        self.tail.store(position, Ordering::Relaxed);
        position
    }

    /// The stream was told to wait for an event.
    pub(crate) fn awaits(&self, event: &Arc<L::Event>) {
        if self.heeds.load(Ordering::Relaxed) {
            let mut awaited = self.lock_awaited();
            if awaited.len() >= 8 && awaited.len().is_power_of_two() {
                awaited.retain(|event| !matches!(self.lane.is_done(event), Ok(true)));
            }
            awaited.push(Arc::clone(event));
        }
    }

    /// Something was enqueued on the stream itself that counts as what it waits for.
    pub(crate) fn awaits_itself(&self) -> Result<(), L::Fault> {
        if self.heeds.load(Ordering::Relaxed) {
            self.lock_awaited().push(Arc::new(self.lane.record(false)?));
        }
        Ok(())
    }

    /// Whether all is done that the stream waits for. For who enqueues on it, and nobody else does then.
    pub(crate) fn is_caught_up(&self) -> Result<bool, L::Fault> {
        if !self.heeds.swap(true, Ordering::Relaxed) {
            if self.lane.is_idle()? {
                return Ok(true);
            }
            // It is not known which of that are waits.
            self.awaits_itself()?;
            return Ok(false);
        }
        let mut awaited = self.lock_awaited();
        while let Some(event) = awaited.last() {
            if !self.lane.is_done(event)? {
                return Ok(false);
            }
            awaited.pop();
        }
        Ok(true)
    }

    fn lock_awaited(&self) -> MutexGuard<'_, Vec<Arc<L::Event>>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is done, as far as somebody looked: a load.
    #[inline]
    pub(crate) fn is_known_done(&self, position: u64) -> bool {
        self.done.load(Ordering::Acquire) >= position
    }

    /// Where the timeline is with respect to a position, without a question to the driver. What the position is
    /// behind is enqueued then.
    pub(crate) fn look(&self, position: u64) -> Result<Reached<L::Event>, L::Fault> {
        if self.is_known_done(position) {
            return Ok(Reached::Done);
        }
        let mut queue = self.lock();
        if queue.is_open(position) {
            self.submit_locked(&mut queue)?;
        }
        Ok(self.find(&queue, position))
    }

    fn find(&self, queue: &Queue<L>, position: u64) -> Reached<L::Event> {
        if self.is_known_done(position) {
            return Reached::Done;
        }
        let at = queue.entries.partition_point(|it| it.position < position);
        match queue.entries.get(at) {
            Some(entry) if !queue.lost => Reached::Pending(Arc::clone(&entry.event)),
            _ => Reached::Lost,
        }
    }

    /// Whether the position is done; `None` if it is lost.
    pub(crate) fn is_done(&self, position: u64) -> Result<Option<bool>, L::Fault> {
        // Whoever records asks next whether that is done, and the stream has just said that it is not.
        let fresh = &self.fresh;
        if fresh.load(Ordering::Relaxed) == position && position != 0 {
            fresh.store(0, Ordering::Relaxed);
            return Ok(Some(false));
        }
        let event = {
            let queue = self.lock();
            match self.find(&queue, position) {
                Reached::Done => return Ok(Some(true)),
                Reached::Lost => return Ok(None),
                Reached::Pending(_) if queue.is_open(position) => return Ok(Some(false)),
                Reached::Pending(event) => event,
            }
        };
        if !self.lane.is_done(&event)? {
            return Ok(Some(false));
        }
        self.reach(&mut self.lock(), position);
        Ok(Some(true))
    }

    /// Blocks until the position is done; false if it is lost.
    pub(crate) fn block(&self, position: u64, event: &L::Event) -> Result<bool, L::Fault> {
        // An error is met again.
        if !look(|| matches!(self.lane.is_done(event), Ok(true))) {
            self.wait(position, event)?;
        }
        let mut queue = self.lock();
        if queue.lost {
            return Ok(self.is_known_done(position));
        }
        self.reach(&mut queue, position);
        Ok(true)
    }

    /// Waits until the event of a position is done, or lost.
    fn wait(&self, position: u64, event: &L::Event) -> Result<(), L::Fault> {
        self.quick.store(0, Ordering::Relaxed);
        if self.lane.may_sleep(event) {
            return self.lane.block(event);
        }
        let start = Instant::now();
        while !self.is_known_done(position) && !self.lane.is_done(event)? {
            std::thread::sleep((start.elapsed() / PART).clamp(LET_PASS, NAP));
            if self.lock().lost {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Calls back when the position is done or lost: at once if that is so already.
    ///
    /// # Panics
    /// If the system refuses a thread.
    pub(crate) fn watch(self: &Arc<Self>, position: u64, call: L::Call) {
        let done = {
            let mut queue = self.lock();
            match self.find(&queue, position) {
                Reached::Done => true,
                Reached::Lost => false,
                Reached::Pending(_) => {
                    self.watched.fetch_add(1, Ordering::Relaxed);
                    let at = queue.entries.partition_point(|it| it.position < position);
                    queue.entries[at].calls.push(call);
                    if !queue.told {
                        queue.told = true;
                        let timeline = Arc::clone(self);
                        std::thread::Builder::new()
                            .name("charioteer-cuda".into())
                            .spawn(move || timeline.tell())
                            .expect("the system refuses a thread to wait for a device");
                    } else if queue.asleep && !queue.is_open(position) {
                        queue.asleep = false;
                        drop(queue);
                        self.changed.notify_one();
                    }
                    return;
                }
            }
        };
        self.lane.tell(vec![Told {
            position,
            done,
            call,
        }]);
    }

    /// What the thread does that tells of completions.
    fn tell(self: Arc<Self>) {
        let mut queue = self.lock();
        // Whether some were let pass since the stream got further.
        let mut passed = false;
        let mut pace = Pace::new();
        // The last position that was given when this thread looked last.
        let mut tail = self.tail();
        loop {
            let Some((position, event)) = queue.first_watched() else {
                if pace.is_fast() && !passed && !queue.closed {
                    passed = true;
                    drop(queue);
                    std::thread::sleep(LET_PASS);
                    queue = self.lock();
                    continue;
                }
                passed = false;
                queue = match self.rest(queue) {
                    Some(queue) => queue,
                    None => return,
                };
                tail = self.tail();
                continue;
            };
            drop(queue);
            let done = || self.is_known_done(position);
            let many = self.watched.load(Ordering::Relaxed) >= MANY;
            let is_fed = std::mem::replace(&mut tail, self.tail()) != tail;
            if is_fed || (!passed && (many || pace.is_fast())) {
                passed = true;
                std::thread::sleep(LET_PASS);
                let reached = self.look_furthest(position - 1);
                if reached < position {
                    queue = self.lock();
                    continue;
                }
                passed = false;
                queue = self.tell_until(reached, &mut pace);
                continue;
            }
            passed = false;
            // An error is met again by who sleeps.
            if !look(|| done() || matches!(self.lane.is_done(&event), Ok(true))) && !done() {
                self.notifications.fetch_add(1, Ordering::Relaxed);
                if let Err(fault) = self.wait(position, &event) {
                    // Fails this timeline too.
                    self.lane.failed(fault);
                    queue = self.lock();
                    continue;
                }
            }
            drop(event);
            let reached = self.look_furthest(position);
            queue = self.tell_until(reached, &mut pace);
        }
    }

    /// All up to the position is done: tells who watches it.
    fn tell_until(&self, reached: u64, pace: &mut Pace) -> MutexGuard<'_, Queue<L>> {
        let mut queue = self.lock();
        if queue.lost {
            return queue;
        }
        self.reach(&mut queue, reached);
        let calls = Self::take_until(&mut queue, reached);
        self.watched
            .fetch_sub(calls.len() as u64, Ordering::Relaxed);
        let told = u32::try_from(calls.len()).unwrap_or(u32::MAX);
        let quick = self.quick.load(Ordering::Relaxed);
        self.quick
            .store(quick.saturating_add(told), Ordering::Relaxed);
        drop(queue);
        pace.count(calls.len());
        self.lane.tell(calls);
        self.lock()
    }

    /// Waits until something is watched; `None` if nothing will be any more.
    fn rest<'a>(&'a self, mut queue: MutexGuard<'a, Queue<L>>) -> Option<MutexGuard<'a, Queue<L>>> {
        if queue.closed {
            return None;
        }
        drop(queue);
        look(|| {
            self.watched.load(Ordering::Relaxed) != 0 && !self.puts_off.load(Ordering::Relaxed)
        });
        queue = self.lock();
        if queue.first_watched().is_some() || queue.closed {
            return Some(queue);
        }
        queue.asleep = true;
        let mut queue = (self.changed.wait(queue)).unwrap_or_else(PoisonError::into_inner);
        queue.asleep = false;
        Some(queue)
    }

    /// How far the stream got, which was at least at `done`. Asks the driver with no lock held, which who
    /// records would wait for, and as rarely as can be: of the last position first, then by bisection.
    fn look_furthest(&self, mut done: u64) -> u64 {
        let mut pending = u64::MAX;
        loop {
            let next = {
                let queue = self.lock();
                let position = |it: &Entry<L>| it.position;
                let from = queue.entries.partition_point(|it| position(it) <= done);
                let is_before = |it: &Entry<L>| position(it) < pending;
                let to = queue
                    .entries
                    .partition_point(|it| is_before(it) && !queue.is_open(position(it)));
                let at = if pending == u64::MAX {
                    to.checked_sub(1).filter(|at| *at >= from)
                } else {
                    (from < to).then(|| usize::midpoint(from, to))
                };
                at.map(|at| {
                    (
                        position(&queue.entries[at]),
                        Arc::clone(&queue.entries[at].event),
                    )
                })
            };
            match next {
                Some((position, event)) if matches!(self.lane.is_done(&event), Ok(true)) => {
                    done = position;
                    if pending == u64::MAX {
                        return done;
                    }
                }
                Some((position, _)) => pending = position,
                None => return done,
            }
        }
    }

    /// Takes the calls up to a position, which is done, in order.
    fn take_until(queue: &mut Queue<L>, position: u64) -> Vec<Told<L::Call>> {
        let mut told = Vec::new();
        while let Some(first) = queue.entries.front()
            && first.position <= position
        {
            let first = queue.entries.pop_front().expect("it was just there");
            queue.retire(&first);
            told.extend(first.told(true));
        }
        told
    }

    /// What is not done is lost from now on, and whoever watches it is told.
    pub(crate) fn fail(&self) {
        let entries = {
            let mut queue = self.lock();
            queue.lost = true;
            queue.put_off.clear();
            self.puts_off.store(false, Ordering::Release);
            self.watched.store(0, Ordering::Relaxed);
            std::mem::take(&mut queue.entries)
        };
        let told = entries.into_iter().flat_map(|entry| {
            let done = self.is_known_done(entry.position);
            entry.told(done)
        });
        self.lane.tell(told.collect());
    }

    /// Whether all that was enqueued is done, as the driver says.
    pub(crate) fn rests(&self) -> Result<bool, L::Fault> {
        let mut queue = self.lock();
        self.submit_locked(&mut queue)?;
        let tail = self.tail.load(Ordering::Relaxed);
        let rests = self.lane.is_idle()?;
        if rests {
            self.reach(&mut queue, tail);
            queue.retired.clear();
        }
        Ok(rests)
    }

    /// Its thread ends as soon as nothing is watched any more.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }
}

impl<L: Lane> Deferred for Timeline<L> {
    fn submit(&self) {
        if let Err(fault) = Timeline::submit(self) {
            self.lane.refused(fault);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;
    use std::sync::{OnceLock, Weak};
    use std::time::Duration;

    use super::*;

    /// A stream whose work is done when the test says so.
    #[derive(Default)]
    struct Bench {
        /// How much is enqueued, how much is done, and whether the device is broken.
        state: Mutex<(u64, u64, bool)>,
        changed: Condvar,
        records: AtomicUsize,
        idles: AtomicUsize,
        questions: AtomicUsize,
        blocks: AtomicUsize,
        faults: Mutex<Option<mpsc::Sender<()>>>,
        submitted: Mutex<Vec<Vec<u64>>>,
    }

    #[derive(Debug, PartialEq)]
    struct Broken;

    /// Behind how much it is, once it is recorded, and whether a thread may sleep for it.
    struct Behind(OnceLock<u64>, bool);

    impl Behind {
        fn until(&self) -> u64 {
            *self.0.get().expect("nobody gets an event that is open")
        }
    }

    impl Bench {
        fn ask(&self, until: u64) -> Result<bool, Broken> {
            let state = self.state.lock().unwrap();
            if state.2 {
                return Err(Broken);
            }
            Ok(state.1 >= until)
        }

        fn enqueue(&self) {
            self.state.lock().unwrap().0 += 1;
        }

        fn finish(&self, count: u64) {
            self.state.lock().unwrap().1 += count;
            self.changed.notify_all();
        }

        fn break_down(&self) {
            self.state.lock().unwrap().2 = true;
            self.changed.notify_all();
        }
    }

    type Call = Box<dyn FnOnce(bool) + Send>;

    impl Lane for Arc<Bench> {
        type Event = Behind;
        type Fault = Broken;
        type Call = Call;
        type Launch = u64;
        const MOST: usize = 4;

        fn tell(&self, told: Vec<Told<Call>>) {
            told.into_iter().for_each(|told| (told.call)(told.done));
        }

        fn is_idle(&self) -> Result<bool, Broken> {
            self.idles.fetch_add(1, Ordering::Relaxed);
            let enqueued = self.state.lock().unwrap().0;
            self.ask(enqueued)
        }

        fn record(&self, sleeps: bool) -> Result<Behind, Broken> {
            self.records.fetch_add(1, Ordering::Relaxed);
            Ok(Behind(self.state.lock().unwrap().0.into(), sleeps))
        }

        fn event(&self, sleeps: bool) -> Result<Behind, Broken> {
            Ok(Behind(OnceLock::new(), sleeps))
        }

        fn submit(&self, launches: &[PutOff<Self>]) -> Result<(), Broken> {
            let mut submitted = self.submitted.lock().unwrap();
            submitted.push(launches.iter().map(|it| it.0).collect());
            for (_, event) in launches {
                let mut state = self.state.lock().unwrap();
                if state.2 {
                    return Err(Broken);
                }
                state.0 += 1;
                if let Some(event) = event {
                    event.0.set(state.0).expect("it is recorded once");
                }
            }
            Ok(())
        }

        fn may_sleep(&self, event: &Behind) -> bool {
            event.1
        }

        fn is_done(&self, event: &Behind) -> Result<bool, Broken> {
            self.questions.fetch_add(1, Ordering::Relaxed);
            self.ask(event.until())
        }

        fn block(&self, event: &Behind) -> Result<(), Broken> {
            assert!(event.1, "one that a thread may sleep for");
            self.blocks.fetch_add(1, Ordering::Relaxed);
            let mut state = self.state.lock().unwrap();
            while state.1 < event.until() {
                if state.2 {
                    return Err(Broken);
                }
                state = self.changed.wait(state).unwrap();
            }
            if state.2 { Err(Broken) } else { Ok(()) }
        }

        fn refused(&self, fault: Broken) {
            self.failed(fault);
        }

        fn failed(&self, _: Broken) {
            if let Some(faults) = &*self.faults.lock().unwrap() {
                faults.send(()).unwrap();
            }
        }
    }

    fn bench() -> (Arc<Bench>, Arc<Timeline<Arc<Bench>>>) {
        let bench = Arc::new(Bench::default());
        (Arc::clone(&bench), Timeline::new(bench))
    }

    const SOON: Duration = Duration::from_secs(30);

    #[test]
    fn an_idle_stream_needs_no_event() {
        let (bench, timeline) = bench();
        assert_eq!(timeline.record(), Ok((0, true)));
        bench.enqueue();
        bench.finish(1);
        assert_eq!(timeline.record(), Ok((0, true)));
        assert_eq!(timeline.is_done(0), Ok(Some(true)));
        assert_eq!(bench.records.load(Ordering::Relaxed), 0);
        assert_eq!(bench.questions.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_stream_that_is_always_busy_is_seldom_asked_and_one_that_is_not_is() {
        let (bench, timeline) = bench();
        for _ in 0..100 {
            bench.enqueue();
            assert!(!timeline.record().unwrap().1);
        }
        let asked = bench.questions.swap(0, Ordering::Relaxed);
        // The first few, and one of sixteen.
        assert_eq!((asked, bench.records.load(Ordering::Relaxed)), (0, 100));
        assert_eq!(bench.idles.swap(0, Ordering::Relaxed), 4 + 100 / 16);
        bench.finish(100);
        // That it is idle is found out soon, and then each time.
        let events = (0..100).filter(|_| !timeline.record().unwrap().1).count();
        assert!(events < 16, "{events}");
        assert_eq!(bench.idles.load(Ordering::Relaxed), 100 - events);
    }

    #[test]
    fn events_are_to_sleep_for_until_nobody_does() {
        let (bench, timeline) = bench();
        let one = || {
            bench.enqueue();
            let (position, _) = timeline.record().unwrap();
            let Ok(Reached::Pending(event)) = timeline.look(position) else {
                panic!("it is not done");
            };
            (position, event)
        };
        for _ in 0..QUICK {
            let (position, event) = one();
            assert!(event.1);
            bench.finish(1);
            drop(timeline.tell_until(position, &mut Pace::new()));
            // Told of it without a sleep, as one call.
            timeline.quick.fetch_add(1, Ordering::Relaxed);
        }
        let (position, event) = one();
        assert!(!event.1);
        std::thread::scope(|scope| {
            scope.spawn(|| timeline.wait(position, &event).unwrap());
            bench.finish(1);
        });
        drop(timeline.tell_until(position, &mut Pace::new()));
        assert!(one().1.1, "a thread slept");
    }

    #[test]
    fn positions_are_done_in_order_and_stay_so() {
        let (bench, timeline) = bench();
        let positions: Vec<u64> = (0..3)
            .map(|_| {
                bench.enqueue();
                timeline.record().unwrap().0
            })
            .collect();
        assert_eq!(positions, [1, 2, 3]);
        assert_eq!(timeline.is_done(1), Ok(Some(false)));
        assert_eq!(bench.questions.load(Ordering::Relaxed), 1);
        // The stream said so when it was recorded.
        assert_eq!(timeline.is_done(3), Ok(Some(false)));
        assert_eq!(bench.questions.load(Ordering::Relaxed), 1);
        bench.finish(2);
        // Of the later one the earlier one follows, and is not asked for.
        assert_eq!(timeline.is_done(2), Ok(Some(true)));
        let asked = bench.questions.load(Ordering::Relaxed);
        assert_eq!(timeline.is_done(1), Ok(Some(true)));
        assert_eq!(bench.questions.load(Ordering::Relaxed), asked);
        assert_eq!(timeline.is_done(3), Ok(Some(false)));
        bench.finish(1);
        // The stream is idle, which says the same of all.
        assert_eq!(timeline.record(), Ok((3, true)));
        assert!(timeline.is_known_done(3));
        assert!(timeline.lock().entries.is_empty());
    }

    #[test]
    fn one_wake_up_tells_of_all_that_is_done() {
        let (bench, timeline) = bench();
        let (told, hears) = mpsc::channel();
        for _ in 0..100 {
            bench.enqueue();
            let (position, _) = timeline.record().unwrap();
            let told = told.clone();
            let call = move |done| told.send((position, done)).unwrap();
            timeline.watch(position, Box::new(call));
        }
        bench.finish(100);
        let heard: Vec<_> = (0..100)
            .map(|_| hears.recv_timeout(SOON).unwrap())
            .collect();
        assert_eq!(heard, (1..=100).map(|at| (at, true)).collect::<Vec<_>>());
        assert!(bench.blocks.load(Ordering::Relaxed) <= 1);
        // What is done already is told at once, by the caller's thread.
        let (told, hears) = mpsc::channel();
        timeline.watch(50, Box::new(move |done| told.send(done).unwrap()));
        assert_eq!(hears.try_recv(), Ok(true));
        timeline.close();
    }

    #[test]
    fn how_far_a_stream_got_takes_few_questions() {
        let (bench, timeline) = bench();
        for _ in 0..64 {
            bench.enqueue();
            // Whoever enqueued it knows that it is not done.
            timeline.enqueued();
            timeline.record().unwrap();
        }
        assert_eq!(bench.questions.load(Ordering::Relaxed), 0);
        let asked = |from: u64| {
            let before = bench.questions.load(Ordering::Relaxed);
            let reached = timeline.look_furthest(from);
            (reached, bench.questions.load(Ordering::Relaxed) - before)
        };
        bench.finish(40);
        let (reached, questions) = asked(0);
        assert_eq!(reached, 40);
        assert!(questions <= 7, "{questions}");
        assert_eq!(asked(40).0, 40);
        bench.finish(24);
        assert_eq!(asked(40), (64, 1));
        assert_eq!(asked(64), (64, 0));
    }

    #[test]
    fn who_waits_for_one_of_many_hears_of_it() {
        let (bench, timeline) = bench();
        let (told, hears) = mpsc::channel();
        for _ in 0..6 {
            bench.enqueue();
            let (position, _) = timeline.record().unwrap();
            let told = told.clone();
            let call = move |done| told.send((position, done)).unwrap();
            timeline.watch(position, Box::new(call));
        }
        for position in 1..=6 {
            bench.finish(1);
            assert_eq!(hears.recv_timeout(SOON), Ok((position, true)));
        }
        // A thread that waits for itself, for one of the first, one in the middle, and the last.
        for waited in [7, 9, 12] {
            let (bench, timeline) = (Arc::clone(&bench), Arc::clone(&timeline));
            while timeline.tail() < 12 {
                bench.enqueue();
                timeline.record().unwrap();
            }
            let Ok(Reached::Pending(event)) = timeline.look(waited) else {
                panic!("it is not done");
            };
            let waits = std::thread::spawn(move || timeline.block(waited, &event));
            let done = bench.state.lock().unwrap().1;
            bench.finish(waited - done);
            assert_eq!(waits.join().unwrap(), Ok(true));
        }
        timeline.close();
    }

    #[test]
    fn what_is_put_off_goes_together_and_before_all_else() {
        let (bench, timeline) = bench();
        let submitted = || std::mem::take(&mut *bench.submitted.lock().unwrap());
        let one = |number| {
            timeline.defer(number).unwrap();
            timeline.record().unwrap()
        };
        assert_eq!([one(1), one(2)], [(1, false), (2, false)]);
        // Nothing was enqueued since.
        assert_eq!(timeline.record(), Ok((2, false)));
        // Nobody asks for events that are open, nor is more enqueued for it.
        assert_eq!(timeline.is_done(1), Ok(Some(false)));
        assert_eq!(timeline.look_furthest(0), 0);
        assert!(submitted().is_empty());
        timeline.submit().unwrap();
        assert_eq!(submitted(), [[1, 2]]);
        timeline.submit().unwrap();
        assert!(submitted().is_empty());
        bench.finish(1);
        assert_eq!(timeline.is_done(1), Ok(Some(true)));
        assert_eq!(timeline.is_done(2), Ok(Some(false)));
        // As many as go together go by themselves.
        for number in 3..=7 {
            one(number);
        }
        assert_eq!(submitted(), [[3, 4, 5, 6]]);
        // Who wants to wait for one has it enqueued; who wants an earlier one has not.
        assert!(matches!(timeline.look(6), Ok(Reached::Pending(_))));
        assert!(submitted().is_empty());
        assert!(matches!(timeline.look(7), Ok(Reached::Pending(_))));
        assert_eq!(submitted(), [[7]]);
        one(8);
        bench.finish(6);
        assert_eq!(timeline.rests(), Ok(false), "it enqueues before it asks");
        assert_eq!(submitted(), [[8]]);
        bench.finish(1);
        assert_eq!(timeline.rests(), Ok(true));
        assert!(timeline.is_known_done(8));
        // One that no record is behind yet.
        timeline.defer(9).unwrap();
        timeline.submit().unwrap();
        assert_eq!(timeline.record(), Ok((9, false)));
        assert_eq!(timeline.is_done(9), Ok(Some(false)));
        bench.finish(1);
        assert_eq!(timeline.is_done(9), Ok(Some(true)));
        // More than go together, without a record, are not put off.
        (10..14).for_each(|number| timeline.defer(number).unwrap());
        assert_eq!(timeline.defer(14), Err(14));
    }

    #[test]
    fn events_that_were_recorded_together_are_kept_until_all_of_it_is_done() {
        let (bench, timeline) = bench();
        let events = || -> Vec<_> {
            let positions = [1, 2].map(|number| {
                timeline.defer(number).unwrap();
                timeline.record().unwrap().0
            });
            let event = |position: &u64| match timeline.look(*position) {
                Ok(Reached::Pending(event)) => Arc::downgrade(&event),
                _ => panic!("it is not done"),
            };
            positions.iter().map(event).collect()
        };
        let kept =
            |events: &[Weak<Behind>]| events.iter().filter(|it| it.strong_count() > 0).count();
        let first = events();
        assert_eq!(timeline.is_done(2), Ok(Some(false)));
        bench.finish(2);
        assert_eq!(timeline.is_done(2), Ok(Some(true)));
        assert_eq!(kept(&first), 2);
        // What came next is done.
        let second = events();
        bench.finish(1);
        assert_eq!(timeline.is_done(3), Ok(Some(true)));
        assert_eq!((kept(&first), kept(&second)), (0, 2));
        // The stream is idle.
        bench.finish(1);
        assert_eq!(timeline.rests(), Ok(true));
        assert_eq!(kept(&second), 0);
    }

    #[test]
    fn what_goes_alone_time_and_again_is_not_put_off() {
        let (bench, timeline) = bench();
        // Each is wanted at once; those that come back are launched by whoever had them put off.
        let round = |count: u64| {
            let put_off = (0..count).filter(|&number| timeline.defer(number).is_ok());
            let put_off = put_off.count();
            if put_off == 0 {
                bench.enqueue();
            }
            let (position, _) = timeline.record().unwrap();
            assert!(matches!(timeline.look(position), Ok(Reached::Pending(_))));
            put_off
        };
        let put_off: usize = (0..100).map(|_| round(1)).sum();
        assert!((ALONE as usize..20).contains(&put_off), "{put_off}");
        // Until some go together.
        let tries = (0..100).position(|_| round(2) == 2);
        assert!(
            tries.is_some_and(|tries| tries <= AGAIN as usize),
            "{tries:?}"
        );
        assert_eq!(round(1), 1);
    }

    #[test]
    fn who_watches_what_is_put_off_is_told_when_it_is_done() {
        let (bench, timeline) = bench();
        let (told, hears) = mpsc::channel();
        for round in 0..50 {
            for number in 1..=3 {
                timeline.defer(number).unwrap();
                let (position, _) = timeline.record().unwrap();
                let told = told.clone();
                timeline.watch(position, Box::new(move |done| told.send(done).unwrap()));
            }
            if round % 2 == 0 {
                // The thread that tells has looked in vain, and sleeps.
                std::thread::sleep(2 * LOOK);
            }
            assert!(hears.try_recv().is_err());
            timeline.submit().unwrap();
            bench.finish(3);
            for _ in 0..3 {
                assert_eq!(hears.recv_timeout(SOON), Ok(true));
            }
        }
        timeline.close();
    }

    #[test]
    fn what_is_put_off_and_cannot_be_enqueued_is_lost() {
        let (bench, timeline) = bench();
        let one = |told: &mpsc::Sender<bool>| {
            timeline.defer(0).unwrap();
            let (position, _) = timeline.record().unwrap();
            let told = told.clone();
            timeline.watch(position, Box::new(move |done| told.send(done).unwrap()));
            position
        };
        let (told, hears) = mpsc::channel();
        let position = one(&told);
        assert_eq!(timeline.is_done(position), Ok(Some(false)));
        bench.break_down();
        assert_eq!(timeline.submit(), Err(Broken));
        assert_eq!(timeline.is_done(position), Ok(None));
        assert_eq!(timeline.defer(1), Err(1));
        timeline.fail();
        assert_eq!(hears.recv_timeout(SOON), Ok(false));
        timeline.close();
        // The device fails first.
        let (_, timeline) = self::bench();
        timeline.defer(0).unwrap();
        let (position, _) = timeline.record().unwrap();
        let told = told.clone();
        timeline.watch(position, Box::new(move |done| told.send(done).unwrap()));
        timeline.fail();
        assert_eq!(hears.recv_timeout(SOON), Ok(false));
        assert_eq!(timeline.submit(), Ok(()));
        assert!(matches!(timeline.look(position), Ok(Reached::Lost)));
        timeline.close();
    }

    #[test]
    fn a_stream_is_caught_up_when_what_it_waits_for_is_done() {
        let (_, other) = bench();
        let (bench, timeline) = bench();
        let event = |of: &Arc<Bench>| {
            of.enqueue();
            Arc::new(of.record(false).unwrap())
        };
        // What nobody asked about is not kept.
        timeline.awaits(&event(&other.lane));
        assert!(timeline.lock_awaited().is_empty());
        bench.enqueue();
        // It is not known whether that waits; once it is done, it does not matter.
        assert_eq!(timeline.is_caught_up(), Ok(false));
        bench.enqueue();
        bench.finish(1);
        assert_eq!(timeline.is_caught_up(), Ok(true), "though it is not idle");
        // Events of a stream of another device, in this test of the same bench.
        let waits = [event(&bench), event(&bench)];
        timeline.awaits(&waits[1]);
        timeline.awaits(&waits[0]);
        bench.finish(2);
        assert_eq!(timeline.is_caught_up(), Ok(false));
        bench.finish(1);
        assert_eq!(timeline.is_caught_up(), Ok(true));
        assert!(timeline.lock_awaited().is_empty());
        timeline.awaits_itself().unwrap();
        assert_eq!(timeline.is_caught_up(), Ok(true), "it is idle");
        bench.enqueue();
        timeline.awaits_itself().unwrap();
        assert_eq!(timeline.is_caught_up(), Ok(false));
        bench.finish(1);
        // Many that are done are not kept.
        for _ in 0..100 {
            let done = event(&bench);
            bench.finish(1);
            timeline.awaits(&done);
        }
        assert!(timeline.lock_awaited().len() <= 9);
    }

    #[test]
    fn a_timeline_that_rested_tells_again() {
        let (bench, timeline) = bench();
        for _ in 0..3 {
            bench.enqueue();
            let (position, _) = timeline.record().unwrap();
            let (told, hears) = mpsc::channel();
            timeline.watch(position, Box::new(move |done| told.send(done).unwrap()));
            bench.finish(1);
            assert_eq!(hears.recv_timeout(SOON), Ok(true));
        }
        timeline.close();
    }

    #[test]
    fn a_recorded_idle_stream_does_not_swallow_who_watches() {
        let (bench, timeline) = bench();
        bench.enqueue();
        let (position, _) = timeline.record().unwrap();
        let (told, hears) = mpsc::channel();
        timeline.watch(position, Box::new(move |done| told.send(done).unwrap()));
        {
            // While the thread that tells is not through yet.
            let mut state = bench.state.lock().unwrap();
            state.1 = 1;
        }
        assert_eq!(timeline.record(), Ok((position, true)));
        bench.finish(0);
        assert_eq!(hears.recv_timeout(SOON), Ok(true));
        timeline.close();
    }

    #[test]
    fn what_is_lost_is_told_and_what_was_done_is_not_lost() {
        let (bench, timeline) = bench();
        let (faults, hears_of_faults) = mpsc::channel();
        *bench.faults.lock().unwrap() = Some(faults);
        bench.enqueue();
        assert_eq!(timeline.record(), Ok((1, false)));
        assert_eq!(timeline.is_done(1), Ok(Some(false)));
        bench.finish(1);
        assert_eq!(timeline.is_done(1), Ok(Some(true)));
        bench.enqueue();
        assert_eq!(timeline.record(), Ok((2, false)));
        assert_eq!(timeline.is_done(2), Ok(Some(false)));
        let (told, hears) = mpsc::channel();
        let call = |told: &mpsc::Sender<bool>| -> Call {
            let told = told.clone();
            Box::new(move |done| told.send(done).unwrap())
        };
        timeline.watch(2, call(&told));
        bench.break_down();
        // Who sleeps hears it, and fails the timelines of the device.
        hears_of_faults.recv_timeout(SOON).unwrap();
        assert_eq!(timeline.is_done(2), Err(Broken));
        timeline.fail();
        assert_eq!(hears.recv_timeout(SOON), Ok(false));
        timeline.watch(2, call(&told));
        timeline.watch(1, call(&told));
        assert_eq!((hears.try_recv(), hears.try_recv()), (Ok(false), Ok(true)));
        assert_eq!(timeline.is_done(2), Ok(None));
        assert_eq!(timeline.is_done(1), Ok(Some(true)));
        timeline.close();
    }
}
