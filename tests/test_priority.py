"""Is a larger priority sooner, without breaking the order of dependencies?"""

from __future__ import annotations

import random
from typing import Any

import pytest
from support import Gate, Latch

import charioteer as ch


def test_larger_is_sooner(rt1: ch.Runtime) -> None:
    order: list[int] = []
    priorities = list(range(-50, 50))
    random.Random(1).shuffle(priorities)
    with Gate():
        tasks = [ch.spawn(priority=p)(lambda p=p: order.append(p)) for p in priorities]
    ch.wait(tasks)
    assert order == sorted(priorities, reverse=True)


def test_left_out_it_is_zero(rt1: ch.Runtime) -> None:
    order: list[str] = []
    with Gate():
        tasks = [
            ch.spawn(priority=-1)(lambda: order.append("below")),
            ch.spawn(lambda: order.append("plain")),
            ch.spawn(priority=1)(lambda: order.append("above")),
        ]
    ch.wait(tasks)
    assert order == ["above", "plain", "below"]


def test_of_task_functions_and_bulk_spawns(rt1: ch.Runtime) -> None:
    order: list[Any] = []

    @ch.task(priority=5)
    def body(word: str) -> None:
        order.append(word)

    with Gate():
        tasks = [
            *ch.spawn_many(order.append, ["1", "1"], priority=1),
            *body.map(["5", "5"]),
            body.options(priority=9)("9"),
            *body.options(priority=3).map(["3", "3"]),
        ]
    ch.wait(tasks)
    assert order == ["9", "5", "5", "3", "3", "1", "1"]


def test_of_tasks_that_become_ready_together(rt1: ch.Runtime) -> None:
    order: list[int] = []
    with Latch() as latch:
        tasks = [
            ch.spawn(priority=p, dependencies=[latch])(lambda p=p: order.append(p))
            for p in (3, 1, 4, 1, 5, 9, 2, 6)
        ]
        gate = Gate(priority=100)
        gate.started.wait()
    gate.open()
    ch.wait(tasks)
    assert order == sorted(order, reverse=True)


def test_dependencies_come_first(rt1: ch.Runtime) -> None:
    order: list[str] = []
    with Gate():
        first = ch.spawn(priority=-5)(lambda: order.append("first"))
        second = ch.spawn(priority=5, dependencies=[first])(lambda: order.append("second"))
        other = ch.spawn(lambda: order.append("other"))
    ch.wait([second, other])
    assert order == ["other", "first", "second"]


@pytest.mark.parametrize("priority", [0, -(2**31), 2**31 - 1])
def test_extreme_values(rt: ch.Runtime, priority: int) -> None:
    assert ch.spawn(priority=priority)(lambda: 1).result() == 1


def test_the_awaited_task_is_not_held_up(rt1: ch.Runtime) -> None:
    # A low priority does not keep a task from the body that waits for it.
    order: list[str] = []

    @ch.spawn
    def outer() -> None:
        low = ch.spawn(priority=-100)(lambda: order.append("low"))
        low.result()
        order.append("outer")

    outer.result()
    assert order == ["low", "outer"]


def test_inline_keeps_the_order_of_priorities() -> None:
    order: list[int] = []
    with ch.Runtime(workers=0):
        with Latch() as latch:
            tasks = [
                ch.spawn(priority=p, dependencies=[latch])(lambda p=p: order.append(p))
                for p in (3, 1, 2)
            ]
        ch.wait(tasks)
    assert order == [3, 2, 1]
