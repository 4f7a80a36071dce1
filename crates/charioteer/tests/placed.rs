//! Random programs of accesses on virtual devices, with real bytes, against a sequential oracle.
//!
//! A program is a list of tasks with accesses to parts of two arrays in all modes: on cores, on any device
//! or a certain one, on pairs of devices with pieces or equal copies, on sets with a core, or where they are
//! mapped to; and accesses of the host, prefetches and evictions between them. Bodies on devices enqueue
//! what they do there: what they write is a digest of what they read. The oracle does the same in the
//! order of the list. Tasks fail in their body or on the device, are cancelled, repeated, and wait. Devices
//! have much memory or hardly any, are virtual in real and in virtual time, fail copies and get lost. Some
//! arrays bring memory of a device along, which is still to be written when the program begins.
#![cfg(not(loom))]

mod common;

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use charioteer::data::store::Adopted;
use charioteer::gang::{Alternative, Member, WHOLE};
use charioteer::machine::virtual_gpu::VirtualGpu;
use charioteer::machine::{
    Description, Device, DeviceError, DeviceId, DevicePointer, Event, HOST, Kind, Machine, Stream,
    Time,
};
use charioteer::mapping::{Choice, On};
use charioteer::native::{
    Access, AccessTrouble, Datum, HostError, Mode, Part, Runtime, SpawnError, Task, TaskError,
    View, current,
};
use charioteer::region::{Region, Span};
use charioteer::task::Need;
use proptest::prelude::*;

use common::parts::{ELEMENTS, Gridded, SHAPE, Use, Where, exclude_each_other, place};
use common::{prove, take_trace, trace_path, within_on};

const CORE: Member = Member::Any(Kind::Cpu);
const GPU: Member = Member::Any(Kind::Gpu);
/// Stands for the host's failure to have what was lost.
const LOST: usize = usize::MAX;

