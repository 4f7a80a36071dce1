"""Quantities as people write them: one reader of each for the whole package.

A quantity is a number, or a number with a unit in a string: ``"512MiB"``, ``"4 GB"``, ``"25GB/s"``,
``"1.5us"``. Bytes are whole: what is no whole number of them is an error and never rounded.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from typing import Any

_MOST_BYTES = 2**63 - 1

_BYTES = {"b": 1}
for _power, _letter in enumerate("kmgtp", 1):
    _BYTES[f"{_letter}b"] = 1000**_power
    _BYTES[f"{_letter}ib"] = 1024**_power

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}

_PLAIN = re.compile(r"[\d.]+")
_QUANTITY = re.compile(r"\s*([+-]?)(\d+)(?:\.(\d+))?\s*([a-zA-Zµ]*)(/s)?\s*", re.ASCII)


def read_bytes(value: object, what: str) -> int:
    """A number of bytes.

    Args:
        value: an integer, or a string such as ``"512MiB"`` (1024 times) or ``"4GB"`` (1000 times).
        what: what it is the size of, for messages.

    Raises:
        TypeError: neither; a float too, which may have lost bytes already.
        ValueError: no size, negative, no whole number of bytes, or more than 2**63 - 1.
    """
    if isinstance(value, str):
        found = _QUANTITY.fullmatch(value)
        unit = _BYTES.get(found[4].lower()) if found is not None and not found[5] else None
        if found is None or unit is None:
            raise ValueError(
                f"{what} is a number of bytes such as '512MiB' or '4GB', not {value!r}"
            )
        sign, whole, part = found[1], found[2], found[3] or ""
        # In integers, so that nothing is rounded.
        scale: int = 10 ** len(part)
        size, rest = divmod(int(whole + part) * unit, scale)
        if rest:
            raise ValueError(f"{what} is a whole number of bytes, not {value!r}")
        size = -size if sign == "-" else size
    else:
        size = _integer(value, f"{what} is a number of bytes or a string such as '512MiB'")
    if size < 0:
        raise ValueError(f"{what} is not negative, but {value!r} is")
    if size > _MOST_BYTES:
        raise ValueError(f"{what} is at most {_MOST_BYTES} bytes, not {value!r}")
    return size


def read_bandwidth(value: object, what: str) -> float:
    """Bytes a second.

    Args:
        value: a number, which may be infinite, or a string such as ``"25GB/s"``.
        what: whose it is, for messages.

    Raises:
        TypeError: neither.
        ValueError: no bandwidth, or not above zero.
    """
    if isinstance(value, str):
        found = _QUANTITY.fullmatch(value)
        unit = _BYTES.get(found[4].lower()) if found is not None and found[5] else None
        if found is None or unit is None:
            raise ValueError(f"{what} is a bandwidth such as '25GB/s', not {value!r}")
        rate = float(f"{found[1]}{found[2]}.{found[3] or 0}") * unit
    else:
        rate = _number(value, f"{what} is a number of bytes a second or a string such as '25GB/s'")
    if not rate > 0:
        raise ValueError(f"{what} is above zero, not {value!r}")
    return rate


def read_seconds(value: object, what: str) -> float:
    """Seconds.

    Args:
        value: a number, or a string such as ``"10us"``.
        what: what lasts so long, for messages.

    Raises:
        TypeError: neither.
        ValueError: no time, or negative.
    """
    if isinstance(value, str):
        found = _QUANTITY.fullmatch(value)
        unit = _SECONDS.get(found[4]) if found is not None and not found[5] else None
        if found is None or unit is None:
            raise ValueError(f"{what} is a time such as '10us', not {value!r}")
        seconds = float(f"{found[1]}{found[2]}.{found[3] or 0}") * unit
    else:
        seconds = _number(value, f"{what} is a number of seconds or a string such as '10us'")
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{what} is not negative, and finite, but {value!r} is not")
    return seconds


def read_count(value: object, what: str, least: int = 0, *, most: int) -> int:
    """A number of things.

    Args:
        value: an integer.
        what: which things, for messages.
        least: how many there are at least.
        most: how many there are at most.

    Raises:
        TypeError: no integer.
        ValueError: out of range.
    """
    count = _integer(value, f"{what} is a whole number")
    if not least <= count <= most:
        raise ValueError(f"{what} is between {least} and {most}, not {count}")
    return count


def show_bytes(size: int) -> str:
    """The size as :func:`read_bytes` reads it, in the largest unit that gives a whole number."""
    for unit, letter in ((2**50, "P"), (2**40, "T"), (2**30, "G"), (2**20, "M"), (2**10, "K")):
        if size and size % unit == 0:
            return f"{size // unit}{letter}iB"
    return f"{size}B"


def show_bandwidth(rate: float) -> str | float:
    """The bandwidth as :func:`read_bandwidth` reads it, exactly."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        for said in _digits(rate / unit) if rate >= unit else ():
            if read_bandwidth(f"{said}{letter}B/s", "") == rate:
                return f"{said}{letter}B/s"
    return rate


def show_seconds(seconds: float) -> str | float:
    """The time as :func:`read_seconds` reads it, exactly."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")):
        for said in _digits(seconds / unit) if seconds >= unit else ():
            if read_seconds(f"{said}{name}", "") == seconds:
                return f"{said}{name}"
    return seconds


def _digits(number: float) -> Iterator[str]:
    """The number without an exponent, at 6 digits and at as many as it may take."""
    said = (f"{number:.{digits}g}" for digits in (6, 9, 12, 15))
    return (one for one in said if _PLAIN.fullmatch(one))


def _integer(value: Any, wanted: str) -> int:
    if not isinstance(value, bool):
        try:
            number: int = operator.index(value)
            return number
        except TypeError:
            pass
    raise TypeError(f"{wanted}, not {type(value).__name__}")


def _number(value: object, wanted: str) -> float:
    if isinstance(value, float):
        return value
    return float(_integer(value, wanted))
