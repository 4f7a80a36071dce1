"""Files of graphs: what is written is read again, and what is malformed is told with its place."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import told

from charioteer import graphs
from charioteer.cli import main
from charioteer.graphs import Block, Graph, GraphError, GraphFileError, Need, Task
from charioteer.graphs.files import READERS, WRITERS

pytestmark = pytest.mark.surface

PLACES = st.sampled_from(["cpu", "gpu", "gpu(0)", "gpu(3)", "gpu(7)"])


@st.composite
def any_graph(draw: st.DrawFn, *, plain: bool = False, micro: bool = False) -> Graph:
    """A graph of up to twelve tasks; a plain one is what Parla's older format can say, and with
    ``micro`` its times are whole microseconds."""
    blocks = draw(
        st.lists(
            st.builds(
                Block,
                size=st.integers(1, 10**6).map(lambda n: 4 * n),
                home=st.just("cpu") if plain else st.sampled_from(["cpu", "gpu(0)", "gpu(6)"]),
            ),
            min_size=1,
            max_size=5,
        )
    )
    spaced = not plain and draw(st.booleans())
    tasks = []
    for index in range(draw(st.integers(0, 12))):
        seconds = st.integers(0, 10**6).map(lambda n: n * 1e-6) if micro else st.floats(0, 1000)
        if plain:
            where = draw(st.sampled_from([["cpu"], ["gpu"], ["cpu", "gpu"]]))
            slices = draw(st.integers(1, 5))
            free, each = draw(st.integers(0, 10**6)), draw(st.integers(0, 10**4))
            whole = free + slices * each
            held = slices * each / whole if whole else 0.0
            share = 1 / draw(st.integers(1, 9))
            needs = [Need((place,), whole * 1e-6, share, held, slices) for place in where]
        else:
            sets = draw(
                st.lists(
                    st.lists(PLACES, min_size=1, max_size=3).map(tuple),
                    min_size=1,
                    max_size=3,
                    unique_by=lambda one: tuple(sorted(one)),
                )
            )
            needs = [
                Need(
                    one,
                    draw(seconds),
                    draw(st.sampled_from([1.0, 0.5, 0.125])),
                    draw(st.sampled_from([0.0, 0.25, 1.0])),
                    draw(st.integers(1, 9)),
                    draw(st.integers(0, 10**9)),
                )
                for one in sets
            ]
        used = draw(st.lists(st.integers(0, len(blocks) - 1), unique=True, max_size=4))
        cut = sorted(draw(st.tuples(st.integers(0, 4), st.integers(0, 4))))
        name: tuple[int | str, ...] = (index % 3, index)
        tasks.append(
            Task(
                name=("A", *name) if spaced and index % 2 else name,
                needs=tuple(needs),
                after=tuple(
                    draw(st.lists(st.integers(0, index - 1), unique=True, max_size=3))
                    if index
                    else ()
                ),
                reads=tuple(used[: cut[0]]),
                writes=tuple(used[cut[0] : cut[1]]),
                updates=tuple(used[cut[1] :]),
            )
        )
    return Graph("graph", tuple(tasks), tuple(blocks))


def assert_alike(one: Graph, other: Graph) -> None:
    """They are equal but for the last digits of numbers."""
    assert other.blocks == one.blocks
    assert len(other) == len(one)
    for mine, its in zip(one, other, strict=True):
        for key in ("name", "after", "reads", "writes", "updates"):
            assert getattr(its, key) == getattr(mine, key), key
        assert [need.places for need in its.needs] == [need.places for need in mine.needs]
        for need, read in zip(mine.needs, its.needs, strict=True):
            assert (read.slices, read.memory) == (need.slices, need.memory)
            for key in ("seconds", "share", "held"):
                assert getattr(read, key) == pytest.approx(getattr(need, key), abs=1e-8), key


@given(any_graph())
@settings(max_examples=25, deadline=None)
def test_our_format_keeps_everything(graph: Graph) -> None:
    assert graphs.loads(graphs.dumps(graph)) == graph


@given(any_graph(micro=True))
@settings(max_examples=25, deadline=None)
def test_the_newer_format_of_parla_keeps_what_it_knows(graph: Graph) -> None:
    assert_alike(graph, graphs.loads(graphs.dumps(graph, "pgraph")))


@given(any_graph(plain=True))
@settings(max_examples=25, deadline=None)
def test_the_older_format_of_parla_keeps_what_it_knows(graph: Graph) -> None:
    assert_alike(graph, graphs.loads(graphs.dumps(graph, "gph")))


@pytest.mark.parametrize("name", graphs.PATTERNS)
def test_every_pattern_is_written_and_read(name: str) -> None:
    graph = graphs.describe(graphs.sized(name, 40, 8), on=["cpu|gpu"], size=800, held=0.5, slices=5)
    assert graphs.loads(graphs.dumps(graph)) == graph
    for format in ("gph", "pgraph"):
        assert_alike(graph, graphs.loads(graphs.dumps(graph, format)))
    for format in ("dot", "svg"):
        assert graphs.dumps(graph, format)


# ---- what is read ----


def test_a_file_of_parla_s_older_tools_is_read() -> None:
    graph = graphs.loads(
        "40, 100\n"
        "0 | 50000, 1, 1, 1, 200 |   | 1 : : 0\n"
        "1,2 | 1000, 4, 2, 2, 100 |  0 | 1 : : 0\r\n"
        "\n"
        "2 | 10, 1, 0, 0, 0 |  1,2 : 0 | 1, 0 : 1 : \n"
        "3 | 10, 1, 0, 0, 0\n"
    )
    assert graph.blocks == (Block(160), Block(400))
    first, second, third, last = graph
    [need] = first.needs
    assert (need.places, need.share, need.slices) == (("gpu",), 1.0, 1)
    assert (need.seconds, need.held) == pytest.approx((0.0502, 200 / 50200))
    assert first.reads == (1,) and first.updates == (0,)
    assert second.name == (1, 2) and second.after == (0,)
    assert [need.places for need in second.needs] == [("cpu",), ("gpu",)]
    assert (second.needs[0].share, second.needs[0].slices) == (0.25, 2)
    assert second.needs[0].seconds == pytest.approx(1.2e-3)
    assert third.after == (1, 0)
    # What is read and written is updated.
    assert (third.reads, third.writes, third.updates) == ((0,), (), (1,))
    assert last.needs[0].seconds == pytest.approx(1e-5)


def test_a_file_of_parla_s_newer_tools_is_read() -> None:
    for head in ("(100, -1) | (40, 3)", "{100 : -1}, {40 : 3}"):
        graph = graphs.loads(
            f"{head}\n"
            "(0, 0) | {(0,) : 50000, 0.5, 1, 0.05, 7}, { (1, 6) : 30000, 1, 2, 0, 0 }| | 0 : : 1\n"
            "1 | { -2 : 1000, 0.25, 1, 0, 0 } | (0, 0) | : : \n"
            "('B', (2, 3)) | { (-1,) : 1000.5, 1, 1, 0, 0 } | ('T', 1) : ('T', (0, 0)) | \n"
            "'B', 4 | { (0,) : 10, 1, 1, 0, 0 } | (2, 3)\n"
        )
        assert graph.blocks == (Block(400), Block(160, "gpu(2)"))
        first, second, third, last = graph
        assert [need.places for need in first.needs] == [("gpu",), ("gpu(0)", "gpu(1)")]
        assert [need.seconds for need in first.needs] == pytest.approx([0.05, 0.03])
        assert [(n.share, n.held, n.slices, n.memory) for n in first.needs] == [
            (0.5, 0.05, 1, 7),
            (1.0, 0.0, 2, 0),
        ]
        assert (first.reads, first.updates) == ((0,), (1,))
        assert [need.places for need in second.needs] == [("cpu",), ("gpu",)]
        assert second.name == (1,) and second.after == (0,)
        assert third.name == ("B", 2, 3) and third.after == (1, 0)
        assert third.needs[0].seconds == pytest.approx(1.0005e-3)
        # Without a space before it a name is in that of its task.
        assert last.name == ("B", 4) and last.after == (2,)


HEAD = '{"charioteer-graph": 1, "blocks": [{"size": 8}]}\n'


@pytest.mark.parametrize(
    ("text", "line", "column", "reason"),
    [
        ("", 1, 1, "empty"),
        ("\n \n", 1, 1, "empty"),
        ('{"charioteer-graph": 2}', 1, 22, "version"),
        ('{"charioteer-graph": true}', 1, 22, "version"),
        ('{"name": "x"}', 1, 1, "'charioteer-graph'"),
        ('{"charioteer-graph": 1, "charioteer-graph": 1}', 1, 25, "twice"),
        ('{"charioteer-graph": 1, "blox": []}', 1, 33, "no member 'blox'"),
        ('{"charioteer-graph": 1, "blocks": [{"size": 0}]}', 1, 36, "size"),
        ('{"charioteer-graph": 1, "name": "a\\u0000"}', 1, 33, "printed"),
        (HEAD + "[]", 2, 1, "object"),
        (HEAD + '{"name": [0]', 2, 13, "'}' expected"),
        (HEAD + '{"name": [0]}', 2, 1, "'needs'"),
        (HEAD + '{"name": [0.5], "needs": []}', 2, 11, "whole numbers"),
        (HEAD + '{"name": [], "needs": []}', 2, 10, "one part"),
        (HEAD + '{"name": [0], "needs": []}', 2, 1, "no place to run"),
        (HEAD + '{"name": [0], "needs": [{"on": ["cpu"]}]}', 2, 25, "'seconds'"),
        (HEAD + '{"name": [0], "needs": [{"on": ["tpu"], "seconds": 1}]}', 2, 25, "no place"),
        (HEAD + '{"name": [0], "needs": [{"on": ["cpu"], "seconds": NaN}]}', 2, 52, "JSON value"),
        (HEAD + '{"name": [0], "needs": [{"on": ["cpu"], "seconds": -1}]}', 2, 25, "seconds"),
        (HEAD + '{"name": [0], "needs": [{"on": ["cpu"], "seconds": 1}], "x": 1}', 2, 62, "'x'"),
        (
            HEAD + '{"name": [0], "needs": [{"on": ["cpu"], "seconds": 1}], "after": [[1]]}',
            *(2, 67, "no task above"),
        ),
        (
            HEAD + '{"name": [0], "needs": [{"on": ["cpu"], "seconds": 1}], "reads": [1]}',
            *(2, 1, "block 1 of 1"),
        ),
        (HEAD + "[[[[[[[[[[[[", 2, 10, "nested"),
        (HEAD + '"a\tb"', 2, 3, "string"),
        ("x", 1, 1, "whole number"),
        ("40, -1", 1, 5, "from 0"),
        ("40 100", 1, 4, "end of the line"),
        ("40\n0 | 1, 1, 1, 1", 2, 15, "','"),
        ("40\n0 | 1, 0, 1, 1, 1", 2, 8, "how many fit"),
        ("40\n0 | 1, 1, 3, 1, 1", 2, 11, "location"),
        ("40\n0 | 1, 1, 1, 1, 1 | 1", 2, 21, "no task above"),
        ("40\n0 | 1, 1, 1, 1, 1 | | 1", 2, 23, "a block is from 0 to 0"),
        ("40\n0 | 1, 1, 1, 1, 1 | | 0 : : 0 : 0", 2, 33, "end of the line"),
        ("40\n0 | 1, 1, 1, 1, 1\n0 | 1, 1, 1, 1, 1", 3, 1, "has that name"),
        ("40\n99999999999999999999 | 1", 2, 1, "whole number"),
        ("(1, 0)", 1, 2, "place of a block"),
        ("(1, -1) |", 1, 10, "'('"),
        ("(1, -1)\n0 | (0) : 1", 2, 5, "'{'"),
        ("(1, -1)\n0 | { 0 : 1, 2, 1, 0, 0 }", 2, 6, "share"),
        ("(1, -1)\n0 | { 0 : 1, 1, 0, 0, 0 }", 2, 17, "takes the GIL"),
        ("(1, -1)\n0 | { (0, -2) : 1, 1, 1, 0, 0 }", 2, 6, "stands alone"),
        ("(1, -1)\n(((0))) | { 0 : 1, 1, 1, 0, 0 }", 2, 4, "nested"),
        ("(1, -1)\n('1', 2) | { 0 : 1, 1, 1, 0, 0 }", 2, 2, "letters"),
        ("(1, -1)\n(0, | { 0 : 1, 1, 1, 0, 0 }", 2, 5, "')'"),
    ],
)
def test_what_is_malformed_is_told_with_its_place(
    text: str, line: int, column: int, reason: str
) -> None:
    with pytest.raises(GraphFileError) as caught:
        graphs.loads(text, "file")
    error = caught.value
    assert (error.line, error.column) == (line, column), error
    assert reason in error.reason
    assert str(error).startswith(f"file:{line}:{column}: ")


@given(st.text(), st.sampled_from(sorted(READERS)))
@settings(max_examples=50, deadline=None)
def test_any_text_is_read_or_told(text: str, format: str) -> None:
    told(text)
    told(text, format)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_damaged_files_are_read_or_told(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(sorted(READERS)))
    graph = data.draw(any_graph(plain=format == "gph"))
    text = graphs.dumps(graph, format)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        gone = data.draw(st.integers(0, 4))
        new = data.draw(st.text(alphabet=' \n\t{}[]()|:,."-0123456789eE', max_size=3))
        text = text[:at] + new + text[at + gone :]
    told(text, format)


def test_files_are_read_whatever_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    path.write_bytes(HEAD.encode() + b'{"name": [0], "kind": "\xff"}\n')
    with pytest.raises(GraphFileError, match=r"g.jsonl:2:24: this is no UTF-8"):
        graphs.read(path)
    path.write_bytes(b"\xef\xbb\xbf" + HEAD.encode())
    assert len(graphs.read(path)) == 0


# ---- what is written ----


def test_what_a_format_cannot_say_is_refused() -> None:
    def of(**fields: Any) -> Graph:
        task = {"name": (0,), "needs": (Need(),), **fields}
        return Graph("g", (Task(**task),), (Block(8),))

    for graph, words in (
        (of(needs=(Need(("cpu", "cpu")),)), "one core or one GPU"),
        (of(needs=(Need(("gpu(0)",)),)), "one core or one GPU"),
        (of(needs=(Need(("cpu",), 1.0), Need(("gpu",), 2.0))), "same cost"),
        (of(needs=(Need(share=0.4),)), "over a whole number"),
        (of(needs=(Need(memory=1),)), "memory"),
        (of(needs=(Need(share=1e-91),)), "share"),
        (of(needs=(Need(slices=10**7),)), "GIL is 1000000 at most"),
        (of(name=(10**16,)), "name is"),
        (of(name=("A", 0)), "numbers alone"),
        (Graph("g", (), (Block(8, "gpu(0)"),)), "begin on the host"),
    ):
        with pytest.raises(GraphError, match=words):
            graphs.dumps(graph, "gph")
    for graph, words in (
        (of(needs=(Need(share=1e-91),)), "nine digits"),
        (of(needs=(Need(memory=10**16),)), "memory is"),
        (of(needs=(Need(("gpu(9999)",)),)), "has no number"),
    ):
        with pytest.raises(GraphError, match=words):
            graphs.dumps(graph, "pgraph")
    with pytest.raises(GraphError, match="letters"):
        graphs.dumps(of(name=("A1", 0)), "pgraph")
    with pytest.raises(GraphError, match="no format 'xml'"):
        graphs.dumps(of(), "xml")


def test_pictures_have_every_task_and_dependency() -> None:
    graph = graphs.describe(graphs.make("cholesky", 4))
    text = graphs.dumps(graph, "svg")
    root = ET.fromstring(text)
    tag = "{http://www.w3.org/2000/svg}"
    titled = [
        circle for circle in root.iter(f"{tag}circle") if circle.find(f"{tag}title") is not None
    ]
    assert len(titled) == len(graph)
    assert len(list(root.iter(f"{tag}path"))) == graph.edges
    assert [e.text for e in root.iter(f"{tag}text")] == ["potrf", "trsm", "syrk", "gemm"]
    lines = graphs.dumps(graph, "dot").splitlines()
    assert sum(" -> " in line for line in lines) == graph.edges
    assert sum("label=" in line for line in lines) == len(graph)
    odd = Graph('a"b\\', (Task((0,), (Need(),), kind="<&\\"),))
    assert '"a\\"b\\\\"' in graphs.dumps(odd, "dot")
    ET.fromstring(graphs.dumps(odd, "svg"))


# ---- the command ----


def charioteer(*arguments: str) -> int:
    return main(["graph", *arguments])


def test_a_graph_goes_from_its_making_to_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, other = str(tmp_path / "g.jsonl"), str(tmp_path / "g.pgraph")
    generate = ("generate", "cholesky", "--width", "4", "--time", "50us", "--on", "gpu", "--on")
    assert charioteer(*generate, "gpu*2=0.3", "--size", "1KiB", "--out", made) == 0
    assert charioteer("convert", made, other) == 0
    assert_alike(graphs.read(made), graphs.read(other))
    assert charioteer("svg", other, str(tmp_path / "g.svg")) == 0
    assert (tmp_path / "g.svg").read_text().startswith("<svg")
    capsys.readouterr()

    where = ("--machine", "virtual:3", "--virtual-time")
    assert charioteer("info", made, *where, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["tasks"], info["levels"], info["bytes"]) == (20, 10, 20 * 1024)
    assert charioteer("run", made, *where, "--movement", "lazy", "--runs", "2", "--json") == 0
    ran = json.loads(capsys.readouterr().out)
    assert ran["verified runs"] == 2
    assert ran["run 1, ms"] == ran["run 2, ms"] >= ran["longest chain, ms"]


def test_standard_input_and_output_serve(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert charioteer("generate", "fft", "--width", "4", "--depth", "3", "--format", "gph") == 0
    text = capsys.readouterr().out
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert charioteer("info", "-") == 0
    assert "longest chain, ms          3" in capsys.readouterr().out
    assert charioteer("generate", "list") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(graphs.PATTERNS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "nonsense"), "no pattern 'nonsense'"),
        (("generate", "lu", "--depth", "3"), "follows from its width"),
        (("generate", "lu", "--time", "soon"), "--time"),
        (("generate", "lu", "--size", "much"), "--size"),
        (("generate", "lu", "--on", "tpu"), "'tpu' is no place"),
        (("generate", "lu", "--on", "gpu*2", "--format", "gph"), "one core or one GPU"),
        (("info", "/no/such/file"), "cannot use /no/such/file"),
        (("convert", "bad.gph", "out.jsonl"), "bad.gph:1:1: "),
        (("convert", "bad.gph", "out.jsonl", "--from", "svg"), "cannot read 'svg'"),
        (("run", "good.jsonl", "--machine", "virtual:1", "--virtual-time"), "takes no time"),
        (("run", "good.jsonl", "--machine", "nonsense"), "nonsense"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.gph").write_text("what")
    graphs.write(graphs.describe(graphs.make("chains", 1, 2)), "good.jsonl")
    assert charioteer(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("charioteer graph: error: ") and error.count("\n") == 1


def test_a_run_that_is_wrong_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "g.jsonl"
    graphs.write(graphs.describe(graphs.make("chains", 1, 2), seconds=1e-5), path)
    monkeypatch.setattr(graphs.running, "expected", lambda *_: [0, 0])
    assert charioteer("run", str(path), "--workers", "1") == 1
    assert "task 0,0 has a wrong word" in capsys.readouterr().err


def test_every_format_has_a_name() -> None:
    assert set(READERS) < set(WRITERS)
