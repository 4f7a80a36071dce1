"""What a trace proves: the face of the checker, which is the core's.

The checker is in Rust (``charioteer::trace::check``); its module documentation says what is
evidence, what is claimed, and what is proved.
"""

from __future__ import annotations

from os import PathLike
from typing import NamedTuple

from charioteer import _core

__all__ = ["MoveCheck", "OrderCheck", "TraceCheck", "Violation", "check_order", "check_trace"]


class Violation(NamedTuple):
    """A promise of the runtime that a trace shows broken."""

    rule: str
    """What it is about: ``"end"``, ``"order"``, ``"set"``, ``"lending"``, ``"capacity"``,
    ``"access"``, ``"coherence"`` or ``"transfer"``."""
    task: int
    """The number of the task that should not have done what it did; of a copy, the one that wrote
    what it copies, or 0."""
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


class MoveCheck(NamedTuple):
    """What was moved between the memories of a machine."""

    copies: int
    """Copies from one memory to another."""
    bytes: int
    """Their bytes."""
    local: int
    """Bytes that were copied within the memory of a device."""
    dropped: int
    """Instances that were dropped."""
    reads: int
    """Reads of pieces of arrays for which it was looked at that the last version was there."""
    best: int
    """Bytes that Belady's rule, which knows the future, would have moved for the same schedule and
    memory."""


class OrderCheck(NamedTuple):
    """What the check of accesses came to."""

    accesses: int
    """Accesses of tasks that ran."""
    pairs: int
    """Pairs of accesses whose order was looked at."""
    violations: tuple[Violation, ...]
    """What was broken; empty if all was well."""
    moves: MoveCheck | None = None
    """What was moved; none of a trace before version 4."""


def check_order(path: str | PathLike[str]) -> OrderCheck:
    """Prove from a trace that managed arrays were used in spawn order, and were where tasks ran.

    Of every two accesses to one array that overlap, of which one writes at least, the one that was
    spawned first has to have ended before the other began. Who reads on a device, or on the host,
    has to find the last version there, behind the copy that brought it, and what is copied must not
    be there already. Evidence is when bodies on cores began and ended, as their threads logged it,
    and of work on devices what the devices logged at each call: waits of streams, and what the host
    saw complete; and nothing that the scheduler or the store believes.

    Args:
        path: the trace file of a runtime that is closed.

    Returns:
        What was looked at, what was moved, and what was broken, with both tasks and the region.

    Raises:
        ValueError: the file is no trace, was cut off, or has a version before 3, which has no
        accesses. OSError: it cannot be read.
    """
    accesses, pairs, moved, broken = _core.check_order(path)
    moves = None if moved is None else MoveCheck(*moved)
    return OrderCheck(accesses, pairs, tuple(Violation(*each) for each in broken), moves)


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
