"""Figures of a finished model: the planted-mark model, whose right answers are known, on drawn marks."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from wsiengine.errors import WsiError
from wsiengine.models.registry import load_model
from wsiengine.training import assess, scoring
from wsiengine.training.data import Field


@pytest.fixture
def marks(tmp_path):
    """Twelve fields of 2 × 2 tiles: most tiles bear their class' mark, one of each field is blank."""
    card = load_model("planted")
    fields = []
    for i in range(12):
        label = card.classes[i % 3]
        image = np.full((128, 128, 3), 240, np.uint8)
        for y, x in ((0, 0), (0, 64), (64, 0)):
            image[y + 2 : y + 62, x + 2 : x + 62] = label.colour
        cv2.imwrite(str(tmp_path / f"{i}.png"), image[:, :, ::-1])
        fields.append(
            Field(tmp_path / f"{i}.png", None, "data", label.name, label.name, f"case{i // 2}", 0, (1.0, 1.0))
        )
    return card, fields


def test_a_perfect_model_is_perfect_by_image_and_case(marks):
    card, fields = marks
    found = assess.assess(card, fields)
    assert found["tile"]["all"]["rows"] == 48
    assert found["tile"]["all"]["confusion"] == [[12, 0, 0, 4], [0, 12, 0, 4], [0, 0, 12, 4]]  # blank: no class
    assert found["image"]["all"]["confusion"] == [[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0]]
    assert found["image"]["all"]["mean_average_precision"] == 1.0
    assert found["case"]["all"]["rows"] == 12  # six cases, each with two classes
    assert sum(found["reliability"]["count"]) == 48


def test_one_wrong_label_shows(marks):
    card, fields = marks
    wrong = [replace(fields[0], label="Mark B"), *fields[1:]]
    found = assess.assess(card, wrong)["image"]["all"]
    assert found["confusion"] == [[3, 0, 0, 0], [1, 4, 0, 0], [0, 0, 4, 0]]
    assert found["classes"]["Mark A"]["precision"] == 0.75
    assert found["classes"]["Mark B"]["recall"] == 0.8


def test_unknown_labels_are_named(marks):
    card, fields = marks
    with pytest.raises(WsiError, match="labels Benign are no class of planted, which has Mark A, Mark B, Mark C"):
        assess.assess(card, [replace(fields[0], label="Benign")])


@pytest.mark.parametrize(("rule", "winner"), [("average", 0), ("vote", 0), ("exist", 2), ("exist-3", 0)])
def test_tiles_are_joined_by_the_rule_and_only_those_with_epithelium(marks, rule, winner):
    _, fields = marks
    logits = np.log(np.array([[0.8, 0.1, 0.1]] * 3 + [[0.3, 0.1, 0.6]] + [[0.0001, 0.9998, 0.0001]] * 5))
    scores = scoring.Scores(
        (fields[1],) * 9 + (fields[0],),
        np.r_[logits, [[0.0, 0.0, 5.0]]],
        np.array([0.9, 0.9, 0.3, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05]),
        np.full(10, np.nan),
        ("Mark A", "Mark B", "Mark C"),
    )
    joined = assess.join(scores, scores.column("image"), rule)
    assert [f.image.name for f in joined.fields] == ["1.png", "0.png"]
    assert joined.logits.argmax(axis=1).tolist() == [winner, 2 if rule != "exist-3" else 0]
    np.testing.assert_allclose(joined.epithelium, [0.9, 0.05])


def test_the_picture_has_a_square_per_count(marks):
    card, fields = marks
    image = assess.picture(assess.assess(card, fields), [c.name for c in card.classes], side_px=40)
    assert image.shape == (120, 160, 3)
    assert image[3, 3].tolist() == [0, 115, 195]  # all of the first class are right
    assert image[3, 43].tolist() == [255, 255, 255]
