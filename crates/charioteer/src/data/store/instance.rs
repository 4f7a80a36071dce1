//! An instance: memory of a device for a box of an array.

use std::sync::Arc;

use smallvec::SmallVec;

use super::View;
use super::directory::Piece;
use super::events::Events;
use crate::machine::{DeviceId, DevicePointer, Stream};
use crate::region::Region;

/// The number of the instance that is always there: the host's buffer.
pub(super) const HOME: u32 = u32::MAX;

pub(super) struct Instance {
    pub(super) device: DeviceId,
    /// The number of its array's directory, and of its box there.
    pub(super) directory: u32,
    pub(super) frame: u32,
    /// Shared with those who hold it.
    pub(super) view: Arc<View>,
    /// What it takes of the device; nothing if the memory is adopted.
    pub(super) bytes: u64,
    /// The memory is somebody else's: it stays as long as the array.
    pub(super) adopted: bool,
    /// How many tasks hold it, from plan to launch.
    pub(super) pins: u32,
    /// Those that will write, or have to find what is there, once for each want. What is copied from it until
    /// they are launched, for other members of their sets, they have to be behind; nobody copies to it what
    /// they have.
    pub(super) keepers: SmallVec<[Keeper; 1]>,
    /// How many pieces are valid in it.
    pub(super) valid: u32,
    /// What used the memory before: nobody touches it but behind that.
    pub(super) born: Events,
    /// Who reads it, and who wrote what is not valid in it any more. Of adopted memory pieces know that.
    pub(super) uses: Events,
    /// When it was used last, by a clock that counts uses.
    pub(super) tick: u64,
    /// Its place among those that may go, if it has one.
    pub(super) rank: Option<Rank>,
    /// Its device is lost: its box, since it has no frame any more. It goes when nobody holds it.
    pub(super) dead: Option<Box<Region>>,
}

/// Whose elements in an instance nobody else may change before it is launched.
pub(super) struct Keeper {
    pub(super) stream: Stream,
    /// Which elements, where that is not all of them.
    pub(super) region: Option<Box<Region>>,
}

impl Keeper {
    /// Whether it has any of these.
    pub(super) fn keeps(&self, regions: &[Region]) -> bool {
        let own = self.region.as_deref();
        own.is_none_or(|own| regions.iter().any(|region| region.overlaps(own)))
    }
}

impl Instance {
    pub(super) fn pointer(&self) -> DevicePointer {
        self.view.pointer
    }

    /// Behind these nobody uses it, but for what is on its way into it.
    pub(super) fn users(&self) -> Events {
        let mut events = self.born.clone();
        events.join(&self.uses);
        events
    }

    /// Who uses of it what a piece has: of adopted memory that is known piece by piece.
    pub(super) fn uses_of<'a>(&'a self, piece: &'a Piece) -> &'a Events {
        if self.adopted { &piece.own } else { &self.uses }
    }

    /// The same, for one who used it.
    pub(super) fn uses_of_mut<'a>(&'a mut self, piece: &'a mut Piece) -> &'a mut Events {
        if self.adopted {
            &mut piece.own
        } else {
            &mut self.uses
        }
    }
}

/// In which order instances go: the largest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// The number of the task that wants it next, or one of the two below.
    pub(super) next: u64,
    /// How long ago it was used.
    pub(super) age: u64,
}

impl Rank {
    /// Nobody is known to want it.
    pub(super) const UNKNOWN: u64 = u64::MAX - 1;
    /// Nothing is in it.
    pub(super) const EMPTY: u64 = u64::MAX;
}
