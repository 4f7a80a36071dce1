"""The part of ``charioteer bench policies`` where data move.

The graphs read and write tiles of managed arrays on the machine of a description file. A tile has
32 MiB and a task takes about a millisecond. Since links are simulated, tiles need not be that large
in fact: the machine is :meth:`~charioteer.Machine.shrunk` by 1024, and a tile of 32 KiB takes as
long on its links as one of 32 MiB on the machine of the file.

Everything starts on the host. A makespan is the time until the last task is complete; results that
come home afterwards are no part of it, but of the bytes.
"""

from __future__ import annotations

import functools
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import charioteer as ch
from charioteer.bench.command import OptionError
from charioteer.bench.harness import (
    OURS,
    Bar,
    Contestant,
    Key,
    Measure,
    Result,
    Sample,
    absolute,
)
from charioteer.machine import Gpu, Link, Links

if TYPE_CHECKING:
    from charioteer.policies import Policy

__all__ = ["NAMES", "default_machine", "measures"]

NAMES = ("movement", "halos", "eviction")

SHRUNK = 1024
"""By what machines and tiles are smaller than those that are meant."""
ROWS, COLUMNS = 64, 64
"""Of a tile, in doubles: 32 KiB that stand for 32 MiB."""
TILE = ROWS * COLUMNS * 8

MILLISECOND = 1e-3
SECOND = 1e9

MAKESPAN = "makespan"
ABOVE = "makespan / bound"
MOVED = "moved"
WORST = "eft / best other"
BETTER = "comparisons with eft 20 % better"
ROOM = "comparisons in which 20 % are possible"
HIDDEN = "transfer hidden"
BELADY = "bytes / Belady"

MOST_WORSE = 1.03
MUCH = 1.2
LEAST_BETTER = 0.5
LEAST_HIDDEN = 0.9
MOST_BYTES = 1.15

Rows = tuple[int, int]
"""The first row of a region, and the one behind its last."""


class Job(NamedTuple):
    """A task of a graph."""

    kind: str
    """Its function."""
    seconds: float
    writes: Rows | None
    reads: tuple[Rows, ...]
    fresh: bool = False
    """Whether it does not read what it writes."""
    priority: int = 0


class Graph(NamedTuple):
    """Tasks in the order in which they are spawned, on the rows of an array."""

    rows: int
    jobs: list[Job]


