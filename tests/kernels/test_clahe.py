"""CLAHE: agrees with its definition, is anchored to the slide, leaves glass alone; the plain form is OpenCV's."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracles
from tests.pictures import position_coded, tissue_like
from wsikernels._jit import JIT_OFF
from wsikernels.clahe import clahe_grey, clahe_lab, margin_px
from wsikernels.clahe_plain import clahe_image, clahe_image_lab
from wsikernels.lab import lightness_levels, move_lightness

SIDES = st.integers(1, 12)
CLIPS = st.sampled_from([0.5, 1.0, 2.0, 3.7, 40.0])
GLASS = st.sampled_from([1, 200, 235, 256])


def with_margin(size, side, seed, corner):
    """A picture of position-dependent tissue from ``corner``, with CLAHE's margin round a box of ``size``."""
    margin = margin_px(side)
    src = tissue_like(size[0] + 2 * margin, size[1] + 2 * margin, seed)
    box = (corner[0] + margin, corner[1] + margin, corner[0] + margin + size[0], corner[1] + margin + size[1])
    return src, box


@settings(max_examples=25, deadline=None)
@given(
    side=SIDES, clip=CLIPS, glass=GLASS, seed=st.integers(0, 99),
    size=st.tuples(st.integers(1, 14), st.integers(1, 11)),
    corner=st.tuples(st.integers(-40, 5000), st.integers(-40, 5000)),
)  # fmt: skip
def test_lab_agrees_with_the_definition(side, clip, glass, seed, size, corner):
    src, box = with_margin(size, side, seed, corner)
    got = clahe_lab(src, corner, side, clip, glass, box)
    exact = oracles.clahe_lab(src, corner, side, clip, glass, box)
    assert np.abs(got - exact).max() <= 0.6  # half a level of rounding, a tenth of arithmetic


@settings(max_examples=25, deadline=None)
@given(
    side=SIDES, clip=CLIPS, glass=GLASS, seed=st.integers(0, 99),
    size=st.tuples(st.integers(1, 14), st.integers(1, 11)),
    corner=st.tuples(st.integers(-40, 5000), st.integers(-40, 5000)),
)  # fmt: skip
def test_grey_agrees_with_the_definition(side, clip, glass, seed, size, corner):
    src, box = with_margin(size, side, seed, corner)
    src = src[..., 1]
    got = clahe_grey(src, corner, side, clip, glass, box)
    shifts = oracles.clahe_shifts(src, corner, side, clip, glass, box)
    inner = src[box[0] - corner[0] : box[2] - corner[0], box[1] - corner[1] : box[3] - corner[1]]
    assert np.abs(got - np.clip(inner + shifts, 0, 255)).max() <= 0.52


@settings(max_examples=25, deadline=None)
@given(
    side=SIDES, clip=CLIPS, glass=GLASS, seed=st.integers(0, 99),
    cut=st.tuples(st.integers(1, 13), st.integers(1, 10)),
    corner=st.tuples(st.integers(-40, 50_000), st.integers(-40, 50_000)),
)  # fmt: skip
def test_whole_equals_blocks(side, clip, glass, seed, cut, corner):
    src, box = with_margin((14, 11), side, seed, corner)
    margin = margin_px(side)
    for kernel, picture in ((clahe_lab, src), (clahe_grey, np.ascontiguousarray(src[..., 0]))):
        whole = kernel(picture, corner, side, clip, glass, box)
        pieces = np.zeros_like(whole)
        for y0, y1 in ((0, cut[0]), (cut[0], 14)):
            for x0, x1 in ((0, cut[1]), (cut[1], 11)):
                view = picture[y0 : y1 + 2 * margin, x0 : x1 + 2 * margin]  # each block with its own margin
                part = (box[0] + y0, box[1] + x0, box[0] + y1, box[1] + x1)
                at = (corner[0] + y0, corner[1] + x0)
                pieces[y0:y1, x0:x1] = kernel(view, at, side, clip, glass, part)
        assert np.array_equal(whole, pieces)


def test_glass_is_not_amplified():
    rng = np.random.default_rng(0)
    glass = rng.integers(236, 250, (120, 130, 3), dtype=np.uint8)  # noise that a plain CLAHE would blow up
    box = (48, 48, 72, 82)
    assert np.array_equal(clahe_lab(glass, (0, 0), 32, 4.0, 230, box), glass[48:72, 48:82])
    unguarded = clahe_lab(glass, (0, 0), 32, 4.0, 256, box)
    assert unguarded.std() > 2 * glass.std()


