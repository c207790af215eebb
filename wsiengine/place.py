"""A slide's place among those of one call: what it shares with them, and when it waits for the one before."""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace

from wsiengine.errors import MemoryLimitError
from wsiengine.footprint import finding_bytes, held_bytes
from wsiengine.identifying import Subject
from wsiengine.planning import Plan
from wsiengine.preparing import Prepared
from wsiengine.readers import Readers
from wsiengine.workers import Workers


@dataclass(eq=False)
class Place:
    """Of a slide that runs beside the one before it, where memory allows both.

    Attributes:
        workers: Threads that all slides share; None for threads of its own.
        before: The place of the slide before, while that runs.
        begun: Set once this slide's first block is done, or the slide has ended: the next one may begin. Before, its
            imports and its tissue would keep the first block waiting.
        ended: Set once this slide has ended, well or not.
        readers: Processes that read its blocks, where it has any.
        plan: This slide's, once it is made and until the slide has ended.
    """

    workers: Workers | None = None
    before: "Place | None" = None
    begun: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    readers: Readers | None = None
    plan: Plan | None = None

    def prepare(self, subject: Subject, make: Callable[[Subject], Prepared]) -> Prepared:
        """What ``make`` makes of the subject: beside the slide before or, where memory has no room for both, after it.

        Raises:
            CancelledError: The call has been given up.
        """
        self._refuse_stopped()
        neighbour = self._neighbour()
        if neighbour is not None and not _fits_beside(subject, neighbour):
            neighbour = None
            self._wait()
        try:
            prepared = make(_beside(subject, neighbour))
        except MemoryLimitError:
            if neighbour is None:
                raise
            self._wait()
            prepared = make(subject)
        self.before = None  # its plan need not be kept any longer
        self.plan = prepared.plan
        return prepared

    def end(self) -> None:
        """This slide has ended."""
        self.plan = None
        self.ended.set()
        self.begun.set()

    def _neighbour(self) -> Plan | None:
        """The plan of the slide before, if that still runs."""
        return None if self.before is None or self.before.ended.is_set() else self.before.plan

    def _wait(self) -> None:
        """Until the slide before has ended."""
        if self.before is not None:
            self.before.ended.wait()
        self._refuse_stopped()

    def _refuse_stopped(self) -> None:
        if self.workers is not None and self.workers.stopped:
            raise CancelledError("the run was stopped")


def _beside(subject: Subject, neighbour: Plan | None) -> Subject:
    """The subject, whose plan will count what the neighbour holds, and have the same processes that read."""
    if neighbour is None:
        return subject
    held, readers = held_bytes(neighbour), neighbour.options.readers
    return replace(subject, request=replace(subject.request, beside_bytes=held, readers=readers))


def _fits_beside(subject: Subject, neighbour: Plan) -> bool:
    """Whether the tissue can be found while the slide before is scored."""
    limit = neighbour.options.memory_limit_bytes
    return limit is None or neighbour.peak_bytes + finding_bytes(subject.grid.lattice, neighbour.scratch) <= limit
