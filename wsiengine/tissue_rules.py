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

Arrays are worked through in strips of rows: a whole glass slide (29 million pixels) needs some 20 bytes a pixel.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

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


@dataclass(frozen=True, slots=True)
class Glass:
    """The slide's background: ``colour`` (r, g, b), and the share of the slide that shows it."""

    colour: tuple[float, float, float]
    share: float


def segment(rgb: np.ndarray, pixel_um: float) -> np.ndarray:
    """Tissue of a slide: (rows, cols, 3) uint8 RGB at ``pixel_um`` µm/px → (rows, cols) bool."""
    if not rgb.size:
        return np.zeros(rgb.shape[:2], bool)
    rows, cols = rgb.shape[:2]
    if min(rows, cols) < 8:  # OpenCV takes an array of one pixel for a number
        rgb = np.pad(rgb, ((0, max(0, 8 - rows)), (0, max(0, 8 - cols)), (0, 0)), mode="edge")
        return segment(rgb, pixel_um)[:rows, :cols]
    glass = find_glass(rgb).colour
    ink = find_ink(classify(rgb, glass), pixel_um)
    return _fill_holes(_pieces(stain(rgb, glass, pixel_um), ink, pixel_um), ink, pixel_um)


# --- glass ---------------------------------------------------------------------------------------


