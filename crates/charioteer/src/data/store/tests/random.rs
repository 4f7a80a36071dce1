//! Random programs against plain arrays.
//!
//! A program is a sequence of tasks that read and write overlapping and strided regions of a few arrays,
//! on one device, on two, or on the host, with announcements, prefetches, evictions and plans that come
//! to nothing between them. It is played through the store in virtual time, each task as an operation on
//! its stream, and at once on plain arrays. What tasks write follows from what they read, so that an
//! element that was not where it should have been shows in the end. Some arrays are in memory of a device at
//! first, where their owner has them still to be written, and are there again in the end.
//!
//! Beside that a *model* is told what the store tells: which version of each element is in which
//! instance. It refuses a copy of what is not there, and one into a memory that has the same version
//! already.

use std::collections::HashMap;

use super::*;

/// Random numbers: xorshift.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }

    fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

fn mix(a: u64, b: u64) -> u64 {
    (a ^ b.rotate_left(29))
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .rotate_left(31)
}

/// Calls with each index of a region.
fn each(region: &Region, mut call: impl FnMut(&[u64])) {
    let spans = region.spans();
    for number in 0..region.elements() {
        let mut rest = number;
        let mut index = vec![0; spans.len()];
        for (axis, span) in spans.iter().enumerate().rev() {
            index[axis] = span.start() + rest % span.count() * span.step();
            rest /= span.count();
        }
        call(&index);
    }
}

/// How elements lie in some bytes.
#[derive(Clone)]
struct Layout {
    strides: Vec<u64>,
    origin: Vec<u64>,
    item: usize,
}

impl Layout {
    fn home(storage: &Storage) -> Self {
        Self {
            strides: storage.strides.to_vec(),
            origin: vec![0; storage.strides.len()],
            item: storage.item as usize,
        }
    }

    fn view(view: &View, item: u64) -> Self {
        Self {
            strides: view.strides.to_vec(),
            origin: view.origin.to_vec(),
            item: item as usize,
        }
    }

    fn place(&self, index: &[u64]) -> usize {
        let axes = index.iter().zip(&self.origin).zip(&self.strides);
        axes.map(|((at, origin), stride)| (at - origin) * stride)
            .sum::<u64>() as usize
    }

