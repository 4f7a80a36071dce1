"""Managed arrays on real GPUs: the arrays of other libraries, copies, memory, order."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import charioteer as ch
from charioteer import blas, cpu, gpu
from charioteer.bench import tiled
from charioteer.bench.gpu_data import bfloat16

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]

Array = Any
Counters = Callable[[], dict[str, Any]]
Spin = Callable[..., None]
MiB = 1 << 20


def copies(runtime: ch.Runtime, source: str, target: str) -> tuple[int, int]:
    """Copies from one memory to another so far, and their bytes."""
    found = (0, 0)
    for counted in runtime.stats()["devices"].values():
        number, size = counted["traffic"].get((source, target), (0, 0))
        found = found[0] + number, found[1] + size
    return found


def test_a_region_is_an_array_of_cupys_without_a_copy(rt: ch.Runtime, cp: Any) -> None:
    a = np.arange(24.0).reshape(4, 6)
    A = ch.array(a)

    @ch.task(placement=gpu)
    def body(x: ch.In[Array], y: ch.InOut[Array], z: ch.Out[Array]) -> Any:
        context = ch.current()
        assert all(isinstance(one, cp.ndarray) for one in (x, y, z))
        assert {one.device.id for one in (x, y, z)} == {context.device.index}
        assert cp.cuda.get_current_stream().ptr == context.stream.handle
        assert context.xp is cp and context.array_library == "cupy"
        z[...] = x + 0.5
        y *= 2
        return x.shape, y.shape, z.shape

    assert body(A[0], A[1:3, ::2], A[3:, ::-1]).result() == ((6,), (2, 3), (1, 6))
    a[3, ::-1] = a[0] + 0.5
    a[1:3, ::2] *= 2
    np.testing.assert_array_equal(A.numpy(), a)
    assert copies(rt, "host", "gpu(0)")[1] <= a.nbytes


@pytest.mark.parametrize("dtype", ["f4", "f8", "i1", "u8", "c16", "?"])
@pytest.mark.parametrize(
    "index", [(), (0,), (slice(1, None, 2), slice(None, None, -1)), (None, 2, 3), (slice(2, 2),)]
)
def test_views_are_numpys(rt: ch.Runtime, cp: Any, dtype: str, index: Any) -> None:
    a = np.arange(24).reshape(4, 6).astype(dtype)
    A = ch.array(a)

    @ch.task(placement=gpu)
    def copy(x: ch.In[Array], y: ch.Out[Array]) -> Any:
        y[...] = x
        return x.shape, str(x.dtype)

    view = a[(*index, ...)]
    B = ch.empty(view.shape, dtype)
    assert copy(A[index], B).result() == (view.shape, str(a.dtype))
    np.testing.assert_array_equal(B.numpy(), view)


def test_a_chain_by_regions_waits_for_nothing(rt: ch.Runtime, cp: Any, counters: Counters) -> None:
    length = 500
    A = ch.zeros(1 << 12)
    seen: set[int] = set()

    @ch.task(placement=gpu(0))
    def step(x: ch.InOut[Array]) -> None:
        seen.add(id(x))
        cp.add(x, 1.0, out=x)

    step(A).result()
    before = counters()
    for _ in range(length):
        last = step(A)
    last.result()
    after = counters()
    assert after["host_synchronisations"] == before["host_synchronisations"] == 0
    assert after["traffic"] == before["traffic"]
    assert len(seen) == 1
    assert (A.numpy() == length + 1).all()


def test_each_version_is_moved_once(rt: ch.Runtime, cp: Any) -> None:
    A, B = ch.zeros(MiB), ch.empty(MiB)

    @ch.task(placement=gpu(0), share=0.25)
    def read(a: ch.In[Array], b: ch.Out[Array]) -> None:
        b[...] = a

    parts = list(zip(A.shards(4), B.shards(4), strict=True))
    for _ in range(3):
        for a, b in parts:
            read(a, b)
    B.numpy()
    assert copies(rt, "host", "gpu(0)") == (4, 8 * MiB)
    B.numpy()
    assert copies(rt, "gpu(0)", "host")[1] == 8 * MiB


@pytest.mark.gpu(2)
def test_copies_between_devices(rt: ch.Runtime, cp: Any) -> None:
    A = ch.zeros(MiB)

    @ch.task
    def add(a: ch.InOut[Array]) -> None:
        a += 1

    for turn in range(10):
        add.options(placement=gpu(turn % 2))(A)
    assert (A.numpy() == 10).all()
    assert copies(rt, "host", "gpu(0)") == (1, 8 * MiB)
    assert copies(rt, "gpu(0)", "gpu(1)")[0] == 5
    assert copies(rt, "gpu(1)", "gpu(0)")[0] == 4


def test_order_holds_while_kernels_are_late(rt: ch.Runtime, cp: Any, spin: Spin) -> None:
    """Who reads after a late write sees it, also over the host and over other streams."""
    A, B = ch.zeros(4, np.int64), ch.zeros(4, np.int64)

    @ch.task(placement=gpu(0), share=0.5)
    def write(a: ch.Out[Array], value: int) -> None:
        spin(0.01)
        a[...] = value

    @ch.task(placement=gpu(0), share=0.5)
    def add(b: ch.InOut[Array], a: ch.In[Array]) -> None:
        b += a

    @ch.task(placement=cpu)
    def on_core(b: ch.InOut[Array], a: ch.In[Array]) -> None:
        b += a

    for value in range(1, 8):
        write(A, value)
        (on_core if value % 3 == 0 else add)(B, A)
    assert B.numpy().tolist() == [sum(range(1, 8))] * 4


@pytest.mark.parametrize("size", [16, MiB])
def test_what_goes_home_may_come_back_at_once(
    rt: ch.Runtime, cp: Any, spin: Spin, size: int
) -> None:
    """Also over memory of the host that is not pinned, since there is too little of it."""
    A = ch.zeros(size, np.int64)

    @ch.task(placement=gpu(0))
    def write(a: ch.Out[Array], value: int) -> None:
        spin(0.01)
        a[...] = value

    @ch.task(placement=gpu(0))
    def add(a: ch.InOut[Array]) -> None:
        a += 1

    for value in range(1, 20):
        write(A, value)
        A.evict(gpu(0))
        add(A)
        assert (A.numpy() == value + 1).all()


def test_memory_of_the_host_is_pinned_for_who_uses_it(rt: ch.Runtime, cp: Any) -> None:
    """Not for an array that is written and read on GPUs alone: that takes as long as to copy it."""
    A = ch.empty(4 * MiB, np.uint8)
    with A.host("rw") as a:
        address = a.ctypes.data

    def is_pinned() -> bool:
        return bool(cp.cuda.runtime.pointerGetAttributes(address).type == 1)

    @ch.task(placement=gpu(0))
    def write(x: ch.Out[Array]) -> None:
        x.fill(3)

    @ch.task(placement=gpu(0))
    def change(x: ch.InOut[Array]) -> None:
        x += 1

    ch.wait([write(A), change(A)])
    assert not is_pinned()
    with A.host("r") as a:
        assert a.ctypes.data == address
        assert (a == 4).all()
    assert is_pinned()
    change(A).result()
    assert (A.numpy() == 5).all()


def test_torch_tensors(rt: ch.Runtime, torch: Any) -> None:
    a = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    A, B = ch.array(a), ch.empty((4, 3), np.float32)

    @ch.task(placement=gpu, array_library="torch")
    def transpose(x: ch.In[Array], y: ch.Out[Array]) -> str:
        assert isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
        assert torch.cuda.current_stream().cuda_stream == ch.current().stream.handle
        y.copy_(2 * x.T)
        return str(ch.current().array_library)

    @ch.task(placement=gpu, array_library="torch")
    def reduce(x: ch.In[Array], total: ch.Sum[Array]) -> None:
        total += x.sum()

    assert transpose(A, B).result() == "torch"
    np.testing.assert_array_equal(B.numpy(), 2 * a.T)
    total = ch.zeros((), np.float32)
    reduce(A[0], total)
    reduce(A[1:], total)
    assert float(total.numpy()) == a.sum()


def test_plain_arrays_have_the_protocols(rt: ch.Runtime, cp: Any) -> None:
    A = ch.array(np.arange(6.0))

    @ch.task(placement=gpu, array_library="none")
    def body(x: ch.InOut[Array]) -> Any:
        assert not isinstance(x, cp.ndarray)
        by_interface = cp.asarray(x)
        assert by_interface.data.ptr == x.__cuda_array_interface__["data"][0]
        assert x.__cuda_array_interface__["stream"] == ch.current().stream.handle
        by_interface += 1
        by_dlpack = cp.from_dlpack(x)
        assert by_dlpack.data.ptr == by_interface.data.ptr
        by_dlpack *= 2
        return x.shape, x.nbytes

    assert body(A[::2]).result() == ((3,), 24)
    assert A.numpy().tolist() == [2, 1, 6, 3, 10, 5]


def test_arrays_of_libraries_come_in(rt: ch.Runtime, cp: Any, torch: Any) -> None:
    x = cp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(ch.array(x).numpy(), x.get())
    np.testing.assert_array_equal(ch.asarray(x.T).numpy(), x.get().T)
    y = torch.arange(6, device="cuda").reshape(3, 2)
    np.testing.assert_array_equal(ch.array(y).numpy(), y.cpu().numpy())


def test_reductions(rt: ch.Runtime, cp: Any) -> None:
    X = ch.array(np.arange(4000.0))
    total, most = ch.full((), 10.0), ch.full((), -1.0)

    @ch.task(placement=[gpu, cpu], share=0.25)
    def reduce(x: ch.In[Array], total: ch.Sum[Array], most: ch.Max[Array]) -> None:
        total += x.sum()
        most[...] = ch.current().xp.maximum(most, x.max())

    for part in X.shards(16):
        reduce(part, total, most)
    assert float(total.numpy()) == 10 + sum(range(4000))
    assert float(most.numpy()) == 3999


def test_native_bodies_beside_those_of_gpus(rt: ch.Runtime, cp: Any) -> None:
    @ch.task(placement=gpu)
    def multiply(a: ch.In[Array], b: ch.In[Array], c: ch.Out[Array]) -> None:
        cp.matmul(a, b, out=c)

    multiply.variant(cpu)(blas.gemm)
    a = np.random.default_rng(0).random((64, 64))
    A, C = ch.array(a), ch.empty((64, 64))
    for placement in (gpu, cpu, [gpu, cpu]):
        multiply.options(placement=placement)(A, A, C)
        np.testing.assert_allclose(C.numpy(), a @ a)
        C.fill(0.0)


@pytest.mark.gpu(2)
def test_sets(rt: ch.Runtime, cp: Any) -> None:
    a, b, c = np.random.default_rng(1).random((3, 101, 101))

    @ch.task(placement=gpu * 2, shards={"a": 0, "c": 0})
    def gemm(a: ch.In[Array], b: ch.In[Array], c: ch.InOut[Array]) -> Any:
        for _, ai, bi, ci in zip(ch.current().each(), a, b, c, strict=True):
            ci -= ai @ bi
        return [one.device.id for one in c], [len(one) for one in c]

    A, B, C = map(ch.array, (a, b, c))
    for _ in range(3):
        devices, rows = gemm(A, B, C).result()
        assert sorted(devices) == [0, 1] and rows == [51, 50]
        c -= a @ b
    np.testing.assert_allclose(C.numpy(), c)


def test_prefetch_and_evict(rt: ch.Runtime, cp: Any) -> None:
    A = ch.zeros(MiB)
    A.prefetch(gpu(0)).result()
    assert copies(rt, "host", "gpu(0)") == (1, 8 * MiB)

    @ch.task(placement=gpu(0))
    def add(a: ch.InOut[Array]) -> None:
        a += 1

    add(A)
    A.evict(gpu(0)).result()
    assert copies(rt, "gpu(0)", "host") == (1, 8 * MiB)
    assert (A.numpy() == 1).all()
    assert copies(rt, "gpu(0)", "host") == (1, 8 * MiB)


def test_a_working_set_larger_than_the_memory(cp: Any, tmp_path: Path) -> None:
    machine = ch.Machine.detect(memory="64MiB")
    assert machine.gpus[0].memory == 64 * MiB
    trace = tmp_path / "trace"
    choose = random.Random(3)

    @ch.task(placement=gpu(0))
    def add(x: ch.InOut[Array], y: ch.In[Array]) -> None:
        x += y

    rows = 12
    a = np.ones((rows, MiB))  # of 8 MiB, so that 8 of them fit
    with ch.Runtime(machine, workers=2, trace=trace) as rt:
        A = ch.array(a)
        # Three times round, each row written: all but what stays has to go and come again.
        turns = [(row % rows, (row + 1) % rows) for row in range(3 * rows)]
        turns += [tuple(choose.sample(range(rows), 2)) for _ in range(30)]
        for into, source in turns:
            add(A[into], A[source])
            a[into] += a[source]
        np.testing.assert_array_equal(A.numpy(), a)
        assert copies(rt, "gpu(0)", "host")[1] > rows * 8 * MiB
        with pytest.raises(ch.OutOfDeviceMemoryError):
            add(ch.zeros(9 * MiB), A[0])
    assert ch.check_order(trace).violations == ()
    assert ch.check_trace(trace).violations == ()


def test_failures(rt: ch.Runtime, cp: Any) -> None:
    A = ch.zeros(4)

    @ch.task(placement=gpu)
    def fail(a: ch.Out[Array]) -> None:
        raise KeyError("on purpose")

    @ch.task(placement=gpu)
    def put(a: ch.Out[Array], value: float) -> None:
        a[...] = value

    failed = fail(A)
    with pytest.raises(ch.DependencyError):
        A.numpy()
    assert isinstance(failed.exception(), KeyError)
    put(A, 2.0)
    assert A.numpy().tolist() == [2] * 4


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=pytest.mark.gpu(2))])
def test_programs(rt: ch.Runtime, cp: Any, gpus: int) -> None:
    n = 300
    spd = np.random.default_rng(0).random((n, n))
    spd = spd @ spd.T + n * np.eye(n)
    factor = np.linalg.cholesky(spd)
    kernels: tiled.Kernels
    for kernels in (tiled.Portable(), tiled.Blas()):
        A = ch.array(spd)
        tiled.cholesky(A.tiles((64, 64)), gpus, kernels)
        np.testing.assert_allclose(np.tril(A.numpy()), factor, rtol=1e-10, atol=1e-10)
    a, b = np.random.default_rng(1).random((2, n, n))
    C = ch.empty((n, n))
    tiled.product(
        ch.array(a).tiles((80, 100)),
        ch.array(b).tiles((100, 90)),
        C.tiles((80, 90)),
        gpus,
        tiled.Portable(),
    )
    np.testing.assert_allclose(C.numpy(), a @ b)


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=pytest.mark.gpu(2))])
def test_products_of_bfloat16(rt: ch.Runtime, cp: Any, torch: Any, gpus: int) -> None:
    n = 128
    # Sums of few small whole numbers are the same in all types.
    a, b = np.random.default_rng(1).integers(-1, 2, (2, n, n))
    bits = np.vectorize(bfloat16, otypes=[np.int16])
    C = ch.empty((n, n), np.int16)
    tiled.product(
        ch.array(bits(a)).tiles((64, 32)),
        ch.array(bits(b)).tiles((32, 64)),
        C.tiles((64, 64)),
        gpus,
        tiled.Bfloat16(),
    )
    np.testing.assert_array_equal(C.numpy(), bits(a @ b))


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=pytest.mark.gpu(2))])
def test_transforms(rt: ch.Runtime, cp: Any, gpus: int) -> None:
    random = np.random.default_rng(0)
    image = random.standard_normal((128, 96)) + 1j * random.standard_normal((128, 96))
    image = image.astype(np.complex64)
    kinds: list[tiled.Transforms] = [tiled.Portable(), tiled.CuFft()]
    for transforms in kinds:
        between, y = ch.empty((128, 96), np.complex64), ch.empty((128, 96), np.complex64)
        tiled.fft2(ch.array(image), between, y, gpus, transforms, rounds=3)
        np.testing.assert_allclose(y.numpy(), np.fft.fft2(image), atol=1e-2)


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=pytest.mark.gpu(2))])
@pytest.mark.parametrize("different", [3, 2**32])
def test_sorts(rt: ch.Runtime, cp: Any, gpus: int, different: int) -> None:
    values = np.random.default_rng(0).integers(0, different, 100_003, np.uint32)
    kinds: list[tiled.Merges] = [tiled.Portable(), tiled.MergePaths()]
    for merges in kinds:
        result = ch.empty(len(values), np.uint32)
        tiled.merge_sort(ch.array(values), result, gpus, merges)
        np.testing.assert_array_equal(result.numpy(), np.sort(values))


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_random_programs(cp: Any, torch: Any, tmp_path: Path, library: Any) -> None:
    """Tasks over random regions of few arrays, on GPUs and cores, against NumPy."""
    choose = random.Random(11)
    gpus = len(ch.Machine.detect().gpus)
    arrays = [np.zeros((6, 8), np.int64) for _ in range(3)]
    trace = tmp_path / "trace"

    @ch.task(array_library=library)
    def update(x: ch.InOut[Array], y: ch.In[Array], factor: int) -> None:
        x *= factor
        x += y
        x %= 1_000_003

    def region() -> tuple[int, tuple[slice, slice]]:
        row, column = choose.randrange(5), choose.randrange(6)
        step = choose.choice([1, 1, 2])
        return choose.randrange(3), (slice(row, row + 2), slice(column, column + 3, step))

    for array in arrays:
        array[...] = np.arange(48).reshape(6, 8)
    with ch.Runtime(workers=3, trace=trace):
        managed = [ch.array(array) for array in arrays]
        for _ in range(300):
            (i, into), (j, source) = region(), region()
            x, y = arrays[i][into], arrays[j][source]
            if x.shape != y.shape or np.shares_memory(x, y):
                continue
            factor = choose.randrange(1, 9)
            place: Any = choose.choice([cpu, gpu, [gpu, cpu], *map(gpu, range(gpus))])
            update.options(placement=place)(managed[i][into], managed[j][source], factor)
            x *= factor
            x += y
            x %= 1_000_003
        for found, wanted in zip(managed, arrays, strict=True):
            np.testing.assert_array_equal(found.numpy(), wanted)
    assert ch.check_order(trace).violations == ()
    assert ch.check_trace(trace).violations == ()


# ---- arrays that come in without a copy -------------------------------------------------------


class _ByDlpack:
    """An array of CuPy's of which nothing but DLPack is known."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()

    def __dlpack__(self, *, stream: Any = None) -> Any:
        with self._array.device:
            return self._array.__dlpack__(stream=stream)


