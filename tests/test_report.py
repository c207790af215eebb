"""The overlay picture: what is where, what the legend says, how long the scale bar is."""

import struct
import uuid
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely

from tests.fakes import ArraySlide, position_pixels
from wsiengine.errors import OutputError, ResolutionError
from wsiengine.geometry import Mpp, Size
from wsiengine.qupath import Annotation
from wsiengine.report import (
    INK,
    LEAST_SIDE_PX,
    Style,
    compose,
    draw_overlay,
    draw_regions,
    draw_scale_bar,
    legend,
    scale_bar_um,
    thumbnail,
)

ORANGE, GREEN = (213, 94, 0), (0, 158, 115)


def region(geometry, name: str | None = "Adenocarcinoma", colour=ORANGE) -> Annotation:
    return Annotation(str(uuid.UUID(int=1)), name, colour, geometry)


def read_png(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]


def near(colour, wanted, within: int = 12) -> np.ndarray:
    return (np.abs(np.asarray(colour, int) - wanted) <= within).all(axis=-1)


# --- thumbnail -----------------------------------------------------------------------------------------


def test_a_thumbnail_reads_the_coarse_level_only():
    slide = ArraySlide(position_pixels(640, 960), downsamples=(1, 4, 16))
    picture = thumbnail(slide, 240)
    assert picture.shape == (160, 240, 3)
    assert {read.level for read in slide.reads} == {1}
    assert abs(int(picture[80, 200, 1]) - (20 + 200 * 802 // 960)) <= 1  # green tells x


def test_a_thumbnail_never_enlarges():
    assert thumbnail(ArraySlide(position_pixels(30, 41)), 2048).shape == (30, 41, 3)


def test_a_slide_without_resolution_is_refused():
    with pytest.raises(ResolutionError):
        thumbnail(ArraySlide(position_pixels(30, 41), mpp=None))


# --- regions -------------------------------------------------------------------------------------------


def test_regions_lie_where_they_are_with_holes_open():
    canvas = np.full((100, 200, 3), 255, np.uint8)
    ring = shapely.Polygon(shapely.box(400, 100, 1600, 900).exterior, [shapely.box(800, 400, 1200, 600).exterior])
    draw_regions(canvas, [region(ring)], Size(1000, 2000), 2)  # 10 level-0 px per pixel
    tint = np.rint(np.array(ORANGE) * 0.28 + 255 * 0.72)
    assert near(canvas[20, 60], tint)
    assert near(canvas[50, 100], (255, 255, 255))  # in the hole
    assert near(canvas[5, 100], (255, 255, 255))  # above
    assert near(canvas[80, 20], (255, 255, 255))  # on the left
    outlined = near(canvas, ORANGE, 40)
    ys, xs = np.nonzero(outlined)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == pytest.approx((10, 90, 40, 160), abs=1.5)
    assert outlined[40, 90]  # the hole's edge is outlined too


def test_regions_are_not_shifted_by_half_a_pixel():
    """On the average over places between pixels: OpenCV rounds each edge by up to half a pixel."""
    errors = []
    for step in np.arange(0.05, 1, 0.1):
        canvas = np.zeros((50, 60, 3), np.uint8)
        box = shapely.box(10 + step, 20 + step, 30 + step, 25.5 + step)
        draw_regions(canvas, [region(box, colour=(255, 255, 255))], Size(50, 60), 1)
        weight = canvas[..., 0].astype(float)
        y, x = np.mgrid[:50, :60] + 0.5
        centre = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
        errors.append(np.subtract(centre, box.centroid.coords[0]))
    assert np.abs(np.mean(errors, axis=0)).max() < 0.15


def test_of_two_neighbours_both_outlines_are_seen():
    canvas = np.full((60, 80, 3), 255, np.uint8)
    left, right = region(shapely.box(0, 0, 40, 60)), region(shapely.box(40, 0, 80, 60), "Normal", GREEN)
    draw_regions(canvas, [left, right], Size(60, 80), 2)
    assert near(canvas[30, 38], ORANGE, 3)
    assert near(canvas[30, 41], GREEN, 3)


def test_several_parts_are_all_drawn():
    canvas = np.full((50, 80, 3), 255, np.uint8)
    parts = shapely.MultiPolygon([shapely.box(2, 2, 20, 20), shapely.box(50, 30, 70, 45)])
    draw_regions(canvas, [region(parts)], Size(50, 80), 1)
    assert not near(canvas[[10, 38], [10, 60]], (255, 255, 255)).any()


# --- legend --------------------------------------------------------------------------------------------


def test_the_legend_names_the_classes_that_occur_with_their_area():
    annotations = [
        region(shapely.box(0, 0, 2000, 1000)),
        region(shapely.box(0, 0, 1000, 1000), "Normal", GREEN),
        region(shapely.box(0, 0, 1000, 1000)),
        region(shapely.box(0, 0, 10, 10), None, (0, 0, 0)),
    ]
    entries = legend(annotations, Mpp.square(0.5))
    assert [(entry.name, entry.colour, entry.regions) for entry in entries] == [
        ("Adenocarcinoma", ORANGE, 2),
        ("Normal", GREEN, 1),
        ("Unclassified", (0, 0, 0), 1),
    ]
    assert [entry.area_mm2 for entry in entries[:2]] == [pytest.approx(0.75), pytest.approx(0.25)]
    assert str(entries[0]) == "Adenocarcinoma   0.75 mm²"


def test_every_entry_of_the_legend_is_on_the_page():
    canvas = np.full((200, 300, 3), 255, np.uint8)
    colours = [(10 + 20 * k, 250 - 20 * k, 100) for k in range(12)]
    annotations = [region(shapely.box(0, 0, 1000, 1000), f"Class µ{k} 腺腫", c) for k, c in enumerate(colours)]
    style = Style.of(LEAST_SIDE_PX)
    page = compose(canvas, "a title", legend(annotations, Mpp.square(1)), style)
    for colour in colours:
        assert near(page, colour, 0).sum() >= (style.text - 2) ** 2
    without = compose(canvas, "a title", legend(annotations[:-1], Mpp.square(1)), style)
    assert not near(without, colours[-1], 0).any()


def test_a_long_title_stays_on_the_page():
    canvas = np.full((60, 640, 3), 255, np.uint8)
    style = Style.of(640)
    page = compose(canvas, "a slide with a very long name " * 4, [], style)
    assert near(page[: style.margin * 2, -style.margin :], (255, 255, 255), 0).all()
    assert not near(page[: style.margin * 2], (255, 255, 255), 0).all()


# --- scale bar -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("um_per_px", [0.25, 3.7, 25.0, 110.0])
def test_the_scale_bar_is_as_long_as_it_says(um_per_px):
    page, style = np.full((300, 728, 3), 255, np.uint8), Style.of(728)
    assert style.margin == 14
    draw_scale_bar(page, um_per_px, style)
    dark = near(page, INK, 3)
    columns = np.flatnonzero(dark[300 - 14 - 1])
    bar = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)[-1]  # text stands on its left
    assert len(bar) == pytest.approx(scale_bar_um(um_per_px, 700) / um_per_px, abs=0.51)
    assert 700 / 15 < len(bar) <= 140
    assert bar[-1] == 728 - 14 - 1
    assert not dark[:270].any()


@pytest.mark.parametrize(
    ("um_per_px", "width", "length"), [(1.0, 1000, 200), (1.0, 999, 100), (0.5, 2048, 200), (1.0, 2600, 500)]
)
def test_scale_bars_are_round_numbers(um_per_px, width, length):
    assert scale_bar_um(um_per_px, width) == length


# --- the file ------------------------------------------------------------------------------------------


def chunks(path: Path) -> list[bytes]:
    data, at, found = path.read_bytes(), 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        found.append(data[at + 4 : at + 8])
        at += length + 12
    return found


def test_equal_input_gives_equal_bytes_without_metadata(tmp_path):
    slide = ArraySlide(position_pixels(300, 431), downsamples=(1, 4))
    annotations = [region(shapely.box(10, 20, 300, 200))]
    for name in ("a.png", "b.png"):
        draw_overlay(slide, annotations, tmp_path / name, title="crc5 1.0 · slide.svs")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert set(chunks(tmp_path / "a.png")) == {b"IHDR", b"IDAT", b"IEND"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_the_picture_shows_slide_region_and_legend(tmp_path):
    slide = ArraySlide(position_pixels(900, 1300), downsamples=(1, 4))
    draw_overlay(slide, [region(shapely.box(650, 450, 1300, 900))], tmp_path / "a.png", max_side_px=800)
    page = read_png(tmp_path / "a.png")
    style = Style.of(800)
    top = left = style.margin
    picture = page[top : top + 554, left : left + 800]
    untouched = thumbnail(slide, 800)
    assert np.array_equal(picture[20:200, 20:700], untouched[20:200, 20:700])
    tinted = untouched[300:500, 450:750] * 0.72 + np.array(ORANGE) * 0.28
    assert np.abs(picture[300:500, 450:750] - tinted).max() <= 1
    assert near(page[top + 554 :], ORANGE, 0).sum() > 100  # the legend's swatch


@pytest.mark.parametrize("side", [2600, 650])
def test_the_scale_bar_knows_the_scale_of_the_picture(tmp_path, monkeypatch, side):
    told = []
    monkeypatch.setattr("wsiengine.report.draw_scale_bar", lambda canvas, um_per_px, style, **_: told.append(um_per_px))
    slide = ArraySlide(position_pixels(900, 1300), mpp=Mpp(0.5, 0.25))
    draw_overlay(slide, [], tmp_path / "a.png", max_side_px=side)
    assert told == [pytest.approx(0.25 * max(1, 1300 / side))]


@pytest.mark.parametrize("shape", [(16, 16), (3, 400), (700, 20), (1, 1)])
def test_slides_of_any_shape(tmp_path, shape):
    slide = ArraySlide(position_pixels(*shape))
    draw_overlay(slide, [region(shapely.box(0, 0, shape[1], shape[0] / 2))], tmp_path / "a.png", title="tiny")
    assert min(read_png(tmp_path / "a.png").shape[:2]) > 50


def test_a_ready_thumbnail_is_used_instead_of_reading(tmp_path):
    slide = ArraySlide(position_pixels(300, 431))
    draw_overlay(slide, [], tmp_path / "a.png", picture=thumbnail(slide, 2048))
    count = len(slide.reads)
    draw_overlay(slide, [], tmp_path / "b.png", picture=thumbnail(slide, 2048))
    assert len(slide.reads) == 2 * count
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_folder_that_is_not_there_is_told_in_words(tmp_path):
    with pytest.raises(OutputError, match=r"Could not write a\.png: No such file"):
        draw_overlay(ArraySlide(position_pixels(30, 41)), [], tmp_path / "nowhere" / "a.png")
