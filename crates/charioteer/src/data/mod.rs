//! Managed data: what tasks read and write, and the order that follows from it.
//!
//! A [`Datum`] is one array, or one token. What a task does with a [`Part`] of it is an [`Access`]. The
//! order of conflicting accesses is that of their registration, and all accesses of a task register at
//! once.
//!
//! # Protocol
//!
//! **Records.** A datum has, under one lock, an index of *records*: who reads and who writes which
//! part, as far as it matters to those who come. A spawn opens a session: it locks all data of its
//! accesses, in the order of their numbers, looks up whom it comes after, links itself to those, enters
//! its own records, and lets go. So registration is atomic, and whoever finds a record finds all edges
//! that lead to its task. That is what the search for cycles needs, see `graph`. A spawn that is refused
//! enters nothing.
//!
//! **Edges.** Who reads depends on the last writers of what it reads: their failure is its failure. Who
//! writes comes after the readers, and who writes without reading (`Out`) after the writers, in *order*
//! only: [`Link::After`](crate::task::Link::After) counts down and does not poison. Where a reader of the same
//! tile has come after a writer already, that is order enough.
//!
//! **Order is transitive though tasks may end early.** A new write takes the place of the records that it
//! contains, since who comes after it comes after those as well. But a task that is cancelled before its
//! turn is done at once, while what it stood behind still runs. It is *past* when it is done and its own
//! predecessors are past or done, also those that it ran ahead of on devices; until then it keeps the links
//! of its dependents, see `task`.
//!
//! **Undefined parts.** A task that failed, was cancelled or skipped leaves its writing records behind:
//! whoever reads there fails with the same root. Who writes there without reading takes away what it
//! covers, exactly, piece by piece. Of the records of a task that is past and did not fail nothing is
//! needed any more. They are dropped by later registrations: a task that ends takes no lock of a datum.
//!
//! **Commuting tasks** do not depend on each other. One whose predecessors are done stands in *line*, in
//! all its lines at once, behind the last one that overlaps it there: by a link like any other. So
//! lines have no locks that anybody could hold, what waits in them is seen by the search for cycles, and
//! since places in all lines are taken at one moment they are taken in one order: no two tasks wait for
//! each other.
//!
//! **Reductions.** Tasks of one operation on equal parts form a [`Group`] and run side by side, each
//! into a partial result that is the domain's business. The first access of another kind closes the group:
//! before it is registered, a task is spawned that depends on all members and combines.
//!
//! **Where data are.** A datum with bytes has a [`Storage`], of which devices may have copies:
//! see [`store`], which knows no tasks, and `uses` for what tasks keep of their accesses for it.
//!
//! What is taken out of an index is dropped when no lock is held: it could be the last reference to a
//! task and a user's value (invariant 8).

mod index;
pub mod store;
mod uses;

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::fetch::fetch;
use crate::machine::{DeviceId, Machine};
use crate::region::tree::{Axes, Bounds};
use crate::region::{Region, Span};
use crate::sync::{AtomicBool, Guard, Hint, Mutex, Ordering};
use crate::task::{Domain, TaskRef};
use index::{Gone, Index};
use store::{Adopted, Storage};

pub(crate) use index::{Attached, Found, Move, Turn};
pub(crate) use uses::{Holding, Uses, check_spread};
pub use uses::{Spread, Views};

/// An array, or a token: what accesses are to. It has no elements, only the order of who uses them.
pub struct Datum<D: Domain> {
    id: u64,
    label: Box<str>,
    shape: Box<[u64]>,
    /// Those by which the index looks up.
    axes: Axes,
    index: Mutex<Index<D>>,
    storage: Option<Arc<Storage>>,
    /// A task was registered that may take elements to a device, or they were there at first. Under the lock of
    /// the index.
    travels: AtomicBool,
    /// Its elements are in memory of a device at first.
    adopts: bool,
}

impl<D: Domain> Datum<D> {
    /// An array of this shape; the label is for people.
    ///
    /// # Panics
    /// If an axis is longer than 2^63 - 1.
    #[must_use]
    pub fn new(label: impl Into<Box<str>>, shape: &[u64]) -> Arc<Self> {
        Self::with(crate::trace::next_id(), label.into(), shape, None)
    }

