"""``charioteer info``: what a runtime opened here and now would work with.

The number of workers is not computed a second time here: a runtime is opened and asked, so that
the answer cannot differ from what a program gets.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from typing import Any

import charioteer
from charioteer.bench import records
from charioteer.cli import UserError

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Print the facts as a table, or as JSON with ``--json``.

    Raises:
        UserError: a setting in the environment is not valid.
    """
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_table(facts)
    return 0


def collect() -> dict[str, Any]:
    """Gather version, interpreter, devices, workers and BLAS libraries as JSON-ready values.

    Raises:
        UserError: a setting in the environment is not valid.
    """
    try:
        with charioteer.Runtime() as runtime:
            workers = runtime.workers
    except ValueError as error:
        raise UserError(str(error)) from error
    return {
        "version": charioteer.__version__,
        "python": {
            "implementation": platform.python_implementation(),
            "version": platform.python_version(),
            "gil": records.gil_enabled(),
            "executable": sys.executable,
        },
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "devices": [
            {
                "kind": "cpu",
                "model": records.cpu_model(),
                "usable_cores": records.usable_cores(),
                "online_cores": os.cpu_count(),
            }
        ],
        "workers": workers,
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith("CHARIOTEER_")
        },
        "blas": _blas(),
    }


def _blas() -> list[dict[str, Any]]:
    """The thread pools of BLAS and OpenMP in this process, with NumPy's and SciPy's loaded."""
    from threadpoolctl import threadpool_info

    for library in ("numpy.linalg", "scipy.linalg"):
        try:
            importlib.import_module(library)
        except ModuleNotFoundError:
            continue  # SciPy is optional; a library that is not installed has no BLAS to show.
    return [
        {
            "library": pool["internal_api"],
            "use": pool["user_api"],
            "version": pool.get("version"),
            "architecture": pool.get("architecture"),
            "threads": pool["num_threads"],
            "file": pool["filepath"],
        }
        for pool in threadpool_info()
    ]


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    python = facts["python"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("charioteer", facts["version"])
    gil = "with the GIL" if python["gil"] else "free-threaded, without the GIL"
    table.add_row("Python", f"{python['implementation']} {python['version']}, {gil}")
    table.add_row("", python["executable"])
    table.add_row("system", facts["system"])
    for device in facts["devices"]:
        cores, online = device["usable_cores"], device["online_cores"]
        of = "" if cores == online else f" (of {online} online)"
        table.add_row("devices", f"cpu x {cores}{of}: {device['model']}")
    workers = facts["workers"]
    note = " (set by CHARIOTEER_WORKERS)" if facts["environment"].get("CHARIOTEER_WORKERS") else ""
    inline = ": tasks run inline, in the thread that spawns them" if workers == 0 else ""
    table.add_row("workers", f"{workers}{inline}{note}")
    for number, pool in enumerate(facts["blas"]):
        version = f" {pool['version']}" if pool["version"] else ""
        architecture = f", {pool['architecture']}" if pool["architecture"] else ""
        threads = f"{pool['threads']} thread" + ("s" if pool["threads"] != 1 else "")
        table.add_row(
            "" if number else "BLAS, OpenMP",
            f"{pool['library']}{version}{architecture}, {threads}: "
            f"{os.path.basename(pool['file'])}",
        )
    if not facts["blas"]:
        table.add_row("BLAS, OpenMP", "none that threadpoolctl knows")
    Console(highlight=False).print(table)
