"""Outlines of many small objects as packed bits: made from a network's masks, compared, and united.

Object k has a frame, the rows y0–y1 and columns x0–x1 of the slide that it lies in, and from byte ``starts[k]`` on one
bit per pixel of the frame, row by row, most significant bit first (as ``numpy.packbits`` writes them).
"""

import numpy as np

from wsikernels._jit import jit


def byte_starts(frames: np.ndarray) -> np.ndarray:
    """(n + 1,) int64: where the bits of each frame begin, each at a whole byte, and where the last end."""
    sizes = (frames[:, 2] - frames[:, 0]).astype(np.int64) * (frames[:, 3] - frames[:, 1])
    return np.concatenate([[0], np.cumsum((sizes + 7) // 8)]).astype(np.int64)


def paste_masks(masks: np.ndarray, boxes: np.ndarray, frames: np.ndarray, threshold: float) -> np.ndarray:
    """Masks that are stretched over their boxes (Mask R-CNN's 28 × 28), as packed bits of ``frames``.

    A pixel belongs to the object where the mask, interpolated linearly at its centre, reaches the threshold.

    Args:
        masks: (n, h, w) float32.
        boxes: (n, 4) float64 y0, x0, y1, x1: what each mask is stretched over.
        frames: (n, 4) int64 whole pixels, in the same coordinates.
        threshold: In the unit of the masks.
    """
    starts = byte_starts(frames)
    out = np.zeros(starts[-1], np.uint8)
    given = np.ascontiguousarray(masks, np.float32), np.ascontiguousarray(boxes, np.float64)
    _paste(*given, np.ascontiguousarray(frames, np.int64), starts, float(threshold), out)
    return out


@jit()
def _paste(masks, boxes, frames, starts, threshold, out):
    height, width = masks.shape[1], masks.shape[2]
    for n in range(len(masks)):
        step_y = height / max(boxes[n, 2] - boxes[n, 0], 1e-9)
        step_x = width / max(boxes[n, 3] - boxes[n, 1], 1e-9)
        bit = starts[n] * 8
        for y in range(frames[n, 0], frames[n, 2]):
            v = min(max((y + 0.5 - boxes[n, 0]) * step_y - 0.5, 0.0), height - 1.0)
            row = min(int(v), height - 2) if height > 1 else 0
            below = min(row + 1, height - 1)
            part_y = v - row
            for x in range(frames[n, 1], frames[n, 3]):
                u = min(max((x + 0.5 - boxes[n, 1]) * step_x - 0.5, 0.0), width - 1.0)
                col = min(int(u), width - 2) if width > 1 else 0
                right = min(col + 1, width - 1)
                part_x = u - col
                upper = masks[n, row, col] * (1 - part_x) + masks[n, row, right] * part_x
                lower = masks[n, below, col] * (1 - part_x) + masks[n, below, right] * part_x
                if upper * (1 - part_y) + lower * part_y >= threshold:
                    out[bit >> 3] |= np.uint8(128 >> (bit & 7))
                bit += 1


def cut_masks(masks: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Whole-tile masks (n, H, W) bool as packed bits of ``frames`` (n, 4), pixels of the tile."""
    parts = [np.packbits(mask[y0:y1, x0:x1]) for mask, (y0, x0, y1, x1) in zip(masks, frames.tolist(), strict=True)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def unpack(bits: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """One object's bits as a mask (rows, cols) bool."""
    return np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool)


def mask_areas(frames: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """(n,) int64: pixels of each object."""
    starts = byte_starts(frames)
    counts = np.concatenate([[0], np.cumsum(np.bitwise_count(bits), dtype=np.int64)])
    return counts[starts[1:]] - counts[starts[:-1]]


def mask_overlaps(
    pairs: np.ndarray, frames: np.ndarray, bits: np.ndarray, views: np.ndarray, measure: int
) -> np.ndarray:
    """How much the masks of each pair share in their common view (see :mod:`wsikernels.pairs`) → (k,) float64."""
    out = np.zeros(len(pairs))
    whole_views = np.stack([np.floor(views[:, k]) if k < 2 else np.ceil(views[:, k]) for k in range(4)], axis=1)
    _overlaps(
        np.ascontiguousarray(pairs, np.int64),
        np.ascontiguousarray(frames, np.int64),
        byte_starts(frames),
        np.ascontiguousarray(bits),
        np.ascontiguousarray(whole_views, np.int64),
        measure,
        out,
    )
    return out


@jit()
def _at(bits, start, frame, y, x):
    bit = (y - frame[0]) * (frame[3] - frame[1]) + x - frame[1]
    return (bits[start + (bit >> 3)] >> (7 - (bit & 7))) & 1


@jit()
def _inside(bits, start, frame, y0, x0, y1, x1):
    """Pixels of one object within a box that its frame may leave."""
    count = 0
    for y in range(max(frame[0], y0), min(frame[2], y1)):
        for x in range(max(frame[1], x0), min(frame[3], x1)):
            count += _at(bits, start, frame, y, x)
    return count


@jit()
def _overlaps(pairs, frames, starts, bits, views, measure, out):
    for k in range(len(pairs)):
        i, j = pairs[k, 0], pairs[k, 1]
        y0, x0 = max(views[i, 0], views[j, 0]), max(views[i, 1], views[j, 1])
        y1, x1 = min(views[i, 2], views[j, 2]), min(views[i, 3], views[j, 3])
        common = 0
        for y in range(max(frames[i, 0], frames[j, 0], y0), min(frames[i, 2], frames[j, 2], y1)):
            for x in range(max(frames[i, 1], frames[j, 1], x0), min(frames[i, 3], frames[j, 3], x1)):
                if _at(bits, starts[i], frames[i], y, x):
                    common += _at(bits, starts[j], frames[j], y, x)
        if common == 0:
            continue
        one = _inside(bits, starts[i], frames[i], y0, x0, y1, x1)
        two = _inside(bits, starts[j], frames[j], y0, x0, y1, x1)
        out[k] = common / (min(one, two) if measure == 1 else one + two - common)
