"""How does a task space name, find, bound and forget tasks?"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Boom, Gate, Latch, anything, boom, eventually, names_of, no_op

import charioteer as ch


def names(tasks: Iterable[Any]) -> list[str]:
    """The tasks' names without blanks, in order."""
    return [task.name.replace(" ", "") for task in tasks]


def test_an_index_is_always_the_same_handle() -> None:
    line, plane = ch.TaskSpace("T"), ch.TaskSpace("T")
    assert line[3] is line[3]
    assert line[3] is line[numpy.int64(3)]
    assert plane[1, 2] is plane[1, 2]
    assert plane[1, 2] != plane[2, 1]
    assert isinstance(line[0], ch.Task)


def test_the_number_of_dimensions_is_that_of_the_first_index() -> None:
    space = ch.TaskSpace("T")
    space[1, 2]
    for index in (1, (1, 2, 3), slice(0, 3)):
        with pytest.raises(IndexError):
            space[index]


def test_identity_is_the_space_and_not_its_name() -> None:
    assert ch.TaskSpace("T")[0] != ch.TaskSpace("T")[0]


def test_names_of_handles() -> None:
    space = ch.TaskSpace("T")
    assert space[3].name == "T[3]"
    assert ch.TaskSpace("T")[1, 2].name.replace(" ", "") == "T[1,2]"
    assert "T" in repr(space)
    assert ch.TaskSpace()[4].name.endswith("[4]")


