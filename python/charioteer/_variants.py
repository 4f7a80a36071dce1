"""Functions with bodies of their own for some device sets.

Protocol. A function has a *base* body, unless it is declared without one, and *variants*: a body,
and the sets that it is for. Which of them serves a set is a matter of the set alone:

* a variant's set *matches* a set that has as many devices of each kind, and all those that it
  names; ``gpu.all`` has as many as the machine;
* of those that match the most specific one serves: the one with the fewest ``.all``; then the one
  that names the most devices; then the one whose variant was registered for the fewest sets, so
  that ``gpu * 2`` comes before ``gpu * range(1, 9)``;
* where none matches the base serves, and without a base nothing does.

Two variants that would serve some set equally well cannot both be registered, so the order is total
for every set.

A placement's alternative need not name its devices, and a variant's set may. So an alternative
becomes one *choice* for each body that could serve it: ``gpu``, with a variant for ``gpu(0)``,
comes to ``gpu(0)`` for the variant and any GPU for the base. Where the scheduler may grant a choice
devices that a more specific variant is for, the choice is *open*, and the body is chosen when the
devices are known (:meth:`Variants.serving`).

The registered variants are one tuple, which is replaced as a whole, so that readers need no lock.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    NamedTuple,
    ParamSpec,
    TypeAlias,
    TypeVar,
    overload,
)

from charioteer import _core
from charioteer._modes import read_modes
from charioteer._quantities import read_bytes, read_seconds
from charioteer.devices import Alternative, Member, Placement, memories, normal, show_members
from charioteer.errors import AccessError, PlacementError, VariantError

if TYPE_CHECKING:
    from datetime import timedelta

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")

Cost: TypeAlias = "float | str | timedelta | Callable[..., float | str | timedelta]"
"""A run time: seconds, or a string such as ``"2ms"``, or a callable of the call's arguments that
gives one."""
Size: TypeAlias = float | str | Callable[..., float | str]
"""What run times are told apart by: a number, or a callable of the call's arguments that gives
one."""

Shards: TypeAlias = 'Mapping[str, int | Literal["replicated"]]'
"""What each device of a set has of a region, by the parameter: an axis along which the region is
split, or ``"replicated"``."""

ArrayLibrary: TypeAlias = Literal["cupy", "torch", "none"]
"""Whose arrays a body gets on devices of the CUDA driver: CuPy's, PyTorch's, or plain ones, which
have the protocols of other libraries and compute nothing."""

BASE = -1
"""Stands for the base body, where a number stands for a variant."""
REPLICATED = -1
"""Stands for ``"replicated"``, where a number stands for an axis."""


class Totals(NamedTuple):
    """What a runtime has of each kind."""

    cores: int
    gpus: int


HeldDevices = tuple[int, tuple[int, ...], int, int]
"""What a task holds, as the core says it: cores, the numbers of GPUs; and what the runtime has."""


class Held(NamedTuple):
    """Devices of a set on one machine: how many of each kind, and those that are known."""

    cores: int
    gpus: int
    named: tuple[int, ...]
    """The GPUs that are known by their numbers, in the set's order."""


class Variant(NamedTuple):
    """One body, and what it is for."""

    body: Any
    """A callable; of a native task function its native function."""
    sets: tuple[Alternative, ...]
    cost: Any
    """What was said of its run time, or ``None``."""
    shards: tuple[tuple[str, int], ...] = ()
    """The parameters whose regions are split, or replicated, over a set; as
    :func:`read_shards` gives them."""
    library: str | None = None
    """Whose arrays it gets, if that was said."""


class Match(NamedTuple):
    """A body that may serve a set."""

    body: int
    """The number of the variant, or :data:`BASE`."""
    sets: Alternative | None
    """The variant's set, if there is one."""
    more: tuple[int, ...]
    """The GPUs that have to be in the set besides those that are known to be."""
    open: bool
    """Whether a more specific variant is for some of the sets that this one may serve."""


def _rank(variant: Variant, alternative: Alternative) -> tuple[int, int, int]:
    """How specific a variant's set is; the least is the most specific."""
    every = sum(member.places is None for member in alternative.members)
    named = sum(member.device is not None for member in alternative.members)
    return every, -named, len(variant.sets)