def _late(cp: Any, spin: Spin, device: int = 0) -> tuple[Any, Any]:
    """An array of CuPy's that a stream of its own is about to write, and that stream."""
    with cp.cuda.Device(device):
        stream = cp.cuda.Stream(non_blocking=True)
        x, values = cp.full((64, 32), -1.0), cp.asarray(EXPECTED)
        with stream:
            # What is loaded first waits until all that runs on the device has ended.
            spin(0)
            x[...] = values
            x.fill(-1)
            cp.cuda.Device(device).synchronize()
            spin(0.2)
            x[...] = values
    return x, stream


EXPECTED = np.arange(64 * 32, dtype=float).reshape(64, 32)


@pytest.mark.parametrize("protocol", ["interface", "dlpack"])
def test_an_array_of_cupys_comes_in_without_a_copy(cp: Any, spin: Spin, protocol: str) -> None:
    seen: list[int] = []

    @ch.task(placement=gpu(0))
    def double(a: ch.InOut[Array]) -> None:
        seen.append(a.data.ptr)
        a *= 2

    with ch.Runtime(workers=4) as rt:
        x, stream = _late(cp, spin)
        with stream:
            A = ch.asarray(x if protocol == "interface" else _ByDlpack(x))
        assert A.shape == (64, 32) and A.dtype == np.float64, (A.shape, A.dtype)
        assert not stream.done, "the host waited for the producer's stream, or it is not late"
        double(A)
        double(A[1:3, ::2]).result()
        first = x.data.ptr
        assert seen == [first, first + 32 * 8], (seen, hex(first))
        assert copies(rt, "host", "gpu(0)") == (0, 0), "the array was copied in"
        expected = EXPECTED * 2
        expected[1:3, ::2] *= 2
        assert copies(rt, "gpu(0)", "host") == (0, 0)
        found = A.numpy()
        np.testing.assert_array_equal(found, expected, "the host's copy differs")
        with A.host("rw") as h:
            np.testing.assert_array_equal(x.get(), expected, "x in a block of host()")
            h[5] = 7
        expected[5] = 7
        double(A[:2])
        expected[:2] *= 2
    np.testing.assert_array_equal(x.get(), expected, "x after the end")
    with pytest.raises(ch.AccessError, match="released"):
        A.numpy()


