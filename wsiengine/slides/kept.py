"""File tiles that were dear to decode, kept for the next blocks: a bounded part of memory, however large the slide."""

from collections import OrderedDict
from threading import Lock

import numpy as np

KEPT_BYTES = (
    32 << 20
)  # a row of detector blocks on a slide of 6,000 px; of wider ones the blocks' neighbours to the left

Key = tuple[int, int, int]  # level, row and column of a file tile


class KeptTiles:
    """The file tiles used last. Thread-safe; two threads that miss the same tile both decode it."""

    def __init__(self, most_bytes: int = KEPT_BYTES) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._tiles: OrderedDict[Key, np.ndarray] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Key) -> np.ndarray | None:
        """(h, w, 3) uint8, not to be written to; None where it is not kept."""
        with self._lock:
            if key not in self._tiles:
                return None
            self._tiles.move_to_end(key)
            return self._tiles[key]

    def keep(self, key: Key, pixels: np.ndarray) -> None:
        """Keep an array that nobody writes to again, and let go of the oldest."""
        with self._lock:
            if key in self._tiles:
                return
            self._tiles[key] = pixels
            self._bytes += pixels.nbytes
            while self._bytes > self._most_bytes:
                self._bytes -= self._tiles.popitem(last=False)[1].nbytes
