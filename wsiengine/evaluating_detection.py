"""A detector against annotated images: through the very run that a slide gets, then AP, FROC, overlaps and counts.

The formulas are in :mod:`wsiengine.evaluate_detection`. What a second stage says of an object is compared with the
types of the annotation that the object was matched with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wsiengine.datasets.images import openable
from wsiengine.datasets.rows import NO, UNKNOWN, YES, Annotated, DetectionSet
from wsiengine.errors import WsiError
from wsiengine.evaluate import auroc
from wsiengine.evaluate_detection import (
    COCO_IOUS,
    FPPI,
    Matches,
    areas,
    at_score,
    average_precision,
    case_interval,
    intersections,
    match,
    sensitivity_at,
)
from wsiengine.geometry import Mpp
from wsiengine.identifying import Request, identify
from wsiengine.job import score_block
from wsiengine.journal import Recovered
from wsiengine.models.card import Card
from wsiengine.models.registry import load_model
from wsiengine.normalise import parse_recipe
from wsiengine.preparing import prepare
from wsiengine.slides import open_slide
from wsiengine.tasks.detect import DetectLayout, boxes_l0
from wsiengine.tasks.detection import objects_in
from wsiengine.truth import Truth

_ROUNDS = 200  # of the intervals
HIT_IOU = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The objects that a run finds in an image.

    Attributes:
        boxes_xyxy: (N, 4) float64, pixels of the image.
        scores: (N,) float64.
        labels: (N,) int64, index of the detector's class.
        stages: One (N, classes) float32 for each further stage: its probabilities.
    """

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    stages: tuple[np.ndarray, ...]


def find_in_image(row: Annotated, model: str, **options: Any) -> Found:
    """The objects that a run finds in an image, of all scores that the card keeps.

    Args:
        row: The image; its µm/px are used where known.
        model: Name or folder of a detector.
        **options: Fields of :class:`wsiengine.identifying.Request`.

    Raises:
        WsiError: Image or model cannot be used.
    """
    card = load_model(model)
    with openable(row.image, deep=card.input.deep) as file:
        tissue = card.tissue or "none"  # annotated fields are taken whole, unless the card says otherwise
        slide = open_slide(
            file,
            mpp=Mpp(*row.mpp_yx) if row.mpp_yx else None,
            window=parse_recipe(card.recipe).window,
            deep=card.input.deep,
        )
        try:
            plan = prepare(identify(Request(slide=slide, model=model, **{"tissue": tissue, **options}))).plan
            if plan.job is None or not isinstance(plan.layout, DetectLayout):
                raise ValueError("a plan without a detector's job")
            gathered = plan.task.gather(plan, Recovered({}, {}, ()))
            for block in plan.blocks():
                gathered.add(score_block(plan.job, block))
            objects = objects_in(Truth.of(plan, gathered.arrays(), None))
            widths = [len(stage.names) for stage in plan.layout.stages]
            parts = np.split(objects.extra, np.cumsum(widths)[:-1], axis=1) if widths else []
            boxes = boxes_l0(objects, plan.lattice)[:, [1, 0, 3, 2]]
            return Found(boxes, objects.scores.astype(np.float64), objects.labels.astype(np.int64), tuple(parts))
        finally:
            slide.close()


