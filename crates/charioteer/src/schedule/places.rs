//! Who may use which core: places, grants and the threads that hold them.
//!
//! # Protocol
//!
//! The machine has as many *places* as the runtime has workers; a place is the right to use one
//! core. Threads are not places: a thread needs a grant of places to run a task, and a body that
//! waits gives its grant up, so that another thread uses the cores meanwhile.
//!
//! * A thread without a grant parks in `idle`. It is woken with an [`Assignment`]: a place to take
//!   ready tasks with, one task that needs an unusual grant, or the end.
//! * A thread with an ordinary place runs ready tasks until there are none, then gives the place
//!   back. Between two tasks it looks at `demand`, one relaxed load; if somebody is owed a place it
//!   passes [`Places::boundary`].
//! * **Order of claims.** Bodies that come back from a wait come first, in the order in which they
//!   came back. Then the unusual tasks, by priority and then age, all or nothing (invariant 4): when
//!   the head does not fit, workers give their places up at their next boundary until it does, so a
//!   wide task waits for no more than the tasks that run. After a grant to an unusual task as many
//!   ordinary tasks as there are places may start before the next one is considered, or all that are
//!   ready if those are fewer, so that neither kind starves the other. They are counted when they
//!   start: one that runs for long keeps nobody from a core that is free.
//! * **Who holds devices** already, of a set of several cores and devices, waits in a queue of its own,
//!   in the order of the grants of devices, whatever its priority: others may need what it holds. This
//!   queue and the unusual tasks take turns while both wait, by the same rules. So the first of it waits
//!   for tasks that run, and for one unusual task and as many ordinary ones as there are places.
//! * Where workers are pinned, places have NUMA nodes. A set of cores gets places of one node if one
//!   has enough that are free, the one with the fewest of these, so that larger sets find room; else
//!   of as few nodes as can be. It waits for no node: places are all that it needs.
//! * Parts of cores share a place: the first takes a free place, others join it while their parts
//!   fit, the last one gives it back.
//!
//! **Cores come last.** Who has cores runs, or gives them up: a body that waits has done so, and gets
//! its share of devices back before its cores; a task asks for cores only once it holds the devices of
//! its set. So who has cores waits for nobody, and who waits for cores waits for bodies that run, whatever
//! it holds besides. A claim gets all its cores at once, and what is collected for the first claim goes to
//! nobody else, so claims do not wait for each other in a circle either. Devices and cores are not
//! decided about in one step: those who have devices would then be held up by a schedule of cores that
//! changes with every task that ends.
//!
//! **No wake-up is lost.** A producer pushes its task, passes a SeqCst fence, and then reads
//! `free` and `searching`. A thread that goes to sleep first stores that its place is free and that
//! it searches no more, passes a SeqCst fence, and then looks at the queues once more. Of two
//! fences one is first: either the producer sees the free place and wakes somebody, or the sleeper
//! sees the task. If the producer saw `searching`, that searcher finds a task, and then passes the
//! wake-up on as long as there is work, or goes to sleep by the same rule. One searcher at a time
//! is enough, and on a Python with a GIL it is all that should ever queue up for it.
//!
//! Places that are collected for somebody are not published as free, so producers wake nobody for
//! them. Whoever ends the collecting puts places back or takes them under the lock, and then looks
//! at the queues by the sleeper's rule ([`Places::retire`] and [`Places::block`], whose callers wake
//! after them).
//!
//! **Nothing moves.** [`Places::is_still`] says whether every thread is parked, or blocked in a wait
//! for tasks that is not over. `stirs` counts whatever could end that: an assignment, a wait that is
//! over, a thread that comes to help. Two looks with the same count between which nothing else was
//! found to move prove that nothing did.

use std::cmp;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use crate::sync::{AtomicUsize, Condvar, Mutex, Ordering, fence};
use crate::task::{Domain, Need, Phase, TaskRef, WHOLE_CORE};

/// The cores that a running task holds.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Whole cores, by number.
    pub cores: Vec<u16>,
    /// A part of one core: its number and the part in 1/65,536.
    pub part: Option<(u16, u32)>,
}

