"""Detectors: 300,000 objects on one slide, from candidates to files; and the engine's pace against the model alone.

``python benchmarks/detect.py objects [--outlined] [--count N]`` merges and exports objects that are made up (two views
of each where tiles overlap), and prints seconds and peak memory. ``python benchmarks/detect.py pace SLIDE --model M``
runs a detector over a slide, then the same tiles and crops through the bare ONNX sessions, and prints the ratio
(:mod:`benchmarks.detect_pace`); ``--first-stage`` leaves the classifier of crops out of both.
``python benchmarks/detect.py agreement SLIDE --model M`` runs it over two tile grids and prints which part of the
objects of either has its like (same class, IoU above one half) in the other.
``python benchmarks/detect.py sheet OUT.svs --mpx 40`` writes smear fields side by side, a slide to measure on.
"""

import argparse
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]
from benchmarks.detect_pace import pace  # noqa: E402
from wsiengine.geometry import Lattice, Mpp, Size  # noqa: E402
from wsiengine.grid import TileGrid  # noqa: E402
from wsiengine.models.detection import Detection  # noqa: E402
from wsiengine.objects import Objects  # noqa: E402
from wsikernels.masks import byte_starts  # noqa: E402

TILE_PX, STRIDE_PX, CELL_PX = 512, 448, 16
SIDE_PX = 60_000
_FIELD_PX = (480, 640)


def made_up(count: int, outlined: bool, grid: TileGrid) -> Objects:
    """Nuclei of 8 to 30 px strewn over the slide, each as every tile sees it that shows all of it."""
    random = np.random.default_rng(0)
    corner = random.integers(0, SIDE_PX - 40, (count, 2))
    size = random.integers(8, 31, (count, 2))
    boxes = np.concatenate([corner, corner + size], axis=1)
    scores, labels = random.uniform(0.1, 1, count).astype(np.float32), random.integers(0, 3, count)
    views = []
    for dy in (0, 1):
        for dx in (0, 1):
            tile = corner // STRIDE_PX - (dy, dx)
            low = tile * STRIDE_PX
            seen = (tile >= 0).all(axis=1) & (boxes[:, 2:] <= low + TILE_PX - 1).all(axis=1)
            views.append((np.flatnonzero(seen), tile[seen] @ (grid.cols.count, 1)))
    index = np.concatenate([v[0] for v in views])
    tiles = np.concatenate([v[1] for v in views])
    order = np.lexsort((-scores[index], tiles))
    index, tiles = index[order], tiles[order]
    frames = boxes[index].astype(np.int32) if outlined else np.empty((0, 4), np.int32)
    return Objects(
        boxes=boxes[index].astype(np.float64),
        scores=scores[index],
        labels=labels[index].astype(np.uint16),
        tiles=tiles.astype(np.int64),
        cut=np.zeros(len(index), np.uint8),
        extra=np.empty((len(index), 0), np.float32),
        frames=frames,
        bits=_ellipses(frames) if outlined else np.empty(0, np.uint8),
    )


def _ellipses(frames: np.ndarray) -> np.ndarray:
    """Masks that fill their frames as ellipses."""
    known: dict[tuple[int, int], np.ndarray] = {}
    out = np.empty(byte_starts(frames)[-1], np.uint8)
    at = 0
    for height, width in (frames[:, 2:] - frames[:, :2]).tolist():
        if (height, width) not in known:
            y, x = np.mgrid[:height, :width] + 0.5
            known[height, width] = np.packbits((2 * y / height - 1) ** 2 + (2 * x / width - 1) ** 2 <= 1)
        bits = known[height, width]
        out[at : at + len(bits)] = bits
        at += len(bits)
    return out


