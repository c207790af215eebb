"""A classifier against annotated slides: planted marks, of which one annotation says something else."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests import planted_slides as planted
from tests.training.slide_labels import write_geojson
from wsiengine.cli import main
from wsiengine.evaluating_slides import Words, score_slides
from wsiengine.geometry import Box, Size
from wsiengine.models.registry import load_model
from wsiengine.training.slides import find_slides

SIZE = Size(1411, 1803)
TISSUE = Box(100, 100, 1300, 1700)
FIRST, SECOND = Box(200, 200, 1200, 800), Box(200, 1000, 1200, 1600)
INSIDE = [Box(box.y0 + 128, box.x0 + 128, box.y1 - 128, box.x1 - 128) for box in (FIRST, SECOND)]
"""Well within the marks: whole tiles of a mark's colour."""


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slide one is annotated as it is; on slide two mark A is called B; what is odd or over glass is no row."""
    data = tmp_path_factory.mktemp("slides")
    for name, second in (("one", planted.B), ("two", planted.A)):
        pixels = planted.paint(SIZE, [(planted.A, FIRST), (second, SECOND)], tissue=TISSUE)
        planted.write(data / f"{name}.svs", pixels)
    shapes: list[tuple[str | None, Box]] = [(planted.A, INSIDE[0]), (planted.B, INSIDE[1])]
    write_geojson(data / "one.geojson", [*shapes, ("Odd", Box(1210, 200, 1290, 1600)), (None, TISSUE)])
    glass = Box(1340, 100, 1411, 1700)
    write_geojson(data / "two.geojson", [*shapes, (planted.B, glass), ("Ignore*", TISSUE)])
    return data


def evaluated(capsys: pytest.CaptureFixture[str], slides: Path, *arguments: str | Path) -> dict:
    assert main(["evaluate", "--model", "planted", "--data", str(slides), *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_cells_under_annotations_are_judged(slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capsys, slides, "-o", tmp_path)
    per_class = found["cell"]["per_class"]
    assert per_class[planted.A]["recall"] == 1
    assert per_class[planted.B]["recall"] == 0.5  # as many cells on slide two, all of which show mark A
    cells = 4 * INSIDE[0].area * 0.5**2 / 16**2  # four annotations at 0.5 µm/px, cells of 16 µm
    assert found["cell"]["n"] == pytest.approx(cells, rel=0.05)
    assert found["slide"]["n"] == found["case"]["n"] == 4
    assert found["slide"]["balanced_accuracy"]["value"] == 0.75
    assert found["left_out"].keys() == {"Odd"}
    assert found["no_tissue_cells"] > 0
    assert found["several_classes_cells"] == 0
    assert found["annotated_cells"] == found["cell"]["n"] + found["no_tissue_cells"] + found["left_out"]["Odd"]
    assert (tmp_path / "report.png").is_file()
    runs = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert runs == ["000-one", "001-two"]  # finished runs, to be looked at, and taken as they are the next time
    assert evaluated(capsys, slides, "-o", tmp_path) == found


def test_cells_under_two_classes_are_no_rows(slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("svs", "geojson"):
        (tmp_path / f"one.{suffix}").write_bytes((slides / f"one.{suffix}").read_bytes())
    half = Box(INSIDE[0].y0, INSIDE[0].x0, INSIDE[0].y0 + INSIDE[0].height // 2, INSIDE[0].x1)
    write_geojson(tmp_path / "one.geojson", [(planted.A, INSIDE[0]), ("Tumour", half), (planted.B, INSIDE[1])])
    found = evaluated(capsys, tmp_path, "--map", f"Tumour={planted.C}")
    cells = found["cell"]["per_class"][planted.A]["n"]
    assert found["several_classes_cells"] == pytest.approx(cells, rel=0.2)
    assert found["cell"]["per_class"][planted.C]["n"] == 0


def test_labels_of_annotations_are_mapped_told_apart_and_named(
    slides: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, slides, "--apart", "Odd")
    assert found["left_out"] == {}
    assert found["answers"]["cell"]["Odd"]["called"]["No mark"] > 0.9
    assert found["cell"]["per_class"].keys() == {planted.A, planted.B, planted.C}
    assert main(["evaluate", "--model", "planted", "--data", str(slides)]) == 0
    told = capsys.readouterr().out
    assert "cells whose label is no class of planted: Odd (" in told
    assert "cells in which the run saw no tissue" in told


def test_rows_come_from_the_engines_own_map(slides: Path, tmp_path: Path) -> None:
    import wsiengine

    card = load_model("planted")
    rows, _ = score_slides(find_slides(slides)[:1], card, "planted", Words(), tmp_path)
    result = wsiengine.infer(slides / "one.svs", "planted", tmp_path / "again")
    coded = np.asarray(result.probability[..., 0])
    stored = np.unique(np.round(rows.probability[:, 0] * 254 + 1).astype(int))
    assert set(stored.tolist()) <= set(np.unique(coded).tolist())
    assert {Path(f.slide).name for f in rows.fields} == {"one.svs"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--folds", "0"], "the slides have no folds"),
        (["--min-drawn", "0.2"], "--min-drawn is of a classifier on labelled images, not of slides with annotations"),
        (["--where", "a=b"], "--where is of a classifier on labelled images"),
        (["--map", f"{planted.A}=X", "--map", f"{planted.B}=X"], "no annotation is of a class of the model"),
        (["--apart", planted.A], "told apart and counted as a class"),
        (["--apart", "Polpy"], "--apart names Polpy: no annotation has that label"),
        (["--map", "Tumuor=X"], "--map names Tumuor: no annotation has that label"),
    ],
)
def test_wrong_questions_get_words(
    slides: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["evaluate", "--model", "planted", "--data", str(slides), *arguments]) == 1
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert "try" in told
