"""Runs of the demonstration: what is timed, what is checked, what is printed.

A round makes one run of each kind, so that drift of the machine falls on all of them alike:

* ``serial``: the plain loops, BLAS at one thread. Its time is the work there is to spread.
* ``one``: the task graph on one worker (with ``--compare``).
* ``graph``: the task graph on all workers. The clock runs from the first spawn to the last result.
* ``other``: the same with bodies of the other kind (with ``--compare``): those of the factorization
  are called by Python, or are native tasks.
* ``empty``: the same graph with kernels that do nothing, which is what the tasks themselves cost.

Ratios are formed within a round, and medians are shown. The first round warms up and does not
count. Every graph run is checked: its factor against ``scipy.linalg.cho_factor`` on the same
matrix, its weights and labels against those of the serial run.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from threadpoolctl import threadpool_limits

import charioteer as ch
from charioteer import cpu, gpu
from charioteer.bench import records

from . import gp, kernels, serial

__all__ = ["Report", "measure", "run"]

LIMIT = 1e-10
"""The largest relative error that passes: the matrices here have condition numbers up to 1e7."""

Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]
Tick = Callable[[float], None]
Bodies = Literal["python", "native"]

_OTHER: dict[Bodies, Bodies] = {"python": "native", "native": "python"}

_EMPTY = SimpleNamespace(**{name: lambda *_: None for name in kernels.__all__})


@dataclass
class Report:
    """What the rounds gave: times in seconds, a value a round, and the checks over all of them.

    ``accuracy`` is None where there is nothing to predict. ``factor_error`` and ``weights_error``
    are relative, in the Frobenius norm, the largest of all runs. ``one`` and ``other`` are empty
    unless asked for.
    """

    n: int
    tile: int
    workers: int
    bodies: Bodies = "python"
    tasks: int = 0
    serial: list[float] = field(default_factory=list)
    one: list[float] = field(default_factory=list)
    graph: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    empty: list[float] = field(default_factory=list)
    accuracy: float | None = None
    factor_error: float = 0.0
    weights_error: float = 0.0
    labels_equal: bool = True

    @property
    def efficiency(self) -> list[float]:
        """Serial time over the workers' time, round by round."""
        return [
            s / (g * max(self.workers, 1)) for s, g in zip(self.serial, self.graph, strict=True)
        ]

    @property
    def overhead(self) -> list[float]:
        """Seconds a task of the graph costs when its kernel does nothing, round by round."""
        return [e / self.tasks for e in self.empty]

    @property
    def speedup(self) -> list[float]:
        """The makespan on one worker over that on all, round by round; empty unless asked for."""
        return [o / g for o, g in zip(self.one, self.graph, strict=True)] if self.one else []

    @property
    def native_gain(self) -> list[float]:
        """The makespan with bodies in Python over that with native ones; empty unless asked for."""
        native, python = self.graph, self.other
        if self.bodies == "python":
            native, python = python, native
        return [p / n for p, n in zip(python, native, strict=True)] if self.other else []

    def worst(self, name: str, error: float) -> None:
        """Keep ``error`` under ``name`` if it is larger than what is there, or not a number."""
        setattr(self, name, float(np.maximum(getattr(self, name), error)))

    @property
    def passed(self) -> bool:
        """Whether every run gave the right result."""
        # Not "error > LIMIT": that would let a nan through.
        return self.factor_error <= LIMIT and self.weights_error <= LIMIT and self.labels_equal


