"""The runs of the GIL study: one function a kind, with parameters that JSON can carry.

Each makes one run and returns its metrics. A contestant calls one in this process, or has it called
in a process of its own under an interpreter of its choice (the probe ``gil`` of
:mod:`charioteer.bench.probes`), so whatever tells two contestants apart is a parameter. Times are
in milliseconds, rates in tasks per millisecond.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from statistics import median
from time import perf_counter, thread_time
from types import CodeType, FunctionType
from typing import Any

import charioteer as ch
from charioteer import _core
from charioteer.bench import bodies, runners
from charioteer.bench.harness import OURS
from charioteer.bench.peers import THREAD_POOL
from charioteer.graphs import Shape

__all__ = [
    "BARE",
    "DASK",
    "JOBLIB",
    "LIMIT",
    "LOOP",
    "NATIVE",
    "NATIVE_LIMIT",
    "PARLA_2",
    "PARLA_3",
    "RAY",
    "RUNS",
    "SHARED",
    "SINGLE",
]

NATIVE = f"{OURS}, native bodies"
LIMIT = "bare threads"
NATIVE_LIMIT = "bare threads in C"
LOOP = "calls in a loop"
BARE = "a thread and a loop"
DASK = "Dask threads"
JOBLIB = "joblib threads"
RAY = "Ray"
PARLA_2 = "Parla 0.2"
PARLA_3 = "Parla 0.3"


def cell(
    runtime: str,
    shape: str,
    tasks: int,
    seconds: float,
    held: float,
    slices: int,
    workers: int,
    cores: int | None = None,
    width: int | None = None,
) -> dict[str, float]:
    """A graph of spinning bodies.

    Args:
        runtime: whose; names of the study.
        shape, tasks: the graph.
        seconds, held, slices: the body, see :func:`charioteer.bench.bodies.spinning`.
        workers: on how many.
        cores: how many the ideal has, if not as many.
        width: how many workers compete for the GIL, for charioteer.
    """
    graph = runners.SHAPES[shape](tasks)
    body = bodies.spinning(seconds, held, slices)
    if runtime == NATIVE:
        outcome = runners.native(graph, seconds, workers)
    elif runtime == NATIVE_LIMIT:
        outcome = runners.bare_spins(graph, seconds, workers)
    else:
        outcome = _outcome(runtime, graph, body, workers, width)
    return _metrics(outcome, graph, seconds, held, cores or workers)


def _outcome(
    runtime: str, graph: Shape, body: Callable[[], None], workers: int, width: int | None
) -> runners.Outcome:
    if runtime == OURS:
        return runners.charioteer(graph, body, workers, width)
    if runtime in (PARLA_2, PARLA_3):
        return runners.parla(graph, body, workers, runtime.split()[-1])
    peers: dict[str, Callable[..., runners.Outcome]] = {
        LIMIT: runners.bare_threads,
        THREAD_POOL: runners.thread_pool,
        DASK: runners.dask,
        JOBLIB: runners.joblib,
        RAY: runners.PEERS["ray"].run,
    }
    return peers[runtime](graph, body, workers)


def _metrics(
    outcome: runners.Outcome, graph: Shape, seconds: float, held: float, cores: int
) -> dict[str, float]:
    values = {
        "time": 1e3 * outcome.seconds,
        "efficiency": graph.ideal(seconds, held, cores) / outcome.seconds,
        "of the cores": graph.ideal(seconds, held, cores, gil=False) / outcome.seconds,
    }
    if outcome.waited is not None:
        values["waited for the GIL"] = 1e3 * outcome.waited
    return values


def pure(
    runtime: str, tasks: int, rounds: int, workers: int, width: int | None = None
) -> dict[str, float]:
    """Bodies of bytecode alone: a loop of so many rounds."""
    body = bodies.pure(rounds)
    if runtime == LOOP:
        start = perf_counter()
        for _ in range(tasks):
            body()
        return {"time": 1e3 * (perf_counter() - start)}
    outcome = _outcome(runtime, runners.SHAPES["independent"](tasks), body, workers, width)
    return {"time": 1e3 * outcome.seconds}


def starve(
    runtime: str, workers: int, slices: int, piece: float, window: float, width: int | None = None
) -> dict[str, float]:
    """A body that lets the GIL go so many times, while the main thread spawns without pause.

    Whenever the body has ended it starts anew, for ``window`` seconds and until it has ended once.
    The rate of the spawns is compared with that of the same loop without the body.
    """
    with _launcher(runtime, workers, width) as launch:
        undisturbed, _ = _spawn_for(window, launch, None)
    work = _core.work

    def body(ended: list[float]) -> None:
        for _ in range(slices):
            work(piece)
        ended.append(perf_counter())

    with _launcher(runtime, workers, width) as launch:
        rate, times = _spawn_for(window, launch, body)
    return {"body": 1e3 * median(times), "spawn rate": rate, "rate kept": rate / undisturbed}


Launch = Callable[[Callable[[], None] | None], object]


@contextmanager
def _launcher(runtime: str, workers: int, width: int | None) -> Iterator[Launch]:
    """What starts a body, or an empty task for ``None``."""

    def empty() -> None:
        return None

    if runtime == OURS:
        with ch.Runtime(workers=workers, gil=width or "auto"):
            yield lambda body: ch.spawn(body or empty)
    elif runtime == THREAD_POOL:
        with ThreadPoolExecutor(workers) as executor:
            yield lambda body: executor.submit(body or empty)
    else:
        threads: list[threading.Thread] = []

        def launch(body: Callable[[], None] | None) -> None:
            if body is None:
                empty()
            else:
                threads.append(threading.Thread(target=body))
                threads[-1].start()

        yield launch
        for thread in threads:
            thread.join()


def _spawn_for(
    window: float, launch: Launch, body: Callable[[list[float]], None] | None
) -> tuple[float, list[float]]:
    """Launch empty tasks for so long: their rate a millisecond, and how long each body took."""
    ended: list[float] = []
    begun: list[float] = []
    spawned = 0
    now = start = perf_counter()
    while now < start + window or (body is not None and not ended):
        if body is not None and len(begun) == len(ended):
            begun.append(now)
            launch(lambda: body(ended))
        launch(None)
        spawned += 1
        now = perf_counter()
    rate = spawned / (now - start) / 1e3
    return rate, [end - begin for begin, end in zip(begun, ended, strict=False)]


def changes(
    runtime: str,
    workers: int,
    phases: int,
    seconds: float,
    rounds: int,
    width: int | None = None,
) -> dict[str, float]:
    """Phases of bytecode and of work without the GIL in turn, each complete before the next.

    A phase of either kind takes 40 times ``seconds`` at best. Bodies of bytecode run one at a time,
    so the processor time that they use is the least that their phases can take in this run: how
    fast a processor is may change by itself, and the rest is what the GIL and the runtime cost.
    """
    pure = bodies.pure(rounds)
    used: list[float] = []

    def clocked() -> None:
        start = thread_time()
        pure()
        used.append(thread_time() - start)

    kinds = ((clocked, 40), (bodies.spinning(seconds, 0.0, 1), 40 * workers))
    times: tuple[list[float], list[float]] = ([], [])

    def run(launch: Callable[[Callable[[], None]], Any], complete: Callable[[Any], object]) -> None:
        for phase in range(phases):
            body, tasks = kinds[phase % 2]
            start = perf_counter()
            complete([launch(body) for _ in range(tasks)])
            times[phase % 2].append(perf_counter() - start)

    if runtime == OURS:
        with ch.Runtime(workers=workers, gil=width or "auto"):
            run(ch.spawn, ch.wait)
    else:
        with ThreadPoolExecutor(workers) as executor:
            run(executor.submit, wait)
    held, free = (1e3 * sum(kind) for kind in times)
    return {
        "GIL-bound phases": held,
        "GIL-free phases": free,
        "time": held + free,
        "GIL-bound phases, over their processor time": held / (1e3 * sum(used)),
    }


def disturb(runtime: str, outside: str, **given: Any) -> dict[str, float]:
    """A :func:`cell` beside a thread that never lets the GIL go of its own will.

    Args:
        runtime: whose.
        outside: what the thread runs: ``"nothing"``, ``"bytecode"``, which CPython interrupts after
            its switch interval, or ``"C"``, calls of 5 ms that nothing interrupts.
        given: the cell's other parameters.
    """
    stop = threading.Event()
    running = threading.Event()
    is_set, count, work = stop.is_set, bodies.count, _core.work

    def hold() -> None:
        running.set()
        while not is_set():
            if outside == "C":
                work(0.005, 1.0)
            else:
                count(1_000)

    thread = threading.Thread(target=hold)
    if outside != "nothing":
        thread.start()
        running.wait()
    try:
        return cell(runtime, **given)
    finally:
        stop.set()
        if outside != "nothing":
            thread.join()


def single(what: str, rounds: int) -> dict[str, float]:
    """Code of one thread: the best nanoseconds a round, of five tries."""
    function = SINGLE[what]
    best = min(function(rounds) for _ in range(5))
    return {"time per round": 1e9 * best / rounds}


def _loop(rounds: int) -> float:
    start = perf_counter()
    bodies.count(rounds)
    return perf_counter() - start


def _calls(rounds: int) -> float:
    def add(a: int, b: int) -> int:
        return a + b

    start = perf_counter()
    for index in range(rounds):
        add(index, 1)
    return perf_counter() - start


class _Point:
    def __init__(self) -> None:
        self.x = 0.0

    def move(self, by: float) -> None:
        self.x += by


def _methods(rounds: int) -> float:
    point = _Point()
    start = perf_counter()
    for _ in range(rounds):
        point.move(0.5)
    return perf_counter() - start


def _containers(rounds: int) -> float:
    start = perf_counter()
    table: dict[int, list[int]] = {}
    for index in range(rounds):
        table.setdefault(index & 255, []).append(index)
    return perf_counter() - start


def _closures(rounds: int) -> float:
    start = perf_counter()
    kept = []
    for index in range(rounds):
        kept.append(lambda: index)
    return perf_counter() - start


def _inline(rounds: int) -> float:
    def body() -> None:
        return None

    with ch.Runtime(workers=0):
        start = perf_counter()
        for _ in range(rounds):
            ch.spawn(body)
        return perf_counter() - start


SINGLE: dict[str, Callable[[int], float]] = {
    "a loop": _loop,
    "function calls": _calls,
    "method calls": _methods,
    "dictionaries and lists": _containers,
    "closures": _closures,
    "inline tasks": _inline,
}

SHARED = ("function", "space", "argument")
"""What spawning threads may share."""


def shared(threads: int, workers: int, tasks: int, sharing: list[str]) -> dict[str, float]:
    """So many threads that spawn at once, each as many tasks.

    Each uses a function, with code of its own, a task space and an argument, and those named in
    ``sharing`` are the same for all. The rate is that of the spawns, until the last thread is
    through; *complete* that of the tasks, until all are.
    """

    def things() -> dict[str, Any]:
        return {"function": _own_function(), "space": ch.TaskSpace("shared"), "argument": []}

    common = things()
    meeting = threading.Barrier(threads + 1)
    failures: list[BaseException] = []

    def spawn(me: int) -> None:
        own = things() | {name: common[name] for name in sharing}
        function, space, argument = own["function"], own["space"], own["argument"]
        first = me * tasks
        try:
            # A function's first task pays for a look at its code.
            function(argument)
            meeting.wait()
            for index in range(first, first + tasks):
                function.options(space[index])(argument)
            meeting.wait()
        except BaseException as failure:
            failures.append(failure)
            meeting.abort()  # Nobody waits for this thread.

    with ch.Runtime(workers=workers):
        spawners = [threading.Thread(target=spawn, args=(me,)) for me in range(threads)]
        for thread in spawners:
            thread.start()
        start = perf_counter()
        with suppress(threading.BrokenBarrierError):
            meeting.wait()
            start = perf_counter()
            meeting.wait()
        spawned = perf_counter() - start
        for thread in spawners:
            thread.join()
    complete = perf_counter() - start
    if failures:
        raise failures[0]
    total = threads * tasks
    return {"spawn rate": total / spawned / 1e3, "complete": total / complete / 1e3}


def _own_function() -> Any:
    def body(argument: object) -> object:
        return argument

    # Functions of one source share their code object, which counts its references too.
    code: CodeType = body.__code__.replace()
    return ch.task(FunctionType(code, globals(), "body"))


RUNS: dict[str, Callable[..., dict[str, float]]] = {
    "cell": cell,
    "changes": changes,
    "disturb": disturb,
    "pure": pure,
    "shared": shared,
    "single": single,
    "starve": starve,
}
