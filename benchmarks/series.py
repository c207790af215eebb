"""What several slides cost in one call, beside the same slides one by one and beside the model alone.

``python benchmarks/series.py [--model crc5] [--slides 6] [--gpx 0.05] [--repeats 3] [--threads N] [--quick]``

The slides are one mosaic under several names. ``infer_many`` and a loop over ``infer`` take turns with the floor of
``benchmarks/engine.py``, each in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from benchmarks.engine import make_slide, run_floor  # noqa: E402
from benchmarks.networks import NAMES, make  # noqa: E402


def run(part: str, slide: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All slides once; seconds without imports of the package, which both ways pay once."""
    from wsiengine import infer, infer_many

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        slides = [folder / f"{k}.svs" for k in range(options.slides)]
        for link in slides:
            link.symlink_to(slide.resolve())
        folders = [folder / f"out{k}" for k in range(options.slides)]
        wall, cpu = time.perf_counter(), time.process_time()
        if part == "together":
            found = list(infer_many(slides, options.model, folders, threads=options.threads))
        else:
            found = [infer(s, options.model, f, threads=options.threads) for s, f in zip(slides, folders, strict=True)]
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        for result in found:
            if isinstance(result, Exception):
                raise result
        stages = [result.run["timing"]["stages_s"] for result in found]
        tiles = sum(result.summary["tiles"] for result in found)
    idle = sum(of.get("between slides", 0.0) for of in stages)
    return {"tiles": tiles, "wall_s": wall, "cpu_s": cpu, "idle_s": idle}


def measure(options: argparse.Namespace, folder: Path) -> None:
    slide = folder / f"mosaic-{options.gpx:g}gpx.svs"
    if not slide.exists():
        make_slide(slide, options.gpx)
    if options.model in NAMES:
        options.model = str(make(options.model, folder / options.model))
    found: dict[str, list[dict[str, Any]]] = {"together": [], "each": [], "floor": []}
    for turn in range(options.repeats + 1):
        for part, rows in found.items():
            command = [sys.executable, __file__, "--part", part, "--workdir", str(folder), "--model", options.model]
            command += ["--slides", str(options.slides), "--gpx", str(options.gpx), "--threads", str(options.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            rows += [json.loads(done.stdout.splitlines()[-1])] if turn else []  # the first fills caches
    print(f"{options.slides} slides of {options.gpx:g} Gpx, {found['each'][0]['tiles']:,} tiles, medians")
    for part, rows in found.items():
        per_tile = [statistics.median(1e3 * row[clock] / row["tiles"] for row in rows) for clock in ("wall_s", "cpu_s")]
        idle = statistics.median(row.get("idle_s", 0.0) for row in rows)
        told = f" · threads without a block between slides {idle:.2f} s" if part == "together" else ""
        print(f"{part:<10}{per_tile[0]:8.2f} ms of wall time per tile, {per_tile[1]:.2f} of CPU time{told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="crc5")
    parser.add_argument("--slides", type=int, default=6)
    parser.add_argument("--gpx", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workdir", type=Path, help="keep the mosaic and the model here")
    parser.add_argument("--quick", action="store_true", help="two slides, once")
    parser.add_argument("--part", choices=["together", "each", "floor"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.slides, options.repeats, options.gpx = 2, 1, 0.02
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.workdir or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        slide = folder / f"mosaic-{options.gpx:g}gpx.svs"
        if options.part == "floor":
            print(json.dumps(run_floor(str(slide), options.model, options.threads, 400)))
        elif options.part:
            print(json.dumps(run(options.part, slide, options)))
        else:
            measure(options, folder)


if __name__ == "__main__":
    main()