    fn get(&self, bytes: &[u8], index: &[u64]) -> u64 {
        let place = self.place(index);
        let element = &bytes[place..place + self.item];
        element
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn set(&self, bytes: &mut [u8], index: &[u64], value: u64) {
        let place = self.place(index);
        for (at, byte) in bytes[place..place + self.item].iter_mut().enumerate() {
            *byte = (value >> (8 * at)) as u8;
        }
    }

    /// What a task learns that reads the region.
    fn read(&self, bytes: &[u8], region: &Region, known: u64) -> u64 {
        let mut known = known;
        each(region, |index| known = mix(known, self.get(bytes, index)));
        known
    }

    /// What a task does that writes the region.
    fn write(&self, bytes: &mut [u8], region: &Region, touch: Touch, known: u64) {
        each(region, |index| {
            let place = index.iter().fold(1, |place, at| mix(place, *at));
            let old = if touch.reads() {
                self.get(bytes, index)
            } else {
                0
            };
            self.set(bytes, index, mix(mix(known, place), old));
        });
    }
}

#[derive(Clone, Debug)]
struct Access {
    array: usize,
    region: Region,
    touch: Touch,
}

impl Access {
    fn conflicts(&self, other: &Self) -> bool {
        self.array == other.array
            && (self.touch.writes() || other.touch.writes())
            && self.region.overlaps(&other.region)
    }
}

#[derive(Clone, Debug)]
enum Kind {
    Device(DeviceId, u64),
    /// Two devices; whether what is written is split, along the first axis.
    Set([DeviceId; 2], bool),
    Host,
}

#[derive(Clone, Debug)]
struct Task {
    number: u64,
    kind: Kind,
    accesses: Vec<Access>,
    announced: bool,
}

impl Task {
    /// What each of its members wants.
    fn members(&self) -> Vec<(DeviceId, Vec<Access>)> {
        match self.kind {
            Kind::Device(device, _) => vec![(device, self.accesses.clone())],
            Kind::Host => Vec::new(),
            Kind::Set(devices, split) => {
                let member = |at: u64| {
                    let accesses = self.accesses.iter();
                    accesses.map(move |access| {
                        let mut access = access.clone();
                        if split && access.touch.writes() {
                            let count = access.region.spans()[0].count();
                            let half = count.div_ceil(2);
                            let part = [Span::range(0, half), Span::range(half, count)];
                            access.region = access.region.select(0, part[at as usize]);
                        }
                        access
                    })
                };
                vec![
                    (devices[0], member(0).collect()),
                    (devices[1], member(1).collect()),
                ]
            }
        }
    }
}

/// Which version of each element is in which instance.
struct Model {
    shapes: Vec<Vec<u64>>,
    numbers: HashMap<u64, usize>,
    versions: Vec<HashMap<Vec<u64>, u64>>,
    /// By array, device and box.
    there: HashMap<(usize, DeviceId, Region), HashMap<Vec<u64>, u64>>,
    copies: u64,
}

/// On which device an array brought memory along.
fn home_of(storage: &Storage) -> Option<DeviceId> {
    storage.adopted().map(|own| own.pointer.device)
}

impl Model {
    fn new(storages: &[Arc<Storage>]) -> Self {
        let mut model = Self {
            shapes: storages.iter().map(|it| shape(it)).collect(),
            numbers: storages.iter().map(|it| it.id()).zip(0..).collect(),
            versions: Vec::new(),
            there: HashMap::new(),
            copies: 0,
        };
        for (array, storage) in storages.iter().enumerate() {
            let mut versions = HashMap::new();
            each(&storage.whole, |index| {
                versions.insert(index.to_vec(), 0);
            });
            if home_of(storage).is_none() {
                model
                    .there
                    .insert((array, HOST, storage.whole.clone()), versions.clone());
            }
            model.versions.push(versions);
        }
        model
    }

    fn moved(&mut self, moved: &Moved) {
        let array = self.numbers[&moved.storage];
        if moved.event.is_none() {
            let gone = self
                .there
                .remove(&(array, moved.from, moved.source.clone()));
            assert!(gone.is_some(), "{moved:?} drops what was not there");
            return;
        }
        if moved.bytes == 0 {
            let place = (array, moved.to, moved.target.clone());
            let before = self.there.insert(place, self.versions[array].clone());
            assert!(before.is_none(), "{moved:?} is there already");
            return;
        }
        self.copies += 1;
        let source = (array, moved.from, moved.source.clone());
        let target = (array, moved.to, moved.target.clone());
        each(&moved.region, |index| {
            let version = self.versions[array][index];
            let from = self.there.get(&source).and_then(|it| it.get(index));
            assert_eq!(
                from,
                Some(&version),
                "{moved:?} copies what is not there: {index:?}"
            );
            let has = |key: &(usize, DeviceId, Region)| {
                let place = self.there.get(key);
                place.is_some_and(|it| it.get(index) == Some(&version))
            };
            // Within a memory copies keep overlapping instances in agreement.
            let twice = if moved.from == moved.to {
                has(&target)
            } else {
                let keys = self.there.keys();
                let mut near = keys.filter(|key| key.0 == array && key.1 == moved.to);
                near.any(has)
            };
            assert!(!twice, "{moved:?} brings what is there: {index:?}");
            self.there
                .entry(target.clone())
                .or_default()
                .insert(index.to_vec(), version);
        });
    }

