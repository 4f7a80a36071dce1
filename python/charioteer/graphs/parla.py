"""The graph files of Parla's tools.

The *older* format (``.gph``) is that of its collection of synthetic graphs. The first line has the
sizes of the blocks of data, each other line a task::

    40, 100
    0,1 | 50000, 1, 1, 1, 200 | 0,0 : 1,0 | 1 : : 0

that is its name; microseconds without the GIL, how many of it fit on a device, where it runs (0 a
core, 1 a GPU, 2 either), how often it takes the GIL and for how many microseconds each time; the
names of those that it depends on; the blocks that it reads, writes, and reads and writes.

The *newer* format (``.pgraph``) is that of Parla's own benchmarks. Blocks have a place, and what a
task takes is said for each set of devices::

    (100, -1) | (40, 1)
    (0, 1) | { (0,) : 50000, 0.5, 1, 0.05, 0 }, { (1, 2) : 30000, 1, 1, 0, 0 } | (0, 0) | 1 : : 0

that is microseconds in all, the part of each device, how often it takes the GIL, the part of the
time under the GIL, and bytes. Devices are -2 for any, -1 for a core, 0 for a GPU, 1 to 4 for the
first four GPUs, and 5 and more for those from the first on. Earlier files of it have ``{100 : -1},
{40 : 1}`` in the first line, which is read too. A name may have a space before it, ``('T', 0)``;
``T`` is the usual one.

Sizes count elements of four bytes. Trailing columns may be left out. Both formats know neither
kinds nor priorities, and the writers leave these out; what else a format cannot say they refuse.
Times are rounded to whole microseconds. In the older format a task that takes the GIL no times at
all is read as one that never takes it, where Parla's own reader would have it do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from charioteer.graphs.description import Block, Graph, GraphError, Name, Need, Task, check_task
from charioteer.graphs.scanning import GraphFileError, Scanner

__all__ = ["dump_newer", "dump_older", "load_newer", "load_older"]

ELEMENT = 4
"""Bytes of an element of a block."""
MICRO = 1e-6
MOST = 10**15
MOST_SLICES = 10**6
LAST_DEVICE = 10_000
"""The largest numbers that are read, and so also those that are written."""

CPU, GPU, EITHER = 0, 1, 2
"""Where a task runs, in the older format."""
ANY_DEVICE, CORE, ANY_GPU, FIRST_GPU, CHOSEN_GPU = -2, -1, 0, 1, 5
"""Devices of the newer format; from ``CHOSEN_GPU`` on numbers begin with the first GPU again."""
SPACE = "T"


def _lines(lines: Sequence[str]) -> Iterator[Scanner]:
    found = False
    for number, line in enumerate(lines, 1):
        if line.strip(" \t"):
            found = True
            yield Scanner(line, number)
    if not found:
        raise GraphFileError("the file is empty", 1, 1)


def _read(
    lines: Sequence[str],
    blocks_of: Callable[[Scanner], tuple[Block, ...]],
    name_of: Callable[[Scanner, Name], Name],
    needs_of: Callable[[Scanner], tuple[Need, ...]],
) -> Graph:
    """What both formats have in common; a dependency's name is read with that of its task."""
    scanners = _lines(lines)
    blocks = blocks_of(next(scanners))
    places: dict[Name, int] = {}
    tasks: list[Task] = []
    for scanner in scanners:
        scanner.peek()
        start = scanner.at
        name = name_of(scanner, ())
        if name in places:
            scanner.fail("a task above has that name", start)
        scanner.expect("|")
        needs = needs_of(scanner)
        after: list[int] = []
        if scanner.take("|"):
            while scanner.peek() not in ("|", ""):
                if scanner.take(":"):
                    continue
                at = scanner.at
                before = places.get(name_of(scanner, name))
                if before is None:
                    scanner.fail("there is no task above with that name", at)
                after.append(before)
                if scanner.peek() not in ("|", ":", ""):
                    scanner.fail("':' or '|' expected behind a name")
        used: list[tuple[int, ...]] = [(), (), ()]
        if scanner.take("|"):
            for column in range(3):
                used[column] = _numbers(scanner, len(blocks))
                if not scanner.take(":"):
                    break
        scanner.end()
        # Parla names what it reads and writes among what it reads too, at times.
        reads, writes, updates = used
        reads = tuple(block for block in dict.fromkeys(reads) if block not in updates)
        writes = tuple(block for block in dict.fromkeys(writes) if block not in updates)
        both = [block for block in reads if block in writes]
        task = Task(
            name=name,
            needs=needs,
            after=tuple(dict.fromkeys(after)),
            reads=tuple(block for block in reads if block not in both),
            writes=tuple(block for block in writes if block not in both),
            updates=(*dict.fromkeys(updates), *both),
        )
        here = len(tasks)
        scanner.checked(partial(check_task, task, here, len(blocks)), start)
        places[name] = here
        tasks.append(task)
    return Graph("graph", tuple(tasks), blocks)


