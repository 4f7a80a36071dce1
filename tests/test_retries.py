"""How often does a task with retries run, and who sees which failure?"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from support import Boom, Latch, eventually

import charioteer as ch


def flaky(failures: int) -> tuple[list[int], Any]:
    """The attempts so far, and a body that fails so many times before it succeeds."""
    attempts: list[int] = []

    def body() -> int:
        attempts.append(len(attempts))
        if len(attempts) <= failures:
            raise Boom(len(attempts))
        return len(attempts)

    return attempts, body


@pytest.mark.parametrize("failures", [0, 1, 3, 4, 7])
def test_attempts_are_counted(rt_any: ch.Runtime, failures: int) -> None:
    attempts, body = flaky(failures)
    task = ch.spawn(retries=3)(body)
    error = task.exception()
    assert len(attempts) == min(failures, 3) + 1
    if failures <= 3:
        assert error is None
        assert task.result() == failures + 1
    else:
        assert isinstance(error, Boom) and error.origin == 4


def test_without_retries_there_is_one_attempt(rt_any: ch.Runtime) -> None:
    attempts, body = flaky(1)
    assert isinstance(ch.spawn(body).exception(), Boom)
    assert isinstance(ch.spawn(retries=0)(flaky(1)[1]).exception(), Boom)
    assert attempts == [0]


def test_arguments_and_variables_survive_the_attempts(rt_any: ch.Runtime) -> None:
    given, seen = object(), []
    value = rt_any.submit(lambda: 7)

    @ch.task(retries=2)
    def body(x: object, y: int, *, z: list[int]) -> bool:
        seen.append((x, y, z))
        if len(seen) < 3:
            raise Boom
        return x is given

    assert body(given, value.result(), z=[value.result()]).result() is True
    assert seen == [(given, 7, [7])] * 3


def test_handles_as_arguments_survive_the_attempts(rt_any: ch.Runtime) -> None:
    seen: list[Any] = []

    def body(x: int) -> int:
        seen.append(x)
        if len(seen) < 3:
            raise Boom
        return x

    assert ch.task(retries=2)(body)(rt_any.submit(lambda: 7)).result() == 7
    assert seen == [7, 7, 7]


def test_dependents_see_the_last_attempt_only(rt_any: ch.Runtime) -> None:
    attempts, body = flaky(2)
    first = ch.spawn(retries=2)(body)
    assert rt_any.submit(lambda x: (x, len(attempts)), first).result() == (3, 3)


def test_callbacks_run_once(rt: ch.Runtime) -> None:
    called: list[Any] = []
    with Latch() as latch:
        task = ch.spawn(retries=5, dependencies=[latch])(flaky(5)[1])
        task.add_done_callback(called.append)
    assert task.result() == 6
    eventually(lambda: called, "the callback runs")
    assert called == [task]


def test_attempts_never_overlap(rt2: ch.Runtime) -> None:
    running, most, lock = 0, [0], threading.Lock()
    counts = {"running": running, "attempts": 0}

    @ch.spawn(retries=20)
    def body() -> None:
        with lock:
            counts["running"] += 1
            counts["attempts"] += 1
            most[0] = max(most[0], counts["running"])
        try:
            if counts["attempts"] <= 20:
                raise Boom
        finally:
            with lock:
                counts["running"] -= 1

    body.result()
    assert most == [1]
    assert counts["attempts"] == 21


def test_async_bodies_are_run_again(rt_any: ch.Runtime) -> None:
    attempts: list[int] = []

    @ch.spawn(retries=2)
    async def body() -> int:
        attempts.append(1)
        await asyncio.sleep(0)
        if len(attempts) < 3:
            raise Boom
        return len(attempts)

    assert body.result() == 3


def test_a_cancelled_attempt_is_the_last(rt: ch.Runtime) -> None:
    attempts: list[int] = []
    started = threading.Event()

    @ch.spawn(retries=5)
    def body() -> None:
        attempts.append(1)
        started.set()
        while True:
            ch.current().check_cancelled()
            threading.Event().wait(0.001)

    started.wait()
    body.cancel()
    with pytest.raises(ch.CancelledError):
        body.result()
    assert len(attempts) == 1


def test_a_failed_dependency_is_no_attempt(rt: ch.Runtime) -> None:
    attempts, body = flaky(0)
    failed = rt.submit(flaky(9)[1])
    task = ch.spawn(retries=5, dependencies=[failed])(body)
    assert isinstance(task.exception(), ch.DependencyError)
    assert attempts == []


def test_failed_attempts_that_were_made_good_are_not_raised_at_exit() -> None:
    with ch.Runtime(workers=2):
        ch.spawn(retries=3)(flaky(3)[1])


def test_the_last_failure_is_raised_once_at_exit() -> None:
    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=2):
            ch.spawn(retries=3)(flaky(9)[1])
    (error,) = info.value.exceptions
    assert isinstance(error, Boom) and error.origin == 4


def test_contextvars_and_names_are_the_same_in_each_attempt(rt: ch.Runtime) -> None:
    import contextvars

    variable = contextvars.ContextVar("variable", default=0)
    seen: list[Any] = []

    @ch.spawn("flaky", retries=2)
    def body() -> None:
        seen.append((variable.get(), ch.current().task.name))
        variable.set(1)
        if len(seen) < 3:
            raise Boom

    body.result()
    assert [name for _, name in seen] == ["flaky"] * 3


def test_many_at_once(rt_threads: ch.Runtime) -> None:
    made = [flaky(i % 4) for i in range(400)]
    tasks = [ch.spawn(retries=2)(body) for _, body in made]
    for i, (task, (attempts, _)) in enumerate(zip(tasks, made, strict=True)):
        assert (task.exception() is None) == (i % 4 <= 2)
        assert len(attempts) == min(i % 4, 2) + 1
