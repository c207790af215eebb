"""Which pixels of a slide at about 8 µm/px are tissue: pure functions of an RGB array.

Everything is measured as optical density against the slide's own glass, od = ln(glass / pixel) per channel, and the
thresholds are fixed in that unit. A threshold found in the histogram (Otsu's and its kin) cuts a slide without glass in
half and finds tissue on an empty one; a fixed density does neither.

1. Glass: the brightest flat, nearly neutral colour that covers enough of the slide. The white that scanners and mosaics
   fill in is known apart (a slide can show both).
2. Ink: pen and border pixels are told from stain by the ratio of their three densities (haematoxylin, eosin, DAB and
   their mixtures never absorb green least, and are never black over a large area), then by size and by what surrounds
   them.
3. Stain: the mean density, smoothed, but at most four times the colour (largest less smallest density) around it, so
   that grey things (shadows, dust, hairs, the rims of bubbles) do not count. The mean density gives the outline because
   JPEG keeps it sharp: at 8 µm/px the halved colour planes of a stored level smear colour by 16 µm. Two thresholds.
4. Specks, fibres and holes by µm.

Arrays are worked through in strips of rows, and connected parts are put together from them
(:mod:`wsiengine.parts`): beside the pixels themselves a slide takes some 4 bytes a pixel, whatever it shows. All that
is as large as the slide comes from a :class:`~wsiengine.scratch.Scratch`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from wsiengine.parts import Parts, keep, label_parts
from wsiengine.scratch import IN_MEMORY, Scratch, strips

BLUR_UM = 10.0  # joins the cells of loose tissue, averages JPEG noise
COLOUR_UM = 32.0  # where colour is looked for: blue and brown cells side by side are not grey
COLOUR_GAIN = 4.0
WEAK_OD = 0.025  # pale tissue at its edge; glass varies by 0.004–0.01
EDGE_UM = 16.0  # how far away dark tissue is looked for;
EDGE_SHARE, EDGE_OD = 0.3, 0.05  # it ends where the density falls to this share of it, at most to this density
FIRM_OD = 0.035  # a piece of tissue has this over more than a fibre's width …
STRONG_OD = 0.05  # … and reaches this somewhere
SPECK_UM2 = 8_000.0  # a disc of 100 µm: less is dust or a few loose cells
FIBRE_UM = 56.0  # a piece nowhere thicker than this is a hair or a thread
HOLE_UM2 = 20_000.0  # lumina and fat belong to the tissue, tears and large cavities do not
INK_UM2 = 20_000.0  # a pen's dot is larger; less is pigment, blood, dirt
FRINGE_UM = 60.0  # how far a stroke's pale edge reaches

_STRIP_PX = 1 << 18  # pixels worked on at once: stays in the cache
_GLASS_SAMPLE = 1 << 20  # pixels looked at for the colour of glass
_FILLED = 252.0  # mean of the channels: brighter is filled in by software (and JPEG), not seen through glass
_DARKEST = np.float32(16)  # below is noise: ratios of densities mean nothing
_LN = np.log(np.maximum(np.arange(256, dtype=np.float32), _DARKEST))
_VIVID, _BLACK, _RED, _FRINGE, _STAINED = (np.uint8(1 << bit) for bit in range(5))
_TISSUE, _STRONG, _FIRM = (np.uint8(1 << bit) for bit in range(3))


@dataclass(frozen=True, slots=True)
class Glass:
    """The slide's background: ``colour`` (r, g, b), and the share of the slide that shows it."""

    colour: tuple[float, float, float]
    share: float


def segment(rgb: np.ndarray, pixel_um: float, scratch: Scratch = IN_MEMORY) -> np.ndarray:
    """Tissue of a slide: (rows, cols, 3) uint8 RGB at ``pixel_um`` µm/px → (rows, cols) bool, from ``scratch``."""
    if not rgb.size:
        return np.zeros(rgb.shape[:2], bool)
    rows, cols = rgb.shape[:2]
    if min(rows, cols) < 8:  # OpenCV takes an array of one pixel for a number
        rgb = np.pad(rgb, ((0, max(0, 8 - rows)), (0, max(0, 8 - cols)), (0, 0)), mode="edge")
        return segment(rgb, pixel_um)[:rows, :cols]
    glass = find_glass(rgb).colour
    ink = find_ink(classify(rgb, glass, scratch), pixel_um, scratch)
    evidence = _evidence(rgb, glass, (ink, pixel_um), scratch)
    return _fill_holes(_pieces(evidence, pixel_um, scratch), ink, pixel_um, scratch)


# --- glass ---------------------------------------------------------------------------------------


