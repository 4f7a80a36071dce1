"""Do the examples of the documentation run?"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.surface

ROOT = Path(__file__).parents[1]
LIMIT = 60
"""Seconds that an example may take, on a machine that is busy with other tests."""

Example = tuple[str, str]


def examples(name: str) -> list[Example]:
    """The examples of a document: where each begins, and its program."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        found.append((f"{name}:{line}", match[1]))
    return found


def libraries(name: str) -> list[tuple[str, str]]:
    """The examples in Rust of a document: the name of the function and library, and the source."""
    text = (ROOT / name).read_text(encoding="utf-8")
    sources = re.findall(r"^```rust\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(re.findall(r"fn (\w+)", source)[0], source) for source in sources]


LIBRARIES = libraries("docs/guide.md")
EXAMPLES = [*examples("README.md"), *examples("docs/guide.md"), *examples("docs/graphs.md")]


def build(path: Path, source: str) -> None:
    """Make the library of an example in Rust beside it."""
    if shutil.which("rustc") is None:
        pytest.skip("rustc is not on PATH")
    path.write_text(source, encoding="utf-8")
    command = ["rustc", "--edition", "2024", "--crate-type", "cdylib", path.name]
    subprocess.run(command, cwd=path.parent, check=True, timeout=LIMIT)


def test_there_are_examples() -> None:
    assert [name for name, _ in LIBRARIES] == ["total"]
    assert any("libtotal.so" in program for _, program in EXAMPLES)
    assert len(EXAMPLES) >= 10
    documents = {where.partition(":")[0] for where, _ in EXAMPLES}
    assert documents == {"README.md", "docs/guide.md", "docs/graphs.md"}


@pytest.mark.timeout(LIMIT + 30)
@pytest.mark.parametrize(("where", "program"), EXAMPLES, ids=[where for where, _ in EXAMPLES])
def test_an_example_runs(where: str, program: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(program, encoding="utf-8")
    for name, source in LIBRARIES:
        if f"lib{name}.so" in program:
            build(tmp_path / f"{name}.rs", source)
    ran = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=tmp_path,
        timeout=LIMIT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, f"{where}\n{ran.stdout}{ran.stderr}"
    assert not ran.stderr, f"{where}\n{ran.stderr}"
