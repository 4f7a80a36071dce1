"""Checking traces from Python and from the command line."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import charioteer as ch
from charioteer import gpu


def record(path: Path) -> None:
    """A trace of three tasks on two devices, one after the other."""
    with ch.Runtime(ch.Machine.virtual(2, time="virtual"), trace=path):

        @ch.spawn(placement=gpu(0))
        def first() -> None:
            ch.current().stream.busy(1.0)

        @ch.spawn(placement=gpu * 2, dependencies=first)
        def both() -> None:
            for _ in ch.current().each():
                ch.current().stream.busy(1.0)

        @ch.spawn(dependencies=both)
        def host() -> None:
            pass


def device_records(data: bytes) -> list[tuple[int, int]]:
    """Where the records of devices lie in a trace, and their kinds, as the format says."""
    found = []
    at = 24
    while at < len(data):
        tag, count = struct.unpack_from("<II", data, at)
        at += 8
        if tag == 4:
            for _ in range(count):
                found.append((at, struct.unpack_from("<I", data, at + 20)[0]))
                at += 56
        else:
            at += {1: 32 * count, 2: 8 + count, 3: 0}[tag]
    return found


WAITS, RECORDED = 19, 18


def without(path: Path, kind: int) -> None:
    """Makes records of a kind in a trace such that prove nothing."""
    data = bytearray(path.read_bytes())
    places = [at for at, found in device_records(bytes(data)) if found == kind]
    assert places
    for at in places:
        struct.pack_into("<I", data, at + 20, RECORDED)
    path.write_bytes(bytes(data))


def command(*arguments: str) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "charioteer", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_trace_proves_that_promises_were_kept(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    record(path)
    checked = ch.check_trace(path)
    assert checked == ch.TraceCheck(tasks=3, grants=2, pairs=2, violations=())
    done = command("check", str(path))
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == "3 tasks, 2 grants of devices, 0 accesses of data, 2 pairs in order: no violations\n"
    )


def test_a_trace_without_its_waits_shows_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    record(path)
    without(path, WAITS)
    (violation,) = ch.check_trace(str(path)).violations
    names = ch.read_trace(path)[2]
    assert violation.rule == "order"
    assert names[violation.task].endswith("both")
    assert violation.other is not None and names[violation.other].endswith("first")
    assert "stream 0 of gpu(1)" in violation.text
    done = command("check", str(path))
    assert done.returncode == 1
    first, second = done.stdout.splitlines()
    assert first.endswith("1 violation")
    assert second == str(violation)


def test_many_violations_are_not_all_printed(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with ch.Runtime(ch.Machine.virtual(1, time="virtual"), trace=path):
        for _ in range(30):
            ch.spawn(placement=gpu)(lambda: ch.current().stream.busy(1.0))
    without(path, WAITS)
    count = len(ch.check_trace(path).violations)
    assert count == 29
    done = command("check", str(path))
    assert done.stdout.splitlines()[-1] == "... and 9 more; --all shows them"
    done = command("check", "--all", str(path))
    assert len(done.stdout.splitlines()) == 1 + count


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    record(path)
    data = bytearray(path.read_bytes())
    for wrong, words in [
        (b"something else", "not a Charioteer trace"),
        (bytes(data[:-8]), "cut off"),
        (bytes(data[:8] + b"\x63" + data[9:]), "version 99"),
        # The head and the end of an old one.
        (bytes(data[:8] + b"\x01" + data[9:24] + data[-8:]), "version 1"),
    ]:
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=words):
            ch.check_trace(path)
        done = command("check", str(path))
        assert done.returncode == 2
        assert words in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(OSError, match="missing"):
        ch.check_trace(tmp_path / "missing")
    done = command("check", str(tmp_path / "missing"))
    assert done.returncode == 2 and "cannot read" in done.stderr


def test_a_trace_proves_the_order_of_accesses(tmp_path: Path) -> None:
    @ch.task
    def write(a: ch.Out[Any], value: float) -> None:
        a[...] = value

    @ch.task
    def read(a: ch.In[Any], b: ch.InOut[Any]) -> None:
        b += a

    path = tmp_path / "data.trace"
    A = ch.zeros((2, 4), name="A")
    with ch.Runtime(workers=2, trace=path):
        for i in range(4):
            write(A[0], i)
            read(A[0, ::2], A[1, ::2])
            read(A[0, 1::2], A[1, 1::2])
        A.numpy()
    checked = ch.check_order(path)
    assert checked.accesses == 4 * 5 + 1
    assert checked.pairs > 10
    assert checked.violations == ()
    assert ch.check_trace(path).violations == ()
    done = command("check", str(path))
    assert done.returncode == 0 and "21 accesses of data" in done.stdout

    # Two that nobody ordered, and whose bodies meet, are no proof of anything else.
    meet = threading.Barrier(2)

    @ch.task
    def wait(a: ch.InOut[Any]) -> None:
        meet.wait(30)

    with ch.Runtime(workers=2, trace=path):
        wait(A)
        wait(ch.unordered(A))
    unmoved = ch.MoveCheck(copies=0, bytes=0, local=0, dropped=0, reads=0, best=0)
    assert ch.check_order(path) == ch.OrderCheck(1, 0, (), unmoved)
