"""The values of a 12- or 16-bit grey picture, for models that take them as they are.

Everything else (tissue, overlay, thumbnails) sees the picture's 8 bits, as a person does. Only pictures that are held
whole have such values: a mammogram, a camera's frame.
"""

from threading import Lock

import numpy as np

from wsiengine.errors import UnsupportedSlide
from wsiengine.geometry import Box, Size

WHITE_16 = 65535
_STRIP_PX = 1 << 22  # source pixels summed up at once: 32 MB of float64


class DeepPixels:
    """Grey values, resampled by area on the picture's own lattice; black (0) outside. Thread-safe.

    Args:
        values: (rows, cols) uint16.
    """

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self._lock = Lock()
        self._scaled: tuple[tuple[float, float], np.ndarray] = ((1.0, 1.0), values)  # of one run there is one ratio

    def read(self, box_px: Box, ratio: tuple[float, float]) -> np.ndarray:
        """``box_px`` of the picture shrunk by ``ratio`` (source pixels per pixel, y and x) → (h, w, 1) uint16."""
        scaled = self._at(ratio)
        out = np.zeros((*box_px.shape, 1), np.uint16)
        inside = box_px.intersect(Box.of(Size(*scaled.shape)))
        if inside:
            out[inside.relative_to(box_px).slices] = scaled[inside.slices][..., None]
        return out

    def _at(self, ratio: tuple[float, float]) -> np.ndarray:
        with self._lock:
            if self._scaled[0] != ratio:
                self._scaled = (ratio, area_means(self._values, ratio))
            return self._scaled[1]


def area_means(values: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """(rows, cols) uint16 → the mean of the source area under each pixel, rounded half up; 0 beyond the picture."""
    if ratio == (1.0, 1.0):
        return values
    edges = _edges(len(values), ratio[0])
    step = max(1, int(_STRIP_PX / max(1.0, ratio[0]) / values.shape[1]))
    strips = []
    for first in range(0, len(edges) - 1, step):
        part = edges[first : first + step + 1]
        start, end = int(part[0]), min(len(values), int(np.ceil(part[-1])))
        by_rows = _sums(values[start:end].astype(np.float64), part - start)
        strips.append(_sums(by_rows.T, _edges(values.shape[1], ratio[1])).T)
    mean = np.concatenate(strips) / (ratio[0] * ratio[1])
    return np.floor(mean + 0.5 + 1e-6).astype(np.uint16)  # a half is one, however its sum was cut


def _edges(count: int, ratio: float) -> np.ndarray:
    """Where the pixels begin and the last ends, in source pixels, none beyond the source."""
    edges = np.arange(int(np.ceil(count / ratio - 1e-9)) + 1) * ratio
    nearest = np.rint(edges)
    return np.minimum(np.where(np.abs(edges - nearest) < 1e-6, nearest, edges), count)


def _sums(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Sums of ``values`` (n, m), taken as constant over each row, between consecutive ``edges``."""
    total = np.zeros((len(values) + 1, values.shape[1]))
    np.cumsum(values, axis=0, out=total[1:])
    whole = np.minimum(edges.astype(np.int64), len(values) - 1)
    return np.diff(total[whole] + (edges - whole)[:, None] * values[whole], axis=0)


def deep_values(pixels: np.ndarray, path: str, window: tuple[float, float] | None) -> np.ndarray:
    """(rows, cols) uint16 of what a decoder gave; with a window ``low`` becomes 0 and ``high`` 65535.

    Raises:
        UnsupportedSlide: Colours, or 8 bits.
    """
    grey = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    if grey.ndim != 2 or grey.dtype != np.uint16:
        depth = f"{grey.dtype.itemsize * 8} bits per channel"
        channels = "grey" if grey.ndim == 2 else f"{grey.shape[2]} channels"
        raise UnsupportedSlide(
            f"{path} has {depth} ({channels}); this model takes grey pictures of 12 to 16 bits.",
            hint="give the picture as it was taken, not a copy in 8 bits; is it the right model?",
        )
    if window is None:
        return np.ascontiguousarray(grey)
    low, high = window
    scaled = (grey.astype(np.float64) - low) * WHITE_16 / (high - low)
    return np.floor(np.clip(scaled, 0, WHITE_16) + 0.5).astype(np.uint16)
