"""What does ``cancel`` answer, and what becomes of the task and its dependents?"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from typing import Any

import pytest
from support import Gate, Latch, eventually, no_op, worker_counts

import charioteer as ch


def test_a_pending_task_is_cancelled_at_once(rt_any: ch.Runtime) -> None:
    ran: list[int] = []
    with Latch() as latch:
        task = ch.spawn(dependencies=[latch])(lambda: ran.append(1))
        assert task.cancel() is True
        assert task.cancelled() and task.done() and not task.running()
        assert task.cancel() is True
        for read in (task.result, task.exception):
            with pytest.raises(ch.CancelledError):
                read()
            with pytest.raises(concurrent.futures.CancelledError):
                read(timeout=0)
    assert ran == []


def test_the_error_is_of_both_families() -> None:
    assert issubclass(ch.CancelledError, ch.CharioteerError)
    assert issubclass(ch.CancelledError, concurrent.futures.CancelledError)


def test_a_ready_task_in_the_queue_is_cancelled(rt1: ch.Runtime) -> None:
    ran: list[int] = []
    with Gate() as gate:
        tasks = [ch.spawn(lambda i=i: ran.append(i)) for i in range(10)]
        assert all(task.cancel() for task in tasks[::2])
    gate.task.result()
    ch.wait(tasks)
    assert sorted(ran) == [1, 3, 5, 7, 9]


def test_a_done_task_is_not_cancelled(rt_any: ch.Runtime) -> None:
    task = ch.spawn(lambda: 1)
    task.result()
    assert task.cancel() is False
    assert not task.cancelled()
    assert task.result() == 1


def test_a_running_task_is_asked(rt: ch.Runtime) -> None:
    with Gate() as gate:
        assert gate.task.cancel() is False
        gate.ended.wait()
        assert gate.asked
    assert gate.task.result() is None
    assert gate.task.done()
    assert not gate.task.cancelled()


def test_a_running_task_counts_as_running_until_its_body_ends(rt: ch.Runtime) -> None:
    started, release = threading.Event(), threading.Event()

    @ch.spawn
    def body() -> str:
        started.set()
        release.wait()
        return "did not listen"

    started.wait()
    assert body.cancel() is False
    assert body.running() and not body.done() and not body.cancelled()
    assert body.cancel() is False
    release.set()
    assert body.result() == "did not listen"


def test_check_cancelled_ends_the_body(rt: ch.Runtime) -> None:
    started, events = threading.Event(), []

    @ch.spawn
    def body() -> None:
        context = ch.current()
        context.check_cancelled()
        started.set()
        try:
            while True:
                context.check_cancelled()
                time.sleep(0.001)
        finally:
            events.append("finally")

    started.wait()
    assert body.cancel() is False
    with pytest.raises(ch.CancelledError):
        body.result()
    assert body.cancelled()
    assert events == ["finally"]


def test_cancel_requested_is_false_until_asked(rt_any: ch.Runtime) -> None:
    assert ch.spawn(lambda: ch.current().cancel_requested).result() is False


def test_cancel_of_self(rt_any: ch.Runtime) -> None:
    @ch.spawn
    def body() -> Any:
        context = ch.current()
        return context.task.cancel(), context.cancel_requested

    assert body.result() == (False, True)

    @ch.spawn
    def checked() -> None:
        ch.current().task.cancel()
        ch.current().check_cancelled()

    with pytest.raises(ch.CancelledError):
        checked.result()
    assert checked.cancelled()


def test_cancel_of_self_in_an_async_body(rt: ch.Runtime) -> None:
    @ch.spawn
    async def body() -> None:
        ch.current().task.cancel()
        await asyncio.sleep(0)
        raise AssertionError("the next await did not raise")

    with pytest.raises(ch.CancelledError):
        body.result()


def test_cancel_at_an_await_of_a_task(rt: ch.Runtime) -> None:
    with Latch() as latch:
        other = ch.spawn(dependencies=[latch])(no_op)

        @ch.spawn
        async def body() -> None:
            ch.current().task.cancel()
            await other
            raise AssertionError("the next await did not raise")

        with pytest.raises(ch.CancelledError):
            body.result()
    ch.wait([other])


def test_cancel_at_an_await_of_a_done_task(rt: ch.Runtime) -> None:
    done = rt.submit(no_op)
    done.result()

    @ch.spawn
    async def body() -> None:
        ch.current().task.cancel()
        await done
        raise AssertionError("the next await did not raise")

    with pytest.raises(ch.CancelledError):
        body.result()


def test_cancel_at_an_await_of_a_done_task_on_the_loops_thread(rt: ch.Runtime) -> None:
    done = rt.submit(no_op)
    done.result()

    @ch.spawn
    async def body() -> None:
        await asyncio.sleep(0)
        ch.current().task.cancel()
        await done
        raise AssertionError("the next await did not raise")

    with pytest.raises(ch.CancelledError):
        body.result()


def test_dependents_of_a_cancelled_task(rt_any: ch.Runtime) -> None:
    ran: list[int] = []
    with Latch() as latch:
        first = ch.spawn(dependencies=[latch])(no_op)
        named = ch.spawn(dependencies=[first])(lambda: ran.append(1))
        argument = rt_any.submit(lambda x: ran.append(2), first)
        far = ch.spawn(dependencies=[named])(lambda: ran.append(3))
        assert first.cancel()
        for task in (named, argument, far):
            error = task.exception()
            assert isinstance(error, ch.DependencyError)
            assert isinstance(error.__cause__, ch.CancelledError)
            assert not task.cancelled()
    late = ch.spawn(dependencies=[first])(no_op)
    assert isinstance(late.exception(), ch.DependencyError)
    assert ran == []


def test_cancelling_a_dependent_leaves_its_dependency(rt: ch.Runtime) -> None:
    with Latch() as latch:
        first = ch.spawn(dependencies=[latch])(lambda: 1)
        second = ch.spawn(dependencies=[first])(no_op)
        assert second.cancel()
    assert first.result() == 1


def test_cancelling_a_parent_leaves_its_children(rt: ch.Runtime) -> None:
    children: list[Any] = []
    started = threading.Event()

    @ch.spawn
    def parent() -> None:
        with Latch() as latch:
            children.append(ch.spawn(dependencies=[latch])(lambda: "child"))
            started.set()
            while not ch.current().cancel_requested:
                time.sleep(0.001)

    started.wait()
    parent.cancel()
    assert children[0].result() == "child"
    parent.result()


def test_cancel_races_with_running(rt_threads: ch.Runtime) -> None:
    count = 4000
    ran = [0] * count
    tasks: list[Any] = []

    @ch.task
    def body(i: int) -> None:
        ran[i] += 1

    answers: dict[int, bool] = {}
    finished = threading.Event()

    def canceller() -> None:
        done = 0
        while done < count:
            while done < len(tasks):
                answers[done] = tasks[done].cancel()
                done += 1
            time.sleep(0)
        finished.set()

    thread = threading.Thread(target=canceller)
    thread.start()
    for i in range(count):
        tasks.append(body(i))
    finished.wait()
    thread.join()
    ch.wait(tasks)
    for i, task in enumerate(tasks):
        assert ran[i] == (0 if answers[i] else 1), i
        assert task.cancelled() == answers[i]


def test_several_cancellers_agree(rt: ch.Runtime) -> None:
    with Latch() as latch:
        tasks = [ch.spawn(dependencies=[latch])(no_op) for _ in range(200)]
        answers: list[list[bool]] = []
        threads = [
            threading.Thread(target=lambda: answers.append([task.cancel() for task in tasks]))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [[True] * 200] * 4


def test_cancel_wakes_every_kind_of_waiter(rt: ch.Runtime) -> None:
    found: list[str] = []
    latch = Latch()
    task = ch.spawn(dependencies=[latch.task])(no_op)

    def blocking() -> None:
        with pytest.raises(ch.CancelledError):
            task.result()
        found.append("result")

    def waiting() -> None:
        assert ch.wait([task]).done == {task}
        found.append("wait")

    def iterating() -> None:
        assert list(ch.as_completed([task])) == [task]
        found.append("as_completed")

    def looping() -> None:
        async def main() -> None:
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        found.append("asyncio")

    threads = [
        threading.Thread(target=target) for target in (blocking, waiting, iterating, looping)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    task.cancel()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["as_completed", "asyncio", "result", "wait"]
    latch.open()


def test_close_with_cancel() -> None:
    latch = Latch()
    ran: list[int] = []
    with ch.Runtime(workers=2) as rt:
        pending = [ch.spawn(dependencies=[latch.task])(lambda: ran.append(1)) for _ in range(10)]
        gate = Gate()
        gate.started.wait()
        rt.close(cancel=True)
        assert gate.asked
        assert all(task.cancelled() for task in pending)
    assert ran == []


@pytest.mark.parametrize("workers", worker_counts(0, 1, 2))
def test_cancelled_while_many_wait_in_the_queue(workers: int) -> None:
    with ch.Runtime(workers=workers):
        with Latch() as latch:
            tasks = [ch.spawn(dependencies=[latch])(lambda i=i: i) for i in range(1000)]
            cancelled = [task for i, task in enumerate(tasks) if i % 3 == 0 and task.cancel()]
        ch.wait(tasks)
        assert sum(task.cancelled() for task in tasks) == len(cancelled) == 334
        assert all(t.result() == i for i, t in enumerate(tasks) if i % 3)


def test_a_body_asked_before_its_first_await_cleans_up(rt2: ch.Runtime) -> None:
    events: list[str] = []
    started, asked = threading.Event(), threading.Event()

    @ch.spawn
    async def body() -> None:
        started.set()
        asked.wait()
        try:
            await asyncio.sleep(3600)
        finally:
            events.append("cleaned up")

    started.wait()
    assert body.cancel() is False
    asked.set()
    with pytest.raises(ch.CancelledError):
        body.result()
    eventually(lambda: events == ["cleaned up"], "the finally clause runs")


def test_raising_the_error_oneself_is_a_cancellation_or_a_failure(rt: ch.Runtime) -> None:
    # Nobody asked; the body raised it all the same. Readers get it, nothing hangs.
    def body() -> None:
        raise ch.CancelledError("by the body")

    task = rt.submit(body)
    with pytest.raises(ch.CancelledError):
        task.result()
    assert task.done()


def test_a_blocked_waiter_is_woken_when_all_is_cancelled() -> None:
    latch, waits = Latch(), threading.Event()
    with ch.Runtime(workers=1) as rt:
        pending = ch.spawn(dependencies=[latch.task])(no_op)

        @ch.spawn
        def waiter() -> str:
            waits.set()
            try:
                pending.result()
            except ch.CancelledError:
                return "told"
            return "not told"

        waits.wait()
        rt.close(cancel=True)
    assert waiter.result() == "told"
