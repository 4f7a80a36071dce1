"""The kernels of the Cholesky factorization as native tasks: C pointers that no worker needs the
GIL for.

They compute what those of :mod:`~charioteer.demo.kernels` compute, with the same calls of the same
routines, so results agree to the last bit. Where those are called by a body in Python, these are
the body: a kernel gives the task function and its arguments, which ``gp`` spawns.
"""

from typing import Any

import charioteer as ch
from charioteer import blas

from .kernels import Tile

__all__ = ["Kernels"]

Call = tuple[ch.TaskFunction[..., None], tuple[Any, ...]]


class Kernels:
    """The four kernels.

    Args:
        empty: matrices are passed as empty ones, of which the routines do nothing.
    """

    def __init__(self, empty: bool = False) -> None:
        self._empty = empty
        self._dpotrf = blas.routine("dpotrf")
        self._dtrsm = blas.routine("dtrsm")
        self._dsyrk = blas.routine("dsyrk")
        self._dgemm = blas.routine("dgemm")

    def _extents(self, tile: Tile) -> tuple[int, int]:
        rows, columns = tile.array.shape
        return (0, 0) if self._empty else (rows, columns)

    def potrf(self, a: Tile) -> Call:
        """The Cholesky factor of ``a``, as :func:`.kernels.potrf`."""
        n, _ = self._extents(a)
        return self._dpotrf, ("U", n, a.array, a.array.shape[1])

    def trsm(self, diagonal: Tile, a: Tile) -> Call:
        """``a = a @ inv(L.T)``, as :func:`.kernels.trsm`."""
        rows, columns = self._extents(a)
        return self._dtrsm, (
            "L", "U", "T", "N", columns, rows,
            1.0, diagonal.array, diagonal.array.shape[1], a.array, a.array.shape[1],
        )  # fmt: skip

    def syrk(self, a: Tile, c: Tile) -> Call:
        """``c -= a @ a.T`` in the lower triangle of ``c``, as :func:`.kernels.syrk`."""
        n, _ = self._extents(c)
        inner = a.array.shape[1]
        return self._dsyrk, ("U", "T", n, inner, -1.0, a.array, inner, 1.0, c.array, len(c.array))

    def gemm(self, a: Tile, b: Tile, c: Tile) -> Call:
        """``c -= a @ b.T``, as :func:`.kernels.gemm`."""
        rows, columns = self._extents(c)
        inner = a.array.shape[1]
        return self._dgemm, (
            "T", "N", columns, rows, inner,
            -1.0, b.array, inner, a.array, inner, 1.0, c.array, c.array.shape[1],
        )  # fmt: skip
