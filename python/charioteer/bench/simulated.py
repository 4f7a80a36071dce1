"""Programs on virtual GPUs in virtual time: how long they take there, what they move, and what no
schedule comes below.

Protocol. A program runs as it is, in a runtime on virtual GPUs. Each of its array operations lets
its stream be busy for what a GPU would take (:func:`kernel`: a launch, and the larger of what its
arithmetic and its memory take), and copies take what their links say. Work on cores takes no time
on that clock.

What a task was busy for is added up as its operations are enqueued; who waited for whom is in the
trace of the run. Both give the longest chain of tasks and the work over the devices: bounds of any
schedule. (A body that awaits tasks, or a program that waits before it spawns others, is an order
that no trace tells of, so the chain may be longer than is known.) The third one, what the busiest
link was busy for, is a bound of schedules that make the copies that this one made.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import charioteer as ch
from charioteer import _core, virtual
from charioteer.devices import Device

__all__ = ["Run", "kernel", "simulate"]

SECOND = 1e9
LAUNCH = 3e-6
"""Seconds that a kernel takes at least."""
ARITHMETIC = 2e12
"""Floating-point operations a second, of double precision."""
MEMORY = 1e12
"""Bytes a second."""


class Run(NamedTuple):
    """What became of a program."""

    found: Any
    """What it gave."""
    makespan: float
    """Seconds from its beginning, with all data on the host, until it has its result there."""
    moved: int
    """Bytes between memories."""
    chain: float
    """Seconds of the longest chain of tasks."""
    work: float
    """Seconds of all work, over the number of devices."""
    link: float
    """Seconds that the link of one device and direction was busy, of the busiest."""

    @property
    def bound(self) -> float:
        """The largest of the three."""
        return max(self.chain, self.work, self.link)


def kernel(
    name: str, arrays: Sequence[virtual.ndarray], *, arithmetic: float = ARITHMETIC
) -> float:
    """Seconds that a function of NumPy's takes on a GPU.

    Args:
        name: the function's.
        arrays: its operands, then its results.
        arithmetic: floating-point operations a second.
    """
    last = arrays[0].shape[-2:] if arrays else ()
    rows, columns = (1, 1, *last)[-2:]
    most = max((array.size for array in arrays), default=0)
    batch = most // max(rows * columns, 1)
    if name in ("matmul", "dot", "inner", "vdot"):
        operations = 2.0 * columns * arrays[-1].size
    elif name == "cholesky":
        operations = batch * rows**3 / 3
    elif name == "qr":
        operations = 2.0 * batch * rows * columns**2
    elif name == "solve":
        # A triangle is all that programs here solve with.
        operations = float(rows * arrays[-1].size)
    elif name == "inv":
        operations = 2.0 * batch * rows**3
    elif "fft" in name:
        operations = 5.0 * most * math.log2(max(columns, 2))
    elif name in ("sort", "argsort"):
        operations = most * math.log2(max(most, 2))
    else:
        operations = float(most)
    size = sum(array.nbytes for array in arrays)
    return LAUNCH + max(operations / arithmetic, size / MEMORY)


def simulate(program: Callable[[], Any], gpus: int) -> Run:
    """Run a program on so many virtual GPUs, in virtual time.

    Args:
        program: spawns tasks in the runtime that is open, and gives the result, on the host.
        gpus: how many; at least 1.
    """
    busy: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))

    def cost(name: str, arrays: Sequence[virtual.ndarray]) -> float:
        seconds = kernel(name, arrays)
        running = _core.task_stream()
        assert running is not None, "operations are enqueued by bodies on devices"
        busy[running[0]][virtual.current_stream().device] += seconds
        return seconds

    machine = ch.Machine.virtual(gpus=gpus, time="virtual")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace")
        with virtual.timed(cost), ch.Runtime(machine, trace=path) as runtime:
            found = program()
            devices = runtime.devices
            assert devices is not None, "it is open"
            makespan = devices.clock.now / SECOND
            traffic = [
                (ends, number, size)
                for device in runtime.stats()["devices"].values()
                for ends, (number, size) in device["traffic"].items()
            ]
        _, events, _ = ch.read_trace(path)
    tasks = {task: max(times.values()) for task, times in busy.items()}
    work = sum(sum(times.values()) for times in busy.values())
    return Run(
        found,
        makespan,
        sum(size for (source, target), _, size in traffic if source != target),
        _chain(events, tasks),
        work / gpus,
        _busiest(machine, traffic),
    )


def _chain(events: Sequence[tuple[int, int, str, int, int]], seconds: dict[int, float]) -> float:
    """The longest chain of tasks that waited for each other."""
    ends: dict[int, float] = {}
    begins: dict[int, float] = {}
    for _, _, event, task, other in events:
        if event == "spawn":
            begins.setdefault(task, 0.0)
            ends[task] = begins[task] + seconds.get(task, 0.0)
        elif event == "edge":
            # Predecessors were spawned before, and so have their last edge.
            begins[task] = max(begins.get(task, 0.0), ends.get(other, 0.0))
            ends[task] = begins[task] + seconds.get(task, 0.0)
    return max(ends.values(), default=0.0)


def _busiest(machine: ch.Machine, traffic: Sequence[tuple[tuple[str, str], int, int]]) -> float:
    """Seconds that the busiest link of the machine was busy."""
    longest = 0.0
    for (source, target), number, size in traffic:
        if source == target:
            continue
        link = machine.links.between(_device(source), _device(target))
        assert link is not None, "something was copied over it"
        longest = max(longest, number * link.latency + size / link.bandwidth)
    return longest


def _device(name: str) -> Device:
    return ch.cpu(0) if name == "host" else ch.gpu(int(name[4:-1]))
