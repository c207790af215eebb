"""The recipe: learns, resumes as if never interrupted, refuses another recipe's folder; scores, figures and card."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.fields import write_sets
from wsiengine.errors import OutputConflict, WsiError
from wsiengine.models.card import load_card
from wsiengine.models.runtime import Runtime
from wsiengine.training import cells, evidence, export, figures, loop, release, scoring, validate
from wsiengine.training.crc5 import RECIPE
from wsiengine.training.data import read_fields
from wsiengine.training.decision import MiddleRule
from wsiengine.training.other_stain import remaining_say

SHORT = {"iterations": 4, "batches": (4, 2), "sides_px": (64, 96), "frozen_blocks": 1, "threads": 1}
TINY = replace(RECIPE, folds=(1,), **SHORT)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def fields(data):
    return read_fields(data)


@pytest.fixture
def small(monkeypatch):
    """A narrow network that starts from chance instead of ImageNet."""

    class Narrow(cells.CellNet):
        def __init__(self, classes, width=0.25, **kind):
            super().__init__(classes, width, **kind)

    monkeypatch.setattr(loop, "CellNet", Narrow)
    monkeypatch.setattr(loop, "load_weights", lambda backbone, file: None)


@pytest.fixture
def trained(fields, small, tmp_path):
    loop.train(fields, TINY, backbone=None, out=tmp_path / "run")
    return tmp_path / "run"


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(fields, small, trained, tmp_path, monkeypatch):
    whole = torch.load(trained / "model.pt", weights_only=True)
    save = loop.Trainer._save
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 2)

    def save_and_stop(self):
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "_save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        loop.train(fields, TINY, backbone=None, out=tmp_path / "again")
    monkeypatch.setattr(loop.Trainer, "_save", save)
    loop.train(fields, TINY, backbone=None, out=tmp_path / "again")
    resumed = torch.load(tmp_path / "again" / "model.pt", weights_only=True)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    logged = [json.loads(line) for line in (tmp_path / "again" / "log.jsonl").read_text().splitlines()]
    assert logged[-1]["iteration"] == 4


def test_another_recipes_folder_is_refused(fields, small, trained):
    with pytest.raises(OutputConflict, match="another recipe"):
        loop.train(fields, replace(TINY, seed=1), backbone=None, out=trained)
    assert loop.Recipe.read(trained / "recipe.json") == TINY


def test_training_fits_a_few_fields(fields, small, tmp_path):
    recipe = replace(TINY, iterations=60, small_until=1.0, batches=(8, 8), frozen_blocks=0, rate=3e-3)
    loop.train(fields, recipe, backbone=None, out=tmp_path / "run")
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert logged[-1]["gate_loss"] < 0.68  # below ln 2: it tells discs from the ground


def test_a_case_of_the_training_is_never_scored(fields, small, trained):
    with pytest.raises(WsiError, match="in training and in test"):
        validate.score_run(trained, fields, {1}, {"ebhi"})


def test_scores_go_to_a_file_and_back(fields, small, trained, tmp_path):
    tiles, windows = validate.score_run(trained, fields, {0}, {"ebhi", "lc25000"})
    tiles.save(tmp_path / "a.npz")
    again = scoring.load_scores([tmp_path / "a.npz"], fields)
    assert again.fields == tiles.fields
    np.testing.assert_array_equal(again.logits, tiles.logits)
    assert len(windows.fields) == len(windows.epithelium)
    with pytest.raises(WsiError, match="unknown or there twice"):
        scoring.load_scores([tmp_path / "a.npz", tmp_path / "a.npz"], fields)


def shipped(network):
    """What the file says: the network with the rule for other stains."""

    def predict(tiles):
        with torch.inference_mode():
            cam, gate = network(torch.from_numpy(tiles).permute(0, 3, 1, 2))
        say = np.stack([remaining_say(tile, release.STAINS) for tile in tiles])[:, None]
        return (cam.numpy() * say).mean(axis=(2, 3)), gate.sigmoid().mean(dim=(1, 2)).numpy()

    return predict


@pytest.mark.parametrize("name", ["crc5", "crc5-ebhi"])
def test_the_bundle_is_a_model_that_the_engine_runs(name, data, fields, small, trained, tmp_path):
    sources = ("ebhi",) if name == "crc5-ebhi" else TINY.sources
    recipe, bundle = replace(TINY, sources=sources), release.BUNDLES[name]
    network = MiddleRule(0.2, 1.0).built_in(loop.load_trained(trained))
    splits = {"without-glas": {"rule": {"glas": {"balanced_accuracy": 0.6}}}}
    found = release.gather(recipe, fields, None, splits)
    release.write_model(network, recipe, bundle, tmp_path / "model", found)
    report = evidence.measure(tmp_path / "model", data, "0")
    evidence.write_evidence(tmp_path / "model", report, "0")
    card = load_card(tmp_path / "model" / "card.json")
    assert json.loads((tmp_path / "model" / "figures.json").read_text())["held_out"] == report
    assert report["image"]["n"] == sum(f.fold == 0 and f.source in sources and f.label != "Polyp" for f in fields)
    assert report["answers"]["image"]["Polyp"]["n"] == 1
    assert list(report.get("sets", {})) == (list(sources) if len(sources) > 1 else [])
    assert card.evaluation_command == f"wsiengine evaluate --model {name} --data DIR/crc --sets own --folds 0"
    assert f"from {report['image']['balanced_accuracy']['low']:.3f}" in card.description
    assert card.classes[0].evidence["images_tested"] == report["image"]["per_class"]["Normal"]["n"]
    assert [c.name for c in card.map_classes] == ["Normal", "Adenoma", "Adenocarcinoma"]
    assert len(card.classes) == (3 if name == "crc5-ebhi" else 5)
    if name == "crc5":
        assert card.classes[2].evidence["cases_tested"] == 0
    assert "--folds 1" in card.training_command
    assert ("--sources ebhi" in card.training_command) == (name == "crc5-ebhi")
    assert "did not see: glas 0.6" in card.description
    pixels = np.random.default_rng(0).integers(0, 256, (224, 672, 3), dtype=np.uint8)
    pixels[:, :448, 1] //= 3  # pink
    pixels[:, 448:] = pixels[:, 448:] // 3 + np.array([150, 90, 20], np.uint8)  # brown
    scores = Runtime(card, device="cpu").scores(pixels, np.array([[0, 0], [0, 224], [0, 448]]))
    logits, epithelium = shipped(export.widened(network))(np.stack(np.split(pixels, 3, axis=1)))
    np.testing.assert_allclose(scores[:, :2], logits[:, :2], atol=2e-4)
    np.testing.assert_allclose(scores[:, -1], epithelium, atol=1e-4)
    assert np.abs(logits[0]).max() > 1e-3
    assert (logits[2] == 0).all()  # another stain: nothing is said


def _scores(fields, logits, epithelium, drawn):
    return scoring.Scores(tuple(fields), np.array(logits, float), np.array(epithelium, float), np.array(drawn, float))


def test_figures_leave_out_what_has_no_diagnosis(fields):
    normal = next(f for f in fields if f.label == "Normal" and f.source == "ebhi")
    cancer = next(f for f in fields if f.label == "Adenocarcinoma" and f.source == "lc25000")
    polyp = next(f for f in fields if f.label == "Polyp")
    scores = _scores(
        [normal, normal, cancer, cancer, polyp],
        [[3, 0, 0], [0, 0, 3], [0, 0, 3], [0, 0, 3], [0, 3, 0]],
        [0.9, 0.9, 0.9, 0.1, 0.9],
        [0.5, 0.1, np.nan, np.nan, 0.5],
    )
    found = figures.table(scores)
    assert found["all"]["confusion"] == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]  # shut by the gate: wrong
    assert found["all"]["balanced_accuracy"] == 0.75
    assert found["ebhi"]["rows"] == 1
    assert found["all"]["classes"]["Adenocarcinoma"]["recall"] == 0.5


def test_images_are_joined_by_epithelium(fields):
    scores = _scores([fields[0]] * 2, [[4, 0, 0], [0, 4, 0]], [0.3, 0.9], [0.2, 0.4])
    image = scores.by_field()
    np.testing.assert_allclose(image.logits, [[1, 3, 0]])
    np.testing.assert_allclose(image.drawn, [0.3])


def test_temperature_undoes_overconfidence(fields):
    """Right in 3 of 4 cases with logits that claim more than 0.99."""
    chosen = [f for f in fields if f.label == "Normal"][:4]
    logits = [[6.0, 0, 0], [6.0, 0, 0], [6.0, 0, 0], [0, 6.0, 0]]
    scores = _scores(chosen, logits, [1] * 4, [1] * 4)
    temperature = figures.best_temperature(scores)
    claimed = figures.softmax(scores.logits / temperature).max(axis=1)
    assert claimed == pytest.approx(0.75, abs=0.03)
    rule = figures.uncertain_below(scores, temperature)
    assert rule["below"] == 0.7
    assert figures.uncertain_below(scores, 1000.0)["below"] == figures.LEAST_SURE  # never below a third and a quarter


def test_false_diagnoses_are_counted(fields):
    windows = _scores(fields[:1] * 3 + fields[1:2], np.zeros((4, 3)), [0.1, 0.4, 0.1, 0.5], [0] * 4)
    found = figures.false_diagnosis(windows)
    assert found == {"rate": 0.5, "rate_mean_over_cases": 0.667, "cases": 2, "windows": 4}
    assert figures.false_diagnosis(windows.where(np.zeros(4, bool)))["rate"] is None


def test_a_higher_gate_misses_more_and_errs_less(fields):
    scores = _scores(fields[:1] * 2 + fields[1:3], np.zeros((4, 3)), [0.9, 0.22, 0.32, 0.1], [0.5, 0.5, 0.5, 0.1])
    windows = _scores(fields[:2], np.zeros((2, 3)), [0.1, 0.27], [0, 0])
    choices = {c["minimum"]: c for c in figures.gate_choices(scores, windows)}
    assert [choices[m]["epithelium_missed"] for m in (0.2, 0.25, 0.35)] == [0.0, 0.25, 0.75]
    assert [choices[m]["false_diagnosis"] for m in (0.2, 0.3)] == [0.5, 0.0]


def test_windows_without_epithelium_have_none(fields):
    seen = []

    def predict(tiles):
        seen.append(tiles)
        return np.zeros((len(tiles), 3)), np.zeros(len(tiles))

    chosen = [f for f in fields if f.source == "glas"]
    windows = scoring.negative_windows(chosen, predict, 0.31)
    assert 0 < len(windows.fields) == sum(map(len, seen))
    assert all(tiles.shape[1:] == (224, 224, 3) for tiles in seen)
    dark = np.concatenate(seen).astype(int)[:, 48:176, 48:176].sum(axis=3) < 330
    assert dark.mean() < 0.03  # the drawn discs are dark
