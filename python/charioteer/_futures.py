"""Waiting for several tasks, as in the standard library, and groups of tasks."""

from __future__ import annotations

import concurrent.futures
import contextvars
import threading
import time
from collections.abc import Awaitable, Generator, Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar

from charioteer import _core
from charioteer._core import Task, TaskList, TaskSpace
from charioteer.errors import DependencyError

R = TypeVar("R")

Tasks: TypeAlias = Task[Any] | TaskList[Any] | TaskSpace | Iterable["Tasks"]
"""A task, a list or a space of tasks, or an iterable of those."""


class WaitResult(NamedTuple):
    """What :func:`wait` gives: two sets of tasks."""

    done: set[Task[Any]]
    not_done: set[Task[Any]]


def wait(
    tasks: Tasks,
    timeout: float | None = None,
    return_when: str = concurrent.futures.ALL_COMPLETED,
) -> WaitResult:
    """Waits for tasks, as :func:`concurrent.futures.wait` does.

    Args:
        tasks: what to wait for.
        timeout: the longest wait in seconds.
        return_when: ``ALL_COMPLETED``, ``FIRST_COMPLETED`` or ``FIRST_EXCEPTION``.

    Raises:
        ValueError: another ``return_when``.
        TypeError: something that is no task.
        CycleError: in a body, a wait that could never end.
    """
    every: TaskList[Any] = TaskList(tasks)
    _core.block(every, return_when, timeout)
    done = {task for task in every if task.done()}
    return WaitResult(done, set(every) - done)


def as_completed(tasks: Tasks, timeout: float | None = None) -> Iterator[Task[Any]]:
    """Gives tasks as they are done, each once.

    Args:
        tasks: what to wait for.
        timeout: seconds, from the call on, after which the next one raises.

    Raises:
        TimeoutError: the time is over and tasks are not done.
        TypeError: something that is no task.
    """
    return _as_completed(dict.fromkeys(TaskList(tasks)), timeout)


def _as_completed(left: dict[Task[Any], None], timeout: float | None) -> Iterator[Task[Any]]:
    import queue

    end = None if timeout is None else time.monotonic() + timeout
    arrived: queue.SimpleQueue[Task[Any]] = queue.SimpleQueue()
    total = len(left)
    for task in left:
        task.add_done_callback(arrived.put)
    while left:
        try:
            task = arrived.get_nowait()
        except queue.Empty:
            # The wait is the runtime's, so that a body gives its place up meanwhile.
            seconds = None if end is None else max(0.0, end - time.monotonic())
            if not _core.block(list(left), concurrent.futures.FIRST_COMPLETED, seconds):
                raise TimeoutError(f"{len(left)} of {total} tasks are not done") from None
            # A task is done a moment before its callbacks are called.
            done = [task for task in left if task.done()]
            for task in done:
                del left[task]
                yield task
            continue
        if task in left:
            del left[task]
            yield task


class Gathered(Awaitable[list[R]]):
    """Several tasks as one: what :func:`gather` gives."""

    def __init__(self, tasks: TaskList[R], return_exceptions: bool) -> None:
        self._tasks = tasks
        self._return_exceptions = return_exceptions

    def result(self, timeout: float | None = None) -> list[R]:
        """Waits for the results, in the order of the tasks.

        Raises:
            TimeoutError: they are not there after ``timeout`` seconds.
            BaseException: the failure of a task, as soon as there is one, unless exceptions were
                to be returned.
        """
        when = (
            concurrent.futures.ALL_COMPLETED
            if self._return_exceptions
            else concurrent.futures.FIRST_EXCEPTION
        )
        if not _core.block(self._tasks, when, timeout):
            raise TimeoutError(f"not all of {len(self._tasks)} tasks are done after {timeout} s")
        return self._values()

    def _values(self) -> list[Any]:
        if not self._return_exceptions:
            value = _core.awaiting(self._tasks, concurrent.futures.FIRST_EXCEPTION).value()
            assert isinstance(value, list)
            return value
        values: list[Any] = []
        for task in self._tasks:
            try:
                values.append(task.result())
            except (Exception, concurrent.futures.CancelledError) as error:
                values.append(error)
        return values

    def done(self) -> bool:
        """Whether every task is done."""
        return self._tasks.done()

    def cancel(self) -> bool:
        """Cancels every task; whether all are cancelled."""
        return self._tasks.cancel()

    def __await__(self) -> Generator[Any, Any, list[R]]:
        when = (
            concurrent.futures.ALL_COMPLETED
            if self._return_exceptions
            else concurrent.futures.FIRST_EXCEPTION
        )
        yield from _core.awaiting(self._tasks, when, False).__await__()
        return self._values()