    /// An array whose elements, of `item` bytes, are in C order from `address` on, for as long as `keep`
    /// lives. Devices may have copies of it, see [`store`].
    ///
    /// # Panics
    /// If it has more than 2^63 bytes.
    #[must_use]
    pub fn stored(
        label: impl Into<Box<str>>,
        shape: &[u64],
        item: usize,
        address: usize,
        keep: Box<dyn Any + Send + Sync>,
    ) -> Arc<Self> {
        Self::adopting(label, shape, item, address, keep, None)
    }

    /// The same, whose elements are in memory of a device at first: the host's has nothing. `keep` keeps both.
    /// The memory has the last version again when its runtime has ended, which closes the datum, and after
    /// [`Engine::return_memory`](crate::engine::Engine::return_memory).
    ///
    /// # Panics
    /// As [`stored`](Self::stored).
    #[must_use]
    pub fn adopting(
        label: impl Into<Box<str>>,
        shape: &[u64],
        item: usize,
        address: usize,
        keep: Box<dyn Any + Send + Sync>,
        adopted: Option<Adopted>,
    ) -> Arc<Self> {
        let (id, label) = (crate::trace::next_id(), label.into());
        let (item, address) = (item as u64, address as u64);
        let storage = Storage::adopting(id, label.clone(), shape, item, address, keep, adopted);
        let datum = Self::with(id, label, shape, Some(Arc::clone(&storage)));
        let weak = Arc::downgrade(&datum);
        storage.belong(weak);
        datum
    }

    fn with(id: u64, label: Box<str>, shape: &[u64], storage: Option<Arc<Storage>>) -> Arc<Self> {
        assert!(
            shape.iter().all(|&extent| extent < 1 << 63),
            "an axis has fewer than 2^63 indices"
        );
        let adopts = storage.as_ref().is_some_and(|it| it.adopted().is_some());
        Arc::new(Self {
            id,
            label,
            shape: shape.into(),
            axes: Axes::longest(shape),
            index: Mutex::new(Index::new()),
            travels: AtomicBool::new(adopts),
            storage,
            adopts,
        })
    }

    /// A token: it has no data and no axes, and is accessed as a whole.
    #[must_use]
    pub fn token(label: impl Into<Box<str>>) -> Arc<Self> {
        Self::new(label, &[])
    }

    /// Its number, unique in the process.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What people call it.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Where its elements are; none of a token, and of an array that is known by its order alone.
    #[must_use]
    pub fn storage(&self) -> Option<&Arc<Storage>> {
        self.storage.as_ref()
    }

    /// How many indices each axis has.
    #[must_use]
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// All of it.
    #[must_use]
    pub fn whole(self: &Arc<Self>) -> Part<D> {
        let region = Region::whole(&self.shape);
        let place = Place::of(&region, true);
        Part {
            datum: Arc::clone(self),
            region,
            place,
            cell: Hint::default(),
            writer: Hint::default(),
        }
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the region has another number of axes, or an index that the datum has not.
    #[must_use]
    pub fn part(self: &Arc<Self>, region: Region) -> Part<D> {
        let whole = Region::whole(&self.shape);
        assert_eq!(
            region.spans().len(),
            self.shape.len(),
            "a region has the axes of its array"
        );
        assert!(whole.contains(&region), "a region lies in its array");
        let place = Place::of(&region, region == whole);
        Part {
            datum: Arc::clone(self),
            region,
            place,
            cell: Hint::default(),
            writer: Hint::default(),
        }
    }

    /// Divides it into tiles of this shape; those at the upper ends may be smaller. While all live
    /// accesses are to tiles of one grid, an access costs one look-up.
    ///
    /// # Panics
    /// If a tile has another number of axes, or none of an axis' indices.
    #[must_use]
    pub fn grid(self: &Arc<Self>, tile: &[u64]) -> Grid<D> {
        assert_eq!(
            tile.len(),
            self.shape.len(),
            "a tile has the axes of its array"
        );
        assert!(
            tile.iter().all(|&extent| extent != 0),
            "a tile is not empty"
        );
        let counts: Box<[u64]> = self
            .shape
            .iter()
            .zip(tile)
            .map(|(&extent, &tile)| extent.div_ceil(tile))
            .collect();
        let id = self.index.lock().grid(tile);
        Grid {
            datum: Arc::clone(self),
            id,
            tile: tile.into(),
            counts,
        }
    }

    /// Refuses every access from now on: the array was freed, or its runtime is closed.
    pub fn close(&self) {
        self.index.lock().close();
    }

    /// Whether accesses are refused.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.index.lock().is_closed()
    }

