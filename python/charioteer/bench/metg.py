"""``charioteer bench metg``: the smallest tasks that a runtime still runs efficiently.

The *minimum effective task granularity* METG(50 %) is the task time at which half of the workers'
time goes into tasks (Slaughter et al., *Task Bench*, SC 2020). Unlike the time of an empty task it
does not depend on what one calls overhead, and says what a user wants to know: how fine a program
may be cut on this machine, with dependencies of this pattern.

Every run is a process of its own; what it does is told in :mod:`charioteer.bench.metg_runs`. Where
the curve crosses a level, the task time is found between the two points around it, on a logarithmic
scale.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import charioteer as ch
from charioteer.bench import pages, probes, records
from charioteer.bench.command import (
    OptionError,
    add_outcome_arguments,
    add_peers_argument,
    add_runs_argument,
    carried_out,
    check_writable,
    choice,
    positive,
)
from charioteer.bench.harness import (
    OURS,
    Bar,
    Contestant,
    Key,
    Measure,
    Result,
    values_of,
)
from charioteer.bench.metg_runs import LEVELS, LONGEST, NATIVE, ON_DEVICES, RUST, WIDTH, metric
from charioteer.bench.plots import Panel, plot
from charioteer.bench.runners import PEERS
from charioteer.graphs import PATTERNS

__all__ = ["DESCRIPTION", "SUMMARY", "OptionError", "add_arguments", "curves", "measures", "run"]

BENCHMARK = "metg"

SUMMARY = "the smallest tasks that run efficiently, by pattern of dependence"

DESCRIPTION = """\
Find the minimum effective task granularity: the task time at which 50 % (and 90 %) of the workers'
time goes into tasks, for patterns of dependence between them.

Tasks spin without the GIL. Charioteer runs them as bodies in Python, as native bodies, and in Rust,
without Python. Where tasks of 16 ms do not reach a level, 16,000 µs stand for that and more.

