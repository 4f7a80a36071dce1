"""Do the BLAS and LAPACK tasks compute what NumPy computes, in every type, order and shape?

Each routine meets float32 to complex128, matrices by rows, by columns, and tiles of larger ones of
either order, and every combination of its flags.
"""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support import anything, no_op

import charioteer as ch

scipy_linalg = pytest.importorskip("scipy.linalg")

from charioteer import _core, blas  # noqa: E402

Array = np.ndarray[Any, Any]

# Start SciPy's BLAS threads here: they are nobody's leak.
scipy_linalg.cho_factor(np.eye(256))
scipy_linalg.blas.dgemm(1.0, np.eye(256), np.eye(256))

ORDERS = ["rows", "columns", "tile of rows", "tile of columns"]
OPERATIONS = {"N": lambda x: x, "T": lambda x: x.T, "C": lambda x: x.conj().T}


@pytest.fixture(params=["f4", "f8", "c8", "c16"])
def dtype(request: pytest.FixtureRequest) -> np.dtype[Any]:
    return np.dtype(request.param)


@pytest.fixture(scope="module", autouse=True)
def _runtime() -> Iterator[None]:
    with ch.Runtime(workers=2):
        yield


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> None:
    """One runtime serves the module, so the check of the other modules is not made here."""


def is_complex(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "c"


def put(values: Array, order: str) -> Array:
    """The same matrix, stored so."""
    rows, columns = values.shape
    if order == "rows":
        return np.array(values, order="C")
    if order == "columns":
        return np.array(values, order="F")
    larger = np.full((rows + 3, columns + 2), 99, values.dtype, "C" if "rows" in order else "F")
    tile = larger[1 : rows + 1, 2 : columns + 2]
    tile[...] = values
    return tile


def random(rows: int, columns: int, dtype: np.dtype[Any], seed: int = 0) -> Array:
    generator = np.random.default_rng((seed, rows, columns))
    values = generator.standard_normal((rows, columns))
    if is_complex(dtype):
        return (values + 1j * generator.standard_normal((rows, columns))).astype(dtype)
    return values.astype(dtype)


def check(got: Array, wanted: Array) -> None:
    tolerance = 2e-4 if got.dtype.itemsize // (2 if is_complex(got.dtype) else 1) == 4 else 1e-11
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


def check_surroundings(tile: Array) -> None:
    """Nothing beside a tile was touched."""
    if tile.base is not None and tile.base.ndim == 2 and tile.base.size > tile.size:
        outside = np.ones(tile.base.shape, bool)
        rows, columns = tile.shape
        outside[1 : rows + 1, 2 : columns + 2] = False
        assert (tile.base[outside] == 99).all()


# gemm.


@pytest.mark.parametrize("order_c", ORDERS)
@pytest.mark.parametrize("order_a", ORDERS)
@pytest.mark.parametrize("order_b", ORDERS)
def test_gemm(dtype: np.dtype[Any], order_a: str, order_b: str, order_c: str) -> None:
    computed = refused = 0
    for trans_a, trans_b in itertools.product("NTC", repeat=2):
        a = put(random(*((3, 5) if trans_a == "N" else (5, 3)), dtype, 1), order_a)
        b = put(random(*((5, 4) if trans_b == "N" else (4, 5)), dtype, 2), order_b)
        c = put(random(3, 4, dtype, 3), order_c)
        wanted = 2 * OPERATIONS[trans_a](a) @ OPERATIONS[trans_b](b) - c
        flags: dict[str, Any] = {"trans_a": trans_a, "trans_b": trans_b}
        mixed = [
            trans == "C" and is_complex(dtype) and ("rows" in order) != ("rows" in order_c)
            for trans, order in [(trans_a, order_a), (trans_b, order_b)]
        ]
        if any(mixed):
            with pytest.raises(ValueError, match="conjugated and not transposed"):
                blas.gemm(a, b, c, **flags)
            refused += 1
            continue
        blas.gemm(a, b, c, alpha=2, beta=-1, **flags).result()
        check(c, wanted)
        check_surroundings(c)
        computed += 1
    assert computed >= 4 and computed + refused == 9


def test_gemm_ignores_what_was_there_without_beta(dtype: np.dtype[Any]) -> None:
    a, b = random(3, 2, dtype, 1), random(2, 3, dtype, 2)
    c = np.full((3, 3), np.nan, dtype)
    blas.gemm(a, b, c).result()
    check(c, a @ b)


def test_complex_factors() -> None:
    dtype = np.dtype("c16")
    a, b, c = random(3, 2, dtype, 1), random(2, 3, dtype, 2), random(3, 3, dtype, 3)
    wanted = 1j * a @ b + (2 - 1j) * c
    blas.gemm(a, b, c, alpha=1j, beta=2 - 1j).result()
    check(c, wanted)
    with pytest.raises(TypeError, match="dgemm: argument 6: expects a number, not complex"):
        blas.gemm(np.eye(2), np.eye(2), np.eye(2), alpha=1j)


# syrk.


@pytest.mark.parametrize("order_a", ORDERS)
@pytest.mark.parametrize("order_c", ORDERS)
def test_syrk(dtype: np.dtype[Any], order_a: str, order_c: str) -> None:
    for trans, lower in itertools.product(("N", "T"), (True, False)):
        a = put(random(*((4, 3) if trans == "N" else (3, 4)), dtype, 1), order_a)
        c = put(random(4, 4, dtype, 2), order_c)
        before = c.copy()
        blas.syrk(a, c, alpha=-1, beta=2, lower=lower, trans=anything(trans)).result()
        factor = OPERATIONS[trans](a)
        inside = np.tril(np.ones((4, 4), bool)) if lower else np.triu(np.ones((4, 4), bool))
        check(c, np.where(inside, 2 * before - factor @ factor.T, before))
        check_surroundings(c)


# trsm.


@pytest.mark.parametrize("order_a", ORDERS)
@pytest.mark.parametrize("order_b", ORDERS)
def test_trsm(dtype: np.dtype[Any], order_a: str, order_b: str) -> None:
    computed = 0
    for trans, left, lower, unit in itertools.product("NTC", *[(True, False)] * 3):
        full = random(4, 4, dtype, 1) + 4 * np.eye(4, dtype=dtype)
        a = put(full, order_a)
        b = put(random(*((4, 3) if left else (3, 4)), dtype, 2), order_b)
        triangle = np.tril(full) if lower else np.triu(full)
        if unit:
            np.fill_diagonal(triangle, 1)
        inverse = np.linalg.inv(OPERATIONS[trans](triangle))
        wanted = 2 * inverse @ b if left else 2 * b @ inverse
        flags: dict[str, Any] = {"trans": trans, "left": left, "lower": lower, "unit": unit}
        if trans == "C" and is_complex(dtype) and ("rows" in order_a) != ("rows" in order_b):
            with pytest.raises(ValueError, match="conjugated and not transposed"):
                blas.trsm(a, b, **flags)
            continue
        blas.trsm(a, b, alpha=2, **flags).result()
        check(b, wanted)
        check_surroundings(b)
        computed += 1
    assert computed >= 16


# potrf.


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_potrf(dtype: np.dtype[Any], order: str, lower: bool, n: int) -> None:
    factor = random(n, n, dtype)
    a = put(factor @ factor.conj().T + n * np.eye(n, dtype=dtype), order)
    before = a.copy()
    blas.potrf(a, lower=lower).result()
    if lower:
        triangle = np.tril(a)
        check(triangle @ triangle.conj().T, before)
        np.testing.assert_array_equal(np.triu(a, 1), np.triu(before, 1))
    else:
        triangle = np.triu(a)
        check(triangle.conj().T @ triangle, before)
        np.testing.assert_array_equal(np.tril(a, -1), np.tril(before, -1))
    check_surroundings(a)


def test_potrf_of_an_indefinite_matrix(dtype: np.dtype[Any]) -> None:
    a = np.diag([1, 2, -3, 4]).astype(dtype)
    task = blas.potrf(a)
    with pytest.raises(ch.NativeError, match="potrf failed with info = 3") as caught:
        task.result()
    assert caught.value.code == 3 and caught.value.function.endswith("potrf")
    with pytest.raises(ch.NativeError):
        blas.potrf.fn(np.diag([-1.0]))


# axpy.


def test_axpy(dtype: np.dtype[Any]) -> None:
    for step_x, step_y in itertools.product((1, 3, -1, -2), repeat=2):
        x, y = random(1, 12, dtype, 1)[0][::step_x][:4], random(1, 12, dtype, 2)[0][::step_y][:4]
        wanted = 3 * x + y
        blas.axpy(x, y, alpha=3).result()
        check(y, wanted)
    for x, y in [
        (np.zeros((0,), dtype), np.zeros((0,), dtype)),
        (np.ones((2, 3, 2), dtype), np.zeros((2, 3, 2), dtype)),
        (np.ones((2, 3), dtype, order="F"), np.zeros((2, 3), dtype, order="F")),
        (np.broadcast_to(np.ones(1, dtype), (5,)), np.zeros(5, dtype)),
    ]:
        blas.axpy(x, y).result()
        assert (y == 1).all()


# getrf.


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (1, 4), (4, 1), (70, 70)])
def test_getrf(dtype: np.dtype[Any], order: str, shape: tuple[int, int]) -> None:
    a = put(random(*shape, dtype), order)
    before, least = a.copy(), min(shape)
    pivots = np.zeros(least, np.int32)
    blas.getrf(a, pivots).result()
    lower = np.tril(a, -1)[:, :least] + np.eye(shape[0], least, dtype=dtype)
    permuted = before.copy()
    for row, other in enumerate(pivots):
        permuted[[row, other]] = permuted[[other, row]]
    check(lower @ np.triu(a)[:least], permuted)
    assert (pivots >= np.arange(least)).all() and (pivots < shape[0]).all()
    assert np.abs(np.tril(a, -1)).max(initial=0) <= 1.5  # pivoting bounds it; complex ones less so
    check_surroundings(a)


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_getrf_serves_lu_solve(dtype: np.dtype[Any], order: str) -> None:
    matrix, right = random(6, 6, dtype, 1), random(6, 2, dtype, 2)
    a, pivots = put(matrix, order), np.zeros(6, np.int32)
    blas.getrf(a, pivots).result()
    check(matrix @ scipy_linalg.lu_solve((a, pivots), right), right)


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_getrf_of_a_singular_matrix(dtype: np.dtype[Any], order: str) -> None:
    a = put(np.diag([1, 2, 0]).astype(dtype), order)
    with pytest.raises(ch.NativeError) as caught:
        blas.getrf(a, np.zeros(3, np.int32)).result()
    assert caught.value.code == 3


