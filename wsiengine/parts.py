"""Connected parts of a mask that is too large to label at once: strip by strip, joined where they touch.

Labels are four bytes a pixel, and a whole glass slide has tens of millions. Here a strip's labels live only while they
are looked at, and are made again when they are needed again; what stays is a table of parts. The result depends on the
mask alone, not on the strips.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from wsiengine.scratch import IN_MEMORY, Scratch, strips

Rows = Callable[[slice], np.ndarray]  # rows of a mask → (rows, cols) bool


@dataclass(frozen=True, eq=False)
class Parts:
    """The connected parts of a mask, numbered from 1; 0 is what is not in the mask.

    Attributes:
        count: Parts, the 0 counted in.
        area: (count,) int64: pixels.
        at_border: (count,) bool: touches the border of the array.
    """

    count: int
    area: np.ndarray
    at_border: np.ndarray
    _shape: tuple[int, int]
    _mask: Rows
    _connectivity: int
    _tables: dict[int, np.ndarray]  # by first row of a strip: its own labels → numbers
    _scratch: Scratch

    def labels(self, rows: slice) -> np.ndarray:
        """Numbers of ``rows``: (rows, cols) int32. Any rows; those of one of :func:`strips` come cheapest."""
        found = []
        for strip in strips(self._shape):
            first, stop = max(rows.start, strip.start), min(rows.stop, strip.stop)
            if first < stop:
                mask = self._mask(strip).view(np.uint8)
                own = cv2.connectedComponents(mask, connectivity=self._connectivity)[1]  # as in label_parts
                found.append(self._tables[strip.start][own[first - strip.start : stop - strip.start]])
        return np.concatenate(found) if len(found) > 1 else found[0]

    def chosen(self, wanted: np.ndarray) -> np.ndarray:
        """The parts with ``wanted`` (count,) bool → (rows, cols) bool, an array of its own."""
        wanted = wanted.copy()
        wanted[0] = False
        out = self._scratch.zeros(self._shape, bool)
        for strip in strips(self._shape):
            out[strip] = wanted[self.labels(strip)]
        return out


def label_parts(shape: tuple[int, int], mask: Rows, connectivity: int = 8, *, scratch: Scratch = IN_MEMORY) -> Parts:
    """Find the parts of a mask.

    Args:
        shape: (rows, cols) of the whole mask.
        mask: Gives any of its rows; the same each time.
        connectivity: 8: pixels that touch at a corner belong together; 4: only at an edge.
        scratch: Makes masks of chosen parts.
    """
    offsets, areas, borders, pairs = {}, [np.zeros(1, np.int64)], [np.zeros(1, bool)], []
    total, above = 1, np.zeros(shape[1], np.int32)
    for strip in strips(shape):
        labels, stats = _label(mask(strip), connectivity)
        offsets[strip.start] = total - 1
        pairs.append(_touching(above, np.where(labels[0], labels[0] + (total - 1), 0), connectivity))
        areas.append(stats[1:, cv2.CC_STAT_AREA].astype(np.int64))
        borders.append(_at_border(stats[1:], strip, shape))
        total += len(stats) - 1
        above = np.where(labels[-1], labels[-1] + (total - len(stats)), 0)
    number, count = _joined(np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int32), total)
    area = np.bincount(number, weights=np.concatenate(areas), minlength=count).astype(np.int64)
    border = np.bincount(number, weights=np.concatenate(borders), minlength=count) > 0
    ends = [*list(offsets.values())[1:], total - 1]
    tables = {
        start: np.concatenate([[np.int32(0)], number[first + 1 : stop + 1]])
        for (start, first), stop in zip(offsets.items(), ends, strict=True)
    }
    return Parts(count, area, border, shape, mask, connectivity, tables, scratch)


def keep(
    shape: tuple[int, int],
    mask: Rows,
    choose: Callable[[Parts], np.ndarray],
    connectivity: int = 8,
    *,
    scratch: Scratch = IN_MEMORY,
) -> np.ndarray:
    """The parts of a mask that ``choose`` (parts → (count,) bool) says yes to: (rows, cols) bool."""
    parts = label_parts(shape, mask, connectivity, scratch=scratch)
    return parts.chosen(choose(parts)) if parts.count > 1 else scratch.zeros(shape, bool)


def _label(mask: np.ndarray, connectivity: int) -> tuple[np.ndarray, np.ndarray]:
    """OpenCV's labels of a strip, int32, and its statistics."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=connectivity)
    return labels, stats


def _at_border(stats: np.ndarray, strip: slice, shape: tuple[int, int]) -> np.ndarray:
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP] + strip.start
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    return (left == 0) | (top == 0) | (right == shape[1]) | (bottom == shape[0])


def _touching(above: np.ndarray, below: np.ndarray, connectivity: int) -> np.ndarray:
    """(n, 2): numbers of two neighbouring rows that touch."""
    pairs = [np.stack([above, below], axis=1)]
    if connectivity == 8:
        pairs += [np.stack([above[1:], below[:-1]], axis=1), np.stack([above[:-1], below[1:]], axis=1)]
    both = np.concatenate(pairs)
    both = both[(both > 0).all(axis=1)]
    return both[np.append(True, (both[1:] != both[:-1]).any(axis=1))[: len(both)]]  # of a run of the same, the first


def _joined(pairs: np.ndarray, total: int) -> tuple[np.ndarray, int]:
    """Numbers of ``total`` provisional labels after joining ``pairs``: (total,) int32 in order of appearance, how many.

    A label is joined to a smaller one only, so that one pass in order finds every part's first label.
    """
    parent = list(range(total))

    def root(label: int) -> int:
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    for one, other in pairs.tolist():
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    first = np.fromiter((root(label) for label in range(total)), np.int64, total)
    number = np.cumsum(first == np.arange(total), dtype=np.int32) - 1  # of those that are their part's first label
    return number[first], int(number[-1]) + 1
