"""The task ``detect``: objects, each once, however tiles and blocks were cut. Its arithmetic is in :mod:`.detect`.

A block yields the candidates of its tiles (:mod:`wsiengine.decoding`); what they are depends on each tile alone. When
all are there, one pass over them makes objects (:mod:`wsiengine.merging`). The truth is these objects, of all scores
that the card keeps, and the map of what candidates cover; filters by class, score and area come after it.
"""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiengine.crops import columns, second_stage
from wsiengine.decoding import candidates, decode, with_extra
from wsiengine.errors import ModelError, ScoreError
from wsiengine.geometry import Box
from wsiengine.grid import Axis, Block, TileGrid
from wsiengine.journal import Journal, Recovered
from wsiengine.merging import merge
from wsiengine.models.card import Card
from wsiengine.objects import Objects, TileView, joined, objects_from_bytes, objects_of
from wsiengine.scratch import strips
from wsiengine.slides.tolerant import TolerantSlide
from wsiengine.tasks.base import Packed, View
from wsiengine.tasks.classify import MapLayout
from wsiengine.tasks.detect import DetectLayout, cover, slide_px, tile_view

if TYPE_CHECKING:
    from wsiengine.annotations import Annotation
    from wsiengine.finishing import Finish
    from wsiengine.job import Job
    from wsiengine.planning import Plan
    from wsiengine.truth import Truth

MOST_OBJECTS = 5_000_000  # of one slide, before they are merged
_BYTES_PER_CANDIDATE = 400  # its columns and mask, twice while they are merged, and the pairs that it is part of
_USUAL_PER_TILE = 100  # at least planned for, and a quarter of what the card allows, which a dense tissue comes near
_LEFT_OUT = struct.Struct("<I")
_OBJECT = "object_"  # before the columns' names, among the arrays of the truth


class CandidatesSoFar:
    """The candidates of a run, block by block as they come."""

    def __init__(self, plan: "Plan") -> None:
        self.ran = np.zeros(plan.wanted.shape, bool)
        self._plan = plan
        self._parts: list[Objects] = []
        self._count = self._left_out = 0

    def add(self, result: Packed) -> None:
        """Take the candidates of a block.

        Raises:
            ModelError: There are more than any slide's objects.
        """
        left_out, found = unpack(result.payload)
        self.ran[result.tiles.slices] |= result.ran
        self._left_out += left_out
        self._count += len(found)
        self._parts.append(found)
        if self._count > MOST_OBJECTS:
            raise ModelError(
                f"{self._plan.card.name} found more than {MOST_OBJECTS:,} candidates on this slide.",
                hint="raise the card's detection.minimum_score, or analyse a --region.",
            )

    def arrays(self) -> Mapping[str, np.ndarray]:
        plan = self._plan
        if plan.card.detection is None:
            raise ValueError(f"{plan.card.name} is no detector")
        found = joined(self._parts, columns(plan.card.second))
        self._parts = []
        found = found.take(np.argsort(found.tiles, kind="stable"))  # each tile's come from one block, best first
        place = (Box.of(plan.lattice.extent_cells), plan.lattice.cell_px)
        analysed = plan.grid.covered_by(self.ran, plan.scratch)
        for rows in strips(analysed.shape):
            analysed[rows] &= plan.analysed[rows]
        coded = cover(found, len(plan.layout.channels), analysed, place, plan.scratch)
        merged = merge(found, plan.card.detection, plan.grid)
        return {
            "map": coded,
            "ran": self.ran.astype(np.uint8),
            "left_out": np.array([self._left_out], np.int64),
            "calibrated": np.array([plan.options.calibrated], np.uint8),
            **{_OBJECT + name: column for name, column in merged.columns().items()},
        }


def pack(left_out: int, found: Objects) -> bytes:
    """Candidates as bytes, and how many a tile had beyond the card's limit."""
    return _LEFT_OUT.pack(left_out) + found.to_bytes()


