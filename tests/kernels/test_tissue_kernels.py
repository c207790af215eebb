"""Tissue kernels: against obvious twins, OpenCV, SciPy and scikit-image."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage import filters

from tests import oracles
from tests.pictures import position_coded, tissue_like
from wsikernels.tissue import (
    closed,
    density_levels,
    dilate,
    erode,
    focus_map,
    histogram,
    ink_mask,
    opened,
    otsu_level,
    otsu_level_trimmed,
    saturation_levels,
    triangle_level,
)  # fmt: skip

COUNTS = st.lists(st.integers(0, 50), min_size=2, max_size=40).map(lambda v: np.array(v, np.int64))


def test_density_and_saturation_levels():
    src = position_coded(30, 40)
    exact = oracles.density(src).mean(axis=2) * 255 / 2
    assert np.abs(density_levels(src) - np.minimum(exact, 255)).max() <= 0.51
    most, least = src.max(axis=2).astype(float), src.min(axis=2)
    assert np.array_equal(saturation_levels(src), np.floor(255 * (most - least) / np.maximum(most, 1) + 0.5))
    assert np.abs(saturation_levels(src) - cv2.cvtColor(src, cv2.COLOR_RGB2HSV)[..., 1].astype(int)).max() <= 1


def test_histograms_of_blocks_add_up():
    levels = position_coded(20, 31, 1)[..., 0]
    parts = histogram(levels[:7]) + histogram(levels[7:, :9]) + histogram(levels[7:, 9:])
    assert np.array_equal(parts, histogram(levels))
    assert histogram(levels, levels > 90)[:91].sum() == 0


@given(COUNTS)
def test_otsu_agrees_with_its_definition(counts):
    assert otsu_level(counts) == oracles.otsu(counts)


def test_otsu_second_opinion():
    levels = tissue_like(60, 70)[..., 1]
    assert otsu_level(histogram(levels)) == cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)[0]


def test_trimmed_otsu_withstands_ink():
    rng = np.random.default_rng(0)
    levels = np.concatenate([rng.normal(230, 4, 9000), rng.normal(190, 5, 400), np.full(90, 3)])
    counts = histogram(np.clip(levels, 0, 255).astype(np.uint8))
    assert otsu_level(counts) < 150  # ink against all else
    assert 200 < otsu_level_trimmed(counts) < 220
    assert otsu_level_trimmed(counts, 0.0) == otsu_level(counts)


def test_triangle_is_near_skimages():
    rng = np.random.default_rng(1)
    levels = np.clip(np.concatenate([rng.normal(235, 3, 20000), rng.uniform(60, 230, 900)]), 0, 255).astype(np.uint8)
    assert abs(triangle_level(histogram(levels)) - filters.threshold_triangle(levels)) <= 3
    assert triangle_level(np.zeros(256, np.int64)) == 0


@given(seed=st.integers(0, 99), cell=st.integers(1, 5), shape=st.tuples(st.integers(1, 3), st.integers(1, 4)))
def test_focus(seed, cell, shape):
    grey = position_coded(shape[0] * cell + 2, shape[1] * cell + 2, 1, seed)[..., 0]
    assert np.allclose(focus_map(grey, cell), oracles.laplacian_variance(grey, cell))


def test_focus_tells_blur_and_ignores_blocks():
    sharp = tissue_like(66, 98)[..., 1]
    blurred = cv2.GaussianBlur(sharp, (0, 0), 2.0)
    assert focus_map(blurred, 16).mean() < 0.1 * focus_map(sharp, 16).mean()
    whole = focus_map(sharp, 16)
    assert np.array_equal(whole[:, 2:5], focus_map(sharp[:, 32 : 32 + 3 * 16 + 2], 16))


def test_ink_and_tissue_are_told_apart():
    inks = {"blue": (30, 60, 190), "green": (20, 120, 70), "black": (25, 25, 28), "red": (220, 40, 30)}
    for name, colour in inks.items():
        assert ink_mask(np.full((2, 2, 3), colour, np.uint8)).all(), name
    for colour in [(150, 90, 150), (220, 130, 170), (90, 60, 120), (140, 100, 60), (245, 244, 246), (70, 40, 90)]:
        assert not ink_mask(np.full((2, 2, 3), colour, np.uint8)).any(), colour
    assert ink_mask(tissue_like(60, 60)).mean() < 0.02


@given(
    seed=st.integers(0, 99), radius=st.sampled_from([0, 1, 1.5, 2, 2.9, 5]), density=st.sampled_from([0, 0.02, 0.3, 1]),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 15)),
)  # fmt: skip
def test_dilation_is_an_exact_disc(seed, radius, density, shape):
    mask = np.random.default_rng(seed).random(shape) < density
    assert np.array_equal(dilate(mask, radius), oracles.dilated(mask, radius))
    assert np.array_equal(erode(mask, radius), ~oracles.dilated(~mask, radius))


def test_opening_and_closing_by_micrometres():
    mask = np.zeros((60, 80), bool)
    mask[10:50, 10:50] = True
    mask[30, 60:75] = True  # a thread
    mask[28:31, 20:23] = False  # a hole
    assert not opened(mask, 16.0, 8.0)[:, 55:].any()
    assert closed(mask, 24.0, 8.0)[10:50, 10:50].all()
    assert not closed(mask, 4.0, 8.0)[29, 21]


def test_bad_input():
    with pytest.raises(ValueError, match="rgb must be uint8"):
        density_levels(np.zeros((3, 3, 3)))
    with pytest.raises(ValueError, match="levels must be uint8"):
        histogram(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="one row of counts"):
        otsu_level(np.array([[1, 2]]))
    with pytest.raises(ValueError, match="tail"):
        otsu_level_trimmed(np.ones(4, int), 0.5)
    with pytest.raises(ValueError, match="cell_px"):
        focus_map(np.zeros((4, 4), np.uint8), 0)
    with pytest.raises(ValueError, match="radius"):
        dilate(np.zeros((3, 3), bool), float("nan"))
    with pytest.raises(ValueError, match="a mask is bool"):
        erode(np.zeros(3, bool), 1)
