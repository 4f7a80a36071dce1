"""``charioteer bench metg``: the smallest tasks that a runtime still runs efficiently.

The *minimum effective task granularity* METG(50 %) is the task time at which half of the workers'
time goes into tasks (Slaughter et al., *Task Bench*, SC 2020). Unlike the time of an empty task it
does not depend on what one calls overhead, and says what a user wants to know: how fine a program
may be cut on this machine, with dependencies of this pattern.

Method. A run takes one pattern and one runtime through task times that double: from a millisecond
up, as far as it takes to be efficient, and from there down until it is not. The number of tasks
grows as they shrink, so that every point takes about as long. *Efficiency* is the tasks' own time
over that of all workers. Where it crosses a level, the task time is found between the two points
around it, on a logarithmic scale.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Mapping, Sequence

from charioteer.bench import graphs, records
from charioteer.bench.bodies import spinning
from charioteer.bench.command import (
    OptionError,
    add_outcome_arguments,
    carry_out,
    choice,
    positive,
)
from charioteer.bench.graphs import Graph, Outcome
from charioteer.bench.harness import OURS, Bar, Contestant, Key, Measure, Sample, ratio, values_of

__all__ = ["DESCRIPTION", "SUMMARY", "OptionError", "add_arguments", "crossing", "measures", "run"]

BENCHMARK = "metg"

SUMMARY = "the smallest tasks that run efficiently, by pattern of dependence"

DESCRIPTION = """\
Find the minimum effective task granularity: the task time at which 50 % (and 90 %) of the workers'
time goes into tasks, for patterns of dependence between them.

