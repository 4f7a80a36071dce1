"""The runtime as a ``concurrent.futures.Executor``, with real futures, for other libraries."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from charioteer import _core
from charioteer._core import Task

P = ParamSpec("P")
R = TypeVar("R")


class RuntimeExecutor(concurrent.futures.Executor):
    """Runs calls as tasks of the open runtime.

    Calls mean what they mean to any executor: captured variables are not bound by value.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._lock = threading.Lock()
        self._tasks: dict[Task[None], concurrent.futures.Future[Any]] = {}
        self._shut = False

    def submit(
        self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[R]:
        """Schedules ``fn(*args, **kwargs)``.

        Raises:
            RuntimeError: after :meth:`shutdown`.
            NoRuntimeError: the runtime is closed.
        """
        if self._shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        self._check()
        future: concurrent.futures.Future[R] = concurrent.futures.Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            task: Task[None] = _core.submit(call, (), None, True)
            self._tasks[task] = future
        task.add_done_callback(self._done)
        return future

    def _done(self, task: Task[None]) -> None:
        with self._lock:
            future = self._tasks.pop(task, None)
        if future is not None and task.cancelled() and future.cancel():
            future.set_running_or_notify_cancel()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more calls; the runtime itself goes on.

        Args:
            wait: until every call is done.
            cancel_futures: cancels the calls that have not begun.
        """
        self._shut = True
        with self._lock:
            tasks = dict(self._tasks)
        if cancel_futures:
            for future in tasks.values():
                future.cancel()
        if wait and tasks:
            _core.block(list(tasks), concurrent.futures.ALL_COMPLETED)
