"""Does every placement have one normal form, and every mistake its name?"""

from __future__ import annotations

import itertools
import re
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from support import anything

import charioteer as ch
from charioteer import cpu, gpu
from charioteer._placement import ANY as ANY_DEVICE
from charioteer._placement import CORE as ANY_CORE
from charioteer._placement import WHOLE, Choice, resolve
from charioteer._variants import BASE
from charioteer.devices import Alternative, Member, normal


def one(*members: Member, memory: int | None = None, share: float | None = None) -> Any:
    return (Alternative(members, memory, share),)


def set_of(*members: Member, memory: int | None = None, share: float | None = None) -> Any:
    return (Alternative(members, memory, share, gathers=True),)


ANY, ALL = Member("gpu", None, 1), Member("gpu", None, None)
CORE = Member("cpu", None, 1)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (cpu, one(CORE)),
        (gpu, one(ANY)),
        (gpu(3), one(Member("gpu", 3, 1))),
        (gpu * 2, set_of(Member("gpu", None, 2))),
        (2 * gpu, set_of(Member("gpu", None, 2))),
        (gpu.all, set_of(ALL)),
        ((gpu, gpu), set_of(Member("gpu", None, 2))),
        ((gpu,), set_of(ANY)),
        ((cpu, gpu), set_of(CORE, ANY)),
        ((gpu, cpu, gpu), set_of(ANY, CORE, ANY)),
        ((gpu(0), gpu(3)), set_of(Member("gpu", 0, 1), Member("gpu", 3, 1))),
        ((gpu(1), gpu), set_of(Member("gpu", 1, 1), ANY)),
        ((cpu * 2, gpu.all), set_of(Member("cpu", None, 2), ALL)),
        ([gpu, cpu], one(ANY) + one(CORE)),
        ([gpu, [cpu, [gpu]]], one(ANY) + one(CORE)),
        (gpu * range(1, 3), set_of(ANY) + set_of(Member("gpu", None, 2))),
        (gpu.require(memory="1GiB"), one(ANY, memory=2**30)),
        (gpu(0).require(share=0.5), one(Member("gpu", 0, 1), share=0.5)),
        ((gpu * 2).require(memory=5, share=0), set_of(Member("gpu", None, 2), memory=5, share=0.0)),
        (gpu.require(share=1).require(memory=7), one(ANY, memory=7, share=1.0)),
        (ch.Requirement((cpu, gpu), share=0.5), set_of(CORE, ANY, share=0.5)),
    ],
    ids=repr,
)
def test_the_normal_form(placement: Any, expected: Any) -> None:
    found = normal(placement)
    assert found == expected
    assert hash(found) == hash(expected)


@pytest.mark.parametrize(
    ("placement", "says"),
    [
        (lambda: (gpu(0), gpu(0)), r"gpu\(0\) is in the set twice"),
        (lambda: (gpu(1), cpu, gpu(1)), r"gpu\(1\) is in the set twice"),
        (lambda: (gpu.all, gpu), "room for no more"),
        (lambda: (gpu(0), gpu.all), "room for no more"),
        (lambda: (), "at least one device"),
        (list, "at least one"),
        (lambda: [cpu, []], "at least one"),
        (lambda: gpu * range(3, 3), "at least one"),
        (lambda: [cpu, (gpu(0), gpu(0))], "twice"),
        (lambda: gpu * 0, "between 1 and 65535, not 0"),
        (lambda: gpu * -1, "not -1"),
        (lambda: gpu * 65_536, "not 65536"),
        (lambda: (gpu * 40_000, gpu * 40_000), "at most 65535"),
        (lambda: gpu(-1), "not -1"),
        (lambda: gpu(70_000), "not 70000"),
        (lambda: ch.Kind("tpu"), "'tpu' is no kind of device: there are cpu, gpu"),
        (lambda: gpu.require(memory=-1), "not negative"),
        (lambda: gpu.require(memory=2**63), "at most"),
        (lambda: gpu.require(memory="1 hedgehog"), "'1 hedgehog'"),
        (lambda: gpu.require(memory="0.3B"), "whole number of bytes"),
        (lambda: gpu.require(share=-0.1), "between 0 and 1, not -0.1"),
        (lambda: gpu.require(share=1.5), "not 1.5"),
        (lambda: gpu.require(share=float("nan")), "not nan"),
        (lambda: (cpu, gpu.require(share=0.5)), "for the whole set"),
        (lambda: ch.Requirement((gpu(0), gpu(0)), share=1), "twice"),
        (lambda: ch.DeviceSet(gpu, 0), "not 0"),
        (lambda: ch.Device(gpu, -1), "not -1"),
    ],
)
def test_what_nothing_can_serve(placement: Any, says: str) -> None:
    with pytest.raises(ch.PlacementError, match=says):
        normal(placement())


