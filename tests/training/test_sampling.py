"""Random tiles: the same for the same seed, balanced, masks moved as pixels are; stains that stay stains."""

import cv2
import numpy as np
import pytest

from tests.training.fields import draw, write_sets
from wsiengine.training import augment, data
from wsiengine.training.crc5 import RECIPE
from wsiengine.training.sampling import NEGATIVE_SHARE, SPOILT_SHARE, UNREADABLE, Sampler


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    fields = data.read_fields(write_sets(tmp_path_factory.mktemp("data"), images=2))
    return [data.load(f, 1.0) for f in fields]


def sampler(pixels, seed):
    return Sampler(pixels, RECIPE.classes, RECIPE.joins, RECIPE.shares, cell_px=32, seed=seed)


def test_a_batch_depends_on_seed_and_iteration_alone(pixels):
    one = sampler(pixels, seed=4)
    one.batch(0, 3, 64)
    again, other = sampler(pixels, seed=4), sampler(pixels, seed=5)
    first, same = one.batch(7, 4, 96), again.batch(7, 4, 96)
    np.testing.assert_array_equal(first.tiles, same.tiles)
    np.testing.assert_array_equal(first.labels, same.labels)
    assert (first.tiles != other.batch(7, 4, 96).tiles).any()
    assert first.tiles.shape == (4, 96, 96, 3)
    assert first.epithelium.shape == (4, 3, 3)


def test_classes_come_up_alike_and_negatives_have_no_class(pixels):
    batch = sampler(pixels, seed=0).batch(0, 500, 64)
    share = np.bincount(batch.labels + 2, minlength=5) / 500
    assert share[2:].min() > 0.2
    assert NEGATIVE_SHARE / 2 < share[1] < 0.35
    assert SPOILT_SHARE / 2 < share[0] < SPOILT_SHARE * 1.5
    assert np.isnan(batch.epithelium[batch.labels == UNREADABLE]).all()
    covered = batch.epithelium.mean(axis=(1, 2))
    assert np.isnan(covered).any()  # no mask in one of the sets
    assert np.nanmean(covered[batch.labels == -1]) < 0.1
    assert np.nanmin(covered[batch.labels >= 0]) >= 0.14


def test_polyps_train_the_normal_output(pixels):
    polyps = [p for p in pixels if p.field.label == "Polyp"]
    others = [p for p in pixels if p.field.label not in ("Polyp", "Normal")]
    batch = sampler(polyps + others, seed=1).batch(0, 60, 64)
    assert (batch.labels == 0).sum() > 8


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_view_moves_mask_and_pixels_alike(mirrored):
    image, mask = draw(190, 230, seed=9)
    field = data.Pixels(None, np.repeat(mask[:, :, None], 3, axis=2), mask)
    tile, cut_mask = augment.cut(field, augment.View(90, 120, 1.2, 97.0, mirrored), 128)
    np.testing.assert_array_equal(tile[:, :, 1], cut_mask)
    assert 0.05 < (cut_mask > 127).mean() < 0.95
    level, _ = augment.cut(data.Pixels(None, image, mask), augment.View(94.5, 114.5, 1.0, 0.0, False), 128)
    np.testing.assert_array_equal(level, image[31:159, 51:179])


def test_views_stay_inside():
    rng = np.random.default_rng(0)
    for _ in range(50):
        view = augment.random_view(rng, (300, 420, 3), 128, (0.8, 1.2))
        half = 64 / view.scale
        assert half <= view.centre_y <= 300 - half
        assert half <= view.centre_x <= 420 - half


def _stained(vectors, seed=0):
    """Pixels that mix two stains and glass."""
    rng = np.random.default_rng(seed)
    amounts = rng.gamma(1.5, 0.5, (120, 120, 2)) * (rng.random((120, 120, 1)) < 0.8)
    return np.clip(256 * np.exp(-amounts @ np.asarray(vectors)) - 1, 0, 255).astype(np.uint8)