def find_glass(rgb: np.ndarray) -> Glass:
    """The background's colour; white where only that is filled in, a plain 245 where there is neither."""
    step = max(1, rgb.shape[0] * rgb.shape[1] // _GLASS_SAMPLE)
    pixels = rgb.shape[0] * len(range(0, rgb.shape[1], step))
    enough = max(12, 0.002 * pixels)
    parts = [_bright_and_flat(rgb[rows], step) for rows in _strips(rgb.shape)]
    filled = sum(count for _, count in parts)
    colours = np.concatenate([part for part, _ in parts])  # (n, 3)
    tint = _LN[colours.max(axis=1)] - _LN[colours.min(axis=1)] if len(colours) else np.zeros(0)
    # Beside filled-in white, a pale colour may be pale tissue. A tinted lamp is believed where it covers much.
    usable = tint <= (0.05 if filled > 0.01 * pixels else 0.12)
    if not filled and usable.sum() < 0.3 * pixels <= (tint <= 0.25).sum():
        usable = tint <= 0.25
    colours = colours[usable]
    if len(colours) < enough:
        return Glass((255.0, 255.0, 255.0), filled / pixels) if filled >= enough else Glass((245.0, 245.0, 245.0), 0.0)
    grey = np.rint(colours.mean(axis=1)).astype(np.int64)
    counts = np.bincount(grey, minlength=258)
    near = counts + np.roll(counts, 1) + np.roll(counts, -1)
    bright = int(np.flatnonzero(near >= max(enough, 0.2 * near.max()))[-1])  # the brightest that counts, …
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
    return rgb[flat & ~filled & (rgb.min(axis=-1) >= 190)], int(np.count_nonzero(filled))


# --- stain ---------------------------------------------------------------------------------------


def stain(rgb: np.ndarray, glass: tuple[float, float, float], pixel_um: float) -> np.ndarray:
    """How stained each pixel is, smoothed: (rows, cols) float32, a density, at least 0."""
    density, colour = np.empty(rgb.shape[:2], np.float32), np.empty(rgb.shape[:2], np.float32)
    sigma = BLUR_UM / pixel_um
    halo = math.ceil(4 * sigma) + 1
    for rows in _strips(rgb.shape):
        first = max(rows.start - halo, 0)
        strip = rgb[first : rows.stop + halo].astype(np.float32)
        cv2.GaussianBlur(strip, (0, 0), sigma, dst=strip, borderType=cv2.BORDER_REPLICATE)
        inner = strip[rows.start - first :][: rows.stop - rows.start]
        red, green, blue = (
            np.float32(np.log(value)) - cv2.log(np.maximum(plane, _DARKEST))
            for plane, value in zip(cv2.split(inner), glass, strict=True)
        )
        density[rows] = (red + green + blue) / 3
        colour[rows] = cv2.max(cv2.max(red, green), blue) - cv2.min(cv2.min(red, green), blue)
    cv2.GaussianBlur(colour, (0, 0), COLOUR_UM / pixel_um, dst=colour, borderType=cv2.BORDER_REPLICATE)
    colour *= COLOUR_GAIN
    return np.clip(density, 0, colour, out=density)


# --- ink -----------------------------------------------------------------------------------------


def classify(rgb: np.ndarray, glass: tuple[float, float, float]) -> np.ndarray:
    """What each pixel may be: (rows, cols) uint8, a bit each for vivid ink, black, red ink, fringe of ink, stained."""
    kinds = np.empty(rgb.shape[:2], np.uint8)
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


def find_ink(kinds: np.ndarray, pixel_um: float) -> np.ndarray:
    """Pen strokes, black borders and fills, with their fringes: (rows, cols) uint8 of ``classify`` → bool.

    Black and red occur in tissue too (melanin, carbon, folds, blood): there they are enclosed by it.
    """
    if not (kinds & (_VIVID | _BLACK | _RED)).any():
        return np.zeros(kinds.shape, bool)
    ink = _large(kinds & _VIVID, pixel_um)
    for kind in (_BLACK, _RED):
        tissue = (kinds & (_STAINED | _FRINGE | kind) == _STAINED) & ~ink
        ink |= _outside_tissue(_large(kinds & kind, pixel_um), tissue, pixel_um)
    if not ink.any():
        return ink
    near = _dilate(ink, FRINGE_UM / pixel_um)
    return _dilate(ink | (near & (kinds & (_FRINGE | _VIVID | _BLACK | _RED) > 0)), 1)


def _large(bits: np.ndarray, pixel_um: float) -> np.ndarray:
    """The connected parts of at least ``INK_UM2``."""
    return _keep(bits, lambda stats: stats[:, cv2.CC_STAT_AREA] * pixel_um**2 >= INK_UM2)


def _outside_tissue(ink: np.ndarray, tissue: np.ndarray, pixel_um: float) -> np.ndarray:
    """The parts of ``ink`` that touch the slide's border, or that tissue does not enclose for the most part."""
    if not ink.any():
        return ink
    count, labels, stats, _ = cv2.connectedComponentsWithStats(ink.view(np.uint8), connectivity=8)
    reach = 2 * round(FRINGE_UM / pixel_um) + 1
    around = cv2.dilate(labels.astype(np.float32), np.ones((reach, reach), np.uint8)).astype(np.int32)
    around[ink] = 0
    enclosed = np.bincount(around[tissue], minlength=count) > 0.6 * np.bincount(around.ravel(), minlength=count)
    keep = ~enclosed | _at_border(stats, ink.shape)
    keep[0] = False
    return keep[labels]


# --- pieces and holes ----------------------------------------------------------------------------


def _pieces(stain: np.ndarray, ink: np.ndarray, pixel_um: float) -> np.ndarray:
    """The connected parts of stain that are large enough, thicker than a fibre, and hold a strong pixel."""
    side = 2 * round(EDGE_UM / pixel_um) + 1
    darkest = cv2.dilate(stain, np.ones((side, side), np.uint8))
    tissue = (stain > np.clip(np.float32(EDGE_SHARE) * darkest, WEAK_OD, EDGE_OD)) & ~ink
    del darkest
    count, labels, stats, _ = cv2.connectedComponentsWithStats(tissue.view(np.uint8), connectivity=8)
    speck_px = min(SPECK_UM2 / pixel_um**2, stain.size / 4)  # a slide smaller than a speck may still be tissue
    keep = stats[:, cv2.CC_STAT_AREA] >= speck_px
    keep &= _holding(labels, (stain > STRONG_OD) & tissue, count)
    width = round(FIBRE_UM / pixel_um)
    firm = cv2.erode(((stain > FIRM_OD) & tissue).view(np.uint8), np.ones((width, width), np.uint8))
    keep &= _holding(labels, firm > 0, count)
    keep[0] = False
    return keep[labels]


def _holding(labels: np.ndarray, seeds: np.ndarray, count: int) -> np.ndarray:
    """Which of ``count`` labels have at least one of ``seeds``, (count,) bool."""
    held = np.zeros(count, bool)
    held[labels[seeds]] = True
    return held


def _fill_holes(mask: np.ndarray, ink: np.ndarray, pixel_um: float) -> np.ndarray:
    """``mask`` with enclosed holes smaller than ``HOLE_UM2`` filled; ink is never filled in."""

    def small_and_enclosed(stats: np.ndarray) -> np.ndarray:
        return (stats[:, cv2.CC_STAT_AREA] * pixel_um**2 < HOLE_UM2) & ~_at_border(stats, mask.shape)

    return mask | (_keep(~mask, small_and_enclosed, connectivity=4) & ~ink)


# --- helpers -------------------------------------------------------------------------------------


def _strips(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows that hold about ``_STRIP_PX`` pixels each."""
    rows = max(16, _STRIP_PX // max(shape[1], 1))
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def _keep(mask: np.ndarray, choose: Callable[[np.ndarray], np.ndarray], connectivity: int = 8) -> np.ndarray:
    """The connected parts of ``mask`` that ``choose`` (OpenCV's statistics per part → bool per part) says yes to."""
    if not mask.any():
        return np.zeros(mask.shape, bool)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=connectivity)
    keep = choose(stats)
    keep[0] = False  # label 0 is what is not in the mask
    return keep[labels]


def _at_border(stats: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Which connected parts touch the border of the array, (parts,) bool."""
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    return (left == 0) | (top == 0) | (right == shape[1]) | (bottom == shape[0])


def _dilate(mask: np.ndarray, radius: float) -> np.ndarray:
    size = 2 * round(radius) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    return cv2.dilate(mask.view(np.uint8), kernel).view(bool)
