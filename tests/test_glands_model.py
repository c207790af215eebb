"""The bundled glands itself: what its card promises, on real fields, as a user calls it."""

import csv
import json
import re
from pathlib import Path

import pytest

import wsiengine
from tests.data import data_dir
from wsiengine.cli import main
from wsiengine.evaluating_objects import read_drawn, score_segmenter
from wsiengine.models.registry import load_model
from wsiengine.result import Result

ROOT = Path(wsiengine.__file__).parents[1]
MPP = (0.62, 0.62)


def test_the_card_says_what_the_page_says() -> None:
    card = load_model("glands")
    evidence = card.classes[0].evidence
    page = (ROOT / "docs" / "glands.md").read_text("utf-8")
    [row] = [line for line in page.splitlines() if line.startswith("| `glands` 1.0, all objects |")]
    shown = [float(cell) for cell in re.findall(r"\d+\.\d+", row.split("objects |")[1])]
    assert shown == [round(evidence[key], 3) for key in ("f1", "dice")] + [round(evidence["hausdorff_px"], 1)]
    assert f"F1 {evidence['f1']:.3f}, object Dice {evidence['dice']:.3f}" in (ROOT / "README.md").read_text("utf-8")
    assert evidence["f1"] >= 0.8
    assert "research use only" in card.licence
    assert "GlaS" in (ROOT / str(card.terms)).read_text("utf-8")
    assert card.model_path.stat().st_size < 4.5e6
    assert card.training_command in page.replace("\\\n  ", "")


def test_fields_that_it_was_not_trained_on() -> None:
    """Every eighth of the 60 of test part A; `wsiengine evaluate` gives all (docs/glands.md)."""
    images, _ = read_drawn(data_dir() / "crc" / "glas", where={"split": "testA"}, mpp_yx=MPP)
    images = images[::8]
    found = score_segmenter(images, "glands", threads=2)
    assert found["all"]["f1"] > 0.82
    assert found["all"]["dice"] > 0.82


def test_a_field_as_a_user_calls_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = data_dir() / "crc" / "glas" / "labels.csv"
    with table.open(newline="", encoding="utf-8") as lines:
        row = next(r for r in csv.DictReader(lines) if r["split"] == "testA" and r["grade"] == "healthy")
    image, out = table.parent / row["file"], tmp_path / "out"
    assert main(["infer", str(image), "--model", "glands", "--mpp", "0.62", "--tissue", "none", "-o", str(out)]) == 0
    assert "gland" in capsys.readouterr().out
    result = Result(out)
    assert result.summary["objects"]["Gland"] == len(result.annotations) > 5
    for gland in result.annotations:
        assert 0 < gland.measurements["Solidity"] <= 1
        assert 0 <= gland.measurements["Lumen fraction"] <= 1
        assert gland.measurements["Area µm^2"] >= 400
    assert main(["export", str(out), "--min-area", "3000", "-o", str(tmp_path / "large.geojson")]) == 0
    large = json.loads((tmp_path / "large.geojson").read_text("utf-8"))["features"]
    assert 0 < len(large) < len(result.annotations)
    assert min(f["properties"]["measurements"]["Area µm^2"] for f in large) >= 3000
