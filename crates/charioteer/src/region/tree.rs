//! A spatial index: a tree of bounding boxes, each around those below it.
//!
//! # Order
//!
//! Boxes are in the *Z-order* of their centres: of the highest bit in which two differ along any axis. The
//! tree is a B-tree of that order: a new box has one place, which is found by comparing it with the first
//! one of each child, whatever is around. A node has at most [`MOST`] children. When one more comes it is
//! split where neighbours differ in the highest bit, of those places that leave each half enough: so nodes
//! are blocks of a grid as far as can be, and few of them overlap.
//!
//! What is taken out leaves its node smaller, and a node without children goes with it; nodes are not
//! merged, since records of live accesses come and go all the time.
//!
//! Boxes have three axes, of the array's own choice: those along which it is longest. What meets in these
//! may still be apart along another one, or by strides: the caller looks again at what it is given, unless
//! it hears that both boxes are [exact](Bounds::of).
//!
//! # Layout
//!
//! What a look-up costs among many boxes is what it has to fetch, and how often it waits for that. So a node
//! has the edges of all its children side by side, an array for each edge: they are compared all at once,
//! without branches, and neither children nor items are touched that do not meet. And it goes down level by
//! level, and asks for all nodes that it will look at in the next one before it looks at the first of them.
//!
//! Edges are words of 32 bits. Along an axis that is too long for these they are in units of a power of two,
//! rounded so that boxes only grow.

use std::cmp::Ordering;

use smallvec::SmallVec;

use super::Region;
use crate::fetch::fetch;

/// The most children of a node.
const MOST: usize = 16;

/// The least of each half of a node that is split.
const LEAST: usize = 5;

/// Bytes of a cache line.
const LINE: usize = 64;

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
    /// It has the indices of its region and no others.
    exact: bool,
}

impl Bounds {
    /// Around everything.
    pub(crate) const ALL: Self = Self {
        low: [0; AXES],
        high: [i32::MAX; AXES],
        exact: false,
    };

    /// Around nothing.
    const NOTHING: Self = Self {
        low: [i32::MAX; AXES],
        high: [0; AXES],
        exact: false,
    };

    /// Those of a region that is not empty. Along axes that the array has not they are around everything.
    /// Exact are those of a region without strides, with all its axes, in units of one index.
    #[inline]
    pub(crate) fn of(region: &Region, axes: &Axes) -> Self {
        // What lies beyond the end of the array, as in a trace that is no good, lies at its end.
        let narrow = |edge: u64| i32::try_from(edge).unwrap_or(i32::MAX);
        let mut bounds = Self::ALL;
        let mut exact = axes.0.len() == region.spans().len();
        for (place, &(axis, shift)) in axes.0.iter().enumerate() {
            let span = region.spans()[axis];
            let end = span.end() + ((1 << shift) - 1);
            bounds.low[place] = narrow(span.start() >> shift).min(i32::MAX - 1);
            bounds.high[place] = narrow(end >> shift);
            exact &= shift == 0 && span.step() == 1 && bounds.high[place] != i32::MAX;
        }
        Self { exact, ..bounds }
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

    /// Of the highest bit in which the centres of two boxes differ: how high it is, and which one is before
    /// the other by it.
    #[inline]
    fn differ(&self, other: &Self) -> (u32, Ordering) {
        let mut most = 0;
        let mut order = Ordering::Equal;
        for axis in 0..AXES {
            // Twice the centre; edges are not negative, so that the sum of two has 32 bits.
            let centre = |it: &Self| it.low[axis].cast_unsigned() + it.high[axis].cast_unsigned();
            let (own, other) = (centre(self), centre(other));
            let bits = own ^ other;
            // Whether its highest bit is higher than the highest one so far.
            if most < bits && most < (most ^ bits) {
                most = bits;
                order = own.cmp(&other);
            }
        }
        (u32::BITS - most.leading_zeros(), order)
    }
}

/// The boxes of a node's children, by axis: the low edges of all, and the high ones.
#[repr(C, align(64))] // LINE
struct Edges([[[i32; MOST]; 2]; AXES]);

impl Edges {
    const fn new() -> Self {
        Self([[[0; MOST]; 2]; AXES])
    }

    /// Those of these children, and which are exact, a bit each.
    fn of<C>(children: &Children<C>) -> (Self, u16) {
        let mut edges = Self::new();
        let mut exact = 0;
        for (at, (bounds, _)) in children.iter().enumerate() {
            edges.set(at, bounds);
            exact |= u16::from(bounds.exact) << at;
        }
        (edges, exact)
    }

