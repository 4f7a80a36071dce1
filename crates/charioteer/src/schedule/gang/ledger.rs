//! The ledger; see the module for its protocol.

use std::collections::VecDeque;

use smallvec::{SmallVec, smallvec};

use super::device::{Amount, Book, Due, Load};
use super::queue::{Order, Queue, Shape, Waiting};
use super::request::{Capacity, Coming, MOST_DEVICES, Plan, Request, bit, ones};
use crate::machine::{DeviceId, Event, Stream};

/// What bounds the ledger's freedom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// By how many device-times (one task on one device) younger tasks may overtake a waiting one.
    pub overtaking: u64,
    /// How many tasks of a device may be granted and not complete. With 0 a task takes only what no
    /// launched task uses any more.
    pub runahead: u32,
}

/// A task that was granted and whose body has not returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GrantId(u32);

/// A device that a task has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lent {
    /// The device.
    pub device: DeviceId,
    /// The stream that is the task's own until its body returns. If there is none, make one: the
    /// ledger learns of it by the event that the body leaves there.
    pub stream: Option<Stream>,
    /// What the stream has to wait for before the body enqueues anything.
    pub waits: SmallVec<[Event; 2]>,
}

/// What a task may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Its name until the body returns.
    pub id: GrantId,
    /// Which of the request's alternatives it is.
    pub alternative: usize,
    /// The devices, in the order of the alternative's members, without the cores among those.
    pub lent: SmallVec<[Lent; 2]>,
}

/// What to do next.
#[derive(Debug)]
pub enum Step<T> {
    /// Run this task.
    Start(T, Grant),
    /// The body has its share again, with the streams that it had, which may have to wait.
    Resume(Grant),
    /// The task was not wanted any more. It is handed out so that nothing is dropped in here.
    Unwanted(T),
}

/// One device of a task that was granted.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Part {
    book: usize,
    /// The stream's index, once it is known.
    stream: Option<usize>,
    /// Where it ends on the device's timeline.
    due: Due,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Runs,
    Paused,
    /// It stands in `Gang::returning`.
    Returns,
}

/// A task that was granted and whose body has not returned.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Running {
    state: State,
    alternative: usize,
    /// On each device.
    amount: Amount,
    load: Load,
    parts: SmallVec<[Part; 2]>,
}

/// What a task would get.
struct Choice {
    /// The index of the plan.
    plan: usize,
    /// The books, in the order of the alternative's members.
    books: SmallVec<[usize; 8]>,
    /// The estimated run time in nanoseconds, and when it begins, by the clock of estimates.
    estimate: u64,
    begin: u64,
    /// How long one of its devices idles before it, in nanoseconds, as estimated.
    idle: u64,
    /// When its data can be copied, by the same clock.
    ready: u64,
}

impl Choice {
    /// Whether a device would idle for more than a small part of the run time.
    fn idles(&self) -> bool {
        self.idle > self.estimate / 16
    }
}

/// The ledger of the devices and the tasks that wait for them. `T` stands for a task.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct Gang<T> {
    limits: Limits,
    capacities: Box<[Capacity]>,
    books: Box<[Book]>,
    /// The devices that are lost, as bits.
    lost: u64,
    /// How many tasks were granted.
    grants: u64,
    queue: Queue<T>,
    running: Vec<Option<Running>>,
    vacant: Vec<u32>,
    /// Bodies whose wait is over, in that order.
    returning: VecDeque<GrantId>,
    /// How many paused bodies keep memory.
    keeping: usize,
    /// What is held for returning bodies, and for them and a sweep's tasks, on each device. Made
    /// anew whenever somebody asks what is next.
    held: Box<[Amount]>,
    held_by_sweep: Box<[Amount]>,
    /// Of those who wait and have their data on one device: how many they are on each, and how long they
    /// take.
    homed: Box<[Homed]>,
    /// The devices on which a task with a share may start at all, as bits. Made anew like what is held.
    open: u64,
    /// There was nothing to do next, and nothing has happened since that could change that.
    idle: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Homed {
    tasks: u32,
    nanoseconds: u64,
}

impl<T> Gang<T> {
    /// A ledger of devices that nobody uses.
    ///
    /// # Panics
    /// With more than [`MOST_DEVICES`] devices.
    #[must_use]
    pub fn new(devices: &[Capacity], limits: Limits) -> Self {
        assert!(
            devices.len() <= MOST_DEVICES,
            "{MOST_DEVICES} devices at most"
        );
        let nothing = || vec![Amount::default(); devices.len()].into_boxed_slice();
        Self {
            limits,
            capacities: devices.into(),
            books: devices.iter().map(Book::new).collect(),
            lost: 0,
            grants: 0,
            queue: Queue::new(),
            running: Vec::new(),
            vacant: Vec::new(),
            returning: VecDeque::new(),
            keeping: 0,
            held: nothing(),
            held_by_sweep: nothing(),
            homed: vec![Homed::default(); devices.len()].into(),
            open: 0,
            idle: false,
        }
    }

