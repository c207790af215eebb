"""Blending, windows, the winning class: against their float64 twins."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import oracles
from wsikernels.maps import (
    blend_tiles,
    blend_weights,
    class_histogram,
    summed_area,
    window_means,
    winning_class,
)  # fmt: skip


@given(
    side=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    places=st.lists(st.tuples(st.integers(-3, 9), st.integers(-3, 9)), max_size=6),
    seed=st.integers(0, 99),
)
def test_blending(side, places, seed):
    tiles = np.random.default_rng(seed).normal(size=(len(places), *side, 2)).astype(np.float32)
    got = blend_tiles(tiles, np.array(places).reshape(-1, 2), (8, 9))
    assert np.allclose(got, oracles.blended(tiles, places, (8, 9)), rtol=1e-6, atol=1e-7, equal_nan=True)


def test_agreeing_tiles_keep_their_exact_value():
    places = np.array([[y, x] for y in (0, 2, 4) for x in (0, 3, 5)])
    tiles = np.full((9, 5, 7, 1), np.float32(0.1))
    assert (blend_tiles(tiles, places, (9, 12)) == np.float32(0.1)).all()


def test_blend_weights_are_a_tent():
    assert blend_weights(5).tolist() == [1, 2, 3, 2, 1]
    assert blend_weights(4).tolist() == [1, 2, 2, 1]


@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 11), st.integers(1, 3)), data=st.data())
def test_windows(shape, data):
    values = np.random.default_rng(shape[0]).normal(size=shape).astype(np.float32)
    windows = []
    for _ in range(data.draw(st.integers(0, 5))):
        y = sorted(data.draw(st.tuples(st.integers(0, shape[0] - 1), st.integers(0, shape[0] - 1))))
        x = sorted(data.draw(st.tuples(st.integers(0, shape[1] - 1), st.integers(0, shape[1] - 1))))
        windows.append((y[0], x[0], y[1] + 1, x[1] + 1))
    got = window_means(summed_area(values), np.array(windows).reshape(-1, 4))
    for row, (y0, x0, y1, x1) in zip(got, windows, strict=True):
        assert np.allclose(row, values[y0:y1, x0:x1].astype(np.float64).mean(axis=(0, 1)), atol=1e-6)


@pytest.mark.parametrize("window", [(0, 0, 0, 2), (0, 0, 5, 2), (-1, 0, 2, 2), (0, 3, 2, 2)])
def test_windows_outside(window):
    with pytest.raises(ValueError, match="inside the map of 4 × 6"):
        window_means(summed_area(np.zeros((4, 6, 1))), np.array([window]))


def test_winning_class():
    p = np.array([[[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]], [[np.nan] * 3, [0.0, 0.0, 1.0]]], np.float32)
    classes, confidence = winning_class(p)
    assert classes.tolist() == [[1, 0], [255, 2]]  # of equal classes the lower; 255: not analysed
    assert confidence.tolist() == [[128, 103], [0, 255]]
    assert class_histogram(classes, 3).tolist() == [1, 1, 1]


@given(seed=st.integers(0, 99), count=st.integers(1, 6))
def test_winning_class_agrees_with_numpy(seed, count):
    p = np.random.default_rng(seed).random((5, 7, count)).astype(np.float32)
    classes, confidence = winning_class(p)
    assert np.array_equal(classes, p.argmax(axis=2))
    assert np.array_equal(confidence, np.floor(1.5 + 254 * p.max(axis=2).astype(np.float64)))


def test_bad_input():
    with pytest.raises(ValueError, match="1 to 254 classes"):
        winning_class(np.zeros((2, 2, 0)))
    with pytest.raises(ValueError, match="n origins"):
        blend_tiles(np.zeros((2, 3, 3, 1), np.float32), np.zeros((1, 2)), (4, 4))
    with pytest.raises(ValueError, match="uint8"):
        class_histogram(np.zeros((2, 2)), 3)
    with pytest.raises(ValueError, match="axes"):
        summed_area(np.zeros((2, 2)))
