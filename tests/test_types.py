"""Are the types that editors and checkers see those that the runtime gives?

This file is checked by mypy as well, for which ``assert_type`` is a question; when it runs, the
same lines show that the runtime does what the types say.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, assert_type

import numpy as np
import pytest

import charioteer as ch
from charioteer import blas, policies

pytestmark = pytest.mark.surface

# SciPy's BLAS starts its threads when it is loaded: they are nobody's leak.
with contextlib.suppress(ImportError):
    blas.potrf.fn(np.eye(2))


@pytest.fixture
def runtime() -> Iterator[ch.Runtime]:
    with ch.Runtime(workers=2) as opened:
        yield opened


@ch.task
def scale(x: int, factor: float = 2.0) -> float:
    return x * factor


@ch.task(priority=3, placement=[ch.cpu * 2, ch.cpu], retries=1)
def spell(x: int) -> str:
    return str(x)


async def nap(x: int) -> int:
    return x + 1


@ch.task
async def later(x: int) -> int:
    return x + 1


@ch.task()
async def much_later(x: int) -> int:
    await asyncio.sleep(0)
    return x + 1


class Scale:
    factor = 3

    @ch.task
    def apply(self, x: int) -> int:
        return self.factor * x

    @ch.task
    @staticmethod
    def double(x: int) -> int:
        return 2 * x

    @ch.task()
    @classmethod
    def triple(cls, x: int) -> int:
        return cls.factor * x


def test_task_functions(runtime: ch.Runtime) -> None:
    assert_type(scale(2), ch.Task[float])
    assert_type(scale(2, factor=0.5).result(), float)
    assert_type(spell(2).result(), str)
    assert_type(scale.options("name", dependencies=[scale(1)], share=0.5)(2), ch.Task[float])
    assert_type(spell.map([1, 2]), ch.TaskList[str])
    assert spell.map([1, 2]).result() == ["1", "2"]
    assert scale(2, factor=0.5).result() == scale.fn(2, 0.5) == 1.0
    # Editors show the function's parameters; any of them takes a handle as well.
    one = scale(1)
    assert_type(scale(one, factor=one), ch.Task[float])
    assert scale(one, factor=one).result() == 4.0


def test_coroutine_functions(runtime: ch.Runtime) -> None:
    assert_type(later(1), ch.Task[int])
    assert_type(much_later(1), ch.Task[int])
    assert_type(later.map([1]), ch.TaskList[int])
    assert later(much_later(1)).result() == 3

    @ch.spawn
    async def total() -> int:
        one = assert_type(await later(1), int)
        every = assert_type(await later.map([1, 2]), list[int])
        return one + sum(every)

    assert_type(total, ch.Task[int])
    assert_type(ch.spawn(nap(1)), ch.Task[int])
    assert total.result() == 7


def test_methods(runtime: ch.Runtime) -> None:
    assert_type(Scale().apply(2), ch.Task[int])
    assert Scale().apply(2).result() == 6
    assert Scale.apply(Scale(), 2).result() == 6
    assert_type(Scale.double(2), ch.Task[int])
    assert_type(Scale().double(2), ch.Task[int])
    assert_type(Scale.triple(2), ch.Task[int])
    assert Scale.double(2).result() + Scale().double(2).result() == 8
    assert Scale.triple(2).result() + Scale().triple(2).result() == 12


def test_inline_tasks(runtime: ch.Runtime) -> None:
    space = ch.TaskSpace("T", shape=(4, 4), start=(1, 1))

    @ch.spawn
    def plain(x: int = 1) -> int:
        return x

    @ch.spawn(space[1, 1], dependencies=[plain, space[1:1, 1], [plain]], priority=1)
    def named(x: Any = plain) -> str:
        return str(x)

    @ch.spawn("text", dependencies=space)
    def text() -> bytes:
        return b""

    assert_type(plain, ch.Task[int])
    assert_type(named, ch.Task[str])
    assert_type(text, ch.Task[bytes])
    assert_type(ch.spawn(lambda: 1), ch.Task[int])
    assert_type(ch.spawn(share=0)(lambda: 1.0), ch.Task[float])
    assert_type(ch.spawn_many(lambda x: str(x), [1, 2]), ch.TaskList[str])
    assert_type(ch.spawn_many(spell, [1, 2]), ch.TaskList[str])
    assert_type(ch.spawn_many(nap, [1, 2]), ch.TaskList[int])
    assert ch.spawn_many(nap, [1, 2]).result() == [2, 3]
    assert named.result() == "1"
    assert text.result() == b""


def test_spaces_and_lists(runtime: ch.Runtime) -> None:
    space = ch.TaskSpace()
    assert_type(space[0], ch.Task[Any])
    assert_type(space[0:2], ch.TaskList[Any])
    assert_type(space.view[:], ch.TaskList[Any])
    assert_type(ch.TaskSpace()[0, :2], ch.TaskList[Any])
    assert_type(ch.TaskSpace()[0, 1], ch.Task[Any])
    for i in range(2):
        ch.spawn(space[i])(lambda i=i: i)
    assert space.result() == space[0:2].result() == [0, 1]
    tasks = spell.map([1, 2, 3])
    assert_type(tasks[0], ch.Task[str])
    assert_type(tasks[1:], ch.TaskList[str])
    assert [assert_type(task, ch.Task[str]).result() for task in tasks] == tasks.result()


def test_submit_and_context(runtime: ch.Runtime) -> None:
    assert_type(runtime.submit(str, 1), ch.Task[str])
    assert list(runtime.map(str, [1, 2])) == ["1", "2"]

    @ch.spawn(placement=ch.cpu)
    def here() -> tuple[str, int, str]:
        context = ch.current()
        assert_type(context.device, ch.Device)
        assert_type(context.devices, tuple[ch.Device, ...])
        return context.device.kind.name, len(context.devices), context.task.name

    assert here.result() == ("cpu", 1, "here")


def test_native_tasks(runtime: ch.Runtime) -> None:
    library = ctypes.CDLL("libm.so.6")
    power = ch.native(library.pow, ("f8", "f8"), returns="f8", priority=1)
    assert_type(power, ch.TaskFunction[..., Any])
    assert_type(power(2.0, 3.0), ch.Task[Any])
    assert power.options("named")(2.0, 3.0).result() == power.fn(2.0, 3.0) == 8.0
    memcpy = ctypes.CDLL(None).memcpy
    params = (ch.Out[np.float64], ch.In[np.ndarray[Any, Any]], "u8")
    copy = ch.native(memcpy, params, order="A")
    target = np.zeros(2)
    copy(target, np.ones(2), 16).result()
    assert target.sum() == 2


@ch.task(base=False, cost="1ms", size=lambda x, factor: x)
def scaled(x: int, factor: float = 2.0) -> float:
    raise NotImplementedError


@scaled.variant(ch.cpu, cost=lambda x, factor: 1e-3 * x)
def on_a_core(x: int, factor: float = 2.0) -> float:
    return x * factor


@scaled.variant([ch.gpu, *ch.gpu * range(2, 4)], cost=datetime.timedelta(seconds=1))
async def on_gpus(x: int, factor: float = 2.0) -> float:
    return x * factor


@ch.specialize
def plain(x: int) -> str:
    return str(x)


@plain.variant(ch.gpu)
def on_a_gpu(x: int) -> str:
    return f"gpu {x}"


@ch.specialize(base=False)
def abstract(x: int) -> str:
    raise NotImplementedError


def test_variants(runtime: ch.Runtime) -> None:
    assert_type(scaled(2), ch.Task[float])
    assert_type(on_a_core(2), float)
    assert_type(plain(1), str)
    assert_type(plain.fn(1), str)
    abstract.variant(ch.cpu)(plain.fn)
    if TYPE_CHECKING:
        scaled.variant(ch.gpu)(plain.fn)  # type: ignore[arg-type]
    assert scaled(2, factor=0.5).result() == 1.0
    assert plain(1) == "1"
    assert ch.spawn(lambda: abstract(2)).result() == "2"


def test_policies_and_models(runtime: ch.Runtime) -> None:
    def policy(call: policies.Call) -> list[float]:
        return [
            assert_type(choice.wait, float) + (choice.estimate or 0.0) for choice in call.choices
        ]

    ch.Runtime(policy=policy, models="models.json")
    assert_type(runtime.models(), list[policies.Model])


def _reads_and_writes(a: ch.In[int], b: ch.InOut[str]) -> ch.Out[bytes]:
    return assert_type(a, int).to_bytes() + assert_type(b, str).encode()


def test_modes_are_annotations() -> None:
    assert_type(_reads_and_writes(1, "a"), bytes)
    assert _reads_and_writes(1, "a") == b"\x01a"


def test_blas(runtime: ch.Runtime) -> None:
    pytest.importorskip("scipy")
    a = np.eye(2)
    assert_type(blas.potrf(a), ch.Task[None])
    assert_type(blas.gemm.options(priority=1)(a, a, a.copy(), trans_b="T"), ch.Task[None])
    assert_type(blas.potrf.map([np.eye(2), np.eye(3)]), ch.TaskList[None])
    blas.trsm.fn(a, np.ones((2, 1)), lower=True)


def test_generic_classes_are_subscripted_at_run_time_too() -> None:
    assert ch.Task[int] is ch.Task
    assert ch.TaskList[int] is ch.TaskList
    assert ch.TaskFunction[[int], str] is ch.TaskFunction


Matrix = np.ndarray[Any, np.dtype[np.float64]]


@ch.task
def grow(a: ch.InOut[Matrix], by: float, *rest: ch.In[Matrix]) -> float:
    a += by
    return float(a.sum())


def test_arrays(runtime: ch.Runtime) -> None:
    A = ch.zeros((2, 3))
    assert_type(A, ch.Array)
    assert_type(ch.asarray(np.zeros(3)), ch.Array)
    assert_type(A.tiles((1, 1)), ch.Tiles)
    # What stands for an array is anything to checkers, so that it fits parameters of its type.
    assert_type(A[0], Any)
    assert_type(A.tiles((1, 3))[0, 0], Any)
    assert_type(grow(A[0], 1.0, A[1]), ch.Task[float])
    assert_type(grow.options(input=[A[1]], commute=ch.token())(A[0], by=1.0), ch.Task[float])

    @ch.spawn(output=A[1])
    def inline(a: ch.In[Matrix] = A[0]) -> float:
        assert_type(a, Matrix)
        return float(a[0])

    assert_type(inline, ch.Task[float])
    assert inline.result() == 2.0
    assert_type(A.numpy().tolist(), Any)
    with A.host("rw") as x:
        x[...] = 1.0
    assert_type(A.fill(3), ch.Task[None])