    /// Lets a task wait for what it asks for.
    ///
    /// # Errors
    /// The task itself, if no alternative can be served by the devices that are left.
    pub fn submit(&mut self, token: T, request: Request) -> Result<(), T> {
        let (shape, priority, task) =
            (self.queue).admit(&self.capacities, self.lost, token, request)?;
        self.push(shape, priority, task);
        Ok(())
    }

    fn push(&mut self, shape: usize, priority: i32, task: Waiting<T>) {
        let (task, first) = self.queue.push(shape, priority, task);
        if let Some(home) = task.home {
            self.homed[home].tasks += 1;
            self.homed[home].nanoseconds += task.least();
        }
        // Nobody but the first of each shape is looked at, and others reckon with those who have a home.
        self.idle &= !first && task.home.is_none();
    }

    /// As [`submit`](Self::submit), and then [`next`](Self::next) for the first time. Who is alone, as
    /// mostly on devices that keep up, need not queue.
    ///
    /// # Errors
    /// The task itself, if no alternative can be served by the devices that are left.
    pub fn submit_last(&mut self, token: T, request: Request) -> Result<Option<Step<T>>, T> {
        let (index, priority, task) =
            (self.queue).admit(&self.capacities, self.lost, token, request)?;
        let is_alone = self.queue.live().is_empty() && self.returning.is_empty();
        // Of others more counts than what is free: the memory that paused bodies keep, whose data are where,
        // and what takes nothing.
        if !is_alone
            || self.keeping > 0
            || !task.transfers.is_empty()
            || self.queue.shape(index).takes_nothing()
        {
            self.push(index, priority, task);
            return Ok(None);
        }
        self.held.fill(Amount::default());
        self.open = self.open();
        let shape = self.queue.shape(index);
        let choice = if shape.is_shut_out(self.open) {
            Chosen::Nothing
        } else {
            let rules = Rules {
                held: &self.held,
                open: self.open,
                budget: u64::MAX,
                runahead: self.limits.runahead,
                waits: true,
            };
            choose(&self.books, &self.homed, shape, &task, &rules)
        };
        if let Chosen::Now(choice) = choice {
            return Ok(Some(self.grant(index, &choice, task)));
        }
        self.push(index, priority, task);
        Ok(None)
    }

    /// A task that waits may be wanted no more.
    pub fn withdrawn(&mut self) {
        self.idle = false;
    }

    /// Takes the first task of a shape out.
    fn pop(&mut self, shape: usize) -> Waiting<T> {
        let task = self.queue.pop(shape);
        if let Some(home) = task.home {
            self.homed[home].tasks -= 1;
            self.homed[home].nanoseconds -= task.least();
        }
        task
    }

    /// What to do next, until there is nothing. `wanted` says whether a waiting task is to run
    /// still; it is asked about those that would be next. Where that changes say [`withdrawn`](Self::withdrawn).
    pub fn next(&mut self, mut wanted: impl FnMut(&T) -> bool) -> Option<Step<T>> {
        if self.idle {
            return None;
        }
        let step = self.look(&mut wanted);
        self.idle = step.is_none();
        step
    }

    /// The devices on which a task with a share may start at all, as bits.
    fn open(&self) -> u64 {
        let books = self.books.iter().enumerate();
        let open = books.filter(|(_, book)| book.is_open(self.limits.runahead));
        open.fold(0, |all, (index, _)| all | bit(index))
    }

    fn look(&mut self, wanted: &mut impl FnMut(&T) -> bool) -> Option<Step<T>> {
        if self.queue.live().is_empty() && self.returning.is_empty() {
            return None;
        }
        self.held.fill(Amount::default());
        if let Some(grant) = self.next_return() {
            return Some(Step::Resume(grant));
        }
        self.open = self.open();
        for place in 0..self.queue.live().len() {
            let shape = self.queue.live()[place];
            let head = self.queue.shape(shape).head().expect("it is live");
            if !wanted(&head.token) {
                return Some(Step::Unwanted(self.pop(shape).token));
            }
        }
        for place in 0..self.queue.live().len() {
            let shape = self.queue.live()[place];
            if self.queue.shape(shape).takes_nothing()
                && let Some(step) = self.start(shape, Budget::Nothing, Held::ByReturns)
            {
                return Some(step);
            }
        }
        let (keeping, books) = (self.keeping, &self.books);
        self.queue.set_stuck(|plan| is_stuck(keeping, books, plan));
        let limit = self.limits.overtaking;
        if let &[shape] = self.queue.live() {
            // It has nobody to be ordered with, and nothing to be held from.
            if self.queue.shape(shape).is_stuck() {
                return None;
            }
            return self.start(shape, Budget::Bound, Held::ByReturns);
        }
        self.held_by_sweep.copy_from_slice(&self.held);
        let order = {
            let (books, homed) = (&self.books, &self.homed);
            let (held, open, runahead) = (&self.held, self.open, self.limits.runahead);
            self.queue.order(limit, |shape| {
                let rules = Rules {
                    held,
                    open,
                    budget: u64::MAX,
                    runahead,
                    waits: true,
                };
                // One that had rather wait is served too: devices are held for it.
                !matches!(choose_first(books, homed, shape, &rules), Chosen::Nothing)
            })
        };
        if let Some(shape) = self.filler(&order)
            && let Some(step) = self.start(shape, Budget::Bound, Held::BySweep)
        {
            return Some(step);
        }
        for &shape in &order.sweep {
            if let Some(step) = self.start(shape, Budget::Bound, Held::BySweep) {
                return Some(step);
            }
            self.hold(shape);
        }
        for &(shape, same_priority) in &order.others {
            let held = if same_priority {
                Held::BySweep
            } else {
                Held::ByReturns
            };
            if let Some(step) = self.start(shape, Budget::Bound, held) {
                return Some(step);
            }
        }
        None
    }

