"""Labelled fields: mapping of labels, physical scale, and bad input in words."""

import csv

import cv2
import numpy as np
import pytest

from tests.data import data_dir
from tests.training.fields import write_sets
from wsiengine.errors import UnreadableSlide, WsiError
from wsiengine.training import data, scale


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("data"))


def test_labels_are_mapped_and_cases_are_apart(folder):
    fields = data.read_fields(folder)
    assert {f.finding: f.label for f in fields} == {
        "Normal": "Normal",
        "healthy": "Normal",
        "Low-grade IN": "Adenoma",
        "adenomatous": "Adenoma",
        "Adenocarcinoma": "Adenocarcinoma",
        "poorly differentiated": "Adenocarcinoma",
        "Polyp": "Polyp",
    }
    assert {f.case.split(":")[0] for f in fields} == {"ebhi", "glas", "lc25000"}
    assert all((f.mask is None) == (f.source == "lc25000") for f in fields)


def test_a_field_comes_to_square_pixels_of_the_models_size(folder):
    field = next(f for f in data.read_fields(folder) if f.source == "ebhi")
    loaded = data.load(field, mpp=1.0)
    down, across = data.MPP_YX["ebhi"]
    assert loaded.image.shape == (round(190 * down), round(230 * across), 3)
    assert loaded.mask.shape == loaded.image.shape[:2]
    red = loaded.image[:, :, 0].astype(float)
    assert red[:40].mean() > red[-40:].mean() + 10  # still the right way up


def test_resampling_keeps_a_squares_place():
    image = np.zeros((100, 200), np.uint8)
    image[40:60, 100:140] = 255
    seen = data.resample(image, (0.5, 2.0), 1.0)
    assert seen.shape == (50, 400)
    rows, cols = np.nonzero(seen > 127)
    assert (rows.min(), rows.max() + 1) == (20, 30)
    assert abs(cols.min() - 200) <= 1
    assert abs(cols.max() + 1 - 280) <= 1


def test_a_shared_case_is_refused(folder):
    fields = data.read_fields(folder)
    data.check_leak([f for f in fields if f.fold == 0], [f for f in fields if f.fold == 1])
    with pytest.raises(WsiError, match="1 cases are in training and in test: ebhi:Normal-0"):
        data.check_leak(fields[:3], fields[:1])


def _edit(folder, **change):
    table = folder / "crc" / "glas" / "labels.csv"
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    rows[0] |= change
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_bad_data_gets_words(tmp_path):
    write_sets(tmp_path)
    _edit(tmp_path, grade="sick")
    with pytest.raises(WsiError, match="'sick', which is none of Normal"):
        data.read_fields(tmp_path)
    _edit(tmp_path, grade="healthy")
    field = next(f for f in data.read_fields(tmp_path) if f.source == "glas")
    cv2.imwrite(str(field.mask), np.zeros((9, 8), np.uint8))
    with pytest.raises(UnreadableSlide, match="is 8 × 9 px; its image is 230 × 190 px"):
        data.load(field, 1.0)
    field.mask.unlink()
    with pytest.raises(UnreadableSlide, match="cannot be read; its image"):
        data.load(field, 1.0)
    field.image.write_bytes(b"no image")
    with pytest.raises(UnreadableSlide, match="cannot be read as an image"):
        data.load(field, 1.0)
    (tmp_path / "crc" / "glas" / "labels.csv").unlink()
    with pytest.raises(WsiError, match=r"labels\.csv is missing"):
        data.read_fields(tmp_path)


def test_scale_is_read_from_squashed_glands(tmp_path):
    """Discs squashed to two thirds of their width measure two thirds."""
    fields = [f for f in data.read_fields(write_sets(tmp_path, images=6)) if f.source == "glas"]
    for i, field in enumerate(fields):
        mask = np.zeros((190, 230), np.uint8)
        cv2.ellipse(mask, (90 + i, 80), (20, 30), 0, 0, 360, 255, -1)
        cv2.imwrite(str(field.mask), mask)
    size = scale.gland_size(fields)
    assert size.across_px / size.down_px == pytest.approx(2 / 3, rel=0.03)
    assert size.down_px == pytest.approx(15, rel=0.03)  # a disc of radius r spreads by r / 2
    assert (size.cases, size.glands) == (18, 18)


def test_real_sets_have_their_numbers():
    fields = data.read_fields(data_dir())
    assert {s: sum(f.source == s for f in fields) for s in data.MPP_YX} == {"ebhi": 1802, "glas": 145, "lc25000": 1335}
    for fold in range(5):
        data.check_leak([f for f in fields if f.fold != fold], [f for f in fields if f.fold == fold])
