"""How well found objects match drawn ones: the measures of the GlaS challenge.

After Sirinukunwattana et al. 2017 (*Gland segmentation in colon histology images: the GlaS challenge contest*, Medical
Image Analysis 35): detection F1, object-level Dice and object-level Hausdorff distance. Sums run over all objects of
all images, as there. An object's counterpart is the one that shares most of its pixels with it, the lower number on a
tie. Pure numpy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

Distance = Callable[[int, int | None], float]  # of an object and one of the other map, or none


@dataclass(frozen=True, slots=True)
class ObjectScores:
    """The measures over a set of images.

    Attributes:
        f1: 2 TP / (2 TP + FP + FN): a found object is true where it covers half of its drawn counterpart.
        precision, recall: TP / (TP + FP) and TP / (TP + FN).
        dice: Mean of the Dice overlap of each drawn object with its counterpart and of each found object with its,
            each weighted by area.
        hausdorff_px: The same mean of Hausdorff distances, pixels; an object without counterpart counts the distance to
            the nearest object of the other kind in its image (without any: the image's diagonal).
        drawn, found: Objects.
    """

    f1: float
    precision: float
    recall: float
    dice: float
    hausdorff_px: float
    drawn: int
    found: int


@dataclass(frozen=True, slots=True, eq=False)
class ImageScores:
    """What one image adds: TP, FP, FN, and per object its area, Dice and Hausdorff distance (n, 3), both ways."""

    true: int
    false: int
    missed: int
    drawn: np.ndarray
    found: np.ndarray


def score_image(drawn: np.ndarray, found: np.ndarray) -> ImageScores:
    """Compare two maps of objects.

    Args:
        drawn: int (rows, cols): 0 = none, 1 … n (numbers may be missing): the truth.
        found: The same shape.

    Raises:
        ValueError: The maps differ in shape.
    """
    if drawn.shape != found.shape:
        raise ValueError(f"the maps are {drawn.shape} and {found.shape}")
    (one, ones), (two, twos) = _numbered(drawn), _numbered(found)
    shared = np.zeros((ones + 1, twos + 1), np.int64)
    np.add.at(shared, (one, two), 1)
    shared_areas = shared[1:, 1:]
    areas, other_areas = shared[1:].sum(axis=1), shared[:, 1:].sum(axis=0)
    true = _true_objects(shared_areas, areas)
    distances = _Distances(one, two)
    return ImageScores(
        true,
        twos - true,
        ones - true,
        _rows(shared_areas, areas, other_areas, distances.of),
        _rows(shared_areas.T, other_areas, areas, lambda j, i: distances.of(i, j)),
    )


def join(images: Sequence[ImageScores]) -> ObjectScores:
    """The measures over all images."""
    true, false, missed = (sum(getattr(image, name) for image in images) for name in ("true", "false", "missed"))
    drawn, found = (np.concatenate([getattr(image, name) for image in images]) for name in ("drawn", "found"))
    dice, hausdorff = (np.mean([_weighted(rows, column) for rows in (drawn, found)]) for column in (1, 2))
    return ObjectScores(
        f1=_ratio(2 * true, 2 * true + false + missed),
        precision=_ratio(true, true + false),
        recall=_ratio(true, true + missed),
        dice=float(dice),
        hausdorff_px=float(hausdorff),
        drawn=len(drawn),
        found=len(found),
    )


def _numbered(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels as 1 … n without gaps, 0 kept."""
    values, index = np.unique(labels, return_inverse=True)
    index = index.reshape(labels.shape)
    return (index, len(values) - 1) if len(values) and values[0] == 0 else (index + 1, len(values))


def _true_objects(shared: np.ndarray, areas: np.ndarray) -> int:
    """Found objects that cover at least half of their counterpart; a drawn object is found once."""
    hit = set()
    for j in range(shared.shape[1]):
        i = int(shared[:, j].argmax()) if shared.shape[0] else -1
        if i >= 0 and shared[i, j] > 0 and 2 * shared[i, j] >= areas[i]:
            hit.add(i)
    return len(hit)


def _rows(shared: np.ndarray, areas: np.ndarray, other_areas: np.ndarray, distance: Distance) -> np.ndarray:
    """Of each object: area, Dice and Hausdorff distance with its counterpart → (n, 3) float64."""
    rows = np.zeros((len(areas), 3))
    for i, area in enumerate(areas):
        j = int(shared[i].argmax()) if shared.shape[1] else -1
        if j >= 0 and shared[i, j] > 0:
            rows[i] = area, 2 * shared[i, j] / (area + other_areas[j]), distance(i, j)
        else:
            rows[i] = area, 0.0, min((distance(i, k) for k in range(shared.shape[1])), default=distance(i, None))
    return rows


class _Distances:
    """Hausdorff distances between objects of two maps, as sets of pixels; each is measured once."""

    def __init__(self, one: np.ndarray, two: np.ndarray) -> None:
        self._maps = (one, two)
        self._boxes = tuple(ndimage.find_objects(labels) for labels in (one, two))
        self._known: dict[tuple[int, int], float] = {}

    def of(self, i: int | None, j: int | None) -> float:
        if i is None or j is None:
            return float(np.hypot(*self._maps[0].shape))
        if (i, j) not in self._known:
            boxes = [self._boxes[0][i], self._boxes[1][j]]
            whole = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(*boxes, strict=True))
            a, b = self._maps[0][whole] == i + 1, self._maps[1][whole] == j + 1
            there, back = ndimage.distance_transform_edt(~b)[a].max(), ndimage.distance_transform_edt(~a)[b].max()
            self._known[i, j] = float(max(there, back))
        return self._known[i, j]


def _weighted(rows: np.ndarray, column: int) -> float:
    total = rows[:, 0].sum()
    return float((rows[:, 0] * rows[:, column]).sum() / total) if total else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
