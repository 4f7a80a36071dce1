//! What a task keeps of its accesses where data may be on devices, from its spawn until it has what it
//! needs.
//!
//! A task that may run on devices keeps all of them; its store hears of them when it is spawned, and hears
//! when nothing comes of that. A task on cores keeps them only if somebody was spawned before that may have
//! taken the data to a device: [`Datum`](super::Datum) remembers, under the lock of its records, so that
//! whoever is registered later knows. One that commutes always keeps them, since somebody who is spawned later
//! may come before it. On a machine without devices nobody keeps any.
//!
//! **Members.** Each member of a set wants the region of an access as a whole, or its piece along an axis
//! ([`Spread`]). Pieces are as even as they can be, and the first ones are the larger ones.

use std::sync::Arc;

use smallvec::SmallVec;

use super::store::{Held, Storage, Store, Touch, View, Want};
use super::{Access, AccessTrouble, Mode, name};
use crate::machine::DeviceId;
use crate::region::{Region, Span};
use crate::sync::{AtomicBool, Ordering};
use crate::task::Domain;

/// What each member of a set has of an access. With one member all are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Spread {
    /// All of it, to read.
    #[default]
    Whole,
    /// Its piece along this axis.
    Shard(u8),
    /// All of it; what they write is equal.
    Replicated,
}

impl Mode {
    /// What it does with elements. A reduction does nothing with them: it has a partial result.
    const fn touch(self) -> Option<Touch> {
        match self {
            Self::In => Some(Touch::Read),
            Self::Out => Some(Touch::Write),
            Self::InOut | Self::Commute => Some(Touch::Update),
            Self::Reduce(_) => None,
        }
    }
}

/// That a set of so many members can have this access.
pub(crate) fn check_spread<D: Domain>(
    access: &Access<'_, D>,
    members: usize,
) -> Result<(), AccessTrouble> {
    if members < 2 || access.part.datum().storage().is_none() || access.mode.touch().is_none() {
        return Ok(());
    }
    let region = access.part.region();
    match access.spread {
        Spread::Whole if access.mode.writes() => Err(AccessTrouble::WrittenWhole {
            access: name(access),
            members,
        }),
        Spread::Shard(axis) if !region.is_empty() || usize::from(axis) >= region.spans().len() => {
            let extent = (region.spans().get(usize::from(axis))).map(Span::count);
            if extent.is_some_and(|extent| extent >= members as u64) {
                return Ok(());
            }
            Err(AccessTrouble::ShortAxis {
                access: name(access),
                axis,
                extent,
                members,
            })
        }
        _ => Ok(()),
    }
}

/// The numbers along an axis of so many indices that one of several members has.
fn piece(extent: u64, member: u64, members: u64) -> Span {
    let (each, more) = (extent / members, extent % members);
    let start = member * each + member.min(more);
    Span::range(start, start + each + u64::from(member < more))
}

/// One access to data that have bytes.
struct Use {
    /// Which one of the task's accesses it is.
    place: usize,
    storage: Arc<Storage>,
    region: Region,
    touch: Touch,
    spread: Spread,
}

impl Use {
    fn want<'a>(&'a self, region: &'a Region) -> Want<'a> {
        Want {
            storage: &self.storage,
            region,
            touch: self.touch,
        }
    }

    fn piece(&self, member: usize, members: usize) -> Region {
        match self.spread {
            Spread::Shard(axis) if !self.region.is_empty() => {
                let axis = usize::from(axis);
                let extent = self.region.spans()[axis].count();
                self.region
                    .select(axis, piece(extent, member as u64, members as u64))
            }
            _ => self.region.clone(),
        }
    }
}

/// What a task uses.
pub(crate) struct Uses {
    list: Box<[Use]>,
    /// How many accesses it has in all.
    accesses: usize,
    /// Bytes of data on each device, for each of the sets of devices that it may get.
    footprints: SmallVec<[u64; 2]>,
    /// The store that was told, and as which number.
    announced: Option<(Arc<Store>, u64)>,
    /// The store knows that it need not count on the task any more.
    settled: AtomicBool,
}

/// Where each access of a task is, member by member.
pub type Views = Arc<[Box<[Option<Arc<View>>]>]>;

/// What a task has of managed data from its plan until its loan goes back.
pub(crate) struct Holding {
    /// For each device of the loan.
    pub(crate) held: SmallVec<[Held; 2]>,
    pub(crate) views: Views,
    /// The body began, or is about to.
    pub(crate) begun: bool,
}

type Wants<'a> = SmallVec<[Want<'a>; 4]>;

