"""StarPU's cost of an empty task, as records: a peer of the Rust core's benchmark.

See ``peer.py`` in the folder above. StarPU is found by ``pkg-config``; where that does not know it,
the headers are looked for where the compiler looks, and in the folder that ``STARPU_INCLUDE`` or
``--include`` names (the one that contains ``starpu.h``), and the library where the linker looks.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from charioteer.bench import records

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import peer  # noqa: E402 (beside the folder of this script)
from peer import BuildError, Missing  # noqa: E402

__all__ = ["BuildError", "Missing", "build", "collect"]

BUILD = peer.OUT / "starpu"
VERSIONS = ("1.4", "1.3")
CASES = {
    "outside": "empty closure, spawned from outside",
    "dependent": "empty closure, handles kept, two dependencies",
    "data": "empty closure, one read and one write, in a chain",
}


def found() -> tuple[list[str], list[str]]:
    """The options for the compiler and the linker, as far as ``pkg-config`` knows them."""
    if shutil.which("pkg-config") is not None:
        for version in VERSIONS:
            package = f"starpu-{version}"
            flags = []
            for option in ("--cflags", "--libs"):
                done = subprocess.run(
                    ["pkg-config", option, package], capture_output=True, text=True, check=False
                )
                if done.returncode != 0:
                    break
                flags.append(done.stdout.split())
            else:
                return flags[0], flags[1]
    return [], [f"-lstarpu-{VERSIONS[-1]}"]


def build(include: str | None) -> Path:
    """Compile the harness and return the program.

    Raises:
        Missing: there is no C compiler or no StarPU header.
        BuildError: the compiler refuses the source, or there is no library.
    """
    command = [peer.compiler("CC", ("cc", "gcc", "clang"), "C")]
    flags, libraries = found()
    command += ["-std=gnu11", "-O3", "-DNDEBUG", "-pthread", *flags]
    if include is not None:
        command += ["-isystem", include]
    if not peer.knows([*command, "-x", "c"], "starpu.h"):
        raise Missing("the StarPU headers are not installed")
    source = str(HERE / "main.c")
    return peer.compile_to(BUILD / "main", [*command, source, *libraries, "-lm"])


def collect(include: str | None, workers: int, tasks: int, runs: int) -> list[records.Record]:
    """The records of one number of workers; without values where StarPU is missing.

    Raises:
        BuildError: StarPU is there, but the harness fails with it.
    """
    return peer.collect("StarPU", "C", CASES, partial(build, include), workers, tasks, runs)


if __name__ == "__main__":
    sys.exit(peer.main("StarPU", "STARPU_INCLUDE", 100_000, collect))
