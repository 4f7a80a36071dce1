//! Who uses which part of one datum, as far as it matters to those who come.
//!
//! # Layout
//!
//! While all live accesses are to tiles of one grid (the whole of a datum is the only tile of a trivial
//! one) the records stand in *cells*, one a tile: tiles are equal or apart, so an access looks at one
//! cell. Other parts go into two trees of bounding boxes, of reads and of writes, whose finds are compared
//! exactly. An access of another kind moves what is live over; when nothing is, the index begins anew
//! with whatever suits the next access.
//!
//! # Records
//!
//! A *write* takes the place of what it contains. What it covers in part of an earlier write is cut out
//! of that, so that what is left of a record is what its task was the last one to write; a read stays
//! whole until a write contains it, which costs a later writer an edge that it had anyway. Members of a
//! reduction, and tasks that commute, share a record that later ones join, as long as no other access
//! that overlaps it stands between.
//!
//! A live record that a write takes the place of is kept aside, as a *shadow*: should its task spawn one
//! that conflicts, that has to be refused, whether somebody stands between them or not. Nobody looks at
//! shadows but the spawns of tasks that have accesses themselves.
//!
//! What nobody needs any more (see the module above) is dropped where it is met, and all of it every so
//! many registrations, in proportion to how many records there are.
//!
//! # What a look-up fetches
//!
//! Among many live accesses it costs what it fetches from far away, and how often it has to wait for that. For
//! a tile these are three cache lines, each of which says where the next one is: the part, its cell, and the
//! task that wrote last, with which the new one registers. So a part remembers where the other two were. When
//! a spawn meets its parts it asks for all of these, and makes its task meanwhile. Of boxes the tree finds all
//! that meet before one is looked at, so that they come together, and then their tasks.
//!
//! What a part remembers may be wrong: somebody else may have written since by another handle of the same tile,
//! and the cell may be gone. So it is asked for and not read.

use std::sync::Arc;

use smallvec::SmallVec;

use super::{Access, Datum, Group, Mode, Part, Place, Uses, tile_region};
use crate::fetch::fetch;
use crate::hash::QuickMap;
use crate::machine::{DeviceError, DeviceId};
use crate::region::Region;
use crate::region::tree::Tree;
use crate::sync::{AtomicBool, AtomicU32, Ordering};
use crate::task::{Domain, Past, TaskRef};

/// What was taken out of an index, to be dropped with no lock held.
pub(super) struct Gone<D: Domain> {
    writes: SmallVec<[Write<D>; 1]>,
    tasks: GoneTasks<D>,
}

type GoneTasks<D> = SmallVec<[TaskRef<D>; 4]>;

impl<D: Domain> Gone<D> {
    pub(super) fn new() -> Self {
        Self {
            writes: SmallVec::new(),
            tasks: SmallVec::new(),
        }
    }
}

/// Whom a task comes after.
pub(crate) struct Found<'s, D: Domain> {
    /// And whether it reads what that one writes; some may be there twice.
    pub(crate) before: SmallVec<[(&'s TaskRef<D>, bool); 6]>,
    pub(super) open: Option<Arc<Group<D>>>,
    /// Whether the reduction that is to be closed is there.
    pub(super) closes: bool,
}

impl<'s, D: Domain> Found<'s, D> {
    #[inline]
    pub(crate) fn new() -> Self {
        Self {
            before: SmallVec::new(),
            open: None,
            closes: false,
        }
    }

    fn add(&mut self, task: &'s TaskRef<D>, reads: bool) {
        let latest = self.before.len().saturating_sub(8);
        for (other, other_reads) in &mut self.before[latest..] {
            if Arc::ptr_eq(other, task) {
                *other_reads |= reads;
                return;
            }
        }
        self.before.push((task, reads));
    }

    /// Adds a writer of what `task` accesses with `mode`, if it comes after that.
    #[inline]
    fn add_writer(&mut self, other: &'s TaskRef<D>, task: &TaskRef<D>, mode: Mode) {
        if Arc::ptr_eq(other, task) {
            return;
        }
        match (other.past(), mode) {
            (Past::Well, _) | (Past::Failed, Mode::Out) => {}
            (Past::Not, Mode::Out) => self.add(other, false),
            (Past::Not | Past::Failed, _) => self.add(other, true),
        }
    }
}

/// What a task has to do with data beyond its records.
pub(crate) struct Attached<D: Domain> {
    /// Parts for which it is to stand in line.
    pub(crate) lines: Vec<Part<D>>,
    pub(crate) groups: Vec<Arc<Group<D>>>,
    /// Of an access of the host: what is done when its turn has come.
    pub(crate) gate: Option<(TaskRef<D>, Arc<Turn>)>,
    /// What it uses of managed data, as long as it has to be got.
    pub(crate) uses: Option<Arc<Uses>>,
    /// Why it cannot be got.
    pub(crate) trouble: Option<DeviceError>,
    /// Of a task that only moves data: what it does.
    pub(crate) moves: Option<Move>,
}

/// What a task does that only moves data.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Move {
    /// Brings them to this device, where they may stay.
    Prefetch(DeviceId),
    /// Drops what is on this device.
    Evict(DeviceId),
    /// Brings them to the memory that the array brought along.
    Return,
    /// Nothing: what it writes is lost, for the trouble that it has.
    Lose,
}