impl Grant {
    /// Whether it is one whole core, with which ordinary tasks can be run.
    pub(crate) fn is_ordinary(&self) -> bool {
        self.cores.len() == 1 && self.part.is_none()
    }

    fn need(&self) -> Need {
        match (self.cores.len(), self.part) {
            (_, Some((_, part))) => Need::Share(part),
            (0, None) => Need::Share(0),
            (1, None) => Need::Core,
            (cores, None) => Need::Cores(u16::try_from(cores).expect("fewer cores than 65,536")),
        }
    }
}

/// What a parked thread is woken for.
pub(crate) enum Assignment<D: Domain> {
    /// Take ready tasks, with this place.
    Search(Grant),
    /// Run this task, with this grant.
    Run(TaskRef<D>, Grant),
    /// End.
    Exit,
}

/// How a thread is told.
pub(crate) struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    pub(crate) fn new() -> Self {
        Self {
            rung: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn ring(&self) {
        *self.rung.lock() = true;
        self.changed.notify_one();
    }

    pub(crate) fn wait(&self) {
        let mut rung = self.rung.lock();
        while !*rung {
            rung = self.changed.wait(rung);
        }
        *rung = false;
    }
}

struct Thread<D: Domain> {
    bell: Arc<Bell>,
    assignment: Option<Assignment<D>>,
}

/// A body that waits for places, to go on after a wait.
struct Return {
    need: Need,
    bell: Arc<Bell>,
    granted: Arc<Mutex<Option<Grant>>>,
}

struct Unusual<D: Domain> {
    priority: i32,
    ticket: u64,
    need: Need,
    task: TaskRef<D>,
}

impl<D: Domain> PartialEq for Unusual<D> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == cmp::Ordering::Equal
    }
}
impl<D: Domain> Eq for Unusual<D> {}
impl<D: Domain> PartialOrd for Unusual<D> {
    fn partial_cmp(&self, other: &Self) -> Option<cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<D: Domain> Ord for Unusual<D> {
    fn cmp(&self, other: &Self) -> cmp::Ordering {
        (self.priority, other.ticket).cmp(&(other.priority, self.ticket))
    }
}

struct Book<D: Domain> {
    free: Vec<u16>,
    /// The NUMA nodes of all places, where workers are pinned.
    nodes: Option<Box<[u16]>>,
    /// Cores in parts: the core, what is taken of it, by how many tasks.
    parts: Vec<(u16, u32, u32)>,
    threads: Vec<Thread<D>>,
    idle: Vec<usize>,
    /// Threads that the system refused to start.
    vacant: Vec<usize>,
    returns: VecDeque<Return>,
    unusual: BinaryHeap<Unusual<D>>,
    tickets: u64,
    /// Those that hold devices.
    holders: VecDeque<(TaskRef<D>, Need)>,
    /// Whether the last one that was served was one of these.
    held_last: bool,
    /// Ordinary tasks that may start before the next unusual one is considered.
    credit: usize,
    closed: bool,
}

impl<D: Domain> Book<D> {
    /// Whether free places are kept for somebody who needs more of them.
    fn is_collecting(&self) -> bool {
        !self.returns.is_empty() || (self.claims() != 0 && self.credit == 0)
    }

    /// How many tasks wait for unusual grants.
    fn claims(&self) -> usize {
        self.unusual.len() + self.holders.len()
    }

    /// Whether the next of them is one that holds devices.
    fn is_holders_turn(&self) -> bool {
        !self.holders.is_empty() && (!self.held_last || self.unusual.is_empty())
    }

    fn add_unusual(&mut self, task: TaskRef<D>, need: Need, priority: i32) {
        let ticket = self.tickets;
        self.tickets += 1;
        self.unusual.push(Unusual {
            priority,
            ticket,
            need,
            task,
        });
    }
}

/// What the caller has to do after it let go of the lock.
#[must_use]
pub(crate) struct Todo<D: Domain> {
    bells: Vec<Arc<Bell>>,
    /// Slots whose threads are to be started.
    start: Vec<usize>,
    /// Tasks that nobody has to run any more; they may hold devices.
    pub(crate) gone: Vec<TaskRef<D>>,
}

impl<D: Domain> Todo<D> {
    fn none() -> Self {
        Self {
            bells: Vec::new(),
            start: Vec::new(),
            gone: Vec::new(),
        }
    }

