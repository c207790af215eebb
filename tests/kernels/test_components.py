"""Components: a second opinion from SciPy, and the same objects however the mask is cut into blocks."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from wsikernels.components import joined_labels, label_components, label_values, renumbered, touching_pairs


def mask_of(seed, shape=(17, 23), density=0.55):
    return np.random.default_rng(seed).random(shape) < density


@given(
    seed=st.integers(0, 999), eight=st.booleans(), density=st.floats(0, 1),
    shape=st.tuples(st.integers(0, 12), st.integers(0, 14)),
)  # fmt: skip
def test_agrees_with_scipy(seed, eight, density, shape):
    mask = mask_of(seed, shape, density)
    labels, count = label_components(mask, eight)
    theirs, many = ndimage.label(mask, np.ones((3, 3)) if eight else None)
    assert count == many
    assert np.array_equal(labels, renumbered(theirs))


def test_a_long_chain_of_unions():
    comb = np.zeros((40, 81), bool)
    comb[:, ::2] = True
    comb[-1] = True
    assert label_components(comb)[1] == 1
    assert label_components(np.ones((9, 9), bool)[:, ::2])[1] == 1


@given(
    seed=st.integers(0, 999), eight=st.booleans(), density=st.sampled_from([0.3, 0.5, 0.6]),
    cuts=st.tuples(st.sets(st.integers(1, 16), max_size=3), st.sets(st.integers(1, 22), max_size=3)),
)  # fmt: skip
def test_whole_equals_blocks(seed, eight, density, cuts):
    mask = mask_of(seed, density=density)
    whole, many = label_components(mask, eight)
    ys, xs = ([0, *sorted(c), n] for c, n in zip(cuts, mask.shape, strict=True))
    labels, count = np.zeros(mask.shape, np.int64), 0
    for y0, y1 in pairwise(ys):
        for x0, x1 in pairwise(xs):
            part, found = label_components(mask[y0:y1, x0:x1], eight)
            labels[y0:y1, x0:x1] = np.where(part > 0, part + count, 0)
            count += found
    pairs = [touching_pairs(labels[y - 1], labels[y], eight) for y in ys[1:-1]]
    pairs += [touching_pairs(labels[:, x - 1], labels[:, x], eight) for x in xs[1:-1]]
    joined = joined_labels(count, np.concatenate([np.empty((0, 2), np.int64), *pairs]))
    assert joined.max() == many
    assert np.array_equal(renumbered(joined[labels]), whole)
    shuffled = np.concatenate([np.empty((0, 2), np.int64), *pairs[::-1]])[:, ::-1]
    assert np.array_equal(joined_labels(count, shuffled), joined)


def test_bad_input():
    with pytest.raises(ValueError, match="a mask is bool"):
        label_components(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="labels 1 to 2"):
        joined_labels(2, np.array([[1, 3]]))
    with pytest.raises(ValueError, match="equal length"):
        touching_pairs(np.zeros(3), np.zeros(4))


@given(seed=st.integers(0, 999), shape=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_parts_of_equal_value_are_those_of_each_value_in_turn(seed: int, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(seed).integers(0, 4, shape, np.uint8)
    labels, found = label_values(values)
    expected, of_each = np.zeros(values.shape, np.int32), []
    for value in range(1, 4):
        parts, count = label_components(values == value, eight=False)
        expected[parts > 0] = parts[parts > 0] + len(of_each)
        of_each += [value] * count
    np.testing.assert_array_equal(labels, expected)
    assert found.tolist() == of_each


def test_more_labels_than_the_table_begins_with() -> None:
    mask = np.zeros((99, 99), bool)
    mask[::2, ::2] = True
    labels, count = label_components(mask, eight=False)
    assert count == 2500
    assert labels[mask].tolist() == list(range(1, 2501))


@pytest.mark.parametrize("values", [np.zeros((3, 3), bool), np.zeros(3, np.uint8)])
def test_a_map_of_another_kind_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a map of values is uint8"):
        label_values(values)
