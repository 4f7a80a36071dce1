"""Measurements that need a process of their own.

Memory and processor time are those of a process, an import happens once in a process, and peers
with their own schedulers must not live on beside other runs. Each of these is a *probe*: a
function here, run as ``python -m charioteer.bench.probes NAME PARAMS`` with the parameters as
JSON, which prints one line of JSON: ``{"values": {...}, "curve": [...], "python": ...}`` or
``{"missing": ...}``.
:func:`call` starts one, possibly under another interpreter, and reads that line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import charioteer as ch
from charioteer.bench import gil_runs, metg_runs, peers, records, workloads
from charioteer.bench.harness import Missing, Sample

__all__ = ["PROBES", "ProbeError", "call", "gil_enabled", "import_time"]

MIB = 2**20
ROTATION = 1_000
"""Tasks in one of the rotating task spaces before the next takes its place."""
PENDING_LIMIT = 10_000
"""Unfinished tasks at most while ten million run one after another."""


class ProbeError(Exception):
    """A probe ended without a result; the message is the last line that it complained with."""


def call(name: str, *, python: str | None = None, timeout: float = 600.0, **params: Any) -> Sample:
    """Run the probe ``name`` in a new process and return its sample.

    Args:
        python: the interpreter to run it with, which must have charioteer; this one if left out.
        timeout: seconds after which it is stopped.
        params: the probe's parameters.

    Raises:
        Missing: the probe lacks something that is not installed.
        ProbeError: it failed, or ran into the timeout.
    """
    # -P: a folder called charioteer in the current directory must not be taken for the package.
    command = [python or sys.executable, "-P", "-m", __name__, name, json.dumps(params)]
    answer = json.loads(_last_line(command, timeout))
    if "missing" in answer:
        raise Missing(answer["missing"])
    curve = [(time, efficiency) for time, efficiency in answer["curve"]]
    return Sample(answer["values"], answer["python"], curve)


def import_time(module: str) -> Sample:
    """Milliseconds that ``import module`` takes in a new process, after NumPy's for charioteer."""
    code = "import time; start = time.perf_counter(); import numpy\n"
    if module != "numpy":
        code += f"import {module}\n"
    code += "print(1e3 * (time.perf_counter() - start))"
    return Sample({"time": float(_last_line([sys.executable, "-P", "-c", code], 60.0))})


def gil_enabled(python: str) -> bool:
    """Whether the interpreter at the path ``python`` runs with the GIL.

    Raises:
        ProbeError: it cannot be run.
    """
    code = "import sys; print(getattr(sys, '_is_gil_enabled', lambda: True)())"
    return _last_line([python, "-c", code], 60.0) == "True"


def _last_line(command: list[str], timeout: float) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer within {timeout:g} s") from None
    except OSError as error:
        raise ProbeError(f"cannot run {command[0]}: {error.strerror}") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        complaint = done.stderr.strip().splitlines()
        raise ProbeError(complaint[-1] if complaint else f"exit status {done.returncode}")
    return lines[-1]


