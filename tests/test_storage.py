"""Arrays whose elements lie in a file."""

from __future__ import annotations

import errno
import gc
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import charioteer as ch

Array = np.ndarray[Any, np.dtype[Any]]


@ch.task
def add(a: ch.In[Array], b: ch.InOut[Array]) -> None:
    b += a


def files_of(directory: Path) -> list[str]:
    """The files of this process that lie, without a name, in a directory."""
    found = []
    for entry in Path("/proc/self/maps").read_text().splitlines():
        if str(directory) in entry:
            assert entry.endswith("(deleted)"), "a file has a name"
            found.append(entry)
    return found


def test_an_array_in_a_file_is_one_like_others(tmp_path: Path) -> None:
    with ch.Runtime(workers=2):
        zeros = ch.zeros((30, 50), directory=tmp_path)
        ones = ch.full((30, 50), 1.0, directory=str(tmp_path))
        counted = ch.array(np.arange(1500.0).reshape(30, 50)[:, ::-1], directory=tmp_path)
        empty = ch.empty(7, "M8[s]", directory=tmp_path)
        assert files_of(tmp_path), "nothing lies in the directory"
        add(ones, zeros)
        for row in range(30):
            add(counted[row], zeros[row])
        expected = 1 + np.arange(1500.0).reshape(30, 50)[:, ::-1]
        assert np.array_equal(zeros.numpy(), expected)
        empty.fill(np.datetime64(7, "s"))
        assert empty.numpy()[6] == np.datetime64(7, "s")
    assert not list(tmp_path.iterdir())


def test_the_file_is_gone_with_the_array(tmp_path: Path) -> None:
    A = ch.zeros(100_000, directory=tmp_path)
    assert files_of(tmp_path)
    del A
    gc.collect()
    assert not files_of(tmp_path)


def test_its_elements_are_in_the_file(tmp_path: Path) -> None:
    A = ch.zeros(1 << 20, np.uint8, directory=tmp_path)
    with A.host("rw") as x:
        x[:] = 7
    # What is written can be read again through the mapping after the pages were given back.
    with A.host("r") as x:
        base = x
        while base.base is not None and isinstance(base.base, np.ndarray):
            base = base.base
        base.base.flush()
        base.base.madvise(mmap.MADV_DONTNEED)
        assert (x == 7).all()


def test_arrays_without_elements(tmp_path: Path) -> None:
    assert ch.zeros((3, 0), directory=tmp_path).numpy().shape == (3, 0)
    assert ch.zeros((), directory=tmp_path).numpy() == 0.0


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ch.zeros(3, directory=tmp_path / "missing")
    with pytest.raises(TypeError, match="directory is a path, not int"):
        ch.zeros(3, directory=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        ch.zeros((-1,), directory=tmp_path)


FULL = """
import resource, signal, sys
import charioteer as ch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    ch.zeros(1 << 20, directory=sys.argv[1])
except OSError as error:
    print(error.errno, error)
"""


def test_a_disk_without_room_is_told_when_the_array_is_made(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    number, text = done.stdout.split(" ", 1)
    assert int(number) in (errno.EFBIG, errno.ENOSPC)
    assert "no room for an array of 8388608 bytes" in text and str(tmp_path) in text
