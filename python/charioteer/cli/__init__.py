"""The command line: ``charioteer info``, ``run``, ``check``, ``demo``, ``graph``, ``bench`` and
``study``.

Protocol. :func:`main` parses, calls one command and returns its exit status; it never calls
``sys.exit`` itself except through ``argparse``. A command that meets a mistake of its user (a file
that is not there, a bad value) raises :class:`UserError`; ``main`` prints that as one line and
returns 2. Any other exception is a defect and keeps its traceback. Results go to standard output,
progress and messages to standard error, so that output can be piped.

Commands are imported when they are called, so that a script under ``run`` does not pay for the
tables of ``info``.

Exit statuses: 0 success; 1 the command ran and its subject failed; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from charioteer import __version__

if TYPE_CHECKING:
    from charioteer.policies import Model

__all__ = ["UserError", "main"]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_DESCRIPTION = "Run the tasks of Python programs in parallel over the devices of this machine."

_EPILOG = """\
examples:
  charioteer info                        what this machine offers and what would be used
  charioteer info --machine virtual:8    what a machine with eight virtual GPUs has
  charioteer run --stats script.py 100   run a script and count what the runtime did
  charioteer check FILE                  prove from the trace of a run that its order was kept
  charioteer demo                        a real job: Gaussian-process classification of digits
  charioteer graph generate fft          a task graph; graph run runs one, and proves it right
  charioteer bench overhead --quick      what a task costs here, beside other runtimes
  charioteer bench gil --quick           what the GIL costs tasks here
  charioteer study --quick               all benchmarks, and one report of them

environment:
  CHARIOTEER_MACHINE   machine of a runtime that names none: virtual:N or a YAML file
  CHARIOTEER_WORKERS   workers of a runtime that does not say how many (default: usable cores)
  CHARIOTEER_TRACE     trace file of a runtime that does not name one (default: no trace)
  CHARIOTEER_POLICY    policy of a runtime that does not name one (default: eft)
  CHARIOTEER_PIN       whether workers are pinned to cores: none (default), compact or spread
  CHARIOTEER_MODELS    file of run times of a runtime that does not name one (default: none)
"""

_RUN_DESCRIPTION = """\
Run a Python script as the main program. A script that spawns tasks without opening a runtime gets
one: it opens at the first spawn and closes when the script ends, after its last task. A script
that opens its own runtime keeps it; --machine, --workers, --pin, --policy, --models and --trace
apply there to whatever the script itself leaves open.

Everything after SCRIPT belongs to the script.
"""

_RUN_EPILOG = """\
The exit status is the script's: 1 after an exception, in the script or in a task whose failure
nobody received.
"""


_RUN_VALUES = ("--machine", "--workers", "--pin", "--policy", "--models", "--trace")
"""The options of ``run`` that are followed by a value."""


class UserError(Exception):
    """A mistake of the command's user, told in one line and without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; ``sys.argv[1:]`` if left out.

    Returns:
        The exit status.

    Raises:
        SystemExit: from ``argparse``, after ``--help``, ``--version`` or an argument that does
            not parse.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The demo owns its options and its help, so its arguments must not reach our parser.
    if arguments[:1] == ["demo"]:
        return _guarded("demo", lambda: _demo(arguments[1:]))
    parser = _parser()
    # What follows the script belongs to it, a leading "--" too, which argparse would swallow.
    own = _own_arguments(arguments)
    options = parser.parse_args(arguments[:own])
    options.arguments = arguments[own:]
    command = options.command
    if command is None:
        parser.print_help()
        return 0

    def call() -> int:
        if command == "info":
            from charioteer.cli import info

            return info.run(options)
        if command == "run":
            from charioteer.cli import script

            return script.run(options)
        if command == "check":
            from charioteer.cli import check

            return check.run(options)
        if command == "study":
            from charioteer.cli import study

            return study.run(options)
        if command == "graph":
            from charioteer.cli import graph

            return graph.run(options)
        from charioteer.cli import bench

        return bench.run(options)

    return _guarded(command, call)


