"""What importing the package costs: only what every program needs.

A program that only imports it, as the command line of another tool may, should not wait for event
loops, progress bars or the search for BLAS.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import charioteer as ch

pytestmark = pytest.mark.surface

LATER = [
    "asyncio",
    "concurrent.futures.process",
    "concurrent.futures.thread",
    "ctypes",
    "inspect",
    "multiprocessing",
    "numpy",
    "rich",
    "threadpoolctl",
    "yaml",
]
"""``logging`` is not among them: ``concurrent.futures``, whose errors ours are, imports it."""


def loaded(code: str) -> set[str]:
    """The modules that are there after the code ran in a process of its own."""
    # Without `site`, whose .pth files may import anything.
    path = [str(Path(ch.__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {path!r}; {code}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_brings_only_what_is_needed() -> None:
    modules = loaded("import charioteer")
    assert "charioteer._core" in modules
    assert modules.isdisjoint(LATER), sorted(modules.intersection(LATER))


def test_running_plain_tasks_needs_no_event_loop() -> None:
    modules = loaded(
        "import charioteer as ch; rt = ch.Runtime(workers=2).open(); rt.submit(int); rt.close()"
    )
    assert modules.isdisjoint(["asyncio", "rich", "threadpoolctl"])


@pytest.mark.parametrize("value", [ch.cpu, ch.cpu * 2, ch.cpu.all, ch.Device(ch.cpu, 1)], ids=repr)
def test_devices_are_values(value: Any) -> None:
    for again in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert again == value and hash(again) == hash(value) and repr(again) == repr(value)
    assert value != (ch.cpu * 3) and value != 1
    for change in (lambda: setattr(value, "kind", 1), lambda: delattr(value, "kind")):
        with pytest.raises(AttributeError, match="does not change"):
            change()
