"""Where a convolutional network can be cut, so that each part of it runs over an image in pieces.

Networks of inverted bottlenecks (MobileNet) widen their maps sixfold inside each step and narrow them again at its end.
Over a large image the wide maps pass through main memory. Cut at the narrow maps, a step runs piece by piece, each with
the few cells around that the step looks at, and caches hold the piece; what is put together is the map in one piece. A
part reaches much less far than the network, so that its margin costs little.

Networks that are as wide outside their steps as inside (ResNet) compute more per byte, so that caches matter little;
but over a large image their early maps take gigabytes. They are cut where all goes through one map, into the parts that
cost least: margins against maps written and read. Their pieces are larger, since such parts reach further.

:mod:`wsiengine.models.pieces` runs what is cut here. Pure.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from wsiengine.models.maps import CONV, POOLS, Map, follow
from wsiengine.models.onnx_graph import Graph, Node

_NARROW = 3  # times as wide as where it is cut must a part be inside; a cut costs a map written and read
PIECE_BYTES = 2 << 20  # of a part's widest map in one piece, as float32
_MOST_MARGIN = 1 / 10  # of a piece's side, both sides together; a part that reaches further has no pieces
WIDE_BYTES = 48 << 20  # as PIECE_BYTES, where a network is as wide outside its steps as inside
_MOST_WIDE_SIDE_PX = 2176  # several pieces to a block, so that threads can share it
_MOST_WIDE_MARGIN = 1 / 3
_COPIED = 400  # multiplications in the time in which a number is written to a map and read again
_IN_ONE_PIECE = 99  # pieces in a row, as which a part without pieces counts: it would take gigabytes
USUAL_SIDE_PX = 4352  # of an image


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
        work: Multiplications per pixel of the image.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    maps: Mapping[str, Map]
    stride_px: int
    before_px: int
    after_px: int
    side_px: int
    width: float
    work: float


def cut(graph: Graph, image: Map, outputs: Sequence[str], side_px: int = USUAL_SIDE_PX) -> list[Part]:
    """The parts of a network, in the order in which they run; none where it cannot be cut.

    Args:
        graph: The network, of one input.
        image: How its input lies over the image: a stride of 1.
        outputs: The maps that are wanted.
        side_px: Of images as they usually come: margins are weighed for them.
    """
    if not graph.plain or len(graph.inputs) != 1:
        return []
    (source,) = graph.inputs
    maps = follow(graph, {source: image}, graph.nodes)
    if any(name not in maps for name in outputs):
        return []
    network = _Network(graph, maps, source, tuple(outputs))
    try:
        parts = _parts(network, _chain(network), PIECE_BYTES)
        if parts and all(part.side_px for part in parts):
            return parts
        return _parts(network, _cheapest(network, side_px), WIDE_BYTES) or parts
    except _GoesAnotherWay:
        return []


class _GoesAnotherWay(Exception):
    """A map that a part should give does not come from what the part is given."""


@dataclass(frozen=True, slots=True)
class _Network:
    graph: Graph
    maps: Mapping[str, Map]
    source: str
    outputs: tuple[str, ...]

    def all_goes_through(self, name: str) -> bool:
        """Whether no convolution before the tensor ``name`` is needed again after it."""
        before = {id(node) for node in self.graph.needed([name], [self.source]) if node.kind == CONV}
        after = {id(node) for node in self.graph.needed(self.outputs, [self.source, name]) if node.kind == CONV}
        return bool(before and after) and not before & after


def _parts(network: _Network, chain: Sequence[str], piece_bytes: int) -> list[Part]:
    """From each tensor of the chain to the next, and what joins on the way; none where there is no cut."""
    source, found = network.source, []
    if len(chain) == 1:
        return []
    for start, ends in zip(chain, [*((name,) for name in chain[1:]), network.outputs], strict=True):
        beside = _beside(network, start, ends)
        if not all(name in network.maps and network.maps[name].y_axis == 2 for name in beside if name != source):
            return []
        for name in beside:
            way = [source, *_first_narrow(network, name), name] if name != source else []
            found += [_part(network, (here,), (there,), piece_bytes) for here, there in pairwise(way)]
        found.append(_part(network, (start, *beside), ends, piece_bytes))
    return found


def _chain(network: _Network) -> list[str]:
    """The network's input, and where it is cut: as few of the narrow maps as keep margins small."""
    chain, narrow = [network.source], _narrow(network)
    for name, following in pairwise(narrow):
        if not _part(network, (chain[-1],), (following,), PIECE_BYTES).side_px:
            chain.append(name)
    return [*chain, *narrow[-1:]]


