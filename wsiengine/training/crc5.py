"""The recipe of the bundled model ``crc5``::

    python -m wsiengine.training.views --data DIR --to views.npz
    python -m wsiengine.training.crc5 --data DIR --views views.npz --folds 1,2,3,4 --out RUN

Without ``--views`` every tile is drawn anew, and more of the network is trained: four times the work.
Deterministic for one machine type and number of threads; started again on the same folder it resumes.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from wsiengine.training.data import CLASSES, POLYP, read_fields
from wsiengine.training.loop import Recipe, train

BACKBONE = Path("weights") / "mobilenet_v2_1.0_224_int8_ptq.tflite"
RECIPE = Recipe(
    classes=CLASSES,
    sources=("ebhi", "glas", "lc25000"),
    joins={POLYP: "Normal"},
    shares={
        "Normal": {"ebhi": 0.25, POLYP: 0.25, "glas": 0.25, "lc25000": 0.25},
        "Adenoma": {"ebhi": 0.7, "glas": 0.3},
        "Adenocarcinoma": {"ebhi": 0.4, "glas": 0.35, "lc25000": 0.25},
    },
)
VIEW_RECIPE = replace(RECIPE, iterations=300, frozen_blocks=14, small_until=1.0, threads=1)
"""On views drawn beforehand (:mod:`wsiengine.training.views`), which end where the last five stages begin."""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m wsiengine.training.crc5", description="Train crc5.")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds crc/ and weights/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the training; resumes what it holds")
    parser.add_argument("--folds", default="1,2,3,4", help="folds to train on (default 1,2,3,4)")
    parser.add_argument("--sources", default="ebhi,glas,lc25000", help="sets to train on")
    parser.add_argument("--views", type=Path, nargs="+", help="files of wsiengine.training.views")
    parser.add_argument("--iterations", type=int, help="default 700, with views 300")
    parser.add_argument("--seed", type=int, default=RECIPE.seed)
    parser.add_argument("--threads", type=int, default=RECIPE.threads)
    asked = parser.parse_args(arguments)
    base = VIEW_RECIPE if asked.views else RECIPE
    recipe = replace(
        base,
        folds=tuple(int(f) for f in asked.folds.split(",")),
        sources=tuple(asked.sources.split(",")),
        iterations=asked.iterations or base.iterations,
        seed=asked.seed,
        threads=asked.threads,
    )
    fields = read_fields(asked.data, recipe.sources)
    if asked.views:
        from wsiengine.training.views import Views, train_on_views  # it needs this module's recipe

        views = Views.read(asked.views)
        recipe = replace(recipe, frozen_blocks=views.steps)
        train_on_views(fields, recipe, views, backbone=asked.data / BACKBONE, out=asked.out)
    else:
        train(fields, recipe, backbone=asked.data / BACKBONE, out=asked.out)


if __name__ == "__main__":
    main()
