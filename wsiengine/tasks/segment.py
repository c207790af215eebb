"""Segmentation: maps of tiles → one map of the slide → objects. Pure numpy; no model, no slide, no file.

Tiles are blended by a fixed window whose weights fall from the middle to the border. Weights and the tiles' values are
whole numbers: sums are exact, so that blocks may add theirs in any order and no tile is run twice. Objects are
connected parts of the whole map: where blocks or tiles met does not show in them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from wsiengine.classes import Colour, colour_of
from wsiengine.geometry import Box
from wsiengine.grid import Axis, TileGrid
from wsiengine.models.activation import activate
from wsiengine.models.card import Card
from wsiengine.models.segmentation import CONTOUR
from wsiengine.scratch import IN_MEMORY, Scratch, strips
from wsiengine.tasks.classify import MapLayout, smoothed_rows
from wsikernels.components import label_components
from wsikernels.regions import add_alone, fill_holes, grow, keep_large

LUMEN = "lumen"
_FULL = 16  # depth × largest weight of a line: sums over depth² tiles of weight² × 254 fit 16 bits


@dataclass(frozen=True, slots=True)
class SegmentLayout(MapLayout):
    """What the channels of a segmenter's map mean, and how objects come out of them.

    ``sums[k]`` is the one model channel of class k; ``uncertain_below`` is the threshold of a class.
    ``model_channels`` is what the model gives, ``contour`` which of them is the border (−1: none); ``halo`` counts
    cells. See :class:`wsiengine.models.segmentation.Segmentation` for the rest.
    """

    model_channels: int = 1
    contour: int = -1
    contour_above: float = 0.5
    grow_um: float = 10.0
    holes_um2: float = 0.0
    min_area_um2: float = 0.0
    bright_above: int = -1
    object_type: str = "annotation"
    halo: int = 0

    @classmethod
    def of(cls, card: Card) -> "SegmentLayout":
        part = card.segmentation
        if part is None:
            raise ValueError(f"{card.name} is no segmenter")
        index = {name: k for k, name in enumerate(part.channels)}
        return cls(
            names=tuple(c.name for c in card.classes),
            colours=tuple(c.colour for c in card.classes),
            sums=tuple((index[c.name],) for c in card.classes),
            activation=card.activation,
            uncertain_below=part.threshold,
            model_channels=len(part.channels),
            contour=index.get(CONTOUR, -1),
            contour_above=part.contour_above,
            grow_um=part.grow_um,
            holes_um2=part.holes_um2,
            min_area_um2=part.min_area_um2,
            bright_above=-1 if part.bright_above is None else part.bright_above,
            object_type=part.object_type,
            halo=card.halo_px // card.output_stride_px,
        )

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the map's channels: the classes, then ``contour`` and ``lumen`` where there are such."""
        extra = ((CONTOUR, self.contour >= 0), (LUMEN, self.bright_above >= 0))
        return (*self.names, *(name for name, there in extra if there))

    @property
    def object_classes(self) -> tuple[tuple[str, Colour], ...]:
        """The classes that an object may have."""
        return tuple(zip(self.names, self.colours, strict=True))

    @property
    def label_colours(self) -> tuple[Colour, ...]:
        """The colour of each label."""
        return (*self.colours, colour_of(self.uncertain_name))


