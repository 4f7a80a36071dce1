"""Where does a failure go, and is each told exactly once?"""

from __future__ import annotations

import dataclasses
import gc
import sys
import threading
from typing import Any

import pytest
from support import (
    Boom,
    Gate,
    Latch,
    anything,
    boom,
    eventually,
    functions_of,
    leaves,
    no_op,
    worker_counts,
)

import charioteer as ch

COUNTS = worker_counts(0, 2)


def origins(group: BaseException) -> list[Any]:
    """Who raised the failures in a group, sorted."""
    return sorted(anything(error).origin for error in leaves(group))


def test_the_very_exception_with_its_traceback(rt_any: ch.Runtime) -> None:
    failure = Boom("identical")

    @ch.spawn
    def body() -> None:
        def deeper() -> None:
            raise failure

        deeper()

    with pytest.raises(Boom) as info:
        body.result()
    assert info.value is failure
    assert {"body", "deeper"} <= set(functions_of(failure))


def test_causes_and_contexts_are_kept(rt_any: ch.Runtime) -> None:
    @ch.spawn
    def body() -> None:
        try:
            raise LookupError("first")
        except LookupError as error:
            raise Boom("second") from error

    error = body.exception()
    assert error is not None and isinstance(error.__cause__, LookupError)


def test_dependents_fail_with_the_root_as_cause(rt_any: ch.Runtime) -> None:
    ran: list[int] = []
    root = ch.spawn("root")(lambda: boom("root"))
    named = ch.spawn("named", dependencies=[root])(lambda: ran.append(1))
    argument = rt_any.submit(lambda x: ran.append(2), root)
    in_list = rt_any.submit(lambda x: ran.append(3), [root])
    far = ch.spawn(dependencies=[named, argument])(lambda: ran.append(4))
    for task in (named, argument, in_list, far):
        with pytest.raises(ch.DependencyError) as info:
            task.result()
        assert info.value.__cause__ is root.exception()
        assert task.done() and not task.cancelled()
    assert isinstance(named.exception(), RuntimeError)
    assert "root" in str(named.exception())
    assert ran == []


def test_two_failed_dependencies(rt_any: ch.Runtime) -> None:
    roots = [ch.spawn(lambda i=i: boom(i)) for i in range(2)]
    dependent = ch.spawn(dependencies=roots)(no_op)
    error = dependent.exception()
    assert isinstance(error, ch.DependencyError)
    assert error.__cause__ in [task.exception() for task in roots]


def test_independent_tasks_are_untouched(rt_any: ch.Runtime) -> None:
    before = ch.spawn(lambda: 1)
    failed = ch.spawn(lambda: boom())
    beside = ch.spawn(dependencies=[before])(lambda: 2)
    after = ch.spawn(lambda: 3)
    assert [before.result(), beside.result(), after.result()] == [1, 2, 3]
    assert isinstance(failed.exception(), Boom)


def test_failing_in_a_body_that_spawned_leaves_the_children(rt_any: ch.Runtime) -> None:
    children: list[Any] = []

    @ch.spawn
    def body() -> None:
        children.append(ch.spawn(lambda: "child"))
        raise Boom("parent")

    assert isinstance(body.exception(), Boom)
    assert children[0].result() == "child"


@pytest.mark.parametrize("workers", COUNTS)
def test_unread_roots_are_raised_once_at_exit(workers: int) -> None:
    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=workers) as rt:
            kept = [rt.submit(boom, i) for i in range(3)]
            dependents = [rt.submit(lambda x: x, task) for task in kept for _ in range(4)]
            further = rt.submit(lambda x: x, dependents)
    assert origins(info.value) == [0, 1, 2]
    assert [task.exception() for task in kept] == sorted(
        info.value.exceptions, key=lambda error: anything(error).origin
    )
    assert isinstance(further.exception(), ch.DependencyError)


@pytest.mark.parametrize("workers", COUNTS)
def test_roots_of_dropped_handles_are_raised_too(workers: int) -> None:
    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=workers) as rt:
            for i in range(10):
                rt.submit(boom, i)
            gc.collect()
    assert origins(info.value) == list(range(10))


