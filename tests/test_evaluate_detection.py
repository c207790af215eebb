"""AP against COCO's own program, FROC and overlaps against cases counted by hand."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiengine.evaluate_detection import (
    COCO_IOUS,
    Matches,
    at_score,
    average_precision,
    case_interval,
    froc,
    match,
    sensitivity_at,
)

Image = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def drawn(seed: int, images: int = 6) -> list[Image]:
    """Found boxes, scores, true boxes, ignored; found ones are true ones moved, some doubled, some invented."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(images):
        count = int(random.integers(0, 7))
        corner = random.uniform(0, 200, (count, 2))
        true = np.hstack([corner, corner + random.uniform(8, 60, (count, 2))])
        seen = true[random.random(count) < 0.8]
        moved = np.vstack([seen + random.normal(0, 3, seen.shape), seen[:2] + random.normal(0, 6, seen[:2].shape)])
        corner = random.uniform(0, 200, (int(random.integers(0, 4)), 2))
        invented = np.hstack([corner, corner + random.uniform(8, 60, corner.shape)])
        found = np.vstack([moved, invented])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        made.append((found, random.random(len(found)).round(2), true, random.random(count) < 0.15))
    return made


def ours(images: list[Image], iou: float) -> list[Matches]:
    return [match(found, scores, true, ignored, iou) for found, scores, true, ignored in images]


def published(images: list[Image]) -> np.ndarray:
    """AP at each of COCO's overlaps by pycocotools; ignored annotations are crowds."""
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools (test extra) is not installed")
    from pycocotools.cocoeval import COCOeval

    def flat(box: np.ndarray) -> list[float]:
        return [float(v) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1])]

    truth = coco.COCO()
    truth.dataset = {"images": [{"id": i} for i in range(len(images))], "categories": [{"id": 1}], "annotations": []}
    results = []
    for i, (found, scores, true, ignored) in enumerate(images):
        for box, crowd in zip(true, ignored, strict=True):
            entry = {"id": len(truth.dataset["annotations"]) + 1, "image_id": i, "category_id": 1, "bbox": flat(box)}
            truth.dataset["annotations"].append(
                entry | {"area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": int(crowd)}
            )
        results += [
            {"image_id": i, "category_id": 1, "bbox": flat(box), "score": float(score)}
            for box, score in zip(found, scores, strict=True)
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.maxDets = [1, 10, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, 0, 0, -1]
    return precision.mean(axis=1)


@pytest.mark.parametrize("seed", range(12))
def test_average_precision_is_cocos(seed: int) -> None:
    images = drawn(seed)
    expected = published(images)
    mine = [average_precision(ours(images, iou)) for iou in COCO_IOUS]
    np.testing.assert_allclose(mine, expected, atol=1e-9)


def box(x: float, side: float = 10) -> list[float]:
    return [x, 0, x + side, side]


def by_hand() -> list[Matches]:
    """Two images: 3 annotations; by score: hit .9, wrong .8, hit .7, wrong .6 (a double of the first)."""
    first = match(
        np.array([box(0), box(1), box(100)]), np.array([0.9, 0.6, 0.8]), np.array([box(0), box(50)]), np.zeros(2, bool)
    )
    second = match(np.array([box(20)]), np.array([0.7]), np.array([box(22)]), np.zeros(1, bool))
    return [first, second]


def test_precision_and_sensitivity_by_hand() -> None:
    matches = by_hand()
    # Recalls 1/3 (precision 1) and 2/3 (precision 2/3): area 1/3 + 2/9; at 101 recalls 34 · 1 + 33 · 2/3.
    assert average_precision(matches, "voc") == pytest.approx(1 / 3 + 2 / 9)
    assert average_precision(matches) == pytest.approx((34 + 33 * 2 / 3) / 101)
    wrong, right, scores = froc(matches)
    assert wrong.tolist() == [0, 0.5, 0.5, 1]
    assert right.tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert scores.tolist() == [0.9, 0.8, 0.7, 0.6]
    assert [sensitivity_at(matches, f) for f in (0, 0.4, 0.5, 4)] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])


