"""Is ``rt.executor()`` an executor that other libraries can use unchanged?"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import Any

import pytest
from support import Boom, anything, boom, no_op, worker_counts

import charioteer as ch


def test_is_an_executor_with_real_futures(rt_any: ch.Runtime) -> None:
    executor = rt_any.executor()
    assert isinstance(executor, concurrent.futures.Executor)
    future = executor.submit(pow, 2, 5)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(timeout=30) == 32
    assert future.done() and not future.running() and not future.cancelled()


def test_keywords_reach_the_function(rt: ch.Runtime) -> None:
    keywords: dict[str, Any] = {"fn": 1, "name": 2, "priority": 3, "self": 4}
    assert rt.executor().submit(lambda **k: k, **keywords).result(30) == keywords


def test_map(rt_any: ch.Runtime) -> None:
    executor = rt_any.executor()
    assert list(executor.map(pow, [2, 3], [4, 2])) == [16, 9]
    assert list(executor.map(str, range(10), chunksize=3)) == [str(i) for i in range(10)]


def test_failures_are_the_futures(rt: ch.Runtime) -> None:
    future = rt.executor().submit(boom, "in a future")
    assert isinstance(future.exception(timeout=30), Boom)
    with pytest.raises(Boom):
        future.result()


def test_wait_and_as_completed_of_the_standard_library(rt: ch.Runtime) -> None:
    executor = rt.executor()
    futures = [executor.submit(lambda i=i: i) for i in range(20)]
    done, not_done = concurrent.futures.wait(futures, timeout=30)
    assert len(done) == 20 and not not_done
    assert sorted(f.result() for f in concurrent.futures.as_completed(futures)) == list(range(20))


def test_callbacks(rt: ch.Runtime) -> None:
    called = threading.Event()
    future = rt.executor().submit(no_op)
    future.add_done_callback(lambda _: called.set())
    assert called.wait(30)


def test_a_running_future_says_so_and_cannot_be_cancelled(rt: ch.Runtime) -> None:
    started, release = threading.Event(), threading.Event()

    def body() -> str:
        started.set()
        release.wait()
        return "ended"

    future = rt.executor().submit(body)
    started.wait()
    assert future.running()
    assert not future.cancel()
    release.set()
    assert future.result(timeout=30) == "ended"


def test_a_pending_future_can_be_cancelled() -> None:
    ran: list[int] = []
    release, started = threading.Event(), threading.Event()
    with ch.Runtime(workers=1) as rt:
        executor = rt.executor()
        first = executor.submit(lambda: (started.set(), release.wait()))
        started.wait()
        second = executor.submit(ran.append, 1)
        assert second.cancel()
        assert second.cancelled()
        with pytest.raises(concurrent.futures.CancelledError):
            second.result(timeout=30)
        release.set()
        first.result(30)
    assert ran == []


def test_shutdown_refuses_new_work_and_leaves_the_runtime(rt: ch.Runtime) -> None:
    executor = rt.executor()
    future = executor.submit(lambda: 1)
    executor.shutdown()
    assert future.done()
    with pytest.raises(RuntimeError):
        executor.submit(no_op)
    with pytest.raises(RuntimeError):
        executor.map(no_op, [1])
    executor.shutdown()
    assert rt.submit(lambda: 2).result() == 2
    assert rt.executor().submit(lambda: 3).result(30) == 3


def test_leaving_its_block_waits(rt: ch.Runtime) -> None:
    with rt.executor() as executor:
        futures = [executor.submit(lambda i=i: i) for i in range(100)]
    assert all(future.done() for future in futures)


def test_shutdown_without_waiting(rt: ch.Runtime) -> None:
    release = threading.Event()
    executor = rt.executor()
    future = executor.submit(release.wait)
    executor.shutdown(wait=False)
    assert not future.done()
    release.set()
    assert future.result(timeout=30) is True


def test_shutdown_that_cancels() -> None:
    release, started = threading.Event(), threading.Event()
    with ch.Runtime(workers=1) as rt:
        executor = rt.executor()
        first = executor.submit(lambda: (started.set(), release.wait()))
        started.wait()
        pending = [executor.submit(no_op) for _ in range(10)]
        executor.shutdown(wait=False, cancel_futures=True)
        assert all(future.cancelled() for future in pending)
        release.set()
        first.result(30)


def test_two_executors_are_separate(rt: ch.Runtime) -> None:
    first, second = rt.executor(), rt.executor()
    first.shutdown()
    assert second.submit(lambda: 1).result(30) == 1


def test_under_asyncio(rt: ch.Runtime) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        executor = rt.executor()
        return await asyncio.gather(*(loop.run_in_executor(executor, pow, 2, i) for i in range(10)))

    assert asyncio.run(main()) == [2**i for i in range(10)]


def test_after_the_runtime_closed() -> None:
    with ch.Runtime(workers=1) as rt:
        executor = rt.executor()
        future = executor.submit(lambda: 1)
    assert future.result(timeout=0) == 1
    with pytest.raises(RuntimeError):
        executor.submit(no_op)
    executor.shutdown()


@pytest.mark.parametrize("workers", worker_counts(0, 2))
def test_bad_input(workers: int) -> None:
    with ch.Runtime(workers=workers) as rt:
        executor = rt.executor()
        with pytest.raises(TypeError):
            anything(executor).submit()
        with pytest.raises(TypeError):
            anything(executor).submit(3).result(30)
        assert executor.submit(lambda: 1).result(30) == 1


def test_handles_are_no_dependencies_of_the_executor(rt: ch.Runtime) -> None:
    # Other libraries pass their objects through; an executor takes arguments as they are
    # or as results, but never hangs on them.
    value = rt.submit(lambda: 2)
    got = rt.executor().submit(lambda x: x, value).result(30)
    assert got is value or got == 2
    value.result()
