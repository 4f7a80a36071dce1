"""Other people's awaitables inside tasks: one event-loop thread, started when first needed.

A body that is a coroutine runs on a worker, step by step. While it awaits tasks of the runtime it
needs no event loop. The moment it touches the running loop (``asyncio.sleep``, a socket, a
timeout), the rest of it belongs to asyncio: the loop is not thread-safe, so the coroutine has to
move to the loop's thread. It cannot move in the middle of a step, so the loop comes to it instead:

* The loop's thread holds ``guard`` whenever it runs, and gives it up while it sleeps in ``select``.
* The first touch by a worker (:meth:`TaskLoop.__getattribute__`) takes ``guard``. Until the step
  ends this worker is the only one inside the loop, as if it were the loop's thread. An
  ``asyncio.Task`` is made that will carry the coroutine on, and is the current task from now on.
* When the step ends, the worker hands the coroutine and what it awaits to that task, gives
  ``guard`` back and wakes the loop. From then on everything happens on the loop's thread.

The core calls the functions of this module by name (``support.rs``).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import selectors
import threading
from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Any

from charioteer import _core
from charioteer.errors import CancelledError

if TYPE_CHECKING:
    from charioteer._core import Awaiting, Task

_current: contextvars.ContextVar[Task[Any] | None] = contextvars.ContextVar(
    "charioteer_task", default=None
)


class _Carrier:
    """What carries a coroutine on: awaited by the ``asyncio.Task`` that was made for it."""

    def __init__(self) -> None:
        self.coroutine: Coroutine[Any, Any, Any] | None = None
        self.first: Any = None
        self.task: Task[Any] | None = None

    def __await__(self) -> Generator[Any, Any, Any]:
        coroutine = self.coroutine
        assert coroutine is not None
        value = self.first
        self.first = None
        while True:
            try:
                sent = yield value
            except BaseException as error:
                try:
                    value = coroutine.throw(error)
                except StopIteration as stop:
                    return stop.value
            else:
                try:
                    value = coroutine.send(sent)
                except StopIteration as stop:
                    return stop.value


async def _carry(carrier: _Carrier) -> None:
    if carrier.coroutine is None:
        return  # it ended in the step in which it touched the loop
    task = carrier.task
    assert task is not None
    try:
        value = await carrier
    except BaseException as error:
        _finish(task, None, error)
    else:
        _finish(task, value, None)


def _finish(task: Task[Any], value: Any, error: BaseException | None) -> None:
    _carried.pop(task.id, None)
    _core.finish_elsewhere(task, value, error)


class _Selector(selectors.DefaultSelector):
    """Gives the guard up while the loop sleeps."""

    def __init__(self, guard: threading.Lock) -> None:
        super().__init__()
        self._guard = guard

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._guard.release()
        try:
            return super().select(timeout)
        finally:
            self._guard.acquire()


class TaskLoop(asyncio.SelectorEventLoop):
    """The runtime's event loop, which a worker may enter for the rest of a step."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.entered = threading.local()
        self._started: threading.Thread | None = None
        super().__init__(_Selector(self.guard))

    def __getattribute__(self, name: str) -> Any:
        # True for the first touch by the coroutine that a worker steps right now.
        context = _core.leave_native_step()
        if context is not None:
            _enter(self, context)
        return super().__getattribute__(name)

    def start(self) -> None:
        """Starts the thread, once; the caller holds the guard."""
        if self._started is None:
            self._started = threading.Thread(target=self._main, name="charioteer-loop", daemon=True)
            # A worker may be pinned, and a thread inherits that.
            _core.unpinned(self._started.start)

    def _main(self) -> None:
        asyncio.set_event_loop(self)
        with self.guard:
            self.run_forever()
            # Whoever was cancelled ends here.
            self.run_until_complete(self.shutdown_asyncgens())
            self.run_until_complete(self.shutdown_default_executor())

    def end(self) -> None:
        """Stops the thread and closes the loop."""
        thread = self._started
        if thread is not None:
            self.call_soon_threadsafe(self.stop)
            thread.join()
        self.close()


_loop: TaskLoop | None = None
_making = threading.Lock()
_carried: dict[int, asyncio.Task[None]] = {}


