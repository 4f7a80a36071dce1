"""What CuPy, PyTorch and Numba need to work on the runtime's streams, if they are imported; and the
arrays that bodies get for regions.

For a region CuPy is imported where it is installed, unless the task asks for other arrays: the body
would import it. Else nothing is imported here for anybody: what is not in ``sys.modules`` is not
there, and what is being imported by another thread right now is not there yet. Streams are handles
of the driver, which the runtime owns; the libraries' objects for them are views.

Libraries are bits, so that the core can keep what it made for a set of them: :data:`CUPY`,
:data:`TORCH`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from charioteer import _core

if TYPE_CHECKING:
    import numpy as np

CUPY = 1
TORCH = 2

_NAMES = {CUPY: "cupy", TORCH: "torch"}

_Use = tuple[Callable[[int], object], int, object, Callable[[], object]]
"""What gives a library's current stream, the device that it is called with, what it gives when the
stream is that one, and what makes it so."""


def _module(name: str) -> ModuleType | None:
    """The module, if it is there as a whole."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return None if getattr(spec, "_initializing", False) else module


def libraries() -> tuple[int, bool]:
    """Which libraries are there, as bits, and whether none of them is just being imported."""
    found, ready = 0, True
    for bit, name in _NAMES.items():
        if _module(name) is not None:
            found |= bit
        elif name in sys.modules:
            ready = False
    if found & TORCH and not _torch_has_cuda():
        found &= ~TORCH
    return found, ready


def _torch_has_cuda() -> bool:
    torch = sys.modules["torch"]
    return torch.backends.cuda.is_built() and hasattr(torch._C, "_cuda_setStream")


class _Handle:
    """A handle by the CUDA stream protocol."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


def cupy_stream(handle: int) -> Any:
    """The stream for CuPy."""
    import cupy

    # What came before it is deprecated where this is.
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Handle(handle))
    return cupy.cuda.ExternalStream(handle)


def torch_stream(handle: int, device: int) -> Any:
    """The stream for PyTorch."""
    import torch

    return torch.cuda.ExternalStream(handle, device=device)


def numba_stream(handle: int) -> Any:
    """The stream for Numba."""
    from numba import cuda

    return cuda.external_stream(handle)


def uses(handle: int, device: int, present: int) -> list[_Use]:
    """What makes the stream current in those libraries, on a thread on which its device is."""
    uses: list[_Use] = []
    if present & CUPY:
        cupy: Any = sys.modules["cupy"]
        stream = cupy_stream(handle)
        uses.append((cupy.cuda.get_current_stream, device, stream, stream.use))
    if present & TORCH:
        uses.append(_torch_use(handle, device))
    return uses


def _torch_use(handle: int, device: int) -> _Use:
    import torch

    if not torch.cuda.is_initialized():
        torch.cuda.init()
    stream = torch_stream(handle, device)
    change: Any = functools.partial(torch.cuda.set_stream, stream)
    current: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if current is None:
        return torch.cuda.current_stream, device, stream, change
    return current, device, handle, change


def reset(devices: list[int]) -> None:
    """Makes the libraries' default streams of those devices current again, and the first device."""
    present, _ = libraries()
    if present & CUPY:
        cupy: Any = sys.modules["cupy"]
        for device in devices:
            # On a device that is lost nothing is current any more.
            with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError), cupy.cuda.Device(device):
                cupy.cuda.Stream.null.use()
        with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
            cupy.cuda.runtime.setDevice(0)
    if present & TORCH:
        torch: Any = sys.modules["torch"]
        lost = getattr(torch, "AcceleratorError", RuntimeError)
        for device in devices:
            with contextlib.suppress(lost):
                torch.cuda.set_stream(torch.cuda.default_stream(device))
        with contextlib.suppress(lost):
            torch.cuda.set_device(0)


def restorer(devices: list[int]) -> Callable[[], None]:
    """Makes current again what is now on those devices, on a thread that is not the runtime's."""
    present, _ = libraries()
    calls: list[Callable[[], object]] = []
    if present & CUPY:
        cupy: Any = sys.modules["cupy"]
        before = cupy.cuda.runtime.getDevice()
        for device in devices:
            calls.append(functools.partial(cupy.cuda.runtime.setDevice, device))
            calls.append(cupy.cuda.get_current_stream(device).use)
        calls.append(functools.partial(cupy.cuda.runtime.setDevice, before))
    if present & TORCH:
        torch: Any = sys.modules["torch"]
        now = torch.cuda.current_device()
        for device in devices:
            stream = torch.cuda.current_stream(device)
            calls.append(functools.partial(torch.cuda.set_stream, stream))
        calls.append(functools.partial(torch.cuda.set_device, now))

    def restore() -> None:
        for call in calls:
            call()

    return restore


_warned: dict[Any, Any] = {}
"""The texts that were shown."""


def warn_of_default_stream(task: str, device: str) -> None:
    """Warns that work was left on the default stream of a device when a body ended."""
    import warnings

    from charioteer.errors import StreamWarning

    # Without its index: the same text is shown once.
    function = task.split("[", 1)[0]
    warnings.warn_explicit(
        f"work is left on the legacy default stream of {device} by the end of {function}, where no"
        " task waits for it: launch it on ctx.stream, for Numba kernel[grid, block,"
        " ctx.stream.numba]; or it is of another thread, which used that stream meanwhile",
        StreamWarning,
        filename="<charioteer>",
        lineno=1,
        registry=_warned,
    )


