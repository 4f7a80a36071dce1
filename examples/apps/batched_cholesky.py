"""A batch of Cholesky factorizations, each on the devices that are the fastest for its size.

One task a matrix, and three bodies: on a core with NumPy, on one GPU, and on two. Two GPUs pay for
large matrices and cost for small ones; where the border lies depends on the machine. So nobody says
where a matrix goes: the runtime tries the bodies a few times for each size, measures, and from then
on takes the one that finishes first, given what cores and devices have before them.

The body for two GPUs is a blocked, right-looking factorization. Block columns are dealt out to the
two devices in turns. Who has a column factors it; at a barrier, on the devices, the streams wait
for each other; then the other one fetches it over the link, and both update the columns to its
right that are theirs.

    pip install charioteer
    python examples/apps/batched_cholesky.py                        # cores, and the GPUs there are
    python examples/apps/batched_cholesky.py --machine virtual:4    # which body for which size
    python examples/apps/batched_cholesky.py --machine virtual:4 --size large

On virtual GPUs time is virtual too: NumPy computes the factors, and the clock is told what a slow
GPU would take for that. Work on cores takes no time on that clock, so what it takes is declared
(``cost=``). Elsewhere everything takes the time that it takes.

The exit status is 1 if the product of a factor and its transposed is not the matrix.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import application
import numpy as np
import numpy.typing as npt

import charioteer as ch
from charioteer import virtual
from charioteer.bench import simulated
from charioteer.machine import Machine

Matrix = npt.NDArray[np.float64]
Factor = tuple[str, Matrix]
"""The set that it was computed on, and the lower factor."""
Columns = tuple[str, list[Any]]
"""The same in block columns from their diagonal blocks down, each on some device."""

SIZES = {
    "tiny": (6, (32, 48)),
    "small": (36, (32, 256, 1024)),
    "medium": (90, (32, 256, 1024)),
    "large": (90, (64, 512, 1152)),
}
"""Matrices, and their rows, one after the other."""
SETS = ("cpu", "gpu", "gpu*2")
BLOCK = 128
SPEED = 1e10
"""Floating-point operations a second, of a core."""
GPU = 1e11
"""The same of the slow GPU on which the script shows which body is taken."""
PENDING = 8
"""How many matrices are under way: those that come later profit from what was measured."""


@dataclass
class Problem:
    """Symmetric positive definite matrices, some of them the same."""

    batch: list[Matrix]


def problem(matrices: int, sizes: Sequence[int]) -> Problem:
    """So many matrices, of the sizes in turns."""
    chance = np.random.default_rng(0)
    kinds = []
    for size in sizes:
        x = chance.standard_normal((size, size))
        kinds.append(x @ x.T + size * np.eye(size))
    return Problem([kinds[at % len(kinds)] for at in range(matrices)])


@ch.task(base=False, size=lambda matrix: len(matrix))
def factor(matrix: Matrix) -> Columns:
    """The set that was taken, and the lower factor of a symmetric positive definite matrix."""
    raise NotImplementedError


@factor.variant(ch.cpu, cost=lambda matrix: len(matrix) ** 3 / 3 / SPEED)
def factor_on_core(matrix: Matrix) -> Columns:
    return "cpu", [on_core(matrix)]


@factor.variant(ch.gpu)
def factor_on_gpu(matrix: Matrix) -> Columns:
    xp = ch.current().xp
    return "gpu", [xp.linalg.cholesky(xp.asarray(matrix))]


@factor.variant(ch.gpu * 2)
def factor_on_two(matrix: Matrix) -> Columns:
    context = ch.current()
    xp = context.xp
    edges = [*range(0, len(matrix), BLOCK), len(matrix)]
    blocks = range(len(edges) - 1)

    # Block column k, from its diagonal block down, on the device whose turn it is.
    columns = {}
    for turn, _ in enumerate(context.each()):
        for k in blocks[turn::2]:
            columns[k] = xp.asarray(matrix[edges[k] :, edges[k] : edges[k + 1]])

    for k in blocks:
        width = edges[k + 1] - edges[k]
        for turn, _ in enumerate(context.each()):
            if turn == k % 2:
                top = xp.linalg.cholesky(columns[k][:width])
                below = xp.linalg.solve(top, columns[k][width:].T).T
                columns[k][:width] = top
                columns[k][width:] = below

        # Before this the other device must not fetch what may not be there yet.
        context.barrier()

        for turn, _ in enumerate(context.each()):
            panel = columns[k]
            if turn != k % 2:
                panel = xp.empty(columns[k].shape)
                panel[...] = columns[k]
            for j in blocks[k + 1 :]:
                if j % 2 == turn:
                    rest = panel[edges[j] - edges[k] :]
                    upper = rest[: edges[j + 1] - edges[j]]
                    columns[j] -= rest @ upper.T

    return "gpu*2", [columns[k] for k in blocks]


def whole(found: Columns) -> Factor:
    """A factor on the host, of block columns where they are."""
    where, columns = found
    if where == "cpu":
        return where, columns[0]
    lower = np.zeros((len(columns[0]), len(columns[0])))
    begin = 0
    for column in columns:
        end = begin + column.shape[1]
        lower[begin:, begin:end] = column.get()
        begin = end
    return where, lower


def on_core(matrix: Matrix) -> Matrix:
    """The factor by NumPy."""
    return np.asarray(np.linalg.cholesky(matrix))


def tasks(given: Problem, gpus: int = 0) -> list[Factor]:
    """The factors, and on which set each was computed."""
    under_way: collections.deque[ch.Task[Columns]] = collections.deque()
    found = []
    for matrix in given.batch:
        if len(under_way) == PENDING:
            found.append(whole(under_way.popleft().result()))
        under_way.append(factor(matrix))
    return [*found, *(whole(task.result()) for task in under_way)]


def serially(given: Problem) -> list[Factor]:
    """One matrix after the other."""
    return [("cpu", on_core(matrix)) for matrix in given.batch]


def threads(given: Problem, workers: int) -> list[Factor]:
    """Matrices on threads by hand."""
    with application.side_by_side(workers) as every:
        return every(lambda at: ("cpu", on_core(given.batch[at])), range(len(given.batch)))


def error(found: list[Factor], given: Problem) -> float:
    """How far products of the factors are from the matrices, on a vector, relatively."""
    worst = 0.0
    for (_, lower), matrix in zip(found, given.batch, strict=True):
        right = matrix.sum(axis=1)
        wrong = lower @ lower.sum(axis=0) - right
        worst = max(worst, float(np.linalg.norm(wrong) / np.linalg.norm(right)))
    return worst


LIMIT = 1e-12
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (
    *(factor_on_core, factor_on_gpu, factor_on_two),
    *(on_core, whole, tasks),
)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ()
"""Nothing: the choice among its bodies is what this shows."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Factor a batch, check all factors, and tell which bodies were taken."""
    parser = argparse.ArgumentParser(description="factor matrices on cores, one GPU or two")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--machine", help="virtual:4, or a machine file; else what is found")
    options = parser.parse_args(arguments)
    given = problem(*SIZES[options.size])
    machine = Machine.detect() if options.machine is None else Machine.load(options.machine)

    in_virtual_time = machine.driver == "virtual" and bool(machine.gpus)
    if in_virtual_time:
        machine = Machine(
            machine.host, machine.gpus, links=machine.links, time="virtual", name=machine.name
        )
    cost = functools.partial(simulated.kernel, arithmetic=GPU)
    timed = virtual.timed(cost) if in_virtual_time else contextlib.nullcontext()
    with timed, ch.Runtime(machine) as runtime:
        start = time.perf_counter()
        found = tasks(given)
        seconds = time.perf_counter() - start
        if in_virtual_time and runtime.devices is not None:
            seconds = runtime.devices.clock.now / 1e9

    chosen: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for which, lower in found:
        chosen[len(lower)][which] += 1
    wrong = error(found, given)
    print(f"{len(found)} matrices in {1e3 * seconds:.1f} ms, error {wrong:.1e}")
    print(f"{'rows':>8}" + "".join(f"{name:>8}" for name in SETS) + "   were factored there")
    for size, counts in sorted(chosen.items()):
        print(f"{size:8}" + "".join(f"{counts[name]:8}" for name in SETS))
    print(f"{'rows':>8}{'set':>8}{'calls':>8}{'tried':>8}   took")
    for model in sorted(runtime.models(), key=lambda model: (model.size, model.choice)):
        took = "as declared" if model.estimate is None else f"{1e3 * model.estimate:.3f} ms"
        print(f"{model.size:8}{model.choice:>8}{model.calls:8}{model.explored:8}   {took}")
    return 0 if wrong <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
