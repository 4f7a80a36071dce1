"""Programs on managed arrays over several GPUs, which ``charioteer bench gpu`` times.

Each is one function that spawns its tasks and gives what tells when they are done. Where a task
runs is said: tiles and shards have an owner each, in turns, so that what is measured is the
runtime and not a policy. Kernels are a parameter: :class:`Portable` ones are NumPy's interface, for
any device, and :class:`Blas` ones call cuBLAS and cuSOLVER on arrays of CuPy's in place.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import numpy as np

import charioteer as ch
from charioteer import gpu

__all__ = [
    *(
        "Blas",
        "Kernels",
        "Portable",
        "Stripes",
        "cholesky",
        "jacobi",
        "kmeans",
        "product",
        "spread",
    ),
]


class Kernels(Protocol):
    """What a tiled factorization does with its tiles, in place; lower triangles alone count."""

    def potrf(self, a: Any) -> None:
        """Overwrite ``a`` with its Cholesky factor."""

    def trsm(self, diagonal: Any, a: Any) -> None:
        """``a = a @ inv(L.T)``, with L the lower triangle of ``diagonal``."""

    def syrk(self, a: Any, c: Any) -> None:
        """``c -= a @ a.T``."""

    def gemm(self, a: Any, b: Any, c: Any) -> None:
        """``c -= a @ b.T``."""


class Portable:
    """Kernels by NumPy's interface."""

    def potrf(self, a: Any) -> None:
        """See :class:`Kernels`."""
        a[...] = np.linalg.cholesky(a)

    def trsm(self, diagonal: Any, a: Any) -> None:
        """See :class:`Kernels`."""
        a[...] = np.linalg.solve(np.tril(diagonal), a.T).T

    def syrk(self, a: Any, c: Any) -> None:
        """See :class:`Kernels`."""
        c -= a @ a.T

    def gemm(self, a: Any, b: Any, c: Any) -> None:
        """See :class:`Kernels`."""
        c -= a @ b.T


class Blas:
    """Kernels of cuBLAS and cuSOLVER, for tiles of float64 whose rows are contiguous.

    A matrix by rows is to Fortran its transposed by columns: lower is upper there, and products
    change their order.
    """

    def __init__(self) -> None:
        import cupy
        from cupy.cuda import device
        from cupy_backends.cuda.libs import cublas, cusolver

        self._cupy, self._cublas, self._cusolver, self._device = cupy, cublas, cusolver, device
        self._one, self._minus = np.ones(1), -np.ones(1)

    def _blas(self) -> Any:
        handle = self._device.get_cublas_handle()
        self._cublas.setPointerMode(handle, self._cublas.CUBLAS_POINTER_MODE_HOST)
        return handle

    @staticmethod
    def _rows(a: Any) -> int:
        """The distance of rows, in elements."""
        return int(a.strides[0]) // int(a.itemsize)

    def potrf(self, a: Any) -> None:
        """See :class:`Kernels`. Nobody looks at whether the tile is positive definite."""
        cupy, solver = self._cupy, self._cusolver
        handle, n = self._device.get_cusolver_handle(), len(a)
        upper, rows = self._cublas.CUBLAS_FILL_MODE_UPPER, self._rows(a)
        size = solver.dpotrf_bufferSize(handle, upper, n, a.data.ptr, rows)
        work, info = cupy.empty(size), cupy.empty(1, np.int32)
        solver.dpotrf(handle, upper, n, a.data.ptr, rows, work.data.ptr, size, info.data.ptr)

    def trsm(self, diagonal: Any, a: Any) -> None:
        """See :class:`Kernels`."""
        blas = self._cublas
        blas.dtrsm(
            self._blas(), blas.CUBLAS_SIDE_LEFT, blas.CUBLAS_FILL_MODE_UPPER,
            blas.CUBLAS_OP_T, blas.CUBLAS_DIAG_NON_UNIT, a.shape[1], a.shape[0],
            self._one.ctypes.data, diagonal.data.ptr, self._rows(diagonal), a.data.ptr,
            self._rows(a),
        )  # fmt: skip

    def syrk(self, a: Any, c: Any) -> None:
        """See :class:`Kernels`."""
        blas = self._cublas
        blas.dsyrk(
            self._blas(), blas.CUBLAS_FILL_MODE_UPPER, blas.CUBLAS_OP_T, a.shape[0], a.shape[1],
            self._minus.ctypes.data, a.data.ptr, self._rows(a), self._one.ctypes.data,
            c.data.ptr, self._rows(c),
        )  # fmt: skip

    def gemm(self, a: Any, b: Any, c: Any) -> None:
        """See :class:`Kernels`."""
        blas = self._cublas
        blas.dgemm(
            self._blas(), blas.CUBLAS_OP_T, blas.CUBLAS_OP_N, b.shape[0], a.shape[0], a.shape[1],
            self._minus.ctypes.data, b.data.ptr, self._rows(b), a.data.ptr, self._rows(a),
            self._one.ctypes.data, c.data.ptr, self._rows(c),
        )  # fmt: skip


