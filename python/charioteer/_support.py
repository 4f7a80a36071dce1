"""What the core calls in Python: everything here is named in ``support.rs``.

The core is Rust; what is rare, or says things to people, is easier to keep right here.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, CoroutineType, FunctionType, MethodType
from typing import Any

from charioteer import errors
from charioteer._futures import future, join_group
from charioteer._modes import read_modes
from charioteer._placement import resolve as resolve_placement
from charioteer._pools import limit_enter, limit_exit, limit_thread, refresh_limits
from charioteer._variants import (
    Variants,
    check_shards,
    read_cost,
    read_shards,
    read_size,
    variant_decorator,
)
from charioteer.devices import held as devices
from charioteer.devices import normal as normal_placement
from charioteer.devices import read_memory
from charioteer.policies import score

__all__ = [
    "MethodType",
    "Variants",
    "analyse",
    "cancelled_class",
    "check_shards",
    "claim_coroutine",
    "communicator",
    "cuda",
    "data",
    "devices",
    "disclaim_coroutine",
    "each",
    "error",
    "future",
    "join_group",
    "kernels",
    "limit_enter",
    "limit_exit",
    "limit_thread",
    "loaded",
    "log_callback",
    "loop",
    "normal_placement",
    "operation_failed",
    "partial",
    "read_cost",
    "read_memory",
    "read_modes",
    "read_shards",
    "read_size",
    "refresh_limits",
    "resolve_placement",
    "score",
    "start_thread",
    "variant_decorator",
    "virtual_array",
    "warn",
    "warn_capture",
]

partial = functools.partial


def operation_failed(error: BaseException) -> str:
    """What an exception of a device's operation says, with its traceback as a note.

    The frames themselves are given up: they have views of device memory in their variables.
    """
    import traceback

    note = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    inner: BaseException | None = error
    while inner is not None:
        inner.__traceback__ = None
        inner = inner.__cause__ or inner.__context__
    try:
        error.add_note(f"In an operation of a device:\n{note}")
        return f"{type(error).__name__}: {error}"
    except Exception:  # what refuses attributes, or to be shown
        return type(error).__name__


def each(context: Any) -> Iterator[Any]:
    """The devices of a running task in turn, each while it is current."""
    before = context.make_current(0)
    try:
        for at, device in enumerate(context.devices):
            context.make_current(at)
            yield device
    finally:
        context.make_current(before)


def loop(call: str, *arguments: Any) -> Any:
    """Calls a function of the module ``_loop``, which is imported when the first one is: asyncio
    costs programs without coroutines more than all the rest."""
    from charioteer import _loop

    return getattr(_loop, call)(*arguments)


def cuda(call: str, *arguments: Any) -> Any:
    """Calls a function of the module ``_cuda``, which programs without such devices never need."""
    from charioteer import _cuda

    return getattr(_cuda, call)(*arguments)


def communicator(context: Any, is_virtual: bool) -> Any:
    """Collective operations among the GPUs of a running task."""
    from charioteer._communicators import communicator

    return communicator(context, is_virtual)


def kernels(call: str, *arguments: Any) -> Any:
    """Calls a function of the module ``_kernels``."""
    from charioteer import _kernels

    return getattr(_kernels, call)(*arguments)


def data(call: str, *arguments: Any) -> Any:
    """Calls a function of the module ``_data``."""
    from charioteer import _data

    return getattr(_data, call)(*arguments)


def virtual_array(*arguments: Any) -> Any:
    """The array of a virtual GPU for memory that the runtime owns."""
    from charioteer import virtual

    return virtual.ndarray.managed(*arguments)


def loaded_loop() -> Any:
    """The module ``_loop``, if a coroutine needed it so far."""
    if "charioteer._loop" not in sys.modules:
        return None
    # Another thread may be in the middle of its import, which this waits for.
    from charioteer import _loop

    return _loop


def loaded(call: str, *arguments: Any) -> Any:
    """As :func:`loop`, but nothing if no coroutine needed the module so far."""
    module = loaded_loop()
    return None if module is None else getattr(module, call)(*arguments)


def cancelled_class() -> type[BaseException] | None:
    """What asyncio throws into a coroutine that is cancelled, if asyncio is imported at all."""
    asyncio = sys.modules.get("asyncio")
    return None if asyncio is None else asyncio.CancelledError


_claimed: dict[int, weakref.ref[CoroutineType[Any, Any, Any]]] = {}


def claim_coroutine(coroutine: CoroutineType[Any, Any, Any]) -> None:
    """Notes that a coroutine object is a task's: two that step it would disturb each other.

    Raises:
        RuntimeError: it is one's already.
    """
    identity = id(coroutine)
    # The reference calls back before the memory, and so the identity, can be another object's.
    claim = weakref.ref(coroutine, lambda _: _claimed.pop(identity, None))
    # One operation on the dictionary, so that one of two threads is first.
    if _claimed.setdefault(identity, claim) is not claim:
        raise RuntimeError(
            f"the coroutine object {coroutine.__name__!r} was spawned before, and runs once: spawn"
            " its function, or call that again"
        )


def disclaim_coroutine(coroutine: CoroutineType[Any, Any, Any]) -> None:
    """Takes :func:`claim_coroutine` back: the task was not spawned after all."""
    _claimed.pop(id(coroutine), None)


def _log() -> Any:
    import logging

    return logging.getLogger("charioteer")


def error(kind: str, arguments: tuple[Any, ...]) -> errors.CharioteerError:
    """The named error of that kind."""
    made = getattr(errors, kind)(*arguments)
    assert isinstance(made, errors.CharioteerError)
    return made


def start_thread(name: str, main: Callable[[], None]) -> None:
    """Starts a worker: a daemon, since the runtime ends its threads itself."""
    threading.Thread(target=main, name=name, daemon=True).start()


def log_callback(function: object, exception: BaseException) -> None:
    """Logs what a callback raised; nobody else could receive it."""
    _log().error("the callback %r raised", function, exc_info=exception)


def warn(message: str) -> None:
    """Warns of something that concerns no task."""
    _log().warning("%s", message)


def warn_capture(task: str, name: str, namespace: dict[str, Any], body: object) -> None:
    """Warns that a module variable was rebound before a body that reads it ran."""
    if isinstance(body, functools.partial):
        body = body.func
    if isinstance(body, MethodType):
        body = body.__func__
    code = body.__code__ if isinstance(body, FunctionType) else None
    warnings.warn_explicit(
        f"the module variable {name!r} was rebound after {_function(task)} was spawned and before"
        f" it ran, so the body sees the new value: bind it with a parameter, {name}={name}",
        errors.CaptureWarning,
        filename="<module>" if code is None else code.co_filename,
        lineno=1 if code is None else code.co_firstlineno,
        module=namespace.get("__name__", "<module>"),
        registry=namespace.setdefault("__warningregistry__", {}),
    )


def _function(task: str) -> str:
    # Without its index: the same text is shown once per place.
    return task.split("[", 1)[0]


def analyse(code: CodeType) -> tuple[str, str | None, list[str], int, int]:
    """What the runtime has to know of a body's code.

    Returns:
        its name; a captured variable that it assigns, if it does; the module variables that it
        reads and does not assign; how many positional and how many keyword-only parameters it has.
    """
    assigned: str | None = None
    read: dict[str, None] = {}
    written: set[str] = set()
    for operation, name in _names(code, set(code.co_freevars)):
        match operation:
            case "free":
                assigned = name
            case "read":
                read[name] = None
            case "write":
                written.add(name)
    names = [sys.intern(name) for name in read if name not in written]
    return code.co_name, assigned, names, code.co_argcount, code.co_kwonlyargcount


def _names(code: CodeType, free: set[str]) -> Iterator[tuple[str, str]]:
    """What code and the code in it do to names that are not theirs."""
    import dis

    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in ("STORE_DEREF", "DELETE_DEREF"):
            if name in free:
                yield "free", name
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            yield "write", name
        elif instruction.opname == "LOAD_GLOBAL":
            yield "read", name
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant, free.intersection(constant.co_freevars))
