"""What a bundled classifier says of held-out tissue that was spoilt on purpose::

    python benchmarks/crc5_damage.py --data DIR --folds 0

Prints, for every kind of damage, which part of the tiles that have a class becomes which answer. The figures of sound
tissue are those of ``wsiengine evaluate --model crc5 --data DIR/crc --sets own --folds 0``.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from wsiengine.evaluating import score_images
from wsiengine.evaluation_report import Account, answers
from wsiengine.labelled_sets import FILE, gather, read_sets
from wsiengine.models.registry import load_model
from wsiengine.models.runtime import Runtime


def blur(pixels: np.ndarray) -> np.ndarray:
    """Far out of focus: a Gaussian of 6 px."""
    return np.asarray(cv2.GaussianBlur(pixels, (0, 0), 6.0))


def pen(pixels: np.ndarray) -> np.ndarray:
    """Under blue ink, which lets a third of the light through."""
    return (pixels * np.array([0.15, 0.25, 0.75])).astype(np.uint8)


def blood(pixels: np.ndarray) -> np.ndarray:
    """Covered in red cells: discs of 7 px, 900 for each 224 × 224 px."""
    rng = np.random.default_rng(0)
    out = np.full_like(pixels, 235)
    rows, cols = pixels.shape[:2]
    for x, y in rng.integers(0, (cols, rows), (round(900 * rows * cols / 224**2), 2)).tolist():
        cv2.circle(out, (x, y), 3, (205, 80, 90), -1)
    return np.asarray(cv2.GaussianBlur(out, (0, 0), 0.8))


def brown(pixels: np.ndarray) -> np.ndarray:
    """As if stained brown on blue (immunohistochemistry): eosin's share becomes DAB's colour."""
    density = -np.log((pixels.astype(np.float32) + 1) / 256)
    unmix = np.linalg.inv(np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]]))
    restained = density @ unmix @ np.array([[0.650, 0.704, 0.286], [0.268, 0.570, 0.776], [0.072, 0.990, 0.105]])
    return np.clip(256 * np.exp(-np.maximum(restained, 0)) - 1, 0, 255).astype(np.uint8)


DAMAGE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda pixels: pixels,
    "blur": blur,
    "pen": pen,
    "blood": blood,
    "brown": brown,
}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A classifier on spoilt tissue.")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds crc/")
    parser.add_argument("--model", default="crc5", help="bundled name or folder with sets.json (default crc5)")
    parser.add_argument("--folds", default="0", help="folds to score (default 0, which crc5 was not trained on)")
    parser.add_argument("--damage", choices=DAMAGE, action="append", help="what is done to the tissue (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    asked = parser.parse_args(arguments)
    card = load_model(asked.model)
    how = Account.of(card)
    sets = read_sets(card.folder / FILE, asked.data / "crc")
    classes = [c.name for c in card.map_classes]
    fields = [f for f in gather(sets, classes, [int(f) for f in asked.folds.split(",")]).fields if f.label in classes]
    runtime = Runtime(card, device="cpu", threads=asked.threads)
    found = {}
    for name in asked.damage or DAMAGE:
        rows = score_images(card, fields, runtime, edit=DAMAGE[name])
        rows = rows.where(np.isnan(rows.drawn) | (rows.drawn >= how.min_drawn))
        table = answers(rows, how)
        asserted = sum(of["n"] * sum(of["called"][c] for c in classes) for of in table.values()) / len(rows)
        found[name] = {"tiles": len(rows), "becomes_a_class": round(asserted, 3), "labels": table}
        print(f"{name}: {100 * asserted:.1f} % of {len(rows):,} tiles become a class")
        for label, of in table.items():
            print(f"  {label:<16}" + " · ".join(f"{k} {100 * v:.0f} %" for k, v in of["called"].items()))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
