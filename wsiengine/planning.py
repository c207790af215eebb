"""What a run will read, compute and write, and its bytes, before the first pixel is read.

:func:`make_plan` is pure. :func:`plan`, the public call, opens the slide and the model, finds the tissue, and hands
all of it to :func:`make_plan`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiengine.dense import block_cells, run_box
from wsiengine.dense import work as dense_work
from wsiengine.errors import MemoryLimitError, NothingToAnalyse, ResolutionError
from wsiengine.footprint import (
    batch_tiles,
    block_bytes,
    finding_arrays,
    in_pieces,
    memory_parts,
    peak_bytes,
    peak_bytes_at_once,
    source_px_per_px,
)
from wsiengine.geometry import Lattice, Mpp
from wsiengine.grid import Block, TileGrid, blocks_of
from wsiengine.machine import usable_cores
from wsiengine.models.card import Card
from wsiengine.scratch import IN_MEMORY, Scratch, strips
from wsiengine.slides.base import SlideInfo
from wsiengine.slides.reading import PLAUSIBLE_MPP, plausible, require_mpp
from wsiengine.tasks import task_of
from wsiengine.tasks.base import Task
from wsiengine.tasks.classify import MapLayout

if TYPE_CHECKING:
    import dask.array as da

    from wsiengine.job import Job

USUAL_OVERLAP = 0.3
FINEST_ZOOM = 1.5  # a slide may be this much coarser than the model wants; beyond, detail would be invented
_MIB = 1 << 20
_BLOCK_SIDES = (16, 12, 8, 6, 4, 3, 2, 1)
_BLOCK_BYTES = 24 * _MIB  # most that one block should hold at once; larger ones save under 1 % of the time
_GPU_BLOCK_BYTES = 64 * _MIB  # where a GPU waits: each block costs the interpreter as much as a batch does
_BLOCKS_PER_THREAD = 8  # at least: else the last blocks leave threads idle


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for, beyond slide and model.

    ``overlap`` is linear, in [0, 1). ``mode`` is ``tiles`` or ``dense``. ``threads`` 0 means all cores the process may
    use. ``memory_limit_bytes`` None means no limit. ``calibrated`` False: nobody knows the µm/px, lengths are pixels.
    ``cam``: channels of the class whose activation map is kept of every tile. ``cluster``: threads of each worker of a
    ``distributed`` client, where one scores. ``readers``: processes that read for the threads. ``beside_bytes``: what
    another slide of the same call holds meanwhile.
    """

    overlap: float = USUAL_OVERLAP
    batch_size: int | None = None
    threshold: float | None = None
    device: str = "auto"
    threads: int = 0
    memory_limit_bytes: int | None = None
    block_tiles: int | None = None
    mode: str = "tiles"
    calibrated: bool = True
    cam: tuple[int, ...] = ()
    cluster: tuple[int, ...] = ()
    readers: int = 0
    beside_bytes: int = 0

    @property
    def worker_threads(self) -> int:
        """In one process: memory is planned for it."""
        return max(self.cluster, default=self.threads or usable_cores())

    @property
    def all_threads(self) -> int:
        """That blocks must keep busy."""
        return sum(self.cluster) or self.worker_threads


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A run, ready to be printed, turned into a lazy Dask array, or carried out. Holds no buffers and no locks.

    Attributes:
        path: The slide, as the user named it.
        info: Facts about the slide.
        card: The model's card.
        layout: What the map's channels mean.
        grid: The tile grid on the slide's lattice.
        wanted: (tile rows, tile cols) bool: tiles to run.
        analysed: (rows, cols) bool: cells that the map fills.
        options: What the user asked for.
        block_tiles: Side of a block in tiles.
        tissue_um2: Area of the tissue (within the region, where one was given).
        fingerprint: sha256 of the slide.
        weights_bytes: Size of the model file.
        job: What scores a block (slide, session, normaliser, grid); None in a plan that is only looked at.
        scratch: Makes the arrays that grow with the slide.
    """

    path: str
    info: SlideInfo
    card: Card
    layout: MapLayout
    grid: TileGrid
    wanted: np.ndarray
    analysed: np.ndarray
    options: Options
    block_tiles: int
    tissue_um2: float
    fingerprint: str
    weights_bytes: int = 0
    job: "Job | None" = None
    scratch: Scratch = IN_MEMORY

    @property
    def lattice(self) -> Lattice:
        return self.grid.lattice

    @property
    def task(self) -> Task:
        """What the model does with a block, and with what comes of it."""
        if self.options.mode == "dense":
            from wsiengine.tasks.windows import DenseClassification

            return DenseClassification(self.wanted)
        return task_of(self.card.task, cam=self.options.cam)

    @property
    def work(self) -> tuple[TileGrid, np.ndarray]:
        """What is cut into blocks, journalled and resumed: tiles, or the cells of a dense run."""
        return dense_work(self.grid, self.wanted) if self.options.mode == "dense" else (self.grid, self.wanted)

    @property
    def tile_count(self) -> int:
        return int(np.count_nonzero(self.wanted))

    @property
    def threshold(self) -> float:
        """Least probability of the best class: the user's, else the card's."""
        asked = self.options.threshold
        return self.layout.uncertain_below if asked is None else asked

    def blocks(self) -> Iterator[Block]:
        """The blocks to run, row-major."""
        return blocks_of(self.work[1], self.block_tiles)

    @property
    def block_count(self) -> int:
        return sum(1 for _ in self.blocks())

    @property
    def read_px(self) -> int:
        """Working pixels read, halos and overlaps between blocks included."""
        if self.options.mode == "dense":
            halo = self.card.dense.halo_px if self.card.dense else 0
            cell_px, wanted = self.lattice.cell_px, self.work[1]
            return sum(run_box(block.tiles, wanted).scale(cell_px).grow(halo).area for block in self.blocks())
        return sum(block.box_px(self.grid).area for block in self.blocks())

    @property
    def read_bytes(self) -> int:
        """Decoded bytes that the blocks read from the best level, before resampling."""
        return int(3 * self.read_px * source_px_per_px(self))

    @property
    def blocks_at_once(self) -> int:
        """Blocks under way in one process. Where threads help each other it is half as many, or what fits in memory."""
        threads, limit = self.options.worker_threads, self.options.memory_limit_bytes
        if self.options.cluster or in_pieces(self, 0) is None:
            return threads
        most = min(threads, max(2, -(-threads // 2)))
        if limit is None:
            return most
        fitting = (count for count in range(most, 1, -1) if peak_bytes_at_once(self, self.block_tiles, count) <= limit)
        return next(fitting, 1)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of anonymous memory."""
        return peak_bytes(self, self.block_tiles)

    @property
    def scratch_bytes(self) -> int:
        """Most that scratch files take at once, beside journal and results."""
        finding = self.scratch.split(finding_arrays(self.lattice))[1]
        return max(finding, self.scratch.split(self.task.held(self))[1])

    def to_dask(self) -> "da.Array":
        """The probability map as a lazy Dask array: (rows, cols, channels) uint8, 0 = not analysed.

        Computing it runs the very block function that :func:`wsiengine.infer` runs.
        """
        from wsiengine.graph import map_array

        return map_array(self)

    def __str__(self) -> str:
        from wsiengine.wording import plan_lines

        return "\n".join(f"{name:<9}{text}" for name, text in plan_lines(self))


