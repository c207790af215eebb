"""Faults at the n-th change of the file system, by Python's audit hooks, which see every open, rename and unlink.

Only changes below one folder count. Written data and syncs are not audited, so ``os.write``, ``os.fsync`` and
``os.fdatasync`` are wrapped. Audit hooks cannot be removed: use these in a child process, or switch them off.
"""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}  # an unlink is an os.remove
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class FaultAt:
    """Calls ``fault(name)`` instead of the ``number``-th change below ``root`` (from 0); counts on regardless.

    A fault that raises ``OSError`` makes that call fail; one that ends the process is a crash just before it.
    """

    def __init__(self, root: Path, number: int, fault: Callable[[str], None], *, lasting: bool = False) -> None:
        self.seen: list[str] = []
        self._root = os.fspath(root)
        self._number = number
        self._fault = fault
        self._lasting = lasting  # the disk stays full
        self._on = False
        sys.addaudithook(self._audit)

    def __enter__(self) -> "FaultAt":
        self._originals = {name: getattr(os, name) for name in ("write", "fsync", "fdatasync")}
        for name, original in self._originals.items():
            setattr(os, name, self._wrapped(name, original))
        self._on = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._on = False
        for name, original in self._originals.items():
            setattr(os, name, original)

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *args: Any) -> Any:
            self._count(name, Path(f"/proc/self/fd/{fd}").readlink())
            return original(fd, *args)

        return call

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in _CHANGES:
            self._count(event, args[0])
        elif event == "open" and isinstance(args[0], str | bytes) and (args[2] or 0) & _WRITES:
            self._count("open", args[0])

    def _count(self, name: str, path: Any) -> None:
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not text.startswith(self._root):
            return
        number = len(self.seen)
        self.seen.append(f"{name} {text[len(self._root) :]}")
        if number == self._number or (self._lasting and number > self._number):
            self._fault(name)


def nothing(name: str) -> None:
    """No fault: only count."""


def crash(name: str) -> None:
    """End the process as kill -9 does: nothing is flushed, closed or tidied up."""
    os._exit(9)


def disk_full(name: str) -> None:
    """Nothing new fits; what exists can be renamed, removed and shortened."""
    if name in ("open", "write", "os.mkdir", "fsync", "fdatasync"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(name: str) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def share_gone(name: str) -> None:
    """A network share that went away."""
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
