"""What the cards of the bundled classifiers say of held-out tissue is what the command on them gives."""

import json
import shlex
from pathlib import Path

import pytest

from tests.data import data_dir
from wsiengine.cli import main
from wsiengine.models.registry import load_model
from wsiengine.training.evidence import describe, page_rows


def _same(said: object, found: object, where: str = "report") -> None:
    """Equal within what another processor's arithmetic may change: half a per cent, of counts one in a hundred."""
    if isinstance(said, dict) and isinstance(found, dict):
        assert said.keys() == found.keys(), where
        for name in said:
            _same(said[name], found[name], f"{where}.{name}")
    elif isinstance(said, list) and isinstance(found, list):
        assert len(said) == len(found), where
        for k, (one, other) in enumerate(zip(said, found, strict=True)):
            _same(one, other, f"{where}[{k}]")
    elif isinstance(said, float) or isinstance(found, float):
        assert found == pytest.approx(said, abs=5e-3), where
    elif isinstance(said, int):
        assert found == pytest.approx(said, abs=2, rel=1e-2), where
    else:
        assert said == found, where


@pytest.mark.parametrize("name", ["crc5", "crc5-ebhi"])
def test_the_page_has_the_cards_figures(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "crc5.md").read_text(encoding="utf-8")
    card = load_model(name)
    figures = json.loads((card.folder / "figures.json").read_text(encoding="utf-8"))
    for row in page_rows(figures["held_out"]):
        assert row in page
    assert card.evaluation_command in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crc5", "crc5-ebhi"])
def test_the_command_on_the_card_gives_its_figures(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Some minutes on one core: all of fold 0."""
    card = load_model(name)
    figures = json.loads((card.folder / "figures.json").read_text(encoding="utf-8"))
    command = shlex.split(card.evaluation_command.replace("DIR", str(data_dir())))
    assert command[0] == "wsiengine"
    assert main([*command[1:], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    said = figures["held_out"]
    for report in (said, found):  # bins of probabilities hold few rows each: one more or less moves them far
        for part in (report, *report.get("sets", {}).values()):
            for level in ("tile", "image", "case"):
                part[level].pop("reliability")
    _same(said, found)
    sets = json.loads((card.folder / "sets.json").read_text(encoding="utf-8"))
    assert card.description == describe(figures, sets)
    for info in card.classes:
        asserted = info.asserted_as or info.name
        evidence = info.evidence[asserted] if info.asserted_as else info.evidence
        assert evidence["recall"] == pytest.approx(found["image"]["per_class"][asserted]["recall"], abs=5e-3)