def test_contrast_fades_out_where_tissue_does():
    """One dark speck on glass is hardly moved; the same pixels in full tissue are."""
    full = tissue_like(96, 96, 3)
    full[full.min(axis=2) > 200] = (180, 90, 160)
    speck = np.full_like(full, 245)
    speck[46:50, 46:50] = full[46:50, 46:50]
    box = (46, 46, 50, 50)
    moved = [np.abs(clahe_lab(p, (0, 0), 30, 3.0, 230, box).astype(int) - full[46:50, 46:50]) for p in (speck, full)]
    assert moved[0].mean() < 0.5 * moved[1].mean()


def test_an_even_histogram_shifts_nothing():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tiled = np.tile(grey, (4, 4))
    assert np.array_equal(clahe_grey(tiled, (0, 0), 16, 2.0, 256, (24, 24, 40, 40)), tiled[24:40, 24:40])


@pytest.mark.skipif(JIT_OFF, reason="16.7 million colours, one by one")
def test_every_colour_survives_the_way_through_lab_and_has_its_exact_level():
    code = np.arange(1 << 24, dtype=np.uint32).reshape(4096, 4096)
    colours = np.stack([code & 255, (code >> 8) & 255, code >> 16], axis=-1).astype(np.uint8)
    flat = colours.reshape(-1)
    out = np.empty_like(flat)
    move_lightness(flat, np.zeros(1 << 24, np.float32), out)
    assert np.array_equal(out, flat)
    levels = np.empty((4096, 4096), np.uint8)
    lightness_levels(flat, 3 * 4096, 0, 0, levels)
    for rows in range(0, 4096, 512):
        part = slice(rows, rows + 512)
        assert np.array_equal(levels[part], oracles.lightness_level(colours[part]))


@pytest.mark.skipif(JIT_OFF, reason="too many pixels to interpret")
def test_moved_lightness_agrees_with_the_definition():
    colours = position_coded(64, 512).reshape(-1, 3)
    moves = np.random.default_rng(1).uniform(-0.5, 0.5, len(colours)).astype(np.float32)
    out = np.empty(colours.size, np.uint8)
    move_lightness(colours.reshape(-1), moves, out)
    moved = oracles.lab(colours)
    moved[:, 0] += 116 * moves
    assert np.abs(out.reshape(-1, 3) - oracles.rgb(moved)).max() <= 0.6


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 50)),
    tiles=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    clip=st.sampled_from([0.01, 1.0, 2.0, 40.0]),
    seed=st.integers(0, 99),
)
def test_plain_form_is_opencvs_bit_for_bit(shape, tiles, clip, seed):
    grey = position_coded(*shape, 1, seed)[..., 0]
    assert np.array_equal(clahe_image(grey, clip, tiles), cv2.createCLAHE(clip, tiles).apply(grey))


def test_plain_form_on_lab_is_near_opencvs():
    """OpenCV rounds L, a and b to 8 bits on the way; the bound is that rounding, not the equalisation."""
    src = tissue_like(96, 120)
    planes = cv2.cvtColor(src, cv2.COLOR_RGB2LAB)
    planes[..., 0] = cv2.createCLAHE(2.0, (4, 4)).apply(planes[..., 0])
    theirs = cv2.cvtColor(planes, cv2.COLOR_LAB2RGB).astype(int)
    difference = np.abs(clahe_image_lab(src, 2.0, (4, 4)) - theirs)
    assert np.percentile(difference, 95) <= 4
    assert difference.mean() < 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src": np.zeros((60, 60, 3), np.float64)}, "src must be uint8"),
        ({"src": np.zeros((60, 60), np.uint8)}, "src must be uint8"),
        ({"clip": 0.0}, "clip limit must be a positive number"),
        ({"clip": float("nan")}, "clip limit must be a positive number"),
        ({"region_px": 0}, "region_px must be at least 1"),
        ({"glass": 257}, "glass 1 to 256"),
        ({"region_px": 40}, "needs a margin of 60 px"),
        ({"box": (30, 30, 20, 40)}, "ends before it starts"),
    ],
)
def test_bad_input(change, message):
    good = {"src": tissue_like(60, 60), "corner": (0, 0), "region_px": 10, "clip": 2.0, "glass": 230}
    given = good | {"box": (20, 20, 40, 40)} | change
    with pytest.raises(ValueError, match=message):
        clahe_lab(**given)


def test_empty_box():
    assert clahe_lab(tissue_like(9, 9), (0, 0), 8, 2.0, 230, (4, 4, 4, 9)).shape == (0, 5, 3)


@pytest.mark.parametrize("shape", [(0, 4), (4, 4, 3)])
def test_plain_bad_input(shape):
    with pytest.raises(ValueError, match="grey must be uint8"):
        clahe_image(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="must be positive"):
        clahe_image(np.zeros((4, 4), np.uint8), 0.0)
