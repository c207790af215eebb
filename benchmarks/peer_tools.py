"""Other tools, each run under the Python of its own environment, with the weights of one ResNet-18.

Nothing is installed here. WSInfer 0.6.1 runs with ``wsinfer zarr<3 tiffslide<3 numcodecs<0.16 openslide-python
openslide-bin``, torch 2.13 for the CPU and torchvision 0.28; TIAToolbox 2.1.3 beside the same two, if it is installed
without its dependencies (it asks for torch below 2.13) and these are added one by one.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MPP, SIDE_PX = 0.5, 224
_MEAN, _DEVIATION = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)

# What runs under a peer's own Python: the network, torchvision if need be, then the peer.
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
_TORCHVISION = """
import re, sys, torch
operators = torch.library.Library("torchvision", "DEF")
while True:  # torchvision's own operators may be missing beside a CPU build of torch; neither tool runs any here
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
"""
_WSINFER = """
import wsinfer_zoo, wsinfer_zoo.client as client
client.load_registry = wsinfer_zoo.load_registry = lambda *a, **k: client.ModelRegistry(models={})  # no download
from wsinfer.cli.cli import cli
cli()
"""
_TIATOOLBOX = """
weights, strides, output, stride, workers, *slides = sys.argv[1:]
stored_strides = [int(s) for s in strides.split(",")]
from tiatoolbox.models.engine.patch_predictor import PatchPredictor
from tiatoolbox.models.models_abc import ModelABC
class Wrapped(Network, ModelABC):
    @staticmethod
    def infer_batch(model, batch, device):
        x = batch.to(device).float().permute(0, 3, 1, 2)
        mean = torch.tensor(MEAN).view(1, 3, 1, 1)
        deviation = torch.tensor(DEVIATION).view(1, 3, 1, 1)
        with torch.inference_mode():
            return torch.softmax(model((x - mean) / deviation), 1).cpu().numpy()
predictor = PatchPredictor(model=Wrapped(weights).eval(), batch_size=32, num_workers=int(workers))
predictor.run(images=slides, patch_mode=False, save_dir=output, patch_input_shape=(224, 224),
              stride_shape=(int(stride), int(stride)), input_resolutions=[{"units": "mpp", "resolution": 0.5}],
              device="cpu", output_type="zarr", overwrite=True)
""".replace("MEAN", str(_MEAN)).replace("DEVIATION", str(_DEVIATION))


@dataclass(frozen=True)
class Peer:
    """A tool, and the Python that has it.

    Attributes:
        name: ``WSInfer``, ``WSInfer --speedup`` or ``TIAToolbox``.
        python: Of its own environment.
    """

    name: str
    python: str

    def prepare(self, model: Path) -> None:
        """Write beside the ONNX file of :func:`benchmarks.networks.make` what the tool needs of the network."""
        if not (model / "weights.npz").exists():
            export_weights(model)
        if self.name == "TIAToolbox":
            (model / "tiatoolbox_runner.py").write_text(_TORCHVISION + _NETWORK + _TIATOOLBOX)
            return
        (model / "wsinfer_runner.py").write_text(_TORCHVISION + _WSINFER)
        (model / "wsinfer.json").write_text(json.dumps(wsinfer_config()))
        if not (model / "network.pt").exists():
            build_torchscript(self.python, model, model / "network.pt")

    def command(self, model: Path, slides: Sequence[Path], output: Path, overlap: float, workers: int) -> list[str]:
        """Its command line. WSInfer takes the folder of the first slide, whatever is there."""
        if self.name == "TIAToolbox":
            how = [model / "weights.npz", _strides(model), output, round(SIDE_PX * (1 - overlap)), workers]
            return [self.python, *map(str, [model / "tiatoolbox_runner.py", *how, *slides])]
        where = ["--wsi-dir", slides[0].parent, "--results-dir", output]
        what = ["--config", model / "wsinfer.json", "--model-path", model / "network.pt"]
        how = ["--num-workers", workers, "--patch-overlap-ratio", overlap, *self.name.split()[1:]]
        return [self.python, *map(str, [model / "wsinfer_runner.py", "run", *where, *what, *how])]


def environment(home: Path) -> dict[str, str]:
    """Of a peer's process: offline, and nothing of this tool's own."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HOME": str(home), "HF_HUB_OFFLINE": "1"}


def tiles_in(folder: Path) -> int:
    """Tiles that a tool's results speak of, all slides together; 0 where it has none."""
    found = 0
    for table in folder.glob("model-outputs-csv/*.csv"):
        found += len(table.read_text().splitlines()) - 1
    for description in folder.glob("*.zarr/predictions/zarr.json"):  # TIAToolbox: a row per patch
        found += int(json.loads(description.read_text())["shape"][0])
    return found


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


def build_torchscript(python: str, model: Path, script: Path) -> None:
    """TorchScript of the weights, made under the peer's own Python."""
    builder = model / "builder.py"
    builder.write_text(_NETWORK + _BUILD)
    subprocess.run([python, str(builder), str(model / "weights.npz"), str(script), _strides(model)], check=True)


def wsinfer_config() -> dict[str, Any]:
    mean, deviation = ([v / 255 for v in values] for values in (_MEAN, _DEVIATION))
    return {
        "spec_version": "1.0",
        "architecture": "resnet18",
        "num_classes": 5,
        "patch_size_pixels": SIDE_PX,
        "spacing_um_px": MPP,
        "class_names": [f"Class {k}" for k in range(5)],
        "transform": [
            {"name": "Resize", "arguments": {"size": SIDE_PX}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": {"mean": mean, "std": deviation}},
        ],
    }
