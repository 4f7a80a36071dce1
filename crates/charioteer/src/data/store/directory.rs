//! Who has which elements of one array.
//!
//! # Pieces
//!
//! *Pieces* are disjoint regions that make up the array, each with its *holders*: instances in which its
//! elements are valid. At first there is one, which the host holds. An access cuts pieces that it overlaps
//! in part; a write makes one piece of what it wrote, and a read does so when all that it read has the
//! same holders afterwards. So arrays that are used by tiles come to have one piece a tile.
//!
//! # Frames
//!
//! A *frame* is a box that tasks want: an instance has the elements of one. It knows the instances with
//! its box, the tasks that will want it, and the frames that overlap it. It also remembers the piece that
//! was last asked for: as long as all accesses are to tiles of one grid, to find the frame is one hash
//! look-up, and nothing else is searched.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Weak;

use smallvec::SmallVec;

use super::events::Events;
use super::instance::{HOME, Instance};
use super::slab::Slab;
use super::storage::Storage;
use crate::hash::{QuickMap, mix};
use crate::machine::DeviceId;
use crate::region::tree::{Axes, Bounds, Tree};
use crate::region::{Region, Span};

/// An instance that has a piece's elements.
#[derive(Clone, Debug)]
pub(super) struct Holder {
    pub(super) at: u32,
    /// Behind these they are there.
    pub(super) ready: Events,
}

#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) region: Region,
    pub(super) holders: SmallVec<[Holder; 2]>,
    /// Copies from and to these elements of the host's buffer, other than those that it holds them behind.
    pub(super) home: Events,
    /// Who uses these elements of adopted memory, other than those that it holds them behind.
    pub(super) own: Events,
    /// Why nobody holds them, if nobody does.
    pub(super) lost: Option<Lost>,
}

/// Why nobody has some elements any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// The device was lost that had them alone.
    Device(DeviceId),
    /// The copy failed that was to have them alone. The device on whose stream it was is as it was.
    Copy(DeviceId),
}

impl Piece {
    pub(super) fn holder(&self, at: u32) -> Option<&Holder> {
        self.holders.iter().find(|holder| holder.at == at)
    }

    /// The same instances hold both.
    fn is_like(&self, other: &Self) -> bool {
        self.holders.len() == other.holders.len()
            && self.lost == other.lost
            && self.holders.iter().all(|it| other.holder(it.at).is_some())
    }
}

/// The numbers of pieces.
pub(super) type Numbers = SmallVec<[u32; 4]>;

pub(super) struct Frame {
    pub(super) region: Region,
    pub(super) instances: SmallVec<[(DeviceId, u32); 2]>,
    /// Numbers of tasks that will want it, in order.
    pub(super) wanted: VecDeque<u64>,
    /// How many wants of tasks that hold adopted memory have it: what they hold has the array's own frame.
    pub(super) pins: u32,
    /// The other frames that overlap it.
    pub(super) neighbours: Vec<u32>,
    /// The piece that was last found for it.
    piece: u32,
    /// The next frame with the same digest.
    next: u32,
}

const NONE: u32 = u32::MAX;

impl Frame {
    #[inline]
    pub(super) fn instance(&self, device: DeviceId) -> Option<u32> {
        let mut instances = self.instances.iter();
        instances.find(|(on, _)| *on == device).map(|(_, at)| *at)
    }
}

/// See the module.
pub(super) struct Directory {
    pub(super) storage: u64,
    pub(super) owner: Option<Weak<dyn Any + Send + Sync>>,
    pub(super) label: Box<str>,
    pub(super) item: u64,
    /// Where the host's buffer begins, and how elements lie there.
    pub(super) address: u64,
    pub(super) strides: SmallVec<[u64; 4]>,
    pub(super) whole: Region,
    /// The instance that is memory which the array brought along, if that is still there.
    pub(super) own: Option<u32>,
    /// Whether it brought such memory along.
    pub(super) adopts: bool,
    axes: Axes,
    pub(super) pieces: Slab<Piece>,
    tree: Tree<u32>,
    pub(super) frames: Slab<Frame>,
    /// The first frame of each digest.
    names: QuickMap<u64, u32>,
    frame_tree: Tree<u32>,
}

