"""Reinhard colour transfer (Reinhard et al. 2001) in CIE Lab, one pass, fading out towards bare glass.

Over tissue each of L, a, b takes on the target's mean and spread: v' = (v − mean) · spread' / spread + mean'. Glass
would take on the colour of the shift; the change therefore fades linearly over the last ``FADE_L`` units of L below
the glass.
"""

import numpy as np
from numba import float32, int64, uint8

from wsikernels._float import fma
from wsikernels._jit import given, jit, made
from wsikernels._views import flat_rows, require_rgb
from wsikernels.lab import f_of_rgb, rgb_of_f

FADE_L = 20.0
_ZERO, _ONE = np.float32(0), np.float32(1)


def reinhard_terms(
    mean: np.ndarray, deviation: np.ndarray, target_mean: np.ndarray, target_deviation: np.ndarray, glass_l: float
) -> np.ndarray:
    """The transfer as seven float32 for :func:`apply_reinhard`, in units of Lab's f.

    Args:
        mean: L, a, b of the slide's tissue; ``deviation`` their spread (> 0); the target's likewise.
        glass_l: L (0–100) of bare glass.

    Raises:
        ValueError: A spread of zero, or numbers that are not finite.
    """
    mean, deviation, to, wide = (np.asarray(v, np.float64) for v in (mean, deviation, target_mean, target_deviation))
    numbers = np.concatenate([mean, deviation, to, wide, [glass_l]])
    if numbers.shape != (13,) or not np.isfinite(numbers).all() or deviation.min() <= 0:
        raise ValueError("three finite means and three spreads above zero are needed for L, a and b")
    gain = wide / deviation
    base = to - mean * gain
    base[0] = (base[0] - 16 * gain[0] + 16) / 116
    return np.array(
        [gain[0], base[0], gain[1], base[1] / 500, gain[2], base[2] / 200, (glass_l + 16) / 116], np.float32
    )


def apply_reinhard(src: np.ndarray, terms: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The transfer of RGB (rows, cols, 3) uint8 → the same shape; at most one level from float64.

    Raises:
        ValueError: A wrong type or shape, or terms that do not come from :func:`reinhard_terms`.
    """
    require_rgb(src, "src")
    terms = np.ascontiguousarray(terms, np.float32)
    if terms.shape != (7,) or not np.isfinite(terms).all():
        raise ValueError(f"seven finite terms of reinhard_terms are needed, not {terms.tolist()}")
    out = np.empty(src.shape, np.uint8) if out is None else out
    if out.shape != src.shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous uint8 of shape {src.shape}, not {out.dtype} of shape {out.shape}")
    if src.size:
        flat, pitch = flat_rows(src)
        _apply(flat, pitch, terms, out.reshape(len(out), -1))
    return out


_PER_FADE = np.float32(116 / FADE_L)


@jit((given(uint8, 1), given(float32, 1), made(uint8, 1)))
def _apply_row(line, terms, target):
    """L = 116 fy − 16, a = 500 (fx − fy), b = 200 (fy − fz): each is linear in f, and so is its transfer."""
    for x in range(len(target) // 3):
        fx, fy, fz = f_of_rgb(line[3 * x], line[3 * x + 1], line[3 * x + 2])
        a, b = fx - fy, fy - fz
        weight = min(max((terms[6] - fy) * _PER_FADE, _ZERO), _ONE)
        moved = fma(weight, fma(terms[0], fy, terms[1]) - fy, fy)
        a = fma(weight, fma(terms[2], a, terms[3]) - a, a)
        b = fma(weight, fma(terms[4], b, terms[5]) - b, b)
        red, green, blue = rgb_of_f(moved + a, moved, moved - b)
        target[3 * x] = red
        target[3 * x + 1] = green
        target[3 * x + 2] = blue


@jit((given(uint8, 1), int64, given(float32, 1), made(uint8, 2)))
def _apply(flat, pitch, terms, out):
    for y in range(len(out)):
        _apply_row(flat[y * pitch : y * pitch + out.shape[1]], terms, out[y])