def spread(regions: Any, gpus: int, lower: bool = False) -> list[ch.Task[Any]]:
    """Brings tiles to their owners, so that a run begins with them there.

    Args:
        regions: a grid of tiles of two dimensions.
        gpus: how many GPUs own them, row by row in turns.
        lower: only those on the diagonal and below it.
    """
    rows, columns = regions.shape
    return [
        regions[i, j].prefetch(gpu(i % gpus))
        for i in range(rows)
        for j in range(min(i + 1, columns) if lower else columns)
    ]


def cholesky(A: Any, gpus: int, kernels: Kernels) -> None:
    """Spawns the tasks that overwrite the lower triangle of a matrix with its Cholesky factor.

    Args:
        A: the tiles of the matrix, a grid of two dimensions.
        gpus: how many GPUs own them, row by row in turns.
        kernels: what to do with tiles.
    """

    @ch.task
    def potrf(a: ch.InOut[Any]) -> None:
        kernels.potrf(a)

    @ch.task
    def trsm(diagonal: ch.In[Any], a: ch.InOut[Any]) -> None:
        kernels.trsm(diagonal, a)

    @ch.task
    def syrk(a: ch.In[Any], c: ch.InOut[Any]) -> None:
        kernels.syrk(a, c)

    @ch.task
    def gemm(a: ch.In[Any], b: ch.In[Any], c: ch.InOut[Any]) -> None:
        kernels.gemm(a, b, c)

    n = A.shape[0]
    owners = [gpu(i % gpus) for i in range(n)]
    # Those of the next column come before all others.
    for k in range(n):
        potrf.options(priority=3 * (n - k), placement=owners[k])(A[k, k])
        for i in range(k + 1, n):
            trsm.options(priority=3 * (n - k), placement=owners[i])(A[k, k], A[i, k])
        for j in range(k + 1, n):
            syrk.options(priority=3 * (n - j), placement=owners[j])(A[j, k], A[j, j])
            for i in range(j + 1, n):
                update = gemm.options(priority=3 * (n - j), placement=owners[i])
                update(A[i, k], A[j, k], A[i, j])


def product(A: Any, B: Any, C: Any, gpus: int) -> None:
    """Spawns the tasks of ``C = A @ B``, on tiles: rows of tiles of C have owners in turns."""

    @ch.task
    def multiply(a: ch.In[Any], b: ch.In[Any], c: ch.Out[Any]) -> None:
        np.matmul(a, b, out=c)

    @ch.task
    def multiply_add(a: ch.In[Any], b: ch.In[Any], c: ch.InOut[Any]) -> None:
        c += a @ b

    (rows, inner), columns = A.shape, B.shape[1]
    for i in range(rows):
        placement = gpu(i % gpus)
        for j in range(columns):
            multiply.options(placement=placement)(A[i, 0], B[0, j], C[i, j])
            for k in range(1, inner):
                multiply_add.options(placement=placement)(A[i, k], B[k, j], C[i, j])


