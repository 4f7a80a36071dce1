//! The trace file, written and read; the module has the format.
//!
//! # How it is read
//!
//! A file may be as large as a good part of the memory, so it is not held beside what is made of it. It is
//! walked twice. The first walk reads what is in few or long records, and notes where the blocks of events are
//! and whose they are. The second reads these thread by thread, since what one thread wrote is in order but
//! for a few, and a merge of some long runs costs little: events of tasks on one thread, those of devices on
//! another.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::panic::resume_unwind;
use std::path::Path;

use smallvec::SmallVec;

use super::record::{
    AccessRecord, DeviceRecord, Event, Layout, MoveRecord, NO_POSITION, Record, mode_of,
    mode_words, spread_of, spread_word, stream_of, stream_word,
};
use crate::data::Spread;
use crate::machine::{DeviceId, Event as Position};
use crate::region::{Region, Span};

const MAGIC: &[u8; 8] = b"CHARIOTR";
const VERSION: u32 = 4;
/// The oldest that is read.
const OLDEST: u32 = 1;

const TASKS: u32 = 1;
const NAME: u32 = 2;
const END: u32 = 3;
const DEVICES: u32 = 4;
const ACCESSES: u32 = 5;
const LABEL: u32 = 6;
const MOVES: u32 = 7;
const LAYOUT: u32 = 8;

/// Bytes of an event of a task and of one of a device, and where in it the thread is.
const TASK: (u64, u64) = (32, 24);
const DEVICE: (u64, u64) = (56, 16);

pub(super) fn write_header(file: &mut impl Write, wall: u64) -> io::Result<()> {
    file.write_all(MAGIC)?;
    file.write_all(&VERSION.to_le_bytes())?;
    file.write_all(&0_u32.to_le_bytes())?;
    file.write_all(&wall.to_le_bytes())
}

fn write_block(file: &mut impl Write, tag: u32, count: usize) -> io::Result<()> {
    let count = u32::try_from(count).expect("a block is small");
    file.write_all(&tag.to_le_bytes())?;
    file.write_all(&count.to_le_bytes())
}

pub(super) fn write_tasks(file: &mut impl Write, records: &[Record]) -> io::Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    let mut bytes = Vec::with_capacity(records.len() * 32);
    for record in records {
        bytes.extend_from_slice(&record.time.to_le_bytes());
        bytes.extend_from_slice(&record.task.to_le_bytes());
        bytes.extend_from_slice(&record.other.to_le_bytes());
        bytes.extend_from_slice(&record.thread.to_le_bytes());
        bytes.extend_from_slice(&(record.event as u32).to_le_bytes());
    }
    write_block(file, TASKS, records.len())?;
    file.write_all(&bytes)
}

pub(super) fn write_devices(file: &mut impl Write, records: &[DeviceRecord]) -> io::Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    let mut bytes = Vec::with_capacity(records.len() * 56);
    for record in records {
        let (kind, words) = record.encode();
        bytes.extend_from_slice(&record.time.to_le_bytes());
        bytes.extend_from_slice(&record.task.to_le_bytes());
        bytes.extend_from_slice(&record.thread.to_le_bytes());
        bytes.extend_from_slice(&kind.to_le_bytes());
        for word in words {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    write_block(file, DEVICES, records.len())?;
    file.write_all(&bytes)
}

pub(super) fn write_accesses(file: &mut impl Write, records: &[AccessRecord]) -> io::Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    let mut bytes = Vec::with_capacity(records.len() * 96);
    for record in records {
        for word in [record.time, record.task, record.datum, record.number] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        let [mode, operation] = mode_words(record.mode);
        let axes = u32::try_from(record.region.spans().len()).expect("fewer axes than that");
        let spread = spread_word(record.spread);
        for word in [record.thread, mode, operation, spread, 0, axes] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        put_spans(&mut bytes, &record.region);
    }
    write_block(file, ACCESSES, records.len())?;
    file.write_all(&bytes)
}

fn put_spans(bytes: &mut Vec<u8>, region: &Region) {
    for span in region.spans() {
        for word in [span.start(), span.step(), span.count()] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
}

pub(super) fn write_moves(file: &mut impl Write, records: &[MoveRecord]) -> io::Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    let mut bytes = Vec::with_capacity(records.len() * 192);
    for record in records {
        let (stream, position) = record.event.map_or((0, NO_POSITION), |event| {
            (stream_word(event.stream), event.position)
        });
        for word in [record.time, record.datum, record.bytes, stream, position] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        let axes = u32::try_from(record.region.spans().len()).expect("fewer axes than that");
        let (from, to) = (record.from.0.into(), record.to.0.into());
        for word in [record.thread, from, to, axes] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        for region in [&record.region, &record.source, &record.target] {
            put_spans(&mut bytes, region);
        }
    }
    write_block(file, MOVES, records.len())?;
    file.write_all(&bytes)
}

