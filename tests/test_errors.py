"""Does every bad input get its named error where it was given, with nothing lost?"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support import anything, check_alive, leaves, no_op, worker_counts

import charioteer as ch

spawn: Any = ch.spawn
BAD: dict[str, tuple[Callable[[ch.Runtime], Any], tuple[type[BaseException], ...]]] = {}


def bad(*errors: type[BaseException]) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Enter a wrong call and the errors that say so."""

    def enter(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        BAD[call.__name__] = (call, errors)
        return call

    return enter


@bad(TypeError)
def body_not_callable_submit(rt: Any) -> Any:
    return rt.submit(3)


@bad(TypeError)
def body_not_callable_spawn(rt: Any) -> Any:
    return spawn("name")(3)


@bad(TypeError)
def body_is_none(rt: Any) -> Any:
    return rt.submit(None)


@bad(TypeError)
def body_missing(rt: Any) -> Any:
    return rt.submit()


@bad(TypeError)
def body_not_callable_task(rt: Any) -> Any:
    return anything(ch.task)(3)


@bad(TypeError)
def body_not_callable_many(rt: Any) -> Any:
    return ch.spawn_many(anything(3), [1])


@bad(TypeError)
def body_not_callable_map(rt: Any) -> Any:
    return list(rt.map(3, [1]))


@bad(TypeError)
def many_of_no_iterable(rt: Any) -> Any:
    return ch.spawn_many(no_op, anything(3))


@bad(TypeError)
def map_of_no_iterable(rt: Any) -> Any:
    return list(rt.map(no_op, 3))


@bad(TypeError)
def spawn_of_a_number(rt: Any) -> Any:
    return spawn(3)(no_op)


@bad(TypeError)
def unknown_option(rt: Any) -> Any:
    return spawn("name", prioritty=3)(no_op)


@bad(TypeError)
def unknown_option_of_a_task_function(rt: Any) -> Any:
    return anything(ch.task(no_op)).options(depend=[1])()


@bad(TypeError)
def unknown_option_of_the_decorator(rt: Any) -> Any:
    return anything(ch.task)(prioritty=1)(no_op)()


@bad(TypeError)
def unknown_option_of_many(rt: Any) -> Any:
    return anything(ch.spawn_many)(no_op, [1], prioritty=1)


@bad(TypeError)
def name_is_a_number(rt: Any) -> Any:
    return spawn(name=3)(no_op)


@bad(TypeError)
def name_is_a_list_of_tasks(rt: Any) -> Any:
    return spawn(ch.TaskSpace("T")[0:2])(no_op)


@bad(TypeError)
def name_is_a_space(rt: Any) -> Any:
    return spawn(ch.TaskSpace("T"))(no_op)


@bad(TypeError, IndexError)
def name_below_the_lower_bound(rt: Any) -> Any:
    return spawn(ch.TaskSpace("T")[-1])(no_op)


@bad(ch.DuplicateTaskError)
def name_twice(rt: Any) -> Any:
    space = ch.TaskSpace("T")
    spawn(space[0])(no_op)
    return spawn(space[0])(no_op)


@bad(TypeError)
def name_and_name(rt: Any) -> Any:
    return spawn("one", name="two")(no_op)


@bad(TypeError)
def dependency_is_a_number(rt: Any) -> Any:
    return spawn(dependencies=3)(no_op)


@bad(TypeError)
def dependency_is_a_list_of_numbers(rt: Any) -> Any:
    return spawn(dependencies=[3])(no_op)


@bad(TypeError)
def dependency_is_a_string(rt: Any) -> Any:
    return spawn(dependencies="T[0]")(no_op)


@bad(TypeError)
def dependency_is_an_object(rt: Any) -> Any:
    return spawn(dependencies=[object()])(no_op)


@bad(TypeError)
def dependency_is_a_task_function(rt: Any) -> Any:
    return spawn(dependencies=[ch.task(no_op)])(no_op)


@bad(TypeError)
def dependency_is_a_foreign_future(rt: Any) -> Any:
    return spawn(dependencies=[concurrent.futures.Future()])(no_op)


@bad(TypeError)
def dependency_in_a_list_with_good_ones(rt: Any) -> Any:
    return spawn(dependencies=[rt.submit(no_op), None, 3])(no_op)


@bad(LookupError)
def dependencies_from_a_generator_that_raises(rt: Any) -> Any:
    def dependencies() -> Any:
        yield rt.submit(no_op)
        raise LookupError("from the generator")

    return spawn(dependencies=dependencies())(no_op)


@bad(ch.CycleError)
def dependency_on_itself(rt: Any) -> Any:
    space = ch.TaskSpace("T")
    return spawn(space[0], dependencies=[space[0]])(no_op)


@bad(TypeError)
def priority_is_a_string(rt: Any) -> Any:
    return spawn(priority="high")(no_op)


@bad(TypeError)
def priority_is_a_float(rt: Any) -> Any:
    return spawn(priority=1.5)(no_op)


@bad(OverflowError, ValueError)
def priority_is_too_large(rt: Any) -> Any:
    return spawn(priority=2**100)(no_op)


@bad(TypeError)
def retries_is_a_string(rt: Any) -> Any:
    return spawn(retries="3")(no_op)


@bad(ValueError, OverflowError)
def retries_is_negative(rt: Any) -> Any:
    return spawn(retries=-1)(no_op)


@bad(TypeError)
def timeout_is_a_string(rt: Any) -> Any:
    return spawn(timeout="1s")(no_op)


@bad(ValueError)
def timeout_is_negative(rt: Any) -> Any:
    return spawn(timeout=-1)(no_op)


@bad(ValueError)
def timeout_is_no_number(rt: Any) -> Any:
    return spawn(timeout=float("nan"))(no_op)


@bad(TypeError)
def result_with_a_timeout_of_a_string(rt: Any) -> Any:
    return rt.submit(no_op).result(timeout="1s")


@bad(ValueError)
def result_with_a_timeout_that_is_no_number(rt: Any) -> Any:
    return ch.TaskSpace("T")[0].result(timeout=float("nan"))


@bad(TypeError)
def parameter_without_a_default(rt: Any) -> Any:
    @ch.spawn
    def body(x: int) -> int:
        return x

    return body.result()


@bad(TypeError)
def positional_only_without_a_default(rt: Any) -> Any:
    return spawn(lambda x, /: x).result()


@bad(TypeError)
def too_many_arguments(rt: Any) -> Any:
    return rt.submit(no_op, 1).result()


@bad(TypeError)
def unexpected_keyword(rt: Any) -> Any:
    return rt.submit(no_op, x=1).result()


@bad(ch.CaptureError)
def assigns_a_captured_name(rt: Any) -> Any:
    count = 0

    def body() -> None:
        nonlocal count
        count += 1

    return rt.submit(body)


@bad(ch.RuntimeActiveError)
def second_runtime(rt: Any) -> Any:
    with ch.Runtime(workers=1):
        pass


@bad(ch.RuntimeActiveError)
def second_runtime_in_a_body(rt: Any) -> Any:
    return rt.submit(lambda: second_runtime(rt)).result()


@bad(RuntimeError)
def close_in_a_body(rt: Any) -> Any:
    return rt.submit(rt.close).result()


@bad(RuntimeError)
def current_outside_a_task(rt: Any) -> Any:
    return ch.current()


@bad(RuntimeError)
def current_in_a_thread_of_a_body(rt: Any) -> Any:
    found: list[BaseException] = []

    def elsewhere() -> None:
        try:
            ch.current()
        except BaseException as error:
            found.append(error)

    def body() -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    rt.submit(body).result()
    raise found[0]


@bad(TypeError)
def coroutine_function_is_no_dependency(rt: Any) -> Any:
    async def body() -> None: ...

    return spawn(dependencies=[body])(no_op)


@bad(TypeError)
def callback_is_not_callable(rt: Any) -> Any:
    return rt.submit(no_op).add_done_callback(None)


@bad(TypeError)
def wait_on_a_number(rt: Any) -> Any:
    return ch.wait(anything(3))


@bad(TypeError)
def gather_a_number(rt: Any) -> Any:
    return ch.gather(anything(3))


@bad(TypeError)
def unbound_option_values(rt: Any) -> Any:
    return anything(ch.task(no_op)).options(1, 2)


@pytest.mark.parametrize("workers", worker_counts(0, 2))
@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(case: str, workers: int) -> None:
    call, errors = BAD[case]
    with ch.Runtime(workers=workers) as rt:
        kept = rt.submit(lambda: "kept")
        with pytest.raises(errors) as info:
            call(rt)
        assert str(info.value)
        check_alive()
        assert kept.result() == "kept"


def test_the_table_of_bad_input_is_not_empty() -> None:
    assert len(BAD) > 50


def test_a_class_body_error_leaves_the_name_free(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    wrong: list[dict[str, Any]] = [
        {"dependencies": [3]},
        {"priority": "x"},
        {"retries": -1},
        {"timeout": -1},
        {"share": -1},
        {"placement": ch.cpu * 999},
        {"unknown": 1},
    ]
    for options in wrong:
        with pytest.raises((TypeError, ValueError)):
            spawn(space[0], **options)(no_op)
    assert spawn(space[0])(lambda: 1).result() == 1


def test_no_runtime() -> None:
    function = ch.task(no_op)
    space = ch.TaskSpace("T")
    for call in (
        lambda: ch.spawn(no_op),
        lambda: ch.spawn("name")(no_op),
        lambda: ch.spawn(space[0])(no_op),
        function,
        lambda: function.options("name")(),
        lambda: ch.spawn_many(no_op, [1]),
        lambda: function.map([1]),
    ):
        with pytest.raises(ch.NoRuntimeError) as info:
            anything(call)()
        assert isinstance(info.value, RuntimeError)
        assert "Runtime" in str(info.value)
    with ch.Runtime(workers=1):
        assert ch.spawn(space[0])(lambda: 1).result() == 1


def test_current_without_a_runtime() -> None:
    with pytest.raises(RuntimeError) as info:
        ch.current()
    assert isinstance(info.value, ch.CharioteerError)


FAMILY: list[tuple[str, type[BaseException]]] = [
    ("PlacementError", ValueError),
    ("DuplicateTaskError", ValueError),
    ("CycleError", ValueError),
    ("UnspawnedDependencyError", RuntimeError),
    ("DependencyError", RuntimeError),
    ("AccessError", TypeError),
    ("CaptureError", TypeError),
    ("TaskTimeoutError", TimeoutError),
    ("NoRuntimeError", RuntimeError),
    ("RuntimeActiveError", RuntimeError),
    ("WorkerLimitError", RuntimeError),
    ("CancelledError", concurrent.futures.CancelledError),
]


@pytest.mark.parametrize(("name", "builtin"), FAMILY)
def test_the_family_of_errors(name: str, builtin: type[BaseException]) -> None:
    error = getattr(ch, name)
    assert issubclass(error, ch.CharioteerError)
    assert issubclass(error, builtin)
    assert error.__module__.startswith("charioteer")
    assert error.__doc__
    assert issubclass(ch.CharioteerError, Exception)


def test_the_warning_is_a_user_warning() -> None:
    assert issubclass(ch.CaptureWarning, UserWarning)


def test_errors_survive_pickling() -> None:
    import copy
    import pickle

    space = ch.TaskSpace("T")
    with ch.Runtime(workers=1):
        with pytest.raises(ch.CycleError) as cycle:
            spawn(space[0], dependencies=[space[0]])(no_op)
        spawn(space[0])(no_op)
    assert str(pickle.loads(pickle.dumps(cycle.value))) == str(cycle.value)
    assert str(copy.copy(cycle.value)) == str(cycle.value)
    with pytest.raises(ExceptionGroup) as group:
        with ch.Runtime(workers=1):
            spawn(dependencies=[space[9]])(no_op)
    (error,) = leaves(group.value)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
