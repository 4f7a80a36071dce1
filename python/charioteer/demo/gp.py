"""Gaussian-process classification as one graph of tile tasks.

The method. One Gaussian process a class is fitted to one-hot labels by least squares. With the
training points as rows of X, the kernel matrix is ``K = exp(-|x - x'|^2 / 2) + noise * I`` (points
measured in length scales), the weights are ``W = inv(K) @ Y``, and a test point belongs to the
class whose score in ``k(x, X) @ W`` is the largest.

The graph. K is kept as square tiles of its lower triangle, and every operation on a tile is a task:

====================  =========================================================================
``kernel[i, j]``      builds tile (i, j) of K
``potrf[k]``          factors diagonal tile k
``trsm[i, k]``        turns tile (i, k) into a tile of the factor
``syrk[i, k]``        takes column k of the factor off diagonal tile i
``gemm[i, j, k]``     takes column k of the factor off tile (i, j)
``reduce[i, j]``      takes rows j of ``inv(L) @ Y`` off rows i
``forward[i]``        solves for rows i of ``inv(L) @ Y``
``restore[i, j]``     takes rows j of W off rows i
``backward[i]``       solves for rows i of W
``cross[t, j]``       builds tile (t, j) of the kernel between test and training points
``classify[t]``       gives the labels of test points t
====================  =========================================================================

Nothing says in which order the stages run. A task says which tiles it reads and writes, and what
it has to wait for follows from that, as if the tasks ran in the order in which they are spawned:
so the forward solve runs along with the factorization, and tiles of the next stage fill the gaps
of this one.

Order and determinism. Tiles are updated in place, each by the tasks that write it in the order of
their spawns, in ascending k, so the result does not depend on the number of workers, nor on which
of them ran what.

Priority. A task is the more urgent the further left the column that it writes: the next diagonal
tile then never waits behind updates that nobody needs yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import charioteer as ch
from charioteer import blas, cpu

from . import kernels

__all__ = [
    "Problem",
    "Spaces",
    "Workspace",
    "augment",
    "digits",
    "load_targets",
    "spawn_cholesky",
    "spawn_cholesky_native",
    "spawn_classify",
    "spawn_graph",
    "spawn_kernel",
    "spawn_solve",
    "spawn_targets",
    "synthetic",
]

Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]
Managed = list[list[Any]]
"""Managed arrays by row and column; anything to type checkers, like all that stands for arrays."""


@dataclass(frozen=True)
class Problem:
    """What is to be fitted. Points are in units of the length scale; all arrays are float64.

    ``points`` is (n, d), ``targets`` (n, c), ``test_points`` (m, d) and ``test_labels`` (m,), both
    of them empty where nothing is to be predicted.
    """

    name: str
    points: Matrix
    targets: Matrix
    noise: float
    test_points: Matrix
    test_labels: Labels


def digits(length_scale: float = 4.0, noise: float = 1e-2, seed: int = 0) -> Problem:
    """The 1,797 handwritten digits of scikit-learn (8 x 8 pixels), a fifth of them held out.

    ``length_scale`` is in units of the full brightness of a pixel, ``noise`` the variance added to
    the diagonal. The split is stratified and fixed by ``seed``. The default length scale is the
    one under which the training labels are the most probable, among powers of two.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    points, test_points, labels, test_labels = train_test_split(
        images / (16.0 * length_scale), labels, test_size=0.2, random_state=seed, stratify=labels
    )
    return Problem("digits", points, np.eye(10)[labels], noise, test_points, test_labels)


def synthetic(n: int, classes: int = 10, noise: float = 1e-2, seed: int = 0) -> Problem:
    """``n`` random points in eight dimensions with random targets: a dense SPD matrix of any size.

    Raises:
        ValueError: ``n`` is not positive.
    """
    if n < 1:
        raise ValueError(f"the size must be positive, not {n}")
    random = np.random.default_rng(seed)
    points, targets = random.random((n, 8)), random.standard_normal((n, classes))
    return Problem("synthetic", points, targets, noise, np.empty((0, 8)), np.empty(0, np.intp))