pub(super) fn write_layout(
    file: &mut impl Write,
    datum: u64,
    item: u64,
    shape: &[u64],
) -> io::Result<()> {
    write_block(file, LAYOUT, shape.len())?;
    for word in [datum, item].iter().chain(shape) {
        file.write_all(&word.to_le_bytes())?;
    }
    Ok(())
}

pub(super) fn write_label(file: &mut impl Write, datum: u64, label: &str) -> io::Result<()> {
    write_block(file, LABEL, label.len())?;
    file.write_all(&datum.to_le_bytes())?;
    file.write_all(label.as_bytes())
}

pub(super) fn write_name(file: &mut impl Write, task: u64, name: &str) -> io::Result<()> {
    write_block(file, NAME, name.len())?;
    file.write_all(&task.to_le_bytes())?;
    file.write_all(name.as_bytes())
}

pub(super) fn write_end(file: &mut impl Write) -> io::Result<()> {
    write_block(file, END, 0)
}

/// A trace that was read.
#[derive(Clone, Debug, Default)]
pub struct TraceFile {
    /// The version of its format.
    pub version: u32,
    /// The wall clock at its start, nanoseconds since 1970.
    pub wall: u64,
    /// The events of tasks, ordered by time.
    pub records: Vec<Record>,
    /// The events of devices, ordered by time. A trace of version 1 has none.
    pub devices: Vec<DeviceRecord>,
    /// The accesses of tasks to data, ordered by datum and number. A trace before version 3 has none.
    pub accesses: Vec<AccessRecord>,
    /// The copies of elements between memories, and what was dropped, ordered by time. A trace before
    /// version 4 has none.
    pub moves: Vec<MoveRecord>,
    /// How the arrays lie that have elements.
    pub layouts: HashMap<u64, Layout>,
    /// The labels of data.
    pub labels: HashMap<u64, String>,
    /// The names of tasks.
    pub names: HashMap<u64, String>,
}

/// Reads a trace file, on two threads.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] with a sentence that says what is wrong, for a file that is no
/// trace, has another version or was cut off; else what the system says, also of what is no file but a
/// pipe.
pub fn read(path: &Path) -> io::Result<TraceFile> {
    let mut reader = Reader::open(path)?;
    let mut file = reader.header()?;
    let mut blocks = Blocks::default();
    while reader.block(&mut file, &mut blocks)? {}
    let Blocks { tasks, devices } = blocks;
    std::thread::scope(|scope| {
        let records = scope.spawn(|| {
            let mut reader = Reader::open(path)?;
            reader.events(tasks, Reader::task, |record| record.time)
        });
        file.devices = reader.events(devices, Reader::device, |record| record.time)?;
        file.accesses
            .sort_by_key(|record| (record.datum, record.number, record.task));
        file.moves.sort_by_key(|record| record.time);
        file.records = records
            .join()
            .unwrap_or_else(|panic| resume_unwind(panic))?;
        Ok(file)
    })
}

/// A block of events: where its records begin, how many they are, and whose the first one is.
struct Block {
    begin: u64,
    count: u32,
    thread: u32,
}

/// The blocks of events that the first walk passed.
#[derive(Default)]
struct Blocks {
    tasks: Vec<Block>,
    devices: Vec<Block>,
}

/// Bytes that are read at once.
const BUFFER: usize = 1 << 15;

struct Reader<'a> {
    path: &'a Path,
    input: BufReader<File>,
    /// How many bytes of the file were read or passed.
    at: u64,
}

impl<'a> Reader<'a> {
    fn open(path: &'a Path) -> io::Result<Self> {
        Ok(Self {
            path,
            input: BufReader::with_capacity(BUFFER, File::open(path)?),
            at: 0,
        })
    }

    fn bad(&self, what: &str) -> io::Error {
        let what = format!("{}: {what}", self.path.display());
        io::Error::new(io::ErrorKind::InvalidData, what)
    }