def _cheapest(network: _Network, side_px: int) -> list[str]:
    """The network's input, and where it is cut so that its parts together cost least."""
    chains: dict[str, tuple[float, list[str]]] = {network.source: (0.0, [network.source])}
    joins = list(_joins(network))
    for name in (*joins, ""):
        ways = []
        for start, (cost, chain) in chains.items():
            ends = (name,) if name else network.outputs
            part = _part(network, (start, *_beside(network, start, ends)), ends, WIDE_BYTES)
            ways.append((cost + _cost(part, network, side_px), [*chain, name]))
        chains[name] = min(ways)
    return chains[""][1][:-1]


def _cost(part: Part, network: _Network, side_px: int) -> float:
    """Of a part over an image, in multiplications per pixel."""
    pieces = -(-side_px // part.side_px) if part.side_px else _IN_ONE_PIECE
    margins = (pieces - 1) * (part.before_px + part.after_px) / side_px
    copied = sum(network.maps[name].width for name in (*part.inputs, *part.outputs)) / 2
    return part.work * (1 + margins) ** 2 + _COPIED * copied


def _joins(network: _Network) -> Iterator[str]:
    """Maps through which all goes, each read by a convolution or pooling."""
    makers = network.graph.makers
    read = {_stored(node.inputs[0], makers) for node in network.graph.nodes if node.kind in (CONV, *POOLS)}
    for node in network.graph.nodes:
        name = node.outputs[0]
        if name in read and name in network.maps and network.all_goes_through(name):
            yield name


def _stored(name: str, makers: Mapping[str, Node]) -> str:
    """Where to cut before a node that reads ``name``: where there are whole numbers, if there are."""
    return makers[name].inputs[0] if name in makers and makers[name].kind == "DequantizeLinear" else name


def _narrow(network: _Network) -> list[str]:
    """Maps through which all goes, a third as wide as what lies between them, and before a convolution that widens."""
    graph, maps = network.graph, network.maps
    widens: dict[str, float] = {}
    for node in graph.nodes:
        if node.kind == CONV and node.outputs[0] in maps:
            read = _stored(node.inputs[0], graph.makers)
            widens[read] = max(widens.get(read, 0), maps[node.outputs[0]].width)
    found, widest = [], 0.0
    for node in graph.nodes:
        name = node.outputs[0]
        if name not in maps:
            continue
        if node.kind == CONV:
            widest = max(widest, maps[name].width)
        fits = maps[name].width * _NARROW <= widest and widens.get(name, 0) >= maps[name].width
        if fits and network.all_goes_through(name):
            found.append(name)
            widest = 0.0
    return found


def _beside(network: _Network, start: str, ends: tuple[str, ...]) -> tuple[str, ...]:
    """Tensors that come from the image alone and join the way from ``start`` to ``ends``."""
    source = network.source
    if start == source:
        return ()
    nodes = network.graph.needed(ends, [source, start])
    on_the_way, from_image = {start}, {source}
    joining: dict[str, None] = {}
    for node in nodes:
        if on_the_way.intersection(node.inputs):
            on_the_way.update(node.outputs)
            joining |= dict.fromkeys(name for name in node.inputs if name in from_image)
        elif from_image.intersection(node.inputs):
            from_image.update(node.outputs)
    return tuple(joining)


def _first_narrow(network: _Network, name: str) -> list[str]:
    """The first narrow map through which all goes from the image to ``name``, if there is one."""
    graph, maps, source = network.graph, network.maps, network.source
    widest = maps[source].width
    for node in graph.needed([name], [source])[:-1]:
        lies = maps.get(node.outputs[0])
        if lies is None:
            continue
        left = graph.needed([name], node.outputs)
        if lies.width * _NARROW <= widest and lies.y_axis == 2 and not any(source in n.inputs for n in left):
            return [node.outputs[0]]
    return []


def _part(network: _Network, inputs: tuple[str, ...], outputs: tuple[str, ...], piece_bytes: int) -> Part:
    graph, maps = network.graph, network.maps
    sources = {name: replace(maps[name], before_px=0, after_px=0, taps=0) for name in inputs}
    within = follow(graph, sources, graph.needed(outputs, inputs))
    if any(name not in within for name in outputs):
        raise _GoesAnotherWay
    stride = math.lcm(*(within[name].stride_px for name in (*outputs, *inputs)))
    before, after = (
        -(-max(getattr(within[name], reach) for name in outputs) // stride) * stride
        for reach in ("before_px", "after_px")
    )
    widest = max(image.width for image in within.values())
    wide = piece_bytes == WIDE_BYTES
    side = int(math.sqrt(piece_bytes / (4 * widest)))
    side = (min(side, _MOST_WIDE_SIDE_PX) if wide else side) // stride * stride
    if before + after > side * (_MOST_WIDE_MARGIN if wide else _MOST_MARGIN):
        side = 0
    work = sum(image.width * image.taps for image in within.values())
    return Part(inputs, outputs, {name: maps[name] for name in outputs}, stride, before, after, side, widest, work)
