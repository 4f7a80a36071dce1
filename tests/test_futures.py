"""Do handles, ``wait``, ``gather``, ``as_completed`` and ``map`` behave as futures do?"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support import Boom, Gate, Latch, anything, boom, eventually, functions_of, no_op

import charioteer as ch


def test_states_of_a_task(rt: ch.Runtime) -> None:
    with Latch() as latch:
        pending = ch.spawn(dependencies=[latch])(lambda: 1)
        assert (pending.done(), pending.running(), pending.cancelled()) == (False, False, False)
    with Gate() as gate:
        running = gate.task
        assert (running.done(), running.running(), running.cancelled()) == (False, True, False)
    gate.task.result()
    assert (running.done(), running.running(), running.cancelled()) == (True, False, False)
    pending.result()


def test_result_with_a_timeout_leaves_the_task_alone(rt: ch.Runtime) -> None:
    with Gate() as gate:
        for timeout in (0, 0.01):
            with pytest.raises(TimeoutError) as info:
                gate.task.result(timeout=timeout)
            assert not isinstance(info.value, ch.TaskTimeoutError)
        with pytest.raises(TimeoutError):
            gate.task.result(0.01)
        with pytest.raises(TimeoutError):
            gate.task.exception(timeout=0.01)
        with pytest.raises(TimeoutError):
            gate.task.exception(0)
        assert gate.task.running()
        assert not gate.asked
    assert gate.task.result(timeout=30) is None
    assert gate.task.result(timeout=0) is None
    assert not gate.asked


def test_a_negative_timeout_is_one_that_is_over(rt: ch.Runtime) -> None:
    with Gate() as gate, pytest.raises(TimeoutError):
        gate.task.result(timeout=-1)
    assert gate.task.result() is None
    assert gate.task.result(timeout=-1) is None


def test_very_long_timeouts(rt: ch.Runtime) -> None:
    for timeout in (1e6, 1e18, float("inf"), None):
        with Gate() as gate:
            threading.Timer(0.01, gate.open).start()
            assert gate.task.result(timeout=timeout) is None
        done, not_done = ch.wait([gate.task], timeout=timeout)
        assert (len(done), len(not_done)) == (1, 0)


def test_exception_of_success_and_failure(rt: ch.Runtime) -> None:
    assert rt.submit(no_op).exception() is None
    failed = rt.submit(boom, "here")
    with pytest.raises(Boom) as first:
        failed.result()
    assert failed.exception() is first.value
    with pytest.raises(Boom) as second:
        failed.result()
    assert second.value is first.value
    assert "boom" in functions_of(first.value)
    assert failed.done() and not failed.cancelled() and not failed.cancel()


def test_callback_runs_once_with_the_task(rt_any: ch.Runtime) -> None:
    seen: list[Any] = []
    task = rt_any.submit(lambda: 1)
    task.add_done_callback(seen.append)
    task.result()
    eventually(lambda: seen, "the callback runs")
    assert seen == [task]
    assert seen[0] is task


def test_callback_on_a_done_task_runs_at_once_here(rt: ch.Runtime) -> None:
    task = rt.submit(no_op)
    task.result()
    assert task.done()
    where: list[int] = []
    task.add_done_callback(lambda _: where.append(threading.get_ident()))
    assert where == [threading.get_ident()]


def test_callbacks_see_a_done_task(rt: ch.Runtime) -> None:
    seen: list[Any] = []
    with Gate() as gate:
        gate.task.add_done_callback(lambda t: seen.append((t.done(), t.running(), t.result())))
        gate.task.add_done_callback(lambda t: t.add_done_callback(lambda _: seen.append("inner")))
    eventually(lambda: len(seen) == 2, "both callbacks run")
    assert seen == [(True, False, None), "inner"]


def test_callbacks_run_in_the_order_of_adding(rt: ch.Runtime) -> None:
    seen: list[int] = []
    with Gate() as gate:
        for i in range(50):
            gate.task.add_done_callback(lambda _, i=i: seen.append(i))
    eventually(lambda: len(seen) == 50, "all callbacks run")
    assert seen == list(range(50))


def test_callbacks_of_failed_and_cancelled_tasks(rt: ch.Runtime) -> None:
    seen: list[str] = []
    with Latch() as latch:
        failed = ch.spawn(dependencies=[latch])(lambda: boom())
        failed.add_done_callback(lambda t: seen.append(type(t.exception()).__name__))
        cancelled = ch.spawn(dependencies=[latch])(no_op)
        cancelled.add_done_callback(lambda t: seen.append(f"cancelled {t.cancelled()}"))
        assert cancelled.cancel()
        assert seen == ["cancelled True"]
    eventually(lambda: len(seen) == 2, "both callbacks run")
    assert seen[1] == "Boom"


def test_callbacks_race_with_completion(rt2: ch.Runtime) -> None:
    count = 3000
    seen = [0] * count

    def saw(i: int) -> Callable[[Any], None]:
        def callback(task: Any) -> None:
            assert task.done()
            seen[i] += 1

        return callback

    tasks = []
    for i in range(count):
        task = rt2.submit(no_op)
        task.add_done_callback(saw(i))
        tasks.append(task)
    ch.wait(tasks)
    eventually(lambda: all(seen), "every callback runs")
    assert seen == [1] * count


def test_a_callback_that_raises_is_logged(rt: ch.Runtime, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def raising(task: Any) -> None:
        raise ValueError("from the callback")

    with caplog.at_level(logging.ERROR):
        with Gate() as gate:
            gate.task.add_done_callback(raising)
            gate.task.add_done_callback(lambda _: seen.append("after"))
        assert gate.task.result() is None
        eventually(lambda: seen, "the callback after the raising one")
        gate.task.add_done_callback(raising)
        eventually(lambda: len(caplog.records) == 2, "both failures are logged")
    for record in caplog.records:
        assert record.name == "charioteer"
        assert record.exc_info is not None
        assert "from the callback" in str(record.exc_info[1])


def test_callbacks_may_spawn_and_wait(rt: ch.Runtime) -> None:
    found: list[Any] = []
    task = rt.submit(lambda: 1)
    task.add_done_callback(lambda t: found.append(ch.spawn(lambda: t.result() + 1)))
    eventually(lambda: found, "the callback runs")
    assert found[0].result() == 2


def test_callback_must_be_callable(rt: ch.Runtime) -> None:
    with Gate() as gate, pytest.raises(TypeError):
        gate.task.add_done_callback(anything(3))
    gate.task.result()


def test_a_real_future(rt: ch.Runtime) -> None:
    with Gate() as gate:
        future = gate.task.future()
        assert isinstance(future, concurrent.futures.Future)
        assert not future.done()
    assert future.result(timeout=30) is None
    value = rt.submit(lambda: 5).future()
    assert value.result(timeout=30) == 5
    failed = rt.submit(boom)
    assert isinstance(failed.future().exception(timeout=30), Boom)
    assert isinstance(failed.exception(), Boom)
    done, not_done = concurrent.futures.wait([value, future], timeout=30)
    assert (len(done), len(not_done)) == (2, 0)
    assert set(concurrent.futures.as_completed([value, future])) == {value, future}


def test_a_real_future_of_a_cancelled_task(rt: ch.Runtime) -> None:
    with Latch() as latch:
        task = ch.spawn(dependencies=[latch])(no_op)
        future = task.future()
        assert task.cancel()
        assert future.cancelled()
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(timeout=30)


def test_cancelling_the_real_future_cancels_the_task(rt: ch.Runtime) -> None:
    ran: list[int] = []
    with Latch() as latch:
        task = ch.spawn(dependencies=[latch])(lambda: ran.append(1))
        assert task.future().cancel()
        eventually(task.cancelled, "the task is cancelled through its future")
    assert ran == []


def test_wait_for_all(rt_any: ch.Runtime) -> None:
    tasks = [rt_any.submit(lambda i=i: i) for i in range(20)]
    found = ch.wait(tasks)
    done, not_done = found
    assert found.done is done and found.not_done is not_done
    assert done == set(tasks) and not_done == set()
    assert ch.wait([]) == (set(), set())
    assert ch.wait(task for task in tasks).done == set(tasks)
    assert ch.wait([tasks[0], tasks[0]]).done == {tasks[0]}


def test_wait_on_lists_and_spaces(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    for i in range(3):
        ch.spawn(space[i])(no_op)
    assert ch.wait(space).done == {space[0], space[1], space[2]}
    assert ch.wait(space[0:2]).done == {space[0], space[1]}


def test_wait_with_a_timeout(rt: ch.Runtime) -> None:
    with Gate() as gate:
        first = rt.submit(no_op) if rt.workers > 1 else None
        if first is not None:
            first.result()
            assert ch.wait([first, gate.task], timeout=0.01) == ({first}, {gate.task})
        assert ch.wait([gate.task], timeout=0) == (set(), {gate.task})
    gate.task.result()


def test_wait_for_the_first(rt2: ch.Runtime) -> None:
    with Gate() as gate:
        quick = rt2.submit(no_op)
        done, not_done = ch.wait([gate.task, quick], return_when=concurrent.futures.FIRST_COMPLETED)
        assert (done, not_done) == ({quick}, {gate.task})
    gate.task.result()


def test_wait_for_the_first_exception(rt2: ch.Runtime) -> None:
    with Gate() as gate:
        fine, failed = rt2.submit(no_op), rt2.submit(boom)
        done, not_done = ch.wait(
            [gate.task, fine, failed], return_when=concurrent.futures.FIRST_EXCEPTION
        )
        assert failed in done and gate.task in not_done
    assert isinstance(failed.exception(), Boom)
    tasks = [rt2.submit(no_op) for _ in range(3)]
    assert ch.wait(tasks, return_when=concurrent.futures.FIRST_EXCEPTION).done == set(tasks)


def test_wait_refuses_what_it_does_not_know(rt: ch.Runtime) -> None:
    task = rt.submit(no_op)
    with pytest.raises(ValueError):
        ch.wait([task], return_when="SOMETIMES")
    with pytest.raises(TypeError):
        ch.wait(anything([3]))
    with pytest.raises(TypeError):
        list(ch.as_completed(anything([3])))
    with pytest.raises(TypeError):
        ch.gather(anything(3))


def test_waiting_tells_nobody_of_failures() -> None:
    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=2) as rt:
            failed = rt.submit(boom, "unread")
            ch.wait([failed])
            list(ch.as_completed([failed]))
    assert [anything(e).origin for e in info.value.exceptions] == ["unread"]


def test_as_completed_in_the_order_of_completion(rt: ch.Runtime) -> None:
    latches = [Latch() for _ in range(3)]
    tasks = [ch.spawn(dependencies=[latch.task])(lambda i=i: i) for i, latch in enumerate(latches)]
    found = []
    order = iter((2, 0, 1))
    latches[next(order)].open()
    for task in ch.as_completed(tasks):
        found.append(task.result())
        for k in itertools.islice(order, 1):
            latches[k].open()
    assert found == [2, 0, 1]


def test_as_completed_of_none_and_of_the_same_twice(rt_any: ch.Runtime) -> None:
    assert list(ch.as_completed([])) == []
    task = rt_any.submit(no_op)
    assert list(ch.as_completed([task, task])) == [task]


def test_as_completed_with_a_timeout(rt2: ch.Runtime) -> None:
    with Gate() as gate:
        quick = rt2.submit(no_op)
        found = []
        with pytest.raises(TimeoutError):
            for task in ch.as_completed([quick, gate.task], timeout=0.2):
                found.append(task)
        assert found == [quick]
    gate.task.result()


def test_gather(rt_any: ch.Runtime) -> None:
    tasks = [rt_any.submit(lambda i=i: i) for i in range(5)]
    assert ch.gather(*tasks).result() == list(range(5))
    assert ch.gather().result() == []
    assert ch.gather(tasks[0], tasks[0]).result() == [0, 0]


def test_gather_raises_a_failure(rt: ch.Runtime) -> None:
    fine, failed = rt.submit(no_op), rt.submit(boom, "gathered")
    with pytest.raises(Boom):
        ch.gather(fine, failed).result()


def test_results_before_the_end_of_others(rt2: ch.Runtime) -> None:
    with Gate() as gate:
        assert rt2.submit(lambda: "quick").result() == "quick"
        assert not gate.task.done()
    gate.task.result()


def test_map_gives_results_in_order(rt_any: ch.Runtime) -> None:
    assert list(rt_any.map(lambda x: x * x, range(20))) == [x * x for x in range(20)]
    assert list(rt_any.map(lambda x, y: x + y, [1, 2, 3], [10, 20])) == [11, 22]
    assert list(rt_any.map(no_op, [])) == []


def test_map_starts_without_being_read(rt: ch.Runtime) -> None:
    ran: list[int] = []
    results = rt.map(ran.append, range(5))
    eventually(lambda: sorted(ran) == list(range(5)), "the bodies run")
    assert list(results) == [None] * 5


def test_map_is_one_task_an_item_whatever_the_chunk(rt_any: ch.Runtime) -> None:
    tasks = list(rt_any.map(lambda _: ch.current().task, range(20), chunksize=7))
    assert len(set(tasks)) == 20


def test_map_raises_where_the_failure_stands(rt_any: ch.Runtime) -> None:
    results = rt_any.map(lambda x: 1 // x, [1, 1, 0, 1])
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_with_a_timeout(rt: ch.Runtime) -> None:
    opened = threading.Event()
    results = rt.map(lambda _: opened.wait(), [1], timeout=0.05)
    with pytest.raises(TimeoutError):
        next(results)
    opened.set()


def test_a_result_read_by_a_timer_that_gives_up_is_no_lost_wakeup(rt: ch.Runtime) -> None:
    # Short timeouts that race with completion: each read ends with the value or a timeout.
    for i in range(300):
        task = rt.submit(time.sleep, 0.0005 * (i % 3))
        try:
            task.result(timeout=0.0005)
        except TimeoutError:
            assert task.result() is None
