"""Maps to annotations: places, measurements, clipping, ids; and every file of a random map follows QuPath's rules."""

import time
from dataclasses import replace

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.qupath_rules import check
from tests.test_contours import smooth_map
from wsiengine import annotations, scratch
from wsiengine.annotations import AnnotateOptions, annotate, region_annotations, tile_annotations, write_geojson
from wsiengine.geometry import Lattice, Mpp, Size

CLASSES = [("Normal", (0, 158, 115)), ("Adenoma", (240, 228, 66)), ("Uncertain", (86, 180, 233))]
OPTIONS = AnnotateOptions("slide", "run", channel_names=("Normal", "Adenoma"))


def lattice(
    rows: int, cols: int, *, cell_px: int = 32, mpp: float = 1.0, overhang: tuple[int, int] = (0, 0)
) -> Lattice:
    """A lattice of (rows, cols) cells on a slide of 0.5 µm/px; the last ones overhang by (y, x) level-0 px."""
    side = cell_px * mpp / 0.5
    size = Size(round(rows * side) - overhang[0], round(cols * side) - overhang[1])
    made = Lattice(size, Mpp.square(0.5), Mpp.square(mpp), cell_px)
    assert made.extent_cells.shape == (rows, cols)
    return made


def coded(rows: int, cols: int, value: int = 128, channels: int = 2) -> np.ndarray:
    return np.full((rows, cols, channels), value, np.uint8)


# --- place ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance_um", [None, 0.0, 40.0])
def test_a_square_of_cells_lands_where_it_is_with_its_area(tolerance_um):
    labels = np.zeros((14, 17), np.uint8)
    labels[2:12, 3:13] = 2
    options = replace(OPTIONS, tolerance_um=tolerance_um)
    (found,) = annotate(labels, coded(14, 17), lattice(14, 17), CLASSES, options)
    assert found.geometry.bounds == (3 * 64, 2 * 64, 13 * 64, 12 * 64)  # x0, y0, x1, y1
    assert found.class_name == "Adenoma"
    assert found.colour == (240, 228, 66)
    assert found.measurements["Area mm^2"] == pytest.approx(100 * 32**2 / 1e6)


def test_pixels_that_are_not_square_scale_each_axis():
    grid = Lattice(Size(1000, 3000), Mpp(1.0, 0.5), Mpp.square(1.0), 10)
    labels = np.zeros(grid.extent_cells.shape, np.uint8)
    labels[4:6, 7:10] = 1
    (found,) = annotate(labels, coded(*labels.shape), grid, CLASSES, OPTIONS)
    assert found.geometry.bounds == (140, 40, 200, 60)
    assert found.measurements["Area mm^2"] == pytest.approx(6 * 100 / 1e6)


def test_cells_scale_by_one_multiplication_rounded_once():
    grid = Lattice(Size(9000, 9000), Mpp.square(0.4991), Mpp.square(1.0), 7)
    labels = np.zeros(grid.extent_cells.shape, np.uint8)
    labels[600, 601] = 1
    (found,) = annotate(labels, coded(*labels.shape), grid, CLASSES, OPTIONS)
    factor = 7 / 0.4991
    expected = [round(cells * factor, 2) for cells in (601, 600, 602, 601)]
    assert list(found.geometry.bounds) == expected


def test_regions_of_one_class_are_separate_and_ordered():
    labels = np.zeros((6, 9), np.uint8)
    labels[0, 0], labels[5, 8], labels[2:4, 4] = 2, 1, 2
    found = annotate(labels, coded(6, 9), lattice(6, 9), CLASSES, OPTIONS)
    assert [annotation.class_name for annotation in found] == ["Normal", "Adenoma", "Adenoma"]
    assert [annotation.geometry.bounds[1] for annotation in found] == [5 * 64, 0, 2 * 64]


