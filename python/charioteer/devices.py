"""The devices that tasks are placed on, and sets of them.

Protocol. What a task may run on is a *placement*: one alternative, or a list of alternatives in
free choice, in which order breaks ties and lists in lists are flattened. An alternative is

* a kind, ``cpu`` or ``gpu``: any device of it;
* a device, ``gpu(0)``;
* a set of a kind, ``gpu * 2`` or ``gpu.all``; of a range, ``gpu * range(1, 9)``, a list of sets;
* a tuple of those, which is a set: ``(cpu, gpu)``, ``(gpu(0), gpu(3))``.

``x.require(memory=, share=)`` is the alternative ``x`` with needs of its own, which hold for each
device of the set; so they belong to the whole set, and no member of a tuple has any. Cores in a set
with devices have none: they are taken whole.

Whatever is written, :func:`normal` gives the one normal form that the scheduler reads: a tuple of
:class:`Alternative`, hashable, without repetitions. It knows no machine: what a machine can serve
is decided at the spawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias, overload

from charioteer._quantities import read_bytes, read_count
from charioteer.errors import PlacementError

_MOST = 65_535
_KINDS = ("cpu", "gpu")
_GRAMMAR = (
    "say a kind such as gpu, a device gpu(0), a set gpu * 2, gpu.all or a tuple,"
    " or a list of alternatives"
)


class Value:
    """What is equal by its parts and does not change.

    ``dataclasses`` imports ``inspect``, which takes as long as the rest of the package.
    """

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a {type(self).__name__} does not change")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a {type(self).__name__} does not change")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))


class _Choice(Value):
    """An alternative that is an object of ours."""

    def require(
        self, *, memory: int | str | None = None, share: float | None = None
    ) -> Requirement:
        """The same devices, with needs of this alternative's own.

        Args:
            memory: what the body itself will allocate on each device, in bytes or as ``"512MiB"``.
            share: the part of each device's compute that it takes, from 0 to 1.

        Raises:
            PlacementError: a size or a share that no device has.
            TypeError: no size, or no number.
        """
        return Requirement(self, memory, share)


class Device(_Choice):
    """One device.

    Args:
        kind: its kind.
        index: its number among those of its kind.

    Raises:
        PlacementError: a number that no device has.
        TypeError: no number.
    """

    __match_args__ = ("kind", "index")
    kind: Kind
    index: int

    def __init__(self, kind: Kind, index: int) -> None:
        number = _within(index, f"the number of a {kind}", 0, _MOST - 1)
        super().__init__(kind=kind, index=number)

    def __repr__(self) -> str:
        return f"{self.kind}({self.index})"


class DeviceSet(_Choice):
    """Several devices of one kind that a task uses at once.

    Args:
        kind: their kind.
        count: how many; ``None`` means all that there are.

    Raises:
        PlacementError: a count below one.
        TypeError: no number.
    """

    __match_args__ = ("kind", "count")
    kind: Kind
    count: int | None

    def __init__(self, kind: Kind, count: int | None) -> None:
        if count is not None:
            count = _within(count, f"the count of a set of {kind}", 1, _MOST)
        super().__init__(kind=kind, count=count)

    def __repr__(self) -> str:
        return f"{self.kind}.all" if self.count is None else f"{self.kind} * {self.count}"


class Kind(_Choice):
    """A kind of device: ``cpu`` or ``gpu``.

    Args:
        name: what people call it.

    Raises:
        PlacementError: there is no such kind.
    """

    __match_args__ = ("name",)
    name: str

    def __init__(self, name: str) -> None:
        if name not in _KINDS:
            raise PlacementError(f"{name!r} is no kind of device: there are {', '.join(_KINDS)}")
        super().__init__(name=name)

    def __call__(self, index: int) -> Device:
        """The device with that number among those of the kind.

        Raises:
            PlacementError: a number that no device has.
            TypeError: no number.
        """
        return Device(self, index)

    @overload
    def __mul__(self, count: int) -> DeviceSet: ...
    @overload
    def __mul__(self, count: range) -> list[DeviceSet]: ...
    def __mul__(self, count: int | range) -> DeviceSet | list[DeviceSet]:
        """A set of so many devices; of a range, a choice of sets.

        Raises:
            PlacementError: a count below one.
            TypeError: no number.
        """
        if isinstance(count, range):
            return [DeviceSet(self, one) for one in count]
        if count is None:
            raise TypeError(f"a set of all is {self}.all")
        return DeviceSet(self, count)

    __rmul__ = __mul__

    @property
    def all(self) -> DeviceSet:
        """Every device of the kind."""
        return DeviceSet(self, None)

    def __repr__(self) -> str:
        return self.name


class Requirement(Value):
    """An alternative with needs of its own, which hold for each of its devices.

    ``x.require(...)`` makes one; a tuple, which has no methods, is passed here.

    Args:
        devices: a kind, a device, a set or a tuple of those.
        memory: what the body itself will allocate on each device, in bytes or as ``"512MiB"``.
        share: the part of each device's compute that it takes, from 0 to 1.

    Raises:
        PlacementError: a size or a share that no device has, or a set with a device twice.
        TypeError: no set of devices, no size, or no number.
    """

    __match_args__ = ("devices", "memory", "share")
    devices: Kind | Device | DeviceSet | tuple[Kind | Device | DeviceSet, ...]
    memory: int | None
    share: float | None

    def __init__(
        self,
        devices: Kind | Device | DeviceSet | tuple[Kind | Device | DeviceSet, ...] | _Choice,
        memory: int | str | None = None,
        share: float | None = None,
    ) -> None:
        _members(devices)
        super().__init__(devices=devices, memory=_memory(memory), share=_share(share))

    def require(
        self, *, memory: int | str | None = None, share: float | None = None
    ) -> Requirement:
        """The same with other needs; what is left out stays.

        Raises:
            PlacementError: a size or a share that no device has.
            TypeError: no size, or no number.
        """
        return Requirement(
            self.devices,
            self.memory if memory is None else memory,
            self.share if share is None else share,
        )

    def __repr__(self) -> str:
        needs = {"memory": self.memory, "share": self.share}
        said = ", ".join(f"{name}={need}" for name, need in needs.items() if need is not None)
        if isinstance(self.devices, tuple):
            return f"Requirement({self.devices}, {said})"
        shown = repr(self.devices)
        return f"({shown}).require({said})" if " " in shown else f"{shown}.require({said})"


Choice: TypeAlias = Kind | Device | DeviceSet | Requirement | tuple[Kind | Device | DeviceSet, ...]
"""Devices that a task may be placed on: one alternative as it is written."""

Placement: TypeAlias = Choice | list["Choice | Placement"]
"""One alternative, or a list of them in free choice."""

cpu = Kind("cpu")
"""The cores of the host, as many as the runtime has workers."""

gpu = Kind("gpu")
"""The accelerators of the machine, virtual ones included."""


class Member(NamedTuple):
    """Places of a set, next to each other in its order, that devices of one kind take."""

    kind: str
    """``"cpu"`` or ``"gpu"``."""
    device: int | None
    """The device that it has to be, or ``None`` for any that is not in the set already."""
    places: int | None
    """How many places; ``None`` for as many as the machine has devices of the kind."""


class Alternative(NamedTuple):
    """One alternative in normal form."""

    members: tuple[Member, ...]
    """In the set's order."""
    memory: int | None
    """Bytes that the body itself allocates on each device, if the alternative says so."""
    share: float | None
    """The part of each device's compute, if the alternative says so."""
    gathers: bool = False
    """Whether it is a set as it is written, also one of one device: a body then gets a tuple for a
    region, with an array for each device."""


