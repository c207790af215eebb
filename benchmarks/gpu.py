"""What a GPU gets done in a whole run, beside a bare session loop on batches that already lie on it.

    python benchmarks/gpu.py --slide slide.svs    # every network in fp16, first CUDA device
    python benchmarks/gpu.py --slide field.svs --copies 12 --normalise macenko+clahe --models resnet50
    python benchmarks/gpu.py --device tensorrt --models resnet50 --batch-size 128
    python benchmarks/gpu.py --device cpu --quick # the same code without a GPU: a smoke test

Networks have known shapes and random weights (benchmarks/networks.py). Each line: tiles/s of the whole run, of its
blocks alone, of the bare loop; blocks / bare; how much of the blocks' time the device was at work; rows of batches that
tiles filled; the driver's own figure of use, read every 0.2 s where ``nvidia-smi`` is there. Below: CPU time a tile,
and stage times in seconds of all threads. ``--copies 12`` shows a tiled JPEG slide 12 × 12 times: a fast device needs
many tiles. Without ``--slide`` a slide is made of real labelled fields (WSIENGINE_DATA), or drawn.
"""

import argparse
import contextlib
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from benchmarks.networks import NAMES, make  # noqa: E402
from tests.sparse_slides import Sparse, write_repeated, write_sparse  # noqa: E402


class DeviceWatch:
    """Use of the GPUs in per cent, as ``nvidia-smi`` tells it; nothing where that is missing."""

    def __init__(self) -> None:
        self._read_at: list[tuple[float, float]] = []
        self._blocks_at: list[float] = []
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
            self._read_at.append((time.perf_counter(), float(line)))

    def heard(self, event: Any) -> None:
        """A listener to the run: its progress says when blocks run."""
        if event.kind == "progress":
            self._blocks_at.append(time.perf_counter())

    @property
    def use(self) -> list[float]:
        """Readings between the first block and the last."""
        first, last = self._blocks_at[0], self._blocks_at[-1]
        return [use for at, use in self._read_at if first <= at <= last]

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


class CpuWatch:
    """CPU seconds of this process and of those that read for it, while the blocks run. Without /proc: zeros."""

    def __init__(self) -> None:
        self._at: dict[bool, tuple[float, float]] = {}  # once all blocks are done, and before

    def heard(self, event: Any) -> None:
        """A listener to the run."""
        if event.kind == "progress" and (over := event.data["done"] == event.data["total"]) not in self._at:
            self._at[over] = time.process_time(), _readers_cpu_s()

    @property
    def spent_s(self) -> tuple[float, float]:
        """This process; its readers."""
        (own, theirs), (own_after, theirs_after) = self._at[False], self._at[True]
        return own_after - own, theirs_after - theirs


def _readers_cpu_s() -> float:
    """Of all processes that descend from this one through its readers' first."""
    family, found = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, (_, parent, *fields) = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
            family[pid], found[pid] = int(parent), (int(fields[9]) + int(fields[10])) / os.sysconf("SC_CLK_TCK")
            if family[pid] == os.getpid() and b"wsiengine.readers" not in (stat.parent / "cmdline").read_bytes():
                family[pid] = 0  # another child: nvidia-smi

    def ours(pid: int) -> bool:
        return pid in family and (family[pid] == os.getpid() or ours(family[pid]))

    return sum(spent for pid, spent in found.items() if ours(pid))


def bare(model: Path, device: str, batch_size: int, seconds: float) -> float:
    """Tiles/s of one session on a batch that stays on its device: the better of one call at a time, and of two."""
    import numpy as np
    import onnxruntime

    from wsiengine.models.registry import load_model
    from wsiengine.models.runtime import Runtime

    runtime = Runtime(load_model(str(model)), device=device, batch_size=batch_size, batched=True)
    index = device.partition(":")[2]
    place = ("cpu", 0) if runtime.provider.startswith("CPU") else ("cuda", int(index.split(",")[0] or 0))
    pixels = np.random.default_rng(0).integers(0, 256, runtime._batch().shape, np.uint8)

    def loop(seconds: float) -> float:
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

    rates = []
    for calls in (1, 2):
        with ThreadPoolExecutor(calls) as pool:
            rates.append(sum(pool.map(loop, [seconds] * calls)))
    print(f"  bare: one call at a time {rates[0]:,.0f}, two {rates[1]:,.0f} tiles/s", flush=True)
    return max(rates)


