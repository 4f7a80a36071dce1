"""Does size break anything: depth, breadth, order of spawn, handles nobody reads?

Nothing here is timed. What is not linear in the number of tasks does not end within the limit.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
from support import Boom, Latch, boom, eventually, no_op, run_script, worker_counts

import charioteer as ch

pytestmark = [pytest.mark.stress, pytest.mark.timeout(120, method="signal")]

WORKERS = worker_counts(1, 2)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_chain_of_30_000_awaiting_tasks(workers: int) -> None:
    length = 30_000
    space = ch.TaskSpace("T")

    @ch.task
    async def link(i: int) -> int:
        value: int = await space[i + 1]
        return value + 1

    with ch.Runtime(workers=workers):
        for i in range(length):
            link.options(space[i])(i)
        ch.spawn(space[length])(lambda: 0)
        assert space[0].result() == length


def test_a_chain_of_30_000_awaiting_tasks_that_spawn_the_next(rt: ch.Runtime) -> None:
    @ch.task
    async def link(n: int) -> int:
        return await link(n - 1) + 1 if n else 0

    assert link(30_000).result() == 30_000


@pytest.mark.parametrize("workers", WORKERS)
def test_a_fan_in_of_100_000(workers: int) -> None:
    count, ran = 100_000, []
    with ch.Runtime(workers=workers) as rt:
        with Latch() as latch:
            tasks = ch.spawn_many(ran.append, range(count), dependencies=[latch])
            named = ch.spawn(dependencies=tasks)(lambda: len(ran))
        assert named.result() == count
        values = ch.spawn_many(lambda x: x, range(count))
        assert rt.submit(sum, list(values)).result() == sum(range(count))


def test_a_fan_out_of_100_000(rt: ch.Runtime) -> None:
    count, ran = 100_000, []
    with Latch() as latch:
        root = ch.spawn(dependencies=[latch])(lambda: "root")
        tasks = ch.spawn_many(ran.append, range(count), dependencies=[root])
    tasks.result()
    assert sorted(ran) == list(range(count))


@pytest.mark.parametrize("workers", worker_counts(2))
def test_a_lattice_of_1_000_by_1_000(workers: int) -> None:
    n = 1000
    space = ch.TaskSpace("T")
    ended = [bytearray(n) for _ in range(n)]
    disorder: list[tuple[int, int]] = []

    @ch.task
    def cell(i: int, j: int) -> None:
        if (i and not ended[i - 1][j]) or (j and not ended[i][j - 1]):
            disorder.append((i, j))
        ended[i][j] = 1

    with ch.Runtime(workers=workers):
        for i in range(n):
            for j in range(n):
                cell.options(space[i, j], dependencies=[space[i - 1, j], space[i, j - 1]])(i, j)
    assert disorder == []
    assert sum(map(sum, ended)) == n * n
    assert len(space) == n * n


@pytest.mark.parametrize("workers", worker_counts(0, 1, 2))
def test_a_chain_of_100_000_spawned_in_reverse(workers: int) -> None:
    length = 100_000
    space = ch.TaskSpace("T")
    ran: list[int] = []

    @ch.task
    def link(i: int) -> None:
        ran.append(i)

    with ch.Runtime(workers=workers):
        for i in reversed(range(length)):
            link.options(space[i], dependencies=[space[i - 1]])(i)
        space[length - 1].result()
    assert ran == list(range(length))


def test_a_chain_of_100_000_through_arguments_in_reverse(rt: ch.Runtime) -> None:
    length = 100_000
    space = ch.TaskSpace("T")

    @ch.task
    def link(x: int) -> int:
        return x + 1

    for i in reversed(range(1, length)):
        link.options(space[i])(space[i - 1])
    ch.spawn(space[0])(lambda: 0)
    assert space[length - 1].result() == length - 1


def test_a_failure_at_the_root_of_a_chain_of_100_000(rt: ch.Runtime) -> None:
    length = 100_000
    task: Any = None
    with Latch() as latch:
        task = ch.spawn(dependencies=[latch])(lambda: boom("root"))
        for _ in range(length):
            task = ch.spawn(dependencies=[task])(no_op)
    error = task.exception()
    assert isinstance(error, ch.DependencyError)
    assert isinstance(error.__cause__, Boom)


def test_cancelling_the_root_of_a_chain_of_100_000(rt: ch.Runtime) -> None:
    length = 100_000
    space = ch.TaskSpace("T")
    with Latch() as latch:
        for i in range(length):
            ch.spawn(space[i], dependencies=[latch if i == 0 else space[i - 1]])(no_op)
        assert space[0].cancel()
        error = space[length - 1].exception()
    assert isinstance(error, ch.DependencyError)
    assert isinstance(error.__cause__, ch.CancelledError)


def test_cancelling_100_000_tasks_of_a_space(rt: ch.Runtime) -> None:
    count, ran = 100_000, []
    space = ch.TaskSpace("T")
    with Latch() as latch:
        for i in range(count):
            ch.spawn(space[i], dependencies=[latch])(lambda: ran.append(1))
        space.cancel()
    assert all(task.cancelled() for task in space)
    assert ran == []


def test_a_cycle_of_50_000_is_found(rt: ch.Runtime) -> None:
    length = 50_000
    space = ch.TaskSpace("T")
    for i in range(length - 1):
        ch.spawn(space[i], dependencies=[space[i + 1]])(no_op)
    with pytest.raises(ch.CycleError) as info:
        ch.spawn(space[length - 1], dependencies=[space[0]])(no_op)
    assert len(str(info.value)) < 10_000
    ch.spawn(space[length - 1])(no_op)
    assert space[0].result() is None


@pytest.mark.parametrize("workers", worker_counts(2))
def test_a_million_handles_dropped_unread(workers: int) -> None:
    count = 1_000_000
    ran: deque[None] = deque()
    with ch.Runtime(workers=workers) as rt:
        for _ in range(count):
            rt.submit(ran.append, None)
    assert len(ran) == count


def test_100_000_callbacks_on_one_task(rt: ch.Runtime) -> None:
    called: deque[Any] = deque()
    with Latch() as latch:
        task = ch.spawn(dependencies=[latch])(no_op)
        for _ in range(100_000):
            task.add_done_callback(called.append)
    task.result()
    eventually(lambda: len(called) == 100_000, "every callback runs")


def test_100_000_tasks_as_they_complete(rt: ch.Runtime) -> None:
    tasks = ch.spawn_many(lambda x: x, range(100_000))
    assert sum(task.result() for task in ch.as_completed(tasks)) == sum(range(100_000))


def test_50_000_async_tasks_asleep_at_once(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")

    @ch.task
    async def sleeper(i: int) -> int:
        await space[0]
        return i

    tasks = sleeper.map(range(50_000))
    ch.spawn(space[0])(no_op)
    assert tasks.result() == list(range(50_000))


def test_a_thousand_spaces_of_a_hundred(rt: ch.Runtime) -> None:
    ran: deque[None] = deque()
    for _ in range(1000):
        space = ch.TaskSpace()
        for i in range(100):
            ch.spawn(space[i], dependencies=[space[i - 1]])(lambda: ran.append(None))
    rt.close()
    assert len(ran) == 100_000


LONG_CHAINS_OF_REFERENCES = {
    "results that hold the handle before": """
        with ch.Runtime(workers=2) as rt:
            task = None
            for _ in range(n):
                task = rt.submit(lambda before: lambda: before, [[task]])
            task.result()
            del task
            rt.submit(lambda: None).result()
        """,
    "bodies that capture the handle before, run": """
        space = ch.TaskSpace("T")
        with ch.Runtime(workers=2) as rt:
            task = space[0]
            def spawn(before):
                return ch.spawn(dependencies=[space[0]])(lambda: before and None)
            for _ in range(n):
                task = spawn(task)
            ch.spawn(space[0])(lambda: None)
            task.result()
            del task
        """,
    "bodies that capture the handle before, cancelled": """
        space = ch.TaskSpace("T")
        try:
            with ch.Runtime(workers=2) as rt:
                task = space[0]
                def spawn(before):
                    return ch.spawn(dependencies=[space[0]])(lambda: before)
                for _ in range(n):
                    task = spawn(task)
                del task
                raise LookupError
        except LookupError:
            pass
        """,
    "dependents of dependents, never spawned": """
        space = ch.TaskSpace("T")
        try:
            with ch.Runtime(workers=2) as rt:
                task = space[0]
                for _ in range(n):
                    task = ch.spawn(dependencies=[task])(lambda: None)
        except ExceptionGroup as group:
            assert len(group.exceptions) == 1, group
        del task
        """,
    "results passed on as arguments": """
        with ch.Runtime(workers=2) as rt:
            task = rt.submit(lambda: None)
            for _ in range(n):
                task = rt.submit(lambda before: (before,), task)
            value = task.result()
        del value, task
        """,
    "a chain inline": """
        space = ch.TaskSpace("T")
        with ch.Runtime(workers=0) as rt:
            for i in reversed(range(n)):
                ch.spawn(space[i], dependencies=[space[i - 1]])(lambda x=space[i - 1]: x)
            space[n - 1].result()
        """,
    "callbacks that know the task before": """
        space = ch.TaskSpace("T")
        with ch.Runtime(workers=2) as rt:
            task = space[0]
            for _ in range(n):
                after = ch.spawn(dependencies=[space[0]])(lambda: None)
                after.add_done_callback(lambda t, before=task: before.done())
                task = after
            ch.spawn(space[0])(lambda: None)
            task.result()
            del task, after
        """,
}


@pytest.mark.parametrize("case", list(LONG_CHAINS_OF_REFERENCES))
def test_long_chains_of_references_do_not_overflow(case: str, tmp_path: Path) -> None:
    done = run_script(
        "\n        n = 200_000\n" + LONG_CHAINS_OF_REFERENCES[case] + "\n        say('survived')\n",
        tmp_path,
        limit=60,
        environment={"PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["survived"]
