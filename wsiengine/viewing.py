"""What the model sees of the slide: the pixels under a block, read and normalised. No model is needed for it."""

import time
from dataclasses import dataclass

import numpy as np

from wsiengine.dense import STRIP_PX, run_box
from wsiengine.geometry import Box
from wsiengine.grid import Block, TileGrid
from wsiengine.models.card import Card
from wsiengine.models.parts import PER_TILE
from wsiengine.normalise import Normaliser
from wsiengine.slides.base import PartReader, Slide, read_deep
from wsiengine.slides.tolerant import TolerantSlide
from wsiengine.tasks.base import View
from wsiengine.tilewise import shrunk_tiles


@dataclass(frozen=True, slots=True, eq=False)
class Viewer:
    """All that a block's pixels depend on. Pickles; see :class:`wsiengine.job.Job` for the fields.

    ``wanted`` is None but in a dense run, whose blocks read what windows of their neighbours need.
    """

    key: str
    slide: Slide
    card: Card
    normaliser: Normaliser
    grid: TileGrid
    wanted: np.ndarray | None

    def box_px(self, block: Block) -> Box:
        """What a block reads: the pixels under its wanted tiles; for a dense block the network's halo as well."""
        if self.wanted is None or self.card.dense is None:
            return block.box_px(self.grid)
        return run_box(block.tiles, self.wanted).scale(self.grid.lattice.cell_px).grow(self.card.dense.halo_px)

    def view(self, block: Block) -> tuple[View, dict[str, float]]:
        """The view of a block, and the seconds that reading and normalising it took.

        Raises:
            UnreadableSlide: A file tile under the block cannot be decoded.
        """
        started = time.perf_counter()
        if self.card.input.resample == PER_TILE:
            tile_px = self.grid.tile_px
            view = View(*shrunk_tiles(self.slide, self.grid.lattice, block.origins_px(self.grid), tile_px))
            return view, {"read": time.perf_counter() - started, "normalise": 0.0}
        box, halo = self.box_px(block), self.normaliser.halo_px
        pixels, bad = self._read(box.grow(halo), None) if halo else self._read(box, self._parts(block))
        read = time.perf_counter()
        pixels = pixels if self.card.input.deep else self.normaliser.apply(pixels, box)
        normalised = time.perf_counter()
        corners = block.origins_px(self.grid) - (box.y0, box.x0)
        touched = None if bad is None else self._touched(bad, corners + halo)
        if self.normaliser.tile_steps:
            pixels, corners = self._tile_by_tile(pixels, corners)
        return View(pixels, corners, touched), {"read": read - started, "normalise": normalised - read}

    def _parts(self, block: Block) -> list[Box] | None:
        """The tiles of a block, where they are not all that lies under it: nothing else need be decoded."""
        if self.wanted is not None or block.wanted.all():
            return None
        side = self.grid.tile_px
        return [Box(y, x, y + side, x + side) for y, x in block.origins_px(self.grid).tolist()]

    def _read(self, box: Box, parts: list[Box] | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Pixels, and where a slide that is read in spite of damage could not be decoded."""
        if parts is not None and isinstance(self.slide, PartReader) and not self.card.input.deep:
            return self.slide.read_parts(box, self.grid.lattice.mpp, parts), None
        if self.wanted is None:
            return self._read_at_once(box)
        pixels, bad = np.empty((*box.shape, 3), np.uint8), None
        for strip in box.pieces(STRIP_PX, box.width):
            rows = strip.relative_to(box).slices
            pixels[rows], marked = self._read_at_once(strip)
            if marked is not None:
                bad = np.zeros(box.shape, bool) if bad is None else bad
                bad[rows] = marked
        return pixels, bad

    def _read_at_once(self, box: Box) -> tuple[np.ndarray, np.ndarray | None]:
        if self.card.input.deep:
            return read_deep(self.slide, box, self.grid.lattice.mpp), None
        if isinstance(self.slide, TolerantSlide):
            return self.slide.read_marked(box, self.grid.lattice.mpp)
        return self.slide.read(box, self.grid.lattice.mpp), None

    def _touched(self, bad: np.ndarray, corners_px: np.ndarray) -> np.ndarray:
        """Which of the tiles at ``corners_px`` (tiles, 2) of ``bad`` (h, w) saw anything bad."""
        context = 0 if self.wanted is None or self.card.dense is None else self.card.dense.halo_px
        side = self.grid.tile_px + context
        return np.array(
            [bad[max(0, y - context) : y + side, max(0, x - context) : x + side].any() for y, x in corners_px]
        )

    def _tile_by_tile(self, pixels: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A block's tiles after the recipe's steps on each by itself: one below the other, with their new corners."""
        side = self.grid.tile_px
        column = np.empty((len(corners) * side, side, 3), np.uint8)
        for index, (y, x) in enumerate(corners.tolist()):
            tile = pixels[y : y + side, x : x + side]
            column[index * side : (index + 1) * side] = self.normaliser.apply_to_tile(tile)
        return column, np.stack([np.arange(len(corners)) * side, np.zeros(len(corners), np.int64)], axis=1)