With --devices tasks are on one GPU each, and level and time are those of the GPUs: bodies in Python
that launch a kernel which spins, on GPUs that the runtime chooses or that are said, and native
kernels.
"""

DEFAULT_PATTERNS = ("independent", "stencil", "fft", "tree", "random")
LIMITS = {RUST: 1.0, NATIVE: 3.0, OURS: 8.0}
"""Microseconds that METG(50 %) may be for the patterns in ``LIMITED``."""
LIMITED = ("stencil", "fft")
ON_GPUS = 15.0
"""Microseconds that it may be on GPUs, for bodies in Python and those patterns."""
PART = 0.25
"""What part of the best peer's METG(50 %) that of Python bodies may be, for those patterns."""
UNITS = {metric(level): "µs" for level in LEVELS}
HALF = metric(min(LEVELS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    add_runs_argument(parser)
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
        help=f"all, or some of {', '.join(PATTERNS)} (default: {','.join(DEFAULT_PATTERNS)})",
    )
    add_peers_argument(parser, PEERS)
    parser.add_argument(
        "--devices",
        metavar="MACHINE",
        help="run tasks on GPUs: gpu for those of this machine, or virtual:N; without peers",
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="write the efficiency curves to FILE, a page (.html) or Markdown with images (.md)",
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
        tuple(PATTERNS) if everything else choice("pattern", options.patterns, tuple(PATTERNS))
    )
    if patterns is None:
        patterns = LIMITED if options.quick else DEFAULT_PATTERNS
    peers = choice("peer", options.peers, tuple(PEERS))
    if peers is None:
        peers = ("threadpool",) if options.quick else tuple(PEERS)
    runs = options.runs or (2 if options.quick else 5)
    if options.report is not None:
        if Path(options.report).suffix not in pages.SUFFIXES:
            raise OptionError(f"--report ends in {' or '.join(pages.SUFFIXES)}")
        check_writable(options.report)
    if options.devices is None:
        chosen = measures(patterns, peers, options.workers, options.seconds)
    elif options.peers not in (None, "none"):
        raise OptionError("--peers: none of them runs tasks on GPUs")
    else:
        chosen = on_devices(patterns, options.devices, options.workers, options.seconds)
    status, conduct = carried_out(BENCHMARK, chosen, runs, options)
    if options.report is not None:
        pages.write(options.report, "The smallest tasks", _page(conduct.entries))
    return status


def measures(
    patterns: Sequence[str], peers: Sequence[str], workers: int, seconds: float
) -> list[Measure]:
    """The measures: one a pattern, so that what is compared runs side by side."""
    return [_measure(pattern, peers, workers, seconds) for pattern in patterns]


def curves(entries: Sequence[records.Record]) -> list[Panel]:
    """The efficiency curves in records of this benchmark, a panel a pattern: the median of the
    rounds at each task time, in microseconds."""
    panels: dict[str, dict[str, dict[float, float]]] = {}
    for entry in entries:
        found = entry.params.get("curves")
        if entry.benchmark != BENCHMARK or not found or entry.metric != HALF:
            continue
        points: dict[float, list[float]] = {}
        for curve in found:
            for time, efficiency in curve:
                points.setdefault(time, []).append(efficiency)
        lines = panels.setdefault(entry.case, {})
        lines[entry.runtime] = {time: median(points[time]) for time in sorted(points)}
    return list(panels.items())


def _page(entries: Sequence[records.Record]) -> list[pages.Block]:
    panels = curves(entries)
    blocks: list[pages.Block] = [pages.Heading("The smallest tasks that run efficiently", 1)]
    if not panels:
        return [*blocks, pages.Words("Nothing was measured.")]
    image = plot(panels, across="task time, µs", up="efficiency", most=1.0)
    return [*blocks, pages.Plot(image, "Efficiency by the time of a task")]


def on_devices(
    patterns: Sequence[str], devices: str, workers: int, seconds: float
) -> list[Measure]:
    """The measures on GPUs.

    Raises:
        OptionError: ``devices`` names no machine.
    """
    try:
        machine = ch.Machine.detect() if devices == "gpu" else ch.Machine.load(devices)
    except (ch.MachineError, OSError) as error:
        raise OptionError(f"--devices: {error}") from error
    gpus = machine.gpus
    # The bar is one of real GPUs.
    limited = LIMITED if all(one.capability for one in gpus) else ()
    params = {
        "width": WIDTH * len(gpus),
        "seconds": seconds,
        "devices": [one.name for one in gpus],
    }
    words = f"{len(gpus)} GPU" + ("" if len(gpus) == 1 else "s")
    found = []
    for pattern in patterns:
        case = f"{pattern}, {words}"
        bar = Bar(
            case=case,
            metric=f"{HALF}, Python bodies",
            unit="µs",
            values=values_of(Key(OURS, case, workers), HALF),
            limit=ON_GPUS,
            workers=workers,
            lacking="GPUs",
        )
        found.append(
            Measure(
                name=pattern,
                title=f"Minimum effective task granularity on {words}: {pattern}",
                contestants=[
                    _contestant(runtime, runtime, case, workers, params, pattern, seconds, devices)
                    for runtime in ON_DEVICES
                ],
                units=UNITS,
                bars=[bar] if pattern in limited else [],
                warmup=0,
                note=f"{WIDTH * len(gpus)} tasks a step. {1e6 * LONGEST:,.0f} µs stand for that "
                "and more.",
            )
        )
    return found


def _contestant(
    name: str,
    runtime: str,
    case: str,
    workers: int,
    params: Mapping[str, Any],
    pattern: str,
    seconds: float,
    devices: str | None = None,
) -> Contestant:
    run = functools.partial(
        probes.call,
        "metg",
        runtime=name,
        pattern=pattern,
        workers=workers,
        seconds=seconds,
        devices=devices,
    )
    return Contestant(runtime, case, run, workers, params)


def _measure(pattern: str, peers: Sequence[str], workers: int, seconds: float) -> Measure:
    runtimes = [(runtime, runtime) for runtime in (OURS, NATIVE, RUST)]
    runtimes += [(name, PEERS[name].runtime) for name in peers]
    params = {"width": WIDTH * workers, "seconds": seconds}
    contestants = [
        _contestant(
            name,
            runtime,
            pattern,
            workers,
            params | ({"tuning": PEERS[name].tuning} if name in PEERS else {}),
            pattern,
            seconds,
        )
        for name, runtime in runtimes
    ]
    bars = []
    if pattern in LIMITED:
        bars = [
            Bar(
                case=pattern,
                metric=f"{HALF}, {what}",
                unit="µs",
                values=values_of(Key(runtime, pattern, workers), HALF),
                limit=LIMITS[runtime],
                workers=workers,
                lacking="a run without failure",
            )
            for runtime, what in (
                (OURS, "Python bodies"),
                (NATIVE, "native bodies"),
                (RUST, "in Rust"),
            )
        ]
        others = [Key(PEERS[name].runtime, pattern, workers) for name in peers]
        bars.append(
            Bar(
                case=pattern,
                metric=f"{OURS} / best peer",
                unit="x",
                values=_over_best(Key(OURS, pattern, workers), others),
                limit=PART,
                workers=workers,
                lacking="a peer",
            )
        )
    return Measure(
        name=pattern,
        title=f"Minimum effective task granularity: {pattern}",
        contestants=contestants,
        units=UNITS,
        bars=bars,
        # The long tasks that a run begins with warm up for those that matter.
        warmup=0,
        note=f"{WIDTH * workers} tasks a step on {workers} of {records.usable_cores()} cores. "
        f"The thread that spawns is one more. {1e6 * LONGEST:,.0f} µs stand for that and more.",
    )


def _over_best(ours: Key, others: Sequence[Key]) -> Callable[[Result], Sequence[float]]:
    """Round by round our value over the least of the others."""

    def values(result: Result) -> Sequence[float]:
        mine = result[ours].values.get(HALF, [])
        rounds = [result[key].values.get(HALF, []) for key in others]
        best = [min(found) for found in zip(*filter(None, rounds), strict=False)]
        return [value / least for value, least in zip(mine, best, strict=False)]

    return values
