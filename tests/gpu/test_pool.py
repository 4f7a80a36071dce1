"""One pool for the libraries of a GPU.

Sharing is for the life of a process, and PyTorch refuses it once it has allocated: so each test is
a process of its own, in which the rest of this suite runs too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent

SETTLE = """
import time

def settle(holds, *seen):
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, [one() for one in seen]
        time.sleep(0.01)
"""
"""Waits until something holds; what was seen is told if it does not."""


def run(code: str, *, within: float = 100) -> str:
    """What a program prints; its complaints are the failure's."""
    done = subprocess.run(
        [sys.executable, "-c", SETTLE + code],
        capture_output=True,
        text=True,
        timeout=within,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_what_cupy_drops_is_everybodys(cp: Any) -> None:
    run("""
import cupy as cp
import charioteer as ch
from charioteer import gpu

ch.share_memory_pool("cupy")
ch.share_memory_pool("cupy")  # once is enough

with ch.Runtime(workers=2) as rt:
    held = lambda: rt.stats()["devices"][gpu(0)]["library_memory"]
    free = lambda: rt.devices.free_memory(0)

    @ch.task(placement=gpu(0))
    def make(n):
        return cp.arange(n, dtype=cp.float64)

    make(10).result()
    before, some = free(), held()
    x = make(1 << 24).result()
    size = 8 << 24
    assert held() >= some + size, (held(), some)
    assert free() <= before - size, (free(), before)
    assert float(x[-1]) == (1 << 24) - 1
    del x
    settle(lambda: held() == some, held)
    # A cache of CuPy's would have it still.
    settle(lambda: free() >= before - size // 2, free)
    assert cp.get_default_memory_pool().total_bytes() == 0
    assert cp.zeros(0).size == 0 and float(cp.ones(3).sum()) == 3
""")


def test_arrays_outlive_the_runtime(cp: Any) -> None:
    run("""
import cupy as cp
import charioteer as ch
from charioteer import gpu

ch.share_memory_pool("cupy")
kept = []
for attempt in range(3):
    with ch.Runtime(workers=2) as rt:

        @ch.task(placement=gpu(0), share=0.3)
        def make(n):
            return cp.full(100_000, n)

        kept += [make(attempt * 10 + i).result() for i in range(10)]
    # Of a runtime that is closed.
    assert [int(x.sum()) for x in kept] == [100_000 * n for n in range(len(kept))]
    del kept[::2]
    kept = [cp.full(100_000, n) for n in range(10 * (attempt + 1))]
stream = cp.cuda.Stream(non_blocking=True)
with stream:
    x = cp.ones(1000)
del stream
del x, kept
with ch.Runtime(workers=2) as rt:

    @ch.task(placement=gpu(0))
    def last():
        return float(cp.ones(1000).sum())

    assert last().result() == 1000
    held = lambda: rt.stats()["devices"][gpu(0)]["library_memory"]
    settle(lambda: held() == 0, held)
""")


def test_cupy_is_told_that_memory_is_short(cp: Any) -> None:
    run("""
import cupy as cp
import charioteer as ch
from charioteer import gpu

ch.share_memory_pool("cupy")
with ch.Runtime(workers=2):

    @ch.task(placement=gpu(0))
    def greedy():
        return cp.zeros(1 << 42, cp.uint8)

    error = greedy().exception()
    assert type(error) is ch.OutOfDeviceMemoryError, repr(error)
    assert error.wanted == 1 << 42 and 0 < error.free < 1 << 42, error

    @ch.task(placement=gpu(0))
    def modest():
        return float(cp.ones(10).sum())

    assert modest().result() == 10
""")


def test_cupy_and_torch_have_one_pool(cp: Any, torch: Any) -> None:
    run("""
import cupy as cp
import torch
import charioteer as ch
from charioteer import gpu

ch.share_memory_pool("cupy", "torch")
with ch.Runtime(workers=2) as rt:

    @ch.task(placement=gpu(0))
    def first():
        return float(cp.ones(3).sum()) + float(torch.ones(3, device="cuda").sum())

    assert first().result() == 6
    part = int(rt.devices.free_memory(0) * 0.6)

    @ch.task(placement=gpu(0))
    def in_cupy():
        x = cp.empty(part, cp.uint8)
        x[-1] = 7
        return int(x[-1])

    @ch.task(placement=gpu(0))
    def in_torch():
        x = torch.empty(part, dtype=torch.uint8, device="cuda")
        x[-1] = 8
        return int(x[-1])

    # Neither keeps what the other needs.
    for _ in range(3):
        assert in_cupy().result() == 7
        assert in_torch().result() == 8

    @ch.task(placement=gpu(0))
    def greedy():
        return torch.empty(1 << 42, dtype=torch.uint8, device="cuda")

    error = greedy().exception()
    assert isinstance(error, RuntimeError) and "OutOfDeviceMemoryError" in str(error), repr(error)

    @ch.task(placement=gpu(0))
    def learn():
        # Its memory is freed by PyTorch's own threads too.
        torch.manual_seed(1)
        layer = torch.nn.Linear(64, 64).cuda()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (layer(torch.ones(128, 64, device="cuda")) - 3).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        return losses

    losses = learn().result()
    assert losses[-1] < losses[0] / 10, losses
assert torch.cuda.memory.get_allocator_backend() == "pluggable"
""")


def test_torch_tells_of_streams(torch: Any) -> None:
    run("""
import torch
import charioteer as ch

ch.share_memory_pool("torch")
side = torch.cuda.Stream()
n = 1 << 24
for attempt in range(5):
    x = torch.full((n,), attempt, device="cuda", dtype=torch.int32)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        y = x + 1
    x.record_stream(side)
    del x
    # Would be in the same place.
    z = torch.full((n,), -5, device="cuda", dtype=torch.int32)
    torch.cuda.synchronize()
    assert bool((y == attempt + 1).all()), attempt
    del y, z
""")


def test_torch_that_has_allocated_is_refused(torch: Any) -> None:
    run("""
import torch
import charioteer as ch

torch.ones(3, device="cuda")
try:
    ch.share_memory_pool("torch")
except ch.DeviceError as error:
    assert "before" in str(error), error
else:
    raise SystemExit("it was taken")
assert float(torch.ones(3, device="cuda").sum()) == 3
""")


@pytest.mark.gpu(2)
def test_what_a_set_uses_is_nobody_elses(cp: Any) -> None:
    run("""
import threading
import cupy as cp
import charioteer as ch
from charioteer import gpu

ch.share_memory_pool("cupy")
code = '''extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}'''
spin = cp.RawKernel(code, "spin")
for device in range(2):
    with cp.cuda.Device(device):
        spin((1,), (1,), (cp.int64(1),))
        cp.cuda.runtime.deviceSynchronize()
n = 1 << 24
with ch.Runtime(workers=4) as rt:
    for attempt in range(5):
        dropped, taken = threading.Event(), threading.Event()

        @ch.spawn(placement=(gpu(0), gpu(1)), share=0.4)
        def both():
            context = ch.current()
            for device in context.each():
                if device.index == 0:
                    x = cp.full(n, 7, cp.int32)
                    context.barrier()
                else:
                    spin((1,), (1,), (cp.int64(300_000_000),))
                    y = cp.empty(n, cp.int32)
                    cp.cuda.runtime.memcpyPeerAsync(
                        y.data.ptr, 1, x.data.ptr, 0, x.nbytes, context.stream.handle
                    )
            del x
            dropped.set()
            assert taken.wait(30)
            return y

        @ch.spawn(placement=gpu(0), share=0.4)
        def other():
            assert dropped.wait(30)
            z = cp.full(n, 9, cp.int32)
            taken.set()
            return z

        y = both.result()
        other.result()
        with cp.cuda.Device(1):
            assert bool((y == 7).all()), (attempt, cp.unique(y))
""")


@pytest.mark.timeout(420)
def test_the_rest_of_the_suite_in_one_pool(cp: Any) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *(HERE / "test_cuda.py", HERE / "test_data.py", HERE / "test_kernels.py"),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=os.environ | {"CHARIOTEER_TEST_POOL": "shared"},
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