    fn bounds(&self, region: &Region) -> Bounds {
        Bounds::of(region, &self.axes)
    }
}

impl<D: Domain> fmt::Debug for Datum<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Datum({} {:?})", self.label, self.shape)
    }
}

/// A division of a datum into tiles.
pub struct Grid<D: Domain> {
    datum: Arc<Datum<D>>,
    id: u32,
    tile: Box<[u64]>,
    counts: Box<[u64]>,
}

impl<D: Domain> Grid<D> {
    /// How many tiles each axis has.
    #[must_use]
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// The tile at `index`.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn tile(&self, index: &[u64]) -> Part<D> {
        assert_eq!(index.len(), self.counts.len(), "an index has every axis");
        let mut number = 0;
        for (&at, &count) in index.iter().zip(&self.counts) {
            assert!(at < count, "a tile beyond the end");
            number = number * count + at;
        }
        Part {
            datum: Arc::clone(&self.datum),
            region: tile_region(&self.datum.shape, &self.tile, index),
            place: Place {
                grid: self.id,
                tile: number,
            },
            cell: Hint::default(),
            writer: Hint::default(),
        }
    }
}

fn tile_region(shape: &[u64], tile: &[u64], index: &[u64]) -> Region {
    Region::new((0..shape.len()).map(|axis| {
        let start = index[axis] * tile[axis];
        Span::range(start, (start + tile[axis]).min(shape[axis]))
    }))
}

/// Where a part stands in a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    grid: u32,
    tile: u64,
}

impl Place {
    /// The one tile of the trivial grid.
    const WHOLE: Self = Self { grid: 0, tile: 0 };
    const NOWHERE: Self = Self {
        grid: u32::MAX,
        tile: 0,
    };
    /// Of what has no element. That is said here too, so that nobody has to fetch a region to see it.
    const EMPTY: Self = Self {
        grid: u32::MAX - 1,
        tile: 0,
    };

    /// That of a part, which may be the whole.
    fn of(region: &Region, is_whole: bool) -> Self {
        match is_whole {
            _ if region.is_empty() => Self::EMPTY,
            true => Self::WHOLE,
            false => Self::NOWHERE,
        }
    }
}

/// A part of a datum. What a look-up of a tile needs comes first: a program has many, and uses each now
/// and then, so that each line of them that is touched is fetched from far away.
#[repr(C)]
pub struct Part<D: Domain> {
    datum: Arc<Datum<D>>,
    place: Place,
    /// Where the records of its tile were, and the task that wrote last by this handle.
    cell: Hint,
    writer: Hint,
    region: Region,
}

impl<D: Domain> Part<D> {
    /// What it is a part of.
    #[must_use]
    pub fn datum(&self) -> &Arc<Datum<D>> {
        &self.datum
    }

    /// Which indices it has.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Asks for what a look-up will probably look at.
    #[inline]
    fn fetch(&self) {
        self.writer.fetch();
        if self.place.grid == Place::NOWHERE.grid {
            fetch(&raw const self.region);
            // Of two axes the second one, which may be on the next line.
            fetch((&raw const self.region).cast::<u8>().wrapping_add(64));
        } else {
            self.cell.fetch();
        }
    }

    /// Whether the two have an element in common.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.datum, &other.datum) && self.region.overlaps(&other.region)
    }
}

impl<D: Domain> Clone for Part<D> {
    fn clone(&self) -> Self {
        Self {
            datum: Arc::clone(&self.datum),
            region: self.region.clone(),
            place: self.place,
            cell: self.cell.clone(),
            writer: self.writer.clone(),
        }
    }
}

impl<D: Domain> fmt::Display for Part<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.datum.label, self.region)
    }
}

impl<D: Domain> fmt::Debug for Part<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Part({self})")
    }
}

