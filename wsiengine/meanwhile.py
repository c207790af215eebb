"""What a run gets ready while its blocks are computed: the slide's picture, and the libraries that write results.

Finishing then waits for neither, and the memory that reading the picture takes for a moment is not added to that of
the map. It runs on a thread of its own and is given up with the run.
"""

import gc
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import CDLL
from types import TracebackType

import numpy as np

from wsiengine.slides.base import Slide


class Meanwhile:
    """A context manager: starts on entering, stops on leaving."""

    def __init__(self, slide: Slide) -> None:
        self._slide = slide
        self._over = threading.Event()
        self._picture: Future[np.ndarray] | None = None

    def __enter__(self) -> "Meanwhile":
        pool = ThreadPoolExecutor(1, thread_name_prefix="wsiengine-picture")
        self._picture = pool.submit(self._get_ready)
        pool.shutdown(wait=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()

    def picture(self) -> np.ndarray:
        """The slide's thumbnail, as :func:`wsiengine.report.thumbnail` gives it; waits for it.

        Raises:
            UnreadableSlide: A part of the slide cannot be decoded.
        """
        assert self._picture is not None
        return self._picture.result()

    def _get_ready(self) -> np.ndarray:
        import wsiengine.store  # noqa: F401  (slow to import)
        from wsiengine.report import thumbnail

        return thumbnail(self._slide, over=self._over.is_set)


def give_back_memory() -> None:
    """Return memory that was freed to the system: the C library keeps pieces below 32 MB for later."""
    gc.collect()
    trim = getattr(CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)