def _meet(one: Alternative, other: Alternative) -> bool:
    """Whether some set of some machine matches both."""
    for kind in ("cpu", "gpu"):
        mine, others = (
            [member for member in alternative.members if member.kind == kind]
            for alternative in (one, other)
        )
        if not mine or not others:
            if mine or others:
                return False
            continue
        counts = {
            sum(member.places or 0 for member in members)
            for members in (mine, others)
            if all(member.places is not None for member in members)
        }
        named = {member.device for member in (*mine, *others)} - {None}
        if len(counts) > 1 or (counts and len(named) > min(counts)):
            return False
    return True


def held_on(alternative: Alternative, totals: Totals) -> Held:
    """The set where there is so much, whether or not that is enough."""
    counts = {"cpu": 0, "gpu": 0}
    for member in alternative.members:
        most = totals.cores if member.kind == "cpu" else totals.gpus
        counts[member.kind] += most if member.places is None else member.places
    named = tuple(member.device for member in alternative.members if member.device is not None)
    return Held(counts["cpu"], counts["gpu"], named)


class Variants:
    """The bodies of one function.

    Args:
        function: the base body, or what declares the function where there is none.
        base: whether it is a body.
    """

    def __init__(self, function: Any, base: bool) -> None:
        self.function = function
        self.base = base
        self.registered: tuple[Variant, ...] = ()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """What people call the function."""
        return str(getattr(self.function, "__name__", None) or type(self.function).__name__)

    def add(
        self,
        body: Any,
        placement: object,
        cost: Any = None,
        shards: object = None,
        library: str | None = None,
    ) -> tuple[Variant, ...]:
        """Registers a body for the sets that a placement names, and gives all that there are.

        Raises:
            AccessError: it is for a set and writes a region of which ``shards`` does not say what
                each device has, or ``shards`` names no parameter that takes one.
            PlacementError: no set, or one that no machine has.
            TypeError: no placement, or no body.
            VariantError: a variant for one of the sets is there already, or one that would serve
                some set equally well; or the body takes other parameters than the function.
        """
        sets = normal(placement)
        for one in sets:
            for member in one.members:
                if member.kind == "cpu" and member.device is not None:
                    shown = show_members(one.members)
                    raise PlacementError(f"{shown}: cores are all alike: say how many, cpu * n")
            if {member.kind for member in one.members} == {"cpu"} and (one.memory, one.share) != (
                None,
                None,
            ):
                shown = show_members(one.members)
                raise PlacementError(f"{shown}: needs of its own are for devices with memory")
        body = plain_body(body)
        self._check_parameters(body)
        split = read_shards(shards)
        check_shards(self.function, sets, split)
        new = Variant(body, sets, cost, split, library)
        with self._lock:
            for variant in self.registered:
                for old in variant.sets:
                    for one in sets:
                        self._check_order(variant, old, new, one)
            self.registered = (*self.registered, new)
            return self.registered

    def _check_order(
        self, variant: Variant, old: Alternative, new: Variant, one: Alternative
    ) -> None:
        if _rank(variant, old) != _rank(new, one) or not _meet(old, one):
            return
        shown = show_members(one.members)
        if sorted(old.members, key=repr) == sorted(one.members, key=repr):
            raise VariantError(f"{self.name} has a variant for {shown} already")
        raise VariantError(
            f"{self.name} has a variant for {show_members(old.members)}, and some sets match"
            f" {shown} as well as that: name their devices"
        )

    def _check_parameters(self, body: Any) -> None:
        mine, others = _parameters(self.function), _parameters(body)
        if mine is not None and others is not None and not others.takes(mine):
            raise VariantError(f"{self.name} takes {mine}, and its variant {others}")

    def matches(self, wanted: Held, totals: Totals, count: int | None = None) -> Iterator[Match]:
        """The bodies that may serve a set, the most specific first; the last one may serve all of
        it, unless nothing does.

        Args:
            wanted: the set.
            totals: what the runtime has.
            count: how many of the variants count, the first ones; all, unless said.
        """
        candidates = sorted(
            (
                (_rank(variant, one), number, one)
                for number, variant in enumerate(self.registered[:count])
                for one in variant.sets
            ),
            key=lambda candidate: candidate[:2],
        )
        unknown = wanted.gpus - len(wanted.named)
        before: list[set[int]] = []
        for _, number, one in candidates:
            held = held_on(one, totals)
            if (held.cores, held.gpus) != (wanted.cores, wanted.gpus):
                continue
            more = tuple(gpu for gpu in held.named if gpu not in wanted.named)
            if len(more) > unknown or any(earlier.issubset(more) for earlier in before):
                continue
            yield Match(number, one, more, bool(before) and len(more) < unknown)
            if not more:
                return
            before.append(set(more))
        if self.base:
            yield Match(BASE, None, (), bool(before))

    def serving(self, wanted: Held, totals: Totals, count: int | None = None) -> int:
        """The number of the variant that serves devices that are all known, or :data:`BASE`; takes
        and raises what :meth:`match` does."""
        return self.match(wanted, totals, count).body

    def match(self, wanted: Held, totals: Totals, count: int | None = None) -> Match:
        """The body that serves devices that are all known.

        Args:
            wanted: the devices.
            totals: what the runtime has.
            count: how many of the variants count, the first ones; all, unless said.

        Raises:
            PlacementError: no variant does, and there is no base.
        """
        for match in self.matches(wanted, totals, count):
            if not match.more:
                return match
        cores = [Member("cpu", None, wanted.cores)] if wanted.cores else []
        shown = show_members([*cores, *(Member("gpu", index, 1) for index in wanted.named)])
        raise PlacementError(f"{shown if shown != '()' else 'no device'}: {self.lacking}")

    def serving_held(self, held: HeldDevices, count: int) -> tuple[int, bool | None]:
        """The same for the devices that a task holds: the number of the variant, or :data:`BASE`,
        and whether it is for a set; ``None`` if the placement says."""
        cores, gpus, *totals = held
        match = self.match(Held(cores, len(gpus), gpus), Totals(*totals), count)
        return match.body, None if match.sets is None else match.sets.gathers

    @property
    def lacking(self) -> str:
        """Why a set that no variant is for cannot be served."""
        return f"no variant of {self.name} is for it, and there is no base body"

    def sets(self, count: int | None = None) -> tuple[Alternative, ...]:
        """The sets that the first variants name, in the order of their registration."""
        return tuple(
            dict.fromkeys(
                Alternative(one.members, None, None, one.gathers)
                for variant in self.registered[:count]
                for one in variant.sets
            )
        )


