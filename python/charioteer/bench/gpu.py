"""``charioteer bench gpu``: what a task on real GPUs costs, beside the loops that people write.

Most measures need CuPy, and one GPU, or two for tasks over two; native kernels and their chains by
regions need none of CuPy, so that a Python without the GIL is measured with them. Where PyTorch is
installed, empty tasks are measured with it imported too, in a process of its own. What cannot be
measured is told as such.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

import charioteer as ch
from charioteer import gpu
from charioteer.bench import gpu_data
from charioteer.bench.bodies import SPIN
from charioteer.bench.command import (
    OptionError,
    add_outcome_arguments,
    add_runs_argument,
    carry_out,
    choice,
    positive,
)
from charioteer.bench.gpu_data import PER_TASK, PLAIN, WAITS, Chain, plain_chain
from charioteer.bench.harness import (
    OURS,
    Bar,
    Contestant,
    Key,
    Measure,
    Missing,
    Sample,
    absolute,
    ratio,
)

__all__ = ["DESCRIPTION", "SUMMARY", "OptionError", "add_arguments", "measures", "run"]

BENCHMARK = "gpu"

SUMMARY = "what a task on real GPUs costs, beside plain CuPy"

DESCRIPTION = """\
Measure tasks on real GPUs: empty ones on one GPU and on two, with 1, 4 and 16 workers and with
PyTorch imported; a chain of small additions, by CuPy and as native kernels, beside the same loop in
plain CuPy and what the driver takes alone; native kernels that 1 and 4 threads spawn; how soon a
result is told beside a wait for the stream, and a short task beside a long one. And managed arrays:
a chain by regions, copies, kernels that copies hide behind beside streams by hand, tiled Cholesky
and matrix products beside one library call, k-means and Jacobi's iteration on one GPU and on two, a
Fourier transform and a sort over two beside what the link allows, and a working set that is larger
than the memory.
"""

WORKERS = (1, 4, 16)
SPAWNERS = (1, 4)
"""How many threads spawn native kernels."""
DRIVER = "the driver alone"
"""A loop in Rust that launches as many kernels, an event behind each: no tasks."""
DELAY = "time to the result"
EMPTY = {1: 5.0, 2: 9.0}
"""Microseconds that an empty task over so many GPUs may cost."""
GROWTH = 1.3
TORCH = 1.3
CHAIN = 1.5
NATIVE = 0.6
REGIONS = 3.5
"""Microseconds that a native kernel with two regions may cost in a chain."""
LATE = 20.0
"""Microseconds that a result may be later than a stream that is waited for."""
BESIDE = 200.0
USUAL = ("empty", "torch", "two", "chain", "kernel", "result", "beside", *gpu_data.NAMES)
NAMES = (*USUAL, "soak")
"""The soak takes a while, and is made when it is asked for."""
SOAK = 1_000_000
GROWN = 16.0
"""MiB that host or device memory may be larger after the soak than after a tenth of it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    add_runs_argument(parser)
    parser.add_argument(
        "--tasks", type=positive, metavar="N", help="tasks in one run (default: 20000)"
    )
    parser.add_argument(
        "--only", metavar="A,B", help=f"some of {', '.join(NAMES)} (default: all but soak)"
    )
    for name, default in vars(gpu_data.Sizes()).items():
        words = _SIZES[name]
        parser.add_argument(
            f"--{name}", type=positive, metavar="N", help=f"{words} (default: {default})"
        )
    add_outcome_arguments(parser)


_SIZES = {
    "length": "tasks of the chain by regions",
    "region": "bytes of a region that is copied",
    "cholesky": "rows of the matrix that is factored",
    "tile": "rows of its tiles",
    "product": "rows of the matrices that are multiplied",
    "fft": "rows and columns of the image that is transformed",
    "keys": "keys that are sorted",
    "points": "points that are clustered",
    "grid": "inner rows of Jacobi's grid",
    "budget": "bytes of the memory that the larger working set may use",
}


def run(options: argparse.Namespace) -> int:
    """Make the measures, print them, write the records.

    Returns:
        0; 1 if a run of charioteer itself failed, or with ``--check`` if a bar does not hold.

    Raises:
        OptionError: the options name an unknown measure, or a file that cannot be written.
    """
    only = choice("measure", options.only, NAMES) or USUAL
    said = {name: getattr(options, name) for name in _SIZES}
    sizes = gpu_data.Sizes(**{name: size for name, size in said.items() if size is not None})
    chosen = [one for one in measures(options.tasks or 20_000, sizes) if one.name in only]
    return carry_out(BENCHMARK, chosen, options.runs or 5, options)