def measure(
    problem: gp.Problem,
    tile: int,
    *,
    workers: int | None = None,
    runs: int = 5,
    compare: bool = False,
    factor_only: bool = False,
    bodies: Bodies = "python",
    machine: ch.Machine | None = None,
    tick: Tick = lambda _: None,
) -> Report:
    """Run the job in rounds and check every run.

    Args:
        problem: what to fit.
        tile: rows and columns of a tile.
        workers: as for :class:`charioteer.Runtime`.
        runs: rounds that count; one more warms up.
        compare: whether to run on one worker too, and with the other kind of bodies.
        factor_only: whether to time and run the factorization alone.
        bodies: whether the tasks of the factorization call their kernel in Python or are native.
        machine: on whose GPUs the tasks of the factorization may run as well, if their bodies are
            in Python; unless said, all run on cores.
        tick: called now and then with the part that is done, from 0 to 1.

    Raises:
        ValueError: ``tile`` or ``runs`` is not positive.
    """
    if runs < 1:
        raise ValueError(f"the number of runs must be positive, not {runs}")
    work = gp.Workspace(problem, tile)
    reference = _reference(work)
    report = Report(len(problem.points), tile, _workers(workers), bodies)
    kinds = ["serial", "graph", "empty"]
    if compare:
        kinds[1:2] = ["one", "graph", "other"]
    expected_weights, expected_labels = np.empty((0, 0)), np.empty(0, np.intp)

    steps = len(kinds) * (runs + 1)
    for step in range(steps):
        number, kind = step // len(kinds), kinds[step % len(kinds)]
        # Garbage of the run before must not be collected on this one's time, and its results must
        # not pass for this one's.
        gc.collect()
        work.clear()

        def within(part: float, step: int = step) -> None:
            tick((step + part) / steps)

        within(0.0)
        if kind == "serial":
            seconds, expected_labels = _serial(work, factor_only)
            expected_weights = work.solution()
        elif kind == "empty":
            hollow: Bodies | Literal["empty"] = "empty" if bodies == "native" else "python"
            seconds, _, _ = _graph(work, report.workers, machine, factor_only, _EMPTY, hollow)
        else:
            taking = 1 if kind == "one" else report.workers
            which = _OTHER[bodies] if kind == "other" else bodies
            seconds, labels, report.tasks = _graph(
                work, taking, machine, factor_only, kernels, which, within
            )
            report.worst("factor_error", _factor_error(work, reference))
            if not factor_only:
                error = _relative_error(work.solution(), expected_weights)
                report.worst("weights_error", error)
                report.labels_equal &= bool(np.array_equal(labels, expected_labels))
                if len(labels):
                    report.accuracy = float(np.mean(labels == problem.test_labels))
        if number:
            getattr(report, kind).append(seconds)
    tick(1.0)
    return report


def _workers(asked: int | None) -> int:
    with ch.Runtime(workers=asked) as runtime:
        return runtime.workers


def _reference(work: gp.Workspace) -> Matrix:
    """The lower factor by SciPy of the very matrix that the kernels build."""
    serial.build(work)
    # The transpose is in Fortran order, which spares SciPy a copy: its upper factor is our lower.
    upper, _ = scipy.linalg.cho_factor(work.lower().T, lower=False, overwrite_a=True)
    return np.asarray(upper.T, dtype=np.float64)


def _factor_error(work: gp.Workspace, reference: Matrix) -> float:
    """The relative error of the factor in the workspace, tile by tile to spare memory."""
    difference = size = 0.0
    for i, rows in enumerate(work.rows):
        for j, columns in enumerate(work.rows[: i + 1]):
            wanted, got = reference[rows, columns], work.matrix[i][j]
            if i == j:
                wanted, got = np.tril(wanted), np.tril(got)
            difference += float(np.sum((got - wanted) ** 2))
            size += float(np.sum(wanted**2))
    return float(np.sqrt(difference / size))


def _relative_error(got: Matrix, wanted: Matrix) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def _serial(work: gp.Workspace, factor_only: bool) -> tuple[float, Labels]:
    if not factor_only:
        return serial.run(work)
    serial.build(work)
    with threadpool_limits(1, user_api="blas"):
        start = time.perf_counter()
        serial.cholesky(work)
        return time.perf_counter() - start, np.empty(0, np.intp)


def _graph(
    work: gp.Workspace,
    workers: int,
    machine: ch.Machine | None,
    factor_only: bool,
    op: Any,
    bodies: Bodies | Literal["empty"],
    tick: Tick = lambda _: None,
) -> tuple[float, Labels, int]:
    """One run of the graph: its makespan, the labels and the number of tasks."""
    spaces, steps = gp.Spaces(), len(work.matrix)
    placement = [gpu, cpu] if machine is not None else cpu
    with ch.Runtime(machine, workers=workers):
        if factor_only:
            gp.spawn_kernel(work, spaces, op)
            spaces.kernel.result()
            built = len(spaces)
            start = time.perf_counter()
            if bodies == "python":
                gp.spawn_cholesky(work, spaces, op, placement)
            else:
                gp.spawn_cholesky_native(work, spaces, empty=bodies == "empty")
            last = spaces.potrf[steps - 1]
            answers = spaces.classify[:0]
        else:
            built = 0
            start = time.perf_counter()
            answers = gp.spawn_graph(work, spaces, op, bodies, placement)
            last = spaces.backward[0]
        if op is kernels:
            # Three quarters of the work that is left when half of the columns are done are done.
            for k in range(steps):
                spaces.potrf[k].result()
                tick(1.0 - (1.0 - k / steps) ** 3)
        last.result()
        labels = answers.result()
        seconds = time.perf_counter() - start
        tasks = len(spaces) - built
    return seconds, np.concatenate(labels) if labels else np.empty(0, np.intp), tasks


