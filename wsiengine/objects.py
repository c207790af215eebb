"""Objects of a slide as columns: what a detector found, before and after views of one object are merged. Pure numpy.

Frame: working pixels of the slide, absolute, y before x. An outline, where there is one, is a mask of packed bits in
the smallest frame of whole pixels around the box (:mod:`wsikernels.masks`).
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

TOP, LEFT, BOTTOM, RIGHT = 1, 2, 4, 8  # sides on which a tile's border cut an object
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class TileView:
    """Where a tile lies, in working pixels.

    Attributes:
        number: Of the tile, row-major.
        y, x: Its corner.
        side_px: Its side.
        slide_px: Height and width of the slide: what a tile has beyond is padding.
        overlap_px: With the tiles beside it.
        open: Sides, a sum of TOP … RIGHT, where the slide goes on.
        beside: Those of them where the next tile is run, too.
    """

    number: int
    y: int
    x: int
    side_px: int
    slide_px: tuple[float, float]
    overlap_px: int
    open: int
    beside: int


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """n objects, one array each.

    Attributes:
        boxes: (n, 4) float64: y0, x0, y1, x1, half-open.
        scores: (n,) float32: probability of the class.
        labels: (n,) uint16: index of the class among the card's.
        tiles: (n,) int64: number of the tile that saw it, row-major.
        cut: (n,) uint8: sides on which it may go on beyond what was seen, a sum of TOP, LEFT, BOTTOM, RIGHT.
        extra: (n, columns) float32: probabilities of a second stage; no columns where there is none.
        frames: (n, 4) int32: whole pixels around each mask; (0, 4) where the model gives no masks.
        bits: (m,) uint8: the masks, one after the other, each from a whole byte on.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray
    cut: np.ndarray
    extra: np.ndarray
    frames: np.ndarray
    bits: np.ndarray

    def __post_init__(self) -> None:
        count = len(self.boxes)
        for name, dtype, shape in _COLUMNS:
            array = getattr(self, name)
            if array.dtype != dtype or array.shape[1:] != shape(array):
                raise ValueError(f"{name} is {array.dtype} {array.shape}, needed {np.dtype(dtype)}")
            if name not in ("frames", "bits") and len(array) != count:
                raise ValueError(f"{count} boxes, but {len(array)} {name}")
        if len(self.frames) not in (0, count):
            raise ValueError(f"{count} boxes, but {len(self.frames)} masks")

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def outlined(self) -> bool:
        """Whether there are masks."""
        return len(self.frames) > 0

    @property
    def centres(self) -> np.ndarray:
        """(n, 2) float64: y, x of each box's centre."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    def starts(self) -> np.ndarray:
        """(n + 1,) int64: byte at which each mask begins."""
        sizes = np.prod(self.frames[:, 2:].astype(np.int64) - self.frames[:, :2], axis=1)
        return np.concatenate(([0], np.cumsum((sizes + 7) // 8))).astype(np.int64)

    def take(self, index: np.ndarray) -> "Objects":
        """The objects of ``index`` (numbers or bool), in its order."""
        index = np.flatnonzero(index) if index.dtype == bool else np.asarray(index, np.int64)
        columns = {name: getattr(self, name)[index] for name, _, _ in _COLUMNS if name not in ("frames", "bits")}
        if not self.outlined:
            return Objects(**columns, frames=self.frames, bits=self.bits)
        starts = self.starts()
        return Objects(**columns, frames=self.frames[index], bits=_pieces(self.bits, starts, index))

    def columns(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        return {name: getattr(self, name) for name, _, _ in _COLUMNS}

    def to_bytes(self) -> bytes:
        """For the journal; :func:`objects_from_bytes` reads it back."""
        arrays = {name: np.ascontiguousarray(array) for name, array in self.columns().items()}
        head = json.dumps({name: [a.dtype.str, list(a.shape)] for name, a in arrays.items()}).encode()
        return b"".join((_LENGTH.pack(len(head)), head, *(a.tobytes() for a in arrays.values())))


_COLUMNS: tuple[tuple[str, Any, Any], ...] = (
    ("boxes", np.float64, lambda a: (4,)),
    ("scores", np.float32, lambda a: ()),
    ("labels", np.uint16, lambda a: ()),
    ("tiles", np.int64, lambda a: ()),
    ("cut", np.uint8, lambda a: ()),
    ("extra", np.float32, lambda a: a.shape[1:2]),
    ("frames", np.int32, lambda a: (4,)),
    ("bits", np.uint8, lambda a: ()),
)
assert [name for name, _, _ in _COLUMNS] == [f.name for f in fields(Objects)]


def no_objects(extra: int = 0) -> Objects:
    """None at all, with ``extra`` columns of a second stage."""
    shapes = {"boxes": (0, 4), "frames": (0, 4), "extra": (0, extra)}
    return Objects(**{name: np.empty(shapes.get(name, (0,)), dtype) for name, dtype, _ in _COLUMNS})


def objects_of(columns: Mapping[str, np.ndarray]) -> Objects:
    """Objects from arrays by name, as :meth:`Objects.columns` gives them."""
    return Objects(**{name: np.asarray(columns[name], dtype) for name, dtype, _ in _COLUMNS})


def objects_from_bytes(data: bytes) -> Objects:
    """What :meth:`Objects.to_bytes` wrote."""
    (length,) = _LENGTH.unpack_from(data)
    head = json.loads(data[_LENGTH.size : _LENGTH.size + length])
    at = _LENGTH.size + length
    columns = {}
    for name, (kind, shape) in head.items():
        count = int(np.prod(shape))
        columns[name] = np.frombuffer(data, kind, count, at).reshape(shape)
        at += columns[name].nbytes
    return Objects(**columns)


def joined(parts: Sequence[Objects], extra: int = 0) -> Objects:
    """Objects of several tables, one after the other; ``extra`` columns where there are no parts."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return no_objects(extra)
    if len({part.outlined for part in parts}) > 1:
        raise ValueError("objects with and without masks cannot stand in one table")
    return Objects(**{name: np.concatenate([getattr(p, name) for p in parts]) for name, _, _ in _COLUMNS})


def _pieces(data: np.ndarray, starts: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The bytes of the given objects, in order."""
    sizes = (starts[1:] - starts[:-1])[index]
    ends = np.cumsum(sizes)
    if not len(ends):
        return data[:0]
    shift = starts[index] - (ends - sizes)  # from a byte's place in the result to its place in ``data``
    return data[np.arange(ends[-1]) + np.repeat(shift, sizes)]
