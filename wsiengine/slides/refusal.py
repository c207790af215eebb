"""Saying in words what a file is, when it is no slide that we can use."""

import tifffile

from wsiengine.errors import SlideError, UnreadableSlide, UnsupportedSlide
from wsiengine.slides.sources import open_source, open_tiff
from wsiengine.slides.tiff import MAGICS

_CONVERT = "export the slide as brightfield RGB (SVS, or pyramidal TIFF with JPEG compression)."
_AXES = {"C": "channels", "Z": "focal planes", "T": "time points", "S": "samples per pixel", "I": "pages", "Q": "pages"}
_GREY_DICOM = "check that the right file was named; a grey image, such as a mammogram, needs pydicom: wsiengine[dicom]."
_KINDS = {"u": "unsigned integers", "i": "signed integers", "f": "floating-point numbers", "b": "bits"}


def refusal(path: str) -> SlideError:
    """The error that says what the file is and what we needed."""
    with open_source(path) as source:
        head = source.read(0, min(512, source.length_bytes))
    if head[:4] in MAGICS:
        return _tiff_refusal(path)
    dicom = head[128:132] == b"DICM"
    if dicom:
        what = "is a DICOM file, but not a whole-slide image that OpenSlide reads"
    elif head.isascii() and b"\0" not in head:
        what = "is a text file, not a slide"
    else:
        what = "is in no format known here"
    return UnsupportedSlide(
        f"{path} {what} (its first bytes are {head[:4].hex(' ')}).",
        hint=_GREY_DICOM if dicom else "check that the right file was named; docs/formats.md lists what can be read.",
    )


def _tiff_refusal(path: str) -> SlideError:
    try:
        with open_tiff(path) as tiff:
            series = tiff.series[0]
            sizes = dict(zip(series.axes, series.shape, strict=True))
            depth, kind = series.dtype.itemsize * 8, series.dtype.kind
    except (tifffile.TiffFileError, RuntimeError, ValueError, IndexError, KeyError):
        return UnreadableSlide(
            f"{path} is a TIFF file whose table of contents is damaged or lies beyond the file's end.",
            hint="the file looks truncated: copy it again from its origin.",
        )
    if (depth, kind) == (8, "u") and {a: n for a, n in sizes.items() if a not in "YX"} == {"S": 3}:
        return UnreadableSlide(
            f"{path} is a colour image of {sizes.get('X', 0):,} × {sizes.get('Y', 0):,} px, but its tables do not fit "
            "together: none of our readers can make sense of it.",
            hint="the file is damaged: copy it again from its origin.",
        )
    stack = [f"{count} {_AXES.get(axis, 'images')}" for axis, count in sizes.items() if axis not in "YX" and count > 1]
    parts = [f"{sizes.get('X', 0):,} × {sizes.get('Y', 0):,} px", *stack, f"{depth}-bit {_KINDS.get(kind, 'numbers')}"]
    looks = " It looks like a fluorescence or multi-plane stack." if "channels" in " ".join(stack) else ""
    return UnsupportedSlide(
        f"{path} is not a brightfield slide: it holds {', '.join(parts)}; we need one plane of 8-bit RGB.{looks}",
        hint=_CONVERT,
    )
