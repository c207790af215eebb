"""What a run gets ready while its blocks are computed: the slide's picture, and the libraries that write results.

Finishing then waits for neither, and the memory that reading the picture takes for a moment is not added to that of
the map. It runs on a thread of its own and is given up with the run.
"""

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from ctypes import CDLL
from types import TracebackType

import numpy as np

from wsiengine.slides.base import Slide


class Meanwhile:
    """A context manager: starts once it is told that the first block is done, stops on leaving."""

    def __init__(self, slide: Slide) -> None:
        self._slide = slide
        self._over, self._begun = threading.Event(), threading.Event()
        self._picture: Future[np.ndarray] | None = None

    def __enter__(self) -> "Meanwhile":
        pool = ThreadPoolExecutor(1, thread_name_prefix="wsiengine-picture")
        self._picture = pool.submit(self._get_ready)
        pool.shutdown(wait=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._begun.set()

    def begin(self) -> None:
        """The first block is done: before, every import would keep it waiting."""
        self._begun.set()

    def picture(self) -> np.ndarray:
        """The slide's thumbnail, as :func:`wsiengine.report.thumbnail` gives it; waits for it.

        Raises:
            UnreadableSlide: A part of the slide cannot be decoded.
        """
        assert self._picture is not None
        self._begun.set()
        return self._picture.result()

    def _get_ready(self) -> np.ndarray:
        self._begun.wait()
        if self._over.is_set():
            raise CancelledError
        import scipy.ndimage  # noqa: F401  (slow to import)

        import wsiengine.finishing
        import wsiengine.store  # noqa: F401
        import wsikernels.components  # noqa: F401
        from wsiengine.report import thumbnail

        return thumbnail(self._slide, over=self._over.is_set)


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's numbers of them
_APART_BYTES, _KEPT_BYTES = 4 << 20, 16 << 20


def keep_large_pieces_apart() -> None:
    """Have the C library give pieces from 4 MB on back to the system at once, and keep 16 MB of others per thread.

    By itself it takes pieces of up to 32 MB, the pixels of blocks, from what it keeps, and keeps up to 64 MB at the
    end of each thread's part, which no trimming reaches once the thread has ended.
    """
    mallopt = getattr(CDLL(None), "mallopt", None)  # glibc alone knows these numbers
    if mallopt is not None and hasattr(CDLL(None), "gnu_get_libc_version"):
        mallopt(_MMAP_THRESHOLD, _APART_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back_memory() -> None:
    """Return memory that was freed to the system: the C library keeps pieces below 32 MB for later."""
    trim = getattr(CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)
