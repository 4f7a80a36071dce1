"""The measures of ``charioteer bench gpu`` that have managed arrays: chains by regions, copies,
kernels that copies hide behind, factorizations, products, transforms and sorts over one and two
GPUs, working sets larger than the memory.

Everything is on the GPUs when a clock starts, and stays there when it ends, unless copies are what
is measured. What the results are compared with is computed by one library call on the first GPU,
in the same run.

*What the link allows.* A transform and a sort send half of what each of two GPUs has to the other,
so that twice one GPU's rate is out of reach. Their bound is half the time of one GPU's library
call, and after it the time that plain copies of these bytes take, both ways at once and with
nothing beside them, both measured in the same round. What a program computes to cut its data into
pieces is not in the bound, and neither is what it hides of the copies behind work.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Self

import numpy as np

import charioteer as ch
from charioteer import gpu
from charioteer.bench import tiled
from charioteer.bench.harness import (
    OURS,
    Bar,
    Contestant,
    Key,
    Measure,
    Missing,
    Result,
    Sample,
    absolute,
    ratio,
)

__all__ = ["NAMES", "PER_TASK", "PLAIN", "WAITS", "Chain", "Sizes", "measures", "plain_chain"]

NAMES = (
    *("regions", "copies", "overlap", "cholesky", "product", "bf16", "fft", "sort"),
    *("kmeans", "jacobi", "spill"),
)

PLAIN = "plain CuPy"
TORCH = "plain PyTorch"
PER_TASK = "time per task"
WAITS = "host synchronisations"
RATE = "rate"
TIME = "time"
SPEED = "bandwidth"
MiB = 1 << 20

CHAIN = 1.7
COPY = 0.95
OVERLAP = 0.9
"""Part of the overlap of streams by hand."""
ONE, TWO = 0.9, 1.85
"""Parts of cuSOLVER's rate that one GPU has to reach, and times of one that two have to."""
PRODUCT = 1.9
SCALE = 1.8
SPILL = 0.85
LINK = 0.8
"""Part of what the link allows that a transform and a sort have to reach."""


@dataclass(frozen=True)
class Sizes:
    """How large the problems are.

    Attributes:
        length: tasks of the chain.
        region: bytes of a region that is copied.
        cholesky: rows of the matrix that is factored, of float64.
        tile: rows of its tiles.
        product: rows of the matrices that are multiplied, of float32 and of bfloat16.
        fft: rows and columns of the image that is transformed, of complex64.
        keys: how many keys are sorted, of uint32.
        points: how many points are clustered.
        grid: inner rows of the grid that is relaxed.
        budget: bytes of a GPU's memory that the runtime may use where the working set is larger.
    """

    length: int = 10_000
    region: int = 64 * MiB
    cholesky: int = 32_768
    tile: int = 2_048
    product: int = 32_768
    fft: int = 16_384
    keys: int = 500_000_000
    points: int = 40_000_000
    grid: int = 30_000
    budget: int = 8 << 30


def measures(sizes: Sizes, params: dict[str, Any], need: Callable[[int], Any]) -> list[Measure]:
    """All measures; ``need(n)`` gives CuPy where there are n GPUs, or raises ``Missing``."""
    return [
        _regions(sizes, params, need),
        _copies(sizes, params, need),
        _overlap(params, need),
        _cholesky(sizes, params, need),
        _product(sizes, params, need),
        _bf16(sizes, params, need),
        _fft(sizes, params, need),
        _sort(sizes, params, need),
        _kmeans(sizes, params, need),
        _jacobi(sizes, params, need),
        _spill(sizes, params, need),
    ]


Need = Callable[[int], Any]


def _wait(tasks: list[ch.Task[Any]]) -> None:
    for task in tasks:
        task.result()


def _release(cupy: Any) -> None:
    """Gives back what libraries keep of the GPUs' memory."""
    for device in range(cupy.cuda.runtime.getDeviceCount()):
        with cupy.cuda.Device(device):
            cupy.get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


# ---- chains -----------------------------------------------------------------------------------


def plain_chain(cupy: Any, length: int) -> Sample:
    """A loop of ``cupy.add(x, y, out=x)`` for 1,024 numbers on a stream, until it is complete."""
    x, y = cupy.zeros(1024, cupy.float32), cupy.ones(1024, cupy.float32)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        cupy.add(x, y, out=x)
        stream.synchronize()
        start = perf_counter()
        for _ in range(length):
            cupy.add(x, y, out=x)
        stream.synchronize()
        time = perf_counter() - start
    return Sample({PER_TASK: 1e6 * time / length})


