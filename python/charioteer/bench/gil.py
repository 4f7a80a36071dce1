"""``charioteer bench gil``: what the GIL costs a task runtime, and what a Python without it gives.

The *sweep* runs graphs of bodies of which a known part holds the GIL. A cell of it is one graph,
one kind of body and one number of workers; whoever is compared in a cell runs in the same rounds.
The other measures are single questions: bodies of bytecode, a thread that spawns without pause,
work that changes its nature, a thread that does not let go, many threads that spawn. The methods
are told in ``benchmarks/README.md``.

With another interpreter each contestant runs under both, in processes of their own and in the same
rounds; then the case says which.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charioteer.bench import bodies, gil_runs, pages, probes, records, runners
from charioteer.bench.command import (
    Conduct,
    OptionError,
    add_peers_argument,
    add_runs_argument,
    check_other_python,
    check_writable,
    choice,
    positive,
    print_machine,
)
from charioteer.bench.gil_runs import (
    DASK,
    JOBLIB,
    LIMIT,
    LOOP,
    NATIVE,
    NATIVE_LIMIT,
    PARLA_2,
    PARLA_3,
    RAY,
    SHARED,
)
from charioteer.bench.harness import (
    OURS,
    Bar,
    Contestant,
    Key,
    Measure,
    Result,
    Sample,
    absolute,
    ratio,
    values_of,
)
from charioteer.bench.peers import THREAD_POOL

__all__ = ["DESCRIPTION", "SUMMARY", "OptionError", "add_arguments", "measures", "run"]

BENCHMARK = "gil"

SUMMARY = "what the GIL costs tasks that hold a part of it, beside other runtimes"

DESCRIPTION = """\
Measure what the GIL costs tasks of which a known part holds it, beside other runtimes.

