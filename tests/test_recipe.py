"""Recipes: what a card and a command line may say, and how both are told that they may not."""

import cv2
import pytest

from tests.pictures import tissue_like
from wsiengine.errors import CardError, PlanError
from wsiengine.recipe import TARGETS, Recipe, parse_recipe


@pytest.mark.parametrize("nothing", ["none", "", [], " none "])
def test_nothing(nothing):
    assert parse_recipe(nothing) == Recipe()
    assert not parse_recipe(nothing)
    assert str(parse_recipe(nothing)) == "none"


def test_card_and_command_line_say_the_same():
    card = [{"step": "macenko", "target": "builtin:he"}, {"step": "clahe", "region_um": 64, "clip": 3.0}]
    assert parse_recipe(card) == parse_recipe("macenko+clahe:clip=3.0")
    assert parse_recipe(card).steps[0]["target"] == TARGETS["density"]["builtin:he"]
    assert parse_recipe(card).steps[1] == {"step": "clahe", "region_um": 64, "clip": 3.0, "channel": "lab"}


@pytest.mark.parametrize(
    "text",
    ["macenko", "macenko+clahe", "clahe:clip=3", "reinhard+clahe:region_um=128", "vahadane:stains=hdab", "grey+whiten",
     "whiten:mode=pca", "background:sigma_um=20", "macenko:residual=false+demean+clahe:channel=haematoxylin"],
)  # fmt: skip
def test_text_says_everything_and_reads_back(text):
    recipe = parse_recipe(text)
    assert parse_recipe(str(recipe)) == recipe
    assert str(recipe) != str(parse_recipe("macenko:residual=false"))


def test_different_numbers_are_different_texts():
    texts = ["clahe", "clahe:clip=3", "clahe:region_um=65", "macenko", "macenko:residual=false", "macenko:stains=hdab"]
    assert len({str(parse_recipe(text)) for text in texts}) == len(texts)


def test_hdab_has_its_own_target():
    assert parse_recipe("macenko:stains=hdab").steps[0]["target"] == TARGETS["density"]["builtin:hdab"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("macenk", "'macenk' is no step"),
        ("clahe:clip=0", "clip must be a number above zero, not 0"),
        ("clahe:clip=-1", "clip must be a number above zero"),
        ("clahe:clip=NaN", "clip must be a number above zero"),
        ("clahe:clip=Infinity", "clip must be a number above zero"),
        ("clahe:region_um=true", "region_um must be a number above zero"),
        ("clahe:sharp=1", "no setting sharp"),
        ("clahe:clip", "'clip' is not a setting"),
        ("clahe:channel=blue", "channel must be lab or haematoxylin"),
        ("clahe+macenko", "cannot be applied: one stain step first"),
        ("macenko+reinhard", "cannot be applied"),
        ("clahe+clahe", "cannot be applied"),
        ("background+whiten", "cannot be applied"),
        ("macenko:target=builtin:giemsa", "no target 'builtin:giemsa'"),
        ("macenko:target=nowhere.png", "no picture that can be found"),
        ("macenko:stains=giemsa", "stains must be he or hdab"),
        ("macenko:residual=1", "residual must be true or false"),
    ],
)
def test_mistakes_on_the_command_line(text, message):
    with pytest.raises(PlanError, match=message):
        parse_recipe(text)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"step": "clahe", "clip": "2"}], "clip must be a number"),
        ([{"clip": 2}], "None is no step"),
        (["macenko"], "no step"),
        ([{"step": "macenko", "target": {"vectors": [[1, 0, 0], [0, 1]], "strengths": [1, 1]}}], "a target is written"),
        ([{"step": "reinhard", "target": {"mean": [1, 2, 3]}}], "a target is written"),
        ([{"step": "macenko", "target": 3}], "written as numbers, not 3"),
        ([{"step": "macenko", "target": "pyproject.toml"}], "written as numbers"),
        ([{"step": "macenko", "target": [1, 2]}], r"written as numbers, not \[1, 2\]"),
        ([{"step": ["macenko"]}], "is no step"),
        ([{"step": "clahe", 5: 1, "sharp": 2}], "no setting 5, sharp"),
        ([{"step": "macenko", "target": {"vectors": [[1, 1, 1], [2, 2, 2]], "strengths": [1, 1]}}], "two different"),
        ([{"step": "macenko", "target": {"vectors": [[1, 1, 1], [0, 0, 0]], "strengths": [1, 1]}}], "two different"),
        ([{"step": "macenko", "target": {"vectors": [[1, 0, 0], [0, -1, 0]], "strengths": [1, 1]}}], "from zero up"),
        ([{"step": "macenko", "target": {"vectors": [[1, 0, 0], [0, 1, 0]], "strengths": [1, 0]}}], "above zero"),
        ([{"step": "reinhard", "target": {"mean": [1, 2, 3], "deviation": [1, 2, -3]}}], "above zero"),
    ],
)
def test_mistakes_in_a_card(steps, message):
    with pytest.raises(CardError, match=message):
        parse_recipe(steps)


def test_written_target():
    target = {"vectors": [[0.6, 0.7, 0.3], [0.1, 0.9, 0.2]], "strengths": [1.5, 1.1]}
    recipe = parse_recipe([{"step": "vahadane", "target": target}])
    assert recipe.steps[0]["target"] == target
    assert "0.6" in str(recipe)


@pytest.mark.parametrize("step", ["macenko", "vahadane", "reinhard"])
def test_target_picture_is_fitted_at_once(tmp_path, step):
    cv2.imwrite(str(tmp_path / "a.png"), tissue_like(160, 200)[..., ::-1])
    target = parse_recipe(f"{step}:target={tmp_path / 'a.png'}").steps[0]["target"]
    keys = {"mean", "deviation"} if step == "reinhard" else {"vectors", "strengths"}
    assert set(target) == keys
    if "vectors" in target:
        assert target["vectors"][0][0] > target["vectors"][1][0]  # haematoxylin first


@pytest.mark.parametrize("content", [b"no picture", None])
def test_bad_target_picture(tmp_path, content):
    path = tmp_path / "b.png"
    if content:
        path.write_bytes(content)
    else:
        cv2.imwrite(str(path), tissue_like(20, 20) * 0 + 250)
    with pytest.raises(PlanError, match="cannot be"):
        parse_recipe(f"macenko:target={path}")
