"""Makes the folder of a bundled model from a training: ONNX file, card and figures::

python -m wsiengine.training.release --run RUN --figures figures.json --to wsiengine/models/zoo/crc5
"""

import argparse
import json
import math
import shlex
from hashlib import sha256
from pathlib import Path
from typing import Any

from wsiengine.classes import COLOURS
from wsiengine.training.crc5 import RECIPE
from wsiengine.training.data import CLASSES, MPP_YX, POLYP, Field, read_fields
from wsiengine.training.export import export_onnx
from wsiengine.training.figures import GATE_MINIMUM, best_temperature, false_diagnosis, uncertain_below
from wsiengine.training.loop import Recipe, load_trained
from wsiengine.training.mobilenet import CELL_OFFSET_PX, STRIDE_PX
from wsiengine.training.scoring import TILE_PX, load_scores
from wsiengine.training.validate import summary

VERSION = "1.0"
GRADES = ("Adenocarcinoma well", "Adenocarcinoma moderate", "Adenocarcinoma poor")
_FINDING = {
    "Adenocarcinoma moderate": "moderately differentiated",
    "Adenocarcinoma poor": "poorly differentiated",
}
_THIRD = -math.log(len(GRADES))
ROWS = ((0, 0.0), (1, 0.0), *((2, _THIRD) for _ in GRADES))
"""Class of the file -> trained class and constant: without evidence on grade, each takes a third of carcinoma."""

_UNGRADED = (
    "Grade is not validated: the three grade outputs share one adenocarcinoma score equally. "
    "No image labelled well differentiated was available, and moderate and poor rest on about 12 patients."
)
_INTENDED = (
    "Research on H&E-stained colorectal tissue. Not a medical device, not for diagnosis. The evidence comes from gland "
    "fields of three laboratories; other tissue, stains and scanners were hardly seen, and normal mucosa and adenoma "
    "of another laboratory are easily confused (docs/crc5.md). It recognises neither immunohistochemistry nor other "
    "organs for what they are."
)
_LICENCE = "research use only"


def write_model(run: Path, folder: Path, figures: dict[str, Any]) -> None:
    """Write ``crc5.onnx``, ``figures.json`` and ``card.json``.

    Args:
        run: The training's folder.
        folder: The model's folder.
        figures: What :func:`gather` found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.read(run / "recipe.json")
    export_onnx(load_trained(run), folder / "crc5.onnx", rows=ROWS, temperature=figures["temperature"])
    (folder / "figures.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = json.dumps(card(recipe, figures, folder), indent=2, ensure_ascii=False)
    (folder / "card.json").write_text(text + "\n", encoding="utf-8")


def card(recipe: Recipe, figures: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Card v1 of the model whose files lie in ``folder``."""
    names = (*CLASSES[:2], *GRADES)
    return {
        "schema_version": 1,
        "name": "crc5",
        "version": VERSION,
        "task": "classify",
        "description": _description(figures),
        "classes": [_class(name, figures) for name in names],
        "input": {"size_px": TILE_PX, "mpp": recipe.mpp, "layout": "NHWC", "dtype": "uint8", "range": [0, 255]},
        "recipe": [],
        "outputs": {"scores": "logits", "gate": "epithelium", "cam": "cam", "gate_map": "epithelium_map"},
        "activation": "softmax",
        "output_stride_px": STRIDE_PX,
        "halo_px": 0,
        "dense": {"block_px": 1024, "halo_px": 96, "offset_px": CELL_OFFSET_PX},
        "gate": {"minimum": GATE_MINIMUM, "otherwise": "No epithelium"},
        "uncertain": {"below": figures["uncertain"]["below"], "name": "Uncertain"},
        "resources": [_resource(folder / name) for name in ("crc5.onnx", "figures.json")],
        "precision": {"weights": "float16 (backbone)", "arithmetic": "float32", "against_torch": "1e-4 in logits"},
        "licence": _LICENCE,
        "terms": "LICENSES/crc5.txt",
        "intended_use": _INTENDED,
        "training_command": command(recipe),
    }


