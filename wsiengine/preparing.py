"""From an identified run to a plan: finds the tissue, fits the stain, chooses tiles; or takes them from the journal."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from wsiengine.areas import cells_inside
from wsiengine.attribution import channels_of
from wsiengine.breast import breast_mask
from wsiengine.dense import work as dense_work
from wsiengine.errors import MemoryLimitError, NothingToAnalyse, RegionError
from wsiengine.identifying import Subject, finder_of
from wsiengine.job import Job
from wsiengine.normalise import Normaliser, fit_normaliser
from wsiengine.planning import Plan, choose_tiles, make_plan
from wsiengine.scratch import IN_MEMORY, Scratch
from wsiengine.tasks import task_of
from wsiengine.tissue import TissueMask, find_tissue, tissue_bytes, tissue_lattice


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A plan, and what was found on the way to it.

    ``found``: tissue and stain as bytes, for the journal and for a resumed run; what was stored before is not repeated.
    """

    plan: Plan
    normaliser: Normaliser
    found: Mapping[str, bytes] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def prepare(subject: Subject, stored: Mapping[str, bytes] | None = None, scratch: Scratch = IN_MEMORY) -> Prepared:
    """Find the tissue, fit the stain and plan; what ``stored`` holds is not done again.

    ``scratch`` makes the arrays that grow with the slide, here and later in the run.

    Raises:
        NothingToAnalyse: No tissue, or no tile's centre inside the region.
        MemoryLimitError: The run would not fit.
        OutputError: The disk has no room for scratch files.
    """
    stored = stored or {}
    request, slide, grid = subject.request, subject.slide, subject.grid
    mode = subject.identity["parameters"].get("mode", "tiles")
    started = time.perf_counter()
    tissue = TissueMask.from_bytes(stored["tissue"], scratch) if "tissue" in stored else _tissue(subject, scratch)
    found = time.perf_counter()
    if "normaliser" in stored:
        normaliser = Normaliser.from_json(stored["normaliser"].decode())
    else:
        normaliser = fit_normaliser(subject.recipe, slide, tissue, grid.lattice.mpp)
    fitted = time.perf_counter()
    inside, touched, tile_inside = _inside(subject, scratch)
    cells = tissue.cell_fraction(grid.lattice, scratch)
    if touched is not None and subject.card.task == "detect":  # objects are whole: their centres decide, not tiles'
        analysed, wanted = choose_tiles(grid, _within(cells, touched, scratch), None, None, scratch)
    else:
        analysed, wanted = choose_tiles(grid, cells, touched, tile_inside, scratch)
    if subject.region is not None and not wanted.any():
        raise NothingToAnalyse(
            "There is nothing to analyse: no tile with tissue has its centre inside the region.",
            hint="draw a larger region, raise --overlap, or use --tissue none.",
        )
    work = dense_work(grid, wanted, scratch) if mode == "dense" else (grid, wanted)
    layout = task_of(subject.card.task).layout(subject.card)
    cam = channels_of(request.cam, layout) if request.cam is not None and mode != "dense" else ()
    plan = Plan(
        path=slide.path,
        info=slide.info,
        card=subject.card,
        layout=layout,
        grid=grid,
        wanted=wanted,
        analysed=analysed,
        options=replace(request.options(mode), **_known(subject), cam=cam),
        block_tiles=1,
        tissue_um2=cells_inside(_within(cells, inside, scratch), grid.lattice) * grid.lattice.cell_um2,
        fingerprint=subject.fingerprint,
        weights_bytes=subject.card.model_path.stat().st_size,
        job=Job(subject.key, slide, subject.runtime, normaliser, *work, mode == "dense", cam),
        scratch=scratch,
    )
    pieces = {"tissue": tissue.to_bytes(), "normaliser": normaliser.to_json().encode()}
    new = {name: piece for name, piece in pieces.items() if name not in stored}
    planned = _fitted(plan, subject)
    scratch.require(planned.scratch_bytes)
    return Prepared(planned, normaliser, new, {"tissue": found - started, "stain fit": fitted - found})


def _fitted(plan: Plan, subject: Subject) -> Plan:
    """The plan, with as many of the processes that read as fit into memory: they change pace alone.

    Beside another slide of the same call it is all of them: this slide can wait until that one has ended.
    """
    least = subject.readers if subject.request.beside_bytes else 0
    for readers in range(subject.readers, least, -1):
        with suppress(MemoryLimitError):
            return make_plan(_with_readers(plan, subject, readers))
    return make_plan(_with_readers(plan, subject, least))


def _with_readers(plan: Plan, subject: Subject, readers: int) -> Plan:
    return replace(plan, options=replace(plan.options, readers=readers, threads=subject.threads_beside(readers)))


def _known(subject: Subject) -> dict[str, Any]:
    """Options that the identified run decides."""
    return {"cluster": subject.request.cluster, "calibrated": subject.calibrated}


def _tissue(subject: Subject, scratch: Scratch) -> TissueMask:
    info, lattice = subject.slide.info, subject.grid.lattice
    where = (info.size_l0, lattice.slide_mpp)
    if subject.tissue_polygons is not None:
        return TissueMask.from_polygons(subject.tissue_polygons, *where, scratch)
    finder = finder_of(subject.request.tissue, subject.card)
    if finder == "none":
        return TissueMask.everywhere(*where, scratch)
    if finder == "breast":
        return breast_mask(subject.slide)
    scratch.require(scratch.split(tissue_bytes(tissue_lattice(*where)))[1])
    return find_tissue(subject.slide, scratch)


def _inside(subject: Subject, scratch: Scratch) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Of a region: cells whose centre lies inside, cells that touch it, tiles whose centre lies inside.

    What touches it is analysed, and clipped when it is drawn: else areas would lack half a cell along the boundary.
    """
    region, lattice = subject.region, subject.grid.lattice
    if region is None:
        return None, None, None
    import shapely

    from wsiengine.regions import points_inside, rasterise

    y, x = subject.grid.centres_l0()
    tiles = points_inside(region, y[:, None], x[None, :])
    cells = rasterise(region, lattice, scratch)
    if not cells.any() and not tiles.any():
        raise RegionError(
            "The region is smaller than the grid of the model: it holds no cell's centre.", hint="draw a larger region."
        )
    reach = 0.75 if subject.card.task == "detect" else 0.5  # an object may be centred in a cell's corner
    touched = rasterise(shapely.buffer(region, max(lattice.l0_per_cell) * reach, join_style="mitre"), lattice, scratch)
    return cells, touched, tiles


def _within(cells: np.ndarray, inside: np.ndarray | None, scratch: Scratch) -> np.ndarray:
    """Tissue fractions of the cells inside a region, 0 elsewhere; of all cells without one."""
    if inside is None:
        return cells
    return scratch.by_strips(cells.shape, cells.dtype, lambda rows: np.where(inside[rows], cells[rows], 0))
