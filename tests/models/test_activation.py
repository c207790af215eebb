"""Logits to probabilities: right, bounded, and the same bits for any layout."""

import numpy as np
import pytest

from wsiengine.models.activation import activate


def test_softmax_is_the_formula() -> None:
    logits = np.array([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]], np.float32)
    powers = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(activate(logits, "softmax"), powers / powers.sum(axis=1, keepdims=True), rtol=1e-6)
    assert activate(logits, "softmax").dtype == np.float32


def test_softmax_of_extreme_logits_stays_finite() -> None:
    assert activate(np.array([1e4, -1e4, 0.0], np.float32), "softmax").tolist() == [1.0, 0.0, 0.0]


def test_sigmoid_is_the_formula_and_stays_finite() -> None:
    logits = np.array([-1000.0, -2.0, 0.0, 2.0, 1000.0], np.float32)
    result = activate(logits, "sigmoid")
    np.testing.assert_allclose(result[1:4], 1 / (1 + np.exp(-logits[1:4])), rtol=1e-6)
    assert result[[0, 2, 4]].tolist() == [0.0, 0.5, 1.0]


def test_identity_changes_nothing() -> None:
    values = np.array([0.25, 0.5], np.float32)
    assert activate(values, "identity").tolist() == [0.25, 0.5]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_bits_do_not_depend_on_layout_or_company(activation: str) -> None:
    logits = np.random.default_rng(3).normal(size=(37, 29, 9)).astype(np.float32) * 5
    whole = activate(logits, activation)
    strided = activate(np.asfortranarray(logits), activation)
    alone = np.array([[activate(logits[y, x], activation) for x in range(29)] for y in range(37)])
    assert np.array_equal(whole, strided)
    assert np.array_equal(whole, alone)


def test_not_analysed_stays_so() -> None:
    assert np.isnan(activate(np.full((2, 3), np.nan, np.float32), "softmax")).all()


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="needed softmax"):
        activate(np.zeros(3), "relu")