def augment(points: Matrix) -> tuple[Matrix, Matrix]:
    """Two (n, d + 2) matrices whose product is minus half the squared distances.

    ``left[i] @ right[j] == -|points[i] - points[j]|^2 / 2``, so one ``gemm`` and one ``exp`` make
    a tile of the kernel matrix.
    """
    half = -0.5 * np.einsum("ij,ij->i", points, points)[:, None]
    ones = np.ones_like(half)
    return np.hstack([points, half, ones]), np.hstack([points, ones, half])


class Workspace:
    """The tiles of a problem. Every run overwrites all of them, so one workspace serves many runs.

    ``matrix[i][j]`` (j <= i) holds the kernel matrix, then its factor; ``weights[i]`` the targets,
    then the weights; ``cross[t][j]`` the kernel between test and training points; ``scores[t]`` the
    scores of test points. Tiles are (tile, tile), the last ones smaller where the sizes leave a
    rest.

    Those are NumPy's arrays, which plain loops and checks use while no runtime is open. ``A``,
    ``Y``, ``K`` and ``S`` are the same buffers as managed arrays, for tasks.

    Raises:
        ValueError: ``tile`` is not positive.
    """

    def __init__(self, problem: Problem, tile: int) -> None:
        if tile < 1:
            raise ValueError(f"the tile size must be positive, not {tile}")
        n, m = len(problem.points), len(problem.test_points)
        rows = [slice(i, min(i + tile, n)) for i in range(0, n, tile)]
        test_rows = [slice(i, min(i + tile, m)) for i in range(0, m, tile)]
        # Distances do not change when all points are moved; near the origin less of them cancels.
        center = problem.points.mean(axis=0)
        left, right = augment(problem.points - center)
        test_left, _ = augment(problem.test_points - center)

        self.problem = problem
        self.tile = tile
        self.rows = rows
        self.left = [np.ascontiguousarray(left[r]) for r in rows]
        self.right = [np.ascontiguousarray(right[r]) for r in rows]
        self.targets = [np.ascontiguousarray(problem.targets[r]) for r in rows]
        self.weights = [targets.copy() for targets in self.targets]
        self.matrix = [
            [np.zeros(_extents(r, c)) for c in rows[: i + 1]] for i, r in enumerate(rows)
        ]
        self.test_left = [np.ascontiguousarray(test_left[r]) for r in test_rows]
        self.cross = [[np.zeros(_extents(r, c)) for c in rows] for r in test_rows]
        classes = problem.targets.shape[1]
        self.scores = [np.zeros((r.stop - r.start, classes)) for r in test_rows]

        self.A: Managed = [_managed("A", row) for row in self.matrix]
        self.Y: list[Any] = _managed("Y", self.weights)
        self.K: Managed = [_managed("K", row) for row in self.cross]
        self.S: list[Any] = _managed("S", self.scores)

    def clear(self) -> None:
        """Fill all that a run computes with nan, so that nothing of an earlier run is left."""
        computed = [*self.matrix, *self.cross, self.weights, self.scores]
        for tile in chain.from_iterable(computed):
            tile.fill(np.nan)

    def lower(self) -> Matrix:
        """The lower triangle as one (n, n) matrix; what is above the diagonal is zero."""
        n = len(self.problem.points)
        matrix = np.zeros((n, n))
        for i, rows in enumerate(self.rows):
            for j, columns in enumerate(self.rows[: i + 1]):
                matrix[rows, columns] = self.matrix[i][j]
            matrix[rows, rows] = np.tril(matrix[rows, rows])
        return matrix

    def solution(self) -> Matrix:
        """A copy of the weights as one (n, c) matrix."""
        return np.vstack(self.weights)


def _managed(name: str, tiles: Sequence[Matrix]) -> list[Any]:
    """Managed arrays that take the tiles' buffers over."""
    return [ch.asarray(tile, name=name) for tile in tiles]


def _extents(rows: slice, columns: slice) -> tuple[int, int]:
    return rows.stop - rows.start, columns.stop - columns.start


