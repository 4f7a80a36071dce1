"""Policies of one's own: which of its alternatives a task runs on.

``Runtime(policy=...)`` takes the name of a policy, or a callable::

    def earliest(call: Call) -> list[float]:
        return [choice.wait + (choice.estimate or 0.0) for choice in call.choices]

    with ch.Runtime(policy=earliest):
        ...

Protocol. A task that has a choice is mapped when it is ready: the callable is given one
:class:`Call` and answers with one score for each of its choices, in their order. The least score
wins, of equal ones the first. Numbers that are not finite are allowed, but NaN is not; infinity
never wins over a number.

It runs on a thread of its own, one call at a time, or with ``workers=0`` on the thread that made
the task ready. It may spawn tasks and must not wait for any. The task fails with
:class:`PolicyError` if it raises, or if what it answers is no score of each choice; others are not
concerned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from charioteer.devices import Device, gpu
from charioteer.errors import PolicyError

__all__ = ["Call", "Choice", "Model", "Policy"]


class Choice(NamedTuple):
    """One way to run a call now."""

    devices: tuple[Device, ...]
    """The devices other than cores, in the set's order; none of a choice on cores alone."""
    cores: int
    """How many cores; none of a choice on devices alone."""
    estimate: float | None
    """The run time in seconds: measured, else declared, else unknown."""
    wait: float
    """The seconds until cores or devices are free, as far as the run times of the tasks before this
    one are known."""
    load: int
    """How many tasks are before this one: on the device that has the most."""
    local: int
    """How many of the devices ran a task that this one depends on."""


class Call(NamedTuple):
    """A task that is ready."""

    function: str
    """Its function, by module and name."""
    size: int
    """What ``size=`` said, else the bytes of the arrays among its arguments."""
    priority: int
    """Its priority."""
    turn: int
    """How many calls of the function, with this placement, were mapped before."""
    choices: tuple[Choice, ...]
    """At least one. A set that does not name its devices has one choice for each of several sets
    that it may be: the devices of the tasks that this one depends on, those that have the least
    before them, and others in turns."""


Policy: TypeAlias = Callable[[Call], Sequence[float]]
"""Scores the choices of a call; the least score wins."""


class Model(NamedTuple):
    """What is known of the run times of one function, on one kind of set, at one size."""

    function: str
    """The function, by module and name."""
    choice: str
    """The set, such as ``"cpu"`` or ``"gpu*2"``; before an ``@`` the devices that a variant is for,
    if it names any."""
    size: int
    """The size; others within an eighth of it are counted here."""
    calls: int
    """Calls that ran."""
    timed: int
    """Calls of those that were timed."""
    explored: int
    """Calls that were made to try this choice."""
    estimate: float | None
    """The run time in seconds; ``None`` before the first one is measured."""


_Candidate = tuple[tuple[int, ...], int, float | None, float, int, int]


def score(
    policy: Policy,
    function: str,
    size: int,
    priority: int,
    turn: int,
    candidates: Sequence[_Candidate],
) -> int:
    """Asks the user's policy: the place of the choice that wins.

    Raises:
        PolicyError: it raised, or gave no score of each choice.
    """
    choices = tuple(
        Choice(tuple(Device(gpu, index) for index in one[0]), *one[1:]) for one in candidates
    )
    try:
        answer: Any = policy(Call(function, size, priority, turn, choices))
    except Exception as error:
        raise PolicyError(f"the policy raised for {function}: {_shown(error)}") from error
    try:
        scores = [_number(one) for one in answer]
    except Exception as error:
        raise PolicyError(
            f"the policy gave {_kind(answer)} for {function}, not a number for each choice"
        ) from error
    if len(scores) != len(choices):
        raise PolicyError(
            f"the policy gave {len(scores)} scores for {function}, which has {len(choices)} choices"
        )
    if any(one != one for one in scores):
        raise PolicyError(f"the policy gave a score that is not a number for {function}: {scores}")
    return scores.index(min(scores))


def _number(score: Any) -> float:
    if isinstance(score, (str, bytes)):
        raise TypeError(f"{score!r} is no number")
    return float(score)


def _shown(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # what refuses to be shown
        return type(error).__name__


def _kind(answer: object) -> str:
    try:
        return repr(answer)[:200]
    except Exception:  # what refuses to be shown
        return type(answer).__name__
