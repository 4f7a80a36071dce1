"""Do virtual arrays compute what NumPy computes, where and when they should?"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from support import anything

import charioteer as ch
from charioteer import gpu
from charioteer import virtual as xp
from charioteer._core import Event, OpenMachine, Stream

MIB = 2**20


@pytest.fixture
def machine() -> Iterator[OpenMachine]:
    """Two GPUs in real time."""
    with ch.Machine.virtual(gpus=2, memory="256MiB").open() as opened:
        yield opened


@pytest.fixture
def stream(machine: OpenMachine) -> Iterator[Stream]:
    """A stream of the first one, which is current."""
    with xp.stream(machine.stream(0)) as current:
        yield current


def same(found: Any, expected: Any) -> None:
    """The virtual value is the expected one: shape and type, which are known at once, and bits."""
    if isinstance(expected, (tuple, list)):
        assert type(found) is type(expected) or not isinstance(found, xp.ndarray)
        for one, two in zip(found, expected, strict=True):
            same(one, two)
        return
    expected = np.asarray(expected)
    assert isinstance(found, xp.ndarray)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(found.get(), expected)


A = np.arange(24.0).reshape(4, 6) - 7
B = np.linspace(1, 2, 24).reshape(4, 6)
V = np.arange(6)
C = A[:, :4] + 1j * B[:, 2:]
S = B[:, :4] @ B[:, :4].T + np.eye(4)
T = np.arange(2 * 5 * 7, dtype=np.float32).reshape(2, 5, 7)

CALLS: list[Callable[..., Any]] = [
    # elementwise
    lambda np, a, b, v, c, s, t: a + b,
    lambda np, a, b, v, c, s, t: a * v - 3,
    lambda np, a, b, v, c, s, t: 2 / b,
    lambda np, a, b, v, c, s, t: -a // 2,
    lambda np, a, b, v, c, s, t: a % 5,
    lambda np, a, b, v, c, s, t: v**2,
    lambda np, a, b, v, c, s, t: 2.5 + v,
    lambda np, a, b, v, c, s, t: t * 2,
    lambda np, a, b, v, c, s, t: a + v.sum(),
    lambda np, a, b, v, c, s, t: (a > 0) & ~(b < 1.5),
    lambda np, a, b, v, c, s, t: abs(c),
    lambda np, a, b, v, c, s, t: divmod(a, 3),
    lambda np, a, b, v, c, s, t: np.modf(b),
    lambda np, a, b, v, c, s, t: np.sqrt(b) + np.exp(-a) + np.sin(a),
    lambda np, a, b, v, c, s, t: np.add(v, 1, dtype="f4"),
    lambda np, a, b, v, c, s, t: np.maximum(a, v),
    lambda np, a, b, v, c, s, t: np.where(a > 0, a, b),
    lambda np, a, b, v, c, s, t: np.clip(a, -2, 3),
    lambda np, a, b, v, c, s, t: a.clip(-2, 3),
    lambda np, a, b, v, c, s, t: np.multiply.outer(v, b),
    lambda np, a, b, v, c, s, t: np.outer(v, a[0]),
    lambda np, a, b, v, c, s, t: a[:, None, :] * b[None, :, :],
    lambda np, a, b, v, c, s, t: np.isclose(a, a + 1e-12),
    lambda np, a, b, v, c, s, t: c.conj(),
    lambda np, a, b, v, c, s, t: np.round(b, 1),
    # reductions
    lambda np, a, b, v, c, s, t: a.sum(),
    lambda np, a, b, v, c, s, t: a.sum(axis=0),
    lambda np, a, b, v, c, s, t: np.sum(t, axis=(0, 2), keepdims=True),
    lambda np, a, b, v, c, s, t: np.add.reduce(a, axis=1),
    lambda np, a, b, v, c, s, t: np.add.reduce(a, axis=None),
    lambda np, a, b, v, c, s, t: np.add.accumulate(a, axis=1),
    lambda np, a, b, v, c, s, t: v.mean(),
    lambda np, a, b, v, c, s, t: a.var(axis=1, ddof=1),
    lambda np, a, b, v, c, s, t: np.std(t, axis=1),
    lambda np, a, b, v, c, s, t: a.max(axis=1),
    lambda np, a, b, v, c, s, t: a.min(),
    lambda np, a, b, v, c, s, t: np.argmax(a, axis=0),
    lambda np, a, b, v, c, s, t: (a > 0).any(axis=1),
    lambda np, a, b, v, c, s, t: np.all(a > 0),
    lambda np, a, b, v, c, s, t: np.cumsum(a, axis=1),
    lambda np, a, b, v, c, s, t: np.prod(v),
    lambda np, a, b, v, c, s, t: np.median(a, axis=0),
    lambda np, a, b, v, c, s, t: np.count_nonzero(a > 3),
    lambda np, a, b, v, c, s, t: np.average(a, axis=0, weights=b),
    lambda np, a, b, v, c, s, t: np.trace(s),
    # products and linear algebra
    lambda np, a, b, v, c, s, t: a @ b.T,
    lambda np, a, b, v, c, s, t: a @ v,
    lambda np, a, b, v, c, s, t: v @ v,
    lambda np, a, b, v, c, s, t: np.matmul(t, t.swapaxes(1, 2)),
    lambda np, a, b, v, c, s, t: np.dot(a, v),
    lambda np, a, b, v, c, s, t: np.vdot(a, b),
    lambda np, a, b, v, c, s, t: np.inner(a, b),
    lambda np, a, b, v, c, s, t: np.tensordot(a, t, axes=0),
    lambda np, a, b, v, c, s, t: np.einsum("ij,kj->ik", a, b),
    lambda np, a, b, v, c, s, t: np.einsum("bij,bkj->bik", t, t),
    lambda np, a, b, v, c, s, t: np.linalg.cholesky(s),
    lambda np, a, b, v, c, s, t: np.linalg.solve(s, a),
    lambda np, a, b, v, c, s, t: np.linalg.inv(s),
    lambda np, a, b, v, c, s, t: np.linalg.det(s),
    lambda np, a, b, v, c, s, t: np.linalg.qr(a),
    lambda np, a, b, v, c, s, t: np.linalg.qr(a, mode="r"),
    lambda np, a, b, v, c, s, t: np.linalg.svd(a),
    lambda np, a, b, v, c, s, t: np.linalg.svd(a, full_matrices=False),
    lambda np, a, b, v, c, s, t: np.linalg.eigh(s),
    lambda np, a, b, v, c, s, t: np.linalg.slogdet(s),
    lambda np, a, b, v, c, s, t: np.linalg.norm(a),
    lambda np, a, b, v, c, s, t: np.linalg.norm(t, axis=(1, 2)),
    lambda np, a, b, v, c, s, t: np.linalg.matrix_power(s, 3),
    lambda np, a, b, v, c, s, t: np.linalg.multi_dot([a, b.T, s]),
    lambda np, a, b, v, c, s, t: np.tril(a) + np.triu(b, 1),
    lambda np, a, b, v, c, s, t: np.diag(v, 1),
    lambda np, a, b, v, c, s, t: np.diag(a),
    # Fourier transforms
    lambda np, a, b, v, c, s, t: np.fft.fft(a),
    lambda np, a, b, v, c, s, t: np.fft.fft(a, n=9, axis=0),
    lambda np, a, b, v, c, s, t: np.fft.ifft(c),
    lambda np, a, b, v, c, s, t: np.fft.rfft(t, axis=1),
    lambda np, a, b, v, c, s, t: np.fft.irfft(c),
    lambda np, a, b, v, c, s, t: np.fft.irfft(c, n=5),
    lambda np, a, b, v, c, s, t: np.fft.fft2(t),
    lambda np, a, b, v, c, s, t: np.fft.rfft2(a),
    lambda np, a, b, v, c, s, t: np.fft.irfftn(c),
    lambda np, a, b, v, c, s, t: np.fft.fftn(a, s=(3, 5), axes=(0, 1)),
    lambda np, a, b, v, c, s, t: np.fft.fftshift(a, axes=1),
    # order and shape
    lambda np, a, b, v, c, s, t: np.sort(a, axis=0),
    lambda np, a, b, v, c, s, t: a.argsort(axis=1),
    lambda np, a, b, v, c, s, t: np.roll(a, 2, axis=1),
    lambda np, a, b, v, c, s, t: a.T,
    lambda np, a, b, v, c, s, t: np.moveaxis(t, 0, -1),
    lambda np, a, b, v, c, s, t: np.flip(a, 1)[::-1],
    lambda np, a, b, v, c, s, t: a.reshape(3, -1),
    lambda np, a, b, v, c, s, t: np.reshape(a.T, (8, 3)),
    lambda np, a, b, v, c, s, t: np.ravel(a[:, ::2]),
    lambda np, a, b, v, c, s, t: a[1:3].flatten(),
    lambda np, a, b, v, c, s, t: np.squeeze(a[:, :1]),
    lambda np, a, b, v, c, s, t: np.expand_dims(v, 1),
    lambda np, a, b, v, c, s, t: np.broadcast_to(v, (3, 6)),
    lambda np, a, b, v, c, s, t: np.split(a, 2),
    lambda np, a, b, v, c, s, t: np.array_split(v, 4),
    lambda np, a, b, v, c, s, t: np.concatenate([a, b, t[0, :4, :6]], axis=0),
    lambda np, a, b, v, c, s, t: np.concatenate([a, c], axis=1),
    lambda np, a, b, v, c, s, t: np.concatenate([a, v], axis=None),
    lambda np, a, b, v, c, s, t: np.stack([a, b], axis=-1),
    lambda np, a, b, v, c, s, t: np.vstack([a, v]),
    lambda np, a, b, v, c, s, t: np.hstack([a, b]),
    lambda np, a, b, v, c, s, t: a.astype("i2"),
    lambda np, a, b, v, c, s, t: a.view("i8"),
    lambda np, a, b, v, c, s, t: c.real + c.imag,
    lambda np, a, b, v, c, s, t: np.zeros_like(v) + np.ones_like(a, dtype="f4"),
    lambda np, a, b, v, c, s, t: np.full_like(a, 3, shape=(2, 2)),
    # elements
    lambda np, a, b, v, c, s, t: a[1],
    lambda np, a, b, v, c, s, t: a[1, -2],
    lambda np, a, b, v, c, s, t: a[..., 2:5:2],
    lambda np, a, b, v, c, s, t: t[1, None, ::-2],
    lambda np, a, b, v, c, s, t: a[[3, 0, 0]],
    lambda np, a, b, v, c, s, t: a[:, v],
    lambda np, a, b, v, c, s, t: a[v[:4], v[:4]],
    lambda np, a, b, v, c, s, t: t[:, v[:3, None], v[:2]],
    lambda np, a, b, v, c, s, t: a[v[2]],
    lambda np, a, b, v, c, s, t: np.take(a, [1, 1], axis=1),
    lambda np, a, b, v, c, s, t: a.take(v),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_a_call_is_numpys(stream: Stream, number: int) -> None:
    host = (A, B, V, C, S, T)
    call = CALLS[number]
    same(call(np, *map(xp.asarray, host)), call(np, *(one.copy() for one in host)))


def test_assignments_are_numpys(stream: Stream) -> None:
    def work(np: Any, a: Any, b: Any, v: Any) -> Any:
        a[1] = 7
        a[:, 0] += 1
        a[::2, 1:4] = b[::2, 2:5]
        a[0, 0] = 3
        a[1:] = a[:-1]  # overlapping
        a[[0, 2], 5] = -1
        a[v[:2]] *= 2
        b[b > 1.5] = 0
        b *= a
        b -= v
        b.T[0] = 9
        v[...] = 2
        v[1:3] = [5, 6]
        np.copyto(a, b, where=a > 0)
        np.add(a, b, out=a)
        np.sum(a, axis=0, out=b[1])
        np.add.at(v, [0, 0, 1], 3)
        b[...] = b[:, :1]
        a.sort(axis=0)
        return a, b, v

    host = [A.copy(), B.copy(), V.copy()]
    found = work(np, *map(xp.asarray, host))
    same(found, work(np, *host))


def test_making_arrays(stream: Stream) -> None:
    for found, expected in (
        (xp.zeros((2, 3)), np.zeros((2, 3))),
        (xp.ones(4, "i4"), np.ones(4, "i4")),
        (xp.full((), 2.5), np.full((), 2.5)),
        (xp.arange(2, 11, 3), np.arange(2, 11, 3)),
        (xp.linspace(0, 1, 7), np.linspace(0, 1, 7)),
        (xp.eye(3, 4, 1), np.eye(3, 4, 1)),
        (xp.identity(2), np.identity(2)),
        (xp.asarray([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]])),
        (xp.asarray(A.T), A.T),
        (xp.asarray(3), np.asarray(3)),
        (xp.asarray(np.empty((0, 3))), np.empty((0, 3))),
        (xp.zeros((0, 3)).sum(axis=0), np.zeros(3)),
        (xp.array(xp.asarray(V), "f4"), V.astype("f4")),
    ):
        same(found, expected)
    a = xp.asarray(V)
    assert xp.asarray(a) is a and xp.array(a) is not a
    assert xp.empty((3, 4), "f4").nbytes == 48
    assert (a.device, a.ndim, a.size, a.itemsize, len(a)) == (gpu(0), 1, 6, 8, 6)
    assert xp.float32 is np.float32 and xp.sin is np.sin and xp.pi == np.pi
    assert xp.linalg.cholesky is np.linalg.cholesky and xp.fft.rfft is np.fft.rfft
    with pytest.raises(AttributeError, match="no unique"):
        _ = xp.unique


def test_random_numbers_are_those_of_the_seed(stream: Stream) -> None:
    mine, theirs = xp.random.default_rng(5), np.random.default_rng(5)
    same(mine.random((3, 4)), theirs.random((3, 4)))
    same(mine.standard_normal(5, "f4"), theirs.standard_normal(5, "f4"))
    same(mine.integers(0, 9, (2, 2)), theirs.integers(0, 9, (2, 2)))
    same(mine.normal(1, 2, 3), theirs.normal(1, 2, 3))
    same(mine.uniform(1, 2, 3), theirs.uniform(1, 2, 3))


def test_values_of_the_host_wait_and_are_counted(stream: Stream, machine: OpenMachine) -> None:
    a = xp.asarray(A)
    small = a[1, 1]
    before = xp.host_waits()
    _ = a + a * 2
    _ = a[1:] @ a[1:].T
    assert xp.host_waits() == before
    count = 0
    for convert in (
        a.get,
        lambda: np.asarray(a),
        lambda: float(small),
        lambda: int(small),
        lambda: complex(small),
        lambda: bool(small),
        lambda: small.item(),
        lambda: a.item(1, 1),
        lambda: a.tolist(),
        lambda: str(a),
        lambda: repr(a),
        lambda: f"{small:.2f}",
        lambda: xp.asnumpy(a),
        lambda: np.allclose(a, a),
        lambda: np.array_equal(a, a),
        lambda: 3.0 in a,
        lambda: [1, 2, 3][xp.asarray(1)],
        lambda: xp.zeros((0, 2)).get(),
    ):
        convert()  # type: ignore[no-untyped-call]
        count += 1
        assert xp.host_waits() == before + count
    assert float(small) == A[1, 1]
    assert "gpu(0)" in repr(a)
    with pytest.raises(ValueError, match="copy"):
        a.__array__(copy=False)
    with pytest.raises(TypeError):
        hash(a)
    assert machine.counters(0)["traffic"]["gpu(0)", "host"][0] >= count - 1


def test_what_is_not_supported_is_named(stream: Stream) -> None:
    a, v = xp.asarray(A), xp.asarray(V)
    for call, says in (
        (lambda: np.unique(anything(v)), "numpy.unique is not supported"),
        (lambda: np.linalg.eig(anything(a)), "eig is not supported"),
        (lambda: np.where(anything(a) > 0), "depends on values"),
        (lambda: a[a > 0], "depends on values"),
        (lambda: a + A, "add: an array of the host among virtual ones"),
        (lambda: A * a, "multiply: an array of the host"),
        (lambda: np.concatenate([anything(a), A]), "concatenate: an array of the host"),
        (lambda: np.add.reduceat(anything(v), [0, 2]), "reduceat is not supported"),
        (lambda: xp.asarray([object()]), "Python objects"),
        (lambda: np.add(A, A, out=anything(a)) and np.add(anything(a), 1, out=A), "host"),
        (lambda: a.reshape(-1, order="F"), "C order"),
    ):
        with pytest.raises(TypeError, match=says):
            call()


def test_mistakes_are_told_at_the_call(stream: Stream, machine: OpenMachine) -> None:
    a, v = xp.asarray(A), xp.asarray(V)
    operations = machine.counters(0)["operations"]
    for call, error in (
        (lambda: a + v[:5], ValueError),
        (lambda: a @ a, ValueError),
        (lambda: np.linalg.cholesky(anything(a)), np.linalg.LinAlgError),
        (lambda: a[9], IndexError),
        (lambda: a[:, [9]], IndexError),
        (lambda: a.reshape(5, 5), ValueError),
        (lambda: a.__setitem__(slice(None), v[:5]), ValueError),
        (lambda: np.add(anything(a), 1, out=anything(a[:2])), ValueError),
        (lambda: v.__iadd__(0.5), TypeError),  # the result does not fit its type
        (lambda: np.copyto(anything(v), anything(a)), (TypeError, ValueError)),
        (lambda: np.concatenate([anything(a), anything(v)]), ValueError),
        (lambda: np.sum(anything(a), axis=5), np.exceptions.AxisError),
        (lambda: xp.zeros(-1), ValueError),
    ):
        with pytest.raises(error):
            call()
    assert machine.counters(0)["operations"] == operations
    stream.synchronize()


def test_an_operation_that_fails_fails_what_is_behind(stream: Stream, machine: OpenMachine) -> None:
    a = xp.asarray(-np.eye(5))
    factor = np.linalg.cholesky(anything(a))
    behind = factor + 1
    with pytest.raises(ch.DeviceError, match="LinAlgError") as info:
        behind.get()
    assert isinstance(info.value.__cause__, np.linalg.LinAlgError)
    with pytest.raises(ch.DeviceError):
        stream.synchronize()
    with xp.stream(machine.stream(0)):
        same(a, -np.eye(5))


def test_arithmetic_gives_no_warnings(stream: Stream) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = (xp.ones(3) / xp.zeros(3)).get()
    assert np.isinf(found).all()


def test_without_a_stream() -> None:
    with pytest.raises(RuntimeError, match="no stream is current"):
        xp.zeros(3)
    with ch.Machine.virtual().open() as machine:
        with xp.stream(machine.stream(0)):
            a = xp.zeros(3)
        assert repr(a) == "<array of float64 with shape (3,) on gpu(0)>"
        with pytest.raises(RuntimeError, match="no stream is current"):
            a + 1
        # A value of the host comes behind what is on the stream that the array was made on.
        np.testing.assert_array_equal(a.get(), np.zeros(3))


def test_the_current_stream_is_a_contexts_own(machine: OpenMachine) -> None:
    first, second = machine.stream(0), machine.stream(1)
    seen: list[object] = []

    def other() -> None:
        try:
            xp.current_stream()
        except RuntimeError:
            seen.append("none")

    with xp.stream(first):
        with xp.stream(second):
            assert xp.current_stream() == second
        assert xp.current_stream() == first
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == ["none"]


def test_devices_have_memory_of_their_own(machine: OpenMachine) -> None:
    near, far = machine.stream(0), machine.stream(1)
    with xp.stream(near):
        a = xp.asarray(A)
        near.synchronize()
    with xp.stream(far):
        b = xp.asarray(B)
        calls: list[Callable[[], object]] = [
            lambda: a + b,
            lambda: a + 1,
            lambda: xp.copyto(b, a),
            lambda: b.__setitem__(..., a),
            lambda: np.add(anything(b), 1, out=anything(a)),
            lambda: np.concatenate([anything(a), anything(b)]),
        ]
        for call in calls:
            with pytest.raises(ch.DeviceError, match=r"no access to the memory of gpu\(0\)"):
                call()
        np.testing.assert_array_equal(a.get(), A)
        machine.enable_peer(1, 0)
        same(a + b, A + B)
        b[...] = a
        same(b, A)
        a[:, ::2] = b[:, 1::2]  # strided on both sides: no transfer, but an operation
        same(a[:, ::2], A[:, 1::2])
        assert machine.counters(1)["traffic"]["gpu(0)", "gpu(1)"] == (1, A.nbytes)
        same(np.linalg.norm(anything(b)), np.linalg.norm(A))


def test_copies_between_devices(machine: OpenMachine) -> None:
    machine.enable_peer(1, 0)
    with xp.stream(machine.stream(0)) as near:
        a = xp.asarray(A)
        near.synchronize()
    with xp.stream(machine.stream(1)):
        b = xp.zeros((6, 4))
        xp.copyto(b.T, a)  # strided on the own side
        same(b.T, A)
        xp.copyto(a[1:3], b.T[:2])  # a part, contiguous on the other
        expected = A.copy()
        expected[1:3] = A[:2]
        same(a, expected)
        with pytest.raises(ValueError, match=r"gpu\(0\) is C-contiguous"):
            xp.copyto(b, a.T)
        with pytest.raises(ValueError, match="one shape and one type"):
            xp.copyto(b, a)
        host = np.zeros((4, 6))
        xp.copyto(host, a)
        np.testing.assert_array_equal(host, expected)
        xp.copyto(b.T, A)
        same(b.T, A)
        with pytest.raises(TypeError, match="cast"):
            xp.copyto(xp.zeros(3, int), xp.ones(3))


def test_memory_that_is_full() -> None:
    with ch.Machine.virtual(memory="1MiB").open() as machine, xp.stream(machine.stream(0)):
        a = xp.zeros(MIB // 2, "u1")
        with pytest.raises(ch.OutOfDeviceMemoryError) as info:
            xp.zeros((MIB // 2, 2), "u1")
        assert (info.value.device, info.value.wanted) == ("gpu(0)", MIB)
        # Each result replaces the last one, and its memory comes back in stream order.
        for _ in range(200):
            a = a[: MIB // 8] + 1
            a = np.concatenate([anything(a)] * 2)
        same(a, np.full(MIB // 4, 200, "u1"))
        del a
        gc.collect()
        xp.current_stream().synchronize()
        assert machine.free_memory(0) == MIB


def test_a_view_keeps_its_memory(stream: Stream, machine: OpenMachine) -> None:
    free = machine.free_memory(0)
    view = xp.asarray(A)[1:, ::2].T
    gc.collect()
    assert machine.free_memory(0) < free
    same(view, A[1:, ::2].T)
    del view
    gc.collect()
    stream.synchronize()
    assert machine.free_memory(0) == free


def test_a_lost_device(stream: Stream, machine: OpenMachine) -> None:
    a = xp.asarray(A)
    machine.lose(0, "unplugged")
    for call in (lambda: a + 1, a.get, lambda: xp.zeros(2)):
        with pytest.raises(ch.DeviceLostError, match="unplugged"):
            call()
    with xp.stream(machine.stream(1)):
        same(xp.asarray(A) + 1, A + 1)


def test_a_copy_that_fails(stream: Stream, machine: OpenMachine) -> None:
    machine.fail_copy(0, 1)
    a = xp.asarray(A)
    with pytest.raises(ch.DeviceError, match="copy"):
        (a + 1).get()


def test_who_does_not_wait_reads_garbage() -> None:
    with ch.Machine.virtual(time="virtual").open() as machine:
        writer, reader = machine.stream(0), machine.stream(0)
        for waits in (False, True):
            with xp.stream(writer):
                a = xp.empty(4)
                writer.synchronize()
                writer.busy(1.0)
                a[...] = 7
                written = writer.record()
            with xp.stream(reader):
                if waits:
                    reader.wait(written)
                found = (a + 0).get()
            assert (found == 7).all() is np.bool_(waits)
            assert written.is_complete() is waits
            writer.synchronize()


class Program:
    """Arrays on virtual devices, their equals on the host, and streams that wait for each other."""

    def __init__(self, machine: OpenMachine, streams: int, waits: bool) -> None:
        self.machine = machine
        self.waits = waits
        self.streams = [machine.stream(n % machine.gpus) for n in range(machine.gpus * streams)]
        self.arrays: list[tuple[xp.ndarray, np.ndarray[Any, Any]]] = []
        # By memory: the last write, and what has read since.
        self.writes: dict[int, Event] = {}
        self.reads: dict[int, list[Event]] = {}
        for one in range(machine.gpus):
            for other in range(machine.gpus):
                if one != other:
                    machine.enable_peer(one, other)
        for number, stream in enumerate(self.streams[: machine.gpus]):
            host = np.arange(1.0, 17.0).reshape(4, 4) + number
            with xp.stream(stream):
                self.arrays.append((xp.asarray(host), host))
            self.wrote(stream, self.arrays[-1][0])

    def key(self, array: xp.ndarray) -> int:
        return array.memory.device << 60 | array.memory.address

    def wait(self, stream: Stream, reads: list[xp.ndarray], writes: list[xp.ndarray]) -> None:
        if not self.waits:
            return
        for array in reads + writes:
            if (event := self.writes.get(self.key(array))) is not None:
                stream.wait(event)
        for array in writes:
            for event in self.reads.get(self.key(array), []):
                stream.wait(event)

    def wrote(self, stream: Stream, array: xp.ndarray) -> None:
        self.writes[self.key(array)] = stream.record()
        self.reads[self.key(array)] = []

    def read(self, stream: Stream, array: xp.ndarray) -> None:
        self.reads.setdefault(self.key(array), []).append(stream.record())

    def step(self, draw: Any) -> None:
        stream = self.streams[draw(st.integers(0, len(self.streams) - 1))]
        if draw(st.booleans()):
            stream.busy(1e-4)
        last = len(self.arrays) - 1
        (a, x), (b, y) = (self.arrays[draw(st.integers(0, last))] for _ in range(2))
        kind = draw(st.sampled_from(["new", "in place", "copy", "part", "reduce"]))
        with xp.stream(stream), np.errstate(all="ignore"):
            if kind in ("new", "reduce"):
                self.wait(stream, [a, b], [])
                make = draw(st.sampled_from(NEW if kind == "new" else REDUCE))
                result, expected = make(a, b), make(x, y)
                assert isinstance(result, xp.ndarray)
                assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
                self.arrays.append((result, expected))
                self.wrote(stream, result)
                for one in (a, b):
                    self.read(stream, one)
                return
            self.wait(stream, [b], [a])
            if kind == "in place":
                change = draw(st.sampled_from(CHANGES))
                change(a, b)
                change(x, y)
            elif kind == "part":
                rows = draw(st.integers(0, 3))
                a[rows, ::2] = b[-1, ::2] + 1
                x[rows, ::2] = y[-1, ::2] + 1
            elif a.device.index == stream.device or b.device.index == stream.device:
                xp.copyto(a, b)
                np.copyto(x, y)
            self.wrote(stream, a)
            self.read(stream, b)

    def check(self) -> bool:
        equal = True
        for array, expected in self.arrays:
            stream = self.streams[array.device.index]
            with xp.stream(stream):
                self.wait(stream, [array], [])
                equal &= bool(np.array_equal(array.get(), expected, equal_nan=True))
        return equal


NEW: list[Callable[[Any, Any], Any]] = [
    lambda a, b: a + b,
    lambda a, b: a * 0.5 - b.T,
    lambda a, b: np.where(a > b, a, 2.0),
    lambda a, b: a[::-1] / 2,
    lambda a, b: np.concatenate([a[:2], b[2:]]),
    lambda a, b: np.fft.fft(a).real.copy(),
    lambda a, b: a[[3, 1, 0, 0]],
]
REDUCE: list[Callable[[Any, Any], Any]] = [
    lambda a, b: np.broadcast_to(a.max(axis=0), (4, 4)) * 1.0,
    lambda a, b: (a - b).min(axis=1, keepdims=True) + b,
    lambda a, b: np.cumsum(a, axis=0) / 4,
    lambda a, b: np.sort(a, axis=1),
]


def _set(a: Any, b: Any) -> None:
    a[...] = b.T * 0.25


CHANGES: list[Callable[[Any, Any], Any]] = [
    lambda a, b: np.add(a, b, out=a),
    lambda a, b: a.__imul__(0.5),
    lambda a, b: a.__isub__(b[0]),
    _set,
]


@pytest.mark.parametrize("time", ["real", "virtual"])
@settings(max_examples=60)
@given(data=st.data(), gpus=st.integers(1, 4), streams=st.integers(1, 2))
def test_programs_on_many_devices(time: Any, data: st.DataObject, gpus: int, streams: int) -> None:
    with ch.Machine.virtual(gpus=gpus, memory="8MiB", time=time).open() as machine:
        program = Program(machine, streams, waits=True)
        for _ in range(data.draw(st.integers(1, 12))):
            program.step(data.draw)
        assert program.check()


def test_the_test_of_programs_notices_a_missing_wait() -> None:
    noticed = 0
    for waits in (True, False):
        with ch.Machine.virtual(gpus=2, memory="8MiB", time="virtual").open() as machine:
            program = Program(machine, 2, waits)
            choices: Iterator[Any] = iter(
                [
                    *(0, True, 0, 1, "in place", CHANGES[0]),
                    *(2, False, 0, 1, "new", NEW[0]),
                ]
            )
            for _ in range(2):
                program.step(lambda _: next(choices))
            noticed += not program.check()
    assert noticed == 1


def test_operations_take_what_is_said() -> None:
    seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def cost(name: str, arrays: Any) -> float:
        seen.append((name, [array.shape for array in arrays]))
        return 1.0

    machine = ch.Machine.virtual(gpus=1, memory="8MiB", time="virtual", link="1TB/s")
    with machine.open() as opened, xp.stream(opened.stream(0)) as stream:
        a = xp.asarray(np.eye(4))
        a += a @ a  # takes no time: nothing is timed yet
        stream.synchronize()
        before = opened.clock.now
        with xp.timed(cost):
            lower = np.linalg.cholesky(a @ a.T)
            lower += 1.0
            with pytest.raises(RuntimeError, match="timed already"), xp.timed(cost):
                pass
        float(a.sum())
        taken = (opened.clock.now - before) / 1e9
    assert seen == [
        ("matmul", [(4, 4), (4, 4), (4, 4)]),
        ("cholesky", [(4, 4), (4, 4)]),
        ("add", [(4, 4), (4, 4)]),
    ]
    assert 3.0 <= taken < 3.1