@pytest.mark.parametrize(
    "placement",
    [
        lambda: "gpu",
        lambda: 3,
        lambda: None,
        lambda: {gpu},
        lambda: ((gpu, cpu), gpu),
        lambda: ([gpu], cpu),
        lambda: (gpu, "cpu"),
        lambda: ["gpu"],
        lambda: gpu * anything(1.0),
        lambda: gpu * anything("2"),
        lambda: gpu * anything(True),
        lambda: gpu * anything(None),
        lambda: gpu(anything("0")),
        lambda: gpu(anything(0.0)),
        lambda: gpu.require(memory=anything(1e9)),
        lambda: gpu.require(memory=anything(True)),
        lambda: gpu.require(share=anything("half")),
        lambda: ch.Requirement(anything([gpu]), share=1),
    ],
)
def test_what_is_no_placement(placement: Any) -> None:
    with pytest.raises(TypeError):
        normal(placement())


def test_reasons_per_alternative() -> None:
    with pytest.raises(ch.PlacementError) as info:
        resolve(normal([gpu, (cpu, gpu), cpu(0), cpu.require(share=0.5)]), (4, 0), None, None)
    reasons = str(info.value).split("; ")
    assert [reason.partition(":")[0] for reason in reasons] == [
        "gpu",
        "(cpu, gpu)",
        "cpu(0)",
        "cpu",
    ]


def test_what_the_machine_lacks_is_no_choice(rt: ch.Runtime) -> None:
    assert ch.spawn(placement=[gpu, cpu])(lambda: len(ch.current().devices)).result() == 1
    with pytest.raises(ch.PlacementError, match="gpu: the machine has no gpu"):
        ch.spawn(placement=gpu)(int)
    choice = normal([gpu, cpu * 3, (cpu, cpu), cpu.all, cpu * 5])
    cores = [Choice([ANY_CORE] * count, WHOLE, 0, BASE, False, "") for count in (3, 2, 4)]
    assert resolve(choice, (4, 0), None, None) == cores
    first = resolve(choice, (4, 1), 7, 0.5)[0]
    assert first == Choice([ANY_DEVICE], WHOLE // 2, 7, BASE, False, "")


DEVICES = [cpu, gpu, gpu(0), gpu(1), cpu(2), gpu * 2, cpu * 3, gpu.all, cpu.all]
SETS = st.lists(st.sampled_from(DEVICES), min_size=1, max_size=4).map(tuple)
CHOICES = st.recursive(
    st.sampled_from(DEVICES) | SETS, lambda inner: st.lists(inner, min_size=1, max_size=3)
)


def places(members: tuple[Member, ...]) -> list[tuple[str, int | None]]:
    return [
        place
        for kind, index, count in members
        for place in [(kind, index if count is not None else -1)] * (count or 1)
    ]


@given(SETS)
def test_a_set_keeps_its_order_or_is_refused(devices: Any) -> None:
    parts = [normal(device)[0].members for device in devices]
    flat = [place for part in parts for place in places(part)]
    named = [place for place in flat if place[1] is not None and place[1] >= 0]
    crowded = any(
        (kind, -1) in flat and sum(place[0] == kind for place in flat) > 1
        for kind in ("cpu", "gpu")
    )
    if crowded or len(set(named)) < len(named):
        with pytest.raises(ch.PlacementError):
            normal(devices)
        return
    ((members, memory, share, _),) = normal(devices)
    assert places(members) == flat
    assert (memory, share) == (None, None)


@given(CHOICES)
def test_lists_are_flat_and_without_repetition(placement: Any) -> None:
    def leaves(placement: Any) -> list[Any]:
        if isinstance(placement, list):
            return list(itertools.chain.from_iterable(map(leaves, placement)))
        return [placement]

    try:
        found = normal(placement)
    except ch.PlacementError:
        return
    assert found == tuple(dict.fromkeys(normal(leaf)[0] for leaf in leaves(placement)))


@pytest.mark.parametrize(
    "value",
    [
        *(gpu, gpu(1), gpu * 3, gpu.all, gpu.require(memory=1), (gpu * 2).require(share=0.5)),
        ch.Requirement((gpu, cpu), memory=1, share=0),
    ],
    ids=repr,
)
def test_what_is_shown_can_be_written(value: Any) -> None:
    assert eval(repr(value), vars(ch)) == value
    assert re.fullmatch(r"[^<>]+", repr(value))