Tasks spin without the GIL. Charioteer runs them as bodies in Python and as native bodies. Where
tasks of 16 ms do not reach a level, 16,000 µs stand for that and more.
"""

NATIVE = f"{OURS}, native bodies"
POOL = "ThreadPoolExecutor"
PEERS: Mapping[str, tuple[str, Callable[[Graph, Callable[[], object], int], Outcome]]] = {
    "threadpool": (POOL, graphs.thread_pool),
    "dask": ("Dask threads", graphs.dask),
    "joblib": ("joblib threads", graphs.joblib),
    "ray": ("Ray", graphs.ray),
}
"""What results call each, and how it runs a graph."""

LEVELS = (0.5, 0.9)
LEAST_STEPS = 8
DEFAULT_PATTERNS = ("trivial", "stencil", "fft", "tree", "random")
FIRST = 1e-3
"""Seconds of the tasks that a run begins with."""
LONGEST = 16e-3
"""Seconds of the longest tasks; what is not efficient with those is given as so many, and more."""
SHORTEST = 0.5e-6
"""Seconds below which the spinning itself is not exact."""
LIMITS = {OURS: 8.0, NATIVE: 3.0}
"""Microseconds that METG(50 %) may be for the patterns in ``LIMITED``."""
LIMITED = ("stencil", "fft")
PART = 0.25
"""What part of the best peer's METG(50 %) that of Python bodies may be, for those patterns."""
WIDTH = 8
"""Tasks of a step to each worker."""
UNITS = {f"METG({level:.0%})": "µs" for level in LEVELS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--runs", type=positive, metavar="N", help="counted rounds (default: 5)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.1,
        metavar="S",
        help="seconds of task time that each point has, over all workers (default: 0.1)",
    )
    parser.add_argument(
        "--workers", type=positive, default=2, metavar="N", help="workers (default: 2)"
    )
    parser.add_argument("--quick", action="store_true", help="a look: 2 rounds, two patterns")
    parser.add_argument(
        "--patterns",
        metavar="A,B",
        help=f"all, or some of {', '.join(graphs.PATTERNS)} "
        f"(default: {','.join(DEFAULT_PATTERNS)})",
    )
    parser.add_argument(
        "--peers",
        metavar="A,B",
        help=f"who runs beside charioteer: all, none, or some of {', '.join(PEERS)}",
    )
    add_outcome_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Make the measures, print them, write the records.

    Returns:
        0; 1 if a run of charioteer itself failed, or with ``--check`` if a bar does not hold.

    Raises:
        OptionError: an option names what does not exist, or a file that cannot be written.
    """
    if not 0 < options.seconds <= 60:
        raise OptionError("--seconds is above 0 and at most 60")
    everything = options.patterns == "all"
    patterns = (
        tuple(graphs.PATTERNS)
        if everything
        else choice("pattern", options.patterns, tuple(graphs.PATTERNS))
    )
    if patterns is None:
        patterns = LIMITED if options.quick else DEFAULT_PATTERNS
    peers = choice("peer", options.peers, tuple(PEERS))
    if peers is None:
        peers = ("threadpool",) if options.quick else tuple(PEERS)
    runs = options.runs or (2 if options.quick else 5)
    chosen = measures(patterns, peers, options.workers, options.seconds)
    return carry_out(BENCHMARK, chosen, runs, options)


def measures(
    patterns: Sequence[str], peers: Sequence[str], workers: int, seconds: float
) -> list[Measure]:
    """The measures: one a pattern, so that what is compared runs side by side."""
    return [_measure(pattern, peers, workers, seconds) for pattern in patterns]


def crossing(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """The task time at which a curve of (task time, efficiency) falls below a level.

    Args:
        curve: from long tasks to short ones, each time above zero.
        level: between 0 and 1.

    Returns:
        The time, on a logarithmic scale between the two points around it; the shortest one if
        the curve stays above the level, ``None`` if it begins below.
    """
    if not curve or curve[0][1] < level:
        return None
    above = curve[0]
    for point in curve[1:]:
        if point[1] < level:
            part = (above[1] - level) / (above[1] - point[1])
            return math.exp(math.log(above[0]) + part * (math.log(point[0]) - math.log(above[0])))
        above = point
    return above[0]


def _sample(
    pattern: str,
    workers: int,
    seconds: float,
    take: Callable[[Graph, float], Outcome],
) -> Sample:
    """One run: the curve from long tasks to short ones, and where it crosses the levels."""
    width = WIDTH * workers
    curve: list[tuple[float, float]] = []

    def measure(time: float) -> float:
        steps = max(LEAST_STEPS, round(seconds / (time * width)))
        graph = graphs.pattern(pattern, width, steps)
        elapsed = take(graph, time).seconds
        efficiency = len(graph) * time / (workers * elapsed)
        curve.append((time, efficiency))
        return efficiency

    time = FIRST
    while measure(time) < max(LEVELS) and time < LONGEST:
        time *= 2
    curve.reverse()
    time = FIRST / 2
    if curve[-1][1] >= min(LEVELS):
        while measure(time) >= min(LEVELS) and time > SHORTEST:
            time /= 2
    values = {}
    for level in LEVELS:
        at = crossing(curve, level)
        values[f"METG({level:.0%})"] = 1e6 * (LONGEST if at is None else at)
    return Sample(values)


def _measure(pattern: str, peers: Sequence[str], workers: int, seconds: float) -> Measure:
    def python_body(
        run: Callable[[Graph, Callable[[], object], int], Outcome],
    ) -> Callable[[Graph, float], Outcome]:
        return lambda graph, time: run(graph, spinning(time, 0.0, 1), workers)

    runtimes: dict[str, Callable[[Graph, float], Outcome]] = {
        OURS: python_body(graphs.charioteer),
        NATIVE: lambda graph, time: graphs.native(graph, time, workers),
    }
    for name in peers:
        runtime, runner = PEERS[name]
        runtimes[runtime] = python_body(runner)
    contestants = [
        Contestant(
            runtime,
            pattern,
            functools.partial(_sample, pattern, workers, seconds, take),
            workers,
            {"width": WIDTH * workers, "seconds": seconds},
        )
        for runtime, take in runtimes.items()
    ]
    half = next(iter(UNITS))
    bars = []
    if pattern in LIMITED:
        bars = [
            Bar(
                case=pattern,
                metric=f"{half}, {what}",
                unit="µs",
                values=values_of(Key(runtime, pattern, workers), half),
                limit=LIMITS[runtime],
                workers=workers,
                lacking="a run without failure",
            )
            for runtime, what in ((OURS, "Python bodies"), (NATIVE, "native bodies"))
        ]
        bars += [
            Bar(
                case=pattern,
                metric=f"{OURS} / {PEERS[name][0]}",
                unit="x",
                values=ratio(
                    Key(OURS, pattern, workers), Key(PEERS[name][0], pattern, workers), half
                ),
                limit=PART,
                workers=workers,
                lacking=PEERS[name][0],
            )
            for name in peers
        ]
    return Measure(
        name=pattern,
        title=f"Minimum effective task granularity: {pattern}",
        contestants=contestants,
        units=UNITS,
        bars=bars,
        # The long tasks that a run begins with warm up for those that matter.
        warmup=0,
        note=f"{WIDTH * workers} tasks a step on {workers} of {records.usable_cores()} cores. "
        "The thread that spawns is one more.",
    )
