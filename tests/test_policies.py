"""Who chooses among alternatives, what it learns, and what goes wrong there."""

from __future__ import annotations

import datetime
import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import anything, eventually

import charioteer as ch
from charioteer import cpu, gpu
from charioteer.policies import Call, Model


def machine(gpus: int = 2, time: str = "real") -> ch.Machine:
    return ch.Machine.virtual(gpus, memory="64MiB", time=time)


def busy(seconds: float) -> Callable[[float], tuple[str, ...]]:
    """A body whose work on each device takes so long for each unit of size."""

    def body(size: float) -> tuple[str, ...]:
        context = ch.current()
        for _ in context.each():
            context.stream.busy(seconds * size)
        return tuple(map(repr, context.devices))

    return body


# ---- learning ------------------------------------------------------------------------------------


def three_ways() -> ch.TaskFunction[[float], Any]:
    """One device is fastest for size 1, two for 10, four for 100."""

    @ch.task(base=False, size=lambda size: size)
    def work(size: float) -> int:
        raise AssertionError

    for count, fixed, rate in ((1, 0.0, 1.0), (2, 5.0, 0.3), (4, 20.0, 0.1)):

        @work.variant(gpu * count)
        def _(size: float, fixed: float = fixed, rate: float = rate) -> int:
            context = ch.current()
            for _ in context.each():
                context.stream.busy(1e-3 * (fixed + rate * size))
            return len(context.devices)

    return work


FASTEST = {1.0: 1, 10.0: 2, 100.0: 4}


def test_the_fastest_set_is_learned_by_size() -> None:
    work = three_ways()
    with ch.Runtime(machine(4, "virtual")) as runtime:
        for size, fastest in FASTEST.items():
            counts = [work(size).result() for _ in range(60)]
            assert counts[20:] == [fastest] * 40
            assert size != 1.0 or set(counts[:20]) == {1, 2, 4}  # everything was tried
        known = runtime.models()
    assert {model.choice for model in known} == {"gpu", "gpu*2", "gpu*4"}
    assert {model.size for model in known} == {1, 10, 100}
    for model in known:
        assert isinstance(model, Model)
        assert model.function.endswith("three_ways.<locals>.work")
        assert 0 < model.timed <= model.calls
        assert model.explored <= model.calls
        assert model.estimate is not None
    best = {
        size: min((model for model in known if model.size == size), key=lambda m: m.estimate or 1.0)
        for size in FASTEST
    }
    assert {size: model.choice for size, model in best.items()} == {
        1.0: "gpu",
        10.0: "gpu*2",
        100.0: "gpu*4",
    }
    assert best[1.0].estimate == pytest.approx(1e-3)


