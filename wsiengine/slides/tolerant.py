"""Reading on where a slide is damaged, on request only: what cannot be decoded is white, and is told."""

from collections.abc import Callable

import numpy as np

from wsiengine.errors import UnreadableSlide
from wsiengine.geometry import Box, Mpp
from wsiengine.slides.base import Slide, SlideInfo, read_deep
from wsiengine.slides.white import WHITE

PIECE_PX = 128  # damage is confined to pieces of this side, on a grid fixed to the slide's origin


class TolerantSlide:
    """A slide whose unreadable parts are white. Everything else is as the slide within reads it.

    Args:
        slide: What is read.
    """

    def __init__(self, slide: Slide) -> None:
        self._slide = slide
        self.path = slide.path
        self.info: SlideInfo = slide.info

    def read_level(self, level: int, box: Box) -> np.ndarray:
        """As the slide, with white for what cannot be decoded."""
        return _mend(box, lambda piece: self._slide.read_level(level, piece))[0]

    def read(self, box_px: Box, mpp: Mpp) -> np.ndarray:
        """As the slide, with white for what cannot be decoded."""
        return self.read_marked(box_px, mpp)[0]

    def read_marked(self, box_px: Box, mpp: Mpp) -> tuple[np.ndarray, np.ndarray | None]:
        """Pixels, and where they are not the slide's: bool (h, w), or None where all could be read."""
        return _mend(box_px, lambda piece: self._slide.read(piece, mpp))

    def read_deep(self, box_px: Box, mpp: Mpp) -> np.ndarray:
        """As the picture within: one that is held whole was decoded before."""
        return read_deep(self._slide, box_px, mpp)

    def fingerprint(self) -> str:
        return self._slide.fingerprint()

    def close(self) -> None:
        self._slide.close()


def _mend(box: Box, read: Callable[[Box], np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Read ``box`` at once, or where that fails piece by piece."""
    try:
        return read(box), None
    except UnreadableSlide:
        pixels = np.full((*box.shape, 3), WHITE, np.uint8)
        bad = np.zeros(box.shape, bool)
    aligned = Box(box.y0 // PIECE_PX * PIECE_PX, box.x0 // PIECE_PX * PIECE_PX, box.y1, box.x1)
    for piece in aligned.pieces(PIECE_PX, PIECE_PX):
        # The whole piece, whatever of it is wanted: what is bad must not depend on how the slide is cut into blocks.
        whole = Box(piece.y0, piece.x0, piece.y0 + PIECE_PX, piece.x0 + PIECE_PX)
        part = piece.intersect(box)
        try:
            pixels[part.relative_to(box).slices] = read(whole)[part.relative_to(whole).slices]
        except UnreadableSlide:
            bad[part.relative_to(box).slices] = True
    return pixels, bad
