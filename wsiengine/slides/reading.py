"""From working pixels at a µm/px to pixels of a level, and back: the one place where resolutions and levels meet."""

import math
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from wsiengine.errors import ResolutionError
from wsiengine.geometry import Box, Mpp
from wsiengine.slides.base import Level, SlideInfo

# 100× optics sample at about 0.05 µm/px, the coarsest scanners at 2 to 10. What editors write when nobody knows lies
# outside: 72 dots per inch is 352.8 µm/px, 300 is 84.7, 1,200 is 21.2.
PLAUSIBLE_MPP = (0.03, 20.0)

# A level this much coarser than asked for is still taken: scanners miss their nominal µm/px by about a hundredth, and
# one level finer costs four to sixteen times the pixels.
LEVEL_TOLERANCE = 0.02


def plausible(mpp: Mpp | None) -> bool:
    """Whether a file's own statement can be the resolution of a microscope slide."""
    low, high = PLAUSIBLE_MPP
    return mpp is not None and low <= mpp.y <= high and low <= mpp.x <= high and 0.5 <= mpp.y / mpp.x <= 2


def require_mpp(info: SlideInfo) -> Mpp:
    """µm per level-0 pixel.

    Raises:
        ResolutionError: The slide states none, or one that no microscope slide has.
    """
    if info.mpp is not None:
        return info.mpp
    hint = "give the µm per level-0 pixel with --mpp (mpp= in Python); 40× scans have about 0.25, 20× scans about 0.5."
    if info.stated_mpp is None:
        raise ResolutionError("the slide does not state its µm/px, and sizes cannot be known without it.", hint=hint)
    low, high = PLAUSIBLE_MPP
    raise ResolutionError(
        f"the slide states {info.stated_mpp}, which no microscope slide has (we accept {low} to {high:g} µm/px).",
        hint=hint,
    )


def best_level(levels: Sequence[Level], l0_per_px: tuple[float, float]) -> int:
    """Index of the coarsest level that is not coarser than wanted (by more than 2 %); level 0 where none is."""
    limit_y, limit_x = (ratio * (1 + LEVEL_TOLERANCE) for ratio in l0_per_px)
    fitting = [i for i, level in enumerate(levels) if level.downsample[0] <= limit_y and level.downsample[1] <= limit_x]
    return max(fitting, key=lambda i: levels[i].downsample, default=0)


_MOST_KEPT_BYTES = 64 << 20  # the source of a block of 64 tiles at half its resolution is 38 MB


class ReadBuffer(threading.local):
    """Memory for source pixels, a piece per thread, used again by its next read: fresh pages are not free."""

    def __init__(self) -> None:
        self._room = np.empty(0, np.uint8)

    def pixels(self, box: Box) -> np.ndarray:
        """(h, w, 3) uint8 of any content, valid until this thread's next call."""
        if box.area * 3 > _MOST_KEPT_BYTES:
            return np.empty((*box.shape, 3), np.uint8)
        if self._room.size < box.area * 3:
            self._room = np.empty(box.area * 3, np.uint8)
        return self._room[: box.area * 3].reshape(*box.shape, 3)


class Levels(Protocol):
    """What :func:`read_working` reads from; ``parts`` are all that matters of a box, None: all of it."""

    info: SlideInfo

    def read_level(
        self, level: int, box: Box, out: np.ndarray | None = None, parts: Sequence[Box] | None = None
    ) -> np.ndarray: ...

    def read_shrunk(
        self, level: int, box_px: Box, ratio: tuple[int, int], parts: Sequence[Box] | None
    ) -> np.ndarray | None:
        """Means of ``ratio`` pixels each, straight from the file's tiles; None where that cannot be."""


def read_working(
    levels: Levels, buffer: ReadBuffer, box_px: Box, mpp: Mpp, parts: Sequence[Box] | None = None
) -> np.ndarray:
    """Pixels of ``box_px`` at ``mpp`` → (h, w, 3) uint8: the best level, resampled once by area.

    Working pixel (y, x) is the mean over [y, y + 1) × [x, x + 1) times the ratio, in coordinates of the level from the
    slide's origin: it does not depend on the box. White outside is part of the mean. Of ``parts`` is all that matters.
    """
    slide_mpp = require_mpp(levels.info)
    l0_per_px = mpp.y / slide_mpp.y, mpp.x / slide_mpp.x
    index = best_level(levels.info.levels, l0_per_px)
    downsample = levels.info.levels[index].downsample
    ratio_y, ratio_x = (whole(f / d) for f, d in zip(l0_per_px, downsample, strict=True))
    if ratio_y == 1 and ratio_x == 1:
        return levels.read_level(index, box_px, parts=parts)

    from wsikernels.resample import resample_area, source_span  # Numba: paid for by the first resampled read

    seen = None if parts is None else [_under(part, ratio_y, ratio_x) for part in parts]
    if ratio_y.is_integer() and ratio_x.is_integer():
        shrunk = levels.read_shrunk(index, box_px, (int(ratio_y), int(ratio_x)), seen)
        if shrunk is not None:
            return shrunk
    (y0, y1), (x0, x1) = source_span(box_px.y0, box_px.y1, ratio_y), source_span(box_px.x0, box_px.x1, ratio_x)
    source = Box(y0, x0, y1, x1)
    out = np.empty((*box_px.shape, 3), np.uint8)
    if out.size:
        pixels = levels.read_level(index, source, buffer.pixels(source), seen)
        resample_area(pixels, y0, x0, ratio_y, ratio_x, box_px.y0, box_px.x0, out)
    return out


def _under(part_px: Box, ratio_y: float, ratio_x: float) -> Box:
    """What lies under some working pixels, and up to a pixel more."""
    y0, x0 = math.floor(part_px.y0 * ratio_y), math.floor(part_px.x0 * ratio_x)
    return Box(y0, x0, math.ceil(part_px.y1 * ratio_y), math.ceil(part_px.x1 * ratio_x))


def whole(ratio: float) -> float:
    """The ratio, or the integer that it is but for the last bits of two divisions."""
    nearest = round(ratio)
    return float(nearest) if nearest and math.isclose(ratio, nearest, rel_tol=1e-9) else ratio