def test_overhanging_cells_end_at_the_slide():
    labels = np.ones((5, 7), np.uint8)
    (found,) = annotate(labels, coded(5, 7), lattice(5, 7, overhang=(10, 63)), CLASSES, OPTIONS)
    assert found.geometry.bounds == (0, 0, 7 * 64 - 63, 5 * 64 - 10)


def test_neighbours_neither_gap_nor_overlap():
    labels = smooth_map(50, 71, classes=3) + 1
    for tolerance_um in (None, 0.0, 50.0):
        found = annotate(labels, coded(50, 71), lattice(50, 71), CLASSES, replace(OPTIONS, tolerance_um=tolerance_um))
        areas = sum(annotation.geometry.area for annotation in found)
        assert areas == pytest.approx(shapely.union_all([a.geometry for a in found]).area, rel=1e-7)
        assert areas == pytest.approx(50 * 71 * 64**2, rel=1e-3)


def test_small_regions_are_left_out_where_asked():
    labels = np.zeros((9, 11), np.uint8)
    labels[1, 1], labels[4:8, 4:8] = 1, 2
    everything = annotate(labels, coded(9, 11), lattice(9, 11), CLASSES, OPTIONS)
    large = annotate(labels, coded(9, 11), lattice(9, 11), CLASSES, replace(OPTIONS, min_area_um2=2 * 32**2))
    assert [annotation.class_name for annotation in everything] == ["Normal", "Adenoma"]
    assert [annotation.id for annotation in large] == [everything[1].id]


# --- measurements --------------------------------------------------------------------------------------


def test_measurements_are_means_over_analysed_cells():
    labels = np.zeros((4, 6), np.uint8)
    labels[1, 1:4] = 1
    values = coded(4, 6, value=9)
    values[1, 1:4, 0] = [1, 255, 0]  # 0, 1, not analysed
    values[1, 1:4, 1] = [0, 0, 0]
    counts = np.arange(24).reshape(4, 6)
    (found,) = annotate(labels, values, lattice(4, 6), CLASSES, replace(OPTIONS, tile_count=counts))
    assert found.measurements == {
        "Area mm^2": pytest.approx(3 * 32**2 / 1e6),
        "Mean probability Normal": pytest.approx(0.5),
        "Tiles": 7 + 8 + 9,
    }


def test_measurements_belong_to_their_own_region():
    labels = smooth_map(40, 53, seed=3)
    values = np.random.default_rng(0).integers(0, 256, (40, 53, 2), dtype=np.uint8)
    options = replace(OPTIONS, tolerance_um=0.0)
    for annotation in annotate(labels, values, lattice(40, 53), CLASSES, options):
        rows, cols = np.mgrid[:40, :53]
        inside = shapely.contains_xy(annotation.geometry, (cols + 0.5) * 64, (rows + 0.5) * 64)
        mine = values[inside, 1]
        mine = mine[mine > 0]
        expected = pytest.approx((mine.astype(float) - 1).mean() / 254) if len(mine) else None
        assert annotation.measurements.get("Mean probability Adenoma") == expected


# --- clipping ------------------------------------------------------------------------------------------


def test_a_region_cut_in_two_becomes_two_with_their_own_cells():
    labels = np.zeros((5, 20), np.uint8)
    labels[1:4] = 1
    values = coded(5, 20)
    values[:, :10], values[:, 10:] = 1, 255
    counts = np.ones((5, 20), np.int64)
    halves = shapely.MultiPolygon([shapely.box(0, 0, 7 * 64, 320), shapely.box(13 * 64, 0, 1280, 320)])
    options = replace(OPTIONS, clip_l0=halves, tile_count=counts)
    left, right = sorted(
        annotate(labels, values, lattice(5, 20), CLASSES, options), key=lambda annotation: annotation.geometry.bounds
    )
    assert left.geometry.bounds == (0, 64, 7 * 64, 4 * 64)
    assert right.geometry.bounds == (13 * 64, 64, 1280, 4 * 64)
    assert left.id != right.id
    assert (left.measurements["Mean probability Normal"], right.measurements["Mean probability Normal"]) == (0, 1)
    assert left.measurements["Tiles"] == right.measurements["Tiles"] == 21
    assert left.measurements["Area mm^2"] == pytest.approx(21 * 32**2 / 1e6)


