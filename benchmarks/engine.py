"""What a whole run costs beside the model alone: tiles/s, their ratio, time per stage, peak memory.

``python benchmarks/engine.py [--model crc5|resnet18|…] [--precision int8] [--gpx 1] [--repeats 3] [--quick] …``

The slide is a mosaic of real fields at 0.25 µm/px (WSIENGINE_DATA), or position-coded pixels where there are none;
``--slide`` takes another. The floor is the model's session on the run's own tiles, packed and in memory beforehand,
with as many threads. Floor and engine take turns, each in a process of its own, so that a machine that others use too
slows both; the ratio is told for wall time and for CPU time.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from benchmarks.networks import NAMES, add_int8, make  # noqa: E402

_MIB = 1 << 20
_FLOOR_TILES = 400  # kept in memory; taken in turns until the floor has run long enough
_SLIDE_MPP = 0.25
_WARM_GPX = 0.02
_CALIBRATION_TILES = 64


class MemoryWatch:
    """The largest anonymous and file-backed memory of this process, MiB, looked at every 20 ms."""

    def __init__(self) -> None:
        self.peaks = {"RssAnon": 0, "RssFile": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.peaks:
                    self.peaks[name] = max(self.peaks[name], int(value.split()[0]) >> 10)


def run_engine(slide: str, model: str, **options: Any) -> dict[str, Any]:
    """One whole run, results written to a folder that is thrown away."""
    from wsiengine import infer

    with tempfile.TemporaryDirectory() as folder, MemoryWatch() as memory:
        wall, cpu = time.perf_counter(), time.process_time()
        result = infer(slide, model, Path(folder) / "out", **options)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    run = result.run
    return {
        "tiles": run["summary"]["tiles"],
        "wall_s": wall,
        "cpu_s": cpu,
        "stages_s": run["timing"]["stages_s"],
        "anonymous_mib": memory.peaks["RssAnon"],
        "file_mib": memory.peaks["RssFile"],
        "planned_mib": run["host"]["peak_bytes_planned"] // _MIB,
        "scratch_mib": run["host"]["scratch_bytes_planned"] // _MIB,
        "blocks": run["host"]["blocks"],
        "block_tiles": run["host"]["block_tiles"],
    }


def run_floor(
    slide: str, model: str, threads: int, tiles: int, precision: str = "fp32", device: str = "auto"
) -> dict[str, Any]:
    """The session alone, on tiles of the run: packed beforehand, as many per call as in the engine (on the CPU one)."""
    import wsiengine
    from wsiengine.models.packing import pack
    from wsiengine.models.runtime import Runtime

    plan = wsiengine.plan(slide, model, threads=threads, precision=precision, device=device)
    assert plan.job is not None
    runtime: Runtime = plan.job.runtime
    pixels_of, packed = _pixels(plan), []
    while group := list(itertools.islice(pixels_of, runtime.batch_size)):
        batch = runtime._batch()
        for tile, (pixels, origin) in zip(batch, group, strict=False):
            pack(pixels, origin, plan.card, tile[None])
        packed.append(batch)
    in_turns([[partial(runtime._run, packed[0])]], 2 * threads, threads)  # MNN makes a session for each thread
    calls = math.ceil(tiles / runtime.batch_size)
    wall_s, cpu_s = in_turns([[partial(runtime._run, batch)] for batch in packed], calls, threads)
    return {"tiles": calls * runtime.batch_size, "wall_s": wall_s, "cpu_s": cpu_s}


def in_turns(items: Sequence[Sequence[Callable[[], Any]]], count: int, threads: int) -> tuple[float, float]:
    """Make the calls of ``count`` items, from the first again after the last → seconds of wall and of CPU time."""
    turns, lock = iter(range(count)), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                turn = next(turns, None)
            if turn is None:
                return
            for call in items[turn % len(items)]:
                call()

    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()
    return time.perf_counter() - wall, time.process_time() - cpu


def _pixels(plan: Any) -> Iterator[tuple[Any, Any]]:
    """Pixels of tiles spread over the whole slide, each with its corner in them."""
    import numpy as np

    wanted = np.argwhere(plan.wanted)
    for row, col in wanted[:: max(1, len(wanted) // _FLOOR_TILES)]:
        box = plan.grid.tile_box_px(int(row), int(col))
        halo = plan.job.normaliser.halo_px
        pixels = plan.job.slide.read(box.grow(halo), plan.lattice.mpp)
        yield plan.job.normaliser.apply(pixels, box), np.zeros((1, 2), np.int64)


def make_slide(path: Path, gpx: float) -> None:
    """A mosaic of ``gpx`` · 10⁹ pixels, 4:3."""
    from tests.mosaics import MosaicPlan, mosaic_slide, position_slide
    from wsiengine.geometry import Size
    from wsiengine.slides.pyramid import PyramidLayout

    height = math.isqrt(round(gpx * 1e9 * 3 / 4))
    size = Size(height, round(gpx * 1e9 / height))
    data = os.environ.get("WSIENGINE_DATA")
    if data:
        zone_um = min(8 * 224.0, (height * _SLIDE_MPP - 600) * 0.99)
        mosaic_slide(path, size, MosaicPlan(mpp=_SLIDE_MPP, zone_um=zone_um), Path(data))
    else:
        position_slide(path, size, _SLIDE_MPP, PyramidLayout())


def _infer_options(options: argparse.Namespace) -> dict[str, Any]:
    limit = options.memory_limit and options.memory_limit * _MIB
    return {
        "threads": options.threads,
        "block_tiles": options.block_tiles,
        "mode": options.mode,
        "memory_limit_bytes": limit,
        "normalise": options.normalise,
        "precision": options.precision,
        "device": options.device,
    }


def _alone(part: str, options: argparse.Namespace, slide: Path, model: str, tiles: int = 0) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--part", part, "--slide", str(slide), "--model", model]
    command += ["--threads", str(options.threads), "--tiles", str(tiles), "--precision", options.precision]
    command += ["--device", options.device]
    command += ["--block-tiles", str(options.block_tiles)] if options.block_tiles else []
    command += ["--normalise", options.normalise] if options.normalise else []
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(options: argparse.Namespace, folder: Path) -> None:
    slide = options.slide or folder / f"mosaic-{options.gpx:g}gpx.svs"
    if not slide.exists():
        started = time.perf_counter()
        make_slide(slide, options.gpx)
        print(f"made {slide.name}, {slide.stat().st_size / _MIB:,.0f} MiB, in {time.perf_counter() - started:.0f} s")
    warm = folder / f"mosaic-{_WARM_GPX:g}gpx.svs"
    if not warm.exists():
        make_slide(warm, _WARM_GPX)
    model = options.model
    if model in NAMES:
        model = str(_drawn(model, folder, warm, options.precision))
    _alone("engine", options, warm, model)  # compiles the kernels; not counted
    with slide.open("rb") as file:  # fills the page cache
        while file.read(_MIB):
            pass
    tiles = options.floor_tiles
    floors, runs = [_alone("floor", options, slide, model, tiles)], []
    for _ in range(options.repeats):
        runs.append(_alone("engine", options, slide, model))
        floors.append(_alone("floor", options, slide, model, tiles))
    report(options, runs, floors)


def _drawn(name: str, folder: Path, slide: Path, precision: str) -> Path:
    """A network of random weights, also in int8 if that is asked for."""
    import numpy as np

    import wsiengine

    model = make(name, folder / name)
    if precision == "int8":
        tiles = itertools.islice(_pixels(wsiengine.plan(slide, model)), _CALIBRATION_TILES)
        add_int8(model, np.stack([pixels for pixels, _ in tiles]))
    return model


def report(options: argparse.Namespace, runs: list[dict[str, Any]], floors: list[dict[str, Any]]) -> None:
    """Each run is compared with the floors before and after it; the medians are told."""

    def rate(row: dict[str, Any], clock: str) -> float:
        return float(row["tiles"] / row[clock])

    def ratio(clock: str) -> float:
        around = zip(runs, floors, floors[1:], strict=False)  # one floor more than runs
        return statistics.median(2 * rate(r, clock) / (rate(a, clock) + rate(b, clock)) for r, a, b in around)

    run = sorted(runs, key=lambda r: r["wall_s"])[len(runs) // 2]
    floor = statistics.median(rate(f, "wall_s") for f in floors)
    print(
        f"{options.model} · {run['tiles']:,} tiles in {run['blocks']} blocks of up to {run['block_tiles']}² · "
        f"{options.threads} threads · median of {len(runs)}"
    )
    print(f"engine     {rate(run, 'wall_s'):8.1f} tiles/s   (whole run, from opening the slide to the last file)")
    print(f"floor      {floor:8.1f} tiles/s   (the model alone, tiles in memory)")
    print(f"ratio      {ratio('wall_s'):8.2f} of the floor by wall time, {ratio('cpu_s'):.2f} by CPU time")
    stages = run["stages_s"]
    per_tile = 1e3 * stages["run (wall)"] / run["tiles"]
    print(f"blocks     {per_tile:8.2f} ms of wall time per tile, start and end excluded")
    print("stages     " + " · ".join(f"{name} {spent:.2f} s" for name, spent in stages.items()))
    print("           (read, normalise, model and journal are summed over threads; the others are wall time)")
    anonymous, planned = max(r["anonymous_mib"] for r in runs), run["planned_mib"]
    file_backed = max(r["file_mib"] for r in runs)
    print(f"memory     {anonymous:,} MiB anonymous at most (planned {planned:,}) · {file_backed:,} MiB file-backed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="crc5", help="any, or resnet18, resnet50, mobilenetv2 of random weights")
    parser.add_argument("--gpx", type=float, default=1.0, help="pixels of level 0, in 10⁹ (default 1)")
    parser.add_argument("--slide", type=Path, help="measure on this slide")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--block-tiles", type=int, help="side of a block, instead of the plan's choice")
    parser.add_argument("--mode", default="tiles", choices=["tiles", "dense"])
    parser.add_argument("--normalise", help="recipe instead of the model's: macenko+clahe, say")
    parser.add_argument("--precision", default="fp32", help="fp32, fp16, int8 or auto")
    parser.add_argument("--device", default="auto", help="what runs the model: auto, cpu, mnn, …")
    parser.add_argument("--memory-limit", type=int, help="MiB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--floor-tiles", type=int, default=2000, help="most tiles that the floor is measured on")
    parser.add_argument("--workdir", type=Path, help="keep the mosaic and the model here")
    parser.add_argument("--quick", action="store_true", help="a small slide, once")
    parser.add_argument("--part", choices=["engine", "floor"], help=argparse.SUPPRESS)
    parser.add_argument("--tiles", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "engine":
        print(json.dumps(run_engine(str(options.slide), options.model, **_infer_options(options))))
    elif options.part == "floor":
        alone = (options.model, options.threads, options.tiles, options.precision, options.device)
        row = run_floor(str(options.slide), *alone)
        print(json.dumps(row))
    else:
        if options.quick:
            options.gpx, options.repeats, options.floor_tiles = min(options.gpx, 0.05), 1, 200
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.workdir or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            measure(options, folder)


if __name__ == "__main__":
    main()
