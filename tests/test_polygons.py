"""Simplification of shared boundaries, clipping, and geometry made acceptable."""

import math
import warnings

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from tests.test_contours import smooth_map
from wsiengine.contours import trace
from wsiengine.geometry import Box
from wsiengine.polygons import clean, clip, rectangle, simplify, to_level0

coordinate = st.floats(-50, 50).map(lambda value: round(value, 3)) | st.integers(-4, 4).map(float)
offset = st.sampled_from([0.0, 12.345, 250_000.5, 1_000_000.0])


@st.composite
def nasty(draw) -> shapely.Geometry:
    """Self-crossing rings, needles, repeated points, holes outside or across the shell, overlapping parts."""
    dx, dy = draw(offset), draw(offset)
    points = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=9)
    rings = [[(x + dx, y + dy) for x, y in draw(points)] for _ in range(draw(st.integers(1, 3)))]
    polygons = [shapely.Polygon(ring) for ring in rings]
    kind = draw(st.sampled_from(["polygon", "holes", "parts", "collection", "thin"]))
    if kind == "polygon":
        return polygons[0]
    if kind == "holes":
        return shapely.Polygon(rings[0], rings[1:])
    if kind == "parts":
        return shapely.MultiPolygon(polygons)
    if kind == "collection":
        return shapely.GeometryCollection([*polygons, shapely.LineString(rings[0]), shapely.Point(rings[0][0])])
    return shapely.LineString(rings[0]).buffer(draw(st.sampled_from([0.001, 0.004, 0.011])), quad_segs=2)


def as_array(*geometries) -> np.ndarray:
    out = np.empty(len(geometries), object)
    out[:] = geometries
    return out


# --- simplify ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth", [False, True])
def test_simplified_neighbours_neither_gap_nor_overlap(smooth):
    labels = smooth_map(60, 83) + 1  # every cell has a label: any gap or overlap shows in the area
    before = trace(labels, smooth=smooth).polygons
    after = simplify(before, 1.0)
    assert shapely.get_num_coordinates(after).sum() < 0.8 * shapely.get_num_coordinates(before).sum()
    assert shapely.coverage_is_valid(after)
    assert shapely.is_valid(after).all()
    assert shapely.area(after).sum() == pytest.approx(shapely.union_all(after).area, rel=1e-9)
    assert shapely.union_all(after).area == pytest.approx(60 * 83, rel=1e-3)


def test_no_region_vanishes():
    labels = np.zeros((40, 50), np.uint8)
    labels[5, 6], labels[20:22, 30], labels[10:30, 10:25] = 1, 2, 3
    labels[15, 15] = 1
    after = simplify(trace(labels).polygons, 30.0)
    assert len(after) == 4
    assert (shapely.area(after) > 0).all()
    assert shapely.is_valid(after).all()


def test_a_region_that_simplification_loses_is_put_back(monkeypatch):
    polygons = trace(smooth_map(20, 31)).polygons
    monkeypatch.setattr(shapely, "coverage_simplify", lambda given, *_, **__: as_array(shapely.Polygon(), *given[1:]))
    assert simplify(polygons, 1.0).tolist() == polygons.tolist()


def test_tolerance_zero_changes_nothing():
    polygons = trace(smooth_map(20, 31)).polygons
    assert simplify(polygons, 0) is polygons


# --- frames ------------------------------------------------------------------------------------------


def test_cells_to_level0_multiplies_each_axis_by_its_own():
    (square,) = to_level0(as_array(shapely.box(1, 2, 3, 4)), (10.5, 100.0))  # (y, x)
    assert square.bounds == (100, 21, 300, 42)


def test_a_box_becomes_x_then_y():
    assert rectangle(Box(1, 2, 30, 40)).bounds == (2, 1, 40, 30)


def test_clipping_cuts_only_what_crosses():
    inside, across, outside = shapely.box(1, 1, 2, 2), shapely.box(8, 1, 12, 3), shapely.box(20, 0, 21, 1)
    cut = clip(as_array(inside, across, outside), [shapely.box(0, 0, 10, 20)])
    assert cut[0] is inside
    assert cut[1].equals(shapely.box(8, 1, 10, 3))
    assert cut[2].is_empty


# --- clean -------------------------------------------------------------------------------------------


def test_a_good_polygon_is_only_rounded():
    (done,) = clean(as_array(shapely.box(1.004, 2.006, 30.001, 40.999)))
    assert done.bounds == (1.0, 2.01, 30.0, 41.0)


def test_a_bow_tie_becomes_two_triangles():
    (done,) = clean(as_array(shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])))
    assert done.geom_type == "MultiPolygon"
    assert done.area == pytest.approx(50)


def test_holes_survive():
    (done,) = clean(as_array(shapely.Polygon(shapely.box(0, 0, 9, 7).exterior, [shapely.box(2, 2, 4, 5).exterior])))
    assert done.area == 63 - 6


def test_specks_go():
    speck = shapely.box(3, 3, 3.05, 3.05)
    with_hole = shapely.Polygon(shapely.box(0, 0, 9, 7).exterior, [speck.exterior])
    with_part = shapely.MultiPolygon([speck, shapely.box(5, 5, 6, 7)])
    done = clean(as_array(speck, with_hole, with_part))
    assert done[0] is None
    assert done[1].equals(shapely.box(0, 0, 9, 7))
    assert done[2].geom_type == "Polygon"
    assert done[2].equals(shapely.box(5, 5, 6, 7))


def test_nothing_with_an_area_gives_none():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapely's own, on building them
        endless = [shapely.box(0, 0, math.inf, 1), shapely.Polygon([(0, 0), (math.nan, 1), (1, 1)])]
    empty = [None, shapely.Polygon(), shapely.Point(1, 2), shapely.LineString([(0, 0), (5, 5)])]
    assert clean(as_array(*endless, *empty)).tolist() == [None] * 6
    assert len(clean(np.empty(0, object))) == 0


def test_polygons_nested_in_collections_are_found():
    inner = shapely.GeometryCollection([shapely.box(4, 0, 6, 1), shapely.Point(0, 0)])
    (done,) = clean(as_array(shapely.GeometryCollection([shapely.box(0, 0, 1, 3), inner])))
    assert done.area == 5


def test_the_input_stays_as_it_is():
    geometries = as_array(shapely.box(0.123456, 0, 1, 1))
    clean(geometries)
    assert geometries[0].bounds[0] == 0.123456


@given(st.lists(nasty(), min_size=1, max_size=6))
def test_whatever_comes_is_valid_or_none(shapes):
    for done in clean(as_array(*shapes)):
        if done is None:
            continue
        assert done.is_valid
        assert done.area >= 0.01
        assert done.geom_type == "Polygon" or len(done.geoms) > 1
        xy = shapely.get_coordinates(done)
        assert np.array_equal(xy, np.round(xy, 2))


@given(nasty())
def test_area_is_kept_but_for_the_grid(shape):
    (done,) = clean(as_array(shape))
    whole = shapely.make_valid(shape)
    lost = shapely.symmetric_difference(shapely.buffer(whole, 0), done).area if done is not None else whole.area
    assert lost <= 0.02 * (whole.length + 1) + 0.05
