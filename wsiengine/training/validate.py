"""Scores fields with a trained network that has not seen them, and prints what the scores say::

    python -m wsiengine.training.validate score --run RUN --data DIR --folds 0 --to scores.npz
    python -m wsiengine.training.validate figures --data DIR scores.npz [more.npz …]

``score`` refuses fields of a case that the network was trained on. Several files (one per held-out fold) are read as
one cross-validation.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsiengine.training.data import CLASSES, Field, check_leak, read_fields
from wsiengine.training.figures import (
    asserted,
    best_temperature,
    false_diagnosis,
    gate_choices,
    gate_figures,
    table,
    uncertain_below,
)
from wsiengine.training.loop import Recipe, load_trained, predictor
from wsiengine.training.scoring import Scores, load_scores, negative_windows, score


def score_run(run: Path, fields: list[Field], folds: set[int], sources: set[str]) -> tuple[Scores, Scores]:
    """Scores of the chosen fields' tiles, and of their windows without epithelium.

    Raises:
        WsiError: The network was trained on one of their cases.
    """
    recipe = Recipe.read(run / "recipe.json")
    torch.set_num_threads(recipe.threads)
    chosen = [f for f in fields if f.fold in folds and f.source in sources]
    check_leak(recipe.chosen(fields), chosen)
    predict = predictor(load_trained(run))
    return score(chosen, predict, recipe.mpp), negative_windows(chosen, predict, recipe.mpp)


def summary(scores: Scores, temperature: float = 1.0) -> dict[str, Any]:
    """Figures by tile and by image, of the gate, and what polyps are taken for."""
    images = scores.by_field()
    polyps = np.bincount(asserted(images.where(images.labels < 0)), minlength=len(CLASSES) + 1)
    return {
        "tile": table(scores, temperature),
        "image": table(images, temperature),
        "gate": gate_figures(scores),
        "polyps_called": dict(zip((*CLASSES, "No epithelium"), polyps.tolist(), strict=True)),
    }


def _score(asked: argparse.Namespace) -> None:
    folds = {int(f) for f in asked.folds.split(",")}
    tiles, windows = score_run(asked.run, read_fields(asked.data), folds, set(asked.sources.split(",")))
    tiles.save(asked.to)
    windows.save(asked.to.with_suffix(".windows.npz"))
    print(json.dumps(summary(tiles) | {"false_diagnosis": false_diagnosis(windows)}, indent=1))


def _figures(asked: argparse.Namespace) -> None:
    scores = load_scores(asked.scores, read_fields(asked.data))
    temperature = best_temperature(scores)
    rule = uncertain_below(scores, temperature)
    windows = load_scores([f.with_suffix(".windows.npz") for f in asked.scores], read_fields(asked.data))
    found = {"temperature": temperature, "uncertain": rule, "gate_choices": gate_choices(scores, windows)}
    print(json.dumps(summary(scores, temperature) | {"false_diagnosis": false_diagnosis(windows)} | found, indent=1))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m wsiengine.training.validate", description="Validate crc5.")
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("score", help="score held-out fields with a training's network")
    one.add_argument("--run", type=Path, required=True, help="folder of the training")
    one.add_argument("--data", type=Path, required=True, help="folder that holds crc/")
    one.add_argument("--folds", default="0", help="folds to score (default 0)")
    one.add_argument("--sources", default="ebhi,glas,lc25000", help="sets to score")
    one.add_argument("--to", type=Path, required=True, help="file for the scores (.npz); .windows.npz beside it")
    one.set_defaults(do=_score)
    many = verbs.add_parser("figures", help="figures of one or more files of scores, as one")
    many.add_argument("scores", type=Path, nargs="+", help="files of `score`")
    many.add_argument("--data", type=Path, required=True, help="folder that holds crc/")
    many.set_defaults(do=_figures)
    asked = parser.parse_args(arguments)
    asked.do(asked)


if __name__ == "__main__":
    main()
