"""Programs on managed arrays over several GPUs, which ``charioteer bench gpu`` times.

Each is one function that spawns its tasks and gives what tells when they are done. Where a task
runs is said: tiles and shards have an owner each, in turns, so that what is measured is the
runtime and not a policy. Kernels are a parameter: :class:`Portable` ones are NumPy's interface, for
any device; :class:`Blas`, :class:`Bfloat16`, :class:`CuFft` and :class:`MergePaths` call the
libraries of NVIDIA's GPUs, or are kernels of their own, and work in place where they can.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

import charioteer as ch
from charioteer import gpu

__all__ = [
    *(
        "Bfloat16",
        "Blas",
        "CuFft",
        "Kernels",
        "MergePaths",
        "Merges",
        "Portable",
        "Products",
        "Stripes",
        "Transforms",
        "cholesky",
        "fft2",
        "jacobi",
        "kmeans",
        "merge_sort",
        "owner",
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


class Merges(Protocol):
    """What a sort does with runs of keys that are in order."""

    def merge(self, first: Sequence[Any], second: Sequence[Any], begin: int, out: Any) -> None:
        """Write a part of what two runs come to.

        Args:
            first: a run, in pieces on devices of the set.
            second: another one.
            begin: where in both, merged, the part begins.
            out: the part, on the current device.
        """


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

    def merge(self, first: Sequence[Any], second: Sequence[Any], begin: int, out: Any) -> None:
        """See :class:`Merges`."""
        pieces = [*first, *second]
        every = ch.current().xp.empty(sum(map(len, pieces)), out.dtype)
        for piece, where in zip(pieces, _cuts(map(len, pieces)), strict=True):
            every[where] = piece
        every.sort()
        out[...] = every[begin : begin + len(out)]


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


_MERGE = r"""
// An ordered run lies on several GPUs, piece after piece.
template <int PIECES>
struct Run {
    const unsigned* piece[PIECES];
    long long end[PIECES];
    __device__ long long length() const { return end[PIECES - 1]; }
    __device__ unsigned operator[](long long at) const {
        const unsigned* found = piece[0] + at;
#pragma unroll
        for (int p = 1; p < PIECES; p++)
            if (at >= end[p - 1]) found = piece[p] + (at - end[p - 1]);
        return *found;
    }
};
#define RUNS const Run<FIRST> first = {{FIRST_PIECES}, {FIRST_ENDS}}; \
             const Run<SECOND> second = {{SECOND_PIECES}, {SECOND_ENDS}};
#define TILE (THREADS * EACH)

