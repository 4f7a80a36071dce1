"""TSQR: the triangular factor of a tall matrix, by a tree of small factorizations.

Shards of rows are factored side by side. Then pairs of triangles are stacked and factored again,
until one is left. The triangles lie in one array; which task waits for which follows from the rows
of it that they read and write.

    pip install charioteer
    python examples/apps/tsqr.py

The exit status is 1 if NumPy gives another factor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import application
import numpy as np
import numpy.typing as npt

import charioteer as ch
from charioteer import cpu, gpu

Matrix = npt.NDArray[np.float64]

SIZES = {
    "tiny": (300, 5, 5),
    "small": (20_000, 16, 8),
    "medium": (100_000, 32, 8),
    "large": (400_000, 64, 128),
}
"""Rows, columns, shards."""


@dataclass
class Problem:
    """A matrix with many more rows than columns, and in how many shards it is factored."""

    matrix: Matrix
    shards: int

    @cached_property
    def right(self) -> Matrix:
        """The factor by NumPy, of the whole matrix."""
        return np.asarray(triangle(self.matrix))


def problem(rows: int, columns: int, shards: int) -> Problem:
    """A matrix at random."""
    return Problem(np.random.default_rng(0).standard_normal((rows, columns)), shards)


def triangle(matrix: Any) -> Any:
    """The triangular factor with a diagonal that is not negative, which makes it the only one."""
    r = np.linalg.qr(matrix, mode="r")
    return r * np.where(np.diag(r) < 0, -1.0, 1.0)[:, None]


@ch.task(placement=[gpu, cpu])
def factor(rows: ch.In[Matrix], r: ch.Out[Matrix]) -> None:
    """Factor some rows."""
    r[...] = triangle(rows)


@ch.task(placement=[gpu, cpu])
def merge(r: ch.InOut[Matrix], other: ch.In[Matrix]) -> None:
    """Factor two triangles, one on top of the other."""
    r[...] = triangle(np.vstack([r, other]))


def tasks(given: Problem, gpus: int = 0) -> Matrix:
    """The triangular factor."""
    columns, shards = given.matrix.shape[1], given.shards
    A, R = ch.asarray(given.matrix), ch.empty((shards, columns, columns))
    for rows, r in zip(A.shards(shards), R, strict=True):
        factor(rows, r)
    step = 1
    while step < shards:
        for i in range(0, shards - step, 2 * step):
            merge(R[i], R[i + step])
        step *= 2
    return np.asarray(R[0].numpy())


def by_hand(given: Problem, every: application.Every) -> Matrix:
    """The same with plain NumPy; ``every`` calls a function with each number."""
    shards = np.array_split(given.matrix, given.shards)
    found = every(lambda at: triangle(shards[at]), range(len(shards)))
    while len(found) > 1:
        pairs = [found[at : at + 2] for at in range(0, len(found), 2)]

        def pair(at: int, pairs: list[list[Matrix]] = pairs) -> Matrix:
            return (
                np.asarray(triangle(np.vstack(pairs[at]))) if len(pairs[at]) > 1 else pairs[at][0]
            )

        found = every(pair, range(len(pairs)))
    return np.asarray(found[0])


def serially(given: Problem) -> Matrix:
    """One shard after the other."""
    return by_hand(given, application.in_turn)


def threads(given: Problem, workers: int) -> Matrix:
    """Shards, then pairs of triangles, on threads by hand."""
    with application.side_by_side(workers) as every:
        return by_hand(given, every)


def error(found: Matrix, given: Problem) -> float:
    """How far the factor is from NumPy's of the whole matrix, relatively."""
    return float(np.abs(found - given.right).max() / np.abs(given.right).max())


LIMIT = 1e-12
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (triangle, factor.fn, merge.fn, tasks)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ("factor", "merge")
"""What may run on cores or on GPUs."""


if __name__ == "__main__":
    sys.exit(application.main(sys.modules[__name__]))