    /// Who of equal priority and size goes first on a device that would idle before the one whose turn it
    /// is, since its data have still to come.
    fn filler(&self, order: &Order) -> Option<usize> {
        let chosen = |shape: usize| {
            let rules = Rules {
                held: &self.held_by_sweep,
                open: self.open,
                budget: self.queue.budget(shape, self.limits.overtaking),
                runahead: self.limits.runahead,
                waits: true,
            };
            let shape = self.queue.shape(shape);
            match choose_first(&self.books, &self.homed, shape, &rules) {
                Chosen::Now(choice) => Some(choice),
                _ => None,
            }
        };
        let &first = order.sweep.first()?;
        let has_data = |head: &Waiting<T>| !head.transfers.is_empty();
        if !self.queue.shape(first).head().is_some_and(has_data) {
            return None;
        }
        let late = chosen(first).filter(Choice::idles)?;
        let size = self.queue.shape(first).size;
        let beside = order
            .others
            .iter()
            .filter(|(_, same_priority)| *same_priority);
        let beside = beside.map(|(shape, _)| *shape);
        let mut others = order.sweep[1..].iter().copied().chain(beside);
        others.find(|&shape| {
            let is_equal = self.queue.shape(shape).size == size;
            let on_it = |choice: &Choice| choice.books.iter().any(|book| late.books.contains(book));
            is_equal && chosen(shape).is_some_and(|choice| !choice.idles() && on_it(&choice))
        })
    }

    /// Starts the first task of a shape, if it fits.
    fn start(&mut self, index: usize, budget: Budget, held: Held) -> Option<Step<T>> {
        if self.queue.shape(index).is_shut_out(self.open) {
            return None;
        }
        let budget = match budget {
            Budget::Nothing => 0,
            Budget::Bound => self.queue.budget(index, self.limits.overtaking),
        };
        let held = match held {
            Held::ByReturns => &self.held,
            Held::BySweep => &self.held_by_sweep,
        };
        let runahead = self.limits.runahead;
        let shape = self.queue.shape(index);
        let declined = shape.declined();
        let rules = Rules {
            held,
            open: self.open,
            budget,
            runahead,
            waits: declined.is_none_or(|since| self.grants - since < self.limits.overtaking),
        };
        let choice = match choose_first(&self.books, &self.homed, shape, &rules) {
            Chosen::Now(choice) => choice,
            Chosen::Later => {
                self.queue.decline(index, self.grants);
                return None;
            }
            Chosen::Nothing => return None,
        };
        if !shape.plans[choice.plan].1.takes_nothing() {
            let devices = choice.books.iter().fold(0, |all, &book| all | bit(book));
            self.queue.overtake(index, devices, self.limits.overtaking);
        }
        let task = self.pop(index);
        Some(self.grant(index, &choice, task))
    }

    /// Gives a task of a shape what was chosen for it.
    fn grant(&mut self, shape: usize, choice: &Choice, task: Waiting<T>) -> Step<T> {
        let (alternative, ref plan) = self.queue.shape(shape).plans[choice.plan];
        let amount = Amount {
            share: plan.share,
            memory: plan.memory,
        };
        let runahead = self.limits.runahead;
        let load = Load {
            shares: amount.share > 0,
            nanoseconds: choice.estimate,
        };
        let mut parts = SmallVec::new();
        let mut lent = SmallVec::new();
        self.grants += 1;
        for &index in &choice.books {
            let data = task.transfer(index, choice.books.len());
            let book = &mut self.books[index];
            let taken = book.take(amount, &task.prefer, runahead);
            book.expect(choice.ready, data);
            let due = book.count(load, choice.begin);
            book.tail = self.grants;
            parts.push(Part {
                book: index,
                stream: taken.stream,
                due,
            });
            lent.push(Lent {
                device: book.id,
                stream: taken.stream.map(|stream| book.stream(stream)),
                waits: taken.waits,
            });
        }
        let running = Running {
            state: State::Runs,
            alternative,
            amount,
            load,
            parts,
        };
        let id = match self.vacant.pop() {
            Some(id) => {
                self.running[id as usize] = Some(running);
                GrantId(id)
            }
            None => {
                self.running.push(Some(running));
                GrantId(u32::try_from(self.running.len() - 1).expect("fewer than 2^32 bodies"))
            }
        };
        let grant = Grant {
            id,
            alternative,
            lent,
        };
        Step::Start(task.token, grant)
    }

