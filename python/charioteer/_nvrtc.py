"""NVRTC, the compiler of CUDA C++ as a library, where it is.

It is looked for when the first source is compiled: in the process, which other libraries may have
brought it to, in NVIDIA's packages beside this one, in the system's library path and in a toolkit.
Of several the first one is taken that is not newer than the driver, whose code the driver would
refuse to load. No GPU is needed to compile.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from charioteer.errors import KernelError

__all__ = ["compile_source"]

_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
_INVALID_OPTION = 5


class _Compiler(NamedTuple):
    library: ctypes.CDLL
    version: tuple[int, int]
    headers: tuple[str, ...]
    """Folders with CUDA's own headers."""


def compile_source(
    name: str, source: str, options: Sequence[str], capability: tuple[int, int]
) -> tuple[bytes, str]:
    """Compiles CUDA C++ for GPUs of a compute capability.

    Args:
        name: of the kernel: a function's, or a C++ name such as ``axpy<float>``.
        source: the source.
        options: of the compiler.
        capability: major and minor.

    Returns:
        an image that the driver loads, and the kernel's name in it.

    Raises:
        KernelError: there is no compiler, or it says why it does not compile the source.
    """
    compiler = _find()
    if compiler is None:
        raise KernelError(
            name,
            "NVRTC, which compiles CUDA C++, is not found: install the package nvidia-cuda-nvrtc,"
            " or pass a cubin or PTX",
        )
    program = ctypes.c_void_p()
    nvrtc = compiler.library
    _check(
        name,
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None
        ),
    )
    try:
        _check(name, nvrtc, nvrtc.nvrtcAddNameExpression(program, name.encode()))
        given = [*options, *(f"-I{folder}" for folder in compiler.headers)]
        arch = f"{capability[0]}{capability[1]}"
        said = _run(nvrtc, program, [f"--gpu-architecture=sm_{arch}", *given])
        kind = "CUBIN"
        if said == _INVALID_OPTION and (newest := _newest(nvrtc)) < int(arch):
            # A GPU that is newer than the compiler: the driver compiles the rest of the way.
            said = _run(nvrtc, program, [f"--gpu-architecture=compute_{newest}", *given])
            kind = "PTX"
        if said:
            log = _get(nvrtc, program, "ProgramLog").decode(errors="replace").strip("\0\n ")
            raise KernelError(name, log or _error(nvrtc, said))
        lowered = ctypes.c_char_p()
        _check(
            name,
            nvrtc,
            nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(lowered)),
        )
        entry = (lowered.value or name.encode()).decode()
        return _get(nvrtc, program, kind), entry
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _run(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, options: list[str]) -> int:
    encoded = [option.encode() for option in options]
    array = (ctypes.c_char_p * len(encoded))(*encoded)
    return int(nvrtc.nvrtcCompileProgram(program, len(encoded), array))


def _get(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _newest(nvrtc: ctypes.CDLL) -> int:
    """The newest architecture that the compiler knows, such as 90."""
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    archs = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(archs)
    return max(archs, default=0)


def _error(nvrtc: ctypes.CDLL, said: int) -> str:
    text: bytes = nvrtc.nvrtcGetErrorString(said)
    return text.decode()


def _check(name: str, nvrtc: ctypes.CDLL, said: int) -> None:
    if said:
        raise KernelError(name, _error(nvrtc, said))


@functools.cache
def _find() -> _Compiler | None:
    driver = _driver_major()
    spare: _Compiler | None = None
    for path in _candidates():
        try:
            nvrtc = ctypes.CDLL(path)
            major, minor = ctypes.c_int(), ctypes.c_int()
            if nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)):
                continue
        except (OSError, AttributeError):
            continue
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        found = _Compiler(nvrtc, (major.value, minor.value), tuple(_headers(path)))
        if driver is None or found.version[0] <= driver:
            return found
        spare = spare or found
    return spare


def _driver_major() -> int | None:
    """The major version of CUDA that the driver has, if there is one."""
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000


def _candidates() -> Iterator[str]:
    # What the process has already costs nothing, and is what its other libraries use.
    for name in _NAMES:
        try:
            ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            continue
        yield name
    for folder in sys.path:
        for pattern in ("cu[0-9]*", "cuda_nvrtc"):
            found = glob.glob(os.path.join(glob.escape(folder), "nvidia", pattern, "lib", _NAME))
            yield from sorted(found, reverse=True)
    yield from _NAMES
    for home in _homes():
        yield from sorted(glob.glob(os.path.join(home, "lib64", _NAME)), reverse=True)


_NAME = "libnvrtc.so.[0-9][0-9]"


def _homes() -> Iterator[str]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield home
    yield "/usr/local/cuda"


def _headers(path: str) -> Iterator[str]:
    """Folders with the headers that came with the compiler, or a toolkit's."""
    folders = [os.path.join(home, "include") for home in _homes()]
    if os.path.dirname(path):
        beside = os.path.dirname(os.path.dirname(os.path.realpath(path)))
        runtime = os.path.join(os.path.dirname(beside), "cuda_runtime", "include")
        folders = [os.path.join(beside, "include"), runtime, *folders]
    for folder in folders:
        if os.path.exists(os.path.join(folder, "cuda_fp16.h")):
            yield folder
            return
