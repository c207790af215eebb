"""The one implementation of :class:`~wsiengine.slides.base.Slide`, over whatever reads the file."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsiengine.geometry import Box, Mpp
from wsiengine.slides.base import LevelReader, SlideInfo, TileReader
from wsiengine.slides.deep import DeepPixels
from wsiengine.slides.filetiles import MOST_SHRUNK, place, shrink
from wsiengine.slides.fingerprint import fingerprint
from wsiengine.slides.reading import ReadBuffer, plausible, read_working, require_mpp, whole
from wsiengine.slides.sources import is_url
from wsiengine.slides.white import WHITE

if TYPE_CHECKING:
    import dask.array as da


class WholeSlide:
    """A slide: a reader of levels, with white outside, reading at µm/px, pickling and identity.

    Args:
        path: File or URL.
        reader: What reads its levels.
        mpp: µm per level-0 pixel where the user knows better than the file.
        reopen: ``reopen(path, mpp, reader name)``, called when unpickled.
        deep: The values of a 12- or 16-bit picture, where they were asked for.
    """

    def __init__(
        self,
        path: str,
        reader: LevelReader,
        mpp: Mpp | None,
        reopen: Callable[..., "WholeSlide"],
        deep: DeepPixels | None = None,
    ) -> None:
        self.path = path
        self._reader = reader
        self._given_mpp = mpp
        self._reopen = reopen
        self._buffer = ReadBuffer()
        self._deep = deep
        self.info = _settle_mpp(reader.info, mpp)

    def read_level(
        self, level: int, box: Box, out: np.ndarray | None = None, parts: Sequence[Box] | None = None
    ) -> np.ndarray:
        """Pixels of ``box`` (in pixels of that level; may lie partly or wholly outside) → (h, w, 3) uint8.

        ``out`` of that shape is filled and returned where given: fresh memory costs a fifth of decoding. Of ``parts``,
        where given, is all that matters of the box: elsewhere it may be white.
        """
        inside = box.intersect(Box.of(self.info.levels[level].size))
        if out is None:
            out = np.empty((*box.shape, 3), np.uint8)
        if inside != box:
            out[:] = WHITE
        if inside:
            target, reader = out[inside.relative_to(box).slices], self._reader
            if parts is not None and isinstance(reader, TileReader):
                place(reader.tiles(level, inside, parts), reader.tile_px(level), inside, target)
            else:
                reader.read_into(level, inside, target)
        return out

    def read_shrunk(
        self, level: int, box_px: Box, ratio: tuple[int, int], parts: Sequence[Box] | None
    ) -> np.ndarray | None:
        """Pixels of ``box_px``, means of ``ratio`` pixels of the level (vertically, horizontally) → (h, w, 3) uint8.

        None where the file is no grid of tiles that ``ratio`` divides, or the box leaves the level.
        """
        reader = self._reader
        source = Box(box_px.y0 * ratio[0], box_px.x0 * ratio[1], box_px.y1 * ratio[0], box_px.x1 * ratio[1])
        if not isinstance(reader, TileReader) or not Box.of(self.info.levels[level].size).contains(source):
            return None
        tile = reader.tile_px(level)
        if any(side % step or step > MOST_SHRUNK for side, step in zip(tile.shape, ratio, strict=True)):
            return None
        return shrink(reader.tiles(level, source, parts), tile, ratio, box_px)

    def read(self, box_px: Box, mpp: Mpp) -> np.ndarray:
        """Pixels of ``box_px`` (working pixels at ``mpp``, origin of the slide) → (h, w, 3) uint8."""
        return read_working(self, self._buffer, box_px, mpp)

    def read_parts(self, box_px: Box, mpp: Mpp, parts: Sequence[Box]) -> np.ndarray:
        """As :meth:`read`, but of ``parts`` is all that matters of the box: elsewhere it may be white."""
        return read_working(self, self._buffer, box_px, mpp, parts)

    @property
    def deep(self) -> bool:
        """Whether :meth:`read_deep` has anything to read."""
        return self._deep is not None

    def read_deep(self, box_px: Box, mpp: Mpp) -> np.ndarray:
        """As :meth:`read`, but the values of a 12- or 16-bit grey picture → (h, w, 1) uint16; 0 outside.

        Raises:
            ValueError: The picture was not opened with ``deep``.
        """
        if self._deep is None:
            raise ValueError(f"{self.path} was opened for its 8 bits; open_slide(path, deep=True) keeps the others")
        own = require_mpp(self.info)
        return self._deep.read(box_px, (whole(mpp.y / own.y), whole(mpp.x / own.x)))

    def to_dask(self, mpp: Mpp | float, chunk_px: int = 2048) -> "da.Array":
        """The whole slide at ``mpp`` as a lazy Dask array: (rows, cols, 3) uint8.

        Raises:
            ResolutionError: The slide states no µm/px.
        """
        from wsiengine.graph import pixel_array

        return pixel_array(self, mpp, chunk_px)

    def fingerprint(self) -> str:
        """sha256 (hex) over sizes, tile tables, first and last MiB: never of path or time."""
        return fingerprint(self.path, self.info)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> "WholeSlide":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        path = self.path if is_url(self.path) else str(Path(self.path).absolute())  # a worker stands elsewhere
        return self._reopen, (path, self._given_mpp, self.info.reader)

    def __repr__(self) -> str:
        return f"<slide {self.path} · {self.info.format} · {self.info.size_l0} px · reader {self.info.reader}>"


def _settle_mpp(info: SlideInfo, given: Mpp | None) -> SlideInfo:
    """The user's µm/px where given, else the reader's, or the file's where it can be true."""
    if given is not None:
        return replace(info, mpp=given)
    return replace(info, mpp=info.mpp or (info.stated_mpp if plausible(info.stated_mpp) else None))
