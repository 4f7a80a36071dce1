"""Contestants, interleaved rounds and bars.

Protocol. A *contestant* is one runtime at one case; calling it makes one run and gives one value a
metric. Contestants that are compared belong to one *measure*, and a measure runs in rounds: every
round runs each contestant once, starting one further along each time, so that drift of the machine
and the order of the runs fall on all alike. The first rounds warm up and are not counted.

A *bar* is a limit on a series of values, one a round. Ratios are formed inside a round and only
then summarised, so that they compare what ran next to each other.

What is not there (a peer that is not installed, a tool that is missing) raises :class:`Missing`;
the contestant then stays in the result with the reason. Any other exception of a contestant is
kept as a failure of that contestant alone. Neither stops the others, and neither is dropped: a
bar that lacks its values is reported as not measured.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from charioteer.bench import records

__all__ = [
    "OURS",
    "Bar",
    "Contestant",
    "Key",
    "Measure",
    "Missing",
    "Result",
    "Sample",
    "Series",
    "Verdict",
    "absolute",
    "interleave",
    "ratio",
    "values_of",
]


OURS = "charioteer"
"""What the results of this project's own runtime are called."""


class Missing(Exception):
    """Something that a measurement needs is not installed here; the message says what."""


class Key(NamedTuple):
    """A contestant's runtime, case and workers: what tells it from the others of its measure."""

    runtime: str
    case: str
    workers: int | None = None


@dataclass(frozen=True)
class Sample:
    """The outcome of one run.

    Attributes:
        values: one value a metric.
        python: the interpreter, if it was another one.
        curve: the points that the values were read off, where it was a curve.
    """

    values: Mapping[str, float]
    python: str | None = None
    curve: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Contestant:
    """One runtime at one case.

    Attributes:
        runtime: whose run it is, such as ``"charioteer"`` or ``"Ray"``.
        case: what it does, in a few words; the same words for all that do the same.
        run: makes one run.
        workers: on how many workers, where that is part of the comparison.
        params: what else the run was given, for the record.
        warms: whether a round that is not counted does anything for the others; not if each run is
            a process of its own, and brings what it needs up to speed itself.
    """

    runtime: str
    case: str
    run: Callable[[], Sample]
    workers: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    warms: bool = True

    @property
    def key(self) -> Key:
        """What tells it from the others of its measure."""
        return Key(self.runtime, self.case, self.workers)


@dataclass
class Series:
    """What one contestant gave: a value a round for each metric, or why there is none."""

    values: dict[str, list[float]] = field(default_factory=dict)
    missing: str | None = None
    failure: str | None = None
    python: str | None = None
    curves: list[Sequence[tuple[float, float]]] = field(default_factory=list)

    @property
    def problem(self) -> str | None:
        """Why there are no values, in words; ``None`` if there are."""
        if self.missing is not None:
            return f"missing: {self.missing}"
        if self.failure is not None:
            return f"failed: {self.failure}"
        return None


Result = Mapping[Key, Series]