#[derive(Clone, Copy, Debug, PartialEq)]
enum On_ {
    Cores,
    Any,
    This(u16),
    /// Two devices, each with its piece along the first axis of what is written.
    Shards,
    /// Two devices that write the same.
    Copies,
    /// A core and a device, each with its piece.
    Mixed,
    /// A core or a device.
    Mapped,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Twist {
    None,
    Fails,
    /// Its work on the device does.
    Faults,
    Cancelled,
    /// Its first attempt fails.
    Repeated,
    /// It waits for a child of its own.
    Waits,
    /// The host reads or writes, instead of a task.
    Host,
    Prefetched(u16),
    Evicted(u16),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mishap {
    None,
    /// So many copies later one of the device fails.
    Copy(u16, u64),
    /// So many operations later the device is lost.
    Loss(u16, u64),
}

#[derive(Clone, Debug)]
struct Plan {
    workers: usize,
    gpus: u16,
    time: Time,
    memory: u64,
    runahead: u32,
    mishap: Mishap,
    /// On which device each array is at first, if on any.
    abroad: [Option<u16>; 2],
    tasks: Vec<(Vec<Use>, On_, Twist, u64)>,
}

fn on() -> impl Strategy<Value = On_> {
    prop_oneof![
        2 => Just(On_::Cores),
        4 => Just(On_::Any),
        2 => (0..3_u16).prop_map(On_::This),
        1 => Just(On_::Shards),
        1 => Just(On_::Copies),
        1 => Just(On_::Mixed),
        1 => Just(On_::Mapped),
    ]
}

fn plan(mishaps: bool) -> impl Strategy<Value = Plan> {
    let machine = (
        0..4_usize,
        1..4_u16,
        prop::bool::ANY,
        0..3_usize,
        0..3_usize,
    );
    // Where tasks commute none fails: whom a failure in a group concerns is told elsewhere.
    (machine, prop::bool::ANY, 1..5_u32).prop_flat_map(move |(machine, commutes, kinds)| {
        let commutes = commutes && !mishaps;
        let mode = if commutes {
            prop_oneof![
                1 => Just(Mode::In),
                1 => Just(Mode::Out),
                1 => Just(Mode::InOut),
                2 => Just(Mode::Commute)
            ]
            .boxed()
        } else {
            prop_oneof![2 => Just(Mode::In), 2 => Just(Mode::Out), 2 => Just(Mode::InOut)].boxed()
        };
        let ordered = prop::bool::weighted(0.95);
        let access =
            (0..2_usize, place(kinds), mode, ordered).prop_map(|(array, at, mode, ordered)| Use {
                array,
                at,
                mode,
                // What is unordered races: it reads, and nobody looks at what.
                ordered: ordered || mode != Mode::In,
            });
        let weight = u32::from(!commutes);
        let twist = prop_oneof![
            16 => Just(Twist::None),
            weight => Just(Twist::Fails),
            weight => Just(Twist::Faults),
            weight => Just(Twist::Cancelled),
            1 => Just(Twist::Repeated),
            1 => Just(Twist::Waits),
            2 => Just(Twist::Host),
            1 => (0..3_u16).prop_map(Twist::Prefetched),
            1 => (0..3_u16).prop_map(Twist::Evicted),
        ];
        let task = (prop::collection::vec(access, 1..4), on(), twist, 0..60_u64);
        let (workers, gpus, is_real, memory, runahead) = machine;
        let mishap = if mishaps {
            prop_oneof![
                (0..gpus, 1..6_u64).prop_map(|(gpu, count)| Mishap::Copy(gpu, count)),
                (0..gpus, 1..20_u64).prop_map(|(gpu, count)| Mishap::Loss(gpu, count)),
            ]
            .boxed()
        } else {
            Just(Mishap::None).boxed()
        };
        let abroad = prop::array::uniform2(prop::option::weighted(0.4, 0..gpus));
        let tasks = prop::collection::vec(task, 1..40);
        (mishap, abroad, tasks).prop_map(move |(mishap, abroad, tasks)| Plan {
            workers: if is_real { workers } else { 0 },
            gpus,
            time: if is_real { Time::Real } else { Time::Virtual },
            // Two whole arrays have 1,920 bytes.
            memory: [2_048, 4_096, 1 << 20][memory],
            runahead: [0, 1, 64][runahead],
            mishap,
            // Nobody counts what others have of a device, so there has to be enough.
            abroad: if memory == 2 { abroad } else { [None; 2] },
            tasks,
        })
    })
}

/// The indices of a region, in order.
fn indices(region: &Region) -> Vec<[u64; 2]> {
    let numbers = |span: &Span| {
        let span = *span;
        (0..span.count()).map(move |number| span.start() + number * span.step())
    };
    let [rows, columns] = region.spans() else {
        panic!("two axes")
    };
    numbers(rows)
        .flat_map(|row| numbers(columns).map(move |column| [row, column]))
        .collect()
}

fn number([row, column]: [u64; 2]) -> usize {
    usize::try_from(row * SHAPE[1] + column).unwrap()
}

fn digest(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// What an element is, as the oracle sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Element {
    Value(u64),
    /// The number of the task whose failure it was.
    Undefined(usize),
}

/// One access of one member: its number among the task's, and which elements it has.
#[derive(Clone, Debug)]
struct Touched {
    access: usize,
    mode: Mode,
    array: usize,
    elements: Vec<[u64; 2]>,
}

/// What a member does.
fn act(
    task: usize,
    accesses: &[Touched],
    load: impl Fn(&Touched, [u64; 2]) -> u64,
    mut store: impl FnMut(&Touched, [u64; 2], u64),
) {
    let mut read = Vec::new();
    for it in accesses {
        if matches!(it.mode, Mode::In | Mode::InOut) {
            read.extend(it.elements.iter().map(|&at| load(it, at)));
        }
    }
    let read = digest(read);
    for it in accesses {
        for &at in &it.elements {
            match it.mode {
                Mode::Out | Mode::InOut => store(it, at, digest((task, number(at), read))),
                Mode::Commute => {
                    let sum = load(it, at).wrapping_add(digest((task, number(at))));
                    store(it, at, sum);
                }
                _ => {}
            }
        }
    }
}

struct Array {
    parts: Gridded,
    elements: Arc<[AtomicU64]>,
    /// Memory that it brought along, and behind what it was to be taken over.
    own: Option<(DevicePointer, Event)>,
}

impl Array {
    fn new(label: &str, machine: &Machine, abroad: Option<u16>) -> Self {
        let own = abroad.map(|gpu| zeros_on(machine, DeviceId::gpu(gpu)));
        let adopted = own.map(|(pointer, event)| Adopted {
            pointer,
            behind: machine
                .as_virtual()
                .unwrap()
                .gpu(pointer.device)
                .foreign(Some(event)),
        });
        let first = u64::from(adopted.is_some()) * 0xBAD;
        let elements: Arc<[AtomicU64]> = (0..ELEMENTS).map(|_| AtomicU64::new(first)).collect();
        let address = elements.as_ptr() as usize;
        let keep = Box::new(Arc::clone(&elements));
        let datum = Datum::adopting(label, &SHAPE, 8, address, keep, adopted);
        let parts = Gridded::new(datum);
        Self {
            parts,
            elements,
            own,
        }
    }
}

/// Does something to the elements of an array in memory of a device, in the order of a stream.
fn on_elements(
    gpu: &Arc<VirtualGpu>,
    stream: Stream,
    pointer: DevicePointer,
    call: impl FnOnce(&mut [u8]) + Send + 'static,
) {
    let inner = Arc::clone(gpu);
    let operation = Box::new(move || {
        let bytes = inner.bytes(pointer, 8 * ELEMENTS as u64)?;
        // SAFETY: they are there, and whoever uses them is ordered by streams.
        call(unsafe { std::slice::from_raw_parts_mut(bytes.as_ptr(), bytes.len()) });
        Ok(())
    });
    gpu.enqueue(stream, operation).unwrap();
}

/// Memory of a device that somebody is about to fill with zeros.
fn zeros_on(machine: &Machine, device: DeviceId) -> (DevicePointer, Event) {
    let gpu = machine.as_virtual().unwrap().gpu(device);
    let stream = gpu.create_stream().unwrap();
    let pointer = gpu.allocate(8 * ELEMENTS as u64, stream).unwrap();
    gpu.busy(stream, Duration::from_micros(200)).unwrap();
    on_elements(gpu, stream, pointer, |bytes| bytes.fill(0));
    (pointer, gpu.record(stream).unwrap())
}

/// The elements that are in memory of a device when all is done; nobody may have used it since the event.
fn elements_at(machine: &Machine, (pointer, event): (DevicePointer, Event)) -> Vec<u64> {
    let gpus = machine.as_virtual().unwrap();
    let gpu = gpus.gpu(pointer.device);
    let stream = gpu.create_stream().unwrap();
    gpu.follow(stream, event).unwrap();
    let (send, receive) = std::sync::mpsc::channel();
    on_elements(gpu, stream, pointer, move |bytes| {
        let (elements, []) = bytes.as_chunks() else {
            panic!("elements have eight bytes")
        };
        let elements = elements.iter().map(|it| u64::from_ne_bytes(*it));
        send.send(elements.collect()).unwrap();
    });
    while gpus.clock().advance() {}
    receive.recv().unwrap()
}

/// The rows that a member has, as NumPy's `array_split` has them.
fn rows_of(count: usize, member: usize, members: usize) -> std::ops::Range<usize> {
    let (each, more) = (count / members, count % members);
    let start = member * each + member.min(more);
    start..start + each + usize::from(member < more)
}

/// What each member of a task's set has.
fn members(on: On_, all: &[Touched], rows: &[usize]) -> Vec<Vec<Touched>> {
    let count = match on {
        On_::Shards | On_::Copies | On_::Mixed => 2,
        _ => 1,
    };
    let one = |member: usize| {
        let each = all.iter().zip(rows).map(|(it, &rows)| {
            let mut it = it.clone();
            if matches!(on, On_::Shards | On_::Mixed) && it.mode != Mode::In && rows != 0 {
                let width = it.elements.len() / rows;
                let own = rows_of(rows, member, count);
                it.elements = it.elements[own.start * width..own.end * width].to_vec();
            }
            it
        });
        each.collect()
    };
    (0..count).map(one).collect()
}

fn set(members: &[Member]) -> Alternative {
    Alternative {
        members: members.into(),
        share: WHOLE,
        memory: 0,
    }
}

/// Where an element is on a device, in bytes from the pointer of the view.
fn offset(view: &View, at: [u64; 2]) -> usize {
    let steps = at.iter().zip(&view.origin).zip(&view.strides);
    let offset = steps.map(|((at, origin), stride)| (at - origin) * stride);
    usize::try_from(offset.sum::<u64>()).unwrap()
}

/// Enqueues what a member does on its device.
fn enqueue(
    machine: &Arc<Machine>,
    task: usize,
    (device, stream): (DeviceId, Stream),
    accesses: Vec<Touched>,
    views: Vec<Option<Arc<View>>>,
    faults: bool,
) {
    let gpu = Arc::clone(machine.as_virtual().unwrap().gpu(device));
    let inner = Arc::clone(&gpu);
    let operation = Box::new(move || {
        let memory: Vec<_> = accesses
            .iter()
            .map(|it| {
                let view = views[it.access].as_ref().expect("it has elements there");
                let last = it.elements.iter().map(|&at| offset(view, at)).max();
                last.map(|last| inner.bytes(view.pointer, last as u64 + 8).unwrap())
            })
            .collect();
        let pointer = |it: &Touched, at| {
            let place = accesses.iter().position(|other| other.access == it.access);
            let memory = memory[place.unwrap()].as_ref().unwrap();
            let view = views[it.access].as_ref().unwrap();
            assert!(offset(view, at) + 8 <= memory.len());
            // SAFETY: within the bytes, as asserted.
            unsafe { memory.as_ptr().add(offset(view, at)).cast::<u64>() }
        };
        // SAFETY: the memory is there, and the runtime's order keeps others from it.
        let load = |it: &Touched, at| unsafe { pointer(it, at).read_unaligned() };
        // SAFETY: as above.
        let store = |it: &Touched, at, value| unsafe { pointer(it, at).write_unaligned(value) };
        act(task, &accesses, load, store);
        if faults {
            return Err(DeviceError::Operation(device, "planned".into()));
        }
        Ok(())
    });
    // A device that is lost says so, and the task fails without that.
    let _ = gpu.enqueue(stream, operation);
}

/// Does what a task does, wherever it runs.
fn run_body(
    machine: &Arc<Machine>,
    arrays: &[Arc<[AtomicU64]>; 2],
    task: usize,
    members: &[Vec<Touched>],
    faults: bool,
    pause: u64,
) {
    let here = current().unwrap();
    let mut streams = here.streams().into_iter();
    let views = here.views();
    let gpus = machine.as_virtual().unwrap();
    let single = here.places().len() == 1 && streams.len() == 0;
    for (member, accesses) in members.iter().enumerate() {
        let on_core = single
            || matches!(
                here.places().get(member),
                None | Some(charioteer::native::Place::Core(_))
            );
        if on_core {
            let load = |it: &Touched, at| arrays[it.array][number(at)].load(Ordering::Relaxed);
            let store = |it: &Touched, at, value| {
                arrays[it.array][number(at)].store(value, Ordering::Relaxed);
            };
            act(task, accesses, load, store);
            continue;
        }
        let (device, stream) = streams.next().unwrap();
        let _ = gpus.gpu(device).busy(stream, Duration::from_micros(pause));
        let views = views[member].to_vec();
        enqueue(
            machine,
            task,
            (device, stream),
            accesses.clone(),
            views,
            faults,
        );
    }
}

/// What became of a task, and what it was.
struct Spawned {
    task: Task<()>,
    cancelled: bool,
    members: Vec<Vec<Touched>>,
}

#[allow(clippy::too_many_lines, reason = "one program from begin to end")]
fn run(plan: &Plan) {
    let path = trace_path();
    let description =
        Description::uniform(4, usize::from(plan.gpus), plan.memory, plan.time).unwrap();
    let machine = Machine::virtual_machine(description);
    let lenient = plan.mishap != Mishap::None;
    let runtime = Runtime::builder()
        .workers(plan.workers)
        .machine(Arc::clone(&machine))
        .runahead(plan.runahead)
        .trace(&path)
        .open()
        .unwrap();
    let gpus = machine.as_virtual().unwrap();
    let [one, other] = plan.abroad;
    let data = [
        Array::new("A", &machine, one),
        Array::new("B", &machine, other),
    ];
    match plan.mishap {
        Mishap::None => {}
        Mishap::Copy(gpu, nth) => gpus.gpu(DeviceId::gpu(gpu)).fail_copy(nth),
        Mishap::Loss(gpu, after) => gpus.gpu(DeviceId::gpu(gpu)).lose_after(after, "planned"),
    }
    let arrays = [Arc::clone(&data[0].elements), Arc::clone(&data[1].elements)];
    let list = [On::Cores(Need::Core), On::Devices(set(&[GPU]))].map(|on| Choice {
        variant: 0,
        label: String::new(),
        on,
        cost: None,
    });
    let choices = runtime.choices("either", list.to_vec()).unwrap();
    let mut spawned: Vec<Option<Spawned>> = Vec::new();
    // What the host saw, or wrote, before which task.
    let mut seen = Vec::new();
    let mut moved = Vec::new();
    for (index, (uses, on, twist, pause)) in plan.tasks.iter().enumerate() {
        let parts: Vec<Part> = uses
            .iter()
            .map(|one| data[one.array].parts.part(&one.at))
            .collect();
        let device = |gpu: u16| match gpu {
            gpu if gpu < plan.gpus => DeviceId::gpu(gpu),
            _ => HOST,
        };
        match *twist {
            Twist::Host => {
                let (part, one) = (&parts[0], &uses[0]);
                let all = indices(part.region());
                let writes = *pause < 20;
                let mode = if writes { Mode::InOut } else { Mode::In };
                let looked = match runtime.host(&[Access::new(part, mode)]) {
                    Ok(access) => {
                        let element = |&at: &[u64; 2]| &arrays[one.array][number(at)];
                        let load = |at| element(at).load(Ordering::Relaxed);
                        let values: Vec<u64> = all.iter().map(load).collect();
                        if writes {
                            for at in &all {
                                element(at).store(digest((index, number(*at))), Ordering::Relaxed);
                            }
                        }
                        access.leave();
                        Ok(values)
                    }
                    Err(HostError::Failed(root)) => {
                        Err(root.label().to_string().parse().unwrap_or(LOST))
                    }
                    Err(error) => panic!("{error}"),
                };
                seen.push((index, one.array, all, looked, writes));
                spawned.push(None);
                continue;
            }
            Twist::Prefetched(gpu) => {
                moved.push(runtime.prefetch(&parts[0], device(gpu)).unwrap());
                spawned.push(None);
                continue;
            }
            Twist::Evicted(gpu) => {
                moved.push(runtime.evict(&parts[0], device(gpu)).unwrap());
                spawned.push(None);
                continue;
            }
            _ => {}
        }
        let on = match *on {
            On_::Shards | On_::Copies if plan.gpus < 2 => On_::Any,
            On_::This(gpu) => On_::This(gpu % plan.gpus),
            on => on,
        };
        let mut task = runtime.task().name(format!("{index}"));
        task = match on {
            On_::Cores => task,
            On_::Any => task.on([set(&[GPU])]),
            On_::This(gpu) => task.on([set(&[Member::Device(DeviceId::gpu(gpu))])]),
            On_::Shards | On_::Copies => task.on([set(&[GPU, GPU])]),
            On_::Mixed => task.on([set(&[CORE, GPU])]),
            On_::Mapped => task.choices(&choices, uses.len() as u64),
        };
        let (mut all, mut rows) = (Vec::new(), Vec::new());
        let mut is_short = false;
        for (access, (one, part)) in uses.iter().zip(&parts).enumerate() {
            let said = Access::new(part, one.mode);
            let region = part.region();
            let count = usize::try_from(region.spans()[0].count()).unwrap();
            let said = match on {
                On_::Shards | On_::Mixed if one.mode != Mode::In => said.sharded(0),
                On_::Copies if one.mode != Mode::In => said.replicated(),
                _ => said,
            };
            is_short |= matches!(on, On_::Shards | On_::Mixed)
                && one.mode != Mode::In
                && !region.is_empty()
                && count < 2;
            task = task.accesses(Access {
                ordered: one.ordered,
                ..said
            });
            if !one.ordered {
                continue;
            }
            rows.push(count);
            all.push(Touched {
                access,
                mode: one.mode,
                array: one.array,
                elements: indices(region),
            });
        }
        let listed = all.iter();
        let excluded = exclude_each_other(listed.map(|it| (it.mode, it.array, &it.elements[..])));
        let members = members(on, &all, &rows);
        // What a second attempt would read has to be there still.
        let updates = uses
            .iter()
            .any(|one| matches!(one.mode, Mode::InOut | Mode::Commute));
        let overwrites = all.iter().any(|read| {
            let writes = all
                .iter()
                .filter(|it| it.mode == Mode::Out && it.array == read.array);
            read.mode == Mode::In
                && writes
                    .flat_map(|it| &it.elements)
                    .any(|at| read.elements.contains(at))
        });
        let repeats = *twist == Twist::Repeated && !updates && !overwrites;
        let (twist, pause, own) = (*twist, *pause, members.clone());
        let (inner, elements, spawn) = (Arc::clone(&machine), arrays.clone(), runtime.handle());
        let mut attempts = 0;
        let body = move || {
            if twist == Twist::Waits {
                let child = spawn.task().spawn(|| ()).unwrap();
                child.result().unwrap();
            }
            let faults = twist == Twist::Faults;
            run_body(&inner, &elements, index, &own, faults, pause);
            attempts += 1;
            let on_core = faults && current().unwrap().streams().is_empty();
            if twist == Twist::Fails || on_core || (repeats && attempts == 1) {
                return Err(std::io::Error::other("planned"));
            }
            Ok(())
        };
        match task.try_spawn(u32::from(repeats), body) {
            Ok(task) => {
                assert!(!excluded && !is_short, "task {index} was to be refused");
                let cancelled = twist == Twist::Cancelled && task.cancel();
                spawned.push(Some(Spawned {
                    task,
                    cancelled,
                    members,
                }));
            }
            Err(SpawnError::Access(AccessTrouble::SelfConflict { .. })) => {
                assert!(excluded, "task {index} was refused");
                spawned.push(None);
            }
            Err(SpawnError::Access(AccessTrouble::ShortAxis { .. })) => {
                assert!(is_short, "task {index} was refused");
                spawned.push(None);
            }
            Err(SpawnError::Memory { wanted, there, .. }) => {
                assert!(wanted > there && there == plan.memory);
                spawned.push(None);
            }
            Err(error) => panic!("{error}"),
        }
    }
    let homes = || {
        [0, 1].map(|array| match data[array].own {
            Some(own) => elements_at(&machine, own),
            None => arrays[array]
                .iter()
                .map(|it| it.load(Ordering::Relaxed))
                .collect(),
        })
    };
    check(plan, &spawned, seen, lenient, homes, runtime, moved);
    let file = take_trace(&path);
    if !lenient {
        prove(&file);
    }
}

/// Before which task, of which array, which elements: what they were, or whose failure they were; and whether
/// the host wrote them.
type Seen = (usize, usize, Vec<[u64; 2]>, Result<Vec<u64>, usize>, bool);

fn check(
    plan: &Plan,
    spawned: &[Option<Spawned>],
    seen: Vec<Seen>,
    lenient: bool,
    homes: impl FnOnce() -> [Vec<u64>; 2],
    runtime: Runtime,
    moved: Vec<Task<()>>,
) {
    let mut oracle = [[Element::Value(0); ELEMENTS]; 2];
    let mut seen = seen.into_iter().peekable();
    for (index, (_, _, twist, _)) in plan.tasks.iter().enumerate() {
        if let Some((_, array, all, looked, writes)) = seen.next_if(|(at, ..)| *at == index) {
            let values: Vec<Element> = all.iter().map(|&at| oracle[array][number(at)]).collect();
            match &looked {
                Ok(looked) => {
                    let looked: Vec<Element> = looked.iter().copied().map(Element::Value).collect();
                    assert_eq!(looked, values, "the host, before task {index}");
                }
                Err(LOST) => assert!(lenient, "the host, before task {index}"),
                Err(root) => assert!(
                    values.contains(&Element::Undefined(*root)),
                    "the host, before task {index}, for {root}"
                ),
            }
            for at in all.iter().filter(|_| writes) {
                oracle[array][number(*at)] = match looked {
                    Ok(_) => Element::Value(digest((index, number(*at)))),
                    Err(root) => Element::Undefined(root),
                };
            }
            continue;
        }
        let Some(Spawned {
            task,
            cancelled,
            members,
        }) = &spawned[index]
        else {
            continue;
        };
        let all = || members.iter().flatten();
        let reads = all().filter(|it| it.mode != Mode::Out);
        let roots: BTreeSet<usize> = reads
            .flat_map(|it| it.elements.iter().map(|&at| oracle[it.array][number(at)]))
            .filter_map(|element| match element {
                Element::Undefined(root) => Some(root),
                Element::Value(_) => None,
            })
            .collect();
        let fails = matches!(twist, Twist::Fails | Twist::Faults);
        let root = match task.result() {
            Ok(()) => None,
            Err(TaskError::Cancelled) => {
                assert!(*cancelled, "task {index} was cancelled by nobody");
                Some(index)
            }
            Err(TaskError::Failed(_)) => {
                assert!(fails && roots.is_empty());
                Some(index)
            }
            Err(TaskError::Device(error)) => {
                assert!(*twist == Twist::Faults || lenient, "task {index}: {error}");
                assert!(roots.is_empty() || lenient, "task {index}: {error}");
                Some(index)
            }
            Err(TaskError::Dependency(name, _)) => {
                let root = name.parse().unwrap_or(LOST);
                assert!(
                    roots.contains(&root),
                    "task {index} failed for {name}, not one of {roots:?}"
                );
                Some(root)
            }
            Err(error) => panic!("task {index}: {error}"),
        };
        let may_differ = *cancelled || (lenient && root.is_some());
        if !may_differ {
            assert_eq!(root.is_some(), fails || !roots.is_empty(), "task {index}");
        }
        let before = oracle;
        if let Some(root) = root {
            for it in all().filter(|it| it.mode.writes()) {
                for at in &it.elements {
                    oracle[it.array][number(*at)] = Element::Undefined(root);
                }
            }
            continue;
        }
        let load = |it: &Touched, at| match before[it.array][number(at)] {
            Element::Value(value) => value,
            Element::Undefined(_) => panic!("task {index} read what is undefined"),
        };
        for member in members {
            act(index, member, load, |it, at, value| {
                oracle[it.array][number(at)] = Element::Value(value);
            });
        }
    }
    let _failures = runtime.close();
    drop(moved);
    if lenient {
        return;
    }
    let homes = homes();
    for (array, elements) in oracle.iter().enumerate() {
        for (element, value) in elements.iter().enumerate() {
            if let Element::Value(value) = value {
                let stored = homes[array][element];
                assert_eq!(stored, *value, "element {element} of array {array}");
            }
        }
    }
}

/// Nobody who is not ordered with a set changes what a device of it reads, though its core has overwritten it
/// on the host before the device reads.
#[test]
fn who_peeks_changes_nothing_that_a_set_with_a_core_reads() {
    let access = |at, mode, ordered| Use {
        array: 1,
        at,
        mode,
        ordered,
    };
    let tile = || Where::Tile(0, [1, 1]);
    for mode in [Mode::Out, Mode::InOut] {
        let set = vec![access(tile(), Mode::In, true), access(tile(), mode, true)];
        let peeks = vec![access(Where::Whole, Mode::In, false)];
        run(&Plan {
            workers: 0,
            gpus: 1,
            time: Time::Virtual,
            memory: 1 << 20,
            runahead: 64,
            mishap: Mishap::None,
            abroad: [None, Some(0)],
            tasks: vec![
                // While it waits the other one is planned.
                (set, On_::Mixed, Twist::Waits, 0),
                (peeks, On_::Any, Twist::None, 0),
            ],
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        max_shrink_iters: 2000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_programs_on_devices_are_as_if_run_in_order(plan in plan(false)) {
        within_on(format!("{plan:?}"), 60, move || run(&plan));
    }

    #[test]
    fn mishaps_touch_only_what_they_may(plan in plan(true)) {
        within_on(format!("{plan:?}"), 60, move || run(&plan));
    }
}
