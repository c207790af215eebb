"""A network run over a large image in pieces, part after part (:mod:`wsiengine.models.cutting`).

A piece is run with the margin that its part looks at, of which nothing is kept; at the image's own border there is
none, and the network pads as it does over the image in one piece. Pieces depend on the image's size and on the cells
that are wanted of it alone: each part computes what lies within reach of a wanted cell; beyond, its maps are zero.
Threads without work of their own take pieces of others (:mod:`wsiengine.models.team`).
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from wsiengine.errors import IntegrityError
from wsiengine.geometry import Box
from wsiengine.models.card import Card
from wsiengine.models.cutting import PIECE_BYTES, USUAL_SIDE_PX, WIDE_BYTES, Part, cut
from wsiengine.models.maps import Map
from wsiengine.models.onnx_graph import Graph, read_graph
from wsiengine.models.packing import ALIGN_BYTES, aligned
from wsiengine.models.team import Team

_TYPES = {"float": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "float16": 10, "double": 11}
_TYPES = {f"tensor({name})": number for name, number in _TYPES.items()}  # numbers of TensorProto

_PIECES = 20  # how much of :data:`PIECE_BYTES` a thread takes for the piece at work, measured 14 to 16
_WIDE_PIECES = 5  # the same of :data:`WIDE_BYTES`, measured 4.3
_OWN_PIECES = 4  # of its widest map, what a part takes whose session shares no memory with others, measured 3.8
_UNCUT_SIDE_PX = 1024  # of an image, at which a part is looked at that has no pieces
_New = Callable[[str, tuple[int, ...], np.dtype], np.ndarray]
_Reach = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """A network in parts.

    Attributes:
        graph: The whole of it.
        parts: As :func:`wsiengine.models.cutting.cut` gives them.
        image: How its input lies over the image.
    """

    graph: Graph
    parts: Sequence[Part]
    image: Map

    def usual_shapes(self, part: Part, inputs: Sequence[tuple]) -> dict[str, tuple[int, ...]]:
        """Of what ``part`` reads for its largest piece. ``inputs``: name, type, shape, as its session states them."""
        lies = {name: map_ for one in self.parts for name, map_ in one.maps.items()}
        seen_px = (part.side_px or _UNCUT_SIDE_PX) + part.before_px + part.after_px
        found = {}
        for name, _, stated in inputs:
            image = lies.get(name, self.image)
            shape = [side if isinstance(side, int) else 1 for side in stated]
            shape[image.y_axis : image.y_axis + 2] = [seen_px // image.stride_px] * 2
            found[name] = tuple(shape)
        return found


def cut_card(card: Card, outputs: list[str]) -> Cut | None:
    """The network of ``card`` in parts that run over large images piece by piece; None where none fit.

    Raises:
        IntegrityError: The file is no longer the one of the card.
    """
    try:
        encoded = card.model_path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{card.model_path.name} can no longer be read: {error.strerror}") from error
    if sha256(encoded).hexdigest() != card.sha256:
        raise IntegrityError(f"{card.model_path.name} was changed while it was in use.", hint="start again.")
    graph = read_graph(memoryview(encoded))
    image = Map(1, card.input.channels, 2 if card.input.layout == "NCHW" else 1)
    dense = card.dense
    parts = cut(graph, image, outputs, dense.block_px + 2 * dense.halo_px if dense else USUAL_SIDE_PX)
    return Cut(graph, parts, image) if parts else None


class Pieces:
    """The parts of one network, each with its session. Thread-safe.

    Args:
        whole: The network in parts.
        open_session: Makes a session of an encoded model.
        apart: Each session keeps memory of its own for its maps.

    Attributes:
        sessions: One for each part.
    """

    def __init__(self, whole: Cut, open_session: Callable[[bytes], Any], *, apart: bool = False) -> None:
        graph, parts = whole.graph, whole.parts
        (self._source,) = graph.inputs
        self._image, self._parts, self._apart = whole.image, parts, apart
        known: dict[str, tuple[int, int] | None] = {self._source: None}
        self.sessions: list[Any] = []
        for part in parts:
            session = open_session(graph.part({name: known[name] for name in part.inputs}, part.outputs))
            known |= {
                given.name: (_TYPES[given.type], _channels(given.shape, part.maps[given.name]))
                for given in session.get_outputs()
            }
            self.sessions.append(session)
        self._reach = _reaches(parts)
        self._memory = _Memory()
        self.team = Team()

    def memory_bytes(self, image_px: int) -> tuple[int, int]:
        """What :meth:`run` takes at most for an image of so many pixels, and what each thread takes that runs pieces;
        measured four fifths of it.

        Two maps between parts, and the two widest of a part that runs in one piece; a few pieces.
        """
        widths = {name: lies.width for part in self._parts for name, lies in part.maps.items()}
        between = max(sum(widths.get(name, 0) for name in (*part.inputs, *part.outputs)) for part in self._parts)
        at_once = max((part.width for part in self._parts if not part.side_px), default=0)
        pieces = _WIDE_PIECES * WIDE_BYTES if self.wide else _PIECES * PIECE_BYTES
        if self._apart:
            seen = ((part.side_px + part.before_px + part.after_px) ** 2 * part.width for part in self._parts)
            pieces = int(_OWN_PIECES * 4 * sum(seen))
        return int(4 * image_px * (between + 2 * at_once)), pieces

    @property
    def wide(self) -> bool:
        """Whether pieces are larger than caches."""
        return any(4 * part.width * part.side_px**2 > PIECE_BYTES for part in self._parts)

    def run(self, batch: np.ndarray, outputs: Sequence[str], wanted: np.ndarray | None = None) -> list[np.ndarray]:
        """The maps ``outputs`` of one image.

        Args:
            batch: (1, …), the network's input; its sides are multiples of the network's stride.
            wanted: (rows, cols) bool: cells of the maps that are wanted; others may be anything. All, if none is.
        """
        arrays, maps = {self._source: batch}, {self._source: self._image}
        borrowed: dict[str, np.ndarray] = {}
        y = self._image.y_axis
        whole = Box(0, 0, *batch.shape[y : y + 2])
        memory = self._memory.of_this_thread()
        if wanted is not None and not wanted.any():
            wanted = None

        def between(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            if name in outputs:
                return np.empty(shape, dtype)
            n_bytes = math.prod(shape) * dtype.itemsize
            borrowed[name] = memory.take(n_bytes)
            return borrowed[name][:n_bytes].view(dtype).reshape(shape)

        with self.team.busy():
            for index, (part, session) in enumerate(zip(self._parts, self.sessions, strict=True)):
                inputs = {name: (arrays[name], maps[name]) for name in part.inputs}
                pieces = [(piece, self._needed(piece, part, wanted, whole)) for piece in _even(whole, part)]
                arrays |= _run((part, session), inputs, (whole, pieces), between, self.team)
                maps |= part.maps
                later = {name for other in self._parts[index + 1 :] for name in other.inputs}
                for name in borrowed.keys() - later:
                    memory.give(borrowed.pop(name))
        return [arrays[name] for name in outputs]

    def _needed(self, piece: Box, part: Part, wanted: np.ndarray | None, whole: Box) -> Box:
        """Of a piece what the wanted cells look at: a box round it."""
        if wanted is None:
            return piece
        before, after = (max(self._reach[name][side] for name in part.outputs) for side in (0, 1))
        cell_px = whole.height // wanted.shape[0]
        seen = Box(piece.y0 - after, piece.x0 - after, piece.y1 + before, piece.x1 + before).intersect(whole)
        cells = _outwards(seen, cell_px)
        found = wanted[cells.slices]
        y, x = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
        if not len(y):
            return Box(piece.y0, piece.x0, piece.y0, piece.x0)
        box = Box(int(y[0]), int(x[0]), int(y[-1]) + 1, int(x[-1]) + 1).shift(cells.y0, cells.x0).scale(cell_px)
        looked_at = Box(box.y0 - before, box.x0 - before, box.y1 + after, box.x1 + after)
        return _outwards(looked_at, part.stride_px).scale(part.stride_px).intersect(piece)


def _outwards(box: Box, step: int) -> Box:
    """The least box of whole steps around ``box``, in steps."""
    return Box(box.y0 // step, box.x0 // step, -(-box.y1 // step), -(-box.x1 // step))


def _reaches(parts: Sequence[Part]) -> dict[str, _Reach]:
    """How far beyond a cell of the last maps the parts after each map look, up and left, and down and right."""
    found: dict[str, _Reach] = {}
    for part in reversed(parts):
        before, after = (max(found.get(name, (0, 0))[side] for name in part.outputs) for side in (0, 1))
        for name in part.inputs:
            known = found.get(name, (0, 0))
            found[name] = max(known[0], before + part.before_px), max(known[1], after + part.after_px)
        found |= {name: found.get(name, (0, 0)) for name in part.outputs}
    return found


def _channels(shape: Sequence[Any], lies: Map) -> int:
    """Of a map that a part gives: what its session knows, or what was followed (weights may have added some)."""
    return shape[1] if lies.y_axis == 2 and len(shape) > 1 and isinstance(shape[1], int) else lies.channels


class _Memory(threading.local):
    """Of the maps between parts, for each thread: used again, since new pages cost more than what is written there."""

    def __init__(self) -> None:
        self._kept = _Kept()

    def of_this_thread(self) -> "_Kept":
        return self._kept


class _Kept:
    """Memory that waits to be used again."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, n_bytes: int) -> np.ndarray:
        """At least so many bytes."""
        self._free.sort(key=len)
        fitting = [index for index, block in enumerate(self._free) if len(block) >= n_bytes]
        if fitting:
            return self._free.pop(fitting[0])
        self._free = self._free[:-1]  # a larger one takes the place of the largest
        return aligned((n_bytes,), np.dtype(np.uint8), zeroed=False)

    def give(self, block: np.ndarray) -> None:
        self._free.append(block)