def test_roots_of_children_are_raised_too() -> None:
    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=2) as rt:
            rt.submit(lambda: rt.submit(lambda: boom("child")) and None)
    assert origins(info.value) == ["child"]


@pytest.mark.parametrize("workers", COUNTS)
@pytest.mark.parametrize(
    "receive",
    ["result", "exception", "list", "gather", "callback", "dependent", "await", "map", "future"],
)
def test_what_was_received_is_not_raised_again(workers: int, receive: str) -> None:
    with ch.Runtime(workers=workers) as rt:
        task = rt.submit(boom, "received")
        match receive:
            case "result":
                with pytest.raises(Boom):
                    task.result()
            case "exception":
                assert isinstance(task.exception(), Boom)
            case "list":
                with pytest.raises(Boom):
                    ch.spawn_many(boom, ["in a list"]).result()
                task.exception()
            case "gather":
                with pytest.raises(Boom):
                    ch.gather(task).result()
            case "callback":
                seen: list[Any] = []
                task.add_done_callback(lambda t: seen.append(t.exception()))
                eventually(lambda: seen, "the callback runs")
            case "dependent":
                with pytest.raises(ch.DependencyError):
                    rt.submit(lambda x: x, task).result()
            case "await":

                async def body() -> None:
                    with pytest.raises(Boom):
                        await task

                rt.submit(body).result()
            case "map":
                with pytest.raises(Boom):
                    list(rt.map(boom, ["in map"]))
                task.exception()
            case "future":
                assert isinstance(task.future().exception(timeout=30), Boom)


@pytest.mark.parametrize("workers", COUNTS)
def test_only_what_nobody_received(workers: int) -> None:
    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=workers) as rt:
            tasks = [rt.submit(boom, i) for i in range(6)]
            for task in tasks[::2]:
                task.exception()
    assert origins(info.value) == [1, 3, 5]


def test_a_cancelled_task_is_no_root_at_exit() -> None:
    latch = Latch()
    with ch.Runtime(workers=2):
        cancelled = ch.spawn(dependencies=[latch.task])(no_op)
        dependent = ch.spawn(dependencies=[cancelled])(no_op)
        assert cancelled.cancel()
        latch.open()
    error = dependent.exception()
    assert isinstance(error, ch.DependencyError)
    assert isinstance(error.__cause__, ch.CancelledError)


def test_a_group_raised_by_a_body_stays_whole() -> None:
    failure = ExceptionGroup("of a body", [ValueError(1), TypeError(2)])

    def body() -> None:
        raise failure

    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=1) as rt:
            rt.submit(body)
    assert list(info.value.exceptions) == [failure]


@pytest.mark.parametrize("workers", COUNTS)
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_base_exceptions_are_the_tasks_failure(kind: type[BaseException], workers: int) -> None:
    failure = kind("stored")

    def body() -> None:
        raise failure

    with ch.Runtime(workers=workers) as rt:
        task = rt.submit(body)
        dependent = rt.submit(lambda x: x, task)
        assert task.exception() is failure
        with pytest.raises(kind) as info:
            task.result()
        assert info.value is failure
        error = dependent.exception()
        assert isinstance(error, ch.DependencyError) and error.__cause__ is failure
        assert rt.submit(lambda: "alive").result() == "alive"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_base_exceptions_in_async_bodies(kind: type[BaseException]) -> None:
    async def body() -> None:
        raise kind("stored")

    with ch.Runtime(workers=1) as rt:
        assert isinstance(rt.submit(body).exception(), kind)
        assert rt.submit(lambda: "alive").result() == "alive"


@pytest.mark.parametrize("workers", COUNTS)
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_unread_base_exceptions_at_exit(kind: type[BaseException], workers: int) -> None:
    def body() -> None:
        raise kind("unread")

    with pytest.raises(BaseExceptionGroup) as info:
        with ch.Runtime(workers=workers) as rt:
            rt.submit(body)
            rt.submit(boom, "beside")
    assert {type(error) for error in info.value.exceptions} == {kind, Boom}
    assert not isinstance(info.value, ExceptionGroup)


class Unprintable(Exception):
    """An exception that fails when it is shown."""

    def __str__(self) -> str:
        raise RuntimeError("no str")

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def unprintable() -> None:
    raise Unprintable


