"""The applications: right on cores, by hand, on virtual GPUs and in virtual time; the bounds of a
program in virtual time on known ones; the study of them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import APPLICATIONS, APPS
from support import application as load

import charioteer as ch
from charioteer import cpu, gpu, virtual
from charioteer.bench.simulated import LAUNCH, MEMORY, kernel, simulate

EVERY = pytest.mark.parametrize("name", APPLICATIONS)

# BLAS threads of SciPy start here: they are nobody's leak.
application, cases = load("application"), load("study")


def small(app: Any) -> Any:
    return app.problem(*app.SIZES["tiny"])


def spoilt(found: Any) -> Any:
    """A result of which the last part is another."""
    if isinstance(found, np.ndarray):
        found = found.copy()
        found.flat[-1] += 1
        return found
    if isinstance(found, (list, tuple)):
        *others, last = found
        if isinstance(last, np.ndarray) and last.dtype.kind == "i":  # the order of LU's rows
            return type(found)([*others, last[::-1]])
        return type(found)([*others, spoilt(last)])
    return found + 1


@EVERY
def test_every_program_of_an_application_is_right(name: str) -> None:
    app = load(name)
    given = small(app)
    with ch.Runtime(ch.Machine.virtual(0), workers=2):
        found = app.tasks(given)
    for result in (found, app.serially(given), app.threads(given, 2)):
        assert app.error(result, given) <= app.LIMIT
    assert app.error(spoilt(found), given) > app.LIMIT


@EVERY
def test_on_virtual_gpus(name: str) -> None:
    app = load(name)
    with ch.Runtime(ch.Machine.virtual(3), workers=2):
        # Devices keep nothing of the first problem that the second one could take for its own.
        for size in ("tiny", "small"):
            given = app.problem(*app.SIZES[size])
            assert app.error(app.tasks(given, 3), given) <= app.LIMIT


@EVERY
def test_in_virtual_time(name: str) -> None:
    app = load(name)
    given = small(app)
    free = [getattr(app, one) for one in app.PORTABLE]
    runs = []
    for gpus in (1, 2, 2):
        with application.on_gpus(app):
            runs.append(simulate(lambda gpus=gpus: app.tasks(given, gpus), gpus))
    assert [getattr(app, one) for one in app.PORTABLE] == free
    for run in runs:
        assert app.error(run.found, given) <= app.LIMIT
        assert run.chain > 0 and run.work > 0 and run.link > 0 and run.moved > 0
        assert run.bound <= run.makespan
    assert runs[1][1:] == runs[2][1:], "a run in virtual time is like the other"


# ---- virtual time of known programs ----


def test_the_bounds_of_a_known_program() -> None:
    size = 100_000

    @ch.task(placement=gpu)
    def add(a: ch.InOut[Any]) -> None:
        a += 1.0

    def program() -> Any:
        arrays = [ch.zeros(size) for _ in range(3)]
        for array in (arrays[0], arrays[0], arrays[0], arrays[1], arrays[2]):
            add(array)
        return [array.numpy() for array in arrays]

    one = LAUNCH + 2 * 8 * size / MEMORY  # it is read and written
    for gpus in (1, 2):
        run = simulate(program, gpus)
        assert [float(array[0]) for array in run.found] == [3.0, 1.0, 1.0]
        assert run.chain == pytest.approx(3 * one)
        assert run.work == pytest.approx(5 * one / gpus)
        assert run.moved == 2 * 3 * 8 * size  # to where they are added to, and home
        link = ch.Machine.virtual(gpus).links.host
        copy = link.latency + 8 * size / link.bandwidth
        assert run.link == pytest.approx((3 if gpus == 1 else 2) * copy)
        assert run.makespan >= run.bound == max(run.chain, run.work, run.link)


def test_what_waits_of_other_devices_take_counts_once() -> None:
    @ch.task(placement=gpu * 2)
    def both() -> None:
        context = ch.current()
        for _ in context.each():
            context.xp.zeros(10)

    run = simulate(lambda: both().result(), 2)
    one = LAUNCH + 80 / MEMORY
    assert (run.chain, run.work, run.moved) == (pytest.approx(one), pytest.approx(one), 0)
    assert simulate(lambda: None, 1)[1:] == (0.0, 0, 0.0, 0.0, 0.0)


def test_kernels_take_what_their_arithmetic_or_memory_takes() -> None:
    shapes = {
        "matmul": [(200, 300), (300, 100), (200, 100)],
        "cholesky": [(300, 300), (300, 300)],
        "qr": [(9000, 30), (30, 30)],
        "solve": [(100, 100), (100, 500), (100, 500)],
        "inv": [(100, 100), (100, 100)],
        "sort": [(1024,), (1024,)],
        "add": [(100, 100), (100, 100), (100, 100)],
    }
    took = {}
    with ch.Machine.virtual(gpus=1, memory="64MiB", time="virtual").open() as opened:
        with virtual.stream(opened.stream(0)):
            for name, each in shapes.items():
                arrays = [virtual.empty(shape) for shape in each]
                took[name] = kernel(name, arrays, arithmetic=1e6) - LAUNCH
                assert kernel(name, arrays, arithmetic=1e18) - LAUNCH == pytest.approx(
                    sum(array.nbytes for array in arrays) / MEMORY
                )
    assert took == pytest.approx(
        {
            "matmul": 12,
            "cholesky": 9,
            "qr": 16.2,
            "solve": 5,
            "inv": 2,
            "sort": 0.01024,
            "add": 0.01,
        }
    )


# ---- the folder and the study ----


@pytest.mark.surface
def test_the_folder_is_what_is_measured_and_told() -> None:
    assert sorted(app.__name__ for app in cases.APPS.values()) == APPLICATIONS
    told = (APPS.parent / "README.md").read_text()
    for name in APPLICATIONS:
        assert f"(apps/{name}.py)" in told
        app = load(name)
        for part in application.Application.__annotations__:
            assert hasattr(app, part), f"{name} has no {part}"
        assert list(app.SIZES) == ["tiny", "small", "medium", "large"]
        assert cases.lines(app.CORE) > 10
        assert all(isinstance(getattr(app, one), ch.TaskFunction) for one in app.PORTABLE)


@pytest.mark.surface
def test_lines_are_those_of_code() -> None:
    def counted(a: int) -> int:
        """Not
        this."""
        # Nor this.
        if a:
            a += 1  # but this
        return a

    assert cases.lines([counted]) == 4


@pytest.mark.surface
@pytest.mark.parametrize(
    "command_line",
    [
        ("lu.py", "--size", "tiny"),
        ("fft2d.py", "--size", "tiny", "--machine", "virtual:3"),
        ("inference.py", "--size", "tiny", "--machine", "virtual:2", "--workers", "1"),
        ("batched_cholesky.py", "--size", "tiny", "--machine", "virtual:0"),
    ],
)
def test_scripts(command_line: tuple[str, ...]) -> None:
    script, *arguments = command_line
    done = subprocess.run(
        [sys.executable, "-W", "error", str(APPS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "error" in done.stdout


@pytest.mark.surface
def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    app = load("jacobi")
    monkeypatch.setattr(app, "tasks", lambda given, gpus: given.grid)
    assert application.main(app, ["--size", "tiny"]) == 1
    with pytest.raises(ArithmeticError, match="the result is wrong"):
        cases.check(app, small(app).grid, small(app))


@pytest.mark.surface
def test_batched_cholesky_takes_the_fastest_set_for_each_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert load("batched_cholesky").main(["--machine", "virtual:4"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = {row[0]: [int(count) for count in row[1:4]] for row in rows[2:5]}
    assert {size: sum(chosen) for size, chosen in counts.items()} == dict.fromkeys(counts, 12)
    most = {size: chosen.index(max(chosen)) for size, chosen in counts.items()}
    assert most == {"32": 0, "256": 1, "1024": 2}  # a core, a GPU, two
    assert all(max(chosen) >= 6 for chosen in counts.values())


@pytest.mark.surface
def test_applications_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "apps.json"
    arguments = ["--sizes", "tiny", "--runs", "1", "--only", "Jacobi,inference"]
    assert cases.main([*arguments, "--json", str(path)]) == 0
    entries = json.loads(path.read_text())
    for name in ("Jacobi", "inference"):
        mine = [one for one in entries if one["case"] == f"{name}, tiny"]
        assert {(one["runtime"], one["params"]["workers"]) for one in mine} == {
            *(("serial program", 1), ("threads by hand", 2)),
            *(("charioteer", 1), ("charioteer", 2)),
        }
        assert all(one["median"] > 0 for one in mine)
        assert any(one["params"].get("lines", 0) > 10 for one in mine)
        for gpus in (1, 2, 4):
            [makespan] = [
                one["median"]
                for one in entries
                if one["case"].startswith(f"{name}, tiny: {gpus} virtual")
                and one["metric"] == "makespan"
            ]
            assert makespan > 0
    assert cases.main(["--sizes", "huge"]) == 2


# What keeps the memory is an option of glibc's allocator; elsewhere there is nothing to test.
@pytest.mark.surface
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_a_study_pays_for_the_pages_of_its_memory_once() -> None:
    script = """if True:
        import ctypes
        import resource
        import study

        # As NumPy does: an interpreter without the GIL has an allocator of its own for the rest.
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        size = ctypes.c_size_t(64 << 20)

        def faults() -> int:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            memory = ctypes.c_void_p(libc.malloc(size))
            libc.memset(memory, 1, size)
            libc.free(memory)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        study.keep_memory()
        print(faults(), faults())
    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(APPS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    # Huge pages are 32.
    assert first >= 32
    assert second * 10 < first


@pytest.mark.surface
def test_functions_are_held_to_gpus_in_a_block_alone() -> None:
    app = load("jacobi")
    with ch.Runtime(ch.Machine.virtual(1), workers=1) as runtime:
        with application.on_gpus(app):
            app.tasks(small(app), 1)
        assert {model.choice for model in runtime.models()} <= {"gpu"}
        assert runtime.stats()["devices"][gpu(0)]["operations"] > 0
        app.relax.options(placement=cpu)  # as ever
