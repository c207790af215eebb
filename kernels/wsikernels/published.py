"""Preprocessing as published studies of the breast and others use it, each a few lines around one definition.

Local operations (background) need a margin and give whole == blocks; the others take their constants from a fit, so
that they too are the same for every block: fit once per slide or per picture, then apply.
"""

import numpy as np

from wsikernels._jit import jit

MID_GREY = 128.0
_SPREAD = 48.0  # grey levels per standard deviation of whitened pixels: ±2.6 σ are shown
_REACH = 3.0  # a Gaussian is cut at 3 σ


def background_margin_px(sigma_px: float) -> int:
    """Pixels needed round a box by :func:`subtract_background`."""
    return int(np.ceil(_REACH * sigma_px))


def subtract_background(src: np.ndarray, sigma_px: float) -> np.ndarray:
    """Each channel minus its Gaussian mean, plus mid grey; the margin is used up.

    Args:
        src: (rows + 2 m, cols + 2 m, c) uint8 with m = :func:`background_margin_px`.
        sigma_px: Width of the Gaussian.

    Returns:
        (rows, cols, c) uint8, rounded half up.
    """
    if not (np.isfinite(sigma_px) and sigma_px > 0):
        raise ValueError(f"sigma_px must be a positive number, not {sigma_px}")
    margin = background_margin_px(sigma_px)
    if src.dtype != np.uint8 or src.ndim != 3 or min(src.shape[:2]) < 2 * margin:
        raise ValueError(f"src must be uint8 (rows, cols, channels) with a margin of {margin} px, not {src.shape}")
    at = np.arange(-margin, margin + 1)
    weights = np.exp(-0.5 * (at / sigma_px) ** 2)
    weights /= weights.sum()
    return _minus_smooth(np.ascontiguousarray(src), weights.astype(np.float32), margin)


@jit()
def _minus_smooth(src, weights, margin):
    """Separable and added in a fixed order: a pixel's sum does not depend on the block."""
    height, width, channels = src.shape[0] - 2 * margin, src.shape[1] - 2 * margin, src.shape[2]
    out = np.empty((height, width, channels), np.uint8)
    span = src.shape[1] * channels
    flat = src.reshape(src.shape[0], span)
    column, row = np.empty(span, np.float32), np.empty(width * channels, np.float32)
    for y in range(height):
        column[:] = np.float32(0)
        for k in range(len(weights)):
            weight, line = weights[k], flat[y + k]
            for x in range(span):
                column[x] += weight * np.float32(line[x])
        row[:] = np.float32(0)
        for k in range(len(weights)):
            weight, part = weights[k], column[k * channels : k * channels + width * channels]
            for x in range(width * channels):
                row[x] += weight * part[x]
        centre = flat[y + margin, margin * channels : (margin + width) * channels]
        target = out[y].reshape(width * channels)
        for x in range(width * channels):
            value = np.float32(centre[x]) - row[x] + np.float32(MID_GREY + 0.5)
            target[x] = np.uint8(np.int32(min(max(value, np.float32(0)), np.float32(255))))
    return out


def colour_moments(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (c,) and covariance (c, c), float64, of uint8 pixels (n, c): exact sums of integers, in any order."""
    if pixels.ndim != 2 or len(pixels) == 0:
        raise ValueError(f"pixels must be of shape (n, channels) and not empty, not {pixels.shape}")
    values = pixels.astype(np.int64)
    mean = values.sum(axis=0) / len(values)
    return mean, (values.T @ values) / len(values) - np.outer(mean, mean)


def demean_terms(mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(matrix, offset) of :func:`apply_linear` that put the mean at mid grey."""
    return np.eye(len(mean)), MID_GREY - np.asarray(mean, np.float64)


def whiten_terms(mean: np.ndarray, covariance: np.ndarray, pca: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(matrix, offset) of :func:`apply_linear` that give every channel unit spread (shown as 48 grey levels).

    Args:
        pca: Decorrelate the channels, too (ZCA: the whitening nearest to the picture's own colours).

    A direction without spread (a constant channel, a grey picture in RGB) is left as it is, not blown up.
    """
    if pca:
        spread, axes = np.linalg.eigh(covariance)
        gain = np.where(spread > 1.0, _SPREAD / np.sqrt(np.maximum(spread, 1.0)), 1.0)
        matrix = (axes * gain) @ axes.T
    else:
        spread = np.diag(covariance)
        matrix = np.diag(np.where(spread > 1.0, _SPREAD / np.sqrt(np.maximum(spread, 1.0)), 1.0))
    return matrix, MID_GREY - mean @ matrix


def apply_linear(src: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """pixel @ matrix + offset, rounded half up and clipped, of (rows, cols, 3) uint8 → the same shape."""
    if src.dtype != np.uint8 or src.ndim != 3 or src.shape[2] != 3 or np.shape(matrix) != (3, 3):
        raise ValueError(f"src must be uint8 (rows, cols, 3) and matrix (3, 3), not {src.shape} and {np.shape(matrix)}")
    matrix, offset = np.ascontiguousarray(matrix, np.float64), np.ascontiguousarray(offset, np.float64)
    if offset.shape != (3,) or not (np.isfinite(matrix).all() and np.isfinite(offset).all()):
        raise ValueError("matrix (3, 3) and offset (3,) must be finite numbers")
    return _linear(np.ascontiguousarray(src), matrix, offset)


@jit()
def _linear(src, matrix, offset):
    out = np.empty_like(src)
    height, width, _ = src.shape
    for y in range(height):
        for x in range(width):
            r, g, b = np.float64(src[y, x, 0]), np.float64(src[y, x, 1]), np.float64(src[y, x, 2])
            for c in range(3):
                value = r * matrix[0, c] + g * matrix[1, c] + b * matrix[2, c] + offset[c] + 0.5
                out[y, x, c] = np.uint8(np.int32(min(max(value, 0.0), 255.0)))
    return out


def whiten_tile(tile: np.ndarray, pca: bool = False) -> np.ndarray:
    """Whitening of one tile (rows, cols, 3) uint8 by its own statistics, as published per-tile recipes do."""
    return apply_linear(tile, *whiten_terms(*colour_moments(tile.reshape(-1, 3)), pca))


GREY_MATRIX = np.repeat(np.array([[0.299], [0.587], [0.114]]), 3, axis=1)  # ITU-R BT.601 luma in all channels


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    """(rows, cols) → (rows, cols, 3), the same type."""
    if grey.ndim != 2:
        raise ValueError(f"a grey picture has two axes, not the shape {grey.shape}")
    return np.repeat(grey[..., None], 3, axis=2)


def window_levels(raw: np.ndarray, low: float, high: float) -> np.ndarray:
    """12- or 16-bit values to 8 bits: ``low`` and below → 0, ``high`` and above → 255, linear, rounded half up.

    Args:
        raw: Any shape, unsigned or signed integers (or finite floats).

    Raises:
        ValueError: ``high`` is not above ``low``, or a value is NaN.
    """
    if not (np.isfinite(low) and np.isfinite(high) and high > low):
        raise ValueError(f"the window must run from a number to a larger one, not from {low} to {high}")
    values = (raw.astype(np.float64) - low) * 255 / (high - low)  # in this order a half is exact
    if np.isnan(values).any():
        raise ValueError("the picture holds NaN")
    return np.floor(np.clip(values, 0, 255) + 0.5).astype(np.uint8)
