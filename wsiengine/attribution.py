"""Where a class was seen: class-activation maps (Zhou et al. 2016) of a whole slide, as map and picture.

A network that ends in average pooling and a linear layer holds, for every cell of its last map, what that cell adds to
the score of a class. A dense run keeps these cells for all classes; a run over tiles keeps those of one class where it
is asked for (``--cam``), and a cell of the map is the mean over the tiles that cover it. Values are logits, not
probabilities: what matters is where they are high.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsiengine.errors import CardError, PlanError
from wsiengine.grid import TileGrid
from wsiengine.models.card import Card
from wsiengine.tasks.classify import MapLayout

if TYPE_CHECKING:
    from wsiengine.truth import Truth

_STRIP = 256  # rows of cells blended at a time
_OPACITY = 0.55
_SHOWN = (1, 99)  # percentiles of the values that the colours span
_LARGEST_PX = 2048


def channels_of(name: str, layout: MapLayout) -> tuple[int, ...]:
    """Score channels of a class of the map.

    Raises:
        PlanError: There is no such class.
    """
    if name not in layout.names:
        raise PlanError(f"The model knows no class {name!r}.", hint=f"its classes are {', '.join(layout.names)}.")
    return layout.sums[layout.names.index(name)]


def refuse_without_cam(card: Card) -> None:
    """Raise where a model has no class-activation map.

    Raises:
        CardError: It has none.
    """
    if card.task != "classify" or card.outputs.cam is None:
        raise CardError(
            f"{card.name} has no class-activation map: its card names no outputs.cam.",
            hint="only networks that end in average pooling and a linear layer have one (docs/cards.md).",
        )


def evidence(values: np.ndarray, channels: Sequence[int]) -> np.ndarray:
    """Of a class that is the sum of several: log of the sum of their exponentials; of one, its value.

    Args:
        values: (…, score channels), logits.
        channels: Of the class.

    Returns:
        (…) float32.
    """
    picked = np.asarray(values, np.float64)[..., list(channels)]
    if len(channels) == 1:
        return picked[..., 0].astype(np.float32)
    return np.logaddexp.reduce(picked, axis=-1).astype(np.float32)


def attribution_map(truth: "Truth", name: str, stored: str | None) -> np.ndarray:
    """The class-activation map of a class over the slide: (rows, cols) float32, NaN where not analysed.

    Args:
        truth: A run, with ``cells`` (a dense one) or ``cam`` (tiles) among its arrays.
        name: A class of the map.
        stored: The class that a run over tiles kept.

    Raises:
        PlanError: No such class, or the run kept nothing of it.
    """
    channels = channels_of(name, truth.layout)
    rows, cols = truth.analysed.shape
    if "cells" in truth.arrays:
        found = evidence(truth.arrays["cells"][:rows, :cols], channels)
    elif "cam" in truth.arrays and stored == name:
        found = blend_windows(truth.arrays["cam"], truth.grid, truth.analysed)
    else:
        kept = f"only that of {stored}" if stored else "none"
        raise PlanError(
            f"The run kept no class-activation map of {name} ({kept}).",
            hint=f"run `wsiengine infer` with --cam '{name}', or with --mode dense, which keeps those of all classes.",
        )
    return np.where(truth.analysed, found, np.nan).astype(np.float32)


def blend_windows(windows: np.ndarray, grid: TileGrid, analysed: np.ndarray) -> np.ndarray:
    """Each cell the mean over the tiles that cover it, summed in an order that depends on the cell alone.

    Args:
        windows: (tile rows, tile cols, cells of a tile) float32, row-major; NaN where a tile was not run.
        grid: The tile grid.
        analysed: (rows, cols) bool.

    Returns:
        (rows, cols) float32; NaN where no tile covers a cell.
    """
    side = grid.rows.tile
    parts = windows.reshape(*windows.shape[:2], side, side)
    out = np.full(analysed.shape, np.nan, np.float32)
    col = np.arange(analysed.shape[1])
    for first in range(0, analysed.shape[0], _STRIP):
        row = np.arange(first, min(first + _STRIP, analysed.shape[0]))
        total, count = np.zeros((len(row), len(col))), np.zeros((len(row), len(col)), np.int32)
        for a in range(grid.rows.depth):
            i = row // grid.rows.stride - a
            for b in range(grid.cols.depth):
                j = col // grid.cols.stride - b
                y, x = row - i * grid.rows.stride, col - j * grid.cols.stride
                i_ok = (i >= 0) & (i < windows.shape[0]) & (y < side)
                j_ok = (j >= 0) & (j < windows.shape[1]) & (x < side)
                at = np.ix_(np.where(i_ok, i, 0), np.where(j_ok, j, 0))
                picked = parts[(*at, np.where(i_ok, y, 0)[:, None], np.where(j_ok, x, 0)[None, :])]
                valid = i_ok[:, None] & j_ok[None, :] & ~np.isnan(picked)
                total += np.where(valid, picked, 0)
                count += valid
        with np.errstate(invalid="ignore"):
            out[row] = np.where(count > 0, total / count, np.nan)
    return out


def write_attribution(
    values: np.ndarray, truth: "Truth", name: str, folder: Path, picture: np.ndarray | None, offset_px: float | None
) -> list[str]:
    """``attribution.zarr`` and ``attribution.png`` → their names.

    Args:
        values: The map of the class.
        truth: Its run.
        name: The class.
        folder: Where to.
        picture: The slide's thumbnail (rows, cols, 3) uint8 to draw over; None: on white.
        offset_px: The pixel on which the network's first cell is centred, where the card tells.
    """
    from wsiengine.store import write_evidence

    lattice = truth.grid.lattice
    shift_px = 0.0 if offset_px is None else offset_px - (lattice.cell_px - 1) / 2
    facts = {"class": name, "meaning": "logit of the class that a cell adds", "fingerprint": truth.fingerprint}
    write_evidence(folder / "attribution.zarr", values, (lattice, shift_px), facts)
    draw_attribution(values, truth, name, folder / "attribution.png", picture)
    return ["attribution.png", "attribution.zarr"]


def draw_attribution(
    values: np.ndarray, truth: "Truth", name: str, path: Path, picture: np.ndarray | None = None
) -> None:
    """The map as a picture: colours over the slide where it was analysed, their range beside the title."""
    import cv2

    from wsiengine.qupath import replacing
    from wsiengine.report import INK, LEAST_SIDE_PX, Style, compose, draw_scale_bar

    size, (fy, fx) = truth.grid.lattice.slide_l0, truth.grid.lattice.l0_per_cell
    if picture is None:
        shrink = max(1.0, max(size.shape) / _LARGEST_PX)
        picture = np.full((max(1, round(size.height / shrink)), max(1, round(size.width / shrink)), 3), 255, np.uint8)
    enlarge = max(1, LEAST_SIDE_PX // max(picture.shape[:2]))
    canvas = cv2.resize(picture, None, fx=enlarge, fy=enlarge, interpolation=cv2.INTER_NEAREST)
    heat, (low, high) = colours(values)
    scale_y, scale_x = canvas.shape[0] / size.height, canvas.shape[1] / size.width
    wide = max(1, round(values.shape[1] * fx * scale_x)), max(1, round(values.shape[0] * fy * scale_y))
    heat = cv2.resize(heat, wide, interpolation=cv2.INTER_NEAREST)
    shown = cv2.resize((~np.isnan(values)).astype(np.uint8), wide, interpolation=cv2.INTER_NEAREST) > 0
    height, width = min(canvas.shape[0], heat.shape[0]), min(canvas.shape[1], heat.shape[1])
    part, over = canvas[:height, :width], shown[:height, :width]
    grey = np.repeat(cv2.cvtColor(part, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)  # two colours would mix to a third
    mixed = cv2.addWeighted(heat[:height, :width], _OPACITY, grey, 1 - _OPACITY, 0)
    part[over] = mixed[over]
    style = Style.of(canvas.shape[1])
    title = f"Class-activation map: {name} · logit {low:.3g} (dark) to {high:.3g} (bright)"
    page = compose(canvas, title, [], style)
    draw_scale_bar(page, truth.grid.lattice.slide_mpp.x / scale_x, style)
    bar = cv2.applyColorMap(np.linspace(0, 255, 256).astype(np.uint8)[None], cv2.COLORMAP_INFERNO)[..., ::-1]
    box = (min(256, page.shape[1] // 4), style.text)
    x = page.shape[1] - style.margin - box[0]
    page[style.margin // 2 : style.margin // 2 + box[1], x : x + box[0]] = cv2.resize(bar, box)
    cv2.rectangle(page, (x - 1, style.margin // 2 - 1), (x + box[0], style.margin // 2 + box[1]), INK, 1)
    with replacing(path) as file:
        file.write(cv2.imencode(".png", page[..., ::-1])[1].tobytes())


def colours(values: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """(rows, cols, 3) uint8 RGB from dark to bright, and the values that these stand for."""
    import cv2

    known = values[~np.isnan(values)]
    low, high = (float(v) for v in np.percentile(known, _SHOWN)) if known.size else (0.0, 1.0)
    share = np.clip((np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-9), 0, 1)
    heat = cv2.applyColorMap(np.rint(share * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return np.ascontiguousarray(heat[..., ::-1]), (low, high)
