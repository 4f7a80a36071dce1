"""May a body wait, what does its thread do meanwhile, and which waits can never end?"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from support import (
    Boom,
    Gate,
    Latch,
    boom,
    eventually,
    leaves,
    names_of,
    no_op,
    run_script,
    threads_of_process,
    worker_counts,
)

import charioteer as ch


def test_a_body_waits_for_its_child(rt_any: ch.Runtime) -> None:
    @ch.spawn
    def outer() -> int:
        return ch.spawn(lambda: 20).result() + ch.spawn(lambda: 22).result()

    assert outer.result() == 42


def test_every_way_to_wait_in_a_body(rt_any: ch.Runtime) -> None:
    space = ch.TaskSpace("T")

    @ch.spawn
    def outer() -> Any:
        tasks = [ch.spawn(space[i])(lambda i=i: i) for i in range(4)]
        return (
            tasks[0].result(),
            tasks[1].exception(),
            len(ch.wait(tasks).done),
            sorted(task.result() for task in ch.as_completed(tasks)),
            ch.gather(*tasks).result(),
            sorted(space.result()),
            space[0:2].result(),
            list(rt_any.map(abs, [-1, -2])),
        )

    assert outer.result() == (0, None, 4, [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1], [1, 2])


def test_waiting_gives_up_the_worker(rt1: ch.Runtime) -> None:
    # The awaited task needs another, which only a second thread can run.
    space, waiting = ch.TaskSpace("T"), threading.Event()

    @ch.spawn
    def outer() -> str:
        task = ch.spawn(space[1], dependencies=[space[0]])(lambda: "inner")
        waiting.set()
        return task.result()

    waiting.wait()
    assert rt1.submit(lambda: "unrelated").result() == "unrelated"
    ch.spawn(space[0])(no_op)
    assert outer.result() == "inner"


def test_blocked_waiters_do_not_stop_the_worker(rt1: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    with Latch() as latch:
        ch.spawn(space[0], dependencies=[latch])(lambda: 5)
        waiters = [ch.spawn(lambda: space[0].result()) for _ in range(10)]
        assert rt1.submit(lambda: "still serving").result() == "still serving"
    assert [task.result() for task in waiters] == [5] * 10


def test_a_waiting_thread_runs_nothing_unrelated(rt1: ch.Runtime) -> None:
    events: list[tuple[int, str]] = []

    def note(what: str) -> None:
        events.append((threading.get_ident(), what))

    @ch.spawn
    def outer() -> None:
        unrelated = [ch.spawn(lambda: note("unrelated")) for _ in range(50)]
        needed = ch.spawn(lambda: note("needed"))
        awaited = ch.spawn(dependencies=[needed])(lambda: note("awaited"))
        note("waits")
        awaited.result()
        note("resumes")
        ch.wait(unrelated)

    outer.result()
    begin = next(i for i, (_, what) in enumerate(events) if what == "waits")
    end = next(i for i, (_, what) in enumerate(events) if what == "resumes")
    here = events[begin][0]
    meanwhile = [what for thread, what in events[begin + 1 : end] if thread == here]
    assert set(meanwhile) <= {"needed", "awaited"}
    assert sum(what == "unrelated" for _, what in events) == 50


def test_the_context_of_the_waiter_comes_back(rt1: ch.Runtime) -> None:
    @ch.task
    def inner() -> Any:
        return ch.current().task

    @ch.spawn
    def outer() -> bool:
        before = ch.current().task
        child = inner()
        return child.result() == child and ch.current().task == before and before != child

    assert outer.result()


@pytest.mark.parametrize("workers", worker_counts(1, 2))
def test_blocking_fibonacci_with_few_threads(workers: int) -> None:
    most = 0
    before = len(threads_of_process())

    @ch.task
    def fibonacci(n: int) -> int:
        nonlocal_most(n)
        if n < 2:
            return n
        first, second = fibonacci(n - 1), fibonacci(n - 2)
        return first.result() + second.result()

    def nonlocal_most(n: int) -> None:
        nonlocal most
        if n == 0:
            most = max(most, len(threads_of_process()))

    with ch.Runtime(workers=workers):
        assert fibonacci(20).result() == 6765
    assert most - before <= 64


def test_fibonacci_inline() -> None:
    @ch.task
    def fibonacci(n: int) -> int:
        return n if n < 2 else fibonacci(n - 1).result() + fibonacci(n - 2).result()

    with ch.Runtime(workers=0):
        assert fibonacci(15).result() == 610


def test_spare_threads_are_used_again(rt1: ch.Runtime) -> None:
    @ch.task
    def outer() -> int:
        space = ch.TaskSpace()
        task = ch.spawn(space[1], dependencies=[space[0]])(lambda: 1)
        ch.spawn(space[0])(no_op)
        return task.result()

    for _ in range(20):
        outer().result()
    after_some = len(threads_of_process())
    for _ in range(300):
        outer().result()
    assert len(threads_of_process()) <= after_some + 2


def test_deep_waits_end_with_a_value_or_a_named_error(tmp_path: Path) -> None:
    # However deep the chain of waits: no crash, no hang.
    done = run_script(
        """
        def body(n):
            if n == 0:
                return 0
            return 1 + ch.spawn(lambda: body(n - 1)).result()

        def causes(error):
            while error is not None:
                yield type(error).__name__
                error = error.__cause__ or error.__context__

        for workers in (1, 2, 0):
            for depth in (100, 3000):
                errors = []
                try:
                    with ch.Runtime(workers=workers) as rt:
                        task = rt.submit(body, depth)
                        error = task.exception()
                        errors += [] if error is None else [error]
                except ExceptionGroup as group:
                    # Of those whose waiter was told of the limit and went.
                    errors += group.exceptions
                if not errors:
                    say(workers, depth, task.result() == depth)
                else:
                    limits = {"WorkerLimitError", "RecursionError"}
                    named = all(limits & set(causes(error)) for error in errors)
                    say(workers, depth, named and depth > 100)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == [
        f"{workers} {depth} True" for workers in (1, 2, 0) for depth in (100, 3000)
    ]


