"""Sample sort: an array is sorted by tasks on its shards.

Shards are sorted in place and give samples. The samples give splitters, and these say how many
numbers of each shard belong to each bucket. When those counts are known, the buckets are: the
program waits for them, as for any array, and spawns a task a bucket, which collects its piece of
every shard into its region of the result.

    pip install charioteer
    python examples/apps/sample_sort.py

The exit status is 1 if NumPy sorts otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import application
import numpy as np
import numpy.typing as npt

import charioteer as ch
from charioteer import cpu, gpu

Numbers = npt.NDArray[np.float64]
Counts = npt.NDArray[np.intp]


@ch.task(placement=[gpu, cpu])
def sort(part: ch.InOut[Numbers], samples: ch.Out[Numbers]) -> None:
    """Sort a shard, and take samples of it at equal distances."""
    part.sort()
    samples[...] = part[np.linspace(0, len(part) - 1, len(samples)).astype(int)]


@ch.task(placement=[gpu, cpu])
def split(samples: ch.In[Numbers], splitters: ch.Out[Numbers]) -> None:
    """Splitters that leave about as many samples in each bucket."""
    every = np.sort(samples.reshape(-1))
    splitters[...] = every[np.linspace(0, len(every), len(splitters) + 2).astype(int)[1:-1]]


@ch.task(placement=[gpu, cpu])
def cut(part: ch.In[Numbers], splitters: ch.In[Numbers], cuts: ch.Out[Counts]) -> None:
    """Where in a sorted shard each bucket begins, and where the last one ends."""
    cuts[0], cuts[-1] = 0, len(part)
    cuts[1:-1] = np.searchsorted(part, splitters)


@ch.task(placement=[gpu, cpu])
def collect(pieces: ch.In[list[Numbers]], bucket: ch.Out[Numbers]) -> None:
    """Sort what the shards have of a bucket."""
    np.concatenate(pieces, out=bucket)
    bucket.sort()


def sample_sort(numbers: Numbers, buckets: int) -> Numbers:
    """The numbers in order."""
    A, ordered = ch.array(numbers), np.empty(len(numbers))
    result = ch.asarray(ordered)
    samples, splitters = ch.empty((buckets, 8 * buckets)), ch.empty(buckets - 1)
    cuts = ch.empty((buckets, buckets + 1), np.intp)
    shards = A.shards(buckets)
    for shard, few in zip(shards, samples, strict=True):
        sort(shard, few)
    split(samples, splitters)
    for shard, where in zip(shards, cuts, strict=True):
        cut(shard, splitters, where)

    begins, start = cuts.numpy(), 0
    for bucket in range(buckets):
        pieces = [
            shard[begin[bucket] : begin[bucket + 1]]
            for shard, begin in zip(shards, begins, strict=True)
        ]
        stop = start + sum(piece.size for piece in pieces)
        collect(pieces, result[start:stop])
        start = stop
    result.release()  # waits for the buckets, and gives the memory back
    return ordered


SIZES = {
    "tiny": (2_000, 4),
    "small": (200_000, 8),
    "medium": (2_000_000, 8),
    "large": (16_000_000, 16),
}
"""Numbers, and buckets."""


@dataclass
class Problem:
    """Numbers in any order, and in how many shards and buckets they are sorted."""

    numbers: Numbers
    buckets: int

    @cached_property
    def right(self) -> Numbers:
        """The numbers as NumPy's sort has them."""
        return np.sort(self.numbers)


def problem(count: int, buckets: int) -> Problem:
    """Numbers at random."""
    return Problem(np.random.default_rng(0).standard_normal(count), buckets)


def tasks(given: Problem, gpus: int = 0) -> Numbers:
    """The numbers in order."""
    return sample_sort(given.numbers, given.buckets)


def by_hand(given: Problem, every: application.Every) -> Numbers:
    """The same with plain NumPy; ``every`` calls a function with each number."""
    buckets = range(given.buckets)
    shards = np.array_split(given.numbers.copy(), given.buckets)
    samples = np.empty((given.buckets, 8 * given.buckets))
    cuts = np.empty((given.buckets, given.buckets + 1), np.intp)
    splitters = np.empty(given.buckets - 1)
    every(lambda at: sort.fn(shards[at], samples[at]), buckets)
    split.fn(samples, splitters)
    every(lambda at: cut.fn(shards[at], splitters, cuts[at]), buckets)
    stops = np.cumsum(np.diff(cuts, axis=1).sum(axis=0))
    result = np.empty_like(given.numbers)

    def gather(bucket: int) -> None:
        pieces = [
            shard[begin[bucket] : begin[bucket + 1]]
            for shard, begin in zip(shards, cuts, strict=True)
        ]
        stop = stops[bucket]
        collect.fn(pieces, result[stop - sum(map(len, pieces)) : stop])

    every(gather, buckets)
    return result


def serially(given: Problem) -> Numbers:
    """One shard after the other."""
    return by_hand(given, application.in_turn)


def threads(given: Problem, workers: int) -> Numbers:
    """Shards, then buckets, on threads by hand."""
    with application.side_by_side(workers) as every:
        return by_hand(given, every)


def error(found: Numbers, given: Problem) -> float:
    """How many numbers are not where NumPy's sort has them."""
    return float((found != given.right).sum())


LIMIT = 0.0
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (sort.fn, split.fn, cut.fn, collect.fn, sample_sort)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ("sort", "split", "cut", "collect")
"""What may run on cores or on GPUs."""


if __name__ == "__main__":
    sys.exit(application.main(sys.modules[__name__]))
