"""The task ``segment``: maps of tiles, blended; objects that are whole across tiles and blocks.

Its arithmetic is in :mod:`.segment`. A block yields exact sums over the cells under its tiles; where blocks overlap,
sums are added, in any order. So every tile is run once, whatever the block (running the tiles along a block's edge for
both sides costs 1.3 to 1.8 times the work at 30 % overlap). The truth is the blended map, uint8 at the model's stride.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from wsiengine.areas import analysed_mm2
from wsiengine.errors import ScoreError
from wsiengine.geometry import Box, Lattice
from wsiengine.grid import Axis, Block, TileGrid
from wsiengine.journal import Journal, Recovered
from wsiengine.models.card import Card
from wsiengine.slides.tolerant import TolerantSlide
from wsiengine.tasks.base import Packed, View
from wsiengine.tasks.classify import MapLayout
from wsiengine.tasks.segment import LUMEN, Rule, SegmentLayout, Window, add_tiles, blended, find_objects, tile_map

if TYPE_CHECKING:
    from wsiengine.annotations import Annotation
    from wsiengine.finishing import Finish
    from wsiengine.job import Job
    from wsiengine.planning import Plan
    from wsiengine.truth import Truth

_STRIP = 1024  # cells blended at a time
_OUTLINE_BYTES_PER_CELL = 6  # of tissue that is all glands, measured
_QUICK = 1  # of zlib: maps are mostly flat, and more effort gains little


class MapSoFar:
    """Sums over all tiles of a run: (rows, cols, channels) uint16."""

    def __init__(self, plan: "Plan") -> None:
        self.ran = np.zeros(plan.wanted.shape, bool)
        self._plan = plan
        self._sums = plan.scratch.zeros((*plan.analysed.shape, len(plan.layout.channels)), np.uint16)

    def add(self, result: Packed) -> None:
        here = self._sums[_under(result.tiles, self._plan.grid).slices]
        here += unpack(result.payload, here.shape)
        self.ran[result.tiles.slices] |= result.ran

    def arrays(self) -> Mapping[str, np.ndarray]:
        grid, analysed = self._plan.grid, self._plan.analysed
        window = Window.of(grid, _segment_layout(self._plan.layout).halo)
        coded = self._plan.scratch.zeros(self._sums.shape, np.uint8)
        for cells in Box.of(grid.lattice.extent_cells).pieces(_STRIP, _STRIP):
            here = analysed[cells.slices]
            if here.any():
                found = blended(self._sums[cells.slices], self.ran, window, grid, cells)
                found[~here] = 0
                coded[cells.slices] = found
        self._sums = np.empty(0, np.uint16)  # a slice of it would keep all of it
        return {"map": coded, "ran": self.ran.astype(np.uint8)}


def pack(sums: np.ndarray) -> bytes:
    """Sums as bytes: their low bytes, then their high ones, which repeat more when they stand together."""
    halves = np.ascontiguousarray(sums.astype("<u2")).view(np.uint8).reshape(-1, 2)
    return zlib.compress(np.ascontiguousarray(halves.T).tobytes(), _QUICK)


def unpack(payload: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """What :func:`pack` packed: uint16."""
    halves = np.frombuffer(zlib.decompress(payload), np.uint8).reshape(2, -1)
    return np.ascontiguousarray(halves.T).view("<u2").reshape(shape)


def _under(tiles: Box, grid: TileGrid) -> Box:
    """The cells under tiles."""
    y0, y1 = grid.rows.cells(tiles.y0, tiles.y1)
    x0, x1 = grid.cols.cells(tiles.x0, tiles.x1)
    return Box(y0, x0, y1, x1)


class Segmentation:
    """See :class:`wsiengine.tasks.base.Task`. The truth is the map itself, and which tiles ran."""

    name = "segment"
    activation_bytes_per_px = 256  # the bundled U-Net took 184 to 200

    def layout(self, card: Card) -> SegmentLayout:
        return SegmentLayout.of(card)

    def stored_layout(self, facts: Mapping[str, Any]) -> SegmentLayout:
        return SegmentLayout(**facts)

    def score(self, job: "Job", block: Block, view: View) -> Packed:
        layout, grid = self.layout(job.runtime.card), job.grid
        window = Window.of(grid, layout.halo)
        cells = _under(block.tiles, grid)
        bad = view.bad_tiles()
        sums = add_tiles(_maps(job, block, view, bad), window, grid, cells, len(layout.channels))
        return Packed.of(block, bad, pack(sums))

    def record(self, journal: Journal, result: Packed) -> None:
        journal.add_block(result.tiles, result.ran, result.payload)

    def gather(self, plan: "Plan", recovered: Recovered) -> MapSoFar:
        gathered = MapSoFar(plan)
        for tiles, ran, payload in recovered.blocks:
            gathered.add(Packed(tiles, ran, payload))
        return gathered

    def held(self, plan: "Plan") -> list[int]:
        """The sums and the map; or the map, classes, borders and labels while objects are found."""
        cells, channels = plan.analysed.size, len(plan.layout.channels)
        merging = [2 * cells * channels, cells * channels]
        finding = [cells * channels, *([cells] * 4), *([4 * cells] * 3)]
        return [plan.wanted.size, cells, *max(merging, finding, key=sum)]

    def memory(self, plan: "Plan") -> int:
        """Outlines on their way to polygons."""
        return int(plan.tissue_um2 / plan.lattice.cell_um2 * _OUTLINE_BYTES_PER_CELL)

    def edges(self, axis: Axis, block_tiles: int) -> list[int]:
        """Where a block's first tile starts; the last chunk takes what overhangs."""
        return [*(first * axis.stride for first in range(0, axis.count, block_tiles)), axis.extent]

    def around(self, cells: Box, grid: TileGrid) -> Box:
        return grid.covering(cells)

    def chunk(
        self, layout: MapLayout, grid: TileGrid, analysed: np.ndarray, cells: Box, results: list[Packed]
    ) -> np.ndarray:
        layout = _segment_layout(layout)
        sums = np.zeros((*cells.shape, len(layout.channels)), np.uint16)
        ran = np.zeros(grid.shape, bool)
        for result in results:
            under = _under(result.tiles, grid)
            common = under.intersect(cells)
            if common:
                there = unpack(result.payload, (*under.shape, len(layout.channels)))
                sums[common.relative_to(cells).slices] += there[common.relative_to(under).slices]
            ran[result.tiles.slices] |= result.ran
        coded = blended(sums, ran, Window.of(grid, layout.halo), grid, cells)
        coded[~analysed] = 0
        return coded

    def map(self, truth: "Truth") -> np.ndarray:
        return truth.arrays["map"]

    def annotate(self, truth: "Truth", coded: np.ndarray, finish: "Finish") -> "list[Annotation]":
        """One per object: area, perimeter, solidity (area / area of the convex hull), share of lumen, probability.

        The share of lumen is that of bright pixels, and of glass that the tissue mask left out, in the object's cells.
        """
        from wsiengine.annotations import AnnotateOptions, annotate_objects

        layout, lattice = _segment_layout(truth.layout), truth.grid.lattice
        objects = find_objects(coded, layout, _rule(layout, lattice, finish), truth.scratch)
        options = AnnotateOptions(
            fingerprint=truth.fingerprint,
            identity=truth.key,
            tolerance_um=finish.tolerance_um,
            min_area_um2=max(finish.min_area_um2, layout.min_area_um2),
            clip_l0=shapely.from_wkt(truth.region_wkt) if truth.region_wkt else None,
            channel_names=layout.channels,
            scratch=truth.scratch,
        )
        probability = coded
        if LUMEN in layout.channels:
            probability = truth.scratch.by_strips(coded.shape, coded.dtype, lambda rows: _with_glass(coded[rows]))
        classes = list(zip(layout.names, layout.colours, strict=True))
        found = annotate_objects(objects, probability, lattice, classes, options)
        shown = [a for a in found if not finish.classes or a.class_name in finish.classes]
        return [replace(a, measurements=_measured(a, lattice), object_type=layout.object_type) for a in shown]

    def summarise(self, truth: "Truth", annotations: "Sequence[Annotation]") -> dict[str, Any]:
        """Area of each class, ``objects`` of each, and what was analysed."""
        lattice = truth.grid.lattice
        area, count = dict.fromkeys(truth.layout.names, 0.0), dict.fromkeys(truth.layout.names, 0)
        for annotation in annotations:
            name = annotation.class_name or ""
            area[name] += annotation.geometry.area * lattice.slide_mpp.pixel_um2 / 1e6
            count[name] += 1
        return {
            "area_mm2": {name: round(mm2, 6) for name, mm2 in area.items() if count[name]},
            "analysed_mm2": round(analysed_mm2(truth), 6),
            "regions": len(annotations),
            "objects": {name: n for name, n in count.items() if n},
            "tiles": int(np.count_nonzero(truth.ran)),
        }

    def write(self, truth: "Truth", annotations: "Sequence[Annotation]", finish: "Finish", folder: Path) -> list[str]:
        return []