    /// Wakes who was given something; the slots whose threads are missing are left to the caller.
    pub(crate) fn ring(self) -> Vec<usize> {
        for bell in &self.bells {
            bell.ring();
        }
        self.start
    }
}

/// Puts the free places that are best for a set of so many, which is not more than there are, to the
/// end.
fn bring_together(free: &mut [u16], nodes: &[u16], count: usize) {
    let node = |place: u16| nodes[usize::from(place)];
    let on = |wanted: u16| free.iter().filter(|&&place| node(place) == wanted).count();
    let mut ranked: Vec<(bool, usize, u16)> = Vec::new();
    for &place in &*free {
        let node = node(place);
        if ranked.iter().all(|&(.., other)| other != node) {
            let there = on(node);
            let enough = there >= count;
            // Of those with enough the one with the fewest, of others the one with the most.
            let rank = if enough { there } else { usize::MAX - there };
            ranked.push((!enough, rank, node));
        }
    }
    ranked.sort_unstable();
    let rank = |place: u16| ranked.iter().position(|&(.., other)| other == node(place));
    free.sort_unstable_by_key(|&place| cmp::Reverse((rank(place), place)));
}

pub(crate) struct Places<D: Domain> {
    book: Mutex<Book<D>>,
    count: usize,
    limit: usize,
    free: AtomicUsize,
    searching: AtomicUsize,
    /// Nonzero while somebody is owed a place.
    demand: AtomicUsize,
    /// Bodies that wait, without a limit, for tasks that are not done. A wait may be over before it
    /// is counted, so this may be short for a moment, and below zero; never too large.
    blocked: AtomicUsize,
    /// Threads of others that run tasks.
    visitors: AtomicUsize,
    stirs: AtomicUsize,
}

impl<D: Domain> Places<D> {
    /// `count` places, and at most `limit` threads. `nodes`: where the places are, if workers are pinned.
    pub(crate) fn new(count: usize, limit: usize, nodes: Option<Box<[u16]>>) -> Self {
        let cores = u16::try_from(count).expect("fewer than 65,536 workers");
        Self {
            book: Mutex::new(Book {
                free: (0..cores).rev().collect(),
                nodes,
                parts: Vec::new(),
                threads: Vec::new(),
                idle: Vec::new(),
                vacant: Vec::new(),
                returns: VecDeque::new(),
                unusual: BinaryHeap::new(),
                tickets: 0,
                holders: VecDeque::new(),
                held_last: false,
                credit: 0,
                closed: false,
            }),
            count,
            limit,
            free: AtomicUsize::new(count),
            searching: AtomicUsize::new(0),
            demand: AtomicUsize::new(0),
            blocked: AtomicUsize::new(0),
            visitors: AtomicUsize::new(0),
            stirs: AtomicUsize::new(0),
        }
    }

    /// Whether a producer has to wake somebody for the task that it has just pushed.
    #[inline]
    pub(crate) fn wants_waking(&self) -> bool {
        fence(Ordering::SeqCst);
        self.free.load(Ordering::Relaxed) != 0 && self.searching.load(Ordering::Relaxed) == 0
    }

    /// Whether somebody takes the next ordinary task that becomes ready, or may be woken for it.
    pub(crate) fn has_takers(&self) -> bool {
        self.free.load(Ordering::Relaxed) != 0 || self.searching.load(Ordering::Relaxed) != 0
    }

    /// How many places are free for the next ordinary task, at this moment.
    #[inline]
    pub(crate) fn free(&self) -> usize {
        self.free.load(Ordering::Relaxed)
    }

    /// Gives a free place to a thread, to search for ready tasks.
    pub(crate) fn wake(&self) -> Todo<D> {
        let mut book = self.book.lock();
        let mut todo = Todo::none();
        self.wake_searcher(&mut book, &mut todo);
        self.publish(&book);
        todo
    }

