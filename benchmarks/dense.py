"""Dense windows against isolated tiles, on labelled tissue: do they say the same, are they as right, what do they cost?

    python benchmarks/dense.py --source glas
    python benchmarks/dense.py --source glas --rows 2 --halos 32,64,96,128
    python benchmarks/dense.py --slide slide.svs --overlaps 0,0.71 --repeats 3

Builds a mosaic of real fold-0 fields, scores the same tiles both ways, and prints: agreement of classes, accuracy of
both against the zones (tiles wholly inside one), and the time of each overlap in both modes in one run. Of a slide of
your own, which has no zones, it tells the cost alone: dense windows against isolated tiles without overlap.
"""

# ruff: noqa: E402  (the repository is put on the path first)
import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np

import wsiengine
from tests.mosaics import CLASSES, MosaicPlan, mosaic_size, mosaic_slide
from wsiengine.dense import window_means
from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.graph import run_blocks
from wsiengine.grid import Axis, TileGrid
from wsiengine.job import BlockScores
from wsiengine.journal import Recovered
from wsiengine.models.registry import load_model
from wsiengine.models.runtime import Runtime
from wsiengine.planning import Plan
from wsiengine.slides import open_slide
from wsiengine.tasks.classify import MapLayout, tile_probabilities


def run(plan: Plan) -> tuple[np.ndarray, float, float]:
    """Scores of all wanted tiles (NaN elsewhere), seconds, and seconds of CPU time."""
    gathered, lock = plan.task.gather(plan, Recovered({}, {}, ())), threading.Lock()

    def done(blocks: Sequence[BlockScores]) -> None:
        with lock:
            for block in blocks:
                gathered.add(block)

    assert plan.job
    started, cpu = time.perf_counter(), time.process_time()
    run_blocks(plan.job, plan.blocks(), done, threads=plan.options.worker_threads)
    seconds = time.perf_counter() - started, time.process_time() - cpu
    return gathered.arrays()["scores"], *seconds


def cost(path: Path, model: str, overlaps: list[float], repeats: int) -> None:
    """Dense windows at each overlap against isolated tiles without any: medians of runs that take turns."""
    tiles = wsiengine.plan(path, model, mode="tiles", overlap=0.0)
    plans = [tiles, *(wsiengine.plan(path, model, mode="dense", overlap=overlap) for overlap in overlaps)]
    times = np.median([[run(plan)[1:] for plan in plans] for _ in range(repeats)], axis=0)
    print("overlap  mode   windows  blocks  wall s  CPU s  against isolated tiles without overlap: wall, CPU")
    for plan, (wall, cpu) in zip(plans, times, strict=True):
        counts = f"{plan.grid.overlap:7.2f}  {plan.options.mode:5}  {plan.tile_count:7}  {plan.block_count:6}"
        print(f"{counts}  {wall:6.1f}  {cpu:5.1f}  {wall / times[0, 0]:.2f}  {cpu / times[0, 1]:.2f}")


def halos(path: Path, model: str, listed: str) -> None:
    """Share of windows whose class differs from that of the map computed in one piece, by halo: up to 16 Mpx of it.

    Blocks that are larger than half of that field meet in its middle: as many seams as blocks of 4,096 px have.
    """
    card = load_model(model)
    assert card.dense
    step = card.output_stride_px
    runtime, slide, layout = Runtime(card), open_slide(path), MapLayout.of(card)
    pixels = slide.read(Box(0, 0, 112 * step, 144 * step), card.input.fixed_mpp)
    tile = card.input.size_px // step
    grid = TileGrid(Lattice(Size(96, 128), Mpp.square(1), Mpp.square(1), 1), Axis(96, tile, 2), Axis(128, tile, 2))

    def classes(cells: np.ndarray) -> np.ndarray:
        scores = window_means(cells[8:-8, 8:-8], grid, gated=card.gate is not None)
        return tile_probabilities(scores, layout)[..., : len(layout.names)].argmax(axis=-1)

    whole, side = runtime.maps(pixels), card.dense.block_px // step
    for halo in map(int, listed.split(",")):
        cells, edge = whole.copy(), halo // step
        for box in Box(8, 8, 104, 136).pieces(min(side, 48), min(side, 64)):
            part = runtime.maps(np.ascontiguousarray(pixels[box.grow(edge).scale(step).slices]))
            cells[box.slices] = part[edge : edge + box.height, edge : edge + box.width]
        print(f"halo {halo:4d} px: {(classes(cells) != classes(whole)).mean():.2%} of windows differ")


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
    parser.add_argument("--halos", metavar="PX,PX", help="only compare blocks of such halos with a map in one piece")
    parser.add_argument("--overlaps", default="0,0.3,0.5,0.71", help="of the cost table")
    parser.add_argument("--slide", type=Path, help="only the cost, on this slide")
    parser.add_argument("--repeats", type=int, default=1, help="with --slide")
    parser.add_argument("--write", action="store_true", help="agreement and accuracy alone, onto the model's card")
    options = parser.parse_args()
    overlaps = [float(overlap) for overlap in options.overlaps.split(",")]
    if options.slide:
        cost(options.slide, options.model, overlaps, options.repeats)
        return
    data = os.environ.get("WSIENGINE_DATA")
    if not data:
        parser.error("WSIENGINE_DATA does not name the folder of the labelled fields")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mosaic.svs"
        mosaic = MosaicPlan(source=options.source)
        truth = mosaic_slide(path, mosaic_size(mosaic, options.rows, options.cols), mosaic, Path(data))
        if options.halos:
            halos(path, options.model, options.halos)
            return
        found = compare(path, truth.raster, options.model)
        if options.write:
            write(load_model(options.model).folder / "card.json", found)
            return
        print("overlap  tiles s  dense s  dense / tiles without overlap")
        base = None
        for overlap in overlaps:
            tiles_s, dense_s = (
                run(wsiengine.plan(path, options.model, overlap=overlap, mode=mode))[1] for mode in ("tiles", "dense")
            )
            base = base or tiles_s
            print(f"{overlap:7.2f}  {tiles_s:7.1f}  {dense_s:7.1f}  {dense_s / base:.2f}")


def compare(path: Path, raster: object, model: str) -> dict[str, float]:
    """Agreement and accuracy at 30 % overlap → what a card says of it."""
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
    agreement = float(same[known].mean())
    parts = {"agreement": agreement, "right_dense": float(right[1]), "right_tiles": float(right[0])}
    return {name: round(part, 3) for name, part in parts.items()} | {"tiles": int(known.sum())}


def write(card: Path, found: dict[str, float]) -> None:
    """Write what was found onto a model's card."""
    facts = json.loads(card.read_text(encoding="utf-8"))
    facts["dense"]["against_tiles"] = found
    card.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
