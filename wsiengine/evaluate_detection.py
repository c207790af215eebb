"""How well objects are found: average precision, FROC, overlap, counts; arrays in, numbers out.

Matching is COCO's (Lin et al. 2014): objects in falling order of score each take the free annotation that they
overlap most, if by at least the threshold; what lies on an ignored annotation counts neither way. :func:`match` is done
once for an image; every figure, also of a resampled set, is then a function of the matches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

COCO_IOUS = tuple(np.linspace(0.5, 0.95, 10).round(2).tolist())
FPPI = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """The objects found in one image, by falling score.

    Attributes:
        scores: (N,) float64.
        hits: (N,) bool: matched to an annotation.
        counted: (N,) bool: neither on an ignored annotation.
        overlap: (N,) float64: IoU with the annotation matched, else 0.
        ratio: (N,) float64: the mammogram study's overlapping ratio, intersection over the found box, else 0.
        true: Annotations that count.
    """

    scores: np.ndarray
    hits: np.ndarray
    counted: np.ndarray
    overlap: np.ndarray
    ratio: np.ndarray
    true: int


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its bounds of 95 %, from resampled cases."""

    value: float
    low: float
    high: float


def intersections(first_xyxy: np.ndarray, second_xyxy: np.ndarray) -> np.ndarray:
    """Shared areas, (N, 4) × (M, 4) → (N, M) float64."""
    near = np.maximum(first_xyxy[:, None, :2], second_xyxy[None, :, :2])
    far = np.minimum(first_xyxy[:, None, 2:], second_xyxy[None, :, 2:])
    return np.prod(np.clip(far - near, 0, None), axis=2)


def areas(boxes_xyxy: np.ndarray) -> np.ndarray:
    """(N, 4) → (N,) float64."""
    return np.prod(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], axis=1)


def match(
    found_xyxy: np.ndarray, scores: np.ndarray, true_xyxy: np.ndarray, ignored: np.ndarray, iou: float = 0.5
) -> Matches:
    """Match the objects found in an image with its annotations of the same class.

    Args:
        found_xyxy: (N, 4) float.
        scores: (N,) float.
        true_xyxy: (M, 4) float.
        ignored: (M,) bool; on these, being inside by ``iou`` of the found box is enough.
        iou: Least overlap of a match.
    """
    found_xyxy, true_xyxy = np.asarray(found_xyxy, np.float64), np.asarray(true_xyxy, np.float64)
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    found_xyxy = found_xyxy[order]
    shared = intersections(found_xyxy, true_xyxy)
    own = areas(found_xyxy)[:, None]
    union = np.where(ignored[None], own, own + areas(true_xyxy)[None] - shared)
    overlap = shared / np.maximum(union, 1e-12)
    count = len(order)
    hits, counted = np.zeros(count, bool), np.ones(count, bool)
    best, ratio = np.zeros(count), np.zeros(count)
    free = ~ignored
    least = min(iou, 1 - 1e-10)
    for i in range(count):
        open_to_all = np.where(free, overlap[i], -1.0)
        # The last of equals, as COCO's own program takes it.
        j = len(free) - 1 - int(np.argmax(open_to_all[::-1])) if len(free) else -1
        if j >= 0 and open_to_all[j] >= least:
            hits[i], free[j] = True, False
            best[i], ratio[i] = overlap[i, j], shared[i, j] / max(own[i, 0], 1e-12)
        elif (overlap[i, ignored] >= least).any():
            counted[i] = False
    return Matches(np.asarray(scores, np.float64)[order], hits, counted, best, ratio, int((~ignored).sum()))


