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
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiengine.errors import ScoreError
from wsiengine.geometry import Box
from wsiengine.grid import Block, TileGrid
from wsiengine.models.runtime import Runtime
from wsiengine.normalise import Normaliser
from wsiengine.slides.base import Slide
from wsiengine.tasks import task_of
from wsiengine.tasks.base import Result, Task
from wsiengine.viewing import Viewer

if TYPE_CHECKING:
    from wsiengine.readers import Readers

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
        readers: Processes that read and normalise, in the process of the run; by default each worker thread does.
    """

    key: str
    slide: Slide
    runtime: Runtime
    normaliser: Normaliser
    grid: TileGrid
    wanted: np.ndarray
    dense: bool = False
    cam: tuple[int, ...] = ()
    readers: "Readers | None" = None

    @property
    def viewer(self) -> Viewer:
        """What a block's pixels depend on."""
        wanted = self.wanted if self.dense else None
        return Viewer(self.key, self.slide, self.runtime.card, self.normaliser, self.grid, wanted)

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
    viewer = job.viewer
    view, seconds = viewer.view(block) if job.readers is None else job.readers.view(viewer, block)
    started = time.perf_counter()
    try:
        result: Result = job.task.score(job, block, view)
    except ScoreError as error:
        box, (fy, fx) = viewer.box_px(block), job.grid.lattice.l0_per_px
        raise ScoreError(
            f"{error.message} The block starts at x {box.x0 * fx:,.0f}, y {box.y0 * fy:,.0f} (level-0 pixels).",
            hint=error.hint,
        ) from error
    return replace(result, seconds=seconds | {"model": time.perf_counter() - started})  # type: ignore[type-var]
