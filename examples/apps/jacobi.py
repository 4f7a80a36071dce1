"""Jacobi's iteration for the heat equation on a square, by blocks with halos.

A task computes one block of the new grid from the same block of the old one and a row or column of
each neighbour. So the regions that tasks read overlap, and a block of one sweep waits for its
neighbours in the sweep before and for nobody else: sweeps run into each other.

    pip install charioteer
    python examples/apps/jacobi.py

The exit status is 1 if NumPy, sweep by sweep, gives another grid.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

import charioteer as ch
from charioteer import cpu, gpu

Grid = npt.NDArray[np.float64]


@ch.task(placement=[gpu, cpu])
def relax(old: ch.In[Grid], new: ch.Out[Grid]) -> None:
    """The mean of the four neighbours; ``old`` has a halo of one around ``new``."""
    np.add(old[:-2, 1:-1], old[2:, 1:-1], out=new)
    new += old[1:-1, :-2]
    new += old[1:-1, 2:]
    new *= 0.25


def jacobi(grid: Grid, sweeps: int, block: int) -> Grid:
    """The grid after so many sweeps; its boundary stays."""
    old, new = ch.array(grid, name="even"), ch.array(grid, name="odd")
    rows, columns = grid.shape
    for _ in range(sweeps):
        for i in range(1, rows - 1, block):
            for j in range(1, columns - 1, block):
                below, right = min(i + block, rows - 1), min(j + block, columns - 1)
                halo = old[i - 1 : below + 1, j - 1 : right + 1]
                relax(halo, new[i:below, j:right])
        old, new = new, old
    return old.numpy()


def serially(grid: Grid, sweeps: int) -> Grid:
    """The same with plain NumPy."""
    old, new = grid.copy(), grid.copy()
    for _ in range(sweeps):
        relax.fn(old, new[1:-1, 1:-1])
        old, new = new, old
    return old


def main(arguments: Sequence[str] | None = None) -> int:
    """Relax a grid with one hot side, and compare with NumPy."""
    parser = argparse.ArgumentParser(description="Jacobi's iteration with halo regions")
    parser.add_argument("--size", type=int, default=1024, help="inner rows and columns")
    parser.add_argument("--block", type=int, default=256, help="rows and columns of a block")
    parser.add_argument("--sweeps", type=int, default=20, help="how many sweeps")
    parser.add_argument("--machine", help="virtual:4, or a machine file; else what is found")
    options = parser.parse_args(arguments)

    grid = np.zeros((options.size + 2, options.size + 2))
    grid[0] = 1.0
    with ch.Runtime(options.machine):
        start = time.perf_counter()
        relaxed = jacobi(grid, options.sweeps, options.block)
        seconds = time.perf_counter() - start
    equal = bool(np.array_equal(relaxed, serially(grid, options.sweeps)))
    print(f"{options.sweeps} sweeps: {1e3 * seconds:.0f} ms, {'equal' if equal else 'other'} bits")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
