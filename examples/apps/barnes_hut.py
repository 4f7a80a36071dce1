"""Barnes-Hut: the forces among many bodies in the plane, and their motion.

Space is a tree of squares. A group of neighbouring bodies looks at squares from the root down: one
that is far away for its size counts as a single body at its centre of mass, others are looked into.
A step is one task for the tree, and two a group: one looks at the tree, on a core, since which
squares it meets only their values tell; the other computes what they do to the group's bodies and
moves these, on a core or a GPU. Groups read the whole tree and write their own bodies; that is all
the order there is.

    pip install charioteer
    python examples/apps/barnes_hut.py

The exit status is 1 if forces are far from those of all pairs, or the motion is not that of the
serial program.
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
from charioteer import cpu, gpu

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SIZES = {"tiny": (600, 2), "small": (2_000, 2), "medium": (10_000, 2), "large": (20_000, 2)}
"""Bodies, steps."""
LEVELS = 6
OPENING = 0.4
"""A square counts as a body where its side is below this part of the distance."""
SOFTENING = 1e-4
STEP = 1e-4
GROUP = 125
"""Bodies of a task."""


@dataclass
class Problem:
    """Bodies in the unit square, in the order of a curve that keeps neighbours together."""

    positions: Array
    velocities: Array
    steps: int

    @cached_property
    def moved(self) -> Array:
        """Where they are after all steps, by the serial program."""
        return serially(self)


@dataclass
class Level:
    """The squares of one level that have bodies: ranges of children or bodies, masses, centres."""

    first: Ints
    last: Ints
    mass: Array
    centre: Array
    side: float


Tree = tuple[Ints, list[Level]]
"""The order of the bodies along the curve, and the levels from the root down."""
Others = tuple[Array, Array]
"""Where what a group meets is, squares and bodies, and their masses."""


def problem(bodies: int, steps: int) -> Problem:
    """Two clouds of bodies."""
    chance = np.random.default_rng(3)
    half = bodies // 2
    clouds = (
        0.3 + 0.1 * chance.standard_normal((half, 2)),
        0.7 + 0.05 * chance.standard_normal((bodies - half, 2)),
    )
    positions = np.clip(np.concatenate(clouds), 0.0, 1.0 - 1e-12)
    order = np.argsort(codes(positions), kind="stable")
    return Problem(positions[order], np.zeros((bodies, 2)), steps)


def codes(positions: Array) -> Ints:
    """The square of the finest level that each body is in, along the curve."""
    cells = np.clip((positions * (1 << LEVELS)).astype(np.int64), 0, (1 << LEVELS) - 1)
    code = np.zeros(len(positions), np.int64)
    for bit in range(LEVELS):
        code |= (cells[:, 0] >> bit & 1) << 2 * bit | (cells[:, 1] >> bit & 1) << (2 * bit + 1)
    return code


def tree(positions: Array) -> Tree:
    """The order of the bodies along the curve, and the levels from the root down."""
    code = codes(positions)
    order = np.argsort(code, kind="stable")
    code, sorted_ = code[order], positions[order]
    levels: list[Level] = []
    below: Ints | None = None
    sums = np.concatenate([np.zeros((1, 2)), np.cumsum(sorted_, axis=0)])
    for level in range(LEVELS, -1, -1):
        cells, begin = np.unique(code >> 2 * (LEVELS - level), return_index=True)
        end = np.append(begin[1:], len(code))
        mass = (end - begin).astype(float)
        centre = (sums[end] - sums[begin]) / mass[:, None]
        if below is None:
            first, last = begin, end
        else:
            first = np.asarray(np.searchsorted(below >> 2, cells))
            last = np.append(first[1:], len(below))
        levels.append(Level(first, last, mass, centre, 2.0**-level))
        below = cells
    return order, levels[::-1]


def ranges(first: Ints, last: Ints) -> Ints:
    """All the numbers from each first to its last."""
    lengths = last - first
    starts = np.repeat(last - np.add.accumulate(lengths), lengths)
    return np.asarray(starts + np.arange(len(starts)))


def met(own: Array, positions: Array, whole: Tree) -> Others:
    """What a group of bodies meets as it looks at a tree."""
    order, levels = whole
    low, high = own.min(axis=0), own.max(axis=0)
    centres, masses = [], []
    squares = np.zeros(1, np.int64)
    for level in levels:
        centre = level.centre[squares]
        beyond = np.maximum(np.maximum(low - centre, centre - high), 0.0)
        far = level.side < OPENING * np.sqrt((beyond**2).sum(axis=1))
        centres.append(centre[far])
        masses.append(level.mass[squares[far]])
        near = squares[~far]
        squares = ranges(level.first[near], level.last[near])
    centres.append(positions[order[squares]])
    masses.append(np.ones(len(squares)))
    return np.concatenate(centres), np.concatenate(masses)


def attraction(own: Any, others: Any, mass: Any) -> Any:
    """What bodies of these masses do to a group's own."""
    x, y = others[:, 0] - own[:, :1], others[:, 1] - own[:, 1:]
    square = x * x + y * y + SOFTENING
    pull = mass / (square * np.sqrt(square))
    return np.stack([(pull * x).sum(axis=1), (pull * y).sum(axis=1)], axis=1)


