"""Threads that share work: who has no block of a slide left takes pieces of those that others are at.

Blocks are large, so that few pixels are read twice, and there are few of them: at the end of a slide, and on a small
one all along, some threads would stand idle while others run their last block.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class _Share:
    """Work that any thread may take: ``do`` of each of the ``items``, in any order."""

    do: Callable[[Any], None]
    items: deque[Any]
    left: int
    error: BaseException | None = None


class Team:
    """Thread-safe. What is shared must not depend on who does it, nor in which order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: list[_Share] = []
        self._busy = 0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While a thread has work that it may share: helpers stay for it."""
        with self._changed:
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    @contextmanager
    def working(self) -> Iterator[None]:
        """For a thread that does block after block: at the end it helps the others until they have done theirs."""
        yield
        self._help()

    def each(self, do: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Call ``do`` with each item, here and in threads that help.

        Raises:
            Exception: The first that ``do`` raised; items that nobody has begun are left out.
        """
        waiting = deque(items)
        share = _Share(do, waiting, len(waiting))
        with self._changed:
            self._open.append(share)
            self._changed.notify_all()
        try:
            while self._one(share):
                pass
            with self._changed:
                self._changed.wait_for(lambda: not share.left)
        finally:
            with self._changed:
                self._open.remove(share)
        if share.error is not None:
            raise share.error

    def _one(self, share: _Share) -> bool:
        """Do one item of ``share``; False where none is left."""
        with self._changed:
            if not share.items:
                return False
            item = share.items.popleft()
        done = 1
        try:
            share.do(item)
        except BaseException as error:  # it belongs to the thread whose work this is, which raises it
            with self._changed:
                share.error = share.error or error
                done += len(share.items)
                share.items.clear()
        with self._changed:
            share.left -= done
            self._changed.notify_all()
        return True

    def _help(self) -> None:
        while True:
            with self._changed:
                while not (ready := [share for share in self._open if share.items]):
                    if not self._busy:
                        return
                    self._changed.wait()
            self._one(ready[0])
