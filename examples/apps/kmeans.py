"""k-means: a reduction over shards of the points.

Each round assigns the points to the nearest center, shard by shard, and adds up where they are.
The shards add to one array, ``ch.Sum``: tasks get partial sums of their own, run side by side, and
what they found is combined before the task that moves the centers reads it.

    pip install charioteer
    python examples/apps/kmeans.py

The exit status is 1 if plain NumPy comes to other centers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import application
import numpy as np
import numpy.typing as npt

import charioteer as ch
from charioteer import cpu, gpu

Matrix = npt.NDArray[np.float64]


@ch.task(placement=[gpu, cpu])
def assign(points: ch.In[Matrix], centers: ch.In[Matrix], totals: ch.Sum[Matrix]) -> None:
    """Add each point, and a one, to the totals of its nearest center."""
    distances = (centers**2).sum(axis=1) - 2.0 * points @ centers.T
    numbers = np.cumsum(np.ones_like(centers[:, 0])) - 1
    # A row for each center, with a one for each of its points.
    members = 1.0 * (distances.argmin(axis=1) == numbers[:, None])
    totals[:, :-1] += members @ points
    totals[:, -1] += members.sum(axis=1)


@ch.task(placement=[gpu, cpu])
def move(totals: ch.InOut[Matrix], centers: ch.InOut[Matrix]) -> None:
    """Move the centers to the means of their points, and clear the totals for the next round."""
    count = totals[:, -1:]
    centers[...] = np.where(count > 0, totals[:, :-1] / np.maximum(count, 1.0), centers)
    totals[...] = 0.0


def kmeans(points: Matrix, k: int, rounds: int, shards: int) -> Matrix:
    """The centers after so many rounds, beginning with the first points."""
    all_points, centers = ch.asarray(points), ch.array(points[:k])
    totals = ch.zeros((k, points.shape[1] + 1))
    for _ in range(rounds):
        for shard in all_points.shards(shards):
            assign(shard, centers, totals)
        move(totals, centers)
    return np.asarray(centers.numpy())


def whole(points: Matrix, k: int, rounds: int) -> Matrix:
    """The same with plain NumPy, without shards."""
    centers, totals = points[:k].copy(), np.zeros((k, points.shape[1] + 1))
    for _ in range(rounds):
        assign.fn(points, centers, totals)
        move.fn(totals, centers)
    return centers


SIZES = {
    "tiny": (300, 4, 5, 3, 4),
    "small": (20_000, 8, 10, 10, 8),
    "medium": (100_000, 16, 16, 10, 8),
    "large": (400_000, 16, 16, 10, 48),
}
"""Points, numbers of a point, clusters, rounds, shards."""


@dataclass
class Problem:
    """Points, a row each, and how they are clustered."""

    points: Matrix
    clusters: int
    rounds: int
    shards: int

    @cached_property
    def right(self) -> Matrix:
        """The centers that NumPy comes to without shards."""
        return whole(self.points, self.clusters, self.rounds)


def problem(count: int, numbers: int, clusters: int, rounds: int, shards: int) -> Problem:
    """Clouds of points at random places."""
    chance = np.random.default_rng(0)
    middles = 10 * chance.random((clusters, numbers))
    points = middles[chance.integers(0, clusters, count)] + chance.standard_normal((count, numbers))
    return Problem(points, clusters, rounds, shards)


def tasks(given: Problem, gpus: int = 0) -> Matrix:
    """The centers."""
    return kmeans(given.points, given.clusters, given.rounds, given.shards)


def by_hand(given: Problem, every: application.Every) -> Matrix:
    """The same shard by shard; ``every`` calls a function with each number."""
    centers = given.points[: given.clusters].copy()
    shards = np.array_split(given.points, given.shards)
    for _ in range(given.rounds):

        def part(at: int) -> Matrix:
            totals = np.zeros((len(centers), centers.shape[1] + 1))
            assign.fn(shards[at], centers, totals)
            return totals

        move.fn(np.sum(every(part, range(len(shards))), axis=0), centers)
    return centers


def serially(given: Problem) -> Matrix:
    """One shard after the other."""
    return by_hand(given, application.in_turn)


def threads(given: Problem, workers: int) -> Matrix:
    """Shards on threads by hand, each with totals of its own, which are added up."""
    with application.side_by_side(workers) as every:
        return by_hand(given, every)


def error(found: Matrix, given: Problem) -> float:
    """The largest difference from the centers that NumPy comes to without shards."""
    return float(np.abs(found - given.right).max())


LIMIT = 1e-9
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (assign.fn, move.fn, kmeans)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ("assign", "move")
"""What may run on cores or on GPUs."""


if __name__ == "__main__":
    sys.exit(application.main(sys.modules[__name__]))