    /// A task wrote a region into an instance.
    fn wrote(
        &mut self,
        array: usize,
        region: &Region,
        device: DeviceId,
        at: &Region,
        version: u64,
    ) {
        let target = (array, device, at.clone());
        each(region, |index| {
            self.versions[array].insert(index.to_vec(), version);
            let place = self.there.entry(target.clone()).or_default();
            place.insert(index.to_vec(), version);
        });
    }
}

fn shape(storage: &Storage) -> Vec<u64> {
    storage.whole.spans().iter().map(Span::count).collect()
}

/// A task that is planned and not launched.
struct Open {
    task: Task,
    held: Vec<(Held, Stream)>,
}

struct Play {
    dice: Dice,
    machine: Arc<Machine>,
    store: Store,
    told: Arc<Mutex<Vec<Moved>>>,
    storages: Vec<Arc<Storage>>,
    plain: Vec<Vec<u8>>,
    streams: Vec<Vec<Stream>>,
    done: Vec<(Task, Vec<Event>)>,
    open: Vec<Open>,
    model: Model,
    /// What was read otherwise than it should have been.
    wrong: Arc<Mutex<Vec<String>>>,
    memory: u64,
}

fn some_span(dice: &mut Dice, extent: u64) -> Span {
    let start = dice.below(extent);
    let step = 1 + if dice.percent(30) { dice.below(3) } else { 0 };
    let most = (extent - start).div_ceil(step);
    Span::new(start, step, 1 + dice.below(most))
}

/// A tile of a grid, mostly; else anything.
fn some_region(dice: &mut Dice, shape: &[u64], tiled: bool) -> Region {
    if dice.percent(3) {
        return Region::new(shape.iter().map(|_| Span::EMPTY));
    }
    if dice.percent(5) {
        return Region::whole(shape);
    }
    Region::new(shape.iter().map(|&extent| {
        if tiled {
            let start = dice.below(extent) / 3 * 3;
            Span::range(start, (start + 3).min(extent))
        } else {
            some_span(dice, extent)
        }
    }))
}

fn some_tasks(
    dice: &mut Dice,
    shapes: &[Vec<u64>],
    gpus: u16,
    count: u64,
    tiled: u64,
) -> Vec<Task> {
    let mut tasks = Vec::new();
    while (tasks.len() as u64) < count {
        let mut accesses: Vec<Access> = Vec::new();
        for _ in 0..=dice.below(3) {
            let array = dice.below(shapes.len() as u64) as usize;
            let is_tile = dice.percent(tiled);
            let access = Access {
                array,
                region: some_region(dice, &shapes[array], is_tile),
                touch: [Touch::Read, Touch::Write, Touch::Update][dice.below(3) as usize],
            };
            let clashes =
                |it: &Access| access.conflicts(it) && access.touch.writes() && it.touch.writes();
            if !accesses.iter().any(clashes) {
                accesses.push(access);
            }
        }
        let one = DeviceId::gpu(dice.below(u64::from(gpus)) as u16);
        let other = DeviceId::gpu((one.index() + 1) % gpus);
        let kind = match dice.below(10) {
            0 => Kind::Host,
            // What one member reads another must not write.
            1 | 2 if gpus > 1 => {
                let clash = accesses.iter().enumerate().any(|(at, access)| {
                    let others = accesses[at + 1..].iter();
                    others.into_iter().any(|other| access.conflicts(other))
                });
                let thin = |it: &Access| it.region.spans()[0].count() < 2;
                if clash || accesses.iter().any(thin) {
                    Kind::Device(one, 0)
                } else {
                    Kind::Set([one, other], dice.percent(60))
                }
            }
            3 => Kind::Device(one, 1 + dice.below(40)),
            _ => Kind::Device(one, 0),
        };
        tasks.push(Task {
            number: tasks.len() as u64 + 1,
            kind,
            accesses,
            announced: dice.percent(70),
        });
    }
    tasks
}

impl Play {
    fn wants<'a>(storages: &'a [Arc<Storage>], accesses: &'a [Access]) -> Vec<Want<'a>> {
        let accesses = accesses.iter();
        accesses
            .map(|it| want(&storages[it.array], &it.region, it.touch))
            .collect()
    }

    fn hear(&mut self) {
        let told = std::mem::take(&mut *self.told.lock().unwrap());
        told.iter().for_each(|moved| self.model.moved(moved));
    }

    fn some_stream(&mut self, device: DeviceId) -> Stream {
        let streams = &self.streams[usize::from(device.index())];
        streams[self.dice.below(streams.len() as u64) as usize]
    }

