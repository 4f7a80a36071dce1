"""The demonstration: its kernels, its graph against the serial run and SciPy, its command.

The graph must give bit for bit what the plain loops give, whatever the number of workers: tiles are
updated in place by chains of tasks, so a missing dependency shows as another result. Sizes are
small and leave a rest, so that every kernel meets tiles that are not square.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg

import charioteer as ch
from charioteer import demo
from charioteer.demo import command, gp, kernels, serial

pytestmark = pytest.mark.surface

EXAMPLES = Path(__file__).parents[1] / "examples"

# Start SciPy's BLAS threads here: they are nobody's leak.
scipy.linalg.cho_factor(np.eye(256))
scipy.linalg.blas.dgemm(1.0, np.eye(256), np.eye(256))

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def _random(rows: int, columns: int, seed: int = 0) -> Matrix:
    return np.random.default_rng((seed, rows, columns)).standard_normal((rows, columns))


def _spd(n: int) -> Matrix:
    a = _random(n, n)
    return np.asarray(a @ a.T + n * np.eye(n))


@pytest.fixture(params=[1, 2, 7, 32])
def factored(request: pytest.FixtureRequest) -> tuple[Matrix, Matrix]:
    """A diagonal tile after potrf, and its factor."""
    a = _spd(request.param)
    tile = a.copy()
    kernels.potrf(tile)
    lower = np.tril(tile)
    np.testing.assert_allclose(lower @ lower.T, a, rtol=1e-12)
    np.testing.assert_array_equal(np.triu(tile, 1), np.triu(a, 1))
    return tile, lower


def test_triangular_kernels(factored: tuple[Matrix, Matrix]) -> None:
    diagonal, lower = factored
    n = len(lower)
    for m in (1, 3, n, n + 5):
        wide, tall = _random(m, n), _random(n, m)
        a = wide.copy()
        kernels.trsm(diagonal, a)
        np.testing.assert_allclose(a @ lower.T, wide, atol=1e-12)
        y = tall.copy()
        kernels.solve_forward(diagonal, y)
        np.testing.assert_allclose(lower @ y, tall, atol=1e-12)
        y = tall.copy()
        kernels.solve_backward(diagonal, y)
        np.testing.assert_allclose(lower.T @ y, tall, atol=1e-12)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 3, 7), (8, 8, 8), (2, 9, 4)])
def test_product_kernels(m: int, n: int, k: int) -> None:
    a, b, c = _random(m, k, 1), _random(n, k, 2), _random(m, n, 3)
    tile = c.copy()
    kernels.gemm(a, b, tile)
    np.testing.assert_allclose(tile, c - a @ b.T, atol=1e-13)

    square = _random(m, m, 4)
    tile = square.copy()
    kernels.syrk(a, tile)
    np.testing.assert_allclose(np.tril(tile), np.tril(square - a @ a.T), atol=1e-13)
    np.testing.assert_array_equal(np.triu(tile, 1), np.triu(square, 1))

    solved, y = _random(k, n, 5), _random(m, n, 6)
    tile = y.copy()
    kernels.update_forward(a, solved, tile)
    np.testing.assert_allclose(tile, y - a @ solved, atol=1e-13)
    tile = y.copy()
    kernels.add_scores(a, solved, tile)
    np.testing.assert_allclose(tile, y + a @ solved, atol=1e-13)

    below, y = _random(m, n, 7), _random(k, n, 8)
    tile = y.copy()
    kernels.update_backward(a, below, tile)
    np.testing.assert_allclose(tile, y - a.T @ below, atol=1e-13)


def test_kernel_matrix_tile() -> None:
    p, q = _random(5, 3, 1), _random(4, 3, 2)
    left, right = gp.augment(p)[0], gp.augment(q)[1]
    tile = np.zeros((5, 4))
    kernels.rbf(tile, left, right)
    distances = ((p[:, None] - q[None]) ** 2).sum(-1)
    np.testing.assert_allclose(tile, np.exp(-0.5 * distances), rtol=1e-13)
    square = np.zeros((5, 5))
    kernels.rbf(square, left, gp.augment(p)[1], 0.25)
    np.testing.assert_allclose(np.diag(square), 1.25)


def test_potrf_refuses_what_is_not_positive_definite() -> None:
    a = -np.eye(3)
    a[:2, :2] = np.eye(2)
    with pytest.raises(ch.NativeError) as caught:
        kernels.potrf(a)
    assert caught.value.code == 3


def test_kernels_run_without_the_gil() -> None:
    a, b, c = (np.ones((1200, 1200)) for _ in range(3))
    # A tick in the middle of the call proves it. A busy machine may deny us one; then once more.
    for _ in range(10):
        span: list[float] = []

        def call(span: list[float] = span) -> None:
            span.append(time.perf_counter())
            kernels.gemm(a, b, c)
            span.append(time.perf_counter())

        thread = threading.Thread(target=call)
        thread.start()
        ticks = []
        while thread.is_alive():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)
        thread.join()
        margin = 0.2 * (span[1] - span[0])
        if any(span[0] + margin < tick < span[1] - margin for tick in ticks):
            return
    pytest.fail("nothing else ran while a kernel did")


def _run(work: gp.Workspace, bodies: Any = "python") -> np.ndarray[Any, np.dtype[np.intp]]:
    labels = gp.spawn_graph(work, T := gp.Spaces(), bodies=bodies)
    T.backward[0].result()
    answers = labels.result()
    return np.concatenate(answers) if answers else np.empty(0, np.intp)


@pytest.mark.parametrize("bodies", ["python", "native"])
@pytest.mark.parametrize(("n", "tile"), [(1, 4), (6, 6), (13, 4), (60, 16), (101, 9)])
def test_graph_equals_the_serial_run(rt_any: ch.Runtime, n: int, tile: int, bodies: str) -> None:
    work = gp.Workspace(gp.synthetic(n, classes=3), tile)
    serial.run(work)
    factor, weights = work.lower(), work.solution()
    for _ in range(3):
        work.clear()
        _run(work, bodies)
        np.testing.assert_array_equal(work.lower(), factor)
        np.testing.assert_array_equal(work.solution(), weights)


def test_graph_against_scipy(rt: ch.Runtime) -> None:
    work = gp.Workspace(gp.synthetic(150), 32)
    serial.build(work)
    lower = work.lower()
    full = lower + np.tril(lower, -1).T
    _run(work)
    factor = scipy.linalg.cho_factor(full, lower=True)
    np.testing.assert_allclose(work.lower(), np.tril(factor[0]), atol=1e-12)
    weights = scipy.linalg.cho_solve(factor, work.problem.targets)
    np.testing.assert_allclose(work.solution(), weights, rtol=1e-9, atol=1e-9)


def test_digits(rt: ch.Runtime) -> None:
    problem = gp.digits()
    assert len(problem.points) + len(problem.test_points) == 1797
    work = gp.Workspace(problem, 256)
    _, expected = serial.run(work)
    work.clear()
    labels = _run(work)
    np.testing.assert_array_equal(labels, expected)
    assert np.mean(labels == problem.test_labels) > 0.98


@pytest.mark.parametrize("bodies", ["python", "native"])
def test_a_failed_factorization_reaches_the_answer(bodies: Any) -> None:
    work = gp.Workspace(gp.synthetic(40, noise=-2.0), 16)
    for _ in range(2):
        with ch.Runtime(workers=2):
            graph = gp.Spaces()
            gp.spawn_graph(work, graph, bodies=bodies)
            with pytest.raises(ch.DependencyError) as caught:
                graph.backward[0].result()
            assert isinstance(caught.value.__cause__, ch.NativeError)


def test_native_tasks_of_empty_matrices_touch_nothing(rt_any: ch.Runtime) -> None:
    work = gp.Workspace(gp.synthetic(20), 8)
    serial.build(work)
    before = work.lower()
    gp.spawn_cholesky_native(work, T := gp.Spaces(), empty=True)
    T.potrf.result()
    T.gemm.result()
    assert len(T.potrf) == 3 and len(T.gemm) > 0
    np.testing.assert_array_equal(work.lower(), before)


@pytest.mark.parametrize("sizes", [(0, 16), (-1, 16), (16, 0)])
def test_sizes_must_be_positive(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="positive"):
        gp.Workspace(gp.synthetic(sizes[0]), sizes[1])
    with pytest.raises(ValueError, match="positive"):
        command.measure(gp.synthetic(8), 4, runs=0)


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--factor-only"],
        ["--compare"],
        ["--bodies", "native"],
        ["--bodies", "native", "--factor-only", "--compare"],
    ],
)
def test_command(extra: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "records.json"
    arguments = ["--size", "90", "--tile", "32", "--workers", "2", "--runs", "2"]
    assert demo.main([*arguments, "--json", str(path), *extra]) == 0
    printed = capsys.readouterr().out
    for word in ("workers", "tasks", "makespan", "efficiency", "overhead", "relative error"):
        assert word in printed
    assert ("speed-up" in printed) == ("--compare" in extra)
    assert "accuracy" not in printed
    entries = json.loads(path.read_text())
    metrics = {entry["metric"] for entry in entries}
    assert metrics >= {"makespan", "efficiency", "overhead per task", "relative error"}
    assert ("speed-up" in metrics) == ("native gain" in metrics) == ("--compare" in extra)
    makespans = [entry for entry in entries if entry["metric"] == "makespan"]
    kinds = {"native" if "native" in extra else "python"}
    assert {entry["params"]["bodies"] for entry in makespans} == (
        {"python", "native"} if "--compare" in extra else kinds
    )
    for entry in entries:
        assert entry["benchmark"] == "demo"
        assert entry["min"] <= entry["median"] <= entry["max"]
        assert entry["params"]["n"] == 90


def test_command_on_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--tile", "256", "--runs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "1,437 to fit, 360 held out" in printed
    assert "accuracy" in printed and "labels equal" in printed


def test_command_inline(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--size", "50", "--tile", "16", "--workers", "0", "--runs", "1"]) == 0
    assert "inline" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", ["syrk", "update_backward", "trsm"])
def test_a_wrong_result_fails_the_check(
    kernel: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first is wrong in the serial run too, so only SciPy's factor can tell; the second is
    # wrong in tasks alone, so only the serial run can; the third leaves no number at all.
    right = getattr(kernels, kernel)

    def wrong(*tiles: Matrix) -> None:
        right(*tiles)
        if kernel == "trsm":
            tiles[-1].fill(np.nan)
        elif kernel == "syrk" or threading.current_thread() is not threading.main_thread():
            tiles[-1][0, 0] += 1e-3

    monkeypatch.setattr(kernels, kernel, wrong)
    assert demo.main(["--size", "90", "--tile", "32", "--workers", "2", "--runs", "1"]) == 1
    assert "check failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--size", "0"],
        ["--size", "many"],
        ["--size", "10000000"],
        ["--tile", "-3"],
        ["--runs", "0"],
        ["--workers", "-1"],
        ["--size", "8", "--json", "/no/such/directory/records.json"],
        ["--bodies", "cuda"],
        ["--colour"],
    ],
)
def test_bad_arguments_end_with_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert demo.main([]) == 2
    told = capsys.readouterr().err
    assert "scikit-learn is not installed" in told and "charioteer[demo]" in told


def test_the_package_itself_needs_no_scipy() -> None:
    code = "import charioteer.demo, sys; raise SystemExit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_factorization_may_run_on_devices() -> None:
    machine = ch.Machine.virtual(2)
    report = command.measure(gp.synthetic(90), 32, workers=2, runs=1, machine=machine)
    assert report.passed
    with pytest.raises(SystemExit):
        demo.main(["--machine", "virtual:many"])


@pytest.mark.parametrize(
    "command_line",
    [
        ["gp_classification.py", "--tile", "300", "--workers", "2"],
        ["adaptive_quadrature.py", "--lines", "40", "--workers", "2"],
        ["wide_and_narrow.py", "--tasks", "500", "--seed", "1"],
        ["adaptive_quadrature.py", "--lines", "1", "--tolerance", "1e-10", "--workers", "0"],
    ],
)
def test_example(command_line: list[str]) -> None:
    script, *arguments = command_line
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check failed" not in done.stdout
