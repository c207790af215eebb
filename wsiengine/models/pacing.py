"""How fast a model runs in each way that this machine has: alone, on drawn tiles, from as many threads as in a run.

For ``wsiengine doctor --speed MODEL``. What a run adds (reading, packing, files) is told by ``infer --profile``.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from wsiengine.errors import DependencyError, ModelError, ProviderError
from wsiengine.machine import usable_cores
from wsiengine.models.card import Card
from wsiengine.models.comparing import DEVICES
from wsiengine.models.precision import REFERENCE
from wsiengine.models.probe import column, drawn_tiles
from wsiengine.models.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Pace:
    """One way of running the model.

    Attributes:
        device: As ``--device`` names it.
        precision: As ``--precision`` names it.
        chosen: In words, what ran it; where it is missing, why.
        tiles_per_s: None where it is missing.
        faithful: Its number format is one that ``--precision auto`` may pick.
    """

    device: str
    precision: str
    chosen: str
    tiles_per_s: float | None
    faithful: bool


def paces(card: Card, *, seconds: float = 2.0, threads: int | None = None) -> Iterator[Pace]:
    """Each way in turn, ``seconds`` long, once its memory is warm; from ``threads`` threads (default: one per core).

    Raises:
        ModelError: The model cannot be run on the CPU.
    """
    threads = threads or usable_cores()
    for device in DEVICES:
        for precision in (REFERENCE, *card.variants):
            faithful = precision == REFERENCE or card.variants[precision].faithful
            if (device, precision) == ("cpu", "fp16"):
                yield Pace(device, precision, "missing: a CPU would compute it in float32", None, faithful)
                continue
            try:
                runtime = Runtime(card.at(precision), device=device)
            except (ProviderError, DependencyError) as error:
                yield Pace(device, precision, f"missing: {error.message}", None, faithful)
                continue
            except ModelError as error:
                if device == "cpu":
                    raise
                yield Pace(device, precision, f"missing: {error.message}", None, faithful)
                continue
            yield Pace(device, precision, runtime.chosen, _tiles_per_s(runtime, seconds, threads), faithful)


def fastest(found: list[Pace]) -> Pace | None:
    """Among those that give the model's answers."""
    ran = [one for one in found if one.tiles_per_s and one.faithful]
    return max(ran, key=lambda one: one.tiles_per_s or 0.0, default=None)


def _tiles_per_s(runtime: Runtime, seconds: float, threads: int) -> float:
    score, tiles = _scoring(runtime)

    def work(until_s: float) -> tuple[int, float]:
        done = 0
        with runtime.working():
            while not done or time.perf_counter() < until_s:
                score()
                done += tiles
        return done, time.perf_counter()

    with ThreadPoolExecutor(threads, "wsiengine-pace") as pool:
        list(pool.map(work, [0.0] * threads))  # whatever is made at first is made now
        start = time.perf_counter()
        # Each thread's own pace: they do not end together, and nobody's wait for the last counts.
        return sum(done / (stop - start) for done, stop in pool.map(work, [start + seconds] * threads))


def _scoring(runtime: Runtime) -> tuple[Callable[[], None], int]:
    """What one thread does again and again, and how many tiles that are."""
    spec = runtime.card.input
    pixels, corners = column(drawn_tiles(spec.size_px))
    if spec.deep:
        pixels = pixels[..., :1].astype(np.uint16) * 257
    if runtime.card.task == "classify":
        corners = np.resize(corners, (max(len(corners), runtime.batch_size), 2))

    def score() -> None:
        if runtime.card.task == "classify":
            runtime.scores(pixels, corners)
        else:
            deque(runtime.outputs(pixels, corners), maxlen=0)

    return score, len(corners)