def gather(*tasks: Tasks, return_exceptions: bool = False) -> Gathered[Any]:
    """Several tasks as one, to wait for with ``result()`` or ``await``.

    Args:
        tasks: tasks, lists and spaces of tasks, iterables of those.
        return_exceptions: failures are elements of the result instead of being raised.

    Raises:
        TypeError: something that is no task.
    """
    return Gathered(TaskList(tasks), return_exceptions)


class _TaskFuture(concurrent.futures.Future[Any]):
    """A future that follows a task; cancelling it cancels the task."""

    def __init__(self, task: Task[Any]) -> None:
        super().__init__()
        self._task = task

    def cancel(self) -> bool:
        return self._task.cancel()

    def running(self) -> bool:
        return self._task.running()


def future(task: Task[Any]) -> concurrent.futures.Future[Any]:
    """A ``concurrent.futures.Future`` that follows ``task``."""
    made = _TaskFuture(task)

    def follow(task: Task[Any]) -> None:
        if task.cancelled():
            concurrent.futures.Future.cancel(made)
            made.set_running_or_notify_cancel()
            return
        made.set_running_or_notify_cancel()
        error = task.exception()
        if error is not None:
            made.set_exception(error)
        else:
            made.set_result(task.result())

    task.add_done_callback(follow)
    return made


_group: contextvars.ContextVar[TaskGroup | None] = contextvars.ContextVar(
    "charioteer_group", default=None
)


class TaskGroup:
    """Tasks that belong together: leaving the block waits for all that are spawned in it.

    ``with ch.TaskGroup():`` and ``async with``. What the block spawns is a member, and so is what
    members spawn in turn; of nested groups, the innermost one counts. When a member fails, or the
    block raises, the rest is cancelled. Failures are raised together as an ``ExceptionGroup``.

    Raises:
        ExceptionGroup: when the block is left and members failed; an exception of the block is the
            first in it.
        RuntimeError: a group is entered a second time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: list[Task[Any]] = []
        self._cancelled = False
        self._left = False
        self._token: contextvars.Token[TaskGroup | None] | None = None

    def cancel(self) -> None:
        """Cancels every member, also those that are still to come."""
        with self._lock:
            self._cancelled = True
            tasks = list(self._tasks)
        for task in tasks:
            task.cancel()

    def _join(self, task: Task[Any]) -> None:
        with self._lock:
            if self._left:
                return  # spawned by a member after the group was left: nobody waits for it here
            self._tasks.append(task)
            cancelled = self._cancelled
        task.add_done_callback(self._done)
        if cancelled:
            task.cancel()

    def _done(self, task: Task[Any]) -> None:
        if _core.is_failed(task) and not task.cancelled() and not self._cancelled:
            self.cancel()

    def __enter__(self) -> Self:
        if self._token is not None or self._left:
            raise RuntimeError("a group is entered once")
        self._token = _group.set(self)
        _core.count_groups(True)
        return self

    def _leave_block(self, error: BaseException | None) -> None:
        assert self._token is not None
        _group.reset(self._token)
        _core.count_groups(False)
        if error is not None:
            self.cancel()

    def _members(self) -> list[Task[Any]]:
        with self._lock:
            left = [task for task in self._tasks if not task.done()]
            if not left:
                self._left = True
            return left

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave_block(error)
        try:
            while left := self._members():  # members may spawn members
                _core.block(left, concurrent.futures.ALL_COMPLETED)
        except BaseException:
            self.cancel()
            self._left = True
            raise
        self._raise(error)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave_block(error)
        try:
            while left := self._members():
                await _core.awaiting(left, concurrent.futures.ALL_COMPLETED, False)
        except BaseException:
            self.cancel()
            self._left = True
            raise
        self._raise(error)

    def _raise(self, error: BaseException | None) -> None:
        with self._lock:
            tasks, self._tasks = self._tasks, []
        failures: list[BaseException] = []
        for task in tasks:
            if not _core.is_failed(task) or task.cancelled():
                continue
            failure = task.exception()
            if failure is None or isinstance(failure, DependencyError):
                continue  # its root is a member as well, or somebody else's to receive
            failures.append(failure)
        if not failures:
            return
        if error is not None:
            failures.insert(0, error)
        raise BaseExceptionGroup("tasks of a group failed", failures) from None


def join_group(task: Task[Any]) -> None:
    """A task was spawned while groups are open: it belongs to the spawner's."""
    group = _group.get()
    if group is not None:
        group._join(task)
