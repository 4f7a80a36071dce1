"""``charioteer check TRACE``: whether a trace shows that the runtime kept its promises."""

from __future__ import annotations

import argparse

import charioteer
from charioteer.cli import EXIT_FAILED, UserError

__all__ = ["run"]

_SHOWN = 20
"""Violations that are printed without ``--all``."""


def run(options: argparse.Namespace) -> int:
    """Check the trace and print what was broken; 1 if anything was.

    Raises:
        UserError: the file cannot be read, is no trace, or has a version that proves nothing.
    """
    path: str = options.trace
    try:
        checked = charioteer.check_trace(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        ordered = charioteer.check_order(path)
    except ValueError:
        # It could be read, so it is of a version before there were accesses.
        ordered = charioteer.OrderCheck(0, 0, ())
    broken = (*checked.violations, *ordered.violations)
    looked_at = (
        f"{checked.tasks} tasks, {checked.grants} grants of devices, {ordered.accesses} accesses of"
        f" data, {checked.pairs + ordered.pairs} pairs in order"
    )
    print(f"{looked_at}: {len(broken) or 'no'} violation{'' if len(broken) == 1 else 's'}")
    moves = ordered.moves
    if moves is not None and moves.copies:
        print(
            f"{moves.copies} copies between memories with {moves.bytes} bytes, where Belady's rule"
            f" moves {moves.best}; {moves.local} bytes copied within devices, {moves.dropped}"
            f" instances dropped, {moves.reads} reads looked at"
        )
    shown = broken if options.all else broken[:_SHOWN]
    for violation in shown:
        print(violation)
    if len(shown) < len(broken):
        print(f"... and {len(broken) - len(shown)} more; --all shows them")
    return EXIT_FAILED if broken else 0