@ch.task
def build(positions: ch.In[Array]) -> Tree:
    """The tree of a step."""
    return tree(positions)


@ch.task
def look(whole: Tree, positions: ch.In[Array], own: ch.In[Array]) -> Others:
    """What a group meets."""
    return met(own, positions, whole)


@ch.task(placement=[gpu, cpu])
def move(
    others: Others,
    bodies: int,
    own: ch.In[Array],
    velocities: ch.InOut[Array],
    moved: ch.Out[Array],
) -> None:
    """A group's motion in a step."""
    centres, masses = map(ch.current().xp.asarray, others)
    push(centres, masses, bodies, own, velocities, moved)


def push(centres: Any, masses: Any, bodies: int, own: Any, velocities: Any, moved: Any) -> None:
    """The motion of a group, by what it met."""
    velocities += STEP / bodies * attraction(own, centres, masses)
    moved[...] = np.clip(own + STEP * velocities, 0.0, 1.0 - 1e-12)


def tasks(given: Problem, gpus: int = 0) -> Array:
    """Where the bodies are after all steps."""
    groups = -(-len(given.positions) // GROUP)
    old, new = ch.array(given.positions, name="even"), ch.array(given.positions, name="odd")
    velocities = ch.array(given.velocities, name="velocities").shards(groups)
    for _ in range(given.steps):
        whole = build.options(priority=1)(old)
        for own, velocity, moved in zip(
            old.shards(groups), velocities, new.shards(groups), strict=True
        ):
            move(look(whole, old, own), len(given.positions), own, velocity, moved)
        old, new = new, old
    return np.asarray(old.numpy())


def by_hand(given: Problem, every: application.Every) -> Array:
    """The same with plain NumPy; ``every`` calls a function with each number."""
    positions, velocities = given.positions.copy(), given.velocities.copy()
    groups = -(-len(positions) // GROUP)
    edges = np.cumsum([0, *map(len, np.array_split(positions, groups))])
    for _ in range(given.steps):
        whole, moved = tree(positions), np.empty_like(positions)

        def group(at: int, old: Array = positions, new: Array = moved, whole: Tree = whole) -> None:
            part = slice(edges[at], edges[at + 1])
            others = met(old[part], old, whole)
            push(*others, len(old), old[part], velocities[part], new[part])

        every(group, range(groups))
        positions = moved
    return positions


def serially(given: Problem) -> Array:
    """One group after the other."""
    return by_hand(given, application.in_turn)


def threads(given: Problem, workers: int) -> Array:
    """Groups on threads by hand, step by step."""
    with application.side_by_side(workers) as every:
        return by_hand(given, every)


def error(found: Array, given: Problem) -> float:
    """How far the forces on some bodies are from those of all pairs, relatively; infinite if the
    motion is not the serial one."""
    if not np.abs(found - given.moved).max() < 1e-13:
        return float("inf")
    own = given.positions[:GROUP]
    right = attraction(own, given.positions, np.ones(len(given.positions)))
    wrong = attraction(own, *met(own, given.positions, tree(given.positions))) - right
    return float(np.linalg.norm(wrong) / np.linalg.norm(right))


LIMIT = 2e-2
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (build.fn, look.fn, move.fn, push, tasks)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ("move",)
"""What may run on cores or on GPUs."""


if __name__ == "__main__":
    sys.exit(application.main(sys.modules[__name__]))
