"""Annotated slides as training data: which tiles are cut, what is in them, and what is refused."""

import csv
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.training.slide_labels import paint, write_geojson
from wsiengine.errors import RegionError, ResolutionError, WsiError
from wsiengine.geometry import Box, Mpp, Size
from wsiengine.slides import open_slide
from wsiengine.training.data import read_image
from wsiengine.training.slides import Cutting, SlideLabels, cut_slides, find_slides, has_slides
from wsiengine.training.tables import Labels

SIZE = Size(1411, 1803)
TISSUE = Box(100, 120, 1300, 1700)
A, B = Box(150, 200, 1250, 800), Box(150, 900, 700, 1650)
HOW = Cutting(mpp=1.0, tile_px=128, most=60)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    data = tmp_path_factory.mktemp("slides")
    for name in ("one", "two"):
        paint(data / f"{name}.svs", SIZE, TISSUE, [A, B])
        write_geojson(data / f"{name}.geojson", [("Tumour", A), ("Stroma", B), ("Ignore*", TISSUE), (None, TISSUE)])
    return data


def box_of(field):
    """The tile's place, in working pixels, from its name."""
    y, x = (int(v) for v in field.image.stem.split("-")[-2:])
    return Box.of(Size(HOW.tile_px, HOW.tile_px), y, x)


@pytest.fixture(scope="module")
def tiles(slides, tmp_path_factory):
    return cut_slides(find_slides(slides), Labels(), HOW, tmp_path_factory.mktemp("out") / "tiles")


def test_tiles_are_the_engines_pixels(slides, tiles):
    for field in tiles[::17]:
        slide = open_slide(slides / f"{field.case}.svs")
        np.testing.assert_array_equal(read_image(field.image), slide.read(box_of(field), Mpp.square(1.0)))
        slide.close()


def test_half_of_a_tile_is_tissue_of_its_class(tiles):
    assert {f.label for f in tiles} == {"Tumour", "Stroma"}
    assert {f.case for f in tiles} == {"one", "two"}
    for field in tiles:
        drawn = (A if field.label == "Tumour" else B).intersect(TISSUE)
        inside = box_of(field).scale(2).intersect(drawn).area / (4 * HOW.tile_px**2)
        assert inside >= 0.47, field.image.name  # half, but for cells of 8 px that an edge cuts
    partly = [f for f in tiles if not (A if f.label == "Tumour" else B).contains(box_of(f).scale(2))]
    assert len(partly) > 10


def test_neighbours_on_the_grid_and_places_at_random(tiles):
    """46 % of four cells is two: a stride of 64 px; as many again lie anywhere."""
    for label in ("Tumour", "Stroma"):
        boxes = [box_of(f) for f in tiles if f.label == label and f.case == "one"]
        on_grid = [b for b in boxes if b.y0 % 64 == 0 and b.x0 % 64 == 0]
        assert abs(len(boxes) - 2 * len(on_grid)) <= 2
        assert len(boxes) <= HOW.most
        assert len({(b.y0 % 64, b.x0 % 64) for b in boxes}) > 10


def test_the_same_tiles_again_and_only_once(slides, tiles, tmp_path):
    first = cut_slides(find_slides(slides), Labels(), HOW, tmp_path / "t")
    assert [(f.image.name, f.label, f.fold) for f in first] == [(f.image.name, f.label, f.fold) for f in tiles]
    stamp = first[0].image.stat().st_mtime_ns
    cut_slides(find_slides(slides), Labels(), HOW, tmp_path / "t")
    assert first[0].image.stat().st_mtime_ns == stamp
    other = cut_slides(find_slides(slides), Labels(), replace(HOW, most=10), tmp_path / "t")
    assert len(list((tmp_path / "t").glob("*.png"))) == len(other) < len(first)


