"""The applications among the examples on real GPUs, from the sources that run on cores."""

from __future__ import annotations

from typing import Any

import pytest
from support import APPLICATIONS, application

import charioteer as ch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]


@pytest.mark.parametrize("name", APPLICATIONS)
def test_applications_are_right(name: str, rt: ch.Runtime, cp: Any) -> None:
    app = application(name)
    for size in ("tiny", "small"):
        given = app.problem(*app.SIZES[size])
        found = app.tasks(given, len(rt.machine.gpus))
        # Libraries add up in another order there.
        assert app.error(found, given) <= max(app.LIMIT, 1e-9)
