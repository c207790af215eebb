"""The task ``classify``: one row of class scores for each tile. Its arithmetic is in :mod:`.classify`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiengine.geometry import Box
from wsiengine.grid import Axis, Block, TileGrid
from wsiengine.job import BlockScores, Job
from wsiengine.journal import Journal, Recovered
from wsiengine.models.card import Card
from wsiengine.slides.tolerant import TolerantSlide
from wsiengine.tasks.base import Gathered, View
from wsiengine.tasks.classify import MapLayout, blend, tile_probabilities

if TYPE_CHECKING:
    from wsiengine.annotations import Annotation
    from wsiengine.finishing import Finish
    from wsiengine.planning import Plan
    from wsiengine.truth import Truth

_STRIP = 256  # cells blended at a time, squared: their sums take some hundred bytes each


class TileScores:
    """Scores of all tiles of a run: (tile rows, tile cols, score channels) float32, NaN where not run."""

    def __init__(self, plan: "Plan") -> None:
        shape = (*plan.wanted.shape, plan.card.score_channels)
        self._scores = plan.scratch.full(shape, np.nan, np.float32)

    @property
    def ran(self) -> np.ndarray:
        return ~np.isnan(self._scores[..., 0])

    def add(self, result: BlockScores) -> None:
        """Copy the tiles that ``result`` has; blocks of an earlier attempt may have been cut otherwise."""
        ran = result.ran
        self._scores[result.tiles.slices][ran] = result.scores[ran]

    def arrays(self) -> Mapping[str, np.ndarray]:
        return {"scores": self._scores}


class Classification:
    """See :class:`wsiengine.tasks.base.Task`. The truth is the array ``scores``."""

    name = "classify"
    activation_bytes_per_px = 288  # ResNet-18 and MobileNetV2, measured

    def layout(self, card: Card) -> MapLayout:
        return MapLayout.of(card)

    def stored_layout(self, facts: Mapping[str, Any]) -> MapLayout:
        return MapLayout(**facts)

    def score(self, job: Job, block: Block, view: View) -> BlockScores:
        tolerant = {"tolerant": True} if isinstance(job.slide, TolerantSlide) else {}
        values = job.runtime.scores(view.pixels, view.corners_px, **tolerant)
        if view.bad is not None:
            values = np.where(view.bad[:, None], np.nan, values)
        scores = np.full((*block.tiles.shape, values.shape[1]), np.nan, np.float32)
        scores[block.wanted] = values
        return BlockScores(block.tiles, scores, {})

    def record(self, journal: Journal, result: BlockScores) -> None:
        journal.add_tiles(result.tiles, result.scores)

    def gather(self, plan: "Plan", recovered: Recovered) -> Gathered:
        gathered = TileScores(plan)
        for tiles, values in recovered.tiles:
            gathered.add(BlockScores(tiles, values, {}))
        return gathered

    def held(self, plan: "Plan") -> list[int]:
        cells, tiles = plan.analysed.size, plan.wanted.size
        regions = [cells, *([4 * cells] * 3)]  # labels; components, owners, tiles counted
        return [tiles, 4 * tiles * plan.card.score_channels, cells, cells * len(plan.layout.channels), *regions]

    def memory(self, plan: "Plan") -> int:
        return 0

    def edges(self, axis: Axis, block_tiles: int) -> list[int]:
        """Where a block's first tile starts; the last chunk takes what overhangs."""
        return [*(first * axis.stride for first in range(0, axis.count, block_tiles)), axis.extent]

    def around(self, cells: Box, grid: TileGrid) -> Box:
        return grid.covering(cells)

    def chunk(
        self, layout: MapLayout, grid: TileGrid, analysed: np.ndarray, cells: Box, results: list[BlockScores]
    ) -> np.ndarray:
        around = grid.covering(cells)
        tiles = np.full((*around.shape, len(layout.channels)), np.nan, np.float32)
        for block in results:
            common = block.tiles.intersect(around)
            if common:
                here = block.scores[common.relative_to(block.tiles).slices]
                tiles[common.relative_to(around).slices] = tile_probabilities(here, layout)
        return blend(tiles, (around.y0, around.x0), analysed, grid, cells)

    def map(self, truth: "Truth") -> np.ndarray:
        extent = truth.grid.lattice.extent_cells
        out = truth.scratch.zeros((*extent.shape, len(truth.layout.channels)), np.uint8)
        for cells in Box.of(extent).pieces(_STRIP, _STRIP):
            analysed = truth.analysed[cells.slices]
            if analysed.any():
                around = truth.grid.covering(cells)
                tiles = tile_probabilities(truth.scores[around.slices], truth.layout)
                out[cells.slices] = blend(tiles, (around.y0, around.x0), analysed, truth.grid, cells)
        return out

    def annotate(self, truth: "Truth", coded: np.ndarray, finish: "Finish") -> "list[Annotation]":
        from wsiengine.finishing import class_regions

        return class_regions(truth, coded, finish)

    def summarise(self, truth: "Truth", annotations: "Sequence[Annotation]") -> dict[str, Any]:
        from wsiengine.finishing import class_areas

        return class_areas(truth, annotations)

    def write(self, truth: "Truth", annotations: "Sequence[Annotation]", finish: "Finish", folder: Path) -> list[str]:
        """``tiles.geojson``, where it was asked for."""
        from wsiengine.finishing import write_tiles

        return write_tiles(truth, finish, folder) if finish.tiles else []
