//! A spatial index: a tree of bounding boxes, each around those below it.
//!
//! A node has at most [`MOST`] children and is split when one more comes, along the axis on which their
//! centres lie farthest apart. What is taken out leaves its node smaller, and a node without children
//! goes with it; nodes are not merged, since records of live accesses come and go all the time.
//!
//! Boxes have three axes, of the array's own choice: those along which it is longest. What meets in these may still be apart
//! along another one, or by strides: the caller looks again at what it is given.

use smallvec::SmallVec;

use super::Region;

/// The most children of a node.
const MOST: usize = 16;

/// How many axes boxes have.
pub(crate) const AXES: usize = 3;

/// A box: the first index of each axis, and the one after the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) low: [u64; AXES],
    pub(crate) high: [u64; AXES],
}

impl Bounds {
    /// Around everything.
    pub(crate) const ALL: Self = Self {
        low: [0; AXES],
        high: [u64::MAX; AXES],
    };

    /// Those of a region that is not empty, along `axes`; there may be fewer than three.
    pub(crate) fn of(region: &Region, axes: &[usize]) -> Self {
        let mut bounds = Self {
            low: [0; AXES],
            high: [1; AXES],
        };
        for (place, &axis) in axes.iter().enumerate().take(AXES) {
            let span = region.spans()[axis];
            (bounds.low[place], bounds.high[place]) = (span.start(), span.end());
        }
        bounds
    }

    #[inline]
    fn meets(&self, other: &Self) -> bool {
        (0..AXES).all(|axis| self.low[axis] < other.high[axis] && other.low[axis] < self.high[axis])
    }

    fn with(mut self, other: &Self) -> Self {
        for axis in 0..AXES {
            self.low[axis] = self.low[axis].min(other.low[axis]);
            self.high[axis] = self.high[axis].max(other.high[axis]);
        }
        self
    }

    /// The sum of its edges.
    fn margin(&self) -> u64 {
        (0..AXES).fold(0, |sum, axis| {
            (self.high[axis] - self.low[axis]).saturating_add(sum)
        })
    }

    fn centre(&self, axis: usize) -> u64 {
        // Half of it cannot overflow: indices have 63 bits.
        self.low[axis] + self.high[axis]
    }
}

enum Node<T> {
    Leaf(Vec<(Bounds, T)>),
    Inner(Vec<(Bounds, Box<Node<T>>)>),
}

/// The axes of an array along which it is longest.
pub(crate) fn longest(shape: &[u64]) -> SmallVec<[usize; AXES]> {
    let mut axes: Vec<usize> = (0..shape.len()).collect();
    axes.sort_by_key(|&axis| std::cmp::Reverse(shape[axis]));
    axes.into_iter().take(AXES).collect()
}

/// See the module.
pub(crate) struct Tree<T> {
    root: Node<T>,
    len: usize,
}

