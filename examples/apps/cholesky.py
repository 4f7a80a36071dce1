"""A tiled Cholesky factorization.

The tasks are those of LAPACK's algorithm by blocks, written down in its order; which may run side
by side follows from the tiles that they read and write. On cores they are routines of
``charioteer.blas``, which run without the GIL; on GPUs they are written with NumPy's interface,
which the arrays there have. A task is the more urgent the further left the column that it writes.

    pip install "charioteer[demo]"
    python examples/apps/cholesky.py

The exit status is 1 if the product of the factor and its transposed is not the matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import application
import numpy as np
import numpy.typing as npt

import charioteer as ch
from charioteer import blas, cpu, gpu

Matrix = npt.NDArray[np.float64]

SIZES = {"tiny": (70, 32), "small": (512, 64), "medium": (1536, 192), "large": (4096, 256)}
"""Rows, rows of a tile."""


@dataclass
class Problem:
    """A symmetric positive definite matrix, and how large tiles are."""

    matrix: Matrix
    tile: int


def problem(rows: int, tile: int) -> Problem:
    """A random matrix with a heavy diagonal."""
    matrix = np.random.default_rng(0).random((rows, rows))
    return Problem((matrix + matrix.T) / 2 + rows * np.eye(rows), tile)


@ch.task(placement=gpu)
def potrf(a: ch.InOut[Matrix]) -> None:
    """Overwrite a tile with its factor."""
    a[...] = np.linalg.cholesky(a)


@ch.task(placement=gpu)
def trsm(a: ch.In[Matrix], b: ch.InOut[Matrix], left: bool = False, trans: str = "T") -> None:
    """``b = b @ inv(a).T``, of the lower triangle of ``a``."""
    b[...] = np.linalg.solve(np.tril(a), b.T).T


@ch.task(placement=gpu)
def syrk(a: ch.In[Matrix], c: ch.InOut[Matrix], alpha: float = -1.0, beta: float = 1.0) -> None:
    """``c -= a @ a.T``, of which the lower triangle counts."""
    c -= a @ a.T


@ch.task(placement=gpu)
def gemm(
    a: ch.In[Matrix],
    b: ch.In[Matrix],
    c: ch.InOut[Matrix],
    alpha: float = -1.0,
    beta: float = 1.0,
    trans_b: str = "T",
) -> None:
    """``c -= a @ b.T``."""
    c -= a @ b.T


potrf.variant(cpu)(blas.potrf)
trsm.variant(cpu)(blas.trsm)
syrk.variant(cpu)(blas.syrk)
gemm.variant(cpu)(blas.gemm)


def cholesky(matrix: ch.Array, tile: int) -> None:
    """Spawn the tasks that overwrite the lower triangle of a matrix with its factor."""
    A = matrix.tiles((tile, tile))
    n = A.shape[0]
    for k in range(n):
        potrf.options(priority=n - k)(A[k, k])
        for i in range(k + 1, n):
            trsm.options(priority=n - k)(A[k, k], A[i, k], left=False, trans="T")
        for j in range(k + 1, n):
            syrk.options(priority=n - j)(A[j, k], A[j, j], alpha=-1, beta=1)
            for i in range(j + 1, n):
                update = gemm.options(priority=n - j)
                update(A[i, k], A[j, k], A[i, j], alpha=-1, beta=1, trans_b="T")


def tasks(given: Problem, gpus: int = 0) -> Matrix:
    """The factor, and above its diagonal whatever was there."""
    whole = given.matrix.copy()
    A = ch.asarray(whole)
    cholesky(A, given.tile)
    A.release()  # waits for the tasks, and gives the memory back
    return whole


def by_hand(given: Problem, every: application.Every) -> Matrix:
    """The same with plain loops; ``every`` calls a function with each number."""
    whole, tile = given.matrix.copy(), given.tile
    n = -(-len(whole) // tile)

    def tile_of(i: int, j: int) -> Matrix:
        return whole[i * tile : (i + 1) * tile, j * tile : (j + 1) * tile]

    def factor(k: int) -> None:
        blas.potrf.fn(tile_of(k, k))
        for i in range(k + 1, n):
            blas.trsm.fn(tile_of(k, k), tile_of(i, k), left=False, trans="T")

    factor(0)
    for k in range(n):

        def column(j: int, k: int = k) -> None:
            blas.syrk.fn(tile_of(j, k), tile_of(j, j), alpha=-1, beta=1)
            for i in range(j + 1, n):
                a, b, c = tile_of(i, k), tile_of(j, k), tile_of(i, j)
                blas.gemm.fn(a, b, c, alpha=-1, beta=1, trans_b="T")
            if j == k + 1:
                factor(j)  # while the others are still updated

        every(column, range(k + 1, n))
    return whole


def serially(given: Problem) -> Matrix:
    """One tile after the other."""
    return by_hand(given, application.in_turn)


def threads(given: Problem, workers: int) -> Matrix:
    """Block columns on threads by hand; the next one is factored as soon as it is updated."""
    with application.side_by_side(workers) as every:
        return by_hand(given, every)


def error(found: Matrix, given: Problem) -> float:
    """How far the product of the factors is from the matrix, on some vectors, relatively."""
    lower, x = np.tril(found), np.random.default_rng(1).standard_normal((len(found), 4))
    right = given.matrix @ x
    return float(np.linalg.norm(lower @ (lower.T @ x) - right) / np.linalg.norm(right))


LIMIT = 1e-12
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (potrf.fn, trsm.fn, syrk.fn, gemm.fn, cholesky, tasks)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ("potrf", "trsm", "syrk", "gemm")
"""What may run on cores or on GPUs."""


if __name__ == "__main__":
    sys.exit(application.main(sys.modules[__name__]))
