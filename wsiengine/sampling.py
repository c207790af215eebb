"""Pixels of tissue and of glass from all over a slide, at low cost: what stains are fitted to.

Places lie on a lattice fixed to the slide, evenly picked in reading order; no random numbers, nothing depends on blocks
or threads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wsiengine.geometry import Box, Mpp
from wsiengine.slides.base import Slide
from wsiengine.slides.reading import require_mpp

SAMPLE_UM = 1.0  # µm per sampled pixel: nuclei are still nuclei, and a level that most pyramids have nearby
PATCH_PX = 64
TISSUE_PATCHES = 256
GLASS_PATCHES = 48
_STEP = 2  # every second pixel of every second row


@dataclass(frozen=True, slots=True)
class Sample:
    """Colours (n, 3) uint8 of tissue and of bare glass."""

    tissue: np.ndarray
    glass: np.ndarray


def sample_slide(slide: Slide, mask: np.ndarray, mask_mpp: Mpp) -> Sample:
    """Sample a slide under its tissue mask.

    Args:
        slide: Read at up to 304 places of 64 × 64 µm.
        mask: (rows, cols) bool, its corner at the slide's.
        mask_mpp: µm per pixel of the mask.

    Raises:
        ResolutionError: The slide states no µm/px.
        UnreadableSlide: A sampled place cannot be decoded.
    """
    slide_mpp = require_mpp(slide.info)
    mpp = Mpp(max(SAMPLE_UM, slide_mpp.y), max(SAMPLE_UM, slide_mpp.x))
    ratio = mask_mpp.y / mpp.y, mask_mpp.x / mpp.x  # sampled pixels per pixel of the mask
    size = slide.info.size_l0
    extent = Box(0, 0, int(size.height * slide_mpp.y / mpp.y), int(size.width * slide_mpp.x / mpp.x))
    share = _shares(mask, extent, ratio)
    tissue = _evenly(extent, share >= 0.5, TISSUE_PATCHES)
    if len(tissue) < TISSUE_PATCHES:  # little tissue: its edges, too
        tissue = _evenly(extent, share > 0, TISSUE_PATCHES)
    glass = _evenly(extent, share == 0, GLASS_PATCHES)
    return Sample(
        _colours(slide, tissue, mpp, lambda patch: _under(mask, patch, ratio)),
        _colours(slide, glass, mpp, lambda patch: ~_under(mask, patch, ratio)),
    )


def _under(mask: np.ndarray, patch: Box, ratio: tuple[float, float]) -> np.ndarray:
    """The mask at the sampled pixels of a patch, bool (h, w)."""
    rows = ((np.arange(patch.y0, patch.y1, _STEP) + 0.5) / ratio[0]).astype(np.int64)
    cols = ((np.arange(patch.x0, patch.x1, _STEP) + 0.5) / ratio[1]).astype(np.int64)
    return mask[np.ix_(np.minimum(rows, mask.shape[0] - 1), np.minimum(cols, mask.shape[1] - 1))]


def _shares(mask: np.ndarray, extent: Box, ratio: tuple[float, float]) -> np.ndarray:
    """Share of tissue in every patch, (patch rows, patch cols), from a summed-area table of the mask."""
    table = np.pad(mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1), ((1, 0), (1, 0)))
    edges = []
    for length, per, count in zip(extent.shape, ratio, mask.shape, strict=True):
        ends = np.minimum(np.arange(0, length + PATCH_PX, PATCH_PX), length) / per
        edges.append((np.minimum(np.floor(ends[:-1]), count - 1).astype(int), np.minimum(np.ceil(ends[1:]), count)))
    (top, bottom), (left, right) = ((a, b.astype(int)) for a, b in edges)
    total = table[np.ix_(bottom, right)] - table[np.ix_(top, right)] - table[np.ix_(bottom, left)]
    return (total + table[np.ix_(top, left)]) / np.outer(bottom - top, right - left)


def _evenly(extent: Box, wanted: np.ndarray, most: int) -> list[Box]:
    """At most so many of the wanted patches, evenly spaced in reading order."""
    places = np.argwhere(wanted) * PATCH_PX
    count = min(len(places), most)
    corners = places[np.arange(count) * len(places) // max(count, 1)].tolist()
    return [Box(y, x, y + PATCH_PX, x + PATCH_PX).intersect(extent) for y, x in corners]


def _colours(slide: Slide, patches: list[Box], mpp: Mpp, wanted: Callable[[Box], np.ndarray]) -> np.ndarray:
    parts = [slide.read(patch, mpp)[::_STEP, ::_STEP][wanted(patch)] for patch in patches]
    return np.concatenate([np.empty((0, 3), np.uint8), *parts])
