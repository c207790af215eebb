"""What every reader of annotated images returns: one frozen type, whatever the file said.

Coordinates are pixels of the image as it is stored, measured at pixel edges: a box that covers the first pixel alone is
(0, 0, 1, 1). Boxes are (x0, y0, x1, y1), as the formats that are read here and the networks have them; every name that
holds such boxes ends in ``_xyxy``.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from wsiengine.errors import WsiError

NO_FOLD = -1
YES, NO, UNKNOWN = 1, 0, -1
"""How one type of a multi-label object is annotated."""


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """The annotated objects of one image.

    Attributes:
        boxes_xyxy: (N, 4) float64.
        labels: (N,) int64, index into the set's classes.
        ignored: (N,) bool: neither finding nor missing it counts (crowds, cut or doubtful objects).
        rings: For each object its outline, (K, 2) float64 (x, y), or None where only the box is known.
        types: (N, T) int8, :data:`YES`, :data:`NO` or :data:`UNKNOWN` for every type of the set; T = 0 without types.
    """

    boxes_xyxy: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    rings: tuple[np.ndarray | None, ...]
    types: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(
        cls,
        boxes_xyxy: Any,
        labels: Sequence[int],
        *,
        ignored: Sequence[bool] | None = None,
        rings: Sequence[np.ndarray | None] | None = None,
        types: Any = None,
    ) -> "Objects":
        """From lists; what is left out is empty."""
        count = len(labels)
        said = np.zeros((count, 0), np.int8) if types is None else np.asarray(types, np.int8)
        return cls(
            np.asarray(boxes_xyxy, np.float64).reshape(count, 4),
            np.asarray(labels, np.int64).reshape(count),
            np.zeros(count, bool) if ignored is None else np.asarray(ignored, bool).reshape(count),
            tuple(rings) if rings is not None else (None,) * count,
            said if said.ndim == 2 else said.reshape(count, -1 if count else 0),
        )

    def outline(self, index: int) -> np.ndarray:
        """The ring of an object, or the corners of its box: (K, 2) float64 (x, y)."""
        ring = self.rings[index]
        if ring is not None:
            return ring
        x0, y0, x1, y1 = self.boxes_xyxy[index]
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


@dataclass(frozen=True, slots=True, eq=False)
class Annotated:
    """One image and what was annotated in it.

    Attributes:
        image: Its file; :func:`wsiengine.datasets.images.read_pixels` reads it.
        objects: What is in it; none is an annotation, too.
        case: Patient or case: the unit of every split.
        fold: 0 to 4, or :data:`NO_FOLD`.
        mpp_yx: µm per pixel down and across, where known.
        facts: What else the file says of the image (findings, side, view), for reports.
    """

    image: Path
    objects: Objects
    case: str
    fold: int = NO_FOLD
    mpp_yx: tuple[float, float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class DetectionSet:
    """Annotated images.

    Attributes:
        classes: Of the objects.
        images: Each with its objects.
        types: What else an object may be, several at once; none in most sets.
        normal: Index of the type that means normal, where there is one: all others are abnormal.
    """

    classes: tuple[str, ...]
    images: tuple[Annotated, ...]
    types: tuple[str, ...] = ()
    normal: int | None = None

    def chosen(self, folds: Iterable[int] | None) -> "DetectionSet":
        """The images of these folds (all of them for None).

        Raises:
            WsiError: There are none.
        """
        if folds is None:
            return self
        wanted = set(folds)
        images = tuple(image for image in self.images if image.fold in wanted)
        if not images:
            raise WsiError(
                f"no annotated image is in folds {', '.join(map(str, sorted(wanted)))}", hint="check the folds"
            )
        return replace(self, images=images)

    @property
    def objects(self) -> int:
        """How many objects count."""
        return sum(int((~image.objects.ignored).sum()) for image in self.images)


def bounds_xyxy(ring: np.ndarray) -> tuple[float, float, float, float]:
    """The box round (K, 2) points."""
    (x0, y0), (x1, y1) = ring.min(axis=0).tolist(), ring.max(axis=0).tolist()
    return x0, y0, x1, y1


def damaged(file: Path, why: str, hint: str = "copy the file again") -> WsiError:
    """The error of every reader here: which file, and what is wrong with it."""
    return WsiError(f"{file} cannot be read: {why}", hint=hint)


def check_box(file: Path, box_xyxy: Sequence[float]) -> None:
    """Refuse a box without an area, or with a number that is none.

    Raises:
        WsiError: Naming the file and the box.
    """
    x0, y0, x1, y1 = box_xyxy
    if not all(math.isfinite(v) for v in box_xyxy) or x1 <= x0 or y1 <= y0:
        said = ", ".join(f"{v:g}" for v in box_xyxy)
        raise damaged(file, f"a box ends before it starts: {said}", "correct the box")
