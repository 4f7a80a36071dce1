//! What happened, and when: event rings, the trace file, and what can be proved from it.
//!
//! Each thread appends to a ring of its own; a full ring goes to the file in one write, under the
//! file's lock. A runtime that is not traced pays one branch an event. The file is raw and
//! versioned; [`read`] gives it back, and tells a file that is none, of another version, or cut off.
//! [`check`] proves from it that the runtime kept its promises, [`check_order`] those about the order of
//! accesses, and [`check_moves`] those about where data is.
//!
//! # Format, version 4 (little endian)
//!
//! ```text
//! header   8 bytes "CHARIOTR", u32 version, u32 reserved (zero),
//!          u64 wall clock of the start, nanoseconds since 1970
//! block    u32 tag, u32 count
//!   tag 1  count events: u64 nanoseconds since the start, u64 task, u64 other, u32 thread, u32 event
//!   tag 2  one name: u64 task, count bytes of UTF-8
//!   tag 3  the end, count is zero; a file without it was cut off
//!   tag 4  count events of devices: u64 nanoseconds since the start, u64 task, u32 thread, u32 kind,
//!          4 words of u64 that the kind gives a meaning to
//!   tag 5  count accesses: u64 nanoseconds since the start, u64 task, u64 datum, u64 number,
//!          u32 thread, u32 mode, u32 operation, u32 spread, u32 reserved (zero), u32 axes, and a region:
//!          for each axis u64 start, step, count
//!   tag 6  the label of a datum: u64 datum, count bytes of UTF-8
//!   tag 7  count copies and drops: u64 nanoseconds since the start, u64 datum, u64 bytes, u64 stream,
//!          u64 position, u32 thread, u32 from, u32 to, u32 axes, and three regions: the elements, the
//!          instance that they are in, the instance that they go to
//!   tag 8  how an array lies: u64 datum, u64 bytes of an element, count extents of u64
//! ```
//!
//! Version 3 is the same without tags 7 and 8, and without the two words before the axes of accesses;
//! version 2 also without tags 5 and 6, version 1 also without tag 4. All are still read.
//!
//! # Tasks
//!
//! `other` is the predecessor of an [`Event::Edge`] and zero elsewhere. An event that other threads
//! can act upon bears the time just before it took effect, so the times respect causes: a task is
//! done no later than its dependents are ready, and ready no later than it starts. The events of one
//! task are, in the order of their times,
//!
//! ```text
//! [spawn edge*] (ready start (suspend ready start)* end [retry])* (done | failed)
//! [spawn edge*] ready carry (done | failed)
//! ```
//!
//! the second those of one that moves data and has no body, where a task that is cancelled or skipped may fail at any point before a `start`, and one that was
//! never spawned has nothing but its failure.
//!
//! # Accesses
//!
//! The accesses of a task bear the number that each got under the lock of its datum, so they are ordered as
//! they were registered; 0 if they take part in no order.
//!
//! # Moves
//!
//! The time of a copy is just after it was enqueued, that of a drop just after it was done, and both were
//! read under the lock under which it was decided, so they are in the order of the decisions.
//!
//! # Devices
//!
//! What the ledger decides is logged under its turn, so in its order: all members of a set are
//! [granted](DeviceEvent::Granted) at once, [paused](DeviceEvent::Paused),
//! [resumed](DeviceEvent::Resumed) and [returned](DeviceEvent::Returned). In between its streams are
//! [lent](DeviceEvent::Lent), and they have been told what to wait for when its body
//! [begins](DeviceEvent::Begun) or goes on. For each attempt of a task that is
//!
//! ```text
//! granted+ lent* [begun (paused+ [resumed begun])*] returned+
//! ```
//!
//! where a body that a failing device keeps from beginning has no `begun`. The cores of a set with devices
//! are granted with these, as promised, and lent when the body has them, before its `begun` and again after a
//! wait, before which it [left](DeviceEvent::Left) them. What the device layer sees
//! ([`Observed`](crate::machine::Observed)) is logged by the thread that made the call, after it took
//! effect, so that what a host has seen complete was complete before that time. All that a body does
//! comes after its `begun`.

mod check;
mod evidence;
mod file;
mod lives;
mod moves;
mod numbers;
mod optimum;
mod order;
mod record;

pub use check::{Checked, NoEvidence, Rule, Violation, check};
pub use file::{TraceFile, read};
pub use moves::{Moves, check_moves};
pub use optimum::{Optimum, optimum};
pub use order::{Ordered, check_order};
pub use record::{AccessRecord, DeviceEvent, DeviceRecord, Event, Layout, MoveRecord, Record};

pub(crate) use numbers::{next_id, thread_number};

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::panic::resume_unwind;
use std::path::Path;
use std::time::{Instant, SystemTime};

use crossbeam_utils::CachePadded;

use crate::data::Access;
use crate::data::store::Moved;
use crate::sync::Mutex;
use crate::task::Domain;

/// What a trace shows of data: the order of accesses, and where the data were when they were needed.
#[derive(Clone, Debug)]
pub struct DataCheck {
    /// The order of accesses.
    pub order: Ordered,
    /// What was copied, and what the best eviction would have. A trace before version 4 does not say.
    pub moves: Option<(Moves, Optimum)>,
}