def command(recipe: Recipe) -> str:
    """The command that trains again."""
    words = ["python", "-m", "wsiengine.training.crc5", "--data", "DIR", "--out", "RUN"]
    words += ["--folds", ",".join(map(str, recipe.folds))]
    if recipe.sources != RECIPE.sources:
        words += ["--sources", ",".join(recipe.sources)]
    words += ["--iterations", str(recipe.iterations), "--seed", str(recipe.seed), "--threads", str(recipe.threads)]
    return shlex.join(words)


def _description(figures: dict[str, Any]) -> str:
    found = figures["held_out"]["image"]["all"]
    low, high = found["interval_95"]
    scales = ", ".join(f"{name} {y} × {x}" for name, (y, x) in MPP_YX.items())
    return (
        "Normal, adenoma and adenocarcinoma in H&E-stained colorectal tissue; MobileNetV2, fine-tuned. "
        f"Held-out balanced accuracy of images {found['balanced_accuracy']} (95 % by cases {low}–{high}; "
        f"{found['rows']} images of {found['cases']} cases, {figures['split']}). "
        f"µm/px taken for the training sets (down × across), measured against GlaS: {scales}."
    )


def _class(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    graded = name in GRADES
    trained = "Adenocarcinoma" if graded else name
    tested = figures["held_out"]["image"]["all"]["classes"][trained]
    evidence = {
        "cases_trained": figures["trained"][trained]["cases"],
        "images_trained": figures["trained"][trained]["images"],
        "cases_tested": tested["cases"],
        "images_tested": tested["rows"],
        "recall": tested["recall"],
        "auroc": tested["auroc"],
    }
    if graded:
        own = figures["graded_cases"][name]
        evidence = {"cases_trained": own, "cases_tested": 0, "note": _UNGRADED, trained: evidence}
    info: dict[str, Any] = {"name": name, "colour": list(COLOURS[name])}
    return info | ({"asserted_as": trained} if graded else {}) | {"evidence": evidence}


def _resource(file: Path) -> dict[str, str]:
    return {"file": file.name, "sha256": sha256(file.read_bytes()).hexdigest()}


def gather(fields: list[Field], recipe: Recipe, held_out: list[Path], out_of_fold: list[Path]) -> dict[str, Any]:
    """All that the card says about evidence.

    Args:
        fields: All labelled fields.
        recipe: Of the network to be bundled.
        held_out: Its scores of fields that it was not trained on.
        out_of_fold: Scores by sibling networks of the fields that it *was* trained on; they set the temperature and the
            uncertain rule. Empty: neither is set.
    """
    scores = load_scores(held_out, fields)
    windows = load_scores([f.with_suffix(".windows.npz") for f in held_out], fields)
    temperature, uncertain = 1.0, {"below": 0.5}
    if out_of_fold:
        siblings = load_scores(out_of_fold, fields)
        temperature = round(best_temperature(siblings), 3)
        uncertain = uncertain_below(siblings, temperature)
    trained = recipe.chosen(fields)
    return {
        "split": f"folds {_list({f.fold for f in scores.fields})}, trained on {_list(set(recipe.folds))}",
        "held_out": summary(scores, temperature),
        "false_diagnosis": false_diagnosis(windows),
        "temperature": temperature,
        "uncertain": uncertain,
        "trained": {name: _count([f for f in trained if f.label == name]) for name in (*CLASSES, POLYP)},
        "graded_cases": {g: _count([f for f in trained if f.finding == _FINDING.get(g)])["cases"] for g in GRADES},
    }


def _count(fields: list[Field]) -> dict[str, int]:
    return {"cases": len({f.case for f in fields}), "images": len(fields)}


def _list(folds: set[int]) -> str:
    return ", ".join(map(str, sorted(folds)))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m wsiengine.training.release", description="Bundle a training.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the training")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds crc/")
    parser.add_argument("--held-out", type=Path, nargs="+", required=True, help="its scores (validate score)")
    parser.add_argument("--out-of-fold", type=Path, nargs="*", default=[], help="scores by siblings, for calibration")
    parser.add_argument("--to", type=Path, required=True, help="folder of the model")
    asked = parser.parse_args(arguments)
    recipe = Recipe.read(asked.run / "recipe.json")
    write_model(asked.run, asked.to, gather(read_fields(asked.data), recipe, asked.held_out, asked.out_of_fold))


if __name__ == "__main__":
    main()
