"""Regions: what QuPath writes comes back as one geometry in level-0 pixels; everything else is refused in words."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiengine import regions
from wsiengine.errors import RegionError
from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.regions import load_region, points_inside, rasterise

SIZE = Size(2_000, 3_000)
SQUARE = [[100, 200], [500, 200], [500, 900], [100, 900], [100, 200]]  # x 100–500, y 200–900
OTHER = [[1000, 1000], [1400, 1000], [1400, 1600], [1000, 1600], [1000, 1000]]
HOLE = [[200, 300], [300, 300], [300, 500], [200, 500], [200, 300]]


def feature(kind: str, coordinates: object) -> dict:
    return {
        "type": "Feature",
        "id": "0d7cbd5a-1c2e-4c8e-9d2e-7a7f0f3f0001",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"objectType": "annotation", "classification": {"name": "Region*", "color": [200, 0, 0]}},
    }


def collection(*features: dict) -> dict:
    return {"type": "FeatureCollection", "features": list(features)}


def load(tmp_path: Path, content: object, bounds_l0: Box | None = None) -> object:
    path = tmp_path / "roi.geojson"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return load_region(path, size_l0=SIZE, bounds_l0=bounds_l0)


def refusal(tmp_path: Path, content: object) -> str:
    with pytest.raises(RegionError) as caught:
        load(tmp_path, content)
    assert caught.value.hint
    assert "--region" in caught.value.message
    return caught.value.message


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        collection(feature("Polygon", [SQUARE])),
        feature("Polygon", [SQUARE]),
        {"type": "Polygon", "coordinates": [SQUARE]},
        {"type": "MultiPolygon", "coordinates": [[SQUARE]]},
        [feature("Polygon", [SQUARE])],
        {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [SQUARE]}]},
        collection(feature("Point", [5, 5]), feature("LineString", [[0, 0], [9, 9]]), feature("Polygon", [SQUARE])),
        collection(feature("Polygon", [SQUARE[:-1]])),  # not closed
        collection(feature("Polygon", [SQUARE[::-1]])),  # wound the other way
        collection(feature("Polygon", [[[*position, 0.0] for position in SQUARE]])),  # with z
        collection({"type": "Feature", "geometry": None, "properties": {}}, feature("Polygon", [SQUARE])),
    ],
)
def test_every_shape_of_file(tmp_path: Path, content: object) -> None:
    assert shapely.equals(load(tmp_path, content), shapely.box(100, 200, 500, 900))


def test_gzip_and_byte_order_mark(tmp_path: Path) -> None:
    text = json.dumps(collection(feature("Polygon", [SQUARE]))).encode()
    for content in (gzip.compress(text), b"\xef\xbb\xbf" + text):
        assert load(tmp_path, content).area == 400 * 700


def test_x_comes_before_y(tmp_path: Path) -> None:
    assert load(tmp_path, feature("Polygon", [SQUARE])).bounds == (100, 200, 500, 900)


def test_union_of_all_polygons_with_their_holes(tmp_path: Path) -> None:
    overlapping = [[x + 100, y] for x, y in SQUARE]
    region = load(tmp_path, collection(feature("Polygon", [SQUARE, HOLE]), feature("Polygon", [OTHER])))
    assert region.area == 400 * 700 - 100 * 200 + 400 * 600
    assert load(tmp_path, collection(feature("Polygon", [SQUARE]), feature("Polygon", [overlapping]))).area == 500 * 700
    assert load(tmp_path, feature("MultiPolygon", [[SQUARE, HOLE], [OTHER]])).area == region.area


def test_qupath_counts_from_the_corner_of_the_bounds(tmp_path: Path) -> None:
    region = load(tmp_path, feature("Polygon", [SQUARE]), bounds_l0=Box(700, 40, 1_900, 2_900))
    assert region.bounds == (140, 900, 540, 1_600)


def test_the_region_is_clipped_to_the_slide(tmp_path: Path) -> None:
    region = load(tmp_path, feature("Polygon", [[[-50, -80], [60, -80], [60, 70], [-50, 70], [-50, -80]]]))
    assert region.bounds == (0, 0, 60, 70)


def test_crossing_rings_are_repaired(tmp_path: Path) -> None:
    bow_tie = [[0, 0], [200, 200], [200, 0], [0, 200], [0, 0]]
    region = load(tmp_path, feature("Polygon", [bow_tie]))
    assert region.is_valid
    assert region.area == pytest.approx(2 * 100 * 100)
    outside_hole = [[400, 300], [600, 300], [600, 400], [400, 400], [400, 300]]
    region = load(tmp_path, feature("Polygon", [SQUARE, outside_hole]))
    assert region.area == 400 * 700 - 100 * 100


# --- refusing ------------------------------------------------------------------------------------


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(RegionError, match="cannot be read"):
        load_region(tmp_path / "missing.geojson", size_l0=SIZE)
    with pytest.raises(RegionError, match=r"--tissue .* cannot be read"):
        load_region(tmp_path, size_l0=SIZE, name="--tissue")


@pytest.mark.parametrize("content", [b"", b"region of interest", b"{'type': 1}", b"\xff\xfe\x00\x81", b"<xml/>"])
def test_not_json(tmp_path: Path, content: bytes) -> None:
    assert "is not GeoJSON" in refusal(tmp_path, content)


def test_damaged_gzip(tmp_path: Path) -> None:
    assert "gzip" in refusal(tmp_path, gzip.compress(json.dumps(feature("Polygon", [SQUARE])).encode())[:-12])


@pytest.mark.parametrize(
    "content", [3, {}, {"a": 1}, ["x"], None, {"type": "Banana"}, {"type": "Feature", "geometry": [{}]}]
)
def test_json_but_not_geojson(tmp_path: Path, content: object) -> None:
    assert "GeoJSON" in refusal(tmp_path, content)


@pytest.mark.parametrize(
    "coordinates",
    [[["a", "b", "c"]], [[[1, "2y"], [3, 4], [5, 6]]], [5], "xy", [[[1], [2], [3]]], [[None, None]], [[[10**400, 1]]]],
)
def test_nonsense_coordinates(tmp_path: Path, coordinates: object) -> None:
    assert refusal(tmp_path, feature("Polygon", coordinates))


def test_numbers_that_are_no_coordinates(tmp_path: Path) -> None:
    for value in ("NaN", "Infinity", "-1e300"):
        text = json.dumps(feature("Polygon", [SQUARE])).replace("500", value).encode()
        assert refusal(tmp_path, text)


@pytest.mark.parametrize(
    "content",
    [
        collection(),
        collection(feature("Point", [5, 5])),
        collection(feature("LineString", [[0, 0], [9, 9]])),
        {"type": "Polygon"},
        feature("Polygon", []),
        feature("Polygon", [[]]),
        feature("Polygon", [[[0, 0], [5, 5], [0, 0]]]),
        feature("Polygon", [[[0, 0], [5, 5], [9, 9], [0, 0]]]),
    ],
)
def test_nothing_with_an_area(tmp_path: Path, content: object) -> None:
    assert "no polygon" in refusal(tmp_path, content)


def test_outside_the_slide(tmp_path: Path) -> None:
    message = refusal(tmp_path, feature("Polygon", [[[x + 3_000, y] for x, y in SQUARE]]))
    assert "outside the slide" in message
    assert "x 3,100 to 3,500, y 200 to 900" in message
    assert "3,000 × 2,000" in message


# --- inside --------------------------------------------------------------------------------------


def test_points_inside_and_on_the_boundary() -> None:
    box = shapely.box(100, 200, 500, 900)
    y = np.array([200.0, 200.1, 550, 899.9, 900])
    np.testing.assert_array_equal(points_inside(box, y, np.array(300.0)), [False, True, True, True, False])
    grid = points_inside(box, y[:, None], np.array([99.0, 100, 100.1, 499, 500])[None])
    assert grid.shape == (5, 5)
    np.testing.assert_array_equal(grid[2], [False, False, True, True, False])


def test_cells_are_inside_by_their_centre() -> None:
    lattice = Lattice(Size(1_000, 1_500), Mpp.square(0.5), Mpp.square(1.0), 32)  # 64 level-0 px per cell
    inside = rasterise(shapely.box(96, 160, 300, 420), lattice)
    # x centres 32, 96, 160, 224, 288, 352: a centre on the boundary is outside
    assert np.flatnonzero(inside.any(axis=0)).tolist() == [2, 3, 4]
    # y centres 160 (on the boundary), 224, 288, 352, 416, 480
    assert np.flatnonzero(inside.any(axis=1)).tolist() == [3, 4, 5, 6]
    assert inside[3:7, 2:5].all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.3, 3), st.sampled_from([1, 8, 32]))
def test_rasterise_agrees_with_asking_every_centre(seed: int, um: float, cell: int) -> None:
    rng = np.random.default_rng(seed)
    size = Size(int(rng.integers(50, 400)), int(rng.integers(50, 400)))
    lattice = Lattice(size, Mpp(0.5, 0.6), Mpp.square(um), cell)
    corners = rng.uniform(-50, 450, (7, 2))
    geometry = shapely.union_all([shapely.make_valid(shapely.Polygon(corners)), shapely.Point(90, 60).buffer(40)])
    step_y, step_x = lattice.l0_per_cell
    rows, cols = lattice.extent_cells.shape
    want = np.zeros((rows, cols), bool)
    for row in range(rows):
        for col in range(0, cols, 3):
            y = (row * step_y + min((row + 1) * step_y, size.height)) / 2
            x = (col * step_x + min((col + 1) * step_x, size.width)) / 2
            want[row, col] = geometry.contains(shapely.Point(x, y))
    np.testing.assert_array_equal(rasterise(geometry, lattice)[:, ::3], want[:, ::3])


def test_rasterise_is_the_same_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    lattice = Lattice(SIZE, Mpp.square(0.5), Mpp.square(1.0), 8)
    geometry = shapely.Point(1_200, 900).buffer(700).difference(shapely.box(1_000, 500, 1_300, 2_000))
    whole = rasterise(geometry, lattice)
    assert 0.1 < whole.mean() < 0.5
    monkeypatch.setattr(regions, "_STRIP_POINTS", 500)
    np.testing.assert_array_equal(rasterise(geometry, lattice), whole)


def test_the_whole_slide_and_nothing() -> None:
    lattice = Lattice(Size(1_003, 777), Mpp(0.25, 0.31), Mpp.square(0.9), 32)
    assert rasterise(shapely.box(0, 0, 777, 1_003), lattice).all()
    assert not rasterise(shapely.Polygon(), lattice).any()
    assert not rasterise(shapely.box(5_000, 5_000, 5_100, 5_100), lattice).any()
