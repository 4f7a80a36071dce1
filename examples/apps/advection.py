"""A kinetic plasma: transport on devices, and the electric field on the host.

A distribution of electrons over place and velocity is cut into shards along its places. A step
moves every shard along its places by its velocities, then changes velocities by the electric field.
The field follows from the density of all shards: they give theirs, and one task on a core, which
costs little and needs all of them, solves for the field. Shards stay on their devices; what passes
between them is a column to each side, over the link, and what comes to the host is a vector a
shard.

    pip install charioteer
    python examples/apps/advection.py                        # the GPUs there are, else cores
    python examples/apps/advection.py --machine virtual:4

The exit status is 1 if the distribution differs from the serial program's, or electrons were lost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import application
import numpy as np
import numpy.typing as npt

import charioteer as ch

Array = npt.NDArray[np.float64]

SIZES = {
    "tiny": (32, 24, 4),
    "small": (128, 64, 10),
    "medium": (512, 512, 20),
    "large": (2048, 1024, 20),
}
"""Places, velocities, steps."""
SHARDS = 4
FASTEST = 6.0
LENGTH = 4 * np.pi


@dataclass
class Problem:
    """A distribution, with a row a velocity and a column a place."""

    start: Array
    steps: int

    @property
    def speeds(self) -> Array:
        """The velocities of the rows."""
        count = len(self.start)
        return FASTEST * (2 * np.arange(count) + 1 - count)[:, None] / count

    @property
    def width(self) -> float:
        """The distance of two places."""
        return float(LENGTH / self.start.shape[1])

    @property
    def time(self) -> float:
        """A step: nobody moves by more than a place."""
        return float(0.5 * self.width / FASTEST)

    @cached_property
    def end(self) -> Array:
        """The distribution after all steps, by the serial program."""
        return serially(self)


def problem(places: int, velocities: int, steps: int) -> Problem:
    """Electrons at rest on average, a little denser in some places."""
    given = Problem(np.empty((velocities, places)), steps)
    x = given.width * np.arange(places)
    given.start[...] = np.exp(-(given.speeds**2) / 2) * (1 + 0.05 * np.cos(0.5 * x))
    return given


def field(density: Array) -> Array:
    """The electric field of a density, by its Fourier series."""
    waves = 2 * np.pi / LENGTH * np.arange(len(density) // 2 + 1)
    modes = np.fft.rfft(density.mean() - density)
    modes[1:] /= 1j * waves[1:]
    modes[0] = 0
    return np.fft.irfft(modes, len(density))


def transported(xp: Any, f: Any, left: Any, right: Any, given: Problem) -> Any:
    """A shard after its electrons moved for a step; upwind, with a column of each neighbour."""
    part = xp.asarray(given.speeds * given.time / given.width)
    padded = xp.concatenate([left, f, right], axis=1)
    ahead, behind = xp.maximum(part, 0.0), xp.minimum(part, 0.0)
    back = padded[:, 1:-1] - padded[:, :-2]
    forth = padded[:, 2:] - padded[:, 1:-1]
    return f - ahead * back - behind * forth


def accelerated(xp: Any, f: Any, force: Array, given: Problem) -> Any:
    """A shard after the field acted for a step."""
    step = 2 * FASTEST / len(given.start)
    part = xp.asarray(np.clip(-force[None, :] * given.time / step, -1.0, 1.0))
    empty = xp.zeros((1, f.shape[1]))
    padded = xp.concatenate([empty, f, empty], axis=0)
    ahead, behind = xp.maximum(part, 0.0), xp.minimum(part, 0.0)
    return f - ahead * (f - padded[:-2]) - behind * (padded[2:] - f)


def here(xp: Any, array: Any, device: ch.Device) -> Any:
    """An array on the running task's device, over the link if it is on another one."""
    if isinstance(array, np.ndarray) or getattr(array, "device", device) == device:
        return xp.asarray(array)
    copy = xp.empty(array.shape)
    xp.copyto(copy, array)
    return copy


def edged(f: Any) -> tuple[Any, Any, Any]:
    """A shard, and its first and last columns, in one piece each for who is on another device."""
    return f, f[:, :1].copy(), f[:, -1:].copy()