def run(argv: Sequence[str]) -> int:
    """Parse ``argv``, measure, print; the exit status is that of :func:`charioteer.demo.main`."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.json is not None and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"cannot write {options.json}: there is no such directory")
    if options.size is None:
        problem = gp.digits()
    else:
        _check_memory(parser, options.size)
        problem = gp.synthetic(options.size)
    tile = options.tile or (128 if options.size is None else 256)
    machine = None
    if options.machine is not None:
        try:
            machine = ch.Machine.load(options.machine)
        except ch.MachineError as error:
            parser.error(str(error))
    with _progress() as tick:
        report = measure(
            problem,
            tile,
            workers=options.workers,
            runs=options.runs,
            compare=options.compare,
            factor_only=options.factor_only,
            bodies=options.bodies,
            machine=machine,
            tick=tick,
        )
    _print(report, problem, options.factor_only)
    if options.json is not None:
        records.write_json(options.json, _records(report, problem, options.factor_only))
    return 0 if report.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="charioteer demo",
        description="Gaussian-process classification as one task graph: kernel matrix, tiled "
        "Cholesky factorization, solve and prediction. It is measured, and checked against SciPy "
        "and against a serial run; the exit status is 1 when a check fails.",
    )
    parser.add_argument(
        "--size",
        type=_positive,
        metavar="N",
        help="a synthetic symmetric positive definite matrix of N x N instead of the digits",
    )
    parser.add_argument(
        "--tile",
        type=_positive,
        metavar="B",
        help="rows and columns of a tile (default: 128 for the digits, 256 with --size)",
    )
    parser.add_argument(
        "--workers",
        type=_natural,
        metavar="W",
        help="workers (default: CHARIOTEER_WORKERS, else the usable cores; 0 runs tasks inline)",
    )
    parser.add_argument(
        "--runs", type=_positive, default=5, metavar="R", help="rounds that count (default: 5)"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="run on one worker too, and with the other kind of bodies, and print the ratios",
    )
    parser.add_argument(
        "--bodies",
        choices=list(_OTHER),
        default="python",
        help="whether the tasks of the factorization call their kernel in Python, or are native "
        "tasks, which need no GIL (default: python)",
    )
    parser.add_argument(
        "--factor-only",
        action="store_true",
        help="time the Cholesky factorization alone; the matrix is built before the clock starts",
    )
    parser.add_argument(
        "--machine",
        metavar="M",
        help="let the factorization run on GPUs too: virtual:4, or the file of a machine",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results as records to FILE")
    return parser


def _positive(text: str) -> int:
    value = _natural(text)
    if not value:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _natural(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def _check_memory(parser: argparse.ArgumentParser, n: int) -> None:
    """Refuse what cannot fit: memory is promised freely, and taken back by killing the process."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # The lower tiles, and the whole of the reference.
    needed = 8 * n * n * 3 // 2
    if needed > memory:
        parser.error(
            f"--size {n} needs {needed / 2**30:,.0f} GiB of memory; "
            f"this machine has {memory / 2**30:,.0f}"
        )


