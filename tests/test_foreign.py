"""Arrays that are on a device come in without a copy, and have the last values again in the end."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import charioteer as ch
from charioteer import gpu, virtual
from charioteer.machine import Machine

pytestmark = pytest.mark.thread_unsafe(reason="copies are counted for the whole runtime")

Array = Any
SHAPE = (6, 8)
VALUES = np.arange(48.0).reshape(SHAPE)


@pytest.fixture
def rt() -> Iterator[ch.Runtime]:
    """A runtime on two virtual GPUs."""
    with ch.Runtime(Machine.virtual(gpus=2), workers=2) as runtime:
        yield runtime


def stream_of(rt: ch.Runtime, number: int = 0) -> Any:
    """A stream of the program's own."""
    devices = rt.devices
    assert devices is not None
    return devices.stream(number)


def late(stream: Any, gate: threading.Event | None = None) -> virtual.ndarray:
    """An array that the stream is about to write, when it may."""
    with virtual.stream(stream):
        x, values = virtual.empty(SHAPE), virtual.asarray(VALUES)
        if gate is not None:
            stream.enqueue(gate.wait)
        x[...] = values
    return x


def traffic(rt: ch.Runtime, source: str, target: str) -> int:
    """Bytes that went from one memory to the other."""
    counted = rt.stats()["devices"].values()
    return sum(one["traffic"].get((source, target), (0, 0))[1] for one in counted)


@ch.task
def double(a: ch.InOut[Array]) -> int | None:
    """Doubles, and says where."""
    a *= 2
    return a.memory.address + a._offset if isinstance(a, virtual.ndarray) else None


def test_the_memory_is_what_tasks_get(rt: ch.Runtime) -> None:
    stream = stream_of(rt)
    gate = threading.Event()
    x = late(stream, gate)
    before = traffic(rt, "host", "gpu(0)")
    with virtual.stream(stream):
        A = ch.asarray(x, name="A")
    here = double.options(placement=gpu(0))
    reads = here(A)
    assert not stream.record().is_complete(), "the host waited for the producer"
    assert not reads.done()
    gate.set()
    assert (A.shape, A.dtype, repr(A)) == (SHAPE, VALUES.dtype, "<Array A (6, 8) float64>")
    first = x.memory.address
    assert reads.result() == first
    assert here(A[1:3, ::2]).result() == first + 8 * 8
    assert {here(tile).result() - first for tile in A.tiles((3, 4))} == {0, 32, 192, 224}
    expected = VALUES * 4
    expected[1:3, ::2] *= 2
    assert traffic(rt, "host", "gpu(0)") == before and not traffic(rt, "gpu(0)", "host")
    np.testing.assert_array_equal(A.numpy(), expected)
    double.options(placement=gpu(1))(A[2]).result()
    double.options(placement=ch.cpu)(A[3]).result()
    expected[2:4] *= 2
    A.release()
    with virtual.stream(stream):
        np.testing.assert_array_equal(x.get(), expected)
    assert traffic(rt, "gpu(0)", "gpu(1)") == traffic(rt, "gpu(1)", "gpu(0)") == 8 * 8
    with pytest.raises(ch.AccessError, match="released"):
        here(A)


def test_a_block_of_the_host_sees_both(rt: ch.Runtime) -> None:
    stream = stream_of(rt)
    x = late(stream)
    with virtual.stream(stream):
        A = ch.asarray(x)
        double.options(placement=gpu(1))(A)
        with A.host("rw") as h:
            np.testing.assert_array_equal(h, 2 * VALUES)
            np.testing.assert_array_equal(x.get(), 2 * VALUES)
            h[0] = 1
        with A.host() as h:
            np.testing.assert_array_equal(x.get(), h)
            assert (h[0] == 1).all() and not h.flags.writeable
        A[1] = 7
        A.prefetch(gpu(0)).result()
        assert (x.get()[1] == 7).all()
        A.evict(gpu(0)).result()
        assert (x.get()[1] == 7).all()


