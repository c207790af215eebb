"""Makes the folder of a bundled model from a training: ONNX file, card, sets and figures::

    python -m wsiengine.training.release crc5 --run SPLITS/fold0 --data DIR --out-of-fold SPLITS/fold1.npz … \\
        --splits splits.json --to wsiengine/models/zoo/crc5

The figures of held-out fields are what ``wsiengine evaluate`` says of the finished folder
(:mod:`wsiengine.training.evidence`).
"""

import argparse
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from wsiengine.classes import COLOURS
from wsiengine.labelled_sets import FILE as SETS
from wsiengine.training.cells import STRIDE_PX, CellNet
from wsiengine.training.crc5 import RECIPE
from wsiengine.training.data import CLASSES, POLYP, Field, check_leak, read_fields
from wsiengine.training.decision import MiddleRule
from wsiengine.training.evidence import ABOUT, measure, write_evidence
from wsiengine.training.export import export_onnx
from wsiengine.training.figures import GATE_MINIMUM, LEAST_SURE, best_temperature, uncertain_below
from wsiengine.training.loop import load_trained
from wsiengine.training.mobilenet import CELL_OFFSET_PX
from wsiengine.training.other_stain import StainRule, silence_other_stains
from wsiengine.training.schedule import Recipe
from wsiengine.training.scoring import TILE_PX, Scores, load_scores
from wsiengine.training.views import DRAWN

VERSION = "1.2"
STAINS = StainRule(1.55, 1.62)
"""0.5 % of the cells of H&E-stained training tissue (folds 1 to 4) exceed the first."""
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
    "fields of {labs}; other tissue, stains and scanners were hardly seen, and normal mucosa and adenoma "
    "of another laboratory are easily confused (docs/crc5.md). It does not "
    "know other organs for what they are; brown immunohistochemistry becomes uncertain."
)


@dataclass(frozen=True)
class Bundle:
    """What tells the bundled models apart.

    Attributes:
        name: Of the model.
        rows: Class of the file -> trained class and constant added to its logit.
        names: Classes of the file.
        licence: In a word.
        intended_use: In sentences.
    """

    name: str
    rows: tuple[tuple[int, float], ...]
    names: tuple[str, ...]
    licence: str
    intended_use: str


BUNDLES = {
    "crc5": Bundle(
        "crc5", ROWS, (*CLASSES[:2], *GRADES), "research use only", _INTENDED.format(labs="three laboratories")
    ),
    "crc5-ebhi": Bundle(
        "crc5-ebhi",
        tuple((i, 0.0) for i in range(len(CLASSES))),
        CLASSES,
        "CC BY 4.0 (training images: EBHI-Seg)",
        _INTENDED.format(labs="one laboratory")
        + " It hardly knows tissue without epithelium: stroma of other laboratories gets a class.",
    ),
}


def write_model(network: CellNet, recipe: Recipe, bundle: Bundle, folder: Path, figures: dict[str, Any]) -> None:
    """Write the ONNX file, ``figures.json``, ``sets.json`` and ``card.json``, as yet without held-out fields.

    Args:
        network: What was trained, with its rule for the middle class.
        recipe: How.
        bundle: Which model.
        folder: The model's folder.
        figures: What :func:`gather` found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{bundle.name}.onnx"
    export_onnx(network, file, rows=bundle.rows, temperature=figures["temperature"])
    silence_other_stains(file, STAINS)
    figures, sets = {k: v for k, v in figures.items() if k != "sets"}, figures["sets"]
    (folder / SETS).write_text(json.dumps(sets, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = json.dumps(card(recipe, bundle, figures, folder), indent=2, ensure_ascii=False)
    (folder / "card.json").write_text(text + "\n", encoding="utf-8")


def card(recipe: Recipe, bundle: Bundle, figures: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Card v1 of the model whose files lie in ``folder``."""
    return {
        "schema_version": 1,
        "name": bundle.name,
        "version": VERSION,
        "task": "classify",
        "description": ABOUT,
        "classes": [_class(name, figures) for name in bundle.names],
        "input": {"size_px": TILE_PX, "mpp": recipe.mpp, "layout": "NHWC", "dtype": "uint8", "range": [0, 255]},
        "recipe": [],
        "outputs": {"scores": "logits", "gate": "epithelium", "cam": "cam", "gate_map": "epithelium_map"},
        "activation": "softmax",
        "output_stride_px": STRIDE_PX,
        "halo_px": 0,
        "dense": {"block_px": 4096, "halo_px": 64, "offset_px": CELL_OFFSET_PX},
        "gate": {"minimum": GATE_MINIMUM, "otherwise": "No epithelium"},
        "uncertain": {"below": figures["uncertain"]["below"], "name": "Uncertain"},
        "resources": [_resource(folder / name) for name in (f"{bundle.name}.onnx", "figures.json", SETS)],
        "precision": {"weights": "float16 (backbone)", "arithmetic": "float32", "against_torch": "1e-4 in logits"},
        "licence": bundle.licence,
        "terms": f"LICENSES/{bundle.name}.txt",
        "intended_use": bundle.intended_use,
        "training_command": command(recipe, figures.get("views")),
    }


