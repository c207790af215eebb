"""Labelled fields of tissue for training: what is on disk, at which resolution, of whom.

Every field is brought to the model's µm/px once, when it is loaded: downwards by area mean, upwards linearly. The unit
of every split is the case (or patient), never the tile.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from wsiengine.errors import UnreadableSlide, WsiError

CLASSES = ("Normal", "Adenoma", "Adenocarcinoma")
POLYP = "Polyp"
"""Non-neoplastic, outside the main score; trains the Normal output (see docs/crc5.md)."""

_LABELS = {
    "Normal": "Normal",
    "healthy": "Normal",
    "Low-grade IN": "Adenoma",
    "High-grade IN": "Adenoma",
    "Serrated adenoma": "Adenoma",
    "adenomatous": "Adenoma",
    "Adenocarcinoma": "Adenocarcinoma",
    "moderately differentiated": "Adenocarcinoma",
    "moderately-to-poorly differentiated": "Adenocarcinoma",
    "poorly differentiated": "Adenocarcinoma",
    "Polyp": POLYP,
}
MPP_YX = {"ebhi": (0.96, 1.21), "glas": (0.62, 0.62), "lc25000": (0.67, 0.67)}
"""µm per pixel (y, x) of each set; EBHI's and LC25000's as :mod:`wsiengine.training.scale` measures them."""


@dataclass(frozen=True)
class Field:
    """One labelled image.

    Attributes:
        image: RGB file.
        mask: Epithelium (glands with their lumen), non-zero inside; None where nobody drew it.
        source: Which set it comes from.
        label: Class name, or :data:`POLYP`.
        finding: The set's own word for it.
        case: Case or patient, unique across sets.
        fold: Fixed fold, 0 to 4.
        mpp_yx: µm per pixel down and across.
        slide: The slide that it was cut from, where the set names one.
    """

    image: Path
    mask: Path | None
    source: str
    label: str
    finding: str
    case: str
    fold: int
    mpp_yx: tuple[float, float]
    slide: str = ""


@dataclass(frozen=True)
class Pixels:
    """A field in memory at the model's µm/px: image uint8 (rows, cols, 3), mask uint8 0–255 (rows, cols) or None."""

    field: Field
    image: np.ndarray
    mask: np.ndarray | None


def read_fields(data: Path, sources: Sequence[str] = ("ebhi", "glas", "lc25000")) -> list[Field]:
    """All fields of the colorectal sets below ``data/crc``.

    Raises:
        WsiError: A labels.csv is missing, or holds a label nobody knows.
    """
    fields = []
    for source in sources:
        table = data / "crc" / source / "labels.csv"
        if not table.is_file():
            raise WsiError(f"{table} is missing", hint="point --data at the folder that holds crc/, weights/ and wsi/")
        with table.open(newline="", encoding="utf-8") as lines:
            fields += [_field(table.parent, source, row) for row in csv.DictReader(lines)]
    return fields


def _field(folder: Path, source: str, row: dict[str, str]) -> Field:
    finding = row.get("class") or row["grade"]
    if finding not in _LABELS:
        raise WsiError(
            f"{folder / 'labels.csv'} calls {row['file']} '{finding}', which is none of {', '.join(_LABELS)}",
            hint="correct the label",
        )
    case = row.get("case") or row["patient"]
    return Field(
        image=folder / row["file"],
        mask=folder / row["mask"] if row.get("mask") else None,
        source=source,
        label=_LABELS[finding],
        finding=finding,
        case=f"{source}:{case}",
        fold=int(row["fold"]),
        mpp_yx=MPP_YX[source],
    )


def check_leak(train: Iterable[Field], test: Iterable[Field]) -> None:
    """Refuse a split that has one case on both sides.

    Raises:
        WsiError: Naming up to five of the shared cases.
    """
    shared = sorted({field.case for field in train} & {field.case for field in test})
    if shared:
        raise WsiError(
            f"{len(shared)} cases are in training and in test: {', '.join(shared[:5])}",
            hint="split by case, so that no case is on both sides",
        )


def read_image(file: Path) -> np.ndarray:
    """RGB uint8 (rows, cols, 3).

    Raises:
        UnreadableSlide: Missing, or no image.
    """
    image = cv2.imread(str(file), cv2.IMREAD_COLOR)
    if image is None:
        raise UnreadableSlide(f"{file} cannot be read as an image", hint="remove it from labels.csv or replace it")
    return np.ascontiguousarray(image[:, :, ::-1])


def read_mask(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Mask uint8 (rows, cols), 255 inside and 0 outside.

    Args:
        file: Greyscale image; whatever is not black is inside.
        shape: Of its image.

    Raises:
        UnreadableSlide: Missing, no image, or of another size.
    """
    mask = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
    if mask is None or mask.shape != tuple(shape[:2]):
        got = "cannot be read" if mask is None else f"is {mask.shape[1]} × {mask.shape[0]} px"
        raise UnreadableSlide(
            f"the mask {file} {got}; its image is {shape[1]} × {shape[0]} px", hint="a mask has the size of its image"
        )
    return np.where(mask > 0, 255, 0).astype(np.uint8)


def load(field: Field, mpp: float) -> Pixels:
    """Read one field and bring it to ``mpp`` µm/px.

    Raises:
        UnreadableSlide: The image or its mask cannot be read, or they differ in size.
    """
    image = read_image(field.image)
    mask = None
    if field.mask is not None:
        mask = resample(read_mask(field.mask, image.shape), field.mpp_yx, mpp)
    return Pixels(field, resample(image, field.mpp_yx, mpp), mask)


def resample(image: np.ndarray, mpp_yx: tuple[float, float], mpp: float) -> np.ndarray:
    """Bring an image from (y, x) µm/px to square pixels of ``mpp``, one axis after the other."""
    rows, cols = (max(1, round(n * have / mpp)) for n, have in zip(image.shape[:2], mpp_yx, strict=True))
    for width, height in ((cols, image.shape[0]), (cols, rows)):
        smaller = width < image.shape[1] or height < image.shape[0]
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    return image


def rescaled(fields: Iterable[Field], factor: float) -> list[Field]:
    """The same fields, as if their µm/px were ``factor`` times as large: shows what a wrong scale costs."""
    return [replace(f, mpp_yx=(f.mpp_yx[0] * factor, f.mpp_yx[1] * factor)) for f in fields]