def _numbers(scanner: Scanner, blocks: int) -> tuple[int, ...]:
    found: list[int] = []
    while scanner.peek() not in (":", ""):
        if found:
            scanner.expect(",")
        if not blocks:
            scanner.fail("the first line has no blocks")
        found.append(scanner.integer("a block", 0, blocks - 1))
    return tuple(found)


# ---- the older format ---------------------------------------------------------------------------


def load_older(lines: Sequence[str]) -> Graph:
    """The graph that the lines of a file in the older format say.

    Raises:
        GraphFileError: they say none.
    """
    return _read(lines, _older_blocks, _older_name, _older_needs)


def _older_blocks(scanner: Scanner) -> tuple[Block, ...]:
    blocks = []
    while True:
        scanner.peek()
        at = scanner.at
        size = scanner.integer("the size of a block", 0, MOST)
        if size:
            blocks.append(scanner.checked(partial(Block, ELEMENT * size), at))
        elif scanner.peek() or blocks:
            scanner.fail("the size of a block is 1 or more", at)
        if not scanner.take(","):
            scanner.end()
            return tuple(blocks)


def _older_name(scanner: Scanner, of: Name) -> Name:
    parts = [scanner.integer("a part of a name", -MOST, MOST)]
    while scanner.take(","):
        parts.append(scanner.integer("a part of a name", -MOST, MOST))
    return tuple(parts)


def _older_needs(scanner: Scanner) -> tuple[Need, ...]:
    scanner.peek()
    start = scanner.at
    free = scanner.integer("the time", 0, MOST)
    scanner.expect(",")
    fit = scanner.integer("how many fit on a device", 1, MOST)
    scanner.expect(",")
    where = scanner.integer("the location", CPU, EITHER)
    scanner.expect(",")
    times = scanner.integer("how often it takes the GIL", 0, MOST_SLICES)
    scanner.expect(",")
    each = scanner.integer("the time under the GIL", 0, MOST)
    held, whole = times * each, free + times * each
    places = {CPU: ("cpu",), GPU: ("gpu",), EITHER: ("cpu", "gpu")}[where]
    return scanner.checked(
        lambda: tuple(
            Need(
                (place,),
                seconds=whole * MICRO,
                share=1 / fit,
                held=held / whole if whole else 0.0,
                slices=max(1, times),
            )
            for place in places
        ),
        start,
    )