def _maps(job: "Job", block: Block, view: View, bad: np.ndarray) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """The map of every good tile, one at a time.

    Args:
        job, block, view: As the task's ``score`` has them.
        bad: (N,) bool: tiles to be left out; where damage is tolerated, those whose map is no number are added.

    Raises:
        ScoreError: NaN or infinity, and not tolerated.
    """
    card, side = job.runtime.card, job.grid.tile_px
    layout = SegmentLayout.of(card)
    places = np.argwhere(block.wanted) + (block.tiles.y0, block.tiles.x0)
    for k, [output, *_] in enumerate(job.runtime.outputs(view.pixels, view.corners_px)):
        if bad[k]:
            continue
        if not np.isfinite(output).all():
            if isinstance(job.slide, TolerantSlide):
                bad[k] = True
                continue
            raise ScoreError(
                f"model {card.name} gave NaN or infinity; needed finite numbers.",
                hint="the ONNX file overflows on this input: try one exported as float32",
            )
        y, x = view.corners_px[k].tolist()
        i, j = places[k].tolist()
        yield (i, j), tile_map(output[0], view.pixels[y : y + side, x : x + side], layout)


def _with_glass(coded: np.ndarray) -> np.ndarray:
    """A copy of some rows of a map; what is not analysed is lumen: inside an object it is glass."""
    out = coded.copy()
    out[..., -1][coded[..., 0] == 0] = 255
    return out