impl Directory {
    pub(super) fn new(storage: &Storage) -> Self {
        let shape: SmallVec<[u64; 4]> = storage.whole.spans().iter().map(Span::count).collect();
        let mut directory = Self {
            storage: storage.id,
            owner: storage.owner(),
            label: storage.label.clone(),
            item: storage.item,
            address: storage.address,
            strides: storage.strides.clone(),
            whole: storage.whole.clone(),
            own: None,
            adopts: storage.adopted.is_some(),
            axes: Axes::longest(&shape),
            pieces: Slab::new(),
            tree: Tree::new(),
            frames: Slab::new(),
            names: QuickMap::default(),
            frame_tree: Tree::new(),
        };
        if !storage.whole.is_empty() {
            let holder = Holder {
                at: HOME,
                ready: Events::new(),
            };
            directory.insert(Piece {
                region: storage.whole.clone(),
                holders: SmallVec::from_iter([holder]),
                home: Events::new(),
                own: Events::new(),
                lost: None,
            });
        }
        directory
    }

    fn bounds(&self, region: &Region) -> Bounds {
        Bounds::of(region, &self.axes)
    }

    pub(super) fn bytes(&self, region: &Region) -> u64 {
        region.elements() * self.item
    }

    fn insert(&mut self, piece: Piece) -> u32 {
        let bounds = self.bounds(&piece.region);
        let number = self.pieces.insert(piece);
        self.tree.insert(bounds, number);
        number
    }

    fn remove(&mut self, number: u32) -> Piece {
        let piece = self.pieces.remove(number);
        let bounds = self.bounds(&piece.region);
        let mut taken = Vec::new();
        self.tree
            .extract(Some(&bounds), &mut |it| *it == number, &mut taken);
        debug_assert_eq!(taken, [number]);
        piece
    }

    /// The pieces that overlap the region.
    pub(super) fn overlapping(&self, region: &Region) -> Numbers {
        let mut found = Numbers::new();
        if region.is_empty() {
            return found;
        }
        self.tree.visit(&self.bounds(region), &mut |&number, _| {
            if self.pieces[number].region.overlaps(region) {
                found.push(number);
            }
        });
        found
    }

    /// The pieces that make up the region, whose frame is given if it is known: those that overlap it in
    /// part are cut.
    #[inline]
    pub(super) fn cover(
        &mut self,
        region: &Region,
        frame: Option<u32>,
        instances: &mut Slab<Instance>,
    ) -> Numbers {
        if let Some(frame) = frame {
            let known = self.frames[frame].piece;
            if let Some(piece) = self.pieces.get(known)
                && piece.region == *region
            {
                return Numbers::from_slice(&[known]);
            }
        }
        let found = self.cut(region, instances);
        if let [number] = *found {
            self.remember(frame, number);
        }
        found
    }

    fn cut(&mut self, region: &Region, instances: &mut Slab<Instance>) -> Numbers {
        let mut found = self.overlapping(region);
        for number in &mut found {
            if region.contains(&self.pieces[*number].region) {
                continue;
            }
            let piece = self.remove(*number);
            for rest in piece.region.difference(region) {
                for holder in piece.holders.iter().filter(|holder| holder.at != HOME) {
                    instances[holder.at].valid += 1;
                }
                self.insert(Piece {
                    region: rest,
                    ..piece.clone()
                });
            }
            *number = self.insert(Piece {
                region: piece.region.intersection(region),
                ..piece
            });
        }
        found
    }

    /// Makes one piece of those that make up the region, if the same instances hold them all.
    pub(super) fn merge(
        &mut self,
        region: &Region,
        numbers: &[u32],
        frame: Option<u32>,
        instances: &mut Slab<Instance>,
    ) {
        let [first, rest @ ..] = numbers else { return };
        let like = |number: &u32| self.pieces[*first].is_like(&self.pieces[*number]);
        if rest.is_empty() || !rest.iter().all(like) {
            return;
        }
        let mut whole = self.remove(*first);
        for number in rest {
            let piece = self.remove(*number);
            whole.home.join(&piece.home);
            whole.own.join(&piece.own);
            for holder in piece.holders {
                let mut known = whole.holders.iter_mut();
                if let Some(known) = known.find(|known| known.at == holder.at) {
                    known.ready.join(&holder.ready);
                }
                if holder.at != HOME {
                    instances[holder.at].valid -= 1;
                }
            }
        }
        whole.region = region.clone();
        let number = self.insert(whole);
        self.remember(frame, number);
    }