    fn get(&self, child: usize) -> Bounds {
        Bounds {
            low: std::array::from_fn(|axis| self.0[axis][0][child]),
            high: std::array::from_fn(|axis| self.0[axis][1][child]),
            exact: false,
        }
    }

    fn set(&mut self, child: usize, bounds: &Bounds) {
        for axis in 0..AXES {
            self.0[axis][0][child] = bounds.low[axis];
            self.0[axis][1][child] = bounds.high[axis];
        }
    }

    /// Moves the boxes of some children to others.
    fn shift(&mut self, children: std::ops::Range<usize>, to: usize) {
        for edge in self.0.as_flattened_mut() {
            edge.copy_within(children.clone(), to);
        }
    }

    /// Those of the first `children` whose boxes meet `bounds`.
    #[inline]
    fn meeting(&self, bounds: &Bounds, children: usize) -> Found {
        // Masks, since compilers make vectors of these and branches of conditions.
        let mask = |holds: bool| -i32::from(holds);
        let mut meets = [-1_i32; MOST];
        for axis in bounds.axes() {
            let [low, high] = &self.0[axis];
            let (from, to) = (bounds.low[axis], bounds.high[axis]);
            for child in 0..MOST {
                meets[child] &= mask(low[child] < to) & mask(from < high[child]);
            }
        }
        let mut found = 0;
        for (child, meets) in meets.into_iter().enumerate() {
            found |= meets & 1 << child;
        }
        Found(found & ((1 << children) - 1))
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
}

/// Children that were found, a bit each.
struct Found(i32);

impl Iterator for Found {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let child = self.0.trailing_zeros();
        self.0 &= self.0 - 1;
        Some(child as usize)
    }
}

impl DoubleEndedIterator for Found {
    #[inline]
    fn next_back(&mut self) -> Option<usize> {
        let child = self.0.checked_ilog2()?;
        self.0 ^= 1 << child;
        Some(child as usize)
    }
}

/// A child of an inner node.
struct Child<T> {
    /// What is before this, in the order of boxes, belongs to the child before it, if there is one.
    first: Bounds,
    node: Box<Node<T>>,
}

/// In this order, so that what a look-up needs is in the first lines.
#[repr(C)]
enum Below<T> {
    /// In no order.
    Items(Vec<T>),
    Nodes {
        /// In the node itself, so that they come with it.
        nodes: SmallVec<[Box<Node<T>>; MOST]>,
        /// A look-up does not need the marks between them.
        firsts: Vec<Bounds>,
    },
}

#[repr(C)]
struct Node<T> {
    edges: Edges,
    /// Which items have exact boxes, a bit each.
    exact: u16,
    below: Below<T>,
}

/// See the module.
pub(crate) struct Tree<T> {
    root: Option<Box<Node<T>>>,
    /// How many nodes are above one with items.
    height: usize,
    len: usize,
}

impl<T> Tree<T> {
    pub(crate) const fn new() -> Self {
        Self {
            root: None,
            height: 0,
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn insert(&mut self, bounds: Bounds, item: T) {
        self.len += 1;
        let root = self.root.get_or_insert_with(|| Box::new(Node::leaf()));
        if let Some(other) = root.insert(&bounds, item)
            && let Some(node) = self.root.take()
        {
            // Nothing is before the first child, whatever its mark says.
            let first = Bounds::ALL;
            let children = [Child { first, node }, other];
            let children = children.map(|child| (child.node.bounds(), child));
            self.root = Some(Box::new(Node::inner(children.into_iter().collect())));
            self.height += 1;
        }
    }

    /// The items whose boxes meet `bounds`, each with whether both are exact, so that the regions have an
    /// index in common. They are on their way from memory.
    #[inline]
    pub(crate) fn find(&self, bounds: &Bounds) -> Finds<'_, T> {
        let mut found = Finds::new();
        let Some(root) = &self.root else {
            return found;
        };
        // Level by level: what of the next one is looked at comes from memory at once.
        let mut queue: SmallVec<[&Node<T>; 32]> = SmallVec::new();
        queue.push(root);
        let axes = bounds.axes().last().map_or(0, |axis| axis + 1);
        let (mut at, mut end, mut height) = (0, 1, self.height);
        while let Some(&node) = queue.get(at) {
            at += 1;
            let children = node.edges.meeting(bounds, node.len());
            match &node.below {
                Below::Items(items) => {
                    let exact = if bounds.exact { node.exact } else { 0 };
                    for child in children {
                        fetch(&raw const items[child]);
                        found.push((&items[child], exact & 1 << child != 0));
                    }
                }
                Below::Nodes { nodes, .. } => {
                    for child in children {
                        nodes[child].fetch(axes, height > 1);
                        queue.push(&nodes[child]);
                    }
                }
            }
            if at == end {
                // The last one of its level; below items there is none.
                end = queue.len();
                height = height.saturating_sub(1);
            }
        }
        found
    }

    /// Calls `f` with each item whose box meets `bounds`, and with whether both are exact.
    #[inline]
    pub(crate) fn visit<'a>(&'a self, bounds: &Bounds, f: &mut impl FnMut(&'a T, bool)) {
        for (item, exact) in self.find(bounds) {
            f(item, exact);
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
            self.height = 0;
        }
        while let Some(Node {
            below: Below::Nodes { nodes, .. },
            ..
        }) = self.root.as_deref_mut()
            && nodes.len() == 1
        {
            self.root = nodes.pop();
            self.height -= 1;
        }
    }
}

/// Items that were found, see [`Tree::find`].
pub(crate) type Finds<'a, T> = SmallVec<[(&'a T, bool); 8]>;