def make_plan(plan: Plan) -> Plan:
    """Choose the block size, and refuse what cannot be run.

    Raises:
        NothingToAnalyse: No tile is wanted.
        MemoryLimitError: Even the smallest block would not fit.
    """
    if not plan.wanted.any():
        raise NothingToAnalyse(
            "There is nothing to analyse: no tissue was found on the slide.",
            hint="look at `wsiengine tissue SLIDE`; --tissue none analyses everything.",
        )
    dense = plan.options.mode == "dense"  # its blocks are part of the result: no memory limit may change them
    side = block_cells(plan.card) if dense else plan.options.block_tiles or _block_side(plan)
    planned = replace(plan, block_tiles=side)
    limit = plan.options.memory_limit_bytes
    if limit is not None and planned.peak_bytes > limit:
        raise MemoryLimitError(_memory_words(planned, limit), hint="lower --threads, or raise --memory-limit.")
    return planned


def _block_side(plan: Plan) -> int:
    """The largest block that fits into memory and still gives every thread several blocks.

    A GPU takes batches of one padded shape: it would idle through the rest of a batch that a small block cannot fill.
    """
    threads = plan.options.all_threads
    limit = plan.options.memory_limit_bytes
    on_cpu = plan.job is None or plan.job.runtime.on_cpu
    for side in _BLOCK_SIDES:
        plenty = plan.tile_count >= side * side * threads * _BLOCKS_PER_THREAD
        enough = plenty or side * side <= batch_tiles(plan)
        small = block_bytes(plan, side) <= (_BLOCK_BYTES if on_cpu else _GPU_BLOCK_BYTES)
        fits = limit is None or peak_bytes(plan, side) <= limit
        if enough and small and fits:
            return side
    return 1