The default takes some minutes and fills the table of independent tasks of 1 ms on all cores; --full
sweeps graphs, times, shares, slices and workers for hours, and each of these can be narrowed. How
long it will take is said first. A peer that is not installed is shown as missing.
"""

PEERS = {
    "threadpool": THREAD_POOL,
    "dask": DASK,
    "joblib": JOBLIB,
    "ray": RAY,
    "parla-0.2": PARLA_2,
    "parla-0.3": PARLA_3,
}
OWN_PROCESS = (RAY, PARLA_2, PARLA_3)
"""Peers that would disturb the runs beside them."""

TABLE = {(0.0, 1): 0.97, (0.05, 1): 0.87, (0.2, 1): 0.87, (0.0, 10): 0.95, (0.05, 10): 0.47} | {
    (0.2, 10): 0.57
}
"""The least efficiency of 1,000 independent tasks of 1 ms on 16 workers, by share and slices."""
TABLE_WORKERS = 16
TIME = "time"
HELD_PHASES = "GIL-bound phases"
FREE_PHASES = "GIL-free phases"
HELD_SHARE = f"{HELD_PHASES}, over their processor time"
SPAWN_RATE = "spawn rate"
PER_ROUND = "time per round"

WITH_GIL, WITHOUT_GIL = "GIL", "free-threaded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a look: a few cells, 2 rounds")
    size.add_argument("--full", action="store_true", help="the whole sweep; hours")
    add_runs_argument(parser, 3)
    parser.add_argument(
        "--only", metavar="A,B", help=f"the measures to make: some of {', '.join(NAMES)}"
    )
    add_peers_argument(parser, PEERS)
    sweep = parser.add_argument_group("the sweep", "lists of values, separated by commas")
    sweep.add_argument("--graphs", metavar="A,B", help=f"some of {', '.join(runners.SHAPES)}")
    sweep.add_argument("--times", metavar="MS,MS", help="task times in milliseconds")
    sweep.add_argument(
        "--shares", metavar="X,X", help="parts of the time that hold the GIL, 0 to 1"
    )
    sweep.add_argument("--slices", metavar="N,N", help="slices of a body")
    sweep.add_argument(
        "--workers", metavar="N,N", help="numbers of workers; the others use the most"
    )
    sweep.add_argument("--tasks", type=positive, metavar="N", help="tasks of a graph")
    parser.add_argument(
        "--other-python",
        metavar="PATH",
        help="an interpreter that also has charioteer, free-threaded if this one is not: runs "
        "everything under both",
    )
    parser.add_argument("--json", metavar="FILE", help="write all results to FILE as records")
    parser.add_argument(
        "--report", metavar="FILE", help="write tables and plots to FILE, .html or .md"
    )
    parser.add_argument(
        "--from",
        dest="sources",
        metavar="FILE",
        action="append",
        default=[],
        help="report records of an earlier run instead of measuring; may be repeated",
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a bar is not met or not measured"
    )


def run(options: argparse.Namespace) -> int:
    """Make the chosen measures, print them, write records and report.

    Returns:
        0; 1 if a run of charioteer itself failed, or with ``--check`` if a bar does not hold.

    Raises:
        OptionError: the options name what does not exist, or a file that cannot be used.
    """
    from rich.console import Console

    from charioteer.bench import gil_report, report

    console = Console(highlight=False)
    for path in filter(None, (options.json, options.report)):
        check_writable(path)
    if options.report is not None and Path(options.report).suffix not in pages.SUFFIXES:
        raise OptionError(f"a report ends in .html or .md, not as {options.report}")
    if options.sources:
        if options.report is None:
            raise OptionError("--from needs --report")
        gil_report.write(options.report, _read(options.sources))
        console.print(f"report in {options.report}")
        return 0
    settings = Settings.of(options)
    chosen = measures(settings, choice("measure", options.only, NAMES) or NAMES)
    print_machine(console, BENCHMARK)
    console.print(f"[dim]about {_duration(settings.estimate)}[/]")
    conduct = Conduct(BENCHMARK, settings.runs, options.json)
    cells = gil_report.CellTable(console)

    def show(measure: Measure, result: Result, verdicts: Any) -> None:
        if measure.name == "sweep":
            cells.add(measure, result)
            return
        report.print_measure(console, measure, result, verdicts)
        for line in remarks(measure, result):
            console.print(f"  {line}")

    conduct.run(chosen, show, _extra)
    status = conduct.end(console, check=options.check)
    if options.report is not None:
        gil_report.write(options.report, [dict(vars(entry)) for entry in conduct.entries])
        console.print(f"report in {options.report}")
    return status


def _read(paths: Sequence[str]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for path in paths:
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            entries += [entry for entry in found if entry["benchmark"] == BENCHMARK]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise OptionError(f"--from {path}: no records: {error}") from error
    if not entries:
        raise OptionError(f"--from: no records of bench {BENCHMARK} in {', '.join(paths)}")
    return entries


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Spec:
    """A contestant as parameters, so that any interpreter can run it.

    Attributes:
        runtime, case, workers: what results call it.
        run, given: the function of :mod:`~charioteer.bench.gil_runs` and its parameters.
        seconds: about how long a run takes.
    """

    runtime: str
    case: str
    workers: int | None
    run: str
    given: dict[str, Any]
    seconds: float


class Settings:
    """What is swept, how often, beside whom and under which interpreters."""

    def __init__(
        self,
        *,
        quick: bool = False,
        full: bool = False,
        runs: int | None = None,
        peers: Sequence[str] | None = None,
        shapes: Sequence[str] | None = None,
        times: Sequence[float] | None = None,
        shares: Sequence[float] | None = None,
        slices: Sequence[int] | None = None,
        workers: Sequence[int] | None = None,
        tasks: int | None = None,
        other_python: str | None = None,
    ) -> None:
        """Fill in what is not said, from the default, the quick or the full preset.

        Args:
            quick, full: the preset, if not the default.
            runs: counted rounds.
            peers: names of :data:`PEERS`; all, or the thread pool alone if ``quick``.
            shapes, times, shares, slices, workers: of the sweep; times in seconds.
            tasks: of a graph; fitted to the time if left out.
            other_python: the interpreter beside this one.
        """
        cores = records.usable_cores()
        self.quick, self.full = quick, full
        self.runs = runs or (2 if quick else 3)
        self.peers = tuple(peers if peers is not None else ["threadpool"] if quick else PEERS)
        self.shapes = tuple(shapes or (runners.SHAPES if full else ["independent"]))
        self.times = tuple(
            times or ([5e-5, 2.5e-4, 1e-3, 4e-3, 1.6e-2, 6.4e-2] if full else [1e-3])
        )
        some = [0.0, 0.05, 0.2, 0.5, 1.0] if full else [0.0, 0.2] if quick else [0.0, 0.05, 0.2]
        self.shares = tuple(shares if shares is not None else some)
        self.slices = tuple(slices or ([1, 10, 100] if full else [1] if quick else [1, 10]))
        self.workers = tuple(workers or (ladder(cores) if full else [cores]))
        self.most = max(self.workers)
        self.tasks = tasks
        self.other_python = other_python
        self.estimate = 0.0
        if other_python is None:
            mine = WITH_GIL if records.gil_enabled() else WITHOUT_GIL
            self.flavours: dict[str, str | None] = {mine: None}
        else:
            both = [None, other_python] if records.gil_enabled() else [other_python, None]
            self.flavours = dict(zip((WITH_GIL, WITHOUT_GIL), both, strict=True))

    @classmethod
    def of(cls, options: argparse.Namespace) -> Settings:
        """The settings that the command's options ask for.

        Raises:
            OptionError: a value that is no number or out of range, an unknown name, an unfit other
                interpreter.
        """
        check_other_python(options.other_python)
        times = _numbers("--times", options.times, float, 0.001, 1000)
        return cls(
            quick=options.quick,
            full=options.full,
            runs=options.runs,
            peers=choice("peer", options.peers, tuple(PEERS)),
            shapes=choice("graph", options.graphs, tuple(runners.SHAPES)),
            times=None if times is None else [1e-3 * time for time in times],
            shares=_numbers("--shares", options.shares, float, 0, 1),
            slices=_numbers("--slices", options.slices, int, 1, 10_000),
            workers=_numbers("--workers", options.workers, int, 1, 1024),
            tasks=options.tasks,
            other_python=options.other_python,
        )

    def count(self, seconds: float) -> int:
        """How many tasks of that time a graph has: a second's worth, within bounds."""
        if self.tasks is not None:
            return self.tasks
        return min(5_000, max(64, round((0.2 if self.quick else 1.0) / seconds)))

    def runtimes(self) -> list[str]:
        """The peers by the names that results have."""
        return [PEERS[name] for name in self.peers]

    def pool(self) -> list[str]:
        """The thread pool, if it is among the peers: the only one that every measure knows."""
        return [name for name in self.runtimes() if name == THREAD_POOL]

    def case(self, text: str, flavour: str) -> str:
        """A case's name; it says which interpreter where there are two."""
        return text if self.other_python is None else f"{text}, {flavour}"

    def contestants(self, specs: Callable[[str], list[Spec]]) -> list[Contestant]:
        """Contestants for the specs of each interpreter; adds to the estimate."""
        made = []
        for flavour, python in self.flavours.items():
            for spec in specs(flavour):
                apart = self.other_python is not None or spec.runtime in OWN_PROCESS
                if apart:
                    run = functools.partial(
                        probes.call, "gil", python=python, run=spec.run, given=spec.given
                    )
                else:
                    run = functools.partial(_sample, spec)
                start = 4.0 if spec.runtime in OWN_PROCESS else 0.3 if apart else 0.01
                if _is_there(spec.runtime):
                    self.estimate += (1 + self.runs) * (spec.seconds + start)
                params = {
                    name: value
                    for name, value in spec.given.items()
                    if name not in ("runtime", "workers")
                }
                case = self.case(spec.case, flavour)
                params["interpreter"] = flavour
                made.append(Contestant(spec.runtime, case, run, spec.workers, params))
        return made


