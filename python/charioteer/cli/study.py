"""``charioteer study``: every benchmark, and one report of what they measured."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from charioteer.cli import UserError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Run every benchmark, each in processes of its own, and write one report: report.html, a page with
plots, tables and every raw figure in it, and report.md.

A study that is stopped goes on where it was, when it is called with the same folder. What takes
hours in full takes some minutes with --quick. Runtimes that are not installed are reported as
missing.
"""


def add_parser(commands: Subparsers) -> None:
    """Add ``study`` to the commands."""
    parser = commands.add_parser(
        "study",
        help="run every benchmark, and write one report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a look, of about five minutes")
    parser.add_argument(
        "--out", default="study", metavar="DIR", help="the study's folder (default: study)"
    )
    parser.add_argument(
        "--only", metavar="A,B", help="parts whose names begin so; --list shows them"
    )
    parser.add_argument("--list", action="store_true", help="show the parts, and stop")


def run(options: argparse.Namespace) -> int:
    """Make the study.

    Returns:
        0; 1 if a part failed.

    Raises:
        UserError: the folder cannot be used, or no part has such a name.
    """
    from charioteer.bench import study

    chosen = study.parts(quick=options.quick, apps=study.sources())
    if options.only is not None:
        wanted = tuple(name.strip() for name in options.only.split(",") if name.strip())
        for name in wanted:
            if not any(part.name.startswith(name) for part in chosen):
                raise UserError(f"no part begins with {name!r}; --list shows them")
        chosen = [part for part in chosen if part.name.startswith(wanted)]
    if options.list:
        for part in chosen:
            print(f"{part.name:24} about {part.seconds:4.0f} s  {' '.join(part.arguments)}")
        return 0

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    out = Path(options.out)
    try:
        complete = study.conduct(out, chosen, quick=options.quick, tell=tell)
    except study.StudyError as error:
        raise UserError(str(error)) from error
    print(out / "report.html")
    return 0 if complete else 1
