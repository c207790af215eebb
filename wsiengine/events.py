"""What a run tells while it goes on: plain events, drawn by whoever listens (a bar, lines, JSON)."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """What has happened.

    ``kind``: start, terms, plan, warning, note, resume, progress, stage, profile,
    result or summary. ``data``: JSON, but a plan.
    """

    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]
_MOST_SPANS = 200_000  # a picture shows no more; 20 MB


def silent(event: Event) -> None:
    """A listener that ignores everything."""


class InTurn:
    """Events of several slides, handed on as if they ran one after the other. Thread-safe.

    Args:
        listener: Gets the events of the slide whose turn it is; those of later ones wait, of their progress the latest.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._lock = threading.RLock()
        self._turn = 0
        self._waiting: dict[int, list[Event]] = defaultdict(list)

    def __call__(self, number: int, event: Event) -> None:
        """Take an event of slide ``number``, counted from 0."""
        with self._lock:
            if number == self._turn:
                self._listener(event)
                return
            waiting = self._waiting[number]
            if event.kind == "progress":
                waiting[:] = [earlier for earlier in waiting if earlier.kind != "progress"]
            waiting.append(event)

    def next(self) -> None:
        """The slide whose turn it was has ended."""
        with self._lock:
            self._turn += 1
            for event in self._waiting.pop(self._turn, []):
                self._listener(event)


@dataclass(frozen=True, slots=True)
class Span:
    """What a thread (``lane``) did from ``start_s`` to ``stop_s``, counted from the start of the run."""

    lane: str
    stage: str
    start_s: float
    stop_s: float


class Stopwatch:
    """Seconds spent per stage, and when; stages of worker threads add up (thread-seconds). Thread-safe."""

    def __init__(self, *, drawn: bool = False) -> None:
        self.drawn = drawn  # somebody wants to see the timeline
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = defaultdict(float)
        self._started = time.perf_counter()
        self._spans: list[Span] = []

    def add(self, seconds: Mapping[str, float]) -> None:
        """Take stages that have just ended on this thread, one after the other."""
        lane, stop = threading.current_thread().name, time.perf_counter() - self._started
        with self._lock:
            for stage, spent in seconds.items():
                self._seconds[stage] += spent
            for stage, spent in reversed(list(seconds.items())):
                if len(self._spans) < _MOST_SPANS:
                    self._spans.append(Span(lane, stage, stop - spent, stop))
                stop -= spent

    def lay(self, lane: str, stage: str, periods: Iterable[tuple[float, float]]) -> None:
        """Take what slides share: when it began and ended by ``time.perf_counter``, since this watch was started."""
        with self._lock:
            since = [(start - self._started, stop - self._started) for start, stop in periods if stop > self._started]
            room = max(0, _MOST_SPANS - len(self._spans))
            self._spans += [Span(lane, stage, max(start, 0.0), stop) for start, stop in since[:room]]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add({name: time.perf_counter() - started})

    @property
    def stages_s(self) -> dict[str, float]:
        with self._lock:
            return {stage: round(spent, 4) for stage, spent in self._seconds.items()}

    @property
    def spans(self) -> list[Span]:
        """All so far, the latest last."""
        with self._lock:
            return sorted(self._spans, key=lambda span: span.stop_s)

    @property
    def wall_s(self) -> float:
        return round(time.perf_counter() - self._started, 4)
