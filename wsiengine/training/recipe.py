"""One command from labels to a finished model folder, for a group's own classes.

A recipe is a JSON file; every entry may be left out::

    {"name": "mymodel", "classes": ["Benign", "Malignant"], "merge": {"DCIS": "Malignant"}, "mpp": 1.0,
     "source_mpp": 0.5, "test_fold": 0, "iterations": 600, "seed": 0, "threads": 2, "backbone": "path.tflite",
     "licence": "…", "intended_use": "…"}

``classes`` is their order by rising severity (default: alphabetical). One fold is never trained on: the figures in the
card and the report come from it. The network is crc5's: MobileNetV2 from ImageNet, fine-tuned.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from wsiengine.classes import colour_of
from wsiengine.errors import WsiError
from wsiengine.training.crc5 import BACKBONE
from wsiengine.training.data import Field, check_leak
from wsiengine.training.export import export_onnx
from wsiengine.training.figures import GATE_MINIMUM, table
from wsiengine.training.loop import Recipe, predictor, train
from wsiengine.training.mobilenet import CELL_OFFSET_PX, STRIDE_PX
from wsiengine.training.scoring import TILE_PX, score
from wsiengine.training.tables import FOLDS, read_labels


@dataclass(frozen=True)
class OwnRecipe:
    """What the recipe file says; see the module."""

    name: str = "model"
    classes: tuple[str, ...] = ()
    merge: dict[str, str] = field(default_factory=dict)
    mpp: float = 1.0
    source_mpp: float | None = None
    test_fold: int = 0
    iterations: int = 600
    seed: int = 0
    threads: int = 2
    backbone: str | None = None
    licence: str = "Not stated by those who trained it"
    intended_use: str = "Research. Not a medical device, not for diagnosis."

    @classmethod
    def read(cls, recipe: Path | str) -> "OwnRecipe":
        """From a JSON file, or ``default``.

        Raises:
            WsiError: No such file, no JSON, an unknown entry or one of another kind.
        """
        if str(recipe) == "default":
            return cls()
        file = Path(recipe)
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WsiError(f"the recipe {file} cannot be read: {error}", hint="give a JSON file, or default") from error
        known = {f.name for f in fields(cls)}
        if not isinstance(said, dict) or (unknown := sorted(said.keys() - known)):
            what = f"unknown entries {', '.join(unknown)}" if isinstance(said, dict) else "no entries"
            raise WsiError(f"the recipe {file} has {what}", hint=f"entries are {', '.join(sorted(known))}")
        for name, value in said.items():
            _check(file, name, value)
        entries: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}
        return cls(**entries)


_KINDS: dict[str, tuple[type, ...]] = {
    "classes": (list,),
    "merge": (dict,),
    "mpp": (int, float),
    "source_mpp": (int, float, type(None)),
    "backbone": (str, type(None)),
} | dict.fromkeys(("test_fold", "iterations", "seed", "threads"), (int,))


def _check(file: Path, name: str, value: object) -> None:
    kinds = _KINDS.get(name, (str,))
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise WsiError(f"the recipe {file}: {name} is {value!r}, needed {wanted}")
    if name == "test_fold" and value not in range(FOLDS):
        raise WsiError(f"the recipe {file}: test_fold is {value}, needed 0 to {FOLDS - 1}")


def run(recipe: Path | str, data: Path, out: Path, *, say: Callable[[str], None] = print) -> Path:
    """Train, test on the held-out fold, export.

    Args:
        recipe: A recipe file, or ``default``.
        data: Folder of labels (see :mod:`wsiengine.training.tables`).
        out: Where to: ``training/`` (resumed if there), the model's files, ``report.json`` and ``curves.png``.
        say: Told in a line what happens.

    Returns:
        The model's folder, ready for ``--model``.

    Raises:
        WsiError: The recipe or the labels cannot be used.
    """
    own = OwnRecipe.read(recipe)
    labelled = read_labels(Path(data), merge=own.merge, mpp=own.source_mpp)
    classes = own.classes or tuple(sorted({f.label for f in labelled}))
    chosen = [f for f in labelled if f.label in classes]
    held_out = [f for f in chosen if f.fold == own.test_fold]
    plan = Recipe(
        classes=classes,
        mpp=own.mpp,
        folds=tuple(i for i in range(FOLDS) if i != own.test_fold),
        iterations=own.iterations,
        seed=own.seed,
        threads=own.threads,
    )
    _check_sides(chosen, classes)
    check_leak(plan.chosen(chosen), held_out)
    if not held_out:
        raise WsiError(f"fold {own.test_fold} is empty: nothing to test on", hint="choose another test_fold")
    say(f"train {len(plan.chosen(chosen))} images, test {len(held_out)}; classes {', '.join(classes)}")
    network = train(chosen, plan, backbone=_backbone(own, Path(data)), out=out / "training")
    gated = any(f.mask is not None for f in plan.chosen(chosen))
    scores = score(held_out, predictor(network), own.mpp, classes=classes, gated=gated)
    figures = {"tile": table(scores), "image": table(scores.by_field())}
    export_onnx(network, out / "model.onnx", rows=tuple((i, 0.0) for i in range(len(classes))))
    _write_json(out / "report.json", {"recipe": own.__dict__, "held_out": figures})
    _write_json(out / "card.json", _card(own, classes, plan.chosen(chosen), figures, out / "model.onnx"))
    cv2.imwrite(str(out / "curves.png"), curves(out / "training" / "log.jsonl"))
    found = figures["image"]["all"]
    low, high = found["interval_95"]
    say(f"held out: balanced accuracy {found['balanced_accuracy']} ({low}–{high}, {found['cases']} cases)")
    return out


def _check_sides(chosen: list[Field], classes: tuple[str, ...]) -> None:
    for name in classes:
        cases = {f.case for f in chosen if f.label == name}
        if len(cases) < 2:
            raise WsiError(
                f"class {name} comes from {len(cases)} case: training and test need one each",
                hint="add cases, or say which files belong to which case in the column 'case'",
            )


def _backbone(own: OwnRecipe, data: Path) -> Path:
    places = [Path(own.backbone)] if own.backbone else [data / BACKBONE, data / BACKBONE.name]
    for place in places:
        if place.is_file():
            return place
    raise WsiError(
        f"the ImageNet weights are not at {' or '.join(map(str, places))}",
        hint="download mobilenet_v2_1.0_224 (int8) from the Coral test data and name it as 'backbone' in the recipe",
    )


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(
    own: OwnRecipe, classes: tuple[str, ...], trained: list[Field], figures: dict[str, Any], model: Path
) -> dict[str, Any]:
    gated = any(f.mask is not None for f in trained)
    tested = figures["image"]["all"]["classes"]

    def evidence(name: str) -> dict[str, Any]:
        cases = len({f.case for f in trained if f.label == name})
        rest = tested.get(name, {"cases": 0, "rows": 0})
        return {"cases_trained": cases, "cases_tested": rest["cases"], "recall": rest.get("recall")}

    return {
        "schema_version": 1,
        "name": own.name,
        "version": "1.0",
        "task": "classify",
        "description": f"{', '.join(classes)}; MobileNetV2, fine-tuned on {len(trained)} images.",
        "classes": [{"name": n, "colour": list(colour_of(n)), "evidence": evidence(n)} for n in classes],
        "input": {"size_px": TILE_PX, "mpp": own.mpp, "layout": "NHWC", "dtype": "uint8", "range": [0, 255]},
        "outputs": {"scores": "logits", "cam": "cam"}
        | ({"gate": "epithelium", "gate_map": "epithelium_map"} if gated else {}),
        "activation": "softmax",
        "output_stride_px": STRIDE_PX,
        "dense": {"block_px": 1024, "halo_px": 96, "offset_px": CELL_OFFSET_PX},
        "gate": {"minimum": GATE_MINIMUM, "otherwise": "No tissue of interest"} if gated else None,
        "resources": [{"file": model.name, "sha256": sha256(model.read_bytes()).hexdigest()}],
        "precision": {"weights": "float16 (backbone)", "arithmetic": "float32"},
        "licence": own.licence,
        "intended_use": own.intended_use,
        "training_command": f"wsiengine train RECIPE --data DIR (seed {own.seed}, {own.iterations} iterations)",
    }


def curves(log: Path, size_px: tuple[int, int] = (240, 480)) -> np.ndarray:
    """Picture (rows, cols, 3) of the losses over iterations, from 0 to 1 upwards: classes orange, gate blue."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    picture = np.full((*size_px, 3), 255, np.uint8)
    last = max(row["iteration"] for row in rows)
    for name, colour in (("class_loss", (0, 94, 213)), ("gate_loss", (178, 114, 0))):
        points = [(row["iteration"] / last, min(1.0, row[name])) for row in rows]
        pixels = [(round(x * (size_px[1] - 1)), round((1 - y) * (size_px[0] - 1))) for x, y in points]
        cv2.polylines(picture, [np.array(pixels, np.int32)], False, colour, 2, cv2.LINE_AA)
    return picture
