"""``charioteer bench policies``: what policies make of task graphs, in simulated time.

Nothing is timed here. The machine is virtual and so is its clock: a body keeps its devices busy for
so long as its graph says and takes no time itself, so a run with one seed gives the same figures on
every machine. A round is a seed; the runs of one round have the same graph with the same run times.

A graph has two bounds below which no schedule comes: its longest chain of dependencies, and its
work over the number of devices. How near one gets shows the *list schedule*, a simulation of what a
scheduler would do that knows all run times beforehand and decides only when a device is free: of
the ready tasks it takes the one with the longest chain behind it.

In these graphs data does not move: every body finds its input everywhere. Those of
:mod:`charioteer.bench.movement` have managed arrays.
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import charioteer as ch
from charioteer import graphs
from charioteer.bench import movement
from charioteer.bench.command import (
    OptionError,
    add_outcome_arguments,
    carry_out,
    choice,
    positive,
)
from charioteer.bench.harness import OURS, Contestant, Measure, Sample, absolute
from charioteer.graphs import Graph
from charioteer.graphs.shapes import any_dag

if TYPE_CHECKING:
    from charioteer.devices import DeviceSet, Kind
    from charioteer.policies import Call, Policy

__all__ = ["DESCRIPTION", "SUMMARY", "OptionError", "add_arguments", "measures", "run"]

BENCHMARK = "policies"

SUMMARY = "how good the schedules of each policy are, in simulated time"

DESCRIPTION = """\
Run task graphs under each policy on virtual devices, in simulated time, and hold the makespans
against bounds and oracles. The figures are the same on every machine. Data moves in the measures
movement, halos and eviction, on the machine that a file describes.
"""

STILL = ("cholesky", "stencil", "reduction", "random", "variants", "mix")
NAMES = (*STILL, *movement.NAMES)

GPUS = 4
"""The devices of all but the mix."""
ON = ("gpu",)
SITE = graphs.Site(cores=0, gpus=GPUS)
MIX_GPUS = 8
WIDTHS = (1, 2, 4, 8)
"""How many devices a task of the mix takes."""

MAKESPAN = "makespan"
ABOVE = "makespan / bound"
UTILISATION = "utilisation"
FASTEST = "calls with the fastest set"
EXCESS = "time / oracle"
OVERTAKEN = "overtaken by at most"

SECOND = 1e9
"""The clocks of machines count nanoseconds."""
MILLISECOND = 1e-3

LEARNED = 20
"""Calls a size after which the fastest set should be known."""
LEAST_FASTEST = 95.0
"""Per cent of the calls after these."""
MOST_EXCESS = 1.05
MIX_BARS = {32: 0.88, 128: 0.95}
"""What part of the devices' time is to be used, by how much tasks may be overtaken."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument(
        "--runs", type=positive, metavar="N", help="rounds, a seed each (default: 5)"
    )
    parser.add_argument("--quick", action="store_true", help="a look: one round")
    parser.add_argument(
        "--only", metavar="A,B", help=f"measures to make, of {', '.join(NAMES)} (default: all)"
    )
    parser.add_argument(
        "--machine",
        metavar="FILE",
        help="the machine on which data move, in virtual time (default:"
        " movement.yaml beside this benchmark's code)",
    )
    add_outcome_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Make the measures, print them, write the records.

    Returns:
        0; 1 if a run failed, or with ``--check`` if a bar does not hold.

    Raises:
        OptionError: the options name an unknown measure, or a file that cannot be written.
    """
    names = choice("measure", options.only, NAMES) or NAMES
    runs = options.runs or (1 if options.quick else 5)
    machine = Path(options.machine) if options.machine else movement.default_machine()
    moving = [name for name in names if name in movement.NAMES]
    made = measures(names) + movement.measures(moving, machine, POLICIES)
    return carry_out(BENCHMARK, made, runs, options)


def measures(names: Sequence[str] = STILL) -> list[Measure]:
    """The measures of those names, of those whose data do not move."""
    made: dict[str, Callable[[], Measure]] = {
        "cholesky": lambda: _graph(
            "cholesky",
            "Cholesky factorization of 24 x 24 tiles",
            functools.partial(cholesky, 24),
        ),
        "stencil": lambda: _graph(
            "stencil",
            "Stencil of 32 blocks over 64 steps",
            functools.partial(stencil, 32, 64),
        ),
        "reduction": lambda: _graph(
            "reduction",
            "Reduction tree over 1,024 blocks",
            functools.partial(reduction, 1024),
        ),
        "random": lambda: _graph(
            "random",
            "Random graph",
            functools.partial(any_graph, 2000),
        ),
        "variants": lambda: _variants(400),
        "mix": lambda: _mix(10_000),
    }
    return [made[name]() for name in STILL if name in names]


# ---- policies -----------------------------------------------------------------------------------


def own(call: Call) -> list[float]:
    """A policy such as users write: the earliest finish, and of equals the least load."""
    return [choice.wait + (choice.estimate or 0.0) + 1e-9 * choice.load for choice in call.choices]


POLICIES: dict[str, str | Policy] = {
    "eft": "eft",
    "locality": "locality",
    "load": "load",
    "random": "random",
    "round-robin": "round-robin",
    "in Python": own,
}


def _runtime(policy: str) -> str:
    """Whose run it is, in tables and records: the default policy is what users get unasked."""
    return OURS if policy == "eft" else f"{OURS}, {policy}"


def _contestants(
    case: str, once: Callable[[str | Policy, int], Sample], params: dict[str, Any]
) -> list[Contestant]:
    """A contestant a policy; ``once`` makes a run with a policy and a seed."""

    def runs(policy: str | Policy) -> Callable[[], Sample]:
        seeds = count()
        return lambda: once(policy, next(seeds))

    return [
        Contestant(_runtime(name), case, runs(policy), None, {"policy": name, **params})
        for name, policy in POLICIES.items()
    ]


# ---- graphs -------------------------------------------------------------------------------------


def cholesky(tiles: int, chance: random.Random) -> Graph:
    """The tiled factorization, right-looking; the further left a task writes, the more urgent.

    Run times are those of tiles of 2048 x 2048 doubles on a GPU with 16 teraflops, where products
    are fast and factorizations are not.
    """
    seconds = {"potrf": 1.4, "trsm": 0.9, "syrk": 0.7, "gemm": 1.1}
    shape = graphs.make("cholesky", tiles)
    times = [seconds[kind] * MILLISECOND * chance.uniform(0.9, 1.1) for kind in shape.kinds]
    graph = graphs.describe(shape, on=ON, seconds=times)
    # A task is called by the tile that it writes, row and column, and the step.
    urgent = [
        replace(task, priority=tiles - name[1])
        for task, name in zip(graph, shape.names, strict=True)
    ]
    return Graph(graph.name, tuple(urgent))


def stencil(blocks: int, steps: int, chance: random.Random) -> Graph:
    """A row of blocks over time, each after itself and its neighbours in the step before."""
    shape = graphs.make("stencil", blocks, steps)
    times = [MILLISECOND * chance.uniform(0.9, 1.1) for _ in shape.before]
    return graphs.describe(shape, on=ON, seconds=times)


def reduction(blocks: int, chance: random.Random) -> Graph:
    """Blocks of unequal work whose results are added in pairs."""
    shape = graphs.make("reduction", blocks)
    times = [
        MILLISECOND * (chance.uniform(0.5, 1.5) if kind == "block" else 0.5) for kind in shape.kinds
    ]
    return graphs.describe(shape, on=ON, seconds=times)


def any_graph(tasks: int, chance: random.Random) -> Graph:
    """Tasks with up to three of the last sixty before them, and exponential run times."""
    shape = any_dag(tasks, 60, chance.getrandbits(32))
    times = [chance.expovariate(1 / MILLISECOND) for _ in shape.before]
    return graphs.describe(shape, on=ON, seconds=times)


def busy(seconds: float) -> None:
    """Keeps all devices of the running task busy for so long."""
    context = ch.current()
    for _ in context.each():
        context.stream.busy(seconds)


def run_graph(graph: Graph, gpus: int, policy: str | Policy) -> float:
    """The makespan, in seconds, under a policy that knows what tasks of a kind take on average."""
    times: dict[str, list[float]] = {}
    for node in graph:
        times.setdefault(node.kind, []).append(node.seconds)
    kinds = {kind: _task(kind, sum(all_) / len(all_)) for kind, all_ in times.items()}
    with _open(gpus, policy) as runtime:
        tasks: list[ch.Task[None]] = []
        for node in graph:
            before = [tasks[one] for one in node.after]
            function = kinds[node.kind].options(dependencies=before, priority=node.priority)
            tasks.append(function(node.seconds))
        ch.wait(tasks)
        return _now(runtime)


def _task(kind: str, cost: float) -> ch.TaskFunction[[float], None]:
    def body(seconds: float) -> None:
        busy(seconds)

    body.__name__ = body.__qualname__ = kind
    return ch.task(body, placement=ch.gpu, cost=cost)


def _open(gpus: int, policy: str | Policy, **options: Any) -> ch.Runtime:
    return ch.Runtime(
        ch.Machine.virtual(gpus=gpus, time="virtual"), workers=0, policy=policy, **options
    )


def _now(runtime: ch.Runtime) -> float:
    """What has passed on the machine's clock, in seconds."""
    devices = runtime.devices
    assert devices is not None, "it is open"
    return devices.clock.now / SECOND


