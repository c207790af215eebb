"""Networks of known shapes with random weights, as ONNX files with their cards: for speed, not for answers.

Pixels go in as uint8 (N, rows, cols, 3); the graph normalises them, as the bundled models' graphs do. Batch norm is
folded away, as an exporter does. Classifiers have their class-activation map.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_CLASSES = 5


class Net:
    """A graph, node by node; ``half``: its numbers are fp16 between the pixels and the outputs."""

    def __init__(self, half: bool = False) -> None:
        self.number = np.dtype(np.float16 if half else np.float32)
        self._random = np.random.default_rng(0)
        self._nodes: list[Any] = []
        self._weights: list[Any] = []

    def add(self, kind: str, inputs: list[str], *, name: str | None = None, **attributes: Any) -> str:
        name = name or f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, values: Any) -> str:
        name = f"w{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def conv(self, x: str, shape: tuple[int, int, int], stride: int = 1, *, group: int = 1) -> str:
        """``shape``: channels in and out, side."""
        ins, outs, side = shape
        fan_in = ins // group * side * side
        weight = self._random.normal(0, math.sqrt(2 / fan_in), (outs, ins // group, side, side)).astype(self.number)
        bias = np.zeros(outs, self.number)
        how = {"kernel_shape": [side] * 2, "strides": [stride] * 2, "pads": [side // 2] * 4, "group": group}
        return self.add("Conv", [x, self.constant(weight), self.constant(bias)], **how)

    def relu(self, x: str) -> str:
        return self.add("Relu", [x])

    def pixels(self) -> str:
        """(N, 3, rows, cols), normalised."""
        kind = helper.np_dtype_to_tensor_dtype(self.number)
        planes = self.add("Transpose", [self.add("Cast", ["tiles"], to=kind)], perm=[0, 3, 1, 2])
        mean = np.array([123.7, 116.3, 103.5], self.number).reshape(1, 3, 1, 1)
        deviation = np.array([58.4, 57.1, 57.4], self.number).reshape(1, 3, 1, 1)
        return self.add("Div", [self.add("Sub", [planes, self.constant(mean)]), self.constant(deviation)])

    def head(self, x: str, wide: int) -> None:
        """Class-activation map and its mean: outputs ``cam`` and ``logits``."""
        cam = self.conv(x, (wide, _CLASSES, 1))
        self.output(cam, "cam")
        self.output(self.add("Flatten", [self.add("GlobalAveragePool", [cam])]), "logits")

    def output(self, x: str, name: str) -> None:
        self.add("Cast", [x], name=name, to=TensorProto.FLOAT)

    def save(self, path: Path, outputs: dict[str, list[Any]]) -> None:
        tiles = helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["n", "h", "w", 3])
        named = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
        graph = helper.make_graph(self._nodes, path.stem, [tiles], named, self._weights)
        opsets = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


def _basic(net: Net, x: str, wide: tuple[int, int, int], stride: int) -> str:
    ins, outs, _ = wide
    straight = x if stride == 1 and ins == outs else net.conv(x, (ins, outs, 1), stride)
    x = net.relu(net.conv(x, (ins, outs, 3), stride))
    return net.relu(net.add("Add", [net.conv(x, (outs, outs, 3)), straight]))


def _bottleneck(net: Net, x: str, wide: tuple[int, int, int], stride: int) -> str:
    ins, outs, narrow = wide
    straight = x if stride == 1 and ins == outs else net.conv(x, (ins, outs, 1), stride)
    x = net.relu(net.conv(x, (ins, narrow, 1)))
    x = net.relu(net.conv(x, (narrow, narrow, 3), stride))
    return net.relu(net.add("Add", [net.conv(x, (narrow, outs, 1)), straight]))


def _resnet(net: Net, block: Callable[..., str], widths: list[int], counts: list[int]) -> None:
    x = net.relu(net.conv(net.pixels(), (3, 64, 7), 2))
    x, ins = net.add("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), 64
    for stage, (outs, count) in enumerate(zip(widths, counts, strict=True)):
        for index in range(count):
            x = block(net, x, (ins, outs, outs // 4), 2 if stage and not index else 1)
            ins = outs
    net.head(x, ins)


def _mobilenet(net: Net) -> None:
    def clip(x: str) -> str:
        return net.add("Clip", [x, low, high])

    low, high = net.constant(net.number.type(0)), net.constant(net.number.type(6))
    x, ins = clip(net.conv(net.pixels(), (3, 32, 3), 2)), 32
    for times, outs, count, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for index in range(count):
            step, wide = (1 if index else stride), ins * times
            y = clip(net.conv(x, (ins, wide, 1))) if times > 1 else x
            y = net.conv(clip(net.conv(y, (wide, wide, 3), step, group=wide)), (wide, outs, 1))
            x, ins = (net.add("Add", [x, y]) if step == 1 and ins == outs else y), outs
    net.head(clip(net.conv(x, (ins, 1280, 1))), 1280)


def _unet(net: Net) -> None:
    """Four levels of 32 to 256 channels; two maps at a quarter of the resolution."""
    x, ins, kept = net.pixels(), 3, []
    for outs in (32, 64, 128, 256):
        x = net.relu(net.conv(net.relu(net.conv(x, (ins, outs, 3), 2)), (outs, outs, 3)))
        kept.append((x, outs))
        ins = outs
    for skip, outs in reversed(kept[1:-1]):
        sizes = net.constant(np.array([1, 1, 2, 2], np.float32))
        x = net.add("Resize", [x, "", sizes], mode="nearest")
        x = net.relu(net.conv(net.add("Concat", [x, skip], axis=1), (ins + outs, outs, 3)))
        ins = outs
    net.output(net.conv(x, (ins, 2, 1)), "map")


_CLASSIFIERS: dict[str, Callable[[Net], None]] = {
    "resnet18": lambda net: _resnet(net, _basic, [64, 128, 256, 512], [2, 2, 2, 2]),
    "resnet50": lambda net: _resnet(net, _bottleneck, [256, 512, 1024, 2048], [3, 4, 6, 3]),
    "mobilenetv2": _mobilenet,
}
NAMES = (*_CLASSIFIERS, "unet")


def make(name: str, folder: Path, *, mpp: float = 0.5, half: bool = False) -> Path:
    """Write a network and its card into ``folder``, for tiles of 224 px (U-Net: 256); ``half``: in fp16."""
    from wsiengine.models.integrity import file_sha256

    folder.mkdir(parents=True, exist_ok=True)
    net, file = Net(half), folder / f"{name}.onnx"
    if name == "unet":
        _unet(net)
        net.save(file, {"map": ["n", 2, "rows", "cols"]})
    else:
        _CLASSIFIERS[name](net)
        net.save(file, {"logits": ["n", _CLASSES], "cam": ["n", _CLASSES, "rows", "cols"]})
    card = _card(name, mpp) | {"resources": [{"file": file.name, "sha256": file_sha256(file)}]}
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
    return folder


def _card(name: str, mpp: float) -> dict[str, Any]:
    side = 256 if name == "unet" else 224
    both = {
        "schema_version": 1,
        "name": name,
        "version": "1.0",
        "input": {"size_px": side, "mpp": mpp, "layout": "NHWC", "dtype": "uint8"},
        "licence": "Apache-2.0",
    }
    if name == "unet":
        return both | {
            "task": "segment",
            "classes": [{"name": "Gland", "colour": [0, 158, 115]}],
            "outputs": {"scores": "map"},
            "activation": "sigmoid",
            "output_stride_px": 4,
            "halo_px": 32,
            "segmentation": {"channels": ["Gland", "contour"], "min_area_um2": 300},
        }
    return both | {
        "task": "classify",
        "classes": [{"name": f"Class {k}", "colour": [40 * k, 90, 255 - 40 * k]} for k in range(_CLASSES)],
        "outputs": {"scores": "logits", "cam": "cam"},
        "activation": "softmax",
        "output_stride_px": 32,
        "dense": {"block_px": 4096, "halo_px": 128, "offset_px": 15.5},
    }


def add_int8(folder: Path, pixels: np.ndarray) -> None:
    """Add int8 to a classifier of :func:`make`, as ``wsiengine quantise`` writes it but without training.

    Args:
        folder: The model's; its card is rewritten.
        pixels: (n, rows, cols, 3) uint8, what the ranges are taken from.
    """
    import onnxruntime
    import torch

    from wsiengine.models.integrity import file_sha256
    from wsiengine.training.int8 import write_int8
    from wsiengine.training.onnx_torch import simplified
    from wsiengine.training.rounding import Rounded

    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    files = [folder / card["resources"][0]["file"], folder / f"{card['name']}.int8.onnx"]
    rounded = Rounded(simplified(files[0]))
    rounded.calibrate([torch.from_numpy(part) for part in np.array_split(pixels, math.ceil(len(pixels) / 8))])
    onnx.save(write_int8(rounded), files[1])
    told = [onnxruntime.InferenceSession(str(file)).run(["logits"], {"tiles": pixels})[0].argmax(1) for file in files]
    agreement = float(np.mean(told[0] == told[1]))
    # Drawn weights have no accuracy that could be lost.
    card["precision"] = {"int8": {"file": files[1].name, "agreement": agreement, "loss_points": 0.0}}
    card["resources"] = [{"file": file.name, "sha256": file_sha256(file)} for file in files]
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
