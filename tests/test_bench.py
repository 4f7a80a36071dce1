"""The benchmark harness: rounds, bars, records, probes and the peers' absence."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import charioteer as ch
from charioteer.bench import native, overhead, peers, probes, records, report, workloads
from charioteer.bench.harness import (
    OURS,
    Bar,
    Contestant,
    Key,
    Measure,
    Missing,
    Sample,
    Series,
    Verdict,
    interleave,
    ratio,
)

pytestmark = pytest.mark.surface

ROOT = Path(__file__).resolve().parent.parent
FIELDS = [
    *("benchmark", "runtime", "case", "params", "metric", "unit"),
    *("median", "min", "max", "runs", "values", "bar", "met", "machine", "python", "commit"),
]


def contestant(name: str, log: list[str], *outcomes: float | Exception) -> Contestant:
    """A contestant that notes its runs and gives or raises the outcomes in turn."""
    queue = list(outcomes)

    def once() -> Sample:
        log.append(name)
        outcome = queue.pop(0) if len(queue) > 1 else queue[0]
        if isinstance(outcome, Exception):
            raise outcome
        return Sample({"time": outcome})

    return Contestant(name, "case", once)


# Rounds


def test_rounds_interleave_and_start_one_further_along_each_time() -> None:
    log: list[str] = []
    result = interleave([contestant(name, log, 1.0) for name in "abc"], runs=3, warmup=1)
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"
    assert all(series.values == {"time": [1.0] * 3} for series in result.values())


def test_a_process_of_its_own_has_no_part_in_a_round_that_is_not_counted() -> None:
    log: list[str] = []
    others = [contestant(name, log, 1.0) for name in "ab"]
    own = replace(contestant("own", log, 2.0), warms=False)
    result = interleave([*others, own], runs=2, warmup=1)
    assert log.count("own") == 2 and log.count("a") == 3
    assert "own" not in log[:2]
    assert result[own.key].values["time"] == [2.0, 2.0]


def test_warm_up_rounds_are_not_counted() -> None:
    result = interleave([contestant("a", [], 100.0, 1.0, 2.0, 3.0)], runs=3, warmup=1)
    assert result[Key("a", "case")].values == {"time": [1.0, 2.0, 3.0]}


def test_what_is_missing_or_fails_does_not_stop_the_others() -> None:
    log: list[str] = []
    result = interleave(
        [
            contestant("missing", log, Missing("pony is not installed")),
            contestant("failing", log, 1.0, 1.0, ValueError("thirteen\nmore")),
            contestant("sound", log, 1.0),
        ],
        runs=3,
    )
    assert result[Key("missing", "case")].problem == "missing: pony is not installed"
    assert result[Key("failing", "case")].problem == "failed: ValueError: thirteen"
    assert result[Key("failing", "case")].values == {}
    assert result[Key("sound", "case")].values == {"time": [1.0] * 3}
    assert log.count("missing") == 1
    assert log.count("failing") == 3


def test_interrupts_are_no_failures_of_a_contestant() -> None:
    def interrupt() -> Sample:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave([Contestant("a", "case", interrupt)], runs=1)


def test_steps_cover_dropped_out_contestants() -> None:
    steps: list[tuple[str, bool]] = []
    two = [contestant("gone", [], Missing("x")), contestant("here", [], 1.0)]
    interleave(two, runs=2, step=lambda who, done: steps.append((who.runtime, done)))
    measure = Measure("m", "M", two, {"time": "s"})
    assert sum(done for _, done in steps) == measure.steps(2) == 6
    assert steps[:2] == [("gone", False), ("gone", True)]


def test_interleave_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="runs"):
        interleave([contestant("a", [], 1.0)], runs=0)
    with pytest.raises(ValueError, match="same runtime"):
        interleave([contestant("a", [], 1.0), contestant("a", [], 1.0)], runs=1)
    assert interleave([], runs=1) == {}


# Bars


def series(**values: list[float]) -> dict[Key, Series]:
    return {Key(name, "case"): Series({"time": list(times)}) for name, times in values.items()}


def test_ratios_are_formed_within_a_round() -> None:
    over = ratio(Key("a", "case"), Key("b", "case"), "time", scale=10.0)
    assert over(series(a=[1.0, 8.0], b=[2.0, 4.0])) == [5.0, 20.0]
    assert over(series(a=[1.0], b=[0.0])) == [math.inf]
    assert over(series(a=[1.0], b=[])) == []
    assert over(series(a=[1.0])) == []


@pytest.mark.parametrize(
    ("values", "at_most", "at_least"),
    [([1.0, 2.0, 9.0], True, True), ([1.9], True, False), ([2.1], False, True), ([], None, None)],
)
def test_a_bar_is_held_against_the_median(
    values: list[float], at_most: bool | None, at_least: bool | None
) -> None:
    def bar(at_least: bool) -> Bar:
        return Bar("case", "time", "s", lambda _: values, 2.0, at_least=at_least)

    assert Verdict(bar(False), values).met is at_most
    assert Verdict(bar(True), values).met is at_least
    assert (bar(False).text, bar(True).text) == ("≤ 2 s", "≥ 2 s")


def test_every_bar_of_the_project_is_held() -> None:
    settings = overhead.Settings(other_python=sys.executable)
    held = {
        (measure.name, bar.case, bar.workers, bar.metric): bar.text
        for measure in overhead.measures(settings, overhead.NAMES)
        for bar in measure.bars
    }
    both = {}
    for workers in (1, 2):
        both |= {
            ("tasks", overhead.EMPTY, workers, "ThreadPoolExecutor / charioteer"): "≥ 10 x",
            ("tasks", overhead.EMPTY, workers, "Ray / charioteer"): "≥ 400 x",
            ("tasks", overhead.CHAIN, workers, "this / empty"): "≤ 1.5 x",
            ("tasks", overhead.GRID, workers, "this / empty"): "≤ 2 x",
            ("tasks", "spawn_many", workers, "time per task"): "≤ 0.6 µs",
            ("tasks", ".map", workers, "time per task"): "≤ 0.6 µs",
            ("data", overhead.CALL, workers, "time per task"): "≤ 4 µs",
            ("data", overhead.DATA_MAP, workers, "time per task"): "≤ 1.5 µs",
            ("data", "Cholesky of 64 x 64 tiles", workers, "time per task"): "≤ 5 µs",
        }
        for latency in ("spawn to start", "result() round trip"):
            both["latency", latency, workers, "charioteer / ThreadPoolExecutor"] = "≤ 1 x"
    pending, many = "1,000,000 pending, ", "10,000,000 tasks, "
    assert held == both | {
        ("native", "1,000 times 1 ms", 2, "efficiency"): "≥ 0.97",
        ("memory", pending + "handles dropped", None, "memory per task"): "≤ 1024 B",
        ("memory", pending + "handles kept", None, "memory per task"): "≤ 1024 B",
        ("flat", many + "anonymous", None, "growth"): "≤ 4 MiB",
        ("flat", many + "rotating spaces", None, "growth"): "≤ 4 MiB",
        ("data", "20 times Cholesky of 64 x 64 tiles", None, "growth"): "≤ 4 MiB",
        ("idle", "10 s of an open runtime", 16, "processor time"): "≤ 50 ms",
        ("start", "start and close", 2, "time"): "≤ 2 ms",
        ("import", "import charioteer", None, "above import numpy"): "≤ 60 ms",
        ("free-threading", overhead.EMPTY, 2, "free-threaded / GIL"): "≤ 1.6 x",
    }


def test_the_quick_benchmark_leaves_out_peers_with_processes_and_says_so() -> None:
    [tasks] = overhead.measures(overhead.Settings(quick=True), ["tasks"])
    runtimes = {contestant.runtime for contestant in tasks.contestants}
    assert runtimes == {OURS, "ThreadPoolExecutor", "joblib threads", "Dask threads"}
    nothing = {contestant.key: Series(failure="x") for contestant in tasks.contestants}
    lacking = {v.bar.lacking for v in tasks.verdicts(nothing) if v.met is None}
    assert "charioteer and Ray" in lacking


# Records


def test_a_record_has_the_documented_fields() -> None:
    entry = records.record("b", "r", "c", {"workers": 2}, "time", "s", [3.0, 1.0, 2.0])
    assert list(vars(entry)) == FIELDS
    assert (entry.median, entry.min, entry.max, entry.runs) == (2.0, 1.0, 3.0, 3)
    empty = records.record("b", "r", "c", {}, "time", "s", [], python="other")
    assert (empty.median, empty.min, empty.max, empty.runs) == (None, None, None, 0)
    assert empty.python == "other"


def test_the_machine_is_described_without_its_name() -> None:
    assert records.cpu_model() in records.machine()
    assert f"{records.usable_cores()} cores" in records.machine()
    host = socket.gethostname()
    assert len(host) < 3 or host not in records.machine()


def test_records_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    good = records.record("b", "r", "c", {"n": 1}, "time", "s", [1.0])
    records.write_json(path, [good, good])
    entries = json.loads(path.read_text())
    assert len(entries) == 2
    assert list(entries[0]) == FIELDS
    bad = records.record("b", "r", "c", {"n": object()}, "time", "s", [1.0])
    with pytest.raises(TypeError):
        records.write_json(path, [bad])
    assert json.loads(path.read_text()) == entries
    assert list(tmp_path.iterdir()) == [path]


def load(path: Path) -> ModuleType:
    """A module from a file, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_commit_of_somebody_elses_repository_is_not_ours(tmp_path: Path) -> None:
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    copy = tmp_path / "records.py"
    shutil.copy(records.__file__, copy)

    def run(*arguments: str) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run([git, *identity, "-C", str(tmp_path), *arguments], check=True)

    run("init", "-q")
    run("commit", "-q", "--allow-empty", "-m", "theirs")
    assert load(copy).commit() == f"version {ch.__version__}"
    run("add", "records.py")
    run("commit", "-q", "-m", "ours")
    commit = load(copy).commit()
    assert len(commit) == 12
    copy.write_text(copy.read_text() + "\n")
    assert load(copy).commit() == f"{commit}-dirty"


