"""``charioteer run``: a script as the main program, inside a runtime.

Protocol. The script runs in a fresh module ``__main__``, with its own ``sys.argv`` and its own
folder in front of ``sys.path``, as under ``python SCRIPT``. No runtime is opened ahead of it: a
factory is registered with the core, which calls it where a spawn finds no open runtime. So a
script that opens its own runtime meets no other, and one that opens none gets one at its first
spawn.

That runtime behaves as a ``with`` block around the whole script: it closes when the script has
ended, waits for every task, and raises what nobody received; an exception of the script cancels
what is pending. ``sys.exit()`` with a status of success is an ordinary end, since it is the last
line of many scripts. The module stays ``__main__`` until the last task is done, because bodies may
pickle or look up what it defines; ``runpy`` would take it away when the script's last line is
done, before its last task.
"""

from __future__ import annotations

import argparse
import functools
import importlib.machinery
import io
import os
import sys
import threading
import types
from pathlib import Path

import charioteer
from charioteer import _core
from charioteer._runtime import PINNINGS, POLICIES
from charioteer.cli import EXIT_FAILED, EXIT_INTERRUPTED, UserError, read_models, set_machine

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Run the script that ``options`` name and return its exit status.

    Raises:
        UserError: the script cannot be read, the machine, the pinning or the policy is none, the
            models are damaged, or the folder of a file does not exist.
    """
    path: str = options.script
    source = _read(path)
    set_machine(options.machine)
    if options.trace is not None:
        _check_trace(options.trace)
        os.environ["CHARIOTEER_TRACE"] = os.path.abspath(options.trace)
    if options.pin is not None:
        if options.pin not in PINNINGS:
            raise UserError(f"there is no pinning {options.pin!r}: {', '.join(PINNINGS)}")
        os.environ["CHARIOTEER_PIN"] = options.pin
    if options.policy is not None:
        if options.policy not in POLICIES:
            raise UserError(f"there is no policy {options.policy!r}: {', '.join(POLICIES)}")
        os.environ["CHARIOTEER_POLICY"] = options.policy
    if options.models is not None:
        read_models(options.models)
        os.environ["CHARIOTEER_MODELS"] = os.path.abspath(options.models)
    if options.workers is not None:
        os.environ["CHARIOTEER_WORKERS"] = str(options.workers)

    session = _Session()
    if options.stats:
        session.watch()
    _core.set_default_runtime_factory(session.open_default)
    try:
        status = _execute(path, source, options.arguments, session)
    finally:
        _core.set_default_runtime_factory(None)
    if options.stats:
        _print_stats(session.runtimes)
    return status


class _Session:
    """The runtimes of one script: those that were watched, and the one we opened ourselves."""

    def __init__(self) -> None:
        self.runtimes: list[charioteer.Runtime] = []
        self.default: charioteer.Runtime | None = None
        self._lock = threading.Lock()

    def watch(self) -> None:
        """Remember every runtime that opens from now on, in this process and for good.

        The class itself is changed, not a name of it, because scripts import ``Runtime`` in
        many ways and ``with`` looks methods up on the class.
        """
        plain = charioteer.Runtime.open

        @functools.wraps(plain)
        def watched(runtime: charioteer.Runtime) -> charioteer.Runtime:
            plain(runtime)
            self.runtimes.append(runtime)
            return runtime

        setattr(charioteer.Runtime, "open", watched)  # noqa: B010 (a method is no variable to mypy)

    def open_default(self) -> None:
        """Open the default runtime once, whichever thread spawns first."""
        with self._lock:
            if self.default is None:
                self.default = charioteer.Runtime().open()

    def close_default(self, error: BaseException | None) -> None:
        """End the default runtime's block with ``error``; raises what its tasks left unread."""
        # From here on a spawn must fail by name instead of asking for a runtime that is going.
        _core.set_default_runtime_factory(None)
        if self.default is not None:
            kind = None if error is None else type(error)
            traceback = None if error is None else error.__traceback__
            self.default.__exit__(kind, error, traceback)


def _execute(path: str, source: bytes, arguments: list[str], session: _Session) -> int:
    sys.argv = [path, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    # As the interpreter has it: the file absolute, so that it is found after a change of folder.
    file = os.path.abspath(path)
    module = types.ModuleType("__main__")
    module.__file__ = file
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", file)
    sys.modules["__main__"] = module

    outcome: BaseException | None = None
    try:
        exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        outcome = error
    try:
        session.close_default(None if _is_success(outcome) else outcome)
    except BaseException as error:
        outcome = error
    return _status(outcome)


def _is_success(outcome: BaseException | None) -> bool:
    return outcome is None or (isinstance(outcome, SystemExit) and outcome.code in (None, 0))


def _status(outcome: BaseException | None) -> int:
    """Report the script's end as the interpreter would, and return its exit status."""
    if _is_success(outcome):
        return 0
    if isinstance(outcome, SystemExit):
        if isinstance(outcome.code, int):
            return outcome.code
        print(outcome.code, file=sys.stderr)
        return EXIT_FAILED
    assert outcome is not None
    traceback = outcome.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    sys.stdout.flush()
    sys.excepthook(type(outcome), outcome.with_traceback(traceback), traceback)
    return EXIT_INTERRUPTED if isinstance(outcome, KeyboardInterrupt) else EXIT_FAILED


def _read(path: str) -> bytes:
    try:
        with io.open_code(os.path.abspath(path)) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _check_trace(path: str) -> None:
    file = Path(path)
    if file.is_dir():
        raise UserError(f"cannot write the trace to {path}: it is a directory")
    if not file.absolute().parent.is_dir():
        raise UserError(f"cannot write the trace to {path}: its directory does not exist")


def _print_stats(runtimes: list[charioteer.Runtime]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    if not runtimes:
        console.print("charioteer: the script opened no runtime and spawned no task")
    for number, runtime in enumerate(runtimes, 1):
        title = "runtime" if len(runtimes) == 1 else f"runtime {number} of {len(runtimes)}"
        table = Table(title=title, title_justify="left")
        table.add_column("counter")
        table.add_column("value", justify="right")
        for name, value in _flatten("", runtime.stats()):
            table.add_row(name, f"{value:,}" if isinstance(value, (int, float)) else str(value))
        console.print(table)


def _flatten(prefix: str, counters: object) -> list[tuple[str, object]]:
    if not isinstance(counters, dict):
        return [(prefix, counters)]
    rows: list[tuple[str, object]] = []
    for name, value in counters.items():
        rows += _flatten(f"{prefix}.{name}" if prefix else str(name), value)
    return rows
