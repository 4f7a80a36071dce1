"""What does a body see of the variables around it, and what may it not do to them?"""

from __future__ import annotations

import contextvars
import functools
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Latch, anything, no_op, run_script

import charioteer as ch


def test_a_loop_variable_means_what_it_meant(rt: ch.Runtime) -> None:
    with Latch() as latch:
        tasks = []
        for i in range(20):

            @ch.spawn(dependencies=[latch])
            def body() -> int:
                return i

            tasks.append(body)
    assert [task.result() for task in tasks] == list(range(20))


def test_every_way_to_spawn_binds_by_value(rt: ch.Runtime) -> None:
    found: dict[str, list[Any]] = {"submit": [], "task": [], "spawn": [], "many": [], "map": []}
    with Latch() as latch:
        for i in range(5):

            def body(_: Any = None) -> int:
                return i

            function = ch.task(dependencies=[latch])(body)
            found["submit"].append(rt.submit(lambda _: i, latch))
            found["task"].append(function())
            found["spawn"].append(ch.spawn(dependencies=[latch])(lambda: i))
            found["many"].append(ch.spawn_many(body, [0], dependencies=[latch])[0])
            found["map"].append(function.map([0])[0])
        i = 99
    for way, tasks in found.items():
        assert [task.result() for task in tasks] == list(range(5)), way


def test_a_task_function_binds_when_it_is_called(rt: ch.Runtime) -> None:
    x = "at the def"

    @ch.task
    def body() -> str:
        return x

    x = "at the call"
    with Latch() as latch:
        task = body.options(dependencies=[latch])()
        x = "after the call"
    assert task.result() == "at the call"
    assert body().result() == "after the call"
    assert body.fn() == "after the call"


def test_async_bodies_bind_by_value(rt: ch.Runtime) -> None:
    with Latch() as latch:
        tasks = []
        for i in range(5):

            @ch.spawn(dependencies=[latch])
            async def body() -> int:
                return i

            tasks.append(body)
    assert [task.result() for task in tasks] == list(range(5))


def test_variables_of_several_levels(rt: ch.Runtime) -> None:
    a = 1

    def outer() -> Any:
        b = 2

        def middle() -> Any:
            c = 3
            with Latch() as latch:
                task = ch.spawn(dependencies=[latch])(lambda: (a, b, c))
                c = 30
            return task

        task = middle()
        b = 20
        return task

    task = outer()
    a = 10
    assert task.result() == (1, 2, 3)


def test_the_object_is_shared_though_the_name_is_bound(rt: ch.Runtime) -> None:
    out: list[int] = []
    with Latch() as latch:
        task = ch.spawn(dependencies=[latch])(lambda: out.append(len(out)))
        out.append(-1)
        kept, out = out, []
    task.result()
    assert kept == [-1, 1]
    assert out == []


def test_spawning_leaves_the_function_itself_alone(rt: ch.Runtime) -> None:
    x = 1

    def body() -> int:
        return x

    rt.submit(body).result()
    x = 2
    assert body() == 2
    assert rt.submit(body).result() == 2
    assert anything(body).__closure__[0].cell_contents == 2


def test_functions_that_the_body_calls_keep_their_own_variables(rt: ch.Runtime) -> None:
    x = 1

    def helper() -> int:
        return x

    with Latch() as latch:
        task = ch.spawn(dependencies=[latch])(lambda: helper())
        x = 2
    assert task.result() == 2


def test_defaults_keywords_and_attributes_survive_the_binding(rt: ch.Runtime) -> None:
    x = 5

    def body(a: int = 1, *rest: int, b: int = 2, **more: int) -> Any:
        return x, a, rest, b, more

    anything(body).marker = "kept"
    assert rt.submit(body, 3, 4, b=6, c=7).result() == (5, 3, (4,), 6, {"c": 7})
    assert anything(body).marker == "kept"


def test_super_in_a_method(rt: ch.Runtime) -> None:
    class Base:
        def name(self) -> str:
            return "base"

    class Derived(Base):
        def name(self) -> str:
            return "derived of " + super().name()

    assert rt.submit(Derived().name).result() == "derived of base"


