//! A spatial index: a tree of bounding boxes, each around those below it.
//!
//! A node has at most [`MOST`] children and is split when one more comes, along the axis on which their
//! centres lie farthest apart. What is taken out leaves its node smaller, and a node without children
//! goes with it; nodes are not merged, since records of live accesses come and go all the time.
//!
//! Boxes have three axes, of the array's own choice: those along which it is longest. What meets in these may still be apart
//! along another one, or by strides: the caller looks again at what it is given.
//!
//! # Layout
//!
//! What a look-up costs among many boxes is what it has to fetch. So a node has the edges of all its
//! children side by side, an array for each edge: they are compared all at once, without branches, and
//! neither children nor items are touched that do not meet. Edges are words of 32 bits. Along an axis that
//! is too long for these they are in units of a power of two, rounded so that boxes only grow.

use smallvec::SmallVec;

use super::Region;

/// The most children of a node.
const MOST: usize = 16;

/// How many axes boxes have.
const AXES: usize = 3;

/// The axes of an array along which it is longest, and how many low bits of an index are left out there.
pub(crate) struct Axes(SmallVec<[(usize, u32); AXES]>);

impl Axes {
    pub(crate) fn longest(shape: &[u64]) -> Self {
        let mut axes: SmallVec<[usize; AXES]> = (0..shape.len()).collect();
        axes.sort_by_key(|&axis| std::cmp::Reverse(shape[axis]));
        let bits = |axis: usize| u64::BITS - shape[axis].leading_zeros();
        // Ends are at most 2^30, below those of an axis that is not there.
        let axes = axes.into_iter().take(AXES);
        Self(
            axes.map(|axis| (axis, bits(axis).saturating_sub(30)))
                .collect(),
        )
    }
}

/// A box: the first index of each axis, and the one after the last, in units of its [`Axes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    low: [i32; AXES],
    high: [i32; AXES],
}

impl Bounds {
    /// Around everything.
    pub(crate) const ALL: Self = Self {
        low: [0; AXES],
        high: [i32::MAX; AXES],
    };

    /// Around nothing.
    const NOTHING: Self = Self {
        low: [i32::MAX; AXES],
        high: [0; AXES],
    };

    /// Those of a region that is not empty. Along axes that the array has not they are around everything.
    #[inline]
    pub(crate) fn of(region: &Region, axes: &Axes) -> Self {
        // What lies beyond the end of the array, as in a trace that is no good, lies at its end.
        let narrow = |edge: u64| i32::try_from(edge).unwrap_or(i32::MAX);
        let mut bounds = Self::ALL;
        for (place, &(axis, shift)) in axes.0.iter().enumerate() {
            let span = region.spans()[axis];
            let end = span.end() + ((1 << shift) - 1);
            bounds.low[place] = narrow(span.start() >> shift).min(i32::MAX - 1);
            bounds.high[place] = narrow(end >> shift);
        }
        bounds
    }

    fn with(mut self, other: &Self) -> Self {
        for axis in 0..AXES {
            self.low[axis] = self.low[axis].min(other.low[axis]);
            self.high[axis] = self.high[axis].max(other.high[axis]);
        }
        self
    }

    /// The axes along which they are not around everything: others need not be looked at.
    #[inline]
    fn axes(&self) -> impl Iterator<Item = usize> {
        (0..AXES).filter(|&axis| self.low[axis] != 0 || self.high[axis] != i32::MAX)
    }

    fn centre(&self, axis: usize) -> i64 {
        i64::from(self.low[axis]) + i64::from(self.high[axis])
    }
}

/// The boxes of a node's children, by axis: the low edges of all, and the high ones.
#[repr(align(64))]
struct Edges([[[i32; MOST]; 2]; AXES]);

impl Edges {
    const fn new() -> Self {
        Self([[[0; MOST]; 2]; AXES])
    }

    fn get(&self, child: usize) -> Bounds {
        Bounds {
            low: std::array::from_fn(|axis| self.0[axis][0][child]),
            high: std::array::from_fn(|axis| self.0[axis][1][child]),
        }
    }

    fn set(&mut self, child: usize, bounds: &Bounds) {
        for axis in 0..AXES {
            self.0[axis][0][child] = bounds.low[axis];
            self.0[axis][1][child] = bounds.high[axis];
        }
    }

    /// Those of the first `children` whose boxes meet `bounds`.
    #[inline]
    fn meeting(&self, bounds: &Bounds, children: usize) -> Found {
        let mut meets: [u8; MOST] = std::array::from_fn(|child| u8::from(child < children));
        for axis in bounds.axes() {
            let [low, high] = &self.0[axis];
            for child in 0..MOST {
                let here = low[child] < bounds.high[axis] && bounds.low[axis] < high[child];
                meets[child] &= u8::from(here);
            }
        }
        Found(u128::from_le_bytes(meets))
    }

