"""The gate of sessions: how many workers compete for the GIL, and who stands back."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from typing import Any

import pytest
from support import eventually, no_op

import charioteer as ch

HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
DATA = bytes(200_000)


class Crowd:
    """Counts who is in a body at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = 0
        self.most = 0

    def __enter__(self) -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.now -= 1


def doze(crowd: Crowd) -> None:
    with crowd:
        time.sleep(0.002)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_no_more_workers_are_in_sessions_than_said(width: int) -> None:
    crowd = Crowd()
    with ch.Runtime(workers=4, gil=width) as rt:
        assert rt.stats()["sessions"]["width"] == width
        ch.spawn_many(lambda _: doze(crowd), range(40)).result()
    assert crowd.most == width


def test_without_a_width_all_workers_are() -> None:
    gate = threading.Barrier(4)
    with ch.Runtime(workers=4) as rt:
        # Each waits for all others: fewer at once, and none would end.
        ch.spawn_many(lambda _: gate.wait(30), range(40)).result(timeout=60)
        assert rt.stats()["sessions"]["inside"] <= 4


def test_bodies_that_only_sleep_run_side_by_side() -> None:
    # For long enough that a gate that narrows would have done so.
    crowd = Crowd()
    with ch.Runtime(workers=4):
        ch.spawn_many(lambda _: doze(crowd), range(200)).result()
        crowd.most = 0
        ch.spawn_many(lambda _: doze(crowd), range(200)).result()
    assert crowd.most == 4


@pytest.mark.parametrize("spins", [False, True])
def test_bodies_that_wait_for_each_other_all_get_in(spins: bool) -> None:
    # The gate narrows for those that hold the GIL; what comes then needs every worker.
    arrived: list[int] = []

    def meet(i: int) -> None:
        arrived.append(i)
        while len(arrived) < 4:
            if not spins:
                time.sleep(0.001)

    with ch.Runtime(workers=4):
        ch.spawn_many(lambda _: sum(range(50_000)), range(100)).result()
        ch.spawn_many(meet, range(4)).result(timeout=50)


def test_a_wider_gate_than_workers_is_no_gate() -> None:
    with ch.Runtime(workers=2, gil=100) as rt:
        assert ch.spawn_many(lambda x: x, range(100)).result() == list(range(100))
        assert rt.stats()["sessions"]["width"] == 100


def test_who_waits_leaves_its_session_to_others() -> None:
    with ch.Runtime(workers=2, gil=1):

        def outer(depth: int) -> int:
            if depth == 0:
                return 0
            deeper = ch.spawn(lambda: outer(depth - 1))
            return 1 + int(deeper.result(timeout=60))  # with a limit: never on its own stack

        assert ch.spawn(lambda: outer(20)).result(timeout=60) == 20


def test_sets_and_parts_of_cores_are_not_held_back() -> None:
    gate = threading.Event()
    with ch.Runtime(workers=3, gil=1) as rt:
        first = rt.submit(gate.wait, 60)
        eventually(lambda: rt.stats()["sessions"]["inside"] == 1, "the body runs")
        wide = ch.spawn(placement=ch.cpu * 2)(lambda: "wide")
        part = ch.spawn(share=0.25)(lambda: "part")
        assert wide.result(timeout=60) == "wide"
        assert part.result(timeout=60) == "part"
        assert not first.done()
        gate.set()


def test_work_that_holds_the_gil_and_work_that_does_not_all_end() -> None:
    def held(i: int) -> int:
        return sum(range(20_000)) * 0 + i

    def free(i: int) -> int:
        hashlib.sha256(DATA).digest()
        return i

    with ch.Runtime(workers=4):
        for _ in range(3):
            for body in (held, free):
                assert ch.spawn_many(body, range(300)).result(timeout=60) == list(range(300))


@pytest.mark.skipif(not HAS_GIL, reason="nobody waits for a GIL here")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_body_gets_on_beside_a_thread_that_spawns_without_pause(workers: int) -> None:
    # Each digest gives the GIL up; getting it back from a thread that keeps it takes 5 ms.
    def body() -> int:
        for _ in range(20):
            hashlib.sha256(DATA[:5000]).digest()
        return 1

    with ch.Runtime(workers=workers) as rt:
        before = rt.stats()["gateway"]["stand_back"]["visits"]
        end = time.monotonic() + 30
        while rt.stats()["gateway"]["stand_back"]["visits"] == before:
            task = rt.submit(body)
            while not task.done():
                ch.spawn(no_op)
            assert time.monotonic() < end


@pytest.mark.skipif(not HAS_GIL, reason="nobody waits for a GIL here")
@pytest.mark.parametrize("workers", [1, 2])
def test_who_begins_to_spawn_lets_workers_begin(workers: int) -> None:
    # So few spawns that bodies in flight are no reason to stand back yet.
    with ch.Runtime(workers=workers) as rt:
        before = rt.stats()["gateway"]["stand_back"]["visits"]
        end = time.monotonic() + 30
        while rt.stats()["gateway"]["stand_back"]["visits"] == before:
            time.sleep(0.02)
            ch.wait([ch.spawn(no_op) for _ in range(64)])
            assert time.monotonic() < end


@pytest.mark.skipif(not HAS_GIL, reason="nobody waits for a GIL here")
def test_a_body_gets_on_beside_others_that_finish_all_the_time() -> None:
    # One worker is in this body, and might wait for the GIL; the others run what is spawned.
    gate = threading.Event()
    with ch.Runtime(workers=4) as rt:
        waits = rt.submit(gate.wait)
        end = time.monotonic() + 30
        before = rt.stats()["gateway"]["stand_back"]["visits"]
        while rt.stats()["gateway"]["stand_back"]["visits"] == before:
            for _ in range(100):
                ch.spawn(no_op)
            assert time.monotonic() < end
        gate.set()
        assert waits.result(timeout=60)


def test_the_gateway_counts_what_it_waits() -> None:
    with ch.Runtime(workers=2) as rt:
        ch.spawn_many(lambda x: x, range(1000)).result()
        sites: dict[str, dict[str, Any]] = rt.stats()["gateway"]
    assert {"worker", "wait", "stand_back"} <= sites.keys()
    worker = sites["worker"]
    assert worker["visits"] > 0
    assert 0 <= worker["waits"] <= worker["visits"]
    assert worker["waited"] >= 0
    assert worker["inside"] > 0


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_gate_that_lets_nobody_in(wrong: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ch.Runtime(gil=wrong)


@pytest.mark.parametrize("wrong", [None, True, 1.5, "none"])
def test_a_gate_of_the_wrong_type(wrong: Any) -> None:
    with pytest.raises(TypeError, match="auto"):
        ch.Runtime(gil=wrong)


def test_the_observer_ends_with_its_runtime() -> None:
    # What is left behind is looked at after each test; here it surely had one.
    for _ in range(3):
        with ch.Runtime(workers=4):
            ch.spawn_many(lambda _: hashlib.sha256(DATA).digest(), range(200)).result()
