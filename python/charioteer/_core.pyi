import sys
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextvars import Context as ContextVars
from os import PathLike
from types import EllipsisType, TracebackType
from typing import (
    Any,
    Concatenate,
    Generic,
    Literal,
    NoReturn,
    ParamSpec,
    Self,
    SupportsIndex,
    TypeAlias,
    TypeVar,
    final,
    overload,
)

import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

from charioteer._communicators import Communicator
from charioteer._futures import Tasks
from charioteer._variants import (
    ArrayLibrary,
    Cost,
    HeldDevices,
    Shards,
    Size,
    VariantDecorator,
)
from charioteer.devices import Device, Kind, Placement
from charioteer.policies import Policy

__all__ = [
    "Allocation",
    "Array",
    "Awaiting",
    "BlasRoutine",
    "Clock",
    "Context",
    "CudaStream",
    "Engine",
    "Event",
    "ForeignMemory",
    "HostAccess",
    "Kernel",
    "KernelLaunch",
    "Memory",
    "NativeFunction",
    "OpenMachine",
    "PoolMemory",
    "Region",
    "Spawner",
    "Stream",
    "Subscription",
    "Task",
    "TaskDecorator",
    "TaskFunction",
    "TaskList",
    "TaskSpace",
    "Tensor",
    "Tiles",
    "Token",
    "View",
    "after_fork",
    "awaiting",
    "block",
    "cancel_requested",
    "check_order",
    "check_trace",
    "connect",
    "count_groups",
    "cuda_device_of",
    "cuda_devices",
    "cuda_meeting",
    "current_context",
    "dlpack",
    "finish_elsewhere",
    "finish_operations",
    "held_devices",
    "host_nodes",
    "is_failed",
    "is_open",
    "is_worker",
    "known_models",
    "lapack_adapters",
    "launch_loop",
    "leave_native_step",
    "limits_changed",
    "read_trace",
    "set_default_runtime_factory",
    "share_pool",
    "share_pool_with_torch",
    "spawn",
    "spawn_many",
    "spin_address",
    "spin_graph",
    "spin_threads",
    "submit",
    "task",
    "task_stream",
    "unordered",
    "unpinned",
    "work",
]

_P = ParamSpec("_P")
_Q = ParamSpec("_Q")
_R = TypeVar("_R")
_R_co = TypeVar("_R_co", covariant=True)
_S = TypeVar("_S")

_Regions: TypeAlias = Region | Token | Iterable[Region | Token]
"""A region of a managed array, or several."""

_Index: TypeAlias = SupportsIndex | slice | EllipsisType | None

_Model: TypeAlias = tuple[str, str, int, int, int, int, float | None]

# Tasks.

@final
class Task(Generic[_R_co]):
    def result(self, timeout: float | None = None) -> _R_co: ...
    def exception(self, timeout: float | None = None) -> BaseException | None: ...
    def done(self) -> bool: ...
    def running(self) -> bool: ...
    def cancel(self) -> bool: ...
    def cancelled(self) -> bool: ...
    def add_done_callback(self, function: Callable[[Self], object]) -> None: ...
    def future(self) -> Future[_R_co]: ...
    @property
    def name(self) -> str: ...
    @property
    def id(self) -> int: ...
    def __await__(self) -> Generator[Any, Any, _R_co]: ...
    def __bool__(self) -> bool: ...
    def __hash__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    @classmethod
    def __class_getitem__(cls, item: object, /) -> type[Self]: ...

@final
class TaskList(Generic[_R_co]):
    def __new__(cls, tasks: Tasks, /) -> Self: ...
    def done(self) -> bool: ...
    def result(self, timeout: float | None = None) -> list[_R_co]: ...
    def cancel(self) -> bool: ...
    def __await__(self) -> Generator[Any, Any, list[_R_co]]: ...
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Task[_R_co]: ...
    @overload
    def __getitem__(self, index: slice, /) -> Self: ...
    def __iter__(self) -> Iterator[Task[_R_co]]: ...
    def __contains__(self, thing: object, /) -> bool: ...
    @classmethod
    def __class_getitem__(cls, item: object, /) -> type[Self]: ...