@dataclass(frozen=True)
class Bar:
    """A limit that a series has to meet by its median.

    Attributes:
        case, metric, unit: what the limited series is called.
        workers: on how many workers, where that is part of the comparison.
        values: forms the series from the measure's result; empty if its parts were not measured.
        limit: the limit, in ``unit``.
        at_least: whether values must not be below the limit, instead of not above it.
        derived: whether the series is none of the measured ones, so that it needs its own record.
        lacking: who is needed for it, for the words when it was not measured.
    """

    case: str
    metric: str
    unit: str
    values: Callable[[Result], Sequence[float]]
    limit: float
    workers: int | None = None
    at_least: bool = False
    derived: bool = True
    lacking: str = ""

    @property
    def text(self) -> str:
        """The limit in short, such as ``≤ 1.5 x``."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g} {self.unit}".rstrip()


@dataclass(frozen=True)
class Verdict:
    """A bar with the values it was held against; ``met`` is ``None`` if there were none."""

    bar: Bar
    values: Sequence[float]

    @property
    def met(self) -> bool | None:
        """Whether the median meets the limit; ``None`` if nothing was measured."""
        if not self.values:
            return None
        median = statistics.median(self.values)
        return median >= self.bar.limit if self.bar.at_least else median <= self.bar.limit


@dataclass(frozen=True)
class Measure:
    """Contestants that are compared with each other, and the bars on them.

    Attributes:
        name: a word to choose it by.
        title: what it measures, as a heading.
        contestants: who runs, in the order in which they are shown.
        units: the unit of each metric.
        bars: what has to hold.
        runs: rounds that count; the caller's choice if ``None``.
        warmup: rounds that do not.
        note: a line of explanation under the heading.
    """

    name: str
    title: str
    contestants: Sequence[Contestant]
    units: Mapping[str, str]
    bars: Sequence[Bar] = ()
    runs: int | None = None
    warmup: int = 1
    note: str = ""

    def steps(self, runs: int) -> int:
        """How many runs it takes in all, if nobody drops out."""
        return len(self.contestants) * (self.warmup + (self.runs or runs))

    def bar_on(self, contestant: Contestant, metric: str) -> Bar | None:
        """The bar on what this contestant measured, if there is one."""
        for bar in self.bars:
            key = Key(OURS, bar.case, bar.workers)
            if not bar.derived and bar.metric == metric and contestant.key == key:
                return bar
        return None

    def verdicts(self, result: Result) -> list[Verdict]:
        """Hold the bars against a result."""
        return [Verdict(bar, list(bar.values(result))) for bar in self.bars]

    def records(self, benchmark: str, result: Result) -> list[records.Record]:
        """The records of a result: one a contestant and metric, and one a derived bar."""
        entries = []
        for contestant in self.contestants:
            series = result[contestant.key]
            params = _params(contestant.workers, contestant.params)
            if series.problem is not None:
                params["missing"] = series.missing or series.failure
            if series.curves:
                params["curves"] = series.curves
            for metric, unit in self.units.items():
                values = series.values.get(metric, [])
                if not values and series.problem is None:
                    continue  # This contestant has no such metric.
                bar = self.bar_on(contestant, metric)
                entries.append(
                    records.record(
                        benchmark,
                        contestant.runtime,
                        contestant.case,
                        params,
                        metric,
                        unit,
                        values,
                        python=series.python,
                        bar=None if bar is None else bar.text,
                        met=None if bar is None else Verdict(bar, values).met,
                    )
                )
        for verdict in self.verdicts(result):
            bar = verdict.bar
            if not bar.derived:
                continue
            params = _params(bar.workers, {})
            if not verdict.values:
                params["missing"] = f"needs {bar.lacking}"
            entries.append(
                records.record(
                    benchmark,
                    OURS,
                    bar.case,
                    params,
                    bar.metric,
                    bar.unit,
                    verdict.values,
                    bar=bar.text,
                    met=verdict.met,
                )
            )
        return entries


def _params(workers: int | None, others: Mapping[str, Any]) -> dict[str, Any]:
    return dict(others) if workers is None else {"workers": workers, **others}


def ratio(
    over: Key, under: Key, metric: str, *, scale: float = 1.0
) -> Callable[[Result], Sequence[float]]:
    """The values of one contestant over those of another, round by round, times ``scale``."""

    def values(result: Result) -> Sequence[float]:
        if over not in result or under not in result:
            return []
        above, below = result[over].values.get(metric, []), result[under].values.get(metric, [])
        return [scale * a / b if b > 0 else math.inf for a, b in zip(above, below, strict=False)]

    return values


def values_of(key: Key, metric: str) -> Callable[[Result], Sequence[float]]:
    """The values of one contestant; none if it was not measured."""
    return lambda result: result[key].values.get(metric, []) if key in result else []


def absolute(
    case: str,
    metric: str,
    unit: str,
    limit: float,
    workers: int | None = None,
    *,
    at_least: bool = False,
) -> Bar:
    """A bar on what one of our own contestants measured."""
    return Bar(
        case=case,
        workers=workers,
        metric=metric,
        unit=unit,
        values=values_of(Key(OURS, case, workers), metric),
        limit=limit,
        at_least=at_least,
        derived=False,
        lacking="a run without failure",
    )


def interleave(
    contestants: Sequence[Contestant],
    runs: int,
    *,
    warmup: int = 1,
    step: Callable[[Contestant, bool], None] | None = None,
) -> dict[Key, Series]:
    """Run the contestants in rounds and return their series.

    Args:
        contestants: who runs; their keys must differ.
        runs: rounds that count, at least 1.
        warmup: rounds before them that do not.
        step: called with the contestant before each of its runs (``False``) and after (``True``),
            also for the runs that a contestant does not make, because it dropped out or because the
            round does nothing for it.

    Raises:
        ValueError: two contestants have the same key, or ``runs`` is below 1.
    """
    if runs < 1:
        raise ValueError("runs must be at least 1")
    result = {contestant.key: Series() for contestant in contestants}
    if len(result) != len(contestants):
        raise ValueError("two contestants have the same runtime, case and workers")
    if not contestants:
        return result
    for round_number in range(warmup + runs):
        first = round_number % len(contestants)
        for contestant in (*contestants[first:], *contestants[:first]):
            if step is not None:
                step(contestant, False)
            series = result[contestant.key]
            counted = round_number >= warmup
            if series.problem is None and (counted or contestant.warms):
                _run_once(contestant, series, counted=counted)
            if step is not None:
                step(contestant, True)
    return result


def _run_once(contestant: Contestant, series: Series, *, counted: bool) -> None:
    # Garbage of the run before must not be collected on this one's time.
    gc.collect()
    try:
        sample = contestant.run()
    except Missing as reason:
        series.missing = str(reason)
        series.values.clear()
        series.curves.clear()
    except Exception as error:
        words = str(error).strip().splitlines()
        series.failure = f"{type(error).__name__}: {words[0]}" if words else type(error).__name__
        series.values.clear()
        series.curves.clear()
    else:
        series.python = sample.python
        if counted:
            for metric, value in sample.values.items():
                series.values.setdefault(metric, []).append(value)
            if sample.curve:
                series.curves.append(sample.curve)
