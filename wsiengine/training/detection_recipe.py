"""One command from annotated images to a finished detector, for a group's own objects.

A recipe is a JSON file with ``"task": "detect"``; every other entry may be left out::

    {"task": "detect", "network": "centre", "name": "mydetector", "format": "auto", "classes": [], "test_fold": 0,
     "mpp": null, "normalise": [], "side_px": 512, "backbone": "mobilenet_v2", "weights": "path.tflite", "frozen": 4,
     "turn": "any", "fill": 255, "iterations": 800, "batch": 4, "rate": 3e-4, "seed": 0, "threads": 2,
     "licence": "…", "intended_use": "…"}

``network`` is ``centre`` (anchor-free), ``faster_rcnn`` or ``mask_rcnn``; ``format`` one of
:data:`wsiengine.datasets.reading.FORMATS`. Images are taken in their own size, or with ``mpp`` brought to that many µm
per pixel and normalised as the engine does it. One fold is never trained on: the figures come from it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from wsiengine.datasets.reading import read_detections
from wsiengine.datasets.rows import Annotated, DetectionSet
from wsiengine.datasets.splitting import FOLDS, of_classes, split, with_folds
from wsiengine.errors import WsiError
from wsiengine.evaluate_detection import FPPI, average_precision, case_interval, match, sensitivity_at
from wsiengine.models.fields import SLUG, SLUG_WORDS, Fields
from wsiengine.normalise import parse_recipe
from wsiengine.training.backbones import build, load_weights
from wsiengine.training.centre import CentreDetector, CentreNet
from wsiengine.training.centre_training import centre_lesson
from wsiengine.training.detection_card import resource, write_card
from wsiengine.training.detection_data import Augment, Sample, load_sample, normalised_sample
from wsiengine.training.detection_export import export_network
from wsiengine.training.detection_loop import Lesson, Schedule, fit
from wsiengine.training.loop import Progress
from wsiengine.training.rcnn import RcnnDetector, RcnnNet
from wsiengine.training.rcnn_training import rcnn_lesson
from wsiengine.training.report import draw_curves

_CURVES = (("loss", (213, 94, 0), lambda row: row.get("loss")),)
NETWORKS = ("centre", "faster_rcnn", "mask_rcnn")
_CELL_PX = 32


@dataclass(frozen=True)
class DetectionRecipe:
    """What the recipe file says; see the module."""

    task: str = "detect"
    network: str = "centre"
    name: str = "detector"
    format: str = "auto"
    classes: tuple[str, ...] = ()
    test_fold: int = 0
    mpp: float | None = None
    normalise: tuple[dict[str, Any], ...] = ()
    side_px: int = 512
    backbone: str = "mobilenet_v2"
    width: float = 1.0
    weights: str | None = None
    frozen: int = 4
    turn: str = "any"
    fill: int = 255
    iterations: int = 800
    batch: int = 4
    rate: float = 3e-4
    head_rate: float = 1e-3
    seed: int = 0
    threads: int = 2
    licence: str = "Not stated by those who trained it"
    intended_use: str = "Research. Not a medical device, not for diagnosis."

    @classmethod
    def of(cls, said: dict[str, Any], file: Path) -> "DetectionRecipe":
        """From the JSON of a recipe file.

        Raises:
            WsiError: An unknown entry, or one of another kind.
        """
        known = {f.name: f for f in fields(cls)}
        if unknown := sorted(said.keys() - known.keys()):
            raise WsiError(
                f"the recipe {file} has unknown entries {', '.join(unknown)}",
                hint=f"entries of a detector's recipe are {', '.join(sorted(known))}",
            )
        for name, value in said.items():
            _check_kind(file, name, value, known[name].default)
        entries: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}
        recipe = cls(**entries)
        for name, value, allowed in (
            ("network", recipe.network, NETWORKS),
            ("turn", recipe.turn, ("any", "quarter", "none")),
            ("test_fold", recipe.test_fold, tuple(range(FOLDS))),
        ):
            if value not in allowed:
                raise WsiError(f"the recipe {file}: {name} is {value!r}", hint=f"use {', '.join(map(str, allowed))}")
        if not SLUG.fullmatch(recipe.name):
            raise WsiError(f"the recipe {file}: name is {recipe.name!r}, needed {SLUG_WORDS}")
        if recipe.side_px < 64 or recipe.side_px % _CELL_PX:
            raise WsiError(
                f"the recipe {file}: side_px is {recipe.side_px}, needed a multiple of {_CELL_PX} from 64 on"
            )
        return recipe


def _check_kind(file: Path, name: str, value: Any, usual: Any) -> None:
    optional = {"mpp": (int, float), "weights": (str,)}
    kinds = optional.get(name) or ((int, float) if isinstance(usual, float) else (type(usual),))
    kinds = (list,) if kinds == (tuple,) else kinds
    if (value is None and name in optional) or (isinstance(value, kinds) and not isinstance(value, bool)):
        return
    wanted = " or ".join(kind.__name__ for kind in kinds)
    raise WsiError(f"the recipe {file}: {name} is {value!r}, needed {wanted}")


def run(
    recipe: Path,
    data: Path,
    out: Path,
    *,
    say: Callable[[str], None] = print,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Train, test on the held-out fold, export.

    Args:
        recipe: A recipe file of a detector.
        data: The annotated images, in any format of :mod:`wsiengine.datasets.reading`.
        out: Where to: ``training/`` (resumed if there), the model's files, ``report.json``, ``report.md`` and
            ``curves.png``.
        say: Told in a line what happens.
        tell: Told of every iteration.

    Returns:
        The model's folder, ready for ``--model``.

    Raises:
        WsiError: The recipe or the annotations cannot be used.
    """
    own = DetectionRecipe.of(json.loads(Path(recipe).read_text(encoding="utf-8")), Path(recipe))
    found = of_classes(with_folds(read_detections(Path(data), own.format)), own.classes)
    for name in found.classes:  # the card would refuse it, after the training
        Fields({"class": name}, str(data)).name("class")
    trained, tested = split(found, own.test_fold)
    say(f"train {len(trained.images)} images, {trained.objects} objects; test {len(tested.images)} images")
    cv2.setNumThreads(1)
    samples = [prepared(row, own) for row in trained.images]
    lesson = _lesson(own, len(found.classes), samples)
    schedule = Schedule(own.iterations, own.rate, own.head_rate, seed=own.seed, threads=own.threads)
    fitted = fit(lesson, schedule, out / "training", tell)
    detector = _detector(fitted)
    figures = score(detector, tested, [prepared(row, own) for row in tested.images])
    export_detector(detector, out / "model.onnx", own.side_px)
    _report(out, own, (trained, tested), figures)
    largest = largest_side(samples)
    write_card(out / "card.json", _card(own, found, trained, figures, (largest, out)))
    for name, of_class in figures.items():
        low, high = of_class["ap50_interval_95"]
        say(f"held out: {name}: AP at IoU 0.5 {of_class['ap50']} ({low}–{high}, {of_class['objects']} objects)")
    return out


