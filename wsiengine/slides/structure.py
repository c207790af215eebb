"""A look at a TIFF's directories before a library takes them at their word.

Two kinds of damage end more than the one slide: a chain of directories that comes back to itself, which tifffile
follows for ever, and tiles of absurd size, for which OpenSlide asks GLib, which ends the process where memory is short.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from wsiengine.errors import UnreadableSlide
from wsiengine.slides.sources import Source, open_source

_LARGEST_TILE_PX = 1 << 26  # a quarter of a GiB when unpacked
_MOST_DIRECTORIES = 1 << 16
_TILE_WIDTH, _TILE_LENGTH, _HAMAMATSU = 322, 323, 65420
_HINT = "the file is damaged: copy it again from its origin."


@dataclass(frozen=True, slots=True)
class _Layout:
    """Sizes of the parts of a directory: classic TIFF or BigTIFF."""

    count: struct.Struct  # entries of a directory
    entry: struct.Struct  # tag, type, number of values, value or its place
    link: struct.Struct  # offset of the next directory
    first: int  # where the offset of the first directory stands


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
        UnreadableSlide: Directories in a circle, or tiles that no memory holds.
    """
    with open_source(path) as source:
        layout = _layout(source.read(0, min(16, source.length_bytes)))
        if layout is None:
            return
        for tags in _directories(source, layout):
            width, length = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
            if width * length > _LARGEST_TILE_PX:
                raise UnreadableSlide(f"{path} announces tiles of {width:,} × {length:,} px.", hint=_HINT)


def _directories(source: Source, layout: _Layout) -> Iterator[Mapping[int, int]]:
    """Each directory as its numbers by tag; ends without a word where the file does."""
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
        tags = {tag: _value(layout, kind, value) for tag, kind, _, value in entries}
        yield tags
        if _HAMAMATSU in tags:
            return  # its links have 8 bytes in a classic file
        place = start + count * layout.entry.size


def _number(source: Source, form: struct.Struct, offset: int) -> int | None:
    """A number of the file; None beyond its end."""
    if offset + form.size > source.length_bytes:
        return None
    return int(form.unpack(source.read(offset, form.size))[0])


def _value(layout: _Layout, kind: int, value: bytes) -> int:
    """The first value of an entry that holds whole numbers, else 0."""
    code = {3: "H", 4: "I", 16: "Q"}.get(kind)
    if code is None or struct.calcsize(code) > len(value):
        return 0
    return int(struct.unpack_from(layout.link.format[0] + code, value)[0])
