"""What crc5's training gives on tissue that it has not seen: five-fold, set against set, half of the data::

    python -m wsiengine.training.views --data DIR --to views.npz
    python benchmarks/crc5_splits.py run --data DIR --views views.npz --out SPLITS            # or --split NAME …
    python benchmarks/crc5_splits.py table --data DIR --out SPLITS

Every split is a training of its own on views drawn once (:mod:`wsiengine.training.views`); no view that shows a tested
field, or its stain, is used. Cases are never on both sides.
"""

import argparse
import json
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsiengine.training.crc5 import BACKBONE, VIEW_RECIPE
from wsiengine.training.data import CLASSES, Field, check_leak, read_fields
from wsiengine.training.decision import MiddleRule, fit_rule
from wsiengine.training.figures import false_diagnosis, table
from wsiengine.training.loop import predictor
from wsiengine.training.schedule import Recipe
from wsiengine.training.scoring import Scores, load_scores, negative_windows, score
from wsiengine.training.views import Views, train_on_views

SETS = ("ebhi", "glas", "lc25000")
FOLDS = tuple(range(5))
NEVER = -20.0
"""Logit of a class that a network was not trained on."""


@dataclass(frozen=True)
class Split:
    """Sets and folds on either side, and which grouping of cases into folds.

    Attributes:
        train: Sets and folds to train on.
        test: Sets and folds to score.
        grouping: 0: the fixed folds; else another one, by a hash of the cases' names.
    """

    train: tuple[tuple[str, ...], tuple[int, ...]]
    test: tuple[tuple[str, ...], tuple[int, ...]]
    grouping: int = 0


def splits() -> dict[str, Split]:
    """All splits by name."""
    found = {"half": Split((SETS, (1, 2)), (SETS, (3, 4)))}
    for k in FOLDS:
        rest = tuple(f for f in FOLDS if f != k)
        found[f"fold{k}"] = Split((SETS, rest), (SETS, (k,)))
        found[f"again{k}"] = Split((SETS, rest), (SETS, (k,)), grouping=1)
        found[f"ebhi-fold{k}"] = Split((("ebhi",), rest), (("ebhi",), (k,)))
    for name in SETS:
        others = tuple(s for s in SETS if s != name)
        found[f"without-{name}"] = Split((others, FOLDS), ((name,), FOLDS))
        found[f"only-{name}"] = Split(((name,), FOLDS), (others, FOLDS))
    return found


def grouped(fields: list[Field], grouping: int) -> list[Field]:
    """The fields with another grouping of whole cases into folds: every set and class spread evenly."""
    if not grouping:
        return fields
    labels: dict[str, list[str]] = {}
    for field in fields:
        labels.setdefault(field.case, []).append(field.label)
    kind = {case: (case.split(":")[0], max(sorted(set(said)), key=said.count)) for case, said in labels.items()}
    order = sorted(kind, key=lambda case: sha256(f"{grouping} {case}".encode()).digest())
    place: dict[str, int] = {}
    for offset, one in enumerate(sorted(set(kind.values()))):
        for i, case in enumerate(case for case in order if kind[case] == one):
            place[case] = (i + offset) % len(FOLDS)
    return [replace(field, fold=place[field.case]) for field in fields]


def run_split(name: str, fields: list[Field], views: Views, iterations: int, backbone: Path, out: Path) -> None:
    """Train and score one split; does nothing where its scores are there."""
    file = out / f"{name}.npz"
    if file.exists():
        return
    split = splits()[name]
    fields = grouped(fields, split.grouping)
    recipe, chosen = recipe_of(split, fields)
    recipe = replace(recipe, frozen_blocks=views.steps, iterations=iterations)
    check_leak(recipe.chosen(fields), chosen)
    network = train_on_views(fields, recipe, views, backbone=backbone, out=out / name)
    gated = any(f.mask is not None for f in recipe.chosen(fields))
    predict = predictor(network)
    found = _all_classes(score(chosen, predict, recipe.mpp, classes=recipe.classes, gated=gated))
    negative_windows(chosen, predict, recipe.mpp).save(out / f"{name}.windows.npz")
    found.save(file)


