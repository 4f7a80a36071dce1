"""On a free-threaded interpreter: does the GIL stay off, and do bodies run truly at once?"""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from support import run_script

import charioteer as ch

pytestmark = pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"),
    reason="this interpreter is not a free-threaded build",
)


def gil_enabled() -> bool:
    return cast("Callable[[], bool]", sys._is_gil_enabled)()  # type: ignore[attr-defined]


def test_the_gil_is_off_after_the_import() -> None:
    assert not gil_enabled()


def test_the_gil_is_off_in_bodies(rt: ch.Runtime) -> None:
    assert not rt.submit(gil_enabled).result()


def test_importing_does_not_switch_the_gil_on(tmp_path: Path) -> None:
    done = run_script("say(sys._is_gil_enabled())", tmp_path)
    assert done.stdout.split() == ["False"]
    assert "RuntimeWarning" not in done.stderr


@pytest.mark.thread_unsafe(reason="two bodies need two cores")
def test_two_bodies_compute_at_the_same_time(rt2: ch.Runtime) -> None:
    # Each sees the other's progress while neither calls anything that would release a GIL.
    progress = [0, 0]
    begin = threading.Barrier(2)

    def body(me: int) -> bool:
        begin.wait(30)
        other, changes, seen = 1 - me, 0, -1
        while changes < 20 and progress[me] < 50_000_000:
            progress[me] += 1
            if progress[other] != seen:
                seen = progress[other]
                changes += 1
        return changes >= 20

    first, second = rt2.submit(body, 0), rt2.submit(body, 1)
    assert first.result() or second.result()


def test_one_container_from_many_bodies(rt2: ch.Runtime) -> None:
    seen: dict[int, int] = {}
    ch.spawn_many(lambda i: seen.__setitem__(i, i), range(20_000)).result()
    assert len(seen) == 20_000