def test_a_variable_without_a_value_yet(rt: ch.Runtime) -> None:
    with Latch() as latch:
        task = ch.spawn(dependencies=[latch])(lambda: unset)
    with pytest.raises(NameError):
        task.result()
    if task is None:
        unset = 1


def test_a_body_that_never_reads_an_unset_variable(rt: ch.Runtime) -> None:
    def body(read: bool) -> Any:
        return unset if read else "not read"

    assert rt.submit(body, False).result() == "not read"
    if body is None:
        unset = 1


def test_a_body_that_assigns_a_captured_name_is_refused(rt: ch.Runtime) -> None:
    count = 0

    def body() -> None:
        nonlocal count
        count += 1

    for spawn in (
        lambda: rt.submit(body),
        lambda: ch.spawn(body),
        lambda: ch.spawn("named")(body),
        lambda: ch.task(body)(),
        lambda: ch.spawn_many(body, [()]),
        lambda: list(rt.map(body, [()])),
        lambda: rt.submit(rt.submit, body).result(),
    ):
        with pytest.raises(ch.CaptureError) as info:
            anything(spawn)()
        assert "count" in str(info.value)
    assert isinstance(info.value, ch.AccessError)
    assert isinstance(info.value, TypeError)
    assert count == 0
    assert rt.submit(lambda: count).result() == 0


def test_assigning_in_a_function_inside_the_body_is_refused(rt: ch.Runtime) -> None:
    count = 0

    def body() -> None:
        def inner() -> None:
            nonlocal count
            count += 1

        inner()

    with pytest.raises(ch.CaptureError, match="count"):
        rt.submit(body).result()
    assert count == 0


def test_deleting_a_captured_name_is_refused(rt: ch.Runtime) -> None:
    count = 0

    def body() -> None:
        nonlocal count
        del count

    with pytest.raises(ch.CaptureError, match="count"):
        rt.submit(body).result()
    assert count == 0


def test_an_async_body_that_assigns_is_refused(rt: ch.Runtime) -> None:
    count = 0

    async def body() -> None:
        nonlocal count
        count += 1

    with pytest.raises(ch.CaptureError, match="count"):
        rt.submit(body)
    assert count == 0


def test_a_refused_name_stays_free(rt: ch.Runtime) -> None:
    space, count = ch.TaskSpace("T"), 0

    def body() -> None:
        nonlocal count
        count += 1

    with pytest.raises(ch.CaptureError):
        ch.spawn(space[0])(body)
    assert ch.spawn(space[0])(lambda: count).result() == 0


def test_variables_of_the_body_itself_may_be_assigned(rt_any: ch.Runtime) -> None:
    start = 1

    @ch.spawn
    def body() -> int:
        total = start

        def inner() -> None:
            nonlocal total
            total += 1

        inner()
        inner()
        return total

    assert body.result() == 3


def test_comprehensions_and_inner_functions_see_the_bound_values(rt: ch.Runtime) -> None:
    with Latch() as latch:
        tasks = []
        for i in range(3):

            @ch.spawn(dependencies=[latch])
            def body() -> Any:
                def inner() -> int:
                    return i * 10

                return [i + k for k in range(2)], inner(), (lambda: i)()

            tasks.append(body)
    assert [task.result() for task in tasks] == [([i, i + 1], i * 10, i) for i in range(3)]


def test_globals_may_be_assigned(rt: ch.Runtime) -> None:
    @ch.spawn
    def body() -> None:
        global _ASSIGNED
        _ASSIGNED = "by a body"

    body.result()
    assert _ASSIGNED == "by a body"


_ASSIGNED = "before"


def test_no_warning_inside_functions(rt: ch.Runtime) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ch.CaptureWarning)
        with Latch() as latch:
            tasks = [ch.spawn(dependencies=[latch])(lambda: i) for i in range(3)]
        assert [task.result() for task in tasks] == [0, 1, 2]


