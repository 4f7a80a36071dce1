"""``Runtime``: opens and closes the core, and decides how a block ends."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Self, TypeVar

from charioteer import _core, _pools
from charioteer._core import Context, Task, TaskList
from charioteer._executor import RuntimeExecutor
from charioteer._quantities import read_count
from charioteer._support import loaded_loop, warn
from charioteer.devices import Device, gpu
from charioteer.errors import (
    CancelledError,
    MachineError,
    ModelError,
    NoRuntimeError,
    UnspawnedDependencyError,
)
from charioteer.machine import Machine
from charioteer.policies import Model, Policy

if TYPE_CHECKING:
    from charioteer._communicators import Communicators

P = ParamSpec("P")
R = TypeVar("R")

_MOST_WORKERS = 4096
_MOST_AHEAD = 2**32 - 1
_MOST_OVERTAKING = 2**63 - 1

_opened: Runtime | None = None
_left_behind: list[_core.Engine] = []
"""Those whose bodies did not end when the user insisted."""
_registered = False


def current() -> Context:
    """The context of the running task.

    Raises:
        NoRuntimeError: no task runs here.
    """
    return _core.current_context()


class Runtime:
    """Owns the workers and the scheduler. One is open in a process at a time.

    ``with Runtime() as rt:`` opens it; leaving the block waits for every task and raises the
    failures that nobody received in one ``ExceptionGroup``. If the block itself raises, pending
    tasks are cancelled, running ones are asked to end, and its exception leaves unchanged with a
    note of the rest. ``async with`` does the same without blocking the event loop.

    Args:
        machine: whose devices tasks run on, besides the cores: a :class:`Machine`, or what
            :meth:`Machine.load` reads, such as ``"virtual:4"``. Unless said, the one that the
            environment variable ``CHARIOTEER_MACHINE`` names, else the one that the process runs
            on.
        workers: the cores to use. Unless said, the environment variable ``CHARIOTEER_WORKERS``,
            else every core of the machine. Zero runs bodies in the thread that spawns them, in a
            deterministic order, for a debugger; a machine whose time is virtual takes no others.
        runahead: how many tasks may have work in flight on a device, their bodies done and their
            work not, while more are started behind it. Where run times are known, 4 tasks and 2 ms
            of them are enough: more would only be in the way of what becomes ready meanwhile. With
            zero a task starts when those that it depends on are complete.
        pin: keeps workers on cores of the host. ``"none"``, the default, leaves them to the system,
            but a worker that comes to a core where another computes moves on; ``"compact"`` gives
            them the cores of one NUMA node after the other, ``"spread"`` those of all nodes in
            turns, and second threads of a core last in both. While a task runs its
            thread is on the cores that it holds. The nodes are those of the machine, or those of
            the host if it names none. With ``workers=0`` there is nobody to pin. Unless said, the
            environment variable ``CHARIOTEER_PIN``.
        overtaking: by how many device-times younger tasks may overtake one that waits for devices:
            whenever a younger one is given devices that it could have used, so many count. A small
            bound serves in order, a large one keeps devices busier.
        max_pending: makes a thread that spawns, outside of tasks and their callbacks, wait while
            so many tasks are unfinished.
        on_failure: called with each failed task whose last handle went away unread, instead of
            raising when the block is left; for services.
        gil: how many workers may be attached to the interpreter, and so compete for the GIL, at
            once. ``"auto"`` measures it: all of them where bodies release the GIL, few where they
            hold it, and all on an interpreter without one. Bodies that go on after a wait, and
            those on sets or parts of cores, are never held back.
        trace: a file to write the events of every task to. Unless said, the environment variable
            ``CHARIOTEER_TRACE``.
        policy: who chooses among the alternatives of a task that is ready. ``"eft"``, the default,
            takes the earliest estimated finish, by what is known of run times; ``"locality"`` stays
            on the devices of the tasks that it depends on, ``"load"`` goes where the fewest tasks
            are, ``"random"`` and ``"round-robin"`` anywhere. A callable scores the choices, see
            :mod:`charioteer.policies`. Unless said, the environment variable ``CHARIOTEER_POLICY``.
        models: a file of measured run times: read when the runtime opens, if it is there, and
            written when it closes, if there is something new. Unless said, the environment
            variable ``CHARIOTEER_MODELS``.
        check: looks for bodies that write to data which they declare that they only read: what is
            in there is compared before and after, which costs a look at each element. Such a task
            fails with ``AccessError``. On GPUs of the CUDA driver it warns with
            :class:`charioteer.StreamWarning` of a body that ends while work is on the legacy
            default stream of its GPU, where none was when it began. Unless said, only a validating
            build does.

    Raises:
        ValueError: a number out of range, a policy that does not exist, or threads to pin with
            ``workers=0``.
        TypeError: something of the wrong type.
        MachineError: a name or a file of no machine.
    """

    def __init__(
        self,
        machine: Machine | str | None = None,
        workers: int | None = None,
        runahead: int = 64,
        *,
        max_pending: int | None = None,
        on_failure: Callable[[Task[Any]], object] | None = None,
        trace: str | os.PathLike[str] | None = None,
        gil: int | Literal["auto"] = "auto",
        policy: str | Policy | None = None,
        models: str | os.PathLike[str] | None = None,
        overtaking: int = 128,
        pin: Literal["none", "compact", "spread"] | None = None,
        check: bool | None = None,
    ) -> None:
        self._machine = _machine(machine)
        self._workers = _worker_count(workers, self._machine)
        self._runahead = read_count(runahead, "runahead", 0, most=_MOST_AHEAD)
        self._overtaking = read_count(overtaking, "overtaking", 0, most=_MOST_OVERTAKING)
        if max_pending is not None:
            if isinstance(max_pending, bool) or not isinstance(max_pending, int):
                raise TypeError(
                    f"max_pending is a number of tasks, not {type(max_pending).__name__}"
                )
            if max_pending < 1:
                raise ValueError(f"max_pending is at least 1, not {max_pending}")
        if on_failure is not None and not callable(on_failure):
            raise TypeError(f"on_failure is to be callable, not {type(on_failure).__name__}")
        if trace is None:
            trace = os.environ.get("CHARIOTEER_TRACE") or None
        if gil != "auto":
            if isinstance(gil, bool) or not isinstance(gil, int):
                raise TypeError(f'gil is "auto" or a number of workers, not {gil!r}')
            if gil < 1:
                raise ValueError(f"gil lets at least 1 worker in, not {gil}")
        if check is not None and not isinstance(check, bool):
            raise TypeError(f"check is True or False, not {type(check).__name__}")
        self._checks = check
        self._policy = _policy(policy)
        self._pin = _pinning(pin, self._workers)
        if models is None:
            models = os.environ.get("CHARIOTEER_MODELS") or None
        # A program may change the folder before it closes the runtime.
        self._models = None if models is None else os.path.abspath(os.fsdecode(models))
        self._gil = None if gil == "auto" else gil
        self._max_pending = max_pending
        self._on_failure = on_failure
        self._trace = None if trace is None else os.fsdecode(trace)
        self._engine: _core.Engine | None = None
        self._devices: _core.OpenMachine | None = None
        self._communicators: Communicators | None = None
        self._counted: dict[Device, dict[str, Any]] = {}
        self._closed = False
        self._document: str | None = None
        self._unsaved: OSError | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else "new" if self._engine is None else "open"
        return f"<Runtime with {self._workers} workers, {state}>"

    @property
    def workers(self) -> int:
        """The number of workers."""
        return self._workers

    @property
    def machine(self) -> Machine:
        """The machine whose devices it works with."""
        if self._machine is None:
            self._machine = Machine.detect()
        return self._machine

    # ---- opening and closing ----------------------------------------------------------------

    @property
    def devices(self) -> _core.OpenMachine | None:
        """The machine's devices while the runtime is open: their clock, their counters, and the
        faults of virtual ones. ``None`` where there are none, and before and after."""
        return None if self._closed else self._devices

    def open(self) -> Self:
        """Opens the runtime, as entering its block does.

        Raises:
            RuntimeActiveError: a runtime is open.
            RuntimeError: this one was open before.
            OSError: the system refuses a thread, or the file of the trace or of the models.
            ModelError: the file of the models is damaged, or of another version.
            MachineError: threads are pinned, and a NUMA node of the machine has cores that this
                process may not use.
        """
        global _opened, _registered
        if self._engine is not None:
            if _core.is_open() and _opened is self and not self._closed:
                from charioteer.errors import RuntimeActiveError

                raise RuntimeActiveError("this runtime is open already")
            raise RuntimeError("a runtime is opened once: make another")
        models = self._document = None if self._models is None else _read_models(self._models)
        if self._machine is None:
            self._machine = _found()
        devices = self._machine.open() if self._machine and self._machine.gpus else None
        try:
            self._engine = _core.Engine(
                self._workers,
                self._max_pending,
                self._trace,
                self._on_failure,
                self._gil,
                devices,
                self._runahead,
                self._policy,
                models=models,
                overtaking=self._overtaking,
                pin=None if self._pin is None else (self._pin, self._host_nodes()),
                check=self._checks,
            )
        except BaseException as error:
            if devices is not None:
                devices.close()
            if isinstance(error, ModelError):
                raise ModelError(f"{self._models}: {error}") from None
            raise
        self._devices = devices
        _opened = self
        _pools.open_limits()
        if not _registered:
            _registered = True
            os.register_at_fork(after_in_child=_forget)
            # Before threads are joined, so that the workers are gone when the interpreter ends.
            threading._register_atexit(_close_at_exit)  # type: ignore[attr-defined]
        return self

    def _host_nodes(self) -> list[tuple[int, ...]]:
        """The cores of the NUMA nodes that workers are pinned to."""
        nodes = self.machine.host.nodes or Machine.detect().host.nodes
        return [node.cores for node in nodes]

    def close(self, cancel: bool = False) -> None:
        """Waits for every task and ends the threads; nothing if it is closed.

        Args:
            cancel: cancels pending tasks and asks running ones to end.

        Raises:
            ExceptionGroup: failures that nobody received.
            KeyboardInterrupt: pressed meanwhile; tasks are cancelled then.
            RuntimeError: called by a task of the runtime, or by a callback on one of its
                threads, which would wait for itself.
        """
        if self._engine is None or self._closed:
            return
        loop = loaded_loop()
        if _core.is_worker() or (loop is not None and loop.loop_runs_here()):
            raise RuntimeError("a task cannot close the runtime that it runs in")
        self._end(cancel)
        failures = self._take_failures()
        if failures:
            raise BaseExceptionGroup("tasks failed and nobody received it", failures)

    def _end(self, cancel: bool) -> None:
        """Waits, and ends the threads."""
        engine = self._engine
        assert engine is not None
        if engine.forked:
            # The threads are the parent's; there is nothing here to wait for.
            self._closed = True
            self._failures: list[Task[Any]] = []
            return
        interrupt: BaseException | None = None
        if cancel:
            self._cancel_all()
        while True:
            try:
                engine.drain()
                break
            except BaseException as error:
                if cancel or interrupt is not None:
                    # The second one: whoever sends it does not want to wait any longer.
                    self._abandon()
                    raise
                interrupt = error
                self._cancel_all()
        self._shut()
        if interrupt is not None:
            raise interrupt

    def _cancel_all(self) -> None:
        assert self._engine is not None
        self._engine.cancel_all()
        if (loop := loaded_loop()) is not None:
            loop.loop_cancel_all()

    def _shut(self) -> None:
        global _opened
        assert self._engine is not None
        if (loop := loaded_loop()) is not None:
            loop.loop_close()
        self._failures = self._engine.close()
        if self._models is not None:
            self._save_models(self._models, self._engine)
        if self._communicators is not None:
            self._communicators.close()
        if self._devices is not None:
            self._count_devices(self._devices)
            self._devices.close()
        self._closed = True
        _pools.close_limits()
        if _opened is self:
            _opened = None

    def _save_models(self, path: str, engine: _core.Engine) -> None:
        """Writes what was learned, if anything was."""
        if self._document is None and not engine.models():
            return
        document = engine.export_models()
        if document == self._document:
            return
        try:
            _write(path, document)
        except OSError as error:
            self._unsaved = error

    def _abandon(self) -> None:
        """Bodies do not end and the user insists: leaves their threads behind."""
        global _opened
        assert self._engine is not None
        self._engine.abandon()
        _left_behind.append(self._engine)
        if (loop := loaded_loop()) is not None:
            loop.loop_forget()
        self._failures = []
        self._closed = True
        _pools.close_limits()
        if _opened is self:
            _opened = None

    def _take_failures(self) -> list[BaseException]:
        failed, self._failures = self._failures, []
        failures: list[BaseException] = []
        if self._unsaved is not None:
            self._unsaved.add_note("The models of run times were not written.")
            failures.append(self._unsaved)
            self._unsaved = None
        unspawned = False
        for task in failed:
            error = task.exception()
            if error is None:
                continue
            if isinstance(error, UnspawnedDependencyError):
                if unspawned:
                    continue  # one error names all of them
                unspawned = True
            failures.append(error)
        return failures

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        if self._closed:
            return
        self._end(cancel=True)
        self._note(error)

    def _note(self, error: BaseException) -> None:
        failures = self._take_failures()
        if failures:
            shown = ", ".join(_short(failure) for failure in failures[:5])
            more = f" and {len(failures) - 5} more" if len(failures) > 5 else ""
            note = f"charioteer: tasks failed as well: {shown}{more}"
            try:
                error.add_note(note)
            except Exception:  # what refuses attributes; the exception leaves unchanged
                warn(note)

    async def __aenter__(self) -> Self:
        import asyncio

        return await asyncio.to_thread(self.open)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._closed:
            return
        import asyncio

        ending = asyncio.ensure_future(asyncio.to_thread(self._end, error is not None))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            self._cancel_all()
            await ending
            raise
        finally:
            _pools.restore_thread()
        if error is not None:
            self._note(error)
            return
        failures = self._take_failures()
        if failures:
            raise BaseExceptionGroup("tasks failed and nobody received it", failures)

    # ---- as an executor ---------------------------------------------------------------------

    def _check(self) -> None:
        if self._engine is None or self._closed:
            raise NoRuntimeError("this runtime is not open")

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Task[R]:
        """Spawns ``fn(*args, **kwargs)``.

        Args:
            fn: a callable or a coroutine object; a task function keeps its options.
            args: its arguments; handles among them are dependencies, and replaced by results.
            kwargs: the same by keyword.

        Raises:
            NoRuntimeError: the runtime is not open.
            CaptureError: the function assigns a captured variable.
            TypeError: not callable.
        """
        self._check()
        return _core.submit(fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., R],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
    ) -> Iterator[R]:
        """Spawns one task an item at once, and gives the results in order.

        Args:
            fn: called with one element of each iterable.
            iterables: taken in step.
            timeout: seconds, from the call on, within which each result is to be there.
            chunksize: without meaning, as for threads in the standard library.

        Raises:
            NoRuntimeError: the runtime is not open.
            CaptureError: the function assigns a captured variable.
            TypeError: not callable, or no iterable.
            TimeoutError: from the iterator, when a result is late; what is left is cancelled then.
            ValueError: a chunk size below one.
        """
        self._check()
        if chunksize < 1:
            raise ValueError("chunksize is at least 1")
        end = None if timeout is None else time.monotonic() + timeout
        return _results(_core.task(fn).map(*iterables), end)

    def executor(self) -> Executor:
        """A real ``concurrent.futures.Executor``, for other libraries.

        Raises:
            NoRuntimeError: the runtime is not open.
        """
        self._check()
        return RuntimeExecutor(self._check)

    def stats(self) -> dict[str, Any]:
        """Counts since the runtime opened; they stay readable after it closed.

        Returns:
            ``spawned``, ``finished`` and ``pending`` tasks, ``threads`` started;
            ``sessions``: how many workers are attached (``inside``), how many may be (``width``,
            ``None`` for all) and how often that changed (``changes``);
            ``gateway``: for each site of the process that attaches to the interpreter or detaches
            from it, its ``visits``, how many had to wait for the interpreter (``waits``), the
            seconds that took (``waited``) and those from there to the end of the visit
            (``inside``), since the process began;
            ``devices``: for each device with streams what :class:`Machine` counts on it.
            A task's outcome is there before the task is counted: the counts may lag behind by the
            tasks that are ending right now.

        Raises:
            NoRuntimeError: the runtime was never open.
        """
        if self._engine is None:
            raise NoRuntimeError("this runtime was never open")
        if self._devices is not None and not self._closed:
            self._count_devices(self._devices)
        return {**self._engine.stats(), "devices": dict(self._counted)}

    def models(self) -> list[Model]:
        """What is known of run times, by function, choice and size; it stays readable after the
        runtime closed.

        Raises:
            NoRuntimeError: the runtime was never open.
        """
        if self._engine is None:
            raise NoRuntimeError("this runtime was never open")
        return [Model(*known) for known in self._engine.models()]

    def _count_devices(self, devices: _core.OpenMachine) -> None:
        self._counted = {gpu(index): devices.counters(index) for index in range(devices.gpus)}


def _results(tasks: TaskList[R], end: float | None) -> Iterator[R]:
    left = list(reversed(list(tasks)))
    del tasks
    try:
        while left:
            timeout = None if end is None else max(0.0, end - time.monotonic())
            yield left.pop().result(timeout)
    finally:
        for task in left:
            task.cancel()


def _short(failure: BaseException) -> str:
    try:
        return f"{type(failure).__name__}: {failure}"
    except Exception:
        return type(failure).__name__


def _machine(said: Machine | str | None) -> Machine | None:
    """The machine that was said, or that the environment names."""
    if said is None:
        said = os.environ.get("CHARIOTEER_MACHINE") or None
    if said is None or isinstance(said, Machine):
        return said
    if not isinstance(said, str):
        raise TypeError(f"machine is a Machine or what Machine.load reads, not {said!r}")
    return Machine.load(said)


def _found() -> Machine | None:
    """The machine that the process runs on if it has GPUs; else there is time to look at it."""
    try:
        return Machine.detect() if _core.cuda_devices() else None
    except MachineError as error:
        warn(f"{error}; the runtime works without GPUs")
        return None


POLICIES = ("eft", "locality", "load", "random", "round-robin")
"""The policies that there are, the default first."""


def _policy(said: object) -> str | Policy | None:
    """The policy that was said, or that the environment names; ``None`` for the default."""
    if said is None:
        said = os.environ.get("CHARIOTEER_POLICY") or None
    if said is None or said == POLICIES[0]:
        return None
    if isinstance(said, str):
        if said not in POLICIES:
            raise ValueError(f"policy is one of {', '.join(POLICIES)} or a callable, not {said!r}")
        return said
    if not callable(said):
        raise TypeError(f"policy is a name or a callable, not {type(said).__name__}")
    return said


PINNINGS = ("none", "compact", "spread")
"""How workers are pinned, the default first."""


def _pinning(said: object, workers: int) -> str | None:
    """How workers are pinned, as it was said or the environment names it; ``None``: not at all."""
    asked = said is not None
    if said is None:
        said = os.environ.get("CHARIOTEER_PIN") or PINNINGS[0]
    if not isinstance(said, str):
        raise TypeError(f"pin is one of {', '.join(PINNINGS)}, not {type(said).__name__}")
    if said not in PINNINGS:
        raise ValueError(f"pin is one of {', '.join(PINNINGS)}, not {said!r}")
    if said == PINNINGS[0]:
        return None
    if workers == 0:
        if asked:
            raise ValueError("with workers=0 tasks run on the program's threads, which none pins")
        return None
    return said


def _read_models(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(path)):
            raise  # nor could it be written in the end
        return None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: these are no performance models: {error}") from None


def load_models(path: str | os.PathLike[str]) -> list[Model]:
    """What a file of models tells; nothing if it is not there.

    Raises:
        ModelError: it is damaged, or of another version.
        OSError: it cannot be read, or its folder is not there.
    """
    path = os.path.abspath(os.fsdecode(path))
    document = _read_models(path)
    if document is None:
        return []
    try:
        return [Model(*known) for known in _core.known_models(document)]
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def _write(path: str, text: str) -> None:
    """Replaces a file as a whole, so that nobody ever reads half of it."""
    beside = f"{path}.{os.getpid()}"
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def _worker_count(workers: int | None, machine: Machine | None) -> int:
    if machine is not None and machine.time == "virtual":
        if workers:
            raise ValueError("virtual time passes while nothing else runs: it takes workers=0")
        return 0
    if workers is None:
        said = os.environ.get("CHARIOTEER_WORKERS")
        if not said:
            cores = len(os.sched_getaffinity(0)) if machine is None else machine.host.cores
            return min(cores, _MOST_WORKERS)
        try:
            workers = int(said)
        except ValueError:
            raise ValueError(
                f"the environment variable CHARIOTEER_WORKERS is a number, not {said!r}"
            ) from None
        if not 0 <= workers <= _MOST_WORKERS:
            raise ValueError(
                "the environment variable CHARIOTEER_WORKERS is between 0 and"
                f" {_MOST_WORKERS}, not {workers}"
            )
        return workers
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise TypeError(f"workers is a number of cores, not {type(workers).__name__}")
    if not 0 <= workers <= _MOST_WORKERS:
        raise ValueError(f"workers is between 0 and {_MOST_WORKERS}, not {workers}")
    return workers


def _close_at_exit() -> None:
    """The interpreter ends: nobody is left to receive anything, and what is pending is not missed.

    Bodies are asked to end, and have a second to do so; then an exception is raised in them. Who
    sleeps in C through both is left behind: its thread is a daemon.
    """
    runtime = _opened
    if runtime is not None and runtime._engine is not None and not runtime._engine.forked:
        runtime._cancel_all()
        if runtime._engine.drain(1.0):
            runtime._shut()
        else:
            runtime._abandon()
    left = [engine for engine in _left_behind if not engine.forked]
    if left:
        # A thread that comes back to an interpreter that has ended would take the process down.
        _interrupt_bodies()
        for engine in left:
            engine.drain(0.5)
        return
    # Workers that ended are still taken off Python's books; they would come too late for that.
    for thread in threading.enumerate():
        if thread.name.startswith("charioteer-"):
            thread.join(1.0)


def _interrupt_bodies() -> None:
    import ctypes

    for thread in threading.enumerate():
        if thread.name.startswith("charioteer-") and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(CancelledError)
            )


def _forget() -> None:
    """In the child of a fork: the parent's runtime stays there."""
    global _opened
    _opened = None
    _core.after_fork()
    if (loop := loaded_loop()) is not None:
        loop.loop_forget()
    _pools.forget_limits()
