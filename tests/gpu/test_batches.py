"""Kernels that a thread launches together: as if each were launched by itself."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
import pytest

import charioteer as ch
from charioteer import gpu

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]

CODE = r"""
extern "C" __global__ void affine(unsigned* y, unsigned a, unsigned b) {
    y[threadIdx.x] = y[threadIdx.x] * a + b;
}
extern "C" __global__ void sum(unsigned* z, const unsigned* x, const unsigned* y) {
    z[threadIdx.x] = 3 * z[threadIdx.x] + x[threadIdx.x] + 5 * y[threadIdx.x];
}
extern "C" __global__ void wait(long long nanoseconds) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
}
"""
N = 64


def _kernel(name: str) -> Any:
    params: dict[str, Any] = {
        "affine": (ch.InOut["u4"], "u4", "u4"),
        "sum": (ch.InOut["u4"], ch.In["u4"], ch.In["u4"]),
        "wait": ("i8",),
    }
    return ch.kernel(CODE, name, params[name], placement=gpu(0))


@pytest.fixture
def rt() -> Iterator[ch.Runtime]:
    with ch.Runtime(workers=1) as rt:
        yield rt


@pytest.fixture
def graphs(rt: ch.Runtime) -> Callable[[], int]:
    """How many graphs were launched."""
    return lambda: rt.stats()["devices"][gpu(0)]["graphs"]


@contextmanager
def _held() -> Iterator[None]:
    """Until its end the only worker does nothing, and finds at once what was spawned meanwhile."""
    begun, go = threading.Event(), threading.Event()

    @ch.spawn()
    def hold() -> None:
        begun.set()
        go.wait()

    begun.wait()
    try:
        yield
    finally:
        go.set()
    hold.result()


def _used(launch: Any, *arguments: Any) -> None:
    """Has it been launched so often that more of it are launched together."""
    for _ in range(40):
        last = launch(*arguments)
    last.result()


def test_a_chain_is_launched_in_pieces(rt: ch.Runtime, graphs: Callable[[], int]) -> None:
    y = ch.full(N, 1, "u4")
    affine = _kernel("affine")[1, N]
    _used(affine, y, 1, 0)
    random = Random(1)
    steps = [(random.randrange(1 << 32), random.randrange(1 << 32)) for _ in range(500)]
    before = graphs()
    with _held():
        for a, b in steps:
            affine(y, a, b)
    wanted = 1
    for a, b in steps:
        wanted = (wanted * a + b) % (1 << 32)
    assert (y.numpy() == wanted).all()
    # Eight together at most, and hardly fewer as long as there are more.
    assert 500 / 8 <= graphs() - before < 250


def test_what_else_uses_a_stream_comes_in_its_turn(
    rt: ch.Runtime, cp: Any, graphs: Callable[[], int]
) -> None:
    """Kernels of two shapes, bodies that use the stream through a library, copies both ways."""
    affine = _kernel("affine")
    total = _kernel("sum")[1, N]

    @ch.task(placement=gpu(0))
    def body(y: ch.InOut[Any], a: int, b: int) -> None:
        y *= cp.uint32(a)
        y += cp.uint32(b)

    @ch.task
    def host(y: ch.InOut[Any], a: int, b: int) -> None:
        y[...] = y * np.uint32(a) + np.uint32(b)

    arrays = [ch.full(N, number, "u4") for number in range(3)]
    wanted: list[Any] = [np.full(N, number, "u4") for number in range(3)]
    for y in arrays:
        _used(affine[1, N], y, 1, 0)
    _used(total, *(ch.zeros(N, "u4") for _ in range(3)))
    before = graphs()
    random = Random(2)
    for _ in range(8):
        with _held():
            for _ in range(random.choice((5, 60))):
                at, a, b = random.randrange(3), random.randrange(1 << 32), random.randrange(1 << 32)
                kind = random.choices(range(5), (70, 10, 10, 5, 2))[0]
                if kind == 1:
                    x, y, z = random.sample(range(3), 3)
                    total(arrays[z], arrays[x], arrays[y])
                    wanted[z] = 3 * wanted[z] + wanted[x] + 5 * wanted[y]
                    continue
                if kind == 0:
                    affine[1, N](arrays[at], a, b)
                elif kind == 2:
                    affine[(1, 1), (N, 1)](arrays[at], a, b)
                elif kind == 3:
                    body(arrays[at], a, b)
                else:
                    host(arrays[at], a, b)
                wanted[at] = wanted[at] * np.uint32(a) + np.uint32(b)
    for y, values in zip(arrays, wanted, strict=True):
        np.testing.assert_array_equal(y.numpy(), values)
    assert graphs() > before


def test_streams_wait_for_what_is_put_off_on_others(
    rt: ch.Runtime, graphs: Callable[[], int]
) -> None:
    affine = _kernel("affine")[1, N].options(share=0.5)
    total = _kernel("sum")[1, N].options(share=0.5)
    x, y, z = (ch.full(N, number, "u4") for number in range(3))
    for one in (x, y, z):
        _used(affine, one, 1, 0)
    with _held():
        for _ in range(20):
            for _ in range(3):
                affine(x, 3, 1)
                affine(y, 5, 2)
            total(z, x, y)
    values = [0, 1, 2]
    for _ in range(20):
        for _ in range(3):
            values[0] = values[0] * 3 + 1
            values[1] = values[1] * 5 + 2
        values[2] = 3 * values[2] + values[0] + 5 * values[1]
    assert [int(one.numpy()[0]) for one in (x, y, z)] == [it % (1 << 32) for it in values]


def test_each_is_told_of_by_itself(rt: ch.Runtime, graphs: Callable[[], int]) -> None:
    """One that is short before one that is long, launched together, is reported when it is done."""
    wait = _kernel("wait")[1, 1]
    _used(wait, 1)
    T = ch.TaskSpace("T")
    before = graphs()
    with _held():
        wait.options(T[0])(1000)
        wait.options(T[1], dependencies=T[0])(2_000_000_000)
        wait.options(T[2], dependencies=T[1])(1000)
    T[0].result()
    assert not T[1].done()
    assert graphs() - before == 1
    T[2].result()


def test_a_launch_that_is_refused_is_its_task_s(rt: ch.Runtime) -> None:
    y = ch.full(N, 1, "u4")
    affine = _kernel("affine")
    _used(affine[1, N], y, 2, 1)
    with _held():
        good = affine[1, N](y, 3, 1)
        bad = affine[1, N, 1 << 20](y, 3, 1)
        after = affine[1, N](y, 5, 1)
    good.result()
    with pytest.raises(ch.KernelError):
        bad.result()
    with pytest.raises(ch.DependencyError):
        after.result()


def test_a_fault_among_those_that_are_launched_together(tells: Callable[[str], None]) -> None:
    code = r"""