# geqrf.


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (1, 4), (4, 1), (70, 40)])
def test_geqrf(dtype: np.dtype[Any], order: str, shape: tuple[int, int]) -> None:
    a = put(random(*shape, dtype), order)
    before, least = a.copy(), min(shape)
    tau = np.zeros(least, dtype)
    blas.geqrf(a, tau).result()
    q = np.eye(shape[0], dtype=dtype)
    for k in range(least):
        v = np.zeros((shape[0], 1), dtype)
        v[k], v[k + 1 :, 0] = 1, a[k + 1 :, k]
        q = q @ (np.eye(shape[0], dtype=dtype) - tau[k] * v @ v.conj().T)
    check(q.conj().T @ q, np.eye(shape[0]))
    check(q @ np.triu(a), before)
    check_surroundings(a)


# Empty matrices.


def test_empty_matrices(dtype: np.dtype[Any]) -> None:
    empty = np.zeros((0, 0), dtype)
    blas.potrf(empty).result()
    blas.syrk(np.zeros((0, 3), dtype), empty).result()
    blas.trsm(empty, np.zeros((0, 3), dtype)).result()
    blas.getrf(np.zeros((0, 3), dtype), np.zeros(0, np.int32)).result()
    blas.geqrf(np.zeros((3, 0), dtype), np.zeros(0, dtype)).result()
    c = np.ones((2, 2), dtype)
    blas.gemm(np.zeros((2, 0), dtype), np.zeros((0, 2), dtype), c).result()
    assert not c.any()