@ch.task
def load(part: Array) -> tuple[Any, Any, Any]:
    """Brings a shard to its device."""
    return edged(ch.current().xp.asarray(part))


@ch.task
def transport(
    shard: tuple[Any, Any, Any],
    left: tuple[Any, Any, Any],
    right: tuple[Any, Any, Any],
    given: Problem,
) -> Any:
    """Moves the electrons of a shard; its neighbours are those of the step before."""
    context = ch.current()
    xp, device = context.xp, context.device
    sides = (here(xp, left[2], device), here(xp, right[1], device))
    return transported(xp, shard[0], *sides, given)


@ch.task
def density(f: Any) -> Any:
    """How many electrons there are at each place of a shard."""
    return f.sum(axis=0)


@ch.task
def solve(parts: list[Any]) -> list[Array]:
    """On a core: the field, a part for each shard."""
    whole = [np.asarray(part if isinstance(part, np.ndarray) else part.get()) for part in parts]
    step = field(np.concatenate(whole) * 2 * FASTEST)
    return np.split(step, len(parts))


@ch.task
def accelerate(f: Any, parts: list[Array], at: int, given: Problem) -> tuple[Any, Any, Any]:
    """Changes the velocities of a shard."""
    return edged(accelerated(ch.current().xp, f, parts[at], given))


def tasks(given: Problem, gpus: int = 0) -> Array:
    """The distribution after all steps, with shards on that many GPUs, or on cores."""
    on = [ch.gpu(at % gpus) if gpus else ch.cpu for at in range(SHARDS)]
    shards = [
        load.options(placement=on[at])(part)
        for at, part in enumerate(np.split(given.start, SHARDS, axis=1))
    ]
    for _ in range(given.steps):
        moved = [
            transport.options(placement=on[at])(
                shards[at], shards[at - 1], shards[(at + 1) % SHARDS], given
            )
            for at in range(SHARDS)
        ]
        parts = [density.options(placement=on[at])(f) for at, f in enumerate(moved)]
        whole = solve.options(placement=ch.cpu, priority=1)(parts)
        shards = [
            accelerate.options(placement=on[at])(f, whole, at, given) for at, f in enumerate(moved)
        ]
    found = [shard.result()[0] for shard in shards]
    return np.concatenate([f if isinstance(f, np.ndarray) else f.get() for f in found], axis=1)


def by_hand(given: Problem, every: application.Every) -> Array:
    """The same with plain NumPy; ``every`` calls a function with each number."""
    shards = np.split(given.start, SHARDS, axis=1)
    for _ in range(given.steps):

        def move(at: int, old: list[Array] = shards) -> Array:
            left, right = old[at - 1][:, -1:], old[(at + 1) % SHARDS][:, :1]
            found: Array = transported(np, old[at], left, right, given)
            return found

        moved = every(move, range(SHARDS))
        parts = solve.fn([f.sum(axis=0) for f in moved])

        def push(at: int, old: list[Array] = moved, parts: list[Array] = parts) -> Array:
            found: Array = accelerated(np, old[at], parts[at], given)
            return found

        shards = every(push, range(SHARDS))
    return np.concatenate(shards, axis=1)


def serially(given: Problem) -> Array:
    """One shard after the other."""
    return by_hand(given, application.in_turn)


def threads(given: Problem, workers: int) -> Array:
    """Shards on threads by hand, half a step after the other."""
    with application.side_by_side(workers) as every:
        return by_hand(given, every)


def error(found: Array, given: Problem) -> float:
    """What part of the electrons is lost; infinite if the distribution is not the serial one."""
    if not np.abs(found - given.end).max() < 1e-12:
        return float("inf")
    return float(abs(found.sum() / given.start.sum() - 1))


LIMIT = 1e-6
"""What that may be: a few electrons leave at the highest velocities."""
CORE: Sequence[Callable[..., object]] = (
    *(load.fn, transport.fn, density.fn, solve.fn, accelerate.fn),
    *(here, tasks),
)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ()
"""Nothing is left to the runtime: shards stay where ``tasks`` puts them."""


if __name__ == "__main__":
    sys.exit(application.main(sys.modules[__name__]))
