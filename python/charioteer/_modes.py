"""What bodies do with data: the modes of parameters, and how they are read from annotations.

Annotations are read once a function (``access.rs`` keeps what is found beside the rest that is
known of its code), so that a call pays for a look-up.
"""

from __future__ import annotations

import builtins
import sys
import typing
from enum import Enum
from types import FunctionType
from typing import Annotated, Any, TypeAlias, TypeVar

from charioteer.errors import AccessError

__all__ = [
    "Commute",
    "In",
    "InOut",
    "Max",
    "Min",
    "Mode",
    "Out",
    "Prod",
    "Sum",
    "mode_of",
    "read_modes",
]


class Mode(Enum):
    """What a body does with data."""

    IN = "In"
    OUT = "Out"
    INOUT = "InOut"
    COMMUTE = "Commute"
    SUM = "Sum"
    PROD = "Prod"
    MIN = "Min"
    MAX = "Max"


T = TypeVar("T")

In: TypeAlias = Annotated[T, Mode.IN]
"""Data that the body reads."""
Out: TypeAlias = Annotated[T, Mode.OUT]
"""Data that the body writes, all of it, without a look at what was there."""
InOut: TypeAlias = Annotated[T, Mode.INOUT]
"""Data that the body reads and writes."""
Commute: TypeAlias = Annotated[T, Mode.COMMUTE]
"""Data that the body reads and writes, one task at a time, in whatever order."""
Sum: TypeAlias = Annotated[T, Mode.SUM]
"""Data that the body adds to: it gets a partial that starts at zero, and partials are added."""
Prod: TypeAlias = Annotated[T, Mode.PROD]
"""Data that the body multiplies: its partial starts at one."""
Min: TypeAlias = Annotated[T, Mode.MIN]
"""Data of which the body keeps the smallest: its partial starts at the largest there is."""
Max: TypeAlias = Annotated[T, Mode.MAX]
"""Data of which the body keeps the largest: its partial starts at the smallest there is."""


def mode_of(annotation: object) -> tuple[Mode | None, Any]:
    """The mode that an annotation says, and what it says of the data beside.

    Raises:
        AccessError: it says two modes.
    """
    if typing.get_origin(annotation) is not Annotated:
        return None, None
    modes = [data for data in annotation.__metadata__ if isinstance(data, Mode)]  # type: ignore[attr-defined]
    if not modes:
        return None, None
    if len(modes) > 1:
        said = " and ".join(mode.value for mode in modes)
        raise AccessError(f"a parameter has one mode, not {said}: the body may read what is InOut")
    return modes[0], typing.get_args(annotation)[0]


Modes: TypeAlias = tuple[list[tuple[str, str]], str, list[tuple[str, str]], list[object]]
"""Names and modes of the positional parameters, the mode of ``*parts``, those of parameters by
keyword alone, and the annotations that all this was read from. A mode is a word; none is an empty
one."""


def read_modes(function: FunctionType) -> Modes | None:
    """The modes of a function's parameters; ``None`` if no parameter has one.

    Raises:
        AccessError: an annotation that seems to say a mode and cannot be read, or that says one of
            ``**keywords``.
    """
    annotations = _annotations(function)
    code = function.__code__
    modes = {
        name: mode.value
        for name, annotation in annotations.items()
        if name != "return" and (mode := _mode(function, name, annotation)) is not None
    }
    if not modes:
        return None
    count = code.co_argcount
    names = code.co_varnames
    alone = names[count : count + code.co_kwonlyargcount]
    rest = count + code.co_kwonlyargcount
    parts = ""
    if code.co_flags & _VARARGS:
        parts = modes.get(names[rest], "")
        rest += 1
    if code.co_flags & _VARKEYWORDS and names[rest] in modes:
        raise AccessError(
            f"{function.__qualname__}: **{names[rest]} takes no mode: name the parameters, or take"
            " any number of regions as *parts"
        )
    positional = [(name, modes.get(name, "")) for name in names[:count]]
    by_keyword = [(name, modes.get(name, "")) for name in alone]
    return positional, parts, by_keyword, [*annotations.values()]


_VARARGS = 0x04
_VARKEYWORDS = 0x08

_WORDS = tuple(mode.value for mode in Mode)


def _annotations(function: FunctionType) -> dict[str, Any]:
    if sys.version_info >= (3, 14):
        import annotationlib

        found: dict[str, Any] = annotationlib.get_annotations(
            function, format=annotationlib.Format.FORWARDREF
        )
        return found
    return function.__annotations__


def _mode(function: FunctionType, name: str, annotation: object) -> Mode | None:
    text = (
        annotation if isinstance(annotation, str) else getattr(annotation, "__forward_arg__", None)
    )
    if text is not None:
        annotation = _evaluate(function, name, text)
    try:
        return mode_of(annotation)[0]
    except AccessError as error:
        raise AccessError(f"{function.__qualname__}: parameter {name}: {error}") from None


def _evaluate(function: FunctionType, name: str, text: str) -> object:
    """What a string says; of one whose type cannot be known here, as far as the mode goes."""
    import ast

    scope = {**vars(builtins), **function.__globals__, **_enclosing(function)}
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return None
    shorter: list[ast.expr] = [tree]
    if isinstance(tree, ast.Subscript):
        # What stands within the brackets may be there for checkers alone; the mode stands before.
        shorter.append(tree.value)
    for expression in shorter:
        try:
            return eval(compile(ast.Expression(expression), "<annotation>", "eval"), scope)
        except Exception:
            continue
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if words.intersection(_WORDS):
        raise AccessError(
            f"{function.__qualname__}: parameter {name}: the annotation {text!r} cannot be read"
            " where the function is defined: import what it names at module level"
        )
    return None


def _enclosing(function: FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found
