"""Do the programs of the demonstration and the benchmark run on devices, unchanged?

Each checks itself against NumPy or SciPy. Sizes are small and leave a rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import charioteer as ch
from charioteer import cpu, gpu
from charioteer.bench import tiled
from charioteer.bench.gpu_data import belady, bfloat16
from charioteer.demo import gp

GPUS = pytest.mark.parametrize("gpus", [1, 2, 4])


@GPUS
def test_the_demonstrations_cholesky(gpus: int) -> None:
    work = gp.Workspace(gp.synthetic(90), 32)
    spaces = gp.Spaces()
    work.clear()
    with ch.Runtime(ch.Machine.virtual(gpus), workers=2):
        answers = gp.spawn_graph(work, spaces, placement=[gpu, cpu])
        spaces.backward[0].result()
        answers.result()
    lower, solution = work.lower(), work.solution()
    matrix = lower @ lower.T
    targets = np.vstack(work.targets)
    np.testing.assert_allclose(matrix @ solution, targets, atol=1e-8)
    left, right = gp.augment(work.problem.points)
    kernel = np.exp(left @ right.T) + work.problem.noise * np.eye(90)
    np.testing.assert_allclose(matrix, kernel, atol=1e-10)


@GPUS
def test_factorization_and_product(gpus: int) -> None:
    n = 70
    spd = np.random.default_rng(0).random((n, n))
    spd = spd @ spd.T + n * np.eye(n)
    a, b = np.random.default_rng(1).random((2, n, n))
    with ch.Runtime(ch.Machine.virtual(gpus), workers=2):
        A = ch.array(spd)
        tiles = A.tiles((16, 16))
        ch.wait(tiled.spread(tiles, gpus, lower=True))
        tiled.cholesky(tiles, gpus, tiled.Portable())
        np.testing.assert_allclose(np.tril(A.numpy()), np.linalg.cholesky(spd), atol=1e-10)
        C = ch.empty((n, n))
        tiled.product(
            ch.array(a).tiles((20, 30)),
            ch.array(b).tiles((30, 40)),
            C.tiles((20, 40)),
            gpus,
            tiled.Portable(),
        )
        np.testing.assert_allclose(C.numpy(), a @ b)


@GPUS
def test_stripes_and_clusters(gpus: int) -> None:
    grid = np.zeros((14, 10))
    grid[0] = 1.0
    expected = grid.copy()
    for _ in range(4):
        inner = expected[:-2, 1:-1] + expected[2:, 1:-1] + expected[1:-1, :-2] + expected[1:-1, 2:]
        expected[1:-1, 1:-1] = inner / 4
    points = np.random.default_rng(0).random((50, 3))
    with ch.Runtime(ch.Machine.virtual(gpus), workers=2) as rt:
        old, new = tiled.Stripes(grid, gpus * 2), tiled.Stripes(grid, gpus * 2)
        found = tiled.jacobi(old, new, 4, gpus)
        np.testing.assert_allclose(found.numpy(), expected)
        centers = ch.array(points[:4])
        tiled.kmeans(ch.array(points), centers, 3, gpus, 2)
        known: Any = points[:4].copy()
        for _ in range(3):
            nearest = ((points[:, None] - known) ** 2).sum(axis=2).argmin(axis=1)
            known = np.array([points[nearest == at].mean(axis=0) for at in range(4)])
        np.testing.assert_allclose(centers.numpy(), known)
        assert rt.stats()["devices"][gpu(gpus - 1)]["operations"] > 0


@GPUS
def test_a_transform_over_a_set(gpus: int) -> None:
    random = np.random.default_rng(0)
    image = random.standard_normal((14, 11)) + 1j * random.standard_normal((14, 11))
    with ch.Runtime(ch.Machine.virtual(gpus), workers=2):
        between, y = ch.empty((14, 11), np.complex128), ch.empty((14, 11), np.complex128)
        rounds = tiled.fft2(ch.array(image), between, y, gpus, tiled.Portable(), rounds=3)
        assert len(rounds) == 3
        np.testing.assert_allclose(y.numpy(), np.fft.fft2(image), atol=1e-10)


@GPUS
@pytest.mark.parametrize(("count", "different"), [(5, 9), (5000, 2**32), (5000, 3)])
def test_keys_in_order(gpus: int, count: int, different: int) -> None:
    values = np.random.default_rng(0).integers(0, different, count, np.uint32)
    with ch.Runtime(ch.Machine.virtual(gpus), workers=2) as rt:
        keys, result = ch.array(values), ch.empty(count, np.uint32)
        tiled.merge_sort(keys, result, gpus, tiled.Portable())
        np.testing.assert_array_equal(result.numpy(), np.sort(values))
        for part, shard in zip(np.array_split(values, gpus), keys.shards(gpus), strict=True):
            np.testing.assert_array_equal(shard.numpy(), np.sort(part))
        assert rt.stats()["devices"][gpu(gpus - 1)]["operations"] > 0


def test_the_best_eviction() -> None:
    assert belady([0, 1, 2, 0, 1, 2], 3) == (3, 0)
    assert belady([0, 1, 2, 0, 1, 2], 2) == (4, 2)
    # Every time round a cycle all but what stays have to come.
    assert belady([0, 1, 2, 3] * 3, 3) == (6, 3)


@pytest.mark.parametrize(
    ("value", "bits"),
    [(0.0, 0), (1.0, 0x3F80), (-2.0, 0xC000 - 0x10000), (257.0, 0x4380), (259.0, 0x4382)],
)
def test_bits_of_bfloat16(value: float, bits: int) -> None:
    assert bfloat16(value) == bits
