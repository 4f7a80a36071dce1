"""Do placement and shares hold, and is BLAS held to the cores of its task?"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy
import pytest
import threadpoolctl
from support import Gate, anything, eventually, no_op, worker_counts

import charioteer as ch


class Occupancy:
    """Counts how much compute the running bodies hold, and the most there ever was."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = 0.0
        self.most = 0.0
        self.bodies = 0

    def body(self, amount: float) -> None:
        with self._lock:
            self.now += amount
            self.most = max(self.most, self.now)
            self.bodies += 1
        for _ in range(20):
            threading.Event().wait(0.0001)
        with self._lock:
            self.now -= amount


@pytest.mark.parametrize("workers", worker_counts(1, 2, 4))
def test_whole_shares_never_exceed_the_cores(workers: int) -> None:
    held = Occupancy()
    with ch.Runtime(workers=workers):
        ch.spawn_many(lambda _: held.body(1), range(60)).result()
    assert held.bodies == 60
    assert held.most <= workers


@pytest.mark.thread_unsafe(reason="two bodies need the halves of the one core")
def test_halves_run_side_by_side_on_one_core(rt1: ch.Runtime) -> None:
    meeting = threading.Barrier(2)
    tasks = [ch.spawn(share=0.5)(lambda: meeting.wait(30)) for _ in range(2)]
    assert sorted(task.result() for task in tasks) == [0, 1]


@pytest.mark.parametrize("share", [0.5, 0.3, 0.25, 0.1])
def test_shares_never_exceed_the_core(rt1: ch.Runtime, share: float) -> None:
    held = Occupancy()
    tasks = [ch.spawn(share=share)(lambda: held.body(share)) for _ in range(60)]
    ch.gather(*tasks).result()
    assert held.bodies == 60
    assert held.most <= 1 + 1e-9


def test_mixed_shares_and_sets(rt2: ch.Runtime) -> None:
    held = Occupancy()
    tasks = []
    for i in range(120):
        match i % 4:
            case 0:
                tasks.append(ch.spawn(share=0.5)(lambda: held.body(0.5)))
            case 1:
                tasks.append(ch.spawn(lambda: held.body(1)))
            case 2:
                tasks.append(ch.spawn(placement=ch.cpu * 2)(lambda: held.body(2)))
            case 3:
                tasks.append(ch.spawn(share=0)(lambda: held.body(0)))
    ch.gather(*tasks).result()
    assert held.bodies == 120
    assert held.most <= rt2.workers + 1e-9


def test_a_share_of_nothing_needs_no_room(rt1: ch.Runtime) -> None:
    meeting = threading.Barrier(5)
    with Gate():
        tasks = [ch.spawn(share=0)(lambda: meeting.wait(30)) for _ in range(5)]
        assert sorted(task.result() for task in tasks) == list(range(5))


def test_a_set_takes_all_its_cores(rt2: ch.Runtime) -> None:
    cores = rt2.workers
    events: list[str] = []

    @ch.task
    def narrow() -> None:
        events.append("in")
        threading.Event().wait(0.0005)
        events.append("out")

    @ch.task(placement=ch.cpu * cores)
    def wide() -> None:
        events.append("wide in")
        threading.Event().wait(0.0005)
        events.append("wide out")

    for _ in range(20):
        narrow.map(*[[]])
        tasks = [narrow(), narrow(), wide(), narrow(), wide(), narrow()]
        ch.gather(*tasks).result()
    inside = 0
    for event in events:
        match event:
            case "in":
                inside += 1
            case "out":
                inside -= 1
            case "wide in":
                assert inside == 0
                inside = cores
            case "wide out":
                assert inside == cores
                inside = 0


def test_a_wide_task_does_not_starve(rt2: ch.Runtime) -> None:
    stop = threading.Event()

    @ch.task
    def endless() -> None:
        # Keeps one narrow task in the queue as long as nobody stops it.
        if not stop.is_set():
            endless()

    for _ in range(4):
        endless()
    wide = ch.spawn(placement=ch.cpu * rt2.workers)(lambda: "wide")
    assert wide.result() == "wide"
    stop.set()


