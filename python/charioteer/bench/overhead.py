"""``charioteer bench overhead``: what the runtime itself costs, in time and memory.

Every figure that the project promises for its Python side is one bar here. The measures are lists
of contestants over :mod:`~charioteer.bench.workloads`, :mod:`~charioteer.bench.peers` and
:mod:`~charioteer.bench.probes`; the methods are told in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from charioteer.bench import native, probes, records, workloads
from charioteer.bench.command import (
    OptionError,
    add_outcome_arguments,
    add_peers_argument,
    add_runs_argument,
    carry_out,
    check_other_python,
    choice,
    positive,
)
from charioteer.bench.harness import OURS, Bar, Contestant, Key, Measure, Sample, absolute, ratio
from charioteer.bench.peers import PEERS, THREAD_POOL

__all__ = ["DESCRIPTION", "SUMMARY", "OptionError", "add_arguments", "measures", "run"]

BENCHMARK = "overhead"

SUMMARY = "what a task, a runtime and an import cost, beside other runtimes"

DESCRIPTION = """\
Measure what a task, a runtime and an import cost, beside other runtimes.

Each measure runs its contestants in turn, round after round, and reports medians and ranges with
the bar that the project sets itself. A peer that is not installed is shown as missing.
"""

WORKERS = (1, 2)
PER_TASK = "time per task"
EMPTY = "empty task"
CHAIN = "chain in a task space"
GRID = "grid in a task space"
MAP = "Runtime.map"
CALL = "call with two regions"
DATA_MAP = ".map with two regions"
LATENCIES = ("spawn to start", "result() round trip")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    add_runs_argument(parser)
    parser.add_argument(
        "--tasks",
        type=positive,
        metavar="N",
        help="tasks in one run of the cost of a task (default: 100000); peers run a part of it",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a look instead of a measurement: 3 rounds, fewer tasks, no Ray or distributed",
    )
    add_peers_argument(parser, PEERS)
    parser.add_argument(
        "--only", metavar="A,B", help=f"the measures to make: some of {', '.join(NAMES)}"
    )
    parser.add_argument(
        "--other-python",
        metavar="PATH",
        help="an interpreter that also has charioteer, free-threaded if this one is not: "
        "compares the two",
    )
    add_outcome_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Make the chosen measures, print them, write the records.

    Returns:
        0; 1 if a run of charioteer itself failed, or with ``--check`` if a bar does not hold.

    Raises:
        OptionError: the options name an unknown peer or measure, or a file that cannot be written.
    """
    settings = Settings.of(options)
    chosen = measures(settings, choice("measure", options.only, NAMES) or NAMES)
    return carry_out(BENCHMARK, chosen, settings.runs, options)


class Settings:
    """How much is measured, and beside whom."""

    def __init__(
        self,
        *,
        quick: bool = False,
        runs: int | None = None,
        tasks: int | None = None,
        peers: Sequence[str] | None = None,
        other_python: str | None = None,
    ) -> None:
        """Fill in the defaults of a full or a quick benchmark.

        Args:
            quick: whether a look is enough.
            runs: counted rounds.
            tasks: tasks in one run of the cost of a task.
            peers: names of the peers; by default all, or those in this process if ``quick``.
            other_python: the interpreter to compare this one with.
        """
        self.quick = quick
        self.runs = runs or (3 if quick else 5)
        self.tasks = tasks or (20_000 if quick else 100_000)
        if peers is None:
            peers = [name for name, peer in PEERS.items() if not (quick and peer.own_process)]
        self.peers = tuple(peers)
        self.other_python = other_python

    @classmethod
    def of(cls, options: argparse.Namespace) -> Settings:
        """The settings that the command's options ask for.

        Raises:
            OptionError: an unknown peer; an other interpreter that cannot be run, or is of the
                same kind as this one.
        """
        check_other_python(options.other_python)
        return cls(
            quick=options.quick,
            runs=options.runs,
            tasks=options.tasks,
            peers=choice("peer", options.peers, tuple(PEERS)),
            other_python=options.other_python,
        )