    /// Makes the box of a child so large that it is around `bounds` too. Most are already, and are not
    /// written.
    fn grow(&mut self, child: usize, bounds: &Bounds) {
        for axis in bounds.axes() {
            let [low, high] = &mut self.0[axis];
            if bounds.low[axis] < low[child] {
                low[child] = bounds.low[axis];
            }
            if high[child] < bounds.high[axis] {
                high[child] = bounds.high[axis];
            }
        }
    }

    /// The child whose box grows least when it is to be around `bounds` too, by the sum of its edges; of
    /// equals the one that is smallest.
    fn least_growth(&self, bounds: &Bounds, children: usize) -> usize {
        let mut growth = [0_u32; MOST];
        let mut margin = [0_u32; MOST];
        for axis in bounds.axes() {
            let [low, high] = &self.0[axis];
            for child in 0..MOST {
                let length = high[child].abs_diff(low[child]);
                let low = low[child].min(bounds.low[axis]);
                let high = high[child].max(bounds.high[axis]);
                let grown = high.abs_diff(low).wrapping_sub(length);
                margin[child] = margin[child].wrapping_add(length);
                growth[child] = growth[child].wrapping_add(grown);
            }
        }
        (0..children)
            .min_by_key(|&child| (growth[child], margin[child]))
            .expect("an inner node has children")
    }
}

/// Children that were found, a byte each.
struct Found(u128);

impl Iterator for Found {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros();
        self.0 &= self.0 - 1;
        Some((bit / u8::BITS) as usize)
    }
}

enum Below<T> {
    Items(Vec<T>),
    #[expect(
        clippy::vec_box,
        reason = "nodes are large, and a split moves half of them"
    )]
    Nodes(Vec<Box<Node<T>>>),
}

struct Node<T> {
    edges: Edges,
    below: Below<T>,
}

/// See the module.
pub(crate) struct Tree<T> {
    root: Option<Box<Node<T>>>,
    len: usize,
}

