"""The file for QuPath: what is written follows the rules, and the checker of the rules sees each violation."""

import gzip
import json
import math
import os
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from tests.qupath_rules import check
from tests.test_polygons import as_array, nasty
from wsiengine.errors import OutputError
from wsiengine.qupath import Annotation, FileLimits, make_ids, read_geojson, write_geojson

COLOUR = (213, 94, 0)


def square(k: int = 0, **changes) -> Annotation:
    """A 7 × 5 px rectangle, each k at another place."""
    geometry = shapely.box(10 * k, 3, 10 * k + 7, 8)
    return replace(
        Annotation(str(uuid.UUID(int=k + 1)), "Adenoma", COLOUR, geometry, {"Area mm^2": 1.25, "Tiles": 3.0}), **changes
    )


def load(path: Path) -> list[dict]:
    return json.loads(path.read_bytes())["features"]


# --- what is written -----------------------------------------------------------------------------------


def test_one_object_to_the_letter(tmp_path):
    (path,) = write_geojson([square()], tmp_path / "a.geojson")
    assert path.read_text() == (
        '{"type":"FeatureCollection","features":[{"type":"Feature","id":"00000000-0000-0000-0000-000000000001",'
        '"geometry":{"type":"Polygon","coordinates":[[[7,3],[7,8],[0,8],[0,3],[7,3]]]},"properties":'
        '{"objectType":"annotation","classification":{"name":"Adenoma","color":[213,94,0]},'
        '"measurements":{"Area mm^2":1.25,"Tiles":3}}}]}\n'
    )
    assert check(path) == []


def test_no_object_is_still_a_collection(tmp_path):
    (path,) = write_geojson([], tmp_path / "a.geojson")
    assert load(path) == []
    assert check(path) == []


def test_coordinates_are_x_then_y_from_the_corner_of_the_bounds(tmp_path):
    annotation = square(geometry=shapely.box(1000, 200, 1010, 250))  # x 1000–1010, y 200–250
    (path,) = write_geojson([annotation], tmp_path / "a.geojson", offset_l0=(150, 900))
    xy = np.array(load(path)[0]["geometry"]["coordinates"][0])
    assert xy.min(axis=0).tolist() == [100, 50]
    assert xy.max(axis=0).tolist() == [110, 100]


def test_coordinates_have_two_decimals_and_lose_no_digit_far_out(tmp_path):
    far = square(geometry=shapely.box(1_234_567.894, 10.126, 1_234_600.125, 20))
    (path,) = write_geojson([far], tmp_path / "a.geojson")
    assert "1234567.89" in path.read_text()
    assert check(path) == []
    assert read_geojson(path)[0].geometry.bounds == (1234567.89, 10.13, 1234600.12, 20.0)


def test_gzip_by_name_and_equal_bytes_every_time(tmp_path):
    objects = [square(k) for k in range(5)]
    (first,) = write_geojson(objects, tmp_path / "a.geojson.gz")
    os.utime(first, (1, 1))
    (second,) = write_geojson(iter(objects), tmp_path / "b.geojson.gz")
    (plain,) = write_geojson(objects, tmp_path / "a.geojson")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[3:8] == bytes(5)  # no name, no time
    assert gzip.decompress(first.read_bytes()) == plain.read_bytes()
    assert check(first) == []


@pytest.mark.parametrize("name", ["a.json", "a.geojson.zip", ".geojson", "a.gz"])
def test_another_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.geojson or \.geojson\.gz"):
        write_geojson([], tmp_path / name)


def test_measurements_that_are_not_finite_stay_out(tmp_path):
    numbers = {"a": math.nan, "b": math.inf, "c": 1e39, "d": 0.1 + 0.2, "e": np.float32(2.5), "f": 7}
    (path,) = write_geojson([square(measurements=numbers)], tmp_path / "a.geojson")
    assert load(path)[0]["properties"]["measurements"] == {"d": 0.3, "e": 2.5, "f": 7}
    assert check(path) == []


def test_name_and_lock_are_written_only_where_set(tmp_path):
    (path,) = write_geojson([square(), square(1, name="A", locked=True)], tmp_path / "a.geojson")
    first, second = (feature["properties"] for feature in load(path))
    assert not {"name", "isLocked"} & set(first)
    assert (second["name"], second["isLocked"]) == ("A", True)
    assert check(path) == []


