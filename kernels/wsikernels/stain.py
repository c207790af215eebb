"""Stains as optical density: unmixing, mixing, and one pass over the pixels through tables of integers.

A pixel's density is od = ln(255 / value) per channel, in a stain's light-absorbing direction (Beer–Lambert; Ruifrok &
Johnston 2001). A normalisation is a 3 × 3 matrix on densities: out = 255 · exp(−(od @ matrix)).

The product of each possible value with each row of the matrix is tabulated in units of 2⁻¹¹ and the three results
packed into one 64-bit integer, so that a pixel costs three look-ups, two additions and three look-ups of exp. Integers
add up to the same bits in any order and on any machine. Against float64 the error is at most 0.75 units before
rounding, that is one level.
"""

import numpy as np
from numba import int64, uint8

from wsikernels._jit import given, jit, made
from wsikernels._views import flat_rows, require_rgb

# Unit densities (r, g, b) of one stain per row, measured by Ruifrok & Johnston (2001)
HAEMATOXYLIN_EOSIN = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
HAEMATOXYLIN_DAB = np.array([[0.650, 0.704, 0.286], [0.268, 0.570, 0.776]])

DARKEST = 0.4  # what a value of 0 stands for: its logarithm must exist, and it must come back as 0
_UNITS, BITS = 2048, 21
MASK = (1 << BITS) - 1
_STEEPEST = 32.0  # entries of a matrix that is not singular, with room to spare
_OD = -np.log(np.maximum(np.arange(256), DARKEST) / 255)


def optical_density(pixels: np.ndarray) -> np.ndarray:
    """ln(255 / value) of uint8 values, float64 of the same shape; 0 counts as ``DARKEST``."""
    return _OD[pixels]


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Each row scaled to length one, float64."""
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def with_residual(vectors: np.ndarray) -> np.ndarray:
    """Two stains (2, 3) and, as a third row, the direction that neither explains: (3, 3), unit rows.

    Raises:
        ValueError: Not two vectors of three finite numbers, or (nearly) the same vector twice.
    """
    vectors = np.asarray(vectors, np.float64)
    if vectors.shape != (2, 3) or not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
        raise ValueError(f"two stain vectors of three numbers are needed, not {vectors.tolist()}")
    unit = unit_rows(vectors)
    normal = np.cross(unit[0], unit[1])
    if np.linalg.norm(normal) < np.sin(np.radians(2)):
        raise ValueError(f"the two stain vectors are nearly the same: {unit.round(3).tolist()}")
    return np.vstack([unit, normal / np.linalg.norm(normal)])


def concentrations(density: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Amounts (n, 3) of two stains and the residual in densities (n, 3): colour deconvolution."""
    return density @ np.linalg.inv(with_residual(vectors))


def mixing_matrix(
    source: np.ndarray, target: np.ndarray, ratios: tuple[float, float] = (1.0, 1.0), keep_residual: bool = True
) -> np.ndarray:
    """The (3, 3) matrix on densities that turns the stains ``source`` (2, 3) into ``target`` (2, 3).

    Args:
        ratios: Strength of each target stain in units of the source's.
        keep_residual: Keep what neither stain explains (pen, pigment, the slide's own tint). Without it, as Macenko
            published it, every colour becomes a mixture of the two stains.
    """
    scale = np.array([*ratios, 1.0 if keep_residual else 0.0])
    return np.linalg.inv(with_residual(source)) @ (scale[:, None] * with_residual(target))


class DensityTables:
    """A matrix on densities, as tables for :func:`apply_density`: out = od @ matrix.

    Args:
        matrix: (3, 3).
        headroom: Densities that may be added to or taken from the sum before it is looked up.

    Raises:
        ValueError: The matrix is not 3 × 3, or its entries are so large that the stains it came from must be singular.
    """

    def __init__(self, matrix: np.ndarray, headroom: float = 0.0) -> None:
        matrix = np.asarray(matrix, np.float64)
        if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or np.abs(matrix).max() > _STEEPEST:
            raise ValueError(f"not a usable stain matrix (3 × 3, entries up to {_STEEPEST:g}): {matrix.tolist()}")
        units = _units(_OD[None, :, None] * matrix[:, None, :])  # [in, value, out]
        spare = int(headroom * _UNITS)
        low = units.min(axis=1).sum(axis=0) - spare  # per output channel: what makes every sum non-negative
        span = int((units.max(axis=1).sum(axis=0) - low).max()) + spare + 1
        units[0] -= low
        self.parts = _pack(units)  # (in, value)
        densities = (np.arange(span)[None, :] + low[:, None]) / _UNITS
        self.values = np.floor(np.minimum(255 * np.exp(-densities), 255) + 0.5).astype(np.uint8)  # (out, sum)

    @staticmethod
    def packed(densities: np.ndarray) -> np.ndarray:
        """Densities (n, 3) in the tables' packed units, to be added to a sum of ``parts``: (n,) int64."""
        return _pack(_units(densities))


def _units(densities: np.ndarray) -> np.ndarray:
    return np.rint(densities * _UNITS).astype(np.int64)


def _pack(units: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray((units << np.array([0, BITS, 2 * BITS])).sum(axis=-1))


def apply_density(src: np.ndarray, tables: DensityTables, out: np.ndarray | None = None) -> np.ndarray:
    """255 · exp(−(od @ matrix)), rounded half up, of RGB (rows, cols, 3) uint8 → the same shape.

    Args:
        src: A view costs no copy if its rows are contiguous.
        out: Where to write; C-contiguous. Made if not given.
    """
    require_rgb(src, "src")
    out = np.empty(src.shape, np.uint8) if out is None else out
    if out.shape != src.shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous uint8 of shape {src.shape}, not {out.dtype} of shape {out.shape}")
    if src.size:
        flat, pitch = flat_rows(src)
        _apply(flat, pitch, tables.parts, tables.values, out.reshape(len(out), -1))
    return out


@jit((given(uint8, 1), given(int64, 1), given(int64, 1), given(int64, 1), given(uint8, 2), made(uint8, 1)))
def _apply_row(line, reds, greens, blues, values, target):
    first, second, third = values[0], values[1], values[2]
    for x in range(len(target) // 3):
        total = reds[line[3 * x]] + greens[line[3 * x + 1]] + blues[line[3 * x + 2]]
        # unsigned: numba need not ask whether to count from the end
        target[3 * x] = first[np.uint64(total & MASK)]
        target[3 * x + 1] = second[np.uint64((total >> BITS) & MASK)]
        target[3 * x + 2] = third[np.uint64(total >> (2 * BITS))]


@jit((given(uint8, 1), int64, given(int64, 2), given(uint8, 2), made(uint8, 2)))
def _apply(flat, pitch, parts, values, out):
    for y in range(len(out)):
        line = flat[y * pitch : y * pitch + out.shape[1]]
        _apply_row(line, parts[0], parts[1], parts[2], values, out[y])
