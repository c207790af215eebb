"""Own labels: folders and tables, splits that keep cases together, and the whole way to a model folder."""

import csv
import json
import shlex
from dataclasses import replace

import cv2
import numpy as np
import pytest

import wsiengine.training
from tests.training.fields import draw
from wsiengine.cli import main
from wsiengine.errors import UnreadableSlide, WsiError
from wsiengine.models.registry import load_model
from wsiengine.models.runtime import Runtime
from wsiengine.training import cells, loop, own
from wsiengine.training.data import check_leak
from wsiengine.training.tables import Labels, read_labels, split_by_case


def write_folders(data, cases=6):
    for c, name in enumerate(("Benign", "Malignant")):
        for case in range(cases):
            folder = data / name / f"p{case}"
            folder.mkdir(parents=True)
            for i in range(2):
                image, _ = draw(120, 150, seed=100 * c + 10 * case + i)
                cv2.imwrite(str(folder / f"{i}.png"), image if c else 255 - image)
    return data


def write_table(data, rows):
    with (data / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, sorted({k for row in rows for k in row}))
        table.writeheader()
        table.writerows(rows)


def test_folders_are_classes_and_their_folders_cases(tmp_path):
    fields = read_labels(write_folders(tmp_path), mpp=0.5)
    assert len(fields) == 24
    assert {f.label for f in fields} == {"Benign", "Malignant"}
    assert len({f.case for f in fields}) == 12  # p0 of one class is not p0 of the other
    for fold in range(5):
        inside = [f for f in fields if f.fold == fold]
        assert {f.label for f in inside} == {"Benign", "Malignant"}
        check_leak(inside, [f for f in fields if f.fold != fold])
    assert read_labels(tmp_path, mpp=0.5) == fields


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no column file and class"),
        ("file,class\na.png,Gut\u00e9\n".encode("latin-1"), "cannot be read as a table"),
        (b"file,class\na.png\n", "a.png has no class"),
        (b"file,class,fold,mpp\na.png,Benign,5,1\n", "is in fold 5"),
        (b"file,class,fold,mpp\na.png,Benign,-2,1\n", "is in fold -2"),
    ],
)
def test_tables_that_programs_and_hands_spoil_are_refused(tmp_path, content, says):
    (tmp_path / "a.png").touch()
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(WsiError, match=says):
        read_labels(tmp_path, mpp=1.0)


def test_slides_without_annotations_are_told_what_lacks(tmp_path):
    (tmp_path / "a.svs").touch()
    with pytest.raises(WsiError) as error:
        read_labels(tmp_path)
    assert "a.geojson" in error.value.hint


def test_names_that_no_card_takes_are_refused_before_the_training(tmp_path):
    recipe = tmp_path / "r.json"
    recipe.write_text('{"name": "my model"}', encoding="utf-8")
    with pytest.raises(WsiError, match='name is "my model", needed letters'):
        own.OwnRecipe.read(recipe)
    with pytest.raises(WsiError, match="no ':'"):
        Labels().label_of("Tumour: Positive", "a")
    assert Labels(merge={"Tumour: Positive": "Tumour"}).label_of("Tumour: Positive", "a") == "Tumour"


def test_splits_spread_every_class(tmp_path):
    one = read_labels(write_folders(tmp_path), mpp=0.5)[0]
    fields = [
        replace(one, case=f"{label}{case}", label=label, finding=label, fold=-1)
        for label, cases in (("a", 50), ("b", 10), ("c", 5))
        for case in range(cases)
        for _ in range(case % 3 + 1)
    ]
    split = split_by_case(fields)
    for label, per_fold in (("a", 10), ("b", 2), ("c", 1)):
        for fold in range(5):
            assert len({f.case for f in split if f.label == label and f.fold == fold}) == per_fold
    assert len({(f.case, f.fold) for f in split}) == 65
    merged = split_by_case([replace(f, label="a") for f in fields])
    assert [f.fold for f in merged] == [f.fold for f in split]  # other words for the classes are no other folds


