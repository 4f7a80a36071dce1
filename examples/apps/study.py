"""What the applications of this folder gain from the runtime: their records, for ``charioteer
study``.

    python examples/apps/study.py [--quick] [--only NAMES] [--json FILE]

Every application runs as its serial program, on threads by hand where there is such a program, and
on the runtime with one worker and with two, in turn, round after round. Every result is checked;
one that is wrong is a failure. Besides the times there are the lines that a user writes (bodies,
and the program that spawns them), the tasks of a run, and how much of the workers' time the serial
program would fill.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import advection
import barnes_hut
import block_low_rank
import inference
from threadpoolctl import threadpool_limits

import charioteer as ch
from charioteer.bench.command import OptionError, add_outcome_arguments, carry_out, choice, positive
from charioteer.bench.harness import OURS, Bar, Contestant, Key, Measure, Sample, ratio

APPS: dict[str, ModuleType] = {
    "block low-rank": block_low_rank,
    "Barnes-Hut": barnes_hut,
    "advection": advection,
    "inference": inference,
}
SERIAL = "serial program"
THREADS = "threads by hand"
TIME = "time"
PART = 0.92
"""What part of the speed of threads by hand the runtime is to have, for the large size."""


def lines(functions: Sequence[Callable[..., object]]) -> int:
    """Lines of code of these, without decorators, comments and docstrings."""
    count = 0
    for function in functions:
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        assert isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef)
        said = {node.lineno for node in ast.walk(tree) if hasattr(node, "lineno")}
        first = tree.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            said -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
        count += len(said)
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the applications.

    Returns:
        0; 1 if a result was wrong; 2 after a wrong option.
    """
    parser = argparse.ArgumentParser(description="Measure the applications")
    parser.add_argument("--quick", action="store_true", help="small sizes, 3 rounds")
    parser.add_argument("--runs", type=positive, metavar="N", help="counted rounds (default: 5)")
    parser.add_argument("--only", metavar="A,B", help=f"some of {', '.join(APPS)}")
    parser.add_argument("--sizes", metavar="A,B", help="small, medium or large (default: all)")
    add_outcome_arguments(parser)
    options = parser.parse_args(arguments)
    known = ("small", "medium", "large")
    try:
        names = choice("application", options.only, tuple(APPS)) or tuple(APPS)
        sizes = choice("size", options.sizes, known) or (("small",) if options.quick else known)
        runs = options.runs or (3 if options.quick else 5)
        chosen = [measure(name, size) for name in names for size in sizes]
        return carry_out("applications", chosen, runs, options)
    except OptionError as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2


def measure(name: str, size: str) -> Measure:
    """An application at a size."""
    app: Any = APPS[name]
    case = f"{name}, {size}"
    given = functools.cache(lambda: app.problem(*app.SIZES[size]))

    def checked(found: Any, seconds: float) -> dict[str, float]:
        wrong = app.error(found, given())
        if not wrong <= app.LIMIT:
            raise ArithmeticError(f"the result is wrong: {wrong:.3g} is above {app.LIMIT:g}")
        return {TIME: 1e3 * seconds}

    def serial() -> Sample:
        problem = given()
        with threadpool_limits(1):
            start = time.perf_counter()
            found = app.serially(problem)
            return Sample(checked(found, time.perf_counter() - start))

    def by_hand(workers: int) -> Sample:
        problem = given()
        with threadpool_limits(1):
            start = time.perf_counter()
            found = app.threads(problem, workers)
            return Sample(checked(found, time.perf_counter() - start))

    def ours(workers: int) -> Sample:
        problem = given()
        with ch.Runtime(workers=workers) as runtime:
            start = time.perf_counter()
            found = app.tasks(problem)
            seconds = time.perf_counter() - start
            spawned = runtime.stats()["spawned"]
        return Sample({**checked(found, seconds), "tasks": spawned})

    contestants = [Contestant(SERIAL, case, serial, 1)]
    bars = []
    for workers in (1, 2):
        contestants.append(
            Contestant(
                OURS, case, functools.partial(ours, workers), workers, {"lines": lines(app.CORE)}
            )
        )
    if hasattr(app, "threads"):
        contestants.append(Contestant(THREADS, case, functools.partial(by_hand, 2), 2))
        if size == "large":
            bars.append(
                Bar(
                    case=case,
                    workers=2,
                    metric=f"speed over {THREADS}",
                    unit="x",
                    values=ratio(Key(THREADS, case, 2), Key(OURS, case, 2), TIME),
                    limit=PART,
                    at_least=True,
                    lacking=f"{OURS} and {THREADS}",
                )
            )
    return Measure(
        name=case,
        title=f"{name}, {size}: {lines(app.CORE)} lines",
        contestants=contestants,
        units={TIME: "ms", "tasks": ""},
        bars=bars,
        note="Every result is checked. BLAS has one thread.",
    )


if __name__ == "__main__":
    sys.exit(main())
