"""The recipe of the bundled model ``mass``: masses in mammograms::

    python -m wsiengine.training.mass --data DIR --out RUN
    python -m wsiengine.training.mass --data DIR --out RUN --to wsiengine/models/zoo/mass

So few masses are annotated that every figure comes from cross-validation: five networks, each tested on the patients of
the fold that it was not trained on. The bundled one is trained on folds 1 to 4. Deterministic for one machine type and
number of threads; started again on the same folder it resumes.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from wsiengine.breast import breast_mask
from wsiengine.datasets.mias import MPP as MIAS_MPP
from wsiengine.datasets.mias import read_mias
from wsiengine.datasets.rows import Annotated, DetectionSet
from wsiengine.datasets.splitting import FOLDS
from wsiengine.decoding import unsuppressed
from wsiengine.evaluate_detection import (
    FPPI,
    Matches,
    at_score,
    average_precision,
    case_interval,
    match,
    sensitivity_at,
)
from wsiengine.geometry import Lattice, Mpp
from wsiengine.models.detection import Merge
from wsiengine.normalise import parse_recipe
from wsiengine.slides import open_slide
from wsiengine.training.backbones import build, load_weights
from wsiengine.training.centre import CentreDetector, CentreNet
from wsiengine.training.centre_training import centre_lesson
from wsiengine.training.crc5 import BACKBONE
from wsiengine.training.detection_card import resource, write_card
from wsiengine.training.detection_data import Augment, Sample, normalised_sample
from wsiengine.training.detection_export import export_network
from wsiengine.training.detection_loop import Schedule, fit

MPP, TILE_PX, LARGEST_PX, CELL_PX = 800.0, 256, 100, 4
NORMALISE = [{"step": "clahe", "region_um": 25600, "clip": 2.0}]
IOUS = (0.5, 0.25)
"""A circle drawn by hand says roughly where: both overlaps are reported."""
_AUGMENT = Augment(192, scales=(0.75, 1.33), colour=0.12, centre_on_objects=0.5, fill=0)
_BATCH, _FROZEN, _LIMIT = 8, 4, 50
_RATE, _HEAD_RATE, _USUAL_PX = 5e-4, 3e-3, 24.0
_TRAINED = (1, 2, 3, 4)
_MERGE = Merge(above=0.3)
_MINIMUM_SCORE = 0.02


@dataclass(frozen=True)
class Run:
    """What to train on, and how long; ``areas``: the circles also train where masses lie, not only their boxes."""

    found: DetectionSet
    backbone: Path
    out: Path
    iterations: int = 120
    areas: bool = True
    threads: int = 1


def samples_of(rows: Sequence[Annotated], recipe: Sequence[dict[str, Any]] = NORMALISE) -> list[Sample]:
    """Mammograms as the engine hands them to the model."""
    return [normalised_sample(row, parse_recipe(list(recipe)), MPP) for row in rows]


def train(run: Run, folds: Sequence[int]) -> CentreDetector:
    """A detector trained on some folds."""
    torch.manual_seed(0)
    backbone = build("mobilenet_v2")
    load_weights(backbone, run.backbone)
    backbone.freeze(_FROZEN)
    network = CentreNet(backbone, 1, fill=0, areas=run.areas, usual_px=_USUAL_PX)
    samples = samples_of(run.found.chosen(folds).images)
    facts = {"folds": list(folds), "set": "mias", "areas": run.areas}
    name = "without-" + "".join(str(f) for f in range(FOLDS) if f not in folds)
    fitted = fit(
        centre_lesson(network, samples, _AUGMENT, _BATCH, facts),
        Schedule(run.iterations, _RATE, _HEAD_RATE, threads=run.threads),
        run.out / name,
    )
    assert isinstance(fitted, CentreNet)
    return CentreDetector(fitted, _LIMIT).eval()


def find(
    detector: CentreDetector, rows: Sequence[Annotated], samples: list[Sample]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Boxes and scores of each mammogram, as a run with the card gives them: merged, and those in the breast alone."""
    found = []
    for row, sample in zip(rows, samples, strict=True):
        with torch.inference_mode():
            boxes, scores, _ = (part.numpy() for part in detector(torch.from_numpy(sample.pixels[None])))
        kept = np.flatnonzero(scores >= _MINIMUM_SCORE)
        boxes, scores = boxes[kept], scores[kept]
        kept = unsuppressed(boxes.astype(np.float64), np.zeros(len(boxes), np.int64), _MERGE)
        boxes, scores = boxes[kept], scores[kept]
        breast = breast_of(row)
        centres = ((boxes[:, :2] + boxes[:, 2:]) / 2 / CELL_PX).astype(np.int64)
        x, y = np.minimum(centres, np.array(breast.shape)[::-1] - 1).T
        found.append((boxes[breast[y, x]], scores[breast[y, x]]))
    return found


def breast_of(row: Annotated) -> np.ndarray:
    """(rows, cols) bool: the cells of a mammogram that a run analyses."""
    slide = open_slide(row.image, mpp=MIAS_MPP)
    lattice = Lattice(slide.info.size_l0, Mpp.square(MIAS_MPP), Mpp.square(MPP), CELL_PX)
    analysed: np.ndarray = breast_mask(slide).cell_fraction(lattice) >= 0.5
    return analysed


