"""Threads that score blocks, of one slide after the other without a gap between two.

Blocks are taken in order, a slide's before those of the next: :meth:`Workers.run` is called once per slide, from a
thread of that slide's own, which gets the finished blocks back and records them. So no worker waits for the disk, and
none stands idle at the end of a slide where another one is ready.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from wsiengine.grid import Block

BETWEEN = "between slides"  # the stage of a worker that has no block of the next slide yet
TOGETHER = 64  # finished blocks that are handed over, and recorded, at once
_MOST_THREADS = 1 << 10
_AHEAD = 2  # blocks per thread that may be under way or wait to be recorded


@dataclass(eq=False)
class Scoring:
    """The blocks of one slide, and how they are scored.

    Attributes:
        score: Finishes a block; called by any worker.
        blocks: Handed out in this order.
        working: The context of a thread that scores block after block, as
            :meth:`wsiengine.models.runtime.Runtime.working` gives it; left where the next block has another one.
        spent: Told by the worker, after each block, what it took by stage.
        at_once: Blocks under way at most; None: as many as there are threads.
    """

    score: Callable[[Block], Any]
    blocks: Iterator[Block]
    working: Callable[[], AbstractContextManager[None]]
    spent: Callable[[Mapping[str, float]], None]
    at_once: int | None = None
    number: int = 0  # of the slide, from 1
    left: bool = True  # there may be blocks that nobody has taken
    under_way: int = 0
    finished: list[Any] = field(default_factory=list)
    recording: int = 0  # handed over, and not yet recorded

    @property
    def waiting(self) -> int:
        """Blocks that are begun and not recorded."""
        return self.under_way + len(self.finished) + self.recording

    error: BaseException | None = None


class Workers:
    """A context manager: ``threads`` threads, which end with it after the blocks that they have begun."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._changed = threading.Condition()
        self._slides: list[Scoring] = []
        self._count = 0
        self._stopped = False
        self._pool = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="wsiengine")

    def __enter__(self) -> "Workers":
        for _ in range(self._threads):
            self._pool.submit(self._work)
        return self

    def grow(self, threads: int) -> None:
        """Have at least so many threads, unless they were stopped."""
        with self._changed:
            if self._stopped:
                return
            for _ in range(self._threads, threads):
                self._pool.submit(self._work)
            self._threads = max(self._threads, threads)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._pool.shutdown()

    @property
    def stopped(self) -> bool:
        """Whether no further block will be begun."""
        return self._stopped

    def run(self, scoring: Scoring, done: Callable[[Sequence[Any]], None]) -> None:
        """Score a slide's blocks and call ``done`` with those that are finished in this thread, as soon as one is.

        Whatever ends the run, no further block is begun, and those under way are finished and handed over.

        Raises:
            Exception: What scoring a block raised, after the blocks that went well; or what ``done`` raised.
            CancelledError: The workers were stopped before the last block.
        """
        with self._changed:
            self._count += 1
            scoring.number = self._count
            self._slides.append(scoring)
            self._changed.notify_all()
        try:
            self._hand_over(scoring, done)
        finally:
            try:
                with self._changed:
                    scoring.left = False
                self._hand_over(scoring, done)
            finally:
                with self._changed:
                    self._slides.remove(scoring)

    def _hand_over(self, scoring: Scoring, done: Callable[[Sequence[Any]], None]) -> None:
        while results := self._finished(scoring):
            done(results)

    def _finished(self, scoring: Scoring) -> Sequence[Any]:
        """The finished blocks, as soon as there is one; none after the last."""
        with self._changed:
            scoring.recording = 0
            self._changed.notify_all()  # there is room for more
            while not scoring.finished and (scoring.under_way or (scoring.left and not self._stopped)):
                self._changed.wait()
            if scoring.finished:
                results, scoring.finished = tuple(scoring.finished[:TOGETHER]), scoring.finished[TOGETHER:]
                scoring.recording = len(results)
                return results
            error, scoring.error = scoring.error, None
            if error is not None:
                raise error
            if scoring.left:
                raise CancelledError("the run was stopped")
            return ()

    def _work(self) -> None:
        """One thread: block after block, whosesoever they are."""
        newest = 0  # of the slides that this thread has seen
        working: Any = None  # what is entered, if anything
        with ExitStack() as entered:
            while True:
                since = time.perf_counter()
                taken = self._take()
                if taken is None:
                    entered.close()  # a batch must not wait for tiles that may never come
                    working = None
                    taken = self._take(wait=True)
                    if taken is None:
                        return
                scoring, block = taken
                if scoring.working != working:
                    entered.close()
                    entered.enter_context(scoring.working())
                    working = scoring.working
                if 0 < newest < scoring.number:
                    scoring.spent({BETWEEN: time.perf_counter() - since})
                newest = max(newest, scoring.number)
                self._score(scoring, block)

    def _take(self, *, wait: bool = False) -> tuple[Scoring, Block] | None:
        """The next block of the first slide that has one; without ``wait`` None where there is none just now."""
        with self._changed:
            while not self._stopped:
                for scoring in self._slides:
                    if scoring.left and self._room(scoring):
                        try:
                            block = next(scoring.blocks, None)
                        except Exception as error:
                            block, scoring.error = None, error
                        if block is not None:
                            scoring.under_way += 1
                            return scoring, block
                        scoring.left = False
                        self._changed.notify_all()
                if not wait:
                    return None
                self._changed.wait()
            return None

    def _room(self, scoring: Scoring) -> bool:
        """Whether another of its blocks may be begun."""
        return scoring.under_way < (scoring.at_once or self._threads) and scoring.waiting < _AHEAD * self._threads

    def _score(self, scoring: Scoring, block: Block) -> None:
        result, failed = None, None
        try:
            result = scoring.score(block)
            scoring.spent(result.seconds)
        except BaseException as error:  # it belongs to the slide, whose own thread raises it
            failed = error
        with self._changed:
            scoring.under_way -= 1
            if failed is None:
                scoring.finished.append(result)
            else:
                scoring.error = scoring.error or failed
                scoring.left = False
            self._changed.notify_all()


def nothing_told(seconds: Mapping[str, float]) -> None:
    """A listener to times that ignores them."""