def measures(tasks: int, sizes: gpu_data.Sizes) -> list[Measure]:
    """All measures, with so many tasks a run and problems of these sizes."""
    params = _devices()
    return [
        _empty(1, tasks, params),
        _torch(tasks, params),
        _empty(2, tasks, params),
        _chain(min(tasks, 10_000), params),
        _kernel(tasks, params),
        _result(params),
        _beside(params),
        _soak(params),
        *gpu_data.measures(sizes, params, _need),
    ]


def _devices() -> dict[str, Any]:
    """What the records say of the devices."""
    gpus = ch.Machine.detect().gpus
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        driver = said.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return {"devices": [one.name for one in gpus], "driver": driver}


def _count(gpus: int) -> None:
    """That there are as many GPUs."""
    found = len(ch.Machine.detect().gpus)
    if found < gpus:
        raise Missing(f"{gpus} GPUs: there are {found}")


def _need(gpus: int) -> Any:
    """CuPy, where there are as many GPUs."""
    _count(gpus)
    try:
        import cupy
    except ImportError:
        raise Missing("CuPy is not installed") from None
    return cupy


def empty(width: int, workers: int, tasks: int) -> float:
    """Seconds for so many empty tasks over ``width`` GPUs, from the first spawn to the end of the
    last. The runtime's start and the devices' are not in it."""
    _need(width)

    @ch.task(placement=gpu if width == 1 else gpu * width)
    def body() -> None:
        return None

    with ch.Runtime(workers=workers):
        ch.wait([body() for _ in range(200)])
        start = perf_counter()
        ch.wait([body() for _ in range(tasks)])
        return perf_counter() - start


def _ours(width: int, workers: int, tasks: int) -> Sample:
    return Sample({PER_TASK: 1e6 * empty(width, workers, tasks) / tasks})


def _empty(width: int, tasks: int, params: dict[str, Any]) -> Measure:
    case = f"empty task, {width} GPU" + ("s" if width > 1 else "")
    one, most = (Key(OURS, case, workers) for workers in (min(WORKERS), max(WORKERS)))
    growth = Bar(
        case=case,
        metric=f"{most.workers} workers / {one.workers}",
        unit="x",
        values=ratio(most, one, PER_TASK),
        limit=GROWTH,
        lacking="both numbers of workers",
    )
    return Measure(
        name="empty" if width == 1 else "two",
        title=f"An empty task on {width} GPU" + ("s" if width > 1 else ""),
        contestants=[
            Contestant(OURS, case, functools.partial(_ours, width, workers, tasks), workers, params)
            for workers in WORKERS
        ],
        units={PER_TASK: "µs"},
        bars=[
            *(absolute(case, PER_TASK, "µs", EMPTY[width], workers) for workers in WORKERS),
            growth,
        ],
        note="From the first spawn until the last is complete, over their number.",
    )


_PROBE = """
import json, sys
if sys.argv[1] == "torch":
    import torch
    torch.cuda.init()
import cupy
from charioteer.bench.gpu import empty
print(json.dumps(1e6 * empty(1, 4, int(sys.argv[2])) / int(sys.argv[2])))
"""