def _empty(workers: int, tasks: int) -> dict[str, float]:
    """Microseconds a task for empty tasks, after a first run that is not counted."""
    workloads.empty(max(1, tasks // 10), workers)
    return {"time per task": 1e6 * workloads.empty(tasks, workers) / tasks}


def _peer(peer: str, workers: int, tasks: int) -> dict[str, float]:
    """Microseconds a task for the empty tasks of a peer."""
    return {"time per task": 1e6 * peers.PEERS[peer].empty(tasks, workers) / tasks}


def _multi_device(peer: str, width: int, devices: int, tasks: int) -> dict[str, float]:
    """Microseconds a task for a peer's empty tasks over several devices."""
    return {"time per task": 1e6 * peers.MULTI_DEVICE[peer](width, devices, tasks) / tasks}


def _pending(tasks: int, keep: bool) -> dict[str, float]:
    """Bytes of resident memory a task that waits for a task which is spawned last."""
    space = ch.TaskSpace("gate")
    kept = []
    with ch.Runtime(workers=1) as runtime:
        for future in [runtime.submit(int) for _ in range(1_000)]:
            future.result()
        before = _resident()
        for index in range(tasks):

            @ch.spawn(dependencies=[space[0]])
            def task() -> int:
                return index

            if keep:
                kept.append(task)
        after = _resident()

        @ch.spawn(space[0])
        def gate() -> None:
            return None

    return {"memory per task": (after - before) / tasks}


def _anonymous(tasks: int) -> dict[str, float]:
    """MiB by which memory grows over the last nine tenths of many tasks without names."""
    growth = _Growth()
    with ch.Runtime(workers=1, max_pending=PENDING_LIMIT):
        for index in range(tasks):

            @ch.spawn
            def task() -> int:
                return index

            growth.after(index + 1, tasks)
    return growth.values()


def _rotating(tasks: int) -> dict[str, float]:
    """The same over task spaces that take turns, the tasks of each in a chain."""
    growth = _Growth()
    space = ch.TaskSpace("rotating")
    with ch.Runtime(workers=1, max_pending=PENDING_LIMIT):
        for index in range(tasks):
            place = index % ROTATION
            if place == 0:
                space = ch.TaskSpace("rotating")

            @ch.spawn(space[place], dependencies=[space[place - 1]])
            def task() -> int:
                return index

            growth.after(index + 1, tasks)
    return growth.values()


def _cholesky(n: int, repetitions: int) -> dict[str, float]:
    """The growth of memory over factorizations of the same tiles, with empty tasks."""
    growth = _Growth()
    A = ch.zeros((n, n)).tiles((1, 1))
    with ch.Runtime(workers=2):
        for repetition in range(repetitions):
            workloads.spawn_cholesky(A)
            A.base.numpy()
            growth.after(repetition + 1, repetitions)
    return growth.values()


class _Growth:
    """Resident memory at every tenth of a run, against that after the first tenth."""

    def __init__(self) -> None:
        self._samples: list[int] = []

    def after(self, done: int, tasks: int) -> None:
        if done * 10 % tasks < 10:
            self._samples.append(_resident())

    def values(self) -> dict[str, float]:
        first, *rest = self._samples
        return {"growth": (max(rest) - first) / MIB, "resident memory": max(rest) / MIB}


def _idle(workers: int, seconds: float) -> dict[str, float]:
    """Processor milliseconds in ten seconds of an open runtime that has nothing to do."""
    with ch.Runtime(workers=workers) as runtime:
        runtime.submit(int).result()
        time.sleep(0.2)  # Whatever the task has woken goes back to sleep first.
        start = time.process_time()
        time.sleep(seconds)
        used = time.process_time() - start
    return {"processor time": 1e3 * used * 10 / seconds}


def _gil(run: str, given: dict[str, Any]) -> dict[str, float]:
    """A run of the GIL study, after one that is not counted.

    That is a small one where the tasks last long, and else a whole one, which leaves memory behind
    that the tasks of the other can use.
    """
    function = gil_runs.RUNS[run]
    if run == "shared":
        function(**given)
    elif "tasks" in given:
        function(**given | {"tasks": min(given["tasks"], 20)})
    return function(**given)


def _resident() -> int:
    """Bytes of physical memory that this process holds.

    Raises:
        Missing: the system has no /proc and psutil is not installed.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return int(peers.load("psutil").Process().memory_info().rss)
    return pages * os.sysconf("SC_PAGE_SIZE")


PROBES: dict[str, Callable[..., dict[str, float] | Sample]] = {
    "anonymous": _anonymous,
    "empty": _empty,
    "gil": _gil,
    "idle": _idle,
    "metg": metg_runs.sample,
    "cholesky": _cholesky,
    "multi_device": _multi_device,
    "peer": _peer,
    "pending": _pending,
    "rotating": _rotating,
}


def _main(name: str, params: str) -> None:
    try:
        found = PROBES[name](**json.loads(params))
        made = found if isinstance(found, Sample) else Sample(found)
        answer: dict[str, Any] = {
            "values": made.values,
            "curve": list(made.curve),
            "python": records.python_version(),
        }
    except Missing as reason:
        answer = {"missing": str(reason)}
    # Peers may leave a word on standard output; the answer is the last line.
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
