//! What the runtime claims of tasks, held against the evidence, record by record.

use std::collections::HashMap;

use smallvec::SmallVec;

use super::capacity::{Book, Needs, Use};
use super::{Checked, Rule, Violation};
use crate::machine::{DeviceId, Enqueued, Event as DevicePosition, HOST, Observed, Stream};
use crate::schedule::gang::WHOLE;
use crate::trace::evidence::{Evidence, Position, Track};
use crate::trace::file::TraceFile;
use crate::trace::numbers::ByNumber;
use crate::trace::record::{DeviceEvent, DeviceRecord, Event, Record};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum State {
    #[default]
    New,
    Spawned,
    Ready,
    Running,
    Suspended,
    Ended,
    Over,
}

#[derive(Default)]
struct Task {
    state: State,
    dependencies: Vec<u64>,
    /// Where its work ends, by stream.
    ends: SmallVec<[Position; 2]>,
    /// What it has of devices.
    grant: Option<usize>,
}

/// A member of a set that was granted.
struct Member {
    device: DeviceId,
    share: u32,
    track: Option<Track>,
    /// The use of the device's compute, unless the body waits, and that of its memory.
    compute: Option<usize>,
    store: usize,
    /// What dependencies left that nothing puts before what the body enqueues here, if it does.
    unordered: Vec<(u64, Position)>,
    returned: bool,
}

struct Grant {
    task: u64,
    /// When it was granted, and how many members were promised.
    time: u64,
    members: u16,
    list: SmallVec<[Member; 2]>,
    /// How many cores it comprises, and those that the body has, by their numbers.
    cores: usize,
    has: SmallVec<[u32; 2]>,
    begun: bool,
    /// When the first member was given back.
    returned: Option<u64>,
}

pub(super) struct Claims<'a> {
    trace: &'a TraceFile,
    evidence: Evidence,
    tasks: ByNumber<Task>,
    /// Tasks in the order in which they appear.
    order: Vec<u64>,
    grants: Vec<Grant>,
    /// Who has a stream.
    lent: HashMap<Track, usize>,
    /// How many cores there are, unless nobody keeps account of them, and who has which.
    cores: Option<u32>,
    has_core: HashMap<u32, u64>,
    uses: Vec<Use>,
    books: HashMap<DeviceId, Book>,
    /// How many events of devices there were.
    records: u64,
    checked: Checked,
}

impl<'a> Claims<'a> {
    pub(super) fn new(trace: &'a TraceFile) -> Self {
        Self {
            evidence: Evidence::new(&trace.devices),
            trace,
            tasks: ByNumber::default(),
            order: Vec::with_capacity(trace.names.len()),
            grants: Vec::new(),
            lent: HashMap::new(),
            cores: None,
            has_core: HashMap::new(),
            uses: Vec::new(),
            books: HashMap::new(),
            records: 0,
            checked: Checked::default(),
        }
    }

    /// What people call a task.
    fn name(&self, task: u64) -> String {
        match self.trace.names.get(&task) {
            Some(name) => format!("{name} (task {task})"),
            None => format!("task {task}"),
        }
    }

    fn violate(&mut self, rule: Rule, task: u64, other: Option<u64>, text: String) {
        self.checked.violations.push(Violation {
            rule,
            task,
            other,
            text,
        });
    }

    fn entry(&mut self, task: u64) -> &mut Task {
        let order = &mut self.order;
        self.tasks.entry(task).or_insert_with(|| {
            order.push(task);
            Task::default()
        })
    }

    // ---- tasks ------------------------------------------------------------------------------

