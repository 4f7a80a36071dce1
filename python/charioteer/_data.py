"""Managed arrays: how they are made, and what is done with them as tasks.

The handles are the compiled module's (``data.rs``); here is what is rare, or NumPy's business.
"""

from __future__ import annotations

import contextvars
import itertools
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

from charioteer import _core
from charioteer._core import Array, Region, Token
from charioteer._foreign import taken
from charioteer._modes import In, Out
from charioteer._storage import Directory, new_buffer
from charioteer.devices import Device, Kind
from charioteer.errors import AccessError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["array", "asarray", "empty", "full", "token", "zeros"]

Shape: TypeAlias = SupportsIndex | Iterable[SupportsIndex]

_numbers = itertools.count(1)


def _named(name: str | None, what: str) -> str:
    if name is None:
        return f"{what}{next(_numbers)}"
    if not isinstance(name, str):
        raise TypeError(f"name is a string, not {type(name).__name__}")
    return name


def _managed(
    buffer: np.ndarray[Any, Any], name: str | None, memory: _core.ForeignMemory | None = None
) -> Array:
    return Array(buffer, _named(name, "array"), memory)


def _dtype(dtype: Any) -> np.dtype[Any]:
    """A dtype whose elements have a fixed size and are nothing but their bytes."""
    import numpy as np

    found: np.dtype[Any] = np.dtype(dtype)
    if found.hasobject:
        raise AccessError(
            f"arrays of {found} cannot be managed: their elements are elsewhere in memory, and a"
            " device could not be given them; use a dtype of a fixed size"
        )
    return found


def _seen(x: Any) -> np.ndarray[Any, Any]:
    """An array of anything that has one to show; of what is managed, a private copy."""
    import numpy as np

    if isinstance(x, Region):
        return x.numpy()
    if hasattr(x, "__cuda_array_interface__"):
        from charioteer._cuda import downloaded

        return downloaded(x)
    if not hasattr(x, "__array__") and hasattr(x, "__dlpack__"):
        return np.from_dlpack(x)
    found = np.asarray(x)
    _dtype(found.dtype)
    return found


def array(
    x: npt.ArrayLike,
    dtype: npt.DTypeLike | None = None,
    *,
    name: str | None = None,
    directory: Directory = None,
) -> Array:
    """A managed array with a copy of ``x``.

    Args:
        x: anything that NumPy makes an array of, of any shape and strides, or that has
            ``__dlpack__`` or ``__cuda_array_interface__``. What is on a device is copied to the
            host, behind all that is on its library's current stream.
        dtype: of the elements; unless said, that of ``x``.
        name: what messages and traces call it; unless said, one is made up.
        directory: as for :func:`empty`.

    Raises:
        AccessError: the elements are Python objects, or have no fixed size.
        OSError: as for :func:`empty`.
    """
    import numpy as np

    seen = _seen(x)
    wanted = _dtype(seen.dtype if dtype is None else dtype)
    if directory is None:
        return _managed(np.array(seen, wanted, order="C", copy=True, ndmin=0), name)
    buffer = new_buffer(seen.shape, wanted, directory)
    buffer[...] = seen
    return _managed(buffer, name)


def asarray(
    x: npt.ArrayLike, dtype: npt.DTypeLike | None = None, *, name: str | None = None
) -> Array:
    """A managed array that takes over the buffer of ``x``, without a copy where it can.

    It can if ``x`` is an array in C order that may be written, of the wanted dtype; then nobody
    else may touch ``x`` until ``.release()`` or the end of the runtime, when it has what the tasks
    wrote. A managed array is given back as it is.

    An array of CuPy, of PyTorch or of whoever has ``__cuda_array_interface__`` or ``__dlpack__``
    on a GPU, and one of ``charioteer.virtual``, is taken over where it is: its memory is what the
    tasks on that device get, behind all that is on its library's stream now. Others, and the host,
    get copies on demand. ``x`` has the last values again at the end of the runtime, which ends the
    managed array too, after ``.release()``, and in a block ``with A.host():``. Its memory is not
    of the runtime's: never freed by it, and not counted among what it has on the device.

    Args:
        x: as for :func:`array`.
        dtype: of the elements; unless said, that of ``x``.
        name: what messages and traces call it; unless said, one is made up.

    Raises:
        AccessError: the elements are Python objects, or have no fixed size. Also whatever uses
            the array in a runtime whose machine has not the device that ``x`` is on, and on the
            host while no runtime is open.
    """
    import numpy as np

    if isinstance(x, Array) and (dtype is None or x.dtype == _dtype(dtype)):
        return x
    if not isinstance(x, (np.ndarray, Region)):
        found = taken(x, None if dtype is None else _dtype(dtype))
        if found is not None:
            # Pages that nobody touches are no memory.
            return _managed(np.empty(found.shape, found.dtype), name, found.memory)
    seen = _seen(x)
    wanted = _dtype(seen.dtype if dtype is None else dtype)
    buffer = np.require(seen, wanted, ["C", "A", "W"])
    return _managed(buffer.view(np.ndarray), name)


