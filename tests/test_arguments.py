"""Handles among the arguments: which are replaced, when they are looked at, and what stays.

A handle, a list of tasks and a space stand for their results, also in a list, tuple or dictionary
one level deep. What holds no handle reaches the body as the caller's own object.
"""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
from support import Gate

import charioteer as ch


def same(*things: Any) -> Any:
    return things[0] if len(things) == 1 else things


def squares(count: int = 3) -> ch.TaskSpace:
    space = ch.TaskSpace("squares")
    for i in range(count):
        ch.task(lambda n: n * n).options(space[i])(i)
    return space


def test_a_space_as_an_argument_is_its_results(rt_any: ch.Runtime) -> None:
    space = squares()
    assert rt_any.submit(same, space).result() == [0, 1, 4]
    assert rt_any.submit(lambda *, k: k, k=space).result() == [0, 1, 4]
    assert ch.task(same).map([space]).result() == [[0, 1, 4]]

    @ch.spawn
    def inline(space: Any = space) -> Any:
        return space

    assert inline.result() == [0, 1, 4]


def test_a_body_waits_for_the_space_that_it_is_given(rt2: ch.Runtime) -> None:
    gate = Gate()
    space = ch.TaskSpace("late")

    ch.spawn(space[0], dependencies=gate.task)(lambda: 1)
    user = rt2.submit(same, space)
    assert not user.done()
    gate.open()
    assert user.result() == [1]


def test_the_tasks_of_a_space_are_those_of_the_spawn(rt2: ch.Runtime) -> None:
    gate = Gate()
    space = ch.TaskSpace("T")

    ch.spawn(space[0], dependencies=gate.task)(lambda: 1)
    user = rt2.submit(same, space, [space])
    ch.spawn(space[1])(lambda: 2)
    gate.open()
    assert user.result() == ([1], [[1]])


def test_lists_and_spaces_one_level_deep_are_their_results(rt_any: ch.Runtime) -> None:
    space = squares()
    tasks = ch.task(same).map([7, 8])
    given: Any = {"list": [tasks, 0], "tuple": (space, 1), "dict": {"a": space[:], "b": tasks[0]}}
    got = rt_any.submit(lambda **k: k, **given).result()
    assert got == {
        "list": [[7, 8], 0],
        "tuple": ([0, 1, 4], 1),
        "dict": {"a": [0, 1, 4], "b": 7},
    }
    assert given["list"][0] is tasks and given["tuple"][0] is space


def test_empty_spaces_and_lists_are_empty_lists(rt_any: ch.Runtime) -> None:
    empty = ch.TaskSpace("empty")
    assert rt_any.submit(same, empty, [empty], empty[:]).result() == ([], [[]], [])


def test_containers_without_handles_stay_themselves_beside_handles(rt_any: ch.Runtime) -> None:
    one = rt_any.submit(lambda: 1)
    out: list[int] = []
    table: dict[str, int] = {}

    def body(value: Any, out: list[int], table: dict[str, int]) -> None:
        out.append(value)
        table["value"] = value

    rt_any.submit(body, one, out, table).result()
    assert out == [1] and table == {"value": 1}


def test_a_container_that_changes_after_the_spawn(rt2: ch.Runtime) -> None:
    gate = Gate()

    blocker = ch.spawn(dependencies=gate.task)(lambda: 1)
    unspawned = ch.TaskSpace("unspawned")
    held: list[Any] = [blocker]
    plain: list[Any] = []
    table: dict[str, Any] = {"k": blocker}
    user = rt2.submit(same, held, plain, table)
    held.append(unspawned[0])
    plain.append(unspawned[0])
    table["other"] = unspawned[0]
    gate.open()
    first, second, third = user.result()
    assert first == [1] and third == {"k": 1}
    assert second is plain
    ch.spawn(unspawned[0])(lambda: 0).result()


def test_retries_get_fresh_containers(rt_any: ch.Runtime) -> None:
    one = rt_any.submit(lambda: 1)
    seen: list[list[int]] = []

    def body(items: list[int]) -> None:
        seen.append(list(items))
        items.append(0)
        if len(seen) < 3:
            raise OSError

    ch.task(body, retries=2)([one]).result()
    assert seen == [[1]] * 3


def test_a_space_that_a_body_captures_is_itself(rt_any: ch.Runtime) -> None:
    space = squares()
    assert rt_any.submit(lambda: space).result() is space
    space.result()


def test_a_refused_coroutine_object_does_not_warn(rt_any: ch.Runtime) -> None:
    async def body() -> None:
        raise AssertionError("the body of a refused coroutine ran")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(TypeError, match="runs once"):
            ch.spawn(body(), retries=1)
        gc.collect()
    assert not caught
