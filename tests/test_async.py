"""Do async bodies, awaited tasks and other people's awaitables work, in tasks and outside?"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support import (
    Boom,
    Gate,
    Latch,
    boom,
    eventually,
    functions_of,
    no_op,
    threads_of_process,
    worker_counts,
)

import charioteer as ch


def test_an_async_body_has_a_result(rt_any: ch.Runtime) -> None:
    @ch.spawn
    async def body() -> int:
        return 42

    assert body.result() == 42


def test_a_task_awaits_a_task(rt_any: ch.Runtime) -> None:
    inner = ch.spawn(lambda: 1)

    @ch.spawn
    async def outer() -> int:
        other = ch.spawn(lambda: 2)
        return await inner + await other + await inner

    assert outer.result() == 4


def test_awaiting_gives_up_the_worker(rt1: ch.Runtime) -> None:
    space, started = ch.TaskSpace("T"), []

    @ch.task
    async def waiting(i: int) -> int:
        started.append(i)
        value: int = await space[0]
        return value + i

    before = len(threads_of_process())
    tasks = waiting.map(range(200))
    eventually(lambda: len(started) == 200, "all start though none can end")
    assert len(threads_of_process()) <= before + 8
    assert not any(task.done() for task in tasks)
    assert all(task.running() for task in tasks)
    ch.spawn(space[0])(lambda: 1000)
    assert tasks.result() == [1000 + i for i in range(200)]


def test_awaiting_a_failed_task_raises_its_failure(rt_any: ch.Runtime) -> None:
    @ch.spawn
    async def body() -> str:
        with pytest.raises(Boom) as info:
            await ch.spawn(lambda: boom("awaited"))
        assert "boom" in functions_of(info.value)
        return "told"

    assert body.result() == "told"


def test_awaiting_a_cancelled_task_in_a_body(rt: ch.Runtime) -> None:
    latch = Latch()
    pending = ch.spawn(dependencies=[latch.task])(no_op)
    assert pending.cancel()

    @ch.spawn
    async def body() -> str:
        try:
            await pending
        except (ch.CancelledError, asyncio.CancelledError) as error:
            return type(error).__name__
        return "no error"

    assert body.result() == "CancelledError"
    latch.open()


def test_a_failing_async_body(rt: ch.Runtime) -> None:
    @ch.spawn
    async def body() -> None:
        await asyncio.sleep(0)
        raise Boom("async")

    with pytest.raises(Boom) as info:
        body.result()
    assert "body" in functions_of(info.value)


def test_await_lists_spaces_and_gathered(rt_any: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    for i in range(3):
        ch.spawn(space[i])(lambda i=i: i)

    @ch.spawn
    async def body() -> Any:
        return await space, await space[0:2], await ch.gather(space[2], space[0]), await space[3:3]

    assert body.result() == ([0, 1, 2], [0, 1], [2, 0], [])


def test_asyncio_sleep_in_a_task(rt_threads: ch.Runtime) -> None:
    @ch.task
    async def body(i: int) -> int:
        await asyncio.sleep(0.001 * (i % 5))
        return i

    assert body.map(range(100)).result() == list(range(100))


def test_asyncio_sleep_inline() -> None:
    with ch.Runtime(workers=0):

        @ch.spawn
        async def body() -> str:
            await asyncio.sleep(0.01)
            return "slept"

        assert body.result() == "slept"


def test_sleeping_tasks_hold_no_worker(rt1: ch.Runtime) -> None:
    release = ch.TaskSpace("release")

    @ch.spawn
    async def sleeper() -> str:
        while not release[0].done():
            await asyncio.sleep(0.001)
        return "awake"

    assert rt1.submit(lambda: 1).result() == 1
    ch.spawn(release[0])(no_op)
    assert sleeper.result() == "awake"


def test_asyncio_tools_in_a_task(rt1: ch.Runtime) -> None:
    async def child(x: int) -> int:
        await asyncio.sleep(0.001)
        return x

    @ch.spawn
    async def body() -> Any:
        gathered = await asyncio.gather(child(1), child(2))
        async with asyncio.TaskGroup() as group:
            first, second = group.create_task(child(3)), group.create_task(child(4))
        thread = await asyncio.to_thread(threading.get_ident)
        waited = await asyncio.wait_for(child(5), 30)
        queue: asyncio.Queue[int] = asyncio.Queue()
        producer = asyncio.create_task(queue.put(6))
        from_queue = await queue.get()
        await producer
        event = asyncio.Event()
        asyncio.get_running_loop().call_soon(event.set)
        await event.wait()
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.001, future.set_result, 7)
        return (
            *gathered,
            first.result(),
            second.result(),
            waited,
            from_queue,
            await future,
            thread != threading.get_ident(),
        )

    assert body.result() == (1, 2, 3, 4, 5, 6, 7, True)


def test_asyncio_timeout_around_a_sleep_in_a_task(rt1: ch.Runtime) -> None:
    @ch.spawn
    async def body() -> str:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        return "went on"

    assert body.result() == "went on"


def test_asyncio_timeout_around_a_task_in_a_task(rt2: ch.Runtime) -> None:
    gate = Gate()

    @ch.spawn
    async def body() -> str:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await gate.task
        return "went on"

    assert body.result() == "went on"
    eventually(lambda: gate.asked, "the awaited task is asked")


def test_async_iteration_and_context_managers_in_a_task(rt1: ch.Runtime) -> None:
    left: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            for i in range(3):
                await asyncio.sleep(0)
                yield i
        finally:
            left.append("generator")

    @contextlib.asynccontextmanager
    async def resource() -> AsyncIterator[str]:
        await asyncio.sleep(0)
        try:
            yield "resource"
        finally:
            await asyncio.sleep(0)
            left.append("resource")

    @ch.spawn
    async def body() -> Any:
        async with resource() as word:
            return word, [x async for x in numbers()]

    assert body.result() == ("resource", [0, 1, 2])
    assert left == ["generator", "resource"]


def test_custom_awaitables_in_a_task(rt1: ch.Runtime) -> None:
    class Yielding:
        def __await__(self) -> Any:
            yield from asyncio.sleep(0).__await__()
            yield
            return "custom"

    @ch.spawn
    async def body() -> Any:
        return await Yielding()

    assert body.result() == "custom"


def test_sockets_in_a_task(rt1: ch.Runtime) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            for _ in range(5):
                connection, _ = server.accept()
                with connection:
                    while data := connection.recv(100):
                        connection.sendall(data.upper())

        thread = threading.Thread(target=serve)
        thread.start()

        @ch.task
        async def client(i: int) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"hello {i}".encode())
            await writer.drain()
            writer.write_eof()
            data = await reader.read()
            writer.close()
            await writer.wait_closed()
            return data

        assert client.map(range(5)).result() == [f"HELLO {i}".encode() for i in range(5)]
        thread.join()


def test_the_loop_thread_starts_when_needed_and_ends_with_the_runtime() -> None:
    before = set(threads_of_process())
    with ch.Runtime(workers=1):

        @ch.spawn
        async def body() -> None:
            await asyncio.sleep(0)

        body.result()
    eventually(lambda: set(threads_of_process()) <= before, "the event loop's thread ends")


def test_awaitables_of_all_tasks_run_on_one_loop(rt2: ch.Runtime) -> None:
    @ch.task
    async def loop() -> Any:
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    loops = [task.result() for task in [loop() for _ in range(20)]]
    assert len({id(item) for item in loops}) == 1


def test_an_async_body_that_never_awaits_foreign_things_may_block(rt2: ch.Runtime) -> None:
    # A body that computes must not stop the others' sleeps.
    release = threading.Event()

    @ch.spawn
    async def computing() -> str:
        release.wait()
        return "computed"

    @ch.spawn
    async def sleeping() -> str:
        await asyncio.sleep(0.01)
        return "slept"

    assert sleeping.result() == "slept"
    release.set()
    assert computing.result() == "computed"


def test_cancelling_a_suspended_body(rt1: ch.Runtime) -> None:
    events: list[str] = []
    asleep = threading.Event()

    @ch.spawn
    async def body() -> None:
        try:
            asleep.set()
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise
        finally:
            events.append("finally")

    asleep.wait()
    body.cancel()
    with pytest.raises(ch.CancelledError):
        body.result()
    assert body.cancelled()
    assert events == ["cancelled", "finally"]


def test_cancelling_a_body_that_awaits_a_task(rt1: ch.Runtime) -> None:
    suspended = threading.Event()
    with Latch() as latch:
        pending = ch.spawn(dependencies=[latch])(no_op)

        @ch.spawn
        async def body() -> None:
            suspended.set()
            await pending

        suspended.wait()
        body.cancel()
        with pytest.raises(ch.CancelledError):
            body.result()
    ch.wait([pending])


def test_a_body_may_survive_its_cancellation(rt1: ch.Runtime) -> None:
    asleep = threading.Event()

    @ch.spawn
    async def body() -> str:
        try:
            asleep.set()
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            return "survived"
        return "slept"

    asleep.wait()
    body.cancel()
    assert body.result() == "survived"


def test_contextvars_across_awaits(rt2: ch.Runtime) -> None:
    variable = contextvars.ContextVar("variable", default="default")

    @ch.task
    async def body(i: int) -> Any:
        first = variable.get()
        variable.set(f"own {i}")
        await asyncio.sleep(0.001)
        return first, variable.get()

    variable.set("spawner's")
    assert body.map(range(10)).result() == [("spawner's", f"own {i}") for i in range(10)]
    assert variable.get() == "spawner's"


def test_current_across_awaits(rt2: ch.Runtime) -> None:
    @ch.task
    async def body(i: int) -> bool:
        before = ch.current().task
        await asyncio.sleep(0.001)
        await ch.spawn(no_op)
        return ch.current().task == before

    assert all(body.map(range(20)).result())


# Tasks awaited from the user's own asyncio loops.


def test_await_under_asyncio(rt_any: ch.Runtime) -> None:
    async def main() -> Any:
        task = rt_any.submit(lambda: 1)
        many = ch.spawn_many(lambda x: x, range(3))
        return await task, await task, await many, await ch.gather(task, task)

    assert asyncio.run(main()) == (1, 1, [0, 1, 2], [1, 1])


def test_await_under_asyncio_does_not_block_the_loop(rt: ch.Runtime) -> None:
    async def main() -> None:
        gate = Gate()
        asyncio.get_running_loop().call_later(0.05, gate.open)
        await gate.task

    asyncio.run(main())


def test_asyncio_combinators_take_tasks(rt: ch.Runtime) -> None:
    async def main() -> Any:
        one, two = rt.submit(lambda: 1), rt.submit(lambda: 2)
        gathered = await asyncio.gather(one, two)
        waited = await asyncio.wait_for(rt.submit(lambda: 3), 30)
        wrapped = await asyncio.wrap_future(rt.submit(lambda: 4).future())
        ensured = await asyncio.ensure_future(rt.submit(lambda: 5))
        shielded = await asyncio.shield(rt.submit(lambda: 6))
        return gathered, waited, wrapped, ensured, shielded

    assert asyncio.run(main()) == ([1, 2], 3, 4, 5, 6)


def test_failures_under_asyncio(rt: ch.Runtime) -> None:
    async def main() -> None:
        with pytest.raises(Boom):
            await rt.submit(boom)

    asyncio.run(main())


def test_a_cancelled_task_under_asyncio(rt: ch.Runtime) -> None:
    async def main() -> None:
        latch = Latch()
        task = ch.spawn(dependencies=[latch.task])(no_op)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        latch.open()

    asyncio.run(main())


def test_asyncio_timeout_asks_the_task_and_returns(rt2: ch.Runtime) -> None:
    async def main() -> None:
        gate = Gate()
        assert gate.started.wait(30)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await gate.task
        while not gate.asked:
            await asyncio.sleep(0.001)

    asyncio.run(main())


def test_asyncio_timeout_returns_though_the_body_does_not_listen(rt2: ch.Runtime) -> None:
    started, release = threading.Event(), threading.Event()

    def body() -> None:
        started.set()
        release.wait()

    async def main() -> None:
        task = rt2.submit(body)
        assert started.wait(30)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await task
        assert not task.done()
        release.set()
        await asyncio.wait_for(asyncio.wrap_future(task.future()), 30)

    asyncio.run(main())


def test_asyncio_timeout_cancels_a_pending_task(rt: ch.Runtime) -> None:
    ran: list[int] = []

    async def main() -> None:
        latch = Latch()
        task = ch.spawn(dependencies=[latch.task])(lambda: ran.append(1))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await task
        assert task.cancelled()
        latch.open()

    asyncio.run(main())
    assert ran == []


def test_several_loops_await_one_task(rt: ch.Runtime) -> None:
    found: list[int] = []
    gate = Gate()
    value = ch.spawn(lambda _=gate.task: 7)

    async def main() -> None:
        found.append(await value)

    threads = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.open()
    for thread in threads:
        thread.join()
    assert found == [7] * 4


def test_several_waiters_of_one_loop(rt: ch.Runtime) -> None:
    async def waiter(task: Any) -> Any:
        return await task

    async def main() -> Any:
        gate = Gate()
        value = ch.spawn(lambda _=gate.task: 7)
        waiters = [asyncio.create_task(waiter(value)) for _ in range(50)]
        await asyncio.sleep(0.001)
        gate.open()
        return await asyncio.gather(*waiters)

    assert asyncio.run(main()) == [7] * 50


def test_one_waiter_given_up_leaves_the_others(rt: ch.Runtime) -> None:
    async def waiter(task: Any) -> Any:
        return await asyncio.shield(asyncio.ensure_future(task))

    async def main() -> Any:
        gate = Gate()
        value = ch.spawn(lambda _=gate.task: 7)
        inner = asyncio.ensure_future(value)
        quitter = asyncio.create_task(waiter(inner))
        stayer = asyncio.create_task(waiter(inner))
        await asyncio.sleep(0.001)
        quitter.cancel()
        gate.open()
        return await stayer

    assert asyncio.run(main()) == 7


def test_a_loop_that_closed_before_the_end(rt: ch.Runtime) -> None:
    gate = Gate()
    value = ch.spawn(lambda _=gate.task: 7)
    loop = asyncio.new_event_loop()

    async def begin() -> Any:
        waiter = asyncio.ensure_future(value)
        await asyncio.sleep(0)
        return waiter

    waiter = loop.run_until_complete(begin())
    loop.close()
    waiter._log_destroy_pending = False
    gate.open()
    assert value.result() == 7
    assert rt.submit(lambda: 1).result() == 1


def test_async_with_runtime() -> None:
    async def main() -> Any:
        async with ch.Runtime(workers=2) as rt:
            task = rt.submit(lambda: 1)
            left = rt.submit(lambda: 2)
            return await task, left

    first, left = asyncio.run(main())
    assert first == 1
    assert left.result() == 2


def test_async_with_runtime_does_not_block_the_loop() -> None:
    async def main() -> Gate:
        async with ch.Runtime(workers=1):
            gate = Gate()
            asyncio.get_running_loop().call_later(0.05, gate.open)
        return gate

    assert asyncio.run(main()).task.done()


def test_async_with_runtime_raises_what_nobody_received() -> None:
    async def main() -> None:
        async with ch.Runtime(workers=1) as rt:
            rt.submit(boom, "unread")

    with pytest.raises(ExceptionGroup) as info:
        asyncio.run(main())
    assert [type(error) for error in info.value.exceptions] == [Boom]


def test_async_with_runtime_when_the_block_raises() -> None:
    latch = Latch()
    failure = LookupError("block")

    async def main() -> None:
        async with ch.Runtime(workers=1):
            ch.spawn(dependencies=[latch.task])(no_op)
            raise failure

    with pytest.raises(LookupError) as info:
        asyncio.run(main())
    assert info.value is failure


def test_async_with_runtime_inline() -> None:
    async def main() -> int:
        async with ch.Runtime(workers=0) as rt:
            return await rt.submit(lambda: 1)

    assert asyncio.run(main()) == 1


@pytest.mark.parametrize("workers", worker_counts(1, 2))
def test_async_fibonacci(workers: int) -> None:
    @ch.task
    async def fibonacci(n: int) -> int:
        if n < 2:
            return n
        first, second = fibonacci(n - 1), fibonacci(n - 2)
        return await first + await second

    with ch.Runtime(workers=workers):
        assert fibonacci(16).result() == 987


def test_mixed_blocking_and_async(rt1: ch.Runtime) -> None:
    @ch.task
    async def later(x: int) -> int:
        await asyncio.sleep(0.001)
        return x

    @ch.task
    def blocking(x: int) -> int:
        return later(x).result() + 1

    @ch.task
    async def outer() -> int:
        return sum(await blocking.map(range(10)))

    assert outer().result() == 55


def test_partial_and_method_coroutines(rt: ch.Runtime) -> None:
    class Service:
        async def answer(self, x: int) -> int:
            await asyncio.sleep(0)
            return x

        async def __call__(self, x: int) -> int:
            return x

    assert rt.submit(Service().answer, 4).result() == 4
    assert rt.submit(functools.partial(Service().answer, 5)).result() == 5


def test_blocking_result_in_the_loop_thread_of_the_user(rt: ch.Runtime) -> None:
    # Bad manners, but no deadlock: workers do not need the user's loop.
    async def main() -> int:
        return rt.submit(lambda: 3).result()

    assert asyncio.run(main()) == 3


def test_asyncio_combinators_over_tasks_in_a_body(rt1: ch.Runtime) -> None:
    async def waiter(task: Any) -> Any:
        return await task

    @ch.spawn
    async def body() -> Any:
        first, second = ch.spawn(lambda: 1), ch.spawn(lambda: 2)
        return (
            await asyncio.gather(first, second),
            await asyncio.gather(waiter(first), waiter(second)),
            await asyncio.wait_for(ch.spawn(lambda: 3), 30),
            await asyncio.create_task(waiter(ch.spawn(lambda: 4))),
            await asyncio.shield(ch.spawn(lambda: 5)),
        )

    assert body.result() == ([1, 2], [1, 2], 3, 4, 5)


def test_a_block_that_raises_ends_sleeping_bodies() -> None:
    events: list[str] = []
    asleep = threading.Barrier(3)

    async def sleeps(word: str, *others: float) -> None:
        try:
            await asyncio.to_thread(asleep.wait)
            await asyncio.gather(asyncio.sleep(3600), *map(asyncio.sleep, others))
        finally:
            events.append(word)

    with pytest.raises(LookupError):
        with ch.Runtime(workers=1) as rt:
            tasks = [rt.submit(sleeps, "one"), rt.submit(sleeps, "two", 3600, 3600)]
            asleep.wait(30)
            raise LookupError
    assert sorted(events) == ["one", "two"]
    assert all(task.cancelled() for task in tasks)


def test_one_coroutine_object_twice(rt_threads: ch.Runtime) -> None:
    async def body() -> int:
        await asyncio.sleep(0.001)
        return 1

    for _ in range(20):
        coroutine = body()
        task = rt_threads.submit(coroutine)
        with pytest.raises(RuntimeError, match="spawned before"):
            rt_threads.submit(coroutine)
        assert task.result() == 1
        with pytest.raises(RuntimeError, match="spawned before"):
            ch.spawn(coroutine)


def test_a_coroutine_object_that_was_refused_can_be_spawned(rt: ch.Runtime) -> None:
    async def body() -> int:
        return 1

    space = ch.TaskSpace()
    ch.spawn(space[0])(no_op)
    coroutine = body()
    with pytest.raises(ch.DuplicateTaskError):
        ch.spawn(space[0])(coroutine)
    assert ch.spawn(space[1])(coroutine).result() == 1


def test_awaitables_of_another_kind_of_loop(rt: ch.Runtime) -> None:
    class Foreign:
        def __await__(self) -> Any:
            yield "something that only another loop understands"

    async def at_once() -> None:
        await Foreign()

    async def later() -> None:
        await asyncio.sleep(0)
        await Foreign()

    for body in (at_once, later):
        assert isinstance(rt.submit(body).exception(), TypeError | RuntimeError)


def test_awaiting_by_hand_outside_of_any_loop(rt: ch.Runtime) -> None:
    with Gate() as gate:
        with pytest.raises(RuntimeError):
            gate.task.__await__().__next__()
    assert gate.task.result() is None
