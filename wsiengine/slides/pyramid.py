"""Writing pyramidal tiled TIFF (as Aperio SVS where asked) in one pass, in memory of one row of tiles."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Protocol

import imagecodecs
import numpy as np
import tifffile

from wsiengine.geometry import Mpp, Size

_THUMBNAIL_PX = 768
_MAKER = "Aperio layout, written by wsiengine"  # readers know SVS by its first word

Rows = Callable[[int, int], np.ndarray]  # (first row, last row) → (rows, width, 3) uint8


@dataclass(frozen=True, slots=True)
class PyramidLayout:
    """How the pixels lie in the file.

    Args:
        tile_px: Side of a tile, a multiple of 16.
        quality: JPEG quality, 1 to 100; for JPEG 2000 the PSNR in dB, 0 for lossless.
        downsamples: Of the levels; the first is 1, each is a whole multiple of the one before.
        compression: "jpeg" (YCbCr, 4:2:0), "jpeg2000" (RGB) or "deflate" (lossless).
        svs: Describe it as Aperio does, so that readers of SVS take it for one.
        objective: Magnification to state; derived from the µm/px where None.
    """

    tile_px: int = 256
    quality: int = 90
    downsamples: tuple[int, ...] = (1, 4, 16)
    compression: str = "jpeg"
    svs: bool = True
    objective: float | None = None

    def __post_init__(self) -> None:
        if self.tile_px <= 0 or self.tile_px % 16:
            raise ValueError(f"the side of a TIFF tile is a multiple of 16, not {self.tile_px}")
        if self.compression not in _ENCODERS:
            raise ValueError(f"compression is one of {', '.join(_ENCODERS)}, not {self.compression}")
        steps = zip(self.downsamples, self.downsamples[1:], strict=False)
        if not self.downsamples or self.downsamples[0] != 1 or any(b <= a or b % a for a, b in steps):
            raise ValueError(
                f"downsamples begin with 1 and each is a multiple of the one before, not {self.downsamples}"
            )


def write_pyramid(
    path: str | Path, source: np.ndarray | Rows, size: Size, mpp: float | Mpp, layout: PyramidLayout | None = None
) -> None:
    """Write a slide. Rows are asked for once, from the top, one row of tiles at a time.

    Coarser levels are area means of the finer ones. What is written is complete or absent: the file gets its name last.

    Args:
        path: Of the file.
        source: (h, w, 3) uint8, or a function from two rows to the (rows, width, 3) uint8 between them.
        size: Of level 0, in pixels.
        mpp: µm per level-0 pixel. Aperio's description knows one number: it needs square pixels.
        layout: How the pixels lie in the file.
    """
    layout = layout or PyramidLayout()
    fitting = tuple(d for d in layout.downsamples if d <= max(1, min(size.shape)))
    layout = replace(layout, downsamples=fitting)  # no level without pixels
    mpp = mpp if isinstance(mpp, Mpp) else Mpp.square(mpp)
    if layout.svs and mpp.y != mpp.x:
        raise ValueError(f"an SVS file states one µm/px for both axes, not {mpp}: write it with svs=False")
    read_rows: Rows = source if callable(source) else lambda y0, y1: source[y0:y1]
    target = Path(path)
    unfinished = target.with_name(target.name + ".part")
    try:
        _write(unfinished, read_rows, size, _Description(size, mpp, layout))
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _write(path: Path, read_rows: Rows, size: Size, description: "_Description") -> None:
    layout = description.layout
    with (
        tempfile.TemporaryFile(dir=path.parent) as spool,
        tifffile.TiffWriter(path, bigtiff=_needs_bigtiff(size, layout)) as tiff,
    ):
        thumbnail = _Thumbnail(_shrink(size, layout.downsamples[-1]))
        levels: list[_Level] = []
        for downsample, finer in zip(layout.downsamples[:0:-1], layout.downsamples[-2::-1], strict=True):
            shrinker = _Shrinker(_shrink(size, downsample), downsample // finer)
            levels.insert(0, _Level(shrinker, layout, spool, levels[0] if levels else thumbnail))
        full = _full_level(read_rows, size, layout, levels[0] if levels else thumbnail)
        tiff.write(full, shape=(*size.shape, 3), **description.tags(0))
        if layout.svs:
            thumbnail.write(tiff, description.thumbnail_text(thumbnail.size))
        for index, level in enumerate(levels, 1):
            tiff.write(level.tiles(), shape=(*level.size.shape, 3), **description.tags(index))


class _Coarser(Protocol):
    """What takes the rows of a level, from the top, to make something smaller of them."""

    def push(self, finer: np.ndarray) -> None: ...


def _full_level(read_rows: Rows, size: Size, layout: PyramidLayout, coarser: _Coarser) -> Iterator[bytes]:
    for y in range(0, size.height, layout.tile_px):
        rows = read_rows(y, min(y + layout.tile_px, size.height))
        if rows.shape[1:] != (size.width, 3) or rows.dtype != np.uint8:
            raise ValueError(f"rows must be uint8 (rows, {size.width}, 3), not {rows.dtype} {rows.shape}")
        coarser.push(rows)
        yield from _encoded_row(rows, layout)


class _Shrinker:
    """Area means of rows that come in pieces of any height.

    Args:
        size: Of what is made.
        step: Pixels of the finer level per pixel of this one.
    """

    def __init__(self, size: Size, step: int) -> None:
        self.size, self._step = size, step
        self._left = np.empty((0, 0, 3), np.uint8)  # rows that do not yet make one
        self.done = 0  # rows made so far

    def rows(self, finer: np.ndarray) -> np.ndarray:
        """The rows that ``finer`` completes: (0 or more, width, 3) uint8."""
        from wsikernels.resample import resample_area  # Numba, paid for on first use

        if len(self._left):
            finer = np.concatenate([self._left, finer])
        count = min(len(finer) // self._step, self.size.height - self.done)
        self._left = finer[count * self._step :].copy()
        self.done += count
        made = np.empty((count, self.size.width, 3), np.uint8)
        return resample_area(np.ascontiguousarray(finer), 0, 0, self._step, self._step, 0, 0, made) if count else made


class _Level:
    """One coarser level: its tiles are spooled, encoded, until the finer ones are written."""

    def __init__(self, shrinker: _Shrinker, layout: PyramidLayout, spool: IO[bytes], coarser: _Coarser) -> None:
        self.size = shrinker.size
        self._shrinker, self._layout, self._spool, self._coarser = shrinker, layout, spool, coarser
        self._waiting = np.empty((0, self.size.width, 3), np.uint8)  # not yet enough for a row of tiles
        self._places: list[tuple[int, int]] = []  # (offset, length) in the spool

    def push(self, finer: np.ndarray) -> None:
        """Take the next rows of the finer level."""
        side = self._layout.tile_px
        waiting = np.concatenate([self._waiting, self._shrinker.rows(finer)])
        while len(waiting) >= side or (len(waiting) and self._shrinker.done == self.size.height):
            self._spool_row(waiting[:side])
            waiting = waiting[side:]
        self._waiting = waiting

    def _spool_row(self, rows: np.ndarray) -> None:
        self._coarser.push(rows)
        for tile in _encoded_row(rows, self._layout):
            self._places.append((self._spool.tell(), len(tile)))
            self._spool.write(tile)

    def tiles(self) -> Iterator[bytes]:
        """All encoded tiles, row-major."""
        for offset, length in self._places:
            self._spool.seek(offset)
            yield self._spool.read(length)


class _Thumbnail:
    """A small picture of the slide. Readers of SVS, tifffile among them, take the second page for it."""

    def __init__(self, finer: Size) -> None:
        step = max(1, -(-max(finer.shape) // _THUMBNAIL_PX))
        self._shrinker = _Shrinker(Size(max(1, finer.height // step), max(1, finer.width // step)), step)
        self.size = self._shrinker.size
        self._rows: list[np.ndarray] = []

    def push(self, finer: np.ndarray) -> None:
        self._rows.append(self._shrinker.rows(finer))

    def write(self, tiff: tifffile.TiffWriter, text: str) -> None:
        jpeg = _jpeg(np.concatenate(self._rows), 80)
        tiff.write(
            iter([jpeg]),
            shape=(*self.size.shape, 3),
            dtype=np.uint8,
            photometric="ycbcr",
            subsampling=(2, 2),
            compression="jpeg",
            rowsperstrip=self.size.height,
            description=text,
            metadata=None,
            software=False,
        )


def _shrink(size: Size, downsample: int) -> Size:
    return Size(size.height // downsample, size.width // downsample)


def _encoded_row(rows: np.ndarray, layout: PyramidLayout) -> Iterator[bytes]:
    """The tiles of one row of tiles, left to right; what overhangs repeats the last row and column."""
    side = layout.tile_px
    encode = _ENCODERS[layout.compression]
    for x in range(0, rows.shape[1], side):
        tile = rows[:, x : x + side]
        missing = side - tile.shape[0], side - tile.shape[1]
        if any(missing):
            tile = np.pad(tile, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        yield encode(np.ascontiguousarray(tile), layout.quality)


def _jpeg(tile: np.ndarray, quality: int) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(tile, level=quality, outcolorspace="YCBCR", subsampling="420"))


def _jpeg2000(tile: np.ndarray, quality: int) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(tile, level=quality, codecformat="J2K", mct=True))


_ENCODERS: dict[str, Callable[[np.ndarray, int], bytes]] = {
    "jpeg": _jpeg,
    "jpeg2000": _jpeg2000,
    "deflate": lambda tile, _: bytes(imagecodecs.zlib_encode(tile.tobytes(), 1)),
}
_TIFF_NAMES = {"jpeg": "jpeg", "jpeg2000": "aperio_jp2000_rgb", "deflate": "adobe_deflate"}


@dataclass(frozen=True, slots=True)
class _Description:
    """What the file says about itself."""

    size: Size
    mpp: Mpp
    layout: PyramidLayout

    def tags(self, index: int) -> dict:
        """Arguments of ``TiffWriter.write`` for one level."""
        layout = self.layout
        ycbcr = (
            {"photometric": "ycbcr", "subsampling": (2, 2)} if layout.compression == "jpeg" else {"photometric": "rgb"}
        )
        per_cm = (1e4 / (self.mpp.x * layout.downsamples[index]), 1e4 / (self.mpp.y * layout.downsamples[index]))
        return {
            "dtype": np.uint8,
            "tile": (layout.tile_px, layout.tile_px),
            "compression": _TIFF_NAMES[layout.compression],
            "description": self._text(index) if layout.svs else None,
            "resolution": per_cm,
            "resolutionunit": "CENTIMETER",
            "subfiletype": 0 if index == 0 or layout.svs else 1,
            "metadata": None,
            "software": False,
            **ycbcr,
        }

    def thumbnail_text(self, size: Size) -> str:
        return f"{_MAKER}\r\n{self.size.width}x{self.size.height} -> {size.width}x{size.height} -"

    def _text(self, index: int) -> str:
        layout = self.layout
        kind = {"jpeg": "JPEG", "jpeg2000": "J2K"}.get(layout.compression, layout.compression)
        tile = f"({layout.tile_px}x{layout.tile_px})"
        full = f"{self.size.width}x{self.size.height}"
        if index == 0:
            shape = f"{full} [0,0 {full}] {tile} {kind} Q={layout.quality}"
        else:
            small = _shrink(self.size, layout.downsamples[index])
            shape = f"{full} [0,0 {full}] {tile} -> {small.width}x{small.height} {kind} Q={layout.quality}"
        objective = layout.objective or 10 / self.mpp.mean
        return f"{_MAKER}\r\n{shape}|AppMag = {objective:g}|MPP = {self.mpp.mean:.6g}"


def _needs_bigtiff(size: Size, layout: PyramidLayout) -> bool:
    """Whether 4 GiB might not do: at 1.5 bytes per pixel for JPEG (noise at the best quality), 4 for the others."""
    return size.area * (1.5 if layout.compression == "jpeg" else 4) > 2**32
