"""Tables, progress and verdicts for people; :mod:`charioteer.bench.records` is for programs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from charioteer.bench.harness import Contestant, Measure, Result, Verdict

__all__ = ["print_measure", "print_summary", "progress", "quantity"]


def quantity(value: float, unit: str = "") -> str:
    """A value to three significant digits, with its unit."""
    if not math.isfinite(value):
        text = str(value)
    elif value == 0:
        text = "0"
    else:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{min(digits, 6)}f}"
    return f"{text} {unit}".rstrip()


@contextmanager
def progress(name: str, done: int, total: int) -> Iterator[Callable[[Contestant, bool], None]]:
    """A progress bar on standard error, where that is a terminal.

    Args:
        name: the measure that now runs.
        done: the runs that other measures have made.
        total: the runs of all measures.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
    )
    # Repainted with every run instead of by a thread, which would wake up inside the runs.
    with Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not console.is_terminal,
        # Standard output may go elsewhere, and must not be drawn into the terminal.
        redirect_stdout=False,
    ) as bar:
        task = bar.add_task(name, total=total, completed=done)

        def step(contestant: Contestant, done: bool) -> None:
            words = escape(f"{name}: {contestant.runtime}")
            bar.update(task, description=words, advance=1 if done else 0, refresh=not done)

        yield step


def print_measure(
    console: Console, measure: Measure, result: Result, verdicts: Sequence[Verdict]
) -> None:
    """Print a measure as a table: what was measured, then the ratios, with bars and verdicts.

    Reasons why something is missing or failed follow the table, since they would burst it.
    """
    groups: dict[tuple[str, int | None], list[_Row]] = {}
    reasons = []
    for contestant in measure.contestants:
        series = result[contestant.key]
        group = groups.setdefault((contestant.case, contestant.workers), [])
        for metric, unit in measure.units.items():
            values = series.values.get(metric, [])
            if values or series.problem is not None:
                label = contestant.runtime + (f", {metric}" if len(measure.units) > 1 else "")
                bar = measure.bar_on(contestant, metric)
                absent = "missing" if series.failure is None else "failed"
                verdict = None if bar is None else Verdict(bar, values)
                group.append(_Row(label, values, unit, verdict, absent))
        if series.problem is not None:
            reasons.append(f"{contestant.runtime} {series.problem}")
    for verdict in verdicts:
        bar = verdict.bar
        if bar.derived:
            group = groups.setdefault((bar.case, bar.workers), [])
            group.append(_Row(bar.metric, verdict.values, bar.unit, verdict))
            if not verdict.values:
                reasons.append(f"{bar.metric} needs {bar.lacking}")

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(measure.title, header_style="bold", min_width=34)
    table.add_column("median", justify="right", no_wrap=True)
    table.add_column("range", justify="right", no_wrap=True)
    table.add_column("bar", no_wrap=True)
    table.add_column("met", no_wrap=True)
    for (case, workers), rows in groups.items():
        table.add_row(f"[cyan]{escape(case + _on(workers))}[/]")
        for row in rows:
            table.add_row(*row.cells())
    console.print()
    console.print(table)
    for reason in dict.fromkeys(reasons):
        console.print(f"[yellow]{escape(reason)}[/]", soft_wrap=True)
    if measure.note:
        console.print(f"[dim]{escape(measure.note)}[/]", soft_wrap=True)


@dataclass(frozen=True)
class _Row:
    """A line of a table: a series, with the verdict of a bar on it; ``absent`` if it is empty."""

    label: str
    values: Sequence[float]
    unit: str
    verdict: Verdict | None
    absent: str = "not measured"

    def cells(self) -> tuple[str, ...]:
        values = self.values
        return (
            f"  {escape(self.label)}",
            quantity(statistics.median(values), self.unit)
            if values
            else f"[yellow]{self.absent}[/]",
            _range(values) if values else "",
            "" if self.verdict is None else self.verdict.bar.text,
            "" if self.verdict is None else _word(self.verdict),
        )


def _on(workers: int | None) -> str:
    return "" if workers is None else f", {workers} worker{'s' if workers != 1 else ''}"


def print_summary(console: Console, verdicts: Sequence[tuple[Measure, Verdict]]) -> None:
    """Count the bars, and name those that were not met or not measured."""
    met = sum(verdict.met is True for _, verdict in verdicts)
    console.print()
    console.print(f"[bold]{met} of {len(verdicts)} bars met[/]")
    for wanted, style, words in ((False, "red", "not met"), (None, "yellow", "not measured")):
        for measure, verdict in verdicts:
            if verdict.met is not wanted:
                continue
            bar = verdict.bar
            detail = (
                f"{quantity(statistics.median(verdict.values), bar.unit)}, bar {bar.text}"
                if verdict.values
                else f"needs {bar.lacking}"
            )
            line = f"{measure.name}: {bar.case}{_on(bar.workers)}: {bar.metric}: {detail}"
            console.print(f"[{style}]{words}[/]: {escape(line)}", soft_wrap=True)


def _range(values: Sequence[float]) -> str:
    return f"{quantity(min(values))} to {quantity(max(values))}"


def _word(verdict: Verdict) -> str:
    return {True: "[green]yes[/]", False: "[red]no[/]", None: "[yellow]?[/]"}[verdict.met]
