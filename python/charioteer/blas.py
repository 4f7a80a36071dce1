"""BLAS and LAPACK as native tasks: tiled linear algebra without the GIL.

The routines are SciPy's own (``scipy.linalg.cython_blas`` and ``cython_lapack``), called through
their C pointers by workers that need no GIL. SciPy is imported by the first call::

    import numpy as np
    import charioteer as ch
    from charioteer import blas

    with ch.Runtime():
        factor = blas.potrf(a)
        blas.trsm.options(dependencies=factor)(a, b)

Each is a task function: calling it spawns, ``.options`` gives one call its name and options,
``.map`` makes a task for each element, and ``.fn`` does it on the spot. The result of every task is
``None``: what is computed is written to an argument. Regions of managed arrays are ordered by what
the routine reads and writes.

Types. The arrays of a call have one dtype, ``float32``, ``float64``, ``complex64`` or
``complex128``, and that chooses the routine. Handles among the arguments are dependencies; their
results are looked at when the task runs.

Order. Everything is said of the matrices as NumPy shows them: ``lower`` means below the diagonal
whatever the order in memory. A matrix may be stored by rows or by columns, and be a tile of a
larger one, as long as its elements are adjacent along rows or along columns: nothing is copied (but
by :data:`getrf`, of a matrix stored by rows). Fortran sees the transposed of one that is stored by
rows, so triangles, sides and products are exchanged for it. Where operands differ in order, one of
complex numbers cannot be conjugated alone, and ``trans="C"`` is refused.

Failures. What does not fit is a ``TypeError`` or ``ValueError`` at the call; what LAPACK finds out
is a :class:`charioteer.NativeError` of the task, with its ``info`` as ``code``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, ParamSpec

import numpy.typing as npt

from charioteer import _core
from charioteer._core import TaskFunction
from charioteer._modes import In, InOut, Out
from charioteer._native import capsule_address, native

__all__ = ["axpy", "gemm", "geqrf", "getrf", "potrf", "syrk", "trsm"]

_CODES = {"s": "f4", "d": "f8", "c": "c8", "z": "c16"}

# `#` is a number of the routine's type, `<` an array of it that is read, `>` one that is written.
_PARAMETERS = {
    "gemm": "&c1 &c1 &i4 &i4 &i4 &# < &i4 < &i4 &# > &i4",
    "syrk": "&c1 &c1 &i4 &i4 &# < &i4 &# > &i4",
    "trsm": "&c1 &c1 &c1 &c1 &i4 &i4 &# < &i4 > &i4",
    "axpy": "&i4 &# < &i4 > &i4",
    "potrf": "&c1 &i4 > &i4 info",
    # These go through an adapter, which takes the routine's pointer and how the matrix is stored.
    "getrf": "p i4 i4 i4 i4 > i4 *i4 info",
    "geqrf": "p c1 i4 i4 i4 > i4 > info",
}


def _pointer(name: str) -> Any:
    """SciPy's capsule of a routine."""
    try:
        from scipy.linalg import cython_blas, cython_lapack
    except ImportError as error:
        raise ImportError(
            "charioteer.blas calls the BLAS and LAPACK of SciPy, which is not installed: pip"
            " install scipy"
        ) from error
    module = cython_blas if name in cython_blas.__pyx_capi__ else cython_lapack
    capsule = module.__pyx_capi__[name]
    # The capsule is named by its C signature. Of an integer type other than int, the routine would
    # read beyond the four bytes that it gets.
    shown = repr(capsule)
    if "int *" not in shown or "long" in shown or "int64" in shown:
        raise ImportError(f"SciPy's {name} takes integers that are no int: {shown}")
    return capsule


def _load(name: str) -> tuple[Any, int, int]:
    """The function of one type, and what its adapter calls: by columns, and by rows."""
    letter, base = name[0], name[1:]
    code = _CODES[letter]
    params = [
        {"<": f"const *{code}", ">": f"*{code}"}.get(word) or word.replace("#", code)
        for word in _PARAMETERS[base].split()
    ]
    by_columns = by_rows = 0
    if base in ("getrf", "geqrf"):
        getrf_address, geqrf_address = _core.lapack_adapters()
        function: Any = getrf_address if base == "getrf" else geqrf_address
        by_columns = by_rows = capsule_address(_pointer(name))
        if base == "geqrf":
            by_rows = capsule_address(_pointer(letter + "gelqf"))
    else:
        function = _pointer(name)
    return native(function, params, order="any", name=name).fn, by_columns, by_rows


P = ParamSpec("P")

Array = npt.NDArray[Any]
Trans = Literal["N", "T", "C"]
Number = complex


