"""The devices that tasks are placed on, and sets of them.

``cpu`` names a kind. ``cpu * 8`` is a set of eight cores, ``cpu * range(1, 9)`` a free choice of
sets, ``cpu.all`` every core that the runtime has; ``[a, b]`` is a choice in which order breaks
ties, and a tuple ``(cpu, cpu)`` a set.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn, TypeAlias, overload

from charioteer.errors import PlacementError

_MOST = 65_535


class _Value:
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


class Device(_Value):
    """One device.

    Args:
        kind: its kind.
        index: its number among those of its kind.
    """

    __match_args__ = ("kind", "index")
    kind: Kind
    index: int

    def __init__(self, kind: Kind, index: int) -> None:
        super().__init__(kind=kind, index=index)

    def __repr__(self) -> str:
        return f"{self.kind}({self.index})"


class DeviceSet(_Value):
    """Several devices of one kind that a task uses at once.

    Args:
        kind: their kind.
        count: how many; ``None`` means all that there are.
    """

    __match_args__ = ("kind", "count")
    kind: Kind
    count: int | None

    def __init__(self, kind: Kind, count: int | None) -> None:
        super().__init__(kind=kind, count=count)

    def __repr__(self) -> str:
        return f"{self.kind}.all" if self.count is None else f"{self.kind} * {self.count}"


class Kind(_Value):
    """A kind of device.

    Args:
        name: what people call it.
    """

    __match_args__ = ("name",)
    name: str

    def __init__(self, name: str) -> None:
        super().__init__(name=name)

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
            return [_set(self, one) for one in count]
        return _set(self, count)

    __rmul__ = __mul__

    @property
    def all(self) -> DeviceSet:
        """Every device of the kind."""
        return DeviceSet(self, None)

    def __repr__(self) -> str:
        return self.name


Alternative: TypeAlias = Kind | DeviceSet | tuple[Kind | DeviceSet, ...]
"""Devices that a task may be placed on."""

Placement: TypeAlias = Alternative | list["Alternative | Placement"]
"""One alternative, or a list of them in free choice."""

cpu = Kind("cpu")
"""The cores of the host, as many as the runtime has workers."""


def _set(kind: Kind, count: object) -> DeviceSet:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"a set has a number of devices, not {type(count).__name__}")
    if not 1 <= count <= _MOST:
        raise PlacementError(f"{kind} * {count}: a set has between 1 and {_MOST} devices")
    return DeviceSet(kind, count)


def core_counts(placement: object) -> list[int]:
    """The alternatives of a placement as numbers of cores, zero for all.

    Raises:
        PlacementError: no alternative, an unknown kind or no placement at all.
    """
    if not isinstance(placement, list):
        return _alternative(placement)
    counts = [count for one in placement for count in _alternative(one)]
    if not counts:
        raise PlacementError("a list of alternatives has at least one")
    return counts


def cores(numbers: Iterable[int]) -> tuple[Device, ...]:
    """The cores with those numbers."""
    return tuple(Device(cpu, number) for number in numbers)


def _alternative(placement: object) -> list[int]:
    match placement:
        case Kind():
            return [_cores(placement, 1)]
        case DeviceSet(kind, count):
            return [_cores(kind, 0 if count is None else count)]
        case tuple():
            if not placement:
                raise PlacementError("a set has at least one device")
            return [sum(_members(placement))]
        case list():
            return core_counts(placement)
    raise PlacementError(
        f"{placement!r} is no placement: say cpu, cpu * n, a tuple of those for a set,"
        " or a list of alternatives"
    )


def _members(members: Iterable[object]) -> Iterable[int]:
    for member in members:
        match member:
            case Kind():
                yield _cores(member, 1)
            case DeviceSet(kind, int() as count):
                yield _cores(kind, count)
            case _:
                raise PlacementError(f"{member!r} is no member of a set")


def _cores(kind: Kind, count: int) -> int:
    if kind != cpu:
        raise PlacementError(f"the machine has no {kind}")
    return count
