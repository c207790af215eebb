"""Where a run's time went: numbers for ``run.json``, lines for a person, and a picture of the timeline.

The model is busy while a worker thread is inside it. What it waits for shows in the picture: the threads' other stages,
and the gaps between them. A GPU, which threads share, is busy while a batch of theirs is under way, and has a bar of
its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsiengine.errors import OutputError
from wsiengine.events import Span, Stopwatch
from wsiengine.workers import BETWEEN

RUN = "run (wall)"  # the stage that holds all blocks
MODEL = "model"
DEVICE = "device"  # a session of a GPU at work
_BINS = 200  # of the curve
_COLOURS = {
    "open": (170, 170, 170),
    "tissue": (86, 180, 233),
    "stain fit": (0, 114, 178),
    "read": (230, 159, 0),
    "normalise": (204, 121, 167),
    MODEL: (0, 158, 115),
    DEVICE: (0, 110, 80),
    "journal": (213, 94, 0),
    "merge": (120, 180, 60),
    "map": (240, 228, 66),
    "annotations": (153, 0, 51),
    "overlay": (90, 90, 160),
    "import dask": (214, 214, 150),
    "picture (wait)": (120, 190, 200),
    BETWEEN: (225, 200, 200),
}
_OTHER = (120, 120, 120)
_INK, _MUTED = (34, 34, 34), (110, 110, 110)


@dataclass(frozen=True, slots=True)
class Profile:
    """Of one run.

    Attributes:
        wall_s: From its start to its last stage.
        stages_s: Seconds per stage; those of worker threads add up.
        first_tile_s: From the start until the model began on the first block; None where no block was left to run.
        workers: Threads (or workers) that scored blocks.
        model_busy: Share of the blocks' wall time that a worker spent inside the model, on average; 0…1.
        depth: Blocks under way at once, on average: read, in the model, or being recorded.
        device_busy: Share of the blocks' wall time in which a GPU had a batch under way, the mean of all; None without.
    """

    wall_s: float
    stages_s: Mapping[str, float]
    first_tile_s: float | None
    workers: int
    model_busy: float
    depth: float
    device_busy: float | None = None

    @classmethod
    def of(cls, watch: Stopwatch) -> "Profile":
        spans = watch.spans
        run = [span for span in spans if span.stage == RUN]
        blocks = [span for span in spans if span.stage in ("read", "normalise", MODEL, "journal")]
        model = [span for span in spans if span.stage == MODEL]
        workers = len({span.lane for span in model})
        begun = min((span.start_s for span in blocks), default=0.0)  # after those of the slide before
        wall = sum(span.stop_s - max(span.start_s, begun) for span in run)
        busy, under_way = (sum(s.stop_s - s.start_s for s in of) / wall if wall else 0.0 for of in (model, blocks))
        first = min((span.start_s for span in model), default=None)
        devices = {span.lane for span in spans if span.stage == DEVICE}
        end = max((span.stop_s for span in run), default=begun)
        at_work = (min(s.stop_s, end) - max(s.start_s, begun) for s in spans if s.stage == DEVICE)
        device = sum(max(s, 0.0) for s in at_work) / wall / len(devices) if devices and wall else None
        return cls(watch.wall_s, watch.stages_s, first, workers, busy / max(workers, 1), under_way, device)

    def facts(self) -> dict[str, Any]:
        """As JSON, for ``run.json``."""
        first = None if self.first_tile_s is None else round(self.first_tile_s, 4)
        return {
            "wall_s": self.wall_s,
            "stages_s": dict(self.stages_s),
            "first_tile_s": first,
            "workers": self.workers,
            "model_busy": round(self.model_busy, 4),
            "blocks_under_way": round(self.depth, 2),
            **({} if self.device_busy is None else {"device_busy": round(self.device_busy, 4)}),
        }

    def lines(self) -> list[str]:
        """A table for a person."""
        workers = f"{self.workers} thread{'s' if self.workers != 1 else ''}"
        rows = [f"{'stage':<14}{'seconds':>9}   of the wall time"]
        for stage, spent in self.stages_s.items():
            share = f"{100 * spent / max(self.wall_s, 1e-9):5.1f} %"
            rows.append(f"{stage:<14}{spent:9.2f}   {share}" + (f" (of {workers})" if stage == MODEL else ""))
        rows.append(f"{'whole run':<14}{self.wall_s:9.2f}")
        if self.first_tile_s is not None:
            what, busy = ("model", self.model_busy) if self.device_busy is None else (DEVICE, self.device_busy)
            idle = f"the {what} idle {100 * (1 - busy):.1f} % of the blocks' time"
            rows.append(f"first tile after {self.first_tile_s:.2f} s · {idle}")
        return rows


def busy_curve(spans: Iterable[Span], wall_s: float, workers: int, stage: str = MODEL) -> np.ndarray:
    """Share of the workers (or devices) that were in ``stage`` in each of ``_BINS`` parts of the run, 0…1."""
    edges = np.linspace(0, max(wall_s, 1e-9), _BINS + 1)
    total = np.zeros(_BINS)
    for span in spans:
        if span.stage == stage:
            total += np.clip(np.minimum(span.stop_s, edges[1:]) - np.maximum(span.start_s, edges[:-1]), 0, None)
    return np.clip(total / (edges[1] - edges[0]) / max(workers, 1), 0, 1)


def draw_profile(watch: Stopwatch, path: Path) -> None:
    """Write a PNG: a bar per thread in the colours of its stages, and below how busy the model was.

    Raises:
        OutputError: The file cannot be written.
    """
    import cv2

    profile, spans = Profile.of(watch), watch.spans
    lanes = _lanes(spans)
    left, top, bar, width = 150, 70, 34, 1200
    height = top + bar * len(lanes) + 260
    page = np.full((height, left + width + 40, 3), 255, np.uint8)
    px_per_s = width / max(profile.wall_s, 1e-9)
    _write(page, "Where the time went", (34, 20), 22, _INK)
    for row, (lane, name) in enumerate(lanes.items()):
        y = top + row * bar
        _write(page, name, (y + 20, 20), 16, _INK)
        for span in spans:
            if span.lane == lane and span.stage != RUN:
                x0, x1 = (left + int(s * px_per_s) for s in (span.start_s, span.stop_s))
                cv2.rectangle(page, (x0, y + 4), (max(x1, x0 + 1), y + bar - 4), _colour(span.stage), cv2.FILLED)
    base = top + bar * len(lanes) + 110
    devices = sum(name.startswith(DEVICE) for name in lanes.values())
    stage, many = (DEVICE, devices) if devices else (MODEL, profile.workers)
    _draw_curve(page, busy_curve(spans, profile.wall_s, many, stage), (base, left, width))
    _write(page, f"{stage} busy", (base - 40, 20), 16, _INK)
    for tick in _ticks(profile.wall_s):
        x = left + int(tick * px_per_s)
        cv2.line(page, (x, top - 6), (x, base), (225, 225, 225), 1)
        _write(page, f"{tick:g} s", (base + 22, x - 10), 14, _MUTED)
    _draw_legend(page, [stage for stage in profile.stages_s if stage != RUN], (base + 60, left))
    if profile.first_tile_s is not None:
        _write(page, profile.lines()[-1], (base + 130, left), 16, _INK)
    try:
        path.write_bytes(cv2.imencode(".png", page[..., ::-1])[1].tobytes())
    except OSError as error:
        raise OutputError(
            f"Could not write {path.name}: {error.strerror or error}.", hint="room on the disk."
        ) from error


def _lanes(spans: Sequence[Span]) -> dict[str, str]:
    """Threads in order of appearance, with names for people; devices last."""
    by_start = sorted(spans, key=lambda span: span.start_s)
    devices = sorted({span.lane for span in spans if span.stage == DEVICE})
    names = dict.fromkeys(span.lane for span in by_start if span.lane not in devices)
    workers = [name for name in names if any(s.lane == name and s.stage == MODEL for s in spans)]
    threads = {name: f"thread {workers.index(name) + 1}" if name in workers else "main" for name in names}
    return threads | dict(zip(devices, devices, strict=True))


def _draw_curve(page: np.ndarray, curve: np.ndarray, where: tuple[int, int, int]) -> None:
    import cv2

    base, left, width = where
    x = left + (np.arange(len(curve)) + 0.5) * width / len(curve)
    line = np.stack([x, base - 80 * curve], axis=1).round().astype(np.int32)
    outline = np.concatenate([[[left, base]], line, [[left + width, base]]]).astype(np.int32)
    cv2.fillPoly(page, [outline], (205, 236, 225))
    cv2.polylines(page, [line], False, _COLOURS[MODEL], 2, cv2.LINE_AA)
    cv2.line(page, (left, base), (left + width, base), (110, 110, 110), 1)


def _draw_legend(page: np.ndarray, stages: Sequence[str], where: tuple[int, int]) -> None:
    import cv2

    (y, left), right = where, page.shape[1] - 40
    x = left
    for stage in stages:
        wide = 40 + 9 * len(stage)
        if x + wide > right and x > left:
            y, x = y + 24, left
        cv2.rectangle(page, (x, y - 13), (x + 14, y + 1), _colour(stage), cv2.FILLED)
        _write(page, stage, (y, x + 20), 15, _INK)
        x += wide


def _write(page: np.ndarray, text: str, at: tuple[int, int], size: int, colour: tuple[int, int, int]) -> None:
    """One line of text, its baseline beginning at (y, x)."""
    import cv2

    cv2.putText(page, text, (at[1], at[0]), colour, cv2.FontFace("uni"), size, 400)


def _colour(stage: str) -> tuple[int, int, int]:
    return _COLOURS.get(stage, _OTHER)


def _ticks(wall_s: float) -> list[float]:
    """Round numbers of seconds, about ten."""
    power = 10.0 ** np.floor(np.log10(max(wall_s, 1e-3) / 5))
    step = next(float(m * power) for m in (1, 2, 5, 10) if wall_s / (m * power) <= 12)
    return [round(k * step, 6) for k in range(int(wall_s / step) + 1)]
