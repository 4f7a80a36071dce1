"""One pool of memory for all libraries of a GPU: on request CuPy and PyTorch allocate from the
runtime's.

Protocol. The pool is the driver's, one a GPU, and lives as long as the process; so does the
request. CuPy calls :func:`_allocate` for memory, which owns it through a ``PoolMemory``. PyTorch
loads two functions of the compiled module by their names, and takes no other allocator once it has
begun to use one. In what order memory is given back, and to whom, is told in ``pool.rs`` of the
crate ``charioteer-cuda``.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Literal

from charioteer import _core
from charioteer.errors import DeviceError

__all__ = ["share_memory_pool"]

_LIBRARIES = ("cupy", "torch")
_lock = threading.Lock()
_sharing: set[str] = set()


def share_memory_pool(*libraries: Literal["cupy", "torch"]) -> None:
    """Lets CuPy and PyTorch allocate from the runtime's pool of each GPU, for as long as the
    process lives: what one gives back the other has next, and so has managed data.

    Call it before the libraries allocate on a GPU, and before a runtime is opened. What CuPy has in
    its own pool by then stays there; PyTorch refuses. Arrays outlive the runtime as before.
    PyTorch's figures of its allocator (``torch.cuda.memory_allocated`` and so on) and its captures
    of graphs need its own allocator; ``rt.stats()["devices"][gpu(0)]["library_memory"]`` says how
    many bytes libraries have of the pool. Where memory is short, CuPy's functions raise
    :class:`charioteer.OutOfDeviceMemoryError`, and PyTorch's a ``RuntimeError`` with its words.

    Args:
        libraries: ``"cupy"``, ``"torch"`` or both. They are imported.

    Raises:
        ValueError: no library, or one that has no part in this.
        ImportError: a library is not installed.
        DeviceError: there is no GPU of the CUDA driver, or PyTorch is of a version or in a state
            that takes no allocator.
    """
    for library in libraries:
        if library not in _LIBRARIES:
            raise ValueError(f'the pool can be shared with "cupy" and "torch", not {library!r}')
    if not libraries:
        raise ValueError('say which libraries are to share the pool: "cupy", "torch" or both')
    with _lock:
        for library in libraries:
            if library in _sharing:
                continue
            share = _share_with_cupy if library == "cupy" else _share_with_torch
            share()
            _sharing.add(library)


# ---- CuPy ---------------------------------------------------------------------------------------


def _share_with_cupy() -> None:
    import cupy

    _core.share_pool()
    cupy.cuda.set_allocator(_allocate)


def _allocate(size: int) -> Any:
    """CuPy's pointer to memory for its current stream."""
    from cupy import cuda

    if not size:
        return cuda.MemoryPointer(cuda.Memory(0), 0)
    device = cuda.runtime.getDevice()
    stream = cuda.get_current_stream()
    memory = _core.PoolMemory(device, size, stream.ptr, stream)
    return cuda.MemoryPointer(cuda.UnownedMemory(memory.address, size, memory, device), 0)


# ---- PyTorch ------------------------------------------------------------------------------------


def _share_with_torch() -> None:
    import torch

    if not torch.backends.cuda.is_built():
        raise DeviceError("this PyTorch was built without CUDA")
    check = _torch_check(torch)
    _core.share_pool()
    record = _core.share_pool_with_torch(check)
    path = _core.__file__
    assert path is not None
    allocator = torch.cuda.memory.CUDAPluggableAllocator(
        path, "charioteer_cuda_allocate", "charioteer_cuda_free"
    )
    inner: Any = allocator.allocator()
    inner.set_record_stream_fn(record)
    try:
        torch.cuda.memory.change_current_allocator(allocator)
    except RuntimeError as error:
        raise DeviceError(
            "PyTorch has begun to use an allocator: share the pool before anything of PyTorch is"
            f" on a GPU ({error})"
        ) from error


def _torch_check(torch: Any) -> int:
    """The address of PyTorch's function that throws its exception, see ``pool.rs``."""
    import ctypes

    path = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    try:
        function = ctypes.CDLL(path).aoti_torch_check
    except (OSError, AttributeError) as error:
        raise DeviceError(
            f"PyTorch {torch.__version__} has no way to be told that memory is short: {error}"
        ) from error
    return ctypes.cast(function, ctypes.c_void_p).value or 0
