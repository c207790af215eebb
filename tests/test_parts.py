"""Connected parts put together from strips are those of the whole mask."""

import cv2
import numpy as np
import pytest

from wsiengine import parts, scratch


def mask_of(density: float, seed: int, rows: int = 203, cols: int = 61) -> np.ndarray:
    noise = np.random.default_rng(seed).random((rows, cols)).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), 1.0) > np.quantile(cv2.GaussianBlur(noise, (0, 0), 1.0), 1 - density)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("strip_rows", [16, 37, 500])
def test_parts_of_strips_are_parts_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, density: float, connectivity: int, strip_rows: int
) -> None:
    mask = mask_of(density, seed=int(density * 100))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=connectivity)
    monkeypatch.setattr(scratch, "STRIP", strip_rows * mask.shape[1])
    found = parts.label_parts(mask.shape, lambda rows: mask[rows], connectivity)
    assert found.count == count
    own = found.labels(slice(0, len(mask)))
    pairs = {(a, b) for a, b in zip(labels.ravel().tolist(), own.ravel().tolist(), strict=True)}
    assert len(pairs) == count  # one number per part, one part per number
    for whole, number in pairs - {(0, 0)}:
        assert found.area[number] == stats[whole, cv2.CC_STAT_AREA]
        y, x = np.nonzero(labels == whole)
        touches = y.min() == 0 or x.min() == 0 or y.max() == mask.shape[0] - 1 or x.max() == mask.shape[1] - 1
        assert found.at_border[number] == touches


def test_rows_across_strips_have_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = mask_of(0.4, seed=1)
    monkeypatch.setattr(scratch, "STRIP", 16 * mask.shape[1])
    found = parts.label_parts(mask.shape, lambda rows: mask[rows])
    whole = found.labels(slice(0, len(mask)))
    for first, stop in ((0, 16), (5, 40), (15, 17), (190, 203)):
        np.testing.assert_array_equal(found.labels(slice(first, stop)), whole[first:stop])


def test_a_spiral_is_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arms meet in other strips than they begin in: joining must follow chains of labels."""
    mask = np.zeros((99, 99), bool)
    for turn in range(0, 48, 2):
        mask[turn, turn : 99 - turn] = mask[turn : 99 - turn, 98 - turn] = True
        mask[98 - turn, turn : 99 - turn] = mask[turn + 2 : 99 - turn, turn] = True
        mask[turn + 2, turn : turn + 3] = True
    monkeypatch.setattr(scratch, "STRIP", 16 * 99)
    found = parts.label_parts(mask.shape, lambda rows: mask[rows])
    assert found.count == cv2.connectedComponents(mask.view(np.uint8))[0]
    assert found.area[1:].sum() == mask.sum()


def test_only_the_chosen_are_kept() -> None:
    mask = np.zeros((50, 40), bool)
    mask[3:6, 3:6] = mask[20:30, 10:30] = mask[48:, 38:] = True
    large = parts.keep(mask.shape, lambda rows: mask[rows], lambda found: found.area > 20)
    assert large.sum() == 200
    inner = parts.keep(mask.shape, lambda rows: mask[rows], lambda found: ~found.at_border)
    assert inner.sum() == 209
    assert not parts.keep(mask.shape, lambda rows: mask[rows] & False, lambda found: found.area >= 0).any()