/// Children of a node that is made or split.
type Children<C> = SmallVec<[(Bounds, C); MOST + 1]>;

/// Takes the upper part out of too many children, which are in order by `first`.
fn halve<C>(children: &mut Children<C>, first: impl Fn(&(Bounds, C)) -> &Bounds) -> Children<C> {
    let height = |at: usize| first(&children[at - 1]).differ(first(&children[at])).0;
    let middle = children.len() / 2;
    let places = LEAST..=children.len() - LEAST;
    let best = places.max_by_key(|&at| (height(at), std::cmp::Reverse(at.abs_diff(middle))));
    children.drain(best.unwrap_or(middle)..).collect()
}

impl<T> Node<T> {
    const fn leaf() -> Self {
        Self {
            edges: Edges::new(),
            exact: 0,
            below: Below::Items(Vec::new()),
        }
    }

    fn of_items(items: Children<T>) -> Self {
        let (edges, exact) = Edges::of(&items);
        let mut list = Vec::with_capacity(MOST);
        list.extend(items.into_iter().map(|(_, item)| item));
        Self {
            edges,
            exact,
            below: Below::Items(list),
        }
    }

    fn inner(children: Children<Child<T>>) -> Self {
        let (edges, exact) = Edges::of(&children);
        let mut nodes = SmallVec::new();
        let mut firsts = Vec::with_capacity(MOST);
        for (_, Child { first, node }) in children {
            nodes.push(node);
            firsts.push(first);
        }
        Self {
            edges,
            exact,
            below: Below::Nodes { nodes, firsts },
        }
    }

    fn len(&self) -> usize {
        match &self.below {
            Below::Items(items) => items.len(),
            Below::Nodes { nodes, .. } => nodes.len(),
        }
    }

    /// Asks for what is looked at when children are looked for along so many axes.
    #[inline]
    fn fetch(&self, axes: usize, is_inner: bool) {
        for edges in self.edges.0[..axes].as_flattened() {
            fetch(edges);
        }
        let below = (&raw const self.exact).cast::<u8>();
        fetch(below);
        if is_inner {
            for line in 1..=MOST * size_of::<usize>() / LINE {
                fetch(below.wrapping_add(line * LINE));
            }
        }
    }

    /// Around what it has.
    fn bounds(&self) -> Bounds {
        (0..self.len()).fold(Bounds::NOTHING, |all, at| all.with(&self.edges.get(at)))
    }

    /// The box of an item.
    fn item(&self, at: usize) -> Bounds {
        Bounds {
            exact: self.exact & 1 << at != 0,
            ..self.edges.get(at)
        }
    }

    /// If the node was split, the upper half.
    fn insert(&mut self, bounds: &Bounds, item: T) -> Option<Child<T>> {
        let Self {
            edges,
            exact,
            below,
        } = self;
        match below {
            Below::Items(items) => {
                let at = items.len();
                if at < MOST {
                    edges.set(at, bounds);
                    *exact = *exact & !(1 << at) | u16::from(bounds.exact) << at;
                    items.push(item);
                    return None;
                }
                let items = std::mem::take(items).into_iter().enumerate();
                let mut items: Children<T> = items.map(|(at, it)| (self.item(at), it)).collect();
                items.push((*bounds, item));
                items.sort_unstable_by(|(one, _), (other, _)| one.differ(other).1);
                let upper = halve(&mut items, |(bounds, _)| bounds);
                *self = Self::of_items(items);
                Some(Child {
                    first: upper[0].0,
                    node: Box::new(Self::of_items(upper)),
                })
            }
            Below::Nodes { nodes, firsts } => {
                let after = firsts[1..].partition_point(|first| first.differ(bounds).1.is_le());
                let node = &mut nodes[after];
                let Some(other) = node.insert(bounds, item) else {
                    edges.grow(after, bounds);
                    return None;
                };
                edges.set(after, &node.bounds());
                let (at, len) = (after + 1, nodes.len());
                if len < MOST {
                    edges.shift(at..len, at + 1);
                    edges.set(at, &other.node.bounds());
                    nodes.insert(at, other.node);
                    firsts.insert(at, other.first);
                    return None;
                }
                let children = std::mem::take(nodes)
                    .into_iter()
                    .zip(std::mem::take(firsts));
                let children = children.enumerate().map(|(at, (node, first))| {
                    let child = Child { first, node };
                    (self.edges.get(at), child)
                });
                let mut nodes: Children<Child<T>> = children.collect();
                nodes.insert(at, (other.node.bounds(), other));
                let upper = halve(&mut nodes, |(_, child)| &child.first);
                *self = Self::inner(nodes);
                Some(Child {
                    first: upper[0].1.first,
                    node: Box::new(Self::inner(upper)),
                })
            }
        }
    }

