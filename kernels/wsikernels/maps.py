"""Score maps: overlap blending with exact weights, means under windows, the winning class and how sure it is."""

import numpy as np

from wsikernels._jit import jit

NOT_ANALYSED = 255  # in a map of classes


def blend_weights(side: int) -> np.ndarray:
    """Weights of a tile along one axis: 1, 2, …, 2, 1 (side,) int64; whole numbers, so that their sums are exact."""
    at = np.arange(side)
    return np.minimum(at + 1, side - at)


def blend_tiles(tiles: np.ndarray, origins: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Weighted mean of overlapping tiles.

    Args:
        tiles: (n, h, w, c) float32.
        origins: (n, 2) corners y, x; tiles may overhang the map. They are added in this order.
        shape: Rows and columns of the map.

    Returns:
        (rows, cols, c) float32; NaN where no tile lies. Where all tiles agree, exactly their value.
    """
    if tiles.ndim != 4 or len(origins) != len(tiles):
        raise ValueError(f"tiles must be (n, h, w, c) with n origins, not {tiles.shape} and {np.shape(origins)}")
    down, across = blend_weights(tiles.shape[1]), blend_weights(tiles.shape[2])
    sums = np.zeros((*shape, tiles.shape[3]))
    weights = np.zeros(shape, np.int64)
    origins = np.ascontiguousarray(origins, np.int64).reshape(-1, 2)
    _blend(np.ascontiguousarray(tiles, np.float32), origins, down, across, sums, weights)
    with np.errstate(invalid="ignore"):
        return (sums / weights[..., None]).astype(np.float32)


@jit()
def _blend(tiles, origins, down, across, sums, weights):
    for n in range(len(tiles)):
        for i in range(tiles.shape[1]):
            y = origins[n, 0] + i
            if y < 0 or y >= sums.shape[0]:
                continue
            for j in range(tiles.shape[2]):
                x = origins[n, 1] + j
                if x < 0 or x >= sums.shape[1]:
                    continue
                weight = down[i] * across[j]
                weights[y, x] += weight
                for c in range(tiles.shape[3]):
                    sums[y, x, c] += weight * np.float64(tiles[n, i, j, c])


def summed_area(values: np.ndarray) -> np.ndarray:
    """Sums over [0, y) × [0, x) of a map (rows, cols, c) → (rows + 1, cols + 1, c) float64."""
    if values.ndim != 3:
        raise ValueError(f"a map has the axes (rows, cols, channels), not the shape {values.shape}")
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1, values.shape[2]))
    _sum(np.ascontiguousarray(values), table)
    return table


@jit()
def _sum(values, table):
    for y in range(values.shape[0]):
        for c in range(values.shape[2]):
            line = 0.0
            for x in range(values.shape[1]):
                line += np.float64(values[y, x, c])
                table[y + 1, x + 1, c] = table[y, x + 1, c] + line


def window_means(table: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Mean of a map under each window.

    Args:
        table: From :func:`summed_area`.
        windows: (n, 4) whole numbers y0, x0, y1, x1, half-open, not empty, inside the map.

    Returns:
        (n, c) float32.
    """
    windows = np.ascontiguousarray(windows, np.int64).reshape(-1, 4)
    limit = (table.shape[0] - 1, table.shape[1] - 1)
    if len(windows):
        low, high = windows[:, :2], windows[:, 2:]
        if low.min() < 0 or (high > limit).any() or (high <= low).any():
            raise ValueError(f"every window must hold a pixel and lie inside the map of {limit[0]} × {limit[1]}")
    return _means(table, windows)


@jit()
def _means(table, windows):
    out = np.empty((len(windows), table.shape[2]), np.float32)
    for n in range(len(windows)):
        y0, x0, y1, x1 = windows[n]
        area = np.float64((y1 - y0) * (x1 - x0))
        for c in range(table.shape[2]):
            total = (table[y1, x1, c] - table[y0, x1, c]) - (table[y1, x0, c] - table[y0, x0, c])
            out[n, c] = np.float32(total / area)
    return out


def winning_class(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most probable class and its probability.

    Args:
        probabilities: (rows, cols, c) float, 0–1; NaN in the first channel where nothing was analysed; c < 255.

    Returns:
        classes (rows, cols) uint8, 255 where not analysed, of equal classes the lower; confidence (rows, cols) uint8,
        0 where not analysed, else 1 + 254 p rounded half up.
    """
    if probabilities.ndim != 3 or not 0 < probabilities.shape[2] < NOT_ANALYSED:
        raise ValueError(f"a map of 1 to 254 classes is needed, not the shape {probabilities.shape}")
    return _winner(np.ascontiguousarray(probabilities, np.float32))


@jit()
def _winner(probabilities):
    rows, cols, count = probabilities.shape
    classes, confidence = np.empty((rows, cols), np.uint8), np.empty((rows, cols), np.uint8)
    for y in range(rows):
        for x in range(cols):
            best, top = 0, probabilities[y, x, 0]
            for c in range(1, count):
                if probabilities[y, x, c] > top:
                    best, top = c, probabilities[y, x, c]
            if np.isnan(probabilities[y, x, 0]):
                classes[y, x], confidence[y, x] = NOT_ANALYSED, 0
            else:
                classes[y, x] = best
                confidence[y, x] = np.int64(1.5 + 254.0 * min(max(np.float64(top), 0.0), 1.0))
    return classes, confidence


def class_histogram(classes: np.ndarray, count: int) -> np.ndarray:
    """Pixels of each class 0 … count − 1 of a uint8 map → (count,) int64; other values are not counted."""
    if classes.dtype != np.uint8:
        raise ValueError(f"a map of classes is uint8, not {classes.dtype}")
    return np.bincount(classes.ravel(), minlength=256)[:count]
