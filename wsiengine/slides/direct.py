"""Reading tiled TIFF without a library between: tables parsed once, then pread and decode, straight into the block.

A read takes each file tile under it once, if anybody looks at it, and shrinks or copies it from the processor's cache.
JPEG tiles are not kept between reads: those on a block's border weigh little. JPEG 2000 decodes ten times slower, and a
detector's blocks are a few file tiles wide: there the last ones are kept.
"""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import compress

import cv2
import imagecodecs
import numpy as np

from wsiengine.errors import UnreadableSlide
from wsiengine.geometry import Box, Size
from wsiengine.slides.base import FileTile
from wsiengine.slides.filetiles import place, touched
from wsiengine.slides.kept import KeptTiles
from wsiengine.slides.sources import Source
from wsiengine.slides.tiff import TiledTiff, TileTable

_DAMAGE = (RuntimeError, ValueError, IndexError)  # what imagecodecs meets damage with


class DirectReader:
    """Levels of a :class:`~wsiengine.slides.tiff.TiledTiff`. Decoding holds no lock, the interpreter's included.

    JPEG pixels are those of OpenSlide bit for bit; JPEG 2000 with subsampled colour differs by rounding, at most 1.
    """

    def __init__(self, source: Source, tiff: TiledTiff) -> None:
        self.info = tiff.info
        self._source = source
        self._levels = tiff.levels
        self._scratch = threading.local()
        self._kept = KeptTiles()

    def read_into(self, level: int, box: Box, out: np.ndarray) -> None:
        place(self.tiles(level, box), self.tile_px(level), box, out)

    def tile_px(self, level: int) -> Size:
        return self._levels[level].tile

    def tiles(self, level: int, box: Box, parts: Sequence[Box] | None = None) -> Iterator[FileTile]:
        """See :class:`wsiengine.slides.base.TileReader`."""
        table = self._levels[level]
        height, width = table.tile.shape
        canvas = self._canvas(table)
        cols = range(box.x0 // width, -(-box.x1 // width))
        seen = None if parts is None else touched(parts, table.tile)
        for row in range(box.y0 // height, -(-box.y1 // height)):
            wanted = [seen is None or (row, col) in seen for col in cols]
            packed = iter(self._source.read_many(list(compress(table.places(row, cols), wanted))))
            for col, want in zip(cols, wanted, strict=True):
                pixels = self._pixels((level, row, col), next(packed), canvas) if want else None
                yield FileTile(row * height, col * width, pixels)

    def _pixels(self, tile: tuple[int, int, int], packed: bytes, canvas: np.ndarray) -> np.ndarray:
        """A file tile, by level, row and column: (h, w, 3) uint8, good until the next one is asked for."""
        table = self._levels[tile[0]]
        kept = self._kept.get(tile) if table.dear else None
        if kept is not None:
            return kept
        try:
            pixels = _DECODERS[table.codec](packed, table, canvas)
        except _DAMAGE as error:
            level, row, col = tile
            raise self._unreadable(level, row * table.tile.height, col * table.tile.width, error) from error
        if table.dear:
            self._kept.keep(tile, pixels)
        return pixels

    def _unreadable(self, level: int, tile_y: int, tile_x: int, error: Exception) -> UnreadableSlide:
        tile, (downsample_y, downsample_x) = self._levels[level].tile, self.info.levels[level].downsample
        return UnreadableSlide(
            f"{self._source.path} cannot be decoded at x {round(tile_x * downsample_x):,}, "
            f"y {round(tile_y * downsample_y):,} (level-0 pixels; a tile of {tile.width} × {tile.height} px of level "
            f"{level}): {error}.",
            hint="the file is damaged there: copy it again from its origin, or leave that part out with --region.",
        )

    def _canvas(self, table: TileTable) -> np.ndarray:
        """This thread's tile, reused: it stays in the processor's cache."""
        canvas = getattr(self._scratch, "canvas", None)
        if canvas is None or canvas.shape[:2] != table.tile.shape:
            canvas = self._scratch.canvas = tile_canvas(table.tile)
        return canvas

    def close(self) -> None:
        self._source.close()
        self._kept = KeptTiles()


def tile_canvas(size: Size) -> np.ndarray:
    """(h, w, 3) uint8 to decode into, beginning 16 bytes after a multiple of 32.

    To rows at multiples of 32 libjpeg-turbo writes past the cache, which is slower there and again when the tile is
    copied to its block: 3.3 against 2.5 ns per pixel.
    """
    room = np.empty(size.area * 3 + 32, np.uint8)
    start = (16 - room.ctypes.data) % 32
    return room[start : start + size.area * 3].reshape(*size.shape, 3)


# inside a scan only stuffed bytes and restarts follow 0xff; between the scans of progressive JPEG, tables and comments
_STRAY_MARKER = re.compile(rb"\xff[^\x00\xc4\xd0-\xd7\xda\xdb\xdd\xfe\xff]")
_START_OF_SCAN = b"\xff\xda"


def _jpeg(packed: bytes, table: TileTable, canvas: np.ndarray) -> np.ndarray:
    _check_jpeg(packed)
    space = "YCBCR" if table.ycbcr else "RGB"
    return imagecodecs.jpeg8_decode(packed, tables=table.jpeg_tables, colorspace=space, outcolorspace="RGB", out=canvas)


def _check_jpeg(packed: bytes) -> None:
    """Find what libjpeg would only warn of, filling the rest with grey: a stream cut short, or overwritten."""
    scan = packed.find(_START_OF_SCAN)
    stray = _STRAY_MARKER.search(packed, scan + 2) if scan >= 0 else None
    if stray is None or packed[stray.start() : stray.end()] != b"\xff\xd9":
        found = "no end" if stray is None else f"marker {stray.group().hex()} inside"
        raise ValueError(f"damaged JPEG stream ({found})")


def _jpeg2000(packed: bytes, table: TileTable, canvas: np.ndarray) -> np.ndarray:
    if not packed.rstrip(b"\0").endswith(b"\xff\xd9"):  # OpenJPEG would decode what is there, and not say
        raise ValueError("damaged JPEG 2000 stream (no end)")
    pixels = imagecodecs.jpeg2k_decode(packed)
    if pixels.shape != canvas.shape or pixels.dtype != np.uint8:
        raise ValueError(f"a tile of {canvas.shape} uint8 was announced, {pixels.shape} {pixels.dtype} came")
    if table.ycbcr and not _subsampled(packed):  # OpenJPEG turns subsampled YCbCr into RGB, but not full YCbCr
        return cv2.cvtColor(np.ascontiguousarray(pixels[..., [0, 2, 1]]), cv2.COLOR_YCrCb2RGB)
    return pixels


def _subsampled(packed: bytes) -> bool:
    """Whether the second component of a codestream is smaller than the first (SIZ marker, ISO 15444-1 A.5.1)."""
    start = packed.find(b"\xff\x51")
    component = start + 4 + 36 + 3  # marker and length, fixed part, first component
    return packed[component + 1 : component + 3] != b"\x01\x01"


def _raw(unpack: Callable[[bytes], bytes | bytearray]) -> Callable[[bytes, TileTable, np.ndarray], np.ndarray]:
    def decode(packed: bytes, table: TileTable, canvas: np.ndarray) -> np.ndarray:
        pixels = np.frombuffer(unpack(packed), np.uint8)
        if pixels.size < canvas.size:
            raise ValueError(f"{canvas.size:,} bytes were announced, {pixels.size:,} came")
        pixels = pixels[: canvas.size].reshape(canvas.shape)
        return imagecodecs.delta_decode(pixels, axis=1) if table.differences else pixels

    return decode


_DECODERS: dict[str, Callable[[bytes, TileTable, np.ndarray], np.ndarray]] = {
    "jpeg": _jpeg,
    "jpeg2000": _jpeg2000,
    "jpeg2000 ycbcr": _jpeg2000,
    "deflate": _raw(lambda packed: imagecodecs.zlib_decode(packed)),
    "lzw": _raw(lambda packed: imagecodecs.lzw_decode(packed)),
    "zstd": _raw(lambda packed: imagecodecs.zstd_decode(packed)),
    "none": _raw(bytes),
}
