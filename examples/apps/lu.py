"""A tiled LU factorization without pivoting, of a matrix that needs none.

The tasks are those of LAPACK's algorithm by blocks, written down in its order; which may run side
by side follows from the tiles that they read and write. On cores the updates are routines of
``charioteer.blas``, which run without the GIL; on GPUs they are written with NumPy's interface,
which the arrays there have.

    pip install "charioteer[demo]"
    python examples/apps/lu.py

The exit status is 1 if the product of the factors is not the matrix.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

import charioteer as ch
from charioteer import blas, cpu, gpu

Matrix = npt.NDArray[np.float64]


@ch.task(placement=[gpu, cpu])
def factor(a: ch.InOut[Matrix]) -> None:
    """Overwrite a tile with its factors: L below the diagonal, its ones left out, and U."""
    for k in range(len(a) - 1):
        a[k + 1 :, k] /= a[k, k]
        a[k + 1 :, k + 1 :] -= np.outer(a[k + 1 :, k], a[k, k + 1 :])


@ch.task(placement=gpu)
def trsm(
    a: ch.In[Matrix],
    b: ch.InOut[Matrix],
    left: bool = True,
    lower: bool = True,
    unit: bool = False,
) -> None:
    """``b = inv(a) @ b``, or ``b @ inv(a)``, of a triangle of ``a``."""
    triangle = np.tril(a, -1 if unit else 0) if lower else np.triu(a)
    if unit:
        triangle = triangle + ch.current().xp.eye(len(a))
    b[...] = np.linalg.solve(triangle, b) if left else np.linalg.solve(triangle.T, b.T).T


@ch.task(placement=gpu)
def gemm(
    a: ch.In[Matrix], b: ch.In[Matrix], c: ch.InOut[Matrix], alpha: float = 1.0, beta: float = 0.0
) -> None:
    """``c = alpha * a @ b + beta * c``."""
    c *= beta
    c += alpha * (a @ b)


trsm.variant(cpu)(blas.trsm)
gemm.variant(cpu)(blas.gemm)


def lu(matrix: ch.Array, tile: int) -> None:
    """Spawn the tasks that overwrite a square matrix with its factors."""
    A = matrix.tiles((tile, tile))
    n = A.shape[0]
    for k in range(n):
        factor.options(priority=n - k)(A[k, k])
        for j in range(k + 1, n):
            trsm.options(priority=n - k)(A[k, k], A[k, j], unit=True)
        for i in range(k + 1, n):
            trsm.options(priority=n - k)(A[k, k], A[i, k], left=False, lower=False)
            for j in range(k + 1, n):
                update = gemm.options(priority=n - max(i, j))
                update(A[i, k], A[k, j], A[i, j], alpha=-1, beta=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Factor a random matrix, and multiply the factors."""
    parser = argparse.ArgumentParser(description="tiled LU factorization")
    parser.add_argument("--size", type=int, default=1000, help="rows and columns of the matrix")
    parser.add_argument("--tile", type=int, default=128, help="rows and columns of a tile")
    parser.add_argument("--machine", help="virtual:4, or a machine file; else what is found")
    options = parser.parse_args(arguments)

    # Diagonally dominant, so that no pivots are needed.
    matrix = np.random.default_rng(0).random((options.size, options.size))
    matrix += options.size * np.eye(options.size)
    with ch.Runtime(options.machine):
        start = time.perf_counter()
        A = ch.array(matrix)
        lu(A, options.tile)
        factors = A.numpy()
        seconds = time.perf_counter() - start
    lower = np.tril(factors, -1) + np.eye(options.size)
    error = float(np.abs(lower @ np.triu(factors) - matrix).max() / np.abs(matrix).max())
    print(f"{options.size} x {options.size}: {1e3 * seconds:.0f} ms, relative error {error:.1e}")
    return 0 if error < 1e-12 else 1


if __name__ == "__main__":
    sys.exit(main())