def objects(count: int, outlined: bool) -> dict[str, Any]:
    """Merge, export and draw → seconds by stage, sizes, peak memory."""
    from wsiengine.finishing import Finish
    from wsiengine.merging import merge
    from wsiengine.object_outputs import ObjectAnnotations, count_objects, write_table
    from wsiengine.object_overlay import draw_objects
    from wsiengine.qupath import write_geojson
    from wsiengine.tasks.detect import DetectLayout
    from wsiengine.truth import Truth

    grid = TileGrid.cover(
        Lattice(Size(SIDE_PX, SIDE_PX), Mpp.square(0.5), Mpp.square(0.5), CELL_PX), TILE_PX, 1 - STRIDE_PX / TILE_PX
    )
    seconds: dict[str, float] = {}
    rule = Detection(largest_px=30)
    found = [made_up(count, outlined, grid)]
    seen = len(found[0])
    _timed(seconds, "compile", lambda: merge(found[0].take(np.arange(500)), rule, grid))
    merged = _timed(seconds, "merge", lambda: merge(found.pop(), rule, grid))
    names = ("Tumour", "Immune", "Stroma")
    colours = ((213, 94, 0), (0, 158, 115), (86, 180, 233))
    layout = DetectLayout(names, colours, ((0,), (1,), (2,)), "identity", uncertain_below=0.0)
    analysed = np.ones(grid.lattice.extent_cells.shape, bool)
    arrays = {f"object_{name}": column for name, column in merged.columns().items()}
    arrays |= {"ran": np.ones(grid.shape, np.uint8), "left_out": np.zeros(1, np.int64)}
    arrays["calibrated"] = np.ones(1, np.uint8)
    truth = Truth(layout, grid, arrays, analysed, "made up", "made up", task_name="detect")
    folder = Path(tempfile.mkdtemp())
    try:
        shown = ObjectAnnotations.of(truth, Finish(0.0))
        parts = _timed(seconds, "geojson", lambda: write_geojson(shown, folder / "annotations.geojson"))
        _timed(seconds, "table", lambda: write_table(truth, shown, folder / "objects.zarr"))
        summary = _timed(seconds, "counts", lambda: count_objects(truth, shown))
        canvas = np.full((2048, 2048, 3), 235, np.uint8)
        _timed(seconds, "overlay", lambda: draw_objects(canvas, shown, grid.lattice.slide_l0, 2))
        sizes = {path.name: path.stat().st_size for path in parts}
    finally:
        shutil.rmtree(folder)
    return {
        "candidates": seen,
        "objects": len(shown),
        "by class": summary["objects"],
        "seconds": {name: round(s, 2) for name, s in seconds.items()},
        "bytes": sizes,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def sheet(path: Path, mpx: float, compression: str) -> None:
    """Write smear fields (WSIENGINE_DATA), each as often as it takes, side by side: about ``mpx`` · 10⁶ pixels."""
    import cv2

    from wsiengine.slides.pyramid import PyramidLayout, write_pyramid

    fields = sorted((Path(os.environ["WSIENGINE_DATA"]) / "rbc/chula/images").glob("*.jpg"), key=lambda p: int(p.stem))
    rows, cols = _FIELD_PX
    across = max(1, round(math.sqrt(mpx * 1e6) / cols))
    down = max(1, round(mpx * 1e6 / (across * rows * cols)))

    def pixels(y0: int, y1: int) -> np.ndarray:
        strips = []
        for row in range(y0 // rows, (y1 - 1) // rows + 1):
            files = [fields[(row * across + k) % len(fields)] for k in range(across)]
            strips.append(np.concatenate([cv2.imread(str(file))[..., ::-1] for file in files], axis=1))
        return np.concatenate(strips)[y0 - y0 // rows * rows :][: y1 - y0]

    quality = (
        90 if compression == "jpeg" else 45
    )  # of JPEG 2000 the PSNR in dB: about 2 bits a pixel, as scanners write
    layout = PyramidLayout(compression=compression, quality=quality)
    write_pyramid(path, pixels, Size(down * rows, across * cols), 0.1, layout)


def agreement(slide: str, model: str, threads: int) -> dict[str, Any]:
    """How far the objects depend on where the tiles lie: of two grids, all objects and those well above the limit."""
    import wsiengine

    folder = Path(tempfile.mkdtemp())
    try:
        found = []
        for overlap in (0.3, 0.5):
            options: dict[str, Any] = {"threads": threads, "device": "cpu", "tissue": "none", "overlap": overlap}
            found.append(wsiengine.infer(slide, model, folder / f"at {overlap}", **options))
        tables = [[(a.class_name, a.geometry.bounds, a.measurements["Score"]) for a in r.annotations] for r in found]
        used = [r.run["plan"]["overlap_used"] for r in found]
    finally:
        shutil.rmtree(folder)
    facts: dict[str, Any] = {"overlap": used, "objects": [len(table) for table in tables]}
    for above in (0.0, 0.6):
        sure = [[row for row in table if row[2] >= above] for table in tables]
        matched = [_matched(one, other) for one, other in ((sure[0], tables[1]), (sure[1], tables[0]))]
        facts[f"score {above:g} and above"] = {"objects": [len(t) for t in sure], "found again": matched}
    return facts


def _matched(one: list[tuple], other: list[tuple]) -> float:
    """The part of ``one`` that has its like in ``other``."""
    from wsikernels.pairs import IOU, overlapping_pairs

    boxes = np.array([row[1] for row in one + other])
    kinds = sorted({row[0] for row in one + other})
    labels = np.array([kinds.index(row[0]) for row in one + other])
    everywhere = np.tile([-1e9, -1e9, 1e9, 1e9], (len(boxes), 1))
    pairs, _ = overlapping_pairs(boxes, everywhere, labels, 0.5, IOU)
    across = pairs[(pairs[:, 0] < len(one)) & (pairs[:, 1] >= len(one))]
    return round(len(np.unique(across[:, 0])) / max(1, len(one)), 4)


def _timed(seconds: dict[str, float], name: str, do: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = do()
    seconds[name] = time.perf_counter() - started
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("objects")
    made.add_argument("--count", type=int, default=300_000)
    made.add_argument("--outlined", action="store_true", help="with masks, as Mask R-CNN gives them")
    drawn = commands.add_parser("sheet")
    drawn.add_argument("out", type=Path)
    drawn.add_argument("--mpx", type=float, default=40, help="pixels in 10⁶, rounded to whole fields")
    drawn.add_argument("--compression", default="jpeg", choices=["jpeg", "jpeg2000"])
    runs = commands.add_parser("pace")
    runs.add_argument("--repeats", type=int, default=3)
    runs.add_argument("--first-stage", action="store_true", help="the detector of a model with two stages alone")
    twice = commands.add_parser("agreement")
    for command in (runs, twice):
        command.add_argument("slide")
        command.add_argument("--model", required=True)
        command.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.command == "objects":
        facts = objects(args.count, args.outlined)
    elif args.command == "sheet":
        sheet(args.out, args.mpx, args.compression)
        facts = {"bytes": args.out.stat().st_size}
    elif args.command == "pace":
        facts = pace(args.slide, args.model, args.threads, repeats=args.repeats, first_stage=args.first_stage)
    else:
        facts = agreement(args.slide, args.model, args.threads)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
