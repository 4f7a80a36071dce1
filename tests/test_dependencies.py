"""Is the order that named dependencies ask for kept, whatever they are made of?"""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
from support import Boom, Latch, anything, boom, names_of, no_op

import charioteer as ch


def test_a_dependent_starts_after_the_end(rt_threads: ch.Runtime) -> None:
    events: list[str] = []
    first = ch.spawn(lambda: events.append("first"))
    ch.spawn(dependencies=[first])(lambda: events.append("second")).result()
    assert events == ["first", "second"]


def forms(tasks: list[Any], space: Any) -> dict[str, Any]:
    """The ways to name three tasks of a space as dependencies."""
    return {
        "list": tasks,
        "tuple": tuple(tasks),
        "set": set(tasks),
        "generator": (task for task in tasks),
        "iterator": iter(tasks),
        "dict keys": dict.fromkeys(tasks).keys(),
        "dense slice": space[0:3],
        "slice in a list": [space[0:3]],
        "space": space,
        "space in a list": [space],
        "touched": space[:],
        "view": space.view[0:3],
        "mixture": [tasks[0], space[1:3], space],
        "nested": [[tasks[0]], (tasks[1], [tasks[2]])],
        "twice the same": [*tasks, *tasks, space],
    }


@pytest.mark.parametrize("form", list(forms([1, 2, 3], ch.TaskSpace())))
def test_forms_of_dependencies(rt: ch.Runtime, form: str) -> None:
    space, ran = ch.TaskSpace("T"), []
    with Latch() as latch:
        tasks = [
            ch.spawn(space[i], dependencies=[latch])(lambda i=i: ran.append(i)) for i in range(3)
        ]
        last = ch.spawn(dependencies=forms(list(tasks), space)[form])(lambda: ran.append("last"))
    last.result()
    assert sorted(ran[:3]) == [0, 1, 2]
    assert ran[3:] == ["last"]


def test_one_task_alone(rt: ch.Runtime) -> None:
    ran: list[str] = []
    with Latch() as latch:
        first = ch.spawn(dependencies=latch)(lambda: ran.append("first"))
        second = ch.spawn(dependencies=first)(lambda: ran.append("second"))
    second.result()
    assert ran == ["first", "second"]


