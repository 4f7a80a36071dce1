"""Tables of the GIL study for a terminal, and its report with plots.

A report is made of records alone, so that those of several machines can be reported anywhere:
see :mod:`charioteer.bench.pages`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from charioteer.bench import pages, runners
from charioteer.bench.gil_runs import (
    DASK,
    JOBLIB,
    LIMIT,
    LOOP,
    NATIVE,
    NATIVE_LIMIT,
    PARLA_2,
    PARLA_3,
    RAY,
)
from charioteer.bench.harness import OURS, Key, Measure, Result
from charioteer.bench.pages import Block, Grid, Heading, Plot, Words
from charioteer.bench.peers import THREAD_POOL
from charioteer.bench.plots import IDEAL, Panel, plot
from charioteer.bench.report import quantity

__all__ = ["CellTable", "write"]

FIXED = f"{OURS}, gil="
COLUMNS = {
    OURS: (OURS, 11),
    FIXED: ("best gil=", 11),
    LIMIT: ("limit", 9),
    NATIVE: ("native", 7),
    NATIVE_LIMIT: ("its limit", 9),
    THREAD_POOL: ("best pool", 11),
    DASK: ("Dask", 6),
    JOBLIB: ("joblib", 6),
    RAY: ("Ray", 6),
    PARLA_2: (PARLA_2, 9),
    PARLA_3: (PARLA_3, 9),
}
"""The columns of cells: whose best result each shows, its heading, its width."""


def column(runtime: str) -> str:
    """The column that a contestant belongs to."""
    return FIXED if runtime.startswith(FIXED) else runtime


def _marked(value: str, runtime: str, workers: object) -> str:
    """A value, with the width or the number of threads where the best of several is shown."""
    if runtime.startswith(FIXED):
        return f"{value} @{runtime.removeprefix(FIXED)}"
    return f"{value} @{workers}" if runtime in (THREAD_POOL, LIMIT) else value


# The terminal.


class CellTable:
    """Prints a cell of the sweep as a line, when it has run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: set[str] = set()
        self._begun = False

    def add(self, measure: Measure, result: Result) -> None:
        """Print a cell that has run, and why somebody is missing when that is new."""
        if not self._begun:
            self._begun = True
            heads = "".join(f"{head:>{width + 1}}" for head, width in COLUMNS.values())
            self._console.print(f"\n[bold]{'Efficiency':72}{heads}[/]", soft_wrap=True)
        most = max(contestant.workers or 0 for contestant in measure.contestants)
        for case in dict.fromkeys(contestant.case for contestant in measure.contestants):
            cells = [
                f"{_shown(measure, result, case, name):>{width + 1}}"
                for name, (_, width) in COLUMNS.items()
            ]
            head = escape(f"{case}, {most} worker{'s' * (most != 1)}")
            self._console.print(f"{head:72}{''.join(cells)}", soft_wrap=True)
        for key, series in result.items():
            words = f"{key.runtime} {series.problem}"
            if series.problem is not None and words not in self._told:
                self._told.add(words)
                self._console.print(f"[yellow]{escape(words)}[/]", soft_wrap=True)


def _shown(measure: Measure, result: Result, case: str, name: str) -> str:
    """The best efficiency in a column."""
    found: list[tuple[float, Key]] = []
    for contestant in measure.contestants:
        values = result[contestant.key].values.get("efficiency")
        if contestant.case == case and column(contestant.runtime) == name and values:
            found.append((statistics.median(values), contestant.key))
    if not found:
        return "-"
    value, key = max(found)
    return _marked(f"{value:.3f}", key.runtime, key.workers)


# The report: blocks of text, tables and plots, written as one of two formats.


Entry = dict[str, Any]


class Cell(NamedTuple):
    """A place in the sweep."""

    shape: str
    seconds: float
    slices: int
    held: float
    cores: int
    interpreter: str

    @property
    def text(self) -> str:
        """The cell in words, without its graph and interpreter."""
        slices = f"{self.slices} slice{'s' * (self.slices != 1)}"
        body = f"{1e3 * self.seconds:g} ms, {self.held:.0%} held, {slices}"
        return _on(body, {"workers": self.cores})


@dataclass(frozen=True)
class Best:
    """The best result of a column in a cell."""

    efficiency: float
    speedup: float
    waited: float | None
    runtime: str
    workers: int


def write(path: str, entries: Sequence[Entry]) -> None:
    """Write the report of these records to a file, HTML or Markdown by its suffix."""
    pages.write(path, "What the GIL costs", _blocks(entries))


def _blocks(entries: Sequence[Entry]) -> list[Block]:
    blocks: list[Block] = [Heading("What the GIL costs", 1)]
    for machine in _distinct(entry["machine"] for entry in entries):
        here = [entry for entry in entries if entry["machine"] == machine]
        pythons = ", ".join(_distinct(entry["python"] for entry in here))
        commits = ", ".join(_distinct(entry["commit"] for entry in here))
        blocks += [Heading(machine), Words(f"{pythons}; commit {commits}.")]
        blocks += _sweep_blocks(here)
        blocks += _pure_blocks(here)
        blocks += _other_blocks(here)
        missing = _distinct(
            f"{entry['runtime']}: {entry['params']['missing']}"
            for entry in here
            if not entry["runs"] and "missing" in entry["params"]
        )
        if missing:
            blocks += [Heading("Not measured", 3), Words("; ".join(missing) + ".")]
    return blocks


