"""What a run tells while it goes on: plain events, drawn by whoever listens (a bar, lines, JSON)."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """What has happened.

    ``kind``: start, terms, plan, warning, note, resume, progress, stage, result or summary. ``data``: JSON, but a plan.
    """

    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """A listener that ignores everything."""


class Stopwatch:
    """Seconds spent per stage; stages of worker threads add up (thread-seconds). Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = defaultdict(float)
        self._started = time.perf_counter()

    def add(self, seconds: Mapping[str, float]) -> None:
        with self._lock:
            for stage, spent in seconds.items():
                self._seconds[stage] += spent

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
    def wall_s(self) -> float:
        return round(time.perf_counter() - self._started, 4)