@contextmanager
def _progress() -> Iterator[Tick]:
    """A progress bar on standard error, if that is a terminal, as a function of the part done.

    It is drawn by whoever calls, never by a thread of its own, which would take the GIL from the
    tasks that are being timed; and at most four times a second.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        auto_refresh=False,
    )
    drawn = 0.0

    def tick(part: float) -> None:
        nonlocal drawn
        now = time.monotonic()
        if now - drawn >= 0.25:
            drawn = now
            bar.update(step, completed=part, refresh=True)

    with bar:
        step = bar.add_task("measuring", total=1.0)
        yield tick


def _print(report: Report, problem: gp.Problem, factor_only: bool) -> None:
    median = statistics.median
    data = {
        "digits": f"handwritten digits: {report.n:,} to fit, {len(problem.test_labels):,} held out",
        "synthetic": f"{report.n:,} random points",
    }[problem.name]
    table = Table(
        title="Tiled Cholesky factorization"
        if factor_only
        else "Gaussian-process classification, one task graph",
        show_header=False,
        title_justify="left",
    )
    table.add_column()
    table.add_column(justify="left")

    def row(name: str, value: str, note: str = "") -> None:
        table.add_row(name, f"{value}  [dim]{note}[/dim]" if note else value)

    row("data", data)
    row("matrix", f"{report.n:,} x {report.n:,}, tiles of {report.tile}")
    row("workers", str(report.workers), "" if report.workers else "inline")
    row("tasks", f"{report.tasks:,}", f"bodies of the factorization: {report.bodies}")
    row("serial", _duration(median(report.serial)), "the same kernels in plain loops, one thread")
    if report.one:
        row("makespan, 1 worker", _duration(median(report.one)))
    row("makespan", _duration(median(report.graph)), _spread(report.graph))
    row("efficiency", f"{median(report.efficiency):.3f}", "serial / (makespan x workers)")
    if report.speedup:
        row("speed-up", f"{median(report.speedup):.2f}", "over 1 worker")
    if report.other:
        other = _OTHER[report.bodies]
        row(f"makespan, {other} bodies", _duration(median(report.other)), _spread(report.other))
        row("native bodies", f"{median(report.native_gain):.2f}", "times as fast")
    overhead = f"{median(report.overhead) * 1e6:.2f} µs a task"
    row("overhead", overhead, "the graph with empty kernels")
    if report.accuracy is not None:
        row("accuracy", f"{report.accuracy:.2%}", "held-out digits")
    row("relative error", f"{report.factor_error:.1e}", "of the factor, against SciPy's cho_factor")
    if not factor_only:
        weights = f"weights within {report.weights_error:.1e}"
        if report.weights_error == 0.0:
            weights = "weights equal to the last bit"
        labels = "equal" if report.labels_equal else "DIFFERENT"
        compared = f"labels {labels}, {weights}" if problem.test_labels.size else weights
        row("serial run", compared)
    console = Console()
    console.print(table)
    if not report.passed:
        console.print(f"[bold red]check failed[/bold red]: errors must not exceed {LIMIT:g}")


def _duration(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _spread(seconds: Sequence[float]) -> str:
    if len(seconds) == 1:
        return "1 run"
    return f"{_duration(min(seconds))} to {_duration(max(seconds))} in {len(seconds)} runs"


def _records(report: Report, problem: gp.Problem, factor_only: bool) -> list[records.Record]:
    case = "cholesky" if factor_only else f"gp {problem.name}"
    common = {"n": report.n, "tile": report.tile, "tasks": report.tasks, "bodies": report.bodies}

    def entry(
        metric: str,
        unit: str,
        values: Sequence[float],
        workers: int,
        runtime: str = "charioteer",
        **others: str,
    ) -> records.Record:
        params = {**common, "workers": workers, **others}
        return records.record("demo", runtime, case, params, metric, unit, values)

    entries = [
        entry("makespan", "s", report.serial, 1, "serial"),
        entry("makespan", "s", report.graph, report.workers),
        entry("efficiency", "1", report.efficiency, report.workers),
        entry("overhead per task", "µs", [1e6 * s for s in report.overhead], report.workers),
        entry("relative error", "1", [report.factor_error], report.workers),
    ]
    if report.one:
        entries.append(entry("makespan", "s", report.one, 1))
        entries.append(entry("speed-up", "1", report.speedup, report.workers))
    if report.other:
        other = _OTHER[report.bodies]
        entries.append(entry("makespan", "s", report.other, report.workers, bodies=other))
        entries.append(entry("native gain", "1", report.native_gain, report.workers))
    if report.accuracy is not None:
        entries.append(entry("accuracy", "1", [report.accuracy], report.workers))
    return entries