def test_too_many_waiting_threads_name_the_chain() -> None:
    # The waiters would take every thread that there may be, and the body that they wait for
    # needs one more. The bodies that ask for too much are told; the rest goes on.
    begun, opened = threading.Event(), threading.Event()
    with ch.Runtime(workers=2) as rt:

        @ch.spawn("the gate")
        def gate() -> str:
            begun.set()
            opened.wait()
            return "open"

        begun.wait()
        waiters = [ch.spawn(f"waiter {i}")(lambda: gate.result()) for i in range(4000)]
        opener = ch.spawn(priority=-1)(opened.set)
        opener.result()
        errors = {task.name: task.exception() for task in waiters}
        told = {name: error for name, error in errors.items() if error is not None}
        assert 0 < len(told) < len(waiters)
        for name, error in told.items():
            assert isinstance(error, ch.WorkerLimitError)
            assert "the gate" in str(error)
            assert name in str(error)
        assert rt.submit(lambda: "alive").result() == "alive"


def test_waiting_for_oneself(rt_any: ch.Runtime) -> None:
    space = ch.TaskSpace("T")

    @ch.spawn(space[0])
    def body() -> None:
        ch.current().task.result()

    with pytest.raises(ch.CycleError) as info:
        body.result()
    assert names_of(info.value.cycle) == {"T[0]"}


def test_every_way_to_wait_for_oneself(rt: ch.Runtime) -> None:
    def exceptions() -> None:
        ch.current().task.exception()

    def wait() -> None:
        ch.wait([ch.current().task])

    def gather() -> None:
        ch.gather(ch.current().task).result()

    def as_completed() -> None:
        list(ch.as_completed([ch.current().task]))

    async def awaiting() -> None:
        await ch.current().task

    async def awaiting_later() -> None:
        await asyncio.sleep(0)
        await ch.current().task

    for body in (exceptions, wait, gather, as_completed, awaiting, awaiting_later):
        assert isinstance(rt.submit(body).exception(), ch.CycleError), body.__name__


