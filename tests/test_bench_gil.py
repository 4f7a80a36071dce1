"""The GIL study: its kernels, graphs, runs, bars and report."""

from __future__ import annotations

import ctypes
import json
import math
import re
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import charioteer as ch
from charioteer import _core
from charioteer.bench import bodies, gil, gil_report, gil_runs, pages, records, runners
from charioteer.bench.gil_runs import LIMIT, LOOP, NATIVE, NATIVE_LIMIT
from charioteer.bench.harness import OURS, Key, Missing, Series
from charioteer.bench.peers import THREAD_POOL
from charioteer.cli import main
from charioteer.graphs import Shape

pytestmark = pytest.mark.surface

needs_gil = pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="there is no GIL to hold"
)

# Kernels


def kernel_visits() -> int:
    """How often the kernel has detached in this process."""
    with ch.Runtime(workers=0) as runtime:
        visits = runtime.stats()["gateway"]["kernel"]
    return int(visits["visits"])


@pytest.mark.parametrize(
    ("held", "slices", "detached"),
    [(0.5, 1, 1), (0.5, 7, 7), (0.999, 100, 100), (1.0, 1, 0), (1.0, 10, 0), (0.0, 10, 1)],
)
def test_the_kernel_detaches_once_a_slice_unless_it_holds_all_or_nothing(
    held: float, slices: int, detached: int
) -> None:
    before = kernel_visits()
    _core.work(1e-4, held, slices)
    assert kernel_visits() - before == detached


@pytest.mark.parametrize(("slices", "detached"), [(1, 1), (10, 10)])
def test_a_body_detaches_once_a_slice_where_it_holds_nothing(slices: int, detached: int) -> None:
    before = kernel_visits()
    bodies.spinning(1e-4, 0.0, slices)()
    assert kernel_visits() - before == detached


@pytest.fixture
def progress() -> Iterator[Callable[[], int]]:
    """How far another thread has come that wants the GIL again and again.

    Nobody asks for the GIL while the other has it, so it changes hands only where it is released.
    """
    counted = [0]
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(1e-4)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e3)
    thread = threading.Thread(target=count)
    thread.start()
    yield lambda: counted[0]
    stop.set()
    thread.join()
    sys.setswitchinterval(interval)


@needs_gil
def test_another_thread_runs_only_while_the_kernel_is_detached(
    progress: Callable[[], int],
) -> None:
    before = progress()
    _core.work(0.02, 1.0, 10)
    assert progress() == before
    _core.work(0.02, 0.5, 10)
    assert progress() > before


