"""A process forked off this one: ready at once, where a new interpreter would first load what this one has loaded.

Only where nothing is loaded yet that may not survive it, and no thread runs but the one that waits for signals. As a
new program would, the process starts with signals untouched and in a session of its own, and it never returns to the
code that forked it. Files that others keep open here (a tool that looks on, say) stay open there.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

from wsiengine.stopping import THREAD, leave

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL_S = 0.01


def can_fork() -> bool:
    """Whether this process is as small as the command is before it loads libraries, on a system that forks safely."""
    alone = all(thread is threading.main_thread() or thread.name == THREAD for thread in threading.enumerate())
    streams = None not in (sys.stdin, sys.stdout, sys.stderr)
    return sys.platform == "linux" and alone and streams and "numpy" not in sys.modules


class Forked:
    """A forked process, with those parts of :class:`subprocess.Popen` that its watcher needs.

    Args:
        work: What it does → its exit code. It has the other end of ``stdin`` as its standard input.
        without: File descriptors that are closed in it.

    Attributes:
        stdin: Its standard input, to write to.
    """

    def __init__(self, work: Callable[[], int], without: tuple[int, ...] = ()) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()  # or both would write what is in the buffer
        sys.stderr.flush()
        (reader, writer), parent = os.pipe(), os.getpid()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # or the child would take them as we do
        try:
            self.pid = os.fork()
            if not self.pid:
                _be_the_child(work, (reader, writer, *without), (mask, parent))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(reader)
        self.stdin: BinaryIO | None = os.fdopen(writer, "wb")

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or less than 0 the signal that ended it.

        Raises:
            subprocess.TimeoutExpired: It still runs after ``timeout`` seconds.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, 0 if until is None else os.WNOHANG)
            except ChildProcessError:  # who started the command ignores SIGCHLD: nobody knows how it ended
                pid, status = self.pid, 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(["wsiengine"], timeout or 0.0)
            else:
                time.sleep(_POLL_S)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:  # its number may be another's by now
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _be_the_child(work: Callable[[], int], without: tuple[int, ...], before: tuple[set[Any], int]) -> NoReturn:
    """``without``: what becomes standard input, and more to close; ``before``: the parent's signal mask and number."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        os.dup2(without[0], 0)
        for descriptor in without:
            os.close(descriptor)
        mask, parent = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if os.getppid() == parent:  # else it has gone already
            code = work()
    except BaseException:  # nobody above is left to tell of it: the code would run on in the parent's place
        traceback.print_exc()
    finally:
        leave(code)
