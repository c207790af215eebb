"""The breast in a mammogram: on drawn ones, where it is known, and around every annotated mass of real ones."""

from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest

from tests.data import data_dir
from wsiengine.breast import breast_mask, find_breast
from wsiengine.datasets.mias import read_mias
from wsiengine.geometry import Mpp, Size
from wsiengine.slides import open_slide

FILM, TISSUE = 24, 130
ROWS, COLS = 500, 402


def drawn(*, film: int = FILM, white_frame: bool = False, strip: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A breast at the left border of film that ends before the picture does, with label and noise; and where it is."""
    y, x = np.mgrid[:ROWS, :COLS]
    breast = ((y - 260) / 190.0) ** 2 + ((x - 20) / 210.0) ** 2 < 1
    breast &= x >= 20
    grey = np.zeros((ROWS, COLS), np.float32)
    grey[:, 20:340] = film
    grey[breast] = TISSUE
    grey = cv2.GaussianBlur(grey, (0, 0), 3)  # skin fades into the film
    grey[:, :20] = grey[:, 340:] = 0
    grey[8:60, 270:300] = 240  # a label
    if strip:
        grey[:6, 20:340] = 200  # the film's edge, joined to the label and to nothing else
        grey[:60, 20:26] = 200  # and running down to the breast
    if white_frame:
        grey[:, 360:] = grey[480:, 20:] = 255
    noise = np.random.default_rng(0).normal(0, 2, grey.shape)
    return np.clip(grey + np.where(grey > 0, noise, 0), 0, 255).astype(np.uint8), breast


def agreement(found: np.ndarray, true: np.ndarray) -> float:
    return float((found & true).sum() / (found | true).sum())


@pytest.mark.parametrize("film", [0, 10, FILM, 50])
@pytest.mark.parametrize("frame", [False, True])
def test_the_breast_and_not_label_film_or_frame(film: int, frame: bool) -> None:
    grey, breast = drawn(film=film, white_frame=frame)
    found = find_breast(grey)
    assert agreement(found, breast) > 0.95
    assert not found[:60, 260:].any()  # the label
    assert not found[:, 350:].any()
    assert not found[:, :18].any()


def test_the_edge_of_the_film_joins_nothing_to_the_breast() -> None:
    """The breast reaches the picture's upper border, and so does a bright strip beside it."""
    grey, breast = drawn(strip=True)
    grey, breast = grey[80:].copy(), breast[80:]
    grey[:6, 20:340] = 200
    found = find_breast(grey)
    assert agreement(found, breast) > 0.95
    assert not found[:6, 200:].any()


@pytest.mark.parametrize("turn", range(4))
def test_whichever_way_the_picture_lies(turn: int) -> None:
    grey, breast = drawn()
    found = find_breast(np.ascontiguousarray(np.rot90(grey[:, ::-1], turn)))
    assert agreement(found, np.rot90(breast[:, ::-1], turn)) > 0.95


@pytest.mark.parametrize("level", [0, 12, 255])
def test_a_picture_of_one_level_has_no_breast_or_is_all_of_one(level: int) -> None:
    found = find_breast(np.full((80, 61), level, np.uint8))
    assert found.all() or not found.any()


def test_dark_places_inside_are_breast() -> None:
    grey, _breast = drawn()
    grey[200:230, 80:110] = 2
    assert find_breast(grey)[215, 95]


@pytest.mark.parametrize("um", [50.0, 200.0])
def test_the_mask_lies_on_the_picture_whatever_its_pixels(tmp_path: Path, um: float) -> None:
    grey, breast = drawn()
    large = cv2.resize(grey, (COLS * 4, ROWS * 4), interpolation=cv2.INTER_LINEAR)
    path = tmp_path / "m.png"
    path.write_bytes(imagecodecs.png_encode(large))
    mask = breast_mask(open_slide(path, mpp=um))
    assert mask.mask.shape == large.shape
    assert mask.mpp == Mpp.square(um)
    assert mask.size_l0 == Size(*large.shape)
    assert agreement(mask.mask[::4, ::4], breast) > 0.95


def test_every_annotated_mass_lies_in_the_breast() -> None:
    """All 97 mammograms of mini-MIAS; a circle drawn by hand may reach beyond the skin."""
    shares, lost = [], []
    for row in read_mias(data_dir() / "mammo" / "mias").images:
        mask = breast_mask(open_slide(row.image, mpp=200.0)).mask
        shares.append(mask.mean())
        for i in np.flatnonzero(~row.objects.ignored).tolist():
            circle = np.zeros(mask.shape, np.uint8)
            cv2.fillPoly(circle, [np.rint(row.objects.outline(i)).astype(np.int32)], 1)
            x0, y0, x1, y1 = row.objects.boxes_xyxy[i]
            if not mask[int((y0 + y1) / 2), int((x0 + x1) / 2)] or mask[circle > 0].mean() < 0.85:
                lost.append(row.image.stem)
    assert not lost
    assert len(shares) == 97
    assert min(shares) > 0.15
    assert max(shares) < 0.7
    assert np.mean(shares) < 0.45