def test_what_was_learned_is_kept_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    work = three_ways()
    with ch.Runtime(machine(4, "virtual"), models=path) as first:
        for size in FASTEST:
            for _ in range(20):
                work(size).result()
        assert not path.exists()
    learned = first.models()
    assert path.exists()
    assert [left.name for left in tmp_path.iterdir()] == ["models.json"]

    with ch.Runtime(machine(4, "virtual"), models=str(path)) as second:
        assert {(m.choice, m.size, m.estimate) for m in second.models()} == {
            (m.choice, m.size, m.estimate) for m in learned
        }
        for size, fastest in FASTEST.items():
            assert [work(size).result() for _ in range(5)] == [fastest] * 5
    # A runtime that learns nothing leaves it as it is.
    before = json.loads(path.read_text())
    with ch.Runtime(workers=1, models=path):
        pass
    assert json.loads(path.read_text()) == before


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"format": "another", "version": 1}', b"\xff\xfe", b'"text"'],
)
def test_a_damaged_file_is_refused_at_the_opening(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "models.json"
    path.write_bytes(content)
    with pytest.raises(ch.ModelError, match=r"models\.json: "):
        ch.Runtime(models=path).open()
    assert path.read_bytes() == content
    with ch.Runtime(workers=1):
        assert ch.spawn(int).result() == 0


def learn_something() -> None:
    ch.spawn(placement=[gpu, cpu])(lambda: ch.current().xp.zeros(4)).result(timeout=60)


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    with ch.Runtime(machine(1), models=path):
        learn_something()
    document = json.loads(path.read_text())
    document["version"] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(ch.ModelError, match="version"):
        ch.Runtime(models=path).open()


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ch.Runtime(models=tmp_path / "missing" / "models.json").open()
    folder = tmp_path / "folder"
    folder.mkdir()
    runtime = ch.Runtime(machine(1), models=folder / "models.json").open()
    learn_something()
    folder.rmdir()
    with pytest.raises(ExceptionGroup) as info:
        runtime.close()
    (failure,) = info.value.exceptions
    assert isinstance(failure, FileNotFoundError)
    assert failure.__notes__ == ["The models of run times were not written."]


def test_models_need_a_runtime_that_was_open() -> None:
    with pytest.raises(ch.NoRuntimeError):
        ch.Runtime().models()


# ---- what is known beforehand --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (2e-3, 1e-3),
        ("2ms", "1ms"),
        (datetime.timedelta(milliseconds=2), datetime.timedelta(milliseconds=1)),
        (lambda size: 2 * size, lambda size: "1ms"),
        (lambda size: datetime.timedelta(seconds=2), lambda size: 1),
    ],
    ids=repr,
)
def test_a_declared_cost_decides_without_a_try(one: Any, two: Any) -> None:
    work = ch.task(base=False, cost=one)(busy(1.0))
    work.variant(gpu)(busy(2e-3))
    work.variant(gpu * 2, cost=two)(busy(1e-3))
    with ch.Runtime(machine(2, "virtual")) as runtime:
        for _ in range(10):
            assert work(1.0).result() == ("gpu(0)", "gpu(1)")
        assert [m.explored for m in runtime.models()] == [0] * len(runtime.models())
        # For one call it holds for every body: of equals the first.
        equal = work.options(cost=1e-3)
        assert len(equal.options(size=7)(1.0).result()) == 1


def test_a_cost_of_an_inline_task() -> None:
    with ch.Runtime(machine(2, "virtual")) as runtime:

        @ch.spawn(placement=[gpu * 2, gpu], cost=lambda x: 1.0, size=4)
        def inline(x: int = 3) -> int:
            return len(ch.current().devices)

        assert inline.result() == 2
        tasks = ch.spawn_many(busy(1e-3), [1.0, 2.0], placement=[gpu * 2, gpu], cost=str_of_cost)
        assert [len(held) for held in tasks.result()] == [2, 2]
        sizes = {(m.function.rpartition(".")[2], m.size) for m in runtime.models() if m.calls}
        assert sizes == {("inline", 4), ("body", 0)}


def str_of_cost(size: float) -> str:
    return f"{size}ms"


def test_a_declared_cost_bounds_how_far_tasks_run_ahead() -> None:
    def started(**cost: float) -> int:
        bodies: list[int] = []

        @ch.task(placement=gpu, **cost)
        def work() -> None:
            bodies.append(1)
            ch.current().stream.busy(1e-3)

        with ch.Runtime(ch.Machine.virtual(gpus=2, time="virtual"), workers=0):
            tasks = [work() for _ in range(40)]
            early = len(bodies)
            ch.wait(tasks)
        assert len(bodies) == 40
        return early

    # Nothing is complete before somebody waits. Of long tasks four run ahead on each device.
    assert started(cost=1e-3) == 8
    assert started(cost=1e-5) == 40
    assert started() == 40


def test_sizes_and_costs_are_not_asked_where_nothing_is_to_choose() -> None:
    def never(*arguments: Any) -> float:
        raise AssertionError

    one = ch.task(int, placement=gpu, cost=never, size=never)
    plain = ch.task(int, cost=never, size=never)
    special = ch.task(int, base=False, size=never)
    special.variant(gpu, cost=never)(lambda: 5)
    with ch.Runtime(machine(2)):
        assert one().result(timeout=60) == 0
        assert plain().result() == 0
        assert plain.options(placement=gpu(0))().result() == 0
        assert special().result() == 5


class Array:
    nbytes = 1000


