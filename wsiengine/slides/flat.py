"""Reading flat images (PNG, JPEG, PGM, plain TIFF, grey DICOM) by holding them whole: fields, crops, mammograms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile

from wsiengine.errors import UnreadableSlide, UnsupportedSlide
from wsiengine.geometry import Box, Mpp, Size
from wsiengine.slides.base import SlideInfo, levels_of
from wsiengine.slides.deep import DeepPixels, deep_values
from wsiengine.slides.pnm import MAGICS as PNM_MAGICS
from wsiengine.slides.pnm import decode_pnm
from wsiengine.slides.sources import open_tiff
from wsiengine.slides.tiff import MAGICS, lacks_pixels, page_resolution
from wsiengine.slides.white import over_white

MOST_PX = 100_000_000  # 300 MB of colour; larger images belong into tiles

_PNG, _JPEG, _DICOM = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"DICM"


class FlatReader:
    """An image in memory. Grey ones are shown as grey RGB; ``deep`` holds the values behind what is shown."""

    def __init__(
        self, pixels: np.ndarray, kind: str, stated_mpp: Mpp | None = None, deep: DeepPixels | None = None
    ) -> None:
        size = Size(*pixels.shape[:2])
        self._pixels, self.deep = pixels, deep
        self.info = SlideInfo(
            format=kind,
            reader="flat",
            size_l0=size,
            levels=levels_of([size]),
            mpp=stated_mpp if kind == "DICOM" else None,  # measured by the device; others' dots per inch need not be
            stated_mpp=stated_mpp,
        )

    def read_into(self, level: int, box: Box, out: np.ndarray) -> None:
        out[:] = self._pixels[box.slices]

    def close(self) -> None:
        pass


def open_flat(path: str, window: tuple[float, float] | None = None, deep: bool = False) -> FlatReader | None:
    """The image in memory, None where it is none of these formats or no grey or colour image.

    Args:
        path: Of the file.
        window: Of a 16-bit image: the values that become black and white.
        deep: Keep a 16-bit image's values, too.

    Raises:
        UnsupportedSlide: Too large to be held whole; 16 bits deep and no window given; or not so deep, but ``deep``.
        UnreadableSlide: Damaged.
    """
    with Path(path).open("rb") as file:
        head = file.read(132)
    if head[:4] in MAGICS:
        return _open_tiff(path, window, deep)
    if head[128:] == _DICOM:
        return _open_dicom(path, window, deep)
    netpbm = head[:2] in PNM_MAGICS and head[2:3].isspace()
    if not head.startswith(_PNG) and not head.startswith(_JPEG) and not netpbm:
        return None
    data = Path(path).read_bytes()
    kind = "Netpbm" if netpbm else "PNG" if head.startswith(_PNG) else "JPEG"
    try:
        pixels = _DECODERS[kind](data)
    except (RuntimeError, ValueError) as error:
        raise UnreadableSlide(
            f"{path} cannot be decoded: {error}.", hint="the file is damaged: copy it again from its origin."
        ) from error
    return _shown(pixels, path, (kind, None), window, deep)


def _decode_jpeg(data: bytes) -> np.ndarray:
    if b"\xff\xd9" not in data[-65536:]:
        raise ValueError("the JPEG stream has no end, the file is truncated")
    return imagecodecs.jpeg8_decode(data)


_DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "PNG": imagecodecs.png_decode,
    "JPEG": _decode_jpeg,
    "Netpbm": decode_pnm,
}


def _open_tiff(path: str, window: tuple[float, float] | None, deep: bool) -> FlatReader | None:
    try:
        with open_tiff(path) as tiff:
            if not tiff.pages:
                return None
            series, page = tiff.series[0], tiff.pages.first
            alone = len(series.pages) == 1 and series.axes in ("YX", "YXS", "SYX")
            if not alone or page.photometric not in (1, 2, 6) or page.size > 3 * MOST_PX:
                return None
            pixels = _decoded(page, series.shape, path)
            mpp = page_resolution(page)
    except tifffile.TiffFileError:
        return None  # what is wrong with its structure is said by the refusal
    pixels = np.moveaxis(pixels, 0, -1) if series.axes == "SYX" else pixels
    return _shown(pixels, path, ("TIFF", mpp), window, deep)


def _decoded(page: Any, shape: tuple[int, ...], path: str) -> np.ndarray:
    """The pixels of a page."""
    hint = "the file is damaged: copy it again from its origin."
    if lacks_pixels(page):
        raise UnreadableSlide(f"{path} lacks some of its pixels.", hint=hint)
    try:
        pixels: np.ndarray = page.asarray()
    except Exception as error:  # tifffile and its codecs meet damage with errors of any type
        raise UnreadableSlide(f"{path} cannot be decoded: {error}.", hint=hint) from error
    if pixels.shape != shape:
        raise UnreadableSlide(f"{path} announces {shape} values, {pixels.shape} came.", hint=hint)
    return pixels


def _open_dicom(path: str, window: tuple[float, float] | None, deep: bool) -> FlatReader | None:
    """One grey image, as mammograms are; None of anything else, slides among it."""
    from wsiengine.datasets.dicom import is_grey_image, read_dicom

    if not is_grey_image(Path(path)):
        return None
    image = read_dicom(Path(path))
    own = (float(image.pixels.min()), float(max(image.pixels.max(), image.pixels.min() + 1)))
    window = window or (own if image.pixels.dtype == np.uint16 and not deep else None)
    return _shown(image.pixels, path, ("DICOM", Mpp(*image.mpp_yx) if image.mpp_yx else None), window, deep)


def _shown(
    pixels: np.ndarray, path: str, facts: tuple[str, Mpp | None], window: tuple[float, float] | None, deep: bool
) -> FlatReader:
    """The reader of what a decoder gave; ``facts``: its kind and stated µm/px."""
    if not deep:
        return FlatReader(_as_rgb(pixels, path, window), *facts)
    values = deep_values(pixels, path, window)
    low, high = int(values.min()), int(values.max())
    return FlatReader(_as_rgb(values, path, (low, max(high, low + 1))), *facts, DeepPixels(values))


def _as_rgb(pixels: np.ndarray, path: str, window: tuple[float, float] | None) -> np.ndarray:
    """(h, w, 1 or 3) uint8 of what a decoder gave."""
    if window is not None and pixels.dtype.kind in "ui" and pixels.dtype.itemsize == 2:
        from wsikernels.published import window_levels

        pixels = window_levels(pixels, *window)
    if pixels.dtype != np.uint8:
        raise UnsupportedSlide(
            f"{path} has {pixels.dtype.itemsize * 8} bits per channel; 8 are needed.",
            hint="give the values that become black and white, as in --normalise window:low=0,high=4095, or convert it "
            "to 8-bit colour (in ImageJ: Image ▸ Type ▸ RGB Color).",
        )
    if pixels.shape[0] * pixels.shape[1] > MOST_PX:
        raise UnsupportedSlide(
            f"{path} has {pixels.shape[1]:,} × {pixels.shape[0]:,} px in one piece; at most {MOST_PX:,} fit.",
            hint="convert it to a pyramidal, tiled TIFF.",
        )
    if pixels.ndim == 2:
        return pixels[..., None]
    channels = pixels.shape[2]
    if channels == 2:  # grey with alpha
        return over_white(np.concatenate([pixels[..., [0, 0, 0]], pixels[..., 1:]], axis=2))
    if channels in (1, 3):
        return pixels
    if channels == 4:
        return over_white(pixels)
    raise UnsupportedSlide(f"{path} has {channels} channels; red, green and blue are needed.")
