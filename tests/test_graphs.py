"""Task graphs: patterns, analysis, and runs that are proved right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import charioteer as ch
from charioteer import graphs
from charioteer.graphs import Block, Graph, GraphError, Need, Site, Task, running
from charioteer.graphs.analysis import critical_path, ranks
from charioteer.graphs.shapes import reduction

pytestmark = pytest.mark.surface

SIMULATED = ch.Machine.virtual(gpus=4, time="virtual")
SEEDS = 3
"""Of each pattern, in the lanes; the benchmark of graphs has a hundred."""


def small(name: str, tasks: int = 60, seed: int = 0) -> graphs.Shape:
    return graphs.sized(name, tasks, 6, seed)


# ---- patterns ----


@pytest.mark.parametrize("name", graphs.PATTERNS)
@pytest.mark.parametrize("width", [1, 2, 7, 16])
def test_tasks_of_a_pattern_depend_on_earlier_ones_alone(name: str, width: int) -> None:
    depth = 5 if graphs.PATTERNS[name].has_depth else None
    shape = graphs.make(name, width, depth, seed=2)
    assert len(shape) > 0
    for index, before in enumerate(shape.before):
        assert len(set(before)) == len(before)
        assert all(0 <= at < index for at in before)
    for told in (shape.kinds, shape.names):
        assert len(told) in (0, len(shape))
    assert len(set(shape.names)) == len(shape.names)
    assert graphs.make(name, width, depth, seed=2) == shape


@pytest.mark.parametrize("name", graphs.PATTERNS)
@pytest.mark.parametrize("tasks", [1, 10, 100, 1000])
def test_sized_patterns_have_about_as_many_tasks(name: str, tasks: int) -> None:
    shape = graphs.sized(name, tasks, 16)
    row = {"map_reduce": 20, "reduction_scatter": 17, "tree": 31}.get(name, 16)
    assert tasks / 3 - row <= len(shape) <= max(tasks, row)


def test_rows_depend_on_the_row_before() -> None:
    for name, needs in {
        "independent": (),
        "chains": (3,),
        "stencil": (2, 3, 4),
        "sweep": (2, 3),
        "nearest": (1, 2, 3, 4, 5),
        "all_to_all": tuple(range(8)),
    }.items():
        assert graphs.make(name, 8, 2).before[8 + 3] == needs, name


def test_a_square_stencil_has_four_neighbours() -> None:
    shape = graphs.make("stencil2d", 10, 2)
    assert len(shape) == 18
    assert shape.before[9 + 4] == (1, 3, 4, 5, 7)
    assert shape.before[9] == (0, 1, 3)


def test_a_butterfly_reaches_everybody_in_as_many_steps_as_it_has_bits() -> None:
    shape = graphs.make("fft", 8, 4)
    reached: list[set[int]] = [{x} for x in range(8)]
    for before in shape.before[8:]:
        reached.append(set().union(*(reached[at] for at in before)))
    assert reached[8 + 3] == {2, 3, 4}
    assert all(ends == set(range(8)) for ends in reached[-8:])


@pytest.mark.parametrize(("width", "fan"), [(1, 2), (8, 2), (13, 3), (100, 7)])
def test_a_reduction_reads_each_result_once(width: int, fan: int) -> None:
    shape = reduction(width, fan)
    read = sorted(at for before in shape.before for at in before)
    assert read == list(range(len(shape) - 1))
    assert max(map(len, shape.before)) <= fan
    with pytest.raises(ValueError, match="fan of two"):
        reduction(width, 1)


def test_a_scatter_is_a_reduction_the_other_way_round() -> None:
    shape = graphs.make("scatter", 13)
    assert [len(before) for before in shape.before] == [0] + [1] * 24
    after = [0] * len(shape)
    for [before] in shape.before[1:]:
        after[before] += 1
    assert sorted(after) == [0] * 13 + [2] * 12


def test_factorizations_have_the_tasks_of_the_literature() -> None:
    for name, counts in {
        "cholesky": {"potrf": 5, "trsm": 10, "syrk": 10, "gemm": 10},
        "lu": {"getrf": 5, "trsm": 20, "gemm": 30},
        "qr": {"geqrt": 5, "unmqr": 10, "tsqrt": 10, "tsmqr": 30},
    }.items():
        kinds = list(graphs.make(name, 5).kinds)
        assert {kind: kinds.count(kind) for kind in counts} == counts
        assert len(kinds) == sum(counts.values())
    # Of n tiles the longest chains have 3 n - 2 tasks.
    assert [len(graphs.make(name, 5).levels) for name in ("cholesky", "lu", "qr")] == [13, 13, 13]


def test_seeds_decide_where_chance_does() -> None:
    for name in ("dag", "random"):
        first = graphs.make(name, 8, 8, 1)
        assert first == graphs.make(name, 8, 8, 1)
        assert first != graphs.make(name, 8, 8, 2)


def test_what_is_no_pattern_is_refused() -> None:
    for arguments, words in {
        ("nonsense", 3, 3): "no pattern 'nonsense'",
        ("stencil", 3, None): "needs a depth",
        ("cholesky", 3, 3): "follows from its width",
        ("stencil", 0, 3): "1 or more",
    }.items():
        with pytest.raises(ValueError, match=words):
            graphs.make(*arguments)


# ---- descriptions ----


def test_places_are_parsed() -> None:
    assert graphs.parse_on("gpu*2 | cpu+gpu | gpu(1) = 0.5") == (
        (("gpu", "gpu"), ("cpu", "gpu"), ("gpu(1)",)),
        0.5,
    )
    for text in ("", "tpu", "gpu*0", "gpu*x", "gpu=0", "gpu=x", "gpu=nan", "gpu+", "gpu(x)"):
        with pytest.raises(GraphError):
            graphs.parse_on(text)


def test_weights_share_the_tasks_out() -> None:
    graph = graphs.describe(small("independent", 2000), on=["gpu=0.9", "gpu*2=0.1"], seed=4)
    wide = sum(task.needs[0].gpus == 2 for task in graph)
    assert 120 < wide < 280


def test_times_vary_by_as_much_as_is_said() -> None:
    times = [t.seconds for t in graphs.describe(small("dag", 500), seconds=1.0, vary=0.25)]
    assert 0.75 <= min(times) < 0.8 < 1.2 < max(times) <= 1.25
    kinds = graphs.describe(small("cholesky"), times={"gemm": 5.0})
    assert {task.seconds for task in kinds if task.kind == "gemm"} == {5.0}
    assert {task.seconds for task in kinds if task.kind != "gemm"} == {1e-3}


def test_data_follows_the_dependencies() -> None:
    graph = graphs.describe(small("stencil"), size=64)
    assert len(graph.blocks) == len(graph)
    for index, task in enumerate(graph):
        assert task.reads == task.after
        assert task.writes == (index,)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Need(("tpu",)), "no place"),
        (lambda: Need(()), "one place"),
        (lambda: Need(share=0), "share"),
        (lambda: Need(share=1.5), "share"),
        (lambda: Need(seconds=float("nan")), "seconds"),
        (lambda: Need(held=2), "held"),
        (lambda: Need(slices=0), "slices"),
        (lambda: Need(memory=-1), "memory"),
        (lambda: Block(0), "size"),
        (lambda: Block(1, "gpu"), "one device"),
        (lambda: Graph("g", (Task((0,), ()),)), "no place to run"),
        (lambda: Graph("g", (Task((0,), (Need(),), (0,)),)), "not before"),
        (lambda: Graph("g", (Task((0,), (Need(), Need())),)), "twice"),
        (lambda: Graph("g", (Task((0,), (Need(),)), Task((0,), (Need(),)))), "two tasks"),
        (lambda: Graph("g", (Task((0,), (Need(),), reads=(0,)),)), "block 0 of 0"),
        (
            lambda: Graph("g", (Task((0,), (Need(),), reads=(0,), writes=(0,)),), (Block(8),)),
            "twice",
        ),
        (lambda: Graph("a\nb", ()), "printed"),
        (lambda: graphs.describe(small("dag"), vary=1), "vary"),
        (lambda: graphs.describe(small("dag"), on=()), "somewhere"),
        (lambda: graphs.describe(small("dag"), seconds=[1.0]), "times for"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, words: str) -> None:
    with pytest.raises(GraphError, match=words):
        make()


# ---- analysis ----


def chain(*seconds: float) -> Graph:
    tasks = (
        Task((i,), (Need(("gpu",), time),), (i - 1,) if i else ()) for i, time in enumerate(seconds)
    )
    return Graph("chain", tuple(tasks))


def test_bounds_and_schedules_of_small_graphs() -> None:
    four = Site(0, 4)
    for graph, site, makespan in (
        (chain(1.0, 2.0, 3.0), four, 6.0),
        (graphs.describe(graphs.make("independent", 8, 1), on=["gpu"], seconds=1.0), four, 2.0),
    ):
        assert graphs.bounds(graph, site).makespan == makespan
        assert graphs.list_schedule(graph, site).makespan == makespan
    # The chain goes first, or it would end at 4.
    one = Need(("gpu",), 1.0)
    mixed = Graph(
        "mixed",
        (
            *(Task((i,), (one,)) for i in range(3)),
            Task((3,), (Need(("gpu",), 2.0),), (2,)),
        ),
    )
    assert graphs.bounds(mixed, Site(0, 2)).makespan == 3.0
    assert graphs.list_schedule(mixed, Site(0, 2)).makespan == 3.0
    assert critical_path(mixed) == [2, 3]
    assert ranks(mixed) == [1.0, 1.0, 3.0, 2.0]


def test_shares_sets_and_single_devices_are_scheduled() -> None:
    def of(*needs: Need) -> Graph:
        return Graph("g", tuple(Task((i,), (need,)) for i, need in enumerate(needs)))

    half = Need(("gpu",), 1.0, share=0.5)
    assert graphs.list_schedule(of(*[half] * 4), Site(0, 2)).makespan == 1.0
    pair = Need(("gpu", "gpu"), 1.0)
    assert graphs.list_schedule(of(pair, pair), Site(0, 3)).makespan == 2.0
    assert graphs.bounds(of(pair, pair), Site(0, 3)).makespan == pytest.approx(4 / 3)
    pinned = Need(("gpu(1)",), 1.0)
    assert graphs.list_schedule(of(pinned, pinned), Site(0, 2)).makespan == 2.0
    assert graphs.bounds(of(pinned, pinned), Site(0, 2)).makespan == 2.0
    with pytest.raises(GraphError, match="fits nowhere"):
        graphs.bounds(of(pair), Site(4, 1))
    held = Need(("cpu",), 1.0, held=0.5)
    assert graphs.bounds(of(*[held] * 8), Site(8, 0)).makespan == 4.0
    assert graphs.bounds(of(*[held] * 8), Site(8, 0), gil=False).makespan == 1.0


def test_the_faster_alternative_is_waited_for() -> None:
    needs = (Need(("cpu",), 10.0), Need(("gpu",), 1.0))
    graph = Graph("g", tuple(Task((i,), needs) for i in range(4)))
    schedule = graphs.list_schedule(graph, Site(1, 1))
    assert schedule.makespan == 4.0
    assert {slot.places for slot in schedule.slots} == {("gpu(0)",)}


def test_movement_is_part_of_a_schedule() -> None:
    def move(source: str, target: str, size: int) -> float:
        return 0.0 if source == target else size / 100

    needs = (Need(("gpu(0)",), 1.0),)
    graph = Graph("g", (Task((0,), needs, reads=(0,)), Task((1,), needs, reads=(0,))), (Block(50),))
    site = Site(1, 1, move)
    assert graphs.list_schedule(graph, site).makespan == 2.0
    # The first brings it, the second finds it.
    assert graphs.list_schedule(graph, site, moves=True).makespan == 2.5


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_no_schedule_comes_below_the_bounds(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(graphs.PATTERNS)))
    on = data.draw(
        st.lists(
            st.sampled_from(["gpu", "cpu", "gpu*2", "gpu(0)", "gpu|cpu"]), min_size=1, max_size=3
        )
    )
    seed, share = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([1.0, 0.5, 0.3]))
    graph = graphs.describe(small(name, 40, seed), on=on, vary=0.5, share=share, seed=seed)
    site = Site(2, 3)
    schedule = graphs.list_schedule(graph, site)
    assert graphs.bounds(graph, site, gil=False).makespan <= schedule.makespan + 1e-9
    for task, slot in zip(graph, schedule.slots, strict=True):
        assert all(schedule.slots[before].end <= slot.start + 1e-9 for before in task.after)
        assert slot.end - slot.start == pytest.approx(task.seconds)
    for place in site.places:
        events = sorted(
            change
            for task, slot in zip(graph, schedule.slots, strict=True)
            for part in [slot.places.count(place) * (1 if place == "cpu" else task.needs[0].share)]
            for change in ((slot.start, 1, part), (slot.end - 1e-9, 0, -part))
        )
        taken = 0.0
        for _, _, part in events:
            taken += part
            assert taken <= (site.cores if place == "cpu" else 1) + 1e-6


# ---- runs ----


@pytest.mark.parametrize("name", graphs.PATTERNS)
def test_in_virtual_time_a_run_is_near_the_list_schedule(name: str) -> None:
    for seed in range(SEEDS):
        shape = graphs.sized(name, 120, 12, seed)
        graph = graphs.describe(shape, on=["gpu"], vary=0.5, seed=seed)
        run = graphs.run(graph, machine=SIMULATED)
        offline = graphs.list_schedule(graph, Site.of(SIMULATED, 0)).makespan
        assert run.seconds <= 1.05 * offline
        assert run.seconds >= graphs.bounds(graph, Site.of(SIMULATED, 0)).makespan - 1e-6
        assert graphs.run(graph, machine=SIMULATED) == run


@pytest.mark.parametrize("movement", ["none", "lazy"])
@pytest.mark.parametrize("name", graphs.PATTERNS)
def test_sets_and_data_are_right_in_virtual_time(name: str, movement: Any) -> None:
    graph = graphs.describe(
        small(name),
        on=["gpu", "gpu*2", "gpu(1)", "gpu|gpu*2"],
        share=0.5,
        size=20_000 if movement == "lazy" else 0,
        vary=0.5,
    )
    run = graphs.run(graph, machine=SIMULATED, movement=movement)
    assert [len(one.places) for one in run.ran] != [1] * len(graph)


@pytest.mark.parametrize("movement", ["none", "lazy", "eager"])
@pytest.mark.parametrize("name", graphs.PATTERNS)
def test_runs_on_cores_are_right(name: str, movement: Any) -> None:
    graph = graphs.describe(
        small(name, 30),
        on=["cpu", "cpu*2"],
        seconds=2e-5,
        held=0.2,
        slices=2,
        size=0 if movement == "none" else 400,
    )
    run = graphs.run(
        graph, workers=2, movement=movement, calibration=graphs.Calibration(), machine=HOST
    )
    assert len(run.ran) == len(graph)
    assert run.seconds > 0


@pytest.mark.parametrize("name", graphs.PATTERNS)
def test_data_that_the_runtime_moves_to_devices_is_right(name: str) -> None:
    graph = graphs.describe(small(name), on=["gpu", "gpu(1)"], vary=0.5, size=20_000)
    run = graphs.run(graph, machine=SIMULATED, movement="eager")
    assert graphs.bounds(graph, Site.of(SIMULATED, 0)).makespan <= run.seconds + 1e-6


HOST = ch.Machine(ch.Machine.detect().host)


def test_runs_on_cores_and_devices_are_right_in_real_time() -> None:
    machine = ch.Machine.virtual(gpus=3)
    for name in ("stencil", "cholesky", "dag"):
        graph = graphs.describe(
            small(name, 40),
            on=["gpu", "gpu*2", "cpu+gpu", "cpu|gpu", "cpu"],
            seconds=5e-5,
            share=0.5,
            held=0.1,
            slices=2,
            size=4000,
        )
        run = graphs.run(graph, machine=machine, workers=2, movement="lazy")
        one_each = graphs.describe(
            small(name, 40), on=["gpu", "cpu|gpu", "cpu"], seconds=5e-5, size=4000
        )
        graphs.run(one_each, machine=machine, workers=2, movement="eager")
        assert {place[:3] for one in run.ran for place in one.places} == {"cpu", "gpu"}


def test_blocks_that_are_updated_and_live_on_devices() -> None:
    needs = (Need(("gpu",), 1e-4), Need(("gpu(1)",), 1e-4))
    graph = Graph(
        "g",
        (
            Task((0,), needs[:1], reads=(0,), updates=(1,)),
            Task((1,), needs[1:], reads=(1,), writes=(2,)),
            Task((2,), needs, after=(0,), reads=(2, 0), updates=(1,)),
        ),
        (Block(4000), Block(80, "gpu(2)"), Block(8)),
    )
    run = graphs.run(graph, machine=SIMULATED, movement="lazy")
    # By the data alone: the second task waits for the first, and the third for both.
    assert run.ran[0].end <= run.ran[1].start
    assert run.ran[1].end <= run.ran[2].start


def test_kernels_take_what_is_asked() -> None:
    calibration = graphs.calibrate(ch.Machine.virtual(gpus=1))
    assert 0 <= calibration.core < 1e-2
    assert 0 <= calibration.gpu < 1e-1
    assert graphs.calibrate(SIMULATED) == graphs.Calibration()
    graph = graphs.describe(graphs.make("chains", 1, 3), seconds=1e-3)
    run = graphs.run(graph, workers=1, machine=HOST, calibration=calibration)
    assert run.seconds >= 3 * (1e-3 - calibration.core)


def test_what_cannot_be_run_is_refused() -> None:
    cores = graphs.describe(small("dag"))
    with pytest.raises(GraphError, match="virtual time work on cores"):
        graphs.run(cores, machine=SIMULATED)
    devices = graphs.describe(small("dag"), on=["gpu*2"])
    with pytest.raises(GraphError, match="fits nowhere"):
        graphs.run(devices, machine=HOST)
    with pytest.raises(GraphError, match="eager"):
        graphs.run(devices, machine=SIMULATED, movement="eager")


# ---- proof: each way to be wrong is found ----


def a_runner(graph: Graph, movement: Any, runtime: ch.Runtime) -> running._Runner:
    needs = [task.needs for task in graph]
    return running._Runner(graph, needs, movement, runtime, graphs.Calibration())


def ran_well(movement: Any = "none") -> tuple[running._Runner, list[Any]]:
    """A run of a chain of three that was right, to be spoilt."""
    graph = graphs.describe(graphs.make("chains", 1, 3), seconds=1e-5, size=80)
    with ch.Runtime(HOST, workers=1) as runtime:
        runner = a_runner(graph, movement, runtime)
        ch.wait(runner.spawn())
    finals = [np.full(10, word, np.uint64) for word in running.expected(graph, "lazy")]
    assert runner.problems(finals) == []
    return runner, finals


def test_a_task_that_did_not_run_once_is_found() -> None:
    runner, finals = ran_well()
    runner.log.bodies[1] = 0
    runner.log.bodies[2] = 2
    assert runner.problems(finals) == ["task 1,0 ran 0 times", "task 2,0 ran 2 times"]


def test_a_task_in_the_wrong_place_is_found() -> None:
    runner, finals = ran_well()
    runner.log.places[1] = ("gpu(0)",)
    assert "task 1,0 ran on gpu(0)" in runner.problems(finals)


def test_a_task_that_began_too_early_is_found() -> None:
    runner, finals = ran_well()
    early = {place: at - 10**9 for place, at in runner.log.starts[2].items()}
    runner.log.starts[2] = early
    problems = runner.problems(finals)
    assert "task 2,0 began before the end of task 1,0" in problems
    assert any("was taken 2 times at once" in problem for problem in problems)


def test_a_task_that_did_not_end_is_found() -> None:
    runner, finals = ran_well()
    runner.log.ends[2].clear()
    assert runner.problems(finals) == ["task 2,0 did not end on all of its devices"]


def test_wrong_words_and_wrong_data_are_found() -> None:
    runner, finals = ran_well()
    runner.log.words[1] = 7
    assert runner.problems(finals) == ["task 1,0 has a wrong word"]
    runner, finals = ran_well("lazy")
    finals[2][9] += np.uint64(1)
    assert runner.problems(finals) == ["block 2 has wrong data"]


def test_one_stale_element_changes_what_follows() -> None:
    graph = graphs.describe(graphs.make("chains", 1, 3), size=80)
    right = running.expected(graph, "lazy")
    swapped = Graph(
        "g", (graph.tasks[0], replace(graph.tasks[1], reads=()), graph.tasks[2]), graph.blocks
    )
    wrong = running.expected(swapped, "lazy")
    assert right[0] == wrong[0]
    assert right[1] != wrong[1] and right[2] != wrong[2]


def test_a_run_that_is_wrong_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graphs.describe(graphs.make("chains", 1, 3), seconds=1e-5)
    monkeypatch.setattr(running, "expected", lambda *_: [0, 0, 0])
    with pytest.raises(graphs.VerificationError, match="wrong word") as caught:
        graphs.run(graph, machine=HOST, workers=1, calibration=graphs.Calibration())
    assert len(caught.value.problems) == 3


def test_the_failure_of_a_body_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graphs.describe(graphs.make("chains", 1, 3), seconds=1e-5)

    def broken(*_: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(running._Runner, "_spin", broken)
    with pytest.raises(RuntimeError, match="no kernel"):
        graphs.run(graph, machine=HOST, workers=1, calibration=graphs.Calibration())
