"""Random programs of data against sequential NumPy.

A program is a list of statements over a few arrays: tasks with regions that overlap as they like,
in every mode, named dependencies beside, failures in the middle, reads and writes of the host,
tasks that spawn tasks. The oracle runs the statements one after the other on NumPy's arrays, and
keeps for each element whether it is undefined. What every task and every read gave has to be the
same, and the trace has to prove that conflicting accesses were ordered.

On machines with virtual GPUs a task runs where the program says: on cores, on a GPU, on one that
the runtime chooses, or on a set of two with shards; and memory may be so small that little more
than the arrays of one task fits.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Boom, worker_counts

import charioteer as ch
from charioteer import cpu, gpu

Array = np.ndarray[Any, np.dtype[Any]]
SHAPES = [(6,), (3, 4), ()]


@st.composite
def spans(draw: st.DrawFn, extent: int) -> slice:
    start = draw(st.integers(0, extent))
    stop = draw(st.integers(start, extent))
    return slice(start, stop, draw(st.sampled_from([1, 1, 2, 3])))


@st.composite
def regions(draw: st.DrawFn) -> tuple[int, tuple[slice, ...]]:
    which = draw(st.integers(0, len(SHAPES) - 1))
    return which, tuple(draw(spans(extent)) for extent in SHAPES[which])


PLACES = st.sampled_from(["cpu", "gpu", "gpu(0)", "last", "either", "either", "set", "mixed"])

STATEMENTS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), regions(), st.integers(-3, 3), st.booleans(), PLACES),
        st.tuples(st.just("scale"), regions(), st.integers(-1, 2), st.booleans(), PLACES),
        st.tuples(st.just("total"), regions(), regions(), st.booleans(), PLACES),
        st.tuples(st.just("commute"), regions(), st.integers(-2, 2), PLACES),
        st.tuples(st.just("sum"), regions(), st.integers(-2, 2), PLACES),
        st.tuples(st.just("least"), regions(), st.integers(-2, 2), PLACES),
        st.tuples(st.just("read"), regions()),
        st.tuples(st.just("host"), regions(), st.integers(-2, 2)),
        st.tuples(st.just("fill"), regions(), st.integers(-2, 2)),
        st.tuples(st.just("nested"), regions(), regions(), PLACES),
        st.tuples(st.just("move"), regions(), st.booleans(), st.integers(0, 3)),
    ),
    max_size=14,
)


def each(*arrays: Any) -> Iterator[Any]:
    """The arrays of each device of a set in turn, while it is current; of others, just them."""
    if not isinstance(arrays[0], tuple):
        yield arrays if len(arrays) > 1 else arrays[0]
        return
    for _, *mine in zip(ch.current().each(), *arrays, strict=True):
        yield mine if len(mine) > 1 else mine[0]


@ch.task
def put(a: ch.Out[Array], value: int, fail: bool) -> None:
    for one in each(a):
        one[...] = value
    if fail:
        raise Boom


@ch.task
def scale(a: ch.InOut[Array], by: int, fail: bool) -> None:
    for one in each(a):
        one *= by
        one += 1
    if fail:
        raise Boom


@ch.task
def total(a: ch.In[Array], b: ch.In[Array], fail: bool) -> int:
    if fail:
        raise Boom
    # Each device of a set has all of both.
    return max(int(one.sum() + 2 * other.sum()) for one, other in each(a, b))


@ch.task
def commute(a: ch.Commute[Array], by: int) -> None:
    for one in each(a):
        before = one.copy()
        one[...] = before + by


@ch.task
def sum_up(a: ch.Sum[Array], by: int) -> None:
    # A part of a set: it is the sum of the partials.
    for at, one in enumerate(each(a)):
        one += by if at == 0 else 0


@ch.task
def least(a: ch.Min[Array], value: int) -> None:
    for one in each(a):
        np.minimum(one, value, out=one)


@ch.task
def nested(a: ch.InOut[Array], b: Any) -> None:
    for one in each(a):
        one += 1
    put(b, 7, False).result()


class Oracle:
    """Sequential NumPy, with what is undefined marked."""

    def __init__(self) -> None:
        self.x = [np.zeros(shape, np.int64) for shape in SHAPES]
        self.bad = [np.zeros(shape, bool) for shape in SHAPES]

    def at(self, region: tuple[int, tuple[slice, ...]]) -> tuple[Array, Array]:
        which, index = region
        return self.x[which][(*index, ...)], self.bad[which][(*index, ...)]


def run(
    statements: list[tuple[Any, ...]],
    workers: int,
    trace: Path,
    gpus: int = 0,
    memory: int = 1 << 20,
    runahead: int = 64,
) -> None:
    oracle = Oracle()
    expected: list[tuple[ch.Task[Any], Any]] = []
    got: list[tuple[Any, Any]] = []

    def told(task: ch.Task[Any], value: Any) -> None:
        expected.append((task, value))

    machine = ch.Machine.virtual(gpus, memory=memory)
    runtime = ch.Runtime(
        machine, workers=workers, runahead=runahead, trace=trace, on_failure=lambda task: None
    )
    arrays = [ch.zeros(shape, np.int64) for shape in SHAPES]

    def part(region: tuple[int, tuple[slice, ...]]) -> Any:
        which, index = region
        return arrays[which][index] if index else arrays[which]

    def call(function: Any, place: str, x: Array, *arguments: Any) -> ch.Task[Any]:
        """Spawns a task whose first region is seen as ``x``, where the program says."""
        options: dict[str, Any] = {"placement": cpu}
        if gpus and place != "cpu":
            places = {"gpu(0)": gpu(0), "last": gpu(gpus - 1), "either": [gpu, cpu]}
            options["placement"] = places.get(place, gpu)
            splits = function in (put, scale, commute)
            if not splits or (x.ndim and x.shape[0] >= 2):
                if place == "set" and gpus >= 2:
                    options["placement"] = gpu * 2
                elif place == "mixed" and workers:
                    options["placement"] = (gpu, cpu)
                if splits:
                    options["shards"] = {"a": 0}
            # What the body itself allocates on its device: copies, or sums of one element.
            if function is commute:
                options["memory"] = 2 * x.nbytes
            elif function is total:
                options["memory"] = 4 * x.itemsize
        try:
            task: ch.Task[Any] = function.options(**options)(*arguments)
        except (ch.OutOfDeviceMemoryError, ch.PlacementError):
            # With what the body allocates, or by that alone.
            assert memory < 1 << 20
            task = function.options(placement=cpu)(*arguments)
        return task

    with runtime:
        for what, region, *rest in statements:
            x, bad = oracle.at(region)
            poisoned = bool(bad.any())
            if what == "put":
                value, fail, place = rest
                told(call(put, place, x, part(region), value, fail), Boom if fail else None)
                x[...] = value
                bad[...] = fail
            elif what == "fill":
                told(part(region).fill(rest[0]), None)
                x[...] = rest[0]
                bad[...] = False
            elif what == "scale":
                by, fail, place = rest
                task = call(scale, place, x, part(region), by, fail)
                told(task, poisoned or (Boom if fail else None))
                x[...] = x * by + 1
                bad[...] |= poisoned or fail
            elif what == "total":
                other, fail, place = rest
                y, worse = oracle.at(other)
                value = int(x.sum() + 2 * y.sum())
                lost = poisoned or bool(worse.any())
                task = call(total, place, x, part(region), part(other), fail)
                told(task, lost or (Boom if fail else value))
            elif what == "commute":
                # One that fails does not concern those that commute with it: what comes of a mix of
                # both is no matter of the order of the statements.
                if poisoned:
                    continue
                told(call(commute, rest[1], x, part(region), rest[0]), None)
                x += rest[0]
            elif what == "sum":
                told(call(sum_up, rest[1], x, part(region), rest[0]), poisoned or None)
                x += rest[0]
                bad[...] |= poisoned
            elif what == "least":
                told(call(least, rest[1], x, part(region), rest[0]), poisoned or None)
                np.minimum(x, rest[0], out=x)
                bad[...] |= poisoned
            elif what == "read":
                try:
                    got.append((part(region).numpy().tolist(), poisoned or x.tolist()))
                except ch.DependencyError:
                    got.append((True, poisoned))
            elif what == "host":
                try:
                    with part(region).host("rw") as view:
                        view += rest[0]
                except ch.DependencyError:
                    # As a task that is skipped.
                    got.append((True, poisoned))
                    bad[...] = True
                else:
                    got.append((False, poisoned))
                    x += rest[0]
            elif what == "nested":
                other, place = rest
                y, worse = oracle.at(other)
                if np.shares_memory(x, y) or not y.size:
                    continue
                place = "gpu" if place in ("set", "mixed") else place
                told(call(nested, place, x, part(region), part(other)), poisoned or None)
                # What a body spawns has its place where that is: the program waits for it here.
                expected[-1][0].exception()
                x += 1
                bad[...] |= poisoned
                if not poisoned:
                    y[...] = 7
                    worse[...] = False
            elif what == "move" and gpus:
                there, which = rest
                device = gpu(which % gpus)
                with contextlib.suppress(ch.OutOfDeviceMemoryError):
                    moved = part(region).prefetch if there else part(region).evict
                    told(moved(device), poisoned or None)
        for task, value in expected:
            if value is True:
                assert isinstance(task.exception(), ch.DependencyError), task
            elif value is Boom:
                assert isinstance(task.exception(), Boom), task
            else:
                error = task.exception()
                assert error is None and task.result() == value, (task, error)
    for result, value in got:
        assert result == value
    for checked in (ch.check_order(trace), ch.check_trace(trace)):
        assert not checked.violations, checked.violations
    for array, x, bad in zip(arrays, oracle.x, oracle.bad, strict=True):
        whole = np.ndindex(x.shape)
        for index in whole:
            if bad[index]:
                with pytest.raises(ch.DependencyError):
                    array[index].numpy()
            else:
                assert array[index].numpy() == x[index], (index, array)


@pytest.mark.parametrize("workers", worker_counts(0, 2))
@given(statements=STATEMENTS)
@settings(max_examples=60)
def test_random_programs(workers: int, statements: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(statements, workers, Path(folder) / "trace")


@pytest.mark.parametrize("gpus", [1, 2, 4])
@given(
    statements=STATEMENTS,
    workers=st.sampled_from([0, 1, 3]),
    memory=st.sampled_from([128, 256, 512, 1 << 20]),
    runahead=st.sampled_from([0, 64]),
)
@settings(max_examples=25)
def test_random_programs_on_devices(
    gpus: int, workers: int, memory: int, runahead: int, statements: list[tuple[Any, ...]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(statements, workers, Path(folder) / "trace", gpus, memory, runahead)
