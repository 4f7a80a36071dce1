"""What does a task function do, and how do options reach its tasks?"""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import Any

import pytest
from support import Latch, anything, no_op, worker_counts

import charioteer as ch


@ch.task
def add(a: int, b: int = 10) -> int:
    """Add."""
    return a + b


@ch.task
async def add_later(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


@ch.task(priority=2, name="configured")
def configured() -> str:
    return ch.current().task.name


@ch.task
def fibonacci(n: int) -> int:
    if n < 2:
        return n
    first, second = fibonacci(n - 1), fibonacci(n - 2)
    return first.result() + second.result()


def test_calling_spawns(rt_any: ch.Runtime) -> None:
    task = add(1, 2)
    assert isinstance(task, ch.Task)
    assert task.result() == 3
    assert add(1).result() == 11
    assert add(a=1, b=5).result() == 6
    assert add_later(1, 2).result() == 3


def test_undecorated_body() -> None:
    assert add.fn(1, 2) == 3


def test_looks_like_its_function() -> None:
    assert anything(add).__name__ == "add"
    assert anything(add).__doc__ == "Add."
    assert anything(add).__module__ == __name__
    assert list(inspect.signature(anything(add)).parameters) == ["a", "b"]
    assert "add" in repr(add)


def test_task_name_is_the_functions(rt_any: ch.Runtime) -> None:
    assert "add" in add(1).name


def test_handles_as_arguments(rt_any: ch.Runtime) -> None:
    assert add(anything(add(1, 2)), anything(add(3, 4))).result() == 10


def test_decorator_with_options(rt_any: ch.Runtime) -> None:
    assert configured().result() == "configured"


def test_options_name(rt_any: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    assert add.options(space[1])(1, 1) == space[1]
    assert space[1].result() == 2
    assert add.options("by string")(1, 1).name == "by string"
    assert add.options(name="by keyword")(1, 1).name == "by keyword"


def test_later_options_win(rt_any: ch.Runtime) -> None:
    assert configured.options("later")().result() == "later"
    assert configured.options("sooner").options("later")().result() == "later"
    assert configured.options("sooner").options(priority=3)().result() == "sooner"
    assert configured().result() == "configured"


def test_options_leave_the_function_alone(rt_any: ch.Runtime) -> None:
    changed = add.options("changed")
    assert changed(1).name == "changed"
    assert add(1).name != "changed"
    assert changed.fn is add.fn


def test_options_dependencies(rt: ch.Runtime) -> None:
    ran: list[str] = []

    @ch.task
    def record(word: str) -> None:
        ran.append(word)

    with Latch() as latch:
        later = record.options(dependencies=[latch])("later")
        record("sooner").result()
    later.result()
    assert ran == ["sooner", "later"]


def test_option_names_may_be_parameters(rt_any: ch.Runtime) -> None:
    @ch.task
    def body(name: str, priority: int, timeout: int = 0, **kwargs: Any) -> Any:
        return name, priority, timeout, kwargs

    assert body("n", priority=1, timeout=2, fn=3, self=4).result() == (
        "n",
        1,
        2,
        {"fn": 3, "self": 4},
    )


def test_map_is_one_task_per_tuple(rt_any: ch.Runtime) -> None:
    tasks = add.map([1, 2, 3], [10, 20, 30])
    assert isinstance(tasks, ch.TaskList)
    assert tasks.result() == [11, 22, 33]
    assert add.map(range(3)).result() == [10, 11, 12]


def test_map_stops_with_the_shortest(rt_any: ch.Runtime) -> None:
    assert add.map([1, 2, 3], [10]).result() == [11]
    assert add.map([], [10]).result() == []


def test_map_takes_iterators(rt_any: ch.Runtime) -> None:
    assert add.map(iter([1, 2]), (x for x in (3, 4, 5))).result() == [4, 6]


def test_map_of_an_endless_and_a_short_iterable(rt_any: ch.Runtime) -> None:
    import itertools

    assert add.map(itertools.count(), [1, 2]).result() == [1, 3]


def test_map_replaces_handles(rt_any: ch.Runtime) -> None:
    ones = add.map([1, 2], [0, 0])
    assert add.map(anything(ones), [5, 5]).result() == [6, 7]


def test_map_without_iterables_is_refused(rt: ch.Runtime) -> None:
    with pytest.raises(TypeError):
        add.map()


def test_map_with_options(rt: ch.Runtime) -> None:
    with Latch() as latch:
        tasks = add.options(dependencies=[latch]).map([1, 2])
        assert not any(task.done() for task in tasks)
    assert tasks.result() == [11, 12]


def test_map_of_a_coroutine_function(rt_any: ch.Runtime) -> None:
    assert add_later.map([1, 2], [3, 4]).result() == [4, 6]


def test_recursion(rt_any: ch.Runtime) -> None:
    assert fibonacci(10).result() == 55


def test_recursion_of_a_local_function(rt_any: ch.Runtime) -> None:
    @ch.task
    def countdown(n: int) -> int:
        return 0 if n == 0 else 1 + countdown(n - 1).result()

    assert countdown(10).result() == 10


class Account:
    """A class with task functions for methods."""

    def __init__(self, balance: int) -> None:
        self.balance = balance

    @ch.task
    def plus(self, amount: int) -> int:
        return self.balance + amount

    @ch.task
    @staticmethod
    def thrice(amount: int) -> int:
        return 3 * amount

    @ch.task
    @classmethod
    def label(cls, amount: int) -> str:
        return f"{cls.__name__} of {amount}"

    @staticmethod
    @ch.task
    def twice(amount: int) -> int:
        return 2 * amount


def test_methods(rt_any: ch.Runtime) -> None:
    account = anything(Account(5))
    assert account.plus(3).result() == 8
    assert account.twice(3).result() == 6
    assert anything(Account).plus(account, 4).result() == 9
    assert anything(Account).plus is Account.plus


def test_static_and_class_methods(rt_any: ch.Runtime) -> None:
    for owner in (anything(Account(5)), anything(Account)):
        assert owner.twice(3).result() == 6
        assert owner.thrice(3).result() == 9
        assert owner.label(3).result() == "Account of 3"


@pytest.mark.parametrize("workers", worker_counts(0, 2))
def test_wrong_arguments_are_a_type_error(workers: int) -> None:
    with ch.Runtime(workers=workers):
        for arguments, keywords in (((), {}), ((1, 2, 3), {}), ((1,), {"c": 1})):
            with pytest.raises(TypeError):
                anything(add)(*arguments, **keywords).result()
        assert add(1).result() == 11


def test_made_and_configured_without_a_runtime() -> None:
    made = ch.task(no_op)
    assert made.options("name", priority=1).fn is no_op
    with pytest.raises(ch.NoRuntimeError):
        made()
    with pytest.raises(ch.NoRuntimeError):
        made.map([1])
    with ch.Runtime(workers=1):
        assert made().result() is None


def test_called_from_another_thread(rt: ch.Runtime) -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(add(1, 1).result()))
    thread.start()
    thread.join()
    assert found == [2]


def test_a_task_function_given_to_spawn_runs_its_body(rt_any: ch.Runtime) -> None:
    outer = rt_any.submit(add, 1, 2)
    # Either reading is defensible, a task or its value; an error or a deadlock is not.
    result = outer.result()
    assert (result.result() if isinstance(result, ch.Task) else result) == 3
