"""A fuzz target: texts that are read as graph files, of which :func:`reading.told` must hold.

Atheris (libFuzzer for Python) instruments the readers when they are imported, so that it sees which
of their branches an input reaches, and what they compare its words with. The first byte of an input
chooses the format, the others are the text. It begins with small files of each format, which it
writes itself, and of two mutations one is of bytes and one of words: these are doubled, left out,
put elsewhere, or changed into one of those below, so that what comes of a file is nearly one::

    make fuzz FUZZ_SECONDS=600
    python tests/fuzz_graph_files.py CORPUS [options of libFuzzer]

An input that breaks the rule is left in a file ``crash-...``; with that file as the only argument
it is run again. What is found becomes a test in ``test_graph_files.py``.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["charioteer.graphs"]):
    from charioteer import graphs
    from charioteer.graphs.files import READERS

from reading import told

FORMATS = (None, *sorted(READERS))
"""What the first byte of an input chooses from; none: the text says it."""


def once(data: bytes) -> None:
    """One input."""
    if data:
        told(data[1:].decode("utf-8", "replace"), FORMATS[data[0] % len(FORMATS)])


PARTS = re.compile(rb"\w+|.", re.DOTALL)
WORDS = (
    *(b"0", b"1", b"2", b"-1", b"-2", b"0.5", b"1e-9", b"1e400", b"1000000", b"999999999999999999"),
    *(bytes([byte]) for byte in b"{}[]()|:, \n\r\t\"'"),
    *(b"true", b"null", b'"after": [[0, 0]]', b'"updates": [0]', b'"gpu(0)"', b'"cpu"', b"'A'"),
    *("\ufeff".encode(), "\u0663".encode(), "\u2028".encode(), b"\\ud800", b"\\u0000"),
)
"""What a text of a graph is made of, and what is nearly that."""


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Another input that is much like that one, of so many bytes at most."""
    chance = random.Random(seed)
    if chance.random() < 0.5:
        mutated: bytes = atheris.Mutate(data, most)
        return mutated
    parts = PARTS.findall(data)
    for _ in range(chance.randint(1, 4)):
        at, other = chance.randint(0, len(parts)), chance.randint(0, len(parts))
        some = parts[other : other + chance.randint(0, 12)]
        parts[at : at + chance.choice((0, 0, 1, len(some)))] = chance.choice(
            (some, [], [chance.choice(WORDS)])
        )
    return b"".join(parts)[:most]


def seed(corpus: Path) -> None:
    """Write small files of each format into a folder, as inputs."""
    corpus.mkdir(parents=True, exist_ok=True)
    shape = graphs.sized("reduction", 3, 2)
    plain = graphs.describe(shape, on=["cpu", "gpu"], size=8, held=0.5, slices=2)
    sets = graphs.describe(shape, on=["gpu(1)+gpu|cpu", "gpu*2"], size=8, share=0.5, memory=64)
    files = [(plain, "jsonl"), (plain, "gph"), (plain, "pgraph"), (sets, "jsonl"), (sets, "pgraph")]
    for number, (graph, format) in enumerate(files):
        text = graphs.dumps(graph, format).encode()
        for choice in (0, FORMATS.index(format)):
            path = corpus / f"seed-{number}-{choice}"
            path.write_bytes(str(choice).encode() + text)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] and not sys.argv[1].startswith("-") else None
    if folder is not None and not folder.is_file():
        seed(folder)
    atheris.Setup(sys.argv, once, custom_mutator=mutate)
    atheris.Fuzz()
