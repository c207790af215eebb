"""Figures of crc5's trainings from their networks' scores: by tile, image and set, with case-bootstrap intervals.

They choose and compare trainings, whose networks are never exported. A shut tile is wrong; the uncertain rule is left
out. What stands on a card is what ``wsiengine evaluate`` says of the finished model
(:mod:`wsiengine.training.evidence`).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from wsiengine.evaluate import (
    Interval,
    auroc,
    average_precision,
    balanced_accuracy,
    case_bootstrap,
    class_figures,
    confusion,
    reliability,
)
from wsiengine.training.scoring import Scores

GATE_MINIMUM = 0.25
"""Predicted epithelium below which a tile gets no class; out of fold it shut out 3 % at most of any set's class."""
DRAWN_MINIMUM = 0.2
"""Drawn epithelium below which a tile has no class to be right about."""
LEAST_SURE = 0.42
"""A best class of three below this, a quarter above chance, is no diagnosis."""


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits, (N, classes)."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def diagnosed(scores: Scores) -> Scores:
    """The rows that have a diagnosis to be right about: enough drawn epithelium (or no mask), and no polyp."""
    enough = np.isnan(scores.drawn) | (scores.drawn >= DRAWN_MINIMUM)
    return scores.where(enough & (scores.labels >= 0))


def asserted(scores: Scores) -> np.ndarray:
    """Predicted class of each row; the number of classes where the gate says that there is no epithelium."""
    return np.where(scores.epithelium < GATE_MINIMUM, len(scores.classes), scores.logits.argmax(axis=1))


def balanced(scores: Scores, *, repeats: int = 2000) -> Interval:
    """Balanced accuracy by cases, of what would be asserted; cases are drawn within set and class."""
    labels, predicted = scores.labels, asserted(scores)

    def figure(rows: np.ndarray) -> float:
        return balanced_accuracy(confusion(labels[rows], predicted[rows], len(scores.classes)))

    strata = np.char.add(scores.column("source"), scores.column("label"))
    return case_bootstrap(figure, scores.column("case"), strata, repeats=repeats)


def table(scores: Scores, temperature: float = 1.0) -> dict[str, Any]:
    """Figures of the diagnosed rows: together, and by set."""
    rows = diagnosed(scores)
    sources = rows.column("source")
    parts = {"all": rows} | {s: rows.where(sources == s) for s in np.unique(sources)}
    return {name: _figures(part, temperature) for name, part in parts.items()}


def _figures(scores: Scores, temperature: float) -> dict[str, Any]:
    labels, probability = scores.labels, softmax(scores.logits / temperature)
    counts = confusion(labels, asserted(scores), len(scores.classes))
    interval = balanced(scores)
    classes = {name: _one_class(scores, counts, probability, c) for c, name in enumerate(scores.classes)}
    present = {name: found for name, found in classes.items() if found["rows"]}
    return {
        "balanced_accuracy": _rounded(interval.value),
        "interval_95": [_rounded(interval.low), _rounded(interval.high)],
        "cases": interval.cases,
        "rows": len(labels),
        "confusion": counts.tolist(),
        "ece": _rounded(reliability(labels, probability).error),
        "macro_auroc": _mean(found["auroc"] for found in present.values()),
        "mean_average_precision": _mean(found["average_precision"] for found in present.values()),
        "classes": present,
    }


def _one_class(scores: Scores, counts: np.ndarray, probability: np.ndarray, c: int) -> dict[str, Any]:
    has = scores.labels == c
    one = class_figures(counts)
    return {
        "cases": len(np.unique(scores.column("case")[has])),
        "rows": int(has.sum()),
        "recall": _rounded(one.recall[c]),
        "precision": _rounded(one.precision[c]),
        "specificity": _rounded(one.specificity[c]),
        "npv": _rounded(one.npv[c]),
        "f1": _rounded(one.f1[c]),
        "auroc": _rounded(auroc(has, probability[:, c])),
        "average_precision": _rounded(average_precision(has, probability[:, c])),
    }


def _rounded(value: float) -> float | None:
    """Three digits; None where undefined, as JSON has no NaN."""
    return round(float(value), 3) if np.isfinite(value) else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return round(sum(known) / len(known), 3) if known else None


