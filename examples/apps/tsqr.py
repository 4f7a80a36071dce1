"""TSQR: the triangular factor of a tall matrix, by a tree of small factorizations.

Shards of rows are factored side by side. Then pairs of triangles are stacked and factored again,
until one is left. The triangles lie in one array; which task waits for which follows from the rows
of it that they read and write.

    pip install charioteer
    python examples/apps/tsqr.py

The exit status is 1 if NumPy gives another factor.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import charioteer as ch
from charioteer import cpu, gpu

Matrix = npt.NDArray[np.float64]


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


def tsqr(matrix: Matrix, shards: int) -> Matrix:
    """The triangular factor of a matrix with many more rows than columns."""
    columns = matrix.shape[1]
    A, R = ch.asarray(matrix), ch.empty((shards, columns, columns))
    for rows, r in zip(A.shards(shards), R, strict=True):
        factor(rows, r)
    step = 1
    while step < shards:
        for i in range(0, shards - step, 2 * step):
            merge(R[i], R[i + step])
        step *= 2
    return np.asarray(R[0].numpy())


def main(arguments: Sequence[str] | None = None) -> int:
    """Factor a random matrix, and compare with NumPy."""
    parser = argparse.ArgumentParser(description="QR factorization of a tall matrix")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the matrix")
    parser.add_argument("--columns", type=int, default=32, help="columns of the matrix")
    parser.add_argument("--shards", type=int, default=8, help="factorizations side by side")
    parser.add_argument("--machine", help="virtual:4, or a machine file; else what is found")
    options = parser.parse_args(arguments)

    matrix = np.random.default_rng(0).standard_normal((options.rows, options.columns))
    with ch.Runtime(options.machine):
        start = time.perf_counter()
        r = tsqr(matrix, options.shards)
        seconds = time.perf_counter() - start
    wanted = triangle(matrix)
    error = float(np.abs(r - wanted).max() / np.abs(wanted).max())
    print(f"{options.rows} x {options.columns}: {1e3 * seconds:.0f} ms, relative error {error:.1e}")
    return 0 if error < 1e-12 else 1


if __name__ == "__main__":
    sys.exit(main())
