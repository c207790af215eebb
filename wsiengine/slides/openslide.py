"""Reading through OpenSlide: the widest choice of formats, at 17 ns per pixel."""

import threading
from collections.abc import Mapping

import numpy as np
import openslide

from wsiengine.errors import SlideError, UnreadableSlide, UnsupportedSlide
from wsiengine.geometry import Box, Mpp, Size
from wsiengine.slides.base import Level, SlideInfo, levels_of
from wsiengine.slides.white import over_white

_VENDORS = {
    "aperio": "Aperio SVS",
    "dicom": "DICOM WSI",
    "generic-tiff": "tiled TIFF",
    "hamamatsu": "Hamamatsu NDPI or VMS",
    "leica": "Leica SCN",
    "mirax": "MIRAX",
    "philips": "Philips TIFF",
    "sakura": "Sakura SVSLIDE",
    "trestle": "Trestle TIFF",
    "ventana": "Ventana BIF",
    "zeiss": "Zeiss CZI",
}
_CHUNK_PX = 1024  # bounds OpenSlide's own canvas (4 bytes per pixel) whatever is asked for


class OpenSlideReader:
    """Levels through one OpenSlide handle, which is safe to share among threads.

    OpenSlide takes positions in level-0 pixels. Where a level's downsample is no whole number the position falls
    between its pixels and OpenSlide interpolates: such levels are read in chunks fixed to the slide, so that a pixel
    has one value whatever is asked for. After an error a handle gives nothing but that error: it is then replaced.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle: openslide.OpenSlide | None = self._open()
        self._downsamples = tuple(float(d) for d in self._handle.level_downsamples)
        self.info = _info(self._handle)

    def read_into(self, level: int, box: Box, out: np.ndarray) -> None:
        whole = self._downsamples[level].is_integer()
        size = Box.of(self.info.levels[level].size)
        if whole:
            for piece in box.pieces(_CHUNK_PX, _CHUNK_PX):
                out[piece.relative_to(box).slices] = self._read_chunk(level, piece)
            return
        aligned = Box(box.y0 // _CHUNK_PX * _CHUNK_PX, box.x0 // _CHUNK_PX * _CHUNK_PX, box.y1, box.x1)
        for piece in aligned.pieces(_CHUNK_PX, _CHUNK_PX):
            chunk = Box.of(Size(_CHUNK_PX, _CHUNK_PX), piece.y0, piece.x0).intersect(size)
            wanted = piece.intersect(box)
            pixels = self._read_chunk(level, chunk)
            out[wanted.relative_to(box).slices] = pixels[wanted.relative_to(chunk).slices]

    def _read_chunk(self, level: int, box: Box) -> np.ndarray:
        downsample = self._downsamples[level]
        y_l0, x_l0 = round(box.y0 * downsample), round(box.x0 * downsample)
        try:
            image = self._live_handle().read_region((x_l0, y_l0), level, (box.width, box.height))
        except openslide.OpenSlideError as error:
            self._drop_handle()
            raise UnreadableSlide(
                f"{self._path} cannot be decoded near x {x_l0:,}, y {y_l0:,} (level-0 pixels): {error}.",
                hint="the file is damaged there: copy it again from its origin, or leave that part out with --region.",
            ) from error
        return over_white(np.asarray(image))

    def _live_handle(self) -> openslide.OpenSlide:
        with self._lock:
            if self._handle is None:
                self._handle = self._open()
            return self._handle

    def _drop_handle(self) -> None:
        """Forget a handle in error; others may still be reading with it, so it is left to the garbage collector."""
        with self._lock:
            self._handle = None

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self._path)
        except openslide.OpenSlideUnsupportedFormatError:
            raise UnsupportedSlide(
                f"{self._path} is in no format that OpenSlide reads.",
                hint="`wsiengine info` names the formats that were tested; convert the slide to pyramidal TIFF or SVS.",
            ) from None
        except openslide.OpenSlideError as error:
            raise _opening_error(self._path, str(error).removeprefix(f"Reading {self._path}: ")) from None

    def close(self) -> None:
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()


def detect(path: str) -> str | None:
    """OpenSlide's word for the format ("aperio", "generic-tiff", …), None where it reads nothing of it."""
    return openslide.OpenSlide.detect_format(path)


def _opening_error(path: str, words: str) -> SlideError:
    if "nsupported" in words or "image flavor" in words:
        return UnsupportedSlide(
            f"{path} is of a kind that cannot be read: OpenSlide says “{words}”.",
            hint="convert the slide to pyramidal TIFF or SVS with JPEG compression.",
        )
    return UnreadableSlide(
        f"{path} cannot be opened: OpenSlide says “{words}”.",
        hint="the file looks damaged or truncated: copy it again from its origin.",
    )


def _info(handle: openslide.OpenSlide) -> SlideInfo:
    properties = handle.properties
    vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
    sizes = [Size(height, width) for width, height in handle.level_dimensions]
    return SlideInfo(
        format=_VENDORS.get(vendor, vendor),
        reader="openslide",
        size_l0=sizes[0],
        levels=_levels(sizes, handle.level_downsamples),
        mpp=None,
        objective=_number(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)),
        bounds_l0=_bounds(properties),
        associated=tuple(handle.associated_images),
        stated_mpp=_mpp(properties),
    )


def _levels(sizes: list[Size], stated: tuple[float, ...]) -> tuple[Level, ...]:
    """Levels; a whole downsample stated by OpenSlide (which knows paddings) goes before the ratio of sizes."""
    levels = levels_of(sizes)
    return tuple(
        Level(level.size, (float(d), float(d))) if float(d).is_integer() else level
        for level, d in zip(levels, stated, strict=True)
    )


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if np.isfinite(value) and value > 0 else None


def _mpp(properties: Mapping[str, str]) -> Mpp | None:
    y = _number(properties.get(openslide.PROPERTY_NAME_MPP_Y))
    x = _number(properties.get(openslide.PROPERTY_NAME_MPP_X))
    return Mpp(y, x) if y and x else None


def _bounds(properties: Mapping[str, str]) -> Box | None:
    names = (
        openslide.PROPERTY_NAME_BOUNDS_Y,
        openslide.PROPERTY_NAME_BOUNDS_X,
        openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
        openslide.PROPERTY_NAME_BOUNDS_WIDTH,
    )
    try:
        y, x, height, width = (int(properties[name]) for name in names)
    except (KeyError, ValueError):
        return None
    return Box(y, x, y + height, x + width)
