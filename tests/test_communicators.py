"""Communicators: what they compute, on virtual GPUs, and how they call NCCL, with one that writes
down how it is called. ``tests/gpu/test_communicators.py`` has NCCL itself."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import charioteer as ch
from charioteer import _communicators, cpu, gpu, virtual
from charioteer._communicators import Communicators

GPUS = 3


@pytest.fixture
def rt() -> Iterator[ch.Runtime]:
    with ch.Runtime(ch.Machine.virtual(gpus=GPUS, memory="64MiB"), workers=4) as runtime:
        yield runtime


def on_all(context: ch.Context, arrays: list[Any]) -> list[Any]:
    """Each array on its GPU."""
    places = [place for place, one in enumerate(context.devices) if one.kind.name == "gpu"]
    made = []
    before = context.make_current(places[0])
    for place, array in zip(places, arrays, strict=True):
        context.make_current(place)
        made.append(virtual.asarray(array))
    context.make_current(before)
    return made


def host(arrays: list[Any]) -> list[Any]:
    return [array.get() for array in arrays]


VALUES = [np.arange(6.0).reshape(2, 3) + 10 * place for place in range(GPUS)]


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("sum", sum(VALUES)),
        ("prod", VALUES[0] * VALUES[1] * VALUES[2]),
        ("min", VALUES[0]),
        ("max", VALUES[2]),
    ],
)
def test_all_reduce(rt: ch.Runtime, op: str, expected: Any) -> None:
    @ch.spawn(placement=gpu.all)
    def body() -> tuple[list[Any], list[Any], list[Any]]:
        context = ch.current()
        send = on_all(context, VALUES)
        receive = on_all(context, [np.zeros((2, 3))] * GPUS)
        communicator = context.communicator
        assert communicator.size == GPUS and communicator.devices == context.devices
        communicator.all_reduce(send, receive, op)
        unchanged = host(send)
        communicator.all_reduce(tuple(send), op=op)
        return host(receive), unchanged, host(send)

    received, unchanged, in_place = body.result()
    for place in range(GPUS):
        np.testing.assert_array_equal(received[place], expected)
        np.testing.assert_array_equal(unchanged[place], VALUES[place])
        np.testing.assert_array_equal(in_place[place], expected)


def test_reduce_goes_to_the_root_alone(rt: ch.Runtime) -> None:
    @ch.spawn(placement=gpu.all)
    def body() -> tuple[list[Any], Any]:
        context = ch.current()
        send = on_all(context, VALUES)
        receive = on_all(context, VALUES)
        context.communicator.reduce(send, receive[2], root=2)
        context.communicator.reduce(send, root=1, op="max")
        return host(send), receive[2].get()

    sent, received = body.result()
    np.testing.assert_array_equal(received, sum(VALUES))
    for place, expected in enumerate([VALUES[0], VALUES[2], VALUES[2]]):
        np.testing.assert_array_equal(sent[place], expected)


def test_broadcast_gather_and_scatter(rt: ch.Runtime) -> None:
    @ch.spawn(placement=gpu.all)
    def body() -> tuple[list[Any], list[Any], list[Any]]:
        context = ch.current()
        communicator = context.communicator
        gathered = on_all(context, [np.zeros((GPUS, 2, 3))] * GPUS)
        communicator.all_gather(on_all(context, VALUES), gathered)
        scattered = on_all(context, [np.zeros((2, 3))] * GPUS)
        communicator.reduce_scatter(gathered, scattered)
        copied = on_all(context, VALUES)
        communicator.broadcast(copied, root=1)
        return host(gathered), host(scattered), host(copied)

    gathered, scattered, copied = body.result()
    for place in range(GPUS):
        np.testing.assert_array_equal(gathered[place], np.stack(VALUES))
        np.testing.assert_array_equal(scattered[place], GPUS * VALUES[place])
        np.testing.assert_array_equal(copied[place], VALUES[1])


def test_the_order_is_the_sets(rt: ch.Runtime) -> None:
    @ch.spawn(placement=(gpu(2), gpu(0)))
    def body() -> list[Any]:
        context = ch.current()
        assert context.communicator.devices == (gpu(2), gpu(0))
        gathered = on_all(context, [np.zeros(2)] * 2)
        context.communicator.all_gather(on_all(context, [np.ones(1), np.zeros(1)]), gathered)
        return host(gathered)

    assert [one.tolist() for one in body.result()] == [[1, 0], [1, 0]]


def test_cores_of_a_set_have_no_part_in_it(rt: ch.Runtime) -> None:
    @ch.spawn(placement=(cpu, gpu * 2))
    def body() -> list[Any]:
        context = ch.current()
        assert context.communicator.size == 2
        arrays = on_all(context, VALUES[:2])
        context.communicator.all_reduce(arrays)
        return host(arrays)

    np.testing.assert_array_equal(body.result(), [VALUES[0] + VALUES[1]] * 2)


def test_regions_of_a_set(rt: ch.Runtime) -> None:
    x = ch.array(np.arange(12.0))

    @ch.task(placement=gpu * 2, shards={"part": 0})
    def normalize(part: ch.InOut) -> None:
        context = ch.current()
        sums = []
        for _, mine in zip(context.each(), part, strict=True):
            sums.append(mine.sum().reshape(1))
        context.communicator.all_reduce(sums)
        for _, mine, total in zip(context.each(), part, sums, strict=True):
            mine /= total

    normalize(x).result()
    np.testing.assert_allclose(x.numpy(), np.arange(12.0) / 66)


def test_what_does_not_fit_is_refused(rt: ch.Runtime) -> None:
    @ch.spawn(placement=gpu.all)
    def body() -> None:
        context = ch.current()
        communicator = context.communicator
        arrays = on_all(context, VALUES)
        with pytest.raises(TypeError, match="list or a tuple"):
            communicator.all_reduce(arrays[0])
        with pytest.raises(ValueError, match="2 arrays, for 3"):
            communicator.all_reduce(arrays[:2])
        with pytest.raises(TypeError, match="no array on a GPU"):
            communicator.all_reduce([*arrays[:2], VALUES[2]])
        with pytest.raises(ValueError, match=r"is on gpu\(1\), not gpu\(0\)"):
            communicator.all_reduce([arrays[1], arrays[0], arrays[2]])
        with pytest.raises(ValueError, match="contiguous"):
            communicator.all_reduce([array.T for array in arrays])
        with pytest.raises(ValueError, match="one size and one type"):
            communicator.all_reduce(on_all(context, [np.zeros(n) for n in (1, 2, 1)]))
        with pytest.raises(TypeError, match="complex128"):
            communicator.all_reduce(on_all(context, [np.zeros(2, complex)] * GPUS))
        with pytest.raises(ValueError, match="op is"):
            communicator.all_reduce(arrays, op="mean")
        with pytest.raises(ValueError, match="root"):
            communicator.broadcast(arrays, root=3)
        with pytest.raises(TypeError, match="root"):
            communicator.broadcast(arrays, root=1.0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="3 times"):
            communicator.all_gather(arrays, arrays)
        with pytest.raises(ValueError, match="3 times"):
            communicator.reduce_scatter(arrays, arrays)

    body.result()


def test_it_is_for_its_body_alone(rt: ch.Runtime) -> None:
    kept: list[Any] = []

    @ch.spawn(placement=gpu * 2)
    def body() -> None:
        context = ch.current()
        arrays = on_all(context, VALUES[:2])
        kept[:] = [context.communicator, arrays]

    body.result()
    with pytest.raises(RuntimeError, match="body"):
        kept[0].all_reduce(kept[1])

    @ch.spawn(placement=gpu * 2)
    def other() -> None:
        kept[0].all_reduce(kept[1])

    with pytest.raises(RuntimeError, match="body"):
        other.result()

    @ch.spawn
    def on_core() -> None:
        ch.current().communicator  # noqa: B018

    with pytest.raises(RuntimeError, match="holds no GPU"):
        on_core.result()


# ---- NCCL's protocol
# --------------------------------------------------------------------------------


class Device:
    """A GPU, whose streams' waits and kernels are put down in the order in which they are
    enqueued."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.log: list[tuple[Any, ...]] = []
        self.lost = False