MODULE_LEVEL = """
with ch.Runtime(workers={workers}):
    gate = ch.TaskSpace("gate")
    tasks = []
    for i in range(3):
        @ch.spawn(dependencies=[gate[0]])
        def body({parameter}):
            return i
        tasks.append(body)
    ch.spawn(gate[0])(lambda: None)
    say(*[task.result() for task in tasks])
"""


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_rebound_module_variables_are_warned_about(tmp_path: Path, workers: int) -> None:
    done = run_script(MODULE_LEVEL.format(workers=workers, parameter=""), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2", "2"]
    assert "CaptureWarning" in done.stderr
    assert "i=i" in done.stderr
    assert "script.py" in done.stderr


def test_the_cure_works_and_silences(tmp_path: Path) -> None:
    done = run_script(MODULE_LEVEL.format(workers=2, parameter="i=i"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1", "2"]
    assert "CaptureWarning" not in done.stderr


def test_module_variables_that_stay_are_no_cause_for_a_warning(tmp_path: Path) -> None:
    done = run_script(
        """
        import math
        constant = 5
        def helper(x):
            return x + constant
        counter = []
        with ch.Runtime(workers=2):
            tasks = []
            for i in range(3):
                @ch.spawn
                def body(i=i):
                    counter.append(i)
                    return helper(i) + math.floor(1.5)
                tasks.append(body)
            say(*[task.result() for task in tasks])
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "7", "8"]
    assert "CaptureWarning" not in done.stderr


def test_a_task_function_at_module_level_warns_too(tmp_path: Path) -> None:
    done = run_script(
        """
        scale = 1
        @ch.task
        def body(x):
            return x * scale
        with ch.Runtime(workers=1):
            gate = ch.TaskSpace("gate")
            task = body.options(dependencies=[gate[0]])(3)
            scale = 10
            ch.spawn(gate[0])(lambda: None)
            say(task.result())
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["30"]
    assert "CaptureWarning" in done.stderr
    assert "scale" in done.stderr


def test_contextvars_are_those_of_the_spawn(rt_threads: ch.Runtime) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    with Latch() as latch:
        tasks = []
        for word in ("one", "two"):
            variable.set(word)
            tasks.append(ch.spawn(dependencies=[latch])(variable.get))
        variable.set("later")
    assert [task.result() for task in tasks] == ["one", "two"]


def test_contextvars_set_in_a_body_stay_there(rt_any: ch.Runtime) -> None:
    variable = contextvars.ContextVar("variable", default="unset")

    def body(word: str) -> Any:
        before = variable.get()
        variable.set(word)
        inner = ch.spawn(variable.get)
        return before, inner.result()

    assert rt_any.submit(body, "first").result() == ("unset", "first")
    assert rt_any.submit(body, "second").result() == ("unset", "second")
    assert variable.get() == "unset"


def test_contextvars_of_threads_differ(rt: ch.Runtime) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    found: dict[str, Any] = {}

    def spawner(word: str) -> None:
        variable.set(word)
        found[word] = rt.submit(variable.get)

    threads = [threading.Thread(target=spawner, args=(word,)) for word in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {word: task.result() for word, task in found.items()} == {w: w for w in "abc"}


def test_contextvars_in_a_nested_wait(rt1: ch.Runtime) -> None:
    variable = contextvars.ContextVar("variable", default="unset")

    @ch.task
    def inner() -> Any:
        before = variable.get()
        variable.set("inner's")
        return before

    @ch.spawn
    def outer() -> Any:
        variable.set("outer's")
        seen = inner().result()
        return seen, variable.get()

    assert outer.result() == ("outer's", "outer's")


def test_bodies_without_closures_are_unharmed(rt_any: ch.Runtime) -> None:
    assert rt_any.submit(no_op).result() is None
    assert rt_any.submit(eval, "1 + 1").result() == 2


def test_partials_bind_by_value_too(rt: ch.Runtime) -> None:
    with Latch() as latch:
        tasks = [
            ch.spawn(dependencies=[latch])(functools.partial(lambda x: (i, x), "x"))
            for i in range(3)
        ]
    assert [task.result() for task in tasks] == [(0, "x"), (1, "x"), (2, "x")]


def test_one_call_for_many_tasks_binds_what_it_captures_once(rt: ch.Runtime) -> None:
    factor = 2

    def items() -> Iterator[int]:
        nonlocal factor
        for item in range(50):
            factor = 100 + item
            yield item

    def body(item: int) -> int:
        return item * factor

    first = ch.spawn_many(body, items())
    # `items` has left its last value behind.
    second = ch.task(body).map(range(50))
    assert first.result() == [item * 2 for item in range(50)]
    assert second.result() == [item * 149 for item in range(50)]