def command(recipe: Recipe, views: Mapping[str, Any] | None = None) -> str:
    """The commands that train again.

    Args:
        recipe: Of the network.
        views: How its views were drawn (:data:`wsiengine.training.views.DRAWN`); None: it was trained on tiles.
    """
    steps, drawn = (views["steps"], views["drawn"]) if views else (0, ())
    lines: list[str] = []
    files: list[str] = []
    for count, seed in drawn:
        files.append(f"views{seed}.npz")
        said = f"--count {count} --seed {seed} --steps {steps} --threads 1"
        lines.append(f"python -m wsiengine.training.views --data DIR --to {files[-1]} {said}")
    words = ["python", "-m", "wsiengine.training.crc5", "--data", "DIR", "--out", "RUN"]
    words += ["--views", *files] if files else []
    words += ["--folds", ",".join(map(str, recipe.folds))]
    if set(recipe.sources) != set(RECIPE.sources):
        words += ["--sources", ",".join(recipe.sources)]
    words += ["--iterations", str(recipe.iterations), "--seed", str(recipe.seed)]
    return " && ".join([*lines, shlex.join(map(str, [*words, "--threads", recipe.threads]))])


def _class(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    graded = name in GRADES
    trained = "Adenocarcinoma" if graded else name
    evidence = {
        "cases_trained": figures["trained"][trained]["cases"],
        "images_trained": figures["trained"][trained]["images"],
    }
    if graded:
        own = figures["graded_cases"][name]
        evidence = {"cases_trained": own, "cases_tested": 0, "note": _UNGRADED, trained: evidence}
    info: dict[str, Any] = {"name": name, "colour": list(COLOURS[name])}
    return info | ({"asserted_as": trained} if graded else {}) | {"evidence": evidence}


def _resource(file: Path) -> dict[str, str]:
    return {"file": file.name, "sha256": sha256(file.read_bytes()).hexdigest()}


def gather(recipe: Recipe, fields: list[Field], siblings: Scores | None, splits: dict[str, Any]) -> dict[str, Any]:
    """What the card says, but for held-out fields.

    Args:
        recipe: Of the network to be bundled.
        fields: All labelled fields; those of its sets outside its folds are held out.
        siblings: Scores by sibling networks of the fields that it *was* trained on, with the rule; they set temperature
            and uncertain rule. None: neither is set.
        splits: Figures of ``benchmarks/crc5_splits.py`` that belong to this model.
    """
    trained = recipe.chosen(fields)
    held = [f for f in fields if f.source in recipe.sources and f.fold not in recipe.folds]
    check_leak(trained, held)
    temperature, uncertain = 1.0, {"below": LEAST_SURE}
    if siblings is not None:
        temperature = round(best_temperature(siblings), 3)
        uncertain = uncertain_below(siblings, temperature, reject=0.0)
    return {
        "split": f"folds {_list({f.fold for f in held})}, trained on {_list(set(recipe.folds))}",
        "temperature": temperature,
        "uncertain": uncertain,
        "trained": {name: _count([f for f in trained if f.label == name]) for name in (*CLASSES, POLYP)},
        "graded_cases": {g: _count([f for f in trained if f.finding == _FINDING.get(g)])["cases"] for g in GRADES},
        "splits": splits,
        "sets": own_sets([*trained, *held]),
    }


def own_sets(fields: list[Field]) -> dict[str, dict[str, Any]]:
    """The sets that fields come from, as ``wsiengine evaluate --sets`` takes them (:mod:`wsiengine.labelled_sets`)."""
    sets: dict[str, dict[str, Any]] = {}
    for source in sorted({f.source for f in fields}):
        of_set = [f for f in fields if f.source == source]
        down, across = of_set[0].mpp_yx
        names = {f.finding: f.label for f in of_set}
        sets[source] = {"mpp": down if down == across else [across, down]}
        sets[source] |= {"map": found} if (found := {k: v for k, v in names.items() if k != v}) else {}
        sets[source] |= {"apart": [POLYP]} if POLYP in names else {}
    return sets


def _count(fields: list[Field]) -> dict[str, int]:
    return {"cases": len({f.case for f in fields}), "images": len(fields)}


def _list(folds: set[int]) -> str:
    return ", ".join(map(str, sorted(folds)))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m wsiengine.training.release", description="Bundle a training.")
    parser.add_argument("model", choices=BUNDLES)
    parser.add_argument("--run", type=Path, required=True, help="folder of the training")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds crc/")
    parser.add_argument("--out-of-fold", type=Path, nargs="*", default=[], help="scores by siblings, for calibration")
    parser.add_argument("--splits", type=Path, help="figures of benchmarks/crc5_splits.py, with the middle rule")
    parser.add_argument("--only", nargs="*", default=[], help="splits that belong to this model (default: all)")
    parser.add_argument("--as-trained", action="store_true", help="without the middle rule")
    parser.add_argument("--to", type=Path, required=True, help="folder of the model")
    asked = parser.parse_args(arguments)
    fields = read_fields(asked.data)
    recipe = Recipe.read(asked.run / "recipe.json")
    said = json.loads(asked.splits.read_text(encoding="utf-8")) if asked.splits else {}
    rule = MiddleRule(**said.pop("rule", {}))
    if asked.as_trained:
        rule, said = MiddleRule(), {name: found | {"rule": found["argmax"]} for name, found in said.items()}
    network = rule.built_in(load_trained(asked.run))
    siblings = rule.applied(load_scores(asked.out_of_fold, fields)) if asked.out_of_fold else None
    splits = {name: found for name, found in said.items() if not asked.only or name in asked.only}
    views = asked.run / DRAWN
    drawn = {"views": json.loads(views.read_text(encoding="utf-8"))} if views.exists() else {}
    figures = gather(recipe, fields, siblings, splits) | drawn | {"middle": rule.__dict__, "stains": STAINS.__dict__}
    write_model(network, recipe, BUNDLES[asked.model], asked.to, figures)
    held = ",".join(str(fold) for fold in sorted({f.fold for f in fields} - set(recipe.folds)))
    write_evidence(asked.to, measure(asked.to, asked.data, held), held)


if __name__ == "__main__":
    main()
