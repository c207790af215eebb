"""The recipe of the bundled model ``rbc``: red cells of a smear, their types, normal or abnormal::

    python -m wsiengine.training.rbc --data DIR --out RUN
    python -m wsiengine.training.rbc --data DIR --out RUN --to wsiengine/models/zoo/rbc

Fold 0 is never trained on. The second stage sees each patch only once or twice, always drawn anew, so that its
probabilities on the patches it was trained on are as good as on others (measured: docs/rbc.md): the boosting is fitted
on them. Deterministic for one machine type and number of threads; started again on the same folder it resumes.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from sklearn.ensemble import GradientBoostingClassifier

from wsiengine.datasets.chula import TYPES, read_chula
from wsiengine.datasets.rows import UNKNOWN, YES, DetectionSet
from wsiengine.training.boosting import export_boosting
from wsiengine.training.centre import CentreDetector, CentreNet
from wsiengine.training.centre_training import centre_lesson
from wsiengine.training.crc5 import BACKBONE
from wsiengine.training.detection_card import resource, write_card
from wsiengine.training.detection_data import Augment, Sample, about, load_samples, warped
from wsiengine.training.detection_export import export_network
from wsiengine.training.detection_loop import Lesson, Schedule, fit
from wsiengine.training.mobilenet import MobileNetV2
from wsiengine.training.patches import PatchNet, PatchRows, PatchSampler, abnormal, known_patches, patch_loss

TRAINED = (1, 2, 3, 4)
TILE_PX, LARGEST_PX, CROP_PX = 640, 150, 96
_DETECTOR = Augment(256)
_CROPS = Augment(CROP_PX, scales=(0.94, 1.06))
_FROZEN = 4


@dataclass(frozen=True)
class Run:
    """What to train on, and how long.

    Attributes:
        found: The set, all folds.
        backbone: The ImageNet weights.
        out: Folder of the trainings.
        detector, types: Iterations.
        threads: Of the arithmetic.
    """

    found: DetectionSet
    backbone: Path
    out: Path
    detector: int = 500
    types: int = 450
    threads: int = 1

    def network(self) -> MobileNetV2:
        """The ImageNet backbone, its first steps frozen."""
        torch.manual_seed(0)
        backbone = MobileNetV2()
        backbone.load_imagenet(self.backbone)
        backbone.freeze(_FROZEN)
        return backbone


def train_detector(run: Run) -> CentreDetector:
    """The detector, trained on :data:`TRAINED`."""
    samples = load_samples(run.found.chosen(TRAINED).images)
    network = CentreNet(run.network(), 1)
    lesson = centre_lesson(network, samples, _DETECTOR, 8, {"folds": TRAINED, "set": "chula"})
    trained = fit(lesson, Schedule(run.detector, threads=run.threads), run.out / "detector")
    assert isinstance(trained, CentreNet)
    return CentreDetector(trained).eval()


def train_types(run: Run, folds: Sequence[int]) -> PatchNet:
    """The second stage, trained on some folds."""
    rows = run.found.chosen(folds).images
    network = PatchNet(run.network(), len(TYPES))
    sampler = PatchSampler(load_samples(rows), known_patches(rows), _CROPS, 32)
    lesson = Lesson(network, sampler, patch_loss, {"recipe": "patches", "folds": list(folds), "set": "chula"})
    name = "types-" + "".join(map(str, folds))
    trained = fit(lesson, Schedule(run.types, threads=run.threads), run.out / name)
    assert isinstance(trained, PatchNet)
    return trained


def crop(sample: Sample, centre_xy: np.ndarray) -> np.ndarray:
    """What the engine cuts out round an object's centre: uint8 (side, side, 3)."""
    return warped(sample.pixels, about(centre_xy, np.eye(2), CROP_PX), CROP_PX, 255)