    fn wake_searcher(&self, book: &mut Book<D>, todo: &mut Todo<D>) {
        if book.closed
            || book.free.is_empty()
            || book.is_collecting()
            || self.searching.load(Ordering::Relaxed) != 0
        {
            return;
        }
        // The reader's end of the protocol: the place is taken and the searcher counted before
        // the lock is let go, so that no second producer wakes a second one for nothing.
        if let Some(thread) = self.take_thread(book, todo) {
            let core = book.free.pop().expect("looked above");
            self.searching.fetch_add(1, Ordering::SeqCst);
            let grant = Grant {
                cores: vec![core],
                part: None,
            };
            self.assign(book, todo, thread, Assignment::Search(grant));
        }
    }

    /// A parked thread, or a new one, if there may be one.
    fn take_thread(&self, book: &mut Book<D>, todo: &mut Todo<D>) -> Option<usize> {
        if let Some(slot) = book.idle.pop() {
            return Some(slot);
        }
        if let Some(slot) = book.vacant.pop() {
            todo.start.push(slot);
            return Some(slot);
        }
        if book.threads.len() == self.limit {
            return None;
        }
        book.threads.push(Thread {
            bell: Arc::new(Bell::new()),
            assignment: None,
        });
        let slot = book.threads.len() - 1;
        todo.start.push(slot);
        Some(slot)
    }

    fn assign(
        &self,
        book: &mut Book<D>,
        todo: &mut Todo<D>,
        slot: usize,
        assignment: Assignment<D>,
    ) {
        self.stirs.fetch_add(1, Ordering::SeqCst);
        let thread = &mut book.threads[slot];
        debug_assert!(thread.assignment.is_none());
        thread.assignment = Some(assignment);
        todo.bells.push(Arc::clone(&thread.bell));
    }

    /// Adds a ready task that needs something else than one core.
    /// `idle`: there is no ordinary task that it would have to let pass.
    pub(crate) fn push_unusual(
        &self,
        task: TaskRef<D>,
        need: Need,
        priority: i32,
        idle: bool,
    ) -> Todo<D> {
        let mut book = self.book.lock();
        if idle {
            book.credit = 0;
        }
        book.add_unusual(task, need, priority);
        let mut todo = Todo::none();
        self.serve(&mut book, &mut todo);
        self.publish(&book);
        todo
    }

    /// Adds a task that was granted its devices and needs several cores beside them.
    /// `idle`: there is no ordinary task that it would have to let pass.
    pub(crate) fn push_holder(&self, task: TaskRef<D>, need: Need, idle: bool) -> Todo<D> {
        let mut book = self.book.lock();
        if idle {
            book.credit = 0;
        }
        book.holders.push_back((task, need));
        let mut todo = Todo::none();
        self.serve(&mut book, &mut todo);
        self.publish(&book);
        todo
    }

    /// Hands free places to those who are owed them.
    fn serve(&self, book: &mut Book<D>, todo: &mut Todo<D>) {
        while let Some(next) = book.returns.front() {
            let Some(grant) = Self::take(book, next.need) else {
                return;
            };
            let next = book.returns.pop_front().expect("looked above");
            *next.granted.lock() = Some(grant);
            todo.bells.push(next.bell);
        }
        loop {
            let holds = book.is_holders_turn();
            let next = if holds {
                book.holders.front().map(|(task, need)| (task, *need))
            } else {
                book.unusual.peek().map(|next| (&next.task, next.need))
            };
            let Some((task, need)) = next else { return };
            let pop = |book: &mut Book<D>| {
                if holds {
                    book.holders.pop_front().map(|(task, _)| task)
                } else {
                    book.unusual.pop().map(|next| next.task)
                }
            };
            if task.phase() != Phase::Ready {
                // Cancelled: nobody gives a place up for it. It is dropped with no lock held.
                todo.gone.extend(pop(book));
                continue;
            }
            if book.credit != 0 && need != Need::Share(0) {
                return;
            }
            let alternatives = task
                .options()
                .and_then(|options| options.alternatives.clone());
            let Some(grant) = Self::take_any(book, need, alternatives) else {
                return;
            };
            let Some(thread) = self.take_thread(book, todo) else {
                self.put(book, grant);
                return;
            };
            let task = pop(book).expect("looked above");
            if need != Need::Share(0) {
                book.credit = self.count;
                book.held_last = holds;
            }
            self.assign(book, todo, thread, Assignment::Run(task, grant));
        }
    }