def test_missing_and_derived_values_have_records_too() -> None:
    slow = Contestant("slow", "case", lambda: Sample({"time": 4.0}, "Other 3"), 2, {"tasks": 7})
    ours = Contestant(OURS, "case", lambda: Sample({"time": 2.0}), 2)
    gone = contestant("gone", [], Missing("pony is not installed"))
    bars = [
        Bar("case", "slow / ours", "x", ratio(slow.key, ours.key, "time"), 1.0, workers=2),
        Bar("case", "gone / ours", "x", ratio(gone.key, ours.key, "time"), 1.0, lacking="a pony"),
        Bar("case", "time", "s", lambda _: [2.0], 1.0, derived=False),
    ]
    measure = Measure("m", "M", [slow, ours, gone], {"time": "s"}, bars)
    result = interleave(measure.contestants, runs=2)
    entries = measure.records("bench", result)
    told = [
        (e.runtime, e.metric, e.median, e.runs, e.params, e.python == "Other 3") for e in entries
    ]
    assert told == [
        ("slow", "time", 4.0, 2, {"workers": 2, "tasks": 7}, True),
        (OURS, "time", 2.0, 2, {"workers": 2}, False),
        ("gone", "time", None, 0, {"missing": "pony is not installed"}, False),
        (OURS, "slow / ours", 2.0, 2, {"workers": 2}, False),
        (OURS, "gone / ours", None, 0, {"missing": "needs a pony"}, False),
    ]


