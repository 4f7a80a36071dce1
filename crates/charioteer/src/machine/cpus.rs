//! The processors of the host: what Linux tells of them, and threads that are kept on some.
//!
//! # What is found
//!
//! The NUMA nodes and which processors are threads of one core, as `/sys/devices/system` has them. Of
//! processors those count that the process may use, which leaves out what a cpuset or `taskset` took
//! away. A quota of processor time takes none of them away. Where the nodes do not say where each
//! processor is, in a sandbox without `/sys` for example, there is one node with all of them.
//!
//! # Places
//!
//! [`Pins`] gives each place of a runtime (a number from zero on, the right to use one core) a
//! processor. The threads of a core are told from cores: each node's list begins with one processor of
//! each core, and the others follow. [`Pinning::Compact`] fills one node after the other,
//! [`Pinning::Spread`] deals places out to the nodes in turns. Where there are more places than
//! processors it begins anew.
//!
//! # Workers that are not pinned
//!
//! A thread that wakes up may be put on a processor where another one computes, since Linux does not look
//! far for an idle one where most were busy lately. Two that never block then share it until the system
//! evens them out, which it tries less often the more processors there are: on 16 cores it took 25 ms,
//! with a core idle beside them. So workers are kept `Apart`. Each starts from a processor of its own;
//! and before a task it looks where it is, and if another worker computes there, it moves to a processor
//! where none does. From there the system may move it on. Who is where is known as of the last task of
//! each, and says nothing of other threads: a move may be wrong, and costs speed then, nothing else.
//! Workers whose sessions exclude each other are left alone: they block all the time, and the system puts
//! each one anew.
//!
//! # Threads
//!
//! A worker is pinned to the processors of what it is granted, when that changes: to one as long as it
//! runs ordinary tasks, to several for the body over several cores, and with no core to all that the
//! process could use when the runtime opened. It has no former mask to get back, since it ends with the
//! runtime. Threads that are no workers are never pinned.
//!
//! A new thread inherits the mask of the one that starts it. So whoever starts one on behalf of the
//! runtime does it [`unpinned`].

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::sync::{AtomicBool, Ordering};

/// Where Linux tells of processors.
pub const SYSTEM: &str = "/sys/devices/system";

/// The largest number of a processor that is believed.
const MOST: u32 = 65_535;

/// A NUMA node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The processors that are near to its memory, by the system's numbers.
    pub cpus: Vec<u32>,
    /// Its memory in bytes.
    pub memory: u64,
}

/// Which processors places get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pinning {
    /// One node after the other.
    Compact,
    /// All nodes in turns.
    Spread,
}

/// Numbers as Linux lists them: `0-3,8`. `None` if it is no such list.
fn numbers(text: &str) -> Option<Vec<u32>> {
    let mut found = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        if first > last || last > MOST {
            return None;
        }
        found.extend(first..=last);
    }
    Some(found)
}

fn read_numbers(path: &Path) -> Option<Vec<u32>> {
    numbers(&std::fs::read_to_string(path).ok()?)
}