def _graph(name: str, title: str, make: Callable[[random.Random], Graph]) -> Measure:
    made = functools.cache(lambda seed: make(random.Random(seed)))

    def sample(graph: Graph, makespan: float) -> Sample:
        work = sum(task.seconds for task in graph)
        return Sample(
            {
                MAKESPAN: makespan / MILLISECOND,
                ABOVE: makespan / graphs.bounds(graph, SITE).makespan,
                UTILISATION: work / (GPUS * makespan),
            }
        )

    def once(policy: str | Policy, seed: int) -> Sample:
        graph = made(seed)
        return sample(graph, run_graph(graph, GPUS, policy))

    case = f"{len(made(0)):,} tasks on {GPUS} devices"
    seeds = count()

    def reference() -> Sample:
        graph = made(next(seeds))
        return sample(graph, graphs.list_schedule(graph, SITE).makespan)

    params = {"graph": name, "devices": GPUS, "tasks": len(made(0))}
    return Measure(
        name=name,
        title=title,
        contestants=[
            *_contestants(case, once, params),
            Contestant("list schedule", case, reference, None, params),
        ],
        units={MAKESPAN: "ms", ABOVE: "x", UTILISATION: ""},
        warmup=0,
        note="charioteer is its default policy, eft. The list schedule knows all run times.",
    )