def dump_older(graph: Graph) -> str:
    """The text of a file in the older format.

    Raises:
        GraphError: the format cannot say it: sets of several devices, single GPUs, memory, blocks
            that are not at home on the host, words in names, shares that are no unit fractions,
            alternatives that differ, or numbers that are too large.
    """
    if any(block.home != "cpu" for block in graph.blocks):
        raise GraphError("in this format all blocks begin on the host")
    lines = [", ".join(str(-(-block.size // ELEMENT)) for block in graph.blocks) or "0"]
    for task in graph:

        def refuse(why: str, title: str = task.title) -> GraphError:
            return GraphError(f"task {title}: this format knows {why}")

        if any(isinstance(part, str) for part in task.name):
            raise refuse("numbers alone in names")
        _check_numbers(task)
        first = task.needs[0]
        known: dict[tuple[str, ...], int] = {("cpu",): CPU, ("gpu",): GPU}
        where = known.get(first.places)
        if where is None:
            raise refuse("one core or one GPU, whichever")
        if len(task.needs) > 1:
            others = {need.places for need in task.needs}
            alike = all(_alike(need, first) for need in task.needs)
            if others != {("cpu",), ("gpu",)} or not alike:
                raise refuse("either kind at the same cost as the only choice")
            where = EITHER
        fit = round(1 / first.share)
        if fit > MOST:
            raise refuse(f"shares of one over {MOST} at least")
        if abs(fit * first.share - 1) > 1e-6:
            raise refuse("shares of one over a whole number")
        if first.memory:
            raise refuse("no memory")
        held = first.seconds * first.held
        each = round(held / first.slices / MICRO)
        free = round((first.seconds - held) / MICRO)
        middle = ", ".join(map(str, (free, fit, where, first.slices, each)))
        after = " : ".join(graph.tasks[before].title for before in task.after)
        lines.append(f"{task.title} | {middle} | {after} | {_used(task)}")
    return "\n".join(lines) + "\n"


def _check_numbers(task: Task) -> None:
    """See that a reader takes the numbers of a task.

    Raises:
        GraphError: it does not.
    """
    numbers = [("a part of a name", part, MOST) for part in task.name if isinstance(part, int)]
    for need in task.needs:
        numbers.append(("how often it takes the GIL", need.slices, MOST_SLICES))
        numbers.append(("the memory", need.memory, MOST))
    for what, number, most in numbers:
        if abs(number) > most:
            raise GraphError(f"task {task.title}: in this format {what} is {most} at most")


def _alike(one: Need, other: Need) -> bool:
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("seconds", "share", "held", "slices", "memory")
    )


def _used(task: Task) -> str:
    columns = (task.reads, task.writes, task.updates)
    return " : ".join(", ".join(map(str, column)) for column in columns).rstrip() or ": :"


# ---- the newer format ---------------------------------------------------------------------------


def load_newer(lines: Sequence[str]) -> Graph:
    """The graph that the lines of a file in the newer format say.

    Raises:
        GraphFileError: they say none.
    """
    return _read(lines, _newer_blocks, _newer_name, _newer_needs)


def _newer_blocks(scanner: Scanner) -> tuple[Block, ...]:
    blocks = []
    early = scanner.peek() == "{"
    opening, inner, closing, between = "{:}," if early else "(,)|"
    while True:
        scanner.expect(opening)
        at = scanner.at
        size = scanner.integer("the size of a block", 1, MOST)
        scanner.expect(inner)
        scanner.peek()
        home = scanner.integer("the place of a block", CORE, LAST_DEVICE)
        if home == ANY_GPU:
            scanner.fail("the place of a block is -1 for the host, or one GPU", at)
        scanner.expect(closing)
        place = _place(home)
        blocks.append(scanner.checked(partial(Block, ELEMENT * size, place), at))
        if not scanner.take(between):
            scanner.end()
            return tuple(blocks)


def _place(device: int) -> str:
    if device == CORE:
        return "cpu"
    if device == ANY_GPU:
        return "gpu"
    return f"gpu({device - (FIRST_GPU if device < CHOSEN_GPU else CHOSEN_GPU)})"


def _newer_name(scanner: Scanner, of: Name) -> Name:
    space = ""
    parts: list[int] = []
    depth = 0
    while True:
        if scanner.take("("):
            depth += 1
            if depth > 2:
                scanner.fail("a name is nested too deeply")
            continue
        if scanner.peek() in ("'", '"'):
            at = scanner.at
            space = scanner.string("a space")
            if parts or not space.isalpha():
                scanner.fail("a space is letters alone, before the numbers", at)
        elif scanner.peek() != ")":
            parts.append(scanner.integer("a part of a name", -MOST, MOST))
        while depth and scanner.take(")"):
            depth -= 1
        if not scanner.take(","):
            break
        while depth and scanner.take(")"):
            depth -= 1
        if scanner.peek() in ("|", ":", ""):
            break
    if depth:
        scanner.expect(")")
    if not parts:
        scanner.fail("a name has a number")
    if not space and of and isinstance(of[0], str):
        space = of[0]
    return (space, *parts) if space and space != SPACE else tuple(parts)


def _newer_needs(scanner: Scanner) -> tuple[Need, ...]:
    found: list[Need] = []
    while True:
        scanner.expect("{")
        at = scanner.at
        devices = _devices(scanner)
        scanner.expect(":")
        micros = scanner.number("the time")
        scanner.expect(",")
        share = scanner.number("the part of a device")
        scanner.expect(",")
        times = scanner.integer("how often it takes the GIL", 1, MOST_SLICES)
        scanner.expect(",")
        held = scanner.number("the part of the time under the GIL")
        scanner.expect(",")
        memory = scanner.integer("the memory", 0, MOST)
        scanner.expect("}")
        if devices == [ANY_DEVICE]:
            sets: tuple[tuple[str, ...], ...] = (("cpu",), ("gpu",))
        elif ANY_DEVICE in devices:
            scanner.fail("-2 stands alone", at)
        else:
            sets = (tuple(map(_place, devices)),)
        found += [
            scanner.checked(partial(Need, places, micros * MICRO, share, held, times, memory), at)
            for places in sets
        ]
        if not scanner.take(","):
            return tuple(found)


def _devices(scanner: Scanner) -> list[int]:
    grouped = scanner.take("(")
    devices = [scanner.integer("a device", ANY_DEVICE, LAST_DEVICE)]
    while grouped and scanner.take(","):
        if scanner.peek() != ")":
            devices.append(scanner.integer("a device", ANY_DEVICE, LAST_DEVICE))
    if grouped:
        scanner.expect(")")
    return devices


def dump_newer(graph: Graph) -> str:
    """The text of a file in the newer format.

    Raises:
        GraphError: the format cannot say it: a word in a name that is not of letters alone, shares
            below a billionth, or numbers that are too large.
    """
    blocks = graph.blocks or (Block(ELEMENT),)
    head = (f"({-(-block.size // ELEMENT)}, {_number_of(block.home)})" for block in blocks)
    lines = [" | ".join(head)]
    for task in graph:
        _check_numbers(task)
        needs = []
        for need in task.needs:
            if round(need.share, 9) == 0:
                raise GraphError(f"task {task.title}: in this format a share has nine digits")
            devices = ", ".join(str(_number_of(place)) for place in need.places)
            numbers = f"{round(need.seconds / MICRO)}, {_decimal(need.share)}, {need.slices}"
            rest = f"{_decimal(need.held)}, {need.memory}"
            needs.append(f"{{ ({devices},) : {numbers}, {rest} }}")
        after = " : ".join(_newer_title(graph.tasks[before], task) for before in task.after)
        lines.append(f"{_newer_title(task)} | {', '.join(needs)} | {after} | {_used(task)}")
    return "\n".join(lines) + "\n"


def _number_of(place: str) -> int:
    if place == "cpu":
        return CORE
    if place == "gpu":
        return ANY_GPU
    index = int(place[4:-1])
    number = index + (FIRST_GPU if index < CHOSEN_GPU - FIRST_GPU else CHOSEN_GPU)
    if number > LAST_DEVICE:
        raise GraphError(f"in this format {place} has no number")
    return number


def _decimal(value: float) -> str:
    """A number that Parla's reader takes: a whole one, or one with a point and no exponent."""
    return str(round(value)) if value == round(value) else f"{value:.9f}".rstrip("0")


def _newer_title(task: Task, reader: Task | None = None) -> str:
    """The name of a task; in the line of ``reader`` one without a space would be in that one's."""
    space, *index = task.name if isinstance(task.name[0], str) else (SPACE, *task.name)
    inner = ", ".join(map(str, index)) + ("," if len(index) == 1 else "")
    if space == SPACE and (reader is None or not isinstance(reader.name[0], str)):
        return f"({inner})"
    if not str(space).isalpha():
        raise GraphError(f"task {task.title}: in this format a space is letters alone")
    return f"('{space}', ({inner}))"