/// The memory of a node in bytes, from its `meminfo`.
fn memory(text: &str) -> Option<u64> {
    let (_, total) = text.split_once("MemTotal:")?;
    let kibibytes: u64 = total.split_whitespace().next()?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// The NUMA nodes that have some of these processors, in the order of their numbers, from a folder such
/// as [`SYSTEM`]. Nothing, unless they have all of them.
#[must_use]
pub fn nodes(system: &Path, usable: &[u32]) -> Vec<Node> {
    let number = |entry: io::Result<std::fs::DirEntry>| -> Option<u32> {
        let name = entry.ok()?.file_name();
        name.to_str()?.strip_prefix("node")?.parse().ok()
    };
    let Ok(entries) = std::fs::read_dir(system.join("node")) else {
        return Vec::new();
    };
    let mut ids: Vec<u32> = entries.filter_map(number).collect();
    ids.sort_unstable();
    let node = |id: u32| {
        let folder = system.join(format!("node/node{id}"));
        let mut cpus = read_numbers(&folder.join("cpulist"))?;
        cpus.retain(|cpu| usable.contains(cpu));
        let memory = memory(&std::fs::read_to_string(folder.join("meminfo")).ok()?)?;
        (!cpus.is_empty()).then_some(Node { cpus, memory })
    };
    let found: Vec<Node> = ids.into_iter().filter_map(node).collect();
    let has = |cpu: &u32| found.iter().any(|node| node.cpus.contains(cpu));
    if usable.iter().all(has) {
        found
    } else {
        Vec::new()
    }
}

/// Which thread of its core a processor is, counted from zero; zero if nothing is known.
fn thread_of_core(system: &Path, cpu: u32) -> usize {
    let path = format!("cpu/cpu{cpu}/topology/thread_siblings_list");
    let siblings = read_numbers(&system.join(path)).unwrap_or_default();
    let place = siblings.iter().position(|&sibling| sibling == cpu);
    place.unwrap_or(0)
}

/// The processors that the calling thread may use.
///
/// # Errors
/// What the system says.
pub fn usable() -> io::Result<Vec<u32>> {
    Ok(Mask::of_thread()?.cpus())
}

/// A set of processors as the system takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mask(Box<[libc::c_ulong]>);

const BITS: u32 = libc::c_ulong::BITS;

impl Mask {
    fn of(cpus: &[u32]) -> Self {
        let most = cpus.iter().max().copied().unwrap_or(0);
        let mut words = vec![0; (most / BITS) as usize + 1];
        for cpu in cpus {
            words[(cpu / BITS) as usize] |= 1 << (cpu % BITS);
        }
        Self(words.into())
    }

    fn of_thread() -> io::Result<Self> {
        let mut words = vec![0; 16];
        loop {
            // SAFETY: the system writes no more than the bytes that the vector has; zero is this
            // thread.
            let result = unsafe {
                libc::sched_getaffinity(
                    0,
                    std::mem::size_of_val(words.as_slice()),
                    words.as_mut_ptr().cast(),
                )
            };
            if result == 0 {
                return Ok(Self(words.into()));
            }
            let error = io::Error::last_os_error();
            // So it says where it has more processors than there is room for.
            if error.raw_os_error() != Some(libc::EINVAL) || words.len() as u32 * BITS > MOST {
                return Err(error);
            }
            words.resize(2 * words.len(), 0);
        }
    }

    fn cpus(&self) -> Vec<u32> {
        let bits = self.0.iter().zip((0..).step_by(BITS as usize));
        let bits = bits.flat_map(|(word, first)| {
            (0..BITS).filter_map(move |bit| (word >> bit & 1 != 0).then_some(first + bit))
        });
        bits.collect()
    }

    /// Keeps the calling thread there.
    fn hold(&self) -> io::Result<()> {
        // SAFETY: the system reads the bytes that the words have; zero is this thread.
        let result = unsafe {
            libc::sched_setaffinity(0, std::mem::size_of_val(&*self.0), self.0.as_ptr().cast())
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

/// The processors of a runtime's places.
#[derive(Debug)]
pub struct Pins {
    places: Box<[Place]>,
    /// All that the process could use when it opened.
    home: Mask,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    cpu: u32,
    node: u16,
}

/// What a thread is pinned to, and what it would be if it were not.
struct Held {
    pins: Arc<Pins>,
    mask: Mask,
}

crate::sync::thread_local! {
    static HELD: RefCell<Option<Held>> = const { RefCell::new(None) };
}

/// Processors in the order in which places get them, with the numbers of their nodes. `thread` says
/// which thread of its core one is.
fn order(nodes: &[Vec<u32>], thread: impl Fn(u32) -> usize, pinning: Pinning) -> Vec<Place> {
    let mut places = Vec::new();
    for (cpus, node) in nodes.iter().zip(0..) {
        let mut cpus = cpus.clone();
        cpus.sort_by_key(|&cpu| (thread(cpu), cpu));
        let ranked = cpus.into_iter().enumerate();
        places.extend(ranked.map(|(rank, cpu)| (rank, Place { cpu, node })));
    }
    if pinning == Pinning::Spread {
        places.sort_by_key(|&(rank, place)| (rank, place.node));
    }
    places.into_iter().map(|(_, place)| place).collect()
}

impl Pins {
    /// Processors for so many places: those of the nodes, which all have to be there for the calling
    /// thread.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if there is none, if one is in two nodes, or not there; else what
    /// the system says.
    pub fn new(nodes: &[Vec<u32>], pinning: Pinning, places: usize) -> io::Result<Self> {
        let wrong = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
        let home = Mask::of_thread()?;
        let usable = home.cpus();
        let mut homes = HashMap::new();
        for (node, cpus) in nodes.iter().enumerate() {
            for &cpu in cpus {
                if !usable.contains(&cpu) {
                    return Err(wrong(format!(
                        "workers are pinned, and core {cpu} of NUMA node {node} is none that this \
                         process may use"
                    )));
                }
                if let Some(other) = homes.insert(cpu, node) {
                    return Err(wrong(format!(
                        "workers are pinned, and core {cpu} is in NUMA nodes {other} and {node}"
                    )));
                }
            }
        }
        let order = order(nodes, |cpu| thread_of_core(SYSTEM.as_ref(), cpu), pinning);
        if order.is_empty() {
            return Err(wrong(
                "workers are pinned, and no NUMA node has a core".to_owned(),
            ));
        }
        Ok(Self {
            places: order.into_iter().cycle().take(places).collect(),
            home,
        })
    }

    /// The nodes of the places.
    pub(crate) fn nodes(&self) -> Box<[u16]> {
        self.places.iter().map(|place| place.node).collect()
    }

    /// Keeps the calling thread, which is a worker, on the processors of these places; without any on
    /// all that the process may use.
    pub(crate) fn hold(self: &Arc<Self>, places: &[u16]) {
        let mask = if places.is_empty() {
            self.home.clone()
        } else {
            let cpus = places
                .iter()
                .map(|&place| self.places[usize::from(place)].cpu);
            Mask::of(&cpus.collect::<Vec<_>>())
        };
        HELD.with(|held| {
            let mut held = held.borrow_mut();
            if held.as_ref().is_some_and(|held| held.mask == mask) {
                return;
            }
            // Refused where processors were taken from the process meanwhile. Then the system has
            // given the thread others, and knows better.
            let _ = mask.hold();
            *held = Some(Held {
                pins: Arc::clone(self),
                mask,
            });
        });
    }
}

/// No processor.
pub(crate) const NOWHERE: u32 = u32::MAX;

/// Where workers that are not pinned compute, so that no two do on one processor; see the module.
#[derive(Debug)]
pub(crate) struct Apart {
    /// All that the process could use when it opened, from the one behind that of the opening thread.
    cpus: Vec<u32>,
    /// By their numbers, whether a worker is there.
    taken: Box<[AtomicBool]>,
    /// No worker was kept from moving yet.
    obeyed: AtomicBool,
}

fn here() -> u32 {
    // SAFETY: the call takes nothing and has no effect.
    let cpu = unsafe { libc::sched_getcpu() };
    u32::try_from(cpu).unwrap_or(NOWHERE)
}

impl Apart {
    /// For so many workers, if there are several and a processor for each.
    pub(crate) fn new(workers: usize) -> Option<Self> {
        let mut cpus = usable().ok()?;
        if workers < 2 || workers > cpus.len() {
            return None;
        }
        let here = here();
        let behind = cpus.iter().take_while(|&&cpu| cpu <= here).count();
        let most = *cpus.last()?;
        let count = cpus.len();
        cpus.rotate_left(behind % count);
        Some(Self {
            cpus,
            taken: (0..=most).map(|_| AtomicBool::new(false)).collect(),
            obeyed: AtomicBool::new(true),
        })
    }

    /// Brings the calling thread, the worker of this number, to a processor of its own, to start from.
    pub(crate) fn start(&self, slot: usize) {
        if let Some(&cpu) = self.cpus.get(slot) {
            self.visit(cpu);
        }
    }

    /// Moves the calling thread to a processor, from which the system may move it on.
    fn visit(&self, cpu: u32) {
        let moved = Mask::of_thread().is_ok_and(|mask| {
            let there = mask.cpus().contains(&cpu) && Mask::of(&[cpu]).hold().is_ok();
            there && here() == cpu && mask.hold().is_ok()
        });
        if !moved {
            self.obeyed.store(false, Ordering::Relaxed);
        }
    }

    fn take(&self, cpu: u32) -> bool {
        self.taken
            .get(cpu as usize)
            .is_some_and(|taken| !taken.swap(true, Ordering::Relaxed))
    }

    /// The calling thread, a worker, is about to compute, and was at the processor `seat` before.
    #[inline]
    pub(crate) fn sit(&self, seat: &Cell<u32>) {
        let here = here();
        if here != seat.get() {
            self.sit_at(here, seat);
        }
    }

    #[cold]
    fn sit_at(&self, here: u32, seat: &Cell<u32>) {
        self.stand_up(seat);
        if !self.obeyed.load(Ordering::Relaxed) {
            return;
        }
        if self.take(here) {
            seat.set(here);
        } else if let Some(&cpu) = self.cpus.iter().find(|&&cpu| self.take(cpu)) {
            seat.set(cpu);
            self.visit(cpu);
        }
    }

    /// The calling thread computes no more for now.
    #[inline]
    pub(crate) fn stand_up(&self, seat: &Cell<u32>) {
        if let Some(taken) = self.taken.get(seat.replace(NOWHERE) as usize) {
            taken.store(false, Ordering::Relaxed);
        }
    }
}

/// Calls `start`, which starts a thread, with the calling thread pinned to nothing: the new one inherits
/// that.
pub fn unpinned<R>(start: impl FnOnce() -> R) -> R {
    struct Back;
    impl Drop for Back {
        fn drop(&mut self) {
            let _ = HELD.try_with(|held| {
                if let Some(held) = &*held.borrow() {
                    let _ = held.mask.hold();
                }
            });
        }
    }
    let is_pinned = HELD.with(|held| {
        let held = held.borrow();
        held.as_ref().is_some_and(|held| {
            let _ = held.pins.home.hold();
            true
        })
    });
    let _back = is_pinned.then_some(Back);
    start()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A folder of its own, gone at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let name = format!("charioteer-cpus-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn write(&self, file: &str, text: &str) {
            let path = self.0.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn node(&self, id: u32, cpus: &str, kibibytes: u64) {
            self.write(&format!("node/node{id}/cpulist"), cpus);
            let text = format!("Node {id} MemTotal:  {kibibytes} kB\nNode {id} MemFree: 7 kB\n");
            self.write(&format!("node/node{id}/meminfo"), &text);
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn node(cpus: &[u32], memory: u64) -> Node {
        Node {
            cpus: cpus.to_vec(),
            memory,
        }
    }

    #[test]
    fn lists_are_read_as_linux_writes_them() {
        assert_eq!(numbers("0-2,8\n"), Some(vec![0, 1, 2, 8]));
        assert_eq!(numbers("5"), Some(vec![5]));
        assert_eq!(numbers("\n"), Some(vec![]));
        for wrong in ["x", "1-", "-1", "3-1", "1,y", "0-99999999", "1.5"] {
            assert_eq!(numbers(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn nodes_are_those_with_usable_processors() {
        let system = Folder::new("nodes");
        system.node(0, "0-2,8\n", 1024);
        system.node(10, "12-15\n", 11 * 1024);
        system.node(2, "3-7\n", 3 * 1024);
        system.node(11, "\n", 1); // memory without processors
        system.write("node/online", "0,2,10-11");
        let found = nodes(&system.0, &[0, 1, 2, 4, 8, 12, 13]);
        assert_eq!(
            found,
            [
                node(&[0, 1, 2, 8], 1 << 20),
                node(&[4], 3 << 20),
                node(&[12, 13], 11 << 20),
            ]
        );
        assert_eq!(nodes(&system.0, &[3]), [node(&[3], 3 << 20)]);
    }

    #[test]
    fn without_all_processors_there_are_no_nodes() {
        let system = Folder::new("none");
        assert_eq!(nodes(&system.0, &[0]), []);
        system.node(0, "0-1\n", 1024);
        system.node(1, "2-x\n", 1024);
        assert_eq!(nodes(&system.0, &[0, 1]), [node(&[0, 1], 1 << 20)]);
        assert_eq!(nodes(&system.0, &[0, 1, 2]), []);
        system.node(1, "2-3\n", 1024);
        assert_eq!(nodes(&system.0, &[0, 1, 2]).len(), 2);
        system.write("node/node1/meminfo", "nothing of use");
        assert_eq!(nodes(&system.0, &[0, 1, 2]), []);
    }

    #[test]
    fn threads_of_cores_are_told_apart() {
        let system = Folder::new("threads");
        system.write("cpu/cpu4/topology/thread_siblings_list", "0,4\n");
        system.write("cpu/cpu0/topology/thread_siblings_list", "0,4\n");
        system.write("cpu/cpu1/topology/thread_siblings_list", "rubbish\n");
        let threads = [0, 1, 4, 9].map(|cpu| thread_of_core(&system.0, cpu));
        assert_eq!(threads, [0, 0, 1, 0]);
    }

    #[test]
    fn places_fill_nodes_or_alternate_and_take_cores_before_their_second_threads() {
        // Two nodes with two cores of two threads each, and one with a core more.
        let nodes = [vec![0, 1, 4, 5], vec![2, 3, 6, 7], vec![8]];
        let thread = |cpu| usize::from((4..8).contains(&cpu));
        let cpus = |pinning| {
            let places = order(&nodes, thread, pinning);
            places.iter().map(|place| place.cpu).collect::<Vec<_>>()
        };
        assert_eq!(cpus(Pinning::Compact), [0, 1, 4, 5, 2, 3, 6, 7, 8]);
        assert_eq!(cpus(Pinning::Spread), [0, 2, 8, 1, 3, 4, 6, 5, 7]);
        let places = order(&[vec![5, 3], vec![1]], |_| 0, Pinning::Compact);
        assert_eq!(
            places,
            [(3, 0), (5, 0), (1, 1)].map(|(cpu, node)| Place { cpu, node })
        );
    }

    #[test]
    fn masks_have_the_processors_that_they_were_made_of() {
        for cpus in [vec![0], vec![3, 63, 64, 65], vec![1000], vec![7, 65_535]] {
            assert_eq!(Mask::of(&cpus).cpus(), cpus);
        }
        assert!(!usable().unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_pinned_is_named() {
        let cpu = usable().unwrap()[0];
        let says = |nodes: &[Vec<u32>]| {
            let error = Pins::new(nodes, Pinning::Compact, 1).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            error.to_string()
        };
        assert!(says(&[]).contains("no NUMA node has a core"));
        assert!(says(&[vec![cpu], vec![cpu]]).contains("in NUMA nodes 0 and 1"));
        assert!(says(&[vec![cpu], vec![65_535]]).contains("core 65535 of NUMA node 1"));
    }

    #[test]
    fn a_thread_is_pinned_and_what_it_starts_unpinned_is_not() {
        // A thread of its own: the mask of this one is the test runner's.
        let work = || {
            let all = usable().unwrap();
            let last = *all.last().unwrap();
            let nodes = [vec![all[0]], all[1..].to_vec()];
            let pins = Arc::new(Pins::new(&nodes, Pinning::Compact, 2 * all.len()).unwrap());
            let start = || std::thread::spawn(|| usable().unwrap()).join().unwrap();
            assert_eq!(unpinned(start), all, "before it is pinned");

            let place = u16::try_from(all.len() - 1).unwrap();
            pins.hold(&[place]);
            assert_eq!(usable().unwrap(), [last]);
            assert_eq!(start(), [last]);
            assert_eq!(unpinned(start), all);
            assert_eq!(usable().unwrap(), [last], "it is pinned again");

            // Places beyond the processors begin anew.
            pins.hold(&[place + 1]);
            assert_eq!(usable().unwrap(), [all[0]]);
            let mut both = vec![all[0], last];
            both.dedup();
            pins.hold(&[0, place]);
            assert_eq!(usable().unwrap(), both);
            pins.hold(&[]);
            assert_eq!(usable().unwrap(), all);
        };
        std::thread::spawn(work).join().unwrap();
    }

    #[test]
    fn who_comes_where_another_computes_moves_on() {
        let usable = usable().unwrap();
        assert!(Apart::new(1).is_none(), "nobody to keep apart");
        assert!(
            Apart::new(usable.len() + 1).is_none(),
            "no processor for each"
        );
        let Some(apart) = Apart::new(2) else {
            assert_eq!(usable.len(), 1);
            return;
        };
        let taken = |cpu: u32| apart.taken[cpu as usize].load(Ordering::Relaxed);
        for &cpu in &usable {
            apart.visit(cpu);
            assert!(usable.iter().all(|&cpu| !taken(cpu)), "nobody computes");
            let (first, second) = (Cell::new(NOWHERE), Cell::new(NOWHERE));
            apart.sit_at(cpu, &first);
            assert_eq!(first.get(), cpu);
            apart.sit_at(cpu, &second);
            assert_ne!(second.get(), cpu);
            assert!(taken(cpu) && taken(second.get()));
            apart.stand_up(&first);
            apart.stand_up(&second);
        }
        assert!(apart.obeyed.load(Ordering::Relaxed));
        assert_eq!(super::usable().unwrap(), usable, "nobody stays pinned");
    }

    #[test]
    fn who_may_not_move_stays() {
        let usable = usable().unwrap();
        let Some(apart) = Apart::new(2) else { return };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                Mask::of(&usable[..1]).hold().unwrap();
                let (first, second) = (Cell::new(NOWHERE), Cell::new(NOWHERE));
                apart.sit(&first);
                apart.sit(&second);
                assert_eq!(super::usable().unwrap(), usable[..1]);
                apart.stand_up(&second);
                apart.sit(&second);
                assert_eq!(second.get(), NOWHERE, "it is asked no more");
            });
        });
    }
}
