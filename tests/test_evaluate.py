"""Every figure against scikit-learn, and the bootstrap against what it must do."""

import numpy as np
import pytest
from sklearn import metrics

from wsiengine import evaluate
from wsiengine.errors import WsiError


@pytest.fixture
def rows():
    rng = np.random.default_rng(3)
    true = rng.integers(0, 3, 400)
    probability = rng.dirichlet([1, 1, 1], 400)
    probability[np.arange(400), true] += 0.4
    return true, np.round(probability / probability.sum(axis=1, keepdims=True), 2)  # rounded: there are ties


def test_confusion_and_class_figures_are_scikit_learns(rows):
    true, probability = rows
    predicted = probability.argmax(axis=1)
    counts = evaluate.confusion(true, predicted, 3)
    assert (counts[:, :3] == metrics.confusion_matrix(true, predicted)).all()
    assert not counts[:, 3].any()
    got = evaluate.class_figures(counts)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(true, predicted)
    np.testing.assert_allclose(got.precision, precision)
    np.testing.assert_allclose(got.recall, recall)
    np.testing.assert_allclose(got.f1, f1)
    for c in range(3):
        rest = metrics.confusion_matrix(true == c, predicted == c)
        np.testing.assert_allclose(got.specificity[c], rest[0, 0] / rest[0].sum())
        np.testing.assert_allclose(got.npv[c], rest[0, 0] / rest[:, 0].sum())
    np.testing.assert_allclose(evaluate.balanced_accuracy(counts), metrics.balanced_accuracy_score(true, predicted))


def test_no_class_counts_as_wrong_and_absent_classes_are_left_out():
    counts = evaluate.confusion(np.array([0, 0, 1, 1]), np.array([0, 3, 1, 7]), 3)
    assert counts.tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]]
    figures = evaluate.class_figures(counts)
    assert figures.recall[:2].tolist() == [0.5, 0.5]
    assert np.isnan(figures.recall[2])
    assert evaluate.balanced_accuracy(counts) == 0.5
    assert figures.specificity.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("label", [0, 1, 2])
def test_ranking_is_scikit_learns(rows, label):
    true, probability = rows
    positive, score = true == label, probability[:, label]
    np.testing.assert_allclose(evaluate.auroc(positive, score), metrics.roc_auc_score(positive, score))
    np.testing.assert_allclose(
        evaluate.average_precision(positive, score), metrics.average_precision_score(positive, score)
    )


def test_ranking_without_both_kinds_is_undefined():
    assert np.isnan(evaluate.auroc(np.ones(3, bool), np.arange(3.0)))
    assert np.isnan(evaluate.average_precision(np.zeros(3, bool), np.arange(3.0)))


def test_reliability_of_a_liar():
    probability = np.tile([0.9, 0.1], (10, 1))
    found = evaluate.reliability(np.array([0] * 6 + [1] * 4), probability, bins=10)
    assert found.count.tolist() == [0] * 8 + [10, 0]
    np.testing.assert_allclose(found.error, 0.3)
    np.testing.assert_allclose(evaluate.reliability(np.zeros(10, int), np.tile([1.0, 0.0], (10, 1))).error, 0)


def test_bootstrap_draws_cases_not_rows():
    """Ten equal rows of one case say no more than one row."""
    value = np.repeat([0.0, 1.0, 0.0, 1.0], 10)
    cases = np.repeat(["a", "b", "c", "d"], 10)
    by_case = evaluate.case_bootstrap(lambda i: float(value[i].mean()), cases)
    by_row = evaluate.case_bootstrap(lambda i: float(value[i].mean()), np.arange(40))
    assert by_case.value == by_row.value == 0.5
    assert by_case.cases == 4
    assert by_case.high - by_case.low > 2 * (by_row.high - by_row.low)
    assert evaluate.case_bootstrap(lambda i: float(value[i].mean()), cases) == by_case  # the same draws every time


