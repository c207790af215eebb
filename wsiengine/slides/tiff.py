"""The structure of a tiled TIFF, parsed once: where every tile lies and how it is packed. No pixels are read here."""

import math
import re
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import tifffile

from wsiengine.errors import UnreadableSlide
from wsiengine.geometry import Mpp, Size
from wsiengine.slides.base import SlideInfo, levels_of
from wsiengine.slides.numbers import KINDS, Numbers, numbers_at, pieces
from wsiengine.slides.sources import Source, open_tiff
from wsiengine.slides.structure import LENGTHS, OFFSETS

_Page: TypeAlias = Any  # tifffile.TiffPage: its annotations also allow frames, which whole pages never are

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}  # TIFF ResolutionUnit: inch, centimetre
_UM_PER_NAME = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_CODECS = {
    1: "none",
    5: "lzw",
    7: "jpeg",
    8: "deflate",
    32946: "deflate",
    33003: "jpeg2000 ycbcr",
    33005: "jpeg2000",
    34712: "jpeg2000",
    50000: "zstd",
}
_CODEC_WORDS = {"jpeg": "JPEG", "jpeg2000": "JPEG 2000", "jpeg2000 ycbcr": "JPEG 2000", "none": "uncompressed"}


@dataclass(frozen=True, slots=True, eq=False)
class TileTable:
    """One level: the bytes of every tile and how to unpack them."""

    size: Size
    tile: Size
    offsets: Numbers  # of each tile, row-major
    lengths: Numbers  # of each tile, row-major; 0: it is not in the file
    codec: str
    ycbcr: bool  # the packed colours are YCbCr, else RGB
    differences: bool  # TIFF predictor 2
    jpeg_tables: bytes | None

    @property
    def dear(self) -> bool:
        """Whether decoding a tile costs far more than keeping it. The decoder then gives a new array each time."""
        return self.codec.startswith("jpeg2000")

    def places(self, row: int, cols: range) -> list[tuple[int, int]]:
        """(offset, length) of the tiles of one row."""
        start = row * -(-self.size.width // self.tile.width)
        some = slice(start + cols.start, start + cols.stop)
        return list(zip(self.offsets[some].tolist(), self.lengths[some].tolist(), strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class TiledTiff:
    """A file whose levels are all plain grids of tiles of 8-bit RGB."""

    info: SlideInfo
    levels: tuple[TileTable, ...]


def parse_tiled(source: Source) -> TiledTiff | None:
    """The file's structure, or None where it is not simply tiled 8-bit RGB that we unpack ourselves.

    It goes on reading from ``source``, which stays open as long as it is used.

    Raises:
        UnreadableSlide: The file is shorter than its own tables say.
    """
    try:
        with open_tiff(source.path) as tiff:
            if _foreign(tiff):
                return None
            _check_length(source, _following_page(tiff), "its table of contents goes on at")
            _check_length(source, max(map(_end, _pages(tiff))), "its pixels reach to")
            pages = _level_pages(tiff)
            if not pages or not all(_plain(page) for page in pages) or not _shrinking(pages):
                return None
            tables = tuple(_table(page, source) for page in pages)
            if any(not _complete(table) for table in tables):
                return None
            info = _info(tiff, tables)
    except (tifffile.TiffFileError, IndexError, KeyError, ValueError, TypeError):
        return None  # tifffile meets what it does not understand with any of these; others may understand
    return TiledTiff(info, tables)


def _foreign(tiff: tifffile.TiffFile) -> bool:
    """Whether the layout has rules of its own (overlaps, paddings, several scans), which OpenSlide knows."""
    return bool(tiff.is_ndpi or tiff.is_scn or tiff.is_bif or tiff.is_philips or tiff.is_sis)


def _following_page(tiff: tifffile.TiffFile) -> int:
    """Where the last page that was found says the next one is: 0, but in a file cut short beyond the end."""
    layout, file, last = tiff.tiff, tiff.filehandle, _pages(tiff)[-1]
    file.seek(last.offset)
    (tags,) = struct.unpack(layout.tagnoformat, file.read(layout.tagnosize))
    file.seek(last.offset + layout.tagnosize + tags * layout.tagsize)
    return int(struct.unpack(layout.offsetformat, file.read(layout.offsetsize))[0])


def first_page_is_the_slide(path: str) -> bool:
    """Whether OpenSlide, to which any tiled TIFF is a slide, may have it.

    It takes the first page, which in OME-TIFF and QPTIFF can be one channel of many, and cuts 16 bits down to 8.
    """
    try:
        with open_tiff(path) as tiff:
            return not (tiff.is_ome or tiff.is_qpi or tiff.is_imagej) and tiff.pages.first.bitspersample == 8
    except tifffile.TiffFileError:
        return False  # nobody knows what the page is


def lacks_pixels(page: _Page) -> bool:
    """Whether parts of a page are not in the file: tifffile would make them black, without a word."""
    return 0 in page.dataoffsets or 0 in page.databytecounts or len(page.dataoffsets) < math.prod(page.chunked)


def _level_pages(tiff: tifffile.TiffFile) -> list[_Page]:
    """The pages of the pyramid, full resolution first."""
    if tiff.is_svs:
        return [page for page in _pages(tiff) if page.is_tiled]
    if tiff.is_ome or tiff.is_qpi:
        series = tiff.series[0]
        if any(len(level.pages) != 1 for level in series.levels):
            return []  # channels, planes or times apart
        return [level.pages[0] for level in series.levels]
    pages = _pages(tiff)
    inner: list[_Page] = list(pages[0].pages) if pages[0].subifds else []
    return [pages[0], *inner, *(page for page in pages[1:] if page.is_tiled and page.is_reduced)]


def _pages(tiff: tifffile.TiffFile) -> list[_Page]:
    return list(tiff.pages)


def _plain(page: _Page) -> bool:
    return bool(
        page.is_tiled
        and page.dtype == np.uint8
        and page.bitspersample == 8
        and page.samplesperpixel == 3
        and page.planarconfig == 1
        and page.imagedepth == 1
        and page.photometric in (2, 6)
        and page.compression in _CODECS
        and page.predictor in (1, 2)
        and (page.photometric == 2 or page.compression in (7, 33003, 33005, 34712))
    )


def _shrinking(pages: Sequence[_Page]) -> bool:
    widths = [page.imagewidth for page in pages]
    return all(b < a for a, b in pairwise(widths))


def _table(page: _Page, source: Source) -> TileTable:
    size, tile = Size(page.imagelength, page.imagewidth), Size(page.tilelength, page.tilewidth)
    codec = _CODECS[int(page.compression)]
    return TileTable(
        size=size,
        tile=tile,
        offsets=_numbers(page, OFFSETS, source),
        lengths=_numbers(page, LENGTHS, source),
        codec=codec,
        ycbcr=page.photometric == 6 if codec == "jpeg" else codec == "jpeg2000 ycbcr",
        differences=page.predictor == 2,
        jpeg_tables=page.jpegtables,
    )


def _numbers(page: _Page, names: Sequence[int], source: Source) -> Numbers:
    """The values of the first of these tags that the page has."""
    tag = next((page.tags[name] for name in names if name in page.tags), None)
    if tag is None or tag.dtype not in KINDS:
        raise ValueError("no whole numbers say where the tiles are")
    return numbers_at(source, tag.valueoffset, tag.count, page.parent.byteorder + KINDS[tag.dtype])


def _complete(table: TileTable) -> bool:
    """Whether every tile is in the file; what stands for a missing one differs by vendor, so others decide."""
    tiles = math.prod(-(-n // side) for n, side in zip(table.size.shape, table.tile.shape, strict=True))
    if len(table.offsets) != tiles or len(table.lengths) != tiles:
        return False
    return all(offsets.all() and lengths.all() for offsets, lengths in pieces(table.offsets, table.lengths))


def _end(page: _Page) -> int:
    """Where the last packed pixels of a page end."""
    return int((np.asarray(page.dataoffsets, np.int64) + np.asarray(page.databytecounts, np.int64)).max(initial=0))


def _check_length(source: Source, needed: int, what: str) -> None:
    if needed > source.length_bytes:
        raise UnreadableSlide(
            f"{source.path} is truncated: {what} byte {needed:,}, the file ends at {source.length_bytes:,}.",
            hint="copy the slide again from its origin.",
        )


def _info(tiff: tifffile.TiffFile, tables: Sequence[TileTable]) -> SlideInfo:
    sizes = [table.size for table in tables]
    codec = _CODEC_WORDS.get(tables[0].codec, tables[0].codec)
    kind, objective = "tiled TIFF", None
    first = _pages(tiff)[0]
    mpp = page_resolution(first)
    associated: tuple[str, ...] = ()
    if tiff.is_svs:
        kind, (mpp, objective) = "Aperio SVS", aperio_facts(first.description)
        associated = tuple(_aperio_associated(tiff))
    elif tiff.is_ome:
        kind, mpp = "OME-TIFF", ome_mpp(first.description) or mpp
    elif tiff.is_qpi:
        kind = "QPTIFF"
    return SlideInfo(
        format=f"{kind}, {codec}",
        reader="direct",
        size_l0=sizes[0],
        levels=levels_of(sizes),
        mpp=None,
        objective=objective,
        associated=associated,
        stated_mpp=mpp,
    )


def aperio_facts(description: str) -> tuple[Mpp | None, float | None]:
    """(µm/px, objective) of Aperio's description, each None where it is not stated."""
    found = {
        key: float(value) for key, value in re.findall(r"\|\s*(MPP|AppMag)\s*=\s*([0-9]+(?:\.[0-9]*)?)", description)
    }
    mpp, objective = found.get("MPP"), found.get("AppMag")
    return Mpp.square(mpp) if mpp else None, objective or None


def _aperio_associated(tiff: tifffile.TiffFile) -> list[str]:
    """Names alone: the second page is the thumbnail, later strips name themselves."""
    names = []
    for index, page in enumerate(_pages(tiff)):
        if page.is_tiled:
            continue
        second_line = page.description.split("\n")[1:2]
        word = second_line[0].split(" ")[0].strip() if second_line else ""
        names.append("thumbnail" if index == 1 else word if word in ("label", "macro") else "other")
    return sorted(names)


def ome_mpp(description: str) -> Mpp | None:
    """µm/px of the first image of OME-XML."""
    try:
        pixels = next(e for e in ElementTree.fromstring(description).iter() if e.tag.rpartition("}")[2] == "Pixels")
    except (ElementTree.ParseError, StopIteration):
        return None
    sizes = []
    for axis in "YX":
        unit = _UM_PER_NAME.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        stated = pixels.get(f"PhysicalSize{axis}")
        if unit is None or not stated or not float(stated) > 0:
            return None
        sizes.append(float(stated) * unit)
    return Mpp(*sizes)


def page_resolution(page: _Page) -> Mpp | None:
    """µm/px of the TIFF resolution tags."""
    unit = page.tags.get("ResolutionUnit")
    um = _UM_PER_UNIT.get(int(unit.value)) if unit else 25_400.0  # inch is TIFF's default
    pixels = [tag for axis in "YX" if (tag := page.tags.get(f"{axis}Resolution")) is not None]
    if um is None or len(pixels) != 2:
        return None
    per_unit = [tag.value[0] / tag.value[1] if tag.value[1] else 0 for tag in pixels]
    return Mpp(um / per_unit[0], um / per_unit[1]) if all(per_unit) else None
