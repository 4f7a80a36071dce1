"""``charioteer bench multi-device``: what an empty task over several devices costs, beside Ray.

The devices are virtual GPUs, whose host path is the same as that of real ones: a set is reserved,
streams are lent and ordered, events recorded and observed. Ray has no tasks over several devices.
What its users do instead are its three contestants: an actor a device, of which a task calls as
many as it needs; the same calls as a compiled graph, which a task executes; and tasks that reserve
an amount of a custom resource. They run in a process of their own, since Ray starts processes that
would disturb the runs beside it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import charioteer as ch
from charioteer.bench import probes
from charioteer.bench.command import (
    OptionError,
    add_outcome_arguments,
    add_peers_argument,
    add_runs_argument,
    carry_out,
    choice,
    positive,
)
from charioteer.bench.harness import OURS, Bar, Contestant, Key, Measure, Sample, absolute, ratio
from charioteer.bench.peers import RAY_ACTORS, RAY_COMPILED, RAY_RESOURCES

if TYPE_CHECKING:
    from charioteer.devices import DeviceSet, Kind

__all__ = ["DESCRIPTION", "SUMMARY", "OptionError", "add_arguments", "empty", "measures", "run"]

BENCHMARK = "multi-device"

SUMMARY = "what a task over several devices costs, beside Ray"

DESCRIPTION = """\
Measure what an empty task over 1, 2, 4 or 8 of 8 devices costs, beside Ray.

The devices are virtual, the host's part is the real one. Ray runs as an actor a device, as compiled
graphs of such actors, and as tasks that reserve a custom resource; without Ray installed all are
shown as missing.
"""

DEVICES = 8
WIDTHS = (1, 2, 4, 8)
WORKERS = (1, 4, 16)
PER_TASK = "time per task"
LIMITS = {1: 2.5, 2: 4.0, 4: 6.0, 8: 10.0}
"""Microseconds that an empty task over so many devices may cost."""
GROWTH = 1.3
"""By what factor 16 workers may cost more than one, for a task on one device."""
PEERS = {
    "ray-actors": (RAY_ACTORS, 100.0),
    "ray-compiled": (RAY_COMPILED, None),
    "ray-resources": (RAY_RESOURCES, 50.0),
}
"""What results call each, and how many times ours its cost is to be at least, if there is a bar."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    add_runs_argument(parser)
    parser.add_argument(
        "--tasks",
        type=positive,
        metavar="N",
        help="tasks in one run (default: 50000); peers run a hundredth",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a look: 2 rounds, fewer tasks, no peers"
    )
    add_peers_argument(parser, PEERS)
    add_outcome_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Make the measures, print them, write the records.

    Returns:
        0; 1 if a run of charioteer itself failed, or with ``--check`` if a bar does not hold.

    Raises:
        OptionError: the options name an unknown peer, or a file that cannot be written.
    """
    peers = choice("peer", options.peers, tuple(PEERS))
    if peers is None:
        peers = () if options.quick else tuple(PEERS)
    tasks = options.tasks or (2_000 if options.quick else 50_000)
    runs = options.runs or (2 if options.quick else 5)
    return carry_out(BENCHMARK, measures(tasks, peers), runs, options)


def measures(tasks: int, peers: Sequence[str]) -> list[Measure]:
    """The measures: one a width, so that what is compared runs side by side."""
    return [_measure(width, tasks, peers) for width in WIDTHS]


def empty(width: int, workers: int, tasks: int) -> float:
    """Seconds for so many empty tasks over ``width`` devices, from the first spawn to the end.

    As in the other benchmarks the runtime's start is not in it, and its end is.
    """
    placement: Kind | DeviceSet = ch.gpu if width == 1 else ch.gpu * width

    @ch.task(placement=placement)
    def body() -> None:
        return None

    with ch.Runtime(ch.Machine.virtual(gpus=DEVICES), workers=workers):
        start = perf_counter()
        for _ in range(tasks):
            body()
    return perf_counter() - start


def _measure(width: int, tasks: int, peers: Sequence[str]) -> Measure:
    case = f"empty task, {width} of {DEVICES} devices"
    contestants = [
        Contestant(
            OURS,
            case,
            functools.partial(_ours, width, workers, tasks),
            workers,
            {"devices": width, "tasks": tasks},
        )
        for workers in WORKERS
    ]
    bars = [absolute(case, PER_TASK, "µs", LIMITS[width], workers) for workers in WORKERS]
    one, most = (Key(OURS, case, workers) for workers in (min(WORKERS), max(WORKERS)))
    if width == 1:
        bars.append(
            Bar(
                case=case,
                metric=f"{most.workers} workers / {one.workers}",
                unit="x",
                values=ratio(most, one, PER_TASK),
                limit=GROWTH,
                lacking="both numbers of workers",
            )
        )
    for name, (runtime, limit) in PEERS.items():
        if name in peers:
            contestants.append(_peer(name, runtime, case, width, max(100, tasks // 100)))
        if limit is None:
            continue
        bars.append(
            Bar(
                case=case,
                metric=f"{runtime} / {OURS}",
                unit="x",
                values=ratio(Key(runtime, case), Key(OURS, case, 4), PER_TASK),
                limit=limit,
                at_least=True,
                lacking=runtime,
            )
        )
    return Measure(
        name=f"{width} devices" if width > 1 else "1 device",
        title=f"An empty task over {width} of {DEVICES} devices",
        contestants=contestants,
        units={PER_TASK: "µs"},
        bars=bars,
        note="From the first spawn until all are complete and the workers gone, over their number. "
        "Ratios to Ray are those of 4 workers.",
    )


def _ours(width: int, workers: int, tasks: int) -> Sample:
    return Sample({PER_TASK: 1e6 * empty(width, workers, tasks) / tasks})


def _peer(name: str, runtime: str, case: str, width: int, tasks: int) -> Contestant:
    params: dict[str, Any] = {"devices": width, "tasks": tasks}
    run = functools.partial(
        probes.call, "multi_device", peer=name, width=width, devices=DEVICES, tasks=tasks
    )
    return Contestant(runtime, case, run, None, params, warms=False)
