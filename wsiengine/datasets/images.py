"""The pixels of an annotated image, whichever format the set comes in."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from wsiengine.datasets.rows import damaged

_DICOM = (".dcm", ".dicom")


def read_pixels(file: Path) -> np.ndarray:
    """RGB uint8 (rows, cols, 3); grey images three times the same, 16 bits scaled to the image's own range.

    Raises:
        WsiError: Missing, damaged, or in a form that is not read here.
    """
    if not file.is_file():
        raise damaged(file, "there is no such file", "correct the list, or copy the images beside it")
    if file.suffix.lower() in (*_DICOM, ".ljpeg"):
        return to_rgb8(_samples(file))
    pixels = cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    if pixels is None:
        raise damaged(file, "it is no image that can be decoded", "convert it to PNG, JPEG, TIFF or PGM")
    return to_rgb8(np.ascontiguousarray(pixels[..., ::-1]))


def _samples(file: Path) -> np.ndarray:
    """(rows, cols) uint8 or uint16 of a DICOM or LJPEG file."""
    if file.suffix.lower() in _DICOM:
        from wsiengine.datasets.dicom import read_dicom

        return read_dicom(file).pixels
    from wsiengine.datasets.ddsm import read_ljpeg

    return read_ljpeg(file)


def picture_size(file: Path) -> tuple[int, int] | None:
    """(width, height) by the file's header; None where it is no picture that Pillow knows."""
    try:
        with Image.open(file) as picture:
            return picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def to_rgb8(pixels: np.ndarray) -> np.ndarray:
    """uint8 RGB of grey or colour pixels of any depth; deeper ones go from their least value to their greatest."""
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        scale = 255.0 / (high - low) if high > low else 0.0
        pixels = np.rint((pixels.astype(np.float32) - low) * scale).astype(np.uint8)
    return np.ascontiguousarray(np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels)


@contextmanager
def openable(file: Path, *, deep: bool = False) -> Iterator[Path]:
    """A file that the engine's own readers take: the image itself, or for DICOM and LJPEG a copy while it is needed.

    With ``deep`` the copy has all of the image's bits, else 8.
    """
    if file.suffix.lower() not in (*_DICOM, ".ljpeg"):
        yield file
        return
    pixels = _samples(file) if deep else read_pixels(file)[..., ::-1]
    with tempfile.TemporaryDirectory(prefix="wsiengine-") as folder:
        copy = Path(folder) / f"{file.stem}.png"
        copy.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        yield copy
