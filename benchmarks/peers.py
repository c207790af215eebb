"""Side by side with other tools: the same slide, the same ResNet-18 weights, in turns.

    python benchmarks/peers.py --wsinfer-python ~/wsinfer/bin/python [--tiatoolbox-python ~/tia/bin/python]

Nothing is installed (``peer_tools.py`` says what the other tools need). The weights are drawn once; each tool gets them
in its own form: ONNX, TorchScript, a torch module. wsiengine runs tile by tile without overlap and in dense mode with
it, in fp32 and in int8; drawn weights have no accuracy that int8 could lose, so that only its speed is told.
Masks differ between tools, so that time is told per tile. Wall and CPU time are of the whole process and its children,
start-up included, peak memory of its largest. Every tool runs once uncounted, on a small slide, which fills the caches.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from benchmarks.engine import _pixels, make_slide  # noqa: E402
from benchmarks.networks import add_int8, make  # noqa: E402
from benchmarks.peer_tools import MPP, Peer, environment, tiles_in  # noqa: E402

_WARM_GPX = 0.02
_CALIBRATION_TILES = 64


@dataclass(frozen=True)
class Contestant:
    """One tool, ready to run: a command, its surroundings, and where its results go."""

    name: str
    command: list[str]
    environment: dict[str, str]
    output: Path


def contestants(
    overlap: float, slide: Path, model: Path, folder: Path, options: argparse.Namespace
) -> list[Contestant]:
    """Ours on each device and in each precision (in MNN in fp32), then the peers."""
    found = []
    mode = "dense" if overlap else "tiles"
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    ours = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for device, precision in itertools.product(options.devices.split(","), options.precisions.split(",")):
        if (device, precision) == ("mnn", "int8"):
            continue
        kind = precision if device == "auto" else f"{device}-{precision}"
        command = [sys.executable, "-m", "wsiengine", "infer", str(slide), "-m", str(model), "--quiet"]
        command += ["--overlap", str(overlap), "--mode", mode, "--precision", precision]
        command += ["--device", device, "--threads", str(options.threads), "-o", str(folder / kind)]
        found.append(Contestant(f"wsiengine {mode} {kind}", command, ours, folder / kind))
    for peer in peers(options):
        output = folder / peer.name.replace(" ", "")
        command = peer.command(model, [slide], output, overlap, options.threads)
        found.append(Contestant(peer.name, command, environment(folder), output))
    return found


def peers(options: argparse.Namespace) -> list[Peer]:
    names = ["WSInfer", "WSInfer --speedup"] if options.wsinfer_python else []
    found = [Peer(name, options.wsinfer_python) for name in names]
    return found + ([Peer("TIAToolbox", options.tiatoolbox_python)] if options.tiatoolbox_python else [])


def run(contestant: Contestant, log: Path) -> dict[str, float]:
    """Wall and CPU seconds, peak memory, tiles."""
    started = time.perf_counter()
    with log.open("wb") as said:
        process = subprocess.Popen(contestant.command, stdout=said, stderr=said, env=contestant.environment)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{contestant.name} failed:\n{log.read_text(errors='replace')[-3000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    run_json = contestant.output / "run.json"
    ours = run_json.exists() and int(json.loads(run_json.read_text())["summary"]["tiles"])
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "rss_mib": usage.ru_maxrss / 1024,
        "tiles": ours or tiles_in(contestant.output),
    }


def compare(overlap: float, slides: tuple[Path, Path], model: Path, folder: Path, options: argparse.Namespace) -> None:
    """``slides``: the one to warm up with, and the one to measure on. Who has run before on a small one is warm."""
    results: dict[str, list[dict[str, float]]] = {}
    for turn in range(options.repeats + 1):
        out = folder / f"out-{overlap:g}-{turn}"
        out.mkdir()
        for contestant in contestants(overlap, slides[turn > 0], model, out, options):
            if turn == 0 and contestant.name in options.warm_names:
                continue
            row = run(contestant, folder / "log")
            options.warm_names.add(contestant.name)
            if turn:
                results.setdefault(contestant.name, []).append(row)
    print(table(overlap, results), flush=True)


def table(overlap: float, results: dict[str, list[dict[str, float]]]) -> str:
    """Medians, and the median of the turns' ratios to each of ours: time of a tile, and wall time of the whole slide.

    A tile of one tool is not always one of another's: dense windows lie on whole cells, and masks differ.
    """

    def per_tile(row: dict[str, float], clock: str) -> float:
        return 1000 * row[clock] / max(row["tiles"], 1)

    def ratio(rows: list[dict[str, float]], mine: str, what: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(what(a) / what(b) for a, b in zip(rows, results[mine], strict=True))

    clocks: dict[str, Callable[[dict[str, float]], float]] = {
        "wall": lambda row: per_tile(row, "wall_s"),
        "CPU": lambda row: per_tile(row, "cpu_s"),
        "slide": lambda row: row["wall_s"],
    }
    ours = [name for name in results if name.startswith("wsiengine")]
    heads = [f"{clock} × {name.split()[-1]}" for name in ours for clock in clocks]
    lines = [
        f"overlap {overlap:.0%}              wall s   CPU s  peak MiB   tiles  wall ms  CPU ms"
        + "".join(f"{head:>17s}" for head in heads)
    ]
    for name, rows in results.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        ratios = [ratio(rows, mine, what) for mine in ours for what in clocks.values()]
        lines.append(
            f"{name:22s} {middle['wall_s']:8.1f} {middle['cpu_s']:7.1f} {middle['rss_mib']:9,.0f} "
            f"{middle['tiles']:7,.0f} {per_tile(middle, 'wall_s'):8.2f} {per_tile(middle, 'cpu_s'):7.2f}"
            + "".join(f"{times:17.2f}" for times in ratios)
        )
    return "\n".join(lines)


def network(folder: Path, slide: Path, options: argparse.Namespace) -> Path:
    """ResNet-18 in every form that is needed."""
    import numpy as np

    import wsiengine

    model = folder
    if not (folder / "card.json").exists():
        make("resnet18", folder, mpp=MPP)
    if "int8" in options.precisions and not list(folder.glob("*.int8.onnx")):
        tiles = itertools.islice(_pixels(wsiengine.plan(slide, model)), _CALIBRATION_TILES)
        add_int8(model, np.stack([pixels for pixels, _ in tiles]))
    for peer in peers(options):
        peer.prepare(model)
    return model


def prepare(folder: Path, options: argparse.Namespace) -> tuple[Path, Path, Path]:
    """The slide to warm up with, the one to measure on, and the model."""
    slide, warm = options.slide, options.warm or options.slide
    if slide is None:
        slide, warm = folder / "slides" / "mosaic.svs", folder / "warm" / "small.svs"
        for path, gpx in ((slide, options.gpx), (warm, _WARM_GPX)):
            path.parent.mkdir()
            make_slide(path, gpx)
    return warm, slide, network(options.network or folder / "resnet18", warm, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wsinfer-python", help="Python of the environment that holds WSInfer")
    parser.add_argument("--tiatoolbox-python", help="Python of the environment that holds TIAToolbox")
    parser.add_argument("--slide", type=Path, help="measure on this slide, alone in its folder")
    parser.add_argument("--warm", type=Path, help="warm up on this slide, alone in its folder; else on the same")
    parser.add_argument("--network", type=Path, help="folder for the network, which a later run uses again")
    parser.add_argument("--gpx", type=float, default=1.0, help="pixels of the mosaic, in 10⁹")
    parser.add_argument("--overlaps", default="0,0.5")
    parser.add_argument("--precisions", default="fp32,int8", help="of wsiengine")
    parser.add_argument("--devices", default="auto", help="of wsiengine: auto,mnn, say")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    options.warm_names = set()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # In a process of its own: the peak memory of a child counts from that of the process which starts it.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            warm, slide, model = pool.submit(prepare, folder, options).result()
        for overlap in map(float, options.overlaps.split(",")):
            compare(overlap, (warm, slide), model, folder, options)


if __name__ == "__main__":
    main()
