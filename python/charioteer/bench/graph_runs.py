"""``charioteer bench graphs``: runs of every pattern, each proved right, beside an offline
schedule.

A run takes a graph of a pattern with run times that are drawn, and see
:mod:`charioteer.graphs.running` for what is proved of it; one that is not right is a failure of the
benchmark. A round is a seed.

In *virtual time* nothing is timed, and the figures are the same on every machine: the makespan on
four virtual GPUs over that of the list schedule, which knows all run times and decides when a
device is free. On *cores*, and with data moved between virtual GPUs in real time, what is shown is
how near the bounds a run comes, so that those figures are the machine's.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from itertools import count

import charioteer as ch
from charioteer import graphs
from charioteer.bench.command import (
    OptionError,
    add_outcome_arguments,
    carry_out,
    choice,
    positive,
)
from charioteer.bench.harness import OURS, Bar, Contestant, Key, Measure, Result, Sample
from charioteer.graphs import Site

__all__ = ["DESCRIPTION", "SUMMARY", "OptionError", "add_arguments", "measures", "run"]

BENCHMARK = "graphs"

SUMMARY = "runs of every pattern, proved right, beside an offline schedule"

DESCRIPTION = """\
Run a graph of each pattern, prove that the run was right (order, count, placement, data), and
compare it with a schedule that is made offline, knowing all run times. A round is a seed.
"""

GPUS = 4
TASKS = 120
WIDTHS = (4, 6, 8, 12)
"""Tasks of a row: as many as there are GPUs, and up to thrice as many."""
WIDTH = WIDTHS[-1]
"""That of the kinds that are run with one."""
RATIO = "makespan / list schedule"
WORST = 1.05
BOUND = "bound / makespan"
CORES = 2

SIMULATED = "one GPU a task, virtual time"
SETS = "sets of GPUs, data moved, virtual time"
ON_CORES = f"cores, data moved, {CORES} workers"
KINDS = {"simulated": SIMULATED, "sets": SETS, "cores": ON_CORES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument(
        "--runs", type=positive, metavar="N", help="rounds, a seed each (default: 100)"
    )
    parser.add_argument("--quick", action="store_true", help="a look: 3 rounds")
    parser.add_argument(
        "--only", metavar="A,B", help=f"patterns, of {', '.join(graphs.PATTERNS)} (default: all)"
    )
    parser.add_argument(
        "--kinds", metavar="A,B", help=f"kinds of runs, of {', '.join(KINDS)} (default: all)"
    )
    add_outcome_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Make the measures, print them, write the records.

    Returns:
        0; 1 if a run was not right, or with ``--check`` if a bar does not hold.

    Raises:
        OptionError: the options name an unknown pattern, or a file that cannot be written.
    """
    names = choice("pattern", options.only, tuple(graphs.PATTERNS)) or tuple(graphs.PATTERNS)
    kinds = choice("kind", options.kinds, tuple(KINDS)) or tuple(KINDS)
    runs = options.runs or (3 if options.quick else 100)
    return carry_out(BENCHMARK, measures(names, kinds), runs, options)


def measures(
    names: Sequence[str] = tuple(graphs.PATTERNS), kinds: Sequence[str] = tuple(KINDS)
) -> list[Measure]:
    """The measures: one a pattern, of these kinds of runs."""
    return [_measure(name, kinds) for name in names]


def _measure(name: str, kinds: Sequence[str]) -> Measure:
    once = {"simulated": simulated, "sets": over_sets, "cores": on_cores}
    cells = [
        (kind, width)
        for kind in kinds
        for width in (_widths(name) if kind == "simulated" else (WIDTH,))
    ]
    return Measure(
        name=name,
        title=f"{graphs.PATTERNS[name].summary}",
        contestants=[
            Contestant(
                OURS,
                _case(name, width, kind),
                _seeds(functools.partial(once[kind], name, width)),
                None,
                {"pattern": name, "tasks": TASKS, "width": width},
            )
            for kind, width in cells
        ],
        units={RATIO: "x", BOUND: ""},
        bars=[
            Bar(
                case=_case(name, width, kind),
                metric=f"worst {RATIO}",
                unit="x",
                values=_worst(Key(OURS, _case(name, width, kind))),
                limit=WORST,
                lacking="a run without failure",
            )
            for kind, width in cells
            if kind == "simulated"
        ],
        warmup=0,
        note="Every run is proved right: order, count, placement, data.",
    )


def _worst(key: Key) -> Callable[[Result], Sequence[float]]:
    """The largest ratio of all rounds."""

    def values(result: Result) -> Sequence[float]:
        found = result[key].values.get(RATIO, [])
        return [max(found)] if found else []

    return values


def _widths(name: str) -> tuple[int, ...]:
    """The widths that make a difference: some patterns follow from the number of tasks."""
    shapes = {graphs.sized(name, TASKS, width).before: width for width in WIDTHS}
    return tuple(sorted(shapes.values()))


def _case(name: str, width: int, kind: str) -> str:
    rows = f"rows of {width}, " if len(_widths(name)) > 1 else ""
    return f"{name}: {rows}{KINDS[kind]}"


def _seeds(once: Callable[[int], Sample]) -> Callable[[], Sample]:
    seeds = count()
    return lambda: once(next(seeds))


@functools.cache
def _machine() -> ch.Machine:
    return ch.Machine.virtual(gpus=GPUS, time="virtual")


def simulated(name: str, width: int, seed: int) -> Sample:
    """A graph of tasks on one GPU each, in virtual time."""
    shape = graphs.sized(name, TASKS, width, seed)
    graph = graphs.describe(shape, on=["gpu"], vary=0.5, seed=seed)
    return _beside(graph, "none")


def over_sets(name: str, width: int, seed: int) -> Sample:
    """A graph of tasks on one or two GPUs each, that read what those before them wrote."""
    shape = graphs.sized(name, TASKS, width, seed)
    graph = graphs.describe(
        shape, on=["gpu=0.7", "gpu*2=0.3"], vary=0.5, size=1 << 16, share=0.5, seed=seed
    )
    return _beside(graph, "lazy")


def _beside(graph: graphs.Graph, movement: graphs.running.Movement) -> Sample:
    machine = _machine()
    run = graphs.run(graph, machine=machine, movement=movement)
    site = Site.of(machine, 0)
    offline = graphs.list_schedule(graph, site, moves=movement != "none").makespan
    bound = graphs.bounds(graph, site).makespan
    return Sample({RATIO: run.seconds / offline, BOUND: bound / run.seconds})


def on_cores(name: str, width: int, seed: int) -> Sample:
    """A graph of tasks of half a millisecond on one or two cores each, with managed data."""
    shape = graphs.sized(name, TASKS, width, seed)
    graph = graphs.describe(
        shape, on=["cpu=0.9", "cpu*2=0.1"], seconds=5e-4, vary=0.5, size=1 << 12, seed=seed
    )
    machine = ch.Machine(ch.Machine.detect().host)
    run = graphs.run(graph, machine=machine, workers=CORES, movement="eager")
    bound = graphs.bounds(graph, Site(CORES, 0)).makespan
    return Sample({BOUND: bound / run.seconds})