    /// The next bytes, or as many as there are.
    fn take(&mut self, count: u32) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let input = &mut self.input;
        input.take(count.into()).read_to_end(&mut bytes)?;
        self.at += bytes.len() as u64;
        Ok(bytes)
    }

    fn text(&mut self, count: u32) -> io::Result<String> {
        let bytes = self.take(count)?;
        if bytes.len() < count as usize {
            return Err(self.bad("the trace was cut off"));
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    #[inline]
    fn bytes<const COUNT: usize>(&mut self) -> io::Result<[u8; COUNT]> {
        let mut bytes = [0; COUNT];
        self.input
            .read_exact(&mut bytes)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => self.bad("the trace was cut off"),
                _ => error,
            })?;
        self.at += COUNT as u64;
        Ok(bytes)
    }

    #[inline]
    fn number32(&mut self) -> io::Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    #[inline]
    fn number64(&mut self) -> io::Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    /// Goes to a place of the file, maybe beyond its end.
    fn go(&mut self, to: u64) -> io::Result<()> {
        self.input.seek_relative(to.wrapping_sub(self.at) as i64)?; // a file has 63 bits
        self.at = to;
        Ok(())
    }

    /// Passes a block of events of that many bytes each, of which the thread is at an offset.
    fn pass(&mut self, count: u32, (bytes, thread): (u64, u64)) -> io::Result<Block> {
        let begin = self.at;
        self.go(begin + thread)?;
        let thread = if count == 0 { 0 } else { self.number32()? };
        self.go(begin + u64::from(count) * bytes)?;
        Ok(Block {
            begin,
            count,
            thread,
        })
    }

    /// The events of all blocks, ordered by time.
    fn events<R>(
        &mut self,
        mut blocks: Vec<Block>,
        decode: impl Fn(&mut Self) -> io::Result<R>,
        time: impl Fn(&R) -> u64,
    ) -> io::Result<Vec<R>> {
        blocks.sort_by_key(|block| block.thread);
        let all = blocks.iter().map(|block| block.count as usize).sum();
        let mut records = Vec::with_capacity(all);
        for block in blocks {
            self.go(block.begin)?;
            let begin = records.len();
            for _ in 0..block.count {
                records.push(decode(self)?);
            }
            // Some events of a thread bear a time before that of the one before.
            records[begin..].sort_by_key(&time);
        }
        records.sort_by_key(time);
        Ok(records)
    }

    fn header(&mut self) -> io::Result<TraceFile> {
        if self.take(MAGIC.len() as u32)? != MAGIC {
            return Err(self.bad("not a Charioteer trace"));
        }
        let version = self.number32()?;
        if !(OLDEST..=VERSION).contains(&version) {
            return Err(self.bad(&format!(
                "the trace has version {version}, this reader knows {OLDEST} to {VERSION}"
            )));
        }
        self.number32()?;
        Ok(TraceFile {
            version,
            wall: self.number64()?,
            ..TraceFile::default()
        })
    }

    /// Reads a block, or passes it if it is one of events; false if it was the end.
    fn block(&mut self, file: &mut TraceFile, blocks: &mut Blocks) -> io::Result<bool> {
        let tag = self.number32()?;
        let count = self.number32()?;
        match tag {
            TASKS => blocks.tasks.push(self.pass(count, TASK)?),
            NAME => {
                let task = self.number64()?;
                file.names.insert(task, self.text(count)?);
            }
            END => return Ok(false),
            DEVICES if file.version >= 2 => blocks.devices.push(self.pass(count, DEVICE)?),
            ACCESSES if file.version >= 3 => {
                for _ in 0..count {
                    let record = self.access(file.version)?;
                    file.accesses.push(record);
                }
            }
            LABEL if file.version >= 3 => {
                let datum = self.number64()?;
                file.labels.insert(datum, self.text(count)?);
            }
            MOVES if file.version >= 4 => {
                for _ in 0..count {
                    let record = self.movement()?;
                    file.moves.push(record);
                }
            }
            LAYOUT if file.version >= 4 => {
                let (datum, item) = (self.number64()?, self.number64()?);
                let shape: io::Result<Vec<u64>> = (0..count).map(|_| self.number64()).collect();
                let shape = shape?;
                file.layouts.insert(datum, Layout { item, shape });
            }
            _ => return Err(self.bad(&format!("no block {tag}"))),
        }
        Ok(true)
    }

    fn task(&mut self) -> io::Result<Record> {
        let bytes: [u8; TASK.0 as usize] = self.bytes()?;
        let mut fields = Fields(&bytes);
        let (time, task, other) = (fields.number64(), fields.number64(), fields.number64());
        let (thread, event) = (fields.number32(), fields.number32());
        let event = Event::of(event).ok_or_else(|| self.bad(&format!("no event {event}")))?;
        Ok(Record {
            time,
            task,
            other,
            thread,
            event,
        })
    }

    fn access(&mut self, version: u32) -> io::Result<AccessRecord> {
        let bytes: [u8; 44] = self.bytes()?;
        let mut fields = Fields(&bytes);
        let (time, task) = (fields.number64(), fields.number64());
        let (datum, number) = (fields.number64(), fields.number64());
        let thread = fields.number32();
        let mode = [fields.number32(), fields.number32()];
        let mode = mode_of(mode).ok_or_else(|| self.bad(&format!("no mode {mode:?}")))?;
        let mut spread = Spread::default();
        if version >= 4 {
            let word = self.number32()?;
            spread = spread_of(word).ok_or_else(|| self.bad(&format!("no spread {word}")))?;
            self.number32()?;
        }
        let axes = self.number32()?;
        Ok(AccessRecord {
            time,
            task,
            datum,
            number,
            thread,
            mode,
            region: self.region(axes)?,
            spread,
        })
    }

    fn region(&mut self, axes: u32) -> io::Result<Region> {
        let mut spans = SmallVec::<[Span; 4]>::new();
        for _ in 0..axes {
            let bytes: [u8; 24] = self.bytes()?;
            let mut fields = Fields(&bytes);
            let [start, step, count] = std::array::from_fn(|_| fields.number64());
            let span = Span::checked(start, step, count);
            spans.push(span.ok_or_else(|| self.bad("no span"))?);
        }
        Ok(Region::new(spans))
    }

    fn movement(&mut self) -> io::Result<MoveRecord> {
        let bytes: [u8; 56] = self.bytes()?;
        let mut fields = Fields(&bytes);
        let (time, datum, bytes) = (fields.number64(), fields.number64(), fields.number64());
        let (stream, position) = (fields.number64(), fields.number64());
        let thread = fields.number32();
        let [from, to] = [fields.number32(), fields.number32()];
        let axes = fields.number32();
        let device = |number: u32| u16::try_from(number).ok().map(DeviceId);
        let [Some(from), Some(to)] = [device(from), device(to)] else {
            return Err(self.bad(&format!("no devices {from} and {to}")));
        };
        let event = if position == NO_POSITION {
            None
        } else {
            let stream = stream_of(stream).ok_or_else(|| self.bad("no stream"))?;
            Some(Position { stream, position })
        };
        Ok(MoveRecord {
            time,
            thread,
            datum,
            region: self.region(axes)?,
            from,
            to,
            source: self.region(axes)?,
            target: self.region(axes)?,
            bytes,
            event,
        })
    }

    fn device(&mut self) -> io::Result<DeviceRecord> {
        let bytes: [u8; DEVICE.0 as usize] = self.bytes()?;
        let mut fields = Fields(&bytes);
        let (time, task) = (fields.number64(), fields.number64());
        let (thread, kind) = (fields.number32(), fields.number32());
        let words = std::array::from_fn(|_| fields.number64());
        let event = DeviceRecord::decode(kind, words)
            .ok_or_else(|| self.bad(&format!("no event {kind} of a device with {words:?}")))?;
        Ok(DeviceRecord {
            time,
            task,
            thread,
            event,
        })
    }
}

