"""Hostile slides: files of every format, damaged in a seeded way, with a record of which bytes were touched."""

import random
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

_GEOMETRY_TAGS = {256, 257, 258, 259, 262, 266, 277, 284, 317, 322, 323, 330, 254, 339, 338, 530, 32997}
_ABSURD = (0, 1, 2, 3, 7, 255, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


@dataclass(frozen=True)
class Original:
    """A sound file and where its parts lie.

    Attributes:
        data: The bytes.
        tiles: Of level 0: (offset, length) by (row, col); empty where the file is no tiled TIFF.
        tile_px: (height, width) of a tile.
        streams: (offset, length) of all pixel data.
        tables: (offset, length) of the directories, and of the arrays of offsets and lengths.
        tags: Places of tag entries of the first directories: tag → (offset of the entry, of its value).
        links: Places of the pointers from one directory to the next, and their size.
    """

    name: str
    data: bytes
    tiles: dict[tuple[int, int], tuple[int, int]]
    tile_px: tuple[int, int]
    streams: list[tuple[int, int]]
    tables: list[tuple[int, int]]
    tags: list[tuple[int, int, int, int]]  # page, tag, offset of the entry, of the value
    links: list[tuple[int, int]]
    order: str  # "<" or ">"

    @classmethod
    def load(cls, path: Path) -> "Original":
        data = path.read_bytes()
        if data[:2] not in (b"II", b"MM"):
            return cls(path.name, data, {}, (0, 0), [(0, len(data))], [(0, min(2000, len(data)))], [], [], "<")
        with tifffile.TiffFile(path) as tiff:
            return _of_tiff(path.name, data, tiff)


def _of_tiff(name: str, data: bytes, tiff: tifffile.TiffFile) -> Original:
    layout = tiff.tiff
    streams, tables, tags, links = [], [], [], []
    for index, page in enumerate(tiff.pages):
        streams += list(zip(page.dataoffsets, page.databytecounts, strict=True))
        count = len(page.tags)
        tables.append((page.offset, layout.tagnosize + count * layout.tagsize))
        links.append((page.offset + layout.tagnosize + count * layout.tagsize, layout.offsetsize))
        for tag in page.tags:
            tags.append((index, tag.code, tag.offset, tag.valueoffset))
            tables.append((tag.valueoffset, tag.valuebytecount))
    page = tiff.pages[0]
    tiles: dict[tuple[int, int], tuple[int, int]] = {}
    if page.is_tiled:
        cols = -(-page.imagewidth // page.tilewidth)
        places = zip(page.dataoffsets, page.databytecounts, strict=True)
        tiles = {divmod(k, cols): place for k, place in enumerate(places)}
    side = (page.tilelength, page.tilewidth) if page.is_tiled else (0, 0)
    return Original(name, data, tiles, side, streams, tables, tags, links, tiff.byteorder)


@dataclass(frozen=True)
class Mutant:
    """A damaged file.

    Attributes:
        kind: What was done.
        data: The bytes.
        touched: (start, end) of every range that differs from the original, in the original's bytes.
        structure: Whether directories, tables or the place of data may have changed; else only pixel data did.
    """

    kind: str
    data: bytes
    touched: tuple[tuple[int, int], ...]
    structure: bool

    def touches(self, offset: int, length: int) -> bool:
        return any(start < offset + length and offset < end for start, end in self.touched)


def mutate(original: Original, seed: int) -> Mutant:
    """One seeded mutation."""
    rng = random.Random(f"{original.name} {seed}")
    kinds = [_truncate, _flip_stream, _flip_stream, _overwrite_stream, _flip_table, _flip_anywhere, _shift]
    if original.tags:
        kinds += [_absurd_tag, _absurd_tag, _absurd_tag, _cycle, _flip_header, _zero_table, _swap_type]
    return rng.choice(kinds)(original, rng)


def _edited(kind: str, original: Original, edits: list[tuple[int, bytes]]) -> Mutant:
    data = bytearray(original.data)
    for at, new in edits:
        data[at : at + len(new)] = new[: len(data) - at]
    touched = tuple((at, min(at + len(new), len(data))) for at, new in edits)
    inside = all(any(o <= start and end <= o + n for o, n in original.streams) for start, end in touched)
    return Mutant(kind, bytes(data), touched, not inside or not original.tags)


def _flipped(original: Original, at: int, rng: random.Random) -> tuple[int, bytes]:
    return at, bytes([original.data[at] ^ (1 << rng.randrange(8))])


def _truncate(original: Original, rng: random.Random) -> Mutant:
    size = len(original.data)
    at = rng.choice([rng.randrange(size), rng.randrange(min(64, size)), size - rng.randrange(1, min(5000, size))])
    return Mutant("truncated", original.data[:at], ((at, size),), True)


def _flip_stream(original: Original, rng: random.Random) -> Mutant:
    edits = []
    for offset, length in rng.sample(original.streams, min(len(original.streams), rng.choice([1, 3]))):
        edits += [_flipped(original, offset + rng.randrange(length), rng) for _ in range(rng.choice([1, 8])) if length]
    return _edited("bits of pixel data", original, edits)


def _overwrite_stream(original: Original, rng: random.Random) -> Mutant:
    offset, length = rng.choice([s for s in original.streams if s[1] > 8])
    start = rng.randrange(length - 4)
    size = rng.randrange(1, min(length - start, 4000) + 1)
    fill = rng.choice([b"\0" * size, b"\xff" * size, rng.randbytes(size)])
    return _edited("overwritten pixel data", original, [(offset + start, fill)])


def _flip_table(original: Original, rng: random.Random) -> Mutant:
    places = [place for place in original.tables if place[1]]
    edits = []
    for offset, length in rng.choices(places, k=rng.choice([1, 1, 4])):
        edits.append(_flipped(original, min(offset + rng.randrange(length), len(original.data) - 1), rng))
    return _edited("bits of directories and tables", original, edits)


def _flip_anywhere(original: Original, rng: random.Random) -> Mutant:
    edits = [_flipped(original, rng.randrange(len(original.data)), rng) for _ in range(rng.choice([1, 20, 200]))]
    return _edited("bits anywhere", original, edits)


def _flip_header(original: Original, rng: random.Random) -> Mutant:
    return _edited("bits of the header", original, [_flipped(original, rng.randrange(16), rng)])


def _shift(original: Original, rng: random.Random) -> Mutant:
    """Bytes inserted or lost: all that follows has moved."""
    at, count = rng.randrange(len(original.data)), rng.randrange(1, 64)
    if rng.random() < 0.5:
        data = original.data[:at] + rng.randbytes(count) + original.data[at:]
    else:
        data = original.data[:at] + original.data[at + count :]
    return Mutant("bytes inserted or lost", data, ((at, len(original.data)),), True)


def _absurd_tag(original: Original, rng: random.Random) -> Mutant:
    """A geometry tag, a count, or an entry of an offset table with a value from nowhere."""
    wanted = [tag for tag in original.tags if tag[1] in _GEOMETRY_TAGS or tag[1] in (324, 325, 273, 279, 278, 347)]
    _, _, entry, value = rng.choice(wanted or original.tags)
    number = struct.pack(original.order + "I", rng.choice(_ABSURD))
    place = rng.choice([value, value, entry + 4])  # the value, or how many there are
    return _edited("absurd tag", original, [(place, number)])


def _swap_type(original: Original, rng: random.Random) -> Mutant:
    _, _, entry, _ = rng.choice(original.tags)
    kind = struct.pack(original.order + "H", rng.choice([*_TYPE_BYTES, 0, 99]))
    return _edited("type of a tag", original, [(entry + 2, kind)])


def _cycle(original: Original, rng: random.Random) -> Mutant:
    """A directory that points back to itself or an earlier one."""
    at, size = rng.choice(original.links)
    target = rng.choice([offset for offset, _ in original.tables[:1]] + [at - 4])
    pointer = struct.pack(original.order + ("Q" if size == 8 else "I"), max(0, target))
    return _edited("cyclic directories", original, [(at, pointer)])


def _zero_table(original: Original, rng: random.Random) -> Mutant:
    offset, length = rng.choice([place for place in original.tables if place[1] > 4])
    return _edited("zeroed table", original, [(offset, b"\0" * length)])


def touches_geometry(original: Original, mutant: Mutant) -> bool:
    """Whether a directory, or a tag that decides sizes, may say something else than it did."""
    if not original.tags:
        return mutant.structure
    if mutant.kind in ("truncated", "bytes inserted or lost") or mutant.touches(0, 16):
        return True
    for _, code, entry, value in original.tags:
        size = min(64, len(original.data) - value)
        decides = code in _GEOMETRY_TAGS or code in (270, 324, 325, 273, 279)
        if mutant.touches(entry, 20) or (decides and mutant.touches(value, max(size, 1))):
            return True
    return any(mutant.touches(at, size) for at, size in original.links) or any(
        mutant.touches(offset, 8) for offset, _ in original.tables
    )


def originals(folder: Path, shared: Path | None) -> list[Path]:
    """Sound files of every way of reading: drawn ones, made in ``folder``, and the real ones of the data folder."""
    import cv2
    import imagecodecs

    from tests.fakes import position_pixels
    from wsiengine.geometry import Size
    from wsiengine.slides.pyramid import PyramidLayout, write_pyramid

    size = Size(701, 923)
    pixels = position_pixels(*size.shape)
    made = []
    for compression in ("jpeg", "jpeg2000", "deflate"):
        for svs in (True, False):
            path = folder / f"{compression}-{'svs' if svs else 'plain'}.{'svs' if svs else 'tif'}"
            quality = 90 if compression == "jpeg" else 0
            write_pyramid(path, pixels, size, 0.5, PyramidLayout(128, quality, (1, 4), compression, svs))
            made.append(path)
    for name, data in (
        ("flat.png", imagecodecs.png_encode(pixels)),
        ("flat.jpg", imagecodecs.jpeg8_encode(cv2.resize(pixels, (300, 200)))),
    ):
        (folder / name).write_bytes(data)
        made.append(folder / name)
    tifffile.imwrite(folder / "flat.tif", pixels, photometric="rgb", compression="zlib", rowsperstrip=64)
    tifffile.imwrite(folder / "grey.tif", np.ascontiguousarray(pixels[..., 0]))
    made += [folder / "flat.tif", folder / "grey.tif"]
    if shared is not None:
        wsi = shared / "wsi"
        made += [path for path in sorted(wsi.rglob("*")) if path.is_file() and path.stat().st_size < 4_500_000]
    return made
