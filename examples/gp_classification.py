"""Gaussian-process classification of digits, with the length scale chosen by the data.

A Gaussian process is fitted for each of several length scales, and the one under which the training
labels are the most probable (the largest log marginal likelihood, or evidence) classifies the
digits that were held out. Each fit is a graph of a few hundred tile tasks: kernel matrix, Cholesky
factorization, forward and backward solve. All of them are spawned before the first has run, so
where one factorization has too few tasks left for all workers, another one fills the gap.

The graph itself is in ``charioteer/demo/gp.py``: one ``@ch.spawn`` for each kind of tile task,
with the tiles that it reads and writes, from which the order follows. What is spawned here is
joined on in the same way. The tile kernels in ``charioteer/demo/kernels.py`` call BLAS and LAPACK
without the GIL.

    pip install "charioteer[demo]"
    python examples/gp_classification.py

The exit status is 1 if the labels differ from those of a serial run of the same kernels.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import charioteer as ch
from charioteer.demo import gp, serial

LENGTH_SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)


def log_evidence(
    targets: Sequence[gp.Matrix], weights: Sequence[gp.Matrix], diagonal: Sequence[gp.Matrix]
) -> float:
    """The log probability of the targets, up to a constant that all length scales share."""
    fit = sum(float(np.sum(t * w)) for t, w in zip(targets, weights, strict=True))
    log_root_determinant = sum(float(np.log(np.diag(tile)).sum()) for tile in diagonal)
    classes = int(targets[0].shape[1])
    return -0.5 * fit - classes * log_root_determinant


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, choose, classify, print; returns the exit status."""
    parser = argparse.ArgumentParser(description="Gaussian-process classification of digits.")
    parser.add_argument("--tile", type=int, default=128, help="rows and columns of a tile")
    parser.add_argument("--workers", type=int, help="workers (default: the usable cores)")
    options = parser.parse_args(argv)

    candidates = [gp.Workspace(gp.digits(scale), options.tile) for scale in LENGTH_SCALES]
    evidence = ch.TaskSpace("evidence")

    with ch.Runtime(workers=options.workers) as runtime:
        start = time.perf_counter()
        graphs = []
        for i, work in enumerate(candidates):
            tasks = gp.Spaces()
            gp.spawn_targets(work)
            gp.spawn_kernel(work, tasks)
            gp.spawn_cholesky(work, tasks)
            gp.spawn_solve(work, tasks)
            graphs.append(tasks)

            @ch.spawn(evidence[i])
            def score(
                targets: list[gp.Matrix] = work.targets,
                weights: ch.In[Any] = work.Y,
                diagonal: ch.In[Any] = [row[-1] for row in work.A],  # noqa: B006
            ) -> float:
                return log_evidence(targets, weights, diagonal)

        scores = evidence[: len(candidates)].result()
        best = int(np.argmax(scores))
        labels = np.concatenate(gp.spawn_classify(candidates[best], graphs[best]).result())
        seconds = time.perf_counter() - start
        spawned = sum(map(len, graphs)) + len(evidence)
        workers = runtime.workers

    for i, (scale, value) in enumerate(zip(LENGTH_SCALES, scores, strict=True)):
        print(f"length scale {scale:3}: log evidence {value:9,.0f}{'  <-' if i == best else ''}")
    accuracy = np.mean(labels == candidates[best].problem.test_labels)
    print(f"{accuracy:.2%} of {len(labels)} held-out digits classified correctly")
    print(f"{spawned:,} tasks on {workers} workers in {seconds:.3f} s")

    _, expected = serial.run(candidates[best])
    if not np.array_equal(labels, expected):
        print("check failed: a serial run gives other labels")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
