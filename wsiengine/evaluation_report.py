"""Figures of scored rows, as JSON: by tile, image, slide and case, of all sets and of each.

Two accounts stand beside each other. *No answer is wrong*: where the model gives no class (the gate found too little to
judge, or no class is likely enough) it is counted as mistaken; this is what a user of ``infer`` gets. *Likeliest
class*: what it would be if the class of highest probability were taken everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wsiengine.evaluate import (
    Interval,
    auroc,
    average_precision,
    balanced_by_case,
    class_figures,
    confusion,
    reliability,
)
from wsiengine.evaluating import Rows, join, window_px
from wsiengine.models.card import Card

MIN_DRAWN = 0.2
"""Drawn part of a tile under which it has no class to be right about, of models with a gate."""
LEVELS = ("tile", "cell", "image", "slide", "case")
"""All that a report may have, from small to large."""


@dataclass(frozen=True, slots=True)
class Account:
    """How answers are counted.

    Attributes:
        rule: How tiles are joined (:data:`wsiengine.evaluate.RULES`).
        below: A best class below this counts as no answer.
        min_drawn: Tiles with a smaller part under their image's mask are left out.
        gate_minimum: From this part on the model judges a tile; None without a gate.
        no_answer: What the model calls a place that it does not judge, and one of which it is not sure.
        window_um: Side of the windows by which false answers are counted.
    """

    rule: str = "weighted"
    below: float = 0.0
    min_drawn: float = 0.0
    gate_minimum: float | None = None
    no_answer: tuple[str, str] = ("Not judged", "Uncertain")
    window_um: float = 0.0

    @classmethod
    def of(cls, card: Card, rule: str = "weighted", min_drawn: float | None = None) -> "Account":
        """As the card has it."""
        least = (MIN_DRAWN if card.gate else 0.0) if min_drawn is None else min_drawn
        uncertain = card.uncertain.name if card.uncertain else "Uncertain"
        return cls(
            rule,
            card.uncertain.below if card.uncertain else 0.0,
            least,
            card.gate.minimum if card.gate else None,
            (card.gate.otherwise if card.gate else "Not judged", uncertain),
            window_px(card) * card.input.fixed_mpp.mean,
        )


def report(rows: Rows, how: Account, *, empty: Rows | None = None, base: str = "tile") -> dict[str, Any]:
    """All figures of scored rows.

    Args:
        rows: Tiles of labelled images, or cells of annotated slides.
        how: How answers are counted.
        empty: Windows without a drawn part (:func:`wsiengine.evaluating.score_empty_windows`).
        base: What ``rows`` are: ``tile`` or ``cell``.

    Returns:
        ``classes``, ``rule``, ``below``, ``min_drawn``; a part for each level; ``sets``, the same for each set where
        there are several; ``answers``, what each label was called; ``gate`` where masks show how good it is.
    """
    enough = np.isnan(rows.drawn) | (rows.drawn >= how.min_drawn)
    levels = _levels(rows.where(enough), how.rule, base)
    scored = {name: part.where(part.true >= 0) for name, part in levels.items()}
    sources = sorted({f.source for f in rows.fields if f.label in rows.classes})
    found: dict[str, Any] = {
        "classes": list(rows.classes),
        "rule": how.rule,
        "below": how.below,
        "min_drawn": how.min_drawn,
        "little_drawn": int((~enough & (rows.true >= 0)).sum()),
        **{name: figures(part, how) for name, part in scored.items()},
    }
    if len(sources) > 1:
        found["sets"] = {
            source: {
                name: figures(part.where(_of_source(part, source)), how)
                for name, part in scored.items()
                if _of_source(part, source).any()
            }
            for source in sources
        }
    found["answers"] = {name: answers(part, how) for name, part in levels.items()}
    if how.gate_minimum is not None and not np.isnan(rows.drawn).all():
        found["gate"] = gate_figures(rows, how, empty)
    return found


def _levels(rows: Rows, rule: str, base: str) -> dict[str, Rows]:
    """The rows, and joined ones; by slide where the labels name any."""
    slides = all(f.slide for f in rows.fields)
    joined = [*(["image"] if base == "tile" else []), *(["slide"] if slides else []), "case"]
    return {base: rows} | {name: join(rows, name, rule) for name in joined}


def _of_source(rows: Rows, source: str) -> np.ndarray:
    return np.array([f.source == source for f in rows.fields], bool)[rows.field]


def predicted(rows: Rows, below: float) -> np.ndarray:
    """(N,) int64: the class of each row; their number where it is not judged, one more where none is likely enough."""
    best = rows.probability.argmax(axis=1)
    unsure = rows.probability.max(axis=1) < below
    return np.where(~rows.judged, len(rows.classes), np.where(unsure, len(rows.classes) + 1, best))


def figures(rows: Rows, how: Account) -> dict[str, Any]:
    """Figures of rows whose labels are all classes."""
    true, count = rows.true, len(rows.classes)
    said, best = predicted(rows, how.below), rows.probability.argmax(axis=1)
    counts = confusion(true, said, count)
    cases, strata = rows.codes("source", "case"), rows.codes("source", "label")
    strict, likeliest = (balanced_by_case(true, answer, count, cases, strata) for answer in (said, best))
    calibration = reliability(true, rows.probability)
    classes = {name: _one_class(rows, k, (counts, confusion(true, best, count))) for k, name in enumerate(rows.classes)}
    return {
        "n": len(true),
        "cases": strict.cases,
        "balanced_accuracy": _interval(strict),
        "balanced_accuracy_likeliest": _interval(likeliest),
        "accuracy": _number(float((said == true).mean())),
        "no_answer": _number(float((said >= count).mean())),
        "confusion": counts.tolist(),
        "per_class": classes,
        "macro_auroc": _mean([found["auroc"] for found in classes.values()]),
        "mean_average_precision": _mean([found["average_precision"] for found in classes.values()]),
        "calibration_error": _number(calibration.error),
        "reliability": {
            "claimed": [_number(v) for v in calibration.claimed.tolist()],
            "found": [_number(v) for v in calibration.found.tolist()],
            "count": calibration.count.tolist(),
        },
    }


def _one_class(rows: Rows, k: int, counts: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """One class against the rest; ``counts``: where no answer is wrong, and of likeliest classes."""
    has = rows.true == k
    one, likeliest = (class_figures(c) for c in counts)
    score = rows.probability[:, k]
    return {
        "n": int(has.sum()),
        "cases": len(np.unique(rows.codes("source", "case")[has])),
        **{name: _number(float(getattr(one, name)[k])) for name in ("recall", "precision", "specificity", "npv", "f1")},
        "recall_likeliest": _number(float(likeliest.recall[k])),
        "auroc": _number(auroc(has, score)),
        "average_precision": _number(average_precision(has, score)),
    }


def answers(rows: Rows, how: Account) -> dict[str, dict[str, Any]]:
    """What each label was called: how many rows and cases it has, and which part of them got which answer."""
    names = (*rows.classes, *how.no_answer)
    said, found = predicted(rows, how.below), {}
    labels = np.array([f.label for f in rows.fields])[rows.field]
    for label in sorted(set(labels.tolist()), key=lambda name: (name not in rows.classes, name)):
        picked = labels == label
        share = np.bincount(said[picked], minlength=len(names)) / picked.sum()
        found[label] = {
            "n": int(picked.sum()),
            "cases": len(np.unique(rows.codes("source", "case")[picked])),
            "called": {name: _number(part) for name, part in zip(names, share.tolist(), strict=True)},
        }
    return found


def gate_figures(rows: Rows, how: Account, empty: Rows | None) -> dict[str, Any]:
    """How well the gate follows what is drawn, and how often it lets through what is not."""
    known = rows.where(~np.isnan(rows.drawn))
    has = known.drawn >= how.min_drawn
    found: dict[str, Any] = {
        "minimum": how.gate_minimum,
        "tiles": len(known),
        "mean_absolute_error": _number(float(np.abs(known.gate - known.drawn).mean())),
        "shut_out": _number(float((~known.judged[has]).mean())) if has.any() else None,
    }
    if empty is not None:
        cases = empty.codes("source", "case")
        by_case = [float(empty.judged[cases == c].mean()) for c in np.unique(cases)]
        found["false_answers"] = {
            "windows": len(empty),
            "cases": len(by_case),
            "window_um": round(how.window_um, 1),
            "rate": _number(float(empty.judged.mean())) if len(empty) else None,
            "rate_mean_over_cases": _number(float(np.mean(by_case))) if by_case else None,
        }
    return found


def _interval(found: Interval) -> dict[str, float | None]:
    return {"low": _number(found.low), "value": _number(found.value), "high": _number(found.high)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return _number(float(np.mean(known))) if known else None


def _number(value: float) -> float | None:
    """Rounded; None (JSON has no NaN) where undefined."""
    return round(value, 4) if np.isfinite(value) else None
