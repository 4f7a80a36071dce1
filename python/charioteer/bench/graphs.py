"""Task graphs of the GIL study and of METG, and how each runtime runs one.

A :class:`Graph` is a list of tasks in the order in which a program would spawn them, each with the
earlier tasks that it depends on. Its body is the same for all tasks. A *runner* runs a graph on one
runtime and returns the seconds from the first spawn until every task is complete and the runtime
has let go of its workers, which are started before the clock is.

Each runner is what a user of that runtime would write. ``ThreadPoolExecutor`` knows no
dependencies, so a task that ends submits those that it was the last to hold up; joblib knows none
and has no futures either, so it runs one level of the graph after the other.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from random import Random
from time import perf_counter, sleep
from typing import Any

import charioteer as ch
from charioteer.bench.harness import Missing
from charioteer.bench.peers import load, started_ray

__all__ = [
    "PATTERNS",
    "SHAPES",
    "Graph",
    "Outcome",
    "cholesky",
    "gil_waited",
    "independent",
    "make",
    "pattern",
    "steps",
]


@dataclass(frozen=True)
class Graph:
    """Tasks in the order of their spawning; ``before[i]`` are the tasks that ``i`` depends on."""

    name: str
    before: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.before)

    @cached_property
    def edges(self) -> int:
        """How many dependencies there are."""
        return sum(map(len, self.before))

    @cached_property
    def levels(self) -> list[list[int]]:
        """The tasks by the length of the longest chain that ends in them."""
        level: list[int] = []
        for before in self.before:
            level.append(1 + max((level[index] for index in before), default=-1))
        levels: list[list[int]] = [[] for _ in range(max(level, default=-1) + 1)]
        for index, at in enumerate(level):
            levels[at].append(index)
        return levels

    def ideal(self, seconds: float, held: float, workers: int, *, gil: bool = True) -> float:
        """The least seconds it can take with tasks of ``seconds``, the part ``held`` attached.

        No machine does more than ``workers`` tasks at once, no interpreter with a GIL more than
        one attached part, and no order ends before the longest chain has.
        """
        serial = len(self) * seconds
        bounds = [serial / workers, len(self.levels) * seconds]
        if gil:
            bounds.append(serial * held)
        return max(bounds)


def independent(tasks: int) -> Graph:
    """So many tasks without dependencies."""
    return Graph("independent", ((),) * tasks)


def cholesky(tasks: int) -> Graph:
    """The tiled Cholesky factorization with the most tiles that has at most so many tasks."""
    tiles = 1
    while (tiles + 1) * (tiles + 2) * (tiles + 3) // 6 <= tasks:
        tiles += 1
    before: list[tuple[int, ...]] = []
    # The task that wrote a tile last; tiles are (row, column) of the lower triangle.
    wrote: dict[tuple[int, int], int] = {}

    def add(target: tuple[int, int], *read: tuple[int, int]) -> None:
        before.append(tuple(dict.fromkeys(wrote[at] for at in (target, *read) if at in wrote)))
        wrote[target] = len(before) - 1

    for k in range(tiles):
        add((k, k))
        for row in range(k + 1, tiles):
            add((row, k), (k, k))
        for row in range(k + 1, tiles):
            add((row, row), (row, k))
            for column in range(k + 1, row):
                add((row, column), (row, k), (column, k))
    return Graph("cholesky", tuple(before))


def steps(tasks: int, width: int = 32) -> Graph:
    """A stencil over time: every point of a step after its neighbours in the step before."""
    width = min(width, tasks)
    before: list[tuple[int, ...]] = []
    for step in range(max(1, tasks // width)):
        for x in range(width):
            near = range(max(0, x - 1), min(width, x + 2)) if step else ()
            before.append(tuple((step - 1) * width + at for at in near))
    return Graph("steps", tuple(before))


def _no_comm(step: int, x: int, width: int) -> set[int]:
    return {x}


def _stencil(step: int, x: int, width: int) -> set[int]:
    return {x - 1, x, x + 1}


def _sweep(step: int, x: int, width: int) -> set[int]:
    return {x - 1, x}


def _fft(step: int, x: int, width: int) -> set[int]:
    apart = 1 << (step - 1) % max(1, (width - 1).bit_length())
    return {x - apart, x, x + apart}


def _tree(step: int, x: int, width: int) -> set[int]:
    # It fans out until it is as wide as the graph, and keeps to its columns from there on.
    return {x // 2} if 1 << (step - 1) < width else {x}


def _nearest(step: int, x: int, width: int) -> set[int]:
    return set(range(x - RADIX // 2, x + (RADIX + 1) // 2))


def _spread(step: int, x: int, width: int) -> set[int]:
    return {(x + step + at * width // RADIX) % width for at in range(RADIX)}


def _random(step: int, x: int, width: int) -> set[int]:
    chosen = Random(step * width + x)
    return {x, *(at for at in _nearest(step, x, width) if chosen.random() < 0.5)}


def _all_to_all(step: int, x: int, width: int) -> set[int]:
    return set(range(width))


RADIX = 5
"""On how many tasks one depends in the patterns ``nearest`` and ``spread``."""

PATTERNS: Mapping[str, Callable[[int, int, int], set[int]] | None] = {
    "trivial": None,
    "no_comm": _no_comm,
    "stencil": _stencil,
    "sweep": _sweep,
    "fft": _fft,
    "tree": _tree,
    "nearest": _nearest,
    "spread": _spread,
    "random": _random,
    "all_to_all": _all_to_all,
}
"""Patterns of dependence: the columns of the step before that a task of a step depends on.