@pytest.mark.parametrize("own", [False, True])
def test_a_tensor_of_torch_comes_in_without_a_copy(torch: Any, own: bool) -> None:
    stream = torch.cuda.Stream() if own else torch.cuda.default_stream()
    values = torch.from_numpy(EXPECTED).to("cuda:0")
    x = torch.full((64, 32), -1.0, dtype=torch.float64, device="cuda:0", requires_grad=own)

    def produce() -> None:
        with torch.cuda.stream(stream), torch.no_grad():
            torch.cuda._sleep(400_000_000)
            x.copy_(values)

    # What is loaded first waits until all that runs on the device has ended.
    produce()
    with torch.no_grad():
        torch.cuda.synchronize()
        x.fill_(-1)
        torch.cuda.synchronize()
    seen: list[int] = []

    @ch.task(placement=gpu(0), array_library="torch")
    def double(a: ch.InOut[Array]) -> None:
        seen.append(a.data_ptr())
        a.mul_(2)

    with ch.Runtime(workers=4) as rt:
        produce()
        with torch.cuda.stream(stream):
            A = ch.asarray(x)
        assert not stream.query(), "the host waited for the producer's stream, or it is not late"
        double(A).result()
        assert seen == [x.data_ptr()], (seen, x.data_ptr())
        assert copies(rt, "host", "gpu(0)") == (0, 0), "the tensor was copied in"
        np.testing.assert_array_equal(A.numpy(), EXPECTED * 2, "the host's copy differs")
        double(A)
        A.release()
        found = x.detach().cpu().numpy()
        np.testing.assert_array_equal(found, EXPECTED * 4, "x after release()")


