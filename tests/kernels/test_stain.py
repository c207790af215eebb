"""Stain kernels: one level from float64, exact under cutting, honest where the pixels do not determine a stain."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracles
from tests.pictures import position_coded, tissue_like
from wsikernels.clahe import margin_px
from wsikernels.clahe_stain import clahe_haematoxylin, stain_channel
from wsikernels.reinhard import apply_reinhard, reinhard_terms
from wsikernels.stain import (
    HAEMATOXYLIN_DAB,
    HAEMATOXYLIN_EOSIN,
    DensityTables,
    apply_density,
    concentrations,
    mixing_matrix,
    optical_density,
    unit_rows,
    with_residual,
)  # fmt: skip
from wsikernels.stain_fit import Unfit, fit_macenko, fit_reinhard, fit_vahadane, stained, standard_fit

ANOTHER = np.array([[0.55, 0.75, 0.36], [0.20, 0.85, 0.48]])


def mixture(count, vectors, strengths, seed=0):
    """Pixels (n, 3) uint8 of two stains in sparse random amounts: many of one alone, some of both."""
    rng = np.random.default_rng(seed)
    amounts = rng.gamma(2.0, 0.25, (count, 2)) * strengths
    kind = rng.integers(0, 3, count)
    amounts[kind == 0, 0] *= 0.02
    amounts[kind == 1, 1] *= 0.02
    return np.clip(np.rint(255 * np.exp(-amounts @ unit_rows(vectors))), 0, 255).astype(np.uint8)


def degrees(a, b):
    return np.degrees(np.arccos(np.clip((unit_rows(a) * unit_rows(b)).sum(axis=1), -1, 1)))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 13)),
    ratios=st.tuples(st.floats(0.3, 2.5), st.floats(0.3, 2.5)),
    keep=st.booleans(),
    strided=st.booleans(),
)
def test_restaining_agrees_with_float64(shape, ratios, keep, strided):
    big = position_coded(shape[0] + 4, shape[1] + 4)
    src = big[2:-2, 1:-3] if strided else big[: shape[0], : shape[1]].copy()
    tables = DensityTables(mixing_matrix(HAEMATOXYLIN_EOSIN, ANOTHER, ratios, keep))
    exact = oracles.restained(src, HAEMATOXYLIN_EOSIN, ANOTHER, ratios, keep)
    assert np.abs(apply_density(src, tables) - exact).max() <= 0.8


def test_every_value_survives_the_identity():
    grey = np.arange(256, dtype=np.uint8).repeat(3).reshape(8, 32, 3)
    assert np.array_equal(apply_density(grey, DensityTables(np.eye(3))), grey)


def test_the_same_stain_changes_nothing_and_glass_stays_glass():
    src = tissue_like(40, 50)
    assert np.array_equal(apply_density(src, DensityTables(mixing_matrix(ANOTHER, ANOTHER))), src)
    white = np.full((2, 3, 3), 255, np.uint8)
    assert np.array_equal(apply_density(white, DensityTables(mixing_matrix(ANOTHER, HAEMATOXYLIN_DAB, (3, 3)))), white)


def test_without_the_residual_every_colour_is_a_mixture():
    pen = np.array([[[20, 90, 200], [30, 160, 60]]], np.uint8)  # blue and green ink
    matrix = mixing_matrix(HAEMATOXYLIN_EOSIN, HAEMATOXYLIN_EOSIN, keep_residual=False)
    amounts = oracles.density(pen).reshape(-1, 3) @ matrix @ np.linalg.inv(with_residual(HAEMATOXYLIN_EOSIN))
    assert np.allclose(amounts[:, 2], 0)
    assert not np.array_equal(apply_density(pen, DensityTables(matrix)), pen)


def test_deconvolution_agrees_with_skimage_on_the_stains():
    from skimage.color import hed_from_rgb, separate_stains

    pixels = np.maximum(position_coded(20, 30).reshape(-1, 3), 1)
    ours = concentrations(optical_density(pixels), np.linalg.inv(hed_from_rgb)[[0, 1]])
    basis = with_residual(np.linalg.inv(hed_from_rgb)[[0, 1]])
    theirs = separate_stains(pixels.reshape(20, 30, 3), np.linalg.inv(basis)).reshape(-1, 3) * -np.log(1e-6)
    assert np.abs(np.maximum(ours, 0) - theirs).max() < 1e-3  # they cut negative amounts off


@pytest.mark.parametrize("fit", [fit_macenko, fit_vahadane])
@pytest.mark.parametrize("kind", ["he", "hdab"])
def test_fits_find_the_stains_that_were_mixed(fit, kind):
    vectors = {"he": ANOTHER, "hdab": np.array([[0.70, 0.63, 0.33], [0.33, 0.55, 0.77]])}[kind]
    found = fit(mixture(12_000, vectors, (1.0, 0.8)), kind)
    assert degrees(found.matrix, vectors).max() < 6
    assert found.matrix.min() >= 0
    expected = np.percentile(concentrations(optical_density(mixture(12_000, vectors, (1.0, 0.8))), vectors), 99, axis=0)
    assert np.allclose(found.strengths, expected[:2], rtol=0.3)


@pytest.mark.parametrize("strengths", [(1.0, 0.8), (1.6, 0.4), (0.5, 1.2)])
def test_vahadane_agrees_with_its_definition(strengths):
    pixels = mixture(3000, ANOTHER, strengths)
    densities = oracles.density(pixels[stained(pixels)])
    start = HAEMATOXYLIN_EOSIN / np.linalg.norm(HAEMATOXYLIN_EOSIN, axis=1, keepdims=True)
    assert np.allclose(fit_vahadane(pixels).matrix, oracles.vahadane(densities, start), atol=1e-6)


@pytest.mark.parametrize("strengths", [(1.0, 0.8), (1.6, 0.4), (0.5, 1.2)])
def test_macenko_agrees_with_its_definition(strengths):
    pixels = mixture(6000, ANOTHER, strengths)
    vectors, amounts = oracles.macenko(oracles.density(pixels[stained(pixels)]))
    found = fit_macenko(pixels)
    assert np.allclose(found.matrix, vectors, atol=1e-9)
    assert np.allclose(found.strengths, amounts, rtol=1e-9)
    assert np.allclose(standard_fit(pixels).strengths, _strong(pixels, HAEMATOXYLIN_EOSIN), rtol=1e-9)


def _strong(pixels, vectors):
    densities = oracles.density(pixels[stained(pixels)])
    return np.percentile(np.linalg.lstsq(unit_rows(vectors).T, densities.T, rcond=None)[0], 99, axis=1)


def test_macenko_is_near_torchstains():
    torchstain = pytest.importorskip("torchstain.numpy.normalizers")
    pixels = mixture(14_400, ANOTHER, (1.0, 0.8)).reshape(120, 120, 3)
    theirs = torchstain.NumpyMacenkoNormalizer()
    theirs.fit(pixels, Io=255)
    assert degrees(fit_macenko(pixels.reshape(-1, 3)).matrix, theirs.HERef.T).max() < 3


def test_fits_do_not_depend_on_the_order_of_pixels():
    pixels = mixture(5000, ANOTHER, (1.0, 0.8))
    turned = fit_macenko(np.ascontiguousarray(pixels[::-1]))
    assert np.allclose(turned.matrix, fit_macenko(pixels).matrix, atol=1e-9)
    assert fit_macenko(pixels) == fit_macenko(pixels.copy())


def test_pen_blood_and_black_do_not_move_the_fit():
    clean = mixture(8000, ANOTHER, (1.0, 0.8))
    rng = np.random.default_rng(1)
    inks = {
        "blue": (30, 60, 190, 12),
        "green": (20, 120, 70, 12),
        "red cells": (200, 90, 40, 12),
        "black": (25, 25, 28, 3),
    }
    dirt = {
        name: np.clip([r, g, b] + rng.normal(0, noise, (400, 3)), 0, 255).astype(np.uint8)
        for name, (r, g, b, noise) in inks.items()
    }
    shares = {name: stained(pixels).mean() for name, pixels in dirt.items()}
    assert max(shares.values()) < 0.15, shares  # noise carries some across
    assert max(stained(dirt[name], "hdab").mean() for name in ("blue", "green", "black")) < 0.3
    dirty = np.concatenate([clean, *dirt.values()])
    assert degrees(fit_macenko(dirty).matrix, fit_macenko(clean).matrix).max() < 2


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((5000, 3), 244, np.uint8), "only 0 of 5,000 sampled pixels are stained"),
        (mixture(900, ANOTHER, (1, 1)), "are stained"),
        (np.tile(np.array([[150, 80, 140]], np.uint8), (5000, 1)), "only one stain|not|hardly"),
        (mixture(6000, [[0.2, 0.7, 0.7], [0.25, 0.68, 0.7]], (1, 1)), "only one stain|from the measured|emit|hardly"),
    ],
    ids=["glass", "few", "one colour", "one stain"],
)
@pytest.mark.parametrize("fit", [fit_macenko, fit_vahadane])
def test_what_does_not_determine_two_stains_is_refused_in_words(fit, pixels, reason):
    with pytest.raises(Unfit, match=reason):
        fit(pixels)


def test_standard_vectors_always_fit():
    assert standard_fit(np.empty((0, 3), np.uint8)).strengths == (1.0, 1.0)
    fitted = standard_fit(mixture(5000, HAEMATOXYLIN_EOSIN, (1.0, 0.8)))
    assert np.allclose(fitted.matrix, unit_rows(HAEMATOXYLIN_EOSIN))
    assert min(fitted.strengths) > 0.5


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), glass_l=st.floats(60, 100), gain=st.floats(0.5, 2))
def test_reinhard_agrees_with_float64(seed, glass_l, gain):
    src = tissue_like(9, 14, seed)
    mean, deviation = np.array([62.0, 24, -15]), np.array([14.0, 9, 7])
    target = mean + [4, -6, 9], deviation * gain
    got = apply_reinhard(src, reinhard_terms(mean, deviation, *target, glass_l))
    assert np.abs(got - oracles.reinhard(src, mean, deviation, *target, glass_l)).max() <= 0.65


def test_reinhard_reaches_the_target_and_leaves_glass():
    src = tissue_like(60, 70)
    tissue = oracles.lab(src)[src.min(axis=2) < 200]
    found = fit_reinhard(tissue)
    terms = reinhard_terms(found.mean, found.deviation, (60, 20, -15), (8, 6, 5), 100)
    after = oracles.lab(apply_reinhard(src, terms))[src.min(axis=2) < 200]
    assert np.abs(after.mean(axis=0) - (60, 20, -15)).max() < 2.5
    white = np.full((3, 4, 3), 250, np.uint8)
    assert np.array_equal(
        apply_reinhard(white, reinhard_terms(found.mean, found.deviation, (40, 9, 9), (5, 5, 5), 98)), white
    )


def test_haematoxylin_channel_and_its_equalisation():
    side, vectors = 9, HAEMATOXYLIN_EOSIN
    margin = margin_px(side)
    src = tissue_like(20 + 2 * margin, 24 + 2 * margin)
    channel = stain_channel(src, vectors)
    amounts = concentrations(optical_density(src.reshape(-1, 3)), vectors)[:, 0].reshape(channel.shape)
    assert np.abs(channel - np.minimum(255 * np.exp(-amounts), 255)).max() <= 0.8
    box = (margin, margin, margin + 20, margin + 24)
    got = clahe_haematoxylin(src, (0, 0), side, 3.0, 240, box, vectors)
    inner = (slice(box[0], box[2]), slice(box[1], box[3]))
    shifted = np.floor(channel[inner] + oracles.clahe_shifts(channel, (0, 0), side, 3.0, 240, box) + 0.5)
    change = -np.log(np.maximum(np.clip(shifted, 0, 255), 0.4) / np.maximum(channel[inner], 0.4))
    exact = oracles.density(src[inner]) + change[..., None] * unit_rows(vectors)[0]
    close = np.abs(got - np.minimum(255 * np.exp(-exact), 255))
    assert np.mean(close <= 1) > 0.999  # one level of the 8-bit channel, where float32 rounds the other way, is more
    assert close.max() <= 4
    assert not np.array_equal(got, src[inner])


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 19), corner=st.integers(-50, 9000))
def test_haematoxylin_whole_equals_blocks(cut, corner):
    margin = margin_px(7)
    src = tissue_like(20 + 2 * margin, 16 + 2 * margin)
    box = (corner + margin, corner + margin, corner + margin + 20, corner + margin + 16)
    whole = clahe_haematoxylin(src, (corner, corner), 7, 3.0, 240, box, ANOTHER)
    upper = clahe_haematoxylin(
        src[: cut + 2 * margin], (corner, corner), 7, 3.0, 240, (*box[:2], box[0] + cut, box[3]), ANOTHER
    )
    lower = clahe_haematoxylin(src[cut:], (corner + cut, corner), 7, 3.0, 240, (box[0] + cut, *box[1:]), ANOTHER)
    assert np.array_equal(whole, np.concatenate([upper, lower]))


@pytest.mark.parametrize(
    "vectors",
    [[[1, 1, 1], [1, 1, 1]], [[1, 0, 0], [0, 0, 0]], [[1, 0, 0], [0, np.nan, 0]], [[1, 2, 3]]],
    ids=["same", "zero", "nan", "one"],
)
def test_singular_stains(vectors):
    with pytest.raises(ValueError, match="stain vectors"):
        mixing_matrix(np.array(vectors, float), HAEMATOXYLIN_EOSIN)


def test_bad_input():
    with pytest.raises(ValueError, match="usable stain matrix"):
        DensityTables(np.eye(3) * 1e6)
    with pytest.raises(ValueError, match="src must be uint8"):
        apply_density(np.zeros((3, 3, 3), np.float32), DensityTables(np.eye(3)))
    with pytest.raises(ValueError, match="out must be"):
        apply_density(np.zeros((3, 3, 3), np.uint8), DensityTables(np.eye(3)), np.zeros((3, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="above zero"):
        reinhard_terms([50, 0, 0], [0, 1, 1], [50, 0, 0], [1, 1, 1], 95)
    for terms in (np.zeros(3), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="seven finite terms"):
            apply_reinhard(np.zeros((3, 3, 3), np.uint8), terms)
    with pytest.raises(ValueError, match="stains must be one of"):
        fit_macenko(np.zeros((9, 3), np.uint8), "giemsa")
    with pytest.raises(ValueError, match="pixels must be uint8"):
        fit_macenko(np.zeros((9, 4), np.uint8))
    with pytest.raises(Unfit, match="sampled pixels are tissue"):
        fit_reinhard(np.zeros((5, 3)))


def test_empty_picture():
    assert apply_density(np.empty((0, 4, 3), np.uint8), DensityTables(np.eye(3))).shape == (0, 4, 3)