@pytest.mark.parametrize(
    ("arguments", "keywords", "size"),
    [
        ((), {}, 0),
        ((1, 2.0, "text", None), {}, 0),
        ((np.zeros(4),), {}, 32),
        ((np.zeros(4), np.zeros((2, 2), "f4")), {"c": np.zeros(1, "i1")}, 49),
        (([np.zeros(4), 3, np.zeros(4)], (np.zeros(1),), {"x": np.zeros(2)}), {}, 88),
        (([[np.zeros(4)]],), {}, 0),
        ((b"1234", bytearray(8), memoryview(b"12")), {}, 14),
        ((Array(), [Array()]), {}, 2000),
    ],
)
def test_the_size_is_the_bytes_of_arrays(arguments: Any, keywords: Any, size: int) -> None:
    seen = []

    def policy(call: Call) -> list[int]:
        seen.append(call.size)
        return [0] * len(call.choices)

    @ch.task(placement=[cpu, gpu])
    def body(*arguments: Any, **keywords: Any) -> None:
        pass

    with ch.Runtime(machine(1), workers=0, policy=policy):
        body(*arguments, **keywords).result()
        body.options(size=7)(*arguments, **keywords).result()
        body.options(size=lambda *a, **k: len(a) + len(k))(*arguments, **keywords).result()
        handle = ch.spawn(lambda: np.zeros(4))
        body(handle, [handle], *arguments, **keywords).result()
    assert seen == [size, 7, len(arguments) + len(keywords), size]


def test_the_size_of_a_method_knows_its_object() -> None:
    class Grid:
        cells = 5

        @ch.task(placement=[cpu, gpu], size=lambda self, n: self.cells * n)
        def step(self, n: int) -> None:
            pass

    with ch.Runtime(machine(1), workers=0) as runtime:
        Grid().step(3).result()
        assert {model.size for model in runtime.models()} == {15}


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"cost": -1}, ValueError, "cost is not negative"),
        ({"cost": -1.0}, ValueError, "cost is not negative"),
        ({"cost": float("nan")}, ValueError, "cost is not negative, and finite"),
        ({"cost": float("inf")}, ValueError, "cost is not negative, and finite"),
        ({"cost": "2 hedgehogs"}, ValueError, "cost is a time"),
        ({"cost": [1]}, TypeError, "cost is a number of seconds"),
        ({"cost": 1e300}, ValueError, "too long"),
        ({"size": -1}, ValueError, "size is not negative"),
        ({"size": -0.5}, ValueError, "size is not negative"),
        ({"size": float("nan")}, ValueError, "size is not negative"),
        ({"size": True}, TypeError, "size is a number"),
        ({"size": None}, None, ""),
        ({"size": "64KiB"}, None, ""),
        ({"size": 2.5}, None, ""),
        ({"size": 2**70}, ValueError, "size is at most"),
        ({"size": object()}, TypeError, "size is a number"),
    ],
    ids=repr,
)
def test_what_is_no_cost_and_no_size(
    options: dict[str, Any], kind: type[Exception] | None, says: str
) -> None:
    ((name, value),) = options.items()
    if kind is None:
        ch.task(int, **options)
        return
    for make in (ch.task(int).options, ch.task, ch.spawn):
        with pytest.raises(kind, match=says):
            make(**options)
    with ch.Runtime(machine(1), workers=0):
        function = ch.task(int, placement=[cpu, gpu], **{name: lambda: value})
        with pytest.raises(kind, match=says) as info:
            function()
        assert info.value.__notes__ == [f"In {name}= of int."]

        def broken() -> float:
            raise KeyError("missing")

        with pytest.raises(KeyError, match="missing") as raised:
            ch.task(int, placement=[cpu, gpu], **{name: broken})()
        assert raised.value.__notes__ == [f"In {name}= of int."]


# ---- policies ------------------------------------------------------------------------------------


def where() -> tuple[str, ...]:
    return tuple(map(repr, ch.current().devices))


@pytest.mark.parametrize("name", ["eft", "locality", "load", "random", "round-robin"])
@pytest.mark.parametrize("time", ["real", "virtual"])
def test_every_policy_runs_everything(name: str, time: str) -> None:
    anywhere = ch.task(where, placement=[gpu * 2, gpu, cpu], cost=1e-4)
    with ch.Runtime(machine(4, time), policy=name):
        tasks = [anywhere() for _ in range(200)]
        assert len(ch.gather(tasks).result(timeout=60)) == 200