    fn visit_mut(&mut self, bounds: &Bounds, f: &mut impl FnMut(&mut T)) {
        let found = self.edges.meeting(bounds, self.len());
        match &mut self.below {
            Below::Items(items) => found.for_each(|at| f(&mut items[at])),
            Below::Nodes { nodes, .. } => found.for_each(|at| nodes[at].visit_mut(bounds, f)),
        }
    }

    fn extract(
        &mut self,
        bounds: &Bounds,
        chosen: &mut impl FnMut(&T) -> bool,
        taken: &mut Vec<T>,
    ) {
        let found = self.edges.meeting(bounds, self.len());
        let Self {
            edges,
            exact,
            below,
        } = self;
        // From the last one on, since those behind one that goes move.
        for at in found.rev() {
            match below {
                Below::Items(items) => {
                    if chosen(&items[at]) {
                        taken.push(items.swap_remove(at));
                        let last = items.len();
                        edges.set(at, &edges.get(last));
                        *exact = *exact & !(1 << at) | (*exact >> last & 1) << at;
                    }
                }
                Below::Nodes { nodes, firsts } => {
                    let before = taken.len();
                    let node = &mut nodes[at];
                    node.extract(bounds, chosen, taken);
                    if taken.len() == before {
                        continue;
                    }
                    if node.len() == 0 {
                        edges.shift(at + 1..nodes.len(), at);
                        nodes.remove(at);
                        firsts.remove(at);
                    } else {
                        edges.set(at, &node.bounds());
                    }
                }
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::super::Span;
    use super::*;

    fn meet(one: &Bounds, other: &Bounds) -> bool {
        (0..AXES).all(|axis| one.low[axis] < other.high[axis] && other.low[axis] < one.high[axis])
    }

    fn bounds() -> impl Strategy<Value = Bounds> {
        let edge = (0..60, 1..12);
        [edge.clone(), edge.clone(), edge].prop_map(|edges| Bounds {
            low: edges.map(|(low, _)| low),
            high: edges.map(|(low, length)| low + length),
            exact: edges[0].0 % 2 == 0,
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

    /// Two regions of an array of so many axes, in places and with steps where they meet often.
    fn regions() -> impl Strategy<Value = [Region; 2]> {
        let span = (0..12_u64, 1..3_u64, 1..5_u64);
        let spans = span.prop_map(|(start, step, count)| Span::new(start, step, count));
        (1..=4_usize).prop_flat_map(move |axes| {
            let region = prop::collection::vec(spans.clone(), axes).prop_map(Region::new);
            [region.clone(), region]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn regions_meet_where_exact_boxes_do_and_only_where_others_do(
            regions in regions(),
            is_long in any::<bool>(),
        ) {
            let [one, other] = &regions;
            let extent = if is_long { 1 << 40 } else { 20 };
            let axes = Axes::longest(&vec![extent; one.spans().len()]);
            let (own, its) = (Bounds::of(one, &axes), Bounds::of(other, &axes));
            let meets = meet(&own, &its);
            prop_assert!(meets || !one.overlaps(other));
            if own.exact && its.exact {
                prop_assert_eq!(meets, one.overlaps(other));
            }
            let is_plain = |it: &Region| it.spans().iter().all(|span| span.step() == 1);
            prop_assert_eq!(own.exact, is_plain(one) && !is_long && one.spans().len() <= AXES);
        }
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
                        tree.visit(&bounds, &mut |item, exact| {
                            let own = list.iter().find(|(_, other)| other == item);
                            assert_eq!(exact, bounds.exact && own.unwrap().0.exact);
                            found.push(*item);
                        });
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
