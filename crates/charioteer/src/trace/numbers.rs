//! Numbers of tasks and threads.
//!
//! Maps by the number of a task are walked in the order of a trace, where tasks with near numbers stand
//! near each other. So their [hash](Near) keeps near what is: of a block of numbers all buckets are
//! neighbours, and blocks are anywhere.

use std::cell::Cell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// How many task numbers a thread takes at a time.
const BLOCK: u64 = 1024;

static NEXT: AtomicU64 = AtomicU64::new(1);
static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static LEFT: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    static THREAD: Cell<usize> = const { Cell::new(usize::MAX) };
}

#[inline]
pub(crate) fn next_id() -> u64 {
    LEFT.with(|left| {
        let (mut next, mut end) = left.get();
        if next == end {
            next = NEXT.fetch_add(BLOCK, Ordering::Relaxed);
            end = next + BLOCK;
        }
        left.set((next + 1, end));
        next
    })
}

#[inline]
pub(crate) fn thread_number() -> usize {
    THREAD.with(|thread| {
        let mut number = thread.get();
        if number == usize::MAX {
            number = THREADS.fetch_add(1, Ordering::Relaxed);
            thread.set(number);
        }
        number
    })
}

/// A map by the numbers of tasks, or others that come in blocks.
pub(super) type ByNumber<T> = HashMap<u64, T, BuildHasherDefault<Near>>;

/// The hash of a number, or of some; see the module.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Near(u64);

/// An odd number with as many ones as zeros: 2^64 divided by the golden ratio.
const MIX: u64 = 0x9E37_79B9_7F4A_7C15;

impl Hasher for Near {
    #[inline]
    fn write_u64(&mut self, number: u64) {
        let number = self.0.rotate_left(23).wrapping_mul(MIX) ^ number;
        let block = (number / BLOCK).wrapping_mul(MIX).rotate_left(32);
        // The map takes the bucket from the low bits, and tells neighbours apart by the highest.
        let tag = number.wrapping_mul(MIX) >> 57 << 57;
        self.0 = block.wrapping_add(number) ^ tag;
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::HashSet;
    use std::hash::{BuildHasher, BuildHasherDefault};

    use super::*;

    fn hash(number: u64) -> u64 {
        BuildHasherDefault::<Near>::default().hash_one(number)
    }

    #[test]
    fn numbers_of_a_block_are_neighbours_and_blocks_are_anywhere() {
        let buckets = 1 << 16;
        for number in (0..BLOCK - 1).chain(7 * BLOCK..8 * BLOCK - 1) {
            let next = (hash(number) + 1) % buckets;
            assert_eq!(hash(number + 1) % buckets, next, "{number}");
        }
        // A group of 16 neighbours is told apart by the highest bits.
        let tags: HashSet<u64> = (0..16).map(|number| hash(number) >> 57).collect();
        assert!(tags.len() >= 14, "{tags:?}");
        let apart: HashSet<u64> = (0..buckets / 4)
            .map(|block| hash(block * BLOCK) % buckets)
            .collect();
        assert!(apart.len() as u64 > buckets / 8, "{}", apart.len());
    }
}