class _Parameters(NamedTuple):
    """The parameters of a function that has no ``*args`` and no ``**kwargs``."""

    positional: tuple[str, ...]
    """Those that may be given by position."""
    keyword: tuple[str, ...]
    """Those by keyword alone."""
    optional: frozenset[str]
    """Those with defaults."""

    def takes(self, calls: _Parameters) -> bool:
        """Whether every call that fits those fits these: what comes on top has a default."""
        count = len(calls.positional)
        return (
            self.positional[:count] == calls.positional
            and set(calls.keyword) <= {*self.keyword, *self.positional[count:]}
            and {*self.positional, *self.keyword} - self.optional
            <= {*calls.positional, *calls.keyword} - calls.optional
        )

    def __str__(self) -> str:
        star = ["*"] if self.keyword else []
        names = [*self.positional, *star, *self.keyword]
        return f"({', '.join(f'{x}=...' if x in self.optional else x for x in names)})"


def _parameters(body: Any) -> _Parameters | None:
    """The parameters of a function, where they are known and limited."""
    if isinstance(body, (staticmethod, classmethod)):
        body = body.__func__
    if not isinstance(body, FunctionType):
        return None
    code: CodeType = body.__code__
    if code.co_flags & _VARIADIC:
        return None
    names, count = code.co_varnames, code.co_argcount
    positional, keyword = names[:count], names[count : count + code.co_kwonlyargcount]
    optional = positional[count - len(body.__defaults__ or ()) :]
    return _Parameters(positional, keyword, frozenset((*optional, *(body.__kwdefaults__ or ()))))


_VARIADIC = 0x04 | 0x08
"""The flags of code with ``*args`` and with ``**kwargs``."""


