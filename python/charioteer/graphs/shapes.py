"""Shapes of task graphs: which task depends on which, and nothing else.

A :class:`Shape` is a list of tasks in an order in which a program could spawn them, each with the
earlier tasks that it depends on. A *pattern* is a family of shapes. Most patterns are rows of
*width* tasks, *depth* of them, of which each depends on some of the row before; the others, such as
a reduction or a factorization, follow from their width alone. :data:`PATTERNS` has all of them.

Where a pattern involves chance, the seed decides: the same arguments give the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

__all__ = [
    "PATTERNS",
    "RADIX",
    "Pattern",
    "Shape",
    "any_dag",
    "make",
    "reduction",
    "sized",
]

RADIX = 5
"""On how many tasks one depends in the patterns ``nearest`` and ``spread``."""


@dataclass(frozen=True)
class Shape:
    """Tasks in the order of their spawning.

    Attributes:
        name: what it is called, mostly its pattern.
        before: for each task the tasks that it depends on, all of them earlier.
        kinds: the function of each task; empty if they are all alike.
        names: an index for each task, for people; empty if their number will do.
    """

    name: str
    before: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...] = ()
    names: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.before)

    @cached_property
    def edges(self) -> int:
        """How many dependencies there are."""
        return sum(map(len, self.before))

    @cached_property
    def levels(self) -> list[list[int]]:
        """The tasks by the length of the longest chain that ends in them."""
        return levels(self.before)

    def ideal(self, seconds: float, held: float, workers: int, *, gil: bool = True) -> float:
        """The least seconds it can take with tasks of ``seconds``, the part ``held`` attached.

        No machine does more than ``workers`` tasks at once, no interpreter with a GIL more than
        one attached part, and no order ends before the longest chain has.
        """
        serial = len(self) * seconds
        bounds = [serial / workers, len(self.levels) * seconds]
        if gil:
            bounds.append(serial * held)
        return max(bounds)


def levels(before: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tasks by the length of the longest chain that ends in them."""
    level: list[int] = []
    for needs in before:
        level.append(1 + max((level[index] for index in needs), default=-1))
    found: list[list[int]] = [[] for _ in range(max(level, default=-1) + 1)]
    for index, at in enumerate(level):
        found[at].append(index)
    return found


# ---- rows ---------------------------------------------------------------------------------------
#
# What a task of one row depends on is a set of columns of the row before. The patterns are those of
# Task Bench (Slaughter et al., *Task Bench: A Parameterized Benchmark for Evaluating Parallel
# Runtime Performance*, SC 2020); columns that are not there are left out.

Needs = Callable[[int, int, int, int], set[int]]
"""Of a step, a column, the width and a seed: the columns of the step before."""


def _chains(step: int, x: int, width: int, seed: int) -> set[int]:
    return {x}


def _stencil(step: int, x: int, width: int, seed: int) -> set[int]:
    return {x - 1, x, x + 1}


def _sweep(step: int, x: int, width: int, seed: int) -> set[int]:
    return {x - 1, x}


def _fft(step: int, x: int, width: int, seed: int) -> set[int]:
    apart = 1 << (step - 1) % max(1, (width - 1).bit_length())
    return {x - apart, x, x + apart}


