"""Taskflow's cost of an empty dynamic task, as records: the peer of the Rust core's benchmark.

See ``peer.py`` in the folder above. The headers are looked for where the compiler looks, and in the
folder that ``TASKFLOW_INCLUDE`` or ``--include`` names (the one that contains
``taskflow/taskflow.hpp``).
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from charioteer.bench import records

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import peer  # noqa: E402 (beside the folder of this script)
from peer import BuildError, Missing  # noqa: E402

__all__ = ["BuildError", "Missing", "build", "collect"]

BUILD = peer.OUT / "taskflow"
CASES = {
    "inside": "empty closure, spawned inside a task",
    "outside": "empty closure, spawned from outside",
    "dependent": "empty closure, handles kept, two dependencies",
}


def build(include: str | None) -> Path:
    """Compile the harness and return the program.

    Raises:
        Missing: there is no C++ compiler or no Taskflow header.
        BuildError: the compiler refuses the source.
    """
    command = [peer.compiler("CXX", ("c++", "g++", "clang++"), "C++")]
    command += ["-std=c++20", "-O3", "-DNDEBUG", "-pthread"]
    if include is not None:
        command += ["-isystem", include]
    if not peer.knows([*command, "-x", "c++"], "taskflow/taskflow.hpp"):
        raise Missing("the Taskflow headers are not installed")
    return peer.compile_to(BUILD / "main", [*command, str(HERE / "main.cpp")])


def collect(include: str | None, workers: int, tasks: int, runs: int) -> list[records.Record]:
    """The records of one number of workers; without values where Taskflow is missing.

    Raises:
        BuildError: Taskflow is there, but the harness fails with it.
    """
    return peer.collect("Taskflow", "C++", CASES, partial(build, include), workers, tasks, runs)


if __name__ == "__main__":
    sys.exit(peer.main("Taskflow", "TASKFLOW_INCLUDE", 1_000_000, collect))
