"""Tables of the GIL study for a terminal."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.markup import escape

from charioteer.bench.gil_runs import DASK, JOBLIB, NATIVE, PARLA_2, PARLA_3, RAY
from charioteer.bench.harness import OURS, Key, Measure, Result
from charioteer.bench.peers import THREAD_POOL

__all__ = ["CellTable"]

FIXED = f"{OURS}, gil="
COLUMNS = {
    OURS: (OURS, 11),
    FIXED: ("best gil=", 11),
    NATIVE: ("native", 7),
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
            self._console.print(f"\n[bold]Efficiency{'':46}{heads}[/]", soft_wrap=True)
        for case in dict.fromkeys(contestant.case for contestant in measure.contestants):
            most = max(c.workers or 0 for c in measure.contestants)
            name = f"{case}, {most} worker{'s' * (most != 1)}"
            cells = [
                f"{_shown(measure, result, case, name):>{width + 1}}"
                for name, (_, width) in COLUMNS.items()
            ]
            self._console.print(f"{escape(name):56}{''.join(cells)}", soft_wrap=True)
        for key, series in result.items():
            if series.problem is not None and f"{key.runtime} {series.problem}" not in self._told:
                self._told.add(f"{key.runtime} {series.problem}")
                line = escape(f"{key.runtime} {series.problem}")
                self._console.print(f"[yellow]{line}[/]", soft_wrap=True)


def _shown(measure: Measure, result: Result, case: str, name: str) -> str:
    """The best efficiency in a column, with its width or threads where there are several."""
    found: list[tuple[float, Key]] = []
    for contestant in measure.contestants:
        values = result[contestant.key].values.get("efficiency")
        if contestant.case == case and column(contestant.runtime) == name and values:
            found.append((statistics.median(values), contestant.key))
    if not found:
        return "-"
    value, key = max(found)
    if name == FIXED:
        return f"{value:.3f} @{key.runtime.removeprefix(FIXED)}"
    if name == THREAD_POOL:
        return f"{value:.3f} @{key.workers}"
    return f"{value:.3f}"
