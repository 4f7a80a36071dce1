"""Which body serves which devices, and what may not be registered."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from support import anything

import charioteer as ch
from charioteer import cpu, gpu
from charioteer._placement import ANY, CORE, resolve
from charioteer._variants import BASE, Held, Totals, Variants
from charioteer.devices import normal

# ---- matching: sets, without a runtime ----------------------------------------------------------


def table(*sets: Any, base: bool = True) -> Variants:
    """A function with variants for these sets, numbered in their order."""

    def function(x: int) -> int:
        return x

    made = Variants(function, base)
    for number, placement in enumerate(sets):
        made.add(lambda x: x + number, placement)
    return made


def choices(variants: Variants, placement: Any, gpus: int = 4) -> list[tuple[list[int], int, bool]]:
    found = resolve(
        normal(placement), (4, gpus), None, None, (variants, len(variants.registered)), True
    )
    return [(choice.places, choice.body, choice.open) for choice in found]


@pytest.mark.parametrize(
    ("sets", "serving"),
    [
        ([gpu, gpu * 2], {(0,): 0, (3,): 0, (0, 1): 1, (1, 2, 3): BASE}),
        ([gpu * range(1, 5), gpu * 2], {(0,): 0, (0, 1): 1, (0, 1, 2): 0}),
        ([gpu * range(1, 5), gpu * range(2, 4)], {(0,): 0, (0, 1): 1, (0, 1, 2, 3): 0}),
        ([gpu, gpu(0)], {(0,): 1, (1,): 0}),
        ([gpu(0), gpu(1)], {(0,): 0, (1,): 1, (2,): BASE}),
        ([[gpu(0), gpu(1)], gpu(1)], {(0,): 0, (1,): 1}),
        ([gpu * 2, (gpu(0), gpu)], {(0, 3): 1, (3, 0): 1, (1, 2): 0}),
        ([(gpu(0), gpu), (gpu(0), gpu(1))], {(0, 1): 1, (1, 0): 1, (0, 2): 0, (1, 2): BASE}),
        ([gpu.all, gpu * 3], {(0, 1, 2, 3): 0, (0, 1, 2): 1, (0, 1): BASE}),
        ([gpu.all, gpu * 4], {(0, 1, 2, 3): 1}),
        ([gpu.all, gpu * range(1, 9)], {(0, 1, 2, 3): 1}),
    ],
    ids=repr,
)
def test_the_most_specific_serves(sets: list[Any], serving: dict[tuple[int, ...], int]) -> None:
    for order in itertools.permutations(range(len(sets))):
        variants = table(*(sets[at] for at in order))
        for named, expected in serving.items():
            found = variants.serving(Held(0, len(named), named), Totals(4, 4))
            assert (BASE if found == BASE else order[found]) == expected


@pytest.mark.parametrize(
    ("sets", "placement", "expected"),
    [
        ([gpu * 2], gpu, [([ANY], BASE, False)]),
        ([gpu * 2], [gpu * 2, cpu], [([ANY, ANY], 0, False), ([CORE], BASE, False)]),
        ([gpu(0)], gpu, [([0], 0, False), ([ANY], BASE, True)]),
        ([gpu(0)], gpu(0), [([0], 0, False)]),
        ([gpu(0)], gpu(1), [([1], BASE, False)]),
        ([(gpu(1), gpu(0))], gpu * 2, [([1, 0], 0, False), ([ANY, ANY], BASE, True)]),
        ([(gpu(1), gpu(0))], (gpu(0), gpu(1)), [([0, 1], 0, False)]),
        ([(gpu(1), gpu(0))], (gpu, gpu(0)), [([1, 0], 0, False), ([ANY, 0], BASE, True)]),
        (
            [(gpu(0), gpu), (gpu(0), gpu(1))],
            gpu * 2,
            [([0, 1], 1, False), ([0, ANY], 0, True), ([ANY, ANY], BASE, True)],
        ),
        ([gpu(0), gpu], gpu, [([0], 0, False), ([ANY], 1, True)]),
        # Whatever the second could serve the first does.
        ([(gpu(0), gpu), [(gpu(0), gpu), gpu(3)]], (gpu, gpu(0)), [([ANY, 0], 0, False)]),
        ([gpu.all], gpu * 4, [([ANY] * 4, 0, False)]),
        ([cpu.all], cpu * 4, [([CORE] * 4, 0, False)]),
    ],
    ids=repr,
)
def test_an_alternative_is_a_choice_for_each_body(
    sets: list[Any], placement: Any, expected: Any
) -> None:
    assert choices(table(*sets), placement) == expected


def test_without_a_base_only_variants_serve() -> None:
    variants = table(gpu(0), gpu * 2, base=False)
    assert choices(variants, [gpu, cpu, gpu * 2]) == [([0], 0, False), ([ANY, ANY], 1, False)]
    with pytest.raises(ch.PlacementError) as info:
        choices(variants, [cpu, gpu(1), gpu * 9])
    assert str(info.value).split("; ") == [
        "cpu: no variant of function is for it, and there is no base body",
        "gpu(1): no variant of function is for it, and there is no base body",
        "gpu * 9: the machine has 4",
    ]
    with pytest.raises(ch.PlacementError, match=r"gpu\(1\): no variant of function"):
        variants.serving(Held(0, 1, (1,)), Totals(4, 4))


def test_what_is_said_nothing_of_is_the_base_and_every_set_of_a_variant() -> None:
    def sets(variants: Variants, placement: Any = None, final: bool = False) -> list[list[int]]:
        said = None if placement is None else normal(placement)
        return [c.places for c in resolve(said, (4, 4), None, None, (variants, 9), final)]

    assert sets(table(gpu * 2, [gpu, cpu])) == [[CORE], [ANY, ANY], [ANY]]
    assert sets(table(gpu * 2, gpu, base=False)) == [[ANY, ANY], [ANY]]
    assert sets(table(gpu * 2), [gpu, cpu]) == [[ANY], [CORE], [ANY, ANY]]
    assert sets(table(gpu * 2), [gpu, cpu], final=True) == [[ANY], [CORE]]
    # What the machine lacks is no choice.
    assert sets(table(gpu * 8, gpu)) == [[CORE], [ANY]]


def test_needs_are_the_alternatives_then_the_variants_then_the_tasks() -> None:
    variants = table(gpu.require(memory=7, share=0.25), gpu * 2)
    needs = [
        (choice.memory, choice.share)
        for placement in (gpu, gpu.require(memory=9), gpu * 2)
        for choice in resolve(normal(placement), (4, 4), 5, 1.0, (variants, 2), True)
    ]
    assert needs == [(7, 16_384), (9, 16_384), (5, 65_536)]


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ([gpu, gpu], "function has a variant for gpu already"),
        ([gpu * 2, (gpu, gpu)], r"a variant for gpu \* 2 already"),
        ([(gpu(0), gpu(1)), (gpu(1), gpu(0))], r"a variant for \(gpu\(1\), gpu\(0\)\) already"),
        ([gpu.all, gpu.all], r"a variant for gpu\.all already"),
        ([cpu, [cpu, gpu]], None),
        ([[cpu, gpu], [gpu * 2, cpu]], "a variant for cpu already"),
        ([gpu * range(1, 3), gpu * range(2, 4)], r"a variant for gpu \* 2 already"),
        ([gpu * range(1, 3), gpu * range(2, 5)], None),
        ([(gpu(0), gpu), (gpu(1), gpu)], r"some sets match \(gpu\(1\), gpu\) as well"),
        ([(cpu * 2, gpu.all), (cpu.all, gpu)], "some sets match"),
        ([(cpu * 2, gpu.all), (cpu.all, gpu.all)], None),
        ([(gpu(0), gpu), (gpu(1), gpu, gpu)], None),
        ([(cpu, gpu), (cpu, cpu)], None),
    ],
    ids=repr,
)
def test_no_two_may_serve_a_set_equally_well(sets: list[Any], says: str | None) -> None:
    if says is None:
        table(*sets)
        return
    variants = table(sets[0])
    before = variants.registered
    with pytest.raises(ch.VariantError, match=says):
        variants.add(lambda x: x, sets[1])
    assert variants.registered is before


SETS = st.lists(
    st.sampled_from([gpu, gpu(0), gpu(1), gpu * 2]), min_size=1, max_size=3, unique=True
).map(tuple) | st.sampled_from([gpu, gpu * 2, gpu * 3, gpu.all, gpu(0), gpu(2)])
PLACEMENTS = st.lists(SETS, min_size=1, max_size=3)


def tried(placement: Any) -> bool:
    try:
        normal(placement)
    except ch.PlacementError:
        return False
    return True


@given(st.lists(PLACEMENTS.filter(tried), max_size=5), SETS.filter(tried), st.booleans())
def test_choices_and_devices_agree(sets: list[Any], placement: Any, base: bool) -> None:
    """Whatever the devices come to, the choice that they are granted by names the body that serves
    them, or is open; and every body that could serve has its choice."""
    variants = table(base=base)
    for one in sets:
        with contextlib.suppress(ch.VariantError):
            variants.add(lambda x: x, one)
    totals = Totals(4, 4)
    try:
        found = choices(variants, placement)
    except ch.PlacementError:
        found = []
    try:
        ((places, _, _),) = choices(table(), placement)
    except ch.PlacementError:
        assert not found
        return
    for named in itertools.permutations(range(4), len(places)):
        if any(place not in (ANY, gpu) for place, gpu in zip(places, named, strict=True)):
            continue
        try:
            serving = variants.serving(Held(0, len(named), named), totals)
        except ch.PlacementError:
            serving = None
        granted = [
            (body, is_open)
            for wanted, body, is_open in found
            if all(place in (ANY, gpu) for place, gpu in zip(wanted, named, strict=True))
        ]
        for body, is_open in granted:
            assert body == serving or is_open
        bodies = {body for wanted, body, _ in found if set(wanted) - {ANY} <= set(named)}
        assert (serving in bodies) if serving is not None else not granted


# ---- task functions ------------------------------------------------------------------------------


def machine(gpus: int = 2, time: str = "real") -> ch.Machine:
    return ch.Machine.virtual(gpus, memory="64MiB", time=time)


@pytest.fixture(params=[0, 2])
def runtime(request: pytest.FixtureRequest) -> Iterator[ch.Runtime]:
    with ch.Runtime(machine(2), workers=request.param) as opened:
        yield opened


def devices() -> list[str]:
    return [repr(device) for device in ch.current().devices]


def test_a_task_runs_the_body_of_its_set(runtime: ch.Runtime) -> None:
    @ch.task
    def where(x: int) -> tuple[str, int, list[str]]:
        return "base", x, devices()

    @where.variant(gpu)
    def _(x: int) -> tuple[str, int, list[str]]:
        return "one", x, devices()

    @where.variant(gpu * 2)
    def _(x: int) -> tuple[str, int, list[str]]:
        return "two", x, devices()

    expected = {"base": {1}, "one": {1}, "two": {2}}
    for placement, name in ((cpu, "base"), (gpu, "one"), (gpu(1), "one"), (gpu.all, "two")):
        body, x, held = where.options(placement=placement)(5).result(timeout=60)
        assert (body, x) == (name, 5)
        assert len(held) in expected[name]
    assert where.options(placement=gpu(1))(1).result()[2] == ["gpu(1)"]
    assert where.fn.__name__ == "where"
    assert where.options(placement=gpu)(x=1).name == "where"
    # Left to the scheduler: all three are tried.
    seen = {where(1).result(timeout=60)[0] for _ in range(20)}
    assert seen == {"base", "one", "two"}


def test_every_way_to_spawn_has_the_variants(runtime: ch.Runtime) -> None:
    @ch.task(placement=cpu)
    def twice(x: int = 3) -> tuple[str, int]:
        return "base", 2 * x

    @twice.variant([gpu, gpu * 2])
    def body(x: int = 4) -> tuple[str, int]:
        return "variant", 2 * x

    on_gpu = twice.options(placement=gpu)
    first = on_gpu(1)
    assert first.result(timeout=60) == ("variant", 2)
    assert on_gpu.map([1, 2]).result() == [("variant", 2), ("variant", 4)]
    assert ch.spawn_many(on_gpu, [5]).result() == [("variant", 10)]
    assert ch.spawn(on_gpu).result() == ("variant", 6)  # the function's own defaults
    assert ch.spawn("named", placement=gpu * 2)(twice).result() == ("variant", 6)
    assert runtime.submit(on_gpu, 2).result() == ("variant", 4)
    assert twice.options(placement=cpu).map(
        [1],
    ).result() == [("base", 2)]
    assert on_gpu(on_gpu.options("handle")(1).result()[1]).result() == ("variant", 4)

    @ch.task(placement=[gpu, cpu])
    def total(parts: list[int], more: int) -> tuple[str, int]:
        return "base", sum(parts) + more

    @total.variant(gpu)
    def _(parts: list[int], more: int) -> tuple[str, int]:
        return "variant", sum(parts) + more

    one = ch.spawn(lambda: 1)
    for _ in range(8):  # handles are replaced for whichever body runs
        name, value = total([one, one], more=one).result(timeout=60)
        assert value == 3
        assert name in ("base", "variant")


def test_variants_may_be_lambdas_coroutines_and_native(runtime: ch.Runtime) -> None:
    library = ctypes.CDLL("libm.so.6")

    @ch.task
    def power(x: float, y: float) -> float:
        return -1.0

    power.variant(gpu)(lambda x, y: x * y)

    @power.variant(gpu * 2)
    async def _(x: float, y: float) -> float:
        return await ch.spawn(lambda: x + y)

    power.variant(cpu * 2)(ch.native(library.pow, ("f8", "f8"), returns="f8"))

    def on(placement: Any) -> float:
        return power.options(placement=placement)(3.0, 2.0).result(timeout=60)

    assert (on(cpu), on(gpu), on(gpu * 2)) == (-1.0, 6.0, 5.0)
    if runtime.workers:
        assert on(cpu * 2) == 9.0
    with pytest.raises(TypeError):  # the native body cannot convert it, which is known at once
        power.options(placement=[cpu * 2, gpu])("three", 2.0)
    values = {power(3.0, 2.0).result(timeout=60) for _ in range(16)}
    assert values == {-1.0, 6.0, 5.0, 9.0}


def test_a_native_function_has_python_variants(runtime: ch.Runtime) -> None:
    power = ch.native(ctypes.CDLL("libm.so.6").pow, ("f8", "f8"), returns="f8")
    power.variant(gpu)(lambda x, y: ("gpu", x, y))
    assert {repr(power(2.0, 3.0).result(timeout=60)) for _ in range(8)} == {
        "8.0",
        "('gpu', 2.0, 3.0)",
    }


def test_variables_of_variants_are_bound_when_they_are_spawned(runtime: ch.Runtime) -> None:
    tasks = []
    for i in range(3):

        @ch.task(placement=cpu)
        def number() -> tuple[str, int]:
            return "base", i

        @number.variant(gpu)
        def _() -> tuple[str, int]:
            return "variant", i

        tasks.append(number.options(placement=gpu)())
        tasks.append(number.options(placement=cpu)())
    assert ch.gather(tasks).result() == [
        (name, i) for i in range(3) for name in ("variant", "base")
    ]

    count = 0
    bad = ch.task(int)

    @bad.variant(gpu)
    def _() -> None:
        nonlocal count
        count += 1

    with pytest.raises(ch.CaptureError):
        bad.options(placement=gpu)()


class Scale:
    factor = 3

    @ch.task
    def apply(self, x: int) -> tuple[str, int]:
        return "base", self.factor * x

    @apply.variant(gpu)
    def _apply(self, x: int) -> tuple[str, int]:
        return "variant", self.factor * x

    @ch.specialize
    def plain(self, x: int) -> tuple[str, int]:
        return "base", self.factor * x

    @plain.variant(gpu)
    def _plain(self, x: int) -> tuple[str, int]:
        return "variant", self.factor * x

    @ch.task(placement=gpu)
    def both(self) -> tuple[str, int]:
        return self.plain(2)

    @ch.task
    @staticmethod
    def double(x: int) -> tuple[str, int]:
        return "base", 2 * x

    @double.variant(gpu)
    @staticmethod
    def _double(x: int) -> tuple[str, int]:
        return "variant", 2 * x

    @ch.task
    @classmethod
    def triple(cls, x: int) -> tuple[str, int]:
        return "base", cls.factor * x

    @triple.variant(gpu)
    @classmethod
    def _triple(cls, x: int) -> tuple[str, int]:
        return "variant", cls.factor * x


def test_methods_have_variants(runtime: ch.Runtime) -> None:
    scale = Scale()
    assert scale.apply.options(placement=gpu)(2).result(timeout=60) == ("variant", 6)
    assert scale.apply.options(placement=cpu)(2).result() == ("base", 6)
    assert Scale.apply.options(placement=gpu)(scale, 2).result() == ("variant", 6)
    assert scale.double.options(placement=gpu)(2).result() == ("variant", 4)
    assert Scale.triple.options(placement=gpu)(2).result() == ("variant", 6)
    assert scale.triple.options(placement=gpu)(2).result() == ("variant", 6)
    assert {scale.apply(1).result() for _ in range(8)} == {("base", 3), ("variant", 3)}
    assert scale.plain(2) == ("base", 6)
    assert scale.both().result() == ("variant", 6)


def test_a_variant_of_named_devices_serves_them_alone(runtime: ch.Runtime) -> None:
    @ch.task(placement=gpu)
    def which() -> tuple[str, list[str]]:
        return "base", devices()

    @which.variant(gpu(0))
    def _() -> tuple[str, list[str]]:
        return "first", devices()

    for _ in range(8):
        name, held = which.options(placement=gpu)().result(timeout=60)
        assert (name == "first") == (held == ["gpu(0)"])
    assert which.options(placement=gpu(0))().result() == ("first", ["gpu(0)"])
    assert which.options(placement=gpu(1))().result() == ("base", ["gpu(1)"])

    with ch.TaskGroup():
        tasks = [which.options(placement=gpu)() for _ in range(50)]
    for name, held in ch.gather(tasks).result():
        assert (name == "first") == (held == ["gpu(0)"])


def test_without_a_base_body() -> None:
    ran = []

    @ch.task(base=False)
    def nowhere(x: int) -> int:
        """What it would do."""
        ran.append(x)
        return x

    assert nowhere.__doc__ == "What it would do."
    with ch.Runtime(machine(2)):
        with pytest.raises(ch.PlacementError, match="nowhere has no variant yet, and no base body"):
            nowhere(1)

        @nowhere.variant(gpu * 2)
        def _(x: int) -> int:
            return 2 * x

        assert nowhere(1).result(timeout=60) == 2
        with pytest.raises(ch.PlacementError) as info:
            nowhere.options(placement=[cpu, gpu])(1)
        says = "no variant of nowhere is for it, and there is no base body"
        assert str(info.value) == f"cpu: {says}; gpu: {says}"
    with ch.Runtime(workers=1):
        with pytest.raises(ch.PlacementError, match=r"gpu \* 2: the machine has no gpu"):
            nowhere(1)
    assert not ran

    with pytest.raises(TypeError, match="base=False"):
        ch.task(base=False, placement=gpu)(int)
    with pytest.raises(TypeError, match="a task function already"):
        ch.task(base=False)(nowhere)


def test_a_variant_that_comes_later_serves_later_spawns(runtime: ch.Runtime) -> None:
    late = ch.task(lambda: "base")
    options = late.options(placement=gpu)
    assert options().result(timeout=60) == "base"
    late.variant(gpu * 2)(lambda: "two")
    assert options().result() == "base"
    late.variant(gpu)(lambda: "one")
    assert options().result() == "one"
    assert late.options(placement=gpu(0))().result() == "one"
    late.variant(gpu(0))(lambda: "first")
    assert late.options(placement=gpu(0))().result() == "first"
    assert late.options(placement=gpu(1))().result() == "one"
    # Whatever shares the function has its variants: options, and options of those.
    options.options(priority=1).variant(cpu)(lambda: "core")
    assert late.options(placement=cpu)().result() == "core"


def test_a_placement_that_is_said_for_a_function_is_where_its_base_runs(
    runtime: ch.Runtime,
) -> None:
    @ch.task(placement=[gpu, cpu])
    def body() -> str:
        return f"base on {ch.current().device.kind}"

    body.variant(gpu * 2)(lambda: "two")
    assert {body().result(timeout=60) for _ in range(12)} == {
        "base on gpu",
        "base on cpu",
        "two",
    }
    assert {body.options(placement=[gpu, cpu])().result() for _ in range(12)} <= {
        "base on gpu",
        "base on cpu",
    }
    assert body.options(placement=gpu * 2)().result() == "two"


def test_what_fails_fails_whichever_body_it_is(runtime: ch.Runtime) -> None:
    calls: list[str] = []

    @ch.task(retries=2, placement=gpu)
    def flaky() -> str:
        raise AssertionError

    @flaky.variant(gpu * 2)
    def _() -> str:
        calls.append("two")
        if len(calls) < 3:
            raise ConnectionError
        return "done"

    assert flaky.options(placement=gpu * 2)().result(timeout=60) == "done"
    assert calls == ["two"] * 3
    with pytest.raises(AssertionError):
        flaky.options(placement=gpu, retries=0)().result(timeout=60)

    @ch.task
    async def waits() -> str:
        return "base"

    @waits.variant(gpu)
    async def _() -> str:
        one = await ch.spawn(lambda: "one")
        two = await ch.spawn(lambda: "two")
        return one + two

    assert {waits().result(timeout=60) for _ in range(8)} == {"base", "onetwo"}


def test_what_may_not_be_registered() -> None:
    @ch.task
    def add(a: int, b: int) -> int:
        return a + b

    add.variant(gpu)(lambda a, b: a + b)
    with pytest.raises(ch.VariantError, match="add has a variant for gpu already"):
        add.variant([gpu * 2, gpu(0), gpu * 3])
        add.variant(gpu)(lambda a, b: a + b)
    with pytest.raises(ch.VariantError, match=r"add takes \(a, b\), and its variant \(x, y\)"):
        add.variant(gpu * 2)(anything(lambda x, y: x + y))
    for other, shown in [
        (lambda a: a, r"\(a\)"),
        (lambda a, b, c: a, r"\(a, b, c\)"),
        (lambda a, b, *, c, d=1: a, r"\(a, b, \*, c, d=\.\.\.\)"),
        (lambda b, a: a, r"\(b, a\)"),
    ]:
        with pytest.raises(ch.VariantError, match=f"and its variant {shown}"):
            add.variant(gpu * 2)(anything(other))
    with pytest.raises(ch.VariantError, match=r"takes \(a=\.\.\.\), and its variant \(a\)"):
        ch.task(lambda a=1: a).variant(gpu)(anything(lambda a: a))
    with pytest.raises(ch.VariantError, match=r"and its variant \(a\)"):
        add.variant(gpu * 2)(anything(lambda a: a))
    with pytest.raises(TypeError, match="is to be callable, not int"):
        add.variant(gpu * 2)(anything(3))
    with pytest.raises(TypeError, match="spawns a task"):
        add.variant(gpu * 2)(ch.task(lambda a, b: a))
    with pytest.raises(TypeError, match="no placement"):
        add.variant(anything("gpu"))
    with pytest.raises(ch.PlacementError, match="at least one"):
        add.variant([])
    with pytest.raises(ch.PlacementError, match="cores are all alike"):
        add.variant(cpu(0))(lambda a, b: a)
    with pytest.raises(ch.PlacementError, match="for devices with memory"):
        add.variant(cpu.require(memory=1))(lambda a, b: a)
    with pytest.raises(ValueError, match="cost is not negative"):
        add.variant(gpu * 2, cost=-1.0)
    # Nothing of that was registered.
    add.variant(gpu * 2)(lambda a, b: a * b)
    # What takes anything may be anything, and what comes on top has a default.
    add.variant(gpu * 3)(lambda *all: sum(all))
    add.variant(gpu * 4)(lambda a, b=2, c=3, *, d=4: a + b + c + d)


def test_a_body_may_be_registered_for_several_sets() -> None:
    add = ch.task(lambda a: ("base", a))

    @add.variant(gpu)
    @add.variant(gpu * 2)
    def body(a: int) -> tuple[str, int]:
        return "variant", a

    assert body(1) == ("variant", 1)
    with ch.Runtime(machine(2)):
        for placement in (gpu, gpu * 2):
            assert add.options(placement=placement)(2).result(timeout=60) == ("variant", 2)


def test_needs_of_a_variant_bound_what_runs_at_once() -> None:
    with ch.Runtime(machine(1)):
        large = ch.task(lambda: "base")
        large.variant(gpu.require(memory="65MiB"))(lambda: "variant")
        with pytest.raises(ch.PlacementError, match="bytes wanted"):
            large.options(placement=gpu)()
        # The machine can serve the base alone.
        assert {large().result(timeout=60) for _ in range(8)} == {"base"}


def test_functions_with_variants_are_collected() -> None:
    class Big:
        pass

    alive = weakref.WeakSet[Big]()

    def make() -> None:
        big = Big()
        alive.add(big)
        function = ch.task(lambda: (big, function), cost=lambda: len([big, function]))
        function.variant(gpu, cost=lambda: len([big, function]))(lambda: (big, function))
        with ch.Runtime(machine(1), workers=0):
            function().result()

    make()
    gc.collect()
    assert not alive


# ---- plain functions -----------------------------------------------------------------------------


@ch.specialize
def place(x: int) -> tuple[str, int]:
    """Tells the body."""
    return "base", x


@place.variant(gpu)
def _(x: int) -> tuple[str, int]:
    return "one", x


@place.variant([gpu * 2, gpu * 3])
def _(x: int) -> tuple[str, int]:
    return "range", x


@place.variant(gpu * 3)
def _(x: int) -> tuple[str, int]:
    return "three", x


@place.variant(cpu * 2)
def _(x: int) -> tuple[str, int]:
    return "cores", x


def test_a_specialized_function_runs_the_body_of_the_tasks_set() -> None:
    assert place(1) == ("base", 1)
    assert place.fn(1) == ("base", 1)
    assert (place.__name__, place.__doc__) == ("place", "Tells the body.")
    with ch.Runtime(machine(4), workers=2):
        assert place(x=2) == ("base", 2)
        for placement, name in (
            (cpu, "base"),
            (cpu * 2, "cores"),
            (cpu.all, "cores"),
            (gpu, "one"),
            (gpu * 2, "range"),
            (gpu * 3, "three"),
            (gpu.all, "base"),
        ):

            @ch.spawn(placement=placement)
            def inside() -> tuple[str, int]:
                return place(3)

            assert inside.result(timeout=60) == (name, 3)
            # It is a body too.
            assert ch.task(place, placement=placement)(3).result() == (name, 3)
        nothing = ch.spawn(share=0)(lambda: place(4))
        assert nothing.result() == ("base", 4)


def test_a_specialized_function_without_a_base() -> None:
    @ch.specialize(base=False)
    def only(x: int) -> str:
        raise AssertionError

    only.variant(gpu)(lambda x: "one")
    with pytest.raises(ch.PlacementError, match="outside of tasks: no variant of only"):
        only(1)
    with ch.Runtime(machine(2)):
        assert ch.spawn(placement=gpu)(lambda: only(1)).result(timeout=60) == "one"
        with pytest.raises(ch.PlacementError, match=r"\(gpu\(0\), gpu\(1\)\): no variant of only"):
            ch.spawn(placement=gpu * 2)(lambda: only(1)).result(timeout=60)
        with pytest.raises(ch.PlacementError, match="cpu: no variant of only"):
            ch.spawn(lambda: only(1)).result()
        # One that comes later serves later calls.
        only.variant(cpu)(lambda x: "core")
        assert ch.spawn(lambda: only(1)).result() == "core"


def test_what_cannot_be_specialized() -> None:
    with pytest.raises(TypeError, match="plain function"):
        ch.specialize(anything(ch.task(int)))
    with pytest.raises(TypeError, match="plain function"):
        ch.specialize(anything(3))
    with pytest.raises(TypeError, match="write @staticmethod above @specialize"):
        ch.specialize(anything(staticmethod(len)))
    with pytest.raises(TypeError, match="base is True or False"):
        ch.specialize(base=anything(0))
    with pytest.raises(ch.VariantError, match="place has a variant for gpu already"):
        place.variant(gpu)(lambda x: ("again", x))
    with pytest.raises(ch.VariantError, match="its variant"):
        place.variant(gpu * 9)(anything(lambda y: y))
