//! What is registered with a task to hear of its end.

use std::sync::Arc;

use super::{Domain, Latch, TaskRef};

/// One party that hears of the end of a task.
pub enum Link<D: Domain> {
    /// A task that counts this one among its predecessors.
    Dependent(TaskRef<D>),
    /// The same, and a failure of this one does not concern it: it comes after it, no more.
    After(TaskRef<D>),
    /// A dependent that was let go when this one was launched, and counts it among what is incomplete.
    Ahead(TaskRef<D>),
    /// The same of one that comes after it, no more.
    Behind(TaskRef<D>),
    /// Somebody who waits.
    Latch(Arc<Latch<D>>),
    /// A call; boxed, since links are part of each task.
    Callback(Box<D::Callback>),
}

/// The links of one task. Most tasks have none, one or two, which needs no allocation: it would be
/// freed by another thread than the one that made it.
#[derive(Default)]
pub(crate) enum List<D: Domain> {
    #[default]
    Empty,
    One(Link<D>),
    Two([Link<D>; 2]),
    Many(Vec<Link<D>>),
}

impl<D: Domain> List<D> {
    #[inline]
    pub(crate) fn push(&mut self, link: Link<D>) {
        match self {
            // Nothing was there: the compiler is told that there is nothing to drop.
            Self::Empty => std::mem::forget(std::mem::replace(self, Self::One(link))),
            Self::Many(links) => links.push(link),
            Self::One(_) | Self::Two(_) => {
                *self = match std::mem::take(self) {
                    Self::One(first) => Self::Two([first, link]),
                    Self::Two([first, second]) => {
                        let mut links = Vec::with_capacity(8);
                        links.extend([first, second, link]);
                        Self::Many(links)
                    }
                    Self::Empty | Self::Many(_) => unreachable!("looked above"),
                };
            }
        }
    }

    #[inline]
    pub(crate) fn pop(&mut self) -> Option<Link<D>> {
        if let Self::Many(links) = self {
            return links.pop();
        }
        match std::mem::take(self) {
            Self::One(link) => Some(link),
            Self::Two([first, second]) => {
                *self = Self::One(first);
                Some(second)
            }
            Self::Empty | Self::Many(_) => None,
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Link<D>> {
        match self {
            Self::Empty => [].iter(),
            Self::One(link) => std::slice::from_ref(link).iter(),
            Self::Two(links) => links.iter(),
            Self::Many(links) => links.iter(),
        }
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Link<D>> {
        match self {
            Self::Empty => [].iter_mut(),
            Self::One(link) => std::slice::from_mut(link).iter_mut(),
            Self::Two(links) => links.iter_mut(),
            Self::Many(links) => links.iter_mut(),
        }
    }

    /// Takes out the links that `chosen` is true for.
    pub(crate) fn extract(&mut self, chosen: impl Fn(&Link<D>) -> bool) -> Vec<Link<D>> {
        let (gone, kept) = match std::mem::take(self) {
            Self::Empty => return Vec::new(),
            Self::One(link) if chosen(&link) => return vec![link],
            Self::One(link) => {
                *self = Self::One(link);
                return Vec::new();
            }
            Self::Two(links) => links.into_iter().partition(chosen),
            Self::Many(links) => links.into_iter().partition(chosen),
        };
        *self = Self::Many(kept);
        gone
    }

    /// Calls `f` with each link.
    #[inline]
    pub(crate) fn for_each(self, f: impl FnMut(Link<D>)) {
        match self {
            Self::Empty => {}
            Self::One(link) => Some(link).into_iter().for_each(f),
            Self::Two(links) => links.into_iter().for_each(f),
            Self::Many(links) => links.into_iter().for_each(f),
        }
    }
}
