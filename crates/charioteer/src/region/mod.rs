//! Regions: sets of indices of an array, and their algebra.
//!
//! A [`Region`] is a product of [`Span`]s, one an axis, each an arithmetic progression. That is what
//! basic indexing of an array gives, and what it gives of that again. It is a set: in which direction a
//! view runs, and how it lies in memory, is the business of whoever has the array. Without axes it is the
//! one element of an array of no dimensions.
//!
//! The algebra is exact, strides included: two progressions of one axis meet where a congruence has a
//! solution between their ends. So `[0:100:2]` and `[1:100:2]` have nothing in common, and whoever writes
//! one has no conflict with whoever reads the other. What two products have in common is a product
//! again; what is left of one without the other is a few disjoint ones, by peeling off one axis after
//! the other.
//!
//! This room knows nobody.

mod span;
#[cfg(all(test, not(loom)))]
mod tests;
pub(crate) mod tree;

use std::fmt;

use smallvec::SmallVec;

pub use span::Span;

/// A set of indices of an array: a product of spans, one an axis. See the module.
#[derive(PartialEq, Eq, Hash)]
pub struct Region {
    spans: SmallVec<[Span; 4]>,
}

impl Clone for Region {
    #[inline]
    fn clone(&self) -> Self {
        // All at once, where the derived one goes from span to span.
        Self {
            spans: SmallVec::from_slice(&self.spans),
        }
    }
}

/// What is left of a region.
pub type Pieces = SmallVec<[Region; 2]>;

impl Region {
    /// The product of these spans. If one is empty, so is the region, and all of them are.
    #[must_use]
    pub fn new(spans: impl IntoIterator<Item = Span>) -> Self {
        let mut spans: SmallVec<[Span; 4]> = spans.into_iter().collect();
        if spans.iter().any(Span::is_empty) {
            spans.fill(Span::EMPTY);
        }
        Self { spans }
    }

    /// Every index of an array of this shape.
    #[must_use]
    pub fn whole(shape: &[u64]) -> Self {
        Self::new(shape.iter().map(|&extent| Span::range(0, extent)))
    }

    /// Its spans, one an axis.
    #[inline]
    #[must_use]
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Whether it has no index.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans.first().is_some_and(Span::is_empty)
    }

    /// How many indices it has; `u64::MAX` if there are more.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.spans
            .iter()
            .fold(1, |product, span| product.saturating_mul(span.count()))
    }

    /// Those of its indices whose numbers along `axis`, counted from 0 in this region, are in `chosen`.
    ///
    /// # Panics
    /// If there is no such axis, or the region has not that many indices along it.
    #[must_use]
    pub fn select(&self, axis: usize, chosen: Span) -> Self {
        let mut spans = self.spans.clone();
        spans[axis] = spans[axis].select(chosen);
        Self::new(spans)
    }

    /// Whether the two have an index in common. Both are of one array: they have as many axes.
    #[inline]
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        debug_assert_eq!(self.spans.len(), other.spans.len());
        let mut pairs = self.spans.iter().zip(&other.spans);
        pairs.all(|(own, other)| own.overlaps(other))
    }

    /// Whether every index of the other is in it.
    #[must_use]
    pub fn contains(&self, other: &Self) -> bool {
        debug_assert_eq!(self.spans.len(), other.spans.len());
        let mut pairs = self.spans.iter().zip(&other.spans);
        pairs.all(|(own, other)| own.contains(other))
    }

    /// What both have.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        debug_assert_eq!(self.spans.len(), other.spans.len());
        let pairs = self.spans.iter().zip(&other.spans);
        Self::new(pairs.map(|(own, other)| own.intersection(other)))
    }

    /// Its indices that the other has not, as disjoint regions that are not empty.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Pieces {
        let common = self.intersection(other);
        if self.is_empty() {
            return Pieces::new();
        }
        if common.is_empty() {
            return Pieces::from_iter([self.clone()]);
        }
        let mut pieces = Pieces::new();
        let mut rest = self.clone();
        for (axis, span) in common.spans.iter().enumerate() {
            for piece in rest.spans[axis].difference(span) {
                let mut region = rest.clone();
                region.spans[axis] = piece;
                pieces.push(region);
            }
            rest.spans[axis] = *span;
        }
        pieces
    }

    /// The smallest box that has all indices of both.
    #[must_use]
    pub fn hull(&self, other: &Self) -> Self {
        debug_assert_eq!(self.spans.len(), other.spans.len());
        let pairs = self.spans.iter().zip(&other.spans);
        Self::new(pairs.map(|(own, other)| own.hull(other)))
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (axis, span) in self.spans.iter().enumerate() {
            if axis != 0 {
                f.write_str(", ")?;
            }
            span.fmt(f)?;
        }
        f.write_str("]")
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