    /// What a member of the task takes of its device.
    fn needs(&self, task: &Task) -> Vec<(DeviceId, u64)> {
        let memory = if let Kind::Device(_, memory) = task.kind {
            memory
        } else {
            0
        };
        let members = task.members().into_iter();
        members
            .map(|(device, accesses)| {
                let wants = Self::wants(&self.storages, &accesses);
                (device, memory + self.store.footprint(&wants, Some(device)))
            })
            .collect()
    }

    /// Whether the task may be planned beside those that are open.
    fn fits(&self, task: &Task) -> bool {
        let conflicts = |open: &Open| {
            let others = &open.task.accesses;
            task.accesses
                .iter()
                .any(|it| others.iter().any(|other| it.conflicts(other)))
        };
        if self.open.iter().any(conflicts) {
            return false;
        }
        let mut taken = vec![0; self.machine.gpus()];
        for task in self.open.iter().map(|it| &it.task).chain([task]) {
            for (device, bytes) in self.needs(task) {
                taken[usize::from(device.index())] += bytes;
            }
        }
        taken.iter().all(|bytes| *bytes <= self.memory)
    }

    /// The task on the plain arrays: what it learns.
    fn play_plain(&mut self, task: &Task) -> u64 {
        let mut known = task.number;
        for access in task.accesses.iter().filter(|it| it.touch == Touch::Read) {
            let layout = Layout::home(&self.storages[access.array]);
            known = layout.read(&self.plain[access.array], &access.region, known);
        }
        for access in task.accesses.iter().filter(|it| it.touch.writes()) {
            let layout = Layout::home(&self.storages[access.array]);
            layout.write(
                &mut self.plain[access.array],
                &access.region,
                access.touch,
                known,
            );
        }
        known
    }

    fn order(&self, task: &Task, stream: Option<Stream>) {
        for (before, events) in &self.done {
            let mut accesses = task.accesses.iter();
            if !accesses.any(|it| before.accesses.iter().any(|other| it.conflicts(other))) {
                continue;
            }
            for event in events {
                match stream {
                    Some(stream) => self.machine.device(stream.device).wait(stream, *event),
                    None => self.machine.device(event.stream.device).synchronize(*event),
                }
                .unwrap();
            }
        }
    }

    fn plan(&mut self, task: &Task) {
        let memory = if let Kind::Device(_, memory) = task.kind {
            memory
        } else {
            0
        };
        let mut held = Vec::new();
        for (device, accesses) in task.members() {
            let stream = self.some_stream(device);
            self.order(task, Some(stream));
            let wants = Self::wants(&self.storages, &accesses);
            let missing = self.store.missing(&wants, device);
            let before = self.model.copies;
            held.push((
                self.store
                    .ensure(task.number, stream, &wants, memory)
                    .unwrap(),
                stream,
            ));
            self.hear();
            let brought = self.model.copies != before;
            // Evictions copy, too; but what was missing was brought.
            assert!(missing.time.is_zero() || brought, "{missing:?} for nothing");
        }
        if task.announced {
            self.store
                .retract(task.number, &Self::wants(&self.storages, &task.accesses));
        }
        self.open.push(Open {
            task: task.clone(),
            held,
        });
    }

    fn launch(&mut self, open: Open) {
        let Open { task, held } = open;
        let known = self.play_plain(&task);
        let mut members = Vec::new();
        let mut events = Vec::new();
        for ((device, accesses), (held, stream)) in task.members().into_iter().zip(held) {
            if let Kind::Device(_, memory @ 1..) = task.kind {
                // What it was promised is there.
                let gpu = self.machine.device(device);
                let own = gpu.allocate(memory, stream).unwrap();
                gpu.free(own, stream).unwrap();
            }
            self.enqueue(&task, &accesses, &held, stream, known);
            let event = self.machine.device(device).record(stream).unwrap();
            events.push(event);
            members.push((held, Some(event)));
        }
        // Wherever it was, it is not the last version any more.
        for (device, accesses) in task.members() {
            let hulls = hulls(&self.storages, &accesses, device);
            for (access, hull) in accesses.iter().zip(hulls) {
                if access.touch.writes() && !access.region.is_empty() {
                    let version = task.number;
                    self.model
                        .wrote(access.array, &access.region, device, &hull, version);
                }
            }
        }
        self.store.launched(members);
        self.hear();
        self.done.push((task, events));
    }

