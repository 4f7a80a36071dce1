"""Jacobi's iteration for the heat equation on a square, by blocks with halos.

A task computes one block of the new grid from the same block of the old one and a row or column of
each neighbour. So the regions that tasks read overlap, and a block of one sweep waits for its
neighbours in the sweep before and for nobody else: sweeps run into each other.

    pip install charioteer
    python examples/apps/jacobi.py

The exit status is 1 if NumPy, sweep by sweep, gives another grid, to the bit.
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

Grid = npt.NDArray[np.float64]
Region = tuple[slice, slice]

SIZES = {
    "tiny": (30, 50, 16, 5),
    "small": (512, 512, 128, 20),
    "medium": (1024, 1024, 256, 50),
    "large": (3072, 3072, 512, 20),
}
"""Inner rows and columns, rows and columns of a block, sweeps."""


@dataclass
class Problem:
    """A grid with a boundary of one around it."""

    grid: Grid
    block: int
    sweeps: int

    @cached_property
    def right(self) -> Grid:
        """The grid that NumPy gives for whole sweeps."""
        old, new = self.grid.copy(), self.grid.copy()
        for _ in range(self.sweeps):
            relax.fn(old, new[1:-1, 1:-1])
            old, new = new, old
        return old


def problem(rows: int, columns: int, block: int, sweeps: int) -> Problem:
    """A cold grid with a hot side."""
    grid = np.zeros((rows + 2, columns + 2))
    grid[0] = 1.0
    return Problem(grid, block, sweeps)


@ch.task(placement=[gpu, cpu])
def relax(old: ch.In[Grid], new: ch.Out[Grid]) -> None:
    """The mean of the four neighbours; ``old`` has a halo of one around ``new``."""
    np.add(old[:-2, 1:-1], old[2:, 1:-1], out=new)
    new += old[1:-1, :-2]
    new += old[1:-1, 2:]
    new *= 0.25


def blocks(shape: tuple[int, ...], block: int) -> list[tuple[Region, Region]]:
    """The regions of the blocks of a grid, with a halo of one and without."""
    found = []
    for i in range(1, shape[0] - 1, block):
        for j in range(1, shape[1] - 1, block):
            below, right = min(i + block, shape[0] - 1), min(j + block, shape[1] - 1)
            halo = np.s_[i - 1 : below + 1, j - 1 : right + 1]
            found.append((halo, np.s_[i:below, j:right]))
    return found


def tasks(given: Problem, gpus: int = 0) -> Grid:
    """The grid after all sweeps; its boundary stays."""
    even, odd = given.grid.copy(), given.grid.copy()
    old, new = ch.asarray(even, name="even"), ch.asarray(odd, name="odd")
    regions = blocks(old.shape, given.block)
    for _ in range(given.sweeps):
        for halo, inner in regions:
            relax(old[halo], new[inner])
        old, new = new, old
    old.release()  # waits for the tasks, and gives the memory back
    return odd if given.sweeps % 2 else even


def by_hand(given: Problem, every: application.Every) -> Grid:
    """The same with plain NumPy; ``every`` calls a function with each number."""
    old, new = given.grid.copy(), given.grid.copy()
    regions = blocks(old.shape, given.block)
    for _ in range(given.sweeps):

        def step(at: int, old: Grid = old, new: Grid = new) -> None:
            halo, inner = regions[at]
            relax.fn(old[halo], new[inner])

        every(step, range(len(regions)))
        old, new = new, old
    return old


def serially(given: Problem) -> Grid:
    """One block after the other."""
    return by_hand(given, application.in_turn)


def threads(given: Problem, workers: int) -> Grid:
    """Blocks on threads by hand, which meet after each sweep."""
    with application.side_by_side(workers) as every:
        return by_hand(given, every)


def error(found: Grid, given: Problem) -> float:
    """The largest difference from the grid that NumPy gives for whole sweeps."""
    return float(np.abs(found - given.right).max())


LIMIT = 0.0
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (relax.fn, blocks, tasks)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ("relax",)
"""What may run on cores or on GPUs."""


if __name__ == "__main__":
    sys.exit(application.main(sys.modules[__name__]))
