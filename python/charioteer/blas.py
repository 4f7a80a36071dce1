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
``None``: what is computed is written to an argument.

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

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, overload

import numpy as np
import numpy.typing as npt

from charioteer import _core
from charioteer._core import Task, TaskFunction, TaskList, TaskSpace
from charioteer._futures import Tasks
from charioteer._native import capsule_address, native
from charioteer.devices import Placement

__all__ = ["Routine", "axpy", "gemm", "geqrf", "getrf", "potrf", "routine", "syrk", "trsm"]

_LETTERS = {
    np.dtype(np.float32): "s",
    np.dtype(np.float64): "d",
    np.dtype(np.complex64): "c",
    np.dtype(np.complex128): "z",
}
_OPERATIONS = ("N", "T", "C")
_CODES = {"s": "f4", "d": "f8", "c": "c8", "z": "c16"}

# `#` is a number of the routine's type, `<` an array of it that is read, `>` one that is written.
_PARAMETERS = {
    "gemm": "&c1 &c1 &i4 &i4 &i4 &# < &i4 < &i4 &# > &i4",
    "syrk": "&c1 &c1 &i4 &i4 &# < &i4 &# > &i4",
    "trsm": "&c1 &c1 &c1 &c1 &i4 &i4 &# < &i4 > &i4",
    "axpy": "&i4 &# < &i4 > &i4",
    "potrf": "&c1 &i4 > &i4 info",
}
# These go through an adapter, which takes the routine's pointer and how the matrix is stored.
_ADAPTED = {
    "getrf": "p i4 i4 i4 i4 > i4 *i4 info",
    "geqrf": "p c1 i4 i4 i4 > i4 > info",
}

_made: dict[str, TaskFunction[..., None]] = {}
_lock = threading.Lock()


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


@functools.cache
def _address(name: str) -> int:
    return capsule_address(_pointer(name))


def routine(name: str) -> TaskFunction[..., None]:
    """A routine itself as a task function, whose parameters are those of the Fortran routine.

    What Fortran takes by reference, calls give as a number or a character; ``info`` takes no
    argument. Nothing is checked but dtypes: leading dimensions and the order in memory are as in
    Fortran, and the arrays may have any strides.

    Args:
        name: of a BLAS routine of this module or of ``potrf``, with the letter of its type, such as
            ``"dgemm"``.

    Raises:
        ValueError: no such routine.
        ImportError: SciPy is not installed.
    """
    if name not in {letter + base for letter in _CODES for base in _PARAMETERS}:
        raise ValueError(f"no routine {name!r}: one of {', '.join(_PARAMETERS)} after s, d, c or z")
    return _get(name)


def _get(name: str) -> TaskFunction[..., None]:
    made = _made.get(name)
    if made is not None:
        return made
    letter, base = name[0], name[1:]
    code = _CODES[letter]
    words = (_PARAMETERS.get(base) or _ADAPTED[base]).split()
    params = [
        {"<": f"const *{code}", ">": f"*{code}"}.get(word) or word.replace("#", code)
        for word in words
    ]
    function: Any
    if base in _ADAPTED:
        getrf_address, geqrf_address = _core.lapack_adapters()
        function = getrf_address if base == "getrf" else geqrf_address
    else:
        function = _pointer(name)
    made = native(function, params, order="any", name=name)
    with _lock:
        return _made.setdefault(name, made)


P = ParamSpec("P")

Array = npt.NDArray[Any]
Trans = Literal["N", "T", "C"]
Number = complex
_Call = tuple[str, tuple[Any, ...]]
"""A routine's name, and the arguments of the native task function."""


