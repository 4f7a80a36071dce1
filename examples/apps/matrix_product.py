"""A matrix product by blocks.

Each tile of the result is updated in place by a chain of tasks, one for each block of the common
extent; chains of different tiles run side by side. On cores a task is BLAS's ``gemm`` itself, on
regions of the three matrices; on GPUs it is what their array library makes of ``a @ b``. Which of
them it is the runtime finds out, and it copies tiles to where they are needed.

    pip install "charioteer[demo]"
    python examples/apps/matrix_product.py

The exit status is 1 if NumPy gives another product.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import charioteer as ch
from charioteer import blas, cpu, gpu


@ch.task(placement=gpu)
def gemm(a: ch.In[Any], b: ch.In[Any], c: ch.InOut[Any], beta: float = 0.0) -> None:
    """``c = a @ b + beta * c``; with ``beta`` of zero whatever was there is overwritten."""
    if beta:
        c *= beta
        c += a @ b
    else:
        np.matmul(a, b, out=c)


gemm.variant(cpu)(blas.gemm)


def product(a: ch.Array, b: ch.Array, tile: int) -> ch.Array:
    """Spawn the tasks of ``a @ b``; the array that they write."""
    c = ch.empty((a.shape[0], b.shape[1]))
    A, B, C = (matrix.tiles((tile, tile)) for matrix in (a, b, c))
    for i in range(C.shape[0]):
        for j in range(C.shape[1]):
            for k in range(A.shape[1]):
                # The first one overwrites what is there.
                gemm(A[i, k], B[k, j], C[i, j], beta=float(k > 0))
    return c


def main(arguments: Sequence[str] | None = None) -> int:
    """Multiply two random matrices, and compare with NumPy."""
    parser = argparse.ArgumentParser(description="blocked matrix product")
    parser.add_argument("--size", type=int, default=1000, help="rows and columns of the matrices")
    parser.add_argument("--tile", type=int, default=256, help="rows and columns of a tile")
    parser.add_argument("--machine", help="virtual:4, or a machine file; else what is found")
    options = parser.parse_args(arguments)

    random = np.random.default_rng(0)
    a, b = random.random((options.size, 300)), random.random((300, options.size))
    with ch.Runtime(options.machine):
        start = time.perf_counter()
        c = product(ch.asarray(a), ch.asarray(b), options.tile).numpy()
        seconds = time.perf_counter() - start
    error = float(np.abs(c - a @ b).max() / np.abs(c).max())
    print(f"{options.size} x {options.size}: {1e3 * seconds:.0f} ms, relative error {error:.1e}")
    return 0 if error < 1e-13 else 1


if __name__ == "__main__":
    sys.exit(main())
