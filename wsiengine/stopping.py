"""Ctrl-C and SIGTERM end a run at once: finished blocks are on the disk, so that nothing need be tidied up first.

The main thread gets a ``KeyboardInterrupt`` and leaves in order: blocks under way are finished and journalled, what
is half-made is removed. What takes longer (a block of a large model, a compiler, a network share that hangs) is cut
off: a thread of its own sees the signal through Python's wake-up descriptor, whatever the main thread does.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

MESSAGE = "\nstopped  finished blocks are kept: run the same command again to go on."
STOPPED = "\nstopped"  # by commands that keep nothing unfinished
EXIT_CODE = 130
THREAD = "wsiengine-stop"
_PATIENCE_S = 0.8
_OVER = b"\0"  # no signal has the number 0


@contextmanager
def stopping_soon(message: str = MESSAGE) -> Iterator[None]:
    """While it lasts, Ctrl-C and SIGTERM raise ``KeyboardInterrupt`` and end the process soon after, if it still runs.

    ``message`` is printed where the process must be cut off; the caller prints it where the exception arrives.

    To be entered in the main thread.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    before = signal.signal(signal.SIGTERM, _interrupt)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(reader, over, message), name=THREAD, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        os.write(writer, _OVER)
        watcher.join()
        os.close(writer)
        os.close(reader)


def _watch(reader: int, over: threading.Event, message: str) -> None:
    """Wait for a signal, give the main thread a moment, then end the process for it."""
    while not over.is_set():
        got = os.read(reader, 1)
        if got and got[0] in (signal.SIGINT, signal.SIGTERM) and not over.wait(_PATIENCE_S):
            if message:
                print(message, file=sys.stderr, flush=True)
            os._exit(EXIT_CODE)


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def leave(code: int) -> NoReturn:
    """End at once: all is on the disk and told, and taking the libraries down would keep the command waiting."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody listens, or it is closed
            if stream is not None:  # where the command was started without it
                stream.flush()
    os._exit(code)
