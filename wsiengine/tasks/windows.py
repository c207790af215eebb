"""The task ``classify`` over dense windows: blocks yield cells of the map of scores (:mod:`wsiengine.dense`)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from wsiengine.dense import wanted_around, window_means
from wsiengine.geometry import Box
from wsiengine.grid import Axis, Block, TileGrid
from wsiengine.job import BlockScores, Job
from wsiengine.journal import Recovered
from wsiengine.slides.tolerant import TolerantSlide
from wsiengine.tasks.base import Gathered, View
from wsiengine.tasks.classification import Classification
from wsiengine.tasks.classify import MapLayout, blend, tile_probabilities

if TYPE_CHECKING:
    from wsiengine.planning import Plan


class CellScores:
    """Cells of a run on their way to the scores of its windows."""

    def __init__(self, plan: "Plan") -> None:
        self._plan = plan
        shape = (*plan.work[1].shape, plan.card.score_channels)
        self._cells = plan.scratch.full(shape, np.nan, np.float32)

    @property
    def ran(self) -> np.ndarray:
        """(rows, cols) bool: cells of the run's own grid."""
        return ~np.isnan(self._cells[..., 0])

    def add(self, result: BlockScores) -> None:
        ran = result.ran
        self._cells[result.tiles.slices][ran] = result.scores[ran]

    def arrays(self) -> Mapping[str, np.ndarray]:
        """``scores`` of the windows, and the ``cells`` they come from."""
        plan = self._plan
        gated = plan.card.gate is not None
        scores = window_means(self._cells, plan.grid, gated=gated, scratch=plan.scratch)
        scores[~plan.wanted] = np.nan
        return {"scores": scores, "cells": self._cells}


@dataclass(frozen=True)
class DenseClassification(Classification):
    """``wanted`` (tile rows, tile cols) bool: windows of the run, where whole results are put together."""

    wanted: np.ndarray | None = None

    def score(self, job: Job, block: Block, view: View) -> BlockScores:
        wanted = wanted_around(block.tiles, job.wanted, job.runtime.card)
        maps = job.runtime.maps(view.pixels, wanted=wanted, tolerant=isinstance(job.slide, TolerantSlide))
        y, x = (view.corners_px // job.grid.lattice.cell_px).T
        values = maps[y, x]
        if view.bad is not None:
            values = np.where(view.bad[:, None], np.nan, values)
        scores = np.full((*block.tiles.shape, values.shape[1]), np.nan, np.float32)
        scores[block.wanted] = values
        return BlockScores(block.tiles, scores, {})

    def gather(self, plan: "Plan", recovered: Recovered) -> Gathered:
        gathered = CellScores(plan)
        for cells, values in recovered.tiles:
            gathered.add(BlockScores(cells, values, {}))
        return gathered

    def held(self, plan: "Plan") -> list[int]:
        cells = plan.work[1].size
        return [*super().held(plan), cells, 4 * cells * plan.card.score_channels]

    def edges(self, axis: Axis, block_tiles: int) -> list[int]:
        return [*range(0, axis.extent, block_tiles), axis.extent]

    def around(self, cells: Box, grid: TileGrid) -> Box:
        windows = grid.covering(cells)
        (y0, y1), (x0, x1) = (
            (first * axis.stride, (stop - 1) * axis.stride + axis.tile)
            for axis, first, stop in ((grid.rows, windows.y0, windows.y1), (grid.cols, windows.x0, windows.x1))
        )
        return Box(y0, x0, y1, x1)

    def chunk(
        self, layout: MapLayout, grid: TileGrid, analysed: np.ndarray, cells: Box, results: list[BlockScores]
    ) -> np.ndarray:
        windows, around = grid.covering(cells), self.around(cells, grid)
        if not results:
            return np.zeros((*cells.shape, len(layout.channels)), np.uint8)
        channels = results[0].scores.shape[2]
        found = np.full((*around.shape, channels), np.nan, np.float32)
        for block in results:
            common = block.tiles.intersect(around)
            if common:
                found[common.relative_to(around).slices] = block.scores[common.relative_to(block.tiles).slices]
        rows, cols = replace(grid.rows, extent=around.height), replace(grid.cols, extent=around.width)
        scores = window_means(found, TileGrid(grid.lattice, rows, cols), gated=layout.gate_minimum is not None)
        assert self.wanted is not None
        scores[~self.wanted[windows.slices]] = np.nan
        return blend(tile_probabilities(scores, layout), (windows.y0, windows.x0), analysed, grid, cells)