def _routine(declared: Callable[P, None]) -> TaskFunction[P, None]:
    """The task function of the routine that a function declares: name, signature and what it does.

    The compiled module looks at the arguments (``blas.rs``). A function that declares one is called
    for arguments that do not fit its signature, whose error is Python's own.
    """
    made: TaskFunction[P, None] = _core.task(_core.BlasRoutine(declared, _load))
    vars(made)["__doc__"] = declared.__doc__
    return made


@_routine
def gemm(
    a: In[Array],
    b: In[Array],
    c: InOut[Array],
    *,
    alpha: Number = 1.0,
    beta: Number = 0.0,
    trans_a: Trans = "N",
    trans_b: Trans = "N",
) -> None:
    """``c = alpha * op(a) @ op(b) + beta * c``.

    Args:
        a: of shape (m, k) after ``op``.
        b: of shape (k, n) after ``op``.
        c: of shape (m, n); written. With ``beta=0`` what was there is not looked at.
        alpha: a factor.
        beta: another; complex ones for complex arrays only.
        trans_a: ``"N"``: a itself, ``"T"``: transposed, ``"C"``: transposed and conjugated.
        trans_b: the same for b.
    """


@_routine
def syrk(
    a: In[Array],
    c: InOut[Array],
    *,
    alpha: Number = 1.0,
    beta: Number = 0.0,
    lower: bool = True,
    trans: Literal["N", "T"] = "N",
) -> None:
    """``c = alpha * op(a) @ op(a).T + beta * c`` in one triangle of ``c``; complex ones alike.

    Args:
        a: of shape (n, k) after ``op``.
        c: of shape (n, n); the triangle is written, the rest left alone.
        alpha: a factor.
        beta: another; complex ones for complex arrays only.
        lower: which triangle.
        trans: ``"N"``: a itself, ``"T"``: transposed.
    """


@_routine
def trsm(
    a: In[Array],
    b: InOut[Array],
    *,
    alpha: Number = 1.0,
    left: bool = True,
    lower: bool = True,
    trans: Trans = "N",
    unit: bool = False,
) -> None:
    """``b = alpha * inv(op(a)) @ b``, or ``alpha * b @ inv(op(a))``, with ``a`` triangular.

    Args:
        a: square; only its triangle is looked at.
        b: of shape (m, n); written.
        alpha: a factor; a complex one for complex arrays only.
        left: on which side of b the inverse stands.
        lower: which triangle of ``a``, as it is, not after ``op``.
        trans: ``"N"``: a itself, ``"T"``: transposed, ``"C"``: transposed and conjugated.
        unit: its diagonal is taken for ones.
    """


@_routine
def potrf(a: InOut[Array], *, lower: bool = True) -> None:
    """The Cholesky factor of a symmetric (Hermitian) positive definite matrix, in its place.

    With ``lower``, ``a = L @ L.conj().T``; else ``a = U.conj().T @ U``. The task fails with
    :class:`charioteer.NativeError` if the leading minor of order ``code`` is not positive definite.

    Args:
        a: square; the triangle is read and overwritten, the rest left alone.
        lower: which triangle.
    """


@_routine
def axpy(x: In[Array], y: InOut[Array], *, alpha: Number = 1.0) -> None:
    """``y += alpha * x``.

    Args:
        x: a vector with any stride, or an array that is contiguous.
        y: of the same shape; if it is no vector, of the same order; written.
        alpha: a factor; a complex one for complex arrays only.
    """


@_routine
def getrf(a: InOut[Array], pivots: Out[Array]) -> None:
    """The LU factorization with row interchanges, in the place of ``a``.

    ``a`` becomes ``L`` (below the diagonal, its ones left out) and ``U``; ``(a, pivots)`` is what
    ``scipy.linalg.lu_solve`` takes. The task fails with :class:`charioteer.NativeError` if U is
    singular: then ``U[code - 1, code - 1]`` is zero, and the factorization is there all the same.
    A matrix that is stored by rows is copied meanwhile.

    Args:
        a: of shape (m, n).
        pivots: of ``int32`` and shape (min(m, n),); row ``i`` was interchanged with row
            ``pivots[i]``, counted from zero.
    """


@_routine
def geqrf(a: InOut[Array], tau: Out[Array]) -> None:
    """The QR factorization in the place of ``a``, in LAPACK's form.

    ``R`` is on and above the diagonal. Below it are the vectors ``v`` of the reflectors
    ``H = I - tau * v @ v.conj().T`` whose product ``H[0] @ H[1] @ ...`` is Q, their leading ones
    left out: what ``orgqr`` (``ungqr``) and ``ormqr`` (``unmqr``) take.

    Args:
        a: of shape (m, n).
        tau: of the dtype of ``a`` and shape (min(m, n),); written.
    """
