"""``charioteer info``: what a runtime opened here and now would work with.

Workers and machine are not found a second time here: a runtime is opened and asked, so that the
answer cannot differ from what a program gets.
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
from charioteer._quantities import show_bandwidth, show_seconds
from charioteer.bench import records
from charioteer.cli import UserError, read_models, set_machine
from charioteer.machine import Link, Machine, show_cores

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Print the facts as a table, or as JSON with ``--json``.

    Raises:
        UserError: a setting in the environment is not valid, the machine is none, or the models
            cannot be read.
    """
    set_machine(options.machine)
    models = None if options.models is None else read_models(options.models)
    facts = collect()
    if models is not None:
        facts["models"] = [model._asdict() for model in models]
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_table(facts)
    return 0


def collect() -> dict[str, Any]:
    """Gather version, interpreter, machine, workers and BLAS libraries as JSON-ready values.

    Raises:
        UserError: a setting in the environment is not valid.
    """
    try:
        with charioteer.Runtime() as runtime:
            workers, machine = runtime.workers, runtime.machine
    except ValueError as error:
        # Of a bad number, or of a machine that is none: both are from the environment.
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
        "machine": _machine(machine.measured()),
        "workers": workers,
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith("CHARIOTEER_")
        },
        "blas": _blas(),
    }


def _machine(machine: Machine) -> dict[str, Any]:
    """The machine: memory in bytes, bandwidth in bytes a second, latency in seconds."""
    return {
        "name": machine.name,
        "time": machine.time,
        "host": {
            "cores": machine.host.cores,
            "memory": machine.host.memory,
            "nodes": [
                {"cores": list(node.cores), "memory": node.memory} for node in machine.host.nodes
            ],
        },
        "driver": machine.driver,
        "gpus": [
            {"name": gpu.name, "memory": gpu.memory, "capability": gpu.capability}
            for gpu in machine.gpus
        ],
        "links": {
            "host": _link(machine.links.host),
            "peer": None if machine.links.peer is None else _link(machine.links.peer),
            "local": _link(machine.links.local),
            "pairs": [
                {"from": str(source), "to": str(target), **_link(link)}
                for (source, target), link in machine.links.pairs
            ],
        },
    }


def _link(link: Link) -> dict[str, float | None]:
    # JSON has no infinity; a link without bandwidth to speak of has none here.
    bandwidth = link.bandwidth if link.bandwidth < float("inf") else None
    return {"bandwidth": bandwidth, "latency": link.latency}


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


def _add_machine(table: Any, machine: dict[str, Any]) -> None:
    time = ", in virtual time" if machine["time"] == "virtual" else ""
    table.add_row("machine", f"{machine['name']}{time}")
    host = machine["host"]
    memory = "" if host["memory"] is None else f", {_size(host['memory'])}"
    table.add_row("", f"host: {_count(host['cores'], 'core')}{memory}")
    for number, node in enumerate(host["nodes"]):
        cores = show_cores(node["cores"])
        table.add_row("", f"NUMA node {number}: cores {cores}, {_size(node['memory'])}")
    for number, gpu in enumerate(machine["gpus"]):
        capability = gpu["capability"]
        shown = "" if capability is None else f", compute capability {capability}"
        table.add_row("", f"gpu({number}): {gpu['name']}, {_size(gpu['memory'])}{shown}")
    if not machine["gpus"]:
        return
    links = machine["links"]
    table.add_row("links", f"within a GPU: {_speed(links['local'])}")
    if machine["driver"] == "virtual":  # of others all were measured, and are among the pairs
        table.add_row("", f"host and GPU: {_speed(links['host'])}")
        if len(machine["gpus"]) > 1:
            peer = "none" if links["peer"] is None else _speed(links["peer"])
            table.add_row("", f"GPU and GPU: {peer}")
    for pair in links["pairs"]:
        ends = [end.replace("cpu(0)", "host") for end in (pair["from"], pair["to"])]
        table.add_row("", f"{ends[0]} to {ends[1]}: {_speed(pair)}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _size(size: int) -> str:
    """For people, who do not count bytes."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def _speed(link: dict[str, Any]) -> str:
    bandwidth = "no time" if link["bandwidth"] is None else show_bandwidth(link["bandwidth"])
    return f"{bandwidth}, {show_seconds(link['latency'])} latency"


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
    _add_machine(table, facts["machine"])
    workers = facts["workers"]
    note = " (set by CHARIOTEER_WORKERS)" if facts["environment"].get("CHARIOTEER_WORKERS") else ""
    inline = ": tasks run inline, in the thread that spawns them" if workers == 0 else ""
    pin = facts["environment"].get("CHARIOTEER_PIN") or "none"
    pinned = f", pinned to cores ({pin})" if workers and pin != "none" else ""
    table.add_row("workers", f"{workers}{pinned}{inline}{note}")
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
    console = Console(highlight=False)
    console.print(table)
    if "models" in facts:
        _print_models(console, facts["models"])


def _print_models(console: Any, models: list[dict[str, Any]]) -> None:
    from rich.table import Table

    if not models:
        console.print("No run times are known.")
        return
    table = Table(title="run times", title_justify="left")
    for name in ("function", "set", "size", "calls", "timed", "explored", "estimate"):
        text = name in ("function", "set")
        table.add_column(name, overflow="fold", justify="left" if text else "right")
    for model in models:
        seconds = model["estimate"]
        table.add_row(
            model["function"],
            model["choice"],
            *(f"{model[name]:,}" for name in ("size", "calls", "timed", "explored")),
            "" if seconds is None else _duration(seconds),
        )
    console.print(table)


def _duration(seconds: float) -> str:
    """For people, who do not count nanoseconds."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{seconds / unit:.4g} {name}"
    return f"{seconds / 1e-9:.4g} ns"
