"""Sample sort: an array is sorted by tasks on its shards.

Shards are sorted in place and give samples. The samples give splitters, and these say how many
numbers of each shard belong to each bucket. When those counts are known, the buckets are: the
program waits for them, as for any array, and spawns a task a bucket, which collects its piece of
every shard into its region of the result.

    pip install charioteer
    python examples/apps/sample_sort.py

The exit status is 1 if NumPy sorts otherwise.
"""

import argparse
import sys
import time
from collections.abc import Sequence

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
    A, result = ch.array(numbers), ch.empty(len(numbers))
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
    return np.asarray(result.numpy())


def main(arguments: Sequence[str] | None = None) -> int:
    """Sort random numbers, and compare with NumPy."""
    parser = argparse.ArgumentParser(description="sample sort")
    parser.add_argument("--count", type=int, default=1_000_000, help="how many numbers")
    parser.add_argument("--buckets", type=int, default=8, help="shards, and buckets")
    parser.add_argument("--machine", help="virtual:4, or a machine file; else what is found")
    options = parser.parse_args(arguments)

    numbers = np.random.default_rng(0).standard_normal(options.count)
    with ch.Runtime(options.machine):
        start = time.perf_counter()
        ordered = sample_sort(numbers, options.buckets)
        seconds = time.perf_counter() - start
    right = bool(np.array_equal(ordered, np.sort(numbers)))
    print(f"{options.count} numbers: {1e3 * seconds:.0f} ms, {'in' if right else 'out of'} order")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