class Chain:
    """Times a chain of tasks on the first GPU, from the begin of a ``with`` block to its end, and
    counts how often the host waits for the GPU meanwhile.

    Args:
        rt: the runtime.
        length: how many tasks.
    """

    def __init__(self, rt: ch.Runtime, length: int) -> None:
        self._rt, self._length = rt, length
        self._time, self._waited = 0.0, 0

    def _waits(self) -> int:
        return int(self._rt.stats()["devices"][gpu(0)]["host_synchronisations"])

    def __enter__(self) -> Self:
        self._waited = self._waits()
        self._time = perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._time = perf_counter() - self._time
        self._waited = self._waits() - self._waited

    @property
    def sample(self) -> Sample:
        """What came of it, when the block has ended."""
        return Sample({PER_TASK: 1e6 * self._time / self._length, WAITS: self._waited})


def _regions(sizes: Sizes, params: dict[str, Any], need: Need) -> Measure:
    length = sizes.length
    case = f"chain of {length} additions, by regions"

    def plain() -> Sample:
        return plain_chain(need(1), length)

    def ours() -> Sample:
        cupy = need(1)

        @ch.task(placement=gpu(0))
        def add(x: ch.InOut[Any], y: ch.In[Any]) -> None:
            cupy.add(x, y, out=x)

        x, y = ch.zeros(1024, np.float32), ch.full(1024, 1, np.float32)
        with ch.Runtime(workers=1) as rt:
            add(x, y).result()
            with Chain(rt, length) as chain:
                for _ in range(length - 1):
                    add(x, y)
                add(x, y).result()
        assert float(x.numpy()[0]) == length + 1
        return chain.sample

    return Measure(
        name="regions",
        title="A chain of cupy.add(x, y, out=x), 1,024 numbers, one a task, by regions",
        contestants=[
            Contestant(PLAIN, case, plain, None, params),
            Contestant(OURS, case, ours, 1, params),
        ],
        units={PER_TASK: "µs", WAITS: ""},
        bars=[
            Bar(
                case=case,
                metric=f"{OURS} / {PLAIN}",
                unit="x",
                values=ratio(Key(OURS, case, 1), Key(PLAIN, case), PER_TASK),
                limit=CHAIN,
                lacking=PLAIN,
            ),
            absolute(case, WAITS, "", 0, 1),
        ],
        note="The order is inferred; the region stays where it is.",
    )


# ---- copies -----------------------------------------------------------------------------------

REGIONS = 32


