"""The bundled detectors on images that they were not trained on, as a user runs them."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data import data_dir
from wsiengine import infer
from wsiengine.breast import breast_mask
from wsiengine.datasets.chula import TYPES, find_patches, patch_objects, read_points
from wsiengine.datasets.images import read_pixels
from wsiengine.datasets.rows import Annotated, DetectionSet
from wsiengine.errors import ResolutionError
from wsiengine.evaluate_detection import average_precision, match
from wsiengine.evaluating_detection import find_in_image, score_detector
from wsiengine.models.registry import load_model
from wsiengine.slides import open_slide

HELD_OUT = ("100", "164", "202")  # of fold 0


def field(name: str) -> Annotated:
    """One smear and its patches."""
    root = data_dir() / "rbc" / "chula"
    image = root / "images" / f"{name}.jpg"
    if not image.is_file():
        pytest.skip(f"the field {name} is not at hand")
    found = find_patches(read_pixels(image))
    return Annotated(image, patch_objects(found, read_points(root / "labels" / f"{name}.txt")), name, 0)


def test_rbc_finds_and_types_cells_of_fields_it_has_not_seen() -> None:
    rows = tuple(field(name) for name in HELD_OUT)
    report = score_detector(DetectionSet(("Red cells",), rows, TYPES, 0), load_model("rbc"), "rbc", threads=1)
    assert report["classes"]["Red cells"]["ap50"]["value"] > 0.85
    assert report["exact_match"]["value"] > 0.55


def test_a_smear_as_a_user_runs_it(tmp_path: Path) -> None:
    row = field(HELD_OUT[0])
    infer(row.image, "rbc", tmp_path / "out", threads=1)
    said = json.loads((tmp_path / "out" / "annotations.geojson").read_text())
    classes = {feature["properties"]["classification"]["name"] for feature in said["features"]}
    assert classes <= {"Normal red cells", "Abnormal red cells"}
    assert len(said["features"]) > 20
    assert "Probability Target cell" in said["features"][0]["properties"]["measurements"]


def test_other_tiles_find_nearly_the_same_cells(tmp_path: Path) -> None:
    import cv2

    images = [read_pixels(field(name).image) for name in HELD_OUT[:2]]
    mosaic = tmp_path / "mosaic.png"
    cv2.imwrite(str(mosaic), np.hstack(images)[..., ::-1])
    row = Annotated(mosaic, field(HELD_OUT[0]).objects, "m")
    few, many = (find_in_image(row, "rbc", overlap=overlap, threads=1) for overlap in (0.3, 0.6))
    sure, also = few.scores >= 0.5, many.scores >= 0.3
    matched = match(many.boxes_xyxy[also], many.scores[also], few.boxes_xyxy[sure], np.zeros(int(sure.sum()), bool))
    assert matched.hits.sum() > 0.97 * sure.sum()
    assert average_precision([matched]) > 0.9


def test_a_mammogram_as_a_user_runs_it(tmp_path: Path) -> None:
    image = data_dir() / "mammo" / "mias" / "images" / "mdb019.png"
    found = infer(image, "mass", tmp_path / "out", mpp=200, threads=1)
    assert found.folder == tmp_path / "out"
    said = json.loads((tmp_path / "out" / "annotations.geojson").read_text())
    corners = np.array([f["geometry"]["coordinates"][0] for f in said["features"]]).reshape(-1, 2)
    assert ((corners >= 0) & (corners <= 1024)).all()
    breast = breast_mask(open_slide(image, mpp=200.0))
    centres = corners.reshape(len(said["features"]), 5, 2)[:, [0, 2]].mean(axis=1).astype(int)
    assert breast.mask[centres[:, 1], centres[:, 0]].all()
    assert found.summary["analysed_mm2"] == pytest.approx(breast.area_mm2, rel=0.02)
    whole = infer(image, "mass", tmp_path / "whole", mpp=200, tissue="none", threads=1)
    assert whole.summary["analysed_mm2"] == pytest.approx(1024**2 * 0.04)
    with pytest.raises(ResolutionError, match="cannot be the resolution"):
        infer(image, "crc5", tmp_path / "no", mpp=200)