def unpack(payload: bytes) -> tuple[int, Objects]:
    """What :func:`pack` packed."""
    return _LEFT_OUT.unpack_from(payload)[0], objects_from_bytes(payload[_LEFT_OUT.size :])


def objects_in(truth: "Truth") -> Objects:
    """All objects of a finished run."""
    return objects_of({name.removeprefix(_OBJECT): a for name, a in truth.arrays.items() if name.startswith(_OBJECT)})


class Detection:
    """See :class:`wsiengine.tasks.base.Task`. The truth is the merged objects, and the map of what candidates cover."""

    name = "detect"
    activation_bytes_per_px = 640  # a small centre network, measured: its neck holds maps at a quarter of the side

    def layout(self, card: Card) -> DetectLayout:
        return DetectLayout.of(card)

    def stored_layout(self, facts: Mapping[str, Any]) -> DetectLayout:
        return DetectLayout.stored(facts)

    def score(self, job: "Job", block: Block, view: View) -> Packed:
        places = np.argwhere(block.wanted) + (block.tiles.y0, block.tiles.x0)
        pixels = _checked_pixels(job, view, places)
        parts, left_out = [], 0
        roles = job.runtime.card.outputs.roles
        bad = view.bad_tiles()
        for k, arrays in enumerate(job.runtime.outputs(pixels, view.corners_px)):
            if bad[k]:
                continue
            tile = tile_view(job.grid, job.wanted, *places[k].tolist())
            try:
                found, beyond = _found(job, dict(zip(roles, arrays, strict=True)), tile)
                parts.append(_with_second(job, found, tile, _tile(job, pixels, view.corners_px[k])))
            except ScoreError:
                if not isinstance(job.slide, TolerantSlide):
                    raise
                bad[k] = True
                continue
            left_out += beyond
        return Packed.of(block, bad, pack(left_out, joined(parts, columns(job.runtime.card.second))))

    def record(self, journal: Journal, result: Packed) -> None:
        journal.add_block(result.tiles, result.ran, result.payload)

    def gather(self, plan: "Plan", recovered: Recovered) -> CandidatesSoFar:
        gathered = CandidatesSoFar(plan)
        for tiles, ran, payload in recovered.blocks:
            gathered.add(Packed(tiles, ran, payload))
        return gathered

    def held(self, plan: "Plan") -> list[int]:
        """The map; what was analysed, its parts while its area is told."""
        cells = plan.analysed.size
        return [plan.wanted.size, cells, cells * len(plan.layout.channels), cells, 4 * cells]

    def memory(self, plan: "Plan") -> int:
        """Candidates, as many as a tissue of small cells has."""
        allowed = plan.card.detection.per_tile if plan.card.detection else _USUAL_PER_TILE
        count = min(MOST_OBJECTS, int(plan.wanted.sum()) * min(allowed, max(_USUAL_PER_TILE, allowed // 4)))
        return count * _BYTES_PER_CANDIDATE

    def edges(self, axis: Axis, block_tiles: int) -> list[int]:
        """Where a block's first tile starts; the last chunk takes what overhangs."""
        return [*(first * axis.stride for first in range(0, axis.count, block_tiles)), axis.extent]

    def around(self, cells: Box, grid: TileGrid) -> Box:
        return grid.covering(cells)

    def chunk(
        self, layout: MapLayout, grid: TileGrid, analysed: np.ndarray, cells: Box, results: list[Packed]
    ) -> np.ndarray:
        found = joined([unpack(result.payload)[1] for result in results])
        seen = analysed & _covered(results, grid, cells)
        return cover(found, len(layout.channels), seen, (cells, grid.lattice.cell_px))

    def map(self, truth: "Truth") -> np.ndarray:
        return truth.arrays["map"]

    def annotate(self, truth: "Truth", coded: np.ndarray, finish: "Finish") -> "Sequence[Annotation]":
        from wsiengine.object_outputs import ObjectAnnotations

        return ObjectAnnotations.of(truth, finish)

    def summarise(self, truth: "Truth", annotations: "Sequence[Annotation]") -> dict[str, Any]:
        from wsiengine.object_outputs import ObjectAnnotations, count_objects

        if not isinstance(annotations, ObjectAnnotations):
            raise TypeError("the objects of a detector come from its own annotate")
        return count_objects(truth, annotations)

    def write(self, truth: "Truth", annotations: "Sequence[Annotation]", finish: "Finish", folder: Path) -> list[str]:
        """``objects.zarr``: the table of objects and the map of their density."""
        from wsiengine.object_outputs import ObjectAnnotations, write_table

        if not isinstance(annotations, ObjectAnnotations):
            raise TypeError("the objects of a detector come from its own annotate")
        write_table(truth, annotations, folder / "objects.zarr")
        return ["objects.zarr"]


def _covered(results: Sequence[Packed], grid: TileGrid, cells: Box) -> np.ndarray:
    """(cells.height, cells.width) bool: cells under a tile that ran."""
    seen = np.zeros(cells.shape, bool)
    for result in results:
        for i, j in (np.argwhere(result.ran) + (result.tiles.y0, result.tiles.x0)).tolist():
            (y0, y1), (x0, x1) = grid.rows.cells(i, i + 1), grid.cols.cells(j, j + 1)
            under = Box(y0, x0, y1, x1).intersect(cells)
            if under:
                seen[under.relative_to(cells).slices] = True
    return seen


def _found(job: "Job", arrays: Mapping[str, np.ndarray], tile: TileView) -> tuple[Objects, int]:
    """Candidates of a tile, and how many the model had beyond the card's limit.

    Raises:
        ScoreError: What the model says makes no sense; names the tile.
    """
    card = job.runtime.card
    try:
        found = decode(arrays, card)
    except ScoreError as error:
        fy, fx = job.grid.lattice.l0_per_px
        place = f"The tile starts at x {tile.x * fx:,.0f}, y {tile.y * fy:,.0f} (level-0 pixels)."
        raise ScoreError(f"{error.message} {place}", hint=error.hint) from error
    return candidates(found, tile, card), found.left_out


def _with_second(job: "Job", found: Objects, tile: TileView, pixels: np.ndarray) -> Objects:
    if job.runtime.card.second is None or not len(found):
        return with_extra(found, np.empty((len(found), columns(job.runtime.card.second))))
    return with_extra(found, second_stage(job.runtime, pixels, found.boxes - (tile.y, tile.x, tile.y, tile.x)))


def _tile(job: "Job", pixels: np.ndarray, corner: np.ndarray) -> np.ndarray:
    y, x = corner.tolist()
    return pixels[y : y + job.grid.tile_px, x : x + job.grid.tile_px]


def _checked_pixels(job: "Job", view: View, places: np.ndarray) -> np.ndarray:
    """The pixels, with the card's padding beyond the slide; of one colour for a grey model.

    Raises:
        ModelError: The picture has colours, and the model is one for grey pictures.
    """
    spec, pixels = job.runtime.card.input, view.pixels
    if spec.channels == 1 and not _is_grey(pixels):
        raise ModelError(
            f"{job.runtime.card.name} is a model for grey pictures, and this one has colours.",
            hint="--normalise grey turns it grey; is it the right model?",
        )
    if spec.pad is None:
        return pixels
    side = job.grid.tile_px
    end = np.ceil(slide_px(job.grid.lattice)).astype(np.int64)
    room = end - places * job.grid.stride_px  # rows and columns of the slide in each tile
    if (room >= side).all():
        return pixels
    padded = pixels.copy()
    for (y, x), (rows, cols) in zip(view.corners_px.tolist(), room.tolist(), strict=True):
        padded[y + min(rows, side) : y + side, x : x + side] = spec.pad
        padded[y : y + side, x + min(cols, side) : x + side] = spec.pad
    return padded


def _is_grey(pixels: np.ndarray) -> bool:
    """Whether the channels agree but for what a JPEG's colour planes add."""
    wide = pixels.astype(np.int16)
    return bool(np.abs(wide[..., 1:] - wide[..., :1]).max(initial=0) <= 6)
