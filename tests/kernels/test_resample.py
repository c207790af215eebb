"""Area resampling: agrees with the float64 definition, and never depends on where the picture is cut."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracles
from tests.pictures import position_coded as picture
from wsikernels.resample import resample_area, shrink_into, source_span

RATIOS = st.one_of(st.integers(1, 9).map(float), st.floats(0.3, 7.0, allow_nan=False))


def resampled(src, corner, ratio, out_corner, shape):
    out = np.empty((*shape, src.shape[2]), np.uint8)
    return resample_area(src, *corner, *ratio, *out_corner, out)


@settings(max_examples=40, deadline=None)
@given(
    ratio=st.tuples(RATIOS, RATIOS),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 6)),
    at=st.tuples(st.integers(-3, 4000), st.integers(-3, 4000)),
    margin=st.integers(0, 3),
    channels=st.integers(1, 4),
)
def test_agrees_with_the_definition(ratio, shape, at, margin, channels):
    (y0, y1), (x0, x1) = (source_span(a, a + n, r) for a, n, r in zip(at, shape, ratio, strict=True))
    corner = (y0 - margin, x0 - margin)
    src = picture(y1 - y0 + 2 * margin, x1 - x0 + 2 * margin, channels)
    exact = oracles.resample_area(src, corner, ratio, at, shape)
    got = resampled(src, corner, ratio, at, shape)
    assert (
        np.abs(got - exact).max() <= 0.5 + 1e-3
    )  # 1e-3: edges within a millionth of a pixel boundary are snapped to it


@settings(max_examples=40, deadline=None)
@given(ratio=st.tuples(RATIOS, RATIOS), cut=st.tuples(st.integers(1, 8), st.integers(1, 6)), at=st.integers(-5, 90_000))
def test_whole_equals_blocks(ratio, cut, at):
    shape = (9, 7)
    spans = [source_span(at, at + n, r) for n, r in zip(shape, ratio, strict=True)]
    src = picture(spans[0][1] - spans[0][0], spans[1][1] - spans[1][0])
    corner = (spans[0][0], spans[1][0])
    whole = resampled(src, corner, ratio, (at, at), shape)
    pieces = np.zeros_like(whole)
    for ys in ((0, cut[0]), (cut[0], shape[0])):
        for xs in ((0, cut[1]), (cut[1], shape[1])):
            (sy, ty), (sx, tx) = (source_span(at + a, at + b, r) for (a, b), r in zip((ys, xs), ratio, strict=True))
            part = src[sy - corner[0] : ty - corner[0], sx - corner[1] : tx - corner[1]]  # a strided view
            at_yx = (at + ys[0], at + xs[0])
            pieces[slice(*ys), slice(*xs)] = resampled(part, (sy, sx), ratio, at_yx, (ys[1] - ys[0], xs[1] - xs[0]))
    assert np.array_equal(whole, pieces)


@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 8])
def test_whole_ratios_round_half_up_as_the_general_path_does(ratio):
    src = picture(4 * ratio, 6 * ratio, seed=ratio)
    fast = resampled(src, (0, 0), (ratio, ratio), (0, 0), (4, 6))
    means = src.reshape(4, ratio, 6, ratio, 3).sum(axis=(1, 3))
    assert np.array_equal(fast, (2 * means + ratio**2) // (2 * ratio**2))
    # a doubled source of a doubled height takes the general path for the same means
    tall = np.repeat(src, 2, axis=0)
    assert np.array_equal(fast, resampled(tall, (0, 0), (2 * ratio, ratio), (0, 0), (4, 6)))


def test_ties_round_up():
    src = np.array([[[0], [1]], [[0], [1]]], np.uint8)
    assert resampled(src, (0, 0), (2, 2), (0, 0), (1, 1))[0, 0, 0] == 1


def test_second_opinion_opencv():
    src = picture(120, 180)
    for ratio in (2, 3, 4, 1.5, 2.5):
        shape = (int(120 / ratio), int(180 / ratio))
        theirs = cv2.resize(src, shape[::-1], interpolation=cv2.INTER_AREA).astype(int)
        assert np.abs(resampled(src, (0, 0), (ratio, ratio), (0, 0), shape) - theirs).max() <= 1


@pytest.mark.parametrize("layout", ["mirrored", "upside down", "transposed", "every second column", "one row repeated"])
def test_odd_layouts(layout):
    big = picture(40, 40)
    view = {
        "mirrored": big[::-1, ::-1],
        "upside down": big[::-1],
        "transposed": big.transpose(1, 0, 2),
        "every second column": big[:, ::2],
        "one row repeated": np.broadcast_to(big[7], big.shape),
    }[layout]
    shape = (view.shape[0] // 2, view.shape[1] // 2)
    got = resampled(view, (0, 0), (2, 2), (0, 0), shape)
    assert np.array_equal(got, resampled(np.ascontiguousarray(view), (0, 0), (2, 2), (0, 0), shape))


def test_empty_output():
    assert resampled(picture(4, 6), (0, 0), (2, 2), (0, 0), (0, 3)).shape == (0, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src": np.zeros((4, 4, 3), np.float32)}, "src must be uint8"),
        ({"src": np.zeros((4, 4), np.uint8)}, "src must be uint8"),
        ({"src": np.zeros((8, 8, 1), np.uint8)}, "1 channels"),
        ({"ratio": (0.0, 2.0)}, "ratio_y must be a positive number"),
        ({"ratio": (2.0, float("nan"))}, "ratio_x must be a positive number"),
        ({"ratio": (3.0, 2.0)}, "source holds the rows 0 to 8"),
        ({"corner": (0, 1)}, "source holds the columns 1 to 9, but the output needs 0 to 8"),
    ],
)
def test_bad_input(change, message):
    given = {"src": picture(8, 8), "corner": (0, 0), "ratio": (2.0, 2.0)} | change
    out = np.empty((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=message):
        resample_area(given["src"], *given["corner"], *given["ratio"], 0, 0, out)


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    shape=st.tuples(st.integers(0, 7), st.integers(0, 9)),
    src_yx=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    out_yx=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    channels=st.integers(1, 4),
)
def test_a_part_shrinks_as_the_whole_does(ratio, shape, src_yx, out_yx, channels):
    (by_y, by_x), (rows, cols) = ratio, shape
    src = picture(src_yx[0] + rows * by_y + 1, src_yx[1] + cols * by_x + 2, channels)
    out = np.full((out_yx[0] + rows + 2, out_yx[1] + cols + 1, channels), 77, np.uint8)
    shrink_into(src, src_yx, ratio, out, out_yx, shape)
    part = src[src_yx[0] :, src_yx[1] :]
    where = slice(out_yx[0], out_yx[0] + rows), slice(out_yx[1], out_yx[1] + cols)
    assert np.array_equal(out[where], resampled(part, (0, 0), (float(by_y), float(by_x)), (0, 0), shape))
    out[where] = 77
    assert (out == 77).all()  # nothing else was written


@pytest.mark.parametrize(("ratio", "channels"), [((256, 3), 3), ((256, 256), 1), ((2, 2), 3), ((4, 200), 3)])
def test_the_largest_sums_are_exact(ratio, channels):
    src = np.full((ratio[0], 2 * ratio[1], channels), 255, np.uint8)
    out = np.zeros((1, 2, channels), np.uint8)
    shrink_into(src, (0, 0), ratio, out, (0, 0), (1, 2))
    assert (out == 255).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"src_yx": (1, 0)},
        {"src_yx": (0, -1)},
        {"out_yx": (0, 1)},
        {"ratio": (0, 2)},
        {"ratio": (2, 257)},
        {"shape": (-1, 2)},
        {"src": np.zeros((4, 4, 1), np.uint8)},
        {"src": np.zeros((4, 4, 3), np.uint16)},
        {"src": np.zeros((4, 8, 3), np.uint8)[:, ::2]},
        {"out": np.zeros((3, 2, 3), np.uint8)[::2]},
    ],
    ids=str,
)
def test_a_part_that_does_not_fit_is_refused(wrong):
    src, out = np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    fits = {"src": src, "src_yx": (0, 0), "ratio": (2, 2), "out": out, "out_yx": (0, 0), "shape": (2, 2)}
    shrink_into(**fits)
    with pytest.raises(ValueError):  # noqa: PT011  (any words)
        shrink_into(**{**fits, **wrong})
