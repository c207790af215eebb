"""Suppression: what an all-pairs greedy pass keeps, and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import oracles
from wsikernels.nms import nms_boxes, nms_masks


def crowd(seed, count, spread=40.0, whole=False):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, spread, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.5, 12, (count, 2)) ** rng.choice([1, 1.4], (count, 1))], 1)
    scores = np.round(rng.random(count), 1)  # many equal ones
    return (np.rint(boxes) if whole else boxes), scores


@given(
    seed=st.integers(0, 999),
    count=st.integers(0, 40),
    iou=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]),
    classes=st.integers(1, 3),
)
def test_boxes(seed, count, iou, classes):
    boxes, scores = crowd(seed, count)
    labels = np.arange(count) % classes
    order = np.argsort(-scores, kind="stable")
    same = lambda a, b: oracles.box_iou(boxes[a], boxes[b]) if labels[a] == labels[b] else 0.0  # noqa: E731
    assert nms_boxes(boxes, scores, iou, labels).tolist() == oracles.greedy(order, same, iou)


@given(seed=st.integers(0, 999), count=st.integers(0, 20), iou=st.sampled_from([0.0, 0.2, 0.5]))
def test_masks(seed, count, iou):
    boxes, scores = crowd(seed, count, 25, whole=True)
    boxes = boxes.astype(int)
    rng = np.random.default_rng(seed)
    masks = [rng.random((b[2] - b[0], b[3] - b[1])) < 0.6 for b in boxes]
    order = np.argsort(-scores, kind="stable")
    kept = oracles.greedy(order, lambda a, b: oracles.mask_iou(boxes[a], masks[a], boxes[b], masks[b]), iou)
    assert nms_masks(boxes, masks, scores, iou).tolist() == kept


def test_a_chain_is_decided_globally():
    """a beats b, so b cannot beat c: cutting between b and c would lose c or keep b."""
    boxes = np.array([[0, 0, 10, 10], [0, 4, 10, 14], [0, 8, 10, 18]], float)
    assert nms_boxes(boxes, np.array([0.9, 0.8, 0.7]), 0.4).tolist() == [0, 2]


def test_equal_scores_keep_the_lower_index():
    boxes = np.tile([[0.0, 0, 5, 5]], (4, 1))
    assert nms_boxes(boxes, np.ones(4), 0.5).tolist() == [0]


def test_one_giant_box_among_many_small_ones():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 900, (300, 2))
    boxes = np.concatenate([corners, corners + 3], axis=1)
    boxes[7] = [0, 0, 1000, 1000]
    order = np.argsort(-np.arange(300.0), kind="stable")
    expected = oracles.greedy(order, lambda a, b: oracles.box_iou(boxes[a], boxes[b]), 0.2)
    assert nms_boxes(boxes, np.arange(300.0), 0.2).tolist() == expected


@pytest.mark.parametrize(
    ("boxes", "scores", "iou", "message"),
    [
        ([[0, 0, 1, 1]], [1, 2], 0.5, "as many scores"),
        ([[0, 0, np.nan, 1]], [1], 0.5, "finite"),
        ([[0, 0, 1, 1]], [np.inf], 0.5, "finite"),
        ([[2, 0, 1, 1]], [1], 0.5, "end before it starts"),
        ([[0, 0, 1, 1]], [1], 1.5, "between 0 and 1"),
    ],
)
def test_bad_input(boxes, scores, iou, message):
    with pytest.raises(ValueError, match=message):
        nms_boxes(np.array(boxes, float), np.array(scores, float), iou)


@pytest.mark.parametrize(
    ("box", "masks", "message"),
    [
        ([0, 0, 2, 2], [np.ones((3, 2), bool)], "mask 0 has the shape"),
        ([0, 0, 2, 2], [np.ones((2, 2), np.uint8)], "mask 0 must be bool"),
        ([0, 0, 2, 2], [np.ones((2, 2), bool)] * 2, "1 boxes need as many masks"),
        ([0.5, 0, 2.5, 2], [np.ones((2, 2), bool)], "whole numbers"),
    ],
)
def test_bad_masks(box, masks, message):
    with pytest.raises(ValueError, match=message):
        nms_masks(np.array([box]), masks, np.ones(1))


def test_no_masks():
    assert nms_masks(np.empty((0, 4)), [], np.empty(0)).tolist() == []