def _copies(sizes: Sizes, params: dict[str, Any], need: Need) -> Measure:
    size = sizes.region
    ways = ("host to device", "device to host", "peer")
    cases = {way: f"{way}, {REGIONS} x {size // MiB} MiB" for way in ways}

    def plain(way: str) -> Sample:
        cupy = need(2 if way == "peer" else 1)
        runtime = cupy.cuda.runtime
        total = REGIONS * size
        with cupy.cuda.Device(0):
            on_device = cupy.cuda.alloc(total)
            pinned = cupy.cuda.alloc_pinned_memory(total)
            stream = cupy.cuda.Stream(non_blocking=True)
        other: Any = None
        if way == "peer":
            with cupy.cuda.Device(1):
                other = cupy.cuda.alloc(total)
                if runtime.deviceCanAccessPeer(1, 0):
                    _enable_peer(runtime, 0)
        time = 0.0
        for _ in range(2):  # the first one warms up
            stream.synchronize()
            start = perf_counter()
            for at in range(REGIONS):
                first = at * size
                if way == "host to device":
                    runtime.memcpyAsync(
                        on_device.ptr + first, pinned.ptr + first, size,
                        runtime.memcpyHostToDevice, stream.ptr,
                    )  # fmt: skip
                elif way == "device to host":
                    runtime.memcpyAsync(
                        pinned.ptr + first, on_device.ptr + first, size,
                        runtime.memcpyDeviceToHost, stream.ptr,
                    )  # fmt: skip
                else:
                    runtime.memcpyPeerAsync(
                        other.ptr + first, 1, on_device.ptr + first, 0, size, stream.ptr
                    )
            stream.synchronize()
            time = perf_counter() - start
        return Sample({SPEED: total / time / 1e9})

    def ours(way: str) -> Sample:
        need(2 if way == "peer" else 1)
        total = REGIONS * size

        @ch.task(placement=gpu(0))
        def touch(a: ch.InOut[Any]) -> None:
            a += 1

        A = ch.zeros(total // 4, np.float32)
        parts = A.shards(REGIONS)
        with ch.Runtime(workers=1):
            # Contexts, streams and pinned pages are there when the clock starts.
            ch.wait([touch(part) for part in parts])
            if way == "peer":
                _wait([part.prefetch(gpu(1)) for part in parts])
                ch.wait([touch(part) for part in parts])
                start = perf_counter()
                _wait([part.prefetch(gpu(1)) for part in parts])
                time = perf_counter() - start
            else:
                with A.host("rw"):
                    pass  # they come home, and are the host's alone
                start = perf_counter()
                _wait([part.prefetch(gpu(0)) for part in parts])
                time = perf_counter() - start
                if way == "device to host":
                    ch.wait([touch(part) for part in parts])
                    start = perf_counter()
                    with A.host("r"):
                        time = perf_counter() - start
        return Sample({SPEED: total / time / 1e9})

    return Measure(
        name="copies",
        title="Copies of regions beside those of pinned memory",
        contestants=[
            contestant
            for way, case in cases.items()
            for contestant in (
                Contestant(PLAIN, case, functools.partial(plain, way), None, params),
                Contestant(OURS, case, functools.partial(ours, way), 1, params),
            )
        ],
        units={SPEED: "GB/s"},
        bars=[
            Bar(
                case=case,
                metric=f"{OURS} / {PLAIN}",
                unit="x",
                values=ratio(Key(OURS, case, 1), Key(PLAIN, case), SPEED),
                limit=COPY,
                at_least=True,
                lacking=PLAIN,
            )
            for case in cases.values()
        ],
        note="Ours from the first call until the host knows that all are there.",
    )


JOBS, STREAMS, PIECE, STEPS = 96, 4, 16 * MiB, 3_000
"""Jobs, streams that share them, bytes that a job has either way, and operations on each number: as
long as a copy of it, to a factor of two."""


def _overlap(params: dict[str, Any], need: Need) -> Measure:
    case = f"{JOBS} kernels, {PIECE // MiB} MiB in and out each"
    count = PIECE // 4

    def kernel(cupy: Any) -> Any:
        return cupy.ElementwiseKernel(
            "float32 x",
            "float32 y",
            f"y = x; for (int i = 0; i < {STEPS}; i++) y = fmaf(y, 0.5f, 1.0f);",
            "halve",
        )

    def check(found: Any) -> None:
        """Halving and adding one ends at two, whatever it begins with."""
        assert (found == 2).all()

    def plain(streams: int) -> Sample:
        cupy = need(1)
        runtime = cupy.cuda.runtime
        work = kernel(cupy)
        memory = [cupy.cuda.alloc_pinned_memory(JOBS * PIECE) for _ in range(2)]
        given, found = (np.frombuffer(one, np.float32, JOBS * count) for one in memory)
        given[:], found[:] = 1, 0
        with cupy.cuda.Device(0):
            lanes = [
                (
                    cupy.cuda.Stream(non_blocking=True),
                    cupy.empty(count, np.float32),
                    cupy.empty(count, np.float32),
                )
                for _ in range(streams)
            ]
            time = 0.0
            for _ in range(2):  # the first one warms up
                runtime.deviceSynchronize()
                start = perf_counter()
                for job in range(JOBS):
                    stream, x, y = lanes[job % streams]
                    at = job * PIECE
                    with stream:
                        runtime.memcpyAsync(
                            x.data.ptr, memory[0].ptr + at, PIECE,
                            runtime.memcpyHostToDevice, stream.ptr,
                        )  # fmt: skip
                        work(x, y)
                        runtime.memcpyAsync(
                            memory[1].ptr + at, y.data.ptr, PIECE,
                            runtime.memcpyDeviceToHost, stream.ptr,
                        )  # fmt: skip
                for stream, _, _ in lanes:
                    stream.synchronize()
                time = perf_counter() - start
        check(found)
        return Sample({TIME: 1e3 * time})

    def ours() -> Sample:
        work = kernel(need(1))

        @ch.task(placement=gpu(0), share=1 / STREAMS)
        def job(x: ch.In[Any], y: ch.Out[Any]) -> None:
            work(x, y)

        given, found = ch.full((JOBS, count), 1, np.float32), ch.zeros((JOBS, count), np.float32)
        with ch.Runtime(workers=1):
            time = 0.0
            for _ in range(2):  # the first one warms up
                with given.host("rw"), found.host("rw") as old:
                    old[...] = 0  # both are the host's alone
                start = perf_counter()
                home = []
                for x, y in zip(given, found, strict=True):
                    job(x, y)
                    home.append(y.prefetch(ch.cpu))
                ch.wait(home)
                time = perf_counter() - start
            check(found.numpy())
        return Sample({TIME: 1e3 * time})

    one, several = f"{PLAIN}, one stream", f"{PLAIN}, {STREAMS} streams"

    return Measure(
        name="overlap",
        title=f"Independent kernels with copies both ways, on {STREAMS} streams",
        contestants=[
            Contestant(one, case, functools.partial(plain, 1), None, params),
            Contestant(several, case, functools.partial(plain, STREAMS), None, params),
            Contestant(OURS, case, ours, 1, params),
        ],
        units={TIME: "ms"},
        bars=[
            Bar(
                case=case,
                metric="overlap / that of streams by hand",
                unit="x",
                # What one stream takes, which both hide a part of, cancels out.
                values=ratio(Key(several, case), Key(OURS, case, 1), TIME),
                limit=OVERLAP,
                at_least=True,
                lacking=several,
            )
        ],
        note="From the first call until all results are at home.",
    )


def _enable_peer(runtime: Any, peer: int) -> None:
    try:
        runtime.deviceEnablePeerAccess(peer)
    except runtime.CUDARuntimeError as error:
        if "AlreadyEnabled" not in str(error):
            raise


# ---- factorization and product ----------------------------------------------------------------


def _scaled(
    name: str,
    title: str,
    case: str,
    unit: str,
    metric: str,
    params: dict[str, Any],
    *,
    plain: Callable[[], Sample] | None,
    ours: Callable[[int], Sample],
    bars: list[Bar],
    note: str,
    beside: str = PLAIN,
) -> Measure:
    contestants = [] if plain is None else [Contestant(beside, _on(case, 1), plain, None, params)]
    contestants += [
        Contestant(OURS, _on(case, gpus), functools.partial(ours, gpus), 4, params)
        for gpus in (1, 2)
    ]
    return Measure(
        name=name,
        title=title,
        contestants=contestants,
        units={metric: unit},
        bars=bars,
        runs=3,
        note=note,
    )


def _on(case: str, gpus: int) -> str:
    return f"{case}, {gpus} GPU" + ("s" if gpus > 1 else "")


def _times(case: str, metric: str, limit: float) -> Bar:
    """Two GPUs against one, where more is better."""
    one, two = (Key(OURS, _on(case, gpus), 4) for gpus in (1, 2))
    return Bar(
        case=case,
        metric="2 GPUs / 1",
        unit="x",
        values=ratio(two, one, metric),
        limit=limit,
        at_least=True,
        lacking="two GPUs",
    )


def _cholesky(sizes: Sizes, params: dict[str, Any], need: Need) -> Measure:
    n, tile = sizes.cholesky, min(sizes.tile, sizes.cholesky)
    case = f"Cholesky, float64, n = {n}"
    corner: dict[str, Any] = {}

    def matrix(xp: Any, rows: slice, columns: slice) -> Any:
        """A part of a matrix that is positive definite."""
        i, j = xp.arange(n)[rows, None], xp.arange(n)[None, columns]
        return xp.where(i == j, 2.0 * n, 0.0) + 1.0 / (1.0 + xp.abs(i - j))

    def plain() -> Sample:
        cupy = need(1)
        kernels = tiled.Blas()
        with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True) as stream:
            a = cupy.empty((n, n))
            for first in range(0, n, tile):
                a[first : first + tile] = matrix(cupy, slice(first, first + tile), slice(0, n))
            kernels.potrf(cupy.eye(4))
            stream.synchronize()
            start = perf_counter()
            kernels.potrf(a)
            stream.synchronize()
            time = perf_counter() - start
            corner["plain"] = cupy.asnumpy(a[-tile:, -tile:])
        del a
        _release(cupy)
        return Sample({RATE: n**3 / 3 / time / 1e12})

    def ours(gpus: int) -> Sample:
        cupy = need(gpus)
        kernels = tiled.Blas()

        @ch.task
        def build(a: ch.Out[Any], i: int, j: int) -> None:
            height, width = a.shape
            rows, columns = slice(i, i + height), slice(j, j + width)
            a[...] = matrix(cupy, rows, columns)

        A = ch.empty((n, n)).tiles((tile, tile))
        count = A.shape[0]
        with ch.Runtime(workers=4):
            small = ch.array(np.eye(64)).tiles((16, 16))
            with ch.TaskGroup():
                for i in range(count):
                    for j in range(i + 1):
                        build.options(placement=tiled.owner(i, gpus))(A[i, j], i * tile, j * tile)
                tiled.cholesky(small, gpus, kernels)
            start = perf_counter()
            with ch.TaskGroup():
                tiled.cholesky(A, gpus, kernels)
            time = perf_counter() - start
            found = np.tril(A[count - 1, count - 1].numpy())
            if "plain" in corner and n % tile == 0:
                wanted = np.tril(corner["plain"])
                error = np.abs(found - wanted).max() / np.abs(wanted).max()
                assert error < 1e-11, f"relative error {error:.1e}"
        _release(cupy)
        return Sample({RATE: n**3 / 3 / time / 1e12})

    one = _on(case, 1)
    return _scaled(
        "cholesky",
        f"Tiled Cholesky of {n} x {n}, tiles of {tile}",
        case,
        "TFLOP/s",
        RATE,
        params,
        plain=plain,
        ours=ours,
        bars=[
            Bar(
                case=one,
                metric=f"{OURS} / cuSOLVER potrf",
                unit="x",
                values=ratio(Key(OURS, one, 4), Key(PLAIN, one), RATE),
                limit=ONE,
                at_least=True,
                lacking=PLAIN,
            ),
            _times(case, RATE, TWO),
        ],
        note="Operands are on the GPUs at the start and at the end. Plain is cuSOLVER's potrf.",
    )


