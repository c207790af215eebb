"""Non-maximum suppression of boxes and masks: greedy, global, by a spatial grid.

A greedy chain (a suppresses b, so b cannot suppress c) can run across a whole slide; it is not local. Blocks therefore
only produce candidates, and one pass over all of them decides. The grid makes a pass linear in the number of boxes:
a candidate is compared only with kept boxes in the cells that it covers.
"""

import numpy as np

from wsikernels._jit import jit

_CELLS_PER_BOX = 16  # on average at most; cells grow until that holds


def nms_boxes(boxes: np.ndarray, scores: np.ndarray, iou: float = 0.5, labels: np.ndarray | None = None) -> np.ndarray:
    """Indices of the kept boxes, best first.

    Args:
        boxes: (n, 4) y0, x0, y1, x1, finite, not reversed.
        scores: (n,) finite; equal scores: the lower index goes first.
        iou: A box is dropped if its overlap with a kept one is more than this share of their union, 0–1.
        labels: (n,) classes; only boxes of one class suppress each other. All one class if not given.

    Returns:
        (k,) int64.
    """
    boxes, order, labels = _prepared(boxes, scores, iou, labels)
    if len(boxes) == 0:
        return order
    cells, shape = _cells(boxes)
    empty = np.empty(0, np.uint8)
    return order[_suppress(boxes, cells, shape, labels, float(iou), empty, np.empty(0, np.int64))]


def nms_masks(
    boxes: np.ndarray,
    masks: list[np.ndarray],
    scores: np.ndarray,
    iou: float = 0.5,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """As :func:`nms_boxes`, the overlap counted in pixels of the objects' masks.

    Args:
        boxes: (n, 4) whole numbers; box k is the frame of ``masks[k]``, bool (y1 − y0, x1 − x0).
    """
    given = np.asarray(boxes).reshape(-1, 4)
    if len(masks) != len(given):
        raise ValueError(f"{len(given)} boxes need as many masks, not {len(masks)}")
    if (given != np.floor(given)).any():
        raise ValueError("the boxes of masks must be whole numbers")
    for k, mask in enumerate(masks):
        if mask.dtype != bool:
            raise ValueError(f"mask {k} must be bool, not {mask.dtype}")
        if mask.shape != (given[k, 2] - given[k, 0], given[k, 3] - given[k, 1]):
            raise ValueError(f"mask {k} has the shape {mask.shape}, its box is {given[k].tolist()}")
    boxes, order, labels = _prepared(boxes, scores, iou, labels)
    if len(boxes) == 0:
        return order
    flat = np.concatenate([np.ascontiguousarray(masks[k], np.uint8).ravel() for k in order])
    starts = np.concatenate([[0], np.cumsum([masks[k].size for k in order])]).astype(np.int64)
    cells, shape = _cells(boxes)
    return order[_suppress(boxes, cells, shape, labels, float(iou), flat, starts)]


def _prepared(
    boxes: np.ndarray, scores: np.ndarray, iou: float, labels: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes best first, their order, their labels; checked."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    scores = np.asarray(scores, np.float64)
    labels = np.zeros(len(boxes), np.int64) if labels is None else np.asarray(labels, np.int64)
    if scores.shape != (len(boxes),) or labels.shape != (len(boxes),):
        raise ValueError(f"{len(boxes)} boxes need as many scores and labels, not {scores.shape} and {labels.shape}")
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()) or (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError("boxes and scores must be finite, and no box may end before it starts")
    if not 0 <= iou <= 1:
        raise ValueError(f"the largest overlap must lie between 0 and 1, not {iou}")
    order = np.argsort(-scores, kind="stable")
    return np.ascontiguousarray(boxes[order]), order, np.ascontiguousarray(labels[order])


def _cells(boxes: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Grid cells that each box covers: (n, 4) int64 first row, first column, last row, last column; and the grid."""
    corner = boxes[:, :2].min(axis=0)
    sides = boxes[:, 2:] - boxes[:, :2]
    extent = boxes[:, 2:].max(axis=0) - corner
    side = max(float(np.median(sides)), float(extent.max()) / 4096, 1e-9)
    while True:
        cells = np.floor((boxes - np.tile(corner, 2)) / side).astype(np.int64)
        if np.prod(cells[:, 2:] - cells[:, :2] + 1, axis=1).sum() <= _CELLS_PER_BOX * len(boxes):
            return cells, (int(cells[:, 2].max()) + 1, int(cells[:, 3].max()) + 1)
        side *= 2


@jit()
def _size(boxes, masks, starts, n):
    if len(starts) == 0:
        return (boxes[n, 2] - boxes[n, 0]) * (boxes[n, 3] - boxes[n, 1])
    total = 0.0
    for k in range(starts[n], starts[n + 1]):
        total += np.float64(masks[k])
    return total


@jit()
def _common(boxes, masks, starts, one, two):
    """Area, or number of pixels, that two objects share."""
    y0, x0 = max(boxes[one, 0], boxes[two, 0]), max(boxes[one, 1], boxes[two, 1])
    y1, x1 = min(boxes[one, 2], boxes[two, 2]), min(boxes[one, 3], boxes[two, 3])
    if y1 <= y0 or x1 <= x0:
        return 0.0
    if len(starts) == 0:
        return (y1 - y0) * (x1 - x0)
    total = 0.0
    wide_one, wide_two = np.int64(boxes[one, 3] - boxes[one, 1]), np.int64(boxes[two, 3] - boxes[two, 1])
    for y in range(np.int64(y0), np.int64(y1)):
        at_one = starts[one] + (y - np.int64(boxes[one, 0])) * wide_one - np.int64(boxes[one, 1])
        at_two = starts[two] + (y - np.int64(boxes[two, 0])) * wide_two - np.int64(boxes[two, 1])
        for x in range(np.int64(x0), np.int64(x1)):
            total += np.float64(masks[at_one + x] & masks[at_two + x])
    return total


@jit()
def _suppress(boxes, cells, shape, labels, limit, masks, starts):
    count = len(boxes)
    total = 0
    for n in range(count):
        total += (cells[n, 2] - cells[n, 0] + 1) * (cells[n, 3] - cells[n, 1] + 1)
    heads = np.full(shape[0] * shape[1], -1, np.int64)  # per cell a chain of kept boxes
    links, members = np.empty(total, np.int64), np.empty(total, np.int64)
    kept, sizes = np.empty(count, np.int64), np.empty(count, np.float64)
    many = used = 0
    for n in range(count):
        sizes[n] = _size(boxes, masks, starts, n)
        beaten = False
        for row in range(cells[n, 0], cells[n, 2] + 1):
            for col in range(cells[n, 1], cells[n, 3] + 1):
                link = heads[row * shape[1] + col]
                while link >= 0 and not beaten:
                    other = members[link]
                    if labels[other] == labels[n]:
                        common = _common(boxes, masks, starts, n, other)
                        beaten = common > limit * (sizes[n] + sizes[other] - common)
                    link = links[link]
                if beaten:
                    break
            if beaten:
                break
        if beaten:
            continue
        kept[many] = n
        many += 1
        for row in range(cells[n, 0], cells[n, 2] + 1):
            for col in range(cells[n, 1], cells[n, 3] + 1):
                cell = row * shape[1] + col
                members[used], links[used] = n, heads[cell]
                heads[cell] = used
                used += 1
    return kept[:many]
