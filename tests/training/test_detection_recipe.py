"""``wsiengine train`` for detectors: from annotated images to a model that the engine runs; bad recipes get words."""

import json
from pathlib import Path

import cv2
import pytest

from tests.training.drawn import picture
from wsiengine import infer, load_model
from wsiengine.cli import main
from wsiengine.errors import WsiError
from wsiengine.training.detection_recipe import DetectionRecipe

NAMES = ("blue", "red")
RECIPE = {
    "task": "detect",
    "network": "centre",
    "name": "dots",
    "backbone": "resnet18",
    "width": 0.25,
    "side_px": 160,
    "turn": "none",
    "iterations": 60,
    "batch": 2,
    "rate": 3e-3,
    "head_rate": 3e-3,
    "threads": 1,
}


def write_images(folder: Path, count: int = 6) -> Path:
    """YOLO: drawn pictures, each a case."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    (folder / "classes.txt").write_text("\n".join(NAMES))
    for k in range(count):
        sample = picture((150, 190), 5, k)
        cv2.imwrite(str(folder / "images" / f"p{k}.png"), sample.pixels[..., ::-1])
        lines = []
        for label, (x0, y0, x1, y1) in zip(sample.objects.labels, sample.objects.boxes_xyxy.tolist(), strict=True):
            lines.append(f"{label} {(x0 + x1) / 380} {(y0 + y1) / 300} {(x1 - x0) / 190} {(y1 - y0) / 150}")
        (folder / "labels" / f"p{k}.txt").write_text("\n".join(lines))
    return folder


def test_one_command_from_annotations_to_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path / "data")
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    model = tmp_path / "model"
    assert main(["train", str(tmp_path / "recipe.json"), "--data", str(data), "-o", str(model)]) == 0
    assert "held out: red: AP at IoU 0.5" in capsys.readouterr().out
    report = json.loads((model / "report.json").read_text())
    assert report["held_out"]["blue"]["images"] == 2  # of six cases in five folds
    assert (model / "curves.png").is_file()
    assert "AP at IoU 0.5" in (model / "report.md").read_text()
    card = load_model(str(model))
    assert card.task == "detect"
    assert 30 < card.detection.largest_px < 48  # type: ignore[union-attr]
    found = infer(data / "images" / "p0.png", str(model), tmp_path / "out")
    assert found.folder == tmp_path / "out"


def test_an_rcnn_recipe_makes_a_model_with_masks(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", 3)
    (tmp_path / "recipe.json").write_text(
        json.dumps(RECIPE | {"network": "mask_rcnn", "iterations": 2, "width": 0.125})
    )
    model = tmp_path / "model"
    assert main(["train", str(tmp_path / "recipe.json"), "--data", str(data), "-o", str(model)]) == 0
    card = load_model(str(model))
    assert card.detection.masks == "roi"  # type: ignore[union-attr]
    infer(data / "images" / "p0.png", str(model), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colour": 1}, "unknown entries colour"),
        ({"network": "yolo"}, "network is 'yolo'"),
        ({"iterations": "many"}, "iterations is 'many', needed int"),
        ({"mpp": "1"}, "mpp is '1', needed int or float"),
        ({"side_px": 100}, "side_px is 100, needed a multiple of 32"),
        ({"test_fold": 9}, "test_fold is 9"),
    ],
)
def test_a_bad_recipe_gets_words(change: dict, says: str) -> None:
    with pytest.raises(WsiError, match=says):
        DetectionRecipe.of(RECIPE | change, Path("recipe.json"))


def test_a_class_that_no_card_takes_is_refused_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", 3)
    (data / "classes.txt").write_text("blue: dark\nred")
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    assert main(["train", str(tmp_path / "recipe.json"), "--data", str(data), "-o", str(tmp_path / "m")]) != 0
    assert "blue: dark" in capsys.readouterr().err
    assert not (tmp_path / "m" / "training").exists()


def test_one_image_is_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path / "data", 1)
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    assert main(["train", str(tmp_path / "recipe.json"), "--data", str(data), "-o", str(tmp_path / "m")]) != 0
    said = capsys.readouterr()
    assert "training and test need images" in said.out + said.err
