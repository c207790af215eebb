"""Regions of a label map against slow, obvious twins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from wsikernels.regions import add_alone, fill_holes, grow, keep_large

_masks = arrays(bool, (9, 12), elements=st.booleans())
_CROSS = ndimage.generate_binary_structure(2, 1)


def _labels(mask: np.ndarray) -> np.ndarray:
    return ndimage.label(mask)[0].astype(np.int32)


def test_by_hand() -> None:
    labels = np.zeros((3, 7), np.int32)
    labels[1, 0], labels[1, 6] = 1, 2
    mask = np.ones((3, 7), bool)
    mask[0] = False
    np.testing.assert_array_equal(
        grow(labels, mask, 2), [[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 2, 2, 2], [1, 1, 0, 0, 0, 2, 2]]
    )
    everywhere = grow(labels, mask, 99)
    np.testing.assert_array_equal(everywhere[1:], [[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 2, 2]])


@given(_masks, _masks, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_growth_reaches_what_lies_within_so_many_steps(seeds: np.ndarray, mask: np.ndarray, steps: int) -> None:
    labels = _labels(seeds & mask)
    grown = grow(labels, mask, steps)
    reached = seeds & mask
    for _ in range(steps):
        reached = ndimage.binary_dilation(reached, _CROSS) & mask
    np.testing.assert_array_equal(grown > 0, reached)
    np.testing.assert_array_equal(grown[labels > 0], labels[labels > 0])
    for label in range(1, labels.max() + 1):  # each region stays in one piece
        assert ndimage.label(grown == label)[1] == 1


@given(_masks, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_holes_are_filled_as_by_a_plain_loop(mask: np.ndarray, limit: int) -> None:
    labels = _labels(mask)
    expected = labels.copy()
    holes, count = ndimage.label(labels == 0, np.ones((3, 3)))
    for hole in range(1, count + 1):
        inside = holes == hole
        edge = inside[[0, -1]].any() or inside[:, [0, -1]].any()
        around = set(labels[ndimage.binary_dilation(inside, _CROSS) & ~inside].tolist())
        if not edge and len(around) == 1 and inside.sum() <= limit:
            expected[inside] = around.pop()
    fill_holes(labels, limit)
    np.testing.assert_array_equal(labels, expected)


@given(arrays(np.int32, (9, 12), elements=st.integers(0, 5)), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_large_regions_are_numbered_in_reading_order(labels: np.ndarray, least: int) -> None:
    given_labels = labels.copy()
    count = keep_large(labels, least)
    large = [v for v in range(1, 6) if (given_labels == v).sum() >= least]
    first = sorted(large, key=lambda v: int(np.flatnonzero(given_labels == v)[0]))
    assert count == len(large)
    for number, value in enumerate(first, start=1):
        np.testing.assert_array_equal(labels == number, given_labels == value)


@given(_masks, _masks)
@settings(max_examples=60, deadline=None)
def test_parts_without_any_label_get_one(seeds: np.ndarray, mask: np.ndarray) -> None:
    labels = _labels(seeds & mask)
    whole = _labels(mask)
    before = labels.copy()
    add_alone(labels, mask)
    np.testing.assert_array_equal(labels[before > 0], before[before > 0])
    for part in range(1, whole.max() + 1):
        inside = whole == part
        if not before[inside].any():
            assert len(set(labels[inside].tolist())) == 1
            assert labels[inside].min() > before.max()
    assert (labels[~mask] == 0).all()


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="int32"):
        grow(np.zeros((3, 3), np.int64), np.ones((3, 3), bool), 1)
    with pytest.raises(ValueError, match="contiguous"):
        fill_holes(np.zeros((4, 6), np.int32)[:, ::2], 1)
    with pytest.raises(ValueError, match="int32"):
        keep_large(np.zeros(4, np.int32), 1)