def prepared(row: Annotated, own: DetectionRecipe) -> Sample:
    """An image as the network sees it: in its own pixels, or as the engine brings it to µm/px and normalises it."""
    if own.mpp is None:
        return load_sample(row)
    return normalised_sample(row, parse_recipe(list(own.normalise)), own.mpp)


def _report(out: Path, own: DetectionRecipe, sides: tuple[DetectionSet, DetectionSet], figures: dict[str, Any]) -> None:
    said = {"recipe": own.__dict__, "held_out": figures, "classes": list(sides[0].classes)}
    (out / "report.json").write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    log = (out / "training" / "log.jsonl").read_text(encoding="utf-8")
    draw_curves([json.loads(line) for line in log.splitlines()], out / "curves.png", _CURVES)
    trained, tested = ({row.case for row in side.images} for side in sides)
    lines = [
        f"# {own.name}",
        "",
        f"{own.network} on {own.backbone}, {own.iterations} iterations of {own.batch} crops of {own.side_px} px; seed "
        f"{own.seed}. Trained on {len(sides[0].images)} images of {len(trained)} cases ({sides[0].objects} objects), "
        f"tested on {len(sides[1].images)} images of {len(tested)} other cases.",
        "",
        "![loss over iterations](curves.png)",
        "",
        "| held out | objects | AP at IoU 0.5 | 95 % by cases | "
        + " | ".join(f"found at {f} FPPI" for f in FPPI)
        + " |",
        "|---" * (4 + len(FPPI)) + "|",
    ]
    for name, of_class in figures.items():
        low, high = of_class["ap50_interval_95"]
        found = " | ".join(str(v) for v in of_class["sensitivity_at_fppi"].values())
        lines.append(f"| {name} | {of_class['objects']} | {of_class['ap50']} | {low}–{high} | {found} |")
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sides(samples: list[Sample]) -> np.ndarray:
    boxes = np.concatenate([s.objects.boxes_xyxy[~s.objects.ignored] for s in samples])
    return boxes[:, 2:] - boxes[:, :2]


def largest_side(samples: list[Sample]) -> float:
    """Of all boxes that count, in pixels."""
    return float(_sides(samples).max())


def usual_side(samples: list[Sample]) -> float:
    """The median side of the boxes that count, in pixels."""
    return float(np.median(_sides(samples)))


