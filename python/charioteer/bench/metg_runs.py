"""One run of METG: the curve of a runtime for a pattern, and where it crosses the levels.

A run takes one pattern and one runtime through task times that double: from a millisecond up, as
far as it takes to be efficient, and from there down until it is not. The number of tasks grows as
they shrink, so that every point takes about as long. *Efficiency* is the tasks' own time over that
of all workers. A point is the best of some repetitions, since what disturbs one only makes it
longer.

On devices GPUs take the place of workers in all that, and the runtime is opened once a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from charioteer.bench import runners
from charioteer.bench.bodies import spinning
from charioteer.bench.harness import OURS, Sample
from charioteer.bench.runners import PEERS, Outcome
from charioteer.graphs import Shape, sized

__all__ = [
    *("FIRST", "KERNELS", "LEVELS", "LONGEST", "NATIVE", "ON_DEVICES", "PLACED", "RUST", "WIDTH"),
    *("crossing", "metric", "sample"),
]

NATIVE = f"{OURS}, native bodies"
RUST = f"{OURS} in Rust"
PLACED = f"{OURS}, GPUs said"
KERNELS = f"{OURS}, native kernels"
ON_DEVICES: Mapping[str, runners.Work] = {
    OURS: "bodies",
    PLACED: "bodies in places",
    KERNELS: "kernels",
}
"""Who runs graphs on devices, by what tasks are there."""

LEVELS = (0.5, 0.9)
LEAST_STEPS = 8
REPEATS = 20
LONG = 3.0
"""How many times the seconds of a point it may take before it is not repeated."""
FIRST = 1e-3
"""Seconds of the tasks that a run begins with."""
LONGEST = 16e-3
"""Seconds of the longest tasks; what is not efficient with those is given as so many, and more."""
SHORTEST = 0.5e-6
"""Seconds below which the spinning itself is not exact."""
WIDTH = 8
"""Tasks of a step to each worker, or GPU."""


def metric(level: float) -> str:
    """What the metric of a level is called."""
    return f"METG({level:.0%})"


def crossing(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """The least task time at which a curve of (task time, efficiency) still reaches a level.

    Args:
        curve: from long tasks to short ones, each time above zero.
        level: between 0 and 1.

    Returns:
        The time, on a logarithmic scale between the shortest point that reaches the level and the
        next; the shortest one if that reaches it, ``None`` if none does. A longer one that does
        not was disturbed.
    """
    reached = [index for index, (_, efficiency) in enumerate(curve) if efficiency >= level]
    if not reached:
        return None
    above = curve[reached[-1]]
    if reached[-1] == len(curve) - 1:
        return above[0]
    below = curve[reached[-1] + 1]
    part = (above[1] - level) / (above[1] - below[1])
    return math.exp(math.log(above[0]) + part * (math.log(below[0]) - math.log(above[0])))


def sample(
    runtime: str, pattern: str, workers: int, seconds: float, devices: str | None = None
) -> Sample:
    """One run.

    Args:
        runtime: whose: charioteer, with bodies in Python or native ones or all in Rust, or the
            name of a peer in :data:`charioteer.bench.runners.PEERS`.
        pattern: of :data:`charioteer.graphs.PATTERNS`.
        workers: on how many.
        seconds: of task time that each point has, over all workers.
        devices: the machine whose GPUs run the tasks instead, by :data:`ON_DEVICES`; ``"gpu"`` for
            those that are found.

    Raises:
        Missing: the peer is not installed, or there are no such devices.
    """
    if devices is None:
        most = PEERS[runtime].most if runtime in PEERS else None
        with _opened(runtime, workers) as take:
            return _sample(take, pattern, workers, seconds, most)
    with runners.Devices(devices, ON_DEVICES[runtime], workers) as on:
        return _sample(on.run, pattern, on.gpus, seconds)


def _sample(
    take: Callable[[Shape, float], Outcome],
    pattern: str,
    units: int,
    seconds: float,
    most: int | None = None,
) -> Sample:
    """A run over so many workers, or GPUs, with so many tasks of a graph at most."""
    width = WIDTH * units
    curve: list[tuple[float, float]] = []

    def measure(time: float) -> float:
        steps = round(seconds / (REPEATS * time * width))
        if most is not None:
            steps = min(steps, most // width)
        steps = max(LEAST_STEPS, steps)
        graph = sized(pattern, steps * width, width)
        best = total = 0.0
        for _ in range(REPEATS):
            elapsed = take(graph, time).seconds
            total += elapsed
            best = max(best, len(graph) * time / (units * elapsed))
            if best >= max(LEVELS) or total > LONG * seconds:
                break
        curve.append((time, best))
        return best

    time = FIRST
    while measure(time) < max(LEVELS) and time < LONGEST:
        time *= 2
    curve.reverse()
    time = FIRST / 2
    if curve[-1][1] >= min(LEVELS):
        # Two in a row: one may be disturbed.
        failed = 0
        while failed < 2:
            failed = 0 if measure(time) >= min(LEVELS) else failed + 1
            if time <= SHORTEST:
                break
            time /= 2
    values = {}
    for level in LEVELS:
        at = crossing(curve, level)
        values[metric(level)] = 1e6 * (LONGEST if at is None else at)
    return Sample(values, curve=[(1e6 * time, efficiency) for time, efficiency in curve])


@contextmanager
def _opened(runtime: str, workers: int) -> Iterator[Callable[[Shape, float], Outcome]]:
    """What runs a graph with tasks of so many seconds, while the block runs."""
    if runtime == NATIVE:
        yield lambda graph, time: runners.native(graph, time, workers)
    elif runtime == RUST:
        yield lambda graph, time: runners.in_rust(graph, time, workers)
    elif runtime == OURS:
        yield lambda graph, time: runners.charioteer(graph, spinning(time, 0.0, 1), workers)
    else:
        with PEERS[runtime].opened(workers) as run:
            yield lambda graph, time: run(graph, spinning(time, 0.0, 1))