class Spaces:
    """The names of the tasks of one run, a task space for each kind."""

    def __init__(self) -> None:
        self.kernel = ch.TaskSpace("kernel")
        self.potrf = ch.TaskSpace("potrf")
        self.trsm = ch.TaskSpace("trsm")
        self.syrk = ch.TaskSpace("syrk")
        self.gemm = ch.TaskSpace("gemm")
        self.reduce = ch.TaskSpace("reduce")
        self.forward = ch.TaskSpace("forward")
        self.restore = ch.TaskSpace("restore")
        self.backward = ch.TaskSpace("backward")
        self.cross = ch.TaskSpace("cross")
        self.classify = ch.TaskSpace("classify")

    def __len__(self) -> int:
        """How many tasks have been named."""
        return sum(len(space) for space in vars(self).values())


def load_targets(work: Workspace) -> None:
    """Put the targets where plain loops turn them into weights."""
    for tile, targets in zip(work.weights, work.targets, strict=True):
        tile[...] = targets


def spawn_targets(work: Workspace) -> None:
    """Spawn the tasks that put the targets where the solve turns them into weights."""
    for y, targets in zip(work.Y, work.targets, strict=True):
        y[...] = targets


def spawn_kernel(work: Workspace, T: Spaces, op: Any = kernels) -> None:
    """Spawn the tasks that build the lower triangle of the kernel matrix."""
    A, n, noise = work.A, len(work.A), work.problem.noise
    for j in range(n):
        for i in range(j, n):

            @ch.spawn(T.kernel[i, j], priority=n - j)
            def build(
                k: ch.Out[Matrix] = A[i][j],
                left: Matrix = work.left[i],
                right: Matrix = work.right[j],
                noise: float = noise if i == j else 0.0,
            ) -> None:
                op.rbf(k, left, right, noise)


def spawn_cholesky(work: Workspace, T: Spaces, op: Any = kernels, placement: Any = None) -> None:
    """Spawn the tasks that overwrite the kernel matrix with its Cholesky factor, right-looking.

    ``placement`` is where they may run: cores, unless said.
    """
    place = cpu if placement is None else placement
    A, n = work.A, len(work.A)
    for k in range(n):

        @ch.spawn(T.potrf[k], priority=n - k, placement=place)
        def potrf(a: ch.InOut[Matrix] = A[k][k]) -> None:
            op.potrf(a)

        for i in range(k + 1, n):

            @ch.spawn(T.trsm[i, k], priority=n - k, placement=place)
            def trsm(diagonal: ch.In[Matrix] = A[k][k], a: ch.InOut[Matrix] = A[i][k]) -> None:
                op.trsm(diagonal, a)

        for j in range(k + 1, n):

            @ch.spawn(T.syrk[j, k], priority=n - j, placement=place)
            def syrk(a: ch.In[Matrix] = A[j][k], c: ch.InOut[Matrix] = A[j][j]) -> None:
                op.syrk(a, c)

            for i in range(j + 1, n):

                @ch.spawn(T.gemm[i, j, k], priority=n - j, placement=place)
                def gemm(
                    a: ch.In[Matrix] = A[i][k],
                    b: ch.In[Matrix] = A[j][k],
                    c: ch.InOut[Matrix] = A[i][j],
                ) -> None:
                    op.gemm(a, b, c)


def spawn_cholesky_native(work: Workspace, T: Spaces, empty: bool = False) -> None:
    """The same tasks as :func:`spawn_cholesky`, whose bodies are the C functions themselves.

    They call the same routines with the same flags, so that results agree to the last bit. With
    ``empty`` the routines get matrices without elements, and the tasks are ordered as ever.
    """
    A, n, nothing = work.A, len(work.A), np.empty((0, 0))

    def call(
        routine: ch.TaskFunction[..., None],
        name: ch.Task[Any],
        priority: int,
        *tiles: Any,
        **flags: Any,
    ) -> None:
        if empty:
            *read, written = tiles
            named = routine.options(name, priority=priority, input=read, inout=written)
            named(*(nothing for _ in tiles), **flags)
        else:
            routine.options(name, priority=priority)(*tiles, **flags)

    for k in range(n):
        call(blas.potrf, T.potrf[k], n - k, A[k][k])
        for i in range(k + 1, n):
            call(blas.trsm, T.trsm[i, k], n - k, A[k][k], A[i][k], left=False, trans="T")
        for j in range(k + 1, n):
            call(blas.syrk, T.syrk[j, k], n - j, A[j][k], A[j][j], alpha=-1, beta=1)
            for i in range(j + 1, n):
                call(
                    blas.gemm, T.gemm[i, j, k], n - j, A[i][k], A[j][k], A[i][j],
                    alpha=-1, beta=1, trans_b="T",
                )  # fmt: skip


