"""The study: intervals on known data, pages, plots, parts that are resumed."""

from __future__ import annotations

import json
import random
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from charioteer.bench import pages, records, study, study_report
from charioteer.bench.plots import IDEAL, plot
from charioteer.bench.statistics import ENOUGH, Interval, interval
from charioteer.cli import main

pytestmark = pytest.mark.surface

ROOT = Path(__file__).parents[1]
APPS = ROOT / "examples" / "apps"


# ---- intervals ----


@pytest.mark.parametrize("count", [3, 5, ENOUGH, 30])
def test_intervals_hold_what_is_known_about_as_often_as_they_say(count: int) -> None:
    chance = random.Random(count)
    trials = 150
    held = 0
    for trial in range(trials):
        # The median is 2; ratios and times are skewed like these.
        found = interval([2 * chance.lognormvariate(0, 0.3) for _ in range(count)], seed=trial)
        assert found is not None
        held += found.holds(2.0)
    assert 0.90 <= held / trials <= 0.995


def test_intervals_of_data_that_is_known() -> None:
    assert interval([]) is interval([1.0]) is None
    assert interval([3.0] * 20) == Interval(3.0, 3.0, 3.0)
    assert interval([3.0] * 4) == pytest.approx((3.0, 3.0, 3.0))
    # Student with one degree of freedom: 1 and 3 around 2 with a deviation of the square root of 2.
    found = interval([-1.0, 1.0])
    assert found is not None
    assert (found.median, found.low, found.high) == pytest.approx((0.0, -12.706, 12.706))
    # On logarithms: it is the same for the inverse values.
    ratios = interval([1.0, 2.0, 4.0])
    inverse = interval([1.0, 0.5, 0.25])
    assert ratios is not None and inverse is not None
    assert (ratios.low, ratios.high) == pytest.approx((1 / inverse.high, 1 / inverse.low))
    many = interval(list(range(101)))
    assert many is not None
    assert many.median == 50 and 35 < many.low < 50 < many.high < 65
    assert interval(list(range(101))) == many
    wide = interval([1e300, 1e-300, 1.0])
    assert wide is not None and wide.low >= 0


def test_an_outlier_does_not_move_a_bootstrap_far() -> None:
    found = interval([1.0 + 0.01 * at for at in range(19)] + [1e6])
    assert found is not None
    assert found.high < 1.2


# ---- plots and pages ----


def test_plots_have_their_lines_and_bars() -> None:
    curves = {"ours": {1.0: 0.5, 2.0: 0.9}, IDEAL: {1.0: 1.0, 2.0: 1.0}}
    text = plot([("a <panel>", curves), ("b", {"ours": {1.0: 0.2}})], across="µs", up="part")
    root = ET.fromstring(text)
    tag = "{http://www.w3.org/2000/svg}"
    assert [e.text for e in root.iter(f"{tag}text")].count("a <panel>") == 1
    drawn = [e for e in root.iter(f"{tag}path") if e.get("stroke-width")]
    assert len(drawn) == 3
    assert sum(e.get("stroke-dasharray") is not None for e in drawn) == 1
    bars = ET.fromstring(plot([("", {"a": {"x": 1.0, "y": 3.0}})], across="", up=""))
    heights = [float(e.get("height", "")) for e in bars.iter(f"{tag}rect")]
    # The last is the legend's.
    assert heights[1] == pytest.approx(3 * heights[0], rel=0.01)
    ET.fromstring(plot([("", {})], across="", up=""))
    ET.fromstring(plot([("", {"a": {"x": 0.0}, "b": {"x": float("inf")}})], across="", up=""))


def test_a_page_keeps_its_data(tmp_path: Path) -> None:
    data = {"evil": "</script><script>alert(1)</script>", "n": [1.5, None]}
    block = [pages.Heading("A | <b>", 1), pages.Grid(["a|b"], [["c|d"]])]
    pages.write(tmp_path / "p.html", "T", block, data)
    text = (tmp_path / "p.html").read_text()
    assert text.count("</script>") == 1 and "&lt;b&gt;" in text
    [kept] = re.findall(r'<script type="application/json" id="records">(.*)</script>', text)
    assert json.loads(kept) == data
    pages.write(tmp_path / "p.md", "T", block, data)
    assert "| c\\|d |" in (tmp_path / "p.md").read_text()


# ---- parts ----


def entry(benchmark: str, values: list[float], **fields: Any) -> dict[str, Any]:
    made = records.record(benchmark, "charioteer", "a case", {"workers": 2}, "time", "µs", values)
    return {**vars(made), **fields}


def a_study(tmp_path: Path, run: Any, names: str = "abc") -> tuple[bool, list[str]]:
    told: list[str] = []
    chosen = [study.Part(name, ("bench", name), 10.0) for name in names]
    complete = study.conduct(tmp_path, chosen, quick=True, tell=told.append, run=run)
    return complete, told


