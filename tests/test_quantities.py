"""Is a quantity what people mean, to the byte?"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from charioteer._quantities import (
    read_bandwidth,
    read_bytes,
    read_seconds,
    show_bandwidth,
    show_bytes,
    show_seconds,
)


@pytest.mark.parametrize(
    ("said", "size"),
    [
        (0, 0),
        (7, 7),
        (np.int64(9), 9),
        ("1B", 1),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        ("4GB", 4_000_000_000),
        (" 1.5GiB ", 3 * 2**29),
        ("0.1kB", 100),
        ("9007199254740993B", 9_007_199_254_740_993),
        ("1PiB", 2**50),
    ],
)
def test_sizes(said: Any, size: int) -> None:
    assert read_bytes(said, "x") == size


@pytest.mark.parametrize(
    "said", ["", "GiB", "1", "1.5B", "1 G", "1GB/s", "-1GiB", -1, 2**63, "1e9B"]
)
def test_no_sizes(said: Any) -> None:
    with pytest.raises(ValueError, match="the size"):
        read_bytes(said, "the size")


@pytest.mark.parametrize("said", [1.0, True, None, [1], np.float64(3)])
def test_what_is_not_even_a_size(said: Any) -> None:
    with pytest.raises(TypeError, match=f"the size is .*, not {type(said).__name__}"):
        read_bytes(said, "the size")


def test_bandwidths_and_times() -> None:
    assert read_bandwidth("25GB/s", "x") == 25e9
    assert read_bandwidth(float("inf"), "x") == float("inf")
    assert read_seconds("1.5us", "x") == 1.5e-6
    assert read_seconds(0, "x") == 0
    for said in ("25GB", "fast", "0GB/s", "-1GB/s", 0, float("nan")):
        with pytest.raises(ValueError, match="speed"):
            read_bandwidth(said, "speed")
    for said in ("1GB", "soon", "-1s", -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="pause"):
            read_seconds(said, "pause")
    with pytest.raises(TypeError):
        read_seconds([], "pause")


@given(st.integers(0, 2**63 - 1) | st.integers(0, 2**13).map(lambda i: i * 2**30))
def test_sizes_are_shown_as_they_are_read(size: int) -> None:
    assert read_bytes(show_bytes(size), "x") == size


@given(st.floats(min_value=0, exclude_min=True, allow_nan=False))
def test_rates_and_times_are_shown_exactly(value: float) -> None:
    assert read_bandwidth(show_bandwidth(value), "x") == value
    if value != float("inf"):
        assert read_seconds(show_seconds(value), "x") == value
    assert show_bandwidth(25e9) == "25GB/s"
    assert show_bandwidth(2_407_152e6) == "2407.152GB/s"
    assert show_seconds(8e-6) == "8us"