def measures(settings: Settings, names: Sequence[str]) -> list[Measure]:
    """The measures of these names under these settings, in the order of the benchmark."""
    return [make(settings) for name, make in _MEASURES.items() if name in names]


def _tasks(settings: Settings) -> Measure:
    tasks = settings.tasks
    side = math.isqrt(tasks)
    cases: list[tuple[str, Callable[[int, int], float], int, int]] = [
        (EMPTY, workloads.empty, tasks, tasks),
        (CHAIN, workloads.chain, tasks, tasks),
        (GRID, workloads.grid, side, side * side),
        ("spawn_many", workloads.spawn_many, tasks, tasks),
        (".map", workloads.task_map, tasks, tasks),
        (MAP, workloads.runtime_map, tasks, tasks),
    ]
    contestants = []
    for case, function, argument, count in cases:
        for workers in WORKERS:
            contestants.append(_per_task(OURS, case, function, argument, count, workers))
            if case == EMPTY:
                contestants += [_peer(name, tasks, workers) for name in settings.peers]
            if case == MAP and "threadpool" in settings.peers:
                few = max(100, tasks // 5)
                contestants.append(
                    _per_task(THREAD_POOL, case, workloads.executor_map, few, few, workers)
                )
    bars = []
    for workers in WORKERS:
        empty = Key(OURS, EMPTY, workers)
        for peer, limit in ((THREAD_POOL, 10.0), ("Ray", 400.0)):
            bars.append(
                Bar(
                    case=EMPTY,
                    workers=workers,
                    metric=f"{peer} / {OURS}",
                    unit="x",
                    values=ratio(Key(peer, EMPTY, workers), empty, PER_TASK),
                    limit=limit,
                    at_least=True,
                    lacking=f"{OURS} and {peer}",
                )
            )
    for case, limit in ((CHAIN, 1.5), (GRID, 2.0)):
        for workers in WORKERS:
            bars.append(
                Bar(
                    case=case,
                    workers=workers,
                    metric="this / empty",
                    unit="x",
                    values=ratio(Key(OURS, case, workers), Key(OURS, EMPTY, workers), PER_TASK),
                    limit=limit,
                    lacking="both cases",
                )
            )
    for case in ("spawn_many", ".map"):
        bars += [absolute(case, PER_TASK, "µs", 0.6, workers) for workers in WORKERS]
    return Measure(
        name="tasks",
        title="Cost of one task",
        contestants=contestants,
        units={PER_TASK: "µs"},
        bars=bars,
        note="From the first spawn until all are complete and the workers gone, over their number. "
        "The empty task's body captures a variable.",
    )


def _data(settings: Settings) -> Measure:
    tasks, n, repetitions = settings.tasks, 16 if settings.quick else 64, 20
    # With one task a column, two for each tile below the diagonal, and one for each pair of them.
    count = n * (n + 1) * (n + 2) // 6
    cholesky = f"Cholesky of {n} x {n} tiles"
    cases: list[tuple[str, Callable[[int, int], float], int, int, float]] = [
        (CALL, workloads.data_calls, tasks, tasks, 4.0),
        (DATA_MAP, workloads.data_map, tasks, tasks, 1.5),
        (cholesky, workloads.data_cholesky, n, count, 5.0),
    ]
    contestants = []
    bars = []
    for case, function, argument, number, limit in cases:
        for workers in WORKERS:
            contestants.append(_per_task(OURS, case, function, argument, number, workers))
            bars.append(absolute(case, PER_TASK, "µs", limit, workers))
    flat = f"{repetitions} times {cholesky}"
    contestants.append(_probe(flat, "cholesky", {"n": n, "repetitions": repetitions}))
    bars.append(absolute(flat, "growth", "MiB", 4))
    return Measure(
        name="data",
        title="Cost of one task whose order is inferred",
        contestants=contestants,
        units={PER_TASK: "µs", "growth": "MiB", "resident memory": "MiB"},
        bars=bars,
        note="Bodies are empty. Calls and .map have tasks that read one region and write another; "
        "each depends on the one before it.",
    )


def _latency(settings: Settings) -> Measure:
    repeats = 50 if settings.quick else 200
    functions = [(OURS, workloads.charioteer_latency)]
    if "threadpool" in settings.peers:
        functions.append((THREAD_POOL, workloads.executor_latency))
    contestants = [
        Contestant(
            runtime,
            metric,
            functools.partial(_latency_run, function, index, repeats, workers),
            workers,
            {"repeats": repeats},
        )
        for index, metric in enumerate(LATENCIES)
        for workers in WORKERS
        for runtime, function in functions
    ]
    bars = [
        Bar(
            case=metric,
            workers=workers,
            metric=f"{OURS} / {THREAD_POOL}",
            unit="x",
            values=ratio(Key(OURS, metric, workers), Key(THREAD_POOL, metric, workers), "latency"),
            limit=1.0,
            lacking=f"{OURS} and {THREAD_POOL}",
        )
        for metric in LATENCIES
        for workers in WORKERS
    ]
    return Measure(
        name="latency",
        title="Latency of one task on an idle runtime",
        contestants=contestants,
        units={"latency": "µs"},
        bars=bars,
    )


def _latency_run(
    function: Callable[[int, int], tuple[float, float]], index: int, repeats: int, workers: int
) -> Sample:
    return Sample({"latency": 1e6 * function(repeats, workers)[index]})


def _native(settings: Settings) -> Measure:
    tasks = 200 if settings.quick else 1_000
    workers = 2

    @functools.cache
    def body() -> Callable[[], None]:
        return native.calibrated(1e-3)

    case = f"{tasks:,} times 1 ms"
    functions: list[tuple[str, int, Callable[[], float]]] = [
        ("calls in a loop", 1, lambda: native.serial(body(), tasks)),
        (OURS, workers, lambda: workloads.native(body(), tasks, workers)),
        ("bare threads", workers, lambda: native.bare_threads(body(), tasks, workers)),
    ]
    if "threadpool" in settings.peers:
        functions.append(
            (THREAD_POOL, workers, lambda: workloads.executor_native(body(), tasks, workers))
        )
    serial = Key("calls in a loop", case, 1)
    return Measure(
        name="native",
        title="Tasks of 1 ms that release the GIL",
        contestants=[
            Contestant(
                runtime,
                case,
                functools.partial(_seconds_run, function),
                width,
                {"tasks": tasks, "seconds": 1e-3},
            )
            for runtime, width, function in functions
        ],
        units={"time": "s"},
        bars=[
            Bar(
                case=case,
                workers=workers,
                metric="efficiency",
                unit="",
                values=ratio(serial, Key(OURS, case, workers), "time", scale=1 / workers),
                limit=0.97,
                at_least=True,
                lacking="charioteer and the calls in a loop",
            )
        ],
        note="Efficiency: the time of the loop over the workers and their time. "
        "Bare threads show what this machine allows.",
    )


def _seconds_run(function: Callable[[], float]) -> Sample:
    return Sample({"time": function()})


def _memory(settings: Settings) -> Measure:
    tasks = 100_000 if settings.quick else 1_000_000
    contestants = []
    bars = []
    for case, keep in (("handles dropped", False), ("handles kept", True)):
        name = f"{tasks:,} pending, {case}"
        contestants.append(_probe(name, "pending", {"tasks": tasks, "keep": keep}))
        bars.append(absolute(name, "memory per task", "B", 1024))
    return Measure(
        name="memory",
        title="Memory of a pending task",
        contestants=contestants,
        units={"memory per task": "B"},
        bars=bars,
        warmup=0,
    )


def _flat(settings: Settings) -> Measure:
    tasks = 1_000_000 if settings.quick else 10_000_000
    contestants = []
    bars = []
    for case, probe in (("anonymous", "anonymous"), ("rotating spaces", "rotating")):
        name = f"{tasks:,} tasks, {case}"
        contestants.append(_probe(name, probe, {"tasks": tasks}))
        bars.append(absolute(name, "growth", "MiB", 4))
    return Measure(
        name="flat",
        title="Memory while many tasks run",
        contestants=contestants,
        units={"growth": "MiB", "resident memory": "MiB"},
        bars=bars,
        warmup=0,
        note="Growth is the highest of the last nine tenths over that after the first tenth.",
    )


def _idle(settings: Settings) -> Measure:
    seconds = 2.0 if settings.quick else 10.0
    name = "10 s of an open runtime"
    params = {"seconds": seconds}
    return Measure(
        name="idle",
        title="Processor time of an idle runtime",
        contestants=[_probe(name, "idle", params, workers=16)],
        units={"processor time": "ms"},
        bars=[absolute(name, "processor time", "ms", 50.0, workers=16)],
        warmup=0,
    )


def _start(settings: Settings) -> Measure:
    workers, repeats = 2, 20
    name = "start and close"
    return Measure(
        name="start",
        title="Start and close of a runtime",
        contestants=[
            Contestant(
                OURS,
                name,
                lambda: Sample({"time": 1e3 * workloads.start_and_close(repeats, workers)}),
                workers,
                {"repeats": repeats},
            )
        ],
        units={"time": "ms"},
        bars=[absolute(name, "time", "ms", 2.0, workers)],
    )


def _import(settings: Settings) -> Measure:
    both, alone = "import numpy, charioteer", "import numpy"
    keys = (Key(OURS, both), Key("NumPy", alone))
    return Measure(
        name="import",
        title="Import",
        contestants=[
            Contestant(OURS, both, functools.partial(probes.import_time, "charioteer")),
            Contestant("NumPy", alone, functools.partial(probes.import_time, "numpy")),
        ],
        units={"time": "ms"},
        bars=[
            Bar(
                case="import charioteer",
                metric="above import numpy",
                unit="ms",
                values=lambda result: [
                    ours - numpy
                    for ours, numpy in zip(
                        *(result[key].values.get("time", []) for key in keys), strict=False
                    )
                ],
                limit=60.0,
                lacking="both imports",
            )
        ],
    )


def _free_threading(settings: Settings) -> Measure:
    workers, tasks = 2, settings.tasks
    here, there = "charioteer, this Python", "charioteer, the other"
    contestants = []
    if settings.other_python is not None:
        contestants = [
            Contestant(
                runtime,
                EMPTY,
                functools.partial(
                    probes.call, "empty", python=python, workers=workers, tasks=tasks
                ),
                workers,
                {"tasks": tasks},
            )
            for runtime, python in ((here, None), (there, settings.other_python))
        ]
    over, under = (there, here) if records.gil_enabled() else (here, there)
    return Measure(
        name="free-threading",
        title="Free-threaded interpreter",
        contestants=contestants,
        units={PER_TASK: "µs"},
        bars=[
            Bar(
                case=EMPTY,
                workers=workers,
                metric="free-threaded / GIL",
                unit="x",
                values=ratio(Key(over, EMPTY, workers), Key(under, EMPTY, workers), PER_TASK),
                limit=1.6,
                lacking="--other-python PATH",
            )
        ],
    )


_MEASURES: dict[str, Callable[[Settings], Measure]] = {
    "tasks": _tasks,
    "data": _data,
    "latency": _latency,
    "native": _native,
    "memory": _memory,
    "flat": _flat,
    "idle": _idle,
    "start": _start,
    "import": _import,
    "free-threading": _free_threading,
}

NAMES = tuple(_MEASURES)


def _per_task(
    runtime: str,
    case: str,
    function: Callable[[int, int], float],
    argument: int,
    count: int,
    workers: int,
) -> Contestant:
    def once() -> Sample:
        return Sample({PER_TASK: 1e6 * function(argument, workers) / count})

    return Contestant(runtime, case, once, workers, {"tasks": count})


def _peer(name: str, tasks: int, workers: int) -> Contestant:
    peer = PEERS[name]
    count = max(100, round(tasks * peer.share))
    if not peer.own_process:
        return _per_task(peer.runtime, EMPTY, peer.empty, count, count, workers)
    run = functools.partial(probes.call, "peer", peer=name, workers=workers, tasks=count)
    return Contestant(peer.runtime, EMPTY, run, workers, {"tasks": count})


def _probe(case: str, probe: str, params: dict[str, Any], workers: int | None = None) -> Contestant:
    given = params if workers is None else {"workers": workers, **params}
    return Contestant(OURS, case, functools.partial(probes.call, probe, **given), workers, params)