import threading
import charioteer as ch

code = 'extern "C" __global__ void put(int* p, int value) { *p = value; }'
put = ch.kernel(code, "put", ("p", "i4"), placement=ch.gpu(0))[1, 1]
begun, go = threading.Event(), threading.Event()
with ch.Runtime(workers=1) as rt:
    cp = __import__("cupy")
    good = cp.zeros(1, cp.int32)
    address = good.data.ptr
    cp.cuda.get_current_stream().synchronize()
    for _ in range(40):
        last = put(address, 1)
    last.result()

    @ch.spawn()
    def hold():
        begun.set()
        go.wait()

    begun.wait()
    T = ch.TaskSpace("T")
    for i in range(20):
        put.options(T[i], dependencies=T[i - 1] if i else None)(0 if i == 3 else address, i)
    go.set()
    told = 0
    for i in range(20):
        try:
            T[i].result()
        except ch.DeviceLostError as error:
            assert "illegal" in str(error), error
            told += 1
        except ch.DependencyError:
            told += 1
        else:
            assert i < 3, f"{i} is behind the fault"
    assert told >= 17, told
    assert ch.spawn()(lambda: 7).result() == 7
print("told", flush=True)
"""
    tells(code)


def test_code_that_is_dropped_is_launched_together_with_other_code(
    rt: ch.Runtime, graphs: Callable[[], int]
) -> None:
    y = ch.full(N, 1, "u4")
    wanted = 1
    for number in range(4):
        code = f'extern "C" __global__ void more(unsigned* y) {{ y[threadIdx.x] += {number}; }}'
        more = ch.kernel(code, "more", (ch.InOut["u4"],), placement=gpu(0))[1, N]
        _used(more, y)
        before = graphs()
        with _held():
            for _ in range(50):
                more(y)
        wanted += number * 90
        # The kernel goes with its last task.
        del more
        gc.collect()
        assert (y.numpy() == wanted).all()
        assert graphs() > before