def test_bootstrap_takes_cases_whole():
    """One case of unlike rows has one mean, however often it is drawn."""
    value, cases = np.array([0.0, 1.0, 5.0]), np.array(["a", "a", "a"])
    found = evaluate.case_bootstrap(lambda i: float(value[i].mean()), cases)
    assert (found.low, found.value, found.high) == (2.0, 2.0, 2.0)


def test_bootstrap_keeps_strata():
    value, cases = np.array([0.0, 0, 0, 1]), np.array(["a", "b", "c", "d"])
    fixed = evaluate.case_bootstrap(lambda i: float(value[i].mean()), cases, value)
    assert (fixed.low, fixed.high) == (0.25, 0.25)


def test_bootstrap_covers_the_truth():
    """Of a mean of 30 cases, the 90 % interval holds the true 0 about 90 % of the time."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(120):
        value = rng.normal(size=30)
        found = evaluate.case_bootstrap(lambda i, v=value: float(v[i].mean()), np.arange(30), repeats=200, level=0.9)
        held += found.low <= 0 <= found.high
    assert 0.8 <= held / 120 <= 0.98


def test_bootstrap_of_nothing_says_so():
    nothing = np.array([], int)
    with pytest.raises(WsiError, match="nothing to evaluate"):
        evaluate.case_bootstrap(lambda i: 0.0, nothing)
    with pytest.raises(WsiError, match="nothing to evaluate"):
        evaluate.balanced_by_case(nothing, nothing, 2, nothing)


@pytest.mark.parametrize("grouped", [False, True])
def test_balanced_accuracy_by_case_is_that_of_the_bootstrap_row_by_row(rows, grouped):
    """The same estimate by other draws: bounds agree as far as 2,000 draws tell (a half per cent or so)."""
    true, probability = rows
    predicted = np.where(probability.max(axis=1) < 0.4, 3, probability.argmax(axis=1))  # some without an answer
    cases = np.arange(400) // 9
    strata = true if grouped else None

    def figure(picked):
        return evaluate.balanced_accuracy(evaluate.confusion(true[picked], predicted[picked], 3))

    slow = evaluate.case_bootstrap(figure, cases, strata)
    fast = evaluate.balanced_by_case(true, predicted, 3, cases, strata)
    assert (fast.value, fast.cases) == (slow.value, slow.cases)
    assert fast.low == pytest.approx(slow.low, abs=0.006)
    assert fast.high == pytest.approx(slow.high, abs=0.006)
    assert slow.high - slow.low > 0.05
    one = evaluate.balanced_by_case(true, predicted, 3, np.zeros(400, int))
    assert one.low == one.value == one.high  # of one case there is nothing to draw


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("weighted", None),
        ("sum", [[2.3, 1.7, 1.0], [0.2, 0.8, 0.0]]),
        ("average", [[0.46, 0.34, 0.2], [0.2, 0.8, 0.0]]),
        ("vote", [[3, 1, 1], [0, 1, 0]]),
        ("exist", [[1, 2, 3], [0, 2, 0]]),
        ("exist-3", [[1, 0, 0], [1, 0, 0]]),
    ],
)
def test_rules_join_tiles(rule, expected):
    probability = np.array([[0.6, 0.4, 0], [0.6, 0.4, 0], [0.2, 0.8, 0], [0.8, 0.1, 0.1], [0.2, 0.8, 0], [0.1, 0, 0.9]])
    group = np.array([7, 7, 3, 7, 7, 7])
    groups, scores = evaluate.aggregate(probability, group, rule)
    assert groups.tolist() == [3, 7]
    if rule == "weighted":  # the mean of logarithms, to one
        part = np.exp(np.mean(np.log(np.maximum(probability[group == 7], np.finfo(np.float32).tiny)), axis=0))
        expected = [part / part.sum(), probability[2]]
    np.testing.assert_allclose(scores[::-1], expected, atol=1e-12)


def test_unknown_rule_is_named():
    with pytest.raises(WsiError, match="no rule 'max'"):
        evaluate.aggregate(np.ones((1, 2)), np.array([0]), "max")
