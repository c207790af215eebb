"""Labelled regions of a map: grown into a mask, their holes filled, the small ones dropped.

Results depend on the whole map only. Maps of slides are large: nothing here takes more than one more map of labels and
one of bytes, and whoever calls may say where these come from (``zeros``).
"""

import numpy as np

from wsikernels._jit import jit
from wsikernels.components import Zeros, label_components


def grow(labels: np.ndarray, mask: np.ndarray, steps: int, *, in_place: bool = False) -> np.ndarray:
    """Labels spread over the mask, cell by cell through edges, at most ``steps`` cells far.

    A cell takes the label that reaches it first; of several, that of the neighbour that comes first in reading order.

    Args:
        labels: int32 (rows, cols), 0 = none.
        mask: bool (rows, cols): where labels may go.
        steps: Cells.
        in_place: Change ``labels``, which must be contiguous, and return it.

    Returns:
        int32 (rows, cols); what had a label keeps it.
    """
    if labels.shape != mask.shape or labels.dtype != np.int32 or mask.dtype != bool:
        raise ValueError(f"needed int32 labels and a bool mask of one shape, not {labels.shape} and {mask.shape}")
    if in_place:
        _check(labels)
    out = labels if in_place else labels.copy(order="C")
    _grow(out, np.ascontiguousarray(mask), steps)
    return out


def fill_holes(labels: np.ndarray, limit: int, zeros: Zeros = np.zeros) -> None:
    """Holes of at most ``limit`` cells that lie within one region, and away from the map's edge, become part of it.

    Args:
        labels: int32 (rows, cols), 0 = none, contiguous; regions are connected through edges. Changed in place.
        limit: Cells.
        zeros: Makes maps.
    """
    _check(labels)
    empty = np.equal(labels, 0, out=zeros(labels.shape, bool))
    holes, count = label_components(empty, eight=True, zeros=zeros)
    _fill(labels, holes, count, limit)


def keep_large(labels: np.ndarray, least: int) -> int:
    """Regions of fewer than ``least`` cells go; the others are numbered anew by their first cell in reading order.

    Args:
        labels: int32 (rows, cols), 0 = none, contiguous. Changed in place.
        least: Cells.

    Returns:
        How many are left.
    """
    _check(labels)
    return int(_keep(labels, int(labels.max(initial=0)), least))


def add_alone(labels: np.ndarray, mask: np.ndarray, zeros: Zeros = np.zeros) -> None:
    """Connected parts of the mask (through edges) without any label get one of their own.

    Args:
        labels: int32 (rows, cols), 0 = none, contiguous, none outside the mask. Changed in place.
        mask: bool (rows, cols).
        zeros: Makes maps.
    """
    _check(labels)
    free = np.equal(labels, 0, out=zeros(labels.shape, bool))
    free &= mask
    parts, count = label_components(free, eight=False, zeros=zeros)
    if count:
        _add(labels, parts, count, int(labels.max(initial=0)))


def _check(labels: np.ndarray) -> None:
    if labels.dtype != np.int32 or labels.ndim != 2 or not labels.flags.c_contiguous:
        raise ValueError(f"needed contiguous int32 labels (rows, cols), not {labels.dtype} {labels.shape}")


@jit()
def _grow(labels, mask, steps):
    rows, cols = labels.shape
    flat, flat_mask = labels.reshape(rows * cols), mask.reshape(rows * cols)
    front = _front(flat, flat_mask, rows, cols)
    for _ in range(steps):
        reached = np.empty(4 * len(front), np.int64)
        count = 0
        for at in front:
            for side in range(4):
                to = _beside(at, side, rows, cols)
                if to >= 0 and flat_mask[to] and flat[to] == 0:
                    flat[to] = flat[at]
                    reached[count] = to
                    count += 1
        if count == 0:
            break
        front = np.sort(reached[:count])


@jit()
def _beside(at, side, rows, cols):
    """The cell above, left, right or below; −1 beyond the map."""
    if side == 0:
        return at - cols if at >= cols else -1
    if side == 1:
        return at - 1 if at % cols > 0 else -1
    if side == 2:
        return at + 1 if at % cols < cols - 1 else -1
    return at + cols if at < (rows - 1) * cols else -1


@jit()
def _front(flat, flat_mask, rows, cols):
    """Labelled cells beside one that a label may go to."""
    front = np.empty(1024, np.int64)
    count = 0
    for at in range(rows * cols):
        if flat[at] == 0:
            continue
        for side in range(4):
            to = _beside(at, side, rows, cols)
            if to >= 0 and flat_mask[to] and flat[to] == 0:
                if count == len(front):
                    longer = np.empty(2 * count, np.int64)
                    longer[:count] = front
                    front = longer
                front[count] = at
                count += 1
                break
    return front[:count]


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
    for y in range(rows):
        for x in range(cols):
            hole = holes[y, x]
            if hole > 0 and owner[hole] > 0 and size[hole] <= limit:
                labels[y, x] = owner[hole]


@jit()
def _keep(labels, most, least):
    rows, cols = labels.shape
    size = np.zeros(most + 1, np.int64)
    for y in range(rows):
        for x in range(cols):
            size[labels[y, x]] += 1
    number = np.zeros(most + 1, np.int32)
    count = 0
    for y in range(rows):
        for x in range(cols):
            label = labels[y, x]
            if label > 0 and size[label] >= least:
                if number[label] == 0:
                    count += 1
                    number[label] = count
                labels[y, x] = number[label]
            else:
                labels[y, x] = 0
    return count


@jit()
def _add(labels, parts, count, most):
    rows, cols = labels.shape
    beside = np.zeros(count + 1, np.bool_)  # parts that touch a label: they were out of its reach, and stay without
    for y in range(rows):
        for x in range(cols):
            part = parts[y, x]
            if part == 0:
                continue
            for dy, dx in ((-1, 0), (0, -1), (0, 1), (1, 0)):
                if 0 <= y + dy < rows and 0 <= x + dx < cols and labels[y + dy, x + dx] > 0:
                    beside[part] = True
    for y in range(rows):
        for x in range(cols):
            part = parts[y, x]
            if part > 0 and not beside[part]:
                labels[y, x] = most + part
