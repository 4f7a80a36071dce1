"""What the harnesses of peers in C and C++ have in common: how one is run, and its records.

A harness is a program that is built from the source beside its ``run.py`` with the compiler and the
headers that are installed; nothing is downloaded. It prints one JSON object: the peer's version,
and the nanoseconds a task of each run for each case. Where the compiler or the headers are missing,
the records say so, and the exit status is 0 all the same: a peer that is not there is a result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from charioteer.bench import records

OUT = Path(__file__).resolve().parent.parent / "out"


class Missing(Exception):
    """The compiler or the headers are not installed; the message says which."""


class BuildError(Exception):
    """The headers are there, but the harness does not compile or run against them."""


def compiler(variable: str, names: Sequence[str], language: str) -> str:
    """The compiler that the environment variable names, or the first that is installed.

    Raises:
        Missing: there is none.
    """
    found = os.environ.get(variable) or next(filter(shutil.which, names), None)
    if found is None:
        raise Missing(f"no {language} compiler is installed")
    return found


def knows(command: Sequence[str], header: str) -> bool:
    """Whether a compiler, called so, finds a header."""
    done = subprocess.run(
        [*command, "-E", "-"],
        input=f"#include <{header}>\n",
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0


def compile_to(program: Path, command: Sequence[str]) -> Path:
    """Run a compiler that makes this program.

    Raises:
        BuildError: it refuses the source.
    """
    program.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [*command, "-o", str(program)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BuildError(done.stderr.strip())
    return program


def measure(program: Path, workers: int, tasks: int, runs: int) -> dict[str, Any]:
    """Run a harness and return what it printed.

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
    # Libraries may have said something before.
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def collect(
    name: str,
    language: str,
    cases: Mapping[str, str],
    build: Callable[[], Path],
    workers: int,
    tasks: int,
    runs: int,
) -> list[records.Record]:
    """The records of one number of workers; without values where the peer is missing.

    Raises:
        BuildError: the peer is there, but the harness fails with it.
    """
    params: dict[str, Any] = {"workers": workers, "tasks": tasks}
    try:
        answer = measure(build(), workers, tasks, runs)
        params["version"] = answer["version"]
    except Missing as reason:
        answer = {}
        params["missing"] = str(reason)
    return [
        records.record(
            "core",
            name,
            case,
            params,
            "time per task",
            "µs",
            [1e-3 * value for value in answer.get(key, [])],
            python=f"none: {language}",
        )
        for key, case in cases.items()
    ]


def main(
    name: str,
    include: str,
    tasks: int,
    collected: Callable[[str | None, int, int, int], list[records.Record]],
) -> int:
    """Parse the options, measure, and print or write the records.

    Args:
        name: the peer's name.
        include: the environment variable that may name the folder of its headers.
        tasks: how many a run has, unless said.
        collected: the records, of a folder of headers, workers, tasks and runs.
    """
    parser = argparse.ArgumentParser(
        description=f"Measure {name}'s empty tasks, if {name} is installed."
    )
    parser.add_argument("--workers", type=int, default=2, help="worker threads (default: 2)")
    parser.add_argument(
        "--tasks", type=int, default=tasks, help=f"tasks a run (default: {tasks:,})"
    )
    parser.add_argument("--runs", type=int, default=5, help="counted runs (default: 5)")
    parser.add_argument("--include", metavar="DIR", default=os.environ.get(include))
    parser.add_argument("--json", metavar="FILE", help="write to FILE, not to standard output")
    options = parser.parse_args()
    if min(options.workers, options.tasks, options.runs) < 1:
        parser.error("--workers, --tasks and --runs must be 1 or more")
    try:
        entries = collected(options.include, options.workers, options.tasks, options.runs)
    except BuildError as error:
        print(f"the {name} harness failed:\n{error}", file=sys.stderr)
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
        print(f"{name}, {entry.case}: {told}", file=sys.stderr)
    return 0
