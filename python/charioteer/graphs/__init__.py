"""Task graphs as descriptions: patterns, files, analysis, and runs that are verified.

What lives here: :mod:`~charioteer.graphs.shapes` (patterns of dependence),
:mod:`~charioteer.graphs.description` (what tasks do, where, with which data),
:mod:`~charioteer.graphs.analysis` (chains, bounds, an offline schedule),
:mod:`~charioteer.graphs.files` with a module a format, and :mod:`~charioteer.graphs.running`.

Arrows run one way: files and analysis use descriptions, those use shapes; only running knows the
runtime. Nothing in ``import charioteer`` imports this package.

>>> from charioteer import graphs
>>> graph = graphs.describe(graphs.make("cholesky", 4), seconds=1e-4)
>>> len(graph), graphs.bounds(graph, graphs.Site(cores=2, gpus=0)).makespan
(20, 0.001)
"""

from charioteer.graphs.analysis import (
    Bounds,
    Schedule,
    Site,
    Slot,
    bounds,
    critical_path,
    list_schedule,
)
from charioteer.graphs.description import Block, Graph, GraphError, Need, Task, describe, parse_on
from charioteer.graphs.files import dumps, loads, read, write
from charioteer.graphs.running import Calibration, Ran, Run, VerificationError, calibrate, run
from charioteer.graphs.scanning import GraphFileError
from charioteer.graphs.shapes import PATTERNS, Pattern, Shape, make, sized

__all__ = [
    "PATTERNS",
    "Block",
    "Bounds",
    "Calibration",
    "Graph",
    "GraphError",
    "GraphFileError",
    "Need",
    "Pattern",
    "Ran",
    "Run",
    "Schedule",
    "Shape",
    "Site",
    "Slot",
    "Task",
    "VerificationError",
    "bounds",
    "calibrate",
    "critical_path",
    "describe",
    "dumps",
    "list_schedule",
    "loads",
    "make",
    "parse_on",
    "read",
    "run",
    "sized",
    "write",
]
