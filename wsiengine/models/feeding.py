"""Batches of one fixed shape, filled across blocks: for devices that idle through whatever a batch leaves empty.

Worker threads reserve places in the batch that is being filled, in the order in which they come, and pack their tiles
there side by side. Who completes a batch runs it; meanwhile the others fill the next. A batch that is not full is run
when every worker waits for its scores, so that nothing is ever decided by a clock. Several sessions (one per device)
take batches as they become free. Rows that no tile fills keep what was there before: every row is computed by itself.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

AHEAD = 6  # batches per session: those under way, and some that threads fill meanwhile
_MOST_PERIODS = 100_000  # kept for each session: 10 MB
UNDER_WAY = 3  # of them at once: one is computed, one fetched or uploaded; more would take the device's memory


class Slot(Protocol):
    """Memory for one batch, bound to a session."""

    batch: np.ndarray

    def run(self) -> np.ndarray:
        """Scores of all rows: (batch size, channels) float32."""


@dataclass(eq=False)
class _Ticket:
    """What one caller waits for."""

    scores: np.ndarray
    left: int
    changed: threading.Condition
    error: Exception | None = None


@dataclass(eq=False)
class _Batch:
    slot: Slot
    reserved: int = 0
    packed: int = 0
    closed: bool = False
    parts: list[tuple[_Ticket, int, int, int]] = field(default_factory=list)  # ticket, its row, our row, rows


class Feeder:
    """Thread-safe.

    Args:
        slots: For each session its slots, :data:`AHEAD` of them.
        pack: ``(pixels, origins, rows of a batch)``: writes tiles.
        channels: Columns of the scores.
    """

    def __init__(
        self,
        slots: Sequence[Sequence[Slot]],
        pack: Callable[[np.ndarray, np.ndarray, np.ndarray], Any],
        channels: int,
    ) -> None:
        self._free = [list(own) for own in slots]
        self._home = {id(slot): index for index, own in enumerate(slots) for slot in own}
        self._pack, self._channels = pack, channels
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)  # there may be places in a batch; one is woken, and wakes the next
        self._tickets: set[_Ticket] = set()  # that are waited for, and not done
        self._filling: _Batch | None = None
        self._workers = 0
        self._facts = {"batches": 0, "tiles": 0, "rows": 0, "busy_s": 0.0}
        self._turns = [threading.Semaphore(UNDER_WAY) for _ in slots]
        self._under_way = [0] * len(slots)  # batches of each session
        self._since = [0.0] * len(slots)  # when the first of them began
        self._periods: list[deque[tuple[float, float]]] = [deque(maxlen=_MOST_PERIODS) for _ in slots]

    @contextmanager
    def worker(self) -> Iterator[None]:
        """While it lasts, this thread is one that more tiles may come from."""
        with self._lock:
            self._workers += 1
        try:
            yield
        finally:
            with self._lock:
                self._workers -= 1
                for ticket in self._tickets:
                    ticket.changed.notify()

    def scores(self, pixels: np.ndarray, origins: np.ndarray) -> np.ndarray:
        """Scores of the tiles at ``origins`` (N, 2): (N, channels) float32. What packing or a batch met is raised."""
        scores = np.empty((len(origins), self._channels), np.float32)
        ticket = _Ticket(scores, len(origins), threading.Condition(self._lock))
        at = 0
        while at < len(origins):
            batch, first, count = self._reserve(ticket, at, len(origins) - at)
            try:
                self._pack(pixels, origins[at : at + count], batch.slot.batch[first : first + count])
            except Exception as error:  # ours, not of those who share the batch: it runs all the same
                ticket.error = error
            at += count
            with self._lock:
                batch.packed += count
                ready = batch.closed and batch.packed == batch.reserved
            if ready:
                self._run(batch)
        self._wait(ticket)
        if ticket.error is not None:
            raise ticket.error
        return ticket.scores

    def facts(self) -> dict[str, float]:
        """Batches run, tiles and rows in them, seconds that a session had at least one under way (the sum of all)."""
        with self._lock:
            return dict(self._facts)

    def periods(self) -> list[list[tuple[float, float]]]:
        """Of each session: when batches of it were under way, by ``time.perf_counter``; the latest of them."""
        with self._lock:
            return [list(own) for own in self._periods]

    def _reserve(self, ticket: _Ticket, at: int, wanted: int) -> tuple[_Batch, int, int]:
        """Places in the batch that is being filled: that batch, the first row, how many."""
        with self._lock:
            while self._filling is None:
                own = max(self._free, key=len)
                if own:
                    self._filling = _Batch(own.pop())
                else:
                    self._room.wait()
            batch, size = self._filling, len(self._filling.slot.batch)
            first, count = batch.reserved, min(wanted, size - batch.reserved)
            batch.reserved += count
            batch.parts.append((ticket, at, first, count))
            if batch.reserved == size:
                batch.closed, self._filling = True, None
            if self._filling is not None or any(self._free):
                self._room.notify()
            return batch, first, count

    def _wait(self, ticket: _Ticket) -> None:
        while True:
            with self._lock:
                self._tickets.add(ticket)
                try:
                    while ticket.left and not self._idle():
                        ticket.changed.wait()
                finally:
                    self._tickets.discard(ticket)
                if not ticket.left:
                    return
                batch, self._filling = self._filling, None
                assert batch is not None
                batch.closed = True
            self._run(batch)

    def _idle(self) -> bool:
        """Whether all wait, and what is there of the next batch must go."""
        batch = self._filling
        return len(self._tickets) >= self._workers and batch is not None and 0 < batch.packed == batch.reserved

    def _run(self, batch: _Batch) -> None:
        home = self._home[id(batch.slot)]
        scores, failed = None, None
        with self._at_work(home):
            try:
                scores = batch.slot.run()
            except Exception as error:  # whatever it is, it belongs to those who wait for these tiles
                failed = error
        with self._lock:
            for ticket, at, first, count in batch.parts:
                if scores is not None:
                    ticket.scores[at : at + count] = scores[first : first + count]
                ticket.error = ticket.error or failed
                ticket.left -= count
                if not ticket.left:
                    self._tickets.discard(ticket)  # its thread is about to bring more tiles
                    ticket.changed.notify()
            self._facts["batches"] += 1
            self._facts["tiles"] += batch.reserved
            self._facts["rows"] += len(batch.slot.batch)
            self._free[home].append(batch.slot)
            self._room.notify()

    @contextmanager
    def _at_work(self, home: int) -> Iterator[None]:
        """While it lasts, a batch of this session is under way."""
        with self._turns[home]:
            with self._lock:
                if not self._under_way[home]:
                    self._since[home] = time.perf_counter()
                self._under_way[home] += 1
            try:
                yield
            finally:
                with self._lock:
                    self._under_way[home] -= 1
                    if not self._under_way[home]:
                        began, ended = self._since[home], time.perf_counter()
                        self._facts["busy_s"] += ended - began
                        self._periods[home].append((began, ended))
