"""Tasks on cores and devices together: what they hold, what comes before them, what they lend."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import threadpoolctl

import charioteer as ch
from charioteer import cpu, gpu, policies, virtual


def machine(gpus: int = 2) -> ch.Machine:
    return ch.Machine.virtual(gpus, memory="64MiB")


@pytest.fixture(params=[0, 2, 3])
def runtime(request: pytest.FixtureRequest) -> Iterator[ch.Runtime]:
    with ch.Runtime(machine(), workers=request.param) as opened:
        yield opened


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ((cpu, gpu), [cpu, gpu]),
        ((gpu, cpu), [gpu, cpu]),
        ((cpu * 2, gpu * 2), [cpu, cpu, gpu(0), gpu(1)]),
        ((cpu, gpu(1), gpu(0)), [cpu, gpu(1), gpu(0)]),
        ((gpu(1), cpu, gpu, cpu), [gpu(1), cpu, gpu(0), cpu]),
        ((gpu.all, cpu), [gpu(0), gpu(1), cpu]),
        (ch.Requirement((cpu, gpu), share=0.5, memory="1MiB"), [cpu, gpu]),
    ],
    ids=repr,
)
def test_the_context_has_all_of_the_set_in_its_order(
    runtime: ch.Runtime, placement: Any, expected: list[Any]
) -> None:
    @ch.spawn(placement=placement)
    def held() -> tuple[Any, list[Any]]:
        context = ch.current()
        assert context.device == context.devices[0]
        seen = []
        for device in context.each():
            assert device == context.device
            if device.kind == cpu:
                assert context.xp is np
                with pytest.raises(RuntimeError, match="holds no stream here: a core is current"):
                    _ = context.stream
                with pytest.raises(RuntimeError, match="no stream is current"):
                    virtual.zeros(1)
            else:
                assert context.xp is virtual
                assert virtual.current_stream() == context.stream
                assert context.stream.device == device.index
            seen.append(context.store)
        assert [stream.device for stream in context.streams] == [
            device.index for device in context.devices if device.kind == gpu
        ]
        return context.devices, seen

    devices, stores = held.result(timeout=60)
    assert len(devices) == len(expected) == len(set(devices))
    for device, wanted in zip(devices, expected, strict=True):
        assert device == wanted or device.kind == wanted
    # All cores have the store of their one memory.
    memories = {device if device.kind == gpu else cpu for device in devices}
    assert len({id(store) for store in stores}) == len(memories)


def test_both_parts_compute_and_the_host_part_sees_what_was_before(runtime: ch.Runtime) -> None:
    for _ in range(10):

        @ch.spawn(placement=gpu)
        def square() -> Any:
            ch.current().stream.busy(1e-3)
            x = virtual.arange(64.0)
            return x * x

        @ch.spawn(placement=(cpu, gpu))
        def split(x: Any = square) -> tuple[float, Any]:
            assert square.done()
            on_host, on_device = ch.current().devices
            assert on_host.kind == cpu
            for device in ch.current().each():
                if device == on_device:
                    twice = virtual.asarray(x.get()) * 2.0
            return float(x.get()[:32].sum()), twice

        @ch.spawn(placement=gpu)
        def total(parts: Any = split) -> float:
            return float(parts[1].get()[32:].sum()) + parts[0]

        squares = [float(i * i) for i in range(64)]
        assert total.result(timeout=60) == sum(squares[:32]) + 2 * sum(squares[32:])


def test_a_body_that_waits_lends_cores_and_devices(runtime: ch.Runtime) -> None:
    everything = (cpu * 2, gpu.all)

    @ch.task(placement=everything)
    def blocks(depth: int) -> int:
        value = 0 if depth == 0 else blocks(depth - 1).result()
        assert len(ch.current().devices) == 4
        return value + 1

    @ch.task(placement=everything)
    async def awaits(depth: int) -> int:
        value = 0 if depth == 0 else await awaits(depth - 1)
        assert len(ch.current().devices) == 4
        return value + 1

    assert blocks(5).result(timeout=60) == 6
    assert awaits(5).result(timeout=60) == 6


def test_shares_are_of_the_devices_and_cores_are_whole() -> None:
    with ch.Runtime(machine(1), workers=4):
        both = threading.Barrier(2, timeout=60)

        @ch.task(placement=ch.Requirement((cpu * 2, gpu), share=0.5))
        def half() -> set[int]:
            both.wait()
            return {device.index for device in ch.current().devices if device.kind == cpu}

        one, other = half(), half()
        assert len(one.result(timeout=60) | other.result(timeout=60)) == 4


def test_what_cannot_be_served_is_refused_or_left_out() -> None:
    with ch.Runtime(machine(2), workers=2):
        for placement, words in [
            ((cpu * 3, gpu), "the runtime has 2 cores"),
            ((cpu, gpu * 3), "the machine has 2"),
            ((cpu(0), gpu), "cores are all alike"),
            (ch.Requirement((cpu, gpu), memory="65MiB"), "bytes wanted"),
        ]:
            with pytest.raises(ch.PlacementError, match=words):
                ch.spawn(placement=placement)(lambda: None)
        left = ch.spawn(placement=[(cpu * 3, gpu), (cpu, gpu * 3), (gpu, cpu)])(
            lambda: [device.kind for device in ch.current().devices]
        )
        assert left.result(timeout=60) == [gpu, cpu]
    with ch.Runtime(workers=2):
        with pytest.raises(ch.PlacementError, match="the machine has no gpu"):
            ch.spawn(placement=(cpu, gpu))(lambda: None)
        anywhere = ch.spawn(placement=[(cpu, gpu), cpu])(lambda: len(ch.current().streams))
        assert anywhere.result(timeout=60) == 0


def test_variants_and_specialized_functions_have_bodies_for_such_sets(runtime: ch.Runtime) -> None:
    @ch.task(base=False)
    def solve(n: int) -> str: ...

    @solve.variant((cpu, gpu))
    def _(n: int) -> str:
        return f"one each {n} {where()}"

    @solve.variant((cpu * 2, gpu(1)))
    def _(n: int) -> str:
        return f"two and gpu(1) {n} {where()}"

    @ch.specialize
    def where() -> str:
        return "elsewhere"

    where.variant((gpu, cpu))(lambda: "here")

    assert solve.options(placement=(cpu, gpu))(1).result(timeout=60) == "one each 1 here"
    assert solve.options(placement=(gpu(1), cpu * 2))(2).result() == "two and gpu(1) 2 elsewhere"
    words = solve(3).result().split()
    assert words[-1] == {"one": "here", "two": "elsewhere"}[words[0]]
    with pytest.raises(ch.PlacementError, match="no variant of solve is for it"):
        solve.options(placement=gpu)(4)


def test_a_policy_is_told_of_cores_and_devices() -> None:
    calls: list[policies.Call] = []

    def policy(call: policies.Call) -> list[float]:
        calls.append(call)
        return [-(choice.cores + len(choice.devices)) for choice in call.choices]

    with ch.Runtime(machine(2), workers=2, policy=policy):
        kinds = ch.spawn(placement=[gpu, cpu, (gpu, cpu, gpu)])(
            lambda: [device.kind for device in ch.current().devices]
        )
        assert kinds.result(timeout=60) == [gpu, cpu, gpu]
    assert {(len(choice.devices), choice.cores) for choice in calls[0].choices} == {
        (1, 0),
        (0, 1),
        (2, 1),
    }


def blas_threads() -> set[int]:
    return {
        pool["num_threads"]
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas"
    }


@pytest.mark.thread_unsafe(reason="the limit of BLAS is the process's")
def test_blas_has_the_threads_of_the_cores() -> None:
    with threadpoolctl.threadpool_limits(2):
        if blas_threads() != {2}:
            pytest.skip("this BLAS was built for one thread")
    with ch.Runtime(machine(1), workers=2):
        for _ in range(3):
            assert ch.spawn(placement=(cpu, gpu))(blas_threads).result(timeout=60) == {1}
            assert ch.spawn(placement=(gpu, cpu * 2))(blas_threads).result() == {2}
            chosen = ch.spawn(placement=[(gpu, cpu * 2), cpu * 3])(blas_threads)
            assert chosen.result() == {2}
        assert ch.spawn(blas_threads).result() == {1}


def test_wide_and_narrow_ones_do_not_keep_each_other_out() -> None:
    with ch.Runtime(machine(4), workers=4) as runtime:
        placements: list[Any] = [
            gpu,
            cpu,
            (cpu, gpu),
            cpu * 4,
            (cpu * 4, gpu.all),
            gpu.all,
            (cpu * 2, gpu * 3),
            (gpu * 2, cpu * 3),
        ]
        counts: list[ch.Task[int]] = []
        for i in range(400):
            placement = placements[i % len(placements)]
            counts.append(ch.spawn(placement=placement)(lambda: len(ch.current().devices)))
        widths = [1, 1, 2, 4, 8, 4, 5, 5]
        assert ch.gather(*counts).result(timeout=60) == widths * 50
        assert runtime.workers == 4