# An index below the lower bound gives an empty list, which is of use as a dependency only; so
# indices are typed as what they give within the bounds.
@final
class TaskSpace:
    def __new__(
        cls,
        name: str | None = None,
        *,
        shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
        start: SupportsIndex | Iterable[SupportsIndex] | None = None,
    ) -> Self: ...
    @property
    def name(self) -> str: ...
    @property
    def view(self) -> View: ...
    def tasks(self) -> TaskList[Any]: ...
    def clear(self, selection: Tasks | None = None) -> None: ...
    def result(self, timeout: float | None = None) -> list[Any]: ...
    def cancel(self) -> bool: ...
    def __await__(self) -> Generator[Any, Any, list[Any]]: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    @overload
    def __getitem__(  # type: ignore[overload-overlap]
        self, index: SupportsIndex | tuple[SupportsIndex, ...], /
    ) -> Task[Any]: ...
    @overload
    def __getitem__(
        self,
        index: slice | list[int] | range | tuple[SupportsIndex | slice | list[int] | range, ...],
        /,
    ) -> TaskList[Any]: ...
    def __iter__(self) -> Iterator[Task[Any]]: ...
    def __contains__(self, thing: object, /) -> bool: ...

@final
class View:
    def __getitem__(
        self,
        index: SupportsIndex
        | slice
        | list[int]
        | range
        | tuple[SupportsIndex | slice | list[int] | range, ...],
        /,
    ) -> TaskList[Any]: ...

# Spawning.

@final
class TaskFunction(Generic[_P, _R_co]):
    # Any argument may be a handle of what the parameter takes.
    @overload
    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> Task[_R_co]: ...
    @overload
    def __call__(self, *args: Any, **kwargs: Any) -> Task[_R_co]: ...
    # Of a coroutine function the result type is the awaited one, which a plain call does not give.
    @property
    def fn(self) -> Callable[_P, Any]: ...
    @property
    def __wrapped__(self) -> Callable[_P, Any]: ...
    def options(
        self,
        name: str | Task[Any] | None = None,
        *,
        dependencies: Tasks | None = None,
        priority: int | None = None,
        placement: Placement | None = None,
        share: float | None = None,
        memory: int | str | None = None,
        cost: Cost | None = None,
        size: Size | None = None,
        timeout: float | None = None,
        retries: int | None = None,
        input: _Regions | None = None,
        output: _Regions | None = None,
        inout: _Regions | None = None,
        commute: _Regions | None = None,
        shards: Shards | None = None,
        array_library: ArrayLibrary | None = None,
        idempotent: bool | None = None,
    ) -> Self: ...
    def map(self, *iterables: Iterable[Any]) -> TaskList[_R_co]: ...
    def variant(
        self,
        placement: Placement,
        /,
        *,
        cost: Cost | None = None,
        shards: Shards | None = None,
        array_library: ArrayLibrary | None = None,
    ) -> VariantDecorator[_R_co]: ...
    def _register(
        self,
        body: object,
        placement: object,
        cost: object,
        shards: object,
        library: str | None,
    ) -> None: ...
    @overload
    def __get__(self, instance: None, owner: type | None = None, /) -> Self: ...
    @overload
    def __get__(
        self: TaskFunction[Concatenate[_S, _Q], _R], instance: _S, owner: type | None = None, /
    ) -> TaskFunction[_Q, _R]: ...
    @overload
    def __get__(
        self, instance: object, owner: type | None = None, /
    ) -> TaskFunction[..., _R_co]: ...
    @classmethod
    def __class_getitem__(cls, item: object, /) -> type[Self]: ...

@final
class TaskDecorator:
    @overload
    def __call__(self, function: TaskFunction[_P, _R], /) -> TaskFunction[_P, _R]: ...
    @overload
    def __call__(
        self, function: classmethod[Any, _P, Coroutine[Any, Any, _R]], /
    ) -> TaskFunction[_P, _R]: ...
    @overload
    def __call__(self, function: classmethod[Any, _P, _R], /) -> TaskFunction[_P, _R]: ...
    @overload
    def __call__(
        self, function: Callable[_P, Coroutine[Any, Any, _R]], /
    ) -> TaskFunction[_P, _R]: ...
    @overload
    def __call__(self, function: Callable[_P, _R], /) -> TaskFunction[_P, _R]: ...