def score_detector(
    found: DetectionSet,
    card: Card,
    model: str,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> dict[str, Any]:
    """All figures of a detector on annotated images, as JSON.

    Args:
        found: The images.
        card: The model's card.
        model: Its name or folder.
        progress: Called with images done and images in all.
        **options: Fields of :class:`wsiengine.identifying.Request`.

    Raises:
        WsiError: No class of the images is one of the model's.
    """
    pairs = same_classes(found.classes, [c.asserted_as or c.name for c in card.classes])
    answers = []
    for row in found.images:
        answers.append(find_in_image(row, model, **options))
        progress(len(answers), len(found.images))
    shown = card.detection.show_score if card.detection else 0.5
    cases = [row.case for row in found.images]
    classes = {}
    for name, (own, true) in pairs.items():
        matches = {iou: _matches(found.images, answers, (own, true), iou) for iou in COCO_IOUS}
        classes[name] = class_figures(matches, cases, shown)
    report = {"images": len(found.images), "cases": len(set(cases)), "shown_from": shown, "classes": classes}
    if found.types and card.second:
        report |= _second_stage(found, answers, DetectLayout.of(card))
    return report


def same_classes(annotated: Sequence[str], known: Sequence[str]) -> dict[str, tuple[int, int]]:
    """For each class: its index in the model and in the set. One class here and one there are the same.

    Raises:
        WsiError: They have none in common.
    """
    if len(annotated) == len(known) == 1:
        return {known[0]: (0, 0)}
    pairs = {name: (known.index(name), k) for k, name in enumerate(annotated) if name in known}
    if not pairs:
        raise WsiError(
            f"no class of the data ({', '.join(annotated)}) is a class of the model ({', '.join(known)})",
            hint=f'say which is which: --map "{annotated[0] if annotated else "LABEL"}={known[0]}"',
        )
    return pairs


def _matches(rows: Sequence[Annotated], answers: Sequence[Found], labels: tuple[int, int], iou: float) -> list[Matches]:
    own, true = labels
    matches = []
    for row, answer in zip(rows, answers, strict=True):
        mine, theirs = answer.labels == own, row.objects.labels == true
        matches.append(
            match(
                answer.boxes_xyxy[mine],
                answer.scores[mine],
                row.objects.boxes_xyxy[theirs],
                row.objects.ignored[theirs],
                iou,
            )
        )
    return matches


def class_figures(matches: Mapping[float, Sequence[Matches]], cases: Sequence[str], shown: float) -> dict[str, Any]:
    """AP, FROC, overlaps and counts of one class.

    Args:
        matches: For each IoU, those of every image.
        cases: The case of each image.
        shown: The score from which the card shows objects.
    """
    usual = matches[HIT_IOU]

    def figure(of: Callable[[Sequence[Matches]], float]) -> dict[str, float | None]:
        found = case_interval(usual, cases, of, rounds=_ROUNDS)
        return {"low": _number(found.low), "value": _number(found.value), "high": _number(found.high)}

    return {
        "annotated": sum(m.true for m in usual),
        "found": sum(int((m.counted & (m.scores >= shown)).sum()) for m in usual),
        "ap50": figure(average_precision),
        "ap50_voc": _number(average_precision(usual, "voc")),
        "ap": _number(float(np.mean([average_precision(m) for m in matches.values()]))),
        "sensitivity_at_fppi": {str(f): figure(lambda m, f=f: sensitivity_at(m, f)) for f in FPPI},  # type: ignore[misc]
        "at_shown_score": {name: _number(value) for name, value in at_score(usual, shown).items()},
    }


def _second_stage(found: DetectionSet, answers: Sequence[Found], layout: DetectLayout) -> dict[str, Any]:
    """Types and, if there is a head, normal or abnormal, of objects that were matched with an annotation."""
    stage = layout.stages[0]
    columns = [(found.types.index(name), k) for k, name in enumerate(stage.names) if name in found.types]
    if not columns:
        return {}
    true, probability, image, state = _paired(found, answers)
    types = {found.types[t]: _ranking(true[:, t], probability[:, k], image) for t, k in columns}
    known = [t for t, _ in columns]
    whole = (true[:, known] != UNKNOWN).all(axis=1)
    said = probability[:, [k for _, k in columns]] >= stage.threshold
    right = (said[whole] == (true[whole][:, known] == YES)).all(axis=1)
    report: dict[str, Any] = {
        "matched": len(true),
        "types": types,
        "exact_match": {"patches": int(whole.sum()), "value": _number(float(right.mean())) if len(right) else None},
    }
    if state is not None and found.normal is not None:
        others = np.delete(true, found.normal, axis=1)
        normal = np.where((others == YES).any(axis=1), YES, np.where((others == NO).all(axis=1), NO, UNKNOWN))
        report["abnormal"] = _two_classes(normal, state, image)
    return report


def _paired(
    found: DetectionSet, answers: Sequence[Found]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Of matched objects: true types, the second stage's probabilities, image, the head's last probability."""
    true, probability, image, state = [], [], [], []
    for index, (row, answer) in enumerate(zip(found.images, answers, strict=True)):
        for k, j in pairs_of(answer, row):
            true.append(row.objects.types[j])
            probability.append(answer.stages[0][k])
            image.append(index)
            if len(answer.stages) > 1:
                state.append(float(answer.stages[1][k, -1]))
    width = answers[0].stages[0].shape[1]
    return (
        np.array(true, np.int8).reshape(-1, len(found.types)),
        np.array(probability, np.float64).reshape(-1, width),
        np.array(image, np.int64),
        np.array(state) if state else None,
    )


def pairs_of(answer: Found, row: Annotated) -> list[tuple[int, int]]:
    """Which object is which annotation: the best first, each to the free one that it overlaps most, from IoU 0.5 on."""
    shared = intersections(answer.boxes_xyxy, row.objects.boxes_xyxy)
    union = areas(answer.boxes_xyxy)[:, None] + areas(row.objects.boxes_xyxy)[None] - shared
    overlap = shared / np.maximum(union, 1e-12)
    overlap[:, row.objects.ignored] = 0
    pairs = []
    for k in np.argsort(-answer.scores, kind="stable").tolist():
        if overlap.shape[1] and overlap[k].max() >= HIT_IOU:
            j = int(overlap[k].argmax())
            pairs.append((k, j))
            overlap[:, j] = 0
    return pairs


def _ranking(true: np.ndarray, probability: np.ndarray, image: np.ndarray) -> dict[str, Any]:
    """AUC of one type where it is known, with its interval by image."""
    known = true != UNKNOWN
    positive, probability, image = true[known] == YES, probability[known], image[known]
    low, high = _interval(lambda w: auroc(positive[w], probability[w]), image)
    return {"patches": int(positive.sum()), "auc": _number(auroc(positive, probability)), "low": low, "high": high}


def _two_classes(true: np.ndarray, probability: np.ndarray, image: np.ndarray) -> dict[str, Any]:
    known = true != UNKNOWN
    positive, probability, image = true[known] == YES, probability[known], image[known]
    right = (probability >= 0.5) == positive
    low, high = _interval(lambda w: float(right[w].mean()), image)
    return {
        "patches": len(right),
        "abnormal": int(positive.sum()),
        "auc": _number(auroc(positive, probability)),
        "accuracy": {"low": low, "value": _number(float(right.mean())) if len(right) else None, "high": high},
        "sensitivity": _number(float(right[positive].mean())) if positive.any() else None,
        "specificity": _number(float(right[~positive].mean())) if (~positive).any() else None,
    }


def _interval(figure: Callable[[np.ndarray], float], image: np.ndarray) -> tuple[float | None, float | None]:
    """95 % by resampling images."""
    places = [np.flatnonzero(image == i) for i in np.unique(image)]
    if not places:
        return None, None
    random = np.random.default_rng(0)
    values = []
    for _ in range(_ROUNDS):
        drawn = np.concatenate([places[i] for i in random.integers(len(places), size=len(places))])
        values.append(figure(drawn))
    finite = [v for v in values if np.isfinite(v)]
    low, high = np.percentile(finite, [2.5, 97.5]).tolist() if finite else (float("nan"), float("nan"))
    return _number(low), _number(high)


def _number(value: float) -> float | None:
    """Rounded; None (JSON has no NaN) where undefined."""
    return round(value, 4) if np.isfinite(value) else None