def test_handles_work_before_they_are_spawned(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    assert not space[0].done()
    assert not space[0].running()
    assert not space[0].cancelled()
    with pytest.raises(TimeoutError):
        space[0].result(timeout=0.01)
    seen: list[Any] = []
    space[0].add_done_callback(seen.append)
    ch.spawn(space[0])(lambda: 1)
    assert space[0].result() == 1
    eventually(lambda: seen == [space[0]], "the callback added before the spawn runs")


def test_a_slice_with_bounds_is_dense() -> None:
    space = ch.TaskSpace("T")
    assert names(space[2:5]) == ["T[2]", "T[3]", "T[4]"]
    assert names(space[:3]) == ["T[0]", "T[1]", "T[2]"]
    assert names(space[0:7:3]) == ["T[0]", "T[3]", "T[6]"]
    assert names(space[2:2]) == []
    assert names(space[5:2]) == []
    assert space[2:5][0] == space[2]


def test_dense_slices_of_more_dimensions() -> None:
    space = ch.TaskSpace("T")
    assert names(space[1, 0:2]) == ["T[1,0]", "T[1,1]"]
    assert names(space[0:2, 3]) == ["T[0,3]", "T[1,3]"]
    assert names(space[0:2, 0:2]) == ["T[0,0]", "T[0,1]", "T[1,0]", "T[1,1]"]


def test_below_the_lower_bound_is_empty() -> None:
    space = ch.TaskSpace("T")
    for below in (space[-1], space[-1, 0], space[0, -1], space[-3:0]):
        assert isinstance(below, ch.TaskList)
        assert len(below) == 0
    assert names(space[-2:2]) == ["T[0]", "T[1]"]


def test_start_moves_the_lower_bound() -> None:
    space = ch.TaskSpace("T", start=1)
    assert len(anything(space[0])) == 0
    assert space[1].name == "T[1]"
    assert names(space[:3]) == ["T[1]", "T[2]"]
    assert names(space[-5:2]) == ["T[1]"]


def test_shape_bounds_above() -> None:
    space = ch.TaskSpace("T", shape=(2, 3))
    assert names(space[1, :]) == ["T[1,0]", "T[1,1]", "T[1,2]"]
    assert len(space[-1, 2]) == 0
    for index in ((2, 0), (0, 3), (5, 5)):
        with pytest.raises(IndexError):
            space[index]
    line = ch.TaskSpace("L", shape=3)
    assert names(line[1:3]) == ["L[1]", "L[2]"]
    with pytest.raises(IndexError):
        line[3]


def test_a_list_or_a_range_names_each() -> None:
    space = ch.TaskSpace("T")
    assert names(space[[4, 1, 4, -2, 0]]) == ["T[4]", "T[1]", "T[4]", "T[0]"]
    assert names(space[range(6, 0, -3)]) == ["T[6]", "T[3]"]
    assert names(space[[]]) == []
    assert space[[3]][0] == space[3]
    assert names(space.view[[3, 2]]) == ["T[3]"]
    grid = ch.TaskSpace("G")
    assert names(grid[1, [2, 0]]) == ["G[1,2]", "G[1,0]"]
    assert names(grid[[2, 0], 1:3]) == ["G[2,1]", "G[2,2]", "G[0,1]", "G[0,2]"]
    assert names(grid.view[[0, 1], :]) == ["G[0,1]", "G[0,2]", "G[1,0]", "G[1,2]"]
    bounded = ch.TaskSpace("B", shape=3, start=1)
    assert names(bounded[[0, 3, 1]]) == ["B[3]", "B[1]"]
    with pytest.raises(IndexError, match="4"):
        bounded[[1, 4]]
    with pytest.raises(IndexError, match="one list"):
        grid[[0, 1], [0, 1]]
    with pytest.raises(IndexError, match="dimensions"):
        grid[[0, 1]]


def test_a_list_of_dependencies(rt_any: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    for i in range(4):
        ch.spawn(space[i])(lambda i=i: i)
    ch.spawn(space[4], dependencies=space[[0, 2, 3]])(
        lambda: sum(space[i].result() for i in (0, 2, 3))
    )
    assert space[4].result() == 5


@pytest.mark.parametrize("index", ["a", 1.5, None, object(), (0, "a"), [1, "a"], {1}, ([1.5], 0)])
def test_other_indices_are_refused(index: Any) -> None:
    with pytest.raises((TypeError, IndexError)):
        ch.TaskSpace("T")[index]


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"shape": -1}, ValueError),
        ({"shape": "ab"}, TypeError),
        ({"start": "ab"}, TypeError),
        ({"shape": (2, 2), "start": (1, 2, 3)}, ValueError),
    ],
)
def test_bad_bounds_are_refused(keywords: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises((error, ValueError)):
        ch.TaskSpace("T", **keywords)


def test_touched_handles() -> None:
    space = ch.TaskSpace("T")
    assert len(space) == 0
    assert list(space) == []
    assert len(space[:]) == 0
    for i in (4, 1, 2):
        space[i]
    assert len(space) == 3
    assert names_of(space) == names_of(space[:]) == {"T[1]", "T[2]", "T[4]"}
    assert names_of(space.view[1:3]) == {"T[1]", "T[2]"}
    assert names_of(space.view[5:9]) == set()
    assert len(space) == 3
    assert all(task == space[i] for task, i in zip(sorted_by_name(space), (1, 2, 4), strict=True))


def sorted_by_name(tasks: Iterable[Any]) -> list[Any]:
    """The tasks in the order of their names."""
    return sorted(tasks, key=lambda task: str(task.name))


def test_views_of_more_dimensions_touch_nothing() -> None:
    space = ch.TaskSpace("T")
    for index in ((0, 1), (1, 1), (2, 0)):
        space[index]
    assert names_of(space.view[:, 1]) == {"T[0,1]", "T[1,1]"}
    assert names_of(space.view[0:2, 0:2]) == {"T[0,1]", "T[1,1]"}
    assert len(space) == 3


def test_a_dense_slice_touches() -> None:
    space = ch.TaskSpace("T")
    space[1:4]
    assert names_of(space) == {"T[1]", "T[2]", "T[3]"}


@given(
    st.lists(
        st.one_of(
            st.integers(-3, 8),
            st.tuples(st.integers(-3, 8), st.integers(-3, 8), st.integers(1, 3)),
            st.lists(st.integers(-3, 8), max_size=4),
        ),
        max_size=12,
    ),
    st.integers(0, 3),
)
def test_touching_against_a_model(accesses: list[Any], start: int) -> None:
    space = ch.TaskSpace("T", start=start)
    touched: set[int] = set()
    for access in accesses:
        if isinstance(access, int):
            found = space[access]
            if access < start:
                assert len(anything(found)) == 0
            else:
                assert found.name == f"T[{access}]"
                touched.add(access)
        elif isinstance(access, list):
            indices = [i for i in access if i >= start]
            assert names(space[access]) == [f"T[{i}]" for i in indices]
            touched.update(indices)
        else:
            low, high, step = access
            indices = [i for i in range(low, high, step) if i >= start]
            if low < start and step > 1:
                continue
            assert names(space[low:high:step]) == [f"T[{i}]" for i in indices]
            touched.update(indices)
        assert names_of(space) == {f"T[{i}]" for i in touched}
        assert names_of(space.view[2:5]) == {f"T[{i}]" for i in touched if 2 <= i < 5}
        assert len(space) == len(touched)


def test_results_of_a_space(rt_any: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    for i in range(4):
        ch.spawn(space[i])(lambda i=i: i * i)
    assert sorted(space.result()) == [0, 1, 4, 9]
    assert space[1:3].result() == [1, 4]
    assert space[:].result() == space.result()
    assert space.view[2:9].result() == [4, 9]


def test_result_of_a_list_raises_its_failure(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    ch.spawn(space[0])(lambda: 1)
    ch.spawn(space[1])(lambda: boom("one"))
    with pytest.raises(Boom):
        space[0:2].result()
    with pytest.raises(Boom):
        space.result()


def test_result_of_a_list_with_a_timeout(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    ch.spawn(space[0])(no_op)
    with Gate() as gate:
        tasks = [space[0], gate.task]
        with pytest.raises(TimeoutError):
            ch.gather(*tasks).result(timeout=0.01)
        with pytest.raises(TimeoutError):
            space[0:2].result(timeout=0.01)
    ch.spawn(space[1])(no_op)
    assert space[0:2].result(timeout=30) == [None, None]


def test_cancel_a_space_and_a_list(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    ran: list[int] = []
    with Latch() as latch:
        for i in range(6):
            ch.spawn(space[i], dependencies=[latch])(lambda i=i: ran.append(i))
        space[0:3].cancel()
        assert [space[i].cancelled() for i in range(6)] == [True] * 3 + [False] * 3
        space.cancel()
        assert all(task.cancelled() for task in space)
    assert ran == []


def test_a_list_is_a_sequence(rt_any: ch.Runtime) -> None:
    tasks = ch.spawn_many(lambda x: x, range(5))
    assert tasks[-1].result() == 4
    assert tasks[0] in tasks
    assert len(tasks[1:3]) == 2 and isinstance(tasks[1:3], ch.TaskList)
    assert [task.result() for task in reversed(tasks)] == [4, 3, 2, 1, 0]
    with pytest.raises(IndexError):
        tasks[5]
    with pytest.raises(TypeError):
        anything(tasks)["a"]
    assert tasks.result() == [0, 1, 2, 3, 4]


def test_a_space_keeps_results_while_it_lives(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    ch.spawn(space[0])(lambda: ["kept"])
    ch.wait([space[0]])
    assert space[0].result() == ["kept"]


def test_clear_forgets_finished_tasks(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    for i in range(4):
        ch.spawn(space[i])(lambda i=i: i)
    old = space[0]
    space.result()
    space.clear(space[0:2])
    assert names_of(space) == {"T[2]", "T[3]"}
    assert old.result() == 0
    assert space[0] != old
    ch.spawn(space[0])(lambda: "again")
    assert space[0].result() == "again"
    space.clear(space[:])
    assert len(space) == 0


def test_clear_keeps_what_is_not_finished(rt: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    with Latch() as latch:
        pending = ch.spawn(space[0], dependencies=[latch])(lambda: 1)
        done = ch.spawn(space[1])(lambda: 2)
        touched = space[2]
        done.result()
        space.clear(space[:])
        assert space[0] == pending
    assert pending.result() == 1
    ch.spawn(touched)(lambda: 3)
    assert touched.result() == 3


def test_spaces_made_without_a_runtime_serve_several() -> None:
    space = ch.TaskSpace("T")
    with ch.Runtime(workers=2):
        ch.spawn(space[0])(lambda: 1)
    assert space[0].result() == 1
    with ch.Runtime(workers=2):
        later = ch.spawn(space[1], dependencies=[space[0]])(lambda x=space[0]: x + 1)
        assert later.result() == 2


def test_a_loop_needs_no_special_case_at_its_edges(rt_any: ch.Runtime) -> None:
    space, n = ch.TaskSpace("T"), 6
    table = [[0] * n for _ in range(n)]

    @ch.task
    def cell(i: int, j: int) -> None:
        up = table[i - 1][j] if i else 0
        left = table[i][j - 1] if j else 0
        table[i][j] = up + left if i or j else 1

    for i in range(n):
        for j in range(n):
            cell.options(space[i, j], dependencies=[space[i - 1, j], space[i, j - 1]])(i, j)
    space[n - 1, n - 1].result()
    assert table[n - 1][n - 1] == 252


def test_touching_from_many_threads() -> None:
    space, count = ch.TaskSpace("T"), 3000
    meeting = threading.Barrier(4)
    found: list[list[Any]] = []

    def toucher() -> None:
        meeting.wait()
        found.append([space[i] for i in range(count)])

    threads = [threading.Thread(target=toucher) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(space) == count
    for others in found[1:]:
        assert all(a is b for a, b in zip(found[0], others, strict=True))


def test_an_index_that_uses_the_space() -> None:
    space = ch.TaskSpace("T")

    class Index:
        def __index__(self) -> int:
            space[7]
            space[:]
            return 3

    class Bad:
        def __index__(self) -> int:
            raise LookupError("bad index")

    assert space[Index()] == space[3]
    assert names_of(space) == {"T[3]", "T[7]"}
    with pytest.raises(LookupError, match="bad index"):
        space[Bad()]
    assert len(space) == 2


@pytest.mark.parametrize("index", [2**31, 2**63, 2**64, 10**30, -(10**30)])
def test_huge_indices(index: int) -> None:
    space = ch.TaskSpace("T")
    try:
        found: Any = space[index]
    except (IndexError, OverflowError):
        assert len(space) == 0
        return
    assert found.name == f"T[{index}]" if index > 0 else len(found) == 0


def test_touching_while_iterating() -> None:
    space = ch.TaskSpace("T")
    space[0:5]
    seen = 0
    # Either an error, as of a dictionary, or what was there at the beginning; never without end.
    with contextlib.suppress(RuntimeError):
        for _ in space:
            seen += 1
            space[100 + seen]
            assert seen < 1000
    assert 1 <= seen <= 6
