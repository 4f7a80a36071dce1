"""The benchmark of policies: its graphs, bounds and counts, on small cases."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest

import charioteer as ch
from charioteer import graphs
from charioteer.bench import movement, policies
from charioteer.graphs import Graph, Site


def made(name: str) -> Graph:
    makes: dict[str, Callable[[random.Random], Graph]] = {
        "cholesky": functools.partial(policies.cholesky, 5),
        "stencil": functools.partial(policies.stencil, 4, 6),
        "reduction": functools.partial(policies.reduction, 21),
        "random": functools.partial(policies.any_graph, 60),
    }
    return makes[name](random.Random(3))


GRAPHS = ("cholesky", "stencil", "reduction", "random")


def test_graphs_are_what_they_are_called() -> None:
    assert [len(made(name)) for name in GRAPHS] == [35, 24, 41, 60]
    for name in GRAPHS:
        for place, node in enumerate(made(name)):
            assert all(0 <= one < place for one in node.after)
            assert node.seconds > 0
    kinds = [node.kind for node in made("cholesky")]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "potrf": 5,
        "trsm": 10,
        "syrk": 10,
        "gemm": 10,
    }
    [last] = [place for place, node in enumerate(made("cholesky")) if node.kind == "potrf"][4:]
    assert last == 34  # and nothing else is without a successor
    assert {one for node in made("cholesky") for one in node.after} == set(range(34))
    assert made("stencil").tasks[9].after == (4, 5, 6)
    assert made("stencil").tasks[8].after == (4, 5)
    # In a tree everything but the root has one successor.
    assert sorted(one for node in made("reduction") for one in node.after) == list(range(40))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("policy", policies.POLICIES)
def test_no_schedule_comes_below_the_bound(name: str, policy: str) -> None:
    graph = made(name)
    makespan = policies.run_graph(graph, 3, policies.POLICIES[policy])
    work = sum(node.seconds for node in graph)
    # The clock counts whole nanoseconds.
    assert graphs.bounds(graph, Site(0, 3)).makespan - 1e-6 <= makespan <= work + 1e-6
    assert policies.run_graph(graph, 3, policies.POLICIES[policy]) == makespan
    assert (
        graphs.bounds(graph, Site(0, 3)).makespan
        <= graphs.list_schedule(graph, Site(0, 3)).makespan
        <= work
    )


def test_the_default_policy_finds_the_fastest_sets() -> None:
    sample = policies.run_variants(30, "eft", seed=0)
    assert sample.values[policies.FASTEST] >= 90
    assert 1 < sample.values[policies.EXCESS] < 1.3
    anything = policies.run_variants(30, "random", seed=0)
    assert anything.values[policies.EXCESS] > sample.values[policies.EXCESS]


@pytest.mark.parametrize("bound", [0, 4, 32, 128])
def test_nobody_in_the_mix_is_overtaken_by_more_than_the_bound(bound: int) -> None:
    sample = policies.run_mix(600, bound, "eft", seed=1)
    assert 0.4 < sample.values[policies.UTILISATION] <= 1
    most = sample.values[policies.OVERTAKEN]
    assert most <= bound
    assert bound > 32 or most >= bound - 3  # it is made use of


def test_overtaking_is_counted_as_one_would() -> None:
    chance = random.Random(5)
    for _ in range(50):
        widths = [chance.choice((1, 2, 4, 8)) for _ in range(12)]
        grants = chance.sample(range(12), 12)
        slow = max(
            sum(widths[other] for other in grants[:place] if other > task)
            for place, task in enumerate(grants)
        )
        assert policies.overtaken(grants, widths) == slow


def test_every_bar_is_held() -> None:
    held = {
        (measure.name, bar.case, bar.metric): bar.text
        for measure in policies.measures()
        for bar in measure.bars
    }
    calls = "3 functions, 4 sizes, 400 calls each"
    mix = "10,000 tasks, overtaken by {} device-times at most"
    assert held == {
        ("variants", calls, "calls with the fastest set"): "≥ 95 %",
        ("variants", calls, "time / oracle"): "≤ 1.05 x",
        ("mix", mix.format(32), "utilisation"): "≥ 0.88",
        ("mix", mix.format(32), "overtaken by at most"): "≤ 32",
        ("mix", mix.format(128), "utilisation"): "≥ 0.95",
        ("mix", mix.format(128), "overtaken by at most"): "≤ 128",
    }
    assert [measure.name for measure in policies.measures()] == list(policies.STILL)


def test_data_that_move_find_their_machine_shrunk() -> None:
    machine = movement.load(movement.default_machine())
    host, peer = machine.links.host, machine.links.peer
    assert peer is not None
    assert host.bandwidth == 25e9 / movement.SHRUNK and host.latency == 8e-6
    assert peer.bandwidth == 200e9 / movement.SHRUNK
    assert [gpu.memory for gpu in machine.gpus] == [64 << 20] * 4
    with pytest.raises(ValueError, match="cannot be shrunk"):
        ch.Machine.virtual(memory=1000).shrunk(1001)


def test_no_schedule_comes_below_the_bound_where_data_move() -> None:
    machine = movement.load(movement.default_machine())
    first, second = movement.tile(0), movement.tile(1)
    copy = 8e-6 + movement.TILE * movement.SHRUNK / 25e9
    job = functools.partial(movement.Job, "node", 1e-3)

    def bound(*jobs: movement.Job) -> float:
        return movement.bound(movement.Graph(4 * movement.ROWS, list(jobs)), machine)

    assert bound(job(first, ())) == pytest.approx(copy + 1e-3)
    assert bound(job(first, (), fresh=True)) == pytest.approx(1e-3)
    # Both tiles come over one link, and the second task reads what the first wrote.
    pair = (job(first, (second,)), job(second, (first,)))
    assert bound(*pair) == pytest.approx(2 * copy + 2e-3)
    # Eight tiles over four links, four devices.
    many = [job(movement.tile(at), ()) for at in range(8)]
    assert bound(*many) == pytest.approx(max(2 * copy, copy + 1e-3) + 1e-3)


def test_more_data_than_memory_moves_what_belady_moves() -> None:
    machine = movement.load(movement.default_machine())
    sample = movement.evict(movement.cyclic(6, writes=True), machine, 4)
    # Each turn but the first finds three of six tiles at most, and what goes is written home.
    assert sample.values["bytes / Belady"] == 1.0
    assert sample.values["moved"] > 2 * 6 * movement.TILE * movement.SHRUNK / 1e9


def test_graphs_whose_data_move_run_under_every_policy() -> None:
    machine = movement.load(movement.default_machine())
    graph = movement.stencil(4, 3, 1, True, random.Random(1))
    assert len(graph.jobs) == 16
    for policy in policies.POLICIES.values():
        outcome = movement.run_graph(graph, machine, policy)
        assert outcome.makespan >= movement.bound(graph, machine)
        assert outcome.moved >= outcome.busiest >= 0