# Task functions.


def test_options_and_names() -> None:
    space = ch.TaskSpace("T")
    first = ch.spawn(no_op)
    a = np.eye(3)
    task = blas.potrf.options(space[0], dependencies=first).options(priority=2)(a)
    assert task == space[0] and task.result() is None
    assert blas.potrf(a).name == "dpotrf"
    assert blas.potrf.options("mine")(a).name == "mine"
    with pytest.raises(TypeError, match="priority is"):
        blas.potrf.options(priority=anything("x"))
    with pytest.raises(ch.DuplicateTaskError):
        blas.potrf.options(space[0])(a)


def test_map() -> None:
    matrices = [np.eye(2) * i for i in range(1, 5)]
    tasks = blas.potrf.map(matrices)
    assert tasks.result() == [None] * 4
    check(np.array([m[0, 0] for m in matrices]), np.sqrt([1.0, 2, 3, 4]))
    mixed = [np.eye(2), np.eye(2, dtype=np.complex64)]
    blas.potrf.map(mixed).result()
    with pytest.raises(TypeError, match="at least one iterable"):
        blas.potrf.map()
    with pytest.raises(TypeError, match="cannot have one handle"):
        blas.potrf.options(ch.TaskSpace("T")[0]).map(matrices)


def test_handles_as_arguments() -> None:
    made = ch.spawn(lambda: np.eye(2) * 4)
    factored = blas.potrf.options("later")(made)
    assert factored.name == "later" and factored.result() is None
    assert made.result()[1, 1] == 2
    c = np.zeros((2, 2))
    task = blas.gemm(made, b=anything(made), c=c)
    assert task.name == "gemm" and task.result() is None
    check(c, np.eye(2) * 4)
    with pytest.raises(TypeError, match="potrf: a is to be a NumPy array, not int"):
        blas.potrf(ch.spawn(lambda: 3)).result()


