"""A network run over a large image in pieces, part after part (:mod:`wsiengine.models.cutting`).

A piece is run with the margin that its part looks at, of which nothing is kept; at the image's own border there is
none, and the network pads as it does over the image in one piece. Pieces depend on the image's size alone.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from wsiengine.geometry import Box
from wsiengine.models.cutting import PIECE_BYTES, Map, Part
from wsiengine.models.onnx_graph import Graph
from wsiengine.models.packing import aligned

_TYPES = {"float": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "float16": 10, "double": 11}
_TYPES = {f"tensor({name})": number for name, number in _TYPES.items()}  # numbers of TensorProto

_PIECES = 20  # how much of :data:`PIECE_BYTES` a thread takes for the piece at work, measured 14 to 16
_New = Callable[[str, tuple[int, ...], np.dtype], np.ndarray]


class Pieces:
    """The parts of one network, each with its session. Thread-safe.

    Args:
        graph: The whole network.
        parts: As :func:`wsiengine.models.cutting.cut` gives them.
        image: How the network's input lies over the image.
        open_session: Makes a session of an encoded model.
    """

    def __init__(self, graph: Graph, parts: Sequence[Part], image: Map, open_session: Callable[[bytes], Any]) -> None:
        (self._source,) = graph.inputs
        self._image, self._parts = image, parts
        known: dict[str, tuple[int, int] | None] = {self._source: None}
        self._sessions = []
        for part in parts:
            session = open_session(graph.part({name: known[name] for name in part.inputs}, part.outputs))
            known |= {
                given.name: (_TYPES[given.type], _channels(given.shape, part.maps[given.name]))
                for given in session.get_outputs()
            }
            self._sessions.append(session)
        self._memory = _Memory()

    def memory_bytes(self, image_px: int) -> int:
        """What :meth:`run` takes at most in one thread for an image of so many pixels; measured four fifths of it.

        Two maps between parts, the two widest of a part that runs in one piece, and a few pieces.
        """
        widths = {name: lies.width for part in self._parts for name, lies in part.maps.items()}
        between = max(sum(widths.get(name, 0) for name in (*part.inputs, *part.outputs)) for part in self._parts)
        at_once = max((part.width for part in self._parts if not part.side_px), default=0)
        return int(4 * image_px * (between + 2 * at_once)) + _PIECES * PIECE_BYTES

    def run(self, batch: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """The maps ``outputs`` of one image.

        Args:
            batch: (1, …), the network's input; its sides are multiples of the network's stride.
        """
        arrays, maps = {self._source: batch}, {self._source: self._image}
        borrowed: dict[str, np.ndarray] = {}
        y = self._image.y_axis
        whole = Box(0, 0, *batch.shape[y : y + 2])

        def between(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            if name in outputs:
                return np.empty(shape, dtype)
            n_bytes = math.prod(shape) * dtype.itemsize
            borrowed[name] = self._memory.take(n_bytes)
            return borrowed[name][:n_bytes].view(dtype).reshape(shape)

        for index, (part, session) in enumerate(zip(self._parts, self._sessions, strict=True)):
            inputs = {name: (arrays[name], maps[name]) for name in part.inputs}
            arrays |= _run(part, session, inputs, whole, between)
            maps |= part.maps
            later = {name for other in self._parts[index + 1 :] for name in other.inputs}
            for name in borrowed.keys() - later:
                self._memory.give(borrowed.pop(name))
        return [arrays[name] for name in outputs]


def _channels(shape: Sequence[Any], lies: Map) -> int:
    """Of a map that a part gives: what its session knows, or what was followed (weights may have added some)."""
    return shape[1] if lies.y_axis == 2 and len(shape) > 1 and isinstance(shape[1], int) else lies.channels


class _Memory(threading.local):
    """Of the maps between parts, for each thread: used again, since new pages cost more than what is written there."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, n_bytes: int) -> np.ndarray:
        """At least so many bytes."""
        self._free.sort(key=len)
        fitting = [index for index, block in enumerate(self._free) if len(block) >= n_bytes]
        if fitting:
            return self._free.pop(fitting[0])
        self._free = self._free[:-1]  # a larger one takes the place of the largest
        return np.empty(n_bytes, np.uint8)

    def give(self, block: np.ndarray) -> None:
        self._free.append(block)


def _run(
    part: Part, session: Any, inputs: Mapping[str, tuple[np.ndarray, Map]], whole: Box, new: _New
) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for piece in _even(whole, part):
        y, x = max(piece.y0 - part.before_px, 0), max(piece.x0 - part.before_px, 0)
        seen = Box(y, x, piece.y1 + part.after_px, piece.x1 + part.after_px).intersect(whole)
        feeds = {name: _copied(array[_at(seen, lies)]) for name, (array, lies) in inputs.items()}
        for name, output in zip(part.outputs, session.run(part.outputs, feeds), strict=True):
            lies = part.maps[name]
            if name not in found:
                found[name] = new(name, _shape(output, lies, whole), output.dtype)
            found[name][_at(piece, lies)] = output[_at(piece.relative_to(seen), lies)]
    return found


def _even(whole: Box, part: Part) -> Iterator[Box]:
    """Pieces of nearly the same size."""
    if not part.side_px:
        return iter([whole])
    counts = (-(-side // part.side_px) for side in whole.shape)
    steps = (-(-side // (count * part.stride_px)) for side, count in zip(whole.shape, counts, strict=True))
    height, width = (step * part.stride_px for step in steps)
    return whole.pieces(height, width)


def _at(box: Box, lies: Map) -> tuple[slice, ...]:
    """Where the pixels of ``box`` are in a map."""
    rows, cols = (slice(s.start // lies.stride_px, s.stop // lies.stride_px) for s in box.slices)
    return (*[slice(None)] * lies.y_axis, rows, cols)


def _shape(output: np.ndarray, lies: Map, whole: Box) -> tuple[int, ...]:
    shape = list(output.shape)
    shape[lies.y_axis : lies.y_axis + 2] = (side // lies.stride_px for side in whole.shape)
    return tuple(shape)


def _copied(view: np.ndarray) -> np.ndarray:
    copy = aligned(view.shape, view.dtype, zeroed=False)
    copy[...] = view
    return copy
