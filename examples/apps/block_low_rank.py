"""A matrix-vector product with a block low-rank matrix, for many vectors at once.

The matrix has the values of a smooth kernel between points on a line. A block far from the diagonal
is nearly of low rank and is kept as two thin factors; those near it are dense. A task multiplies
one block. All blocks of a row add to the same part of the result: it is a reduction, so they run
side by side, and the runtime adds up what they made.

    pip install charioteer
    python examples/apps/block_low_rank.py

The exit status is 1 if the product differs from that with the dense matrix.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import charioteer as ch

Array = npt.NDArray[np.float64]

SIZES = {"small": (1024, 128, 8), "medium": (4096, 512, 32), "large": (8192, 1024, 64)}
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


@ch.task
def multiply(block: Array, x: ch.In[Array], y: ch.Sum[Array]) -> None:
    """Adds the product with a dense block."""
    y += block @ x


@ch.task
def multiply_low(u: Array, v: Array, x: ch.In[Array], y: ch.Sum[Array]) -> None:
    """Adds the product with a block of low rank."""
    y += u @ (v @ x)


def tasks(given: Problem) -> Array:
    """The product, a task a block."""
    x = ch.asarray(given.vectors, name="x").shards(len(given.vectors) // given.block)
    result = ch.zeros(given.vectors.shape, name="y")
    y = result.shards(len(x))
    for (i, j), block in given.blocks.items():
        if isinstance(block, tuple):
            multiply_low(*block, x[j], y[i])
        else:
            multiply.options(priority=1)(block, x[j], y[i])
    return result.numpy()


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
    return np.concatenate([row(given, i) for i in range(len(given.vectors) // given.block)])


def threads(given: Problem, workers: int) -> Array:
    """The product on threads by hand: rows of blocks are independent."""
    with ThreadPoolExecutor(workers) as executor:
        rows = range(len(given.vectors) // given.block)
        return np.concatenate(list(executor.map(lambda i: row(given, i), rows)))


def error(found: Array, given: Problem) -> float:
    """How far a product is from the dense matrix's, relatively."""
    right = kernel(given.points, given.points) @ given.vectors
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


LIMIT = 1e-4
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (multiply.fn, multiply_low.fn, tasks)
"""What a user writes: bodies and the program that spawns them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Multiply, and compare with the dense matrix."""
    parser = argparse.ArgumentParser(description="Block low-rank matrix-vector product")
    parser.add_argument("--size", choices=SIZES, default="small")
    options = parser.parse_args(arguments)
    given = problem(*SIZES[options.size])
    with ch.Runtime():
        found = tasks(given)
    low = [block for block in given.blocks.values() if isinstance(block, tuple)]
    rank = max(v.shape[0] for _, v in low)
    wrong = error(found, given)
    print(f"{len(given.blocks)} blocks, {len(low)} of rank {rank} at most: error {wrong:.1e}")
    return 0 if wrong <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