def _lesson(own: DetectionRecipe, classes: int, samples: list[Sample]) -> Lesson:
    torch.manual_seed(own.seed)
    backbone = build(own.backbone, own.width)
    if own.weights:
        load_weights(backbone, Path(own.weights))
    else:
        backbone.statistics = True  # random weights: batch normalisation has to learn what it normalises
    backbone.freeze(own.frozen if own.weights else 0)
    augment = Augment(own.side_px, turn=own.turn, fill=own.fill)
    if own.network == "centre":
        network = CentreNet(backbone, classes, fill=own.fill, usual_px=usual_side(samples))
        return centre_lesson(network, samples, augment, own.batch, own.__dict__)
    regions = RcnnNet(backbone, classes, masks=own.network == "mask_rcnn", fill=own.fill)
    return rcnn_lesson(regions, samples, augment, own.batch, own.__dict__)


def _detector(network: nn.Module) -> nn.Module:
    return CentreDetector(network).eval() if isinstance(network, CentreNet) else _rcnn(network)


def _rcnn(network: nn.Module) -> nn.Module:
    assert isinstance(network, RcnnNet)
    return RcnnDetector(network).eval()


def export_detector(detector: nn.Module, file: Path, side_px: int, *, half: bool = True) -> tuple[str, ...]:
    """Write a detector as ONNX, for pictures of any size; returns the names of its outputs."""
    masks = isinstance(detector, RcnnDetector) and detector.network.mask_head is not None
    outputs = ("boxes", "scores", "labels", "masks") if masks else ("boxes", "scores", "labels")
    axes: dict[str, dict[int, str]] = {"tiles": {1: "H", 2: "W"}} | {name: {0: "K"} for name in outputs}
    example = torch.zeros(1, side_px, side_px, 3, dtype=torch.uint8)
    export_network(detector, example, file, outputs=outputs, axes=axes, half=half)
    return outputs


def score(detector: nn.Module, tested: DetectionSet, samples: list[Sample]) -> dict[str, Any]:
    """Figures of each class on images that were not trained on."""
    answers = []
    with torch.inference_mode():
        for sample in samples:
            answers.append([part.numpy() for part in detector(torch.from_numpy(sample.pixels[None]))[:3]])
    cases = [row.case for row in tested.images]
    figures: dict[str, Any] = {}
    for k, name in enumerate(tested.classes):
        matches = []
        for (boxes, scores, labels), sample in zip(answers, samples, strict=True):
            mine, true = labels == k, sample.objects
            wanted = true.labels == k
            matches.append(match(boxes[mine], scores[mine], true.boxes_xyxy[wanted], true.ignored[wanted]))
        interval = case_interval(matches, cases, average_precision)
        figures[name] = {
            "images": len(samples),
            "objects": sum(m.true for m in matches),
            "ap50": _rounded(interval.value),
            "ap50_interval_95": [_rounded(interval.low), _rounded(interval.high)],
            "sensitivity_at_fppi": {str(f): _rounded(sensitivity_at(matches, f)) for f in FPPI},
        }
    return figures


def _rounded(value: float) -> float | None:
    return round(value, 3) if np.isfinite(value) else None


def _card(
    own: DetectionRecipe, found: DetectionSet, trained: DetectionSet, figures: dict[str, Any], made: tuple[float, Path]
) -> dict[str, Any]:
    largest, folder = made
    counts = np.bincount(
        np.concatenate([row.objects.labels for row in trained.images]).astype(np.int64), minlength=len(found.classes)
    )
    masks = own.network == "mask_rcnn"
    tile = max(own.side_px, int(-(-(1.5 * largest + 2 * _CELL_PX) // _CELL_PX)) * _CELL_PX)
    return {
        "name": own.name,
        "description": f"{', '.join(found.classes)}: {own.network} on {own.backbone}, {len(trained.images)} images.",
        "classes": [
            {"name": name, "evidence": {"objects_trained": int(counts[k]), **figures[name]}}
            for k, name in enumerate(found.classes)
        ],
        "input": {"size_px": tile, "mpp": own.mpp, "layout": "NHWC", "dtype": "uint8", "pad": own.fill},
        "recipe": list(own.normalise),
        "outputs": {"boxes": "boxes", "scores": "scores", "labels": "labels"} | ({"masks": "masks"} if masks else {}),
        "detection": {"largest_px": round(largest, 1), "masks": "roi" if masks else None},
        "output_stride_px": _CELL_PX,
        "resources": [resource(folder / "model.onnx")],
        "licence": own.licence,
        "intended_use": own.intended_use,
        "training_command": f"wsiengine train RECIPE --data DIR (seed {own.seed}, {own.iterations} iterations)",
    }