def bound(graph: Graph, machine: ch.Machine) -> float:
    """Seconds that no schedule of a graph comes below, whoever makes it.

    A task begins when the tasks that wrote what it reads are complete, and when what nobody wrote
    has come from the host, one piece after the other, since a device has one link to it; and behind
    it comes the longest chain of others. So tasks that begin no sooner than some time, and that
    have no less than some time behind them, take those two times and their work over the number of
    devices. And the pieces that come from the host take their time over the number of links, and
    the chain behind the last of them. Copies between devices are in none of this: a task may run
    where its data are.
    """
    jobs = graph.jobs
    host, devices = machine.links.host, len(machine.gpus)
    assert host is not None, "everything starts there"

    def copied(rows: int) -> float:
        return host.latency + rows * COLUMNS * 8 / host.bandwidth

    before: list[set[int]] = [set() for _ in jobs]
    begin = [0.0] * len(jobs)
    writers: dict[int, int] = {}
    pieces: dict[int, tuple[int, list[int]]] = {}  # of a tile: most rows that one reads, and who do
    for index, job in enumerate(jobs):
        own = () if job.writes is None or job.fresh else (job.writes,)
        arrives = 0.0
        for rows in {*job.reads, *own}:
            place = rows[0] // ROWS
            if place in writers:
                before[index].add(writers[place])
                continue
            arrives += copied(rows[1] - rows[0])
            most, readers = pieces.get(place, (0, []))
            pieces[place] = (max(most, rows[1] - rows[0]), [*readers, index])
        ends = (begin[other] + jobs[other].seconds for other in before[index])
        begin[index] = max(arrives, max(ends, default=0.0))
        if job.writes is not None:
            writers[job.writes[0] // ROWS] = index
    behind = [0.0] * len(jobs)
    for index in reversed(range(len(jobs))):
        for other in before[index]:
            behind[other] = max(behind[other], jobs[index].seconds + behind[index])

    least = max(begin[index] + job.seconds + behind[index] for index, job in enumerate(jobs))
    urgent = sorted(range(len(jobs)), key=lambda index: -behind[index])
    for first in set(begin):
        work = 0.0
        for index in urgent:
            if begin[index] >= first:
                work += jobs[index].seconds
                least = max(least, first + work / devices + behind[index])
    chains = (
        (min(jobs[index].seconds + behind[index] for index in readers), copied(most))
        for most, readers in pieces.values()
    )
    time = 0.0
    for chain, copy in sorted(chains, reverse=True):
        time += copy
        least = max(least, time / devices + chain)
    return least


def default_machine() -> Path:
    """The description that the package has for it."""
    return Path(__file__).with_name("movement.yaml")


def load(path: Path) -> ch.Machine:
    """The machine of a file, in virtual time and shrunk.

    Raises:
        OptionError: there is no such file, it describes no machine, or one in real time.
    """
    try:
        machine = ch.Machine.from_yaml(path)
    except ch.MachineError as error:
        raise OptionError(f"--machine: {error}") from error
    if machine.time != "virtual":
        raise OptionError(f"--machine: {path} is no machine in virtual time")
    return machine.shrunk(SHRUNK)


# ---- graphs -------------------------------------------------------------------------------------


def tile(number: int) -> Rows:
    """The rows of a tile."""
    return number * ROWS, (number + 1) * ROWS


def cholesky(tiles: int, chance: random.Random) -> Graph:
    """The tiled factorization, right-looking; the further left a task writes, the more urgent."""
    seconds = {"potrf": 1.4, "trsm": 0.9, "syrk": 0.7, "gemm": 1.1}
    places = {
        place: number
        for number, place in enumerate((i, j) for i in range(tiles) for j in range(i + 1))
    }
    jobs: list[Job] = []

    def add(kind: str, writes: tuple[int, int], *reads: tuple[int, int]) -> None:
        time = seconds[kind] * MILLISECOND * chance.uniform(0.9, 1.1)
        region, *others = (tile(places[place]) for place in (writes, *reads))
        jobs.append(Job(kind, time, region, tuple(others), priority=tiles - writes[1]))

    for k in range(tiles):
        add("potrf", (k, k))
        for i in range(k + 1, tiles):
            add("trsm", (i, k), (k, k))
        for i in range(k + 1, tiles):
            for j in range(k + 1, i):
                add("gemm", (i, j), (i, k), (j, k))
            add("syrk", (i, i), (i, k))
    return Graph(len(places) * ROWS, jobs)


def stencil(blocks: int, steps: int, halo: int, made: bool, chance: random.Random) -> Graph:
    """A row of blocks over time, in two arrays in turns, each with some rows of its neighbours.

    Args:
        blocks: how many; one is a tile.
        steps: how often each is computed.
        halo: rows of each neighbour.
        made: whether tasks make the blocks where they run first, instead of the host.
        chance: decides run times.
    """
    jobs: list[Job] = []
    if made:
        jobs = [Job("make", MILLISECOND, tile(block), (), fresh=True) for block in range(blocks)]
    for step in range(steps):
        here, there = (step % 2) * blocks, ((step + 1) % 2) * blocks
        for block in range(blocks):
            first, last = tile(here + block)
            reads = [(first, last)]
            if block > 0:
                reads.append((first - halo, first))
            if block < blocks - 1:
                reads.append((last, last + halo))
            time = MILLISECOND * chance.uniform(0.9, 1.1)
            jobs.append(Job("step", time, tile(there + block), tuple(reads), fresh=True))
    return Graph(2 * blocks * ROWS, jobs)


def reduction(blocks: int, chance: random.Random) -> Graph:
    """Blocks of unequal work, which are added in pairs."""
    jobs = [
        Job("block", MILLISECOND * chance.uniform(0.5, 1.5), tile(block), ())
        for block in range(blocks)
    ]
    level = list(range(blocks))
    while len(level) > 1:
        pairs = list(zip(level[::2], level[1::2], strict=False))
        jobs += [Job("add", 0.5 * MILLISECOND, tile(a), (tile(b),)) for a, b in pairs]
        level = [a for a, _ in pairs] + level[len(level) & ~1 :]
    return Graph(blocks * ROWS, jobs)


def any_graph(tasks: int, chance: random.Random) -> Graph:
    """Tasks that read what up to three of the last sixty wrote, with exponential run times."""
    jobs: list[Job] = []
    for task in range(tasks):
        near = range(max(0, task - 60), task)
        reads = {chance.choice(near) for _ in range(chance.randrange(4))} if near else set()
        seconds = chance.expovariate(1 / MILLISECOND)
        jobs.append(Job("node", seconds, tile(task), tuple(map(tile, sorted(reads))), fresh=True))
    return Graph(tasks * ROWS, jobs)


# ---- runs ---------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of a run."""

    makespan: float
    """Seconds until the last task was complete."""
    moved: int
    """Bytes between memories until then."""
    busiest: float
    """Seconds that the copies to one device took, of the device where they took longest."""


def _busy(seconds: float) -> None:
    context = ch.current()
    for _ in context.each():
        context.stream.busy(seconds)


def _task(kind: str, cost: float, fresh: bool) -> Callable[..., ch.Task[None]]:
    def update(seconds: float, writes: ch.InOut[Any], *reads: ch.In[Any]) -> None:
        _busy(seconds)

    def make(seconds: float, writes: ch.Out[Any], *reads: ch.In[Any]) -> None:
        _busy(seconds)

    def read(seconds: float, *reads: ch.In[Any]) -> None:
        _busy(seconds)

    body = {"update": update, "make": make, "read": read}[
        "read" if kind == "read" else "make" if fresh else "update"
    ]
    body.__name__ = body.__qualname__ = kind
    return ch.task(body, placement=ch.gpu, cost=cost)


def spawn(
    graph: Graph, array: ch.Array, after: Sequence[ch.Task[None]] = ()
) -> list[ch.Task[None]]:
    """Spawn a graph on the rows of an array, all of it behind some tasks.

    The mean run time of each kind is declared.
    """
    times: dict[tuple[str, bool], list[float]] = {}
    for job in graph.jobs:
        times.setdefault((job.kind, job.fresh), []).append(job.seconds)
    functions: dict[tuple[str, bool], Any] = {
        key: _task(key[0], sum(all_) / len(all_), key[1]) for key, all_ in times.items()
    }
    regions = functools.cache(lambda rows: array[rows[0] : rows[1]])
    tasks = []
    for job in graph.jobs:
        function = functions[job.kind, job.fresh].options(priority=job.priority, dependencies=after)
        writes = () if job.writes is None else (regions(job.writes),)
        tasks.append(function(job.seconds, *writes, *map(regions, job.reads)))
    return tasks


def run_graph(graph: Graph, machine: ch.Machine, policy: str | Policy) -> Outcome:
    """Run a graph on a machine under a policy."""
    array = ch.zeros((graph.rows, COLUMNS))
    with ch.Runtime(machine, workers=0, policy=policy) as runtime:
        ch.wait(spawn(graph, array))
        devices = runtime.devices
        assert devices is not None, "it is open"
        makespan = devices.clock.now / SECOND
        traffic = [
            (source, target, number, size)
            for device in runtime.stats()["devices"].values()
            for (source, target), (number, size) in device["traffic"].items()
        ]
    moved = 0
    busy: dict[str, float] = {}
    links = machine.links
    for source, target, number, size in traffic:
        if source == target:
            continue
        moved += size
        link = links.host if "host" in (source, target) else links.peer
        assert link is not None, "something was copied over it"
        if target != "host":
            time = size / link.bandwidth + number * link.latency
            busy[target] = busy.get(target, 0.0) + time
    return Outcome(makespan, moved * SHRUNK, max(busy.values(), default=0.0))


# ---- policies -----------------------------------------------------------------------------------

CASES: dict[str, Callable[[random.Random], Graph]] = {
    "Cholesky of 16 x 16 tiles": functools.partial(cholesky, 16),
    "stencil of 32 blocks, 24 steps": functools.partial(stencil, 32, 24, 1, False),
    "reduction of 256 blocks": functools.partial(reduction, 256),
    "random graph of 600 tasks": functools.partial(any_graph, 600),
}


def _movement(machine: ch.Machine, policies: dict[str, str | Policy]) -> Measure:
    contestants = []
    for case, make in CASES.items():
        made = functools.cache(lambda seed, make=make: make(random.Random(seed)))
        for name, policy in policies.items():
            contestants.append(_contestant(machine, case, made, name, policy))
    others = [name for name in policies if name != "eft"]
    bars = [_no_worse(case, others) for case in CASES]
    bars += _much_better(others)
    return Measure(
        name="movement",
        title=f"Graphs whose data move, on {len(machine.gpus)} devices",
        contestants=contestants,
        units={MAKESPAN: "ms", ABOVE: "x", MOVED: "GB"},
        bars=bars,
        warmup=0,
        note="charioteer is its default policy, eft. Tiles of 32 MiB, all on the host at first."
        " The bound is one below which no schedule comes.",
    )


def _contestant(
    machine: ch.Machine,
    case: str,
    made: Callable[[int], Graph],
    name: str,
    policy: str | Policy,
) -> Contestant:
    seeds = count()
    least = functools.cache(lambda seed: bound(made(seed), machine))

    def run() -> Sample:
        seed = next(seeds)
        outcome = run_graph(made(seed), machine, policy)
        return Sample(
            {
                MAKESPAN: outcome.makespan / MILLISECOND,
                ABOVE: outcome.makespan / least(seed),
                MOVED: outcome.moved / 1e9,
            }
        )

    params = {"policy": name, "graph": case, "devices": len(machine.gpus)}
    return Contestant(_runtime(name), case, run, None, params)


def _runtime(policy: str) -> str:
    return OURS if policy == "eft" else f"{OURS}, {policy}"


def _makespans(result: Result, case: str, policy: str, metric: str = MAKESPAN) -> Sequence[float]:
    series = result.get(Key(_runtime(policy), case, None))
    return () if series is None else series.values.get(metric, ())


def _no_worse(case: str, others: Sequence[str]) -> Bar:
    def values(result: Result) -> Sequence[float]:
        own = _makespans(result, case, "eft")
        best = [
            min(all_)
            for all_ in zip(*(_makespans(result, case, it) for it in others), strict=False)
        ]
        return [mine / other for mine, other in zip(own, best, strict=False)]

    return Bar(case, WORST, "x", values, MOST_WORSE)


def _much_better(others: Sequence[str]) -> list[Bar]:
    def compared(result: Result) -> list[list[tuple[bool, bool]]]:
        """Of each round and comparison: whether eft is much better, and whether one can be."""
        rounds: list[list[tuple[bool, bool]]] = []
        for case in CASES:
            own = _makespans(result, case, "eft", ABOVE)
            for other in others:
                theirs = _makespans(result, case, other, ABOVE)
                pairs = zip(own, theirs, strict=False)
                rounds.append([(its >= MUCH * mine, its >= MUCH) for mine, its in pairs])
        return [list(each) for each in zip(*rounds, strict=True)]

    def of_all(result: Result) -> Sequence[float]:
        return [sum(much for much, _ in each) / len(each) for each in compared(result)]

    def room(result: Result) -> Sequence[float]:
        return [sum(can for _, can in each) / len(each) for each in compared(result)]

    case = "all graphs and policies"
    return [
        Bar(case, BETTER, "", of_all, LEAST_BETTER, at_least=True),
        Bar(case, ROOM, "", room, LEAST_BETTER, at_least=True),
    ]


# ---- halos --------------------------------------------------------------------------------------

HALO = 16
"""Rows of a tile, so that a quarter of it goes to each neighbour."""


def _halos(machine: ch.Machine) -> Measure:
    """How much of the transfer of halos is hidden behind run times."""
    free = Link(math.inf)
    links = Links(free, free, free)
    ideal = type(machine)(machine.host, machine.gpus, links=links, time="virtual")
    seeds = count()

    def run() -> Sample:
        graph = stencil(32, 24, HALO, True, random.Random(next(seeds)))
        outcome = run_graph(graph, machine, "eft")
        least = run_graph(graph, ideal, "eft").makespan
        exposed = max(0.0, outcome.makespan - least)
        return Sample(
            {
                MAKESPAN: outcome.makespan / MILLISECOND,
                MOVED: outcome.moved / 1e9,
                HIDDEN: 1 - exposed / outcome.busiest,
            }
        )

    case = f"stencil of 32 blocks made on {len(machine.gpus)} devices, halos of 8 MiB"
    return Measure(
        name="halos",
        title="Transfers behind run times",
        contestants=[Contestant(OURS, case, run, None, {"graph": "stencil", "halo": HALO})],
        units={MAKESPAN: "ms", MOVED: "GB", HIDDEN: ""},
        bars=[absolute(case, HIDDEN, "", LEAST_HIDDEN, at_least=True)],
        warmup=0,
        note="Hidden is what of the copies to the device with the most of them the makespan does"
        " not show, beside one with links that take no time.",
    )


# ---- eviction -----------------------------------------------------------------------------------

CYCLES = 5
TILES = 24
"""For how many a device has room where they are used in turns."""
FACTORS = (1.5, 4.0)
"""How many times the memory of the device the tiles take."""


def cyclic(tiles: int, writes: bool) -> Graph:
    """All tiles in turns, again and again."""
    jobs = []
    for number in range(tiles * CYCLES):
        region = tile(number % tiles)
        if writes:
            jobs.append(Job("update", MILLISECOND, region, ()))
        else:
            jobs.append(Job("read", MILLISECOND, None, (region,)))
    return Graph(tiles * ROWS, jobs)


def evict(graph: Graph, machine: ch.Machine, room: int) -> Sample:
    """Run a graph on one device with room for so many tiles, and hold the bytes that were moved
    against Belady's rule for the same schedule.

    Raises:
        RuntimeError: the trace shows that something was out of order or not where it was read.
    """
    small = type(machine)(machine.host, [Gpu(room * TILE)], links=machine.links, time="virtual")
    # It outlives the runtime, so that results come home.
    array = ch.zeros((graph.rows, COLUMNS))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        with ch.Runtime(small, workers=0, trace=path) as runtime:
            # Bodies would run as soon as they can: what comes is known when all is spawned.
            space = ch.TaskSpace("start")
            tasks = spawn(graph, array, [space[0]])
            ch.spawn(space[0])(lambda: None)
            ch.wait(tasks)
            assert runtime.devices is not None, "it is open"
            makespan = runtime.devices.clock.now / SECOND
        checked = ch.check_order(path)
    if checked.violations:
        raise RuntimeError(str(checked.violations[0]))
    moves = checked.moves
    assert moves is not None, "the trace is of this version"
    return Sample(
        {
            MAKESPAN: makespan / MILLISECOND,
            MOVED: moves.bytes * SHRUNK / 1e9,
            BELADY: moves.bytes / moves.best,
        }
    )


def _eviction(machine: ch.Machine) -> Measure:
    graphs: dict[str, tuple[Graph, int]] = {}
    for factor in FACTORS:
        tiles = int(TILES * factor)
        graphs[f"read in turns, {factor:g} x the memory"] = (cyclic(tiles, False), TILES)
        graphs[f"updated in turns, {factor:g} x the memory"] = (cyclic(tiles, True), TILES)
        graph = cholesky(12, random.Random(0))
        graph = Graph(graph.rows, [job._replace(priority=0) for job in graph.jobs])
        room = int(graph.rows // ROWS / factor)
        graphs[f"Cholesky of 12 x 12 tiles, {factor:g} x the memory"] = (graph, room)

    def run(graph: Graph, room: int) -> Callable[[], Sample]:
        return lambda: evict(graph, machine, room)

    return Measure(
        name="eviction",
        title="More data than memory, on one device",
        contestants=[
            Contestant(OURS, case, run(graph, room), None, {"graph": case, "room": room})
            for case, (graph, room) in graphs.items()
        ],
        units={MAKESPAN: "ms", MOVED: "GB", BELADY: "x"},
        bars=[absolute(case, BELADY, "x", MOST_BYTES) for case in graphs],
        runs=1,
        warmup=0,
        note="Belady's rule knows the future and drops what is used last; it is replayed from the"
        " trace of the run. Bytes go to the device and home.",
    )


def measures(names: Sequence[str], path: Path, policies: dict[str, str | Policy]) -> list[Measure]:
    """The measures of those names, on the machine of a file.

    Raises:
        OptionError: see :func:`load`.
    """
    if not names:
        return []
    machine = load(path)
    made: dict[str, Callable[[], Measure]] = {
        "movement": lambda: _movement(machine, policies),
        "halos": lambda: _halos(machine),
        "eviction": lambda: _eviction(machine),
    }
    return [made[name]() for name in NAMES if name in names]
