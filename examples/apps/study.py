"""What the applications of this folder gain from the runtime: their records, for ``charioteer
study``.

    python examples/apps/study.py [--quick] [--only NAMES] [--sizes NAMES] [--json FILE]

Every application runs as its serial program, on threads by hand, and on the runtime with one worker
and with two, in turn, round after round. Then, once each, on 1, 2 and 4 virtual GPUs in virtual
time: how long it takes there, what it moves, and how far that is from what no schedule comes below
(``charioteer.bench.simulated`` says how). Every result is checked; one that is wrong is a failure.
Besides there are the lines that a user writes (bodies, and the program that spawns them) and the
tasks of a run.

What a page of memory costs at its first touch is the system's affair, and on a virtual machine the
host's too: up to tens of microseconds for one that was given back a moment ago, and next to nothing
for another. As a program this process keeps what was freed, and warms up by a round, so that no
contestant pays for pages, and BLAS has one thread throughout, since those that helped to check a
result would look for more work on the cores of who comes next.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import functools
import inspect
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any

import advection
import application
import barnes_hut
import batched_cholesky
import block_low_rank
import cholesky
import fft2d
import inference
import jacobi
import kmeans
import lu
import matrix_product
import sample_sort
import scipy.linalg.cython_blas  # noqa: F401 (its BLAS is to be there when threads are limited)
import tsqr
from threadpoolctl import threadpool_limits

import charioteer as ch
from charioteer.bench.command import OptionError, add_outcome_arguments, carry_out, choice, positive
from charioteer.bench.harness import OURS, Bar, Contestant, Key, Measure, Sample, ratio
from charioteer.bench.simulated import simulate

APPS: dict[str, Any] = {
    "Cholesky": cholesky,
    "LU": lu,
    "TSQR": tsqr,
    "Jacobi": jacobi,
    "matrix product": matrix_product,
    "batched Cholesky": batched_cholesky,
    "k-means": kmeans,
    "sample sort": sample_sort,
    "FFT": fft2d,
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
GPUS = (1, 2, 4)
"""Of how many virtual GPUs in virtual time."""


def keep_memory() -> None:
    """Have freed memory stay with the process, for good, where the C library is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: none of the heap is given back


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
    known = ("tiny", "small", "medium", "large")
    parser.add_argument("--sizes", metavar="A,B", help=f"some of {', '.join(known)}")
    add_outcome_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        names = choice("application", options.only, tuple(APPS)) or tuple(APPS)
        usual = known[1:2] if options.quick else known[1:]
        sizes = choice("size", options.sizes, known) or usual
        runs = options.runs or (3 if options.quick else 5)
        # A problem may be large: none is kept beyond its measures.
        given = functools.lru_cache(maxsize=1)(lambda name, size: _problem(APPS[name], size))
        chosen = [
            make(name, size, functools.partial(given, name, size))
            for name in names
            for size in sizes
            for make in (measure, simulated)
        ]
        with threadpool_limits(1):
            return carry_out("applications", chosen, runs, options)
    except OptionError as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2


def _problem(app: application.Application, size: str) -> Any:
    return app.problem(*app.SIZES[size])


def check(app: application.Application, found: Any, given: Any) -> None:
    """See that a result is right.

    Raises:
        ArithmeticError: it is not.
    """
    wrong = app.error(found, given)
    if not wrong <= app.LIMIT:
        raise ArithmeticError(f"the result is wrong: {wrong:.3g} is above {app.LIMIT:g}")


def measure(name: str, size: str, given: Callable[[], Any]) -> Measure:
    """An application at a size, on cores."""
    app: Any = APPS[name]
    case = f"{name}, {size}"

    def alone(program: Callable[[Any], Any]) -> Sample:
        problem = given()
        start = time.perf_counter()
        found = program(problem)
        seconds = time.perf_counter() - start
        check(app, found, problem)
        return Sample({TIME: 1e3 * seconds})

    def ours(workers: int) -> Sample:
        problem = given()
        with ch.Runtime(ch.Machine.virtual(0), workers=workers) as runtime:
            start = time.perf_counter()
            found = app.tasks(problem)
            seconds = time.perf_counter() - start
            spawned = runtime.stats()["spawned"]
        check(app, found, problem)
        return Sample({TIME: 1e3 * seconds, "tasks": spawned})

    params = {"lines": lines(app.CORE)}
    return Measure(
        name=case,
        title=f"{case}: {lines(app.CORE)} lines",
        contestants=[
            Contestant(SERIAL, case, lambda: alone(app.serially), 1),
            *(
                Contestant(OURS, case, functools.partial(ours, workers), workers, params)
                for workers in (1, 2)
            ),
            Contestant(THREADS, case, lambda: alone(lambda problem: app.threads(problem, 2)), 2),
        ],
        units={TIME: "ms", "tasks": ""},
        bars=[
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
        ]
        if size == "large"
        else [],
        note="Every result is checked. BLAS has one thread.",
    )


def simulated(name: str, size: str, given: Callable[[], Any]) -> Measure:
    """An application at a size, on virtual GPUs in virtual time."""
    app: Any = APPS[name]
    case = f"{name}, {size}"

    def run(gpus: int) -> Sample:
        problem = given()
        with application.on_gpus(app):
            run = simulate(lambda: app.tasks(problem, gpus), gpus)
        check(app, run.found, problem)
        return Sample(
            {
                "makespan": 1e3 * run.makespan,
                "moved": run.moved / 1e6,
                "longest chain": 1e3 * run.chain,
                "work / devices": 1e3 * run.work,
                "busiest link": 1e3 * run.link,
                "efficiency": run.bound / run.makespan,
            }
        )

    return Measure(
        name=f"{case}, virtual GPUs",
        title=f"{case}, on virtual GPUs in virtual time",
        contestants=[
            Contestant(
                OURS,
                f"{case}: {gpus} virtual GPU{'s' * (gpus > 1)}",
                functools.partial(run, gpus),
                params={"devices": gpus},
            )
            for gpus in GPUS
        ],
        units={
            "makespan": "ms",
            "moved": "MB",
            "longest chain": "ms",
            "work / devices": "ms",
            "busiest link": "ms",
            "efficiency": "",
        },
        runs=1,
        warmup=0,
        note="From data on the host to a result there. Efficiency is the largest of the three times"
        " before it over the makespan.",
    )


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
