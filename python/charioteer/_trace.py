"""What a trace proves: the face of the checker, which is the core's.

The checker is in Rust (``charioteer::trace::check``); its module documentation says what is
evidence, what is claimed, and what is proved.
"""

from __future__ import annotations

from os import PathLike
from typing import NamedTuple

from charioteer import _core

__all__ = ["OrderCheck", "TraceCheck", "Violation", "check_order", "check_trace"]


class Violation(NamedTuple):
    """A promise of the runtime that a trace shows broken."""

    rule: str
    """What it is about: ``"end"``, ``"order"``, ``"set"``, ``"lending"``, ``"capacity"`` or
    ``"access"``."""
    task: int
    """The number of the task that should not have done what it did."""
    other: int | None
    """The number of the other task that it concerns, if there is one."""
    text: str
    """Who did what on which device and stream, and what is missing."""

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


class TraceCheck(NamedTuple):
    """What the check of a trace came to."""

    tasks: int
    """Tasks that the trace has."""
    grants: int
    """How often a task was granted devices, a set being one grant."""
    pairs: int
    """Pairs of a body and a dependency whose order was looked at."""
    violations: tuple[Violation, ...]
    """What was broken; empty if every promise was kept."""


class OrderCheck(NamedTuple):
    """What the check of the order of accesses came to."""

    accesses: int
    """Accesses of tasks that ran."""
    pairs: int
    """Pairs of accesses whose order was looked at."""
    violations: tuple[Violation, ...]
    """Those that were not in order; empty if all were."""


def check_order(path: str | PathLike[str]) -> OrderCheck:
    """Prove from a trace that tasks used managed arrays in the order in which they were spawned.

    Of every two accesses to one array that overlap, of which one writes at least, the one that was
    spawned first has to have ended before the other began. Evidence is when bodies began and
    ended, as their threads logged it, and nothing that the scheduler believes.

    Args:
        path: the trace file of a runtime that is closed.

    Returns:
        What was looked at and what was broken, with both tasks and the region.

    Raises:
        ValueError: the file is no trace, was cut off, or has a version before 3, which has no
        accesses. OSError: it cannot be read.
    """
    accesses, pairs, broken = _core.check_order(path)
    return OrderCheck(accesses, pairs, tuple(Violation(*each) for each in broken))


def check_trace(path: str | PathLike[str]) -> TraceCheck:
    """Prove from a trace that the runtime kept its promises about tasks and devices.

    Evidence is what the device layer logged at its calls, such as waits of streams and completions
    that the host saw. From that alone it is worked out that no device was ever exceeded, that sets
    were granted as one, that no stream had two bodies, that device work came after that of
    dependencies, and that every task ended once.

    Args:
        path: the trace file of a runtime that is closed.

    Returns:
        What was looked at and what was broken.

    Raises:
        ValueError: the file is no trace, was cut off, or has version 1, which has no evidence.
        OSError: it cannot be read.
    """
    tasks, grants, pairs, broken = _core.check_trace(path)
    return TraceCheck(tasks, grants, pairs, tuple(Violation(*each) for each in broken))