    /// Holds devices for a sweep's task that does not fit yet: those on which it fits, then those
    /// that are free soonest. What it cannot get before a paused body goes on, or may not since somebody
    /// would be overtaken by too much, is held from those who can for nothing.
    fn hold(&mut self, shape: usize) {
        let budget = self.queue.budget(shape, self.limits.overtaking);
        let shape = self.queue.shape(shape);
        let head = shape.head().expect("it waits");
        // Where nothing is known, the narrowest.
        let costs = Costs::new(&self.books, &self.homed, head);
        let can = |(_, plan): &&(usize, Plan)| {
            plan.width() <= budget && !is_stuck(self.keeping, &self.books, plan)
        };
        let plan = (shape.plans.iter().filter(can)).min_by_key(|(alternative, plan)| {
            let finish = head.known(*alternative).map(|estimate| {
                let free = free_at(&self.books, plan, &costs);
                free.map_or(u64::MAX, |free| free.saturating_add(estimate))
            });
            (finish, plan.width())
        });
        let (alternative, plan) = plan.expect("the sweep comprises who can be served");
        let amount = Amount {
            share: plan.share,
            memory: plan.memory,
        };
        let known = head.known(*alternative).is_some();
        let least = costs.least(plan, |index| !self.books[index].lost);
        let mut used = 0;
        for &bits in &plan.members {
            let book = ones(bits & !used)
                .min_by_key(|&index| {
                    let book = &self.books[index];
                    let fits = book.fits(amount, self.held_by_sweep[index], self.limits.runahead);
                    let could = book.could_fit(amount);
                    // It may wait for the one that has its data.
                    let fits = fits || (costs.has_data() && could);
                    (!fits, !could, costs.rank(index, plan, known, least))
                })
                .expect("a plan has devices enough");
            used |= bit(book);
            self.held_by_sweep[book].hold(amount);
        }
    }

    /// The first returning body whose share is there; holds it for those before.
    fn next_return(&mut self) -> Option<Grant> {
        let runahead = self.limits.runahead;
        for place in 0..self.returning.len() {
            let id = self.returning[place];
            let running = self.running[id.0 as usize].as_mut().expect("it returns");
            let share = Amount {
                memory: 0,
                ..running.amount
            };
            let fits = running.parts.iter().all(|part| {
                self.books[part.book].fits_again(share, self.held[part.book], runahead)
            });
            if !fits {
                for part in &running.parts {
                    self.held[part.book].hold(share);
                }
                continue;
            }
            self.returning.remove(place);
            running.state = State::Runs;
            let (load, memory) = (running.load, running.amount.memory);
            self.keeping -= usize::from(memory > 0);
            let lent = running
                .parts
                .iter()
                .map(|part| {
                    let book = &mut self.books[part.book];
                    if book.lost {
                        return Lent {
                            device: book.id,
                            stream: None,
                            waits: SmallVec::new(),
                        };
                    }
                    book.resume(memory, load);
                    Lent {
                        device: book.id,
                        stream: part.stream.map(|stream| book.stream(stream)),
                        waits: book.take_again(share, part.stream),
                    }
                })
                .collect();
            return Some(Grant {
                id,
                alternative: running.alternative,
                lent,
            });
        }
        None
    }

    /// The body returned. `events` are the positions behind everything that it enqueued, one for
    /// each device in the order of [`Grant::lent`]. None stands for a device on which nothing is in
    /// flight: it is lost, or it is one without streams. What the task had is given back behind
    /// them, and the id is used no more.
    ///
    /// # Panics
    /// If it is not the id of a body that runs, or there are more or fewer events than devices.
    pub fn launched(&mut self, id: GrantId, events: &[Option<Event>]) {
        self.idle = false;
        let running = self.runs(id);
        assert_eq!(running.parts.len(), events.len(), "one event a device");
        let running = self.running[id.0 as usize].take().expect("it runs");
        self.vacant.push(id.0);
        for (part, &event) in running.parts.iter().zip(events) {
            let book = &mut self.books[part.book];
            if book.lost {
                continue;
            }
            match event {
                Some(event) => {
                    let stream = book.arrive(part.stream, event);
                    book.give_back(running.amount, Some((stream, event.position)));
                    book.launch(stream, event.position, running.load, part.due);
                }
                None => {
                    book.give_back(running.amount, None);
                    book.abandon(part.stream, running.load);
                }
            }
        }
    }

