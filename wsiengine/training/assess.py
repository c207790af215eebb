"""How good a finished model is on labelled images: by tile, image and case, through the engine's own runtime.

Needs no torch: whoever runs models can measure them on tissue of their own laboratory.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from wsiengine.errors import WsiError
from wsiengine.evaluate import aggregate, reliability
from wsiengine.models.activation import activate
from wsiengine.models.card import Card
from wsiengine.models.runtime import Runtime
from wsiengine.training.data import Field
from wsiengine.training.figures import diagnosed, softmax, table
from wsiengine.training.scoring import Predict, Scores, score


def model_predictor(card: Card, *, device: str = "cpu", threads: int = 1) -> Predict:
    """A model as :func:`wsiengine.training.scoring.score` wants it.

    Channels that are asserted as one class are joined: their logarithmic probabilities, and the gate (1 without one).
    """
    runtime = Runtime(card, device=device, threads=threads)
    side = card.input.size_px
    groups = [list(m.channels) for m in card.map_classes]

    def predict(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        column = np.ascontiguousarray(tiles).reshape(-1, side, 3)
        scores = runtime.scores(column, np.array([[i * side, 0] for i in range(len(tiles))]))
        probability = activate(scores[:, : len(card.classes)], card.activation)
        joined = np.stack([probability[:, g].sum(axis=1) for g in groups], axis=1)
        gate = scores[:, -1] if card.gate else np.ones(len(tiles))
        return np.log(np.maximum(joined, 1e-9)), gate

    return predict


def assess(
    card: Card, fields: Sequence[Field], *, rule: str = "average", device: str = "cpu", threads: int = 1
) -> dict[str, Any]:
    """Figures of a model on labelled images.

    Args:
        card: The model.
        fields: Labelled images; their labels are the model's asserted classes.
        rule: How tiles make one answer for an image or a case (:data:`wsiengine.evaluate.RULES`).
        device, threads: For the runtime.

    Returns:
        ``tile``, ``image`` and ``case``, each as :func:`wsiengine.training.figures.table` gives them, with ``model``,
        ``version``, ``rule`` and, by tile, ``reliability``.

    Raises:
        WsiError: A label is no class of the model, or the model's tiles are not of the size that images are cut into.
    """
    classes = tuple(m.name for m in card.map_classes)
    if unknown := sorted({f.label for f in fields} - set(classes)):
        raise WsiError(
            f"labels {', '.join(unknown)} are no class of {card.name}, which has {', '.join(classes)}",
            hint="merge labels into classes: --map LABEL=CLASS",
        )
    predict = model_predictor(card, device=device, threads=threads)
    tiles = score(fields, predict, card.input.mpp.mean, classes=classes, tile_px=card.input.size_px)
    kept = diagnosed(tiles)
    bins = reliability(kept.labels, softmax(kept.logits))
    return {
        "model": card.name,
        "version": card.version,
        "rule": rule,
        "tile": table(tiles),
        "image": table(join(kept, kept.column("image"), rule)),
        "case": table(join(kept, np.char.add(kept.column("case"), kept.column("label")), rule)),
        "reliability": {"claimed": _list(bins.claimed), "found": _list(bins.found), "count": bins.count.tolist()},
    }


def join(scores: Scores, group: np.ndarray, rule: str) -> Scores:
    """One row per group from those of its tiles that show epithelium (from all, where none does)."""
    shown = scores.epithelium >= 0.2
    names, of_row = np.unique(group, return_inverse=True)
    shown |= ~(np.bincount(of_row, shown) > 0)[of_row]
    _, joined = aggregate(softmax(scores.logits[shown]), group[shown], rule)
    first = np.array([np.flatnonzero(of_row == g)[0] for g in range(len(names))])
    most = np.array([scores.epithelium[of_row == g].max() for g in range(len(names))])
    share = joined / np.maximum(joined.sum(axis=1, keepdims=True), 1e-9)
    whole = scores.where(np.isin(np.arange(len(group)), first))
    order = np.argsort(first)  # ``where`` keeps the order of rows, groups are sorted by name
    logits = np.log(np.maximum(share, 1e-9))[order]
    return replace(whole, logits=logits, epithelium=most[order], drawn=np.ones(len(first)))


def _list(values: np.ndarray) -> list[float | None]:
    return [round(float(v), 3) if np.isfinite(v) else None for v in values]


def picture(found: dict[str, Any], classes: Sequence[str], side_px: int = 60) -> np.ndarray:
    """Confusion by image (rows: true, columns: predicted, last: no tissue of interest) as RGB, one square per count."""
    counts = np.array(found["image"]["all"]["confusion"], float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shade = np.kron(share, np.ones((side_px, side_px)))
    image = np.stack([255 - 255 * shade, 255 - 140 * shade, 255 - 60 * shade], axis=2).astype(np.uint8)
    for row in range(len(classes)):
        for column in range(counts.shape[1]):
            at = (column * side_px + side_px // 5, row * side_px + side_px * 3 // 5)
            text = f"{counts[row, column]:.0f}"
            cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return image
