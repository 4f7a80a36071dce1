"""Bodies of a known duration.

:func:`spinning` is the paper's kernel: the body spins in C, a part of it holding the GIL, in
slices. :func:`pure` is a loop of bytecode. Both last so long on a thread that nobody disturbs; what
they take beyond that in a run is what the runtime and the GIL cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from time import perf_counter

from charioteer import _core

__all__ = ["CYCLES", "SPIN", "count", "pure", "rounds_in", "spinning"]

SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
}
"""
"""A kernel that occupies its stream for so long, to a microsecond: so often the timer moves on."""

CYCLES = r"""
extern "C" __global__ void spin(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {
    }
}
extern "C" __global__ void count(long long nanoseconds, long long* cycles) {
    long long start, now;
    const long long first = clock64();
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
    *cycles = clock64() - first;
}
"""
"""Kernels that occupy their stream for so many cycles of the GPU's clock, and tell how many go into
a time."""


def spinning(seconds: float, held: float, slices: int) -> Callable[[], None]:
    """A body that spins so long, the part ``held`` attached to the interpreter, in ``slices``.

    In each slice it first spins attached and then detached. Where no part is held, it still
    attaches between the slices, as code does that calls into C again and again.
    """
    work = _core.work
    if held == 0 and slices > 1:
        piece = seconds / slices

        def sliced() -> None:
            for _ in range(slices):
                work(piece)

        return sliced

    def whole() -> None:
        work(seconds, held, slices)

    return whole


def count(rounds: int) -> int:
    """Count down in bytecode alone."""
    while rounds > 0:
        rounds -= 1
    return rounds


@functools.cache
def rounds_in(seconds: float) -> int:
    """How many rounds of :func:`count` take so long on a thread of their own."""
    rounds = 1_000
    while True:
        # The quickest of a few: what disturbs a run only ever makes it longer.
        best = min(_timed(rounds) for _ in range(5))
        if best >= min(seconds, 0.005):
            return max(1, round(rounds * seconds / best))
        rounds *= 2


def _timed(rounds: int) -> float:
    start = perf_counter()
    count(rounds)
    return perf_counter() - start


def pure(rounds: int) -> Callable[[], None]:
    """A body of bytecode: so many rounds of :func:`count`."""

    def body() -> None:
        count(rounds)

    return body