    /// The work up to this event is complete, or has failed.
    pub fn completed(&mut self, event: Event) {
        self.idle = false;
        let device = event.stream.device;
        if let Some(index) = find(&self.books, device) {
            self.books[index].complete(event);
        }
    }

    /// Work on the stream failed, and with it all that is behind it there: nobody gets it any more.
    pub fn failed(&mut self, stream: Stream) {
        self.idle = false;
        let device = stream.device;
        if let Some(index) = find(&self.books, device) {
            self.books[index].fail(stream);
        }
    }

    /// The body waits for something. It gives back its share behind these events, one for each
    /// device as for [`launched`](Self::launched), and keeps streams and memory.
    ///
    /// # Panics
    /// If it is not the id of a body that runs, or there are more or fewer events than devices.
    pub fn paused(&mut self, id: GrantId, events: &[Option<Event>]) {
        self.idle = false;
        self.runs(id).state = State::Paused;
        let running = self.running[id.0 as usize].as_mut().expect("it runs");
        assert_eq!(running.parts.len(), events.len(), "one event a device");
        let share = Amount {
            memory: 0,
            ..running.amount
        };
        self.keeping += usize::from(running.amount.memory > 0);
        for (part, &event) in running.parts.iter_mut().zip(events) {
            let book = &mut self.books[part.book];
            if book.lost {
                continue;
            }
            let behind = event.map(|event| {
                let stream = book.arrive(part.stream, event);
                part.stream = Some(stream);
                (stream, event.position)
            });
            book.give_back(share, behind);
            book.pause(running.amount.memory, running.load);
        }
    }

    /// The wait of the body is over: [`next`](Self::next) gives it its share back before anybody
    /// else.
    ///
    /// # Panics
    /// If it is not the id of a body that is paused.
    pub fn resumed(&mut self, id: GrantId) {
        self.idle = false;
        let running = self.running.get_mut(id.0 as usize).and_then(Option::as_mut);
        let running = running.expect("the id of a body");
        assert_eq!(running.state, State::Paused, "a body that is paused");
        running.state = State::Returns;
        self.returning.push_back(id);
    }

    fn runs(&mut self, id: GrantId) -> &mut Running {
        let running = self.running.get_mut(id.0 as usize).and_then(Option::as_mut);
        let running = running.expect("the id of a body");
        assert_eq!(running.state, State::Runs, "a body that runs");
        running
    }

    /// The device is lost. Gives the tasks that can be served no more. Running bodies that have it
    /// return as always; their part of it is void.
    pub fn fail_device(&mut self, device: DeviceId) -> Vec<T> {
        self.idle = false;
        let Some(index) = find(&self.books, device) else {
            return Vec::new();
        };
        self.books[index].lose();
        self.lost |= bit(index);
        let gone = self.queue.replan(&self.capacities, self.lost);
        self.homed.fill(Homed::default());
        let homed = &mut self.homed;
        self.queue.for_each(|task| {
            if let Some(home) = task.home {
                homed[home].tasks += 1;
                homed[home].nanoseconds += task.least();
            }
        });
        gone
    }

    /// How many paused bodies keep memory.
    #[must_use]
    pub fn keeping(&self) -> usize {
        self.keeping
    }

    /// Whether nothing here can move before a paused body goes on: tasks wait, every body is paused, and
    /// nothing is in flight.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.keeping > 0
            && self.waiting() > 0
            && self.returning.is_empty()
            && self.books.iter().all(|book| book.lost || book.is_at_rest())
    }

    /// Gives a task up that waits: the first of a shape that is `chosen`, else the first.
    pub fn give_up(&mut self, chosen: impl Fn(&T) -> bool) -> Option<T> {
        self.idle = false;
        let live = self.queue.live();
        let is_chosen = |shape: &&usize| {
            (self.queue.shape(**shape).head()).is_some_and(|head| chosen(&head.token))
        };
        let shape = *live.iter().find(is_chosen).or(live.first())?;
        Some(self.pop(shape).token)
    }

    /// What a device has before it, by its index: the estimated run times, in nanoseconds, of what was
    /// granted and is not complete, and how many tasks that is.
    ///
    /// # Panics
    /// If there is no such device.
    #[must_use]
    pub fn ahead(&self, index: usize) -> (u64, u32) {
        let book = &self.books[index];
        (book.ahead, book.unfinished())
    }

    /// The device-nanoseconds that those who wait take at least, as estimated.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.queue.work()
    }

    /// How many tasks wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.waiting()
    }
}

/// Whether a plan needs memory that paused bodies keep, so many of them.
fn is_stuck(keeping: usize, books: &[Book], plan: &Plan) -> bool {
    keeping > 0 && !plan.fits_in(|index| books[index].has_room(plan.memory))
}

/// Whose holds a task respects.
#[derive(Clone, Copy)]
enum Held {
    ByReturns,
    BySweep,
}