class VariantDecorator(Generic[R]):
    """What ``.variant(...)`` gives: called with a body, it registers that and gives it back."""

    def __init__(self, register: Callable[..., object], *said: Any) -> None:
        self._register = register
        self._said = said

    @overload
    def __call__(self, body: _core.TaskFunction[Q, R], /) -> _core.TaskFunction[Q, R]: ...
    @overload
    def __call__(
        self, body: Callable[Q, Coroutine[Any, Any, R]], /
    ) -> Callable[Q, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(self, body: Callable[Q, R], /) -> Callable[Q, R]: ...
    def __call__(self, body: Any, /) -> Any:
        """Registers the body.

        Args:
            body: a function or any callable that takes what the function takes, or a native task
                function. Several decorators may register it for several sets.

        Raises:
            AccessError: it is for a set, and writes a region of which ``shards`` does not say what
                each device has.
            TypeError: no body: not callable, or a task function that is not native.
            VariantError: there is a variant for one of the sets already, or one that would serve
                some set equally well; or the body takes other parameters.
        """
        self._register(body, *self._said)
        return body


def variant_decorator(
    register: Callable[..., object],
    placement: object,
    cost: object = None,
    shards: object = None,
    library: str | None = None,
) -> VariantDecorator[Any]:
    """The decorator that registers a body for these sets.

    Raises:
        AccessError: shards that no region has.
        PlacementError: no set, or one that no machine has.
        TypeError: no placement, or no shards.
    """
    normal(placement)
    read_shards(shards)
    return VariantDecorator(register, placement, cost, shards, library)


def read_shards(shards: object) -> tuple[tuple[str, int], ...]:
    """What ``shards=`` says: parameters, each with an axis or :data:`REPLICATED`.

    Raises:
        AccessError: an axis that no array has.
        TypeError: no mapping from names to axes.
    """
    if shards is None:
        return ()
    if not isinstance(shards, Mapping):
        raise TypeError(f"shards is a dictionary of axes by parameter, not {type(shards).__name__}")
    found = []
    for name, axis in shards.items():
        if not isinstance(name, str):
            raise TypeError(f"shards has names of parameters, not {type(name).__name__}")
        if axis == "replicated":
            found.append((name, REPLICATED))
        elif isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f'shards of {name} are along an axis, or "replicated", not {axis!r}')
        elif not 0 <= axis < _MOST_AXES:
            raise AccessError(f"shards of {name} are along an axis from 0 on, not {axis}")
        else:
            found.append((name, axis))
    return tuple(found)


_MOST_AXES = 64
"""As NumPy has them."""


def check_shards(
    function: Any, sets: tuple[Alternative, ...], shards: tuple[tuple[str, int], ...]
) -> None:
    """Refuses a body for several devices that writes what each of them has whole.

    Raises:
        AccessError: it does, or ``shards`` names no parameter that takes regions.
    """
    wide = [one for one in sets if memories(one.members) not in (0, 1)]
    if not wide and not shards:
        return
    if isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    modes = read_modes(function) if isinstance(function, FunctionType) else None
    if modes is None:
        # What takes no regions, or is looked at when it is called.
        if shards and isinstance(function, FunctionType):
            raise AccessError(f"{function.__qualname__}: shards are of parameters with modes")
        return
    positional, _, by_keyword, _ = modes
    by_name = dict((*positional, *by_keyword))
    said = dict(shards)
    for name in said:
        if not by_name.get(name):
            raise AccessError(f"{function.__qualname__}: no parameter {name} takes a region")
    for name, mode in by_name.items():
        if wide and mode in ("Out", "InOut", "Commute") and name not in said:
            raise AccessError(
                f"{function.__qualname__}: {name} is written on {show_members(wide[0].members)},"
                f" and each device has all of it: split it, shards={{{name!r}: 0}}, or promise"
                f' equal copies, shards={{{name!r}: "replicated"}}'
            )