def test_an_object_without_class(tmp_path):
    (path,) = write_geojson([square(class_name=None, object_type="tile")], tmp_path / "a.geojson")
    assert "classification" not in load(path)[0]["properties"]
    assert check(path) == []
    assert read_geojson(path)[0].class_name is None


@pytest.mark.parametrize("name", ["Tumour: positive", "two\nlines", "two\rlines", "", "  "])
def test_class_names_that_qupath_cannot_take(tmp_path, name):
    with pytest.raises(ValueError, match="class name"):
        write_geojson([square(class_name=name)], tmp_path / "a.geojson")
    assert list(tmp_path.iterdir()) == []


def test_names_are_plain_text_everywhere(tmp_path):
    name = '<script>alert("µ 腺腫 & \u2028")</script>'
    (path,) = write_geojson([square(class_name=name, name="\ud800 half a character")], tmp_path / "a.geojson")
    assert "<" not in path.read_text("utf-8")
    assert load(path)[0]["properties"]["classification"]["name"] == name
    assert check(path) == []


def test_shapes_without_area_are_left_out(tmp_path):
    shapes = [shapely.Polygon(), shapely.LineString([(0, 0), (9, 9)]), shapely.box(5, 5, 5.004, 5.004), None]
    objects = [*(square(k, geometry=shape) for k, shape in enumerate(shapes)), square(9)]
    (path,) = write_geojson(objects, tmp_path / "a.geojson")
    assert [feature["id"] for feature in load(path)] == [square(9).id]


@given(st.lists(nasty(), min_size=1, max_size=8), st.sampled_from([(0, 0), (17, 1203), (0.5, 99.125)]))
def test_whatever_the_shapes_the_file_is_accepted(tmp_path_factory, shapes, offset):
    path = tmp_path_factory.mktemp("nasty") / "a.geojson"
    write_geojson([square(k, geometry=shape) for k, shape in enumerate(shapes)], path, offset_l0=offset)
    assert check(path) == []


# --- files ---------------------------------------------------------------------------------------------


def test_too_many_objects_go_on_in_another_file(tmp_path):
    objects = [square(k) for k in range(7)]
    paths = write_geojson(objects, tmp_path / "a.geojson", limits=FileLimits(objects=3))
    assert [path.name for path in paths] == ["a.geojson", "a.part2.geojson", "a.part3.geojson"]
    assert [len(load(path)) for path in paths] == [3, 3, 1]
    assert all(check(path) == [] for path in paths)
    assert [annotation.id for annotation in read_geojson(paths[0])] == [annotation.id for annotation in objects]


def test_too_many_bytes_go_on_in_another_file(tmp_path):
    limits = FileLimits(size_bytes=1000)
    paths = write_geojson([square(k) for k in range(9)], tmp_path / "a.geojson.gz", limits=limits)
    assert len(paths) > 2
    assert all(len(gzip.decompress(path.read_bytes())) <= 1000 for path in paths)
    assert len(read_geojson(paths[0])) == 9


def test_a_smaller_export_removes_the_parts_of_a_larger_one(tmp_path):
    write_geojson([square(k) for k in range(7)], tmp_path / "a.geojson", limits=FileLimits(objects=2))
    other = tmp_path / "a.part9.geojson"
    other.write_text("not ours: the numbers before it are missing")
    (path,) = write_geojson([square()], tmp_path / "a.geojson")
    assert sorted(tmp_path.iterdir()) == [path, other]
    assert len(read_geojson(path)) == 1