_PACKAGES = {DASK: "dask", JOBLIB: "joblib", RAY: "ray", PARLA_2: "parla", PARLA_3: "parla"}


def _is_there(runtime: str) -> bool:
    """Whether it looks as if the runtime could run; for the estimate, a run itself finds out."""
    package = _PACKAGES.get(runtime)
    return package is None or importlib.util.find_spec(package) is not None


def _sample(spec: Spec) -> Sample:
    return Sample(gil_runs.RUNS[spec.run](**spec.given))


def _numbers(
    option: str, text: str | None, kind: Callable[[str], Any], least: float, most: float
) -> list[Any] | None:
    if text is None:
        return None
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        raise OptionError(f"{option}: {text!r} is no list of numbers") from None
    for value in values:
        if not least <= value <= most:
            raise OptionError(f"{option}: {value:g} is not from {least:g} to {most:g}")
    return list(dict.fromkeys(values))


def ladder(most: int) -> list[int]:
    """The powers of two up to ``most``, and ``most``."""
    return sorted({1 << bit for bit in range(most.bit_length())} | {most})


def measures(settings: Settings, names: Sequence[str]) -> list[Measure]:
    """The measures of these names under these settings, in the order of the benchmark."""
    return [
        measure for name, make in _MEASURES.items() if name in names for measure in make(settings)
    ]


