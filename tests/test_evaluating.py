"""A model against labelled images, through the command line: planted marks have known answers."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn import metrics

from tests import planted_slides as planted
from wsiengine.cli import main
from wsiengine.evaluating import Rows, Seen, join
from wsiengine.evaluation_report import Account, predicted, report
from wsiengine.evaluation_tables import table_lines
from wsiengine.geometry import Box, Size
from wsiengine.training.data import Field


def _image(path: Path, mark: str, seed: int) -> None:
    size = Size(150, 210)
    pixels = planted.paint(size, [(mark, Box(5, 5, 145, 205))], seed=seed)
    cv2.imwrite(str(path), pixels[..., ::-1])


def write_set(folder: Path, count: int = 12, **columns: str) -> Path:
    """Images of the three marks in turn, two of each case; image 0 shows mark A but is labelled B: the one mistake."""
    folder.mkdir(exist_ok=True)
    rows = []
    for k in range(count):
        mark = (planted.A, planted.B, planted.C)[k % 3]
        _image(folder / f"{k}.png", mark, k)
        label = planted.B if k == 0 else mark
        row = {"file": f"{k}.png", "class": label, "case": f"case {k // 2}", "fold": 0, "mpp": 1.0}
        rows.append(row | {name: value.format(k % 2) for name, value in columns.items()})
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_set(tmp_path)


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict:
    assert main(["evaluate", "--model", "planted", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_one_wrong_label_is_found(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capsys, "--data", data, "-o", tmp_path / "out")
    assert found == json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["image"]["n"] == 12
    assert found["image"]["cases"] == 6
    assert found["image"]["confusion"] == [[3, 0, 0, 0], [1, 4, 0, 0], [0, 0, 4, 0]]
    assert found["image"]["per_class"][planted.B]["recall"] == 0.8
    assert found["image"]["per_class"][planted.A]["precision"] == 0.75
    assert found["image"]["balanced_accuracy"]["value"] == pytest.approx((1 + 0.8 + 1) / 3, abs=1e-4)
    assert found["tile"]["n"] > 12  # images are larger than a tile
    assert found["answers"]["image"][planted.B]["called"][planted.A] == 0.2
    assert "sets" not in found
    assert cv2.imread(str(tmp_path / "out" / "report.png")) is not None


def test_labels_are_mapped_and_those_left_out_are_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capsys, "--data", data, "--map", f"{planted.B}={planted.A}")
    assert found["image"]["per_class"][planted.A]["n"] == 8
    assert found["image"]["per_class"][planted.B]["n"] == 0
    assert found["image"]["per_class"][planted.B]["recall"] is None
    assert main(["evaluate", "--model", "planted", "--data", str(data), "--map", f"{planted.B}=other"]) == 0
    told = capsys.readouterr().out
    assert "7 of 12 labelled images" in told
    assert "left out  5 images whose label is no class of planted: other (5)" in told


def test_labels_apart_are_told_in_no_figure(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (data / "labels.csv").open("a") as file:
        for k in (1, 2, 3):
            _image(data / f"odd{k}.png", planted.C, k)
            file.write(f"odd{k}.png,Polyp,odd case,0,1.0\n")
    plain, apart = evaluated(capsys, "--data", data), evaluated(capsys, "--data", data, "--apart", "Polyp")
    assert plain["image"] == apart["image"]
    assert plain["left_out"] == {"Polyp": 3}
    assert apart["left_out"] == {}
    polyps = apart["answers"]["image"]["Polyp"]
    assert (polyps["n"], polyps["cases"]) == (3, 1)
    assert polyps["called"].pop(planted.C) == 1
    assert set(polyps["called"].values()) == {0}


def test_several_sets_stand_together_and_each_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_set(tmp_path / "one"), write_set(tmp_path / "two", 6, slide="s{}")
    found = evaluated(capsys, "--data", one, "--data", two)
    assert [found["sets"][name]["image"]["n"] for name in ("one", "two")] == [12, 6]
    assert found["image"]["n"] == 18
    assert found["image"]["cases"] == 9  # case 0 of one set is not case 0 of the other
    assert (
        found["image"]["confusion"]
        == (np.array(found["sets"]["one"]["image"]["confusion"]) + found["sets"]["two"]["image"]["confusion"]).tolist()
    )
    assert "slide" not in found  # one set names none


def test_by_slide_where_the_table_names_slides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capsys, "--data", write_set(tmp_path / "a", slide="slide {}"))
    assert found["slide"]["n"] == 2 * 3  # slides and labels; the wrong label is outvoted by another image of its slide
    assert found["slide"]["balanced_accuracy"]["value"] == 1


def test_a_file_of_sets_gives_each_its_own_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path / "one", scanner="s{}")
    folder = write_set(tmp_path / "elsewhere", 6)
    text = (folder / "labels.csv").read_text().replace(f",{planted.C},", ",tumour,").replace(",1.0", ",")
    (folder / "labels.csv").write_text(text)
    sets = {
        "one": {"where": {"scanner": "s1"}},
        "two": {"folder": "elsewhere", "mpp": [1.0, 1.0], "map": {"tumour": planted.C}},
    }
    (tmp_path / "sites.json").write_text(json.dumps(sets))
    found = evaluated(capsys, "--data", tmp_path, "--sets", tmp_path / "sites.json")
    assert [found["sets"][name]["image"]["n"] for name in ("one", "two")] == [6, 6]
    assert found["sets"]["two"]["image"]["per_class"][planted.C]["recall"] == 1


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ("{", "cannot be read"),
        ("{}", "have no entries"),
        ('{"one": 3}', "needed an object"),
        ('{"one": {"mmp": 0.5}}', "unknown entry 'mmp'"),
        ('{"one": {"mpp": "wide"}}', "needed µm/px from 0.05 to 20"),
        ('{"one": {"map": ["a"]}}', "needed an object of texts"),
        ('{"one": {"apart": "a"}}', "needed a list of labels"),
        ('{"nowhere": {}}', "there is no folder"),
        ('{"one": {"map": {"Tumuor": "A"}}}', "--map names Tumuor: no image has that label"),
    ],
)
def test_wrong_sets_get_words(tmp_path: Path, capsys: pytest.CaptureFixture[str], sets: str, words: str) -> None:
    write_set(tmp_path / "one", 3)
    (tmp_path / "sets.json").write_text(sets)
    arguments = ["--data", str(tmp_path), "--sets", str(tmp_path / "sets.json")]
    assert main(["evaluate", "--model", "planted", *arguments]) == 1
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--map", "nonsense"], "--map nonsense says nothing"),
        (["--map", "Tumuor=A"], "--map names Tumuor: no image has that label"),
        (["--apart", "Polpy"], "--apart names Polpy: no image has that label"),
        (["--apart", planted.A], "told apart and counted as a class"),
        (["--where", "case"], "--where case says nothing"),
        (["--where", "scanner=s1"], "has scanner = s1"),
        (["--folds", "x"], "no list of numbers"),
        (["--folds", "4"], "no labelled image is left"),
        (["--rule", "wish"], "there is no rule 'wish'"),
        (["--model", "crc5"], "no label of the data"),
        (["--sets", "own"], "names no sets of its own"),
        (["--sets", "own", "--apart", "x"], "say the same thing twice"),
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


def _spoil(folder: Path, how: str) -> None:
    table = folder / "labels.csv"
    if how == "corrupt":
        (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    elif how == "text":
        (folder / "3.png").write_text("no picture")
    elif how == "scale":
        table.write_text(table.read_text().replace(",1.0", ","))
    elif how == "torn":
        table.write_text(table.read_text().replace("case 0,0", "case 0,1", 1))
    elif how in ("mask", "gone"):
        lines = table.read_text().splitlines()
        table.write_text("\n".join([lines[0] + ",mask", *(line + ",m.png" for line in lines[1:])]))
        if how == "mask":
            cv2.imwrite(str(folder / "m.png"), np.zeros((20, 30), np.uint8))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("corrupt", "3.png"),
        ("text", "3.png"),
        ("scale", "µm/px of 0.png is missing"),
        ("torn", "1 case is in two folds: case 0"),
        ("mask", "12 masks do not fit: m.png is 30 × 20 px, its image 210 × 150 px"),
        ("gone", "12 masks do not fit: m.png is not there"),
    ],
)
def test_bad_data_gets_words(data: Path, capsys: pytest.CaptureFixture[str], how: str, words: str) -> None:
    _spoil(data, how)
    assert main(["evaluate", "--model", "planted", "--data", str(data)]) == 1
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert "try" in told


def test_images_and_slides_do_not_mix(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.geojson").write_text("{}")
    assert main(["evaluate", "--model", "planted", "--data", str(data), "--data", str(tmp_path / "slides")]) == 1
    assert "slides holds annotated slides" in capsys.readouterr().err


def test_an_empty_class_folder_gets_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (planted.A, planted.B):
        (tmp_path / name).mkdir()
    _image(tmp_path / planted.A / "a.png", planted.A, 0)
    assert main(["evaluate", "--model", "planted", "--data", str(tmp_path), "--source-mpp", "1"]) == 1
    assert f"{planted.B} is empty" in capsys.readouterr().err


FIELDS = tuple(
    Field(Path(name), None, "set", label, label, case, 0, (1.0, 1.0))
    for name, label, case in (("a", "Low", "x"), ("b", "High", "x"), ("c", "High", "y"), ("d", "Odd", "z"))
)
"""Two images of one case, one of another, and one whose label is no class."""


def _rows() -> Rows:
    gate = np.array([0.9, 0.3, 0.1, 0.2, 0.1, 0.5, 0.9])
    return Rows(
        ("Low", "High"),
        FIELDS,
        np.array([0, 0, 0, 1, 1, 2, 3]),
        np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4], [0.1, 0.9], [0.45, 0.55], [0.3, 0.7]]),
        gate,
        gate >= 0.25,
        np.array([0.8, 0.5, 0.1, 0.3, 0.5, np.nan, 0.4]),
    )


def test_tiles_that_are_not_judged_have_no_say_unless_nothing_else_is_there() -> None:
    images = join(_rows(), "image", "average")
    np.testing.assert_allclose(images.probability, [[0.55, 0.45], [0.35, 0.65], [0.45, 0.55], [0.3, 0.7]])
    assert images.judged.tolist() == [True, False, True, True]  # b has no judged tile: no answer
    assert images.true.tolist() == [0, 1, 1, -1]
    np.testing.assert_allclose(images.gate, [1.3 / 3, 0.15, 0.5, 0.9])


def test_the_weighted_rule_is_the_mean_of_scores_by_what_may_be_judged() -> None:
    images = join(_rows(), "image", "weighted")
    score = (0.9 * np.log([0.9, 0.1]) + 0.3 * np.log([0.2, 0.8])) / 1.2
    np.testing.assert_allclose(images.probability[0], np.exp(score) / np.exp(score).sum())


def test_cases_with_two_labels_are_two_rows() -> None:
    cases = join(_rows(), "case", "average")
    assert sorted(zip([FIELDS[k].case for k in cases.field], cases.true.tolist(), strict=True)) == [
        ("x", 0),
        ("x", 1),
        ("y", 1),
        ("z", -1),
    ]


def test_figures_by_hand_in_both_accounts() -> None:
    """Image a is Low and right; b is High, likeliest right, but not judged; c is High and only just likely."""
    found = report(_rows(), Account("average", below=0.5, gate_minimum=0.25))["image"]
    assert (found["n"], found["cases"]) == (3, 2)
    assert found["confusion"] == [[1, 0, 0], [0, 1, 1]]
    assert found["balanced_accuracy"]["value"] == 0.75
    assert found["balanced_accuracy_likeliest"]["value"] == 1
    assert found["per_class"]["High"]["recall"] == 0.5
    assert found["per_class"]["High"]["recall_likeliest"] == 1
    assert found["no_answer"] == pytest.approx(1 / 3, abs=1e-4)
    unsure = report(_rows(), Account("average", below=0.6, gate_minimum=0.25))["image"]
    assert unsure["balanced_accuracy"]["value"] == 0  # a is claimed with 0.55 only
    assert unsure["balanced_accuracy_likeliest"]["value"] == 1


def test_every_figure_of_tiles_is_scikit_learns() -> None:
    rows = _rows()
    found, scored = report(rows, Account("average", gate_minimum=0.25))["tile"], rows.where(rows.true >= 0)
    true, best = scored.true, scored.probability.argmax(1)
    likeliest = found["balanced_accuracy_likeliest"]["value"]
    assert likeliest == pytest.approx(metrics.balanced_accuracy_score(true, best), abs=1e-4)
    assert found["macro_auroc"] == pytest.approx(metrics.roc_auc_score(true, scored.probability[:, 1]), abs=1e-4)
    one = metrics.average_precision_score(true == 1, scored.probability[:, 1])
    assert found["per_class"]["High"]["average_precision"] == pytest.approx(one, abs=1e-4)
    said = predicted(scored, 0)
    assert found["per_class"]["Low"]["precision"] == metrics.precision_score(true == 0, said == 0)
    assert found["per_class"]["Low"]["recall"] == pytest.approx(metrics.recall_score(true == 0, said == 0), abs=1e-4)


def test_tiles_with_little_drawn_are_left_out_and_counted() -> None:
    found = report(_rows(), Account("average", min_drawn=0.2, gate_minimum=0.25))
    assert found["little_drawn"] == 1
    assert found["tile"]["n"] == 5
    assert report(_rows(), Account("average"))["tile"]["n"] == 6


def test_the_gate_is_measured_by_what_is_drawn() -> None:
    empty = _rows().where(np.array([0, 2, 4, 5]))  # passed: 1 of the 3 of case x, 1 of 1 of case y
    found = report(_rows(), Account("average", min_drawn=0.2, gate_minimum=0.25, window_um=128), empty=empty)["gate"]
    assert found["tiles"] == 6
    assert found["mean_absolute_error"] == pytest.approx(np.mean([0.1, 0.2, 0, 0.1, 0.4, 0.5]), abs=1e-4)
    assert found["shut_out"] == 0.4  # two of five
    assert found["false_answers"] == {
        "windows": 4,
        "cases": 2,
        "window_um": 128,
        "rate": 0.5,
        "rate_mean_over_cases": 0.6667,
    }


def test_the_table_says_what_the_report_does() -> None:
    lines = table_lines(report(_rows(), Account("average", 0.5, 0.2, 0.25)), ("No epithelium", "Uncertain"))
    text = "\n".join(lines)
    assert "a place called No epithelium or Uncertain has no class, and counts as a mistake" in text
    assert "both accounts are the same" in "\n".join(table_lines(report(_rows(), Account("average")), ()))
    (head,) = [line for line in lines if line.startswith("image") and "%" in line]
    numbers = head.split()[1:9]
    assert numbers[1] == "0.750"
    assert numbers[4] == "1.000"
    assert [line for line in lines if line.startswith("Odd") and "apart: in no figure above" in line]


def test_masks_are_cut_and_mirrored_as_their_images_are() -> None:
    mask = np.zeros((60, 100), np.float32)
    mask[:, :50] = 1
    seen = Seen(np.repeat((mask * 200).astype(np.uint8)[..., None], 3, axis=2), mask)
    whole = seen.at_least(64)
    corners = whole.corners(64)
    assert corners.tolist() == [[0, 0], [0, 36]]
    np.testing.assert_allclose(whole.drawn(corners, 64), [50 / 64, 14 / 64])
    assert np.isnan(replace(seen, mask=None).drawn(corners, 64)).all()
    np.testing.assert_array_equal(whole.pixels[..., 0] > 0, whole.mask > 0)
