"""What can be said of a graph without running it: widths, chains, bounds and an offline schedule.

A *site* is what a graph would run on: so many cores, so many GPUs, and the links between their
memories. The *list schedule* simulates a scheduler that knows all run times beforehand and decides
when something becomes free: of the ready tasks the one with the longest chain behind it goes first,
to the alternative where it finishes earliest; where that one has to wait, so does the task, and
those behind it may fill the gap. It is no optimum, and a schedule may beat it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from charioteer.graphs.description import Block, Graph, GraphError, Need

if TYPE_CHECKING:
    from charioteer.machine import Machine

__all__ = [
    "Bounds",
    "Schedule",
    "Site",
    "Slot",
    "bounds",
    "critical_path",
    "fitting",
    "list_schedule",
    "ranks",
]

Move = Callable[[str, str, int], float]
"""Seconds that so many bytes take from one place to another."""


def _at_once(source: str, target: str, size: int) -> float:
    return 0.0


@dataclass(frozen=True)
class Site:
    """What a graph runs on.

    Attributes:
        cores: how many.
        gpus: how many.
        move: seconds that bytes take from one place to another; none unless said.
    """

    cores: int
    gpus: int
    move: Move = _at_once

    @classmethod
    def of(cls, machine: Machine, cores: int | None = None) -> Site:
        """The site that a machine is.

        Args:
            machine: whose cores, GPUs and links.
            cores: how many of its cores count; all unless said.
        """
        from charioteer.devices import Device, cpu, gpu

        def device(place: str) -> Device:
            return cpu(0) if place == "cpu" else gpu(int(place[4:-1]))

        def move(source: str, target: str, size: int) -> float:
            if source == target:
                return 0.0
            ends = device(source), device(target)
            link = machine.links.between(*ends)
            if link is not None:
                return link.latency + size / link.bandwidth
            # Without a link of their own two GPUs pass through the host.
            return move(source, "cpu", size) + move("cpu", target, size)

        return cls(machine.host.cores if cores is None else cores, len(machine.gpus), move)

    @property
    def places(self) -> list[str]:
        """Every device of it, cores as often as there are."""
        return ["cpu"] * self.cores + [f"gpu({index})" for index in range(self.gpus)]


def fitting(need: Need, site: Site) -> bool:
    """Whether the site has all places of a set."""
    named = [place for place in need.places if place not in ("cpu", "gpu")]
    return (
        need.cores <= site.cores
        and need.gpus <= site.gpus
        and len(set(named)) == len(named)
        and all(int(place[4:-1]) < site.gpus for place in named)
    )


def possible(graph: Graph, site: Site) -> list[tuple[Need, ...]]:
    """The alternatives of each task that the site has.

    Raises:
        GraphError: it has none of some task.
    """
    found = []
    for task in graph:
        needs = tuple(need for need in task.needs if fitting(need, site))
        if not needs:
            raise GraphError(
                f"task {task.title} fits nowhere: there are {site.cores} cores and {site.gpus} GPUs"
            )
        found.append(needs)
    return found


def ranks(graph: Graph) -> list[float]:
    """Of each task the seconds of the longest chain that begins with it, where it is fastest."""
    behind = [0.0] * len(graph)
    for index in reversed(range(len(graph))):
        task = graph.tasks[index]
        behind[index] += task.seconds
        for before in task.after:
            behind[before] = max(behind[before], behind[index])
    return behind


def critical_path(graph: Graph) -> list[int]:
    """The tasks of the longest chain, in its order."""
    rank = ranks(graph)
    after: list[list[int]] = [[] for _ in graph.tasks]
    for index, task in enumerate(graph):
        for before in task.after:
            after[before].append(index)
    path = []
    ahead: Sequence[int] = range(len(graph))
    while ahead:
        here = max(ahead, key=lambda index: (rank[index], -index))
        path.append(here)
        ahead = after[here]
    return path


@dataclass(frozen=True)
class Bounds:
    """Seconds that no schedule comes below, each for a reason of its own.

    Attributes:
        chain: the longest chain of dependencies.
        work: the work over all devices, and over those of a kind or a single one that it is bound
        to. gil: what one interpreter holds its GIL for; 0 if it has none.
    """

    chain: float
    work: float
    gil: float

    @property
    def makespan(self) -> float:
        """The largest of them."""
        return max(self.chain, self.work, self.gil)


def bounds(graph: Graph, site: Site, *, gil: bool = True) -> Bounds:
    """The bounds of a graph on a site. Movement of data is in none of them.

    Raises:
        GraphError: a task fits nowhere there.
    """
    needs = possible(graph, site)
    chain = _longest(graph, [min(need.seconds for need in some) for some in needs])
    # Of the alternatives the one that takes least of all devices, or of those of one kind.
    loads = [
        (sum(min(map(_area, some)) for some in needs), site.cores + site.gpus),
        (sum(min(need.seconds * need.cores for need in some) for some in needs), site.cores),
        (sum(min(map(_gpu_area, some)) for some in needs), site.gpus),
    ]
    for index in range(site.gpus):
        place = f"gpu({index})"
        bound = (
            min(need.seconds * need.share if place in need.places else 0.0 for need in some)
            for some in needs
        )
        loads.append((sum(bound), 1))
    work = max(load / devices for load, devices in loads if devices)
    held = sum(min(need.seconds * need.held for need in some) for some in needs)
    return Bounds(chain, work, held if gil else 0.0)


def _gpu_area(need: Need) -> float:
    return need.seconds * need.share * need.gpus


def _area(need: Need) -> float:
    return need.seconds * need.cores + _gpu_area(need)


def _longest(graph: Graph, seconds: Sequence[float]) -> float:
    ends: list[float] = []
    for task, time in zip(graph, seconds, strict=True):
        ends.append(time + max((ends[before] for before in task.after), default=0.0))
    return max(ends, default=0.0)


# ---- the list schedule --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slot:
    """When and where a task runs: seconds from the start, and the devices, such as ``"gpu(1)"``."""

    start: float
    end: float
    places: tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """A schedule: a slot a task, in the order of the graph."""

    slots: tuple[Slot, ...]

    @property
    def makespan(self) -> float:
        """Seconds from the start to the end of the last task."""
        return max((slot.end for slot in self.slots), default=0.0)


EPSILON = 1e-9
"""Shares and seconds that differ by less are the same."""


class _Devices:
    """What is free on each device, and until when the rest is taken."""

    def __init__(self, site: Site) -> None:
        self.free = [1.0] * site.gpus
        self.cores = site.cores
        self.running: list[list[tuple[float, float]]] = [[] for _ in range(site.gpus)]
        self.on_cores: list[tuple[float, int]] = []

    def earliest(self, need: Need, now: float) -> tuple[float, list[int]]:
        """When a set can be had if nothing else is started, and its GPUs, in its order."""
        start = now
        if need.cores > self.cores:
            free = self.cores
            for end, cores in sorted(self.on_cores):
                free += cores
                if free >= need.cores:
                    start = max(start, end)
                    break
        named = {int(place[4:-1]) for place in need.places if place not in ("cpu", "gpu")}
        when = {gpu: self._room(gpu, need.share, now) for gpu in range(len(self.free))}
        others = sorted((gpu for gpu in when if gpu not in named), key=lambda gpu: (when[gpu], gpu))
        chosen: list[int] = []
        for place in need.places:
            if place == "cpu":
                continue
            gpu = others.pop(0) if place == "gpu" else int(place[4:-1])
            chosen.append(gpu)
            start = max(start, when[gpu])
        return start, chosen

    def _room(self, gpu: int, share: float, now: float) -> float:
        """When a GPU has so much of it free."""
        free = self.free[gpu]
        if free + EPSILON >= share:
            return now
        for end, part in sorted(self.running[gpu]):
            free += part
            if free + EPSILON >= share:
                return end
        raise AssertionError("a share is never more than a device")

    def take(self, need: Need, gpus: Iterable[int], end: float) -> None:
        for gpu in gpus:
            self.free[gpu] -= need.share
            self.running[gpu].append((end, need.share))
        if need.cores:
            self.cores -= need.cores
            self.on_cores.append((end, need.cores))

    def give_back(self, need: Need, gpus: Iterable[int], end: float) -> None:
        for gpu in gpus:
            self.free[gpu] += need.share
            self.running[gpu].remove((end, need.share))
        if need.cores:
            self.cores += need.cores
            self.on_cores.remove((end, need.cores))

    def is_full(self) -> bool:
        """Whether nobody can start."""
        return self.cores == 0 and all(free <= EPSILON for free in self.free)


def list_schedule(graph: Graph, site: Site, *, moves: bool = False) -> Schedule:
    """The list schedule of a graph on a site.

    Args:
        graph: the tasks; their priorities do not count, the chains behind them do.
        site: on what.
        moves: whether blocks have to be moved to who reads them, before it begins, one after the
            other; else they are everywhere.

    Raises:
        GraphError: a task fits nowhere there.
    """
    needs = possible(graph, site)
    rank = ranks(graph)
    ahead: list[list[int]] = [[] for _ in graph.tasks]
    missing = [len(task.after) for task in graph]
    for index, task in enumerate(graph):
        for before in task.after:
            ahead[before].append(index)
    ready = [(-rank[index], index) for index, left in enumerate(missing) if not left]
    heapq.heapify(ready)
    running: list[tuple[float, int, Need, list[int]]] = []
    slots: list[Slot | None] = [None] * len(graph)
    devices = _Devices(site)
    where: list[set[str]] = [{block.home} for block in graph.blocks]
    now = 0.0
    while ready or running:
        waiting = []
        while ready and not devices.is_full():
            key, index = heapq.heappop(ready)
            task = graph.tasks[index]
            best: tuple[float, float, int, Need, list[int]] | None = None
            for order, need in enumerate(needs[index]):
                start, gpus = devices.earliest(need, now)
                seconds = need.seconds
                if moves:
                    reads = (*task.reads, *task.updates)
                    seconds += _moving(graph.blocks, reads, where, _first(need, gpus), site.move)
                if best is None or start + seconds < best[0] - EPSILON:
                    best = (start + seconds, start, order, need, gpus)
            assert best is not None, "who is ready fits somewhere"
            end, start, _, need, gpus = best
            if start > now + EPSILON:
                waiting.append((key, index))
                continue
            devices.take(need, gpus, end)
            heapq.heappush(running, (end, index, need, gpus))
            places = iter(gpus)
            slots[index] = Slot(
                now,
                end,
                tuple("cpu" if one == "cpu" else f"gpu({next(places)})" for one in need.places),
            )
            for block in (*task.reads, *task.updates, *task.writes):
                here = _first(need, gpus)
                where[block] = where[block] | {here} if block in task.reads else {here}
        for entry in waiting:
            heapq.heappush(ready, entry)
        now = running[0][0]
        while running and running[0][0] <= now + EPSILON:
            end, index, need, gpus = heapq.heappop(running)
            devices.give_back(need, gpus, end)
            for after in ahead[index]:
                missing[after] -= 1
                if not missing[after]:
                    heapq.heappush(ready, (-rank[after], after))
    return Schedule(tuple(slot for slot in slots if slot is not None))


def _first(need: Need, gpus: Sequence[int]) -> str:
    """The place of a set where its data is: its first."""
    return "cpu" if need.places[0] == "cpu" else f"gpu({gpus[0]})"


def _moving(
    blocks: Sequence[Block], reads: Iterable[int], where: Sequence[set[str]], to: str, move: Move
) -> float:
    return sum(
        0.0
        if to in where[block]
        else min(move(source, to, blocks[block].size) for source in where[block])
        for block in reads
    )
