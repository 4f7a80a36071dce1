//! What one task wants on one device, by the instances that serve it.

use std::ops::Deref;
use std::sync::Arc;

use smallvec::SmallVec;

use super::Want;
use super::storage::Storage;
use crate::region::Region;

/// A box: mostly a want's own region. Small, since groups are handed about for each task.
pub(super) enum Hull<'a> {
    Whole(&'a Region),
    Made(Box<Region>),
}

impl Deref for Hull<'_> {
    type Target = Region;

    #[inline]
    fn deref(&self) -> &Region {
        match self {
            Self::Whole(region) => region,
            Self::Made(region) => region,
        }
    }
}

/// Wants that are served by one instance.
pub(super) struct Group<'a> {
    pub(super) storage: &'a Arc<Storage>,
    /// The box of the instance.
    pub(super) hull: Hull<'a>,
}

impl Group<'_> {
    pub(super) fn bytes(&self) -> u64 {
        self.hull.elements().saturating_mul(self.storage.item)
    }
}

pub(super) struct Groups<'a> {
    pub(super) groups: SmallVec<[Group<'a>; 4]>,
    /// The group of each want; none of one without bytes.
    pub(super) of: SmallVec<[Option<u32>; 4]>,
}

/// The box around a region.
fn hull(region: &Region) -> Hull<'_> {
    if region.spans().iter().all(|span| span.step() == 1) {
        Hull::Whole(region)
    } else {
        Hull::Made(Box::new(region.hull(region)))
    }
}

/// Wants whose boxes overlap share an instance with the box around both. So what a task pins is told by
/// its wants alone.
pub(super) fn group<'a>(wants: &[Want<'a>]) -> Groups<'a> {
    let mut groups: SmallVec<[Group<'a>; 4]> = SmallVec::new();
    let mut of: SmallVec<[Option<u32>; 4]> = SmallVec::new();
    for want in wants {
        if want.region.is_empty() || want.storage.item == 0 {
            of.push(None);
            continue;
        }
        let mut own = Group {
            storage: want.storage,
            hull: hull(want.region),
        };
        let mut at = groups.len();
        // What joins two boxes may meet a third one.
        while let Some(other) = groups.iter().position(|group| {
            Arc::ptr_eq(group.storage, own.storage) && group.hull.overlaps(&own.hull)
        }) {
            if *groups[other].hull != *own.hull {
                own.hull = Hull::Made(Box::new(groups[other].hull.hull(&own.hull)));
            }
            let last = groups.len() - 1;
            groups.swap_remove(other);
            // Whoever was in it is in the new one, which comes last.
            for place in of.iter_mut().flatten() {
                *place = match *place as usize {
                    it if it == other || it == at => u32::MAX,
                    it if it == last => other as u32,
                    it => it as u32,
                };
            }
            at = u32::MAX as usize;
        }
        groups.push(own);
        let number = groups.len() as u32 - 1;
        for place in of.iter_mut().flatten() {
            if *place == u32::MAX {
                *place = number;
            }
        }
        of.push(Some(number));
    }
    Groups { groups, of }
}