def empty(
    shape: Shape,
    dtype: npt.DTypeLike = float,
    *,
    name: str | None = None,
    directory: Directory = None,
) -> Array:
    """A managed array that nobody has written yet.

    Args:
        shape: its extents.
        dtype: of the elements.
        name: what messages and traces call it.
        directory: where its elements lie in a file, which the system writes out when memory is
            short, and which is gone with the array. Unless said, they lie in memory.

    Raises:
        AccessError: a dtype of Python objects.
        ValueError: a negative extent.
        OSError: there is no such directory, or its disk has no room for the array.
    """
    return _managed(new_buffer(_shape(shape), _dtype(dtype), directory), name)


def zeros(
    shape: Shape,
    dtype: npt.DTypeLike = float,
    *,
    name: str | None = None,
    directory: Directory = None,
) -> Array:
    """A managed array of zeros; takes and raises what :func:`empty` does."""
    import numpy as np

    extents, wanted = _shape(shape), _dtype(dtype)
    if directory is None:
        return _managed(np.zeros(extents, wanted), name)
    return _managed(new_buffer(extents, wanted, directory), name)


def full(
    shape: Shape,
    value: Any,
    dtype: npt.DTypeLike | None = None,
    *,
    name: str | None = None,
    directory: Directory = None,
) -> Array:
    """A managed array of one value; takes and raises what :func:`empty` does.

    Args:
        shape: its extents.
        value: what every element is, or what NumPy spreads over the shape.
        dtype: of the elements; unless said, that of ``value``.
        name: what messages and traces call it.
        directory: as for :func:`empty`.
    """
    import numpy as np

    wanted = _dtype(np.asarray(value).dtype if dtype is None else dtype)
    buffer = new_buffer(_shape(shape), wanted, directory)
    buffer[...] = value
    return _managed(buffer, name)


def token(name: str | None = None) -> Token:
    """A region without data, for tasks to be ordered by; a body gets ``None`` for it.

    Args:
        name: what messages and traces call it; unless said, one is made up.
    """
    return Token(_named(name, "token"))


def _shape(shape: Shape) -> tuple[int, ...]:
    if isinstance(shape, SupportsIndex):
        return (operator.index(shape),)
    return tuple(operator.index(extent) for extent in shape)


@_core.task
def fill(target: Out[Any], value: Any) -> None:
    """The body of ``A.fill(value)`` and of ``A[...] = value``."""
    target[...] = value


@_core.task
def copy(target: Out[Any], source: In[Any]) -> None:
    """The body of ``A[...] = B``, where both are managed."""
    target[...] = source


def assign(target: Region, value: Any) -> _core.Task[None]:
    """Spawns the task that writes a value, or the elements of an array, to all of a region.

    What the value is, is decided here and now: who changes it afterwards changes nothing. That of
    a task is what the task gives.

    Raises:
        ValueError: it does not fit the shape, or cannot be one of the elements.
        TypeError: it cannot be one of the elements.
    """
    import numpy as np

    if isinstance(value, _core.Task):
        return fill(target, value)
    if isinstance(value, Region):
        _fits(target, value.shape)
        return copy(target, value)
    made = np.array(value, target.dtype)
    _fits(target, made.shape)
    return fill(target, made)


_declared: contextvars.ContextVar[tuple[int, list[tuple[Any, bool]]]] = contextvars.ContextVar(
    "charioteer.declared"
)


