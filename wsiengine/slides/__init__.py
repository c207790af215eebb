"""Opening slides: :func:`open_slide` chooses the way to read and says which."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from wsiengine.errors import ResolutionError, SlideNotFound, UnreadableSlide, UnsupportedSlide
from wsiengine.geometry import Mpp
from wsiengine.slides.base import LevelReader, Slide, SlideInfo
from wsiengine.slides.flat import open_flat
from wsiengine.slides.refusal import refusal
from wsiengine.slides.sources import is_url, open_source
from wsiengine.slides.structure import check_directories
from wsiengine.slides.tiff import MAGICS, first_page_is_the_slide, parse_tiled
from wsiengine.slides.whole import WholeSlide

_ASPECT_SLACK = 0.05  # how far the sides of a level may differ from the slide's proportions

__all__ = ["Slide", "SlideInfo", "open_slide"]


def open_slide(
    path: str | os.PathLike[str],
    *,
    mpp: float | Mpp | None = None,
    reader: str | None = None,
    window: tuple[float, float] | None = None,
    deep: bool = False,
) -> WholeSlide:
    """Open a slide with the fastest way of reading that knows its format (``slide.info.reader`` names it).

    Args:
        path: File or fsspec URL.
        mpp: µm per level-0 pixel, overriding the file.
        reader: "direct", "openslide", "tiffslide" or "flat" to insist on one.
        window: Of a 12- or 16-bit picture: the values that become black and white.
        deep: It is a grey picture of 12 to 16 bits, and its values are wanted (:meth:`WholeSlide.read_deep`).

    Raises:
        SlideNotFound: No such file, or a folder.
        UnsupportedSlide: Not a brightfield slide, or a format that nobody here reads.
        UnreadableSlide: Damaged, truncated, or not permitted.
        ResolutionError: ``mpp`` is not a positive number.
    """
    location = str(path) if is_url(str(path)) else os.fspath(path)
    given = _given(mpp)
    if not is_url(location):
        _check_file(Path(location))
    if (window is not None or deep) and reader in (None, "flat") and not is_url(location):
        picture = open_flat(location, window, deep)  # of the readers only this one knows more than 8 bits
        if picture is not None:
            return WholeSlide(location, picture, given, partial(_reopen, window=window, deep=deep), picture.deep)
    if deep:
        raise UnsupportedSlide(
            f"{path} is no grey picture of 12 to 16 bits, which this model takes.", hint="is it the right model?"
        )
    return WholeSlide(location, _choose(location, reader), given, _reopen)


def _given(mpp: float | Mpp | None) -> Mpp | None:
    if mpp is None or isinstance(mpp, Mpp):
        return mpp
    try:
        return Mpp.square(mpp)
    except ValueError:
        message = f"the µm/px given for the slide must be a positive number, not {mpp}."
        raise ResolutionError(message, hint="40× scans have about 0.25 µm/px, 20× scans about 0.5.") from None


def _reopen(
    path: str, mpp: Mpp | None, reader: str, window: tuple[float, float] | None = None, deep: bool = False
) -> WholeSlide:
    return open_slide(path, mpp=mpp, reader=reader, window=window, deep=deep)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise SlideNotFound(f"{path} is a folder, not a slide.", hint="name one of the slides inside it.")
    if not path.exists():
        raise SlideNotFound(f"there is no file {path}.", hint="check the path and its spelling.")
    if path.stat().st_size == 0:
        raise UnreadableSlide(f"{path} is empty (0 bytes).", hint="copy it again from its origin.")


def _choose(path: str, wanted: str | None) -> LevelReader:
    """The first way of reading that takes the file; ``wanted`` insists on one."""
    if wanted is not None and wanted not in _READERS:
        raise ValueError(f"reader is one of {', '.join(_READERS)}, not {wanted!r}")
    check_directories(path)
    for name in (wanted,) if wanted else _READERS:
        reader = _READERS[name](path)
        if reader is not None:
            _check_levels(path, reader.info)
            return reader
    raise refusal(path)


def _check_levels(path: str, info: SlideInfo) -> None:
    """Every level shows the whole slide, smaller: where its sides say otherwise, what is read would be misplaced."""
    full = info.size_l0
    for index, level in enumerate(info.levels):
        ratio_y, ratio_x = full.height / level.size.height, full.width / level.size.width
        slack = _ASPECT_SLACK + 2 / min(level.size.shape)  # writers round sizes up or down
        if min(ratio_y, ratio_x) < 1 or not 1 / (1 + slack) < ratio_y / ratio_x < 1 + slack:
            raise UnreadableSlide(
                f"{path} contradicts itself: its full size is {full}, but level {index} has {level.size}.",
                hint="the file is damaged: copy it again from its origin.",
            )


def _direct(path: str) -> LevelReader | None:
    from wsiengine.slides.direct import DirectReader

    if _vendor(path) not in (None, "aperio", "generic-tiff"):
        return None  # a layout with rules of its own
    source = open_source(path)
    tiff = parse_tiled(source) if source.read(0, min(4, source.length_bytes)) in MAGICS else None
    if tiff is None:
        source.close()
        return None
    return DirectReader(source, tiff)


def _openslide(path: str) -> LevelReader | None:
    from wsiengine.slides.openslide import OpenSlideReader

    vendor = _vendor(path)
    if vendor is None or (vendor == "generic-tiff" and not first_page_is_the_slide(path)):
        return None
    return OpenSlideReader(path)


def _flat(path: str) -> LevelReader | None:
    return None if is_url(path) else open_flat(path)


def _tiffslide(path: str) -> LevelReader | None:
    with open_source(path) as source:
        if source.read(0, min(4, source.length_bytes)) not in MAGICS:
            return None
    from wsiengine.slides.tiffslide import open_tiffslide

    return open_tiffslide(path)


def _vendor(path: str) -> str | None:
    """OpenSlide's word for the format; it reads local files only."""
    if is_url(path):
        return None
    from wsiengine.slides.openslide import detect

    return detect(path)


_READERS: dict[str, Callable[[str], LevelReader | None]] = {
    "direct": _direct,
    "openslide": _openslide,
    "flat": _flat,
    "tiffslide": _tiffslide,
}
