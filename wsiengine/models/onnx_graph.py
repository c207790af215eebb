"""An ONNX graph as far as it is needed to cut it: what its operators read and write, and parts of it as models.

Read from the protobuf encoding (numbers from onnx.proto3), without the onnx package. What a part keeps is copied as it
was encoded: operators, weights, versions.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from wsiengine.models.onnx_file import as_bytes, fields, numbers, text

_MODEL_IR, _MODEL_GRAPH, _MODEL_OPSET, _MODEL_FUNCTION = 1, 7, 8, 25
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_TENSOR, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 2, 5, 11, 12, 15
_NODE_INPUT, _NODE_OUTPUT, _NODE_KIND, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 2, 8, 13
_FLOAT16 = 10
_ATTRIBUTE_NAME, _ATTRIBUTE_I, _ATTRIBUTE_INTS = 1, 3, 8
_GRAPHS_INSIDE = (6, 11)  # attributes that are graphs: If, Loop, Scan


@dataclass(frozen=True)
class Node:
    """An operator.

    Attributes:
        kind: ``Conv``, …; with its domain in front where that is not ONNX's own.
        numbers: Attributes that are whole numbers or lists of them.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: Mapping[str, tuple[int, ...]]
    encoded: memoryview


@dataclass(frozen=True)
class Tensor:
    """Weights: their shape and encoding."""

    shape: tuple[int, ...]
    encoded: memoryview


@dataclass
class Graph:
    """Attributes:
    nodes: In an order in which they can run.
    weights: By name.
    inputs: Encoded descriptions of the graph's inputs, by name, without weights.
    plain: It can be cut: all weights are in it, and no operator holds graphs, which may read any tensor.
    """

    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, memoryview] = field(default_factory=dict)
    plain: bool = True
    _versions: bytearray = field(default_factory=bytearray)

    @property
    def half(self) -> bool:
        """Whether it computes with fp16: any of its kernels or matrices is of that type."""
        tensors = (dict(fields(weight.encoded)) for weight in self.weights.values() if len(weight.shape) > 1)
        return any(tensor.get(_TENSOR_TYPE) == _FLOAT16 for tensor in tensors)

    @property
    def makers(self) -> dict[str, Node]:
        """The operator that gives each tensor."""
        return {name: node for node in self.nodes for name in node.outputs}

    def needed(self, outputs: Iterable[str], given: Iterable[str]) -> list[Node]:
        """Operators that ``outputs`` take where the tensors ``given`` are there already."""
        there, wanted, found = set(given), set(outputs), []
        for node in reversed(self.nodes):
            if (wanted - there).intersection(node.outputs):
                found.append(node)
                wanted.update(node.inputs)
        return found[::-1]

    def part(self, inputs: Mapping[str, tuple[int, int] | None], outputs: Iterable[str]) -> bytes:
        """What leads from ``inputs`` to ``outputs``, as a model.

        Args:
            inputs: Number of the type (of TensorProto) and channels of each tensor (1, channels, rows, cols); None for
                an input of the whole graph.
            outputs: Names of tensors, which keep them.
        """
        outputs = list(outputs)
        nodes = self.needed(outputs, inputs)
        names = {name for node in nodes for name in node.inputs}
        graph = bytearray(_field(_GRAPH_NAME, b"part"))
        for node in nodes:
            graph += _field(_GRAPH_NODE, node.encoded)
        for name, tensor in self.weights.items():
            if name in names:
                graph += _field(_GRAPH_TENSOR, tensor.encoded)
        for name, facts in inputs.items():
            graph += _field(_GRAPH_INPUT, self.inputs[name] if facts is None else _described(name, *facts))
        for name in outputs:
            graph += _field(_GRAPH_OUTPUT, _field(1, name.encode()))  # ONNX Runtime finds the type
        return bytes(self._versions) + _field(_MODEL_GRAPH, graph)


def read_graph(encoded: memoryview) -> Graph:
    """The graph of an encoded ModelProto that :func:`wsiengine.models.integrity.check_onnx` has let pass."""
    graph = Graph()
    for number, value in fields(encoded):
        if number == _MODEL_GRAPH:
            _read_into(graph, as_bytes(value))
        elif number == _MODEL_IR and isinstance(value, int):
            graph._versions += _varint(number << 3) + _varint(value)
        elif number in (_MODEL_OPSET, _MODEL_FUNCTION):
            graph._versions += _field(number, as_bytes(value))
    for name in graph.weights:
        graph.inputs.pop(name, None)
    return graph


def _read_into(graph: Graph, encoded: memoryview) -> None:
    for number, value in fields(encoded):
        if number == _GRAPH_NODE:
            graph.nodes.append(_node(as_bytes(value), graph))
        elif number == _GRAPH_TENSOR:
            name, tensor = _tensor(as_bytes(value), graph)
            graph.weights[name] = tensor
        elif number == _GRAPH_INPUT:
            name = next(text(v) for n, v in fields(as_bytes(value)) if n == 1)
            graph.inputs[name] = as_bytes(value)
        graph.plain &= number != _GRAPH_SPARSE


def _node(encoded: memoryview, graph: Graph) -> Node:
    names: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_OUTPUT: [], _NODE_KIND: [], _NODE_DOMAIN: []}
    whole: dict[str, tuple[int, ...]] = {}
    for number, value in fields(encoded):
        if number in names:
            names[number].append(text(value))
        elif number == _NODE_ATTRIBUTE:
            attribute = list(fields(as_bytes(value)))
            name = next(text(v) for n, v in attribute if n == _ATTRIBUTE_NAME)
            whole[name] = tuple(i for n, v in attribute if n in (_ATTRIBUTE_I, _ATTRIBUTE_INTS) for i in numbers(v))
            graph.plain &= not any(n in _GRAPHS_INSIDE for n, _ in attribute)
    kind = ".".join((*(domain for domain in names[_NODE_DOMAIN] if domain not in ("", "ai.onnx")), *names[_NODE_KIND]))
    inputs, outputs = names[_NODE_INPUT], names[_NODE_OUTPUT]
    return Node(kind, tuple(inputs), tuple(outputs), whole, encoded)


def _tensor(encoded: memoryview, graph: Graph) -> tuple[str, Tensor]:
    name, shape = "", []
    for number, value in fields(encoded):
        if number == _TENSOR_DIMS:
            shape += numbers(value)
        elif number == _TENSOR_NAME:
            name = text(value)
        graph.plain &= number != _TENSOR_EXTERNAL
    return name, Tensor(tuple(shape), encoded)


def _described(name: str, kind: int, channels: int) -> bytes:
    """A ValueInfoProto: (1, channels, any, any). Sizes of one are given: ONNX Runtime lays images out by them."""
    one, many = (_field(1, _varint(1 << 3) + _varint(n)) for n in (1, channels))
    shape = one + many + 2 * _field(1, b"")
    tensor = _varint(1 << 3) + _varint(kind) + _field(2, shape)
    return _field(1, name.encode()) + _field(2, _field(1, tensor))


def _field(number: int, content: bytes | bytearray | memoryview) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
