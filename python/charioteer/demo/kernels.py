"""Tile kernels: BLAS and LAPACK on matrices, called without the GIL.

They are the routines of :mod:`charioteer.blas`, called on the spot, and take NumPy arrays: what
the bodies of tasks on cores get for regions, and what plain loops have. Those of the factorization
take arrays of devices too, and compute there by NumPy's interface. SciPy's Python wrappers would
hold the GIL while BLAS runs, so that tasks which use them do not overlap.

Threads. The kernels say nothing about the number of BLAS threads. Inside a Charioteer task BLAS is
held to the cores of the task; elsewhere use ``threadpoolctl.threadpool_limits``.
"""

import numpy as np
import numpy.typing as npt

from charioteer import blas

__all__ = [
    "add_scores",
    "gemm",
    "potrf",
    "rbf",
    "solve_backward",
    "solve_forward",
    "syrk",
    "trsm",
    "update_backward",
    "update_forward",
]

Matrix = npt.NDArray[np.float64]


def rbf(k: Matrix, left: Matrix, right: Matrix, noise: float = 0.0) -> None:
    """Fill ``k`` with ``exp(left @ right.T)``, and add ``noise`` to its diagonal.

    ``left`` is (rows of k, d) and ``right`` (columns of k, d). With the augmented features of
    ``gp.augment`` the exponent is minus half the squared distance, in length scales.
    """
    blas.gemm.fn(left, right, k, trans_b="T")
    np.exp(k, out=k)
    if noise:
        np.einsum("ii->i", k)[...] += noise


def potrf(a: Matrix) -> None:
    """Overwrite the lower triangle of ``a`` with its Cholesky factor; the rest is left as it was.

    Raises:
        charioteer.NativeError: ``a`` is not positive definite.
    """
    if isinstance(a, np.ndarray):
        blas.potrf.fn(a)
    else:
        a[...] = np.tril(np.linalg.cholesky(a)) + np.triu(a, 1)


def trsm(diagonal: Matrix, a: Matrix) -> None:
    """``a = a @ inv(L.T)``, with L the lower triangle of ``diagonal``."""
    if isinstance(a, np.ndarray):
        blas.trsm.fn(diagonal, a, left=False, trans="T")
    else:
        a[...] = np.linalg.solve(np.tril(diagonal), a.T).T


def syrk(a: Matrix, c: Matrix) -> None:
    """``c -= a @ a.T`` in the lower triangle of ``c``."""
    if isinstance(a, np.ndarray):
        blas.syrk.fn(a, c, alpha=-1, beta=1)
    else:
        c -= np.tril(a @ a.T)


def gemm(a: Matrix, b: Matrix, c: Matrix) -> None:
    """``c -= a @ b.T``."""
    if isinstance(a, np.ndarray):
        blas.gemm.fn(a, b, c, alpha=-1, beta=1, trans_b="T")
    else:
        c -= a @ b.T


def solve_forward(diagonal: Matrix, y: Matrix) -> None:
    """``y = inv(L) @ y``, with L the lower triangle of ``diagonal``."""
    blas.trsm.fn(diagonal, y)


def update_forward(factor: Matrix, solved: Matrix, y: Matrix) -> None:
    """``y -= factor @ solved``."""
    blas.gemm.fn(factor, solved, y, alpha=-1, beta=1)


def solve_backward(diagonal: Matrix, y: Matrix) -> None:
    """``y = inv(L.T) @ y``, with L the lower triangle of ``diagonal``."""
    blas.trsm.fn(diagonal, y, trans="T")


def update_backward(factor: Matrix, solved: Matrix, y: Matrix) -> None:
    """``y -= factor.T @ solved``."""
    blas.gemm.fn(factor, solved, y, alpha=-1, beta=1, trans_a="T")


def add_scores(k: Matrix, weights: Matrix, scores: Matrix) -> None:
    """``scores += k @ weights``."""
    blas.gemm.fn(k, weights, scores, beta=1)
