"""How the maps of a convolutional network lie over its image: strides, channels, and how far a cell looks. Pure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from wsiengine.models.onnx_graph import Graph, Node

CONV, POOLS = "Conv", ("MaxPool", "AveragePool")
_ARITHMETIC = ("Abs", "Add", "BatchNormalization", "Div", "Exp", "Log", "Max", "Min", "Mul", "Neg", "Sqrt", "Sub")
_ACTIVATIONS = ("Clip", "Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "PRelu", "Relu", "Sigmoid", "Softplus", "Tanh")
_CELL_BY_CELL = frozenset((*_ARITHMETIC, *_ACTIVATIONS, "Cast", "DequantizeLinear", "Identity", "QuantizeLinear"))
_KEEPS_SHAPE = ("Cast", "DequantizeLinear", "Identity")
_CHANNELS_FIRST = (0, 3, 1, 2)


@dataclass(frozen=True, slots=True)
class Map:
    """How a tensor lies over the image.

    Attributes:
        stride_px: Pixels along the side of a cell.
        before_px, after_px: How far beyond its own pixels a cell looks, up and left, and down and right.
        channels: Of it.
        y_axis: Which of its axes runs down; the next runs across.
        taps: Multiplications for each of its numbers, in the operator that gives it.
    """

    stride_px: int
    channels: int
    y_axis: int = 2
    before_px: int = 0
    after_px: int = 0
    taps: int = 0

    @property
    def width(self) -> float:
        """Numbers per pixel of the image."""
        return self.channels / self.stride_px**2


def follow(graph: Graph, sources: Mapping[str, Map], nodes: Iterable[Node]) -> dict[str, Map]:
    """Tensors of which each cell comes from the pixels around it, however large the image, and how they lie over it."""
    found = dict(sources)
    weights = {name: tensor.shape for name, tensor in graph.weights.items()}
    for node in nodes:
        read = [name for name in node.inputs if name]
        if node.kind == "Constant" or (read and all(name in weights for name in read)):
            shape = weights[read[0]] if node.kind in _KEEPS_SHAPE else ()
            weights.update(dict.fromkeys(node.outputs, shape))
            continue
        images = [found[name] for name in read if name in found]
        if images and len(images) + sum(name in weights for name in read) == len(read):
            after = _after(node, images, weights)
            found |= {node.outputs[0]: after} if after else {}  # what else a node gives (places of maxima) is no map
    return found


def _after(node: Node, images: list[Map], weights: Mapping[str, tuple[int, ...]]) -> Map | None:
    """The output of ``node``; None where it is not made cell by cell."""
    first = images[0]
    if len({(image.stride_px, image.y_axis) for image in images}) > 1:
        return None
    if node.kind in _CELL_BY_CELL:
        return Map(
            first.stride_px,
            max(image.channels for image in images),
            first.y_axis,
            max(image.before_px for image in images),
            max(image.after_px for image in images),
        )
    if node.kind == "Transpose" and first.y_axis == 1 and node.numbers.get("perm") == _CHANNELS_FIRST:
        return replace(first, y_axis=2, taps=0)
    if first.y_axis != 2 or len(images) > 1:
        return None
    if node.kind == "Squeeze":  # of its only channel: the batch stays
        return replace(first, y_axis=1, taps=0) if first.channels == 1 else None
    if node.kind in POOLS:
        return _windowed(node, first, node.numbers.get("kernel_shape", ()), first.channels)
    if node.kind == CONV and len(shape := weights.get(node.inputs[1], ())) == 4:
        found = _windowed(node, first, shape[2:], shape[0])
        return found and replace(found, taps=math.prod(shape[1:]))
    return None


def _windowed(node: Node, image: Map, kernel: tuple[int, ...], channels: int) -> Map | None:
    """After a convolution or pooling over ``kernel`` (rows, cols)."""
    if len(kernel) != 2 or node.numbers.get("ceil_mode", (0,)) != (0,):
        return None
    strides, dilations = (node.numbers.get(name, (1, 1)) for name in ("strides", "dilations"))
    pads = node.numbers.get("pads", (0, 0, 0, 0))
    if strides[0] != strides[1]:
        return None
    step, before, after = image.stride_px, 0, 0
    for size, dilation, first, last in zip(kernel, dilations, pads[:2], pads[2:], strict=True):
        reach = (size - 1) * dilation + 1
        if not 1 <= reach - first - last <= strides[0]:  # else n cells do not become n / stride, or by `auto_pad`
            return None
        before, after = max(before, first), max(after, reach - first - strides[0])
    return Map(
        step * strides[0], channels, image.y_axis, image.before_px + before * step, image.after_px + after * step
    )
