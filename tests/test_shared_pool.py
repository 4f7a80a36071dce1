"""Sharing the memory pool with libraries, as far as no GPU is needed: who is refused, and that what
PyTorch loads by its name is there. ``tests/gpu/test_pool.py`` has the rest."""

from __future__ import annotations

import ctypes
import sys
import types
from typing import Any

import pytest

import charioteer as ch
from charioteer import _core

NO_GPU = not ch.Machine.detect().gpus


@pytest.mark.parametrize("libraries", [(), ("numba",), ("cupy", "tensorflow")])
def test_libraries_without_a_part_in_it_are_refused(libraries: Any) -> None:
    with pytest.raises(ValueError, match="torch"):
        ch.share_memory_pool(*libraries)


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_without_a_gpu_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    cupy: Any = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(set_allocator=given.append)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for _ in range(2):
        with pytest.raises(ch.DeviceError, match="no GPU"):
            ch.share_memory_pool("cupy")
    assert given == []
    with pytest.raises(ch.DeviceError, match="gpu"):
        _core.PoolMemory(0, 64, 0, None)


def test_a_torch_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch: Any = types.ModuleType("torch")
    torch.backends = types.SimpleNamespace(cuda=types.SimpleNamespace(is_built=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(ch.DeviceError, match="without CUDA"):
        ch.share_memory_pool("torch")


def test_what_torch_loads_is_there() -> None:
    assert _core.__file__
    library = ctypes.CDLL(_core.__file__)
    free = library.charioteer_cuda_free
    assert library.charioteer_cuda_allocate
    # Of an empty tensor nothing is given back.
    free.restype = None
    free(None, ctypes.c_ssize_t(0), 0, None)
    with pytest.raises(ValueError, match="address"):
        _core.share_pool_with_torch(0)
