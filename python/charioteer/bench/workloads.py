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

import charioteer as ch

__all__ = [
    "chain",
    "charioteer_latency",
    "empty",
    "executor_latency",
    "executor_map",
    "executor_native",
    "grid",
    "native",
    "runtime_map",
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