def _memory_words(plan: Plan, limit: int) -> str:
    parts = memory_parts(plan, plan.block_tiles)
    worst = max(parts, key=lambda name: parts[name])
    return (
        f"The run needs about {plan.peak_bytes / _MIB:,.0f} MiB, the limit is {limit / _MIB:,.0f} MiB. "
        f"Largest part: {worst}, {parts[worst] / _MIB:,.0f} MiB."
    )


def lattice_for(info: SlideInfo, card: Card) -> Lattice:
    """The lattice of a slide for a model.

    Raises:
        ResolutionError: µm/px missing, or the slide is far coarser than the model needs.
    """
    mpp = require_mpp(info)
    if card.input.mpp is None:  # pixels as they are, or all of them shrunk into one tile
        shrink = max(1.0, max(info.size_l0.shape) / card.input.size_px) if card.input.whole else 1.0
        return Lattice(info.size_l0, mpp, Mpp(mpp.y * shrink, mpp.x * shrink), card.output_stride_px)
    if not plausible(mpp) and plausible(card.input.fixed_mpp):  # others' models are for other pictures: mammograms, say
        raise ResolutionError(
            f"{mpp} cannot be the resolution of a microscope slide (we accept {PLAUSIBLE_MPP[0]} to "
            f"{PLAUSIBLE_MPP[1]:g} µm/px).",
            hint="a 40× scan has about 0.25 µm/px, a 20× scan about 0.5.",
        )
    wanted = card.input.fixed_mpp
    zoom = mpp.mean / wanted.mean
    if zoom > FINEST_ZOOM:
        raise ResolutionError(
            f"The slide has {mpp}, {card.name} was made for {wanted}: {zoom:.1f}× too coarse to show "
            "what the model looks for.",
            hint="use a slide scanned at higher magnification, or correct its µm/px with --mpp.",
        )
    return Lattice(info.size_l0, mpp, wanted, card.output_stride_px)


def choose_tiles(
    grid: TileGrid,
    tissue: np.ndarray,
    inside: np.ndarray | None,
    tile_inside: np.ndarray | None,
    scratch: Scratch = IN_MEMORY,
) -> tuple[np.ndarray, np.ndarray]:
    """Which cells are analysed and which tiles run.

    A cell is analysed where it is mostly tissue (and touches the region). A tile runs when it owns such a
    cell (and its own centre is inside the region). Cells that no running tile covers drop out.

    Args:
        grid: The tile grid.
        tissue: (rows, cols) float32: tissue fraction of each cell.
        inside: (rows, cols) bool: the cell touches the region; None without a region.
        tile_inside: (tile rows, tile cols) bool: tile centre inside the region; None without a region.
        scratch: Makes the table of cells.

    Returns:
        analysed (rows, cols) bool, wanted (tile rows, tile cols) bool.
    """
    least = tissue.max(initial=0)
    if 0 < least < 0.5:  # tissue smaller than a cell is still looked at
        analysed = scratch.by_strips(tissue.shape, bool, lambda rows: tissue[rows] >= least)
    else:
        analysed = scratch.by_strips(tissue.shape, bool, lambda rows: tissue[rows] >= 0.5)
    wanted = grid.owners_of(analysed)
    if tile_inside is not None:
        wanted = wanted & tile_inside
    covered = grid.covered_by(wanted, scratch)
    for rows in strips(analysed.shape):
        analysed[rows] &= covered[rows] if inside is None else covered[rows] & inside[rows]
    return analysed, wanted


def plan(slide: Any, model: str = "crc5", **options: Any) -> Plan:
    """Plan a run: open the slide and the model, find the tissue, choose tiles and blocks. Scores nothing.

    Args:
        slide: Path of a slide, or an open :class:`~wsiengine.slides.base.Slide`.
        model: Bundled or registered model, or the path of a model folder.
        **options: Fields of :class:`wsiengine.identifying.Request`: ``overlap``, ``batch_size``, ``threshold``,
            ``region``, ``tissue``, ``mpp``, ``device``, ``threads``, ``memory_limit_bytes``, ``normalise``.

    Returns:
        The plan: print it, or call ``.to_dask()``.

    Raises:
        WsiError: In words, whatever keeps the run from being planned.
    """
    from wsiengine.identifying import Request, identify
    from wsiengine.preparing import prepare

    return prepare(identify(Request(slide=slide, model=model, **options))).plan
