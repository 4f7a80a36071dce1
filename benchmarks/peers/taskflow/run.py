"""Taskflow's cost of an empty dynamic task, as records: the peer of the Rust core's benchmark.

Builds ``main.cpp`` beside this file with the C++ compiler and the Taskflow headers that are
installed, runs it, and prints a JSON list of records to standard output or to ``--json FILE``.
Nothing is downloaded. Where the compiler or the headers are missing, the records say so, and the
exit status is 0 all the same: a peer that is not there is a result.

The headers are looked for where the compiler looks, and in the folder that ``TASKFLOW_INCLUDE``
or ``--include`` names (the one that contains ``taskflow/taskflow.hpp``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from charioteer.bench import records

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent.parent / "out" / "taskflow"
CASES = {
    "inside": "empty closure, spawned inside a task",
    "outside": "empty closure, spawned from outside",
    "dependent": "empty closure, handles kept, two dependencies",
}


class Missing(Exception):
    """The compiler or the headers are not installed; the message says which."""


class BuildError(Exception):
    """The headers are there, but the harness does not compile or run against them."""


def build(include: str | None) -> Path:
    """Compile the harness and return the program.

    Raises:
        Missing: there is no C++ compiler or no Taskflow header.
        BuildError: the compiler refuses the source.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise Missing("no C++ compiler is installed")
    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-pthread"]
    if include is not None:
        flags += ["-isystem", include]
    probe = subprocess.run(
        [compiler, *flags, "-E", "-x", "c++", "-"],
        input="#include <taskflow/taskflow.hpp>\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode != 0:
        raise Missing("the Taskflow headers are not installed")
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / "main"
    done = subprocess.run(
        [compiler, *flags, str(HERE / "main.cpp"), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BuildError(done.stderr.strip())
    return program


def measure(program: Path, workers: int, tasks: int, runs: int) -> dict[str, Any]:
    """Run the harness and return what it printed.

    Raises:
        BuildError: it failed.
    """
    done = subprocess.run(
        [str(program), str(workers), str(tasks), str(runs)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BuildError(done.stderr.strip() or f"exit status {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def collect(include: str | None, workers: int, tasks: int, runs: int) -> list[records.Record]:
    """The records of one number of workers; without values where Taskflow is missing.

    Raises:
        BuildError: Taskflow is there, but the harness fails with it.
    """
    params: dict[str, Any] = {"workers": workers, "tasks": tasks}
    try:
        answer = measure(build(include), workers, tasks, runs)
        params["version"] = answer["version"]
    except Missing as reason:
        answer = {}
        params["missing"] = str(reason)
    return [
        records.record(
            "core",
            "Taskflow",
            case,
            params,
            "time per task",
            "µs",
            [1e-3 * value for value in answer.get(key, [])],
            python="none: C++",
        )
        for key, case in CASES.items()
    ]


def main() -> int:
    """Parse the options, measure, and print or write the records."""
    parser = argparse.ArgumentParser(
        description="Measure Taskflow's empty dynamic tasks, if Taskflow is installed."
    )
    parser.add_argument("--workers", type=int, default=2, help="worker threads (default: 2)")
    parser.add_argument("--tasks", type=int, default=1_000_000, help="tasks a run (default: 1e6)")
    parser.add_argument("--runs", type=int, default=5, help="counted runs (default: 5)")
    parser.add_argument("--include", metavar="DIR", default=os.environ.get("TASKFLOW_INCLUDE"))
    parser.add_argument("--json", metavar="FILE", help="write to FILE, not to standard output")
    options = parser.parse_args()
    if min(options.workers, options.tasks, options.runs) < 1:
        parser.error("--workers, --tasks and --runs must be 1 or more")
    try:
        entries = collect(options.include, options.workers, options.tasks, options.runs)
    except BuildError as error:
        print(f"the Taskflow harness failed:\n{error}", file=sys.stderr)
        return 1
    if options.json is not None:
        records.write_json(options.json, entries)
    else:
        print(json.dumps([asdict(entry) for entry in entries], indent=1))
    for entry in entries:
        told = (
            f"missing: {entry.params['missing']}"
            if entry.median is None
            else f"{entry.median:.3f} µs a task"
        )
        print(f"Taskflow, {entry.case}: {told}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
