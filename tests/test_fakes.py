"""The stand-in slide is itself a slide: cut anywhere it has the same pixels, and they are area means."""

import pickle

import numpy as np
import pytest

from tests.fakes import ArraySlide, position_pixels
from wsiengine.errors import ResolutionError
from wsiengine.geometry import Box, Mpp
from wsiengine.slides.base import Slide


def test_array_slide_is_a_slide() -> None:
    assert isinstance(ArraySlide(position_pixels(5, 7)), Slide)


def test_a_pixel_has_the_same_value_however_the_box_is_cut() -> None:
    slide = ArraySlide(position_pixels(301, 203), 0.5, downsamples=(1, 2))
    mpp, box = Mpp(0.93, 1.07), Box(-2, -3, 170, 110)
    whole = slide.read(box, mpp)
    for piece in box.pieces(37, 41):
        np.testing.assert_array_equal(slide.read(piece, mpp), whole[piece.relative_to(box).slices])


def test_read_averages_areas_and_is_white_outside() -> None:
    pixels = position_pixels(301, 203)
    slide = ArraySlide(pixels, 0.5)
    np.testing.assert_array_equal(slide.read(Box(0, 0, 301, 203), Mpp.square(0.5)), pixels)
    got = slide.read(Box(-1, 0, 75, 50), Mpp.square(2))
    mean = pixels[:300, :200].reshape(75, 4, 50, 4, 3).mean(axis=(1, 3))
    assert np.abs(got[1:] - mean).max() <= 0.5
    assert (got[0] == 255).all()
    partial = slide.read(Box(75, 0, 76, 1), Mpp.square(2))[0, 0]  # one row inside, three rows outside
    assert np.abs(partial - (pixels[300, :4].mean(axis=0) + 3 * 255) / 4).max() <= 0.5


def test_without_mpp_only_levels_can_be_read() -> None:
    slide = ArraySlide(position_pixels(9, 11), None)
    assert slide.read_level(0, Box(0, 0, 9, 11)).shape == (9, 11, 3)
    with pytest.raises(ResolutionError):
        slide.read(Box(0, 0, 1, 1), Mpp.square(1))


def test_pickles() -> None:
    slide = ArraySlide(position_pixels(9, 11))
    copy = pickle.loads(pickle.dumps(slide))
    assert copy.fingerprint() == slide.fingerprint()
    np.testing.assert_array_equal(copy.read(Box(0, 0, 3, 4), Mpp.square(1)), slide.read(Box(0, 0, 3, 4), Mpp.square(1)))
