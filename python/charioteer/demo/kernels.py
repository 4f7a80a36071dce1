"""Tile kernels: BLAS and LAPACK on C-ordered tiles, called without the GIL.

SciPy's Python wrappers hold the GIL while BLAS runs, so tasks that use them do not overlap.
SciPy also exports the routines themselves as C pointers (``scipy.linalg.cython_blas`` and
``cython_lapack``, meant for Cython). This module takes those pointers from the capsules and calls
them through ctypes, which releases the GIL for the length of the call.

Order. A tile is a C-ordered float64 array; Fortran sees its transpose. A lower triangle is
therefore passed as an upper one, and every product with its factors exchanged. Each kernel states
what it computes in terms of the C-ordered arrays; the flags follow from that.

Cost. ctypes converts arguments one by one. A function without ``argtypes`` takes ``byref`` objects
as they are, which is three times cheaper for the 13 arguments of ``dgemm`` than declared types
(0.5 microseconds a call instead of 1.7). So nothing but ``byref`` objects made in advance is passed
here: a :class:`Tile` carries those of its data and its extents.

Threads. The kernels say nothing about the number of BLAS threads. Inside a Charioteer task BLAS is
held to the cores of the task; elsewhere use ``threadpoolctl.threadpool_limits``.
"""

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Tile",
    "add_scores",
    "gemm",
    "potrf",
    "rbf",
    "solve_backward",
    "solve_forward",
    "syrk",
    "trsm",
    "update_backward",
    "update_forward",
]

_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype = ctypes.c_char_p
_capsule_name.argtypes = [ctypes.py_object]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _bind(module: str, routine: str) -> Callable[..., None]:
    capsule = importlib.import_module(module).__pyx_capi__[routine]
    signature = _capsule_name(capsule)
    # The capsule is named by its C signature. An integer type other than int would be read past
    # the four bytes that a Tile holds for it.
    if b"int *" not in signature or b"long" in signature or b"int64" in signature:
        raise ImportError(f"{module}.{routine} has an unexpected signature: {signature.decode()}")
    return ctypes.CFUNCTYPE(None)(_capsule_pointer(capsule, signature))


_dgemm = _bind("scipy.linalg.cython_blas", "dgemm")
_dsyrk = _bind("scipy.linalg.cython_blas", "dsyrk")
_dtrsm = _bind("scipy.linalg.cython_blas", "dtrsm")
_dpotrf = _bind("scipy.linalg.cython_lapack", "dpotrf")

_ZERO = ctypes.byref(ctypes.c_double(0.0))
_ONE = ctypes.byref(ctypes.c_double(1.0))
_MINUS_ONE = ctypes.byref(ctypes.c_double(-1.0))
_TRANSPOSED = ctypes.byref(ctypes.c_char(b"T"))
_PLAIN = ctypes.byref(ctypes.c_char(b"N"))
_UPPER = ctypes.byref(ctypes.c_char(b"U"))
_LEFT = ctypes.byref(ctypes.c_char(b"L"))
_RIGHT = ctypes.byref(ctypes.c_char(b"R"))
_NON_UNIT = ctypes.byref(ctypes.c_char(b"N"))


class Tile:
    """A float64 matrix with what a Fortran routine needs to be told about it.

    ``array`` has the shape (rows, columns), is C-contiguous and stays alive as long as the tile.
    ``data``, ``rows`` and ``columns`` are ``byref`` objects; ``columns`` is the leading dimension
    too.

    Raises:
        ValueError: the array is not a non-empty, writable, C-contiguous float64 matrix.
    """

    __slots__ = ("array", "columns", "data", "rows")

    def __init__(self, array: npt.NDArray[np.float64]) -> None:
        if array.ndim != 2 or array.dtype != np.float64 or not array.size:
            raise ValueError(f"a tile is a float64 matrix, not {array.dtype} of {array.shape}")
        if not (array.flags.c_contiguous and array.flags.writeable):
            raise ValueError("a tile must be C-contiguous and writable")
        rows, columns = array.shape
        self.array = array
        # from_buffer keeps the array's buffer exported, so the address stays good.
        buffer: Any = array  # arrays declare the protocol to type checkers from Python 3.12 on
        self.data: Any = ctypes.byref(ctypes.c_double.from_buffer(buffer))
        self.rows: Any = ctypes.byref(ctypes.c_int(rows))
        self.columns: Any = ctypes.byref(ctypes.c_int(columns))

    @classmethod
    def zeros(cls, rows: int, columns: int) -> "Tile":
        """A tile of zeros of shape (rows, columns)."""
        return cls(np.zeros((rows, columns)))


