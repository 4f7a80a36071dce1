"""How each runtime runs a task graph whose tasks all have one body.

A *runner* runs a :class:`~charioteer.graphs.Shape` on one runtime and returns the seconds from the
first spawn until every task is complete and the runtime has let go of its workers, which are
started before the clock is.

Each runner is what a user of that runtime would write. ``ThreadPoolExecutor`` knows no
dependencies, so a task that ends submits those that it was the last to hold up; joblib knows none
and has no futures either, so it runs one level of the graph after the other.

Ray takes seconds to start, and a compiled graph seconds to compile, so its runners are opened once
and run many graphs. Its actors are given their tasks by place: each has its part of every row.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter, sleep
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

import charioteer as ch
from charioteer import gpu
from charioteer.bench.bodies import CYCLES
from charioteer.bench.harness import Missing
from charioteer.bench.peers import SETTLING, THREAD_POOL, load, started_ray
from charioteer.graphs import Shape, sized

__all__ = ["PEERS", "SHAPES", "Devices", "Outcome", "Peer", "gil_waited"]


SHAPES: Mapping[str, Callable[[int], Shape]] = {
    "independent": lambda tasks: sized("independent", tasks, tasks),
    "cholesky": lambda tasks: sized("cholesky", tasks, 1),
    "steps": lambda tasks: sized("stencil", tasks, 32),
}
"""The shapes of the GIL study, of about so many tasks."""


@dataclass(frozen=True)
class Outcome:
    """How a graph ran: its seconds, and those that charioteer's threads waited for the GIL."""

    seconds: float
    waited: float | None = None


Body = Callable[[], object]


def charioteer(graph: Shape, body: Body, workers: int, width: int | None = None) -> Outcome:
    """Run it on charioteer; ``width`` fixes how many workers compete for the GIL."""
    with ch.Runtime(workers=workers, gil=width or "auto") as runtime:
        waited = gil_waited(runtime)
        start = perf_counter()
        if graph.edges:
            space = ch.TaskSpace(graph.name)
            for index, before in enumerate(graph.before):
                ch.spawn(body, name=space[index], dependencies=space[list(before)])
        else:
            # As the guide says of many tasks at once.
            ch.spawn_many(lambda _: body(), graph.before)
    return Outcome(perf_counter() - start, gil_waited(runtime) - waited)


def native(graph: Shape, seconds: float, workers: int) -> Outcome:
    """Run it on charioteer with a body in C that knows nothing of Python."""
    spin = ch.native(ch._core.spin_address(), ("f8",), name="spin")
    with ch.Runtime(workers=workers) as runtime:
        waited = gil_waited(runtime)
        start = perf_counter()
        if graph.edges:
            space = ch.TaskSpace(graph.name)
            for index, before in enumerate(graph.before):
                needs = space[list(before)]
                spin.options(space[index], dependencies=needs)(seconds)
        else:
            ch.spawn_many(spin, [seconds] * len(graph))
    return Outcome(perf_counter() - start, gil_waited(runtime) - waited)


Work = Literal["bodies", "bodies in places", "kernels"]
"""What tasks on GPUs are: Python bodies on a GPU that the runtime chooses or on one that is said,
or native kernels on one that it chooses."""


