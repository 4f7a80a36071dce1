"""METG: patterns of dependence, and the level that a curve crosses."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from charioteer import cli, gpu, graphs
from charioteer.bench import metg_runs as metg
from charioteer.bench import runners
from charioteer.bench.harness import OURS, Missing
from charioteer.graphs import Shape

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


ON_RAY = """
import json, os, sys, time
from pathlib import Path
from charioteer import graphs
from charioteer.bench import runners

def writing(path):
    def body():
        begin = time.monotonic_ns()
        time.sleep(0.002)
        line = f"{begin} {time.monotonic_ns()} {os.getpid()}\\n"
        with open(path, "a") as file:
            file.write(line)
    return body

def failing():
    raise ValueError("thirteen")

name, folder = sys.argv[1], Path(sys.argv[2])
failed = None
with runners.PEERS[name].opened(2) as run:
    wide, narrow = graphs.make("all_to_all", 4, 3), graphs.make("all_to_all", 2, 4)
    for number, graph in enumerate((wide, wide, narrow)):
        assert run(graph, writing(folder / str(number))).seconds > 0
    try:
        run(narrow, failing)
    except ValueError as error:
        failed = str(error)
    assert run(narrow, int).seconds > 0
print(json.dumps(failed))
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["ray", "ray-actors", "ray-compiled"])
def test_ray_keeps_the_order_of_graphs(name: str, tmp_path: Path) -> None:
    # A peer is an extra: what is measured without it says so, which other tests assert.
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    # In a process of its own, since Ray leaves threads and sockets behind.
    done = subprocess.run(
        [sys.executable, "-P", "-c", ON_RAY, name, str(tmp_path)],
        capture_output=True,
        check=False,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    assert "thirteen" in json.loads(done.stdout.splitlines()[-1])
    for number, (width, steps) in enumerate(((4, 3), (4, 3), (2, 4))):
        lines = (tmp_path / str(number)).read_text().splitlines()
        spans = sorted(tuple(map(int, line.split())) for line in lines)
        # Ray's tasks are run once more before the clock starts, to warm up, ten a worker.
        warming = 20 if name == "ray" else 0
        assert len(spans) == warming + width * steps
        spans = spans[warming:]
        ends = sorted(end for _, end, _ in spans)
        for at, (begin, _, _) in enumerate(spans):
            before = at // width * width
            assert sum(end <= begin for end in ends) >= before
        if name != "ray":  # whose scheduler may leave all to one
            assert len({process for _, _, process in spans}) == 2


def test_a_place_has_its_part_of_every_row() -> None:
    assert runners._places(graphs.make("stencil", 4, 2), 2) == [0, 0, 1, 1, 0, 0, 1, 1]
    assert runners._places(graphs.make("tree", 4, 3), 3) == [0, 0, 1, 0, 0, 1, 2]


def test_a_peer_gets_no_more_tasks_than_it_can_do_with(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    @contextmanager
    def opened(workers: int) -> Iterator[runners.Run]:
        def run(graph: Shape, body: runners.Body) -> runners.Outcome:
            given.append(len(graph))
            return runners.Outcome(len(graph) * 1e-9)

        yield run

    for most in (None, 200):
        peer = runners.Peer("a peer", opened, "", most)
        monkeypatch.setattr(metg, "PEERS", {"peer": peer})
        sample = metg.sample("peer", "stencil", 1, 0.01)
        assert sample.values["METG(50%)"] < 1
    shortest, limited = given[: len(given) // 2], given[len(given) // 2 :]
    assert max(shortest) > 1_000
    assert max(limited) == 200 and limited[0] == shortest[0]


@pytest.mark.parametrize(
    "wrong", [["--devices", "virtual:x"], ["--peers", "threadpool", "--devices", "virtual:2"]]
)
def test_options_of_devices_that_do_not_fit(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "metg", *wrong]) == 2
    assert wrong[0] in capsys.readouterr().err
