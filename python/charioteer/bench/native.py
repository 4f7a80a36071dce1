"""Work that releases the GIL: a body of a given duration that computes all the while.

``hashlib`` lets go of the GIL while it digests a large buffer, needs no library beyond the
standard one, and works out of the cache, so that two cores do not share a memory bandwidth. The
buffer's size is fitted to the duration on one thread.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from statistics import median
from time import perf_counter

__all__ = ["bare_threads", "calibrated", "serial"]

_PIECE = 256 * 1024
"""Bytes that are digested again and again: they fit a core's second-level cache."""


def calibrated(seconds: float) -> Callable[[], None]:
    """A function that computes for about so many seconds without the GIL."""
    piece = bytes(_PIECE)

    def digest() -> None:
        hashlib.sha256(piece)

    for _ in range(50):
        digest()
    times = []
    for _ in range(50):
        start = perf_counter()
        digest()
        times.append(perf_counter() - start)
    buffer = bytes(max(4096, round(_PIECE * seconds / median(times))))

    def body() -> None:
        hashlib.sha256(buffer)

    return body


def serial(body: Callable[[], None], tasks: int) -> float:
    """Seconds for so many calls, one after another, on this thread."""
    start = perf_counter()
    for _ in range(tasks):
        body()
    return perf_counter() - start


def bare_threads(body: Callable[[], None], tasks: int, threads: int) -> float:
    """Seconds for as many calls on so many threads with a fixed part each: the machine's limit."""

    def part(calls: int) -> None:
        for _ in range(calls):
            body()

    workers = [
        threading.Thread(target=part, args=(tasks // threads + (index < tasks % threads),))
        for index in range(threads)
    ]
    start = perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return perf_counter() - start