def best(result: Result, keys: Sequence[Key], metric: str) -> Key | None:
    """The one with the lowest median; ``None`` if none was measured."""
    measured = [key for key in keys if key in result and result[key].values.get(metric)]
    return min(
        measured, key=lambda key: statistics.median(result[key].values[metric]), default=None
    )


def over_best(
    keys: Sequence[Key], ours: Key, metric: str, *, inverse: bool = False
) -> Callable[[Result], Sequence[float]]:
    """The values of the best of ``keys`` over ours, round by round; or ours over the best's.

    The best is chosen once, by its median: the luckiest of each round would be nobody's choice.
    """

    def values(result: Result) -> Sequence[float]:
        chosen = best(result, keys, metric)
        if chosen is None:
            return []
        return ratio(*((ours, chosen) if inverse else (chosen, ours)), metric)(result)

    return values


def _width(width: int) -> str:
    return f"{OURS}, gil={width}"


def _widths(settings: Settings, workers: int) -> list[int]:
    return ladder(workers) if not settings.quick else sorted({1, workers})


def _bare(held: float, workers: int) -> list[int]:
    """The numbers of bare threads that may be the best: those that use the GIL up, by and large."""
    return [n for n in ladder(workers) if 0.5 <= n * held <= 2] or [workers]


def _sweep(settings: Settings) -> list[Measure]:
    return [
        _cell(settings, shape, seconds, held, slices, workers)
        for shape in settings.shapes
        for seconds in settings.times
        for slices in settings.slices
        for held in settings.shares
        for workers in settings.workers
    ]


def _cell(
    settings: Settings, shape: str, seconds: float, held: float, slices: int, workers: int
) -> Measure:
    tasks = settings.count(seconds)
    graph = runners.SHAPES[shape](tasks)
    text = f"{shape}, {1e3 * seconds:g} ms, {held:.0%} held, {slices} slice{'s' * (slices > 1)}"
    given = {
        "shape": shape,
        "tasks": tasks,
        "seconds": seconds,
        "held": held,
        "slices": slices,
        "cores": workers,
    }

    def spec(runtime: str, of: str, at_once: int, flavour: str, **more: int) -> Spec:
        gil = flavour == WITH_GIL and runtime not in (NATIVE, NATIVE_LIMIT)
        about = 1.3 * graph.ideal(seconds, held, at_once, gil=gil)
        run: dict[str, Any] = given | {"runtime": of, "workers": workers} | more
        return Spec(runtime, text, run["workers"], "cell", run, about)

    def specs(flavour: str) -> list[Spec]:
        found = [spec(OURS, OURS, workers, flavour)]
        found += [
            spec(_width(width), OURS, width, flavour, width=width)
            for width in _widths(settings, workers)
        ]
        found.append(spec(NATIVE, NATIVE, workers, flavour))
        if not graph.edges:
            found += [
                spec(LIMIT, LIMIT, threads, flavour, workers=threads)
                for threads in _bare(held if flavour == WITH_GIL else 0.0, workers)
            ]
            found.append(spec(NATIVE_LIMIT, NATIVE_LIMIT, workers, flavour))
        for runtime in settings.runtimes():
            if runtime == THREAD_POOL and not settings.quick:
                found += [
                    spec(runtime, runtime, width, flavour, workers=width)
                    for width in ladder(workers)
                ]
            else:
                found.append(spec(runtime, runtime, workers, flavour))
        return found

    bars = []
    for flavour in settings.flavours:
        case = settings.case(text, flavour)
        ours = Key(OURS, case, workers)
        limit = TABLE.get((held, slices))
        bounded = (shape, seconds, workers, flavour) == (
            "independent",
            1e-3,
            TABLE_WORKERS,
            WITH_GIL,
        )
        if limit is not None and bounded:
            bars.append(absolute(case, "efficiency", "", limit, workers, at_least=True))
        widths = [Key(_width(width), case, workers) for width in ladder(workers)]
        pools = [Key(THREAD_POOL, case, width) for width in ladder(workers)]
        for metric, keys, least, lacking in (
            ("of our best fixed width", widths, 0.97, "Runtime(gil=)"),
            ("of the best ThreadPoolExecutor", pools, 1.1, THREAD_POOL),
        ):
            values = over_best(keys, ours, TIME)
            bars.append(_speed(case, workers, f"speed {metric}", values, least, lacking))
        native = Key(NATIVE, case, workers)
        bars.append(
            Bar(
                case=case,
                workers=workers,
                metric="native bodies, of the cores",
                unit="",
                values=values_of(native, "of the cores"),
                limit=0.95,
                at_least=True,
                lacking=NATIVE,
            )
        )
    return Measure(
        name="sweep",
        title=text,
        contestants=settings.contestants(specs),
        units={TIME: "ms", "efficiency": "", "of the cores": "", "waited for the GIL": "ms"},
        bars=bars,
    )


