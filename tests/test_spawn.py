"""What does spawning do: which bodies, which arguments, which names, from where?"""

from __future__ import annotations

import asyncio
import functools
import itertools
import operator
import threading
from collections import defaultdict, namedtuple
from typing import Any

import pytest
from support import Gate, Latch, anything, no_op, worker_counts

import charioteer as ch


def test_decorator_leaves_the_task_under_the_name(rt_any: ch.Runtime) -> None:
    @ch.spawn
    def answer() -> int:
        return 42

    assert isinstance(answer, ch.Task)
    assert answer.result() == 42
    assert "answer" in answer.name


def test_decorator_with_parentheses(rt_any: ch.Runtime) -> None:
    @ch.spawn()
    def answer() -> int:
        return 42

    assert answer.result() == 42


def test_spawn_called_with_a_function(rt_any: ch.Runtime) -> None:
    assert ch.spawn(lambda: "called").result() == "called"
    assert ch.spawn("named")(lambda: "called").name == "named"


def test_name_first_or_as_a_keyword(rt_any: ch.Runtime) -> None:
    @ch.spawn("first")
    def one() -> None: ...

    @ch.spawn(name="keyword")
    def two() -> None: ...

    assert one.name == "first"
    assert two.name == "keyword"
    ch.wait([one, two])


def test_a_name_that_is_a_string_need_not_be_unique(rt_any: ch.Runtime) -> None:
    tasks = [ch.spawn("same")(lambda i=i: i) for i in range(3)]
    assert [task.result() for task in tasks] == [0, 1, 2]


def test_name_that_is_a_handle(rt_any: ch.Runtime) -> None:
    space = ch.TaskSpace("T")

    @ch.spawn(space[3])
    def body() -> str:
        return "done"

    assert body == space[3]
    assert space[3].result() == "done"
    assert space[3].name == "T[3]"


def test_repr_tells_name_and_state(rt: ch.Runtime) -> None:
    with Latch() as latch:
        task = ch.spawn("potrf", dependencies=[latch])(no_op)
        waiting = repr(task)
    task.result()
    assert "potrf" in waiting
    assert "potrf" in repr(task)
    assert repr(task) != waiting


def test_repr_of_a_handle_that_nobody_spawned() -> None:
    space = ch.TaskSpace("T")
    assert "T[7]" in repr(space[7])


def test_defaults_are_the_arguments(rt_any: ch.Runtime) -> None:
    three = ch.spawn(lambda: 3)

    @ch.spawn
    def body(a: int = 1, b: Any = three, *, c: Any = (three, 4)) -> Any:
        return a, b, c

    assert body.result() == (1, 3, (3, 4))


def test_defaults_are_evaluated_at_the_def(rt: ch.Runtime) -> None:
    with Latch() as latch:
        tasks = []
        for i in range(5):

            @ch.spawn(dependencies=[latch])
            def body(i: int = i) -> int:
                return i

            tasks.append(body)
    assert [task.result() for task in tasks] == list(range(5))


