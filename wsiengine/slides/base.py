"""What every way of reading a slide offers: facts (:class:`SlideInfo`) and pixels (:class:`Slide`)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from wsiengine.geometry import Box, Mpp, Size


@dataclass(frozen=True, slots=True)
class Level:
    """One level of the pyramid."""

    size: Size
    downsample: tuple[float, float]  # (y, x) ≥ 1, level-0 pixels per pixel of this level


def levels_of(sizes: Sequence[Size]) -> tuple[Level, ...]:
    """Levels from their sizes, the full one first.

    Writers round level sizes, so that the ratio of sizes is not the downsample (11,952 / 2,988 = 4, 10,249 / 2,562 =
    4.0004). Where an integer explains both sides it is taken: in doubt a power of two, or a multiple of the level
    before, or the nearest.
    """
    levels: list[Level] = []
    for size in sizes:
        levels.append(Level(size, _downsample(sizes[0], size, levels[-1].downsample[0] if levels else 1)))
    return tuple(levels)


def _downsample(full: Size, size: Size, before: float) -> tuple[float, float]:
    ratio_y, ratio_x = full.height / size.height, full.width / size.width
    ratio = math.sqrt(ratio_y * ratio_x)
    explains = [
        whole
        for whole in range(max(1, math.floor(ratio * 0.9)), math.ceil(ratio * 1.1) + 1)
        if abs(full.height - whole * size.height) < whole and abs(full.width - whole * size.width) < whole
    ]
    if not explains:
        return ratio_y, ratio_x
    best = min(explains, key=lambda whole: (whole & (whole - 1) != 0, whole % before != 0, abs(whole - ratio)))
    return float(best), float(best)


@dataclass(frozen=True, slots=True)
class SlideInfo:
    """Facts about a slide; nothing that identifies a patient.

    ``mpp`` is what may be relied on: None where the file states nothing or nonsense (then ``stated_mpp`` keeps the
    nonsense, for messages). ``bounds_l0`` is the scanned part where the file states one (``openslide.bounds-*``):
    QuPath's origin is its corner. ``channels`` names the dyes where the three channels are not red, green and blue
    light (fluorescence).
    """

    format: str  # as a person says it: "Aperio SVS, JPEG"
    reader: str  # "direct", "openslide", "tiffslide", "flat"
    size_l0: Size
    levels: tuple[Level, ...]
    mpp: Mpp | None
    objective: float | None = None
    bounds_l0: Box | None = None
    associated: tuple[str, ...] = field(default=())  # names only; the label image is never read
    stated_mpp: Mpp | None = None
    channels: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True, eq=False)
class FileTile:
    """A tile of the file: its corner in pixels of its level, and its pixels (h, w, 3) uint8, which may reach beyond the
    level and are good until the next tile is asked for; None of a tile that was left out."""

    y: int
    x: int
    pixels: np.ndarray | None


class LevelReader(Protocol):
    """One way of reading a file, thread-safe: facts, and pixels that lie inside a level. Knows nothing of µm/px."""

    info: SlideInfo

    def read_into(self, level: int, box: Box, out: np.ndarray) -> None:
        """Fill ``out`` ((h, w, 3) uint8, rows may be strided) with ``box``, which lies inside the level.

        Raises:
            UnreadableSlide: A part of the box cannot be decoded.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class TileReader(LevelReader, Protocol):
    """A reader of a file that is a plain grid of tiles: it gives them one by one, as they are decoded."""

    def tile_px(self, level: int) -> Size: ...

    def tiles(self, level: int, box: Box, parts: Sequence[Box] | None = None) -> Iterator[FileTile]:
        """The file tiles under ``box``, which lies inside the level. Of ``parts``, where given, is all that matters of
        it: tiles that touch none of them are not decoded.

        Raises:
            UnreadableSlide: One of them cannot be decoded.
        """
        ...


@runtime_checkable
class PartReader(Protocol):
    """A slide that need not read all of a box."""

    def read_parts(self, box_px: Box, mpp: Mpp, parts: Sequence[Box]) -> np.ndarray:
        """As :meth:`Slide.read`, right in ``parts`` (working pixels, inside the box); elsewhere anything, white say."""
        ...


@runtime_checkable
class Deep(Protocol):
    """A picture whose 12 or 16 bits can be had, too."""

    def read_deep(self, box_px: Box, mpp: Mpp) -> np.ndarray: ...


def read_deep(slide: object, box_px: Box, mpp: Mpp) -> np.ndarray:
    """The values of a deep grey picture, (h, w, 1) uint16.

    Raises:
        ValueError: It has none.
    """
    if not isinstance(slide, Deep):
        raise ValueError(f"{slide} has no values beyond 8 bits")
    return slide.read_deep(box_px, mpp)


@runtime_checkable
class Slide(Protocol):
    """An open slide. Thread-safe; pickles as its path and options and re-opens in a worker.

    Pixels are uint8 RGB arrays (rows, cols, 3) as the file stores them: embedded colour (ICC) profiles are not applied.
    Outside the slide is white (255).
    """

    path: str
    info: SlideInfo

    def read_level(self, level: int, box: Box) -> np.ndarray:
        """Pixels of ``box`` (in pixels of that level; may lie partly or wholly outside) → (h, w, 3) uint8."""
        ...

    def read(self, box_px: Box, mpp: Mpp) -> np.ndarray:
        """Pixels of ``box_px`` (working pixels at ``mpp``, origin of the slide) → (h, w, 3) uint8.

        Read from the best level and resampled once, by area. The same pixel has the same value however the box is cut.

        Raises:
            ResolutionError: The slide states no µm/px.
            UnreadableSlide: A file tile in the box cannot be decoded.
        """
        ...

    def fingerprint(self) -> str:
        """sha256 (hex) over sizes, tile tables, first and last MiB: never of path or time."""
        ...

    def close(self) -> None: ...