def test_batches_and_strips_do_not_show(monkeypatch: pytest.MonkeyPatch, tmp_path):
    labels = smooth_map(90, 130, noise=0.1)
    values = np.random.default_rng(0).integers(1, 256, (90, 130, 2), np.uint8)
    counts = np.random.default_rng(1).integers(0, 3, (90, 130))
    ring = shapely.Point(2500, 3000).buffer(2600).difference(shapely.box(0, 2900, 9999, 3100))
    options = replace(OPTIONS, clip_l0=ring, tile_count=counts, min_area_um2=3000)
    classes = [(f"class {k}", (k, k, k)) for k in range(1, 5)]
    whole = annotate(labels, values, lattice(90, 130), classes, options)
    assert len(whole) > 20
    monkeypatch.setattr(annotations, "_BATCH", 3)
    monkeypatch.setattr(scratch, "STRIP", 1)
    made = annotate(labels, values, lattice(90, 130), classes, replace(options, scratch=scratch.Scratch(tmp_path, 0)))
    assert [(a.id, a.geometry.wkb, a.measurements) for a in made] == [
        (a.id, a.geometry.wkb, a.measurements) for a in whole
    ]


def test_cells_outside_the_region_do_not_count():
    labels = np.ones((4, 8), np.uint8)
    values = coded(4, 8, value=1)
    values[:, 4:] = 255
    options = replace(OPTIONS, clip_l0=shapely.box(0, 0, 4 * 64 + 10, 999))
    (found,) = annotate(labels, values, lattice(4, 8), CLASSES, options)
    assert found.measurements["Mean probability Normal"] == 0
    assert found.geometry.bounds[2] == 4 * 64 + 10


def test_a_region_elsewhere_leaves_nothing():
    options = replace(OPTIONS, clip_l0=shapely.box(5000, 5000, 6000, 6000))
    assert annotate(np.ones((4, 8), np.uint8), coded(4, 8), lattice(4, 8), CLASSES, options) == []


# --- ids -----------------------------------------------------------------------------------------------


def test_ids_repeat_and_are_unique():
    labels = smooth_map(60, 77, noise=0.1)
    first = annotate(labels, coded(60, 77), lattice(60, 77), CLASSES, OPTIONS)
    again = annotate(labels, coded(60, 77, 7), lattice(60, 77), CLASSES, OPTIONS)
    assert [annotation.id for annotation in first] == [annotation.id for annotation in again]
    assert len({annotation.id for annotation in first}) == len(first) > 100
    other = annotate(labels, coded(60, 77), lattice(60, 77), CLASSES, replace(OPTIONS, identity="other"))
    assert not {annotation.id for annotation in first} & {annotation.id for annotation in other}


# --- refusals ------------------------------------------------------------------------------------------


def test_maps_that_do_not_fit_are_refused():
    labels = np.zeros((4, 8), np.uint8)
    with pytest.raises(ValueError, match=r"\(4, 8\) cells, probabilities \(4, 9\)"):
        annotate(labels, coded(4, 9), lattice(4, 8), CLASSES, OPTIONS)
    with pytest.raises(ValueError, match="2 channel names for 3 channels"):
        annotate(labels, coded(4, 8, channels=3), lattice(4, 8), CLASSES, OPTIONS)
    with pytest.raises(ValueError, match="label 4 has no class: there are 3"):
        annotate(labels + 4, coded(4, 8), lattice(4, 8), CLASSES, OPTIONS)


def test_an_empty_map_gives_no_annotation():
    assert annotate(np.zeros((4, 8), np.uint8), coded(4, 8), lattice(4, 8), CLASSES, OPTIONS) == []


# --- tiles and plain regions ---------------------------------------------------------------------------


