"""METG: patterns of dependence, and the level that a curve crosses."""

from __future__ import annotations

import math

import pytest

from charioteer import graphs
from charioteer.bench import metg_runs as metg

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