// How many of the first `before` elements of both runs are of the first one: from `low` to `high`.
template <class A, class B>
__device__ long long divide(const A& first, const B& second, long long before, long long low,
                            long long high) {
    while (low < high) {
        const long long middle = (low + high) / 2;
        if (first[middle] <= second[before - 1 - middle]) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Divides where tiles of the output begin, and where the last one ends. Without `fine` at each
// COARSEth: then those between are searched for in what that leaves, side by side.
extern "C" __global__ void split(PARAMETERS, long long begin, long long count, int fine,
                                 long long* splits) {
    RUNS
    const int tiles = (int)((count + TILE - 1) / TILE);
    int tile = blockIdx.x * THREADS + threadIdx.x;
    if (!fine) tile = (int)min((long long)tile * COARSE, (long long)tiles);
    else if (tile >= tiles || tile % COARSE == 0) return;
    const long long before = begin + min((long long)tile * TILE, count);
    long long low = max(0ll, before - second.length()), high = min(before, first.length());
    if (fine) {
        const int last = tile / COARSE * COARSE, next = min(last + COARSE, tiles);
        low = max(low, splits[last]);
        high = min(high, splits[next]);
    }
    splits[tile] = divide(first, second, before, low, high);
}

// Merges a tile a block: brings it into shared memory, where each thread merges a part.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    merge(PARAMETERS, long long begin, long long count,
                                 const long long* splits, unsigned* out) {
    RUNS
    __shared__ unsigned held[TILE + EACH];
    const long long offset = (long long)blockIdx.x * TILE;
    const int total = (int)min((long long)TILE, count - offset);
    const long long from = splits[blockIdx.x], other = begin + offset - from;
    const int some = (int)(splits[blockIdx.x + 1] - from);
    unsigned key[EACH];
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int at = k * THREADS + threadIdx.x;
        if (at < total) key[k] = at < some ? first[from + at] : second[other + at - some];
    }
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int at = k * THREADS + threadIdx.x;
        if (at < total) held[at] = key[k];
    }
    __syncthreads();
    const int before = min((int)threadIdx.x * EACH, total);
    const unsigned* rest = held + some;
    int a = (int)divide(held, rest, before, max(0, before - (total - some)), min(before, some));
    int b = before - a;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const bool is_first = b >= total - some || (a < some && held[a] <= rest[b]);
        key[k] = is_first ? held[a++] : rest[b++];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < EACH; k++) held[threadIdx.x * EACH + k] = key[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int at = k * THREADS + threadIdx.x;
        if (at < total) out[offset + at] = held[at];
    }
}
"""
_MERGERS, _KEYS, _COARSE = 512, 15, 64


class MergePaths:
    """Merges runs of keys of uint32 by kernels, each GPU its part, whose ends it finds by binary
    search. They read what other GPUs have over the links."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._kernels: dict[tuple[int, int], Any] = {}

    def _module(self, first: int, second: int) -> Any:
        """Compiled for runs of so many pieces, which are parameters."""
        if (first, second) not in self._kernels:
            source, pieces = _MERGE, range(first + second)
            for name, given in {
                "PARAMETERS": [f"const unsigned* piece{at}, long long end{at}" for at in pieces],
                "FIRST_PIECES": [f"piece{at}" for at in pieces[:first]],
                "FIRST_ENDS": [f"end{at}" for at in pieces[:first]],
                "SECOND_PIECES": [f"piece{at}" for at in pieces[first:]],
                "SECOND_ENDS": [f"end{at}" for at in pieces[first:]],
            }.items():
                source = source.replace(name, ", ".join(given))
            sizes = {"THREADS": _MERGERS, "EACH": _KEYS, "COARSE": _COARSE}
            sizes |= {"FIRST": first, "SECOND": second}
            options = tuple(f"-D{name}={size}" for name, size in sizes.items())
            self._kernels[first, second] = self._cupy.RawModule(code=source, options=options)
        return self._kernels[first, second]

    def merge(self, first: Sequence[Any], second: Sequence[Any], begin: int, out: Any) -> None:
        """See :class:`Merges`."""
        tiles = -(-len(out) // (_MERGERS * _KEYS))
        splits = self._cupy.empty(tiles + 1, np.int64)
        given: list[Any] = []
        for run in (first, second):
            for piece, end in zip(run, itertools.accumulate(map(len, run)), strict=True):
                # The address, since CuPy warns of arrays of other GPUs.
                given += np.uint64(piece.data.ptr), np.int64(end)
        given += np.int64(begin), np.int64(len(out))
        module = self._module(len(first), len(second))
        split, threads = module.get_function("split"), (_MERGERS,)
        for fine, searches in enumerate((-(-tiles // _COARSE) + 1, tiles)):
            split((-(-searches // _MERGERS),), threads, (*given, np.int32(fine), splits))
        module.get_function("merge")((tiles,), threads, (*given, splits, out))


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


@ch.task
def _potrf(kernels: Kernels, a: ch.InOut[Any]) -> None:
    kernels.potrf(a)


@ch.task
def _trsm(kernels: Kernels, diagonal: ch.In[Any], a: ch.InOut[Any]) -> None:
    kernels.trsm(diagonal, a)


@ch.task
def _syrk(kernels: Kernels, a: ch.In[Any], c: ch.InOut[Any]) -> None:
    kernels.syrk(a, c)


@ch.task
def _gemm(kernels: Kernels, a: ch.In[Any], b: ch.In[Any], c: ch.InOut[Any]) -> None:
    kernels.gemm(a, b, c)


def cholesky(A: Any, gpus: int, kernels: Kernels) -> None:
    """Spawns the tasks that overwrite the lower triangle of a matrix with its Cholesky factor.

    Args:
        A: the tiles of the matrix, a grid of two dimensions.
        gpus: how many GPUs own them, row by row: see :func:`owner`.
        kernels: what to do with tiles.
    """
    n = A.shape[0]
    owners = [owner(i, gpus) for i in range(n)]
    # The further left a task writes the more urgent it is, and the diagonal, for which its column
    # waits, before all below. A solution is as urgent as the updates that read it: in front of old
    # updates it would hold up a GPU, whose bodies run ahead, until the diagonal's factor comes.
    for k in range(n):
        _potrf.options(priority=3 * (n - k) + 2, placement=owners[k])(kernels, A[k, k])
        for i in range(k + 1, n):
            solve = _trsm.options(priority=3 * (n - k - 1), placement=owners[i])
            solve(kernels, A[k, k], A[i, k])
        for j in range(k + 1, n):
            update = _syrk.options(priority=3 * (n - j) + 1, placement=owners[j])
            update(kernels, A[j, k], A[j, j])
            for i in range(j + 1, n):
                multiply = _gemm.options(priority=3 * (n - j), placement=owners[i])
                multiply(kernels, A[i, k], A[j, k], A[i, j])


@ch.task
def _multiply(kernels: Products, a: ch.In[Any], b: ch.In[Any], c: ch.Out[Any]) -> None:
    kernels.multiply(a, b, c)


@ch.task
def _multiply_add(kernels: Products, a: ch.In[Any], b: ch.In[Any], c: ch.InOut[Any]) -> None:
    kernels.multiply_add(a, b, c)


def product(A: Any, B: Any, C: Any, gpus: int, kernels: Products) -> None:
    """Spawns the tasks of ``C = A @ B``, on tiles: rows of tiles of C have owners in turns.

    An owner begins with the column of its row's number: where columns of tiles of B have owners in
    turns too, it has that one, and the others come meanwhile.
    """
    (rows, inner), columns = A.shape, B.shape[1]
    for i in range(rows):
        multiply, multiply_add = (
            one.options(placement=gpu(i % gpus), array_library=kernels.library)
            for one in (_multiply, _multiply_add)
        )
        for j in ((i + step) % columns for step in range(columns)):
            multiply(kernels, A[i, 0], B[0, j], C[i, j])
            for k in range(1, inner):
                multiply_add(kernels, A[i, k], B[k, j], C[i, j])


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


@ch.task
def _relax(old: ch.In[Any], new: ch.InOut[Any]) -> None:
    inner = new[1:-1, 1:-1]
    np.add(old[:-2, 1:-1], old[2:, 1:-1], out=inner)
    inner += old[1:-1, :-2]
    inner += old[1:-1, 2:]
    inner *= 0.25


@ch.task
def _send(row: ch.In[Any], halo: ch.Out[Any]) -> None:
    halo[...] = row


def jacobi(old: Stripes, new: Stripes, sweeps: int, gpus: int) -> Stripes:
    """Spawns sweeps of Jacobi's iteration: a task a stripe, and one for each row that a neighbour
    needs. Stripes next to each other have one owner, as far as they can.

    Returns:
        The one of the two that has the last sweep.
    """
    count = len(old.arrays)
    owners = [gpu(at * gpus // count) for at in range(count)]
    for _ in range(sweeps):
        for at in range(count):
            _relax.options(placement=owners[at])(old.arrays[at], new.arrays[at])
        for at in range(count - 1):
            upper, lower = new.arrays[at], new.arrays[at + 1]
            _send.options(placement=owners[at + 1])(upper[-2:-1], lower[:1])
            _send.options(placement=owners[at])(lower[1:2], upper[-1:])
        old, new = new, old
    return old


@ch.task
def _assign(points: ch.In[Any], centers: ch.In[Any], totals: ch.Out[Any]) -> None:
    xp = ch.current().xp
    distances = (centers**2).sum(axis=1) - 2.0 * points @ centers.T
    nearest = distances.argmin(axis=1)
    # One-hot rows, so that sums are products.
    member = (nearest[None, :] == xp.arange(len(centers))[:, None]).astype(points.dtype)
    totals[:, :-1] = member @ points
    totals[:, -1] = member.sum(axis=1)


@ch.task
def _move(totals: ch.In[Any], centers: ch.InOut[Any]) -> None:
    xp = ch.current().xp
    every = totals.sum(axis=0)
    count = every[:, -1:]
    centers[...] = xp.where(count > 0, every[:, :-1] / xp.maximum(count, 1), centers)


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
    (k, d), parts = centers.shape, points.shards(gpus * shards)
    # Sums, and numbers of points.
    totals = ch.empty((len(parts), k, d + 1), centers.dtype)
    for _ in range(rounds):
        for at, part in enumerate(parts):
            _assign.options(placement=gpu(at // shards))(part, centers, totals[at])
        _move.options(placement=gpu(0))(totals, centers)


@ch.task(shards={"x": 0, "out": 0})
def _rows(transforms: Transforms, x: ch.In[Sequence[Any]], out: ch.Out[Sequence[Any]]) -> None:
    for at, _ in enumerate(ch.current().each()):
        transforms.rows(x[at], out[at])


@ch.task(shards={"x": 1, "out": 1})
def _columns(transforms: Transforms, x: ch.In[Sequence[Any]], out: ch.Out[Sequence[Any]]) -> None:
    for at, _ in enumerate(ch.current().each()):
        transforms.columns(x[at], out[at])


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

    rows = _rows.options(placement=gpu * gpus)
    columns = _columns.options(placement=gpu * gpus, memory=2 * x.nbytes // gpus // parts)
    found = []
    for _ in range(rounds):
        rows(transforms, x, between)
        blocks = (slice(a, b) for a, b in itertools.pairwise(edges))
        found.append([columns(transforms, between[:, one], y[:, one]) for one in blocks][-1])
    return found


def _cuts(extents: Iterable[int]) -> list[slice]:
    """The ranges that follow one another with these extents."""
    ends = list(itertools.accumulate(extents, initial=0))
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


@ch.task(shards={"keys": 0, "result": 0})
def _sort(merges: Merges, keys: ch.InOut[Sequence[Any]], result: ch.Out[Sequence[Any]]) -> None:
    context = ch.current()
    for at, _ in enumerate(context.each()):
        keys[at].sort()
    pieces, runs = list(keys), [[at] for at in range(len(keys))]
    while True:
        # Before this another GPU may still write what is about to be read.
        context.barrier()
        pairs = [runs[at : at + 2] for at in range(0, len(runs), 2)]
        runs, merged = [[*itertools.chain(*pair)] for pair in pairs], []
        for at, _ in enumerate(context.each()):
            which = next(which for which, run in enumerate(runs) if at in run)
            out = result[at] if len(runs) == 1 else context.xp.empty_like(keys[at])
            first, *others = [[pieces[one] for one in run] for run in pairs[which]]
            if others:
                begin = sum(len(pieces[one]) for one in runs[which] if one < at)
                merges.merge(first, others[0], begin, out)
            else:
                out[...] = pieces[at]
            merged.append(out)
        if len(runs) == 1:
            return
        pieces = merged


def merge_sort(keys: ch.Array, result: ch.Array, gpus: int, merges: Merges) -> ch.Task[None]:
    """Spawns the task that sorts keys over a set of GPUs.

    Each GPU sorts its shard. Then runs of one GPU become runs of two, and so on, until one is left:
    each GPU makes that part of a merged run which is to be its own, and reads what it needs of both
    runs, also on other GPUs. The host enqueues all that.

    Args:
        keys: in any order; then each GPU has its shard in order.
        result: of the same length and type, for the keys in order.
        gpus: how many are in the set.
        merges: how runs are merged.

    Returns:
        The task.
    """
    # What a sort works in, or two runs between the first and the last.
    memory = 2 * -(-keys.nbytes // gpus)
    return _sort.options(placement=gpu * gpus, memory=memory)(merges, keys, result)