class Stripes:
    """A grid by stripes of rows, each an array of its own with a halo of a row above and below.

    Args:
        grid: the grid, with its boundary.
        count: how many stripes.
    """

    def __init__(self, grid: np.ndarray[Any, Any], count: int) -> None:
        rows = grid.shape[0] - 2
        edges = [rows * at // count for at in range(count + 1)]
        self.arrays = [
            ch.array(grid[top : bottom + 2]) for top, bottom in itertools.pairwise(edges)
        ]

    def numpy(self) -> np.ndarray[Any, Any]:
        """The grid, when all tasks are done."""
        first, last = self.arrays[0], self.arrays[-1]
        inner = [array[1:-1].numpy() for array in self.arrays]
        return np.vstack([first[:1].numpy(), *inner, last[-1:].numpy()])


def jacobi(old: Stripes, new: Stripes, sweeps: int, gpus: int) -> Stripes:
    """Spawns sweeps of Jacobi's iteration: a task a stripe, and one for each row that a neighbour
    needs. Stripes next to each other have one owner, as far as they can.

    Returns:
        The one of the two that has the last sweep.
    """

    @ch.task
    def relax(old: ch.In[Any], new: ch.InOut[Any]) -> None:
        inner = new[1:-1, 1:-1]
        np.add(old[:-2, 1:-1], old[2:, 1:-1], out=inner)
        inner += old[1:-1, :-2]
        inner += old[1:-1, 2:]
        inner *= 0.25

    @ch.task
    def send(row: ch.In[Any], halo: ch.Out[Any]) -> None:
        halo[...] = row

    count = len(old.arrays)
    owners = [gpu(at * gpus // count) for at in range(count)]
    for _ in range(sweeps):
        for at in range(count):
            relax.options(placement=owners[at])(old.arrays[at], new.arrays[at])
        for at in range(count - 1):
            upper, lower = new.arrays[at], new.arrays[at + 1]
            send.options(placement=owners[at + 1])(upper[-2:-1], lower[:1])
            send.options(placement=owners[at])(lower[1:2], upper[-1:])
        old, new = new, old
    return old


def kmeans(
    points: ch.Array, centers: ch.Array, totals: ch.Array, rounds: int, gpus: int, shards: int = 1
) -> None:
    """Spawns rounds of k-means: shards of the points, some for each GPU, add to one array.

    Args:
        points: (n, d).
        centers: (k, d).
        totals: (k, d + 1) of zeros: sums, and numbers of points.
        rounds: how many.
        gpus: over how many GPUs.
        shards: how many tasks a round on each.
    """

    @ch.task
    def assign(points: ch.In[Any], centers: ch.In[Any], totals: ch.Sum[Any]) -> None:
        xp = ch.current().xp
        distances = (centers**2).sum(axis=1) - 2.0 * points @ centers.T
        nearest = distances.argmin(axis=1)
        # One-hot rows, so that sums are products.
        member = (nearest[None, :] == xp.arange(len(centers))[:, None]).astype(points.dtype)
        totals[:, :-1] += member @ points
        totals[:, -1] += member.sum(axis=1)

    @ch.task
    def move(totals: ch.InOut[Any], centers: ch.InOut[Any]) -> None:
        xp = ch.current().xp
        count = totals[:, -1:]
        centers[...] = xp.where(count > 0, totals[:, :-1] / xp.maximum(count, 1), centers)
        totals[...] = 0.0

    parts = points.shards(gpus * shards)
    for _ in range(rounds):
        for at, part in enumerate(parts):
            assign.options(placement=gpu(at // shards))(part, centers, totals)
        move.options(placement=gpu(0))(totals, centers)