def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    ran: list[str] = []

    def run(part: study.Part, path: Path) -> None:
        ran.append(part.name)
        if ran == ["a", "b"]:
            path.write_text("[half of")
            raise KeyboardInterrupt
        path.write_text(json.dumps([entry("overhead", [1.0, 2.0, 3.0], case=part.name)]))

    with pytest.raises(KeyboardInterrupt):
        a_study(tmp_path, run)
    complete, told = a_study(tmp_path, run)
    assert complete
    assert ran == ["a", "b", "b", "c"]
    assert told[0] == "1 of 3 parts are there already"
    assert "[2/3] b" in told[1] and "left" in told[1]
    assert a_study(tmp_path, run) == (True, ["3 of 3 parts are there already"])
    text = (tmp_path / "report.html").read_text()
    [kept] = re.findall(r'id="records">(.*)</script>', text)
    data = json.loads(kept)
    assert [one["case"] for one in data["records"]] == ["a", "b", "c"]
    assert data["records"][0]["values"] == [1.0, 2.0, 3.0]
    assert data["study"]["commit"] == records.commit()
    assert "2.00 µs" in (tmp_path / "report.md").read_text()


def test_a_part_that_fails_is_told_and_run_again(tmp_path: Path) -> None:
    tries: list[str] = []

    def run(part: study.Part, path: Path) -> str | None:
        tries.append(part.name)
        if part.name == "b" and tries.count("b") == 1:
            return "no horses"
        if part.name == "c":
            return None  # and leaves nothing
        path.write_text("[]")
        return None

    complete, told = a_study(tmp_path, run)
    assert not complete
    assert "b failed: no horses" in told and "c failed: it left no records" in told
    assert "b failed: no horses" in (tmp_path / "report.md").read_text()
    a_study(tmp_path, run)
    assert tries == ["a", "b", "c", "b", "c"]


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    def run(part: study.Part, path: Path) -> None:
        path.write_text("[]")

    a_study(tmp_path, run)
    subject = json.loads((tmp_path / "study.json").read_text())
    for key in ("commit", "machine", "quick"):
        (tmp_path / "study.json").write_text(json.dumps({**subject, key: "other"}))
        with pytest.raises(study.StudyError, match=f"with {key} 'other'"):
            a_study(tmp_path, run)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(study.StudyError, match="damaged"):
        a_study(tmp_path, run)
    (tmp_path / "file").write_text("")
    with pytest.raises(study.StudyError, match="cannot use"):
        a_study(tmp_path / "file", run)


def test_the_estimate_follows_what_parts_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 40.0, 40.0, 60.0, 60.0, 80.0])
    monkeypatch.setattr(study.time, "monotonic", lambda: next(now))
    _, told = a_study(tmp_path, lambda part, path: path.write_text("[]") and None)
    # Thirty; then four times as slow as was thought; then thrice.
    assert [line.partition(": ")[2] for line in told] == [
        "about 30 s left",
        "about 80 s left",
        "about 30 s left",
    ]


def test_parts_of_a_real_benchmark_run_in_processes(tmp_path: Path) -> None:
    chosen = [
        study.Part("start", ("bench", "overhead", "--quick", "--only", "start"), 1.0),
        study.Part("wrong", ("bench", "overhead", "--peers", "pony"), 1.0),
    ]
    told: list[str] = []
    assert not study.conduct(tmp_path, chosen, quick=True, tell=told.append)
    assert any("wrong failed" in line and "'pony'" in line for line in told)
    [first, *_] = json.loads((tmp_path / "parts" / "start.json").read_text())
    assert first["case"] == "start and close" and len(first["values"]) == 3


def test_every_part_is_a_command_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    from charioteer.cli import _parser

    for quick in (True, False):
        chosen = study.parts(quick=quick, apps=study.sources())
        assert len({part.name for part in chosen}) == len(chosen)
        for part in chosen:
            if part.arguments[0].endswith(".py"):
                assert Path(part.arguments[0]) == APPS / "study.py"
            else:
                _parser().parse_args(part.arguments)
    assert sum(part.seconds for part in study.parts(quick=True, apps=study.sources())) < 300
    assert main(["study", "--quick", "--list"]) == 0
    assert "metg-fft" in capsys.readouterr().out
    assert main(["study", "--only", "pony"]) == 2


def test_the_report_has_bars_intervals_and_what_is_missing() -> None:
    subject = {"machine": "M", "python": "P", "commit": "C", "quick": True}
    curve = [[[1.0, 0.4], [2.0, 0.8]], [[1.0, 0.6]]]
    missing = records.record(
        "metg", "Ray", "fft", {"missing": "ray is not installed"}, "t", "s", []
    )
    entries = [
        entry("overhead", [1.0, 1.0, 4.0], bar="≤ 2 µs", met=True),
        entry("metg", [3.0, 4.0], metric="METG(50%)", params={"curves": curve, "tuning": "none"}),
        entry("graphs", [1.01], metric="makespan / list schedule", case="fft: virtual"),
        entry("multi-device", [5.0], params={"devices": 4}),
        entry("policies", [1.1], metric="makespan / bound", params={"graph": "lu"}),
        entry("applications", [4.0, 4.0], runtime="serial program", case="x"),
        entry("applications", [2.0, 1.0], case="x", params={"workers": 2, "lines": 9}),
        entry("applications", [7.5], case="x: 2 GPUs", metric="makespan", params={"devices": 2}),
        vars(missing),
    ]
    blocks = study_report.blocks(entries, subject, {"gil": "no luck"})
    text = pages.as_html("T", blocks)
    for words in (
        *("1 of 1 are met", "≤ 2 µs", "Ray: ray is not installed", "gil failed: no luck"),
        *("How peers are run: charioteer: none.", "<td>3.00</td>", "A quick one"),
        "<th>makespan</th>",
    ):
        assert words in text, words
    assert text.count("<svg") == 5