# ---- the arrays of regions --------------------------------------------------------------------


@functools.cache
def default_library() -> str:
    """Whose arrays a body gets that does not say."""
    from importlib.util import find_spec

    return "none" if find_spec("cupy") is None else "cupy"


class DeviceArray:
    """Memory of a GPU as an array: for other libraries, which take it without a copy by
    ``__cuda_array_interface__`` or ``__dlpack__``. It computes nothing.

    Args:
        address: of its first element.
        shape: its extents.
        dtype: the type of its elements.
        strides: bytes from one element to the next along each axis.
        device: the number of the GPU.
        writable: whether it may be written.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...],
        device: int,
        writable: bool,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.strides = strides
        self.device = device
        self._address = address
        self._writable = writable

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3. A library that works on another stream waits for the task's."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "data": (self._address, not self._writable),
            "strides": self.strides,
            "version": 3,
            "stream": _task_handle(),
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """A GPU of CUDA, and its number."""
        return _DLPACK_CUDA, self.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """The memory itself. A stream that is not the task's finds its work done: the host waits
        for it.

        Raises:
            BufferError: for another device, a copy, or a type of elements that DLPack has not.
        """
        if copy or (dl_device is not None and dl_device != self.__dlpack_device__()):
            raise BufferError("the memory is on its device, and is given without a copy")
        item = self.dtype.itemsize
        code = _DLPACK_CODES.get(self.dtype.kind)
        if code is None or any(stride % item for stride in self.strides):
            raise BufferError(f"DLPack has no arrays of {self.dtype} with strides {self.strides}")
        if stream != -1 and stream != _task_handle():
            _core.current_context().stream.synchronize()
        strides = [stride // item for stride in self.strides]
        kind = (code, 8 * item)
        return _core.dlpack(self._address, self.device, kind, list(self.shape), strides)

    def __repr__(self) -> str:
        return f"<array of {self.dtype} with shape {self.shape} on gpu({self.device})>"


_DLPACK_CUDA = 2
_DLPACK_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}


def _task_handle() -> int | None:
    """The stream of the task that runs here, if one does."""
    from charioteer.errors import NoRuntimeError

    with contextlib.suppress(NoRuntimeError, RuntimeError):
        stream: Any = _core.current_context().stream
        handle: int = stream.handle
        return handle
    return None


def managed(
    library: Literal["cupy", "torch", "none"] | None,
    device: int,
    memory: tuple[int, int, int],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    strides: tuple[int, ...],
    writable: bool,
) -> Any:
    """What a body gets for a region; the device that is current stays so.

    Args:
        library: whose array; ``None`` for that of :func:`default_library`.
        device: the number of the GPU.
        memory: where the memory begins, how long it is, and where in it the first element is.
        shape: the extents.
        dtype: the type of the elements.
        strides: bytes from one element to the next along each axis.
        writable: whether the body may write; CuPy and PyTorch do not know the difference.

    Raises:
        ImportError: the library is not installed.
        TypeError: it has no elements of that type.
    """
    address, size, offset = memory
    name = library or default_library()
    if name == "cupy":
        import cupy

        if not size:
            with cupy.cuda.Device(device):
                return cupy.empty(shape, dtype)
        unowned = cupy.cuda.UnownedMemory(address, size, None, device)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(unowned, offset), strides)
    if name == "torch":
        import torch

        plain = DeviceArray(address + offset, shape, dtype, strides, device, True)
        if not size:
            kind = torch.from_numpy(_empty(dtype)).dtype
            return torch.empty(shape, dtype=kind, device=f"cuda:{device}")
        return torch.as_tensor(plain, device=f"cuda:{device}")
    return DeviceArray(address + offset, shape, dtype, strides, device, writable)


def _empty(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.empty(0, dtype)


def downloaded(x: Any) -> np.ndarray[Any, Any]:
    """A copy on the host of an array that another library has on a device, behind all that is on
    that library's current stream.

    Raises:
        TypeError: neither CuPy nor PyTorch is installed, which could copy it.
    """
    if _module("torch") is not None:
        torch: Any = sys.modules["torch"]
        if isinstance(x, torch.Tensor):
            found: np.ndarray[Any, Any] = x.detach().cpu().numpy()
            return found
    try:
        import cupy
    except ImportError:
        raise TypeError(
            f"{type(x).__name__} is on a device, and there is no CuPy to copy it from there"
        ) from None
    with cupy.cuda.Device(_device_of(x)):
        copied: np.ndarray[Any, Any] = cupy.asnumpy(cupy.asarray(x))
    return copied


def _device_of(x: Any) -> int:
    import cupy

    address = x.__cuda_array_interface__["data"][0]
    if not address:
        current: int = cupy.cuda.runtime.getDevice()
        return current
    found: int = cupy.cuda.runtime.pointerGetAttributes(address).device
    return found
