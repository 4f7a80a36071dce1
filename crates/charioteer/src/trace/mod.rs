//! What happened, and when: event rings and the trace file.
//!
//! Each thread appends to a ring of its own; a full ring goes to the file in one write, under the
//! file's lock. A runtime that is not traced pays one branch an event. The file is raw and
//! versioned; [`read`] gives it back, and tells a file that is none, of another version, or cut off.
//!
//! # Format, version 1 (little endian)
//!
//! ```text
//! header   8 bytes "CHARIOTR", u32 version, u32 reserved (zero),
//!          u64 wall clock of the start, nanoseconds since 1970
//! block    u32 tag, u32 count
//!   tag 1  count events: u64 nanoseconds since the start, u64 task, u64 other, u32 thread, u32 event
//!   tag 2  one name: u64 task, count bytes of UTF-8
//!   tag 3  the end, count is zero; a file without it was cut off
//! ```
//!
//! `other` is the predecessor of an [`Event::Edge`] and zero elsewhere. An event that other threads
//! can act upon bears the time just before it took effect, so the times respect causes: a task is
//! done no later than its dependents are ready, and ready no later than it starts. The events of one
//! task are, in the order of their times,
//!
//! ```text
//! [spawn edge*] (ready start (suspend ready start)* end [retry])* (done | failed)
//! ```
//!
//! where a task that is cancelled or skipped may fail at any point before a `start`, and one that was
//! never spawned has nothing but its failure.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;
use std::time::{Instant, SystemTime};

use crossbeam_utils::CachePadded;

use crate::sync::Mutex;

const MAGIC: &[u8; 8] = b"CHARIOTR";
const VERSION: u32 = 1;
const RINGS: usize = 64;
const CAPACITY: usize = 1024;

/// What may happen to a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Event {
    /// It was spawned.
    Spawn = 1,
    /// It was spawned with a predecessor, named by `other`.
    Edge = 2,
    /// Its predecessors are done.
    Ready = 3,
    /// A thread runs or resumes its body.
    Start = 4,
    /// The body gave its thread up.
    Suspend = 5,
    /// The body ended.
    End = 6,
    /// The attempt failed, another one follows.
    Retry = 7,
    /// It has its outcome: a value.
    Done = 8,
    /// It has its outcome: none, by a failure, by cancellation or because a predecessor failed.
    Failed = 9,
}

impl Event {
    fn of(number: u32) -> Option<Self> {
        [
            Self::Spawn,
            Self::Edge,
            Self::Ready,
            Self::Start,
            Self::Suspend,
            Self::End,
            Self::Retry,
            Self::Done,
            Self::Failed,
        ]
        .into_iter()
        .find(|event| *event as u32 == number)
    }

    /// Its name in lower case.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Spawn => "spawn",
            Self::Edge => "edge",
            Self::Ready => "ready",
            Self::Start => "start",
            Self::Suspend => "suspend",
            Self::End => "end",
            Self::Retry => "retry",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

/// One event of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Nanoseconds since the start of the trace.
    pub time: u64,
    /// The task.
    pub task: u64,
    /// The other task of an edge, else zero.
    pub other: u64,
    /// The thread, by a number that is unique in the process.
    pub thread: u32,
    /// What happened.
    pub event: Event,
}

pub(crate) struct Trace {
    start: Instant,
    rings: Box<[CachePadded<Mutex<Vec<Record>>>]>,
    file: Mutex<BufWriter<File>>,
}

impl Trace {
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let mut file = BufWriter::new(File::create(path)?);
        let wall = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |time| time.as_nanos());
        file.write_all(MAGIC)?;
        file.write_all(&VERSION.to_le_bytes())?;
        file.write_all(&0_u32.to_le_bytes())?;
        file.write_all(&u64::try_from(wall).unwrap_or(u64::MAX).to_le_bytes())?;
        Ok(Self {
            start: Instant::now(),
            rings: (0..RINGS)
                .map(|_| CachePadded::new(Mutex::new(Vec::new())))
                .collect(),
            file: Mutex::new(file),
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
        ring.push(record);
        if ring.len() == CAPACITY {
            self.write(&ring);
            ring.clear();
        }
    }

    pub(crate) fn name(&self, task: u64, name: &str) {
        let mut file = self.file.lock();
        let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
        let bytes = &name.as_bytes()[..length as usize];
        let _ = block(&mut *file, 2, length)
            .and_then(|()| file.write_all(&task.to_le_bytes()))
            .and_then(|()| file.write_all(bytes));
    }

    /// A disk that is full must not stop the program; the missing end tells the reader.
    fn write(&self, records: &[Record]) {
        let mut file = self.file.lock();
        let mut bytes = Vec::with_capacity(records.len() * 32);
        for record in records {
            bytes.extend_from_slice(&record.time.to_le_bytes());
            bytes.extend_from_slice(&record.task.to_le_bytes());
            bytes.extend_from_slice(&record.other.to_le_bytes());
            bytes.extend_from_slice(&record.thread.to_le_bytes());
            bytes.extend_from_slice(&(record.event as u32).to_le_bytes());
        }
        let count = u32::try_from(records.len()).expect("a ring is small");
        let _ = block(&mut *file, 1, count).and_then(|()| file.write_all(&bytes));
    }

    /// Writes what is left and the end.
    pub(crate) fn close(&self) -> io::Result<()> {
        for ring in &self.rings {
            let mut ring = ring.lock();
            if !ring.is_empty() {
                self.write(&ring);
                ring.clear();
            }
        }
        let mut file = self.file.lock();
        block(&mut *file, 3, 0)?;
        file.flush()
    }
}

