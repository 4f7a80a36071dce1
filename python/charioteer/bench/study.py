"""``charioteer study``: every benchmark in one go, and one report of all that they measured.

Protocol. A study is a list of *parts*. Each is a benchmark's command with some of its measures,
runs in a process of its own, and leaves a file of records under ``parts`` of the study's folder;
what is compared with each other is in one part, whose rounds are interleaved. A part's file has
another name until the part is complete, so a study that was stopped goes on with the first part
that is not there. ``study.json`` says what the study is of: settings, commit, machine and
interpreter. A folder with a study of something else is refused, since figures of two machines or
commits do not belong together.

A part that fails is told in the report, with the last line that it complained with, and is run
again when the study is. Then the report is written: ``report.html``, one file with plots, tables
and every raw figure, and ``report.md`` with its plots beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from charioteer.bench import pages, records
from charioteer.bench.study_report import blocks
from charioteer.graphs import PATTERNS

__all__ = ["FORMAT", "Part", "StudyError", "conduct", "parts"]

FORMAT = 1
"""The version of ``study.json``."""
EXAMPLES = Path("examples", "apps", "study.py")


class StudyError(Exception):
    """A study that cannot be made; the message says why."""


@dataclass(frozen=True)
class Part:
    """A part of a study.

    Attributes:
        name: of its file.
        arguments: what ``charioteer`` is called with; or a script, if the first ends in ``.py``.
        seconds: about how long it takes, on two cores with nothing else to do.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float


def parts(*, quick: bool = False, apps: Path | None = None) -> list[Part]:
    """The parts of a study.

    Args:
        quick: whether a look is enough, of five minutes.
        apps: the folder of the sources, with its applications, if there is one.
    """
    found: list[Part] = []

    def bench(name: str, seconds: float, *arguments: str) -> None:
        found.append(Part(name, ("bench", *arguments), seconds))

    if quick:
        bench("overhead", 20, "overhead", "--quick", "--only", "tasks,data,latency,start,import")
        bench("gil", 50, "gil", "--quick", "--runs", "3", "--peers", "threadpool")
        for pattern in ("stencil", "fft"):
            few = ("--runs", "3", "--seconds", "0.03", "--peers", "threadpool,joblib,dask")
            bench(f"metg-{pattern}", 25, "metg", "--patterns", pattern, *few)
        bench("multi-device", 8, "multi-device", "--quick", "--runs", "3")
        bench("policies", 20, "policies", "--quick")
        bench("graphs", 40, "graphs", "--quick")
    else:
        for name, seconds in (
            *(("tasks", 240), ("data", 60), ("latency", 30), ("native", 30), ("memory", 60)),
            *(("flat", 240), ("idle", 60), ("start", 10), ("import", 20)),
        ):
            bench(f"overhead-{name}", seconds, "overhead", "--only", name)
        bench("gil", 900, "gil", "--runs", "5")
        for pattern in PATTERNS:
            bench(f"metg-{pattern}", 400, "metg", "--patterns", pattern)
        bench("multi-device", 800, "multi-device")
        bench("policies", 150, "policies")
        for pattern in PATTERNS:
            bench(f"graphs-{pattern}", 20, "graphs", "--only", pattern)
    if apps is not None:
        script = str(apps / EXAMPLES)
        arguments = (script, "--quick") if quick else (script,)
        found.append(Part("applications", arguments, 30 if quick else 500))
    return found


def sources() -> Path | None:
    """The folder of the sources that this package is in, if it is in one with the applications."""
    root = Path(__file__).parents[3]
    return root if (root / EXAMPLES).is_file() else None


def conduct(
    out: Path,
    chosen: Sequence[Part],
    *,
    quick: bool,
    tell: Callable[[str], object],
    run: Callable[[Part, Path], str | None] | None = None,
) -> bool:
    """Run the parts that are not there yet, and write the report.

    Args:
        out: the study's folder; made if it is not there.
        chosen: the parts.
        quick: what ``study.json`` says of the settings.
        tell: called with a line of progress before each part.
        run: runs a part, writes its records to the path and says what went wrong, if something did.

    Returns:
        Whether every part is complete.

    Raises:
        StudyError: the folder cannot be used, or has a study of something else.
    """
    subject = {
        "charioteer-study": FORMAT,
        "quick": quick,
        "commit": records.commit(),
        "machine": records.machine(),
        "python": records.python_version(),
    }
    folder = out / "parts"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(out / "study.json", subject)
    except OSError as error:
        raise StudyError(f"cannot use {out}: {error.strerror or error}") from error
    failures: dict[str, str] = {}
    missing = [part for part in chosen if not (folder / f"{part.name}.json").is_file()]
    if len(missing) < len(chosen):
        tell(f"{len(chosen) - len(missing)} of {len(chosen)} parts are there already")
    done = spent = 0.0
    for number, part in enumerate(missing):
        left = sum(one.seconds for one in missing[number:]) * (spent / done if done else 1.0)
        tell(
            f"[{len(chosen) - len(missing) + number + 1}/{len(chosen)}] {part.name}: {_left(left)}"
        )
        start = time.monotonic()
        complete = folder / f"{part.name}.json"
        unfinished = folder / f"{part.name}.unfinished"
        unfinished.unlink(missing_ok=True)
        failure = (run or _run)(part, unfinished)
        if failure is None and not unfinished.is_file():
            failure = "it left no records"
        if failure is None:
            unfinished.replace(complete)
        else:
            failures[part.name] = failure
            tell(f"{part.name} failed: {failure}")
        done += part.seconds
        spent += time.monotonic() - start
    entries = _entries(folder, chosen)
    page = blocks(entries, subject, failures)
    data = {"study": subject, "parts": [asdict(part) for part in chosen], "records": entries}
    pages.write(out / "report.html", "A study of Charioteer", page, data)
    pages.write(out / "report.md", "A study of Charioteer", page)
    return not failures


def _left(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(1, round(seconds))} s left"
    return f"about {round(seconds / 60)} min left"


def _claim(path: Path, subject: dict[str, Any]) -> None:
    """Say what the folder's study is of, or see that it says the same.

    Raises:
        StudyError: it says something else.
    """
    if not path.is_file():
        path.write_text(json.dumps(subject, indent=1) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise StudyError(f"{path} is damaged: choose another folder")
    for key, value in subject.items():
        if found.get(key) != value:
            raise StudyError(
                f"{path.parent} has a study with {key} {found.get(key)!r}, not {value!r}:"
                " choose another folder"
            )


def _run(part: Part, path: Path) -> str | None:
    """Run a part in a process; the last line of its complaints if it failed."""
    script = part.arguments[0].endswith(".py")
    command = [sys.executable, *(() if script else ("-P", "-m", "charioteer")), *part.arguments]
    environment = dict(os.environ)
    # What would change a benchmark, and is not in the record.
    for name in [name for name in environment if name.startswith("CHARIOTEER_")]:
        if name != "CHARIOTEER_COMMIT":
            del environment[name]
    done = subprocess.run(
        [*command, "--json", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=environment,
    )
    # 1: a run of ours failed, which its record says.
    if done.returncode in (0, 1) and path.is_file():
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def _entries(folder: Path, chosen: Sequence[Part]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part in chosen:
        path = folder / f"{part.name}.json"
        if path.is_file():
            found += json.loads(path.read_text(encoding="utf-8"))
    return found