/// What a task does with a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It reads.
    In,
    /// It writes every element, and reads none.
    Out,
    /// It reads and writes.
    InOut,
    /// As `InOut`, in any order with others that commute, one after the other.
    Commute,
    /// It adds to a partial result of this operation of the domain's.
    Reduce(u32),
}

impl Mode {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::In => "In",
            Self::Out => "Out",
            Self::InOut => "InOut",
            Self::Commute => "Commute",
            Self::Reduce(_) => "Reduce",
        }
    }

    /// Whether it changes elements.
    #[must_use]
    pub const fn writes(self) -> bool {
        !matches!(self, Self::In)
    }

    /// Whether two accesses of one task to the same elements make sense.
    const fn agrees(self, other: Self) -> bool {
        matches!(
            (self, other),
            (Self::In, Self::In | Self::Out | Self::InOut) | (Self::Out | Self::InOut, Self::In)
        )
    }
}

/// An access of a task.
#[derive(Debug)]
pub struct Access<'a, D: Domain> {
    /// To what.
    pub part: &'a Part<D>,
    /// Of which kind.
    pub mode: Mode,
    /// Whether it is ordered with conflicting ones; one that is not neither waits nor is waited for, and
    /// its failure leaves nothing undefined.
    pub ordered: bool,
    /// What the members of a set have of it.
    pub spread: Spread,
}

impl<D: Domain> Clone for Access<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Domain> Copy for Access<'_, D> {}

impl<'a, D: Domain> Access<'a, D> {
    /// An ordered access.
    #[inline]
    #[must_use]
    pub fn new(part: &'a Part<D>, mode: Mode) -> Self {
        Self {
            part,
            mode,
            ordered: true,
            spread: Spread::Whole,
        }
    }

    /// Each member of a set has its piece along an axis, as even as they can be, the larger ones first.
    #[must_use]
    pub fn sharded(self, axis: u8) -> Self {
        Self {
            spread: Spread::Shard(axis),
            ..self
        }
    }

    /// Each member of a set writes all of it, and all write the same.
    #[must_use]
    pub fn replicated(self) -> Self {
        Self {
            spread: Spread::Replicated,
            ..self
        }
    }

    /// Whether it takes part in the order.
    #[inline]
    fn counts(&self) -> bool {
        self.ordered && self.part.place.grid != Place::EMPTY.grid
    }
}

/// Why accesses are refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessTrouble {
    /// Two accesses of one task exclude each other: each with its mode and its region.
    SelfConflict {
        /// `Out A[0:4]`, say.
        first: String,
        /// The other.
        second: String,
    },
    /// It would wait for the task that spawns it, which declared a conflicting access.
    ParentConflict {
        /// The name of that task.
        task: String,
        /// The access that conflicts, with mode and region.
        access: String,
    },
    /// The datum is closed: its label.
    Closed(String),
    /// Its elements are in memory of a device that the runtime has not: the label, and which device.
    Elsewhere(String, DeviceId),
    /// The members of a set would each write all of it, and nobody said that they write the same.
    WrittenWhole {
        /// The access.
        access: String,
        /// How many members one of the task's sets has.
        members: usize,
    },
    /// The axis along which it is divided has fewer indices than a set has members, or is not there.
    ShortAxis {
        /// The access.
        access: String,
        /// Which axis.
        axis: u8,
        /// How many indices it has, if it is there.
        extent: Option<u64>,
        /// How many members one of the task's sets has.
        members: usize,
    },
}

impl fmt::Display for AccessTrouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SelfConflict { first, second } => {
                write!(f, "{first} and {second} of one task overlap")
            }
            Self::ParentConflict { task, access } => write!(
                f,
                "{access} conflicts with an access of {task}, which spawns the task: it would wait for \
                 its own parent"
            ),
            Self::Closed(label) => write!(f, "{label} was released, or its runtime is closed"),
            Self::Elsewhere(label, device) => write!(
                f,
                "{label} is in memory of {device} that this runtime's machine has not"
            ),
            Self::WrittenWhole { access, members } => write!(
                f,
                "{access} of a set of {members}: what a set writes is sharded, reduced or replicated"
            ),
            Self::ShortAxis {
                access,
                axis,
                extent: Some(extent),
                members,
            } => write!(
                f,
                "{access} cannot be divided among {members}: its axis {axis} has {extent} indices"
            ),
            Self::ShortAxis { access, axis, .. } => write!(f, "{access} has no axis {axis}"),
        }
    }
}

