"""Arrays in the memory of a virtual GPU, with NumPy's interface: what CuPy is to a real one.

Protocol. An array names bytes of a device. Whatever computes with it is one NumPy call that is
*enqueued* on the current stream and returns at once; so the host runs ahead, and what reads an
array before the stream has got there, from another stream or another device, reads garbage, as on
a GPU. The shape and type of a result are known without running the call:

* of an elementwise function by the rules of broadcasting, and by asking NumPy with empty arrays of
  the same types;
* of views (slices, transposes, reshapes) by asking NumPy with a *shadow*: an array of the same
  shape and strides over memory of zeros that is never read;
* of the other functions in :data:`_INFERRED` by asking NumPy with small arrays, in which every
  extent above three stands for one of the real ones, in the same order. A function is in the list
  if each extent of its result is one of its arguments' extents.

Whose result has a shape that depends on values has no place here, and neither has what the module
does not know: both raise a ``TypeError`` that names it.

The current stream is the running task's, or the one of :func:`stream` around the call. An operation
may use arrays of its stream's device, and of devices to which that one has peer access. What is
converted to a value of the host (``float(a)``, ``numpy.asarray(a)``, ``a.get()``, printing, a
condition) is copied over the link behind all that is on the stream, waits for it, and is counted by
:func:`host_waits`.

An exception in an operation fails the events behind it: it comes up as the ``__cause__`` of the
``DeviceError`` of whoever waits for one. Arithmetic gives no warnings, as on a GPU.

An array gives its memory back when it is collected, in stream order: operations that are pending
keep none.

The array that a body gets for a region is one of memory that the runtime owns, and has while the
body runs. What the body only reads is read-only: what would write to it raises ``ValueError``. In a
runtime that checks (``Runtime(check=True)``) who uses one, or a view of one, after the body has
ended gets an ``AccessError``; in others it reads or writes whatever is there by then.
"""

from __future__ import annotations

import functools
import mmap
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from charioteer._core import Allocation, Memory, Stream, task_stream
from charioteer._data import Loan
from charioteer.devices import Device, gpu
from charioteer.errors import DeviceError

__all__ = [
    "arange",
    "array",
    "asarray",
    "asnumpy",
    "copyto",
    "current_stream",
    "empty",
    "eye",
    "fft",
    "full",
    "host_waits",
    "identity",
    "linalg",
    "linspace",
    "ndarray",
    "ones",
    "random",
    "stream",
    "timed",
    "zeros",
]

Shape: TypeAlias = int | Sequence[int]

_stream: ContextVar[tuple[int | None, Stream] | None] = ContextVar(
    "charioteer_virtual_stream", default=None
)
"""The stream that was made current, and the task that did so: bodies inherit the variables of their
spawner, whose stream is not theirs."""


def current_stream() -> Stream:
    """The stream that operations are enqueued on: the one of the block around, in the same task;
    else the running task's, on its current device.

    Raises:
        RuntimeError: there is none.
    """
    running = task_stream()
    task = None if running is None else running[0]
    found = _stream.get()
    if found is not None and found[0] == task:
        return found[1]
    if running is None or running[1] is None:
        raise RuntimeError(
            "no stream is current: virtual arrays are used in a task on a virtual GPU, while that"
            " is current, or in 'with virtual.stream(s):'"
        )
    return running[1]


@contextmanager
def stream(current: Stream) -> Generator[Stream]:
    """Makes the stream current in a block.

    Args:
        current: the stream.
    """
    running = task_stream()
    before = _stream.set((None if running is None else running[0], current))
    try:
        yield current
    finally:
        _stream.reset(before)


_cost: Callable[[str, Sequence[ndarray]], float] | None = None
"""What operations take, in a block of :func:`timed`."""


@contextmanager
def timed(cost: Callable[[str, Sequence[ndarray]], float]) -> Generator[None]:
    """Lets operations take the time in a block that kernels of a GPU would: behind each the stream
    is busy for what is said here. Copies over links have their own time.

    It holds for operations that any thread enqueues meanwhile, and in virtual time it is what a
    program's makespan comes of. Blocks do not nest.

    Args:
        cost: called as an operation is enqueued, with the name of NumPy's function, such as
            ``"matmul"`` (copies within a device have names of this module's), and its arrays on the
            device, operands before results; gives seconds.

    Raises:
        RuntimeError: there is such a block already.
    """
    global _cost
    if _cost is not None:
        raise RuntimeError("operations are timed already")
    _cost = cost
    try:
        yield
    finally:
        _cost = None


class _Waits:
    """Counts waits of the host."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    def add(self) -> None:
        with self._lock:
            self.count += 1


_waits = _Waits()


def host_waits() -> int:
    """How often the host waited for a value of a virtual array, since the process began."""
    return _waits.count


# ---- shadows ----------------------------------------------------------------------------------


class _Zeros:
    """Memory of zeros for shadows: pages that nobody writes take none."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)


_zeros = _Zeros(1 << 20)


def _zeros_of(size: int) -> _Zeros:
    global _zeros
    found = _zeros
    if found.size < size:
        # Two threads may both make one; either will do.
        found = _zeros = _Zeros(max(size, 2 * found.size))
    return found


def _any(value: object) -> Any:
    """The value, typed for NumPy's stubs, which know no arrays but NumPy's."""
    return value


def _address(array: np.ndarray[Any, Any]) -> int:
    found: int = array.__array_interface__["data"][0]
    return found


# ---- arrays -----------------------------------------------------------------------------------