/// [`check_order`], [`check_moves`] and [`optimum`] at once, which costs less, on two threads.
///
/// # Errors
/// [`NoEvidence`] of a trace before version 3.
pub fn check_data(trace: &TraceFile) -> Result<DataCheck, NoEvidence> {
    if trace.version < 3 {
        let version = trace.version;
        return Err(NoEvidence { version, needs: 3 });
    }
    let lives = lives::Lives::new(trace);
    if trace.version < 4 {
        let order = order::prove(trace, &lives);
        return Ok(DataCheck { order, moves: None });
    }
    let scattered = moves::Scattered::new(trace, &lives);
    // The replay of copies costs about as much as both others.
    std::thread::scope(|scope| {
        let moves = scope.spawn(|| moves::replay(trace, &lives, &scattered));
        let order = order::prove(trace, &lives);
        let best = optimum::best(trace, &lives, &scattered);
        let moves = moves.join().unwrap_or_else(|panic| resume_unwind(panic));
        Ok(DataCheck {
            order,
            moves: Some((moves, best)),
        })
    })
}

const RINGS: usize = 64;
const CAPACITY: usize = 1024;

#[derive(Default)]
struct Ring {
    tasks: Vec<Record>,
    devices: Vec<DeviceRecord>,
    accesses: Vec<AccessRecord>,
    moves: Vec<MoveRecord>,
}

pub(crate) struct Trace {
    start: Instant,
    rings: Box<[CachePadded<Mutex<Ring>>]>,
    file: Mutex<BufWriter<File>>,
    /// Whose label is written.
    data: Mutex<HashSet<u64>>,
}

impl Trace {
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let mut file = BufWriter::new(File::create(path)?);
        let wall = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |time| time.as_nanos());
        file::write_header(&mut file, u64::try_from(wall).unwrap_or(u64::MAX))?;
        Ok(Self {
            start: Instant::now(),
            rings: (0..RINGS)
                .map(|_| CachePadded::new(Mutex::new(Ring::default())))
                .collect(),
            file: Mutex::new(file),
            data: Mutex::new(HashSet::new()),
        })
    }

    /// The time, in nanoseconds since the start.
    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    pub(crate) fn record(&self, event: Event, task: u64, other: u64) {
        self.record_at(self.now(), event, task, other);
    }

    pub(crate) fn record_at(&self, time: u64, event: Event, task: u64, other: u64) {
        let thread = thread_number();
        let record = Record {
            time,
            task,
            other,
            thread: u32::try_from(thread).unwrap_or(u32::MAX),
            event,
        };
        let mut ring = self.rings[thread % RINGS].lock();
        ring.tasks.push(record);
        if ring.tasks.len() == CAPACITY {
            self.write(|file| file::write_tasks(file, &ring.tasks));
            ring.tasks.clear();
        }
    }

    pub(crate) fn record_device(&self, event: DeviceEvent, task: u64) {
        self.record_device_at(self.now(), event, task);
    }

    pub(crate) fn record_device_at(&self, time: u64, event: DeviceEvent, task: u64) {
        let thread = thread_number();
        let record = DeviceRecord {
            time,
            task,
            thread: u32::try_from(thread).unwrap_or(u32::MAX),
            event,
        };
        let mut ring = self.rings[thread % RINGS].lock();
        ring.devices.push(record);
        if ring.devices.len() == CAPACITY {
            self.write(|file| file::write_devices(file, &ring.devices));
            ring.devices.clear();
        }
    }

    /// An access of `task`, with its number in the order of its datum.
    pub(crate) fn record_access<D: Domain>(&self, task: u64, access: &Access<'_, D>, number: u64) {
        let datum = access.part.datum();
        if self.data.lock().insert(datum.id()) {
            self.write(|file| {
                file::write_label(file, datum.id(), datum.label())?;
                datum.storage().map_or(Ok(()), |storage| {
                    file::write_layout(file, datum.id(), storage.item(), datum.shape())
                })
            });
        }
        let thread = thread_number();
        let record = AccessRecord {
            time: self.now(),
            task,
            datum: datum.id(),
            number,
            thread: u32::try_from(thread).unwrap_or(u32::MAX),
            mode: access.mode,
            region: access.part.region().clone(),
            spread: access.spread,
        };
        let mut ring = self.rings[thread % RINGS].lock();
        ring.accesses.push(record);
        if ring.accesses.len() == CAPACITY {
            self.write(|file| file::write_accesses(file, &ring.accesses));
            ring.accesses.clear();
        }
    }

    /// A copy, or an instance that was dropped.
    pub(crate) fn record_move(&self, moved: &Moved) {
        let time = moved.at.saturating_duration_since(self.start).as_nanos();
        self.push_move(MoveRecord {
            time: u64::try_from(time).unwrap_or(u64::MAX),
            thread: u32::try_from(thread_number()).unwrap_or(u32::MAX),
            datum: moved.storage,
            region: moved.region.clone(),
            from: moved.from,
            to: moved.to,
            source: moved.source.clone(),
            target: moved.target.clone(),
            bytes: moved.bytes,
            event: moved.event,
        });
    }

    fn push_move(&self, record: MoveRecord) {
        let mut ring = self.rings[thread_number() % RINGS].lock();
        ring.moves.push(record);
        if ring.moves.len() == CAPACITY {
            self.write(|file| file::write_moves(file, &ring.moves));
            ring.moves.clear();
        }
    }

    pub(crate) fn name(&self, task: u64, name: &str) {
        self.write(|file| file::write_name(file, task, name));
    }

    /// A disk that is full must not stop the program; the missing end tells the reader.
    fn write(&self, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) {
        let _ = write(&mut self.file.lock());
    }

    /// Writes what is left and the end.
    pub(crate) fn close(&self) -> io::Result<()> {
        for ring in &self.rings {
            let ring = std::mem::take(&mut *ring.lock());
            self.write(|file| file::write_tasks(file, &ring.tasks));
            self.write(|file| file::write_devices(file, &ring.devices));
            self.write(|file| file::write_accesses(file, &ring.accesses));
            self.write(|file| file::write_moves(file, &ring.moves));
        }
        let mut file = self.file.lock();
        file::write_end(&mut *file)?;
        file.flush()
    }
}
