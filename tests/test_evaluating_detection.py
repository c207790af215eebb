"""``wsiengine evaluate`` of a detector that finds drawn marks exactly: the figures are known."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.models.detectors import Planted, build, paint
from wsiengine.cli import main
from wsiengine.datasets.rows import Annotated, DetectionSet, Objects
from wsiengine.errors import WsiError
from wsiengine.evaluating_detection import Found, find_in_image, pairs_of, same_classes, score_detector
from wsiengine.geometry import Box, Size

MARKS = [
    ("One", Box(10, 12, 22, 26), 200),
    ("Two", Box(60, 60, 70, 75), 240),  # where four tiles meet
    ("One", Box(80, 100, 95, 112), 180),
    ("One", Box(30, 56, 40, 72), 120),
]


def write_coco(folder: Path, marks: list[tuple[str, Box, int]] = MARKS) -> Path:
    """The drawn marks as COCO: class Two is called Other there."""
    pixels = paint(Size(103, 131), MARKS)
    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / "a.png"), pixels[..., ::-1])
    entries = [
        {"id": i, "image_id": 1, "category_id": 1 + (c == "Two"), "bbox": [b.x0, b.y0, b.width, b.height]}
        for i, (c, b, _) in enumerate(marks)
    ]
    said = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "One"}, {"id": 2, "name": "Other"}],
        "annotations": entries,
    }
    (folder / "truth.json").write_text(json.dumps(said))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build(tmp_path / "model", Planted(mpp=None))
    return tmp_path / "model"


def test_a_perfect_detector_is_perfect(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_coco(tmp_path / "data")
    command = ["evaluate", "-m", str(model), "--data", str(data), "--map", "Other=Two", "--threads", "1"]
    assert main([*command, "--json", "-o", str(tmp_path / "report")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["classes"]["One"]["annotated"] == 3
    for name in ("One", "Two"):
        assert report["classes"][name]["ap50"]["value"] == 1
        assert report["classes"][name]["ap"] == 1
        assert report["classes"][name]["at_shown_score"]["fppi"] == 0
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "AP at IoU 0.5 1.000" in printed
    assert "3 annotated" in printed


def test_what_is_missing_in_the_truth_is_a_false_positive(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_coco(tmp_path / "data", MARKS[1:])
    assert main(["evaluate", "-m", str(model), "--data", str(data), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (one,) = report["classes"].values()  # Other is unknown without --map
    assert report["left_out"] == {"Other": 1}
    assert main(["evaluate", "-m", str(model), "--data", str(data)]) == 0
    assert "left out  objects whose class is no class of" in (told := capsys.readouterr().out)
    assert "Other (1)" in told
    assert one["at_shown_score"]["fppi"] == 1
    assert one["at_shown_score"]["recall"] == pytest.approx(0.5)  # the card shows objects from 0.5: 120 of 255 is below
    assert one["sensitivity_at_fppi"]["0.5"]["value"] == 0  # the best of the found ones is the false one
    assert one["sensitivity_at_fppi"]["1.0"]["value"] == 1


def test_no_class_in_common_gets_words(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_coco(tmp_path / "data")
    assert main(["evaluate", "-m", str(model), "--data", str(data), "--map", "One=1", "--map", "Other=2"]) != 0
    said = capsys.readouterr()
    assert "no class of the data (1, 2)" in said.out + said.err
    assert same_classes(["x"], ["y"]) == {"y": (0, 0)}
    with pytest.raises(WsiError, match="--map"):
        same_classes(["x", "y"], ["z"])


def test_boxes_are_in_pixels_of_the_image(model: Path, tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data")
    row = Annotated(data / "a.png", Objects.of([], []), "a")
    found = find_in_image(row, str(model))
    expected = sorted((b.x0, b.y0, b.x1, b.y1) for _, b, _ in MARKS)
    assert sorted(map(tuple, found.boxes_xyxy.tolist())) == expected


def test_each_object_is_paired_once() -> None:
    found = Found(
        np.array([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 0, 60, 10]]), np.array([0.5, 0.9, 0.8]), np.zeros(3, int), ()
    )
    row = Annotated(Path("a"), Objects.of([(0, 0, 10, 10), (50, 0, 60, 10)], [0, 0], ignored=[False, True]), "a")
    assert pairs_of(found, row) == [(1, 0)]


def test_types_of_a_second_stage_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled rbc's card, with answers that are known: one patch wrongly typed, one not stated at all."""
    from wsiengine.models.registry import load_model

    card = load_model("rbc")
    types = tuple(c.name for c in card.second.classes)  # type: ignore[union-attr]
    boxes = [(20.0 * i, 0.0, 20.0 * i + 10, 10.0) for i in range(4)]
    true = np.zeros((4, len(types)), np.int8)
    true[0, 0] = true[1, 4] = true[2, 4] = 1
    true[3] = -1
    said = np.full((4, len(types)), 0.1, np.float32)
    said[0, 0] = said[1, 4] = said[2, 7] = 0.9
    state = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.5, 0.5]], np.float32)
    answer = Found(np.array(boxes), np.full(4, 0.9), np.zeros(4, np.int64), (said, state))
    monkeypatch.setattr("wsiengine.evaluating_detection.find_in_image", lambda row, model, **options: answer)
    row = Annotated(tmp_path / "a.png", Objects.of(boxes, [0] * 4, types=true), "a")
    report = score_detector(DetectionSet(("Red cells",), (row,), types, 0), card, "rbc")
    assert report["matched"] == 4
    assert report["exact_match"] == {"patches": 3, "value": pytest.approx(2 / 3, abs=1e-4)}
    assert report["types"]["Target cell"]["patches"] == 2
    assert report["types"]["Target cell"]["auc"] == pytest.approx(0.75)
    assert report["abnormal"]["accuracy"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    assert report["abnormal"]["specificity"] == 1
