"""Reading through tiffslide: TIFF that OpenSlide refuses (QPTIFF, planar OME-TIFF), and slides behind URLs."""

import re
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

import numpy as np
import tifffile
import tiffslide

from wsiengine.errors import UnreadableSlide
from wsiengine.geometry import Box, Mpp, Size
from wsiengine.slides.base import SlideInfo, levels_of
from wsiengine.slides.sources import open_tiff
from wsiengine.slides.tiff import lacks_pixels, ome_mpp

_DAMAGE = Exception  # its many parts (tifffile, zarr, fsspec, codecs) meet damage with errors of any type
_COLOURS = {"red", "green", "blue", "r", "g", "b"}


def open_tiffslide(path: str) -> "TiffSlideReader | None":
    """A reader where the first image has three 8-bit channels and one plane, else None."""
    try:
        with open_tiff(path) as tiff:
            series = tiff.series[0]
            sizes = dict(zip(series.axes, series.shape, strict=True))
            rgb_like = series.axes in ("YXS", "CYX") and 3 in (sizes.get("S"), sizes.get("C"))
            if not rgb_like or series.dtype != np.uint8 or _incomplete(series):
                return None
            kind = "QPTIFF" if tiff.is_qpi else "OME-TIFF" if tiff.is_ome else "Aperio SVS" if tiff.is_svs else "TIFF"
            channels = _channels(
                [str(page.description) for page in series.pages if isinstance(page, tifffile.TiffPage)]
            )
            stated = ome_mpp(str(tiff.pages.first.description)) if tiff.is_ome else None
        return TiffSlideReader(path, kind, channels, stated)
    except _DAMAGE:
        return None  # what the file is instead will be said by the refusal


def _incomplete(series: tifffile.TiffPageSeries) -> bool:
    return any(lacks_pixels(page) for level in series.levels for page in level.pages if page is not None)


class TiffSlideReader:
    """Levels through tiffslide, one handle per thread: a handle's file position is not safe to share."""

    def __init__(self, path: str, kind: str, channels: tuple[str, ...], stated_mpp: Mpp | None) -> None:
        self._path = path
        self._local = threading.local()
        self._lock = threading.Lock()
        self._handles: list[tiffslide.TiffSlide] = []
        handle = self._handle()
        sizes = [Size(height, width) for width, height in handle.level_dimensions]
        self.info = SlideInfo(
            format=f"{kind}, fluorescence" if channels else kind,
            reader="tiffslide",
            size_l0=sizes[0],
            levels=levels_of(sizes),
            mpp=None,
            objective=_number(handle.properties, "tiffslide.objective-power"),
            associated=tuple(sorted(handle.associated_images)),
            stated_mpp=stated_mpp or _mpp(handle.properties),
            channels=channels,
        )

    def read_into(self, level: int, box: Box, out: np.ndarray) -> None:
        handle = self._handle()
        downsample = handle.level_downsamples[level]
        place = _level0_place(box.x0, downsample), _level0_place(box.y0, downsample)
        try:
            out[:] = handle.read_region(place, level, (box.width, box.height), as_array=True, padding=False)
        except _DAMAGE as error:
            raise UnreadableSlide(
                f"{self._path} cannot be decoded near x {place[0]:,}, y {place[1]:,} (level-0 pixels): {error}.",
                hint="the file is damaged there: copy it again from its origin, or leave that part out with --region.",
            ) from error

    def _handle(self) -> tiffslide.TiffSlide:
        handle = getattr(self._local, "handle", None)
        if handle is None:
            handle = self._local.handle = tiffslide.TiffSlide(self._path)
            with self._lock:
                self._handles.append(handle)
        return handle

    def close(self) -> None:
        with self._lock:
            handles, self._handles = self._handles, []
        for handle in handles:
            handle.close()
        self._local = threading.local()

    def __del__(self) -> None:
        self.close()


def _level0_place(pixel: int, downsample: float) -> int:
    """The level-0 pixel that tiffslide, which truncates, turns back into ``pixel``."""
    place = int(np.ceil(pixel * downsample))
    return place if int(place / downsample) == pixel else place + 1


def _channels(descriptions: list[str]) -> tuple[str, ...]:
    """The dyes of the channels where the file names them and they are not red, green and blue."""
    names: list[str] = []
    for text in descriptions:
        names += re.findall(r"<Name>([^<]+)</Name>\s*<Color>", text)  # PerkinElmer: one page, one band
    if not names and descriptions and "<OME" in descriptions[0]:
        try:
            tree = ElementTree.fromstring(descriptions[0])
        except ElementTree.ParseError:
            return ()
        names = [e.get("Name", "") for e in tree.iter() if e.tag.rpartition("}")[2] == "Channel"]
    if len(names) != 3 or not all(names) or {name.lower() for name in names} <= _COLOURS:
        return ()
    return tuple(names)


def _number(properties: Mapping[str, Any], name: str) -> float | None:
    try:
        value = float(properties.get(name) or 0)
    except (TypeError, ValueError):
        return None
    return value if np.isfinite(value) and value > 0 else None


def _mpp(properties: Mapping[str, Any]) -> Mpp | None:
    y, x = _number(properties, "tiffslide.mpp-y"), _number(properties, "tiffslide.mpp-x")
    return Mpp(y, x) if y and x else None
