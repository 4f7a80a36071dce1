"""One line of a graph file, read from left to right; every complaint says where.

:class:`Scanner` reads tokens, :func:`parse_json` a JSON value whose parts know their columns, which
the standard library's parser does not tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NoReturn, TypeVar

from charioteer.graphs.description import GraphError

__all__ = ["GraphFileError", "Scanner", "Value", "parse_json"]

T = TypeVar("T")


class GraphFileError(GraphError):
    """A graph file that cannot be read.

    Attributes:
        line, column: where, both counted from 1.
        reason: what is wrong there.
    """

    def __init__(self, reason: str, line: int, column: int, name: str = "") -> None:
        super().__init__(
            f"{name}:{line}:{column}: {reason}" if name else f"{line}:{column}: {reason}"
        )
        self.reason = reason
        self.line = line
        self.column = column


_INTEGER = re.compile(r"-?\d{1,18}(?![\d.eE])", re.ASCII)
_NUMBER = re.compile(r"-?\d{1,18}(\.\d{0,30})?([eE][-+]?\d{1,3})?(?![\d.])", re.ASCII)
_STRING = re.compile(r"'([^'\\]*)'|\"([^\"\\]*)\"")


class Scanner:
    """A line of a file and how far it is read."""

    def __init__(self, text: str, line: int) -> None:
        self.text = text
        self.line = line
        self.at = 0

    def fail(self, reason: str, at: int | None = None) -> NoReturn:
        """Complain about a place, where the scanner is unless said.

        Raises:
            GraphFileError: always.
        """
        raise GraphFileError(reason, self.line, (self.at if at is None else at) + 1)

    def checked(self, make: Callable[[], T], at: int) -> T:
        """What ``make`` gives; its complaint is one about that place."""
        try:
            return make()
        except GraphFileError:
            raise
        except GraphError as error:
            self.fail(str(error), at)

    def peek(self) -> str:
        """The next character that is no space; nothing at the end."""
        while self.at < len(self.text) and self.text[self.at] in " \t":
            self.at += 1
        return self.text[self.at : self.at + 1]

    def take(self, what: str) -> bool:
        """Read that character if it is the next."""
        if self.peek() != what:
            return False
        self.at += 1
        return True

    def expect(self, what: str) -> None:
        """Read that character.

        Raises:
            GraphFileError: it is not the next.
        """
        if not self.take(what):
            found = self.peek()
            self.fail(f"{what!r} expected, not {found!r}" if found else f"{what!r} expected")

    def end(self) -> None:
        """See that nothing is left.

        Raises:
            GraphFileError: something is.
        """
        if self.peek():
            self.fail(f"the end of the line expected, not {self.peek()!r}")

    def integer(self, what: str, least: int, most: int) -> int:
        """Read a whole number.

        Raises:
            GraphFileError: there is none, or it is out of its range.
        """
        self.peek()
        match = _INTEGER.match(self.text, self.at)
        if match is None:
            self.fail(f"{what} is a whole number")
        value = int(match.group())
        if not least <= value <= most:
            self.fail(f"{what} is from {least} to {most}, not {value}")
        self.at = match.end()
        return value

    def number(self, what: str) -> float:
        """Read a number.

        Raises:
            GraphFileError: there is none.
        """
        self.peek()
        match = _NUMBER.match(self.text, self.at)
        if match is None:
            self.fail(f"{what} is a number")
        self.at = match.end()
        return float(match.group())

    def string(self, what: str) -> str:
        """Read a string in quotes.

        Raises:
            GraphFileError: there is none.
        """
        self.peek()
        match = _STRING.match(self.text, self.at)
        if match is None:
            self.fail(f"{what} is a word in quotes")
        self.at = match.end()
        return match.group(1) or match.group(2) or ""


# ---- JSON ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Value:
    """A JSON value: its parts are values too. ``at`` is its place in the line, from 0."""

    value: Any
    at: int


_DEEPEST = 8
_CONSTANTS = {"true": True, "false": False, "null": None}


def parse_json(scanner: Scanner) -> Value:
    """The JSON value that a line is.

    Raises:
        GraphFileError: it is none, or something more than one.
    """
    value = _value(scanner, 0)
    scanner.end()
    return value


def _value(scanner: Scanner, depth: int) -> Value:
    following = scanner.peek()
    at = scanner.at
    if depth > _DEEPEST:
        scanner.fail("this is nested too deeply")
    if following == "{":
        return Value(_object(scanner, depth), at)
    if following == "[":
        return Value(_array(scanner, depth), at)
    if following == '"':
        return Value(_json_string(scanner), at)
    match = _NUMBER.match(scanner.text, at)
    if match is not None:
        scanner.at = match.end()
        text = match.group()
        return Value(float(text) if set(text) & set(".eE") else int(text), at)
    for word, constant in _CONSTANTS.items():
        if scanner.text.startswith(word, at):
            scanner.at += len(word)
            return Value(constant, at)
    return scanner.fail("a JSON value expected" + (f", not {following!r}" if following else ""))


def _object(scanner: Scanner, depth: int) -> dict[str, Value]:
    scanner.expect("{")
    members: dict[str, Value] = {}
    if scanner.take("}"):
        return members
    while True:
        scanner.peek()
        at = scanner.at
        key = _json_string(scanner)
        if key in members:
            scanner.fail(f"{key!r} is there twice", at)
        scanner.expect(":")
        members[key] = _value(scanner, depth + 1)
        if not scanner.take(","):
            scanner.expect("}")
            return members


def _array(scanner: Scanner, depth: int) -> list[Value]:
    scanner.expect("[")
    items: list[Value] = []
    if scanner.take("]"):
        return items
    while True:
        items.append(_value(scanner, depth + 1))
        if not scanner.take(","):
            scanner.expect("]")
            return items


def _json_string(scanner: Scanner) -> str:
    scanner.expect('"')
    try:
        text, scanner.at = scanstring(scanner.text, scanner.at)
    except json.JSONDecodeError as error:
        scanner.fail(f"a string that is none: {error.msg}", error.pos)
    return str(text)
