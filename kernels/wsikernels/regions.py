"""Labelled regions of a map: grown into a mask, and their holes filled. Results depend on the whole map only."""

import numpy as np

from wsikernels._jit import jit
from wsikernels.components import label_components


def grow(labels: np.ndarray, mask: np.ndarray, steps: int) -> np.ndarray:
    """Labels spread over the mask, cell by cell through edges, at most ``steps`` cells far.

    A cell takes the label that reaches it first; of several, that of the neighbour that comes first in reading order.

    Args:
        labels: int32 (rows, cols), 0 = none.
        mask: bool (rows, cols): where labels may go.
        steps: Cells.

    Returns:
        int32 (rows, cols); what had a label keeps it.
    """
    if labels.shape != mask.shape or labels.dtype != np.int32 or mask.dtype != bool:
        raise ValueError(f"needed int32 labels and a bool mask of one shape, not {labels.shape} and {mask.shape}")
    return _grow(np.ascontiguousarray(labels), np.ascontiguousarray(mask), steps)


def fill_holes(labels: np.ndarray, limit: int) -> np.ndarray:
    """Holes of at most ``limit`` cells that lie within one region, and away from the map's edge, become part of it.

    Args:
        labels: int32 (rows, cols), 0 = none; regions are connected through edges.
        limit: Cells.
    """
    if labels.dtype != np.int32 or labels.ndim != 2:
        raise ValueError(f"needed int32 labels (rows, cols), not {labels.dtype} {labels.shape}")
    holes, count = label_components(labels == 0, eight=True)
    return _fill(np.ascontiguousarray(labels), holes, count, limit)


@jit()
def _grow(labels, mask, steps):
    rows, cols = labels.shape
    out = labels.copy()
    front = np.flatnonzero(out.ravel() > 0)
    flat_mask = mask.ravel()
    flat = out.ravel()
    for _ in range(steps):
        reached = np.empty(4 * len(front), np.int64)
        count = 0
        for at in front:
            y, x = at // cols, at % cols
            for side in range(4):
                if side == 0 and y > 0:
                    to = at - cols
                elif side == 1 and x > 0:
                    to = at - 1
                elif side == 2 and x < cols - 1:
                    to = at + 1
                elif side == 3 and y < rows - 1:
                    to = at + cols
                else:
                    continue
                if flat_mask[to] and flat[to] == 0:
                    flat[to] = flat[at]
                    reached[count] = to
                    count += 1
        if count == 0:
            break
        front = np.sort(reached[:count])
    return flat.reshape(rows, cols)


@jit()
def _fill(labels, holes, count, limit):
    rows, cols = labels.shape
    size = np.zeros(count + 1, np.int64)
    owner = np.zeros(count + 1, np.int32)  # the one region around a hole; −1 where there are several, or the edge
    for y in range(rows):
        for x in range(cols):
            hole = holes[y, x]
            if hole == 0:
                continue
            size[hole] += 1
            if y == 0 or x == 0 or y == rows - 1 or x == cols - 1:
                owner[hole] = -1
                continue
            for dy, dx in ((-1, 0), (0, -1), (0, 1), (1, 0)):
                found = labels[y + dy, x + dx]
                if found > 0:
                    if owner[hole] == 0:
                        owner[hole] = found
                    elif owner[hole] != found:
                        owner[hole] = -1
    out = labels.copy()
    for y in range(rows):
        for x in range(cols):
            hole = holes[y, x]
            if hole > 0 and owner[hole] > 0 and size[hole] <= limit:
                out[y, x] = owner[hole]
    return out