def whole(slides: dict[str, Path], model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run over the ``measured`` slide, after the ``warm`` one, so that engines and caches are there."""
    from wsiengine import infer

    how = {"device": options.device, "batch_size": options.batch_size, "threads": options.threads, "overlap": 0.0}
    how |= {"profile": options.timeline is not None, "readers": options.readers, "block_tiles": options.block_tiles}
    with tempfile.TemporaryDirectory() as folder:
        for attempt, slide in slides.items():
            before, cpu = time.process_time(), CpuWatch()
            with DeviceWatch() as watch:

                def heard(event: Any, told: tuple[Any, Any] = (watch, cpu)) -> None:
                    for each in told:
                        each.heard(event)

                where = Path(folder) / attempt
                result = infer(slide, str(model), where, normalise=options.normalise, listener=heard, **how)
            after = time.process_time()
        run = result.run
        if options.timeline:
            shutil.copy(Path(folder) / "measured" / "profile.png", options.timeline / f"{model.name}.png")
    own_s, readers_s = cpu.spent_s
    facts = {"cpu_s": after - before, "blocks_cpu_s": own_s, "readers_cpu_s": readers_s}
    facts |= {"use": watch.use, "provider": run["host"]["runtime"]}
    return {"tiles": run["summary"]["tiles"], "block_tiles": run["host"]["block_tiles"], **facts, **run["timing"]}


def answer_at_once() -> None:
    """Sessions give zeros for a batch, so that a run takes what reading, normalising and packing take."""
    import numpy as np

    from wsiengine.models import runtime
    from wsiengine.models.bound import BoundSlot

    class Batched(runtime.Runtime):
        def __init__(self, *arguments: Any, **how: Any) -> None:
            super().__init__(*arguments, **{**how, "batched": True})

    def answer(slot: BoundSlot) -> np.ndarray:
        return np.zeros((len(slot.batch), 5), np.float32)

    setattr(BoundSlot, "run", answer)  # noqa: B010  (mypy knows no other way)
    setattr(runtime, "Runtime", Batched)  # noqa: B010


def turn_on_the_spot() -> None:
    """Threads wait for the GPU as CUDA has it by itself."""
    from wsiengine.models import ort

    setattr(ort, "wait_asleep", lambda index: False)  # noqa: B010


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
    ms = {name: f"{1e3 * run[name] / run['tiles']:.3f}" for name in ("cpu_s", "blocks_cpu_s", "readers_cpu_s")}
    print(
        " "
        * 13
        + f"{run['tiles']:,} tiles in blocks of {run['block_tiles']}², {run['workers']} threads; CPU ms a tile: "
        f"{ms['readers_cpu_s']} in readers, {ms['blocks_cpu_s']} in this process while blocks run, {ms['cpu_s']} in all"
    )
    print(" " * 13 + " · ".join(f"{stage} {spent:.2f} s" for stage, spent in run["stages_s"].items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", help="cuda (the default), cuda:1, cuda:0,1, tensorrt, cpu, auto (the default with --quick)"
    )
    parser.add_argument("--models", default=",".join(NAMES), help="some of: " + ", ".join(NAMES))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0, help="worker threads (default: what a run takes)")
    parser.add_argument("--instant", action="store_true", help="sessions answer at once: what reading alone gives")
    parser.add_argument("--spin", action="store_true", help="threads turn on the spot while they wait for the GPU")
    parser.add_argument("--readers", type=int, help="processes that read (default: one per core where a GPU runs)")
    parser.add_argument("--block-tiles", type=int, help="side of a block in tiles (default: what a run takes)")
    parser.add_argument("--normalise", help="a recipe: macenko, macenko+clahe")
    parser.add_argument("--gpx", type=float, default=1.0, help="size of the slide, in 10⁹ pixels")
    parser.add_argument("--slide", type=Path, help="measure on this slide")
    parser.add_argument("--copies", type=int, default=1, help="show the slide this many times, each way")
    parser.add_argument("--precision", choices=["fp16", "fp32"], help="of the networks (default fp16; fp32 on a CPU)")
    parser.add_argument("--timeline", type=Path, help="keep each run's picture of its timeline in this folder")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long the bare loop runs")
    parser.add_argument("--quick", action="store_true", help="a small slide and short loops")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    options.device = options.device or ("auto" if options.quick else "cuda")
    if options.instant:
        answer_at_once()
    if options.spin:
        turn_on_the_spot()
    half = (options.precision or ("fp32" if options.device in ("cpu", "auto") else "fp16")) == "fp16"
    if options.quick:
        options.gpx, options.seconds, options.batch_size = min(options.gpx, 0.02), 0.5, min(options.batch_size, 4)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        slide = options.slide or draw(Path(folder) / "slide.tiff", options.gpx)
        slides = {"warm": slide, "measured": slide}
        if options.copies > 1:
            slides["measured"] = write_repeated(Path(folder) / "copies.tiff", slide, options.copies)
        kind = "fp16" if half else "fp32"
        cores = len(os.sched_getaffinity(0))
        print(f"{platform.machine()} · {cores} cores · {kind} · batches of {options.batch_size}")
        for name in options.models.split(","):
            model = make(name, Path(folder) / name, half=half)
            floor = bare(model, options.device, options.batch_size, options.seconds)
            run = whole(slides, model, options)
            rows[name] = run | {"bare_tiles_per_s": floor}
            if name == options.models.split(",")[0]:
                print(run["provider"])
            tell(name, run, floor)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def draw(path: Path, gpx: float) -> Path:
    """A slide that is nearly all tissue: of real fields where there are any."""
    from tests.mosaics import MosaicPlan, mosaic_slide
    from wsiengine.geometry import Size

    data = os.environ.get("WSIENGINE_DATA")
    if data and gpx >= 0.1:
        mosaic_slide(path.with_suffix(".field"), Size(8_660, 11_547), MosaicPlan("ebhi", 0.25, 0, 600.0), Path(data))
        return write_repeated(path, path.with_suffix(".field"), max(1, round(math.sqrt(gpx / 0.067))))
    height = math.isqrt(round(gpx * 1e9 * 3 / 4))
    return write_sparse(path, Sparse(Size(height, round(gpx * 1e9 / height)), share=0.7))


if __name__ == "__main__":
    main()