# ---- variants -----------------------------------------------------------------------------------

Time = Callable[[int, int], float]
"""Microseconds of a function at a size on so many devices."""

FUNCTIONS: dict[str, Time] = {
    # The work is divided, and each further device costs something.
    "scales": lambda size, width: size / width + 60 * width,
    # Two devices halve it; four talk so much that they are as slow as one.
    "halves": lambda size, width: {1: 20 + size, 2: 150 + size / 2, 4: 400 + size}[width],
    # What they exchange grows with the size, so that one is best for large ones.
    "talks": lambda size, width: 600 / width + size / 16 * (width - 1) + size / 8,
}
SETS = (1, 2, 4)
SIZES = (64, 512, 4096, 32_768)
NOISE = 0.03
"""By what part run times differ from one call to the next, at most."""


def run_variants(calls: int, policy: str | Policy, seed: int) -> Sample:
    """Calls the three functions at four sizes, in random order, one call at a time on an idle
    machine."""
    chance = random.Random(seed)
    seen = {(name, size): 0 for name in FUNCTIONS for size in SIZES}
    fastest = dict.fromkeys(seen, 0)
    order = [call for call in seen for _ in range(calls)]
    chance.shuffle(order)
    functions = {name: _function(name) for name in FUNCTIONS}
    oracle = 0.0
    with _open(max(SETS), policy) as runtime:
        for name, size in order:
            noise = 1e-6 * chance.uniform(1 - NOISE, 1 + NOISE)
            times = {width: noise * FUNCTIONS[name](size, width) for width in SETS}
            width = functions[name](size, times).result()
            seen[name, size] += 1
            oracle += min(times.values())
            if seen[name, size] > LEARNED:
                fastest[name, size] += times[width] == min(times.values())
        time = _now(runtime)
    # Of the function and size where it is the least.
    share = min(fastest.values()) / (calls - LEARNED)
    return Sample({FASTEST: 100 * share, EXCESS: time / oracle})