/// How much a task may take.
#[derive(Clone, Copy)]
enum Budget {
    /// Nothing.
    Nothing,
    /// As many devices as the bound on overtaking allows.
    Bound,
}

/// Within what a choice is made.
struct Rules<'a> {
    /// What is held for others.
    held: &'a [Amount],
    /// The devices on which a task with a share may start at all.
    open: u64,
    /// How many devices the task may take.
    budget: u64,
    runahead: u32,
    /// Whether it may wait though an alternative fits.
    waits: bool,
}

enum Chosen {
    Now(Choice),
    /// An alternative fits, and another one is estimated to finish earlier though it does not fit yet.
    Later,
    /// None fits.
    Nothing,
}

/// The [choice](choose) of the first task of a shape.
fn choose_first<T>(books: &[Book], homed: &[Homed], shape: &Shape<T>, rules: &Rules<'_>) -> Chosen {
    match shape.head() {
        Some(head) => choose(books, homed, shape, head, rules),
        None => Chosen::Nothing,
    }
}

/// The policy: which alternative a task of a shape, `head`, gets, and on which devices. It is the one
/// that is estimated to finish first: when its devices are free, and have its data, and its run time. If that
/// one does not fit yet, the task waits for it, unless it has waited for too many grants. Where run times are
/// not known the first one that fits is taken. Of the devices of a kind a task without data gets those that
/// have a stream to take over, then those that are free soonest, then the first; for one with data see
/// [`Costs::rank`]. Members of a kind are in the order of
/// their devices, so that a set is the same however it came about.
fn choose<T>(
    books: &[Book],
    homed: &[Homed],
    shape: &Shape<T>,
    head: &Waiting<T>,
    rules: &Rules<'_>,
) -> Chosen {
    if let Some(chosen) = only(books, shape, head, rules) {
        return chosen;
    }
    let costs = Costs::new(books, homed, head);
    let mut best: Option<(u64, Choice)> = None;
    // When the best of those that do not fit yet would finish.
    let mut later = u64::MAX;
    for (place, (alternative, plan)) in shape.plans.iter().enumerate() {
        if !plan.takes_nothing() && plan.width() > rules.budget {
            continue;
        }
        let known = head.known(*alternative);
        let fitting = fit(books, plan, rules, &costs, known.is_some());
        // Of a task with data another device may be better than the one that fits.
        if let (Some(estimate), true) = (known, rules.waits)
            && (fitting.is_none() || costs.has_data())
            && let Some(free) = free_at(books, plan, &costs)
        {
            later = later.min(free.saturating_add(estimate));
        }
        let Some(books_of_it) = fitting else {
            continue;
        };
        if known.is_none() && rules.waits && costs.had_rather(books_of_it[0], plan, rules) {
            return Chosen::Later;
        }
        let estimate = known.unwrap_or(0);
        let free = |&index: &usize| match known {
            Some(_) => costs.free(index, plan),
            None => books[index].ahead,
        };
        let free = books_of_it.iter().map(free).max();
        let finish = free.unwrap_or(0).saturating_add(estimate);
        if best.as_ref().is_none_or(|(least, _)| finish < *least) {
            let idle = match known {
                Some(_) if costs.has_data() => {
                    let idle = |&index: &usize| costs.idle(index, plan);
                    books_of_it.iter().map(idle).max()
                }
                _ => None,
            };
            let choice = Choice {
                plan: place,
                idle: idle.unwrap_or(0),
                books: books_of_it,
                estimate,
                begin: clock(books) + free.unwrap_or(0),
                ready: costs.now.saturating_add(costs.ready.0),
            };
            best = Some((finish, choice));
        }
    }
    match best {
        Some((finish, _)) if later < finish => Chosen::Later,
        Some((_, choice)) => Chosen::Now(choice),
        None => Chosen::Nothing,
    }
}

/// The choice of a task that names one device, and of which neither times nor data are known, as of most: there
/// is nothing to compare.
#[inline]
fn only<T>(
    books: &[Book],
    shape: &Shape<T>,
    head: &Waiting<T>,
    rules: &Rules<'_>,
) -> Option<Chosen> {
    let [(_, plan)] = &shape.plans[..] else {
        return None;
    };
    let [bits] = plan.members[..] else {
        return None;
    };
    if !bits.is_power_of_two() || head.is_reckoned() {
        return None;
    }
    let index = bits.trailing_zeros() as usize;
    let amount = Amount {
        share: plan.share,
        memory: plan.memory,
    };
    let may = (plan.takes_nothing() || rules.budget > 0)
        && (plan.share == 0 || rules.open & bits != 0)
        && books[index].fits(amount, rules.held[index], rules.runahead);
    Some(if may {
        Chosen::Now(Choice {
            plan: 0,
            books: smallvec![index],
            estimate: 0,
            begin: clock(books) + books[index].ahead,
            idle: 0,
            ready: 0,
        })
    } else {
        Chosen::Nothing
    })
}

