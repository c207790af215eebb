"""crc5 and crc5-ebhi in int8, as bundled: what their cards say, on held-out tissue, and on every kind of processor."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.data import data_dir
from wsiengine.evaluating import score_images
from wsiengine.evaluation_report import predicted
from wsiengine.models.registry import load_model
from wsiengine.models.session import open_runtime
from wsiengine.training.data import CLASSES, read_fields

SOURCES = {"crc5": ("ebhi", "glas", "lc25000"), "crc5-ebhi": ("ebhi",)}


@pytest.fixture(scope="module", params=SOURCES)
def card(request):
    return load_model(request.param)


def test_the_card_says_what_it_costs(card):
    found = card.variants["int8"]
    assert found.agreement >= 0.98
    assert found.loss_points <= 1
    assert found.faithful  # `--precision auto` takes it
    assert found.facts["tiles"] > 500
    assert found.facts["cases"] > 40
    assert card.at("int8").model_path.stat().st_size < 3e6


def test_no_processor_can_overflow(card):
    model = onnx.load(card.at("int8").model_path)
    stored = [numpy_helper.to_array(w) for w in model.graph.initializer]
    weights = [w for w in stored if w.dtype == np.int8 and w.ndim == 4]
    assert len(weights) >= 45
    assert 2 * 255 * max(int(np.abs(w.astype(int)).max()) for w in weights) < 2**15


def test_a_sample_of_held_out_tissue_agrees(card):
    step = 8 if card.name == "crc5" else 4
    fields = [f for f in read_fields(data_dir(), SOURCES[card.name]) if f.fold == 0 and f.label in CLASSES][::step]
    below = card.uncertain.below
    whole, other = (
        predicted(score_images(card, fields, open_runtime(card, kind, device="cpu")), below)
        for kind in ("fp32", "int8")
    )
    assert len(whole) > 100
    same = float((whole == other).mean())
    assert same >= 0.92  # of a sample; the card has all of fold 0
    assert not np.array_equal(whole, np.full_like(whole, whole[0]))


def test_float16_was_measured_and_is_not_bundled():
    card = load_model("crc5")
    found = card.precision["measured"]["fp16"]
    assert "fp16" not in card.variants
    assert found["agreement"] >= 0.98
    assert found["loss_points"] <= 1
    assert (found["tiles"], found["cases"]) == (1083, 145)


def test_all_weights_in_the_package_stay_small():
    zoo = load_model("crc5").folder.parent
    assert sum(file.stat().st_size for file in zoo.rglob("*.onnx")) < 25e6
