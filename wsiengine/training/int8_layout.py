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
FIRST_TURNED = "first.turned"
"""Those bytes before, where the model itself casts first and transposes later."""
ACTIVATIONS = ("Relu", "Clip")
_SCALING = ("Transpose", "Cast", "Mul", "Div", "Add", "Sub")


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

    A model that does not begin with bytes, scaled by constants and transposed at most once on the way, is returned as
    it is.
    """
    graph = model.graph
    constants = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
    if graph.input[0].type.tensor_type.elem_type != TensorProto.UINT8:
        return model
    chain = _to_first(graph, graph.input[0].name, constants)
    if not chain or sum(node.op_type == "Transpose" for node in chain) > 1:
        return model
    scale, shift = np.ones(3), np.zeros(3)
    for node in chain[:-1]:
        for value in (constants[i].astype(np.float64).reshape(-1) for i in node.input if i in constants):
            by = {"Mul": value, "Div": 1 / value}.get(node.op_type, np.ones(1))
            scale, shift = scale * by, shift * by + {"Add": value, "Sub": -value}.get(node.op_type, 0.0)
    return _with_bytes(model, chain, scale, shift)


def _to_first(graph: onnx.GraphProto, name: str, constants: dict[str, np.ndarray]) -> list[onnx.NodeProto]:
    """The nodes from a value to the first convolution of colours, scaling only on the way; none: empty."""
    for node in graph.node:
        if not node.input or node.input[0] != name:
            continue
        others = [constants.get(other) for other in node.input[1:]]
        if node.op_type == "Conv" and others[0] is not None and others[0].shape[1] == 3:
            return [node]
        if node.op_type in _SCALING and all(other is not None and other.size in (1, 3) for other in others):
            ahead = _to_first(graph, node.output[0], constants)
            if ahead:
                return [node, *ahead]
    return []


def _with_bytes(
    model: onnx.ModelProto, chain: list[onnx.NodeProto], scale: np.ndarray, shift: np.ndarray
) -> onnx.ModelProto:
    """The model with another first convolution; what other nodes take from the chain to it stays."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph, conv = made.graph, chain[-1]
    weights = {w.name: w for w in graph.initializer}
    weight = numpy_helper.to_array(weights[conv.input[1]]).astype(np.float64)
    bias = numpy_helper.to_array(weights[conv.input[2]]).astype(np.float64) if len(conv.input) > 2 else 0.0
    bias = bias + (weight * (shift + CENTRE * scale).reshape(1, 3, 1, 1)).sum(axis=(1, 2, 3))
    weight = weight * scale.reshape(1, 3, 1, 1)
    new = [("first.weight", weight), ("first.bias", bias), ("first.centre", np.float32(CENTRE))]
    graph.initializer.extend(numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in new)
    turned = chain[0].op_type == "Transpose"
    source = chain[0].output[0] if turned else graph.input[0].name
    late = [onnx.NodeProto.FromString(n.SerializeToString()) for n in chain[1:] if n.op_type == "Transpose"]
    for node in late:  # one at most: the bytes are transposed instead
        node.name, node.input[:], node.output[:], source = FIRST_TURNED, [source], [FIRST_TURNED], FIRST_TURNED
    first = [
        *late,
        helper.make_node("Cast", [source], [FIRST_WIDE], to=TensorProto.FLOAT),
        helper.make_node("Sub", [FIRST_WIDE, "first.centre"], [FIRST]),
    ]
    for node in graph.node:
        if node.output[0] == conv.output[0]:
            node.input[:] = [FIRST, "first.weight", "first.bias"]
    kept = list(graph.node)
    for gone in reversed(chain[turned:-1]):
        if not any(gone.output[0] in node.input for node in kept):
            kept = [node for node in kept if node.output[0] != gone.output[0]]
    at = 1 + next(k for k, node in enumerate(kept) if node.output[0] == source) if turned else 0
    del graph.node[:]
    graph.node.extend([*kept[:at], *first, *kept[at:]])
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
