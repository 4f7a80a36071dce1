"""Graph files: which format a file has, and reading and writing whole files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from charioteer.graphs import drawing, jsonl, parla
from charioteer.graphs.description import Graph, GraphError
from charioteer.graphs.scanning import GraphFileError

__all__ = ["READERS", "WRITERS", "dumps", "loads", "read", "write"]

READERS: Mapping[str, Callable[[Sequence[str]], Graph]] = {
    "jsonl": jsonl.load,
    "gph": parla.load_older,
    "pgraph": parla.load_newer,
}
"""How each format is read, from the lines of a file."""

WRITERS: Mapping[str, Callable[[Graph], str]] = {
    "jsonl": jsonl.dump,
    "gph": parla.dump_older,
    "pgraph": parla.dump_newer,
    "dot": drawing.dot,
    "svg": drawing.svg,
}
"""What each format makes of a graph. The last two are for people."""


def loads(text: str, name: str = "", format: str | None = None) -> Graph:
    """The graph in the text of a file.

    Args:
        text: the whole file.
        name: what complaints call it.
        format: of :data:`READERS`; found out from the first line unless said.

    Raises:
        GraphFileError: it cannot be read; says line and column.
    """
    lines = [line.rstrip("\r") for line in text.removeprefix("\ufeff").split("\n")]
    try:
        return READERS[format or _format(lines)](lines)
    except GraphFileError as error:
        if not name:
            raise
        raise GraphFileError(error.reason, error.line, error.column, name) from None


def _format(lines: Sequence[str]) -> str:
    first = next((line.strip() for line in lines if line.strip()), "")
    if first.startswith("(") or (first.startswith("{") and first[1:].lstrip()[:1].isdigit()):
        return "pgraph"
    return "jsonl" if first.startswith("{") else "gph"


def dumps(graph: Graph, format: str = "jsonl") -> str:
    """The text of a file with that graph.

    Raises:
        GraphError: there is no such format, or it cannot say what the graph has.
    """
    if format not in WRITERS:
        raise GraphError(f"there is no format {format!r}; known: {', '.join(WRITERS)}")
    return WRITERS[format](graph)


def read(path: str | os.PathLike[str], format: str | None = None) -> Graph:
    """The graph in a file.

    Raises:
        GraphFileError: it cannot be read as one; says file, line and column.
        OSError: it cannot be read at all.
    """
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line = before.count(b"\n") + 1
        column = len(before.rpartition(b"\n")[2].decode("utf-8")) + 1
        raise GraphFileError("this is no UTF-8", line, column, os.fspath(path)) from None
    return loads(text, os.fspath(path), format)


def write(graph: Graph, path: str | os.PathLike[str], format: str | None = None) -> None:
    """Write a graph to a file.

    Args:
        graph: what.
        path: where.
        format: of :data:`WRITERS`; that of the path's suffix unless said, else ``jsonl``.

    Raises:
        GraphError: the format cannot say what the graph has.
        OSError: the file cannot be written.
    """
    suffix = Path(path).suffix.removeprefix(".")
    text = dumps(graph, format or (suffix if suffix in WRITERS else "jsonl"))
    Path(path).write_text(text, encoding="utf-8")
