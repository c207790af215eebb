"""Blocks read and normalised in processes of their own, where a model takes more tiles than one interpreter hands out.

Decoding, resampling and the kernels run without Python's lock, but each file tile takes it twice, and with many threads
that is what all wait for: sixteen cores got 1,400 tiles/s out of one process, at a quarter of their time. Here a thread
asks a process for a whole block and finds its pixels in memory that both share; they are the same pixels.

The processes are copies of one that has loaded the libraries, and end with the run. One that ends by itself costs
nothing but pace: the block is read by the thread that asked, as without it. So is a block that cannot be read there.
"""

import contextlib
import mmap
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from wsiengine.grid import Block
from wsiengine.interpreter import same_python
from wsiengine.slides.base import Slide
from wsiengine.tasks.base import View
from wsiengine.viewing import Viewer

_LENGTH = struct.Struct("<Q")
_OVER = b"\0"
_SLIDES_KEPT = 2  # open in a reader: the one that is scored, and the next
_LARGEST_SLIDE = 1 << 20  # bytes that are sent to each reader
_NICE = 10  # a thread that feeds the device, and holds Python's lock, must not wait for a core that reads
_SPARE = 1.25  # of memory for a block's pixels: the next may be larger


class Readers:
    """``count`` processes, started at once; a context manager. See :func:`reading`."""

    def __init__(self, count: int) -> None:
        with contextlib.ExitStack() as opened:
            pairs = [tuple(map(opened.enter_context, socket.socketpair())) for _ in range(count)]
            theirs = [their.fileno() for _, their in pairs]
            command, environment = same_python("wsiengine.readers", *map(str, theirs))
            # A process group of its own: Ctrl-C is the run's affair, which then closes the channels.
            how: dict[str, Any] = {"pass_fds": theirs, "env": environment, "process_group": 0}
            self._first = subprocess.Popen(command, stdin=subprocess.PIPE, **how)
            opened.pop_all()
        for _, their in pairs:
            their.close()
        self._free: queue.LifoQueue[_Reader] = queue.LifoQueue()
        self._all = [_Reader(own) for own, _ in pairs]
        for reader in self._all:
            self._free.put(reader)
        self._memory = threading.local()

    def view(self, viewer: Viewer, block: Block) -> tuple[View, dict[str, float]]:
        """As :meth:`wsiengine.viewing.Viewer.view`; the pixels are good until this thread's next call."""
        reader = self._free.get()
        try:
            answer = reader.ask(viewer, block, self._shared()) if reader.alive else None
            # In the turn of one that has ended: given back at once, it would be what every thread takes next.
            return viewer.view(block) if answer is None else answer
        finally:
            self._free.put(reader)

    def keep(self, count: int) -> "Readers | None":
        """With ``count`` processes at most, where memory has no room for more; None where none is left.

        For all that share them: to be called while no other slide's blocks are read.
        """
        while len(self._all) > count:
            surplus = self._free.get()
            self._all.remove(surplus)
            surplus.end()
        return self if self._all else None

    def _shared(self) -> "_Shared":
        """This thread's memory."""
        if not hasattr(self._memory, "shared"):
            self._memory.shared = _Shared()
        shared: _Shared = self._memory.shared
        return shared

    def close(self) -> None:
        """End the processes, also where a fork of this process, which is not ours, holds copies of the channels."""
        for reader in self._all:
            reader.end()
        with contextlib.suppress(OSError):
            self._first.communicate(_OVER)
        self._first.wait()

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_shared: list[Readers] = []
_users = 0
_sharing = threading.Lock()


@contextlib.contextmanager
def reading(slide: Slide, count: int) -> Iterator[Readers | None]:
    """The readers of this process: one set for all slides that run at a time, started by the first of them.

    None where ``count`` is 0, on a system without shared memory files or room for processes, and for a slide that is
    held in memory, or that cannot be opened again elsewhere: threads read it.
    """
    readers = _join(count) if count and hasattr(os, "memfd_create") and _travels(slide) else None
    try:
        yield readers
    finally:
        if readers is not None:
            _leave()


def _join(count: int) -> Readers | None:
    """One more user of the readers; None where the system allows none."""
    global _users
    with _sharing:
        if not _users:
            try:
                _shared.append(Readers(count))
            except OSError:  # too many open files or processes
                return None
        _users += 1
        return _shared[0]


def _leave() -> None:
    global _users
    with _sharing:
        _users -= 1
        if not _users:
            _shared.pop().close()


def _travels(slide: Slide) -> bool:
    try:
        return len(pickle.dumps(slide)) <= _LARGEST_SLIDE
    except (pickle.PicklingError, TypeError, AttributeError):
        return False


