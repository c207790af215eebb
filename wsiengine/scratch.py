"""Arrays that grow with a slide's area: small ones in memory, large ones in files without a name.

A run then takes the same memory for every slide. The files lie in the run's ``.work`` folder, have no name from the
first moment on, and so are gone with the process, however that ends. Their pages are the system's to write out and to
drop; they are no anonymous memory, and a plan counts them apart.

The space of a file is reserved before anything is written: a disk that is full is an error in words, not a signal in
the middle of a loop.
"""

import errno
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsiengine.errors import OutputError
from wsiengine.journal import in_words

LARGE_BYTES = 4 << 20  # arrays from this size on: a mapping costs 0.1 ms, and some ten arrays live at a time
_NO_MAPPING = (errno.ENODEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
STRIP = 1 << 20  # values worked on at once: 8 MB where they become float64
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scratch:
    """Makes arrays. Holds none of them: an array that nobody refers to any more gives its space back.

    Attributes:
        folder: Where files may be made; None: everything stays in memory.
        large_bytes: Arrays of this size and more go into files.
    """

    folder: Path | None = None
    large_bytes: int = LARGE_BYTES

    def zeros(self, shape: Shape, dtype: Any) -> np.ndarray:
        """A contiguous array of zeros.

        Raises:
            OutputError: The disk has no room for it.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self.folder is None or not size or size < self.large_bytes:
            return np.zeros(shape, dtype)
        return np.frombuffer(_mapping(self.folder, size), dtype).reshape(shape)

    def full(self, shape: Shape, value: float, dtype: Any) -> np.ndarray:
        """An array of one value; raises as :meth:`zeros`."""
        out = self.zeros(shape, dtype)
        out.fill(value)
        return out

    def by_strips(self, shape: Shape, dtype: Any, rows: Callable[[slice], np.ndarray]) -> np.ndarray:
        """An array put together from its ``rows``, a few at a time: no temporary is as large as the whole.

        Raises as :meth:`zeros`.
        """
        out = self.zeros(shape, dtype)
        for strip in strips(shape):
            out[strip] = rows(strip)
        return out

    def split(self, sizes: Iterable[int]) -> tuple[int, int]:
        """Of arrays of so many bytes: bytes in memory, bytes in files."""
        sizes = tuple(sizes)
        on_disk = sum(size for size in sizes if self.folder is not None and size >= self.large_bytes)
        return sum(sizes) - on_disk, on_disk

    def require(self, size: int) -> None:
        """Refuse what has no room, before any of it is made.

        Raises:
            OutputError: Less than ``size`` bytes are free.
        """
        if self.folder is None or not size:
            return
        with in_words(self.folder):
            free = shutil.disk_usage(self.folder).free
        if free < size:
            raise OutputError(
                f"Cannot write {self.folder}: {size / 2**20:,.0f} MiB are needed for a while beside the results, "
                f"{free / 2**20:,.0f} MiB are free. Finished blocks are kept.",
                hint="free some space or give another folder with -o, then run the same command again to resume.",
            )


IN_MEMORY = Scratch()


def strips(shape: Shape, values: int | None = None) -> Iterator[slice]:
    """Slices of an even number of rows of an array, at least 16, that hold about so many values each."""
    rows = max(16, (values or STRIP) // max(1, math.prod(shape[1:])) // 2 * 2)
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def _mapping(folder: Path, size: int) -> mmap.mmap:
    """``size`` bytes of zeros in a file of ``folder``; where that cannot map, in the system's folder for such files."""
    with in_words(folder):
        try:
            return _map(folder, size)
        except OSError as error:
            if error.errno not in _NO_MAPPING:  # some network shares
                raise
    elsewhere = Path(tempfile.gettempdir())
    with in_words(elsewhere):
        return _map(elsewhere, size)


def _map(folder: Path, size: int) -> mmap.mmap:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        _reserve(file.fileno(), size)
        return mmap.mmap(file.fileno(), size)  # keeps the file open for itself


def _reserve(descriptor: int, size: int) -> None:
    """Make a file so long, of zeros, with every byte of it on the disk's account."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(STRIP)  # macOS: written out
    left = size
    while left:
        left -= os.write(descriptor, zeros[:left])
