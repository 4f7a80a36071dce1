"""Pictures of graphs: DOT for Graphviz, and SVG of our own, laid out in rows by level."""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping

from charioteer.graphs.analysis import critical_path
from charioteer.graphs.description import Graph

__all__ = ["dot", "svg"]

COLOURS = ("#0b6e4f", "#08415c", "#cc2936", "#e8985e", "#6b7fd7", "#9c7a97", "#73c2a5", "#4a4a4a")
RADIUS = 9
ACROSS, DOWN, MARGIN = 34, 54, 28


def _colours(graph: Graph) -> Mapping[str, str]:
    kinds = dict.fromkeys(task.kind for task in graph)
    return {kind: COLOURS[index % len(COLOURS)] for index, kind in enumerate(kinds)}


def dot(graph: Graph) -> str:
    """The graph for Graphviz: a node a task, with its kind, name and milliseconds."""
    colours = _colours(graph)
    lines = [
        f"digraph {_quoted(graph.name)} {{",
        "  node [shape=box, style=filled, fontcolor=white];",
    ]
    for index, task in enumerate(graph):
        label = f"{task.kind}\n{task.title}\n{1e3 * task.seconds:g} ms"
        lines.append(
            f"  t{index} [label={_quoted(label)}, fillcolor={_quoted(colours[task.kind])}];"
        )
    for index, task in enumerate(graph):
        lines += [f"  t{before} -> t{index};" for before in task.after]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def svg(graph: Graph) -> str:
    """The graph as a picture: a row a level, from the top down, and the longest chain bold."""
    colours = _colours(graph)
    rows = graph.levels
    widest = max(map(len, rows), default=0)
    place: dict[int, tuple[float, float]] = {}
    for level, row in enumerate(rows):
        left = MARGIN + RADIUS + ACROSS * (widest - len(row)) / 2
        for at, index in enumerate(row):
            place[index] = (left + ACROSS * at, MARGIN + RADIUS + DOWN * level)
    wide = 2 * (MARGIN + RADIUS) + ACROSS * max(0, widest - 1)
    high = 2 * (MARGIN + RADIUS) + DOWN * max(0, len(rows) - 1) + 16 * len(colours)
    chain = critical_path(graph)
    bold = set(itertools.pairwise(chain))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {high:g}"'
        f' width="{wide:g}" height="{high:g}" font-family="sans-serif" font-size="11">',
        f"<title>{html.escape(graph.name)}</title>",
    ]
    for index, task in enumerate(graph):
        (x, y) = place[index]
        for before in task.after:
            (u, v) = place[before]
            line = '"#111" stroke-width="2"' if (before, index) in bold else '"#bbb"'
            middle = (v + y) / 2
            parts.append(
                f'<path d="M{u:g} {v:g}C{u:g} {middle:g} {x:g} {middle:g} {x:g} {y:g}" fill="none"'
                f" stroke={line}/>"
            )
    for index, task in enumerate(graph):
        (x, y) = place[index]
        words = html.escape(f"{task.kind} {task.title}: {1e3 * task.seconds:g} ms")
        parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{RADIUS}" fill="{colours[task.kind]}">'
            f"<title>{words}</title></circle>"
        )
    for at, (kind, colour) in enumerate(colours.items()):
        y = high - MARGIN / 2 - 16 * (len(colours) - 1 - at)
        parts.append(f'<circle cx="{MARGIN}" cy="{y - 4:g}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{MARGIN + 10}" y="{y:g}">{html.escape(kind)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
