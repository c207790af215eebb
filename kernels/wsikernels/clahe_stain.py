"""CLAHE on one stain: the haematoxylin channel is equalised, the other stain and the residual are kept.

The channel is what the stain alone would let through, 255 · exp(−amount), in 8 bits; glass is bright in it as in any
picture, so :mod:`wsikernels.clahe` with its grid, margin and guard applies as it stands.
"""

import numpy as np

from wsikernels._jit import jit
from wsikernels._views import flat_rows, require_rgb
from wsikernels.clahe import clahe_grey
from wsikernels.stain import BITS, MASK, DensityTables, apply_density, optical_density, with_residual


def stain_channel(src: np.ndarray, vectors: np.ndarray, which: int = 0) -> np.ndarray:
    """What stain ``which`` of ``vectors`` (2, 3) alone lets through: 255 · exp(−amount), (rows, cols) uint8."""
    matrix = np.zeros((3, 3))
    matrix[:, 0] = np.linalg.inv(with_residual(vectors))[:, which]
    return np.ascontiguousarray(apply_density(src, DensityTables(matrix))[..., 0])


def clahe_haematoxylin(
    src: np.ndarray,
    corner: tuple[int, int],
    region_px: int,
    clip: float,
    glass: int,
    box: tuple[int, int, int, int],
    vectors: np.ndarray,
) -> np.ndarray:
    """CLAHE on the first stain of ``vectors`` (2, 3); all else as :func:`wsikernels.clahe.clahe_lab`.

    ``glass`` is a level of the channel (0–255), not of L.
    """
    require_rgb(src, "src")
    channel = stain_channel(src, vectors)
    after = clahe_grey(channel, corner, region_px, clip, glass, box)
    rows, cols = slice(box[0] - corner[0], box[2] - corner[0]), slice(box[1] - corner[1], box[3] - corner[1])
    before = np.ascontiguousarray(channel[rows, cols])
    out = np.empty((*after.shape, 3), np.uint8)
    if out.size:
        inner = src[rows, cols]
        flat, pitch = flat_rows(inner)
        identity = DensityTables(np.eye(3), headroom=7.0)
        amounts = optical_density(np.arange(256))
        moves = identity.packed(np.outer(amounts, with_residual(vectors)[0]))
        _recombine(flat, pitch, before, after, identity.parts, moves, identity.values, out)
    return out


@jit()
def _recombine(flat, pitch, before, after, parts, moves, values, out):
    """The densities of a pixel plus the change of its stain's amount along that stain."""
    height, width, _ = out.shape
    for y in range(height):
        line = flat[y * pitch : y * pitch + 3 * width]
        for x in range(width):
            total = parts[0, line[3 * x]] + parts[1, line[3 * x + 1]] + parts[2, line[3 * x + 2]]
            total += moves[after[y, x]] - moves[before[y, x]]
            out[y, x, 0] = values[0, total & MASK]
            out[y, x, 1] = values[1, (total >> BITS) & MASK]
            out[y, x, 2] = values[2, total >> (2 * BITS)]
