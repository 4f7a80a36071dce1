"""Streams, events and memory of virtual devices, as the core gives them to Python."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import anything, eventually, run_script

import charioteer as ch
from charioteer._core import Memory, OpenMachine, Stream
from charioteer._cuda import DeviceArray

MIB = 2**20


@pytest.fixture(params=["real", "virtual"])
def machine(request: pytest.FixtureRequest) -> Iterator[OpenMachine]:
    """Two linked GPUs, in real and in virtual time."""
    with ch.Machine.virtual(gpus=2, memory="64MiB", time=request.param).open() as opened:
        yield opened


@pytest.fixture
def clocked() -> Iterator[OpenMachine]:
    """Two GPUs on a clock of their own, over a link that takes a second for a million bytes."""
    described = ch.Machine.virtual(gpus=2, memory="64MiB", link="1MB/s", time="virtual")
    with described.open() as opened:
        yield opened


def view(memory: Memory) -> Any:
    return np.frombuffer(anything(memory), np.uint8)


def test_operations_run_in_the_order_of_their_stream(machine: OpenMachine) -> None:
    stream = machine.stream(0)
    order: list[int] = []
    for number in range(50):
        stream.enqueue(lambda number=number: order.append(number))  # type: ignore[misc]
    event = stream.record()
    event.synchronize()
    assert event.is_complete()
    assert order == list(range(50))
    assert machine.counters(0)["operations"] == 50
    assert machine.counters(1)["operations"] == 0


def test_a_stream_waits_for_events_of_another_device(clocked: OpenMachine) -> None:
    slow, fast = clocked.stream(0), clocked.stream(1)
    order: list[str] = []
    slow.busy(1.0)
    slow.enqueue(lambda: order.append("slow"))
    done = slow.record()
    assert not done.is_complete()
    fast.wait(done)
    fast.enqueue(lambda: order.append("fast"))
    fast.synchronize()
    assert order == ["slow", "fast"]
    assert clocked.clock.now == 1_000_000_000
    assert clocked.counters(1)["stream_waits"] == 1


def test_virtual_time_moves_as_it_is_told_to(clocked: OpenMachine) -> None:
    first, second = clocked.stream(0), clocked.stream(1)
    times: list[int] = []
    for stream, pause in ((first, 0.5), (second, 0.25), (second, 0.5)):
        stream.busy(pause)
        stream.enqueue(lambda: times.append(clocked.clock.now))
    assert clocked.clock.now == 0
    while clocked.clock.advance():
        pass
    assert times == [250_000_000, 500_000_000, 750_000_000]


def test_copies_take_the_time_of_their_link(clocked: OpenMachine) -> None:
    clocked.enable_peer(1, 0)
    near, far = clocked.stream(0), clocked.stream(1)
    source, target = near.allocate(MIB), far.allocate(MIB)
    data = np.arange(MIB, dtype=np.uint32).view(np.uint8)[:MIB]
    near.upload(data, source.memory, 0)
    data = data.copy()
    near.synchronize()
    assert clocked.clock.now == pytest.approx(MIB * 1000, rel=0.01)
    far.copy(source.memory, 0, target.memory, 0, MIB)
    back = far.download(target.memory, 0, MIB)
    assert back == data.tobytes()
    assert clocked.clock.now == pytest.approx(3 * MIB * 1000, rel=0.01)
    assert clocked.counters(1)["traffic"] == {
        ("gpu(0)", "gpu(1)"): (1, MIB),
        ("gpu(1)", "host"): (1, MIB),
    }


def test_an_upload_is_of_what_was_there_at_the_call(machine: OpenMachine) -> None:
    stream = machine.stream(0)
    memory = stream.allocate(8).memory  # the allocation is collected, behind the copy on the stream
    kept = stream.allocate(8)
    data = bytearray(b"original")
    stream.upload(data, kept.memory, 0)
    data[:] = b"changed!"
    assert stream.download(kept.memory, 0, 8) == b"original"
    assert memory.size == 8


def test_memory_is_for_operations_of_its_device(machine: OpenMachine) -> None:
    stream, other = machine.stream(0), machine.stream(1)
    allocation = stream.allocate(16)
    memory = allocation.memory
    with pytest.raises(BufferError, match=r"host has no access to the memory of gpu\(0\)"):
        view(memory)
    with pytest.raises(BufferError):
        memoryview(anything(memory))
    stream.enqueue(lambda: view(memory).fill(7))
    assert stream.download(memory, 0, 16) == bytes([7]) * 16

    other.enqueue(lambda: view(memory).fill(8))
    with pytest.raises(ch.DeviceError, match=r"gpu\(1\) has no access .* of gpu\(0\)") as info:
        other.synchronize()
    assert isinstance(info.value.__cause__, BufferError)
    assert not other.reaches(memory)
    assert stream.download(memory, 0, 16) == bytes([7]) * 16

    machine.enable_peer(1, 0)
    peer = machine.stream(1)
    assert peer.reaches(memory)
    peer.enqueue(lambda: view(memory).fill(9))
    peer.synchronize()
    assert stream.download(memory, 0, 16) == bytes([9]) * 16


def test_a_view_ends_with_its_operation(machine: OpenMachine) -> None:
    stream = machine.stream(0)
    allocation = stream.allocate(16)
    kept: list[Any] = []
    stream.enqueue(lambda: kept.append(view(allocation.memory)))
    with pytest.raises(ch.DeviceError, match="kept a view of device memory"):
        stream.synchronize()
    del allocation
    gc.collect()
    assert kept.pop().nbytes == 16  # what it reads is garbage, and no danger

    # The frames of an exception keep views too; they are let go, and no second mistake.
    stream = machine.stream(0)
    allocation = stream.allocate(16)

    def fail() -> None:
        mine = view(allocation.memory)
        raise ValueError(len(mine))

    stream.enqueue(fail)
    with pytest.raises(ch.DeviceError, match="ValueError: 16"):
        stream.synchronize()


def test_an_exception_fails_what_is_behind_it(machine: OpenMachine) -> None:
    stream, other, third = (machine.stream(gpu) for gpu in (0, 0, 1))
    ran: list[str] = []
    before = stream.record()
    stream.enqueue(lambda: {}["missing"])
    stream.enqueue(lambda: ran.append("behind"))
    failed = stream.record()
    third.wait(failed)
    third.enqueue(lambda: ran.append("waits for it"))
    other.enqueue(lambda: ran.append("beside"))
    other.synchronize()
    before.synchronize()
    for event in (failed, third.record(), failed):
        with pytest.raises(ch.DeviceError, match="KeyError: 'missing'") as info:
            event.synchronize()
        assert isinstance(info.value, (ch.CharioteerError, RuntimeError))
        assert isinstance(info.value.__cause__, KeyError)
        assert "test_devices.py" in info.value.__cause__.__notes__[0]
    with pytest.raises(ch.DeviceError):
        failed.is_complete()
    assert ran == ["beside"]


def test_causes_are_forgotten_with_their_failures() -> None:
    class Trace(Exception):
        pass

    def fail() -> None:
        raise Trace

    count = lambda: sum(isinstance(found, Trace) for found in gc.get_objects())  # noqa: E731
    for _ in range(2):
        with ch.Machine.virtual().open() as machine:
            stream = machine.stream(0)
            stream.enqueue(fail)
            with pytest.raises(ch.DeviceError):
                stream.synchronize()
            assert count() <= 2
        del machine, stream


def test_memory_runs_out(machine: OpenMachine) -> None:
    stream = machine.stream(0)
    assert machine.free_memory(0) == 64 * MIB
    first = stream.allocate(48 * MIB)
    with pytest.raises(ch.OutOfDeviceMemoryError) as info:
        stream.allocate(17 * MIB)
    error = info.value
    assert isinstance(error, (ch.CharioteerError, MemoryError))
    assert (error.device, error.wanted, error.free) == ("gpu(0)", 17 * MIB, 16 * MIB)
    assert str(17 * MIB) in str(error)
    machine.stream(1).allocate(48 * MIB)  # another device, another memory
    del first
    second = stream.allocate(48 * MIB)  # what was collected comes back in stream order
    assert second.memory.size == 48 * MIB


def test_memory_comes_back_behind_all_streams_that_use_it(clocked: OpenMachine) -> None:
    own, other = clocked.stream(0), clocked.stream(0)
    allocation = own.allocate(16)
    memory = allocation.memory
    seen: list[int] = []
    other.busy(1.0)
    other.enqueue(lambda: seen.append(len(view(memory))))
    allocation.used_on(other)
    del allocation
    other.synchronize()
    own.synchronize()
    assert seen == [16]
    assert clocked.free_memory(0) == 64 * MIB


def test_faults(machine: OpenMachine) -> None:
    stream = machine.stream(0)
    allocation = stream.allocate(8)
    machine.fail_copy(0, 2)
    stream.upload(b"12345678", allocation.memory, 0)
    stream.synchronize()
    stream.upload(b"12345678", allocation.memory, 0)
    with pytest.raises(ch.DeviceError, match="copy"):
        stream.synchronize()

    fresh = machine.stream(0)
    machine.lose(0, "a cosmic ray", after=1)
    fresh.enqueue(lambda: None)
    first = fresh.record()
    fresh.enqueue(lambda: None)
    with pytest.raises(ch.DeviceLostError, match=r"gpu\(0\) is lost: a cosmic ray") as info:
        fresh.synchronize()
    assert (info.value.device, info.value.why) == ("gpu(0)", "a cosmic ray")
    assert isinstance(info.value, ch.DeviceError)
    first.synchronize()
    for call in (fresh.record, lambda: fresh.allocate(1), lambda: machine.stream(0)):
        with pytest.raises(ch.DeviceLostError):
            call()
    del allocation  # of a device that is gone
    gc.collect()

    alive = machine.stream(1)
    alive.enqueue(lambda: None)
    alive.synchronize()
    machine.lose(1)
    with pytest.raises(ch.DeviceLostError, match="injected"):
        alive.record()


def test_a_late_event(clocked: OpenMachine) -> None:
    stream = clocked.stream(0)
    clocked.delay_event(0, 0.5)
    stream.enqueue(lambda: None)
    stream.record().synchronize()
    assert clocked.clock.now == 500_000_000


def test_bad_input(machine: OpenMachine) -> None:
    stream = machine.stream(0)
    allocation = stream.allocate(8)
    for call in (
        lambda: machine.stream(2),
        lambda: machine.free_memory(7),
        lambda: machine.fail_copy(0, 0),
        lambda: machine.delay_event(0, -1.0),
        lambda: stream.busy(float("nan")),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(TypeError, match="callable"):
        stream.enqueue(anything(3))
    with pytest.raises(ch.DeviceError, match="not within one allocation"):
        stream.upload(b"123456789", allocation.memory, 0)
    with pytest.raises(ch.DeviceError, match="not within one allocation"):
        stream.download(allocation.memory, 4, 8)
    with pytest.raises(ch.DeviceError, match="no access"):
        machine.stream(1).copy(allocation.memory, 0, allocation.memory, 0, 8)
    with ch.Machine.virtual().open() as other:
        foreign = other.stream(0)
        with pytest.raises(ValueError, match="own machine"):
            foreign.wait(stream.record())
        with pytest.raises(ValueError, match="own machine"):
            foreign.upload(b"1", allocation.memory, 0)
        assert not foreign.reaches(allocation.memory)
        assert foreign != stream
    assert stream == stream and stream != machine.stream(0)
    assert "gpu(0)" in repr(stream) and "gpu(0)" in repr(allocation.memory)


def test_a_closed_machine_has_lost_its_devices() -> None:
    machine = ch.Machine.virtual().open()
    stream = machine.stream(0)
    running, go = threading.Event(), threading.Event()

    def operation() -> None:
        running.set()
        go.wait(30)

    ran: list[int] = []
    stream.enqueue(operation)
    stream.enqueue(lambda: ran.append(1))
    assert running.wait(30)
    machine.close()
    machine.close()
    go.set()
    with pytest.raises(ch.DeviceLostError):
        stream.record()
    with pytest.raises(ch.DeviceError, match="closed"):
        machine.stream(0)
    assert ran == []


def test_operations_hold_what_they_need_and_no_longer(machine: OpenMachine) -> None:
    class Thing:
        pass

    import weakref

    stream = machine.stream(0)
    thing = Thing()
    gone = weakref.ref(thing)
    stream.enqueue(lambda thing=thing: None)  # type: ignore[misc]
    del thing
    stream.synchronize()
    eventually(lambda: gone() is None, "the operation lets go of its arguments")


def test_two_machines_beside_each_other() -> None:
    with ch.Machine.virtual().open() as one, ch.Machine.virtual().open() as two:
        streams = [one.stream(0), two.stream(0)]
        allocations = [stream.allocate(4) for stream in streams]
        for stream, allocation, data in zip(streams, allocations, (b"left", b"rite"), strict=True):
            stream.upload(data, allocation.memory, 0)
        found = [
            bytes(stream.download(allocation.memory, 0, 4))
            for stream, allocation in zip(streams, allocations, strict=True)
        ]
    assert found == [b"left", b"rite"]


def test_many_threads_use_one_stream(machine: OpenMachine) -> None:
    stream = machine.stream(0)
    counted: list[int] = []

    def enqueue() -> None:
        for _ in range(100):
            stream.enqueue(lambda: counted.append(1))
            stream.record()

    threads = [threading.Thread(target=enqueue) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stream.synchronize()
    assert len(counted) == 400


def test_the_gateway_counts_operations(machine: OpenMachine) -> None:
    with ch.Runtime(workers=0) as rt:
        before = rt.stats()["gateway"]["device"]["visits"]
        stream: Stream = machine.stream(0)
        stream.enqueue(int)
        stream.synchronize()
        assert rt.stats()["gateway"]["device"]["visits"] == before + 1


def test_an_interpreter_may_end_under_operations(tmp_path: Path) -> None:
    done = run_script(
        """
        machine = ch.Machine.virtual().open()
        stream = machine.stream(0)
        started = threading.Event()

        def operation():
            started.set()
            time.sleep(0.05)

        for _ in range(100):
            stream.enqueue(operation)
        started.wait()
        say("ends")
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")


