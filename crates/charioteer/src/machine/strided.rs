//! Boxes of elements that are copied: what is left of their axes when those that lie together are one.

use smallvec::SmallVec;

/// The elements of a box in two memories: runs of bytes that lie together in both, and the axes along
/// which they are repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Strided {
    /// Bytes that lie together.
    pub run: u64,
    /// The outermost first; there is none if all bytes lie together.
    pub axes: SmallVec<[Axis; 3]>,
}

/// So many runs, so many bytes apart on the one side and on the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    /// How many; at least 2.
    pub extent: u64,
    /// Bytes from one to the next where they come from.
    pub from: u64,
    /// Bytes from one to the next where they go.
    pub to: u64,
}

impl Strided {
    /// A box of `extents` elements of `item` bytes along each axis, so many bytes apart. `None` if its
    /// bytes cannot be counted.
    ///
    /// # Panics
    /// If there are not as many strides as extents.
    #[must_use]
    pub fn new(
        from_strides: &[u64],
        to_strides: &[u64],
        extents: &[u64],
        item: u64,
    ) -> Option<Self> {
        assert!(
            from_strides.len() == extents.len() && to_strides.len() == extents.len(),
            "an axis has a stride on both sides"
        );
        if extents.contains(&0) {
            let (run, axes) = (0, SmallVec::new());
            return Some(Self { run, axes });
        }
        let mut run = item;
        // The innermost first.
        let mut axes: SmallVec<[Axis; 3]> = SmallVec::new();
        let sides = from_strides.iter().zip(to_strides);
        for (&extent, (&from, &to)) in extents.iter().zip(sides).rev() {
            if extent == 1 {
                continue;
            }
            match axes.last_mut() {
                None if (from, to) == (run, run) => run = run.checked_mul(extent)?,
                Some(inner)
                    if inner.from.checked_mul(inner.extent) == Some(from)
                        && inner.to.checked_mul(inner.extent) == Some(to) =>
                {
                    inner.extent = inner.extent.checked_mul(extent)?;
                }
                _ => axes.push(Axis { extent, from, to }),
            }
        }
        axes.reverse();
        let strided = Self { run, axes };
        strided.checked_bytes()?;
        strided.reach(|axis| axis.from)?;
        strided.reach(|axis| axis.to)?;
        Some(strided)
    }

    fn checked_bytes(&self) -> Option<u64> {
        let mut axes = self.axes.iter();
        axes.try_fold(self.run, |bytes, axis| bytes.checked_mul(axis.extent))
    }

    /// From the first byte to behind the last one.
    fn reach(&self, stride: impl Fn(&Axis) -> u64) -> Option<u64> {
        self.axes.iter().try_fold(self.run, |reach, axis| {
            (axis.extent - 1)
                .checked_mul(stride(axis))?
                .checked_add(reach)
        })
    }