def normal(placement: object) -> tuple[Alternative, ...]:
    """The placement in normal form.

    Raises:
        PlacementError: no alternative, or one that no machine can serve.
        TypeError: no placement at all.
    """
    found = tuple(dict.fromkeys(_alternatives(placement)))
    if not found:
        raise PlacementError("a list of alternatives has at least one")
    return found


def held(places: Iterable[tuple[bool, int]]) -> tuple[Device, ...]:
    """The devices of a set, from whether each is a core, and its number."""
    return tuple(Device(cpu if is_core else gpu, number) for is_core, number in places)


def _alternatives(placement: object) -> Iterator[Alternative]:
    match placement:
        case list():
            if not placement:
                raise PlacementError("a list of alternatives has at least one")
            for one in placement:
                yield from _alternatives(one)
        case Requirement(devices, memory, share):
            yield Alternative(_members(devices), memory, share, _is_set(devices))
        case _:
            yield Alternative(_members(placement), None, None, _is_set(placement))


def _is_set(devices: object) -> bool:
    return isinstance(devices, (DeviceSet, tuple))


def memories(members: Sequence[Member]) -> int | None:
    """How many memories the devices of a set have, cores counting as one; ``None`` for as many as
    there are."""
    counts = [member.places for member in members if member.kind == "gpu"]
    cores = any(member.kind == "cpu" for member in members)
    if None in counts:
        return None
    return sum(count or 0 for count in counts) + cores