def test_round_robin_goes_round() -> None:
    with ch.Runtime(machine(3, "virtual"), policy="round-robin"):
        one = ch.task(where, placement=gpu)
        assert {one().result() for _ in range(3)} == {("gpu(0)",), ("gpu(1)",), ("gpu(2)",)}
        either = ch.task(where, placement=[gpu(0), cpu])
        assert [either().result()[0][:3] for _ in range(4)] == ["gpu", "cpu", "gpu", "cpu"]


def test_locality_stays_where_the_predecessor_ran() -> None:
    with ch.Runtime(machine(4, "virtual"), policy="locality"):
        step = ch.task(lambda previous: where(), placement=gpu)
        for index in range(4):
            task: Any = ch.spawn(placement=gpu(index))(where)
            for _ in range(5):
                task = step(task)
            assert task.result() == (f"gpu({index})",)


def test_a_policy_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="policy is one of eft, locality, load, random, round-rob"):
        ch.Runtime(policy="fastest")
    with pytest.raises(TypeError, match="a name or a callable"):
        ch.Runtime(policy=anything(3))


def test_the_environment_names_the_policy_and_the_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHARIOTEER_POLICY", "nothing")
    with pytest.raises(ValueError, match="not 'nothing'"):
        ch.Runtime()
    monkeypatch.setenv("CHARIOTEER_POLICY", "load")
    monkeypatch.setenv("CHARIOTEER_MODELS", str(tmp_path / "models.json"))
    with ch.Runtime(machine(1)):
        pass
    assert not (tmp_path / "models.json").exists()  # nothing was learned
    with ch.Runtime(machine(1)):
        learn_something()
    assert (tmp_path / "models.json").exists()


@pytest.fixture(params=[0, 2])
def workers(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


def test_a_policy_of_ones_own_scores_the_choices(workers: int) -> None:
    calls: list[Call] = []

    def last(call: Call) -> Sequence[float]:
        calls.append(call)
        return [-float(at) for at in range(len(call.choices))]

    @ch.task(placement=[gpu * 2, gpu(1), cpu], priority=3, size=9)
    def body(task: object = None) -> tuple[str, ...]:
        return where()

    with ch.Runtime(machine(2), workers=workers, policy=last):
        first = body()
        assert first.result(timeout=60)[0].startswith("cpu")
        assert body(first).result()[0].startswith("cpu")
    one, two = calls
    assert one.function.endswith("body")
    assert (one.size, one.priority, one.turn, two.turn) == (9, 3, 0, 1)
    assert [choice.devices for choice in one.choices] == [(gpu(0), gpu(1)), (gpu(1),), ()]
    assert [choice.cores for choice in one.choices] == [0, 0, 1]
    for choice in one.choices:
        assert choice.estimate is None
        assert choice.wait == 0.0
        assert choice.load == 0
    assert two.choices[2].estimate is not None


def test_what_was_sent_to_a_device_counts_in_its_wait() -> None:
    waits = []

    def first(call: Call) -> list[float]:
        waits.extend(choice.wait for choice in call.choices if choice.devices == (gpu(0),))
        return [0.0 if gpu(0) in choice.devices else 1.0 for choice in call.choices]

    # Whether it is granted, as the first one is, or waits for that.
    with ch.Runtime(machine(2, "virtual"), policy=first, runahead=1):
        work = ch.task(busy(1e-3), placement=gpu, cost="1ms")
        tasks = [work(1.0) for _ in range(5)]
        assert set(ch.gather(tasks).result()) == {("gpu(0)",)}
        assert waits == pytest.approx([0.0, 1e-3, 2e-3, 3e-3, 4e-3])
        work(1.0).result()
        assert waits[5] == 0.0


def test_a_policy_chooses_the_device_of_a_kind(workers: int) -> None:
    def highest(call: Call) -> list[float]:
        return [-max(device.index for device in choice.devices) for choice in call.choices]

    with ch.Runtime(machine(4), workers=workers, policy=highest):
        assert ch.spawn(placement=gpu)(where).result(timeout=60) == ("gpu(3)",)
        assert ch.spawn(placement=gpu(1))(where).result() == ("gpu(1)",)
        assert ch.spawn(where).result()[0].startswith("cpu")


def test_infinity_never_wins_over_a_number(workers: int) -> None:
    def policy(call: Call) -> list[float]:
        return [math.inf, -math.inf, 0.0][: len(call.choices)]

    with ch.Runtime(machine(2), workers=workers, policy=policy):
        assert ch.spawn(placement=[gpu(0), gpu(1), cpu])(where).result(timeout=60) == ("gpu(1)",)


def raises(call: Call) -> list[float]:
    raise LookupError("nowhere")


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "gave None for"),
        (3, "gave 3 for"),
        ("12", "gave '12' for"),
        ([], "gave 0 scores for .* which has 2 choices"),
        ([1.0], "gave 1 scores"),
        ([1.0, 2.0, 3.0], "gave 3 scores"),
        ([1.0, None], "not a number for each choice"),
        ([1.0, "2"], "not a number for each choice"),
        ([1.0, math.nan], "a score that is not a number"),
        ({"a": 1, "b": 2}, "not a number for each choice"),
        (Unshowable(), "gave Unshowable for"),
    ],
    ids=lambda value: "unshowable" if isinstance(value, Unshowable) else repr(value),
)
def test_nonsense_fails_the_task_and_nothing_else(workers: int, answer: Any, says: str) -> None:
    asked = threading.Event()

    def policy(call: Call) -> Any:
        asked.set()
        return answer if call.priority else [0.0, 1.0]

    body = ch.task(lambda: "ran", placement=[gpu(0), cpu])
    with ch.Runtime(machine(1), workers=workers, policy=policy):
        bad = body.options(priority=1)()
        dependent = ch.spawn(dependencies=bad)(int)
        good = body()
        with pytest.raises(ch.PolicyError, match=says):
            bad.result(timeout=60)
        with pytest.raises(ch.DependencyError):
            dependent.result(timeout=60)
        assert good.result(timeout=60) == "ran"
        assert asked.is_set()
    assert issubclass(ch.PolicyError, ch.CharioteerError)


