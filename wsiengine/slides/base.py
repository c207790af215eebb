"""What every way of reading a slide offers: facts (:class:`SlideInfo`) and pixels (:class:`Slide`)."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from wsiengine.geometry import Box, Mpp, Size


@dataclass(frozen=True, slots=True)
class Level:
    """One level of the pyramid."""

    size: Size
    downsample: tuple[float, float]  # (y, x) ≥ 1, level-0 pixels per pixel of this level


@dataclass(frozen=True, slots=True)
class SlideInfo:
    """Facts about a slide; nothing that identifies a patient.

    ``bounds_l0`` is the scanned part where the file states one (``openslide.bounds-*``): QuPath's origin is its corner.
    """

    format: str  # as a person says it: "Aperio SVS, JPEG"
    reader: str  # "direct", "openslide", "tiffslide", "flat"
    size_l0: Size
    levels: tuple[Level, ...]
    mpp: Mpp | None
    objective: float | None = None
    bounds_l0: Box | None = None
    associated: tuple[str, ...] = field(default=())  # names only; the label image is never read


@runtime_checkable
class Slide(Protocol):
    """An open slide. Thread-safe; pickles as its path and options and re-opens in a worker.

    Pixels are uint8 RGB arrays (rows, cols, 3). Outside the slide is white (255).
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