def declare(task: int, regions: list[tuple[Any, bool]]) -> None:
    """Notes in the context of a task's body what its options declare, and what of that is
    written."""
    _declared.set((task, regions))


def declared(task: int) -> list[tuple[Any, bool]]:
    """What was declared of the task whose body asks; a context is copied to what a body spawns."""
    noted, regions = _declared.get((0, []))
    return regions if noted == task else []


def reducible(operation: str, region: Region) -> None:
    """Refuses to reduce what has no such operation.

    Raises:
        AccessError: the elements have none.
    """
    kinds = "biufc" if operation in ("Sum", "Prod") else "biuf"
    if region.dtype.kind not in kinds:
        raise AccessError(f"{region!r} has no elements that ch.{operation} could reduce")


def gpu_number(device: object) -> int | None:
    """The number of a GPU; ``None`` for the host.

    Raises:
        TypeError: no device.
    """
    match device:
        case Device(Kind("gpu"), index):
            number: int = index
            return number
        case Device(Kind("cpu")) | Kind("cpu"):
            return None
    raise TypeError(f"{device!r} is no device: say which one, as gpu(0), or cpu for the host")


def identity(operation: str, dtype: np.dtype[Any]) -> int | float | bool:
    """What an operation leaves everything as it is with."""
    import numpy as np

    if operation in ("Sum", "Prod"):
        return int(operation == "Prod")
    if dtype.kind == "b":
        return operation == "Min"
    if dtype.kind == "f":
        return np.inf if operation == "Min" else -np.inf
    limits = np.iinfo(dtype)
    return int(limits.max if operation == "Min" else limits.min)


def partial(operation: str, target: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An array like the target, of the identity of an operation."""
    import numpy as np

    return np.full(target.shape, identity(operation, target.dtype), target.dtype)


def device_partial(region: Region, members: int) -> Array:
    """The managed array that a task which may run on devices reduces into: like the region, or a
    row of that for each member of a set. Nobody else knows it."""
    import numpy as np

    shape = region.shape if members == 1 else (members, *region.shape)
    return Array(np.empty(shape, region.dtype), f"partial of {region.base!r}")


def combine(
    operation: str, target: np.ndarray[Any, Any], partials: list[np.ndarray[Any, Any]]
) -> None:
    """Combines partials into the target, in their order."""
    import numpy as np

    combined = {"Sum": np.add, "Prod": np.multiply, "Min": np.minimum, "Max": np.maximum}[operation]
    for each in partials:
        combined(target, each, out=target)


def combine_rows(operation: str, target: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
    """Combines what :func:`device_partial` made into the target."""
    combine(operation, target, [rows] if rows.ndim == target.ndim else list(rows))


class Loan:
    """Marks the arrays that a body is lent on a device, in a runtime that checks.

    Args:
        task: what people call the task.
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self.ended = False

    def check(self) -> None:
        """Refuses what was kept beyond the task.

        Raises:
            AccessError: the body has ended.
        """
        if self.ended:
            raise AccessError(
                f"{self.task} has ended, and an array that it was lent is used: what is in its"
                " memory now is somebody else's; a copy, a[...].copy(), may be kept"
            )


loan = Loan

_library: contextvars.ContextVar[tuple[int, str]] = contextvars.ContextVar("charioteer.library")


def declare_library(task: int, name: str) -> None:
    """Notes in the context of a task's body whose arrays it gets."""
    _library.set((task, name))


def array_library(task: int) -> str:
    """Whose arrays the task gets on devices of a driver."""
    from charioteer._cuda import default_library

    noted, name = _library.get((0, ""))
    return name if noted == task else default_library()


def _fits(target: Region, shape: tuple[int, ...]) -> None:
    # Axes of one element in front are of no account to an assignment.
    spread = shape[max(0, len(shape) - target.ndim) :]
    extra = shape[: len(shape) - len(spread)]
    fits = all(
        mine in (1, extent)
        for mine, extent in zip(reversed(spread), reversed(target.shape), strict=False)
    )
    if not fits or any(extent != 1 for extent in extra):
        raise ValueError(f"{target!r} cannot be written an array of shape {shape}")
