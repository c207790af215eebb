"""Opening slides: :func:`open_slide` chooses the way to read and says which."""

import os
from collections.abc import Callable
from pathlib import Path

from wsiengine.errors import SlideNotFound, UnreadableSlide, UnsupportedSlide
from wsiengine.geometry import Mpp
from wsiengine.slides.base import LevelReader, Slide, SlideInfo
from wsiengine.slides.sources import is_url, open_source
from wsiengine.slides.whole import WholeSlide

__all__ = ["Slide", "SlideInfo", "open_slide"]


def open_slide(
    path: str | os.PathLike[str], *, mpp: float | Mpp | None = None, reader: str | None = None
) -> WholeSlide:
    """Open a slide with the fastest way of reading that knows its format (``slide.info.reader`` names it).

    Args:
        path: File or fsspec URL.
        mpp: µm per level-0 pixel, overriding the file.
        reader: "direct", "openslide", "tiffslide" or "flat" to insist on one.

    Raises:
        SlideNotFound: No such file, or a folder.
        UnsupportedSlide: Not a brightfield slide, or a format that nobody here reads.
        UnreadableSlide: Damaged, truncated, or not permitted.
    """
    location = str(path) if is_url(str(path)) else os.fspath(path)
    given = Mpp.square(mpp) if isinstance(mpp, int | float) else mpp
    if not is_url(location):
        _check_file(Path(location))
    return WholeSlide(location, _choose(location, reader), given, _reopen)


def _reopen(path: str, mpp: Mpp | None, reader: str) -> WholeSlide:
    return open_slide(path, mpp=mpp, reader=reader)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise SlideNotFound(f"{path} is a folder, not a slide.", hint="name one of the slides inside it.")
    if not path.exists():
        raise SlideNotFound(f"there is no file {path}.", hint="check the path and its spelling.")
    if path.stat().st_size == 0:
        raise UnreadableSlide(f"{path} is empty (0 bytes).", hint="copy it again from its origin.")


def _choose(path: str, wanted: str | None) -> LevelReader:
    """The first way of reading that takes the file; ``wanted`` insists on one."""
    for name in (wanted,) if wanted else _READERS:
        reader = _READERS[name](path)
        if reader is not None:
            return reader
    raise UnsupportedSlide(f"{path} cannot be read by “{wanted}”.", hint="leave the choice of the reader open.")


def _direct(path: str) -> LevelReader | None:
    from wsiengine.slides.direct import DirectReader
    from wsiengine.slides.tiff import MAGICS, parse_tiled

    if not is_url(path):
        from wsiengine.slides.openslide import detect

        if detect(path) not in (None, "aperio", "generic-tiff"):
            return None  # a layout with rules of its own
    source = open_source(path)
    tiff = parse_tiled(path, source.length_bytes) if source.read(0, 4) in MAGICS else None
    if tiff is None:
        source.close()
        return None
    return DirectReader(source, tiff)


def _openslide(path: str) -> LevelReader | None:
    from wsiengine.slides.openslide import OpenSlideReader

    return OpenSlideReader(path)


_READERS: dict[str, Callable[[str], LevelReader | None]] = {"direct": _direct, "openslide": _openslide}
