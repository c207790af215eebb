"""From a trained network to one ONNX file: uint8 tiles in; scores, epithelium and activation map out.

Weights may be stored as float16 and are widened when the file is loaded; arithmetic stays float32. Pixels are
normalised in the graph, and borders are those that the network was trained with.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto

from wsiengine.training.cells import CellNet
from wsiengine.training.onnx_graph import Graph, tensor


def export_onnx(
    network: CellNet,
    path: Path,
    *,
    rows: tuple[tuple[int, float], ...],
    temperature: float = 1.0,
    half: bool = True,
) -> None:
    """Write the network as ONNX.

    Input ``tiles``: uint8 RGB (N, H, W, 3), H and W multiples of 32. Outputs, float32: ``logits`` (N, classes),
    ``epithelium`` (N,), the covered fraction; ``cam`` (N, classes, H/32, W/32), whose mean over cells is ``logits``;
    ``epithelium_map`` (N, H/32, W/32), whose mean is ``epithelium``.

    Args:
        network: What was trained.
        path: Where to.
        rows: For every class of the file, the trained class that it is read from and a constant added to its logit.
        temperature: Divides the trained logits (Guo et al. 2017).
        half: Whether the backbone's weights are stored as float16: half the size; then the file equals
            :func:`widened`, else the network itself.
    """
    graph = Graph()
    backbone = network.backbone
    planar = graph.node("Transpose", ["tiles"], "planar", perm=[0, 3, 1, 2])
    (value,) = graph.module("b", lambda x: backbone.pyramid(backbone.prepare(x), (32,)), backbone, planar, half=half)
    gate = graph.convolution("gate", value, _numpy(network.gate.weight), _numpy(network.gate.bias))
    covered = graph.node("Sigmoid", [gate], "covered")
    trained = [row for row, _ in rows]
    weight, bias = (_numpy(p)[trained] / np.float32(temperature) for p in (network.head.weight, network.head.bias))
    spoken = graph.node("Mul", [graph.convolution("evidence", value, weight, bias), covered], "spoken")
    added = np.array([add for _, add in rows], np.float32).reshape(-1, 1, 1)
    cam = graph.node("Add", [spoken, graph.constant("added", added)], "cam")
    graph.node("ReduceMean", [cam], "logits", axes=[2, 3], keepdims=0)
    graph.node("ReduceMean", [covered], "epithelium", axes=[1, 2, 3], keepdims=0)
    graph.node("Squeeze", [covered, graph.constant("channel", np.array([1]))], "epithelium_map")
    outputs: dict[str, list[str | int]] = {
        "logits": ["N", len(rows)],
        "epithelium": ["N"],
        "cam": ["N", len(rows), "h", "w"],
        "epithelium_map": ["N", "h", "w"],
    }
    tiles = tensor("tiles", ["N", "H", "W", 3], TensorProto.UINT8)
    onnx.save(graph.model([tiles], [tensor(name, shape) for name, shape in outputs.items()]), path)


def widened(network: CellNet) -> CellNet:
    """A copy whose backbone weights went through float16, as a file's do: what its scores must equal.

    Only for backbones without batch normalisation, whose folding comes before the rounding.
    """
    copy = type(network)(network.head.out_channels, network.width, backbone=network.kind)
    copy.load_state_dict(network.state_dict())
    with torch.no_grad():
        for module in copy.backbone.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.copy_(module.weight.half().float())
    return copy.eval()


def _numpy(value: torch.Tensor | None) -> np.ndarray:
    assert value is not None
    return value.detach().numpy()