fn block(file: &mut impl Write, tag: u32, count: u32) -> io::Result<()> {
    file.write_all(&tag.to_le_bytes())?;
    file.write_all(&count.to_le_bytes())
}

/// A trace that was read.
#[derive(Debug, Default)]
pub struct TraceFile {
    /// The wall clock at its start, nanoseconds since 1970.
    pub wall: u64,
    /// The events, ordered by time.
    pub records: Vec<Record>,
    /// The names of tasks.
    pub names: std::collections::HashMap<u64, String>,
}

/// Reads a trace file.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] with a sentence that says what is wrong, for a file that is no
/// trace, has another version or was cut off; else what the system says.
pub fn read(path: &Path) -> io::Result<TraceFile> {
    let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    let mut at = Cursor(&bytes);
    let cut = || bad(format!("{}: the trace was cut off", path.display()));
    if at.take(8) != Some(MAGIC) {
        return Err(bad(format!("{}: not a Charioteer trace", path.display())));
    }
    let version = at.number32().ok_or_else(cut)?;
    if version != VERSION {
        return Err(bad(format!(
            "{}: the trace has version {version}, this reader knows {VERSION}",
            path.display()
        )));
    }
    at.number32().ok_or_else(cut)?;
    let mut file = TraceFile {
        wall: at.number64().ok_or_else(cut)?,
        ..TraceFile::default()
    };
    loop {
        let tag = at.number32().ok_or_else(cut)?;
        let count = at.number32().ok_or_else(cut)?;
        match tag {
            1 => {
                for _ in 0..count {
                    let mut next = || -> Option<(u64, u64, u64, u32, u32)> {
                        Some((
                            at.number64()?,
                            at.number64()?,
                            at.number64()?,
                            at.number32()?,
                            at.number32()?,
                        ))
                    };
                    let (time, task, other, thread, event) = next().ok_or_else(cut)?;
                    let event = Event::of(event)
                        .ok_or_else(|| bad(format!("{}: no event {event}", path.display())))?;
                    file.records.push(Record {
                        time,
                        task,
                        other,
                        thread,
                        event,
                    });
                }
            }
            2 => {
                let task = at.number64().ok_or_else(cut)?;
                let name = at.take(count as usize).ok_or_else(cut)?;
                file.names
                    .insert(task, String::from_utf8_lossy(name).into_owned());
            }
            3 => break,
            _ => return Err(bad(format!("{}: no block {tag}", path.display()))),
        }
    }
    file.records.sort_by_key(|record| record.time);
    Ok(file)
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }
    fn number32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }
    fn number64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }
}

mod numbers {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    /// How many task numbers a thread takes at a time.
    const BLOCK: u64 = 1024;

    static NEXT: AtomicU64 = AtomicU64::new(1);
    static THREADS: AtomicUsize = AtomicUsize::new(0);

    thread_local! {
        static LEFT: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
        static THREAD: Cell<usize> = const { Cell::new(usize::MAX) };
    }

    #[inline]
    pub(crate) fn next_id() -> u64 {
        LEFT.with(|left| {
            let (mut next, mut end) = left.get();
            if next == end {
                next = NEXT.fetch_add(BLOCK, Ordering::Relaxed);
                end = next + BLOCK;
            }
            left.set((next + 1, end));
            next
        })
    }

    #[inline]
    pub(crate) fn thread_number() -> usize {
        THREAD.with(|thread| {
            let mut number = thread.get();
            if number == usize::MAX {
                number = THREADS.fetch_add(1, Ordering::Relaxed);
                thread.set(number);
            }
            number
        })
    }
}

pub(crate) use numbers::{next_id, thread_number};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_comes_back_as_it_was_written() {
        let path = std::env::temp_dir().join(format!("charioteer-trace-{}", std::process::id()));
        let trace = Trace::create(&path).unwrap();
        for task in 1..=3000 {
            trace.record(Event::Spawn, task, 0);
        }
        trace.name(7, "seven");
        trace.close().unwrap();
        let file = read(&path).unwrap();
        assert_eq!(file.records.len(), 3000);
        assert!(file.records.is_sorted_by_key(|record| record.time));
        assert_eq!(file.names[&7], "seven");

        let bytes = std::fs::read(&path).unwrap();
        for (cut, message) in [(5, "not a"), (20, "cut off"), (bytes.len() - 8, "cut off")] {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(message), "{cut}: {error}");
        }
        let mut other = bytes.clone();
        other[8] = 99;
        std::fs::write(&path, &other).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("version 99"));
        std::fs::remove_file(&path).unwrap();
    }
}