def tile_map(output: np.ndarray, pixels: np.ndarray, layout: SegmentLayout) -> np.ndarray:
    """The map of one tile.

    Args:
        output: (channels, rows, cols) as the model gave it.
        pixels: (side, side, 3) uint8: the tile.
        layout: What the channels mean.

    Returns:
        (rows, cols, map channels) float32, 0 to 1.
    """
    if layout.activation == "softmax":
        found = np.moveaxis(activate(np.moveaxis(output, 0, -1), layout.activation), -1, 0)
    else:
        found = activate(output, layout.activation)  # channels stay apart in memory: twice as quick
    kept = [found[channels[0]] for channels in layout.sums]
    if layout.contour >= 0:
        kept.append(found[layout.contour])
    if layout.bright_above >= 0:
        kept.append(_bright(pixels, layout.bright_above, pixels.shape[0] // found.shape[1]))
    return np.stack(kept, axis=-1)


def _bright(pixels: np.ndarray, level: int, cell_px: int) -> np.ndarray:
    """The part of each cell's pixels whose channels are all above ``level`` → (rows, cols) float32."""
    above = pixels > level
    bright = (above[..., 0] & above[..., 1] & above[..., 2]).view(np.uint8)
    total = np.zeros([n // cell_px for n in bright.shape], np.int32)
    for y in range(cell_px):
        for x in range(cell_px):
            total += bright[y::cell_px, x::cell_px]
    return (total / np.float32(cell_px**2)).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Weights of the tiles of a grid: of a cell, the product of those of its row and its column.

    Attributes:
        rows: uint16 (tile rows, tile): of each tile's rows of cells.
        cols: uint16 (tile cols, tile).
    """

    rows: np.ndarray
    cols: np.ndarray

    @classmethod
    def of(cls, grid: TileGrid, halo: int) -> "Window":
        """Weights fall in steps of a straight line towards a tile's border, to 0 in its ``halo`` cells, which the
        model gets wrong for lack of context; not so along the slide's edge, where there is nothing else.
        """
        return cls(_line(grid.rows, halo), _line(grid.cols, halo))

    def weight(self, tile: tuple[int, int]) -> np.ndarray:
        """(tile, tile) uint16."""
        return self.rows[tile[0]][:, None] * self.cols[tile[1]][None, :]


def _line(axis: Axis, halo: int) -> np.ndarray:
    inwards = np.arange(1, axis.tile + 1) - halo
    steps = max(1, _FULL // axis.depth)
    slope = np.ceil(steps * inwards / max(axis.tile // 2 - halo, 1))
    rise, fall = np.tile(slope, (axis.count, 1)), np.tile(slope[::-1], (axis.count, 1))
    rise[0], fall[-1] = steps, steps
    return np.clip(np.minimum(rise, fall), 0, steps).astype(np.uint16)


def add_tiles(
    tiles: Iterable[tuple[tuple[int, int], np.ndarray]], window: Window, grid: TileGrid, cells: Box, channels: int
) -> np.ndarray:
    """Weighted sums of tiles' maps under ``cells``.

    Args:
        tiles: ((tile row, tile col), map (tile, tile, channels) float32 from 0 to 1).
        window: Their weights.
        grid: The tile grid.
        cells: The cells wanted.
        channels: Of the map.

    Returns:
        (cells.height, cells.width, channels) uint16: sums of weight × (254ths of 1).
    """
    total = np.zeros((*cells.shape, channels), np.uint16)
    for (i, j), values in tiles:
        y, x = i * grid.rows.stride, j * grid.cols.stride
        place = Box(y, x, y + grid.rows.tile, x + grid.cols.tile)
        common = cells.intersect(place)
        if common:
            coded = np.floor(np.clip(values[common.relative_to(place).slices], 0, 1) * 254 + 0.5).astype(np.uint16)
            weight = window.weight((i, j))[common.relative_to(place).slices]
            total[common.relative_to(cells).slices] += weight[..., None] * coded
    return total


def blended(total: np.ndarray, ran: np.ndarray, window: Window, grid: TileGrid, cells: Box) -> np.ndarray:
    """The map under ``cells`` from the sums of all tiles that ran.

    Args:
        total: uint16 (cells.height, cells.width, channels), from :func:`add_tiles`.
        ran: bool (tile rows, tile cols).
        window, grid, cells: As there.

    Returns:
        uint8 of the same shape: 1 + 254ths of the weighted mean, rounded half up; 0 where no tile was.
    """
    weight = np.zeros(cells.shape, np.uint32)
    around = grid.covering(cells)
    for i, j in (np.argwhere(ran[around.slices]) + (around.y0, around.x0)).tolist():
        y, x = i * grid.rows.stride, j * grid.cols.stride
        place = Box(y, x, y + grid.rows.tile, x + grid.cols.tile)
        common = cells.intersect(place)
        weight[common.relative_to(cells).slices] += window.weight((i, j))[common.relative_to(place).slices]
    whole = np.maximum(weight, 1)[..., None]
    coded = (1 + (2 * total.astype(np.uint32) + whole) // (2 * whole)).astype(np.uint8)
    coded[weight == 0] = 0
    return coded


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """How objects are told from a map; lengths in cells, areas in cells.

    Attributes:
        threshold: Of a class, in [0, 1].
        smoothing: Standard deviation of a Gaussian over analysed cells; 0 for none.
        steps: How far objects are grown back over their border.
        least: Smaller objects are left out.
        holes: Holes up to this are filled.
    """

    threshold: float
    smoothing: float = 0.0
    steps: int = 0
    least: int = 1
    holes: int = 0


def find_objects(
    coded: np.ndarray, layout: SegmentLayout, rule: Rule, scratch: Scratch = IN_MEMORY
) -> tuple[np.ndarray, np.ndarray]:
    """The objects of a map.

    Of each class: the cells whose best class it is, from the threshold on; their parts between borders, connected
    through edges, grown back over the borders; parts that are all border stay whole. Then holes are filled.

    Args:
        coded: (rows, cols, channels) uint8 map; 0 = not analysed.
        layout: What the channels mean.
        rule: See :class:`Rule`.
        scratch: Makes the maps.

    Returns:
        Objects, int32 (rows, cols), 0 = none, 1 … n by class, then reading order; and the class (from 1) of each,
        uint8 (n,).
    """
    best, border = _best_classes(coded, layout, rule, scratch)
    objects = scratch.zeros(coded.shape[:2], np.int32)
    kinds: list[int] = []
    for k in range(1, len(layout.names) + 1):
        found, parts = _parts(np.equal(best, k, out=scratch.zeros(best.shape, bool)), border, rule, scratch)
        for rows in strips(found.shape):
            np.add(found[rows], len(kinds), out=objects[rows], where=found[rows] > 0)
        kinds += [k] * parts
    if rule.holes:
        fill_holes(objects, rule.holes, scratch.zeros)
    return objects, np.array(kinds, np.uint8)


def _best_classes(
    coded: np.ndarray, layout: SegmentLayout, rule: Rule, scratch: Scratch
) -> tuple[np.ndarray, np.ndarray | None]:
    """The class (from 1) of each cell, 0 where none reaches the threshold, uint8; and whether it is border, bool."""
    count = len(layout.names)
    best = scratch.zeros(coded.shape[:2], np.uint8)
    border = scratch.zeros(coded.shape[:2], bool) if layout.contour >= 0 else None
    for rows in strips(coded.shape):
        values = coded[rows]
        if rule.smoothing > 0:
            values = np.where(values[..., :1] > 0, smoothed_rows(coded, rows, rule.smoothing) + 1, 0)
        most = values[..., :count].max(axis=-1)
        enough = (most > 0) & (most >= 1 + rule.threshold * 254)
        best[rows] = np.where(enough, values[..., :count].argmax(axis=-1) + 1, 0)
        if border is not None:
            border[rows] = values[..., count] > 1 + layout.contour_above * 254
    return best, border


def _parts(inside: np.ndarray, border: np.ndarray | None, rule: Rule, scratch: Scratch) -> tuple[np.ndarray, int]:
    """Connected parts of ``inside``, apart where a border runs between them → int32 in reading order, how many."""
    if border is None:
        found = label_components(inside, eight=False, zeros=scratch.zeros)[0]
    else:
        between = np.greater(inside, border, out=scratch.zeros(inside.shape, bool))
        found = label_components(between, eight=False, zeros=scratch.zeros)[0]
        del between
        keep_large(found, max(1, rule.least // 2))
        grow(found, inside, rule.steps, in_place=True)
        add_alone(found, inside, scratch.zeros)
    return found, keep_large(found, rule.least)
