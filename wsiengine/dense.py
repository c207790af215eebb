"""Dense windows: the network runs once over large blocks, and any window's score is the mean of its map of scores.

For a network that ends in global average pooling and a linear layer, the mean of the class-activation map over a tile
*is* the tile's score, but for what the padding at the tile's border does. Run over a block instead of tile by tile,
overlapping windows cost nothing more, and see true context instead of zeros. The outermost ring of a window's cells is
left out of the mean: it looks furthest beyond the window.

What a run computes, keeps and resumes here are the *cells* of that map: the run's own grid has tiles of one cell
(:func:`work`). Its blocks lie on a grid fixed to the slide, their side and halo given by the card; of a block at the
tissue's edge only the part around the cells that any window of the run needs is run. So every cell is computed once, by
one block, whatever the overlap, and windows are a pure function of the cells. Pure.
"""

from dataclasses import replace

import numpy as np

from wsiengine.errors import CardError
from wsiengine.geometry import Box
from wsiengine.grid import Axis, TileGrid
from wsiengine.models.card import Card
from wsiengine.scratch import IN_MEMORY, Scratch

RING_CELLS = 1
STRIP_PX = 1024  # rows of a block read at once: pixels of a finer level take several times the memory of its own
_STEP_CELLS = 4  # by which a part of a block grows: few shapes, so that the session's memory is used again
_STRIP = 1 << 20  # sums held at once


def block_cells(card: Card) -> int:
    """Cells along the side of a dense block.

    Raises:
        CardError: The card has no dense form.
    """
    if card.dense is None:
        raise CardError(
            f"model {card.name} cannot be run over dense windows: its card gives no `dense` block and halo.",
            hint="--mode tiles; only networks that end in average pooling and a linear layer have the form.",
        )
    return max(1, card.dense.block_px // card.output_stride_px)


def work(grid: TileGrid, wanted: np.ndarray, scratch: Scratch = IN_MEMORY) -> tuple[TileGrid, np.ndarray]:
    """The run's own grid, whose tiles are single cells, and which of them the wanted windows need.

    The last windows overhang the slide, and so does this grid.

    Args:
        grid: The grid of the windows.
        wanted: (tile rows, tile cols) bool: windows to score.
        scratch: Makes the table of cells.
    """
    reach = [(axis.count - 1) * axis.stride + axis.tile for axis in (grid.rows, grid.cols)]
    rows, cols = (replace(axis, extent=cells) for axis, cells in zip((grid.rows, grid.cols), reach, strict=True))
    cells = TileGrid(grid.lattice, Axis(reach[0], 1, 1), Axis(reach[1], 1, 1))
    return cells, TileGrid(grid.lattice, rows, cols).covered_by(wanted, scratch)


def run_box(block: Box, wanted: np.ndarray) -> Box:
    """The cells of a block that are run: a box round those wanted by the whole run, in steps from the block's corner.

    It depends on the run, never on what is left of it.
    """
    part = wanted[block.slices]
    y, x = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    if not len(y):
        return Box(block.y0, block.x0, block.y0, block.x0)
    (y0, y1), (x0, x1) = ((first[0] // _STEP_CELLS, first[-1] // _STEP_CELLS + 1) for first in (y, x))
    around = Box(int(y0), int(x0), int(y1), int(x1)).scale(_STEP_CELLS).shift(block.y0, block.x0)
    return around.intersect(block)


def wanted_around(block: Box, wanted: np.ndarray, card: Card) -> np.ndarray:
    """Which cells of what a block reads, halo included, the whole run wants of this block: (rows, cols) bool."""
    halo = card.dense.halo_px // card.output_stride_px if card.dense else 0
    return np.pad(wanted[run_box(block, wanted).slices], halo)


def window_means(cells: np.ndarray, grid: TileGrid, *, gated: bool, scratch: Scratch = IN_MEMORY) -> np.ndarray:
    """Scores of all windows from the map of scores.

    Sums run over rows, then columns, in the same order for every window, so that a window has one value whatever part
    of the map it was cut from.

    Args:
        cells: (rows, cols, channels) float32, one value per cell; NaN where none was computed.
        grid: The grid of the windows, the first at the first cell.
        gated: The last channel is a fraction of the whole window, of which no ring is left out.
        scratch: Makes the table of scores.

    Returns:
        (tile rows, tile cols, channels) float32; NaN where a cell that the window's score needs was not computed.
    """
    axes = zip((grid.rows, grid.cols), cells.shape[:2], strict=True)
    rows, cols = (min(axis.count, (n - axis.tile) // axis.stride + 1) for axis, n in axes)
    out = scratch.zeros((rows, cols, cells.shape[2]), np.float32)
    strip = max(1, _STRIP // max(1, cols * cells.shape[2]))
    for first in range(0, rows, strip):
        stop = min(first + strip, rows)
        out[first:stop] = _strip_means(cells, grid, (first, stop, cols), gated)
    return out


def _strip_means(cells: np.ndarray, grid: TileGrid, windows: tuple[int, int, int], gated: bool) -> np.ndarray:
    """Windows of rows ``first`` to ``stop``, of which there are ``cols``: float64."""
    tile, stride = grid.rows.tile, grid.rows.stride
    first, stop, cols = windows
    ring = RING_CELLS if tile > 2 * RING_CELLS else 0

    def sums(channels: slice, ring: int) -> np.ndarray:
        total = np.zeros((stop - first, cols, len(range(*channels.indices(cells.shape[2])))), np.float64)
        for y in range(first * stride + ring, first * stride + tile - ring):
            for x in range(ring, tile - ring):
                down, across = y + (stop - first - 1) * stride + 1, x + (cols - 1) * stride + 1
                total += cells[y:down:stride, x:across:stride, channels]
        return total / (tile - 2 * ring) ** 2

    if not gated:
        return sums(slice(None), ring)
    means = np.concatenate([sums(slice(0, -1), ring), sums(slice(-1, None), 0)], axis=-1)
    means[np.isnan(means).any(axis=-1)] = np.nan  # the gate sees the ring, where the classes do not look
    return means