def test_a_tiled_cholesky_factorization(dtype: np.dtype[Any]) -> None:
    n, tile = 48, 16
    factor = random(n, n, dtype)
    matrix = factor @ factor.conj().T + 4 * n * np.eye(n, dtype=dtype)
    A = np.array(matrix)
    tiles = [slice(i, i + tile) for i in range(0, n, tile)]
    T, count = ch.TaskSpace("T"), len(tiles)
    last: dict[tuple[int, int], Any] = {}

    def after(*blocks: tuple[int, int]) -> list[Any]:
        return [last[block] for block in blocks if block in last]

    for k in range(count):
        kk = A[tiles[k], tiles[k]]
        last[k, k] = blas.potrf.options(T[k, k, k], dependencies=after((k, k)))(kk)
        for i in range(k + 1, count):
            needs = after((k, k), (i, k))
            last[i, k] = blas.trsm.options(T[i, k, k], dependencies=needs)(
                kk, A[tiles[i], tiles[k]], left=False, trans="C"
            )
        for i, j in itertools.product(range(k + 1, count), repeat=2):
            if j <= i:
                needs = after((i, k), (j, k), (i, j))
                last[i, j] = blas.gemm.options(T[i, j, k], dependencies=needs)(
                    A[tiles[i], tiles[k]], A[tiles[j], tiles[k]], A[tiles[i], tiles[j]],
                    alpha=-1, beta=1, trans_b="C",
                )  # fmt: skip
    T.result()
    lower = np.tril(A)
    np.testing.assert_allclose(lower @ lower.conj().T, matrix, rtol=1e-4, atol=1e-2)