impl<T> Tree<T> {
    pub(crate) const fn new() -> Self {
        Self {
            root: Node::Leaf(Vec::new()),
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn insert(&mut self, bounds: Bounds, item: T) {
        self.len += 1;
        if let Some((own, other)) = self.root.insert(bounds, item) {
            let root = std::mem::replace(&mut self.root, Node::Leaf(Vec::new()));
            self.root = Node::Inner(vec![(own, Box::new(root)), other]);
        }
    }

    /// Calls `f` with each item whose box meets `bounds`.
    pub(crate) fn visit<'a>(&'a self, bounds: &Bounds, f: &mut impl FnMut(&'a T)) {
        self.root.visit(bounds, f);
    }

    /// The same, with the right to change them.
    pub(crate) fn visit_mut(&mut self, bounds: &Bounds, f: &mut impl FnMut(&mut T)) {
        self.root.visit_mut(bounds, f);
    }

    /// Takes out the items that `chosen` is true for, of those whose boxes meet `bounds`; all of them, if
    /// there are none.
    pub(crate) fn extract(
        &mut self,
        bounds: Option<&Bounds>,
        chosen: &mut impl FnMut(&T) -> bool,
        taken: &mut Vec<T>,
    ) {
        let before = taken.len();
        self.root.extract(bounds, chosen, taken);
        self.len -= taken.len() - before;
        while let Node::Inner(children) = &mut self.root
            && children.len() <= 1
        {
            self.root = match children.pop() {
                Some((_, child)) => *child,
                None => Node::Leaf(Vec::new()),
            };
        }
    }
}

fn around<T>(children: &[(Bounds, T)]) -> Bounds {
    let mut bounds = children.iter().map(|(bounds, _)| bounds);
    let first = *bounds.next().expect("a node has children");
    bounds.fold(first, Bounds::with)
}

/// Takes the upper half out of a node that has too many children.
fn split<T>(children: &mut Vec<(Bounds, T)>) -> Vec<(Bounds, T)> {
    let spread = |axis: usize| {
        let centres = || children.iter().map(|(bounds, _)| bounds.centre(axis));
        centres().max().unwrap_or(0) - centres().min().unwrap_or(0)
    };
    let axis = (0..AXES).max_by_key(|&axis| spread(axis)).unwrap_or(0);
    children.sort_unstable_by_key(|(bounds, _)| bounds.centre(axis));
    let half = children.split_off(children.len() / 2);
    children.reserve_exact(MOST + 1 - children.len());
    half
}

impl<T> Node<T> {
    /// If the node was split, its own bounds from now on and the other half.
    fn insert(&mut self, bounds: Bounds, item: T) -> Option<(Bounds, (Bounds, Box<Self>))> {
        match self {
            Self::Leaf(items) => {
                items.push((bounds, item));
                (items.len() > MOST).then(|| {
                    let other = split(items);
                    (around(items), (around(&other), Box::new(Self::Leaf(other))))
                })
            }
            Self::Inner(children) => {
                let growth = |(own, _): &(Bounds, Box<Self>)| {
                    let margin = own.margin();
                    (own.with(&bounds).margin() - margin, margin)
                };
                let at = (0..children.len())
                    .min_by_key(|&at| growth(&children[at]))
                    .expect("an inner node has children");
                let (own, child) = &mut children[at];
                match child.insert(bounds, item) {
                    None => {
                        *own = own.with(&bounds);
                        None
                    }
                    Some((left, right)) => {
                        *own = left;
                        children.push(right);
                        (children.len() > MOST).then(|| {
                            let other = split(children);
                            let half = Box::new(Self::Inner(other));
                            let Self::Inner(other) = &*half else {
                                unreachable!("made above")
                            };
                            (around(children), (around(other), half))
                        })
                    }
                }
            }
        }
    }

    fn visit<'a>(&'a self, bounds: &Bounds, f: &mut impl FnMut(&'a T)) {
        match self {
            Self::Leaf(items) => items
                .iter()
                .filter(|(own, _)| own.meets(bounds))
                .for_each(|(_, item)| f(item)),
            Self::Inner(children) => children
                .iter()
                .filter(|(own, _)| own.meets(bounds))
                .for_each(|(_, child)| child.visit(bounds, f)),
        }
    }

    fn visit_mut(&mut self, bounds: &Bounds, f: &mut impl FnMut(&mut T)) {
        match self {
            Self::Leaf(items) => items
                .iter_mut()
                .filter(|(own, _)| own.meets(bounds))
                .for_each(|(_, item)| f(item)),
            Self::Inner(children) => children
                .iter_mut()
                .filter(|(own, _)| own.meets(bounds))
                .for_each(|(_, child)| child.visit_mut(bounds, f)),
        }
    }

    fn extract(
        &mut self,
        bounds: Option<&Bounds>,
        chosen: &mut impl FnMut(&T) -> bool,
        taken: &mut Vec<T>,
    ) {
        let meets = |own: &Bounds| bounds.is_none_or(|bounds| own.meets(bounds));
        match self {
            Self::Leaf(items) => {
                let mut at = 0;
                while at < items.len() {
                    if meets(&items[at].0) && chosen(&items[at].1) {
                        taken.push(items.swap_remove(at).1);
                    } else {
                        at += 1;
                    }
                }
            }
            Self::Inner(children) => {
                children.retain_mut(|(own, child)| {
                    if meets(own) {
                        let before = taken.len();
                        child.extract(bounds, chosen, taken);
                        if taken.len() != before {
                            match child.bounds() {
                                Some(bounds) => *own = bounds,
                                None => return false,
                            }
                        }
                    }
                    true
                });
            }
        }
    }

    /// Around what it has; none if it has nothing.
    fn bounds(&self) -> Option<Bounds> {
        match self {
            Self::Leaf(items) => (!items.is_empty()).then(|| around(items)),
            Self::Inner(children) => (!children.is_empty()).then(|| around(children)),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bounds() -> impl Strategy<Value = Bounds> {
        let edge = (0..60_u64, 1..12_u64);
        [edge.clone(), edge.clone(), edge].prop_map(|edges| Bounds {
            low: edges.map(|(low, _)| low),
            high: edges.map(|(low, length)| low + length),
        })
    }

    #[derive(Clone, Debug)]
    enum Move {
        Insert(Bounds),
        Visit(Bounds),
        Extract(Option<Bounds>, u64),
    }

    fn step() -> impl Strategy<Value = Move> {
        prop_oneof![
            6 => bounds().prop_map(Move::Insert),
            3 => bounds().prop_map(Move::Visit),
            1 => (prop::option::of(bounds()), 1..5_u64)
                .prop_map(|(bounds, part)| Move::Extract(bounds, part)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn it_finds_what_a_list_finds(moves in prop::collection::vec(step(), 1..400)) {
            let mut tree = Tree::new();
            let mut list: Vec<(Bounds, u64)> = Vec::new();
            for (number, step) in (0_u64..).zip(moves) {
                match step {
                    Move::Insert(bounds) => {
                        tree.insert(bounds, number);
                        list.push((bounds, number));
                    }
                    Move::Visit(bounds) => {
                        let mut found = Vec::new();
                        tree.visit(&bounds, &mut |item| found.push(*item));
                        found.sort_unstable();
                        let mut changed = Vec::new();
                        tree.visit_mut(&bounds, &mut |item| changed.push(*item));
                        changed.sort_unstable();
                        let expected: Vec<u64> = list
                            .iter()
                            .filter(|(own, _)| own.meets(&bounds))
                            .map(|(_, item)| *item)
                            .collect();
                        prop_assert_eq!(&found, &expected);
                        prop_assert_eq!(changed, expected);
                    }
                    Move::Extract(bounds, part) => {
                        let mut taken = Vec::new();
                        tree.extract(bounds.as_ref(), &mut |item| item % part == 0, &mut taken);
                        taken.sort_unstable();
                        let goes = |(own, item): &(Bounds, u64)| {
                            bounds.is_none_or(|bounds| own.meets(&bounds)) && item % part == 0
                        };
                        let expected: Vec<u64> =
                            list.iter().filter(|entry| goes(entry)).map(|entry| entry.1).collect();
                        list.retain(|entry| !goes(entry));
                        prop_assert_eq!(taken, expected);
                    }
                }
                prop_assert_eq!(tree.len(), list.len());
            }
        }
    }
}