@pytest.mark.parametrize("workers", COUNTS)
def test_exceptions_that_cannot_be_shown(workers: int) -> None:
    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=workers) as rt:
            task = rt.submit(unprintable)
            dependent = rt.submit(lambda x: x, task)
            assert rt.submit(lambda: "alive").result() == "alive"
            ch.wait([dependent])
            assert repr(task) and repr(dependent)
    assert [type(error) for error in info.value.exceptions] == [Unprintable]
    error = dependent.exception()
    assert isinstance(error, ch.DependencyError)
    assert str(error)
    assert type(error.__cause__) is Unprintable


def test_unprintable_in_the_note_of_a_raising_block() -> None:
    with pytest.raises(LookupError):
        with ch.Runtime(workers=1) as rt:
            ch.wait([rt.submit(unprintable)])
            raise LookupError


def test_recursion_errors(rt_threads: ch.Runtime) -> None:
    def endless(n: int) -> int:
        return endless(n + 1) + 1

    for _ in range(3):
        task = rt_threads.submit(endless, 0)
        assert isinstance(task.exception(), RecursionError)
    assert rt_threads.submit(lambda: "alive").result() == "alive"


def test_stop_iteration(rt_any: ch.Runtime) -> None:
    def body() -> None:
        raise StopIteration("value")

    task = rt_any.submit(body)
    assert isinstance(task.exception(), StopIteration)
    with pytest.raises(StopIteration):
        task.result()
    with pytest.raises((RuntimeError, StopIteration)):
        list(rt_any.map(lambda _: body(), [1]))


def test_memory_error_and_assertion_error(rt_any: ch.Runtime) -> None:
    def raises(error: Exception) -> None:
        raise error

    for error in (MemoryError(), AssertionError("a"), TimeoutError("own"), OSError(2, "no file")):
        assert rt_any.submit(raises, error).exception() is error


def test_an_exception_class_that_takes_arguments(rt_any: ch.Runtime) -> None:
    class Picky(Exception):
        def __init__(self, a: int, *, b: int) -> None:
            super().__init__(f"{a} {b}")

    def body() -> None:
        raise Picky(1, b=2)

    task = rt_any.submit(body)
    assert type(task.exception()) is Picky
    error = rt_any.submit(lambda x: x, task).exception()
    assert error is not None and type(error.__cause__) is Picky


def test_one_exception_raised_by_many_bodies() -> None:
    failure = Boom("shared")

    def body() -> None:
        raise failure

    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=2) as rt:
            tasks = [rt.submit(body) for _ in range(3)]
    assert set(info.value.exceptions) == {failure}
    assert all(task.exception() is failure for task in tasks)


def test_a_body_that_raises_anothers_failure(rt: ch.Runtime) -> None:
    first = rt.submit(boom, "first")
    second = rt.submit(lambda: first.result())
    assert second.exception() is first.exception()


def test_failures_in_many_threads_are_not_mixed_up(rt_threads: ch.Runtime) -> None:
    tasks = [rt_threads.submit(boom, i) for i in range(500)]
    assert [anything(task.exception()).origin for task in tasks] == list(range(500))


def test_a_block_that_raises_keeps_its_exception() -> None:
    failure = LookupError("of the block")
    latch = Latch()
    ran: list[int] = []
    with pytest.raises(LookupError) as info:
        with ch.Runtime(workers=2) as rt:
            failed = rt.submit(boom, "of a task")
            ch.wait([failed])
            pending = ch.spawn(dependencies=[latch.task])(lambda: ran.append(1))
            raise failure
    assert info.value is failure
    assert any("Boom" in note for note in failure.__notes__)
    assert pending.cancelled()
    assert isinstance(failed.exception(), Boom)
    assert ran == []


def test_a_block_that_raises_without_a_failed_task_gets_no_note() -> None:
    failure = LookupError("of the block")
    with pytest.raises(LookupError):
        with ch.Runtime(workers=2) as rt:
            rt.submit(boom).exception()
            raise failure
    assert not getattr(failure, "__notes__", [])


