"""What a placement comes to on one machine, for a function with these bodies.

A placement is a free choice (:mod:`charioteer.devices`), and a function has a base body and perhaps
variants (:mod:`charioteer._variants`). Here both are brought together, once a placement and a
runtime: each alternative that the machine can serve and that some body is for becomes a *choice*,
or several where it depends on the devices which body serves. What cannot be served is left out,
with its reason kept in case nothing is left. Among the choices the scheduler chooses when the task
is ready.

A placement that was said where a function was made says where its base body runs; without one that
is ``cpu``. The sets of its variants come on top. A placement that was said for a call or a spawn is
all of the choice.

Needs are those that the alternative says, else those of the variant's set that serves it, else the
task's. In a set of cores and devices together they are those of its devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from charioteer._variants import BASE, Match, Totals, Variants, held_on
from charioteer.devices import Alternative, Member, show_members
from charioteer.errors import PlacementError

WHOLE = 65_536
"""The parts of a device's compute that a share counts in."""

ANY = -1
"""Stands for any GPU, in the sets that the core reads."""
CORE = -2
"""Stands for a core."""

CPU = (Alternative((Member("cpu", None, 1),), None, None),)


class Choice(NamedTuple):
    """One set that a task may get, as the core reads it."""

    places: list[int]
    """In the set's order: a GPU's number, :data:`ANY` or :data:`CORE`."""
    share: int
    """In 1/:data:`WHOLE`, of each device; of each core, if there are only those, which are taken
    whole beside devices."""
    memory: int
    """In bytes, on each device."""
    body: int
    """The number of the variant that serves it, or :data:`BASE`."""
    open: bool
    """Whether another body serves it if it gets certain devices."""
    label: str
    """What tells its run times from those of another body on as many devices."""
    gathers: bool = False
    """Whether the body is for a set with devices, and gets a tuple of arrays for a region. That is
    a matter of what the body was declared for: the variant's set, or the placement of the base."""


def resolve(
    placement: tuple[Alternative, ...] | None,
    totals: tuple[int, int],
    memory: int | None,
    share: float | None,
    variants: tuple[Variants, int] | None = None,
    final: bool = True,
) -> list[Choice]:
    """The choices of a task, in the order of the placement.

    Args:
        placement: in normal form; ``None`` if nothing was said.
        totals: how many cores the runtime has, and how many GPUs the machine.
        memory: what the task says for alternatives that say nothing, in bytes.
        share: likewise, from 0 to 1.
        variants: of the function, and how many of them count; ``None`` if it has its base alone.
        final: whether the placement is all of the choice, and variants' sets do not come on top.

    Raises:
        PlacementError: the machine can serve no alternative, or no body is for it, with the reason
            for each.
    """
    alternatives = CPU if placement is None else placement
    if variants is not None and (placement is None or not final):
        own = alternatives if variants[0].base else ()
        alternatives = tuple(dict.fromkeys((*own, *variants[0].sets(variants[1]))))
    have = Totals(*totals)
    choices: dict[tuple[object, ...], Choice] = {}
    reasons: list[str] = []
    for alternative in alternatives:
        try:
            places = _places(alternative, have)
            for match in _matches(alternative, variants, have):
                choice = _choice(alternative, places, match, memory, share)
                choices.setdefault((tuple(choice.places), *choice[1:]), choice)
        except PlacementError as error:
            reasons.append(f"{show_members(alternative.members)}: {error}")
    if not choices:
        if not reasons:
            assert variants is not None
            raise PlacementError(f"{variants[0].name} has no variant yet, and no base body")
        raise PlacementError("; ".join(reasons))
    if memory is not None and all(
        member.kind == "cpu" for alternative in alternatives for member in alternative.members
    ):
        # Beside an alternative that names a device it says something; the host has no bound.
        said = "none is named" if placement is not None else "none is named: say placement=gpu"
        raise PlacementError(f"memory= is for devices with memory of their own, and {said}")
    return list(choices.values())


def _matches(
    alternative: Alternative, variants: tuple[Variants, int] | None, totals: Totals
) -> Iterator[Match]:
    if variants is None:
        yield Match(BASE, None, (), False)
        return
    none = True
    table, count = variants
    for match in table.matches(held_on(alternative, totals), totals, count):
        none = False
        yield match
    if none:
        raise PlacementError(table.lacking)


def _choice(
    alternative: Alternative,
    places: list[int],
    match: Match,
    memory: int | None,
    share: float | None,
) -> Choice:
    more = iter(match.more)
    chosen = [next(more, place) if place == ANY else place for place in places]
    for needs in (match.sets, alternative):
        if needs is not None:
            memory = memory if needs.memory is None else needs.memory
            share = share if needs.share is None else needs.share
    units = WHOLE if share is None else _units(share)
    if all(place == CORE for place in places) and units < WHOLE:
        if units and len(places) > 1:
            raise PlacementError(
                f"with share={share} a set of cores is taken whole, or with share=0 not at all"
            )
        chosen = [CORE]
    named = match.sets is not None and any(one.device is not None for one in match.sets.members)
    label = show_members(match.sets.members) if match.sets is not None and named else ""
    declared = alternative if match.sets is None else match.sets
    gathers = declared.gathers and any(place != CORE for place in chosen)
    return Choice(chosen, units, memory or 0, match.body, match.open, label, gathers)


def _places(alternative: Alternative, totals: Totals) -> list[int]:
    """The places of a set.

    Raises:
        PlacementError: there are not as many.
    """
    kinds = {member.kind for member in alternative.members}
    wanted = held_on(alternative, totals)
    if "gpu" in kinds and totals.gpus == 0:
        raise PlacementError("the machine has no gpu")
    if any(member.kind == "cpu" and member.device is not None for member in alternative.members):
        raise PlacementError("cores are all alike: say how many, cpu * n")
    if kinds == {"cpu"} and (alternative.memory, alternative.share) != (None, None):
        raise PlacementError("needs of an alternative's own are for devices with memory")
    if wanted.cores > totals.cores:
        raise PlacementError(f"the runtime has {totals.cores} cores")
    if wanted.gpus > totals.gpus:
        raise PlacementError(f"the machine has {totals.gpus}")
    if any(gpu >= totals.gpus for gpu in wanted.named):
        raise PlacementError(f"the machine has {totals.gpus}, numbered from 0")
    places: list[int] = []
    for member in alternative.members:
        most = totals.cores if member.kind == "cpu" else totals.gpus
        if member.device is not None:
            places.append(member.device)
        else:
            count = most if member.places is None else member.places
            places.extend([CORE if member.kind == "cpu" else ANY] * count)
    return places


def _units(share: float) -> int:
    # Rounded up, so that parts that are said never add up to more than they say.
    return -int(-share * WHOLE // 1)
