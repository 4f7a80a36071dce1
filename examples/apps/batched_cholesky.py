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

SIZES = {
    "tiny": (6, (32, 48)),
    "small": (36, (32, 256, 1024)),
    "medium": (90, (32, 256, 1024)),
    "large": (90, (64, 512, 1152)),
}
"""Matrices, and their rows, one after the other."""
SETS = ("cpu", "gpu", "gpu*2")
BLOCK = 128
SPEED = 5e9
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


@ch.task(base=False, size=lambda matrix, lower: len(matrix))
def factor(matrix: ch.In[Any], lower: ch.Out[Any]) -> str:
    """The lower factor of a symmetric positive definite matrix; gives the set that was taken."""
    raise NotImplementedError


@factor.variant(ch.cpu, cost=lambda matrix, lower: len(matrix) ** 3 / 3 / SPEED)
def factor_on_core(matrix: ch.In[Any], lower: ch.Out[Any]) -> str:
    lower[...] = np.linalg.cholesky(matrix)
    return "cpu"


@factor.variant(ch.gpu)
def factor_on_gpu(matrix: ch.In[Any], lower: ch.Out[Any]) -> str:
    lower[...] = np.linalg.cholesky(matrix)
    return "gpu"


@factor.variant(ch.gpu * 2, shards={"lower": 1})
def factor_on_two(matrix: ch.In[Any], lower: ch.Out[Any]) -> str:
    context = ch.current()
    n, half = len(matrix[0]), lower[0].shape[1]
    # No block column is in both halves of the result.
    edges = [*range(0, half, BLOCK), *range(half, n, BLOCK), n]
    blocks = range(len(edges) - 1)

    # Block column k, from its diagonal block down, on the device whose turn it is.
    columns = {}
    for turn, _ in enumerate(context.each()):
        lower[turn][...] = 0
        for k in blocks[turn::2]:
            columns[k] = matrix[turn][edges[k] :, edges[k] : edges[k + 1]].copy()

    for k in blocks:
        width = edges[k + 1] - edges[k]
        for turn, _ in enumerate(context.each()):
            if turn == k % 2:
                top = np.linalg.cholesky(columns[k][:width])
                columns[k][width:] = np.linalg.solve(top, columns[k][width:].T).T
                columns[k][:width] = top

        # Before this the other device must not fetch what may not be there yet.
        context.barrier()

        for turn, _ in enumerate(context.each()):
            panel = columns[k]
            if turn != k % 2:
                panel = context.xp.empty(columns[k].shape)
                panel[...] = columns[k]
            if turn == (edges[k] >= half):
                begin = edges[k] - turn * half
                lower[turn][edges[k] :, begin : begin + width] = panel
            for j in blocks[k + 1 :]:
                if j % 2 == turn:
                    rest = panel[edges[j] - edges[k] :]
                    columns[j] -= rest @ rest[: edges[j + 1] - edges[j]].T
    return "gpu*2"


def tasks(given: Problem, gpus: int = 0) -> list[Factor]:
    """The factors, and on which set each was computed."""
    results = [np.empty_like(matrix) for matrix in given.batch]
    regions = [ch.asarray(result) for result in results]
    matrices = {id(matrix): ch.asarray(matrix) for matrix in given.batch}
    spawned: list[ch.Task[str]] = []
    for matrix, region in zip(given.batch, regions, strict=True):
        if len(spawned) >= PENDING:
            spawned[-PENDING].result()
        spawned.append(factor(matrices[id(matrix)], region))
        region.prefetch(ch.cpu)  # it comes home while others are computed
    for region in regions:
        region.release()  # waits for its task, and gives the memory back
    return [(task.result(), result) for task, result in zip(spawned, results, strict=True)]


def by_hand(given: Problem, every: application.Every) -> list[Factor]:
    """The same with plain NumPy; ``every`` calls a function with each number."""
    return every(lambda at: ("cpu", np.linalg.cholesky(given.batch[at])), range(len(given.batch)))


def serially(given: Problem) -> list[Factor]:
    """One matrix after the other."""
    return by_hand(given, application.in_turn)


def threads(given: Problem, workers: int) -> list[Factor]:
    """Matrices on threads by hand."""
    with application.side_by_side(workers) as every:
        return by_hand(given, every)


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
    factor_on_core,
    factor_on_gpu,
    factor_on_two,
    tasks,
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
