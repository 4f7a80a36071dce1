"""The format of graph files: JSON lines, one a task.

The first line is an object with the version of the format, and what concerns the graph as a whole;
each other line is a task. Tasks stand in the order of their spawning. Empty lines mean nothing.

========================  =========================================================================
of the graph
========================  =========================================================================
``charioteer-graph``      the version, 1
``name``                  for people; may be left out
``blocks``                a list of ``{"size": bytes, "home": place}``; ``home`` is ``"cpu"`` unless
                          said; may be left out
========================  =========================================================================

========================  =========================================================================
of a task
========================  =========================================================================
``name``                  a list of whole numbers, before which a word may stand
``needs``                 a list of alternatives, see below
``after``                 a list of names of tasks that stand above it
``reads``, ``writes``,    lists of numbers of blocks, from 0 on
``updates``
``kind``                  its function, ``"task"`` unless said
``priority``              a whole number, 0 unless said; larger is sooner
========================  =========================================================================

========================  =========================================================================
of an alternative
========================  =========================================================================
``on``                    a list of places: ``"cpu"``, ``"gpu"``, or one GPU such as ``"gpu(0)"``
``seconds``               how long it runs
``share``                 the part of each GPU that it takes, 1 unless said
``held``                  the part of the time under the GIL, 0 unless said
``slices``                in how many slices, 1 unless said
``memory``                bytes that it allocates on each GPU, 0 unless said
========================  =========================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from charioteer.graphs.description import Block, Graph, Name, Need, Task, check_task, check_word
from charioteer.graphs.scanning import GraphFileError, Scanner, Value, parse_json

__all__ = ["VERSION", "dump", "load"]

VERSION = 1
KEY = "charioteer-graph"


def dump(graph: Graph) -> str:
    """The text of a file with that graph."""
    head: dict[str, Any] = {KEY: VERSION, "name": graph.name}
    if graph.blocks:
        head["blocks"] = [_without(vars_of(block), Block(1)) for block in graph.blocks]
    lines = [head]
    for task in graph:
        entry: dict[str, Any] = {"name": task.name}
        if task.kind != "task":
            entry["kind"] = task.kind
        entry["needs"] = [
            {"on": need.places, "seconds": need.seconds, **_without(vars_of(need), Need())}
            for need in task.needs
        ]
        if task.after:
            entry["after"] = [graph.tasks[before].name for before in task.after]
        for key in ("reads", "writes", "updates", "priority"):
            if getattr(task, key):
                entry[key] = getattr(task, key)
        lines.append(entry)
    return "".join(json.dumps(line) + "\n" for line in lines)


def vars_of(thing: Block | Need) -> dict[str, Any]:
    """The fields of a block or need that a file may leave out, and a block's size."""
    names = ("size", "home") if isinstance(thing, Block) else _FRACTIONS
    return {name: getattr(thing, name) for name in names}


_FRACTIONS = ("share", "held", "slices", "memory")


def _without(fields: dict[str, Any], usual: object) -> dict[str, Any]:
    return {
        key: value for key, value in fields.items() if key == "size" or value != getattr(usual, key)
    }


def load(lines: Sequence[str]) -> Graph:
    """The graph that the lines of a file say.

    Raises:
        GraphFileError: they say none.
    """
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip(" \t"))
    first = next(numbered, None)
    if first is None:
        raise GraphFileError("the file is empty", 1, 1)
    name, blocks = _head(Scanner(first[1], first[0]))
    return Graph(name, tuple(_tasks(numbered, len(blocks))), blocks)


class _Members:
    """The members of a JSON object, each of which is asked for once."""

    def __init__(self, scanner: Scanner, value: Value, what: str) -> None:
        if not isinstance(value.value, dict):
            scanner.fail(f"{what} is an object", value.at)
        self._scanner = scanner
        self._left: dict[str, Value] = dict(value.value)
        self.at = value.at
        self._what = what

    def need(self, key: str) -> Value:
        if key not in self._left:
            self._scanner.fail(f"{self._what} has a member {key!r}", self.at)
        return self._left.pop(key)

    def get(self, key: str) -> Value | None:
        return self._left.pop(key, None)

    def end(self) -> None:
        for key, value in self._left.items():
            self._scanner.fail(f"{self._what} has no member {key!r}", value.at)


