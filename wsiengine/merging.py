"""Several views of one object become one: the single global pass over all candidates of a slide.

Tiles overlap, so most objects are found more than once. Those that were seen whole are merged by the card's rule. What
a tile's border cut is compared where both tiles look (:mod:`wsikernels.pairs`): it goes where a whole view covers it,
unless that view is so much weaker that it would not be shown; then the view goes. Pieces that no whole view explains
belong to objects larger than the overlap, and those that agree are united. A united outline is complete where pieces go
on beyond each other's borders; a united box stays marked as ``cut``.

The result depends on the candidates alone: they come in canonical order, by tile and then by rank within it.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np

from wsiengine.grid import TileGrid
from wsiengine.models.detection import Detection, Merge
from wsiengine.objects import BOTTOM, LEFT, RIGHT, TOP, Objects, joined
from wsikernels.components import joined_labels
from wsikernels.masks import mask_overlaps, unpack
from wsikernels.pairs import IOS, IOU, overlapping_pairs, soften, suppress

_SAME_PX = 1.5  # edges of two views of one object may differ by so much
_EVERYTHING = np.array([-1e9, -1e9, 1e9, 1e9])
_EDGES = ((TOP, 0, np.min), (LEFT, 1, np.min), (BOTTOM, 2, np.max), (RIGHT, 3, np.max))


def merge(candidates: Objects, rule: Detection, grid: TileGrid) -> Objects:
    """The objects of a slide, each once, ordered by place.

    Args:
        candidates: Of all tiles, ordered by tile, then best first.
        rule: The card's.
        grid: Where the tiles lie.
    """
    if not len(candidates):
        return candidates
    tiles = _tile_boxes(candidates.tiles, grid)
    pairs, overlaps = _pairs(candidates, tiles, rule.merge)
    owners, scores = _owners(candidates, pairs, overlaps, rule)
    candidates = replace(candidates, scores=scores.astype(np.float32))
    whole_groups = rule.merge.method == "union"
    groups = _groups(candidates, owners, pairs[overlaps > rule.merge.above], whole_groups)
    objects = _united(candidates, groups)
    objects = _with_central_extra(objects, candidates, groups[owners], tiles)
    kept = objects.take(objects.scores >= rule.minimum_score)
    return kept.take(np.lexsort((kept.labels, *kept.boxes.T[::-1])))


def _tile_boxes(tiles: np.ndarray, grid: TileGrid) -> np.ndarray:
    """(n, 4) float64: the box of each candidate's tile."""
    row, col = np.divmod(tiles, grid.cols.count)
    corner = np.stack([row, col], axis=1) * float(grid.stride_px)
    return np.concatenate([corner, corner + grid.tile_px], axis=1)


def _pairs(candidates: Objects, tiles: np.ndarray, rule: Merge) -> tuple[np.ndarray, np.ndarray]:
    """Candidates that overlap, and how much: by their masks where there are any, else by their boxes."""
    views = np.where(candidates.cut[:, None] > 0, tiles, _EVERYTHING)  # of a whole object nothing is out of sight
    measure = IOS if rule.overlap == "ios" else IOU
    labels = np.zeros(len(candidates), np.int64) if rule.across_classes else candidates.labels
    least = 0.0 if candidates.outlined or rule.method == "soft_nms" else rule.above
    pairs, overlaps = overlapping_pairs(candidates.boxes, views, labels, least, measure)
    if candidates.outlined:
        overlaps = mask_overlaps(pairs, candidates.frames, candidates.bits, views, measure)
    used = overlaps > (0 if rule.method == "soft_nms" else rule.above)
    if not rule.within_tile:
        used &= candidates.tiles[pairs[:, 0]] != candidates.tiles[pairs[:, 1]]
    return pairs[used], overlaps[used]


def _owners(
    candidates: Objects, pairs: np.ndarray, overlaps: np.ndarray, detection: Detection
) -> tuple[np.ndarray, np.ndarray]:
    """For each candidate the one that it goes to (itself where it stays), and the scores, as soft_nms leaves them."""
    rule = detection.merge
    owners, scores = np.arange(len(candidates)), candidates.scores.astype(np.float64)
    cut = candidates.cut[pairs] > 0
    clear = overlaps > rule.above
    both_whole = ~cut.any(axis=1)
    if rule.method == "nms":
        order = np.argsort(-scores, kind="stable")
        owners = suppress(order, pairs[both_whole & clear])
    elif rule.method == "soft_nms":
        other_tile = candidates.tiles[pairs[:, 0]] != candidates.tiles[pairs[:, 1]]
        softened = soften(scores, pairs[both_whole], overlaps[both_whole], (other_tile & clear)[both_whole], rule.sigma)
        scores, owners = softened
    mixed = np.flatnonzero((cut.sum(axis=1) == 1) & clear)
    whole, piece = np.where(cut[mixed, 0], pairs[mixed, 1], pairs[mixed, 0]), pairs[mixed][cut[mixed]]
    return _with_pieces(candidates, owners, (scores, detection), (whole, piece, overlaps[mixed])), scores


