"""Records: what one benchmark result says, and the machine, interpreter and commit it stands for.

A record is one metric of one runtime at one case, over all runs. It carries everything that is
needed to read it alone, so files of several machines can be concatenated. A measurement that could
not be made has a record too, with ``runs`` 0, no values, and the reason in ``params["missing"]``.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Record",
    "commit",
    "cpu_model",
    "gil_enabled",
    "machine",
    "python_version",
    "record",
    "usable_cores",
    "write_json",
]


@dataclass(frozen=True)
class Record:
    """One metric of one runtime at one case.

    ``median``, ``min`` and ``max`` are in ``unit`` and ``None`` when nothing was measured; ``runs``
    counts the values behind them, which are ``values``, in the order of the runs. ``bar`` is the
    limit that the median has to meet, such as ``≤ 1.5 x``, and ``met`` whether it does; both are
    ``None`` where there is none, and ``met`` also where nothing was measured.
    """

    benchmark: str
    runtime: str
    case: str
    params: Mapping[str, Any]
    metric: str
    unit: str
    median: float | None
    min: float | None
    max: float | None
    runs: int
    values: Sequence[float]
    bar: str | None
    met: bool | None
    machine: str
    python: str
    commit: str


def record(
    benchmark: str,
    runtime: str,
    case: str,
    params: Mapping[str, Any],
    metric: str,
    unit: str,
    values: Sequence[float],
    *,
    python: str | None = None,
    bar: str | None = None,
    met: bool | None = None,
) -> Record:
    """Summarise ``values`` as a record of this machine.

    Args:
        values: one value a run, in ``unit``; empty if nothing was measured.
        python: the interpreter that ran it; this one if left out.
        bar: the limit that the median has to meet, in words.
        met: whether it does.
    """
    return Record(
        benchmark=benchmark,
        runtime=runtime,
        case=case,
        params=dict(params),
        metric=metric,
        unit=unit,
        median=statistics.median(values) if values else None,
        min=min(values) if values else None,
        max=max(values) if values else None,
        runs=len(values),
        values=tuple(values),
        bar=bar,
        met=met,
        machine=machine(),
        python=python_version() if python is None else python,
        commit=commit(),
    )


def write_json(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write ``records`` to ``path`` as a JSON list; the file is replaced whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps([asdict(entry) for entry in records], indent=1) + "\n")
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


@functools.cache
def machine() -> str:
    """Describe the machine: processor, usable cores, kernel; nothing that names the host."""
    return f"{cpu_model()}, {usable_cores()} cores, {_kernel()}"


def _kernel() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


@functools.cache
def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"model name", "Model"}:
                return value.strip()
    except OSError:
        pass  # Not Linux.
    if sys.platform == "darwin":
        answer = _output(["sysctl", "-n", "machdep.cpu.brand_string"])
        if answer:
            return answer
    return platform.processor() or platform.machine() or "unknown processor"


def usable_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gil_enabled() -> bool:
    """Whether this interpreter runs with the GIL now."""
    check = getattr(sys, "_is_gil_enabled", None)
    return True if check is None else bool(check())


def python_version() -> str:
    """The interpreter in words, such as ``CPython 3.13.5 free-threaded``."""
    flavour = "" if gil_enabled() else " free-threaded"
    return f"{platform.python_implementation()} {platform.python_version()}{flavour}"


@functools.cache
def commit() -> str:
    """The git commit that this package's source is checked out at, else the package's version.

    A commit with local changes ends in ``-dirty``. A copy installed inside somebody else's
    repository does not count as a checkout of ours: the file itself must be tracked. Where there is
    none, ``CHARIOTEER_COMMIT`` may say what was installed.
    """
    folder = str(Path(__file__).parent)
    git = ["git", "-C", folder]
    if _output([*git, "ls-files", "--error-unmatch", Path(__file__).name]):
        head = _output([*git, "rev-parse", "--short=12", "HEAD"])
        if head:
            changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
            return f"{head}-dirty" if changed else head
    from charioteer import __version__

    return os.environ.get("CHARIOTEER_COMMIT") or f"version {__version__}"


def _output(command: Sequence[str]) -> str:
    """The command's output, or nothing where it is not installed or fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
