"""Are bodies, arguments, results, exceptions and threads let go of?"""

from __future__ import annotations

import asyncio
import functools
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import (
    Boom,
    Gate,
    Latch,
    eventually,
    no_op,
    run_script,
    threads_of_process,
    worker_counts,
)

import charioteer as ch


class Thing:
    """Something that can be watched."""


def watched() -> tuple[Thing, weakref.ref[Thing]]:
    thing = Thing()
    return thing, weakref.ref(thing)


def gone(reference: weakref.ref[Any], what: str) -> None:
    """Assert that the watched thing is let go of soon."""
    eventually(lambda: reference() is None, f"{what} is let go of")


def identity(thing: Any) -> Any:
    return thing


def forget(thing: Any) -> None:
    """A body that keeps nothing."""


def capturing(thing: Any) -> Callable[[], None]:
    """A body that reads the thing from the function around it."""
    return lambda: forget(thing)


WAYS: dict[str, Callable[[Any, Thing], Any]] = {
    "argument": lambda rt, thing: rt.submit(forget, thing),
    "keyword": lambda rt, thing: rt.submit(forget, thing=thing),
    "in a list": lambda rt, thing: rt.submit(forget, [thing]),
    "in a dict": lambda rt, thing: rt.submit(forget, {"k": thing}),
    "captured": lambda rt, thing: rt.submit(lambda: forget(thing)),
    "default": lambda rt, thing: ch.spawn(lambda thing=thing: None),
    "default of a keyword": lambda rt, thing: ch.spawn(lambda *, thing=thing: None),
    "task function": lambda rt, thing: ch.task(forget)(thing),
    "spawn_many": lambda rt, thing: ch.spawn_many(forget, [thing]),
    "map": lambda rt, thing: ch.task(forget).map([thing]),
    "local": lambda rt, thing: rt.submit(lambda t: no_op(), thing),
    "with retries": lambda rt, thing: ch.spawn(retries=2)(lambda: forget(thing)),
    "with a timeout": lambda rt, thing: ch.spawn(timeout=3600)(lambda: forget(thing)),
    "with a dependency": lambda rt, thing: ch.spawn(dependencies=[rt.submit(no_op)])(
        lambda: forget(thing)
    ),
}


@pytest.mark.parametrize("workers", worker_counts(0, 2))
@pytest.mark.parametrize("way", list(WAYS))
def test_a_finished_task_keeps_neither_body_nor_arguments(way: str, workers: int) -> None:
    with ch.Runtime(workers=workers) as rt:
        thing, reference = watched()
        task = WAYS[way](rt, thing)
        del thing
        task.result()
        gone(reference, way)
        del task


def test_async_bodies_are_let_go_of(rt: ch.Runtime) -> None:
    thing, reference = watched()

    async def body(t: Any) -> None:
        held = t
        await asyncio.sleep(0)
        forget(held)

    task = rt.submit(body, thing)
    del thing
    task.result()
    gone(reference, "the async body's frame")


def test_a_method_lets_go_of_its_object(rt: ch.Runtime) -> None:
    class Service(Thing):
        def method(self) -> None: ...

    service = Service()
    reference = weakref.ref(service)
    task = rt.submit(service.method)
    del service
    task.result()
    gone(reference, "the method's object")


def test_a_result_lives_as_long_as_its_handle(rt_any: ch.Runtime) -> None:
    task = rt_any.submit(Thing)
    reference = weakref.ref(task.result())
    gc.collect()
    assert reference() is not None
    del task
    gone(reference, "the result")


def test_a_result_nobody_reads(rt_any: ch.Runtime) -> None:
    thing, reference = watched()
    rt_any.submit(identity, thing)
    del thing
    gone(reference, "the result of a dropped handle")


