"""How good predictions are: confusion, ranking, calibration, and intervals that respect cases.

Plain numpy, rows of labels and probabilities in, numbers out. Undefined figures (a class that nobody has) are NaN,
never 0. Definitions follow Fawcett 2006 (confusion, ROC), Davis and Goadrich 2006 (average precision), Guo et al. 2017
(calibration error) and Efron and Tibshirani 1993 (percentile bootstrap, here of whole cases).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wsiengine.errors import WsiError


@dataclass(frozen=True)
class ClassFigures:
    """One-against-the-rest figures, each float64 (classes,); NaN where undefined."""

    precision: np.ndarray
    recall: np.ndarray
    specificity: np.ndarray
    npv: np.ndarray
    f1: np.ndarray


@dataclass(frozen=True)
class Interval:
    """A figure with the interval that holds the middle of its bootstrap distribution.

    Attributes:
        value: From all rows.
        low: Lower bound.
        high: Upper bound.
        cases: How many cases were resampled.
    """

    value: float
    low: float
    high: float
    cases: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}–{self.high:.3f}, {self.cases} cases)"


def confusion(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts, int64 (true class, predicted class).

    Args:
        true: Class index of each row, (N,).
        predicted: Likewise; an index of ``classes`` or more means "no class" and counts in a last, extra column.
        classes: Number of classes.
    """
    columns = np.minimum(predicted, classes)
    return np.bincount(true * (classes + 1) + columns, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def class_figures(counts: np.ndarray) -> ClassFigures:
    """Precision, recall, specificity, negative predictive value and F1 of each class.

    Args:
        counts: (classes, classes) or, with a column "no class", (classes, classes + 1).
    """
    classes = len(counts)
    hit = np.diag(counts[:, :classes]).astype(float)
    called, has = counts[:, :classes].sum(axis=0), counts.sum(axis=1)
    rest = counts.sum() - has
    miss, false = has - hit, called - hit
    with np.errstate(invalid="ignore", divide="ignore"):
        return ClassFigures(
            precision=hit / called,
            recall=hit / has,
            specificity=(rest - false) / rest,
            npv=(rest - false) / (rest - false + miss),
            f1=2 * hit / (called + has),
        )


def balanced_accuracy(counts: np.ndarray) -> float:
    """Mean recall of the classes that occur."""
    recall = class_figures(counts).recall
    return float(np.nanmean(recall)) if np.isfinite(recall).any() else float("nan")


def auroc(positive: np.ndarray, score: np.ndarray) -> float:
    """Chance that a positive row scores above a negative one, ties counting half (Mann–Whitney).

    Args:
        positive: bool (N,).
        score: Higher means more likely positive, (N,).
    """
    count = int(positive.sum())
    if count in (0, len(positive)):
        return float("nan")
    _, place, ties = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def average_precision(positive: np.ndarray, score: np.ndarray) -> float:
    """Area below the precision–recall steps, without interpolation.

    Args:
        positive: bool (N,).
        score: Higher means more likely positive, (N,).
    """
    if not positive.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.r_[np.flatnonzero(np.diff(score[order])), len(score) - 1]  # rows of equal score enter together
    precision, recall = hits[last] / (last + 1), hits[last] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


@dataclass(frozen=True)
class Reliability:
    """Claimed against found, per bin of claimed probability.

    Attributes:
        claimed: Mean probability of the predicted class, (bins,); NaN in empty bins.
        found: Share of right predictions, (bins,).
        count: Rows, int64 (bins,).
    """

    claimed: np.ndarray
    found: np.ndarray
    count: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: mean of |claimed − found| over rows."""
        filled = self.count > 0
        gap = np.abs(self.claimed[filled] - self.found[filled])
        return float(np.average(gap, weights=self.count[filled])) if filled.any() else float("nan")


def reliability(true: np.ndarray, probability: np.ndarray, bins: int = 15) -> Reliability:
    """How far the probability of the predicted class can be believed.

    Args:
        true: Class index of each row, (N,).
        probability: (N, classes).
        bins: Equal bins of (0, 1].
    """
    claimed = probability.max(axis=1).astype(float)
    right = probability.argmax(axis=1) == true
    which = np.clip(np.ceil(claimed * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            claimed=np.bincount(which, claimed, bins) / count,
            found=np.bincount(which, right, bins) / count,
            count=count,
        )


def case_bootstrap(
    figure: Callable[[np.ndarray], float],
    cases: np.ndarray,
    strata: np.ndarray | None = None,
    *,
    repeats: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of a figure by drawing whole cases with replacement.

    Args:
        figure: Figure of the rows at the given indices (with repeats).
        cases: Case of each row, (N,).
        strata: Group of each row, (N,): each group keeps its number of cases, so that a rare class does not vanish
            from a draw. A case belongs to the group of its first row. None draws from all cases alike.
        repeats: Draws.
        level: Part of the distribution inside the interval.
        seed: Of the draws.
    """
    if not len(cases):
        raise WsiError("there is nothing to evaluate: no row is left", hint="check the labels and the chosen folds")
    _, first, of_row = np.unique(cases, return_index=True, return_inverse=True)
    rows_of = np.split(np.argsort(of_row, kind="stable"), np.cumsum(np.bincount(of_row))[:-1])
    group = np.zeros(len(first), int) if strata is None else np.unique(strata[first], return_inverse=True)[1]
    groups = [np.flatnonzero(group == g) for g in range(group.max() + 1)]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(repeats):
        picked = np.concatenate([rng.choice(members, len(members)) for members in groups])
        drawn.append(figure(np.concatenate([rows_of[c] for c in picked])))
    edge = (1 - level) / 2
    low, high = np.nanquantile(drawn, [edge, 1 - edge])
    return Interval(figure(np.arange(len(cases))), float(low), float(high), len(first))


def balanced_by_case(
    true: np.ndarray,
    predicted: np.ndarray,
    classes: int,
    cases: np.ndarray,
    strata: np.ndarray | None = None,
    *,
    repeats: int = 2000,
) -> Interval:
    """Balanced accuracy with the interval of :func:`case_bootstrap` (95 %), from the counts of each case.

    How often a case is drawn is multinomial; so all draws are one product of matrices, however many rows there are.

    Args:
        true, predicted, classes: As for :func:`confusion`.
        cases, strata, repeats: As for :func:`case_bootstrap`.
    """
    if not len(cases):
        raise WsiError("there is nothing to evaluate: no row is left", hint="check the labels and the chosen folds")
    names, first, of_row = np.unique(cases, return_index=True, return_inverse=True)
    flat = (of_row * classes + true) * (classes + 1) + np.minimum(predicted, classes)
    counts = np.bincount(flat, minlength=len(names) * classes * (classes + 1)).reshape(len(names), -1)
    group = np.zeros(len(names), int) if strata is None else np.unique(strata[first], return_inverse=True)[1]
    rng = np.random.default_rng(0)
    total = np.zeros((repeats, counts.shape[1]))
    for g in range(group.max() + 1):
        members = np.flatnonzero(group == g)
        total += rng.multinomial(len(members), np.full(len(members), 1 / len(members)), repeats) @ counts[members]
    drawn = total.reshape(repeats, classes, classes + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = np.diagonal(drawn, axis1=1, axis2=2) / drawn.sum(axis=2)
    has = np.isfinite(recall).any(axis=1)
    low, high = np.quantile(np.nanmean(recall[has], axis=1), [0.025, 0.975])
    value = balanced_accuracy(counts.sum(axis=0).reshape(classes, classes + 1))
    return Interval(value, float(low), float(high), len(names))


RULES = ("weighted", "sum", "vote", "average", "exist", "exist-3")
"""Ways to one answer from many tiles."""
_LEAST_WEIGHT = 1e-3


def aggregate(
    probability: np.ndarray, group: np.ndarray, rule: str = "average", weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One row of scores per image, case or slide from the rows of its tiles.

    ``weighted`` averages the logarithms of probabilities (for softmax: the scores themselves), each tile weighted by
    the part of it that may be judged. ``sum`` and ``average`` add and average probabilities, ``vote`` counts
    predictions. ``exist`` takes the last class (classes are listed by rising severity) that any tile was given,
    ``exist-3`` the last that three tiles were given.

    Args:
        probability: (N, classes).
        group: What each tile belongs to, (N,).
        rule: One of :data:`RULES`.
        weight: For ``weighted``: of each tile, (N,); None: all alike.

    Returns:
        Groups, sorted, (M,), and their scores (M, classes): the prediction is the largest.
    """
    if rule not in RULES:
        raise WsiError(f"there is no rule '{rule}' to join tiles", hint=f"use one of {', '.join(RULES)}")
    names, of_row = np.unique(group, return_inverse=True)
    classes = probability.shape[1]
    if rule == "weighted":
        share = np.ones(len(probability)) if weight is None else np.maximum(weight, _LEAST_WEIGHT)
        logs = np.log(np.maximum(probability, np.finfo(np.float32).tiny)) * share[:, None]
        total = np.stack([np.bincount(of_row, logs[:, c], len(names)) for c in range(classes)], axis=1)
        mean = total / np.bincount(of_row, share, len(names))[:, None]
        score = np.exp(mean - mean.max(axis=1, keepdims=True))
        return names, score / score.sum(axis=1, keepdims=True)
    total = np.stack([np.bincount(of_row, probability[:, c], len(names)) for c in range(classes)], axis=1)
    if rule == "sum":
        return names, total
    if rule == "average":
        return names, total / np.bincount(of_row)[:, None]
    votes = np.zeros((len(names), classes))
    np.add.at(votes, (of_row, probability.argmax(axis=1)), 1)
    if rule == "vote":
        return names, votes
    enough = votes >= (3 if rule == "exist-3" else 1)
    enough[:, 0] |= ~enough.any(axis=1)
    return names, enough * np.arange(1.0, classes + 1)