def test_a_policy_that_raises_fails_its_tasks(workers: int) -> None:
    body = ch.task(lambda: "ran", placement=[gpu(0), cpu], retries=2)
    with ch.Runtime(machine(1), workers=workers, policy=raises):
        failed = [body() for _ in range(20)]
        for task in failed:
            with pytest.raises(ch.PolicyError, match=r"the policy raised for .*nowhere") as info:
                task.result(timeout=60)
            assert isinstance(info.value.__cause__, LookupError)
        assert ch.spawn(lambda: "ran").result() == "ran"

    # Nobody receives it: it is raised at the end, and nothing hangs.
    with pytest.raises(ExceptionGroup) as group, ch.Runtime(machine(1), 1, policy=raises):
        body()
    assert isinstance(group.value.exceptions[0], ch.PolicyError)


def test_a_policy_may_spawn_and_tasks_may_spawn_under_it() -> None:
    notes: list[str] = []

    def policy(call: Call) -> list[float]:
        ch.spawn(lambda: notes.append("spawned"))
        return [choice.load for choice in call.choices]

    @ch.task(placement=[gpu, cpu])
    def recurse(depth: int) -> int:
        return 1 if depth == 0 else sum(ch.gather(recurse(depth - 1), recurse(0)).result())

    with ch.Runtime(machine(2), policy=policy):
        assert recurse(5).result(timeout=60) == 6
    assert len(notes) == 11


def test_a_task_that_waits_for_the_policy_can_be_cancelled() -> None:
    inside, go = threading.Event(), threading.Event()

    def policy(call: Call) -> list[float]:
        inside.set()
        assert go.wait(30)
        return [0.0] * len(call.choices)

    body = ch.task(lambda: "ran", placement=[gpu(0), cpu])
    with ch.Runtime(machine(1), policy=policy):
        first, second = body(), body()
        assert inside.wait(30)
        assert second.cancel()
        assert second.cancelled()
        go.set()
        assert first.result(timeout=60) == "ran"


def test_exit_under_a_slow_policy_ends() -> None:
    def policy(call: Call) -> list[float]:
        threading.Event().wait(0.01)
        return [0.0] * len(call.choices)

    body = ch.task(lambda: "ran", placement=[gpu(0), cpu])
    with ch.Runtime(machine(1), policy=policy) as runtime:
        tasks = [body() for _ in range(20)]
    assert [task.result() for task in tasks] == ["ran"] * 20
    eventually(lambda: runtime.stats()["pending"] == 0, "every task is counted")