def test_results_consumed_as_arguments(rt_any: ch.Runtime) -> None:
    first = rt_any.submit(Thing)
    reference = weakref.ref(first.result())
    second = rt_any.submit(forget, first)
    third = rt_any.submit(lambda x: None, [first])
    del first
    second.result()
    third.result()
    gone(reference, "the consumed result")
    del second, third


def test_a_dependent_does_not_keep_its_dependencies(rt: ch.Runtime) -> None:
    first = rt.submit(Thing)
    reference = weakref.ref(first.result())
    second = ch.spawn(dependencies=[first])(no_op)
    second.result()
    del first
    gone(reference, "the result of a named dependency")
    del second


def test_a_space_keeps_and_clears(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    ch.spawn(space[0])(Thing)
    reference = weakref.ref(space[0].result())
    gc.collect()
    assert reference() is not None
    space.clear(space[:])
    gone(reference, "a cleared result")
    ch.spawn(space[1])(Thing)
    reference = weakref.ref(space[1].result())
    del space
    gone(reference, "the results of a dropped space")


def test_handles_themselves_are_let_go_of(rt: ch.Runtime) -> None:
    task = rt.submit(no_op)
    task.result()
    try:
        reference = weakref.ref(task)
    except TypeError:
        pytest.skip("handles take no weak references")
    del task
    gone(reference, "the handle")


def test_failures_and_their_tracebacks(rt_any: ch.Runtime) -> None:
    thing, reference = watched()

    def body(argument: Thing) -> None:
        held = argument
        raise Boom(held)

    task = rt_any.submit(body, thing)
    del thing
    error = task.exception()
    assert error is not None and error.__traceback__ is not None
    assert reference() is not None
    del task, error
    gone(reference, "the failure, its traceback and its frames")


def test_failures_that_went_through_dependents(rt_any: ch.Runtime) -> None:
    thing, reference = watched()

    def body(argument: Thing) -> None:
        raise Boom(argument)

    task = rt_any.submit(body, thing)
    dependent = rt_any.submit(forget, task)
    del thing
    with pytest.raises(ch.DependencyError):
        dependent.result()
    assert task.exception() is not None
    del task, dependent
    gone(reference, "the root failure")


def test_failures_of_attempts(rt: ch.Runtime) -> None:
    references: list[weakref.ref[Thing]] = []

    @ch.spawn(retries=3)
    def body() -> str:
        thing = Thing()
        references.append(weakref.ref(thing))
        if len(references) < 4:
            raise Boom(thing)
        return "done"

    assert body.result() == "done"
    for reference in references:
        gone(reference, "the failure of an attempt")


def test_failures_told_at_exit() -> None:
    thing, reference = watched()

    def body(argument: Thing) -> None:
        raise Boom(argument)

    try:
        with ch.Runtime(workers=2) as rt:
            rt.submit(body, thing)
    except ExceptionGroup:
        pass
    del thing, rt
    gone(reference, "the failure told at exit")


def test_reading_a_failure_often_does_not_grow_it(rt: ch.Runtime) -> None:
    def body() -> None:
        raise Boom

    task = rt.submit(body)

    def depth() -> int:
        with pytest.raises(Boom) as info:
            task.result()
        trace, count = info.value.__traceback__, 0
        while trace is not None:
            trace, count = trace.tb_next, count + 1
        return count

    first = [depth() for _ in range(5)][-1]
    assert [depth() for _ in range(50)][-1] <= first + 5


def test_cancelled_tasks(rt: ch.Runtime) -> None:
    thing, reference = watched()
    with Latch() as latch:
        task = ch.spawn(dependencies=[latch])(capturing(thing))
        del thing
        assert reference() is not None
        assert task.cancel()
        gone(reference, "the body of a cancelled task")
    del task


def test_skipped_tasks(rt: ch.Runtime) -> None:
    thing, reference = watched()

    def fail() -> None:
        raise Boom

    failed = rt.submit(fail)
    task = ch.spawn(dependencies=[failed])(capturing(thing))
    del thing
    assert task.exception() is not None
    gone(reference, "the body of a skipped task")


def test_refused_spawns(rt: ch.Runtime) -> None:
    thing, reference = watched()
    with pytest.raises(TypeError):
        ch.spawn(dependencies=[object()])(capturing(thing))  # type: ignore[list-item]
    space = ch.TaskSpace("T")
    with pytest.raises(ch.CycleError):
        ch.spawn(space[0], dependencies=[space[0]])(capturing(thing))
    ch.spawn(space[0])(no_op)
    del thing
    gone(reference, "the body of a refused spawn")


def test_callbacks(rt_any: ch.Runtime) -> None:
    thing, reference = watched()
    task = rt_any.submit(no_op)
    task.add_done_callback(lambda _, thing=thing: forget(thing))
    task.result()
    del thing
    gone(reference, "a callback that has run")


def test_a_callback_that_knows_its_task_is_no_cycle_for_ever(rt: ch.Runtime) -> None:
    thing, reference = watched()
    with Latch() as latch:
        task = ch.spawn(dependencies=[latch])(functools.partial(identity, thing))
        task.add_done_callback(lambda _, task=task: task.name)
        del thing
    task.result()
    del task
    gone(reference, "the result of a task that its callback knows")


def test_contexts(rt: ch.Runtime) -> None:
    import contextvars

    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable", default=None)
    thing, reference = watched()
    token = variable.set(thing)
    task = rt.submit(no_op)
    variable.reset(token)
    del thing, token
    task.result()
    gone(reference, "a value in the spawn's context")


def test_a_result_in_a_cycle_with_its_handle(rt: ch.Runtime) -> None:
    holder: dict[str, Any] = {}
    thing, reference = watched()
    holder["thing"] = thing
    holder["task"] = rt.submit(identity, holder)
    holder["task"].result()
    del holder, thing
    gone(reference, "a cycle through a result")


def test_pending_tasks_of_a_closed_runtime() -> None:
    thing, reference = watched()
    latch = Latch()
    with pytest.raises(LookupError):
        with ch.Runtime(workers=1):
            ch.spawn(dependencies=[latch.task])(capturing(thing))
            raise LookupError
    del thing
    gone(reference, "the body of a task cancelled at the end")


def test_executor_and_real_futures(rt: ch.Runtime) -> None:
    thing, reference = watched()
    future = rt.executor().submit(identity, thing)
    task_future = rt.submit(identity, thing).future()
    assert future.result(30) is thing and task_future.result(30) is thing
    del future, task_future, thing
    gone(reference, "the result of real futures")


def test_reference_counts_come_back(rt_threads: ch.Runtime) -> None:
    sentinel = Thing()
    before = sys.getrefcount(sentinel)

    @ch.task
    def body(x: Any, *, y: Any) -> Any:
        return sentinel if x is y else None

    tasks = [body(sentinel, y=sentinel) for _ in range(1000)]
    tasks += [body(tasks[0], y=tasks[1]) for _ in range(100)]
    assert all(task.result() is sentinel for task in tasks)
    del tasks, body
    eventually(lambda: sys.getrefcount(sentinel) <= before, "every reference is given back")


def test_no_objects_pile_up(rt: ch.Runtime) -> None:
    def round_of_work() -> None:
        space = ch.TaskSpace()
        for i in range(100):
            ch.spawn(space[i], dependencies=[space[i - 1]])(lambda i=i: [i])
        space[99].result()
        ch.spawn_many(lambda x: [x], range(100)).result()

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    for _ in range(5):
        round_of_work()
    eventually(lambda: objects() > 0, "a first count")
    before = objects()
    for _ in range(30):
        round_of_work()
    eventually(lambda: objects() <= before + 500, "the objects of finished work go")


def test_no_thread_is_left() -> None:
    before = set(threads_of_process())
    names_before = {thread.ident for thread in threading.enumerate()}
    for workers in (1, 4):
        with ch.Runtime(workers=workers) as rt:

            @ch.task
            def waits(n: int) -> int:
                return n and waits(n - 1).result()

            @ch.task(timeout=3600)
            async def sleeps() -> None:
                await asyncio.sleep(0)

            waits(20).result()
            sleeps().result()
            with Gate():
                pass
            list(rt.executor().map(abs, [-1]))
    eventually(lambda: set(threads_of_process()) <= before, "every thread ends")
    assert {thread.ident for thread in threading.enumerate()} <= names_before


def test_a_runtime_is_let_go_of() -> None:
    with ch.Runtime(workers=1) as rt:
        rt.submit(no_op).result()
    try:
        reference = weakref.ref(rt)
    except TypeError:
        pytest.skip("runtimes take no weak references")
    del rt
    gone(reference, "the closed runtime")


def test_an_eager_collector(tmp_path: Path) -> None:
    # A collection at almost every allocation meets objects that are only half made.
    done = run_script(
        """
        import asyncio, gc
        gc.set_threshold(2, 2, 2)

        @ch.task
        def twice(x, y=0):
            return [2 * x, y]

        def outer(space, i):
            inner = [ch.spawn(lambda: k) for k in range(3)]
            async def sleeps():
                await asyncio.sleep(0)
                return await ch.gather(*inner)
            return ch.spawn(sleeps).result(), len(ch.wait(inner).done)

        for workers in (0, 2):
            with ch.Runtime(workers=workers) as rt:
                for i in range(60):
                    space = ch.TaskSpace("T")
                    twice.options(space[0], priority=i).options(retries=1)([i])
                    ch.spawn(space[1], dependencies=[space[0:1]])(lambda x=space[0]: x)
                    tasks = ch.spawn_many(lambda x: {"x": x}, range(5), dependencies=[space[:]])
                    future = rt.submit(dict, a=tasks, b=space).future()
                    assert len(future.result()["a"]) == 5
                    assert rt.submit(outer, space, i).result() == ([0, 1, 2], 3)
                    assert list(rt.map(abs, [-1, -2])) == [1, 2]
                    assert rt.executor().submit(abs, -1).result() == 1
                    for task in ch.as_completed([space[0], space[1], *tasks]):
                        task.result()
                    error = rt.submit(lambda x: x, rt.submit(int, "x")).exception()
                    assert isinstance(error.__cause__, ValueError)
                    with ch.TaskGroup():
                        ch.spawn(lambda: None)
                    space.view[0:1]
                    space.clear(space[:])
        say("survived")
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["survived"]


def test_runtimes_in_a_row_leave_nothing() -> None:
    def descriptors() -> int:
        import os

        return len(os.listdir("/proc/self/fd"))

    def open_and_close() -> None:
        with ch.Runtime(workers=2) as rt:

            async def body() -> None:
                await asyncio.sleep(0)

            rt.submit(body).result()

    open_and_close()
    before = descriptors()
    for _ in range(30):
        open_and_close()
    eventually(lambda: descriptors() <= before, "file descriptors are closed")


def test_finalisers_that_spawn_and_wait(rt_any: ch.Runtime) -> None:
    ran: list[int] = []

    class Argument:
        def __del__(self) -> None:
            ch.spawn(lambda: ran.append(1))

    class Result:
        def __del__(self) -> None:
            ran.append(ch.spawn(lambda: 2).result())

    for _ in range(20):
        rt_any.submit(forget, Argument()).result()
        rt_any.submit(Result).result()
    eventually(lambda: sorted(ran) == [1] * 20 + [2] * 20, "every finaliser has run")


def test_handles_and_runtimes_are_not_pickled(rt: ch.Runtime) -> None:
    task = rt.submit(no_op)
    task.result()
    for thing in (task, ch.TaskSpace("T"), rt, ch.spawn_many(forget, [1])):
        with pytest.raises(TypeError):
            pickle.dumps(thing)
