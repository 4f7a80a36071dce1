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

    def rows(self, x: Any) -> Any:
        """The transforms of all rows, in new memory."""

    def columns(self, y: Any) -> None:
        """Overwrite all columns with their transforms."""

    def pack(self, block: Any) -> Any:
        """What other devices may fetch of an array of this one."""

    def fetch(self, source: Any, target: Any) -> None:
        """Copy what was packed, here or on another device, to this one."""


class Partitions(Protocol):
    """What a sort does with a shard of its keys."""

    def partition(self, keys: Any, splitters: Any, out: Any, cuts: Any) -> None:
        """Put the keys into ``out`` bucket by bucket.

        Args:
            keys: in any order.
            splitters: the least key of each bucket but the first, in order.
            out: as many keys.
            cuts: where in ``out`` each bucket begins, and where the last one ends.
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

    def rows(self, x: Any) -> Any:
        """See :class:`Transforms`."""
        return ch.current().xp.fft.fft(x, axis=1)

    def columns(self, y: Any) -> None:
        """See :class:`Transforms`."""
        y[...] = ch.current().xp.fft.fft(y, axis=0)

    def pack(self, block: Any) -> Any:
        """See :class:`Transforms`."""
        return block.copy()

    def fetch(self, source: Any, target: Any) -> None:
        """See :class:`Transforms`."""
        target[...] = source

    def partition(self, keys: Any, splitters: Any, out: Any, cuts: Any) -> None:
        """See :class:`Partitions`. What is in order is in buckets too."""
        out[...] = np.sort(keys)
        cuts[0], cuts[-1] = 0, len(keys)
        cuts[1:-1] = np.searchsorted(out, splitters)


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


class CuFft:
    """Transforms of complex64 by cuFFT. Columns are transformed where they are, by a plan with
    strides: CuPy itself would transpose them, twice. A plan and its workspace belong to a device,
    and serve one task at a time."""

    def __init__(self) -> None:
        import cupy
        from cupy.cuda import cufft

        self._cupy, self._cufft = cupy, cufft

    def rows(self, x: Any) -> Any:
        """See :class:`Transforms`."""
        return self._cupy.fft.fft(x, axis=1)

    def columns(self, y: Any) -> None:
        """See :class:`Transforms`."""
        cufft, store, (n, width) = self._cufft, ch.current().store, y.shape
        key = "columns", n, width
        plan = store.get(key)
        if plan is None:
            # Elements of a column are a row apart, columns one element.
            layout = (n,), width, 1
            plan = cufft.PlanNd((n,), *layout, *layout, cufft.CUFFT_C2C, width, "C", 0, None)
            store[key] = plan
        plan.fft(y, y, cufft.CUFFT_FORWARD)

    def pack(self, block: Any) -> Any:
        """See :class:`Transforms`. The copy engines take rows that lie apart."""
        return block

    def fetch(self, source: Any, target: Any) -> None:
        """See :class:`Transforms`."""
        cuda = self._cupy.cuda
        rows, width = target.shape
        cuda.runtime.memcpy2DAsync(
            target.data.ptr, target.strides[0], source.data.ptr, source.strides[0],
            width * target.itemsize, rows, cuda.runtime.memcpyDefault,
            cuda.get_current_stream().ptr,
        )  # fmt: skip


_PARTITION = r"""
// Blocks of keys are brought into buckets in the order in which blocks come to it. `next` has where
// each bucket goes on, and is moved on by what a block has. Without `out` that is all: it counts.
// A block brings its keys into buckets in shared memory first: neighbours are written together.
extern "C" __global__ void partition(const unsigned* keys, long long n, const unsigned* splitters,
                                     unsigned long long* next, unsigned* out) {
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
    if (!out) return;
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
        out[begin[b] + (at - start[b])] = held[at];
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

    def partition(self, keys: Any, splitters: Any, out: Any, cuts: Any) -> None:
        """See :class:`Partitions`."""
        count, buckets = len(keys), len(splitters) + 1
        following = self._cupy.zeros(buckets, np.int64)
        kernel = self._kernel(buckets)
        shape = (-(-count // (_THREADS * _EACH)),), (_THREADS,)
        given = keys, np.int64(count), splitters, following
        kernel(*shape, (*given, np.uint64(0)))
        cuts[:1] = 0
        self._cupy.cumsum(following, out=cuts[1:])
        following[...] = cuts[:-1]
        kernel(*shape, (*given, out))


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


def fft2(
    x: ch.Array, y: ch.Array, gpus: int, transforms: Transforms, rounds: int = 1
) -> list[ch.Task[None]]:
    """Spawns two-dimensional Fourier transforms of an image, one task each, over a set of GPUs.

    Each GPU transforms its rows. When all are as far it fetches what is in its columns, over the
    links, and transforms these. The host enqueues all that.

    Args:
        x: the image, of complex64; each GPU of the set has some of its rows.
        y: the transform, of the same shape; each GPU has some of its columns.
        gpus: how many are in the set.
        transforms: what each does.
        rounds: how many, one after the other.
    """
    # The rows' transforms, what is packed of them, and as much again to work in.
    memory = 3 * x.nbytes // gpus

    @ch.task(placement=gpu * gpus, shards={"x": 0, "y": 1}, memory=memory)
    def transform(x: ch.In[Sequence[Any]], y: ch.Out[Sequence[Any]]) -> None:
        context = ch.current()
        rows, columns = _cuts([len(one) for one in x]), _cuts([one.shape[1] for one in y])
        packed = []
        for i, _ in enumerate(context.each()):
            transformed = transforms.rows(x[i])
            packed.append([transforms.pack(transformed[:, block]) for block in columns])
        # Before this a device may still write what another one is about to fetch.
        context.barrier()
        for j, _ in enumerate(context.each()):
            for i in range(gpus):
                transforms.fetch(packed[i][j], y[j][rows[i]])
            transforms.columns(y[j])

    return [transform(x, y) for _ in range(rounds)]


def _cuts(extents: Sequence[int]) -> list[slice]:
    """The ranges that follow one another with these extents."""
    ends = list(itertools.accumulate(extents, initial=0))
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


SAMPLES = 4096
"""Samples at most that a shard gives."""


def sample_sort(
    keys: ch.Array, scratch: ch.Array, result: ch.Array, gpus: int, partitions: Partitions
) -> list[ch.Task[None]]:
    """Spawns the tasks that sort keys over several GPUs.

    Each GPU has a shard of the keys, and gives samples of it. These give splitters, by which each
    shard is brought into buckets, two a GPU. When it is known how large they are, which the host
    waits for, a task a bucket collects its pieces and sorts them. Pieces from other GPUs come over
    the links while buckets before them are sorted.

    Args:
        keys: in any order; they stay so.
        scratch: of the same length and type, for the shards in buckets.
        result: likewise, for the keys in order.
        gpus: how many.
        partitions: how a shard is brought into buckets.

    Returns:
        The last tasks.
    """
    buckets = 2 * gpus
    few = max(1, min(SAMPLES, len(keys) // gpus))
    samples = ch.empty((gpus, few), keys.dtype)
    splitters = ch.empty(buckets - 1, keys.dtype)
    cuts = ch.empty((gpus, buckets + 1), np.int64)

    @ch.task
    def sample(part: ch.In[Any], few: ch.Out[Any]) -> None:
        few[...] = part[:: len(part) // len(few)][: len(few)]

    @ch.task(placement=gpu(0))
    def split(samples: ch.In[Any], splitters: ch.Out[Any]) -> None:
        every = np.sort(samples.reshape(-1))
        step = len(every) / buckets
        for at in range(1, buckets):
            splitters[at - 1 : at] = every[int(at * step)]

    @ch.task
    def partition(
        part: ch.In[Any], splitters: ch.In[Any], out: ch.Out[Any], cuts: ch.Out[Any]
    ) -> None:
        partitions.partition(part, splitters, out, cuts)

    @ch.task
    def collect(pieces: ch.In[list[Any]], bucket: ch.Out[Any]) -> None:
        np.concatenate(pieces, out=bucket)
        bucket.sort()

    parts, shards = keys.shards(gpus), scratch.shards(gpus)
    for at in range(gpus):
        sample.options(placement=gpu(at))(parts[at], samples[at])
    split(samples, splitters)
    for at in range(gpus):
        partition.options(placement=gpu(at))(parts[at], splitters, shards[at], cuts[at])

    begins, start, last = cuts.numpy(), 0, []
    for at in range(buckets):
        pieces = [
            shard[begin[at] : begin[at + 1]] for shard, begin in zip(shards, begins, strict=True)
        ]
        stop = start + sum(piece.size for piece in pieces)
        last.append(collect.options(placement=gpu(at // 2))(pieces, result[start:stop]))
        start = stop
    return last
