"""Programs on managed arrays over several GPUs, which ``charioteer bench gpu`` times.

Each is one function that spawns its tasks and gives what tells when they are done. Where a task
runs is said: tiles and shards have an owner each, in turns, so that what is measured is the
runtime and not a policy. Kernels are a parameter: :class:`Portable` ones are NumPy's interface, for
any device; :class:`Blas`, :class:`Bfloat16`, :class:`CuFft` and :class:`Buckets` call the libraries
of NVIDIA's GPUs, or are kernels of their own, and work in place where they can.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

import charioteer as ch
from charioteer import gpu

__all__ = [
    *(
        "Bfloat16",
        "Blas",
        "Buckets",
        "CuFft",
        "Kernels",
        "Partitions",
        "Portable",
        "Products",
        "Stripes",
        "Transforms",
        "cholesky",
        "fft2",
        "jacobi",
        "kmeans",
        "owner",
        "product",
        "sample_sort",
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


class Products(Protocol):
    """What a product of matrices does with its blocks."""

    library: Literal["cupy", "torch"] | None
    """Whose arrays it wants."""

    def multiply(self, a: Any, b: Any, c: Any) -> None:
        """``c = a @ b``."""

    def multiply_add(self, a: Any, b: Any, c: Any) -> None:
        """``c += a @ b``."""


class Transforms(Protocol):
    """What a Fourier transform does with a part of its image."""

    def rows(self, x: Any, out: Any) -> None:
        """Write the transforms of all rows to ``out``."""

    def columns(self, x: Any, out: Any) -> None:
        """Write the transforms of all columns to ``out``."""


class Partitions(Protocol):
    """What a sort does with a part of its keys, which are in any order.

    The splitters, in order, are the least key of each bucket but the first.
    """

    def count(self, keys: Any, splitters: Any, counts: Any) -> None:
        """Write how many keys belong to each bucket."""

    def place(self, keys: Any, splitters: Any, pieces: Sequence[Any]) -> None:
        """Write the keys to the pieces of their buckets, which have the lengths that it takes."""


class Portable:
    """Kernels by NumPy's interface."""

    library: Literal["cupy", "torch"] | None = None

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

    def multiply(self, a: Any, b: Any, c: Any) -> None:
        """See :class:`Products`."""
        np.matmul(a, b, out=c)

    def multiply_add(self, a: Any, b: Any, c: Any) -> None:
        """See :class:`Products`."""
        c += a @ b

    def rows(self, x: Any, out: Any) -> None:
        """See :class:`Transforms`."""
        out[...] = ch.current().xp.fft.fft(x, axis=1)

    def columns(self, x: Any, out: Any) -> None:
        """See :class:`Transforms`."""
        out[...] = ch.current().xp.fft.fft(x, axis=0)

    def count(self, keys: Any, splitters: Any, counts: Any) -> None:
        """See :class:`Partitions`."""
        ends = np.searchsorted(np.sort(keys), splitters)
        counts[-1:] = len(keys)
        counts[:-1] = ends
        counts[1:] -= ends

    def place(self, keys: Any, splitters: Any, pieces: Sequence[Any]) -> None:
        """See :class:`Partitions`. What is in order is in buckets too."""
        ordered = np.sort(keys)
        for piece, where in zip(pieces, _cuts([len(piece) for piece in pieces]), strict=True):
            piece[...] = ordered[where]


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


class Bfloat16:
    """Products of bfloat16 by PyTorch. NumPy has no such type: arrays are of int16, with the same
    bits."""

    library: Literal["cupy", "torch"] | None = "torch"

    def __init__(self) -> None:
        import torch

        self._torch, self._type = torch, torch.bfloat16

    def multiply(self, a: Any, b: Any, c: Any) -> None:
        """See :class:`Products`."""
        self._torch.matmul(a.view(self._type), b.view(self._type), out=c.view(self._type))

    def multiply_add(self, a: Any, b: Any, c: Any) -> None:
        """See :class:`Products`."""
        c.view(self._type).addmm_(a.view(self._type), b.view(self._type))