    pub(super) fn task(&mut self, record: &Record) {
        let task = record.task;
        let entry = self.entry(task);
        let state = entry.state;
        let next = match (state, record.event) {
            (State::New, Event::Spawn) => State::Spawned,
            (State::Spawned, Event::Edge) => {
                entry.dependencies.push(record.other);
                State::Spawned
            }
            (State::Spawned | State::Suspended, Event::Ready) => State::Ready,
            (State::Ready, Event::Start) => State::Running,
            (State::Running, Event::Suspend) => State::Suspended,
            // A body that went elsewhere ends there.
            (State::Running | State::Suspended, Event::End) => State::Ended,
            // Its copies are in the order of those to whom the data belong.
            (State::Ready, Event::Carry) => State::Ended,
            (State::Ended, Event::Retry) => State::Spawned,
            (State::Ended, Event::Done | Event::Failed) => State::Over,
            // Skipped, cancelled, kept from beginning by a device, or never spawned.
            (State::New | State::Spawned | State::Ready, Event::Failed) => State::Over,
            (State::Over, Event::Done | Event::Failed) => {
                let text = format!("{} ended twice", self.name(task));
                return self.violate(Rule::End, task, None, text);
            }
            (state, event) => {
                let text = format!(
                    "{}: {} while it is {state:?}",
                    self.name(task),
                    event.name()
                );
                return self.violate(Rule::End, task, None, text);
            }
        };
        entry.state = next;
        let grant = entry.grant.map(|grant| &self.grants[grant]);
        let on_host = grant.is_none_or(|grant| grant.cores != 0);
        match record.event {
            Event::Start if on_host => self.begins_on_host(task),
            Event::End => {
                // Who went elsewhere left its cores before.
                if state == State::Running {
                    self.has_all_cores(task, "ends");
                }
                self.leaves(task);
            }
            Event::Suspend | Event::Failed => self.leaves(task),
            _ => {}
        }
    }

    /// The body of a task with cores and devices has as many cores as its set.
    fn has_all_cores(&mut self, task: u64, what: &str) {
        let Some(index) = self.tasks[&task].grant else {
            return;
        };
        let (has, cores) = (self.grants[index].has.len(), self.grants[index].cores);
        if self.cores.is_some() && has != cores {
            let text = format!(
                "{} {what} with {has} of the {cores} cores of its set",
                self.name(task)
            );
            self.violate(Rule::Set, task, None, text);
        }
    }

    /// The body of a task has its cores no more, if it had any.
    fn leaves(&mut self, task: u64) {
        if let Some(index) = self.tasks.get(&task).and_then(|task| task.grant) {
            for core in std::mem::take(&mut self.grants[index].has) {
                if self.has_core.get(&core) == Some(&task) {
                    self.has_core.remove(&core);
                }
            }
        }
    }

    /// The body of a task has this core.
    fn is_lent_core(&mut self, task: u64, core: u32) {
        let Some(index) = self.grant(task, "is lent a core") else {
            return;
        };
        self.grants[index].has.push(core);
        if let Some(other) = self.has_core.insert(core, task) {
            let text = format!(
                "{} is lent core {core} while {} has it",
                self.name(task),
                self.name(other)
            );
            self.violate(Rule::Lending, task, Some(other), text);
        }
        if self.cores.is_none_or(|cores| core >= cores) {
            let text = format!(
                "{} is lent core {core}, which there is not",
                self.name(task)
            );
            self.violate(Rule::Capacity, task, None, text);
        }
    }

    /// A body without streams begins: all that its dependencies did is complete.
    fn begins_on_host(&mut self, task: u64) {
        for dependency in self.tasks[&task].dependencies.clone() {
            let Some(before) = self.tasks.get(&dependency) else {
                continue;
            };
            self.checked.pairs += 1;
            let unseen = before.ends.iter().find(|&&end| !self.evidence.is_seen(end));
            if before.state != State::Over {
                self.not_returned(task, dependency);
            } else if let Some(&end) = unseen {
                let text = format!(
                    "{} begins on the host before that saw the work of {} complete, up to {}",
                    self.name(task),
                    self.name(dependency),
                    self.place(end),
                );
                self.violate(Rule::Order, task, Some(dependency), text);
            }
        }
    }

    fn not_returned(&mut self, task: u64, dependency: u64) {
        let text = format!(
            "{} begins before {}, which it depends on, has ended",
            self.name(task),
            self.name(dependency),
        );
        self.violate(Rule::Order, task, Some(dependency), text);
    }

    fn place(&self, (track, position): Position) -> String {
        place(self.evidence.stream(track), position)
    }

    // ---- devices ----------------------------------------------------------------------------

