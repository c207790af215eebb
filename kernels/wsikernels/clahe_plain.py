"""CLAHE of one picture by itself, as OpenCV defines it (``clipLimit``, ``tileGridSize``): for mammograms and papers.

Unlike :mod:`wsikernels.clahe` the result depends on the picture's borders and there is no guard for glass.
"""

import numpy as np

from wsikernels._jit import jit
from wsikernels._views import flat_rows, require_rgb
from wsikernels.lab import lightness_levels, move_lightness


def clahe_image(grey: np.ndarray, clip_limit: float = 40.0, tiles: tuple[int, int] = (8, 8)) -> np.ndarray:
    """CLAHE of a grey picture, bit for bit what ``cv2.createCLAHE(clip_limit, tiles).apply`` gives.

    Args:
        grey: (rows, cols) uint8.
        clip_limit: Largest count of a level, in multiples of the even count.
        tiles: (columns, rows) of contextual regions, in OpenCV's order. A picture that they do not divide is
            mirrored at its right and lower border.

    Returns:
        (rows, cols) uint8.

    Raises:
        ValueError: A wrong type or shape, an empty picture, a clip limit that is not positive.
    """
    if grey.dtype != np.uint8 or grey.ndim != 2 or grey.size == 0:
        raise ValueError(f"grey must be uint8 of shape (rows, cols), not {grey.dtype} of shape {grey.shape}")
    if not (np.isfinite(clip_limit) and clip_limit > 0) or min(tiles) < 1:
        raise ValueError(f"the clip limit and the numbers of tiles must be positive, not {clip_limit} and {tiles}")
    padded = _pad(grey, tiles[1], tiles[0])
    side = padded.shape[0] // tiles[1], padded.shape[1] // tiles[0]
    cut = max(int(clip_limit * side[0] * side[1] / 256), 1)
    blocks = padded.reshape(tiles[1], side[0], tiles[0], side[1]).swapaxes(1, 2).reshape(tiles[1], tiles[0], -1)
    tables = np.empty((tiles[1], tiles[0], 256), np.uint8)
    for index in np.ndindex(*tables.shape[:2]):
        tables[index] = _table(np.bincount(blocks[index], minlength=256), cut)
    rows, cols = (_neighbours(n, s, t) for n, s, t in zip(grey.shape, side, tables.shape, strict=False))
    return _look_up(np.ascontiguousarray(grey), tables, *rows, *cols)


def clahe_image_lab(rgb: np.ndarray, clip_limit: float = 40.0, tiles: tuple[int, int] = (8, 8)) -> np.ndarray:
    """:func:`clahe_image` on L of Lab (levels round(2.55 L)); a and b are kept unrounded. RGB uint8 in and out."""
    require_rgb(rgb, "rgb")
    flat, pitch = flat_rows(rgb)
    levels = np.empty(rgb.shape[:2], np.uint8)
    lightness_levels(flat, pitch, 0, 0, levels)
    moved = clahe_image(levels, clip_limit, tiles)
    moves = (moved.astype(np.float32) - levels) * np.float32(1 / 2.55 / 116)
    out = np.empty(rgb.shape, np.uint8)
    move_lightness(np.ascontiguousarray(rgb).reshape(-1), moves.reshape(-1), out.reshape(-1))
    return out


def _pad(grey: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Mirrored without repeating the border, as OpenCV does: each axis is padded as soon as one does not divide."""
    spare = [(-n) % k for n, k in zip(grey.shape, (rows, cols), strict=True)]
    if not any(spare):
        return grey
    spare = [k - n % k for n, k in zip(grey.shape, (rows, cols), strict=True)]
    picks = [_mirror(np.arange(n + more), n) for n, more in zip(grey.shape, spare, strict=True)]
    return grey[np.ix_(*picks)]


def _mirror(index: np.ndarray, length: int) -> np.ndarray:
    if length == 1:
        return np.zeros_like(index)
    folded = index % (2 * length - 2)
    return np.minimum(folded, 2 * length - 2 - folded)


def _table(counts: np.ndarray, cut: int) -> np.ndarray:
    """Clip, spread the excess evenly, give what is left over to every n-th level, sum up, scale in float32."""
    excess = int(np.maximum(counts - cut, 0).sum())
    total = int(counts.sum())
    counts = np.minimum(counts, cut) + excess // 256
    left = excess % 256
    if left:
        counts[:: max(256 // left, 1)][:left] += 1
    scaled = np.cumsum(counts).astype(np.float32) * np.float32(255 / np.float32(total))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _neighbours(count: int, side: int, tiles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Along one axis, per pixel: the tile before, the tile after (both kept inside), the weight of the latter."""
    at = np.arange(count, dtype=np.float32) * np.float32(1 / np.float32(side)) - np.float32(0.5)
    before = np.floor(at).astype(np.int64)
    weight = at - before.astype(np.float32)
    return np.maximum(before, 0), np.minimum(before + 1, tiles - 1), weight.astype(np.float32)


@jit()
def _look_up(grey, tables, above, below, down, left, right, across):
    out = np.empty_like(grey)
    one = np.float32(1)
    for y in range(grey.shape[0]):
        upper, lower = tables[above[y]], tables[below[y]]
        for x in range(grey.shape[1]):
            k, w = grey[y, x], across[x]
            first = np.float32(upper[left[x], k]) * (one - w) + np.float32(upper[right[x], k]) * w
            second = np.float32(lower[left[x], k]) * (one - w) + np.float32(lower[right[x], k]) * w
            value = first * (one - down[y]) + second * down[y]
            out[y, x] = np.uint8(np.rint(value))
    return out
