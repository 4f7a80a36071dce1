"""A matrix-vector product with a block low-rank matrix, for many vectors at once.

The matrix has the values of a smooth kernel between points on a line. A block off the diagonal is
nearly of low rank and is kept as two thin factors; those on it are dense. A task multiplies one
block. All blocks of a row add to the same part of the result: it is a reduction, so they run side
by side, and the runtime adds up what they made.

    pip install charioteer
    python examples/apps/block_low_rank.py

The exit status is 1 if the product differs from that with the dense matrix, in some rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import application
import numpy as np
import numpy.typing as npt

import charioteer as ch
from charioteer import cpu, gpu

Array = npt.NDArray[np.float64]

SIZES = {
    "tiny": (192, 64, 3),
    "small": (1024, 128, 8),
    "medium": (4096, 512, 64),
    "large": (8192, 512, 1024),
}
"""Rows, rows of a block, vectors."""
TOLERANCE = 1e-6
"""What the singular values that are left out may be, relative to the largest of their block."""


@dataclass
class Problem:
    """A matrix in blocks: dense ones, or pairs of factors; and the vectors."""

    points: Array
    blocks: dict[tuple[int, int], Array | tuple[Array, Array]]
    vectors: Array
    block: int


def kernel(one: Array, other: Array) -> Array:
    """The matrix's values between two sets of points."""
    return np.asarray(1.0 / (1.0 + 50.0 * np.abs(one[:, None] - other[None, :])))


def problem(rows: int, block: int, vectors: int) -> Problem:
    """A matrix of so many rows, compressed."""
    chance = np.random.default_rng(5)
    points = np.sort(chance.random(rows))
    blocks: dict[tuple[int, int], Array | tuple[Array, Array]] = {}
    count = rows // block
    for i in range(count):
        for j in range(count):
            one, other = points[i * block : (i + 1) * block], points[j * block : (j + 1) * block]
            dense = kernel(one, other)
            blocks[i, j] = dense if abs(i - j) < 1 else compressed(dense)
    return Problem(points, blocks, chance.standard_normal((rows, vectors)), block)


def compressed(dense: Array, rank: int = 24) -> tuple[Array, Array]:
    """Two thin factors of a block, by a random projection onto what it reaches."""
    sketch = dense @ np.random.default_rng(1).standard_normal((dense.shape[1], rank))
    basis, _ = np.linalg.qr(dense @ (dense.T @ sketch))
    u, s, v = np.linalg.svd(basis.T @ dense, full_matrices=False)
    kept = int((s > TOLERANCE * s[0]).sum())
    return np.asarray(basis @ u[:, :kept] * s[:kept]), np.ascontiguousarray(v[:kept])


@ch.task(placement=[gpu, cpu])
def multiply(block: ch.In[Array], x: ch.In[Array], y: ch.Sum[Array]) -> None:
    """Adds the product with a dense block."""
    y += block @ x


@ch.task(placement=[gpu, cpu])
def multiply_low(u: ch.In[Array], v: ch.In[Array], x: ch.In[Array], y: ch.Sum[Array]) -> None:
    """Adds the product with a block of low rank."""
    y += u @ (v @ x)


def tasks(given: Problem, gpus: int = 0) -> Array:
    """The product, a task a block."""
    x = ch.asarray(given.vectors, name="x").shards(len(given.vectors) // given.block)
    result = np.zeros(given.vectors.shape)
    Y = ch.asarray(result, name="y")
    y = Y.shards(len(x))
    for (i, j), block in given.blocks.items():
        if isinstance(block, tuple):
            multiply_low(*map(ch.asarray, block), x[j], y[i])
        else:
            multiply.options(priority=1)(ch.asarray(block), x[j], y[i])
    Y.release()  # waits for the tasks, and gives the memory back
    return result


def row(given: Problem, i: int) -> Array:
    """One block of rows of the product."""
    size = given.block
    y = np.zeros((size, given.vectors.shape[1]))
    for j in range(len(given.vectors) // size):
        x, block = given.vectors[j * size : (j + 1) * size], given.blocks[i, j]
        y += block[0] @ (block[1] @ x) if isinstance(block, tuple) else block @ x
    return y


def serially(given: Problem) -> Array:
    """The product, one block after the other."""
    return by_hand(given, application.in_turn)


def threads(given: Problem, workers: int) -> Array:
    """The product on threads by hand: rows of blocks are independent."""
    with application.side_by_side(workers) as every:
        return by_hand(given, every)


def by_hand(given: Problem, every: application.Every) -> Array:
    """The product by rows of blocks; ``every`` calls a function with each number."""
    rows = range(len(given.vectors) // given.block)
    return np.concatenate(every(lambda i: row(given, i), rows))


def error(found: Array, given: Problem) -> float:
    """How far some rows of a product are from the dense matrix's, relatively."""
    some = np.random.default_rng(2).integers(0, len(found), 200)
    right = kernel(given.points[some], given.points) @ given.vectors
    return float(np.linalg.norm(found[some] - right) / np.linalg.norm(right))


LIMIT = 1e-4
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (multiply.fn, multiply_low.fn, tasks)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ("multiply", "multiply_low")
"""What may run on cores or on GPUs."""


if __name__ == "__main__":
    sys.exit(application.main(sys.modules[__name__]))
