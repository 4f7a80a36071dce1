"""The named errors. Each derives from :class:`CharioteerError` and from the builtin that fits."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Sequence


class CharioteerError(Exception):
    """What every error of the runtime is."""


class PlacementError(CharioteerError, ValueError):
    """No device of the machine can ever run the task; says why, per alternative."""


class VariantError(CharioteerError, ValueError):
    """Two variants of a function would serve the same device set, or a variant takes other
    parameters than its function."""


class PolicyError(CharioteerError, RuntimeError):
    """The policy that the runtime was opened with raised, which is ``__cause__``, or gave what is
    no score of each choice."""


class ModelError(CharioteerError, ValueError):
    """A file of models of run times is damaged, or of another version."""


class MachineError(CharioteerError, ValueError):
    """A file, or the name of a virtual machine, describes no machine; says where and what to do."""


class DuplicateTaskError(CharioteerError, ValueError):
    """The handle was spawned or cancelled before.

    Args:
        name: the task.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"{self.name} was spawned or cancelled before: a handle stands for one task"


class CycleError(CharioteerError, ValueError):
    """The tasks would wait for each other for ever.

    Args:
        cycle: the names along the cycle; the first is also the last.
    """

    def __init__(self, cycle: Sequence[str]) -> None:
        super().__init__(cycle)
        self.cycle = list(cycle)

    def __str__(self) -> str:
        shown = self.cycle
        if len(shown) > 20:
            shown = [*shown[:10], f"({len(shown) - 20} more)", *shown[-10:]]
        return f"tasks would wait for each other for ever: {' -> '.join(shown)}"


class UnspawnedDependencyError(CharioteerError, RuntimeError):
    """Tasks were waited for that nobody spawned before the runtime was left.

    Args:
        names: those tasks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.names = list(names)

    def __str__(self) -> str:
        shown = ", ".join(self.names[:20])
        more = f" and {len(self.names) - 20} more" if len(self.names) > 20 else ""
        return f"never spawned, though tasks or waits depend on it: {shown}{more}"


class DependencyError(CharioteerError, RuntimeError):
    """A task was not run because one that it depends on failed; ``__cause__`` is that failure.

    Args:
        name: the task.
        root: where the failure began.
    """

    def __init__(self, name: str, root: str) -> None:
        super().__init__(name, root)
        self.name = name
        self.root = root

    def __str__(self) -> str:
        return f"{self.name} was not run: {self.root}, on which it depends, failed"


class AccessError(CharioteerError, TypeError):
    """A body's use of data or variables that the runtime cannot order."""


class CaptureError(AccessError):
    """A body assigns a variable of the function around it.

    Args:
        function: the body.
        variable: what it assigns.
    """

    def __init__(self, function: str, variable: str) -> None:
        super().__init__(function, variable)
        self.function = function
        self.variable = variable

    def __str__(self) -> str:
        return (
            f"{self.function} assigns {self.variable!r} of the function around it (nonlocal): tasks"
            " get captured variables by value; return a result, or change an object in place"
        )


class CaptureWarning(UserWarning):
    """A module variable that a body reads was rebound between its spawn and its run."""


class StreamWarning(UserWarning):
    """Work was left on the legacy default stream of a GPU when a body ended, which no task waits
    for."""


class TaskTimeoutError(CharioteerError, TimeoutError):
    """An attempt ran longer than its ``timeout``.

    Args:
        name: the task.
        limit: what an attempt may take, in seconds.
    """

    def __init__(self, name: str, limit: float) -> None:
        super().__init__(name, limit)
        self.name = name
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.name} ran longer than {self.limit:g} s"


class CancelledError(CharioteerError, concurrent.futures.CancelledError):
    """The task was cancelled.

    Args:
        name: the task.
    """

    def __init__(self, name: str = "a task") -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"{self.name} was cancelled"


class NativeError(CharioteerError, RuntimeError):
    """A native task's function said that it failed.

    Args:
        function: its name.
        code: what it said.
        how: by its return value (``"returned"``), by ``"errno"``, or by its parameter ``"info"``.
    """

    def __init__(self, function: str, code: int, how: str) -> None:
        super().__init__(function, code, how)
        self.function = function
        self.code = code
        self.how = how

    def __str__(self) -> str:
        if self.how == "errno":
            return f"{self.function} failed with errno {self.code}: {os.strerror(self.code)}"
        if self.how == "info":
            return f"{self.function} failed with info = {self.code}"
        return f"{self.function} failed: it returned {self.code}"


class KernelError(CharioteerError, RuntimeError):
    """A kernel cannot be compiled, loaded or launched.

    Args:
        kernel: its name.
        why: what the compiler or the driver says.
    """

    def __init__(self, kernel: str, why: str) -> None:
        super().__init__(kernel, why)
        self.kernel = kernel
        self.why = why

    def __str__(self) -> str:
        return f"{self.kernel}: {self.why}"


class CommunicatorError(CharioteerError, RuntimeError):
    """There is no NCCL for a communicator, or it refuses what it is asked for, with its words."""


class DeviceError(CharioteerError, RuntimeError):
    """What was enqueued on a device failed, or was refused; ``__cause__`` is the exception that an
    operation raised.

    Args:
        message: which device, and why.
    """


class DeviceLostError(DeviceError):
    """A device failed for good: everything that was on it is gone.

    Args:
        device: which one.
        why: what is known of the reason.
    """

    def __init__(self, device: str, why: str) -> None:
        super().__init__(device, why)
        self.device = device
        self.why = why

    def __str__(self) -> str:
        return f"{self.device} is lost: {self.why}"


class OutOfDeviceMemoryError(CharioteerError, MemoryError):
    """A device has no room.

    Args:
        device: which one.
        wanted: bytes asked for.
        free: bytes free, in pieces perhaps.
    """

    def __init__(self, device: str, wanted: int, free: int) -> None:
        super().__init__(device, wanted, free)
        self.device = device
        self.wanted = wanted
        self.free = free

    def __str__(self) -> str:
        return f"{self.device} has no room for {self.wanted} bytes: {self.free} are free"


class NoRuntimeError(CharioteerError, RuntimeError):
    """No runtime is open, or the one that was meant is closed."""


class RuntimeActiveError(CharioteerError, RuntimeError):
    """A second runtime was to be opened in one process."""


class WorkerLimitError(CharioteerError, RuntimeError):
    """So many bodies wait for tasks that no thread is left to run one.

    Args:
        chain: who waits, and for what.
    """

    def __init__(self, chain: Sequence[str]) -> None:
        super().__init__(chain)
        self.chain = list(chain)

    def __str__(self) -> str:
        shown = " -> ".join(self.chain[:20])
        return (
            f"too many bodies block in waits: {shown}; make them `async def` and await, or pass"
            " handles as arguments"
        )
