"""Building blocks for finding tissue: histograms, thresholds, sharpness, ink, morphology by radius."""

import numpy as np

from wsikernels._jit import jit
from wsikernels._views import require_rgb
from wsikernels.stain import optical_density

DENSITY_LEVELS = 256
MOST_DENSITY = 2.0  # density of the last level: darker pixels count there


def density_levels(rgb: np.ndarray) -> np.ndarray:
    """Mean optical density of the three channels in 256 levels from 0 to 2, (rows, cols) uint8."""
    require_rgb(rgb, "rgb")
    units = np.rint(optical_density(np.arange(256)) * (65536 * 255 / MOST_DENSITY / 3)).astype(np.int64)
    return _through_table(np.ascontiguousarray(rgb), units)


@jit()
def _through_table(rgb, units):
    out = np.empty(rgb.shape[:2], np.uint8)
    for y in range(rgb.shape[0]):
        for x in range(rgb.shape[1]):
            total = units[rgb[y, x, 0]] + units[rgb[y, x, 1]] + units[rgb[y, x, 2]]
            out[y, x] = np.uint8(min((total + 32768) >> 16, 255))
    return out


def saturation_levels(rgb: np.ndarray) -> np.ndarray:
    """HSV saturation, 255 · (max − min) / max rounded half up, 0 for black; (rows, cols) uint8."""
    require_rgb(rgb, "rgb")
    return _saturation(np.ascontiguousarray(rgb))