impl<D: Domain> Default for Attached<D> {
    fn default() -> Self {
        Self {
            lines: Vec::new(),
            groups: Vec::new(),
            gate: None,
            uses: None,
            trouble: None,
            moves: None,
        }
    }
}

/// Whose an access of the host is, from its turn on.
pub(crate) struct Turn(AtomicU32);

impl Turn {
    pub(crate) const AHEAD: u32 = 0;
    pub(crate) const COME: u32 = 1;
    pub(crate) const GIVEN_UP: u32 = 2;

    pub(crate) fn new() -> Self {
        Self(AtomicU32::new(Self::AHEAD))
    }

    /// What it was before.
    pub(crate) fn swap(&self, state: u32) -> u32 {
        self.0.swap(state, Ordering::AcqRel)
    }
}

/// A record that a write took the place of while its task was live. There may be as many as tasks.
struct Shadow<D: Domain> {
    task: TaskRef<D>,
    what: What,
}

enum What {
    Tile { writes: bool, grid: u32, tile: u64 },
    Region { writes: bool, region: Box<Region> },
}

/// Shadows, in blocks: a list that grew as a whole would be copied, into memory that the system has to clear.
struct Shadows<D: Domain>(Vec<Vec<Shadow<D>>>);

impl<D: Domain> Shadows<D> {
    const FIRST: usize = 16;
    const BLOCK: usize = 256;

