"""Contours of label maps: exact areas, a valid coverage, and an obvious twin (the union of the cells)."""

import time

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from wsiengine import contours
from wsiengine.contours import trace

maps = hnp.arrays(
    np.uint8,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    elements=st.integers(0, 3),
)


def smooth_map(rows: int, cols: int, *, classes: int = 4, noise: float = 0.05, seed: int = 0) -> np.ndarray:
    """Blobs of several classes (0 among them) with single cells strewn in → uint8."""
    rng = np.random.default_rng(seed)
    fields = np.stack([ndimage.gaussian_filter(rng.standard_normal((rows, cols)), 5) for _ in range(classes)])
    labels = fields.argmax(axis=0).astype(np.uint8)
    strewn = rng.random(labels.shape) < noise
    labels[strewn] = rng.integers(0, classes, strewn.sum())
    return labels


def union_of_cells(component: np.ndarray) -> shapely.Geometry:
    """The slow, obvious outline of a bool (rows, cols) component."""
    y, x = np.nonzero(component)
    return shapely.union_all(shapely.box(x, y, x + 1, y + 1))


@given(maps)
def test_each_component_is_the_union_of_its_cells(labels):
    traced = trace(labels)
    assert shapely.is_valid(traced.polygons).all()
    for number, polygon in enumerate(traced.polygons, 1):
        assert polygon.geom_type == "Polygon"
        assert polygon.equals(union_of_cells(traced.components == number))


@given(maps)
def test_components_are_connected_and_carry_their_label(labels):
    traced = trace(labels)
    assert np.array_equal(np.concatenate(([0], traced.labels))[traced.components], labels)
    for number in range(1, len(traced.labels) + 1):
        assert ndimage.label(traced.components == number)[1] == 1


@given(maps)
def test_neighbours_share_their_vertices(labels):
    assert shapely.coverage_is_valid(trace(labels).polygons)


@given(maps)
def test_smoothing_keeps_a_valid_coverage_within_half_a_cell(labels):
    exact, smooth = trace(labels), trace(labels, smooth=True)
    assert shapely.is_valid(smooth.polygons).all()
    assert shapely.coverage_is_valid(smooth.polygons)
    moved = shapely.hausdorff_distance(shapely.boundary(exact.polygons), shapely.boundary(smooth.polygons))
    assert (moved <= 0.5).all()


@pytest.mark.parametrize("seed", range(3))
def test_smoothing_keeps_areas(seed):
    labels = smooth_map(90, 131, seed=seed)
    exact, smooth = trace(labels), trace(labels, smooth=True)
    exact_area, smooth_area = shapely.area(exact.polygons), shapely.area(smooth.polygons)
    assert smooth_area.sum() == pytest.approx(exact_area.sum(), rel=2e-3)
    large = exact_area >= 100
    assert np.abs(smooth_area[large] / exact_area[large] - 1).max() < 0.03
    assert shapely.get_num_coordinates(smooth.polygons).sum() < shapely.get_num_coordinates(exact.polygons).sum()


def test_a_square_keeps_its_area_and_its_corners():
    """Contours through pixel centres would give 81."""
    labels = np.zeros((14, 17), np.uint8)
    labels[2:12, 3:13] = 1
    for smooth in (False, True):
        (polygon,) = trace(labels, smooth=smooth).polygons
        assert polygon.area == 100
        assert polygon.bounds == (3, 2, 13, 12)
        assert polygon.normalize().equals_exact(shapely.box(3, 2, 13, 12).normalize())


def test_a_stair_becomes_a_line():
    labels = np.tril(np.ones((20, 20), np.uint8))
    (polygon,) = trace(labels, smooth=True).polygons
    assert len(polygon.exterior.coords) <= 8
    assert polygon.area == pytest.approx(210, abs=0.5)


def test_holes_are_kept_and_may_hold_islands():
    labels = np.ones((9, 11), np.uint8)
    labels[2:7, 2:9] = 0
    labels[4, 5] = 1
    labels[1, 9] = 2
    traced = trace(labels)
    assert traced.labels.tolist() == [1, 1, 2]
    assert [len(polygon.interiors) for polygon in traced.polygons] == [2, 0, 0]
    assert shapely.area(traced.polygons).tolist() == [99 - 35 - 1, 1, 1]


def test_touching_at_a_corner_separates_components():
    assert len(trace(np.eye(4, dtype=np.uint8)).polygons) == 4


def test_touching_itself_at_a_corner_makes_a_hole_not_a_bow_tie():
    labels = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]], np.uint8)
    labels[2, 3], labels[3, 2], labels[3, 3] = 1, 1, 0
    (polygon,) = trace(labels).polygons
    assert polygon.is_valid
    assert polygon.area == labels.sum()


def test_order_is_that_of_labels_then_of_reading():
    labels = np.array([[2, 0, 1], [0, 0, 0], [1, 0, 2]], np.uint8)
    traced = trace(labels)
    assert traced.labels.tolist() == [1, 1, 2, 2]
    assert [polygon.bounds[:2] for polygon in traced.polygons] == [(2, 0), (0, 2), (0, 0), (2, 2)]


@pytest.mark.parametrize("smooth", [False, True])
def test_nothing_gives_nothing(smooth):
    for shape in [(0, 0), (0, 5), (3, 4)]:
        traced = trace(np.zeros(shape, np.uint8), smooth=smooth)
        assert len(traced.polygons) == 0
        assert traced.components.shape == shape


def test_a_map_of_three_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"rows and columns.*\(2, 3, 4\)"):
        trace(np.zeros((2, 3, 4), np.uint8))


def test_the_transposed_map_gives_the_transposed_polygons():
    labels = smooth_map(40, 57)
    turned = trace(np.ascontiguousarray(labels.T), smooth=True)
    mirrored = shapely.transform(trace(labels, smooth=True).polygons, lambda xy: xy[:, ::-1])
    assert {shapely.to_wkb(p) for p in shapely.normalize(turned.polygons)} == {
        shapely.to_wkb(p) for p in shapely.normalize(mirrored)
    }


@pytest.mark.parametrize("smooth", [False, True])
def test_polygons_are_the_same_in_batches(monkeypatch: pytest.MonkeyPatch, smooth: bool) -> None:
    labels = smooth_map(70, 90, noise=0.1)
    whole = trace(labels, smooth=smooth)
    assert len(whole.polygons) > 50
    for edges in (1, 60, 300):
        monkeypatch.setattr(contours, "_BATCH_EDGES", edges)
        parts = trace(labels, smooth=smooth)
        assert [p.wkb for p in parts.polygons] == [p.wkb for p in whole.polygons]


def test_a_large_map_takes_seconds():
    labels = smooth_map(600, 800, noise=0.05)
    start = time.perf_counter()
    trace(labels, smooth=True)
    assert time.perf_counter() - start < 20
