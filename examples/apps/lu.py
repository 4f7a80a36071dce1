"""An LU factorization with partial pivoting, over panels.

The matrix is cut into panels, blocks of columns. A task factors a panel from its diagonal down and
says in which order it took the rows; another one brings the rows of a panel to its right into that
order, and updates it. Panels that are done are brought into the later orders at the end. What waits
for what follows from the regions that tasks read and write.

Looking for pivots is a long chain of little steps, so panels are factored by LAPACK on cores,
wherever the matrix is. Updates run on cores, by BLAS without the GIL, or on GPUs.

    pip install "charioteer[demo]"
    python examples/apps/lu.py

The exit status is 1 if the product of the factors is not the matrix with its rows in that order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import application
import numpy as np
import numpy.typing as npt

import charioteer as ch
from charioteer import blas, cpu, gpu

Matrix = npt.NDArray[np.float64]
Order = npt.NDArray[np.intp]
Factors = tuple[Matrix, Order]
"""L below the diagonal, its ones left out, and U; and which row of the matrix is in which place."""

SIZES = {"tiny": (70, 32), "small": (512, 64), "medium": (1536, 128), "large": (3072, 128)}
"""Rows, columns of a panel."""


@dataclass
class Problem:
    """A matrix, and how many columns a panel has."""

    matrix: Matrix
    panel: int


def problem(rows: int, panel: int) -> Problem:
    """A random matrix, which needs pivots."""
    return Problem(np.random.default_rng(0).standard_normal((rows, rows)), panel)


@ch.task
def factor(panel: ch.InOut[Matrix], order: ch.Out[Order]) -> None:
    """Overwrite a panel with its factors, and say which of its rows is in which place."""
    pivots = np.empty(panel.shape[1], np.int32)
    blas.getrf.fn(panel, pivots)
    order[...] = np.arange(len(order))
    for row, pivot in enumerate(pivots.tolist()):
        order[[row, pivot]] = order[[pivot, row]]


@ch.task(placement=gpu)
def update(panel: ch.In[Matrix], order: ch.In[Order], right: ch.InOut[Matrix]) -> None:
    """Bring the rows of a panel into order, and take off what the factored one has of them."""
    width = panel.shape[1]
    lower = np.tril(panel[:width], -1) + ch.current().xp.eye(width)
    right[...] = right[order]
    right[:width] = np.linalg.solve(lower, right[:width])
    right[width:] -= panel[width:] @ right[:width]


@update.variant(cpu)
def _(panel: ch.In[Matrix], order: ch.In[Order], right: ch.InOut[Matrix]) -> None:
    on_core(panel, order, right)


def on_core(panel: Matrix, order: Order, right: Matrix) -> None:
    """The update by BLAS."""
    width = panel.shape[1]
    right[...] = right[order]
    blas.trsm.fn(panel[:width], right[:width], unit=True)
    blas.gemm.fn(panel[width:], right[:width], right[width:], alpha=-1, beta=1)


@ch.task(placement=[gpu, cpu])
def settle(left: ch.InOut[Matrix], orders: ch.In[list[Order]]) -> None:
    """Bring the rows below a panel's own into the orders of the later ones."""
    for order in orders:
        below = left[len(left) - len(order) :]
        below[...] = below[order]


def lu(A: ch.Array, width: int) -> list[ch.Array]:
    """Spawn the tasks that overwrite a matrix with its factors; the orders of its panels."""
    starts = range(0, A.shape[0], width)
    orders = [ch.empty(A.shape[0] - start, np.intp) for start in starts]
    for k, start in enumerate(starts):
        panel = A[start:, start : start + width]
        factor.options(priority=len(starts) - k)(panel, orders[k])
        for j in range(k + 1, len(starts)):
            right = A[start:, starts[j] : starts[j] + width]
            update.options(priority=len(starts) - j)(panel, orders[k], right)
    for k, start in enumerate(starts[:-1]):
        settle(A[start + width :, start : start + width], orders[k + 1 :])
    return orders


def tasks(given: Problem, gpus: int = 0) -> Factors:
    """The factors, and the order of the rows."""
    whole = given.matrix.copy()
    A = ch.asarray(whole)
    orders = lu(A, given.panel)
    A.release()  # waits for the tasks, and gives the memory back
    return whole, combined([order.numpy() for order in orders])


def combined(orders: Sequence[Order]) -> Order:
    """The order of all rows that comes of those of the panels."""
    rows = np.arange(len(orders[0]))
    for order in orders:
        below = rows[len(rows) - len(order) :]
        below[...] = below[order]
    return rows


def by_hand(given: Problem, every: application.Every) -> Factors:
    """The same with plain loops; ``every`` calls a function with each number."""
    A, width = given.matrix.copy(), given.panel
    starts = range(0, len(A), width)
    orders = [np.empty(len(A) - start, np.intp) for start in starts]

    def panel(k: int, row: int) -> Matrix:
        return A[row:, starts[k] : starts[k] + width]

    factor.fn(A[:, :width], orders[0])
    for k, start in enumerate(starts):

        def step(j: int, k: int = k, start: int = start) -> None:
            on_core(panel(k, start), orders[k], panel(j, start))
            if j == k + 1:
                factor.fn(panel(j, starts[j]), orders[j])  # while the others are still updated

        every(step, range(k + 1, len(starts)))
    every(lambda k: settle.fn(panel(k, starts[k + 1]), orders[k + 1 :]), range(len(starts) - 1))
    return A, combined(orders)


def serially(given: Problem) -> Factors:
    """One panel after the other."""
    return by_hand(given, application.in_turn)


def threads(given: Problem, workers: int) -> Factors:
    """Panels on threads by hand; the next one is factored as soon as it is updated."""
    with application.side_by_side(workers) as every:
        return by_hand(given, every)


def error(found: Factors, given: Problem) -> float:
    """How far the product of the factors is from the matrix, on some vectors, relatively; infinite
    if a multiplier is above one, as none is with pivots."""
    factors, rows = found
    lower = np.tril(factors, -1)
    if np.abs(lower).max() > 1 + 1e-12:
        return float("inf")
    x = np.random.default_rng(1).standard_normal((len(factors), 4))
    upper = np.triu(factors) @ x
    right = given.matrix[rows] @ x
    return float(np.linalg.norm(lower @ upper + upper - right) / np.linalg.norm(right))


LIMIT = 1e-11
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (
    *(factor.fn, update.fn, on_core, settle.fn),
    *(lu, tasks, combined),
)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ("update", "settle")
"""What may run on cores or on GPUs."""


if __name__ == "__main__":
    sys.exit(application.main(sys.modules[__name__]))