    /// How many bytes are copied.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.checked_bytes().expect("it was counted")
    }

    /// How many bytes there are from the first one that is read to behind the last one.
    #[must_use]
    pub fn from_reach(&self) -> u64 {
        self.reach(|axis| axis.from).expect("it was counted")
    }

    /// How many bytes there are from the first one that is written to behind the last one.
    #[must_use]
    pub fn to_reach(&self) -> u64 {
        self.reach(|axis| axis.to).expect("it was counted")
    }

    /// The same elements, which lie together where they go.
    #[must_use]
    pub fn packed_to(&self) -> Self {
        self.with(|axis, together| Axis {
            to: together,
            ..*axis
        })
    }

    /// The same elements, which lie together where they come from.
    #[must_use]
    pub fn packed_from(&self) -> Self {
        self.with(|axis, together| Axis {
            from: together,
            ..*axis
        })
    }

    /// With other strides, by those of a side where all lies together.
    fn with(&self, change: impl Fn(&Axis, u64) -> Axis) -> Self {
        let mut together = self.run;
        let mut axes: SmallVec<[Axis; 3]> = self.axes.clone();
        for axis in axes.iter_mut().rev() {
            *axis = change(axis, together);
            together *= axis.extent;
        }
        let list = |of: fn(&Axis) -> u64, run: u64| -> SmallVec<[u64; 4]> {
            axes.iter().map(of).chain([run]).collect()
        };
        let extents = list(|axis| axis.extent, self.run);
        let strided = Self::new(
            &list(|axis| axis.from, 1),
            &list(|axis| axis.to, 1),
            &extents,
            1,
        );
        strided.expect("it was counted")
    }

    /// Divides it into parts of at most so many bytes, and calls `part` with each and with where it begins
    /// on either side, in bytes from where the box does.
    ///
    /// # Panics
    /// If `most` is zero.
    pub fn parts<E>(
        &self,
        most: u64,
        part: &mut impl FnMut(&Self, u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        assert!(most != 0, "a part has a byte");
        self.parts_at(most, 0, 0, part)
    }

    fn parts_at<E>(
        &self,
        most: u64,
        from: u64,
        to: u64,
        part: &mut impl FnMut(&Self, u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let bytes = self.bytes();
        if bytes <= most {
            return if bytes == 0 {
                Ok(())
            } else {
                part(self, from, to)
            };
        }
        let Some((outer, inner)) = self.axes.split_first() else {
            for start in (0..self.run).step_by(usize::try_from(most).unwrap_or(usize::MAX)) {
                let run = most.min(self.run - start);
                let axes = SmallVec::new();
                part(&Self { run, axes }, from + start, to + start)?;
            }
            return Ok(());
        };
        let many = most / (bytes / outer.extent);
        let mut at = 0;
        while at < outer.extent {
            let extent = many.max(1).min(outer.extent - at);
            let mut axes: SmallVec<[Axis; 3]> = inner.into();
            if extent > 1 {
                axes.insert(0, Axis { extent, ..*outer });
            }
            let run = self.run;
            let (from, to) = (from + at * outer.from, to + at * outer.to);
            Self { run, axes }.parts_at(most, from, to, part)?;
            at += extent;
        }
        Ok(())
    }

    /// Calls `run` with where each run begins on either side, in bytes from where the box does.
    pub fn each(&self, run: &mut impl FnMut(u64, u64)) {
        fn walk(axes: &[Axis], from: u64, to: u64, run: &mut impl FnMut(u64, u64)) {
            let Some((axis, inner)) = axes.split_first() else {
                return run(from, to);
            };
            for at in 0..axis.extent {
                walk(inner, from + at * axis.from, to + at * axis.to, run);
            }
        }
        if self.run != 0 {
            walk(&self.axes, 0, 0, run);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn axes_that_lie_together_are_one() {
        let axis = |extent, from, to| Axis { extent, from, to };
        let whole = Strided::new(&[48, 8], &[48, 8], &[5, 6], 8).unwrap();
        assert_eq!((whole.run, whole.axes.len()), (240, 0));
        let rows = Strided::new(&[800, 8], &[48, 8], &[5, 6], 8).unwrap();
        assert_eq!((rows.run, &*rows.axes), (48, &[axis(5, 800, 48)][..]));
        assert_eq!((rows.from_reach(), rows.to_reach()), (3248, 240));
        let cube = Strided::new(&[96, 48, 16], &[96, 48, 16], &[4, 2, 3], 8).unwrap();
        assert_eq!((cube.run, &*cube.axes), (8, &[axis(24, 16, 16)][..]));
        let single = Strided::new(&[7, 5], &[9, 3], &[1, 1], 8).unwrap();
        assert_eq!((single.run, single.axes.len()), (8, 0));
        assert_eq!(Strided::new(&[8], &[8], &[0], 8).unwrap().bytes(), 0);
        assert_eq!(Strided::new(&[1 << 60], &[8], &[1 << 9], 8), None);
    }

    proptest! {
        #[test]
        fn runs_are_the_elements(
            axes in prop::collection::vec((1..5_u64, 0..3_u64, 0..3_u64), 0..4),
            item in 1..5_u64,
            most in 1..40_u64,
        ) {
            // Strides of boxes in larger ones, by what each axis has beyond.
            let extents: Vec<u64> = axes.iter().map(|axis| axis.0).collect();
            let strides = |beyond: fn(&(u64, u64, u64)) -> u64| {
                let mut stride = item;
                let mut strides: Vec<u64> = axes.iter().rev().map(|axis| {
                    let own = stride;
                    stride *= axis.0 + beyond(axis);
                    own
                }).collect();
                strides.reverse();
                strides
            };
            let (from, to) = (strides(|axis| axis.1), strides(|axis| axis.2));
            let strided = Strided::new(&from, &to, &extents, item).unwrap();
            let mut pairs = Vec::new();
            strided.each(&mut |from, to| pairs.extend((0..strided.run).map(|at| (from + at, to + at))));
            let mut expected = vec![(0, 0)];
            for ((&extent, &from), &to) in extents.iter().zip(&from).zip(&to) {
                expected = expected
                    .iter()
                    .flat_map(|&(f, t)| (0..extent).map(move |at| (f + at * from, t + at * to)))
                    .collect();
            }
            let expected: Vec<_> = expected
                .iter()
                .flat_map(|&(f, t)| (0..item).map(move |at| (f + at, t + at)))
                .collect();
            pairs.sort_unstable();
            let mut sorted = expected;
            sorted.sort_unstable();
            prop_assert_eq!(pairs.len() as u64, strided.bytes());
            prop_assert_eq!(pairs.last().map(|it| it.0 + 1), Some(strided.from_reach()));
            prop_assert_eq!(&pairs, &sorted);
            // In parts, by way of a buffer.
            let mut parted = Vec::new();
            let mut add = |part: &Strided, from: u64, to: u64| -> Result<(), TestCaseError> {
                prop_assert!(part.bytes() <= most);
                let (load, unload) = (part.packed_to(), part.packed_from());
                let mut buffer = vec![None; part.bytes() as usize];
                load.each(&mut |source, target| {
                    for at in 0..load.run {
                        buffer[(target + at) as usize] = Some(from + source + at);
                    }
                });
                unload.each(&mut |source, target| {
                    for at in 0..unload.run {
                        let origin = buffer[(source + at) as usize].unwrap();
                        parted.push((origin, to + target + at));
                    }
                });
                Ok(())
            };
            strided.parts(most, &mut add)?;
            parted.sort_unstable();
            prop_assert_eq!(parted, sorted);
        }
    }
}
