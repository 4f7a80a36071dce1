"""Kernels as tasks on real GPUs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import charioteer as ch
from charioteer import gpu

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]

AXPY = r"""
extern "C" __global__ void axpy(double* y, const double* x, double a, int n) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < n) y[at] += a * x[at];
}
template <class T> __global__ void fill(T* x, T value, unsigned n) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < n) x[at] = value;
}
extern "C" __global__ void scale(
    float* x, long long rows, long long columns, long long row, long long column, float factor) {
    long long i = blockIdx.x, j = threadIdx.x;
    if (i < rows && j < columns) *(float*)((char*)x + i * row + j * column) *= factor;
}
extern "C" __global__ void reverse(int* x) {
    extern __shared__ int shared[];
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void conjugate(double2* x, double2 by) {
    x[threadIdx.x].x += by.x;
    x[threadIdx.x].y -= by.y;
}
"""
N = 1000


def _axpy() -> ch.Kernel:
    return ch.kernel(AXPY, "axpy", ("*f8", "const *f8", "f8", "i4"))


def _ready(cp: Any) -> None:
    """What was enqueued outside of tasks is ordered with none."""
    cp.cuda.get_current_stream().synchronize()


def test_a_source(rt: ch.Runtime, cp: Any) -> None:
    x, y = cp.arange(N, dtype=cp.float64), cp.ones(N)
    _ready(cp)
    axpy = _axpy()
    first = axpy[(4,), (256,)](y, x, 2.0, N)
    second = axpy[4, 256].options("second", dependencies=first)(y, x, 1.0, N)
    assert second.result() is None
    np.testing.assert_array_equal(cp.asnumpy(y), 1 + 3.0 * np.arange(N))
    fill = ch.kernel(AXPY, "fill<float>", ("*f4", "f4", "u4"))
    z = cp.zeros(N, cp.float32)
    _ready(cp)
    fill[4, 256](z, 7, N).result()
    assert (cp.asnumpy(z) == 7).all()


def test_other_kinds_of_code(rt: ch.Runtime, cp: Any, tmp_path: Path) -> None:
    from charioteer._nvrtc import compile_source

    capability = ch.Machine.detect().gpus[0].capability
    assert capability is not None
    major, minor = map(int, str(capability).split("."))
    cubin, entry = compile_source("axpy", AXPY, (), (major, minor))
    assert cubin.startswith(b"\x7fELF")
    # Compiled for what is older, the driver does the rest: so it has to be PTX.
    path = tmp_path / "axpy.ptx"
    command = [
        *("nvcc", "-ptx", "-arch=compute_80", "-o", str(path), "-x", "cu", "-"),
    ]
    codes: list[Any] = [cubin]
    try:
        done = subprocess.run(command, input=AXPY, text=True, timeout=60, check=False)
    except OSError:
        done = None
    if done is not None and done.returncode == 0:
        codes += [path, path.read_text(), path.read_bytes()]
    for code in codes:
        x, y = cp.arange(N, dtype=cp.float64), cp.zeros(N)
        _ready(cp)
        ch.kernel(code, entry, ("*f8", "const *f8", "f8", "i4"))[4, 256](y, x, 2.0, N).result()
        np.testing.assert_array_equal(cp.asnumpy(y), 2.0 * np.arange(N))


def test_cupys_kernels(rt: ch.Runtime, cp: Any) -> None:
    raw = cp.RawKernel(AXPY, "axpy")
    axpy = ch.kernel(raw, params=("*f8", "const *f8", "f8", "i4"))
    assert axpy.__name__ == "axpy"
    x, y = cp.arange(N, dtype=cp.float64), cp.zeros(N)
    _ready(cp)
    axpy[4, 256](y, x, 2.0, N).result()
    np.testing.assert_array_equal(cp.asnumpy(y), 2.0 * np.arange(N))


def test_kernels_of_cuda_core(rt: ch.Runtime, cp: Any) -> None:
    try:
        from cuda.core import Device, Program, ProgramOptions
    except ImportError:
        experimental = pytest.importorskip("cuda.core.experimental")
        Device, Program = experimental.Device, experimental.Program
        ProgramOptions = experimental.ProgramOptions
    device = Device()
    device.set_current()
    arch = "".join(map(str, device.compute_capability))
    options = ProgramOptions(arch=f"sm_{arch}")
    code = Program(AXPY, code_type="c++", options=options).compile("cubin")
    for axpy in (
        ch.kernel(code.get_kernel("axpy"), "axpy", ("*f8", "const *f8", "f8", "i4")),
        ch.kernel(code, "axpy", ("*f8", "const *f8", "f8", "i4")),
    ):
        x, y = cp.arange(N, dtype=cp.float64), cp.zeros(N)
        _ready(cp)
        axpy[4, 256](y, x, 2.0, N).result()
        np.testing.assert_array_equal(cp.asnumpy(y), 2.0 * np.arange(N))


@pytest.mark.filterwarnings("ignore")
def test_numbas_kernels(rt: ch.Runtime, cp: Any, numba_cuda: Any) -> None:
    cuda = numba_cuda

    @cuda.jit
    def axpy(y: Any, x: Any, a: float) -> None:
        at = cuda.grid(1)
        if at < y.size:
            y[at] += a * x[at]

    with pytest.raises(TypeError, match="compiled for 0 signatures"):
        ch.kernel(axpy)
    try:
        axpy.compile("void(float64[:], float64[:], float64)")
    except AttributeError as error:
        pytest.skip(f"this Numba does not know this NumPy: {error}")
    kernel = ch.kernel(axpy, params=(ch.InOut, ch.In, "f8"))
    x, y = cp.arange(2 * N, dtype=cp.float64)[::2], cp.zeros(N)
    _ready(cp)
    kernel[4, 256](y, x, 2.0).result()
    np.testing.assert_array_equal(cp.asnumpy(y), 4.0 * np.arange(N))
    with pytest.raises(TypeError, match="1 axes, not 2"):
        kernel[4, 256](cp.zeros((2, 2)), x, 2.0)


def test_arrays_of_other_libraries(rt: ch.Runtime, cp: Any, torch: Any) -> None:
    class Described:
        def __init__(self, array: Any) -> None:
            self.__cuda_array_interface__ = array.__cuda_array_interface__
            self.array = array

    x = torch.arange(N, dtype=torch.float64, device="cuda")
    y = cp.zeros(N)
    torch.cuda.synchronize()
    _ready(cp)
    axpy = _axpy()
    axpy[4, 256](Described(y), x, 2.0, N).result()
    np.testing.assert_array_equal(cp.asnumpy(y), 2.0 * np.arange(N))
    with pytest.raises(TypeError, match="an array of f8, not of f4"):
        axpy[4, 256](y, x.float(), 2.0, N)
    with pytest.raises(ValueError, match="not C-contiguous"):
        axpy[4, 256](y, x[::2], 2.0, N)
    with pytest.raises(TypeError, match="in the host's memory"):
        axpy[4, 256](y, x.cpu(), 2.0, N)
    with pytest.raises(TypeError, match="an array on a GPU, not ndarray"):
        axpy[4, 256](y, np.zeros(N), 2.0, N)


def test_strides_shared_memory_and_complex_numbers(rt: ch.Runtime, cp: Any) -> None:
    scale = ch.kernel(AXPY, "scale", ("*f4", "f4"), strided=True)
    x = cp.ones((6, 8), cp.float32)
    _ready(cp)
    scale[6, 8](x[::2, 1::3], 5.0).result()
    expected = np.ones((6, 8), np.float32)
    expected[::2, 1::3] *= 5
    np.testing.assert_array_equal(cp.asnumpy(x), expected)
    with pytest.raises(TypeError, match="the kernel has 6 parameters"):
        scale[6, 8](x[0], 5.0)

    reverse = ch.kernel(AXPY, "reverse", ("*i4",))
    y = cp.arange(1024, dtype=cp.int32)
    _ready(cp)
    reverse[1, 1024, 4096](y).result()
    assert (cp.asnumpy(y) == np.arange(1024)[::-1]).all()
    reverse[1, 1024, 100 << 10](y).result()  # more than a launch may ask for by itself
    assert (cp.asnumpy(y) == np.arange(1024)).all()

    conjugate = ch.kernel(AXPY, "conjugate", ("*c16", "c16"))
    z = cp.zeros(4, cp.complex128)
    _ready(cp)
    conjugate[1, 4](z, 1 + 2j).result()
    assert (cp.asnumpy(z) == 1 - 2j).all()


def test_errors_where_the_task_is_spawned(rt: ch.Runtime, cp: Any) -> None:
    x = cp.zeros(N)
    with pytest.raises(ch.KernelError, match='identifier "nonsense" is undefined'):
        ch.kernel('extern "C" __global__ void f() { nonsense; }', "f")[1, 1]()
    with pytest.raises(ch.KernelError, match="missing"):
        ch.kernel(AXPY, "missing")[1, 1]()
    with pytest.raises(ch.KernelError):
        ch.kernel(b"\x7fELF" + bytes(1000), "f")[1, 1]()
    with pytest.raises(TypeError, match="the kernel has 4 parameters, and params comes to 1"):
        ch.kernel(AXPY, "axpy", ("*f8",))[1, 1](x)
    with pytest.raises(TypeError, match="parameter 4 is i8 by params, and the kernel takes 4"):
        ch.kernel(AXPY, "axpy", ("*f8", "*f8", "f8", "i8"))[1, 1](x, x, 1.0, 1)
    with pytest.raises(ch.PlacementError, match="on one GPU"):
        _axpy()[1, 1].options(placement=[gpu, ch.cpu])(x, x, 1.0, 1)


def test_a_launch_that_is_refused_fails_its_task_alone(rt: ch.Runtime, cp: Any) -> None:
    greedy = ch.kernel(AXPY, "reverse", ("*i4",))
    x = cp.arange(32, dtype=cp.int32)
    _ready(cp)
    refused = greedy[1, 32, 1 << 20](x)
    after = greedy[1, 32, 128].options(dependencies=refused)(x)
    with pytest.raises(ch.KernelError, match="reverse: "):
        refused.result()
    with pytest.raises(ch.DependencyError):
        after.result()
    greedy[1, 32, 128](x).result()
    assert (cp.asnumpy(x) == np.arange(32)[::-1]).all()


def test_arguments_live_until_the_device_has_used_them(rt: ch.Runtime, cp: Any, spin: Any) -> None:
    axpy = _axpy()
    y = cp.zeros(N)
    _ready(cp)

    @ch.spawn(placement=gpu(0))
    def long() -> None:
        spin(0.2)

    x = cp.full(N, 3.0)
    _ready(cp)
    task = axpy[4, 256].options(dependencies=long)(y, x, 1.0, N)
    del x
    # Would get the memory of what nobody keeps.
    other = cp.full(N, -1.0)
    task.result()
    assert (cp.asnumpy(y) == 3).all()
    assert float(other[0]) == -1


def test_handles_and_variants(rt: ch.Runtime, cp: Any) -> None:
    axpy = _axpy()

    @ch.task(placement=gpu)
    def make(value: float) -> Any:
        return cp.full(N, value)

    y = make(1.0)
    axpy[4, 256](y, make(2.0), 10.0, N).result()
    assert (cp.asnumpy(y.result()) == 21).all()

    @ch.task
    def either(y: Any, x: Any, a: float, n: int) -> str:
        return "cpu"

    either.variant(gpu)(axpy[4, 256])
    x, z = cp.ones(N), cp.zeros(N)
    _ready(cp)
    assert either.options(placement=gpu)(z, x, 4.0, N).result() is None
    assert either.options(placement=ch.cpu)(z, x, 4.0, N).result() == "cpu"
    assert (cp.asnumpy(z) == 4).all()

    @ch.task(placement=gpu)
    def inside() -> Any:
        w = cp.zeros(N)
        axpy[4, 256].fn(w, x, 5.0, N)
        return w

    assert (cp.asnumpy(inside().result()) == 5).all()


def test_regions_are_ordered_and_brought(rt: ch.Runtime, cp: Any) -> None:
    X, Y = ch.array(np.arange(2.0 * N)), ch.zeros(2 * N)
    axpy = ch.kernel(AXPY, "axpy", (ch.InOut["f8"], ch.In["f8"], "f8", "i4"))
    for part in range(2):
        piece = slice(part * N, (part + 1) * N)
        for factor in (1.0, 2.0):
            axpy[4, 256](Y[piece], X[piece], factor, N)

    @ch.task(placement=gpu)
    def double(x: ch.InOut) -> None:
        x *= 2.0

    double(Y)

    @ch.task
    def on_a_core(y: ch.InOut) -> None:
        y += 1.0

    on_a_core(Y)
    axpy[4, 256](Y[:N], X[N:], 1.0, N)
    expected = 6.0 * np.arange(2 * N) + 1
    expected[:N] += np.arange(N, 2 * N)
    np.testing.assert_array_equal(Y.numpy(), expected)
    # What is not managed is taken beside it.
    z = cp.ones(N)
    _ready(cp)
    axpy[4, 256](Y[:N], z, 1.0, N).result()
    expected[:N] += 1
    np.testing.assert_array_equal(Y.numpy(), expected)
    with pytest.raises(TypeError, match="an array of f8, not of f4"):
        axpy[4, 256](Y, ch.zeros(N, "f4"), 1.0, N)


def test_tiles_and_strided_regions(rt: ch.Runtime, cp: Any) -> None:
    A = ch.array(np.arange(48.0, dtype="f4").reshape(6, 8))
    tiles = A.tiles((3, 4))
    fill = ch.kernel(AXPY, "fill<float>", (ch.Out["f4"], "f4", "u4"))
    fill[1, 32](tiles[1, 0], 9, 12)
    scale = ch.kernel(AXPY, "scale", (ch.InOut["f4"], "f4"), strided=True)
    scale[6, 8](A[::2, 1::3], 5.0)
    expected = np.arange(48.0, dtype="f4").reshape(6, 8)
    expected[3:, :4] = 9
    expected[::2, 1::3] *= 5
    np.testing.assert_array_equal(A.numpy(), expected)
    refused = ch.kernel(AXPY, "fill<float>", (ch.InOut["f4"], "f4", "u4"))[1, 32](A[:, ::2], 1, 1)
    with pytest.raises(ch.KernelError, match="not C-contiguous"):
        refused.result()


def test_a_failed_launch_is_told_to_who_reads(rt: ch.Runtime) -> None:
    X = ch.zeros(N, "i4")
    reverse = ch.kernel(AXPY, "reverse", (ch.InOut["i4"],))
    refused = reverse[1, 32, 1 << 20](X)
    with pytest.raises(ch.DependencyError):
        X.numpy()
    with pytest.raises(ch.KernelError):
        refused.result()


def test_a_chain_takes_no_gil(rt: ch.Runtime, cp: Any, counters: Any) -> None:
    axpy = _axpy()
    x, y = cp.ones(N), cp.zeros(N)
    _ready(cp)
    axpy[4, 256](y, x, 0.0, N).result()
    sites = ("worker", "native")

    def visits() -> list[int]:
        gateway = rt.stats()["gateway"]
        return [gateway[site]["visits"] for site in sites]

    before = visits()
    T = ch.TaskSpace("T")
    for i in range(500):
        axpy[4, 256].options(T[i], dependencies=T[i - 1] if i else None)(y, x, 1.0, N)
    T[499].result()
    assert visits() == before
    assert (cp.asnumpy(y) == 500).all()
    seen = counters()
    assert seen["streams"] == 1
    assert seen["stream_waits"] == 0
    assert seen["host_synchronisations"] == 0


def test_independent_kernels_share_a_stream(rt: ch.Runtime, cp: Any, counters: Any) -> None:
    axpy = _axpy()
    x, y = cp.ones(N), cp.zeros(N)
    _ready(cp)
    # Each takes the whole GPU where the arrays are, so that they follow each other: a stream for
    # each is of no use.
    launch = axpy[4, 256].options(placement=gpu(0))
    ch.wait([launch(y, x, 1.0, N) for _ in range(500)])
    assert (cp.asnumpy(y) == 500).all()
    assert counters()["streams"] <= 4


def test_a_fault_of_a_kernel(tells: Callable[[str], None]) -> None:
    code = r"""
import charioteer as ch

bad = ch.kernel('extern "C" __global__ void bad(int* p) { p[1] = 1; }', "bad", ("p",))
with ch.Runtime(workers=2):
    faulty = bad[1, 1].options("faulty")(None)
    after = bad[1, 1].options("after", dependencies=faulty)(None)
    for task in (faulty, after):
        try:
            task.result()
        except ch.DeviceLostError as error:
            assert "illegal" in str(error), error
        except ch.DependencyError:
            assert task is after
        else:
            raise SystemExit("the fault was not told")
    try:
        bad[1, 1](None).result()
    except ch.DeviceLostError:
        pass
    else:
        raise SystemExit("the device lives on")
    assert ch.spawn()(lambda: 7).result() == 7
print("told", flush=True)
"""
    tells(code)


def test_a_loop_of_launches_launches_so_often(rt: ch.Runtime, cp: Any) -> None:
    x, y = cp.ones(N), cp.zeros(N)
    _ready(cp)
    launch: Any = _axpy()[4, 256].fn

    @ch.task(placement=gpu(0))
    def many(times: int) -> float:
        return ch._core.launch_loop(launch, times, y, x, 1.0, N)

    assert many(130).result() > 0
    assert float(y[0]) == float(y[-1]) == 130
    with pytest.raises(ch.PlacementError, match=r"for the body of a task on a GPU"):
        ch._core.launch_loop(launch, 1, y, x, 1.0, N)
