"""Which numbers of a network become 8 bits wide: every convolution but the last ones, and the values between them."""

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from wsiengine.errors import ModelError

CENTRE = 128
FIRST = "first.input"
"""The value that the first convolution takes, where it takes bytes less 128."""
FIRST_WIDE = "first.wide"
"""Those bytes as numbers."""
ACTIVATIONS = ("Relu", "Clip")


@dataclass
class Layout:
    """Which values are written in 8 bits, and by which nodes.

    Attributes:
        convolutions: Indices of the nodes whose weights are rounded.
        values: Names of the values that are rounded.
        alias: A value that has the range of another (maxima).
    """

    convolutions: set[int] = field(default_factory=set)
    values: set[str] = field(default_factory=set)
    alias: dict[str, str] = field(default_factory=dict)


def centred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network, whose first convolution takes bytes less 128: what scaled the pixels moves into its weights.

    A model that does not begin with (transposed) bytes, scaled by constants, is returned as it is.
    """
    graph = model.graph
    constants = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
    takes = {name: [n for n in graph.node if name in n.input] for n in graph.node for name in n.input}
    if graph.input[0].type.tensor_type.elem_type != TensorProto.UINT8:
        return model
    name, scale, shift, chain = graph.input[0].name, np.ones(1), np.zeros(1), []
    while len(takes.get(name, [])) == 1 and takes[name][0].op_type != "Conv":
        node = takes[name][0]
        other = [constants[i].astype(np.float64) for i in node.input if i in constants]
        if node.op_type not in ("Transpose", "Cast", "Mul", "Add", "Sub", "Div") or (node.input[0] != name):
            return model
        if other:
            value = other[0].reshape(-1) if other[0].size in (1, 3) else None
            if value is None:
                return model
            scale = scale * value if node.op_type == "Mul" else scale / value if node.op_type == "Div" else scale
            shift = shift * value if node.op_type == "Mul" else shift / value if node.op_type == "Div" else shift
            shift = shift + value if node.op_type == "Add" else shift - value if node.op_type == "Sub" else shift
        chain.append(node)
        name = node.output[0]
    if len(takes.get(name, [])) != 1 or not chain:
        return model
    return _with_bytes(model, takes[name][0], chain, np.broadcast_to(scale, 3), np.broadcast_to(shift, 3))


def _with_bytes(
    model: onnx.ModelProto, conv: onnx.NodeProto, chain: list[onnx.NodeProto], scale: np.ndarray, shift: np.ndarray
) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    weights = {w.name: w for w in graph.initializer}
    weight = numpy_helper.to_array(weights[conv.input[1]]).astype(np.float64)
    bias = numpy_helper.to_array(weights[conv.input[2]]).astype(np.float64) if len(conv.input) > 2 else 0.0
    bias = bias + (weight * (shift + CENTRE * scale).reshape(1, 3, 1, 1)).sum(axis=(1, 2, 3))
    weight = weight * scale.reshape(1, 3, 1, 1)
    new = [("first.weight", weight), ("first.bias", bias), ("first.centre", np.float32(CENTRE))]
    graph.initializer.extend(numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in new)
    swap = [n for n in chain if n.op_type == "Transpose"]
    source = swap[0].output[0] if swap else graph.input[0].name
    begin = [
        *swap,
        helper.make_node("Cast", [source], [FIRST_WIDE], to=TensorProto.FLOAT),
        helper.make_node("Sub", [FIRST_WIDE, "first.centre"], [FIRST]),
    ]
    if swap:
        swap[0].input[0] = graph.input[0].name
    gone = {n.output[0] for n in chain}
    rest = [n for n in graph.node if n.output[0] not in gone]
    for node in rest:
        if node.output[0] == conv.output[0]:
            node.input[:] = [FIRST, "first.weight", "first.bias"]
    del graph.node[:]
    graph.node.extend([*begin, *rest])
    return made


def lay_out(model: onnx.ModelProto) -> Layout:
    """Decide what is rounded: every convolution but the last ones, and the values between them.

    Raises:
        ModelError: There is no convolution to round.
    """
    nodes = model.graph.node
    constants = {w.name for w in model.graph.initializer}
    takes: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            takes.setdefault(name, []).append(node)
    last = _last_convolutions(model)
    found = Layout()
    for index, node in enumerate(nodes):
        value = _activated(node, takes)
        inside = [n for n in node.input if n and n not in constants]
        if node.op_type == "Conv" and index not in last and node.input[1] in constants:
            found.convolutions.add(index)
            found.values |= {node.input[0], value}
        elif node.op_type in ("Add", "Concat") and len(inside) == len(node.input) and set(inside) <= found.values:
            found.values.add(value)
        elif node.op_type in ("MaxPool", "AveragePool") and inside[0] in found.values:
            found.values.add(node.output[0])
            if node.op_type == "MaxPool":
                found.alias[node.output[0]] = inside[0]
    if not found.convolutions:
        raise ModelError("the network has no convolutions that could be int8")
    return found


def _activated(node: onnx.NodeProto, takes: dict[str, list[onnx.NodeProto]]) -> str:
    """A node's output, or that of the activation that alone follows it."""
    after = takes.get(node.output[0], [])
    return after[0].output[0] if len(after) == 1 and after[0].op_type in ACTIVATIONS else node.output[0]


def _last_convolutions(model: onnx.ModelProto) -> set[int]:
    """Convolutions that no other one follows."""
    leads = {out.name: False for out in model.graph.output}  # value → whether a convolution lies ahead
    last = set()
    for index in range(len(model.graph.node) - 1, -1, -1):
        node = model.graph.node[index]
        ahead = any(leads.get(name, False) for name in node.output)
        if node.op_type == "Conv" and not ahead:
            last.add(index)
        for name in node.input:
            leads[name] = leads.get(name, False) or ahead or node.op_type == "Conv"
    return last
