"""Whole numbers that stand in a TIFF, one for each tile: where it lies, how long it is.

They stay in the file, and are read where they are needed: a slide of 50 Gpx has 800,000 tiles, and their numbers would
be the one part of a run's memory that grows with it. Not mapped: of a file that is cut short or a share that goes away,
a mapping ends the process where a read is an error.
"""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from wsiengine.slides.sources import LocalSource, Source

KINDS = {3: "u2", 4: "u4", 16: "u8"}  # TIFF's whole numbers, as numpy names them
_PIECE = 1 << 16


class NumbersInFile:
    """``count`` numbers of a local file, from byte ``place`` on; slices are arrays, and each is a read."""

    def __init__(self, source: LocalSource, place: int, count: int, kind: np.dtype) -> None:
        self._source, self._place, self._count, self._kind = source, place, count, kind

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, some: slice) -> np.ndarray:
        start, stop, _ = some.indices(self._count)
        size = self._kind.itemsize
        return np.frombuffer(self._source.read(self._place + start * size, max(0, stop - start) * size), self._kind)


Numbers: TypeAlias = NumbersInFile | np.ndarray  # len() and slices of either


def numbers_at(source: Source, place: int, count: int, kind: str) -> Numbers:
    """``count`` numbers of a file, as ``kind`` (numpy's word) from byte ``place`` on; none where the file ends before.

    From a remote file they are fetched at once: a request takes too long for a few of them.
    """
    size = count * np.dtype(kind).itemsize
    if place + size > source.length_bytes:
        return np.empty(0, kind)
    if isinstance(source, LocalSource):
        return NumbersInFile(source, place, count, np.dtype(kind))
    return np.frombuffer(source.read(place, size), kind)


def pieces(*columns: Numbers) -> Iterator[Sequence[np.ndarray]]:
    """Arrays of some numbers of each column, the same ones, from the first to the last of the shortest."""
    for start in range(0, min(map(len, columns)), _PIECE):
        stop = min(start + _PIECE, min(map(len, columns)))
        yield [column[start:stop] for column in columns]