def _product(sizes: Sizes, params: dict[str, Any], need: Need) -> Measure:
    n = sizes.product

    def plain() -> Sample:
        cupy = need(1)
        with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True) as stream:
            a, b = cupy.full((n, n), 0.5, np.float32), cupy.full((n, n), 2, np.float32)
            c = cupy.empty((n, n), np.float32)
            cupy.matmul(a[:64], b, out=c[:64])
            stream.synchronize()
            start = perf_counter()
            cupy.matmul(a, b, out=c)
            stream.synchronize()
            time = perf_counter() - start
        del a, b, c
        _release(cupy)
        return Sample({RATE: 2 * n**3 / time / 1e12})

    return _multiplied(
        ("product", "float32", np.dtype(np.float32), PLAIN),
        n,
        params,
        need,
        plain=plain,
        kernels=tiled.Portable,
        encoded=float,
    )


def bfloat16(value: float) -> int:
    """The bits of the bfloat16 next to a number, as an int16 has them."""
    bits = int(np.float32(value).view(np.uint32))
    # Halfway between two it is the even one.
    return int(np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).view(np.int16))


def _bf16(sizes: Sizes, params: dict[str, Any], need: Need) -> Measure:
    n = sizes.product

    def library() -> Any:
        try:
            import torch
        except ImportError:
            raise Missing("PyTorch is not installed") from None
        return torch

    def plain() -> Sample:
        cupy, torch = need(1), library()
        stream = torch.cuda.Stream(device=0)
        with torch.cuda.device(0), torch.cuda.stream(stream):
            a, b = (
                torch.full((n, n), value, dtype=torch.bfloat16, device="cuda:0")
                for value in (0.5, 2.0)
            )
            c = torch.empty_like(a)
            torch.matmul(a, b, out=c)
            stream.synchronize()
            start = perf_counter()
            torch.matmul(a, b, out=c)
            stream.synchronize()
            time = perf_counter() - start
        del a, b, c
        _release(cupy)
        return Sample({RATE: 2 * n**3 / time / 1e12})

    def kernels() -> tiled.Products:
        library()
        return tiled.Bfloat16()

    return _multiplied(
        ("bf16", "bfloat16", np.dtype(np.int16), TORCH),
        n,
        params,
        need,
        plain=plain,
        kernels=kernels,
        encoded=bfloat16,
    )