def rbf(k: Tile, left: Tile, right: Tile, noise: float = 0.0) -> None:
    """Fill ``k`` with ``exp(left @ right.T)``, and add ``noise`` to its diagonal.

    ``left`` is (rows of k, d) and ``right`` (columns of k, d). With the augmented features of
    ``gp.augment`` the exponent is minus half the squared distance, in length scales.
    """
    _dgemm(
        _TRANSPOSED, _PLAIN, k.columns, k.rows, left.columns,
        _ONE, right.data, right.columns, left.data, left.columns, _ZERO, k.data, k.columns,
    )  # fmt: skip
    np.exp(k.array, out=k.array)
    if noise:
        k.array.reshape(-1)[:: k.array.shape[1] + 1] += noise


def potrf(a: Tile) -> None:
    """Overwrite the lower triangle of ``a`` with its Cholesky factor; the rest is left as it was.

    Raises:
        numpy.linalg.LinAlgError: ``a`` is not positive definite.
    """
    info = ctypes.c_int(0)
    _dpotrf(_UPPER, a.columns, a.data, a.columns, ctypes.byref(info))
    if info.value:
        raise np.linalg.LinAlgError(
            f"the leading minor of order {info.value} of a diagonal tile is not positive definite"
        )


def trsm(diagonal: Tile, a: Tile) -> None:
    """``a = a @ inv(L.T)``, with L the lower triangle of ``diagonal``."""
    _dtrsm(
        _LEFT, _UPPER, _TRANSPOSED, _NON_UNIT, a.columns, a.rows,
        _ONE, diagonal.data, diagonal.columns, a.data, a.columns,
    )  # fmt: skip


def syrk(a: Tile, c: Tile) -> None:
    """``c -= a @ a.T`` in the lower triangle of ``c``."""
    _dsyrk(
        _UPPER, _TRANSPOSED, c.columns, a.columns,
        _MINUS_ONE, a.data, a.columns, _ONE, c.data, c.columns,
    )  # fmt: skip


def gemm(a: Tile, b: Tile, c: Tile) -> None:
    """``c -= a @ b.T``."""
    _dgemm(
        _TRANSPOSED, _PLAIN, c.columns, c.rows, a.columns,
        _MINUS_ONE, b.data, b.columns, a.data, a.columns, _ONE, c.data, c.columns,
    )  # fmt: skip


def solve_forward(diagonal: Tile, y: Tile) -> None:
    """``y = inv(L) @ y``, with L the lower triangle of ``diagonal``."""
    _dtrsm(
        _RIGHT, _UPPER, _PLAIN, _NON_UNIT, y.columns, y.rows,
        _ONE, diagonal.data, diagonal.columns, y.data, y.columns,
    )  # fmt: skip


def update_forward(factor: Tile, solved: Tile, y: Tile) -> None:
    """``y -= factor @ solved``."""
    _dgemm(
        _PLAIN, _PLAIN, y.columns, y.rows, solved.rows,
        _MINUS_ONE, solved.data, solved.columns, factor.data, factor.columns,
        _ONE, y.data, y.columns,
    )  # fmt: skip


def solve_backward(diagonal: Tile, y: Tile) -> None:
    """``y = inv(L.T) @ y``, with L the lower triangle of ``diagonal``."""
    _dtrsm(
        _RIGHT, _UPPER, _TRANSPOSED, _NON_UNIT, y.columns, y.rows,
        _ONE, diagonal.data, diagonal.columns, y.data, y.columns,
    )  # fmt: skip


def update_backward(factor: Tile, solved: Tile, y: Tile) -> None:
    """``y -= factor.T @ solved``."""
    _dgemm(
        _PLAIN, _TRANSPOSED, y.columns, y.rows, solved.rows,
        _MINUS_ONE, solved.data, solved.columns, factor.data, factor.columns,
        _ONE, y.data, y.columns,
    )  # fmt: skip


def add_scores(k: Tile, weights: Tile, scores: Tile) -> None:
    """``scores += k @ weights``."""
    _dgemm(
        _PLAIN, _PLAIN, scores.columns, scores.rows, weights.rows,
        _ONE, weights.data, weights.columns, k.data, k.columns, _ONE, scores.data, scores.columns,
    )  # fmt: skip
