"""Accesses: tasks ordered by what they read and write.

Bodies that would be wrong in another order tell: what a region holds at the end, or what a body
saw, is asserted, and gates hold tasks back where an order could come about by luck.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pytest
from support import Boom, Gate, Latch, anything, leaves

import charioteer as ch

if TYPE_CHECKING:
    from numpy import ndarray as only_for_checkers

Array = np.ndarray[Any, np.dtype[Any]]
Reads = ch.In[Array]


@ch.task
def put(a: ch.Out[Array], value: float = 1.0) -> None:
    a[...] = value


@ch.task
def scale(a: ch.InOut[Array], factor: float = 2.0) -> None:
    a *= factor


@ch.task
def get(a: ch.In[Array]) -> Any:
    return a.tolist()


@ch.task
def add(a: ch.In[Array], b: ch.In[Array], c: ch.Out[Array]) -> None:
    c[...] = a + b


@ch.task
def fail_to(a: ch.InOut[Array]) -> None:
    raise Boom("to")


def test_the_order_is_that_of_the_spawns(rt_any: ch.Runtime) -> None:
    A = ch.zeros(4)
    seen = []
    for i in range(20):
        put(A[i % 3 : i % 3 + 2], i)
        scale(A[1:], 2.0)
        seen.append(get(A))
    x = np.zeros(4)
    for i, task in enumerate(seen):
        x[i % 3 : i % 3 + 2] = i
        x[1:] *= 2.0
        assert task.result() == x.tolist()
    assert A.numpy().tolist() == x.tolist()


def test_readers_run_side_by_side(rt2: ch.Runtime) -> None:
    A = ch.zeros(3)
    meet = threading.Barrier(2)

    @ch.task
    def read(a: ch.In[Array]) -> None:
        meet.wait(30)

    ch.gather(read(A), read(A[1:])).result()


def test_every_way_to_say_it(rt_any: ch.Runtime) -> None:
    A = ch.zeros((4, 2))

    class Scaler:
        factor = 3.0

        @ch.task
        def scale(self, a: ch.InOut[Array]) -> None:
            a *= self.factor

        def __call__(self, a: ch.InOut[Array]) -> None:
            a -= 1

    @ch.spawn
    def inline(a: ch.Out[Array] = A[0], *, b: ch.Out[Array] = A[1], value: int = 7) -> None:
        a[...] = b[...] = value

    @ch.task
    def several(*parts: ch.InOut[Array], by: float) -> int:
        for part in parts:
            part += by
        return len(parts)

    @ch.task
    def lists(many: ch.In[list[Array]], total: ch.Out[Array]) -> None:
        total[...] = sum(many)

    @ch.task
    def strings(a: Reads, b: Annotated[Array, "note"], c: ch.In[only_for_checkers]) -> Any:
        return (a + c).tolist(), b

    Scaler().scale(A[0])
    ch.spawn_many(Scaler(), [A[0], A[1]])
    assert several(A[0], A[1], by=0.5).result() == 2
    lists([A[0], A[1]], total=A[2])
    lists((A[0], A[2]), A[3])
    assert strings(A[2], A[3], c=A[3]).result() == ([74.5, 74.5], A[3])
    assert get.map(A.tiles((1, 2))).result() == [[[x, x]] for x in (20.5, 6.5, 27.0, 47.5)]
    assert get(a=A[0]).result() == [20.5, 20.5]
    # Without a region, and with .fn, everything is as ever.
    assert get.fn(np.arange(2)) == [0, 1]


def test_annotations_of_a_loop(rt_any: ch.Runtime) -> None:
    # The same code with other modes each time.
    A = ch.zeros(2)
    seen: list[bool] = []
    for mode in (ch.In, ch.InOut, ch.In):

        def body(a):  # type: ignore[no-untyped-def]
            seen.append(a.flags.writeable)

        body.__annotations__["a"] = mode[Array]
        ch.task(body)(A).result()
    assert seen == [False, True, False]


def test_views(rt_any: ch.Runtime) -> None:
    A, t = ch.zeros((2, 2)), ch.token()

    @ch.task
    def look(a: ch.In[Array], b: ch.Out[Array], c: ch.InOut[None], d: Any) -> Any:
        with pytest.raises(ValueError, match="read-only"):
            a[...] = 1
        b[...] = 2
        return c, d

    assert look(A[0], A[1], t, A).result() == (None, A)
    assert A.numpy().tolist() == [[0, 0], [2, 2]]


def test_tokens_order(rt: ch.Runtime) -> None:
    t, log = ch.token("t"), []

    @ch.task
    def write(t: ch.InOut[None], i: int) -> None:
        log.append(i)

    with Latch() as latch:
        write.options(dependencies=[latch])(t, 0)
        for i in range(1, 5):
            write(t, i)
    write(t, 5).result()
    assert log == list(range(6))


def test_unordered(rt2: ch.Runtime) -> None:
    A = ch.zeros(2)
    with Latch() as latch:
        first = put.options(dependencies=[latch])(A, 1)
        assert get(ch.unordered(A)).result() == [0, 0]
        assert not first.done()
    assert get(A).result() == [1, 1]


def test_options(rt_any: ch.Runtime) -> None:
    A, log = ch.zeros((3, 2)), ch.token("log")

    @ch.spawn(output=[A[0], A[1]], inout=log)
    def write() -> None:
        here = ch.current()
        here.local(A[0])[...] = 1
        here.local(A[1, 1:])[...] = 2

    @ch.spawn(input=A[:2], output=A[2])
    def read() -> None:
        here = ch.current()
        assert not here.local(A[0]).flags.writeable
        here.local(A[2])[...] = here.local(A[:2]).sum(axis=0)
        with pytest.raises(ch.AccessError, match="no access"):
            here.local(A)

        @ch.spawn
        def inner() -> None:
            with pytest.raises(ch.AccessError, match="no access"):
                ch.current().local(A[0])

        inner.result()

    read.result()
    assert A.numpy().tolist() == [[1, 1], [0, 2], [1, 3]]
    # Those of a function and of a call add up.
    peek = ch.task(lambda: None, input=A[0]).options(input=A[1])
    with pytest.raises(ch.AccessError, match="overlap"):
        peek.options(output=A[0], inout=A[0, 1:])()
    assert peek().result() is None


def test_commute(rt2: ch.Runtime) -> None:
    A = ch.zeros(2)
    inside: list[int] = []

    @ch.task
    def add_to(a: ch.Commute[Array], i: int) -> None:
        inside.append(i)
        a += i
        assert inside.pop() == i

    put(A, 1)
    with Latch() as latch:
        late = add_to.options(dependencies=[latch])(A, 100)
        early = [add_to(A, i) for i in range(20)]
        ch.gather(early).result()
        assert not late.done()
        after = get(A)
    assert after.result() == [291, 291]


@pytest.mark.parametrize("dtype", [np.float64, np.int16])
def test_reductions(rt2: ch.Runtime, dtype: Any) -> None:
    A = ch.array(np.array([[2, 3], [1, 4], [9, 9], [0, 0]]), dtype)

    @ch.task
    def reduce(
        s: ch.Sum[Array], p: ch.Prod[Array], low: ch.Min[Array], high: ch.Max[Array], i: int
    ) -> None:
        s += i
        p *= 2
        np.minimum(low, 9 - i, out=low)
        np.maximum(high, i, out=high)

    for i in range(1, 6):
        reduce(A[0], A[1], A[2], A[3], i)
    assert get(A).result() == [[17, 18], [32, 128], [4, 4], [5, 5]]
    reduce(A[0], A[1], A[2], high=A[3], i=1)
    assert A.numpy().tolist() == [[18, 19], [64, 256], [4, 4], [5, 5]]
    reduce(A[0], A[1], A[2], A[3], 2)
    # The end of the runtime ends reductions too: see below.


def test_reductions_at_the_end_and_of_coroutines() -> None:
    A = ch.zeros(2)

    @ch.task
    def plus(a: ch.Sum[list[Array]], b: ch.Sum[Array]) -> None:
        for each in (*a, b):
            each += 1

    @ch.task
    async def later(a: ch.Sum[Array]) -> None:
        import asyncio

        a += 1
        await asyncio.sleep(0.001)
        a += 1

    attempts: list[int] = []

    @ch.task(retries=3)
    def unsteady(a: ch.Sum[Array]) -> None:
        attempts.append(1)
        a += 1
        if len(attempts) < 3:
            raise Boom

    with ch.Runtime(workers=2):
        for _ in range(10):
            plus([A[:1]], A[1:])
            later(A[:1])
            unsteady(A[1:])
            attempts.extend([1, 1])
    assert A.numpy().tolist() == [30, 20]


def test_a_failed_reduction_leaves_it_undefined(rt: ch.Runtime) -> None:
    A = ch.zeros(1)

    @ch.task
    def plus(a: ch.Sum[Array], ok: bool) -> None:
        a += 1
        if not ok:
            raise Boom

    plus(A, True), plus(A, False), plus(A, True)
    with pytest.raises(ch.DependencyError) as caught:
        get(A).result()
    assert isinstance(caught.value.__cause__, Boom)
    put(A, 3.0)
    assert get(A).result() == [3.0]


def test_failures_travel_from_writers_to_readers(rt_any: ch.Runtime) -> None:
    A = ch.zeros(4)
    failed = fail_to(A[1:3])
    for reader in (get(A), get(A[2]), scale(A[1:]), add(A[2:3], A[0:1], A[3:4])):
        with pytest.raises(ch.DependencyError) as caught:
            reader.result()
        assert isinstance(caught.value.__cause__, Boom)
    assert isinstance(failed.exception(), Boom)
    # Who reads no part of it is well; and who writes all of it makes it good, also piece by piece.
    assert get(A[:1]).result() == [0.0]
    put(A[1], 5.0).result()
    with pytest.raises(ch.DependencyError):
        A.numpy()
    put(A[2:], 6.0).result()
    assert A.numpy().tolist() == [0, 5, 6, 6]


def test_a_reader_that_fails_touches_nobody(rt_any: ch.Runtime) -> None:
    A = ch.zeros(2)

    @ch.task
    def read(a: ch.In[Array]) -> None:
        raise Boom

    reader = read(A)
    put(A, 3.0)
    assert get(A).result() == [3, 3]
    assert isinstance(reader.exception(), Boom)


def test_what_a_cancelled_task_would_have_written(rt: ch.Runtime) -> None:
    A = ch.zeros(2)
    with Latch() as latch:
        pending = put.options(dependencies=[latch])(A, 1)
        reader = get(A)
        assert pending.cancel()
    with pytest.raises(ch.DependencyError) as caught:
        reader.result()
    assert isinstance(caught.value.__cause__, ch.CancelledError)
    put(A, 2)
    assert get(A).result() == [2, 2]


def test_undefined_data_outlive_the_runtime() -> None:
    A = ch.zeros(2)
    with pytest.raises(ExceptionGroup) as group, ch.Runtime(workers=1):
        fail_to(A[:1])
    assert [type(error) for error in leaves(group.value)] == [Boom]
    with pytest.raises(ch.DependencyError) as caught:
        A.numpy()
    assert isinstance(caught.value.__cause__, Boom)
    assert A[1:].numpy().tolist() == [0]
    with ch.Runtime(workers=1):
        assert isinstance(get(A).exception(), ch.DependencyError)
        put(A, 1).result()
    assert A.numpy().tolist() == [1, 1]


def test_host_access(rt: ch.Runtime) -> None:
    A = ch.zeros(3)
    put(A[1:], 2)
    with A.host() as x:
        assert x.tolist() == [0, 2, 2] and not x.flags.writeable
        assert get(A).result() == [0, 2, 2]
    with A[:2].host("rw") as x:
        later = get(A)
        x[...] = 4
        assert get(A[2:]).result() == [2]
        assert not later.done()
    assert later.result() == [4, 4, 2]
    with pytest.raises(Boom):
        with A.host("rw") as x:
            raise Boom
    assert get(A).result() == [4, 4, 2]
    np.testing.assert_array_equal(np.asarray(A, np.int8), [4, 4, 2])
    np.testing.assert_array_equal(np.from_dlpack(anything(A[1:])), [4, 2])


def test_host_access_without_a_runtime() -> None:
    A = ch.zeros(2)
    with A.host("rw") as x:
        x[0] = 1
    assert A.numpy().tolist() == [1, 0]
    with pytest.raises(ch.NoRuntimeError):
        A.fill(3)
    A.release()


def test_fill_and_assignment(rt_any: ch.Runtime) -> None:
    A, B = ch.zeros((2, 3)), ch.array(np.arange(6.0).reshape(2, 3))
    assert A.fill(1).result() is None
    x = np.arange(3.0)
    A[0] = x
    x[...] = -1
    A[1, 1:] = B[1, 0:2]
    A[:, 0] = ch.spawn(lambda: 9)
    assert A.numpy().tolist() == [[9, 1, 2], [9, 3, 4]]
    A[...] = B
    A[:, 1:] = A[:, :2]
    assert A.numpy().tolist() == [[0, 0, 1], [3, 3, 4]]
    A[0] = [[5, 6, 7]]
    A[1, 1] = 8
    assert A.numpy().tolist() == [[5, 6, 7], [3, 8, 4]]
    for wrong in ([1, 2], np.ones((2, 2, 3)), B, ch.zeros(2)):
        with pytest.raises(ValueError, match="cannot be written"):
            A[0] = wrong
    with pytest.raises(ValueError, match="float"):
        A[0] = "abc"
    with pytest.raises(TypeError):
        A[0] = object()


def test_release(rt_any: ch.Runtime) -> None:
    x = np.zeros(2)
    A = ch.asarray(x, name="A")
    region = A[1:]
    fail_to(A).exception()
    A.release()
    for use in (lambda: get(region), lambda: put(A), A.numpy, A.host().__enter__, A.release):
        with pytest.raises(ch.AccessError, match="released"):
            anything(use)()


def test_release_waits(rt: ch.Runtime) -> None:
    A = ch.zeros(2)
    with Latch() as latch:
        task = put.options(dependencies=[latch])(A, 1)
        thread = threading.Thread(target=A.release)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
    thread.join(30)
    assert task.done() and not thread.is_alive()


def test_arrays_serve_one_runtime_after_the_other() -> None:
    A = ch.zeros(2)
    for i in range(3):
        with ch.Runtime(workers=1):
            scale(A, 2)
            put(A[:1], i)
        assert A.numpy().tolist() == [i, 0]


@ch.task
def nothing(*parts: ch.In[Array]) -> None:
    pass


REFUSED = {
    "an array of NumPy's": (lambda A: get(np.zeros(3)), "asarray"),
    "a handle": (lambda A: get(put(A)), "not known yet"),
    "a grid": (lambda A: get(anything(A.tiles((1, 1)))), "index the grid"),
    "a number": (lambda A: get(anything(3)), r"parameter a \(ch.In\).*int"),
    "None": (lambda A: scale(anything(None)), r"parameter a \(ch.InOut\)"),
    "a list with something else": (lambda A: get(anything([A[0], 3])), "not int"),
    "one of many": (lambda A: nothing(A, anything(3)), "2 of"),
    "by keyword": (lambda A: get(a=anything(3)), "parameter a"),
    "writes that overlap": (lambda A: add(A[0], A[0], c=[A[1], A[1]]), "overlap"),  # type: ignore[arg-type]
    "a handle in options": (lambda A: get.options(input=anything(put(A))), "take regions"),
    "options by name": (lambda A: get.options(input=anything("A")), "take regions"),
    "a partial": (lambda A: ch.spawn(functools.partial(get.fn, A)), "partial"),
    "a partial by name": (lambda A: ch.spawn(functools.partial(get.fn, a=A)), "partial"),
    "a token to add to": (lambda A: plus(anything(ch.token())), "parameter a"),
    "strings to add to": (lambda A: plus(ch.array(["a"])), "Sum"),
    "complex to compare": (lambda A: least(ch.zeros(2, complex)), "Min"),
}


@ch.task
def plus(a: ch.Sum[Array]) -> None:
    a += 1


@ch.task
def least(a: ch.Min[Array]) -> None:
    a[...] = 0


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_region_is_refused(rt: ch.Runtime, case: str) -> None:
    A = ch.zeros((2, 2))
    call, match = REFUSED[case]
    with pytest.raises(ch.AccessError, match=match):
        call(A)
    # Nothing is left behind.
    put(A, 2)
    assert get(A).result() == [[2, 2], [2, 2]]


def test_modes_that_cannot_be_read() -> None:
    def two(a: Annotated[Array, *ch.In.__metadata__, *ch.Out.__metadata__]) -> None: ...

    def words(**named: ch.In[Array]) -> None: ...

    def hidden(a: unknown.In[Array]) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with ch.Runtime(workers=1):
        for body, match in ((two, "one mode"), (words, r"\*\*named"), (hidden, "cannot be read")):
            with pytest.raises(ch.AccessError, match=match):
                ch.task(anything(body))(ch.zeros(1))


def test_a_body_may_not_wait_for_itself(rt_any: ch.Runtime) -> None:
    A, B = ch.zeros((2, 2)), ch.zeros(2)

    @ch.task
    def outer(a: ch.InOut[Array]) -> Any:
        for call in (lambda: get(A[0]), lambda: put(A[0]), A[0].numpy, A[0].host("rw").__enter__):
            with pytest.raises(ch.AccessError):
                anything(call)()
        put(A[1], 3).result()
        put(B, 4)
        return B.numpy().tolist()

    assert outer(A[0]).result() == [4, 4]
    assert get(A).result() == [[0, 0], [3, 3]]

    @ch.task
    def reader(a: ch.In[Array]) -> Any:
        with pytest.raises(ch.AccessError):
            put(A)
        return get(A).result()

    assert reader(A).result() == [[0, 0], [3, 3]]


def test_names_that_contradict(rt: ch.Runtime) -> None:
    A, T = ch.zeros(2), ch.TaskSpace("T")
    first = put.options(dependencies=[T[1]])(A, 1)
    with pytest.raises(ch.CycleError):
        scale.options(T[1])(A)
    # What was refused left nothing behind, and the handle can be spawned.
    reader = get(A)
    ch.spawn(T[1])(lambda: None)
    assert reader.result() == [1, 1] and first.done()


def test_retries_and_priorities(rt: ch.Runtime) -> None:
    A = ch.zeros(1)
    tries: list[int] = []

    @ch.task(retries=2, priority=3, timeout=60)
    def put_late(a: ch.Out[Array]) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise Boom
        a[...] = len(tries)

    put_late(A)
    assert get(A).result() == [3]


def test_coroutines(rt_any: ch.Runtime) -> None:
    A = ch.zeros(2)

    @ch.task
    async def two_steps(a: ch.InOut[Array], b: ch.In[Array]) -> None:
        a += 1
        await ch.spawn(lambda: None)
        a += b

    two_steps(A[:1], A[1:])
    put(A[1:], 5)
    two_steps(A[:1], A[1:])
    assert get(A).result() == [7, 5]


def test_checking_catches_who_writes_what_it_reads() -> None:
    A = ch.zeros((2, 2))

    @ch.task
    def back_door(a: ch.In[Array]) -> None:
        owner: Any = a
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        owner[0, 0] += 1

    with ch.Runtime(workers=1, check=True):
        with pytest.raises(ch.AccessError, match=r"back_door wrote to .*only reads"):
            back_door(A[0]).result()
        # Beside it, or where another parameter says that it writes: nothing to object to.
        assert back_door(A[1]).result() is None
    with ch.Runtime(workers=1, check=False):
        assert back_door(A[0]).result() is None
    with pytest.raises(TypeError, match="check"):
        ch.Runtime(check=anything(1))


def test_a_task_with_data_leaves_nothing(rt: ch.Runtime) -> None:
    import gc
    import weakref

    class Value:
        pass

    A, value = ch.zeros(2), Value()
    gone = weakref.ref(value)

    @ch.task
    def keep(a: ch.InOut[Array], value: Any) -> None:
        a += 1

    keep(A, value).result()
    del value
    for _ in range(3):
        put(A, 1).result()
    gc.collect()
    assert gone() is None


def test_gates_hold_writers(rt2: ch.Runtime) -> None:
    A = ch.zeros(2)
    with Gate(input=A) as gate:
        writer = put(A, 1)
        readers = [get(A[:1]) for _ in range(3)]
        assert not writer.done() and not any(reader.done() for reader in readers)
        gate.open()
        assert [reader.result() for reader in readers] == [[1]] * 3


def test_defaults_of_task_functions_are_accesses_too(rt_any: ch.Runtime) -> None:
    A = ch.zeros((3, 2))

    @ch.task
    def both(
        a: ch.InOut[Array] = A[0],
        by: float = 1.0,
        b: ch.Out[Array] = A[1],
        *,
        c: ch.In[Any] = None,
        d: ch.InOut[Any] = [A[2]],  # noqa: B006
    ) -> bool:
        a += by
        b[...] = a
        d[0][...] = b
        return c is None

    assert both().result()
    assert both(A[1], 2.0, A[0]).result()
    assert A.numpy().tolist() == [[3, 3], [3, 3], [3, 3]]
    with pytest.raises(ch.AccessError, match="overlap"):
        both(A[1])
