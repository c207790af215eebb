"""Slides of any size in a few megabytes: tiled TIFF whose tiles are a few encoded ones, named again and again."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np

from wsiengine.geometry import Size
from wsiengine.slides.sources import open_source
from wsiengine.slides.tiff import parse_tiled

TILE_PX = 256
_LEVELS = (1, 4, 16)
_FIRST_LINK = 8  # where a BigTIFF's header says where its first directory is
_TYPES = {"B": 7, "H": 3, "I": 4, "Q": 16}  # struct's letter → TIFF's type


@dataclass(frozen=True)
class Sparse:
    """What to draw: ``share`` of the slide is tissue, in pieces of about ``piece_px`` level-0 pixels, on glass."""

    size_l0: Size
    mpp: float = 0.25
    share: float = 0.05
    piece_px: int = 8192
    levels: Sequence[int] = _LEVELS


def write_sparse(path: Path, what: Sparse) -> Path:
    """A BigTIFF of JPEG tiles, with levels; few tiles differ."""
    with path.open("wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        link = _FIRST_LINK
        tissue = _tissue(what)
        for downsample in what.levels:
            link = _write_level(file, what, tissue, downsample, link)
    return path


def _tissue(what: Sparse) -> np.ndarray:
    """Which tiles of level 0 are tissue: ellipses on a lattice, their area the share."""
    rows, cols = (-(-n // TILE_PX) for n in what.size_l0.shape)
    pitch = what.piece_px / TILE_PX
    y, x = ((np.arange(n) + 0.5) % pitch - pitch / 2 for n in (rows, cols))
    radius2 = what.share * pitch**2 / np.pi
    return (y[:, None] / 1.4) ** 2 + (x[None, :] * 1.4) ** 2 <= radius2


def _write_level(file, what: Sparse, tissue: np.ndarray, downsample: int, link: int) -> int:  # type: ignore[no-untyped-def]
    height, width = (-(-n // downsample) for n in what.size_l0.shape)
    rows, cols = -(-height // TILE_PX), -(-width // TILE_PX)
    places: dict[bytes, tuple[int, int]] = {}
    offsets, counts = np.empty(rows * cols, np.int64), np.empty(rows * cols, np.int64)
    for index, (row, col) in enumerate(np.ndindex(rows, cols)):
        pieces = tissue[row * downsample : (row + 1) * downsample, col * downsample : (col + 1) * downsample]
        key = bytes(pieces.shape) + pieces.tobytes()
        if key not in places:
            places[key] = (file.tell(), file.write(_jpeg(pieces, downsample)))
        offsets[index], counts[index] = places[key]
    return _write_page(file, Size(height, width), what.mpp * downsample, (offsets.tolist(), counts.tolist()), link)


def _write_page(  # type: ignore[no-untyped-def]
    file, size: Size, mpp: float, places: tuple[Sequence[int], Sequence[int]], link: int, jpeg_tables: bytes = b""
) -> int:
    """The directory of a level whose tiles are there; the finest is the one that ``link`` follows the header with."""
    per_cm = round(1e6 / mpp)
    tags: list[tuple[int, str, Sequence[int]]] = [
        (254, "I", [int(link > _FIRST_LINK)]),
        (256, "I", [size.width]),
        (257, "I", [size.height]),
        (258, "H", [8, 8, 8]),
        (259, "H", [7]),
        (262, "H", [6]),
        (277, "H", [3]),
        (282, "R", [per_cm, 100]),
        (283, "R", [per_cm, 100]),
        (296, "H", [3]),
        (322, "I", [TILE_PX]),
        (323, "I", [TILE_PX]),
        (324, "Q", places[0]),
        (325, "I", places[1]),
        *([(347, "B", list(jpeg_tables))] if jpeg_tables else []),
        (530, "H", [2, 2]),
    ]
    return _write_directory(file, tags, link)


def _write_directory(file, tags: list[tuple[int, str, Sequence[int]]], link: int) -> int:  # type: ignore[no-untyped-def]
    """Values that do not fit into their entry first, then the directory; the last one is made to point at it."""
    entries = []
    for tag, kind, values in tags:
        letter, count = ("I", len(values) // 2) if kind == "R" else (kind, len(values))
        data = struct.pack(f"<{len(values)}{letter}", *values)
        if len(data) > 8:
            place = file.tell()
            file.write(data)
            data = struct.pack("<Q", place)
        entries.append(struct.pack("<HHQ", tag, 5 if kind == "R" else _TYPES[kind], count) + data.ljust(8, b"\0"))
    here = file.tell()
    file.write(struct.pack("<Q", len(entries)) + b"".join(entries))
    following = file.tell()
    file.write(struct.pack("<Q", 0))
    file.seek(link)
    file.write(struct.pack("<Q", here))
    file.seek(0, 2)
    return following


def _jpeg(tissue: np.ndarray, downsample: int) -> bytes:
    """A tile under which lie so many tiles of level 0, stained or not."""
    random = np.random.default_rng(downsample)
    side = TILE_PX // downsample
    stained = np.zeros((TILE_PX, TILE_PX), bool)
    whole = np.kron(tissue, np.ones((side, side), bool))
    stained[: whole.shape[0], : whole.shape[1]] = whole
    nuclei = np.kron(random.random((TILE_PX // 8, TILE_PX // 8)) < 0.35, np.ones((8, 8), bool))
    colours = np.where(nuclei[..., None], (110, 70, 150), (225, 150, 190))
    colours = np.where(stained[..., None], colours, (243, 242, 245))
    noisy = colours + random.normal(0, 1, colours.shape) * np.where(stained[..., None], 4, 0.6)
    pixels = np.clip(noisy, 0, 255).astype(np.uint8)
    return imagecodecs.jpeg8_encode(pixels, level=85, colorspace="RGB", outcolorspace="YCBCR", subsampling="420")


def write_repeated(path: Path, source: Path, times: int) -> Path:
    """``times`` × ``times`` copies of another slide, whose bytes are in the file once: any number of real pixels.

    ``source`` is a plain TIFF of JPEG tiles with µm/px. A copy is cut to whole tiles of the coarsest level.
    """
    with open_source(str(source)) as packed, path.open("wb") as file:
        tiff = parse_tiled(packed)
        if tiff is None or tiff.info.stated_mpp is None or tiff.levels[0].codec != "jpeg":
            raise ValueError(f"{source.name} is no plain TIFF of JPEG tiles with µm/px")
        last, mpp, link = tiff.levels[-1], tiff.info.stated_mpp.x, _FIRST_LINK
        copy = Size(*(n // side for n, side in zip(last.size.shape, last.tile.shape, strict=True)))
        if not min(copy.shape):
            raise ValueError(f"{source.name} is smaller than a tile of its coarsest level")
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        for table in tiff.levels:
            finer = round(table.size.width / last.size.width)  # tiles of this level in one of the coarsest, each way
            rows, cols = range(copy.height * finer), range(copy.width * finer)
            places = [[(file.tell(), file.write(packed.read(*at))) for at in table.places(row, cols)] for row in rows]
            tiled = np.tile(np.array(places, np.int64), (times, times, 1))
            size = Size(len(rows) * times * table.tile.height, len(cols) * times * table.tile.width)
            level_mpp = mpp * tiff.levels[0].size.width / table.size.width
            named = (tiled[..., 0].ravel().tolist(), tiled[..., 1].ravel().tolist())
            link = _write_page(file, size, level_mpp, named, link, table.jpeg_tables or b"")
    return path