def _apart(library: str, tasks: int) -> Sample:
    """Empty tasks in a process of its own, with or without PyTorch."""
    _need(1)
    from importlib.util import find_spec

    if library == "torch" and find_spec("torch") is None:
        raise Missing("PyTorch is not installed")
    command = [sys.executable, "-c", _PROBE, library, str(tasks)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if said.returncode != 0:
        raise RuntimeError(said.stderr.strip().splitlines()[-1])
    return Sample({PER_TASK: json.loads(said.stdout.splitlines()[-1])})


def _torch(tasks: int, params: dict[str, Any]) -> Measure:
    cases = {"cupy": "empty task, CuPy imported", "torch": "empty task, CuPy and PyTorch imported"}
    keys = {library: Key(OURS, case, 4) for library, case in cases.items()}
    return Measure(
        name="torch",
        title="An empty task on 1 GPU, 4 workers, with PyTorch imported",
        contestants=[
            Contestant(OURS, case, functools.partial(_apart, library, tasks), 4, params)
            for library, case in cases.items()
        ],
        units={PER_TASK: "µs"},
        bars=[
            Bar(
                case=cases["torch"],
                metric="with PyTorch / without",
                unit="x",
                values=ratio(keys["torch"], keys["cupy"], PER_TASK),
                limit=TORCH,
                lacking="PyTorch",
            )
        ],
        runs=3,
        warmup=0,
    )


def _chain(length: int, params: dict[str, Any]) -> Measure:
    case = f"chain of {length} additions"

    def plain() -> Sample:
        return plain_chain(_need(1), length)

    def chained(add: Any, *arguments: Any) -> Sample:
        """So many tasks, each after the one before by its name."""
        with ch.Runtime(workers=1) as rt:
            add(*arguments).result()
            T = ch.TaskSpace("T")
            with Chain(rt, length) as chain:
                last = add.options(T[0])(*arguments)
                for i in range(1, length):
                    last = add.options(T[i], dependencies=T[i - 1])(*arguments)
                last.result()
        return chain.sample

    def ours() -> Sample:
        cupy = _need(1)
        x, y = _vectors(cupy)

        @ch.task(placement=gpu(0))
        def add() -> None:
            cupy.add(x, y, out=x)

        sample = chained(add)
        assert float(x[0]) == length + 1
        return sample

    def native() -> Sample:
        x, y = _vectors(_need(1))
        sample = chained(_add()[8, 128], x, y)
        assert float(x[0]) == length + 1
        return sample

    def regions() -> Sample:
        _count(1)
        X, Y = ch.zeros(1024, "f4"), ch.full(1024, 1, "f4")
        add = _add()[8, 128]
        with ch.Runtime(workers=1) as rt:
            add(X, Y).result()
            with Chain(rt, length) as chain:
                last = add(X, Y)
                for _ in range(1, length):
                    last = add(X, Y)
                last.result()
            assert X.numpy()[0] == length + 1
        return chain.sample

    def driver() -> Sample:
        x, y = _vectors(_need(1))
        launch: Any = _add()[8, 128].fn

        @ch.task(placement=gpu(0))
        def many() -> float:
            return ch._core.launch_loop(launch, length, x, y)

        with ch.Runtime(workers=1):
            many().result()
            sample = Sample({PER_TASK: 1e6 * many().result() / length})
        assert float(x[0]) == 2 * length
        return sample

    kernels = f"chain of {length} native kernels"
    inferred = f"chain of {length} native kernels by regions"

    return Measure(
        name="chain",
        title="A chain of cupy.add(x, y, out=x), 1,024 numbers, one a task, by names",
        contestants=[
            Contestant(PLAIN, case, plain, None, params),
            Contestant(DRIVER, kernels, driver, None, params),
            Contestant(OURS, case, ours, 1, params),
            Contestant(OURS, kernels, native, 1, params),
            Contestant(OURS, inferred, regions, 1, params),
        ],
        units={PER_TASK: "µs", WAITS: ""},
        bars=[
            Bar(
                case=case,
                metric=f"{OURS} / {PLAIN}",
                unit="x",
                values=ratio(Key(OURS, case, 1), Key(PLAIN, case), PER_TASK),
                limit=CHAIN,
                lacking=PLAIN,
            ),
            absolute(case, WAITS, "", 0, 1),
            Bar(
                case=kernels,
                metric=f"{OURS} / {PLAIN}",
                unit="x",
                values=ratio(Key(OURS, kernels, 1), Key(PLAIN, case), PER_TASK),
                limit=NATIVE,
                lacking=PLAIN,
            ),
            absolute(kernels, WAITS, "", 0, 1),
            absolute(inferred, PER_TASK, "µs", REGIONS, 1),
            Bar(
                case=inferred,
                metric=f"{OURS} / {PLAIN}",
                unit="x",
                values=ratio(Key(OURS, inferred, 1), Key(PLAIN, case), PER_TASK),
                limit=NATIVE,
                lacking=PLAIN,
            ),
            absolute(inferred, WAITS, "", 0, 1),
        ],
    )


def _vectors(cupy: Any) -> tuple[Any, Any]:
    x, y = cupy.zeros(1024, cupy.float32), cupy.ones(1024, cupy.float32)
    cupy.cuda.get_current_stream().synchronize()
    return x, y


def _add() -> ch.Kernel:
    """``x += y`` for 1,024 numbers, as what CuPy launches for that."""
    return ch.kernel(
        r"""
extern "C" __global__ void add(float* x, const float* y) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < 1024) x[at] += y[at];
}
""",
        "add",
        ("*f4", "const *f4"),
        placement=gpu(0),
    )


def _nothing() -> ch.Kernel:
    return ch.kernel('extern "C" __global__ void nothing() {}', "nothing", (), placement=gpu(0))


def _kernel(tasks: int, params: dict[str, Any]) -> Measure:
    case = "a task that is one native kernel"

    def ours(workers: int) -> Sample:
        x, y = _vectors(_need(1))
        add = _add()
        with ch.Runtime(workers=workers):
            add[8, 128](x, y).result()
            start = perf_counter()
            ch.wait([add[8, 128](x, y) for _ in range(tasks)])
            time = perf_counter() - start
        assert float(x[0]) == tasks + 1
        return Sample({PER_TASK: 1e6 * time / tasks})

    def spawned(threads: int, by_regions: bool) -> Sample:
        _count(1)
        each = -(-tasks // threads)
        launch: Any = _add()[8, 128] if by_regions else _nothing()[1, 1]
        arguments: list[tuple[Any, ...]] = [
            (ch.zeros(1024, "f4"), ch.full(1024, 1, "f4")) if by_regions else ()
            for _ in range(threads)
        ]
        spawned: list[ch.Task[None]] = []
        gate = threading.Barrier(threads + 1)

        def spawn(given: tuple[Any, ...]) -> None:
            gate.wait()
            if by_regions:
                for _ in range(each - 1):
                    launch(*given)
                spawned.append(launch(*given))
            else:
                spawned.extend([launch() for _ in range(each)])

        with ch.Runtime(workers=1):
            ch.wait([launch(*given) for given in arguments])
            spawners = [threading.Thread(target=spawn, args=(given,)) for given in arguments]
            for thread in spawners:
                thread.start()
            gate.wait()
            start = perf_counter()
            for thread in spawners:
                thread.join()
            ch.wait(spawned)
            time = perf_counter() - start
            assert len(spawned) == (1 if by_regions else each) * threads
            assert all(given[0].numpy()[0] == each + 1 for given in arguments if given)
        return Sample({PER_TASK: 1e6 * time / (each * threads)})

    def by(threads: int, what: str) -> str:
        return f"{what}, {threads} spawning thread" + ("s" if threads > 1 else "")

    ways = {
        "an empty native kernel without data": False,
        "a native kernel with two regions, a chain a thread": True,
    }
    return Measure(
        name="kernel",
        title="Native kernels on 1 GPU, each of which takes all of it",
        contestants=[
            *(
                Contestant(OURS, case, functools.partial(ours, workers), workers, params)
                for workers in WORKERS
            ),
            *(
                Contestant(
                    OURS,
                    by(threads, what),
                    functools.partial(spawned, threads, by_regions),
                    1,
                    params,
                )
                for what, by_regions in ways.items()
                for threads in SPAWNERS
            ),
        ],
        units={PER_TASK: "µs"},
        bars=[],
        note="From the first spawn until the last is complete, over their number. Independent, "
        "unless said; those that threads spawn need no CuPy.",
    )


def _spin(cupy: Any) -> Callable[[float], None]:
    """What occupies the current stream for so many seconds."""
    kernel = cupy.RawKernel(SPIN, "spin")

    def spin(seconds: float) -> None:
        kernel((1,), (1,), (cupy.int64(1e9 * seconds),))

    return spin


TIMES = 200
KERNEL = 1e-4


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _result(params: dict[str, Any]) -> Measure:
    case = "result of a kernel of 100 µs"

    def waits(blocking: bool) -> Sample:
        cupy = _need(1)
        spin = _spin(cupy)
        event = cupy.cuda.Event(block=True, disable_timing=True)
        times = []
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for _ in range(TIMES):
                start = perf_counter()
                spin(KERNEL)
                if blocking:
                    event.record(stream)
                    event.synchronize()
                else:
                    stream.synchronize()
                times.append(1e6 * (perf_counter() - start))
        return Sample({DELAY: _median(times)})

    def ours() -> Sample:
        spin = _spin(_need(1))

        @ch.task(placement=gpu(0))
        def body() -> None:
            spin(KERNEL)

        times = []
        with ch.Runtime(workers=4):
            for _ in range(TIMES):
                start = perf_counter()
                body().result()
                times.append(1e6 * (perf_counter() - start))
        return Sample({DELAY: _median(times)})

    blocking = f"{PLAIN}, a thread that sleeps"
    key = Key(OURS, case, 4)

    def later(result: Any) -> list[float]:
        if key not in result or Key(blocking, case) not in result:
            return []
        mine, theirs = (result[one].values.get(DELAY, []) for one in (key, Key(blocking, case)))
        return [a - b for a, b in zip(mine, theirs, strict=False)]

    return Measure(
        name="result",
        title="From the spawn, or the launch, until the host knows",
        contestants=[
            Contestant(PLAIN, case, functools.partial(waits, False), None, params),
            Contestant(blocking, case, functools.partial(waits, True), None, params),
            Contestant(OURS, case, ours, 4, params),
        ],
        units={DELAY: "µs"},
        bars=[
            Bar(
                case=case,
                metric=f"later than {blocking}",
                unit="µs",
                values=later,
                limit=LATE,
                lacking=blocking,
            )
        ],
    )


def _beside(params: dict[str, Any]) -> Measure:
    case = "a task of 10 µs beside one of 1 s"

    def ours() -> Sample:
        spin = _spin(_need(1))

        @ch.task(placement=gpu(0), share=0.5)
        def body(seconds: float) -> None:
            spin(seconds)

        times = []
        with ch.Runtime(workers=4):
            body(1e-5).result()
            long = body(1.0)
            for _ in range(TIMES):
                start = perf_counter()
                body(1e-5).result()
                times.append(1e6 * (perf_counter() - start))
            assert not long.done()
        return Sample({DELAY: _median(times), "the latest": max(times)})

    return Measure(
        name="beside",
        title="From the spawn of a short task until its result, beside a long one",
        contestants=[Contestant(OURS, case, ours, 4, params)],
        units={DELAY: "µs", "the latest": "µs"},
        bars=[absolute(case, DELAY, "µs", BESIDE + 10, 4)],
        note="The kernel's 10 µs are in it.",
    )


def _soak(params: dict[str, Any]) -> Measure:
    case = f"{SOAK:,} tasks"

    def ours() -> Sample:
        cupy = _need(1)
        x, y = _vectors(cupy)
        add = _add()[8, 128]

        @ch.task(placement=gpu(0))
        def body(x: Any) -> Any:
            return x + 1

        def some(count: int) -> None:
            """Kernels and bodies that allocate, chained and on their own."""
            for _ in range(count // 1000):
                T = ch.TaskSpace("T")
                for i in range(0, 996, 4):
                    add.options(T[i], dependencies=T[i - 1])(x, y)
                    body.options(T[i + 1], dependencies=T[i])(x)
                    add.options(T[i + 2], dependencies=T[i + 1])(x, y)
                    body.options(T[i + 3])(x)
                for _ in range(4):
                    add(x, y)
                T[:].result()

        def held() -> tuple[float, float]:
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[1])
            free, total = cupy.cuda.runtime.memGetInfo()
            return pages * 4096 / (1 << 20), (total - free) / (1 << 20)

        with ch.Runtime(workers=4):
            some(SOAK // 10)
            before = held()
            start = perf_counter()
            some(SOAK - SOAK // 10)
            time = perf_counter() - start
            after = held()
        return Sample(
            {
                PER_TASK: 1e6 * time / (SOAK - SOAK // 10),
                "host memory grew": after[0] - before[0],
                "device memory grew": after[1] - before[1],
            }
        )

    return Measure(
        name="soak",
        title="Many tasks in one runtime",
        contestants=[Contestant(OURS, case, ours, 4, params)],
        units={PER_TASK: "µs", "host memory grew": "MiB", "device memory grew": "MiB"},
        bars=[
            absolute(case, "host memory grew", "MiB", GROWN, 4),
            absolute(case, "device memory grew", "MiB", GROWN, 4),
        ],
        runs=1,
        warmup=0,
        note="Native kernels and bodies that allocate; from a tenth of them on.",
    )
