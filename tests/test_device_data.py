"""Managed arrays on virtual GPUs: what bodies get, where copies go, what is refused."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Boom, anything

import charioteer as ch
from charioteer import blas, cpu, gpu, virtual

Array = Any
MiB = 1 << 20


@contextmanager
def opened(gpus: int = 2, memory: int | str = 64 * MiB, **options: Any) -> Iterator[ch.Runtime]:
    """A runtime on virtual GPUs, whose trace is checked when it is left."""
    options.setdefault("workers", 2)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        machine = ch.Machine.virtual(gpus, memory=memory)
        with ch.Runtime(machine, trace=trace, **options) as runtime:
            yield runtime
        assert ch.check_trace(trace).violations == ()
        assert ch.check_order(trace).violations == ()


def copies(runtime: ch.Runtime, source: str, target: str) -> tuple[int, int]:
    """Copies from one memory to another so far, and their bytes."""
    found = (0, 0)
    for counted in runtime.stats()["devices"].values():
        number, size = counted["traffic"].get((source, target), (0, 0))
        found = found[0] + number, found[1] + size
    return found


@ch.task(placement=gpu)
def add(x: ch.InOut[Array], y: float) -> None:
    x += y


@ch.task(placement=gpu)
def accumulate(x: ch.InOut[Array], y: ch.In[Array]) -> None:
    x += y


@ch.task(placement=gpu)
def put(x: ch.Out[Array], value: float) -> None:
    x[...] = value


# ---- what a body gets -------------------------------------------------------------------------


def test_a_region_is_an_array_of_the_device() -> None:
    a = np.arange(24.0).reshape(4, 6)
    with opened():
        A = ch.array(a)

        @ch.task(placement=gpu)
        def body(x: ch.In[Array], y: ch.InOut[Array], z: ch.Out[Array], s: float) -> Any:
            assert all(type(one) is virtual.ndarray for one in (x, y, z))
            assert {one.device for one in (x, y, z)} == {ch.current().device}
            assert ch.current().array_library == "virtual"
            z[...] = x + s
            y *= 2
            return x.shape, y.shape, z.shape, x.dtype

        found = body(A[0], A[1:3, ::2], A[3:, ::-1], 0.5)
        assert found.result() == ((6,), (2, 3), (1, 6), np.dtype(float))
        a[3, ::-1] = a[0] + 0.5
        a[1:3, ::2] *= 2
        np.testing.assert_array_equal(A.numpy(), a)


@pytest.mark.parametrize(
    "index",
    [
        (),
        (0,),
        (slice(None), 2),
        (slice(1, None, 2), slice(None, None, -1)),
        (None, slice(2), None, 1),
        (slice(None, None, -2), slice(4, 1, -2)),
        (3, 5),
        (slice(2, 2),),
    ],
    ids=str,
)
def test_views_are_numpys(index: tuple[Any, ...]) -> None:
    a = np.arange(24.0).reshape(4, 6)
    with opened():
        A = ch.array(a)

        @ch.task(placement=gpu)
        def double(x: ch.InOut[Array], copy: ch.Out[Array]) -> Any:
            copy[...] = x
            x *= 2
            return x.shape, x.strides if x.size else None

        view = a[(*index, ...)]
        B = ch.empty(view.shape)
        shape, _ = double(A[index], B).result()
        assert shape == view.shape
        np.testing.assert_array_equal(B.numpy(), view)
        view *= 2
        np.testing.assert_array_equal(A.numpy(), a)


def test_what_is_read_is_read_only() -> None:
    with opened():
        A = ch.zeros(4)

        @ch.task(placement=gpu)
        def wrong(x: ch.In[Array], how: int) -> None:
            [
                lambda: x.__setitem__(0, 1),
                lambda: x.fill(1),
                lambda: np.add(x, 1, out=x[1:]) if how < 0 else np.add(x[1:], 1, out=x[1:]),
                lambda: virtual.copyto(x, virtual.ones(4)),
                lambda: x.reshape(2, 2).sort(),
            ][how]()

        for how in range(5):
            assert isinstance(wrong(A, how).exception(), ValueError)
        assert not A.numpy().any()


def test_who_reads_all_out_of_order_and_writes_a_part_finds_the_rest() -> None:
    with opened():
        A = ch.array(np.arange(12.0))

        @ch.task(placement=gpu(0))
        def relax(x: ch.In[Array], own: ch.Out[Array]) -> Any:
            own[...] = x[8:12] * 10

        # Both are in one instance, which is there for the first time.
        relax(ch.unordered(A), A[0:4]).result()
        relax(ch.unordered(A), A[4:8]).result()
        np.testing.assert_array_equal(A.numpy(), [80, 90, 100, 110, 80, 90, 100, 110, 8, 9, 10, 11])


def test_a_chain_makes_one_array() -> None:
    found: list[Array] = []
    with opened(check=False):
        A = ch.zeros(16)

        @ch.task(placement=gpu(0))
        def step(x: ch.InOut[Array]) -> None:
            found.append(x)
            x += 1

        for _ in range(50):
            step(A)
        assert A.numpy().tolist() == [50] * 16
    assert len({id(one) for one in found}) == 1


def test_lists_and_parts_and_tokens() -> None:
    with opened():
        A = ch.array(np.arange(6.0))
        order = ch.token()

        @ch.task(placement=gpu)
        def total(target: ch.Out[Array], parts: ch.In[Any], token: ch.InOut[Any]) -> Any:
            target[...] = sum(part.sum() for part in parts)
            return type(parts), token

        @ch.task(placement=gpu)
        def join(target: ch.Out[Array], *parts: ch.In[Array]) -> int:
            target[...] = ch.current().xp.concatenate(parts)
            return len(parts)

        B, C = ch.empty(()), ch.empty(6)
        assert total(B, [A[0:2], A[4:]], order).result() == (list, None)
        assert float(B.numpy()) == 0 + 1 + 4 + 5
        assert join(C, A[3:], A[:3]).result() == 2
        assert C.numpy().tolist() == [3, 4, 5, 0, 1, 2]


def test_handles_and_regions_together() -> None:
    with opened():
        A = ch.zeros(3)

        @ch.task
        def number() -> float:
            return 7.0

        add(A, number())
        assert A.numpy().tolist() == [7, 7, 7]


def test_inline_tasks_and_local() -> None:
    with opened():
        A, B = ch.array(np.arange(4.0)), ch.zeros(4)

        @ch.spawn(placement=gpu, input=A, output=B)
        def body() -> None:
            context = ch.current()
            x, y = context.local(A[1:3]), context.local(B)
            assert type(x) is type(y) is virtual.ndarray
            y[...] = 0
            y[1:3] = x
            with pytest.raises(ValueError, match="read-only"):
                x[...] = 1

        @ch.spawn(placement=gpu)
        def inline(b: ch.InOut[Array] = B, factor: float = 3.0) -> None:
            b *= factor

        assert B.numpy().tolist() == [0, 3, 6, 0]


def test_a_body_may_spawn_and_wait() -> None:
    with opened():
        A, B = ch.zeros(4), ch.zeros(4)

        @ch.task(placement=gpu(0))
        def outer(a: ch.InOut[Array]) -> None:
            a += 1
            put(B, 5.0).result()
            a += 1
            a *= float(B.numpy()[0])

        outer(A)
        assert A.numpy().tolist() == [10] * 4


def test_coroutines() -> None:
    with opened():
        A, B = ch.zeros(4), ch.zeros(4)

        @ch.task(placement=gpu(0))
        async def outer(a: ch.InOut[Array]) -> None:
            a += 1
            await put(B, 5.0)
            a += 1

        outer(A)
        assert A.numpy().tolist() == [2] * 4


def test_kept_arrays_are_found_out() -> None:
    kept: list[Array] = []
    with opened(check=True):
        A = ch.zeros(4)

        @ch.task(placement=gpu(0))
        def keep(a: ch.InOut[Array]) -> None:
            kept.extend([a, a[1:], a.copy()])

        @ch.task(placement=gpu(0))
        def use(at: int) -> float:
            return float(kept[at].sum())

        keep(A).result()
        for at in (0, 1):
            error = use(at).exception()
            assert isinstance(error, ch.AccessError)
            assert "keep has ended" in str(error)
        assert use(2).result() == 0
        with pytest.raises(ch.AccessError, match="keep has ended"):
            kept[0].get()
        kept.clear()


# ---- sets -------------------------------------------------------------------------------------


@ch.task(placement=gpu * 2, shards={"c": 0, "a": 0})
def gemm(a: ch.In[Array], b: ch.In[Array], c: ch.InOut[Array]) -> Any:
    for _, ai, bi, ci in zip(ch.current().each(), a, b, c, strict=True):
        ci -= ai @ bi
    return [one.shape for one in (*a, *b, *c)], [one.device for one in c]


def test_a_set_gets_shards_and_copies() -> None:
    random = np.random.default_rng(0)
    a, b, c = random.random((5, 3)), random.random((3, 4)), random.random((5, 4))
    with opened(gpus=2):
        A, B, C = map(ch.array, (a, b, c))
        shapes, devices = gemm(A, B, C).result()
        assert shapes == [(3, 3), (2, 3), (3, 4), (3, 4), (3, 4), (2, 4)]
        assert devices == list(dict.fromkeys(devices)) and len(devices) == 2
        np.testing.assert_allclose(C.numpy(), c - a @ b)
        gemm(A[::2], B, C[1:4])
        np.testing.assert_allclose(C.numpy()[1:4], (c - a @ b)[1:4] - a[::2] @ b)


def test_a_set_of_one_gets_tuples() -> None:
    with opened(gpus=1):
        A = ch.zeros(4)
        seen: list[Any] = []

        @ch.task
        def body(a: ch.InOut[Array]) -> None:
            seen.append(type(a))
            for one in a if isinstance(a, tuple) else (a,):
                one += 1

        for placement in (gpu * 1, gpu.all, (gpu,), gpu, gpu(0), cpu * 2, cpu):
            body.options(placement=placement, shards={"a": 0})(A).result()
        assert seen == [
            tuple,
            tuple,
            tuple,
            virtual.ndarray,
            virtual.ndarray,
            np.ndarray,
            np.ndarray,
        ]
        assert A.numpy().tolist() == [7] * 4


def test_replicated_and_mixed_sets() -> None:
    with opened(gpus=2):
        A, B = ch.zeros(4), ch.zeros((4, 2))

        @ch.task(placement=gpu * 2, shards={"a": "replicated"})
        def same(a: ch.Out[Array]) -> None:
            for _, one in zip(ch.current().each(), a, strict=True):
                one[...] = 3

        @ch.task(placement=(cpu, gpu), shards={"b": 1})
        def mixed(a: ch.In[Array], b: ch.InOut[Array]) -> Any:
            for _, x, y in zip(ch.current().each(), a, b, strict=True):
                y += x[:, None] * (2 if isinstance(x, np.ndarray) else 1)
            return [type(one) for one in b]

        same(A)
        assert mixed(A, B).result() == [np.ndarray, virtual.ndarray]
        assert A.numpy().tolist() == [3] * 4
        assert B.numpy().tolist() == [[6, 3]] * 4


def test_a_barrier_lets_a_body_read_other_shards() -> None:
    with opened(gpus=2) as rt:
        assert rt.devices is not None
        rt.devices.enable_peer(0, 1)
        rt.devices.enable_peer(1, 0)
        A, B = ch.array(np.arange(8.0)), ch.zeros(8)

        @ch.task(placement=gpu * 2, shards={"a": 0, "b": 0})
        def swap(a: ch.InOut[Array], b: ch.Out[Array]) -> None:
            context = ch.current()
            for _, one in zip(context.each(), a, strict=True):
                one *= 2
            context.barrier()
            for _, other, one in zip(context.each(), reversed(a), b, strict=True):
                one[...] = other

        swap(A, B)
        assert B.numpy().tolist() == [8, 10, 12, 14, 0, 2, 4, 6]


def test_variants_have_shards_of_their_own() -> None:
    @ch.task(placement=cpu)
    def double(a: ch.InOut[Array]) -> str:
        a *= 2
        return "cpu"

    @double.variant(gpu)
    def _(a: Array) -> str:
        a *= 2
        return "gpu"

    @double.variant(gpu * 2, shards={"a": 0})
    def _(a: Array) -> str:
        for _, one in zip(ch.current().each(), a, strict=True):
            one *= 2
        return "two"

    with opened(gpus=2):
        A = ch.full(6, 1.0)
        for placement, name in ((cpu, "cpu"), (gpu, "gpu"), (gpu * 2, "two"), (gpu(1), "gpu")):
            assert double.options(placement=placement)(A).result() == name
        for _ in range(12):
            double(A)
        assert A.numpy().tolist() == [2.0**16] * 6


def test_what_sets_are_refused() -> None:
    def body(a: ch.InOut[Array], b: ch.In[Array]) -> None: ...

    with pytest.raises(ch.AccessError, match=r"a is written on gpu \* 2"):
        ch.task(placement=gpu * 2)(body)
    with pytest.raises(ch.AccessError, match=r"a is written on gpu\.all"):
        ch.task(placement=[cpu, gpu.all], shards={"b": 0})(body)
    with pytest.raises(ch.AccessError, match=r"a is written on \(cpu, gpu\)"):
        ch.task(placement=(cpu, gpu))(body)
    with pytest.raises(ch.AccessError, match="no parameter c takes a region"):
        ch.task(placement=gpu * 2, shards={"a": 0, "c": 0})(body)
    with pytest.raises(ch.AccessError, match="from 0 on, not -1"):
        ch.task(placement=gpu * 2, shards={"a": -1})(body)
    for wrong in ({"a": "split"}, {"a": 1.0}, {1: 0}, [("a", 0)]):
        with pytest.raises(TypeError):
            ch.task(placement=gpu * 2, shards=anything(wrong))(body)
    function = ch.task(body)
    with pytest.raises(ch.AccessError, match=r"a is written on gpu \* 2"):
        function.variant(gpu * 2)(body)
    function.variant(gpu * 2, shards={"a": 0})(body)
    with opened(gpus=4):
        A = ch.zeros((3, 1))
        with pytest.raises(ch.AccessError, match="written on a set"):
            function.options(placement=gpu * 3)(A, A[:0])
        with pytest.raises(ch.AccessError, match="has no axis 2"):
            function.options(placement=gpu * 2, shards={"a": 2})(A, A[:0])
        with pytest.raises(ch.AccessError, match="runs backwards"):
            function.options(placement=gpu * 2)(A[::-1], A[:0])
        with pytest.raises(ch.AccessError, match="added by an index"):
            function.options(placement=gpu * 2)(A[None], A[:0])
        with pytest.raises(ch.AccessError, match="3 indices"):
            function.options(placement=gpu * 4, shards={"a": 0})(A, A[:0])
        with pytest.raises(ch.AccessError, match="no parameter x"):
            function.options(placement=gpu * 2, shards={"x": 0})(A, A[:0])
        with pytest.raises(ch.AccessError):
            ch.spawn(placement=gpu * 2, output=A)(lambda: None)
        function.variant(gpu * 4, shards={"a": 0, "b": 0})(body)
        with pytest.raises(ch.AccessError, match="in different ways"):
            function.options(placement=[gpu * 2, gpu * 4])(A, A[:0])


# ---- copies -----------------------------------------------------------------------------------


def test_nothing_is_copied_twice() -> None:
    with opened() as rt:
        A, B = ch.zeros(1000), ch.empty(1000)

        @ch.task(placement=gpu(0))
        def read(a: ch.In[Array], b: ch.Out[Array]) -> None:
            b[...] = a

        for _ in range(5):
            read(A, B)
        ch.wait([read(A, B)])
        assert copies(rt, "host", "gpu(0)") == (1, 8000)
        assert copies(rt, "gpu(0)", "host") == (0, 0)
        read.options(placement=gpu(1))(B, ch.empty(1000)).result()
        assert copies(rt, "gpu(0)", "gpu(1)") == (1, 8000)
        B.numpy()
        B.numpy()
        home = [copies(rt, str(device), "host") for device in (gpu(0), gpu(1))]
        assert sorted(home) == [(0, 0), (1, 8000)]


def test_host_access_and_assignment() -> None:
    with opened():
        A = ch.zeros((4, 4))
        add(A, 1.0)
        with A[1:3].host("rw") as view:
            assert (view == 1).all()
            view += 1
        add(A[2:], 1.0)
        A[0] = 9.0
        A[:, 3] = np.arange(4.0)
        add(A, 1.0)
        A[3].fill(0.0)
        expected = np.ones((4, 4))
        expected[1:3] += 1
        expected[2:] += 1
        expected[0] = 9
        expected[:, 3] = np.arange(4)
        expected += 1
        expected[3] = 0
        np.testing.assert_array_equal(A.numpy(), expected)
        np.testing.assert_array_equal(np.asarray(A[1]), expected[1])


def test_buffers_that_were_taken_over_are_current_again() -> None:
    a, b = np.zeros(8), np.zeros(8)
    with opened():
        A, B = ch.asarray(a), ch.asarray(b)
        add(A, 3.0)
        add(B, 4.0)
        A.release()
        assert a.tolist() == [3] * 8
        with pytest.raises(ch.AccessError):
            add(A, 1.0)
    assert b.tolist() == [4] * 8


def test_arrays_live_on_from_runtime_to_runtime() -> None:
    A = ch.zeros(4)
    for gpus in (1, 2, 0, 1):
        with opened(gpus):
            add.options(placement=[gpu, cpu])(A, 1.0)
    assert A.numpy().tolist() == [4] * 4


def test_prefetch_and_evict() -> None:
    with opened(gpus=2) as rt:
        A = ch.zeros(1000)
        A.prefetch(gpu(1)).result()
        assert copies(rt, "host", "gpu(1)") == (1, 8000)
        add.options(placement=gpu(1))(A, 1.0).result()
        assert copies(rt, "host", "gpu(1)") == (1, 8000)
        A.evict(gpu(1)).result()
        assert copies(rt, "gpu(1)", "host") == (1, 8000)
        A[:10].prefetch(gpu(0))
        add.options(placement=gpu(0))(A, 1.0)
        A.prefetch(cpu).result()
        before = copies(rt, "gpu(0)", "host")
        assert A.numpy().tolist() == [2] * 1000
        assert copies(rt, "gpu(0)", "host") == before
        A.evict(gpu(0)).result()
        with pytest.raises(ch.PlacementError):
            A.prefetch(gpu(2))
        with pytest.raises(TypeError, match="no device"):
            A.prefetch(anything(gpu))


def test_arrays_of_devices_come_in() -> None:
    with opened():

        @ch.spawn(placement=gpu)
        def body() -> tuple[ch.Array, ch.Array]:
            x = virtual.arange(6.0).reshape(2, 3)
            return ch.array(x), ch.asarray(x.T)

        A, B = body.result()
        assert A.numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
        add(B, 1.0)
        assert B.numpy().tolist() == [[1, 4], [2, 5], [3, 6]]


# ---- modes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", [gpu, [gpu, cpu], gpu * 2, (cpu, gpu)], ids=str)
def test_reductions(placement: Any) -> None:
    with opened(gpus=2):
        X = ch.array(np.arange(12.0).reshape(4, 3))
        total, least, product = ch.full(3, 10.0), ch.full((), 99.0), ch.full(3, 1, np.int64)

        @ch.task(placement=placement)
        def reduce(
            x: ch.In[Array], total: ch.Sum[Array], least: ch.Min[Array], product: ch.Prod[Array]
        ) -> None:
            if not isinstance(total, tuple):
                x, total, least, product = (x,), (total,), (least,), (product,)
            count = len(total)
            each = zip(ch.current().each(), x, total, least, product, strict=True)
            for at, (_, xi, ti, li, pi) in enumerate(each):
                part = xi[len(xi) * at // count : len(xi) * (at + 1) // count]
                ti += part.sum(axis=0)
                np.minimum(li, part.min() if part.size else np.inf, out=li)
                pi *= 2 if at == 0 else 1

        for row in range(0, 4, 2):
            reduce(X[row : row + 2], total, least, product)
        assert total.numpy().tolist() == [10 + 18, 10 + 22, 10 + 26]
        assert float(least.numpy()) == 0
        assert product.numpy().tolist() == [4, 4, 4]


def test_a_reduction_that_nobody_reads_is_combined_at_the_end() -> None:
    total = ch.zeros(2)

    @ch.task(placement=gpu)
    def one(total: ch.Sum[Array]) -> None:
        total += 1

    with opened(gpus=2):
        for _ in range(5):
            one(total)
    assert total.numpy().tolist() == [5, 5]


def test_the_end_of_a_reduction_runs_no_body_on_top_of_itself() -> None:
    """With one thread. A body that waits for what comes after it would have to wait for itself."""
    machine = ch.Machine.virtual(1, time="virtual")
    with ch.Runtime(machine, workers=0):
        total = ch.zeros(2)

        @ch.task(placement=gpu)
        def one(total: ch.Sum[Array]) -> None:
            total += 1

        @ch.task
        def wait() -> None:
            add(total, 1.0).result()

        member = one(total)
        # The end of the reduction is ready at the same time as these, between the two.
        first = wait.options(dependencies=[member])()
        add(total, 1.0)
        second = wait.options(dependencies=[member])()
        ch.wait([first, second])
        assert total.numpy().tolist() == [4, 4]


def test_a_reduction_with_a_failure() -> None:
    total = ch.zeros(2)

    @ch.task(placement=gpu)
    def one(total: ch.Sum[Array], fails: bool) -> None:
        total += 1
        if fails:
            raise Boom

    with opened(gpus=2):
        failed = one(total, True)
        one(total, False)
        with pytest.raises(ch.DependencyError):
            total.numpy()
        assert isinstance(failed.exception(), Boom)


def test_commute() -> None:
    with opened(gpus=2):
        A = ch.zeros(4)

        @ch.task(placement=[gpu, cpu])
        def more(a: ch.Commute[Array]) -> None:
            a += 1

        for _ in range(20):
            more(A)
        assert A.numpy().tolist() == [20] * 4


def test_native_bodies_beside_those_of_devices() -> None:
    @ch.task(placement=gpu)
    def multiply(a: ch.In[Array], b: ch.In[Array], c: ch.Out[Array]) -> None:
        np.matmul(a, b, out=c)

    multiply.variant(cpu)(blas.gemm)
    a = np.random.default_rng(0).random((6, 6))
    with opened(gpus=1):
        A, C = ch.array(a), ch.empty((6, 6))
        for placement in (gpu, cpu, [gpu, cpu], [cpu, gpu]):
            for _ in range(4):
                multiply.options(placement=placement)(A, A, C)
                np.testing.assert_allclose(C.numpy(), a @ a)
                C.fill(0.0)
        with pytest.raises(ch.AccessError, match="memory of the host"):
            blas.gemm.options(placement=gpu)(A, A, C)
        with pytest.raises(ch.AccessError, match="memory of the host"):
            blas.gemm.options(placement=[cpu, gpu])(A, A, C)


def test_a_map_infers() -> None:
    with opened(gpus=2):
        A = ch.zeros((8, 4))
        rows = list(A)
        add.map(rows, [float(i) for i in range(8)])
        accumulate.map(rows[1:], rows[:-1])
        found = np.arange(8.0)
        for i in range(1, 8):
            found[i] += found[i - 1]
        assert A.numpy()[:, 0].tolist() == found.tolist()


# ---- failures ---------------------------------------------------------------------------------


def test_what_never_fits_is_refused_at_the_spawn() -> None:
    with opened(gpus=1, memory=1 * MiB):
        A = ch.zeros(MiB // 8 + 1)
        with pytest.raises(ch.OutOfDeviceMemoryError, match=r"1,048,584|1048584") as info:
            add(A, 1.0)
        assert isinstance(info.value, MemoryError)
        add.options(placement=[gpu, cpu])(A, 1.0)
        assert (A.numpy() == 1).all()
        B = ch.zeros(MiB // 16)
        add.options(memory="512KiB")(B, 1.0)
        with pytest.raises(ch.OutOfDeviceMemoryError):
            add.options(memory="768KiB")(B, 1.0)


def test_more_than_fits_is_evicted_and_comes_back() -> None:
    with opened(gpus=1, memory=1 * MiB) as rt:
        A = ch.zeros((6, MiB // 32))  # rows of 256 KiB
        for turn in range(3):
            for row in A:
                add(row, float(turn + 1))
        assert (A.numpy() == 6).all()
        assert copies(rt, "gpu(0)", "host")[0] > 6


def test_failures_travel_as_ever() -> None:
    with opened():
        A, B = ch.zeros(4), ch.zeros(4)

        @ch.task(placement=gpu)
        def fail(a: ch.Out[Array]) -> None:
            raise Boom

        failed = fail(A)
        skipped = accumulate(B, A)
        error = skipped.exception()
        assert isinstance(error, ch.DependencyError)
        assert isinstance(failed.exception(), Boom)
        with pytest.raises(ch.DependencyError):
            A.numpy()
        put(A, 2.0)
        assert A.numpy().tolist() == [2] * 4


def test_work_that_fails_on_the_device() -> None:
    with opened():
        A = ch.zeros((4, 4))

        @ch.task(placement=gpu)
        def factor(a: ch.InOut[Array]) -> None:
            a[...] = ch.current().xp.linalg.cholesky(a)

        failed = factor(A)
        error = failed.exception()
        assert isinstance(error, ch.DeviceError)
        assert isinstance(error.__cause__, np.linalg.LinAlgError)
        with pytest.raises(ch.DependencyError):
            A.numpy()
        put(A, 1.0)
        assert (A.numpy() == 1).all()


def test_a_copy_that_fails() -> None:
    with opened(gpus=1) as rt:
        A, B = ch.zeros(100), ch.zeros(100)
        add(B, 1.0).result()
        assert rt.devices is not None
        rt.devices.fail_copy(0, 1)
        failed = add(A, 1.0)
        assert isinstance(failed.exception(), ch.DeviceError)
        # It read what never came; nothing is known of what it was to write.
        with pytest.raises(ch.DependencyError):
            A.numpy()
        put(A, 2.0)
        accumulate(A, B)
        assert A.numpy().tolist() == [3] * 100


def test_data_are_lost_with_their_device() -> None:
    with opened(gpus=2) as rt:
        A, B, C = (ch.zeros(100, name=name) for name in "ABC")
        add.options(placement=gpu(0))(A, 1.0).result()
        add.options(placement=gpu(1))(C, 1.0).result()
        B.prefetch(gpu(0)).result()
        assert rt.devices is not None
        rt.devices.lose(0, "on purpose")
        lost = accumulate.options(placement=gpu(1))(C, A)
        error = lost.exception()
        assert isinstance(error, ch.DeviceLostError), repr(error)
        assert "A" in str(error)
        with pytest.raises((ch.DeviceLostError, ch.DependencyError)):
            A.numpy()
        # The host has what was only read there, and what is written anew is there again.
        assert B.numpy().tolist() == [0] * 100
        put.options(placement=gpu(1))(A, 2.0)
        assert A.numpy().tolist() == [2] * 100


def test_retries() -> None:
    attempts: list[int] = []

    def body(a: ch.Out[Array]) -> None:
        attempts.append(1)
        a[...] = len(attempts)
        if len(attempts) < 3:
            raise Boom

    def update(a: ch.InOut[Array]) -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise Boom
        a += 1

    with opened():
        A = ch.zeros(4)
        ch.task(body, placement=gpu, retries=2)(A)
        assert A.numpy().tolist() == [3] * 4
        attempts.clear()
        with pytest.raises(ch.AccessError, match="idempotent=True"):
            ch.task(update, placement=gpu, retries=2)(A)
        ch.task(update, placement=gpu, retries=2, idempotent=True)(A)
        assert A.numpy().tolist() == [4] * 4
        with pytest.raises(TypeError):
            ch.task(update, idempotent=anything(1))


def test_cancelling_what_waits_for_data() -> None:
    with opened(gpus=1, workers=1):
        A, B = ch.zeros(4), ch.zeros(4)

        @ch.spawn(placement=gpu)
        def first(a: ch.InOut[Array] = A) -> None:
            ch.current().stream.busy(0.02)
            a += 1

        second = accumulate(B, A)
        second.cancel()
        third = add(A, 1.0)
        third.result()
        assert A.numpy().tolist() == [2] * 4
        assert second.cancelled() or B.numpy().tolist() == [1] * 4


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("runahead", [0, 64])
def test_any_number_of_workers(workers: int, runahead: int) -> None:
    with opened(gpus=2, workers=workers, runahead=runahead):
        A = ch.zeros((4, 8))
        for turn in range(6):
            for at, row in enumerate(A):
                add.options(placement=[gpu, cpu, gpu((at + turn) % 2)])(row, 1.0)
            accumulate(A[1:], A[:-1])
        expected = np.zeros((4, 8))
        for _ in range(6):
            expected += 1
            expected[1:] += expected[:-1].copy()
        np.testing.assert_array_equal(A.numpy(), expected)


def test_virtual_time() -> None:
    machine = ch.Machine.virtual(2, time="virtual")
    with ch.Runtime(machine, workers=0) as rt:
        A = ch.zeros(1000)
        add.options(placement=gpu(0), cost=1e-3)(A, 1.0)
        add.options(placement=gpu(1), cost=1e-3)(A, 1.0)
        A.numpy()
        assert rt.devices is not None
        assert rt.devices.clock.now > 0


def test_other_libraries_are_for_drivers() -> None:
    with pytest.raises(ValueError, match="array_library"):
        ch.task(lambda: None, array_library=anything("jax"))
    with pytest.raises(TypeError):
        ch.task(lambda: None, array_library=anything(1))
    with opened(gpus=1):
        A = ch.zeros(2)

        @ch.task(placement=gpu, array_library="torch")
        def body(a: ch.In[Array]) -> Any:
            return type(a)

        assert body(A).result() is virtual.ndarray


def test_bad_input() -> None:
    with pytest.raises(ch.AccessError, match="fixed size"):
        ch.zeros(3, object)
    with opened(gpus=2):
        A, B = ch.zeros(4, name="A"), ch.zeros(4)

        @ch.task(placement=gpu)
        def two(a: ch.InOut[Array], b: ch.Out[Array]) -> None: ...

        with pytest.raises(ch.AccessError):
            two(A[:3], A[2:])
        with pytest.raises(ch.AccessError, match="not ndarray; make it managed"):
            add(np.zeros(3), 1.0)
        with pytest.raises(TypeError, match="is a handle of data"):
            anything(A) + 1
        B.release()
        with pytest.raises(ch.AccessError, match="released"):
            add(B, 1.0)
        with pytest.raises(ch.AccessError):
            B.prefetch(gpu(0))
        add(A[2:2], 1.0)
        with pytest.raises(ch.PlacementError):
            add.options(placement=gpu(7))(A, 1.0)

        @ch.task(placement=gpu(0), retries=1)
        def outer(a: ch.In[Array]) -> None:
            with pytest.raises(ch.AccessError):
                add(A, 1.0)
            with pytest.raises(ch.AccessError), A.host("rw"):
                pass

        outer(A).result()
    with pytest.raises(ch.NoRuntimeError):
        A.prefetch(gpu(0))
    assert A.numpy().tolist() == [0] * 4
