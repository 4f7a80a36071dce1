"""Arrays that other libraries have on a device, taken over without a copy.

Protocol. An array says where its memory is, and on which stream it may still be used, by
``__cuda_array_interface__`` or by DLPack; one of :mod:`charioteer.virtual` is asked directly.
Nobody waits on the host: what is enqueued on that stream is noted, and whatever the runtime does
with the memory comes after it. The managed array keeps the array itself, and with it the memory.

What cannot be taken over as it is (another order than C, elements of another type than the wanted
one, no elements, memory that may not be written, or that nobody keeps) is left to whoever copies.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from charioteer import _core

if TYPE_CHECKING:
    import numpy as np

_DLPACK_CUDA = 2
_DLPACK_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}

_LEGACY = 1
"""The handle of the default stream, where 0 means none."""


class Taken(NamedTuple):
    """Memory of a device, and what is in it, in C order."""

    memory: _core.ForeignMemory
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def taken(x: Any, dtype: np.dtype[Any] | None) -> Taken | None:
    """The memory of an array that is on a device; ``None`` if it is on none, or has to be copied.

    Args:
        x: the array.
        dtype: of the elements that are wanted; ``None`` if those that it has are.

    Raises:
        DeviceError: the driver does not know the stream that the array names.
    """
    found = _of_virtual(x)
    if found is None:
        found = _of_interface(x) or _of_dlpack(x)
    if found is None or (dtype is not None and found.dtype != dtype):
        return None
    return None if found.memory.is_managed else found


def _is(x: Any, module: str, name: str) -> bool:
    """Whether it is of a class of a module, which is there if it is."""
    kind: Any = getattr(sys.modules.get(module), name, ())
    return isinstance(x, kind)


def _of_virtual(x: Any) -> Taken | None:
    if not _is(x, "charioteer.virtual", "ndarray"):
        return None
    stream = x._lent_on()
    if stream is None:
        return None
    memory = _core.ForeignMemory.of_virtual(x.memory, x._offset, stream, x)
    return Taken(memory, x.shape, x.dtype)


def _of_interface(x: Any) -> Taken | None:
    import numpy as np

    source = x
    stream: int | None
    if _is(x, "torch", "Tensor"):
        torch: Any = sys.modules["torch"]
        if not x.is_cuda:
            return None
        # Its interface is of version 2, which names no stream, and there is none of a tensor that
        # gradients are kept of.
        source = x.detach()
        stream = torch.cuda.current_stream(x.device).cuda_stream or _LEGACY
        said = _said(source)
    else:
        with _device_of(x):
            said = _said(source)
        stream = None if said is None else said.get("stream")
    if said is None:
        return None
    shape = tuple(said["shape"])
    dtype = np.dtype(said["typestr"])
    address, readonly = said["data"]
    if readonly or said.get("mask") is not None or not _is_plain(shape, said.get("strides"), dtype):
        return None
    device = _core.cuda_device_of(address)
    if device is None:
        return None
    return Taken(_core.ForeignMemory.cuda(address, device, stream, source), shape, dtype)


def _said(x: Any) -> dict[str, Any] | None:
    # PyTorch refuses types that the interface has not with a TypeError.
    with contextlib.suppress(TypeError):
        found: dict[str, Any] | None = getattr(x, "__cuda_array_interface__", None)
        return found
    return None


def _device_of(x: Any) -> contextlib.AbstractContextManager[Any]:
    """CuPy names the stream that is current on the device that is current."""
    if _is(x, "cupy", "ndarray"):
        found: contextlib.AbstractContextManager[Any] = x.device
        return found
    return contextlib.nullcontext()


def _of_dlpack(x: Any) -> Taken | None:
    import numpy as np

    where = getattr(x, "__dlpack_device__", None)
    if where is None or not hasattr(x, "__dlpack__"):
        return None
    kind, device = where()
    if kind != _DLPACK_CUDA:
        return None
    stream = _core.cuda_meeting(device)
    tensor = _core.Tensor(x.__dlpack__(stream=stream))
    address, device, (code, bits, lanes), extents, steps = tensor.describe()
    letter = _DLPACK_KINDS.get(code)
    if letter is None or lanes != 1 or bits % 8:
        return None
    dtype = np.dtype(f"{letter}{bits // 8}")
    strides = None if steps is None else tuple(step * dtype.itemsize for step in steps)
    shape = tuple(extents)
    if not _is_plain(shape, strides, dtype):
        return None
    return Taken(_core.ForeignMemory.cuda(address, device, stream, (x, tensor)), shape, dtype)


def _is_plain(
    shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: np.dtype[Any]
) -> bool:
    """Whether there are elements, in C order."""
    expected = dtype.itemsize
    if not expected or dtype.hasobject or 0 in shape:
        return False
    if strides is None:
        return True
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent > 1 and stride != expected:
            return False
        expected *= extent
    return True
