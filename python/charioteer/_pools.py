"""BLAS and OpenMP held to the cores that a task has.

While a runtime is open, thread pools of numerical libraries have one thread, since the tasks
themselves are parallel; a task over several cores has them raised to its cores while its body runs.
Libraries whose limit belongs to the process (OpenBLAS with threads of its own, BLIS) follow the
widest task that runs; those whose limit belongs to each thread (OpenMP, MKL) are set by each worker
before it runs a body. Libraries that are loaded while the runtime is open are found when the number
of imported modules changes. Closing the runtime gives every library its former limit back.

``threadpoolctl`` finds the libraries. Where a limit belongs to the process it lets only the thread
that set it first change it, and ignores the others; which body is the widest changes on any thread,
so such a limit is set by the library's own function.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

_lock = threading.RLock()
_open = False


class _Library:
    """A library with a thread pool."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        self._set = _setter(controller)
        openmp = getattr(controller, "threading_layer", None) == "openmp"
        self.each_thread: bool = (
            controller.user_api == "openmp"
            or controller.internal_api == "mkl"
            or (controller.internal_api == "openblas" and openmp)
        )
        """Whether each thread has its own limit."""
        self.former = self.limit
        """What limit the process had, if it is the process that has one."""

    @property
    def limit(self) -> int:
        threads: int = self._controller.num_threads
        return threads

    @limit.setter
    def limit(self, threads: int) -> None:
        self._set(threads)


def _setter(controller: Any) -> Callable[[int], object]:
    """What sets a library's limit, from any thread."""
    own: Callable[[int], object] | None = None
    if controller.internal_api == "openblas" and controller.threading_layer != "openmp":
        own = controller._get_symbol("openblas_set_num_threads")
    elif controller.internal_api == "mkl":
        # Versions of threadpoolctl differ in whether they set the process or the thread.
        own = getattr(controller.dynlib, "MKL_Set_Num_Threads_Local", None)
    if own is None:
        own = controller.set_num_threads
    return own


class _Wide:
    """A body over several cores that runs."""

    def __init__(self, cores: int) -> None:
        self.cores = cores


class _Thread(threading.local):
    """What the limits that belong to a thread are on this one."""

    def __init__(self) -> None:
        self.former: dict[str, int] = {}
        """By file, the limits that the thread had before it ran bodies."""
        self.wide: list[_Wide] = []
        """The bodies over several cores that run on it, the innermost last."""

    def apply(self) -> None:
        threads = self.wide[-1].cores if self.wide else 1
        for path, library in _known.items():
            if library.each_thread:
                self.former.setdefault(path, library.limit)
                library.limit = threads

    def restore(self) -> None:
        for path, threads in self.former.items():
            _known[path].limit = threads
        self.former.clear()


_known: dict[str, _Library] = {}
"""By file."""
_thread = _Thread()
_wide: set[_Wide] = set()
"""Those of all threads."""
_looked_at = -1
"""How many modules there were when libraries were looked for."""


def _changed() -> None:
    from charioteer import _core

    _core.limits_changed(len(sys.modules))


def _look() -> None:
    """Finds the libraries that are loaded now."""
    global _looked_at
    if len(sys.modules) == _looked_at:
        return
    if any(name in sys.modules for name in ("numpy", "scipy", "torch", "sklearn", "numexpr")):
        from threadpoolctl import ThreadpoolController

        for controller in ThreadpoolController().lib_controllers:
            if controller.filepath not in _known:
                _known[controller.filepath] = _Library(controller)
    _looked_at = len(sys.modules)


def _apply() -> None:
    """Sets the limits that belong to the process."""
    threads = max((body.cores for body in _wide), default=1)
    for library in _known.values():
        if not library.each_thread and library.limit != threads:
            library.limit = threads


def open_limits() -> None:
    """A runtime opens."""
    global _open
    with _lock:
        _open = True
        _look()
        for library in _known.values():
            # The user may have changed it since the last runtime.
            library.former = library.limit
        _apply()
    _changed()


def close_limits() -> None:
    """The runtime closed: everything is as it was."""
    global _open
    with _lock:
        if not _open:
            return
        _open = False
        _wide.clear()
        for library in _known.values():
            if not library.each_thread:
                library.limit = library.former
        # Workers are gone; this thread may have run bodies itself.
        _thread.restore()


def restore_thread() -> None:
    """The runtime closed on another thread than this one, which may have run bodies."""
    with _lock:
        if not _open:
            _thread.restore()


def forget_limits() -> None:
    """In the child of a fork, where the runtime is not."""
    global _lock
    # Another thread, which is not here, may have held it.
    _lock = threading.RLock()
    close_limits()


def refresh_limits() -> None:
    """Modules were imported: libraries may have come with them."""
    with _lock:
        if not _open:
            return
        before = len(_known)
        _look()
        if len(_known) != before:
            _apply()
    _changed()


def limit_thread() -> None:
    """A worker follows limits that belong to its thread."""
    with _lock:
        if _open:
            _thread.apply()


def limit_enter(cores: int) -> None:
    """A body over several cores begins on this thread."""
    with _lock:
        body = _Wide(cores)
        _thread.wide.append(body)
        if _open:
            _wide.add(body)
            _apply()
            _thread.apply()


def limit_exit(cores: int) -> None:
    """It ended, or gave its thread up."""
    with _lock:
        body = _thread.wide.pop()
        assert body.cores == cores
        # A body whose runtime was given up is in none of the sets of a later one.
        _wide.discard(body)
        if _open:
            _apply()
            _thread.apply()