def test_a_block_that_raises_asks_the_running_bodies() -> None:
    with pytest.raises(LookupError):
        with ch.Runtime(workers=2):
            gate = Gate()
            gate.started.wait()
            raise LookupError
    assert gate.asked


def test_base_exceptions_of_the_block() -> None:
    for kind in (SystemExit, KeyboardInterrupt):
        with pytest.raises(kind):
            with ch.Runtime(workers=1) as rt:
                rt.submit(boom)
                raise kind


@pytest.mark.parametrize("workers", COUNTS)
def test_on_failure_hears_of_unread_handles(workers: int) -> None:
    heard: list[Any] = []
    with ch.Runtime(workers=workers, on_failure=heard.append) as rt:
        rt.submit(boom, "dropped")
        read = rt.submit(boom, "read")
        assert isinstance(read.exception(), Boom)
        del read
        rt.submit(lambda: "fine")
        eventually(lambda: heard, "on_failure is called")
    assert [task.exception().origin for task in heard] == ["dropped"]
    assert isinstance(heard[0], ch.Task)


def test_on_failure_when_the_handle_goes_before_the_failure() -> None:
    heard: list[Any] = []
    with ch.Runtime(workers=1, on_failure=heard.append):
        with Gate() as gate:
            ch.spawn("late", dependencies=[gate.task])(lambda: boom("late"))
            gc.collect()
            assert heard == []
        eventually(lambda: heard, "on_failure is called")
    assert [task.name for task in heard] == ["late"]


def test_on_failure_that_raises_harms_nothing() -> None:
    called: list[int] = []

    def raising(task: Any) -> None:
        called.append(1)
        raise ValueError("in on_failure")

    with ch.Runtime(workers=1, on_failure=raising) as rt:
        rt.submit(boom)
        eventually(lambda: called, "on_failure is called")
        assert rt.submit(lambda: 1).result() == 1


def test_on_failure_must_be_callable() -> None:
    with pytest.raises(TypeError):
        with ch.Runtime(workers=1, on_failure=anything(3)):
            pass


def test_warnings_and_hooks_are_silent(
    rt: ch.Runtime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hooked: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", hooked.append)
    monkeypatch.setattr(sys, "unraisablehook", hooked.append)
    assert isinstance(rt.submit(boom).exception(), Boom)
    gc.collect()
    assert hooked == []
    assert capsys.readouterr().err == ""


def test_long_chains_have_no_chain_of_causes(rt: ch.Runtime) -> None:
    task: Any = rt.submit(boom, "root")
    for _ in range(1000):
        task = rt.submit(lambda x: x, task)
    error = task.exception()
    assert isinstance(error, ch.DependencyError)
    assert isinstance(error.__cause__, Boom)
    assert error.__cause__.__cause__ is None


def test_a_block_that_raises_what_takes_no_notes(caplog: pytest.LogCaptureFixture) -> None:
    @dataclasses.dataclass(frozen=True)
    class Frozen(Exception):
        x: int

    def body() -> None:
        raise Frozen(1)

    with ch.Runtime(workers=1) as rt:
        task = rt.submit(body)
        for _ in range(2):
            with pytest.raises(Frozen):
                task.result()
    with pytest.raises(Frozen) as info:
        with ch.Runtime(workers=1) as rt:
            ch.wait([rt.submit(boom)])
            raise Frozen(2)
    assert info.value.x == 2
    assert "tasks failed as well" in caplog.text


def test_texts_that_cannot_be_encoded(rt: ch.Runtime) -> None:
    text = "a\ud800b"

    def body() -> None:
        raise ValueError(text)

    failed = rt.submit(body)
    dependent = rt.submit(lambda x: x, failed)
    error = dependent.exception()
    assert isinstance(error, ch.DependencyError)
    assert error.__cause__ is failed.exception()
    assert str(error) and repr(failed) and repr(dependent)


def test_raising_callbacks_end_neither_worker_nor_caller(rt: ch.Runtime) -> None:
    def callback(task: Any) -> None:
        raise SystemExit("in a callback")

    task = rt.submit(no_op)
    task.add_done_callback(callback)
    task.result()
    assert rt.submit(lambda: "alive").result() == "alive"
    task.add_done_callback(callback)
    assert rt.submit(lambda: "alive").result() == "alive"
