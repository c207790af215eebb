"""The memory that a run will take, part by part, predicted from its plan: nothing here has read a pixel."""

from typing import TYPE_CHECKING

from wsiengine.dense import STRIP_PX
from wsiengine.geometry import Lattice
from wsiengine.models.parts import PER_TILE
from wsiengine.scratch import Scratch
from wsiengine.slides.kept import KEPT_BYTES
from wsiengine.slides.reading import best_level
from wsiengine.slides.sources import is_url
from wsiengine.tissue import tissue_bytes, tissue_lattice

if TYPE_CHECKING:
    from wsiengine.planning import Plan

_MIB = 1 << 20
_BASE_BYTES = 128 * _MIB  # libraries and kernels: measured 95 to 120
_TABLES_BYTES_PER_PX = 18 / 256**2  # place and length of each file tile; scanners' are 240 or 256 px wide, or larger
_PICTURE_BYTES = 24 * _MIB  # the slide's picture, and pieces of the slide as it is read
_DRAWING_BYTES = 56 * _MIB  # strips of the map, shards, outlines, the overlay: measured 40 to 53
_TISSUE_BYTES = 40 * _MIB  # a few pieces of the slide, as they are read, and strips of what is made of them
_READER_BYTES = 80 * _MIB  # of a reading process beside its block: measured 50 to 87, with Macenko and CLAHE


def block_bytes(plan: "Plan", side: int) -> int:
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


def _dense_side_px(plan: "Plan", side: int) -> int:
    """Pixels along the longer side of what the network sees of a dense block."""
    halo = plan.card.dense.halo_px if plan.card.dense else 0
    return min(side, max(plan.work[0].shape)) * plan.lattice.cell_px + 2 * halo


def source_px_per_px(plan: "Plan") -> float:
    """Pixels of the best level per working pixel."""
    fy, fx = plan.lattice.l0_per_px
    if plan.card.input.resample == PER_TILE:
        return fy * fx  # always read at the finest level
    down_y, down_x = plan.info.levels[best_level(plan.info.levels, (fy, fx))].downsample
    return (fy / down_y) * (fx / down_x)


def peak_bytes(plan: "Plan", side: int) -> int:
    """Predicted peak of anonymous memory."""
    return sum(memory_parts(plan, side).values())


def memory_parts(plan: "Plan", side: int) -> dict[str, int]:
    """What the peak of memory is made of, in words and bytes: finding the tissue, running the blocks or drawing what
    they found, the largest. Each has given its memory back when the next begins.
    """
    dense = plan.options.mode == "dense"
    return _memory_parts(plan, side, plan.blocks_at_once if dense else plan.options.worker_threads)


def peak_bytes_at_once(plan: "Plan", side: int, at_once: int) -> int:
    return sum(_memory_parts(plan, side, at_once).values())


def _memory_parts(plan: "Plan", side: int, at_once: int) -> dict[str, int]:
    always = {
        "the libraries": _BASE_BYTES,
        "the slide's tables of tiles": _table_bytes(plan),
        "the model's weights": _weights_bytes(plan),
    }
    if readers := plan.options.readers:
        always[f"{readers} processes that read"] = readers * (_READER_BYTES + block_bytes(plan, side))
    if plan.options.beside_bytes:
        always["the slide before"] = plan.options.beside_bytes
    finding = {"finding the tissue": finding_bytes(plan.lattice, plan.scratch)}
    found = {"the map": _map_bytes(plan)} | _model_parts(plan, side, at_once)
    running, drawing = found | _reading_parts(plan, side, at_once), found | {"drawing the results": _DRAWING_BYTES}
    return always | max(finding, running, drawing, key=lambda parts: sum(parts.values()))


def _weights_bytes(plan: "Plan") -> int:
    if plan.job is None:
        return 3 * plan.weights_bytes
    pieces = in_pieces(plan, 0) is not None
    return plan.job.runtime.weights_bytes(plan.options.worker_threads, pieces=pieces)


def finding_bytes(lattice: Lattice, scratch: Scratch) -> int:
    """What a slide takes in memory while its tissue is found."""
    return scratch.split(finding_arrays(lattice))[0] + _TISSUE_BYTES


def finding_arrays(lattice: Lattice) -> tuple[int, ...]:
    """Sizes of the arrays that hold a slide while its tissue is found."""
    return tissue_bytes(tissue_lattice(lattice.slide_l0, lattice.slide_mpp))


def held_bytes(plan: "Plan") -> int:
    """What a slide may hold until it has ended: all but libraries and the model, which slides of one call share.

    Its reader keeps the memory into which each thread has read a block.
    """
    doing = max(sum(_reading_parts(plan, plan.block_tiles, plan.blocks_at_once).values()), _DRAWING_BYTES)
    return _table_bytes(plan) + _map_bytes(plan) + doing


def _table_bytes(plan: "Plan") -> int:
    """What a reader keeps of the file's own tables; ours leaves those of local files where they are."""
    stay = plan.info.reader == "direct" and not is_url(plan.path)
    return 0 if stay else int(plan.info.size_l0.area * _TABLES_BYTES_PER_PX)


def _map_bytes(plan: "Plan") -> int:
    return plan.scratch.split(plan.task.held(plan))[0] + plan.task.memory(plan)


def _model_parts(plan: "Plan", side: int, at_once: int) -> dict[str, int]:
    """What the session has taken for its activations; it keeps it for the next slide."""
    threads = plan.options.worker_threads
    run_px = batch_tiles(plan) * plan.card.input.size_px**2
    if plan.options.mode == "dense":
        run_px = _dense_side_px(plan, side) ** 2
    if (pieces := in_pieces(plan, run_px)) is None:
        return {f"the model's work in each of {threads} threads": threads * run_px * plan.task.activation_bytes_per_px}
    block, piece = pieces
    return {f"the model's work on {at_once} blocks, in {threads} threads": at_once * block + threads * piece}


def in_pieces(plan: "Plan", run_px: int) -> tuple[int, int] | None:
    """What a dense block and each thread take where the network runs in parts, which have the weights once more."""
    return plan.job.runtime.map_bytes(run_px) if plan.job and plan.options.mode == "dense" else None


def _reading_parts(plan: "Plan", side: int, at_once: int) -> dict[str, int]:
    """What is read while the blocks run."""
    dear = plan.info.reader == "direct" and plan.info.format.endswith("JPEG 2000")
    return {
        "the slide's picture": _PICTURE_BYTES,
        "file tiles that are kept": KEPT_BYTES if dear else 0,
        f"the pixels of a block in each of {at_once} threads": at_once * block_bytes(plan, side),
    }


def batch_tiles(plan: "Plan") -> int:
    """Tiles that the model takes at once; the CPU takes tile by tile."""
    return plan.job.runtime.batch_size if plan.job else 1