def test_the_body_may_catch_the_cycle(rt: ch.Runtime) -> None:
    @ch.spawn
    def body() -> str:
        with pytest.raises(ch.CycleError):
            ch.current().task.result()
        return "went on"

    assert body.result() == "went on"


def test_waiting_for_a_dependent(rt_any: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    ran: list[int] = []
    ch.spawn(space[1], dependencies=[space[0]])(lambda: ran.append(1))

    @ch.spawn(space[0])
    def body() -> None:
        space[1].result()

    with pytest.raises(ch.CycleError) as info:
        body.result()
    assert names_of(info.value.cycle) == {"T[0]", "T[1]"}
    assert isinstance(space[1].exception(), ch.DependencyError)
    assert ran == []


def test_two_bodies_that_wait_for_each_other(rt_threads: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    for i in range(2):
        ch.spawn(space[i])(lambda i=i: space[1 - i].result())
    errors = [task.exception() for task in space]
    cycles = [error for error in errors if isinstance(error, ch.CycleError)]
    assert cycles
    assert names_of(cycles[0].cycle) == {"T[0]", "T[1]"}


def test_two_async_bodies_that_wait_for_each_other(rt_threads: ch.Runtime) -> None:
    space = ch.TaskSpace("T")

    @ch.task
    async def body(i: int) -> None:
        await space[1 - i]

    for i in range(2):
        body.options(space[i])(i)
    errors = [task.exception() for task in space]
    assert any(isinstance(error, ch.CycleError) for error in errors)


def test_a_long_cycle_of_waits(rt: ch.Runtime) -> None:
    space, length = ch.TaskSpace("T"), 20
    for i in range(length):
        ch.spawn(space[i])(lambda i=i: space[(i + 1) % length].result())
    errors = [task.exception() for task in space]
    cycle = next(error for error in errors if isinstance(error, ch.CycleError))
    assert names_of(cycle.cycle) == {f"T[{i}]" for i in range(length)}


def test_a_cycle_of_waits_and_dependencies(rt: ch.Runtime) -> None:
    # T[0] waits for T[3]; T[3] depends on T[2]; T[2] waits for T[1]; T[1] depends on T[0].
    space = ch.TaskSpace("T")
    ch.spawn(space[1], dependencies=[space[0]])(no_op)
    ch.spawn(space[3], dependencies=[space[2]])(no_op)
    ch.spawn(space[0])(lambda: space[3].result())
    ch.spawn(space[2])(lambda: space[1].result())
    errors = [task.exception() for task in space]
    found = [leaf for error in errors if error is not None for leaf in leaves(error)]
    assert any(
        isinstance(e, ch.CycleError) or isinstance(e.__cause__, ch.CycleError) for e in found
    )


def test_a_wait_for_a_task_that_then_depends_on_the_waiter() -> None:
    space, waits = ch.TaskSpace("T"), threading.Event()
    failures: list[BaseException] = []
    try:
        with ch.Runtime(workers=2):

            @ch.spawn(space[0])
            def body() -> None:
                waits.set()
                space[1].result()

            waits.wait()
            threading.Event().wait(0.05)
            try:
                ch.spawn(space[1], dependencies=[space[0]])(no_op)
            except ch.CycleError as error:
                failures.append(error)
    except ExceptionGroup as group:
        failures += leaves(group)
    assert any(isinstance(error, ch.CycleError) for error in failures)
    assert space[0].done()


def test_a_body_that_waits_for_what_nobody_spawns() -> None:
    space = ch.TaskSpace("T")
    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=2):
            body = ch.spawn(lambda: space[7].result())
    errors = leaves(info.value)
    assert any(isinstance(error, ch.UnspawnedDependencyError) for error in errors)
    assert body.done()


def test_an_async_body_that_waits_for_what_nobody_spawns() -> None:
    space = ch.TaskSpace("T")

    async def body() -> None:
        await space[7]

    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=2) as rt:
            task = rt.submit(body)
    assert any(isinstance(e, ch.UnspawnedDependencyError) for e in leaves(info.value))
    assert task.done()