def _multiplied(
    called: tuple[str, str, np.dtype[Any], str],
    n: int,
    params: dict[str, Any],
    need: Need,
    *,
    plain: Callable[[], Sample],
    kernels: Callable[[], tiled.Products],
    encoded: Callable[[float], float],
) -> Measure:
    """A product of matrices whose elements are all alike, which says what comes out.

    Args:
        called: the measure, the type of the elements, that of the array that holds them, and what
            ``plain`` is.
        n: rows.
        params: for the records.
        need: gives CuPy.
        plain: the same by one call.
        kernels: what to do with blocks.
        encoded: a number as the array holds it.
    """
    name, kind, dtype, beside = called
    block = -(-n // 2)
    case = f"matrix product, {kind}, n = {n}"

    def ours(gpus: int) -> Sample:
        cupy, products = need(gpus), kernels()

        @ch.task
        def fill(a: ch.Out[Any], value: float) -> None:
            a.fill(value)

        A = ch.empty((n, n), dtype).tiles((block, n))
        B = ch.empty((n, n), dtype).tiles((n, block))
        C = ch.empty((n, n), dtype).tiles((block, block))
        a, b = encoded(0.5), encoded(2.0)
        with ch.Runtime(workers=4):
            time = 0.0
            # The first time round libraries make what they need on each device and thread.
            for _ in range(2):
                with ch.TaskGroup():
                    for i in range(A.shape[0]):
                        fill.options(placement=gpu(i % gpus))(A[i, 0], a)
                        fill.options(placement=gpu(i % gpus))(B[0, i], b)
                        for j in range(C.shape[1]):
                            fill.options(placement=gpu(i % gpus))(C[i, j], 0)
                start = perf_counter()
                with ch.TaskGroup():
                    tiled.product(A, B, C, gpus, products)
                time = perf_counter() - start
            last = C[C.shape[0] - 1, C.shape[1] - 1]
            assert last[-1, -1].numpy() == encoded(n)
        _release(cupy)
        return Sample({RATE: 2 * n**3 / time / 1e12})

    one, two = _on(case, 1), _on(case, 2)
    return _scaled(
        name,
        f"A blocked matrix product of {n} x {n}, blocks of {block}",
        case,
        "TFLOP/s",
        RATE,
        params,
        plain=plain,
        ours=ours,
        bars=[
            Bar(
                case=two,
                metric=f"{OURS} / one cuBLAS call on 1 GPU",
                unit="x",
                values=ratio(Key(OURS, two, 4), Key(beside, one), RATE),
                limit=PRODUCT,
                at_least=True,
                lacking=beside,
            )
        ],
        beside=beside,
        note="Each GPU has half of each matrix at the start; the blocks of B are copied to both.",
    )


# ---- what the link allows ---------------------------------------------------------------------

ROUNDS_TIMED = 10


def _scrambled(xp: Any, first: int, count: int) -> Any:
    """Numbers that look random, uint32, the same for the same places."""
    found = xp.arange(first, first + count, dtype=np.uint64)
    found *= np.uint64(0x9E3779B97F4A7C15)
    found ^= found >> np.uint64(29)
    found *= np.uint64(0xBF58476D1CE4E5B9)
    found >>= np.uint64(32)
    return found.astype(np.uint32)


def _exchange(need: Need, size: int) -> Sample:
    """Milliseconds for so many bytes from each of two GPUs to the other, both ways at once."""
    cupy = need(2)
    runtime = cupy.cuda.runtime
    kept = []
    for own in (0, 1):
        with cupy.cuda.Device(own):
            if runtime.deviceCanAccessPeer(own, 1 - own):
                _enable_peer(runtime, 1 - own)
            kept.append(
                (
                    cupy.cuda.alloc(size),
                    cupy.cuda.alloc(size),
                    cupy.cuda.Stream(non_blocking=True),
                )
            )
    time = 0.0
    for _ in range(2):  # the first one warms up
        start = perf_counter()
        for _ in range(ROUNDS_TIMED):
            for own in (0, 1):
                (_, target, stream), (source, _, _) = kept[own], kept[1 - own]
                runtime.memcpyPeerAsync(target.ptr, own, source.ptr, 1 - own, size, stream.ptr)
        for _, _, stream in kept:
            stream.synchronize()
        time = (perf_counter() - start) / ROUNDS_TIMED
    kept.clear()
    _release(cupy)
    return Sample({TIME: 1e3 * time})


def _linked(
    name: str,
    title: str,
    case: str,
    size: int,
    params: dict[str, Any],
    need: Need,
    *,
    plain: Callable[[], Sample],
    ours: Callable[[], Sample],
    workers: int,
    note: str,
) -> Measure:
    """A measure of two GPUs that send each other ``size`` bytes, half of what each has."""
    one, two = _on(case, 1), _on(case, 2)
    link = f"{size / MiB:.4g} MiB from each GPU to the other"
    keys = Key(PLAIN, one), Key(PLAIN, link), Key(OURS, two, workers)

    def part(result: Result) -> list[float]:
        if not all(key in result for key in keys):
            return []
        times = (result[key].values.get(TIME, []) for key in keys)
        return [(single / 2 + copies) / mine for single, copies, mine in zip(*times, strict=False)]

    return Measure(
        name=name,
        title=title,
        contestants=[
            Contestant(PLAIN, one, plain, None, params),
            Contestant(PLAIN, link, functools.partial(_exchange, need, size), None, params),
            Contestant(OURS, two, ours, workers, params),
        ],
        units={TIME: "ms"},
        bars=[
            Bar(
                case=two,
                metric="what the link allows / time",
                unit="x",
                values=part,
                limit=LINK,
                at_least=True,
                lacking="two GPUs",
            )
        ],
        runs=3,
        note=f"{note} The link allows half the time of one GPU and the copies after it.",
    )


def _make_on_two(array: ch.Array, make: Any) -> None:
    """Has an array made in pieces, half of them on each of two GPUs: ``make(part, first)`` fills a
    part, which begins at this index of the first axis."""
    first = 0
    parts = array.shards(min(32, len(array)))
    for at, part in enumerate(parts):
        make.options(placement=gpu(2 * at // len(parts)))(part, first)
        first += len(part)


def _fft(sizes: Sizes, params: dict[str, Any], need: Need) -> Measure:
    n = sizes.fft
    case = f"2-D FFT, complex64, {n} x {n}"
    known: dict[str, Any] = {}
    some = slice(None, None, max(1, n // 64))

    def image(xp: Any, first: int, rows: int) -> Any:
        numbers = _scrambled(xp, 2 * first * n, 2 * rows * n).astype(np.float32)
        numbers *= np.float32(2.0**-32)
        numbers -= np.float32(0.5)
        return numbers.view(np.complex64).reshape(rows, n)

    def plain() -> Sample:
        cupy = need(1)
        with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True) as stream:
            x = cupy.empty((n, n), np.complex64)
            height = -(-n // 16)
            for first in range(0, n, height):
                x[first : first + height] = image(cupy, first, len(x[first : first + height]))
            y: Any = None
            time = 0.0
            for _ in range(2):  # the first one makes the plan
                stream.synchronize()
                start = perf_counter()
                for _ in range(ROUNDS_TIMED):
                    y = cupy.fft.fft2(x)
                stream.synchronize()
                time = (perf_counter() - start) / ROUNDS_TIMED
            known["rows"] = cupy.asnumpy(y[some])
        del x, y
        cupy.fft.config.get_plan_cache().clear()
        _release(cupy)
        return Sample({TIME: 1e3 * time})

    def ours() -> Sample:
        cupy = need(2)
        transforms = tiled.CuFft()

        @ch.task
        def make(part: ch.Out[Any], first: int) -> None:
            part[...] = image(cupy, first, len(part))

        x, between, y = (ch.empty((n, n), np.complex64) for _ in range(3))
        with ch.Runtime(workers=1):
            _make_on_two(x, make)
            time = 0.0
            # The first time plans are made, and the shards become one region a GPU.
            for _ in range(2):
                start = perf_counter()
                tiled.fft2(x, between, y, 2, transforms, rounds=ROUNDS_TIMED)[-1].result()
                time = (perf_counter() - start) / ROUNDS_TIMED
            found = y[some].numpy()
        if "rows" in known:
            wanted = known["rows"]
            error = np.abs(found - wanted).max() / np.abs(wanted).max()
            assert error < 1e-5, f"relative error {error:.1e}"
        _release(cupy)
        return Sample({TIME: 1e3 * time})

    return _linked(
        "fft",
        f"A 2-D Fourier transform of {n} x {n}, complex64, as tasks over two GPUs",
        case,
        n * n * np.dtype(np.complex64).itemsize // 4,
        params,
        need,
        plain=plain,
        ours=ours,
        workers=1,
        note="Rows are over the GPUs before it, columns after it; one GPU's is one call of cuFFT.",
    )


def _sort(sizes: Sizes, params: dict[str, Any], need: Need) -> Measure:
    n = sizes.keys
    case = f"sort, uint32, {n} keys"
    known: dict[str, Any] = {}

    def plain() -> Sample:
        cupy = need(1)
        with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True) as stream:
            keys = cupy.empty(n, np.uint32)
            few = -(-n // 16)
            time = 0.0
            for _ in range(2):  # the first one warms up
                for first in range(0, n, few):
                    keys[first : first + few] = _scrambled(cupy, first, min(few, n - first))
                stream.synchronize()
                start = perf_counter()
                keys.sort()
                stream.synchronize()
                time = perf_counter() - start
            if not known:
                known["keys"] = cupy.asnumpy(keys)
        del keys
        _release(cupy)
        return Sample({TIME: 1e3 * time})

    def ours() -> Sample:
        cupy = need(2)
        merges = tiled.MergePaths()

        @ch.task
        def make(part: ch.Out[Any], first: int) -> None:
            part[...] = _scrambled(cupy, first, len(part))

        keys, result = ch.empty(n, np.uint32), ch.empty(n, np.uint32)
        with ch.Runtime(workers=1):
            time = 0.0
            for _ in range(3):  # the first two warm up
                _make_on_two(keys, make)
                ch.wait([part.prefetch(gpu(at)) for at, part in enumerate(keys.shards(2))])
                start = perf_counter()
                tiled.merge_sort(keys, result, 2, merges).result()
                time = perf_counter() - start
            found = result.numpy()
        if known:
            assert np.array_equal(found, known["keys"]), "the order is another one"
        _release(cupy)
        return Sample({TIME: 1e3 * time})

    return _linked(
        "sort",
        f"A sort of {n} keys, uint32, as one task over two GPUs",
        case,
        n * np.dtype(np.uint32).itemsize // 4,
        params,
        need,
        plain=plain,
        ours=ours,
        workers=1,
        note="One GPU's is one sort of CuPy's, in place. Two sort a half each, and merge.",
    )


# ---- k-means, Jacobi --------------------------------------------------------------------------

FEATURES, CLUSTERS, ROUNDS, SHARDS = 8, 16, 5, 4
SWEEPS, STRIPES = 20, 2


def _kmeans(sizes: Sizes, params: dict[str, Any], need: Need) -> Measure:
    n = sizes.points
    case = f"k-means, {n} points"
    known: dict[str, Any] = {}

    def ours(gpus: int) -> Sample:
        cupy = need(gpus)

        @ch.task
        def make(points: ch.Out[Any], first: int) -> None:
            at = cupy.arange(first, first + len(points), dtype=np.float32)[:, None]
            axes = cupy.arange(1, FEATURES + 1, dtype=np.float32)[None, :]
            points[...] = cupy.sin(at * 1e-3 * axes)

        points = ch.empty((n, FEATURES), np.float32)
        centers = ch.array(np.sin(np.arange(CLUSTERS * FEATURES)).reshape(CLUSTERS, -1), np.float32)
        with ch.Runtime(workers=4):
            first = 0
            with ch.TaskGroup():
                for at, part in enumerate(points.shards(gpus * SHARDS)):
                    make.options(placement=gpu(at // SHARDS))(part, first)
                    first += len(part)
                tiled.kmeans(points, centers, 1, gpus, SHARDS)
            start = perf_counter()
            tiled.kmeans(points, centers, ROUNDS, gpus, SHARDS)
            found = centers.numpy()
            time = perf_counter() - start
            wanted = known.setdefault("centers", found)
            assert np.allclose(found, wanted, atol=1e-2), np.abs(found - wanted).max()
        _release(cupy)
        return Sample({RATE: ROUNDS * n / time / 1e9})

    return _scaled(
        "kmeans",
        f"{ROUNDS} rounds of k-means, {n} points of {FEATURES} numbers, {CLUSTERS} clusters",
        case,
        "Gpoints/s",
        RATE,
        params,
        plain=None,
        ours=ours,
        bars=[_times(case, RATE, SCALE)],
        note="Each shard has totals of its own, which one GPU adds up; nothing comes to the host.",
    )


def _jacobi(sizes: Sizes, params: dict[str, Any], need: Need) -> Measure:
    n = sizes.grid
    case = f"Jacobi, float32, {n} x {n}"
    known: dict[str, Any] = {}

    def ours(gpus: int) -> Sample:
        cupy = need(gpus)
        grid = np.zeros((n + 2, n + 2), np.float32)
        grid[0] = 1
        old, new = tiled.Stripes(grid, gpus * STRIPES), tiled.Stripes(grid, gpus * STRIPES)
        with ch.Runtime(workers=4):
            with ch.TaskGroup():
                tiled.jacobi(old, new, 2, gpus)
            start = perf_counter()
            with ch.TaskGroup():
                tiled.jacobi(old, new, SWEEPS, gpus)
            time = perf_counter() - start
            rows = old.arrays[0][: min(SWEEPS, n)].numpy()
            wanted = known.setdefault("rows", rows)
            assert np.array_equal(rows, wanted)
        _release(cupy)
        return Sample({RATE: SWEEPS * n * n / time / 1e9})

    return _scaled(
        "jacobi",
        f"{SWEEPS} sweeps of Jacobi's iteration over {n} x {n}",
        case,
        "Gcells/s",
        RATE,
        params,
        plain=None,
        ours=ours,
        bars=[_times(case, RATE, SCALE)],
        note="Stripes of rows, two a GPU, which exchange halos of one row after each sweep.",
    )


# ---- more than fits ---------------------------------------------------------------------------

TILES, PASSES = 48, 4


def belady(requests: list[int], room: int) -> tuple[int, int]:
    """How many tiles have to be brought in and, all of them written, taken out, at the least.

    Args:
        requests: which tile is used, in order.
        room: how many fit.
    """
    later: dict[int, list[int]] = {}
    for when in reversed(range(len(requests))):
        later.setdefault(requests[when], []).append(when)
    present: set[int] = set()
    loads = 0
    for one in requests:
        later[one].pop()
        if one in present:
            continue
        loads += 1
        if len(present) == room:
            present.remove(
                max(present, key=lambda it: later[it][-1] if later[it] else len(requests))
            )
        present.add(one)
    return loads, loads - len(present)


def _spill(sizes: Sizes, params: dict[str, Any], need: Need) -> Measure:
    # A working set of 1.5 times the memory.
    size = sizes.budget * 3 // 2 // TILES // 4
    case = f"{TILES} tiles of {size * 4 // MiB} MiB in {sizes.budget >> 30} GiB, {PASSES} passes"

    def ours() -> Sample:
        cupy = need(1)

        @ch.task(placement=gpu(0))
        def touch(a: ch.InOut[Any]) -> None:
            a += 1

        machine = ch.Machine.detect(memory=sizes.budget)
        measured = ch.Machine.detect().measured().links
        inwards, outwards = (
            measured.between(*ends) for ends in ((ch.cpu(0), gpu(0)), (gpu(0), ch.cpu(0)))
        )
        assert inwards is not None and outwards is not None
        A = ch.zeros((TILES, size), np.float32)
        tiles = list(A)
        with ch.Runtime(machine, workers=1):
            ch.wait([touch(one) for one in tiles])
            start = perf_counter()
            ch.wait([touch(one) for _ in range(PASSES) for one in tiles])
            time = perf_counter() - start
        assert (A.numpy()[:, 0] == PASSES + 1).all()
        room = sizes.budget // (size * 4)
        loads, stores = belady([*range(TILES)] * PASSES, room)
        bound = max(loads * size * 4 / inwards.bandwidth, stores * size * 4 / outwards.bandwidth)
        _release(cupy)
        return Sample({TIME: time, "bound / time": bound / time})

    return Measure(
        name="spill",
        title="Updates in turn of 1.5 times as much as the memory has",
        contestants=[Contestant(OURS, case, ours, 1, params)],
        units={TIME: "s", "bound / time": ""},
        bars=[absolute(case, "bound / time", "", SPILL, 1, at_least=True)],
        runs=3,
        note="The bound is the bytes of the best eviction there is, over the links as measured.",
    )