class Event:
    def __init__(self, device: Device, stream: int, position: int) -> None:
        self.device, self.stream, self.position = device, stream, position

    def is_complete(self) -> bool:
        if self.device.lost:
            raise ch.DeviceLostError(f"gpu({self.device.number})", "it is gone")
        return True


class Stream:
    def __init__(self, device: Device, handle: int) -> None:
        self.device, self.handle = device, handle

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.handle == other.handle

    def record(self) -> Event:
        return Event(self.device, self.handle, len(self.device.log))

    def wait(self, event: Event) -> None:
        self.device.log.append(("wait", self.handle, event.stream, event.position))


class Nccl:
    """NCCL, as far as it is called. It does not let two threads in."""

    def __init__(self, devices: list[Device]) -> None:
        self.devices = devices
        self.made: list[tuple[int, ...]] = []
        self.destroyed: list[int] = []
        self.aborted: set[int] = set()
        self.streams: dict[int, Device] = {}
        self.answers: dict[str, int] = {}
        self._inside = threading.Lock()
        self._group: list[tuple[Any, ...]] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nccl"):
            return lambda *words: self._operation(name, *words)
        raise AttributeError(name)

    def ncclCommInitAll(self, handles: Any, count: int, numbers: Any) -> int:  # noqa: N802
        self.made.append(tuple(numbers))
        for place in range(count):
            handles[place] = 1000 * len(self.made) + numbers[place]
        return self.answers.get("init", 0)

    def ncclCommDestroy(self, handle: int) -> int:  # noqa: N802
        self.destroyed.append(handle)
        return 0

    def ncclCommAbort(self, handle: int) -> int:  # noqa: N802
        self.aborted.add(handle)
        return 0

    def ncclGetErrorString(self, said: int) -> bytes:  # noqa: N802
        return f"error {said}".encode()

    def ncclGroupStart(self) -> int:  # noqa: N802
        assert self._inside.acquire(blocking=False), "two threads are in NCCL"
        assert self._group is None
        self._group = []
        return 0

    def _operation(self, name: str, *words: Any) -> int:
        assert self._group is not None, f"{name} outside of a group"
        time.sleep(0)  # others may come
        self._group.append((name, *words))
        return self.answers.get(name, 0)

    def ncclGroupEnd(self) -> int:  # noqa: N802
        group, self._group = self._group, None
        assert group is not None
        for name, *words in group:
            handle, stream = words[-2:]
            device = self.devices[handle % 1000]
            assert self.streams[stream] is device, "a stream of another GPU"
            device.log.append((name, stream, handle // 1000, *words[:-2]))
        self._inside.release()
        return self.answers.get("end", 0)


class World:
    def __init__(self, gpus: int = GPUS) -> None:
        self.devices = [Device(number) for number in range(gpus)]
        self.nccl = Nccl(self.devices)
        self.told: dict[int, Any] = {}
        self.communicators = Communicators(self._when_lost, lambda: self.nccl)
        self._handles = iter(range(1, 10_000))

    def _when_lost(self, device: int, call: Any) -> None:
        assert device not in self.told, "it was said already"
        self.told[device] = call

    def streams(self, devices: tuple[int, ...]) -> list[Stream]:
        made = []
        for number in devices:
            stream = Stream(self.devices[number], next(self._handles))
            self.nccl.streams[stream.handle] = self.devices[number]
            made.append(stream)
        return made

    def all_reduce(self, devices: tuple[int, ...], streams: list[Stream]) -> None:
        clique = self.communicators.clique(devices)
        calls = [(64, 64, 5, 8, 0)] * len(devices)
        self.communicators.issue(clique, streams, "AllReduce", calls)


def test_a_clique_is_made_once_for_an_ordered_set() -> None:
    world = World()
    for devices in [(0, 1), (1, 0), (0, 1), (0, 1, 2), (1, 0)]:
        world.all_reduce(devices, world.streams(devices))
    assert world.nccl.made == [(0, 1), (1, 0), (0, 1, 2)]
    world.communicators.close()
    assert len(world.nccl.destroyed) == 7
    world.communicators.close()
    assert len(world.nccl.destroyed) == 7


def test_a_group_waits_for_the_one_before_on_each_of_its_gpus() -> None:
    world = World()
    first, second = world.streams((0, 1)), world.streams((1, 2))
    world.all_reduce((0, 1), first)
    world.all_reduce((0, 1), first)
    world.all_reduce((1, 2), second)
    zero, one, two = (device.log for device in world.devices)
    call = ("ncclAllReduce", 64, 64, 5, 8, 0)
    assert zero == [(call[0], first[0].handle, 1, *call[1:])] * 2  # stream order is enough
    # Behind both operations of the first.
    assert one[2:] == [
        ("wait", second[0].handle, first[1].handle, 2),
        (call[0], second[0].handle, 2, *call[1:]),
    ]
    assert two == [(call[0], second[1].handle, 2, *call[1:])]


def test_threads_cannot_put_their_groups_into_different_orders() -> None:
    """Each GPU runs what is on it in order, if the peers do: that must never come to a
    standstill."""
    world = World()
    sets = [(0, 1), (1, 2), (2, 0), (0, 1, 2), (1, 0)]
    start = threading.Barrier(len(sets))
    failures: list[BaseException] = []

    def work(devices: tuple[int, ...]) -> None:
        try:
            start.wait(30)
            for _ in range(50):
                world.all_reduce(devices, world.streams(devices))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(devices,)) for devices in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    # What waits says whom it waits for, so that on each GPU groups follow each other; and all GPUs
    # have the same order of those that they share.
    orders = []
    for device in world.devices:
        kernels = [entry for entry in device.log if entry[0] == "ncclAllReduce"]
        assert len(kernels) >= 150
        for position, entry in enumerate(device.log):
            if entry[0] == "wait":
                before = device.log[entry[3] - 1]
                assert before == device.log[position - 1]
                assert before[0] == "ncclAllReduce" and before[1] == entry[2]
        assert [entry[0] for entry in device.log] == ["ncclAllReduce"] + [
            "wait",
            "ncclAllReduce",
        ] * (len(kernels) - 1)
        orders.append([entry[2] for entry in kernels])
    members = {number + 1: set(devices) for number, devices in enumerate(world.nccl.made)}
    for a in range(GPUS):
        for b in range(a):
            shared = {number for number, set_ in members.items() if {a, b} <= set_}
            assert [n for n in orders[a] if n in shared] == [n for n in orders[b] if n in shared]


@pytest.mark.parametrize("where", ["init", "ncclAllReduce", "end"])
def test_what_nccl_refuses_is_told(where: str) -> None:
    world = World()
    world.nccl.answers[where] = 4
    with pytest.raises(ch.CommunicatorError, match="error 4"):
        world.all_reduce((0, 1), world.streams((0, 1)))
    del world.nccl.answers[where]
    # The group was ended, and nobody is kept out.
    world.all_reduce((0, 1), world.streams((0, 1)))


def joined() -> None:
    """Waits for the threads that abort."""
    for thread in threading.enumerate():
        if thread.name == "charioteer-nccl":
            thread.join(30)


def test_communicators_of_a_lost_gpu_are_aborted() -> None:
    world = World()
    for devices in [(0, 1), (0, 2), (2, 1)]:
        world.all_reduce(devices, world.streams(devices))
    assert set(world.told) == {0, 1, 2}
    world.told[1]()
    world.told[2]()
    joined()
    assert world.nccl.aborted == {1000, 1001, 2000, 2002, 3002, 3001}
    with pytest.raises(ch.DeviceLostError, match=r"gpu\(1\)"):
        world.all_reduce((0, 1), world.streams((0, 1)))
    world.communicators.close()
    assert world.nccl.destroyed == []


def test_a_loss_that_was_not_told_yet_is_seen_at_the_end() -> None:
    world = World()
    world.all_reduce((0, 1), world.streams((0, 1)))
    world.all_reduce((0, 2), world.streams((0, 2)))
    world.devices[1].lost = True
    world.communicators.close()
    joined()
    assert world.nccl.destroyed == [2000, 2002]
    assert world.nccl.aborted == {1000, 1001}
    world.told[1]()
    joined()
    assert world.nccl.aborted == {1000, 1001}


def test_where_there_is_no_nccl_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_communicators, "_candidates", lambda: iter(["/nowhere/libnccl.so.2"]))
    _communicators._library.cache_clear()
    with pytest.raises(ch.CommunicatorError, match="nvidia-nccl"):
        Communicators(lambda device, call: None).clique((0, 1))


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((2, 3), None, True),
        ((2, 3), (24, 8), True),
        ((2, 3), (8, 16), False),
        ((1, 3), (999, 8), True),
        ((0, 3), (1, 1), True),
        ((), (), True),
        ((4,), (16,), False),
    ],
)
def test_contiguity(shape: Any, strides: Any, expected: bool) -> None:
    assert _communicators._is_contiguous(shape, strides, 8) == expected


def test_arrays_of_other_libraries_are_read() -> None:
    buffer = _communicators._OnCuda._buffer
    interface = {"shape": (2, 3), "typestr": "<f4", "data": (640, True), "version": 3}
    array = types.SimpleNamespace(
        __cuda_array_interface__=interface, device=types.SimpleNamespace(id=1)
    )
    read = buffer(None, array)  # type: ignore[arg-type]
    assert read == (640, 6, "float32", 1, True, False)
    array = types.SimpleNamespace(__cuda_array_interface__={**interface, "strides": (4, 8)})
    assert buffer(None, array) == (640, 6, "float32", None, False, False)  # type: ignore[arg-type]
    assert buffer(None, np.zeros(3)) is None  # type: ignore[arg-type]