They are those of Task Bench (Slaughter et al., *Task Bench: A Parameterized Benchmark for
Evaluating Parallel Runtime Performance*, SC 2020), with columns that are not there left out.
"""


def pattern(name: str, width: int, steps: int) -> Graph:
    """``steps`` steps of ``width`` tasks, of which each depends on tasks of the step before."""
    needs = PATTERNS[name]
    widths = [min(width, 1 << step) if name == "tree" else width for step in range(steps)]
    before: list[tuple[int, ...]] = []
    first = 0
    for step, here in enumerate(widths):
        for x in range(here):
            if step == 0 or needs is None:
                before.append(())
                continue
            last = widths[step - 1]
            columns = sorted(at for at in needs(step, x, width) if 0 <= at < last)
            before.append(tuple(first - last + at for at in columns))
        first += here
    return Graph(name, tuple(before))


SHAPES: Mapping[str, Callable[[int], Graph]] = {
    "independent": independent,
    "cholesky": cholesky,
    "steps": steps,
}


def make(shape: str, tasks: int) -> Graph:
    """The graph of that shape with about so many tasks."""
    return SHAPES[shape](tasks)


@dataclass(frozen=True)
class Outcome:
    """How a graph ran: its seconds, and those that charioteer's threads waited for the GIL."""

    seconds: float
    waited: float | None = None


Body = Callable[[], object]


def charioteer(graph: Graph, body: Body, workers: int, width: int | None = None) -> Outcome:
    """Run it on charioteer; ``width`` fixes how many workers compete for the GIL."""
    with ch.Runtime(workers=workers, gil=width or "auto") as runtime:
        waited = gil_waited(runtime)
        start = perf_counter()
        if graph.edges:
            space = ch.TaskSpace(graph.name)
            for index, before in enumerate(graph.before):
                ch.spawn(space[index], dependencies=[space[at] for at in before])(body)
        else:
            for _ in graph.before:
                ch.spawn(body)
    return Outcome(perf_counter() - start, gil_waited(runtime) - waited)


def native(graph: Graph, seconds: float, workers: int) -> Outcome:
    """Run it on charioteer with a body in C that knows nothing of Python."""
    spin = ch.native(ch._core.spin_address(), ("f8",), name="spin")
    with ch.Runtime(workers=workers) as runtime:
        waited = gil_waited(runtime)
        start = perf_counter()
        if graph.edges:
            space = ch.TaskSpace(graph.name)
            for index, before in enumerate(graph.before):
                needs = [space[at] for at in before]
                spin.options(space[index], dependencies=needs)(seconds)
        else:
            for _ in graph.before:
                spin(seconds)
    return Outcome(perf_counter() - start, gil_waited(runtime) - waited)


def thread_pool(graph: Graph, body: Body, workers: int) -> Outcome:
    """Run it on the standard library's thread pool."""
    with ThreadPoolExecutor(workers) as executor:
        _start_threads(executor, workers)
        start = perf_counter()
        if graph.edges:
            _submit_in_order(executor, graph, body)
        else:
            for _ in graph.before:
                executor.submit(body)
    return Outcome(perf_counter() - start)


def _start_threads(executor: ThreadPoolExecutor, workers: int) -> None:
    meeting = threading.Barrier(workers)
    for future in [executor.submit(meeting.wait) for _ in range(workers)]:
        future.result()


