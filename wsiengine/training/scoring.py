"""Scores of labelled fields by a network in training.

A field is cut into the fewest tiles of the model's size that cover it, evenly spaced; one smaller than a tile is
continued mirrored. A tile with hardly any drawn epithelium has no diagnosis to be right about: it is left out of the
scores and tests the gate instead.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from wsiengine.errors import WsiError
from wsiengine.training.data import CLASSES, Field, load

TILE_PX = 224
WINDOW_PX = 128
NO_EPITHELIUM_BELOW = 0.02
"""Covered fraction of a tile under which a diagnosis would be a false one."""

Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Tiles uint8 (N, rows, cols, 3) -> class logits (N, classes) and epithelium (N,)."""


def image_name(field: Field) -> str:
    """What a field is called in files of scores and views: set, folder and file."""
    return f"{field.source}/{field.image.parent.name}/{field.image.name}"


@dataclass(frozen=True)
class Scores:
    """One row per tile.

    Attributes:
        fields: The field of each tile.
        logits: float32 (N, classes).
        epithelium: Predicted covered fraction, float32 (N,).
        drawn: Covered fraction by the mask, float32 (N,); NaN without a mask.
        classes: Their names.
    """

    fields: tuple[Field, ...]
    logits: np.ndarray
    epithelium: np.ndarray
    drawn: np.ndarray
    classes: tuple[str, ...] = CLASSES

    def save(self, file: Path) -> None:
        """Write as ``.npz``; :func:`load_scores` reads it."""
        images = np.array([image_name(f) for f in self.fields])
        np.savez_compressed(file, images=images, logits=self.logits, epithelium=self.epithelium, drawn=self.drawn)

    def column(self, name: str) -> np.ndarray:
        """An attribute of each tile's field, as an array."""
        return np.array([str(getattr(f, name)) for f in self.fields])

    @property
    def labels(self) -> np.ndarray:
        """Class index of each tile's field; −1 where it is none of the classes (a polyp)."""
        return np.array([self.classes.index(f.label) if f.label in self.classes else -1 for f in self.fields])

    def where(self, keep: np.ndarray) -> "Scores":
        """The rows at which ``keep`` is true."""
        kept = np.flatnonzero(keep)
        return replace(
            self,
            fields=tuple(self.fields[i] for i in kept),
            logits=self.logits[kept],
            epithelium=self.epithelium[kept],
            drawn=self.drawn[kept],
        )

    def by_field(self) -> "Scores":
        """One row per field: mean logits of its tiles, weighted by their predicted epithelium; no mask shows as NaN."""
        _, first, of_row = np.unique(self.column("image"), return_index=True, return_inverse=True)
        weight = np.maximum(self.epithelium, 1e-3)
        total = np.bincount(of_row, weight)
        logits = [np.bincount(of_row, self.logits[:, c] * weight) / total for c in range(self.logits.shape[1])]
        covered, drawn = (np.bincount(of_row, column) / np.bincount(of_row) for column in (self.epithelium, self.drawn))
        fields = tuple(self.fields[i] for i in first)
        return replace(self, fields=fields, logits=np.stack(logits, axis=1), epithelium=covered, drawn=drawn)


def load_scores(files: Iterable[Path], fields: Iterable[Field]) -> Scores:
    """Scores of one or more files, one after the other.

    Raises:
        WsiError: A file holds an image that ``fields`` does not, or two files hold the same one.
    """
    known = {image_name(f): f for f in fields}
    parts = [np.load(file) for file in files]
    sets = [set(part["images"].tolist()) for part in parts]
    names = set().union(*sets)
    if len(names) < sum(map(len, sets)) or not names <= known.keys():
        raise WsiError("scores of images that are unknown or there twice", hint="give one file per held-out fold")
    logits, epithelium, drawn = (np.concatenate([p[k] for p in parts]) for k in ("logits", "epithelium", "drawn"))
    images = np.concatenate([part["images"] for part in parts])
    return Scores(tuple(known[i] for i in images.tolist()), logits, epithelium, drawn)


