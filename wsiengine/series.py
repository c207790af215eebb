"""Several slides in one call: while the blocks of one are scored, the next is opened and its tissue found.

Each slide runs as it would alone, on a thread of its own, but all hand their blocks to the same worker threads. These
go on with the next slide's blocks once those of the slide before are all taken, while its map and regions are made. At
most two slides are held at once.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from wsiengine.errors import PlanError
from wsiengine.events import Event
from wsiengine.identifying import Request
from wsiengine.inference import Manner, Outputs, run
from wsiengine.machine import usable_cores
from wsiengine.naming import default_folder
from wsiengine.place import Place
from wsiengine.result import Result
from wsiengine.workers import Workers

SlideListener = Callable[[int, Event], None]


def _unheard(number: int, event: Event) -> None:
    pass


def infer_many(
    slides: Sequence[str | os.PathLike[str]],
    model: str = "crc5",
    folders: Sequence[str | os.PathLike[str]] | None = None,
    *,
    listener: SlideListener = _unheard,
    overwrite: bool = False,
    outputs: Outputs | None = None,
    profile: bool = False,
    **options: Any,
) -> Generator[Result | Exception, None, None]:
    """Run a model over slides, as :func:`wsiengine.infer` does over each, without a gap between two.

    Args:
        slides: Their paths.
        model: Name or path of a model.
        folders: One for the results of each; by default ``<slide name>.wsiengine`` in the working directory.
        listener: Called with a slide's number, from 0, and an :class:`~wsiengine.events.Event` at every step, from
            several threads: events of two slides come in between each other (:class:`wsiengine.events.InTurn`
            puts them in order).
        overwrite, outputs, profile, **options: As for :func:`wsiengine.infer`; the same for all slides.

    Yields:
        For each slide, in order, its result, or the error that ended it: the others go on.

    Raises:
        ValueError: There are not as many folders as slides.
        PlanError: A ``client`` was given.
    """
    if options.pop("client", None) is not None:
        raise PlanError("infer_many was given a client, whose workers score one slide at a time.", hint="infer().")
    wanted = [default_folder(os.fspath(slide)) for slide in slides] if folders is None else folders
    if len(wanted) != len(slides):
        raise ValueError(f"{len(slides)} slides need as many folders, not {len(wanted)}")
    how = {**options, "model": model}
    manner = Manner(overwrite, outputs=outputs or Outputs(), profile=profile)
    threads = options.get("threads") or usable_cores()
    # The workers end first: slides that wait for their blocks then end, too.
    with ThreadPoolExecutor(2, "wsiengine-slide") as pool, Workers(threads) as workers:
        running: deque[tuple[Place, Future[Result]]] = deque()
        for number, (slide, folder) in enumerate(zip(slides, map(Path, wanted), strict=True)):
            before = running[-1][0] if running else None
            if before is not None:
                before.begun.wait()
            place = Place(workers, before)
            listener(number, Event("start", {"slide": os.fspath(slide), "output": str(folder)}))
            own = replace(manner, place=place, listener=partial(listener, number))
            running.append((place, pool.submit(_one, (slide, folder), own, how)))
            if before is not None:
                yield _outcome(running.popleft()[1])
        for _, future in running:
            yield _outcome(future)


def _one(paths: tuple[str | os.PathLike[str], Path], manner: Manner, how: dict[str, Any]) -> Result:
    slide, folder = paths
    try:
        return run(Request(slide=slide, **how), folder, manner)
    finally:
        manner.place.end()


def _outcome(future: "Future[Result]") -> Result | Exception:
    """The result, or the slide's own error.

    Raises:
        BrokenPipeError: Not the slide's fault: nobody listens any more.
    """
    try:
        return future.result()
    except (BrokenPipeError, CancelledError):
        raise
    except Exception as error:  # whatever ended this slide must not stop the others
        return error
