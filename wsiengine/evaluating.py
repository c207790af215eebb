"""A model against labelled images: tiles scored by the engine's own runtime, and joined to images, slides and cases.

What the rows then say is in :mod:`wsiengine.evaluation_report`; the formulas are in :mod:`wsiengine.evaluate`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from wsiengine.evaluate import aggregate
from wsiengine.geometry import Box, Lattice, Mpp
from wsiengine.models.card import Card
from wsiengine.models.runtime import Runtime
from wsiengine.normalise import fit_normaliser, parse_recipe
from wsiengine.slides import open_slide
from wsiengine.slides.base import Slide
from wsiengine.tasks.classify import MapLayout, tile_probabilities
from wsiengine.tissue import TissueMask
from wsiengine.training.data import Field, read_mask, resample

EMPTY_BELOW = 0.02
"""Drawn part of a window under which any class given to it is a false one."""
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """One row per tile (or cell of a map; joined, per image, slide or case).

    Attributes:
        classes: Names of the classes.
        fields: The labelled images (or annotated slides) that the rows come from.
        field: (N,) int64, index into ``fields``.
        probability: (N, classes) float64.
        gate: (N,) float64: the part that may be judged, as the model sees it; 1 of a model without a gate.
        judged: (N,) bool: the gate found enough to judge.
        drawn: (N,) float64: the part under the image's mask; NaN without a mask.
    """

    classes: tuple[str, ...]
    fields: tuple[Field, ...]
    field: np.ndarray
    probability: np.ndarray
    gate: np.ndarray
    judged: np.ndarray
    drawn: np.ndarray

    def __len__(self) -> int:
        return len(self.field)

    @property
    def true(self) -> np.ndarray:
        """(N,) int64, index of each row's class; −1 where its label is none."""
        known = {name: k for k, name in enumerate(self.classes)}
        return np.array([known.get(f.label, -1) for f in self.fields], np.int64)[self.field]

    def codes(self, *names: str) -> np.ndarray:
        """(N,) int64: rows that agree in these attributes of their field have the same number."""
        said = ["\0".join(str(getattr(f, name)) for name in names) for f in self.fields]
        return np.unique(said, return_inverse=True)[1].astype(np.int64)[self.field]

    def where(self, keep: np.ndarray) -> "Rows":
        """The rows at which ``keep`` (bool, or indices) says so."""
        return replace(
            self,
            field=self.field[keep],
            probability=self.probability[keep],
            gate=self.gate[keep],
            judged=self.judged[keep],
            drawn=self.drawn[keep],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A labelled image as the model sees it: at its µm/px, normalised by its recipe.

    Attributes:
        pixels: uint8 (rows, cols, 3).
        mask: float32 (rows, cols), the drawn part of each pixel; None without a mask.
    """

    pixels: np.ndarray
    mask: np.ndarray | None

    def at_least(self, side: int) -> "Seen":
        """Continued mirrored up to a tile: it was cut out of tissue, and white around it would say otherwise."""
        mask = None if self.mask is None else _mirrored(self.mask, side)
        return Seen(_mirrored(self.pixels, side), mask)

    def corners(self, side: int) -> np.ndarray:
        """(N, 2) int64, y and x of the fewest tiles that cover it, evenly spread, outer ones at its edges."""
        rows, cols = self.pixels.shape[:2]
        return np.array([(y, x) for y in _starts(rows, side) for x in _starts(cols, side)], np.int64)

    def drawn(self, corners: np.ndarray, side: int) -> np.ndarray:
        """(N,) float64: the drawn part of each tile; NaN without a mask."""
        if self.mask is None:
            return np.full(len(corners), np.nan)
        return np.array([self.mask[y : y + side, x : x + side].mean() for y, x in corners.tolist()], np.float64)


def see(card: Card, field: Field) -> Seen:
    """Read a labelled image and its mask.

    Raises:
        WsiError: The image or its mask cannot be read, or they differ in size.
    """
    slide = open_slide(field.image, mpp=Mpp(*field.mpp_yx), window=parse_recipe(card.recipe).window)
    try:
        lattice = Lattice(slide.info.size_l0, Mpp(*field.mpp_yx), card.input.fixed_mpp, card.output_stride_px)
        pixels = _normalised(card, slide, Box.of(lattice.extent_px), lattice)
        mask = None
        if field.mask is not None:
            drawn = resample(read_mask(field.mask, slide.info.size_l0.shape), field.mpp_yx, lattice.mpp.mean)
            mask = _of_shape(drawn.astype(np.float32) / 255, pixels.shape[:2])
        return Seen(pixels, mask)
    finally:
        slide.close()


def field_tiles(card: Card, field: Field) -> tuple[np.ndarray, np.ndarray]:
    """A labelled image as the model sees it, and its tiles.

    Returns:
        Pixels (rows, cols, 3) uint8, and (N, 2) corners y, x of the fewest tiles that cover them.
    """
    seen = see(card, field).at_least(card.input.size_px)
    return seen.pixels, seen.corners(card.input.size_px)


def score_images(
    card: Card,
    fields: Sequence[Field],
    runtime: Runtime,
    *,
    progress: Progress = no_progress,
    edit: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Rows:
    """Score every image, cut into tiles that lie inside it as far as it is large enough.

    Args:
        card: The model.
        fields: Labelled images.
        runtime: Its session.
        progress: Called with images done and images in all.
        edit: Changes an image beforehand, uint8 (rows, cols, 3) at the model's µm/px: to see what damage does.
    """
    side = card.input.size_px

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for done, field in enumerate(fields, start=1):
            seen = see(card, field).at_least(side)
            corners = seen.corners(side)
            pixels = edit(seen.pixels) if edit else seen.pixels
            yield runtime.scores(pixels, corners), seen.drawn(corners, side)
            progress(done, len(fields))

    return _rows(card, fields, parts())


def score_empty_windows(card: Card, fields: Sequence[Field], runtime: Runtime) -> Rows:
    """Score every window in which hardly anything is drawn, a cell apart.

    Images with masks hold little tissue outside of them: windows of a whole tile would leave few cases. A window is
    four sevenths of a tile (:func:`window_px`), continued mirrored.
    """
    small = window_px(card)

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for field in masked:
            seen = see(card, field)
            corners = _empty(seen, small, card.output_stride_px)
            drawn = seen.drawn(corners, small)
            tiles = [_mirrored(seen.pixels[y : y + small, x : x + small], card.input.size_px) for y, x in corners]
            if not tiles:
                yield np.zeros((0, card.score_channels), np.float32), drawn
                continue
            starts = np.array([(k * card.input.size_px, 0) for k in range(len(tiles))], np.int64)
            yield runtime.scores(np.concatenate(tiles), starts), drawn

    masked = [field for field in fields if field.mask is not None]
    return _rows(card, masked, parts())


def window_px(card: Card) -> int:
    """Side of a window of :func:`score_empty_windows`, in whole cells: 128 px of a tile of 224 px."""
    return max(1, round(card.input.size_px * 4 / 7 / card.output_stride_px)) * card.output_stride_px


def _empty(seen: Seen, side: int, step: int) -> np.ndarray:
    """(N, 2) corners of the windows without a drawn part."""
    rows, cols = seen.pixels.shape[:2]
    places = [(y, x) for y in range(0, rows - side + 1, step) for x in range(0, cols - side + 1, step)]
    corners = np.array(places, np.int64).reshape(-1, 2)
    return corners[seen.drawn(corners, side) < EMPTY_BELOW]


def _rows(card: Card, fields: Sequence[Field], parts: Iterator[tuple[np.ndarray, np.ndarray]]) -> Rows:
    """Rows of the scores and drawn parts of each field's tiles."""
    layout = MapLayout.of(card)
    found = list(parts)
    drawn = np.concatenate([d for _, d in found]) if found else np.zeros(0)
    scores = np.concatenate([s for s, _ in found]) if found else np.zeros((0, card.score_channels), np.float32)
    p = tile_probabilities(scores, layout).astype(np.float64)
    gated = layout.gate_minimum is not None
    gate = p[:, -1] if gated else np.ones(len(p))
    judged = gate >= layout.gate_minimum if layout.gate_minimum is not None else np.ones(len(p), bool)
    of_field = np.repeat(np.arange(len(fields)), [len(s) for s, _ in found])
    return Rows(layout.names, tuple(fields), of_field, p[:, : len(layout.names)], gate, judged, drawn)


def _normalised(card: Card, slide: Slide, box: Box, lattice: Lattice) -> np.ndarray:
    tissue = TissueMask.everywhere(slide.info.size_l0, lattice.slide_mpp)
    normaliser = fit_normaliser(parse_recipe(card.recipe), slide, tissue, lattice.mpp)
    return normaliser.apply(slide.read(box.grow(normaliser.halo_px), lattice.mpp), box)


def _of_shape(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A mask that is a pixel too small or too large, made to fit: sizes are rounded in two ways."""
    missing = [(0, max(0, want - have)) for want, have in zip(shape, mask.shape, strict=True)]
    return np.pad(mask, missing, mode="edge")[: shape[0], : shape[1]]


def _mirrored(values: np.ndarray, side: int) -> np.ndarray:
    missing = [max(0, side - n) for n in values.shape[:2]]
    sides = [(m // 2, m - m // 2) for m in missing] + [(0, 0)] * (values.ndim - 2)
    return np.pad(values, sides, mode="symmetric")


def _starts(extent: int, side: int) -> list[int]:
    count = -(-extent // side)
    return [round(i * (extent - side) / max(1, count - 1)) for i in range(count)]


def join(rows: Rows, by: str, rule: str) -> Rows:
    """One row per image, slide or case and label, from the rows that were judged (all of them where none was).

    A case with images of several classes is several rows: each is right or wrong about its own label.

    Args:
        rows: What is joined.
        by: ``image``, ``slide`` or ``case``.
        rule: One of :data:`wsiengine.evaluate.RULES`.
    """
    key = rows.codes("source", by, "label")
    count = int(key.max(initial=-1)) + 1
    any_judged = np.bincount(key[rows.judged], minlength=count) > 0
    used = rows.judged | ~any_judged[key]
    names, score = aggregate(rows.probability[used], key[used], rule, rows.gate[used])
    total = score.sum(axis=1, keepdims=True)
    tiles = np.bincount(key, minlength=count)[names]
    gate, drawn = (np.bincount(key, values, minlength=count)[names] / tiles for values in (rows.gate, rows.drawn))
    first = np.unique(key, return_index=True)[1]
    probability = score / np.where(total > 0, total, 1)
    return replace(
        rows, field=rows.field[first], probability=probability, gate=gate, judged=any_judged[names], drawn=drawn
    )