    fn enqueue(
        &self,
        task: &Task,
        accesses: &[Access],
        held: &Held,
        stream: Stream,
        expected: u64,
    ) {
        let known_by_all = Arc::new(Mutex::new(task.number));
        let reads = accesses.iter().zip(held.views()).enumerate();
        let (reads, writes): (Vec<_>, Vec<_>) =
            reads.partition(|(_, (access, _))| access.touch == Touch::Read);
        for (_, (access, view)) in reads {
            if access.region.is_empty() {
                continue;
            }
            let layout = Layout::view(view, self.storages[access.array].item);
            let (region, known) = (access.region.clone(), Arc::clone(&known_by_all));
            let reach = reach(&layout, &region);
            operate(&self.machine, stream, view, reach, move |bytes| {
                let mut known = known.lock().unwrap();
                *known = layout.read(bytes, &region, *known);
            });
        }
        let wrong = Arc::clone(&self.wrong);
        let known = Arc::clone(&known_by_all);
        let name = format!("{task:?}");
        let check = move || {
            let known = *known.lock().unwrap();
            if known != expected {
                wrong.lock().unwrap().push(name);
            }
            Ok(())
        };
        let gpu = gpu(&self.machine, stream.device);
        gpu.enqueue(stream, Box::new(check)).unwrap();
        for (_, (access, view)) in writes {
            if access.region.is_empty() {
                continue;
            }
            let layout = Layout::view(view, self.storages[access.array].item);
            let (region, touch) = (access.region.clone(), access.touch);
            let known = Arc::clone(&known_by_all);
            let reach = reach(&layout, &region);
            operate(&self.machine, stream, view, reach, move |bytes| {
                layout.write(bytes, &region, touch, *known.lock().unwrap());
            });
        }
    }

    fn run_on_host(&mut self, task: &Task) {
        self.order(task, None);
        let wants = Self::wants(&self.storages, &task.accesses);
        let events = self.store.ensure_host(&wants).unwrap();
        self.hear();
        for event in events {
            self.machine
                .device(event.stream.device)
                .synchronize(event)
                .unwrap();
        }
        let known = self.play_plain(task);
        let mut learnt = task.number;
        for access in task.accesses.iter().filter(|it| it.touch == Touch::Read) {
            let storage = &self.storages[access.array];
            learnt = Layout::home(storage).read(&bytes(storage), &access.region, learnt);
        }
        assert_eq!(learnt, known, "{task:?} read something else");
        for access in task.accesses.iter().filter(|it| it.touch.writes()) {
            let storage = &self.storages[access.array];
            let first = std::ptr::with_exposed_provenance_mut(storage.address() as usize);
            // SAFETY: the bytes live as long as the storage, and nothing else uses these elements.
            let home =
                unsafe { std::slice::from_raw_parts_mut::<u8>(first, storage.bytes() as usize) };
            Layout::home(storage).write(home, &access.region, access.touch, known);
            let whole = storage.whole.clone();
            self.model
                .wrote(access.array, &access.region, HOST, &whole, task.number);
        }
        self.done.push((task.clone(), Vec::new()));
    }

    fn close_some(&mut self, all: bool) {
        while !self.open.is_empty() && (all || self.dice.percent(60)) {
            let at = self.dice.below(self.open.len() as u64) as usize;
            let open = self.open.remove(at);
            self.launch(open);
        }
    }

    fn step(&mut self, task: &Task) {
        if let Kind::Host = task.kind {
            self.close_some(true);
            self.run_on_host(task);
            return;
        }
        if !self.fits(task) {
            self.close_some(true);
        }
        self.plan(task);
        if self.dice.percent(6) {
            // It comes to nothing, and is planned again.
            let open = self.open.pop().unwrap();
            for (held, _) in open.held {
                self.store.abandon(held);
            }
            self.plan(task);
        }
        self.close_some(false);
    }