impl<T> Tree<T> {
    pub(crate) const fn new() -> Self {
        Self { root: None, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn insert(&mut self, bounds: Bounds, item: T) {
        self.len += 1;
        let root = self.root.get_or_insert_with(|| Box::new(Node::leaf()));
        if let Some(other) = root.insert(&bounds, item)
            && let Some(root) = self.root.take()
        {
            let children = [root, other].map(|node| (node.bounds(), node));
            let children = children.into_iter().collect();
            self.root = Some(Box::new(Node::of(children, Below::Nodes)));
        }
    }

    /// Calls `f` with each item whose box meets `bounds`.
    #[inline]
    pub(crate) fn visit<'a>(&'a self, bounds: &Bounds, f: &mut impl FnMut(&'a T)) {
        if let Some(root) = &self.root {
            root.visit(bounds, f);
        }
    }

    /// The same, with the right to change them.
    pub(crate) fn visit_mut(&mut self, bounds: &Bounds, f: &mut impl FnMut(&mut T)) {
        if let Some(root) = &mut self.root {
            root.visit_mut(bounds, f);
        }
    }

    /// Takes out the items that `chosen` is true for, of those whose boxes meet `bounds`; of all of them, if
    /// there are none.
    pub(crate) fn extract(
        &mut self,
        bounds: Option<&Bounds>,
        chosen: &mut impl FnMut(&T) -> bool,
        taken: &mut Vec<T>,
    ) {
        let Some(root) = &mut self.root else {
            return;
        };
        let before = taken.len();
        root.extract(bounds.unwrap_or(&Bounds::ALL), chosen, taken);
        self.len -= taken.len() - before;
        if self.len == 0 {
            self.root = None;
        }
        while let Some(Node {
            below: Below::Nodes(nodes),
            ..
        }) = self.root.as_deref_mut()
            && nodes.len() == 1
        {
            self.root = nodes.pop();
        }
    }
}

/// Children of a node that is made or split.
type Children<C> = SmallVec<[(Bounds, C); MOST + 1]>;

/// Takes the upper half out of too many children.
fn halve<C>(children: &mut Children<C>) -> Children<C> {
    let spread = |axis: usize| {
        let centres = || children.iter().map(|(bounds, _)| bounds.centre(axis));
        centres().max().unwrap_or(0) - centres().min().unwrap_or(0)
    };
    let axis = (0..AXES).max_by_key(|&axis| spread(axis)).unwrap_or(0);
    children.sort_unstable_by_key(|(bounds, _)| bounds.centre(axis));
    children.drain(children.len() / 2..).collect()
}

impl<T> Node<T> {
    const fn leaf() -> Self {
        Self {
            edges: Edges::new(),
            below: Below::Items(Vec::new()),
        }
    }

    fn of<C>(children: Children<C>, below: fn(Vec<C>) -> Below<T>) -> Self {
        let mut edges = Edges::new();
        for (at, (bounds, _)) in children.iter().enumerate() {
            edges.set(at, bounds);
        }
        let mut list = Vec::with_capacity(MOST);
        list.extend(children.into_iter().map(|(_, child)| child));
        Self {
            edges,
            below: below(list),
        }
    }

    fn len(&self) -> usize {
        match &self.below {
            Below::Items(items) => items.len(),
            Below::Nodes(nodes) => nodes.len(),
        }
    }

    /// Around what it has.
    fn bounds(&self) -> Bounds {
        (0..self.len()).fold(Bounds::NOTHING, |all, at| all.with(&self.edges.get(at)))
    }

    /// If the node was split, the other half.
    fn insert(&mut self, bounds: &Bounds, item: T) -> Option<Box<Self>> {
        let Self { edges, below } = self;
        match below {
            Below::Items(items) => {
                if items.len() < MOST {
                    edges.set(items.len(), bounds);
                    items.push(item);
                    return None;
                }
                let items = std::mem::take(items);
                Some(self.split(items, (*bounds, item), Below::Items))
            }
            Below::Nodes(nodes) => {
                let at = edges.least_growth(bounds, nodes.len());
                let child = &mut nodes[at];
                let Some(other) = child.insert(bounds, item) else {
                    edges.grow(at, bounds);
                    return None;
                };
                edges.set(at, &child.bounds());
                let other = (other.bounds(), other);
                if nodes.len() < MOST {
                    edges.set(nodes.len(), &other.0);
                    nodes.push(other.1);
                    return None;
                }
                let nodes = std::mem::take(nodes);
                Some(self.split(nodes, other, Below::Nodes))
            }
        }
    }

    /// Splits the node, which had these children, when one more comes; gives the other half.
    fn split<C>(
        &mut self,
        children: Vec<C>,
        more: (Bounds, C),
        below: fn(Vec<C>) -> Below<T>,
    ) -> Box<Self> {
        let children = children.into_iter().enumerate();
        let mut children: Children<C> = children
            .map(|(at, child)| (self.edges.get(at), child))
            .collect();
        children.push(more);
        let other = halve(&mut children);
        *self = Self::of(children, below);
        Box::new(Self::of(other, below))
    }

    fn visit<'a>(&'a self, bounds: &Bounds, f: &mut impl FnMut(&'a T)) {
        let found = self.edges.meeting(bounds, self.len());
        match &self.below {
            Below::Items(items) => found.for_each(|at| f(&items[at])),
            Below::Nodes(nodes) => found.for_each(|at| nodes[at].visit(bounds, f)),
        }
    }

    fn visit_mut(&mut self, bounds: &Bounds, f: &mut impl FnMut(&mut T)) {
        let found = self.edges.meeting(bounds, self.len());
        match &mut self.below {
            Below::Items(items) => found.for_each(|at| f(&mut items[at])),
            Below::Nodes(nodes) => found.for_each(|at| nodes[at].visit_mut(bounds, f)),
        }
    }

    fn extract(
        &mut self,
        bounds: &Bounds,
        chosen: &mut impl FnMut(&T) -> bool,
        taken: &mut Vec<T>,
    ) {
        let found: SmallVec<[usize; MOST]> = self.edges.meeting(bounds, self.len()).collect();
        // From the last one on, since the last child takes the place of one that goes.
        for at in found.into_iter().rev() {
            let last = self.len() - 1;
            let gone = match &mut self.below {
                Below::Items(items) => {
                    let gone = chosen(&items[at]);
                    if gone {
                        taken.push(items.swap_remove(at));
                    }
                    gone
                }
                Below::Nodes(nodes) => {
                    let before = taken.len();
                    let child = &mut nodes[at];
                    child.extract(bounds, chosen, taken);
                    if taken.len() == before {
                        continue;
                    }
                    self.edges.set(at, &child.bounds());
                    let gone = child.len() == 0;
                    if gone {
                        nodes.swap_remove(at);
                    }
                    gone
                }
            };
            if gone {
                self.edges.set(at, &self.edges.get(last));
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn meet(one: &Bounds, other: &Bounds) -> bool {
        (0..AXES).all(|axis| one.low[axis] < other.high[axis] && other.low[axis] < one.high[axis])
    }

    fn bounds() -> impl Strategy<Value = Bounds> {
        let edge = (0..60, 1..12);
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
                            .filter(|(own, _)| meet(own, &bounds))
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
                            bounds.is_none_or(|bounds| meet(own, &bounds)) && item % part == 0
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
