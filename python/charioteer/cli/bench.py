"""``charioteer bench NAME``: a thin face over the benchmarks of :mod:`charioteer.bench`.

A benchmark is a module with ``SUMMARY``, ``DESCRIPTION``, ``OptionError``,
``add_arguments(parser)`` and ``run(options) -> int``; listing it in :data:`BENCHMARKS` is all it
takes to appear here.
"""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Any

from charioteer.cli import UserError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["BENCHMARKS", "add_parser", "run"]

BENCHMARKS = {
    "overhead": "charioteer.bench.overhead",
    "gil": "charioteer.bench.gil",
    "multi-device": "charioteer.bench.multi_device",
    "metg": "charioteer.bench.metg",
    "graphs": "charioteer.bench.graph_runs",
    "policies": "charioteer.bench.policies",
    "gpu": "charioteer.bench.gpu",
}


def add_parser(commands: Subparsers) -> None:
    """Add ``bench`` and one parser a benchmark to the commands."""
    parser = commands.add_parser(
        "bench",
        help="measure the runtime on this machine, beside others",
        description="Measure the runtime on this machine, with the runs of all compared "
        "runtimes interleaved.",
    )
    names = parser.add_subparsers(
        dest="benchmark", metavar="BENCHMARK", required=True, title="benchmarks"
    )
    for name, module_name in BENCHMARKS.items():
        module: Any = importlib.import_module(module_name)
        benchmark = names.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(benchmark)


def run(options: argparse.Namespace) -> int:
    """Run the chosen benchmark.

    Raises:
        UserError: its options do not fit together or name what does not exist.
    """
    module: Any = importlib.import_module(BENCHMARKS[options.benchmark])
    try:
        status: int = module.run(options)
    except module.OptionError as error:
        raise UserError(str(error)) from error
    return status