    pub(super) fn device(&mut self, record: &DeviceRecord) {
        self.records += 1;
        let task = record.task;
        match record.event {
            DeviceEvent::Capacity {
                device: HOST,
                share,
                ..
            } => {
                self.cores = Some(share / WHOLE);
            }
            DeviceEvent::Capacity {
                device,
                share,
                memory,
            } => {
                self.books.insert(device, Book::new(share.into(), memory));
            }
            DeviceEvent::Granted {
                device,
                member,
                members,
                share,
                memory,
                ..
            } => self.granted(record, device, (member, members), (share, memory)),
            DeviceEvent::Lent(core) if core.device == HOST => {
                self.is_lent_core(task, core.number);
            }
            DeviceEvent::Lent(stream) => self.is_lent(task, stream),
            DeviceEvent::Left => self.leaves(task),
            DeviceEvent::Begun => self.begins(task),
            DeviceEvent::Paused { member, behind } => self.paused(task, member, behind),
            DeviceEvent::Resumed => self.resumed(task),
            DeviceEvent::Returned { member, behind } => {
                self.returned(record.time, task, member, behind);
            }
            DeviceEvent::Observed(observed) => {
                if let Observed::Enqueued(event, kind) = observed
                    && kind != Enqueued::Free
                {
                    self.enqueued(task, event);
                }
                self.evidence.learn(observed, self.records);
            }
        }
    }

    /// The grant that a task has, or a violation.
    fn grant(&mut self, task: u64, what: &str) -> Option<usize> {
        let grant = self.tasks.get(&task).and_then(|task| task.grant);
        if grant.is_none() {
            let text = format!("{} {what} without a grant", self.name(task));
            self.violate(Rule::Set, task, None, text);
        }
        grant
    }

    /// A use of a device that opens when the body begins.
    fn take(&mut self, task: u64, needs: Needs) -> usize {
        let index = self.uses.len();
        self.uses.push(Use::new(task, needs));
        index
    }

    /// Closes a use of a device, behind an event.
    fn give(&mut self, index: usize, device: DeviceId, behind: Option<DevicePosition>) {
        if let Some(event) = behind {
            let end = (self.evidence.track(event.stream), event.position);
            self.uses[index].end = Some(end);
        }
        if let Some(book) = self.books.get_mut(&device) {
            book.give(index);
        }
    }

    fn granted(
        &mut self,
        record: &DeviceRecord,
        device: DeviceId,
        (member, members): (u16, u16),
        (share, memory): (u32, u64),
    ) {
        let task = record.task;
        let open = self.entry(task).grant;
        let index = match open {
            Some(index) if member != 0 => index,
            Some(_) => {
                let text = format!("{} is granted devices while it has some", self.name(task));
                return self.violate(Rule::Set, task, None, text);
            }
            None => {
                let index = self.grants.len();
                self.grants.push(Grant {
                    task,
                    time: record.time,
                    members,
                    list: SmallVec::new(),
                    cores: 0,
                    has: SmallVec::new(),
                    begun: false,
                    returned: None,
                });
                self.entry(task).grant = Some(index);
                self.checked.grants += 1;
                index
            }
        };
        if device == HOST {
            let grant = &mut self.grants[index];
            grant.cores += 1;
            if grant.time != record.time || grant.members != members {
                let text = format!("{} is granted a core apart from its set", self.name(task));
                self.violate(Rule::Set, task, None, text);
            }
            return;
        }
        let compute = self.take(task, Needs::Share(share));
        let store = self.take(task, Needs::Memory(memory));
        let grant = &mut self.grants[index];
        let unknown = !self.books.contains_key(&device);
        let twice = grant.list.iter().any(|other| other.device == device);
        let apart = grant.time != record.time || grant.members != members;
        grant.list.push(Member {
            device,
            share,
            track: None,
            compute: Some(compute),
            store,
            unordered: Vec::new(),
            returned: false,
        });
        if unknown {
            let text = format!(
                "{} is granted {device}, which there is not",
                self.name(task)
            );
            self.violate(Rule::Capacity, task, None, text);
        } else if twice {
            let text = format!("{} is granted {device} twice", self.name(task));
            self.violate(Rule::Set, task, None, text);
        } else if apart {
            let text = format!("{} is granted {device} apart from its set", self.name(task));
            self.violate(Rule::Set, task, None, text);
        }
    }

    fn is_lent(&mut self, task: u64, stream: Stream) {
        let Some(index) = self.grant(task, "is lent a stream") else {
            return;
        };
        let track = self.evidence.track(stream);
        if let Some(other) = self.lent.insert(track, index)
            && other != index
        {
            let other = self.grants[other].task;
            let text = format!(
                "{} is lent {} while {} has it",
                self.name(task),
                stream_name(stream),
                self.name(other),
            );
            self.violate(Rule::Lending, task, Some(other), text);
        }
        let grant = &mut self.grants[index];
        let member = grant
            .list
            .iter_mut()
            .find(|member| member.device == stream.device);
        if let Some(member) = member {
            member.track = Some(track);
        } else {
            let text = format!(
                "{} is lent {}, of a device that it was not granted",
                self.name(task),
                stream_name(stream),
            );
            self.violate(Rule::Lending, task, None, text);
        }
    }

