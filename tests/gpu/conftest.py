"""Tests that need real GPUs: skipped, with the reason, where there is none.

Unlike other tests they may leave threads behind: the driver keeps its own.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import charioteer as ch
from charioteer import gpu

SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds, long long* target, long long value) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
    if (target) *target = value;
}
"""
"""A kernel that takes its time, and then writes a number."""

MEET = r"""
extern "C" __global__ void meet(volatile int* mine, volatile int* other, int* met) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    *mine = 1;
    __threadfence_system();
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (*other == 0 && now - start < 10000000000ll);
    *met = *other;
}
"""
"""A kernel that waits, up to ten seconds, for another one to begin."""


@functools.cache
def found() -> int:
    """How many GPUs there are."""
    return len(ch.Machine.detect().gpus)


POOL_IS_SHARED = os.environ.get("CHARIOTEER_TEST_POOL") == "shared" and found() > 0
"""Whether libraries allocate from the runtime's pool in this process: see ``test_pool.py``."""

if POOL_IS_SHARED:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries have to say while they are imported
        for name in ("cupy", "torch"):
            if importlib.util.find_spec(name) is not None:
                ch.share_memory_pool(name)  # type: ignore[arg-type]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        needed = marker.args[0] if marker.args else 1
        if found() < needed:
            has = f"the machine has {found()} of CUDA"
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs, and {has}"))


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    with ch.Runtime(workers=0):  # says if the test left one open
        pass


def _library(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries have to say while they are imported
        return pytest.importorskip(name)


@pytest.fixture(scope="session")
def tells() -> Callable[[str], None]:
    """Runs a program that says ``told`` in a process of its own: it loses a GPU for all of that."""

    def run(code: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=80, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "told"

    return run


@pytest.fixture(scope="session")
def cp() -> Any:
    """CuPy."""
    return _library("cupy")


@pytest.fixture(scope="session")
def no_memory(cp: Any) -> type[Exception]:
    """What CuPy raises where memory is short."""
    return ch.OutOfDeviceMemoryError if POOL_IS_SHARED else cp.cuda.memory.OutOfMemoryError


@pytest.fixture(scope="session")
def torch() -> Any:
    """PyTorch."""
    found = _library("torch")
    if not found.cuda.is_available():
        pytest.skip("PyTorch has no CUDA")
    return found


@pytest.fixture(scope="session")
def numba_cuda() -> Any:
    """``numba.cuda``, if it finds what it needs of CUDA and knows this NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it has to say while it is imported
        try:
            from numba import cuda
            from numba.cuda.cudadrv import nvvm

            there = cuda.is_available() and nvvm.is_available()
        except ImportError as error:
            pytest.skip(f"there is no Numba with CUDA: {error}")
        except AttributeError as error:
            pytest.skip(f"this Numba does not know this NumPy: {error}")
    if not there:
        pytest.skip("this Numba finds no driver, or no NVVM")
    return cuda


@pytest.fixture(scope="session")
def spin(cp: Any) -> Callable[..., None]:
    """``spin(seconds, target=None, value=0)``: occupies the current stream, then writes."""
    kernel = cp.RawKernel(SPIN, "spin")

    def run(seconds: float, target: Any = None, value: int = 0) -> None:
        pointer = 0 if target is None else target.data.ptr
        kernel((1,), (1,), (cp.int64(1e9 * seconds), cp.uint64(pointer), cp.int64(value)))

    # To load a kernel may take until all that runs on the device has ended.
    run(0)
    cp.cuda.get_current_stream().synchronize()
    return run


@pytest.fixture(scope="session")
def meet(cp: Any) -> Any:
    """The kernel :data:`MEET`."""
    kernel = cp.RawKernel(MEET, "meet")
    flags = cp.ones(3, cp.int32)
    kernel((1,), (1,), (flags, flags[1:], flags[2:]))  # loads it
    cp.cuda.get_current_stream().synchronize()
    return kernel


@pytest.fixture
def rt() -> Iterator[ch.Runtime]:
    """A runtime on the GPUs of the machine."""
    with ch.Runtime(workers=4) as runtime:
        yield runtime


@pytest.fixture
def counters(rt: ch.Runtime) -> Callable[[], dict[str, Any]]:
    """What the first GPU has seen."""
    return lambda: rt.stats()["devices"][gpu(0)]