# Words for people


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0 s"),
        (0.51234, "0.512 s"),
        (12.345, "12.3 s"),
        (999.6, "1,000 s"),
        (1234567.0, "1,234,567 s"),
        (-1.5, "-1.50 s"),
        (math.inf, "inf s"),
    ],
)
def test_quantities_have_three_digits(value: float, words: str) -> None:
    assert report.quantity(value, "s") == words


# Workloads and probes: small, on the real runtime


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "function",
    [
        workloads.empty,
        workloads.chain,
        workloads.spawn_many,
        workloads.task_map,
        workloads.runtime_map,
        workloads.executor_map,
        peers.PEERS["threadpool"].empty,
    ],
)
def test_workloads_run_and_are_timed(function: object, workers: int) -> None:
    assert callable(function)
    assert 0 < function(100, workers) < 30


def test_latencies_start_before_they_end() -> None:
    for function in (workloads.charioteer_latency, workloads.executor_latency):
        start, trip = function(10, 2)
        assert 0 < start < trip


def test_the_native_body_lasts_about_as_long_as_asked() -> None:
    body = native.calibrated(1e-3)
    # Far off only if the calibration is wrong: the machine may be busy with other things.
    assert 2e-4 < native.serial(body, 20) / 20 < 5e-2
    assert native.bare_threads(body, 5, 2) > 0
    assert workloads.native(body, 5, 2) > 0


@pytest.mark.parametrize(
    ("probe", "params", "metric"),
    [
        ("empty", {"workers": 2, "tasks": 100}, "time per task"),
        ("pending", {"tasks": 1_000, "keep": True}, "memory per task"),
        ("anonymous", {"tasks": 20_000}, "growth"),
        ("rotating", {"tasks": 20_000}, "growth"),
        ("cholesky", {"n": 4, "repetitions": 20}, "growth"),
        ("idle", {"workers": 4, "seconds": 0.1}, "processor time"),
        (
            "gil",
            {"run": "single", "given": {"what": "a loop", "rounds": 10}},
            "time per round",
        ),
        ("peer", {"peer": "threadpool", "workers": 1, "tasks": 10}, "time per task"),
        (
            "metg",
            {"runtime": "threadpool", "pattern": "fft", "workers": 1, "seconds": 1e-3},
            "METG(50%)",
        ),
    ],
)
def test_probes_answer(probe: str, params: dict[str, object], metric: str) -> None:
    sample = probes.call(probe, timeout=50, **params)
    assert math.isfinite(sample.values[metric])
    assert sample.python == records.python_version()
    assert probe in probes.PROBES