def cross_validate(run: Run) -> dict[str, Any]:
    """Figures of five networks, each on the fold that it was not trained on."""
    matches: dict[float, list[Matches]] = {iou: [] for iou in IOUS}
    cases: list[str] = []
    for fold in range(FOLDS):
        detector = train(run, [other for other in range(FOLDS) if other != fold])
        rows = run.found.chosen((fold,)).images
        samples = samples_of(rows)
        for (boxes, scores), sample, row in zip(find(detector, rows, samples), samples, rows, strict=True):
            for iou in IOUS:
                matches[iou].append(match(boxes, scores, sample.objects.boxes_xyxy, sample.objects.ignored, iou))
            cases.append(row.case)
    return {f"iou_{iou}": figures(matches[iou], cases) for iou in IOUS}


def figures(matches: Sequence[Matches], cases: Sequence[str]) -> dict[str, Any]:
    """AP, sensitivity at some false positives per image, overlaps; with 95 % intervals by patient."""

    def with_interval(figure: Any) -> dict[str, float]:
        found = case_interval(matches, cases, figure)
        return {"value": round(found.value, 3), "low": round(found.low, 3), "high": round(found.high, 3)}

    overlaps = at_score(matches, _score_at(matches, 1.0))
    return {
        "images": len(matches),
        "masses": sum(m.true for m in matches),
        "average_precision": with_interval(average_precision),
        "sensitivity_at_fppi": {str(f): with_interval(lambda m, f=f: sensitivity_at(m, f)) for f in FPPI},
        "at_1_fppi": {name: round(overlaps[name], 3) for name in ("iou", "overlapping_ratio", "precision", "recall")},
    }


def _score_at(matches: Sequence[Matches], fppi: float) -> float:
    """The lowest score with at most so many false positives per image."""
    wrong = np.sort(np.concatenate([m.scores[m.counted & ~m.hits] for m in matches]))[::-1]
    allowed = int(fppi * len(matches))
    return float(np.nextafter(wrong[allowed], 2)) if allowed < len(wrong) else 0.0


def write_model(run: Run, to: Path) -> None:
    """Train what is not trained yet, and write the model's folder."""
    found = cross_validate(run)
    detector = train(run, _TRAINED)
    to.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(1, TILE_PX, TILE_PX, 3, dtype=torch.uint8)
    axes = {"tiles": {1: "H", 2: "W"}, "boxes": {0: "K"}, "scores": {0: "K"}, "labels": {0: "K"}}
    export_network(detector, example, to / "mass.onnx", outputs=("boxes", "scores", "labels"), axes=axes)
    trained = run.found.chosen(_TRAINED)
    rows = run.found.chosen((0,)).images
    samples = samples_of(rows)
    held_out = [
        match(boxes, scores, s.objects.boxes_xyxy, s.objects.ignored, 0.25)
        for (boxes, scores), s in zip(find(detector, rows, samples), samples, strict=True)
    ]
    facts = {
        "cross_validated": found,
        "held_out_fold_0": figures(held_out, [row.case for row in rows]),
        "trained": {"images": len(trained.images), "masses": trained.objects},
        "score_at_1_fppi": round(_score_at(held_out, 1.0), 3),
    }
    (to / "figures.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    write_card(to / "card.json", _card(to, facts, run))


def _card(to: Path, facts: dict[str, Any], run: Run) -> dict[str, Any]:
    found = facts["cross_validated"]["iou_0.25"]
    sensitivity = found["sensitivity_at_fppi"]["1.0"]
    return {
        "name": "mass",
        "version": "1.1",
        "description": (
            f"Masses in mammograms; a weak model from {facts['trained']['masses']} masses. Cross-validated sensitivity "
            f"{sensitivity['value']} ({sensitivity['low']}–{sensitivity['high']}) at one false positive per image, for "
            "boxes that overlap the drawn circle by an IoU of 0.25."
        ),
        "classes": [
            {"name": "Mass", "colour": [213, 94, 0], "evidence": {**facts["trained"], **facts["cross_validated"]}}
        ],
        "input": {"size_px": TILE_PX, "mpp": MPP, "layout": "NHWC", "dtype": "uint8", "range": [0, 255], "pad": 0},
        "recipe": NORMALISE,
        "tissue": "breast",
        "outputs": {"boxes": "boxes", "scores": "scores", "labels": "labels"},
        "detection": {
            "largest_px": LARGEST_PX,
            "minimum_score": _MINIMUM_SCORE,
            "show_score": facts["score_at_1_fppi"],
            "per_tile": _LIMIT,
            "merge": asdict(_MERGE),
        },
        "output_stride_px": CELL_PX,
        "resources": [resource(to / name) for name in ("mass.onnx", "figures.json")],
        "licence": "research use only",
        "terms": "LICENSES/mass.txt",
        "intended_use": (
            "Shows how mammograms go through the engine. Not a medical device, not for diagnosis, and too weak for any "
            "clinical question: it misses many masses and marks healthy tissue."
        ),
        "training_command": f"python -m wsiengine.training.mass --data DIR --out RUN --iterations {run.iterations}",
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m wsiengine.training.mass", description="Train mass.")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds mammo/mias and weights/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings; resumes what it holds")
    parser.add_argument("--to", type=Path, help="write the model's folder here")
    parser.add_argument("--only", type=int, choices=range(FOLDS), help="train the network without this fold alone")
    parser.add_argument("--iterations", type=int, default=Run.iterations)
    parser.add_argument("--boxes-only", action="store_true", help="the circles' areas train nothing")
    parser.add_argument("--threads", type=int, default=Run.threads)
    asked = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    found = read_mias(asked.data / "mammo" / "mias")
    run = Run(found, asked.data / BACKBONE, asked.out, asked.iterations, not asked.boxes_only, asked.threads)
    if asked.only is not None:
        train(run, [fold for fold in range(FOLDS) if fold != asked.only])
    if asked.to:
        write_model(run, asked.to)


if __name__ == "__main__":
    main()