def probabilities(network: PatchNet, samples: list[Sample], patches: PatchRows) -> np.ndarray:
    """(N, types) float32 of patches."""
    parts = [np.zeros((0, len(TYPES)), np.float32)]
    with torch.inference_mode():
        for start in range(0, len(patches), 64):
            which = range(start, min(start + 64, len(patches)))
            crops = [crop(samples[patches.image[i]], patches.centre_xy[i]) for i in which]
            parts.append(network(torch.from_numpy(np.stack(crops))).sigmoid().numpy())
    return np.concatenate(parts)


def judged(run: Run, network: PatchNet, folds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, types) and true types (N, types) of the patches of some folds."""
    rows = run.found.chosen(folds).images
    patches = known_patches(rows)
    return probabilities(network, load_samples(rows), patches), patches.types


def fit_boosting(found: np.ndarray, true: np.ndarray) -> GradientBoostingClassifier:
    """Normal (0) or abnormal (1), from the probabilities of the types."""
    state = abnormal(true, 0)
    known = state != UNKNOWN
    model = GradientBoostingClassifier(n_estimators=80, max_depth=3, learning_rate=0.1, subsample=0.7, random_state=0)
    return model.fit(found[known], (state[known] == YES).astype(int))


def best_threshold(found: np.ndarray, true: np.ndarray) -> float:
    """The probability from which a type holds, so that most patches have exactly their types."""
    whole = (true != UNKNOWN).all(axis=1)
    steps = np.arange(0.2, 0.71, 0.02)
    right = [((found[whole] >= t) == (true[whole] == YES)).all(axis=1).mean() for t in steps]
    return round(float(steps[int(np.argmax(right))]), 2)


def best_score(detector: CentreDetector, found: DetectionSet) -> float:
    """The score from which objects are shown: as many as are annotated, on the trained folds."""
    from wsiengine.evaluate_detection import at_score, match

    matches = []
    with torch.inference_mode():
        for row, sample in zip(found.images, load_samples(found.images), strict=True):
            boxes, scores, _ = detector(torch.from_numpy(sample.pixels[None]))
            matches.append(match(boxes.numpy(), scores.numpy(), row.objects.boxes_xyxy, row.objects.ignored))
    steps = np.arange(0.2, 0.61, 0.02)
    return round(float(steps[int(np.argmax([at_score(matches, t)["f1"] for t in steps]))]), 2)


def add_figures(run: Run, to: Path) -> None:
    """Score the model through the engine on fold 0, and write what was found into its card.

    The card is what says how the engine runs the model: it is there first, and without these figures.
    """
    from wsiengine.evaluating_detection import score_detector
    from wsiengine.models.card import load_card

    facts = json.loads((to / "figures.json").read_text(encoding="utf-8"))
    facts["held_out_fold_0"] = score_detector(run.found.chosen((0,)), load_card(to / "card.json"), str(to))
    _write(run, to, facts)


def _write(run: Run, to: Path, facts: dict[str, Any]) -> None:
    (to / "figures.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    write_card(to / "card.json", _card(to, facts, run))


def write_model(run: Run, to: Path) -> None:
    """Train what is not trained yet, and write the model's folder."""
    detector, types = train_detector(run), train_types(run, TRAINED)
    found, true = judged(run, types, TRAINED)
    boosting, threshold = fit_boosting(found, true), best_threshold(found, true)
    to.mkdir(parents=True, exist_ok=True)
    tile = torch.zeros(1, TILE_PX, TILE_PX, 3, dtype=torch.uint8)
    axes = {"tiles": {1: "H", 2: "W"}, "boxes": {0: "K"}, "scores": {0: "K"}, "labels": {0: "K"}}
    export_network(detector, tile, to / "rbc.onnx", outputs=("boxes", "scores", "labels"), axes=axes)
    crops = torch.zeros(1, CROP_PX, CROP_PX, 3, dtype=torch.uint8)
    free = {"crops": {0: "N"}, "logits": {0: "N"}}
    export_network(types, crops, to / "types.onnx", outputs=("logits",), axes=free, name="crops")
    export_boosting(boosting, to / "boosting.onnx")
    some = run.found.chosen((1,))
    facts = {"score": best_score(detector, some), "threshold": threshold, "trained": _trained(run.found)}
    _write(run, to, facts)
    add_figures(run, to)