/// How many tasks more than another device one may have before it, and still be taken since a task's data
/// are there, where run times are not known.
pub(super) const PATIENCE: u32 = 2;

/// A transfer holds others up for so large a part of its time, as is reckoned.
const CONTENTION: u64 = 4;

/// The place of a device's book: mostly that of the device among its kind.
fn find(books: &[Book], device: DeviceId) -> Option<usize> {
    let index = usize::from(device.index());
    match books.get(index) {
        Some(book) if book.id == device => Some(index),
        _ => books.iter().position(|book| book.id == device),
    }
}

/// The time of the clock by which run times are estimated: when the last one of those tasks was due that are
/// complete.
fn clock(books: &[Book]) -> u64 {
    let past = books.iter().map(|book| book.past.nanoseconds);
    past.max().unwrap_or(0)
}

/// What counts of a task where devices are compared.
struct Costs<'a, T> {
    books: &'a [Book],
    homed: &'a [Homed],
    head: &'a Waiting<T>,
    /// The devices that have a stream to take over.
    preferred: u64,
    /// When the predecessors that are in flight are complete, at the latest: by the estimated run times,
    /// and by how many tasks are unfinished there.
    ready: (u64, u32),
    /// What the [`clock`] says, if that counts.
    now: u64,
}

/// Which device is better: the least.
type Rank = (u64, u64, bool, u64, u64);

impl<'a, T> Costs<'a, T> {
    fn new(books: &'a [Book], homed: &'a [Homed], head: &'a Waiting<T>) -> Self {
        let (mut preferred, mut ready) = (0, (0, 0));
        // Nobody asks for the time of others.
        let now = if head.is_reckoned() { clock(books) } else { 0 };
        for &event in &head.prefer {
            let device = event.stream.device;
            let Some(index) = find(books, device) else {
                continue;
            };
            let book = &books[index];
            if book.takeover(event).is_some() {
                preferred |= bit(index);
            }
            if !head.transfers.is_empty()
                && let Some((time, tasks)) = book.due(event, now)
            {
                ready = (time.max(ready.0), tasks.max(ready.1));
            }
        }
        Self {
            books,
            homed,
            head,
            preferred,
            ready,
            now,
        }
    }

    fn has_data(&self) -> bool {
        !self.head.transfers.is_empty()
    }

    fn data(&self, index: usize, plan: &Plan) -> Coming {
        self.head.transfer(index, plan.members.len())
    }

    fn transfer(&self, index: usize, plan: &Plan) -> u64 {
        self.data(index, plan).time
    }

    /// What others have to do on a device who wait for it, since their data are there.
    fn others(&self, index: usize) -> Homed {
        if !self.has_data() {
            return Homed::default();
        }
        let mut others = self.homed[index];
        if self.head.home == Some(index) {
            others.tasks -= 1;
            others.nanoseconds -= self.head.least();
        }
        others
    }

    /// When a device is free for the task, and has its data, in nanoseconds from now.
    fn free(&self, index: usize, plan: &Plan) -> u64 {
        let data = self.data(index, plan);
        let free = self.books[index].free(self.now) + self.others(index).nanoseconds;
        // Data come while the device has others to do, and links between devices are shared.
        let shared = data.links.saturating_sub(data.from_host);
        free.max(self.there(index, data))
            .saturating_add(shared / CONTENTION)
    }

    /// When a device has the task's data, in nanoseconds from now.
    fn there(&self, index: usize, data: Coming) -> u64 {
        self.books[index].arrival(self.now, self.ready.0, data)
    }

    /// How long a device idles until the task's data are there.
    fn idle(&self, index: usize, plan: &Plan) -> u64 {
        let there = self.there(index, self.data(index, plan));
        there.saturating_sub(self.books[index].free(self.now))
    }

    /// How many tasks a device has before it that the task would not wait for anyway.
    fn tasks(&self, index: usize) -> u32 {
        self.books[index].unfinished().max(self.ready.1) + self.others(index).tasks
    }

    /// The fewest tasks that one of these devices of a plan has before it.
    fn least(&self, plan: &Plan, counts: impl Fn(usize) -> bool) -> u32 {
        let devices = ones(plan.devices()).filter(|&index| counts(index));
        devices.map(|index| self.tasks(index)).min().unwrap_or(0)
    }

    /// Whether a task whose run time is not known waits for another device, on which a body runs at the
    /// moment, rather than to have its data brought to the one that is free.
    fn had_rather(&self, fitting: usize, plan: &Plan, rules: &Rules<'_>) -> bool {
        let &[bits] = &plan.members[..] else {
            return false;
        };
        if !self.has_data() {
            return false;
        }
        let amount = Amount {
            share: plan.share,
            memory: plan.memory,
        };
        let could = |index: &usize| self.books[*index].could_fit(amount);
        let least = self.least(plan, |index| could(&index));
        let best = ones(bits)
            .filter(could)
            .min_by_key(|&index| self.rank(index, plan, false, least));
        best.is_some_and(|best| {
            best != fitting
                && self.transfer(best, plan) < self.transfer(fitting, plan)
                && self.books[best].unfinished() != 0
                && !self.books[best].fits(amount, rules.held[best], rules.runahead)
        })
    }

