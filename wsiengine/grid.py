"""Which tiles cover a slide, which of them are run, and how they are grouped into blocks. Pure.

Everything counts in cells of the :class:`~wsiengine.geometry.Lattice`. One :class:`Axis` answers for rows, one for
columns; the 2-D grid is their product. A cell is *owned* by the tile whose centre is nearest (the lower one on a
tie), so that a tile is worth running exactly when it owns a cell to be analysed.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from wsiengine.errors import PlanError
from wsiengine.geometry import Box, Lattice
from wsiengine.scratch import IN_MEMORY, Scratch


@dataclass(frozen=True, slots=True)
class Axis:
    """Tiles of ``tile`` cells every ``stride`` cells, from 0, until ``extent`` cells are covered.

    The last tile may overhang. ``stride`` ≤ ``tile``: there are no gaps.
    """

    extent: int
    tile: int
    stride: int

    def __post_init__(self) -> None:
        if self.extent < 1 or not 1 <= self.stride <= self.tile:
            raise ValueError(f"no such axis: {self}")

    @property
    def count(self) -> int:
        """Number of tiles.

        >>> Axis(extent=20, tile=7, stride=5).count
        4
        >>> Axis(extent=3, tile=7, stride=5).count
        1
        """
        return 1 if self.extent <= self.tile else -(-(self.extent - self.tile) // self.stride) + 1

    @property
    def depth(self) -> int:
        """The most tiles that cover one cell."""
        return -(-self.tile // self.stride)

    def owner(self) -> np.ndarray:
        """(extent,) int64: the tile that owns each cell."""
        cells = np.arange(self.extent)
        nearest = -((self.tile + self.stride - 2 * cells - 1) // (2 * self.stride))  # ceil, ties to the lower
        return np.clip(nearest, 0, self.count - 1)

    def owned_starts(self) -> np.ndarray:
        """(count,) int64: the first cell each tile owns; its last is before the next tile's first."""
        return np.searchsorted(self.owner(), np.arange(self.count))

    def covering(self, first: int, stop: int) -> tuple[int, int]:
        """Half-open range of the tiles that touch cells [first, stop)."""
        low = max(0, (first - self.tile) // self.stride + 1)
        high = min(self.count, (stop - 1) // self.stride + 1)
        return min(low, high), high

    def cells(self, first: int, stop: int) -> tuple[int, int]:
        """Half-open range of the cells under tiles [first, stop), clipped to the extent."""
        return first * self.stride, min((stop - 1) * self.stride + self.tile, self.extent)


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Square tiles over a slide, anchored at its origin."""

    lattice: Lattice
    rows: Axis
    cols: Axis

    @classmethod
    def cover(cls, lattice: Lattice, tile_px: int, overlap: float) -> "TileGrid":
        """Tiles of ``tile_px`` working pixels at a linear ``overlap`` in [0, 1), rounded to a whole cell.

        Raises:
            PlanError: The overlap is outside [0, 1), or the tile is not a whole number of cells.
        """
        if not 0 <= overlap < 1:
            raise PlanError(f"The overlap must be at least 0 and below 1, not {overlap:g}.", hint="--overlap 0.3")
        if tile_px % lattice.cell_px:
            raise PlanError(f"A tile of {tile_px} px is not a whole number of cells of {lattice.cell_px} px.")
        tile = tile_px // lattice.cell_px
        stride = max(1, round((1 - overlap) * tile))
        extent = lattice.extent_cells
        return cls(lattice, Axis(extent.height, tile, stride), Axis(extent.width, tile, stride))

    @property
    def shape(self) -> tuple[int, int]:
        """(tile rows, tile cols)."""
        return self.rows.count, self.cols.count

    @property
    def tile_px(self) -> int:
        return self.rows.tile * self.lattice.cell_px

    @property
    def stride_px(self) -> int:
        return self.rows.stride * self.lattice.cell_px

    @property
    def overlap(self) -> float:
        """The linear overlap used, after rounding to a cell."""
        return 1 - self.rows.stride / self.rows.tile

    def owners_of(self, analysed: np.ndarray) -> np.ndarray:
        """(tile rows, tile cols) bool: tiles that own at least one cell of ``analysed`` (rows, cols) bool."""
        by_row = np.logical_or.reduceat(analysed, self.rows.owned_starts(), axis=0)
        return np.logical_or.reduceat(by_row, self.cols.owned_starts(), axis=1)

    def covered_by(self, wanted: np.ndarray, scratch: Scratch = IN_MEMORY) -> np.ndarray:
        """(rows, cols) bool from ``scratch``: cells under a tile of ``wanted`` (tile rows, tile cols) bool."""

        def strip(rows: slice) -> np.ndarray:
            return _spread(_spread(wanted, self.rows, rows).T, self.cols, slice(0, self.cols.extent)).T

        return scratch.by_strips((self.rows.extent, self.cols.extent), bool, strip)

    def centres_l0(self) -> tuple[np.ndarray, np.ndarray]:
        """Tile centres in level-0 pixels: y (tile rows,), x (tile cols,), float64."""
        fy, fx = self.lattice.l0_per_cell
        half = self.rows.tile / 2
        return (
            (np.arange(self.rows.count) * self.rows.stride + half) * fy,
            (np.arange(self.cols.count) * self.cols.stride + half) * fx,
        )

    def tile_box_px(self, row: int, col: int) -> Box:
        y, x = row * self.stride_px, col * self.stride_px
        return Box(y, x, y + self.tile_px, x + self.tile_px)

    def covering(self, cells: Box) -> Box:
        """The tiles (as a box in tile units) that touch the given cells."""
        i0, i1 = self.rows.covering(cells.y0, cells.y1)
        j0, j1 = self.cols.covering(cells.x0, cells.x1)
        return Box(i0, j0, i1, j1)


def _spread(wanted: np.ndarray, axis: Axis, cells: slice) -> np.ndarray:
    """(cells, …) bool: whether any of the tiles over a cell, which are entries of ``wanted`` (tiles, …), is wanted."""
    cell = np.arange(cells.start, cells.stop)
    found = np.zeros((len(cell), *wanted.shape[1:]), bool)
    for back in range(axis.depth):
        tile = cell // axis.stride - back
        over = (tile >= 0) & (tile < axis.count) & (tile * axis.stride + axis.tile > cell)
        found[over] |= wanted[tile[over]]
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A group of neighbouring tiles that is read once and scored together.

    ``tiles`` is in tile units; ``wanted`` (bool, shape of ``tiles``) says which of them are run.
    """

    tiles: Box
    wanted: np.ndarray

    @property
    def tile_count(self) -> int:
        return int(np.count_nonzero(self.wanted))

    def origins_px(self, grid: TileGrid) -> np.ndarray:
        """(N, 2) int64: (y, x) of each wanted tile, absolute working pixels, row-major."""
        return (np.argwhere(self.wanted) + (self.tiles.y0, self.tiles.x0)) * grid.stride_px

    def box_px(self, grid: TileGrid) -> Box:
        """The working pixels under the wanted tiles: what the block reads (before any halo)."""
        rows, cols = np.flatnonzero(self.wanted.any(axis=1)), np.flatnonzero(self.wanted.any(axis=0))
        first = grid.tile_box_px(self.tiles.y0 + int(rows[0]), self.tiles.x0 + int(cols[0]))
        last = grid.tile_box_px(self.tiles.y0 + int(rows[-1]), self.tiles.x0 + int(cols[-1]))
        return first.union(last)


def blocks_of(wanted: np.ndarray, block_tiles: int) -> Iterator[Block]:
    """Blocks of ``block_tiles`` × ``block_tiles`` tiles with at least one wanted tile, row-major."""
    rows, cols = wanted.shape
    for tiles in Box(0, 0, rows, cols).pieces(block_tiles, block_tiles):
        part = wanted[tiles.slices]
        if part.any():
            yield Block(tiles, part.copy())


def tapered(blocks: Iterable[Block], last: int) -> Iterator[Block]:
    """The same tiles in the same order of blocks, but the ``last`` ones in quarters: threads end closer together."""
    waiting: deque[Block] = deque()
    for block in blocks:
        waiting.append(block)
        if len(waiting) > last:
            yield waiting.popleft()
    for block in waiting:
        half = max(1, -(-max(block.tiles.shape) // 2))
        for tiles in block.tiles.pieces(half, half):
            wanted = block.wanted[tiles.relative_to(block.tiles).slices]
            if wanted.any():
                yield Block(tiles, wanted.copy())
