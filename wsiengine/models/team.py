"""Threads that share work: where fewer threads run blocks than there may be, others take pieces of those blocks.

Blocks are large, so that few pixels are read twice, and there are few of them: at the end of a slide, and on a small
one all along, threads would stand idle while others run their last block.
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
        self._busy = 0  # threads with work of their own
        self._helping = 0
        self._most: list[int] = []  # threads at once, of each run under way
        self._helpers: list[threading.Thread] = []

    @contextmanager
    def helped(self, threads: int) -> Iterator[None]:
        """While it is open, helpers join threads that are :meth:`busy`: ``threads`` of both together at most."""
        with self._changed:
            self._most.append(threads)
            while len(self._helpers) < threads - 1:
                name = f"wsiengine-helper-{len(self._helpers)}"
                self._helpers.append(threading.Thread(target=self._help, name=name, daemon=True))
                self._helpers[-1].start()
        ended: list[threading.Thread] = []
        try:
            yield
        finally:
            with self._changed:
                self._most.remove(threads)
                if not self._most:
                    ended, self._helpers = self._helpers, []
                self._changed.notify_all()
            for thread in ended:
                thread.join()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While a thread does work of its own, whatever it shares of it."""
        with self._changed:
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def each(self, do: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Call ``do`` with each item, here and in helpers.

        Raises:
            Exception: The first that ``do`` raised; items that nobody has begun are left out.
        """
        waiting = deque(items)
        share = _Share(do, waiting, len(waiting))
        with self._changed:
            self._open.append(share)
            self._changed.notify_all()
        try:
            while (item := self._next(share)) is not None:
                self._do(share, item)
            with self._changed:
                self._changed.wait_for(lambda: not share.left)
        finally:
            with self._changed:
                self._open.remove(share)
        if share.error is not None:
            raise share.error

    def _next(self, share: _Share) -> Any:
        with self._changed:
            return share.items.popleft() if share.items else None

    def _do(self, share: _Share, item: Any) -> None:
        failed = None
        try:
            share.do(item)
        except BaseException as error:  # it belongs to the thread whose work this is, which raises it
            failed = error
        with self._changed:
            share.left -= 1
            if failed is not None:
                share.error = share.error or failed
                share.left -= len(share.items)
                share.items.clear()
            self._changed.notify_all()

    def _help(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                while True:
                    if me not in self._helpers:
                        return
                    ready = [share for share in self._open if share.items]
                    if ready and self._busy + self._helping < max(self._most):
                        break
                    self._changed.wait()
                self._helping += 1
                item = ready[0].items.popleft()
            self._do(ready[0], item)
            with self._changed:
                self._helping -= 1
                self._changed.notify_all()