    /// The piece that makes up the region of a want, if it is the one that was last found.
    #[inline]
    pub(super) fn exact(&self, frame: u32, region: Option<&Region>) -> Option<(u32, &Piece)> {
        let frame = &self.frames[frame];
        let piece = self.pieces.get(frame.piece)?;
        (piece.region == *region.unwrap_or(&frame.region)).then_some((frame.piece, piece))
    }

    /// Makes one piece without holders of the region. Whoever held it calls `gone` for each of theirs.
    pub(super) fn claim(
        &mut self,
        region: &Region,
        frame: Option<u32>,
        instances: &mut Slab<Instance>,
        mut gone: impl FnMut(&mut Slab<Instance>, Holder),
    ) -> u32 {
        let numbers = self.cover(region, frame, instances);
        let (mut home, mut own) = (Events::new(), Events::new());
        let adopted = self.own;
        let mut clear = |piece: &mut Piece| {
            for holder in std::mem::take(&mut piece.holders) {
                if holder.at == HOME {
                    home.join(&holder.ready);
                    continue;
                }
                if Some(holder.at) == adopted {
                    own.join(&holder.ready);
                }
                gone(instances, holder);
            }
            home.join(&piece.home);
            own.join(&piece.own);
        };
        let number = if let [number] = *numbers {
            clear(&mut self.pieces[number]);
            (self.pieces[number].home, self.pieces[number].own) = (home, own);
            number
        } else {
            for number in &numbers {
                let mut piece = self.remove(*number);
                clear(&mut piece);
            }
            self.insert(Piece {
                region: region.clone(),
                holders: SmallVec::new(),
                home,
                own,
                lost: None,
            })
        };
        self.pieces[number].lost = None;
        self.remember(frame, number);
        number
    }

    /// The piece that another member wrote, if it is of just this region. `written`: pieces with the numbers
    /// of their directories; this one is `own`.
    pub(super) fn written_alike(
        &self,
        own: u32,
        region: &Region,
        written: &[(u32, u32)],
    ) -> Option<u32> {
        // What is written later may have cut it, but then it is not equal.
        let is_alike = |&(of, piece): &(u32, u32)| {
            let piece = self.pieces.get(piece);
            of == own && piece.is_some_and(|piece| piece.region == *region)
        };
        let alike = written.iter().copied().find(is_alike);
        alike.map(|(_, piece)| piece)
    }

    fn remember(&mut self, frame: Option<u32>, piece: u32) {
        if let Some(frame) = frame {
            self.frames[frame].piece = piece;
        }
    }

    /// The frame of a box, if there is one.
    #[inline]
    pub(super) fn find(&self, region: &Region) -> Option<u32> {
        let mut frame = *self.names.get(&digest(region))?;
        loop {
            let known = &self.frames[frame];
            if known.region == *region {
                return Some(frame);
            }
            frame = known.next;
            if frame == NONE {
                return None;
            }
        }
    }

    /// The frame of a box.
    #[inline]
    pub(super) fn frame(&mut self, region: &Region) -> u32 {
        match self.find(region) {
            Some(frame) => frame,
            None => self.add_frame(region),
        }
    }

    #[cold]
    fn add_frame(&mut self, region: &Region) -> u32 {
        let bounds = self.bounds(region);
        let neighbours = self.frames_at(region);
        let frame = self.frames.insert(Frame {
            region: region.clone(),
            instances: SmallVec::new(),
            wanted: VecDeque::new(),
            pins: 0,
            neighbours: neighbours.clone(),
            piece: NONE,
            next: NONE,
        });
        for neighbour in neighbours {
            self.frames[neighbour].neighbours.push(frame);
        }
        self.frame_tree.insert(bounds, frame);
        if let Some(next) = self.names.insert(digest(region), frame) {
            self.frames[frame].next = next;
        }
        frame
    }