fn name<D: Domain>(access: &Access<'_, D>) -> String {
    format!("{} {}", access.mode.name(), access.part)
}

/// Whether the accesses of one task agree with each other, and are to memory that the machine has.
pub(crate) fn check<D: Domain>(
    accesses: &[Access<'_, D>],
    machine: Option<&Machine>,
) -> Result<(), AccessTrouble> {
    for Access { part, .. } in accesses {
        // Here a spawn meets its parts, and its task is still to be made.
        part.fetch();
        if !part.datum.adopts {
            continue;
        }
        let storage = part.datum.storage.as_ref();
        let adopted = storage.and_then(|it| it.adopted());
        let adopted = adopted.expect("it is said to have some");
        let device = adopted.pointer.device;
        let has = |it: &Machine| it.has(device) && it.device(device).knows(&adopted.behind);
        if !machine.is_some_and(has) {
            let label = part.datum.label.to_string();
            return Err(AccessTrouble::Elsewhere(label, device));
        }
    }
    for (at, first) in accesses.iter().enumerate() {
        for second in &accesses[at + 1..] {
            if !first.mode.agrees(second.mode)
                && first.counts()
                && second.counts()
                && (first.mode.writes() || second.mode.writes())
                && first.part.overlaps(second.part)
            {
                return Err(AccessTrouble::SelfConflict {
                    first: name(first),
                    second: name(second),
                });
            }
        }
    }
    Ok(())
}

/// A reduction: tasks of one operation on equal parts, since the last other access.
pub struct Group<D: Domain> {
    id: u64,
    part: Part<D>,
    operation: u32,
    /// Whether an engine knows of it.
    known: AtomicBool,
}

impl<D: Domain> Group<D> {
    /// Its number, unique in the process.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether an engine is yet to hear of it; it is told by this call.
    pub(crate) fn is_news(&self) -> bool {
        !self.known.swap(true, Ordering::Relaxed)
    }

    /// What it reduces into.
    #[must_use]
    pub fn part(&self) -> &Part<D> {
        &self.part
    }

    /// The operation.
    #[must_use]
    pub fn operation(&self) -> u32 {
        self.operation
    }
}

/// Why a session found that its task cannot be registered.
pub(crate) enum Refusal<D: Domain> {
    Trouble(AccessTrouble),
    /// This reduction is to be closed first.
    Open(Arc<Group<D>>),
    /// The reduction that the task combines was closed by another one.
    Combined,
}

/// All data of some accesses, locked. What was taken out is dropped after the locks: it is declared so.
pub(crate) struct Session<'a, D: Domain> {
    entries: SmallVec<[Entry<'a, D>; 4]>,
    gone: Gone<D>,
}

/// An access that counts. Those to one datum stand together, in the order in which they were given, and the
/// first of them has the index, so that there is nothing to look for.
struct Entry<'a, D: Domain> {
    access: &'a Access<'a, D>,
    index: Option<Guard<'a, Index<D>>>,
}

impl<'a, D: Domain> Entry<'a, D> {
    #[inline]
    fn datum(&self) -> &'a Datum<D> {
        &self.access.part.datum
    }
}

impl<'a, D: Domain> Session<'a, D> {
    /// One that has locked nothing.
    #[inline]
    pub(crate) fn new() -> Self {
        Self {
            entries: SmallVec::new(),
            gone: Gone::new(),
        }
    }

