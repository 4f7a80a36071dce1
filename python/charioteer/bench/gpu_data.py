"""The measures of ``charioteer bench gpu`` that have managed arrays: chains by regions, copies,
factorizations and products over one and two GPUs, working sets larger than the memory.

Everything is on the GPUs when a clock starts, and stays there when it ends, unless copies are what
is measured. What the results are compared with is computed by one library call on the first GPU,
in the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

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
    Sample,
    absolute,
    ratio,
)

__all__ = ["NAMES", "Sizes", "measures"]

NAMES = ("regions", "copies", "cholesky", "product", "kmeans", "jacobi", "spill")

PLAIN = "plain CuPy"
PER_TASK = "time per task"
WAITS = "host synchronisations"
RATE = "rate"
TIME = "time"
SPEED = "bandwidth"
MiB = 1 << 20

CHAIN = 1.7
COPY = 0.95
ONE, TWO = 0.9, 1.85
"""Parts of cuSOLVER's rate that one GPU has to reach, and times of one that two have to."""
PRODUCT = 1.9
SCALE = 1.8
SPILL = 0.85


@dataclass(frozen=True)
class Sizes:
    """How large the problems are.

    Attributes:
        length: tasks of the chain.
        region: bytes of a region that is copied.
        cholesky: rows of the matrix that is factored, of float64.
        tile: rows of its tiles.
        product: rows of the matrices that are multiplied, of float32.
        points: how many points are clustered.
        grid: inner rows of the grid that is relaxed.
        budget: bytes of a GPU's memory that the runtime may use where the working set is larger.
    """

    length: int = 10_000
    region: int = 64 * MiB
    cholesky: int = 32_768
    tile: int = 2_048
    product: int = 32_768
    points: int = 40_000_000
    grid: int = 30_000
    budget: int = 8 << 30


def measures(sizes: Sizes, params: dict[str, Any], need: Callable[[int], Any]) -> list[Measure]:
    """All measures; ``need(n)`` gives CuPy where there are n GPUs, or raises ``Missing``."""
    return [
        _regions(sizes, params, need),
        _copies(sizes, params, need),
        _cholesky(sizes, params, need),
        _product(sizes, params, need),
        _kmeans(sizes, params, need),
        _jacobi(sizes, params, need),
        _spill(sizes, params, need),
    ]


Need = Callable[[int], Any]


def _wait(tasks: list[ch.Task[Any]]) -> None:
    for task in tasks:
        task.result()


# ---- chains -----------------------------------------------------------------------------------


def _regions(sizes: Sizes, params: dict[str, Any], need: Need) -> Measure:
    length = sizes.length
    case = f"chain of {length} additions, by regions"

    def plain() -> Sample:
        cupy = need(1)
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

    def ours() -> Sample:
        cupy = need(1)

        @ch.task(placement=gpu(0))
        def add(x: ch.InOut[Any], y: ch.In[Any]) -> None:
            cupy.add(x, y, out=x)

        x, y = ch.zeros(1024, np.float32), ch.full(1024, 1, np.float32)
        with ch.Runtime(workers=1) as rt:
            add(x, y).result()
            before = rt.stats()["devices"][gpu(0)]["host_synchronisations"]
            start = perf_counter()
            for _ in range(length - 1):
                add(x, y)
            add(x, y).result()
            time = perf_counter() - start
            waits = rt.stats()["devices"][gpu(0)]["host_synchronisations"] - before
        assert float(x.numpy()[0]) == length + 1
        return Sample({PER_TASK: 1e6 * time / length, WAITS: waits})

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
) -> Measure:
    contestants = [] if plain is None else [Contestant(PLAIN, _on(case, 1), plain, None, params)]
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
        cupy.get_default_memory_pool().free_all_blocks()
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
                        build.options(placement=gpu(i % gpus))(A[i, j], i * tile, j * tile)
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
        cupy.get_default_memory_pool().free_all_blocks()
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
    block = -(-n // 4)
    case = f"matrix product, float32, n = {n}"

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
        cupy.get_default_memory_pool().free_all_blocks()
        return Sample({RATE: 2 * n**3 / time / 1e12})

    def ours(gpus: int) -> Sample:
        cupy = need(gpus)

        @ch.task
        def fill(a: ch.Out[Any], value: float) -> None:
            a.fill(value)

        A = ch.empty((n, n), np.float32).tiles((block, n))
        B = ch.empty((n, n), np.float32).tiles((n, block))
        C = ch.empty((n, n), np.float32).tiles((block, block))
        with ch.Runtime(workers=4):
            a, b, c = (ch.full((64, 64), 1, np.float32).tiles((16, 64)) for _ in range(3))
            with ch.TaskGroup():
                for i in range(A.shape[0]):
                    fill.options(placement=gpu(i % gpus))(A[i, 0], 0.5)
                    fill.options(placement=gpu(i % gpus))(B[0, i], 2.0)
                    for j in range(C.shape[1]):
                        fill.options(placement=gpu(i % gpus))(C[i, j], 0.0)
                tiled.product(a, b.base.tiles((64, 64)), c.base.tiles((16, 64)), gpus)
            start = perf_counter()
            with ch.TaskGroup():
                tiled.product(A, B, C, gpus)
            time = perf_counter() - start
            last = C[C.shape[0] - 1, C.shape[1] - 1]
            assert float(last[-1, -1].numpy()) == n
        cupy.get_default_memory_pool().free_all_blocks()
        return Sample({RATE: 2 * n**3 / time / 1e12})

    one, two = _on(case, 1), _on(case, 2)
    return _scaled(
        "product",
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
                values=ratio(Key(OURS, two, 4), Key(PLAIN, one), RATE),
                limit=PRODUCT,
                at_least=True,
                lacking=PLAIN,
            )
        ],
        note="Each GPU has half of each matrix at the start; the blocks of B are copied to both.",
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
        totals = ch.zeros((CLUSTERS, FEATURES + 1), np.float32)
        with ch.Runtime(workers=4):
            first = 0
            with ch.TaskGroup():
                for at, part in enumerate(points.shards(gpus * SHARDS)):
                    make.options(placement=gpu(at // SHARDS))(part, first)
                    first += len(part)
                tiled.kmeans(points, centers, totals, 1, gpus, SHARDS)
            start = perf_counter()
            tiled.kmeans(points, centers, totals, ROUNDS, gpus, SHARDS)
            found = centers.numpy()
            time = perf_counter() - start
            wanted = known.setdefault("centers", found)
            assert np.allclose(found, wanted, atol=1e-2), np.abs(found - wanted).max()
        cupy.get_default_memory_pool().free_all_blocks()
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
        note="Partial sums come to the host once a shard and round.",
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
        cupy.get_default_memory_pool().free_all_blocks()
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
        cupy.get_default_memory_pool().free_all_blocks()
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