def _distinct(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def cells(entries: Sequence[Entry]) -> dict[Cell, dict[str, Best]]:
    """The best of every column in each cell of the sweep."""
    runs: dict[tuple[Cell, str, int], dict[str, float]] = {}
    tasks: dict[Cell, int] = {}
    for entry in entries:
        params = entry["params"]
        if "shape" not in params or "outside" in params or not entry["runs"]:
            continue
        cell = Cell(
            params["shape"],
            params["seconds"],
            params["slices"],
            params["held"],
            params["cores"],
            entry["python"],
        )
        tasks[cell] = params["tasks"]
        key = (cell, entry["runtime"], params["workers"])
        runs.setdefault(key, {})[entry["metric"]] = entry["median"]
    found: dict[Cell, dict[str, Best]] = {}
    for (cell, runtime, workers), metrics in runs.items():
        serial = 1e3 * cell.seconds * len(runners.SHAPES[cell.shape](tasks[cell]))
        this = Best(
            metrics["efficiency"],
            serial / metrics["time"],
            metrics.get("waited for the GIL"),
            runtime,
            workers,
        )
        columns = found.setdefault(cell, {})
        old = columns.get(column(runtime))
        if old is None or this.efficiency > old.efficiency:
            columns[column(runtime)] = this
    return dict(sorted(found.items()))


def _sweep_blocks(entries: Sequence[Entry]) -> list[Block]:
    found = cells(entries)
    if not found:
        return []
    blocks: list[Block] = [
        Heading("The sweep", 3),
        Words(
            "Efficiency is the ideal time over the measured one; the ideal is the largest of: the "
            "work over the workers, the work under the GIL, and the longest chain. Speed-up is the "
            "work over the measured time. Where the best of several widths or numbers of threads "
            "is shown, it stands after the @. The limit is what bare threads reach that do nothing "
            "but run the bodies, and that of native bodies what they reach in C."
        ),
    ]
    interpreters = _distinct(cell.interpreter for cell in found)
    for shape in _distinct(cell.shape for cell in found):
        for interpreter in interpreters:
            mine = {
                cell: columns
                for cell, columns in found.items()
                if (cell.shape, cell.interpreter) == (shape, interpreter)
            }
            blocks += _shape_blocks(f"{shape}, {interpreter}", mine)
        if len(interpreters) > 1:
            blocks += _side_by_side(shape, found, interpreters)
    return blocks


def _shape_blocks(name: str, found: dict[Cell, dict[str, Best]]) -> list[Block]:
    columns = [key for key in COLUMNS if any(key in row for row in found.values())]
    heads = [COLUMNS[key][0] for key in columns]
    if not columns:
        return []

    def grid(head: str, of: Any) -> Grid:
        rows = []
        for cell, row in found.items():
            rows.append([cell.text, *(of(row[key]) if key in row else "-" for key in columns)])
        return Grid([head, *heads], rows)

    def efficiency(best: Best) -> str:
        return _marked(f"{best.efficiency:.3f}", best.runtime, best.workers)

    def waited(best: Best) -> str:
        return "-" if best.waited is None else quantity(best.waited)

    blocks: list[Block] = [
        Heading(f"Graph: {name}", 4),
        grid("efficiency", efficiency),
        grid("speed-up", lambda best: f"{best.speedup:.2f}"),
    ]
    if any(best.waited is not None for row in found.values() for best in row.values()):
        blocks.append(grid("waited for the GIL, ms over all threads", waited))
    blocks += _plots(name, found, columns)
    return blocks


def _side_by_side(
    shape: str, found: dict[Cell, dict[str, Best]], interpreters: Sequence[str]
) -> list[Block]:
    columns = [
        key for key in (OURS, NATIVE, THREAD_POOL) if any(key in row for row in found.values())
    ]
    heads = [f"{COLUMNS[key][0]}, {name}" for key in columns for name in interpreters]
    rows = []
    for cell in _distinct_cells(found, shape):
        row = [cell.text]
        for key in columns:
            for name in interpreters:
                best = found.get(cell._replace(interpreter=name), {}).get(key)
                row.append("-" if best is None else f"{best.speedup:.2f}")
        rows.append(row)
    return [
        Heading(f"Graph: {shape}, side by side", 4),
        Grid(["speed-up", *heads], rows),
    ]


def _distinct_cells(found: dict[Cell, dict[str, Best]], shape: str) -> list[Cell]:
    return list(dict.fromkeys(c._replace(interpreter="") for c in found if c.shape == shape))


def _pure_blocks(entries: Sequence[Entry]) -> list[Block]:
    """Speed of bodies of bytecode over that of the plain loop, by workers."""
    times: dict[tuple[str, str], dict[int, float]] = {}
    loops: dict[str, float] = {}
    for entry in entries:
        params = entry["params"]
        if "rounds" not in params or "tasks" not in params or not entry["runs"]:
            continue
        interpreter = entry["python"]
        if entry["runtime"] == LOOP:
            loops[interpreter] = entry["median"]
        else:
            line = times.setdefault((entry["runtime"], interpreter), {})
            line[params["workers"]] = entry["median"]
    lines = {
        f"{runtime}, {interpreter}": {
            workers: loops[interpreter] / time for workers, time in sorted(line.items())
        }
        for (runtime, interpreter), line in times.items()
        if interpreter in loops
    }
    if not lines:
        return []
    counts = sorted({workers for line in lines.values() for workers in line})
    rows = [
        [name, *(f"{line[n]:.3f}" if n in line else "-" for n in counts)]
        for name, line in lines.items()
    ]
    blocks: list[Block] = [
        Heading("Bodies of bytecode", 3),
        Grid(["speed of the plain loop, by workers", *map(str, counts)], rows),
    ]
    if len(counts) > 1:
        blocks += _draw(
            "Speed of bodies of bytecode over a plain loop, by workers",
            [("", lines)],
            across="workers",
            up="speed of the loop",
        )
    return blocks


def _other_blocks(entries: Sequence[Entry]) -> list[Block]:
    """Everything else as it was measured."""
    rows = []
    ratios = []
    for entry in entries:
        params = entry["params"]
        swept = "shape" in params and "outside" not in params
        bytecode = "rounds" in params and "tasks" in params
        if swept or bytecode or not entry["runs"]:
            continue
        values = [
            entry["metric"],
            quantity(entry["median"], entry["unit"]),
            f"{quantity(entry['min'])} to {quantity(entry['max'])}",
        ]
        if entry["unit"] == "x":
            ratios.append([_on(entry["case"], params), *values])
        else:
            rows.append([entry["case"], _on(entry["runtime"], params), *values])
    heads = ["metric", "median", "range"]
    blocks: list[Block] = []
    if rows:
        blocks += [Heading("Other measures", 3), Grid(["case", "runtime", *heads], rows)]
    if ratios:
        blocks += [Heading("Ratios", 3), Grid(["case", *heads], ratios)]
    return blocks


def _on(text: str, params: dict[str, Any]) -> str:
    workers = params.get("workers")
    return text if workers is None else f"{text}, {workers} worker{'s' * (workers != 1)}"


# Plots.

STYLES = {
    OURS: "#0b6e4f",
    FIXED: "#73c2a5",
    LIMIT: "#b8b8b8",
    NATIVE: "#08415c",
    NATIVE_LIMIT: "#d6d6d6",
    THREAD_POOL: "#cc2936",
    DASK: "#e8985e",
    JOBLIB: "#9c7a97",
    RAY: "#6b7fd7",
    PARLA_2: "#8d8d8d",
    PARLA_3: "#4a4a4a",
}


def _plots(name: str, found: dict[Cell, dict[str, Best]], columns: Sequence[str]) -> list[Block]:
    most = max(cell.cores for cell in found)
    times = sorted({cell.seconds for cell in found})
    usual = min(times, key=lambda seconds: abs(seconds - 1e-3))
    bars: dict[str, dict[Any, float]] = {}
    by_workers: dict[str, dict[str, dict[Any, float]]] = {}
    by_time: dict[str, dict[str, dict[Any, float]]] = {}
    for cell, row in found.items():
        kind = f"{cell.held:.0%} held, {cell.slices} slice{'s' * (cell.slices != 1)}"
        for key in columns:
            best = row.get(key)
            if best is None:
                continue
            head = COLUMNS[key][0]
            if cell.seconds == usual:
                line = by_workers.setdefault(kind, {}).setdefault(head, {})
                line[cell.cores] = best.speedup
                ideal = by_workers[kind].setdefault(IDEAL, {})
                ideal[cell.cores] = best.speedup / best.efficiency
                if cell.cores == most:
                    bars.setdefault(head, {})[kind] = best.efficiency
            if cell.cores == most:
                by_time.setdefault(kind, {}).setdefault(head, {})[1e3 * cell.seconds] = (
                    best.efficiency
                )
    at = f"{1e3 * usual:g} ms"
    blocks = _draw(
        f"{name}: efficiency with tasks of {at} on {most} workers",
        [("", bars)],
        across="",
        up="efficiency",
    )
    if len({cell.cores for cell in found}) > 1:
        blocks += _draw(
            f"{name}: speed-up with tasks of {at}, by workers",
            list(by_workers.items()),
            across="workers",
            up="speed-up",
        )
    if len(times) > 1:
        blocks += _draw(
            f"{name}: efficiency on {most} workers, by the time of a task",
            list(by_time.items()),
            across="ms",
            up="efficiency",
        )
    return blocks


def _draw(caption: str, panels: Sequence[Panel], *, across: str, up: str) -> list[Block]:
    """Lines over numbers, or bars in groups where the places are words."""
    colours = {head: STYLES[key] for key, (head, _) in COLUMNS.items()}
    return [Plot(plot(panels, across=across, up=up, colours=colours), caption)]