@pytest.mark.gpu(2)
def test_an_array_that_came_in_serves_the_other_gpu(cp: Any, spin: Spin) -> None:
    x, stream = _late(cp, spin, 1)
    before = cp.cuda.runtime.getDevice()

    @ch.task
    def add(a: ch.InOut[Array], value: float) -> None:
        assert a.device.id == ch.current().device.index
        a += value

    with ch.Runtime(workers=4) as rt:
        # CuPy names the stream that is current on the array's device, whatever device is current.
        with cp.cuda.Device(1):
            stream.use()
        A = ch.asarray(x)
        with cp.cuda.Device(1):
            cp.cuda.Stream.null.use()
        assert cp.cuda.runtime.getDevice() == before
        for turn in range(6):
            add.options(placement=gpu(turn % 2))(A, 1.0)
        for row in range(64):
            add.options(placement=gpu(row % 2))(A[row], float(row))
        expected = EXPECTED + 6 + np.arange(64.0)[:, None]
        with A.host() as h:
            np.testing.assert_array_equal(h, expected, "on the host")
        assert copies(rt, "host", "gpu(1)") == (0, 0), "the array was copied in"
    np.testing.assert_array_equal(x.get(), expected, "x after the end")


def test_memory_that_came_in_is_kept_and_never_freed(cp: Any) -> None:
    pool = cp.get_default_memory_pool()
    device = cp.cuda.Device(0)
    device.synchronize()
    before = pool.used_bytes()
    x = cp.arange(MiB, dtype=np.int64)
    pointer = x.data.ptr

    @ch.task(placement=gpu(0))
    def total(a: ch.In[Array], s: ch.Out[Array]) -> None:
        assert a.data.ptr == pointer
        s[...] = a.sum()

    with ch.Runtime(workers=4) as rt:
        A, S = ch.asarray(x), ch.empty(1, np.int64)
        del x
        other = cp.zeros(MiB, np.int64)
        assert other.data.ptr != pointer, "the memory went back to its pool"
        total(A, S)
        A.evict(gpu(0)).result()
        total(A, S)
        assert S.numpy()[0] == MiB * (MiB - 1) // 2
        assert copies(rt, "gpu(0)", "host")[1] == 8, "what was taken over was evicted"
        del A, other
    del total
    assert pool.used_bytes() == before, "the memory did not go back to its pool"