def test_folds_are_those_of_the_whole_table(tmp_path):
    names = [f.image.relative_to(tmp_path) for f in read_labels(write_folders(tmp_path), mpp=0.5)]
    rows = [{"file": n, "class": n.parts[0], "case": f"c{k}", "scanner": k % 3} for k, n in enumerate(names)]
    write_table(tmp_path, rows)
    folds = {f.image: f.fold for f in read_labels(tmp_path, mpp=0.5)}
    some = read_labels(tmp_path, mpp=0.5, where={"scanner": "1"})
    assert len(some) == 8
    assert all(folds[f.image] == f.fold for f in some)
    with pytest.raises(WsiError, match=r"no row of .* has scanner = 7"):
        read_labels(tmp_path, mpp=0.5, where={"scanner": "7"})


def test_a_table_says_case_fold_and_scale(tmp_path):
    write_folders(tmp_path)
    rows = [
        {"file": f"{name}/p{i}/0.png", "class": name, "case": f"c{i}{name}", "fold": i % 5, "mpp": 0.25 * (i + 1)}
        for name in ("Benign", "Malignant")
        for i in range(6)
    ]
    write_table(tmp_path, rows)
    fields = read_labels(tmp_path, merge={"Benign": "Other"})
    assert [f.fold for f in fields] == [0, 1, 2, 3, 4, 0] * 2
    assert fields[3].mpp_yx == (1.0, 1.0)
    assert {f.label for f in fields} == {"Other", "Malignant"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"file": "Benign/none.png"}, "names Benign/none.png, which is not there"),
        ({"mpp": ""}, "µm/px of Benign/p0/0.png is missing"),
        ({"mpp": "352.8"}, r"µm/px of Benign/p0/0.png is 352\.8: needed"),
        ({"mpp": "fine"}, "Benign/p0/0.png: could not convert"),
        ({"fold": ""}, "1 of 4 rows have no fold"),
    ],
)
def test_bad_rows_get_words(tmp_path, change, words):
    write_folders(tmp_path)
    rows = [
        {"file": f"{name}/p{i}/0.png", "class": name, "case": f"{name}{i}", "fold": i, "mpp": 0.5}
        for name in ("Benign", "Malignant")
        for i in range(2)
    ]
    rows[0] = rows[0] | change
    write_table(tmp_path, rows)
    with pytest.raises(WsiError, match=words):
        read_labels(tmp_path)


def test_unusable_folders_get_words(tmp_path):
    with pytest.raises(WsiError, match="there is no folder"):
        read_labels(tmp_path / "none")
    with pytest.raises(WsiError, match="has 0 folders and no labels"):
        read_labels(tmp_path)
    write_folders(tmp_path, cases=2)
    (tmp_path / "Third").mkdir()
    with pytest.raises(WsiError, match=r"class folder .*Third is empty"):
        read_labels(tmp_path, mpp=1.0)
    (tmp_path / "Third").rmdir()
    (tmp_path / "labels.csv").write_text("file,label\na,b\n", encoding="utf-8")
    with pytest.raises(WsiError, match="has no column class"):
        read_labels(tmp_path)
    (tmp_path / "labels.csv").write_text("file,class\n", encoding="utf-8")
    with pytest.raises(WsiError, match="has no rows"):
        read_labels(tmp_path)


def test_one_case_cannot_be_on_both_sides(small, tmp_path):
    data = write_folders(tmp_path / "data", cases=1)
    assert len(read_labels(data, mpp=1.0)) == 4  # enough to evaluate
    with pytest.raises(WsiError, match="class Benign comes from 1 case"):
        wsiengine.training.run(small, data, tmp_path / "out")