    /// Locks the data of the accesses, in the order of their numbers. It stays where it is: to move it would
    /// cost each task.
    #[inline]
    pub(crate) fn open(&mut self, accesses: &'a [Access<'a, D>]) {
        let counting = accesses.iter().filter(|access| access.counts());
        let entries = counting.map(|access| Entry {
            access,
            index: None,
        });
        self.entries.extend(entries);
        let mut rest = &mut self.entries[..];
        if !rest.is_sorted_by_key(|entry| entry.datum().id) {
            rest.sort_by_key(|entry| entry.datum().id);
        }
        while let [first, others @ ..] = rest {
            let datum = first.datum();
            let mut grid = first.access.part.place.grid;
            let mut more = 0;
            for other in others.iter().take_while(|it| it.datum().id == datum.id) {
                more += 1;
                if other.access.part.place.grid != grid {
                    grid = Place::NOWHERE.grid;
                }
            }
            let mut index = datum.index.lock();
            index.prepare(datum, grid, &mut self.gone);
            first.index = Some(index);
            rest = &mut others[more..];
        }
    }

    /// The accesses, each with its index.
    #[inline]
    fn each(&self) -> impl Iterator<Item = (&'a Access<'a, D>, &Index<D>)> {
        let mut index = None;
        self.entries.iter().map(move |entry| {
            if let Some(own) = &entry.index {
                index = Some(&**own);
            }
            let index = index.expect("the first access to a datum has locked it");
            (entry.access, index)
        })
    }

    /// Calls `f` with each access and its index, and where to put what is to be dropped.
    #[inline]
    fn for_each(&mut self, mut f: impl FnMut(&'a Access<'a, D>, &mut Index<D>, &mut Gone<D>)) {
        let mut index = None;
        for entry in &mut self.entries {
            if let Some(own) = &mut entry.index {
                index = Some(&mut **own);
            }
            let index = index.as_deref_mut();
            let index = index.expect("the first access to a datum has locked it");
            f(entry.access, index, &mut self.gone);
        }
    }

    /// Finds whom `task` comes after. `closing`: the reduction that it combines.
    #[inline]
    pub(crate) fn look_up<'s>(
        &'s self,
        task: &TaskRef<D>,
        parent: Option<&TaskRef<D>>,
        closing: Option<&Group<D>>,
        found: &mut Found<'s, D>,
    ) -> Result<(), Refusal<D>> {
        for (access, index) in self.each() {
            if index.is_closed() {
                let label = access.part.datum.label.to_string();
                return Err(Refusal::Trouble(AccessTrouble::Closed(label)));
            }
            let shadowed = parent.is_some_and(|parent| index.shadows(parent, access));
            if shadowed || index.look_up(task, parent, closing, access, found) {
                return Err(Refusal::Trouble(AccessTrouble::ParentConflict {
                    task: parent.map_or_else(String::new, |parent| parent.label.to_string()),
                    access: name(access),
                }));
            }
            if let Some(group) = found.open.take() {
                return Err(Refusal::Open(group));
            }
        }
        if closing.is_some() && !found.closes {
            return Err(Refusal::Combined);
        }
        Ok(())
    }

    /// Takes note that the task may take elements to a device, or says whether one that was registered
    /// before may have.
    pub(crate) fn travels(&self, goes: bool) -> bool {
        let mut stored = (self.entries.iter().map(Entry::datum)).filter(|it| it.storage.is_some());
        if goes {
            stored.for_each(|datum| datum.travels.store(true, Ordering::Relaxed));
            return true;
        }
        stored.any(|datum| datum.travels.load(Ordering::Relaxed))
    }

    /// Enters the records of `task`. Tells the number of each access in the order of its datum.
    #[inline]
    pub(crate) fn enter(
        &mut self,
        task: &TaskRef<D>,
        mut tell: impl FnMut(&'a Access<'a, D>, u64),
    ) {
        self.for_each(|access, index, gone| tell(access, index.enter(task, access, gone)));
    }

    /// Puts `task` into its lines, behind those that it gives.
    pub(crate) fn stand_in_line(&mut self, task: &TaskRef<D>) -> SmallVec<[TaskRef<D>; 2]> {
        let mut before = SmallVec::new();
        self.for_each(|access, index, gone| {
            index.stand_in_line(&access.part.datum, task, access, &mut before, gone);
        });
        before
    }
}

/// The root of a failure that left elements undefined which one of `accesses` reads, or of a task that
/// is still to write them: for readers outside of any runtime.
pub fn undefined<D: Domain>(accesses: &[Access<'_, D>]) -> Option<TaskRef<D>> {
    let mut session = Session::new();
    session.open(accesses);
    let writer = session
        .each()
        .find_map(|(access, index)| index.last_failure(access));
    drop(session);
    writer.map(|task| Arc::clone(task.root()))
}