def score(
    fields: Iterable[Field],
    predict: Predict,
    mpp: float,
    *,
    edit: Callable = lambda tiles: tiles,
    classes: tuple[str, ...] = CLASSES,
    gated: bool = True,
    tile_px: int = TILE_PX,
) -> Scores:
    """Cut, predict and collect.

    Args:
        fields: What to score.
        predict: The network.
        mpp: µm/px of its tiles.
        edit: Changes tiles beforehand (stain, blur, …): (N, rows, cols, 3) -> the same.
        classes: Names of the network's classes.
        gated: Whether the network learnt where epithelium is; if not, every tile counts as full of it.
        tile_px: Side of a tile.
    """
    rows: list[Field] = []
    logits, epithelium, drawn = [], [], []
    for field in fields:
        tiles, masks = field_tiles(field, mpp, tile_px)
        scores, covered = predict(edit(tiles))
        rows += [field] * len(tiles)
        logits.append(scores)
        epithelium.append(covered if gated else np.ones_like(covered))
        drawn.append(masks)
    columns = [np.concatenate(column) for column in (logits, epithelium, drawn)]
    return Scores(tuple(rows), columns[0], columns[1], columns[2], classes)


def negative_windows(fields: Iterable[Field], predict: Predict, mpp: float) -> Scores:
    """Scores of every window of :data:`WINDOW_PX` in which hardly any epithelium is drawn, every 32 px.

    Fields hold little tissue without glands: windows of a whole tile would leave five patients. A window is continued
    mirrored to the size of a tile.
    """
    rows: list[Field] = []
    parts = []
    for field in fields:
        if field.mask is None:
            continue
        pixels = load(field, mpp)
        assert pixels.mask is not None
        found = list(_empty(pixels.mask))
        if not found:
            continue
        tiles = np.stack([_at_least(pixels.image[y : y + WINDOW_PX, x : x + WINDOW_PX]) for y, x in found])
        parts.append(predict(tiles))
        rows += [field] * len(found)
    if not rows:
        return Scores((), np.zeros((0, len(CLASSES))), np.zeros(0), np.zeros(0))
    logits, epithelium = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Scores(tuple(rows), logits, epithelium, np.zeros(len(rows), np.float32))


def _empty(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """Corners of the windows without epithelium."""
    for y in range(0, mask.shape[0] - WINDOW_PX + 1, 32):
        for x in range(0, mask.shape[1] - WINDOW_PX + 1, 32):
            if mask[y : y + WINDOW_PX, x : x + WINDOW_PX].mean() < 255 * NO_EPITHELIUM_BELOW:
                yield y, x


def field_tiles(field: Field, mpp: float, side: int = TILE_PX) -> tuple[np.ndarray, np.ndarray]:
    """The tiles of a field, uint8 (N, side, side, 3), and the covered fraction of each, NaN without a mask."""
    pixels = load(field, mpp)
    image = _at_least(pixels.image, side)
    mask = None if pixels.mask is None else _at_least(pixels.mask, side)
    corners = [(y, x) for y in _starts(image.shape[0], side) for x in _starts(image.shape[1], side)]
    tiles = np.stack([image[y : y + side, x : x + side] for y, x in corners])
    if mask is None:
        return tiles, np.full(len(tiles), np.nan, np.float32)
    covered = [mask[y : y + side, x : x + side].mean() / 255 for y, x in corners]
    return tiles, np.array(covered, np.float32)


def _at_least(image: np.ndarray, side: int = TILE_PX) -> np.ndarray:
    """The image, continued mirrored where it is smaller than a tile."""
    missing = [max(0, side - n) for n in image.shape[:2]]
    (top, bottom), (left, right) = [(m // 2, m - m // 2) for m in missing]
    return cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_REFLECT_101) if any(missing) else image


def _starts(extent: int, side: int) -> Iterator[int]:
    count = -(-extent // side)
    yield from (round(i * (extent - side) / max(1, count - 1)) for i in range(count))
