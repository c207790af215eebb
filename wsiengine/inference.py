"""The main job: a slide and a model in, a folder of results out. Joins all the other modules."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiengine.errors import DeviceMemoryError, PlanError, UnreadableSlide
from wsiengine.events import Event, Listener, Stopwatch, silent
from wsiengine.facts import as_json, cam_offset, run_facts, store_facts
from wsiengine.finish import Finish, refuse_unfit
from wsiengine.grid import blocks_of, tapered
from wsiengine.identifying import Request, Subject, identify
from wsiengine.journal import Journal, Recovered, in_words
from wsiengine.meanwhile import Meanwhile, give_back_memory, keep_large_pieces_apart
from wsiengine.naming import default_folder
from wsiengine.output import Workspace, kept_batch_size, refuse_gaps, refuse_other
from wsiengine.place import Place
from wsiengine.planning import Plan
from wsiengine.preparing import Prepared, prepare
from wsiengine.profile import DEVICE, Profile, draw_profile
from wsiengine.readers import reading
from wsiengine.result import Result
from wsiengine.slides.base import Slide
from wsiengine.tasks import task_of
from wsiengine.tasks.base import Gathered
from wsiengine.tissue import tissue_cost
from wsiengine.truth import Truth
from wsiengine.wording import fewer_readers_words, left_out_words, unreadable_words

if TYPE_CHECKING:
    from distributed import Client

_SLOW_TISSUE_MPX = 400.0
_S_PER_MPX = 0.005  # one thread, tiled JPEG; two threads and more are faster, JPEG 2000 slower
_REDRAW = "`wsiengine export` draws a finished run anew without running the model; --overwrite starts it anew."


@dataclass(frozen=True, slots=True)
class Outputs:
    """What is written besides the probabilities; none of it changes them (see :class:`wsiengine.finishing.Finish`)."""

    smoothing_um: float = 0.0
    tolerance_um: float | None = None
    min_area_um2: float = 0.0
    tiles: bool = False
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Manner:
    """How a run is carried out; no score depends on it. The first five as for :func:`infer`.

    ``place``: of the slide, among the others of one call.
    """

    overwrite: bool = False
    client: "Client | None" = None
    listener: Listener = silent
    outputs: Outputs = Outputs()
    profile: bool = False
    place: Place = field(default_factory=Place)


def infer(
    slide: str | os.PathLike[str] | Slide,
    model: str = "crc5",
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    client: "Client | None" = None,
    listener: Listener = silent,
    outputs: Outputs | None = None,
    profile: bool = False,
    **options: Any,
) -> Result:
    """Run a model over a slide. Several take less time together: :func:`wsiengine.infer_many`.

    Finished blocks are kept on disk: the same call after an interruption goes on where it stopped, and after
    completion returns the finished result at once. All runs in the calling process: a library that crashes on a slide
    ends it, and a disk that never answers keeps it waiting for ever, as nothing ends a thread that waits in C. The
    command survives both (``--patience``); docs/python.md shows how a script uses it.

    Args:
        slide: Path of a slide, or an open one.
        model: Name or path of a model.
        output: Folder for the results; by default ``<slide name>.wsiengine`` in the working directory.
        overwrite: Replace what another run left in ``output``.
        client: A ``distributed.Client`` whose workers read and score the blocks; by default threads do.
        listener: Called with an :class:`~wsiengine.events.Event` at every step.
        outputs: Smoothing, simplification and extra files.
        profile: Also write ``profile.png``, a timeline of the run, and tell an event of where its time went.
        **options: Fields of :class:`wsiengine.identifying.Request` (``overlap``, ``region``, ``tissue``, ``mpp``, …).

    Returns:
        The finished result.

    Raises:
        WsiError: In words, whatever went wrong. Finished blocks stay.
    """
    manner = Manner(overwrite, client, listener, outputs or Outputs(), profile)
    if client is not None:
        options = {**options, "cluster": tuple(client.nthreads().values())}
    return run(Request(slide=slide, model=model, **options), output, manner)


def run(request: Request, output: str | os.PathLike[str] | None, manner: Manner) -> Result:
    """As :func:`infer`, which says it in one call."""
    if manner.client is not None and request.readers:
        raise PlanError(
            f"readers={request.readers} was given with a client, whose workers read the blocks that they score.",
            hint="leave readers out, or the client.",
        )
    watch, listener = Stopwatch(drawn=manner.profile), manner.listener
    with watch.stage("open"):
        subject = identify(request)
    smaller = 0
    settings = _settings(subject, manner.outputs)
    for text in subject.warnings:
        listener(Event("warning", {"text": text}))
    folder = Path(output) if output is not None else default_folder(subject.slide.path)
    kept = None if request.batch_size or manner.overwrite else kept_batch_size(folder, subject.identity)
    if kept is not None:
        subject = identify(replace(request, batch_size=kept))
    with Workspace(folder, subject.identity, overwrite=manner.overwrite) as space:
        if space.finished is not None:
            refuse_other(folder, space.finished.get("finish", {}), settings, "a finished run", _REDRAW)
            refuse_gaps(folder, space.finished.get("files", []))
            listener(Event("note", {"text": f"Already finished: {folder}. Nothing to do (--overwrite runs it again)."}))
        else:
            try:
                with reading(subject.slide, subject.readers) as manner.place.readers:
                    _run(subject, space, manner, watch)
            except DeviceMemoryError as error:
                smaller = subject.runtime.batch_size // 2
                if not smaller:
                    raise
                space.forget()  # its scores are of batches of another shape
                listener(Event("warning", {"text": f"{error.message} The slide starts again with {smaller}."}))
    if smaller:
        return run(replace(request, batch_size=smaller), folder, replace(manner, overwrite=False))
    result = Result(folder)
    listener(Event("result", {"folder": str(folder), "summary": result.summary, "files": result.files}))
    return result


def _settings(subject: Subject, outputs: Outputs) -> dict[str, Any]:
    """How the regions of a finished run would be drawn, were it run now."""
    asked = subject.request.threshold
    threshold = task_of(subject.card.task).layout(subject.card).uncertain_below if asked is None else asked
    finish = Finish(threshold, **asdict(outputs))
    refuse_unfit(finish, subject.card.task, task_of(subject.card.task).layout(subject.card))
    return finish.facts


def _run(subject: Subject, space: Workspace, manner: Manner, watch: Stopwatch) -> None:
    """What is left of a run, from its journal to its published results."""
    place, listener = manner.place, manner.listener
    keep_large_pieces_apart()
    journal, recovered = space.journal()
    with journal:
        _foretell(subject, recovered, listener)
        try:
            prepared = place.prepare(subject, lambda subject: prepare(subject, recovered.blobs, space.scratch()))
        except PlanError:
            if not recovered.begun:
                space.forget()  # a refused plan leaves nothing behind
            raise
        watch.add(prepared.seconds)
        for name, found in prepared.found.items():  # before the first block, so that a resumed run uses the very same
            journal.add_blob(name, found)
        give_back_memory()
        listener(Event("plan", {"plan": prepared.plan, "notes": list(prepared.normaliser.notes)}))
        if prepared.plan.options.readers < subject.readers:
            listener(Event("note", {"text": fewer_readers_words(prepared.plan, subject.readers)}))
        place.readers = place.readers and place.readers.keep(prepared.plan.options.readers)
        with Meanwhile(subject.slide) as meanwhile:

            def begun() -> None:
                meanwhile.begin()
                place.begun.set()

            gathered = _score(prepared.plan, (journal, recovered), manner, watch, begun)
            with watch.stage("picture (wait)"):
                picture = meanwhile.picture()
    if subject.slide.fingerprint() != subject.fingerprint:
        space.forget()  # nobody can say which of the blocks are of which slide
        raise UnreadableSlide(
            "The slide was changed while it was read; what was found is thrown away.",
            hint="wait until it is copied or scanned completely, then run the same command again.",
        )
    give_back_memory()
    with in_words(space.folder):
        _finish((subject, prepared), (gathered, picture), space, manner, watch)


def _foretell(subject: Subject, recovered: Recovered, listener: Listener) -> None:
    """Say so where finding the tissue takes long: a file without a small level is read whole."""
    mpx = tissue_cost(subject.slide.info)
    if str(subject.request.tissue) == "auto" and "tissue" not in recovered.blobs and mpx > _SLOW_TISSUE_MPX:
        text = f"The file has no small overview: {mpx:,.0f} Mpx are read once to find the tissue"
        listener(Event("note", {"text": f"{text} (about {mpx * _S_PER_MPX:,.0f} s)."}))


def _score(
    plan: Plan,
    past: tuple[Journal, Recovered],
    manner: Manner,
    watch: Stopwatch,
    begun: Callable[[], None],
) -> Gathered:
    """The results of all wanted tiles: those of an earlier attempt, and the rest by running the graph.

    ``begun`` is called after every block, or after those that were finished together.
    """
    with watch.stage("import dask"):
        from wsiengine.graph import run_blocks

    (journal, recovered), place, listener = past, manner.place, manner.listener
    gathered = plan.task.gather(plan, recovered)
    work = plan.work[1]
    left = work & ~gathered.ran
    whole, done = int(np.count_nonzero(work)), int(np.count_nonzero(work & ~left))

    def so_far() -> dict[str, int]:
        """In tiles, whatever blocks are made of."""
        return {"done": done * plan.tile_count // whole, "total": plan.tile_count}

    if done:
        listener(Event("resume", so_far()))
    listener(Event("progress", so_far()))

    def record(blocks: Sequence[Any]) -> None:
        nonlocal done
        with watch.stage("journal"), journal.together():
            for block in blocks:
                plan.task.record(journal, block)
        begun()
        for block in blocks:
            gathered.add(block)
            done += int(np.count_nonzero(left[block.tiles.slices]))
        listener(Event("progress", so_far()))

    if left.any() and plan.job is not None:
        with watch.stage("run (wall)"):
            blocks, threads = blocks_of(left, plan.block_tiles), plan.options.worker_threads
            if plan.card.task == "classify" and plan.options.mode == "tiles":  # whose blocks may be cut anyhow
                blocks = tapered(blocks, 2 * threads)
            where: dict[str, Any] = {"threads": threads, "client": manner.client, "workers": place.workers}
            where["at_once"] = plan.blocks_at_once
            run_blocks(replace(plan.job, readers=place.readers), blocks, record, **where, spent=watch.add)
    return gathered


def _finish(
    who: tuple[Subject, Prepared],
    found: tuple[Gathered, np.ndarray],
    space: Workspace,
    manner: Manner,
    watch: Stopwatch,
) -> None:
    """Draft every result, then publish them together."""
    from wsiengine.finishing import make_annotations, summarise, write_annotations
    from wsiengine.report import draw_overlay
    from wsiengine.store import write_store

    (subject, prepared), (gathered, picture) = who, found
    plan, listener = prepared.plan, manner.listener
    areas = tuple((name, geometry.wkt) for name, geometry in subject.areas)
    with watch.stage("merge"):
        arrays = gathered.arrays()
    truth = replace(Truth.of(plan, arrays, subject.region), areas=areas)
    finish = Finish(plan.threshold, **asdict(manner.outputs))
    listener(Event("stage", {"name": "writing map, annotations and overlay"}))
    draft = space.draft()
    with watch.stage("map"):
        coded = truth.map()
        described = (truth.layout, plan.lattice)
        write_store(
            draft / "probability.zarr",
            coded,
            (truth.arrays, plan.analysed),
            described,
            store_facts(truth, subject, finish),
            plan.scratch,
        )
    with watch.stage("annotations"):
        annotations = make_annotations(truth, coded, finish)
        summary = summarise(truth, annotations) | _unreadable(plan, truth.ran, listener)
        write_annotations(truth, annotations, finish, draft)
    give_back_memory()
    with watch.stage("overlay"):
        title = f"{subject.card.name} {subject.card.version}"
        if "unreadable_tiles" in summary:
            title += f" · {unreadable_words(summary)}"
        path, known = draft / "overlay.png", subject.calibrated
        draw_overlay(subject.slide, annotations, path, title=title, picture=picture, calibrated=known)
    if subject.request.cam is not None:
        with watch.stage("attribution"):
            _attribute(subject, truth, draft, picture)
    if subject.calibrated:
        summary["tissue_mm2"] = round(plan.tissue_um2 / 1e6, 6)
    if summary.get("left_out"):
        listener(Event("warning", {"text": left_out_words(summary)}))
    for index, periods in enumerate(subject.runtime.at_work()):
        watch.lay(f"device {index}", DEVICE, periods)
    if watch.drawn:
        draw_profile(watch, draft / "profile.png")
        listener(Event("profile", {"lines": Profile.of(watch).lines(), **Profile.of(watch).facts()}))
    files = sorted([*(path.name for path in draft.iterdir()), "run.json"])
    facts = run_facts(who, finish, {"summary": summary, "files": files}, watch)
    (draft / "run.json").write_text(as_json(facts), encoding="utf-8")
    space.publish()


def _attribute(subject: Subject, truth: Truth, draft: Path, picture: np.ndarray) -> None:
    """The class-activation map of the class asked for, beside the other results."""
    from wsiengine.attribution import attribution_map, write_attribution

    name = str(subject.request.cam)
    values = attribution_map(truth, name, name)
    write_attribution(values, truth, name, draft, picture, cam_offset(subject.card))


def _unreadable(plan: Plan, ran: np.ndarray, listener: Listener) -> dict[str, int]:
    """For the summary: how many tiles a damaged slide kept to itself (``on_bad_tile="skip"``), if any.

    Raises:
        UnreadableSlide: Not one tile could be read.
    """
    count = int(np.count_nonzero(plan.wanted & ~ran))
    if count == plan.tile_count:
        raise UnreadableSlide("No tile of the slide could be read and scored.", hint="copy it again from its origin.")
    if not count:
        return {}
    words = f"{unreadable_words({'unreadable_tiles': count})}: there the map shows no result."
    listener(Event("warning", {"text": words}))
    return {"unreadable_tiles": count}