def _run(
    network: tuple[Part, Any],
    inputs: Mapping[str, tuple[np.ndarray, Map]],
    image: tuple[Box, list[tuple[Box, Box]]],
    new: _New,
    team: Team,
) -> dict[str, np.ndarray]:
    """The outputs of a part.

    Args:
        network: The part and its session.
        inputs: What it reads, and how that lies over the image.
        image: Its box, and of each piece its box and what is needed of it.
        new: Makes memory for a map.
        team: Shares the pieces.
    """
    (part, session), (whole, pieces) = network, image
    found: dict[str, np.ndarray] = {}
    first = threading.Lock()

    def one(piece_and_needed: tuple[Box, Box]) -> None:
        piece, needed = piece_and_needed
        seen = Box(
            needed.y0 - part.before_px,
            needed.x0 - part.before_px,
            needed.y1 + part.after_px,
            needed.x1 + part.after_px,
        ).intersect(whole)
        feeds = {name: _fed(array, lies, seen, whole) for name, (array, lies) in inputs.items()}
        for name, output in zip(part.outputs, session.run(part.outputs, feeds), strict=True):
            lies = part.maps[name]
            with first:
                if name not in found:
                    found[name] = new(name, _shape(output, lies, whole), output.dtype)
            if needed != piece:
                found[name][_at(piece, lies)] = 0
            found[name][_at(needed, lies)] = output[_at(needed.relative_to(seen), lies)]

    team.each(one, [(piece, needed) for piece, needed in pieces if needed])
    for piece, needed in pieces:
        if not needed:
            for name, array in found.items():
                array[_at(piece, part.maps[name])] = 0
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


def _fed(array: np.ndarray, lies: Map, seen: Box, whole: Box) -> np.ndarray:
    """The pixels ``seen`` of a map, in memory of their own but for the whole of it."""
    if seen == whole and array.ctypes.data % ALIGN_BYTES == 0:
        return array
    view = array[_at(seen, lies)]
    copy = aligned(view.shape, view.dtype, zeroed=False)
    copy[...] = view
    return copy