class Devices:
    """Runs graphs of tasks on one GPU each, in a runtime of its own for all of them, whose
    contexts, streams and kernels are there before a clock starts.

    A task keeps its GPU busy: on one of the CUDA driver by a kernel of one thread, which counts
    cycles of the clock, and which Python bodies launch; on a virtual one without a kernel. Where
    GPUs are said, each has its part of every row of the graph.

    Args:
        machine: as the command line names it; ``"gpu"`` for the GPUs that are found.
        work: what tasks are.
        workers: how many the runtime has.

    Attributes:
        gpus: how many there are.
        runtime: the runtime.

    Raises:
        Missing: there is no GPU, or these cannot run such tasks.
    """

    def __init__(self, machine: str, work: Work, workers: int) -> None:
        found = ch.Machine.detect() if machine == "gpu" else ch.Machine.load(machine)
        if not found.gpus:
            raise Missing("there is no GPU")
        self.gpus = len(found.gpus)
        self._work = work
        self._cuda = found.gpus[0].capability is not None
        if work == "kernels" and not self._cuda:
            raise Missing("virtual GPUs run no kernels")
        self._spin = ch.kernel(CYCLES, "spin", ("i8",))[1, 1]
        self._rate = 0.0
        self.runtime = ch.Runtime(found, workers=workers)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.runtime)
            if self._cuda:
                count = ch.kernel(CYCLES, "count", ("i8", "*i8"), placement=gpu(0))[1, 1]
                cycles, nanoseconds = ch.zeros(1, np.int64), 20_000_000
                for _ in range(2):  # the clock gets faster when there is work
                    count(nanoseconds, cycles).result()
                self._rate = 1e9 * float(cycles.numpy()[0]) / nanoseconds
            task, arguments = self._task(1e-6)
            for device in range(self.gpus):
                task.options(placement=gpu(device))(*arguments).result()
            self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def _task(self, seconds: float) -> tuple[Any, tuple[int, ...]]:
        """A task function that takes so long on a GPU, and its arguments."""
        spin, cycles = self._spin, round(seconds * self._rate)
        if self._work == "kernels":
            return spin, (cycles,)
        launch = spin.fn

        def kernel() -> None:
            launch(cycles)

        def busy() -> None:
            ch.current().stream.busy(seconds)

        return ch.task(kernel if self._cuda else busy, placement=gpu), ()

    def run(self, graph: Shape, seconds: float) -> Outcome:
        """Run it with tasks of so many seconds, until all are complete."""
        task, arguments = self._task(seconds)
        functions = [task] * len(graph)
        if self._work == "bodies in places":
            there = [task.options(placement=gpu(device)) for device in range(self.gpus)]
            for row in graph.levels:
                for at, index in enumerate(row):
                    functions[index] = there[at * self.gpus // len(row)]
        tasks = []
        waited = gil_waited(self.runtime)
        start = perf_counter()
        space = ch.TaskSpace(graph.name)
        for index, (function, before) in enumerate(zip(functions, graph.before, strict=True)):
            needs = space[list(before)]
            tasks.append(function.options(space[index], dependencies=needs)(*arguments))
        ch.wait(tasks)
        return Outcome(perf_counter() - start, gil_waited(self.runtime) - waited)


def thread_pool(graph: Shape, body: Body, workers: int) -> Outcome:
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


def _submit_in_order(executor: ThreadPoolExecutor, graph: Shape, body: Body) -> None:
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


def bare_threads(graph: Shape, body: Body, workers: int) -> Outcome:
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


def bare_spins(graph: Shape, seconds: float, workers: int) -> Outcome:
    """The same in C, with threads that know nothing of Python."""
    return Outcome(ch._core.spin_threads(seconds, len(graph), workers))


def dask(graph: Shape, body: Body, workers: int) -> Outcome:
    """Run it on Dask's threads, as a graph of its own making: ``delayed`` costs thrice as much."""
    load("dask")
    threaded = load("dask.threaded")

    def call(*_: object) -> None:
        body()

    # A pool of its own: Dask never ends the threads of those that it makes.
    with ThreadPoolExecutor(workers) as executor:
        _start_threads(executor, workers)
        start = perf_counter()
        tasks = {index: (call, *before) for index, before in enumerate(graph.before)}
        threaded.get(tasks, list(tasks), pool=executor)
    return Outcome(perf_counter() - start)


def distributed(graph: Shape, body: Body, workers: int) -> Outcome:
    """Run it on Dask's distributed scheduler: one worker process with threads would share nothing
    with its scheduler, but what passes between them costs more than the GIL that they share
    here."""
    config = load("dask").config
    module = load("distributed")

    def call(*_: object) -> None:
        body()

    with (
        config.set({"distributed.scheduler.work-stealing": False}),
        module.Client(
            processes=False,
            n_workers=1,
            threads_per_worker=workers,
            dashboard_address=None,
            silence_logs=50,
        ) as client,
    ):
        client.submit(call, pure=False).result()
        start = perf_counter()
        tasks = {
            f"task-{index}": (call, *(f"task-{at}" for at in before))
            for index, before in enumerate(graph.before)
        }
        client.get(tasks, list(tasks))
        return Outcome(perf_counter() - start)


def parsl(graph: Shape, body: Body, workers: int) -> Outcome:
    """Run it on Parsl's threads."""
    module = load("parsl")
    executors = load("parsl.executors")
    with tempfile.TemporaryDirectory() as folder:
        module.load(
            module.Config(
                executors=[executors.ThreadPoolExecutor(max_threads=workers)],
                run_dir=folder,
                strategy="none",
                initialize_logging=False,
            )
        )
        try:

            def call(*_: object) -> None:
                body()

            task = module.python_app(call)
            for future in [task() for _ in range(10 * workers)]:
                future.result()
            start = perf_counter()
            tasks: list[Any] = []
            for before in graph.before:
                tasks.append(task(*(tasks[at] for at in before)))
            for future in tasks:
                future.result()
            return Outcome(perf_counter() - start)
        finally:
            module.dfk().cleanup()
            module.clear()


def joblib(graph: Shape, body: Body, workers: int) -> Outcome:
    """Run it on joblib's threads, level by level."""
    module = load("joblib")
    with module.Parallel(n_jobs=workers, backend="threading") as parallel:
        start = perf_counter()
        for level in graph.levels:
            parallel(module.delayed(body)() for _ in level)
    return Outcome(perf_counter() - start)


Run = Callable[[Shape, Body], Outcome]
"""Runs a graph on a runtime that is open."""


def _anew(
    run: Callable[[Shape, Body, int], Outcome],
) -> Callable[[int], AbstractContextManager[Run]]:
    """Opens a runtime that is started for each graph."""

    @contextmanager
    def opened(workers: int) -> Iterator[Run]:
        yield lambda graph, body: run(graph, body, workers)

    return opened


@contextmanager
def ray_tasks(workers: int) -> Iterator[Run]:
    """Runs graphs as tasks of Ray, whose workers are processes with a GIL each.

    Raises:
        Missing: Ray is not installed.
    """
    with started_ray(workers) as module:

        def run(graph: Shape, body: Body) -> Outcome:
            def task(*_: object) -> None:
                body()

            remote = module.remote(task)
            # Ray starts a worker process, and sends it a function, at the first task that needs it.
            module.get([remote.remote() for _ in range(10 * workers)])
            start = perf_counter()
            tasks: list[Any] = []
            for before in graph.before:
                tasks.append(remote.remote(*(tasks[at] for at in before)))
            module.get(tasks)
            return Outcome(perf_counter() - start)

        yield run


class _Actor:
    """What an actor of Ray does: tasks with one body, which it counts."""

    def __init__(self) -> None:
        self.use()

    def use(self, body: Body = int) -> None:
        """Have this body from now on, and count anew."""
        self._body = body
        self._ran = 0

    def run(self, *_: object) -> None:
        """Run a task, after those whose results are given."""
        self._body()
        self._ran += 1

    def ran(self, *_: object) -> int:
        """How many tasks have run."""
        return self._ran


def _places(graph: Shape, parts: int) -> list[int]:
    """Which part each task belongs to, if each has its part of every row."""
    places = [0] * len(graph)
    for row in graph.levels:
        for at, index in enumerate(row):
            places[index] = at * parts // len(row)
    return places


def _check(ran: list[int], graph: Shape) -> None:
    if sum(ran) != len(graph):
        raise RuntimeError(f"{sum(ran)} of {len(graph)} tasks have run")


@contextmanager
def ray_actors(workers: int) -> Iterator[Run]:
    """Runs graphs on Ray with an actor for each worker.

    An actor runs its calls in the order of submission, so what a call depends on is given to it
    only where another actor has it.

    Raises:
        Missing: Ray is not installed.
    """
    with started_ray(workers) as module:
        remote = module.remote(num_cpus=0)(_Actor)
        actors = [remote.remote() for _ in range(workers)]

        def run(graph: Shape, body: Body) -> Outcome:
            places = _places(graph, workers)
            module.get([actor.use.remote(body) for actor in actors])
            start = perf_counter()
            tasks: list[Any] = []
            for place, before in zip(places, graph.before, strict=True):
                needs = (tasks[at] for at in before if places[at] != place)
                tasks.append(actors[place].run.remote(*needs))
            module.get(tasks)
            seconds = perf_counter() - start
            _check(module.get([actor.ran.remote() for actor in actors]), graph)
            return Outcome(seconds)

        yield run


@contextmanager
def ray_compiled(workers: int) -> Iterator[Run]:
    """Runs graphs as compiled graphs of Ray, over an actor for each worker.

    A graph is compiled when it is first run, which is not in its time, and again once another one
    has been. Its calls that nothing depends on are brought together by one more on each actor: the
    driver then hears once from each, and not from every such call.

    Raises:
        Missing: Ray is not installed.
    """
    with started_ray(workers) as module:
        dag = load("ray.dag")
        remote = module.remote(num_cpus=0)(_Actor)
        actors = [remote.remote() for _ in range(workers)]
        compiled: tuple[Shape, Any] | None = None

        def compile(graph: Shape) -> Any:
            places = _places(graph, workers)
            last = set(range(len(graph))).difference(*graph.before)
            with dag.InputNode() as given:
                calls: list[Any] = []
                for place, before in zip(places, graph.before, strict=True):
                    needs = [calls[at] for at in before] or [given]
                    calls.append(actors[place].run.bind(*needs))
                ends = []
                for place, actor in enumerate(actors):
                    mine = [calls[at] for at in sorted(last) if places[at] == place]
                    if mine:
                        ends.append(actor.ran.bind(*mine))
            # One execution at a time, and no result that is larger: as little memory as is needed.
            return dag.MultiOutputNode(ends).experimental_compile(
                _max_inflight_executions=1, _buffer_size_bytes=1_000
            )

        def run(graph: Shape, body: Body) -> Outcome:
            nonlocal compiled
            if compiled is None or compiled[0] is not graph:
                if compiled is not None:
                    # An actor is part of one compiled graph at a time.
                    compiled[1].teardown()
                module.get([actor.use.remote() for actor in actors])
                compiled = graph, compile(graph)
                module.get(compiled[1].execute(b""))
                sleep(SETTLING)
            # The actors' own threads answer calls that are no part of the graph.
            module.get([actor.use.remote(body) for actor in actors])
            start = perf_counter()
            try:
                module.get(compiled[1].execute(b""))
            except BaseException:
                # What calls of the same actor have passed on is still there: it cannot run again.
                compiled[1].teardown()
                compiled = None
                raise
            seconds = perf_counter() - start
            _check(module.get([actor.ran.remote() for actor in actors]), graph)
            return Outcome(seconds)

        yield run


def parla(graph: Shape, body: Body, workers: int, version: str) -> Outcome:
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


def in_rust(graph: Shape, seconds: float, workers: int) -> Outcome:
    """Run it on the core without Python: spawned in Rust, with bodies in Rust."""
    return Outcome(ch._core.spin_graph(graph.before, seconds, workers))


@dataclass(frozen=True)
class Peer:
    """Another runtime that runs graphs.

    Attributes:
        runtime: what results call it.
        opened: gives what runs graphs on so many workers, while a block runs.
        tuning: how it is run, so that it is at its best.
        most: the most tasks of a graph that it is given, if it cannot do with any number.
    """

    runtime: str
    opened: Callable[[int], AbstractContextManager[Run]]
    tuning: str
    most: int | None = None

    def run(self, graph: Shape, body: Body, workers: int) -> Outcome:
        """Run one graph.

        Raises:
            Missing: the runtime is not installed.
        """
        with self.opened(workers) as run:
            return run(graph, body)


PEERS: Mapping[str, Peer] = {
    "threadpool": Peer(
        THREAD_POOL,
        _anew(thread_pool),
        "knows no dependencies: who ends submits those that it was the last to hold up",
    ),
    "joblib": Peer(
        "joblib threads",
        _anew(joblib),
        "threads, which share the bodies; knows no dependencies: one level after the other, in one"
        " pool, its batches sized by itself",
    ),
    "dask": Peer("Dask threads", _anew(dask), "a graph of its own making instead of delayed calls"),
    "distributed": Peer(
        "Dask distributed",
        _anew(distributed),
        "scheduler and threads in one process, the graph handed over at once, no work stealing, no"
        " dashboard",
    ),
    "ray": Peer(
        "Ray",
        ray_tasks,
        "worker processes started before, and as nice as others; results passed as references, a"
        " small object store, no dashboard",
    ),
    "ray-actors": Peer(
        "Ray actors",
        ray_actors,
        "an actor a worker, each with its part of every row; only what another actor has is passed,"
        " as references, since an actor keeps its order; processes as nice as others, a small"
        " object store, no dashboard",
    ),
    "ray-compiled": Peer(
        "Ray compiled graphs",
        ray_compiled,
        "an actor a worker, each with its part of every row; compiled and executed once before,"
        " with buffers for one execution and of a thousand bytes; the last calls of an actor"
        " brought together by one more, so that the driver reads one result an actor; processes as"
        " nice as others, no dashboard",
        # Five milliseconds and more a task go into compiling.
        most=1_000,
    ),
    "parsl": Peer(
        "Parsl threads",
        _anew(parsl),
        "threads instead of processes, no scaling strategy, no memoization, no log",
    ),
}
"""The runtimes that are measured beside charioteer where they are installed, by what chooses
them."""


def gil_waited(runtime: ch.Runtime) -> float:
    """Seconds that threads of this process have waited for the interpreter.

    The sites of the gateway count for the whole process, so a run is the difference of two.
    """
    return float(sum(site["waited"] for site in runtime.stats()["gateway"].values()))
