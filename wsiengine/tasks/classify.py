"""Classification: tile scores → probability map → labels. Pure numpy; no model, no slide, no file.

Everything here is a function of the stored scores alone, so another threshold or another smoothing never needs
inference again. The map is uint8: 0 = not analysed, 1–255 = (v − 1) / 254.
"""

from dataclasses import dataclass

import numpy as np

from wsiengine.classes import Colour, colour_of
from wsiengine.geometry import Box
from wsiengine.grid import TileGrid
from wsiengine.models.activation import activate
from wsiengine.models.card import Card
from wsiengine.scratch import IN_MEMORY, Scratch, strips

GAUSSIAN_ENDS = 4.0  # standard deviations from its middle


@dataclass(frozen=True, slots=True)
class MapLayout:
    """What the channels of a probability map mean, and which labels come out of it.

    ``sums[k]`` are the score channels whose probabilities add up to map channel k (five grades may be asserted as
    three classes). A gate, where there is one, is the last channel: the fraction of a tile that may be judged.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    sums: tuple[tuple[int, ...], ...]
    activation: str
    gate_minimum: float | None = None
    gate_otherwise: str | None = None
    uncertain_below: float = 0.0
    uncertain_name: str = "Uncertain"

    @classmethod
    def of(cls, card: Card) -> "MapLayout":
        classes = card.map_classes
        return cls(
            names=tuple(c.name for c in classes),
            colours=tuple(c.colour for c in classes),
            sums=tuple(c.channels for c in classes),
            activation=card.activation,
            gate_minimum=card.gate.minimum if card.gate else None,
            gate_otherwise=card.gate.otherwise if card.gate else None,
            uncertain_below=card.uncertain.below if card.uncertain else 0.0,
            uncertain_name=card.uncertain.name if card.uncertain else "Uncertain",
        )

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the map's channels: the classes, then ``gate`` where there is one."""
        return (*self.names, "gate") if self.gate_minimum is not None else self.names

    @property
    def labels(self) -> tuple[str, ...]:
        """Names that a label may have; label k (1-based) is ``labels[k − 1]``."""
        gate = (self.gate_otherwise,) if self.gate_otherwise else ()
        return (*self.names, *gate, self.uncertain_name)

    @property
    def label_colours(self) -> tuple[Colour, ...]:
        """The colour of each label."""
        return (*self.colours, *(colour_of(name) for name in self.labels[len(self.names) :]))


def tile_probabilities(scores: np.ndarray, layout: MapLayout) -> np.ndarray:
    """Probabilities of each tile.

    Args:
        scores: (..., score channels) float32 as stored: raw class outputs, then the gate's fraction if there is one;
            NaN where a tile was not run.
        layout: What the channels mean.

    Returns:
        (..., map channels) float32; NaN where a tile was not run.
    """
    gated = layout.gate_minimum is not None
    raw = scores[..., :-1] if gated else scores
    single = activate(raw, layout.activation)
    merged = [single[..., list(channels)].sum(axis=-1, dtype=np.float64) for channels in layout.sums]
    if gated:
        merged.append(np.clip(scores[..., -1].astype(np.float64), 0, 1))
    return np.stack(merged, axis=-1).astype(np.float32)


def blend(tiles: np.ndarray, origin: tuple[int, int], analysed: np.ndarray, grid: TileGrid, cells: Box) -> np.ndarray:
    """The probability map under ``cells``: each cell is the mean over all run tiles that cover it.

    Sums run in float64 in an order that depends on the cell alone, so the map is the same however it is cut.

    Args:
        tiles: (rows, cols, channels) float32 probabilities of the tiles around; NaN where not run. Must hold every
            tile of ``grid.covering(cells)``.
        origin: (tile row, tile col) of ``tiles[0, 0]``.
        analysed: (cells.height, cells.width) bool: cells to fill.
        grid: The tile grid.
        cells: The cells wanted.

    Returns:
        (cells.height, cells.width, channels) uint8; 0 where not analysed or not covered.
    """
    row, col = np.arange(cells.y0, cells.y1), np.arange(cells.x0, cells.x1)
    total = np.zeros((*cells.shape, tiles.shape[2]), np.float64)
    count = np.zeros(cells.shape, np.int32)
    for a in range(grid.rows.depth):
        i, i_ok = _tile_before(row, a, grid.rows.tile, grid.rows.stride, grid.rows.count)
        for b in range(grid.cols.depth):
            j, j_ok = _tile_before(col, b, grid.cols.tile, grid.cols.stride, grid.cols.count)
            picked = tiles[np.ix_(np.where(i_ok, i - origin[0], 0), np.where(j_ok, j - origin[1], 0))]
            valid = i_ok[:, None] & j_ok[None, :] & ~np.isnan(picked[..., 0])
            total += np.where(valid[..., None], picked, 0)
            count += valid
    mean = total / np.maximum(count, 1)[..., None]
    coded = (1 + np.floor(mean * 254 + 0.5)).astype(np.uint8)
    coded[(count == 0) | ~analysed] = 0
    return coded