def test_a_failure_leaves_the_old_file_and_no_rest(tmp_path):
    (path,) = write_geojson([square()], tmp_path / "a.geojson")
    before = path.read_bytes()

    def breaking():
        yield from (square(k) for k in range(5000))  # more than is held at a time: the draft has been begun
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_geojson(breaking(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_told_in_words(tmp_path):
    with pytest.raises(OutputError, match=r"Could not write a\.geojson: No such file"):
        write_geojson([square()], tmp_path / "nowhere" / "a.geojson")


def test_objects_are_taken_as_a_stream(tmp_path):
    """A batch is held, not all: the first objects are gone before the last are made."""
    alive: set[int] = set()
    most = 0

    class Measured(dict):
        def __init__(self, k: int) -> None:
            super().__init__(k=k)
            self.k = k
            alive.add(k)

        def __del__(self) -> None:
            alive.discard(self.k)

    def objects():
        nonlocal most
        for k in range(9000):
            most = max(most, len(alive))
            yield square(k, measurements=Measured(k))

    (path,) = write_geojson(objects(), tmp_path / "a.geojson")
    assert len(load(path)) == 9000
    assert most < 5000


# --- reading -------------------------------------------------------------------------------------------


def test_what_was_written_is_read_back(tmp_path):
    hole = shapely.Polygon(shapely.box(0, 0, 9, 7).exterior, [shapely.box(2, 2, 4, 5).exterior])
    objects = [square(name="A", locked=True), square(1, geometry=hole, object_type="detection")]
    (path,) = write_geojson(objects, tmp_path / "a.geojson.gz")
    for annotation, back in zip(objects, read_geojson(path), strict=True):
        assert back.geometry.equals(annotation.geometry)
        for what in ("id", "class_name", "colour", "measurements", "object_type", "name", "locked"):
            assert getattr(back, what) == getattr(annotation, what)


def test_older_files_of_qupath_pack_the_colour(tmp_path):
    feature = {
        "type": "Feature",
        "geometry": {"type": "Point", "coordinates": [1, 2]},
        "properties": {"classification": {"name": "Tumor: Positive", "colorRGB": -3140401}},
    }
    path = tmp_path / "old.geojson"
    path.write_text(json.dumps([feature]))
    (annotation,) = read_geojson(path)
    assert annotation.colour == (208, 20, 207)
    assert annotation.class_name == "Tumor: Positive"


# --- ids -----------------------------------------------------------------------------------------------


def test_ids_depend_on_slide_run_class_and_outline_only():
    a = shapely.box(0, 0, 4, 5)
    turned = shapely.Polygon(list(a.exterior.coords)[2:-1] + list(a.exterior.coords)[:2])
    base = make_ids(as_array(a), ["A"], ("slide", "run"))
    assert make_ids(as_array(turned), ["A"], ("slide", "run")) == base
    others = [
        make_ids(as_array(a), ["B"], ("slide", "run")),
        make_ids(as_array(a), ["A"], ("other", "run")),
        make_ids(as_array(a), ["A"], ("slide", "other")),
        make_ids(as_array(shapely.box(0, 0, 4, 5.01)), ["A"], ("slide", "run")),
    ]
    assert len({*base, *(one for (one,) in others)}) == 5
    assert uuid.UUID(base[0]).version == 5


def test_equal_objects_get_different_ids():
    a = shapely.box(0, 0, 4, 5)
    ids = make_ids(as_array(a, a, a), ["A"] * 3, ("slide", "run"))
    assert len(set(ids)) == 3


# --- the checker sees every violation ------------------------------------------------------------------

GOOD = {
    "type": "Feature",
    "id": "00000000-0000-0000-0000-00000000000a",
    "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [10, 0], [10, 8], [0, 8], [0, 0]]]},
    "properties": {
        "objectType": "annotation",
        "classification": {"name": "A", "color": [1, 2, 3]},
        "measurements": {"m": 1.5},
    },
}
RING = [[0, 0], [10, 0], [10, 8], [0, 8], [0, 0]]


def with_(path: str, value: object) -> dict:
    """GOOD with one place changed: "properties.name" and the like."""
    feature = json.loads(json.dumps(GOOD))
    *parents, last = path.split(".")
    place = feature
    for key in parents:
        place = place[key]
    place[last] = value
    return feature


def polygon(*rings: list) -> dict:
    return {"type": "Polygon", "coordinates": list(rings)}


VIOLATIONS = {
    "type missing": (with_("type", "feature"), "type:"),
    "id null": (with_("id", None), "id:"),
    "id upper case": (with_("id", "00000000-0000-0000-0000-00000000000A"), "id:"),
    "id no uuid": (with_("id", "17"), "id:"),
    "properties list": (with_("properties", []), "properties:"),
    "unknown kind": (with_("properties.objectType", "nucleus"), "objectType:"),
    "no colour": (with_("properties.classification", {"name": "A"}), "without [r, g, b]"),
    "colour out of range": (with_("properties.classification.color", [1, 2, 256]), "without [r, g, b]"),
    "colour of floats": (with_("properties.classification.color", [1.0, 2.0, 3.0]), "without [r, g, b]"),
    "class with colon": (with_("properties.classification.name", "a: b"), "line break"),
    "class with newline": (with_("properties.classification.name", "a\nb"), "line break"),
    "class as text": (with_("properties.classification", "A"), "classification:"),
    "measurements list": (with_("properties.measurements", [{"name": "m", "value": 1}]), "measurements:"),
    "measurement text": (with_("properties.measurements.m", "1"), "measurements:"),
    "measurement beyond float32": (with_("properties.measurements.m", 1e39), "measurements:"),
    "measurement null": (with_("properties.measurements.m", None), "null:"),
    "locked false": (with_("properties.isLocked", False), "isLocked:"),
    "name number": (with_("properties.name", 5), "name:"),
    "null deep inside": (with_("properties.extra", {"a": [1, None]}), "null:"),
    "metadata on detection": (
        with_("properties", {"objectType": "detection", "metadata": {}, "measurements": {}}),
        "metadata:",
    ),
    "geometry null": (with_("geometry", None), "geometry:"),
    "collection": (with_("geometry", {"type": "GeometryCollection", "geometries": []}), "not taken"),
    "one part": (with_("geometry", {"type": "MultiPolygon", "coordinates": [[RING]]}), "one part"),
    "open ring": (with_("geometry", polygon(RING[:-1])), "closed: False"),
    "three positions": (with_("geometry", polygon([[0, 0], [5, 5], [0, 0]])), "3 positions"),
    "no area": (with_("geometry", polygon([[0, 0], [5, 5], [9, 9], [0, 0]])), "px²"),
    "speck": (with_("geometry", polygon([[0, 0], [0.1, 0], [0.1, 0.1], [0, 0]])), "px²"),
    "hole without area": (with_("geometry", polygon(RING, [[1, 1], [2, 2], [3, 3], [1, 1]])), "px²"),
    "bow tie": (with_("geometry", polygon([[0, 0], [10, 8], [10, 0], [0, 9], [0, 0]])), "invalid"),
    "hole outside": (with_("geometry", polygon(RING, [[20, 1], [22, 1], [22, 3], [20, 1]])), "invalid"),
    "holes overlap": (
        with_("geometry", polygon(RING, [[1, 1], [4, 1], [4, 4], [1, 1]], [[2, 1], [5, 1], [5, 4], [2, 1]])),
        "invalid",
    ),
    "three decimals": (with_("geometry", polygon([[0, 0], [9.125, 0], [9, 8], [0, 0]])), "decimals"),
    "three axes": (with_("geometry", polygon([[0, 0, 0], [9, 0, 0], [9, 8, 0], [0, 0, 0]])), "position"),
    "position null": (with_("geometry", polygon([[0, 0], [9, None], [9, 8], [0, 0]])), "position"),
}


def collection(*features: dict) -> bytes:
    return json.dumps({"type": "FeatureCollection", "features": features}, separators=(",", ":")).encode()


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_planted_violation_is_seen(tmp_path, name):
    feature, words = VIOLATIONS[name]
    path = tmp_path / "a.geojson"
    path.write_bytes(collection(GOOD))
    assert check(path) == []
    path.write_bytes(collection(feature))
    assert any(words in problem for problem in check(path)), check(path)


FILES = {
    "mis-cased type": (collection(GOOD).replace(b"FeatureCollection", b"featureCollection"), "0 objects"),
    "bare list": (b"[]", "0 objects"),
    "id twice": (collection(GOOD, GOOD), "not unique"),
    "NaN": (collection(GOOD).replace(b"1.5", b"NaN"), "NaN"),
    "cut off": (collection(GOOD)[:-3], "no JSON"),
    "latin-1": (collection(GOOD).replace(b'"A"', b'"\xe9"'), "no JSON"),
    "not compact": (json.dumps({"type": "FeatureCollection", "features": [GOOD]}).encode(), "compact"),
    "key twice": (collection(GOOD).replace(b'"m":1.5', b'"m":1.5,"m":2'), "twice"),
    "gzip without the name": (gzip.compress(collection(GOOD)), "gzip"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_planted_fault_of_the_file_is_seen(tmp_path, name):
    data, words = FILES[name]
    path = tmp_path / "a.geojson"
    path.write_bytes(data)
    assert any(words in problem for problem in check(path)), check(path)


def test_names_that_qupath_does_not_know_are_seen(tmp_path):
    for name in ("a.json", "a.gz", "a.geojson.gz"):
        (tmp_path / name).write_bytes(gzip.compress(collection(GOOD)) if name == "a.gz" else collection(GOOD))
        assert any("name:" in problem for problem in check(tmp_path / name))
