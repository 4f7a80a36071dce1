"""What a placement comes to on one machine.

A placement is a free choice (:mod:`charioteer.devices`), and the core serves cores and devices with
streams by different schedulers. So the choice is narrowed here, once a placement and a runtime:
what the machine cannot serve is left out, with its reason kept in case nothing is left, and of the
rest the kind of the first alternative decides. Among the alternatives of that kind the scheduler
chooses when the task is ready.
"""

from __future__ import annotations

from charioteer.devices import Alternative, Member, show_members
from charioteer.errors import PlacementError

WHOLE = 65_536
"""The parts of a device's compute that a share counts in."""

ANY = -1
"""Stands for any device, in the sets that the core reads."""

DeviceSet = tuple[list[int], int, int]
"""The devices by number, or :data:`ANY`; the share in 1/65,536; the memory in bytes."""


def resolve(
    placement: tuple[Alternative, ...],
    cores: int,
    gpus: int,
    memory: int | None,
    share: float | None,
) -> tuple[list[int], list[DeviceSet]]:
    """The sets of cores, as numbers of cores, or the sets of devices that will do: one of the two.

    Args:
        placement: in normal form.
        cores: how many the runtime has.
        gpus: how many the machine has.
        memory: what the task says for alternatives that say nothing, in bytes.
        share: likewise, from 0 to 1.

    Raises:
        PlacementError: the machine can serve no alternative, with the reason for each.
    """
    on_cores: list[int] = []
    on_devices: list[DeviceSet] = []
    reasons: list[str] = []
    for alternative in placement:
        kinds = {member.kind for member in alternative.members}
        try:
            if kinds == {"cpu"}:
                count = _cores(alternative, cores)
                if not on_devices:
                    on_cores.append(count)
            elif kinds == {"gpu"}:
                devices = _devices(alternative, gpus, memory, share)
                if not on_cores:
                    on_devices.append(devices)
            else:
                raise PlacementError("a set of cores and devices together is not supported yet")
        except PlacementError as error:
            reasons.append(f"{show_members(alternative.members)}: {error}")
    if not on_cores and not on_devices:
        raise PlacementError("; ".join(reasons))
    if memory is not None and all(
        member.kind == "cpu" for alternative in placement for member in alternative.members
    ):
        # Beside an alternative that names a device it says something; the host has no bound.
        raise PlacementError("memory= is for devices with memory of their own, and none is named")
    return on_cores, on_devices


def _cores(alternative: Alternative, cores: int) -> int:
    if any(member.device is not None for member in alternative.members):
        raise PlacementError("cores are all alike: say how many, cpu * n")
    if alternative.memory is not None or alternative.share is not None:
        raise PlacementError("needs of an alternative's own are for devices with memory")
    places = [member.places for member in alternative.members]
    count = cores if None in places else sum(place or 0 for place in places)
    if count > cores:
        raise PlacementError(f"the runtime has {cores} cores")
    return count


def _devices(
    alternative: Alternative, gpus: int, memory: int | None, share: float | None
) -> DeviceSet:
    if gpus == 0:
        raise PlacementError("the machine has no gpu")
    devices = [device for member in alternative.members for device in _places(member, gpus)]
    if len(devices) > gpus:
        raise PlacementError(f"the machine has {gpus}")
    part = share if alternative.share is None else alternative.share
    wanted = memory if alternative.memory is None else alternative.memory
    return devices, WHOLE if part is None else _units(part), wanted or 0


def _places(member: Member, gpus: int) -> list[int]:
    if member.device is None:
        return [ANY] * (gpus if member.places is None else member.places)
    if member.device >= gpus:
        raise PlacementError(f"the machine has {gpus}, numbered from 0")
    return [member.device]


def _units(share: float) -> int:
    # Rounded up, so that parts that are said never add up to more than they say.
    return -int(-share * WHOLE // 1)
