"""The middle rule: what it does to scores, that it goes into the head, and that fitting finds it."""

import numpy as np
import pytest
import torch

from tests.training.fields import write_sets
from wsiengine.training.cells import CellNet
from wsiengine.training.data import CLASSES, read_fields
from wsiengine.training.decision import MiddleRule, Worth, fit_rule, image_worth
from wsiengine.training.scoring import Scores


def test_share_one_and_no_lift_change_no_probability():
    logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    scores = Scores((None,) * 5, logits, np.linspace(0.3, 1, 5), np.ones(5))
    new = MiddleRule().applied(scores).logits
    np.testing.assert_allclose(
        new - new.mean(axis=1, keepdims=True), logits - logits.mean(axis=1, keepdims=True), atol=1e-6
    )


def test_share_nought_is_ordinal():
    scores = Scores((None,) * 3, np.array([[2, 9, -1], [0.1, -9, 0], [-1, 9, 3]], np.float32), np.ones(3), np.ones(3))
    new = MiddleRule(0.0, 0.5).applied(scores).logits
    np.testing.assert_allclose(new, [[1.5, 0.5, -1.5], [0.05, 0.5, -0.05], [-2, 0.5, 2]], atol=1e-6)


def test_the_lift_goes_as_far_as_there_is_epithelium():
    scores = Scores((None,) * 2, np.zeros((2, 3), np.float32), np.array([0.25, 1.0]), np.ones(2))
    np.testing.assert_allclose(MiddleRule(0.2, 1.2).applied(scores).logits[:, 1], [0.3, 1.2], atol=1e-6)


def test_the_rule_goes_into_the_head():
    torch.manual_seed(1)
    network = CellNet(3, width=0.25).eval()
    for layer in (network.head, network.gate):
        torch.nn.init.normal_(layer.weight, std=0.3)
        torch.nn.init.normal_(layer.bias)
    rule = MiddleRule(0.2, 1.25)
    pixels = torch.randint(0, 256, (3, 3, 96, 128), dtype=torch.uint8)
    with torch.inference_mode():
        (cam, gate), (ruled, same) = network(pixels), rule.built_in(network)(pixels)
    epithelium = gate.sigmoid().mean(dim=(1, 2)).numpy()
    scores = Scores((None,) * 3, cam.mean(dim=(2, 3)).numpy(), epithelium, np.ones(3))
    np.testing.assert_allclose(ruled.mean(dim=(2, 3)), rule.applied(scores).logits, atol=1e-4)
    assert torch.equal(gate, same)
    assert not np.allclose(ruled.mean(dim=(2, 3)), scores.logits, atol=0.05)


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """Fields in the right order, with an adenoma output that is silent in one set and loud in another."""
    fields = [f for f in read_fields(write_sets(tmp_path_factory.mktemp("data"), images=4)) if f.label in CLASSES]
    severity = np.array([CLASSES.index(f.label) - 1 for f in fields], np.float32)
    own = np.array([{"ebhi": 0.0, "glas": -2.5}.get(f.source, -1.0) for f in fields], np.float32)
    middle = own + np.where(severity == 0, 0.8, -0.4)
    logits = np.stack([-1.5 * severity, middle, 1.5 * severity], axis=1).astype(np.float32)
    return Scores(tuple(fields), logits, np.ones(len(fields), np.float32), np.ones(len(fields), np.float32))


def test_a_rule_is_found_that_holds_in_every_set(shifted):
    assert image_worth(shifted)["glas"] == Worth(pytest.approx(2 / 3), 0.0)
    seen = shifted.column("source") == "ebhi"
    rule = fit_rule(shifted.where(seen), [shifted.where(~seen)])
    assert rule.share < 1
    assert rule.lift > 0
    found = image_worth(rule.applied(shifted))
    assert found == dict.fromkeys(("ebhi", "glas", "lc25000"), Worth(1.0, 1.0))


def test_a_rule_that_costs_accuracy_at_home_is_not_taken(shifted):
    """At home only the middle output tells adenoma; elsewhere only the difference of the others."""
    home = shifted.where(shifted.column("source") == "ebhi")
    severity = home.labels - 1
    logits = np.stack([-0.1 * severity, np.where(severity == 0, 0.2, -0.3), 0.1 * severity], axis=1)
    fine = Scores(home.fields, logits.astype(np.float32), home.epithelium, home.drawn)
    away = shifted.where(shifted.column("source") == "glas")
    rule = fit_rule(fine, [away])
    assert image_worth(rule.applied(fine))["ebhi"] == Worth(1.0, 1.0)
    assert rule.share > 0
    assert fit_rule(away, [away]).share == 0.0
