"""Overlapping pairs, suppression and packed masks against their slow twins."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsikernels.masks import byte_starts, cut_masks, mask_areas, mask_overlaps, paste_masks, unpack
from wsikernels.nms import nms_boxes
from wsikernels.pairs import IOS, IOU, overlapping_pairs, soften, suppress


def shared(one: np.ndarray, two: np.ndarray, measure: int) -> float:
    """Overlap of two boxes, by the book."""
    height = min(one[2], two[2]) - max(one[0], two[0])
    width = min(one[3], two[3]) - max(one[1], two[1])
    if height <= 0 or width <= 0:
        return 0.0
    common = height * width
    sizes = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, two)]
    return common / (min(sizes) if measure == IOS else sum(sizes) - common)


def clipped(box: np.ndarray, view: np.ndarray) -> np.ndarray:
    low, high = np.maximum(box[:2], view[:2]), np.minimum(box[2:], view[2:])
    return np.concatenate([low, np.maximum(low, high)])


@given(seed=st.integers(0, 10_000), count=st.integers(0, 60), measure=st.sampled_from([IOU, IOS]))
@settings(max_examples=60, deadline=None)
def test_pairs_are_those_of_every_two(seed: int, count: int, measure: int) -> None:
    random = np.random.default_rng(seed)
    corner = random.integers(0, 60, (count, 2)).astype(float)
    boxes = np.concatenate([corner, corner + random.integers(1, 25, (count, 2))], axis=1)
    tile = random.integers(0, 2, (count, 2)) * 32.0
    views = np.concatenate([tile, tile + 64], axis=1)
    labels = random.integers(0, 2, count)
    above = float(random.choice([0.0, 0.3, 0.6]))
    expected = {}
    for i, j in itertools.combinations(range(count), 2):
        view = clipped(views[i], views[j])
        overlap = shared(clipped(boxes[i], view), clipped(boxes[j], view), measure)
        if labels[i] == labels[j] and overlap > above:
            expected[i, j] = overlap
    pairs, overlaps = overlapping_pairs(boxes, views, labels, above, measure)
    assert [tuple(p) for p in pairs.tolist()] == sorted(expected)
    assert overlaps.tolist() == pytest.approx([expected[tuple(p)] for p in pairs.tolist()])


def test_suppression_is_that_of_the_nms_kernel() -> None:
    random = np.random.default_rng(5)
    corner = random.integers(0, 200, (400, 2)).astype(float)
    boxes = np.concatenate([corner, corner + random.integers(5, 40, (400, 2))], axis=1)
    scores = random.random(400).round(2)
    everywhere = np.tile([-1e9, -1e9, 1e9, 1e9], (400, 1))
    pairs, _ = overlapping_pairs(boxes, everywhere, np.zeros(400), 0.4, IOU)
    order = np.argsort(-scores, kind="stable")
    owners = suppress(order, pairs)
    kept = order[owners[order] == order]
    assert kept.tolist() == nms_boxes(boxes, scores, 0.4).tolist()
    assert 50 < len(kept) < 350
    assert set(owners) == set(kept)


def test_soft_suppression_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    pairs, overlaps = np.array([[0, 1], [1, 2], [0, 3]]), np.array([0.5, 0.4, 0.9])
    hard = np.array([False, False, True])
    softened, owners = soften(scores, pairs, overlaps, hard, 0.5)
    first = 0.8 * math.exp(-(0.5**2) / 0.5)  # 0.485: now behind the third
    assert softened.tolist() == pytest.approx([0.9, first * math.exp(-(0.4**2) / 0.5), 0.7, 0.6])
    assert owners.tolist() == [0, 1, 2, 0]


def test_boxes_that_are_none_are_refused() -> None:
    bad = np.array([[0, 0, 1, np.nan], [0, 0, 1, 1]])
    with pytest.raises(ValueError, match="finite"):
        overlapping_pairs(bad, bad, np.zeros(2), 0.5, IOU)
    with pytest.raises(ValueError, match="as many"):
        overlapping_pairs(bad, bad[:1], np.zeros(2), 0.5, IOU)


def by_hand(mask: np.ndarray, box: np.ndarray, frame: np.ndarray, threshold: float) -> np.ndarray:
    """A mask stretched over its box and asked at each pixel's centre."""
    height, width = mask.shape
    out = np.zeros((frame[2] - frame[0], frame[3] - frame[1]), bool)
    for y, x in np.ndindex(*out.shape):
        v = (frame[0] + y + 0.5 - box[0]) / (box[2] - box[0]) * height - 0.5
        u = (frame[1] + x + 0.5 - box[1]) / (box[3] - box[1]) * width - 0.5
        v, u = min(max(v, 0), height - 1), min(max(u, 0), width - 1)
        rows, cols = np.interp(v, np.arange(height), np.arange(height)), u
        low, left = int(rows), int(cols)
        below, right = min(low + 1, height - 1), min(left + 1, width - 1)
        a, b = rows - low, cols - left
        value = (mask[low, left] * (1 - b) + mask[low, right] * b) * (1 - a)
        value += (mask[below, left] * (1 - b) + mask[below, right] * b) * a
        out[y, x] = value >= threshold
    return out


def test_masks_are_stretched_over_their_boxes() -> None:
    random = np.random.default_rng(1)
    boxes = np.array([[3.2, 4.7, 31.9, 22.1], [-3.0, 2.0, 9.5, 40.25], [10.0, 10.0, 11.0, 12.0]])
    frames = np.array([[3, 4, 32, 23], [0, 2, 10, 40], [10, 10, 11, 12]])
    masks = random.random((3, 7, 9)).astype(np.float32)
    bits = paste_masks(masks, boxes, frames, 0.5)
    starts = byte_starts(frames)
    assert starts.tolist() == [0, 69, 117, 118]
    for k, frame in enumerate(frames):
        shape = (frame[2] - frame[0], frame[3] - frame[1])
        mine = unpack(bits[starts[k] : starts[k + 1]], shape)
        assert np.array_equal(mine, by_hand(masks[k].astype(float), boxes[k], frame, 0.5))


@pytest.mark.parametrize("measure", [IOU, IOS])
def test_overlaps_of_masks_where_both_look(measure: int) -> None:
    random = np.random.default_rng(2)
    canvas = random.random((5, 40, 50)) < 0.6
    frames = np.array([[0, 0, 17, 23], [5, 6, 30, 41], [12, 0, 40, 29], [30, 30, 33, 33], [1, 1, 3, 3]])
    bits = cut_masks(canvas, frames)
    views = np.array([[0, 0, 30, 30], [4, 5, 40, 50], [8, 0, 40, 40], [0, 0, 40, 50], [0, 0, 40, 50]], float)
    whole = np.zeros_like(canvas)
    for k, (y0, x0, y1, x1) in enumerate(frames):
        whole[k, y0:y1, x0:x1] = canvas[k, y0:y1, x0:x1]
    assert mask_areas(frames, bits).tolist() == whole.sum(axis=(1, 2)).tolist()
    pairs = np.array(list(itertools.combinations(range(5), 2)))
    expected = []
    for i, j in pairs:
        y0, x0, y1, x1 = clipped(views[i], views[j]).astype(int)
        one, two = whole[i, y0:y1, x0:x1], whole[j, y0:y1, x0:x1]
        common = (one & two).sum()
        size = min(one.sum(), two.sum()) if measure == IOS else (one | two).sum()
        expected.append(common / size if common else 0.0)
    assert max(expected) > 0.1
    assert mask_overlaps(pairs, frames, bits, views, measure).tolist() == pytest.approx(expected)