    /// The body of a task with streams begins, or goes on after a wait.
    fn begins(&mut self, task: u64) {
        let Some(index) = self.grant(task, "begins on devices") else {
            return;
        };
        let first = !std::mem::replace(&mut self.grants[index].begun, true);
        let Grant {
            list,
            members,
            cores,
            ..
        } = &self.grants[index];
        let (devices, members) = (list.len(), usize::from(*members));
        let there = devices + cores;
        if first && there != members {
            let text = format!(
                "{} begins with {there} of the {members} devices of its set",
                self.name(task),
            );
            self.violate(Rule::Set, task, None, text);
        }
        if first {
            self.has_all_cores(task, "begins");
        }
        for at in 0..devices {
            let member = &self.grants[index].list[at];
            let clock = member.track.and_then(|track| self.evidence.now(track));
            let first = member.track.map_or(0, |track| self.evidence.first(track));
            let (device, track) = (member.device, member.track);
            for index_of in member.compute.into_iter().chain(Some(member.store)) {
                let using = &mut self.uses[index_of];
                if using.begun.is_none() {
                    using.begun = Some(self.records);
                    using.track = track;
                    using.clock = clock;
                    using.first = first;
                    if let Some(book) = self.books.get_mut(&device) {
                        book.take(index_of);
                    }
                }
            }
        }
        if first {
            self.begins_after_dependencies(task, index);
        }
    }

    fn begins_after_dependencies(&mut self, task: u64, index: usize) {
        for dependency in self.tasks[&task].dependencies.clone() {
            let Some(before) = self.tasks.get(&dependency) else {
                continue;
            };
            self.checked.pairs += 1;
            if !matches!(before.state, State::Ended | State::Over) {
                self.not_returned(task, dependency);
                continue;
            }
            for member in &mut self.grants[index].list {
                let Some(track) = member.track else { continue };
                let clock = self.evidence.now(track);
                let unordered = before.ends.iter().filter(|&&end| {
                    end.0 != track && !self.evidence.is_seen(end) && !self.evidence.has(clock, end)
                });
                member
                    .unordered
                    .extend(unordered.map(|&end| (dependency, end)));
            }
        }
    }

    /// Something was enqueued, by the body of `task` if that is not zero.
    fn enqueued(&mut self, task: u64, event: DevicePosition) {
        let track = self.evidence.track(event.stream);
        let position = (track, event.position);
        let Some(&index) = self.lent.get(&track) else {
            return;
        };
        let grant = &mut self.grants[index];
        // Others may use a stream for themselves before the body begins.
        if !grant.begun || (task != 0 && task != grant.task) || !self.evidence.runs(position) {
            return;
        }
        let owner = grant.task;
        let Some(member) = grant
            .list
            .iter_mut()
            .find(|member| member.track == Some(track))
        else {
            return;
        };
        for using in member.compute.into_iter().chain(Some(member.store)) {
            self.uses[using].worked = true;
        }
        let unordered = std::mem::take(&mut member.unordered);
        let ends = &mut self.tasks.get_mut(&owner).expect("it has a grant").ends;
        match ends.iter_mut().find(|end| end.0 == track) {
            Some(end) => end.1 = end.1.max(event.position),
            None => ends.push(position),
        }
        for (dependency, end) in unordered {
            // The body may have waited by itself.
            if self.evidence.has(self.evidence.clock(position), end) {
                continue;
            }
            let text = format!(
                "what {} enqueues at {} is not behind the work of {}, which ends at {}: no order of \
                 the stream, no wait, and the host had not seen it complete",
                self.name(owner),
                self.place(position),
                self.name(dependency),
                self.place(end),
            );
            self.violate(Rule::Order, owner, Some(dependency), text);
        }
    }

    fn paused(&mut self, task: u64, member: u16, behind: Option<DevicePosition>) {
        let Some(index) = self.grant(task, "waits") else {
            return;
        };
        let Some(member) = self.grants[index].list.get_mut(usize::from(member)) else {
            let text = format!("{} gives back a share that it has not", self.name(task));
            return self.violate(Rule::Set, task, None, text);
        };
        let device = member.device;
        match member.compute.take() {
            Some(compute) => self.give(compute, device, behind),
            None => {
                let text = format!("{} gives its share of {device} back twice", self.name(task));
                self.violate(Rule::Capacity, task, None, text);
            }
        }
    }

