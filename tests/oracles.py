"""Slow, obvious float64 twins of the kernels: each says what its kernel must compute, and nothing about how."""

import math

import numpy as np


def resample_area(
    src: np.ndarray, corner: tuple[int, int], ratio: tuple[float, float], out_corner: tuple[int, int], shape
) -> np.ndarray:
    """Mean of the source area under each output pixel, float64, not yet rounded."""
    out = np.empty((*shape, src.shape[2]))
    for i in range(shape[0]):
        for j in range(shape[1]):
            wy = _overlap(out_corner[0] + i, ratio[0], corner[0], src.shape[0])
            wx = _overlap(out_corner[1] + j, ratio[1], corner[1], src.shape[1])
            out[i, j] = np.einsum("y,x,yxc->c", wy, wx, src.astype(np.float64)) / (wy.sum() * wx.sum())
    return out


def _overlap(index: int, ratio: float, src0: int, count: int) -> np.ndarray:
    begin, end = index * ratio, (index + 1) * ratio
    at = src0 + np.arange(count)
    return np.clip(np.minimum(at + 1, end) - np.maximum(at, begin), 0, None)


def pack(
    block: np.ndarray, origins: np.ndarray, scale: np.ndarray, bias: np.ndarray, side: tuple[int, int]
) -> np.ndarray:
    """Tiles of a block as float64 (n, 3, rows, cols): x · scale + bias."""
    tiles = [block[y : y + side[0], x : x + side[1]] for y, x in origins]
    return (np.stack(tiles).astype(np.float64) * scale + bias).transpose(0, 3, 1, 2)


def round_half_up(values: np.ndarray) -> np.ndarray:
    return np.floor(values + 0.5)


def is_finite(*values: float) -> bool:
    return all(math.isfinite(v) for v in values)
