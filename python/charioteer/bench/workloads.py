"""What the overhead benchmark runs on charioteer: one function a case.

Each opens its own runtime and times from the first spawn until the runtime's block has ended, that
is, until every task is complete and the workers are gone. The runtime's start is not in it; its
end is, as for the executors it is compared with. The loops are written as a user would write
them: a new closure a task, which captures the loop variable, and handles that are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from time import perf_counter, sleep
from typing import Any

import charioteer as ch

__all__ = [
    "chain",
    "charioteer_latency",
    "data_calls",
    "data_cholesky",
    "data_map",
    "empty",
    "executor_latency",
    "executor_map",
    "executor_native",
    "grid",
    "native",
    "runtime_map",
    "spawn_cholesky",
    "spawn_many",
    "start_and_close",
    "task_map",
]


def empty(tasks: int, workers: int) -> float:
    """Seconds for so many empty tasks that capture a variable."""
    with ch.Runtime(workers=workers):
        start = perf_counter()
        for index in range(tasks):

            @ch.spawn
            def task() -> int:
                return index

    return perf_counter() - start


def chain(tasks: int, workers: int) -> float:
    """Seconds for so many named tasks, each after the one before it."""
    space = ch.TaskSpace("chain")
    with ch.Runtime(workers=workers):
        start = perf_counter()
        for index in range(tasks):

            @ch.spawn(space[index], dependencies=[space[index - 1]])
            def task() -> int:
                return index

    return perf_counter() - start


def grid(side: int, workers: int) -> float:
    """Seconds for ``side`` x ``side`` named tasks, each after its upper and its left neighbour."""
    space = ch.TaskSpace("grid")
    with ch.Runtime(workers=workers):
        start = perf_counter()
        for row in range(side):
            for column in range(side):

                @ch.spawn(
                    space[row, column],
                    dependencies=[space[row - 1, column], space[row, column - 1]],
                )
                def task() -> int:
                    return column

    return perf_counter() - start


def _body(index: int) -> int:
    return index


def spawn_many(tasks: int, workers: int) -> float:
    """Seconds for so many empty tasks from one call of ``spawn_many``."""
    with ch.Runtime(workers=workers):
        start = perf_counter()
        ch.spawn_many(_body, range(tasks))
    return perf_counter() - start


def task_map(tasks: int, workers: int) -> float:
    """Seconds for so many empty tasks from one ``.map`` of a task function."""
    function = ch.task(_body)
    with ch.Runtime(workers=workers):
        start = perf_counter()
        function.map(range(tasks))
    return perf_counter() - start


def runtime_map(tasks: int, workers: int) -> float:
    """Seconds for ``Runtime.map`` over so many items, with every result read."""
    with ch.Runtime(workers=workers) as runtime:
        start = perf_counter()
        for _ in runtime.map(_body, range(tasks)):
            pass
    return perf_counter() - start


def executor_map(tasks: int, workers: int) -> float:
    """The same with ``ThreadPoolExecutor.map``."""
    with ThreadPoolExecutor(workers) as executor:
        start = perf_counter()
        for _ in executor.map(_body, range(tasks)):
            pass
    return perf_counter() - start


TILES = 64
"""Tiles along an axis, in workloads with data."""


@ch.task
def _copy(source: ch.In[Any], target: ch.Out[Any]) -> None:
    """Takes two regions, and does nothing with them."""


def data_calls(tasks: int, workers: int) -> float:
    """Seconds for so many calls of an empty task function that reads a region and writes one: each
    depends on the one before it, and comes after another."""
    tiles = list(ch.zeros(TILES).tiles(1))
    with ch.Runtime(workers=workers):
        start = perf_counter()
        for index in range(tasks):
            _copy(tiles[index % TILES], tiles[(index + 1) % TILES])
    return perf_counter() - start


def data_map(tasks: int, workers: int) -> float:
    """The same from one ``.map``."""
    tiles = list(ch.zeros(TILES).tiles(1))
    sources = [tiles[index % TILES] for index in range(tasks)]
    targets = [tiles[(index + 1) % TILES] for index in range(tasks)]
    with ch.Runtime(workers=workers):
        start = perf_counter()
        _copy.map(sources, targets)
    return perf_counter() - start


@ch.task
def _potrf(a: ch.InOut[Any]) -> None:
    """Does nothing, as do all tasks of the factorization."""


@ch.task
def _trsm(diagonal: ch.In[Any], a: ch.InOut[Any]) -> None:
    """As :func:`_potrf`."""


@ch.task
def _gemm(a: ch.In[Any], b: ch.In[Any], c: ch.InOut[Any]) -> None:
    """As :func:`_potrf`."""


def spawn_cholesky(A: ch.Tiles) -> int:
    """Spawns the tasks of a tiled Cholesky factorization with empty bodies, and counts them."""
    tasks, n = 0, A.shape[0]
    for k in range(n):
        _potrf(A[k, k])
        for i in range(k + 1, n):
            _trsm(A[k, k], A[i, k])
        for i in range(k + 1, n):
            for j in range(k + 1, i):
                _gemm(A[i, k], A[j, k], A[i, j])
            _trsm(A[i, k], A[i, i])
        rest = n - k - 1
        tasks += 1 + 2 * rest + rest * (rest - 1) // 2
    return tasks


def data_cholesky(n: int, workers: int) -> float:
    """Seconds for the tasks of a factorization of ``n`` x ``n`` tiles, their order inferred."""
    A = ch.zeros((n, n)).tiles((1, 1))
    with ch.Runtime(workers=workers):
        start = perf_counter()
        spawn_cholesky(A)
    return perf_counter() - start


IDLE = 0.002
"""Seconds of rest before each task of the latency measurement: long enough for workers to park."""


def charioteer_latency(repeats: int, workers: int) -> tuple[float, float]:
    """Median seconds from spawn to start, and from spawn to the result in hand, when idle."""

    def once() -> tuple[float, float, float]:
        begin = perf_counter()

        @ch.spawn
        def task() -> float:
            return perf_counter()

        started = task.result()
        return begin, started, perf_counter()

    with ch.Runtime(workers=workers):
        return _latency(once, repeats)


def executor_latency(repeats: int, workers: int) -> tuple[float, float]:
    """The same with a ``ThreadPoolExecutor`` whose threads have all been started."""
    with ThreadPoolExecutor(workers) as executor:
        for future in [executor.submit(sleep, IDLE) for _ in range(workers)]:
            future.result()

        def once() -> tuple[float, float, float]:
            begin = perf_counter()

            def task() -> float:
                return perf_counter()

            started = executor.submit(task).result()
            return begin, started, perf_counter()

        return _latency(once, repeats)


def _latency(once: Callable[[], tuple[float, float, float]], repeats: int) -> tuple[float, float]:
    starts, trips = [], []
    for _ in range(repeats):
        sleep(IDLE)
        begin, started, end = once()
        starts.append(started - begin)
        trips.append(end - begin)
    return median(starts), median(trips)


def start_and_close(repeats: int, workers: int) -> float:
    """Median seconds to open and close a runtime without a task."""
    times = []
    for _ in range(repeats):
        start = perf_counter()
        with ch.Runtime(workers=workers):
            pass
        times.append(perf_counter() - start)
    return median(times)


def native(body: Callable[[], None], tasks: int, workers: int) -> float:
    """Seconds for so many tasks of a body that releases the GIL."""
    with ch.Runtime(workers=workers) as runtime:
        start = perf_counter()
        for _ in range(tasks):
            runtime.submit(body)
    return perf_counter() - start


def executor_native(body: Callable[[], None], tasks: int, workers: int) -> float:
    """The same with a ``ThreadPoolExecutor``."""
    with ThreadPoolExecutor(workers) as executor:
        start = perf_counter()
        for _ in range(tasks):
            executor.submit(body)
    return perf_counter() - start