def _segment_layout(layout: MapLayout) -> SegmentLayout:
    if not isinstance(layout, SegmentLayout):
        raise TypeError(f"a segmenter has a SegmentLayout, not {type(layout).__name__}")
    return layout


def _rule(layout: SegmentLayout, lattice: Lattice, finish: "Finish") -> Rule:
    """In cells. What is smaller than half the least area goes before it is drawn, the rest by its outline."""
    cell_um = lattice.mpp.mean * lattice.cell_px
    least_um2 = max(finish.min_area_um2, layout.min_area_um2)
    return Rule(
        threshold=finish.threshold,
        smoothing=finish.smoothing_um / cell_um,
        steps=math.ceil(math.sqrt(2) * layout.grow_um / cell_um),  # through edges, a slanting way is longer
        least=max(1, int(least_um2 / lattice.cell_um2 / 2)),
        holes=int(layout.holes_um2 / lattice.cell_um2),
    )


def _measured(annotation: "Annotation", lattice: Lattice) -> dict[str, float]:
    """Area and shape in µm, of the outline as it is written; then means over its cells."""
    mpp = lattice.slide_mpp
    shape = shapely.transform(annotation.geometry, lambda xy: xy * (mpp.x, mpp.y))
    means = {name: value for name, value in annotation.measurements.items() if name.startswith("Mean probability ")}
    lumen = means.pop(f"Mean probability {LUMEN}", None)
    means.pop("Mean probability contour", None)
    return {
        "Area µm^2": shape.area,
        "Perimeter µm": shape.length,
        "Solidity": shape.area / shape.convex_hull.area,
        **({"Lumen fraction": lumen} if lumen is not None else {}),
        **means,
    }
