"""What does ``timeout=`` bound, and how does it end a task?"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from support import Gate, Latch, no_op

import charioteer as ch


def listen() -> str:
    """A body that runs until it is asked to stop."""
    context = ch.current()
    while not context.cancel_requested:
        time.sleep(0.001)
    return "stopped"


def test_a_body_that_listens_is_asked_and_fails(rt_threads: ch.Runtime) -> None:
    task = ch.spawn("listener", timeout=0.02)(listen)
    with pytest.raises(ch.TaskTimeoutError) as info:
        task.result()
    assert isinstance(info.value, TimeoutError)
    assert "listener" in str(info.value)
    assert task.done() and not task.cancelled()


def test_check_cancelled_ends_it_too(rt: ch.Runtime) -> None:
    @ch.spawn(timeout=0.02)
    def body() -> None:
        while True:
            ch.current().check_cancelled()
            time.sleep(0.001)

    assert isinstance(body.exception(), ch.TaskTimeoutError)
    assert not body.cancelled()


def test_a_body_that_does_not_listen_fails_when_it_ends(rt: ch.Runtime) -> None:
    ended = threading.Event()

    @ch.spawn(timeout=0.01)
    def body() -> str:
        time.sleep(0.2)
        ended.set()
        return "too late"

    assert isinstance(body.exception(), ch.TaskTimeoutError)
    assert ended.is_set()


def test_an_async_body_is_cancelled_at_its_await(rt1: ch.Runtime) -> None:
    events: list[str] = []

    @ch.spawn(timeout=0.02)
    async def body() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            events.append("cleaned up")

    assert isinstance(body.exception(), ch.TaskTimeoutError)
    assert events == ["cleaned up"]


def test_an_async_body_that_awaits_a_task(rt1: ch.Runtime) -> None:
    with Latch() as latch:
        pending = ch.spawn(dependencies=[latch])(no_op)

        @ch.spawn(timeout=0.02)
        async def body() -> None:
            await pending

        assert isinstance(body.exception(), ch.TaskTimeoutError)
    ch.wait([pending])


def test_a_body_in_time_is_untouched(rt_any: ch.Runtime) -> None:
    task = ch.spawn(timeout=3600)(lambda: ch.current().cancel_requested)
    assert task.result() is False


def test_waiting_to_start_does_not_count(rt1: ch.Runtime) -> None:
    with Gate():
        queued = ch.spawn(timeout=0.05)(lambda: "in time")
        with Latch() as latch:
            pending = ch.spawn(timeout=0.05, dependencies=[latch])(lambda: "in time")
            time.sleep(0.2)
    assert queued.result() == "in time"
    assert pending.result() == "in time"


def test_a_failure_before_the_time_is_that_failure(rt: ch.Runtime) -> None:
    @ch.spawn(timeout=3600)
    def body() -> None:
        raise LookupError("own")

    assert isinstance(body.exception(), LookupError)


def test_dependents_of_a_timed_out_task(rt: ch.Runtime) -> None:
    task = ch.spawn(timeout=0.01)(listen)
    dependent = rt.submit(lambda x: x, task)
    error = dependent.exception()
    assert isinstance(error, ch.DependencyError)
    assert isinstance(error.__cause__, ch.TaskTimeoutError)


def test_unread_it_is_raised_at_exit() -> None:
    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=1):
            ch.spawn(timeout=0.01)(listen)
    assert [type(error) for error in info.value.exceptions] == [ch.TaskTimeoutError]


def test_each_attempt_has_its_own_time(rt: ch.Runtime) -> None:
    attempts: list[int] = []

    @ch.spawn(timeout=0.05, retries=2)
    def body() -> str:
        attempts.append(1)
        return listen() if len(attempts) < 3 else "third time lucky"

    assert body.result() == "third time lucky"
    assert len(attempts) == 3


def test_attempts_that_all_time_out(rt: ch.Runtime) -> None:
    attempts: list[int] = []

    @ch.spawn(timeout=0.01, retries=2)
    def body() -> None:
        attempts.append(1)
        listen()

    assert isinstance(body.exception(), ch.TaskTimeoutError)
    assert len(attempts) == 3


def test_many_with_timeouts(rt: ch.Runtime) -> None:
    @ch.task(timeout=0.02)
    async def body(i: int) -> int:
        if i % 2:
            await asyncio.sleep(3600)
        return i

    errors = [task.exception() for task in body.map(range(50))]
    assert [type(error) for error in errors] == [type(None), ch.TaskTimeoutError] * 25


def test_the_clocks_of_finished_tasks_disturb_nobody(rt: ch.Runtime) -> None:
    for _ in range(200):
        assert ch.spawn(timeout=0.02)(lambda: 1).result() == 1
    time.sleep(0.05)
    found = [ch.spawn(lambda: ch.current().cancel_requested).result() for _ in range(20)]
    assert not any(found)


def test_closing_does_not_wait_for_clocks() -> None:
    with ch.Runtime(workers=2):
        assert ch.spawn(timeout=3600)(lambda: 1).result() == 1


def test_timeouts_while_the_runtime_closes() -> None:
    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=2):
            tasks: list[Any] = [ch.spawn(timeout=0.05)(listen) for _ in range(4)]
    assert len(info.value.exceptions) == 4
    assert all(isinstance(task.exception(), ch.TaskTimeoutError) for task in tasks)