def _tile_before(cell: np.ndarray, back: int, tile: int, stride: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The tile that starts ``back`` strides before the last that could cover each cell, and whether it does."""
    index = cell // stride - back
    return index, (index >= 0) & (index < count) & (index * stride + tile > cell)


def decode(coded: np.ndarray) -> np.ndarray:
    """uint8 map → float32 probabilities; NaN where not analysed."""
    values = (coded.astype(np.float32) - 1) / 254
    values[coded == 0] = np.nan
    return values


def label(
    coded: np.ndarray,
    layout: MapLayout,
    threshold: float,
    smoothing_cells: float = 0.0,
    scratch: Scratch = IN_MEMORY,
) -> np.ndarray:
    """The class of each cell.

    A cell below the gate's minimum is ``layout.gate_otherwise``; one whose best class stays below ``threshold`` is
    uncertain; else the best class, ties to the lower index.

    Args:
        coded: (rows, cols, channels) uint8 map.
        layout: What the channels mean.
        threshold: Least probability of the best class, in [0, 1].
        smoothing_cells: Standard deviation of a Gaussian over analysed cells; 0 for none.
        scratch: Makes the map of classes.

    Returns:
        (rows, cols) uint8: 0 = not analysed, k = ``layout.labels[k − 1]``.
    """
    out = scratch.zeros(coded.shape[:2], np.uint8)
    for rows in strips(coded.shape):
        if smoothing_cells > 0:
            values = smoothed_rows(coded, rows, smoothing_cells)
        else:
            values = np.maximum(coded[rows], 1).astype(np.float32) - 1  # in 254ths
        out[rows] = _label_strip(coded[rows, :, 0] > 0, values, layout, threshold)
    return out


def _label_strip(analysed: np.ndarray, values: np.ndarray, layout: MapLayout, threshold: float) -> np.ndarray:
    """``label`` of some rows, from their values in 254ths."""
    classes = values[..., : len(layout.names)]
    labels = (classes.argmax(axis=-1) + 1).astype(np.uint8)
    names = layout.labels
    labels[classes.max(axis=-1) < threshold * 254] = len(names)
    if layout.gate_minimum is not None:
        labels[values[..., -1] < layout.gate_minimum * 254] = len(layout.names) + 1
    labels[~analysed] = 0
    return labels


def smoothed_rows(coded: np.ndarray, rows: slice, sigma: float) -> np.ndarray:
    """``smoothed``, of some rows of a map: they see as far beyond themselves as the Gaussian does."""
    reach = int(GAUSSIAN_ENDS * sigma + 0.5)
    first = max(rows.start - reach, 0)
    wide = coded[first : rows.stop + reach]
    return smoothed(wide, wide[..., 0] > 0, sigma)[rows.start - first : rows.stop - first]


def smoothed(coded: np.ndarray, analysed: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian mean of the analysed cells, in 254ths (normalised convolution)."""
    from scipy import ndimage  # slow to import

    how = {"mode": "constant", "truncate": GAUSSIAN_ENDS}
    weight = ndimage.gaussian_filter(analysed.astype(np.float32), sigma, **how)
    out = np.empty(coded.shape, np.float32)
    for channel in range(coded.shape[2]):
        values = np.where(analysed, coded[..., channel].astype(np.float32) - 1, 0)
        out[..., channel] = ndimage.gaussian_filter(values, sigma, **how) / np.maximum(weight, 1e-6)
    return out


def overview(coded: np.ndarray, scratch: Scratch = IN_MEMORY) -> np.ndarray:
    """The map at half the size: each channel the mean of its analysed cells among 2 × 2, rounded half up.

    Args:
        coded: (rows, cols, channels) uint8.
        scratch: Makes the smaller map.

    Returns:
        (⌈rows / 2⌉, ⌈cols / 2⌉, channels) uint8; 0 only where no cell of the four was analysed.
    """
    out = scratch.zeros((-(-coded.shape[0] // 2), -(-coded.shape[1] // 2), coded.shape[2]), np.uint8)
    for rows in strips(coded.shape):  # of even length
        out[rows.start // 2 : -(-rows.stop // 2)] = _halved(coded[rows])
    return out


def _halved(coded: np.ndarray) -> np.ndarray:
    rows, cols, channels = coded.shape
    padded = np.zeros((rows + rows % 2, cols + cols % 2, channels), np.uint8)
    padded[:rows, :cols] = coded
    quads = padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2, channels)
    count = (quads > 0).sum(axis=(1, 3))
    total = quads.sum(axis=(1, 3), dtype=np.int64)
    return ((2 * total + count) // np.maximum(2 * count, 1)).astype(np.uint8)
