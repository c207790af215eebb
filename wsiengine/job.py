"""The unit of work: read a block of the slide, normalise it, run the model on its tiles.

A :class:`Job` is what a worker needs to score any block of one run. It is opened once per process, however many
blocks arrive there.
"""

import pickle
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np

from wsiengine.dense import STRIP_PX, run_box
from wsiengine.errors import ScoreError
from wsiengine.geometry import Box
from wsiengine.grid import Block, TileGrid
from wsiengine.models.parts import PER_TILE
from wsiengine.models.runtime import Runtime
from wsiengine.normalise import Normaliser
from wsiengine.slides.base import Slide, read_deep
from wsiengine.slides.tolerant import TolerantSlide
from wsiengine.tasks import task_of
from wsiengine.tasks.base import Result, Task, View
from wsiengine.tilewise import shrunk_tiles

_OPEN: "OrderedDict[str, Job]" = OrderedDict()  # jobs of this process, by key
_OPEN_LOCK = Lock()
_OPEN_MOST = 4  # slides a worker keeps open


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Slide, session, normaliser and grid of one run. Pickles small; a worker opens it once.

    Attributes:
        key: The run's identity.
        slide: Open slide.
        runtime: The one model session of this process.
        normaliser: Fitted recipe.
        grid: The grid of what blocks answer for: tiles, or single cells of a dense run (:func:`wsiengine.dense.work`).
        wanted: (rows, cols) bool of that grid: all that the whole run computes.
        dense: Run the network over whole blocks (:mod:`wsiengine.dense`).
        cam: Channels of the class whose activation map is kept of every tile.
    """

    key: str
    slide: Slide
    runtime: Runtime
    normaliser: Normaliser
    grid: TileGrid
    wanted: np.ndarray
    dense: bool = False
    cam: tuple[int, ...] = ()

    @property
    def task(self) -> Task:
        return task_of(self.runtime.card.task, dense=self.dense, cam=self.cam)

    def __reduce__(self) -> tuple[Any, ...]:
        # Packed twice, so that a worker that has the job open never unpacks (and re-opens) slide and session.
        facts = (self.slide, self.runtime, self.normaliser, self.grid, self.wanted, self.dense, self.cam)
        return _open_once, (self.key, pickle.dumps(facts))


def _open_once(key: str, parts: bytes) -> Job:
    with _OPEN_LOCK:
        if key not in _OPEN:
            _OPEN[key] = Job(key, *pickle.loads(parts))
            while len(_OPEN) > _OPEN_MOST:
                _OPEN.popitem(last=False)
        _OPEN.move_to_end(key)
        return _OPEN[key]


@dataclass(frozen=True, slots=True, eq=False)
class BlockScores:
    """What a block of a classifier yields.

    Attributes:
        tiles: The block's box in tile units.
        scores: (tiles.height, tiles.width, score channels) float32; NaN where a tile was not run.
        seconds: Time spent, by stage.
    """

    tiles: Box
    scores: np.ndarray
    seconds: Mapping[str, float]

    @property
    def ran(self) -> np.ndarray:
        """(tiles.height, tiles.width) bool."""
        return ~np.isnan(self.scores[..., 0])


def score_block(job: Job, block: Block) -> Any:
    """Finish the wanted tiles of a block: the one function that every run and every lazy array is made of.

    Returns:
        The :class:`~wsiengine.tasks.base.Result` of the job's task; of a classifier :class:`BlockScores`.

    Raises:
        UnreadableSlide: A file tile under the block cannot be decoded.
        ScoreError: The model returned NaN or infinity; names the place.
    """
    grid = job.grid
    box = _box_px(job, block)
    started = time.perf_counter()
    if job.runtime.card.input.resample == PER_TILE:
        view = View(*shrunk_tiles(job.slide, grid.lattice, block.origins_px(grid), grid.tile_px))
        read = normalised = time.perf_counter()
    else:
        view, read, normalised = _normalised_view(job, block, box)
    try:
        result: Result = job.task.score(job, block, view)
    except ScoreError as error:
        fy, fx = grid.lattice.l0_per_px
        raise ScoreError(
            f"{error.message} The block starts at x {box.x0 * fx:,.0f}, y {box.y0 * fy:,.0f} (level-0 pixels).",
            hint=error.hint,
        ) from error
    seconds = {
        "read": read - started,
        "normalise": normalised - read,
        "model": time.perf_counter() - normalised,
    }
    return replace(result, seconds=seconds)  # type: ignore[type-var]


def _normalised_view(job: Job, block: Block, box: Box) -> tuple[View, float, float]:
    """What the model sees of ``box``, and the times at which it was read and normalised."""
    halo = job.normaliser.halo_px
    pixels, bad = _read(job, box.grow(halo) if halo else box)
    read = time.perf_counter()
    pixels = pixels if job.runtime.card.input.deep else job.normaliser.apply(pixels, box)
    normalised = time.perf_counter()
    corners = block.origins_px(job.grid) - (box.y0, box.x0)
    touched = None if bad is None else _touched(job, bad, corners + halo)
    if job.normaliser.tile_steps:
        pixels, corners = _tile_by_tile(job, pixels, corners)
    return View(pixels, corners, touched), read, normalised


def _read(job: Job, box: Box) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels, and where a slide that is read in spite of damage could not be decoded."""
    if not job.dense:
        return _read_at_once(job, box)
    pixels, bad = np.empty((*box.shape, 3), np.uint8), None
    for strip in box.pieces(STRIP_PX, box.width):
        rows = strip.relative_to(box).slices
        pixels[rows], marked = _read_at_once(job, strip)
        if marked is not None:
            bad = np.zeros(box.shape, bool) if bad is None else bad
            bad[rows] = marked
    return pixels, bad


def _read_at_once(job: Job, box: Box) -> tuple[np.ndarray, np.ndarray | None]:
    if job.runtime.card.input.deep:
        return read_deep(job.slide, box, job.grid.lattice.mpp), None
    if isinstance(job.slide, TolerantSlide):
        return job.slide.read_marked(box, job.grid.lattice.mpp)
    return job.slide.read(box, job.grid.lattice.mpp), None


def _touched(job: Job, bad: np.ndarray, corners_px: np.ndarray) -> np.ndarray:
    """Which of the tiles at ``corners_px`` (tiles, 2) of ``bad`` (h, w) saw anything bad."""
    dense = job.runtime.card.dense if job.dense else None
    context = dense.halo_px if dense is not None else 0
    side = job.grid.tile_px + context
    return np.array([bad[max(0, y - context) : y + side, max(0, x - context) : x + side].any() for y, x in corners_px])


def _box_px(job: Job, block: Block) -> Box:
    """What a block reads: the pixels under its wanted tiles; for a dense block the network's halo as well."""
    dense = job.runtime.card.dense
    if not job.dense or dense is None:
        return block.box_px(job.grid)
    return run_box(block.tiles, job.wanted).scale(job.grid.lattice.cell_px).grow(dense.halo_px)


def _tile_by_tile(job: Job, pixels: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tiles of a block after the recipe's steps on each by itself: one below the other, with their new corners."""
    side = job.grid.tile_px
    column = np.empty((len(corners) * side, side, 3), np.uint8)
    for index, (y, x) in enumerate(corners.tolist()):
        tile = pixels[y : y + side, x : x + side]
        column[index * side : (index + 1) * side] = job.normaliser.apply_to_tile(tile)
    return column, np.stack([np.arange(len(corners)) * side, np.zeros(len(corners), np.int64)], axis=1)
