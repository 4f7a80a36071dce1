"""The same job without tasks: plain loops over the same tile kernels.

It is what the task graph is checked against, and its time, with BLAS at one thread, is the work
that the graph has to spread over the workers. Written from the algorithm, not from the graph: a
dependency missing there does not go missing here.
"""

import time

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from . import kernels
from .gp import Workspace, load_targets

__all__ = ["build", "cholesky", "classify", "run", "solve"]


def build(work: Workspace) -> None:
    """Build the lower triangle of the kernel matrix."""
    for i, row in enumerate(work.matrix):
        for j, tile in enumerate(row):
            kernels.rbf(tile, work.left[i], work.right[j], work.problem.noise if i == j else 0.0)


def cholesky(work: Workspace) -> None:
    """Overwrite the kernel matrix with its Cholesky factor."""
    A, n = work.matrix, len(work.matrix)
    for k in range(n):
        kernels.potrf(A[k][k])
        for i in range(k + 1, n):
            kernels.trsm(A[k][k], A[i][k])
        for i in range(k + 1, n):
            for j in range(k + 1, i):
                kernels.gemm(A[i][k], A[j][k], A[i][j])
            kernels.syrk(A[i][k], A[i][i])


def solve(work: Workspace) -> None:
    """Solve for the weights."""
    A, Y, n = work.matrix, work.weights, len(work.matrix)
    load_targets(work)
    for i in range(n):
        for j in range(i):
            kernels.update_forward(A[i][j], Y[j], Y[i])
        kernels.solve_forward(A[i][i], Y[i])
    for i in reversed(range(n)):
        for j in reversed(range(i + 1, n)):
            kernels.update_backward(A[j][i], Y[j], Y[i])
        kernels.solve_backward(A[i][i], Y[i])


def classify(work: Workspace) -> npt.NDArray[np.intp]:
    """Label the test points."""
    for row, left, scores in zip(work.cross, work.test_left, work.scores, strict=True):
        scores.fill(0.0)
        for tile, right, weights in zip(row, work.right, work.weights, strict=True):
            kernels.rbf(tile, left, right)
            kernels.add_scores(tile, weights, scores)
    labels = [scores.argmax(axis=1) for scores in work.scores]
    return np.concatenate(labels) if labels else np.empty(0, np.intp)


def run(work: Workspace) -> tuple[float, npt.NDArray[np.intp]]:
    """Do the whole job with BLAS at one thread: its time in seconds, and the labels."""
    with threadpool_limits(1, user_api="blas"):
        start = time.perf_counter()
        build(work)
        cholesky(work)
        solve(work)
        labels = classify(work)
        return time.perf_counter() - start, labels
