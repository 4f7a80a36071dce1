"""What the applications of this folder have in common: one interface, by which they are run,
checked and measured.

Each is a module that is a script too, and has

* ``SIZES``: what ``problem`` is called with, by the names *tiny* (for tests), *small*, *medium* and
  *large*;
* ``problem(*size)``: what is to be done, the same at every call;
* ``serially(given)``: a reference, one kernel after the other on the thread that calls it;
* ``threads(given, workers)``: the same kernels on threads by hand, as one would write it without a
  runtime for tasks;
* ``tasks(given, gpus=0)``: the same as tasks of the runtime that is open. It is one source for
  cores, virtual GPUs and those of CUDA: where a task runs the runtime decides, among what its
  function is declared for, and arrays come there. Applications that keep data on a device say
  where, and that is what ``gpus``, how many the machine has, is for; others do not look at it;
* ``error(found, given)`` and ``LIMIT``: how far what any of the three gave is from right, and how
  far it may be;
* ``CORE``: what a user writes for the tasks, bodies and the program that spawns them;
* ``PORTABLE``: the names of task functions that may run on cores or on GPUs. In virtual time, where
  cores take no time, they are held to GPUs (:func:`on_gpus`).

:func:`in_turn` and :func:`side_by_side` serve those programs by hand in which threads meet after
each step.

``study.py`` measures them; ``python examples/apps/NAME.py`` runs one and checks it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, cast

import charioteer as ch


class Application(Protocol):
    """A module with what the documentation above says."""

    __name__: str
    __doc__: str | None
    SIZES: Mapping[str, tuple[Any, ...]]
    LIMIT: float
    CORE: Sequence[Callable[..., object]]
    PORTABLE: Sequence[str]
    problem: Callable[..., Any]
    serially: Callable[[Any], Any]
    threads: Callable[[Any, int], Any]
    tasks: Callable[..., Any]
    error: Callable[[Any, Any], float]


Every = Callable[[Callable[[int], Any], Iterable[int]], list[Any]]
"""Calls a function with each number, and gives what that gives, in their order. The serial program
and that on threads differ in this alone."""


def in_turn(function: Callable[[int], Any], numbers: Iterable[int]) -> list[Any]:
    """One after the other."""
    return [function(number) for number in numbers]


@contextmanager
def side_by_side(workers: int) -> Generator[Every]:
    """On a pool of threads; a call ends when all are done."""
    with ThreadPoolExecutor(workers) as executor:
        yield lambda function, numbers: list(executor.map(function, numbers))


@contextmanager
def on_gpus(app: Application) -> Generator[None]:
    """Holds an application's functions to GPUs, in a block, where they may run on cores too."""
    free = {name: getattr(app, name) for name in app.PORTABLE}
    for name, function in free.items():
        setattr(app, name, function.options(placement=ch.gpu))
    try:
        yield
    finally:
        for name, function in free.items():
            setattr(app, name, function)


def main(module: object, arguments: Sequence[str] | None = None) -> int:
    """Runs an application's tasks once and checks what they gave.

    Args:
        module: the application.
        arguments: of the command line.

    Returns:
        0; 1 if the result is wrong.
    """
    app = cast(Application, module)
    title = (app.__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--size", choices=app.SIZES, default="small")
    parser.add_argument("--machine", help="virtual:4, or a machine file; else what is found")
    parser.add_argument("--workers", type=int, help="cores (default: those of the machine)")
    options = parser.parse_args(arguments)
    given = app.problem(*app.SIZES[options.size])
    with ch.Runtime(options.machine, workers=options.workers) as runtime:
        start = time.perf_counter()
        found = app.tasks(given, len(runtime.machine.gpus))
        seconds = time.perf_counter() - start
        spawned = runtime.stats()["spawned"]
    wrong = app.error(found, given)
    print(
        f"{options.size}: {spawned:,} tasks in {1e3 * seconds:.0f} ms,"
        f" error {wrong:.1e} of {app.LIMIT:.0e} at most"
    )
    return 0 if wrong <= app.LIMIT else 1
