"""What a detector's outputs say: ONNX arrays of one tile → candidate objects. Pure; the card names the conventions.

:func:`decode` reads the arrays (:mod:`wsiengine.models.detection` lists the forms) and refuses what no detector can
mean. :func:`candidates` places what it read on the slide: clipped to it, marked where a border of the tile cut it, and
left out where the next tile sees more of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from wsiengine.errors import CardError, ScoreError
from wsiengine.models.activation import activate
from wsiengine.models.card import Card
from wsiengine.models.detection import Detection, Merge
from wsiengine.objects import BOTTOM, LEFT, RIGHT, TOP, Objects, TileView
from wsikernels.masks import cut_masks, mask_areas, paste_masks
from wsikernels.pairs import IOS, IOU, overlapping_pairs, suppress

_SLACK = 1e-3  # a probability may leave [0, 1] by rounding
_SIDES = (TOP, LEFT, BOTTOM, RIGHT)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What the model says about one tile, in its pixels, best first.

    ``boxes`` (n, 4) float64 y0, x0, y1, x1; ``scores`` (n,) float32; ``labels`` (n,) int64; ``masks`` (n, h, w):
    float32 stretched over each box, or bool as large as the tile; None without. ``left_out``: how many more there were.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None
    left_out: int = 0

    def take(self, index: np.ndarray) -> "Found":
        masks = None if self.masks is None else self.masks[index]
        return Found(self.boxes[index], self.scores[index], self.labels[index], masks, self.left_out)


def decode(outputs: Mapping[str, np.ndarray], card: Card) -> Found:
    """Objects of one tile from the model's arrays by role.

    Raises:
        CardError: An array has not the shape that the card promises.
        ScoreError: NaN, a score outside [0, 1], an unknown label, a box that ends before it starts or lies outside the
            tile.
    """
    rule = _rule(card)
    found = _boxes(outputs, card, rule) if "boxes" in outputs else _peaks(outputs, card, rule)
    found = _thinned(found.take(np.argsort(-found.scores, kind="stable")), rule)
    best = found.take(np.arange(min(len(found.scores), rule.per_tile)))
    return replace(best, left_out=len(found.scores) - len(best.scores))


def _thinned(found: Found, rule: Detection) -> Found:
    """Without what the tile's own better boxes suppress: a network without suppression inside gives thousands.

    The global pass would do the same; masks and softened scores are left to it.
    """
    merge = rule.merge
    if found.masks is not None or merge.method != "nms" or not merge.within_tile or len(found.scores) < 2:
        return found
    labels = np.zeros_like(found.labels) if merge.across_classes else found.labels
    return found.take(unsuppressed(found.boxes, labels, merge))


def unsuppressed(boxes: np.ndarray, labels: np.ndarray, merge: Merge) -> np.ndarray:
    """Which of the boxes of one tile (n, 4), best first, no better one of the same label suppresses → their numbers."""
    everywhere = np.tile([-1e9, -1e9, 1e9, 1e9], (len(labels), 1))
    measure = IOS if merge.overlap == "ios" else IOU
    pairs, _ = overlapping_pairs(boxes, everywhere, labels, merge.above, measure)
    order = np.arange(len(labels))
    return np.flatnonzero(suppress(order, pairs) == order)


def _rule(card: Card) -> Detection:
    if card.detection is None:
        raise ValueError(f"{card.name} is no detector")
    return card.detection


# --- boxes ---------------------------------------------------------------------------------------


def _boxes(outputs: Mapping[str, np.ndarray], card: Card, rule: Detection) -> Found:
    boxes = np.asarray(_one_tile(outputs["boxes"], 2, "boxes", card), np.float64)
    boxes = boxes.T if rule.columns else boxes
    if boxes.shape[1] != 4:
        raise _shape_error(card, "boxes", outputs["boxes"], "4 numbers for each box")
    count = _count(outputs, len(boxes), card)
    boxes = boxes[:count]
    scores, labels = _scores(outputs, card, rule)
    if len(scores) < count:
        raise _shape_error(card, "scores", outputs["scores"], f"one row for each of {len(boxes)} boxes")
    scores, labels = scores[:count], labels[:count]
    _refuse_nan(scores, "score", card)
    if count and not -_SLACK <= scores.min() <= scores.max() <= 1 + _SLACK:
        worst = scores[np.argmax(np.abs(scores - 0.5))]
        raise ScoreError(
            f"model {card.name} gave the score {worst:g}, needed 0 to 1.",
            hint="is the card's activation right? sigmoid turns logits into probabilities.",
        )
    kept = np.flatnonzero((scores >= rule.minimum_score) & (labels != _nothing(rule, len(card.classes))))
    boxes, scores, labels = boxes[kept], scores[kept], labels[kept] - (rule.background == "first")
    _refuse_labels(labels, card)
    _refuse_nan(boxes, "box", card)
    boxes = _corners(boxes, rule.boxes) * (card.input.size_px if rule.coordinates == "normalised" else 1)
    _refuse_boxes(boxes, card)
    masks = _masks(outputs, (kept, labels), card, rule)
    return Found(boxes, np.clip(scores, 0, 1).astype(np.float32), labels, masks)


def _scores(outputs: Mapping[str, np.ndarray], card: Card, rule: Detection) -> tuple[np.ndarray, np.ndarray]:
    """Score and label (with the background's, where there is one) of each box."""
    if "labels" in outputs:
        scores = _one_tile(outputs["scores"], 1, "scores", card)
        labels = np.asarray(_one_tile(outputs["labels"], 1, "labels", card))
        if len(labels) != len(scores):
            raise _shape_error(card, "labels", outputs["labels"], f"one for each of {len(scores)} scores")
        return _activated(scores[:, None], card)[:, 0], labels.astype(np.int64)
    matrix = _one_tile(outputs["scores"], 2, "scores", card)
    matrix = matrix.T if rule.columns else matrix
    classes = len(card.classes) + (rule.background != "none")
    if matrix.shape[1] != classes:
        raise _shape_error(card, "scores", outputs["scores"], f"{classes} scores for each box")
    probabilities = _activated(matrix, card)
    own = probabilities.copy()
    if rule.background != "none":
        own[:, 0 if rule.background == "first" else -1] = -1  # never the best, however probable
        _refuse_nan(probabilities, "score", card)
    labels = own.argmax(axis=1)
    return probabilities[np.arange(len(labels)), labels], labels


def _activated(values: np.ndarray, card: Card) -> np.ndarray:
    """Probabilities; NaN stays NaN."""
    return activate(values, card.activation)


def _count(outputs: Mapping[str, np.ndarray], rows: int, card: Card) -> int:
    if "count" not in outputs:
        return rows
    values = np.asarray(outputs["count"]).ravel()
    if values.size != 1 or not 0 <= values[0] <= rows:
        raise _shape_error(card, "count", outputs["count"], f"one whole number of at most {rows} boxes")
    return int(values[0])


def _nothing(rule: Detection, classes: int) -> int:
    """The label of the background; one that cannot occur where there is none."""
    return {"none": -1, "first": 0, "last": classes}[rule.background]


def _corners(boxes: np.ndarray, order: str) -> np.ndarray:
    """Boxes of any convention as y0, x0, y1, x1."""
    a, b, c, d = boxes.T
    if order == "yxyx":
        corners = (a, b, c, d)
    elif order == "xyxy":
        corners = (b, a, d, c)
    elif order == "xywh":
        corners = (b, a, b + d, a + c)
    else:
        corners = (b - d / 2, a - c / 2, b + d / 2, a + c / 2)
    return np.stack(corners, axis=1)


def _masks(
    outputs: Mapping[str, np.ndarray], kept: tuple[np.ndarray, np.ndarray], card: Card, rule: Detection
) -> np.ndarray | None:
    """Masks of the kept boxes (their rows, their labels): each of its own class."""
    if "masks" not in outputs:
        return None
    rows, labels = kept
    values = np.asarray(outputs["masks"])
    needed = len(_one_tile(outputs["boxes"], 2, "boxes", card)) if not rule.columns else values.shape[0]
    if values.ndim == 5 or (values.ndim > 3 and values.shape[0] == 1 != needed):
        values = values[0]  # the leading axis of tiles
    if values.ndim not in (3, 4) or len(values) <= max(rows, default=-1):
        raise _shape_error(card, "masks", values, f"one for each of {needed} boxes")
    if values.ndim == 4:
        channels = values.shape[1]
        first = rule.background == "first"
        if channels not in (1, len(card.classes), len(card.classes) + (rule.background != "none")):
            raise _shape_error(card, "masks", values, f"1 or {len(card.classes)} channels")
        channel = 0 if channels == 1 else labels + (first and channels > len(card.classes))
        values = values[rows, channel]
    else:
        values = values[rows]
    side = card.input.size_px
    if rule.masks == "full" and values.shape[1:] != (side, side):
        raise _shape_error(card, "masks", values, f"masks as large as the tile, {side} × {side}")
    if values.dtype != bool:
        _refuse_nan(values, "mask", card)
        values = activate(values, rule.mask_activation)
    return values >= rule.mask_threshold if rule.masks == "full" else values.astype(np.float32)


# --- heat maps -----------------------------------------------------------------------------------


def _peaks(outputs: Mapping[str, np.ndarray], card: Card, rule: Detection) -> Found:
    cells = card.input.size_px // card.output_stride_px
    classes = len(card.classes) + (rule.background != "none")
    heat = _map(outputs, "scores", classes, cells, card)
    _refuse_nan(heat, "score", card)
    probability = np.moveaxis(_activated(np.moveaxis(heat, 0, -1), card), -1, 0)
    if rule.background != "none":
        probability = probability[1:] if rule.background == "first" else probability[:-1]
    label, row, col = np.nonzero((probability >= rule.minimum_score) & _highest(probability, rule.peak_cells))
    scores = probability[label, row, col]
    if len(scores) and scores.max() > 1 + _SLACK:
        raise ScoreError(
            f"model {card.name} gave the score {scores.max():g}, needed 0 to 1.",
            hint="is the card's activation right? sigmoid turns logits into probabilities.",
        )
    scale = {"pixels": 1.0, "normalised": float(card.input.size_px), "cells": float(card.output_stride_px)}
    unit = scale[rule.coordinates]
    axes = (0, 1) if rule.axis_order == "yx" else (1, 0)
    centre = np.stack([row, col], axis=1) * float(card.output_stride_px)
    if "offsets" in outputs:
        centre += _map(outputs, "offsets", 2, cells, card)[list(axes)][:, row, col].T * unit
    else:
        centre += card.output_stride_px / 2
    half = np.full_like(centre, rule.point_px / 2)
    if "sizes" in outputs:
        half = _map(outputs, "sizes", 2, cells, card)[list(axes)][:, row, col].T * unit / 2
    boxes = np.concatenate([centre - half, centre + half], axis=1)
    _refuse_nan(boxes, "box", card)
    _refuse_boxes(boxes, card)
    return Found(boxes, np.clip(scores, 0, 1).astype(np.float32), label)


def _map(outputs: Mapping[str, np.ndarray], role: str, channels: int, cells: int, card: Card) -> np.ndarray:
    values = np.asarray(_one_tile(outputs[role], 3, role, card), np.float64)
    if values.shape != (channels, cells, cells):
        raise _shape_error(card, role, outputs[role], f"[{channels}, {cells}, {cells}]")
    return values


def _highest(values: np.ndarray, reach: int) -> np.ndarray:
    """Where no cell within ``reach`` is higher; of a plateau the first in reading order, per class."""
    rows, cols = values.shape[1:]
    padded = np.pad(values, ((0, 0), (reach, reach), (reach, reach)), constant_values=-np.inf)
    highest = np.ones(values.shape, bool)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            other = padded[:, reach + dy : reach + dy + rows, reach + dx : reach + dx + cols]
            if (dy, dx) < (0, 0):
                highest &= values > other
            elif (dy, dx) > (0, 0):
                highest &= values >= other
    return highest


# --- onto the slide ------------------------------------------------------------------------------


def candidates(found: Found, tile: TileView, card: Card) -> Objects:
    """The objects of a tile on the slide, best first.

    What a border of the tile cut, and what the next tile shows as well and more of, is left to that tile. So every
    object that is no longer than the overlap is kept whole, by at least one tile.
    """
    rule = _rule(card)
    limit = np.array([min(tile.side_px, tile.slide_px[0] - tile.y), min(tile.side_px, tile.slide_px[1] - tile.x)])
    clipped = np.clip(found.boxes, 0, np.tile(limit, 2))
    cut, seen_better = _cut_sides(clipped, tile, rule.border_px)
    kept = np.flatnonzero((clipped[:, 2:] > clipped[:, :2]).all(axis=1) & ~seen_better)
    found, clipped, cut = found.take(kept), clipped[kept], cut[kept]
    frames, bits = np.empty((0, 4), np.int32), np.empty(0, np.uint8)
    if found.masks is not None:
        frames = np.concatenate([np.floor(clipped[:, :2]), np.ceil(clipped[:, 2:])], axis=1).astype(np.int32)
        bits = (
            cut_masks(found.masks, frames)
            if found.masks.dtype == bool
            else paste_masks(found.masks, found.boxes, frames, rule.mask_threshold)
        )
        frames = frames + np.tile(np.array([tile.y, tile.x], np.int32), 2)
    objects = Objects(
        boxes=clipped + (tile.y, tile.x, tile.y, tile.x),
        scores=found.scores,
        labels=found.labels.astype(np.uint16),
        tiles=np.full(len(kept), tile.number, np.int64),
        cut=cut,
        extra=np.empty((len(kept), 0), np.float32),
        frames=frames,
        bits=bits,
    )
    return _with_area(objects) if objects.outlined else objects


def _with_area(objects: Objects) -> Objects:
    """Those whose mask has a pixel at all."""
    return objects.take(mask_areas(objects.frames, objects.bits) > 0)


def _cut_sides(boxes: np.ndarray, tile: TileView, border_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Sides on which the tile cut each box (n,) uint8, and whether the next tile there shows all of it and more."""
    far = tile.side_px
    touches = np.stack([boxes[:, 0] <= border_px, boxes[:, 1] <= border_px], axis=1)
    touches = np.concatenate([touches, boxes[:, 2:] >= far - border_px], axis=1)
    within = tile.overlap_px - border_px  # of the strip that both tiles show, clear of the other's border
    inside = np.concatenate([boxes[:, 2:] < within, boxes[:, :2] > far - within], axis=1)
    cut = np.zeros(len(boxes), np.uint8)
    better = np.zeros(len(boxes), bool)
    for k, side in enumerate(_SIDES):
        if tile.open & side:
            cut |= np.where(touches[:, k], side, 0).astype(np.uint8)
        if tile.beside & side:
            better |= touches[:, k] & inside[:, k]
    return cut, better


def with_extra(objects: Objects, extra: np.ndarray) -> Objects:
    """The objects with the columns of a second stage."""
    return replace(objects, extra=extra.astype(np.float32))


# --- refusals ------------------------------------------------------------------------------------


def _one_tile(values: Any, ndim: int, role: str, card: Card) -> np.ndarray:
    """The array without its leading axis of tiles."""
    array = np.asarray(values)
    if array.ndim == ndim + 1 and array.shape[0] == 1:
        return array[0]
    if array.ndim != ndim:
        raise _shape_error(card, role, array, f"{ndim} axes, or one more of size 1 in front")
    return array


def _shape_error(card: Card, role: str, got: Any, needed: str) -> CardError:
    shape = ", ".join(str(size) for size in np.shape(got))
    name = getattr(card.outputs, role)
    return CardError(
        f"card and ONNX file disagree: {card.model_path.name} gave {name!r} ({role}) of shape [{shape}]; "
        f"the card of {card.name} needs {needed}",
        hint="correct the card's outputs and detection, or export the model again",
    )


def _refuse_nan(values: np.ndarray, what: str, card: Card) -> None:
    if not np.isfinite(values).all():
        kind = "NaN" if np.isnan(values).any() else "infinity"
        raise ScoreError(
            f"model {card.name} gave {kind} as a {what}; needed finite numbers.",
            hint="the ONNX file overflows on this input: try one exported as float32",
        )


def _refuse_labels(labels: np.ndarray, card: Card) -> None:
    wrong = (labels < 0) | (labels >= len(card.classes))
    if wrong.any():
        raise ScoreError(
            f"model {card.name} gave the label {labels[np.argmax(wrong)]} (background left out), "
            f"needed 0 to {len(card.classes) - 1}.",
            hint="do the card's classes and detection.background fit the model?",
        )


def _refuse_boxes(boxes: np.ndarray, card: Card) -> None:
    side = card.input.size_px
    reversed_ = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    outside = (boxes[:, 2:] < 0).any(axis=1) | (boxes[:, :2] > side).any(axis=1)
    for wrong, words in ((reversed_, "ends before it starts"), (outside, f"lies outside its tile of {side} px")):
        if wrong.any():
            y0, x0, y1, x1 = boxes[np.argmax(wrong)]
            raise ScoreError(
                f"model {card.name} gave a box that {words}: x {x0:.1f} to {x1:.1f}, y {y0:.1f} to {y1:.1f}.",
                hint="do the card's detection.boxes and detection.coordinates say what the model gives?",
            )