def spawn_solve(work: Workspace, T: Spaces, op: Any = kernels) -> None:
    """Spawn the tasks that overwrite the targets with the weights: forward, then backward."""
    A, Y, n = work.A, work.Y, len(work.A)
    for i in range(n):
        for j in range(i):

            @ch.spawn(T.reduce[i, j], priority=n - j)
            def reduce(
                factor: ch.In[Matrix] = A[i][j],
                solved: ch.In[Matrix] = Y[j],
                y: ch.InOut[Matrix] = Y[i],
            ) -> None:
                op.update_forward(factor, solved, y)

        @ch.spawn(T.forward[i], priority=n - i)
        def forward(diagonal: ch.In[Matrix] = A[i][i], y: ch.InOut[Matrix] = Y[i]) -> None:
            op.solve_forward(diagonal, y)

    for i in reversed(range(n)):
        for j in reversed(range(i + 1, n)):

            @ch.spawn(T.restore[i, j], priority=i)
            def restore(
                factor: ch.In[Matrix] = A[j][i],
                solved: ch.In[Matrix] = Y[j],
                y: ch.InOut[Matrix] = Y[i],
            ) -> None:
                op.update_backward(factor, solved, y)

        @ch.spawn(T.backward[i], priority=i)
        def backward(diagonal: ch.In[Matrix] = A[i][i], y: ch.InOut[Matrix] = Y[i]) -> None:
            op.solve_backward(diagonal, y)


def spawn_classify(work: Workspace, T: Spaces, op: Any = kernels) -> ch.TaskList[Labels]:
    """Spawn the tasks that label the test points; each one's result is an (m,) array of labels."""
    n = len(work.A)
    for t, scores in enumerate(work.S):
        for j in range(n):

            @ch.spawn(T.cross[t, j])
            def cross(
                k: ch.Out[Matrix] = work.K[t][j],
                left: Matrix = work.test_left[t],
                right: Matrix = work.right[j],
            ) -> None:
                op.rbf(k, left, right)

        @ch.spawn(T.classify[t])
        def classify(
            row: ch.In[Any] = work.K[t],
            weights: ch.In[Any] = work.Y,
            scores: ch.Out[Matrix] = scores,
        ) -> Labels:
            scores.fill(0.0)
            for k, w in zip(row, weights, strict=True):
                op.add_scores(k, w, scores)
            labels: Labels = scores.argmax(axis=1)
            return labels

    return T.classify[: len(work.S)]


def spawn_graph(
    work: Workspace,
    T: Spaces,
    op: Any = kernels,
    bodies: Literal["python", "native", "empty"] = "python",
    placement: Any = None,
) -> ch.TaskList[Labels]:
    """Spawn the whole job. The result of the tasks returned is the labels of the test points.

    ``op`` is where the tile kernels are taken from: the module ``kernels``, or a stand-in.
    ``bodies`` makes the tasks of the factorization native ones, or such that compute nothing;
    ``placement`` is where the tasks of the factorization run whose bodies are in Python.
    """
    spawn_targets(work)
    spawn_kernel(work, T, op)
    if bodies == "python":
        spawn_cholesky(work, T, op, placement)
    else:
        spawn_cholesky_native(work, T, empty=bodies == "empty")
    spawn_solve(work, T, op)
    return spawn_classify(work, T, op)
