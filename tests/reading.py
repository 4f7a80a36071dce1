"""What must hold of any text that is read as a graph file: for the tests, and for a fuzz target
(``fuzz_graph_files.py``) that looks for a text of which it does not."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from charioteer import graphs
from charioteer.graphs import GraphError, GraphFileError
from charioteer.graphs.files import READERS, WRITERS

__all__ = ["told"]


def told(text: str, format: str | None = None) -> None:
    """Reading ends well, or with an error whose place is in the file; and what was read can be
    written, in each format that can say it, and read again.

    Raises:
        AssertionError: it is not so.
    """
    error = None
    try:
        graph = graphs.loads(text, "", format)
    except GraphFileError as caught:
        error = caught
    if error is not None:
        lines = text.removeprefix("\ufeff").split("\n")
        assert 1 <= error.line <= len(lines)
        assert 1 <= error.column <= len(lines[error.line - 1]) + 1
        assert error.reason
        return
    assert graphs.loads(graphs.dumps(graph)) == graph
    for name in WRITERS:
        try:
            written = graphs.dumps(graph, name)
        except GraphError:
            continue  # The format cannot say it.
        if name in READERS:
            again = graphs.loads(written, "", name)
            assert [task.name for task in again] == [task.name for task in graph]
            assert [task.after for task in again] == [task.after for task in graph]
        elif name == "svg":
            ET.fromstring(written)