def test_tiles_are_tile_objects_clipped_to_the_slide(tmp_path):
    boxes = np.array([[0, 0, 100.004, 100], [200, 400, 300, 500], [280.0, 450.0, 380.0, 550.0]])
    found = tile_annotations(
        boxes,
        ["Normal", "Adenoma", None],
        [(0, 158, 115), (240, 228, 66), (0, 0, 0)],
        {"Normal": np.array([0.9, 0.2, np.nan]), "Adenoma": np.array([0.1, 0.8, 0.5])},
        lattice(5, 8),
        ("slide", "run"),
    )
    assert [tile.geometry.bounds for tile in found] == [
        (0, 0, 100, 100),
        (400, 200, 500, 300),
        (450, 280, 512, 320),
    ]
    assert {tile.object_type for tile in found} == {"tile"}
    assert found[1].measurements == {"Probability Normal": 0.2, "Probability Adenoma": 0.8}
    (path,) = write_geojson(found, tmp_path / "tiles.geojson")
    assert check(path) == []


def test_plain_regions(tmp_path):
    shapes = [shapely.box(0, 0, 9, 7), shapely.MultiPolygon([shapely.box(20, 0, 22, 3), shapely.box(30, 0, 32, 3)])]
    found = region_annotations(shapes, "Tissue", (0, 114, 178), "slide")
    assert [annotation.geometry.area for annotation in found] == [63, 6, 6]
    (path,) = write_geojson(found, tmp_path / "tissue.geojson")
    assert check(path) == []
    assert region_annotations([], "Tissue", (0, 114, 178), "slide") == []


# --- files ---------------------------------------------------------------------------------------------

maps = hnp.arrays(
    np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=14), elements=st.integers(0, 3)
)


@given(maps, st.sampled_from([None, 0.0, 3.0, 11.0, 70.0]), st.sampled_from([0.25, 1.0, 1.013, 7.77]))
def test_the_file_of_any_map_is_accepted(tmp_path_factory, labels, tolerance_um, mpp):
    grid = Lattice(Size(*labels.shape), Mpp.square(mpp), Mpp.square(mpp), 1)
    grid = replace(grid, mpp=Mpp.square(mpp * 8.003), slide_l0=Size(8 * labels.shape[0], 8 * labels.shape[1]))
    values = np.dstack([labels * 80, labels])
    found = annotate(labels, values, grid, CLASSES, replace(OPTIONS, tolerance_um=tolerance_um))
    path = tmp_path_factory.mktemp("map") / "a.geojson"
    write_geojson(found, path)
    assert check(path) == []
    covered = {annotation.class_name for annotation in found}
    assert covered == {CLASSES[k - 1][0] for k in np.unique(labels) if k}


@given(maps, st.lists(st.tuples(st.floats(-5, 120), st.floats(-5, 120)), min_size=3, max_size=7))
def test_the_file_of_any_clipped_map_is_accepted(tmp_path_factory, labels, points):
    grid = Lattice(Size(8 * labels.shape[0] - 3, 8 * labels.shape[1] - 5), Mpp.square(1), Mpp.square(1), 8)
    region = shapely.make_valid(shapely.Polygon(points))
    if region.area < 1:
        return
    found = annotate(labels, np.dstack([labels * 80, labels]), grid, CLASSES, replace(OPTIONS, clip_l0=region))
    path = tmp_path_factory.mktemp("map") / "a.geojson"
    write_geojson(found, path, offset_l0=(3, 1))
    assert check(path) == []
    for annotation in found:
        assert annotation.geometry.difference(region).area < 0.01 * region.length
        assert annotation.geometry.geom_type == "Polygon"


def test_tens_of_thousands_of_regions_take_seconds(tmp_path):
    labels = smooth_map(500, 700, noise=0.2)
    start = time.perf_counter()
    found = annotate(labels, coded(500, 700), lattice(500, 700), CLASSES, OPTIONS)
    write_geojson(found, tmp_path / "a.geojson")
    assert len(found) > 20_000
    assert time.perf_counter() - start < 60  # 6 s on an idle core