def false_diagnosis(windows: Scores) -> dict[str, Any]:
    """How often a window without epithelium would be given a diagnosis; (rate, cases and windows)."""
    if not len(windows.epithelium):
        return {"rate": None, "cases": 0, "windows": 0}
    passed = windows.epithelium >= GATE_MINIMUM
    cases = windows.column("case")
    by_case = [float(passed[cases == c].mean()) for c in np.unique(cases)]
    return {
        "rate": round(float(passed.mean()), 3),
        "rate_mean_over_cases": round(float(np.mean(by_case)), 3),
        "cases": len(by_case),
        "windows": len(passed),
    }


def gate_figures(scores: Scores) -> dict[str, Any]:
    """How well the predicted epithelium follows the drawn one."""
    drawn = scores.where(~np.isnan(scores.drawn))
    has = drawn.drawn >= DRAWN_MINIMUM
    missed = has & (drawn.epithelium < GATE_MINIMUM)
    return {
        "mean_absolute_error": round(float(np.abs(drawn.epithelium - drawn.drawn).mean()), 3),
        "epithelium_missed": round(float(missed.sum() / max(1, has.sum())), 4),
        "tiles": len(drawn.drawn),
    }


def gate_choices(scores: Scores, windows: Scores) -> list[dict[str, float]]:
    """What other gate minima would cost: epithelium missed and tissue without it diagnosed, every case alike."""
    drawn = scores.where(~np.isnan(scores.drawn) & (scores.drawn >= DRAWN_MINIMUM))

    def by_case(rows: Scores, hit: np.ndarray) -> float:
        cases = rows.column("case")
        return round(float(np.mean([hit[cases == c].mean() for c in np.unique(cases)])), 4)

    return [
        {
            "minimum": minimum,
            "epithelium_missed": by_case(drawn, drawn.epithelium < minimum),
            "false_diagnosis": by_case(windows, windows.epithelium >= minimum),
            "false_diagnosis_of_windows": round(float((windows.epithelium >= minimum).mean()), 4),
        }
        for minimum in (0.2, 0.25, 0.3, 0.35, 0.4)
    ]


def _weight(scores: Scores) -> np.ndarray:
    """Weight of each row, so that every set counts alike and, within it, every case."""
    _, case, rows_of = np.unique(scores.column("case"), return_inverse=True, return_counts=True)
    weight = 1 / rows_of[case]
    _, source = np.unique(scores.column("source"), return_inverse=True)
    return weight / np.bincount(source, weight)[source]


def best_temperature(scores: Scores) -> float:
    """The temperature that makes held-out probabilities likeliest (Guo et al. 2017); sets weigh alike, cases within."""
    rows = diagnosed(scores)
    weight = _weight(rows)
    grid = np.geomspace(0.1, 4.0, 160)

    def loss(temperature: float) -> float:
        probability = softmax(rows.logits / temperature)[np.arange(len(weight)), rows.labels]
        return float(-np.sum(weight * np.log(np.maximum(probability, 1e-12))))

    return float(grid[np.argmin([loss(t) for t in grid])])


def uncertain_below(scores: Scores, temperature: float, *, reject: float = 0.05) -> dict[str, Any]:
    """The probability under which a diagnosis is called uncertain: it rejects ``reject`` of held-out tiles.

    Sets weigh alike, cases within. At least :data:`LEAST_SURE`, at most 0.7.
    """
    rows = diagnosed(scores)
    weight = _weight(rows)
    claimed = softmax(rows.logits / temperature).max(axis=1)
    order = np.argsort(claimed)
    share = np.cumsum(weight[order]) / weight.sum()
    below = round(float(np.clip(claimed[order][np.searchsorted(share, reject)], LEAST_SURE, 0.7)), 2)
    right = rows.logits.argmax(axis=1) == rows.labels
    sure = claimed >= below
    return {
        "below": below,
        "rejected": round(float(np.average(~sure, weights=weight)), 3),
        "right_above": _share_right(right, weight, sure),
        "right_below": _share_right(right, weight, ~sure),
        "cases": len(np.unique(rows.column("case"))),
        "tiles": len(claimed),
    }


def _share_right(right: np.ndarray, weight: np.ndarray, rows: np.ndarray) -> float | None:
    return round(float(np.average(right[rows], weights=weight[rows])), 3) if rows.any() else None