_TRANSPOSE = r"""
// A square at a time goes through shared memory, so that neighbours are read together, and written
// together.
extern "C" __global__ void transpose(const float2* source, long long source_row, float2* target,
                                     long long target_row, int rows, int columns) {
    __shared__ float2 square[SIDE][SIDE + 1];
    const int row = blockIdx.y * SIDE, column = blockIdx.x * SIDE, x = threadIdx.x;
#pragma unroll
    for (int y = threadIdx.y; y < SIDE; y += LINES)
        if (row + y < rows && column + x < columns)
            square[y][x] = source[(row + y) * source_row + column + x];
    __syncthreads();
#pragma unroll
    for (int y = threadIdx.y; y < SIDE; y += LINES)
        if (row + x < rows && column + y < columns)
            target[(column + y) * target_row + row + x] = square[x][y];
}
"""
_SIDE, _LINES = 32, 8


class CuFft:
    """Transforms of complex64 by cuFFT, of rows alone: with columns, whose elements lie apart, it
    takes four times as long. So a kernel makes them rows, and columns again. A plan and its
    workspace belong to a device, and serve one task at a time."""

    def __init__(self) -> None:
        import cupy
        from cupy.cuda import cufft

        self._cupy, self._cufft = cupy, cufft
        sizes = {"SIDE": _SIDE, "LINES": _LINES}
        options = tuple(f"-D{name}={size}" for name, size in sizes.items())
        self._kernel = cupy.RawKernel(_TRANSPOSE, "transpose", options)

    def rows(self, x: Any, out: Any) -> None:
        """See :class:`Transforms`."""
        cufft, store, (count, length) = self._cufft, ch.current().store, x.shape
        plan = store.get(("rows", x.shape))
        if plan is None:
            plan = cufft.Plan1d(length, cufft.CUFFT_C2C, count)
            store["rows", x.shape] = plan
        # CuPy's own function would copy the rows first.
        plan.fft(x, out, cufft.CUFFT_FORWARD)

    def columns(self, x: Any, out: Any) -> None:
        """See :class:`Transforms`."""
        rows = self._cupy.empty(x.shape[::-1], x.dtype)
        self._transpose(x, rows)
        self.rows(rows, rows)
        self._transpose(rows, out)

    def _transpose(self, source: Any, target: Any) -> None:
        """``target[...] = source.T``, both with rows that are contiguous."""
        rows, columns = source.shape
        grid = -(-columns // _SIDE), -(-rows // _SIDE)
        given: list[Any] = []
        for array in (source, target):
            given += array, np.int64(array.strides[0] // array.itemsize)
        self._kernel(grid, (_SIDE, _LINES), (*given, np.int32(rows), np.int32(columns)))


_PARTITION = r"""
// Blocks of keys are brought into buckets in the order in which blocks come to it. `next` has how
// many keys of each bucket there were so far. Without `pieces` that is all: it counts. A block
// brings its keys into buckets in shared memory first: neighbours are written together.
extern "C" __global__ void partition(const unsigned* keys, long long n, const unsigned* splitters,
                                     unsigned long long* next, unsigned* const* pieces) {
    __shared__ unsigned held[THREADS * EACH];
    __shared__ unsigned of_warp[BUCKETS][THREADS / 32], start[BUCKETS + 1], least[BUCKETS];
    __shared__ unsigned long long begin[BUCKETS];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long first = (long long)blockIdx.x * THREADS * EACH;
    const unsigned here = (unsigned)min((long long)THREADS * EACH, n - first);
    if (threadIdx.x < BUCKETS - 1) least[threadIdx.x] = splitters[threadIdx.x];
    __syncthreads();
    unsigned key[EACH], count[BUCKETS];
    int bucket[EACH];
#pragma unroll
    for (int b = 0; b < BUCKETS; b++) count[b] = 0;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const unsigned at = k * THREADS + threadIdx.x;
        bucket[k] = -1;
        if (at < here) {
            key[k] = keys[first + at];
            bucket[k] = 0;
#pragma unroll
            for (int b = 0; b < BUCKETS - 1; b++) bucket[k] += key[k] >= least[b];
        }
#pragma unroll
        for (int b = 0; b < BUCKETS; b++) count[b] += bucket[k] == b;
    }
    // How many keys of each bucket the threads before this one have: in its warp, then before that.
    unsigned before[BUCKETS];
#pragma unroll
    for (int b = 0; b < BUCKETS; b++) {
        unsigned sum = count[b];
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const unsigned other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        before[b] = sum - count[b];
        if (lane == 31) of_warp[b][warp] = sum;
    }
    __syncthreads();
    if (threadIdx.x < BUCKETS) {
        unsigned sum = 0;
        for (int w = 0; w < THREADS / 32; w++) {
            const unsigned own = of_warp[threadIdx.x][w];
            of_warp[threadIdx.x][w] = sum;
            sum += own;
        }
        begin[threadIdx.x] = atomicAdd(&next[threadIdx.x], (unsigned long long)sum);
        start[threadIdx.x + 1] = sum;
    }
    if (!pieces) return;
    __syncthreads();
    if (threadIdx.x == 0) {
        start[0] = 0;
        for (int b = 0; b < BUCKETS; b++) start[b + 1] += start[b];
    }
    __syncthreads();
#pragma unroll
    for (int b = 0; b < BUCKETS; b++) {
        unsigned place = start[b] + of_warp[b][warp] + before[b];
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            if (bucket[k] == b) held[place++] = key[k];
        }
    }
    __syncthreads();
    for (unsigned at = threadIdx.x; at < here; at += THREADS) {
        int b = 0;
#pragma unroll
        for (int other = 1; other < BUCKETS; other++) b += at >= start[other];
        pieces[b][begin[b] + (at - start[b])] = held[at];
    }
}
"""
_THREADS, _EACH = 256, 16


class Buckets:
    """Partitions keys of uint32 into a few buckets, up to 32, by a kernel, which reads them twice,
    to count and to place them, and writes them once."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._kernels: dict[int, Any] = {}

    def _kernel(self, buckets: int) -> Any:
        """Compiled for so many, whose counts are in registers."""
        if buckets not in self._kernels:
            sizes = {"BUCKETS": buckets, "THREADS": _THREADS, "EACH": _EACH}
            options = tuple(f"-D{name}={size}" for name, size in sizes.items())
            self._kernels[buckets] = self._cupy.RawKernel(_PARTITION, "partition", options)
        return self._kernels[buckets]

    def count(self, keys: Any, splitters: Any, counts: Any) -> None:
        """See :class:`Partitions`."""
        counts.fill(0)
        self._run(keys, splitters, counts, np.uint64(0))

    def place(self, keys: Any, splitters: Any, pieces: Sequence[Any]) -> None:
        """See :class:`Partitions`."""
        cupy = self._cupy
        pointers = cupy.asarray(np.array([piece.data.ptr for piece in pieces], np.uint64))
        self._run(keys, splitters, cupy.zeros(len(pieces), np.int64), pointers)

    def _run(self, keys: Any, splitters: Any, following: Any, pieces: Any) -> None:
        blocks = -(-len(keys) // (_THREADS * _EACH))
        given = keys, np.int64(len(keys)), splitters, following, pieces
        self._kernel(len(following))((blocks,), (_THREADS,), given)


def owner(row: int, gpus: int) -> Any:
    """Whose a row of tiles of a lower triangle is: to and fro, so that nobody has the longer one of
    each two."""
    turn = row % (2 * gpus)
    return gpu(min(turn, 2 * gpus - 1 - turn))


def spread(regions: Any, gpus: int, lower: bool = False) -> list[ch.Task[Any]]:
    """Brings tiles to their owners, so that a run begins with them there.

    Args:
        regions: a grid of tiles of two dimensions.
        gpus: how many GPUs own them, row by row: see :func:`owner`.
        lower: only those on the diagonal and below it.
    """
    rows, columns = regions.shape
    return [
        regions[i, j].prefetch(owner(i, gpus))
        for i in range(rows)
        for j in range(min(i + 1, columns) if lower else columns)
    ]


def cholesky(A: Any, gpus: int, kernels: Kernels) -> None:
    """Spawns the tasks that overwrite the lower triangle of a matrix with its Cholesky factor.

    Args:
        A: the tiles of the matrix, a grid of two dimensions.
        gpus: how many GPUs own them, row by row: see :func:`owner`.
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
    owners = [owner(i, gpus) for i in range(n)]
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


def product(A: Any, B: Any, C: Any, gpus: int, kernels: Products) -> None:
    """Spawns the tasks of ``C = A @ B``, on tiles: rows of tiles of C have owners in turns.

    An owner begins with the column of its row's number: where columns of tiles of B have owners in
    turns too, it has that one, and the others come meanwhile.
    """

    @ch.task(array_library=kernels.library)
    def multiply(a: ch.In[Any], b: ch.In[Any], c: ch.Out[Any]) -> None:
        kernels.multiply(a, b, c)

    @ch.task(array_library=kernels.library)
    def multiply_add(a: ch.In[Any], b: ch.In[Any], c: ch.InOut[Any]) -> None:
        kernels.multiply_add(a, b, c)

    (rows, inner), columns = A.shape, B.shape[1]
    for i in range(rows):
        placement = gpu(i % gpus)
        for j in ((i + step) % columns for step in range(columns)):
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


def kmeans(points: ch.Array, centers: ch.Array, rounds: int, gpus: int, shards: int = 1) -> None:
    """Spawns rounds of k-means. Each shard of the points, some for each GPU, has totals of its own:
    what reduces into one array, ``ch.Sum``, is combined on the host, which has to wait for it.

    Args:
        points: (n, d).
        centers: (k, d).
        rounds: how many.
        gpus: over how many GPUs.
        shards: how many tasks a round on each.
    """

    @ch.task
    def assign(points: ch.In[Any], centers: ch.In[Any], totals: ch.Out[Any]) -> None:
        xp = ch.current().xp
        distances = (centers**2).sum(axis=1) - 2.0 * points @ centers.T
        nearest = distances.argmin(axis=1)
        # One-hot rows, so that sums are products.
        member = (nearest[None, :] == xp.arange(len(centers))[:, None]).astype(points.dtype)
        totals[:, :-1] = member @ points
        totals[:, -1] = member.sum(axis=1)

    @ch.task
    def move(totals: ch.In[Any], centers: ch.InOut[Any]) -> None:
        xp = ch.current().xp
        every = totals.sum(axis=0)
        count = every[:, -1:]
        centers[...] = xp.where(count > 0, every[:, :-1] / xp.maximum(count, 1), centers)

    (k, d), parts = centers.shape, points.shards(gpus * shards)
    # Sums, and numbers of points.
    totals = ch.empty((len(parts), k, d + 1), centers.dtype)
    for _ in range(rounds):
        for at, part in enumerate(parts):
            assign.options(placement=gpu(at // shards))(part, centers, totals[at])
        move.options(placement=gpu(0))(totals, centers)


def fft2(
    x: ch.Array,
    between: ch.Array,
    y: ch.Array,
    gpus: int,
    transforms: Transforms,
    rounds: int = 1,
    parts: int = 4,
) -> list[ch.Task[None]]:
    """Spawns two-dimensional Fourier transforms of an image, of tasks over a set of GPUs.

    A task transforms the rows, of which each GPU has some. Then each is to have columns, part by
    part, and a task transforms those. What other GPUs have of them comes over the links, while the
    parts before are transformed. The host enqueues all that.

    Args:
        x: the image, of complex64; each GPU of the set has some of its rows.
        between: of the same shape and type, for the transforms of rows.
        y: the transform, of the same shape; each GPU has some of the columns of each part.
        gpus: how many are in the set.
        transforms: what each does.
        rounds: how many, one after the other.
        parts: in how many parts the columns are transformed.

    Returns:
        The last task of each.
    """
    width = x.shape[1]
    parts = min(parts, width // gpus)
    edges = [width * part // parts for part in range(parts + 1)]

    @ch.task(placement=gpu * gpus, shards={"x": 0, "out": 0})
    def rows(x: ch.In[Sequence[Any]], out: ch.Out[Sequence[Any]]) -> None:
        for at, _ in enumerate(ch.current().each()):
            transforms.rows(x[at], out[at])

    @ch.task(placement=gpu * gpus, shards={"x": 1, "out": 1}, memory=2 * x.nbytes // gpus // parts)
    def columns(x: ch.In[Sequence[Any]], out: ch.Out[Sequence[Any]]) -> None:
        for at, _ in enumerate(ch.current().each()):
            transforms.columns(x[at], out[at])

    found = []
    for _ in range(rounds):
        rows(x, between)
        blocks = (slice(a, b) for a, b in itertools.pairwise(edges))
        found.append([columns(between[:, block], y[:, block]) for block in blocks][-1])
    return found


def _cuts(extents: Sequence[int]) -> list[slice]:
    """The ranges that follow one another with these extents."""
    ends = list(itertools.accumulate(extents, initial=0))
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


SAMPLES = 16_384
"""Samples at most that the keys of a GPU give."""


def sample_sort(
    keys: ch.Array, result: ch.Array, gpus: int, partitions: Partitions, parts: int = 4
) -> list[ch.Task[None]]:
    """Spawns the tasks that sort keys over several GPUs.

    Each GPU has a shard of the keys, and gives samples of it. These give splitters, one bucket a
    GPU. When it is known how many keys are in each, which the host waits for, the keys are written,
    part by part, to where they are in their bucket, and a task a bucket sorts it. What it gets from
    other GPUs comes over the links while these write their next part.

    Args:
        keys: in any order; they stay so. One a GPU at least.
        result: of the same length and type, for the keys in order.
        gpus: how many.
        partitions: how keys are brought into buckets.
        parts: in how many parts each shard is.

    Returns:
        The last tasks.
    """
    least = len(keys) // gpus
    few, parts = min(SAMPLES, least), min(parts, least)
    samples = ch.empty((gpus, few), keys.dtype)
    splitters = ch.empty(gpus - 1, keys.dtype)
    counts = ch.empty((gpus * parts, gpus), np.int64)

    @ch.task
    def sample(shard: ch.In[Any], few: ch.Out[Any]) -> None:
        few[...] = shard[:: len(shard) // len(few)][: len(few)]

    @ch.task(placement=gpu(0))
    def split(samples: ch.In[Any], splitters: ch.Out[Any]) -> None:
        every = np.sort(samples.reshape(-1))
        for at in range(1, gpus):
            splitters[at - 1 : at] = every[at * len(every) // gpus]

    @ch.task
    def count(part: ch.In[Any], splitters: ch.In[Any], counts: ch.Out[Any]) -> None:
        partitions.count(part, splitters, counts)

    @ch.task
    def place(part: ch.In[Any], splitters: ch.In[Any], pieces: ch.Out[list[Any]]) -> None:
        partitions.place(part, splitters, pieces)

    @ch.task
    def sort(bucket: ch.InOut[Any]) -> None:
        bucket.sort()

    shards = keys.shards(gpus)
    # Part by part, so that all GPUs begin at once.
    owned = [
        (gpu(at), part)
        for every in zip(*(shard.shards(parts) for shard in shards), strict=True)
        for at, part in enumerate(every)
    ]
    for at, shard in enumerate(shards):
        sample.options(placement=gpu(at))(shard, samples[at])
    split(samples, splitters)
    for (owner, part), found in zip(owned, counts, strict=True):
        count.options(placement=owner)(part, splitters, found)

    # Bucket by bucket, and in each of them part by part.
    ends = counts.numpy().T.cumsum().reshape(gpus, len(owned))
    edges = np.concatenate([[0], ends.reshape(-1)])
    for at, (owner, part) in enumerate(owned):
        first = range(at, gpus * len(owned), len(owned))
        place.options(placement=owner)(
            part, splitters, [result[edges[piece] : edges[piece + 1]] for piece in first]
        )
    buckets = itertools.pairwise([0, *ends[:, -1]])
    return [
        sort.options(placement=gpu(at))(result[begin:end])
        for at, (begin, end) in enumerate(buckets)
    ]
