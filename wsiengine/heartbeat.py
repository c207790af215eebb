"""A lock for network shares that cannot lock files: who holds it rewrites a small file every few seconds.

The file holds a random owner and a count. Who finds another's file watches it for several beats: a change means that
its owner lives; none means that it is dead, and its file is replaced. Only the time that passes on the watcher's own
machine counts, never a date: clocks of different machines disagree, and any clock may be set back.

Two watchers may replace a dead one's file at once; the last stands. So each waits one more beat, far longer than the
moment between its last look and its replacing, and has the lock only if its own file is still there. An owner that
slept (a stopped process, a suspended machine, a share that hung) finds out by :meth:`Heartbeat.check` before it writes,
and cannot take the lock back by a beat that was under way: it beats in the file that it has opened, and whoever took
over has put another in its place.
"""

import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path

from wsiengine.errors import OutputInUse

BEAT_S = 5.0
MISSED = 4  # beats without a change: dead
_LOOKS_PER_BEAT = 4


class Heartbeat:
    """The lock, held from construction to :meth:`release`.

    Args:
        path: Of the file; its folder exists.

    Attributes:
        owner: A random word.
        took_over: The last owner is dead, or sleeps: what it had begun to write may still come.

    Raises:
        OutputInUse: Another run holds it.
        OSError: The share cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.owner = secrets.token_hex(16)
        self.took_over = False
        self._count = 0
        self._beaten_s = now_s()
        self._lost = False
        self._over = threading.Event()
        while not self._create():
            if self._watch():
                self._replace()
                time.sleep(BEAT_S)
                if not self._ours():
                    raise _in_use(path)
                self.took_over = True
                break
        self._thread = threading.Thread(target=self._beat, name="wsiengine-heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """To be called before anything is written.

        Raises:
            OutputInUse: Another run took the lock, as this one gave no sign of life.
        """
        if self._lost or (now_s() - self._beaten_s > BEAT_S * MISSED / 2 and not self._ours()):
            self._lost = True
            raise OutputInUse(
                f"{self._path.parent.parent} was taken over by another run: this one gave no sign of life for "
                f"{BEAT_S * MISSED:g} s.",
                hint="wait for the other to finish; what this one had finished is not lost.",
            )

    def release(self) -> None:
        """Let go; nobody need wait then."""
        self._over.set()
        self._thread.join()
        with suppress(OSError):
            if self._ours():
                self._path.unlink()

    def _create(self) -> bool:
        """Whether the file was made by us: exclusive creation is safe on NFS since version 3, and on SMB."""
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(fd, "w") as file:
            file.write(self._text())
        return True

    def _watch(self) -> bool:
        """Whether the file's owner is dead; False where the file went away meanwhile.

        Raises:
            OutputInUse: It lives.
        """
        first = self._read()
        for _ in range(MISSED * _LOOKS_PER_BEAT):
            time.sleep(BEAT_S / _LOOKS_PER_BEAT)
            now = self._read()
            if now is None:
                return False
            if now != first:
                raise _in_use(self._path)
        return True

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            began_s = now_s()
            try:
                ours = self._rewrite()
            except FileNotFoundError:
                ours = False
            except OSError:  # a share that is gone for a while: check() looks again before anything is written
                continue
            if not ours:
                self._lost = True
                return
            self._beaten_s = began_s  # then it was ours; the writing may have hung

    def _rewrite(self) -> bool:
        """One beat, in our own file; False where another's has taken its place."""
        with os.fdopen(os.open(self._path, os.O_RDWR | os.O_CLOEXEC), "r+b", buffering=0) as file:
            if file.read(len(self.owner)) != self.owner.encode():
                return False
            self._count += 1
            os.pwrite(file.fileno(), self._text().encode(), 0)
        return True

    def _replace(self) -> None:
        """Put our file in the place of a dead one's."""
        draft = self._path.with_name(f"{self._path.name}.{self.owner}")
        draft.write_text(self._text())
        draft.replace(self._path)

    def _text(self) -> str:
        """Of one length, so that a beat only changes figures."""
        return f"{self.owner} {self._count:012}\n"

    def _ours(self) -> bool:
        found = self._read()
        return found is not None and found.startswith(self.owner)

    def _read(self) -> str | None:
        """The file's text; None where there is none, or the share does not answer."""
        try:
            return self._path.read_text()
        except OSError:
            return None


def now_s() -> float:
    """Seconds that go on while the machine sleeps, and never back."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


def _in_use(path: Path) -> OutputInUse:
    return OutputInUse(
        f"Another run is writing to {path.parent.parent}.",
        hint="wait for it to finish, or give another folder with -o.",
    )
