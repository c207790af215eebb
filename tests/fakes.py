"""A slide over an array, and pixels that tell where they are: the shared stand-ins of the tests.

``ArraySlide`` is slow and obvious on purpose: it is the twin that real readers are compared with.
"""

import hashlib
import threading
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from wsiengine.errors import ResolutionError
from wsiengine.geometry import Box, Mpp, Size
from wsiengine.slides.base import Level, SlideInfo

WHITE = 255


def area_weights(out_start: int, out_stop: int, ratio: float) -> tuple[sparse.csr_matrix, int, int]:
    """Weights that average source pixels under output pixels ``out_start``…``out_stop``, along one axis.

    Output pixel i covers [i·ratio, (i+1)·ratio) of the source. Returns (weights, start, stop of the source pixels).
    """
    edges = np.arange(out_start, out_stop + 1, dtype=np.float64) * ratio
    nearest = np.rint(edges)
    edges = np.where(np.isclose(edges, nearest, rtol=1e-12, atol=1e-9), nearest, edges)
    start, stop = int(np.floor(edges[0])), int(np.ceil(edges[-1]))
    rows, cols, values = [], [], []
    for i in range(out_stop - out_start):
        source = np.arange(int(np.floor(edges[i])), int(np.ceil(edges[i + 1])))
        overlap = np.minimum(source + 1, edges[i + 1]) - np.maximum(source, edges[i])
        rows.append(np.full(len(source), i))
        cols.append(source - start)
        values.append(overlap / (edges[i + 1] - edges[i]))
    shape = (out_stop - out_start, stop - start)
    flat = [np.concatenate(part) for part in (values, rows, cols)]
    return sparse.csr_matrix((flat[0], (flat[1], flat[2])), shape=shape), start, stop


def crop(pixels: np.ndarray, box: Box) -> np.ndarray:
    """``box`` of ``pixels`` (h, w, c); white wherever the box lies outside."""
    out = np.full((box.height, box.width, pixels.shape[2]), WHITE, pixels.dtype)
    inside = box.intersect(Box(0, 0, *pixels.shape[:2]))
    if inside:
        out[inside.relative_to(box).slices] = pixels[inside.slices]
    return out


def resample_area(pixels: np.ndarray, ratio: tuple[float, float], box: Box) -> np.ndarray:
    """Pixels of ``box`` in the frame of the output, each the mean of ``ratio`` (y, x) source pixels → uint8.

    White outside ``pixels``. A pixel's value does not depend on the box that it was asked for in.
    """
    if not box:
        return np.empty((box.height, box.width, pixels.shape[2]), np.uint8)
    weights_y, y0, y1 = area_weights(box.y0, box.y1, ratio[0])
    weights_x, x0, x1 = area_weights(box.x0, box.x1, ratio[1])
    source = crop(pixels, Box(y0, x0, y1, x1)).astype(np.float64)
    channels = [weights_x @ (weights_y @ source[..., c]).T for c in range(source.shape[2])]
    return np.rint(np.stack(channels, axis=-1).transpose(1, 0, 2)).astype(np.uint8)


@dataclass(frozen=True)
class _Read:
    """One call to ``read_level``: what was asked for."""

    level: int
    box: Box


class ArraySlide:
    """A slide whose level 0 is ``pixels``: (rows, cols, 3) uint8.

    Args:
        pixels: Level 0.
        mpp: µm per level-0 pixel: a number, an ``Mpp``, or None for a file that states none.
        downsamples: Whole-number downsamples of the levels, the first 1; coarser levels are area means.
        bounds_l0: The scanned part, as in MRXS.
        path: What the slide calls itself.

    ``reads`` lists every ``read_level`` call, in order, for tests that count pixels.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        mpp: float | Mpp | None = 0.5,
        *,
        downsamples: tuple[int, ...] = (1,),
        bounds_l0: Box | None = None,
        path: str = "fake.svs",
    ) -> None:
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert pixels.dtype == np.uint8
        assert downsamples[0] == 1
        self.path = path
        self._levels = [pixels]
        for factor in downsamples[1:]:
            rows, cols = -(-pixels.shape[0] // factor), -(-pixels.shape[1] // factor)
            self._levels.append(resample_area(pixels, (factor, factor), Box(0, 0, rows, cols)))
        self.info = SlideInfo(
            format="array in memory",
            reader="array",
            size_l0=Size(*pixels.shape[:2]),
            levels=tuple(
                Level(Size(*level.shape[:2]), (float(factor), float(factor)))
                for level, factor in zip(self._levels, downsamples, strict=True)
            ),
            mpp=Mpp.square(mpp) if isinstance(mpp, int | float) else mpp,
            bounds_l0=bounds_l0,
        )
        self.reads: list[_Read] = []
        self.closed = False
        self._lock = threading.Lock()

    def read_level(self, level: int, box: Box) -> np.ndarray:
        with self._lock:
            self.reads.append(_Read(level, box))
        return crop(self._levels[level], box)

    def read(self, box_px: Box, mpp: Mpp) -> np.ndarray:
        if self.info.mpp is None:
            raise ResolutionError("The slide states no µm/px.", hint="give it with mpp=.")
        wanted = mpp.y / self.info.mpp.y, mpp.x / self.info.mpp.x
        fitting = [
            i
            for i, level in enumerate(self.info.levels)
            if level.downsample[0] <= wanted[0] * (1 + 1e-6) and level.downsample[1] <= wanted[1] * (1 + 1e-6)
        ]
        index = fitting[-1] if fitting else 0
        downsample = self.info.levels[index].downsample
        ratio = wanted[0] / downsample[0], wanted[1] / downsample[1]
        with self._lock:
            y0, x0 = int(box_px.y0 * ratio[0]), int(box_px.x0 * ratio[1])
            y1, x1 = int(np.ceil(box_px.y1 * ratio[0])), int(np.ceil(box_px.x1 * ratio[1]))
            self.reads.append(_Read(index, Box(y0, x0, y1, x1)))
        return resample_area(self._levels[index], ratio, box_px)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.info.size_l0, self.info.levels)).encode())
        digest.update(self._levels[0].tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        self.closed = True

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def position_pixels(height: int, width: int, *, hash_levels: int = 32) -> np.ndarray:
    """(height, width, 3) uint8 in which every pixel tells its place: a shift by one is seen anywhere.

    Red grows with y and green with x (smooth, so that resampled pixels still tell); blue is a hash of both.
    """
    y, x = np.mgrid[:height, :width].astype(np.uint32)
    hashed = (y * np.uint32(2654435761) ^ x * np.uint32(2246822519)) * np.uint32(3266489917)
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0] = 20 + (200 * y) // max(height - 1, 1)
    pixels[..., 1] = 20 + (200 * x) // max(width - 1, 1)
    pixels[..., 2] = 100 + (hashed >> np.uint32(24)) % np.uint32(max(hash_levels, 1))
    return pixels
