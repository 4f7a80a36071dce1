"""What the benchmarks' commands have in common: options, the run over all measures, its end."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from charioteer.bench import probes, records
from charioteer.bench.harness import OURS, Measure, Result, Verdict, interleave

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Conduct",
    "OptionError",
    "add_outcome_arguments",
    "add_peers_argument",
    "add_runs_argument",
    "carried_out",
    "carry_out",
    "check_other_python",
    "check_writable",
    "choice",
    "positive",
    "print_machine",
]

BUSY = 0.3
"""The load average a core above which other programs are likely to disturb the runs."""


class OptionError(ValueError):
    """Options that do not fit together or name what does not exist."""


def choice(what: str, text: str | None, known: Sequence[str]) -> tuple[str, ...] | None:
    """The names in a comma-separated list.

    Raises:
        OptionError: one of them is not known.
    """
    if text is None:
        return None
    if what == "peer" and text in ("all", "none"):
        return tuple(known) if text == "all" else ()
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in known:
            raise OptionError(f"there is no {what} {name!r}; known: {', '.join(known)}")
    return names


def positive(text: str) -> int:
    """A whole number above zero, for an option."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def add_runs_argument(parser: argparse.ArgumentParser, default: int = 5) -> None:
    """Declare how many rounds count."""
    parser.add_argument(
        "--runs", type=positive, metavar="N", help=f"counted rounds (default: {default})"
    )


def add_peers_argument(parser: argparse.ArgumentParser, known: Iterable[str]) -> None:
    """Declare who of the known ones runs beside charioteer."""
    parser.add_argument(
        "--peers",
        metavar="A,B",
        help=f"who runs beside charioteer: all, none, or some of {', '.join(known)}",
    )


def add_outcome_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say what becomes of the results."""
    parser.add_argument("--json", metavar="FILE", help="write all results to FILE as records")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a bar is not met or not measured"
    )


def check_writable(path: str) -> None:
    """See that a file can be there.

    Raises:
        OptionError: it cannot.
    """
    target = Path(path)
    if target.is_dir():
        raise OptionError(f"cannot write {path}: it is a directory")
    if not target.absolute().parent.is_dir():
        raise OptionError(f"cannot write {path}: its directory does not exist")


def check_other_python(python: str | None) -> None:
    """See that the other interpreter has a GIL if this one has none, and the reverse.

    Raises:
        OptionError: it cannot be run, or is of the same kind as this one.
    """
    if python is None:
        return
    try:
        other_has_gil = probes.gil_enabled(python)
    except probes.ProbeError as error:
        raise OptionError(f"--other-python: {error}") from error
    if other_has_gil == records.gil_enabled():
        kind = "have the GIL" if other_has_gil else "are free-threaded"
        raise OptionError(f"--other-python: this interpreter and {python} both {kind}")


def print_machine(console: Console, benchmark: str) -> None:
    """Say what runs where, and whether the machine is busy."""
    console.print(f"charioteer bench {benchmark}: {records.machine()}", soft_wrap=True)
    console.print(f"{records.python_version()}, commit {records.commit()}")
    load = os.getloadavg()[0]
    if load > BUSY * records.usable_cores():
        console.print(
            f"[yellow]the machine is busy (load average {load:.1f}): expect wide ranges[/]"
        )


@dataclass
class Conduct:
    """The run of a benchmark's measures, with what came of those that have run.

    Attributes:
        benchmark: its name, for the records.
        runs: rounds that count, where a measure does not say.
        json: the file for the records.
    """

    benchmark: str
    runs: int
    json: str | None = None
    entries: list[records.Record] = field(default_factory=list)
    verdicts: list[tuple[Measure, Verdict]] = field(default_factory=list)
    failed: bool = False

    def run(
        self,
        measures: Sequence[Measure],
        show: Callable[[Measure, Result, Sequence[Verdict]], object],
        extra: Callable[[Measure, Result], Sequence[records.Record]] | None = None,
    ) -> None:
        """Run the measures one after another.

        Args:
            measures: which.
            show: prints a measure that has run.
            extra: further records of a measure that has run.
        """
        from charioteer.bench import report

        total = sum(measure.steps(self.runs) for measure in measures)
        done = 0
        for measure in measures:
            with report.progress(measure.name, done, total) as step:
                result = interleave(
                    measure.contestants,
                    measure.runs or self.runs,
                    warmup=measure.warmup,
                    step=step,
                )
            done += measure.steps(self.runs)
            held = measure.verdicts(result)
            show(measure, result, held)
            self.verdicts += [(measure, verdict) for verdict in held]
            self.entries += measure.records(self.benchmark, result)
            if extra is not None:
                self.entries += extra(measure, result)
            self.failed |= any(
                series.failure is not None and runtime.startswith(OURS)
                for (runtime, *_), series in result.items()
            )
            if self.json is not None:
                # After every measure: an interrupted run keeps what it has.
                records.write_json(self.json, self.entries)

    def end(self, console: Console, *, check: bool) -> int:
        """Print what became of the bars.

        Returns:
            0; 1 if a run of charioteer itself failed, or with ``check`` if a bar does not hold.
        """
        from charioteer.bench import report

        report.print_summary(console, self.verdicts)
        if self.json is not None:
            console.print(f"{len(self.entries)} records in {self.json}")
        unmet = check and any(verdict.met is not True for _, verdict in self.verdicts)
        return 1 if self.failed or unmet else 0


def carry_out(
    benchmark: str, chosen: Sequence[Measure], runs: int, options: argparse.Namespace
) -> int:
    """Make the measures, print them, write the records where the options say.

    Returns:
        0; 1 if a run of charioteer itself failed, or with ``--check`` if a bar does not hold.

    Raises:
        OptionError: the file for the records cannot be written.
    """
    status, _ = carried_out(benchmark, chosen, runs, options)
    return status


def carried_out(
    benchmark: str, chosen: Sequence[Measure], runs: int, options: argparse.Namespace
) -> tuple[int, Conduct]:
    """As :func:`carry_out`, with what came of the measures.

    Raises:
        OptionError: the file for the records cannot be written.
    """
    # Here and not above: the command line loads this module only to parse its options.
    from rich.console import Console

    from charioteer.bench import report

    if options.json is not None:
        check_writable(options.json)
    console = Console(highlight=False)
    print_machine(console, benchmark)
    conduct = Conduct(benchmark, runs, options.json)
    conduct.run(chosen, functools.partial(report.print_measure, console))
    return conduct.end(console, check=options.check), conduct