class Routine(Generic[P]):
    """A routine of this module: a task function that looks at its arguments when it is called.

    Args:
        plan: translates the arguments.
        said: the options of its tasks, the later over the earlier.
    """

    def __init__(self, plan: Callable[P, _Call], *said: dict[str, Any]) -> None:
        self._plan = plan
        self._said = said
        functools.update_wrapper(self, plan)

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Task[None]: ...
    @overload
    def __call__(self, *args: Any, **kwargs: Any) -> Task[None]: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Task[None]:
        """Spawns it.

        Raises:
            TypeError: arrays of another dtype, or of several; something that is no array.
            ValueError: shapes, strides or flags that do not fit; an array that is read-only.
            ImportError: SciPy is not installed.
            NoRuntimeError: no runtime is open.
        """
        handles = (Task, TaskList, TaskSpace)
        if any(isinstance(given, handles) for given in (*args, *kwargs.values())):
            # Which routine it is, is seen when the results are there.
            later: TaskFunction[..., None] = _core.task(self.fn, name=self._plan.__name__)
            return self._with_options(later)(*args, **kwargs)
        name, arguments = self._plan(*args, **kwargs)
        return self._with_options(_get(name))(*arguments)

    def _with_options(self, function: TaskFunction[..., None]) -> TaskFunction[..., None]:
        for said in self._said:
            function = function.options(**said)
        return function

    def fn(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Does it on the spot, with the GIL released.

        Raises:
            NativeError: LAPACK's ``info`` is not zero.
            TypeError: as for a call.
            ValueError: as for a call.
            ImportError: SciPy is not installed.
        """
        name, arguments = self._plan(*args, **kwargs)
        _get(name).fn(*arguments)

    def options(
        self,
        name: str | Task[Any] | None = None,
        *,
        dependencies: Tasks | None = None,
        priority: int | None = None,
        placement: Placement | None = None,
        share: float | None = None,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Routine[P]:
        """The same with these options, as for any task function.

        Raises:
            TypeError: something of the wrong type.
            ValueError: a number out of range.
        """
        given: dict[str, Any] = {
            "name": name,
            "dependencies": dependencies,
            "priority": priority,
            "placement": placement,
            "share": share,
            "timeout": timeout,
            "retries": retries,
        }
        said = {key: value for key, value in given.items() if value is not None}
        _EMPTY.options(**said)  # refuses here what it would refuse at the call
        return Routine(self._plan, *self._said, said)

    def map(self, *iterables: Iterable[Any]) -> TaskList[None]:
        """Spawns one task for each element of ``iterables``, taken in step.

        Raises:
            TypeError: no iterable; one handle for many tasks; else as for a call.
            ValueError: as for a call.
            NoRuntimeError: no runtime is open.
        """
        if not iterables:
            raise TypeError("map needs at least one iterable")
        if any(isinstance(said.get("name"), Task) for said in self._said):
            raise TypeError("many tasks cannot have one handle")
        return TaskList([self(*given) for given in zip(*iterables, strict=False)])

    def __repr__(self) -> str:
        return f"<routine {self._plan.__name__}>"


def _nothing() -> None:
    """The body of a task function that only judges options."""


_EMPTY = _core.task(_nothing)


class _Matrix(NamedTuple):
    """How a matrix lies in memory."""

    rows: int
    columns: int
    by_rows: int
    """The leading dimension if it is stored by rows, else 0."""
    by_columns: int
    """The same by columns; a vector may be stored both ways."""

    def is_by_rows(self, rather: bool = True) -> bool:
        """Which way it is taken; ``rather`` where both are right."""
        return rather if self.by_rows and self.by_columns else self.by_rows > 0

    def leading(self, by_rows: bool) -> int:
        return self.by_rows if by_rows else self.by_columns


def _letter(function: str, **arrays: Any) -> str:
    """The letter of the arrays' type."""
    found = None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            kind = type(array).__name__
            raise TypeError(f"{function}: {name} is to be a NumPy array, not {kind}")
        letter = _LETTERS.get(array.dtype)
        if letter is None:
            raise TypeError(
                f"{function}: {name} is of {array.dtype}; there is float32, float64, complex64 and"
                " complex128"
            )
        if found is not None and letter != found[0]:
            raise TypeError(f"{function}: {name} is of {array.dtype}, {found[1]} is not")
        if found is None:
            found = letter, name
    assert found is not None
    return found[0]


def _matrix(function: str, name: str, array: Array, *, writes: bool = False) -> _Matrix:
    if array.ndim != 2:
        raise ValueError(f"{function}: {name} is to be a matrix, not of shape {array.shape}")
    if writes:
        _check_writable(function, name, array)
    rows, columns = array.shape
    if not rows or not columns:
        return _Matrix(rows, columns, max(1, columns), max(1, rows))
    size = array.itemsize
    down, right = array.strides
    by_rows = by_columns = 0
    if columns == 1 or right == size:
        by_rows = columns if rows == 1 else _leading(down, size, columns)
    if rows == 1 or down == size:
        by_columns = rows if columns == 1 else _leading(right, size, rows)
    if not by_rows and not by_columns:
        raise ValueError(
            f"{function}: the elements of {name} are adjacent neither along rows nor along columns:"
            f" shape {array.shape}, strides {array.strides}"
        )
    return _Matrix(rows, columns, by_rows, by_columns)


def _leading(stride: int, size: int, least: int) -> int:
    """A stride in elements; 0 if it cannot be a leading dimension."""
    return stride // size if stride >= least * size and stride % size == 0 else 0


def _check_writable(function: str, name: str, array: Array) -> None:
    if not array.flags.writeable:
        raise ValueError(f"{function}: {name} is read-only")


def _check_shape(function: str, name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if got != wanted:
        raise ValueError(f"{function}: {name} is of shape {got}, the others need {wanted}")


def _check_square(function: str, name: str, matrix: _Matrix) -> None:
    if matrix.rows != matrix.columns:
        shape = (matrix.rows, matrix.columns)
        raise ValueError(f"{function}: {name} is to be square, not of shape {shape}")


def _check_trans(function: str, name: str, trans: str, *allowed: str) -> None:
    if trans not in allowed:
        shown = ", ".join(map(repr, allowed))
        raise ValueError(f"{function}: {name} is one of {shown}, not {trans!r}")


def _seen(function: str, letter: str, trans: str, turned: bool) -> str:
    """What Fortran is to do with an operand that it sees transposed, or not."""
    if not turned:
        return trans
    if trans == "N":
        return "T"
    if trans == "T" or letter in "sd":
        return "N"
    raise ValueError(
        f"{function}: one operand is stored by rows and one by columns, so this one would have to"
        " be conjugated and not transposed, which BLAS cannot"
    )


def _triangle(lower: bool, by_rows: bool) -> str:
    return "L" if bool(lower) != by_rows else "U"


@Routine
def gemm(
    a: Array,
    b: Array,
    c: Array,
    *,
    alpha: Number = 1.0,
    beta: Number = 0.0,
    trans_a: Trans = "N",
    trans_b: Trans = "N",
) -> _Call:
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
    letter = _letter("gemm", a=a, b=b, c=c)
    _check_trans("gemm", "trans_a", trans_a, *_OPERATIONS)
    _check_trans("gemm", "trans_b", trans_b, *_OPERATIONS)
    A, B = _matrix("gemm", "a", a), _matrix("gemm", "b", b)
    C = _matrix("gemm", "c", c, writes=True)
    m, k = (A.rows, A.columns) if trans_a == "N" else (A.columns, A.rows)
    inner, n = (B.rows, B.columns) if trans_b == "N" else (B.columns, B.rows)
    if inner != k:
        raise ValueError(f"gemm: op(a) has {k} columns, op(b) {inner} rows")
    _check_shape("gemm", "c", c.shape, (m, n))
    by_rows = C.is_by_rows()
    a_by_rows, b_by_rows = A.is_by_rows(by_rows), B.is_by_rows(by_rows)
    seen_a = _seen("gemm", letter, trans_a, a_by_rows != by_rows)
    seen_b = _seen("gemm", letter, trans_b, b_by_rows != by_rows)
    leading_a, leading_b = A.leading(a_by_rows), B.leading(b_by_rows)
    leading = C.leading(by_rows)
    if by_rows:
        return letter + "gemm", (
            seen_b, seen_a, n, m, k, alpha, b, leading_b, a, leading_a, beta, c, leading,
        )  # fmt: skip
    return letter + "gemm", (
        seen_a, seen_b, m, n, k, alpha, a, leading_a, b, leading_b, beta, c, leading,
    )  # fmt: skip


@Routine
def syrk(
    a: Array,
    c: Array,
    *,
    alpha: Number = 1.0,
    beta: Number = 0.0,
    lower: bool = True,
    trans: Literal["N", "T"] = "N",
) -> _Call:
    """``c = alpha * op(a) @ op(a).T + beta * c`` in one triangle of ``c``; complex ones alike.

    Args:
        a: of shape (n, k) after ``op``.
        c: of shape (n, n); the triangle is written, the rest left alone.
        alpha: a factor.
        beta: another; complex ones for complex arrays only.
        lower: which triangle.
        trans: ``"N"``: a itself, ``"T"``: transposed.
    """
    letter = _letter("syrk", a=a, c=c)
    _check_trans("syrk", "trans", trans, "N", "T")
    A, C = _matrix("syrk", "a", a), _matrix("syrk", "c", c, writes=True)
    n, k = (A.rows, A.columns) if trans == "N" else (A.columns, A.rows)
    _check_shape("syrk", "c", c.shape, (n, n))
    by_rows = C.is_by_rows()
    a_by_rows = A.is_by_rows(by_rows)
    return letter + "syrk", (
        _triangle(lower, by_rows), _seen("syrk", letter, trans, a_by_rows), n, k,
        alpha, a, A.leading(a_by_rows), beta, c, C.leading(by_rows),
    )  # fmt: skip


@Routine
def trsm(
    a: Array,
    b: Array,
    *,
    alpha: Number = 1.0,
    left: bool = True,
    lower: bool = True,
    trans: Trans = "N",
    unit: bool = False,
) -> _Call:
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
    letter = _letter("trsm", a=a, b=b)
    _check_trans("trsm", "trans", trans, *_OPERATIONS)
    A, B = _matrix("trsm", "a", a), _matrix("trsm", "b", b, writes=True)
    _check_square("trsm", "a", A)
    side = B.rows if left else B.columns
    _check_shape("trsm", "a", a.shape, (side, side))
    by_rows = B.is_by_rows()
    a_by_rows = A.is_by_rows(by_rows)
    m, n = (B.columns, B.rows) if by_rows else (B.rows, B.columns)
    return letter + "trsm", (
        "L" if bool(left) != by_rows else "R",
        _triangle(lower, a_by_rows),
        _seen("trsm", letter, trans, a_by_rows != by_rows),
        "U" if unit else "N",
        m, n, alpha, a, A.leading(a_by_rows), b, B.leading(by_rows),
    )  # fmt: skip


@Routine
def potrf(a: Array, *, lower: bool = True) -> _Call:
    """The Cholesky factor of a symmetric (Hermitian) positive definite matrix, in its place.

    With ``lower``, ``a = L @ L.conj().T``; else ``a = U.conj().T @ U``. The task fails with
    :class:`charioteer.NativeError` if the leading minor of order ``code`` is not positive definite.

    Args:
        a: square; the triangle is read and overwritten, the rest left alone.
        lower: which triangle.
    """
    letter = _letter("potrf", a=a)
    A = _matrix("potrf", "a", a, writes=True)
    _check_square("potrf", "a", A)
    by_rows = A.is_by_rows()
    return letter + "potrf", (_triangle(lower, by_rows), A.rows, a, A.leading(by_rows))


@Routine
def axpy(x: Array, y: Array, *, alpha: Number = 1.0) -> _Call:
    """``y += alpha * x``.

    Args:
        x: a vector with any stride, or an array that is contiguous.
        y: of the same shape; if it is no vector, of the same order; written.
        alpha: a factor; a complex one for complex arrays only.
    """
    letter = _letter("axpy", x=x, y=y)
    _check_writable("axpy", "y", y)
    _check_shape("axpy", "x", x.shape, y.shape)
    if x.ndim == 1:
        # Of a negative increment BLAS wants the lowest address, whence it goes backwards.
        step_x, step_y = _increment("x", x), _increment("y", y)
        return letter + "axpy", (
            len(x), alpha, x if step_x > 0 else x[::-1], step_x,
            y if step_y > 0 else y[::-1], step_y,
        )  # fmt: skip
    alike = (x.flags.c_contiguous and y.flags.c_contiguous) or (
        x.flags.f_contiguous and y.flags.f_contiguous
    )
    if not alike:
        raise ValueError("axpy: x and y are no vectors, and not contiguous in the same order")
    return letter + "axpy", (x.size, alpha, x, 1, y, 1)


def _increment(name: str, vector: Array) -> int:
    if len(vector) < 2:
        return 1
    (stride,) = vector.strides
    step, rest = divmod(stride, vector.itemsize)
    if rest or (name == "y" and not step):
        raise ValueError(f"axpy: {name} has elements {stride} bytes apart")
    return step


def _check_vector(function: str, name: str, vector: Any, dtype: Any, length: int) -> None:
    if not isinstance(vector, np.ndarray) or vector.dtype != dtype:
        raise TypeError(f"{function}: {name} is to be an array of {np.dtype(dtype)}")
    _check_writable(function, name, vector)
    _check_shape(function, name, vector.shape, (length,))
    if not vector.flags.c_contiguous:
        raise ValueError(f"{function}: {name} is to be contiguous")


@Routine
def getrf(a: Array, pivots: Array) -> _Call:
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
    letter = _letter("getrf", a=a)
    A = _matrix("getrf", "a", a, writes=True)
    _check_vector("getrf", "pivots", pivots, np.int32, min(a.shape))
    by_rows = A.is_by_rows(False)
    return letter + "getrf", (
        _address(letter + "getrf"), a.itemsize, by_rows, A.rows, A.columns,
        a, A.leading(by_rows), pivots,
    )  # fmt: skip


@Routine
def geqrf(a: Array, tau: Array) -> _Call:
    """The QR factorization in the place of ``a``, in LAPACK's form.

    ``R`` is on and above the diagonal. Below it are the vectors ``v`` of the reflectors
    ``H = I - tau * v @ v.conj().T`` whose product ``H[0] @ H[1] @ ...`` is Q, their leading ones
    left out: what ``orgqr`` (``ungqr``) and ``ormqr`` (``unmqr``) take.

    Args:
        a: of shape (m, n).
        tau: of the dtype of ``a`` and shape (min(m, n),); written.
    """
    letter = _letter("geqrf", a=a)
    A = _matrix("geqrf", "a", a, writes=True)
    _check_vector("geqrf", "tau", tau, a.dtype, min(a.shape))
    by_rows = A.is_by_rows(False)
    base = "gelqf" if by_rows else "geqrf"
    return letter + "geqrf", (
        _address(letter + base), letter, by_rows, A.rows, A.columns,
        a, A.leading(by_rows), tau,
    )  # fmt: skip
