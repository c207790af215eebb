"""sRGB ↔ CIE Lab (D65, ITU-R BT.709 primaries), as building blocks of the colour kernels.

The kernels work on f = (fx, fy, fz), the cube roots in Lab's definition: L = 116 fy − 16, a = 500 (fx − fy),
b = 200 (fy − fz). Moving L alone adds the same amount to all three, so a and b are never formed nor quantised.
"""

import numpy as np
from numba import float32, int64, uint8

from wsikernels._float import cube_root, fma, power_5_12
from wsikernels._jit import given, jit, made

# ITU-R BT.709, D65: rows X, Y, Z
RGB_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
WHITE = RGB_TO_XYZ.sum(axis=1)

_M = (RGB_TO_XYZ / WHITE[:, None]).astype(np.float32)
_I = np.linalg.inv(RGB_TO_XYZ / WHITE[:, None]).astype(np.float32)
_M00, _M01, _M02, _M10, _M11, _M12, _M20, _M21, _M22 = _M.ravel()
_I00, _I01, _I02, _I10, _I11, _I12, _I20, _I21, _I22 = _I.ravel()

# sRGB decoding above the linear toe, on x in [11/255, 1]: minimax polynomial, absolute error 5.4e-6
_S0, _S1, _S2, _S3, _S4, _S5, _S6 = (
    np.float32(v) for v in (0.00091466, 0.03313768, 0.5114533, 0.7170142, -0.43460143, 0.22674216, -0.05466592)
)
_ZERO, _ONE, _HALF, _255, _TOE = (np.float32(v) for v in (0, 1, 0.5, 255, 10.5))
_PER_255, _PER_TOE = np.float32(1 / 255), np.float32(1 / 255 / 12.92)
_T3, _T1, _T0 = np.float32((6 / 29) ** 3), np.float32((29 / 6) ** 2 / 3), np.float32(4 / 29)  # Lab's own toe
_F_TOE, _F_PER = np.float32(6 / 29), np.float32(3 * (6 / 29) ** 2)
_OUT_TOE, _OUT_TOE_SLOPE = np.float32(0.0031308), np.float32(255 * 12.92)
_OUT_SLOPE, _OUT_BASE = np.float32(255 * 1.055), np.float32(-255 * 0.055)


@jit(inline=True)
def _linear(value):
    v = np.float32(value)
    x = v * _PER_255
    curve = fma(fma(fma(fma(fma(fma(_S6, x, _S5), x, _S4), x, _S3), x, _S2), x, _S1), x, _S0)
    return v * _PER_TOE if v < _TOE else curve


@jit(inline=True)
def _f(t):
    return cube_root(t) if t > _T3 else fma(t, _T1, _T0)


@jit(inline=True)
def _f_inverse(f):
    return f * f * f if f > _F_TOE else (f - _T0) * _F_PER


@jit(inline=True)
def _encode(linear):
    t = min(max(linear, _ZERO), _ONE)
    value = fma(power_5_12(t), _OUT_SLOPE, _OUT_BASE) if t > _OUT_TOE else t * _OUT_TOE_SLOPE
    return np.uint8(np.int32(value + _HALF))


@jit(inline=True)
def f_of_rgb(red, green, blue):
    """(fx, fy, fz) float32 of one uint8 pixel."""
    r, g, b = _linear(red), _linear(green), _linear(blue)
    x = fma(_M00, r, fma(_M01, g, _M02 * b))
    y = fma(_M10, r, fma(_M11, g, _M12 * b))
    z = fma(_M20, r, fma(_M21, g, _M22 * b))
    return _f(x), _f(y), _f(z)


@jit(inline=True)
def rgb_of_f(fx, fy, fz):
    """One uint8 pixel of (fx, fy, fz), colours outside sRGB clipped."""
    x, y, z = _f_inverse(fx), _f_inverse(fy), _f_inverse(fz)
    r = _encode(fma(_I00, x, fma(_I01, y, _I02 * z)))
    g = _encode(fma(_I10, x, fma(_I11, y, _I12 * z)))
    b = _encode(fma(_I20, x, fma(_I21, y, _I22 * z)))
    return r, g, b