def recipe_of(split: Split, fields: list[Field]) -> tuple[Recipe, list[Field]]:
    """The recipe of a split and the fields to score."""
    (sources, folds), (test_sources, test_folds) = split.train, split.test
    recipe = replace(VIEW_RECIPE, sources=sources, folds=folds, threads=torch.get_num_threads())
    have = {f.label for f in fields if f.source in sources and f.fold in folds}
    recipe = replace(recipe, classes=tuple(c for c in CLASSES if c in have))
    return recipe, [f for f in fields if f.source in test_sources and f.fold in test_folds]


def _all_classes(scores: Scores) -> Scores:
    logits = np.full((len(scores.logits), len(CLASSES)), NEVER, np.float32)
    for column, name in enumerate(scores.classes):
        logits[:, CLASSES.index(name)] = scores.logits[:, column]
    return replace(scores, logits=logits, classes=CLASSES)


def read_splits(out: Path, fields: list[Field], names: list[str]) -> Scores | None:
    """The scores of splits that together test every field once; None where one is missing."""
    files = [out / f"{name}.npz" for name in names]
    return load_scores(files, fields) if all(f.exists() for f in files) else None


def chosen_rule(out: Path, fields: list[Field]) -> MiddleRule:
    """The rule for the middle class, from folds 1 to 4 alone."""

    def scores(names: list[str]) -> Scores | None:
        found = read_splits(out, fields, names)
        return None if found is None else found.where(found.column("fold") != "0")

    home = scores([f"fold{k}" for k in FOLDS])
    away = [found for name in SETS if (found := scores([f"without-{name}"])) is not None]
    return fit_rule(home, away) if home is not None and away else MiddleRule()


def rows(out: Path, fields: list[Field], rule: MiddleRule) -> dict[str, Any]:
    """Figures by image of every split that was run: as trained, and with the rule."""
    groups = {
        "five-fold": [f"fold{k}" for k in FOLDS],
        "five-fold again": [f"again{k}" for k in FOLDS],
        "ebhi alone, five-fold": [f"ebhi-fold{k}" for k in FOLDS],
    } | {name: [name] for name in splits() if "fold" not in name and "again" not in name}
    found = {}
    for title, names in groups.items():
        scores = read_splits(out, fields, names)
        if scores is not None:
            windows = load_scores([out / f"{name}.windows.npz" for name in names], fields)
            found[title] = {
                "argmax": table(scores.by_field()),
                "rule": table(rule.applied(scores).by_field()),
                "false_diagnosis": false_diagnosis(windows),
            }
    return found


def _print(found: dict[str, Any]) -> None:
    for title, both in found.items():
        for kind in ("argmax", "rule"):
            for source, f in both[kind].items():
                low, high = f["interval_95"]
                recall = " · ".join(f"{v['recall']:.2f}" for v in f["classes"].values())
                auroc = " · ".join(f"{v['auroc']:.3f}" for v in f["classes"].values() if v["auroc"] is not None)
                value = f["balanced_accuracy"]
                n = f"{f['rows']} ({f['cases']})"
                print(
                    f"| {title} | {kind} | {source} | {low:.3f} | {value:.3f} | {high:.3f} | {n} | {recall} | {auroc} |"
                )
        print(f"{title}: tissue without epithelium: {json.dumps(both['false_diagnosis'])}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Splits of crc5.")
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds crc/ and weights/")
    parser.add_argument("--out", type=Path, required=True, help="folder of trainings and scores")
    parser.add_argument("--views", type=Path, nargs="+", help="files of wsiengine.training.views")
    parser.add_argument("--split", nargs="+", choices=splits(), default=list(splits()))
    parser.add_argument("--iterations", type=int, default=VIEW_RECIPE.iterations, help="of each training (default 300)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    asked = parser.parse_args(arguments)
    fields = read_fields(asked.data)
    if asked.what == "run":
        torch.set_num_threads(asked.threads)
        views = Views.read(asked.views)
        for name in asked.split:
            run_split(name, fields, views, asked.iterations, asked.data / BACKBONE, asked.out)
        return
    rule = chosen_rule(asked.out, fields)
    print(f"middle class: share {rule.share}, lift {rule.lift}")
    found = rows(asked.out, fields, rule)
    _print(found)
    if asked.json:
        asked.json.write_text(json.dumps({"rule": rule.__dict__, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