@pytest.mark.parametrize(("held", "slices"), [(0.0, 1), (0.3, 10), (1.0, 1)])
def test_the_kernel_lasts_at_least_as_long_as_asked(held: float, slices: int) -> None:
    start = time.perf_counter()
    _core.work(0.01, held, slices)
    assert time.perf_counter() - start >= 0.0099


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((-1.0,), "seconds"),
        ((math.nan,), "seconds"),
        ((math.inf,), "seconds"),
        ((1e-6, 1.1), "held"),
        ((1e-6, math.nan), "held"),
        ((1e-6, 0.5, 0), "slices"),
    ],
)
def test_the_kernel_refuses_what_is_out_of_range(arguments: tuple[Any, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        _core.work(*arguments)


def test_the_spin_is_a_c_function_of_that_name() -> None:
    library = ctypes.CDLL(_core.__file__)
    address = ctypes.cast(library.charioteer_spin, ctypes.c_void_p).value
    assert address == _core.spin_address()
    spin = ctypes.CFUNCTYPE(None, ctypes.c_double)(address)
    start = time.perf_counter()
    spin(0.01)
    assert time.perf_counter() - start >= 0.0099
    for nothing in (0.0, -1.0, math.nan, math.inf):
        spin(nothing)


def test_bytecode_is_calibrated() -> None:
    rounds = bodies.rounds_in(1e-3)
    assert bodies.rounds_in(4e-3) > rounds > 100
    assert bodies.count(rounds) == 0


# Graphs


def test_shapes() -> None:
    shapes = runners.SHAPES
    assert shapes["independent"](5).before == ((),) * 5
    # Three tiles: potrf 0, trsm 1 2, syrk 3, gemm 4 between it and syrk 5; and so on.
    assert shapes["cholesky"](19).before == (
        *((), (0,), (0,)),
        *((1,), (2, 1), (2,)),
        *((3,), (4, 6), (5, 7), (8,)),
    )
    assert len(shapes["steps"](64)) == 64
    assert shapes["steps"](64).before[32:35] == ((0, 1), (0, 1, 2), (1, 2, 3))


@pytest.mark.parametrize("shape", runners.SHAPES)
@pytest.mark.parametrize("tasks", [1, 10, 100, 1000])
def test_graphs_have_about_as_many_tasks_each_after_earlier_ones(shape: str, tasks: int) -> None:
    graph = runners.SHAPES[shape](tasks)
    assert tasks / 2 <= len(graph) <= tasks
    assert all(at < index for index, before in enumerate(graph.before) for at in before)
    assert sorted(index for level in graph.levels for index in level) == list(range(len(graph)))


def test_a_cholesky_factorization_of_n_tiles_has_a_chain_of_three_n_less_two() -> None:
    for tiles in (1, 2, 5, 8):
        graph = runners.SHAPES["cholesky"](tiles * (tiles + 1) * (tiles + 2) // 6)
        assert len(graph) == tiles * (tiles + 1) * (tiles + 2) // 6
        assert len(graph.levels) == 3 * tiles - 2


def test_the_ideal_is_the_largest_bound() -> None:
    graph = runners.SHAPES["independent"](1_000)
    assert graph.ideal(1e-3, 0.0, 16) == pytest.approx(0.0625)
    assert graph.ideal(1e-3, 0.2, 16) == pytest.approx(0.2)
    assert graph.ideal(1e-3, 0.2, 16, gil=False) == pytest.approx(0.0625)
    assert runners.SHAPES["cholesky"](10).ideal(1.0, 0.0, 100) == 7.0


RUNNERS: dict[str, Callable[..., runners.Outcome]] = {
    OURS: runners.charioteer,
    THREAD_POOL: runners.thread_pool,
    "dask": runners.dask,
    "joblib": runners.joblib,
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shape", runners.SHAPES)
@pytest.mark.parametrize("name", RUNNERS)
def test_runners_run_every_task_once(name: str, shape: str, workers: int) -> None:
    graph = runners.SHAPES[shape](40)
    ran: list[int] = []
    outcome = RUNNERS[name](graph, lambda: ran.append(1), workers)
    assert len(ran) == len(graph)
    assert outcome.seconds > 0


@pytest.mark.parametrize("workers", [1, 3])
def test_bare_threads_run_every_task_once(workers: int) -> None:
    ran: list[int] = []
    outcome = runners.bare_threads(
        runners.SHAPES["independent"](40), lambda: ran.append(1), workers
    )
    assert len(ran) == 40
    assert outcome.seconds > 0


def test_bare_threads_in_c_spin_as_often_as_asked() -> None:
    assert runners.bare_spins(runners.SHAPES["independent"](10), 1e-3, 1).seconds >= 0.0099
    assert runners.bare_spins(runners.SHAPES["independent"](11), 1e-3, 2).seconds >= 0.0059


@pytest.mark.parametrize("name", RUNNERS)
def test_runners_keep_the_order_of_a_chain(name: str) -> None:
    chain = Shape("chain", ((), *((index,) for index in range(30))))
    at_once = 0
    most = [0]
    lock = threading.Lock()
    counts = [at_once]

    def body() -> None:
        with lock:
            counts[0] += 1
            most[0] = max(most[0], counts[0])
        _core.work(1e-4)
        with lock:
            counts[0] -= 1

    RUNNERS[name](chain, body, 4)
    assert most[0] == 1


def test_a_failing_body_is_no_success() -> None:
    def body() -> None:
        raise ValueError("thirteen")

    with pytest.raises(ExceptionGroup):
        runners.charioteer(runners.SHAPES["independent"](1), body, 1)


def test_what_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = runners.SHAPES["independent"](1)
    for module in ("dask", "distributed", "joblib", "ray", "parla", "parsl"):
        monkeypatch.setitem(sys.modules, module, None)
    peers = [name for name in runners.PEERS if name != "threadpool"]
    assert len(peers) == 7
    for name in peers:
        with pytest.raises(Missing, match="is not installed"):
            runners.PEERS[name].run(graph, int, 1)
    with pytest.raises(Missing, match="parla is not installed"):
        runners.parla(graph, int, 1, "0.3")


PARLA = """
import threading

class Handle:
    def __init__(self): self.ended = False
    def __await__(self):
        assert self.ended
        return iter(())
class TaskSpace(dict):
    def __init__(self, name): pass
    def __missing__(self, index): return self.setdefault(index, Handle())
def spawn(handle=None, dependencies=(), *, placement, vcus):
    assert placement == "cpu" and all(before.ended for before in dependencies)
    def decorate(function):
        made = function()
        if made is not None:
            try: made.send(None)
            except StopIteration: pass
        if handle is not None: handle.ended = True
    return decorate
"""


@pytest.mark.parametrize("version", ["0.2", "0.3"])
def test_parla_gets_every_task_with_its_dependencies(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "parla"
    package.mkdir()
    (package / "__init__.py").write_text(
        "given = []\n"
        "class Parla:\n"
        "    def __init__(self, **options): given.append(options)\n"
        "    def __enter__(self): pass\n"
        "    def __exit__(self, *_): pass\n"
    )
    (package / "tasks.py").write_text(PARLA)
    (package / ("cpu.py" if version == "0.2" else "devices.py")).write_text("cpu = 'cpu'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(runners.os, "cpu_count", lambda: 4)
    try:
        graph = runners.SHAPES["steps"](64)
        ran: list[int] = []
        assert runners.parla(graph, lambda: ran.append(1), 4, version).seconds > 0
        assert len(ran) == 64
        given = sys.modules["parla"].given
        assert given == [{} if version == "0.2" else {"n_workers": 4}]
        other = {"0.2": "0.3", "0.3": "0.2"}[version]
        with pytest.raises(Missing, match=f"installed as {version}"):
            runners.parla(graph, int, 4, other)
        if version == "0.2":
            with pytest.raises(Missing, match="every core"):
                runners.parla(graph, int, 2, version)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "parla"]:
            del sys.modules[name]


def test_native_bodies_run() -> None:
    for shape in runners.SHAPES:
        assert runners.native(runners.SHAPES[shape](10), 1e-4, 2).seconds > 5e-4


def test_graphs_run_in_rust() -> None:
    for shape in runners.SHAPES:
        assert runners.in_rust(runners.SHAPES[shape](10), 1e-4, 2).seconds > 5e-4
    chain = [[index - 1] if index else [] for index in range(20)]
    assert _core.spin_graph(chain, 1e-4, 4) >= 2e-3
    for arguments, words in (
        (([[0]], 0.0, 1), "task 0 comes after 0"),
        (([[]], -1.0, 1), "seconds"),
        (([[]], 0.0, 0), "workers"),
    ):
        with pytest.raises(ValueError, match=words):
            _core.spin_graph(*arguments)


def test_the_wait_for_the_gil_is_the_sum_of_all_sites() -> None:
    sites = {"worker": {"waited": 1.0, "visits": 3}, "main": {"waited": 0.5}}
    runtime = types.SimpleNamespace(stats=lambda: {"gateway": sites})
    assert runners.gil_waited(runtime) == 1.5  # type: ignore[arg-type]


def test_the_wait_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # The counts are the process's: what others waited before is not this run's.
    readings = iter([5.0, 5.25])
    monkeypatch.setattr(runners, "gil_waited", lambda _: next(readings))
    values = gil_runs.cell(OURS, "independent", 2, 1e-5, 0.0, 1, 1)
    assert values["waited for the GIL"] == 250.0


# Runs

TINY = {"shape": "steps", "tasks": 8, "seconds": 1e-4, "held": 0.1, "slices": 2, "workers": 2}

CASES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("cell", {"runtime": OURS, **TINY}, {"time", "efficiency", "of the cores"}),
    ("cell", {"runtime": THREAD_POOL, **TINY}, {"time", "efficiency", "of the cores"}),
    ("pure", {"runtime": LOOP, "tasks": 5, "rounds": 10, "workers": 1}, {"time"}),
    ("pure", {"runtime": OURS, "tasks": 5, "rounds": 10, "workers": 2}, {"time"}),
    *(
        (
            "starve",
            {"runtime": runtime, "workers": 2, "slices": 3, "piece": 1e-5, "window": 0.01},
            {"body", "spawn rate", "rate kept"},
        )
        for runtime in (OURS, THREAD_POOL, gil_runs.BARE)
    ),
    *(
        (
            "changes",
            {"runtime": runtime, "workers": 2, "phases": 3, "seconds": 1e-5, "rounds": 10},
            {
                "time",
                "GIL-bound phases",
                "GIL-free phases",
                "GIL-bound phases, over their processor time",
            },
        )
        for runtime in (OURS, THREAD_POOL)
    ),
    *(
        (
            "disturb",
            {"runtime": OURS, "outside": outside, **TINY},
            {"time", "efficiency", "of the cores"},
        )
        for outside in ("nothing", "bytecode", "C")
    ),
    *(("single", {"what": what, "rounds": 10}, {"time per round"}) for what in gil_runs.SINGLE),
    *(
        (
            "shared",
            {"threads": 2, "workers": 1, "tasks": 5, "sharing": sharing},
            {"spawn rate", "complete"},
        )
        for sharing in ([], ["function"], list(gil_runs.SHARED))
    ),
]


@pytest.mark.parametrize(("run", "given", "metrics"), CASES)
def test_runs_give_their_metrics(run: str, given: dict[str, Any], metrics: set[str]) -> None:
    values = gil_runs.RUNS[run](**json.loads(json.dumps(given)))
    assert set(values) - {"waited for the GIL"} == metrics
    assert all(math.isfinite(value) and value > 0 for value in values.values())


def test_every_run_is_tested() -> None:
    assert {run for run, *_ in CASES} == set(gil_runs.RUNS)


def test_an_efficiency_is_the_ideal_over_the_time() -> None:
    values = gil_runs.cell(OURS, "independent", 20, 1e-3, 1.0, 1, 2)
    assert values["efficiency"] == pytest.approx(20 / values["time"])
    assert values["of the cores"] == pytest.approx(10 / values["time"])
    few = gil_runs.cell(THREAD_POOL, "independent", 20, 1e-3, 0.0, 1, 1, cores=4)
    assert few["efficiency"] == pytest.approx(5 / few["time"])


def test_threads_that_spawn_share_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    functions: list[Any] = []
    own_function = gil_runs._own_function

    def remembered() -> Any:
        functions.append(own_function())
        return functions[-1]

    monkeypatch.setattr(gil_runs, "_own_function", remembered)
    gil_runs.shared(3, 1, 1, [])
    codes = {id(function.fn.__code__) for function in functions}
    assert len(codes) == len(functions) == 4


@pytest.mark.parametrize("works", [0, 5])
def test_a_thread_that_cannot_spawn_holds_nobody_up(
    works: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Function:
        def __init__(self) -> None:
            self.calls = 0

        def options(self, _: object) -> Function:
            return self

        def __call__(self, _: object) -> None:
            self.calls += 1
            if self.calls > works:
                raise ValueError("thirteen")

    monkeypatch.setattr(gil_runs, "_own_function", Function)
    with pytest.raises(ValueError, match="thirteen"):
        gil_runs.shared(3, 1, 10, [])


# Settings, bars and records


def settings(**given: Any) -> gil.Settings:
    return gil.Settings(**{"quick": True, "peers": ["threadpool"], **given})


def test_the_ladder_ends_with_all() -> None:
    assert gil.ladder(1) == [1]
    assert gil.ladder(6) == [1, 2, 4, 6]
    assert gil.ladder(16) == [1, 2, 4, 8, 16]


def test_the_default_fills_the_issue_s_table() -> None:
    default = gil.Settings(workers=[16])
    chosen = gil.measures(default, ["sweep"])
    held = {
        (c.params["held"], c.params["slices"]): bar.limit
        for measure in chosen
        for c in measure.contestants
        for bar in measure.bars
        if c.runtime == OURS and bar.metric == "efficiency"
    }
    if records.gil_enabled():
        assert held == gil.TABLE
        assert held[0.05, 10] == 0.47
    for measure in chosen:
        assert {c.params["tasks"] for c in measure.contestants} == {1_000}
        pools = [c.workers for c in measure.contestants if c.runtime == THREAD_POOL]
        assert pools == [1, 2, 4, 8, 16]


def test_the_default_takes_four_minutes_at_most_on_sixteen_cores() -> None:
    # Peers that are installed take longer.
    default = gil.Settings(workers=[16], peers=["threadpool"])
    assert gil.measures(default, gil.NAMES)
    assert 60 < default.estimate < 240


def test_the_whole_sweep_covers_what_the_study_asks_for() -> None:
    full = gil.Settings(full=True)
    assert (min(full.times), max(full.times)) == (5e-5, 6.4e-2)
    assert full.shares == (0.0, 0.05, 0.2, 0.5, 1.0)
    assert full.slices == (1, 10, 100)
    assert full.shapes == ("independent", "cholesky", "steps")
    assert full.workers[0] == 1 and full.workers[-1] == records.usable_cores()
    assert all(64 <= full.count(seconds) <= 5_000 for seconds in full.times)


def test_the_best_is_chosen_by_its_median_and_compared_in_each_round() -> None:
    ours, slow, quick = Key(OURS, "c", 2), Key("a", "c", 2), Key("b", "c", 2)
    result = {
        ours: Series({"time": [2.0, 4.0, 5.0]}),
        slow: Series({"time": [1.0, 9.0, 9.0]}),
        quick: Series({"time": [4.0, 4.0, 4.0]}),
        Key("gone", "c", 2): Series(missing="x"),
    }
    keys = [slow, quick, Key("gone", "c", 2), Key("never", "c", 2)]
    assert gil.best(result, keys, "time") == quick
    assert gil.over_best(keys, ours, "time")(result) == [2.0, 1.0, 0.8]
    assert gil.over_best(keys, ours, "time", inverse=True)(result) == [0.5, 1.0, 1.25]
    assert gil.over_best(keys[2:], ours, "time")(result) == []


def test_ours_is_held_against_the_best_fixed_width_and_the_best_pool() -> None:
    [cell] = gil.measures(settings(workers=[4], shares=[0.2]), ["sweep"])
    widths = [c for c in cell.contestants if c.params.get("width")]
    assert [(c.runtime, c.workers) for c in widths] == [
        ("charioteer, gil=1", 4),
        ("charioteer, gil=4", 4),
    ]
    times = {OURS: 2.0, "charioteer, gil=1": 1.9, "charioteer, gil=4": 9.0, THREAD_POOL: 4.0}
    result = {
        c.key: Series({"time": [times[c.runtime]]})
        if c.runtime in times
        else Series(failure="no such luck")
        for c in cell.contestants
    }
    verdicts = {v.bar.metric: (v.values, v.met) for v in cell.verdicts(result)}
    assert verdicts == {
        "speed of our best fixed width": ([0.95], False),
        "speed of the best ThreadPoolExecutor": ([2.0], True),
        "native bodies, of the cores": ([], None),
    }


def test_independent_tasks_have_the_limits_of_bare_threads_beside_them() -> None:
    full = gil.Settings(workers=[8], shares=[0.2], slices=[1], full=True)
    measures = gil.measures(full, ["sweep"])
    limited = {
        c.params["shape"]: (c.runtime, c.workers)
        for measure in measures
        for c in measure.contestants
        if c.runtime in (LIMIT, NATIVE_LIMIT)
    }
    assert limited == {"independent": (NATIVE_LIMIT, 8)}
    threads = [c.workers for c in measures[0].contestants if c.runtime == LIMIT]
    assert threads == ([4, 8] if records.gil_enabled() else [8])
    assert gil._bare(0.0, 16) == [16]
    assert gil._bare(0.05, 16) == [16]
    assert gil._bare(0.2, 16) == [4, 8]
    assert gil._bare(1.0, 16) == [1, 2]
    assert gil._bare(0.2, 2) == [2]


def test_both_interpreters_run_in_the_same_rounds() -> None:
    both = settings(other_python="/elsewhere/python", workers=[2])
    here, there = both.flavours.values()
    assert {here, there} == {None, "/elsewhere/python"}
    for measure in gil.measures(both, gil.NAMES):
        cases = [contestant.case for contestant in measure.contestants]
        assert len({contestant.key for contestant in measure.contestants}) == len(cases)
        runs = Counter(
            (contestant.case.rpartition(", ")[2], contestant.runtime)
            for contestant in measure.contestants
        )
        for (flavour, runtime), count in runs.items():
            if measure.name == "pure" and runtime == LIMIT:
                # With the GIL threads of bytecode take turns: there is no limit to look for.
                assert (flavour, count) == ("free-threaded", 2)
                continue
            assert flavour in ("GIL", "free-threaded")
            assert runs["GIL", runtime] == runs["free-threaded", runtime] == count


def test_contended_things_are_named() -> None:
    [measure] = gil.measures(settings(), ["shared"])
    rates = {"function": 1.0, "space": 2.0, "argument": 3.9}
    result = {}
    for contestant in measure.contestants:
        sharing = contestant.params["sharing"]
        rate = rates[sharing[0]] if len(sharing) == 1 else 4.0
        result[contestant.key] = Series({"spawn rate": [rate, rate]})
    [line] = gil.remarks(measure, result)
    assert line.endswith("the function (4.00 x slower), the space (2.00 x slower)")
    entries = gil._extra(measure, result)
    assert [entry.median for entry in entries] == [4.0, 2.0, pytest.approx(4 / 3.9)]
    assert all(entry.runs == 2 for entry in entries)


def test_the_cost_of_a_build_is_a_ratio_of_the_two() -> None:
    [measure] = gil.measures(settings(other_python="/elsewhere/python"), ["single"])
    result = {
        c.key: Series({"time per round": [3.0 if "free" in c.case else 2.0]})
        for c in measure.contestants
    }
    lines = gil.remarks(measure, result)
    assert len(lines) == len(gil_runs.SINGLE)
    assert all(line.endswith("free-threaded / GIL: 1.50 x") for line in lines)
    assert [entry.median for entry in gil._extra(measure, result)] == [1.5] * len(lines)


# The report


def entry(**given: Any) -> dict[str, Any]:
    """A record of a cell."""
    params = {**TINY, "shape": "independent", "cores": 4, "interpreter": "GIL"}
    params |= given.pop("params", {})
    base = vars(records.record("gil", OURS, "c", params, "efficiency", "", [0.5]))
    return {**base, **given}


def sweep(
    runtime: str, efficiency: float, time: float, python: str = "CPython 3", **params: Any
) -> list[dict[str, Any]]:
    return [
        entry(runtime=runtime, metric=metric, median=value, params=params, python=python)
        for metric, value in (("efficiency", efficiency), ("time", time))
    ]


def test_the_report_shows_the_best_of_every_column() -> None:
    entries = [
        *sweep(OURS, 0.9, 0.2, workers=4),
        *sweep("charioteer, gil=1", 0.7, 0.3, workers=4),
        *sweep("charioteer, gil=2", 0.8, 0.4, workers=4),
        *sweep(THREAD_POOL, 0.6, 0.5, workers=2),
        *sweep(THREAD_POOL, 0.3, 1.0, workers=4),
    ]
    [columns] = gil_report.cells(entries).values()
    shown = {name: (best.efficiency, best.workers) for name, best in columns.items()}
    assert shown == {OURS: (0.9, 4), "charioteer, gil=": (0.8, 4), THREAD_POOL: (0.6, 2)}
    # Eight tasks of 0.1 ms in 0.2 ms.
    assert columns[OURS].speedup == pytest.approx(4.0)


@pytest.mark.parametrize("suffix", pages.SUFFIXES)
def test_reports_are_written(tmp_path: Path, suffix: str) -> None:
    entries = [
        *sweep(OURS, 0.9, 0.2, workers=4),
        *sweep(OURS, 0.8, 0.3, workers=2, cores=2),
        *sweep(OURS, 0.95, 0.1, workers=4, python="CPython 3 free-threaded"),
        *sweep(THREAD_POOL, 0.6, 0.5, workers=2),
        entry(runtime="Ray", median=None, min=None, max=None, runs=0, params={"missing": "<no>"}),
    ]
    path = tmp_path / f"report{suffix}"
    gil_report.write(str(path), entries)
    text = path.read_text()
    for words in ("0.900", "0.600 @2", "side by side", "4 workers", "CPython 3 free-threaded"):
        assert words in text
    plots = text.count("<svg") if suffix == ".html" else len(list(tmp_path.glob("*.svg")))
    assert plots >= 3
    if suffix == ".html":
        assert "Ray: &lt;no&gt;" in text
        ids = re.findall(r' id="([^"]+)"', text)
        assert len(ids) == len(set(ids))


# The command

SMALL = ("--quick", "--runs", "1", "--tasks", "8", "--times", "0.1", "--peers", "threadpool")


def test_the_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "gil.json", tmp_path / "gil.md"
    files = ("--json", str(out), "--report", str(report))
    assert main(["bench", "gil", *SMALL, "--workers", "1,2", *files]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\d+ of \d+ bars met", printed)
    assert re.search(r"about \d+ s", printed)
    assert "contended, " in printed
    entries = json.loads(out.read_text())
    fields = set(vars(records.record("b", "r", "c", {}, "m", "s", [])))
    for item in entries:
        assert set(item) == fields
        assert item["benchmark"] == "gil"
        assert (item["median"] is None) == (item["runs"] == 0) == ("missing" in item["params"])
    measured = {item["runtime"] for item in entries if item["runs"]}
    assert {OURS, NATIVE, THREAD_POOL, LOOP, gil_runs.BARE} <= measured
    first = report.read_text()
    again = tmp_path / "again.md"
    assert main(["bench", "gil", "--from", str(out), "--report", str(again)]) == 0
    assert again.read_text().replace("again-", "gil-") == first


def test_the_command_runs_both_interpreters(tmp_path: Path, monkeypatch: Any) -> None:
    # The same interpreter stands in for one of the other kind.
    monkeypatch.setattr(gil, "check_other_python", lambda _: None)
    out = tmp_path / "gil.json"
    sweep_alone = ("--only", "sweep", "--other-python", sys.executable, "--json", str(out))
    assert main(["bench", "gil", *SMALL, *sweep_alone, "--shares", "0"]) == 0
    entries = json.loads(out.read_text())
    found = {
        item["params"]["interpreter"]
        for item in entries
        if item["runs"] and item["runtime"] == OURS and "interpreter" in item["params"]
    }
    assert found == {"GIL", "free-threaded"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "gallop"), "'gallop'"),
        (("--peers", "pony"), "'pony'"),
        (("--graphs", "tree"), "'tree'"),
        (("--times", "0"), "--times: 0 is not from 0.001"),
        (("--times", "x"), "'x' is no list of numbers"),
        (("--shares", "0,1.5"), "--shares: 1.5"),
        (("--slices", "0.5"), "--slices"),
        (("--workers", "0"), "--workers: 0"),
        (("--json", "/nowhere/f.json"), "does not exist"),
        (("--report", "f.pdf"), ".html or .md"),
        (("--other-python", sys.executable), "both"),
        (("--from", "/nowhere.json", "--report", "/tmp/f.md"), "/nowhere.json"),
        (("--from", "/nowhere.json"), "needs --report"),
    ],
)
def test_wrong_usage_is_explained(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "gil", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_file_without_records_of_the_study_cannot_be_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("[]", "{}", "1", "x", '[{"benchmark": "overhead"}]', "[1]"):
        source = tmp_path / "source.json"
        source.write_text(text)
        report = str(tmp_path / "report.md")
        assert main(["bench", "gil", "--from", str(source), "--report", report]) == 2
        assert "no records" in capsys.readouterr().err