    /// A grant for a task whose need is `need` unless it has alternatives.
    fn take_any(book: &mut Book<D>, need: Need, alternatives: Option<Arc<[u16]>>) -> Option<Grant> {
        match alternatives {
            None => Self::take(book, need),
            Some(alternatives) => alternatives
                .iter()
                .find_map(|cores| Self::take(book, Need::Cores(*cores))),
        }
    }

    fn take(book: &mut Book<D>, need: Need) -> Option<Grant> {
        match need {
            Need::Core => book.free.pop().map(|core| Grant {
                cores: vec![core],
                part: None,
            }),
            Need::Cores(count) => {
                let left = book.free.len().checked_sub(usize::from(count))?;
                if let Some(nodes) = &book.nodes {
                    bring_together(&mut book.free, nodes, usize::from(count));
                }
                let mut cores = book.free.split_off(left);
                cores.sort_unstable();
                Some(Grant { cores, part: None })
            }
            // Tasks on devices have the ledger's grants, and no core's.
            Need::Share(0) | Need::Devices | Need::Mapped => Some(Grant::default()),
            Need::Share(part) => {
                let shared = book
                    .parts
                    .iter_mut()
                    .find(|(_, taken, _)| taken.saturating_add(part) <= WHOLE_CORE);
                if let Some((core, taken, tasks)) = shared {
                    *taken += part;
                    *tasks += 1;
                    return Some(Grant {
                        cores: Vec::new(),
                        part: Some((*core, part)),
                    });
                }
                let core = book.free.pop()?;
                book.parts.push((core, part, 1));
                Some(Grant {
                    cores: Vec::new(),
                    part: Some((core, part)),
                })
            }
        }
    }

    fn put(&self, book: &mut Book<D>, grant: Grant) {
        book.free.extend(grant.cores);
        if let Some((core, part)) = grant.part {
            let at = book
                .parts
                .iter()
                .position(|(other, ..)| *other == core)
                .expect("a part belongs to a shared core");
            let (_, taken, tasks) = &mut book.parts[at];
            *taken -= part;
            *tasks -= 1;
            if *tasks == 0 {
                book.parts.swap_remove(at);
                book.free.push(core);
            }
        }
        crate::task::state::validate(
            book.free.len() + book.parts.len() <= self.count,
            "a place was given back twice (invariant 5)",
        );
    }

    fn publish(&self, book: &Book<D>) {
        // Places that are being collected for somebody are not free for producers to wake for.
        let free = if book.is_collecting() {
            0
        } else {
            book.free.len()
        };
        self.free.store(free, Ordering::SeqCst);
        self.demand
            .store(book.returns.len() + book.claims(), Ordering::SeqCst);
    }

    /// Whether a worker has to pass the boundary between two tasks.
    #[inline]
    pub(crate) fn is_owed(&self) -> bool {
        self.demand.load(Ordering::Relaxed) != 0
    }

    /// An ordinary task is about to start. `idle`: it was the last that was ready, so that no unusual
    /// one has to let others pass.
    pub(crate) fn starts(&self, idle: bool) -> Todo<D> {
        let mut book = self.book.lock();
        book.credit = if idle {
            0
        } else {
            book.credit.saturating_sub(1)
        };
        let mut todo = Todo::none();
        self.serve(&mut book, &mut todo);
        self.publish(&book);
        todo
    }

    /// A worker is between two ordinary tasks. True if it has to give its place up.
    pub(crate) fn boundary(&self) -> bool {
        let book = self.book.lock();
        book.is_collecting()
    }

    /// The searcher found a task.
    pub(crate) fn found(&self) {
        self.searching.fetch_sub(1, Ordering::SeqCst);
    }

