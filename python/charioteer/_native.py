"""C functions as task functions: what ``ch.native`` accepts, and how it is read.

The compiled module converts arguments and calls the pointer (``native.rs``); here a function's
address is found, whatever library it comes from, and its parameters are translated for it.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from charioteer import _core, _pools
from charioteer._core import TaskFunction
from charioteer._futures import Tasks
from charioteer._modes import Mode, T, mode_of
from charioteer.devices import Placement

__all__ = ["native"]


_SCALARS = {
    "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8", "c8", "c16", "bool", "c1", "p",
}  # fmt: skip


def native(
    function: Any,
    params: Iterable[Any] = (),
    *,
    returns: str = "void",
    check: str | None = None,
    order: str = "C",
    name: str | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    timeout: float | None = None,
    retries: int | None = None,
) -> TaskFunction[..., Any]:
    """Makes a task function of a C function. Its bodies run without the GIL.

    Calling it converts the arguments at once and spawns; ``.fn`` calls the C function on the spot,
    with the GIL released. Handles among the arguments are dependencies, and their results are
    converted when the task runs. Arrays are passed without a copy and kept alive until the task is
    done. What the C function is told here is believed: a wrong parameter is what it is in C.

    Args:
        function: a C function of ``ctypes`` or cffi, a Numba ``cfunc``, a SciPy
            ``LowLevelCallable``, a ``PyCapsule``, or an address. It must not need the GIL.
        params: what it takes, in order:

            ==========================  =========================================================
            ``"i1"`` … ``"i8"``,        an integer of so many bytes, by value; out of range is an
            ``"u1"`` … ``"u8"``         error
            ``"f4"``, ``"f8"``          ``float``, ``double``
            ``"bool"``, ``"c1"``        ``bool``; ``char``, from one ASCII character
            ``"p"``                     a pointer, from an address or ``None``; whoever calls keeps
                                        alive what it points to
            ``"&i4"``, ``"&c16"``, …    a pointer to a copy of the argument, as Fortran wants it;
                                        ``"c8"`` and ``"c16"`` are ``complex``
            ``ch.In``                   a pointer to the data of an array: of NumPy, or of anything
                                        with a buffer or an ``__array_interface__``
            ``ch.Out``, ``ch.InOut``    the same; the array must be writable
            ``ch.In["f8"]``, …          the same, of that dtype; also ``ch.In[np.float64]``
            ``"*f8"``, ``"const *f8"``  the same as ``ch.InOut["f8"]`` and ``ch.In["f8"]``
            ``"info"``                  a pointer to an ``int`` that takes no argument: what LAPACK
                                        reports. Other than zero, the task fails
            ==========================  =========================================================
        returns: ``"void"``, or the code of what it returns by value, which is the task's result.
        check: ``"zero"``: it fails if it returns anything else. ``"errno"``: it fails if it returns
            -1 or a null pointer or, where it returns no integer, if it sets ``errno``.
        order: what arrays have to be in memory: ``"C"``- or ``"F"``-contiguous, ``"A"``, either, or
            ``"any"``, where the function learns the strides from other arguments.
        name: of the function, and of its tasks; unless said, its own, where the object knows it.
        dependencies: as for :func:`charioteer.task`, like all that follow.
        priority: the larger, the sooner.
        placement: the cores that a body takes.
        share: the part of a core that it takes.
        timeout: seconds that it may run. Nothing can end a C function from outside: the task fails
            when it returns.
        retries: how often it is called again after it failed.

    Raises:
        TypeError: not a C function, or one that needs the GIL; parameters of the wrong type.
        ValueError: a code that does not exist; a null pointer; a check that cannot be made; another
            number of parameters than the function itself declares.

    The task function raises ``TypeError`` and ``ValueError`` at the call for arguments that do not
    fit; its tasks fail with :class:`charioteer.NativeError`.
    """
    if isinstance(params, str):
        raise TypeError("params is a sequence of parameters: write params=(code,)")
    given = list(params)
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name is a string, not {type(name).__name__}: options() takes handles")
    address, called, declared = _find(function)
    called = called if name is None else name
    parameters = [_parameter(number, given) for number, given in enumerate(given, 1)]
    if declared is not None and declared != len(given):
        raise ValueError(
            f"{called} takes {declared} parameters by its own declaration, params has {len(given)}"
        )
    if not isinstance(returns, str):
        raise TypeError(f'returns is a code such as "i4", not {type(returns).__name__}')
    if check is not None and any(kind == "info" for kind, _ in parameters):
        raise ValueError('the parameter "info" is the check: there cannot be another one')
    signature = f"{called}({', '.join(_words(given))}) -> {returns}"
    made = _core.NativeFunction(
        called, address, function, parameters, order, returns, check, signature
    )
    task_function: TaskFunction[..., Any] = _core.task(
        made,
        dependencies=dependencies,
        priority=priority,
        placement=placement,
        share=share,
        timeout=timeout,
        retries=retries,
    )
    vars(task_function)["__doc__"] = signature
    # Its library may have brought a BLAS along, which bodies that never attach would not notice.
    _pools.refresh_limits()
    return task_function


def _parameter(number: int, given: object) -> tuple[str, str]:
    """A parameter as the compiled module wants it: its kind and its code."""
    if isinstance(given, str):
        if given == "info":
            return "info", ""
        for prefix, kind in (("const *", "in"), ("*", "inout"), ("&", "reference"), ("", "value")):
            if given.startswith(prefix):
                code = given.removeprefix(prefix)
                if code not in _SCALARS:
                    raise ValueError(f"params: parameter {number}: no code {given!r}")
                return kind, code
    mode, of = mode_of(given)
    if mode not in _KINDS:
        raise TypeError(
            f'params: parameter {number}: a code such as "f8", or ch.In, ch.Out or ch.InOut, not'
            f" {given!r}"
        )
    return _KINDS[mode], _dtype(number, of)


_KINDS = {Mode.IN: "in", Mode.OUT: "out", Mode.INOUT: "inout", Mode.COMMUTE: "commute"}


def _dtype(number: int, of: Any) -> str:
    """The code of the dtype in ``ch.In[…]``; empty where it says none."""
    import numpy as np  # only where needed: it takes longer than all of the package

    if of is T or of is Any or of is np.ndarray or typing.get_origin(of) is np.ndarray:
        return ""
    if isinstance(of, typing.ForwardRef):
        of = of.__forward_arg__
    try:
        dtype = np.dtype(of)
    except TypeError:
        raise TypeError(f"params: parameter {number}: {of!r} is no dtype") from None
    code = "bool" if dtype.kind == "b" else f"{dtype.kind}{dtype.itemsize}"
    if code not in _SCALARS or not dtype.isnative:
        raise ValueError(f"params: parameter {number}: C has no type for arrays of {dtype}")
    return code


def _words(params: list[Any]) -> Iterator[str]:
    for given in params:
        mode, of = mode_of(given)
        if mode is None:
            yield str(given)
        else:
            code = _dtype(0, of)
            yield f'{mode.value}["{code}"]' if code else mode.value


_Found = tuple[int, str, int | None]
"""An address, a name, and how many parameters the function declares, if it does."""


def _find(function: Any) -> _Found:
    """Where a function is, whatever it is an object of."""
    if isinstance(function, bool):
        raise TypeError("not a C function: bool")
    if isinstance(function, int):
        if function < 0:
            raise ValueError(f"not an address: {function}")
        return function, f"function_{function:#x}", None
    for find in (_in_ctypes, _in_cffi, _in_scipy, _in_capsule, _in_numba):
        found = find(function)
        if found is not None:
            return found
    if isinstance(function, (TaskFunction, _core.NativeFunction)):
        raise TypeError(f"{function!r} is a task function already: give it options with .options()")
    hint = ""
    if type(function).__module__ == "builtins" and callable(function):
        hint = (
            "; a function of a cffi library in API mode is given as ffi.addressof(lib, name)"
            if type(getattr(function, "__self__", None)).__name__ == "Lib"
            else "; a Python function is a task as it is"
        )
    raise TypeError(f"not a C function: {type(function).__name__}{hint}")


def _in_ctypes(function: Any) -> _Found | None:
    ctypes = sys.modules.get("ctypes")
    if ctypes is None or not isinstance(function, ctypes._CFuncPtr):
        return None
    called = getattr(function, "__name__", None) or type(function).__name__
    if function._flags_ & _FUNCFLAG_PYTHONAPI:
        raise TypeError(f"{called} needs the GIL, as all of ctypes.PyDLL and PYFUNCTYPE do")
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    argtypes = function.argtypes
    return address, called, None if argtypes is None else len(argtypes)


_FUNCFLAG_PYTHONAPI = 0x4


def _in_cffi(function: Any) -> _Found | None:
    backend = sys.modules.get("_cffi_backend")
    if backend is None or not isinstance(function, backend._CDataBase):
        return None
    ffi = backend.FFI()
    kind = ffi.typeof(function)
    if kind.kind == "pointer" and kind.item.kind == "function":
        kind = kind.item
    if kind.kind != "function":
        raise TypeError(f"not a C function: {function!r}")
    if kind.ellipsis:
        raise TypeError(f"not a function with a fixed number of parameters: {function!r}")
    address = int(ffi.cast("uintptr_t", function))
    # The object knows its type alone; the name that the library has for it is not kept.
    return address, f"function_{address:#x}", len(kind.args)


def _in_scipy(function: Any) -> _Found | None:
    module = sys.modules.get("scipy._lib._ccallback")
    if module is None or not isinstance(function, module.LowLevelCallable):
        return None
    if function.user_data is not None:
        raise ValueError(
            "a LowLevelCallable with user_data has one parameter more, which only its consumers"
            ' know how to fill: pass the data\'s address as a "p" and leave user_data out'
        )
    return _in_capsule(tuple.__getitem__(function, 0))


def _in_capsule(function: Any) -> _Found | None:
    if type(function).__name__ != "PyCapsule":
        return None
    address = capsule_address(function)
    return address, f"function_{address:#x}", None


def capsule_address(capsule: Any) -> int:
    """The pointer in a capsule, whatever its name."""
    import ctypes

    get_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
        ("PyCapsule_GetName", ctypes.pythonapi)
    )
    get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    address: int = get_pointer(capsule, get_name(capsule))
    return address


def _in_numba(function: Any) -> _Found | None:
    address = getattr(function, "address", None)
    if isinstance(function, type) or not isinstance(address, int):
        return None
    signature = getattr(function, "_sig", None)
    declared = None if signature is None else len(signature.args)
    called = getattr(function, "native_name", None) or getattr(function, "__name__", None)
    return address, str(called or f"function_{address:#x}"), declared
