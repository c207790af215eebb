"""The task ``classify`` that also keeps the class-activation map of one class of every tile (``--cam``)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsiengine.attribution import evidence
from wsiengine.errors import ScoreError
from wsiengine.geometry import Box
from wsiengine.grid import Block, TileGrid
from wsiengine.job import BlockScores, Job
from wsiengine.journal import Recovered
from wsiengine.models.contract import check_scores, disagrees
from wsiengine.slides.tolerant import TolerantSlide
from wsiengine.tasks.base import Gathered, View
from wsiengine.tasks.classification import Classification
from wsiengine.tasks.classify import MapLayout

if TYPE_CHECKING:
    from wsiengine.planning import Plan


class TileCams:
    """Scores of all tiles and, behind them, the cells of their map."""

    def __init__(self, plan: "Plan") -> None:
        self._channels = plan.card.score_channels
        cells = plan.grid.rows.tile * plan.grid.cols.tile
        self._scratch = plan.scratch
        shape = (*plan.wanted.shape, self._channels + cells)
        self._values = plan.scratch.full(shape, np.nan, np.float32)

    @property
    def ran(self) -> np.ndarray:
        return ~np.isnan(self._values[..., 0])

    def add(self, result: BlockScores) -> None:
        ran = result.ran
        self._values[result.tiles.slices][ran] = result.scores[ran]

    def arrays(self) -> Mapping[str, np.ndarray]:
        """``scores``, and ``cam``: (tile rows, tile cols, cells of a tile) float32."""
        n = self._channels
        scores = self._scratch.zeros((*self._values.shape[:2], n), np.float32)
        scores[...] = self._values[..., :n]
        return {"scores": scores, "cam": self._values[..., n:]}


@dataclass(frozen=True)
class AttributedClassification(Classification):
    """``channels``: score channels of the class."""

    channels: tuple[int, ...] = ()

    def score(self, job: Job, block: Block, view: View) -> BlockScores:
        values = self._values(job, view)
        if view.bad is not None:
            values = np.where(view.bad[:, None], np.nan, values)
        scores = np.full((*block.tiles.shape, values.shape[1]), np.nan, np.float32)
        scores[block.wanted] = values
        return BlockScores(block.tiles, scores, {})

    def _values(self, job: Job, view: View) -> np.ndarray:
        """(N, score channels + cells of a tile) float32."""
        card, side = job.runtime.card, job.grid.rows.tile
        n = card.score_channels
        names = [name for name in (card.outputs.scores, card.outputs.gate, card.outputs.cam) if name is not None]
        values = np.empty((len(view.corners_px), n + side * side), np.float32)
        for row, found in zip(values, job.runtime.outputs(view.pixels, view.corners_px, names), strict=True):
            classes, *gate, cam = (np.asarray(array) for array in found)
            if cam.shape != (1, len(card.classes), side, side):
                raise disagrees(
                    card, f"a map of shape {cam.shape[1:]}", f"{(len(card.classes), side, side)} for a tile"
                )
            row[: classes.shape[1]] = classes[0]
            row[classes.shape[1] : n] = [g.reshape(-1)[0] for g in gate]
            row[n:] = evidence(np.moveaxis(cam[0], 0, -1), self.channels).reshape(-1)
        tolerant = isinstance(job.slide, TolerantSlide)
        check_scores(values[:, :n], view.corners_px, card, tolerant=tolerant)
        if not tolerant and not np.isfinite(values).all():
            raise ScoreError(f"model {card.name} gave NaN or infinity in its map; needed finite numbers.")
        return values

    def gather(self, plan: "Plan", recovered: Recovered) -> Gathered:
        gathered = TileCams(plan)
        for tiles, values in recovered.tiles:
            gathered.add(BlockScores(tiles, values, {}))
        return gathered

    def held(self, plan: "Plan") -> list[int]:
        per_tile = plan.grid.rows.tile * plan.grid.cols.tile + plan.card.score_channels
        return [*super().held(plan), 4 * plan.wanted.size * per_tile, *([4 * plan.analysed.size] * 3)]

    def chunk(
        self, layout: MapLayout, grid: TileGrid, analysed: np.ndarray, cells: Box, results: list[BlockScores]
    ) -> np.ndarray:
        n = sum(map(len, layout.sums)) + (layout.gate_minimum is not None)
        bare = [BlockScores(block.tiles, block.scores[..., :n], {}) for block in results]
        return super().chunk(layout, grid, analysed, cells, bare)
