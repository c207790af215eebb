"""Which run a user asks for: opens slide and model, and says what decides the scores.

A resumed run must know *which* run it is before it spends time, so that nothing is read here but for the fingerprint;
:mod:`wsiengine.preparing` does the rest.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsiengine import __version__
from wsiengine.attribution import channels_of, refuse_without_cam
from wsiengine.dense import block_cells
from wsiengine.errors import PlanError
from wsiengine.finish import Finish
from wsiengine.geometry import Lattice
from wsiengine.grid import TileGrid
from wsiengine.machine import usable_cores, usable_memory_bytes
from wsiengine.models.card import FINDERS, Card, refused_steps
from wsiengine.models.parts import PER_TILE
from wsiengine.models.precision import REFERENCE
from wsiengine.models.registry import load_model
from wsiengine.models.runtime import Runtime
from wsiengine.models.session import open_runtime
from wsiengine.normalise import Recipe, parse_recipe
from wsiengine.planning import USUAL_OVERLAP, Options, lattice_for
from wsiengine.recipe import TILE_STEPS
from wsiengine.slides import open_slide
from wsiengine.slides.base import Slide
from wsiengine.slides.reading import plausible
from wsiengine.slides.tolerant import TolerantSlide
from wsiengine.tasks import task_of
from wsiengine.tasks.detect import least_overlap_px, nothing_below

_MOST_READERS = 1024
_FEWEST_READERS = 4  # fewer read hardly more tiles as processes than as threads
_MEMORY_PER_READER = 512 << 20  # of the whole run: a reader takes a third of it, and pace must not refuse a run
_ENLARGED = 1.1  # scanners miss their nominal µm/px by less; beyond, pixels are enlarged, and the user is told
_DENSE_PX_COST = 1.3  # a pixel of a dense block against one of a small tile (margins, copies), measured 1.05 to 1.3


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks of one slide.

    Attributes:
        slide: Path, or an open slide.
        model: Name or path of a model.
        overlap: Linear overlap of neighbouring tiles, [0, 1); None: 0.3, or more where the model needs more.
        batch_size: Tiles per call of the model; None leaves it to the device.
        threshold: Least probability of the best class; None takes the card's.
        region: QuPath GeoJSON that limits the run.
        tissue: ``auto`` (:func:`finder_of`), ``slide``, ``breast``, ``none``, or a GeoJSON mask.
        mpp: µm per level-0 pixel, overriding the file's.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
        threads: Worker threads; 0 = all cores.
        memory_limit_bytes: Most anonymous memory the run may take; None: what the machine (or container) has.
        normalise: Recipe that replaces the card's (``none``, ``macenko``, ``macenko+clahe``, …).
        block_tiles: Side of a block in tiles; None chooses.
        on_bad_tile: ``fail``: what cannot be decoded ends the run; ``skip``: its tiles are left out, and told.
        mode: ``tiles`` (each tile on its own), ``dense`` (windows of a map, see :mod:`wsiengine.dense`) or ``auto``:
            dense where the card has the form and overlapping tiles would cost more.
        cluster: Threads of each worker of a ``distributed`` client; empty where this process scores.
        cam: Also write the class-activation map of this class (:mod:`wsiengine.attribution`).
        precision: ``fp32``, ``fp16``, ``int8`` or ``auto`` (see :mod:`wsiengine.models.precision`).
        readers: Processes that read and normalise for the worker threads (:mod:`wsiengine.readers`), as far as memory
            allows; None: one for each core where a GPU runs the model, else none.
        beside_bytes: What another slide of the same call holds meanwhile; set by :func:`wsiengine.infer_many`.
    """

    slide: str | os.PathLike[str] | Slide
    model: str = "crc5"
    overlap: float | None = None
    batch_size: int | None = None
    threshold: float | None = None
    region: str | os.PathLike[str] | None = None
    tissue: str | os.PathLike[str] = "auto"
    mpp: float | None = None
    device: str = "auto"
    threads: int = 0
    memory_limit_bytes: int | None = None
    normalise: str | None = None
    block_tiles: int | None = None
    on_bad_tile: str = "fail"
    mode: str = "tiles"
    precision: str = REFERENCE
    cam: str | None = None
    cluster: tuple[int, ...] = ()
    readers: int | None = None
    beside_bytes: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("threads", 0),
            ("readers", 0),
            ("batch_size", 1),
            ("block_tiles", 1),
            ("memory_limit_bytes", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise PlanError(f"{name} must be at least {least}, not {value}.", hint=f"leave {name} out.")
            if value is not None and value != int(value):
                raise PlanError(f"{name} must be a whole number, not {value}.", hint=f"leave {name} out.")
        if self.readers is not None and self.readers > _MOST_READERS:
            raise PlanError(f"readers must be at most {_MOST_READERS:,}, not {self.readers:,}.", hint="one per core.")
        if self.threshold is not None:
            Finish(self.threshold)  # refuses what is no probability
        if self.mpp is not None and not isinstance(self.slide, str | os.PathLike):
            raise PlanError(
                f"mpp={self.mpp:g} was given for a slide that is open already.", hint="open_slide(path, mpp=...)."
            )

    @property
    def overlap_asked(self) -> float:
        """The overlap asked for, or the usual one."""
        return USUAL_OVERLAP if self.overlap is None else self.overlap

    def options(self, mode: str) -> Options:
        """For the planner; ``mode`` is the one chosen."""
        return Options(
            overlap=self.overlap_asked,
            batch_size=self.batch_size,
            threshold=self.threshold,
            device=self.device,
            threads=self.threads,
            memory_limit_bytes=self.memory_limit_bytes or usable_memory_bytes(),
            block_tiles=self.block_tiles,
            mode=mode,
            beside_bytes=self.beside_bytes,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """An identified run: everything opened, nothing read yet.

    ``identity`` holds all that decides the scores; ``key`` is its sha256. ``areas`` names the annotations of the
    region, where objects are counted in each. ``calibrated``: µm/px are known. ``batches_before``: what the session
    had run for other slides.
    """

    request: Request
    slide: Slide
    card: Card
    runtime: Runtime
    recipe: Recipe
    grid: TileGrid
    region: Any
    tissue_polygons: Any
    fingerprint: str
    identity: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    areas: tuple[tuple[str, Any], ...] = ()
    calibrated: bool = True
    batches_before: Mapping[str, float] = field(default_factory=dict)

    @property
    def batches(self) -> dict[str, float]:
        """What the device has run since (:meth:`wsiengine.models.runtime.Runtime.batches`); empty on a CPU."""
        now = self.runtime.batches() or {}
        return {name: round(value - self.batches_before.get(name, 0), 4) for name, value in now.items()}

    @property
    def threads(self) -> int:
        """Worker threads, where all processes that were asked for read."""
        return self.threads_beside(self.readers)

    def threads_beside(self, readers: int) -> int:
        """Worker threads: one per core, and half as many again where processes read for a GPU: those that wait for it
        leave no reader without work."""
        waiting = 0 if self.runtime.on_cpu else readers // 2
        return self.request.threads or usable_cores() + waiting

    @property
    def readers(self) -> int:
        """Processes that read: a GPU takes more tiles than the threads of one interpreter can read."""
        if self.request.cluster:
            return 0
        if self.request.readers is not None:
            return self.request.readers
        memory = self.request.memory_limit_bytes or usable_memory_bytes()
        count = min(self.request.threads or usable_cores(), usable_cores(), memory // _MEMORY_PER_READER)
        return count if not self.runtime.on_cpu and count >= _FEWEST_READERS else 0

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()


def identify(request: Request) -> Subject:
    """Open slide and model and say which run this is.

    Raises:
        WsiError: The slide, the model, the device or the region cannot be used.
    """
    warnings: list[str] = []
    card = load_model(request.model)
    recipe = parse_recipe(request.normalise if request.normalise is not None else card.recipe)
    if card.input.resample == PER_TILE and recipe.steps:
        raise PlanError(
            f"{card.name} shrinks each tile by itself, and the recipe {recipe} needs pixels that are shrunk already.",
            hint="--normalise none.",
        )
    if card.input.deep and (steps := refused_steps(recipe.steps)):
        raise PlanError(
            f"{card.name} takes pixels of 16 bits, and {steps} works at 8.", hint="--normalise none, or a window."
        )
    slide = _open(request, card, recipe, warnings)
    if slide.info.channels:
        dyes = ", ".join(slide.info.channels)
        warnings.append(f"This is fluorescence ({dyes}), not stained tissue in transmitted light, as models expect it.")
    calibrated = slide.info.mpp is not None
    if card.input.mpp is None and not calibrated:
        slide = open_slide(slide.path, mpp=1.0, window=recipe.window, deep=card.input.deep)
        warnings.append(
            "The picture states no µm/px (--mpp gives them): sizes and densities are in pixels, --min-area in px²."
        )
    elif str(request.tissue) == "auto" and not card.tissue and finder_of(request.tissue, card) == "none":
        warnings.append(f"{card.name} was not made for tissue and looks for none: the whole picture is analysed.")
    if card.detection and (note := nothing_below(request.threshold, card.detection.minimum_score)):
        warnings.append(note)
    lattice = lattice_for(slide.info, card)
    if lattice.slide_mpp.mean > _ENLARGED * lattice.mpp.mean:
        warnings.append(
            f"The slide has {lattice.slide_mpp}, {card.name} was made for {lattice.mpp}: its pixels are enlarged."
        )
    grid = TileGrid.cover(lattice, card.input.size_px, _overlap(request, card, lattice, warnings))
    region = _load(request.region, slide, "--region")
    finder = finder_of(request.tissue, card)
    mask = _load(request.tissue, slide, "--tissue") if finder is None else None
    areas = _areas(request, card, slide)
    mode = _choose_mode(request.mode, card, grid, recipe)
    if request.cam is not None:
        refuse_without_cam(card)
        channels_of(request.cam, task_of(card.task).layout(card))
    runtime = open_runtime(card, request.precision, device=request.device, batch_size=request.batch_size)
    card = runtime.card
    fingerprint = slide.fingerprint()
    identity = {
        "slide": fingerprint,
        "model": card.sha256,
        "version": __version__.split(".")[0],
        "parameters": {
            "card": _card_digest(card),
            "mpp": [lattice.slide_mpp.y, lattice.slide_mpp.x],
            "overlap": round(grid.overlap, 6),
            "region": _digest(region),
            "tissue": _digest(mask) or (finder if card.tissue else str(request.tissue)),
            "normalise": str(recipe),
            "provider": runtime.provider,
            **({"precision": card.number_format} if card.number_format != REFERENCE else {}),
            **({"mode": mode} if mode != "tiles" else {}),
            **({"cam": request.cam} if request.cam is not None else {}),
            **({"on_bad_tile": request.on_bad_tile} if request.on_bad_tile != "fail" else {}),
            **({"batch_size": runtime.batch_size} if runtime.provider != "CPUExecutionProvider" else {}),
        },
    }
    told = tuple(warnings)
    opened = (request, slide, card, runtime, recipe, grid, region, mask, fingerprint, identity)
    before = runtime.batches() or {}
    return Subject(*opened, warnings=told, areas=areas, calibrated=calibrated, batches_before=before)


def finder_of(asked: str | os.PathLike[str], card: Card) -> str | None:
    """What looks for the part that is analysed: ``slide``, ``breast``, ``none``, or None where a file says it.

    Where neither user nor card say, tissue is looked for on slides; a picture that no microscope made is taken whole.
    """
    if str(asked) != "auto":
        return str(asked) if str(asked) in (*FINDERS, "none") else None
    return card.tissue or ("slide" if plausible(card.input.mpp) else "none")


def _overlap(request: Request, card: Card, lattice: Lattice, warnings: list[str]) -> float:
    """The overlap asked for, or what the model needs where that is more: a neighbour must see whole, and with context,
    what a tile does not. Who asked for less is told."""
    asked = request.overlap_asked
    needed_px = max(least_overlap_px(card), 2 * card.halo_px if card.segmentation else 0)
    side = card.input.size_px
    one_tile = max(lattice.extent_px.shape) <= side
    if not needed_px or one_tile or round((1 - asked) * side) <= side - needed_px:
        return asked
    if request.overlap is None:
        return needed_px / side
    warnings.append(
        f"The overlap is raised from {100 * asked:.0f} % to {100 * needed_px / side:.0f} % ({needed_px} px): "
        + (
            f"{card.name} finds objects of up to {card.detection.largest_px:g} px, and each must be seen whole."
            if card.detection
            else f"{card.name} needs {card.halo_px} px of context around what it answers for."
        )
    )
    return needed_px / side


def _areas(request: Request, card: Card, slide: Slide) -> tuple[tuple[str, Any], ...]:
    """Of a detector's region: each annotation with its name."""
    if request.region is None or card.task != "detect":
        return ()
    from wsiengine.regions import load_areas

    info = slide.info
    return tuple(load_areas(request.region, size_l0=info.size_l0, bounds_l0=info.bounds_l0, name="--region"))


def _choose_mode(asked: str, card: Card, grid: TileGrid, recipe: Recipe) -> str:
    """``tiles`` or ``dense``.

    Raises:
        PlanError: No such mode.
        CardError: Dense was asked for, and the model has no dense form.
    """
    if asked not in ("tiles", "dense", "auto"):
        raise PlanError(f"There is no mode {asked!r}.", hint="tiles, dense or auto.")
    if any(step["step"] in TILE_STEPS for step in recipe.steps):
        if asked == "dense":
            raise PlanError(
                f"The recipe {recipe} changes each tile by itself, and dense windows have no tiles.",
                hint="--mode tiles.",
            )
        return "tiles"
    if asked == "dense" or (asked == "auto" and card.dense is not None):
        side_px = block_cells(card) * card.output_stride_px
        read_px = side_px + 2 * (card.dense.halo_px if card.dense else 0)
        if asked == "dense" or _DENSE_PX_COST * (read_px / side_px) ** 2 < (grid.tile_px / grid.stride_px) ** 2:
            return "dense"
    return "tiles"


def _open(request: Request, card: Card, recipe: Recipe, warnings: list[str]) -> Slide:
    if not isinstance(request.slide, str | os.PathLike):
        if card.input.deep and not getattr(request.slide, "deep", False):
            raise PlanError(
                f"{card.name} takes 16 bits, and the slide was opened for 8.", hint="open_slide(path, deep=True)."
            )
        return request.slide
    slide = open_slide(request.slide, mpp=request.mpp, window=recipe.window, deep=card.input.deep)
    if request.mpp is not None:
        warnings.append(f"µm/px taken from --mpp: {request.mpp:g}, not from the file.")
    if request.on_bad_tile not in ("fail", "skip"):
        raise ValueError(f"on_bad_tile is 'fail' or 'skip', not {request.on_bad_tile!r}")
    return TolerantSlide(slide) if request.on_bad_tile == "skip" else slide


def _load(path: str | os.PathLike[str] | None, slide: Slide, name: str) -> Any:
    if path is None:
        return None
    from wsiengine.regions import load_region

    return load_region(Path(path), size_l0=slide.info.size_l0, bounds_l0=slide.info.bounds_l0, name=name)


def _card_digest(card: Card) -> str:
    """Of what a card says about numbers and classes, not of its prose: the same weights may be read otherwise."""
    facts = card.to_json()
    if facts["dense"]:
        del facts["dense"]["against_tiles"]  # a measurement, which changes none
    deciding: tuple[str, ...] = (
        "input",
        "outputs",
        "activation",
        "output_stride_px",
        "halo_px",
        "dense",
        "gate",
        "uncertain",
    )
    deciding += tuple(name for name in ("segmentation", "detection", "second") if name in facts)
    classes = [{k: v for k, v in entry.items() if k != "evidence"} for entry in facts["classes"]]
    text = json.dumps([classes, *(facts[name] for name in deciding)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(geometry: Any) -> str | None:
    if geometry is None:
        return None
    return hashlib.sha256(geometry.normalize().wkb).hexdigest()[:16]
