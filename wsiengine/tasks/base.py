"""The seam of the engine: what differs between tasks, and nothing else.

A card's ``task`` chooses one :class:`Task`; the rest (reading, normalising, blocks, scheduling, journal, resume,
publishing) is the same for all. A task is stateless; its methods are called in this order:

====================  ==========================================================================================
``layout``            card → what the map's channels mean and how labels come out of it; kept with the truth
``score``             in any process: the pixels under those tiles → a :class:`Result` (timed by the engine)
``record``            the finished result → one synced record of the journal
``gather``            in the process of the run: results, recovered or new → the arrays of the truth
``map``               truth → probability map
``annotate``          truth and map → objects for ``annotations.geojson`` and the overlay
``summarise``         truth and objects → the summary of ``run.json``
``write``             any further files; their names must be in ``output.OPTIONAL_RESULTS``
====================  ==========================================================================================

What a task must keep to:

- **A tile belongs to one block, and is run once.** ``Plan.wanted`` says which tiles run; a block is a part of the tile
  grid with the tiles left to do. Blocks may be cut otherwise after a resume, so what a tile yields must not depend on
  its block.
- **Nothing depends on the order of arrival.** ``gather`` may be fed in any order; the truth must be the same.
- **Done means in the journal.** ``Result.ran`` marks the tiles finished; a tile that could not be read
  (``View.bad``) is not marked, is tried again on resume, and is counted as unreadable if it stays so.
- **The truth is arrays.** ``Gathered.arrays()`` is stored under ``truth/`` of ``probability.zarr`` and read back by
  :meth:`wsiengine.truth.Truth.load`; everything from ``map`` on is a pure function of it, so that ``export`` never
  needs inference. An array called ``map`` is the map itself and is stored as its level 0 only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from wsiengine.geometry import Box
from wsiengine.grid import Axis, Block, TileGrid

if TYPE_CHECKING:
    from wsiengine.annotations import Annotation
    from wsiengine.finishing import Finish
    from wsiengine.job import Job
    from wsiengine.journal import Journal, Recovered
    from wsiengine.models.card import Card
    from wsiengine.planning import Plan
    from wsiengine.tasks.classify import MapLayout
    from wsiengine.truth import Truth


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What ``score`` sees of the slide.

    Attributes:
        pixels: (rows, cols, 3) uint8, normalised, at the model's µm/px; (rows, cols, 1) uint16 for a card of depth 16.
        corners_px: (N, 2) int64: y, x in ``pixels`` of each wanted tile of the block, row-major.
        bad: (N,) bool: tiles that saw anything that could not be decoded; None where all could.
    """

    pixels: np.ndarray
    corners_px: np.ndarray
    bad: np.ndarray | None = None

    def bad_tiles(self) -> np.ndarray:
        """(N,) bool, to be added to: ``bad``, or none."""
        return np.zeros(len(self.corners_px), bool) if self.bad is None else self.bad.copy()


class Result(Protocol):
    """What a block yields. Pickles; ``seconds`` is filled in by the engine."""

    @property
    def tiles(self) -> Box: ...

    @property
    def ran(self) -> np.ndarray: ...

    @property
    def seconds(self) -> Mapping[str, float]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A result as bytes, for tasks whose blocks yield no table of scores.

    Attributes:
        tiles: The block's box in tile units.
        ran: (tiles.height, tiles.width) bool: tiles that are finished with this.
        payload: The task's own format.
        seconds: Time spent, by stage.
    """

    tiles: Box
    ran: np.ndarray
    payload: bytes
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, block: Block, bad: np.ndarray, payload: bytes) -> "Packed":
        """What a block yielded; ``bad``: (wanted tiles) bool, those that could not be read or scored."""
        ran = block.wanted.copy()
        ran[block.wanted] = ~bad
        return cls(block.tiles, ran, payload)


class Gathered(Protocol):
    """Results on their way to the truth, in the process of the run. Its methods are called by one thread at a time."""

    @property
    def ran(self) -> np.ndarray:
        """(tile rows, tile cols) bool: the tiles that are done."""

    def add(self, result: Any) -> None:
        """Take a finished block."""

    def arrays(self) -> Mapping[str, np.ndarray]:
        """The truth; asked for once, after the last block."""


class Task(Protocol):
    """One kind of output. See the module's docstring for the order and the rules."""

    name: str
    activation_bytes_per_px: int  # live activations of a session per input pixel, measured

    def layout(self, card: "Card") -> "MapLayout":
        """What the channels of the map mean."""

    def stored_layout(self, facts: Mapping[str, Any]) -> "MapLayout":
        """The layout again from its fields (``dataclasses.asdict`` of it, lists as tuples)."""

    def score(self, job: "Job", block: Block, view: View) -> Any:
        """Run the model under a block → :class:`Result`.

        Raises:
            ScoreError: The model returned NaN or infinity; the engine adds the place.
        """

    def record(self, journal: "Journal", result: Any) -> None:
        """Append a finished block to the journal."""

    def gather(self, plan: "Plan", recovered: "Recovered") -> Gathered:
        """A gathering that holds what the journal of an earlier attempt held."""

    def held(self, plan: "Plan") -> list[int]:
        """Sizes in bytes of the arrays, all from ``plan.scratch``, that truth, map and regions hold at once."""

    def memory(self, plan: "Plan") -> int:
        """Bytes that what is found takes beside them, in the process of the run."""

    def edges(self, axis: Axis, block_tiles: int) -> list[int]:
        """Cells at which the chunks of the lazy map begin, and its extent: (blocks along the axis + 1,) entries."""

    def around(self, cells: Box, grid: TileGrid) -> Box:
        """The tiles (in tile units) whose results ``chunk`` needs."""

    def chunk(
        self, layout: "MapLayout", grid: TileGrid, analysed: np.ndarray, cells: Box, results: list[Any]
    ) -> np.ndarray:
        """The lazy map's ``cells`` from the blocks around them: (rows, cols, channels) uint8.

        ``analysed`` is cut to ``cells``.
        """

    def map(self, truth: "Truth") -> np.ndarray:
        """(rows, cols, channels) uint8, 0 = not analysed."""

    def annotate(self, truth: "Truth", coded: np.ndarray, finish: "Finish") -> "Sequence[Annotation]":
        """Objects in level-0 pixels; ``coded`` is the map."""

    def summarise(self, truth: "Truth", annotations: "Sequence[Annotation]") -> dict[str, Any]:
        """``area_mm2`` by class, ``analysed_mm2``, ``regions``, ``tiles``, and what else a task counts."""

    def write(self, truth: "Truth", annotations: "Sequence[Annotation]", finish: "Finish", folder: Path) -> list[str]:
        """Further files beside map, annotations and overlay → their names."""
