"""Tasks on virtual devices: where they run, in which order, and what they find there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import charioteer as ch
from charioteer import cpu, gpu, virtual


def machine(gpus: int = 2, time: str = "real") -> ch.Machine:
    return ch.Machine.virtual(gpus, memory="64MiB", time=time)


@pytest.fixture(params=[1, 4])
def runtime(request: pytest.FixtureRequest) -> Iterator[ch.Runtime]:
    with ch.Runtime(machine(request.param)) as opened:
        yield opened


def test_a_body_computes_on_its_device(runtime: ch.Runtime) -> None:
    @ch.task(placement=gpu)
    def scale(x: np.ndarray, factor: float) -> Any:
        xp = ch.current().xp
        return xp.asarray(x) * factor

    x = np.arange(1000.0)
    result = scale(x, 3.0).result(timeout=60)
    assert isinstance(result, virtual.ndarray)
    np.testing.assert_array_equal(result.get(), 3.0 * x)


def test_the_context_tells_devices_and_streams(runtime: ch.Runtime) -> None:
    count = len(runtime.machine.gpus)

    @ch.spawn(placement=gpu(count - 1))
    def one() -> None:
        context = ch.current()
        assert context.devices == (gpu(count - 1),)
        assert context.device == gpu(count - 1)
        assert context.streams == (context.stream,)
        assert context.stream.device == count - 1
        assert context.xp is virtual

    @ch.spawn(placement=gpu.all)
    def every() -> list[int]:
        context = ch.current()
        seen = []
        for device in context.each():
            assert device == context.device
            assert virtual.current_stream() == context.stream
            seen.append(device.index)
        assert context.device == context.devices[0]
        return seen

    @ch.spawn
    def host() -> None:
        context = ch.current()
        assert {device.kind for device in context.devices} == {cpu}
        assert context.streams == ()
        assert context.xp is np
        with pytest.raises(RuntimeError, match="holds no stream"):
            _ = context.stream

    one.result(timeout=60)
    assert every.result() == list(range(count))
    host.result()


def test_a_chain_runs_ahead_on_one_stream_and_the_host_never_waits() -> None:
    with ch.Runtime(machine(1), workers=1) as runtime:
        T = ch.TaskSpace("T")

        @ch.spawn(T[0], placement=gpu)
        def first() -> Any:
            return virtual.zeros(16)

        for i in range(1, 500):

            @ch.spawn(T[i], placement=gpu, dependencies=T[i - 1])
            def step(x: Any = T[0]) -> None:
                x += 1.0

        last = T[499]
        last.result(timeout=60)
        counted = runtime.stats()["devices"][gpu(0)]
        assert counted["host_synchronisations"] == 0
        assert counted["streams"] == 1
        np.testing.assert_array_equal(first.result().get(), np.full(16, 499.0))


def test_a_host_task_sees_what_device_tasks_computed(runtime: ch.Runtime) -> None:
    for _ in range(20):

        @ch.spawn(placement=gpu)
        def square() -> Any:
            x = virtual.arange(64)
            ch.current().stream.busy(1e-3)
            return x * x

        @ch.spawn
        def total(x: Any = square) -> float:
            return float(np.sum(x.get()))

        assert total.result(timeout=60) == float(sum(i * i for i in range(64)))


def test_streams_of_a_set_meet_at_a_barrier() -> None:
    with ch.Runtime(machine(2)) as runtime:

        @ch.spawn(placement=gpu * 2)
        def exchange() -> Any:
            context = ch.current()
            parts = []
            for device in context.each():
                context.stream.busy(1e-3 * (1 + device.index))
                parts.append(virtual.full(8, device.index + 1.0))
            context.barrier()
            sums = []
            for device in context.each():
                sums.append(virtual.asarray(parts[1 - device.index].get()) + parts[device.index])
            return sums

        left, right = exchange.result(timeout=60)
        np.testing.assert_array_equal(left.get(), np.full(8, 3.0))
        np.testing.assert_array_equal(right.get(), np.full(8, 3.0))
        assert runtime.stats()["devices"][gpu(0)]["stream_waits"] >= 1


def test_devices_of_a_set_fetch_from_each_other() -> None:
    # Each value is read where it was made late, from a stream that nobody made wait for it: what is
    # read on the host is ordered behind the array's own stream all the same.
    with ch.Runtime(machine(3)) as runtime:

        @ch.task(placement=gpu * 3)
        def rotate(start: float) -> list[float]:
            context = ch.current()
            parts = []
            for device in context.each():
                context.stream.busy(2e-3 * device.index)
                parts.append(virtual.full(64, start + device.index))
            context.barrier()
            moved = []
            for number, _ in enumerate(context.each()):
                context.stream.busy(1e-2 * number)
                mine = virtual.empty(64)
                mine[...] = parts[(number + 1) % 3]
                moved.append(mine + parts[number])
            return [float(part.get().max()) for part in moved]

        tasks = [rotate(10.0 * i) for i in range(4)]
        for i, task in enumerate(tasks):
            assert task.result(timeout=60) == [20.0 * i + 1, 20.0 * i + 3, 20.0 * i + 2]
        assert runtime.stats()["devices"][gpu(0)]["traffic"]


def test_a_device_without_a_link_is_out_of_reach() -> None:
    apart = ch.Machine.virtual(2, memory="64MiB", link=ch.machine.Links(peer=None))
    with ch.Runtime(apart):

        @ch.spawn(placement=gpu * 2)
        def reach() -> Any:
            made = [virtual.ones(8) for _ in ch.current().each()]
            ch.current().barrier()
            return [made[1 - number] + 1 for number, _ in enumerate(ch.current().each())]

        with pytest.raises(ch.DeviceError, match="no access to the memory of gpu"):
            reach.result(timeout=60)


def test_events_have_names_across_tasks() -> None:
    with ch.Runtime(machine(2)):
        order: list[str] = []

        @ch.spawn(placement=gpu(0))
        def writer() -> None:
            context = ch.current()
            context.stream.busy(5e-3)
            context.stream.enqueue(lambda: order.append("written"))
            context.record("written")

        @ch.spawn(placement=gpu(1), dependencies=writer)
        def reader() -> None:
            context = ch.current()
            with pytest.raises(KeyError, match="nobody"):
                context.wait("nobody")
            context.wait("written")
            context.stream.enqueue(lambda: order.append("read"))

        reader.result(timeout=60)
        assert order == ["written", "read"]


def test_a_device_keeps_what_its_tasks_store() -> None:
    with ch.Runtime(machine(2)):

        @ch.task(placement=[gpu(0), gpu(1)])
        def count() -> int:
            store = ch.current().store
            store["calls"] = store.get("calls", 0) + 1
            return ch.current().device.index

        places = [count().result(timeout=60) for _ in range(10)]

        @ch.task
        def read() -> dict[str, int]:
            return dict(ch.current().store)

        totals = []
        for index in range(2):

            @ch.spawn(placement=gpu(index))
            def stored() -> int:
                return ch.current().store.get("calls", 0)

            totals.append(stored.result(timeout=60))
        assert sum(totals) == 10
        assert totals == [places.count(0), places.count(1)]
        assert read().result() == {}


def test_an_operation_that_fails_fails_its_task_and_its_dependents(runtime: ch.Runtime) -> None:
    @ch.spawn(placement=gpu)
    def bad() -> None:
        ch.current().stream.busy(2e-3)
        ch.current().stream.enqueue(lambda: 1 / 0)

    @ch.spawn(placement=gpu, dependencies=bad)
    def ahead() -> None:
        pass

    @ch.spawn(dependencies=ahead)
    def after() -> None:
        pass

    with pytest.raises(ch.DeviceError) as failure:
        bad.result(timeout=60)
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
    for task in (ahead, after):
        with pytest.raises(ch.DependencyError) as caught:
            task.result(timeout=60)
        assert isinstance(caught.value.__cause__, ch.DeviceError)

    @ch.spawn(placement=gpu)
    def well() -> int:
        return 5

    assert well.result(timeout=60) == 5


def test_a_body_that_waits_lets_its_child_use_the_device() -> None:
    for workers in (0, 1, 3):
        with ch.Runtime(machine(1), workers=workers):

            @ch.spawn(placement=gpu)
            def outer() -> float:
                x = virtual.ones(4)

                @ch.spawn(placement=gpu)
                def inner() -> float:
                    return float((x + x).get().sum())

                value = inner.result()
                return value + float((x * 3.0).get().sum())

            assert outer.result(timeout=60) == 20.0


def test_coroutines_run_on_devices() -> None:
    with ch.Runtime(machine(1)):

        @ch.task(placement=gpu)
        async def pair(depth: int) -> float:
            x = virtual.full(4, float(depth))
            if depth == 0:
                return float(x.get().sum())
            children = pair(depth - 1), pair(depth - 1)
            total = await children[0] + await children[1]
            return total + float(x.get().sum())

        assert pair(4).result(timeout=60) == sum(2 ** (4 - d) * 4.0 * d for d in range(5))


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (gpu * 3, "the machine has 2"),
        (gpu(2), "numbered from 0"),
        ((cpu * 3, gpu), "the runtime has 2 cores"),
        ([gpu * 3, cpu * 500], "the runtime has"),
    ],
)
def test_what_the_machine_cannot_serve_is_refused(placement: Any, words: str) -> None:
    with ch.Runtime(machine(2), workers=2):
        with pytest.raises(ch.PlacementError, match=words):
            ch.spawn(placement=placement)(lambda: None)


def test_a_machine_without_gpus_takes_the_cores() -> None:
    with ch.Runtime(workers=1):

        @ch.spawn(placement=[gpu, cpu])
        def anywhere() -> Any:
            return ch.current().device.kind

        assert anywhere.result(timeout=60) == cpu
        with pytest.raises(ch.PlacementError, match="no gpu"):
            ch.spawn(placement=gpu)(lambda: None)


def test_memory_bounds_what_runs_at_once() -> None:
    with ch.Runtime(machine(1), workers=4):
        lock = threading.Lock()
        held = [0]
        most = [0]

        @ch.task(placement=gpu.require(memory="24MiB", share=0))
        def work() -> None:
            stream = ch.current().stream

            def take() -> None:
                with lock:
                    held[0] += 24
                    most[0] = max(most[0], held[0])

            def give() -> None:
                with lock:
                    held[0] -= 24

            stream.enqueue(take)
            stream.busy(1e-3)
            stream.enqueue(give)

        for _ in range(20):
            work()
    assert 24 <= most[0] <= 64
    with ch.Runtime(machine(1)):
        with pytest.raises(ch.PlacementError, match="bytes wanted"):
            ch.spawn(placement=gpu.require(memory="65MiB"))(lambda: None)


def test_who_waits_for_what_its_own_memory_keeps_from_starting_is_told() -> None:
    with ch.Runtime(machine(1), workers=1):

        @ch.spawn(placement=gpu, memory="40MiB")
        def outer() -> str:
            @ch.spawn(placement=gpu, memory="40MiB")
            def inner() -> None:
                pass

            with pytest.raises(ch.OutOfDeviceMemoryError) as caught:
                inner.result()
            return str(caught.value)

        assert "no room for 41943040 bytes" in outer.result(timeout=60)


def test_a_lost_device_fails_what_needs_it() -> None:
    with ch.Runtime(machine(2)) as runtime:

        @ch.spawn(placement=gpu(0))
        def doomed() -> None:
            ch.current().stream.busy(0.2)

        @ch.spawn(placement=gpu(1))
        def well() -> int:
            return 1

        assert runtime.devices is not None
        runtime.devices.lose(0, "pulled out")
        with pytest.raises(ch.DeviceLostError, match=r"pulled out|lost"):
            doomed.result(timeout=60)
        assert well.result(timeout=60) == 1

        @ch.spawn(placement=gpu)
        def left() -> int:
            return ch.current().device.index

        assert left.result(timeout=60) == 1


def test_virtual_time_simulates_without_taking_any() -> None:
    with ch.Runtime(machine(2, "virtual")) as runtime:
        assert runtime.workers == 0

        @ch.task(placement=gpu)
        def hour() -> None:
            ch.current().stream.busy(3600.0)

        tasks = [hour() for _ in range(10)]
        for task in tasks:
            task.result()
        assert runtime.devices is not None
        assert runtime.devices.clock.now == 5 * 3600 * 10**9
    with pytest.raises(ValueError, match="workers=0"):
        ch.Runtime(machine(2, "virtual"), workers=1)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_graphs_give_what_the_same_calls_in_order_give(data: st.DataObject) -> None:
    gpus = data.draw(st.integers(1, 4))
    count = data.draw(st.integers(1, 25))
    plans = [
        (
            data.draw(st.sampled_from(["gpu", "host", "any", "set"])),
            data.draw(st.lists(st.integers(0, max(0, i - 1)), max_size=3)) if i else [],
            data.draw(st.integers(0, 3)),
        )
        for i in range(count)
    ]
    expected: list[float] = []
    for i, (_, after, _) in enumerate(plans):
        expected.append(float(i) + sum(expected[j] for j in after))
    with ch.Runtime(
        machine(gpus), workers=data.draw(st.integers(0, 3)), runahead=data.draw(st.integers(0, 4))
    ):
        tasks: list[Any] = []
        for i, (where, after, pause) in enumerate(plans):
            placement: Any = {
                "gpu": gpu,
                "host": cpu,
                "any": [gpu(j) for j in range(gpus)],
                "set": gpu.all,
            }[where]

            @ch.spawn(placement=placement)
            def body(
                i: int = i,
                parts: list[Any] = [tasks[j] for j in after],  # noqa: B006
                pause: int = pause,
            ) -> Any:
                context = ch.current()
                if not context.streams:
                    values = [
                        p.get() if isinstance(p, virtual.ndarray) else np.asarray(p) for p in parts
                    ]
                    return float(i) + sum(float(v) for v in values)
                context.stream.busy(pause * 1e-4)
                total = virtual.full((), float(i))
                for part in parts:
                    if isinstance(part, virtual.ndarray) and part.device != context.device:
                        part = part.get()
                    total = total + (
                        part
                        if isinstance(part, virtual.ndarray)
                        else virtual.asarray(np.asarray(part))
                    )
                return total

            tasks.append(body)
        got = [task.result(timeout=60) for task in tasks]
        values = [float(v.get() if isinstance(v, virtual.ndarray) else v) for v in got]
    assert values == expected