# What is spawned inline has a default for every parameter, which `Callable[[], ...]` would say, but
# checkers refuse lambdas with defaults there.
@final
class Spawner:
    @overload
    def __call__(self, function: Coroutine[Any, Any, _R], /) -> Task[_R]: ...
    @overload
    def __call__(self, function: Callable[..., Coroutine[Any, Any, _R]], /) -> Task[_R]: ...
    @overload
    def __call__(self, function: Callable[..., _R], /) -> Task[_R]: ...

@overload
def task(
    function: TaskFunction[_P, _R],
    /,
    *,
    name: str | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
    base: bool = True,
) -> TaskFunction[_P, _R]: ...
@overload
def task(
    function: classmethod[Any, _P, Coroutine[Any, Any, _R]],
    /,
    *,
    name: str | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
    base: bool = True,
) -> TaskFunction[_P, _R]: ...
@overload
def task(
    function: classmethod[Any, _P, _R],
    /,
    *,
    name: str | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
    base: bool = True,
) -> TaskFunction[_P, _R]: ...
@overload
def task(
    function: Callable[_P, Coroutine[Any, Any, _R]],
    /,
    *,
    name: str | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
    base: bool = True,
) -> TaskFunction[_P, _R]: ...
@overload
def task(
    function: Callable[_P, _R],
    /,
    *,
    name: str | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
    base: bool = True,
) -> TaskFunction[_P, _R]: ...
@overload
def task(
    function: None = None,
    /,
    *,
    name: str | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
    base: bool = True,
) -> TaskDecorator: ...
@overload
def spawn(
    target: TaskFunction[..., _R],
    /,
    *,
    name: str | Task[Any] | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
) -> Task[_R]: ...
@overload
def spawn(
    target: Coroutine[Any, Any, _R],
    /,
    *,
    name: str | Task[Any] | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
) -> Task[_R]: ...
@overload
def spawn(
    target: Callable[..., Coroutine[Any, Any, _R]],
    /,
    *,
    name: str | Task[Any] | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
) -> Task[_R]: ...
@overload
def spawn(
    target: Callable[..., _R],
    /,
    *,
    name: str | Task[Any] | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
) -> Task[_R]: ...
@overload
def spawn(
    target: str | Task[Any] | None = None,
    /,
    *,
    name: str | Task[Any] | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
) -> Spawner: ...
@overload
def spawn_many(
    function: TaskFunction[..., _R],
    iterable: Iterable[Any],
    /,
    *,
    name: str | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
) -> TaskList[_R]: ...
@overload
def spawn_many(
    function: Callable[[Any], Coroutine[Any, Any, _R]],
    iterable: Iterable[Any],
    /,
    *,
    name: str | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
) -> TaskList[_R]: ...
@overload
def spawn_many(
    function: Callable[[Any], _R],
    iterable: Iterable[Any],
    /,
    *,
    name: str | None = None,
    dependencies: Tasks | None = None,
    priority: int | None = None,
    placement: Placement | None = None,
    share: float | None = None,
    memory: int | str | None = None,
    cost: Cost | None = None,
    size: Size | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    input: _Regions | None = None,
    output: _Regions | None = None,
    inout: _Regions | None = None,
    commute: _Regions | None = None,
    shards: Shards | None = None,
    array_library: ArrayLibrary | None = None,
    idempotent: bool | None = None,
) -> TaskList[_R]: ...
@overload
def submit(
    function: TaskFunction[..., _R],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any] | None = None,
    raw: bool = False,
) -> Task[_R]: ...
@overload
def submit(
    function: Callable[..., Coroutine[Any, Any, _R]],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any] | None = None,
    raw: bool = False,
) -> Task[_R]: ...
@overload
def submit(
    function: Coroutine[Any, Any, _R],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any] | None = None,
    raw: bool = False,
) -> Task[_R]: ...
@overload
def submit(
    function: Callable[..., _R],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any] | None = None,
    raw: bool = False,
) -> Task[_R]: ...

