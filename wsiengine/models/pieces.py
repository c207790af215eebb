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
from wsiengine.models.cutting import Map, Part
from wsiengine.models.onnx_graph import Graph
from wsiengine.models.packing import aligned

_TYPES = {"tensor(float)": 1, "tensor(uint8)": 2, "tensor(int8)": 3, "tensor(float16)": 10}  # of TensorProto


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
        self._memory = _Memory()
        for part in parts:
            session = open_session(graph.part({name: known[name] for name in part.inputs}, part.outputs))
            kinds = {output.name: _TYPES[output.type] for output in session.get_outputs()}
            known |= {name: (kinds[name], part.maps[name].channels) for name in part.outputs}
            self._sessions.append(session)

    def run(self, batch: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """The maps ``outputs`` of one image.

        Args:
            batch: (1, …), the network's input; its sides are multiples of the network's stride.
        """
        arrays, maps = {self._source: batch}, {self._source: self._image}
        y = self._image.y_axis
        whole = Box(0, 0, *batch.shape[y : y + 2])
        for index, (part, session) in enumerate(zip(self._parts, self._sessions, strict=True)):
            new = self._memory.take if index + 1 < len(self._parts) else np.empty
            arrays |= _run(part, session, {name: (arrays[name], maps[name]) for name in part.inputs}, whole, new)
            maps |= part.maps
            later = {name for other in self._parts[index + 1 :] for name in other.inputs}
            for name in arrays.keys() - later - set(outputs):
                self._memory.give(arrays.pop(name))
        return [arrays[name] for name in outputs]


class _Memory(threading.local):
    """Of the maps between parts, of each thread: used again, for the system takes its time to find new pages."""

    def __init__(self) -> None:
        self._lent: dict[int, np.ndarray] = {}
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        n_bytes = math.prod(shape) * dtype.itemsize
        fitting = [block for block in self._free if block.nbytes >= n_bytes]
        block = min(fitting, key=len) if fitting else np.empty(n_bytes, np.uint8)
        self._free = [other for other in self._free if other is not block]
        array = block[:n_bytes].view(dtype).reshape(shape)
        self._lent[id(array)] = block
        return array

    def give(self, array: np.ndarray) -> None:
        """Back what :meth:`take` gave; anything else is left alone."""
        block = self._lent.pop(id(array), None)
        if block is not None:
            self._free.append(block)


def _run(
    part: Part,
    session: Any,
    inputs: Mapping[str, tuple[np.ndarray, Map]],
    whole: Box,
    new: Callable[[tuple[int, ...], np.dtype], np.ndarray],
) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for piece in _even(whole, part):
        seen = Box(
            piece.y0 - part.before_px,
            piece.x0 - part.before_px,
            piece.y1 + part.after_px,
            piece.x1 + part.after_px,
        ).intersect(whole)
        feeds = {name: _copied(array[_at(seen, lies)]) for name, (array, lies) in inputs.items()}
        for name, part_of in zip(part.outputs, session.run(part.outputs, feeds), strict=True):
            lies = part.maps[name]
            if name not in found:
                found[name] = new(_shape(part_of, lies, whole), part_of.dtype)
            found[name][_at(piece, lies)] = part_of[_at(piece.relative_to(seen), lies)]
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


def _shape(part_of: np.ndarray, lies: Map, whole: Box) -> tuple[int, ...]:
    shape = list(part_of.shape)
    shape[lies.y_axis : lies.y_axis + 2] = (side // lies.stride_px for side in whole.shape)
    return tuple(shape)


def _copied(view: np.ndarray) -> np.ndarray:
    copy = aligned(view.shape, view.dtype)
    copy[...] = view
    return copy