def _guarded(command: str, call: Callable[[], int]) -> int:
    try:
        return call()
    except UserError as error:
        print(f"charioteer {command}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"charioteer {command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; without this the interpreter complains once more when
        # it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _own_arguments(arguments: list[str]) -> int:
    """How many of the arguments are ours: under ``run`` those up to and with the script."""
    if arguments[:1] != ["run"]:
        return len(arguments)
    index = 1
    while index < len(arguments):
        if arguments[index] in _RUN_VALUES:
            index += 1  # Its value stands behind it.
        elif not arguments[index].startswith("-"):
            return index + 1
        index += 1
    return len(arguments)


def _demo(arguments: list[str]) -> int:
    try:
        from charioteer import demo

        return demo.main(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in {"scipy", "sklearn"}:
            raise
        raise UserError(
            f"{error.name.partition('.')[0]} is not installed; install charioteer[demo]"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="charioteer",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"charioteer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    info = commands.add_parser(
        "info",
        help="show version, interpreter, machine, workers and BLAS libraries",
        description="Show what a runtime opened here, now and without arguments would work with.",
    )
    _add_machine(info, "the machine to show")
    info.add_argument(
        "--models",
        metavar="FILE",
        help="also show what the run times in FILE tell of functions, sets and sizes",
    )
    info.add_argument("--json", action="store_true", help="print JSON instead of a table")

    run = commands.add_parser(
        "run",
        help="run a script, with a runtime around it if it opens none",
        description=_RUN_DESCRIPTION,
        epilog=_RUN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An abbreviated option would hide from _own_arguments whether a value follows.
        allow_abbrev=False,
        usage="charioteer run [-h] [--machine MACHINE] [--workers N] [--pin NAME]"
        " [--policy NAME] [--models FILE] [--trace FILE] [--stats] SCRIPT [ARGS ...]",
    )
    _add_machine(run, "machine of a runtime that names none")
    run.add_argument(
        "--workers",
        type=_workers,
        metavar="N",
        help="workers of a runtime that does not say how many; 0 runs every task inline",
    )
    run.add_argument(
        "--pin",
        metavar="NAME",
        help="whether a runtime that does not say keeps its workers on cores: none (default),"
        " compact (one NUMA node after the other) or spread (all nodes in turns)",
    )
    run.add_argument(
        "--policy",
        metavar="NAME",
        help="how a runtime that does not say chooses among alternatives: eft (default), locality,"
        " load, random, round-robin",
    )
    run.add_argument(
        "--models",
        metavar="FILE",
        help="read measured run times from FILE, if it is there, and write them back at the end",
    )
    run.add_argument("--trace", metavar="FILE", help="write the runtime's event trace to FILE")
    run.add_argument(
        "--stats",
        action="store_true",
        help="print the runtime's counters to standard error when it has closed",
    )
    run.add_argument("script", metavar="SCRIPT", help="the Python file to run")

    check = commands.add_parser(
        "check",
        help="prove from a trace that devices, sets and order were kept",
        description="Prove from the trace of a run that no device was exceeded, that sets were"
        " granted as one, that no stream had two bodies, that device work came after that of"
        " dependencies, and that every task ended once. The exit status is 1 if a promise was"
        " broken.",
    )
    check.add_argument("--all", action="store_true", help="print all violations, not the first 20")
    check.add_argument("trace", metavar="TRACE", help="the trace file of a run that has ended")

    # For the help text alone: main() hands the demo over before parsing.
    commands.add_parser(
        "demo",
        help="run the demonstration: Gaussian-process classification as one task graph",
        add_help=False,
    )

    from charioteer.cli import bench, graph, study

    graph.add_parser(commands)
    bench.add_parser(commands)
    study.add_parser(commands)
    return parser


def _add_machine(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--machine",
        metavar="MACHINE",
        help=f"{what}: virtual:N for N virtual GPUs, or a YAML file (default: this machine)",
    )


def set_machine(said: str | None) -> None:
    """Make the machine that the user named the default of this process.

    Raises:
        UserError: it is no machine.
    """
    if said is None:
        return
    from charioteer import Machine, MachineError

    try:
        Machine.load(said)
    except MachineError as error:
        raise UserError(str(error)) from error
    # A script may change the folder before it opens a runtime.
    os.environ["CHARIOTEER_MACHINE"] = (
        said if said.startswith("virtual:") else os.path.abspath(said)
    )


def read_models(path: str) -> list[Model]:
    """The run times in a file; none if it is not there yet.

    Raises:
        UserError: it cannot be read, is damaged, or its folder does not exist.
    """
    from charioteer import ModelError
    from charioteer._runtime import load_models

    try:
        return load_models(path)
    except ModelError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _workers(text: str) -> int:
    try:
        workers = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if workers < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return workers
