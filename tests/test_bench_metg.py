"""METG: patterns of dependence, and the level that a curve crosses."""

from __future__ import annotations

import math

import pytest

from charioteer import cli, gpu, graphs
from charioteer.bench import metg_runs as metg
from charioteer.bench import runners
from charioteer.bench.harness import OURS, Missing

pytestmark = pytest.mark.surface


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("independent", ()),
        ("chains", (3,)),
        ("stencil", (2, 3, 4)),
        ("sweep", (2, 3)),
        ("nearest", (1, 2, 3, 4, 5)),
        ("all_to_all", tuple(range(8))),
    ],
)
def test_what_a_task_of_the_second_step_depends_on(name: str, needs: tuple[int, ...]) -> None:
    graph = graphs.make(name, 8, 2)
    assert len(graph) == 16
    assert graph.before[8 + 3] == needs


def test_a_butterfly_reaches_everybody_in_as_many_steps_as_it_has_bits() -> None:
    graph = graphs.make("fft", 8, 4)
    reached: list[set[int]] = [{x} for x in range(8)]
    for index in range(8, len(graph)):
        reached.append(set().union(*(reached[at] for at in graph.before[index])))
    assert reached[8 + 3] == {2, 3, 4}
    assert all(ends == set(range(8)) for ends in reached[-8:])


def test_a_tree_fans_out_to_its_width() -> None:
    graph = graphs.make("tree", 4, 4)
    assert [len(level) for level in graph.levels] == [1, 2, 4, 4]
    assert graph.before[1:] == ((0,), (0,), (1,), (1,), (2,), (2,), (3,), (4,), (5,), (6,))


def test_where_a_curve_crosses_a_level() -> None:
    curve = [(8.0, 0.95), (4.0, 0.9), (2.0, 0.7), (1.0, 0.3)]
    assert metg.crossing(curve, 0.7) == pytest.approx(2.0)
    assert metg.crossing(curve, 0.5) == pytest.approx(math.sqrt(2.0))
    assert metg.crossing(curve, 0.2) == 1.0
    assert metg.crossing(curve, 0.99) is None
    assert metg.crossing([], 0.5) is None
    # What is longer and less efficient was disturbed.
    assert metg.crossing([(8.0, 0.4), *curve[1:]], 0.5) == pytest.approx(math.sqrt(2.0))
    assert metg.crossing([(8.0, 0.95), (4.0, 0.3), (2.0, 0.7), (1.0, 0.3)], 0.7) == 2.0


@pytest.mark.parametrize("work", ["bodies", "bodies in places"])
def test_a_graph_on_devices(work: runners.Work) -> None:
    graph = graphs.sized("stencil", 48, 12)
    with runners.Devices("virtual:3", work, 2) as on:
        before = [on.runtime.stats()["devices"][gpu(at)]["operations"] for at in range(3)]
        outcome = on.run(graph, 1e-3)
        after = [on.runtime.stats()["devices"][gpu(at)]["operations"] for at in range(3)]
        made = [b - a for a, b in zip(before, after, strict=True)]
    # No device does more than one task at a time, and each task takes a millisecond of one.
    assert outcome.seconds >= len(graph) * 1e-3 / on.gpus
    if work == "bodies in places":
        assert min(made) >= len(graph) // 3


def test_devices_that_run_no_graphs() -> None:
    with pytest.raises(Missing, match="no GPU"):
        runners.Devices("virtual:0", "bodies", 1)
    with pytest.raises(Missing, match="no kernels"):
        runners.Devices("virtual:1", "kernels", 1)


def test_a_run_on_devices() -> None:
    sample = metg.sample(OURS, "stencil", 2, 1e-3, "virtual:2")
    assert sample.values.keys() == {"METG(50%)", "METG(90%)"}
    assert sample.curve[0][0] >= 1e3 and len(sample.curve) > 1


@pytest.mark.parametrize(
    "wrong", [["--devices", "virtual:x"], ["--peers", "threadpool", "--devices", "virtual:2"]]
)
def test_options_of_devices_that_do_not_fit(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "metg", *wrong]) == 2
    assert wrong[0] in capsys.readouterr().err
