"""A model against labelled images, through the command line: planted marks have known answers."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests import planted_slides as planted
from wsiengine.cli import main
from wsiengine.evaluating import Rows, join, report, table_lines
from wsiengine.geometry import Box, Size


def _image(path: Path, mark: str, seed: int) -> None:
    size = Size(150, 210)
    pixels = planted.paint(size, [(mark, Box(5, 5, 145, 205))], seed=seed)
    cv2.imwrite(str(path), pixels[..., ::-1])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = []
    for k in range(12):
        mark = (planted.A, planted.B, planted.C)[k % 3]
        _image(tmp_path / f"{k}.png", mark, k)
        # Image 0 shows mark A but is labelled B: the one mistake to be found.
        rows.append([f"{k}.png", planted.B if k == 0 else mark, f"case {k // 2}", 0, 1.0])
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "class", "case", "fold", "mpp"], *rows])
    return tmp_path


def test_the_one_wrong_label_is_found(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", "planted", "--data", str(data), "-o", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["image"]["n"] == 12
    assert found["image"]["cases"] == 6
    assert found["image"]["confusion"] == [[3, 0, 0, 0], [1, 4, 0, 0], [0, 0, 4, 0]]
    assert found["image"]["per_class"][planted.B]["recall"] == 0.8
    assert found["image"]["per_class"][planted.A]["precision"] == 0.75
    assert found["image"]["balanced_accuracy"]["value"] == pytest.approx((1 + 0.8 + 1) / 3, abs=1e-4)
    assert found["tile"]["n"] > 12  # images are larger than a tile
    assert cv2.imread(str(tmp_path / "out" / "report.png")) is not None


def test_labels_are_mapped_and_the_rest_left_out(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["evaluate", "--model", "planted", "--data", str(data), "--map", f"{planted.B}={planted.A}", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["image"]["per_class"][planted.A]["n"] == 8
    assert found["image"]["per_class"][planted.B]["n"] == 0
    assert found["image"]["per_class"][planted.B]["recall"] is None
    assert main(["evaluate", "--model", "planted", "--data", str(data), "--map", f"{planted.B}=other"]) == 0
    assert "7 of 12 labelled images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--map", "nonsense"], "--map nonsense says nothing"),
        (["--folds", "x"], "no list of numbers"),
        (["--folds", "4"], "no labelled image is left"),
        (["--rule", "wish"], "there is no rule 'wish'"),
        (["--model", "crc5"], "no label of the data"),
    ],
)
def test_wrong_questions_get_words(
    data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["evaluate", "--model", "planted", "--data", str(data), *arguments]) == 1
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert "try" in told


def _rows() -> Rows:
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4], [0.1, 0.9]])
    return Rows(
        p,
        judged=np.array([True, True, False, False, False]),
        true=np.array([0, 0, 0, 1, 1]),
        image=np.array(["a", "a", "a", "b", "b"]),
        case=np.array(["x"] * 5),
    )


def test_tiles_without_epithelium_do_not_vote_unless_nothing_else_is_there() -> None:
    images = join(_rows(), "image", "average")
    np.testing.assert_allclose(images.probability, [[0.55, 0.45], [0.35, 0.65]])
    assert images.judged.tolist() == [True, False]  # b has no judged tile: no answer
    assert images.true.tolist() == [0, 1]
    found = report(_rows(), ["Low", "High"])
    assert found["image"]["no_answer"] == 0.5
    assert found["case"]["n"] == 2
    assert any("image" in line for line in table_lines(found))


def test_an_unsure_answer_is_no_answer() -> None:
    found = report(_rows(), ["Low", "High"], below=0.6)
    assert found["image"]["no_answer"] == 1.0
    assert found["image"]["balanced_accuracy"]["value"] == 0.0
    assert found["image"]["balanced_accuracy_likeliest"] == 1.0