def test_classes_are_merged_left_out_or_refused(slides, tmp_path):
    rows = find_slides(slides)[:1]
    only = cut_slides(rows, Labels(("Tumour",), {}, ("Stroma",)), HOW, tmp_path / "a")
    assert {f.label for f in only} == {"Tumour"}
    merged = cut_slides(rows, Labels(("Tissue",), {"Stroma": "Tissue", "Tumour": "Tissue"}), HOW, tmp_path / "b")
    assert Counter(f.label for f in merged).keys() == {"Tissue"}
    with pytest.raises(WsiError, match=r"an annotation of one\.geojson is called 'Stroma', which is none of Tumour"):
        cut_slides(rows, Labels(("Tumour",)), HOW, tmp_path / "c")


def test_a_table_says_case_fold_and_scale(slides, tiles, tmp_path):
    rows = [
        {"slide": slides / f"{n}.svs", "annotations": slides / f"{n}.geojson", "patient": "p7", "fold": 3, "mpp": 0.25}
        for n in ("one", "two")
    ]
    with (tmp_path / "slides.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    assert has_slides(tmp_path)
    found = find_slides(tmp_path)
    assert {(r.case, r.fold, r.mpp) for r in found} == {("p7", 3, 0.25)}
    fields = cut_slides(found, Labels(), HOW, tmp_path / "t")
    assert {(f.case, f.fold) for f in fields} == {("p7", 3)}
    assert 0.15 * len(tiles) < len(fields) < 0.4 * len(tiles)  # a quarter of the area
    torn = [replace(found[0], fold=1), found[1]]
    with pytest.raises(WsiError, match="1 case is in two folds: p7"):
        cut_slides(torn, Labels(), HOW, tmp_path / "u")


def test_unusable_slides_get_words(slides, tmp_path):
    row = find_slides(slides)[0]
    outside = write_geojson(tmp_path / "o.geojson", [("Tumour", A), ("Stroma", Box(5000, 6000, 5100, 6100))])
    with pytest.raises(RegionError, match=r"an annotation \(Stroma\) lies outside the slide: it spans x 6,000"):
        cut_slides([replace(row, annotations=outside)], Labels(), HOW, tmp_path / "t")
    small = write_geojson(tmp_path / "s.geojson", [("Tumour", Box(300, 300, 340, 340))])
    with pytest.raises(WsiError, match="the annotations gave no tile"):
        cut_slides([replace(row, annotations=small)], Labels(), HOW, tmp_path / "t")
    glass = write_geojson(tmp_path / "g.geojson", [("Tumour", Box(0, 1700, 1411, 1803))])
    with pytest.raises(WsiError, match="the annotations gave no tile"):
        cut_slides([replace(row, annotations=glass)], Labels(), HOW, tmp_path / "t")
    (tmp_path / "x.geojson").write_text("{", encoding="utf-8")
    with pytest.raises(RegionError, match="is not GeoJSON"):
        cut_slides([replace(row, annotations=tmp_path / "x.geojson")], Labels(), HOW, tmp_path / "t")


def test_a_slide_without_scale_gets_words(tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "a.png"), np.full((400, 500, 3), 150, np.uint8))
    write_geojson(tmp_path / "a.geojson", [("Tumour", Box(0, 0, 400, 500))])
    with pytest.raises(ResolutionError, match="µm/px"):
        cut_slides(find_slides(tmp_path), Labels(), HOW, tmp_path / "t")


def test_annotations_without_their_slide_get_words(tmp_path):
    write_geojson(tmp_path / "a.geojson", [("Tumour", A)])
    with pytest.raises(WsiError, match=r"a\.geojson belongs to no file"):
        find_slides(tmp_path)
    (tmp_path / "slides.csv").write_text("slide,annotations\nb.svs,a.geojson\n", encoding="utf-8")
    with pytest.raises(WsiError, match=r"names b\.svs, which is not there"):
        find_slides(tmp_path)
    (tmp_path / "slides.csv").write_text("slide\nb.svs\n", encoding="utf-8")
    with pytest.raises(WsiError, match="has no column annotations"):
        find_slides(tmp_path)
    assert SlideLabels(tmp_path, tmp_path, "c").fold == -1