def test_stain_vectors_are_found():
    haematoxylin, eosin = np.array([0.65, 0.70, 0.29]), np.array([0.15, 0.95, 0.25])
    haematoxylin, eosin = haematoxylin / np.linalg.norm(haematoxylin), eosin / np.linalg.norm(eosin)
    found = augment.measure_stain(_stained([haematoxylin, eosin]))
    assert found.vectors[0] @ haematoxylin > 0.995
    assert found.vectors[1] @ eosin > 0.995
    assert np.abs(found.glass).max() < 0.02


def test_restaining_with_the_identity_changes_nothing_and_glass_stays_glass():
    image = _stained([[0.6, 0.7, 0.3], [0.2, 0.9, 0.2]])
    np.testing.assert_allclose(augment.restain(image, np.eye(3), np.zeros(3)), image, atol=1)
    have = augment.measure_stain(image)
    want = augment.measure_stain(_stained([[0.5, 0.8, 0.2], [0.1, 0.8, 0.4]], seed=1))
    white = np.full((4, 4, 3), 255, np.uint8)
    matrix, _ = augment.stain_change(np.random.default_rng(0), have, want)
    assert augment.restain(white, matrix, np.zeros(3)).min() == 255


def test_mixing_moves_towards_the_other_stain():
    have = augment.measure_stain(_stained([[0.6, 0.7, 0.3], [0.2, 0.9, 0.2]]))
    image = _stained([[0.5, 0.8, 0.2], [0.1, 0.6, 0.6]], seed=1)
    want = augment.measure_stain(image)
    nearer = 0
    for seed in range(30):
        matrix, _ = augment.stain_change(np.random.default_rng(seed), have, want)
        eosin = have.vectors[1] @ matrix
        nearer += (eosin / np.linalg.norm(eosin)) @ want.vectors[1] > have.vectors[1] @ want.vectors[1]
    assert nearer > 24


def test_bare_glass_gets_the_textbooks_stain():
    blank = np.full((50, 50, 3), 250, np.uint8)
    stain = augment.measure_stain(blank)
    np.testing.assert_allclose(np.linalg.norm(stain.vectors, axis=1), 1)


def test_spoilt_tiles_have_lost_focus_or_light():
    image = _stained([[0.65, 0.70, 0.29], [0.15, 0.95, 0.25]])
    detail = cv2.Laplacian(image, cv2.CV_64F).std()
    results = [augment.spoil(np.random.default_rng(s), image) for s in range(30)]
    blurred = [cv2.Laplacian(r, cv2.CV_64F).std() < detail / 10 for r in results]
    dark = [r.reshape(-1, 3).max(axis=0).min() < 60 for r in results]
    assert all(a or b for a, b in zip(blurred, dark, strict=True))
    assert 8 <= sum(blurred) <= 25


def test_degrading_keeps_shape_and_type():
    image, _ = draw(64, 64, 1)
    results = [augment.degrade(np.random.default_rng(s), image) for s in range(40)]
    assert {(r.shape, r.dtype) for r in results} == {((64, 64, 3), np.dtype(np.uint8))}
    changed = [np.abs(r.astype(int) - image).mean() for r in results]
    assert max(changed) > 3
    assert max(changed) < 60
    assert cv2.mean(results[0])[:3] != cv2.mean(results[1])[:3]


def test_stains_of_every_set_are_taken_on_alike(pixels):
    """Two fields of one set against all of two others: a set comes first, then a field of it."""
    few = [p for p in pixels if p.field.source == "glas"][:2]
    some = few + [p for p in pixels if p.field.source != "glas"]
    chooser = sampler(some, seed=0)
    rng = np.random.default_rng(5)
    drawn = [chooser.draw(rng, 64).like for _ in range(300)]
    taken = [some[i].field.source for i in drawn if i is not None]
    assert 0.4 < len(taken) / 300 < 0.6
    assert min(taken.count(name) for name in ("ebhi", "glas", "lc25000")) > 0.25 * len(taken)
