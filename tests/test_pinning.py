"""Are workers kept where they should be, and is nobody else?

Masks are those that the system has for the thread in question, asked in the body or by its number.
On a machine with one core all are the same, and these tests say little.
"""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from support import anything, eventually, run_script, threads_of_process

import charioteer as ch
from charioteer import cpu, gpu
from charioteer.machine import Gpu, Host, Machine, Node

CORES = sorted(os.sched_getaffinity(0))
"""All that this process may use."""
MANY = min(len(CORES), 4)


def mask() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def here() -> tuple[list[int], list[int]]:
    """The places of the running task, and where its thread is kept."""
    return [device.index for device in ch.current().devices], mask()


def two_nodes(gpus: int = 0) -> Machine:
    """The last core is a node of its own, and the first one."""
    nodes = [Node(CORES[-1:], "1GiB"), Node(CORES[:-1] or CORES[-1:], "1GiB")]
    nodes = nodes if len(CORES) > 1 else nodes[:1]
    return Machine(Host(MANY, nodes=nodes), [Gpu("64MiB")] * gpus)


def test_nobody_is_pinned_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHARIOTEER_PIN", raising=False)
    for said in (None, "none"):
        with ch.Runtime(workers=2, pin=anything(said)):
            assert ch.spawn(mask).result() == CORES
            assert ch.spawn(placement=cpu * 2)(mask).result() == CORES


@pytest.mark.parametrize("pin", ["compact", "spread"])
@pytest.mark.parametrize("workers", [1, MANY, MANY + 1])
def test_a_worker_is_kept_on_the_core_of_its_place(pin: Any, workers: int) -> None:
    meeting = threading.Barrier(workers)

    def body(_: int) -> tuple[list[int], list[int]]:
        meeting.wait(30)  # so that each has a worker of its own
        return here()

    with ch.Runtime(workers=workers, pin=pin):
        found = ch.spawn_many(body, range(workers)).result(timeout=60)
        assert mask() == CORES
    cores = {}
    for places, held in found:
        [place], [core] = places, held
        cores[place] = core
    assert sorted(cores) == list(range(workers))
    # Beyond the cores that there are places begin anew.
    used = [cores[place] for place in range(workers)]
    assert len(set(used)) == min(workers, len(CORES))
    assert set(used) <= set(CORES)
    assert used[len(CORES) :] == used[: max(0, workers - len(CORES))]
    assert mask() == CORES
    with ch.Runtime(workers=1):
        assert ch.spawn(mask).result() == CORES


@pytest.mark.parametrize("pin", ["compact", "spread"])
def test_places_follow_the_nodes_that_the_machine_declares(pin: Any) -> None:
    with ch.Runtime(two_nodes(), workers=MANY, pin=pin):
        first = {places[0]: held for places, held in (ch.spawn(here).result() for _ in range(20))}
        assert all(len(held) == 1 for held in first.values())
        assert first.get(0, CORES[-1:]) == CORES[-1:]
        assert first.get(1, CORES[:1]) == CORES[:1]
    [last] = two_nodes().host.nodes[0].cores
    one = Machine(Host(2, nodes=[Node([last], "1GiB")]))
    with ch.Runtime(one, workers=2, pin=pin):
        assert ch.spawn(placement=cpu * 2)(mask).result() == [last]


def test_sets_parts_and_tasks_without_a_core() -> None:
    with ch.Runtime(two_nodes(), workers=MANY, pin="compact"):
        assert ch.spawn(placement=cpu.all)(mask).result() == sorted({CORES[-1], *CORES[: MANY - 1]})
        [part] = ch.spawn(share=0.5)(mask).result()
        assert part in CORES
        assert ch.spawn(share=0)(mask).result() == CORES
        # And again, whatever the thread had before.
        assert len(ch.spawn(mask).result()) == 1
        wide = ch.spawn(placement=cpu * min(2, MANY))(here)
        places, held = wide.result()
        assert len(held) == len(places) == min(2, MANY)


@pytest.mark.skipif(len(CORES) < 4, reason="takes four cores")
def test_a_set_gets_cores_of_one_node() -> None:
    nodes = [CORES[0:2], CORES[2:4]]
    machine = Machine(Host(4, nodes=[Node(cores, "1GiB") for cores in nodes]))
    with ch.Runtime(machine, workers=4, pin="spread"):
        for _ in range(10):
            assert ch.spawn(placement=cpu * 2)(mask).result() in nodes


def test_the_host_part_of_a_task_on_devices_is_pinned_as_well() -> None:
    with ch.Runtime(two_nodes(gpus=2), workers=1, pin="compact"):
        assert ch.spawn(placement=gpu)(mask).result(timeout=60) == CORES[-1:]
        assert ch.spawn(placement=gpu * 2)(mask).result(timeout=60) == CORES[-1:]


