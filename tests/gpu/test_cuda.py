"""Tasks on real GPUs: order, streams, other libraries, failures."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import charioteer as ch
from charioteer import _core, cpu, gpu

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]

Counters = Callable[[], dict[str, Any]]
Spin = Callable[..., None]


def test_the_machine_has_the_drivers_gpus() -> None:
    machine = ch.Machine.detect()
    assert machine.driver == "cuda"
    for one in machine.gpus:
        assert one.memory > 1 << 30
        assert one.name
        assert one.capability is not None
        assert float(one.capability) >= 5
    with machine.open() as devices:
        assert devices.gpus == len(machine.gpus)
        assert 0 < devices.free_memory(0) <= machine.gpus[0].memory


def test_links_are_measured() -> None:
    machine = ch.Machine.detect().measured()
    for ends in [(cpu(0), gpu(0)), (gpu(0), cpu(0))]:
        link = machine.links.between(*ends)
        assert link is not None
        assert 1e9 < link.bandwidth < 1e12
        assert 0 < link.latency < 1e-3


def test_a_file_may_name_the_driver(tmp_path: Path) -> None:
    machine = ch.Machine.detect()
    path = tmp_path / "machine.yaml"
    machine.to_yaml(path)
    assert ch.Machine.from_yaml(path) == machine


def test_results_are_numpys(rt: ch.Runtime, cp: Any) -> None:
    a, b = np.random.default_rng(1).random((2, 300, 300))

    @ch.task(placement=gpu)
    def product(x: Any, y: Any) -> Any:
        assert ch.current().xp is cp
        return cp.asarray(x) @ cp.asarray(y)

    @ch.task(placement=gpu)
    def total(x: Any) -> float:
        return float(x.sum())

    found = product(a, b)
    np.testing.assert_allclose(cp.asnumpy(found.result()), a @ b)
    assert total(product(found, b)).result() == pytest.approx((a @ b @ b).sum())


def test_a_chain_takes_one_stream_and_no_wait(rt: ch.Runtime, cp: Any, counters: Counters) -> None:
    length = 500
    x = cp.zeros(1 << 16)
    cp.cuda.get_current_stream().synchronize()
    T = ch.TaskSpace("chain")
    for i in range(length):

        @ch.spawn(T[i], dependencies=T[i - 1] if i else None, placement=gpu(0))
        def step() -> None:
            cp.add(x, 1.0, out=x)

    T[length - 1].result()
    seen = counters()
    assert seen["streams"] == 1
    assert seen["host_synchronisations"] == 0
    assert seen["stream_waits"] == 0
    # Who sleeps for one hears of many.
    assert seen["notifications"] <= length
    assert (cp.asnumpy(x) == length).all()


def test_empty_bodies_need_no_notification(rt: ch.Runtime, cp: Any, counters: Counters) -> None:
    @ch.task(placement=gpu(0))
    def nothing() -> None: ...

    ch.wait([nothing() for _ in range(200)])
    assert counters()["notifications"] == 0


def test_what_is_after_a_long_kernel_sees_what_it_wrote(
    rt: ch.Runtime, cp: Any, spin: Spin
) -> None:
    for attempt in range(5):
        target = cp.zeros(1, cp.int64)
        cp.cuda.get_current_stream().synchronize()

        @ch.spawn(placement=gpu(0))
        def write() -> None:
            spin(0.01, target, 10 + attempt)

        @ch.task(placement=gpu(0), dependencies=write, share=0.25)
        def read(factor: int) -> Any:
            return target * factor

        # All of them on streams but one that are not the writer's.
        readers = [read(factor) for factor in range(1, 5)]

        @ch.spawn(placement=gpu(0), dependencies=readers)
        def add() -> int:
            return int(sum(one.result() for one in readers)[0])

        assert add.result() == (10 + attempt) * 10


def test_dependents_run_ahead(rt: ch.Runtime, cp: Any, spin: Spin) -> None:
    ahead = threading.Event()

    @ch.spawn(placement=gpu(0))
    def first() -> None:
        spin(0.5)

    @ch.spawn(placement=gpu(0), dependencies=first)
    def second() -> None:
        ahead.set()

    assert ahead.wait(30)
    assert not first.done()
    second.result()
    assert first.done()


def test_independent_tasks_run_side_by_side(rt: ch.Runtime, cp: Any, meet: Any) -> None:
    flags = cp.zeros(2, cp.int32)
    met = cp.zeros(2, cp.int32)
    cp.cuda.get_current_stream().synchronize()

    @ch.task(placement=gpu(0), share=0.5)
    def one(mine: int) -> None:
        meet((1,), (1,), (flags[mine:], flags[1 - mine :], met[mine:]))

    ch.wait([one(0), one(1)])
    assert met.get().tolist() == [1, 1]


def test_a_short_task_is_told_before_a_long_one_beside_it(
    rt: ch.Runtime, cp: Any, spin: Spin
) -> None:
    @ch.spawn(placement=gpu(0), share=0.5)
    def long() -> None:
        spin(1.0)

    @ch.task(placement=gpu(0), share=0.5)
    def short() -> None:
        spin(1e-5)

    for _ in range(10):
        short().result()
    assert not long.done()
    long.result()


def test_libraries_have_the_tasks_stream(rt: ch.Runtime, cp: Any, torch: Any) -> None:
    legacy = cp.cuda.get_current_stream().ptr

    @ch.task(placement=gpu)
    def on_device(index: int) -> bool:
        context = ch.current()
        handle = context.stream.handle
        return (
            cp.cuda.get_current_stream().ptr == handle
            and torch.cuda.current_stream().cuda_stream == handle
            and cp.cuda.runtime.getDevice() == context.device.index
            and torch.cuda.current_device() == context.device.index
            and context.stream.__cuda_stream__() == (0, handle)
            and context.stream.cupy.ptr == handle
            and context.stream.torch.cuda_stream == handle
        )

    @ch.task
    def on_core(index: int) -> bool:
        return (
            cp.cuda.get_current_stream().ptr == legacy
            and torch.cuda.current_stream() == torch.cuda.default_stream()
        )

    tasks = [one(index) for index in range(50) for one in (on_device, on_core)]
    assert all(task.result() for task in tasks)
    assert cp.cuda.get_current_stream().ptr == legacy


def test_a_body_that_waits_finds_its_own_stream_again(rt: ch.Runtime, cp: Any, torch: Any) -> None:
    @ch.task(placement=gpu(0))
    def inner() -> int:
        return ch.current().stream.handle

    @ch.task
    def on_core() -> int:
        return cp.cuda.get_current_stream().ptr

    @ch.spawn(placement=gpu(0))
    def outer() -> tuple[int, int, int, int]:
        handle = ch.current().stream.handle
        inner().result()
        on_core().result()
        here = cp.cuda.get_current_stream().ptr, torch.cuda.current_stream().cuda_stream
        return handle, ch.current().stream.handle, *here

    assert len(set(outer.result())) == 1


def test_a_thread_that_is_not_the_runtimes_is_put_back(cp: Any, torch: Any) -> None:
    mine = cp.cuda.Stream(non_blocking=True)
    with mine, torch.cuda.stream(torch.cuda.Stream()) as _:
        theirs = torch.cuda.current_stream()
        with ch.Runtime(workers=0):

            @ch.spawn(placement=gpu(0))
            def body() -> tuple[int, int]:
                return ch.current().stream.handle, cp.cuda.get_current_stream().ptr

            handle, current = body.result()
            assert handle == current != mine.ptr
        assert cp.cuda.get_current_stream().ptr == mine.ptr
        assert torch.cuda.current_stream() == theirs


def test_torch_tensors_pass_from_task_to_task(rt: ch.Runtime, torch: Any) -> None:
    @ch.task(placement=gpu(0), share=0.25)
    def make(seed: int) -> Any:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.rand(256, 256, device="cuda", generator=generator)

    @ch.task(placement=gpu(0), share=0.25)
    def product(x: Any, y: Any) -> Any:
        return x @ y

    @ch.task(placement=gpu(0))
    def trace(x: Any) -> float:
        return float(x.trace())

    tensors = [make(seed) for seed in range(4)]
    found = trace(product(product(tensors[0], tensors[1]), product(tensors[2], tensors[3])))
    a, b, c, d = (one.result() for one in tensors)
    assert found.result() == pytest.approx(float(((a @ b) @ (c @ d)).trace()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*Grid size")
def test_numba_takes_the_stream(rt: ch.Runtime, cp: Any, numba_cuda: Any) -> None:
    cuda = numba_cuda

    @cuda.jit
    def scale(x: Any, factor: float) -> None:
        at = cuda.grid(1)
        if at < x.size:
            x[at] *= factor

    @ch.task(placement=gpu(0))
    def body() -> Any:
        x = cp.arange(1000, dtype=cp.float64)
        scale[4, 256, ch.current().stream.numba](x, 3.0)
        return x

    np.testing.assert_array_equal(cp.asnumpy(body().result()), 3.0 * np.arange(1000))


@pytest.fixture
def checking() -> Iterator[ch.Runtime]:
    with ch.Runtime(workers=2, check=True) as runtime:
        yield runtime


def test_work_left_on_the_default_stream_is_told(checking: ch.Runtime, cp: Any, spin: Spin) -> None:
    @ch.task(placement=gpu(0))
    def careless() -> None:
        with cp.cuda.Stream.null:
            spin(0.2)

    with pytest.warns(ch.StreamWarning, match=r"default stream of gpu\(0\).*careless"):
        careless().result()
    cp.cuda.runtime.deviceSynchronize()
    # Warnings are errors here.
    with pytest.raises(ch.StreamWarning):
        careless().result()
    cp.cuda.runtime.deviceSynchronize()


def test_what_is_not_the_bodys_own_is_not_told(checking: ch.Runtime, cp: Any, spin: Spin) -> None:
    @ch.task(placement=gpu(0))
    def careful() -> Any:
        spin(0.02)
        return cp.ones(10)

    @ch.task(placement=gpu(0))
    def waits() -> None:
        with cp.cuda.Stream.null:
            spin(0.02)
        cp.cuda.Stream.null.synchronize()

    careful().result()
    waits().result()
    spin(0.3)  # of this thread, before the body
    careful().result()
    cp.cuda.runtime.deviceSynchronize()


@pytest.mark.filterwarnings("ignore:.*Grid size")
def test_a_kernel_of_numba_without_a_stream_is_told(
    checking: ch.Runtime, cp: Any, numba_cuda: Any
) -> None:
    cuda = numba_cuda

    @cuda.jit
    def slow(x: Any, turns: int) -> None:
        at = cuda.grid(1)
        for turn in range(turns):
            x[at] = x[at] * 0.5 + turn

    x = cp.ones(32)
    slow[1, 32](x, 1)
    cp.cuda.runtime.deviceSynchronize()

    @ch.task(placement=gpu(0))
    def careless(turns: int) -> None:
        slow[1, 32](x, turns)

    @ch.task(placement=gpu(0))
    def careful(turns: int) -> None:
        slow[1, 32, ch.current().stream.numba](x, turns)

    careful(2_000_000).result()
    with pytest.warns(ch.StreamWarning, match="careless"):
        careless(2_000_000).result()
    cp.cuda.runtime.deviceSynchronize()


def test_temporaries_and_results_are_not_overwritten(rt: ch.Runtime, cp: Any, spin: Spin) -> None:
    """Random graphs of tasks that allocate, drop and pass arrays between streams."""
    choose = random.Random(7)
    size, tasks, prime = 50_000, 300, 1_000_003

    @ch.task(placement=gpu(0), share=0.2)
    def node(number: int, *inputs: Any) -> Any:
        if number % 50 == 0:
            spin(2e-3)
        result = cp.full(size, number, cp.int64)
        for one in inputs:
            spare = one * 2  # goes back to the pool while the device works
            result += spare - one
        return result % prime

    expected: list[int] = []
    handles: list[Any] = []
    for number in range(tasks):
        picked = [choose.randrange(max(0, number - 20), number) for _ in range(min(number, 2))]
        expected.append((number + sum(expected[at] for at in picked)) % prime)
        handles.append(node(number, *(handles[at] for at in picked)))
        if number >= 30:
            # Of most, tasks are the only ones that still know them.
            handles[number - 30] = handles[number - 30] if number % 10 == 0 else None
    kept = [at for at, handle in enumerate(handles) if handle is not None]
    assert len(kept) > 40
    # On the default stream checking mode would take it for work that a body left.
    with cp.cuda.Stream(non_blocking=True):
        for at in kept:
            assert (cp.asnumpy(handles[at].result()) == expected[at]).all(), at


def test_events_with_names_order_streams(rt: ch.Runtime, cp: Any, spin: Spin) -> None:
    target = cp.zeros(1, cp.int64)
    cp.cuda.get_current_stream().synchronize()

    @ch.spawn(placement=gpu(0), share=0.5)
    def writer() -> Any:
        spin(0.05, target, 5)
        ch.current().record("written")

        @ch.spawn(placement=gpu(0), share=0.5)
        def reader() -> int:
            ch.current().wait("written")
            return int(target[0])

        return reader

    assert writer.result().result() == 5


def test_coroutines_on_devices(rt: ch.Runtime, cp: Any) -> None:
    @ch.task(placement=gpu(0))
    async def add(n: int) -> int:
        if n == 0:
            return 0
        before = await add(n - 1)
        assert cp.cuda.get_current_stream().ptr == ch.current().stream.handle
        return before + int(cp.ones(4).sum())

    assert add(5).result() == 20


def test_memory_that_is_not_there(rt: ch.Runtime, cp: Any, no_memory: type[Exception]) -> None:
    @ch.task(placement=gpu(0))
    def greedy() -> Any:
        return cp.zeros(1 << 42, cp.uint8)

    with pytest.raises(no_memory):
        greedy().result()
    with pytest.raises(ch.PlacementError):
        ch.spawn(placement=gpu(0), memory="100TiB")(print)

    @ch.task(placement=gpu(0))
    def modest() -> float:
        return float(cp.ones(10).sum())

    assert modest().result() == 10


def test_a_fault_of_a_kernel_loses_the_device(cp: Any, tells: Callable[[str], None]) -> None:
    code = r"""
