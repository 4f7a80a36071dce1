"""What of kernels needs no GPU: how they are read, shapes of launches, where they are refused.

Kernels that run are in ``tests/gpu``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import charioteer as ch
from charioteer import cpu, gpu
from charioteer._kernels import _is_ptx, _numba_parameter

SOURCE = 'extern "C" __global__ void add(double* x, double by) { x[threadIdx.x] += by; }'
PTX = """
// Made by a compiler.

.version 8.0
.target sm_80
"""


def test_what_a_kernel_shows() -> None:
    add = ch.kernel(SOURCE, "add", ("*f8", "f8"))
    assert isinstance(add, ch.Kernel)
    assert add.__name__ == "add"
    assert repr(add) == "<kernel add(*f8, f8)>"
    launch = add[(2, 3), 32, 64]
    assert isinstance(launch, ch.TaskFunction)
    assert launch.__name__ == "add"
    assert repr(launch.fn) == "<kernel add[[2, 3, 1], [32, 1, 1], 64]>"
    assert repr(add[np.int64(4), [8, 8]].fn) == "<kernel add[[4, 1, 1], [8, 8, 1], 0]>"
    assert add[4, 8] is add[4, 8]
    modes = ch.kernel(SOURCE, "add", (ch.InOut, ch.In["f4"], "const *i4", "p", "c16", "bool"))
    assert repr(modes) == '<kernel add(InOut, In["f4"], const *i4, p, c16, bool)>'


@pytest.mark.parametrize(
    ("shape", "error", "match"),
    [
        (1, TypeError, r"k\[grid, block\]"),
        ((1,), TypeError, r"k\[grid, block\]"),
        ((1, 1, 1, 1), TypeError, r"k\[grid, block\]"),
        ((0, 1), ValueError, "grid: a number from 1 to 2147483647, not 0"),
        (((1, 65536), 1), ValueError, "grid: a number from 1 to 65535, not 65536"),
        ((1, 1025), ValueError, "block: a number from 1 to 1024, not 1025"),
        ((1, (1, 1, 65)), ValueError, "block: a number from 1 to 64, not 65"),
        ((1, (64, 64)), ValueError, "at most 1024 threads, not 4096"),
        ((1, ()), TypeError, "block is a number or one to three of them"),
        (((1, 1, 1, 1), 1), TypeError, "grid is a number or one to three of them"),
        ((1, 1.5), TypeError, "block is a number or one to three of them"),
        ((1, "32"), TypeError, "block is a number or one to three of them"),
        ((1, 1, -1), ValueError, "shared memory: a number from 0"),
    ],
)
def test_shapes_that_are_none(shape: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ch.kernel(SOURCE, "add", ("*f8", "f8"))[shape]


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "match"),
    [
        ((SOURCE,), {}, TypeError, "say the name"),
        ((b"\x7fELF...",), {}, TypeError, "say the name"),
        ((SOURCE, 3), {}, TypeError, "name is a string"),
        ((SOURCE, "add", "f8"), {}, TypeError, "params is a sequence"),
        ((SOURCE, "add", ("&f8",)), {}, ValueError, "parameter 1: kernels take no '&f8'"),
        ((SOURCE, "add", ("f8", "*p")), {}, ValueError, r"parameter 2: kernels take no '\*p'"),
        ((SOURCE, "add", ("c1",)), {}, ValueError, "kernels take no 'c1'"),
        ((SOURCE, "add", ("info",)), {}, ValueError, "kernels take no 'info'"),
        ((SOURCE, "add", (8,)), {}, TypeError, "parameter 1: a code such as"),
        ((SOURCE, "add", (ch.Sum,)), {}, TypeError, "parameter 1: a code such as"),
        ((SOURCE, "add"), {"options": "-G"}, TypeError, "options is a sequence"),
        ((b"\x7fELF...", "add"), {"options": ("-G",)}, TypeError, "this kernel is compiled"),
        ((b"\xff\xfe", "add"), {}, ValueError, "no cubin, fat binary, PTX or source"),
        ((print, "add"), {}, TypeError, "not a kernel: builtin_function_or_method"),
        ((SOURCE, "add"), {"placement": 3}, TypeError, "no placement"),
        ((Path("missing.cu"), "add"), {}, OSError, "missing.cu"),
    ],
)
def test_what_is_no_kernel(
    arguments: Any, keywords: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ch.kernel(*arguments, **keywords)


def test_a_kernel_is_called_with_a_shape() -> None:
    with pytest.raises(TypeError, match=r"add\[grid, block\]"):
        ch.kernel(SOURCE, "add", ("*f8", "f8"))(None, 1.0)


def test_source_and_ptx_are_told_apart() -> None:
    assert _is_ptx(PTX)
    assert not _is_ptx(SOURCE)
    assert not _is_ptx("// .version\n" + SOURCE)


def test_without_a_gpu_a_launch_is_refused_where_it_is_spawned() -> None:
    add = ch.kernel(SOURCE, "add", ("*f8", "f8"))
    with pytest.raises(ch.NoRuntimeError):
        add[1, 1](0, 1.0)
    with ch.Runtime(ch.Machine.virtual(gpus=1), workers=1):
        with pytest.raises(ch.PlacementError, match=r"add: .*virtual GPUs run no kernels"):
            add[1, 1](0, 1.0)
        with pytest.raises(ch.PlacementError, match=r"add: \.fn is for the body of a task"):
            add[1, 1].fn(0, 1.0)

        with pytest.raises(ch.PlacementError, match="virtual GPUs run no kernels"):
            add[1, 1](ch.zeros(4), 1.0)

        @ch.task(placement=gpu)
        def body() -> None:
            add[1, 1].fn(0, 1.0)

        with pytest.raises(ch.PlacementError, match=r"add: \.fn is for"):
            body().result()
    with ch.Runtime(ch.Machine.virtual(gpus=0), workers=1):
        with pytest.raises(ch.PlacementError, match="the machine has no gpu"):
            add[1, 1](0, 1.0)
        with pytest.raises(ch.PlacementError, match=r"add: .*the machine has no GPU"):
            add[1, 1].options(placement=cpu)(0, 1.0)


def test_a_kernel_may_be_a_variant() -> None:
    add = ch.kernel(SOURCE, "add", ("*f8", "f8"))

    @ch.task
    def either(x: Any, by: float) -> str:
        return "core"

    either.variant(gpu)(add[1, 32])
    with ch.Runtime(ch.Machine.virtual(gpus=0), workers=1):
        assert either(0, 1.0).result() == "core"
    with (
        ch.Runtime(ch.Machine.virtual(gpus=1), workers=1),
        pytest.raises(ch.PlacementError, match="virtual GPUs run no kernels"),
    ):
        either(0, 1.0)


def test_an_inline_task_has_no_arguments_for_a_kernel() -> None:
    add = ch.kernel(SOURCE, "add", ("*f8", "f8"))
    with (
        ch.Runtime(ch.Machine.virtual(gpus=1), workers=1),
        pytest.raises(TypeError, match=r"add takes 2 arguments"),
    ):
        ch.spawn(add[1, 1].fn)


def test_what_numba_takes() -> None:
    types = pytest.importorskip("numba").types
    assert _numba_parameter(1, types.float64[:, :], None) == ("inout", "f8", 2)
    assert _numba_parameter(1, types.float32[::1], ("in", "", None)) == ("in", "f4", 1)
    assert _numba_parameter(1, types.int32, ("value", "i4", None)) == ("value", "i4", None)
    assert _numba_parameter(1, types.boolean, None) == ("value", "bool", None)
    with pytest.raises(ValueError, match="by the kernel's signature"):
        _numba_parameter(1, types.float64[:], ("value", "f8", None))
    with pytest.raises(ValueError, match="by the kernel's signature"):
        _numba_parameter(1, types.float64[:], ("in", "f4", None))
    with pytest.raises(TypeError, match="which tasks do not pass"):
        _numba_parameter(1, types.complex128, None)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from charioteer import _nvrtc

    monkeypatch.setattr(_nvrtc, "_find", lambda: None)
    with pytest.raises(ch.KernelError, match=r"add: NVRTC, .* is not found") as raised:
        _nvrtc.compile_source("add", SOURCE, (), (9, 0))
    assert raised.value.kernel == "add"


def test_the_compiler_where_it_is() -> None:
    from charioteer import _nvrtc

    if _nvrtc._find() is None:
        pytest.skip("NVRTC is not here")
    image, entry = _nvrtc.compile_source("add", SOURCE, (), (9, 0))
    assert image.startswith(b"\x7fELF")
    assert entry == "add"
    template = "template <class T> __global__ void set(T* x, T to) { *x = to; }"
    _, entry = _nvrtc.compile_source("set<float>", template, ("-std=c++17",), (9, 0))
    assert entry.startswith("_Z")
    # Of a GPU that it does not know yet, the driver compiles the rest.
    image, _ = _nvrtc.compile_source("add", SOURCE, (), (99, 0))
    assert _is_ptx(image.rstrip(b"\0").decode())
    for source, name, options in (
        ("nonsense", "add", ()),
        (SOURCE, "other", ()),
        (SOURCE, "add", ("--no-such-option",)),
    ):
        with pytest.raises(ch.KernelError, match=f"{name}: "):
            _nvrtc.compile_source(name, source, options, (9, 0))
