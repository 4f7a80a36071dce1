//! One axis of an index set: an arithmetic progression.

use std::fmt;

use smallvec::SmallVec;

/// The indices `start`, `start + step`, … of one axis, `count` of them. Empty if the count is zero.
///
/// There is one way to write a set: the empty one is `0:0`, and a single index has the step 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    start: u64,
    step: u64,
    count: u64,
}

/// The pieces that are left of a span when another one is taken away.
pub(super) type Spans = SmallVec<[Span; 2]>;

impl Span {
    /// So many indices from `start` on, each `step` after the one before.
    ///
    /// # Panics
    /// If the step is zero, or the last index has more than 63 bits.
    #[must_use]
    pub fn new(start: u64, step: u64, count: u64) -> Self {
        assert!(step >= 1, "a step is at least 1");
        match count {
            0 => Self::EMPTY,
            1 => {
                assert!(start < LIMIT, "an index has 63 bits");
                Self {
                    start,
                    step: 1,
                    count,
                }
            }
            _ => {
                let last = (count - 1)
                    .checked_mul(step)
                    .and_then(|way| way.checked_add(start));
                assert!(
                    last.is_some_and(|last| last < LIMIT),
                    "an index has 63 bits"
                );
                Self { start, step, count }
            }
        }
    }

    /// As [`Span::new`]; none instead of a panic.
    #[must_use]
    pub fn checked(start: u64, step: u64, count: u64) -> Option<Self> {
        let way = count.saturating_sub(1).checked_mul(step)?;
        let last = way.checked_add(start)?;
        (step >= 1 && (count == 0 || last < LIMIT)).then(|| Self::new(start, step, count))
    }

    /// The empty set.
    pub const EMPTY: Self = Self {
        start: 0,
        step: 1,
        count: 0,
    };

    /// The indices from `start` on, before `end`.
    #[must_use]
    pub fn range(start: u64, end: u64) -> Self {
        Self::new(start, 1, end.saturating_sub(start))
    }

    /// The first index; of the empty set, 0.
    #[inline]
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// How far two neighbours are apart.
    #[inline]
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// How many indices it has.
    #[inline]
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether it has none.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// One more than the last index; of the empty set, 0.
    #[inline]
    #[must_use]
    pub fn end(&self) -> u64 {
        if self.count == 0 {
            0
        } else {
            self.start + (self.count - 1) * self.step + 1
        }
    }

    fn last(&self) -> u64 {
        self.start + (self.count - 1) * self.step
    }

    /// Whether the index is in it.
    #[must_use]
    pub fn has(&self, index: u64) -> bool {
        self.count != 0
            && index >= self.start
            && index <= self.last()
            && (index - self.start).is_multiple_of(self.step)
    }

    /// Those of its indices whose numbers, counted from 0, are in `chosen`.
    ///
    /// # Panics
    /// If it has not that many.
    #[must_use]
    pub fn select(&self, chosen: Self) -> Self {
        if chosen.is_empty() {
            return Self::EMPTY;
        }
        assert!(chosen.end() <= self.count, "a selection beyond the end");
        Self::new(
            self.start + chosen.start * self.step,
            self.step * chosen.step,
            chosen.count,
        )
    }

    /// What both have.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        if self.count == 0 || other.count == 0 {
            return Self::EMPTY;
        }
        let (low, high) = (self.start.max(other.start), self.last().min(other.last()));
        if low > high {
            return Self::EMPTY;
        }
        if self.step == 1 && other.step == 1 {
            return Self::new(low, 1, high - low + 1);
        }
        // An index of both is start + k * step of the one, and congruent to the other's start modulo
        // the other's step. Words of 128 bits, since the common step may be as large as a product.
        let (step, wanted) = (i128::from(self.step), i128::from(other.step));
        let (gcd, inverse) = extended_gcd(step, wanted);
        let apart = i128::from(other.start) - i128::from(self.start);
        if apart % gcd != 0 {
            return Self::EMPTY;
        }
        let modulus = wanted / gcd;
        let k = (apart / gcd % modulus * (inverse % modulus)).rem_euclid(modulus);
        let first = i128::from(self.start) + k * step;
        let common = step * modulus;
        let low = i128::from(low);
        // Both progressions go on below: `first` is one common index, and may be left of `low`.
        let first = if first < low {
            first + (low - first + common - 1) / common * common
        } else {
            first - (first - low) / common * common
        };
        let high = i128::from(high);
        if first > high {
            return Self::EMPTY;
        }
        let count = (high - first) / common + 1;
        let narrow = |wide: i128| u64::try_from(wide).expect("between two indices");
        let step = if count == 1 { 1 } else { narrow(common) };
        Self::new(narrow(first), step, narrow(count))
    }

    /// Whether the two have an index in common.
    #[inline]
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        if self.step == 1 && other.step == 1 {
            return self.start < other.end() && other.start < self.end();
        }
        !self.intersection(other).is_empty()
    }

    /// Whether every index of the other is in it.
    #[must_use]
    pub fn contains(&self, other: &Self) -> bool {
        match other.count {
            0 => true,
            1 => self.has(other.start),
            _ => {
                self.has(other.start)
                    && self.has(other.last())
                    && other.step.is_multiple_of(self.step)
            }
        }
    }

    /// Its indices that the other has not, in disjoint pieces: at most two more than the smaller of the
    /// number of indices taken away and of how many of its steps lie between two of those.
    pub(super) fn difference(&self, other: &Self) -> Spans {
        let taken = self.intersection(other);
        if taken.is_empty() {
            return if self.is_empty() {
                Spans::new()
            } else {
                SmallVec::from_slice(&[*self])
            };
        }
        let mut pieces = Spans::new();
        let mut add = |start: u64, step: u64, count: u64| {
            if count != 0 {
                pieces.push(Self::new(start, step, count));
            }
        };
        let before = (taken.start - self.start) / self.step;
        add(self.start, self.step, before);
        if taken.count > 1 {
            let ratio = taken.step / self.step;
            if ratio <= taken.count {
                // The other remainders.
                for remainder in 1..ratio {
                    let start = taken.start + remainder * self.step;
                    add(start, taken.step, taken.count - 1);
                }
            } else {
                // The gaps.
                for gap in 0..taken.count - 1 {
                    let start = taken.start + gap * taken.step + self.step;
                    add(start, self.step, ratio - 1);
                }
            }
        }
        let after = (self.last() - taken.last()) / self.step;
        add(taken.last() + self.step, self.step, after);
        pieces
    }

    /// The smallest range that has all indices of both.
    pub(super) fn hull(&self, other: &Self) -> Self {
        match (self.is_empty(), other.is_empty()) {
            (true, true) => Self::EMPTY,
            (true, false) => Self::range(other.start, other.end()),
            (false, true) => Self::range(self.start, self.end()),
            (false, false) => Self::range(self.start.min(other.start), self.end().max(other.end())),
        }
    }
}

/// One more than the largest index: sums of two indices fit into a word.
const LIMIT: u64 = 1 << 63;

/// The greatest common divisor, and a number whose product with `a` is congruent to it modulo `b`.
fn extended_gcd(a: i128, b: i128) -> (i128, i128) {
    let (mut old, mut new) = ((a, 1), (b, 0));
    while new.0 != 0 {
        let quotient = old.0 / new.0;
        let next = (old.0 - quotient * new.0, old.1 - quotient * new.1);
        (old, new) = (new, next);
    }
    old
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.step {
            1 => write!(f, "{}:{}", self.start, self.end()),
            step => write!(f, "{}:{}:{step}", self.start, self.end()),
        }
    }
}