def test_every_probe_is_tested() -> None:
    marks = test_probes_answer.pytestmark  # type: ignore[attr-defined]
    [cases] = [mark.args[1] for mark in marks if mark.name == "parametrize"]
    assert {case[0] for case in cases} | {"multi_device"} == set(probes.PROBES)


@pytest.mark.parametrize("peer", peers.MULTI_DEVICE)
def test_peers_over_several_devices_answer_if_they_are_there(peer: str) -> None:
    call = functools.partial(
        probes.call, "multi_device", timeout=50, peer=peer, width=2, devices=4, tasks=10
    )
    if importlib.util.find_spec("ray") is None:
        with pytest.raises(Missing, match="ray is not installed"):
            call()
    else:
        assert math.isfinite(call().values["time per task"])


def test_probes_that_fail_say_why(tmp_path: Path) -> None:
    with pytest.raises(probes.ProbeError, match="KeyError: 'gallop'"):
        probes.call("gallop")
    with pytest.raises(probes.ProbeError, match="cannot run"):
        probes.call("empty", python=str(tmp_path / "python"), workers=1, tasks=1)
    with pytest.raises(probes.ProbeError, match=r"within 0\.01 s"):
        probes.call("idle", workers=1, seconds=1.0, timeout=0.01)


def test_import_time_is_measured_in_milliseconds() -> None:
    assert 1 < probes.import_time("numpy").values["time"] < 50_000


def test_peers_that_are_not_installed_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(peers.PEERS) == ["threadpool", "joblib", "dask", "distributed", "ray"]
    for name in ("joblib", "dask", "distributed", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(Missing, match=f"{name} is not installed"):
            peers.PEERS[name].empty(10, 2)
    for empty_over_devices in peers.MULTI_DEVICE.values():
        with pytest.raises(Missing, match="ray is not installed"):
            empty_over_devices(2, 8, 10)


# The Taskflow peer of the core's benchmark

STAND_IN = """
#pragma once
#include <cstddef>
#define TF_MAJOR_VERSION 9
#define TF_MINOR_VERSION 8
#define TF_PATCH_VERSION 7
namespace tf {
struct AsyncTask {};
struct Executor {
  explicit Executor(std::size_t) {}
  template <class F> void silent_async(F&& f) { f(); }
  template <class F, class... D> AsyncTask silent_dependent_async(F&& f, D&&...) { f(); return {}; }
  void wait_for_all() {}
};
}
"""


def taskflow() -> ModuleType:
    """The runner of the Taskflow harness."""
    return load(ROOT / "benchmarks" / "peers" / "taskflow" / "run.py")


@pytest.mark.parametrize(("name", "language"), [("Taskflow", "C++"), ("StarPU", "C")])
def test_a_peer_without_a_compiler_is_missing(
    name: str, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = load(ROOT / "benchmarks" / "peers" / name.lower() / "run.py")
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    entries = runner.collect(None, 2, 100, 3)
    assert len(entries) == 3
    for entry in entries:
        assert (entry.runtime, entry.median, entry.runs) == (name, None, 0)
        assert entry.params["missing"] == f"no {language} compiler is installed"


def test_starpu_that_does_not_link_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler is installed")
    runner = load(ROOT / "benchmarks" / "peers" / "starpu" / "run.py")
    monkeypatch.setattr(runner, "BUILD", tmp_path / "build")
    monkeypatch.setattr(runner, "found", lambda: ([], []))
    (tmp_path / "starpu.h").write_text("#error broken\n")
    with pytest.raises(runner.Missing, match="headers"):
        runner.build(str(tmp_path / "nowhere"))
    with pytest.raises(runner.Missing, match="headers"):
        runner.build(str(tmp_path))
    (tmp_path / "starpu.h").write_text("\n")
    with pytest.raises(runner.BuildError, match="starpu_task"):
        runner.build(str(tmp_path))


def test_taskflow_harness_builds_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler is installed")
    runner = taskflow()
    monkeypatch.setattr(runner, "BUILD", tmp_path / "build")
    header = tmp_path / "taskflow" / "taskflow.hpp"
    header.parent.mkdir()
    header.write_text(STAND_IN)
    entries = runner.collect(str(tmp_path), 2, 100, 3)
    assert [entry.case for entry in entries] == list(runner.CASES.values())
    for entry in entries:
        assert entry.runs == 3
        assert entry.median is not None
        assert entry.params == {"workers": 2, "tasks": 100, "version": "9.8.7"}
    header.write_text("#error broken\n")
    with pytest.raises(runner.Missing):
        runner.build(str(tmp_path))
    header.write_text("#pragma once\n")
    with pytest.raises(runner.BuildError, match="tf"):
        runner.build(str(tmp_path))
