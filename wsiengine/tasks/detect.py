"""Detection: where tiles look, what their objects cover, and which of a slide's objects are shown. Pure numpy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from wsiengine.classes import Colour
from wsiengine.crops import crop_side_px
from wsiengine.geometry import Box, Lattice
from wsiengine.grid import TileGrid
from wsiengine.models.card import Card
from wsiengine.models.detection import Head, Second
from wsiengine.models.parts import ClassInfo
from wsiengine.objects import BOTTOM, LEFT, RIGHT, TOP, Objects, TileView
from wsiengine.scratch import IN_MEMORY, Scratch, strips
from wsiengine.tasks.classify import MapLayout

_BESIDE = ((TOP, -1, 0), (LEFT, 0, -1), (BOTTOM, 1, 0), (RIGHT, 0, 1))


@dataclass(frozen=True, slots=True)
class Names:
    """Classes of a second stage: its columns of probabilities, and whether the best becomes the object's class."""

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    assigns: bool
    threshold: float


@dataclass(frozen=True, slots=True)
class DetectLayout(MapLayout):
    """What a detector's map and objects mean.

    The map's channels are the detector's classes: how probable the best object is that covers a cell. An object's class
    is the detector's, or that of the last stage that assigns one. ``uncertain_below`` is the score from which objects
    are shown, ``minimum_score`` that below which none was kept.
    """

    stages: tuple[Names, ...] = ()
    minimum_score: float = 0.0

    @classmethod
    def of(cls, card: Card) -> "DetectLayout":
        if card.detection is None:
            raise ValueError(f"{card.name} is no detector")
        stages: list[Second | Head] = []
        if card.second:
            stages = [card.second, *([card.second.head] if card.second.head else [])]
        kept = [Names(*_names(s.classes), s.assigns, s.threshold) for s in stages]
        names, colours = _names(card.classes)
        return cls(
            names=names,
            colours=colours,
            sums=tuple((k,) for k in range(len(names))),
            activation="identity",
            uncertain_below=card.detection.show_score,
            stages=tuple(kept),
            minimum_score=card.detection.minimum_score,
        )

    @classmethod
    def stored(cls, facts: Mapping[str, Any]) -> "DetectLayout":
        """From ``dataclasses.asdict`` of it."""
        return cls(**{**facts, "stages": tuple(Names(**stage) for stage in facts["stages"])})

    @property
    def object_classes(self) -> tuple[tuple[str, Colour], ...]:
        """The classes that an object may have."""
        last = self.assigning
        names, colours = (self.names, self.colours) if last is None else (last.names, last.colours)
        return tuple(zip(names, colours, strict=True))

    @property
    def assigning(self) -> Names | None:
        """The last stage that assigns a class, if any does."""
        return next((stage for stage in reversed(self.stages) if stage.assigns), None)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of ``Objects.extra``."""
        return tuple(name for stage in self.stages for name in stage.names)

    def classes_of(self, objects: Objects) -> np.ndarray:
        """(n,) int64: each object's class, an index of :attr:`object_classes`."""
        if self.assigning is None:
            return objects.labels.astype(np.int64)
        first = 0
        for stage in self.stages:
            if stage is self.assigning:
                break
            first += len(stage.names)
        return objects.extra[:, first : first + len(self.assigning.names)].argmax(axis=1)


def _names(classes: tuple[ClassInfo, ...]) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    return tuple(c.asserted_as or c.name for c in classes), tuple(c.colour for c in classes)


def nothing_below(threshold: float | None, minimum: float) -> str | None:
    """In words, that objects of lower scores were asked for than a detector keeps; None where they were not."""
    if threshold is None or threshold >= minimum:
        return None
    return f"No object below a score of {minimum:g} is kept (the card's minimum_score): {threshold:g} shows no more."