def _tree(step: int, x: int, width: int, seed: int) -> set[int]:
    # It fans out until it is as wide as the graph, and keeps to its columns from there on.
    return {x // 2} if 1 << (step - 1) < width else {x}


def _nearest(step: int, x: int, width: int, seed: int) -> set[int]:
    return set(range(x - RADIX // 2, x + (RADIX + 1) // 2))


def _spread(step: int, x: int, width: int, seed: int) -> set[int]:
    return {(x + step + at * width // RADIX) % width for at in range(RADIX)}


def _random(step: int, x: int, width: int, seed: int) -> set[int]:
    chosen = Random((seed << 32) + step * width + x)
    return {x, *(at for at in _nearest(step, x, width, seed) if chosen.random() < 0.5)}


def _all_to_all(step: int, x: int, width: int, seed: int) -> set[int]:
    return set(range(width))


def _rows(
    name: str, widths: Iterable[int], width: int, needs: Needs | None, seed: int = 0
) -> Shape:
    before: list[tuple[int, ...]] = []
    names = []
    first = last = 0
    for step, here in enumerate(widths):
        for x in range(here):
            names.append((step, x))
            if step == 0 or needs is None:
                before.append(())
                continue
            columns = sorted(at for at in needs(step, x, width, seed) if 0 <= at < last)
            before.append(tuple(first - last + at for at in columns))
        first += here
        last = here
    return Shape(name, tuple(before), (), tuple(names))


def _row_pattern(name: str, needs: Needs | None) -> Callable[[int, int, int], Shape]:
    def make(width: int, depth: int, seed: int) -> Shape:
        return _rows(name, [width] * depth, width, needs, seed)

    return make


def _make_tree(width: int, depth: int, seed: int) -> Shape:
    return _rows("tree", [min(width, 1 << step) for step in range(depth)], width, _tree)


def _stencil_2d(width: int, depth: int, seed: int) -> Shape:
    """A square of points over time: the largest that is no wider than ``width``."""
    side = math.isqrt(width)

    def needs(step: int, at: int, points: int, seed: int) -> set[int]:
        row, column = divmod(at, side)
        near = {at}
        near |= {at - side} if row > 0 else set()
        near |= {at + side} if row < side - 1 else set()
        near |= {at - 1} if column > 0 else set()
        near |= {at + 1} if column < side - 1 else set()
        return near

    return _rows("stencil2d", [side * side] * depth, side * side, needs)


# ---- trees --------------------------------------------------------------------------------------


def reduction(width: int, fan: int = 2) -> Shape:
    """``width`` tasks whose results are combined, ``fan`` at a time, until there is one.

    Raises:
        ValueError: ``width`` is below 1, or ``fan`` below 2.
    """
    if width < 1 or fan < 2:
        raise ValueError("a reduction has one task at least, and a fan of two")
    before: list[tuple[int, ...]] = [()] * width
    kinds = ["block"] * width
    names = [(0, x) for x in range(width)]
    row, level = 0, list(range(width))
    while len(level) > 1:
        row += 1
        groups = [level[at : at + fan] for at in range(0, len(level), fan)]
        # One that is left alone goes on to the next row, as the last of it.
        odd = groups.pop() if len(groups[-1]) == 1 else []
        level = [*range(len(before), len(before) + len(groups)), *odd]
        names += [(row, x) for x in range(len(groups))]
        kinds += ["add"] * len(groups)
        before += [tuple(group) for group in groups]
    return Shape("reduction", tuple(before), tuple(kinds), tuple(names))


def _reduction(width: int, depth: int, seed: int) -> Shape:
    return reduction(width)


def _scatter(width: int, depth: int, seed: int) -> Shape:
    """A reduction with its arrows reversed: from one task to ``width``."""
    forth = reduction(width)
    last = len(forth) - 1
    after: list[list[int]] = [[] for _ in forth.before]
    for index, before in enumerate(forth.before):
        for at in before:
            after[last - at].append(last - index)
    rows = max(row for row, _ in forth.names)
    names = [(rows - row, x) for row, x in reversed(forth.names)]
    return Shape("scatter", tuple(tuple(sorted(needs)) for needs in after), (), tuple(names))


def _reduction_scatter(width: int, depth: int, seed: int) -> Shape:
    """Rows of tasks and single tasks that gather them, in turn."""
    widths = [1 if step % 2 else width for step in range(depth)]
    return _rows("reduction_scatter", widths, width, _all_to_all)


def _map_reduce(width: int, depth: int, seed: int) -> Shape:
    """Rounds of ``width`` maps, each read by all of a quarter as many reductions, of which each map
    of the next round reads one."""
    fewer = max(1, width // 4)
    widths = [width if step % 2 == 0 else fewer for step in range(2 * depth)]

    def needs(step: int, x: int, width: int, seed: int) -> set[int]:
        return set(range(width)) if step % 2 else {x % fewer}

    rows = _rows("map_reduce", widths, width, needs)
    kinds = tuple("reduce" if step % 2 else "map" for step, _ in rows.names)
    return Shape(rows.name, rows.before, kinds, rows.names)


# ---- factorizations -----------------------------------------------------------------------------


class _Tiled:
    """A factorization as tasks on tiles: who writes a tile comes after who wrote it last, and after
    who wrote last what it reads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._before: list[tuple[int, ...]] = []
        self._kinds: list[str] = []
        self._names: list[tuple[int, ...]] = []
        self._wrote: dict[tuple[int, int], int] = {}

    def add(
        self, kind: str, name: tuple[int, ...], *tiles: tuple[int, int], writes: int = 1
    ) -> None:
        """A task on these tiles, of which it writes the first ``writes``."""
        here = len(self._before)
        needs = (self._wrote[tile] for tile in tiles if tile in self._wrote)
        self._before.append(tuple(dict.fromkeys(needs)))
        self._kinds.append(kind)
        self._names.append(name)
        for tile in tiles[:writes]:
            self._wrote[tile] = here

    def shape(self) -> Shape:
        return Shape(self._name, tuple(self._before), tuple(self._kinds), tuple(self._names))


def _cholesky(tiles: int, depth: int, seed: int) -> Shape:
    """Right-looking, on the lower triangle. A name is the tile that is written and the step."""
    made = _Tiled("cholesky")
    for k in range(tiles):
        made.add("potrf", (k, k, k), (k, k))
        for i in range(k + 1, tiles):
            made.add("trsm", (i, k, k), (i, k), (k, k))
        for i in range(k + 1, tiles):
            for j in range(k + 1, i):
                made.add("gemm", (i, j, k), (i, j), (i, k), (j, k))
            made.add("syrk", (i, i, k), (i, i), (i, k))
    return made.shape()


def _lu(tiles: int, depth: int, seed: int) -> Shape:
    """Right-looking, pivoting within tiles alone."""
    made = _Tiled("lu")
    for k in range(tiles):
        made.add("getrf", (k, k, k), (k, k))
        for j in range(k + 1, tiles):
            made.add("trsm", (k, j, k), (k, j), (k, k))
        for i in range(k + 1, tiles):
            made.add("trsm", (i, k, k), (i, k), (k, k))
        for i in range(k + 1, tiles):
            for j in range(k + 1, tiles):
                made.add("gemm", (i, j, k), (i, j), (i, k), (k, j))
    return made.shape()


def _qr(tiles: int, depth: int, seed: int) -> Shape:
    """The tiles of a column one after the other onto its diagonal."""
    made = _Tiled("qr")
    for k in range(tiles):
        made.add("geqrt", (k, k, k), (k, k))
        for j in range(k + 1, tiles):
            made.add("unmqr", (k, j, k), (k, j), (k, k))
        for i in range(k + 1, tiles):
            made.add("tsqrt", (i, k, k), (i, k), (k, k), writes=2)
            for j in range(k + 1, tiles):
                made.add("tsmqr", (i, j, k), (i, j), (k, j), (i, k), writes=2)
    return made.shape()


# ---- at random ----------------------------------------------------------------------------------


def any_dag(tasks: int, window: int, seed: int, *, most: int = 3) -> Shape:
    """So many tasks with up to ``most`` dependencies each, among the ``window`` tasks before."""
    chance = Random(seed)
    before: list[tuple[int, ...]] = []
    for task in range(tasks):
        near = range(max(0, task - window), task)
        found = {chance.choice(near) for _ in range(chance.randrange(most + 1))} if near else set()
        before.append(tuple(sorted(found)))
    return Shape("dag", tuple(before))


def _dag(width: int, depth: int, seed: int) -> Shape:
    return any_dag(width * depth, 2 * width, seed)


# ---- all of them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """A family of shapes.

    Attributes:
        name: what it is chosen by.
        summary: what it is, in a few words.
        shape: the shape of a width, a depth and a seed.
        has_depth: whether the depth says anything; else it follows from the width.
        tiles: whether the width counts the tiles along an axis of a matrix.
    """

    name: str
    summary: str
    shape: Callable[[int, int, int], Shape]
    has_depth: bool = True
    tiles: bool = False


PATTERNS: Mapping[str, Pattern] = {
    pattern.name: pattern
    for pattern in (
        Pattern("independent", "tasks without dependencies", _row_pattern("independent", None)),
        Pattern(
            "chains", "each after the one before it in its column", _row_pattern("chains", _chains)
        ),
        Pattern("reduction", "results combined in pairs until there is one", _reduction, False),
        Pattern("scatter", "a reduction the other way round", _scatter, False),
        Pattern("tree", "from one task to twice as many each step", _make_tree),
        Pattern(
            "reduction_scatter", "a row, one task that gathers it, a row, …", _reduction_scatter
        ),
        Pattern("stencil", "a row of points over time", _row_pattern("stencil", _stencil)),
        Pattern("stencil2d", "a square of points over time", _stencil_2d),
        Pattern("sweep", "each after its own and its left column", _row_pattern("sweep", _sweep)),
        Pattern("fft", "a butterfly", _row_pattern("fft", _fft)),
        Pattern("cholesky", "the factorization of a tiled matrix", _cholesky, False, True),
        Pattern("lu", "likewise, without pivoting between tiles", _lu, False, True),
        Pattern("qr", "likewise, one tile of a column after the other", _qr, False, True),
        Pattern("map_reduce", "rounds of maps that all reductions read", _map_reduce),
        Pattern("dag", "up to three tasks of the last rows, at random", _dag),
        Pattern(
            "random", "its own column and near ones, at random", _row_pattern("random", _random)
        ),
        Pattern(
            "all_to_all",
            "each after all of the row before",
            _row_pattern("all_to_all", _all_to_all),
        ),
        Pattern("nearest", f"the {RADIX} nearest columns", _row_pattern("nearest", _nearest)),
        Pattern("spread", f"{RADIX} columns far apart", _row_pattern("spread", _spread)),
    )
}


def make(name: str, width: int, depth: int | None = None, seed: int = 0) -> Shape:
    """The shape of that pattern.

    Args:
        name: the pattern's name.
        width: tasks of a row; tiles along an axis for a factorization.
        depth: rows. For a pattern whose depth follows from its width, ``None``.
        seed: decides where the pattern involves chance.

    Raises:
        ValueError: there is no such pattern, a number is below 1, or the depth does not fit.
    """
    pattern = PATTERNS.get(name)
    if pattern is None:
        raise ValueError(f"there is no pattern {name!r}; known: {', '.join(PATTERNS)}")
    if pattern.has_depth and depth is None:
        raise ValueError(f"{name} needs a depth")
    if not pattern.has_depth and depth is not None:
        raise ValueError(f"{name} has the depth that follows from its width")
    if width < 1 or (depth is not None and depth < 1):
        raise ValueError("width and depth are 1 or more")
    return pattern.shape(width, depth or 1, seed)


def sized(name: str, tasks: int, width: int, seed: int = 0) -> Shape:
    """The shape of that pattern with about so many tasks.

    Args:
        name: the pattern's name.
        tasks: how many tasks; one row at least.
        width: tasks of a row, where the pattern has a depth; else the width is the largest with at
            most so many tasks.
        seed: decides where the pattern involves chance.

    Raises:
        ValueError: as :func:`make`.
    """
    pattern = PATTERNS.get(name)
    if pattern is None or pattern.has_depth:
        width = min(width, max(1, tasks))
        depth = max(1, tasks // width)
        if name == "map_reduce":
            depth = max(1, tasks // (width + max(1, width // 4)))
        elif name == "reduction_scatter":
            depth = max(1, 2 * (tasks // (width + 1)))
        elif name == "stencil2d":
            depth = max(1, tasks // math.isqrt(width) ** 2)
        elif name == "independent" and tasks % width:
            # Rows mean nothing there, so that the number can be kept.
            return Shape(name, ((),) * tasks)
        return make(name, width, depth, seed)
    count = _COUNTS[name]
    width = 1
    while count(2 * width) <= tasks:
        width *= 2
    # The largest of those that suffice: counts grow with the width.
    step = width
    while step > 1:
        step //= 2
        if count(width + step) <= tasks:
            width += step
    return make(name, width, None, seed)


def _square_sum(tiles: int) -> int:
    """Tasks of a factorization that works on all that is right of and below each diagonal tile."""
    return tiles * (tiles + 1) * (2 * tiles + 1) // 6


_COUNTS: Mapping[str, Callable[[int], int]] = {
    "reduction": lambda width: 2 * width - 1,
    "scatter": lambda width: 2 * width - 1,
    "cholesky": lambda tiles: tiles * (tiles + 1) * (tiles + 2) // 6,
    "lu": _square_sum,
    "qr": _square_sum,
}
"""Tasks of the patterns without a depth, by their width."""