def _with_pieces(
    candidates: Objects,
    owners: np.ndarray,
    strength: tuple[np.ndarray, Detection],
    mixed: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> np.ndarray:
    """Owners, with each piece at the view that best explains it, and hopeless views at the piece they contradict."""
    (scores, detection), (whole, piece, overlaps) = strength, mixed
    hopeless = scores[whole] < np.minimum(detection.show_score, scores[piece] / 2)
    covered = _coverage(candidates.boxes[whole], candidates.boxes[piece]) > detection.merge.above
    for way, a, b in ((covered & ~hopeless, piece, whole), (hopeless, whole, piece)):
        order = np.lexsort((overlaps[way], owners[b[way]] == b[way]))  # of several, the last assigned counts
        still = owners[a[way]] == a[way]
        order = order[still[order]]
        owners[a[way][order]] = owners[b[way][order]]
    while (owners[owners] != owners).any():  # who went to one that went, goes on with it
        owners = owners[owners]
    return owners


def _coverage(boxes: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """(n,) float64: the share of each part that its box covers."""
    corner = np.maximum(boxes[:, :2], parts[:, :2])
    end = np.minimum(boxes[:, 2:], parts[:, 2:])
    return np.maximum(end - corner, 0).prod(axis=1) / np.maximum((parts[:, 2:] - parts[:, :2]).prod(axis=1), 1e-9)


def _groups(candidates: Objects, owners: np.ndarray, pairs: np.ndarray, whole_too: bool) -> np.ndarray:
    """(n,) int64: the number, from 0, of the object that each candidate is a part of; −1 for those that went.

    Pieces that overlap are one object; whole views as well, where the rule unites them.
    """
    stays = owners == np.arange(len(owners))
    cut = (candidates.cut[pairs] > 0).sum(axis=1)
    same_kind = (cut == 2) | (whole_too & (cut == 0))
    linked = pairs[same_kind & stays[pairs].all(axis=1)]
    number = joined_labels(len(owners), linked + 1)[1:]
    return np.where(stays, np.unique(np.where(stays, number, 0), return_inverse=True)[1] - (not stays.all()), -1)


def _united(candidates: Objects, groups: np.ndarray) -> Objects:
    """One object per group, in the order of their numbers."""
    members = np.flatnonzero(groups >= 0)
    order = members[np.argsort(groups[members], kind="stable")]
    starts = np.searchsorted(groups[order], np.arange(groups.max() + 2))
    sizes = np.diff(starts)
    alone = order[starts[:-1][sizes == 1]]
    several = [_one(candidates.take(order[a:b])) for a, b in pairwise(starts) if b - a > 1]
    place = np.argsort(np.concatenate([np.flatnonzero(sizes == 1), np.flatnonzero(sizes > 1)]), kind="stable")
    return joined([candidates.take(alone), *several]).take(place)


def _one(views: Objects) -> Objects:
    """The union of several views: outline and box of all, class and score of the best."""
    best = views.take(np.array([int(np.argmax(views.scores))]))
    box = np.concatenate([views.boxes[:, :2].min(axis=0), views.boxes[:, 2:].max(axis=0)])
    agree = np.abs(views.boxes - box).max() <= _SAME_PX
    left = 0  # sides that no view shows the end of
    for side, column, extreme in _EDGES:
        at_end = np.abs(views.boxes[:, column] - extreme(views.boxes[:, column])) <= _SAME_PX
        if (views.cut[at_end] & side).all():
            left |= side
    if not views.outlined and not agree:
        left = int(np.bitwise_or.reduce(views.cut))
    united = replace(best, boxes=box[None], cut=np.array([left], np.uint8))
    return replace(united, **_mask_union(views)) if views.outlined else united


def _mask_union(views: Objects) -> dict[str, np.ndarray]:
    y0, x0 = views.frames[:, :2].min(axis=0)
    y1, x1 = views.frames[:, 2:].max(axis=0)
    canvas = np.zeros((y1 - y0, x1 - x0), bool)
    starts = views.starts()
    for k, (top, left, bottom, right) in enumerate(views.frames.tolist()):
        mask = unpack(views.bits[starts[k] : starts[k + 1]], (bottom - top, right - left))
        canvas[top - y0 : bottom - y0, left - x0 : right - x0] |= mask
    return {"frames": np.array([[y0, x0, y1, x1]], np.int32), "bits": np.packbits(canvas)}


def _with_central_extra(objects: Objects, candidates: Objects, owner: np.ndarray, tiles: np.ndarray) -> Objects:
    """What a second stage said about the view that has each object nearest to the middle of its tile."""
    if not candidates.extra.shape[1]:
        return objects
    middle = (tiles[:, :2] + tiles[:, 2:]) / 2
    off = np.abs(objects.centres[owner] - middle).max(axis=1)
    order = np.lexsort((off, owner))
    first = np.searchsorted(owner[order], np.arange(len(objects)))
    return replace(objects, extra=candidates.extra[order[first]])
