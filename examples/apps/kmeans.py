"""k-means on handwritten digits: a reduction over shards of the points.

Each round assigns the points to the nearest center, shard by shard, and adds up where they are.
The shards add to one array, ``ch.Sum``: tasks get partial sums of their own, run side by side, and
what they found is combined before the task that moves the centers reads it.

    pip install "charioteer[demo]"
    python examples/apps/kmeans.py

The exit status is 1 if plain NumPy comes to other centers.
"""

import argparse
import sys
import time
from collections.abc import Sequence

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
    all_points, centers = ch.array(points), ch.array(points[:k])
    totals = ch.zeros((k, points.shape[1] + 1))
    for _ in range(rounds):
        for shard in all_points.shards(shards):
            assign(shard, centers, totals)
        move(totals, centers)
    return np.asarray(centers.numpy())


def serially(points: Matrix, k: int, rounds: int) -> Matrix:
    """The same with plain NumPy."""
    centers, totals = points[:k].copy(), np.zeros((k, points.shape[1] + 1))
    for _ in range(rounds):
        assign.fn(points, centers, totals)
        move.fn(totals, centers)
    return centers


def main(arguments: Sequence[str] | None = None) -> int:
    """Cluster the digits, and compare with NumPy."""
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description="k-means with a reduction")
    parser.add_argument("--rounds", type=int, default=20, help="how many rounds")
    parser.add_argument("--shards", type=int, default=4, help="tasks of a round")
    parser.add_argument("--machine", help="virtual:4, or a machine file; else what is found")
    options = parser.parse_args(arguments)

    points, digits = load_digits(return_X_y=True)
    with ch.Runtime(options.machine):
        start = time.perf_counter()
        centers = kmeans(points, 10, options.rounds, options.shards)
        seconds = time.perf_counter() - start
    error = float(np.abs(centers - serially(points, 10, options.rounds)).max())
    nearest = ((centers**2).sum(axis=1) - 2.0 * points @ centers.T).argmin(axis=1)
    pure = sum(np.bincount(digits[nearest == c], minlength=1).max() for c in range(10))
    print(
        f"{len(points)} digits, {options.rounds} rounds: {1e3 * seconds:.0f} ms, difference"
        f" {error:.1e}, {pure / len(points):.0%} with the majority of their cluster"
    )
    return 0 if error < 1e-9 else 1


if __name__ == "__main__":
    sys.exit(main())