def test_figures_at_a_score_by_hand() -> None:
    found = at_score(by_hand(), 0.65)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["fppi"] == 0.5
    # Overlaps 1 and 8/12; of the found boxes 1 and 8/10 lie in the annotation.
    assert found["iou"] == pytest.approx((1 + 8 / 12) / 2)
    assert found["overlapping_ratio"] == pytest.approx(0.9)
    # Counts 2 of 2 and 1 of 1.
    assert found["counting_error"] == 0
    assert at_score(by_hand(), 0.75)["counting_error"] == 0.5
    assert at_score(by_hand(), 0.75)["counting_error_relative"] == pytest.approx(1 / 3)


def test_the_overlapping_ratio_is_of_the_found_box() -> None:
    inside = match(np.array([[2, 2, 8, 8]]), np.array([0.9]), np.array([[0, 0, 10, 10]]), np.zeros(1, bool), 0.3)
    assert inside.ratio[0] == 1
    assert inside.overlap[0] == pytest.approx(0.36)


def test_ignored_annotations_count_neither_way() -> None:
    true = np.array([box(0, 100), box(200)])
    found = match(np.array([box(10), box(40), box(200), box(300)]), np.full(4, 0.5), true, np.array([True, False]))
    assert found.counted.tolist() == [False, False, True, True]
    assert found.hits.tolist() == [False, False, True, False]
    assert found.true == 1


@pytest.mark.parametrize("rule", ["coco", "voc"])
def test_nothing_found_and_nothing_to_find(rule: str) -> None:
    none = np.zeros((0, 4))
    missed = [match(none, np.zeros(0), np.array([box(0)]), np.zeros(1, bool))]
    empty = [match(np.array([box(0)]), np.ones(1), none, np.zeros(0, bool))]
    assert average_precision(missed, rule) == 0
    assert np.isnan(average_precision(empty, rule))
    assert sensitivity_at(missed, 1) == 0
    assert np.isnan(sensitivity_at(empty, 1))
    assert at_score(empty, 0.5)["fppi"] == 1
    with pytest.raises(ValueError, match="no rule"):
        average_precision(missed, "other")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_order_of_images_and_of_objects_does_not_matter(seed: int) -> None:
    images = drawn(seed, 4)
    random = np.random.default_rng(seed + 1)
    # All scores differ: among equals the order is free.
    images = [(f, np.linspace(0.1, 0.9, len(f)) + 0.01 * i, t, g) for i, (f, _, t, g) in enumerate(images)]
    turned = []
    for i in random.permutation(4):
        found, scores, true, ignored = images[i]
        p, q = random.permutation(len(found)), random.permutation(len(true))
        turned.append((found[p], scores[p], true[q], ignored[q]))
    for iou in (0.5, 0.75):
        a, b = average_precision(ours(images, iou)), average_precision(ours(turned, iou))
        assert a == pytest.approx(b, nan_ok=True)


def test_intervals_resample_cases() -> None:
    good = match(np.array([box(0)]), np.ones(1), np.array([box(0)]), np.zeros(1, bool))
    bad = match(np.array([box(90)]), np.ones(1), np.array([box(0)]), np.zeros(1, bool))
    matches = [good] * 10 + [bad] * 10

    def recall(drawn: list[Matches]) -> float:
        return at_score(drawn, 0.5)["recall"]

    two_cases = case_interval(matches, ["p"] * 10 + ["q"] * 10, recall)  # type: ignore[arg-type]
    assert (two_cases.low, two_cases.value, two_cases.high) == (0, 0.5, 1)
    many = case_interval(matches, [str(i) for i in range(20)], recall)  # type: ignore[arg-type]
    assert 0.2 < many.low < 0.5 < many.high < 0.8