    /// The frames that overlap the region.
    pub(super) fn frames_at(&self, region: &Region) -> Vec<u32> {
        let mut found = Vec::new();
        if !region.is_empty() {
            self.frame_tree
                .visit(&self.bounds(region), &mut |&frame, _| {
                    if self.frames[frame].region.overlaps(region) {
                        found.push(frame);
                    }
                });
        }
        found
    }

    /// Forgets the frame if nobody has or wants its box.
    pub(super) fn tidy(&mut self, frame: u32) {
        let known = &self.frames[frame];
        if !known.instances.is_empty() || !known.wanted.is_empty() || known.pins > 0 {
            return;
        }
        let known = self.frames.remove(frame);
        for neighbour in known.neighbours {
            let others = &mut self.frames[neighbour].neighbours;
            others.retain(|other| *other != frame);
        }
        let bounds = self.bounds(&known.region);
        let mut taken = Vec::new();
        (self.frame_tree).extract(Some(&bounds), &mut |it| *it == frame, &mut taken);
        let name = digest(&known.region);
        match self.names.get(&name) {
            Some(&first) if first != frame => {
                let mut before = first;
                while self.frames[before].next != frame {
                    before = self.frames[before].next;
                }
                self.frames[before].next = known.next;
            }
            _ if known.next != NONE => drop(self.names.insert(name, known.next)),
            _ => drop(self.names.remove(&name)),
        }
    }

    /// The number of the task that wants any of the frame's elements next.
    pub(super) fn next_use(&self, frame: u32) -> Option<u64> {
        let known = &self.frames[frame];
        let neighbours = known.neighbours.iter().map(|other| &self.frames[*other]);
        neighbours
            .chain([known])
            .filter_map(|frame| frame.wanted.front().copied())
            .min()
    }
}

/// Few regions that make up the same elements as these, which are disjoint and parts of `whole`.
pub(super) fn coalesce(mut regions: Vec<Region>, whole: &Region) -> Vec<Region> {
    if regions.len() <= 1 {
        return regions;
    }
    let elements: u64 = regions.iter().map(Region::elements).sum();
    if elements == whole.elements() {
        return vec![whole.clone()];
    }
    for axis in (0..whole.spans().len()).rev() {
        // Those that differ along this axis alone are neighbours.
        regions.sort_unstable_by_key(|region| {
            let key = |span: &Span| (span.start(), span.step(), span.count());
            let others = region.spans().iter().enumerate();
            let others = others.filter(|(other, _)| *other != axis);
            let others: SmallVec<[_; 4]> = others.map(|(_, span)| key(span)).collect();
            (others, region.spans()[axis].start())
        });
        regions.dedup_by(|next, region| match append(region, next, axis) {
            Some(both) => {
                *region = both;
                true
            }
            None => false,
        });
    }
    regions
}

/// The two as one region, if the second goes on where the first ends along the axis.
fn append(first: &Region, second: &Region, axis: usize) -> Option<Region> {
    let mut pairs = first.spans().iter().zip(second.spans()).enumerate();
    if !pairs.all(|(other, (a, b))| other == axis || a == b) {
        return None;
    }
    let (a, b) = (first.spans()[axis], second.spans()[axis]);
    let step = match (a.count(), b.count()) {
        (1, 1) => b.start().checked_sub(a.start())?,
        (1, _) => b.step(),
        (_, 1) => a.step(),
        _ if a.step() == b.step() => a.step(),
        _ => return None,
    };
    if step == 0 || a.start() + a.count() * step != b.start() {
        return None;
    }
    let mut spans: SmallVec<[Span; 4]> = first.spans().into();
    spans[axis] = Span::new(a.start(), step, a.count() + b.count());
    Some(Region::new(spans))
}

/// Tells most boxes apart.
fn digest(region: &Region) -> u64 {
    let spans = region.spans().iter();
    spans.fold(0, |digest, span| {
        mix(mix(digest, span.start()), span.count())
    })
}
