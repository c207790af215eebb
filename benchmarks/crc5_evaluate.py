"""The figures of the bundled crc5 on held-out fields, through the engine's own runtime::

    python benchmarks/crc5_evaluate.py --data DIR --folds 0

Prints, by tile and by image and for every set: balanced accuracy with its case-bootstrap interval (the lower bound
first), recall and AUROC of each class; then what polyps are taken for and how often tissue without epithelium would be
given a diagnosis. ``--damage`` shows what happens to tissue that was blurred, drawn on or bled on.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from wsiengine.models.card import Card
from wsiengine.models.registry import load_model
from wsiengine.models.runtime import Runtime
from wsiengine.training.data import CLASSES, read_fields
from wsiengine.training.figures import asserted, diagnosed, false_diagnosis, gate_figures, softmax, table
from wsiengine.training.scoring import Predict, Scores, negative_windows, score


def model_predictor(card: Card, threads: int) -> Predict:
    """The model as scoring wants it: the channels of an asserted class joined, and the gate."""
    runtime = Runtime(card, device="cpu", threads=threads)
    side = card.input.size_px

    def predict(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        column = np.ascontiguousarray(tiles).reshape(-1, side, 3)
        scores = runtime.scores(column, np.array([[i * side, 0] for i in range(len(tiles))]))
        joined = [np.logaddexp.reduce(scores[:, list(m.channels)], axis=1) for m in card.map_classes]
        return np.stack(joined, axis=1), scores[:, -1]

    return predict


def blur(tiles: np.ndarray) -> np.ndarray:
    """Far out of focus: a Gaussian of 6 px."""
    return np.stack([cv2.GaussianBlur(t, (0, 0), 6.0) for t in tiles])


def pen(tiles: np.ndarray) -> np.ndarray:
    """Under blue ink, which lets a third of the light through."""
    return (tiles * np.array([0.15, 0.25, 0.75])).astype(np.uint8)


def blood(tiles: np.ndarray) -> np.ndarray:
    """Covered in red cells: discs of 7 px."""
    rng = np.random.default_rng(0)
    out = np.full_like(tiles, 235)
    for tile in out:
        for x, y in rng.integers(0, tile.shape[0], (900, 2)).tolist():
            cv2.circle(tile, (x, y), 3, (205, 80, 90), -1)
    return np.stack([cv2.GaussianBlur(t, (0, 0), 0.8) for t in out])


def brown(tiles: np.ndarray) -> np.ndarray:
    """As if stained brown on blue (immunohistochemistry): eosin's share becomes DAB's colour."""
    density = -np.log((tiles.astype(np.float32) + 1) / 256)
    unmix = np.linalg.inv(np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]]))
    restained = density @ unmix @ np.array([[0.650, 0.704, 0.286], [0.268, 0.570, 0.776], [0.072, 0.990, 0.105]])
    return np.clip(256 * np.exp(-np.maximum(restained, 0)) - 1, 0, 255).astype(np.uint8)


DAMAGE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda tiles: tiles,
    "blur": blur,
    "pen": pen,
    "blood": blood,
    "brown": brown,
}


def outcome(scores: Scores, below: float) -> dict[str, float]:
    """What share of tiles becomes which answer, the uncertain rule included."""
    called = asserted(scores)
    unsure = (softmax(scores.logits).max(axis=1) < below) & (called < len(CLASSES))
    called[unsure] = len(CLASSES) + 1
    share = np.bincount(called, minlength=len(CLASSES) + 2) / max(1, len(called))
    return dict(zip((*CLASSES, "No epithelium", "Uncertain"), share.round(3).tolist(), strict=True))


def _print(level: str, figures: dict[str, Any]) -> None:
    for name, f in figures.items():
        low, high = f["interval_95"]
        classes = " · ".join(f"{c} recall {v['recall']:.2f} AUROC {v['auroc']:.3f}" for c, v in f["classes"].items())
        print(
            f"{level:6} {name:8} from {low:.3f}: {f['balanced_accuracy']:.3f} (to {high:.3f}) "
            f"n = {f['rows']} of {f['cases']} cases, ECE {f['ece']:.3f} · {classes}"
        )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Evaluate crc5 on held-out fields.")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds crc/")
    parser.add_argument("--model", default="crc5", help="bundled name or folder (default crc5)")
    parser.add_argument("--folds", default="0", help="folds to score (default 0, which crc5 was not trained on)")
    parser.add_argument("--damage", choices=DAMAGE, default="none", help="what is done to the tissue beforehand")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    asked = parser.parse_args(arguments)
    card = load_model(asked.model)
    predict = model_predictor(card, asked.threads)
    folds = {int(f) for f in asked.folds.split(",")}
    fields = [f for f in read_fields(asked.data) if f.fold in folds]
    scores = score(fields, predict, card.input.mpp.mean, edit=DAMAGE[asked.damage])
    images = scores.by_field()
    below = card.uncertain.below if card.uncertain else 0.0
    found: dict[str, Any] = {
        "tile": table(scores),
        "image": table(images),
        "gate": gate_figures(scores),
        "outcome": {
            label: outcome(diagnosed(scores).where(diagnosed(scores).column("label") == label), below)
            for label in CLASSES
        },
        "polyps": outcome(images.where(images.labels < 0), below),
    }
    if asked.damage == "none":
        found["false_diagnosis"] = false_diagnosis(negative_windows(fields, predict, card.input.mpp.mean))
    _print("tile", found["tile"])
    _print("image", found["image"])
    for name in ("outcome", "polyps", "gate", "false_diagnosis"):
        print(f"{name}: {json.dumps(found.get(name))}")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
