"""What a run will read, compute and write, and its bytes, before the first pixel is read.

:func:`make_plan` is pure. :func:`plan`, the public call, opens the slide and the model, finds the tissue, and hands
all of it to :func:`make_plan`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiengine.dense import STRIP_PX, block_cells, run_box
from wsiengine.dense import work as dense_work
from wsiengine.errors import MemoryLimitError, NothingToAnalyse, ResolutionError
from wsiengine.geometry import Lattice, Mpp
from wsiengine.grid import Block, TileGrid, blocks_of
from wsiengine.machine import usable_cores
from wsiengine.models.card import Card
from wsiengine.models.parts import PER_TILE
from wsiengine.scratch import IN_MEMORY, Scratch, strips
from wsiengine.slides.base import SlideInfo
from wsiengine.slides.kept import KEPT_BYTES
from wsiengine.slides.reading import PLAUSIBLE_MPP, best_level, plausible, require_mpp
from wsiengine.slides.sources import is_url
from wsiengine.tasks import task_of
from wsiengine.tasks.base import Task
from wsiengine.tasks.classify import MapLayout
from wsiengine.tissue import tissue_bytes, tissue_lattice

if TYPE_CHECKING:
    import dask.array as da

    from wsiengine.job import Job

USUAL_OVERLAP = 0.3
FINEST_ZOOM = 1.5  # a slide may be this much coarser than the model wants; beyond, detail would be invented
_MIB = 1 << 20
_BASE_BYTES = 128 * _MIB  # libraries and kernels: measured 95 to 120
_TABLES_BYTES_PER_PX = 18 / 256**2  # place and length of each file tile; scanners' are 240 or 256 px wide, or larger
_PICTURE_BYTES = 24 * _MIB  # the slide's picture, and pieces of the slide as it is read
_DRAWING_BYTES = 56 * _MIB  # strips of the map, shards, outlines, the overlay: measured 40 to 53
_TISSUE_BYTES = 40 * _MIB  # a few pieces of the slide, as they are read, and strips of what is made of them
_READER_BYTES = 80 * _MIB  # of a reading process beside its block: measured 50 to 87, with Macenko and CLAHE
_BLOCK_SIDES = (16, 12, 8, 6, 4, 3, 2, 1)
_BLOCK_BYTES = 24 * _MIB  # most that one block should hold at once; larger ones save under 1 % of the time
_BATCHED_BLOCK_BYTES = 64 * _MIB  # where a GPU waits: each block costs the interpreter as much as a batch does
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
        if self.options.cluster or _in_pieces(self, 0) is None:
            return threads
        most = min(threads, max(2, -(-threads // 2)))
        if limit is None:
            return most
        fitting = (count for count in range(most, 1, -1) if _peak_bytes(self, self.block_tiles, count) <= limit)
        return next(fitting, 1)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of anonymous memory."""
        return peak_bytes(self, self.block_tiles)

    @property
    def scratch_bytes(self) -> int:
        """Most that scratch files take at once, beside journal and results."""
        finding = self.scratch.split(_finding(self.lattice))[1]
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
        raise MemoryLimitError(_memory_words(planned, limit), hint=_less(planned))
    return planned


def _less(plan: Plan) -> str:
    """What to try where memory is short."""
    return f"lower --threads{' or --readers' if plan.options.readers else ''}, or raise --memory-limit."


def _block_side(plan: Plan) -> int:
    """The largest block that fits into memory and still gives every thread several blocks.

    A GPU takes batches of one padded shape: it would idle through the rest of a batch that a small block cannot fill.
    """
    threads = plan.options.all_threads
    limit = plan.options.memory_limit_bytes
    for side in _BLOCK_SIDES:
        plenty = plan.tile_count >= side * side * threads * _BLOCKS_PER_THREAD
        enough = plenty or side * side <= _batch(plan)
        small = block_bytes(plan, side) <= (_BATCHED_BLOCK_BYTES if _batch(plan) > 1 else _BLOCK_BYTES)
        fits = limit is None or peak_bytes(plan, side) <= limit
        if enough and small and fits:
            return side
    return 1


def block_bytes(plan: Plan, side: int) -> int:
    """Pixels of one block in memory: as read from the best level, resampled, and normalised."""
    grid = plan.grid
    if plan.options.mode == "dense":
        side_px = _dense_side_px(plan, side)
        return int(3 * side_px * (2 * side_px + min(side_px, STRIP_PX) * (source_px_per_px(plan) + 1)))
    across = min(side, max(grid.shape))
    side_px = (across - 1) * grid.stride_px + grid.tile_px
    one_by_one = plan.card.input.resample == PER_TILE or (plan.job and plan.job.normaliser.tile_steps)
    by_tile = 3 * (across * grid.tile_px) ** 2 if one_by_one else 0
    return int(3 * side_px**2 * (source_px_per_px(plan) + 2)) + by_tile


def _dense_side_px(plan: Plan, side: int) -> int:
    """Pixels along the longer side of what the network sees of a dense block."""
    halo = plan.card.dense.halo_px if plan.card.dense else 0
    return min(side, max(plan.work[0].shape)) * plan.lattice.cell_px + 2 * halo


