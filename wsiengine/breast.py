"""The breast in a mammogram: the one large bright thing on dark film.

Film is nearly black, but not evenly: scanned film is grey beside the black of what a scanner or an archive filled in,
and its edges, its label and tape are as bright as tissue. So the level of film is measured, what is brighter is cut off
from thin and small things by an opening, and the largest piece is the breast. Nothing is in µm: all lengths are shares
of the picture's longer side, so that mammograms of any pixel size, or of none that is known, are treated alike.

The muscle behind the breast (pectoral) stays in: see docs/mass.md.
"""

import cv2
import numpy as np

from wsiengine.geometry import Mpp
from wsiengine.slides.base import Slide
from wsiengine.slides.reading import require_mpp
from wsiengine.tissue import TissueMask, read_whole, tissue_lattice

SIDE_PX = 512
"""Mammograms are looked at with this longer side: a pixel is about 0.4 mm."""

_BLUR_PX = 2.0
_FILLED = 3  # levels up to here were filled in, or are film that saw no light
_WHITE = 250
_FILM_SHARE = 0.03  # of the picture, within three levels: film is even, and no tissue is
_ABOVE_FILM = 0.25  # of the way from the film's level to the level that parts it from tissue: where the skin begins
_STRIP = 0.03  # share of the longer side: edges of film are narrower along one axis,
_OPENING = 0.045  # and what hangs on the breast by less is a label or tape
_LEAST_SHARE = 0.02  # of the picture: a smaller piece is no breast


def breast_mask(slide: Slide) -> TissueMask:
    """Where the breast is, as the mask that tissue of a slide has.

    Raises:
        ResolutionError: The picture has no µm/px.
        UnreadableSlide: A part of it cannot be decoded.
    """
    size, mpp = slide.info.size_l0, require_mpp(slide.info)
    shrink = max(1.0, max(size.shape) / SIDE_PX)
    rgb = read_whole(slide, Mpp(mpp.y * shrink, mpp.x * shrink))
    found = find_breast(np.ascontiguousarray(rgb[..., 1]))
    lattice = tissue_lattice(size, mpp)
    rows, cols = (
        np.minimum(((np.arange(count) + 0.5) * step / shrink).astype(np.int64), most - 1)
        for count, step, most in zip(lattice.extent_px.shape, lattice.l0_per_px, found.shape, strict=True)
    )
    return TissueMask(np.ascontiguousarray(found[np.ix_(rows, cols)]), size, mpp)


def find_breast(grey: np.ndarray) -> np.ndarray:
    """Where the breast is.

    Args:
        grey: (rows, cols) uint8, bright tissue on dark film; its longer side about :data:`SIDE_PX`.

    Returns:
        (rows, cols) bool; nothing where no piece is large enough.
    """
    smooth = cv2.GaussianBlur(grey, (0, 0), _BLUR_PX, borderType=cv2.BORDER_REPLICATE)
    bright = (smooth > threshold(smooth)).astype(np.uint8)
    strip = max(3, round(_STRIP * max(grey.shape)) | 1)
    for shape in ((strip, 1), (1, strip)):  # beyond the picture is nothing: what runs along its border is narrow
        bright = _opened(bright, np.ones(shape, np.uint8), cv2.BORDER_CONSTANT)
    width = max(3, round(_OPENING * max(grey.shape)) | 1)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    opened = _opened(bright, disc, cv2.BORDER_REPLICATE)  # and here the breast goes on beyond it
    count, labels, facts, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
    if count < 2:
        return np.zeros(grey.shape, bool)
    largest = 1 + int(np.argmax(facts[1:, cv2.CC_STAT_AREA]))
    if facts[largest, cv2.CC_STAT_AREA] < _LEAST_SHARE * grey.size:
        return np.zeros(grey.shape, bool)
    return filled(labels == largest)


def _opened(mask: np.ndarray, element: np.ndarray, beyond: int) -> np.ndarray:
    """Without what the element does not fit into; ``beyond`` says what OpenCV takes to lie around the picture."""
    by = max(element.shape)
    wide = cv2.copyMakeBorder(mask, by, by, by, by, beyond, value=0)
    opened = cv2.morphologyEx(wide, cv2.MORPH_OPEN, element)
    return np.ascontiguousarray(opened[by:-by, by:-by])


def threshold(grey: np.ndarray) -> float:
    """The level above which a pixel is no film.

    White is left out of the count: frames and labels are, and would be parted from tissue instead of film.
    """
    counts = np.bincount(grey.ravel(), minlength=256)
    apart = _otsu(counts[:_WHITE])
    usual = np.convolve(counts, np.ones(3, np.int64), "same")
    usual[: _FILLED + 1] = 0
    film = int(np.argmax(usual[: apart + 1]))
    if usual[film] < _FILM_SHARE * grey.size:
        film = 0
    return film + _ABOVE_FILM * (apart - film)


def _otsu(counts: np.ndarray) -> int:
    """The level that parts a histogram into two with the least variance within (Otsu 1979)."""
    levels = np.arange(len(counts))
    below, sums = np.cumsum(counts), np.cumsum(counts * levels)
    above = below[-1] - below
    apart = (sums * below[-1] - sums[-1] * below).astype(np.float64) ** 2 / np.maximum(below * above, 1)
    return int(np.argmax(apart))


def filled(mask: np.ndarray) -> np.ndarray:
    """The mask without its holes: what no path of dark pixels leads to from the picture's border."""
    outside = np.pad((~mask).astype(np.uint8), 1, constant_values=1)
    _, labels = cv2.connectedComponents(outside, connectivity=4)
    found: np.ndarray = (labels != labels[0, 0])[1:-1, 1:-1]
    return found
