"""Graph descriptions: what each task of a graph does, where it may run and what data it uses.

A :class:`Graph` is to be read top down: tasks stand in the order of their spawning, and depend on
earlier ones alone. Tasks and blocks of data are known by their positions. Nothing here runs
anything; :mod:`charioteer.graphs.running` does.

A *place* is ``"cpu"`` (a core), ``"gpu"`` (any GPU) or ``"gpu(3)"`` (that one). A *set* is a tuple
of places. The alternatives of a task are its :class:`Need`\\ s, of which the scheduler takes one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from charioteer.graphs.shapes import Shape, levels

__all__ = [
    "Block",
    "Graph",
    "GraphError",
    "Need",
    "Task",
    "check_place",
    "check_task",
    "check_word",
    "describe",
    "parse_on",
]


class GraphError(ValueError):
    """A graph that cannot be: the message says which task and why."""


_PLACE = re.compile(r"cpu|gpu(\(\d{1,4}\))?")


def check_place(place: str) -> None:
    """See that it is a place.

    Raises:
        GraphError: it is none.
    """
    if not _PLACE.fullmatch(place):
        raise GraphError(f"{place!r} is no place: cpu, gpu, or one GPU such as gpu(0)")


@dataclass(frozen=True, slots=True)
class Need:
    """One alternative of a task: a set, and what the task takes there.

    Attributes:
        places: the set, in order.
        seconds: how long it keeps the set busy.
        share: the part of each GPU that it takes, above 0 and up to 1. Cores are taken whole.
        held: the part of the time under the GIL, from 0 to 1.
        slices: in how many slices the time is divided, each with its part under the GIL.
        memory: bytes that it allocates on each GPU of the set.
    """

    places: tuple[str, ...] = ("cpu",)
    seconds: float = 1e-3
    share: float = 1.0
    held: float = 0.0
    slices: int = 1
    memory: int = 0

    def __post_init__(self) -> None:
        if not self.places:
            raise GraphError("a set has one place at least")
        for place in self.places:
            check_place(place)
        for what, number, limit in (
            ("seconds", self.seconds, 86_400.0),
            ("share", self.share, 1.0),
            ("held", self.held, 1.0),
        ):
            if not (math.isfinite(number) and 0 <= number <= limit):
                raise GraphError(f"{what} is from 0 to {limit:g}, not {number!r}")
        if self.share == 0:
            raise GraphError("share is above 0")
        if self.slices < 1:
            raise GraphError("slices is 1 or more")
        if self.memory < 0:
            raise GraphError("memory is 0 or more")

    @property
    def gpus(self) -> int:
        """How many of its places are GPUs."""
        return sum(place != "cpu" for place in self.places)

    @property
    def cores(self) -> int:
        """How many of its places are cores."""
        return len(self.places) - self.gpus


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of data.

    Attributes:
        size: in bytes.
        home: the place where it is when the graph starts.
    """

    size: int
    home: str = "cpu"

    def __post_init__(self) -> None:
        check_place(self.home)
        if self.home == "gpu":
            raise GraphError("a block is at home on one device")
        if not 0 < self.size <= 1 << 40:
            raise GraphError(f"the size of a block is from 1 byte to 1 TiB, not {self.size}")


