"""What must hold of any text that is read as a graph file, and a fuzz target that looks for one of
which it does not.

The first byte of an input chooses the format, the others are the text, so that inputs stay
readable. The target is guided by the coverage of the readers: Atheris (libFuzzer for Python)
instruments them when they are imported, and their regular expressions and comparisons of strings.
It begins with small files of each format, which it writes itself::

    python tests/fuzz/graph_files.py CORPUS [options of libFuzzer, such as -max_total_time=60]

What it finds is written to a file ``crash-...``, which can be given instead of options to see it
again. Found inputs become tests in ``test_graph_files.py``.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

if __name__ == "__main__":
    import atheris

    atheris.enabled_hooks.add("RegEx")
    atheris.enabled_hooks.add("str")
    with atheris.instrument_imports(include=["charioteer.graphs"]):
        import charioteer.graphs.files

from charioteer import graphs
from charioteer.graphs import Graph, GraphError, GraphFileError
from charioteer.graphs.files import READERS, WRITERS

__all__ = ["told"]

FORMATS = (None, *sorted(READERS))
"""What the first byte of an input chooses from; none: found out from the text."""


def told(text: str, format: str | None = None) -> None:
    """Reading ends well, or with an error whose place is in the file. What was read can be written.

    Raises:
        AssertionError: it is not so.
    """
    try:
        graph = graphs.loads(text, "", format)
    except GraphFileError as error:
        lines = text.removeprefix("\ufeff").split("\n")
        assert 1 <= error.line <= len(lines), error
        assert 1 <= error.column <= len(lines[error.line - 1]) + 1, error
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


def one(data: bytes) -> None:
    """The fuzz target."""
    if data:
        told(data[1:].decode("utf-8", "replace"), FORMATS[data[0] % len(FORMATS)])


def seed(corpus: Path) -> None:
    """Write small files of each format into a folder, as inputs of the target."""
    corpus.mkdir(parents=True, exist_ok=True)
    shape = graphs.sized("reduction", 8, 4)
    plain = graphs.describe(shape, on=["cpu", "gpu"], size=8, held=0.5, slices=2)
    sets = graphs.describe(shape, on=["gpu(1)+gpu|cpu", "gpu*2"], size=8, share=0.5, memory=64)
    files: list[tuple[str, Graph]] = [
        ("jsonl", plain),
        ("gph", plain),
        ("pgraph", plain),
        ("jsonl", sets),
        ("pgraph", sets),
    ]
    for number, (format, graph) in enumerate(files):
        text = graphs.dumps(graph, format).encode()
        for choice in (0, FORMATS.index(format)):
            (corpus / f"seed-{number}-{choice}").write_bytes(b"%d" % choice + text)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-") and not Path(sys.argv[1]).is_file():
        seed(Path(sys.argv[1]))
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