def test_devices_of_a_task(rt2: ch.Runtime) -> None:
    @ch.task
    def devices() -> Any:
        context = ch.current()
        return len(context.devices), context.device is context.devices[0] or (
            context.device == context.devices[0]
        )

    assert devices().result() == (1, True)
    assert devices.options(placement=ch.cpu)().result() == (1, True)
    wide = ch.spawn(placement=ch.cpu * 2)(
        lambda: [str(device) for device in ch.current().devices]
    ).result()
    assert len(wide) == len(set(wide)) == 2
    assert all("cpu" in name for name in wide)


def test_devices_are_those_of_the_machine(rt_any: ch.Runtime) -> None:
    @ch.spawn
    def devices() -> Any:
        return ch.current().devices

    (device,) = devices.result()
    assert isinstance(device, ch.Device)
    assert device.kind is ch.cpu
    assert 0 <= device.index < max(1, rt_any.workers)


def test_a_part_of_a_core_is_a_device(rt1: ch.Runtime) -> None:
    half = ch.spawn(share=0.5)(lambda: ch.current().device)
    assert half.result() == ch.Device(ch.cpu, 0)


def test_a_share_of_nothing_holds_no_device(rt1: ch.Runtime) -> None:
    nothing = ch.spawn(share=0)(lambda: ch.current().devices)
    assert nothing.result() == ()

    @ch.spawn(name="no device", share=0)
    def first() -> None:
        _ = ch.current().device

    with pytest.raises(RuntimeError, match="no device"):
        first.result()


def test_a_coroutine_on_the_event_loop_holds_no_device(rt1: ch.Runtime) -> None:
    @ch.spawn
    async def devices() -> Any:
        before = ch.current().devices
        await asyncio.sleep(0.001)
        return before, ch.current().devices

    assert devices.result() == ((ch.Device(ch.cpu, 0),), ())


def test_running_tasks_have_different_cores(rt2: ch.Runtime) -> None:
    meeting = threading.Barrier(2)

    def body() -> str:
        meeting.wait(30)
        found = str(ch.current().device)
        meeting.wait(30)
        return found

    first, second = rt2.submit(body), rt2.submit(body)
    assert first.result() != second.result()


def test_alternatives_in_free_choice(rt2: ch.Runtime) -> None:
    cores = rt2.workers
    too_wide = ch.cpu * (cores + 1)
    for placement in ([too_wide, ch.cpu], [ch.cpu, too_wide], [ch.cpu], [ch.cpu * 1], ch.cpu * 1):
        task = ch.spawn(placement=placement)(lambda: len(ch.current().devices))
        assert task.result() == 1
    both = ch.spawn(placement=[ch.cpu * 2, ch.cpu])(lambda: len(ch.current().devices))
    assert both.result() in (1, 2)


def test_what_can_never_fit_is_refused_at_the_spawn(rt: ch.Runtime) -> None:
    too_wide = ch.cpu * (rt.workers + 1)
    space = ch.TaskSpace("T")
    for placement in (too_wide, [too_wide], [too_wide, ch.cpu * (rt.workers + 5)]):
        with pytest.raises(ch.PlacementError) as info:
            ch.spawn(space[0], placement=placement)(no_op)
        assert isinstance(info.value, ValueError)
        assert str(rt.workers + 1) in str(info.value)
    assert ch.spawn(space[0])(lambda: 1).result() == 1