    /// A worker that found tasks, and has none left, searches for more.
    pub(crate) fn seek(&self) {
        self.searching.fetch_add(1, Ordering::SeqCst);
    }

    /// Gives `grant` back and parks thread `slot`, whose next [`Places::assignment`] tells it what
    /// to do. `searching`: it searched until now. `idle`: there was no ordinary task, so that no
    /// unusual one has to let them pass.
    pub(crate) fn retire(&self, slot: usize, grant: Grant, searching: bool, idle: bool) -> Todo<D> {
        let mut book = self.book.lock();
        self.put(&mut book, grant);
        let mut todo = Todo::none();
        if book.closed {
            self.assign(&mut book, &mut todo, slot, Assignment::Exit);
        } else {
            book.idle.push(slot);
        }
        if idle {
            book.credit = 0;
        }
        if searching {
            self.searching.fetch_sub(1, Ordering::SeqCst);
        }
        self.serve(&mut book, &mut todo);
        self.publish(&book);
        todo
    }

    /// What thread `slot` is to do next; parks it until there is something.
    pub(crate) fn assignment(&self, slot: usize) -> Assignment<D> {
        let bell = Arc::clone(&self.book.lock().threads[slot].bell);
        loop {
            if let Some(assignment) = self.book.lock().threads[slot].assignment.take() {
                return assignment;
            }
            bell.wait();
        }
    }

    /// Makes the threads of a runtime that opens; they start parked.
    pub(crate) fn open(&self) -> Vec<usize> {
        let mut book = self.book.lock();
        for slot in 0..self.count {
            book.threads.push(Thread {
                bell: Arc::new(Bell::new()),
                assignment: None,
            });
            book.idle.push(slot);
        }
        book.idle.reverse();
        (0..self.count).collect()
    }

    /// A thread could not be started: what it was to do goes back, for another one.
    pub(crate) fn failed_to_start(&self, slot: usize) {
        let mut book = self.book.lock();
        book.idle.retain(|other| *other != slot);
        book.vacant.push(slot);
        match book.threads[slot].assignment.take() {
            Some(Assignment::Search(grant)) => {
                self.searching.fetch_sub(1, Ordering::SeqCst);
                self.put(&mut book, grant);
            }
            Some(Assignment::Run(task, grant)) => {
                let need = grant.need();
                let priority = task.options().map_or(0, |options| options.priority);
                self.put(&mut book, grant);
                if task.needs() == Need::Devices {
                    book.holders.push_front((task, need));
                } else {
                    book.add_unusual(task, need, priority);
                }
            }
            Some(Assignment::Exit) | None => {}
        }
        self.publish(&book);
    }

    /// A body waits: gives its grant up. `Err` if no thread would be left to take it over: what the
    /// body waits for could need one, now or later.
    /// `work`: ordinary tasks are ready.
    pub(crate) fn block(&self, grant: &Grant, work: bool) -> Result<Todo<D>, ()> {
        let mut book = self.book.lock();
        if book.idle.is_empty() && book.vacant.is_empty() && book.threads.len() == self.limit {
            return Err(());
        }
        self.put(&mut book, grant.clone());
        if !work {
            book.credit = 0;
        }
        let mut todo = Todo::none();
        self.serve(&mut book, &mut todo);
        if work {
            self.wake_searcher(&mut book, &mut todo);
        }
        self.publish(&book);
        Ok(todo)
    }

    /// The wait of a body ended: gets it a grant like the one that it had.
    pub(crate) fn unblock(&self, grant: &Grant) -> Grant {
        let need = grant.need();
        let (bell, granted) = {
            let mut book = self.book.lock();
            if book.returns.is_empty()
                && let Some(grant) = Self::take(&mut book, need)
            {
                self.publish(&book);
                return grant;
            }
            let bell = Arc::new(Bell::new());
            let granted = Arc::new(Mutex::new(None));
            book.returns.push_back(Return {
                need,
                bell: Arc::clone(&bell),
                granted: Arc::clone(&granted),
            });
            self.publish(&book);
            (bell, granted)
        };
        loop {
            if let Some(grant) = granted.lock().take() {
                return grant;
            }
            bell.wait();
        }
    }