def _enter(loop: TaskLoop, context: contextvars.Context) -> None:
    loop.guard.acquire()
    loop.start()
    carrier = _Carrier()
    task = asyncio.Task(_carry(carrier), loop=loop, context=context)
    asyncio.tasks._enter_task(loop, task)
    loop.entered.now = (carrier, task)


def _leave(loop: TaskLoop) -> None:
    _, task = loop.entered.now
    del loop.entered.now
    asyncio.tasks._leave_task(loop, task)
    loop.guard.release()
    # The loop may sleep for longer than what was added in between allows.
    loop.call_soon_threadsafe(_nothing)


def _nothing() -> None:
    """Wakes the loop."""


def loop_enter() -> asyncio.AbstractEventLoop | None:
    """A coroutine is about to be stepped on this thread: the loop is its running loop.

    Returns:
        the running loop that the thread had.
    """
    global _loop
    if _loop is None:
        with _making:
            if _loop is None:
                _loop = TaskLoop()
    former = asyncio._get_running_loop()
    asyncio._set_running_loop(_loop)
    return former


def loop_leave(former: asyncio.AbstractEventLoop | None) -> None:
    """The step is over."""
    asyncio._set_running_loop(former)


def loop_end_step() -> None:
    """The coroutine ended in the step in which it touched the loop."""
    assert _loop is not None
    _leave(_loop)


def loop_hand_over(
    coroutine: Coroutine[Any, Any, Any], first: Any, task: Task[Any], context: contextvars.Context
) -> None:
    """The rest of the coroutine belongs to the loop; ``first`` is what it awaits."""
    assert _loop is not None
    carrier, carrying = _loop.entered.now
    carrier.coroutine = coroutine
    carrier.first = first
    carrier.task = task
    context.run(_current.set, task)
    _carried[task.id] = carrying
    if _core.cancel_requested(task):
        # After its first step: a task that is cancelled before never enters its coroutine.
        _loop.call_soon(carrying.cancel)
    _leave(_loop)


def loop_cancel(identity: int) -> None:
    """A running task was asked to end: if asyncio carries it, asyncio has to be told."""
    carrying = _carried.get(identity)
    if carrying is not None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the task is done
            carrying.get_loop().call_soon_threadsafe(carrying.cancel)


def loop_cancel_all() -> None:
    """Every running task was asked to end."""
    for identity in list(_carried):
        loop_cancel(identity)


def loop_close() -> None:
    """The runtime closed: no coroutine is left."""
    global _loop
    if _loop is not None:
        _loop.end()
        _loop = None


def loop_forget() -> None:
    """The runtime was left behind, or this is the child of a fork: the loop is no longer ours."""
    global _loop
    _loop = None
    _carried.clear()


def current_elsewhere() -> Task[Any] | None:
    """The task whose coroutine runs on the loop's thread, where this is called."""
    return _current.get()


def loop_runs_here() -> bool:
    """Whether this is the loop's thread, inside of a coroutine or a callback."""
    return _loop is not None and asyncio._get_running_loop() is _loop


def loop_await(awaiting: Awaiting) -> Generator[Any, Any, Any]:
    """Awaits tasks under asyncio.

    Raises:
        RuntimeError: no event loop runs.
        asyncio.CancelledError: the wait was cancelled, or a task was.
    """
    if not awaiting.done():
        yield from _arrival(awaiting)
    elif (task := _current.get()) is not None and _core.cancel_requested(task):
        # asyncio tells it at its next suspension: an await is one, also of what is there.
        yield
    try:
        return awaiting.value()
    except CancelledError as error:
        # What asyncio's own tools take for a cancellation.
        raise asyncio.CancelledError(str(error)) from error


def _arrival(awaiting: Awaiting) -> Generator[Any, Any, None]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def done() -> None:
        if not future.done():
            future.set_result(None)

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(done)

    subscription = awaiting.call(wake)
    try:
        yield from future
    except asyncio.CancelledError:
        # Who waits gives up: the tasks are asked to end, and nobody waits for that.
        awaiting.cancel()
        raise
    finally:
        subscription.forget()