def _trained(found: DetectionSet) -> dict[str, Any]:
    rows = found.chosen(TRAINED)
    types = np.concatenate([row.objects.types for row in rows.images])
    per_type = {name: int((types[:, i] == YES).sum()) for i, name in enumerate(TYPES)}
    return {"images": len(rows.images), "patches": rows.objects, "types": per_type}


def _card(to: Path, facts: dict[str, Any], run: Run) -> dict[str, Any]:
    trained = facts["trained"]
    pixels = {"mpp": None, "layout": "NHWC", "dtype": "uint8", "range": [0, 255]}
    held_out = facts.get("held_out_fold_0", {})
    tested = held_out.get("types", {})
    types = [
        {"name": name, "evidence": {"patches_trained": trained["types"][name], **tested.get(name, {})}}
        for name in TYPES
    ]
    found = held_out.get("classes", {}).get("Red cells", {}).get("ap50")
    shown = "{value} ({low}–{high})".format(**found) if found else None
    return {
        "name": "rbc",
        "description": "Single and touching red cells of stained smears at 1000×, their types, normal or abnormal.",
        "classes": [
            {
                "name": "Red cells",
                "evidence": {
                    "images_trained": trained["images"],
                    "patches_trained": trained["patches"],
                    "average_precision_at_iou_0.5": shown,
                },
            }
        ],
        "input": {"size_px": TILE_PX, **pixels},
        "outputs": {"boxes": "boxes", "scores": "scores", "labels": "labels"},
        "detection": {"largest_px": LARGEST_PX, "minimum_score": 0.05, "show_score": facts["score"], "per_tile": 300},
        "second": {
            "file": "types.onnx",
            "crop": {"side_px": CROP_PX},
            "input": {"size_px": CROP_PX, **pixels},
            "outputs": {"scores": "logits"},
            "classes": types,
            "activation": "sigmoid",
            "threshold": facts["threshold"],
            "head": {
                "file": "boosting.onnx",
                "scores": "scores",
                "classes": [
                    {"name": "Normal red cells", "colour": [0, 158, 115]},
                    {"name": "Abnormal red cells", "colour": [213, 94, 0]},
                ],
                "assigns": True,
            },
        },
        "output_stride_px": 16,
        "resources": [resource(to / name) for name in ("rbc.onnx", "types.onnx", "boosting.onnx", "figures.json")],
        "licence": "Apache-2.0; trained on Chula RBC-12 (MIT)",
        "terms": "LICENSES/rbc.txt",
        "intended_use": (
            "Research on stained thin smears photographed at 1000×, about 40 px a cell. Not a medical device, not for "
            "diagnosis. Trained on one hospital's fields; leucocytes and large platelets are found as cells."
        ),
        "training_command": "python -m wsiengine.training.rbc --data DIR --out RUN "
        f"--detector {run.detector} --types {run.types}",
        "evaluation_command": "wsiengine evaluate --model rbc --data DIR/rbc/chula --folds 0",
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m wsiengine.training.rbc", description="Train rbc.")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds rbc/chula and weights/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings; resumes what it holds")
    parser.add_argument("--to", type=Path, help="write the model's folder here")
    parser.add_argument("--only", choices=("detector", "types"), help="train this part alone")
    parser.add_argument("--detector", type=int, default=Run.detector, help="iterations")
    parser.add_argument("--types", type=int, default=Run.types, help="iterations")
    parser.add_argument("--threads", type=int, default=Run.threads)
    asked = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    found = read_chula(asked.data / "rbc" / "chula")
    run = Run(found, asked.data / BACKBONE, asked.out, asked.detector, asked.types, asked.threads)
    if asked.only == "detector":
        train_detector(run)
    elif asked.only == "types":
        train_types(run, TRAINED)
    if asked.to:
        write_model(run, asked.to)


if __name__ == "__main__":
    main()
