"""Where the elements of a managed array lie on the host: in memory, or in a file.

# Files

An array that is larger than the host's memory, or is seldom used, lies in a file of a directory
that its user names. The file is mapped, so that its pages are in memory while they are used, and
the system writes them to the file when memory is short and reads them again when they are
touched: eviction to disk is what its page cache has done for decades, with what it knows of all
processes. To everybody else such an array is one like all others.

The room is taken when the array is made. A file with holes would be cheaper, and a disk that is
full would then kill the process (SIGBUS) at some later write, in whatever body makes it.

The file has no name: whatever happens to the process, nothing is left of it.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Directory: TypeAlias = str | os.PathLike[str] | None


def _take_room(file: int, size: int) -> None:
    """Makes a file so long, with all of its room on the disk."""
    try:
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError) as error:
        # Not every file system can; all can be written to.
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        piece = bytes(min(size, 1 << 22))
        for start in range(0, size, len(piece)):
            os.pwrite(file, piece[: size - start], start)


def new_buffer(
    shape: tuple[int, ...], dtype: np.dtype[Any], directory: Directory
) -> np.ndarray[Any, Any]:
    """An array in C order whose elements are zeros in a file of the directory, or anything in
    memory if none is named.

    Raises:
        OSError: there is no such directory, or the disk has no room.
    """
    import numpy as np

    if directory is None:
        return np.empty(shape, dtype)
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"directory is a path, not {type(directory).__name__}")
    if any(extent < 0 for extent in shape):
        raise ValueError("negative dimensions are not allowed")
    size = math.prod(shape) * dtype.itemsize
    with tempfile.TemporaryFile(prefix="charioteer-", dir=directory) as file:
        if size == 0:
            return np.empty(shape, dtype)
        try:
            _take_room(file.fileno(), size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"no room for an array of {size} bytes: {os.strerror(error.errno or 0)}",
                os.fspath(directory),
            ) from error
        mapped = mmap.mmap(file.fileno(), size)
    return np.ndarray(shape, dtype, buffer=mapped)
