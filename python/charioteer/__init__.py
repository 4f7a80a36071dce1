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
    Context,
    Task,
    TaskFunction,
    TaskList,
    TaskSpace,
    connect,
    read_trace,
    spawn,
    spawn_many,
    task,
)
from charioteer._futures import TaskGroup, WaitResult, as_completed, gather, wait
from charioteer._native import In, InOut, Out, native
from charioteer._runtime import Runtime
from charioteer._trace import TraceCheck, Violation, check_trace
from charioteer._variants import SpecializedFunction, specialize
from charioteer.devices import Device, DeviceSet, Kind, Requirement, cpu, gpu
from charioteer.errors import (
    AccessError,
    CancelledError,
    CaptureError,
    CaptureWarning,
    CharioteerError,
    CycleError,
    DependencyError,
    DeviceError,
    DeviceLostError,
    DuplicateTaskError,
    MachineError,
    ModelError,
    NativeError,
    NoRuntimeError,
    OutOfDeviceMemoryError,
    PlacementError,
    PolicyError,
    RuntimeActiveError,
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
    "CancelledError",
    "CaptureError",
    "CaptureWarning",
    "CharioteerError",
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
    "Kind",
    "Machine",
    "MachineError",
    "ModelError",
    "NativeError",
    "NoRuntimeError",
    "Out",
    "OutOfDeviceMemoryError",
    "PlacementError",
    "PolicyError",
    "Requirement",
    "Runtime",
    "RuntimeActiveError",
    "SpecializedFunction",
    "Task",
    "TaskFunction",
    "TaskGroup",
    "TaskList",
    "TaskSpace",
    "TaskTimeoutError",
    "TraceCheck",
    "UnspawnedDependencyError",
    "VariantError",
    "Violation",
    "WaitResult",
    "WorkerLimitError",
    "as_completed",
    "check_trace",
    "cpu",
    "current",
    "gather",
    "gpu",
    "native",
    "read_trace",
    "spawn",
    "spawn_many",
    "specialize",
    "task",
    "wait",
]
