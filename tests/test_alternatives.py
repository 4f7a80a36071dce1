"""Are the sets of a placement in free choice?"""

from __future__ import annotations

from support import Gate

import charioteer as ch


def cores() -> int:
    """A body that counts its cores."""
    return len(ch.current().devices)


def test_the_first_of_those_that_are_free() -> None:
    with ch.Runtime(workers=2):
        both = ch.spawn(placement=[ch.cpu * 2, ch.cpu])(cores)
        assert both.result() == 2
        with Gate() as gate:
            gate.started.wait()
            one = ch.spawn(placement=[ch.cpu * 2, ch.cpu])(cores)
            assert one.result() == 1
        assert ch.spawn(placement=[ch.cpu, ch.cpu * 2])(cores).result() == 1


def test_what_the_machine_cannot_serve_is_no_choice() -> None:
    with ch.Runtime(workers=2):
        assert ch.spawn(placement=[ch.cpu * 3, ch.cpu * 2])(cores).result() == 2
        assert ch.spawn(placement=ch.cpu * range(1, 9))(cores).result() == 1


def test_all_cores_are_a_choice() -> None:
    with ch.Runtime(workers=2):
        assert ch.spawn(placement=[ch.cpu.all, ch.cpu])(cores).result() == 2