class ndarray(NDArrayOperatorsMixin):  # noqa: N801 (as NumPy's)
    """An array in the memory of a virtual GPU.

    ``virtual.asarray``, ``virtual.empty`` and their like make one; this is for memory that is there
    already.

    Args:
        memory: where it is: memory of its own, or somebody else's that outlives it.
        shape: its extents.
        dtype: the type of its elements; Python objects have no place on a device.
        strides: bytes from one element to the next along each axis; C order unless said.
        offset: bytes before its first element.

    Raises:
        TypeError: elements that are Python objects.
        ValueError: it does not fit into the memory.
    """

    __slots__ = (
        *("_dtype", "_loan", "_memory", "_offset", "_owner", "_shape", "_strides", "_writable"),
    )

    def __init__(
        self,
        memory: Allocation | Memory,
        shape: Shape,
        dtype: Any = float,
        strides: Sequence[int] | None = None,
        offset: int = 0,
    ) -> None:
        self._owner = memory if isinstance(memory, Allocation) else None
        self._memory: Memory = memory.memory if isinstance(memory, Allocation) else memory
        self._dtype = _dtype(dtype)
        self._shape = _shape(shape)
        self._offset = offset
        if strides is None:
            strides = _contiguous(self._shape, self._dtype.itemsize)
        self._strides = tuple(strides)
        self._loan: Loan | None = None
        self._writable = True
        self._shadow()  # says if it does not fit

    @classmethod
    def managed(
        cls,
        memory: Memory,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...],
        offset: int,
        writable: bool,
        loan: Loan | None,
    ) -> ndarray:
        """What a body gets for a region: an array of memory that the runtime owns."""
        made = cls(memory, shape, dtype, strides, offset)
        made._writable, made._loan = writable, loan
        return made

    def _shadow(self) -> np.ndarray[Any, Any]:
        size = max(self._memory.size, 1)
        return np.ndarray(
            self._shape,
            self._dtype,
            memoryview(_zeros_of(size).pages)[:size],
            self._offset,
            self._strides,
        )

    def _view(self, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> ndarray:
        """The view that NumPy makes of an array like this one."""
        shadow = self._shadow()
        return self._at(change(shadow), shadow)

    def _at(self, part: np.ndarray[Any, Any], shadow: np.ndarray[Any, Any]) -> ndarray:
        """What is to this array as the part is to its shadow."""
        view = self._same(self._owner)
        view._shape, view._strides, view._dtype = part.shape, part.strides, part.dtype
        if part.size:
            view._offset += _address(part) - _address(shadow)
        return view

    def _on_device(self) -> np.ndarray[Any, Any]:
        """The elements themselves, within an operation."""
        if not self.size:
            return np.empty(self._shape, self._dtype)
        return np.ndarray(
            self._shape,
            self._dtype,
            np.frombuffer(_any(self._memory), np.uint8),
            self._offset,
            self._strides,
        )

    def _borrowed(self) -> ndarray:
        """The same without its memory's owner, for an operation."""
        return self._same(None)

    def _same(self, owner: Allocation | None) -> ndarray:
        same = ndarray.__new__(ndarray)
        same._owner, same._memory, same._offset = owner, self._memory, self._offset
        same._loan, same._writable = self._loan, self._writable
        same._shape, same._strides, same._dtype = self._shape, self._strides, self._dtype
        return same

    def _is_contiguous(self) -> bool:
        return self.size == 0 or bool(self._shadow().flags.c_contiguous)

    def _lent_on(self) -> Stream | None:
        """The stream behind which a managed array may take over what it has; none if it cannot: in
        another order, without elements, read-only, or of memory that somebody else has."""
        if self._owner is None or not self._writable or not self.nbytes:
            return None
        if not self._is_contiguous():
            return None
        try:
            current = current_stream()
        except RuntimeError:
            return self._owner.stream
        # What is on one of another device was not enqueued for this one.
        return current if current.device == self._memory.device else self._owner.stream

    def _is(self, other: ndarray) -> bool:
        return (
            self._memory.address == other._memory.address
            and self._memory.device == other._memory.device
            and self._offset == other._offset
            and self._shape == other._shape
            and self._strides == other._strides
            and self._dtype == other._dtype
        )

    # ---- what it is -----------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its elements."""
        return self._dtype

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one element to the next along each axis."""
        return self._strides

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self._shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        size = 1
        for extent in self._shape:
            size *= extent
        return size

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self._dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.itemsize

    @property
    def device(self) -> Device:
        """Whose memory it is in."""
        return gpu(self._memory.device)

    @property
    def memory(self) -> Memory:
        """The memory that it is in."""
        return self._memory

    @property
    def T(self) -> ndarray:  # noqa: N802 (as NumPy's)
        """The transpose, a view."""
        return self._view(lambda shadow: shadow.T)

    @property
    def mT(self) -> ndarray:  # noqa: N802 (as NumPy's)
        """The transposes of the matrices in the last two axes, a view."""
        return self.swapaxes(-1, -2)

    @property
    def real(self) -> ndarray:
        """The real parts, a view."""
        return self._view(lambda shadow: shadow.real)

    @property
    def imag(self) -> ndarray:
        """The imaginary parts: a view of complex numbers, else zeros."""
        if self._dtype.kind != "c":
            return zeros(self._shape, self._dtype)
        return self._view(lambda shadow: shadow.imag)

    def __len__(self) -> int:
        if not self._shape:
            raise TypeError("len() of unsized object")
        return self._shape[0]

    def __iter__(self) -> Iterator[ndarray]:
        for index in range(len(self)):
            yield self[index]

    # ---- values of the host ---------------------------------------------------------------

    def get(self) -> np.ndarray[Any, Any]:
        """A copy on the host: waits for the stream, and for the link. Where the current stream is
        none of the array's device, it is copied behind all that is on the stream that it was made
        on too.

        Raises:
            AccessError: a runtime checks, and the body that was lent the array has ended.
            DeviceError: something before it on the stream failed.
        """
        if self._loan is not None:
            self._loan.check()
        try:
            current = current_stream()
        except RuntimeError:
            if self._owner is None:
                raise
            current = None
        if self._owner is None or (current and current.device == self._memory.device):
            return self._get(current_stream())
        own = self._owner.stream
        if current is not None and current.reaches(self._memory):
            # It may have been written there.
            own.wait(current.record())
        with stream(own):
            return self._get(own)

    def _get(self, current: Stream) -> np.ndarray[Any, Any]:
        _check(self)
        _waits.add()
        if not self.size:
            current.synchronize()
            return np.empty(self._shape, self._dtype)
        array = self
        if not self._is_contiguous():
            array = self.copy()
        elif self._memory.device != current.device:
            array = empty(self._shape, self._dtype)
            copyto(array, self)
        copied = current.download(array._memory, array._offset, array.nbytes)
        return np.frombuffer(copied, self._dtype).reshape(self._shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError("an array of a device is on the host as a copy only")
        found = self.get()
        return found if dtype is None else found.astype(dtype, copy=False)

    def item(self, *index: int) -> Any:
        """One element as a Python scalar; waits."""
        return (self[index] if index else self).get().item()

    def tolist(self) -> Any:
        """Nested lists of Python scalars; waits."""
        return self.get().tolist()

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __complex__(self) -> complex:
        return complex(self.get())

    def __index__(self) -> int:
        return self.get().__index__()

    def __contains__(self, value: object) -> bool:
        return bool((self == value).any())

    def __repr__(self) -> str:
        if _stream.get() is None:  # for a debugger, which has none
            return f"<array of {self._dtype} with shape {self._shape} on {self.device}>"
        return f"{np.array_repr(self.get())[:-1]}, device={self.device})"

    def __str__(self) -> str:
        return str(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get().item(), spec) if spec else str(self)

    __hash__ = None  # type: ignore[assignment]

    # ---- NumPy's protocols ----------------------------------------------------------------

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        outs = kwargs.pop("out", None)
        outs = () if outs is None else outs
        _refuse_host_arrays(ufunc.__name__, (*inputs, *outs, *kwargs.values()))
        if any(out is not None and not isinstance(out, ndarray) for out in outs):
            raise TypeError(f"{ufunc.__name__}: out is no virtual array")
        function: Callable[..., Any] = ufunc if method == "__call__" else getattr(ufunc, method)
        if method == "at":
            _check_writable(inputs[0])
            _submit(function, *inputs, **kwargs)
            return None
        if method == "reduceat":
            raise TypeError(f"{ufunc.__name__}.reduceat is not supported on virtual arrays")
        if method in ("reduce", "accumulate") or ufunc.signature is not None:
            return _inferred(function, inputs, kwargs, outs, direct=True)
        shapes = [np.shape(one) for one in inputs]
        if method == "outer":
            shape: tuple[int, ...] = sum(shapes, ())
        else:
            where = kwargs.get("where", True)
            shape = np.broadcast_shapes(*shapes, np.shape(where))
        # Without elements NumPy computes nothing, and says which type comes out.
        nothing = [_nothing(one) for one in inputs]
        asked = {name: value for name, value in kwargs.items() if name != "where"}
        if outs:
            asked["out"] = tuple(_nothing(out) for out in outs)
        said = ufunc(*nothing, **asked)
        types = [one.dtype for one in (said if isinstance(said, tuple) else (said,))]
        results = _results([(shape, one) for one in types], outs)
        _submit(_call_into, function, inputs, kwargs, tuple(results))
        return tuple(results) if len(results) > 1 else results[0]

    def __array_function__(
        self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        own = _FUNCTIONS.get(func)
        if own is not None:
            return own(*args, **kwargs)
        if func not in _INFERRED:
            module = func.__module__
            raise TypeError(f"{module}.{func.__name__} is not supported on virtual arrays")
        out = kwargs.pop("out", None)
        _refuse_host_arrays(func.__name__, (*args, *kwargs.values(), out))
        return _inferred(func, args, kwargs, () if out is None else (out,), direct=False)

    # ---- elements -------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> ndarray:
        key = key if isinstance(key, tuple) else (key,)
        if _is_basic(key):
            if Ellipsis not in key:
                key = (*key, Ellipsis)  # so that an element is a view too
            return self._view(lambda shadow: shadow[key])
        shape = np.broadcast_to(np.empty((), np.int8), self._shape)[_index_proxy(key)].shape
        result = empty(shape, self._dtype)
        _submit(_take_into, self, key, result)
        return result

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(value, ndarray) and np.ndim(value):
            value = asarray(value, self._dtype if not hasattr(value, "dtype") else None)
        key = key if isinstance(key, tuple) else (key,)
        _check_writable(self)
        if not _is_basic(key):
            if not any(_is_mask(one) for one in key):
                whole = np.broadcast_to(np.empty((), np.int8), self._shape)
                _check_fits(np.shape(value), whole[_index_proxy(key)].shape)
            _submit(_set_items, self, key, value)
            return
        target = self[key]
        if isinstance(value, ndarray):
            if value._is(target):
                return  # the end of an assignment in place, such as a[0] += 1
            if _is_transfer(target, value):
                copyto(target, value)
                return
        _check_fits(np.shape(value), target._shape)
        _submit(_set_all, target, value)

    def fill(self, value: Any) -> None:
        """Sets every element."""
        self[...] = value

    def set(self, values: Any) -> None:
        """Copies an array of the host here, over the link."""
        self[...] = np.asarray(values)

    # ---- copies and views -----------------------------------------------------------------

    def copy(self, order: str = "C") -> ndarray:
        """A copy in memory of its own, in C order."""
        result = empty(self._shape, self._dtype)
        _submit(_set_all, result, self)
        return result

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        """A copy with elements of another type."""
        if not copy and np.dtype(dtype) == self._dtype:
            return self
        result = empty(self._shape, dtype)
        _submit(_set_all, result, self)
        return result

    def view(self, dtype: Any) -> ndarray:
        """The same bytes as elements of another type."""
        return self._view(lambda shadow: shadow.view(_dtype(dtype)))

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        """Other extents for the same elements in C order: a view where strides allow it."""
        if order != "C":
            raise TypeError("virtual arrays are reshaped in C order")
        wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        # Without strides there is nothing to copy, and NumPy says what -1 means.
        extents = np.broadcast_to(np.empty((), np.int8), self._shape).reshape(wanted).shape
        if self._is_contiguous():
            view = self._same(self._owner)
            view._shape, view._strides = extents, _contiguous(extents, self.itemsize)
            return view
        return self.copy().reshape(extents)

    def ravel(self) -> ndarray:
        """One axis: a view where strides allow it."""
        return self.reshape(-1)

    def flatten(self) -> ndarray:
        """A copy with one axis."""
        return self.copy().reshape(-1)

    def transpose(self, *axes: Any) -> ndarray:
        """The axes in another order, a view."""
        return self._view(lambda shadow: shadow.transpose(*axes))

    def swapaxes(self, first: int, second: int) -> ndarray:
        """Two axes change places, a view."""
        return self._view(lambda shadow: shadow.swapaxes(first, second))

    def squeeze(self, axis: Any = None) -> ndarray:
        """Without axes of extent one, a view."""
        return self._view(lambda shadow: shadow.squeeze(axis))

    def diagonal(self, offset: int = 0, axis1: int = 0, axis2: int = 1) -> ndarray:
        """The diagonal, a view."""
        return self._view(lambda shadow: shadow.diagonal(offset, axis1, axis2))

    def conj(self) -> ndarray:
        """The complex conjugates."""
        found: ndarray = np.conjugate(_any(self))
        return found

    conjugate = conj

    def sort(self, axis: int = -1) -> None:
        """Sorts in place."""
        self[...] = np.sort(_any(self), axis)

    def take(self, indices: Any, axis: int | None = None) -> ndarray:
        """Elements by their indices along an axis."""
        if axis is None:
            return self.ravel()[indices]
        axis = range(self.ndim)[axis]
        return self[(slice(None),) * axis + (_index(indices),)]


def _method(name: str) -> Callable[..., Any]:
    function = getattr(np, name)

    def method(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    method.__name__ = name
    method.__doc__ = f"``numpy.{name}`` of this array."
    return method


for _name in (
    *("all", "any", "argmax", "argmin", "argsort", "clip", "cumprod", "cumsum", "dot", "max"),
    *("mean", "min", "prod", "ptp", "round", "std", "sum", "trace", "var"),
):
    setattr(ndarray, _name, _method(_name))


# ---- operations -------------------------------------------------------------------------------


def _replace(tree: Any, change: Callable[[ndarray], Any]) -> Any:
    """The arguments with every virtual array in them changed, and those of the host copied, since
    they may change before they are used."""
    if isinstance(tree, ndarray):
        return change(tree)
    if isinstance(tree, np.ndarray):
        return tree.copy()
    if type(tree) in (tuple, list):
        return type(tree)(_replace(part, change) for part in tree)
    if type(tree) is dict:
        return {name: _replace(part, change) for name, part in tree.items()}
    return tree


def _check(array: ndarray) -> Stream:
    """The current stream, which is to reach the array.

    Raises:
        AccessError: a runtime checks, and the body that was lent the array has ended.
        DeviceError: it has no access to the array's memory.
    """
    if array._loan is not None:
        array._loan.check()
    current = current_stream()
    if not current.reaches(array._memory):
        raise DeviceError(
            f"{current} has no access to the memory of {array.device}: copy the array, or enable"
            " peer access"
        )
    return current


def _check_writable(array: Any) -> None:
    if isinstance(array, ndarray) and not array._writable:
        raise ValueError("the array is read-only: the task declares that it only reads it, ch.In")


def _submit(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Enqueues the call on the current stream, with arrays in place of virtual ones.

    Raises:
        DeviceError: an array is out of reach, or the device is lost.
    """
    current = current_stream()

    def borrow(array: ndarray) -> ndarray:
        _check(array)
        if array._owner is not None:
            array._owner.used_on(current)
        return array._borrowed()

    borrowed = _replace((args, kwargs), borrow)

    def operation() -> None:
        args, kwargs = _replace(borrowed, ndarray._on_device)
        with np.errstate(all="ignore"):
            function(*args, **kwargs)

    current.enqueue(operation)
    cost = _cost
    if cost is not None:
        arrays: list[ndarray] = []
        _replace((args, kwargs), arrays.append)
        known = args[0] if function in (_call_into, _copy_into) else function
        current.busy(cost(getattr(known, "__name__", "").removeprefix("_"), arrays))


def _call_into(function: Callable[..., Any], args: Any, kwargs: Any, outs: tuple[Any, ...]) -> None:
    function(*args, out=outs if len(outs) > 1 else outs[0], **kwargs)


def _copy_into(function: Callable[..., Any], args: Any, kwargs: Any, outs: tuple[Any, ...]) -> None:
    found = function(*args, **kwargs)
    parts = found if isinstance(found, (tuple, list)) else (found,)
    for out, part in zip(outs, parts, strict=True):
        if np.shape(part) != out.shape:
            raise ValueError(f"a result has the shape {np.shape(part)}, not {out.shape}")
        out[...] = part


def _set_all(target: Any, value: Any) -> None:
    target[...] = value


def _set_items(target: Any, key: Any, value: Any) -> None:
    target[key] = value


def _take_into(source: Any, key: Any, result: Any) -> None:
    result[...] = source[key]


def _results(
    specs: Sequence[tuple[tuple[int, ...], np.dtype[Any]]], outs: Sequence[ndarray | None]
) -> list[ndarray]:
    """Arrays for the results: those that are given, else new ones."""
    found = []
    for number, (shape, dtype) in enumerate(specs):
        out = outs[number] if number < len(outs) else None
        _check_writable(out)
        if out is None:
            out = empty(shape, dtype)
        elif np.broadcast_shapes(shape, out._shape) != out._shape:
            raise ValueError(f"out has the shape {out._shape}, the result {shape}")
        found.append(out)
    return found


def _inferred(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outs: Sequence[ndarray | None],
    *,
    direct: bool,
) -> Any:
    """Calls a function whose extents are those of its arguments."""
    extents: set[int] = set()
    _replace((args, kwargs), lambda array: extents.update(array._shape))
    large = sorted(extent for extent in extents if extent > 3)
    small = dict(zip(large, range(4, 4 + len(large)), strict=True))
    real = {mark: extent for extent, mark in small.items()}

    def stand_in(array: ndarray) -> np.ndarray[Any, Any]:
        shape = tuple(small.get(extent, extent) for extent in array._shape)
        if len(shape) < 2:
            return np.ones(shape, array._dtype)
        # Matrices that can be inverted, factorized and what else there is.
        return np.broadcast_to(1 + np.eye(shape[-2], shape[-1]), shape).astype(array._dtype)

    try:
        with np.errstate(all="ignore"):
            said = function(*_replace(args, stand_in), **_replace(kwargs, stand_in))
    except Exception as error:
        shapes: list[tuple[int, ...]] = []
        _replace((args, kwargs), lambda array: shapes.append(array._shape))
        error.add_note(f"The virtual arrays have the shapes {', '.join(map(str, shapes))}.")
        raise
    parts = said if isinstance(said, (tuple, list)) else (said,)
    specs = []
    for part in parts:
        shape = np.shape(part)
        if any(extent > 3 and extent not in real for extent in shape):
            name = getattr(function, "__name__", str(function))
            raise TypeError(f"{name}: the shape of the result is not one of virtual arrays")
        extents_ = tuple(real[extent] if extent > 3 else extent for extent in shape)
        specs.append((extents_, np.asarray(part).dtype))
    results = _results(specs, outs)
    into = _call_into if direct else _copy_into
    _submit(into, function, args, kwargs, tuple(results))
    if not isinstance(said, (tuple, list)):
        return results[0]
    return type(said)(*results) if hasattr(said, "_fields") else type(said)(results)


def _nothing(value: Any) -> Any:
    return np.empty(0, value._dtype) if isinstance(value, ndarray) else value


def _refuse_host_arrays(name: str, values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError(
                f"{name}: an array of the host among virtual ones; virtual.asarray copies it to the"
                " device"
            )
        if type(value) in (tuple, list):
            _refuse_host_arrays(name, value)


# ---- indices and shapes -----------------------------------------------------------------------


def _is_basic(key: tuple[Any, ...]) -> bool:
    return all(
        one is None
        or one is Ellipsis
        or isinstance(one, (slice, np.integer))
        or (isinstance(one, int) and not isinstance(one, bool))
        for one in key
    )


def _is_mask(one: Any) -> bool:
    return isinstance(one, ndarray) and one._dtype.kind == "b"


def _index(one: Any) -> Any:
    return one if isinstance(one, ndarray) else np.asarray(one)


def _index_proxy(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """The index with zeros for what only the device knows.

    Raises:
        TypeError: a mask, since what it selects depends on values.
    """
    found = []
    for one in key:
        if _is_mask(one):
            raise TypeError(
                "the shape of a selection by a mask depends on values: use where, or copy the mask"
                " to the host"
            )
        found.append(np.zeros(one._shape, one._dtype) if isinstance(one, ndarray) else one)
    return tuple(found)


def _is_transfer(target: ndarray, source: ndarray) -> bool:
    """Whether bytes go over a link as they are; else an operation reaches over it."""
    return (
        target._memory.device != source._memory.device
        and target._shape == source._shape
        and target._dtype == source._dtype
        and target._is_contiguous()
        and source._is_contiguous()
    )


def _check_fits(shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    while len(shape) > len(target) and shape[0] == 1:
        shape = shape[1:]
    if np.broadcast_shapes(shape, target) != target:
        raise ValueError(f"could not broadcast an array of shape {shape} into shape {target}")


def _dtype(said: Any) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(said)
    if found.hasobject:
        raise TypeError(f"{found} has Python objects, which have no place on a device")
    return found


def _shape(said: Shape) -> tuple[int, ...]:
    if isinstance(said, (int, np.integer)):
        said = (int(said),)
    shape = tuple(int(extent) for extent in said)
    if any(extent < 0 for extent in shape):
        raise ValueError("negative dimensions are not allowed")
    return shape


def _contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    stride = itemsize
    for extent in reversed(shape):
        strides.append(stride)
        stride *= max(extent, 1)
    return tuple(reversed(strides))


# ---- making arrays ----------------------------------------------------------------------------


def empty(shape: Shape, dtype: Any = float) -> ndarray:
    """A new array on the current stream's device; what is in it is garbage.

    Raises:
        OutOfDeviceMemoryError: there is no room.
    """
    found, kind = _shape(shape), _dtype(dtype)
    size = kind.itemsize
    for extent in found:
        size *= extent
    return ndarray(current_stream().allocate(max(size, 1)), found, kind)


def full(shape: Shape, fill_value: Any, dtype: Any = None) -> ndarray:
    """A new array with one value in all elements."""
    result = empty(shape, np.asarray(fill_value).dtype if dtype is None else dtype)
    _submit(_set_all, result, fill_value)
    return result


def zeros(shape: Shape, dtype: Any = float) -> ndarray:
    """A new array of zeros."""
    return full(shape, 0, dtype)


def ones(shape: Shape, dtype: Any = float) -> ndarray:
    """A new array of ones."""
    return full(shape, 1, dtype)


def asarray(values: Any, dtype: Any = None) -> ndarray:
    """The values on the current stream's device: copied over the link, unless they are a virtual
    array already. The array of the host may change as soon as this returns.

    Raises:
        OutOfDeviceMemoryError: there is no room.
        TypeError: the values are Python objects.
    """
    if isinstance(values, ndarray):
        return values if dtype is None else values.astype(dtype, copy=False)
    host = np.asarray(values, dtype, order="C")
    result = empty(host.shape, host.dtype)
    if host.size:
        bytes_ = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
        current_stream().upload(bytes_, result._memory, 0)
    return result


def array(values: Any, dtype: Any = None) -> ndarray:
    """The same as a copy, also of a virtual array."""
    if isinstance(values, ndarray):
        return values.astype(values._dtype if dtype is None else dtype)
    return asarray(values, dtype)


def asnumpy(values: Any) -> np.ndarray[Any, Any]:
    """The values on the host; waits for a virtual array."""
    return values.get() if isinstance(values, ndarray) else np.asarray(values)


def _made(host: np.ndarray[Any, Any]) -> ndarray:
    """What the device makes up by itself, without a copy over the link."""
    result = empty(host.shape, host.dtype)
    _submit(_set_all, result, host)
    return result


def arange(*args: Any, dtype: Any = None) -> ndarray:
    """As ``numpy.arange``."""
    return _made(np.arange(*args, dtype=dtype))


def linspace(start: Any, stop: Any, num: int = 50, **options: Any) -> ndarray:
    """As ``numpy.linspace``."""
    return _made(np.linspace(start, stop, num, **options))


def eye(N: int, M: int | None = None, k: int = 0, dtype: Any = float) -> ndarray:
    """As ``numpy.eye``."""
    return _made(np.eye(N, M, k, dtype))


def identity(n: int, dtype: Any = float) -> ndarray:
    """As ``numpy.identity``."""
    return eye(n, dtype=dtype)


def copyto(dst: Any, src: Any, casting: Any = "same_kind", where: Any = True) -> None:
    """Copies values, between devices and between host and device too; those take their link's time.

    Between devices the side that is not the current stream's is C-contiguous, and both have one
    shape and one type.

    Args:
        dst: where to.
        src: where from.
        casting: which changes of type are allowed.
        where: which elements; all of them between devices.

    Raises:
        DeviceError: the current stream's device has no access to the other's memory.
        TypeError: a change of type that ``casting`` does not allow.
        ValueError: shapes that do not fit.
    """
    _check_writable(dst)
    source_type = src._dtype if isinstance(src, ndarray) else np.asarray(src).dtype
    if not np.can_cast(source_type, dst.dtype, casting):
        raise TypeError(f"cannot cast from {source_type} to {dst.dtype} with casting={casting!r}")
    if not isinstance(dst, ndarray):
        np.copyto(dst, asnumpy(src), casting, asnumpy(where))
        return
    if not isinstance(src, ndarray) and np.ndim(src):
        src = asarray(src)
    if not isinstance(src, ndarray) or src._memory.device == dst._memory.device:
        _check_fits(np.shape(src), dst._shape)
        _submit(np.copyto, dst, src, casting, where)
        return
    if where is not True or src._shape != dst._shape or src._dtype != dst._dtype:
        raise ValueError("between devices whole arrays of one shape and one type are copied")
    current = current_stream()
    for side in (src, dst):
        _check(side)
        if side._owner is not None:
            side._owner.used_on(current)
        if side._memory.device != current.device and not side._is_contiguous():
            raise ValueError(
                f"what is copied from or to {side.device} is C-contiguous there: copy it first"
            )
    source = src if src._is_contiguous() else src.copy()
    target = dst if dst._is_contiguous() else empty(dst._shape, dst._dtype)
    if src.size:
        current.copy(source._memory, source._offset, target._memory, target._offset, src.nbytes)
    if target is not dst:
        _submit(_set_all, dst, target)


# ---- functions of NumPy that know virtual arrays ----------------------------------------------

_INFERRED: set[Any] = {
    getattr(np, name)
    for name in (
        *("all", "amax", "amin", "any", "argmax", "argmin", "argsort", "average", "clip"),
        *("count_nonzero", "cross", "cumprod", "cumsum", "dot", "einsum", "inner", "max", "mean"),
        *("median", "min", "nanmax", "nanmean", "nanmin", "nanprod", "nanstd"),
        *("nansum", "nanvar", "prod", "ptp", "roll", "round", "searchsorted", "sort"),
        *("std", "sum"),
        *("tensordot", "trace", "tril", "triu", "var", "vdot", "isclose"),
    )
} | {
    getattr(np.linalg, name)
    for name in (
        *("cholesky", "cond", "det", "eigh", "eigvalsh", "inv", "matrix_power", "matrix_rank"),
        *("multi_dot", "norm", "pinv", "qr", "slogdet", "solve", "svd"),
    )
}

_FUNCTIONS: dict[Any, Callable[..., Any]] = {}


def _knows(function: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(own: Callable[..., Any]) -> Callable[..., Any]:
        _FUNCTIONS[function] = own
        return own

    return register


def _views(function: Any) -> None:
    """A function that gives views of one array."""

    def call(a: ndarray, *args: Any, **kwargs: Any) -> Any:
        shadow = a._shadow()
        found = function(shadow, *args, **kwargs)
        if isinstance(found, (tuple, list)):
            return type(found)(a._at(part, shadow) for part in found)
        return a._at(found, shadow)

    _FUNCTIONS[function] = call


for _name in (
    *("array_split", "broadcast_to", "diagonal", "dsplit", "expand_dims", "flip", "fliplr"),
    *("flipud", "hsplit", "moveaxis", "rollaxis", "rot90", "split", "squeeze", "swapaxes"),
    *("transpose", "vsplit"),
):
    _views(getattr(np, _name))


def _like(make: Callable[..., ndarray], a: Any, *value: Any, dtype: Any, shape: Any) -> ndarray:
    kind = np.asarray(a).dtype if not isinstance(a, ndarray) else a._dtype
    return make(
        np.shape(a) if shape is None else shape, *value, dtype=kind if dtype is None else dtype
    )


@_knows(np.empty_like)
def _empty_like(
    prototype: Any, dtype: Any = None, order: str = "K", subok: bool = True, shape: Any = None
) -> ndarray:
    return _like(empty, prototype, dtype=dtype, shape=shape)


def _constant_like(function: Any, make: Callable[..., ndarray]) -> None:
    """A function that makes an array of one constant in the likeness of another."""

    def call(
        a: Any, dtype: Any = None, order: str = "K", subok: bool = True, shape: Any = None
    ) -> ndarray:
        return _like(make, a, dtype=dtype, shape=shape)

    _FUNCTIONS[function] = call


_constant_like(np.zeros_like, zeros)
_constant_like(np.ones_like, ones)


@_knows(np.full_like)
def _full_like(
    a: Any,
    fill_value: Any,
    dtype: Any = None,
    order: str = "K",
    subok: bool = True,
    shape: Any = None,
) -> ndarray:
    return _like(full, a, fill_value, dtype=dtype, shape=shape)


_knows(np.copyto)(copyto)
_knows(np.shape)(lambda a: a.shape)
_knows(np.ndim)(lambda a: a.ndim)
_knows(np.size)(lambda a, axis=None: a.size if axis is None else a.shape[axis])
_knows(np.real)(lambda val: val.real)
_knows(np.imag)(lambda val: val.imag)
_knows(np.ravel)(lambda a, order="C": a.ravel())
_knows(np.reshape)(lambda a, /, shape, order="C": a.reshape(shape, order=order))
_knows(np.copy)(lambda a, order="K", subok=False: a.copy())
_knows(np.take)(lambda a, indices, axis=None: a.take(indices, axis))
_knows(np.array_repr)(lambda arr, *args: repr(arr))
_knows(np.array_str)(lambda a, *args: str(a))
_knows(np.allclose)(lambda a, b, **options: bool(np.isclose(a, b, **options).all()))
_knows(np.result_type)(lambda *args: np.result_type(*map(_nothing, args)))
_knows(np.can_cast)(lambda from_, to, casting="safe": np.can_cast(_nothing(from_), to, casting))


@_knows(np.array_equal)
def _array_equal(a1: Any, a2: Any, equal_nan: bool = False) -> bool:
    if np.shape(a1) != np.shape(a2):
        return False
    same = a1 == a2
    return bool((same | (np.isnan(a1) & np.isnan(a2)) if equal_nan else same).all())


@_knows(np.diag)
def _diag(v: ndarray, k: int = 0) -> ndarray:
    if v.ndim == 2:
        return v.diagonal(k)
    if v.ndim != 1:
        raise ValueError("Input must be 1- or 2-d.")
    result = zeros((v.size + abs(k),) * 2, v._dtype)
    result.diagonal(k)[...] = v
    return result


@_knows(np.where)
def _where(condition: Any, *choices: Any) -> Any:
    if len(choices) != 2:
        raise TypeError("numpy.where with a condition alone has a shape that depends on values")
    _refuse_host_arrays("where", (condition, *choices))
    return _inferred(np.where, (condition, *choices), {}, (), direct=False)


@_knows(np.outer)
def _outer(a: Any, b: Any, out: ndarray | None = None) -> ndarray:
    left, right = (one.ravel() if isinstance(one, ndarray) else one for one in (a, b))
    found: ndarray = np.multiply.outer(_any(left), _any(right))
    if out is None:
        return found
    out[...] = found
    return out


@_knows(np.concatenate)
def _concatenate(
    arrays: Sequence[ndarray],
    axis: int | None = 0,
    out: ndarray | None = None,
    dtype: Any = None,
    casting: str = "same_kind",
) -> ndarray:
    _refuse_host_arrays("concatenate", arrays)
    parts = [asarray(part) for part in arrays]
    if axis is None:
        parts, axis = [part.ravel() for part in parts], 0
    if any(part.ndim == 0 for part in parts):
        raise ValueError("zero-dimensional arrays cannot be concatenated")
    # Empty along the axis, so that NumPy checks the rest and copies nothing.
    axis = range(parts[0].ndim)[axis]
    nothing = [
        np.empty((*part._shape[:axis], 0, *part._shape[axis + 1 :]), part._dtype) for part in parts
    ]
    said = np.concatenate(nothing, axis, dtype=dtype, casting=_any(casting))
    shape = list(said.shape)
    shape[axis] = sum(part._shape[axis] for part in parts)
    [result] = _results([(tuple(shape), said.dtype)], (out,))
    _submit(_concatenate_into, parts, axis, result, casting)
    return result


def _concatenate_into(parts: Any, axis: int, result: Any, casting: Any) -> None:
    np.concatenate(parts, axis, out=result, casting="unsafe")


@_knows(np.stack)
def _stack(arrays: Sequence[ndarray], axis: int = 0, **options: Any) -> ndarray:
    if len({part._shape for part in arrays}) != 1:
        raise ValueError("all input arrays must have the same shape")
    parts = [np.expand_dims(_any(part), axis) for part in arrays]
    joined: ndarray = _concatenate(parts, axis, **options)
    return joined


@_knows(np.atleast_1d)
def _atleast_1d(*arrays: ndarray) -> Any:
    found = [one.reshape(1) if one.ndim == 0 else one for one in arrays]
    return found[0] if len(found) == 1 else tuple(found)


@_knows(np.atleast_2d)
def _atleast_2d(*arrays: ndarray) -> Any:
    found = [
        one.reshape((1,) * (2 - one.ndim) + one.shape) if one.ndim < 2 else one for one in arrays
    ]
    return found[0] if len(found) == 1 else tuple(found)


@_knows(np.vstack)
def _vstack(tup: Sequence[ndarray], **options: Any) -> ndarray:
    joined: ndarray = _concatenate([_atleast_2d(part) for part in tup], 0, **options)
    return joined


@_knows(np.hstack)
def _hstack(tup: Sequence[ndarray], **options: Any) -> ndarray:
    parts = [_atleast_1d(part) for part in tup]
    joined: ndarray = _concatenate(parts, 0 if parts[0].ndim == 1 else 1, **options)
    return joined


def _transform(function: Any, axes: str) -> None:
    """A Fourier transform: extents are those of the argument, or those that are asked for."""
    name = function.__name__
    real, inverse = name.startswith(("rfft", "hfft", "irfft", "ihfft")), "i" in name[:2]

    def call(a: ndarray, *args: Any, **kwargs: Any) -> ndarray:
        _refuse_host_arrays(name, (*args, *kwargs.values()))
        shape = list(a._shape)
        names = ("n", "axis", "norm") if axes == "one" else ("s", "axes", "norm")
        said = dict(zip(names, args, strict=False)) | kwargs
        if said.pop("out", None) is not None:
            raise TypeError(f"{name}: out is not supported on virtual arrays")
        if axes == "one":
            along = [range(a.ndim)[said.get("axis", -1)]]
            extents = None if said.get("n") is None else [said["n"]]
        else:
            extents = said.get("s")
            chosen = said.get("axes", (-2, -1) if axes == "two" else None)
            if chosen is None:
                chosen = range(-(a.ndim if extents is None else len(extents)), 0)
            along = [range(a.ndim)[one] for one in chosen]
        for number, axis in enumerate(along):
            extent = shape[axis] if extents is None else extents[number]
            last = number == len(along) - 1
            if real and last and not inverse:
                extent = extent // 2 + 1
            elif real and last and extents is None:
                extent = 2 * (extent - 1)
            shape[axis] = extent
        with np.errstate(all="ignore"):
            said_type = function(np.ones((2,) * a.ndim, a._dtype), **said | _two(said)).dtype
        result = empty(shape, said_type)
        _submit(_copy_into, function, (a,), said, (result,))
        return result

    _FUNCTIONS[function] = call


def _two(said: dict[str, Any]) -> dict[str, Any]:
    """Extents of two for what is asked for, which the type does not depend on."""
    small: dict[str, Any] = {}
    if said.get("n") is not None:
        small["n"] = 2
    if said.get("s") is not None:
        small["s"] = [2] * len(said["s"])
    return small


for _name in ("fft", "ifft", "rfft", "irfft"):
    _transform(getattr(np.fft, _name), "one")
    _transform(getattr(np.fft, f"{_name}2"), "two")
    _transform(getattr(np.fft, f"{_name}n"), "all")
for _function in (np.fft.fftshift, np.fft.ifftshift):
    _INFERRED.add(_function)


# ---- the module as a namespace: what xp.name means --------------------------------------------

linalg = SimpleNamespace(
    LinAlgError=np.linalg.LinAlgError,
    **{one.__name__: one for one in _INFERRED if one.__module__ == "numpy.linalg"},
)
"""Linear algebra, as ``numpy.linalg``."""

fft = SimpleNamespace(
    **{
        one.__name__: one
        for one in (*_FUNCTIONS, *_INFERRED)
        if one.__module__ == "numpy.fft" and one is not None
    }
)
"""Fourier transforms, as ``numpy.fft``."""


class RandomGenerator:
    """Fills arrays with random numbers, on the device and in stream order.

    Args:
        seed: the same seed and the same calls on one stream give the same numbers.
    """

    def __init__(self, seed: Any = None) -> None:
        self._generator = np.random.default_rng(seed)

    def _fill(self, method: str, shape: Shape, kind: Any, *args: Any, **options: Any) -> ndarray:
        result = empty(shape, kind)
        draw = functools.partial(getattr(self._generator, method), *args, **options)
        _submit(_fill_with, draw, result)
        return result

    def random(self, size: Shape = (), dtype: Any = float) -> ndarray:
        """Uniform numbers from 0 to 1."""
        return self._fill("random", size, dtype, dtype=np.dtype(dtype))

    def standard_normal(self, size: Shape = (), dtype: Any = float) -> ndarray:
        """Normal numbers with mean 0 and deviation 1."""
        return self._fill("standard_normal", size, dtype, dtype=np.dtype(dtype))

    def normal(self, loc: float = 0.0, scale: float = 1.0, size: Shape = ()) -> ndarray:
        """Normal numbers."""
        return self._fill("normal", size, float, loc, scale)

    def uniform(self, low: float = 0.0, high: float = 1.0, size: Shape = ()) -> ndarray:
        """Uniform numbers."""
        return self._fill("uniform", size, float, low, high)

    def integers(
        self, low: int, high: int | None = None, size: Shape = (), dtype: Any = np.int64
    ) -> ndarray:
        """Whole numbers from ``low`` (or 0) up to and without ``high`` (or ``low``)."""
        return self._fill("integers", size, dtype, low, high, dtype=np.dtype(dtype))


def _fill_with(draw: Callable[..., Any], result: Any) -> None:
    result[...] = draw(size=result.shape)


random = SimpleNamespace(default_rng=RandomGenerator)
"""Random numbers, as ``numpy.random``."""


def __getattr__(name: str) -> Any:
    found = getattr(np, name, None)
    if (
        isinstance(found, (np.ufunc, np.dtype, float))
        or (isinstance(found, type) and issubclass(found, np.generic))
        or name in ("newaxis", "dtype", "finfo", "iinfo", "errstate")
        or (callable(found) and (found in _FUNCTIONS or found in _INFERRED))
    ):
        return found
    raise AttributeError(f"charioteer.virtual has no {name}: virtual arrays do not support it")