import cupy as cp
import charioteer as ch
from charioteer import gpu

bad = cp.RawKernel('extern "C" __global__ void bad(int* p) { p[1] = 1; }', "bad")

with ch.Runtime(workers=2) as rt:

    @ch.spawn(placement=gpu(0))
    def faulty():
        bad((1,), (1,), (cp.uint64(0),))

    @ch.spawn(placement=gpu(0), dependencies=faulty)
    def dependent():
        pass

    try:
        faulty.result()
    except ch.DeviceLostError as error:
        assert "illegal" in str(error), error
    else:
        raise SystemExit("the fault was not told")
    try:
        dependent.result()
    except ch.CharioteerError as error:
        assert isinstance(error, (ch.DependencyError, ch.DeviceLostError)), error
    else:
        raise SystemExit("the dependent was")

    @ch.spawn(placement=gpu(0))
    def later():
        pass

    try:
        later.result()
    except ch.DeviceLostError:
        pass
    else:
        raise SystemExit("the device lives on")
    assert ch.spawn()(lambda: 7).result() == 7
print("told", flush=True)
import os
os._exit(0)  # CuPy has things to say about its modules at the end
"""
    tells(code)


def test_nothing_is_left_of_many_tasks(rt: ch.Runtime, cp: Any, counters: Counters) -> None:
    pool = cp.get_default_memory_pool()

    @ch.task(placement=gpu(0), share=0.25)
    def body(n: int) -> Any:
        return cp.full(1000, n)

    def some() -> None:
        tasks = [body(n) for n in range(1000)]
        assert int(tasks[-1].result()[0]) == 999

    some()
    rt.stats()
    used, free = pool.used_bytes(), counters()["streams"]
    for _ in range(4):
        some()
    ch.spawn()(lambda: None).result()
    assert pool.used_bytes() <= used + (1 << 20)
    assert counters()["streams"] <= free + 8


def test_one_runtime_after_another_uses_the_same_streams(cp: Any) -> None:
    def handles() -> set[int]:
        with ch.Runtime(workers=1):

            @ch.task(placement=gpu(0))
            def body() -> int:
                return ch.current().stream.handle

            return {body().result() for _ in range(3)}

    seen = [handles() for _ in range(5)]
    assert len(set.union(*seen)) <= 3


def test_a_trace_of_gpu_tasks_holds(tmp_path: Path, cp: Any, spin: Spin) -> None:
    path = tmp_path / "trace"
    with ch.Runtime(workers=3, trace=path):
        T = ch.TaskSpace("T")
        for i in range(40):

            @ch.spawn(
                T[i],
                dependencies=[T[j] for j in {i // 2, i - 1} if 0 <= j < i],
                placement=gpu(0),
                share=0.3,
            )
            def body() -> None:
                spin(1e-4)

        T[39].result()
    tasks, grants, _, violations = _core.check_trace(path)
    assert (tasks, grants) == (40, 40)
    assert violations == []


@pytest.mark.gpu(2)
def test_a_task_on_two_gpus(rt: ch.Runtime, cp: Any, spin: Spin) -> None:
    x = np.random.default_rng(3).random(1 << 20)

    @ch.task(placement=gpu * 2)
    def both() -> float:
        context = ch.current()
        halves: list[Any] = []
        for device in context.each():
            assert cp.cuda.runtime.getDevice() == device.index
            assert cp.cuda.get_current_stream().ptr == context.stream.handle
            spin(2e-3 * (1 + device.index))
            halves.append(cp.asarray(np.array_split(x, 2)[device.index]) * 2.0)
        context.barrier()
        total = cp.empty_like(halves[1])
        total[...] = halves[1]  # over the link
        return float(halves[0].sum() + total.sum())

    for _ in range(5):
        assert both().result() == pytest.approx(2 * x.sum())


# CuPy says that it has given itself access to the other device's memory.
@pytest.mark.filterwarnings("ignore:The device where the array resides")
@pytest.mark.gpu(2)
def test_dependencies_between_gpus_wait_on_the_devices(rt: ch.Runtime, cp: Any, spin: Spin) -> None:
    for attempt in range(5):
        with cp.cuda.Device(0):
            target = cp.zeros(1, cp.int64)
            cp.cuda.get_current_stream().synchronize()

        @ch.spawn(placement=gpu(0))
        def write() -> None:
            spin(0.02, target, 1 + attempt)

        @ch.spawn(placement=gpu(1), dependencies=write)
        def fetch() -> Any:
            assert cp.cuda.runtime.getDevice() == 1
            copy = cp.empty(1, cp.int64)
            copy[...] = target
            return copy

        @ch.spawn(placement=gpu(1), dependencies=fetch)
        def read() -> int:
            return int(fetch.result()[0])

        assert read.result() == 1 + attempt
    assert rt.stats()["devices"][gpu(1)]["stream_waits"] >= 5
    assert rt.stats()["devices"][gpu(1)]["host_synchronisations"] == 0


@pytest.mark.gpu(2)
def test_peers_are_measured() -> None:
    machine = ch.Machine.detect().measured()
    link = machine.links.between(gpu(0), gpu(1))
    if link is None:
        pytest.skip("the GPUs do not reach each other")
    assert 1e9 < link.bandwidth < 2e12