def _submit_in_order(executor: ThreadPoolExecutor, graph: Graph, body: Body) -> None:
    """Submit each task once what it depends on is complete; returns when all are."""
    after: list[list[int]] = [[] for _ in graph.before]
    for index, before in enumerate(graph.before):
        for at in before:
            after[at].append(index)
    held_up = [len(before) for before in graph.before]
    left = len(graph)
    lock = threading.Lock()
    complete = threading.Event()

    def submit(index: int) -> None:
        executor.submit(body).add_done_callback(lambda future: ended(index, future))

    def ended(index: int, future: Future[object]) -> None:
        nonlocal left
        future.result()
        ready = []
        with lock:
            left -= 1
            for later in after[index]:
                held_up[later] -= 1
                if not held_up[later]:
                    ready.append(later)
            if not left:
                complete.set()
        for later in ready:
            submit(later)

    for index, before in enumerate(graph.before):
        if not before:
            submit(index)
    complete.wait()


def bare_threads(graph: Graph, body: Body, workers: int) -> Outcome:
    """Run tasks without dependencies on threads that take them from a queue: no runtime at all."""
    tasks = deque(graph.before)
    gate = threading.Barrier(workers + 1)

    def run() -> None:
        gate.wait()
        while True:
            try:
                tasks.popleft()
            except IndexError:
                return
            body()

    threads = [threading.Thread(target=run) for _ in range(workers)]
    for thread in threads:
        thread.start()
    while gate.n_waiting < workers:
        sleep(1e-3)
    start = perf_counter()
    gate.wait()
    for thread in threads:
        thread.join()
    return Outcome(perf_counter() - start)


def bare_spins(graph: Graph, seconds: float, workers: int) -> Outcome:
    """The same in C, with threads that know nothing of Python."""
    return Outcome(ch._core.spin_threads(seconds, len(graph), workers))


def dask(graph: Graph, body: Body, workers: int) -> Outcome:
    """Run it on Dask's threads."""
    module = load("dask")
    delayed = module.delayed(lambda *_: body(), pure=False)
    # A pool of its own: Dask never ends the threads of those that it makes.
    with ThreadPoolExecutor(workers) as executor:
        _start_threads(executor, workers)
        start = perf_counter()
        tasks: list[Any] = []
        for before in graph.before:
            tasks.append(delayed(*(tasks[at] for at in before)))
        module.compute(*tasks, scheduler="threads", pool=executor, optimize_graph=False)
    return Outcome(perf_counter() - start)


def joblib(graph: Graph, body: Body, workers: int) -> Outcome:
    """Run it on joblib's threads, level by level."""
    module = load("joblib")
    with module.Parallel(n_jobs=workers, backend="threading") as parallel:
        start = perf_counter()
        for level in graph.levels:
            parallel(module.delayed(body)() for _ in level)
    return Outcome(perf_counter() - start)


def ray(graph: Graph, body: Body, workers: int) -> Outcome:
    """Run it on Ray, whose workers are processes with a GIL each."""
    with started_ray(workers) as module:

        def task(*_: object) -> None:
            body()

        remote = module.remote(task)
        # Ray starts a worker process at the first task that needs one.
        module.get([remote.remote() for _ in range(10 * workers)])
        start = perf_counter()
        tasks: list[Any] = []
        for before in graph.before:
            tasks.append(remote.remote(*(tasks[at] for at in before)))
        module.get(tasks)
        return Outcome(perf_counter() - start)


def parla(graph: Graph, body: Body, workers: int, version: str) -> Outcome:
    """Run it on Parla of the given version, ``"0.2"`` or ``"0.3"``.

    Raises:
        Missing: that version is not installed, or cannot run on so many workers.
    """
    module = load("parla")
    # The pure-Python predecessor alone has a module for each kind of device.
    found = "0.2" if importlib.util.find_spec("parla.cpu") is not None else "0.3"
    if found != version:
        raise Missing(f"parla is installed as {found}")
    options: dict[str, Any] = {}
    if version == "0.2":
        if workers != (os.cpu_count() or 1):
            raise Missing("Parla 0.2 always runs on every core")
        place = load("parla.cpu").cpu
    else:
        place = load("parla.devices").cpu
        options["n_workers"] = workers
    tasks_module = load("parla.tasks")
    spawn: Callable[..., Callable[[Any], Any]] = tasks_module.spawn
    space = tasks_module.TaskSpace("graph")
    seconds = 0.0

    def program() -> None:
        @spawn(placement=place, vcus=0)
        async def top() -> None:
            nonlocal seconds
            start = perf_counter()
            for index, before in enumerate(graph.before):

                @spawn(space[index], [space[at] for at in before], placement=place, vcus=0)
                def task() -> None:
                    body()

            for index in range(len(graph)):
                await space[index]
            seconds = perf_counter() - start

    with module.Parla(**options):
        program()
    return Outcome(seconds)


def gil_waited(runtime: ch.Runtime) -> float:
    """Seconds that threads of this process have waited for the interpreter.

    The sites of the gateway count for the whole process, so a run is the difference of two.
    """
    return float(sum(site["waited"] for site in runtime.stats()["gateway"].values()))
