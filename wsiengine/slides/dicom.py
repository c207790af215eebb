"""Which DICOM files are one slide: those of a series. Only the head of a file is read, and no library.

A series of another modality (mammograms, say) is several pictures.
"""

import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_HEAD_BYTES = 1 << 20  # the series is named far before the pixels
_SERIES, _SYNTAX, _IMPLICIT = (0x0020, 0x000E), (0x0002, 0x0010), b"1.2.840.10008.1.2"
_MODALITY, _SLIDE = (0x0008, 0x0060), "SM"
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_ITEM, _ITEM_END, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_UNDEFINED = 0xFFFFFFFF


def series_uid(path: Path) -> str | None:
    """The SeriesInstanceUID of a slide's DICOM file; None of any other, and of one whose head is damaged."""
    with suppress(OSError, struct.error, IndexError, UnicodeDecodeError), path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        if head[128:132] == b"DICM":
            return _find_series(head)
    return None


def one_of_each_series(paths: Iterable[Path]) -> list[Path]:
    """The paths, but of DICOM files of one series only the largest, which holds the full resolution; order is kept."""
    kept: dict[str, Path] = {}
    for path in paths:
        key = (path.suffix.lower() == ".dcm" and series_uid(path)) or str(path)
        known = kept.get(key)
        if known is None or path.stat().st_size > known.stat().st_size:
            kept[key] = path
    return list(kept.values())


def files_of_series(path: Path) -> list[Path]:
    """All files of a DICOM file's series in its folder, itself among them; none where it is no DICOM."""
    uid = series_uid(path)
    if uid is None:
        return []
    return sorted(p for p in path.parent.iterdir() if p == path or (p.is_file() and series_uid(p) == uid))


def _find_series(data: bytes) -> str | None:
    at, explicit = 132, True
    while True:
        tag = struct.unpack_from("<HH", data, at)
        if tag > _SERIES:
            return None
        length, start = _head(data, at, explicit or tag[0] == 2)
        if tag == _SERIES:
            return data[start : start + length].rstrip(b"\0 ").decode("ascii")
        if length == _UNDEFINED:
            at = _after_sequence(data, start, explicit)
            continue
        if tag == _MODALITY and data[start : start + length].rstrip(b"\0 ").decode("ascii") not in (_SLIDE, ""):
            return None
        if tag == _SYNTAX:
            explicit = data[start : start + length].rstrip(b"\0 ") != _IMPLICIT
        at = start + length


def _head(data: bytes, at: int, explicit: bool) -> tuple[int, int]:
    """Length and place of the value of the element at ``at``."""
    if not explicit:
        return struct.unpack_from("<I", data, at + 4)[0], at + 8
    kind = data[at + 4 : at + 6]
    if kind in _LONG:
        return struct.unpack_from("<I", data, at + 8)[0], at + 12
    return struct.unpack_from("<H", data, at + 6)[0], at + 8


def _after_sequence(data: bytes, at: int, explicit: bool) -> int:
    """Where a sequence of undefined length ends; ``at`` is its first item. Sequences within it are stepped over."""
    open_items = 0
    while True:
        tag = struct.unpack_from("<HH", data, at)
        if tag[0] == 0xFFFE:
            length = struct.unpack_from("<I", data, at + 4)[0]
            at += 8
            if tag == _ITEM and length != _UNDEFINED:
                at += length
            elif tag == _ITEM:
                open_items += 1
            elif tag == _ITEM_END:
                open_items -= 1
            elif tag == _SEQUENCE_END and not open_items:
                return at
            continue
        length, start = _head(data, at, explicit)
        at = _after_sequence(data, start, explicit) if length == _UNDEFINED else start + length
