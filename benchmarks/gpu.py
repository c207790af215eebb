"""What a GPU gets done in a whole run, beside a bare session loop on batches that already lie on it.

    python benchmarks/gpu.py                      # every network, first CUDA device, a slide of 1 Gpx
    python benchmarks/gpu.py --device tensorrt --models resnet50 --batch-size 128
    python benchmarks/gpu.py --device cpu --quick # the same code without a GPU: a smoke test

Networks have known shapes and random weights (benchmarks/networks.py). Each line: tiles/s of the whole run, of its
blocks alone, of the bare loop; their ratio; how much of the blocks' time the device was at work; rows of batches that
tiles filled; the driver's own figure of use, read every 0.2 s where ``nvidia-smi`` is there. Stage times follow.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from benchmarks.networks import NAMES, make  # noqa: E402


class DeviceWatch:
    """Use of the GPUs in per cent, as ``nvidia-smi`` tells it; nothing where that is missing."""

    def __init__(self) -> None:
        self.use: list[float] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "DeviceWatch":
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
            self._process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.use.append(float(line))

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def bare(model: Path, device: str, batch_size: int, seconds: float) -> float:
    """Tiles/s of one session on a batch that stays on its device."""
    import numpy as np
    import onnxruntime

    from wsiengine.models.registry import load_model
    from wsiengine.models.runtime import Runtime

    runtime = Runtime(load_model(str(model)), device=device, batch_size=batch_size, batched=True)
    index = device.partition(":")[2]
    place = ("cpu", 0) if runtime.provider.startswith("CPU") else ("cuda", int(index.split(",")[0] or 0))
    pixels = np.random.default_rng(0).integers(0, 256, runtime._batch().shape, np.uint8)
    binding = runtime._session.io_binding()
    binding.bind_ortvalue_input(runtime._input, onnxruntime.OrtValue.ortvalue_from_numpy(pixels, *place))
    for name in runtime._outputs:
        binding.bind_output(name, *place)
    for _ in range(3):
        runtime._session.run_with_iobinding(binding)
    batches, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        runtime._session.run_with_iobinding(binding)
        batches += 1
    return batches * len(pixels) / (time.perf_counter() - started)


def whole(slide: Path, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run, results thrown away; the second of two, so that engines and caches are there."""
    from wsiengine import infer

    how = {"device": options.device, "batch_size": options.batch_size, "threads": options.threads, "overlap": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        for attempt in ("warm", "measured"):
            with DeviceWatch() as watch:
                result = infer(slide, str(model), Path(folder) / attempt, normalise=options.normalise, **how)
        run = result.run
    return {"tiles": run["summary"]["tiles"], "use": watch.use, "provider": run["host"]["runtime"], **run["timing"]}


def tell(name: str, run: dict[str, Any], floor: float) -> None:
    blocks_s = run["stages_s"]["run (wall)"]
    batches = run.get("batches") or {"busy_s": run["model_busy"] * blocks_s, "rows": run["tiles"]}
    rate = run["tiles"] / blocks_s
    used = f"{statistics.mean(run['use']):.0f} %" if run["use"] else "not known"
    print(
        f"{name:12s} whole {run['tiles'] / run['wall_s']:9,.0f}  blocks {rate:9,.0f}  bare {floor:9,.0f} tiles/s  "
        f"ratio {rate / floor:.2f}  at work {min(1.0, batches['busy_s'] / blocks_s):.0%}  "
        f"rows filled {run['tiles'] / batches['rows']:.0%}  use {used}"
    )
    print(" " * 13 + " · ".join(f"{stage} {spent:.2f} s" for stage, spent in run["stages_s"].items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", help="cuda (the default), cuda:1, cuda:0,1, tensorrt, cpu, auto (the default with --quick)"
    )
    parser.add_argument("--models", default=",".join(NAMES), help="some of: " + ", ".join(NAMES))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--normalise", help="a recipe: macenko, macenko+clahe")
    parser.add_argument("--gpx", type=float, default=1.0, help="size of the slide, in 10⁹ pixels")
    parser.add_argument("--slide", type=Path, help="measure on this slide")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long the bare loop runs")
    parser.add_argument("--quick", action="store_true", help="a small slide and short loops")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    options.device = options.device or ("auto" if options.quick else "cuda")
    if options.quick:
        options.gpx, options.seconds, options.batch_size = min(options.gpx, 0.02), 0.5, min(options.batch_size, 4)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        slide = options.slide or draw(Path(folder) / "slide.tiff", options.gpx)
        print(f"{platform.machine()} · {options.threads} threads · batches of {options.batch_size}")
        for name in options.models.split(","):
            model = make(name, Path(folder) / name)
            floor = bare(model, options.device, options.batch_size, options.seconds)
            run = whole(slide, model, options)
            rows[name] = run | {"bare_tiles_per_s": floor}
            if name == options.models.split(",")[0]:
                print(run["provider"])
            tell(name, run, floor)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def draw(path: Path, gpx: float) -> Path:
    """A slide that is nearly all tissue."""
    from tests.sparse_slides import Sparse, write_sparse
    from wsiengine.geometry import Size

    height = math.isqrt(round(gpx * 1e9 * 3 / 4))
    return write_sparse(path, Sparse(Size(height, round(gpx * 1e9 / height)), share=0.7))


if __name__ == "__main__":
    main()