def _head(scanner: Scanner) -> tuple[str, tuple[Block, ...]]:
    members = _Members(scanner, parse_json(scanner), "the first line")
    version = members.need(KEY)
    if version.value != VERSION or isinstance(version.value, bool):
        scanner.fail(f"the version of the format is {VERSION}", version.at)
    name = members.get("name")
    blocks = []
    for entry in _list(scanner, members.get("blocks"), "blocks"):
        block = _Members(scanner, entry, "a block")
        size = _integer(scanner, block.need("size"), "size")
        home = _text(scanner, block.get("home"), "home", "cpu")
        blocks.append(scanner.checked(partial(Block, size, home), entry.at))
        block.end()
    members.end()
    said = _text(scanner, name, "name", "graph")
    scanner.checked(
        partial(check_word, "the name of a graph", said), 0 if name is None else name.at
    )
    return said, tuple(blocks)


def _tasks(lines: Iterator[tuple[int, str]], blocks: int) -> Iterator[Task]:
    places: dict[Name, int] = {}
    for number, line in lines:
        scanner = Scanner(line, number)
        members = _Members(scanner, parse_json(scanner), "a task")
        said = members.need("name")
        name = _name(scanner, said)
        if name in places:
            scanner.fail("a task above has that name", said.at)
        needs = tuple(
            _need(scanner, entry) for entry in _list(scanner, members.need("needs"), "needs")
        )
        after = []
        for entry in _list(scanner, members.get("after"), "after"):
            before = places.get(_name(scanner, entry))
            if before is None:
                scanner.fail("there is no task above with that name", entry.at)
            after.append(before)
        used = {
            key: tuple(
                _integer(scanner, entry, "a block")
                for entry in _list(scanner, members.get(key), key)
            )
            for key in ("reads", "writes", "updates")
        }
        kind = _text(scanner, members.get("kind"), "kind", "task")
        priority = members.get("priority")
        task = Task(
            name=name,
            needs=needs,
            after=tuple(after),
            kind=kind,
            priority=0 if priority is None else _integer(scanner, priority, "priority"),
            **used,
        )
        members.end()
        here = len(places)
        scanner.checked(partial(check_task, task, here, blocks), members.at)
        places[name] = here
        yield task


def _need(scanner: Scanner, entry: Value) -> Need:
    members = _Members(scanner, entry, "an alternative")
    on = members.need("on")
    places = tuple(_text(scanner, place, "a place", "") for place in _list(scanner, on, "on"))
    numbers: dict[str, Any] = {"seconds": _number(scanner, members.need("seconds"), "seconds")}
    for key in _FRACTIONS:
        value = members.get(key)
        if value is not None:
            read = _integer if key in ("slices", "memory") else _number
            numbers[key] = read(scanner, value, key)
    members.end()
    return scanner.checked(partial(Need, places, **numbers), entry.at)


def _name(scanner: Scanner, value: Value) -> Name:
    parts = _list(scanner, value, "a name")
    if not parts:
        scanner.fail("a name has one part at least", value.at)
    for index, part in enumerate(parts):
        whole = isinstance(part.value, int) and not isinstance(part.value, bool)
        if not whole and not (index == 0 and isinstance(part.value, str)):
            scanner.fail("a name is whole numbers, before which a word may stand", part.at)
    return tuple(part.value for part in parts)


def _list(scanner: Scanner, value: Value | None, what: str) -> list[Value]:
    if value is None:
        return []
    if not isinstance(value.value, list):
        scanner.fail(f"{what} is a list", value.at)
    found: list[Value] = value.value
    return found


def _integer(scanner: Scanner, value: Value, what: str) -> int:
    if not isinstance(value.value, int) or isinstance(value.value, bool):
        scanner.fail(f"{what} is a whole number", value.at)
    return value.value


def _number(scanner: Scanner, value: Value, what: str) -> float:
    if not isinstance(value.value, int | float) or isinstance(value.value, bool):
        scanner.fail(f"{what} is a number", value.at)
    return float(value.value)


def _text(scanner: Scanner, value: Value | None, what: str, usual: str) -> str:
    if value is None:
        return usual
    if not isinstance(value.value, str):
        scanner.fail(f"{what} is a string", value.at)
    text: str = value.value
    return text
