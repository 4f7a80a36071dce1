"""Does a ``TaskGroup`` wait for its tasks and cancel the rest when one fails?"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support import Boom, Gate, Latch, anything, boom, leaves, no_op, worker_counts

import charioteer as ch


def test_waits_for_what_is_spawned_in_it(rt_any: ch.Runtime) -> None:
    with ch.TaskGroup():
        tasks = [ch.spawn(lambda i=i: i) for i in range(100)]
        many = ch.spawn_many(no_op_of, range(10))
        submitted = rt_any.submit(no_op)
    assert all(task.done() for task in [*tasks, *many, submitted])
    assert [task.result() for task in tasks] == list(range(100))


def no_op_of(item: object) -> None:
    """A body that ignores its item."""


def test_an_empty_group(rt_any: ch.Runtime) -> None:
    with ch.TaskGroup():
        pass


def test_does_not_wait_for_others(rt2: ch.Runtime) -> None:
    with Gate() as gate:
        with ch.TaskGroup():
            inside = ch.spawn(no_op)
        assert inside.done()
        assert not gate.task.done()
    gate.task.result()


def test_does_not_wait_for_what_comes_after(rt2: ch.Runtime) -> None:
    with ch.TaskGroup():
        pass
    with Latch() as latch:
        after = ch.spawn(dependencies=[latch])(no_op)
        with ch.TaskGroup():
            pass
        assert not after.done()
    after.result()


def test_a_failure_cancels_the_rest(rt: ch.Runtime) -> None:
    ran: list[int] = []
    latch = Latch()
    with pytest.raises(ExceptionGroup) as info:
        with ch.TaskGroup():
            rest = [
                ch.spawn(dependencies=[latch.task])(lambda i=i: ran.append(i)) for i in range(5)
            ]
            ch.spawn(lambda: boom("in the group"))
    assert [anything(e).origin for e in leaves(info.value)] == ["in the group"]
    assert all(task.cancelled() for task in rest)
    latch.open()
    assert ran == []


def test_a_failure_asks_the_running_ones(rt2: ch.Runtime) -> None:
    with pytest.raises(ExceptionGroup) as info:
        with ch.TaskGroup():
            gate = Gate()
            gate.started.wait()
            ch.spawn(lambda: boom("asks"))
    assert gate.asked
    assert all(isinstance(error, Boom) for error in leaves(info.value))


def test_its_failures_are_told(rt: ch.Runtime) -> None:
    # The fixture's runtime raises what nobody received; the group has received these.
    with pytest.raises(ExceptionGroup):
        with ch.TaskGroup():
            failed = ch.spawn(lambda: boom("told by the group"))
            ch.spawn(lambda x=failed: x)


def test_an_exception_in_the_block_cancels(rt: ch.Runtime) -> None:
    latch = Latch()
    with pytest.raises((LookupError, ExceptionGroup)) as info:
        with ch.TaskGroup():
            pending = ch.spawn(dependencies=[latch.task])(no_op)
            raise LookupError("in the block")
    assert [str(error) for error in leaves(info.value)] == ["in the block"]
    assert pending.cancelled()
    latch.open()


def test_groups_nest(rt: ch.Runtime) -> None:
    with ch.TaskGroup():
        outer = ch.spawn(no_op)
        with pytest.raises(ExceptionGroup):
            with ch.TaskGroup():
                ch.spawn(lambda: boom("inner"))
        after = ch.spawn(lambda: "the outer group goes on")
    assert outer.done() and after.result() == "the outer group goes on"


@pytest.mark.parametrize("workers", worker_counts(0, 1, 2))
def test_inside_a_body(workers: int) -> None:
    with ch.Runtime(workers=workers):

        @ch.spawn
        def outer() -> int:
            with ch.TaskGroup():
                tasks = [ch.spawn(lambda i=i: i) for i in range(10)]
            assert all(task.done() for task in tasks)
            return sum(task.result() for task in tasks)

        assert outer.result() == 45


def test_inside_an_async_body(rt1: ch.Runtime) -> None:
    @ch.spawn
    async def outer() -> int:
        async with ch.TaskGroup():
            tasks = [ch.spawn(lambda i=i: i) for i in range(10)]
        assert all(task.done() for task in tasks)
        return sum(task.result() for task in tasks)

    assert outer.result() == 45


def test_under_asyncio_the_loop_goes_on(rt: ch.Runtime) -> None:
    async def main() -> None:
        async with ch.TaskGroup():
            gate = Gate()
            # Only a loop that is not blocked can open the gate.
            asyncio.get_running_loop().call_later(0.05, gate.open)
        assert gate.task.done()

    asyncio.run(main())


def test_under_asyncio_a_failure_cancels_the_rest(rt: ch.Runtime) -> None:
    latch = Latch()

    async def main() -> Any:
        async with ch.TaskGroup():
            pending = ch.spawn(dependencies=[latch.task])(no_op)
            ch.spawn(lambda: boom("async group"))
        return pending

    with pytest.raises(ExceptionGroup) as info:
        asyncio.run(main())
    assert [anything(e).origin for e in leaves(info.value)] == ["async group"]
    latch.open()


def test_under_asyncio_concurrent_groups_are_separate(rt: ch.Runtime) -> None:
    async def good() -> str:
        async with ch.TaskGroup():
            task = ch.spawn(lambda: "good")
            await asyncio.sleep(0.01)
        return await task

    async def bad() -> None:
        async with ch.TaskGroup():
            ch.spawn(lambda: boom("bad"))
            await asyncio.sleep(0.01)

    async def main() -> list[Any]:
        return await asyncio.gather(good(), bad(), return_exceptions=True)

    first, second = asyncio.run(main())
    assert first == "good"
    assert isinstance(second, ExceptionGroup)


def test_outside_a_runtime() -> None:
    with pytest.raises(ch.NoRuntimeError):
        with ch.TaskGroup():
            ch.spawn(no_op)