def _speed(
    case: str,
    workers: int,
    metric: str,
    values: Callable[[Result], Sequence[float]],
    limit: float,
    lacking: str = "both",
) -> Bar:
    """A bar on how many times as fast one of our own is as something else."""
    return Bar(
        case=case,
        workers=workers,
        metric=metric,
        unit="x",
        values=values,
        limit=limit,
        at_least=True,
        lacking=lacking,
    )


def _pure(settings: Settings) -> list[Measure]:
    tasks = settings.tasks or (100 if settings.quick else 300)
    seconds = 1e-3
    rounds = bodies.rounds_in(seconds)
    widths = ladder(settings.most)
    text = f"{tasks:,} times 1 ms of bytecode"
    runtimes = [OURS, *settings.pool()]

    def bare(flavour: str, workers: int) -> list[str]:
        # With the GIL the loop is the limit.
        return [LIMIT] if flavour == WITHOUT_GIL and workers in (1, settings.most) else []

    def specs(flavour: str) -> list[Spec]:
        given = {"tasks": tasks, "rounds": rounds}
        about = tasks * seconds * 1.1
        loop = given | {"runtime": LOOP, "workers": 1}
        return [Spec(LOOP, text, None, "pure", loop, about)] + [
            Spec(
                runtime,
                text,
                workers,
                "pure",
                given | {"runtime": runtime, "workers": workers},
                about / (1 if flavour == WITH_GIL else workers),
            )
            for workers in widths
            for runtime in (*runtimes, *bare(flavour, workers))
        ]

    bars = []
    for flavour in settings.flavours:
        case = settings.case(text, flavour)
        if flavour == WITH_GIL:
            for workers in widths:
                values = ratio(Key(LOOP, case), Key(OURS, case, workers), TIME)
                bars.append(_speed(case, workers, "speed of the loop", values, 0.97))
        elif settings.most >= TABLE_WORKERS:
            values = ratio(Key(OURS, case, 1), Key(OURS, case, TABLE_WORKERS), TIME)
            bars.append(_speed(case, TABLE_WORKERS, "speed of one worker", values, 15.0))
    return [
        Measure(
            name="pure",
            title="Bodies of bytecode alone",
            contestants=settings.contestants(specs),
            units={TIME: "ms"},
            bars=bars,
        )
    ]


def _starve(settings: Settings) -> list[Measure]:
    workers = settings.most
    text = "a body of 100 slices of 20 µs"
    window = 0.1 if settings.quick else 0.25

    def specs(_: str) -> list[Spec]:
        given = {"workers": workers, "slices": 100, "piece": 20e-6, "window": window}
        names = [OURS, *settings.pool(), gil_runs.BARE]
        return [
            Spec(name, text, workers, "starve", given | {"runtime": name}, 2 * window + 0.5)
            for name in names
        ]

    bars = []
    for flavour in settings.flavours:
        case = settings.case(text, flavour)
        bars += [
            absolute(case, "body", "ms", 50.0, workers),
            absolute(case, "rate kept", "", 0.5, workers, at_least=True),
        ]
    return [
        Measure(
            name="starve",
            title="A thread that spawns without pause, and a body that needs the GIL often",
            contestants=settings.contestants(specs),
            units={"body": "ms", SPAWN_RATE: "/ms", "rate kept": ""},
            bars=bars,
            note="Rate kept: the rate of the spawns over that of the same loop without the body.",
        )
    ]


