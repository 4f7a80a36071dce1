"""Charioteer runs the tasks of one program over the devices of one machine.

A task is a function that the runtime calls when everything it depends on is done. The scheduler is
Rust and needs no GIL::

    import charioteer as ch

    with ch.Runtime():
        T = ch.TaskSpace("squares")
        for i in range(10):
            @ch.spawn(T[i], dependencies=[T[i - 1]])
            def square():
                return i * i
        print(T.result())
"""

from charioteer import _support as _support
from charioteer._core import (
    Array,
    Context,
    Kernel,
    Region,
    Task,
    TaskFunction,
    TaskList,
    TaskSpace,
    Tiles,
    Token,
    connect,
    read_trace,
    spawn,
    spawn_many,
    task,
    unordered,
)
from charioteer._data import array, asarray, empty, full, token, zeros
from charioteer._futures import TaskGroup, WaitResult, as_completed, gather, wait
from charioteer._kernels import kernel
from charioteer._modes import Commute, In, InOut, Max, Min, Out, Prod, Sum
from charioteer._native import native
from charioteer._runtime import Runtime
from charioteer._shared_pool import share_memory_pool
from charioteer._trace import (
    MoveCheck,
    OrderCheck,
    TraceCheck,
    Violation,
    check_order,
    check_trace,
)
from charioteer._variants import SpecializedFunction, specialize
from charioteer.devices import Device, DeviceSet, Kind, Requirement, cpu, gpu
from charioteer.errors import (
    AccessError,
    CancelledError,
    CaptureError,
    CaptureWarning,
    CharioteerError,
    CommunicatorError,
    CycleError,
    DependencyError,
    DeviceError,
    DeviceLostError,
    DuplicateTaskError,
    KernelError,
    MachineError,
    ModelError,
    NativeError,
    NoRuntimeError,
    OutOfDeviceMemoryError,
    PlacementError,
    PolicyError,
    RuntimeActiveError,
    StreamWarning,
    TaskTimeoutError,
    UnspawnedDependencyError,
    VariantError,
    WorkerLimitError,
)
from charioteer.machine import Machine

connect()
del connect

from charioteer._runtime import current  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AccessError",
    "Array",
    "CancelledError",
    "CaptureError",
    "CaptureWarning",
    "CharioteerError",
    "CommunicatorError",
    "Commute",
    "Context",
    "CycleError",
    "DependencyError",
    "Device",
    "DeviceError",
    "DeviceLostError",
    "DeviceSet",
    "DuplicateTaskError",
    "In",
    "InOut",
    "Kernel",
    "KernelError",
    "Kind",
    "Machine",
    "MachineError",
    "Max",
    "Min",
    "ModelError",
    "MoveCheck",
    "NativeError",
    "NoRuntimeError",
    "OrderCheck",
    "Out",
    "OutOfDeviceMemoryError",
    "PlacementError",
    "PolicyError",
    "Prod",
    "Region",
    "Requirement",
    "Runtime",
    "RuntimeActiveError",
    "SpecializedFunction",
    "StreamWarning",
    "Sum",
    "Task",
    "TaskFunction",
    "TaskGroup",
    "TaskList",
    "TaskSpace",
    "TaskTimeoutError",
    "Tiles",
    "Token",
    "TraceCheck",
    "UnspawnedDependencyError",
    "VariantError",
    "Violation",
    "WaitResult",
    "WorkerLimitError",
    "array",
    "as_completed",
    "asarray",
    "check_order",
    "check_trace",
    "cpu",
    "current",
    "empty",
    "full",
    "gather",
    "gpu",
    "kernel",
    "native",
    "read_trace",
    "share_memory_pool",
    "spawn",
    "spawn_many",
    "specialize",
    "task",
    "token",
    "unordered",
    "wait",
    "zeros",
]
