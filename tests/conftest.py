"""Rules that every test lives under.

* A test that takes too long fails with the stacks of all threads; when even that cannot
  interrupt it, the process dumps its stacks and dies.
* After each test no runtime is open and no thread is left that was not there before.
* ``CHARIOTEER_WORKERS`` imposes a worker count on the fixtures, for perturbation runs;
  ``CHARIOTEER_EXAMPLES`` the number of examples of each Hypothesis test.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import threading
import time
from collections.abc import Generator, Iterator

import hypothesis
import numpy
import pytest
import threadpoolctl
from support import Gate, threads_of_process, worker_counts

import charioteer as ch

TIME_LIMIT = 60.0
"""Seconds that a test without a limit of its own may take."""

hypothesis.settings.register_profile(
    "charioteer",
    max_examples=int(os.environ.get("CHARIOTEER_EXAMPLES", "100")),
    deadline=None,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("charioteer")

_stderr = os.dup(2)


def pytest_configure(config: pytest.Config) -> None:
    # Of pytest-run-parallel, which is not everywhere where tests are run.
    config.addinivalue_line("markers", "thread_unsafe(reason): not to be run by several threads")
    # Capturing is off here, so this is the real standard error.
    os.dup2(2, _stderr)
    # BLAS starts its threads at the first product that may use them; they are nobody's leak. SciPy
    # brings one of its own.
    with contextlib.suppress(ImportError):
        importlib.import_module("scipy.linalg")
    with threadpoolctl.threadpool_limits(8):
        numpy.ones((512, 512)) @ numpy.ones((512, 512))


RUNTIMES = {"rt", "rt1", "rt2", "rt_threads", "rt_any"}
"""The fixtures that open a runtime for a test."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not RUNTIMES.intersection(getattr(item, "fixturenames", ())):
            # Several threads can drive a runtime that the test is given, and not open one each.
            item.add_marker(pytest.mark.thread_unsafe(reason="is given no runtime to share"))
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIME_LIMIT, method="signal"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    # The signal that ends a slow test needs the main thread to run Python code. If it is stuck
    # elsewhere, this watchdog, which needs nobody, shows where.
    marker = item.get_closest_marker("timeout")
    _watch(float(marker.args[0]) if marker is not None and marker.args else TIME_LIMIT)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


_watchdogs: set[int] = set()


def _watch(limit: float) -> None:
    before = set(threads_of_process())
    faulthandler.dump_traceback_later(2 * limit + 30, exit=True, file=_stderr)
    _watchdogs.update(set(threads_of_process()) - before)


@pytest.hookimpl(trylast=True)
def pytest_exception_interact() -> None:
    # Here pytest calls the watchdog off, for debuggers; what a failed test left open is closed
    # after this, and may hang.
    _watch(TIME_LIMIT)


def _close_leftover() -> bool:
    try:
        with ch.Runtime(workers=0):
            return False
    except ch.RuntimeActiveError:
        for found in gc.get_objects():
            if isinstance(found, ch.Runtime):
                with contextlib.suppress(Exception):
                    found.close(cancel=True)
        return True


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    before = set(threads_of_process())
    python_before = set(threading.enumerate())
    yield
    Gate.open_all()
    assert not _close_leftover(), "the test left a runtime open"
    end = time.monotonic() + 10
    while True:
        known = before | _watchdogs
        left = {i: name for i, name in threads_of_process().items() if i not in known}
        python_left = [t for t in threading.enumerate() if t not in python_before]
        if not left and not python_left:
            return
        assert time.monotonic() < end, f"threads left behind: {left} {python_left}"
        time.sleep(0.002)


def _opened(workers: int) -> Iterator[ch.Runtime]:
    with ch.Runtime(workers=workers) as runtime:
        yield runtime
        Gate.open_all()


# Each of the threads that share a runtime brings bodies that hold workers or meet there.


@pytest.fixture
def rt(num_parallel_threads: int) -> Iterator[ch.Runtime]:
    """An open runtime with two workers a thread, or as many as the environment says."""
    yield from _opened(num_parallel_threads * worker_counts(2)[0])


@pytest.fixture
def rt2(num_parallel_threads: int) -> Iterator[ch.Runtime]:
    """An open runtime with at least two workers a thread, for bodies that meet."""
    yield from _opened(num_parallel_threads * max(2, worker_counts(2)[0]))


@pytest.fixture
def rt1() -> Iterator[ch.Runtime]:
    """An open runtime with exactly one worker."""
    yield from _opened(1)


@pytest.fixture(params=worker_counts(1, 2, 4))
def rt_threads(request: pytest.FixtureRequest) -> Iterator[ch.Runtime]:
    """An open runtime with one, two and four workers in turn."""
    yield from _opened(request.param)


@pytest.fixture(params=worker_counts(0, 1, 2, 4))
def rt_any(request: pytest.FixtureRequest) -> Iterator[ch.Runtime]:
    """An open runtime, inline too: for tests in which no body waits for the main thread."""
    yield from _opened(request.param)