/// What is left of the fields of a record.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    #[inline]
    fn next<const COUNT: usize>(&mut self) -> [u8; COUNT] {
        let (field, rest) = (self.0.split_first_chunk()).expect("a record has all its fields");
        self.0 = rest;
        *field
    }

    #[inline]
    fn number32(&mut self) -> u32 {
        u32::from_le_bytes(self.next())
    }

    #[inline]
    fn number64(&mut self) -> u64 {
        u64::from_le_bytes(self.next())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DeviceEvent, Trace, thread_number};
    use super::*;
    use crate::machine::{DeviceId, Enqueued, Event as Position, Observed, Stream};

    #[test]
    fn a_trace_comes_back_as_it_was_written() {
        let path = std::env::temp_dir().join(format!("charioteer-trace-{}", std::process::id()));
        let trace = Trace::create(&path).unwrap();
        // Its block is the last, and its time the first.
        let other = std::thread::scope(|scope| {
            let record = || trace.record(Event::Done, 9, 0);
            scope.spawn(move || (record(), thread_number()).1).join()
        });
        for task in 1..=3000 {
            trace.record(Event::Spawn, task, 0);
        }
        trace.name(7, "seven");
        let events = device_events();
        for round in 0..200 {
            for event in &events {
                trace.record_device(*event, round);
            }
        }
        let moves = moves();
        for record in &moves {
            trace.push_move(record.clone());
        }
        trace.close().unwrap();
        let file = read(&path).unwrap();
        assert_eq!(file.moves, moves);
        assert_eq!(file.version, 4);
        assert_eq!(file.records.len(), 3001);
        assert!(file.records.is_sorted_by_key(|record| record.time));
        assert_eq!(file.records[0].thread as usize, other.unwrap());
        let tasks = file.records[1..].iter().map(|record| record.task);
        assert!(tasks.eq(1..=3000));
        assert_eq!(file.names[&7], "seven");
        let read_back: Vec<_> = file.devices.iter().map(|record| record.event).collect();
        assert_eq!(read_back, events.repeat(200));
        assert!(file.devices.is_sorted_by_key(|record| record.task));

        let bytes = std::fs::read(&path).unwrap();
        let cuts = [20, 28, 100, bytes.len() / 2, bytes.len() - 8].map(|cut| (cut, "cut off"));
        for (cut, message) in [(5, "not a")].into_iter().chain(cuts) {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(message), "{cut}: {error}");
        }
        let mut other = bytes.clone();
        other[8] = 99;
        std::fs::write(&path, &other).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(
            error.contains("version 99") && error.contains("1 to 4"),
            "{error}"
        );
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_trace_of_version_1_is_read() {
        let path = std::env::temp_dir().join(format!("charioteer-old-{}", std::process::id()));
        let mut bytes = Vec::new();
        write_header(&mut bytes, 5).unwrap();
        bytes[8] = 1;
        let record = Record {
            time: 3,
            task: 1,
            other: 0,
            thread: 2,
            event: Event::Done,
        };
        write_tasks(&mut bytes, &[record]).unwrap();
        let before_devices = bytes.len();
        write_end(&mut bytes).unwrap();
        std::fs::write(&path, &bytes).unwrap();
        let file = read(&path).unwrap();
        assert_eq!((file.version, file.wall), (1, 5));
        assert_eq!(file.records, [record]);

        // It has no devices.
        bytes.truncate(before_devices);
        let device = DeviceRecord {
            time: 1,
            task: 0,
            thread: 0,
            event: DeviceEvent::Begun,
        };
        write_devices(&mut bytes, &[device]).unwrap();
        std::fs::write(&path, &bytes).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("no block 4"));
        std::fs::remove_file(&path).unwrap();
    }

    /// A copy, and a drop.
    fn moves() -> Vec<MoveRecord> {
        let region = Region::new([Span::range(2, 5), Span::new(1, 3, 4)]);
        let copied = MoveRecord {
            time: 5,
            thread: 1,
            datum: 8,
            source: Region::whole(&[10, 20]),
            target: Region::new([Span::range(2, 5), Span::range(1, 11)]),
            region,
            from: DeviceId(0),
            to: DeviceId(3),
            bytes: 96,
            event: Some(Position {
                stream: Stream {
                    device: DeviceId(3),
                    number: 2,
                },
                position: 0,
            }),
        };
        let dropped = MoveRecord {
            time: 6,
            event: None,
            ..copied.clone()
        };
        vec![copied, dropped]
    }

    /// One of each kind.
    fn device_events() -> Vec<DeviceEvent> {
        let device = DeviceId(3);
        let stream = Stream { device, number: 9 };
        let event = Position {
            stream,
            position: 1 << 40,
        };
        let member = 2;
        let mut events = vec![
            DeviceEvent::Capacity {
                device,
                share: 65_536,
                memory: 1 << 41,
            },
            DeviceEvent::Granted {
                device,
                member,
                members: 4,
                place: 3,
                share: 65_536,
                memory: 17,
            },
            DeviceEvent::Lent(stream),
            DeviceEvent::Begun,
            DeviceEvent::Resumed,
            DeviceEvent::Left,
        ];
        for behind in [None, Some(event)] {
            events.push(DeviceEvent::Paused { member, behind });
            events.push(DeviceEvent::Returned { member, behind });
        }
        let waits = Observed::Waits {
            stream: Stream { device, number: 1 },
            from: 77,
            event,
        };
        let observed = [
            Observed::Created(stream),
            Observed::Enqueued(event, Enqueued::Operation),
            Observed::Enqueued(event, Enqueued::Busy),
            Observed::Enqueued(event, Enqueued::Copy),
            Observed::Enqueued(event, Enqueued::Free),
            Observed::Recorded(event),
            waits,
            Observed::Synchronised(event),
            Observed::Seen(event),
            Observed::Completed(event),
            Observed::Failed(event),
            Observed::Abandoned(event),
        ];
        events.extend(observed.map(DeviceEvent::Observed));
        events
    }
}