def test_none_at_all(rt_any: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    for nothing in ([], (), iter(()), space[-1], space[:], space, [space[-1], space[2:2]]):
        assert ch.spawn(dependencies=nothing)(lambda: 1).result() == 1


def test_a_space_as_dependency_means_what_is_touched_then(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    with Latch() as latch:
        ch.spawn(space[0])(no_op)
        after = ch.spawn(dependencies=[space])(lambda: "not held up")
        late = ch.spawn(space[1], dependencies=[latch])(no_op)
        assert after.result() == "not held up"
    late.result()


def test_a_dependency_that_ended_long_ago(rt_any: ch.Runtime) -> None:
    first = ch.spawn(lambda: 1)
    first.result()
    assert ch.spawn(dependencies=[first])(lambda x=first: x).result() == 1


def test_spawned_out_of_order(rt_threads: ch.Runtime) -> None:
    space, ran = ch.TaskSpace("T"), []
    for i in reversed(range(50)):
        ch.spawn(space[i], dependencies=[space[i - 1]])(lambda i=i: ran.append(i))
    space[49].result()
    assert ran == list(range(50))


def test_spawned_in_random_order(rt_any: ch.Runtime) -> None:
    space, count = ch.TaskSpace("T"), 300
    chooser = random.Random(7)
    parents = {i: chooser.sample(range(i), min(i, 3)) for i in range(count)}
    order = list(range(count))
    chooser.shuffle(order)
    ended: list[int] = []

    @ch.task
    def body(i: int) -> None:
        missing = set(parents[i]) - set(ended)
        assert not missing
        ended.append(i)

    for i in order:
        body.options(space[i], dependencies=[space[p] for p in parents[i]])(i)
    space.result()
    assert sorted(ended) == list(range(count))


def test_a_diamond(rt_threads: ch.Runtime) -> None:
    a = ch.spawn(lambda: 1)
    b, c = ch.spawn(lambda x=a: x + 1), ch.spawn(lambda x=a: x + 2)
    assert ch.spawn(lambda x=b, y=c: x * y).result() == 6


def test_dependencies_on_tasks_that_bodies_spawn_later(rt_threads: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    last = ch.spawn(dependencies=[space[0:10]])(lambda: "last")

    @ch.spawn
    def spawner() -> None:
        for i in range(10):
            ch.spawn(space[i])(no_op)

    assert last.result() == "last"
    assert all(task.done() for task in space[0:10])
    spawner.result()


def test_dependencies_between_spawning_threads(rt_threads: ch.Runtime) -> None:
    space, count, ran = ch.TaskSpace("T"), 400, []

    def spawner(offset: int) -> None:
        for i in range(offset, count, 4):
            ch.spawn(space[i], dependencies=[space[i - 1]])(lambda i=i: ran.append(i))

    threads = [threading.Thread(target=spawner, args=(k,)) for k in reversed(range(4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    space[count - 1].result()
    assert ran == list(range(count))


def test_arguments_and_names_together(rt: ch.Runtime) -> None:
    ran: list[str] = []
    with Latch() as latch:
        named = ch.spawn(dependencies=[latch])(lambda: ran.append("named"))
        value = ch.spawn(dependencies=[latch])(lambda: ran.append("value") or 5)
        both = ch.spawn(dependencies=[named, anything(value)])(
            lambda x=value: ran.append("both") or x
        )
    assert both.result() == 5
    assert ran[2] == "both"


def test_duplicate_name_is_refused_and_the_first_unharmed(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    with Latch() as latch:
        first = ch.spawn(space[0], dependencies=[latch])(lambda: "first")
        with pytest.raises(ch.DuplicateTaskError, match=r"T\[0\]"):
            ch.spawn(space[0])(lambda: "second")
    assert first.result() == "first"
    with pytest.raises(ch.DuplicateTaskError):
        ch.spawn(space[0])(lambda: "third")
    assert space[0].result() == "first"


def test_an_anonymous_task_is_no_name_for_another(rt: ch.Runtime) -> None:
    task = ch.spawn(lambda: 1)
    with pytest.raises(ch.DuplicateTaskError):
        ch.spawn(task)(no_op)
    assert task.result() == 1


def test_duplicates_from_many_threads_have_one_winner(rt: ch.Runtime) -> None:
    space, ran, refused = ch.TaskSpace("T"), [], []
    meeting = threading.Barrier(4)

    def spawner(k: int) -> None:
        meeting.wait()
        for i in range(100):
            try:
                ch.spawn(space[i])(lambda i=i: ran.append(i))
            except ch.DuplicateTaskError:
                refused.append(i)

    threads = [threading.Thread(target=spawner, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    space.result()
    assert sorted(ran) == list(range(100))
    assert len(refused) == 300


def test_a_cycle_of_one(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    with pytest.raises(ch.CycleError) as info:
        ch.spawn(space[0], dependencies=[space[0]])(no_op)
    assert names_of(info.value.cycle) == {"T[0]"}
    assert "T[0]" in str(info.value)
    ch.spawn(space[0])(no_op)
    space[0].result()


def test_a_cycle_through_an_argument(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    with pytest.raises(ch.CycleError):
        ch.task(lambda x: x).options(space[0])(space[0])
    assert ch.spawn(space[0])(lambda: 1).result() == 1


@pytest.mark.parametrize("length", [2, 3, 100])
def test_longer_cycles_leave_nothing_behind(rt: ch.Runtime, length: int) -> None:
    space, ran = ch.TaskSpace("T"), []
    for i in range(length - 1):
        ch.spawn(space[i], dependencies=[space[i + 1]])(lambda i=i: ran.append(i))
    with pytest.raises(ch.CycleError) as info:
        ch.spawn(space[length - 1], dependencies=[space[0]])(no_op)
    assert names_of(info.value.cycle) == {f"T[{i}]" for i in range(length)}
    assert not any(task.done() for task in space)
    ch.spawn(space[length - 1])(lambda: ran.append(length - 1))
    space.result()
    assert ran == list(reversed(range(length)))


def test_a_cycle_among_several_dependencies(rt: ch.Runtime) -> None:
    space, other = ch.TaskSpace("T"), ch.TaskSpace("U")
    ch.spawn(space[0], dependencies=[space[1], other[0]])(no_op)
    ch.spawn(space[2])(no_op)
    with pytest.raises(ch.CycleError) as info:
        ch.spawn(space[1], dependencies=[other[1], space[2], space[0]])(no_op)
    assert names_of(info.value.cycle) == {"T[0]", "T[1]"}
    ch.spawn(space[1])(no_op)
    ch.spawn(other[0])(no_op)
    assert space[0].result() is None


def test_a_refused_spawn_leaves_no_edge(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    with Latch() as latch:
        with pytest.raises(TypeError):
            ch.spawn(space[0], dependencies=[latch, anything(3)])(no_op)
        assert ch.spawn(space[0])(lambda: 1).result() == 1


def test_dependencies_of_a_failed_task(rt: ch.Runtime) -> None:
    failed = ch.spawn(lambda: boom("root"))
    dependent = ch.spawn(dependencies=[failed])(no_op)
    error = dependent.exception()
    assert isinstance(error, ch.DependencyError)
    assert isinstance(error.__cause__, Boom)
    late = ch.spawn(dependencies=[failed])(no_op)
    assert isinstance(late.exception(), ch.DependencyError)


def test_never_spawned_is_told_at_exit() -> None:
    space = ch.TaskSpace("T")
    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=2):
            dependent = ch.spawn(dependencies=[space[3], space[5]])(no_op)
            further = ch.spawn(lambda x=dependent: x)
            fine = ch.spawn(lambda: "fine")
    (error,) = info.value.exceptions
    assert isinstance(error, ch.UnspawnedDependencyError)
    assert names_of(error.names) == {"T[3]", "T[5]"}
    assert "T[3]" in str(error)
    for task in (dependent, further):
        failure = task.exception()
        assert isinstance(failure, ch.DependencyError)
        assert isinstance(failure.__cause__, ch.UnspawnedDependencyError)
    assert fine.result() == "fine"


def test_never_spawned_inline() -> None:
    space = ch.TaskSpace("T")
    with pytest.raises(ExceptionGroup) as info:
        with ch.Runtime(workers=0):
            ch.spawn(dependencies=[space[3]])(no_op)
    assert isinstance(info.value.exceptions[0], ch.UnspawnedDependencyError)


def test_touched_but_needed_by_nobody_is_no_error() -> None:
    space = ch.TaskSpace("T")
    with ch.Runtime(workers=2):
        ch.spawn(space[0])(no_op)
        space[1:100]


def test_the_dependency_is_spawned_while_the_runtime_closes() -> None:
    space = ch.TaskSpace("T")
    begin = threading.Event()
    with ch.Runtime(workers=2):
        late = ch.spawn(dependencies=[space[0]])(lambda: "ran")

        @ch.spawn
        def spawner() -> None:
            begin.wait()
            ch.spawn(space[0])(no_op)

        threading.Timer(0.05, begin.set).start()
    assert late.result() == "ran"


def test_a_generator_of_dependencies_that_spawns(rt_any: ch.Runtime) -> None:
    space, ran = ch.TaskSpace("T"), []
    last = ch.spawn(dependencies=(ch.spawn(space[i])(lambda i=i: ran.append(i)) for i in range(5)))(
        lambda: sorted(ran)
    )
    assert last.result() == list(range(5))