def test_varargs_of_an_inline_task_are_empty(rt_any: ch.Runtime) -> None:
    @ch.spawn
    def body(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    assert body.result() == ((), {})


def test_mutable_default_is_the_very_object(rt_any: ch.Runtime) -> None:
    seen: list[int] = []

    @ch.spawn
    def body(out: list[int] = seen) -> None:
        out.append(1)

    body.result()
    assert seen == [1]


class Callable:
    """A callable object, with a method of each kind."""

    def __init__(self, base: int) -> None:
        self.base = base

    def __call__(self, x: int = 1) -> int:
        return self.base + x

    def method(self, x: int = 2) -> int:
        return self.base + x

    @classmethod
    def of_class(cls, x: int = 3) -> str:
        return f"{cls.__name__}{x}"

    @staticmethod
    def static(x: int = 4) -> int:
        return x


async def coroutine_function(x: int = 5) -> int:
    return x


def plain(x: int = 6) -> int:
    return x


def generator_function() -> Any:
    yield 1


BODIES: list[tuple[str, Any, tuple[Any, ...], Any]] = [
    ("function", plain, (7,), 7),
    ("lambda", lambda x: x * 2, (4,), 8),
    ("bound method", Callable(10).method, (1,), 11),
    ("class method", Callable.of_class, (8,), "Callable8"),
    ("static method", Callable.static, (9,), 9),
    ("callable object", Callable(20), (2,), 22),
    ("partial", functools.partial(pow, 2), (5,), 32),
    ("partial of a method", functools.partial(Callable(1).method, x=5), (), 6),
    ("builtin", len, ([1, 2, 3],), 3),
    ("builtin method", "abc".upper, (), "ABC"),
    ("type", int, ("12",), 12),
    ("own class", Callable, (3,), Callable),
    ("operator", operator.itemgetter(1), ([5, 6],), 6),
    ("cached function", functools.lru_cache(plain), (1,), 1),
    ("coroutine function", coroutine_function, (4,), 4),
    ("partial of a coroutine function", functools.partial(coroutine_function, 3), (), 3),
    ("bound method of a builtin type", [3, 1, 2].index, (1,), 1),
]


@pytest.mark.parametrize(
    ("body", "arguments", "expected"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES]
)
@pytest.mark.parametrize("workers", worker_counts(0, 2))
def test_every_kind_of_body(
    body: Any, arguments: tuple[Any, ...], expected: Any, workers: int
) -> None:
    with ch.Runtime(workers=workers) as rt:
        result = rt.submit(body, *arguments).result()
    assert isinstance(result, expected) if isinstance(expected, type) else result == expected


def test_coroutine_object_as_a_body(rt_any: ch.Runtime) -> None:
    async def body(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    assert rt_any.submit(body(1)).result() == 2
    assert ch.spawn(body(2)).result() == 3
    assert ch.spawn("named")(body(3)).result() == 4


def test_a_generator_function_gives_its_generator(rt: ch.Runtime) -> None:
    assert list(rt.submit(generator_function).result()) == [1]


def test_results_are_the_very_objects(rt_any: ch.Runtime) -> None:
    thing = object()
    assert rt_any.submit(lambda: thing).result() is thing
    assert rt_any.submit(lambda x: x, thing).result() is thing
    assert rt_any.submit(no_op).result() is None
    exception = ValueError("returned, not raised")
    task = rt_any.submit(lambda: exception)
    assert task.result() is exception
    assert task.exception() is None


def test_result_may_be_read_many_times_and_by_many(rt: ch.Runtime) -> None:
    value = ["shared"]
    with Gate() as gate:
        task = rt.submit(lambda: value)
        found: list[Any] = []
        readers = [threading.Thread(target=lambda: found.append(task.result())) for _ in range(8)]
        for reader in readers:
            reader.start()
        gate.open()
        for reader in readers:
            reader.join()
    assert len(found) == 8
    assert all(item is value for item in [*found, task.result(), task.result()])


def test_submit_passes_every_keyword_to_the_body(rt_any: ch.Runtime) -> None:
    keywords: dict[str, Any] = {
        "fn": 1,
        "name": 2,
        "priority": 3,
        "dependencies": 4,
        "timeout": 5,
        "retries": 6,
        "placement": 7,
        "share": 8,
        "args": 9,
        "kwargs": 10,
        "self": 11,
    }
    assert rt_any.submit(lambda *a, **k: (a, k), 0, **keywords).result() == ((0,), keywords)


def test_handles_as_arguments_are_replaced_by_their_results(rt_any: ch.Runtime) -> None:
    two, three = rt_any.submit(lambda: 2), rt_any.submit(lambda: 3)
    assert rt_any.submit(operator.add, two, three).result() == 5
    assert rt_any.submit(lambda a, *, b: a - b, two, b=three).result() == -1
    assert rt_any.submit(sum, [two, three, 1]).result() == 6
    given: Any = {"list": [two, 0], "tuple": (0, three), "dict": {"k": two, "other": "v"}}
    got = rt_any.submit(lambda **k: k, **given).result()
    assert got == {"list": [2, 0], "tuple": (0, 3), "dict": {"k": 2, "other": "v"}}
    assert [type(value) for value in got.values()] == [list, tuple, dict]


def test_the_callers_containers_stay_as_they_are(rt_any: ch.Runtime) -> None:
    two = rt_any.submit(lambda: 2)
    items: list[Any] = [two, 1]
    table: dict[str, Any] = {"k": two}
    assert rt_any.submit(lambda a, b: (a, b), items, table).result() == ([2, 1], {"k": 2})
    assert items == [two, 1]
    assert table == {"k": two}


def test_containers_without_handles_are_passed_as_they_are(rt_any: ch.Runtime) -> None:
    Pair = namedtuple("Pair", "a b")
    for container in ([1, 2], (1, 2), {"k": 1}, defaultdict(list, k=[1]), Pair(1, 2), [], {}, ()):
        assert rt_any.submit(lambda x: x, container).result() is container
    out: list[int] = []
    rt_any.submit(lambda x: x.append(1), out).result()
    assert out == [1]


def test_only_one_level_deep(rt_any: ch.Runtime) -> None:
    two = rt_any.submit(lambda: 2)
    got = rt_any.submit(lambda x: x, [[two]]).result()
    assert got[0][0] is two
    two.result()


def test_one_handle_in_many_places(rt_any: ch.Runtime) -> None:
    two = rt_any.submit(lambda: 2)
    assert rt_any.submit(lambda *a, **k: (a, k), two, two, [two, two], k=two).result() == (
        (2, 2, [2, 2]),
        {"k": 2},
    )


def test_a_task_list_as_an_argument_is_a_list_of_results(rt_any: ch.Runtime) -> None:
    squares = ch.spawn_many(lambda x: x * x, range(5))
    assert rt_any.submit(sum, squares).result() == 30


def test_a_handle_passed_before_it_is_spawned(rt: ch.Runtime) -> None:
    space = ch.TaskSpace()
    total = rt.submit(lambda a, b: a + b, space[0], space[1])
    assert not total.done()
    ch.spawn(space[1])(lambda: 1)
    ch.spawn(space[0])(lambda: 2)
    assert total.result() == 3


def test_a_captured_handle_is_no_dependency(rt: ch.Runtime) -> None:
    with Latch() as latch:
        pending = ch.spawn(dependencies=[latch])(lambda: 1)

        @ch.spawn
        def body() -> tuple[bool, bool]:
            return isinstance(pending, ch.Task), pending.done()

        assert body.result() == (True, False)
    assert pending.result() == 1


def test_results_that_are_handles_stay_handles(rt_any: ch.Runtime) -> None:
    inner = rt_any.submit(lambda: 1)
    outer = rt_any.submit(lambda: inner)
    assert outer.result() is inner
    assert rt_any.submit(lambda x: x, outer).result() is inner


def test_spawn_many(rt_any: ch.Runtime) -> None:
    tasks = ch.spawn_many(lambda x: x * x, range(100))
    assert isinstance(tasks, ch.TaskList)
    assert len(tasks) == 100
    assert tasks.result() == [i * i for i in range(100)]
    assert [task.result() for task in tasks] == tasks.result()
    assert isinstance(tasks[5], ch.Task) and tasks[5].result() == 25
    assert [task.result() for task in tasks[2:4]] == [4, 9]


def test_spawn_many_of_nothing(rt_any: ch.Runtime) -> None:
    tasks = ch.spawn_many(no_op, [])
    assert len(tasks) == 0
    assert tasks.result() == []


def test_spawn_many_takes_any_iterable_and_calls_with_the_item(rt_any: ch.Runtime) -> None:
    assert ch.spawn_many(lambda x: x, (i for i in "abc")).result() == ["a", "b", "c"]
    assert ch.spawn_many(lambda x: x, {"k": 1}).result() == ["k"]
    assert ch.spawn_many(lambda pair: pair, [(1, 2)]).result() == [(1, 2)]
    assert ch.spawn_many(str, [1, 2]).result() == ["1", "2"]


def test_spawn_many_replaces_handles(rt_any: ch.Runtime) -> None:
    handles = [rt_any.submit(lambda i=i: i) for i in range(4)]
    assert ch.spawn_many(lambda x: x + 1, handles).result() == [1, 2, 3, 4]


def test_spawn_many_with_options(rt: ch.Runtime) -> None:
    ran: list[int] = []
    with Latch() as latch:
        tasks = ch.spawn_many(ran.append, range(10), dependencies=[latch], priority=3)
        assert not any(task.done() for task in tasks)
        assert ran == []
    tasks.result()
    assert sorted(ran) == list(range(10))


def test_spawn_many_from_an_iterable_that_raises(rt: ch.Runtime) -> None:
    def items() -> Any:
        yield 1
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        ch.spawn_many(no_op_of, items())
    assert rt.submit(lambda: 1).result() == 1


def no_op_of(item: object) -> None:
    """A body that ignores its item."""


def test_spawn_many_from_an_iterable_that_spawns(rt: ch.Runtime) -> None:
    def items() -> Any:
        for i in range(3):
            yield ch.spawn(lambda i=i: i).result()

    assert ch.spawn_many(lambda x: x, items()).result() == [0, 1, 2]


def test_a_body_may_spawn(rt_any: ch.Runtime) -> None:
    @ch.spawn
    def outer() -> Any:
        @ch.spawn
        def inner() -> str:
            return "inner"

        return inner

    assert outer.result().result() == "inner"


def test_spawning_from_many_threads(rt: ch.Runtime) -> None:
    each, count = 500, 4
    tasks: list[list[Any]] = [[] for _ in range(count)]
    ran: list[tuple[int, int]] = []

    def spawner(k: int) -> None:
        for i in range(each):
            tasks[k].append(rt.submit(lambda k=k, i=i: ran.append((k, i))))

    threads = [threading.Thread(target=spawner, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ch.wait(itertools.chain(*tasks))
    assert sorted(ran) == [(k, i) for k in range(count) for i in range(each)]


def test_every_body_runs_once(rt_threads: ch.Runtime) -> None:
    ran: list[int] = []
    ch.wait([ch.spawn(lambda i=i: ran.append(i)) for i in range(5000)])
    assert sorted(ran) == list(range(5000))


def test_bodies_run_on_worker_threads(rt_threads: ch.Runtime) -> None:
    found: list[threading.Thread] = []
    started = threading.Event()

    def body() -> None:
        found.append(threading.current_thread())
        started.set()

    task = ch.spawn(body)
    started.wait()
    task.result()
    assert found[0] is not threading.main_thread()
    assert "charioteer" in found[0].name.lower()


def test_bodies_run_side_by_side(rt2: ch.Runtime) -> None:
    meeting = threading.Barrier(2)
    tasks = ch.spawn_many(lambda _: meeting.wait(30), range(2))
    assert sorted(tasks.result()) == [0, 1]


def test_handles_are_hashable_and_generic(rt: ch.Runtime) -> None:
    first, second = rt.submit(no_op), rt.submit(no_op)
    assert len({first, second, first}) == 2
    assert first == anything(first) and first != second
    assert ch.Task[int] is not None


def test_handles_cannot_be_made_by_hand() -> None:
    with pytest.raises(TypeError):
        anything(ch.Task)()


def test_options_do_not_reach_the_body(rt_any: ch.Runtime) -> None:
    @ch.spawn("named", priority=4, retries=1, timeout=60, share=1.0, placement=ch.cpu)
    def body(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    assert body.result() == ((), {})