def test_the_array_ends_with_its_runtime() -> None:
    with ch.Runtime(Machine.virtual(gpus=2), workers=2) as rt:
        stream = stream_of(rt)
        with virtual.stream(stream):
            A, B = ch.asarray(late(stream)), ch.asarray(late(stream), name="B")
        double.options(placement=gpu(1))(A)
    with pytest.raises(ch.AccessError, match="its runtime is closed"):
        A.numpy()
    with ch.Runtime(Machine.virtual(gpus=2), workers=2):
        # Nobody used it, but its memory is another machine's.
        with pytest.raises(ch.AccessError, match=r"B is in memory of gpu\(0\)"):
            double.options(placement=gpu(0))(B)


def test_it_is_kept_as_long_as_it_is_needed(rt: ch.Runtime) -> None:
    stream = stream_of(rt)
    x = late(stream)

    class Owner(virtual.ndarray):
        """One that can be watched."""

    with virtual.stream(stream):
        y = Owner(x._owner, SHAPE, x.dtype)
        del x
        gone = weakref.ref(y)
        A = ch.asarray(y)
    del y
    assert gone() is not None
    task = double.options(placement=gpu(0))(A)
    total = A.numpy().sum()
    task.result()
    assert total == 2 * VALUES.sum()
    del A, task
    ch.empty(1).numpy()
    double.options(placement=gpu(0))(ch.zeros(3)).result()
    gc.collect()
    assert gone() is None


def test_what_cannot_be_taken_over_is_copied(rt: ch.Runtime) -> None:
    stream = stream_of(rt)
    x = late(stream)
    here = double.options(placement=gpu(0))
    with virtual.stream(stream):
        wanted = {
            "another order": (ch.asarray(x.T), VALUES.T),
            "with gaps": (ch.asarray(x[:, ::2]), VALUES[:, ::2]),
            "another type": (ch.asarray(x, np.float32), VALUES.astype("f4")),
            "no elements": (ch.asarray(x[:0]), VALUES[:0]),
            "a copy": (ch.array(x), VALUES),
        }
        row = ch.asarray(x[2:4])
    for what, (A, expected) in wanted.items():
        here(A)
        np.testing.assert_array_equal(A.numpy(), 2 * expected, what)
    with virtual.stream(stream):
        np.testing.assert_array_equal(x.get(), VALUES)
    assert here(row).result() == x.memory.address + 2 * 8 * 8

    @ch.task(placement=gpu(0))
    def keeps(a: ch.In[Array]) -> Any:
        return ch.asarray(a)

    B = keeps(row).result()
    here(row)
    np.testing.assert_array_equal(B.numpy(), 2 * VALUES[2:4])


def test_a_runtime_without_the_device_refuses_it() -> None:
    with ch.Runtime(Machine.virtual(gpus=1), workers=1) as rt:
        stream = stream_of(rt)
        x = late(stream)
        with virtual.stream(stream):
            A = ch.asarray(x, name="A")
    with pytest.raises(ch.AccessError, match=r"memory of gpu\(0\)"):
        A.numpy()
    for machine in (Machine.virtual(gpus=1), None):
        with ch.Runtime(machine, workers=1):
            for call in (lambda: double(A), A.numpy, lambda: A.prefetch(gpu(0))):
                with pytest.raises((ch.AccessError, ch.PlacementError)) as refused:
                    call()
                assert "A is in memory of gpu(0)" in str(refused.value) or machine is None


def test_a_failure_leaves_it_undefined(rt: ch.Runtime) -> None:
    stream = stream_of(rt)
    x = late(stream)
    with virtual.stream(stream):
        A = ch.asarray(x)

    @ch.task(placement=gpu(0))
    def fails(a: ch.Out[Array]) -> None:
        raise ValueError("planned")

    failed = fails(A[0])
    with pytest.raises(ch.DependencyError):
        with A.host():
            pass
    assert isinstance(failed.exception(), ValueError)
    np.testing.assert_array_equal(A[1:].numpy(), VALUES[1:])
    A.release()
    with virtual.stream(stream):
        np.testing.assert_array_equal(x.get()[1:], VALUES[1:])
