"""Where a convolutional network can be cut, so that each part of it runs over an image in pieces that caches hold.

Networks of inverted bottlenecks (MobileNet) widen their maps sixfold inside each step and narrow them again at its end.
Over a large image the wide maps pass through main memory. Cut at the narrow maps, a step runs piece by piece, each with
the few cells around that the step looks at; what is put together is the map in one piece. A part reaches much less far
than the network, so that its margin costs little. :mod:`wsiengine.models.pieces` runs what is cut here. Pure.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from wsiengine.models.onnx_graph import Graph, Node

_NARROW = 3  # times as wide as where it is cut must a part be inside; a cut costs a map written and read
PIECE_BYTES = 2 << 20  # of a part's widest map in one piece, as float32
_MOST_MARGIN = 1 / 10  # of a piece's side, both sides together; a part that reaches further runs in one piece

_CONV, _POOLS = "Conv", ("MaxPool", "AveragePool")
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
    """

    stride_px: int
    channels: int
    y_axis: int = 2
    before_px: int = 0
    after_px: int = 0

    @property
    def width(self) -> float:
        """Numbers per pixel of the image."""
        return self.channels / self.stride_px**2


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a network.

    Attributes:
        inputs: Of the network, or outputs of parts before it.
        outputs: What it computes.
        maps: How each of them lies over the image.
        stride_px: Pieces and their margins are multiples of it.
        before_px, after_px: What a piece needs around itself, up and left, and down and right.
        side_px: Of a piece, at most; 0 where the part runs in one piece.
        width: Numbers per pixel of the image, of its widest map.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    maps: Mapping[str, Map]
    stride_px: int
    before_px: int
    after_px: int
    side_px: int
    width: float


def cut(graph: Graph, image: Map, outputs: Sequence[str]) -> list[Part]:
    """The parts of a network, in the order in which they run; none where it cannot be cut.

    Args:
        graph: The network, of one input.
        image: How its input lies over the image: a stride of 1.
        outputs: The maps that are wanted.
    """
    if not graph.plain or len(graph.inputs) != 1:
        return []
    (source,) = graph.inputs
    maps = follow(graph, {source: image}, graph.nodes)
    if any(name not in maps for name in outputs):
        return []
    try:
        return _cut(graph, maps, outputs)
    except _GoesAnotherWay:
        return []


class _GoesAnotherWay(Exception):
    """A map that a part should give does not come from what the part is given."""


def _cut(graph: Graph, maps: Mapping[str, Map], outputs: Sequence[str]) -> list[Part]:
    (source,) = graph.inputs
    chain = _chain(graph, maps, _narrow(graph, maps, source, outputs))
    if len(chain) == 1:
        return []
    parts: list[Part] = []
    for start, ends in zip(chain, [*((name,) for name in chain[1:]), tuple(outputs)], strict=True):
        beside = _beside(graph, source, start, ends)
        if not all(name in maps and maps[name].y_axis == 2 for name in beside if name != source):
            return []
        for name in beside:
            way = [source, *_first_narrow(graph, maps, source, name), name] if name != source else []
            parts += [_part(graph, maps, (here,), (there,)) for here, there in pairwise(way)]
        parts.append(_part(graph, maps, (start, *beside), ends))
    return parts


def _chain(graph: Graph, maps: Mapping[str, Map], narrow: Sequence[str]) -> list[str]:
    """The network's input, and where it is cut: as few of the ``narrow`` maps as keep margins small."""
    (source,) = graph.inputs
    chain = [source]
    for name, following in pairwise(narrow):
        if not _part(graph, maps, (chain[-1],), (following,)).side_px:
            chain.append(name)
    return [*chain, *narrow[-1:]]


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
        return replace(first, y_axis=2)
    if first.y_axis != 2 or len(images) > 1:
        return None
    if node.kind == "Squeeze":  # of its only channel: the batch stays
        return replace(first, y_axis=1) if first.channels == 1 else None
    if node.kind in _POOLS:
        return _windowed(node, first, node.numbers.get("kernel_shape", ()), first.channels)
    if node.kind == _CONV and len(shape := weights.get(node.inputs[1], ())) == 4:
        return _windowed(node, first, shape[2:], shape[0])
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


def _narrow(graph: Graph, maps: Mapping[str, Map], source: str, outputs: Sequence[str]) -> list[str]:
    """Maps through which all goes, a third as wide as what lies between them, and before a convolution that widens."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    widens: dict[str, float] = {}
    for node in graph.nodes:
        if node.kind == _CONV and node.outputs[0] in maps:
            read = node.inputs[0]
            if read in makers and makers[read].kind == "DequantizeLinear":  # cut where there are whole numbers
                read = makers[read].inputs[0]
            widens[read] = max(widens.get(read, 0), maps[node.outputs[0]].width)
    found, widest = [], 0.0
    for node in graph.nodes:
        name = node.outputs[0]
        if name not in maps:
            continue
        if node.kind == _CONV:
            widest = max(widest, maps[name].width)
        fits = maps[name].width * _NARROW <= widest and widens.get(name, 0) >= maps[name].width
        if fits and _all_goes_through(graph, source, name, outputs):
            found.append(name)
            widest = 0.0
    return found


def _all_goes_through(graph: Graph, source: str, name: str, outputs: Sequence[str]) -> bool:
    """Whether no convolution before the tensor ``name`` is needed again after it."""
    before = {id(node) for node in graph.needed([name], [source]) if node.kind == _CONV}
    after = {id(node) for node in graph.needed(outputs, [source, name]) if node.kind == _CONV}
    return bool(before and after) and not before & after


def _beside(graph: Graph, source: str, start: str, ends: tuple[str, ...]) -> tuple[str, ...]:
    """Tensors that come from the image alone and join the way from ``start`` to ``ends``."""
    if start == source:
        return ()
    nodes = graph.needed(ends, [source, start])
    on_the_way, from_image = {start}, {source}
    joining: dict[str, None] = {}
    for node in nodes:
        if on_the_way.intersection(node.inputs):
            on_the_way.update(node.outputs)
            joining |= dict.fromkeys(name for name in node.inputs if name in from_image)
        elif from_image.intersection(node.inputs):
            from_image.update(node.outputs)
    return tuple(joining)


def _first_narrow(graph: Graph, maps: Mapping[str, Map], source: str, name: str) -> list[str]:
    """The first narrow map through which all goes from the image to ``name``, if there is one."""
    widest = maps[source].width
    for node in graph.needed([name], [source])[:-1]:
        lies = maps.get(node.outputs[0])
        if lies is None:
            continue
        left = graph.needed([name], node.outputs)
        if lies.width * _NARROW <= widest and lies.y_axis == 2 and not any(source in n.inputs for n in left):
            return [node.outputs[0]]
    return []


def _part(graph: Graph, maps: Mapping[str, Map], inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Part:
    sources = {name: replace(maps[name], before_px=0, after_px=0) for name in inputs}
    within = follow(graph, sources, graph.needed(outputs, inputs))
    if any(name not in within for name in outputs):
        raise _GoesAnotherWay
    stride = math.lcm(*(within[name].stride_px for name in (*outputs, *inputs)))
    before, after = (
        -(-max(getattr(within[name], reach) for name in outputs) // stride) * stride
        for reach in ("before_px", "after_px")
    )
    widest = max(image.width for image in within.values())
    side = int(math.sqrt(PIECE_BYTES / (4 * widest))) // stride * stride
    if before + after > side * _MOST_MARGIN:
        side = 0
    return Part(inputs, outputs, {name: maps[name] for name in outputs}, stride, before, after, side, widest)
