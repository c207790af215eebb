"""The bundled crc5 itself: what its card promises, on real held-out tissue."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import wsiengine
from tests.data import data_dir
from wsiengine.models.registry import load_model
from wsiengine.training.data import load, read_fields
from wsiengine.training.figures import balanced, diagnosed
from wsiengine.training.release import ROWS, STAINS
from wsiengine.training.scoring import score


@pytest.fixture(scope="module")
def card():
    return load_model("crc5")


@pytest.fixture(scope="module")
def session(card):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(card.model_path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def held_out():
    """At most eight fields of every set and label of fold 0, of as many cases as possible."""
    cases = defaultdict(lambda: defaultdict(list))
    for field in read_fields(data_dir()):
        if field.fold == 0:
            cases[field.source, field.label][field.case].append(field)
    chosen = []
    for by_case in cases.values():
        turns = [f for turn in range(8) for fields in by_case.values() for f in fields[turn : turn + 1]]
        chosen += turns[:8]
    return chosen


def test_the_card_is_honest(card):
    assert [c.name for c in card.map_classes] == ["Normal", "Adenoma", "Adenocarcinoma"]
    assert [c.asserted_as for c in card.classes] == [None, None] + ["Adenocarcinoma"] * 3
    assert card.classes[2].evidence["cases_trained"] == 0
    assert all("not validated" in c.evidence["note"] for c in card.classes[2:])
    assert "research use only" in card.licence
    root = Path(wsiengine.__file__).parents[1]
    assert "EBHI-Seg" in (root / card.terms).read_text(encoding="utf-8")
    assert card.gate.minimum >= 0.2
    figures = json.loads((card.folder / "figures.json").read_text(encoding="utf-8"))
    low = figures["held_out"]["image"]["balanced_accuracy"]["low"]
    assert low > 0.45
    assert f"from {low:.3f}" in card.description
    assert card.model_path.stat().st_size < 5e6


def test_scores_are_means_of_maps(session):
    tiles = np.random.default_rng(0).integers(0, 256, (2, 224, 288, 3), dtype=np.uint8)
    logits, epithelium, cam, covered = session.run(None, {"tiles": tiles})
    assert cam.shape == (2, 5, 7, 9)
    np.testing.assert_allclose(logits, cam.mean(axis=(2, 3)), atol=1e-4)
    np.testing.assert_allclose(epithelium, covered.mean(axis=(1, 2)), atol=1e-5)
    np.testing.assert_allclose(logits[:, 2], logits[:, 4], atol=1e-5)  # grades share one score
    assert len(ROWS) == 5


@pytest.mark.parametrize("name", ["crc5", "crc5-ebhi"])
def test_every_file_has_the_rule_for_other_stains(name):
    card = load_model(name)
    for precision in ("fp32", *card.variants):
        model = onnx.load(card.at(precision).model_path)
        found = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
        assert found["stain.high"] == np.float32(STAINS.high)
        assert found["stain.slope"] == np.float32(1 / (STAINS.high - STAINS.low))


def test_held_out_tissue_is_told_apart(session, held_out, card):
    def predict(tiles):
        logits, epithelium = session.run(["logits", "epithelium"], {"tiles": tiles})
        joined = np.stack([np.logaddexp.reduce(logits[:, list(m.channels)], axis=1) for m in card.map_classes], axis=1)
        return joined, epithelium

    images = diagnosed(score(held_out, predict, card.input.mpp.mean)).by_field()
    found = balanced(images, repeats=200)
    assert len(images.fields) > 40
    assert found.value >= 0.75
    assert found.low > 0.45


def test_glass_has_no_epithelium(session, held_out):
    glass = np.full((1, 224, 224, 3), 243, np.uint8)
    assert session.run(["epithelium"], {"tiles": glass})[0][0] < 0.1
    glands = [load(f, 1.0).image[:192, :224] for f in held_out if f.source == "ebhi"][:6]
    assert (session.run(["epithelium"], {"tiles": np.stack(glands)})[0] > 0.2).all()