def test_memory_of_gpus_may_be_left_to_others() -> None:
    whole = ch.Machine.detect()
    assert ch.Machine.detect(memory="1PiB") == whole
    assert all(one.memory == 1 << 20 for one in ch.Machine.detect(memory="1MiB").gpus)
    with pytest.raises(ValueError):
        ch.Machine.detect(memory=0)
    with pytest.raises(TypeError):
        ch.Machine.detect(memory=anything(1.5))


class Tensor(ctypes.Structure):
    """What consumers of DLPack read."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
    ]


def test_plain_arrays_say_where_they_are() -> None:
    array = DeviceArray(0x1000, (2, 3), np.dtype("f4"), (24, -8), 1, writable=False)
    assert (array.ndim, array.size, array.nbytes) == (2, 6, 24)
    assert array.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<f4",
        "descr": [("", "<f4")],
        "data": (0x1000, True),
        "strides": (24, -8),
        "version": 3,
        "stream": None,
    }
    assert array.__dlpack_device__() == (2, 1)
    capsule = array.__dlpack__(stream=-1)
    assert 'object "dltensor"' in repr(capsule)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    found = Tensor.from_address(pointer(capsule, b"dltensor"))
    assert (found.data, found.device_type, found.device) == (0x1000, 2, 1)
    assert (found.ndim, found.code, found.bits, found.lanes) == (2, 2, 32, 1)
    assert (found.shape[:2], found.strides[:2]) == ([2, 3], [6, -2])
    with pytest.raises(BufferError):
        array.__dlpack__(copy=True)
    with pytest.raises(BufferError):
        array.__dlpack__(dl_device=(1, 0))
    with pytest.raises(BufferError):
        DeviceArray(0, (2,), np.dtype("M8[s]"), (8,), 0, True).__dlpack__(stream=-1)