def source_px_per_px(plan: Plan) -> float:
    """Pixels of the best level per working pixel."""
    fy, fx = plan.lattice.l0_per_px
    if plan.card.input.resample == PER_TILE:
        return fy * fx  # always read at the finest level
    down_y, down_x = plan.info.levels[best_level(plan.info.levels, (fy, fx))].downsample
    return (fy / down_y) * (fx / down_x)


def peak_bytes(plan: Plan, side: int) -> int:
    """Predicted peak of anonymous memory."""
    return sum(memory_parts(plan, side).values())


def memory_parts(plan: Plan, side: int) -> dict[str, int]:
    """What the peak of memory is made of, in words and bytes: finding the tissue, running the blocks or drawing what
    they found, the largest. Each has given its memory back when the next begins.
    """
    dense = plan.options.mode == "dense"
    return _memory_parts(plan, side, plan.blocks_at_once if dense else plan.options.worker_threads)


def _peak_bytes(plan: Plan, side: int, at_once: int) -> int:
    return sum(_memory_parts(plan, side, at_once).values())


def _memory_parts(plan: Plan, side: int, at_once: int) -> dict[str, int]:
    always = {
        "the libraries": _BASE_BYTES,
        "the slide's tables of tiles": _table_bytes(plan),
        "the model's weights": _weights_bytes(plan) * (1 if _in_pieces(plan, 0) is None else 2),
    }
    if readers := plan.options.readers:
        always[f"{readers} processes that read"] = readers * (_READER_BYTES + block_bytes(plan, side))
    if plan.options.beside_bytes:
        always["the slide before"] = plan.options.beside_bytes
    finding = {"finding the tissue": finding_bytes(plan.lattice, plan.scratch)}
    found = {"the map": _map_bytes(plan)} | _model_parts(plan, side, at_once)
    running, drawing = found | _reading_parts(plan, side, at_once), found | {"drawing the results": _DRAWING_BYTES}
    return always | max(finding, running, drawing, key=lambda parts: sum(parts.values()))


def _weights_bytes(plan: Plan) -> int:
    return plan.job.runtime.weights_bytes(plan.options.worker_threads) if plan.job else 3 * plan.weights_bytes


def finding_bytes(lattice: Lattice, scratch: Scratch) -> int:
    """What a slide takes in memory while its tissue is found."""
    return scratch.split(_finding(lattice))[0] + _TISSUE_BYTES


def _finding(lattice: Lattice) -> tuple[int, ...]:
    """Sizes of the arrays that hold a slide while its tissue is found."""
    return tissue_bytes(tissue_lattice(lattice.slide_l0, lattice.slide_mpp))


def held_bytes(plan: Plan) -> int:
    """What a slide may hold until it has ended: all but libraries and the model, which slides of one call share.

    Its reader keeps the memory into which each thread has read a block.
    """
    doing = max(sum(_reading_parts(plan, plan.block_tiles, plan.blocks_at_once).values()), _DRAWING_BYTES)
    return _table_bytes(plan) + _map_bytes(plan) + doing


def _table_bytes(plan: Plan) -> int:
    """What a reader keeps of the file's own tables; ours leaves those of local files where they are."""
    stay = plan.info.reader == "direct" and not is_url(plan.path)
    return 0 if stay else int(plan.info.size_l0.area * _TABLES_BYTES_PER_PX)


def _map_bytes(plan: Plan) -> int:
    return plan.scratch.split(plan.task.held(plan))[0] + plan.task.memory(plan)


def _model_parts(plan: Plan, side: int, at_once: int) -> dict[str, int]:
    """What the session has taken for its activations; it keeps it for the next slide."""
    threads = plan.options.worker_threads
    run_px = _batch(plan) * plan.card.input.size_px**2
    if plan.options.mode == "dense":
        run_px = _dense_side_px(plan, side) ** 2
    if (pieces := _in_pieces(plan, run_px)) is None:
        return {f"the model's work in each of {threads} threads": threads * run_px * plan.task.activation_bytes_per_px}
    block, piece = pieces
    return {f"the model's work on {at_once} blocks, in {threads} threads": at_once * block + threads * piece}


def _in_pieces(plan: Plan, run_px: int) -> tuple[int, int] | None:
    """What a dense block and each thread take where the network runs in parts, which have the weights once more."""
    return plan.job.runtime.map_bytes(run_px) if plan.job and plan.options.mode == "dense" else None


def _reading_parts(plan: Plan, side: int, at_once: int) -> dict[str, int]:
    """What is read while the blocks run."""
    dear = plan.info.reader == "direct" and plan.info.format.endswith("JPEG 2000")
    return {
        "the slide's picture": _PICTURE_BYTES,
        "file tiles that are kept": KEPT_BYTES if dear else 0,
        f"the pixels of a block in each of {at_once} threads": at_once * block_bytes(plan, side),
    }


def _batch(plan: Plan) -> int:
    """Tiles that the model takes at once; the CPU takes tile by tile."""
    return plan.job.runtime.batch_size if plan.job else 1


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
