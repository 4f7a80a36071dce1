"""Plots as SVG, drawn here, so that reports need no library: lines over a logarithmic axis, or
bars.

A *panel* is a title and lines by name; a line has a value for each place on its axis. Panels of one
plot share their legend, and their colours go with the names. Where the places are words, bars stand
side by side in groups.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["IDEAL", "Panel", "plot"]

IDEAL = "ideal"
"""The name of a line that is dotted and black."""

PALETTE = (
    *("#0b6e4f", "#08415c", "#cc2936", "#e8985e", "#6b7fd7", "#9c7a97", "#73c2a5", "#8d8d8d"),
    *("#b08900", "#4a4a4a"),
)

Panel = tuple[str, Mapping[str, Mapping[Any, float]]]

WIDE, HIGH = 300, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 22, 36
LETTER = 6
"""About how wide one is."""
SLANT = 40
"""How much more room labels need that are slanted, since they would touch each other."""
LEGEND = 18
EACH = 190
"""The width of an entry of the legend."""


def plot(
    panels: Sequence[Panel],
    *,
    across: str,
    up: str,
    colours: Mapping[str, str] | None = None,
    most: float | None = None,
) -> str:
    """The plot of some panels, as the text of an SVG element.

    Args:
        panels: one at least.
        across: what the horizontal axis is, with its unit.
        up: what the vertical axis is; it begins at 0.
        colours: of lines that have one of their own.
        most: the end of the vertical axis; that of the values unless said.
    """
    names = list(dict.fromkeys(name for _, lines in panels for name in lines))
    chosen = dict(zip(names, _cycle(len(names)), strict=True))
    chosen |= {name: colour for name, colour in (colours or {}).items() if name in chosen}
    chosen |= {IDEAL: "#000000"}
    columns = min(3, len(panels))
    wide = 640 if columns == 1 else WIDE
    rows = -(-len(panels) // columns)
    total = wide * columns
    entries = max(1, total // EACH)
    legend = LEGEND * -(-len(names) // entries)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {HIGH * rows + legend + 8}"'
        f' width="{total}" font-family="system-ui, sans-serif" font-size="10">'
    ]
    for index, (title, lines) in enumerate(panels):
        x, y = wide * (index % columns), HIGH * (index // columns)
        parts.append(f'<g transform="translate({x} {y})">')
        parts += _panel(title, lines, chosen, wide, across, up, most)
        parts.append("</g>")
    for index, name in enumerate(names):
        x = 10 + EACH * (index % entries)
        y = HIGH * rows + LEGEND * (index // entries) + 12
        parts.append(f'<rect x="{x}" y="{y - 8}" width="12" height="8" fill="{chosen[name]}"/>')
        parts.append(f'<text x="{x + 17}" y="{y}">{html.escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])


def _cycle(count: int) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(count)]


def _panel(
    title: str,
    lines: Mapping[str, Mapping[Any, float]],
    colours: Mapping[str, str],
    wide: int,
    across: str,
    up: str,
    most: float | None,
) -> list[str]:
    places = list(dict.fromkeys(place for line in lines.values() for place in line))
    numbers = all(isinstance(place, int | float) and place > 0 for place in places)
    highest = max((v for line in lines.values() for v in line.values()), default=0.0)
    top = most or _round_up(highest)
    right, bottom = wide - RIGHT, HIGH - BOTTOM
    letters = max((len(str(place)) for place in places), default=0)
    slanted = not numbers and letters * LETTER > (right - LEFT) / len(places)
    if slanted:
        bottom -= SLANT

    def height(value: float) -> float:
        return bottom - (bottom - TOP) * min(max(value, 0.0), top) / top

    parts = [f'<text x="{LEFT}" y="14" font-weight="bold">{html.escape(title)}</text>']
    for step in range(5):
        value = top * step / 4
        y = height(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{value:.3g}</text>')
    middle = (LEFT + right) / 2
    parts.append(
        f'<text x="{middle:g}" y="{HIGH - 6}" text-anchor="middle">{html.escape(across)}</text>'
    )
    parts.append(
        f'<text transform="translate(10 {(TOP + bottom) / 2:g}) rotate(-90)"'
        f' text-anchor="middle">{html.escape(up)}</text>'
    )
    if not places:
        return parts
    if numbers:
        return parts + _over_numbers(lines, places, colours, right, bottom, height)
    return parts + _in_groups(lines, places, colours, right, bottom, height, slanted)


def _over_numbers(
    lines: Mapping[str, Mapping[Any, float]],
    places: Sequence[Any],
    colours: Mapping[str, str],
    right: float,
    bottom: float,
    height: Any,
) -> list[str]:
    low, high = math.log2(min(places)), math.log2(max(places))

    def at(place: float) -> float:
        part = 0.5 if high == low else (math.log2(place) - low) / (high - low)
        return LEFT + 6 + (right - LEFT - 12) * part

    parts = []
    shown = sorted(places)
    # Every one has a label where there is room.
    every = -(-len(shown) // 9)
    for place in shown[::every]:
        parts.append(
            f'<text x="{at(place):.1f}" y="{bottom + 13}" text-anchor="middle">'
            f"{_short(place)}</text>"
        )
    for name, line in lines.items():
        points = [(at(place), height(line[place])) for place in sorted(line)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dotted = ' stroke-dasharray="3 3"' if name == IDEAL else ""
        parts.append(
            f'<path d="M{path}" fill="none" stroke="{colours[name]}" stroke-width="1.6"{dotted}/>'
        )
        if name != IDEAL:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colours[name]}"/>'
                for x, y in points
            ]
    return parts


def _in_groups(
    lines: Mapping[str, Mapping[Any, float]],
    places: Sequence[Any],
    colours: Mapping[str, str],
    right: float,
    bottom: float,
    height: Any,
    slanted: bool,
) -> list[str]:
    group = (right - LEFT) / len(places)
    bar = 0.8 * group / max(1, len(lines))
    parts = []
    for index, place in enumerate(places):
        left = LEFT + group * (index + 0.1)
        at = f"translate({left + 0.4 * group:.1f} {bottom + 13})"
        turn, anchor = (" rotate(-35)", "end") if slanted else ("", "middle")
        parts.append(
            f'<text transform="{at}{turn}" text-anchor="{anchor}">{html.escape(str(place))}</text>'
        )
        for number, (name, line) in enumerate(lines.items()):
            if place in line:
                y = height(line[place])
                parts.append(
                    f'<rect x="{left + bar * number:.1f}" y="{y:.1f}" width="{bar:.1f}"'
                    f' height="{bottom - y:.1f}" fill="{colours[name]}"/>'
                )
    return parts


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _round_up(value: float) -> float:
    """A number that is easy to read, and no less."""
    if not (math.isfinite(value) and value > 0):
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * step for step in (1, 1.2, 1.6, 2, 3, 4, 5, 6, 8, 10) if unit * step >= value)