Name = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A task of a graph.

    Attributes:
        name: an index such as ``(2, 0)``, with the name of a space before it if there are several.
        needs: its alternatives; the first is the preferred one among equals.
        after: the tasks that it depends on.
        reads: the blocks that it reads.
        writes: the blocks that it writes without a look at what was there.
        updates: the blocks that it reads and writes.
        kind: its function.
        priority: larger is sooner.
    """

    name: Name
    needs: tuple[Need, ...]
    after: tuple[int, ...] = ()
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    updates: tuple[int, ...] = ()
    kind: str = "task"
    priority: int = 0

    @property
    def seconds(self) -> float:
        """How long it takes where it is fastest."""
        return min(need.seconds for need in self.needs)

    @property
    def title(self) -> str:
        """Its name in short, such as ``2,0``."""
        return ",".join(map(str, self.name))


@dataclass(frozen=True)
class Graph:
    """A task graph.

    Attributes:
        name: for people.
        tasks: in the order of their spawning.
        blocks: the data that they use.

    Raises:
        GraphError: a task depends on itself or a later one, uses a block that is not there or in
            two ways, has no alternative or a name that another has.
    """

    name: str
    tasks: tuple[Task, ...]
    blocks: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        check_word("the name of a graph", self.name)
        seen: set[Name] = set()
        for index, task in enumerate(self.tasks):
            check_task(task, index, len(self.blocks))
            if task.name in seen:
                raise GraphError(f"two tasks are called {task.title}")
            seen.add(task.name)

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    @cached_property
    def levels(self) -> list[list[int]]:
        """The tasks by the length of the longest chain that ends in them."""
        return levels([task.after for task in self.tasks])

    @property
    def edges(self) -> int:
        """How many dependencies are named."""
        return sum(len(task.after) for task in self.tasks)


def check_word(what: str, word: str) -> None:
    """See that a word for people can be shown in one line.

    Raises:
        GraphError: it is empty, too long, or has characters that are not shown.
    """
    if not (word.isprintable() and 0 < len(word) <= 200):
        raise GraphError(f"{what} is up to 200 characters that can be printed, not {word[:20]!r}")


def check_task(task: Task, index: int, blocks: int) -> None:
    """See that a task can stand at a position of a graph with so many blocks.

    Raises:
        GraphError: it cannot.
    """
    check_word("a kind", task.kind)
    if isinstance(task.name[0], str):
        check_word("a name", task.name[0])
    if not task.needs:
        raise GraphError(f"task {task.title} has no place to run")
    sets = [tuple(sorted(need.places)) for need in task.needs]
    if len(set(sets)) < len(sets):
        raise GraphError(f"task {task.title} has one set of devices twice")
    for before in task.after:
        if not 0 <= before < index:
            raise GraphError(f"task {task.title} depends on one that is not before it")
    if len(set(task.after)) < len(task.after):
        raise GraphError(f"task {task.title} depends on one task twice")
    used = Counter((*task.reads, *task.writes, *task.updates))
    for block, times in used.items():
        if not 0 <= block < blocks:
            raise GraphError(f"task {task.title} uses block {block} of {blocks}")
        if times > 1:
            raise GraphError(f"task {task.title} names block {block} twice")


On = tuple[tuple[tuple[str, ...], ...], float]
"""Alternatives, each of them a set, and the weight with which tasks get them."""


def parse_on(text: str) -> On:
    """What a text such as ``gpu*2 | cpu+gpu | gpu(1) = 0.3`` says.

    Alternatives are separated by ``|``, members of a set by ``+``; ``*`` says how many. Behind
    ``=`` stands the weight, 1 unless said.

    Raises:
        GraphError: it does not parse.
    """
    said, equals, number = text.partition("=")
    weight = 1.0
    if equals:
        try:
            weight = float(number)
        except ValueError:
            raise GraphError(f"{number.strip()!r} is no weight") from None
        if not (math.isfinite(weight) and weight > 0):
            raise GraphError(f"a weight is above 0, not {number.strip()}")
    sets = []
    for part in said.split("|"):
        places: list[str] = []
        for member in part.split("+"):
            place, times, count = (piece.strip() for piece in member.partition("*"))
            check_place(place)
            if times and not (count.isascii() and count.isdigit() and 0 < int(count) <= 1024):
                raise GraphError(f"{member.strip()!r}: how many is a whole number up to 1024")
            places += [place] * (int(count) if times else 1)
        sets.append(tuple(places))
    return tuple(sets), weight


def describe(
    shape: Shape,
    *,
    on: Sequence[On | str] = ("cpu",),
    seconds: float | Sequence[float] = 1e-3,
    vary: float = 0.0,
    times: dict[str, float] | None = None,
    share: float = 1.0,
    held: float = 0.0,
    slices: int = 1,
    memory: int = 0,
    size: int = 0,
    seed: int = 0,
) -> Graph:
    """A graph of that shape.

    Args:
        shape: what depends on what.
        on: where tasks may run: each gets one of these, drawn with their weights.
        seconds: how long a task takes; a sequence has one value a task.
        vary: by what part, at most, the time of a task is more or less than that, drawn evenly.
        times: seconds by kind, for those kinds that differ.
        share: the part of each GPU that a task takes.
        held: the part of the time under the GIL.
        slices: in how many slices.
        memory: bytes that a task allocates on each GPU.
        size: bytes that a task writes, into a block of its own, and that each task after it reads;
            with 0 there is no data.
        seed: decides what is drawn.

    Raises:
        GraphError: a value is out of its range.
    """
    if not 0 <= vary < 1:
        raise GraphError(f"vary is from 0 to below 1, not {vary!r}")
    if size < 0:
        raise GraphError("size is 0 or more")
    if not isinstance(seconds, float | int) and len(seconds) != len(shape):
        raise GraphError(f"there are {len(seconds)} times for {len(shape)} tasks")
    choices = [parse_on(one) if isinstance(one, str) else one for one in on]
    if not choices:
        raise GraphError("tasks have to run somewhere")
    weights = [weight for _, weight in choices]
    chance = Random(seed)
    tasks = []
    for index, before in enumerate(shape.before):
        kind = shape.kinds[index] if shape.kinds else "task"
        usual = seconds if isinstance(seconds, float | int) else seconds[index]
        time = (times or {}).get(kind, usual)
        if vary:
            time *= chance.uniform(1 - vary, 1 + vary)
        [(sets, _)] = chance.choices(choices, weights) if len(choices) > 1 else choices
        tasks.append(
            Task(
                name=shape.names[index] if shape.names else (index,),
                needs=tuple(Need(one, time, share, held, slices, memory) for one in sets),
                after=before,
                reads=before if size else (),
                writes=(index,) if size else (),
                kind=kind,
            )
        )
    blocks = (Block(size),) * len(tasks) if size else ()
    return Graph(shape.name, tuple(tasks), blocks)
