"""``charioteer graph``: make, convert, look at and run task graphs.

Graphs go from file to file; ``-`` is standard input or output. What is wrong with a file is told
with line and column.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from charioteer.cli import UserError

if TYPE_CHECKING:
    import charioteer as ch
    from charioteer.graphs import Graph, Site

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_parser", "run"]

MOVEMENTS = ("none", "lazy", "eager")

_DESCRIPTION = """\
Make, convert, look at and run task graphs.

  charioteer graph generate cholesky --width 8 --time 2ms --on gpu --out cholesky.jsonl
  charioteer graph info cholesky.jsonl --machine virtual:4
  charioteer graph run cholesky.jsonl --machine virtual:4
  charioteer graph convert parla.gph out.jsonl
  charioteer graph svg cholesky.jsonl cholesky.svg
"""

_ON = """\
where tasks may run: alternatives separated by '|', members of a set by '+', such as
'gpu*2 | cpu+gpu | gpu(1)'; given several times each task gets one of them, drawn with the weights
behind '=', such as gpu=0.7 (default: cpu)
"""


def add_parser(commands: Subparsers) -> None:
    """Add ``graph`` and its verbs to the commands."""
    parser = commands.add_parser(
        "graph",
        help="make, convert, look at and run task graphs",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")

    generate = verbs.add_parser("generate", help="make a graph of a pattern")
    generate.add_argument("pattern", metavar="PATTERN", help="'list' shows them")
    generate.add_argument(
        "--width",
        type=_count,
        default=8,
        metavar="N",
        help="tasks of a row, or tiles along an axis (default: 8)",
    )
    generate.add_argument(
        "--depth",
        type=_count,
        metavar="N",
        help="rows, for patterns whose width does not say it (default: 8)",
    )
    generate.add_argument(
        "--time", default="1ms", metavar="T", help="of a task, such as 50us (default: 1ms)"
    )
    generate.add_argument(
        "--vary",
        type=float,
        default=0.0,
        metavar="PART",
        help="by what part a task's time is more or less than that, drawn evenly (default: 0)",
    )
    generate.add_argument("--on", action="append", metavar="PLACES", help=_ON)
    generate.add_argument(
        "--share",
        type=float,
        default=1.0,
        metavar="PART",
        help="of each GPU that a task takes (default: 1)",
    )
    generate.add_argument(
        "--held",
        type=float,
        default=0.0,
        metavar="PART",
        help="of the time under the GIL (default: 0)",
    )
    generate.add_argument(
        "--slices", type=_count, default=1, metavar="N", help="of a task (default: 1)"
    )
    generate.add_argument(
        "--memory", metavar="SIZE", help="that a task takes on each GPU (default: none)"
    )
    generate.add_argument(
        "--size",
        metavar="SIZE",
        help="of what a task writes and those after it read, such as 4MiB (default: no data)",
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    generate.add_argument("--out", default="-", metavar="FILE", help="(default: -)")
    _add_format(generate, "--format", "what to write; that of FILE's suffix, else jsonl")

    convert = verbs.add_parser("convert", help="from one format to another")
    _add_file(convert)
    convert.add_argument("out", metavar="OUT", help="the file to write")
    convert.add_argument("--from", dest="read_as", metavar="FORMAT", help="jsonl, gph or pgraph")
    _add_format(convert, "--to", "what to write; that of OUT's suffix, else jsonl")

    svg = verbs.add_parser("svg", help="draw a graph")
    _add_file(svg)
    svg.add_argument("out", metavar="OUT", help="the file to write")

    info = verbs.add_parser("info", help="sizes, chains, bounds and an offline schedule")
    _add_file(info)
    _add_site(info)
    info.add_argument("--json", action="store_true", help="print JSON instead of a table")

    run = verbs.add_parser("run", help="run a graph, and see that it was right")
    _add_file(run)
    _add_site(run)
    run.add_argument(
        "--movement",
        choices=MOVEMENTS,
        default="none",
        help="what becomes of data: nothing, copied by who reads it, or declared to the runtime",
    )
    run.add_argument("--runs", type=_count, default=1, metavar="N", help="how often (default: 1)")
    run.add_argument(
        "--runahead",
        type=int,
        metavar="N",
        help="tasks of a device that are started ahead (default: 64, in virtual time 0)",
    )
    run.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the graph; - for standard input")


def _add_site(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--machine",
        metavar="MACHINE",
        help="virtual:N for N virtual GPUs, or a YAML file (default: this machine)",
    )
    parser.add_argument(
        "--virtual-time", action="store_true", help="on the machine's clock instead of ours"
    )
    parser.add_argument(
        "--workers", type=_count, metavar="N", help="cores (default: the machine's)"
    )


def _add_format(parser: argparse.ArgumentParser, option: str, what: str) -> None:
    parser.add_argument(
        option,
        dest="write_as",
        metavar="FORMAT",
        help=f"{what}: jsonl, gph, pgraph, dot or svg",
    )


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not 1 <= number <= 10_000_000:
        raise argparse.ArgumentTypeError("must be from 1 to 10000000")
    return number


def run(options: argparse.Namespace) -> int:
    """Carry out the verb.

    Returns:
        0; 1 if a run was not what its graph says.

    Raises:
        UserError: a file that cannot be read or written, or values that do not fit.
    """
    from charioteer import graphs

    verbs = {
        "generate": _generate,
        "convert": _convert,
        "svg": _convert,
        "info": _info,
        "run": _run,
    }
    try:
        return verbs[options.verb](options)
    except graphs.VerificationError as error:
        print(f"charioteer graph run: not what the graph says: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"cannot use {error.filename}: {error.strerror or error}") from error


def _generate(options: argparse.Namespace) -> int:
    from charioteer import graphs
    from charioteer._quantities import read_bytes, read_seconds

    if options.pattern == "list":
        for pattern in graphs.PATTERNS.values():
            option = "--depth" if pattern.has_depth else ""
            print(f"{pattern.name:18} {option:8} {pattern.summary}")
        return 0
    known = graphs.PATTERNS.get(options.pattern)
    depth = options.depth
    if depth is None and known is not None and known.has_depth:
        depth = 8
    graph = graphs.describe(
        graphs.make(options.pattern, options.width, depth, options.seed),
        on=options.on or ("cpu",),
        seconds=read_seconds(options.time, "--time"),
        vary=options.vary,
        share=options.share,
        held=options.held,
        slices=options.slices,
        memory=0 if options.memory is None else read_bytes(options.memory, "--memory"),
        size=0 if options.size is None else read_bytes(options.size, "--size"),
        seed=options.seed,
    )
    _write(graph, options.out, options.write_as)
    return 0


def _convert(options: argparse.Namespace) -> int:
    graph = _read(options.file, getattr(options, "read_as", None))
    wanted = "svg" if options.verb == "svg" else options.write_as
    _write(graph, options.out, wanted)
    return 0


def _read(path: str, format: str | None = None) -> Graph:
    from charioteer import graphs
    from charioteer.graphs.files import READERS

    if format is not None and format not in READERS:
        raise UserError(f"cannot read {format!r}; known: {', '.join(READERS)}")
    if path == "-":
        return graphs.loads(sys.stdin.read(), "<stdin>", format)
    return graphs.read(path, format)


def _write(graph: Graph, path: str, format: str | None) -> None:
    from charioteer import graphs

    if path == "-":
        sys.stdout.write(graphs.dumps(graph, format or "jsonl"))
    else:
        graphs.write(graph, path, format)


def _machine(options: argparse.Namespace) -> ch.Machine:
    """The machine that the options name.

    Raises:
        UserError: it is none.
    """
    import charioteer as ch

    said = options.machine or os.environ.get("CHARIOTEER_MACHINE")
    try:
        machine = ch.Machine.load(said) if said else ch.Machine.detect()
        if options.virtual_time:
            machine = ch.Machine(
                machine.host,
                machine.gpus,
                links=machine.links,
                time="virtual",
                name=machine.name,
                driver=machine.driver,
            )
    except ch.MachineError as error:
        raise UserError(str(error)) from error
    return machine


def _site(options: argparse.Namespace, machine: ch.Machine) -> Site:
    from charioteer.graphs import Site

    # In virtual time work on cores takes no time.
    cores = 0 if machine.time == "virtual" else options.workers
    return Site.of(machine, cores)


def _facts(graph: Graph, site: Site, *, moves: bool = False) -> dict[str, float]:
    from charioteer import graphs

    bounds = graphs.bounds(graph, site)
    schedule = graphs.list_schedule(graph, site, moves=moves)
    rows = graph.levels
    return {
        "tasks": len(graph),
        "dependencies": graph.edges,
        "levels": len(rows),
        "width": max(map(len, rows), default=0),
        "average width": len(graph) / max(1, len(rows)),
        "bytes": sum(block.size for block in graph.blocks),
        "work, ms": 1e3 * sum(task.seconds for task in graph),
        "longest chain, ms": 1e3 * bounds.chain,
        "bound by work, ms": 1e3 * bounds.work,
        "bound by the GIL, ms": 1e3 * bounds.gil,
        "list schedule, ms": 1e3 * schedule.makespan,
    }


def _info(options: argparse.Namespace) -> int:
    graph = _read(options.file)
    machine = _machine(options)
    _show(graph, _facts(graph, _site(options, machine)), options)
    return 0


def _run(options: argparse.Namespace) -> int:
    from charioteer import graphs

    graph = _read(options.file)
    machine = _machine(options)
    calibration = graphs.calibrate(machine)
    runs = [
        graphs.run(
            graph,
            machine=machine,
            workers=options.workers,
            movement=options.movement,
            runahead=options.runahead,
            calibration=calibration,
        )
        for _ in range(options.runs)
    ]
    facts = _facts(graph, _site(options, machine), moves=options.movement != "none")
    for number, one in enumerate(runs, 1):
        facts[f"run {number}, ms"] = 1e3 * one.seconds
    best = 1e3 * min(one.seconds for one in runs)
    facts["list schedule / best run"] = facts["list schedule, ms"] / best if best else 1.0
    facts["verified runs"] = len(runs)
    _show(graph, facts, options)
    return 0


def _show(graph: Graph, facts: dict[str, float], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps({"graph": graph.name, **facts}, indent=1))
        return
    name = "standard input" if options.file == "-" else Path(options.file).name
    print(f"{graph.name} ({name})")
    for what, value in facts.items():
        print(f"  {what:26} {value:,.6g}")