def test_grades_of_patients_are_classes_of_cases(tmp_path):
    write_folders(tmp_path)
    write_table(tmp_path, [{"file": "Benign/p0/0.png", "grade": "healthy", "patient": 7, "fold": 3, "mpp": 0.5}])
    (field,) = read_labels(tmp_path)
    assert (field.label, field.case, field.fold) == ("healthy", "7", 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "has no entries"),
        ('{"epochs": 3}', "unknown entries epochs"),
        ('{"mpp": "one"}', 'mpp is "one", needed µm/px'),
        ('{"mpp": true}', "mpp is true, needed"),
        ('{"test_fold": 5}', "test_fold is 5, needed a fold, 0 to 4"),
        ('{"tile_px": 200}', "tile_px is 200, needed a multiple of 32"),
        ('{"freeze": [[0.5, 3], [0.2, 1]]}', "freeze is"),
        ('{"freeze": "all"}', "freeze is"),
        ('{"class_weights": {"a": 0}}', "class_weights is"),
        ('{"backbone": "vgg"}', 'backbone is "vgg", needed mobilenet_v2 or'),
        ('{"precision": ["int4"]}', "precision is"),
        ('{"schedule": "linear"}', "needed cosine or steps or constant"),
        ('{"merge": {"a": 1}}', "merge is"),
    ],
)
def test_bad_recipes_get_words(tmp_path, text, words):
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    with pytest.raises(WsiError, match=words):
        own.OwnRecipe.read(tmp_path / "r.json")


@pytest.fixture
def small(monkeypatch, tmp_path):
    class Narrow(cells.CellNet):
        def __init__(self, classes, width=0.25, **kind):
            super().__init__(classes, width, **kind)

    monkeypatch.setattr(loop, "CellNet", Narrow)
    monkeypatch.setattr(loop, "load_weights", lambda backbone, file: None)
    (tmp_path / "b.tflite").write_bytes(b"")
    said = {"name": "mine", "mpp": 0.5, "source_mpp": 0.5, "iterations": 3, "weights": str(tmp_path / "b.tflite")}
    (tmp_path / "r.json").write_text(json.dumps(said | {"threads": 1}), encoding="utf-8")
    return tmp_path / "r.json"


def test_from_labels_to_a_model_that_runs(small, tmp_path):
    said = []
    out = wsiengine.training.run(small, write_folders(tmp_path / "data"), tmp_path / "out", say=said.append)
    card = load_model(str(out))
    assert [c.name for c in card.classes] == ["Benign", "Malignant"]
    assert card.gate is None  # nobody drew masks
    assert card.classes[0].evidence["cases_trained"] + card.classes[0].evidence["cases_tested"] == 6
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    assert Runtime(card, device="cpu").scores(pixels, np.array([[0, 0]])).shape == (1, 2)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    tested = [f for f in read_labels(tmp_path / "data", mpp=0.5) if f.fold == 0]
    assert report["held_out"]["image"]["n"] == len(tested) > 0
    picture = cv2.imread(str(out / "curves.png"))
    assert picture.shape[2] == 3
    assert "Held-out fold" in (out / "report.md").read_text(encoding="utf-8")
    assert said[-1].startswith("held out: balanced accuracy")


