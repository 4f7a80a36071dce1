"""Pages of headings, words, tables and plots, as one HTML file or as Markdown.

``.html`` is one file with its plots inside; ``.md`` has them in files beside it.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["DATA", "SUFFIXES", "Block", "Grid", "Heading", "Plot", "Words", "as_html", "write"]

SUFFIXES = (".html", ".md")
DATA = "records"
"""The id of the element with the page's data."""


class Heading(NamedTuple):
    """A heading; level 1 is the title."""

    text: str
    level: int = 2


class Words(NamedTuple):
    """A paragraph."""

    text: str


class Grid(NamedTuple):
    """A table; the first column is text, the others are numbers."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


class Plot(NamedTuple):
    """An SVG image with what it shows."""

    svg: str
    caption: str


Block = Heading | Words | Grid | Plot

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0 }
th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
figure { margin: 1.5em 0 } svg { max-width: 100%; height: auto }
figcaption { font-size: 13px; color: #555 }
"""


def write(
    path: str | os.PathLike[str], title: str, blocks: Sequence[Block], data: object = None
) -> None:
    """Write a page to a file that ends in one of :data:`SUFFIXES`; only HTML keeps the data."""
    target = Path(path)
    page = target.suffix == ".html"
    text = as_html(title, blocks, data) if page else as_markdown(blocks, target)
    target.write_text(text, encoding="utf-8")


def as_html(title: str, blocks: Sequence[Block], data: object = None) -> str:
    """One page with everything inside; ``data`` is kept in it as JSON."""
    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style></head><body>",
    ]
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"<h{level}>{html.escape(text)}</h{level}>")
            case Words(text):
                parts.append(f"<p>{html.escape(text)}</p>")
            case Grid(heads, rows):
                lines = [_html_row("th", heads), *(_html_row("td", row) for row in rows)]
                parts.append("<table>\n" + "\n".join(lines) + "\n</table>")
            case Plot(svg, caption):
                # Ids must differ between the images of one page.
                tag = f"p{len(parts)}-"
                svg = svg.replace('id="', f'id="{tag}').replace("url(#", f"url(#{tag}")
                svg = svg.replace('href="#', f'href="#{tag}')
                words = f"<figcaption>{html.escape(caption)}</figcaption>"
                parts.append(f"<figure>{svg}{words}</figure>")
    if data is not None:
        # No "</script>" in it: "<" stands in strings alone, where JSON has another way to say it.
        text = json.dumps(data).replace("<", "\\u003c")
        parts.append(f'<script type="application/json" id="{DATA}">{text}</script>')
    return "\n".join([*parts, "</body></html>\n"])


def _html_row(tag: str, values: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"


def as_markdown(blocks: Sequence[Block], target: Path) -> str:
    """The text of a Markdown file; images are written beside it, as their own files."""
    parts = []
    plots = 0
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Words(text):
                parts.append(text)
            case Grid(heads, rows):
                rule = ["---", *("---:" for _ in heads[1:])]
                cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, rule, *rows)]
                lines = [f"| {' | '.join(row)} |" for row in cells]
                parts.append("\n".join(lines))
            case Plot(svg, caption):
                plots += 1
                beside = target.with_name(f"{target.stem}-{plots}.svg")
                beside.write_text(svg, encoding="utf-8")
                parts.append(f"![{caption}]({beside.name})")
    return "\n\n".join(parts) + "\n"