def _changes(settings: Settings) -> list[Measure]:
    workers, seconds = settings.most, 1e-3
    phases = 4 if settings.quick else 20
    rounds = bodies.rounds_in(seconds)
    text = f"{phases} phases"
    # One that competes suits the one kind of phases, all suit the other.
    widths = sorted({1, 2, workers})

    def specs(_: str) -> list[Spec]:
        given = {"workers": workers, "phases": phases, "seconds": seconds, "rounds": rounds}
        best_case = 40 * seconds * phases
        found = [Spec(OURS, text, workers, "changes", given | {"runtime": OURS}, best_case)]
        for width in widths:
            run = given | {"runtime": OURS, "width": width}
            about = best_case * (1 + workers / width) / 2
            found.append(Spec(_width(width), text, workers, "changes", run, about))
        for pool in settings.pool():
            run = given | {"runtime": pool}
            found.append(Spec(pool, text, workers, "changes", run, 1.5 * best_case))
        return found

    bars = []
    for flavour in settings.flavours:
        case = settings.case(text, flavour)
        fixed = [Key(_width(width), case, workers) for width in widths]
        bars += [
            Bar(
                case=case,
                workers=workers,
                metric=f"{metric}, against the best fixed width",
                unit="x",
                values=over_best(fixed, Key(OURS, case, workers), metric, inverse=True),
                limit=1.1,
                lacking="Runtime(gil=)",
            )
            for metric in (HELD_PHASES, FREE_PHASES)
        ]
    return [
        Measure(
            name="changes",
            title="Sudden changes between bytecode and work without the GIL",
            contestants=settings.contestants(specs),
            units={HELD_PHASES: "ms", FREE_PHASES: "ms", TIME: "ms", HELD_SHARE: "x"},
            bars=bars,
            note="At best every phase takes 40 ms.",
        )
    ]


def _disturb(settings: Settings) -> list[Measure]:
    workers, seconds, held = settings.most, 1e-3, 0.05
    tasks = settings.tasks or 100
    outside = ("nothing", "bytecode", "C") if settings.full else ("nothing", "bytecode")

    def specs(_: str) -> list[Spec]:
        found = []
        for thread in outside:
            for runtime in (OURS, NATIVE, *settings.pool()):
                given = {
                    "runtime": runtime,
                    "outside": thread,
                    "shape": "independent",
                    "tasks": tasks,
                    "seconds": seconds,
                    "held": held,
                    "slices": 1,
                    "workers": workers,
                }
                about = tasks * (seconds / workers if thread == "nothing" else 8e-3)
                text = f"beside a thread that runs {thread}"
                found.append(Spec(runtime, text, workers, "disturb", given, about))
        return found

    return [
        Measure(
            name="disturb",
            title="A thread outside that does not let the GIL go",
            contestants=settings.contestants(specs),
            units={TIME: "ms"},
            note=f"{tasks} independent tasks of 1 ms, 5 % of it under the GIL.",
        )
    ]


def _single(settings: Settings) -> list[Measure]:
    rounds = 20_000 if settings.quick else 100_000

    def specs(_: str) -> list[Spec]:
        return [
            Spec(OURS, what, None, "single", {"what": what, "rounds": rounds}, rounds * 5e-7)
            for what in gil_runs.SINGLE
        ]

    return [
        Measure(
            name="single",
            title="Code of one thread",
            contestants=settings.contestants(specs),
            units={PER_ROUND: "ns"},
        )
    ]