def test_a_wait_with_a_timeout_in_a_body(rt1: ch.Runtime) -> None:
    space = ch.TaskSpace("T")

    @ch.spawn
    def body() -> str:
        with pytest.raises(TimeoutError):
            space[0].result(timeout=0.01)
        return "gave up"

    assert body.result() == "gave up"
    ch.spawn(space[0])(no_op)
    space[0].result()


def test_a_wait_with_a_timeout_is_no_edge_once_it_ended(rt1: ch.Runtime) -> None:
    space = ch.TaskSpace("T")

    @ch.spawn(space[0])
    def body() -> None:
        with pytest.raises(TimeoutError):
            space[1].result(timeout=0.01)

    body.result()
    ch.spawn(space[1], dependencies=[space[0]])(no_op)
    space[1].result()


def test_failures_of_awaited_tasks(rt_any: ch.Runtime) -> None:
    @ch.spawn
    def outer() -> str:
        child = ch.spawn(lambda: boom("child"))
        with pytest.raises(Boom):
            child.result()
        return "handled"

    assert outer.result() == "handled"


def test_a_failure_that_passes_through_waits(rt_any: ch.Runtime) -> None:
    def body(n: int) -> Any:
        return boom("bottom") if n == 0 else ch.spawn(lambda: body(n - 1)).result()

    error = rt_any.submit(body, 5).exception()
    assert isinstance(error, Boom) and error.origin == "bottom"


def test_waiting_does_not_mix_up_handled_exceptions(rt1: ch.Runtime) -> None:
    @ch.task
    def child() -> None:
        raise Boom("child")

    @ch.spawn
    def outer() -> Any:
        try:
            raise LookupError("outer")
        except LookupError:
            task = child()
            error = task.exception()
            assert isinstance(error, Boom)
            return error.__context__

    assert outer.result() is None


def test_waits_of_many_threads_outside(rt: ch.Runtime) -> None:
    with Gate() as gate:
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda: found.append(gate.task.result())) for _ in range(20)
        ]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    assert found == [None] * 20


def test_a_tree_of_waits(rt_threads: ch.Runtime) -> None:
    @ch.task
    def total(depth: int) -> int:
        if depth == 0:
            return 1
        return sum(total.map([depth - 1] * 3).result())

    assert total(6).result() == 729


def test_waiting_while_the_runtime_closes() -> None:
    with ch.Runtime(workers=1) as rt:

        @ch.spawn
        def outer() -> int:
            children = [ch.spawn(lambda i=i: i) for i in range(10)]
            return sum(task.result() for task in children)

    assert outer.result() == 45
    assert rt is not None


def test_spawning_generation_after_generation_while_closing() -> None:
    ran: list[int] = []

    @ch.task
    def generation(n: int) -> None:
        ran.append(n)
        if n:
            generation(n - 1)

    with ch.Runtime(workers=2):
        generation(2000)
    assert ran == list(range(2000, -1, -1))


def test_a_waiter_is_woken_by_cancellation(rt: ch.Runtime) -> None:
    latch, waits = Latch(), threading.Event()
    pending = ch.spawn(dependencies=[latch.task])(no_op)

    @ch.spawn
    def outer() -> str:
        waits.set()
        with pytest.raises(ch.CancelledError):
            pending.result()
        return "woken"

    waits.wait()
    assert pending.cancel()
    assert outer.result() == "woken"
    latch.open()


def test_threads_after_a_burst_of_waits(rt1: ch.Runtime) -> None:
    before = len(threads_of_process())
    with Latch() as latch:
        waiters = [ch.spawn(lambda: latch.result()) for _ in range(30)]
        eventually(lambda: all(task.running() for task in waiters), "all wait")
    for task in waiters:
        task.result()
    assert len(threads_of_process()) <= before + 30
