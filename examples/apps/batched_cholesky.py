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
    python examples/apps/batched_cholesky.py                        # cores and 4 virtual GPUs
    python examples/apps/batched_cholesky.py --machine virtual:0    # cores alone
    python examples/apps/batched_cholesky.py --sizes 64,1024 --matrices 100

The GPUs are virtual and so is their time: NumPy computes the factors, and the clock is told what a
GPU would take for that. Work on cores takes no time on that clock, so what it takes is declared
(``cost=``). Without GPUs everything takes the time that it takes.

Every factor is compared with that of ``numpy.linalg.cholesky``; the exit status is 1 if one of them
differs.
"""

import argparse
import collections
import sys
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

import charioteer as ch
from charioteer.machine import Machine

Matrix = npt.NDArray[np.float64]

SETS = ("cpu", "gpu", "gpu*2")
BLOCK = 128
CORE = 1e10
"""Floating-point operations a second, of a core."""
GPU = 2e11
LAUNCH = 1e-5
"""Seconds that a kernel takes at least."""


def kernel(operations: float) -> None:
    """The current stream takes what a kernel of so many floating-point operations would."""
    ch.current().stream.busy(LAUNCH + operations / GPU)


@ch.task(base=False, size=lambda matrix: len(matrix))
def factor(matrix: Matrix) -> tuple[str, Matrix]:
    """The set that was taken, and the lower factor of a symmetric positive definite matrix."""
    raise NotImplementedError


@factor.variant(ch.cpu, cost=lambda matrix: len(matrix) ** 3 / 3 / CORE)
def _(matrix: Matrix) -> tuple[str, Matrix]:
    return "cpu", np.linalg.cholesky(matrix).astype(np.float64, copy=False)


@factor.variant(ch.gpu)
def _(matrix: Matrix) -> tuple[str, Matrix]:
    xp = ch.current().xp
    kernel(len(matrix) ** 3 / 3)
    return "gpu", xp.linalg.cholesky(xp.asarray(matrix)).get()


@factor.variant(ch.gpu * 2)
def _(matrix: Matrix) -> tuple[str, Matrix]:
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
                below = columns[k][width:] @ xp.linalg.inv(top).T
                kernel(width**3 / 3)
                kernel(len(below) * width**2)
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
                    kernel(2 * len(rest) * len(upper) * width)

    lower = np.zeros_like(matrix)
    for k in blocks:
        lower[edges[k] :, edges[k] : edges[k + 1]] = columns[k].get()
    return "gpu*2", lower


def positive_definite(size: int, random: np.random.Generator) -> Matrix:
    """A random symmetric positive definite matrix."""
    x = random.standard_normal((size, size))
    return x @ x.T + size * np.eye(size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Factor a batch, check all factors, and tell which bodies were taken."""
    parser = argparse.ArgumentParser(description="factor matrices on cores, one GPU or two")
    parser.add_argument("--machine", default="virtual:4", help="virtual:N, or a YAML file")
    parser.add_argument("--matrices", type=int, default=200, help="how many")
    parser.add_argument("--sizes", default="32,256,768", help="rows, one after the other")
    options = parser.parse_args(arguments)

    sizes = [int(size) for size in options.sizes.split(",")]
    random = np.random.default_rng(0)
    kinds = {size: positive_definite(size, random) for size in sizes}
    batch = [kinds[sizes[number % len(sizes)]] for number in range(options.matrices)]

    here = Machine.load(options.machine)
    if here.gpus:
        here = Machine(here.host, here.gpus, links=here.links, time="virtual", name=here.name)
    # Few are pending at a time: those that come later profit from what was measured.
    with ch.Runtime(here, max_pending=8) as runtime:
        start = time.perf_counter()
        tasks = [factor(matrix) for matrix in batch]
        factors = [task.result() for task in tasks]
        seconds = time.perf_counter() - start
        if runtime.devices is not None:
            seconds = runtime.devices.clock.now / 1e9

    chosen: dict[int, collections.Counter[str]] = {size: collections.Counter() for size in sizes}
    exact = {size: np.linalg.cholesky(matrix) for size, matrix in kinds.items()}
    worst = 0.0
    for matrix, (which, lower) in zip(batch, factors, strict=True):
        chosen[len(matrix)][which] += 1
        worst = max(worst, float(np.abs(lower - exact[len(matrix)]).max()))

    print(f"{len(batch)} matrices in {1e3 * seconds:.1f} ms, largest difference {worst:.1e}")
    print(f"{'rows':>8}" + "".join(f"{name:>8}" for name in SETS) + "   were factored there")
    for size, counts in sorted(chosen.items()):
        print(f"{size:8}" + "".join(f"{counts[name]:8}" for name in SETS))
    print(f"{'rows':>8}{'set':>8}{'calls':>8}{'tried':>8}   took")
    for model in sorted(runtime.models(), key=lambda model: (model.size, model.choice)):
        took = "as declared" if model.estimate is None else f"{1e3 * model.estimate:.3f} ms"
        print(f"{model.size:8}{model.choice:>8}{model.calls:8}{model.explored:8}   {took}")
    return 0 if worst <= 1e-10 * max(sizes) else 1


if __name__ == "__main__":
    sys.exit(main())