impl Uses {
    /// Of these accesses; none if they are to nothing that has bytes.
    pub(crate) fn of<D: Domain>(accesses: &[Access<'_, D>]) -> Option<Self> {
        let uses = accesses.iter().enumerate().filter_map(|(place, access)| {
            Some(Use {
                place,
                storage: Arc::clone(access.part.datum().storage()?),
                region: access.part.region().clone(),
                touch: match access.mode.touch()? {
                    Touch::Read if !access.ordered => Touch::Peek,
                    touch => touch,
                },
                spread: access.spread,
            })
        });
        let list: Box<[Use]> = uses.collect();
        (!list.is_empty()).then(|| Self {
            list,
            accesses: accesses.len(),
            footprints: SmallVec::new(),
            announced: None,
            settled: AtomicBool::new(false),
        })
    }

    /// Calls `f` with what a member of a set of so many wants.
    pub(crate) fn with_wants<R>(
        &self,
        member: usize,
        members: usize,
        f: impl FnOnce(&[Want<'_>]) -> R,
    ) -> R {
        let is_split = |it: &Use| matches!(it.spread, Spread::Shard(_));
        if members == 1 || !self.list.iter().any(is_split) {
            let wants: Wants<'_> = self.list.iter().map(|it| it.want(&it.region)).collect();
            return f(&wants);
        }
        let pieces = self.list.iter().map(|it| it.piece(member, members));
        let pieces: SmallVec<[Region; 4]> = pieces.collect();
        let wants = self.list.iter().zip(&pieces);
        let wants: Wants<'_> = wants.map(|(it, piece)| it.want(piece)).collect();
        f(&wants)
    }

    /// As [`with_wants`](Self::with_wants), for somebody who wants all.
    pub(crate) fn with_all<R>(&self, f: impl FnOnce(&[Want<'_>]) -> R) -> R {
        self.with_wants(0, 1, f)
    }

    /// The part of what a set of so many members wants that each of them gets as a whole, then what is
    /// divided among them.
    pub(crate) fn with_parts<R>(&self, f: impl FnOnce(&[Want<'_>], &[Want<'_>]) -> R) -> R {
        let is_split = |it: &&Use| matches!(it.spread, Spread::Shard(_));
        let (split, whole): (SmallVec<[&Use; 4]>, SmallVec<[&Use; 4]>) =
            self.list.iter().partition(is_split);
        let whole: Wants<'_> = whole.iter().map(|it| it.want(&it.region)).collect();
        let split: Wants<'_> = split.iter().map(|it| it.want(&it.region)).collect();
        f(&whole, &split)
    }

    /// Whether any of the arrays brought memory of a device along.
    pub(crate) fn adopts(&self) -> bool {
        self.list.iter().any(|it| it.storage.adopted().is_some())
    }

    /// The most bytes that a device of a set of so many members has for it, or this one.
    pub(crate) fn footprint(&self, store: &Store, members: usize, device: Option<DeviceId>) -> u64 {
        let is_split = |it: &Use| matches!(it.spread, Spread::Shard(_));
        let different = if self.list.iter().any(is_split) {
            members
        } else {
            1
        };
        (0..different)
            .map(|member| self.with_wants(member, members, |wants| store.footprint(wants, device)))
            .max()
            .unwrap_or(0)
    }

    /// How many accesses the task has, those to what has no bytes among them.
    pub(crate) fn accesses(&self) -> usize {
        self.accesses
    }

    /// The place of each want among the task's accesses.
    pub(crate) fn places(&self) -> impl Iterator<Item = usize> {
        self.list.iter().map(|it| it.place)
    }

    pub(crate) fn set_footprints(&mut self, footprints: SmallVec<[u64; 2]>) {
        self.footprints = footprints;
    }

    /// Bytes of data on each device of this set of devices.
    pub(crate) fn footprint_of(&self, set: usize) -> u64 {
        self.footprints.get(set).copied().unwrap_or(0)
    }

    /// Tells the store that a task will want this.
    pub(crate) fn announce(&mut self, store: &Arc<Store>, number: u64) {
        self.with_all(|wants| store.announce(number, wants));
        self.announced = Some((Arc::clone(store), number));
    }

    /// The number under which the store knows of the task.
    pub(crate) fn number(&self) -> u64 {
        self.announced.as_ref().map_or(0, |(_, number)| *number)
    }

    /// The store was told what came of it.
    pub(crate) fn settle(&self) {
        self.settled.store(true, Ordering::Relaxed);
    }

    /// Tells the store that nothing comes of it any more, unless it knows.
    pub(crate) fn retract(&self) {
        if let Some((store, number)) = &self.announced
            && !self.settled.swap(true, Ordering::Relaxed)
        {
            self.with_all(|wants| store.retract(*number, wants));
        }
    }

    /// Whether it writes any.
    pub(crate) fn writes(&self) -> bool {
        self.list.iter().any(|it| it.touch.writes())
    }

    /// Whether any of the arrays may be elsewhere than on the host.
    pub(crate) fn is_scattered(&self) -> bool {
        self.list.iter().any(|it| it.storage.is_scattered())
    }
}

impl Drop for Uses {
    fn drop(&mut self) {
        self.retract();
    }
}
