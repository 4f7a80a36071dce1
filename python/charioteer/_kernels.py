"""Kernels of GPUs as task functions: what ``ch.kernel`` accepts, and how it is read.

The compiled module converts arguments and launches (``launches.rs``); here is found what a kernel
is on a GPU, whatever it came from. That is asked for once a compute capability, when the first task
is spawned in a runtime with such a GPU: a source is compiled then (``_nvrtc.py``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from charioteer import _core
from charioteer._core import Kernel
from charioteer._futures import Tasks
from charioteer._modes import mode_of
from charioteer._native import _KINDS, _SCALARS, _dtype, _words
from charioteer.devices import Placement, gpu

__all__ = ["kernel"]

_Given: TypeAlias = tuple[str, Any, str]
"""What a kernel is on a GPU: ``"image"``, bytes for the driver and the function's name in them;
``"kernel"`` or ``"function"``, a handle of the driver's."""

_Provide: TypeAlias = Callable[[int, int, int], _Given]
"""Gives it, from the compute capability, major and minor, and the driver's number of the GPU."""

_Parameter: TypeAlias = tuple[str, str, int | None]

_CODES = _SCALARS - {"c1"}


def kernel(
    code: Any,
    name: str | None = None,
    params: Iterable[Any] | None = None,
    *,
    options: Sequence[str] = (),
    strided: bool = False,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement = gpu,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Any = None,
    size: Any = None,
    timeout: float | None = None,
    retries: int | None = None,
) -> Kernel:
    """Makes a kernel whose launches are tasks: ``k[grid, block](...)`` spawns one.

    ``k[grid, block]`` and ``k[grid, block, shared]`` are task functions, with ``.options`` like any
    other; ``.fn`` puts the kernel on the stream of a task whose body calls it. Arguments are
    converted at the call, and kept alive until the device has used them. The launch takes no GIL,
    and no other library. Handles among the arguments are dependencies.

    Args:
        code: CUDA C++ source, PTX, a cubin or a fat binary, as text, bytes or the path of a file; a
            ``RawKernel`` of CuPy, a kernel or an ``ObjectCode`` of ``cuda.core``, or a kernel of
            Numba that was compiled for one signature.
        name: of the kernel: needed for source, images and an ``ObjectCode``. A C++ name such as
            ``"axpy<float>"`` says which instance of a template it is.
        params: what it takes, in order, as for :func:`charioteer.native`: ``"i4"``, ``"f8"``,
            ``"c16"`` and so on by value, ``"p"`` for an address or ``None``, ``ch.In``, ``ch.Out``,
            ``ch.InOut``, ``"*f8"`` or ``"const *f8"`` for the data of an array on the GPU: a region
            of a managed array, which is ordered and brought there, or an array of CuPy, PyTorch, or
            anything with a ``__cuda_array_interface__``, which is not. Left out it is nothing, and
            for a kernel of Numba what its signature says.
        options: of the compiler, such as ``("-std=c++17",)``.
        strided: an array need not be C-contiguous, and is passed as its address, its extents and
            its strides in bytes, a parameter of 64 bits each: for a matrix
            ``(double* x, long long rows, long long columns, long long row, long long column)``.
        dependencies: as for :func:`charioteer.task`, like all that follow.
        priority: the larger, the sooner.
        placement: the GPU that a launch runs on, ``gpu`` unless said.
        share: the part of the GPU that it takes.
        memory: what it allocates there.
        cost: seconds that it runs, where something is chosen.
        size: what run times are told apart by.
        timeout: seconds that a launch may take; the kernel itself is not stopped.
        retries: how often a launch that was refused is tried again.

    Raises:
        TypeError: no kernel, or parameters of the wrong type.
        ValueError: a code that does not exist, or an image of no known format.
        OSError: a file that cannot be read.

    The call that spawns raises :class:`charioteer.KernelError` if the code cannot be compiled or
    loaded, :class:`charioteer.PlacementError` where there is no GPU of the CUDA driver, and
    ``TypeError`` and ``ValueError`` for arguments that do not fit. A task fails with
    ``KernelError`` if the driver refuses the launch, and with
    :class:`charioteer.DeviceLostError` if the kernel faults.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name is a string, not {type(name).__name__}: options() takes handles")
    if isinstance(params, str):
        raise TypeError("params is a sequence of parameters: write params=(code,)")
    if isinstance(options, str):
        raise TypeError("options is a sequence of strings: write options=(option,)")
    given = None if params is None else list(params)
    layout = "strided" if strided else "pointer"
    if (numba := _numba(code)) is not None:
        if strided:
            raise TypeError("kernels of Numba get extents and strides anyway")
        called, provide, parameters = _of_numba(numba, name, given)
        layout = "numba"
    else:
        called, provide = _of(code, name, tuple(options))
        parameters = [_parameter(number, one) for number, one in enumerate(given or [], 1)]
    words = [kind if not axes else f"{kind}({axes})" for kind, _, axes in parameters]
    shown = ", ".join(_words(given) if given is not None else words)
    return _core.Kernel(
        called,
        provide,
        parameters,
        layout,
        f"{called}({shown})",
        dependencies=dependencies,
        priority=priority,
        placement=placement,
        share=share,
        memory=memory,
        cost=cost,
        size=size,
        timeout=timeout,
        retries=retries,
    )


def _parameter(number: int, given: object) -> _Parameter:
    """A parameter as the compiled module wants it: its kind, its code, its number of axes."""
    if isinstance(given, str):
        for prefix, kind in (("const *", "in"), ("*", "inout"), ("", "value")):
            if given.startswith(prefix):
                code = given.removeprefix(prefix)
                if code not in _CODES or (prefix and code == "p"):
                    raise ValueError(f"params: parameter {number}: kernels take no {given!r}")
                return kind, code, None
    mode, of = mode_of(given)
    if mode not in _KINDS:
        raise TypeError(
            f'params: parameter {number}: a code such as "f8", or ch.In, ch.Out or ch.InOut, not'
            f" {given!r}"
        )
    return _KINDS[mode], _dtype(number, of), None


def _of(code: Any, name: str | None, options: tuple[str, ...]) -> tuple[str, _Provide]:
    """The name of a kernel, and what says where it is."""
    if isinstance(code, os.PathLike):
        with open(code, "rb") as file:
            code = file.read()
    if isinstance(code, (bytearray, memoryview)):
        code = bytes(code)
    if isinstance(code, bytes) and not code.startswith(_IMAGES):
        try:
            code = code.decode()
        except UnicodeDecodeError:
            raise ValueError("the bytes are no cubin, fat binary, PTX or source") from None
    if isinstance(code, str):
        named = _named(name, "a source or PTX")
        if _is_ptx(code):
            image = code.encode()
            return named, lambda *_: ("image", image, named)
        source = code

        def compiled(major: int, minor: int, _: int) -> _Given:
            from charioteer._nvrtc import compile_source

            return "image", *compile_source(named, source, options, (major, minor))

        return named, compiled
    if options:
        raise TypeError("options are the compiler's, and this kernel is compiled")
    if isinstance(code, bytes):
        named, image = _named(name, "an image"), code
        return named, lambda *_: ("image", image, named)
    for find in (_in_cupy, _in_cuda_core):
        found = find(code, name)
        if found is not None:
            return found
    raise TypeError(
        f"not a kernel: {type(code).__name__}; ch.native takes C functions, ch.task Python's"
    )


_IMAGES = (b"\x7fELF", b"\x50\xed\x55\xba")
"""How cubins and fat binaries begin."""


def _named(name: str | None, what: str) -> str:
    if not name:
        raise TypeError(f"{what} may have several kernels: say the name of this one")
    return name


def _is_ptx(code: str) -> bool:
    lines = (line.strip() for line in code.splitlines())
    first = next((line for line in lines if line and not line.startswith("//")), "")
    return first.startswith(".version")


def _is(thing: object, package: str, name: str) -> bool:
    """Whether an object is of a class of that name in a package that may not be imported."""
    return any(
        one.__name__ == name and one.__module__.split(".", 1)[0] == package
        for one in type(thing).__mro__
    )


def _in_cupy(code: Any, name: str | None) -> tuple[str, _Provide] | None:
    if not _is(code, "cupy", "RawKernel"):
        return None
    if code.enable_cooperative_groups:
        raise TypeError("the kernel wants a cooperative launch, which a task does not make")

    def handle(major: int, minor: int, index: int) -> _Given:
        import cupy

        with cupy.cuda.Device(index):
            return "function", code.kernel.ptr, code.name

    return name or code.name, handle


def _in_cuda_core(code: Any, name: str | None) -> tuple[str, _Provide] | None:
    if _is(code, "cuda", "ObjectCode"):
        named = _named(name, "an ObjectCode")
        code = code.get_kernel(named)
    elif not _is(code, "cuda", "Kernel"):
        return None
    handle = getattr(code, "handle", None) or code._handle

    # The object keeps what the handle names.
    def adopt(major: int, minor: int, index: int, kept: Any = code) -> _Given:
        return "kernel", int(handle), name or "kernel"

    return name or "kernel", adopt


def _numba(code: Any) -> Any:
    """Numba's compiled kernel, if it is one.

    Raises:
        TypeError: it was compiled for no signature, or for several.
    """
    if not any(_is(code, package, "CUDADispatcher") for package in ("numba", "numba_cuda")):
        return None
    compiled = list(code.overloads.values())
    if len(compiled) != 1:
        raise TypeError(
            f"the kernel of Numba is compiled for {len(compiled)} signatures: give it one,"
            ' @cuda.jit("void(float64[:], float64)"), or several kernels'
        )
    return compiled[0]


def _of_numba(
    compiled: Any, name: str | None, given: list[Any] | None
) -> tuple[str, _Provide, list[_Parameter]]:
    library = compiled._codelibrary
    entry = compiled.entry_name
    types = compiled.argument_types
    if given is not None and len(given) != len(types):
        raise ValueError(f"the kernel takes {len(types)} parameters, params has {len(given)}")
    parameters = []
    for number, kind in enumerate(types):
        said = None if given is None else _parameter(number + 1, given[number])
        parameters.append(_numba_parameter(number + 1, kind, said))

    def image(major: int, minor: int, _: int) -> _Given:
        cubin = library.get_cubin(cc=(major, minor))
        return "image", bytes(getattr(cubin, "code", cubin)), entry

    return name or compiled.py_func.__name__, image, parameters


def _numba_parameter(number: int, kind: Any, said: _Parameter | None) -> _Parameter:
    from numba import types

    if isinstance(kind, types.Array):
        code = _numba_code(number, kind.dtype)
        mode = "inout" if said is None or said[0] == "value" else said[0]
        found: _Parameter = mode, code, kind.ndim
    else:
        found = "value", _numba_code(number, kind), None
    if said is not None and (said[0] == "value") != (found[0] == "value"):
        raise ValueError(f"params: parameter {number} is {kind} by the kernel's signature")
    if said is not None and said[1] not in ("", found[1]):
        raise ValueError(f"params: parameter {number} is {kind} by the kernel's signature")
    return found


def _numba_code(number: int, kind: Any) -> str:
    from numba import types

    if isinstance(kind, types.Boolean):
        return "bool"
    if isinstance(kind, types.Integer):
        return f"{'i' if kind.signed else 'u'}{kind.bitwidth // 8}"
    if isinstance(kind, types.Float) and kind.bitwidth >= 32:
        return f"f{kind.bitwidth // 8}"
    raise TypeError(f"parameter {number} of the kernel of Numba is {kind}, which tasks do not pass")


def torch_code(dtype: Any) -> str:
    """The code of a dtype of PyTorch's; empty where C has no such type."""
    torch = sys.modules["torch"]
    if not _TORCH:
        _TORCH.update(
            {
                torch.bool: "bool",
                torch.int8: "i1",
                torch.int16: "i2",
                torch.int32: "i4",
                torch.int64: "i8",
                torch.uint8: "u1",
                torch.float32: "f4",
                torch.float64: "f8",
                torch.complex64: "c8",
                torch.complex128: "c16",
            }
        )
    return _TORCH.get(dtype, "")


_TORCH: dict[Any, str] = {}
