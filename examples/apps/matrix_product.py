"""A matrix product by blocks.

Each tile of the result is updated in place by a chain of tasks, one for each block of the common
extent; chains of different tiles run side by side. On cores a task is BLAS's ``gemm`` itself, on
regions of the three matrices; on GPUs it is what their array library makes of ``a @ b``. Which of
them it is the runtime finds out, and it copies tiles to where they are needed.

    pip install "charioteer[demo]"
    python examples/apps/matrix_product.py

The exit status is 1 if NumPy gives another product.
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
from charioteer import blas, cpu, gpu

Matrix = npt.NDArray[np.float64]

SIZES = {
    "tiny": (90, 70, 40),
    "small": (512, 300, 128),
    "medium": (1536, 1024, 256),
    "large": (3072, 2048, 256),
}
"""Rows and columns of the product, the extent that goes, rows and columns of a tile."""


@dataclass
class Problem:
    """Two matrices, and how large tiles are."""

    a: Matrix
    b: Matrix
    tile: int

    @cached_property
    def right(self) -> Matrix:
        """NumPy's product."""
        return np.asarray(self.a @ self.b)


def problem(size: int, common: int, tile: int) -> Problem:
    """Two matrices at random."""
    chance = np.random.default_rng(0)
    return Problem(chance.random((size, common)), chance.random((common, size)), tile)


@ch.task(placement=gpu)
def gemm(a: ch.In[Any], b: ch.In[Any], c: ch.InOut[Any], beta: float = 0.0) -> None:
    """``c = a @ b + beta * c``; with ``beta`` of zero whatever was there is overwritten."""
    if beta:
        c *= beta
        c += a @ b
    else:
        np.matmul(a, b, out=c)


gemm.variant(cpu)(blas.gemm)


def product(a: ch.Array, b: ch.Array, c: ch.Array, tile: int) -> None:
    """Spawn the tasks of ``c = a @ b``."""
    A, B, C = (matrix.tiles((tile, tile)) for matrix in (a, b, c))
    for i in range(C.shape[0]):
        for j in range(C.shape[1]):
            for k in range(A.shape[1]):
                # The first one overwrites what is there.
                gemm(A[i, k], B[k, j], C[i, j], beta=float(k > 0))


def tasks(given: Problem, gpus: int = 0) -> Matrix:
    """The product."""
    result = np.empty((len(given.a), given.b.shape[1]))
    C = ch.asarray(result)
    product(ch.asarray(given.a), ch.asarray(given.b), C, given.tile)
    C.release()  # waits for the tasks, and gives the memory back
    return result


def by_hand(given: Problem, every: application.Every) -> Matrix:
    """The same with plain loops; ``every`` calls a function with each number."""
    a, b, tile = given.a, given.b, given.tile
    c = np.empty((len(a), b.shape[1]))
    places = [(i, j) for i in range(0, len(c), tile) for j in range(0, c.shape[1], tile)]

    def chain(at: int) -> None:
        i, j = places[at]
        for k in range(0, len(b), tile):
            left, right = a[i : i + tile, k : k + tile], b[k : k + tile, j : j + tile]
            blas.gemm.fn(left, right, c[i : i + tile, j : j + tile], beta=float(k > 0))

    every(chain, range(len(places)))
    return c


def serially(given: Problem) -> Matrix:
    """One tile after the other."""
    return by_hand(given, application.in_turn)


def threads(given: Problem, workers: int) -> Matrix:
    """Tiles of the product on threads by hand."""
    with application.side_by_side(workers) as every:
        return by_hand(given, every)


def error(found: Matrix, given: Problem) -> float:
    """The largest difference from NumPy's product, relatively."""
    return float(np.abs(found - given.right).max() / np.abs(found).max())


LIMIT = 1e-13
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (gemm.fn, product, tasks)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ("gemm",)
"""What may run on cores or on GPUs."""


if __name__ == "__main__":
    sys.exit(application.main(sys.modules[__name__]))
