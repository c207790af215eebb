"""Writes a rounded network as ONNX with integers in it, and any network in float16."""

import re
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from wsiengine.training.int8_layout import ACTIVATIONS, FIRST, FIRST_WIDE
from wsiengine.training.onnx_torch import attributes
from wsiengine.training.rounding import WEIGHT_MOST, Rounded, weight_scale


def write_int8(rounded: Rounded) -> onnx.ModelProto:
    """The rounded network as ONNX: integers between pairs of QuantizeLinear and DequantizeLinear.

    Activations that the range itself carries out (nothing below 0, nothing above its top) are left out.
    """
    writer = _Writer(rounded)
    for index, node in enumerate(rounded.model.graph.node):
        writer.add(index, node)
    return writer.model()


class _Writer:
    """Copies a graph, with integers where the layout says so."""

    def __init__(self, rounded: Rounded) -> None:
        self._rounded = rounded
        self._source = rounded.model.graph
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}
        self._constants = {w.name: w for w in self._source.initializer}
        self._named: dict[str, str] = {}  # value of the source → value here
        # Weights are called w and b and a number here, unless the source has such names itself.
        taken = {*self._constants, *(name for node in self._source.node for name in node.output)}
        self._prefix = "int8." if any(re.fullmatch(r"[wb]\d+", name) for name in taken) else ""

    def add(self, index: int, node: onnx.NodeProto) -> None:
        if node.output[0] in (FIRST_WIDE, FIRST):  # bytes stay bytes
            if node.output[0] == FIRST:
                bytes_in = self._node_of(FIRST_WIDE).input[0]
                self._named[FIRST] = self._dequantised(FIRST, bytes_in)
            return
        inputs = [self._named.get(name, name) for name in node.input]
        for name in node.input:
            if name and name in self._constants and index not in self._rounded.layout.convolutions:
                self._weights[name] = self._constants[name]
            if name in self._rounded.layout.values and name not in self._named:  # a value that no node here made
                inputs[list(node.input).index(name)] = self._pair(name, name)
        if index in self._rounded.layout.convolutions:
            inputs = [inputs[0], *self._rounded_weights(index, node)]
        elif f"weight_{index}" in dict(self._rounded.network.named_parameters()):
            inputs = [inputs[0], *self._trained_weights(index)]
        if node.op_type in ACTIVATIONS and self._carried_out(node):
            self._nodes[-1].output[0] = node.output[0] if inputs[0] == self._nodes[-1].output[0] else inputs[0]
            made = self._nodes[-1].output[0]
        else:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = inputs
            self._nodes.append(copy)
            if node.op_type == "Conv" and index not in self._rounded.layout.convolutions:
                self._shield(copy)
            made = node.output[0]
        if node.output[0] in self._rounded.layout.values:
            self._pair(node.output[0], made)

    def _node_of(self, value: str) -> onnx.NodeProto:
        return next(n for n in self._source.node if n.output[0] == value)

    def _carried_out(self, node: onnx.NodeProto) -> bool:
        """Whether the range of an activation's output does what the activation does, right after its producer."""
        found = self._rounded.ranges.get(node.output[0])
        if found is None or found.zero != 0 or not self._nodes or self._nodes[-1].output[0] != node.input[0]:
            return False
        if node.op_type == "Relu":
            return True
        low, high = (numpy_helper.to_array(self._constants[n]) for n in node.input[1:3])
        return float(low) == 0.0 and found.high <= float(high) * (1 + 1e-6)

    def _pair(self, name: str, made: str) -> str:
        """QuantizeLinear and DequantizeLinear after a value."""
        scale, zero = self._range(name)
        self._nodes.append(helper.make_node("QuantizeLinear", [made, scale, zero], [f"{name}.q"]))
        self._named[name] = self._dequantised(name, f"{name}.q")
        return self._named[name]

    def _dequantised(self, name: str, source: str) -> str:
        scale, zero = self._range(name)
        self._nodes.append(helper.make_node("DequantizeLinear", [source, scale, zero], [f"{name}.dq"]))
        return f"{name}.dq"

    def _range(self, name: str) -> tuple[str, str]:
        found = self._rounded.ranges[name]
        return (
            self._constant(f"{name}.scale", np.float32(found.scale)),
            self._constant(f"{name}.zero", np.uint8(found.zero)),
        )

    def _rounded_weights(self, index: int, node: onnx.NodeProto) -> list[str]:
        weight, bias = self._rounded.network.convolution(index)
        scale = weight_scale(weight.detach())
        whole = torch.fake_quantize_per_channel_affine(
            weight.detach(), scale, torch.zeros(len(scale), dtype=torch.int32), 0, -WEIGHT_MOST, WEIGHT_MOST
        )
        steps = (whole / scale.reshape(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8).numpy()
        of_input = self._rounded.ranges[node.input[0]].scale
        bias_scale = (scale.double() * of_input).float()
        whole_bias = (bias.detach().double() / bias_scale.double()).round().clamp(-(2**30), 2**30).to(torch.int32)
        out = []
        weight_name, bias_name = self._weight_names(index)
        for name, value, its in ((weight_name, steps, scale), (bias_name, whole_bias.numpy(), bias_scale)):
            stored = self._constant(f"{name}.int", value)
            by = self._constant(f"{name}.scale", its.numpy())
            zero = self._constant(f"{name}.zero", np.zeros(len(its), value.dtype))
            self._nodes.append(helper.make_node("DequantizeLinear", [stored, by, zero], [name], axis=0))
            out.append(name)
        return out

    def _trained_weights(self, index: int) -> list[str]:
        """Weights as they are."""
        named = zip(self._weight_names(index), self._rounded.network.convolution(index), strict=True)
        return [self._constant(name, value.detach().numpy()) for name, value in named]

    def _weight_names(self, index: int) -> tuple[str, str]:
        return f"{self._prefix}w{index}", f"{self._prefix}b{index}"

    def _shield(self, conv: onnx.NodeProto) -> None:
        """A maximum that changes nothing, after a plain convolution: right before integers ONNX Runtime rounds its
        weights to 8 bits by itself (seen with 1.31)."""
        after = [n for n in self._source.node if conv.output[0] in n.input and n.op_type in ACTIVATIONS]
        if {conv.output[0], *(n.output[0] for n in after)} & self._rounded.layout.values:
            name = conv.output[0]
            conv.output[0] = f"{name}.plain"
            least = self._constant("least", np.float32(np.finfo(np.float32).min))
            self._nodes.append(helper.make_node("Max", [conv.output[0], least], [name]))

    def _constant(self, name: str, value: Any) -> str:
        self._weights[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def model(self) -> onnx.ModelProto:
        graph = self._source
        used = {name for node in self._nodes for name in node.input}
        weights = [w for w in self._weights.values() if w.name in used]
        made = helper.make_graph(self._nodes, "int8", graph.input, graph.output, weights)
        opsets = [helper.make_opsetid("", next(o.version for o in self._rounded.model.opset_import if not o.domain))]
        model = helper.make_model(made, opset_imports=opsets, ir_version=8, producer_name="wsiengine")
        onnx.checker.check_model(model, full_check=True)
        return model


def write_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network in float16 throughout, outputs float32 again: for GPUs."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    for weight in graph.initializer:
        value = numpy_helper.to_array(weight)
        if value.dtype == np.float32:
            weight.CopyFrom(numpy_helper.from_array(value.astype(np.float16), weight.name))
    for node in graph.node:
        if node.op_type == "Cast" and attributes(node)["to"] == TensorProto.FLOAT:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT16))
    names = {out.name for out in graph.output}
    for node in graph.node:
        for field_ in (node.input, node.output):
            field_[:] = [f"{n}.half" if n in names else n for n in field_]
    graph.node.extend(
        helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT) for name in sorted(names)
    )
    del graph.value_info[:]
    version = next(opset.version for opset in model.opset_import if not opset.domain)
    del made.opset_import[:]
    made.opset_import.append(helper.make_opsetid("", version))
    onnx.checker.check_model(made, full_check=True)
    return made
