//! Parts of arrays for random programs: what they are, how they are drawn, and what excludes what.

use std::collections::BTreeSet;
use std::sync::Arc;

use charioteer::native::{Datum, Grid, Mode, Part};
use charioteer::region::{Region, Span};
use proptest::prelude::*;

pub const SHAPE: [u64; 2] = [12, 10];
pub const ELEMENTS: usize = 120;
pub const TILES: [[u64; 2]; 2] = [[4, 5], [3, 3]];

#[derive(Clone, Debug)]
pub enum Where {
    Whole,
    /// Of which grid, and which tile.
    Tile(usize, [u64; 2]),
    Spans([Span; 2]),
}

#[derive(Clone, Debug)]
pub struct Use {
    pub array: usize,
    pub at: Where,
    pub mode: Mode,
    pub ordered: bool,
}

fn span(extent: u64) -> impl Strategy<Value = Span> {
    (0..extent, 1..4_u64, 0..7_u64).prop_map(move |(start, step, count)| {
        Span::new(start, step, count.min((extent - 1 - start) / step + 1))
    })
}

/// `kinds`: which sorts of parts there are, so that some programs have tiles of one grid alone.
pub fn place(kinds: u32) -> impl Strategy<Value = Where> {
    (0..4_u32, 0..4_u64, 0..4_u64, span(SHAPE[0]), span(SHAPE[1])).prop_map(
        move |(kind, i, j, rows, columns)| {
            let tile = |grid: usize| {
                let [height, width] = TILES[grid];
                let count = [SHAPE[0].div_ceil(height), SHAPE[1].div_ceil(width)];
                Where::Tile(grid, [i % count[0], j % count[1]])
            };
            match kind % kinds {
                0 => tile(0),
                1 if i == 0 && j < 2 => Where::Whole,
                1 => tile(0),
                2 => tile(1),
                _ => Where::Spans([rows, columns]),
            }
        },
    )
}

/// An array with its grids.
pub struct Gridded {
    pub datum: Arc<Datum>,
    grids: [Grid; 2],
}

impl Gridded {
    pub fn new(datum: Arc<Datum>) -> Self {
        let grids = TILES.map(|tile| datum.grid(&tile));
        Self { datum, grids }
    }

    pub fn part(&self, at: &Where) -> Part {
        match at {
            Where::Whole => self.datum.whole(),
            Where::Tile(grid, index) => self.grids[*grid].tile(index),
            Where::Spans(spans) => self.datum.part(Region::new(*spans)),
        }
    }
}

/// Whether two accesses of one task, each with its array and elements, make no sense.
pub fn exclude_each_other<'a, E: Copy + Ord + 'a>(
    accesses: impl IntoIterator<Item = (Mode, usize, &'a [E])>,
) -> bool {
    let accesses: Vec<(Mode, BTreeSet<_>)> = accesses
        .into_iter()
        .map(|(mode, array, elements)| {
            let elements = elements.iter().map(|&element| (array, element));
            (mode, elements.collect())
        })
        .collect();
    (0..accesses.len()).any(|first| {
        (first + 1..accesses.len()).any(|second| {
            let modes = (accesses[first].0, accesses[second].0);
            let fine = matches!(
                modes,
                (Mode::In, Mode::In | Mode::Out | Mode::InOut)
                    | (Mode::Out | Mode::InOut, Mode::In)
            );
            !fine && !accesses[first].1.is_disjoint(&accesses[second].1)
        })
    })
}