def find_glass(rgb: np.ndarray) -> Glass:
    """The background's colour; white where only that is filled in, a plain 245 where there is neither."""
    step = max(1, rgb.shape[0] * rgb.shape[1] // _GLASS_SAMPLE)
    pixels = rgb.shape[0] * len(range(0, rgb.shape[1], step))
    enough = max(12, 0.002 * pixels)
    parts = [_bright_and_flat(rgb[rows], step) for rows in _strips(rgb.shape)]
    filled = sum(count for _, count in parts)
    colours = np.concatenate([part for part, _ in parts])  # (n, 3)
    red, green, blue = colours.T  # numpy is ten times slower along an axis of three
    tint = _LN[np.maximum(np.maximum(red, green), blue)] - _LN[np.minimum(np.minimum(red, green), blue)]
    # Beside filled-in white, a pale colour may be pale tissue. A tinted lamp is believed where it covers much.
    usable = tint <= (0.05 if filled > 0.01 * pixels else 0.12)
    if not filled and usable.sum() < 0.3 * pixels <= (tint <= 0.25).sum():
        usable = tint <= 0.25
    colours = colours[usable]
    if len(colours) < enough:
        return Glass((255.0, 255.0, 255.0), filled / pixels) if filled >= enough else Glass((245.0, 245.0, 245.0), 0.0)
    red, green, blue = colours.T.astype(np.float64)
    grey = np.rint((red + green + blue) / 3).astype(np.int64)
    counts = np.bincount(grey, minlength=258)
    near = counts + np.roll(counts, 1) + np.roll(counts, -1)
    counted = min(max(enough, 0.2 * near.max()), near.max())  # of scattered colours none may be enough by itself
    bright = int(np.flatnonzero(near >= counted)[-1])  # the brightest that counts, …
    peak = bright - 4 + int(np.argmax(near[bright - 4 : bright + 1]))  # … at its summit
    red, green, blue = colours[np.abs(grey - peak) <= 3].mean(axis=0)  # a mean has fractions of a level
    return Glass((float(red), float(green), float(blue)), len(colours) / pixels)


def _bright_and_flat(rgb: np.ndarray, step: int) -> tuple[np.ndarray, int]:
    """Colours (n, 3) of pixels that may be glass (5 × 5 px alike to 2 levels), and the count of filled-in ones.

    Of every ``step``-th column only.
    """
    grey = cv2.transform(rgb.astype(np.float32), np.full((1, 3), 1 / 3, np.float32))
    mean = cv2.blur(grey, (5, 5), borderType=cv2.BORDER_REPLICATE)
    square = cv2.sqrBoxFilter(grey, cv2.CV_32F, (5, 5), borderType=cv2.BORDER_REPLICATE)
    flat = (square - mean * mean)[:, ::step] <= 4.0
    rgb = rgb[:, ::step]
    filled = grey[:, ::step] >= _FILLED
    bright = (rgb[..., 0] >= 190) & (rgb[..., 1] >= 190) & (rgb[..., 2] >= 190)
    return rgb[flat & ~filled & bright], int(np.count_nonzero(filled))


# --- stain ---------------------------------------------------------------------------------------


def stain(rgb: np.ndarray, glass: tuple[float, float, float], pixel_um: float, rows: slice | None = None) -> np.ndarray:
    """How stained each pixel of ``rows`` is, smoothed: (rows, cols) float32, a density, at least 0."""
    rows = rows or slice(0, rgb.shape[0])
    reach = [math.ceil(4 * um / pixel_um) + 1 for um in (BLUR_UM, COLOUR_UM)]
    smooth, pixels = _Widened(rows, reach[1], len(rgb)), _Widened(rows, sum(reach), len(rgb))
    blurred = rgb[pixels.rows].astype(np.float32)
    cv2.GaussianBlur(blurred, (0, 0), BLUR_UM / pixel_um, dst=blurred, borderType=cv2.BORDER_REPLICATE)
    red, green, blue = (
        np.float32(np.log(value)) - cv2.log(np.maximum(plane, _DARKEST))
        for plane, value in zip(cv2.split(blurred[pixels.within(smooth.rows)]), glass, strict=True)
    )
    colour = cv2.max(cv2.max(red, green), blue) - cv2.min(cv2.min(red, green), blue)
    cv2.GaussianBlur(colour, (0, 0), COLOUR_UM / pixel_um, dst=colour, borderType=cv2.BORDER_REPLICATE)
    colour *= COLOUR_GAIN
    density = (red + green + blue) / 3
    return np.clip(density, 0, colour, out=density)[smooth.within(rows)]


def _evidence(
    rgb: np.ndarray, glass: tuple[float, float, float], without: tuple[np.ndarray, float], scratch: Scratch
) -> np.ndarray:
    """What speaks for tissue: (rows, cols) uint8, a bit each for tissue-like, strong, and firm over a fibre's width.

    ``without``: the ink, and the µm of a pixel.
    """
    ink, pixel_um = without
    found = scratch.zeros(rgb.shape[:2], np.uint8)
    edge, width = 2 * round(EDGE_UM / pixel_um) + 1, round(FIBRE_UM / pixel_um)
    for rows in _strips(rgb.shape):
        eroded = _Widened(rows, width, len(rgb))
        dilated = _Widened(eroded.rows, edge, len(rgb))
        strength = stain(rgb, glass, pixel_um, dilated.rows)
        darkest = cv2.dilate(strength, np.ones((edge, edge), np.uint8))
        tissue = strength > np.clip(np.float32(EDGE_SHARE) * darkest, WEAK_OD, EDGE_OD)
        tissue &= ~ink[dilated.rows]
        firm = (strength > FIRM_OD) & tissue
        strong = (strength > STRONG_OD) & tissue
        tissue, firm, strong = (mask[dilated.within(eroded.rows)] for mask in (tissue, firm, strong))
        firm = cv2.erode(firm.view(np.uint8), np.ones((width, width), np.uint8)) > 0
        found[rows] = (tissue * _TISSUE | strong * _STRONG | firm * _FIRM)[eroded.within(rows)]
    return found


# --- ink -----------------------------------------------------------------------------------------


def classify(rgb: np.ndarray, glass: tuple[float, float, float], scratch: Scratch = IN_MEMORY) -> np.ndarray:
    """What each pixel may be: (rows, cols) uint8, a bit each for vivid ink, black, red ink, fringe of ink, stained."""
    kinds = scratch.zeros(rgb.shape[:2], np.uint8)
    tables = [np.float32(np.log(value)) - _LN for value in glass]
    for rows in _strips(rgb.shape):
        planes = zip(cv2.split(rgb[rows]), tables, strict=True)
        kinds[rows] = _classify_strip(*(cv2.LUT(plane, table) for plane, table in planes))
    return kinds


def _classify_strip(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """``classify`` of three planes of density."""
    most, least = cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)
    mean, colour = (red + green + blue) / 3, most - least
    green_hue = (green < 0.85 * blue) & (green < 0.7 * red)  # no stain of H&E or DAB absorbs green least
    blue_hue = (green > blue) & (green < 1.05 * red)
    vivid = green_hue & (colour > 0.15)
    vivid |= blue_hue & (red > 0.6) & (blue < 0.35 * red)
    vivid |= (blue > 0.4) & (green < 0.3 * blue)  # yellow
    black = (mean > 1.0) & ((colour < 0.25 * mean) | (least > 1.8))
    red_ink = (green > 0.8) & (red < 0.15 * green) & (blue > 0.7 * green)
    fringe = cv2.max(colour, mean) < 0.25
    fringe |= (colour < 0.15 * mean) | (green_hue & (colour > 0.04)) | (blue_hue & (blue < 0.5 * red))
    fringe |= (red < 0.2 * green) & (blue > 0.65 * green)
    stained = cv2.min(mean, colour) > STRONG_OD
    return vivid * _VIVID | black * _BLACK | red_ink * _RED | fringe * _FRINGE | stained * _STAINED


def find_ink(kinds: np.ndarray, pixel_um: float, scratch: Scratch = IN_MEMORY) -> np.ndarray:
    """Pen strokes, black borders and fills, with their fringes: (rows, cols) uint8 of ``classify`` → bool.

    Black and red occur in tissue too (melanin, carbon, folds, blood): there they are enclosed by it.
    """
    if not any((kinds[rows] & (_VIVID | _BLACK | _RED)).any() for rows in strips(kinds.shape)):
        return scratch.zeros(kinds.shape, bool)
    ink = _large(kinds, _VIVID, pixel_um, scratch)
    for kind in (_BLACK, _RED):
        outside = _outside_tissue(_large(kinds, kind, pixel_um, scratch), (kinds, kind, ink), pixel_um, scratch)
        for rows in strips(ink.shape):
            ink[rows] |= outside[rows]
    if not ink.any():
        return ink
    with_fringe = _dilated(ink, FRINGE_UM / pixel_um, scratch)
    for rows in strips(ink.shape):
        with_fringe[rows] &= kinds[rows] & (_FRINGE | _VIVID | _BLACK | _RED) > 0
        with_fringe[rows] |= ink[rows]
    return _dilated(with_fringe, 1, scratch)


def _large(kinds: np.ndarray, kind: np.uint8, pixel_um: float, scratch: Scratch) -> np.ndarray:
    """The connected parts of at least ``INK_UM2`` of one kind."""

    def large(parts: Parts) -> np.ndarray:
        return parts.area * pixel_um**2 >= INK_UM2

    in_all = sum(int(np.count_nonzero(kinds[rows] & kind)) for rows in strips(kinds.shape))
    if in_all * pixel_um**2 < INK_UM2:
        return scratch.zeros(kinds.shape, bool)
    return keep(kinds.shape, lambda rows: (kinds[rows] & kind) > 0, large, scratch=scratch)


def _outside_tissue(
    ink: np.ndarray, beside: tuple[np.ndarray, np.uint8, np.ndarray], pixel_um: float, scratch: Scratch
) -> np.ndarray:
    """The parts of ``ink`` that touch the slide's border, or that tissue does not enclose for the most part.

    ``beside``: what each pixel may be, the kind that this ink is of, and ink known before; the rest may be tissue.
    """
    if not ink.any():
        return ink
    kinds, kind, known = beside
    parts = label_parts(ink.shape, lambda rows: ink[rows], scratch=scratch)
    radius = round(FRINGE_UM / pixel_um)
    box = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    inside, around = np.zeros(parts.count, np.int64), np.zeros(parts.count, np.int64)
    for rows in strips(ink.shape):
        wide = _Widened(rows, radius, len(ink))
        near = cv2.dilate(parts.labels(wide.rows).astype(np.float32), box)[wide.within(rows)].astype(np.int32)
        near[ink[rows]] = 0
        around += np.bincount(near.ravel(), minlength=parts.count)
        tissue = (kinds[rows] & (_STAINED | _FRINGE | kind) == _STAINED) & ~known[rows]
        inside += np.bincount(near[tissue], minlength=parts.count)
    return parts.chosen(~(inside > 0.6 * around) | parts.at_border)


# --- pieces and holes ----------------------------------------------------------------------------


def _pieces(evidence: np.ndarray, pixel_um: float, scratch: Scratch) -> np.ndarray:
    """The connected parts of tissue that are large enough, thicker than a fibre, and hold a strong pixel."""
    parts = label_parts(evidence.shape, lambda rows: (evidence[rows] & _TISSUE) > 0, scratch=scratch)
    speck_px = min(SPECK_UM2 / pixel_um**2, evidence.size / 4)  # a slide smaller than a speck may still be tissue
    strong, firm = np.zeros(parts.count, bool), np.zeros(parts.count, bool)
    for rows in strips(evidence.shape):
        labels = parts.labels(rows)
        strong[labels[(evidence[rows] & _STRONG) > 0]] = True
        firm[labels[(evidence[rows] & _FIRM) > 0]] = True
    return parts.chosen((parts.area >= speck_px) & strong & firm)


def _fill_holes(mask: np.ndarray, ink: np.ndarray, pixel_um: float, scratch: Scratch) -> np.ndarray:
    """``mask`` with enclosed holes smaller than ``HOLE_UM2`` filled, in place; ink is never filled in."""

    def small_and_enclosed(parts: Parts) -> np.ndarray:
        return (parts.area * pixel_um**2 < HOLE_UM2) & ~parts.at_border

    holes = keep(mask.shape, lambda rows: ~mask[rows], small_and_enclosed, connectivity=4, scratch=scratch)
    for rows in strips(mask.shape):
        mask[rows] |= holes[rows] & ~ink[rows]
    return mask


# --- helpers -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Widened:
    """``rows`` and what is read beside them: up to ``reach`` rows more on either side, of ``count``."""

    core: slice
    reach: int
    count: int

    @property
    def rows(self) -> slice:
        return slice(max(self.core.start - self.reach, 0), min(self.core.stop + self.reach, self.count))

    def within(self, rows: slice) -> slice:
        """``rows`` as counted in an array of the widened ones."""
        return slice(rows.start - self.rows.start, min(rows.stop, self.count) - self.rows.start)


def _strips(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows that hold about ``_STRIP_PX`` pixels each."""
    return strips(shape[:2], _STRIP_PX)


def _dilated(mask: np.ndarray, radius: float, scratch: Scratch) -> np.ndarray:
    size = 2 * round(radius) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    out = scratch.zeros(mask.shape, bool)
    for rows in strips(mask.shape):
        wide = _Widened(rows, size, len(mask))
        out[rows] = cv2.dilate(mask[wide.rows].view(np.uint8), kernel)[wide.within(rows)]
    return out