def _lightness_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Y as a sum of three 64-bit integers, and the exact thresholds of the 256 levels of L.

    Units of 2⁻⁵⁰ tell every one of the 16.7 million colours apart from every threshold; a cell of 2⁻¹² holds at most
    one threshold (levels are 2⁻¹¹·² apart where they are densest), so a look-up and one comparison find the level.
    """
    x = np.arange(256) / 255
    linear = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    parts = np.rint(RGB_TO_XYZ[1][:, None] * linear * 2.0**50).astype(np.int64)
    fy = ((np.arange(258) - 0.5) / 2.55 + 16) / 116
    thresholds = np.where(fy > 6 / 29, fy**3, (fy - 4 / 29) * 3 * (6 / 29) ** 2)
    exact = np.rint(thresholds * 2.0**50).astype(np.int64)
    cells = np.searchsorted(exact[1:], np.arange(4098, dtype=np.int64) << 38, side="right").astype(np.uint8)
    return parts, cells, exact[1:].copy()


_PARTS, _CELLS, _EXACT = _lightness_tables()


def lightness_levels(flat: np.ndarray, pitch: int, y0: int, x0: int, levels: np.ndarray) -> None:
    """Lightness of a picture (as flat rows) from pixel (y0, x0), as levels round(2.55 L) 0–255, into uint8 (h, w)."""
    _levels(flat, pitch, y0, x0, _PARTS, _CELLS, _EXACT, levels)


@jit((given(uint8, 1), int64, int64, int64, given(int64, 2), given(uint8, 1), given(int64, 1), made(uint8, 2)))
def _levels(flat, pitch, y0, x0, parts, cells, exact, levels):
    height, width = levels.shape
    reds, greens, blues = parts[0], parts[1], parts[2]
    for i in range(height):
        at = (y0 + i) * pitch + 3 * x0
        line, target = flat[at : at + 3 * width], levels[i]
        for j in range(width):
            total = reds[line[3 * j]] + greens[line[3 * j + 1]] + blues[line[3 * j + 2]]
            level = cells[np.uint64(total >> 38)]  # unsigned: numba need not ask whether to count from the end
            target[j] = np.uint8(level + np.uint8(total >= exact[level]))


@jit((given(uint8, 1), given(float32, 1), made(uint8, 1)))
def move_lightness(line, moves, out):
    """Pixels of a row (3 n) with their lightness moved by ``moves`` (n, in units of Lab's f = L / 116) → (3 n).

    A function of its own, and on flat rows: only then does LLVM turn the loop into vector code.
    """
    for x in range(len(moves)):
        fx, fy, fz = f_of_rgb(line[3 * x], line[3 * x + 1], line[3 * x + 2])
        move = moves[x]
        red, green, blue = rgb_of_f(fx + move, fy + move, fz + move)
        out[3 * x] = red
        out[3 * x + 1] = green
        out[3 * x + 2] = blue


def levels_of_rgb(pixels: np.ndarray) -> np.ndarray:
    """Levels of L, round(2.55 L), of colours (n, 3) uint8 → (n,) uint8."""
    levels = np.empty((1, len(pixels)), np.uint8)
    lightness_levels(np.ascontiguousarray(pixels).reshape(-1), 3 * len(pixels), 0, 0, levels)
    return levels[0]


def lab_of_rgb(pixels: np.ndarray) -> np.ndarray:
    """L, a, b of colours (n, 3) uint8 → (n, 3) float64, exactly: for fits, not for pictures."""
    x = np.arange(256) / 255
    linear = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    t = linear[pixels] @ (RGB_TO_XYZ / WHITE[:, None]).T
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
