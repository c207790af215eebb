"""From a trained network to one ONNX file: uint8 tiles in; scores, epithelium and activation map out.

The graph is written node by node, so that it holds exactly what is needed: float16 weights that are widened when the
file is loaded (arithmetic stays float32), the normalisation of pixels, and borders as the network was trained with.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from wsiengine.training.cells import CellNet
from wsiengine.training.mobilenet import ConvUnit, InvertedResidual

_OPSET, _IR = 17, 8


class _Graph:
    """Nodes and weights, in the order in which they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def half(self, name: str, value: np.ndarray) -> str:
        """A float16 value, widened to float32 when the file is loaded."""
        stored = self.constant(f"{name}.half", value)
        return self.node("Cast", [stored], name, to=TensorProto.FLOAT)

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def convolution(self, name: str, value: str, weight: np.ndarray, bias: np.ndarray, **attributes: Any) -> str:
        """Weights as they are given; the bias is float32: it is small and its error would be systematic."""
        store = self.half if weight.dtype == np.float16 else self.constant
        inputs = [value, store(f"{name}.weight", weight), self.constant(f"{name}.bias", bias.astype(np.float32))]
        return self.node("Conv", inputs, name, **attributes)


def export_onnx(network: CellNet, path: Path, *, rows: tuple[tuple[int, float], ...], temperature: float = 1.0) -> None:
    """Write the network as ONNX.

    Input ``tiles``: uint8 RGB (N, H, W, 3), H and W multiples of 32. Outputs, float32: ``logits`` (N, classes),
    ``epithelium`` (N,), the covered fraction; ``cam`` (N, classes, H/32, W/32), whose mean over cells is ``logits``;
    ``epithelium_map`` (N, H/32, W/32), whose mean is ``epithelium``.

    Args:
        network: What was trained.
        path: Where to.
        rows: For every class of the file, the trained class that it is read from and a constant added to its logit.
        temperature: Divides the trained logits (Guo et al. 2017).
    """
    graph = _Graph()
    low, high = graph.constant("zero", np.float32(0)), graph.constant("six", np.float32(6))
    planar = graph.node("Transpose", ["tiles"], "planar", perm=[0, 3, 1, 2])
    wide = graph.node("Cast", [planar], "wide", to=TensorProto.FLOAT)
    scaled = graph.node("Mul", [wide, graph.constant("scale", np.float32(1 / 127.5))], "scaled")
    value = graph.node("Sub", [scaled, graph.constant("one", np.float32(1))], "pixels")
    for i, block in enumerate(network.backbone.blocks):
        value = _block(graph, f"b{i}", value, block, (low, high))
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
    onnx.save(_model(graph, len(rows)), path)


def widened(network: CellNet) -> CellNet:
    """A copy whose backbone weights went through float16, as a file's do: what its scores must equal."""
    copy = type(network)(network.head.out_channels, network.width)
    copy.load_state_dict(network.state_dict())
    with torch.no_grad():
        for module in copy.backbone.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.copy_(module.weight.half().float())
    return copy.eval()


def _block(graph: _Graph, name: str, value: str, block: torch.nn.Module, clip: tuple[str, str]) -> str:
    if isinstance(block, ConvUnit):
        return _unit(graph, name, value, block, clip)
    assert isinstance(block, InvertedResidual)
    inside = value
    for j, unit in enumerate(block.units):
        assert isinstance(unit, ConvUnit)
        inside = _unit(graph, f"{name}.{j}", inside, unit, clip)
    return graph.node("Add", [value, inside], f"{name}.sum") if block.residual else inside


def _unit(graph: _Graph, name: str, value: str, unit: ConvUnit, clip: tuple[str, str]) -> str:
    left, right, top, bottom = unit.border
    conv = unit.conv
    output = graph.convolution(
        name,
        value,
        _numpy(conv.weight).astype(np.float16),
        _numpy(conv.bias),
        pads=[top, left, bottom, right],
        strides=list(conv.stride),
        kernel_shape=list(conv.kernel_size),
        group=conv.groups,
    )
    return graph.node("Clip", [output, *clip], f"{name}.clipped") if unit.clipped else output


def _model(graph: _Graph, classes: int) -> onnx.ModelProto:
    def tensor(name: str, shape: list[str | int], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    made = helper.make_graph(
        graph.nodes,
        "cells",
        [tensor("tiles", ["N", "H", "W", 3], TensorProto.UINT8)],
        [
            tensor("logits", ["N", classes]),
            tensor("epithelium", ["N"]),
            tensor("cam", ["N", classes, "h", "w"]),
            tensor("epithelium_map", ["N", "h", "w"]),
        ],
        graph.weights,
    )
    opset = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(made, opset_imports=opset, ir_version=_IR, producer_name="wsiengine")
    onnx.checker.check_model(model, full_check=True)
    return model


def _numpy(value: torch.Tensor | None) -> np.ndarray:
    assert value is not None
    return value.detach().numpy()