# Wrong arguments.


def read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


def misaligned() -> Array:
    return np.zeros(73, "u1")[1:].view("f8").reshape(3, 3)


EYE = np.eye(3)
WRONG = [
    (lambda: blas.gemm(EYE, EYE, np.eye(4)), ValueError, r"c is of shape \(4, 4\)"),
    (lambda: blas.gemm(EYE, np.eye(4), EYE), ValueError, "has 3 columns, op.b. 4 rows"),
    (lambda: blas.gemm(EYE, EYE, read_only(np.eye(3))), ValueError, "gemm: c is read-only"),
    (lambda: blas.gemm(EYE, EYE, EYE[0]), ValueError, r"c is to be a matrix, not of shape \(3,\)"),
    (lambda: blas.gemm(EYE, EYE, np.eye(6)[::2, ::2]), ValueError, "adjacent neither"),
    (lambda: blas.gemm(EYE, EYE, np.eye(3)[::-1]), ValueError, "adjacent neither"),
    (lambda: blas.gemm(EYE, EYE, EYE, trans_a=anything("X")), ValueError, "trans_a is one of"),
    (lambda: blas.gemm(EYE, EYE, EYE, trans_b=anything(None)), ValueError, "trans_b is one of"),
    (lambda: blas.gemm(EYE.astype("f4"), EYE, EYE), TypeError, "b is of float64, a is not"),
    (lambda: blas.gemm(EYE.astype(int), EYE, EYE), TypeError, "a is of int64; there is float32"),
    (lambda: blas.gemm(EYE.astype(">f8"), EYE, EYE), TypeError, "a is of >f8; there is"),
    (lambda: blas.gemm(anything([[1.0]]), EYE, EYE), TypeError, "NumPy array, not list"),
    (lambda: blas.gemm(EYE, EYE, EYE, alpha=anything("1")), TypeError, "expects a number, not str"),
    (lambda: blas.gemm(EYE, EYE), TypeError, "missing 1 required positional argument: 'c'"),
    (lambda: blas.syrk(EYE, np.eye(4)), ValueError, r"the others need \(3, 3\)"),
    (lambda: blas.syrk(EYE, EYE, trans=anything("C")), ValueError, "trans is one of 'N', 'T'"),
    (lambda: blas.trsm(np.ones((2, 3)), EYE), ValueError, "a is to be square"),
    (lambda: blas.trsm(np.eye(2), EYE), ValueError, r"a is of shape \(2, 2\)"),
    (lambda: blas.potrf(np.ones((2, 3))), ValueError, "potrf: a is to be square"),
    (lambda: blas.potrf(read_only(np.eye(2))), ValueError, "potrf: a is read-only"),
    (lambda: blas.axpy(np.ones(3), np.ones(4)), ValueError, "axpy: x is of shape"),
    (lambda: blas.axpy(np.ones(3), read_only(np.ones(3))), ValueError, "y is read-only"),
    (lambda: blas.axpy(EYE, np.asfortranarray(EYE)), ValueError, "not contiguous in the same"),
    (lambda: blas.getrf(EYE, np.zeros(3, np.int64)), TypeError, "an array of int32"),
    (lambda: blas.getrf(EYE, np.zeros(2, np.int32)), ValueError, r"need \(3,\)"),
    (lambda: blas.getrf(EYE, np.zeros(6, np.int32)[::2]), ValueError, "contiguous"),
    (lambda: blas.geqrf(EYE, np.zeros(3, "f4")), TypeError, "tau is to be an array of float64"),
    (lambda: blas.gemm(EYE, EYE, EYE, 1.0), TypeError, "takes 3 positional arguments but 4"),
    (lambda: blas.gemm(EYE, EYE, EYE, c=EYE), TypeError, "multiple values for argument 'c'"),
    (lambda: blas.potrf(EYE, upper=anything(1)), TypeError, "unexpected keyword argument 'upper'"),
    (lambda: blas.potrf(misaligned()), ValueError, "dpotrf: argument 3: .* not aligned"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), WRONG)