def precision_recall(matches: Sequence[Matches]) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall after every counted object, by falling score: (N,), (N,); recall NaN without annotations."""
    scores, hits = _joined(matches)
    order = np.argsort(-scores, kind="mergesort")
    right = np.cumsum(hits[order])
    total = sum(m.true for m in matches)
    return right / np.arange(1, len(order) + 1), right / (total if total else np.nan)


def average_precision(matches: Sequence[Matches], rule: str = "coco") -> float:
    """Area under precision over recall; NaN where nothing is annotated.

    Args:
        matches: Of all images.
        rule: ``coco``: the mean at 101 recalls, of the best precision at that recall or beyond. ``voc``: the whole area
            (Everingham et al. 2010).
    """
    if rule not in ("coco", "voc"):
        raise ValueError(f"no rule {rule!r}: use coco or voc")
    precision, recall = precision_recall(matches)
    if not sum(m.true for m in matches):
        return float("nan")
    if not len(precision):
        return 0.0
    best = np.maximum.accumulate(precision[::-1])[::-1]
    if rule == "voc":
        return float(np.sum(np.diff(recall, prepend=0.0) * best))
    at = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return float(np.mean(np.where(at < len(best), best[np.minimum(at, len(best) - 1)], 0.0)))


def froc(matches: Sequence[Matches]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Free-response curve by falling score: false positives per image, sensitivity, score; each (N,)."""
    scores, hits = _joined(matches)
    order = np.argsort(-scores, kind="mergesort")
    total = sum(m.true for m in matches)
    right, wrong = np.cumsum(hits[order]), np.cumsum(~hits[order])
    # Objects of equal score come and go together.
    last = np.append(np.diff(scores[order]) != 0, True)[: len(order)]
    return wrong[last] / max(1, len(matches)), right[last] / (total if total else np.nan), scores[order][last]


def sensitivity_at(matches: Sequence[Matches], fppi: float) -> float:
    """The best sensitivity with at most so many false positives per image; 0 where none is so strict."""
    wrong, right, _ = froc(matches)
    allowed = right[wrong <= fppi]
    return float(allowed[-1]) if len(allowed) else 0.0 if sum(m.true for m in matches) else float("nan")


def at_score(matches: Sequence[Matches], score: float) -> dict[str, float]:
    """Figures of the objects of at least ``score``.

    Returns:
        ``precision``, ``recall``, ``f1``, ``fppi``; ``iou`` and ``overlapping_ratio``, means over the hits;
        ``counting_error``, the mean difference |found − annotated| per image, and ``counting_error_relative``, the same
        as part of all annotations. NaN where undefined.
    """
    used = [m.counted & (m.scores >= score) for m in matches]
    right = sum(int(m.hits[u].sum()) for m, u in zip(matches, used, strict=True))
    found, true = sum(int(u.sum()) for u in used), sum(m.true for m in matches)
    off = [abs(int(u.sum()) - m.true) for m, u in zip(matches, used, strict=True)]
    hit = [m.hits & u for m, u in zip(matches, used, strict=True)]
    return {
        "precision": _ratio(right, found),
        "recall": _ratio(right, true),
        "f1": _ratio(2 * right, found + true),
        "fppi": _ratio(found - right, len(matches)),
        "iou": _ratio(sum(float(m.overlap[h].sum()) for m, h in zip(matches, hit, strict=True)), right),
        "overlapping_ratio": _ratio(sum(float(m.ratio[h].sum()) for m, h in zip(matches, hit, strict=True)), right),
        "counting_error": _ratio(sum(off), len(matches)),
        "counting_error_relative": _ratio(sum(off), true),
    }


def case_interval(
    matches: Sequence[Matches],
    cases: Sequence[str],
    figure: Callable[[Sequence[Matches]], float],
    *,
    rounds: int = 300,
    seed: int = 0,
) -> Interval:
    """A figure and its 95 % interval by resampling whole cases (percentile bootstrap).

    Args:
        matches: One for each image.
        cases: The case of each image.
        figure: Matches → number.
        rounds: Resamplings.
        seed: Of them.
    """
    of_case: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        of_case.setdefault(case, []).append(index)
    groups = [of_case[case] for case in sorted(of_case)]
    random = np.random.default_rng(seed)
    values = []
    for _ in range(rounds):
        drawn = [i for g in random.integers(len(groups), size=len(groups)) for i in groups[g]]
        values.append(figure([matches[i] for i in drawn]))
    finite = np.array([v for v in values if np.isfinite(v)])
    low, high = np.percentile(finite, [2.5, 97.5]).tolist() if len(finite) else (float("nan"), float("nan"))
    return Interval(figure(matches), low, high)


def _joined(matches: Sequence[Matches]) -> tuple[np.ndarray, np.ndarray]:
    scores = np.concatenate([m.scores[m.counted] for m in matches] or [np.zeros(0)])
    return scores, np.concatenate([m.hits[m.counted] for m in matches] or [np.zeros(0, bool)])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
