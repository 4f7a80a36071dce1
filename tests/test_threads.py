"""Can several threads drive one runtime at once, each with all of its operations?

``make test-ft`` also runs the other modules' tests with several threads each, which share the
runtime of the test's fixture and nothing else (pytest-run-parallel). Here threads share spaces,
functions, tasks and results as well.
"""

from __future__ import annotations

import contextvars
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any

import pytest
from support import Boom, Gate, boom, no_op

import charioteer as ch

THREADS = 6
SOURCES = Path(__file__).parents[1] / "crates/charioteer-python/src"


def together(body: Callable[[int], Any]) -> list[Any]:
    """Call ``body(me)`` in threads that begin at once, and give what each returned.

    Raises:
        BaseException: what the first of them that failed raised.
    """
    results: list[Any] = [None] * THREADS
    failures: list[BaseException] = []
    begin = threading.Barrier(THREADS)

    def run(me: int) -> None:
        try:
            begin.wait(30)
            results[me] = body(me)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(me,)) for me in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


@pytest.fixture
def meeting(num_parallel_threads: int) -> threading.Barrier:
    """What as many threads pass as the plugin says that it runs a test with, or none."""
    return threading.Barrier(num_parallel_threads)


def test_touching_one_index_gives_one_handle(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    touched = together(lambda _: [space[i, i % 7] for i in range(500)])
    assert len(space) == 500
    for handles in zip(*touched, strict=True):
        assert all(handle is handles[0] for handle in handles)
        assert handles[0] in space
    space.cancel()


def test_one_of_many_spawns_takes_a_name(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")

    def spawn(me: int) -> int:
        won = 0
        for i in range(200):
            try:
                ch.spawn(space[i])(lambda me=me: me)
                won += 1
            except ch.DuplicateTaskError:
                pass
        return won

    won = together(spawn)
    assert sum(won) == 200
    counts = Counter(space.result())
    assert [counts[me] for me in range(THREADS)] == won


def test_a_grid_over_threads(rt: ch.Runtime) -> None:
    # Each thread spawns a row, which depends on the rows of others, spawned or not.
    space = ch.TaskSpace("grid")
    size = 40

    def row(me: int) -> None:
        for i in range(me, size, THREADS):
            for j in range(size):
                if i == 0 or j == 0:
                    ch.spawn(space[i, j])(lambda: 1)
                else:
                    above, left = space[i - 1, j], space[i, j - 1]
                    ch.spawn(space[i, j])(lambda a=above, b=left: a + b)

    together(row)
    assert space[size - 1, size - 1].result() == comb(2 * size - 2, size - 1)
    assert len(space) == size * size


def test_one_task_function(rt: ch.Runtime) -> None:
    @ch.task
    def square(x: int, plus: int = 0) -> int:
        return x * x + plus

    space = ch.TaskSpace("squares")

    def call(me: int) -> None:
        mine = [square(i) for i in range(100)]
        more = square.map(range(100), [me] * 100)
        named = [square.options(space[me, i], priority=i)(i, plus=me) for i in range(100)]
        many = ch.spawn_many(square, range(100))
        squares = [i * i for i in range(100)]
        assert ch.gather(mine).result() == many.result() == squares
        assert more.result() == [task.result() for task in named] == [x + me for x in squares]

    together(call)
    assert len(space) == THREADS * 100


def test_one_task_for_all(rt: ch.Runtime) -> None:
    called = threading.Semaphore(0)
    for _ in range(20):
        with Gate() as gate:
            value = ch.spawn(dependencies=[gate.task])(lambda: [1])
            failed = ch.spawn(dependencies=[gate.task])(boom)

            def receive(me: int) -> Any:
                value.add_done_callback(lambda _: called.release())
                future = value.future()
                if me == 0:
                    gate.open()
                done, _ = ch.wait([value, failed])
                assert done == {value, failed}
                assert set(ch.as_completed([value, failed])) == done
                assert isinstance(failed.exception(), Boom)
                with pytest.raises(Boom):
                    failed.result()
                assert future.result() is value.result() is ch.gather([value]).result()[0]
                return value.result()

            results = together(receive)
        assert all(result is results[0] for result in results)
        assert all(called.acquire(timeout=30) for _ in range(THREADS))
    assert not called.acquire(blocking=False)


def test_a_result_goes_from_thread_to_thread(rt: ch.Runtime) -> None:
    # Each takes what another has spawned as an argument of its own, before it may be there.
    space = ch.TaskSpace("ring")
    rounds = 50

    def go(me: int) -> None:
        for i in range(rounds):
            before = space[i - 1, (me + 1) % THREADS] if i else 0
            ch.spawn(space[i, me])(lambda x=before: x + 1)

    together(go)
    assert [space[rounds - 1, me].result() for me in range(THREADS)] == [rounds] * THREADS


def test_cancelling_what_all_have(rt: ch.Runtime) -> None:
    for _ in range(20):
        with Gate() as gate:
            tasks = [ch.spawn(dependencies=[gate.task])(no_op) for _ in range(20)]
            answers = together(lambda _: [task.cancel() for task in tasks])
        assert all(all(answer) for answer in answers)
        assert all(task.cancelled() for task in tasks)


def test_a_group_for_each(rt: ch.Runtime) -> None:
    def group(me: int) -> list[int]:
        with ch.TaskGroup():
            kept = [ch.spawn(lambda i=i: i) for i in range(50)]
        if me % 2:
            with pytest.raises(ExceptionGroup) as caught, ch.TaskGroup():
                ch.spawn(lambda: boom(me))
            assert [leaf.origin for leaf in caught.value.exceptions if isinstance(leaf, Boom)] == [
                me
            ]
        return [task.result() for task in kept]

    assert together(group) == [list(range(50))] * THREADS


def test_clearing_while_others_spawn(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")

    def spawn(me: int) -> None:
        for i in range(200):
            task = ch.spawn(space[me, i])(lambda i=i: i)
            if i % 20 == 0:
                space.clear()
                assert all(str(me) in task.name for task in space.view[me, :])
            assert task.result() == i

    together(spawn)
    space.clear()
    assert len(space) == 0


def test_the_counts_add_up(
    rt: ch.Runtime, meeting: threading.Barrier, num_parallel_threads: int
) -> None:
    before = rt.stats()
    meeting.wait(30)

    def spawn(_: int) -> None:
        seen = 0
        for _ in range(20):
            ch.spawn_many(lambda i: i, range(25)).result()
            stats = rt.stats()
            assert stats["spawned"] >= stats["finished"] >= seen
            seen = stats["finished"]

    together(spawn)
    meeting.wait(30)
    # A task's outcome is there before the task is counted.
    end = time.monotonic() + 30
    while (after := rt.stats())["pending"] and time.monotonic() < end:
        time.sleep(0.001)
    assert after["pending"] == 0
    assert after["spawned"] - before["spawned"] == num_parallel_threads * THREADS * 500


def test_each_has_its_context(rt: ch.Runtime) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")

    def spawn(me: int) -> list[int]:
        variable.set(me)
        return [ch.spawn(variable.get).result() for _ in range(100)]

    assert together(spawn) == [[me] * 100 for me in range(THREADS)]


def test_executors_for_all(rt: ch.Runtime) -> None:
    def use(me: int) -> None:
        assert [*rt.map(lambda i: i + me, range(100))] == [i + me for i in range(100)]
        futures = [rt.executor().submit(pow, i, 2) for i in range(100)]
        assert [future.result() for future in futures] == [i * i for i in range(100)]
        assert rt.submit(divmod, 7, me + 1).result() == divmod(7, me + 1)

    together(use)


# ---- guards --------------------------------------------------------------------------------------


def test_the_threads_of_a_test_meet(rt: ch.Runtime, meeting: threading.Barrier) -> None:
    meeting.wait(30)
    assert ch.spawn(no_op).result() is None


def test_most_tests_with_a_runtime_share_it(rt: ch.Runtime, request: pytest.FixtureRequest) -> None:
    threads = int(request.config.getoption("parallel_threads"))
    shared = request.config.pluginmanager.get_plugin("_run-parallel").run_in_parallel
    given = [item for item in request.session.items if {"rt", "rt2"} & set(item.fixturenames)]
    assert (len(shared) > 0.9 * len(given)) == (threads > 1)
    assert set(shared.values()) <= {threads}


def test_classes_are_frozen() -> None:
    # What a class of the extension holds is set when an object is made. Others would be locked by
    # the interpreter's checks at each use, and threads that share one would be refused.
    classes = [
        (path.name, attribute)
        for path in SOURCES.glob("*.rs")
        for attribute in re.findall(r"\bpyclass\(([^)]*)\)", path.read_text())
    ]
    assert len(classes) >= 12
    assert [found for found in classes if "frozen" not in found[1]] == []
    assert not any(re.search(r"\[pyclass\]", path.read_text()) for path in SOURCES.glob("*.rs"))