    fn disturb(&mut self, tiled: u64) {
        let array = self.dice.below(self.storages.len() as u64) as usize;
        let is_tile = self.dice.percent(tiled);
        let region = some_region(&mut self.dice, &self.model.shapes[array], is_tile);
        let device = DeviceId::gpu(self.dice.below(self.machine.gpus() as u64) as u16);
        let storage = &self.storages[array];
        let read = want(storage, &region, Touch::Read);
        let is_written = self.open.iter().any(|open| {
            let mut accesses = open.task.accesses.iter();
            accesses.any(|it| it.array == array && it.touch.writes() && it.region.overlaps(&region))
        });
        let is_used = |open: &Open| open.task.accesses.iter().any(|it| it.array == array);
        let is_used = self.open.iter().any(is_used);
        match self.dice.below(5) {
            // A task that reads would have its place in the order, too.
            0 if !is_written && self.store.footprint(&[read], Some(device)) <= self.memory => {
                match self.store.prefetch(storage, &region, device) {
                    Ok(_) | Err(DeviceError::OutOfMemory { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            1 if !is_written => drop(self.store.evict(storage, &region, device).unwrap()),
            2 if !is_used => drop(self.store.return_memory(storage)),
            _ => {
                for _ in 0..self.dice.below(30) {
                    self.machine.as_virtual().unwrap().clock().advance();
                }
            }
        }
        self.hear();
    }
}

/// How many bytes from where a layout begins a region goes.
fn reach(layout: &Layout, region: &Region) -> u64 {
    let last: Vec<u64> = region.spans().iter().map(|span| span.end() - 1).collect();
    (layout.place(&last) + layout.item) as u64
}

/// The box of the instance that serves each access, worked out by itself.
fn hulls(storages: &[Arc<Storage>], accesses: &[Access], device: DeviceId) -> Vec<Region> {
    let mut hulls: Vec<Region> = accesses
        .iter()
        .map(|it| it.region.hull(&it.region))
        .collect();
    loop {
        let before = hulls.clone();
        for a in 0..accesses.len() {
            for b in 0..accesses.len() {
                if accesses[a].array == accesses[b].array && hulls[a].overlaps(&hulls[b]) {
                    hulls[a] = hulls[a].hull(&hulls[b]);
                }
            }
        }
        if hulls == before {
            break;
        }
    }
    for (access, hull) in accesses.iter().zip(&mut hulls) {
        let storage = &storages[access.array];
        if home_of(storage) == Some(device) {
            *hull = storage.whole.clone();
        }
    }
    hulls
}

fn play(seed: u64) {
    let mut dice = Dice(mix(seed, 77) | 1);
    let gpus = 1 + dice.below(3) as u16;
    let shapes: Vec<Vec<u64>> = (0..1 + dice.below(3))
        .map(|_| match dice.below(4) {
            0 => vec![1 + dice.below(24)],
            1 => vec![2 + dice.below(3), 1 + dice.below(4), 1 + dice.below(5)],
            _ => vec![1 + dice.below(8), 1 + dice.below(9)],
        })
        .collect();
    let plain: Vec<Vec<u8>> = shapes
        .iter()
        .map(|shape| {
            let item = [1, 3, 8][dice.below(3) as usize];
            let bytes = shape.iter().product::<u64>() * item;
            (0..bytes).map(|_| dice.below(256) as u8).collect()
        })
        .collect();
    let storages: Vec<Arc<Storage>> = shapes
        .iter()
        .zip(&plain)
        .map(|(shape, bytes)| {
            let item = bytes.len() as u64 / shape.iter().product::<u64>();
            array(shape, item, bytes.clone())
        })
        .collect();
    let tiled = [0, 50, 90, 100][dice.below(4) as usize];
    let count = 10 + dice.below(50);
    let tasks = some_tasks(&mut dice, &shapes, gpus, count, tiled);
    let (peers, slack) = (
        dice.percent(60),
        [100, 100, 130, 200, 400][dice.below(5) as usize],
    );
    // Down to what the largest task takes.
    let probe = Store::new(machine(usize::from(gpus), 1, peers));
    let needs = tasks.iter().flat_map(|task| {
        let memory = if let Kind::Device(_, memory) = task.kind {
            memory
        } else {
            0
        };
        let members = task.members().into_iter();
        let needs = members.map(|(_, accesses)| {
            memory + probe.footprint(&Play::wants(&storages, &accesses), None)
        });
        needs.collect::<Vec<_>>()
    });
    let memory = needs.max().unwrap_or(1).max(1) * slack / 100;
    // Beside that there is room for what others have.
    let others: u64 = storages.iter().map(|it| it.bytes()).sum();
    let machine = machine(usize::from(gpus), memory + others, peers);
    let mut taken = vec![0; usize::from(gpus)];
    let storages: Vec<Arc<Storage>> = storages
        .into_iter()
        .map(|storage| {
            if dice.percent(60) {
                return storage;
            }
            let device = dice.below(u64::from(gpus)) as u16;
            taken[usize::from(device)] += storage.bytes();
            abroad(&machine, DeviceId::gpu(device), &storage)
        })
        .collect();
    let store = Store::new(Arc::clone(&machine));
    for room in &mut store.state.lock().rooms {
        room.capacity = memory;
    }
    let streams = (0..gpus).map(|index| {
        let device = machine.device(DeviceId::gpu(index));
        (0..1 + dice.below(3))
            .map(|_| device.create_stream().unwrap())
            .collect()
    });
    let mut play = Play {
        told: watch(&store),
        model: Model::new(&storages),
        streams: streams.collect(),
        machine,
        store,
        storages,
        plain,
        done: Vec::new(),
        open: Vec::new(),
        wrong: Arc::default(),
        memory,
        dice,
    };
    let ahead = play.dice.below(12) as usize;
    for at in 0..tasks.len() + ahead {
        if let Some(task) = tasks.get(at).filter(|it| it.announced) {
            let wants = Play::wants(&play.storages, &task.accesses);
            play.store.announce(task.number, &wants);
        }
        if let Some(task) = at.checked_sub(ahead).and_then(|at| tasks.get(at)) {
            play.step(task);
            if let Kind::Host = task.kind {
                let wants = Play::wants(&play.storages, &task.accesses);
                play.store.retract(task.number, &wants);
            }
        }
        if play.dice.percent(50) {
            play.disturb(tiled);
        }
    }
    play.close_some(true);
    let events = play.store.come_home();
    play.hear();
    finish(&play.machine);
    for event in events {
        let device = play.machine.device(event.stream.device);
        assert_eq!(device.is_complete(event), Ok(true));
    }
    assert_eq!(*play.wrong.lock().unwrap(), [""; 0], "read something else");
    for (storage, plain) in play.storages.iter().zip(&play.plain) {
        let found = match storage.adopted() {
            Some(own) => fetched(&play.machine, own.pointer, storage.bytes()),
            None => bytes(storage),
        };
        assert_eq!(&found, plain, "{storage:?} differs");
    }
    for (counters, index) in play.store.counters().iter().zip(0..) {
        assert_eq!(counters.resident, 0);
        assert!(counters.peak <= memory);
        let device = play.machine.device(DeviceId::gpu(index));
        let left = memory + others - taken[usize::from(index)];
        assert_eq!(device.free_memory(), left, "something was not given back");
    }
}

#[test]
fn programs_leave_what_they_would_have_left_on_plain_arrays() {
    let asked = |name| {
        std::env::var(name)
            .ok()
            .and_then(|it| it.parse::<u64>().ok())
    };
    let first = asked("CHARIOTEER_SEED");
    let count = asked("CHARIOTEER_CASES").unwrap_or(if first.is_some() { 1 } else { 100 });
    // One in which two wants of each member share an instance, and both are written by all members.
    let shared = [100_916];
    for seed in (first.unwrap_or(0)..).take(count as usize).chain(shared) {
        let result = std::panic::catch_unwind(|| play(seed));
        if let Err(panic) = result {
            eprintln!("CHARIOTEER_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}
