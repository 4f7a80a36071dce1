"""Intervals for what a few runs say: medians, and how sure one can be of them.

With eight values or more the interval is the percentile bootstrap's: resampled with replacement,
the medians of the resamples, and what lies between their quantiles. With fewer values resampling
says too little, since no resample goes beyond the extremes (of three values, the true median lies
outside them one time in four). There the interval is Student's, on logarithms where all values are
positive, which suits times and ratios. Of one value nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import NamedTuple

import numpy as np

__all__ = ["ENOUGH", "LEVEL", "Interval", "interval"]

LEVEL = 0.95
ENOUGH = 8
"""Values from which on there is a bootstrap."""
RESAMPLES = 2_000
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447}
"""The 0.975 quantile of Student's distribution, by degrees of freedom."""


class Interval(NamedTuple):
    """What lies within with 95 %, and the median of the values."""

    median: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a value is in it."""
        return self.low <= value <= self.high


def interval(values: Sequence[float], seed: int = 0) -> Interval | None:
    """The median of some values with its 95 % interval.

    Args:
        values: finite ones.
        seed: of the resampling; the same values and seed give the same interval.

    Returns:
        The interval, which always holds the median of the values; ``None`` for fewer than two.
    """
    if len(values) < 2:
        return None
    middle = median(values)
    if len(values) < ENOUGH:
        low, high = _student(values)
    else:
        low, high = _bootstrap(values, seed)
    return Interval(middle, min(low, middle), max(high, middle))


def _student(values: Sequence[float]) -> tuple[float, float]:
    logarithms = min(values) > 0
    scaled = [math.log(value) for value in values] if logarithms else list(values)
    half = STUDENT[len(values) - 1] * stdev(scaled) / math.sqrt(len(values))
    low, high = fmean(scaled) - half, fmean(scaled) + half
    return (_exp(low), _exp(high)) if logarithms else (low, high)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _bootstrap(values: Sequence[float], seed: int) -> tuple[float, float]:
    chance = np.random.default_rng(seed)
    resamples = chance.choice(np.asarray(values, float), (RESAMPLES, len(values)))
    medians = np.sort(np.median(resamples, axis=1))
    outside = (1 - LEVEL) / 2
    first, last = int(outside * RESAMPLES), math.ceil((1 - outside) * RESAMPLES) - 1
    return float(medians[first]), float(medians[last])