def _members(devices: object) -> tuple[Member, ...]:
    """The places of one set."""
    match devices:
        case Kind(name):
            return (Member(name, None, 1),)
        case Device(Kind(name), index):
            return (Member(name, index, 1),)
        case DeviceSet(Kind(name), count):
            return (Member(name, None, count),)
        case tuple():
            return _tuple(devices)
    raise TypeError(f"{devices!r} is no placement: {_GRAMMAR}")


def _tuple(devices: tuple[object, ...]) -> tuple[Member, ...]:
    if not devices:
        raise PlacementError("a set has at least one device")
    members: list[Member] = []
    for device in devices:
        if isinstance(device, Requirement):
            raise PlacementError(
                f"{device!r} in a tuple: needs hold for each device of a set, so say them for the"
                " whole set, with Requirement(tuple, memory=..., share=...)"
            )
        if isinstance(device, (tuple, list)):
            raise TypeError(f"{device!r} is no member of a set: a tuple holds devices and kinds")
        for member in _members(device):
            last = members[-1] if members else None
            if (
                last is not None
                and last.device is None is member.device
                and last.kind == member.kind
                and last.places is not None is not member.places
            ):
                members[-1] = Member(member.kind, None, last.places + (member.places or 0))
            else:
                members.append(member)
    shown = show_members(members)
    named: set[Member] = set()
    for member in members:
        if member.device is not None:
            if member in named:
                raise PlacementError(f"{shown}: {show_members([member])} is in the set twice")
            named.add(member)
    for kind in _KINDS:
        counts = [member.places for member in members if member.kind == kind]
        if None in counts and len(counts) > 1:
            raise PlacementError(f"{shown}: a set with all of {kind} has room for no more of it")
        if sum(count or 0 for count in counts) > _MOST:
            raise PlacementError(f"{shown}: a set has at most {_MOST} devices of a kind")
    return tuple(members)


def show_members(members: Iterable[Member]) -> str:
    """The set as it may be written."""
    parts = []
    for kind, device, places in members:
        if device is not None:
            parts.append(f"{kind}({device})")
        elif places is None:
            parts.append(f"{kind}.all")
        else:
            parts.append(kind if places == 1 else f"{kind} * {places}")
    return parts[0] if len(parts) == 1 else f"({', '.join(parts)})"


def _within(value: object, what: str, least: int, most: int) -> int:
    try:
        return read_count(value, what, least, most=most)
    except ValueError as error:
        raise PlacementError(str(error)) from None


def _memory(memory: object) -> int | None:
    return None if memory is None else read_memory(memory)


def read_memory(memory: object) -> int:
    """What a task allocates on a device, in bytes, from a number or a string such as ``"512MiB"``.

    Raises:
        PlacementError: a size that no device has.
        TypeError: no size.
    """
    try:
        return read_bytes(memory, "memory")
    except ValueError as error:
        raise PlacementError(str(error)) from None


def _share(share: object) -> float | None:
    if share is None:
        return None
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"share is a number, not {type(share).__name__}")
    if not 0 <= share <= 1:
        raise PlacementError(f"share is a part of a device, between 0 and 1, not {share}")
    return float(share)
