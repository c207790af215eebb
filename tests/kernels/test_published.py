"""Recipes of published studies: against their definitions, and independent of blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from tests.pictures import position_coded, tissue_like
from wsikernels.published import (
    GREY_MATRIX,
    apply_linear,
    background_margin_px,
    colour_moments,
    demean_terms,
    grey_to_rgb,
    subtract_background,
    whiten_terms,
    whiten_tile,
    window_levels,
)  # fmt: skip


@given(sigma=st.sampled_from([0.6, 1.5, 4.0]), channels=st.integers(1, 4), seed=st.integers(0, 9))
def test_background_is_a_gaussian_mean(sigma, channels, seed):
    margin = background_margin_px(sigma)
    src = position_coded(9 + 2 * margin, 12 + 2 * margin, channels, seed)
    inner = (slice(margin, -margin), slice(margin, -margin))
    smooth = ndimage.gaussian_filter(src.astype(float), (sigma, sigma, 0), truncate=margin / sigma)[inner]
    exact = np.clip(src[inner] - smooth + 128, 0, 255)
    assert np.abs(subtract_background(src, sigma) - exact).max() <= 0.51


def test_background_whole_equals_blocks():
    margin = background_margin_px(2.0)
    src = position_coded(20 + 2 * margin, 17 + 2 * margin)
    whole = subtract_background(src, 2.0)
    left, right = src[:, : 6 + 2 * margin], src[:, 6:]
    assert np.array_equal(
        whole, np.concatenate([subtract_background(left, 2.0), subtract_background(right, 2.0)], axis=1)
    )


def test_demean_and_whiten():
    src = tissue_like(50, 60)
    mean, covariance = colour_moments(src.reshape(-1, 3))
    assert np.allclose(covariance, np.cov(src.reshape(-1, 3).T, bias=True))
    centred = src.astype(float) + demean_terms(mean)[1]
    assert np.abs(apply_linear(src, *demean_terms(mean)) - np.clip(centred, 0, 255)).max() <= 0.5
    for pca in (False, True):
        matrix, offset = whiten_terms(mean, covariance, pca)
        white = src.reshape(-1, 3) @ matrix + offset
        assert np.allclose(white.mean(axis=0), 128)
        spread = np.cov(white.T, bias=True)
        assert np.allclose(np.diag(spread), 48**2)
        assert np.allclose(spread, np.diag(np.diag(spread))) == pca
        assert np.abs(apply_linear(src, matrix, offset).reshape(-1, 3) - np.clip(white, 0, 255)).max() <= 0.5
        assert np.array_equal(whiten_tile(src, pca), apply_linear(src, matrix, offset))


@pytest.mark.parametrize("pca", [False, True])
def test_one_colour_is_not_blown_up(pca):
    tile = np.full((8, 9, 3), (200, 120, 160), np.uint8)
    assert np.array_equal(whiten_tile(tile, pca), np.full_like(tile, 128))
    grey = grey_to_rgb(position_coded(8, 9, 1)[..., 0])
    assert np.ptp(whiten_tile(grey, pca).astype(int), axis=2).max() <= 1  # grey stays grey


def test_grey():
    src = position_coded(5, 7)
    grey = apply_linear(src, GREY_MATRIX, np.zeros(3))
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert np.abs(grey[..., 1] - src @ [0.299, 0.587, 0.114]).max() <= 0.5 + 1e-9
    assert np.array_equal(grey_to_rgb(grey[..., 0]), grey)


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.float32])
def test_windowing(kind):
    raw = np.array([[0, 100, 1000, 2048, 4095]], kind)
    assert window_levels(raw, 100, 4095).tolist() == [[0, 0, 57, 124, 255]]
    assert window_levels(raw, 0, 4095)[0, 3] == 128


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: window_levels(np.zeros(3), 5, 5), "larger one"),
        (lambda: window_levels(np.array([np.nan]), 0, 5), "NaN"),
        (lambda: window_levels(np.zeros(3), 0, np.inf), "larger one"),
        (lambda: subtract_background(np.zeros((4, 4, 3), np.uint8), 3.0), "margin of 9 px"),
        (lambda: subtract_background(np.zeros((40, 40, 3)), 3.0), "must be uint8"),
        (lambda: subtract_background(np.zeros((40, 40, 3), np.uint8), np.nan), "positive number, not nan"),
        (lambda: subtract_background(np.zeros((40, 40, 3), np.uint8), np.inf), "positive number, not inf"),
        (lambda: apply_linear(np.zeros((4, 4), np.uint8), np.eye(3), np.zeros(3)), "must be uint8"),
        (lambda: apply_linear(np.zeros((4, 4, 3), np.uint8), np.eye(3), np.zeros(1)), "offset"),
        (lambda: apply_linear(np.zeros((4, 4, 3), np.uint8), np.eye(3) * np.nan, np.zeros(3)), "finite"),
        (lambda: colour_moments(np.zeros((0, 3), np.uint8)), "not empty"),
        (lambda: grey_to_rgb(np.zeros((4, 4, 3))), "two axes"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