class SpecializedFunction(Generic[P, R]):
    """A function with bodies of its own for some device sets; :func:`specialize` makes one.

    Calling it in the body of a task calls the variant that is for the devices which that task
    holds, or the base body where none is; outside of tasks the base body.
    """

    def __init__(self, function: Callable[P, R], base: bool) -> None:
        functools.update_wrapper(self, function)
        self._variants = Variants(function, base)
        self._known: tuple[tuple[Variant, ...], dict[object, Callable[..., Any]]] = ((), {})

    @property
    def fn(self) -> Callable[P, R]:
        """The undecorated function."""
        function: Callable[P, R] = self._variants.function
        return function

    def variant(self, placement: Placement, /) -> VariantDecorator[R]:
        """Registers the body below it for device sets.

        Args:
            placement: a set, or a list of those: ``gpu``, ``gpu * 2``, ``gpu(0)``, ``gpu.all``,
                ``gpu * range(1, 9)``. Their order, and needs that they have, mean nothing here.

        Raises:
            TypeError: no placement.
            PlacementError: no set, or one that no machine has.
        """
        return variant_decorator(self._variants.add, placement)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the body that serves here.

        Raises:
            PlacementError: no variant is for the devices that the task holds, or no task runs here,
                and there is no base body.
        """
        registered = self._variants.registered
        known, bodies = self._known
        if known is not registered:
            bodies = {}
            self._known = (registered, bodies)
        key = _core.held_devices()
        body = bodies.get(key)
        if body is None:
            body = bodies[key] = self._body(key)
        result: R = body(*args, **kwargs)
        return result

    def _body(self, key: HeldDevices | None) -> Callable[..., Any]:
        variants = self._variants
        if key is None:
            if not variants.base:
                raise PlacementError(f"outside of tasks: {variants.lacking}")
            base: Callable[..., Any] = variants.function
            return base
        number, _ = variants.serving_held(key, len(variants.registered))
        serving: Callable[..., Any]
        serving = variants.function if number == BASE else variants.registered[number].body
        return serving

    @overload
    def __get__(
        self, instance: None, owner: type | None = None, /
    ) -> SpecializedFunction[P, R]: ...
    @overload
    def __get__(
        self: SpecializedFunction[Concatenate[S, Q], R], instance: S, owner: type | None = None, /
    ) -> Callable[Q, R]: ...
    def __get__(self, instance: Any, owner: type | None = None, /) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __repr__(self) -> str:
        return f"<specialized function {self._variants.function!r}>"


class Specializer:
    """What ``specialize(...)`` with options gives: called with a function, it specializes that."""

    def __init__(self, base: bool) -> None:
        self._base = base

    def __call__(self, function: Callable[P, R], /) -> SpecializedFunction[P, R]:
        """Specializes the function.

        Raises:
            TypeError: not callable, or a static or class method: decorate the function in it.
        """
        if isinstance(function, (staticmethod, classmethod)):
            raise TypeError(f"write @{type(function).__name__} above @specialize, not below it")
        if isinstance(function, _core.TaskFunction) or not callable(function):
            raise TypeError(
                "a specialized function is made from a plain function, not from"
                f" {type(function).__name__}"
            )
        return SpecializedFunction(function, self._base)


@overload
def specialize(function: Callable[P, R], /, *, base: bool = True) -> SpecializedFunction[P, R]: ...
@overload
def specialize(function: None = None, /, *, base: bool = True) -> Specializer: ...
def specialize(function: Callable[P, R] | None = None, /, *, base: bool = True) -> Any:
    """Makes a plain function that has bodies of its own for some device sets.

    Args:
        function: the body for every set that has no variant, and for calls outside of tasks.
        base: ``False`` if the function only says what it is called and takes, and its body is
            never to be run.

    Raises:
        TypeError: no plain function, or no ``bool``.
    """
    decorate = Specializer(read_base(base))
    return decorate if function is None else decorate(function)


def read_base(base: object) -> bool:
    """What ``base=`` says.

    Raises:
        TypeError: no ``bool``.
    """
    if not isinstance(base, bool):
        raise TypeError(f"base is True or False, not {type(base).__name__}")
    return base


_NATIVE = _core.NativeFunction, _core.BlasRoutine, _core.KernelLaunch


def plain_body(body: Any) -> Any:
    """What is called for a body that is registered.

    Raises:
        TypeError: not callable, or a task function that is not native.
    """
    if isinstance(body, _core.TaskFunction):
        function: Any = body.fn
        if not isinstance(function, _NATIVE):
            raise TypeError(f"{body!r} spawns a task: a variant's body is a plain function")
        return function
    if isinstance(body, (staticmethod, classmethod)):
        return body.__func__
    if not callable(body):
        raise TypeError(f"a variant's body is to be callable, not {type(body).__name__}")
    return body


def read_cost(cost: object) -> float:
    """A run time in seconds.

    Args:
        cost: a number of seconds, a ``timedelta``, or a string such as ``"2ms"``.

    Raises:
        TypeError: none of these.
        ValueError: negative, or no time.
    """
    seconds = getattr(cost, "total_seconds", None)  # without an import of datetime
    if seconds is not None:
        cost = seconds()
    return read_seconds(cost, "cost")


def read_size(size: object) -> int:
    """A size that run times are told apart by.

    Args:
        size: a number, or a string such as ``"2MiB"``. Parts of one are cut off.

    Raises:
        TypeError: neither.
        ValueError: negative or too large.
    """
    if isinstance(size, float):
        if not 0 <= size < 2**63:
            raise ValueError(f"size is not negative, and at most 2**63 - 1, but {size!r} is not")
        return int(size)
    return read_bytes(size, "size")