    fn resumed(&mut self, task: u64) {
        let Some(index) = self.grant(task, "goes on") else {
            return;
        };
        for at in 0..self.grants[index].list.len() {
            let member = &self.grants[index].list[at];
            let (device, share, is_paused) =
                (member.device, member.share, member.compute.is_none());
            if is_paused {
                let compute = self.take(task, Needs::Share(share));
                self.grants[index].list[at].compute = Some(compute);
            } else {
                let text = format!("{} gets a share of {device} that it has", self.name(task));
                self.violate(Rule::Capacity, task, None, text);
            }
        }
    }

    fn returned(&mut self, time: u64, task: u64, member: u16, behind: Option<DevicePosition>) {
        let Some(index) = self.grant(task, "gives devices back") else {
            return;
        };
        let grant = &mut self.grants[index];
        let apart = *grant.returned.get_or_insert(time) != time;
        let Some(member) = grant.list.get_mut(usize::from(member)) else {
            let text = format!("{} gives back a device that it has not", self.name(task));
            return self.violate(Rule::Set, task, None, text);
        };
        let (device, track, store) = (member.device, member.track, member.store);
        if std::mem::replace(&mut member.returned, true) {
            let text = format!("{} gives {device} back twice", self.name(task));
            return self.violate(Rule::Capacity, task, None, text);
        }
        let compute = member.compute.take();
        if grant.list.iter().all(|member| member.returned) {
            self.tasks.get_mut(&task).expect("it has a grant").grant = None;
        }
        if let Some(track) = track {
            if self.lent.get(&track) == Some(&index) {
                self.lent.remove(&track);
            }
            // Frees that others put behind it are none of its work.
            if let Some(event) = behind {
                let ends = &mut self.tasks.get_mut(&task).expect("it has a grant").ends;
                if let Some(end) = ends.iter_mut().find(|end| end.0 == track) {
                    end.1 = end.1.min(event.position);
                }
            }
        }
        for using in compute.into_iter().chain(Some(store)) {
            self.give(using, device, behind);
        }
        if apart {
            let text = format!("{} gives {device} back apart from its set", self.name(task));
            self.violate(Rule::Set, task, None, text);
        }
    }

    // ---- the end ----------------------------------------------------------------------------

    pub(super) fn finish(mut self) -> Checked {
        for at in 0..self.order.len() {
            let task = self.order[at];
            let Task { state, grant, .. } = &self.tasks[&task];
            let (state, grant) = (*state, *grant);
            if state != State::Over {
                let text = format!("{} has no end, it is {state:?}", self.name(task));
                self.violate(Rule::End, task, None, text);
            }
            if let Some(grant) = grant {
                let kept: Vec<String> = self.grants[grant]
                    .list
                    .iter()
                    .filter(|member| !member.returned)
                    .map(|member| member.device.to_string())
                    .collect();
                let text = format!("{} never gives {} back", self.name(task), kept.join(", "));
                self.violate(Rule::Capacity, task, None, text);
            }
        }
        self.checked.tasks = self.order.len();
        for using in &mut self.uses {
            using.seen = using.end.and_then(|end| self.evidence.seen(end));
        }
        let mut devices: Vec<DeviceId> = self.books.keys().copied().collect();
        devices.sort_unstable();
        for device in devices {
            let book = self.books.remove(&device).expect("it was there");
            for excess in book.settle(&self.uses, &self.evidence) {
                let using = &self.uses[excess.using];
                let what = using.needs.describe(&book);
                let (name, device_of) = (self.name(using.task), device);
                let (other, why) = match excess.other {
                    Some(other) => {
                        let end = self.uses[other].end;
                        let other = self.uses[other].task;
                        let behind = match end {
                            Some(end) => format!("whose work ends at {}", self.place(end)),
                            None => "which has not given its part back".to_owned(),
                        };
                        let why = format!("nothing puts that after {}, {behind}", self.name(other));
                        (Some(other), why)
                    }
                    None => (None, "that is more than there is".to_owned()),
                };
                let text = format!("{name} takes {what} of {device_of}, and {why}");
                let task = using.task;
                self.violate(Rule::Capacity, task, other, text);
            }
        }
        self.checked
    }
}

fn stream_name(stream: Stream) -> String {
    format!("stream {} of {}", stream.number, stream.device)
}

fn place(stream: Stream, position: u64) -> String {
    format!("position {position} of {}", stream_name(stream))
}
