"""Packing tiles: agrees with x · scale + bias for every layout, type and cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracles
from tests.pictures import position_coded as picture
from wsikernels.pack import copy_tiles, pack_tiles, pack_tiles_nhwc

SCALE = np.array([1 / 58.4, 1 / 57.1, 1 / 57.4], np.float32)
BIAS = np.array([-2.1, -2.0, -1.8], np.float32)


@settings(max_examples=30, deadline=None)
@given(
    side=st.tuples(st.integers(1, 20), st.integers(1, 37)),
    tiles=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), min_size=0, max_size=4),
    kind=st.sampled_from([np.float32, np.float16]),
    strided=st.booleans(),
)
def test_planes(side, tiles, kind, strided):
    big = picture(side[0] + 20, side[1] + 20)
    block = big[3 : 3 + side[0] + 12, 5 : 5 + side[1] + 9] if strided else big[: side[0] + 12, : side[1] + 9].copy()
    origins = np.array(tiles, np.int64).reshape(-1, 2)
    got = pack_tiles(block, origins, SCALE, BIAS, np.empty((len(tiles), 3, *side), kind))
    if not tiles:
        return
    exact = oracles.pack(block, origins, SCALE, BIAS, side)
    assert np.abs(got - exact).max() <= (1e-6 if kind == np.float32 else 2.0**-9)
    as_numpy = oracles.pack(block, origins, np.float32(1), np.float32(0), side).astype(np.float32)
    as_numpy = as_numpy * SCALE[:, None, None] + BIAS[:, None, None]
    assert np.array_equal(got, as_numpy.astype(kind))  # the same bits as numpy in float32


def test_half_floats_round_to_nearest_even_over_the_whole_range():
    block = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    for scale in (1e-7, 3e-5, 0.017, 1.0, 300.0):  # subnormal, tiny, usual, whole, overflowing
        out = np.empty((1, 3, 1, 256), np.float16)
        pack_tiles(block, np.zeros((1, 2), np.int64), np.full(3, scale), np.zeros(3), out)
        with np.errstate(over="ignore"):
            expected = (np.arange(256, dtype=np.float32) * np.float32(scale)).astype(np.float16)
        assert np.array_equal(out[0, 0, 0], expected)


@settings(max_examples=30, deadline=None)
@given(
    side=st.tuples(st.integers(1, 20), st.integers(1, 37)),
    tiles=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), min_size=0, max_size=4),
    strided=st.booleans(),
)
def test_copies(side, tiles, strided):
    big = picture(side[0] + 20, side[1] + 20)
    block = big[3 : 3 + side[0] + 12, 5 : 5 + side[1] + 9] if strided else big[: side[0] + 12, : side[1] + 9].copy()
    got = copy_tiles(block, np.array(tiles, np.int64).reshape(-1, 2), np.empty((len(tiles), *side, 3), np.uint8))
    for tile, (y, x) in zip(got, tiles, strict=True):
        assert np.array_equal(tile, block[y : y + side[0], x : x + side[1]])


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.empty((1, 9, 9, 3), np.float32), "must be a C-contiguous uint8"),
        (np.empty((2, 4, 4, 3), np.uint8), "it needs 3 channels and 1 tiles"),
        (np.empty((1, 9, 9, 3), np.uint8), "leaves the block"),
    ],
)
def test_copies_that_do_not_fit_are_refused(out, message):
    with pytest.raises(ValueError, match=message):
        copy_tiles(picture(10, 10), np.array([[2, 0]]), out)


def test_pixels():
    block = picture(50, 40)[:, 3:33]
    origins = np.array([[0, 0], [13, 5], [26, 10]])
    got = pack_tiles_nhwc(block, origins, SCALE, BIAS, np.empty((3, 24, 20, 3), np.float32))
    planes = pack_tiles(block, origins, SCALE, BIAS, np.empty((3, 3, 24, 20), np.float32))
    assert np.array_equal(got, planes.transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": np.zeros((9, 9, 4), np.uint8)}, "block must be uint8"),
        ({"block": np.zeros((9, 9, 3), np.float32)}, "block must be uint8"),
        ({"origins": np.array([[6, 0]])}, "leaves the block"),
        ({"origins": np.array([[0, -1]])}, "leaves the block"),
        ({"origins": np.array([0, 1])}, r"shape \(n, 2\)"),
        ({"scale": np.array([1, np.nan, 1])}, "finite"),
        ({"out": np.empty((1, 3, 4, 4))}, "float32 or float16"),
        ({"out": np.empty((2, 3, 4, 4), np.float32)}, "1 tiles"),
        ({"out": np.empty((1, 4, 4, 3), np.float32)}, "3 channels"),
    ],
)
def test_bad_input(change, message):
    given = {
        "block": picture(9, 9),
        "origins": np.array([[0, 0]]),
        "scale": SCALE,
        "bias": BIAS,
        "out": np.empty((1, 3, 4, 4), np.float32),
    } | change
    with pytest.raises(ValueError, match=message):
        pack_tiles(**given)
