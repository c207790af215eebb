"""Dense windows: the network runs once over a large block, and any window's score is the mean of its map of scores.

For a network that ends in global average pooling and a linear layer, the mean of the class-activation map over a tile
*is* the tile's score, but for what the padding at the tile's border does. Run over a block instead of tile by tile,
overlapping windows cost a halo, not their number, and see true context instead of zeros. The outermost ring of a
window's cells is left out of the mean: it looks furthest beyond the window.

Blocks are groups of whole tiles on a grid fixed to the slide, their side given by the card, and are always run whole:
a window's score depends on the slide, the model and the overlap alone. Pure.
"""

import numpy as np

from wsiengine.errors import CardError
from wsiengine.geometry import Box
from wsiengine.grid import TileGrid
from wsiengine.models.card import Card

RING_CELLS = 1


def block_tiles(card: Card, grid: TileGrid) -> int:
    """Tiles along the side of a dense block: as many as start within the card's ``dense.block_px``.

    Raises:
        CardError: The card has no dense form.
    """
    if card.dense is None:
        raise CardError(
            f"model {card.name} cannot be run over dense windows: its card gives no `dense` block and halo.",
            hint="--mode tiles; only networks that end in average pooling and a linear layer have the form.",
        )
    return max(1, card.dense.block_px // grid.stride_px)


def block_box_px(tiles: Box, grid: TileGrid) -> Box:
    """The working pixels under all tiles of a block, wanted or not, overhang included."""
    return grid.tile_box_px(tiles.y0, tiles.x0).union(grid.tile_box_px(tiles.y1 - 1, tiles.x1 - 1))


def window_means(maps: np.ndarray, corners: np.ndarray, tile: int, *, gated: bool) -> np.ndarray:
    """Scores of windows from the map of scores around them.

    Sums run over rows, then columns, in the same order for every window, so that a window has one value whatever
    array it was cut from.

    Args:
        maps: (rows, cols, channels) float32, one value per cell.
        corners: (N, 2) integers: row and column of each window's first cell.
        tile: Side of a window in cells.
        gated: The last channel is a fraction of the whole window, of which no ring is left out.

    Returns:
        (N, channels) float32.
    """
    ring = RING_CELLS if tile > 2 * RING_CELLS else 0
    inner = _sums(maps, corners + ring, tile - 2 * ring) / (tile - 2 * ring) ** 2
    if gated:
        inner[:, -1] = _sums(maps[..., -1:], corners, tile)[:, 0] / tile**2
    return inner.astype(np.float32)


def _sums(maps: np.ndarray, corners: np.ndarray, side: int) -> np.ndarray:
    """Sums over ``side`` × ``side`` cells from each corner: float64 (N, channels)."""
    rows, cols = corners[:, 0], corners[:, 1]
    total = np.zeros((len(corners), maps.shape[2]), np.float64)
    for y in range(side):
        for x in range(side):
            total += maps[rows + y, cols + x]
    return total