def _function(name: str) -> ch.TaskFunction[[int, dict[int, float]], int]:
    def declared(size: int, times: dict[int, float]) -> int:
        raise NotImplementedError

    def body(size: int, times: dict[int, float]) -> int:
        width = len(ch.current().devices)
        busy(times[width])
        return width

    declared.__name__ = declared.__qualname__ = name
    function = ch.task(declared, base=False, size=lambda size, times: size)
    for width in SETS:
        function.variant(_set(width))(body)
    return function


def _set(width: int) -> Kind | DeviceSet:
    return ch.gpu if width == 1 else ch.gpu * width


def _variants(calls: int) -> Measure:
    case = f"{len(FUNCTIONS)} functions, {len(SIZES)} sizes, {calls} calls each"
    return Measure(
        name="variants",
        title=f"Functions with variants for {', '.join(map(str, SETS))} of {max(SETS)} devices",
        contestants=_contestants(
            case,
            functools.partial(run_variants, calls),
            {"devices": max(SETS), "calls": calls, "sizes": SIZES},
        ),
        units={FASTEST: "%", EXCESS: "x"},
        bars=[
            absolute(case, FASTEST, "%", LEAST_FASTEST, at_least=True),
            absolute(case, EXCESS, "x", MOST_EXCESS),
        ],
        warmup=0,
        note="charioteer is its default policy, eft. Which set is the fastest depends on the size. "
        f"Calls count from the {LEARNED + 1}st of a function and size on; the worst is shown. "
        "The oracle knows the fastest set from the first call on.",
    )


# ---- the mix ------------------------------------------------------------------------------------


def run_mix(tasks: int, overtaking: int, policy: str | Policy, seed: int) -> Sample:
    """Tasks over 1, 2, 4 or 8 of 8 devices in random order, with exponential run times of which
    nobody is told."""
    chance = random.Random(seed)
    mix = [(chance.choice(WIDTHS), chance.expovariate(1.0)) for _ in range(tasks)]
    grants: list[int] = []

    def body(number: int, seconds: float) -> None:
        grants.append(number)  # without workers a body runs when it has its devices
        busy(seconds)

    # Bodies with a priority run in the very order of the grants; others only nearly so.
    functions = {width: ch.task(body, placement=_set(width), priority=1) for width in WIDTHS}
    with _open(MIX_GPUS, policy, overtaking=overtaking) as runtime:
        ch.wait([functions[width](number, s) for number, (width, s) in enumerate(mix)])
        makespan = _now(runtime)
    work = sum(width * seconds for width, seconds in mix)
    values = {UTILISATION: work / (MIX_GPUS * makespan)}
    if policy == "eft":
        # Any device would do, so that whoever is older and waits is overtaken on each one.
        values[OVERTAKEN] = overtaken(grants, [width for width, _ in mix])
    return Sample(values)


def overtaken(grants: Iterable[int], widths: Sequence[int]) -> int:
    """By how many device-times a task was overtaken at most: by tasks that were spawned after it
    and given devices before it.

    Args:
        grants: the tasks in the order in which they were given devices, by their numbers.
        widths: how many devices each takes.
    """
    # A Fenwick tree of the widths of all that were granted, by number.
    tree = [0] * (len(widths) + 1)
    granted = most = 0
    for task in grants:
        older, at = 0, task + 1
        while at:
            older += tree[at]
            at &= at - 1
        most = max(most, granted - older)
        granted += widths[task]
        at = task + 1
        while at < len(tree):
            tree[at] += widths[task]
            at += at & -at
    return most


def _mix(tasks: int) -> Measure:
    contestants: list[Contestant] = []
    bars = []
    for overtaking, least in MIX_BARS.items():
        case = f"{tasks:,} tasks, overtaken by {overtaking} device-times at most"
        contestants += _contestants(
            case,
            functools.partial(run_mix, tasks, overtaking),
            {"devices": MIX_GPUS, "tasks": tasks, "overtaking": overtaking},
        )
        bars += [
            absolute(case, UTILISATION, "", least, at_least=True),
            absolute(case, OVERTAKEN, "", overtaking),
        ]
    return Measure(
        name="mix",
        title=f"A mix of tasks over {', '.join(map(str, WIDTHS))} of {MIX_GPUS} devices",
        contestants=contestants,
        units={UTILISATION: "", OVERTAKEN: ""},
        bars=bars,
        warmup=0,
        note="charioteer is its default policy, eft. Run times are exponential, and not known.",
    )
