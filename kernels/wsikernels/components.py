"""Connected components of a mask, also across blocks: label each block, join the labels that touch, renumber.

Union–find by smallest label: the result depends on the mask only, not on the order of blocks or pairs.
"""

from collections.abc import Callable

import numpy as np

from wsikernels._jit import jit

Zeros = Callable[[tuple[int, ...], type], np.ndarray]  # how an array as large as the map is made


def label_components(mask: np.ndarray, eight: bool = True, zeros: Zeros = np.zeros) -> tuple[np.ndarray, int]:
    """Label a mask (rows, cols) bool → (labels int32, 0 is background; how many), numbered by first pixel.

    Args:
        eight: Pixels that touch at a corner belong together (else only at an edge).
        zeros: Makes the map of labels.
    """
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"a mask is bool of shape (rows, cols), not {mask.dtype} of shape {mask.shape}")
    labels = zeros(mask.shape, np.int32)
    parents, count = _provisional(np.ascontiguousarray(mask).view(np.uint8), eight, labels)
    numbers, total = _numbers(parents, count)
    _renumber(labels, numbers)
    return labels, total


def label_values(values: np.ndarray, zeros: Zeros = np.zeros) -> tuple[np.ndarray, np.ndarray]:
    """Label the parts of equal value, connected through edges, of a map (rows, cols) uint8; 0 is background.

    Args:
        zeros: Makes the map of labels.

    Returns:
        Labels int32, 1 … n by value, then by first pixel; and the value of each, uint8 (n,).
    """
    if values.ndim != 2 or values.dtype != np.uint8:
        raise ValueError(f"a map of values is uint8 (rows, cols), not {values.dtype} of shape {values.shape}")
    values, labels = np.ascontiguousarray(values), zeros(values.shape, np.int32)
    parents, count = _provisional(values, False, labels)
    numbers, total = _numbers(parents, count)
    found = _values(values, labels, numbers, total)
    order = np.argsort(found, kind="stable")
    by_value = np.zeros(total + 1, np.int32)
    by_value[order + 1] = np.arange(1, total + 1)
    _renumber(labels, by_value[numbers])
    return labels, found[order]


@jit()
def _root(parents, node):
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@jit()
def _unite(parents, one, two):
    one, two = _root(parents, one), _root(parents, two)
    if one != two:
        parents[max(one, two)] = min(one, two)
    return min(one, two)


@jit()
def _provisional(values, eight, labels):
    """Label in one pass; which labels belong together stands in the table that is returned, with their number."""
    rows, cols = values.shape
    parents = np.zeros(1024, np.int32)
    count = 0
    for y in range(rows):
        for x in range(cols):
            value = values[y, x]
            if value == 0:
                continue
            found = 0
            if x > 0 and values[y, x - 1] == value:
                found = labels[y, x - 1]
            if y > 0:
                reach = 1 if eight else 0
                for u in range(max(x - reach, 0), min(x + reach + 1, cols)):
                    if values[y - 1, u] == value:
                        found = _unite(parents, found, labels[y - 1, u]) if found else labels[y - 1, u]
            if not found:
                count += 1
                if count == len(parents):
                    longer = np.zeros(2 * count, np.int32)
                    longer[:count] = parents
                    parents = longer
                parents[count] = count
                found = count
            labels[y, x] = found
    return parents, count


@jit()
def _numbers(parents, count):
    """The final number of each provisional label, by first pixel, and how many there are."""
    numbers = np.zeros(count + 1, np.int32)
    total = 0
    for node in range(1, count + 1):  # a root is the smallest of its set, so it comes first
        root = _root(parents, node)
        if root == node:
            total += 1
            numbers[node] = total
        else:
            numbers[node] = numbers[root]
    return numbers, total


@jit()
def _renumber(labels, numbers):
    rows, cols = labels.shape
    for y in range(rows):
        for x in range(cols):
            labels[y, x] = numbers[labels[y, x]]


@jit()
def _values(values, labels, numbers, total):
    rows, cols = labels.shape
    found = np.zeros(total, np.uint8)
    for y in range(rows):
        for x in range(cols):
            if labels[y, x]:
                found[numbers[labels[y, x]] - 1] = values[y, x]
    return found


def touching_pairs(one: np.ndarray, two: np.ndarray, eight: bool = True) -> np.ndarray:
    """Labels that touch across a border, from the lines of pixels on its two sides → (k, 2) int64, unique.

    Args:
        one: (n,) labels on one side, unique over all blocks (add each block's offset); 0 is background.
        two: (n,) labels on the other side.
        eight: Corners touch, too. At the corner of four blocks give both lines one pixel more.
    """
    if one.shape != two.shape or one.ndim != 1:
        raise ValueError(f"the two sides of a border must be lines of equal length, not {one.shape} and {two.shape}")
    steps = [(one, two)]
    if eight and len(one) > 1:
        steps += [(one[1:], two[:-1]), (one[:-1], two[1:])]
    pairs = np.concatenate([np.stack(step, axis=1) for step in steps]).astype(np.int64)
    return np.unique(pairs[(pairs > 0).all(axis=1)], axis=0)


def joined_labels(count: int, pairs: np.ndarray) -> np.ndarray:
    """The joined label of every label 0 … count: (count + 1,) int64, numbered 1, 2, … by smallest member; 0 stays."""
    pairs = np.ascontiguousarray(pairs, np.int64).reshape(-1, 2)
    if len(pairs) and (pairs.min() < 1 or pairs.max() > count):
        raise ValueError(f"pairs must name labels 1 to {count}")
    return _join(count, pairs)


@jit()
def _join(count, pairs):
    parents = np.arange(count + 1)
    for k in range(len(pairs)):
        _unite(parents, pairs[k, 0], pairs[k, 1])
    numbers = np.zeros(count + 1, np.int64)
    total = 0
    for node in range(1, count + 1):
        root = _root(parents, node)
        if root == node:
            total += 1
            numbers[node] = total
        else:
            numbers[node] = numbers[root]
    return numbers


def renumbered(labels: np.ndarray) -> np.ndarray:
    """Labels numbered 1, 2, … by first pixel in reading order; 0 stays. Same type and shape."""
    values, first, inverse = np.unique(labels.ravel(), return_index=True, return_inverse=True)
    order = np.argsort(np.where(values == 0, -1, first), kind="stable")
    numbers = np.empty(len(values), labels.dtype)
    numbers[order] = np.arange(len(values)) + (0 if len(values) and values[order[0]] == 0 else 1)
    return numbers[inverse].reshape(labels.shape)