    /// Counts a body whose wait is not over and has no limit ([`Latch::count`]).
    ///
    /// [`Latch::count`]: crate::task::Latch::count
    pub(crate) fn count_blocked(&self) {
        self.blocked.fetch_add(1, Ordering::SeqCst);
    }

    /// The wait of a counted body is over.
    pub(crate) fn uncount_blocked(&self) {
        self.stirs.fetch_add(1, Ordering::SeqCst);
        self.blocked.fetch_sub(1, Ordering::SeqCst);
    }

    /// A thread of somebody else comes to run tasks.
    pub(crate) fn visit(&self) {
        self.stirs.fetch_add(1, Ordering::SeqCst);
        self.visitors.fetch_add(1, Ordering::SeqCst);
    }

    /// It goes.
    pub(crate) fn leave(&self) {
        self.visitors.fetch_sub(1, Ordering::SeqCst);
    }

    /// How often something began to move so far.
    pub(crate) fn stirs(&self) -> usize {
        self.stirs.load(Ordering::SeqCst)
    }

    /// Whether no thread can do anything by itself: each is parked, or blocked in a wait for tasks
    /// that is not over.
    pub(crate) fn is_still(&self) -> bool {
        let book = self.book.lock();
        let threads = book.threads.len() - book.vacant.len();
        let still = book
            .idle
            .len()
            .wrapping_add(self.blocked.load(Ordering::SeqCst));
        book.returns.is_empty()
            && book.claims() == 0
            && still == threads + self.visitors.load(Ordering::SeqCst)
            && book
                .threads
                .iter()
                .all(|thread| thread.assignment.is_none())
    }

    /// Tells every thread to end: two parked ones now, each of which tells the next two, since to
    /// wake one takes as long as the end of one; the others when they retire.
    pub(crate) fn close(&self) -> Todo<D> {
        let mut book = self.book.lock();
        book.closed = true;
        let mut todo = Todo::none();
        for _ in 0..2 {
            if let Some(slot) = book.idle.pop() {
                self.assign(&mut book, &mut todo, slot, Assignment::Exit);
            }
        }
        todo
    }

    /// How many threads were started so far.
    pub(crate) fn threads(&self) -> usize {
        let book = self.book.lock();
        book.threads.len() - book.vacant.len()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::bring_together;

    fn taken(free: &[u16], nodes: &[u16], count: usize) -> Vec<u16> {
        let mut places = free.to_vec();
        bring_together(&mut places, nodes, count);
        let mut all = (free.to_vec(), places.clone());
        all.0.sort_unstable();
        all.1.sort_unstable();
        assert_eq!(all.0, all.1, "none is lost");
        let mut set = places.split_off(places.len() - count);
        set.sort_unstable();
        set
    }

    #[test]
    fn sets_stay_on_one_node_where_they_can() {
        let compact = [0, 0, 0, 0, 1, 1, 1, 1];
        let spread = [0, 1, 0, 1, 0, 1, 0, 1];
        assert_eq!(taken(&[7, 6, 5, 4, 3, 2, 1, 0], &compact, 4), [0, 1, 2, 3]);
        assert_eq!(taken(&[7, 6, 5, 4, 3, 2, 1, 0], &spread, 4), [0, 2, 4, 6]);
        // The node with fewer is left to whom it suffices.
        assert_eq!(taken(&[0, 4, 5, 1, 6], &compact, 2), [0, 1]);
        assert_eq!(taken(&[0, 4, 5, 1, 6], &compact, 3), [4, 5, 6]);
        // No node has enough: the one with the most, and what lacks from the other.
        assert_eq!(taken(&[0, 4, 5, 1, 6], &compact, 4), [0, 4, 5, 6]);
        assert_eq!(taken(&[3, 0, 4], &compact, 3), [0, 3, 4]);
        // As many nodes as it takes, and no more.
        let three = [0, 0, 1, 1, 1, 2];
        assert_eq!(taken(&[0, 1, 2, 3, 4, 5], &three, 5), [0, 1, 2, 3, 4]);
        assert_eq!(taken(&[5, 2, 0], &three, 1), [0]);
    }
}
