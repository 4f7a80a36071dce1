"""What CuPy, PyTorch and Numba need to work on the runtime's streams, if they are imported.

Nothing is imported here for anybody: what is not in ``sys.modules`` is not there, and what is being
imported by another thread right now is not there yet. Streams are handles of the driver, which the
runtime owns; the libraries' objects for them are views.

Libraries are bits, so that the core can keep what it made for a set of them: :data:`CUPY`,
:data:`TORCH`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

CUPY = 1
TORCH = 2

_NAMES = {CUPY: "cupy", TORCH: "torch"}


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


def uses(handle: int, device: int, present: int) -> list[Callable[[], object]]:
    """What makes the stream current in those libraries, on a thread on which its device is."""
    calls: list[Callable[[], object]] = []
    if present & CUPY:
        calls.append(cupy_stream(handle).use)
    if present & TORCH:
        calls.append(_torch_use(handle, device))
    return calls


def _torch_use(handle: int, device: int) -> Callable[[], None]:
    import torch

    if not torch.cuda.is_initialized():
        torch.cuda.init()
    stream = torch_stream(handle, device)
    change: Any = functools.partial(torch.cuda.set_stream, stream)
    current: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if current is None:
        return change  # type: ignore[no-any-return]

    def use() -> None:
        # To look costs a tenth of what a change does.
        if current(device) != handle:
            change()

    return use


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
