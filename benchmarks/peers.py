"""Side by side with other tools: the same slide, the same ResNet-18 weights, in turns.

    python benchmarks/peers.py --wsinfer-python ~/wsinfer/bin/python [--tiatoolbox-python ~/tia/bin/python]

Nothing is installed. Each tool runs under the Python of its own virtual environment, where it is installed with what it
needs (WSInfer 0.6.1: ``wsinfer zarr<3 tiffslide<3 numcodecs<0.16 openslide-python openslide-bin``). The weights are
drawn once; each tool gets them in its own form (ONNX, TorchScript, a torch module). Masks differ between tools, so that
time is also told per tile. Wall and CPU time are of the whole process and its children, peak memory of its largest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from benchmarks.engine import make_slide  # noqa: E402
from benchmarks.networks import make  # noqa: E402

_MPP, _SIDE_PX = 0.5, 224

# What runs under a peer's own Python: first the network, then the peer.
_NETWORK = """
import sys, numpy as np, torch
class Network(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        stored = np.load(weights)
        self.convs = torch.nn.ModuleList()
        for k in range(len(stored.files) // 2):
            w, b = stored[f"w{k}"], stored[f"b{k}"]
            stride = int(stored_strides[k])
            conv = torch.nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], stride, w.shape[2] // 2)
            conv.weight.data, conv.bias.data = torch.from_numpy(w), torch.from_numpy(b)
            self.convs.append(conv)
    def forward(self, x):
        c = iter(self.convs)
        x = torch.nn.functional.max_pool2d(torch.relu(next(c)(x)), 3, 2, 1)
        wide = 64
        for out, stride in ((64,1),(64,1),(128,2),(128,1),(256,2),(256,1),(512,2),(512,1)):
            straight = x if stride == 1 and wide == out else next(c)(x)
            x = torch.relu(next(c)(x))
            x = torch.relu(next(c)(x) + straight)
            wide = out
        return next(c)(x).mean(dim=(2, 3))
"""
_BUILD = """
stored_strides = [int(s) for s in sys.argv[3].split(",")]
network = Network(sys.argv[1]).eval()
example = torch.rand(1, 3, 224, 224)
traced = torch.jit.trace(network, example)
traced.save(sys.argv[2])
"""
_WSINFER = """
import re, sys, torch
operators = torch.library.Library("torchvision", "DEF")
while True:  # torchvision's own operators may be missing beside a CPU build of torch; WSInfer's transforms need none
    try:
        import torchvision
        break
    except RuntimeError as error:
        missing = re.search(r"torchvision::(\\w+) does not exist", str(error))
        if not missing:
            raise
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        operators.define(missing.group(1) + "(Tensor a) -> Tensor")
import wsinfer_zoo, wsinfer_zoo.client as client
client.load_registry = wsinfer_zoo.load_registry = lambda *a, **k: client.ModelRegistry(models={})  # no download
from wsinfer.cli.cli import cli
cli()
"""
_TIATOOLBOX = """
import sys, torch
stored_strides = [int(s) for s in sys.argv[3].split(",")]
from tiatoolbox.models.engine.patch_predictor import PatchPredictor
from tiatoolbox.models.models_abc import ModelABC
class Wrapped(Network, ModelABC):
    @staticmethod
    def infer_batch(model, batch, device):
        x = batch.to(device).float().permute(0, 3, 1, 2)
        mean = torch.tensor([123.7, 116.3, 103.5]).view(1, 3, 1, 1)
        deviation = torch.tensor([58.4, 57.1, 57.4]).view(1, 3, 1, 1)
        with torch.inference_mode():
            return torch.softmax(model((x - mean) / deviation), 1).cpu().numpy()
predictor = PatchPredictor(model=Wrapped(sys.argv[1]).eval(), batch_size=32, num_workers=int(sys.argv[6]))
stride = int(sys.argv[5])
predictor.run(images=[sys.argv[2]], patch_mode=False, save_dir=sys.argv[4], patch_input_shape=(224, 224),
              stride_shape=(stride, stride), input_resolutions=[{"units": "mpp", "resolution": 0.5}],
              device="cpu", output_type="zarr", overwrite=True)
"""


@dataclass(frozen=True)
class Contestant:
    """One tool, ready to run: a command, and how to count the tiles that it ran in its output folder."""

    name: str
    command: list[str]
    output: Path


def wsiengine(slide: Path, model: Path, output: Path, overlap: float, options: argparse.Namespace) -> Contestant:
    mode = "dense" if overlap else "tiles"
    command = [sys.executable, "-m", "wsiengine", "infer", str(slide), "-m", str(model), "-o", str(output), "--quiet"]
    command += ["--overlap", str(overlap), "--mode", mode, "--threads", str(options.threads), "--overwrite"]
    return Contestant(f"wsiengine ({mode})", command, output)


def wsinfer(slide: Path, model: Path, output: Path, overlap: float, options: argparse.Namespace) -> list[Contestant]:
    """WSInfer, plain and with its ``--speedup``."""
    runner, script = model / "wsinfer_runner.py", model / "network.pt"
    runner.write_text(_WSINFER)
    _build(options.wsinfer_python, model, script)
    config = model / "wsinfer.json"
    config.write_text(json.dumps(_wsinfer_config()))
    found = []
    for extra in ([], ["--speedup"]):
        own = output.with_name(output.name + "-".join(extra))
        command = [
            options.wsinfer_python,
            str(runner),
            "run",
            "--wsi-dir",
            str(slide.parent),
            "--results-dir",
            str(own),
        ]
        command += ["--config", str(config), "--model-path", str(script), "--num-workers", str(options.threads)]
        found.append(
            Contestant(" ".join(["WSInfer", *extra]), [*command, "--patch-overlap-ratio", str(overlap), *extra], own)
        )
    return found


def tiatoolbox(slide: Path, model: Path, output: Path, overlap: float, options: argparse.Namespace) -> Contestant:
    runner, stride = model / "tiatoolbox_runner.py", round(_SIDE_PX * (1 - overlap))
    runner.write_text(_NETWORK + _TIATOOLBOX)
    arguments = [model / "weights.npz", slide, _strides(model), output, stride, options.threads]
    return Contestant("TIAToolbox", [options.tiatoolbox_python, str(runner), *map(str, arguments)], output)


def _wsinfer_config() -> dict[str, Any]:
    mean, deviation = ([v / 255 for v in values] for values in ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)))
    return {
        "spec_version": "1.0",
        "architecture": "resnet18",
        "num_classes": 5,
        "patch_size_pixels": _SIDE_PX,
        "spacing_um_px": _MPP,
        "class_names": [f"Class {k}" for k in range(5)],
        "transform": [
            {"name": "Resize", "arguments": {"size": _SIDE_PX}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": {"mean": mean, "std": deviation}},
        ],
    }


def _build(python: str, model: Path, script: Path) -> None:
    """TorchScript of the weights, made under the peer's own Python."""
    builder = model / "builder.py"
    builder.write_text(_NETWORK + _BUILD)
    subprocess.run([python, str(builder), str(model / "weights.npz"), str(script), _strides(model)], check=True)


def export_weights(model: Path) -> None:
    """The convolutions of ``resnet18.onnx`` in order, as ``weights.npz``, and their strides."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(model / "resnet18.onnx").graph
    stored = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    arrays = {}
    for k, node in enumerate(convolutions):
        arrays[f"w{k}"], arrays[f"b{k}"] = stored[node.input[1]], stored[node.input[2]]
    np.savez(model / "weights.npz", **arrays)
    strides = [next(a.ints[0] for a in node.attribute if a.name == "strides") for node in convolutions]
    (model / "strides").write_text(",".join(map(str, strides)))


def _strides(model: Path) -> str:
    return (model / "strides").read_text()


def run(contestant: Contestant, home: Path) -> dict[str, float]:
    """Wall and CPU seconds, peak memory, tiles."""
    environment = {**os.environ, "HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    if not contestant.name.startswith("wsiengine"):
        del environment["PYTHONPATH"]
    log = home / "log"
    started = time.perf_counter()
    with log.open("wb") as said:
        process = subprocess.Popen(contestant.command, stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{contestant.name} failed:\n{log.read_text(errors='replace')[-3000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "rss_mib": usage.ru_maxrss / 1024, "tiles": tiles_in(contestant.output)}


def tiles_in(folder: Path) -> int:
    """Tiles that a tool's results speak of; 0 where it has none."""
    if (folder / "run.json").exists():
        return int(json.loads((folder / "run.json").read_text())["summary"]["tiles"])
    tables = list(folder.glob("model-outputs-csv/*.csv"))
    if tables:
        return sum(len(path.read_text().splitlines()) - 1 for path in tables)
    for group in folder.glob("*.zarr"):  # TIAToolbox: one row of probabilities per patch
        for description in group.glob("probabilities/zarr.json"):
            return int(json.loads(description.read_text())["shape"][0])
        for description in group.glob("probabilities/.zarray"):
            return int(json.loads(description.read_text())["shape"][0])
    return 0


def compare(overlap: float, slide: Path, model: Path, folder: Path, options: argparse.Namespace) -> None:
    results: dict[str, list[dict[str, float]]] = {}
    for turn in range(options.repeats + 1):
        out = folder / f"out-{overlap:g}-{turn}"
        contestants = [wsiengine(slide, model, out / "wsiengine", overlap, options)]
        if options.wsinfer_python:
            contestants += wsinfer(slide, model, out / "wsinfer", overlap, options)
        if options.tiatoolbox_python:
            contestants.append(tiatoolbox(slide, model, out / "tiatoolbox", overlap, options))
        out.mkdir()
        for contestant in contestants:
            row = run(contestant, folder)
            if turn:  # the first turn fills caches and compiles
                results.setdefault(contestant.name, []).append(row)
    print(f"overlap {overlap:.0%}          wall s   CPU s  peak MiB   tiles  ms/tile  times wsiengine")
    ours = None
    for name, rows in results.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        per_tile = 1000 * middle["wall_s"] / max(middle["tiles"], 1)
        ours = ours or per_tile
        print(
            f"{name:18s} {middle['wall_s']:8.1f} {middle['cpu_s']:7.1f} {middle['rss_mib']:9,.0f} "
            f"{middle['tiles']:7,.0f} {per_tile:8.2f} {per_tile / ours:8.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wsinfer-python", help="Python of the environment that holds WSInfer")
    parser.add_argument("--tiatoolbox-python", help="Python of the environment that holds TIAToolbox")
    parser.add_argument("--slide", type=Path, help="measure on this slide, alone in its folder")
    parser.add_argument("--gpx", type=float, default=1.0, help="pixels of the mosaic, in 10⁹")
    parser.add_argument("--overlaps", default="0,0.5")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "slides").mkdir()
        slide = options.slide or folder / "slides" / "mosaic.svs"
        if options.slide is None:
            make_slide(slide, options.gpx)
        model = make("resnet18", folder / "resnet18", mpp=_MPP)
        export_weights(model)
        for overlap in map(float, options.overlaps.split(",")):
            compare(overlap, slide, model, folder, options)


if __name__ == "__main__":
    main()
