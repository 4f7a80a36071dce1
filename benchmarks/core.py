"""The Rust core's cost of an empty task, as records.

Runs ``cargo bench -p charioteer-bench --bench core``, whose report goes to the terminal, and writes
what Criterion measured as a JSON list of records to standard output or to ``--json FILE``. One
value behind a record is one sample of Criterion: the mean time of a task over some hundreds of
thousands of them, and of a round trip over some dozens. Options of Cargo, such as ``--locked``, are
passed on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from charioteer.bench import records

ROOT = Path(__file__).resolve().parent.parent
# The first three are named as those of the peer, peers/taskflow/run.py.
CASES = {
    "inside": ("empty closure, spawned inside a task", "time per task"),
    "outside": ("empty closure, spawned from outside", "time per task"),
    "dependent": ("empty closure, handles kept, two dependencies", "time per task"),
    "space": ("empty closure, chain in a task space", "time per task"),
    "data-chain": ("empty closure, one read and one write, chain", "time per task"),
    "data": ("empty closure, one read and one write, independent", "time per task"),
    "closed": ("empty closure, spawned from outside, until closed", "time per task"),
    "round-trip": ("one task on an idle runtime", "spawn to result"),
}
WORKERS = (1, 2)


def measure(home: Path, cargo_options: list[str]) -> None:
    """Run the benchmarks and leave Criterion's files in ``home``.

    Raises:
        subprocess.CalledProcessError: they do not build, or one failed.
    """
    subprocess.run(
        ["cargo", "bench", *cargo_options, "-p", "charioteer-bench", "--bench", "core"],
        cwd=ROOT,
        env={**os.environ, "CRITERION_HOME": str(home)},
        stdout=sys.stderr,
        check=True,
    )


def collect(home: Path, since: float) -> list[records.Record]:
    """The records of what was measured after ``since``, in seconds since the epoch.

    Raises:
        OSError: a case has no files.
        ValueError: the files of a case are older.
    """
    entries = []
    for name, (case, metric) in CASES.items():
        for workers in WORKERS:
            path = home / "core" / name / str(workers) / "new" / "sample.json"
            if path.stat().st_mtime < since:
                raise ValueError(f"{path} is of an earlier run")
            sample = json.loads(path.read_text())
            params: dict[str, Any] = {"workers": workers, "allocator": "mimalloc"}
            entries.append(
                records.record(
                    "core",
                    "charioteer",
                    case,
                    params,
                    metric,
                    "µs",
                    [
                        1e-3 * nanoseconds / iterations
                        for nanoseconds, iterations in zip(
                            sample["times"], sample["iters"], strict=True
                        )
                    ],
                    python="none: Rust",
                )
            )
    return entries


def main() -> int:
    """Parse the options, measure, and print or write the records."""
    parser = argparse.ArgumentParser(description="Measure the core's empty tasks with Criterion.")
    parser.add_argument("--json", metavar="FILE", help="write to FILE, not to standard output")
    options, cargo_options = parser.parse_known_args()
    home = ROOT / "target" / "criterion"
    # A file that tells the time as the clock of the file system does.
    home.mkdir(parents=True, exist_ok=True)
    stamp = home / ".records"
    stamp.touch()
    try:
        measure(home, cargo_options)
    except subprocess.CalledProcessError as error:
        return error.returncode
    entries = collect(home, stamp.stat().st_mtime)
    if options.json is not None:
        records.write_json(options.json, entries)
    else:
        print(json.dumps([asdict(entry) for entry in entries], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