# Waiting.

@final
class Awaiting:
    def done(self) -> bool: ...
    def value(self) -> Any: ...
    def call(self, function: Callable[[], object]) -> Subscription: ...
    def cancel(self) -> None: ...
    def __await__(self) -> Generator[Any, Any, Any]: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> Self: ...

@final
class Subscription:
    def forget(self) -> None: ...

def block(tasks: Tasks, until: str, timeout: float | None = None) -> bool: ...
def awaiting(tasks: Tasks, until: str, values: bool = True) -> Awaiting: ...
def is_failed(task: Task[Any]) -> bool: ...
def cancel_requested(task: Task[Any]) -> bool: ...

# Managed arrays. What indexing gives is an argument of tasks, whose parameters have the types of
# the arrays that bodies get; so it is typed as anything.

@disjoint_base
class Region:
    __array_ufunc__: None
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def base(self) -> Array: ...
    def tiles(self, shape: SupportsIndex | Iterable[SupportsIndex]) -> Tiles: ...
    def shards(self, n: int, *, axis: int = 0) -> tuple[Any, ...]: ...
    def numpy(self) -> np.ndarray[Any, Any]: ...
    def host(self, mode: Literal["r", "rw"] = "r") -> HostAccess: ...
    def fill(self, value: Any) -> Task[None]: ...
    def prefetch(self, device: Device | Kind) -> Task[None]: ...
    def evict(self, device: Device | Kind) -> Task[None]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: _Index | tuple[_Index, ...], /) -> Any: ...
    def __setitem__(self, index: _Index | tuple[_Index, ...], value: Any, /) -> None: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __bool__(self) -> NoReturn: ...
    def __complex__(self) -> NoReturn: ...
    def __hash__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __array__(
        self, dtype: npt.DTypeLike | None = None, *, copy: bool | None = None
    ) -> np.ndarray[Any, Any]: ...
    def __dlpack__(self, **options: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

@final
class Array(Region):
    def __new__(
        cls, buffer: np.ndarray[Any, Any], name: str, memory: ForeignMemory | None = None
    ) -> Self: ...
    def release(self) -> None: ...

@final
class Tiles:
    @property
    def base(self) -> Any: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def tile(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(
        self, index: SupportsIndex | slice | tuple[SupportsIndex | slice, ...], /
    ) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...

@final
class Token:
    def __new__(cls, name: str) -> Self: ...

@final
class HostAccess:
    def __enter__(self) -> np.ndarray[Any, Any]: ...
    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None: ...

def unordered(region: Any, /) -> Any: ...

# Native tasks.

@final
class NativeFunction:
    def __new__(
        cls,
        name: str,
        address: int,
        owner: object,
        parameters: list[tuple[str, str]],
        order: str,
        returns: str,
        check: str | None,
        signature: str,
    ) -> Self: ...
    def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
    @property
    def __name__(self) -> str: ...
    @property
    def __qualname__(self) -> str: ...

@final
class Kernel:
    def __new__(
        cls,
        name: str,
        provide: Callable[[int, int, int], tuple[str, Any, str]],
        parameters: list[tuple[str, str, int | None]],
        layout: str,
        signature: str,
        *,
        dependencies: Tasks | None = None,
        priority: int | None = None,
        placement: Placement | None = None,
        share: float | None = None,
        memory: int | str | None = None,
        cost: Cost | None = None,
        size: Size | None = None,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Self: ...
    def __getitem__(self, shape: Any, /) -> TaskFunction[..., None]: ...
    def __call__(self, *_arguments: Any, **_keywords: Any) -> NoReturn: ...
    @property
    def __name__(self) -> str: ...

@final
class KernelLaunch:
    def __call__(self, *arguments: Any) -> None: ...
    @property
    def __name__(self) -> str: ...
    @property
    def __qualname__(self) -> str: ...

@final
class BlasRoutine:
    def __new__(
        cls, declared: Callable[..., None], load: Callable[[str], tuple[Any, int, int]]
    ) -> Self: ...
    def __call__(self, *arguments: Any, **keywords: Any) -> None: ...
    @property
    def __name__(self) -> str: ...
    @property
    def __qualname__(self) -> str: ...
    @property
    def __wrapped__(self) -> Callable[..., None]: ...

def lapack_adapters() -> tuple[int, int]: ...

# The runtime and the running task.

@final
class Engine:
    def __new__(
        cls,
        workers: int,
        max_pending: int | None = None,
        trace: str | PathLike[str] | None = None,
        on_failure: Callable[[Task[Any]], object] | None = None,
        gil: int | None = None,
        machine: OpenMachine | None = None,
        runahead: int = 64,
        policy: str | Policy | None = None,
        seed: int = 0,
        models: str | None = None,
        overtaking: int = 128,
        pin: tuple[str, Sequence[Sequence[int]]] | None = None,
        check: bool | None = None,
    ) -> Self: ...
    @property
    def workers(self) -> int: ...
    @property
    def cores(self) -> int: ...
    @property
    def forked(self) -> bool: ...
    def drain(self, limit: float | None = None) -> bool: ...
    def cancel_all(self) -> None: ...
    def close(self) -> list[Task[Any]]: ...
    def abandon(self) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def export_models(self) -> str: ...
    def models(self) -> list[_Model]: ...

@final
class Context:
    @property
    def task(self) -> Task[Any]: ...
    @property
    def cores(self) -> list[int]: ...
    @property
    def devices(self) -> tuple[Device, ...]: ...
    @property
    def device(self) -> Device: ...
    @property
    def streams(self) -> tuple[Stream | CudaStream, ...]: ...
    @property
    def stream(self) -> Any: ...
    def make_current(self, at: int) -> int: ...
    def each(self) -> Iterator[Device]: ...
    @property
    def xp(self) -> Any: ...
    @property
    def array_library(self) -> str: ...
    def local(self, region: Region) -> Any: ...
    def barrier(self) -> None: ...
    @property
    def communicator(self) -> Communicator: ...
    def record(self, name: str) -> Event: ...
    def wait(self, name: str) -> None: ...
    @property
    def store(self) -> dict[Any, Any]: ...
    @property
    def cancel_requested(self) -> bool: ...
    def check_cancelled(self) -> None: ...

def current_context() -> Context: ...
def held_devices() -> HeldDevices | None: ...
def task_stream() -> tuple[int, Stream | None] | None: ...
def is_open() -> bool: ...
def known_models(document: str) -> list[_Model]: ...
def is_worker() -> bool: ...
def set_default_runtime_factory(factory: Callable[[], object] | None) -> None: ...
def check_trace(
    path: str | PathLike[str],
) -> tuple[int, int, int, list[tuple[str, int, int | None, str]]]: ...
def check_order(
    path: str | PathLike[str],
) -> tuple[
    int,
    int,
    tuple[int, int, int, int, int, int] | None,
    list[tuple[str, int, int | None, str]],
]: ...
def read_trace(
    path: str | PathLike[str],
) -> tuple[int, list[tuple[int, int, str, int, int]], dict[int, str]]: ...

# What the package's own parts tell the module.

def connect() -> None: ...
def after_fork() -> None: ...
def count_groups(entered: bool) -> None: ...
def limits_changed(modules: int) -> None: ...
def leave_native_step() -> ContextVars | None: ...
def finish_elsewhere(
    task: Task[Any], value: object, exception: BaseException | None = None
) -> None: ...

# Bodies of a known duration, for benchmarks.

def launch_loop(launch: KernelLaunch, count: int, *arguments: Any) -> float: ...
def spin_address() -> int: ...
def spin_graph(before: Sequence[Sequence[int]], seconds: float, workers: int) -> float: ...
def spin_threads(seconds: float, spins: int, threads: int) -> float: ...
def work(seconds: float, held: float = 0.0, slices: int = 1) -> None: ...

# Machines and their devices.

def cuda_devices() -> list[tuple[str, int, tuple[int, int], float, list[int]]]: ...
def dlpack(
    address: int, device: int, kind: tuple[int, int], shape: list[int], strides: list[int]
) -> object: ...
def share_pool() -> None: ...
def share_pool_with_torch(check: int) -> int: ...

@final
class PoolMemory:
    def __new__(cls, device: int, size: int, stream: int, owner: object) -> Self: ...
    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...

def cuda_device_of(address: int) -> int | None: ...
def cuda_meeting(device: int) -> int: ...

@final
class Tensor:
    def __new__(cls, capsule: object) -> Self: ...
    def describe(
        self,
    ) -> tuple[int, int, tuple[int, int, int], list[int], list[int] | None]: ...

@final
class ForeignMemory:
    @staticmethod
    def cuda(address: int, device: int, stream: int | None, keep: object) -> ForeignMemory: ...
    @staticmethod
    def of_virtual(memory: Memory, offset: int, stream: Stream, keep: object) -> ForeignMemory: ...
    @property
    def device(self) -> int: ...
    @property
    def is_managed(self) -> bool: ...

@final
class OpenMachine:
    def __new__(
        cls,
        cores: int,
        memory: int | None,
        gpus: list[tuple[int, str]],
        *,
        host: tuple[float, float],
        peer: tuple[float, float] | None,
        local: tuple[float, float],
        pairs: list[tuple[int, int, tuple[float, float]]],
        virtual_time: bool,
        cuda: bool = False,
    ) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None: ...
    def close(self) -> None: ...
    @property
    def gpus(self) -> int: ...
    @property
    def clock(self) -> Clock: ...
    def stream(self, gpu: int) -> Any: ...
    def measure(self, source: int | None, target: int | None, size: int) -> tuple[float, float]: ...
    def free_memory(self, gpu: int) -> int: ...
    def when_lost(self, gpu: int, call: Callable[[], object]) -> None: ...
    def enable_peer(self, gpu: int, peer: int) -> None: ...
    def counters(self, gpu: int) -> dict[str, Any]: ...
    def fail_copy(self, gpu: int, nth: int) -> None: ...
    def lose(self, gpu: int, why: str = "injected", *, after: int | None = None) -> None: ...
    def delay_event(self, gpu: int, delay: float) -> None: ...

@final
class Clock:
    @property
    def now(self) -> int: ...
    def advance(self) -> bool: ...

@final
class Stream:
    @property
    def device(self) -> int: ...
    @property
    def number(self) -> int: ...
    def enqueue(self, operation: Callable[[], object]) -> None: ...
    def busy(self, duration: float) -> None: ...
    def record(self) -> Event: ...
    def wait(self, event: Event) -> None: ...
    def synchronize(self) -> None: ...
    def allocate(self, size: int) -> Allocation: ...
    def reaches(self, memory: Memory) -> bool: ...
    def copy(
        self,
        source: Memory,
        source_offset: int,
        target: Memory,
        target_offset: int,
        size: int,
    ) -> None: ...
    def upload(self, source: Any, target: Memory, offset: int) -> None: ...
    def download(self, source: Memory, offset: int, size: int) -> bytearray: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class CudaStream:
    @property
    def device(self) -> int: ...
    @property
    def number(self) -> int: ...
    @property
    def handle(self) -> int: ...
    def __cuda_stream__(self) -> tuple[int, int]: ...
    @property
    def cupy(self) -> Any: ...
    @property
    def torch(self) -> Any: ...
    @property
    def numba(self) -> Any: ...
    def record(self) -> Event: ...
    def wait(self, event: Event) -> None: ...
    def synchronize(self) -> None: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Event:
    def is_complete(self) -> bool: ...
    def synchronize(self) -> None: ...

@final
class Memory:
    @property
    def device(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...
        def __release_buffer__(self, buffer: memoryview, /) -> None: ...

@final
class Allocation:
    @property
    def memory(self) -> Memory: ...
    @property
    def stream(self) -> Stream: ...
    def used_on(self, stream: Stream) -> None: ...

def finish_operations(limit: float) -> None: ...

# The processors of the host.

def host_nodes(
    system: str | PathLike[str], usable: Sequence[int]
) -> list[tuple[list[int], int]]: ...
def unpinned(start: Callable[[], _R]) -> _R: ...
