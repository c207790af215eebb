"""The one implementation of :class:`~wsiengine.slides.base.Slide`, over whatever reads the file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsiengine.geometry import Box, Mpp
from wsiengine.slides.base import LevelReader, SlideInfo
from wsiengine.slides.fingerprint import fingerprint
from wsiengine.slides.reading import ReadBuffer, plausible, read_working
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
    """

    def __init__(self, path: str, reader: LevelReader, mpp: Mpp | None, reopen: Callable[..., "WholeSlide"]) -> None:
        self.path = path
        self._reader = reader
        self._given_mpp = mpp
        self._reopen = reopen
        self._buffer = ReadBuffer()
        self.info = _settle_mpp(reader.info, mpp)

    def read_level(self, level: int, box: Box, out: np.ndarray | None = None) -> np.ndarray:
        """Pixels of ``box`` (in pixels of that level; may lie partly or wholly outside) → (h, w, 3) uint8.

        ``out`` of that shape is filled and returned where given: fresh memory costs a fifth of decoding.
        """
        inside = box.intersect(Box.of(self.info.levels[level].size))
        if out is None:
            out = np.empty((*box.shape, 3), np.uint8)
        if inside != box:
            out[:] = WHITE
        if inside:
            self._reader.read_into(level, inside, out[inside.relative_to(box).slices])
        return out

    def read(self, box_px: Box, mpp: Mpp) -> np.ndarray:
        """Pixels of ``box_px`` (working pixels at ``mpp``, origin of the slide) → (h, w, 3) uint8."""
        return read_working(self.info, self.read_level, self._buffer, box_px, mpp)

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
    """The user's µm/px where given, else the file's where it can be true."""
    if given is not None:
        return replace(info, mpp=given)
    return replace(info, mpp=info.stated_mpp if plausible(info.stated_mpp) else None)