def test_what_cannot_be_taken_over_is_copied(rt: ch.Runtime, cp: Any) -> None:
    x = cp.arange(12.0).reshape(3, 4)
    wanted: dict[str, tuple[Any, Any]] = {
        "another order": (ch.asarray(x.T), x.T.get()),
        "with gaps": (ch.asarray(x[:, ::2]), x[:, ::2].get()),
        "another type": (ch.asarray(x, np.float32), x.get().astype("f4")),
        "no elements": (ch.asarray(x[:0]), x[:0].get()),
        "a copy": (ch.array(x), x.get()),
    }

    @ch.task(placement=gpu(0))
    def double(a: ch.InOut[Array]) -> None:
        a *= 2

    for what, (A, expected) in wanted.items():
        assert A.dtype == expected.dtype and A.shape == expected.shape, what
        double(A)
        np.testing.assert_array_equal(A.numpy(), 2 * expected, what)
    np.testing.assert_array_equal(x.get(), np.arange(12.0).reshape(3, 4), "the original")

    @ch.task(placement=gpu(0))
    def keeps(a: ch.In[Array]) -> Any:
        return ch.asarray(a)

    # What a body gets is the runtime's own memory, and elsewhere tomorrow.
    A = ch.array(np.arange(4.0))
    B = keeps(A).result()
    double(A)
    np.testing.assert_array_equal(B.numpy(), np.arange(4.0), "of a body")
