"""The second stage of a detector: what a classifier says about a square cut out around each object.

A crop is cut from the object's own tile and padded beyond it, so that it depends on the tile alone. Tiles overlap by
at least a crop (:func:`wsiengine.tasks.detect.least_overlap_px`): around the middle of a tile no crop leaves it, and of
the views of one object the most central counts (:mod:`wsiengine.merging`).
"""

from typing import Any, Protocol

import cv2
import numpy as np

from wsiengine.errors import CardError, ScoreError
from wsiengine.models.activation import activate
from wsiengine.models.card import Card
from wsiengine.models.detection import Crop, Head, Second

_TYPES = {"uint8": np.uint8, "uint16": np.uint16, "float32": np.float32, "float16": np.float16}


class Runs(Protocol):
    """What this module needs of :class:`wsiengine.models.runtime.Runtime`."""

    card: Card

    def run_other(self, file: str, batch: np.ndarray, outputs: list[str]) -> list[np.ndarray]: ...


def second_stage(runtime: Runs, tile: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Probabilities of the second stage's classes, then of its head's, for each object of a tile.

    Args:
        runtime: Runs the files.
        tile: (rows, cols, 3) uint8, normalised; (rows, cols, 1) uint16 of a detector of 16 bits.
        boxes: (n, 4) y0, x0, y1, x1 in pixels of the tile.

    Returns:
        (n, columns) float32.

    Raises:
        CardError: An output has not the shape that the card promises.
        ScoreError: NaN or infinity.
    """
    second = runtime.card.second
    if second is None:
        return np.empty((len(boxes), 0), np.float32)
    rows = [_classified(runtime, second, _input(crop_at(tile, box, second), second)) for box in boxes]
    return np.stack(rows) if rows else np.empty((0, columns(second)), np.float32)


def columns(second: Second | None) -> int:
    """How many probabilities an object gets."""
    if second is None:
        return 0
    return len(second.classes) + (len(second.head.classes) if second.head else 0)


def crop_side_px(crop: Crop, longer_side_px: float) -> float:
    """Side of the square around an object, in pixels of the tile."""
    return crop.side_px if crop.side_px is not None else max(1.0, (crop.around or 1.0) * longer_side_px)


def crop_at(tile: np.ndarray, box: np.ndarray, second: Second) -> np.ndarray:
    """The square around a box, at the classifier's size: (size, size, channels) of the tile's type.

    Linear interpolation, by area where it shrinks. Beyond the tile lies the card's ``pad``, white if it has none.
    """
    size = second.input.size_px
    side = crop_side_px(second.crop, float((box[2:] - box[:2]).max()))
    corner = (box[:2] + box[2:]) / 2 - side / 2
    whole = max(1, round(side))
    y, x = (int(v) for v in np.floor(corner + 0.5))
    white = 0 if second.input.deep else 255  # what lies beyond a picture of that depth
    pad = white if second.input.pad is None else second.input.pad
    square = np.full((whole, whole, tile.shape[2]), pad, tile.dtype)
    y0, x0, y1, x1 = max(0, y), max(0, x), min(tile.shape[0], y + whole), min(tile.shape[1], x + whole)
    if y1 > y0 and x1 > x0:
        square[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0:y1, x0:x1]
    if whole == size:
        return square
    resized = cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA if whole > size else cv2.INTER_LINEAR)
    return resized.reshape(size, size, tile.shape[2])  # OpenCV drops an axis of one channel


def _input(crop: np.ndarray, second: Second) -> np.ndarray:
    spec = second.input
    pixels = crop[..., : spec.channels]
    values: np.ndarray = pixels if spec.dtype.startswith("uint") else pixels * spec.scale + spec.bias
    planes = values if spec.layout == "NHWC" else values.transpose(2, 0, 1)
    return np.ascontiguousarray(planes[None], _TYPES[spec.dtype])


def _classified(runtime: Runs, second: Second, batch: np.ndarray) -> np.ndarray:
    names = [second.scores, *([second.features] if second.features else [])]
    scores, *features = runtime.run_other(second.file, batch, names)
    _check(scores, second.file, second.scores, len(second.classes), runtime.card)
    found = activate(scores[0], second.activation)
    if second.head is None:
        return found
    row = np.asarray(features[0] if features else found[None], np.float32).reshape(1, -1)
    return np.concatenate([found, _head(runtime, second.head, row)])


def _head(runtime: Runs, head: Head, row: np.ndarray) -> np.ndarray:
    [scores] = runtime.run_other(head.file, row, [head.scores])
    _check(scores, head.file, head.scores, len(head.classes), runtime.card)
    return np.asarray(scores[0], np.float32)


def _check(scores: Any, file: str, name: str, classes: int, card: Card) -> None:
    if np.shape(scores) != (1, classes):
        raise CardError(
            f"card and ONNX file disagree: {file} gave {name!r} of shape {np.shape(scores)}; the card of {card.name} "
            f"needs (1, {classes}), one number per class",
            hint="correct the card's second, or export the model again (ZipMap off: scores as an array)",
        )
    if not np.isfinite(scores).all():
        raise ScoreError(
            f"the second stage of {card.name}, {file}, gave NaN or infinity; needed finite numbers.",
            hint="the ONNX file overflows on this input: try one exported as float32",
        )