def test_wrong_arguments(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_what_a_routine_says_of_itself() -> None:
    assert repr(blas.gemm) == "<task function <routine gemm>>"
    assert anything(blas.gemm).__name__ == "gemm"
    assert "beta * c" in (blas.gemm.__doc__ or "")
    signature = inspect.signature(blas.gemm)
    assert list(signature.parameters)[:4] == ["a", "b", "c", "alpha"]
    with pytest.raises(TypeError, match="gemm takes 3 arguments"):
        ch.spawn(anything(blas.gemm))
    with pytest.raises(ValueError, match='no routine "no_op"'):
        _core.BlasRoutine(no_op, anything(None))


def test_arguments_by_name() -> None:
    a, b, c = random(2, 3, np.dtype("f8"), 1), random(3, 2, np.dtype("f8"), 2), np.zeros((2, 2))
    blas.gemm(a, c=c, b=b).result()
    check(c, a @ b)
    blas.gemm.fn(b=b, c=c, a=a, alpha=2)
    check(c, 2 * a @ b)
    # What a task kept alive under a name is free after it.
    references = sys.getrefcount(c)
    blas.gemm(a, b, c=c).result()
    assert sys.getrefcount(c) == references


def test_scipy_is_imported_when_used_and_missed_by_name() -> None:
    program = """
import sys
import numpy as np
import charioteer as ch
from charioteer import blas

assert "scipy" not in sys.modules
sys.modules["scipy"] = None
try:
    blas.potrf.fn(np.eye(2))
except ImportError as error:
    assert "SciPy, which is not installed: pip install scipy" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_blas_has_one_thread_though_it_came_with_the_first_call() -> None:
    program = """
import numpy as np
import charioteer as ch
from charioteer import blas
import threadpoolctl

with ch.Runtime(workers=2):
    blas.potrf(np.eye(2)).result()
    pools = threadpoolctl.threadpool_info()
    blas = [pool for pool in pools if pool["user_api"] == "blas"]
    assert len(blas) >= 2, pools  # NumPy's and SciPy's
    assert {pool["num_threads"] for pool in blas} == {1}, blas
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_regions_are_ordered_by_what_routines_do() -> None:
    x = np.random.default_rng(0).standard_normal((3, 8, 8))
    A = ch.array(x)
    a, b, c = A
    T = A[2].tiles((4, 4))
    blas.gemm(a, b, c)
    blas.gemm(a[:4], b, A[2, :4], alpha=2.0, beta=1.0)
    expected = x[0] @ x[1]
    expected[:4] *= 3.0
    np.testing.assert_allclose(c.numpy(), expected, rtol=1e-12)
    # A tile by a tile, one of them twice.
    blas.syrk(T[1, 0], T[0, 0], beta=0.5)
    blas.gemm(T[1, 0], T[0, 1], T[1, 1])
    expected[4:, 4:] = expected[4:, :4] @ expected[:4, 4:]
    np.testing.assert_allclose(T[1, 1].numpy(), expected[4:, 4:], rtol=1e-12)

    # Where beta is zero, what was there is not looked at: a failure before does not matter.
    @ch.task
    def fail(a: ch.Out[Array]) -> None:
        raise ZeroDivisionError

    failed = fail(c)
    assert isinstance(blas.gemm(a, b, c, beta=1).exception(), ch.DependencyError)
    assert isinstance(blas.gemm(a, b, c=A[2], beta=1).exception(), ch.DependencyError)
    assert blas.gemm(a, b, c=c, beta=0).result() is None
    np.testing.assert_allclose(c.numpy(), x[0] @ x[1], rtol=1e-12)
    assert isinstance(failed.exception(), ZeroDivisionError)
    pivots = ch.zeros(8, np.int32)
    blas.getrf(c, pivots)
    assert pivots.numpy().max() < 8
