"""The identity of a slide: of its bytes, never of its path, its time stamp or the way it is read."""

import hashlib
from pathlib import Path

import numpy as np
import tifffile

from wsiengine.slides.base import SlideInfo
from wsiengine.slides.companions import files_of
from wsiengine.slides.sources import is_url, open_source, open_tiff
from wsiengine.slides.structure import tile_tables

_EDGE_BYTES = 1 << 20


def fingerprint(path: str, info: SlideInfo) -> str:
    """sha256 (hex) over the file's length, level-0 size, its TIFF tile tables, and the first and last MiB.

    The tables hold place and length of every compressed tile, so that two files that differ anywhere almost surely
    differ here, at a cost that does not depend on the size of the slide. Of a slide in several files (MIRAX, VMS, a
    DICOM series) it is over the length and the edges of each, whichever of a series was named.
    """
    parts = [] if is_url(path) else files_of(Path(path))
    if len(parts) > 1:
        return _of_several(parts, info)
    digest = hashlib.sha256(b"wsiengine slide 1\n")
    with open_source(path) as source:
        digest.update(f"{source.length_bytes} {info.size_l0.height} {info.size_l0.width}\n".encode())
        head = source.read(0, min(_EDGE_BYTES, source.length_bytes))
        digest.update(head)
        digest.update(source.read(max(0, source.length_bytes - _EDGE_BYTES), min(_EDGE_BYTES, source.length_bytes)))
        if info.reader == "direct":  # a plain TIFF
            for table in tile_tables(source):
                digest.update(table.astype("<u8").data)
        elif head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            _add_tile_tables(digest, path)
    return digest.hexdigest()


def _of_several(parts: list[Path], info: SlideInfo) -> str:
    digests = []
    for part in parts:
        with open_source(str(part)) as source:
            digest = hashlib.sha256(f"{source.length_bytes}\n".encode())
            edge = min(_EDGE_BYTES, source.length_bytes)
            digest.update(source.read(0, edge))
            digest.update(source.read(source.length_bytes - edge, edge))
        digests.append(digest.digest())
    size = f"wsiengine slide of several files 1\n{info.size_l0.height} {info.size_l0.width}\n"
    return hashlib.sha256(size.encode() + b"".join(sorted(digests))).hexdigest()


def _add_tile_tables(digest: "hashlib._Hash", path: str) -> None:
    try:
        with open_tiff(path) as tiff:
            for page in tiff.pages:
                for table in (page.dataoffsets, page.databytecounts):
                    digest.update(np.asarray(table, "<u8").tobytes())
    except tifffile.TiffFileError as error:  # a variant that only OpenSlide understands: the edges must do
        digest.update(type(error).__name__.encode())