@jit()
def _saturation(rgb):
    out = np.empty(rgb.shape[:2], np.uint8)
    for y in range(rgb.shape[0]):
        for x in range(rgb.shape[1]):
            r, g, b = np.int64(rgb[y, x, 0]), np.int64(rgb[y, x, 1]), np.int64(rgb[y, x, 2])
            most, least = max(r, g, b), min(r, g, b)
            out[y, x] = np.uint8((510 * (most - least) + most) // (2 * most) if most else 0)
    return out


def histogram(levels: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """Counts of the 256 levels of a uint8 picture, of the pixels ``where`` (bool) if given: (256,) int64.

    Histograms of blocks add up to the histogram of the whole.
    """
    if levels.dtype != np.uint8:
        raise ValueError(f"levels must be uint8, not {levels.dtype}")
    return np.bincount((levels if where is None else levels[where]).ravel(), minlength=256)


def otsu_level(counts: np.ndarray) -> int:
    """Otsu's threshold (1979): the last level of the lower class; 0 where all pixels have one level."""
    counts = _checked(counts).astype(np.float64)
    levels = np.arange(len(counts))
    below, total = np.cumsum(counts)[:-1], counts.sum()
    moment = np.cumsum(counts * levels)[:-1]
    above = total - below
    usable = (below > 0) & (above > 0)
    if not usable.any():
        return 0
    gap = moment / np.maximum(below, 1) - (counts @ levels - moment) / np.maximum(above, 1)
    between = np.where(usable, below * above * gap**2, -1.0)
    return int(np.argmax(between >= between.max() * (1 - 1e-12)))


def otsu_level_trimmed(counts: np.ndarray, tail: float = 0.01) -> int:
    """Otsu's threshold without the darkest and brightest ``tail`` of the pixels: dust, ink and folds do not move it."""
    counts = _checked(counts).copy()
    if not 0 <= tail < 0.5:
        raise ValueError(f"the tail must be a share from 0 to below 0.5, not {tail}")
    spare = int(tail * counts.sum())
    for order in (slice(None), slice(None, None, -1)):
        view = counts[order]
        reached = np.minimum(np.cumsum(view), spare)
        view -= np.diff(reached, prepend=0)
    return otsu_level(counts)


def triangle_level(counts: np.ndarray) -> int:
    """The triangle threshold (Zack et al. 1977) of one peak with a long tail: little tissue on much glass.

    The level farthest from the line between the peak and the far end of the longer tail.
    """
    counts = _checked(counts)
    filled = np.flatnonzero(counts)
    if len(filled) == 0:
        return 0
    peak, low, high = int(np.argmax(counts)), int(filled[0]), int(filled[-1])
    end = low if peak - low > high - peak else high
    levels = np.arange(min(peak, end), max(peak, end) + 1)
    line = np.interp(levels, sorted((peak, end)), [counts[k] for k in sorted((peak, end))])
    return int(levels[np.argmax(line - counts[levels])])


def _checked(counts: np.ndarray) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.ndim != 1 or len(counts) < 2 or (counts < 0).any():
        raise ValueError(f"a histogram is one row of counts from 0 up, not of shape {counts.shape}")
    return counts


def focus_map(grey: np.ndarray, cell_px: int) -> np.ndarray:
    """Sharpness of every cell: the variance of the 4-neighbour Laplacian (Pech-Pacheco et al. 2000).

    Args:
        grey: (rows · cell + 2, cols · cell + 2) uint8: whole cells and a margin of one pixel.

    Returns:
        (rows, cols) float64; from exact integer sums, so a cell does not depend on the block.
    """
    if grey.dtype != np.uint8 or grey.ndim != 2 or cell_px < 1:
        raise ValueError(f"grey must be uint8 (rows, cols) and cell_px at least 1, not {grey.dtype} and {cell_px}")
    rows, cols = (max(n - 2, 0) // cell_px for n in grey.shape)
    return _focus(np.ascontiguousarray(grey), cell_px, np.zeros((rows, cols)))


@jit()
def _focus(grey, cell, out):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            total = square = np.int64(0)
            for y in range(1 + i * cell, 1 + (i + 1) * cell):
                for x in range(1 + j * cell, 1 + (j + 1) * cell):
                    value = np.int64(grey[y - 1, x]) + np.int64(grey[y + 1, x]) + np.int64(grey[y, x - 1])
                    value += np.int64(grey[y, x + 1]) - 4 * np.int64(grey[y, x])
                    total += value
                    square += value * value
            area = cell * cell
            out[i, j] = (area * square - total * total) / (area * area)
    return out


def ink_mask(rgb: np.ndarray, faintest: float = 0.15) -> np.ndarray:
    """Felt pen by hue and density: blue, green, red, yellow and black ink, (rows, cols) bool.

    Tissue absorbs green light most and blue light noticeably (haematoxylin, eosin) or is brown (DAB); ink lies outside
    these: green or cyan absorbs red most by far, blue leaves blue nearly alone, red and yellow ink leave red alone
    while they absorb blue fully, black absorbs everything alike.

    Args:
        faintest: Mean density below which nothing is called ink.
    """
    require_rgb(rgb, "rgb")
    red, green, blue = np.moveaxis(optical_density(rgb), 2, 0)
    least, most = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    cool = (red > 1.25 * green) | ((red > 1.05 * green) & (blue < 0.3 * red))
    warm = (blue > 1.05 * green) & (red < 0.1 * blue) & (most > 0.6)
    black = (least > 0.8 * most) & (least > 1.2)
    return ((red + green + blue) / 3 > faintest) & (cool | warm | black)


def dilate(mask: np.ndarray, radius_px: float) -> np.ndarray:
    """Every pixel within ``radius_px`` (centre to centre) of the mask: an exact disc, (rows, cols) bool."""
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"a mask is bool of shape (rows, cols), not {mask.dtype} of shape {mask.shape}")
    if not (np.isfinite(radius_px) and radius_px >= 0):
        raise ValueError(f"the radius must be a number from 0 up, not {radius_px}")
    if mask.size == 0 or not mask.any():
        return mask.copy()
    return _distance_squared(np.ascontiguousarray(mask)) <= radius_px**2 + 1e-9


def erode(mask: np.ndarray, radius_px: float) -> np.ndarray:
    """Every pixel farther than ``radius_px`` from what is not mask; the picture's border does not erode."""
    return ~dilate(~mask, radius_px)


def opened(mask: np.ndarray, radius_um: float, pixel_um: float) -> np.ndarray:
    """What a disc of ``radius_um`` fits into: specks and threads go."""
    return dilate(erode(mask, radius_um / pixel_um), radius_um / pixel_um)


def closed(mask: np.ndarray, radius_um: float, pixel_um: float) -> np.ndarray:
    """Gaps that a disc of ``radius_um`` does not fit into are filled."""
    return erode(dilate(mask, radius_um / pixel_um), radius_um / pixel_um)


@jit()
def _distance_squared(mask):
    """Squared distance to the nearest pixel of the mask, exactly (Meijster et al. 2000): columns, then parabolas."""
    rows, cols = mask.shape
    far = rows + cols
    down = np.empty((rows, cols), np.int64)
    for x in range(cols):
        gap = far
        for y in range(rows):
            gap = 0 if mask[y, x] else min(gap + 1, far)
            down[y, x] = gap
        for y in range(rows - 2, -1, -1):
            down[y, x] = min(down[y, x], down[y + 1, x] + 1)
    out = np.empty((rows, cols), np.int64)
    sites, starts = np.empty(cols, np.int64), np.empty(cols + 1, np.int64)
    for y in range(rows):
        height, last = down[y], 0
        sites[0] = starts[0] = 0
        for x in range(1, cols):
            own = height[x] * height[x]
            while last >= 0:
                at, site = starts[last], sites[last]
                if (at - site) ** 2 + height[site] ** 2 > (at - x) ** 2 + own:
                    last -= 1
                else:
                    break
            if last < 0:
                last, sites[0] = 0, x
            else:
                site = sites[last]
                start = 1 + (x * x - site * site + own - height[site] ** 2) // (2 * (x - site))
                if start < cols:
                    last += 1
                    sites[last], starts[last] = x, start
        for x in range(cols - 1, -1, -1):
            while starts[last] > x:
                last -= 1
            out[y, x] = (x - sites[last]) ** 2 + height[sites[last]] ** 2
    return out