class _Shared:
    """Memory of one thread for the pixels of a block, which a reader writes. Grows."""

    _numbers = iter(range(1 << 62))

    def __init__(self) -> None:
        self.number, self.size = next(self._numbers), 0
        self.descriptor = -1
        self._map: mmap.mmap | None = None

    def grow(self, size: int) -> None:
        self._drop()
        self.size = int(size * _SPARE)
        self.descriptor = os.memfd_create("wsiengine-block", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, self.size)
        self._map = mmap.mmap(self.descriptor, self.size)

    def pixels(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        assert self._map is not None
        return np.ndarray(shape, dtype, self._map)

    def _drop(self) -> None:
        self._map = None  # unmapped with the last array that shows it
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self._drop()


class _Reader:
    """One process, seen from the run's: asked by one thread at a time."""

    def __init__(self, channel: socket.socket) -> None:
        self.alive = True
        self._channel = channel
        self._mapped: dict[int, int] = {}  # sizes of the threads' memory, as the reader knows it

    def end(self) -> None:
        """Where it reads, it ends after that."""
        with contextlib.suppress(OSError):  # it has ended
            self._channel.shutdown(socket.SHUT_RDWR)
        self._channel.close()

    def ask(self, viewer: Viewer, block: Block, shared: _Shared) -> tuple[View, dict[str, float]] | None:
        """The view of a block; None where the process could not read it, cannot share memory, or has ended."""
        self.alive = False  # until the exchange is over: whatever breaks it off leaves half a message
        try:
            kind, *answer = self._exchange((viewer.key, block))
            if kind == "viewer":
                kind, *answer = self._exchange((pickle.dumps(viewer), block))
            if kind == "failed":
                self.alive = True
                return None
            shape, dtype, corners, bad, seconds = answer
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            if size > shared.size:
                shared.grow(size)
            known = self._mapped.get(shared.number) == shared.size
            self._mapped[shared.number] = shared.size
            self._exchange((shared.number, shared.size), [] if known else [shared.descriptor])
        except (EOFError, OSError):
            return None
        self.alive = True
        return View(shared.pixels(shape, dtype), corners, bad), seconds

    def _exchange(self, message: Any, descriptors: list[int] | None = None) -> Any:
        _send(self._channel, message, descriptors or [])
        return _receive(self._channel)[0]


def _send(channel: socket.socket, message: Any, descriptors: list[int]) -> None:
    data = pickle.dumps(message)
    socket.send_fds(channel, [_LENGTH.pack(len(data))], descriptors)
    channel.sendall(data)


def _receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """A message of our own process or its child, and the descriptors that came with it.

    Raises:
        EOFError: The other side has ended.
    """
    head, descriptors, _, _ = socket.recv_fds(channel, _LENGTH.size, 1)
    if len(head) < _LENGTH.size:
        raise EOFError
    data, (length,) = bytearray(), _LENGTH.unpack(head)
    while len(data) < length:
        piece = channel.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return pickle.loads(data), descriptors


# --- in the processes ----------------------------------------------------------------------------


def _read(channel: socket.socket) -> None:
    """Answer until the other side has ended."""
    viewers: OrderedDict[str, Viewer] = OrderedDict()
    maps: dict[int, mmap.mmap] = {}
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            (named, block), _ = _receive(channel)
            if not isinstance(named, bytes) and named not in viewers:
                _send(channel, ("viewer",), [])
                continue
            try:
                viewer = _opened(named, viewers) if isinstance(named, bytes) else viewers[named]
                view, seconds = viewer.view(block)
            except Exception:  # whatever it is, the one who asked meets it as well, and tells it better
                _send(channel, ("failed",), [])
                continue
            pixels = view.pixels
            _send(channel, ("view", pixels.shape, pixels.dtype.str, view.corners_px, view.bad, seconds), [])
            (number, size), descriptors = _receive(channel)
            for descriptor in descriptors:
                maps[number] = mmap.mmap(descriptor, size)
                os.close(descriptor)
            np.ndarray(pixels.shape, pixels.dtype, maps[number])[...] = pixels
            _send(channel, ("written",), [])


def _opened(packed: bytes, viewers: OrderedDict[str, Viewer]) -> Viewer:
    viewer: Viewer = pickle.loads(packed)
    viewers[viewer.key] = viewer
    if len(viewers) > _SLIDES_KEPT:
        viewers.popitem(last=False)[1].slide.close()
    return viewer


def _main(descriptors: list[int]) -> None:
    """Load what reading takes, become as many processes as there are channels, and end them with the run."""
    # once, before there are many of us: numba, and what opening most slides loads
    import wsiengine.slides.direct
    import wsiengine.slides.openslide  # noqa: F401
    import wsikernels.resample
    import wsikernels.stain  # noqa: F401

    os.nice(_NICE)  # not before: the first block waits for the imports
    children = []
    for mine in descriptors:
        child = os.fork()
        if not child:
            for other in descriptors:
                if other != mine:
                    os.close(other)
            os.close(0)
            _read(socket.socket(fileno=mine))
            os._exit(0)
        children.append(child)
    for descriptor in descriptors:
        os.close(descriptor)
    os.read(0, 1)
    for child in children:  # one may hang in a read
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    os._exit(0)


if __name__ == "__main__":
    _main([int(argument) for argument in sys.argv[1:]])
