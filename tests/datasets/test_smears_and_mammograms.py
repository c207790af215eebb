"""Patches of drawn smears, and mini-MIAS; what the real sets hold where they are at hand."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.data import data_dir
from wsiengine.datasets.chula import TYPES, find_patches, patch_objects, read_points
from wsiengine.datasets.mias import read_mias
from wsiengine.datasets.reading import recognise
from wsiengine.datasets.rows import NO, UNKNOWN, YES
from wsiengine.errors import WsiError

RADIUS = 20
CELLS = [
    (40, 40),
    (120, 60),
    (154, 74),
    (60, 140),
    (240, 40),
    (250, 150),
    (286, 150),
    (322, 150),
    (358, 152),
    (394, 150),
]
CELLS += [(130, 220), (200, 240), (330, 230), (40, 250)]


def smear() -> np.ndarray:
    """Drawn cells with a pale middle: single, a touching pair, a row of five."""
    picture = np.full((280, 430, 3), (200, 205, 195), np.uint8)
    picture += (np.arange(430) // 20).astype(np.uint8)[None, :, None]  # light falls off to one side
    for x, y in CELLS:
        cv2.circle(picture, (x, y), RADIUS, (160, 115, 135), -1)
        cv2.circle(picture, (x, y), 6, (190, 170, 180), -1)
    cv2.circle(picture, (200, 130), 4, (90, 40, 120), -1)  # a platelet
    return picture


def test_single_and_touching_cells_are_patches_and_clumps_are_cut() -> None:
    found = find_patches(smear())
    patch = found.labels[[y for _, y in CELLS], [x for x, _ in CELLS]]
    assert (patch > 0).all()
    assert patch[1] == patch[2]  # the pair is one patch
    assert len(set(patch[5:10].tolist())) == 5  # the row of five is cut into its cells
    assert len(set(patch.tolist())) == len(CELLS) - 1 == found.labels.max()  # and the platelet is none
    assert found.cells[patch[1] - 1] == 2


def test_boxes_follow_the_cells() -> None:
    objects = patch_objects(find_patches(smear()), np.zeros((0, 3), np.int64))
    x, y = CELLS[0]
    box = objects.boxes_xyxy[np.abs(objects.boxes_xyxy[:, :2] - (x - RADIUS, y - RADIUS)).sum(axis=1).argmin()]
    np.testing.assert_allclose(box, (x - RADIUS, y - RADIUS, x + RADIUS + 1, y + RADIUS + 1), atol=3)
    assert all(ring is not None for ring in objects.rings)


def test_touching_cells_have_several_types_and_unnamed_ones_are_unknown() -> None:
    found = find_patches(smear())
    points = np.array([(*CELLS[0], 4), (*CELLS[1], 0), (*CELLS[2], 7), (5, 100, 9)])
    objects = patch_objects(found, points)
    at = found.labels[CELLS[0][1], CELLS[0][0]] - 1
    pair = found.labels[CELLS[1][1], CELLS[1][0]] - 1
    assert np.flatnonzero(objects.types[at] == YES).tolist() == [4]
    assert (np.delete(objects.types[at], 4) == NO).all()
    assert np.flatnonzero(objects.types[pair] == YES).tolist() == [0, 7]
    alone = patch_objects(found, points[:2])
    assert (np.delete(alone.types[pair], 0) == UNKNOWN).all()  # the other cell of the pair may be anything
    far = objects.boxes_xyxy[-1]  # a point on no patch gets a box of a typical cell, inside the picture
    assert far[0] == 0
    assert far[1] < 100 < far[3]


@pytest.mark.parametrize(("text", "says"), [("1 2\n", "line 1"), ("1 2 0\na b c\n", "line 2"), ("1 2 99\n", "type 99")])
def test_broken_points_are_refused_in_words(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text(text)
    with pytest.raises(WsiError, match=says):
        read_points(tmp_path / "1.txt")


def test_mammograms(tmp_path: Path) -> None:
    table = "file,patient,tissue,abnormality,severity,x,y,radius,fold\n"
    table += "a.png,1,G,CIRC,B,100,200,30,1\na.png,1,G,CALC,B,10,20,3,1\nb.png,2,F,NORM,,,,,0\nc.png,3,F,SPIC,M,,,,2\n"
    (tmp_path / "labels.csv").write_text(table)
    assert recognise(tmp_path) == "mias"
    mass, normal, nowhere = read_mias(tmp_path).images
    assert mass.objects.boxes_xyxy.tolist() == [[70.5, 170.5, 130.5, 230.5]]
    assert len(normal.objects) == 0
    assert nowhere.objects.ignored.tolist() == [True]
    assert (mass.fold, mass.case, mass.mpp_yx) == (1, "1", (200.0, 200.0))
    (tmp_path / "labels.csv").write_text(table.replace(",100,", ",1o0,"))
    with pytest.raises(WsiError, match="1o0"):
        read_mias(tmp_path)


def test_the_real_sets_are_what_the_docs_say() -> None:
    root = data_dir()
    masses = read_mias(root / "mammo" / "mias")
    assert len(masses.images) == 97
    assert masses.objects == 38  # one of the 39 rows has no place
    assert recognise(root / "rbc" / "chula") == "chula"
    points = [read_points(file) for file in sorted((root / "rbc" / "chula" / "labels").glob("*.txt"))]
    assert sum(map(len, points)) == 13154
    assert max(p[:, 2].max() for p in points) == len(TYPES) - 1