def test_the_cards_command_gives_the_figures_of_the_report(small, tmp_path, capsys):
    """Labels are merged, and the folds are nobody's but a hash's: the same on both sides all the same."""
    data = write_folders(tmp_path / "data")
    (data / "Benign").rename(data / "Adenoma")
    (tmp_path / "r.json").write_text(
        json.dumps(json.loads(small.read_text()) | {"merge": {"Adenoma": "Benign tumour"}})
    )
    out = wsiengine.training.run(small, data, tmp_path / "out", say=lambda line: None)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))["held_out"]
    words = shlex.split(load_model(str(out)).evaluation_command)
    assert words[:2] == ["wsiengine", "evaluate"]
    places = {"mine": str(out), "DIR": str(data)}
    assert main([places.get(word, word) for word in words[1:]] + ["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in report} == report
    assert found["image"]["per_class"]["Benign tumour"]["n"] > 0
    assert load_model(str(out)).classes[0].evidence["recall"] == report["image"]["per_class"]["Benign tumour"]["recall"]


def test_missing_weights_and_corrupt_images_get_words(small, tmp_path):
    data = write_folders(tmp_path / "data")
    (data / "Benign" / "p0" / "0.png").write_bytes(b"no image")
    with pytest.raises(UnreadableSlide, match=r"p0/0\.png cannot be read as an image"):
        wsiengine.training.run(small, data, tmp_path / "out", say=lambda line: None)
    (tmp_path / "b.tflite").unlink()
    with pytest.raises(WsiError, match="weights of mobilenet_v2 are not at"):
        wsiengine.training.run(small, data, tmp_path / "out2", say=lambda line: None)


def test_one_picture_under_two_cases_is_a_leak(small, tmp_path):
    data = write_folders(tmp_path / "data")
    fields = read_labels(data, mpp=0.5)
    tested = next(f for f in fields if f.fold == 0 and f.label == "Benign")
    trained = next(f for f in fields if f.fold == 1 and f.label == "Benign")
    tested.image.write_bytes(trained.image.read_bytes())
    with pytest.raises(WsiError, match="are the same picture, one in training and one in test"):
        wsiengine.training.run(small, data, tmp_path / "out", say=lambda line: None)


def test_masks_of_another_size_and_unknown_labels_get_words(small, tmp_path):
    data = write_folders(tmp_path / "data")
    rows = [
        {"file": f"{name}/p{i}/0.png", "class": name, "case": f"{name}{i}", "mpp": 0.5, "mask": "mask.png"}
        for name in ("Benign", "Malignant")
        for i in range(5)
    ]
    write_table(data, rows)
    cv2.imwrite(str(data / "mask.png"), np.zeros((10, 12), np.uint8))
    with pytest.raises(UnreadableSlide, match=r"mask\.png is 12 × 10 px; its image is 150 × 120 px"):
        wsiengine.training.run(small, data, tmp_path / "out", say=lambda line: None)
    said = json.loads(small.read_text()) | {"classes": ["Benign", "Other"]}
    small.write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(WsiError, match=r"p0/0\.png is called 'Malignant', which is none of Benign, Other"):
        wsiengine.training.run(small, data, tmp_path / "out", say=lambda line: None)
    small.write_text(json.dumps(said | {"ignore": ["Malignant"]}), encoding="utf-8")
    with pytest.raises(WsiError, match="class Other comes from 0 cases"):
        wsiengine.training.run(small, data, tmp_path / "out", say=lambda line: None)


def test_a_table_with_a_case_in_two_folds_is_refused(tmp_path):
    write_folders(tmp_path)
    rows = [{"file": f"Benign/p{i}/0.png", "class": "Benign", "case": "c", "fold": i, "mpp": 0.5} for i in range(2)]
    write_table(tmp_path, rows)
    with pytest.raises(WsiError, match="1 case is in two folds: c"):
        read_labels(tmp_path)


def test_recipes_say_stages_weights_and_when_to_stop():
    recipe = own.OwnRecipe(freeze=((0.3, "features"), (1, 5)), patience=2, class_weights="balanced")
    assert recipe.frozen(19, pretrained=True) == (5, ((0.3, 1000), (1.0, 5)))
    assert recipe.validated == (1,)
    assert own.OwnRecipe(test_fold=4, patience=1).validated == (0,)
    assert own.OwnRecipe().frozen(19, pretrained=True) == (5, ())
    assert own.OwnRecipe().frozen(19, pretrained=False) == (0, ())
    weights = recipe.weights_of({"a": 10, "b": 30})
    assert weights["a"] / weights["b"] == pytest.approx(3, rel=1e-3)
    assert sum(weights.values()) / 2 == pytest.approx(1, rel=1e-3)