    fn push(&mut self, shadow: Shadow<D>) {
        const { assert!(size_of::<Shadow<D>>() == 24) };
        match self.0.last_mut() {
            Some(last) if last.len() < last.capacity() => last.push(shadow),
            last => {
                let room = last.map_or(Self::FIRST, |_| Self::BLOCK);
                let mut block = Vec::with_capacity(room);
                block.push(shadow);
                self.0.push(block);
            }
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Shadow<D>> {
        self.0.iter().flatten()
    }

    fn len(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }

    /// Drops those whose tasks are past.
    fn sweep(&mut self, gone: &mut GoneTasks<D>) {
        for shadow in std::mem::take(&mut self.0).into_iter().flatten() {
            if shadow.task.past() == Past::Not {
                self.push(shadow);
            } else {
                gone.push(shadow.task);
            }
        }
    }
}

/// Who wrote last, and has no reader but those that came later.
struct Write<D: Domain> {
    /// The number of the first access.
    at: u64,
    by: Writers<D>,
}

enum Writers<D: Domain> {
    One(TaskRef<D>),
    Joint(Box<Joint<D>>),
}

/// Tasks that commute, or reduce.
struct Joint<D: Domain> {
    group: Option<Arc<Group<D>>>,
    members: Vec<TaskRef<D>>,
}

impl<D: Domain> Write<D> {
    fn tasks(&self) -> &[TaskRef<D>] {
        match &self.by {
            Writers::One(task) => std::slice::from_ref(task),
            Writers::Joint(joint) => &joint.members,
        }
    }

    /// Asks for its task.
    #[inline]
    fn fetch(&self) {
        if let Writers::One(task) = &self.by {
            fetch(Arc::as_ptr(task));
        }
    }

    fn group(&self) -> Option<&Arc<Group<D>>> {
        match &self.by {
            Writers::Joint(joint) => joint.group.as_ref(),
            Writers::One(_) => None,
        }
    }

    /// Whether a task with `mode` can join, if it is of equal parts and nobody stands between.
    fn admits(&self, mode: Mode) -> bool {
        match (&self.by, mode) {
            (Writers::Joint(joint), Mode::Commute) => joint.group.is_none(),
            (Writers::Joint(joint), Mode::Reduce(operation)) => joint
                .group
                .as_ref()
                .is_some_and(|group| group.operation == operation),
            _ => false,
        }
    }

    /// Whether somebody may still have to know of it.
    fn matters(&self) -> bool {
        self.group().is_some() || self.tasks().iter().any(|task| writer_matters(task))
    }

    fn copy(&self) -> Self {
        let by = match &self.by {
            Writers::One(task) => Writers::One(Arc::clone(task)),
            Writers::Joint(joint) => Writers::Joint(Box::new(Joint {
                group: joint.group.clone(),
                members: joint.members.clone(),
            })),
        };
        Self { at: self.at, by }
    }
}

fn writer_matters<D: Domain>(task: &TaskRef<D>) -> bool {
    task.past() != Past::Well
}

fn reader_matters<D: Domain>(task: &TaskRef<D>) -> bool {
    task.past() == Past::Not
}

/// Takes out of the records of a cell what does not matter.
fn take_out<A: smallvec::Array>(
    list: &mut SmallVec<A>,
    matters: impl Fn(&A::Item) -> bool,
    mut gone: impl FnMut(A::Item),
) {
    let mut at = 0;
    while at < list.len() {
        if matters(&list[at]) {
            at += 1;
        } else {
            gone(list.swap_remove(at));
        }
    }
    if list.is_empty() && list.spilled() {
        *list = SmallVec::new();
    }
}

/// Takes out of a list what does not matter, and makes room so that this costs each task little.
fn push_task<D: Domain>(
    list: &mut Vec<TaskRef<D>>,
    task: &TaskRef<D>,
    matters: impl Fn(&TaskRef<D>) -> bool,
    gone: &mut Gone<D>,
) {
    if list.len() == list.capacity() {
        gone.tasks
            .extend(list.extract_if(.., |task| !matters(task)));
        list.reserve(list.len().max(4));
    }
    list.push(Arc::clone(task));
}

/// The records of one tile, in one cache line: that is what a look-up has to fetch.
#[repr(align(64))]
struct Cell<D: Domain> {
    /// Twice the number of the last reading access, and one more if it is in the list of cells in use.
    last_read: u64,
    writes: SmallVec<[Write<D>; 1]>,
    reads: SmallVec<[TaskRef<D>; 2]>,
}

impl<D: Domain> Cell<D> {
    const LISTED: u64 = 1;

    fn last_read(&self) -> u64 {
        self.last_read >> 1
    }

    fn is_listed(&self) -> bool {
        self.last_read & Self::LISTED != 0
    }

    /// It was read by the access of this number, and is in the list.
    fn read(&mut self, at: u64) {
        self.last_read = at << 1 | Self::LISTED;
    }
}

impl<D: Domain> Default for Cell<D> {
    fn default() -> Self {
        const { assert!(size_of::<Self>() == 64) };
        Self {
            last_read: 0,
            writes: SmallVec::new(),
            reads: SmallVec::new(),
        }
    }
}

const CHUNK: usize = 64;
type Chunk<D> = [Cell<D>; CHUNK];

struct Tiles<D: Domain> {
    grid: u32,
    /// Of tile 0: most data are accessed as a whole, and that is all they have.
    first: Cell<D>,
    chunks: QuickMap<u64, Box<Chunk<D>>>,
    /// Tiles whose cells may have records.
    used: Vec<u64>,
}

impl<D: Domain> Tiles<D> {
    fn new(grid: u32) -> Self {
        Self {
            grid,
            first: Cell::default(),
            chunks: QuickMap::default(),
            used: Vec::new(),
        }
    }

    #[inline]
    fn cell(&self, tile: u64) -> Option<&Cell<D>> {
        if tile == 0 {
            return Some(&self.first);
        }
        let chunk = self.chunks.get(&(tile / CHUNK as u64))?;
        Some(&chunk[(tile % CHUNK as u64) as usize])
    }

    #[inline]
    fn cell_mut(&mut self, tile: u64) -> &mut Cell<D> {
        let cell = if tile == 0 {
            &mut self.first
        } else {
            let chunk = self
                .chunks
                .entry(tile / CHUNK as u64)
                .or_insert_with(|| Box::new(std::array::from_fn(|_| Cell::default())));
            &mut chunk[(tile % CHUNK as u64) as usize]
        };
        if !cell.is_listed() {
            cell.last_read |= Cell::<D>::LISTED;
            self.used.push(tile);
        }
        cell
    }

    /// Drops what does not matter.
    fn sweep(&mut self, gone: &mut Gone<D>) {
        let (first, chunks) = (&mut self.first, &mut self.chunks);
        self.used.retain(|&tile| {
            let cell = if tile == 0 {
                &mut *first
            } else {
                let chunk = chunks.get_mut(&(tile / CHUNK as u64));
                &mut chunk.expect("a cell in use is there")[(tile % CHUNK as u64) as usize]
            };
            take_out(&mut cell.writes, Write::matters, |old| {
                gone.writes.push(old)
            });
            take_out(&mut cell.reads, reader_matters, |old| gone.tasks.push(old));
            let is_empty = cell.writes.is_empty() && cell.reads.is_empty();
            if is_empty {
                cell.last_read &= !Cell::<D>::LISTED;
            }
            !is_empty
        });
    }
}

/// The write first: what a look-up needs is together, as most do not need the region.
#[repr(C)]
struct BoxWrite<D: Domain> {
    write: Write<D>,
    region: Region,
}

#[repr(C)]
struct BoxRead<D: Domain> {
    at: u64,
    task: TaskRef<D>,
    region: Region,
}

struct Boxes<D: Domain> {
    writes: Tree<BoxWrite<D>>,
    reads: Tree<BoxRead<D>>,
}

impl<D: Domain> Boxes<D> {
    const fn new() -> Self {
        Self {
            writes: Tree::new(),
            reads: Tree::new(),
        }
    }

    fn len(&self) -> usize {
        self.writes.len() + self.reads.len()
    }

    fn sweep(&mut self, gone: &mut Gone<D>) {
        let mut writes = Vec::new();
        let old = &mut |entry: &BoxWrite<D>| !entry.write.matters();
        self.writes.extract(None, old, &mut writes);
        gone.writes
            .extend(writes.into_iter().map(|entry| entry.write));
        let mut reads = Vec::new();
        let old = &mut |entry: &BoxRead<D>| !reader_matters(&entry.task);
        self.reads.extract(None, old, &mut reads);
        gone.tasks.extend(reads.into_iter().map(|entry| entry.task));
    }
}

enum Layout<D: Domain> {
    Tiles(Tiles<D>),
    Boxes(Boxes<D>),
}

/// A task that commutes, in line or running.
struct Standing<D: Domain> {
    region: Region,
    task: TaskRef<D>,
}

/// See the module.
pub(super) struct Index<D: Domain> {
    closed: bool,
    /// The number of the last access.
    last: u64,
    /// The tiles of each grid but the trivial one.
    grids: Vec<Box<[u64]>>,
    layout: Layout<D>,
    lines: Tree<Standing<D>>,
    shadows: Shadows<D>,
    /// Registrations until the next sweep.
    patience: usize,
    /// Accesses to tiles until it is looked again whether they can have cells.
    retry: usize,
}

/// Registrations between two sweeps, at least.
const PATIENCE: usize = 256;

impl<D: Domain> Index<D> {
    pub(super) fn new() -> Self {
        Self {
            closed: false,
            last: 0,
            grids: Vec::new(),
            layout: Layout::Tiles(Tiles::new(0)),
            lines: Tree::new(),
            shadows: Shadows(Vec::new()),
            patience: PATIENCE,
            retry: 0,
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// The number of the grid with these tiles.
    pub(super) fn grid(&mut self, tile: &[u64]) -> u32 {
        let at = self.grids.iter().position(|other| **other == *tile);
        let at = at.unwrap_or_else(|| {
            self.grids.push(tile.into());
            self.grids.len() - 1
        });
        u32::try_from(at + 1).expect("fewer grids than that")
    }

    fn region_of(&self, datum: &Datum<D>, place: Place) -> Region {
        if place.grid == Place::WHOLE.grid {
            return Region::whole(&datum.shape);
        }
        let tile = &self.grids[place.grid as usize - 1];
        let mut number = place.tile;
        let mut index: SmallVec<[u64; 4]> = SmallVec::from_elem(0, tile.len());
        for axis in (0..tile.len()).rev() {
            let count = datum.shape[axis].div_ceil(tile[axis]);
            index[axis] = number % count;
            number /= count;
        }
        tile_region(&datum.shape, tile, &index)
    }

    /// Makes the layout fit accesses to tiles of `grid`, or to other parts.
    #[inline]
    pub(super) fn prepare(&mut self, datum: &Datum<D>, grid: u32, gone: &mut Gone<D>) {
        self.patience -= 1;
        if self.patience == 0 {
            self.sweep(gone);
        }
        match &self.layout {
            Layout::Tiles(tiles) if tiles.grid == grid => {}
            _ => self.relay(datum, grid, gone),
        }
    }

    fn sweep(&mut self, gone: &mut Gone<D>) {
        let left = match &mut self.layout {
            Layout::Tiles(tiles) => {
                tiles.sweep(gone);
                tiles.used.len()
            }
            Layout::Boxes(boxes) => {
                boxes.sweep(gone);
                boxes.len()
            }
        };
        self.sweep_lines(gone);
        self.shadows.sweep(&mut gone.tasks);
        let left = left + self.lines.len() + self.shadows.len();
        self.patience = PATIENCE.max(4 * left);
    }

    /// Whether `task` has a record that others took the place of and that conflicts with `access`.
    pub(super) fn shadows(&self, task: &TaskRef<D>, access: &Access<'_, D>) -> bool {
        let part = access.part;
        let of_task = self.shadows.iter().filter(|it| Arc::ptr_eq(&it.task, task));
        of_task.map(|shadow| &shadow.what).any(|what| match *what {
            What::Tile { writes, grid, tile } => {
                let place = Place { grid, tile };
                let is_met = || {
                    if grid == part.place.grid {
                        return tile == part.place.tile;
                    }
                    self.region_of(&part.datum, place).overlaps(&part.region)
                };
                (writes || access.mode.writes()) && is_met()
            }
            What::Region { writes, ref region } => {
                (writes || access.mode.writes()) && region.overlaps(&part.region)
            }
        })
    }

    fn sweep_lines(&mut self, gone: &mut Gone<D>) {
        let mut standing = Vec::new();
        let old = &mut |entry: &Standing<D>| !reader_matters(&entry.task);
        self.lines.extract(None, old, &mut standing);
        gone.tasks
            .extend(standing.into_iter().map(|entry| entry.task));
    }

    fn relay(&mut self, datum: &Datum<D>, grid: u32, gone: &mut Gone<D>) {
        match &mut self.layout {
            Layout::Tiles(tiles) => {
                tiles.sweep(gone);
                if !tiles.used.is_empty() {
                    return self.break_up(datum);
                }
            }
            Layout::Boxes(boxes) => {
                if grid == Place::NOWHERE.grid {
                    return;
                }
                if self.retry != 0 {
                    self.retry -= 1;
                    return;
                }
                boxes.sweep(gone);
                if boxes.len() != 0 {
                    self.retry = boxes.len().max(16);
                    return;
                }
            }
        }
        self.layout = if grid == Place::NOWHERE.grid {
            Layout::Boxes(Boxes::new())
        } else {
            Layout::Tiles(Tiles::new(grid))
        };
    }

    /// Moves the records of tiles into boxes.
    fn break_up(&mut self, datum: &Datum<D>) {
        let layout = std::mem::replace(&mut self.layout, Layout::Boxes(Boxes::new()));
        let Layout::Tiles(mut tiles) = layout else {
            self.layout = layout;
            return;
        };
        let mut boxes = Boxes::new();
        for tile in std::mem::take(&mut tiles.used) {
            let place = Place {
                grid: tiles.grid,
                tile,
            };
            let region = self.region_of(datum, place);
            let bounds = datum.bounds(&region);
            let cell = std::mem::take(tiles.cell_mut(tile));
            let at = cell.last_read();
            for write in cell.writes {
                let region = region.clone();
                boxes.writes.insert(bounds, BoxWrite { region, write });
            }
            for task in cell.reads {
                let entry = BoxRead {
                    region: region.clone(),
                    at,
                    task,
                };
                boxes.reads.insert(bounds, entry);
            }
        }
        self.retry = 0;
        self.layout = Layout::Boxes(boxes);
    }

    /// Calls `f` with the writes that overlap a part, and the region of each where that may be another one.
    fn writes<'s>(&'s self, part: &Part<D>, f: &mut impl FnMut(&'s Write<D>, Option<&'s Region>)) {
        match &self.layout {
            Layout::Tiles(tiles) => {
                for write in tiles
                    .cell(part.place.tile)
                    .iter()
                    .flat_map(|cell| &cell.writes)
                {
                    f(write, None);
                }
            }
            Layout::Boxes(boxes) => {
                let found = boxes.writes.find(&part.datum.bounds(&part.region));
                for (entry, _) in &found {
                    entry.write.fetch();
                }
                for (entry, exact) in found {
                    if exact || entry.region.overlaps(&part.region) {
                        f(&entry.write, Some(&entry.region));
                    }
                }
            }
        }
    }

    /// Calls `f` with the reads of boxes that overlap a part.
    fn reads<'s>(&'s self, part: &Part<D>, f: &mut impl FnMut(&'s TaskRef<D>)) {
        if let Layout::Boxes(boxes) = &self.layout {
            let found = boxes.reads.find(&part.datum.bounds(&part.region));
            for (entry, _) in &found {
                fetch(Arc::as_ptr(&entry.task));
            }
            for (entry, exact) in found {
                if exact || entry.region.overlaps(&part.region) {
                    f(&entry.task);
                }
            }
        }
    }

    /// The number of the last access that overlaps `part` and that tasks with `mode`, which join each
    /// other, come after.
    fn boundary(&self, part: &Part<D>, mode: Mode) -> u64 {
        let mut last = 0;
        match &self.layout {
            Layout::Tiles(tiles) => {
                if let Some(cell) = tiles.cell(part.place.tile) {
                    last = cell.last_read();
                }
            }
            Layout::Boxes(boxes) => {
                boxes
                    .reads
                    .visit(&part.datum.bounds(&part.region), &mut |entry, exact| {
                        if exact || entry.region.overlaps(&part.region) {
                            last = last.max(entry.at);
                        }
                    });
            }
        }
        self.writes(part, &mut |write, _| {
            if !write.admits(mode) {
                last = last.max(write.at);
            }
        });
        last
    }

    /// Adds whom `task` comes after by this access; true if that is its parent.
    pub(super) fn look_up<'s>(
        &'s self,
        task: &TaskRef<D>,
        parent: Option<&TaskRef<D>>,
        closing: Option<&Group<D>>,
        access: &Access<'_, D>,
        found: &mut Found<'s, D>,
    ) -> bool {
        let (part, mode) = (access.part, access.mode);
        let joins = matches!(mode, Mode::Commute | Mode::Reduce(_));
        let boundary = if joins { self.boundary(part, mode) } else { 0 };
        let is_parent =
            |other: &TaskRef<D>| parent.is_some_and(|parent| Arc::ptr_eq(parent, other));
        let cell = match &self.layout {
            Layout::Tiles(tiles) => match tiles.cell(part.place.tile) {
                Some(cell) => Some(cell),
                None => return false,
            },
            Layout::Boxes(_) => None,
        };
        let mut conflict = false;
        let mut covered = false;
        if mode.writes() {
            let mut read = |other: &'s TaskRef<D>| {
                if is_parent(other) {
                    conflict = true;
                } else if !Arc::ptr_eq(other, task) && other.past() == Past::Not {
                    found.add(other, false);
                    covered = true;
                }
            };
            match cell {
                Some(cell) => cell.reads.iter().for_each(read),
                None => self.reads(part, &mut read),
            }
        }
        // Who read a tile came after who wrote it: who comes after the reader has that order too.
        covered &= mode == Mode::Out && cell.is_some();
        let mut written = |write: &'s Write<D>, region: Option<&'s Region>| {
            if let Writers::One(other) = &write.by {
                conflict |= is_parent(other);
                if !covered {
                    found.add_writer(other, task, mode);
                }
                return;
            }
            let equal = || region.is_none_or(|region| *region == part.region);
            // Commuting tasks on other parts are kept apart by their line; reductions there are not.
            let joined =
                write.admits(mode) && write.at > boundary && (mode == Mode::Commute || equal());
            let closes =
                |group: &Arc<Group<D>>| closing.is_some_and(|closing| closing.id == group.id);
            if joined {
                conflict |= mode == Mode::Commute && write.tasks().iter().any(is_parent);
                return;
            }
            if write.tasks().iter().any(is_parent) {
                conflict = true;
            }
            if let Some(group) = write.group() {
                if closes(group) {
                    found.closes = true;
                } else {
                    found.open.get_or_insert_with(|| Arc::clone(group));
                }
            }
            for other in write.tasks() {
                found.add_writer(other, task, mode);
            }
        };
        match cell {
            Some(cell) => cell.writes.iter().for_each(|write| written(write, None)),
            None => self.writes(part, &mut written),
        }
        conflict
    }

    /// Enters the record of an access and gives its number.
    pub(super) fn enter(
        &mut self,
        task: &TaskRef<D>,
        access: &Access<'_, D>,
        gone: &mut Gone<D>,
    ) -> u64 {
        let at = self.last + 1;
        match access.mode {
            Mode::In => self.enter_read(task, access.part, at, gone),
            Mode::Out | Mode::InOut => self.enter_write(task, access.part, at, gone),
            Mode::Commute | Mode::Reduce(_) => self.join(task, access, at, gone),
        }
        self.last = at;
        at
    }

    fn enter_read(&mut self, task: &TaskRef<D>, part: &Part<D>, at: u64, gone: &mut Gone<D>) {
        match &mut self.layout {
            Layout::Tiles(tiles) => {
                let cell = tiles.cell_mut(part.place.tile);
                part.cell.set(cell);
                cell.read(at);
                if cell
                    .reads
                    .last()
                    .is_some_and(|last| Arc::ptr_eq(last, task))
                {
                    return;
                }
                if cell.reads.len() == cell.reads.capacity() {
                    take_out(&mut cell.reads, reader_matters, |old| gone.tasks.push(old));
                    cell.reads.reserve(cell.reads.len());
                }
                cell.reads.push(Arc::clone(task));
            }
            Layout::Boxes(boxes) => {
                let entry = BoxRead {
                    region: part.region.clone(),
                    at,
                    task: Arc::clone(task),
                };
                boxes.reads.insert(part.datum.bounds(&part.region), entry);
            }
        }
    }

    fn put_write(&mut self, part: &Part<D>, write: Write<D>) {
        match &mut self.layout {
            Layout::Tiles(tiles) => {
                let cell = tiles.cell_mut(part.place.tile);
                part.cell.set(cell);
                cell.writes.push(write);
            }
            Layout::Boxes(boxes) => {
                let region = part.region.clone();
                boxes
                    .writes
                    .insert(part.datum.bounds(&part.region), BoxWrite { region, write });
            }
        }
    }

    /// Enters a write, which takes the place of what it contains.
    fn enter_write(&mut self, task: &TaskRef<D>, part: &Part<D>, at: u64, gone: &mut Gone<D>) {
        part.writer.set(&**task);
        let by = Writers::One(Arc::clone(task));
        let write = Write { at, by };
        let shadows = &mut self.shadows;
        let gone_tasks = &mut gone.tasks;
        // The reference goes where the task is kept: to count it again would cost each task.
        let mut put_aside = |other: TaskRef<D>, writes: bool, region: Option<&Region>| {
            if Arc::ptr_eq(&other, task) || other.past() != Past::Not {
                gone_tasks.push(other);
                return;
            }
            let what = match region {
                None => What::Tile {
                    writes,
                    grid: part.place.grid,
                    tile: part.place.tile,
                },
                Some(region) => What::Region {
                    writes,
                    region: Box::new(region.clone()),
                },
            };
            shadows.push(Shadow { task: other, what });
        };
        match &mut self.layout {
            Layout::Tiles(tiles) => {
                let cell = tiles.cell_mut(part.place.tile);
                part.cell.set(cell);
                while let Some(write) = cell.writes.pop() {
                    match write.by {
                        Writers::One(other) => put_aside(other, true, None),
                        Writers::Joint(ref joint) => {
                            for other in &joint.members {
                                put_aside(Arc::clone(other), true, None);
                            }
                            gone.writes.push(write);
                        }
                    }
                }
                while let Some(other) = cell.reads.pop() {
                    put_aside(other, false, None);
                }
                cell.writes.push(write);
            }
            Layout::Boxes(boxes) => {
                let bounds = part.datum.bounds(&part.region);
                let mut reads = Vec::new();
                let contained = &mut |entry: &BoxRead<D>| part.region.contains(&entry.region);
                boxes.reads.extract(Some(&bounds), contained, &mut reads);
                for entry in reads {
                    put_aside(entry.task, false, Some(&entry.region));
                }
                let mut writes = Vec::new();
                let touched = &mut |entry: &BoxWrite<D>| part.region.overlaps(&entry.region);
                boxes.writes.extract(Some(&bounds), touched, &mut writes);
                for entry in writes {
                    let cut = entry.region.intersection(&part.region);
                    for other in entry.write.tasks() {
                        put_aside(Arc::clone(other), true, Some(&cut));
                    }
                    if entry.write.matters() {
                        for region in entry.region.difference(&part.region) {
                            let bounds = part.datum.bounds(&region);
                            let write = entry.write.copy();
                            boxes.writes.insert(bounds, BoxWrite { region, write });
                        }
                    }
                    gone.writes.push(entry.write);
                }
                let region = part.region.clone();
                boxes.writes.insert(bounds, BoxWrite { region, write });
            }
        }
    }

    /// Enters a task that commutes or reduces: into the record of those that it joins, if there is one.
    fn join(&mut self, task: &TaskRef<D>, access: &Access<'_, D>, at: u64, gone: &mut Gone<D>) {
        let (part, mode) = (access.part, access.mode);
        let boundary = self.boundary(part, mode);
        let mut group = None;
        let mut joined = false;
        let mut join = |write: &mut Write<D>| {
            if joined || !write.admits(mode) || write.at <= boundary {
                return;
            }
            if let Writers::Joint(joint) = &mut write.by {
                push_task(&mut joint.members, task, writer_matters, gone);
                group.clone_from(&joint.group);
                joined = true;
            }
        };
        match &mut self.layout {
            Layout::Tiles(tiles) => {
                tiles
                    .cell_mut(part.place.tile)
                    .writes
                    .iter_mut()
                    .for_each(join);
            }
            Layout::Boxes(boxes) => {
                let bounds = part.datum.bounds(&part.region);
                boxes.writes.visit_mut(&bounds, &mut |entry| {
                    if entry.region == part.region {
                        join(&mut entry.write);
                    }
                });
            }
        }
        if !joined {
            if let Mode::Reduce(operation) = mode {
                group = Some(Arc::new(Group {
                    id: crate::trace::next_id(),
                    part: part.clone(),
                    operation,
                    known: AtomicBool::new(false),
                }));
            }
            let joint = Joint {
                group: group.clone(),
                members: vec![Arc::clone(task)],
            };
            let by = Writers::Joint(Box::new(joint));
            self.put_write(part, Write { at, by });
        }
        task.note_part(part, group);
    }

    /// Adds those whom `task` stands behind in line.
    pub(super) fn stand_in_line(
        &mut self,
        datum: &Datum<D>,
        task: &TaskRef<D>,
        access: &Access<'_, D>,
        before: &mut SmallVec<[TaskRef<D>; 2]>,
        gone: &mut Gone<D>,
    ) {
        let region = &access.part.region;
        let bounds = datum.bounds(region);
        self.lines.visit(&bounds, &mut |entry, exact| {
            if (exact || entry.region.overlaps(region)) && entry.task.past() == Past::Not {
                before.push(Arc::clone(&entry.task));
            }
        });
        // Who comes next stands behind this one, and with that behind those whose place it takes.
        let mut taken = Vec::new();
        let contained = &mut |entry: &Standing<D>| {
            region.contains(&entry.region) || entry.task.past() != Past::Not
        };
        self.lines.extract(Some(&bounds), contained, &mut taken);
        gone.tasks.extend(taken.into_iter().map(|entry| entry.task));
        let entry = Standing {
            region: region.clone(),
            task: Arc::clone(task),
        };
        self.lines.insert(bounds, entry);
    }

    /// A task that is to write, or failed to write, something of what an access reads.
    pub(super) fn last_failure(&self, access: &Access<'_, D>) -> Option<TaskRef<D>> {
        let mut last = None;
        if access.mode != Mode::Out {
            self.writes(access.part, &mut |write, _| {
                let mut tasks = write.tasks().iter();
                last = last
                    .take()
                    .or_else(|| tasks.find(|task| writer_matters(task)).cloned());
            });
        }
        last
    }
}
