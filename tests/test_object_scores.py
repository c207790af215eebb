"""The measures of the GlaS challenge: by hand, by property, and against a plain reading of the paper."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.models import segmenters
from tests.models.segmenters import GLAND, RIM
from wsiengine.cli import main
from wsiengine.errors import WsiError
from wsiengine.evaluating_objects import DrawnImage, drawn_objects, filled, find_in_image, score_segmenter
from wsiengine.geometry import Size
from wsiengine.object_scores import ObjectScores, join, score_image


def _map(*boxes: tuple[int, int, int, int], shape: tuple[int, int] = (20, 30)) -> np.ndarray:
    labels = np.zeros(shape, np.int32)
    for number, (y0, x0, y1, x1) in enumerate(boxes, start=1):
        labels[y0:y1, x0:x1] = number
    return labels


def _score(drawn: np.ndarray, found: np.ndarray) -> ObjectScores:
    return join([score_image(drawn, found)])


def test_by_hand() -> None:
    """A 4 × 10 object found but for its last two columns, and a 2 × 2 object missed, and one made up."""
    drawn = _map((0, 0, 4, 10), (10, 0, 12, 2))
    found = _map((0, 0, 4, 8), (16, 20, 18, 25))
    scores = _score(drawn, found)
    assert (scores.precision, scores.recall, scores.f1) == (0.5, 0.5, 0.5)
    first = 2 * 32 / (40 + 32)
    assert scores.dice == pytest.approx((40 / 44 * first + 32 / 42 * first) / 2)
    # Cut off are two columns. The missed one is nearest to the first found: from (0, 7) to (10, 1). The made-up one is
    # nearest to the missed one: from (17, 24) to (11, 1).
    ours = (40 * 2 + 4 * np.hypot(10, 6)) / 44
    theirs = (32 * 2 + 10 * np.hypot(6, 23)) / 42
    assert scores.hausdorff_px == pytest.approx((ours + theirs) / 2)
    assert (scores.drawn, scores.found) == (2, 2)


def test_hausdorff_by_hand() -> None:
    """One object moved by 3 rows and 4 columns: the farthest pixel is 5 away."""
    assert _score(_map((2, 2, 8, 9)), _map((5, 6, 11, 13))).hausdorff_px == pytest.approx(5)
    assert _score(_map((2, 2, 8, 9)), _map((2, 2, 8, 12))).hausdorff_px == pytest.approx(3)
    assert _score(_map((0, 0, 2, 2)), _map((0, 5, 2, 7))).hausdorff_px == pytest.approx(5)  # apart, yet the nearest
    assert _score(_map((0, 0, 2, 2)), _map()).hausdorff_px == pytest.approx(np.hypot(20, 30) / 2)


@pytest.mark.parametrize(("columns", "true"), [(5, 1), (4, 0), (10, 1)])
def test_half_of_the_drawn_object_must_be_covered(columns: int, true: int) -> None:
    assert score_image(_map((0, 0, 4, 10)), _map((0, 0, 4, columns))).true == true


def test_what_covers_two_objects_finds_one() -> None:
    image = score_image(_map((0, 0, 4, 5), (0, 6, 4, 12)), _map((0, 0, 4, 12)))
    assert (image.true, image.false, image.missed) == (1, 0, 1)


def test_an_object_in_two_halves_is_found_once() -> None:
    image = score_image(_map((0, 0, 4, 10)), _map((0, 0, 4, 5), (0, 5, 4, 10)))
    assert (image.true, image.false, image.missed) == (1, 1, 0)


def test_nothing_drawn_and_nothing_found() -> None:
    assert _score(_map(), _map()) == ObjectScores(0, 0, 0, 0, 0, 0, 0)
    one_sided = _score(_map(), _map((0, 0, 2, 2)))
    assert (one_sided.precision, one_sided.dice) == (0, 0)


_maps = arrays(np.int32, (9, 11), elements=st.integers(0, 4))


@given(_maps, _maps)
@settings(max_examples=60, deadline=None)
def test_as_a_plain_reading_of_the_paper(drawn: np.ndarray, found: np.ndarray) -> None:
    scores = _score(drawn, found)
    ones, twos = ([labels == v for v in np.unique(labels) if v] for labels in (drawn, found))

    def far(a: np.ndarray, b: np.ndarray) -> float:
        p, q = np.argwhere(a), np.argwhere(b)
        d = np.hypot(*(p[:, None] - q[None]).transpose(2, 0, 1))
        return max(d.min(axis=1).max(), d.min(axis=0).max())

    def side(own: list[np.ndarray], other: list[np.ndarray]) -> tuple[float, float]:
        total, dice, distance = sum(a.sum() for a in own), 0.0, 0.0
        for a in own:
            best = max(other, key=lambda b: (a & b).sum(), default=None)
            if best is not None and (a & best).any():
                dice += a.sum() * 2 * (a & best).sum() / (a.sum() + best.sum())
                distance += a.sum() * far(a, best)
            else:
                distance += a.sum() * min((far(a, b) for b in other), default=np.hypot(9, 11))
        return (dice / total, distance / total) if total else (0.0, 0.0)

    (dice_a, far_a), (dice_b, far_b) = side(ones, twos), side(twos, ones)
    assert scores.dice == pytest.approx((dice_a + dice_b) / 2)
    assert scores.hausdorff_px == pytest.approx((far_a + far_b) / 2)


@given(_maps)
@settings(max_examples=30, deadline=None)
def test_the_truth_scores_best_and_names_do_not_matter(drawn: np.ndarray) -> None:
    if drawn.any():
        same = _score(drawn, np.where(drawn > 0, 9 - drawn, 0))
        assert (same.f1, same.hausdorff_px) == (1, 0)
        assert same.dice == pytest.approx(1)


@given(_maps, _maps)
@settings(max_examples=30, deadline=None)
def test_turning_the_picture_changes_nothing(drawn: np.ndarray, found: np.ndarray) -> None:
    one, two = _score(drawn, found), _score(drawn[::-1].T.copy(), found[::-1].T.copy())
    assert (one.f1, one.drawn, one.found) == (two.f1, two.drawn, two.found)
    assert one.dice == pytest.approx(two.dice)


def test_images_are_joined_by_objects_not_by_their_own_scores() -> None:
    whole = score_image(_map((0, 0, 10, 20)), _map((0, 0, 10, 20)))
    missed = score_image(_map((0, 0, 1, 1), (5, 5, 6, 6)), _map())
    joined = join([whole, missed])
    assert joined.recall == pytest.approx(1 / 3)
    assert joined.dice == pytest.approx((200 / 202 + 1) / 2)


# --- through the engine --------------------------------------------------------------------------


def test_outlines_are_filled_pixel_for_pixel() -> None:
    expected = np.zeros((12, 14), np.int32)
    expected[3:8, 2:9] = 1
    np.testing.assert_array_equal(filled([shapely.box(2, 3, 9, 8)], Size(12, 14)), expected)
    ring = shapely.box(2, 3, 9, 8) - shapely.box(4, 5, 7, 7)
    expected[5:7, 4:7] = 0
    np.testing.assert_array_equal(filled([ring], Size(12, 14)), expected)


def _write(folder: Path, name: str, squares: list[tuple[int, int, int]]) -> DrawnImage:
    """Drawn square glands with rims, and their mask."""
    image, mask = np.full((180, 230, 3), 205, np.uint8), np.zeros((180, 230), np.uint8)
    for y, x, side in squares:
        image[y : y + side, x : x + side] = RIM
        image[y + 8 : y + side - 8, x + 8 : x + side - 8] = GLAND
        mask[y : y + side, x : x + side] = 255
    cv2.imwrite(str(folder / f"{name}.png"), image[..., ::-1])
    cv2.imwrite(str(folder / f"{name}.mask.png"), mask)
    return DrawnImage(folder / f"{name}.png", folder / f"{name}.mask.png", (1.0, 1.0), name)


def test_drawn_squares_are_found_whole(tmp_path: Path) -> None:
    segmenters.planted(tmp_path / "model")
    images = [
        _write(tmp_path, "one", [(20, 20, 40), (100, 60, 48)]),
        _write(tmp_path, "two", [(60, 120, 60)]),
    ]
    report = score_segmenter(images, str(tmp_path / "model"), threads=1)
    assert report["all"]["f1"] == 1
    assert report["all"]["dice"] > 0.97
    assert report["all"]["hausdorff_px"] < 2
    assert {name: group["drawn"] for name, group in report["groups"].items()} == {"one": 2, "two": 1}
    labels = find_in_image(images[0].image, (1.0, 1.0), str(tmp_path / "model"), threads=1)
    assert labels.max() == 2
    assert (labels[22:58, 22:58] == labels[40, 40]).all()


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "mask.png"), np.zeros((10, 12), np.uint8))
    with pytest.raises(WsiError, match="is 12 × 10 px; its image is 30 × 20 px"):
        drawn_objects(tmp_path / "mask.png", (20, 30))
    with pytest.raises(WsiError, match="cannot be read"):
        drawn_objects(tmp_path / "none.png", (20, 30))


def test_masks_of_numbers_and_of_one_value(tmp_path: Path) -> None:
    numbers = np.zeros((16, 19), np.uint8)
    numbers[1:5, 1:4], numbers[1:5, 4:7] = 3, 7
    cv2.imwrite(str(tmp_path / "numbers.png"), numbers)
    cv2.imwrite(str(tmp_path / "one.png"), np.where(numbers > 0, 255, 0).astype(np.uint8))
    assert set(np.unique(drawn_objects(tmp_path / "numbers.png", (16, 19)))) == {0, 3, 7}
    assert drawn_objects(tmp_path / "one.png", (16, 19)).max() == 1
    numbers[10:13, 12:15] = 9  # a slip of the pen
    cv2.imwrite(str(tmp_path / "one.png"), np.where(numbers > 0, 255, 0).astype(np.uint8))
    assert drawn_objects(tmp_path / "one.png", (16, 19)).max() == 1


# --- as a command --------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    segmenters.planted(tmp_path / "model")
    _write(tmp_path, "one", [(20, 20, 40), (100, 60, 48)])
    _write(tmp_path, "two", [(60, 120, 60)])
    rows = ["file,mask,split,grade,mpp", "one.png,one.mask.png,a,plain,1", "two.png,two.mask.png,b,odd,1"]
    (tmp_path / "labels.csv").write_text("\n".join([*rows, "one.png,,b,no mask,1"]))
    return tmp_path


def test_the_command_prints_the_measures(labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "-m", str(labelled / "model"), "--data", str(labelled), "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:5] for line in lines[2:]] == [
        ["all", "2", "3", "3", "1.000"],
        ["mean", "of", "images", "1.000", lines[3].split()[4]],
        ["odd", "1", "1", "1", "1.000"],
        ["plain", "1", "2", "2", "1.000"],
        ["1", "image", "has", "no", "mask"],
    ]
    command = ["evaluate", "-m", str(labelled / "model"), "--data", str(labelled), "--where", "split=a", "--json"]
    assert main([*command, "-o", str(labelled / "report")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["all"]["drawn"], found["without_mask"]) == (1, 2, 0)
    assert json.loads((labelled / "report" / "report.json").read_text()) == found


@pytest.mark.parametrize(
    ("table", "extra", "words"),
    [
        ("file,mask\none.png,one.mask.png", [], "µm/px of one.png is missing"),
        ("file,mask,mpp\none.png,one.mask.png,wide", [], "mpp is a number"),
        ("file,class\none.png,x", [], "no column mask"),
        ("file,mask,mpp\nthree.png,one.mask.png,1", [], "three.png, which is not there"),
        ("file,mask,mpp\none.png,one.mask.png,1", ["--where", "split=a"], "no column split"),
        ("file,mask,mpp\none.png,one.mask.png,1", ["--where", "file=two.png"], "no row"),
        ("file,mask,mpp\none.png,one.mask.png,1", ["--where", "file"], "says nothing"),
        ("file,mask,mpp\none.png,two.mask.png,1", [], "the mask"),
    ],
)
def test_bad_labels_get_words(
    labelled: Path, table: str, extra: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (labelled / "labels.csv").write_text(table)
    cv2.imwrite(str(labelled / "two.mask.png"), np.zeros((5, 5), np.uint8))
    command = ["evaluate", "-m", str(labelled / "model"), "--data", str(labelled), "--threads", "1", *extra]
    assert main(command) != 0
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