    /// A task without data prefers a stream to take over, then what is free soonest. One with data and a
    /// known run time, what is free soonest and has the data; one with an unknown run time, what has
    /// the data soonest, among the devices that do not have more than [`PATIENCE`] tasks more than `least`.
    fn rank(&self, index: usize, plan: &Plan, known: bool, least: u32) -> Rank {
        let book = &self.books[index];
        let (other, ahead) = (self.preferred & bit(index) == 0, book.ahead);
        let unfinished = u64::from(book.unfinished());
        if !self.has_data() {
            return (0, 0, other, ahead, unfinished);
        }
        if known {
            let free = self.free(index, plan);
            let gap = free.saturating_sub(book.free(self.now));
            return (free, gap, other, ahead, unfinished);
        }
        let (tasks, transfer) = (self.tasks(index), self.transfer(index, plan));
        if tasks <= least + PATIENCE {
            (0, transfer, other, u64::from(tasks), unfinished)
        } else {
            (1, u64::from(tasks), other, transfer, unfinished)
        }
    }
}

/// When a plan's devices are free, in nanoseconds from now, as estimated. None while paused bodies keep
/// the memory that it needs, and where nobody has any of them: then they are held for another task, which
/// may wait for what is held for this one.
fn free_at<T>(books: &[Book], plan: &Plan, costs: &Costs<'_, T>) -> Option<u64> {
    let (mut used, mut free, mut is_busy) = (0, 0, false);
    for &bits in &plan.members {
        let books_of_it = ones(bits & !used).filter(|&index| books[index].has_room(plan.memory));
        let book = books_of_it.min_by_key(|&index| costs.free(index, plan))?;
        used |= bit(book);
        free = free.max(costs.free(book, plan));
        is_busy |= books[book].unfinished() != 0;
    }
    is_busy.then_some(free)
}

/// The best devices for a plan, in the order of its members, if it fits.
///
/// A set runs ahead only behind its own predecessors, or where the last task of all its devices is
/// the same. Elsewhere its devices would become free one after the other and wait for the last one,
/// while a task that is chosen when they are free keeps them busy.
fn fit<T>(
    books: &[Book],
    plan: &Plan,
    rules: &Rules<'_>,
    costs: &Costs<'_, T>,
    known: bool,
) -> Option<SmallVec<[usize; 8]>> {
    let amount = Amount {
        share: plan.share,
        memory: plan.memory,
    };
    let (held, preferred) = (rules.held, costs.preferred);
    let open = if plan.share > 0 { rules.open } else { u64::MAX };
    let fits = |index: usize| {
        open & bit(index) != 0 && books[index].fits(amount, held[index], rules.runahead)
    };
    let least = if costs.has_data() && !known {
        costs.least(plan, fits)
    } else {
        0
    };
    let rank = |index: usize| costs.rank(index, plan, known, least);
    if let [bits] = plan.members[..] {
        return soonest(bits, preferred == 0, rank, fits).map(|book| smallvec![book]);
    }
    let mut left = ones(plan.devices())
        .filter(|&index| fits(index))
        .fold(0, |all, index| all | bit(index));
    if u64::from(left.count_ones()) < plan.width() {
        return None;
    }
    let mut chosen: SmallVec<[usize; 8]> = SmallVec::new();
    for &bits in &plan.members {
        let book = soonest(bits & left, preferred == 0, rank, |_| true)?;
        left &= !bit(book);
        chosen.push(book);
    }
    let tail = books[chosen[0]].tail;
    let ends_at_once = chosen.iter().all(|&index| books[index].tail == tail)
        || chosen.iter().all(|&index| {
            preferred & bit(index) != 0 || books[index].fits_at_rest(amount, held[index])
        });
    if !ends_at_once {
        return None;
    }
    for one in 0..chosen.len() {
        for other in one + 1..chosen.len() {
            if plan.members[one] == plan.members[other] && chosen[one] > chosen[other] {
                chosen.swap(one, other);
            }
        }
    }
    Some(chosen)
}

/// Of those of the devices that fit the best one, the first of equals. `other`: none has a stream to take
/// over.
fn soonest(
    devices: u64,
    other: bool,
    rank: impl Fn(usize) -> Rank,
    fits: impl Fn(usize) -> bool,
) -> Option<usize> {
    let least = (0, 0, other, 0, 0);
    let mut best = None;
    for index in ones(devices).filter(|&index| fits(index)) {
        let rank = rank(index);
        if rank == least {
            return Some(index);
        }
        if best.is_none_or(|(least, _)| rank < least) {
            best = Some((rank, index));
        }
    }
    best.map(|(_, index)| index)
}