@pytest.mark.parametrize("placement", [3, "cpu", object(), ["cpu"], [None], [[]], {"cpu": 1}])
def test_unknown_placements(rt: ch.Runtime, placement: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        ch.spawn(placement=placement)(no_op)
    assert rt.submit(lambda: 1).result() == 1


def test_an_empty_list_of_alternatives(rt: ch.Runtime) -> None:
    with pytest.raises(ch.PlacementError):
        ch.spawn(placement=[])(no_op)


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None])
def test_bad_sets(count: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        ch.cpu * count


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf"), "1", None.__class__])
def test_bad_shares(rt: ch.Runtime, share: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        ch.spawn(share=share)(no_op)
    assert rt.submit(lambda: 1).result() == 1


def test_cpu_sets_have_a_face() -> None:
    assert "cpu" in repr(ch.cpu)
    assert "8" in repr(ch.cpu * 8)
    assert ch.cpu * 2 == anything(ch.cpu * 2)


def test_inline_there_is_a_cpu() -> None:
    with ch.Runtime(workers=0):
        assert ch.spawn(placement=ch.cpu)(lambda: len(ch.current().devices)).result() == 1


def test_waiting_gives_up_the_share(rt1: ch.Runtime) -> None:
    @ch.spawn
    def outer() -> Any:
        inner = ch.spawn(placement=ch.cpu)(lambda: "inner")
        half = ch.spawn(share=0.5)(lambda: "half")
        return inner.result(), half.result()

    assert outer.result() == ("inner", "half")


def test_a_wide_body_waits_for_a_wide_child(rt2: ch.Runtime) -> None:
    wide = ch.cpu * rt2.workers

    @ch.spawn(placement=wide)
    def outer() -> Any:
        return ch.spawn(placement=wide)(lambda: len(ch.current().devices)).result()

    assert outer.result() == rt2.workers


def test_async_bodies_give_up_their_share_at_an_await(rt1: ch.Runtime) -> None:
    space = ch.TaskSpace("T")

    @ch.spawn
    async def sleeper() -> str:
        await space[0]
        await asyncio.sleep(0)
        return "awake"

    assert ch.spawn(placement=ch.cpu)(lambda: 1).result() == 1
    ch.spawn(space[0])(no_op)
    assert sleeper.result() == "awake"


def blas_threads() -> list[int]:
    """The thread counts that the loaded BLAS libraries would use here."""
    infos = threadpoolctl.threadpool_info()
    return [info["num_threads"] for info in infos if info["user_api"] == "blas"]


needs_blas = pytest.mark.skipif(not blas_threads(), reason="numpy's BLAS has no thread control")


@needs_blas
def test_blas_has_one_thread_in_a_plain_task(rt: ch.Runtime) -> None:
    found = rt.submit(blas_threads).result()
    assert found and set(found) == {1}


@needs_blas
@pytest.mark.thread_unsafe(reason="the limit of BLAS is the process's")
def test_blas_has_the_threads_of_the_set(rt2: ch.Runtime) -> None:
    with threadpoolctl.threadpool_limits(2):
        capable = set(blas_threads()) == {2}
    if not capable:
        pytest.skip("this BLAS was built for one thread")
    for _ in range(5):
        assert set(rt2.submit(blas_threads).result()) == {1}
        assert set(ch.spawn(placement=ch.cpu * 2)(blas_threads).result()) == {2}
    assert set(rt2.submit(blas_threads).result()) == {1}


@needs_blas
def test_blas_is_as_before_after_the_runtime() -> None:
    before = blas_threads()
    with ch.Runtime(workers=2) as rt:
        rt.submit(blas_threads).result()
        ch.spawn(placement=ch.cpu * 2)(blas_threads).result()
    assert blas_threads() == before


@needs_blas
def test_products_in_many_tasks_are_right(rt2: ch.Runtime) -> None:
    matrix = numpy.arange(10_000.0).reshape(100, 100)
    expected = matrix @ matrix
    tasks = [
        ch.spawn(placement=ch.cpu * (1 + i % 2))(lambda: bool((matrix @ matrix == expected).all()))
        for i in range(40)
    ]
    # Threaded and plain products may round differently, but this one is exact.
    assert all(ch.gather(*tasks).result())


def test_all_is_given_back_after_failures_and_cancels(rt2: ch.Runtime) -> None:
    def fail() -> None:
        raise LookupError

    for i in range(30):
        placement = [ch.cpu * 2, ch.cpu][i % 2]
        task = ch.spawn(placement=placement)(fail)
        cancelled = ch.spawn(placement=placement)(no_op)
        cancelled.cancel()
        assert isinstance(task.exception(), LookupError)
        ch.wait([cancelled])
    whole = ch.spawn(placement=ch.cpu * rt2.workers)(lambda: "all cores")
    assert whole.result() == "all cores"
    eventually(whole.done, "done")