def least_overlap_px(card: Card) -> int:
    """How far tiles must overlap, a whole number of cells: by the largest object and a cell, or by a crop around one.

    The cell more lets the tile that owns an object's centre see all of it: only such tiles need be run.
    """
    rule, cell = card.detection, card.output_stride_px
    if rule is None or card.input.whole:
        return 0
    crop = crop_side_px(card.second.crop, rule.largest_px) if card.second else 0.0
    return (int(-(-max(rule.overlap_px, crop) // cell)) + 1) * cell


def tile_view(grid: TileGrid, wanted: np.ndarray, row: int, col: int) -> TileView:
    """Where a tile lies, and what lies beside it; ``wanted`` (tile rows, tile cols) bool: tiles that are run."""
    box = grid.tile_box_px(row, col)
    height, width = slide_px(grid.lattice)
    ends = {TOP: box.y0 > 0, LEFT: box.x0 > 0, BOTTOM: box.y1 < height, RIGHT: box.x1 < width}
    beside = 0
    for side, dy, dx in _BESIDE:
        i, j = row + dy, col + dx
        if 0 <= i < grid.shape[0] and 0 <= j < grid.shape[1] and wanted[i, j]:
            beside |= side
    return TileView(
        number=row * grid.cols.count + col,
        y=box.y0,
        x=box.x0,
        side_px=grid.tile_px,
        slide_px=(height, width),
        overlap_px=grid.tile_px - grid.stride_px,
        open=sum(side for side, goes_on in ends.items() if goes_on),
        beside=beside,
    )


def slide_px(lattice: Lattice) -> tuple[float, float]:
    """Height and width of the slide in working pixels, not rounded."""
    fy, fx = lattice.l0_per_px
    return lattice.slide_l0.height / fy, lattice.slide_l0.width / fx


def cover(
    objects: Objects,
    channels: int,
    analysed: np.ndarray,
    place: tuple[Box, int],
    scratch: Scratch = IN_MEMORY,
) -> np.ndarray:
    """The map under ``cells``: the score of the best candidate that covers a cell's centre, or is centred in it.

    Args:
        objects: Candidates; those elsewhere do not matter.
        channels: The detector's classes.
        analysed: (cells.height, cells.width) bool.
        place: The cells, and the working pixels along one.
        scratch: Makes the map.

    Returns:
        (cells.height, cells.width, channels) uint8: 0 = not analysed, 1 = nothing, 255 = certain.
    """
    cells, cell_px = place
    best = scratch.full((*cells.shape, channels), 1, np.uint8)
    spans = np.ceil(objects.boxes / cell_px - 0.5).astype(np.int64)  # cells whose centre the box covers
    middle = np.floor(objects.centres / cell_px).astype(np.int64)
    low = np.minimum(spans[:, :2], middle) - (cells.y0, cells.x0)
    high = np.maximum(spans[:, 2:], middle + 1) - (cells.y0, cells.x0)
    low, high = np.maximum(low, 0), np.minimum(high, cells.shape)
    coded = (1 + np.floor(objects.scores.astype(np.float64) * 254 + 0.5)).astype(np.uint8)
    for k in np.flatnonzero((high > low).all(axis=1)).tolist():
        here = best[low[k, 0] : high[k, 0], low[k, 1] : high[k, 1], objects.labels[k]]
        np.maximum(here, coded[k], out=here)
    for rows in strips(best.shape):
        best[rows][~analysed[rows]] = 0
    return best


def within(objects: Objects, analysed: np.ndarray, cell_px: int) -> np.ndarray:
    """(n,) bool: whether the centre of each object lies in a cell that was to be analysed."""
    cells = np.minimum(np.floor(objects.centres / cell_px).astype(np.int64), np.array(analysed.shape) - 1)
    found: np.ndarray = analysed[cells[:, 0], cells[:, 1]]
    return found


def boxes_l0(objects: Objects, lattice: Lattice) -> np.ndarray:
    """(n, 4) float64: the boxes in level-0 pixels."""
    fy, fx = lattice.l0_per_px
    return objects.boxes * (fy, fx, fy, fx)
