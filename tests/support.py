"""What several test modules share: gates, polling, scripts in a process of their own.

Nothing here knows how the runtime works. A test holds a worker with a ``Gate``, keeps tasks
pending with a ``Latch``, and looks at what a whole process did with ``run_script`` and
``Script``. ``eventually`` waits for things that happen soon after a call returns, such as the
release of references; it asserts that they happen, never how fast.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import charioteer as ch

APPS = Path(__file__).parents[1] / "examples" / "apps"
APPLICATIONS = sorted(
    path.stem for path in APPS.glob("*.py") if path.stem not in ("application", "study")
)
"""The names of the applications among the examples."""


def application(name: str) -> ModuleType:
    """A module of their folder, which is where its modules look first meanwhile."""
    sys.path.insert(0, str(APPS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(APPS))


OVERRIDE = os.environ.get("CHARIOTEER_WORKERS")
"""The worker count that a perturbation run imposes on the tests that leave it open."""


def worker_counts(*defaults: int) -> list[int]:
    """The worker counts to test with: the given ones, or the one of the environment."""
    return [int(OVERRIDE)] if OVERRIDE else list(defaults)


def anything(value: object) -> Any:
    """The value, typed so that a test may pass what the signatures forbid."""
    return value


def eventually(condition: Callable[[], object], what: str, limit: float = 20.0) -> None:
    """Wait until the condition holds; collect garbage in between.

    Raises:
        AssertionError: it did not hold within ``limit`` seconds.
    """
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        gc.collect()
        time.sleep(0.002)


def no_op() -> None:
    """A body that does nothing."""


class Boom(Exception):
    """The failure that tests raise; carries who raised it."""

    def __init__(self, origin: object = None) -> None:
        super().__init__(origin)
        self.origin = origin


def boom(origin: object = None) -> None:
    """A body that fails."""
    raise Boom(origin)


class Gate:
    """A task whose body holds its worker until the gate opens or the task is asked to stop."""

    _made: list[Gate] = []

    def __init__(self, name: str = "gate", **options: Any) -> None:
        self._event = threading.Event()
        self.started = threading.Event()
        self.ended = threading.Event()
        self.asked = False
        Gate._made.append(self)
        self.task: ch.Task[None] = ch.spawn(name, **options)(self._body)

    def _body(self) -> None:
        context = ch.current()
        self.started.set()
        try:
            while not self._event.wait(0.02):
                if context.cancel_requested:
                    self.asked = True
                    return
        finally:
            self.ended.set()

    def open(self) -> None:
        """Let the body end."""
        self._event.set()

    def __enter__(self) -> Gate:
        assert self.started.wait(30), "the gate's body never started"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.open()

    @classmethod
    def open_all(cls) -> None:
        """Open every gate that was ever made, so that no failed test leaves a body waiting."""
        for gate in cls._made:
            gate.open()
        cls._made.clear()


class Latch:
    """A task that is spawned last: what depends on it stays pending and holds no worker."""

    _count = 0

    def __init__(self) -> None:
        Latch._count += 1
        self._space = ch.TaskSpace(f"latch{Latch._count}")
        self.task: ch.Task[Any] = self._space[0]

    def open(self) -> None:
        """Spawn the task, which ends at once."""
        ch.spawn(self.task)(no_op)

    def __enter__(self) -> ch.Task[Any]:
        return self.task

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.open()


def check_alive() -> None:
    """The open runtime still spawns, orders, passes results and delivers failures."""
    space = ch.TaskSpace("alive")
    total = ch.spawn(space[3], dependencies=[space[0:3]])(lambda: "after all")
    values = [ch.spawn(space[i])(lambda i=i: i) for i in range(3)]
    assert [value.result() for value in values] == [0, 1, 2]
    assert total.result() == "after all"
    failed = ch.spawn(lambda: boom("alive"))
    error = failed.exception()
    assert isinstance(error, Boom) and error.origin == "alive"


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions inside nested groups, in order; of another exception, itself."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


def names_of(items: object) -> set[str]:
    """The names in a collection of tasks or of names, without blanks."""
    return {str(getattr(item, "name", item)).replace(" ", "") for item in anything(items)}


def threads_of_process() -> dict[int, str]:
    """The threads that the kernel knows of in this process, by id, with their names."""
    # A listing skips living threads when others end beside it; their number tells.
    while True:
        found = {}
        for entry in Path("/proc/self/task").iterdir():
            try:
                found[int(entry.name)] = (entry / "comm").read_text().strip()
            except OSError:
                continue
        status = Path("/proc/self/status").read_text()
        number = re.search(r"^Threads:\s*(\d+)$", status, re.MULTILINE)
        assert number is not None
        if len(found) == int(number[1]):
            return found


def functions_of(error: BaseException) -> list[str]:
    """The names of the functions in an exception's traceback, outermost first."""
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


SCRIPT_HEAD = """
import faulthandler, os, signal, sys, threading, time
faulthandler.enable()
faulthandler.dump_traceback_later({limit}, exit=True)
os.register_at_fork(before=faulthandler.cancel_dump_traceback_later)
signal.signal(signal.SIGINT, signal.default_int_handler)
import charioteer as ch

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()

"""


def _command(source: str, folder: Path, limit: float) -> list[str]:
    path = folder / "script.py"
    path.write_text(SCRIPT_HEAD.format(limit=limit) + textwrap.dedent(source))
    return [sys.executable, str(path)]


def _environment(extra: dict[str, str] | None) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k != "CHARIOTEER_WORKERS"}
    environment["PYTHONUNBUFFERED"] = "1"
    return environment | (extra or {})


def run_script(
    source: str,
    folder: Path,
    *,
    limit: float = 45.0,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a module-level script in a fresh interpreter.

    The script finds ``ch``, ``say`` and some standard modules imported, and dumps its stacks
    and dies when it takes longer than ``limit`` seconds.
    """
    return subprocess.run(
        _command(source, folder, limit),
        capture_output=True,
        text=True,
        timeout=limit + 10,
        env=_environment(environment),
    )


class Script:
    """A script in a fresh interpreter that the test talks to while it runs."""

    def __init__(self, source: str, folder: Path, *, limit: float = 30.0) -> None:
        self._limit = limit
        self.process = subprocess.Popen(
            _command(source, folder, limit),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(None),
        )
        self.lines: list[str] = []

    def __enter__(self) -> Script:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def _read(self) -> Iterator[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())
            yield self.lines[-1]

    def wait_for(self, line: str) -> None:
        """Read until the script says the line; its own time limit ends a wait in vain."""
        if not any(said == line for said in self._read()):
            assert self.process.stderr is not None
            raise AssertionError(
                f"the script never said {line!r}, only {self.lines}\n{self.process.stderr.read()}"
            )

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def finish(self) -> tuple[int, list[str], str]:
        """Wait for the end: exit status, all lines said, standard error."""
        out, error = self.process.communicate(timeout=self._limit + 10)
        self.lines += [line.strip() for line in out.splitlines()]
        return self.process.returncode, self.lines, error
