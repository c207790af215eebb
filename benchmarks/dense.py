"""Dense windows against isolated tiles, on labelled tissue: do they say the same, are they as right, what do they cost?

    python benchmarks/dense.py --source glas

Builds a mosaic of real fold-0 fields, scores the same tiles both ways, and prints: agreement of classes, accuracy of
both against the zones (tiles wholly inside one), and the time of each overlap in both modes in one run.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

import wsiengine
from tests.mosaics import CLASSES, MosaicPlan, mosaic_size, mosaic_slide
from wsiengine.graph import run_blocks
from wsiengine.job import BlockScores
from wsiengine.planning import Plan
from wsiengine.tasks.classify import tile_probabilities


def run(plan: Plan) -> tuple[np.ndarray, float]:
    """Scores of all wanted tiles (NaN elsewhere), and seconds."""
    scores = np.full((*plan.wanted.shape, plan.card.score_channels), np.nan, np.float32)

    def done(block: BlockScores) -> None:
        ran = ~np.isnan(block.scores[..., 0])
        scores[block.tiles.slices][ran] = block.scores[ran]

    assert plan.job
    started = time.perf_counter()
    run_blocks(plan.job, plan.blocks(), done, threads=plan.options.worker_threads)
    return scores, time.perf_counter() - started


def true_classes(plan: Plan, raster: np.ndarray) -> np.ndarray:
    """Index of the model's class under each tile; −1 where a tile is not wholly inside one zone."""
    names = [name.lower() for name in plan.layout.names]
    found = np.full(plan.wanted.shape, -1)
    for i, j in np.argwhere(plan.wanted):
        inside = raster[plan.grid.tile_box_px(i, j).slices]
        label = CLASSES[inside[0, 0]] if inside.size and (inside == inside[0, 0]).all() else ""
        found[i, j] = names.index(label) if label in names else -1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1, help="rows of zones")
    parser.add_argument("--cols", type=int, default=3, help="zones in a row")
    parser.add_argument("--source", default="glas", choices=["ebhi", "glas", "lc25000"])
    parser.add_argument("--model", default="crc5")
    parser.add_argument("--overlaps", default="0,0.3,0.5,0.71", help="of the cost table")
    options = parser.parse_args()
    data = os.environ.get("WSIENGINE_DATA")
    if not data:
        parser.error("WSIENGINE_DATA does not name the folder of the labelled fields")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mosaic.svs"
        mosaic = MosaicPlan(source=options.source)
        truth = mosaic_slide(path, mosaic_size(mosaic, options.rows, options.cols), mosaic, Path(data))
        compare(path, truth.raster, options.model)
        print("overlap  tiles s  dense s  dense / tiles without overlap")
        base = None
        for overlap in map(float, options.overlaps.split(",")):
            tiles_s, dense_s = (
                run(wsiengine.plan(path, options.model, overlap=overlap, mode=mode))[1] for mode in ("tiles", "dense")
            )
            base = base or tiles_s
            print(f"{overlap:7.2f}  {tiles_s:7.1f}  {dense_s:7.1f}  {dense_s / base:.2f}")


def compare(path: Path, raster: object, model: str) -> None:
    """Agreement and accuracy at 30 % overlap."""
    tiles, dense = (wsiengine.plan(path, model, mode=mode) for mode in ("tiles", "dense"))
    best = []
    for plan in (tiles, dense):
        probability = tile_probabilities(run(plan)[0], plan.layout)[..., : len(plan.layout.names)]
        best.append(np.where(plan.wanted, np.nan_to_num(probability).argmax(axis=-1), -1))
    true = true_classes(tiles, raster(tiles.lattice.mpp.mean))  # type: ignore[operator]
    known = true >= 0
    print(f"tiles    {int(known.sum())} wholly inside a zone, of {tiles.tile_count}")
    same, right = best[0] == best[1], [(answer == true)[known].mean() for answer in best]
    print(f"agree    {same[tiles.wanted].mean():.3f} of all, {same[known].mean():.3f} inside zones")
    print(f"right    isolated tiles {right[0]:.3f}, dense windows {right[1]:.3f}")


if __name__ == "__main__":
    main()
