"""Objects that overlap: found by a spatial grid, measured where both were seen, decided by one pass over all of them.

Candidates of a detector come from tiles that overlap. Two of them are compared in their *common view*, the part of
the slide that both show: a piece cut off by a tile's border agrees there with the object that another tile sees whole.
"""

import heapq

import numpy as np

from wsikernels._jit import jit
from wsikernels.nms import _cells

IOU, IOS = 0, 1  # shared part of both, or of the smaller


def overlapping_pairs(
    boxes: np.ndarray, views: np.ndarray, labels: np.ndarray, above: float, measure: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of objects that overlap more than ``above`` in their common view.

    Args:
        boxes: (n, 4) y0, x0, y1, x1, finite, not reversed.
        views: (n, 4) what was seen when the object was found: its tile.
        labels: (n,) only objects of one label are compared.
        above: Least overlap, exclusive, 0–1.
        measure: ``IOU`` or ``IOS``.

    Returns:
        (k, 2) int64, the lower index first, in order; and (k,) float64, how much.
    """
    boxes = np.ascontiguousarray(boxes, np.float64).reshape(-1, 4)
    views = np.ascontiguousarray(views, np.float64).reshape(-1, 4)
    labels = np.ascontiguousarray(labels, np.int64)
    if views.shape != boxes.shape or labels.shape != (len(boxes),):
        raise ValueError(f"{len(boxes)} boxes need as many views and labels, not {len(views)} and {len(labels)}")
    if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError("boxes must be finite, and none may end before it starts")
    if len(boxes) < 2:
        return np.empty((0, 2), np.int64), np.empty(0)
    cells, shape = _cells(boxes)
    starts, members = _bins(cells, shape)
    empty_pairs, empty = np.empty((0, 2), np.int64), np.empty(0)
    facts = (boxes, views, labels, cells, starts, members, shape[1], float(above), measure)
    count = _pairs(*facts, empty_pairs, empty)
    pairs, overlaps = np.empty((count, 2), np.int64), np.empty(count)
    _pairs(*facts, pairs, overlaps)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return pairs[order], overlaps[order]


@jit()
def _bins(cells, shape):
    """Members of each cell of the grid, as starts and one list."""
    starts = np.zeros(shape[0] * shape[1] + 1, np.int64)
    for n in range(len(cells)):
        for row in range(cells[n, 0], cells[n, 2] + 1):
            for col in range(cells[n, 1], cells[n, 3] + 1):
                starts[row * shape[1] + col + 1] += 1
    for cell in range(len(starts) - 1):
        starts[cell + 1] += starts[cell]
    fill = starts[:-1].copy()
    members = np.empty(starts[-1], np.int64)
    for n in range(len(cells)):
        for row in range(cells[n, 0], cells[n, 2] + 1):
            for col in range(cells[n, 1], cells[n, 3] + 1):
                cell = row * shape[1] + col
                members[fill[cell]] = n
                fill[cell] += 1
    return starts, members


@jit()
def box_overlap(one, two, view_one, view_two, measure):
    """Overlap of two boxes in their common view."""
    top, left = max(view_one[0], view_two[0]), max(view_one[1], view_two[1])
    bottom, right = min(view_one[2], view_two[2]), min(view_one[3], view_two[3])
    a0, a1 = max(one[0], top), max(one[1], left)
    a2, a3 = min(one[2], bottom), min(one[3], right)
    b0, b1 = max(two[0], top), max(two[1], left)
    b2, b3 = min(two[2], bottom), min(two[3], right)
    common = max(0.0, min(a2, b2) - max(a0, b0)) * max(0.0, min(a3, b3) - max(a1, b1))
    if common <= 0:
        return 0.0
    size_a, size_b = (a2 - a0) * (a3 - a1), (b2 - b0) * (b3 - b1)
    whole = min(size_a, size_b) if measure == 1 else size_a + size_b - common
    return common / whole


@jit()
def _pairs(boxes, views, labels, cells, starts, members, columns, above, measure, pairs, overlaps):
    """Count the pairs, and write them where ``pairs`` has room."""
    found = 0
    room = len(pairs)
    for cell in range(len(starts) - 1):
        row, col = cell // columns, cell % columns
        for k in range(starts[cell], starts[cell + 1]):
            i = members[k]
            for m in range(k + 1, starts[cell + 1]):
                j = members[m]
                if labels[i] != labels[j]:
                    continue
                # a pair that shares several cells is counted in the first of them
                if max(cells[i, 0], cells[j, 0]) != row or max(cells[i, 1], cells[j, 1]) != col:
                    continue
                overlap = box_overlap(boxes[i], boxes[j], views[i], views[j], measure)
                if overlap > above:
                    if found < room:
                        pairs[found, 0], pairs[found, 1] = min(i, j), max(i, j)
                        overlaps[found] = overlap
                    found += 1
    return found


def neighbours(count: int, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs as lists of neighbours: starts (count + 1,), the other of each pair, and the pair's number."""
    pairs = np.ascontiguousarray(pairs, np.int64).reshape(-1, 2)
    one = np.concatenate([pairs[:, 0], pairs[:, 1]])
    two = np.concatenate([pairs[:, 1], pairs[:, 0]])
    number = np.tile(np.arange(len(pairs)), 2)
    order = np.lexsort((two, one))
    starts = np.searchsorted(one[order], np.arange(count + 1))
    return starts.astype(np.int64), two[order], number[order]


def suppress(order: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Greedy suppression: in ``order``, each object that is still there takes its neighbours away.

    Returns:
        (n,) int64: for each object the one that it went to; itself where it stays.
    """
    starts, others, _ = neighbours(len(order), pairs)
    return _suppress(np.ascontiguousarray(order, np.int64), starts, others)


@jit()
def _suppress(order, starts, others):
    owners = np.full(len(order), -1, np.int64)
    for n in order:
        if owners[n] >= 0:
            continue
        owners[n] = n
        for k in range(starts[n], starts[n + 1]):
            if owners[others[k]] < 0:
                owners[others[k]] = n
    return owners


def soften(
    scores: np.ndarray, pairs: np.ndarray, overlaps: np.ndarray, hard: np.ndarray, sigma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Soft suppression (Bodla et al. 2017, Gaussian): the best lowers its neighbours by exp(−overlap² / sigma).

    Args:
        scores: (n,) finite, 0–1; equal scores: the lower index goes first.
        pairs, overlaps: Who is compared, and how much they share.
        hard: (k,) bool: pairs of which the lower goes altogether (two views of one object).
        sigma: Of the Gaussian.

    Returns:
        (n,) float64 scores; and owners as :func:`suppress` gives them, for the hard pairs.
    """
    starts, others, number = neighbours(len(scores), pairs)
    given = np.ascontiguousarray(scores, np.float64).copy()
    facts = np.ascontiguousarray(overlaps, np.float64), np.ascontiguousarray(hard, np.bool_)
    return _soften(given, starts, others, number, *facts, float(sigma))


@jit()
def _soften(scores, starts, others, number, overlaps, hard, sigma):
    count = len(scores)
    owners = np.full(count, -1, np.int64)
    heap = [(-scores[n], n) for n in range(count)]
    heapq.heapify(heap)
    while len(heap):
        score, n = heapq.heappop(heap)
        if owners[n] >= 0 or -score != scores[n]:
            continue  # gone, or lowered since it was put there
        owners[n] = n
        for k in range(starts[n], starts[n + 1]):
            other = others[k]
            if owners[other] >= 0:
                continue
            if hard[number[k]]:
                owners[other] = n
                continue
            overlap = overlaps[number[k]]
            scores[other] *= np.exp(-overlap * overlap / sigma)
            heapq.heappush(heap, (-scores[other], other))
    return scores, owners