def _shared(settings: Settings) -> list[Measure]:
    cores = records.usable_cores()
    threads = max(2, cores // 2)
    workers = max(1, cores - threads)
    tasks = 5_000 if settings.quick else 20_000
    sharings: list[tuple[str, list[str]]] = [
        (f"{threads} threads, {_sharing(names)}", names)
        for names in ([], *([name] for name in SHARED), list(SHARED))
    ]

    def specs(_: str) -> list[Spec]:
        found = []
        for count, text, names in [(1, "1 thread", list[str]())] + [
            (threads, text, names) for text, names in sharings
        ]:
            given = {"threads": count, "workers": workers, "tasks": tasks, "sharing": names}
            found.append(Spec(OURS, text, workers, "shared", given, count * tasks * 3e-6))
        return found

    bars = []
    if WITHOUT_GIL in settings.flavours and cores >= TABLE_WORKERS:
        one = Key(OURS, settings.case("1 thread", WITHOUT_GIL), workers)
        for text, limit in ((sharings[0][0], 4.0), (sharings[-1][0], 2.0)):
            case = settings.case(text, WITHOUT_GIL)
            values = ratio(Key(OURS, case, workers), one, SPAWN_RATE)
            bars.append(_speed(case, workers, "rate of one thread", values, limit))
    return [
        Measure(
            name="shared",
            title="Threads that spawn at once",
            contestants=settings.contestants(specs),
            units={SPAWN_RATE: "/ms", "complete": "/ms"},
            bars=bars,
        )
    ]


def _sharing(names: Sequence[str]) -> str:
    if not names:
        return "nothing shared"
    return "all shared" if len(names) == len(SHARED) else f"sharing the {names[0]}"


def _sharing_costs(measure: Measure, result: Result) -> list[tuple[str, str, list[float]]]:
    """For each interpreter and thing that threads share: how much slower that made the spawns."""
    found = []
    own: dict[str, Contestant] = {}
    for contestant in measure.contestants:
        names = contestant.params["sharing"]
        if contestant.params["threads"] == 1:
            continue
        flavour = contestant.params["interpreter"]
        if not names:
            own[flavour] = contestant
        elif len(names) == 1:
            values = ratio(own[flavour].key, contestant.key, SPAWN_RATE)(result)
            found.append((flavour, names[0], list(values)))
    return found


def _build_costs(measure: Measure, result: Result) -> list[tuple[str, list[float]]]:
    """How much longer code of one thread takes without the GIL, where both were measured."""
    keys: dict[str, dict[str, Key]] = {}
    for contestant in measure.contestants:
        flavours = keys.setdefault(contestant.params["what"], {})
        flavours[contestant.params["interpreter"]] = contestant.key
    return [
        (what, list(ratio(of[WITHOUT_GIL], of[WITH_GIL], PER_ROUND)(result)))
        for what, of in keys.items()
        if len(of) == 2
    ]


def remarks(measure: Measure, result: Result) -> list[str]:
    """What follows from a measure besides its bars, in lines.

    Which shared things made spawning threads slower by more than a tenth; what the free-threaded
    build costs code of one thread.
    """
    lines = []
    if measure.name == "shared":
        costs = _sharing_costs(measure, result)
        for flavour in dict.fromkeys(flavour for flavour, *_ in costs):
            slow = [
                f"the {name} ({statistics.median(values):.2f} x slower)"
                for of, name, values in costs
                if of == flavour and values and statistics.median(values) > 1.1
            ]
            lines.append(f"contended, {flavour}: {', '.join(slow) or 'nothing'}")
    if measure.name == "single":
        lines += [
            f"{what}, free-threaded / GIL: {statistics.median(values):.2f} x"
            for what, values in _build_costs(measure, result)
            if values
        ]
    return lines


def _extra(measure: Measure, result: Result) -> list[records.Record]:
    """The records of what :func:`remarks` tells."""
    found: list[tuple[str, dict[str, Any], str, list[float]]] = []
    if measure.name == "shared":
        found += [
            (
                f"sharing the {name}, {flavour}",
                {"interpreter": flavour, "shared": name},
                "slower than with nothing shared",
                values,
            )
            for flavour, name, values in _sharing_costs(measure, result)
        ]
    if measure.name == "single":
        found += [
            (what, {"what": what}, "free-threaded / GIL", values)
            for what, values in _build_costs(measure, result)
        ]
    return [
        records.record(BENCHMARK, OURS, case, params, metric, "x", values)
        for case, params, metric, values in found
        if values
    ]


_MEASURES: dict[str, Callable[[Settings], list[Measure]]] = {
    "sweep": _sweep,
    "pure": _pure,
    "starve": _starve,
    "changes": _changes,
    "disturb": _disturb,
    "single": _single,
    "shared": _shared,
}

NAMES = tuple(_MEASURES)
