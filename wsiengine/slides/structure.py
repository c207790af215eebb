"""A look at a TIFF's directories before a library takes them at their word.

Some damage ends more than the one slide: a chain of directories that comes back to itself is followed by tifffile for
ever; for tiles of absurd size, packed or not, OpenSlide asks GLib, which ends the process where memory is short.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from wsiengine.errors import UnreadableSlide
from wsiengine.slides.numbers import KINDS, Numbers, numbers_at, pieces
from wsiengine.slides.sources import Source, open_source

_LARGEST_TILE_PX = 1 << 26  # a quarter of a GiB when unpacked
_MOST_DIRECTORIES = 1 << 16
_WIDTH, _LENGTH = 256, 257
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_BYTES, _HAMAMATSU = 322, 323, 324, 325, 65420
OFFSETS, LENGTHS = (324, 273, 513), (325, 279, 514)  # of tiles, strips, one JPEG stream: the first that is there
_HINT = "the file is damaged: copy it again from its origin."


@dataclass(frozen=True, slots=True)
class _Layout:
    """Sizes of the parts of a directory: classic TIFF or BigTIFF."""

    count: struct.Struct  # entries of a directory
    entry: struct.Struct  # tag, type, number of values, value or its place
    link: struct.Struct  # offset of the next directory
    first: int  # where the offset of the first directory stands


@dataclass(frozen=True, slots=True)
class _Entry:
    """Of a directory: type, number of values, and the values or their place."""

    kind: int
    count: int
    value: bytes


def _layout(head: bytes) -> _Layout | None:
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16:
        return None
    version = struct.unpack(order + "H", head[2:4])[0]
    if version not in (42, 43):
        return None
    count, entry, link, first = ("H", "HHI4s", "I", 4) if version == 42 else ("Q", "HHQ8s", "Q", 8)
    return _Layout(struct.Struct(order + count), struct.Struct(order + entry), struct.Struct(order + link), first)


def check_directories(path: str) -> None:
    """Refuse a TIFF that would make a library hang or end the process; anything else is left to the readers.

    Raises:
        UnreadableSlide: Directories in a circle, tiles that no memory holds, or fewer tiles than the image takes.
    """
    with open_source(path) as source:
        layout = _layout(source.read(0, min(16, source.length_bytes)))
        if layout is None:
            return
        for tags in _directories(source, layout):
            width, length = (int(_values(source, layout, tags.get(t))[:1].sum()) for t in (_TILE_WIDTH, _TILE_LENGTH))
            if width * length > _LARGEST_TILE_PX:
                raise UnreadableSlide(f"{path} announces tiles of {width:,} × {length:,} px.", hint=_HINT)
            size = [int(_values(source, layout, tags.get(t))[:1].sum()) for t in (_WIDTH, _LENGTH)]
            if width and length and _TILE_OFFSETS in tags:
                _check_count(path, (size[0], size[1]), (width, length), tags[_TILE_OFFSETS].count)
            _check_reach(source, *(_values(source, layout, tags.get(tag)) for tag in (_TILE_OFFSETS, _TILE_BYTES)))


def tile_tables(source: Source) -> Iterator[np.ndarray]:
    """Of each directory of a plain TIFF: offsets of its tiles or strips, then their lengths, piece by piece.

    tifffile makes numbers of Python's of them, which take five times the memory: 60 MB for a slide of 50 Gpx.
    """
    layout = _layout(source.read(0, min(16, source.length_bytes)))
    if layout is None:
        return
    for tags in _directories(source, layout):
        for names in (OFFSETS, LENGTHS):
            numbers = _values(source, layout, next((tags[name] for name in names if name in tags), None))
            for (piece,) in pieces(numbers):
                yield piece


def _check_count(path: str, size: tuple[int, int], tile: tuple[int, int], tiles: int) -> None:
    """Whether there are tiles for the whole image (width, height): OpenSlide draws what is missing as nothing."""
    needed = -(-size[0] // tile[0]) * -(-size[1] // tile[1])
    if tiles < needed:
        raise UnreadableSlide(
            f"{path} is said to be {size[0]:,} × {size[1]:,} px, which takes {needed:,} tiles; it has {tiles:,}.",
            hint=_HINT,
        )


def _check_reach(source: Source, offsets: Numbers, lengths: Numbers) -> None:
    """Whether all tiles lie inside the file; those of no bytes are not in it, and may be said to lie anywhere."""
    needed = 0.0
    for some, long in pieces(offsets, lengths) if len(offsets) == len(lengths) else ():
        ends = some.astype(np.float64) + long  # exact to 2⁵³ bytes, and no overflow beyond
        needed = max(needed, ends[long > 0].max(initial=0))
    if needed > source.length_bytes:
        raise UnreadableSlide(
            f"{source.path} is truncated: its pixels reach to byte {int(needed):,}, the file ends at "
            f"{source.length_bytes:,}.",
            hint="copy the slide again from its origin.",
        )


def _directories(source: Source, layout: _Layout) -> Iterator[Mapping[int, _Entry]]:
    """Each directory as its entries by tag; ends without a word where the file does."""
    seen: set[int] = set()
    place = layout.first
    while (offset := _number(source, layout.link, place)) is not None and offset:
        if offset in seen or len(seen) == _MOST_DIRECTORIES:
            raise UnreadableSlide(f"{source.path} has directories that go round in a circle.", hint=_HINT)
        seen.add(offset)
        count = _number(source, layout.count, offset)
        start = offset + layout.count.size
        if count is None or start + count * layout.entry.size > source.length_bytes:
            return
        entries = layout.entry.iter_unpack(source.read(start, count * layout.entry.size))
        tags = {tag: _Entry(kind, number, value) for tag, kind, number, value in entries}
        yield tags
        if _HAMAMATSU in tags:
            return  # its links have 8 bytes in a classic file
        place = start + count * layout.entry.size


def _number(source: Source, form: struct.Struct, offset: int) -> int | None:
    """A number of the file; None beyond its end."""
    if offset + form.size > source.length_bytes:
        return None
    return int(form.unpack(source.read(offset, form.size))[0])


def _values(source: Source, layout: _Layout, entry: _Entry | None) -> Numbers:
    """The whole numbers of an entry; none where it is absent, of another type, or not within the file."""
    kind = KINDS.get(entry.kind) if entry is not None else None
    if entry is None or kind is None:
        return np.empty(0, np.int64)
    order, size = layout.link.format[0], entry.count * int(kind[1])
    if size <= len(entry.value):
        return np.frombuffer(entry.value[:size], order + kind)
    return numbers_at(source, int(layout.link.unpack(entry.value)[0]), entry.count, order + kind)