def test_who_goes_on_after_a_wait_is_pinned_again() -> None:
    with ch.Runtime(two_nodes(), workers=1, pin="compact"):
        release = threading.Event()

        @ch.spawn
        def outer() -> list[list[int]]:
            before = mask()

            @ch.spawn(share=0)  # not on this thread, since it is no task of the same kind
            def inner() -> list[int]:
                release.wait(30)
                return mask()

            @ch.spawn
            def spare() -> list[int]:
                release.set()
                return mask()

            ch.wait([inner, spare], timeout=30)
            return [before, inner.result(), spare.result(), mask()]

        last = CORES[-1:]
        assert outer.result(timeout=60) == [last, CORES, last, last]


def test_the_event_loop_is_not_pinned() -> None:
    async def body() -> list[list[int]]:
        before = mask()
        await asyncio.sleep(0.001)
        return [before, mask()]

    with ch.Runtime(two_nodes(), workers=1, pin="compact"):
        assert ch.spawn(body).result(timeout=60) == [CORES[-1:], CORES]


def test_threads_that_workers_start_for_the_runtime_are_not_pinned() -> None:
    with ch.Runtime(two_nodes(gpus=1), workers=1, pin="compact"):

        @ch.spawn
        def starts() -> None:
            ch.spawn(timeout=60)(mask)  # the timer
            for _ in range(4):  # streams' threads
                ch.spawn(placement=gpu, share=0.25)(lambda: ch.current().xp.zeros(4))

        starts.result(timeout=60)
        ch.spawn(timeout=60)(mask).result(timeout=60)
        ch.spawn(placement=gpu)(lambda: float(ch.current().xp.zeros(4).max())).result(timeout=60)
        ours = ("charioteer-time", "charioteer-gpu")
        # A thread names itself, when it has a core for the first time.
        eventually(lambda: {*ours} <= {*threads_of_process().values()}, "both have their names")
        found = {name: thread for thread, name in threads_of_process().items() if name in ours}
        masks = {name: sorted(os.sched_getaffinity(thread)) for name, thread in found.items()}
        assert masks == {"charioteer-time": CORES, "charioteer-gpu": CORES}


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"pin": "loose"}, ValueError, "one of none, compact, spread, not 'loose'"),
        ({"pin": 3}, TypeError, "not int"),
        ({"pin": True}, TypeError, "not bool"),
        ({"pin": "compact", "workers": 0}, ValueError, "workers=0"),
        ({"pin": "spread", "machine": Machine.virtual(time="virtual")}, ValueError, "workers=0"),
    ],
)
def test_what_cannot_be_pinned(arguments: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        ch.Runtime(**arguments)


def test_nodes_of_another_machine_are_refused_when_it_opens() -> None:
    nodes = [Node(CORES, "1GiB"), Node([65_000], "1GiB")]
    runtime = ch.Runtime(Machine(Host(2, nodes=nodes)), pin="compact")
    with pytest.raises(ch.MachineError, match="core 65000 of NUMA node 1 is none that this proc"):
        runtime.open()
    twice = ch.Runtime(Machine(Host(2, nodes=[Node(CORES, "1GiB")] * 2)), pin="compact")
    with pytest.raises(ch.MachineError, match="in NUMA nodes 0 and 1"):
        twice.open()
    # Without pinning nobody asks.
    with ch.Runtime(Machine(Host(2, nodes=nodes))):
        assert ch.spawn(mask).result() == CORES


def test_the_environment_pins_whoever_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHARIOTEER_PIN", "compact")
    with ch.Runtime(workers=1):
        assert len(ch.spawn(mask).result()) == 1
    with ch.Runtime(workers=1, pin="none"):
        assert ch.spawn(mask).result() == CORES
    with ch.Runtime(workers=0):
        assert ch.spawn(mask).result() == CORES
    monkeypatch.setenv("CHARIOTEER_PIN", "loose")
    with pytest.raises(ValueError, match="'loose'"):
        ch.Runtime()


def test_a_process_that_may_use_fewer_cores(tmp_path: Path) -> None:
    done = run_script(
        f"""
        os.sched_setaffinity(0, [{CORES[-1]}])
        assert [node.cores for node in ch.Machine.detect().host.nodes] == [({CORES[-1]},)]
        with ch.Runtime(pin="spread") as runtime:
            assert runtime.workers == 1
            print(ch.spawn(lambda: sorted(os.sched_getaffinity(0))).result())
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[{CORES[-1]}]"
