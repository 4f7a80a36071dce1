"""The report of a study: its bars, a section a benchmark, plots, and what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from charioteer.bench import metg
from charioteer.bench.harness import OURS
from charioteer.bench.pages import Block, Grid, Heading, Plot, Words
from charioteer.bench.plots import Panel, plot
from charioteer.bench.records import Record
from charioteer.bench.report import quantity
from charioteer.bench.statistics import ENOUGH, interval

__all__ = ["blocks"]

Entry = dict[str, Any]

SECTIONS = {
    "overhead": "What a task costs",
    "gil": "The GIL",
    "metg": "The smallest tasks that run efficiently",
    "multi-device": "Tasks over several devices",
    "policies": "Policies, in simulated time",
    "graphs": "Task graphs",
    "applications": "Applications",
}
"""The benchmarks in the order of the report, with their headings."""


def blocks(
    entries: Sequence[Entry], subject: Mapping[str, Any], failures: Mapping[str, str]
) -> list[Block]:
    """The report's blocks.

    Args:
        entries: records, as dictionaries.
        subject: what the study is of.
        failures: why parts failed, by their names.
    """
    found: list[Block] = [
        Heading("A study of Charioteer", 1),
        Words(
            f"{subject['machine']}; {subject['python']}; commit {subject['commit']}."
            + (" A quick one: a look, with few rounds." if subject["quick"] else "")
        ),
        Words(
            "Values are medians over the rounds, with intervals that hold them with 95 %: the"
            f" bootstrap's from {ENOUGH} rounds on, Student's on logarithms below. Ratios are"
            " formed within a round, whose runs lie next to each other. Every figure behind this"
            " page is in it as JSON, in the element with the id “records”."
        ),
        *_bars(entries),
    ]
    for benchmark, heading in SECTIONS.items():
        mine = [entry for entry in entries if entry["benchmark"] == benchmark]
        if mine:
            found += [Heading(heading), *_PLOTS.get(benchmark, _nothing)(mine), *_tables(mine)]
    found += _missing(entries, failures)
    return found


def _nothing(entries: Sequence[Entry]) -> list[Block]:
    return []


def _shown(entry: Entry) -> list[str]:
    """The median, its interval and the number of rounds."""
    values = entry["values"]
    if not values:
        return ["missing", "", "0"]
    known = interval(values)
    within = "" if known is None else f"{quantity(known.low)} to {quantity(known.high)}"
    return [quantity(entry["median"], entry["unit"]), within, str(entry["runs"])]


def _on(entry: Entry) -> str:
    workers = entry["params"].get("workers")
    return "" if workers is None else str(workers)


def _bars(entries: Sequence[Entry]) -> list[Block]:
    barred = [entry for entry in entries if entry["bar"] is not None]
    if not barred:
        return []
    met = sum(entry["met"] is True for entry in barred)
    words = {True: "yes", False: "NO", None: "not measured"}
    rows = [
        [
            f"{entry['benchmark']}: {entry['case']}",
            _on(entry),
            entry["metric"],
            *_shown(entry),
            entry["bar"],
            words[entry["met"]],
        ]
        for entry in barred
    ]
    heads = ["case", "workers", "metric", "median", "95 %", "rounds", "bar", "met"]
    return [
        Heading("Bars"),
        Words(f"{met} of {len(barred)} are met."),
        Grid(heads, rows),
    ]


def _tables(entries: Sequence[Entry]) -> list[Block]:
    rows = [
        [
            entry["case"],
            entry["runtime"],
            _on(entry),
            entry["metric"],
            *_shown(entry),
        ]
        for entry in entries
        if entry["runs"]
    ]
    heads = ["case", "runtime", "workers", "metric", "median", "95 %", "rounds"]
    return [Grid(heads, rows)] if rows else []


def _missing(entries: Sequence[Entry], failures: Mapping[str, str]) -> list[Block]:
    reasons = dict.fromkeys(
        f"{entry['runtime']}: {entry['params']['missing']}"
        for entry in entries
        if not entry["runs"] and "missing" in entry["params"]
    )
    lines = [*reasons, *(f"{part} failed: {why}" for part, why in failures.items())]
    if not lines:
        return []
    return [Heading("Not measured"), *(Words(line) for line in lines)]


# ---- plots --------------------------------------------------------------------------------------


def _metg_plots(entries: Sequence[Entry]) -> list[Block]:
    panels = metg.curves([Record(**entry) for entry in entries])
    if not panels:
        return []
    image = plot(panels, across="task time, µs", up="efficiency", most=1.0)
    tuned = dict.fromkeys(
        f"{entry['runtime']}: {entry['params']['tuning']}."
        for entry in entries
        if "tuning" in entry["params"]
    )
    return [
        Plot(image, "Efficiency by the time of a task"),
        *(Words(f"How peers are run: {line}") for line in tuned),
    ]


def _device_plots(entries: Sequence[Entry]) -> list[Block]:
    lines: dict[str, dict[int, float]] = {}
    for entry in entries:
        if entry["unit"] == "µs" and entry["runs"] and "devices" in entry["params"]:
            workers = _on(entry)
            name = entry["runtime"] + (f", {workers} workers" if workers else "")
            lines.setdefault(name, {})[entry["params"]["devices"]] = entry["median"]
    return _drawn([("", lines)], "Microseconds of an empty task, by its devices", "devices", "µs")


def _overhead_plots(entries: Sequence[Entry]) -> list[Block]:
    lines: dict[str, dict[str, float]] = {}
    for entry in entries:
        if entry["metric"] == "time per task" and entry["case"] == "empty task" and entry["runs"]:
            lines.setdefault(entry["runtime"], {})[f"{_on(entry)} workers"] = entry["median"]
    ours = lines.get("charioteer", {})
    # How many times ours the others take: the figures themselves span four orders of magnitude.
    times = {
        name: {place: value / ours[place] for place, value in line.items() if place in ours}
        for name, line in lines.items()
        if name != "charioteer"
    }
    return _drawn([("", times)], "An empty task, over that of Charioteer", "", "times")


def _policy_plots(entries: Sequence[Entry]) -> list[Block]:
    lines: dict[str, dict[str, float]] = {}
    for entry in entries:
        if entry["metric"] == "makespan / bound" and entry["runs"]:
            graph = entry["params"].get("graph", "")
            lines.setdefault(entry["runtime"], {})[graph] = entry["median"]
    return _drawn([("", lines)], "Makespan over the bound, by graph", "", "makespan / bound")


def _graph_plots(entries: Sequence[Entry]) -> list[Block]:
    lines: dict[str, dict[str, float]] = {}
    for entry in entries:
        if entry["metric"] == "makespan / list schedule" and entry["runs"]:
            pattern, _, case = entry["case"].partition(": ")
            lines.setdefault(case, {})[pattern] = entry["median"]
    panels = [
        (case, {"makespan / list schedule": dict(list(line.items())[at : at + 7])})
        for case, line in lines.items()
        for at in range(0, len(line), 7)
    ]
    return _drawn(panels, "Virtual time of a run over the offline schedule", "", "ratio")


def _application_plots(entries: Sequence[Entry]) -> list[Block]:
    """Speed over the serial program, round by round, with the lines of code and the tasks."""
    times = [entry for entry in entries if entry["metric"] == "time" and entry["runs"]]
    serial = {entry["case"]: entry["values"] for entry in times if "serial" in entry["runtime"]}
    tasks = {entry["case"]: entry["median"] for entry in entries if entry["metric"] == "tasks"}
    lines: dict[str, dict[str, float]] = {}
    rows = []
    for entry in times:
        case = entry["case"]
        if case not in serial or "serial" in entry["runtime"]:
            continue
        rounds = zip(serial[case], entry["values"], strict=False)
        speeds = [alone / time for alone, time in rounds]
        name = f"{entry['runtime']}, {_on(entry)} worker{'s' * (_on(entry) != '1')}"
        lines.setdefault(name, {})[case] = median(speeds)
        known = interval(speeds)
        rows.append(
            [
                case,
                name,
                f"{median(speeds):.2f}",
                "" if known is None else f"{known.low:.2f} to {known.high:.2f}",
                f"{tasks[case]:,.0f}" if entry["runtime"] == OURS and case in tasks else "",
                str(entry["params"].get("lines", "")),
            ]
        )
    heads = ["application", "run as", "speed over serial", "95 %", "tasks", "lines"]
    return [
        *_drawn(_by_size(lines), "Speed over the serial program", "", "speed-up"),
        *([Grid(heads, rows)] if rows else []),
        *_simulated_applications(entries),
    ]


def _by_size(lines: Mapping[str, Mapping[str, float]]) -> list[Panel]:
    """Panels of some applications each, which are of one size."""
    cases = dict.fromkeys(case for line in lines.values() for case in line)
    sizes: dict[str, list[str]] = {}
    for case in cases:
        sizes.setdefault(case.partition(", ")[2], []).append(case)
    return [
        (
            size,
            {
                name: {case.partition(", ")[0]: line[case] for case in some if case in line}
                for name, line in lines.items()
            },
        )
        for size, all_ in sizes.items()
        for some in (all_[at : at + 7] for at in range(0, len(all_), 7))
    ]


def _simulated_applications(entries: Sequence[Entry]) -> list[Block]:
    """What applications take on virtual GPUs, a row each and number of GPUs."""
    found: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        if "devices" in entry["params"] and entry["runs"]:
            found.setdefault(entry["case"], {})[entry["metric"]] = entry
    if not found:
        return []
    metrics = list(dict.fromkeys(metric for each in found.values() for metric in each))
    rows = [
        [
            case,
            *(
                quantity(each[metric]["median"], each[metric]["unit"]) if metric in each else ""
                for metric in metrics
            ),
        ]
        for case, each in found.items()
    ]
    return [Grid(["on virtual GPUs, in virtual time", *metrics], rows)]


def _drawn(panels: Sequence[Panel], caption: str, across: str, up: str) -> list[Block]:
    full = [panel for panel in panels if any(panel[1].values())]
    return [Plot(plot(full, across=across, up=up), caption)] if full else []


_PLOTS: Mapping[str, Callable[[Sequence[Entry]], list[Block]]] = {
    "overhead": _overhead_plots,
    "metg": _metg_plots,
    "multi-device": _device_plots,
    "policies": _policy_plots,
    "graphs": _graph_plots,
    "applications": _application_plots,
}
